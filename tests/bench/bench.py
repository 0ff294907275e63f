"""Measure the tracker beside a bare hello and beside a small Flask tracker: `make bench`; --help lists the options.

All are served by the same gunicorn (two sync workers, preloaded, on a unix socket) behind the same nginx, and wrk asks
all of them with the same headers. What is compared is compared within one round, so that a machine that is busy with
something else spoils a round and not the ratio. Each figure stands beside its bar, which is reported and never
asserted: the status is 1 only if something could not run, a hit was lost or `check` found a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import http.client
import importlib.metadata
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
from typing import Any, TextIO
from urllib.parse import quote, urlsplit

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PYZ = ROOT / "dist" / "email-tracker.pyz"

WORKERS = 2
CONNECTIONS = 32
KEYS = 5_000
TARGET = "https://acme.com/sale?a=1&b=2"
START_SECONDS = 30.0  # for a server to answer first
END_SECONDS = 30.0  # for a server to end by itself: the tracker drains its spool
REQUEST_SECONDS = 10.0
COMMAND_SECONDS = 900.0  # `check` recounts every event
DRAIN_SECONDS = 120.0  # for what waits after a load
POLL_SECONDS = 0.005  # between two tries to reach a server that starts
MILLION = 1_000_000
MILLION_SECONDS = 3_600.0  # a machine too slow for that is told so
MAX_SOCKET_PATH = 107  # bytes: sun_path


class BenchError(Exception):
    """The benchmark can't go on; the text is a sentence that says why."""


# == Figures ===========================================================================================
# What was measured, and what it says. Pure.


@dataclass(frozen=True)
class Measurement:
    """One run of wrk."""

    requests: int  # answered, whatever the status
    seconds: float
    bad: int  # answers with a status from 400 on
    broken: int  # connections that failed, and answers that came too late
    p50_ms: float
    p99_ms: float

    @property
    def good(self) -> int:
        """Answers that are what was asked for."""
        return self.requests - self.bad

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return self.good / self.seconds


Round = Mapping[str, Measurement]  # by the name of the load


def read_wrk(output: str) -> Measurement:
    """Read what load.lua printed as wrk's last line. Raises BenchError."""
    lines = output.strip().splitlines()
    try:
        return Measurement(**json.loads(lines[-1]))
    except (IndexError, TypeError, ValueError):
        raise BenchError(f"wrk printed no sums; it said: {' '.join(lines[-3:]) or 'nothing'}") from None


def ratio(part: float, whole: float) -> float | None:
    """How many times the whole the part is; None where nothing can be said."""
    return part / whole if whole > 0 else None


def median(values: Iterable[float | None]) -> float | None:
    """The median of what is known."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def rate_ratio(rounds: Sequence[Round], name: str, base: str) -> float | None:
    """The median of the rounds' ratios of good answers a second."""
    return median(ratio(each[name].rate, each[base].rate) for each in rounds)


def p99_ratio(rounds: Sequence[Round], name: str, base: str) -> float | None:
    """The median of the rounds' ratios of the 99th percentile."""
    return median(ratio(each[name].p99_ms, each[base].p99_ms) for each in rounds)


@dataclass(frozen=True)
class Summary:
    """The rounds of one load: medians, and the sum of what went wrong."""

    name: str
    rate: float | None
    rate_of_hello: float | None
    p50_ms: float | None
    p99_ms: float | None
    p99_of_hello: float | None
    errors: int


def summarise(rounds: Sequence[Round], name: str) -> Summary:
    """Bring the rounds of one load together."""
    mine = [each[name] for each in rounds]
    return Summary(
        name,
        median(each.rate for each in mine),
        rate_ratio(rounds, name, "hello"),
        median(each.p50_ms for each in mine),
        median(each.p99_ms for each in mine),
        p99_ratio(rounds, name, "hello"),
        sum(each.bad + each.broken for each in mine),
    )


@dataclass(frozen=True)
class Memory:
    """The PSS of all processes of a server, in MB, as it grew."""

    first: float  # after the first requests
    later: float
    later_hits: int
    million: float | None = None

    @property
    def growth(self) -> float | None:
        """From the later hits to a million, as a part of what it was at the former."""
        return None if self.million is None else (self.million - self.later) / self.later


@dataclass(frozen=True)
class Backlog:
    """What waited in the spool during a longer full load, and right after it; in hits, as /health estimates them."""

    load: Measurement
    most: int
    after: int

    @property
    def seconds(self) -> float | None:
        """The most that waited, in seconds of the rate reached."""
        return ratio(max(self.most, self.after), self.load.rate)


