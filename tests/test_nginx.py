"""Real nginx before the real server, with the file that `tracker.py nginx` prints, over TLS on loopback.

What a client is told through nginx is what the server said; each answered hit is counted once, nobody is believed
about his own address, nothing that is private stands in a log, and slow or hostile clients hinder no other.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import select
import signal
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest
from conftest import BASE, CHROME, Server, hears_signals
from frontend import Nginx
from load import PIXEL, data, locked, rows, segments, terminate, wait_until
from test_raw import RAW, UNREAD, Answer, read_answers, signed_link

import tracker

HOSTS = ("t.acme.test", "t.globex.test")
RATE, BURST = 30, 60  # requests a second for one address, where there is a limit
CLIENTS = 8
MOST_A_SECOND = 400  # requests of the load, so that on a fast machine too it lasts until all was done under it
LOCKED_SECONDS = 3
IDLE = 400
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
        """All rows of an export, once no hit waits: who asks for numbers drains for a quarter of a second only."""
        stats = f"/{self.id(name)}/stats.json"
        wait_until(lambda: json.loads(self.ask(stats).body)["waiting_hits"] == 0, self.server)
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


def request(target: str, method: str = "GET", *headers: str, host: str | None = None, body: bytes = b"") -> bytes:
    """The bytes of a request."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host or 'localhost'}", f"User-Agent: {CHROME}", *headers]
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


def plain(nginx: Nginx, target: str, host: str = "localhost", *headers: str) -> Answer:
    """One request over plain HTTP."""
    with socket.create_connection(("127.0.0.1", nginx.http_port), timeout=20) as connection:
        connection.sendall(request(target, "GET", "Connection: close", *headers, host=host))
        [answer] = read_answers(read_all(connection))
    return answer


def is_pixel(answer: Answer) -> bool:
    """Whether an answer is that of a pixel whose hit was recorded."""
    return (answer.status, answer.body, answer.headers.get("x-tracker")) == (200, PIXEL, "recorded")


@contextlib.contextmanager
def fronts(
    folder: Path,
    *options: tuple[str, ...],
    connections: int = 1024,
    pixels: bool = False,
    kept: str = "full",
    words: tuple[str, ...] = (),
    path: str = "",
) -> Iterator[Front]:
    """A running Front; each of `options` makes a tenant, its first word is the name."""
    hosts = [words[words.index("--tracking-host") + 1] for words in options if "--tracking-host" in words]
    folder.mkdir(exist_ok=True)
    nginx = Nginx(folder, hosts, *["--pixels"] * pixels, *words, IP_ADDRESSES=kept, path=path)
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

SENDERS = {"Acme": HOSTS[0], "Globex": HOSTS[1], "Initech": "localhost"}  # and where each one's mail asks


class Ask(NamedTuple):
    """A request of the load. Each key is asked for once."""

    name: str  # the tenant's
    key: str
    path: str
    location: str | None  # where a click leads; None for a pixel

    def is_answered_by(self, answer: Answer) -> bool:
        if self.location is None:
            return is_pixel(answer)
        return (answer.status, answer.headers.get("location")) == (302, self.location)


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


Deed = Callable[[Front], object]


def fire(front: Front, asks: Sequence[Ask], deeds: Mapping[int, Deed]) -> list[Ask]:
    """Send requests, several at a time; do each deed when so many are answered. Returns those with nginx's 502."""
    started = time.monotonic()

    begun = {at: threading.Event() for at in deeds}

    def answer(place: int) -> Answer:
        time.sleep(max(started + place / MOST_A_SECOND - time.monotonic(), 0))
        for at, event in begun.items():  # else the load might be over before a deed begins
            assert place < at + 20 or event.wait(60)
        liar = "X-Forwarded-For: 203.0.113.7"
        return front.ask(asks[place].path, "GET", liar, host=SENDERS[asks[place].name], source="127.0.0.1")

    broken = []
    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = [clients.submit(answer, place) for place in range(len(asks))]
        for place, (each, coming) in enumerate(zip(asks, answers, strict=True)):
            if place in deeds:
                begun[place].set()
                deeds[place](front)
            if coming.result().status == 502:
                broken.append(each)
            else:
                assert each.is_answered_by(coming.result()), (each, coming.result())
    return broken


def kill(front: Front) -> None:
    """SIGKILL one of the tracker's workers."""
    os.kill(front.server.workers()[0], signal.SIGKILL)


def hang_up(front: Front) -> None:
    """SIGHUP to the tracker, and wait until its workers are others."""
    server = front.server
    assert server.process is not None
    old = set(server.workers())
    wait_until(lambda: all(hears_signals(worker) for worker in server.workers()), server)
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: not old & set(server.workers()) and bool(server.workers()), server)


def reload(front: Front) -> None:
    """Let nginx load its file anew, and wait until its workers are others."""
    assert front.nginx.process is not None
    pid = front.nginx.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children")
    old = set(children.read_text().split())
    front.nginx.reload()
    wait_until(lambda: bool(new := set(children.read_text().split())) and not old & new, front.server)


