"""Measure the tracker beside a bare hello and beside a small Flask tracker: `make bench`; --help lists the options.

All are served by the same gunicorn (two sync workers, preloaded, on a unix socket) behind the same nginx, and wrk asks
all of them with the same headers. What is compared is compared within one round, so that a machine that is busy with
something else spoils a round and not the ratio. Each figure stands beside its bar, which is reported and never
asserted: the status is 1 only if something could not run, a hit was lost or `check` found a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import importlib.util
import json
import os
import platform
import pwd
import shlex
import shutil
import signal
import socket
import sqlite3
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PYZ = ROOT / "dist" / "email-tracker.pyz"

WORKERS = 2
CONNECTIONS = 32
KEYS = [hashlib.sha256(str(number).encode()).hexdigest()[:22] for number in range(5_000)]  # as long as the tracker's
TARGET = "https://acme.com/sale?a=1&b=2"
WAIT_SECONDS = 30.0  # for a server to answer first, or to end by itself
REQUEST_SECONDS = 10.0
COMMAND_SECONDS = 900.0  # `check` recounts every event
DRAIN_SECONDS = 120.0  # for what waits after a load
FIRST_HITS, LATER_HITS, MILLION = 100, 10_000, 1_000_000  # when memory is weighed

BARS: dict[str, float | None] = {  # at least so many requests, and of anything else at most
    "pixel: requests/s, of hello's": 0.78,
    "pixel: p99, of hello's": 3.0,
    "signed click: requests/s, of hello's": 0.75,
    "signed click: p99, of hello's": None,
    "plain click: requests/s, of hello's": None,
    "plain click: p99, of hello's": None,
    "pixel: requests/s, of flask's": 4.0,
    "memory after the first requests, of hello's": None,
    "memory after some 10,000 hits, of hello's": 1.7,
    "memory after a million hits, of hello's": None,
    "memory growth from 10,000 hits to a million": 0.10,
    "cold start, of hello's": 2.0,
    "cold start of email-tracker.pyz, of hello's": 3.0,
    "backlog under full load, in seconds": 1.0,
}


class BenchError(Exception):
    """The benchmark can't go on; the text is a sentence that says why. Any function here may raise it."""


def note(text: str) -> None:
    """Say how far it is."""
    print(text, file=sys.stderr, flush=True)


# == Processes =========================================================================================
# Start, weigh and end them. Only what was started here is ever ended, by its own id.


def plain_environ(**more: object) -> dict[str, str]:
    """No setting of the user's own may change what is measured."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
    return kept | {name: str(value) for name, value in more.items()}


@contextlib.contextmanager
def running(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process for as long as the block runs, in a session of its own, so that Ctrl-C reaches it through us only."""
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True, **options)
    try:
        yield process
    finally:
        try:
            process.terminate()
            process.communicate(timeout=WAIT_SECONDS)
        finally:
            # If it is not reaped yet, its id still names its own session.
            if process.returncode is None:
                note(f"process {process.pid} did not end within {WAIT_SECONDS:g} s, and is killed")
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextlib.contextmanager
def serving(name: str, command: Sequence[str], environ: Mapping[str, str], log: Path, address: Any) -> Iterator[int]:
    """A server that listens at an address; gives the id of its first process."""
    with log.open("ab") as out, running(command, env=environ, stdout=out, stderr=out) as process:
        deadline = time.monotonic() + WAIT_SECONDS
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        while True:
            with socket.socket(family) as client, contextlib.suppress(OSError):
                client.connect(address)
                break
            if process.poll() is not None or time.monotonic() > deadline:
                words = log.read_text(errors="replace").strip().splitlines()[-5:]
                raise BenchError(f"{name} does not listen: {' | '.join(words) or '(its log is empty)'}")
            time.sleep(0.005)
        yield process.pid