@dataclass(frozen=True)
class Account:
    """Whether each answered hit is in the database."""

    when: str
    answered: int
    counted: int
    cut_off: int  # at most so many requests were under way when wrk hung up, or failed: they may count too
    check: str

    def troubles(self) -> Iterator[str]:
        """What is wrong, in sentences."""
        if self.counted < self.answered:
            yield f"{self.when}: {self.answered - self.counted} of {self.answered} answered hits are not in the database"
        if self.counted > self.answered + self.cut_off:
            more = self.counted - self.answered
            yield f"{self.when}: {more} hits more than were answered are in the database; expected at most {self.cut_off}"
        if self.check != "all is well":
            yield f"{self.when}: check says: {self.check}"


@dataclass(frozen=True)
class Bar:
    """What a figure should be."""

    sign: str  # ">=" or "<="
    bound: float

    def met(self, value: float) -> bool:
        """Whether it is."""
        return value >= self.bound if self.sign == ">=" else value <= self.bound


BARS = {
    "pixel: requests/s, of hello's": Bar(">=", 0.80),
    "pixel: p99, of hello's": Bar("<=", 3.0),
    "signed click: requests/s, of hello's": Bar(">=", 0.75),
    "signed click: p99, of hello's": None,
    "plain click: requests/s, of hello's": None,
    "plain click: p99, of hello's": None,
    "pixel: requests/s, of flask's": Bar(">=", 4.0),
    "memory after the first requests, of hello's": None,
    "memory after some 10,000 hits, of hello's": Bar("<=", 1.5),
    "memory after a million hits, of hello's": None,
    "memory growth from 10,000 hits to a million": Bar("<=", 0.10),
    "cold start, of hello's": Bar("<=", 2.0),
    "cold start of email-tracker.pyz, of hello's": Bar("<=", 3.0),
    "backlog under full load, in seconds": Bar("<=", 1.0),
}


@dataclass(frozen=True)
class Figure:
    """A number with its bar, if there is one. A value of None was not measured."""

    name: str
    value: float | None
    bar: Bar | None

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None where there is none, or no value."""
        return None if self.bar is None or self.value is None else self.bar.met(self.value)


@dataclass(frozen=True)
class Results:
    """All that was measured."""

    rounds: Sequence[Round]
    memory: Mapping[str, Memory]  # of hello and of us
    starts: Mapping[str, Sequence[float]]  # seconds, each start of hello, us, and the pyz if there is one
    backlog: Backlog
    accounts: Sequence[Account]

    def values(self) -> dict[str, float | None]:
        """The figures by their names."""
        hello, us = self.memory["hello"], self.memory["us"]
        starts = {name: statistics.median(seconds) for name, seconds in self.starts.items()}
        found = {
            "pixel: requests/s, of flask's": rate_ratio(self.rounds, "pixel", "flask"),
            "memory after the first requests, of hello's": ratio(us.first, hello.first),
            "memory after some 10,000 hits, of hello's": ratio(us.later, hello.later),
            "memory after a million hits, of hello's": None if us.million is None else ratio(us.million, hello.later),
            "memory growth from 10,000 hits to a million": us.growth,
            "cold start, of hello's": ratio(starts["us"], starts["hello"]),
            "cold start of email-tracker.pyz, of hello's": ratio(starts["pyz"], starts["hello"])
            if "pyz" in starts
            else None,
            "backlog under full load, in seconds": self.backlog.seconds,
        }
        for name in ("pixel", "signed click", "plain click"):
            found[f"{name}: requests/s, of hello's"] = rate_ratio(self.rounds, name, "hello")
            found[f"{name}: p99, of hello's"] = p99_ratio(self.rounds, name, "hello")
        return found

    def figures(self) -> list[Figure]:
        """The figures in the order of the bars."""
        values = self.values()
        return [Figure(name, values[name], bar) for name, bar in BARS.items()]

    def troubles(self) -> list[str]:
        """What must not be, in sentences."""
        return [trouble for account in self.accounts for trouble in account.troubles()]


# == Processes =========================================================================================
# Start, ask, weigh and end them. Only what was started here is ever ended, by its own id.


def note(text: str) -> None:
    """Say how far it is."""
    print(text, file=sys.stderr, flush=True)


def plain_environ() -> dict[str, str]:
    """No setting of the user's own may change what is measured."""
    return {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, and make it and its children if it does not."""
    if process.poll() is not None:
        return
    try:
        process.terminate()
        process.wait(timeout=END_SECONDS)
    except subprocess.TimeoutExpired:
        note(f"process {process.pid} did not end within {END_SECONDS:g} s, and was killed")
    finally:
        # It is not reaped yet, so its id still names its own session.
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Let whoever stops us wait until the block has ended."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


STARTED: list[subprocess.Popen[bytes]] = []  # an interruption may come between a start and the block that would end it


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a process that end_all knows; a session of its own, so that Ctrl-C reaches it through us only."""
    with undisturbed():
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, **options)
        STARTED.append(process)
    return process