def assert_counted_once(front: Front, asks: Sequence[Ask], broken: Sequence[Ask] = ()) -> None:
    """Each answered request became one event, and of those that broke some did perhaps."""
    perhaps = {(each.name, each.key) for each in broken}
    answered = {(each.name, each.key) for each in asks} - perhaps
    assert terminate(front.server) == 0
    assert segments(front.server) == [] and os.listdir(data(front.server) / "spool" / "rejected") == []
    assert front.server.run("check") == "all is well\n"
    names = "select name, key from events join emails on emails.id = email join tenants on number = events.tenant"
    found = Counter(rows(front.server, names))
    assert [which for which, number in found.items() if number > 1] == []
    assert answered <= set(found) <= answered | perhaps
    assert {row[0] for row in rows(front.server, "select distinct address from events")} == {"127.0.0.1"}


@pytest.fixture
def senders(tmp_path: Path) -> Iterator[Front]:
    """A front with the three tenants of the load, of which two have tracking hosts."""
    with fronts(tmp_path, ACME, GLOBEX, INITECH) as made:
        yield made


def test_reloads_of_nginx_and_of_the_tracker_under_load_break_no_request_and_every_hit_is_counted_once(
    senders: Front,
) -> None:
    asks = load_of(senders, 100)
    assert fire(senders, asks, {50: reload, 100: hang_up, 250: reload, 350: hang_up}) == []
    assert_counted_once(senders, asks)


def test_every_answered_hit_is_counted_once_while_workers_die_the_database_is_locked_and_all_is_reloaded(
    senders: Front,
) -> None:
    asks = load_of(senders, 150)
    broken = fire(senders, asks[:350], {20: kill, 60: reload, 100: hang_up})
    with locked(data(senders.server) / "tracking.db"):
        release_at = time.monotonic() + LOCKED_SECONDS
        broken += fire(senders, asks[350:550], {50: kill})  # all are answered although the lock is held
        time.sleep(max(release_at - time.monotonic(), 0))
    broken += fire(senders, asks[550:], {20: kill, 60: hang_up, 120: reload, 200: kill})
    assert len(broken) <= 4  # were killed, and a worker has one request at a time
    assert_counted_once(senders, asks, broken)


# == Limits by address ==


def test_thousands_of_pixels_and_signed_links_from_one_address_a_hundred_in_a_write_are_all_answered_in_order(
    front: Front,
) -> None:
    urls = [f"https://limits.example/{number}" for number in range(50)]
    [made] = front.register("Limits", [{"links": urls}])
    clicks = [link["click_url"].removeprefix(front.nginx.url) for link in made["links"]]
    source = somebody()
    for first in range(0, 1_000, 50):
        pixels = [front.pixel("Limits", f"quick-{number}%2E") for number in range(first, first + 50)]
        paths = [path for pair in zip(pixels, clicks, strict=True) for path in pair]
        with front.nginx.connect(source=source) as connection:
            connection.sendall(b"".join(map(request, paths[:-1])) + request(paths[-1], "GET", "Connection: close"))
            answers = read_answers(read_all(connection))
        assert len(answers) == 100 and all(map(is_pixel, answers[::2]))
        assert [(answer.status, answer.headers["location"]) for answer in answers[1::2]] == [(302, url) for url in urls]
    times = front.counted("Limits")
    assert times[made["key"]] == 1_000
    assert [times[f"quick-{number}."] for number in range(1_000)] == [1] * 1_000


LIMITED = {  # method, target, and the status where it is not refused
    "dashboard": ("GET", "/{id}/dashboard", 200),
    "a dashboard that is not there": ("GET", "/0123456789abcdef/dashboard", 404),
    "numbers": ("GET", "/{id}/stats.json", 200),
    "API": ("DELETE", "/{id}/emails/nobody", 404),
    "operator": ("POST", "/tenants", 404),
    "plain link": ("GET", "/{mail_id}/click/burst?url=https%3A%2F%2Flimits.example%2F", 302),
    # Decoded, or by their query, these would be what has no limit.
    "a pixel's path behind another": ("GET", "/{mail_id}/campaigns/..%2F..%2F{mail_id}%2Fpixel%2Fburst.gif", 404),
    "a pixel's path with encoded slashes": ("GET", "/{mail_id}/pixel%2Fburst.gif", 404),
    "a pixel's path in the query": ("GET", "/{id}/dashboard?/{mail_id}/pixel/burst.gif", 200),
    "a signed link's with encoded slashes": ("GET", "/{mail_id}/click/burst%2Fx%2Fy", 404),
    "a dashboard, encoded": ("GET", "/{id}/%64ashboard", 200),
}
UNLIMITED = {  # decoded, these would be pages that read the database; the tracker must read them as nginx does
    "/{mail_id}/pixel/..%2F..%2F{id}%2Fdashboard%3F.gif": (200, "bad key"),
    "/{mail_id}/click/..%2F..%2F{id}%2Fdashboard/x/y": (404, None),
    "//{mail_id}/pixel/burst.gif": (200, "recorded"),
    "/{mail_id}//pixel/burst.gif/": (200, "recorded"),
    "/{mail_id}//click/burst//x/y///": (404, None),
}


