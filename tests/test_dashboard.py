"""The dashboard: every figure of a small data set computed by hand, tables as they are asked for, and what nobody may see."""

from __future__ import annotations

import html
import json
import re
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import quote
from zoneinfo import ZoneInfo

import pytest
from conftest import CHROME, NOW, Stage, click, hit, segment

import tracker

MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
OUTLOOK = "Microsoft Office/16.0 (Windows NT 10.0; Microsoft Outlook 16.0.17928; Pro)"
GMAIL = "Mozilla/5.0 (Windows NT 5.1; rv:11.0) Gecko Firefox/11.0 (via ggpht.com GoogleImageProxy)"
APPLE = "Mozilla/5.0"
GATEWAY = "Barracuda Sentinel (EE)"
SHOES, HATS = "https://acme.com/shoes?size=42", "https://acme.com/hats"


@pytest.fixture
def stage(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """It is the 24th of November 2026, in the afternoon."""
    monkeypatch.setattr(tracker, "now_ms", lambda: NOW)
    return stage


def register(stage: Stage, *emails: tracker.Registration) -> None:
    with stage.database.transaction() as connection:
        tracker.register_emails(connection, stage.acme.number, emails, NOW)


def count(stage: Stage, *lines: bytes) -> None:
    segment(stage, *lines)
    assert stage.drain().hits == len(lines)


@pytest.fixture
def mailing(stage: Stage) -> Stage:
    """Five emails of the campaign Spring, sent two days ago, and two of Autumn, sent forty days ago, with their hits."""
    sent, before = NOW - 2 * DAY, NOW - 40 * DAY
    spring = [
        tracker.Registration(f"e{n}", "Shoes & hats", f"reader{n}@example.org", "Spring", sent) for n in range(1, 6)
    ]
    autumn = [tracker.Registration(f"a{n}", "Coats", f"old{n}@example.org", "Autumn", before) for n in (1, 2)]
    register(stage, *spring, *autumn)
    count(
        stage,
        hit(stage, "e1", sent + HOUR, ua=OUTLOOK),
        click(stage, "e1", SHOES, sent + 2 * HOUR),
        click(stage, "e1", "https://other.example/", sent + 3 * HOUR, answer="named", why="destination-not-allowed"),
        hit(stage, "e2", sent + HOUR, ua=GMAIL),
        hit(stage, "e2", sent + HOUR + 3_000, ua=GMAIL),  # a repeat
        hit(stage, "e3", sent + MINUTE, ua=APPLE),
        click(stage, "e4", HATS, sent + 5 * HOUR),  # read, though no image was loaded
        hit(stage, "e5", sent + 5_000, ua=GATEWAY),
        click(stage, "e5", SHOES, sent + 5_500, ua=GATEWAY),
        hit(stage, "a1", NOW - DAY),
        hit(stage, "a1", before + HOUR, ua=APPLE),
        hit(stage, "x9", NOW - 3 * HOUR),  # nobody registered it
    )
    return stage


def page(stage: Stage, path: str = "dashboard", status: int = 200, **asked: str) -> str:
    """A page of Acme's."""
    query = "&".join(f"{name}={quote(value, safe='')}" for name, value in asked.items())
    target = f"/{stage.acme.id}/{path}?{query}"
    # A server says what was asked for as it came; webtest alone decodes it first.
    text: str = stage.web.get(target, status=status, extra_environ={"REQUEST_URI": target}).text
    return text


def figures(text: str) -> dict[str, tuple[str, str, str]]:
    """Value, change and detail of each figure of a page, as a person reads them."""
    found = re.findall(
        r'<dt title="[^"]+">([^<]+)</dt><dd><b>([^<]*)</b> <span class="change">([^<]*)</span><small>(.*?)</small>',
        text,
    )
    return {
        label: (value.replace("\xa0", " "), change.replace("\xa0", " "), plain(detail))
        for label, value, change, detail in found
    }


def plain(markup: str) -> str:
    """Markup as text."""
    return (
        html.unescape(re.sub(r"\s+", " ", re.sub("<[^>]+>", "", markup)))
        .strip()
        .removesuffix(" Why?")
        .replace("\xa0", " ")
    )


def rows(text: str, name: str) -> list[list[str]]:
    """The cells of a table's rows, as text."""
    found = re.search(rf'<section aria-labelledby="{name}">(.*?)</section>', text, re.DOTALL)
    assert found, name
    body = re.search("<tbody>(.*?)</tbody>", found[1], re.DOTALL)
    if not body:
        return []
    return [
        [plain(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)]
        for row in body[1].split("<tr>")[1:]
    ]


# -- Golden numbers


def test_every_figure_is_what_one_computes_by_hand(mailing: Stage) -> None:
    assert figures(page(mailing)) == {
        "Sent": ("5", "+150 %", "emails sent in this range"),
        "Opened": (
            "40.0–60.0 %",
            f"{tracker.MINUS}10.0 points",
            "of these: 2 by people, 1 unconfirmed, 1 by machines; and 1 more by a click",
        ),
        "Clicked": ("40.0 %", "+40.0 points", "of these: 2 by people, 0 unconfirmed, 1 by machines"),
        "Click-to-open": ("66.7 %", "+66.7 points", "of 3 emails that people read"),
        "Opens": ("6", "+500 %", "4 by people (4 emails), 1 unconfirmed (1 email), 1 by machines (1 email)"),
        "Clicks": ("3", "none before", "2 by people (2 emails), 0 unconfirmed (0 emails), 1 by machines (1 email)"),
        "Machines": ("2", "none before", "1 on pixels and 1 on links"),
    }


def test_a_longer_range_has_the_older_mail_as_well(mailing: Stage) -> None:
    found = figures(page(mailing, range="90d"))
    assert found["Sent"][:2] == ("7", "none before")
    assert found["Opened"][0] == "42.9–57.1 %"  # e1, e2, a1 of seven; and e3
    assert found["Opens"][0] == "7"


def test_all_there_is_has_nothing_before_it(mailing: Stage) -> None:
    found = figures(page(mailing, range="all"))
    assert found["Sent"] == ("7", "", "emails sent in this range")
    assert {change for _, change, _ in found.values()} == {""}


def test_the_reasons_are_those_of_the_hits_in_the_range(mailing: Stage) -> None:
    text = page(mailing)
    body = text[text.index('id="why"') :]
    body = body[: body.index("</table>")]
    found = [[plain(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in body.split("<tr>")[2:]]
    assert {(int(row[0]), row[1], row[2], row[3].split()[0]) for row in found} == {
        (2, "person", "human, opens", "browser"),
        (1, "person", "human, opens", "mail-client"),
        (1, "person", "proxy, opens", "image-proxy"),
        (1, "set aside", "proxy, opens", "repeat"),
        (1, "unconfirmed", "prefetch, opens", "apple-mpp"),
        (1, "machine", "scanner, opens", "scanner-word"),
        (2, "person", "human, clicks", "browser"),
        (1, "set aside", "human, clicks", "destination-not-allowed"),
        (1, "machine", "scanner, clicks", "scanner-word"),
    }
    assert tracker.sentence_of("repeat") in plain(body)


def test_the_table_of_campaigns_has_their_rates(mailing: Stage) -> None:
    found = rows(page(mailing), "campaigns")
    assert found == [
        ["Spring", "5", "40.0–60.0 %", "40.0 %", "2 days ago", "1 day ago"],
        ["Autumn", "2", "50.0 %", "0.0 %", "5 weeks ago", "1 day ago"],
    ]


def test_the_table_of_links_has_people_clicks_and_campaigns(mailing: Stage) -> None:
    assert rows(page(mailing), "links") == [
        ["acme.com/shoes?size=42", "1", "1", "0", "1", "Spring"],
        ["acme.com/hats", "1", "1", "0", "0", "Spring"],
    ]


def test_mail_programs_are_those_of_opens_that_count(mailing: Stage) -> None:
    assert {tuple(row[:4]) for row in rows(page(mailing), "clients")} == {
        ("Chrome", "desktop", "2", "0"),
        ("Gmail", "hidden", "1", "0"),
        ("Outlook", "desktop", "1", "0"),
        ("Apple Mail, hidden", "hidden", "0", "1"),
    }


def test_the_curve_has_each_hit_on_its_day(mailing: Stage) -> None:
    text = page(mailing, range="7d", machines="1")
    told = dict(re.findall(r"<text[^>]*>(\d+ Nov): ([^<]*)</text></a>", text))
    assert told["22 Nov"] == "2+1+1 opens · 2+0+1 clicks"
    assert told["23 Nov"] == "1+0+0 opens · 0+0+0 clicks"
    assert told["24 Nov"] == "1+0+0 opens · 0+0+0 clicks"
    assert told["21 Nov"] == "0+0+0 opens · 0+0+0 clicks"
    assert 'href="?machines=1&amp;on=2026-11-22"' in text


def test_stats_json_says_the_same(mailing: Stage) -> None:
    stats = mailing.web.get(f"/{mailing.acme.id}/stats.json").json
    assert stats["sent"] == {
        "emails": 5,
        "opened": {"person": 2, "unconfirmed": 1, "machine": 1},
        "clicked": {"person": 2, "unconfirmed": 0, "machine": 1},
        "clicked_without_open": 1,
        "open_rate": [0.4, 0.6],
        "click_rate": [0.4, 0.4],
    }
    assert stats["before"]["sent"]["emails"] == 2
    assert stats["activity"]["opens"]["hits"] == {"person": 4, "unconfirmed": 1, "machine": 1, "set_aside": 1}
    assert sum(row["hits"] for row in stats["reasons"]) == 11


def test_a_campaigns_page_has_its_numbers_links_and_recipients(mailing: Stage) -> None:
    text = page(mailing, "campaigns/Spring")
    assert {label: value for label, (value, _, _) in figures(text).items()} == {
        "Sent": "5",
        "Opened": "40.0–60.0 %",
        "Clicked": "40.0 %",
        "Click-to-open": "66.7 %",
    }
    assert [row[0] for row in rows(text, "links")] == ["acme.com/shoes?size=42", "acme.com/hats"]
    assert [row[:4] for row in rows(text, "emails")] == [
        ["reader5@example.org", "Shoes & hats", "1 by machines", "1 by machines"],
        ["reader4@example.org", "Shoes & hats", "–", "1 by people acme.com/hats"],
        ["reader3@example.org", "Shoes & hats", "1 unconfirmed", "–"],
        ["reader2@example.org", "Shoes & hats", "1 by people", "–"],
        ["reader1@example.org", "Shoes & hats", "1 by people", "1 by people acme.com/shoes?size=42"],
    ]
    page(mailing, "campaigns/Winter", status=404)


def test_an_emails_page_tells_all_that_happened_and_why(mailing: Stage) -> None:
    text = page(mailing, "emails/e2")
    found = rows(text, "timeline")
    assert [row[1:4] for row in found] == [
        ["open", f"proxy image-proxy{tracker.sentence_of('image-proxy')}", "Gmail"],
        ["open", f"proxy repeat{tracker.sentence_of('repeat')}", "Gmail"],
    ]
    assert found[0][0].endswith("60 minutes after it was sent")
    named = rows(page(mailing, "emails/e1"), "timeline")[-1]
    assert named[1:3] == [
        "click",
        f"human destination-not-allowed{tracker.sentence_of('destination-not-allowed')}",
    ]
    assert named[4] == "other.example"
    page(mailing, "emails/nobody", status=404)


def test_an_empty_dashboard_shows_what_to_put_into_a_first_mail(stage: Stage) -> None:
    text = page(stage)
    assert f"instrument {stage.acme.mail_id} &lt; message.eml" in text
    assert f"/{stage.acme.mail_id}/pixel/KEY.gif" in text
    assert figures(text)["Opened"][0] == "–"
    count(stage, hit(stage, "e1"))
    assert "Your first mail" not in page(stage)


def test_the_test_pixel_and_link_of_an_empty_dashboard_are_the_senders_own(stage: Stage) -> None:
    text = stage.web.get(f"/{stage.acme.id}/dashboard", headers={"Host": "track.example.com"}).text
    [pixel] = re.findall(r'<img src="([^"]+)"', text)
    [link] = re.findall(r'<a href="([^"]+)" rel="noreferrer" target="_blank">', text)
    stage.web.get(pixel, headers={"User-Agent": CHROME})
    assert stage.web.get(html.unescape(link), status=302).headers["Location"] == "https://example.com/"
    stage.drain()
    assert stage.rows("select verdict, count(*) from event_details group by 1") == [("self", 2)]
    text = page(stage)
    assert figures(text)["Opens"][0] == "0"
    assert "nobody registered" not in text
    assert "selftest" not in text[text.index('id="emails"') :]
    assert stage.check() == []


# -- Time


@pytest.mark.parametrize("zone", ["Europe/Rome", "Asia/Kolkata", "America/St_Johns", "UTC"])
@pytest.mark.parametrize(
    "asked", [{"range": "30d"}, {"range": "90d"}, {"range": "12m"}, {"from": "2026-03-20", "to": "2026-04-05"}]
)
def test_days_of_the_tenants_own_zone_say_what_quarters_say(stage: Stage, zone: str, asked: dict[str, str]) -> None:
    """Also where summer time begins in the range, and in zones that are half an hour off."""
    lines = [hit(stage, f"e{n % 40}", NOW - n * 7 * HOUR - n * MINUTE) for n in range(900)]
    lines += [click(stage, f"e{n % 40}", SHOES, NOW - n * 31 * HOUR) for n in range(200)]
    register(stage, *[tracker.Registration(f"e{n}", sent_at=NOW - n * 9 * DAY) for n in range(30)])
    count(stage, *lines)
    with_quarters = stage.web.get(f"/{stage.acme.id}/stats.json", {**asked, "tz": zone}).json
    stage.change(stage.acme, tz=zone)
    with_days = stage.web.get(f"/{stage.acme.id}/stats.json", asked).json
    if zone != "UTC":
        assert stage.rows("select tz from tenants where number = ?", stage.acme.number) == [(zone,)]
    for text in (with_quarters, with_days):
        text.pop("waiting_hits")
    if "from" not in asked:
        with_quarters.pop("before"), with_days.pop("before")  # whole days before, against so many hours
    assert with_days == with_quarters
    assert with_days["activity"]["opens"]["hits"]["person"] > 20
    assert stage.check() == []


def test_a_step_of_the_curve_leads_to_its_day_or_week(mailing: Stage) -> None:
    day = page(mailing, on="2026-11-22")
    assert (
        figures(day)["Opens"][0]
        == figures(page(mailing, "dashboard", 200, **{"from": "2026-11-22", "to": "2026-11-22"}))["Opens"][0]
        == "4"
    )
    assert 'href="?on=2026-11-22"' in page(mailing, range="7d")
    assert 'href="?from=2026-11-16&amp;to=2026-11-22"' in page(mailing, range="12m")


def test_days_begin_at_midnight_in_the_zone_asked_for(stage: Stage) -> None:
    late = int(datetime(2026, 10, 24, 23, 30, tzinfo=ZoneInfo("Europe/Rome")).timestamp() * 1000)
    count(stage, hit(stage, "e1", late), hit(stage, "e2", late + HOUR))  # the night in which summer time ends
    text = page(stage, range="90d", tz="Europe/Rome")
    told = dict(re.findall(r"<text[^>]*>(\d+ Oct): ([^<]*)</text></a>", text))
    assert told["24 Oct"].startswith("1+0 opens") and told["25 Oct"].startswith("1+0 opens")
    told = dict(re.findall(r"<text[^>]*>(\d+ Oct): ([^<]*)</text></a>", page(stage, range="90d")))
    assert told["24 Oct"].startswith("2+0 opens")


@pytest.mark.parametrize(
    "asked, expected",
    [
        ({"on": "2026-11-31"}, "on is"),
        ({"on": "1999-11-30"}, "on: expected a day of this century"),
        ({"from": "2026-11-31"}, "from"),
        ({"from": "2026-11-20", "to": "2026-11-10"}, "in order"),
        ({"from": "1999-01-01", "to": "2026-11-10"}, "century"),
        ({"to": "tomorrow"}, "to is"),
        ({"range": "3w"}, "range is"),
        ({"tz": "Mars/Olympus"}, "tz is"),
        ({"show": "everything"}, "show: expected one of all, opened"),
        ({"sort": "emails.size"}, "sort: expected emails"),
        ({"sort": "people.name"}, "sort: expected one of the tables campaigns, links"),
        ({"sort": "campaigns.opened.down"}, "sort: expected campaigns"),
        ({"after": "1"}, "after: expected"),
    ],
)
def test_what_can_not_be_shown_is_refused_with_what_was_expected(
    stage: Stage, asked: dict[str, str], expected: str
) -> None:
    text = stage.web.get(f"/{stage.acme.id}/dashboard", asked, status=400).text
    assert expected in plain(text)


def test_two_days_are_shown_by_the_hour_and_a_quarter_year_by_weeks(stage: Stage) -> None:
    two = stage.web.get(
        f"/{stage.acme.id}/stats.json", {"from": "2026-10-24", "to": "2026-10-25", "tz": "Europe/Rome"}
    ).json
    assert len(two["steps"]) == 49  # one of them has 25 hours
    assert (
        len(stage.web.get(f"/{stage.acme.id}/stats.json", {"from": "2026-07-01", "to": "2026-09-30"}).json["steps"])
        == 92
    )
    assert (
        len(stage.web.get(f"/{stage.acme.id}/stats.json", {"from": "2026-07-01", "to": "2026-10-31"}).json["steps"])
        == 18
    )


def test_a_machine_without_the_data_of_a_zone_says_so_and_shows_utc(stage: Stage) -> None:
    with stage.database.transaction() as connection:
        connection.execute("update tenants set tz = 'Moon/Base' where number = ?", (stage.acme.number,))
    text = plain(page(stage))
    assert "no data of the time zone Moon/Base (install tzdata): days begin in UTC" in text


# -- Tables, as they are asked for


@pytest.mark.parametrize(
    "shown, expected",
    [
        ("all", ["e5", "e4", "e3", "e2", "e1"]),
        ("opened", ["e4", "e2", "e1"]),
        ("unconfirmed", ["e3"]),
        ("not-opened", ["e5"]),
        ("clicked", ["e4", "e1"]),
        ("not-clicked", ["e5", "e3", "e2"]),
    ],
)
def test_emails_are_shown_by_what_their_readers_did_and_exported_so(
    mailing: Stage, shown: str, expected: list[str]
) -> None:
    text = page(mailing, "campaigns/Spring", show=shown)
    keys = re.findall(r'href="\.\./emails/([^"]+)"', text[text.index('id="emails"') :])
    assert keys == expected
    query = {"campaign": "Spring", "show": shown}
    assert [row["key"] for row in mailing.web.get(f"/{mailing.acme.id}/emails.json", query).json["rows"]] == expected
    lines = mailing.web.get(f"/{mailing.acme.id}/emails.csv", query).text.splitlines()[1:]
    assert [line.split(",")[0] for line in lines] == expected


@pytest.mark.parametrize(
    "search, expected",
    [
        ("reader3@", {"e3"}),
        ("READER3", {"e3"}),
        ("e1", {"e1"}),
        ("shoes", {"e1", "e2", "e3", "e4", "e5"}),
        ("hat shoe", set()),  # whole words but the last
        ("SHOES & hat", {"e1", "e2", "e3", "e4", "e5"}),
        ("spring", {"e1", "e2", "e3", "e4", "e5"}),
        ("AUTUMN", {"a1", "a2"}),
        ("nothing like it", set()),
        ('"', set()),
        ("subject:shoes OR NOT *", set()),
        ("tenant1", set()),
        ("x9", {"x9"}),
    ],
)
def test_emails_are_found_by_the_beginning_of_recipient_and_key_and_by_words(
    mailing: Stage, search: str, expected: set[str]
) -> None:
    text = page(mailing, q=search)
    keys = set(re.findall(r'href="\./emails/([^"]+)"', text[text.index('id="search"') :]))
    assert keys == expected
    found = {row["key"] for row in mailing.web.get(f"/{mailing.acme.id}/emails.json", {"q": search}).json["rows"]}
    assert found == expected


def test_a_search_takes_letters_that_sqlite_does_not_know_and_accents_however_they_are_written(stage: Stage) -> None:
    register(stage, tracker.Registration("e1", "Caf\u00e9s"), tracker.Registration("e2", "Cafe\u0301s"))
    for search in ("caf\u00e9s", "cafe\u0301s", "cafes", "cafe\u0301"):
        found = stage.web.get(f"/{stage.acme.id}/emails.json", {"q": search}).json["rows"]
        assert {row["key"] for row in found} == {"e1", "e2"}, search
    for search in ("a\u19b0b", "a\u19b0b cafes"):  # a letter of New Tai Lue since Unicode 8
        assert stage.web.get(f"/{stage.acme.id}/emails.json", {"q": search}).json["rows"] == []


def test_a_search_finds_what_was_registered_later_and_not_what_was_removed(mailing: Stage) -> None:
    register(mailing, tracker.Registration("e1", "Umbrellas", campaign="Summer"))
    text = page(mailing, q="brellas")
    assert re.findall(r'href="\./emails/(e\d)"', text[text.index('id="search"') :]) == ["e1"]
    keys = {row["key"] for row in mailing.web.get(f"/{mailing.acme.id}/emails.json", {"q": "shoes"}).json["rows"]}
    assert keys == {"e2", "e3", "e4", "e5"}
    mailing.web.delete(f"/{mailing.acme.id}/emails/e2")
    keys = {row["key"] for row in mailing.web.get(f"/{mailing.acme.id}/emails.json", {"q": "shoes"}).json["rows"]}
    assert keys == {"e3", "e4", "e5"}
    assert mailing.check() == []


@pytest.mark.parametrize(
    "order, expected",
    [
        ("recipient.up", ["x9", "old1@example.org"]),  # x9 has none
        ("recipient", ["reader5@example.org", "reader4@example.org"]),
        ("clicks", ["reader4@example.org", "reader1@example.org"]),
        ("subject.up", ["x9", "old2@example.org"]),
        ("sent.up", ["old1@example.org", "old2@example.org"]),
    ],
)
def test_emails_are_sorted_by_any_column(mailing: Stage, order: str, expected: list[str]) -> None:
    text = page(mailing, sort=f"emails.{order}")
    found = [row[0] for row in rows(text, "emails")]
    if order == "sent.up":
        assert set(found[:2]) == set(expected)
    else:
        assert found[:2] == expected
    direction = "ascending" if order.endswith(".up") else "descending"
    assert text.count(f'aria-sort="{direction}"') == 1


@pytest.mark.parametrize(
    "table, order, expected",
    [
        ("campaigns", "opened.up", ["Spring", "Autumn"]),  # with the click that proves a reading, 3 of 5 and 1 of 2
        ("campaigns", "campaign.up", ["Autumn", "Spring"]),
        ("campaigns", "sent.up", ["Autumn", "Spring"]),
        ("campaigns", "clicked", ["Spring", "Autumn"]),
        ("campaigns", "first.up", ["Autumn", "Spring"]),
        ("campaigns", "last", ["Autumn", "Spring"]),
        ("links", "url.up", ["acme.com/hats", "acme.com/shoes?size=42"]),
        ("links", "machines", ["acme.com/shoes?size=42", "acme.com/hats"]),
        ("links", "machines.up", ["acme.com/hats", "acme.com/shoes?size=42"]),
        ("links", "unconfirmed", ["acme.com/shoes?size=42", "acme.com/hats"]),
        ("links", "campaign", ["acme.com/shoes?size=42", "acme.com/hats"]),
        ("clients", "client.up", ["Apple Mail, hidden", "Chrome", "Gmail", "Outlook"]),
        ("clients", "unconfirmed", ["Apple Mail, hidden", "Chrome", "Gmail", "Outlook"]),
        ("clients", "people", ["Chrome", "Gmail", "Outlook", "Apple Mail, hidden"]),
        ("clients", "device.up", ["Apple Mail, hidden", "Gmail", "Chrome", "Outlook"]),
    ],
)
def test_the_other_tables_are_sorted_by_any_column_too(
    mailing: Stage, table: str, order: str, expected: list[str]
) -> None:
    found = [row[0] for row in rows(page(mailing, sort=f"{table}.{order}"), table)]
    assert found == (expected[::-1] if (table, order) == ("campaigns", "opened.up") else expected)


@pytest.mark.parametrize("sort", ["", "emails.recipient.up", "emails.opens"])
def test_pages_of_emails_follow_each_other_without_a_gap(stage: Stage, sort: str) -> None:
    register(
        stage,
        *[
            tracker.Registration(f"k{n:03}", "S", f"r{n % 7}{n:03}@example.org", "C", NOW - n * 1000)
            for n in range(130)
        ],
    )
    count(stage, *[hit(stage, f"k{n:03}", NOW - n) for n in range(0, 130, 3)])
    seen: list[str] = []
    text = page(stage, "campaigns/C", sort=sort)
    for _ in range(10):
        seen += re.findall(r'href="\.\./emails/([^"]+)"', text[text.index('id="emails"') :])
        following = re.search(r'href="(\?[^"]*after=[^"#]*)#emails"', text)
        if not following:
            break
        text = stage.web.get(f"/{stage.acme.id}/campaigns/C{html.unescape(following[1])}").text
    assert len(seen) == 130
    assert len(set(seen)) == 130


def test_a_filter_that_fits_few_says_where_it_stopped_looking(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "MOST_SORTED", 50)
    register(stage, *[tracker.Registration(f"k{n:03}", campaign="C", sent_at=NOW - n * 1000) for n in range(120)])
    count(stage, hit(stage, "k110", NOW))
    text = page(stage, "campaigns/C", show="opened")
    assert "None of the newest 50 emails is like that." in plain(text)
    exported = stage.web.get(f"/{stage.acme.id}/emails.json", {"show": "opened"}).json
    assert [row["key"] for row in exported["rows"]] == ["k110"]
    assert exported["next"] is None


def test_exports_of_tables_are_what_the_page_shows(mailing: Stage) -> None:
    campaigns = mailing.web.get(f"/{mailing.acme.id}/campaigns.json").json["rows"]
    assert [(row["campaign"], row["emails"], row["opened_person"], row["click_only"]) for row in campaigns] == [
        ("Spring", 5, 2, 1),
        ("Autumn", 2, 1, 0),
    ]
    clients = mailing.web.get(f"/{mailing.acme.id}/clients.csv").text.splitlines()
    assert clients[0] == "client,device,opens_person,opens_unconfirmed,next"
    assert "Gmail,,1,0," in clients
    events = mailing.web.get(f"/{mailing.acme.id}/events.json", {"key": "e2"}).json["rows"]
    assert [row["reason"] for row in events] == ["repeat", "image-proxy"]
    links = mailing.web.get(f"/{mailing.acme.id}/links.json", {"campaign": "Autumn"}).json["rows"]
    assert links == []


# -- What nobody may see, and what must not break a page


HOSTILE = [
    "<script>alert(1)</script>",
    "\u202egnp.exe",
    "שלום עולם",
    "🎉" * 60,
    "a" * 900,
    '"><img src=x onerror=alert(1)>',
    "$name ${x} %s {}",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_subjects_recipients_and_campaigns_are_inert(stage: Stage, text: str) -> None:
    register(stage, tracker.Registration("e1", text, text[:300], text[:200], NOW))
    count(stage, hit(stage, "e1"), click(stage, "e1", "https://acme.com/?" + quote(text)))
    for path in ("dashboard", "emails/e1", f"campaigns/{quote(text[:200], safe='')}"):
        shown = page(stage, path, q=text[:100]) if path == "dashboard" else page(stage, path)
        assert "<script" not in shown
        assert not re.search(r"<[^>]*\sonerror", re.sub(r'"[^"]*"', "", shown))
        assert html.escape(text[:200]) in shown


def test_a_dashboard_whose_id_stands_in_mail_shows_no_person(stage: Stage) -> None:
    with tracker.changing_tenants(stage.database) as connection:
        single = tracker.add_tenant(connection, "Single", NOW, id_="single1", any_domain=True)
        emails = [tracker.Registration("e1", "Secret subject", "secret@example.org", "Spring", NOW - DAY)]
        tracker.register_emails(connection, single.number, emails, NOW)
    stage.refresh()
    segment(stage, hit(stage, "e1", uri="/single1/pixel/e1.gif", ip="203.0.113.0"))
    stage.drain()
    for path in (
        "dashboard",
        "dashboard?q=secret",
        "campaigns/Spring",
        "emails/e1",
        "emails.json",
        "events.json?key=e1",
    ):
        text = stage.web.get(f"/single1/{path}").text
        assert "ecret" not in re.sub(r'value="secret"|q=secret', "", text), path
        assert "203.0.113.0" not in text, path
    stage.web.get("/single1/dashboard?sort=emails.recipient", status=400)
    assert "e1" in stage.web.get("/single1/dashboard?q=e1").text


def test_a_page_weighs_less_than_60_kb_with_its_stylesheet(stage: Stage) -> None:
    """Every step of the curve has something, every table is full, and texts are long."""
    register(
        stage,
        *[
            tracker.Registration(
                f"order-{n:024}",
                "A subject of a usual length, for a sale",
                f"a.longer.name.{n}@example.org",
                f"Campaign {n % 12}",
                NOW - n * DAY,
            )
            for n in range(92)
        ],
    )
    lines = []
    for n in range(92):
        for m, agent in enumerate((OUTLOOK, GMAIL, APPLE, GATEWAY)):
            lines.append(hit(stage, f"order-{n:024}", NOW - n * DAY - m * HOUR, ua=agent))
        lines.append(
            click(
                stage,
                f"order-{n:024}",
                f"https://acme.com/articles/2026/a-long-title-{n % 14}?utm=news",
                NOW - n * DAY - 5 * HOUR,
            )
        )
    count(stage, *lines)
    stylesheet = len(tracker.resource("templates/style.css"))
    for asked in ({"range": "90d", "machines": "1"}, {"range": "12m"}, {"range": "24h"}, {"range": "all"}):
        assert len(page(stage, "dashboard", 200, **asked).encode()) + stylesheet <= 60_000, asked
    assert len(page(stage, "campaigns/Campaign%203").encode()) + stylesheet <= 60_000


@pytest.mark.parametrize("name", ["q", "machines", "links", "campaigns"])
def test_a_long_parameter_is_not_repeated_in_every_link_of_the_page(stage: Stage, name: str) -> None:
    """A request line may have 16 kB, and a curve of a hundred years has 1,200 steps, each a link."""
    count(stage, hit(stage, "e1"))
    path = f"/{stage.acme.id}/dashboard"
    asked = {"from": "2000-01-01", "to": "2099-12-31"}
    usual = len(stage.web.get(path, asked).body)
    assert len(stage.web.get(path, {**asked, name: "x" * 7_000}).body) < usual + 300 * 1_300


def test_an_email_in_which_thousands_of_links_were_followed_does_not_fill_the_page(stage: Stage) -> None:
    """Whoever reads a mail may follow links of his own making to a host that is allowed, as many as he likes."""
    register(stage, tracker.Registration("e1", campaign="Spring"))
    links = [f"https://acme.com/{n:04}/{'x' * 1000}" for n in range(2_000)]
    count(stage, *[click(stage, "e1", link, NOW - (2_000 - n) * HOUR) for n, link in enumerate(links)])
    for path in ("dashboard", "campaigns/Spring"):
        shown = page(stage, path)
        assert len(shown) < 200_000
        table = shown[shown.index('id="emails"') :]
        assert "acme.com/0000/" in table
        assert "acme.com/0001/" in table  # the first ones


def test_every_range_and_table_is_empty_without_breaking(stage: Stage) -> None:
    for name in tracker.RANGES:
        text = page(stage, range=name, machines="1")
        assert figures(text)["Sent"][0] == "0"
        assert "NaN" not in text and "inf" not in plain(text).split()


@pytest.mark.parametrize(
    "agent, client",
    [
        (APPLE, ("Apple Mail, hidden", "")),
        (GMAIL, ("Gmail", "")),
        (OUTLOOK, ("Outlook", "desktop")),
        (CHROME, ("Chrome", "desktop")),
        ("Outlook-iOS/711.5030510.prod.iphone (4.2440.0)", ("Outlook", "mobile")),
        (
            "Mozilla/5.0 (iPhone; CPU iPhone OS 18_6 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Mobile/15E148",
            ("Apple Mail", "mobile"),
        ),
        (
            "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 (KHTML, like Gecko)",
            ("Apple Mail", "desktop"),
        ),
        ("Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Thunderbird/140.4.0", ("Thunderbird", "desktop")),
        ("YahooMailProxy; https://help.yahoo.com/x", ("Yahoo Mail", "")),
        (
            "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/18.0 Safari/605.1.15",
            ("Safari", "desktop"),
        ),
        ("acme-thing/1.0", ("Others", "")),
        ("", ("Others", "")),
    ],
)
def test_what_mail_was_opened_with_is_told_by_family_and_device(agent: str, client: tuple[str, str]) -> None:
    assert tuple(tracker.client_of(agent)) == client


def test_ago_is_said_in_one_unit() -> None:
    said = [tracker.ago(seconds) for seconds in (5, 61, 3_600 * 3, 86_400 * 2, 86_400 * 20, 86_400 * 800)]
    assert said == ["just now", "1 minute ago", "3 hours ago", "2 days ago", "2 weeks ago", "2 years ago"]


# -- Commands


def test_export_writes_a_whole_table_and_never_over_a_file(
    mailing: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"sqlite:{mailing.settings.database}")
    mailing.app.database.close()
    target = tmp_path / "emails.json"
    words = [
        "--env",
        "/dev/null",
        "export",
        "Acme",
        "emails",
        "--format",
        "json",
        "--show",
        "clicked",
        "--output",
        str(target),
    ]
    assert tracker.main(words) == 0
    assert [row["key"] for row in json.loads(target.read_text())["rows"]] == ["e4", "e1"]
    assert tracker.main(words) == 1
    assert "is there already" in capsys.readouterr().err
    monkeypatch.setattr(tracker, "CHUNK_ROWS", 2)
    assert tracker.main([*words[:-2], "--output", str(tmp_path / "again.json")]) == 0
    assert (tmp_path / "again.json").read_bytes() == target.read_bytes()


@pytest.mark.parametrize(
    "words, told",
    [
        (("events", "--campaign", "spring"), "--campaign is no filter of the table events; its filters: --key"),
        (
            ("emails", "--key", "e1"),
            "--key is no filter of the table emails; its filters: --campaign, --search, --show",
        ),
        (("campaigns", "--show", "all"), "--show is no filter of the table campaigns; its filters: none"),
    ],
)
def test_export_refuses_a_filter_that_the_table_does_not_have(
    words: tuple[str, ...],
    told: str,
    mailing: Stage,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"sqlite:{mailing.settings.database}")
    assert tracker.main(["--env", "/dev/null", "export", "Acme", *words]) == 1
    said = capsys.readouterr()
    assert (said.out, told in said.err) == ("", True)


@pytest.mark.parametrize(
    "words, told",
    [
        (["Nobody", "emails"], "no tenant 'Nobody'"),
        (["Acme", "emails", "--search", "\udcff"], "--search: expected text"),
        (["Acme", "links", "--campaign", "\udcff"], "--campaign: expected text"),
        (["Acme", "events", "--key", "\udcff"], "--key: expected text"),
    ],
)
def test_an_export_that_fails_says_why_and_leaves_no_file(
    words: list[str],
    told: str,
    mailing: Stage,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"sqlite:{mailing.settings.database}")
    mailing.app.database.close()
    target = tmp_path / "export.csv"
    assert tracker.main(["--env", "/dev/null", "export", *words, "--output", str(target)]) == 1
    assert told in capsys.readouterr().err
    assert not target.exists()


def test_a_zone_of_ones_own_is_set_and_must_be_known(
    mailing: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"sqlite:{mailing.settings.database}")
    mailing.app.database.close()
    assert tracker.main(["--env", "/dev/null", "tenant", "set", "Acme", "--tz", "Europe/Rome"]) == 0
    assert re.search(r"^tz +Europe/Rome$", capsys.readouterr().out, re.MULTILINE)
    assert tracker.main(["--env", "/dev/null", "tenant", "set", "Acme", "--tz", "Rome"]) == 1
    assert "expected a time zone that this machine knows" in capsys.readouterr().err
    assert mailing.check() == []
    assert "Europe/Rome" in page(mailing)
    assert datetime.fromtimestamp(NOW / 1000, timezone.utc).day == 24