def end_all() -> None:
    """End whatever was started and runs on."""
    with undisturbed():
        while STARTED:
            end(STARTED.pop())


@contextlib.contextmanager
def running(command: Sequence[str], environ: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process for as long as the block runs."""
    with log.open("ab") as out:
        process = start(command, env=environ, cwd=ROOT, stdout=out, stderr=out)
    try:
        yield process
    finally:
        end(process)


def last_words(log: Path) -> str:
    """The end of a log, for a sentence."""
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-5:]) or "(its log is empty)"


def process_tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in tasks.read_text().split():
            found += process_tree(int(child))
    return found


def pss_megabytes(pids: Iterable[int]) -> float:
    """The proportional set size of these processes together."""
    kibibytes = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                kibibytes += int(line.split()[1])
    return kibibytes * 1024 / 1e6


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in held]


def ask(port: int, method: str, target: str, body: object = None) -> tuple[int, http.client.HTTPMessage, bytes]:
    """One request through nginx."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_SECONDS)
    try:
        text = None if body is None else json.dumps(body)
        client.request(method, target, text, {} if body is None else {"Content-Type": "application/json"})
        answer = client.getresponse()
        return answer.status, answer.headers, answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise BenchError(f"{method} {target} on port {port} got no answer: {error}") from error
    finally:
        client.close()


# == Contenders ========================================================================================
# What is compared, all of it started and asked in one way.


@dataclass
class Ledger:
    """How many hits the tracker answered; and how many requests it may have recorded though no good answer came."""

    answered: int = 0
    cut_off: int = 0

    def add(self, measured: Measurement) -> None:
        """Enter a run of wrk."""
        self.answered += measured.good
        # wrk hangs up at the end while every connection waits for an answer.
        self.cut_off += CONNECTIONS + measured.broken + measured.bad


@dataclass(frozen=True)
class Contender:
    """A server: what starts it, where it listens, and the port on which nginx passes requests to it."""

    name: str
    command: Sequence[str]
    environ: Mapping[str, str]
    socket: Path
    port: int
    first: str  # a path that it answers with 200
    ledger: Ledger = field(default_factory=Ledger, compare=False)

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.socket.with_suffix(".log")


@dataclass(frozen=True)
class Load:
    """Paths that wrk asks a contender for."""

    name: str
    contender: Contender
    paths: Path  # a file with one on each line
    status: int  # of the right answer


def first_answer(contender: Contender, process: subprocess.Popen[bytes]) -> None:
    """Wait until a server answers 200 on its unix socket. Raises BenchError."""
    request = f"GET {contender.first} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()
    deadline = time.monotonic() + START_SECONDS
    while True:
        with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
            client.settimeout(START_SECONDS)
            client.connect(str(contender.socket))
            client.sendall(request)
            if client.recv(4096).startswith(b"HTTP/1.1 200 "):
                return
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchError(f"{contender.name} does not answer: {last_words(contender.log)}")
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def started(contender: Contender) -> Iterator[int]:
    """A contender that serves; gives the id of its first process."""
    with running(contender.command, contender.environ, contender.log) as process:
        first_answer(contender, process)
        contender.ledger.answered += 1
        yield process.pid


def gunicorn(application: str, path: Path) -> list[str]:
    """The command that serves an application of this folder as the tracker serves itself."""
    options = ["--preload", "--worker-class", "sync", "--workers", str(WORKERS), "--timeout", "30"]
    if os.access("/dev/shm", os.W_OK):
        options += ["--worker-tmp-dir", "/dev/shm"]
    options += ["--no-control-socket", "--pythonpath", str(HERE), "--bind", f"unix:{path}"]
    return [sys.executable, "-m", "gunicorn", *options, application]


def hello(folder: Path, port: int) -> Contender:
    """The bare WSGI application."""
    path = folder / "hello.sock"
    return Contender("hello", gunicorn("hello:application", path), plain_environ(), path, port, "/")


def flask(folder: Path, port: int) -> Contender:
    """The small tracker."""
    path = folder / "flask.sock"
    environ = {**plain_environ(), "BENCH_DATABASE": str(folder / "flask.db")}
    return Contender("flask", gunicorn("flask_peer:application", path), environ, path, port, "/pixel/first.gif")


@dataclass(frozen=True)
class Tracker:
    """Us, as deployed, with a tenant and a database of its own in the folder."""

    contender: Contender
    program: Sequence[str]
    id: str
    mail_id: str

    def command(self, *words: str) -> str:
        """Run one of the tracker's commands; its stdout. Raises BenchError."""
        return run_command(self.program, self.contender.environ, *words)

    def health(self) -> dict[str, Any]:
        """What /health says."""
        health: dict[str, Any] = json.loads(ask(self.contender.port, "GET", "/health")[2])
        return health

    def waiting(self) -> int:
        """About how many hits are not in the database yet. Raises BenchError."""
        deadline = time.monotonic() + REQUEST_SECONDS
        while time.monotonic() < deadline:
            # None while /health could not look at once.
            if (waiting := self.health()["waiting_hits"]) is not None:
                return int(waiting)
        raise BenchError(f"/health does not say how many hits wait: {self.health()['why']}")


def run_command(program: Sequence[str], environ: Mapping[str, str], *words: str) -> str:
    """Run a command of the tracker; its stdout, also where the status is 1. Raises BenchError."""
    command = [*program, "--env", os.devnull, *words]
    try:
        with start(command, env=environ, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                out, err = (text.decode() for text in process.communicate(timeout=COMMAND_SECONDS))
            finally:
                process.kill()  # does nothing to one that has ended
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchError(str(error)) from error
    if process.returncode > 1 or (process.returncode and not out):
        raise BenchError(f"{shlex.join(command)} ended with {process.returncode}: {err.strip()}")
    return out


def tracker(folder: Path, port: int, program: Sequence[str]) -> Tracker:
    """A tracker in a folder, with a tenant whose plain links may lead to acme.com."""
    folder.mkdir()
    path = folder / "us.sock"
    environ = {
        **plain_environ(),
        "BIND": f"unix:{path}",
        "BASE_URL": f"http://127.0.0.1:{port}",
        "DATABASE_URL": f"sqlite:{folder / 'data' / 'tracking.db'}",
        "WEB_CONCURRENCY": str(WORKERS),
    }
    tenant = json.loads(run_command(program, environ, "tenant", "add", "bench", "--domain", "acme.com", "--json"))
    serve = [*program, "--env", os.devnull, "serve"]
    contender = Contender("us", serve, environ, path, port, pixel_path(tenant["mail_id"], keys()[0]))
    return Tracker(contender, program, tenant["id"], tenant["mail_id"])


def keys() -> list[str]:
    """The keys of the emails, as long as those that the tracker makes."""
    return [hashlib.sha256(str(number).encode()).hexdigest()[:22] for number in range(KEYS)]


def pixel_path(mail_id: str, key: str) -> str:
    """Where the pixel of an email is."""
    return f"/{mail_id}/pixel/{key}.gif"


def in_thousands(emails: Sequence[Mapping[str, object]]) -> Iterator[Sequence[Mapping[str, object]]]:
    """The most that go in one request."""
    for start in range(0, len(emails), 1000):
        yield emails[start : start + 1000]


def write_paths(folder: Path, name: str, paths: Iterable[str]) -> Path:
    """A file for load.lua."""
    file = folder / f"{name.replace(' ', '-')}.paths"
    file.write_text("".join(f"{path}\n" for path in paths))
    return file


def register_with_us(us: Tracker, folder: Path) -> list[Load]:
    """Register the emails, each with one link; the loads of pixels and of both kinds of clicks."""
    emails = [
        {"key": key, "recipient": f"{key}@example.org", "campaign": "Spring", "links": [TARGET]} for key in keys()
    ]
    signed = []
    for some in in_thousands(emails):
        status, _, body = ask(us.contender.port, "POST", f"/{us.id}/emails", some)
        if status != 201:
            raise BenchError(f"the tracker answered {status} to POST /…/emails: {body[:200].decode(errors='replace')}")
        for email in json.loads(body):
            url = urlsplit(email["links"][0]["click_url"])
            signed.append(url.path)
    plain = [f"/{us.mail_id}/click/{key}?url={quote(TARGET, safe='')}" for key in keys()]
    return [
        pixel_load(us, folder),
        Load("signed click", us.contender, write_paths(folder, "signed click", signed), 302),
        Load("plain click", us.contender, write_paths(folder, "plain click", plain), 302),
    ]


def pixel_load(us: Tracker, folder: Path) -> Load:
    """All pixels in turn."""
    paths = [pixel_path(us.mail_id, key) for key in keys()]
    return Load("pixel", us.contender, write_paths(folder, "pixel", paths), 200)


def register_with_flask(peer: Contender, folder: Path) -> Load:
    """Register the same emails; the load of pixels."""
    for some in in_thousands([{"key": key, "recipient": f"{key}@example.org"} for key in keys()]):
        status, _, body = ask(peer.port, "POST", "/emails", some)
        if status != 200:
            raise BenchError(f"flask answered {status} to POST /emails: {body[:200].decode(errors='replace')}")
    paths = [f"/pixel/{key}.gif" for key in keys()]
    return Load("flask", peer, write_paths(folder, "flask", paths), 200)


def hello_load(contender: Contender, pixels: Load) -> Load:
    """The requests that we get for pixels, byte for byte but for the port."""
    return Load("hello", contender, pixels.paths, 200)


# == Load ==============================================================================================
# nginx in front, wrk before it.


@dataclass(frozen=True)
class Tools:
    """Programs that are not Python's."""

    nginx: str
    wrk: str


def find_tools(path: str) -> Tools:
    """Look for nginx and wrk. Raises BenchError."""
    # /usr/sbin, where Debian has nginx, is not in the PATH of all users.
    found = [shutil.which(name, path=f"{path}{os.pathsep}/usr/sbin") for name in ("nginx", "wrk")]
    if found[0] is None or found[1] is None:
        raise BenchError("nginx and wrk are needed: apt install nginx wrk")
    return Tools(found[0], found[1])


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
NGINX_SERVER = string.Template("""\
    server {
        listen 127.0.0.1:$port;
        location / { proxy_pass http://unix:$socket; }
    }
""")


def nginx_conf(folder: Path, fronts: Mapping[int, Path]) -> str:
    """One server for each port, before its socket."""
    # Started by root, nginx would become a user who can't read our folder; another user can't become anybody.
    user = f"user {pwd.getpwuid(0).pw_name};" if os.geteuid() == 0 else ""
    servers = "".join(NGINX_SERVER.substitute(port=port, socket=path) for port, path in fronts.items())
    return NGINX_CONF.substitute(user=user, folder=folder, servers=servers)


@contextlib.contextmanager
def nginx(tools: Tools, folder: Path, fronts: Mapping[int, Path]) -> Iterator[None]:
    """The one proxy for all; a contender that does not run is a 502."""
    conf, log = folder / "nginx.conf", folder / "nginx.out"
    conf.write_text(nginx_conf(folder, fronts))
    with running([tools.nginx, "-p", str(folder), "-c", str(conf)], plain_environ(), log) as process:
        deadline = time.monotonic() + START_SECONDS
        for port in fronts:
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), REQUEST_SECONDS):
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    raise BenchError(f"nginx does not listen on port {port}: {last_words(log)}")
                time.sleep(POLL_SECONDS)
        yield


