"""The real server under load: workers are killed, the database is locked, and every hit is counted once."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote

import pytest
from conftest import CHROME, ON_SQLITE, PROGRAM, ROOT, SERVE, Server, hears_signals, missing
from load import (
    Sent,
    counted,
    counted_keys,
    data,
    database_of,
    locked,
    recounted,
    segments,
    terminate,
    user_agents,
    wait_until,
)

import tracker

BOTH_ENGINES = True
CLIENTS = 8
EMAILS = 100  # of each of the three tenants


# == Servers ==


def file_of(server: Server) -> Path:
    return data(server) / "tracking.db"


@contextlib.contextmanager
def held(server: Server) -> Iterator[None]:
    """Somebody else writes, and does not come to an end: a shell, or another machine."""
    if server.is_shared:
        with contextlib.closing(database_of(server)) as database, database.transaction():
            yield
    else:
        with locked(file_of(server)):
            yield


def attempt(server: Server, **environ: str) -> subprocess.CompletedProcess[str]:
    """`serve` where it must not start; waits until it has given up."""
    told = {**server.environ, "BIND": f"unix:{server.folder}/socket", **environ}
    done = subprocess.run(SERVE, env=told, capture_output=True, text=True, timeout=60, cwd=server.folder)
    assert "Traceback" not in done.stderr
    return done


def launch(server: Server, *words: str, program: str = sys.executable) -> None:
    """Start a server by `python WORDS` or so, and wait for both workers."""
    server.launch(program, *words)
    wait_until(lambda: len(server.workers()) == 2, server)


# == Requests ==


def get(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """One request on a connection of its own; headers in lower case."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        with connection.getresponse() as answer:  # where the body breaks off, it still holds the socket
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


def post(server: Server, path: str, body: object) -> Any:
    """Send JSON; returns the JSON of the answer."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        connection.request("POST", path, json.dumps(body))
        answer = connection.getresponse()
        assert answer.status == 201
        return json.loads(answer.read())


@dataclass(slots=True)
class Outcome:
    """What became of requests."""

    answered: list[Sent] = field(default_factory=list)
    broken: list[Sent] = field(default_factory=list)  # the connection ended before an answer
    wrong: list[str] = field(default_factory=list)  # an answer, but not the right one
    killed: list[int] = field(default_factory=list)


def fire(server: Server, requests: Iterable[Sent], kills: Sequence[int] = (), *, until_broken: bool = False) -> Outcome:
    """Send requests from several clients at once; kill a worker each time so many are answered."""
    outcome = Outcome()
    waiting = iter(requests)
    mutex = threading.Lock()

    def client() -> None:
        while True:
            with mutex:
                sent = next(waiting, None)
            if sent is None:
                return
            try:
                answer = get(server.port, sent.path, sent.method, User_Agent=sent.agent, X_Forwarded_For=sent.address)
            except (ConnectionError, http.client.BadStatusLine, http.client.IncompleteRead):
                outcome.broken.append(sent)
                if until_broken:
                    return
                continue
            outcome.answered.append(sent)
            if wrong := sent.fault(*answer):
                outcome.wrong.append(wrong)

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client) for _ in range(CLIENTS)]
        for number in kills:
            wait_until(lambda: len(outcome.answered) >= number or any(each.done() for each in clients), server, 120)  # noqa: B023
            # A worker that was killed may be a zombie still.
            outcome.killed.append(next(pid for pid in server.workers() if pid not in outcome.killed))
            os.kill(outcome.killed[-1], signal.SIGKILL)
    for each in clients:
        each.result()  # raises what it was ended by
    return outcome


def address(number: int) -> str:
    """An address that nobody has: the range that RFC 2544 keeps for benchmarks."""
    return str(IPv4Address("198.18.0.1") + number)


def pixels(mail_id: str, prefix: str, many: int) -> list[Sent]:
    """Requests for pixels, each of an email that nobody registered."""
    keys = (f"{prefix}-{number}" for number in range(many))
    return [
        Sent(address(number), mail_id, key, f"/{mail_id}/pixel/{key}.gif", CHROME, "GET", None)
        for number, key in enumerate(keys)
    ]


# == The load ==


@dataclass(slots=True)
class Sender:
    """A tenant in this play, and where its links lead."""

    ids: dict[str, Any]
    host: str
    redirects: bool  # whether its plain links do
    targets: dict[str, str] = field(default_factory=dict)  # by click URL


def plain_links(server: Server, sender: Sender, key: str, number: int) -> dict[str, str]:
    """Plain links of an email, encoded and as people write them by hand, by their URL."""
    base = f"{server.url}/{sender.ids['mail_id']}/click/{quote(key, safe='')}?url="
    encoded, by_hand = (f"https://shop.{sender.host}/?{how}={number}&more=1" for how in ("encoded", "by-hand"))
    return {f"{base}{quote(f'{encoded}#end', safe='')}": f"{encoded}#end", f"{base}{by_hand}": by_hand}


def register(server: Server, sender: Sender) -> list[tuple[str, str, list[str]]]:
    """Register a tenant's emails; returns the key, the pixel and the links of each."""
    wanted = [
        {
            # Some senders bring keys of their own, with all the characters that keys may hold.
            **({"key": f"order+{number}@{sender.host}:a=b~c.d_e-f"} if number % 2 else {}),
            "recipient": f"reader{number}@reader.example",
            "subject": "Neuigkeiten für März – 10 % auf alles",
            "campaign": f"campaign {number % 3}",
            "links": [f"https://{sender.host}/offers/{number}?utm=a%20b&n={n}#part-{n}" for n in range(7)],
        }
        for number in range(EMAILS)
    ]
    made = post(server, f"/{sender.ids['id']}/emails", wanted)
    assert len(made) == EMAILS
    found = []
    for number, each in enumerate(made):
        links = {link["click_url"]: link["url"] for link in each["links"]}
        links |= plain_links(server, sender, each["key"], number)
        sender.targets |= links
        found.append((each["key"], each["pixel_url"], list(links)))
    return found


