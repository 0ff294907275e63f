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
import subprocess
import sys
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
from conftest import CHROME, ROOT, Server, missing
from frontend import Nginx
from load import (
    PIXEL,
    Outcome,
    Sent,
    data,
    fault,
    hears_signals,
    kill_one,
    locked,
    recounted,
    segments,
    terminate,
    user_agents,
    wait_until,
)
from test_raw import Answer, read_answers

HOSTS = ("t.acme.test", "t.globex.test")
RATE, BURST = 30, 60  # requests a second for one address, where there is a limit
CLIENTS = 8
REGISTERED = 60  # emails of each tenant in the load
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
    """A request of the load: to which host, by which client, and on what connection."""

    sent: Sent
    host: str
    client: int
    keeps: bool  # on the client's connection that stays, which has the client's address

    @property
    def which(self) -> tuple[str, str, str | None]:
        """What tells it from all others: nobody asks twice for the same."""
        return self.sent.mail_id, self.sent.key, self.sent.url


@dataclass(slots=True)
class Fired(Outcome):
    """What became of requests through nginx. Broken ones are those that nginx answered with 502 as well."""

    again: list[Sent] = field(default_factory=list)  # asked once more, since nginx had closed an idle connection


def load_of(front: Front, many: int) -> list[Ask]:
    """For so many emails of each tenant a pixel, a signed and a plain click, in an order that mixes them."""
    agents = user_agents()
    made: list[Ask] = []

    def ask(name: str, host: str, key: str, path: str, target: str | None, redirects: bool = True) -> None:
        number = len(made)
        client = number % CLIENTS
        # The limit for plain clicks is by address, so each of these comes from another one, as readers do.
        keeps = number // CLIENTS % 2 == 0 and "?url=" not in path
        address = f"127.0.1.{client + 1}" if keeps else somebody()
        method = "HEAD" if number % 23 == 0 else "GET"
        agent = agents[number % len(agents)]
        sent = Sent(address, front.mail_id(name), key, path, agent, method, target, redirects)
        made.append(Ask(sent, host, client, keeps))

    registered = {}
    for name, (host, domain) in SENDERS.items():
        wanted = [{"links": [f"https://{domain}/offers/{n}?utm=a%20b#part-{n}"]} for n in range(REGISTERED)]
        registered[name] = front.register(name, wanted)
        base = front.nginx.url if host == "localhost" else f"https://{host}"
        assert all(each["pixel_url"].startswith(f"{base}/") for each in registered[name])
    for number in range(many):
        for name, (host, domain) in SENDERS.items():
            each = registered[name][number % REGISTERED]
            [link] = each["links"]
            signed = re.sub("^https://[^/]+", "", link["click_url"])
            key = each["key"] if number < REGISTERED else f"unregistered-{number}"
            # A signed link's key is not signed: mailing tools put in their own.
            signed = signed.replace(f"/{each['key']}/", f"/{key}/")
            target = f"https://shop.{domain}/?n={number}&more=1#end"
            ask(name, host, key, front.pixel(name, key), None)
            ask(name, host, key, signed, link["url"])
            path = f"/{front.mail_id(name)}/click/{key}?url={quote(target, safe='')}"
            ask(name, host, key, path, target, redirects=name != "Initech")
    assert len({each.which for each in made}) == len(made) == 9 * many
    return made


SENDERS = {  # where each tenant's links are asked for, and where they lead
    "Acme": (HOSTS[0], "acme.example"),
    "Globex": (HOSTS[1], "globex.example"),
    "Initech": ("localhost", "initech.example"),
}


def get(connection: http.client.HTTPConnection, sent: Sent) -> tuple[int, dict[str, str], bytes]:
    """One request; it lies about the address that it comes from."""
    headers = {"User-Agent": sent.agent, "X-Forwarded-For": "203.0.113.7"}
    connection.request(sent.method, sent.path, headers=headers)
    with connection.getresponse() as answer:  # where the body breaks off, it still holds the socket
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