def probe(load: Load) -> None:
    """See that a contender answers what it should before its speed is measured. Raises BenchError."""
    with load.paths.open() as paths:
        target = paths.readline().strip()
    status, headers, _ = ask(load.contender.port, "GET", target)
    if status != load.status:
        raise BenchError(f"{load.name}: expected {load.status} for {target}, got {status}")
    if load.contender.name == "us":
        load.contender.ledger.answered += 1
        expected = ("X-Tracker", "recorded") if load.name == "pixel" else ("Location", TARGET)
        if headers[expected[0]] != expected[1]:
            raise BenchError(f"{load.name}: expected {': '.join(expected)}, got {headers[expected[0]]}")


def run_wrk(tools: Tools, load: Load, seconds: float, each_second: Callable[[], None] = lambda: None) -> Measurement:
    """Ask as fast as answers come; meanwhile look each second. Raises BenchError."""
    whole = max(1, round(seconds))  # wrk knows no parts of a second
    command = [tools.wrk, "-t1", f"-c{CONNECTIONS}", f"-d{whole}s", "--latency", f"--timeout={REQUEST_SECONDS:g}s"]
    command += ["-s", str(HERE / "load.lua"), f"http://127.0.0.1:{load.contender.port}/", "--", str(load.paths)]
    deadline = time.monotonic() + whole + START_SECONDS
    with start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as wrk:
        try:
            while True:
                try:
                    output, _ = wrk.communicate(timeout=1)
                    break
                except subprocess.TimeoutExpired:
                    if time.monotonic() > deadline:
                        raise BenchError(f"{load.name}: wrk did not end after {whole} s") from None
                    each_second()
        finally:
            wrk.kill()  # does nothing to one that has ended
    measured = read_wrk(output.decode(errors="replace"))
    if not measured.good:
        raise BenchError(f"{load.name}: not one good answer in {whole} s: {last_words(load.contender.log)}")
    load.contender.ledger.add(measured)
    return measured


