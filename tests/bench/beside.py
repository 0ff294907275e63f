"""What a hit costs us, beside trackers that use what PyPI and npm offer, each written after its README.

All stand behind the same nginx and are asked with the same headers, one after the other within each round: started,
weighed, warmed up, loaded until nothing waits to be counted, loaded again and killed meanwhile. The figure that decides is the
processor's time for a hit, of all processes of the server, because rates say how much of it was left over for them.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import hmac
import importlib.util
import json
import os
import shutil
import signal
import sqlite3
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.servers import (
    DRAIN_SECONDS,
    HERE,
    KEYS,
    WORKERS,
    BenchError,
    Contender,
    Load,
    Tracker,
    gunicorn,
    note,
    plain_environ,
    processor_seconds,
    pss_megabytes,
    run_wrk,
    write_paths,
)

MODULES = Path(sys.prefix) / "node" / "node_modules"  # where `make bench` installs what npm offers
SECRET = "of the benchmark"
PROBES = 20  # so that each worker has answered some before memory is weighed and time taken
KILL_SECONDS = 1  # of load, in the middle of which it is killed
GUNICORN = f"gunicorn, {WORKERS} sync workers"
COLUMNS = {  # of the table: what a figure is called there, and how it is shown
    "cpu_us": ("us/hit", "{:.0f}"),
    "nginx_us": ("nginx", "{:.0f}"),
    "cpu_of_hello": ("of hello", "{:.2f}"),
    "rate_of_hello": ("rate, of h.", "{:.2f}"),
    "p50_ms": ("p50 ms", "{:.1f}"),
    "p99_ms": ("p99 ms", "{:.1f}"),
    "idle_mb": ("MB idle", "{:.0f}"),
    "after_mb": ("MB after", "{:.0f}"),
    "start_ms": ("start ms", "{:.0f}"),
    "bytes": ("bytes/hit", "{:.0f}"),
    "lost": ("lost, %", "{:.2f}"),
    "errors": ("errors", "{:.0f}"),
}
Figures = dict[str, float]


# == Entries ===========================================================================================


@dataclass
class Entry:
    """One that is compared: how it is asked, where its hits go, and with which settings it runs."""

    load: Load
    settings: str
    database: Path | None = None
    tracker: Tracker | None = None  # ours

    @property
    def name(self) -> str:
        return self.load.contender.name

    def hits(self) -> int:
        """How many are stored; the server does not run."""
        if self.tracker:
            self.tracker.command("drain")
            stats = json.loads(self.tracker.command("stats", self.tracker.mail_id, "--range", "all", "--json"))
            return sum(sum(each["hits"].values()) for each in stats["activity"].values())
        if not self.database or not self.database.exists():
            return 0
        with contextlib.closing(sqlite3.connect(self.database)) as connection:
            connection.execute("pragma wal_checkpoint(truncate)")
            return int(connection.execute("select count(*) from events").fetchone()[0])

    def bytes(self) -> int:
        """Of the database and what lies beside it."""
        found = self.database.parent.glob(f"{self.database.name}*") if self.database else []
        return sum(file.stat().st_size for file in found)

    def drained(self) -> None:
        """Wait until every hit is in the database; all but us store before they answer."""
        deadline = time.monotonic() + DRAIN_SECONDS
        while self.tracker and self.tracker.waiting():
            if time.monotonic() > deadline:
                raise BenchError(f"hits still wait after {DRAIN_SECONDS:g} s")
            time.sleep(0.2)


def entries(folder: Path, ports: Sequence[int], hello: Load, tracker: Tracker) -> list[Entry]:
    """All that can run here; who can't is named."""
    every = [
        Entry(hello, f"{GUNICORN}; stores nothing"),
        Entry(tracker.pixels, GUNICORN, tracker.folder / "data" / "tracking.db", tracker),
    ]
    for (name, make), port in zip(RIVALS.items(), ports, strict=True):
        try:
            every.append(make(name, folder, port))
        except BenchError as error:
            note(f"without {name}: {error}")
    return every


# == Rivals ============================================================================================


def in_python(module: str, name: str, folder: Path, port: int, command: Sequence[str] = ()) -> Contender:
    """A peer of this folder, under gunicorn or what the command says."""
    if importlib.util.find_spec(module) is None:
        raise BenchError(f"this Python has no {module}")
    database = {"BENCH_DATABASE": folder / f"{name}.db"}
    made = gunicorn(name, f"{name}_peer:application", folder, port, **database)
    if command:
        made.command = [*command, "--uds", str(made.socket), f"{name}_peer:application"]
    return made


