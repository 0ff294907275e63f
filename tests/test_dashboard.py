"""The dashboard: every figure of a small data set computed by hand, tables as they are asked for, and what nobody may see."""

from __future__ import annotations

import ast
import html
import json
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote
from zoneinfo import ZoneInfo

import pytest
from asking import register
from conftest import CHROME, NOW, ROOT, Stage, click, hit, segment

import tracker

BOTH_ENGINES = True

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
    register(stage, stage.acme, *spring, *autumn)
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


def page(stage: Stage, path: str = "dashboard", status: int = 200, /, **asked: str) -> str:
    """A page of Acme's."""
    query = "&".join(f"{name}={quote(value, safe='')}" for name, value in asked.items())
    target = f"/{stage.acme.id}/{path}?{query}"
    # A server says what was asked for as it came; webtest alone decodes it first.
    text: str = stage.web.get(target, status=status, extra_environ={"REQUEST_URI": target}).text
    return text


def figures(text: str) -> dict[str, tuple[str, str, str]]:
    """Value, change and detail of each figure of a page, as a person reads them."""
    value = r'<dd><b>([^<]*)</b> <span class="change">([^<]*)</span>'
    found = re.findall(rf'<dt title="[^"]+">([^<]+)</dt>{value}(.*?)</dd>', text)
    return {label: (plain(value), plain(change), plain(detail)) for label, value, change, detail in found}


def keys(text: str) -> list[str]:
    """The keys of the emails that a page shows."""
    return list(dict.fromkeys(re.findall(r'href="\.\.?/emails/([^"?]+)', text[text.index('id="emails"') :])))


def steps(text: str) -> dict[str, str]:
    """What each step of the curve tells, by its label."""
    return dict(re.findall(r"<text>(\d+ \w+): ([^<]*)</text></a>", text))


def exported(stage: Stage, **asked: str) -> list[str]:
    """The keys of the emails that an export has."""
    return [row["key"] for row in stage.web.get(f"/{stage.acme.id}/emails.json", asked).json["rows"]]


def plain(markup: str) -> str:
    """Markup as text."""
    text = html.unescape(re.sub(r"\s+", " ", re.sub("<[^>]+>", "", markup.replace("</small><small>", " "))))
    return text.replace("\xa0", " ").strip().removesuffix(" Why?")


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


RANGE = (
    "at least 60 %, at most 80 % Apple loads images ahead, Gmail now and then: of such mail nobody can tell whether it was "
    "read. What Gmail loads when it is opened counts as a person's."
)


def test_every_figure_is_what_one_computes_by_hand(mailing: Stage) -> None:
    assert figures(page(mailing)) == {
        "Opened": ("60–80 %", "", f"{RANGE} 2 by people; 1 more clicked, so they read it; 1 maybe read"),
        "Clicked": ("40.0 %", "", "2 by people"),
        "Click-to-open": ("66.7 %", "", "of 3 emails that people read"),
        "Sent": ("5", "2 before", "emails"),
        "Opens": ("4", "none before", "by people, in 4 emails; 1 maybe read"),
        "Clicks": ("2", "none before", "by people, in 2 emails"),
        "Machines": ("2", "none before", "1 open and 1 click, in no other number"),
    }


def test_a_range_says_what_it_means_once_and_never_promises_more_than_is_certain(mailing: Stage) -> None:
    text = plain(page(mailing))
    assert text.count("at least 60 %, at most 80 %") == text.count("Apple loads images ahead") == 1
    told = {(0.4362, 0.6938): "43–70 %", (0.29, 0.58): "29–58 %", (0.031, 0.039): "3.1–3.9 %", (1 / 3, 1 / 3): "33.3 %"}
    assert {rate: tracker.told(rate).replace("\xa0", " ") for rate in told} == told
    assert "Apple loads" not in page(mailing, **{"from": "2026-10-15", "to": "2026-10-16"})  # where there is none


BEFORE: dict[tuple[Any, Any, int], str] = {  # what a figure is, was, and of how many it is: what is told of before
    (100, 50, 50): "50 before",
    (155, 1, 50): "1 before",
    (60, 0, 50): "none before",
    (0, 4, 50): "4 before",
    (0, 0, 50): "",
    (7, None, 50): "",
    ((0.5, 0.5), (0.4, 0.4), 50): "40.0 % before",
    ((0.5, 0.5), (0.4, 0.4), 49): "",
    ((0.5, 0.7), (0.4, 0.6), 90): "40–60 % before",
    ((0.5, 0.5), (0.0, 0.0), 90): "0.0 % before",
    ((0.5, 0.5), None, 90): "",
    (None, (0.4, 0.6), 0): "",
}