def run_until(tools: Tools, load: Load, hits: int) -> int:
    """Ask until about so many answers came; how many came. Raises BenchError."""
    done, rate, deadline = 0, 0.0, time.monotonic() + MILLION_SECONDS
    while done < hits:
        if time.monotonic() > deadline:
            raise BenchError(f"{load.name}: only {done} of {hits} answers in {MILLION_SECONDS:g} s")
        # At most half a minute at a time, so that the rate is known anew.
        measured = run_wrk(tools, load, min(30.0, (hits - done) / rate) if rate else 1.0)
        done, rate = done + measured.good, measured.rate
    return done


# == Phases ============================================================================================
# What is done one after the other.


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    rounds: int
    seconds: float
    minute: float
    starts: int
    million: bool
    warm_up: float = 1.0
    first_hits: int = 100
    later_hits: int = 10_000


@dataclass(frozen=True)
class Stage:
    """Where it all happens."""

    plan: Plan
    tools: Tools
    folder: Path
    program: Sequence[str]
    ports: Sequence[int]  # of hello, flask, and us twice


def check_account(us: Tracker, when: str) -> Account:
    """Let the tracker drain, and compare what was answered with what is in the database."""
    deadline = time.monotonic() + DRAIN_SECONDS
    while True:
        stats = json.loads(us.command("stats", us.mail_id, "--range", "all", "--json"))
        if not stats["waiting_hits"] or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    counted = sum(sum(kind["hits"].values()) for kind in stats["activity"].values())
    ledger = us.contender.ledger
    check = us.command("check").strip().replace("\n", "; ")
    return Account(when, ledger.answered, counted, ledger.cut_off, check)


