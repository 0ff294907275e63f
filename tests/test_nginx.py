"""Real nginx before the real server, with the file that `tracker.py nginx` prints, over TLS on loopback.

What a client is told through nginx is what the server said; each answered hit is counted once, nobody is believed
about his own address, nothing that is private stands in a log, and slow or hostile clients hinder no other.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import re
import resource
import select
import shutil
import signal
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from conftest import BASE, CHROME, Server, missing
from frontend import Nginx
from load import PIXEL, data, hears_signals, kill_one, locked, rows, segments, terminate, wait_until
from test_raw import Answer, read_answers

import tracker

HOSTS = ("t.acme.test", "t.globex.test")
RATE, BURST = 30, 60  # requests a second for one address, where there is a limit
CLIENTS = 8
MOST_A_SECOND = 800  # requests of the load, so that on a fast machine too it lasts until all was done under it
LOCKED_SECONDS = 3
IDLE = 5_000
SECONDS_FOR_A_PIXEL = 5  # generous: that there is an answer is asserted, not how fast
# What a connection that nginx closed while it was idle looks like to a client that sends on it.
CLOSED = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)


# == The stage ==


@dataclass(slots=True)
class Front:
    """A running nginx before a running server, and the ids of its tenants by name."""

    nginx: Nginx
    tenants: dict[str, dict[str, Any]]

    @property
    def server(self) -> Server:
        return self.nginx.server

    def mail_id(self, name: str) -> str:
        return str(self.tenants[name]["mail_id"])

    def id(self, name: str) -> str:
        return str(self.tenants[name]["id"])

    def pixel(self, name: str, key: str) -> str:
        """The path of a pixel."""
        return f"/{self.mail_id(name)}/pixel/{key}.gif"

    def exchange(self, *pieces: bytes, source: str | None = None) -> bytes:
        """Send, say that no more will come, and read what there is."""
        with self.nginx.connect(source=source or somebody()) as connection:
            with contextlib.suppress(*CLOSED):  # nginx may have heard enough; its answer is there all the same
                for piece in pieces:
                    connection.sendall(piece)
                socket.socket.shutdown(connection, socket.SHUT_WR)  # TLS goes on reading
            return read_all(connection)

    def ask(
        self,
        target: str,
        method: str = "GET",
        *headers: str,
        host: str | None = None,
        source: str | None = None,
        body: bytes = b"",
    ) -> Answer:
        """One request on a connection of its own, for one answer; from an address of its own unless told otherwise."""
        with self.nginx.connect(host, source=source or somebody()) as connection:
            connection.sendall(request(target, method, "Connection: close", *headers, host=host, body=body))
            answers = read_answers(read_all(connection), method)
        assert len(answers) == 1
        return answers[0]

    def register(self, name: str, emails: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Register a tenant's emails."""
        answer = self.ask(f"/{self.id(name)}/emails", "POST", body=json.dumps(emails).encode())
        assert answer.status == 201, answer
        made: list[dict[str, Any]] = json.loads(answer.body)
        return made

    def exported(self, name: str, table: str) -> list[dict[str, Any]]:
        """All rows of an export."""
        answer = self.ask(f"/{self.id(name)}/{table}.json?limit=100000")
        assert answer.status == 200, answer
        page = json.loads(answer.body)
        assert page["next"] is None
        rows: list[dict[str, Any]] = page["rows"]
        return rows

    def counted(self, name: str) -> Counter[str]:
        """How many events each key of a tenant has."""
        return Counter(event["key"] for event in self.exported(name, "events"))


_numbers = itertools.count()


def somebody() -> str:
    """A loopback address from which nobody has asked so far, so that no limit of another test is met."""
    return str(IPv4Address("127.16.0.1") + next(_numbers))