def readers_requests(
    server: Server, senders: Sequence[Sender], mail: Sequence[list[tuple[str, str, list[str]]]]
) -> list[Sent]:
    """What readers, proxies and scanners ask for once the mail is there, in an order that mixes tenants."""
    agents = user_agents()
    made: list[Sent] = []

    def ask(sender: Sender, key: str, url: str, target: str | None, redirects: bool = True) -> None:
        number, path = len(made), url.removeprefix(server.url)
        method = "GET" if number % 23 else "HEAD"
        agent = agents[number % len(agents)]
        made.append(Sent(address(number), sender.ids["mail_id"], key, path, agent, method, target, redirects))

    for number in range(EMAILS):
        for sender, received in zip(senders, mail, strict=True):
            key, pixel, links = received[number]
            for _ in range(5):
                ask(sender, key, pixel, None)
            for link in links:
                ask(sender, key, link, sender.targets[link], sender.redirects or "?url=" not in link)
            for n in range(3):
                key = f"unregistered-{number}-{n}"
                ask(sender, key, f"/{sender.ids['mail_id']}/pixel/{key}.gif", None)
    Random(7).shuffle(made)
    return made


def exported(server: Server, id_: str, table: str, limit: int = 700) -> list[dict[str, Any]]:
    """All rows of an export, page by page."""
    found: list[dict[str, Any]] = []
    page: dict[str, Any] = {"next": ""}
    while page["next"] is not None:
        status, _, body = get(server.port, f"/{id_}/{table}.json?limit={limit}&after={page['next']}")
        assert status == 200, body
        page = json.loads(body)
        found += page["rows"]
    return found


def end(server: Server) -> None:
    """Tell a server to end, drain what its workers kept each other from, and see that nothing waits then."""
    assert server.process is None or terminate(server) == 0
    server.run("drain")
    assert segments(server) == []


def assert_counted_once(server: Server, *outcomes: Outcome) -> None:
    """A server that is told to end has counted all that was answered, and each once."""
    assert [wrong for outcome in outcomes for wrong in outcome.wrong] == []
    end(server)
    assert counted_keys(server) == Counter(sent.key for outcome in outcomes for sent in outcome.answered)
    assert server.run("check") == "all is well\n"


