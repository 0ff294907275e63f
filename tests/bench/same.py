"""Whether two versions make the same numbers of the same spool: same.py --old CHECKOUT.

Three days of mixed traffic, half of it drained late, with registrations in between, emails that move to another
campaign, deletions, declared campaigns, and all hits judged anew at the end. Compared are stats.json and whole exports,
with the verdict of each hit, and what `check` says. No session is as long as the cap, where versions may differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[2]))

import webtest

import tracker
from bench import traffic

ROOT = Path(__file__).resolve().parents[2]
TABLES = ("emails", "events", "links", "campaigns")
BATCH = 500  # lines a transaction
RANGES = ("7d", "30d", "90d", "all")
MOST_SHOWN = 10  # differences of a table


def fill(folder: Path, hits: int) -> None:
    """Make a database of all that, with the tracker that this process has."""
    place = traffic.Place(folder, "Europe/Rome")
    tenant = traffic.DASHBOARD_ID
    # Over HTTP, which is the same in all versions, as are the few functions that traffic.py calls.
    app = tracker.App(tracker.load_settings({"DATABASE_URL": f"sqlite:{place.database.path}"}, os.devnull))
    web = webtest.TestApp(tracker.wsgi(app))
    for number, step in enumerate(traffic.days(hits)):
        place.register(step.emails)
        for worker in (0, 1):  # the second of which was never drained before
            place.spool(step.lines[worker::2])
            place.drain(len(step.lines[worker::2]), batch=BATCH)
        emails = len(step.emails)
        changes = []
        for n in range(0, emails, 11):
            delivered_at = traffic.BEGIN + n % 9 * traffic.HOUR if n % 3 else None
            said: dict[str, Any] = {
                "campaign": f"Campaign {n * 7 % 23}",
                "delivered_at": delivered_at,
                "links": 3 + n % 4,
            }
            changes.append(tracker.Registration(traffic.key(n), **said))
        place.register(changes)
        for n in range(5 + number, emails, 97):
            web.delete(f"/{tenant}/emails/{traffic.key(n)}")
        at = tracker.iso_time(traffic.BEGIN + number * 7 * traffic.HOUR)
        for campaign, sent in (("promo", 500 + number), ("Campaign 3", 70)):
            web.post_json(f"/{tenant}/campaigns", {"campaign": campaign, "sent": sent, "sent_at": at})
    app.close()
    place.database.close()


def told(checkout: Path, folder: Path, *words: str) -> str:
    """What a command of a version prints."""
    environ = {**os.environ, "PYTHONPATH": str(checkout), "DATABASE_URL": f"sqlite:{folder / 'tracking.db'}"}
    command = [sys.executable, "-m", "tracker", "--env", os.devnull, *words]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else f"{words[0]}: {done.stdout}{done.stderr}"


def results(checkout: Path, folder: Path, hits: int) -> dict[str, list[str]]:
    """All that a version makes of it, as rows by table."""
    command = [sys.executable, __file__, "--fill", str(folder), "--hits", str(hits)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(checkout)}, check=True)
    tenant = traffic.DASHBOARD_ID
    found: dict[str, list[str]] = {}
    for when in ("drained", "judged anew"):
        for range_ in RANGES:
            found[f"stats {range_}, {when}"] = rows_of(
                told(checkout, folder, "stats", tenant, "--json", "--range", range_)
            )
        for table in TABLES:
            found[f"{table}, {when}"] = rows_of(told(checkout, folder, "export", tenant, table, "--format", "json"))
        found[f"check, {when}"] = told(checkout, folder, "check").splitlines()
        told(checkout, folder, "rejudge")
    return found


def rows_of(text: str) -> list[str]:
    """What JSON says, a line for each value or row, so that differences can be shown."""
    try:
        value = json.loads(text)
    except ValueError:
        return text.splitlines()
    return sorted(row for row in _rows(value, "") if not row.startswith("/range/to:"))  # which is now


def _rows(value: Any, path: str) -> list[str]:
    if isinstance(value, dict) and path.count("/") < 3:
        return [row for name, part in value.items() for row in _rows(part, f"{path}/{name}")]
    if isinstance(value, list):
        return [f"{path}: {json.dumps(part, sort_keys=True)}" for part in value]
    return [f"{path}: {json.dumps(value, sort_keys=True)}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit status: 1 if anything differs."""
    parser = argparse.ArgumentParser(prog="same.py", description=(__doc__ or "").partition(":")[0] + ".")
    parser.add_argument("--old", type=Path, metavar="CHECKOUT", help="the other version")
    parser.add_argument("--hits", type=int, default=40_000, metavar="N", help="default: 40000")
    parser.add_argument("--fill", type=Path, help=argparse.SUPPRESS)  # in this process
    args = parser.parse_args(argv)
    if args.fill:
        fill(args.fill, args.hits)
        return 0
    if not args.old:
        parser.error("expected --old CHECKOUT")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        old = results(args.old.resolve(), Path(folder) / "old", args.hits)
        new = results(ROOT, Path(folder) / "new", args.hits)
    differs = False
    for name, rows in new.items():
        before, now = Counter(old[name]) - Counter(rows), Counter(rows) - Counter(old[name])
        print(f"{name}: {len(rows):,} rows, {len([*before.elements()]):,} differ")
        differs = differs or bool(before or now)
        for sign, some in (("-", before), ("+", now)):
            for row in sorted(some.elements())[:MOST_SHOWN]:
                print(f"  {sign} {row}")
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