def measure_memory(stage: Stage, load: Load, pid: int, *, million: bool) -> Memory:
    """Weigh a server that has just started, and again as hits come."""
    for _ in range(stage.plan.first_hits):
        probe(load)
    first = pss_megabytes(process_tree(pid))
    hits = stage.plan.first_hits + run_until(stage.tools, load, stage.plan.later_hits - stage.plan.first_hits)
    later = pss_megabytes(process_tree(pid))
    if not million:
        return Memory(first, later, hits)
    note("memory: a million hits")
    run_until(stage.tools, load, MILLION - hits)
    return Memory(first, later, hits, pss_megabytes(process_tree(pid)))


def memory_phase(stage: Stage) -> tuple[dict[str, Memory], Account]:
    """Hello and us, one after the other: what processes share is divided among all that run."""
    folder = stage.folder / "memory"
    us = tracker(folder, stage.ports[3], stage.program)
    pixels = pixel_load(us, folder)
    bare = hello(stage.folder, stage.ports[0])
    note("memory: hello")
    with started(bare) as pid:
        memory = {"hello": measure_memory(stage, hello_load(bare, pixels), pid, million=False)}
    note("memory: us")
    with started(us.contender) as pid:
        register_with_us(us, folder)
        memory["us"] = measure_memory(stage, pixels, pid, million=stage.plan.million)
    return memory, check_account(us, "after the hits for memory")


def rounds_phase(stage: Stage, loads: Sequence[Load]) -> list[Round]:
    """All loads in turn, so many rounds."""
    for load in loads:
        probe(load)
        run_wrk(stage.tools, load, stage.plan.warm_up)
    rounds: list[Round] = []
    for number in range(stage.plan.rounds):
        rounds.append({load.name: run_wrk(stage.tools, load, stage.plan.seconds) for load in loads})
        shown = ", ".join(f"{name} {measured.rate:,.0f}" for name, measured in rounds[-1].items())
        note(f"round {number + 1} of {stage.plan.rounds}, good answers a second: {shown}")
    return rounds


def backlog_phase(stage: Stage, us: Tracker, pixels: Load) -> Backlog:
    """A longer full load; what waits during it and right after it."""
    note(f"backlog: {stage.plan.minute:g} s of pixels")
    during: list[int] = []
    measured = run_wrk(stage.tools, pixels, stage.plan.minute, lambda: during.append(us.waiting()))
    after = us.waiting()
    return Backlog(measured, max(during, default=after), after)


def start_seconds(contender: Contender) -> float:
    """From starting a server to its first answer."""
    began = time.perf_counter()
    with started(contender):
        return time.perf_counter() - began


def starts_phase(stage: Stage, bare: Contender, us: Tracker) -> dict[str, list[float]]:
    """Cold starts in turn, with a database that is there already."""
    note(f"cold start: {stage.plan.starts} times")
    contenders = {"hello": bare, "us": us.contender}
    if PYZ.exists():
        serve = [sys.executable, "-I", str(PYZ), "--env", os.devnull, "serve"]
        contenders["pyz"] = dataclasses.replace(us.contender, command=serve)
    for contender in contenders.values():
        start_seconds(contender)  # brings files into memory
    turns = [{name: start_seconds(each) for name, each in contenders.items()} for _ in range(stage.plan.starts)]
    return {name: [turn[name] for turn in turns] for name in contenders}