@pytest.mark.parametrize("target", UNLIMITED)
def test_what_has_no_limit_is_no_page_in_an_encoded_form(target: str, front: Front) -> None:
    source, asked = somebody(), target.format(id=front.id("Limits"), mail_id=front.mail_id("Limits"))
    with front.nginx.connect(source=source) as connection:
        connection.sendall(request(asked) * (BURST * 2) + request(asked, "GET", "Connection: close"))
        answers = read_answers(read_all(connection))
    told = Counter((each.status, each.headers.get("x-tracker")) for each in answers)
    assert told == {UNLIMITED[target]: BURST * 2 + 1}


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


MESSAGE = b"Content-Type: text/html\r\n\r\n<p>a</p>"


def test_a_sender_of_hundreds_of_messages_one_after_the_other_is_never_refused(front: Front) -> None:
    source, statuses = somebody(), Counter[int]()
    head = request(f"/{front.id('Limits')}/messages", "POST", "Authorization: Bearer a-key", body=MESSAGE)
    with front.nginx.connect(source=source) as connection:
        for _ in range(250):
            connection.sendall(head)
            data = b""
            while not (found := re.search(rb"(?i)content-length: ([0-9]+).*?\r\n\r\n", data, re.DOTALL)) or (
                len(data) < found.end() + int(found[1])
            ):
                data += connection.recv(65_536)
            statuses[read_answers(data)[0].status] += 1
    assert statuses == {200: 250}


API = {  # what programs ask for
    "messages": ("POST", "/{id}/messages"),
    "emails": ("POST", "/{id}/emails"),
    "a campaign": ("POST", "//{id}/campaigns/"),
    "deleting": ("DELETE", "/{id}/emails/nobody"),
    "numbers": ("GET", "/{id}/stats.json"),
    "an export": ("GET", "/{id}/emails.csv?limit=1"),
    "an email": ("GET", "/{id}/emails/nobody.json"),
}


def refusals(front: Front, method: str, target: str, *headers: str) -> list[Answer]:
    """What nginx says itself to very many requests at once, from one address."""
    asked = request(target.format(id=front.id("Limits")), method, *headers, body=b"{}" if method == "POST" else b"")
    source = somebody()
    with ExitStack() as stack:
        many = [stack.enter_context(front.nginx.connect(source=source, timeout=60)) for _ in range(90)]
        for connection in many:
            connection.sendall(asked.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
        answers = [read_answers(read_all(connection), method)[0] for connection in many]
    return [answer for answer in answers if answer.headers["server"] == "nginx" and answer.status == 429]


@pytest.mark.parametrize("what", API)
def test_programs_are_refused_in_json_and_told_when_to_come_again(what: str, front: Front) -> None:
    refused = refusals(front, *API[what])
    assert refused
    for answer in refused:
        assert answer.headers["content-type"] == "application/json"
        assert "try again" in json.loads(answer.body)["error"]
        assert int(answer.headers["retry-after"]) > 0


def test_people_are_refused_on_a_page_and_a_key_alone_opens_nothing_to_who_only_reads(front: Front) -> None:
    refused = refusals(front, "GET", "/{id}/dashboard", "Authorization: Bearer a-key")
    assert refused
    assert {answer.headers["content-type"] for answer in refused} == {"text/html"}
    assert all(int(answer.headers["retry-after"]) > 0 for answer in refused)


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
    ids=" | ".join,
)
def test_what_a_client_says_of_its_own_address_is_not_believed(headers: tuple[str, ...], front: Front) -> None:
    source = somebody()
    key = f"liar-{source}"
    with front.nginx.connect(source=source) as connection:
        connection.sendall(request(front.pixel("Peers", key), "GET", *headers))
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
    found = [event["ip_address"] for event in front.exported("Peers", "events") if event["key"] == key]
    assert found == [source]


def test_a_proxy_before_nginx_is_believed_where_its_network_is_named_and_told_of_where_not(tmp_path: Path) -> None:
    said = ("GET", "X-Forwarded-For: 6.6.6.6, 203.0.113.7")
    with fronts(tmp_path / "not", ACME) as front:
        assert is_pixel(front.ask(front.pixel("Acme", "a"), *said, source="127.0.0.9"))
        assert "not believed" in json.loads(front.ask("/health").body)["notes"][0]
        assert [row["ip_address"] for row in front.exported("Acme", "events")] == ["127.0.0.9"]
    for pixels in (False, True):
        more = ("--real-ip-from", "127.0.0.0/24", "--real-ip-from", "2001:db8::/32")
        with fronts(tmp_path / f"named-{pixels}", ACME, words=more, pixels=pixels) as front:
            assert front.ask(front.pixel("Acme", "a"), *said, source="127.0.0.9").status == 200
            link = f"/{front.mail_id('Acme')}/click/b?url=https://acme.example/"
            assert front.ask(link, *said, source="127.0.0.9").status == 302
            assert front.ask("/robots.txt", *said, source="127.0.0.9").status == 200
            assert json.loads(front.ask("/health").body)["notes"] == []
            assert front.ask(front.pixel("Acme", "a"), *said, source="127.1.0.9").status == 200  # who is not named
            wait_until(lambda: len(front.exported("Acme", "events")) == 3, front.server)
            seen = sorted((row["key"], row["ip_address"]) for row in front.exported("Acme", "events"))
            assert seen == [("a", "127.1.0.9"), ("a", "203.0.113.7"), ("b", "203.0.113.7")]