def run(command: Sequence[str], environ: Mapping[str, str]) -> str:
    """What a command of ours prints, also where the status is 1."""
    with running(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = (text.decode() for text in process.communicate(timeout=COMMAND_SECONDS))
    if process.returncode > 1 or (process.returncode and not out):
        raise BenchError(f"{shlex.join(command)} ended with {process.returncode}: {err.strip()}")
    return out


def pss_megabytes(pid: int) -> float:
    """The proportional set size of a process and all that descend from it."""
    words = Path(f"/proc/{pid}/smaps_rollup").read_text().split()
    children = [child for tasks in Path(f"/proc/{pid}/task").glob("*/children") for child in tasks.read_text().split()]
    return int(words[words.index("Pss:") + 1]) * 1024 / 1e6 + sum(pss_megabytes(int(child)) for child in children)


# == Contenders ========================================================================================
# What is compared, all of it started and asked in one way.


class Measurement(NamedTuple):
    """One run of wrk, as load.lua prints it."""

    requests: int  # answered, whatever the status
    seconds: float
    bad: int  # answers with a status from 400 on
    broken: int  # connections that failed, and answers that came too late
    p50_ms: float
    p99_ms: float

    @property
    def good(self) -> int:
        return self.requests - self.bad

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return self.good / self.seconds


@dataclass
class Contender:
    """A server: what starts it, where it listens, the port on which nginx passes requests to it, and what it answered."""

    name: str
    command: Sequence[str]
    environ: Mapping[str, str]
    socket: Path
    port: int
    answered: int = 0
    cut_off: int = 0  # at most so many requests were under way when wrk hung up, or failed: they may count too

    @contextlib.contextmanager
    def started(self, first: str) -> Iterator[int]:
        """Serve, from the first answer on."""
        log = self.socket.with_suffix(".log")
        with serving(self.name, self.command, self.environ, log, str(self.socket)) as pid:
            self.ask("GET", first)
            self.answered += 1
            yield pid

    def ask(self, method: str, target: str, body: object = None) -> tuple[http.client.HTTPMessage, bytes]:
        """One request through nginx."""
        text = None if body is None else json.dumps(body)
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_SECONDS)) as client:
            client.request(method, target, text, {"Content-Type": "application/json"} if text else {})
            answer = client.getresponse()
            told = answer.read()
        if answer.status >= 400:
            raise BenchError(f"{self.name} answered {answer.status} to {method} {target}: {told[:200]!r}")
        return answer.headers, told


class Load(NamedTuple):
    """Paths that wrk asks a contender for."""

    name: str
    contender: Contender
    paths: Path  # a file with one on each line
    header: tuple[str, str]  # of the right answer

    @property
    def first(self) -> str:
        return self.paths.read_text().partition("\n")[0]

    def probe(self) -> None:
        """See that the answer is right before its speed is measured."""
        name, value = self.header
        found = self.contender.ask("GET", self.first)[0][name]
        self.contender.answered += 1
        if found != value:
            raise BenchError(f"{self.name}: expected {name}: {value}, got {found}")


def gunicorn(name: str, application: str, folder: Path, port: int, **environ: object) -> Contender:
    """An application of this folder, served as the tracker serves itself."""
    path = folder / f"{name}.sock"
    options = ["--preload", "--workers", str(WORKERS), "--no-control-socket"]
    if os.access("/dev/shm", os.W_OK):
        options += ["--worker-tmp-dir", "/dev/shm"]
    options += ["--pythonpath", str(HERE), "--bind", f"unix:{path}", application]
    return Contender(name, [sys.executable, "-m", "gunicorn", *options], plain_environ(**environ), path, port)


class Tracker:
    """Us, as deployed, with a tenant and a database of its own in the folder; its plain links may lead to acme.com."""

    def __init__(self, folder: Path, port: int, program: Sequence[str]) -> None:
        folder.mkdir()
        self.folder, self.program = folder, [*program, "--env", os.devnull]
        path = folder / "us.sock"
        environ = plain_environ(
            BIND=f"unix:{path}",
            BASE_URL=f"http://127.0.0.1:{port}",
            DATABASE_URL=f"sqlite:{folder / 'data' / 'tracking.db'}",
            WEB_CONCURRENCY=WORKERS,
        )
        self.contender = Contender("us", [*self.program, "serve"], environ, path, port)
        tenant = json.loads(self.command("tenant", "add", "bench", "--domain", "acme.com", "--json"))
        self.id, self.mail_id = tenant["id"], tenant["mail_id"]
        self.pixels = self.load("pixel", [f"/{self.mail_id}/pixel/{key}.gif" for key in KEYS], "X-Tracker", "recorded")

    def command(self, *words: str) -> str:
        """What one of the tracker's commands prints."""
        return run([*self.program, *words], self.contender.environ)

    def load(self, name: str, paths: Iterable[str], header: str, value: str) -> Load:
        return Load(name, self.contender, write_paths(self.folder, name, paths), (header, value))

    def register(self) -> list[Load]:
        """Register the emails, each with one link; the loads of pixels and of both kinds of clicks."""
        asked = thousands({"campaign": "Spring", "links": [TARGET]})
        answers = [json.loads(self.contender.ask("POST", f"/{self.id}/emails", some)[1]) for some in asked]
        signed = [urlsplit(email["links"][0]["click_url"]).path for emails in answers for email in emails]
        plain = [f"/{self.mail_id}/click/{key}?url={quote(TARGET, safe='')}" for key in KEYS]
        clicks = (("signed click", signed), ("plain click", plain))
        return [self.pixels, *(self.load(name, paths, "Location", TARGET) for name, paths in clicks)]

    def waiting(self) -> int:
        """About how many hits are not in the database yet."""
        deadline = time.monotonic() + REQUEST_SECONDS
        while time.monotonic() < deadline:
            # None while /health could not look at once.
            if (waiting := json.loads(self.contender.ask("GET", "/health")[1])["waiting_hits"]) is not None:
                return int(waiting)
        raise BenchError("/health does not say how many hits wait")

    def troubles(self, when: str) -> list[str]:
        """Let it drain, and compare what was answered with what is in the database; what is wrong, in sentences."""
        deadline = time.monotonic() + DRAIN_SECONDS
        waiting = True
        while waiting and time.monotonic() < deadline:
            time.sleep(0.2)
            stats = json.loads(self.command("stats", self.mail_id, "--range", "all", "--json"))
            waiting = bool(stats["waiting_hits"])
        counted = sum(sum(each["hits"].values()) for each in stats["activity"].values())
        answered, most = self.contender.answered, self.contender.answered + self.contender.cut_off
        check = self.command("check").strip().replace("\n", "; ")
        told = (
            f"{when}: {answered:,} hits answered, {counted:,} in the database (up to {most:,} may be); check: {check}"
        )
        note(told)
        return [] if answered <= counted <= most and check == "all is well" else [told]