def run_all(stage: Stage) -> Results:
    """Everything, from memory to cold start. Raises BenchError."""
    bare, peer = hello(stage.folder, stage.ports[0]), flask(stage.folder, stage.ports[1])
    us = tracker(stage.folder / "us", stage.ports[2], stage.program)
    fronts = dict(zip(stage.ports, (bare.socket, peer.socket, us.contender.socket, Path()), strict=True))
    fronts[stage.ports[3]] = stage.folder / "memory" / "us.sock"
    with nginx(stage.tools, stage.folder, fronts):
        memory, weighed = memory_phase(stage)
        with started(bare), started(peer), started(us.contender):
            mine = register_with_us(us, stage.folder / "us")
            theirs = [hello_load(bare, mine[0]), register_with_flask(peer, stage.folder)]
            rounds = rounds_phase(stage, [*theirs, *mine])
            backlog = backlog_phase(stage, us, mine[0])
            loaded = check_account(us, "after the full load")
        starts = starts_phase(stage, bare, us)
    return Results(rounds, memory, starts, backlog, [weighed, loaded, check_account(us, "after all starts")])


# == Report ============================================================================================
# For people on stdout, for programs as JSON.


def version_of(command: Sequence[str]) -> str:
    """The first words that a program prints of itself."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=REQUEST_SECONDS, check=False)
    words = (done.stdout + done.stderr).splitlines()
    return words[0].partition(" Copyright")[0] if words else "?"


def file_system(folder: Path) -> str:
    """What kind of file system a folder is on: on tmpfs a commit costs nothing."""
    found, best = "?", -1
    for line in Path("/proc/mounts").read_text().splitlines():
        mount = Path(line.split()[1])
        if len(mount.parts) > best and (mount == folder or mount in folder.parents):
            found, best = line.split()[2], len(mount.parts)
    return found


def processor() -> str:
    """What the kernel calls it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def machine_facts(tools: Tools, folder: Path) -> dict[str, str]:
    """On what it ran."""
    return {
        "processor": processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "load average": f"{os.getloadavg()[0]:.2f} at the start",
        "kernel": platform.release(),
        "file system": file_system(folder),
        "Python": platform.python_version(),
        "SQLite": sqlite3.sqlite_version,
        "gunicorn": importlib.metadata.version("gunicorn"),
        "Flask": importlib.metadata.version("flask"),
        "nginx": version_of([tools.nginx, "-v"]).rpartition("/")[2],
        "wrk": version_of([tools.wrk, "-v"]).removeprefix("wrk "),
    }