def answer_to(
    front: Front, each: Ask, kept: dict[str, http.client.HTTPConnection], fired: Fired
) -> tuple[int, dict[str, str], bytes]:
    """Ask on the connection that stays, or on a new one; once more only where it had stayed, and nothing came."""
    old = kept.pop(each.host, None) if each.keeps else None
    if old is not None:
        try:
            answer = get(old, each.sent)
        except CLOSED:
            old.close()
            fired.again.append(each.sent)
        except BaseException:
            old.close()
            raise
        else:
            if old.sock is not None:
                kept[each.host] = old
            return answer
    connection = http.client.HTTPConnection(each.host)
    connection.auto_open = 0
    connection.sock = front.nginx.connect(each.host, timeout=60, source=each.sent.address)
    try:
        answer = get(connection, each.sent)
    except BaseException:
        connection.close()
        raise
    if each.keeps and connection.sock is not None:
        kept[each.host] = connection
    else:
        connection.close()
    return answer


Deed = Callable[[Front, Fired], None]


def fire(front: Front, asks: Iterable[Ask], deeds: Sequence[tuple[int, Deed]] = ()) -> Fired:
    """Send requests from several clients at once; do each deed when so many are answered."""
    fired = Fired()
    shares: dict[int, list[Ask]] = {}
    for each in asks:
        shares.setdefault(each.client, []).append(each)
    mutex = threading.Lock()
    troubles: list[BaseException] = []
    started = time.monotonic()

    def client(share: list[Ask]) -> None:
        kept: dict[str, http.client.HTTPConnection] = {}
        try:
            for number, each in enumerate(share):
                time.sleep(max(started + number * CLIENTS / MOST_A_SECOND - time.monotonic(), 0))
                if troubles:
                    return
                try:
                    answer = answer_to(front, each, kept, fired)
                except (*CLOSED, http.client.HTTPException):
                    fired.broken.append(each.sent)
                    continue
                if answer[0] == 502:
                    fired.broken.append(each.sent)
                    continue
                wrong = fault(each.sent, *answer)
                with mutex:
                    fired.answered.append(each.sent)
                    if wrong:
                        fired.wrong.append(wrong)
        except BaseException as error:
            troubles.append(error)
        finally:
            for connection in kept.values():
                connection.close()

    clients = [threading.Thread(target=client, args=(share,)) for share in shares.values()]
    for each_client in clients:
        each_client.start()
    try:
        for number, deed in deeds:
            wait_until(lambda: len(fired.answered) >= number or bool(troubles), front.server, 120)  # noqa: B023
            assert any(each_client.is_alive() for each_client in clients) or troubles, "the load was over before"
            deed(front, fired)
    except BaseException as error:
        troubles.append(error)  # the clients stop
    for each_client in clients:
        each_client.join()
    if troubles:
        raise troubles[0]
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


def start_again(front: Front) -> None:
    """Start the tracker again, and wait until nginx can reach it."""
    front.server.start()

    def listens() -> bool:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(front.nginx.socket))
            return True
        return False

    wait_until(listens, front.server)


def assert_counted_once(front: Front, asks: Sequence[Ask], outcomes: Sequence[Fired]) -> None:
    """Each answered request became one event, with all that it said, and every number is a recount of the events."""
    answered = {(sent.mail_id, sent.key, sent.url) for outcome in outcomes for sent in outcome.answered}
    broken = {(sent.mail_id, sent.key, sent.url) for outcome in outcomes for sent in outcome.broken}
    assert not answered & broken and answered | broken == {each.which for each in asks}

    assert terminate(front.server) == 0
    assert segments(front.server) == []
    assert os.listdir(data(front.server) / "spool" / "rejected") == []
    assert front.server.run("check") == "all is well\n"

    start_again(front)
    for name in SENDERS:
        mail_id = front.mail_id(name)
        events = front.exported(name, "events")
        found = Counter((mail_id, event["key"], event["url"]) for event in events)
        expected = {each.which: each.sent for each in asks if each.sent.mail_id == mail_id}
        assert [which for which, number in found.items() if number > 1] == []
        assert answered & set(expected) <= set(found)  # none is lost
        assert set(found) - answered <= broken  # none is made up
        assert set(found) <= set(expected)  # none is another tenant's
        for event in events:
            event_of = expected[mail_id, event["key"], event["url"]].event()
            assert {field_: event[field_] for field_ in event_of} == event_of
        registered = {row["key"] for row in front.exported(name, "emails") if row["registered"]}
        assert len(registered) == REGISTERED
        answer = front.ask(f"/{front.id(name)}/stats.json?range=24h")
        stats, numbers = json.loads(answer.body), recounted(events, registered)
        assert stats["waiting_hits"] == 0
        assert stats["activity"] == numbers["activity"]
        assert stats["unregistered"] == numbers["unregistered"]
        assert stats["reasons"] == numbers["reasons"]
        assert {state: stats["sent"][state] for state in numbers["sent"]} == numbers["sent"]