def test_every_answered_request_is_counted_once_while_workers_die_and_the_database_is_locked(
    servers: Callable[..., Server],
) -> None:
    server = servers(IP_ADDRESSES="full")
    senders = [
        Sender(server.tenant("Acme", "--domain", "acme.example"), "acme.example", redirects=True),
        Sender(server.tenant("Globex", "--any-domain"), "globex.example", redirects=True),
        Sender(server.tenant("Initech"), "initech.example", redirects=False),
    ]
    server.start()
    mail = [register(server, sender) for sender in senders]
    requests = readers_requests(server, senders, mail)
    assert len(requests) >= 5_000

    # A worker is killed each time so many requests of a part are answered.
    outcomes = [fire(server, requests[:1500], (300, 900))]
    with held(server):
        release_at = time.monotonic() + 2
        outcomes.append(fire(server, requests[1500:3500], (800,)))  # all are answered although the lock is held
        time.sleep(max(release_at - time.monotonic(), 0))
    outcomes.append(fire(server, requests[3500:], (300, 900)))
    answered, broken, wrong, killed = (
        [each for outcome in outcomes for each in getattr(outcome, name)]
        for name in ("answered", "broken", "wrong", "killed")
    )
    assert wrong == []
    assert len(answered) + len(broken) == len(requests)
    assert len(set(killed)) == 5
    assert len(broken) <= len(killed)  # a worker has one request at a time

    end(server)
    assert os.listdir(data(server) / "spool" / "rejected") == []
    assert server.run("check") == "all is well\n"

    server.start()  # the same numbers, over HTTP
    for sender, received in zip(senders, mail, strict=True):
        events = exported(server, sender.ids["id"], "events")
        of_tenant = {sent.address: sent for sent in requests if sent.mail_id == sender.ids["mail_id"]}
        times = Counter(event["ip_address"] for event in events)
        assert [address for address, number in times.items() if number > 1] == []
        answered_here = {sent.address for sent in answered} & set(of_tenant)
        assert answered_here - set(times) == set()  # none is lost
        assert set(times) - answered_here <= {sent.address for sent in broken}  # none is made up
        assert set(times) <= set(of_tenant)  # none is another tenant's
        for event in events:
            expected = of_tenant[event["ip_address"]].event()
            assert {name: event[name] for name in expected} == expected

        registered = {key for key, _, _ in received}
        assert {row["key"] for row in exported(server, sender.ids["id"], "emails") if row["registered"]} == registered
        stats = json.loads(get(server.port, f"/{sender.ids['id']}/stats.json?range=24h")[2])
        assert stats["waiting_hits"] == 0
        expected = recounted(events, registered)
        stats["sent"] = {name: stats["sent"][name] for name in expected["sent"]}
        assert {name: stats[name] for name in expected} == expected
        named = sum(event["reason"] == "destination-not-allowed" for event in events)
        assert sum(line["clicks"] for line in stats["naming_page"]) == named
        assert bool(named) is not sender.redirects


@pytest.mark.sqlite
def test_sigterm_under_load_answers_what_was_accepted_and_drains_the_spool(server: Server) -> None:
    requests = pixels(server.first_tenant(), "load", 9_000)
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(fire, server, requests, until_broken=True)
        wait_until(lambda: counted(server) >= 300, server)  # the load is under way
        assert not load.done()
        assert terminate(server) == 0
        server.listener.close()  # what no worker had accepted is refused now
        if not server.is_shared:
            assert segments(server) == []
    assert load.result().broken
    assert_counted_once(server, load.result())  # what was counted was accepted, so it must have been answered


