"""Time every kind of page, and exports, with a year of mail: a million emails and ten million events beside a thousand and ten thousand.

Pages are asked of the WSGI application in this process, which has one connection with a worker's cache, as in a worker.
Each page is asked of both databases in turn, so that a machine that is busy with something else spoils both. Each
figure stands beside its bar, which is reported and never asserted.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote
from wsgiref.util import setup_testing_defaults

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import Postgres, running_postgres

import tracker
from bench import fill

SMALL = 1_000, 10_000  # emails and events
QUICK = 20_000, 200_000
REQUESTS = 15
MOST_MS, MOST_TIMES = 50.0, 1.5
MOST_POSTGRES_MS = 80.0
FLOOR_MS = 5.0  # so much more than with the small database is no matter, whatever the ratio
ROWS_A_SECOND, MORE_MEGABYTES = 50_000, 10.0
ROOT = Path(__file__).resolve().parent.parent.parent


Page = tuple[str, str]  # its name in the report, and what is asked for


class Site:
    """One database and an application over it."""

    def __init__(self, environ: dict[str, str]) -> None:
        self.environ = environ
        self.app = tracker.App(tracker.load_settings({"BASE_URL": "https://track.example.com", **environ}, os.devnull))
        with self.app.database.reading() as connection:
            self.tenant = tracker.list_tenants(connection)[0]
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
        body = b"".join(chunks)
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

    for name_, asked in (
        *((each, f"range={each}") for each in tracker.RANGES),
        ("from-to, a quarter", f"from={today - timedelta(days=200)}&to={today - timedelta(days=110)}"),
        ("from-to, two days", f"from={today - timedelta(days=31)}&to={today - timedelta(days=30)}"),
        ("30d with machines", "machines=1"),
        *((f"{each} in Kolkata", f"range={each}&tz=Asia/Kolkata") for each in ("24h", "30d", "90d", "12m")),
        ("30d in New York", "tz=America/New_York"),
    ):
        yield (f"dashboard: {name_}", f"{home}/dashboard?{asked}")
    word = fill.COMMON_WORD.lower()
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
        ("search: a word of every email", f"q={word}"),
        ("search: two words", f"q={word}+spring"),
        ("search: a rare word", f"q={fill.RARE_WORD.lower()}"),
        ("search: no such word", "q=nowhere"),
        ("search: a word of every email, not opened", f"q={word}&show=not-opened&sort=emails.opens"),
        ("search: a word of every email, deep", f"q={word}&after={middle}-{1 << 40}"),
    ):
        yield (f"emails: {name_}", f"{home}/dashboard?{asked}")
    for order in tracker.CAMPAIGNS.orders:
        yield (f"campaigns: by {order}", f"{home}/dashboard?sort=campaigns.{order}")
    yield ("campaigns: a hundred", f"{home}/dashboard?campaigns=100")
    for order in tracker.LINKS.orders:
        yield (f"links: by {order}", f"{home}/dashboard?sort=links.{order}")
    for which, campaign in (("usual", usual), ("largest", largest)):
        path = f"{home}/campaigns/{quote(campaign, safe='')}"
        yield (f"{which} campaign", path)
        yield (f"{which} campaign: numbers", f"{path}.json")
        for show, asked in (
            ("by recipient", "sort=emails.recipient.up"),
            ("not opened", "show=not-opened"),
            ("not opened, by recipient", "show=not-opened&sort=emails.recipient.up"),
            ("search: a recipient", f"q={person}"),
            ("search: a word of every email", f"q={word}"),
        ):
            yield (f"{which} campaign: {show}", f"{path}?{asked}")
    busiest = site.rows(
        "select key from emails join email_counts on email = id where tenant = ? and id > 100 order by id limit 200"
    )
    yield ("email", f"{home}/emails/{busiest[-1][0]}")
    yield ("person", f"{home}/people/{busiest[-1][0]}")
    link, of = site.rows(
        "select url, max(campaign) from links where tenant = ? group by url order by sum(clicks_person) desc limit 1"
    )[0]
    path = f"{home}/links/{link}"
    for name_, asked in (
        ("", ""),
        (" in a campaign", f"campaign={quote(of, safe='')}"),
        (" with machines", "machines=1"),
    ):
        yield (f"link{name_}", f"{path}?{asked}")
    for each in ("30d", "all"):
        yield (f"stats.json: {each}", f"{home}/stats.json?range={each}")
    yield ("campaigns.csv", f"{home}/campaigns.csv")
    yield ("clients.csv", f"{home}/clients.csv?range=all")


def time_pages(large: Site, small: Site, requests: int, only: str, most_ms: float) -> None:
    """Print the median time of each page with each database, after one request that warms up."""
    print(f"\n{'page':48}{'large':>9}{'small':>9}{'ratio':>7}{'bytes':>9}   met")
    for (name, path), (_, other) in zip(pages_of(large), pages_of(small), strict=True):
        if only not in name:
            continue
        size = large.timed(path)[1]
        small.timed(other)
        times = [(large.timed(path)[0], small.timed(other)[0]) for _ in range(requests)]
        more, less = map(statistics.median, zip(*times, strict=True))
        met = more <= most_ms and (more / less <= MOST_TIMES or more - less <= FLOOR_MS)
        print(f"{name:48}{more:9.1f}{less:9.1f}{more / less:7.2f}{size:9,}   {yes(met)}", flush=True)
    print(f"bars: {most_ms:.0f} ms; {MOST_TIMES} times the small one, or {FLOOR_MS:.0f} ms more\n")


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
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **site.environ}
    # Where the compiled program is not kept, each run compiles it, which takes more memory than any export.
    environ |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": f"{site.app.settings.folder}/compiled"}
    started = time.perf_counter()
    done = subprocess.run(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"export {' '.join(words)}: {done.stderr}")
    return seconds, int(done.stderr.split()[-1]) / 1024


def time_exports(site: Site) -> None:
    """The command `export`, whole tables in both forms; the start of the program and its memory are taken off."""
    for table, form in itertools.product(("emails", "events"), tracker.EXPORT_TYPES):
        [(rows,)] = site.rows(f"select count(*) from {table} where tenant = ?")
        nothing = ("--search", "no such email") if table == "emails" else ("--key", "none")
        run_export(site, table, *nothing)  # compiles the program, if it is the first
        start, before = run_export(site, table, "--format", form, *nothing)
        seconds, after = run_export(site, table, "--format", form)
        rate, megabytes = rows / max(seconds - start, 0.001), after - before
        met = yes(rate >= ROWS_A_SECOND and megabytes <= MORE_MEGABYTES)
        print(f"export {table} as {form:10}{rate:10,.0f} rows/s, {megabytes:5.1f} MB more   {met}", flush=True)
    print(f"bars: {ROWS_A_SECOND:,} rows/s; {MORE_MEGABYTES:.0f} MB more\n")
    for table, form in itertools.product(("emails", "events"), tracker.EXPORT_TYPES):
        took, size = site.timed(f"/{site.tenant.id}/{table}.{form}")
        print(f"{table}.{form}, {tracker.MAX_ROWS:,} rows at most: {took / 1000:.1f} s, {size:,} bytes", flush=True)


def filled(folder: Path, emails: int, events: int, postgres: Postgres | None) -> Site:
    """An application over a database of so many emails and events, which is made unless it is there, and perhaps moved."""
    if not (folder / "tracking.db").exists():
        began = time.perf_counter()
        fill.fill(folder, emails, events)
        size = os.path.getsize(folder / "tracking.db") / 1e6
        seconds = time.perf_counter() - began
        print(f"{emails:,} emails and {events:,} events: {size:,.0f} MB in {seconds:.0f} s", flush=True)
    environ = {"DATABASE_URL": f"sqlite:{folder / 'tracking.db'}"}
    if postgres is None:
        return Site(environ)
    url, began = postgres.make(), time.perf_counter()
    command = [sys.executable, str(ROOT / "tracker.py"), "--env", os.devnull, "move", url]
    subprocess.run(command, env={**os.environ, **environ}, check=True, stdout=subprocess.DEVNULL)
    print(f"moved to PostgreSQL in {time.perf_counter() - began:.0f} s", flush=True)
    return Site({"DATABASE_URL": url, "DATA_FOLDER": str(folder.absolute())})


def yes(met: bool) -> str:
    """Whether a bar is met, to be seen from afar."""
    return "yes" if met else "NO"


def main(argv: Sequence[str] | None = None) -> int:
    """Fill, measure, print."""
    parser = argparse.ArgumentParser(prog="pages.py", description=(__doc__ or "").partition(":")[0] + ".")
    add = parser.add_argument
    add("--quick", action="store_true", help=f"a trial: {QUICK[0]:,} emails, {QUICK[1]:,} events, 5 requests")
    add("--only", default="", metavar="TEXT", help="the pages whose name has this, and no export")
    add("--folder", type=Path, metavar="DIR", help="where databases are kept, to be used again (default: nowhere)")
    add("--postgresql", action="store_true", help="move the databases to a PostgreSQL, and ask that one")
    args = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-pages-"))
        postgres = stack.enter_context(running_postgres()) if args.postgresql else None
        folder = args.folder or Path(temporary)
        small = filled(folder / "small", *SMALL, postgres)
        large = filled(folder / "large", *(QUICK if args.quick else (fill.EMAILS, fill.EVENTS)), postgres)
        try:
            time_pages(
                large, small, 5 if args.quick else REQUESTS, args.only, MOST_POSTGRES_MS if postgres else MOST_MS
            )
            if not args.only:
                time_exports(large)
        finally:
            large.app.close()
            small.app.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