def thousands(more: Mapping[str, object]) -> Iterator[list[dict[str, object]]]:
    """The emails to register, as many as go in one request."""
    for first in range(0, len(KEYS), 1000):
        yield [{"key": key, "recipient": f"{key}@example.org", **more} for key in KEYS[first : first + 1000]]


def write_paths(folder: Path, name: str, paths: Iterable[str]) -> Path:
    """A file for load.lua."""
    file = folder / f"{name.replace(' ', '-')}.paths"
    file.write_text("".join(f"{path}\n" for path in paths))
    return file


# == Load ==============================================================================================
# nginx in front, wrk before it.

# One process, because it shares the cores with wrk and the workers and never is what is waited for: it passes on many
# times what two sync workers answer. Connections from wrk are kept; those to the workers can't be.
NGINX_CONF = string.Template("""\
worker_processes 1;
$user
daemon off;
pid $folder/nginx.pid;
error_log $folder/nginx.log warn;
events { worker_connections 1024; }
http {
    access_log off;
    keepalive_timeout 60s;
    keepalive_requests 100000000;
    client_body_temp_path $folder/nginx-body;
    proxy_temp_path $folder/nginx-proxy;
    fastcgi_temp_path $folder/nginx-fastcgi;
    uwsgi_temp_path $folder/nginx-uwsgi;
    scgi_temp_path $folder/nginx-scgi;
    proxy_http_version 1.1;
    proxy_set_header Connection close;
    proxy_set_header Host $$http_host;
    proxy_set_header X-Forwarded-For $$remote_addr;
$servers
}
""")


@contextlib.contextmanager
def nginx(folder: Path, contenders: Sequence[Contender]) -> Iterator[None]:
    """The one proxy for all; a contender that does not run is a 502."""
    # Started by root, nginx would become a user who can't read our folder; another user can't become anybody.
    user = f"user {pwd.getpwuid(0).pw_name};" if os.geteuid() == 0 else ""
    servers = "\n".join(
        f"    server {{ listen 127.0.0.1:{each.port}; location / {{ proxy_pass http://unix:{each.socket}; }} }}"
        for each in contenders
    )
    conf = folder / "nginx.conf"
    conf.write_text(NGINX_CONF.substitute(user=user, folder=folder, servers=servers))
    command = [tool("nginx"), "-p", str(folder), "-c", str(conf)]
    address = ("127.0.0.1", contenders[-1].port)
    with serving("nginx", command, plain_environ(), folder / "nginx.out", address):
        yield