def request(
    target: str, method: str = "GET", *headers: str, host: str | None = None, body: bytes = b"", version: str = "1.1"
) -> bytes:
    """The bytes of a request."""
    lines = [f"{method} {target} HTTP/{version}", f"Host: {host or 'localhost'}", f"User-Agent: {CHROME}", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def read_all(connection: socket.socket) -> bytes:
    """All that comes until the other end closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65_536):
            parts.append(part)
    return b"".join(parts)


def plain(nginx: Nginx, target: str, host: str = "localhost") -> Answer:
    """One request over plain HTTP."""
    with socket.create_connection(("127.0.0.1", nginx.http_port), timeout=20) as connection:
        connection.sendall(request(target, "GET", "Connection: close", host=host))
        [answer] = read_answers(read_all(connection))
    return answer


def is_pixel(answer: Answer) -> bool:
    """Whether an answer is that of a pixel whose hit was recorded."""
    return (answer.status, answer.body, answer.headers.get("x-tracker")) == (200, PIXEL, "recorded")


@contextlib.contextmanager
def fronts(folder: Path, *options: tuple[str, ...], connections: int = 8192) -> Iterator[Front]:
    """A running Front; each of `options` makes a tenant, its first word is the name."""
    hosts = [words[words.index("--tracking-host") + 1] for words in options if "--tracking-host" in words]
    nginx = Nginx(folder, hosts, IP_ADDRESSES="full")
    nginx.connections = connections
    try:
        # Before both start: workers and nginx know them all from the beginning.
        tenants = {words[0]: nginx.server.tenant(*words) for words in options}
        nginx.server.start()
        nginx.start()
        yield Front(nginx, tenants)
    finally:
        nginx.stop()


ACME = ("Acme", "--domain", "acme.example", "--tracking-host", HOSTS[0])
GLOBEX = ("Globex", "--any-domain", "--tracking-host", HOSTS[1])
INITECH = ("Initech",)


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """One for most tests here: it must take them one after the other without harm. Each area has its own tenant."""
    areas = [(name, "--any-domain") for name in ("Limits", "Peers", "Paths", "Sizes", "Slow", "Odd", "Raw")]
    with fronts(tmp_path_factory.mktemp("front"), ACME, GLOBEX, INITECH, *areas) as made:
        yield made
        log = made.server.stop()
    assert log.count("Booting worker") == 2, "a worker died on the way"
    assert "Traceback" not in log and "unforeseen" not in log and "unspooled" not in log


# == Under load ==


@dataclass(frozen=True, slots=True)
class Ask:
    """A request of the load. Each key is asked for once."""

    name: str  # the tenant's
    key: str
    path: str
    location: str | None  # where a click leads; None for a pixel


@dataclass(slots=True)
class Fired:
    """What became of requests. Broken ones got no answer, or nginx's 502."""

    answered: list[Ask] = field(default_factory=list)
    broken: list[Ask] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    killed: list[int] = field(default_factory=list)
    again: list[Ask] = field(default_factory=list)  # asked once more, since nginx had closed an idle connection


SENDERS = {"Acme": HOSTS[0], "Globex": HOSTS[1], "Initech": "localhost"}  # and where each one's mail asks


def load_of(front: Front, many: int) -> list[Ask]:
    """So many pixels and as many signed clicks of each tenant, in an order that mixes them."""
    asks = []
    for name, host in SENDERS.items():
        [made] = front.register(name, [{"key": "model", "links": [f"https://{name.lower()}.example/offers?a=%20b#c"]}])
        base = front.nginx.url if host == "localhost" else f"https://{host}"
        [link] = made["links"]
        assert made["pixel_url"].startswith(f"{base}/") and link["click_url"].startswith(f"{base}/")
        signed = re.sub("^https://[^/]+", "", link["click_url"])
        for number in range(many):
            asks.append(Ask(name, f"o{number}", front.pixel(name, f"o{number}"), None))
            # A signed link's key is not signed: mailing tools put in their own.
            asks.append(Ask(name, f"c{number}", signed.replace("/model/", f"/c{number}/"), link["url"]))
    return sorted(asks, key=lambda each: (int(each.key[1:]), each.key, each.name))


Deed = Callable[[Front, Fired], None]


def fire(front: Front, asks: Sequence[Ask], deeds: Sequence[tuple[int, Deed]]) -> Fired:
    """Send requests from several clients that keep their connections; do each deed when so many are answered."""
    fired = Fired()
    started = time.monotonic()
    troubles: list[BaseException] = []

    def ask(each: Ask, kept: dict[str, http.client.HTTPConnection]) -> tuple[int, str | None, bytes]:
        """Once more only on a connection that had stayed, when nothing came."""
        host, is_old = SENDERS[each.name], SENDERS[each.name] in kept
        try:
            if not is_old:
                kept[host] = http.client.HTTPConnection(host)
                kept[host].auto_open = 0
                kept[host].sock = front.nginx.connect(host, timeout=60)
            kept[host].request("GET", each.path, headers={"User-Agent": CHROME, "X-Forwarded-For": "203.0.113.7"})
            with kept[host].getresponse() as answer:
                found = answer.status, answer.getheader("Location"), answer.read()
            if kept[host].sock is None:
                del kept[host]
            return found
        except (*CLOSED, http.client.HTTPException):
            kept.pop(host).close()
            if not is_old:
                return 0, None, b""
            fired.again.append(each)
            return ask(each, kept)

    def client(share: Sequence[Ask]) -> None:
        kept: dict[str, http.client.HTTPConnection] = {}
        try:
            for number, each in enumerate(share):
                time.sleep(max(started + number * CLIENTS / MOST_A_SECOND - time.monotonic(), 0))
                status, location, body = ask(each, kept)
                (fired.broken if status in (0, 502) else fired.answered).append(each)
                right = (200, None) if each.location is None else (302, each.location)
                if status not in (0, 502) and (
                    (status, location) != right or (each.location is None and body != PIXEL)
                ):
                    fired.wrong.append(f"{each}: {status} {location}")
        except BaseException as error:
            troubles.append(error)
        finally:
            for connection in kept.values():
                connection.close()

    clients = [threading.Thread(target=client, args=(asks[start::CLIENTS],)) for start in range(CLIENTS)]
    for each_client in clients:
        each_client.start()
    try:
        for number, deed in deeds:
            wait_until(lambda: len(fired.answered) >= number or bool(troubles), front.server, 120)  # noqa: B023
            assert any(each_client.is_alive() for each_client in clients) or troubles, "the load was over before"
            deed(front, fired)
    finally:
        for each_client in clients:
            each_client.join()
    assert troubles == []
    return fired


def kill(front: Front, fired: Fired) -> None:
    """SIGKILL one of the tracker's workers."""
    fired.killed.append(kill_one(front.server))


def hang_up(front: Front, fired: Fired) -> None:
    """SIGHUP to the tracker, and wait until its workers are others."""
    server = front.server
    assert server.process is not None
    old = set(server.workers())
    wait_until(lambda: all(hears_signals(worker) for worker in server.workers()), server)
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: not old & set(server.workers()) and bool(server.workers()), server)