def test_what_was_before_is_told_but_for_a_rate_of_fewer_than_fifty() -> None:
    found = {each: tracker.Figure("", each[0], each[1], "", each[2]).before.replace("\xa0", " ") for each in BEFORE}
    assert found == BEFORE


def test_a_longer_range_has_the_older_mail_as_well_and_all_has_nothing_before_it(mailing: Stage) -> None:
    found = figures(page(mailing, range="90d"))
    assert found["Sent"][:2] == ("7", "none before")
    assert (found["Opened"][0], found["Opens"][0]) == ("57–72 %", "4")  # e1, e2, e4, a1 of seven; and e3
    found = figures(page(mailing, **{"from": "2026-11-08"}))  # Autumn is older than as long a time before
    assert found["Sent"][:2] == ("5", "none before")
    found = figures(page(mailing, range="all"))
    assert found["Sent"] == ("7", "", "emails")
    assert {change for _, change, _ in found.values()} == {""}


def test_the_reasons_are_those_of_the_hits_in_the_range(mailing: Stage) -> None:
    text = page(mailing)
    body = text[text.index('id="why"') :]
    body = body[: body.index("</table>")]
    cells = r'<tr><td class="number">(.*?)</td><td>(.*?)</td><td>(.*?)</td><td class="wide" title="(.*?)">'
    assert {(int(hits), *more) for hits, *more in re.findall(cells, body)} == {
        (2, "open", "a person", "human browser"),
        (1, "open", "a person", "human mail-client"),
        (1, "open", "a person", "proxy image-proxy"),
        (1, "open", "not counted", "proxy repeat"),
        (1, "open", "maybe a person", "prefetch apple-mpp"),
        (1, "open", "a machine", "scanner scanner-word"),
        (2, "click", "a person", "human browser"),
        (1, "click", "not counted", "human destination-not-allowed"),
        (1, "click", "a machine", "scanner scanner-word"),
    }
    assert tracker.sentence_of("repeat") in plain(body)


def test_tables_have_rates_people_campaigns_and_programs(mailing: Stage) -> None:
    text = page(mailing)
    assert rows(text, "campaigns") == [
        ["Spring", "5", "60–80 %", "40.0 %", "2 days ago", "1 day ago", ""],
        ["Autumn", "2", "50.0 %", "0.0 %", "5 weeks ago", "1 day ago", ""],
    ]
    assert rows(text, "links") == [
        ["acme.com/shoes?size=42", "1", "1", "1", "Spring"],
        ["acme.com/hats", "1", "1", "", "Spring"],
    ]
    assert {tuple(row) for row in rows(text, "clients")} == {  # of opens that count
        ("Chrome", "desktop", "2", "", "40.0 %"),
        ("via Gmail", "not disclosed", "1", "", "20.0 %"),
        ("Outlook", "desktop", "1", "", "20.0 %"),
        ("via Apple Mail", "not disclosed", "0", "1", "0–20 %"),
    }
    assert rows(text, "hits")[0] == ["3 hours ago", "open", "x9", "Chrome", "a person"]
    assert "Download CSV" not in plain(text[text.index('id="hits"') : text.index('id="emails"')])


def test_columns_that_say_nothing_are_left_out_unless_one_sorts_by_them(mailing: Stage) -> None:
    def heads(text: str, name: str) -> list[str]:
        return [
            plain(each) for each in re.findall(r"<th [^>]*>(.*?)</th>", text[text.index(f'<table class="{name}"') :])
        ]

    assert heads(page(mailing), "links")[:5] == ["Destination", "Clicks", "In emails", "Machines", "Campaign"]
    assert heads(page(mailing, sort="links.unconfirmed"), "links")[:4] == [
        "Destination",
        "Clicks",
        "In emails",
        "Maybe",
    ]
    assert "Maybe read" not in heads(page(mailing, **{"from": "2026-11-23"}), "clients")


def test_the_curve_has_each_hit_on_its_day(mailing: Stage) -> None:
    text = page(mailing, range="7d", machines="1")
    told = steps(text)
    assert (told["21 Nov"], told["22 Nov"]) == ("0+0+0 opens · 0+0+0 clicks", "2+1+1 opens · 2+0+1 clicks")
    assert told["23 Nov"] == told["24 Nov"] == "1+0+0 opens · 0+0+0 clicks"
    # Each step leads to its day or week.
    assert 'href="?machines=1&amp;on=2026-11-22"' in text
    assert 'href="?from=2026-11-16&amp;to=2026-11-22"' in page(mailing, range="12m")
    for asked in ({"on": "2026-11-22"}, {"from": "2026-11-22", "to": "2026-11-22"}):
        assert figures(page(mailing, **asked))["Opens"][0] == "2"


