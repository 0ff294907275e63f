"""Webhooks: what becomes of hits is sent to a real receiver, whatever it or we do."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from typing import Any
from urllib.parse import quote

import pytest
from asking import ACME_KEY, bearer, call
from conftest import NOW, OPERATOR_KEY, PROGRAM, Stage, click, hit, segment

import tracker

BOTH_ENGINES = True
LOCAL = "127.0.0.0/8"


class Receiver:
    """What a webhook leads to: it keeps what it is sent, and answers as it is told."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.answers: Callable[[int, dict[str, Any]], int] = lambda _, __: 204
        self.at_once, self.most, self.connections = 0, 0, set[Any]()
        self._lock, receiver = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if len(body) < int(self.headers["Content-Length"]):  # whoever sent it was killed
                    return
                with receiver._lock:
                    receiver.at_once += 1
                    receiver.most = max(receiver.most, receiver.at_once)
                    receiver.connections.add(self.client_address)
                    number = len(receiver.got)
                    receiver.got.append(({name.lower(): text for name, text in self.headers.items()}, body))
                status = receiver.answers(number, json.loads(body))
                with receiver._lock:
                    receiver.at_once -= 1
                self.send_response(status)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def told(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.got]

    @property
    def keys(self) -> list[str]:
        return [each["data"]["key"] for each in self.told]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.server.shutdown()
    made.server.server_close()


def hook(stage: Stage, url: str, **more: Any) -> tracker.Webhook:
    """A webhook of Acme's."""
    secret = "whsec_" + "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0"
    made = tracker.Webhook(stage.acme.number, url, secrets=secret)._replace(**more)
    with stage.database.transaction() as connection:
        tracker.set_feed(connection, stage.acme.number, True)
        tracker.set_webhook(connection, made)
    return made