@pytest.fixture
def senders(tmp_path: Path) -> Iterator[Front]:
    """A front with the three tenants of the load, of which two have tracking hosts."""
    with fronts(tmp_path, ACME, GLOBEX, INITECH) as made:
        yield made


def test_reloads_of_nginx_and_of_the_tracker_under_load_break_no_request_and_every_hit_is_counted_once(
    senders: Front,
) -> None:
    asks = load_of(senders, 400)
    fired = fire(senders, asks, [(200, reload), (500, hang_up), (1_400, reload), (1_700, hang_up)])
    assert fired.wrong == [] and fired.broken == []
    # A client has at most one idle connection to each host that a reload may close.
    assert len(fired.again) <= 2 * CLIENTS * len(SENDERS)
    assert_counted_once(senders, asks, [fired])


def test_every_answered_hit_is_counted_once_while_workers_die_the_database_is_locked_and_all_is_reloaded(
    senders: Front,
) -> None:
    asks = load_of(senders, 600)
    before, in_lock, after = asks[:1500], asks[1500:2700], asks[2700:]
    fired = [fire(senders, before, [(200, kill), (350, reload), (500, hang_up)])]
    with locked(data(senders.server) / "tracking.db"):
        release_at = time.monotonic() + LOCKED_SECONDS
        fired.append(fire(senders, in_lock, [(500, kill)]))  # all are answered although the lock is held
        time.sleep(max(release_at - time.monotonic(), 0))
    fired.append(fire(senders, after, [(150, kill), (350, hang_up), (1_200, reload), (1_500, kill)]))
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
    "GET /{id}/dashboard?range=7d&tz=Europe/Rome": "/-/dashboard",
    "HEAD /{id}/dashboard": "/-/dashboard",
    "GET /{id}/stats.json": "/-/stats",
    "GET /{id}/events.csv": "/-/events",
    "GET /{id}/emails.json?after={key}": "/-/emails",
    "GET /{id}/links.json": "/-/links",
    "POST /{id}/emails": "/-/emails",
    "DELETE /{id}/emails/{key}": "/-/emails",
    "GET /{mail_id}/pixel/{key}.gif": "/-/pixel",
    "GET /{mail_id}/pixel/{key}.gif?to=reader@reader.example": "/-/pixel",
    "GET /{mail_id}/click/{key}?url={target}": "/-/click",
    "GET /{mail_id}/click/{key}/c2lnbmF0dXJlMTIz/aHR0cHM6Ly9hY21lLmV4YW1wbGUv": "/-/click",
    "GET /x/{id}/dashboard": "/-",
    "GET //{id}/dashboard": "/",
    "GET /{id}//dashboard": "/-",
    "GET /./{id}/dashboard": "/-",
    "GET /{id}": "/-",
    "GET /{id}/": "/-",
    "GET /{id}?{id}": "/-",
    "GET /{id}/{key}": "/-",
    "GET /{id}/dashboardx/{key}": "/-",
    "GET /%2F{id}/dashboard": "/-/dashboard",
    "GET /health/{id}": "/health",
    "GET /health?{id}": "/health",
    "GET /healthy/{id}": "/-",
    "GET /assets/{id}": "/assets",
    "GET /robots.txt": "/robots.txt",
    "GET /robots.txt{id}": "/-",
    "GET /?{id}": "/",
    "GET https://localhost/{id}/dashboard": "/-/dashboard",
    "GET https://{id}.example/{id}/x": "/-",
    "GET https://localhost?{id}": "/-",
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


