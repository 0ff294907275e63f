"""Made-up years of mail: they are like real ones, every page can be timed with them, and numbers are the same
however they are read. No time is asserted."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from bench import fill, pages

import tracker

NOW = 1_795_544_485_430
EMAILS, EVENTS = 600, 6_000
ZONES = (
    *(
        "UTC",
        "Europe/Rome",
        "Asia/Kolkata",
        "Asia/Kathmandu",
        "America/New_York",
        "America/Los_Angeles",
        "America/Havana",
    ),
    *("Australia/Lord_Howe", "Pacific/Auckland", "Asia/Beirut"),
)
RANGES: tuple[tuple[date, date], ...] = (
    (date(2026, 3, 28), date(2026, 3, 29)),  # summer time begins in Rome
    (date(2026, 3, 5), date(2026, 4, 10)),
    (date(2026, 10, 20), date(2026, 11, 3)),  # … and ends, elsewhere a week later
    (date(2020, 1, 1), date(2027, 1, 1)),
)


@pytest.fixture(scope="module")
def year(tmp_path_factory: pytest.TempPathFactory) -> fill.Filled:
    """A small year of mail, which nobody changes."""
    return fill.fill(tmp_path_factory.mktemp("year"), EMAILS, EVENTS, NOW)


@pytest.fixture
def database(year: fill.Filled) -> Iterator[tracker.Database]:
    """Its database."""
    opened = tracker.Database(str(year.database))
    yield opened
    opened.close()


def test_a_filled_database_is_as_large_as_it_was_asked_to_be_and_its_numbers_are_right(
    year: fill.Filled, database: tracker.Database
) -> None:
    with database.reading() as connection:
        count = {
            table: connection.execute(f"select count(*) from {table}").fetchone()[0]
            for table in ("emails", "event_rows", "campaigns")
        }
        assert count == {"emails": EMAILS, "event_rows": EVENTS, "campaigns": EMAILS // fill.EMAILS_A_CAMPAIGN}
        assert tracker.integrity_faults(connection) == []
        assert tracker.rollup_differences(connection) == []
        first, last = connection.execute("select min(at), max(at) from event_rows").fetchone()
        assert NOW - 366 * tracker.DAY_MS < first < last <= NOW
        # In the order of time, as events come.
        times = connection.execute("select at from event_rows order by id").fetchall()
        assert times == sorted(times)


def test_a_filled_database_has_something_of_everything(database: tracker.Database) -> None:
    with database.reading() as connection:
        kinds = Counter(row[0] for row in connection.execute("select type from event_rows"))
        assert kinds[tracker.CLICK] == pytest.approx(EVENTS * fill.CLICK_SHARE, rel=0.02)
        verdicts = {row[0] for row in connection.execute("select verdict from events")}
        assert verdicts == set(tracker.VERDICT_STATES)
        states = {row[0] for row in connection.execute("select state from activity where type = 1")}
        assert states == {tracker.PERSON, tracker.UNCONFIRMED, tracker.MACHINE, tracker.ASIDE}
        assert connection.execute("select 1 from emails where campaign = '' and subject <> ''").fetchone()
        before = {row[0] for row in connection.execute("select count(*) from event_rows group by email")}
        assert len(before) > 5


def test_the_same_seed_makes_the_same_mail(tmp_path: Path, year: fill.Filled, database: tracker.Database) -> None:
    again = tracker.Database(str(fill.fill(tmp_path / "again", EMAILS, EVENTS, NOW).database))
    found = []
    for each in (database, again):
        with each.reading() as connection:
            found.append(connection.execute("select * from event_rows").fetchall())
    again.close()
    assert found[0] == found[1]


@pytest.mark.parametrize("zone", ZONES)
def test_the_numbers_of_a_range_are_the_same_by_days_and_by_quarters(
    zone: str, database: tracker.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tracker.zone_named(zone) is None:
        pytest.skip("this machine has no time zones")

    def read(connection: Any) -> list[dict[str, Any]]:
        periods = [tracker.period_of(connection, 1, name, zone, NOW) for name in tracker.RANGES]
        periods += [tracker.period_of(connection, 1, "", zone, NOW, days) for days in RANGES]
        return [tracker.stats_json(tracker.read_stats(connection, 1, period, fill.ZONE), "", 0) for period in periods]

    with database.reading() as connection:
        by_days = read(connection)
        monkeypatch.setattr(tracker, "LEAST_QUARTERS", math.inf)
        monkeypatch.setattr(tracker.Period, "span", lambda period, _: tracker.Span(*period.quarters))
        by_quarters = read(connection)
    for one, other in zip(by_days, by_quarters, strict=True):
        if zone == fill.ZONE:  # the day under way is read whole, and so is the one before
            one["before"] = other["before"] = None
        assert one == other
    assert sum(one["activity"]["opens"]["hits"]["person"] for one in by_days)


def test_an_email_is_exported_with_its_best_state(database: tracker.Database) -> None:
    with database.reading() as connection:
        rows = tracker.table_page(connection, 1, "emails", tracker.NEWEST, EMAILS).rows
        for kind, verb in (tracker.OPEN, "opened"), (tracker.CLICK, "clicked"):
            sql = "select key, state, at from email_bests join emails on emails.id = email where type = ?"
            bests = {
                key: (tracker.STATES[state], tracker.iso_time(at))
                for key, state, at in connection.execute(sql, (kind,))
            }
            places = [tracker.EMAIL_FIELDS.index(f"{verb}_{what}") for what in ("as", "at")]
            assert {row[0]: (row[places[0]], row[places[1]]) for row in rows if row[places[0]]} == bests
            assert bests


@pytest.mark.parametrize("shown", tracker.SHOWN)
def test_emails_shown_by_what_their_readers_did_go_on_page_by_page(
    shown: str, database: tracker.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = tracker.Wanted(shown=shown)
    with database.reading() as connection:
        whole = tracker.table_page(connection, 1, "emails", tracker.NEWEST, EMAILS, wanted).rows
        monkeypatch.setattr(tracker, "MOST_SORTED", 50)
        found: list[tuple[Any, ...]] = []
        after: tracker.Cursor | None = tracker.NEWEST
        while after:
            page = tracker.table_page(connection, 1, "emails", after, 7, wanted)
            assert len(page.rows) <= 7
            found += page.rows
            after = page.next
    assert found == whole
    assert 0 < len(whole) <= EMAILS


@pytest.mark.parametrize(
    "text", ["acme", "acm", "ACM", "a", "spring s", "campaign 3", "camp", "nothing", "Ácme", "e", "1"]
)
def test_a_search_finds_the_same_word_by_word_as_by_their_beginning(
    text: str, database: tracker.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with database.reading() as connection:
        found = tracker.find_emails(connection, 1, text, people=True)
        monkeypatch.setattr(tracker, "MOST_WORDS", 0)
        assert tracker.find_emails(connection, 1, text, people=True) == found
    assert bool(found) == (text != "nothing")


def test_links_are_sorted_by_sums_over_all_campaigns(database: tracker.Database) -> None:
    with database.reading() as connection:
        rows = tracker.link_rows(connection, 1, tracker.ANYTHING, 0, 1000).rows
        sums = connection.execute(
            "select url, sum(state = 1), sum(state = 2), sum(state = 3) from event_rows"
            " join judgements on judgements.id = judgement where type = 2 and state <= 3 group by url"
        ).fetchall()
        urls = dict(connection.execute("select id, url from urls").fetchall())
        assert {row[0]: row[1:4] for row in rows} == {urls[url]: tuple(counts) for url, *counts in sums}
        people = tracker.LINK_ROW_FIELDS.index("emails_person")
        assert [row[people] for row in rows] == sorted((row[people] for row in rows), reverse=True)
        everywhere = next(row for row in rows if row[0] == "https://www.example.com/")
        assert everywhere[tracker.LINK_ROW_FIELDS.index("campaigns")] > 1
        for order in tracker.LINK_ORDERS:
            wanted = tracker.Wanted(order=order, ascending=True)
            paged = [
                row for n in range(0, len(rows), 10) for row in tracker.link_rows(connection, 1, wanted, n, 10).rows
            ]
            assert paged == tracker.link_rows(connection, 1, wanted, 0, 1000).rows


def test_every_page_is_timed_and_stands_beside_its_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--emails", "1500", "--events", "15000", "--requests", "1", "--json", str(tmp_path / "found.json")]
    assert pages.main([*options, "--folder", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^dashboard: 30d +[0-9.]+ +[0-9.]+ +[0-9.]+ +[0-9,]+   (yes|NO)$", said, re.MULTILINE)
    found = json.loads((tmp_path / "found.json").read_text())
    names = [each["name"] for each in found["pages"]]
    assert len(names) == len(set(names)) > 50
    assert [each["name"] for each in found["exports"]] == [
        f"export {table} as {form}" for table in ("emails", "events") for form in ("csv", "json")
    ]
    assert [each["rows"] for each in found["exports"]] == [1500, 1500, 15000, 15000]
    assert len(found["export_pages"]) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"large", "small", "found.json"}


@pytest.mark.parametrize(
    ("large", "small", "met"), [(50.0, 34.0, True), (50.0, 30.0, False), (8.0, 3.5, True), (51.0, 50.0, False)]
)
def test_a_page_is_within_its_bars_if_it_is_fast_and_the_size_hardly_matters(
    large: float, small: float, met: bool
) -> None:
    assert pages.Timing("page", large, small, 1).met is met