def tool(name: str) -> str:
    """Where nginx or wrk is: Debian has nginx in /usr/sbin, which is not in the PATH of all users."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}{os.pathsep}/usr/sbin")
    if found is None:
        raise BenchError(f"{name} is needed: apt install nginx wrk")
    return found


def run_wrk(load: Load, seconds: float, each_second: Callable[[], object] = lambda: None) -> Measurement:
    """Ask as fast as answers come; meanwhile look each second."""
    whole = max(1, round(seconds))  # wrk knows no parts of a second
    command = [tool("wrk"), "-t1", f"-c{CONNECTIONS}", f"-d{whole}s", "--latency", f"--timeout={REQUEST_SECONDS:g}s"]
    command += ["-s", str(HERE / "load.lua"), f"http://127.0.0.1:{load.contender.port}/", "--", str(load.paths)]
    with running(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as wrk:
        deadline = time.monotonic() + whole + WAIT_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                output = wrk.communicate(timeout=1)[0].decode(errors="replace")
                break
            each_second()
        else:
            raise BenchError(f"{load.name}: wrk did not end after {whole} s")
    try:
        measured = Measurement(**json.loads(output.strip().splitlines()[-1]))
    except (IndexError, TypeError, ValueError):
        raise BenchError(f"wrk printed no sums; it said: {output[-500:]}") from None
    if not measured.good:
        raise BenchError(f"{load.name}: not one good answer in {whole} s")
    load.contender.answered += measured.good
    # wrk hangs up at the end while every connection waits for an answer.
    load.contender.cut_off += CONNECTIONS + measured.broken + measured.bad
    return measured


def run_until(load: Load, hits: int) -> None:
    """Ask until about so many answers came, half a minute at a time at most, so that the rate is known anew."""
    rate = 0.0
    while hits > 0:
        measured = run_wrk(load, min(30.0, hits / rate) if rate else 1.0)
        hits, rate = hits - measured.good, measured.rate


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
        """Everything, from memory to cold start."""
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(4)]
            ports = [each.getsockname()[1] for each in held]
        bare = gunicorn("hello", "hello:application", self.folder, ports[0])
        database = self.folder / "flask.db"
        peer = gunicorn("flask", "flask_peer:application", self.folder, ports[1], BENCH_DATABASE=database)
        us, weighed = (
            Tracker(self.folder / name, port, shlex.split(self.args.program))
            for name, port in zip(("us", "memory"), ports[2:], strict=True)
        )
        theirs = write_paths(self.folder, "flask", [f"/pixel/{key}.gif" for key in KEYS])
        loads = [
            # What we are asked for pixels, byte for byte but for the port.
            Load("hello", bare, us.pixels.paths, ("Content-Type", "text/plain; charset=utf-8")),
            Load("flask", peer, theirs, ("Content-Type", "image/gif")),
        ]
        with nginx(self.folder, [bare, peer, us.contender, weighed.contender]):
            figures = self.memory(loads[0], weighed)
            with bare.started("/"), peer.started(loads[1].first), us.contender.started(us.pixels.first):
                for some in thousands({}):
                    peer.ask("POST", "/emails", some)
                loads += us.register()
                rounds = self.all_rounds(loads)
                figures |= self.backlog(us)
                self.troubles += us.troubles("after the full load")
            figures |= self.cold_starts(bare, us)
            self.troubles += us.troubles("after all starts")
        for name, base in (("pixel", "hello"), ("signed click", "hello"), ("plain click", "hello"), ("pixel", "flask")):
            for figure, what in (("requests/s", "rate"), ("p99", "p99_ms")):
                ratios = [getattr(each[name], what) / getattr(each[base], what) for each in rounds]
                figures[f"{name}: {figure}, of {base}'s"] = statistics.median(ratios)
        return rounds, figures

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


def print_report(rounds: Sequence[Round], figures: Figures, troubles: Sequence[str]) -> None:
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
    for trouble in troubles:
        print(f"\nTROUBLE: {trouble}")


def bench(args: argparse.Namespace) -> int:
    """Measure and report; the exit status."""
    if lost := [name for name in ("gunicorn", "flask") if importlib.util.find_spec(name) is None]:
        raise BenchError(f"this Python has no {' and no '.join(lost)}: use make bench")
    if args.quick:
        args.rounds, args.seconds, args.minute, args.starts = 2, 1, 3, 2
    with tempfile.TemporaryDirectory(prefix="bench-", dir=args.folder, ignore_cleanup_errors=True) as folder:
        made = Bench(Path(folder).resolve(), args)
        print(machine(made.folder), flush=True)
        rounds, figures = made.run()
    print_report(rounds, figures, made.troubles)
    return 1 if made.troubles else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit status: 0, or 1 if something could not run, a hit was lost or `check` found a fault."""
    parser = argparse.ArgumentParser(prog="bench.py", description=(__doc__ or "").partition(":")[0] + ".")
    add = parser.add_argument
    add("--rounds", type=int, default=5, metavar="N", help="rounds, each with every load (default: 5)")
    add("--seconds", type=int, default=5, metavar="S", help="seconds of each load in a round (default: 5)")
    add("--minute", type=int, default=60, metavar="S", help="seconds of the longer full load (default: 60)")
    add("--starts", type=int, default=5, metavar="N", help="cold starts of each (default: 5)")
    add("--million", action="store_true", help="weigh the tracker after a million hits too; takes minutes")
    add("--quick", action="store_true", help="a trial: 2 rounds of 1 s, 3 s of full load, 2 starts")
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