def test_no_log_names_anything_private_after_the_tracker_was_killed(tmp_path: Path) -> None:
    with fronts(tmp_path, ACME, GLOBEX) as front:
        process = front.server.process
        assert process is not None
        for pid in (process.pid, *front.server.workers()):
            os.kill(pid, signal.SIGKILL)
        process.wait()  # its socket stays behind, and refuses
        assert front.ask(front.pixel("Acme", KEY)).status == 502
        assert front.ask(f"/{front.id('Acme')}/dashboard").status == 502
        for line in LOGGED:
            ask_in_private(front, line)
        assert_logs_are_discreet(front)


def test_no_log_names_anything_private_after_the_tracker_was_stopped(tmp_path: Path) -> None:
    with fronts(tmp_path, ACME, GLOBEX) as front:
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
    "/{m}/pixel/c%2Ed%2Egif": (200, "c.d"),
    "/{m}/pixel/e.f.gif.gif": (200, "e.f.gif"),
    "/{m}/%70ixel/g.gif": (200, "g"),
    "/{m}/pixel/h+i@j=k:l~m.gif": (200, "h+i@j=k:l~m"),
    "/{m}/pixel/n%2Bo%40p%3Dq%3Ar%7es.gif": (200, "n+o@p=q:r~s"),
    "/{m}/pixel/t.gif?": (200, "t"),
    "/{m}/pixel/u.gif?/../../x": (200, "u"),
    "/{m}/pixel/v.gif?a//b=%2F&%zz": (200, "v"),
    "/{m}/pixel/...gif": (200, "(bad key)"),
    "/{m}/pixel/%2E%2E%2Egif": (200, "(bad key)"),
    "/{m}/pixel/w%2Fx.gif": (200, "(bad key)"),
    "/{m}/pixel/..%2F..%2Fy.gif": (200, "(bad key)"),
    "/{m}/pixel/z%252E.gif": (200, "(bad key)"),
    "/{m}/pixel/z%3F.gif": (200, "(bad key)"),
    "/{m}/pixel/z%0A.gif": (200, "(bad key)"),
    "/{m}/pixel/z\\y.gif": (200, "(bad key)"),
    "/{m}/pixel/z%E9.gif": (200, "(bad key)"),
    "//{m}/pixel/x.gif": (404, None),
    "/{m}//pixel/x.gif": (404, None),
    "/{m}/pixel//x.gif": (404, None),
    "/{m}/pixel/x.gif/": (404, None),
    "/{m}/pixel/x.gif//": (404, None),
    "/./{m}/pixel/x.gif": (404, None),
    "/{m}/./pixel/x.gif": (404, None),
    "/{m}/pixel/./x.gif": (404, None),
    "/{m}/pixel/x.gif/.": (404, None),
    "/{m}/pixel/y/../x.gif": (404, None),
    "/{m}/pixel/%2E%2E/pixel/x.gif": (404, None),
    "/a/..//{m}/pixel/x.gif": (404, None),
    "//{m}/pixel/..": (404, None),
    "/{m}/pixel/..": (404, None),
    "/{m}/pixel/.": (404, None),
    "/{m}%2Fpixel/x.gif": (404, None),
    "/{m}/pixel%2Fx.gif": (404, None),
    "/%2F{m}/pixel/x.gif": (200, "(unknown tenant)"),
    "/{m}/pixel/x.gif#part": (404, None),
    "/{m}/pixel/x.gif;v=1": (404, None),
    "/{m}/pixel/x.GIF": (404, None),
    "/{m}/PIXEL/x.gif": (404, None),
    "/{m}/pixel/x%2Egi%66%2F": (404, None),
    "/a//b": (404, None),
    "/{id}/dashboard/": (404, None),
    "//{id}/dashboard": (404, None),
    "/{id}//dashboard": (404, None),
    "/./{id}/dashboard": (404, None),
    "/x/../{id}/dashboard": (404, None),
    "/{id}%2Fdashboard": (404, None),
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
def test_a_signed_link_with_the_longest_target_redirects_and_is_recorded(what: str, front: Front) -> None:
    [made] = front.register("Sizes", [{"links": [LONG[what]]}])
    [link] = made["links"]
    answer = front.ask(link["click_url"].removeprefix(front.nginx.url))
    assert (answer.status, answer.headers.get("location")) == (302, quote(LONG[what], safe=":/"))
    assert recorded_urls(front, made["key"]) == [LONG[what]]


