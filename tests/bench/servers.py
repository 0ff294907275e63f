"""Start servers, put nginx before them, ask them with wrk, and weigh them by /proc: what the benchmarks share."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import pwd
import shlex
import shutil
import signal
import socket
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

WORKERS = 2
CONNECTIONS = 32
# As long as the tracker's, and so many that none is asked for hundreds of times a minute.
KEYS = [hashlib.sha256(str(number).encode()).hexdigest()[:22] for number in range(50_000)]
TARGET = "https://acme.com/sale?a=1&b=2"
WAIT_SECONDS = 30.0  # for a server to answer first, or to end by itself
REQUEST_SECONDS = 10.0
COMMAND_SECONDS = 900.0  # `check` recounts every event
DRAIN_SECONDS = 120.0  # for what waits after a load


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


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children = [child for tasks in Path(f"/proc/{pid}/task").glob("*/children") for child in tasks.read_text().split()]
    return [pid, *(each for child in children for each in family(int(child)))]


def pss_megabytes(pid: int) -> float:
    """The proportional set size of a process and all that descend from it."""
    words = [Path(f"/proc/{each}/smaps_rollup").read_text().split() for each in family(pid)]
    return sum(int(some[some.index("Pss:") + 1]) for some in words) * 1024 / 1e6


def processor_seconds(pid: int) -> float:
    """What a process and all that descend from it took of the processor, with children that have ended."""
    # Behind the name, which may hold anything: utime, stime and both of the children that were waited for, proc(5).
    stats = [Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()[11:15] for each in family(pid)]
    return sum(int(ticks) for some in stats for ticks in some) / os.sysconf("SC_CLK_TCK")


def free_ports(count: int) -> list[int]:
    """So many, all different."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in held]


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
        self.socket.unlink(missing_ok=True)  # some servers do not take the place of one that was killed
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
        tenant = json.loads(self.command("tenant", "add", "bench", "--domain", "acme.com", "--json", "--open-writing"))
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
def nginx(folder: Path, contenders: Sequence[Contender]) -> Iterator[int]:
    """The one proxy for all, its id; a contender that does not run is a 502."""
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
    with serving("nginx", command, plain_environ(), folder / "nginx.out", address) as pid:
        yield pid


def tool(name: str) -> str:
    """Where nginx or wrk is: Debian has nginx in /usr/sbin, which is not in the PATH of all users."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}{os.pathsep}/usr/sbin")
    if found is None:
        raise BenchError(f"{name} is needed: apt install nginx wrk")
    return found


def run_wrk(
    load: Load, seconds: float, each_second: Callable[[], object] = lambda: None, least: int = 1
) -> Measurement:
    """Ask as fast as answers come, at least so many of which must be good; meanwhile look each second."""
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
    if measured.good < least:
        raise BenchError(f"{load.name}: {measured.good} good answers in {whole} s")
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