def in_node(peer: str, name: str, folder: Path, port: int) -> Contender:
    """A peer of this folder under node."""
    node = shutil.which("node")
    if node is None or not (MODULES / name).is_dir() or not (MODULES / "better-sqlite3" / "build").is_dir():
        raise BenchError("node or what npm installs is missing")
    socket = folder / f"{name}.sock"
    environ = plain_environ(
        NODE_ENV="production",
        NODE_PATH=MODULES,
        BENCH_DATABASE=folder / f"{name}.db",
        BENCH_SECRET=SECRET,
        BENCH_SOCKET=socket,
        BENCH_WORKERS=WORKERS,
    )
    return Contender(name, [node, str(HERE / f"{peer}_peer.js")], environ, socket, port)


def entry(contender: Contender, paths: Sequence[str], content_type: str, settings: str) -> Entry:
    """What every rival has in common."""
    folder = contender.socket.parent
    load = Load(contender.name, contender, write_paths(folder, contender.name, paths), ("Content-Type", content_type))
    return Entry(load, settings, folder / f"{contender.name}.db")


def flask(name: str, folder: Path, port: int) -> Entry:
    made = in_python("flask", name, folder, port)
    return entry(made, [f"/pixel/{key}.gif" for key in KEYS], "image/gif", f"{GUNICORN}; sqlite3, default journal")


def fastapi(name: str, folder: Path, port: int) -> Entry:
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(HERE), "--workers", str(WORKERS), "--no-access-log"]
    made = in_python("fastapi", name, folder, port, command)
    settings = f"uvicorn, {WORKERS} workers, uvloop, httptools; aiosqlite, default journal"
    return entry(made, [f"/pixel/{key}.gif" for key in KEYS], "image/gif", settings)


def pytracking(name: str, folder: Path, port: int) -> Entry:
    made = in_python("pytracking", name, folder, port)
    data = [json.dumps({"metadata": {"email": key}}).encode() for key in KEYS]
    paths = [f"/open/{base64.urlsafe_b64encode(some).decode()}/" for some in data]
    return entry(made, paths, "image/png", f"{GUNICORN}; its view for Django, sqlite3, default journal")


def express(name: str, folder: Path, port: int) -> Entry:
    made = in_node("express", name, folder, port)
    settings = f"node, cluster of {WORKERS}, production; better-sqlite3, WAL"
    return entry(made, [f"/pixel/{key}.gif" for key in KEYS], "image/gif", settings)


def nodemailer(name: str, folder: Path, port: int) -> Entry:
    made = in_node("nodemailer", name, folder, port)
    settings = f"express in node, cluster of {WORKERS}, production; better-sqlite3, WAL"
    paths = [f"/mail-track/blank-image/{token(key)}" for key in KEYS]
    return entry(made, paths, "image/svg+xml; charset=utf-8", settings)


def token(key: str) -> str:
    """What nodemailer-mail-tracking signs for a recipient: a JSON web token that is good for a year (RFC 7519)."""
    now = int(time.time())
    claims = {"recipient": f"{key}@example.org", "iat": now, "exp": now + 365 * 86400}
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, claims)]
    signed = b".".join(part.rstrip(b"=") for part in parts)
    seal = base64.urlsafe_b64encode(hmac.digest(SECRET.encode(), signed, hashlib.sha256)).rstrip(b"=")
    return f"{signed.decode()}.{seal.decode()}"


RIVALS: dict[str, Callable[[str, Path, int], Entry]] = {
    "flask": flask,
    "fastapi": fastapi,
    "express": express,
    "pytracking": pytracking,
    "nodemailer-mail-tracking": nodemailer,
}


# == Measuring =========================================================================================


def turn(each: Entry, seconds: float, proxy: int) -> Figures:
    """One entry's part of a round, behind a proxy with that id."""
    load, contender = each.load, each.load.contender
    bytes_before, hits_before, answered_before = each.bytes(), each.hits(), contender.answered
    began = time.perf_counter()
    with contender.started(load.first) as pid:
        start = time.perf_counter() - began
        for _ in range(PROBES):
            load.probe()
        each.drained()
        idle = pss_megabytes(pid)
        run_wrk(load, seconds)  # node, for one, compiles meanwhile what it is asked for most
        each.drained()
        before = [processor_seconds(one) for one in (pid, proxy)]
        measured = run_wrk(load, seconds)
        each.drained()
        spent, passing = (processor_seconds(one) - some for one, some in zip((pid, proxy), before, strict=True))
        after = pss_megabytes(pid)
        # All its processes, which have a session of their own. What nginx answers then is an error, no hit.
        killer = threading.Timer(KILL_SECONDS / 2, os.killpg, (pid, signal.SIGKILL))
        killer.start()
        killed = run_wrk(load, KILL_SECONDS, least=0)
        killer.join()
    answered, stored = contender.answered - answered_before, each.hits() - hits_before
    return {
        "cpu_us": spent / measured.good * 1e6,
        "nginx_us": passing / measured.good * 1e6,
        "rate": measured.rate,
        "p50_ms": measured.p50_ms,
        "p99_ms": measured.p99_ms,
        "idle_mb": idle,
        "after_mb": after,
        "start_ms": start * 1000,
        "bytes": (each.bytes() - bytes_before) / max(stored, 1),
        "lost": max(0, answered - stored) / max(killed.good, 1) * 100 if each.database else 0.0,
        "errors": measured.bad + measured.broken,
    }