def test_a_plain_link_with_the_longest_target_all_percent_encoded_redirects_and_is_recorded(front: Front) -> None:
    target = LONG["4,096 characters of ASCII"]
    encoded = "".join(f"%{byte:02X}" for byte in target.encode())
    assert len(encoded) == 12_288
    answer = front.ask(f"/{front.mail_id('Sizes')}/click/encoded?url={encoded}")
    assert (answer.status, answer.headers.get("location")) == (302, target)
    assert recorded_urls(front, "encoded") == [target]


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


def slow_headers(front: Front, stack: ExitStack) -> tuple[Tick, Tick]:
    """A hundred clients send their headers at a byte a second."""
    keys = [f"slow-{number}" for number in range(100)]
    texts = {key: request(front.pixel("Slow", key), "GET", "Connection: close") for key in keys}
    connections = {key: stack.enter_context(front.nginx.connect(source=somebody())) for key in keys}
    sent = itertools.count()

    def tick() -> None:
        place = next(sent)
        for key, connection in connections.items():
            connection.sendall(texts[key][place : place + 1])

    def finish() -> None:
        place = next(sent)
        for key, connection in connections.items():
            connection.sendall(texts[key][place:])
            assert is_pixel(read_answers(read_all(connection))[0])
        times = front.counted("Slow")
        assert [times[key] for key in keys] == [1] * 100

    return tick, finish