@pytest.mark.parametrize("bare", [False, ON_SQLITE(True)], ids=["serve", "bare gunicorn"])
def test_hits_are_counted_while_it_serves_and_those_behind_a_lock_when_sigterm_comes_before_the_end(
    bare: bool, servers: Callable[..., Server]
) -> None:
    server = servers()
    mail_id = server.tenant("Acme")["mail_id"]
    if bare:  # from another folder, as somebody with a gunicorn of his own would start it
        gunicorn = ("-m", "gunicorn", "--no-control-socket", "--bind", server.environ["BIND"], "--workers", "2")
        launch(server, *gunicorn, "--pythonpath", str(ROOT), "tracker")
    else:
        server.start()
    early = fire(server, pixels(mail_id, "early", 50))
    # Nobody asks for numbers, so only the thread can have counted these.
    wait_until(lambda: counted(server) >= 50, server)
    process = server.process
    assert process is not None
    with held(server):
        outcome = fire(server, pixels(mail_id, "waiting", 100))
        assert (len(outcome.answered), outcome.broken) == (100, [])
        process.send_signal(signal.SIGTERM)
        time.sleep(0 if bare else 8)  # longer than a worker waits for its turn while it serves
    assert process.wait(timeout=60) == 0
    server.process = None
    assert segments(server) == []
    assert_counted_once(server, early, outcome)


def test_hits_of_a_server_that_was_killed_outright_are_counted_by_the_next(servers: Callable[..., Server]) -> None:
    server = servers()
    mail_id = server.tenant("Acme")["mail_id"]
    server.start()
    with held(server):
        outcome = fire(server, pixels(mail_id, "killed", 100))
        server.kill()
        assert segments(server) and len(outcome.answered) == 100
    server.start()
    wait_until(lambda: counted(server) >= 100, server)
    assert_counted_once(server, outcome)


@pytest.mark.sqlite
def test_a_killed_worker_is_replaced_and_its_hits_are_counted(server: Server) -> None:
    mail_id = server.first_tenant()
    old = set(server.workers())
    first = fire(server, pixels(mail_id, "before", 50))
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    second = fire(server, pixels(mail_id, "after", 50))
    wait_until(lambda: len(set(server.workers()) - old) == 2, server)
    # A killed worker takes no request with it that it had not yet; the listener keeps them for the next.
    assert (len(first.answered), len(second.answered)) == (50, 50)
    assert_counted_once(server, first, second)


@pytest.mark.sqlite
def test_a_worker_that_is_aborted_breaks_at_most_the_request_in_its_hands(server: Server) -> None:
    """gunicorn aborts a worker whose request lasts too long."""
    requests = pixels(server.first_tenant(), "abort", 1_500)
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(fire, server, requests)
        for number in (200, 600, 1_000):
            wait_until(lambda: counted(server) >= number or load.done(), server)  # noqa: B023
            wait_until(lambda: len(server.workers()) == 2 and all(map(hears_signals, server.workers())), server)
            os.kill(server.workers()[0], signal.SIGABRT)
    outcome = load.result()
    assert len(outcome.broken) + len(outcome.wrong) <= 3
    assert all(" 500" in wrong for wrong in outcome.wrong)
    assert terminate(server) == 0
    times = counted_keys(server)
    assert set(times.values()) == {1}
    assert len({sent.key for sent in outcome.answered} - set(times)) <= len(outcome.wrong)


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


