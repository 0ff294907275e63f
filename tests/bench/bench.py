"""Measure the tracker beside a bare hello and beside other trackers: `make bench`; --help lists the options.

Hello and we are served by the same gunicorn (two sync workers, preloaded, on a unix socket), the others as beside.py
says, all behind the same nginx, and wrk asks all of them with the same headers. What is compared is compared within
one round, so that a machine that is busy with something else spoils a round and not the ratio. Each figure stands
beside its bar, which is reported and never asserted: the status is 1 only if something could not run, a hit was lost
or `check` found a fault.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import os
import platform
import shlex
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# In front, so that `bench` is this folder.
sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import beside
from bench.servers import (
    ROOT,
    BenchError,
    Contender,
    Load,
    Measurement,
    Tracker,
    free_ports,
    gunicorn,
    nginx,
    note,
    pss_megabytes,
    run_until,
    run_wrk,
)

PYZ = ROOT / "dist" / "email-tracker.pyz"
FIRST_HITS, LATER_HITS, MILLION = 100, 10_000, 1_000_000  # when memory is weighed

BARS: dict[str, float | None] = {  # at least so many requests, and of anything else at most
    "pixel: processor, of hello's": 1.35,
    "pixel: requests/s, of hello's": 0.80,
    "pixel: p99, of hello's": 2.0,
    "signed click: requests/s, of hello's": 0.76,
    "signed click: p99, of hello's": None,
    "plain click: requests/s, of hello's": None,
    "plain click: p99, of hello's": None,
    "pixel: requests/s, of flask's": 4.0,
    "memory after the first requests, of hello's": None,
    "memory after some 10,000 hits, of hello's": 1.7,
    "memory after a million hits, of hello's": 1.5,
    "memory growth from 10,000 hits to a million": 0.10,
    "cold start, of hello's": 1.5,
    "cold start of email-tracker.pyz, of hello's": 3.0,
    "backlog under full load, in seconds": 1.0,
}


# == Phases ============================================================================================
# What is done one after the other; each gives its figures by their names.

Figures = dict[str, float]
Round = Mapping[str, Measurement]  # by the name of the load


@dataclass
class Bench:
    """Where it all happens, and how much of everything, as the command line says."""

    folder: Path
    args: argparse.Namespace
    troubles: list[str] = field(default_factory=list)

    def run(self) -> tuple[list[Round], Figures]:
        """Everything of ours, from memory to cold start."""
        bare_port, *ports = free_ports(3)
        bare = gunicorn("hello", "hello:application", self.folder, bare_port)
        us, weighed = (
            Tracker(self.folder / name, port, shlex.split(self.args.program))
            for name, port in zip(("us", "memory"), ports, strict=True)
        )
        loads = [hello(bare, us)]
        with nginx(self.folder, [bare, us.contender, weighed.contender]):
            figures = self.memory(loads[0], weighed)
            with bare.started("/"), us.contender.started(us.pixels.first):
                loads += us.register()
                rounds = self.all_rounds(loads)
                figures |= self.backlog(us)
                self.troubles += us.troubles("after the full load")
            figures |= self.cold_starts(bare, us)
            self.troubles += us.troubles("after all starts")
        for name in ("pixel", "signed click", "plain click"):
            for figure, what in (("requests/s", "rate"), ("p99", "p99_ms")):
                ratios = [getattr(each[name], what) / getattr(each["hello"], what) for each in rounds]
                figures[f"{name}: {figure}, of hello's"] = statistics.median(ratios)
        return rounds, figures

    def beside(self) -> tuple[list[beside.Entry], dict[str, Figures]]:
        """Others and us; the entries, and the medians of the rounds by their names."""
        folder = self.folder / "others"
        folder.mkdir()
        bare_port, port, *ports = free_ports(2 + len(beside.RIVALS))
        bare = gunicorn("hello", "hello:application", folder, bare_port)
        us = Tracker(folder / "us", port, shlex.split(self.args.program))
        every = beside.entries(folder, ports, hello(bare, us), us)
        with nginx(folder, [each.load.contender for each in every]) as proxy:
            with us.contender.started(us.pixels.first):
                us.register()
            medians = beside.all_turns(every, self.args.rounds, self.args.others, proxy)
        kept = sum(file.stat().st_size for file in (us.folder / "data" / "spool" / "kept").rglob("*") if file.is_file())
        every[1].settings += f"; and {kept / every[1].hits():.0f} bytes a hit in spool/kept for three days"
        if lost := medians["us"]["lost"]:
            self.troubles.append(f"a kill cost {lost:.2f} % of the hits that were answered just before")
        return every, medians

    def memory(self, hello: Load, us: Tracker) -> Figures:
        """Hello and us, one after the other: what processes share is divided among all that run."""
        weights: list[list[float]] = []
        for load in (hello, us.pixels):
            note(f"memory: {load.name}")
            with load.contender.started(load.first) as pid:
                if load is us.pixels:
                    us.register()
                for _ in range(FIRST_HITS):
                    load.probe()
                found = [pss_megabytes(pid)]
                for hits in (LATER_HITS, *([MILLION] if self.args.million and load is us.pixels else [])):
                    run_until(load, hits - load.contender.answered)
                    found.append(pss_megabytes(pid))
            note("memory: " + ", ".join(f"{megabytes:.1f} MB" for megabytes in found))
            weights.append(found)
        self.troubles += us.troubles("after the hits for memory")
        (first, later), (our_first, our_later, *most) = weights
        figures = {
            "memory after the first requests, of hello's": our_first / first,
            "memory after some 10,000 hits, of hello's": our_later / later,
        }
        if most:
            figures["memory after a million hits, of hello's"] = most[0] / later
            figures["memory growth from 10,000 hits to a million"] = most[0] / our_later - 1
        return figures

    def all_rounds(self, loads: Sequence[Load]) -> list[Round]:
        """All loads in turn, so many rounds, after one that warms up."""
        for load in loads:
            load.probe()
            run_wrk(load, 1.0)
        rounds: list[Round] = []
        for number in range(self.args.rounds):
            rounds.append({load.name: run_wrk(load, self.args.seconds) for load in loads})
            shown = ", ".join(f"{name} {measured.rate:,.0f}" for name, measured in rounds[-1].items())
            note(f"round {number + 1} of {self.args.rounds}, good answers a second: {shown}")
        return rounds

    def backlog(self, us: Tracker) -> Figures:
        """A longer full load: the most that waited during it and right after it, in seconds of the rate reached."""
        note(f"backlog: {self.args.minute:g} s of pixels")
        waiting: list[int] = []
        measured = run_wrk(us.pixels, self.args.minute, lambda: waiting.append(us.waiting()))
        waiting.append(us.waiting())
        note(f"backlog: at {measured.rate:,.0f} hits a second about {max(waiting):,} waited at most")
        return {"backlog under full load, in seconds": max(waiting) / measured.rate}

    def cold_starts(self, bare: Contender, us: Tracker) -> Figures:
        """From starting a server to its first answer, in turn, with a database that is there already."""
        note(f"cold start: {self.args.starts} times")
        commands = {"hello": bare.command, "us": us.contender.command}
        if PYZ.exists():
            commands["pyz"] = [sys.executable, "-I", str(PYZ), "--env", os.devnull, "serve"]
        found: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(self.args.starts + 1):
            for name, command in commands.items():
                contender = bare if name == "hello" else us.contender
                contender.command = command
                began = time.perf_counter()
                with contender.started(us.pixels.first):
                    found[name].append(time.perf_counter() - began)
        # The first brings files into memory.
        medians = {name: statistics.median(seconds[1:]) for name, seconds in found.items()}
        note(", ".join(f"{name} {seconds * 1000:.0f} ms" for name, seconds in medians.items()))
        names = {"us": "cold start, of hello's", "pyz": "cold start of email-tracker.pyz, of hello's"}
        return {names[name]: seconds / medians["hello"] for name, seconds in medians.items() if name in names}


def hello(bare: Contender, us: Tracker) -> Load:
    """What we are asked for pixels, byte for byte but for the port."""
    return Load("hello", bare, us.pixels.paths, ("Content-Type", "text/plain; charset=utf-8"))


# == Report ============================================================================================


def machine(folder: Path) -> str:
    """On what it ran; on tmpfs a commit costs nothing."""
    disk = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True).stdout.strip()
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = models[0].partition(":")[2].strip() if models else platform.machine()
    return (
        f"{model}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.2f}, kernel {platform.release()}, "
        f"{disk}, Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    )


def print_report(rounds: Sequence[Round], figures: Figures) -> None:
    """The rounds, then each figure beside its bar."""
    print(f"\n{'median of the rounds':22}{'good/s':>10}{'p50 ms':>10}{'p99 ms':>10}{'errors':>10}")
    for name in rounds[0]:
        mine = [each[name] for each in rounds]
        rate, p50, p99 = (statistics.median(getattr(it, what) for it in mine) for what in ("rate", "p50_ms", "p99_ms"))
        print(f"{name:22}{rate:10,.0f}{p50:10.2f}{p99:10.2f}{sum(it.bad + it.broken for it in mine):10,}")
    print(f"\n{'figure':50}{'value':>10}{'bar':>12}   met")
    for name, bar in BARS.items():
        value = figures.get(name)
        sign = ">=" if "requests/s" in name else "<="
        met = "-"
        if bar and value is not None:
            met = "yes" if value == bar or (value > bar) == (sign == ">=") else "NO"
        shown_bar = f"{sign} {bar:.2f}" if bar else "-"
        print(f"{name:50}{'-' if value is None else f'{value:.2f}':>10}{shown_bar:>12}   {met}")


def bench(args: argparse.Namespace) -> int:
    """Measure and report; the exit status."""
    if importlib.util.find_spec("gunicorn") is None:
        raise BenchError("this Python has no gunicorn: use make bench")
    if args.quick:
        args.rounds, args.seconds, args.minute, args.starts = 1, 1, 3, 2
    with tempfile.TemporaryDirectory(prefix="bench-", dir=args.folder, ignore_cleanup_errors=True) as folder:
        made = Bench(Path(folder).resolve(), args)
        told = machine(made.folder)
        print(told, flush=True)
        rounds, figures = made.run() if args.only != "others" else ([], {})
        every, medians = made.beside() if args.only != "us" else ([], {})
    if medians:
        figures["pixel: processor, of hello's"] = medians["us"]["cpu_of_hello"]
    if "flask" in medians:
        figures["pixel: requests/s, of flask's"] = medians["flask"]["us_of_it"]
    if rounds:
        print_report(rounds, figures)
    if every:
        beside.tell(every, medians, f"{time.strftime('%Y-%m-%d')}, {told}", args)
    for trouble in made.troubles:
        print(f"\nTROUBLE: {trouble}")
    return 1 if made.troubles else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit status: 0, or 1 if something could not run, a hit was lost or `check` found a fault."""
    parser = argparse.ArgumentParser(prog="bench.py", description=(__doc__ or "").partition(":")[0] + ".")
    add = parser.add_argument
    add("--rounds", type=int, default=5, metavar="N", help="rounds, each with every load (default: 5)")
    add("--seconds", type=int, default=5, metavar="S", help="seconds of each load in a round (default: 5)")
    add("--minute", type=int, default=60, metavar="S", help="seconds of the longer full load (default: 60)")
    add("--starts", type=int, default=5, metavar="N", help="cold starts of each (default: 5)")
    add("--others", type=int, default=2, metavar="S", help="seconds of each of the others in a round (default: 2)")
    add("--only", choices=("us", "others"), help="measure us beside hello alone, or all beside each other alone")
    add("--json", type=Path, metavar="FILE", help="write what others and we cost")
    add("--svg", type=Path, metavar="FILE", help="draw it")
    add("--million", action="store_true", help="weigh the tracker after a million hits too; takes minutes")
    add("--quick", action="store_true", help="a trial: 1 round of 1 s, 3 s of full load, 2 starts")
    program = f"{sys.executable} -m tracker"
    add("--program", default=program, metavar="COMMAND", help="how the tracker is run, from the project's folder")
    add("--folder", type=Path, metavar="DIR", help="where databases are laid meanwhile (default: as Python's tempfile)")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does, with everything it started
    try:
        return bench(args)
    except (BenchError, OSError, subprocess.SubprocessError, http.client.HTTPException) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench.py: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