def children(pid: int) -> set[str]:
    return set(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def reload(front: Front, fired: Fired) -> None:
    """Let nginx load its file anew."""
    reload_and_wait(front.nginx)


def reload_and_wait(nginx: Nginx) -> None:
    """Let nginx load its file anew, and wait until its workers are others."""
    assert nginx.process is not None
    pid = nginx.process.pid
    old = children(pid)
    nginx.reload()
    wait_until(lambda: not old & children(pid) and bool(children(pid)), nginx.server)


def assert_counted_once(front: Front, asks: Sequence[Ask], outcomes: Sequence[Fired]) -> None:
    """Each answered request became one event, and of those that broke some did perhaps."""
    answered = {(each.name, each.key) for outcome in outcomes for each in outcome.answered}
    broken = {(each.name, each.key) for outcome in outcomes for each in outcome.broken}
    assert not answered & broken and answered | broken == {(each.name, each.key) for each in asks}
    assert terminate(front.server) == 0
    assert segments(front.server) == [] and os.listdir(data(front.server) / "spool" / "rejected") == []
    assert front.server.run("check") == "all is well\n"
    names = "select name, key from events join emails on emails.id = email join tenants on number = events.tenant"
    found = Counter(rows(front.server, names))
    assert [which for which, number in found.items() if number > 1] == []
    assert answered <= set(found) <= answered | broken
    assert {row[0] for row in rows(front.server, "select distinct address from events")} == {"127.0.0.1"}


@pytest.fixture
def senders(tmp_path: Path) -> Iterator[Front]:
    """A front with the three tenants of the load, of which two have tracking hosts."""
    with fronts(tmp_path, ACME, GLOBEX, INITECH) as made:
        yield made


def test_reloads_of_nginx_and_of_the_tracker_under_load_break_no_request_and_every_hit_is_counted_once(
    senders: Front,
) -> None:
    asks = load_of(senders, 300)
    fired = fire(senders, asks, [(200, reload), (400, hang_up), (900, reload), (1_200, hang_up)])
    assert fired.wrong == [] and fired.broken == []
    # A client has at most one idle connection to each host that a reload may close.
    assert len(fired.again) <= 2 * CLIENTS * len(SENDERS)
    assert_counted_once(senders, asks, [fired])


def test_every_answered_hit_is_counted_once_while_workers_die_the_database_is_locked_and_all_is_reloaded(
    senders: Front,
) -> None:
    asks = load_of(senders, 400)
    fired = [fire(senders, asks[:900], [(100, kill), (250, reload), (400, hang_up)])]
    with locked(data(senders.server) / "tracking.db"):
        release_at = time.monotonic() + LOCKED_SECONDS
        fired.append(fire(senders, asks[900:1_500], [(200, kill)]))  # all are answered although the lock is held
        time.sleep(max(release_at - time.monotonic(), 0))
    fired.append(fire(senders, asks[1_500:], [(100, kill), (250, hang_up), (500, reload), (700, kill)]))
    assert [wrong for outcome in fired for wrong in outcome.wrong] == []
    killed = [pid for outcome in fired for pid in outcome.killed]
    assert len(set(killed)) == 4
    assert sum(len(outcome.broken) for outcome in fired) <= len(killed)  # a worker has one request at a time
    assert sum(len(outcome.again) for outcome in fired) <= 2 * CLIENTS * len(SENDERS)
    assert_counted_once(senders, asks, fired)


# == Limits by address ==


def pipelined(front: Front, targets: Sequence[str], source: str, at_once: int = 100) -> list[Answer]:
    """Ask for all on one connection, so many in one write, and read the answers in order."""
    answers = []
    for start in range(0, len(targets), at_once):
        *some, last = targets[start : start + at_once]
        requests = [*(request(each) for each in some), request(last, "GET", "Connection: close")]
        with front.nginx.connect(source=source) as connection:
            connection.sendall(b"".join(requests))
            answers += read_answers(read_all(connection))
    return answers


def test_thousands_of_pixels_and_signed_links_from_one_address_are_all_answered(front: Front) -> None:
    [made] = front.register("Limits", [{"links": ["https://limits.example/"]}])
    click = made["links"][0]["click_url"].removeprefix(front.nginx.url)
    pixels = [front.pixel("Limits", f"quick-{number}%2E") for number in range(1_000)]
    answers = pipelined(front, [path for pixel in pixels for path in (pixel, click)], somebody())
    assert len(answers) == 2_000
    assert all(is_pixel(answer) for answer in answers[::2])
    assert {(answer.status, answer.headers.get("location")) for answer in answers[1::2]} == {
        (302, "https://limits.example/")
    }
    times = front.counted("Limits")
    assert times[made["key"]] == 1_000
    assert [times[f"quick-{number}."] for number in range(1_000)] == [1] * 1_000


LIMITED = {  # method, target, and the status where it is not refused
    "dashboard": ("GET", "/{id}/dashboard", 200),
    "a dashboard that is not there": ("GET", "/0123456789abcdef/dashboard", 404),
    "numbers": ("GET", "/{id}/stats.json", 200),
    "API": ("DELETE", "/{id}/emails/nobody", 404),
    "operator": ("POST", "/tenants", 404),
    "a pixel's path with a slash too many": ("GET", "//{mail_id}/pixel/burst.gif", 404),
    "plain link": ("GET", "/{mail_id}/click/burst?url=https%3A%2F%2Flimits.example%2F", 302),
}


@pytest.mark.parametrize("what", LIMITED)
def test_a_burst_from_one_address_is_refused_after_sixty_and_nobody_else_is(what: str, front: Front) -> None:
    method, target, good = LIMITED[what]
    target = target.format(id=front.id("Limits"), mail_id=front.mail_id("Limits"))
    greedy = somebody()
    with ExitStack() as stack:
        many = [stack.enter_context(front.nginx.connect(source=greedy, timeout=60)) for _ in range(100)]
        started = time.monotonic()
        for connection in many:  # all arrive together, however long the answers take
            connection.sendall(request(target, method, "Connection: close"))
        sent_within = time.monotonic() - started
        statuses = Counter(read_answers(read_all(connection))[0].status for connection in many)
    assert set(statuses) == {good, 429}
    assert 1 + BURST <= statuses[good] <= 2 + BURST + RATE * (sent_within + 1)
    assert front.ask(target, method, source=somebody()).status == good
    assert front.ask(target, method, source="127.0.0.9").status == good
    assert is_pixel(front.ask(front.pixel("Limits", "greedy"), source=greedy))


# == Whose address ==


@pytest.mark.parametrize(
    "headers",
    [
        ("X-Forwarded-For: 203.0.113.7",),
        ("X-Forwarded-For: 203.0.113.7, 127.0.0.1",),
        ("X-Forwarded-For: 203.0.113.7", "X-Forwarded-For: 203.0.113.8"),
        ("x-forwarded-for:203.0.113.7",),
        ("X_Forwarded_For: 203.0.113.7",),
        ("X-Forwarded-For: ",),
        ("X-Forwarded-For: 203.0.113.7", "Connection: X-Forwarded-For"),
        ("X-Real-IP: 203.0.113.7", "Forwarded: for=203.0.113.7", "Client-IP: 203.0.113.7"),
        ("X-Forwarded-Host: evil.example", "X-Forwarded-Proto: http", "X-Forwarded-Port: 1"),
        ("Proxy: http://203.0.113.7", "Remote-Addr: 203.0.113.7"),
    ],
    ids=lambda headers: " | ".join(headers),
)
@pytest.mark.parametrize("source", ["127.0.0.1", "127.0.0.77"])
def test_what_a_client_says_of_its_own_address_is_not_believed(
    source: str, headers: tuple[str, ...], front: Front
) -> None:
    key = f"liar-{next(_numbers)}"
    with front.nginx.connect(source=source) as connection:
        connection.sendall(request(front.pixel("Peers", key), "GET", *headers))
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
    found = [event["ip_address"] for event in front.exported("Peers", "events") if event["key"] == key]
    assert found == [source]


# == Logs ==


LOG_LINE = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\S* (?:[A-Z]+|-) "
    r"/(?:-(?:/(?:pixel|click|dashboard|stats|emails|events|links))?|health|assets|robots\.txt|favicon\.ico|) "
    r"[2-5]\d\d \d+ \d+\.\d{3}"
)
KEY = "a-key-that-nobody-may-read"
TARGET = "https://shop.acme.example/a-target-that-nobody-may-read"
LOGGED = {  # method and target; how the log calls it
    "GET /{id}/dashboard": "/-/dashboard",
    "HEAD /{id}/dashboard": "/-/dashboard",
    "GET /{id}/stats.json": "/-/stats",
    "GET /{id}/emails.json?after={key}": "/-/emails",
    "POST /{id}/emails": "/-/emails",
    "GET /{mail_id}/pixel/{key}.gif": "/-/pixel",
    "GET /{mail_id}/pixel/{key}.gif?to=reader@reader.example": "/-/pixel",
    "GET /{mail_id}/click/{key}?url={target}": "/-/click",
    "GET /{mail_id}/click/{key}/c2lnbmF0dXJlMTIz/aHR0cHM6Ly9hY21lLmV4YW1wbGUv": "/-/click",
    "GET //{id}/dashboard": "/",
    "GET /{id}//dashboard": "/-",
    "GET /{id}/": "/-",
    "GET /{id}/{key}": "/-",
    "GET /%2F{id}/dashboard": "/-/dashboard",
    "GET /health?{id}": "/health",
    "GET /healthy/{id}": "/-",
    "GET /assets/{id}": "/assets",
    "GET /robots.txt{id}": "/-",
    "GET /?{id}": "/",
    "GET https://localhost/{id}/dashboard": "/-/dashboard",
}
REFUSED_AND_LOGGED = (  # nginx answers these itself, since it can't read them
    "GET /{id}/%zz/{key}",
    "GET /{id}/../../{key}",
    "GET /{id}/a b/{key}",
    "TRACE /{id}/dashboard",
    "CONNECT {id}.example:443",
)