@pytest.mark.sqlite
def test_a_second_master_that_sigusr2_starts_takes_over_without_a_lost_request(servers: Callable[..., Server]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = servers(BIND=f"127.0.0.1:{port}")
    server.port = port
    process = server.start().process
    assert process is not None
    mail_id = server.first_tenant()
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(fire, server, pixels(mail_id, "upgrade", 2_000))
        wait_until(lambda: counted(server) >= 100, server)
        process.send_signal(signal.SIGUSR2)
        masters: list[int] = []
        try:
            wait_until(lambda: bool([*filter(children, server.workers())]), server)
            masters += filter(children, server.workers())
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            server.process = None
            outcome = load.result()
            assert (outcome.broken, outcome.wrong, len(outcome.answered)) == ([], [], 2_000)
            assert get(port, "/health")[0] == 200
        finally:
            for pid in masters:
                os.kill(pid, signal.SIGTERM)
                wait_until(lambda: not children(pid), server)  # noqa: B023
    wait_until(lambda: not segments(server), server)
    assert_counted_once(server, outcome)


def drains(pid: int) -> bool:
    """Whether a process holds drain.lock."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(link).endswith("/drain.lock"):
                return "FLOCK" in Path(f"/proc/{pid}/fdinfo/{link.name}").read_text()
    return False


@pytest.mark.sqlite
def test_workers_leave_draining_to_drain_follow_while_it_lives_and_take_it_up_again(server: Server) -> None:
    made = server.tenant("Acme")
    wait_until(lambda: any(map(drains, server.workers())), server)
    with subprocess.Popen([*PROGRAM, "drain", "--follow"], env=server.environ, cwd=server.folder) as follower:
        try:
            wait_until(lambda: drains(follower.pid), server)
            outcome = fire(server, pixels(made["mail_id"], "during", 50))
            wait_until(lambda: counted(server) == 50, server)
            with open(data(server) / "write.lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                outcome.answered += fire(server, pixels(made["mail_id"], "locked", 50)).answered
                for _ in range(5):  # it goes on saying that it lives
                    told_at = (data(server) / "drain.follow").stat().st_mtime_ns
                    wait_until(lambda: (data(server) / "drain.follow").stat().st_mtime_ns > told_at, server)  # noqa: B023
            assert drains(follower.pid)
        finally:
            follower.kill()
    outcome_after = fire(server, pixels(made["mail_id"], "after", 50))
    wait_until(lambda: any(map(drains, server.workers())), server)
    wait_until(lambda: counted(server) == 150, server)
    assert_counted_once(server, outcome, outcome_after)


def asking(server: Server, path: str) -> socket.socket:
    """A connection on which something was asked for."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: {CHROME}\r\n\r\n".encode())
    return connection


@pytest.mark.sqlite
def test_nobody_waits_until_others_close_their_connections(server: Server) -> None:
    path = f"/{server.first_tenant()}/pixel/"
    with contextlib.ExitStack() as kept:
        for n in range(100):
            kept.enter_context(asking(server, f"{path}k{n}.gif"))
        wait_until(lambda: counted(server) == 100, server)  # gunicorn by itself waits for two seconds each time
    assert terminate(server) == 0


@pytest.mark.sqlite
def test_a_tenant_made_while_the_server_runs_is_served_without_a_restart(server: Server) -> None:
    first = fire(server, pixels(server.first_tenant(), "first", 20))  # workers know the tenants of this moment
    made = server.tenant("Acme", "--domain", "acme.example")
    path = f"/{made['mail_id']}/click/k1?url=https://acme.example/"
    wait_until(lambda: get(server.port, path)[0] == 302, server)
    assert first.wrong == []
    assert get(server.port, f"/{made['id']}/dashboard")[0] == 200


def heard(client: socket.socket) -> tuple[int, bytes]:
    """The status and the body of an answer, up to where the server hangs up; the body is as long as was said."""
    head, _, body = b"".join(iter(partial(client.recv, 65_536), b"")).partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    return int(head.split()[1]), body


@pytest.mark.sqlite
def test_who_does_not_hang_up_holds_up_no_worker(server: Server) -> None:
    sender = server.tenant("Acme")
    with contextlib.ExitStack() as held:
        clients = [
            held.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30)) for _ in range(80)
        ]
        for n, client in enumerate(clients):
            client.sendall(f"GET /{sender['mail_id']}/pixel/k{n}.gif HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        answers = {heard(client) for client in reversed(clients)}  # two seconds for each would be too long
    assert len(answers) == 1 and answers.pop()[0] == 200


@pytest.mark.sqlite
def test_an_answer_comes_whole_where_nobody_reads_the_body_of_its_request(server: Server) -> None:
    for method in (b"POST", b"GET") * 10:
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
            client.sendall(method + b" /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 30000\r\n\r\n")
            client.sendall(b"x" * 30_000)
            assert heard(client)[0] == 404


@pytest.mark.sqlite
def test_the_next_page_of_an_export_can_be_asked_for_as_soon_as_one_has_come(servers: Callable[..., Server]) -> None:
    server = servers()
    made = server.tenant("Acme")
    server.start()
    fire(server, pixels(made["mail_id"], "page", 200))
    # One export runs at a time, so whoever has all of a page must not find that it still runs.
    rows_of_pages = exported(server, made["id"], "events", limit=1)
    assert len({row["key"] for row in rows_of_pages}) == len(rows_of_pages) == 200


@pytest.mark.sqlite
def test_a_server_ends_however_young_its_workers_are(servers: Callable[..., Server]) -> None:
    server = servers()
    for _ in range(6):
        server.log.unlink(missing_ok=True)
        server.start()  # returns when the first worker is about to begin
        process = server.process
        assert process is not None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=25) == 0  # a worker that did not hear would be waited for 30 s


