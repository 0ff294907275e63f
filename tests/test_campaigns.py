"""The numbers of a campaign, computed by hand: since its first sending, beside those before at the same age, and by the hour."""

from __future__ import annotations

import html
import os
import re
from collections import Counter
from typing import Any
from urllib.parse import quote

import pytest
from asking import add_one_id, get, register
from conftest import NOW, Stage, click, hit, segment

import tracker

BOTH_ENGINES = True

MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
OUTLOOK = "Microsoft Office/16.0 (Windows NT 10.0; Microsoft Outlook 16.0.17928; Pro)"
APPLE = "Mozilla/5.0"  # its privacy proxy
GATEWAY = "Barracuda Sentinel (EE)"
SHOES, HATS = "https://acme.com/shoes", "https://acme.com/hats"
SENT = NOW - 5 * DAY  # 18:21 on a Thursday, the 19th


@pytest.fixture
def stage(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """It is 18:21 on Tuesday, the 24th of November 2026."""
    monkeypatch.setattr(tracker, "now_ms", lambda: NOW)
    return stage


def mails(campaign: str, count: int, sent: int) -> list[tracker.Registration]:
    return [
        tracker.Registration(f"{campaign}{n}", f"News of {campaign}", f"reader{n}@example.org", campaign, sent)
        for n in range(1, count + 1)
    ]


@pytest.fixture
def mailing(stage: Stage) -> Stage:
    """Spring, sent five days ago to ten; before it Autumn, to four, and Winter, to two; Summer came later, to one."""
    autumn, winter = NOW - 40 * DAY, NOW - 30 * DAY
    register(stage, stage.acme, *mails("Spring", 10, SENT), *mails("Autumn", 4, autumn), *mails("Winter", 2, winter))
    register(stage, stage.acme, *mails("Summer", 1, NOW - DAY))
    lines = [
        hit(stage, "Spring6", SENT + MINUTE, ua=GATEWAY),
        hit(stage, "Spring5", SENT + 2 * MINUTE, ua=APPLE),
        hit(stage, "Spring1", SENT + 10 * MINUTE, ua=OUTLOOK),
        click(stage, "Spring1", SHOES, SENT + 20 * MINUTE),
        click(stage, "Spring1", HATS, SENT + 25 * MINUTE),
        hit(stage, "Spring2", SENT + 100 * MINUTE, ua=OUTLOOK),
        click(stage, "Spring2", SHOES, SENT + 105 * MINUTE),
        click(stage, "Spring7", SHOES, SENT + 3 * HOUR),  # whose images were never loaded
        hit(stage, "Spring1", SENT + 5 * HOUR, ua=OUTLOOK),
        hit(stage, "Spring3", SENT + 30 * HOUR, ua=OUTLOOK),
        hit(stage, "Spring4", SENT + 80 * HOUR, ua=OUTLOOK),
        hit(stage, "Autumn1", autumn + DAY, ua=OUTLOOK),
        hit(stage, "Autumn2", autumn + 6 * DAY, ua=OUTLOOK),  # later than Spring is old
        hit(stage, "Autumn3", autumn + HOUR, ua=APPLE),
        hit(stage, "Winter1", winter + 3 * DAY, ua=OUTLOOK),
        click(stage, "Winter1", HATS, winter + 4 * DAY),
        hit(stage, "Summer1", NOW - HOUR, ua=OUTLOOK),
    ]
    segment(stage, *lines)
    assert stage.drain().hits == len(lines)
    assert stage.check() == []
    return stage


def numbers(stage: Stage, campaign: str, query: str = "") -> dict[str, Any]:
    """What both of the addresses say."""
    found: dict[str, Any] = get(stage, f"/{stage.acme.id}/campaigns/{campaign}.json?{query}").json
    assert found == get(stage, f"/{stage.acme.id}/stats.json?campaign={campaign}&{query}").json
    return found


def some(**states: int) -> dict[str, int]:
    return {"person": 0, "unconfirmed": 0, "machine": 0, **states}


def hits(**states: int) -> dict[str, int]:
    return some(set_aside=0, **states)


def test_a_campaigns_numbers_stand_beside_those_of_the_ones_before_as_they_were_at_the_same_age(mailing: Stage) -> None:
    found = numbers(mailing, "Spring")
    assert (found["tenant"], found["campaign"]) == ("Acme", "Spring")
    assert (found["first_sent_at"], found["age_hours"]) == ("2026-11-19T18:15:00.000Z", 120.11)
    assert found["sent"] == {
        "emails": 10,
        "opened": some(person=4, unconfirmed=1, machine=1),
        "clicked": some(person=3),
        "clicked_without_open": 1,
        "clicked_with_unconfirmed": 0,
        "open_rate": [0.4, 0.5],
        "click_rate": [0.3, 0.3],
    }
    assert found["before"] == {
        "campaigns": ["Winter", "Autumn"],
        "sent": {
            "emails": 6,
            "opened": some(person=2, unconfirmed=1),
            "clicked": some(person=1),
            "clicked_without_open": 0,
            "clicked_with_unconfirmed": 0,
            "open_rate": [2 / 6, 3 / 6],
            "click_rate": [1 / 6, 1 / 6],
        },
    }
    assert found["half_of_opens_after_hours"] == 2.0  # the second of four came at 20:01
    assert numbers(mailing, "Autumn")["before"] is None
    # Summer is a day old: of Spring three had been opened and three clicked, of Winter and Autumn what came within a day.
    summer = numbers(mailing, "Summer")["before"]
    assert summer["campaigns"] == ["Spring", "Winter", "Autumn"]
    assert summer["sent"]["opened"] == some(person=3, unconfirmed=2, machine=1)
    assert summer["sent"]["clicked"] == some(person=3)


def test_the_curve_of_a_campaign_has_hours_for_two_days_up_to_midnight_and_then_days(mailing: Stage) -> None:
    steps = numbers(mailing, "Spring")["steps"]
    assert [step["step"] for step in steps] == ["hour"] * 54 + ["day"] * 2
    assert [steps[n]["from"][:13] for n in (0, 1, 53, 54, 55)] == [
        *("2026-11-19T18", "2026-11-19T19", "2026-11-21T23", "2026-11-22T00", "2026-11-23T00")
    ]
    opens = {n: step["opens"] for n, step in enumerate(steps) if any(step["opens"].values())}
    assert opens == {
        0: some(person=1, unconfirmed=1, machine=1),
        2: some(person=1),
        30: some(person=1),
        55: some(person=1),
    }
    clicks = {n: step["clicks"] for n, step in enumerate(steps) if any(step["clicks"].values())}
    assert clicks == {0: some(person=1), 2: some(person=1), 3: some(person=1)}
    # In Kolkata the hours begin at half past those of UTC, and the second midnight comes five and a half hours earlier.
    steps = numbers(mailing, "Spring", "tz=Asia/Kolkata")["steps"]
    assert [step["step"] for step in steps] == ["hour"] * 49 + ["day"] * 2
    assert (steps[0]["from"], steps[49]["from"]) == ("2026-11-19T17:30:00.000Z", "2026-11-21T18:30:00.000Z")
    assert sum(step["opens"]["person"] for step in steps) == 4


def test_the_curve_of_a_campaign_that_is_sent_for_weeks_has_days_alone_and_no_half(stage: Stage) -> None:
    for number, hours in (("One", 48), ("Two", 49), ("Three", 24 * 40), ("Four", -30)):
        register(stage, stage.acme, *mails(number, 1, SENT))
        register(
            stage, stage.acme, tracker.Registration(f"{number}-last", campaign=number, sent_at=SENT + hours * HOUR)
        )
        segment(stage, hit(stage, f"{number}1", SENT + HOUR, ua=OUTLOOK), hit(stage, f"{number}-last", NOW, ua=OUTLOOK))
        stage.drain()
    assert [step["step"] for step in numbers(stage, "One")["steps"]] == ["hour"] * 54 + ["day"] * 3
    assert numbers(stage, "One")["half_of_opens_after_hours"] == 1.25
    for number in ("Two", "Three"):  # of which the last of Three is still to be sent
        found = numbers(stage, number)
        assert [(step["step"], step["from"][:10], step["opens"]["person"]) for step in found["steps"]] == [
            ("day", f"2026-11-{day}", int(day in (19, 24))) for day in range(19, 25)
        ]
        assert found["half_of_opens_after_hours"] is None
        page = get(stage, f"/{stage.acme.id}/campaigns/{number}").text
        assert "Half of" not in page and 'aria-label="Opens and clicks, a day each"' in page
    assert numbers(stage, "Four")["steps"][0]["from"] == "2026-11-18T12:00:00.000Z"


def test_a_campaign_that_is_still_to_be_sent_has_a_page(stage: Stage) -> None:
    register(stage, stage.acme, *mails("Soon", 2, NOW + 3 * DAY))
    assert [step["from"] for step in numbers(stage, "Soon")["steps"]] == ["2026-11-27T18:00:00.000Z"]
    assert get(stage, f"/{stage.acme.id}/campaigns/Soon").status == 200


def test_a_campaign_says_with_what_it_was_opened_why_hits_count_as_they_do_and_which_links_were_clicked(
    mailing: Stage,
) -> None:
    found = numbers(mailing, "Spring")
    assert found["activity"] == {"opens": hits(person=5, unconfirmed=1, machine=1), "clicks": hits(person=4)}
    assert found["clients"] == [
        {"client": "Outlook", "device": "desktop", "opens_person": 5, "opens_unconfirmed": 0},
        {"client": "Apple Mail, hidden", "device": "", "opens_person": 0, "opens_unconfirmed": 1},
    ]
    reasons = [(each["event_type"], each["reason"], each["counts_as"], each["hits"]) for each in found["reasons"]]
    assert reasons == [
        ("open", "mail-client", "person", 5),
        ("open", "apple-mpp", "unconfirmed", 1),
        ("open", "scanner-word", "machine", 1),
        ("click", "browser", "person", 4),
    ]
    links = [(each["url"], each["clicks_person"], each["emails_person"], each["share"]) for each in found["links"]]
    assert links == [(SHOES, 3, 3, 0.75), (HATS, 1, 1, 0.25)]
    programs = get(mailing, f"/{mailing.acme.id}/clients.csv?campaign=Autumn").text.splitlines()
    assert programs[1:] == ["Outlook,desktop,2,0,", '"Apple Mail, hidden",,0,1,']


def test_a_campaign_that_nobody_was_told_of_begins_with_its_first_open(stage: Stage) -> None:
    pixel = f"/{stage.acme.mail_id}/pixel/{{}}.gif?campaign=Tool"
    segment(stage, *(hit(stage, f"u{n}", NOW - n * HOUR, uri=pixel.format(f"u{n}")) for n in (1, 2, 3)))
    stage.drain()
    found = numbers(stage, "Tool")
    assert (found["first_sent_at"], found["half_of_opens_after_hours"]) == ("2026-11-24T15:15:00.000Z", 1.25)
    assert (found["sent"]["emails"], found["sent"]["open_rate"]) == (0, None)
    assert [step["opens"]["person"] for step in found["steps"]] == [1, 1, 1, 0]
    # Declared as sent before, its time begins with that; declared as sent later, hits of before are in the first hour.
    for hours, expected in ((4, [0, 1, 1, 1, 0]), (2, [2, 1, 0])):
        with stage.database.transaction() as connection, tracker.Batch(connection, NOW) as changes:
            changes.declare(stage.acme.number, "Tool", 50, NOW - hours * HOUR)
        found = numbers(stage, "Tool")
        assert [step["opens"]["person"] for step in found["steps"]] == expected
        assert (found["sent"]["emails"], found["sent"]["open_rate"]) == (50, [0.06, 0.06])
    assert stage.check() == []


def test_the_small_curves_of_campaigns_are_their_first_two_days_by_the_hour(mailing: Stage) -> None:
    with mailing.database.reading() as connection:
        curves = tracker.campaign_curves(connection, mailing.acme.number, ["Spring", "Autumn", "Unknown"])
    assert set(curves) == {"Spring", "Autumn"}
    found = {campaign: {hour: n for hour, n in enumerate(curve) if n} for campaign, curve in curves.items()}
    assert found == {"Spring": {0: 1, 1: 1, 30: 1}, "Autumn": {24: 1}}
    assert {len(curve) for curve in curves.values()} == {48}


def test_emails_that_move_to_another_campaign_or_go_take_their_numbers_along(mailing: Stage) -> None:
    register(mailing, mailing.acme, tracker.Registration("Spring1", campaign="Autumn", sent_at=SENT))
    assert mailing.check() == []
    spring, autumn = (numbers(mailing, campaign) for campaign in ("Spring", "Autumn"))
    assert spring["activity"] == {"opens": hits(person=3, unconfirmed=1, machine=1), "clicks": hits(person=2)}
    assert autumn["activity"] == {"opens": hits(person=4, unconfirmed=1), "clicks": hits(person=2)}
    with mailing.database.transaction() as connection:
        keys = [f"Spring{n}" for n in range(1, 11)]
        tracker.delete_emails(str(mailing.folder), connection, mailing.acme.number, keys, NOW)
    assert mailing.check() == []
    for path in ("campaigns/Spring.json", "stats.json?campaign=Spring"):
        assert get(mailing, f"/{mailing.acme.id}/{path}").status == 404


def test_at_most_counts_no_email_twice_that_was_clicked_and_maybe_read(mailing: Stage) -> None:
    """Whichever of the two came first, in the range, in the campaign, and as old as another one was."""
    segment(mailing, click(mailing, "Spring5", HATS, SENT + 4 * HOUR), click(mailing, "Autumn3", HATS, NOW - 41 * DAY))
    mailing.drain()
    assert mailing.check() == []
    found = numbers(mailing, "Spring")
    both = "clicked_without_open", "clicked_with_unconfirmed"
    assert [found["sent"][name] for name in both] == [2, 1]
    assert found["before"]["sent"]["clicked_with_unconfirmed"] == 1
    page = " ".join(re.sub("<[^>]+>", " ", get(mailing, f"/{mailing.acme.id}/campaigns/Spring").text).split())
    assert "60.0 % " in page.replace(tracker.NBSP, " ")
    assert "4 by people; 2 more clicked, so they read it" in page and "so they read it;" not in page
    segment(mailing, hit(mailing, "Spring5", SENT + 5 * HOUR, ua=OUTLOOK))  # then it is no longer only clicked
    mailing.drain()
    assert mailing.check() == []
    assert [numbers(mailing, "Spring")["sent"][name] for name in both] == [1, 0]


def test_a_report_says_as_a_text_what_became_of_a_time_and_of_the_campaigns_that_began_in_it(
    mailing: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mailing.use(monkeypatch)
    command = ["--env", os.devnull, "report", "Acme"]
    assert tracker.main([*command, "--campaign", "Spring"]) == 0
    spring = capsys.readouterr().out.replace("\N{NO-BREAK SPACE}", " ")
    assert spring.splitlines()[:8] == [
        "Spring: first sent about 19 Nov 2026 18:15 (UTC), 5 days ago",
        "Opened             50–60 %   (2 campaigns before, as old: 33–50 %)"
        " 4 by people; 1 more clicked, so they read it; 1 maybe read",
        "Clicked             30.0 %   (2 campaigns before, as old: 16.7 %) 3 by people",
        "Click-to-open       60.0 %   (2 campaigns before, as old: 50.0 %) of 5 emails that people read",
        "Sent                    10   emails",
        "Half of what people opened was opened within 2 hours.",
        "Opened with (by people, and maybe):",
        "       5        0 Outlook, desktop",
    ]
    assert "\n       3        3 https://acme.com/shoes\n       1        1 https://acme.com/hats\n" in spring
    assert "\n       4 clicks, person: human, browser. A web browser.\n" in spring
    assert tracker.main(command) == 0
    week = capsys.readouterr().out.replace("\N{NO-BREAK SPACE}", " ")
    assert [line for line in week.splitlines() if line.endswith(" ago")] == [
        "Summer: first sent about 23 Nov 2026 18:15 (UTC), 1 day ago",
        "Spring: first sent about 19 Nov 2026 18:15 (UTC), 5 days ago",
    ]
    assert week.startswith("Acme: 7 days, UTC\nOpened ") and spring in week
    assert tracker.main([*command, "--campaign", "Sprung"]) == 1
    assert capsys.readouterr().err.endswith("no campaign 'Sprung'; `campaign list` shows them\n")


# -- Into a link, and to a person


def rows_of(page: str, name: str) -> list[str]:
    """The text of each row of a table."""
    [table] = re.findall(f'<table class="{name}">.*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    return [" ".join(html.unescape(re.sub("<[^>]+>", " ", row)).split()) for row in re.findall("<tr>(.*?)</tr>", table)]


def number_of(stage: Stage, url: str) -> int:
    [(number,)] = stage.rows("select id from urls where url = ?", url)
    return int(number)


def link_of(stage: Stage, url: str, query: str = "") -> str:
    return get(stage, f"/{stage.acme.id}/links/{number_of(stage, url)}?{query}").text


def test_a_links_page_says_which_people_clicked_it_when_and_with_what_newest_first(mailing: Stage) -> None:
    segment(mailing, click(mailing, "Spring9", SHOES, SENT + HOUR, ua=GATEWAY))
    mailing.drain()
    page = link_of(mailing, SHOES)
    assert f'<a href="{SHOES}" rel="noreferrer nofollow">{SHOES}</a>' in page.replace("<wbr/>", "")
    assert "3 clicks by people, in 3 emails; 1 by machines." in page
    rows = [row.split(" ago ")[1].split(" Spring ")[0] for row in rows_of(page, "events")]
    assert rows == ["reader7@example.org", "reader2@example.org", "reader1@example.org"]
    assert all("Chrome" in row for row in rows_of(page, "events"))
    assert len(rows_of(link_of(mailing, SHOES, "machines=1"), "events")) == 4
    # The campaign's page leads to it, with the range that one came from; what is downloaded is what is shown.
    ranged = get(mailing, f"/{mailing.acme.id}/campaigns/Spring?range=7d").text
    assert f'href="../links/{number_of(mailing, SHOES)}?range=7d&amp;campaign=Spring"' in ranged
    campaign = get(mailing, f"/{mailing.acme.id}/campaigns/Spring").text
    assert f'href="../links/{number_of(mailing, SHOES)}?campaign=Spring"' in campaign
    query = f"url={quote(SHOES, safe='')}&verdict=human"
    assert f"../events.json?{query}" in html.unescape(page)
    found = get(mailing, f"/{mailing.acme.id}/events.json?{query}").json["rows"]
    assert [row["key"] for row in found] == ["Spring7", "Spring2", "Spring1"]


def test_a_link_of_many_campaigns_can_be_seen_in_one(mailing: Stage) -> None:
    found = [
        [row.split(" ago ")[1].split()[0] for row in rows_of(link_of(mailing, HATS, query), "events")]
        for query in ("", "campaign=Winter", "campaign=Spring")
    ]
    assert found == [["reader1@example.org"] * 2, ["reader1@example.org"], ["reader1@example.org"]]
    numbers = "1 click by people, in 1 email."
    assert numbers in link_of(mailing, HATS, "campaign=Spring") and "2 clicks" in link_of(mailing, HATS)
    for link in (f"{number_of(mailing, HATS)}?campaign=Autumn", "999", "0", "-1", "x", "9" * 30):
        assert get(mailing, f"/{mailing.acme.id}/links/{link}").status == 404
    assert get(mailing, f"/{mailing.globex.id}/links/{number_of(mailing, HATS)}").status == 404


def test_the_page_of_a_link_that_later_mail_has_too_says_where_it_stopped_looking_and_goes_on(
    mailing: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    clicks = (click(mailing, f"later{n}", HATS, NOW - HOUR + n * MINUTE) for n in range(30))
    segment(mailing, *clicks)
    mailing.drain()
    monkeypatch.setattr(tracker, "MOST_SORTED", 29)
    page = link_of(mailing, HATS, "campaign=Winter")
    assert "None of the newest 29 is like that." in page and "Nobody so far" not in page
    [more] = re.findall(r'<a href="\?(campaign=Winter&amp;after=[0-9]+-[0-9]+)#events" rel="next">More</a>', page)
    [row] = rows_of(link_of(mailing, HATS, html.unescape(more)), "events")
    assert "reader1@example.org" in row


def test_the_clicks_of_a_link_go_on_page_by_page(stage: Stage) -> None:
    register(stage, stage.acme, *mails("Spring", 120, SENT))
    segment(stage, *(click(stage, f"Spring{n}", SHOES, SENT + n * MINUTE) for n in range(1, 121)))
    stage.drain()
    seen, query = list[str](), ""
    while True:
        page = link_of(stage, SHOES, query)
        seen += re.findall(r"reader[0-9]+", " ".join(rows_of(page, "events")))
        if not (following := re.search(r'href="\?([^"]*)#events" rel="next"', page)):
            break
        query = html.unescape(following[1])
    assert seen == [f"reader{n}" for n in range(120, 0, -1)]


def test_a_persons_page_has_all_that_they_got_and_did_over_all_mailings_however_their_address_is_written(
    mailing: Stage,
) -> None:
    register(mailing, mailing.acme, tracker.Registration("late", "To Reader 1", "Reader1@Example.org", sent_at=NOW))
    for key in ("Spring1", "late"):
        page = get(mailing, f"/{mailing.acme.id}/people/{key}").text
        # Of Spring, Autumn, Winter, Summer and the last: all but the last were read, two clicked.
        assert "80.0" in page and "40.0" in page
        assert re.search("<h1><bdi>[Rr]eader1@<wbr/>[Ee]xample.<wbr/>org</bdi></h1>", page)  # where its lines may end
        subjects = " ".join(rows_of(page, "emails"))
        assert all(f"News of {name}" in subjects for name in ("Spring", "Autumn", "Winter", "Summer"))
        assert "To Reader 1" in subjects and len(rows_of(page, "emails")) == 5
        done = rows_of(page, "events")
        assert len(done) == 8 and "News of Summer" in done[0] and done[-1].startswith(("5 weeks", "6 weeks", "40 days"))
    keys = [row["key"] for row in get(mailing, f"/{mailing.acme.id}/emails.json?person=Spring1").json["rows"]]
    assert keys == ["late", "Summer1", "Spring1", "Winter1", "Autumn1"]
    events = get(mailing, f"/{mailing.acme.id}/events.json?person=late").json["rows"]
    assert Counter(row["key"] for row in events) == {"Spring1": 4, "Winter1": 2, "Autumn1": 1, "Summer1": 1}
    assert 'href="../people/Spring1"' in get(mailing, f"/{mailing.acme.id}/emails/Spring1").text


def test_nobody_is_found_by_an_email_without_recipient_nor_where_people_are_not_shown(stage: Stage) -> None:
    register(stage, stage.acme, tracker.Registration("k1"), tracker.Registration("k2"))
    tenant = add_one_id(stage)
    register(stage, tenant, tracker.Registration("k1", recipient="secret@example.org"))
    for path in (f"{stage.acme.id}/people/k1", f"{stage.acme.id}/people/none", f"{tenant.id}/people/k1"):
        assert get(stage, f"/{path}").status == 404
    assert get(stage, f"/{stage.acme.id}/emails.json?person=k1").json["rows"] == []
    for name in ("emails", "events"):
        assert get(stage, f"/{tenant.id}/{name}.json?person=k1").status == 404
    segment(stage, hit(stage, "k1", uri=f"/{tenant.mail_id}/click/k1?url={HATS}", answer="302"))
    stage.drain()
    assert "secret" not in get(stage, f"/{tenant.id}/links/{number_of(stage, HATS)}").text