def all_turns(every: Sequence[Entry], rounds: int, seconds: float, proxy: int) -> dict[str, Figures]:
    """The medians of the rounds, by name; what is told beside hello is compared within each round."""
    found: dict[str, list[Figures]] = {each.name: [] for each in every}
    for number in range(rounds):
        for each in every:
            figures = turn(each, seconds, proxy)
            hello, us = (found[name][number] if found[name][number:] else figures for name in ("hello", "us"))
            figures["cpu_of_hello"] = figures["cpu_us"] / hello["cpu_us"]
            figures["rate_of_hello"] = figures["rate"] / hello["rate"]
            figures["us_of_it"] = us["rate"] / figures["rate"]
            found[each.name].append(figures)
        shown = ", ".join(f"{name} {some[-1]['cpu_us']:.0f}" for name, some in found.items())
        note(f"beside others, round {number + 1} of {rounds}, us of the processor for a hit: {shown}")
    return {
        name: {what: statistics.median(it[what] for it in some) for what in some[0]} for name, some in found.items()
    }


# == Telling ===========================================================================================


def print_table(every: Sequence[Entry], medians: Mapping[str, Figures]) -> None:
    """The figures, then with which settings each ran."""
    width = max(map(len, medians))
    print(f"\n{'a pixel, medians':{width}}" + "".join(f"{title:>12}" for title, _ in COLUMNS.values()))
    for name, figures in medians.items():
        print(f"{name:{width}}" + "".join(f"{form.format(figures[what]):>12}" for what, (_, form) in COLUMNS.items()))
    print(
        "us/hit: processor of all processes of the server until nothing waits; nginx: of the proxy, beside that;\n"
        "of hello, rate, of h.: beside hello's; MB: proportional set size; bytes/hit: of the database;\n"
        "lost: of the hits that were answered while the server was killed"
    )
    for each in every:
        print(f"{each.name:{width}}  {each.settings}")


SVG_STYLE = """text{font:14px sans-serif;fill:#1f2328}.bar{fill:#8c959f}.us{fill:#0969da}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.bar{fill:#6e7681}.us{fill:#4493f8}}"""


def svg(medians: Mapping[str, Figures], told: str) -> str:
    """A picture with a bar for each, readable on light and on dark; it has no background."""
    longest = max(figures["cpu_us"] for figures in medians.values())
    rows = []
    for number, (name, figures) in enumerate(sorted(medians.items(), key=lambda item: item[1]["cpu_us"])):
        y, width = 36 + 26 * number, 480 * figures["cpu_us"] / longest
        shown = "bare gunicorn, stores nothing" if name == "hello" else "email tracker" if name == "us" else name
        rows.append(
            f'<text x="215" y="{y + 14}" text-anchor="end">{shown}</text>'
            f'<rect class="{"us" if name == "us" else "bar"}" x="225" y="{y}" width="{width:.0f}" height="18" rx="2"/>'
            f'<text x="{231 + width:.0f}" y="{y + 14}">{figures["cpu_us"]:.0f}</text>'
        )
    height = 42 + 26 * len(rows) + 16
    below = f"{', '.join(told.split(', ')[:3])}, all behind the same nginx; `make bench` prints each one's settings"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" width="760" height="{height}" role="img">\n'
        f"<title>Microseconds of the processor for a stored open</title>\n<style>{SVG_STYLE}</style>\n"
        f'<text x="0" y="18" font-weight="bold">Microseconds of the processor for an open, answered and stored</text>\n'
        + "\n".join(rows)
        + f'\n<text x="0" y="{height - 6}" style="font-size:11px">{below}</text>\n</svg>\n'
    )


def tell(every: Sequence[Entry], medians: Mapping[str, Figures], told: str, args: argparse.Namespace) -> None:
    """The table, and the files that were asked for."""
    print_table(every, medians)
    if args.json:
        named = {each.name: {"settings": each.settings, **medians[each.name]} for each in every}
        args.json.write_text(json.dumps({"on": told, "medians": named}, indent=2) + "\n")
    if args.svg:
        args.svg.write_text(svg(medians, told))