# == Below a path of another site ==


@pytest.mark.parametrize("pixels", [False, True], ids=["", "nginx answers pixels"])
def test_all_works_below_a_path_of_another_site(tmp_path: Path, pixels: bool) -> None:
    with fronts(
        tmp_path, ("Acme", "--any-domain", "--tracking-host", HOSTS[0]), INITECH, pixels=pixels, path="/mail/tr.ack"
    ) as front:
        assert front.ask("/").body == front.ask("/mail").body == front.ask("/mail/track/health").body == b"the site"
        base, private = front.nginx.url, f"/mail/tr.ack/{front.id('Initech')}"
        assert front.tenants["Initech"]["dashboard_url"] == f"{base}/{front.id('Initech')}/dashboard"
        page = front.ask(f"{private}/dashboard")
        assert page.status == 200
        for path in re.findall(r'(?:src|href)="(/[^"]+)"', page.body.decode()):
            assert path.startswith("/mail/tr.ack/") and front.ask(path).status in (200, 302), path
        assert front.ask(f"{private}/emails.json").status == 200
        for asked in (
            private,
            f"{private}/",
            f"{private}//dashboard",
            f"/mail//tr.ack//{front.id('Initech')}/dashboard/",
        ):
            answer = front.ask(asked)
            assert (answer.status, answer.headers["location"]) == (302, f"{private}/dashboard")
        assert front.ask("/mail/tr.ack/health").status == 200

        body = json.dumps(
            {"key": "k", "links": ["https://localhost:1/a", f"https://localhost:{front.nginx.port}/shop"]}
        ).encode()
        made = json.loads(front.ask(f"{private}/emails", "POST", body=body).body)
        assert made["pixel_url"] == f"{base}/{front.mail_id('Initech')}/pixel/k.gif"
        assert front.ask(made["pixel_url"].removeprefix(f"https://localhost:{front.nginx.port}")).body == PIXEL
        for link in made["links"]:  # the site's own pages are no pages of ours
            assert link["click_url"].startswith(f"{base}/")
            answer = front.ask(link["click_url"].removeprefix(f"https://localhost:{front.nginx.port}"))
            assert (answer.status, answer.headers["location"]) == (302, link["url"])
        for back in (base, f"{base}/a?b", f"https://localhost:{front.nginx.port}/mail/./x/../%74r.ack/a"):
            refused = front.ask(f"{private}/emails", "POST", body=json.dumps({"links": [back]}).encode())
            assert refused.status == 400 and b"leads back" in refused.body

        assert front.ask(front.pixel("Acme", "own"), host=HOSTS[0]).body == PIXEL  # a tracking host has no path
        front.nginx.server.environ["SSL_CERT_FILE"] = str(front.nginx.folder / "certificates" / "ca.pem")
        if not pixels:  # which come too late for it
            assert front.server.run("selftest", "Initech").startswith(f"{base} works: ")
        refused = front.ask(f"{private}/emails", "POST", "Content-Length: 99999999")
        assert (refused.status, refused.headers["content-type"]) == (413, "application/json")

        wait_until(lambda: front.ask(f"{private}/events.json").body.count(b'"key": "k"') == 3, front.server)
        log = (front.nginx.folder / "logs" / "email-tracker.access.log").read_text()
        assert "/-/dashboard" in log and "tr.ack" not in log and front.id("Initech") not in log


# == What no header, and no byte, keeps from being counted ==


@pytest.mark.parametrize("what", UNREAD)
def test_whatever_a_header_says_that_nobody_reads_a_hit_is_counted(what: str, front: Front) -> None:
    key = f"unread-{list(UNREAD).index(what)}"
    link = signed_link(front.ask, front.id("Odd"), key)
    assert is_pixel(front.ask(front.pixel("Odd", key), "GET", *UNREAD[what]))
    answer = front.ask(link, "GET", *UNREAD[what])
    assert (answer.status, answer.headers["location"]) == (302, "https://acme.com/")
    assert front.counted("Odd")[key] == 2
    answer = plain(front.nginx, link, "localhost", *UNREAD[what])
    assert (answer.status, answer.headers["location"]) == (301, f"{front.nginx.url}{link}")