WAYS = {  # the command in a shell, and settings
    "stdin closed": ('exec "$@" <&-', {}),
    "stdout closed": ('exec "$@" >&-', {}),
    "stderr closed": ('exec "$@" 2>&-', {}),
    "no command": ('exec "$1" "$2" "$3" "$4"', {}),
    # These gunicorn reads more strictly than we do.
    "settings": ('exec "$@"', {"FORWARDED_ALLOW_IPS": "10.0.0.1 127.0.0.1", "WEB_CONCURRENCY": ""}),
}


@pytest.mark.sqlite
@pytest.mark.parametrize("way", WAYS)
def test_a_server_that_is_started_in_this_way_serves(way: str, servers: Callable[..., Server]) -> None:
    script, settings = WAYS[way]
    server = servers(**settings)
    launch(server, "-c", script, "sh", *SERVE, program="sh")
    status, _, body = get(server.port, "/health")
    assert status == 200 and json.loads(body)["status"] == "ok"
    assert server.first_tenant()
    assert terminate(server) == 0


def test_two_servers_on_one_database_count_every_hit_once(servers: Callable[..., Server]) -> None:
    one = servers()
    two = servers(DATABASE_URL=one.environ["DATABASE_URL"])
    # Both at once on an empty folder: one makes the database, the other finds it.
    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(Server.start, (one, two))] == [one, two]
    assert [tenant["name"] for tenant in json.loads(one.run("tenant", "list", "--json"))] == ["default"]
    mail_id = one.first_tenant()
    with ThreadPoolExecutor(2) as pool:
        outcomes = [*pool.map(lambda server: fire(server, pixels(mail_id, f"to-{server.port}", 300)), (one, two))]
    assert sum(len(outcome.answered) for outcome in outcomes) == 600
    assert terminate(two) == 0
    assert_counted_once(one, *outcomes)


# == What keeps a server from starting ==


def newer(server: Server) -> None:
    server.tenant("Acme")
    with contextlib.closing(sqlite3.connect(file_of(server))) as connection:
        connection.execute("pragma user_version = 99")


def instead(content: bytes) -> Callable[[Server], object]:
    def put(server: Server) -> None:
        data(server).mkdir()
        file_of(server).write_bytes(content)

    return put


NOBODYS = "/proc/email-tracker"
Fault = tuple[Callable[[Server], object], dict[str, str], int, str]
FAULTS: dict[str, Fault] = {  # what was done, settings, status, what is told
    "file in place of the folder": (lambda server: data(server).write_text("x"), {}, 1, "can't write to {data}"),
    "folder that nobody can make": (str, {"DATABASE_URL": f"sqlite:{NOBODYS}/t.db"}, 1, f"can't write to {NOBODYS}"),
    "folder in place of the database": (lambda server: file_of(server).mkdir(parents=True), {}, 1, "{database}"),
    "empty database": (instead(b""), {}, 1, "{database}"),
    "text in place of the database": (instead(b"a shopping list\n" * 100), {}, 1, "{database}"),
    "setting that can't be read": (str, {"WEB_CONCURRENCY": "many"}, 2, "WEB_CONCURRENCY"),
    "port that is taken": (str, {"BIND": "127.0.0.1:{port}"}, 1, "in use"),  # its own listener has it
}