def slow_bodies(front: Front, stack: ExitStack) -> tuple[Tick, Tick]:
    """Twenty clients send the emails that they register at a byte a second."""
    keys = [f"slow-body-{number}" for number in range(20)]
    bodies = {key: json.dumps({"key": key}).encode() for key in keys}
    connections = {key: stack.enter_context(front.nginx.connect(source=somebody())) for key in keys}
    for key, connection in connections.items():
        text = request(f"/{front.id('Slow')}/emails", "POST", "Connection: close", body=bodies[key])
        connection.sendall(text.removesuffix(bodies[key]))
    sent = itertools.count()

    def tick() -> None:
        place = next(sent)
        for key, connection in connections.items():
            connection.sendall(bodies[key][place : place + 1])

    def finish() -> None:
        place = next(sent)
        for key, connection in connections.items():
            connection.sendall(bodies[key][place:])
            assert read_answers(read_all(connection))[0].status == 201
        registered = {row["key"] for row in front.exported("Slow", "emails") if row["registered"]}
        assert set(keys) <= registered

    return tick, finish


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
    "TE first, then CL": Shape("Transfer-Encoding: chunked\r\n" + LENGTH, ENDED),
    "TE after a tab": Shape(LENGTH + "Transfer-Encoding:\tchunked\r\n", ENDED),
    "TE after a vertical tab": Shape(LENGTH + "Transfer-Encoding: \x0bchunked\r\n", ENDED),
    "TE folded": Shape(LENGTH + "Transfer-Encoding:\r\n chunked\r\n", ENDED),
    "TE folded with a tab": Shape(LENGTH + "X-A: b\r\n\tTransfer-Encoding: chunked\r\n", ENDED, EITHER),
    "TE chunked, identity": Shape(LENGTH + "Transfer-Encoding: chunked, identity\r\n", ENDED),
    "TE identity, chunked": Shape(LENGTH + "Transfer-Encoding: identity, chunked\r\n", ENDED),
    "TE xchunked": Shape(LENGTH + "Transfer-Encoding: xchunked\r\n", ENDED),
    "TE in quotes": Shape(LENGTH + 'Transfer-Encoding: "chunked"\r\n', ENDED),
    "TE twice": Shape(LENGTH + "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", ENDED),
    "TE twice, without a length": Shape("Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n", CHUNKS),
    "TE with an underscore": Shape(LENGTH + "Transfer_Encoding: chunked\r\n", ENDED, YES),
    "TE with a space before its colon": Shape(LENGTH + "Transfer-Encoding : chunked\r\n", ENDED, EITHER),
    "TE with a space before its name": Shape(LENGTH + " Transfer-Encoding: chunked\r\n", ENDED, EITHER),
    "TE after a bare line feed": Shape(LENGTH + "X-A: b\nTransfer-Encoding: chunked\r\n", ENDED),
    "TE after a bare carriage return": Shape(LENGTH + "X-A: b\rTransfer-Encoding: chunked\r\n", ENDED, EITHER),
    "TE after NUL": Shape(LENGTH + "X-A: b\0\r\nTransfer-Encoding: chunked\r\n", ENDED),
    "TE in HTTP/1.0": Shape(
        "Transfer-Encoding: chunked\r\n", CHUNKS, EITHER, "GET {outer} HTTP/1.0\r\nHost: localhost\r\n"
    ),
    "two lengths": Shape("Content-Length: 0\r\n" + LENGTH),
    "the same length twice": Shape(LENGTH + LENGTH),
    "two lengths in one": Shape("Content-Length: {length}, {length}\r\n"),
    "a length with a plus": Shape("Content-Length: +{length}\r\n"),
    "a length with a minus": Shape("Content-Length: -{length}\r\n"),
    "a length in hexadecimal": Shape("Content-Length: 0x{hex}\r\n"),
    "a length with a space in it": Shape("Content-Length: 1 {length}\r\n"),
    "a length that overflows": Shape("Content-Length: 18446744073709551616\r\n"),
    "a length with an underscore": Shape("Content_Length: 0\r\n" + LENGTH, statuses=YES),
    "a folded length": Shape(LENGTH + "Content-Length:\r\n 0\r\n"),
    "a folded header": Shape(LENGTH + "X-A: b\r\n c\r\n", statuses=EITHER),
    "bare line feeds": Shape(
        "", "{inner}", EITHER, "GET {outer} HTTP/1.1\nHost: localhost\nContent-Length: {length}\n"
    ),
    "NUL in a value": Shape(LENGTH + "X-A: b\0c\r\n"),
    "NUL in a name": Shape(LENGTH + "X\0A: b\r\n", statuses=EITHER),
    "chunks with extensions": Shape("Transfer-Encoding: chunked\r\n", CHUNKS.replace("{hex}", "{hex};a=b"), EITHER),
    "a chunk with a sign": Shape("Transfer-Encoding: chunked\r\n", CHUNKS.replace("{hex}", "+{hex}")),
    "a chunk with 0x": Shape("Transfer-Encoding: chunked\r\n", CHUNKS.replace("{hex}", "0x{hex}")),
    "a chunk that overflows": Shape("Transfer-Encoding: chunked\r\n", CHUNKS.replace("{hex}", "1" + "0" * 16)),
    "a chunk that is too short": Shape("Transfer-Encoding: chunked\r\n", "2\r\n{inner}\r\n0\r\n\r\n"),
    "trailers": Shape(
        "Transfer-Encoding: chunked\r\nTrailer: Content-Length\r\n",
        "{hex}\r\n{inner}\r\n0\r\nContent-Length: 0\r\n\r\n",
        EITHER,
    ),
    "two hosts": Shape("Host: t.acme.test\r\n" + LENGTH),
    "no host": Shape(LENGTH, first="GET {outer} HTTP/1.1\r\n"),
    "absolute form, another host": Shape(
        LENGTH, statuses=YES, first="GET https://localhost{outer} HTTP/1.1\r\nHost: other.example\r\n"
    ),
    "an upgrade": Shape(
        LENGTH + "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
        statuses=YES,
    ),
    "a tab in the path": Shape(LENGTH, first="GET {outer}?a\tb HTTP/1.1\r\nHost: localhost\r\n", statuses=EITHER),
    "HTTP/1.9": Shape(LENGTH, statuses=EITHER, first="GET {outer} HTTP/1.9\r\nHost: localhost\r\n"),
    "HTTP/2.0": Shape(LENGTH, first="GET {outer} HTTP/2.0\r\nHost: localhost\r\n"),
    "CONNECT": Shape(LENGTH, first="CONNECT localhost:443 HTTP/1.1\r\nHost: localhost\r\n"),
    "TRACE": Shape(LENGTH, first="TRACE {outer} HTTP/1.1\r\nHost: localhost\r\n"),
    "a method in lower case": Shape(LENGTH, first="get {outer} HTTP/1.1\r\nHost: localhost\r\n"),
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