def test_what_the_tracker_reads_of_a_request_reaches_it(front: Front) -> None:
    headers = ("Sec-Purpose", "Purpose", "X-Purpose", "X-Moz")
    for header in headers:
        assert is_pixel(front.ask(front.pixel("Odd", f"read-{header}"), "GET", f"{header}: prefetch"))
    reasons = {event["key"]: event["reason"] for event in front.exported("Odd", "events")}
    assert [reasons[f"read-{header}"] for header in headers] == ["prefetch-header"] * 4
    answer = front.ask(f"/{front.id('Odd')}/messages", "POST", "Content-Type: text/plain", body=b"a")
    assert answer.status == 415
    message = b"Content-Type: text/html\r\n\r\n<p>a</p>"
    answer = front.ask(f"/{front.id('Odd')}/messages", "POST", "Accept: application/json", body=message)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json; charset=utf-8")


@pytest.mark.parametrize("target", RAW)
def test_bytes_beyond_ascii_are_counted_and_redirected(target: str, front: Front) -> None:
    key, location = RAW[target]
    answer = front.ask(target.format(mail_id=front.mail_id("Odd")).encode().decode("latin-1"))
    assert (answer.status, answer.headers.get("location")) == (302 if location else 200, location)
    assert front.counted("Odd")[key] == 1


# == Logs ==


LOG_LINE = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\S* (?:[A-Z]+|-) "
    r"/(?:-(?:/(?:pixel|click|preferences|dashboard|stats|emails|events|links))?|health|assets|robots\.txt|favicon\.ico|) "
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
    "GET /{mail_id}/preferences/{key}/c2lnbmF0dXJlMTIz": "/-/preferences",
    "GET //{id}/dashboard": "/-/dashboard",
    "GET /{id}//dashboard": "/-/dashboard",
    "GET /{id}/": "/-",
    "GET /{id}/{key}": "/-",
    "GET /%2F{id}/dashboard": "/-/dashboard",
    "GET /health?{id}": "/health",
    "GET /healthy/{id}": "/-",
    "GET /assets/{id}": "/assets",
    "GET /robots.txt{id}": "/-",
    "GET /?{id}": "/",
    "GET https://localhost/{id}/dashboard": "/-/dashboard",
    "GET /{id}/%64ashboard": "/-",
    "GET /%68ealth/{id}": "/-",
    "GET /{mail_id}/pixel/..%2F..%2F{id}%2Fdashboard": "/-/pixel",
    "GET /health%2F..%2F{id}/dashboard": "/-/dashboard",
}
REFUSED_AND_LOGGED = (  # nginx answers these itself, since it can't read them
    "GET /{id}/%zz/{key}",
    "GET /{id}/../../{key}",
    "GET /{id}/a b/{key}",
    "TRACE /{id}/dashboard",
    "CONNECT {id}.example:443",
)


def ask_in_private(front: Front, line: str) -> None:
    """Ask for one of the targets above."""
    body = json.dumps({"key": KEY, "recipient": "reader@reader.example", "links": [TARGET]}).encode()
    headers = ("Connection: close", "Referer: https://reader.example/", "X-Forwarded-For: 127.0.0.99", f"Cookie: {KEY}")
    names = {"id": front.id("Acme"), "mail_id": front.mail_id("Acme"), "key": KEY, "target": TARGET}
    method, _, target = line.format(**names).partition(" ")
    text = request(target, method, *headers, body=body if method == "POST" else b"")
    assert front.exchange(text).startswith(b"HTTP/1.1 ")


def assert_logs_are_discreet(front: Front) -> None:
    private = (front.id("Acme"), front.mail_id("Acme"), KEY, TARGET.rpartition("/")[2], "acme.example", "reader")
    for path in (front.nginx.folder / "logs").iterdir():
        for word in (*private, "c2lnbmF0dXJl", "127.0.0.", "127.16."):
            assert word not in path.read_text(), path


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
        if how == "killed":
            front.server.kill()  # its socket stays behind, and refuses
        else:
            front.server.stop()  # its socket is gone
        assert front.ask(front.pixel("Acme", KEY)).status == 502
        assert front.ask(f"/{front.id('Acme')}/dashboard").status == 502
        refused = front.ask(f"/{front.id('Acme')}/emails", "POST", body=b"{}")
        assert (refused.status, refused.headers["retry-after"]) == (502, "5")
        assert "try again" in json.loads(refused.body)["error"]
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


# == Who wants no tracking ==


