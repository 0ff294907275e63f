"""Time every kind of page, and exports, with a year of mail: a million emails and ten million events beside a thousand and ten thousand.

Pages are asked of the WSGI application in this process, which has one connection with a worker's cache, as in a worker.
Each page is asked of both databases in turn, so that a machine that is busy with something else spoils both. Each
figure stands beside its bar, which is reported and never asserted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote
from wsgiref.util import setup_testing_defaults

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

import tracker
from bench import fill

SMALL_EMAILS, SMALL_EVENTS = 1_000, 10_000
QUICK_EMAILS, QUICK_EVENTS = 20_000, 200_000
REQUESTS = 15
MOST_MS, MOST_TIMES = 50.0, 1.5
FLOOR_MS = 5.0  # so much more than with the small database is no matter, whatever the ratio
ROWS_A_SECOND, MORE_MEGABYTES = 50_000, 10.0
ROOT = Path(__file__).resolve().parent.parent.parent


class Page(NamedTuple):
    """What is asked for, and its name in the report."""

    name: str
    path: str


@dataclass(frozen=True)
class Timing:
    """How long a page takes with either database."""

    name: str
    large: float  # ms, the median
    small: float
    size: int  # bytes, with the large database

    @property
    def ratio(self) -> float:
        """How many times as long it takes with the large one."""
        return self.large / self.small

    @property
    def met(self) -> bool:
        """Whether it is within its bars."""
        return self.large <= MOST_MS and (self.ratio <= MOST_TIMES or self.large - self.small <= FLOOR_MS)


@dataclass(frozen=True)
class Export:
    """How fast the command `export` writes a table, and what memory it takes beyond an export without a row."""

    name: str
    rows: int
    seconds: float
    megabytes: float

    @property
    def rate(self) -> float:
        """Rows a second."""
        return self.rows / self.seconds

    @property
    def met(self) -> bool:
        """Whether it is within its bars."""
        return self.rate >= ROWS_A_SECOND and self.megabytes <= MORE_MEGABYTES


class Site:
    """One database and an application over it."""

    def __init__(self, filled: fill.Filled) -> None:
        environ = {"DATABASE_URL": f"sqlite:{filled.database}", "BASE_URL": "https://track.example.com"}
        self.app = tracker.App(tracker.load_settings(environ, os.devnull))
        self.tenant = filled.tenant
        self._wsgi = tracker.wsgi(self.app)

    def get(self, path: str) -> bytes:
        """The body of a page."""
        environ: dict[str, Any] = {"HTTP_HOST": "track.example.com", "REMOTE_ADDR": "127.0.0.1"}
        setup_testing_defaults(environ)
        path, _, query = path.partition("?")
        environ |= {"PATH_INFO": path, "QUERY_STRING": query, "RAW_URI": f"{path}?{query}"}
        answered: list[str] = []

        def start_response(status: str, *_: object) -> Any:
            answered.append(status)

        chunks = self._wsgi(environ, start_response)
        try:
            body = b"".join(chunks)
        finally:
            getattr(chunks, "close", lambda: None)()
        if not answered[0].startswith("200"):
            raise SystemExit(f"{path}?{query}: {answered[0]}\n{body.decode()[:2000]}")
        return body

    def rows(self, sql: str, *values: object) -> list[Any]:
        """Ask the database."""
        with self.app.database.reading() as connection:
            return connection.execute(sql, (self.tenant.number, *values)).fetchall()

    def timed(self, path: str) -> tuple[float, int]:
        """How many milliseconds a page takes, and its bytes."""
        started = time.perf_counter()
        body = self.get(path)
        return (time.perf_counter() - started) * 1000, len(body)


def pages_of(site: Site) -> Iterator[Page]:
    """Every kind of page; those of the small and the large database have the same names in the same order."""
    home = f"/{site.tenant.id}"
    today = datetime.now(timezone.utc).date()
    middle, name = site.rows(
        "select created_at, key from emails where tenant = ? and campaign <> '' and registered = 1"
        " order by created_at desc limit 1 offset (select count(*) / 2 from emails)"
    )[0]
    person = site.rows("select recipient from emails where tenant = ? and recipient <> '' limit 1 offset 99")[0][0]
    campaigns = site.rows("select campaign, emails from campaigns where tenant = ? order by emails")
    usual, largest = campaigns[len(campaigns) // 2][0], campaigns[-1][0]
    rare = fill.RARE_WORD.lower()

    for name_, asked in (
        *((each, f"range={each}") for each in tracker.RANGES),
        ("from-to, a quarter", f"from={today - timedelta(days=200)}&to={today - timedelta(days=110)}"),
        ("from-to, two days", f"from={today - timedelta(days=31)}&to={today - timedelta(days=30)}"),
        ("30d with machines", "machines=1"),
        *((f"{each} in Kolkata", f"range={each}&tz=Asia/Kolkata") for each in ("24h", "30d", "90d", "12m")),
        ("30d in New York", "tz=America/New_York"),
    ):
        yield Page(f"dashboard: {name_}", f"{home}/dashboard?{asked}")
    for name_, asked in (
        ("deep", f"after={middle}-{1 << 40}"),
        *((f"sorted by {order}", f"sort=emails.{order}") for order in tracker.EMAILS.orders),
        ("sorted, deep", "sort=emails.opens.up&after=0-900"),
        *((show, f"show={show}") for show in tracker.SHOWN if show != "all"),
        ("not opened, sorted", "show=not-opened&sort=emails.recipient"),
        ("search: a recipient", f"q={person}"),
        ("search: beginning of recipients", f"q={person[:3]}"),
        ("search: one letter", f"q={person[0]}"),
        ("search: a key", f"q={name}"),
        ("search: beginning of keys", "q=m"),
        ("search: a word of every email", f"q={fill.COMMON_WORD.lower()}"),
        ("search: two words", f"q={fill.COMMON_WORD.lower()}+spring"),
        ("search: a rare word", f"q={rare}"),
        ("search: no such word", "q=nowhere"),
        (
            "search: a word of every email, not opened",
            f"q={fill.COMMON_WORD.lower()}&show=not-opened&sort=emails.opens",
        ),
        ("search: a word of every email, deep", f"q={fill.COMMON_WORD.lower()}&after={middle}-{1 << 40}"),
    ):
        yield Page(f"emails: {name_}", f"{home}/dashboard?{asked}")
    for order in tracker.CAMPAIGNS.orders:
        yield Page(f"campaigns: by {order}", f"{home}/dashboard?sort=campaigns.{order}")
    yield Page("campaigns: a hundred", f"{home}/dashboard?campaigns=100")
    for order in tracker.LINKS.orders:
        yield Page(f"links: by {order}", f"{home}/dashboard?sort=links.{order}")
    for which, campaign in (("usual", usual), ("largest", largest)):
        path = f"{home}/campaigns/{quote(campaign, safe='')}"
        yield Page(f"{which} campaign", path)
        for show, asked in (
            ("by recipient", "sort=emails.recipient.up"),
            ("not opened", "show=not-opened"),
            ("not opened, by recipient", "show=not-opened&sort=emails.recipient.up"),
            ("search: a recipient", f"q={person}"),
            ("search: a word of every email", f"q={fill.COMMON_WORD.lower()}"),
        ):
            yield Page(f"{which} campaign: {show}", f"{path}?{asked}")
    busiest = site.rows(
        "select key from emails join email_counts on email = id where tenant = ? and id > 100 order by id limit 200"
    )
    yield Page("email", f"{home}/emails/{busiest[-1][0]}")
    for each in ("30d", "all"):
        yield Page(f"stats.json: {each}", f"{home}/stats.json?range={each}")
    yield Page("campaigns.csv", f"{home}/campaigns.csv")
    yield Page("clients.csv", f"{home}/clients.csv?range=all")


def time_pages(large: Site, small: Site, requests: int, only: str = "") -> Iterator[Timing]:
    """The median time of each page with each database, after one request that warms up."""
    for page, other in zip(pages_of(large), pages_of(small), strict=True):
        if only not in page.name:
            continue
        found: tuple[list[float], list[float]] = ([], [])
        size = large.timed(page.path)[1]
        small.timed(other.path)
        for _ in range(requests):
            for site, path, times in ((large, page.path, found[0]), (small, other.path, found[1])):
                times.append(site.timed(path)[0])
        yield Timing(page.name, statistics.median(found[0]), statistics.median(found[1]), size)


# What a process inherits of memory over fork and exec stands in its ru_maxrss, but not in VmHWM.
RUN_AND_WEIGH = """
import sys, tracker
status = tracker.main(sys.argv[1:])
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak, file=sys.stderr)
sys.exit(status)
"""


def run_export(site: Site, *words: str) -> tuple[float, float]:
    """Seconds and megabytes that the command `export` takes."""
    command = [sys.executable, "-c", RUN_AND_WEIGH, "--env", os.devnull, "export", site.tenant.id, *words]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "DATABASE_URL": f"sqlite:{site.app.settings.database}"}
    # Where the compiled program is not kept, each run compiles it, which takes more memory than any export.
    environ |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": f"{site.app.settings.folder}/compiled"}
    started = time.perf_counter()
    done = subprocess.run(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"export {' '.join(words)}: {done.stderr}")
    return seconds, int(done.stderr.split()[-1]) / 1024


def time_exports(site: Site) -> Iterator[Export]:
    """The command `export`, whole tables in both forms; the start of the program and its memory are taken off."""
    for table, form in ((table, form) for table in ("emails", "events") for form in tracker.EXPORT_TYPES):
        [(rows,)] = site.rows(f"select count(*) from {table} where tenant = ?")
        nothing = ("--search", "no such email") if table == "emails" else ("--key", "none")
        run_export(site, table, *nothing)  # compiles the program, if it is the first
        start, before = run_export(site, table, "--format", form, *nothing)
        seconds, after = run_export(site, table, "--format", form)
        yield Export(f"export {table} as {form}", rows, max(seconds - start, 0.001), after - before)


def time_export_pages(site: Site) -> Iterator[tuple[str, float, int]]:
    """The largest export over HTTP of each table and form: its name, its seconds, and its bytes."""
    for table in ("emails", "events"):
        for form in tracker.EXPORT_TYPES:
            took, size = site.timed(f"/{site.tenant.id}/{table}.{form}")
            yield f"{table}.{form}, {tracker.MAX_ROWS:,} rows at most", took / 1000, size


def existing(folder: Path) -> fill.Filled:
    """A database that fill.py made before."""
    database = tracker.Database(str(folder / "tracking.db"))
    with database.reading() as connection:
        tenant = tracker.list_tenants(connection)[0]
    database.close()
    return fill.Filled(folder, tenant, {})


def filled(folder: Path, emails: int, events: int) -> Site:
    """An application over a database of so many emails and events, which is made unless it is there."""
    if (folder / "tracking.db").exists():
        return Site(existing(folder))
    made = fill.fill(folder, emails, events)
    took = ", ".join(f"{step} in {seconds:.0f} s" for step, seconds in made.seconds.items())
    size = os.path.getsize(made.database) / 1e6
    print(f"{emails:,} emails and {events:,} events: {size:,.0f} MB; {took}", flush=True)
    return Site(made)


def yes(met: bool) -> str:
    """Whether a bar is met, to be seen from afar."""
    return "yes" if met else "NO"


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure and print; what was measured."""
    small = filled(folder / "small", SMALL_EMAILS, SMALL_EVENTS)
    large = filled(folder / "large", args.emails, args.events)
    timings, exports, over_http = [], [], []
    try:
        print(f"\n{'page':48}{'large':>9}{'small':>9}{'ratio':>7}{'bytes':>9}   met")
        for timing in time_pages(large, small, args.requests, args.only):
            timings.append(timing)
            times = f"{timing.large:9.1f}{timing.small:9.1f}{timing.ratio:7.2f}{timing.size:9,}"
            print(f"{timing.name:48}{times}   {yes(timing.met)}", flush=True)
        print(f"bars: {MOST_MS:.0f} ms; {MOST_TIMES} times the small one, or {FLOOR_MS:.0f} ms more\n")
        if not args.only:
            for export in time_exports(large):
                exports.append(export)
                figures = f"{export.rate:10,.0f} rows/s, {export.megabytes:5.1f} MB more"
                print(f"{export.name:30}{figures}   {yes(export.met)}", flush=True)
            print(f"bars: {ROWS_A_SECOND:,} rows/s; {MORE_MEGABYTES:.0f} MB more\n")
            for name, seconds, size in time_export_pages(large):
                over_http.append((name, seconds, size))
                print(f"{name}: {seconds:.1f} s, {size:,} bytes", flush=True)
    finally:
        large.app.close()
        small.app.close()
    return {
        "pages": [{**dataclasses.asdict(each), "ratio": each.ratio, "met": each.met} for each in timings],
        "exports": [{**dataclasses.asdict(each), "rate": each.rate, "met": each.met} for each in exports],
        "export_pages": over_http,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Fill, measure, print."""
    parser = argparse.ArgumentParser(prog="pages.py", description=(__doc__ or "").partition(":")[0] + ".")
    add = parser.add_argument
    add("--emails", type=int, default=fill.EMAILS, metavar="N", help=f"of the large database; default: {fill.EMAILS:,}")
    add("--events", type=int, default=fill.EVENTS, metavar="N", help=f"of the large database; default: {fill.EVENTS:,}")
    add("--requests", type=int, default=REQUESTS, metavar="N", help=f"of each page; default: {REQUESTS}")
    add("--quick", action="store_true", help=f"a trial: {QUICK_EMAILS:,} emails, {QUICK_EVENTS:,} events, 5 requests")
    add("--only", default="", metavar="TEXT", help="the pages whose name has this, and no export")
    add("--folder", type=Path, metavar="DIR", help="where databases are kept, to be used again (default: nowhere)")
    add("--json", type=Path, metavar="FILE", help="write all that was measured to a file")
    args = parser.parse_args(argv)
    if args.quick:
        args.emails, args.events, args.requests = QUICK_EMAILS, QUICK_EVENTS, 5
    with tempfile.TemporaryDirectory(prefix="bench-pages-") as temporary:
        measured = run(args, args.folder or Path(temporary))
    if args.json:
        args.json.write_text(json.dumps(measured, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