def private_words(front: Front) -> list[str]:
    """What no log may hold."""
    ids = [front.id("Acme"), front.mail_id("Acme"), KEY]
    return [*ids, "a-target-that-nobody-may-read", "acme.example", "reader", "c2lnbmF0dXJl", "127.0.0.", "127.16."]


def filled(front: Front, text: str) -> str:
    names = {"id": front.id("Acme"), "mail_id": front.mail_id("Acme"), "key": KEY, "target": TARGET}
    return text.format(**names)


def logs(nginx: Nginx) -> dict[str, str]:
    """All that nginx has written, by the file's name."""
    return {path.name: path.read_text() for path in (nginx.folder / "logs").iterdir()}


def ask_in_private(front: Front, line: str) -> None:
    """Ask for one of the targets above."""
    body = json.dumps({"key": KEY, "recipient": "reader@reader.example", "links": [TARGET]}).encode()
    headers = ("Connection: close", "Referer: https://reader.example/", "X-Forwarded-For: 127.0.0.99", f"Cookie: {KEY}")
    method, _, target = filled(front, line).partition(" ")
    text = request(target, method, *headers, body=body if method == "POST" else b"")
    assert front.exchange(text).startswith(b"HTTP/1.1 ")


def assert_logs_are_discreet(front: Front) -> None:
    for name, text in logs(front.nginx).items():
        told = [line for line in text.splitlines() for word in private_words(front) if word in line]
        assert told == [], name


def test_the_access_log_says_what_was_asked_for_and_no_id_key_target_or_address(front: Front) -> None:
    log = front.nginx.folder / "logs" / "email-tracker.access.log"
    for asked in (*LOGGED, *REFUSED_AND_LOGGED):
        mark = log.stat().st_size
        ask_in_private(front, asked)
        wait_until(lambda: log.stat().st_size > mark, front.server)  # noqa: B023
        [line] = log.read_text()[mark:].splitlines()
        assert LOG_LINE.fullmatch(line), asked
        assert asked not in LOGGED or line.split()[2] == LOGGED[asked], asked
    front.exchange(b"\x16\x03 " + front.id("Acme").encode() + b"\r\n\r\n")
    assert_logs_are_discreet(front)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_no_log_names_anything_private_after_the_tracker_was(how: str, tmp_path: Path) -> None:
    with fronts(tmp_path, ACME, GLOBEX) as front:
        process = front.server.process
        assert process is not None
        if how == "killed":
            for pid in (process.pid, *front.server.workers()):
                os.kill(pid, signal.SIGKILL)
            process.wait()  # its socket stays behind, and refuses
        else:
            front.server.stop()  # its socket is gone
        assert front.ask(front.pixel("Acme", KEY)).status == 502
        assert front.ask(f"/{front.id('Acme')}/dashboard").status == 502
        for line in LOGGED:
            ask_in_private(front, line)
        assert_logs_are_discreet(front)


def test_no_log_names_anything_private_when_nginx_has_no_connection_left(tmp_path: Path) -> None:
    with fronts(tmp_path, ACME, GLOBEX, connections=24) as front, ExitStack() as stack:
        text = request(f"/{front.id('Acme')}/dashboard", "GET", "Connection: close")
        many: list[socket.socket] = []
        with contextlib.suppress(OSError):  # where there is none left for the client either
            while len(many) < 60:
                many.append(stack.enter_context(front.nginx.connect(source=somebody(), timeout=2)))
                many[-1].sendall(text[:20])
        for connection in many:
            with contextlib.suppress(*CLOSED):
                connection.sendall(text[20:])
        statuses = {read_all(connection)[9:12] for connection in many}
        assert statuses & {b"500", b"502"}  # so some found none
        assert_logs_are_discreet(front)


# == Certificates ==


def https_works(nginx: Nginx, host: str) -> bool:
    with contextlib.suppress(OSError), nginx.connect(host):
        return True
    return False


def test_nginx_serves_proofs_before_any_certificate_exists_and_redirects_to_tls_once_there_is_one(
    tmp_path: Path,
) -> None:
    nginx = Nginx(tmp_path, [HOSTS[0]])
    certificates, aside = nginx.folder / "certificates", nginx.folder / "aside"
    hosts = ("localhost", HOSTS[0])
    aside.mkdir()
    for host in hosts:
        shutil.move(certificates / host, aside / host)
    (nginx.folder / ".well-known" / "acme-challenge").mkdir(parents=True)
    (nginx.folder / ".well-known" / "acme-challenge" / "x").write_text("the proof")

    def come(host: str) -> None:
        """The certificate comes, and one does what README says."""
        shutil.move(aside / host, certificates / host)
        nginx.write()
        reload_and_wait(nginx)
        assert https_works(nginx, host)

    def proofs() -> list[tuple[int, bytes]]:
        found = [plain(nginx, "/.well-known/acme-challenge/x", host) for host in hosts]
        assert {answer.headers["content-type"] for answer in found} == {"text/plain"}
        return [(answer.status, answer.body) for answer in found]

    try:
        acme = nginx.server.tenant(*ACME)
        nginx.server.start()
        nginx.start()
        path = f"/{acme['mail_id']}/pixel/a%2Eb.gif?x=1&y=%20//z"
        proof = (200, b"the proof")
        assert proofs() == [proof, proof]
        assert plain(nginx, "/.well-known/acme-challenge/y").status == 404
        assert [plain(nginx, path, host).status for host in hosts] == [503, 503]
        assert not https_works(nginx, "localhost")

        come("localhost")
        front = Front(nginx, {"Acme": acme})
        assert proofs() == [proof, proof]
        answer = plain(nginx, path)
        assert (answer.status, answer.headers["location"]) == (301, nginx.url + path)
        assert plain(nginx, path, HOSTS[0]).status == 503  # its own is not there yet
        assert front.ask("/health").status == 200

        come(HOSTS[0])
        assert proofs() == [proof, proof]
        for odd in (path, "//a//b", f"/{acme['id']}/dashboard?range=7d", "/a%2Fb%2E?", "/"):
            for host in hosts:
                answer = plain(nginx, odd, host)
                assert (answer.status, answer.headers["location"]) == (301, f"https://{host}:{nginx.port}{odd}")
        assert is_pixel(front.ask(path, host=HOSTS[0]))
    finally:
        nginx.stop()