def test_no_forged_stale_or_foreign_link_chooses_anything_and_the_right_one_does_in_the_readers_language(
    front: Front,
) -> None:
    [mine] = front.register("Odd", [{"key": "who-says-no", "recipient": "ann@reader.example"}])
    [other] = front.register("Raw", [{"key": "who-says-no", "recipient": "ann@reader.example"}])
    path, foreign = (each["preferences"].removeprefix(front.nginx.url) for each in (mine, other))
    head, _, signature = path.rpartition("/")
    token = re.search('name="token" value="([^"]+)"', front.ask(path).body.decode())
    assert token
    stale = tracker.sign("x" * 64, front.mail_id("Odd"), "20000 who-says-no", tracker.CHOICE)
    changed = [signature[:n] + ("A" if signature[n] != "A" else "B") + signature[n + 1 :] for n in range(16)]
    links = [*(f"{head}/{each}" for each in changed), f"{head}/{foreign.rpartition('/')[2]}"]
    links += [foreign.replace(front.mail_id("Raw"), front.mail_id("Odd")), path.replace("who-says-no", "who-says-yes")]
    links.append(path.replace(front.mail_id("Odd"), front.id("Odd")))
    asks = [(link, choice, token[1]) for link in links for choice in ("stop", "erase")]
    asks += [(path, ("stop", "erase", "all", "")[n % 4], stale if n % 2 else f"{token[1][:-1]}{n}") for n in range(160)]
    assert len(asks) == 200

    def choose(link: str, choice: str, token: str) -> Answer:
        body = f"choice={choice}&token={token}".encode()
        return front.ask(link, "POST", "Content-Type: application/x-www-form-urlencoded", body=body)

    assert {choose(*each).status for each in asks} == {400, 404}
    front.exported("Odd", "emails")
    gone = front.server.folder / "data" / "gone"
    assert not gone.exists()
    assert b"Tracking beenden" in front.ask(path, "GET", "Accept-Language: de-DE, en;q=0.5").body
    assert choose(path, "erase", token[1]).status == 200
    keys = {row["key"] for row in front.exported("Odd", "emails")}
    assert gone.read_text().count(" forgotten") and "who-says-no" not in keys


# == Certificates ==


def https_works(nginx: Nginx, host: str) -> bool:
    with contextlib.suppress(OSError), nginx.connect(host):
        return True
    return False


def test_nginx_serves_proofs_before_any_certificate_exists_and_redirects_to_tls_once_there_is_one(
    tmp_path: Path,
) -> None:
    with fronts(tmp_path, ACME) as front:
        nginx, hosts = front.nginx, ("localhost", HOSTS[0])
        certificates, aside = nginx.folder / "certificates", nginx.folder / "aside"
        proofs = nginx.folder / ".well-known" / "acme-challenge"
        for folder in (aside, proofs):
            folder.mkdir(parents=True)
        (proofs / "x").write_text("the proof")
        (nginx.folder / "secret").write_text("a file beside the proofs")
        for host in hosts:
            (certificates / host).rename(aside / host)
        path = front.pixel("Acme", "a%2Eb") + "?x=1&y=%20//z"
        for number in (0, 1, 2):
            if number:  # a certificate comes, and one does what README says
                (aside / hosts[number - 1]).rename(certificates / hosts[number - 1])
            nginx.write()
            reload(front)
            assert plain(nginx, "/.well-known/acme-challenge/y").status == 404
            for host in hosts:
                for asked in ("/.well-known/acme-challenge/x", "/%2Ewell-known%2Facme-challenge/y/..%2Fx"):
                    answer = plain(nginx, asked, host)
                    assert (answer.status, answer.body) == (200, b"the proof")
                    assert answer.headers["content-type"] == "text/plain"
                for asked in ("/.well-known/acme-challenge/..%2F..%2Fsecret", "/.well-known/secret", "/secret"):
                    assert plain(nginx, asked, host).status in (301, 503)
                is_certified = host in hosts[:number]
                assert https_works(nginx, host) == is_certified
                for asked in (path, "//a//b", f"/{front.id('Acme')}/dashboard?range=7d", "/a%2Fb%2E?", "/"):
                    answer = plain(nginx, asked, host)
                    expected = (301, f"https://{host}:{nginx.port}{asked}") if is_certified else (503, None)
                    assert (answer.status, answer.headers.get("location")) == expected
        assert is_pixel(front.ask(path, host=HOSTS[0]))


def test_a_host_with_a_long_name_keeps_nginx_from_nothing_and_has_its_own_server(tmp_path: Path) -> None:
    long, longer = "a-host-of-sixty-characters-which-nginx-has-no-room.acme.test", f"{'x' * 63}.{'y' * 63}.globex.test"
    with fronts(tmp_path, ("Acme", "--tracking-host", long)) as front:
        nginx, path = front.nginx, front.pixel("Acme", "long")
        assert is_pixel(front.ask(path, host=long))  # by its own certificate
        answer = plain(nginx, path, long)
        assert (answer.status, answer.headers["location"]) == (301, f"https://{long}:{nginx.port}{path}")
        nginx.server.tenant("Globex", "--tracking-host", longer)
        nginx.write()
        reload(front)
        assert plain(nginx, path, longer).status == 503  # which has no certificate so far
        for other in (f"x{long}", f"{long}x", long.replace(".", "x")):
            assert plain(nginx, path, other).headers["location"].startswith(nginx.url)  # as the first host


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
    "//{m}/pixel/x.gif": (200, "x"),
    "/{m}//pixel/x.gif": (200, "x"),
    "/{m}/pixel/x.gif/": (200, "x"),
    "/{m}/./pixel/x.gif": (404, None),
    "/{m}/pixel/y/../x.gif": (404, None),
    "/{m}/pixel/%2E%2E/pixel/x.gif": (404, None),
    "/{m}/pixel/..": (404, None),
    "/{m}%2Fpixel/x.gif": (404, None),
    "/%2F{m}/pixel/x.gif": (200, "(unknown tenant)"),
    "/{m}/pixel/x.gif#part": (404, None),
    "/{m}/pixel/x.GIF": (404, None),
    "/{id}/dashboard/": (302, None),
    "/{id}//dashboard": (302, None),
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