def shown(value: float | None, digits: int = 2) -> str:
    """A number, or a dash for none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def print_rounds(results: Results, out: TextIO) -> None:
    """A line for each load."""
    head = ("median of the rounds", "good/s", "of hello", "p50 ms", "p99 ms", "of hello", "errors")
    print("{:22}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}".format(*head), file=out)
    for name in results.rounds[0]:
        it = summarise(results.rounds, name)
        columns = (
            shown(it.rate, 0),
            shown(it.rate_of_hello),
            shown(it.p50_ms),
            shown(it.p99_ms),
            shown(it.p99_of_hello),
        )
        print(f"{name:22}" + "".join(f"{column:>10}" for column in columns) + f"{it.errors:>10,}", file=out)


def print_memory(results: Results, out: TextIO) -> None:
    """PSS and cold starts, in their own units."""
    for name, memory in results.memory.items():
        million = "" if memory.million is None else f", {memory.million:.1f} after a million hits"
        print(
            f"memory of {name}: {memory.first:.1f} MB after the first requests, "
            f"{memory.later:.1f} after {memory.later_hits:,} hits{million}",
            file=out,
        )
    for name, seconds in results.starts.items():
        print(f"cold start of {name}: {shown(statistics.median(seconds) * 1000, 0)} ms", file=out)


def print_backlog(results: Results, out: TextIO) -> None:
    """What waited, and what became of all hits."""
    backlog = results.backlog
    print(
        f"backlog: at {backlog.load.rate:,.0f} hits a second about {backlog.most:,} waited at most, "
        f"{backlog.after:,} right after",
        file=out,
    )
    for account in results.accounts:
        print(
            f"{account.when}: {account.answered:,} hits answered, {account.counted:,} in the database "
            f"(up to {account.cut_off:,} more may have been cut off by wrk); check: {account.check}",
            file=out,
        )


def print_figures(results: Results, out: TextIO) -> None:
    """Each figure beside its bar."""
    print(f"{'figure':50}{'value':>10}{'bar':>12}   met", file=out)
    for figure in results.figures():
        bar = f"{figure.bar.sign} {figure.bar.bound:.2f}" if figure.bar else "-"
        met = {True: "yes", False: "NO", None: "-"}[figure.met]
        print(f"{figure.name:50}{shown(figure.value):>10}{bar:>12}   {met}", file=out)


def print_report(machine: Mapping[str, str], results: Results, out: TextIO) -> None:
    """All of it."""
    print(", ".join(f"{name} {value}" for name, value in machine.items()), file=out)
    for part in (print_rounds, print_memory, print_backlog, print_figures):
        print(file=out)
        part(results, out)
    for trouble in results.troubles():
        print(f"\nTROUBLE: {trouble}", file=out)


def as_json(machine: Mapping[str, str], plan: Plan, results: Results) -> dict[str, Any]:
    """The same for programs."""
    figures = [{**dataclasses.asdict(figure), "met": figure.met} for figure in results.figures()]
    return {
        "machine": dict(machine),
        "plan": dataclasses.asdict(plan),
        "summaries": [dataclasses.asdict(summarise(results.rounds, name)) for name in results.rounds[0]],
        "figures": figures,
        "measured": dataclasses.asdict(results),
        "troubles": results.troubles(),
    }


# == Command ===========================================================================================
# The command line, and the folder that is there only meanwhile.


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def command_line() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(prog="bench.py", description=(__doc__ or "").partition(":")[0] + ".")
    add = parser.add_argument
    add("--rounds", type=positive, default=5, metavar="N", help="rounds, each with every load (default: 5)")
    add("--seconds", type=positive, default=5, metavar="S", help="seconds of each load in a round (default: 5)")
    add("--minute", type=positive, default=60, metavar="S", help="seconds of the longer full load (default: 60)")
    add("--starts", type=positive, default=5, metavar="N", help="cold starts of each (default: 5)")
    add("--million", action="store_true", help="weigh the tracker after a million hits too; takes minutes")
    add("--quick", action="store_true", help="a trial: 2 rounds of 1 s, 3 s of full load, 2 starts")
    add("--program", metavar="COMMAND", help="how the tracker is run, from the project's folder (default: -m tracker)")
    add("--folder", type=Path, metavar="DIR", help="where databases are laid meanwhile (default: as Python's tempfile)")
    add("--json", type=Path, metavar="FILE", help="write all that was measured to a file")
    return parser


def read_plan(args: argparse.Namespace) -> Plan:
    """What the options ask for."""
    if args.quick:
        return Plan(rounds=2, seconds=1, minute=3, starts=2, million=args.million)
    return Plan(args.rounds, args.seconds, args.minute, args.starts, args.million)


def require_packages() -> None:
    """See that what is served can be loaded. Raises BenchError."""
    if not sys.platform.startswith("linux"):
        raise BenchError("Linux is needed: memory is read from /proc")
    missing = [name for name in ("gunicorn", "flask") if importlib.util.find_spec(name) is None]
    if missing:
        raise BenchError(f"this Python has no {' and no '.join(missing)}: use make bench")


@contextlib.contextmanager
def temporary_folder(parent: Path | None) -> Iterator[Path]:
    """A folder that is removed at the end. Raises BenchError."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=parent, ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        longest = folder / "memory" / "us.sock"
        if len(os.fsencode(longest)) > MAX_SOCKET_PATH:
            raise BenchError(f"{longest} is too long for a socket: give a shorter --folder")
        try:
            yield folder
        finally:
            end_all()


def interrupted(number: int, frame: object) -> None:
    """SIGTERM ends it as Ctrl-C does: everything that was started is ended."""
    raise KeyboardInterrupt


def bench(args: argparse.Namespace) -> int:
    """Measure and report; the exit status. Raises BenchError."""
    tools, plan = find_tools(os.environ.get("PATH", os.defpath)), read_plan(args)
    require_packages()
    program = shlex.split(args.program) if args.program else [sys.executable, "-m", "tracker"]
    with temporary_folder(args.folder) as folder:
        machine = machine_facts(tools, folder)
        results = run_all(Stage(plan, tools, folder, program, free_ports(4)))
    print_report(machine, results, sys.stdout)
    if args.json:
        args.json.write_text(json.dumps(as_json(machine, plan, results), indent=1) + "\n")
    return 1 if results.troubles() else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit status: 0, or 1 if something could not run, a hit was lost or `check` found a fault."""
    args = command_line().parse_args(argv)
    signal.signal(signal.SIGTERM, interrupted)
    try:
        return bench(args)
    except (BenchError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench.py: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