MADE: list[tracker.Courier] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Hang up."""
    yield
    while MADE:
        MADE.pop().close()


def courier(stage: Stage, webhook: tracker.Webhook, held: int = 0) -> tracker.Courier:
    MADE.append(tracker.Courier(stage.database, webhook, [LOCAL], held))
    return MADE[-1]


def drained(stage: Stage, *lines: bytes) -> None:
    segment(stage, *lines)
    assert stage.drain().troubles == []


def state(stage: Stage) -> tuple[Any, ...]:
    return stage.rows("select position, failing_since is not null, trouble, off from webhooks")[0]


def test_what_is_sent_verifies_with_the_library_of_the_standard(stage: Stage, receiver: Receiver) -> None:
    standardwebhooks = pytest.importorskip("standardwebhooks")
    new, old = "whsec_" + "bmV3LW5ldy1uZXctbmV3LW5ldy1uZXc=", "whsec_" + "b2xkLW9sZC1vbGQtb2xkLW9sZC1vbGQ="
    webhook = hook(stage, receiver.url, secrets=f"{new} {old}")
    drained(stage, hit(stage, "e1"), click(stage, "e1", at=NOW + 9_000))
    assert courier(stage, webhook).turn() == 0
    for headers, body in receiver.got:
        for secret in (new, old):
            assert standardwebhooks.Webhook(secret).verify(body, headers) == json.loads(body)
        with pytest.raises(standardwebhooks.WebhookVerificationError):
            standardwebhooks.Webhook("whsec_" + "b3RoZXItb3RoZXItb3RoZXI=").verify(body, headers)
        assert headers["webhook-id"] == json.loads(body)["data"]["id"]
    rows = stage.web.get(f"/{stage.acme.id}/feed.json").json["rows"]
    assert [each["data"] for each in receiver.told] == rows
    assert [each["type"] for each in receiver.told] == ["opened", "clicked"]


def test_those_of_one_email_come_in_order_at_most_four_at_once_and_on_kept_connections(
    stage: Stage, receiver: Receiver
) -> None:
    def slowly(*_: Any) -> int:
        time.sleep(0.005)
        return 200

    receiver.answers = slowly
    webhook = hook(stage, receiver.url)
    drained(stage, *(hit(stage, f"e{n % 10}", NOW + n * 3_600_000) for n in range(100)))
    assert courier(stage, webhook).turn() == 0
    by_key: dict[str, list[str]] = defaultdict(list)
    for each in receiver.told:
        by_key[each["data"]["key"]].append(each["data"]["timestamp"])
    assert (len(by_key), sum(map(len, by_key.values()))) == (10, 100)
    assert all(times == sorted(times) for times in by_key.values())
    assert 1 < receiver.most <= 4 and len(receiver.connections) <= 4
    assert state(stage) == (100, False, "", False)


@pytest.mark.parametrize("status", [500, 503, 404, 302, 301])
@pytest.mark.sqlite
def test_what_is_not_taken_is_sent_again_and_what_was_taken_is_not(
    stage: Stage, receiver: Receiver, status: int
) -> None:
    receiver.answers = lambda _, told: status if told["data"]["key"] == "e3" else 200
    webhook = hook(stage, receiver.url)
    drained(stage, *(hit(stage, f"e{n}") for n in range(20)))
    sent = courier(stage, webhook)
    assert sent.turn() == tracker.PAUSES[0]
    assert state(stage) == (3, True, f"answered {status}", False)
    for _ in range(2):
        assert (sent.turn() or 0) >= tracker.PAUSES[0]
    receiver.answers = lambda *_: 200
    assert sent.turn() == 0
    assert state(stage) == (20, False, "", False)
    counts = {key: receiver.keys.count(key) for key in receiver.keys}
    assert counts.pop("e3") == 4
    assert counts == dict.fromkeys((f"e{n}" for n in range(20) if n != 3), 1)


@pytest.mark.sqlite
def test_what_hangs_is_cut_off_and_holds_up_nobody_else(
    stage: Stage, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "WEBHOOK_SECONDS", 0.5)
    ended = threading.Event()
    receiver.answers = lambda *_: 200 if ended.wait(20) else 500
    hanging, other = hook(stage, receiver.url), Receiver()
    drained(stage, hit(stage, "e1"))
    slow = threading.Thread(target=courier(stage, hanging).turn)
    slow.start()
    courier(stage, hook(stage, other.url)).turn()
    assert other.keys == ["e1"]
    slow.join(10)
    assert not slow.is_alive()
    sql = "select failing_since is not null, off from webhooks where url = ?"
    assert stage.rows(sql, receiver.url) == [(1, 0)]
    ended.set()
    other.server.shutdown()
    other.server.server_close()


@pytest.mark.sqlite
def test_an_answer_that_never_ends_is_cut_off_too(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "WEBHOOK_SECONDS", 0.5)
    server = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        peer, _ = server.accept()
        with contextlib.suppress(OSError), peer:
            peer.sendall(b"HTTP/1.1 200 OK\r\n")
            for n in range(200):
                peer.sendall(b"X-%d: y\r\n" % n)
                time.sleep(0.1)

    threading.Thread(target=drip, daemon=True).start()
    webhook = hook(stage, f"http://127.0.0.1:{server.getsockname()[1]}/")
    drained(stage, hit(stage, "e1"))
    with server:
        assert courier(stage, webhook).turn() == tracker.PAUSES[0]
    assert state(stage)[2] == "took longer than 0 s"


@pytest.mark.sqlite
def test_what_fails_for_three_days_is_switched_off_and_the_dashboard_says_so(
    stage: Stage, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.use(monkeypatch)
    receiver.answers = lambda *_: 500
    webhook = hook(stage, receiver.url)
    drained(stage, hit(stage, "e1"))
    sent, clock, pauses = courier(stage, webhook), tracker.now_ms(), []
    monkeypatch.setattr(tracker, "now_ms", lambda: clock)
    while not state(stage)[3]:
        pause = sent.turn()
        assert pause
        pauses.append(pause)
        clock += int(pause * 1000)
    assert pauses[:6] == [5, 5, 10, 20, 40, 80] and pauses[-1] == 21_600
    assert 3 * 86_400 < sum(pauses[:-1]) < 3.5 * 86_400
    assert sent.turn() is None
    page = stage.web.get(f"/{stage.acme.id}/dashboard").text
    assert "Nothing is sent to" in page and "answered 500" in page
    with stage.database.transaction() as connection:
        connection.execute("update webhooks set trouble = 'no way | rm'")  # whatever it is, no part of it is a command
    page = stage.web.get(f"/{stage.acme.id}/dashboard").text
    assert "(no way | rm)" in page and "<code>rm" not in page
    receiver.answers = lambda *_: 200
    assert tracker.main(["--env", os.devnull, "tenant", "webhook", "add", "Acme", receiver.url]) == 0
    assert courier(stage, webhook).turn() == 0
    assert "Nothing is sent to" not in stage.web.get(f"/{stage.acme.id}/dashboard").text


def test_a_burst_that_turns_out_to_be_a_scanner_is_told_right_the_first_time(stage: Stage, receiver: Receiver) -> None:
    webhook = hook(stage, receiver.url)
    people = hook(stage, receiver.url + "?people", people_only=1)
    drained(stage, click(stage, "e1"), click(stage, "e2"))
    held = 3_600_000
    assert courier(stage, webhook, held).turn() == 1.0
    drained(stage, click(stage, "e1", at=NOW - 1_000, method="HEAD"))
    with stage.database.transaction() as connection:
        connection.execute(f"update changes set at = at - {held}")
    for each in (webhook, people):
        assert courier(stage, each, held).turn() == 0
    told = [(each["type"], each["data"]["key"], each["data"]["counts_as"]) for each in receiver.told]
    assert sorted(told[:3]) == [("clicked", "e1", "machine"), ("clicked", "e1", "machine"), ("clicked", "e2", "person")]
    assert told[3:] == [("clicked", "e2", "person")]


@pytest.mark.sqlite
def test_only_what_is_wanted_is_sent(stage: Stage, receiver: Receiver) -> None:
    webhook = hook(stage, receiver.url, types="clicked")
    drained(stage, hit(stage, "e1"), click(stage, "e1", at=NOW + 9_000))
    assert courier(stage, webhook).turn() == 0
    assert [each["type"] for each in receiver.told] == ["clicked"]
    assert state(stage)[0] == 2


PRIVATE = (
    *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1"),
    *(
        "255.255.255.255",
        "192.0.2.1",
        "198.18.0.1",
        "240.0.0.1",
        "::1",
        "::",
        "fe80::1",
        "fc00::1",
        "fd12::1",
        "ff02::1",
    ),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2002:c0a8:101::1", "fec0::1"),
    *("2001:db8::1", "2001::1", "100::1", "::127.0.0.1"),
)


def test_only_addresses_of_the_internet_are_public() -> None:
    assert [text for text in PRIVATE if tracker.is_public(ip_address(text))] == []
    public = ("8.8.8.8", "1.1.1.1", "2606:4700::1111", "2a00:1450::1", "64:ff9b::808:808", "::ffff:8.8.8.8")
    assert [text for text in public if not tracker.is_public(ip_address(text))] == []


@pytest.mark.sqlite
def test_nothing_is_sent_to_a_private_address_by_whatever_name(stage: Stage, receiver: Receiver) -> None:
    port = receiver.server.server_address[1]
    for name in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "127.1", "2130706433", "0x7f.1"):
        for scheme in ("http", "https"):
            lane = tracker.Lane(f"{scheme}://{name}:{port}/", ["10.0.0.0/8"])
            assert "expected https and a public address" in lane.post(b"{}", {}), (scheme, name)
    assert receiver.got == []
    assert "expected https and a public address" in tracker.Lane("http://8.8.8.8/", []).post(b"{}", {})


def test_commands_make_list_test_and_remove_webhooks(
    stage: Stage, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.use(monkeypatch)
    monkeypatch.setenv("WEBHOOK_NETWORKS", LOCAL)

    def run(*words: str, status: int = 0) -> str:
        assert tracker.main(["--env", os.devnull, *words]) == status
        return "".join(capsys.readouterr())

    of, url = ("tenant", "webhook"), receiver.url
    [first] = run(*of, "add", "Acme", url).split()
    assert run(*of, "add", "Acme", url, "--events", "clicked", "--people-only").split() == [first]
    second, kept = run(*of, "add", "Acme", url, "--rotate").split()
    assert (kept == first, first.startswith("whsec_"), second != first) == (True, True, True)
    drained(stage, hit(stage, "e1"), hit(stage, "e2"))
    assert f"on   {url} (opened,clicked,revised), 2 behind" in run(*of, "list", "Acme")
    assert "took it" in run(*of, "test", "Acme", url)
    receiver.answers = lambda *_: 410
    assert "answered 410" in run(*of, "test", "Acme", url, status=1)
    receiver.got.clear()
    run("deliver", "--held", "0", status=1)
    receiver.answers = lambda *_: 200
    receiver.got.clear()
    run("deliver", "--held", "0")
    assert sorted(receiver.keys) == ["e1", "e2"]
    assert "0 behind" in run(*of, "list", "Acme")
    run(*of, "remove", "Acme", url)
    assert "no webhook" in run(*of, "remove", "Acme", url, status=1)
    assert "events: expected some of opened, clicked, revised" in run(
        *of, "add", "Acme", url, "--events", "opened,bounced", status=1
    )
    assert "url: expected https://" in run(*of, "add", "Acme", "ftp://x/", status=1)


def asked(stage: Stage, method: str, of: str, value: Any = None, query: str = "", status: int = 200) -> Any:
    """Ask for webhooks as the operator."""
    body = b"" if value is None else json.dumps(value).encode()
    answer = call(stage, method, f"/tenants/{of}/webhooks{query}", body, bearer(OPERATOR_KEY))
    assert answer.status == status, answer.text
    return answer.json


@pytest.fixture
def operated(staged: Callable[..., Stage]) -> Stage:
    return staged(API_KEY=OPERATOR_KEY)


def test_the_operator_adds_lists_and_removes_webhooks_over_http_as_by_command(
    operated: Stage, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    operated.use(monkeypatch)

    def run(*words: str) -> Any:
        assert tracker.main(["--env", os.devnull, "tenant", "webhook", *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    url = receiver.url + "?a=1&b=2+3"
    [first] = asked(operated, "POST", "Acme", {"url": url, "events": ["clicked"], "people_only": True})["secrets"]
    about: dict[str, Any] = {"url": url, "events": ["clicked"], "people_only": True, "state": "on", "behind": 0}
    about |= {"failing_since": None, "trouble": ""}
    assert asked(operated, "GET", operated.acme.id) == {"rows": [about]} == {"rows": run("list", "Acme")}
    assert run("add", "Acme", url) == {"url": url, "secrets": [first]} == asked(operated, "POST", "Acme", {"url": url})
    second, kept = asked(operated, "POST", operated.acme.mail_id, {"url": url, "rotate": True})["secrets"]
    assert (kept == first, second.startswith("whsec_"), second != first) == (True, True, True)
    drained(operated, hit(operated, "e1"))
    [told] = asked(operated, "GET", "Acme")["rows"]
    assert told == {**about, "events": ["opened", "clicked", "revised"], "people_only": False, "behind": 1}
    assert "whsec_" not in json.dumps(told)
    receiver.answers = lambda *_: 500
    with operated.database.reading() as connection:
        webhook = tracker.find_webhook(connection, "Acme", url)
    courier(operated, webhook).turn()
    [told] = asked(operated, "GET", "Acme")["rows"]
    assert (told["trouble"], told["failing_since"][:2]) == ("answered 500", "20")
    # Its secret signs, though it was told over HTTP.
    assert receiver.got[0][0]["webhook-signature"].count("v1,") == 2
    assert webhook.secrets == f"{second} {first}"
    assert asked(operated, "DELETE", "Acme", query=f"?url={quote(url, safe='')}") == {"deleted": url}
    assert asked(operated, "GET", "Acme") == {"rows": []}


def test_one_tenants_webhooks_are_not_anothers(operated: Stage) -> None:
    url, other = "https://crm.example.com/hook", "https://crm.example.com/other"
    mine, _ = (asked(operated, "POST", "Acme", {"url": each})["secrets"] for each in (url, other))
    theirs = asked(operated, "POST", "Globex", {"url": url, "people_only": True})["secrets"]
    assert mine != theirs
    before = operated.rows("select * from webhooks where tenant = ?", operated.globex.number)
    asked(operated, "POST", "Acme", {"url": url, "events": ["revised"], "rotate": True})
    asked(operated, "DELETE", "Acme", query=f"?url={url}")
    assert [each["url"] for each in asked(operated, "GET", "Acme")["rows"]] == [other]
    assert "no webhook" in asked(operated, "DELETE", "Acme", query=f"?url={url}", status=404)["error"]
    assert operated.rows("select * from webhooks where tenant = ?", operated.globex.number) == before


def test_who_has_not_the_operators_key_is_told_nothing_of_webhooks(operated: Stage) -> None:
    url = "https://crm.example.com/hook"
    asked(operated, "POST", "Acme", {"url": url})
    before = operated.rows("select * from webhooks")
    with tracker.changing_tenants(operated.database) as connection:
        tracker.change_tenant(connection, operated.acme.number, api_key_hash=tracker.key_hash(ACME_KEY))
    for of in ("Acme", operated.acme.id, "nobody"):
        for headers in ({}, bearer("another"), bearer(ACME_KEY)):
            for method, query, body in (("GET", "", b""), ("POST", "", b'{"url": "https://x/"}'), ("DELETE", url, b"")):
                answer = call(operated, method, f"/tenants/{of}/webhooks?url={query}", body, headers)
                assert (answer.status, answer["WWW-Authenticate"]) == (401, "Bearer")
                assert url not in answer.text
    assert operated.rows("select * from webhooks") == before


def test_of_an_unknown_tenant_there_are_no_webhooks(operated: Stage) -> None:
    for method, value, query in (("GET", None, ""), ("POST", {"url": "https://x/"}, ""), ("DELETE", None, "?url=x")):
        assert "no tenant 'nobody'" in asked(operated, method, "nobody", value, query, status=404)["error"]
    assert operated.rows("select * from webhooks") == []


A_URL = {"url": "https://crm.example.com/hook"}
AN_EVENT = "events: expected some of opened, clicked, revised"
WRONG: tuple[tuple[Any, str], ...] = (
    *(
        ({"url": url}, "url: expected https://, a host in ASCII")
        for url in (
            *("", "x", "ftp://x/", "https://", "https:///hook", "https://user@x/", "https://x y/", "https://x/a b"),
            *("https://x?y", "https://x:99999/", "https://x:0/", "https://a:b:c/", "https://a..b/", "https://[::1/"),
            *("https://bücher.example/", "https://x/é", "https://x/\n", f"https://{'a' * 64}.com/"),
            "https://x/" + "a" * 1_991,
        )
    ),
    ({}, "url: expected https://"),
    ({"url": 5}, "url: expected text"),
    ({"url": None}, "url: expected text"),
    ({**A_URL, "events": ["opened", "bounced"]}, AN_EVENT),
    ({**A_URL, "events": []}, AN_EVENT),
    ({**A_URL, "events": [""]}, AN_EVENT),
    ({**A_URL, "events": ["Opened"]}, AN_EVENT),
    ({**A_URL, "events": "opened"}, "events: expected a list of texts"),
    ({**A_URL, "events": ["opened"] * 4}, "events: expected at most 3, got 4"),
    ({**A_URL, "people_only": "yes"}, "people_only: expected true or false"),
    ({**A_URL, "rotate": 1}, "rotate: expected true or false"),
    ({**A_URL, "secrets": ["x"]}, "secrets: unknown field; expected some of url, events, people_only, rotate"),
    ([A_URL], "expected an object"),
)


def test_what_no_webhook_can_have_is_refused_with_what_was_expected(operated: Stage) -> None:
    for value, error in WRONG:
        assert asked(operated, "POST", "Acme", value, status=400)["error"].startswith(error), value
    assert "expected JSON" in asked(operated, "POST", "Acme", status=400)["error"]
    told = asked(operated, "DELETE", "Acme", query="?uri=https://x/", status=400)["error"]
    assert told == "uri: unknown field; expected some of url"
    assert "has the url ''" in asked(operated, "DELETE", "Acme", status=404)["error"]
    assert operated.rows("select * from webhooks") == [] == operated.rows("select * from feeds")
    for url in ("https://x/" + "a" * 1_990, "https://crm.example.com:8443", "http://[::1]:80/hook?a=1&b=%20"):
        assert asked(operated, "POST", "Acme", {"url": url})["url"] == url


def test_a_feed_that_is_switched_off_and_on_again_is_sent_from_its_first_row(stage: Stage, receiver: Receiver) -> None:
    webhook = hook(stage, receiver.url)
    drained(stage, hit(stage, "e1"), hit(stage, "e2"))
    assert courier(stage, webhook).turn() == 0
    for keeps in (False, True):
        with stage.database.transaction() as connection:
            tracker.set_feed(connection, stage.acme.number, keeps)
    drained(stage, hit(stage, "e3"))
    assert courier(stage, webhook).turn() == 0
    assert sorted(receiver.keys) == ["e1", "e2", "e3"]


@pytest.mark.sqlite
def test_all_arrive_though_deliver_is_killed_and_the_receiver_goes(stage: Stage, receiver: Receiver) -> None:
    hook(stage, receiver.url)
    drained(stage, *(hit(stage, f"e{n}") for n in range(300)))
    environ = {**os.environ, "DATABASE_URL": f"sqlite:{stage.settings.database}", "WEBHOOK_NETWORKS": LOCAL}

    def now_and_then(number: int, _: dict[str, Any]) -> int:
        time.sleep(0.003)
        return 500 if number % 40 == 7 else 200

    receiver.answers = now_and_then
    for round_ in range(4):
        command = [*PROGRAM, "deliver", "--follow", "--held", "0"]
        with subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL) as process:
            until, before = time.monotonic() + 20, len(receiver.got)
            while len(receiver.got) < before + (60 if round_ < 3 else 1) and time.monotonic() < until:
                time.sleep(0.01)
            if round_ == 3:
                receiver.answers = lambda *_: 200
                while state(stage)[0] < 300 and time.monotonic() < until:
                    time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
    assert {*receiver.keys} == {f"e{n}" for n in range(300)}
    assert state(stage)[0] == 300