def test_a_request_line_of_sixteen_kilobytes_reaches_the_tracker_and_a_longer_one_is_414(front: Front) -> None:
    base = f"/{front.mail_id('Sizes')}/click/long?url="
    spare = 16_384 - len(f"GET {base} HTTP/1.1\r\n")
    answer = front.ask(base + "a" * (spare - 1))
    assert answer.status == 400 and b"This link" in answer.body  # the tracker's page
    assert front.ask(base + "a" * (spare + 3)).status == 414
    assert front.counted("Sizes")["long"] == 0


@pytest.mark.parametrize("character", ["a", "\xe9"], ids=["one byte", "two bytes"])
def test_a_link_with_the_longest_target_redirects_and_is_recorded(character: str, front: Front) -> None:
    ascii_target, target = (f"https://sizes.example/{ord(character)}".ljust(4_096, each) for each in ("a", character))
    [made] = front.register("Sizes", [{"links": [target]}])
    signed = made["links"][0]["click_url"].removeprefix(front.nginx.url)
    encoded = "".join(f"%{byte:02X}" for byte in ascii_target.encode())
    plain = f"/{front.mail_id('Sizes')}/click/{made['key']}?url={encoded}"
    for path, leads_to in ((signed, target), (plain, ascii_target)):
        answer = front.ask(path)
        assert (answer.status, answer.headers.get("location")) == (302, quote(leads_to, safe=":/"))
    found = [event["url"] for event in front.exported("Sizes", "events") if event["key"] == made["key"]]
    assert Counter(found) == Counter([target, ascii_target])


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
    assert refused.status == 413 and refused.headers["server"] == "nginx"  # the tracker need not read it
    assert json.loads(refused.body) == {"error": "expected a body of at most 10 MB"}
    assert post(whole).status == 201
    assert {row["key"] for row in front.exported("Sizes", "emails")} & {key, f"large-{chunked}"} == {key}


# == Slow and odd clients ==

Hold = Callable[[Front, ExitStack], Iterator[None]]


def slow_bodies(front: Front, stack: ExitStack) -> Iterator[None]:
    """Twenty clients send half of an email that they register, and the rest much later."""
    connections = []
    for number in range(20):
        body = b'{"key": "slow-body-%02d"}' % number
        connections.append(stack.enter_context(front.nginx.connect(source=somebody())))
        connections[-1].sendall(request(f"/{front.id('Slow')}/emails", "POST", "Connection: close", body=body)[:-5])
    yield
    for number, connection in enumerate(connections):
        connection.sendall(b'-%02d"}' % number)
        assert read_answers(read_all(connection))[0].status == 201


