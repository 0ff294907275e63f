"""How much processor time draining and registering take, beside another version: drain.py --old CHECKOUT.

Each version has a process of its own, and they take turns; the ratio is the median of the pairs'. What a workload is
stands in traffic.py. Without --old this version runs alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

# In front, so that `bench` is this folder; behind, so that `tracker` is the one that PYTHONPATH names, or else this.
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[2]))

from bench import traffic

ROOT = Path(__file__).resolve().parents[2]
WORKLOADS = {  # what is made of so many hits or emails, and whether registering is what is measured
    "opens": (traffic.opens, 100_000, False),
    "mixed days": (traffic.days, 60_000, False),
    "worst client": (traffic.worst, 2_000, False),
    "new emails": (traffic.new_emails, 100_000, True),
}


def measure(name: str, scale: float, folder: Path) -> float:
    """Microseconds of the processor for each hit or email, with the tracker that this process has."""
    make, count, of_registering = WORKLOADS[name]
    work = make(max(int(count * scale), 100))
    seconds = traffic.Place(folder / "data").run(work)
    many = sum(len(step.emails) if of_registering else len(step.lines) * step.timed for step in work)
    return seconds[0 if of_registering else 1] / many * 1e6


def measured(checkout: Path, name: str, scale: float) -> float:
    """The same in a process of its own, with the tracker of a checkout."""
    command = [sys.executable, __file__, "--only", name, "--scale", str(scale), "--here"]
    environ = {**os.environ, "PYTHONPATH": str(checkout)}
    return float(json.loads(subprocess.run(command, env=environ, check=True, stdout=subprocess.PIPE).stdout))


def compare(name: str, scale: float, pairs: int, old: Path | None) -> str:
    """A line of the report."""
    before: list[float] = []
    now: list[float] = []
    ratios: list[float] = []
    for number in range(pairs):
        # Who goes first changes, since a machine may slow down as it gets warm.
        for checkout in sorted(filter(None, (old, ROOT)), reverse=bool(number % 2)):
            (before if checkout == old else now).append(measured(checkout, name, scale))
        if old:
            ratios.append(now[-1] / before[-1])
    alone = f"{name:14}{statistics.median(now):10.1f} us"
    if not old:
        return alone
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return f"{alone}, old {statistics.median(before):8.1f} us, ratio {statistics.median(ratios):.2f} ({spread})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit status."""
    parser = argparse.ArgumentParser(prog="drain.py", description=(__doc__ or "").partition(":")[0] + ".")
    parser.add_argument("--old", type=Path, metavar="CHECKOUT", help="another version, to compare with")
    parser.add_argument("--pairs", type=int, default=9, metavar="N", help="how often each runs (default: 9)")
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="more hits, or fewer (default: 1.0)")
    parser.add_argument("--only", choices=WORKLOADS, metavar="NAME", help=f"one of: {', '.join(WORKLOADS)}")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in this process
    args = parser.parse_args(argv)
    for name in [args.only] if args.only else WORKLOADS:
        if args.here:
            with tempfile.TemporaryDirectory(prefix="bench-") as folder:
                print(measure(name, args.scale, Path(folder)))
        else:
            print(compare(name, args.scale, args.pairs, args.old and args.old.resolve()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