def test_a_host_with_a_long_name_keeps_nginx_from_nothing_and_has_its_own_server(tmp_path: Path) -> None:
    long, longer = "a-host-of-sixty-characters-which-nginx-has-no-room.acme.test", f"{'x' * 63}.{'y' * 63}.globex.test"
    nginx = Nginx(tmp_path, [long])
    try:
        acme = nginx.server.tenant("Acme", "--tracking-host", long)
        globex = nginx.server.tenant("Globex", "--tracking-host", longer)
        nginx.server.start()
        nginx.start()
        front = Front(nginx, {"Acme": acme, "Globex": globex})
        path = front.pixel("Acme", "long")
        assert is_pixel(front.ask(path, host=long))  # by its own certificate
        answer = plain(nginx, path, long)
        assert (answer.status, answer.headers["location"]) == (301, f"https://{long}:{nginx.port}{path}")
        assert plain(nginx, path, longer).status == 503  # which has none so far
        for other in (f"x{long}", f"{long}x", long.replace(".", "x")):
            assert plain(nginx, path, other).headers["location"].startswith(nginx.url)  # as the first host
    finally:
        nginx.stop()


# == Paths ==

# A target; the status of its answer, and what becomes of it: the key that is recorded, or X-Tracker's word.
READ_ALIKE = {
    "/{m}/pixel/plain.gif": (200, "plain"),
    "/{m}/pixel/a%2Eb.gif": (200, "a.b"),
    "/{m}/pixel/e.f.gif.gif": (200, "e.f.gif"),
    "/{m}/pixel/n%2Bo%40p%3Dq%3Ar%7es.gif": (200, "n+o@p=q:r~s"),
    "/{m}/pixel/u.gif?/../../x": (200, "u"),
    "/{m}/pixel/v.gif?a//b=%2F&%zz": (200, "v"),
    "/{m}/pixel/...gif": (200, "(bad key)"),
    "/{m}/pixel/w%2Fx.gif": (200, "(bad key)"),
    "/{m}/pixel/z%252E.gif": (200, "(bad key)"),
    "/{m}/pixel/z%0A.gif": (200, "(bad key)"),
    "/{m}/pixel/z\\y.gif": (200, "(bad key)"),
    "/{m}/pixel/z%E9.gif": (200, "(bad key)"),
    "//{m}/pixel/x.gif": (404, None),
    "/{m}//pixel/x.gif": (404, None),
    "/{m}/pixel/x.gif/": (404, None),
    "/{m}/./pixel/x.gif": (404, None),
    "/{m}/pixel/y/../x.gif": (404, None),
    "/{m}/pixel/%2E%2E/pixel/x.gif": (404, None),
    "/{m}/pixel/..": (404, None),
    "/{m}%2Fpixel/x.gif": (404, None),
    "/%2F{m}/pixel/x.gif": (200, "(unknown tenant)"),
    "/{m}/pixel/x.gif#part": (404, None),
    "/{m}/pixel/x.GIF": (404, None),
    "/{id}/dashboard/": (404, None),
    "/{id}//dashboard": (404, None),
    "/x/../{id}/dashboard": (404, None),
    "/{id}/%64ashboard": (200, None),
    "/{m}/pixel/..%2F..%2F{id}%2Fdashboard": (404, None),
    "/../{m}/pixel/x.gif": (400, None),
    "/{m}/pixel/x%00.gif": (400, None),
}


@pytest.mark.parametrize("target", READ_ALIKE)
def test_nginx_and_the_tracker_read_the_same_path(target: str, front: Front) -> None:
    status, becomes = READ_ALIKE[target]
    before = front.counted("Paths")
    answer = front.ask(target.format(m=front.mail_id("Paths"), id=front.id("Paths")))
    assert answer.status == status
    recorded = front.counted("Paths") - before
    if becomes is None:
        assert "x-tracker" not in answer.headers and answer.body != PIXEL
    elif becomes.startswith("("):
        assert answer.body == PIXEL and answer.headers["x-tracker"] == becomes.strip("()")
    else:
        assert is_pixel(answer)
    assert recorded == Counter([becomes] if becomes and "(" not in becomes else [])


def test_a_host_that_belongs_to_one_tenant_answers_for_no_other(front: Front) -> None:
    for host, owner, other in ((HOSTS[0], "Acme", "Globex"), (HOSTS[1], "Globex", "Acme")):
        assert is_pixel(front.ask(front.pixel(owner, "mine"), host=host))
        assert front.ask(front.pixel(other, "not-mine"), host=host).headers["x-tracker"] == "wrong host"
        assert front.ask(f"/{front.id(owner)}/dashboard", host=host).status == 200
        assert front.ask(f"/{front.id(other)}/dashboard", host=host).status == 404
    for name in ("Acme", "Globex"):
        times = front.counted(name)
        assert (times["mine"], times["not-mine"]) == (1, 0)


# == Sizes ==


def recorded_urls(front: Front, key: str) -> list[str]:
    return [event["url"] for event in front.exported("Sizes", "events") if event["key"] == key]


def test_a_request_line_of_sixteen_kilobytes_reaches_the_tracker_and_a_longer_one_is_414(front: Front) -> None:
    base = f"/{front.mail_id('Sizes')}/click/long?url="
    spare = 16_384 - len(f"GET {base} HTTP/1.1\r\n")
    answer = front.ask(base + "a" * (spare - 1))
    assert answer.status == 400 and b"This link" in answer.body  # the tracker's page
    assert front.ask(base + "a" * (spare + 1)).status == 414
    assert recorded_urls(front, "long") == []


LONG = {  # targets at the limits
    "4,096 characters of ASCII": "https://sizes.example/".ljust(4_096, "a"),
    "4,096 characters of two bytes each": "https://sizes.example/".ljust(4_096, "\xe9"),
}