def half_requests(front: Front, stack: ExitStack) -> Iterator[None]:
    """A hundred clients connect, a third of them without TLS; they send half a request or nothing, and no more."""
    text = request(front.pixel("Slow", "never"))
    connections: list[socket.socket] = []
    for number in range(100):
        if number % 3:
            tls = stack.enter_context(front.nginx.connect(source=somebody()))
            tls.sendall(text[: len(text) // 2] if number % 3 == 1 else b"")
            connections.append(tls)
        else:
            plain = socket.create_connection(("127.0.0.1", front.nginx.port), timeout=20)
            connections.append(stack.enter_context(plain))
    yield
    assert not closed(connections)
    assert front.counted("Slow")["never"] == 0


def unread_answers(front: Front, stack: ExitStack) -> Iterator[None]:
    """Clients ask for megabytes, by an export or by very many pixels, and never read them."""
    for start in range(0, 3_000, 1_000):
        mail = [{"key": f"bulk-{number}", "subject": "x" * 900} for number in range(start, start + 1_000)]
        front.register("Slow", mail)

    def connect() -> ssl.SSLSocket:
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.bind((somebody(), 0))
        plain.settimeout(20)
        plain.connect(("127.0.0.1", front.nginx.port))
        return stack.enter_context(front.nginx.context().wrap_socket(plain, server_hostname="localhost"))

    connections = []
    exports = f"/{front.id('Slow')}/emails"
    for _ in range(3):
        for _ in range(20):  # one is read at a time, and who is refused may ask again
            connection = connect()
            connection.sendall(request(f"{exports}.json", "GET", "Connection: close"))
            if (begins := connection.recv(15)) != b"HTTP/1.1 503 Se":
                break
            time.sleep(0.2)
        assert begins == b"HTTP/1.1 200 OK"
        connections.append(connection)
        # It is out of the tracker's hands at once, although the client has it not, and never will.
        is_free = lambda: front.ask(f"{exports}.csv?limit=1001").status == 200  # noqa: E731
        wait_until(is_free, front.server, SECONDS_FOR_A_PIXEL)
    for _ in range(10):
        connections.append(connect())
        connections[-1].sendall(request(front.pixel("Slow", "unread")) * 100)
    yield
    assert not closed(connections)


def idle_connections(front: Front, stack: ExitStack) -> Iterator[None]:
    """Hundreds of clients keep their connections after an answer."""
    connections = [stack.enter_context(front.nginx.connect(source=somebody())) for _ in range(IDLE)]
    for connection in connections:
        connection.sendall(request("/robots.txt"))
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
    yield
    assert not closed(connections)


def closed(connections: Iterable[socket.socket]) -> list[int]:
    """The connections that the other end has closed. Nothing is read."""
    poll = select.poll()
    for connection in connections:
        poll.register(connection, select.POLLRDHUP)
    return [fd for fd, _ in poll.poll(0)]


@pytest.mark.parametrize("hold", [slow_bodies, half_requests, unread_answers, idle_connections])
def test_pixels_are_answered_while_other_clients_hold_their_connections(hold: Hold, front: Front) -> None:
    keys = [f"{hold.__name__}-{number}" for number in range(20)]
    with ExitStack() as stack:
        held = hold(front, stack)
        next(held)
        for key in keys:
            asked = time.monotonic()
            assert is_pixel(front.ask(front.pixel("Slow", key)))
            assert time.monotonic() - asked < SECONDS_FOR_A_PIXEL
            time.sleep(0.02)
        assert list(held) == []
    times = front.counted("Slow")
    assert [times[key] for key in keys] == [1] * len(keys)


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
        for worker in front.server.workers() if busy else ():
            os.kill(worker, signal.SIGSTOP)
            stack.callback(os.kill, worker, signal.SIGCONT)
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
    """`tracker.py nginx` for Acme in this process: what it printed, and what it said."""

    def run(*words: str, status: int = 0, **environ: str) -> tuple[str, str]:
        for name, value in {"DATABASE_URL": f"sqlite:{tmp_path}/data/tracking.db", **environ}.items():
            monkeypatch.setenv(name, value)
        tracker.main(["--env", os.devnull, "tenant", "add", "Acme", "--local", "--tracking-host", "t.acme.test"])
        capsys.readouterr()
        assert tracker.main(["--env", os.devnull, "nginx", *words]) == status
        return capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("words", "environ", "says"),
    [
        ((), {"BASE_URL": ""}, "BASE_URL is not set; expected the public address, such as https://track.example.com"),
        ((), {"BIND": "fd://3"}, "BIND is fd://3; expected where nginx finds the tracker: unix:/path"),
        ((), {"BIND": "unix:/run/a b.sock"}, "'/run/a b.sock': expected an absolute path"),
        (("--webroot", "/srv/a b"), {}, "'/srv/a b': expected an absolute path"),
        (("--certificates", "/srv/$a"), {}, "'/srv/$a': expected an absolute path"),
        (("--log-folder", "/srv/a;b"), {}, "'/srv/a;b': expected an absolute path"),
        (("--http-port", "0"), {}, "--http-port is 0: expected a port from 1 to 65535"),
        (("--real-ip-from", "cloudflare"), {}, "'cloudflare': expected an address or a network"),
        (("--real-ip-from", "0.0.0.0/0"), {}, "'0.0.0.0/0': expected a network"),
        (("--location", "--log-folder", "/srv/a;b"), {}, "'/srv/a;b': expected an absolute path"),
    ],
)
def test_what_nginx_would_read_as_something_else_is_refused(
    words: tuple[str, ...], environ: dict[str, str], says: str, printed: Callable[..., Any]
) -> None:
    out, err = printed(*words, status=1, **{"BASE_URL": BASE, **environ})
    assert out == "" and says in err and err.count("\n") == 1


def test_the_commands_for_missing_certificates_are_printed_beside_the_file(
    printed: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "track.example.com").mkdir()
    (tmp_path / "track.example.com" / "fullchain.pem").write_text("there is one")
    out, err = printed("--certificates", str(tmp_path), "--webroot", "/var/www/proofs", BASE_URL=BASE)
    assert out.startswith("# Made by ")
    assert "certbot certonly --webroot -w /var/www/proofs -d t.acme.test" in err
    assert "-d track.example.com" not in err


def test_below_a_path_the_site_keeps_its_server_and_is_told_what_it_needs(printed: Callable[..., Any]) -> None:
    out, err = printed(BASE_URL=f"{BASE}/track")
    assert "server_name t.acme.test;" in out and "server_name track.example.com;" not in out
    assert "the server of track.example.com, which you have, needs what `nginx --location` prints" in err
    out, err = printed("--location", BASE_URL=f"{BASE}/track")
    assert "location /track/ {" in out and "server {" not in out and err == ""