@pytest.mark.sqlite
@pytest.mark.parametrize("fault", FAULTS)
def test_what_keeps_a_server_from_starting_is_said_and_left_as_it_is(
    fault: str, servers: Callable[..., Server]
) -> None:
    server = servers()
    prepare, settings, status, told = FAULTS[fault]
    prepare(server)
    database = file_of(server)
    before = database.read_bytes() if database.is_file() else None
    done = attempt(server, **{name: value.format(port=server.port) for name, value in settings.items()})
    assert done.returncode == status
    assert told.format(data=data(server), database=database) in done.stderr
    assert fault != "port that is taken" or done.stderr.count("\n") == 1
    assert before is None or database.read_bytes() == before


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a folder read-only. Root may write whatever the permission bits say, but not to a read-only mount."""
    if os.geteuid() != 0:
        folder.chmod(0o500)
        yield
        folder.chmod(0o700)
        return
    try:
        subprocess.run(["mount", "-o", "bind,ro", str(folder), str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        missing("the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.sqlite
@pytest.mark.parametrize("where", ["data", "data/spool", "data of nobody yet"])
def test_a_read_only_folder_keeps_the_server_from_starting(where: str, servers: Callable[..., Server]) -> None:
    server = servers()
    data(server).mkdir()
    if "nobody" not in where:
        server.tenant("Acme")
    folder = server.folder / where.partition(" ")[0]
    with read_only(folder):
        done = attempt(server)
    assert done.returncode == 1
    assert "can't write to" in done.stderr and str(folder) in done.stderr


@pytest.mark.sqlite
def test_a_server_started_without_its_database_answers_hits_makes_no_other_and_counts_them_once_it_is_back(
    servers: Callable[..., Server],
) -> None:
    server = servers()
    made = server.tenant("Acme", "--domain", "acme.com")
    database = file_of(server)
    aside = database.rename(data(server) / "aside.db")
    server.start()
    outcome = fire(server, pixels(made["mail_id"], "lost", 20))
    assert (outcome.wrong, len(outcome.answered)) == ([], 20)
    assert "restore it from a backup" in json.loads(get(server.port, "/health")[2])["why"][0]
    assert not database.exists()
    aside.rename(database)
    wait_until(lambda: counted(server) >= 20, server)
    assert get(server.port, f"/{made['id']}/dashboard")[0] == 200
    assert_counted_once(server, outcome)


READ_ONLY = """
mount --bind "$1" /mnt && shift || exit
for folder in /tmp /var/tmp /dev/shm; do mount --bind $folder $folder && mount -o remount,ro,bind $folder || exit; done
cd /proc && exec "$@"
"""


@pytest.mark.sqlite
def test_where_no_folder_for_temporary_files_can_be_written_to_it_serves_and_says_so(
    servers: Callable[..., Server],
) -> None:
    server = servers(DATABASE_URL="sqlite:/mnt/data/tracking.db")
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "mount", "--bind", "/tmp", "/mnt"]).returncode:
        missing("the right to mount")
    server.launch("unshare", "--mount", "sh", "-c", READ_ONLY, "sh", str(server.folder), *SERVE)
    assert get(server.port, "/nobody/pixel/k.gif")[0] == 200
    assert "neither /dev/shm nor /tmp can be written to" in server.stop()


def test_a_port_is_listened_on_by_ipv4_and_ipv6_and_a_proxy_is_known_by_both(servers: Callable[..., Server]) -> None:
    if not tracker.is_dual_stack():
        missing("a socket for IPv4 and IPv6")
    server, other = servers(), servers()
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as free:
        port = free.getsockname()[1]
        for each in (server, other):
            each.environ.pop("BIND")
            each.environ["PORT"] = str(port)
    server.start()
    acme = server.tenant("Acme")
    for n, host in enumerate(("127.0.0.1", "::1")):
        with contextlib.closing(http.client.HTTPConnection(host, port, timeout=60)) as connection:
            path, forwarded = f"/{acme['mail_id']}/pixel/k{n}.gif", {"X-Forwarded-For": f"198.51.10{n}.7"}
            connection.request("GET", path, headers=forwarded)
            assert connection.getresponse().read()[:3] == b"GIF"
    server.run("drain")
    rows = server.run("export", "Acme", "events", "--format", "json")
    assert {each["key"]: each["ip_address"] for each in json.loads(rows)["rows"]} == {
        "k0": "198.51.100.0",
        "k1": "198.51.101.0",
    }
    with pytest.raises(AssertionError, match=rf"can't listen on \[::\]:{port}: Address already in use"):
        other.start()