def test_a_campaigns_page_has_its_numbers_links_and_recipients(mailing: Stage) -> None:
    text = page(mailing, "campaigns/Spring")
    assert [value for value, _, _ in figures(text).values()] == ["60–80 %", "40.0 %", "66.7 %", "5", "2", "2", "2"]
    assert exported(mailing, campaign="Spring", show="opened") == ["e4", "e2", "e1"]  # the 60 % of the five
    assert rows(text, "links") == [
        ["acme.com/shoes?size=42", "1", "1", "50.0 %", "1"],
        ["acme.com/hats", "1", "1", "50.0 %", ""],
    ]
    assert ["Outlook", "desktop", "1", "", "33.3 %"] in rows(text, "clients")
    assert 'title="scanner scanner-word"' in text[text.index('id="why"') :]
    assert [row[:4] for row in rows(text, "emails")] == [
        ["reader5@example.org", "Shoes & hats", "By machines once", "By machines once"],
        ["reader4@example.org", "Shoes & hats", "Read, as a click shows", "Clicked once acme.com/hats"],
        ["reader3@example.org", "Shoes & hats", "Maybe read", "–"],
        ["reader2@example.org", "Shoes & hats", "Opened once", "–"],
        ["reader1@example.org", "Shoes & hats", "Opened once", "Clicked once acme.com/shoes?size=42"],
    ]
    page(mailing, "campaigns/Winter", 404)


