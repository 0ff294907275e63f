"""What PostgreSQL costs: the drain, beside the least that gunicorn can serve, on loopback and over slower ways.

The bars: 1.7 hits drained for each request that hello answers; over a way of 2 ms, 0.6 of that. What a drain of one batch
runs is counted: four or five statements and round trips of these only read what there is to drain. PostgreSQL is started and
tuned as for tests, and is on the same cores. For pages see pages.py.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import Postgres, running_postgres
from ways import Way, on_way

from bench import traffic
from bench.servers import Load, free_ports, gunicorn, nginx, run_wrk, write_paths

HITS = 60_000
MORE_THAN_HELLO, AT_2_MS = 1.7, 0.6
BATCHES = (200, 2_000, 20_000)
WAYS = (None, 0.0, 2.0, 10.0, 50.0)  # milliseconds of a round trip; None without a proxy


def hello_rate(folder: Path, seconds: float) -> float:
    """Requests that hello answers in a second, behind nginx."""
    [port] = free_ports(1)
    bare = gunicorn("hello", "hello:application", folder, port)
    load = Load("hello", bare, write_paths(folder, "hello", ["/"]), ("Content-Type", "text/plain; charset=utf-8"))
    with nginx(folder, [bare]), bare.started("/"):
        return run_wrk(load, seconds).rate


def over(way: Way, url: str) -> str:
    """The URL of a database, over a way."""
    name = url.partition("?")[0].rpartition("/")[2]
    return f"postgresql://postgres@127.0.0.1:{way.port}/{name}?sslmode=disable"


def counted(folder: Path, postgres: Postgres, hits: int) -> tuple[int, int]:
    """Statements and round trips of a drain of so many hits, all in one batch, in emails that have as many already."""
    with on_way(Path(postgres.folder) / ".s.PGSQL.5432") as way:
        place = traffic.Place(folder / "data", url=over(way, postgres.make()))
        [step] = traffic.opens(2 * hits)
        place.register(step.emails)
        for lines in (step.lines[::2], step.lines[1::2]):
            statements, trips = way.statements, way.trips
            place.spool(lines)
            place.drain(hits, batch=8 * hits, seconds=math.inf)
        place.database.close()
        return way.statements - statements, way.trips - trips


def drain_rate(folder: Path, postgres: Postgres, milliseconds: float | None, hits: int) -> float:
    """Hits drained in a second over a way of so many milliseconds; the way is a process of its own."""
    url = postgres.make()
    way = Way(Path(postgres.folder) / ".s.PGSQL.5432")
    way.delay = (milliseconds or 0) / 2000
    process = multiprocessing.get_context("fork").Process(target=way.serve, daemon=True)
    process.start()
    try:
        place = traffic.Place(folder / "data", url=url if milliseconds is None else over(way, url))
        [step] = traffic.opens(hits)
        place.register(step.emails)
        place.spool(step.lines)
        began = time.perf_counter()
        place.drain(hits)
        took = time.perf_counter() - began
        place.database.close()
    finally:
        process.kill()
        process.join()
        way.listener.close()
    return hits / took


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="postgres.py", description=(__doc__ or "").partition(",")[0] + ".")
    parser.add_argument("--quick", action="store_true", help="a trial")
    args = parser.parse_args(argv)
    hits, seconds = (10_000, 2.0) if args.quick else (HITS, 6.0)
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary, running_postgres() as postgres:
        folder = Path(temporary)
        for batch in BATCHES:
            print(
                "{:,} hits in a batch: {} statements, {} round trips".format(batch, *counted(folder, postgres, batch))
            )
        hello = hello_rate(folder, seconds)
        print(f"hello answers {hello:,.0f} requests a second, {os.cpu_count()} cores", flush=True)
        rates: dict[float | None, float] = {}
        for way in WAYS:
            rate = rates[way] = drain_rate(folder, postgres, way, hits)
            where = "on loopback" if way is None else f"over a way of {way:.0f} ms"
            print(f"{where:22}{rate:9,.0f} hits/s, {rate / hello:.2f} x hello, {rate / rates[None]:.2f} of loopback")
    print(f"bars: {MORE_THAN_HELLO} x hello on loopback; {AT_2_MS} of loopback at 2 ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