@pytest.mark.parametrize("what", LONG)
def test_a_link_with_the_longest_target_redirects_and_is_recorded(what: str, front: Front) -> None:
    [made] = front.register("Sizes", [{"links": [LONG[what]]}])
    signed = made["links"][0]["click_url"].removeprefix(front.nginx.url)
    encoded = "".join(f"%{byte:02X}" for byte in LONG["4,096 characters of ASCII"].encode())
    plain = f"/{front.mail_id('Sizes')}/click/{made['key']}?url={encoded}"
    targets = (LONG[what], LONG["4,096 characters of ASCII"])
    for path, target in zip((signed, plain), targets, strict=True):
        answer = front.ask(path)
        assert (answer.status, answer.headers.get("location")) == (302, quote(target, safe=":/"))
    assert sorted(recorded_urls(front, made["key"])) == sorted(targets)


@pytest.mark.parametrize("chunked", [False, True], ids=["Content-Length", "chunked"])
def test_a_body_of_ten_megabytes_is_read_and_a_byte_more_is_413(chunked: bool, front: Front) -> None:
    key = f"sized-{chunked}"
    whole = json.dumps({"key": key}).encode().ljust(10 << 20)

    def post(body: bytes) -> Answer:
        path = f"/{front.id('Sizes')}/emails"
        head = request(path, "POST", "Transfer-Encoding: chunked") if chunked else request(path, "POST", body=body)
        pieces = [head.removesuffix(body)] if not chunked else [head]
        for start in range(0, len(body), 1 << 20):
            part = body[start : start + (1 << 20)]
            pieces.append(b"%x\r\n%s\r\n" % (len(part), part) if chunked else part)
        [answer] = read_answers(front.exchange(*pieces, b"0\r\n\r\n" if chunked else b""))
        return answer

    refused = post(whole.replace(b"sized", b"large") + b" ")
    assert refused.status == 413 and b"nginx" in refused.body  # the tracker need not read it
    assert post(whole).status == 201
    assert {row["key"] for row in front.exported("Sizes", "emails")} & {key, f"large-{chunked}"} == {key}


# == Slow and odd clients ==

Tick = Callable[[], None]
Hold = Callable[[Front, ExitStack], tuple[Tick, Tick]]


def slowly(front: Front, stack: ExitStack, texts: Sequence[tuple[bytes, bytes]]) -> tuple[Tick, Tick]:
    """Clients that send the first part of a request at once and the second at a byte a second."""
    connections = [stack.enter_context(front.nginx.connect(source=somebody())) for _ in texts]
    for connection, (first, _) in zip(connections, texts, strict=True):
        connection.sendall(first)
    sent = itertools.count()

    def send(most: int) -> None:
        place = next(sent)
        for connection, (_, second) in zip(connections, texts, strict=True):
            connection.sendall(second[place : place + most])

    def finish() -> None:
        send(1 << 20)
        assert all(read_answers(read_all(connection))[0].status in (200, 201) for connection in connections)

    return lambda: send(1), finish


def slow_headers(front: Front, stack: ExitStack) -> tuple[Tick, Tick]:
    """A hundred clients send their headers at a byte a second."""
    paths = [front.pixel("Slow", f"slow-{number}") for number in range(100)]
    return slowly(front, stack, [(b"", request(path, "GET", "Connection: close")) for path in paths])


def slow_bodies(front: Front, stack: ExitStack) -> tuple[Tick, Tick]:
    """Twenty clients send the emails that they register at a byte a second."""
    path, bodies = f"/{front.id('Slow')}/emails", [b'{"key": "slow-body-%d"}' % number for number in range(20)]
    heads = [request(path, "POST", "Connection: close", body=body).removesuffix(body) for body in bodies]
    return slowly(front, stack, list(zip(heads, bodies, strict=True)))


