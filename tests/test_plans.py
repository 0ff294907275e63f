"""What pages read, with either engine: no table that grows with each email or hit from one end to the other."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from bench import fill, pages
from conftest import ROOT, Postgres

import tracker

GROWING = r"(events|emails|email_counts|link_counts)\b"
EMAILS, EVENTS = 2_000, 20_000
MOST_ROWS = 500  # of events that a statement reads: a page shows 200 at most
MOST_STATEMENTS = 34  # of a page
EXPLAINED = (
    "session_preload_libraries=auto_explain",
    "auto_explain.log_min_duration=0",
    "auto_explain.log_analyze=on",
    "jit=on",
    "jit_above_cost=0",
)


@pytest.fixture
def year(tmp_path: Path) -> dict[str, str]:
    """The settings of a database with a year of mail."""
    fill.fill(tmp_path, EMAILS, EVENTS)
    return {"DATABASE_URL": f"sqlite:{tmp_path / 'tracking.db'}"}


@pytest.fixture
def moved(year: dict[str, str], postgres: Postgres, tmp_path: Path) -> dict[str, str]:
    """The same, moved to PostgreSQL, which writes the plan of each statement into its log."""
    url = postgres.make()
    move = [sys.executable, str(ROOT / "tracker.py"), "--env", os.devnull, "move", url]
    subprocess.run(move, env={**os.environ, **year}, check=True, stdout=subprocess.DEVNULL)
    options = quote(" ".join(f"-c {each}" for each in EXPLAINED))
    return {"DATABASE_URL": f"{url}&options={options}", "DATA_FOLDER": str(tmp_path)}


def asked_for(site: pages.Site) -> list[str]:
    """Every kind of page, and the first rows of exports."""
    exports = (f"/{site.tenant.id}/{table}.json?limit=200" for table in tracker.TABLES)
    return [*(path for _, path in pages.pages_of(site)), *exports]


def narrowed(site: pages.Site) -> list[str]:
    """What is asked of one campaign, and of events that have something in common."""
    campaign = site.rows("select campaign from campaigns where tenant = ? order by emails")[0][0]
    some = ("since=2020-01-01T00:00:00Z&until=2036-01-01T00:00:00Z", "verdict=human", f"campaign={campaign}")
    events = [f"/{site.tenant.id}/events.json?limit=200&{each}" for each in some]
    return [*events, f"/{site.tenant.id}/stats.json?campaign={campaign}"]


def test_no_page_reads_a_whole_table_with_sqlite(year: dict[str, str]) -> None:
    site, said = pages.Site(year), set[str]()
    with contextlib.closing(site.app):
        paths = asked_for(site) + narrowed(site)
        with site.app.database.reading() as connection:
            connection.set_trace_callback(said.add)
        for path in paths:
            site.get(path)
        with site.app.database.reading() as connection:
            connection.set_trace_callback(None)
            selects = [sql for sql in said if sql.lstrip().startswith("select")]
            plans = [row[3] for sql in selects for row in connection.execute(f"explain query plan {sql}")]
    assert len(selects) > 100
    assert [plan for plan in plans if re.match(f"SCAN {GROWING}", plan)] == []


def test_no_page_reads_all_events_and_none_asks_more_the_longer_its_range_with_postgresql(
    moved: dict[str, str], postgres: Postgres
) -> None:
    """Each statement is a round trip."""
    site, log, plans = pages.Site(moved), Path(postgres.folder, "log"), []
    with contextlib.closing(site.app):
        for path in asked_for(site):
            before = log.stat().st_size
            site.get(path)
            plans.append(log.read_bytes()[before:].decode())
        before = log.stat().st_size
        for path in narrowed(site):
            site.get(path)
        narrow = log.read_bytes()[before:].decode()
    statements = [each.count("Query Text") for each in plans]
    assert 1 < min(statements) < max(statements) <= MOST_STATEMENTS
    for text, most in (("".join(plans), MOST_ROWS), (narrow, tracker.MOST_SORTED + 1)):
        read = re.findall(r" on events .*actual.* rows=([0-9]+) loops=([0-9]+)", text)
        assert 0 < max(int(rows) * int(loops) for rows, loops in read) <= most
        assert re.findall("Seq Scan on events|JIT:", text) == []