def test_a_campaigns_page_stands_beside_the_campaigns_before_when_they_were_as_old(stage: Stage) -> None:
    new, old = NOW - 2 * DAY, NOW - 20 * DAY
    for name, sent in (("New", new), ("Old", old)):
        keys_of = (tracker.Registration(f"{name}{n}", campaign=name, sent_at=sent) for n in range(60))
        register(stage, stage.acme, *keys_of)
    lines = [hit(stage, f"New{n}", new + (n // 8) * HOUR + MINUTE, ua=OUTLOOK) for n in range(33)]
    lines += [hit(stage, f"Old{n}", old + 3 * HOUR, ua=OUTLOOK) for n in range(30)]
    lines += [hit(stage, f"Old{n}", old + 5 * DAY, ua=OUTLOOK) for n in range(30, 40)]  # when it was older
    lines += [click(stage, f"Old{n}", SHOES, old + 4 * HOUR) for n in range(6)]
    lines += [click(stage, f"New{n}", SHOES, new + 9 * HOUR) for n in range(3)]
    count(stage, *lines)
    text = page(stage, "campaigns/New")
    assert {label: each[:2] for label, each in figures(text).items()} == {
        "Opened": ("55.0 %", "50.0 % before"),
        "Clicked": ("5.0 %", "10.0 % before"),
        "Click-to-open": ("9.1 %", ""),  # of fewer than fifty
        "Sent": ("60", "60 before"),
        "Opens": ("33", ""),
        "Clicks": ("3", ""),
        "Machines": ("0", ""),
    }
    told = plain(text)
    assert (
        "After 2 days All mail of this campaign so far, with what the 1 campaign before had come to when as old."
        in told
    )
    assert "Half of the emails that people opened had been opened within 3 hours." in told
    found = dict(re.findall(r"<text>(\d+ \w+ \d\d:\d\d): ([^<]*)</text></a>", text))
    assert [opens.split("+")[0] for opens in found.values()][:6] == ["8", "8", "8", "8", "1", "0"]
    assert "/dashboard?on=" not in text  # where the campaign would be lost among all others
    assert rows(text, "links") == [["acme.com/shoes?size=42", "3", "3", "100.0 %"]]
    curves = re.findall(r'<path d="(M0 16[^"]+)"', page(stage))  # New: 16, 16 and 1 in two hours each
    assert curves == ["M0 16V0h6V15h3V16h63V16z", "M0 16V16h3V0h3V16h66V16z"]


def test_an_emails_page_tells_all_that_happened_and_why(mailing: Stage) -> None:
    text = page(mailing, "emails/e2")
    found, signs = rows(text, "timeline"), tracker.weighed(["current", "later"])
    assert [row[1:4] for row in found] == [
        ["open", f"a person{tracker.sentence_of('image-proxy')} {signs}", "via Gmail"],
        ["open", f"not counted{tracker.sentence_of('repeat')} {signs}", "via Gmail"],
    ]
    assert found[0][0].endswith("60 minutes after it was sent")
    named = rows(page(mailing, "emails/e1"), "timeline")[-1]
    assert named[1:3] == [
        "click",
        f"not counted{tracker.sentence_of('destination-not-allowed')} {signs}",
    ]
    assert named[4] == "other.example"
    assert (
        re.findall('title="([a-z]+ [a-z-]+)"', text) == ["proxy repeat", "proxy image-proxy"][::-1]
    )  # for who points at it
    page(mailing, "emails/nobody", 404)


def test_an_empty_dashboard_shows_what_to_put_into_a_first_mail(stage: Stage) -> None:
    numbers = stage.web.get(f"/{stage.acme.id}/stats.json").json
    assert (numbers["sent"]["open_rate"], numbers["last_hit_at"]) == (None, None)
    text = page(stage)
    assert f"instrument {stage.acme.mail_id} &lt; message.eml" in text
    assert f"/{stage.acme.mail_id}/pixel/KEY.gif" in text
    assert figures(text) == {}
    before, _, operator = text.partition("For the operator")
    assert "tracker.py" not in before and "tracker.py instrument" in operator  # a command is for nobody else
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
    assert [row[-1] for row in rows(text, "hits")] == ["not counted"] * 2
    assert "nobody registered" not in text
    assert stage.check() == []


# -- Time


@pytest.mark.parametrize("zone", ["Europe/Rome", "Asia/Kolkata", "America/St_Johns", "UTC"])
def test_days_of_the_tenants_own_zone_say_what_quarters_say(stage: Stage, zone: str) -> None:
    """Also where summer time begins in the range, and in zones that are half an hour off."""
    lines = [hit(stage, f"e{n % 40}", NOW - n * 7 * HOUR - n * MINUTE) for n in range(900)]
    lines += [click(stage, f"e{n % 40}", SHOES, NOW - n * 31 * HOUR) for n in range(200)]
    register(stage, stage.acme, *[tracker.Registration(f"e{n}", sent_at=NOW - n * 9 * DAY) for n in range(30)])
    count(stage, *lines)
    ranges = [{"range": "30d"}, {"range": "90d"}, {"range": "12m"}, {"from": "2026-03-20", "to": "2026-04-05"}]

    def ask(**more: str) -> list[dict[str, Any]]:
        return [stage.web.get(f"/{stage.acme.id}/stats.json", {**asked, **more}).json for asked in ranges]

    by_quarters = ask(tz=zone)
    stage.change(stage.acme, tz=zone)
    for asked, with_days, with_quarters in zip(ranges, ask(), by_quarters, strict=True):
        if "from" not in asked:
            del with_quarters["before"], with_days["before"]  # whole days before, against so many hours
        assert with_days == with_quarters
        assert with_days["activity"]["opens"]["hits"]["person"] > 20
    assert stage.check() == []


def test_days_begin_at_midnight_to_the_millisecond_in_the_zone_asked_for(stage: Stage) -> None:
    midnight, late = (
        int(datetime(*day, tzinfo=ZoneInfo(zone)).timestamp() * 1000)
        for day, zone in (((2026, 11, 20, 0, 0), "Asia/Kolkata"), ((2026, 10, 24, 23, 30), "Europe/Rome"))
    )
    times = (midnight - 1, midnight, midnight + 1, late, late + HOUR)  # in Rome, the night in which summer time ends
    count(stage, *(hit(stage, f"e{n}", at) for n, at in enumerate(times)))
    for zone, expected in {
        "Asia/Kolkata": {"19 Nov": "1", "20 Nov": "2", "25 Oct": "2"},
        "Europe/Rome": {"19 Nov": "3", "24 Oct": "1", "25 Oct": "1"},
        "UTC": {"19 Nov": "3", "24 Oct": "2"},
    }.items():
        told = steps(page(stage, range="90d", tz=zone))
        assert {label: opens[0] for label, opens in told.items() if opens[0] != "0"} == expected, zone


def test_two_days_are_shown_by_the_hour_and_a_quarter_year_by_weeks(stage: Stage) -> None:
    for begin, end, zone, most in (
        ("2026-10-24", "2026-10-25", "Europe/Rome", 49),  # one of them has 25 hours
        ("2026-07-01", "2026-09-30", "UTC", 92),
        ("2026-07-01", "2026-10-31", "UTC", 18),
    ):
        asked = {"from": begin, "to": end, "tz": zone}
        assert len(stage.web.get(f"/{stage.acme.id}/stats.json", asked).json["steps"]) == most


def test_a_machine_without_the_data_of_a_zone_says_so_and_shows_utc(stage: Stage) -> None:
    with stage.database.transaction() as connection:
        connection.execute("update tenants set tz = 'Moon/Base' where number = ?", (stage.acme.number,))
    text = plain(page(stage))
    assert "no data of the time zone Moon/Base: days begin in UTC" in text


# -- Tables, as they are asked for


SHOWN = {
    "all": ["e5", "e4", "e3", "e2", "e1"],
    "opened": ["e4", "e2", "e1"],
    "unconfirmed": ["e3"],
    "not-opened": ["e5"],
    "clicked": ["e4", "e1"],
    "not-clicked": ["e5", "e3", "e2"],
    "never": ["e5"],
}


def test_emails_are_shown_by_what_their_readers_did_and_exported_so(mailing: Stage) -> None:
    for shown, expected in SHOWN.items():
        assert keys(page(mailing, "campaigns/Spring", show=shown)) == expected
        assert exported(mailing, campaign="Spring", show=shown) == expected
    assert list(SHOWN) == list(tracker.SHOWN)


def test_who_never_opened_is_who_neither_opened_nor_clicked_any_mail_however_their_address_is_written(
    mailing: Stage,
) -> None:
    others = {"late2": "Reader2@Example.org", "late5": "READER5@example.org", "new": "new@example.org", "nobody": ""}
    register(
        mailing, mailing.acme, *(tracker.Registration(key, "", to, sent_at=NOW - HOUR) for key, to in others.items())
    )
    assert exported(mailing, show="never") == ["new", "late5", "e5", "a2"]
    register(mailing, mailing.globex, tracker.Registration("theirs", "", "new@example.org"))
    count(
        mailing,
        click(mailing, "late5", HATS),
        hit(mailing, "theirs", uri=f"/{mailing.globex.mail_id}/pixel/theirs.gif"),
    )
    assert keys(page(mailing, show="never")) == ["new", "a2"]
    count(mailing, click(mailing, "new", HATS), click(mailing, "a2", HATS))
    told = plain(page(mailing, show="never"))
    assert "Nobody is like that." in told and "No email is like that." not in told


def test_each_button_of_the_emails_says_whom_it_shows(mailing: Stage) -> None:
    titles = re.findall(r'<li><a href="[^"]*#emails" title="([^"]+)"', page(mailing))
    assert len(set(titles)) == len(tracker.SHOWN)
    assert "nothing at all among the newest 10,000 emails" in titles[-1]


def test_an_email_to_which_nothing_happened_says_so_without_a_table(mailing: Stage) -> None:
    register(mailing, mailing.acme, tracker.Registration("quiet", sent_at=NOW - HOUR))
    text = page(mailing, "emails/quiet")
    assert "Nothing so far." in plain(text) and "<table" not in text and "0 requests" not in text


def test_a_recipient_leads_to_their_page_and_a_subject_to_the_email(mailing: Stage) -> None:
    text = page(mailing, q="reader2@")
    found = text[text.index('id="emails"') :]
    assert re.findall(r'href="\./((?:people|emails)/[^"?]+)[^"]*"><bdi>([^<]+)', found) == [
        ("people/e2", "reader2@example.org"),
        ("emails/e2", "Shoes &amp; hats"),
    ]
    assert 'href="./emails/x9?q=x9"><bdi>x9' in page(mailing, q="x9")  # whose recipient nobody knows


SPRING = {"e1", "e2", "e3", "e4", "e5"}
SEARCHES = {  # keys of emails, and what finds just these
    "e1 e2 e3 e4 e5": ("shoes", "oes & ha", "spring", "\u017fPR\u0131ng"),  # a long s, and an i without its dot
    "e3": ("reader3@", "READER3", "ader3@exam"),
    "e1": ("e1",),
    "a1 a2": ("AUTUMN",),
    "x9": ("x9", "X9"),
    "": ("hats shoe", "nothing like it", '"', "%", "_", "\\", "subject:shoes OR NOT *"),  # the first: not in one piece
}


def test_emails_are_found_by_a_piece_of_any_of_their_texts(mailing: Stage) -> None:
    for expected, search in ((set(each.split()), search) for each in SEARCHES for search in SEARCHES[each]):
        text = page(mailing, q=search)
        assert set(keys(text)) == set(exported(mailing, q=search)) == expected, search
        assert f"{len(expected)} of the newest 20,000" in plain(text), search
    assert keys(page(mailing, "campaigns/Autumn", q="reader")) == []
    assert keys(page(mailing, "campaigns/Spring", q="reader3", show="unconfirmed")) == ["e3"]


def test_a_search_heeds_neither_case_nor_accents_in_any_language(stage: Stage) -> None:
    written = "Caf\u00e9s Cafe\u0301s \u0416\u0443\u0440\u043d\u0430\u043b \u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2 Stra\u00dfe"
    register(stage, stage.acme, *[tracker.Registration(f"e{n}", subject) for n, subject in enumerate(written.split())])
    found = {each: {"e0", "e1"} for each in ("caf\u00e9s", "cafe\u0301s", "CAFES", "af\u00c9")}
    found |= {"\u0416\u0423\u0420\u041d": {"e2"}, "\u03c3\u03b9\u03a3\u03a5\u03a6\u039f\u03a3": {"e3"}}
    found |= {"STRASSE": {"e4"}, "a\u19b0b": set()}
    for search, expected in found.items():
        assert set(exported(stage, q=search)) == expected, search


def test_older_emails_are_found_by_how_they_begin(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "MOST_SEARCHED", 3)
    some = [tracker.Registration(f"k{n}", "Hats", f"Ann{n}@example.org", sent_at=NOW - n * DAY) for n in range(8)]
    register(stage, stage.acme, *some)
    assert exported(stage, q="hats") == ["k0", "k1", "k2"]
    assert exported(stage, q="ann7@") == exported(stage, q="k7") == ["k7"]
    assert exported(stage, q="n7@") == []
    text = page(stage, q="aNN")
    assert keys(text) == [f"k{n}" for n in range(8)]
    assert "3 of the newest 3 and 5 older that begin so" in plain(text)


def test_a_search_finds_what_was_registered_later_and_not_what_was_removed(mailing: Stage) -> None:
    register(mailing, mailing.acme, tracker.Registration("e1", "Umbrellas", campaign="Summer"))
    assert exported(mailing, q="brellas") == exported(mailing, q="ummer") == ["e1"]
    assert set(exported(mailing, q="shoes")) == SPRING - {"e1"}
    mailing.web.delete(f"/{mailing.acme.id}/emails/e2")
    assert set(exported(mailing, q="shoes")) == SPRING - {"e1", "e2"}
    assert mailing.check() == []


ORDERS = {  # the first two rows, and by what they are the first
    "Spring, Autumn": "campaigns.opened campaigns.clicked",  # with the click that proves a reading, 3 of 5 and 1 of 2
    "Autumn, Spring": "campaigns.opened.up campaigns.campaign.up campaigns.sent.up campaigns.first.up campaigns.last",
    "shoes, hats": "links.people links.clicks links.machines links.unconfirmed links.campaign",
    "hats, shoes": "links.url.up links.machines.up",
    "via Apple Mail, Chrome": "clients.client.up clients.unconfirmed",
    "via Apple Mail, via Gmail": "clients.device.up",
    "Chrome, via Apple Mail": "clients.share",
    "Chrome, via Gmail": "clients.people",
    "x9, old1": "emails.recipient.up",  # x9 has none
    "x9, old2": "emails.subject.up",
    "old1, x9": "emails.opens",
    "old2, old1": "emails.sent.up",
    "reader4, reader1": "emails.clicks",
    "reader5, reader4": "emails.recipient emails.campaign",
}


def test_tables_are_sorted_by_any_column(mailing: Stage) -> None:
    asked = [(order, expected) for expected, orders in ORDERS.items() for order in orders.split()]
    for order, expected in asked:
        text = page(mailing, sort=order)
        found = rows(text, order.partition(".")[0])
        assert ", ".join(re.sub(r"^acme.com/|@.*|\?.*|,", "", row[0]) for row in found[:2]) == expected, order
        assert text.count(f'aria-sort="{"ascending" if order.endswith(".up") else "descending"}"') == 1
    every = {f"{name}.{order}" for name, table in tracker.TABLES.items() for order in table.orders}
    assert {order.removesuffix(".up") for order, _ in asked} == every


def test_names_of_campaigns_are_sorted_with_their_numbers_by_value(stage: Stage) -> None:
    names = ["Mail 10", "Mail 9", "mail 9b", "Letter 2026-11", "Letter 2026-2", "Offer"]
    register(stage, stage.acme, *(tracker.Registration(f"k{n}", campaign=name) for n, name in enumerate(names)))
    for sort in ("campaigns.campaign.up", "campaigns.campaign"):
        found = [row[0] for row in rows(page(stage, sort=sort), "campaigns")]
        expected = ["Letter 2026-2", "Letter 2026-11", "Mail 9", "mail 9b", "Mail 10", "Offer"]
        assert found == expected[:: 1 if sort.endswith("up") else -1]


def test_the_first_click_on_a_head_sorts_texts_from_a_and_numbers_from_the_largest(mailing: Stage) -> None:
    def leads(text: str) -> dict[str, str]:
        """The head of each column, by what it sorts by."""
        return dict(re.findall(r'sort=([a-z.]+)[^"]*">([^<]+)</a></th>', text))

    text = page(mailing)
    texts = {"Campaign", "Destination", "Opened with", "Device", "Recipient", "Subject"}
    assert {head for sort, head in leads(text).items() if sort.endswith(".up")} == texts
    for first, again in (("campaigns.campaign.up", "campaigns.campaign"), ("campaigns.sent", "campaigns.sent.up")):
        assert again in leads(page(mailing, sort=first))


@pytest.mark.parametrize("sort", ["", "emails.recipient.up", "emails.opens"])
@pytest.mark.parametrize("asked", [{}, {"q": "example", "show": "not-clicked"}])
def test_pages_of_emails_follow_each_other_without_a_gap(stage: Stage, sort: str, asked: dict[str, str]) -> None:
    numbers = range(3 * tracker.CAMPAIGN_EMAIL_ROWS)
    # All at one moment, as a mailing is: the time alone does not tell pages apart.
    register(
        stage, stage.acme, *(tracker.Registration(f"k{n:03}", "S", f"r{n % 7}@example.org", "C", NOW) for n in numbers)
    )
    count(stage, *(hit(stage, f"k{n:03}", NOW - n) for n in numbers[::3]))
    text = page(stage, "campaigns/C", sort=sort, **asked)
    pages = [keys(text)]
    while (following := re.search(r'href="(\?[^"]*after=[^"#]*)#emails"', text)) and len(pages) < 4:
        if not sort:  # new mail goes on top, and moves no row onto the next page a second time
            register(stage, stage.acme, tracker.Registration(f"later{len(pages)}", "S", "x@example.org", "C", NOW + 1))
        text = stage.web.get(f"/{stage.acme.id}/campaigns/C{html.unescape(following[1])}").text
        pages.append(keys(text))
    assert [len(each) for each in pages] == [tracker.CAMPAIGN_EMAIL_ROWS] * 3  # and no fourth with nothing on it
    assert {key for each in pages for key in each} == {f"k{n:03}" for n in numbers}


def test_more_emails_on_the_dashboard_are_those_that_follow(stage: Stage) -> None:
    register(stage, stage.acme, *(tracker.Registration(f"k{n:02}", sent_at=NOW - n * 1000) for n in range(30)))
    text = page(stage, "dashboard")
    found = keys(text)
    while following := re.search(r'href="(\?[^"]*after=[^"#]*)#emails"', text):
        text = stage.web.get(f"/{stage.acme.id}/dashboard{html.unescape(following[1])}").text
        found += keys(text)
    assert found == [f"k{n:02}" for n in range(30)]


def test_a_filter_that_fits_few_says_where_it_stopped_looking(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "MOST_SORTED", 50)
    register(
        stage, stage.acme, *[tracker.Registration(f"k{n:03}", campaign="C", sent_at=NOW - n * 1000) for n in range(120)]
    )
    count(stage, hit(stage, "k110", NOW))
    text = page(stage, "campaigns/C", show="opened")
    assert "None of the newest 50 is like that." in plain(text)
    text = page(stage, "campaigns/C", show="clicked", after=re.findall("after=([0-9-]+)#", text)[0])
    assert "None of the next 50 is like that." in plain(text)
    text = page(stage, "campaigns/C", show="clicked", after=re.findall("after=([0-9-]+)#", text)[0])
    assert "No older email is like that." in plain(text) and "More" not in plain(text)
    assert exported(stage, show="opened") == ["k110"]


def test_exports_of_tables_are_what_the_page_shows(mailing: Stage) -> None:
    def ask(path: str, **asked: str) -> Any:
        return mailing.web.get(f"/{mailing.acme.id}/{path}", asked)

    campaigns = ask("campaigns.json").json["rows"]
    assert [(row["campaign"], row["emails"], row["opened_person"], row["click_only"]) for row in campaigns] == [
        ("Autumn", 2, 1, 0),
        ("Spring", 5, 2, 1),
    ]
    clients = ask("clients.csv").text.splitlines()
    assert clients[0] == "client,device,opens_person,opens_unconfirmed,next"
    assert "Gmail,,1,0," in clients
    assert [row["reason"] for row in ask("events.json", key="e2").json["rows"]] == ["repeat", "image-proxy"]
    assert ask("links.json", campaign="Autumn").json["rows"] == []


# -- What nobody may see, and what must not break a page


def test_markup_is_made_in_three_places_only() -> None:
    tree = ast.parse((ROOT / "tracker.py").read_text())
    functions = [each for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)]
    assert {each.name for each in functions if "Markup(" in ast.unparse(each)} == {"render", "joined", "tag"}
    assert ast.unparse(tree).count("Markup(") == 1 + 3  # with the class itself, and none outside of functions


def test_a_page_weighs_less_than_60_kb_with_its_stylesheet(stage: Stage) -> None:
    """Every step of the curve has something, every table is full, and texts are long."""
    emails, lines = [], []
    for n in range(92):
        key, sent = f"order-{n:024}", NOW - n * DAY
        subject, recipient = "A subject of a usual length, for a sale", f"a.longer.name.{n}@example.org"
        emails.append(tracker.Registration(key, subject, recipient, f"Campaign {n % 12}", sent))
        lines += [
            hit(stage, key, sent - m * HOUR, ua=agent) for m, agent in enumerate((OUTLOOK, GMAIL, APPLE, GATEWAY))
        ]
        lines.append(
            click(stage, key, f"https://acme.com/articles/2026/a-long-title-{n % 14}?utm=news", sent - 5 * HOUR)
        )
    register(stage, stage.acme, *emails)
    count(stage, *lines)
    stylesheet = len(stage.web.get(f"/assets/{stage.app.pages.stylesheet_name}").body)
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
    register(stage, stage.acme, tracker.Registration("e1", campaign="Spring"))
    links = [f"https://acme.com/{n:04}/{'x' * 1000}" for n in range(2_000)]
    count(stage, *[click(stage, "e1", link, NOW - (2_000 - n) * HOUR) for n, link in enumerate(links)])
    for path in ("dashboard", "campaigns/Spring"):
        shown = page(stage, path)
        assert len(shown) < 200_000
        table = shown[shown.index('id="emails"') :]
        assert "acme.com/0000/" in table
        assert "acme.com/0001/" in table  # the first ones


def test_every_range_and_table_is_empty_without_breaking(stage: Stage) -> None:
    register(stage, stage.acme, tracker.Registration("e1", sent_at=NOW - 3_000 * DAY))
    for name in list(tracker.RANGES)[:-1]:
        text = page(stage, range=name, machines="1")
        assert figures(text)["Sent"][0] == "0"
        assert "Nothing in this range" in text
        assert "NaN" not in text and "inf" not in plain(text).split()


WEBKIT = "AppleWebKit/605.1.15 (KHTML, like Gecko)"
CLIENTS = {
    APPLE: ("Apple Mail, hidden", ""),
    GMAIL: ("Gmail", ""),
    OUTLOOK: ("Outlook", "desktop"),
    CHROME: ("Chrome", "desktop"),
    "Outlook-iOS/711.5030510.prod.iphone (4.2440.0)": ("Outlook", "mobile"),
    f"Mozilla/5.0 (iPhone; CPU iPhone OS 18_6 like Mac OS X) {WEBKIT} Mobile/15E148": ("Apple Mail", "mobile"),
    f"Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) {WEBKIT}": ("Apple Mail", "desktop"),
    f"Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) {WEBKIT} Version/18.0 Safari/605.1.15": ("Safari", "desktop"),
    "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Thunderbird/140.4.0": ("Thunderbird", "desktop"),
    "YahooMailProxy; https://help.yahoo.com/x": ("Yahoo Mail", ""),
    "acme-thing/1.0": ("Others", ""),
    "": ("Others", ""),
}


def test_what_mail_was_opened_with_is_told_by_family_and_device() -> None:
    assert {agent: tuple(tracker.client_of(agent)) for agent in CLIENTS} == CLIENTS


def test_ago_is_said_in_one_unit() -> None:
    said = [tracker.ago(seconds) for seconds in (5, 61, 3_600 * 3, 86_400 * 2, 86_400 * 20, 86_400 * 800)]
    assert said == ["just now", "1 minute ago", "3 hours ago", "2 days ago", "2 weeks ago", "2 years ago"]


# -- Commands


FAILURES = {
    "Acme events --search spring": "--search is no filter of events; its filters: --key, --person, --url, --campaign, --since, --until, ",
    "Acme emails --since 2026-11-30T09:00:00Z": "--since is no filter of emails; its filters: ",
    "Acme emails --key e1": "--key is no filter of emails; its filters: --campaign, --search, --show",
    "Acme campaigns --show all": "--show is no filter of campaigns; its filters: none",
    "Nobody emails": "no tenant 'Nobody'",
    "Acme emails --search \udcff": "--search: expected text",
    "Acme links --campaign \udcff": "--campaign: expected text",
    "Acme events --key \udcff": "--key: expected text",
}


@pytest.fixture
def export(mailing: Stage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs the command, which ends with a status; returns what it said, to stderr if it failed."""
    mailing.use(monkeypatch)
    mailing.app.database.close()

    def call(*words: str, status: int = 0) -> str:
        assert tracker.main(["--env", "/dev/null", "export", *words]) == status
        said = capsys.readouterr()
        assert not (status and said.out)
        return said.err if status else said.out

    return call


def test_export_writes_a_whole_table_and_never_over_a_file(
    export: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["Acme", "emails", "--format", "json", "--show", "clicked", "--output"]
    target, again = tmp_path / "emails.json", tmp_path / "again.json"
    export(*words, str(target))
    assert [row["key"] for row in json.loads(target.read_text())["rows"]] == ["e4", "e1"]
    assert "is there already" in export(*words, str(target), status=1)
    monkeypatch.setattr(tracker, "CHUNK_ROWS", 2)
    export(*words, str(again))
    assert again.read_bytes() == target.read_bytes()
    campaigns = json.loads(export("Acme", "campaigns", "--format", "json"))["rows"]
    assert [row["campaign"] for row in campaigns] == ["Autumn", "Spring"]


def test_an_export_that_fails_says_why_and_leaves_no_file(export: Callable[..., str], tmp_path: Path) -> None:
    target = tmp_path / "export.csv"
    for words, told in FAILURES.items():
        assert told in export(*words.split(), "--output", str(target), status=1)
        assert not target.exists()