def half_requests(front: Front, stack: ExitStack) -> tuple[Tick, Tick]:
    """A hundred clients connect, a third of them without TLS; they send half a request or nothing, and no more."""
    connections: list[socket.socket] = []
    for number in range(100):
        if number % 3:
            text = request(front.pixel("Slow", "never"))
            tls = stack.enter_context(front.nginx.connect(source=somebody()))
            tls.sendall(text[: len(text) // 2] if number % 3 == 1 else b"")
            connections.append(tls)
        else:
            connections.append(
                stack.enter_context(socket.create_connection(("127.0.0.1", front.nginx.port), timeout=20))
            )

    def finish() -> None:
        assert not closed(connections)
        assert front.counted("Slow")["never"] == 0

    return lambda: None, finish


def unread_answers(front: Front, stack: ExitStack) -> tuple[Tick, Tick]:
    """Clients ask for megabytes, by an export or by very many pixels, and never read them."""
    mail = [{"key": f"bulk-{number}", "subject": "x" * 900} for number in range(1_000)]
    for start in range(3):
        front.register("Slow", [{**each, "key": f"{each['key']}-{start}"} for each in mail])

    def connect() -> ssl.SSLSocket:
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.bind((somebody(), 0))
        plain.settimeout(20)
        plain.connect(("127.0.0.1", front.nginx.port))
        return stack.enter_context(front.nginx.context().wrap_socket(plain, server_hostname="localhost"))

    connections = []
    for _ in range(3):  # one after the other, since one export at a time is all that there is
        connections.append(connect())
        connections[-1].sendall(request(f"/{front.id('Slow')}/emails.json", "GET", "Connection: close"))
        assert connections[-1].recv(15) == b"HTTP/1.1 200 OK"
        # It is out of the tracker's hands at once, although the client has it not, and never will.
        wait_until(
            lambda: front.ask(f"/{front.id('Slow')}/emails.csv?limit=1").status == 200,
            front.server,
            SECONDS_FOR_A_PIXEL,
        )
    for _ in range(10):
        connections.append(connect())
        connections[-1].sendall(request(front.pixel("Slow", "unread")) * 100)

    def finish() -> None:
        assert not closed(connections)

    return lambda: None, finish


def idle_connections(front: Front, stack: ExitStack) -> tuple[Tick, Tick]:
    """Thousands of clients keep their connections after an answer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < IDLE + 500:
        missing(f"the right to have {IDLE} open connections")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, IDLE + 500), hard))
    stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
    connections: dict[socket.socket, float] = {}  # and since when
    troubles: list[BaseException] = []

    def client() -> None:
        try:
            for _ in range(IDLE // CLIENTS):
                connection = front.nginx.connect(source="127.0.2.1")
                connections[connection] = time.monotonic()
                connection.sendall(request("/robots.txt"))
                # It is above the limit for an address, so nginx answers most of them by itself.
                assert connection.recv(12) in (b"HTTP/1.1 200", b"HTTP/1.1 429")
                assert connection.recv(65_536)
        except BaseException as error:
            troubles.append(error)

    clients = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    for connection in connections:
        stack.callback(connection.close)
    if troubles:
        raise troubles[0]

    def finish() -> None:
        assert len(connections) == IDLE
        # nginx closes them after 30 s, which a slow machine may need to open them all.
        assert not closed(each for each, since in connections.items() if time.monotonic() - since < 25)

    return lambda: None, finish


def closed(connections: Iterable[socket.socket]) -> list[int]:
    """The connections that the other end has closed. Nothing is read."""
    poll = select.poll()
    for connection in connections:
        poll.register(connection, select.POLLRDHUP)
    return [fd for fd, _ in poll.poll(0)]


HELD: dict[str, tuple[Hold, float]] = {  # and for how long
    "send their headers a byte a second": (slow_headers, 3),
    "send their bodies a byte a second": (slow_bodies, 3),
    "send half a request and no more": (half_requests, 1),
    "never read what they asked for": (unread_answers, 1),
    "keep five thousand idle connections": (idle_connections, 1),
}


@pytest.mark.parametrize("what", HELD)
def test_pixels_are_answered_while_other_clients(what: str, front: Front) -> None:
    hold, seconds = HELD[what]
    with ExitStack() as stack:
        tick, finish = hold(front, stack)
        started = time.monotonic()
        ticks = 0
        for number in range(50):
            if time.monotonic() - started >= ticks:
                ticks += 1
                tick()
            asked = time.monotonic()
            assert is_pixel(front.ask(front.pixel("Slow", f"{hold.__name__}-{number}")))
            assert time.monotonic() - asked < SECONDS_FOR_A_PIXEL
            time.sleep(max(started + (number + 1) * seconds / 50 - time.monotonic(), 0))
        finish()
    times = front.counted("Slow")
    assert [times[f"{hold.__name__}-{number}"] for number in range(50)] == [1] * 50


@contextlib.contextmanager
def frozen(server: Server) -> Iterator[None]:
    """Workers that do nothing meanwhile."""
    workers = server.workers()
    try:
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        yield
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGCONT)


@pytest.mark.parametrize("known", [False, True], ids=["on a new connection", "on one that was used before"])
@pytest.mark.parametrize("busy", [False, True], ids=["at once", "while the tracker is busy"])
def test_a_client_that_leaves_right_after_asking_is_counted(busy: bool, known: bool, front: Front) -> None:
    log = front.nginx.folder / "logs" / "email-tracker.access.log"
    mark = log.stat().st_size
    keys = [f"left-{busy}-{known}-{number}" for number in range(50)]
    with ExitStack() as stack:
        connections = [stack.enter_context(front.nginx.connect(source=somebody())) for _ in keys]
        for connection in connections if known else ():
            connection.sendall(request(front.pixel("Odd", "first")))
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
        with frozen(front.server) if busy else contextlib.nullcontext():
            for key, connection in zip(keys, connections, strict=True):
                connection.sendall(request(front.pixel("Odd", key)))
                connection.close()
            time.sleep(0.3 if busy else 0)  # nginx sees that they have gone
    hits = 100 if known else 50
    wait_until(lambda: log.read_text()[mark:].count("/-/pixel") >= hits, front.server)
    # 499 would be a reader whose request nginx took back.
    assert Counter(line.split()[3] for line in log.read_text()[mark:].splitlines()) == {"200": hits}
    times = front.counted("Odd")
    assert [times[key] for key in keys] == [1] * 50


def test_twenty_requests_in_one_write_get_twenty_answers_in_order_and_are_twenty_hits(front: Front) -> None:
    urls = [f"https://odd.example/{number}" for number in range(10)]
    [made] = front.register("Odd", [{"key": "pipeline", "links": urls}])
    clicks = [link["click_url"].removeprefix(front.nginx.url) for link in made["links"]]
    pixel = front.pixel("Odd", "pipeline")
    answers = pipelined(front, [path for click in clicks for path in (pixel, click)], somebody())
    assert len(answers) == 20
    assert all(is_pixel(answer) for answer in answers[::2])
    assert [answer.headers["location"] for answer in answers[1::2]] == urls
    events = [event["url"] for event in front.exported("Odd", "events") if event["key"] == "pipeline"]
    assert Counter(events) == Counter([*(None for _ in urls), *urls])


# == One request that would be two ==

NO = frozenset({400, 405, 411, 414, 431, 501, 505})  # what nginx says to what it can't read in one way only
YES = frozenset({200})
EITHER = NO | YES


@dataclass(frozen=True, slots=True)
class Shape:
    """A request with another inside, which must never be read as one of its own. {inner} is the inner one's length."""

    head: str  # after "GET PIXEL HTTP/1.1"
    body: str = "{inner}"
    statuses: frozenset[int] = NO
    first: str = "GET {outer} HTTP/1.1\r\nHost: localhost\r\n"


LENGTH = "Content-Length: {length}\r\n"
CHUNKS = "{hex}\r\n{inner}\r\n0\r\n\r\n"
ENDED = "0\r\n\r\n{inner}"
SHAPES = {
    # The inner one is the body, by whichever header one goes.
    "a body with a length": Shape(LENGTH, statuses=YES),
    "a body in chunks": Shape("Transfer-Encoding: chunked\r\n", CHUNKS, YES),
    "CL.TE": Shape(LENGTH + "Transfer-Encoding: chunked\r\n", ENDED),
    "TE.CL": Shape("Content-Length: 4\r\nTransfer-Encoding: chunked\r\n", CHUNKS),
    "TE after a vertical tab": Shape(LENGTH + "Transfer-Encoding: \x0bchunked\r\n", ENDED),
    "TE folded": Shape(LENGTH + "Transfer-Encoding:\r\n chunked\r\n", ENDED),
    "TE chunked, identity": Shape(LENGTH + "Transfer-Encoding: chunked, identity\r\n", ENDED),
    "TE twice": Shape(LENGTH + "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", ENDED),
    "TE with an underscore": Shape(LENGTH + "Transfer_Encoding: chunked\r\n", ENDED, YES),
    "TE with a space before its colon": Shape(LENGTH + "Transfer-Encoding : chunked\r\n", ENDED, EITHER),
    "TE after a bare line feed": Shape(LENGTH + "X-A: b\nTransfer-Encoding: chunked\r\n", ENDED),
    "TE after a bare carriage return": Shape(LENGTH + "X-A: b\rTransfer-Encoding: chunked\r\n", ENDED, EITHER),
    "two lengths": Shape("Content-Length: 0\r\n" + LENGTH),
    "a length with a plus": Shape("Content-Length: +{length}\r\n"),
    "a length that overflows": Shape("Content-Length: 18446744073709551616\r\n"),
    "a length with an underscore": Shape("Content_Length: 0\r\n" + LENGTH, statuses=YES),
    "NUL in a value": Shape(LENGTH + "X-A: b\0c\r\n"),
    "chunks with extensions": Shape("Transfer-Encoding: chunked\r\n", CHUNKS.replace("{hex}", "{hex};a=b"), EITHER),
    "a chunk with 0x": Shape("Transfer-Encoding: chunked\r\n", CHUNKS.replace("{hex}", "0x{hex}")),
    "a chunk that is too short": Shape("Transfer-Encoding: chunked\r\n", "2\r\n{inner}\r\n0\r\n\r\n"),
    "no host": Shape(LENGTH, first="GET {outer} HTTP/1.1\r\n"),
    "absolute form": Shape(
        LENGTH, statuses=YES, first="GET https://localhost{outer} HTTP/1.1\r\nHost: other.example\r\n"
    ),
    "an upgrade": Shape(LENGTH + "Connection: Upgrade\r\nUpgrade: h2c\r\n", statuses=YES),
    "HTTP/2.0": Shape(LENGTH, first="GET {outer} HTTP/2.0\r\nHost: localhost\r\n"),
    "CONNECT": Shape(LENGTH, first="CONNECT localhost:443 HTTP/1.1\r\nHost: localhost\r\n"),
}


@pytest.mark.parametrize("what", SHAPES)
def test_a_request_inside_another_is_never_carried_out(what: str, front: Front) -> None:
    shape = SHAPES[what]
    outer, kept, number = f"outer-{next(_numbers)}", f"kept-{next(_numbers)}", next(_numbers)
    front.register("Raw", [{"key": kept}])
    inner = (
        request(front.pixel("Raw", f"smuggled-{number}"))
        + request(f"/{front.id('Raw')}/emails/{kept}", "DELETE")
        + request(f"/{front.id('Raw')}/emails", "POST", body=json.dumps({"key": f"smuggled-{number}"}).encode())
    ).decode("latin-1")
    body = shape.body.replace("{hex}", f"{len(inner):x}").replace("{inner}", inner)
    head = shape.first.replace("{outer}", front.pixel("Raw", outer)) + shape.head + "\r\n"
    head = head.replace("{length}", str(len(body))).replace("{hex}", f"{len(body):x}")
    answers = read_answers(front.exchange((head + body).encode("latin-1")))

    assert len(answers) == 1
    assert answers[0].status in shape.statuses
    answered = is_pixel(answers[0])
    assert answered is (answers[0].status == 200)
    assert is_pixel(front.ask(front.pixel("Raw", f"after-{number}")))  # the next one is its own
    times = front.counted("Raw")
    assert times[outer] == answered
    assert times[f"smuggled-{number}"] == 0
    assert times[f"after-{number}"] == 1
    emails = {row["key"] for row in front.exported("Raw", "emails") if row["registered"]}
    assert kept in emails and f"smuggled-{number}" not in emails


@pytest.mark.parametrize("end", ["\r\n", "\n", "?a\nX-A: b HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_http_0_9_gets_bytes_and_what_follows_it_is_not_read(end: str, front: Front) -> None:
    number = next(_numbers)
    first = f"GET {front.pixel('Raw', f'old-{number}')}{end}".encode()
    answer = front.exchange(first + request(front.pixel("Raw", f"smuggled-{number}")))
    assert answer == PIXEL or answer.startswith(b"HTTP/1.1 400 ")
    times = front.counted("Raw")
    assert (times[f"old-{number}"], times[f"smuggled-{number}"]) == (answer == PIXEL, 0)
    assert is_pixel(front.ask(front.pixel("Raw", "after-0-9")))


def test_a_name_that_nobody_has_is_answered_as_the_first_host(front: Front) -> None:
    answer = front.ask(front.pixel("Raw", "host"), "GET", "Host: evil.example")
    assert answer.status == 400  # two hosts
    text = request(front.pixel("Raw", "host"), "GET", "Connection: close").replace(b"localhost", b"evil.example")
    [answer] = read_answers(front.exchange(text))
    assert is_pixel(answer)
    assert front.counted("Raw")["host"] == 1


# == What keeps the file from being printed ==


@pytest.fixture
def printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`tracker.py nginx` in this process: what it printed, and what it said."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:{tmp_path}/data/tracking.db")

    def run(*words: str, status: int = 0, **environ: str) -> tuple[str, str]:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        assert tracker.main(["--env", os.devnull, *words]) == status
        return capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("words", "environ", "says"),
    [
        ((), {}, "BASE_URL is not set; expected the public address, such as https://track.example.com"),
        (
            (),
            {"BASE_URL": BASE, "BIND": "fd://3"},
            "BIND is fd://3; expected where nginx finds the tracker: unix:/path",
        ),
        ((), {"BASE_URL": BASE, "BIND": "unix:/run/a b.sock"}, "'/run/a b.sock': expected an absolute path"),
        (("--webroot", "/srv/a b"), {"BASE_URL": BASE}, "'/srv/a b': expected an absolute path"),
        (("--certificates", "/srv/$a"), {"BASE_URL": BASE}, "'/srv/$a': expected an absolute path"),
        (("--log-folder", "/srv/a;b"), {"BASE_URL": BASE}, "'/srv/a;b': expected an absolute path"),
        (("--http-port", "0"), {"BASE_URL": BASE}, "--http-port is 0: expected a port from 1 to 65535"),
    ],
)
def test_what_nginx_would_read_as_something_else_is_refused(
    words: tuple[str, ...], environ: dict[str, str], says: str, printed: Callable[..., Any], tmp_path: Path
) -> None:
    printed("tenant", "add", "Acme", "--local")
    out, err = printed("nginx", *words, status=1, **environ)
    assert out == "" and says in err and err.count("\n") == 1


def test_no_file_is_printed_without_a_database(printed: Callable[..., Any], tmp_path: Path) -> None:
    assert "no database at" in printed("nginx", status=1, BASE_URL=BASE)[1]
    assert not (tmp_path / "data").exists()


def test_the_commands_for_missing_certificates_are_printed_beside_the_file(
    printed: Callable[..., Any], tmp_path: Path
) -> None:
    printed("tenant", "add", "Acme", "--tracking-host", "t.acme.test", BASE_URL=BASE)
    certificates = tmp_path / "certificates"
    (certificates / "track.example.com").mkdir(parents=True)
    (certificates / "track.example.com" / "fullchain.pem").write_text("there is one")
    out, err = printed("nginx", "--certificates", str(certificates), "--webroot", "/var/www/proofs")
    assert out.startswith("# Made by ")
    assert "certbot certonly --webroot -w /var/www/proofs -d t.acme.test" in err
    assert "-d track.example.com" not in err