def test_http_1_0_keeps_its_connection_where_it_asks_for_that(front: Front) -> None:
    one, two = (
        request(front.pixel("Raw", key), "GET", f"Connection: {word}", version="1.0")
        for key, word in (("http-1-0-a", "keep-alive"), ("http-1-0-b", "close"))
    )
    answers = read_answers(front.exchange(one, two))
    assert [is_pixel(answer) for answer in answers] == [True, True]
    answers = read_answers(front.exchange(two, one))
    assert [is_pixel(answer) for answer in answers] == [True]  # what follows a close is not read
    times = front.counted("Raw")
    assert (times["http-1-0-a"], times["http-1-0-b"]) == (1, 2)


def test_a_name_that_nobody_has_is_answered_as_the_first_host(front: Front) -> None:
    answer = front.ask(front.pixel("Raw", "host"), "GET", "Host: evil.example")
    assert answer.status == 400  # two hosts
    text = request(front.pixel("Raw", "host"), "GET", "Connection: close").replace(b"localhost", b"evil.example")
    [answer] = read_answers(front.exchange(text))
    assert is_pixel(answer)
    assert front.counted("Raw")["host"] == 1


# == What keeps the file from being printed ==


def printed(folder: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """`tracker.py nginx`."""
    return subprocess.run(
        [sys.executable, str(ROOT / "tracker.py"), "--env", os.devnull, *words],
        env={"PATH": os.environ["PATH"], "DATABASE_URL": f"sqlite:{folder}/data/tracking.db", **environ},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("database", "environ", "says"),
    [
        (True, {}, "BASE_URL is not set; expected the public address, such as https://track.example.com"),
        (
            True,
            {"BASE_URL": "https://track.example.com", "BIND": "fd://3"},
            "BIND is fd://3; expected where nginx finds the tracker: unix:/path or HOST:PORT",
        ),
        (False, {"BASE_URL": "https://track.example.com"}, "no database at"),
    ],
    ids=["without BASE_URL", "with a listener that only systemd knows", "without a database"],
)
def test_no_file_is_printed(database: bool, environ: dict[str, str], says: str, tmp_path: Path) -> None:
    if database:
        assert printed(tmp_path, "tenant", "add", "Acme", "--local").returncode == 0
    done = printed(tmp_path, "nginx", **environ)
    assert (done.returncode, done.stdout) == (1, "")
    assert says in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "data").exists() is database


@pytest.mark.parametrize(
    ("option", "value"),
    [("--webroot", "/srv/a b"), ("--certificates", "/srv/$a"), ("--log-folder", "/srv/a;b"), ("--http-port", "0")],
)
def test_what_nginx_would_read_as_something_else_is_refused(option: str, value: str, tmp_path: Path) -> None:
    base = {"BASE_URL": "https://track.example.com"}
    assert printed(tmp_path, "tenant", "add", "Acme", **base).returncode == 0
    done = printed(tmp_path, "nginx", option, value, **base)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert value in done.stderr and "expected a" in done.stderr
    done = printed(tmp_path, "nginx", BIND="unix:/run/a b.sock", **base)
    assert (done.returncode, done.stdout) == (1, "") and "'/run/a b.sock'" in done.stderr


def test_the_commands_for_missing_certificates_are_printed_beside_the_file(tmp_path: Path) -> None:
    base = {"BASE_URL": "https://track.example.com"}
    assert printed(tmp_path, "tenant", *("add", "Acme", "--tracking-host", "t.acme.test"), **base).returncode == 0
    certificates = tmp_path / "certificates"
    (certificates / "track.example.com").mkdir(parents=True)
    (certificates / "track.example.com" / "fullchain.pem").write_text("there is one")
    done = printed(tmp_path, "nginx", "--certificates", str(certificates), "--webroot", "/var/www/proofs", **base)
    assert done.returncode == 0 and done.stdout.startswith("# Made by ")
    assert "certbot certonly --webroot -w /var/www/proofs -d t.acme.test" in done.stderr
    assert "-d track.example.com" not in done.stderr
