"""What the drain runs: functions for one registered open, and SQL statements for a batch, which must not grow.

The version is that of PYTHONPATH, or else this one.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[2]))

import tracker
from bench import traffic

MOST_FUNCTIONS, MOST_DEPTH = 40, 8
BATCHES = (200, 2_000, 20_000)


def calls_of(place: traffic.Place, email: int) -> dict[str, int]:
    """The functions of tracker.py that drain one open of a registered email, and how deep below drain() each is."""
    asked = traffic.Asked(traffic.READERS[0], "198.51.100.7")
    place.spool([traffic.Writer(email).line(traffic.BEGIN, email, asked)])
    depths: dict[str, int] = {}
    stack: list[FrameType] = []

    def called(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if code.co_filename != tracker.__file__ or code.co_name.startswith("<"):  # a comprehension, a lambda
            return
        if event == "call":
            name = f"{code.co_name} (line {code.co_firstlineno})"
            depths[name] = max(len(stack), depths.get(name, 0))
            stack.append(frame)
        elif event == "return" and stack and stack[-1] is frame:
            stack.pop()

    sys.setprofile(called)
    tracker.drain(place.database)
    sys.setprofile(None)
    return depths


def statements_of(place: traffic.Place, first: int, count: int) -> int:
    """Record so many opens of as many registered emails in one transaction.

    Calls are counted, since SQLite's trace tells the one call that writes many rows from many calls by nothing.
    """
    writer = traffic.Writer(count)
    lines = [
        writer.line(traffic.BEGIN + n, n, traffic.Asked(writer.chance.choice(traffic.READERS), writer.address()))
        for n in range(first, first + count)
    ]
    statements = 0

    def called(_: FrameType, event: str, function: Any) -> None:
        nonlocal statements
        if event == "c_call" and function.__name__ in ("execute", "executemany"):
            statements += 1

    with place.database.transaction() as connection:
        sys.setprofile(called)
        tracker.record_lines(connection, [tracker.parse_line(line) for line in lines], traffic.BEGIN)
        sys.setprofile(None)
    return statements


def main() -> int:
    """Measure and print."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        place = traffic.Place(Path(folder) / "data")
        place.register(traffic.registrations(BATCHES[0] + sum(BATCHES)))
        for email, when in enumerate(("the first in a process", "one after it")):
            depths = calls_of(place, email)
            print(
                f"an open, {when}: {len(depths)} functions (asked: {MOST_FUNCTIONS}),"
                f" up to {max(depths.values())} below drain() (asked: {MOST_DEPTH})"
            )
        statements_of(place, 0, BATCHES[0])  # all programs are new to the database, just once
        first = BATCHES[0]
        for count in BATCHES:
            print(f"a batch of {count:,} hits: {statements_of(place, first, count)} SQL calls")
            first += count
    return 0


if __name__ == "__main__":
    sys.exit(main())
