"""selftest: the whole way from the public address to the numbers, and what is said where it is broken."""

from __future__ import annotations

import http.server
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from conftest import Server, Stage, hit, segment
from frontend import Nginx

import tracker

GIF = tracker.resource("pixel.gif")


def test_a_server_that_works_is_told_so_and_nothing_is_left_of_the_test(server: Server) -> None:
    server.tenant("Acme")
    said = server.run("selftest", "Acme")
    assert (
        said
        == f"{server.url} works: two pixels and a link were answered and counted, as your own, and are removed again\n"
    )
    assert "Sent                     0" in server.run("stats", "Acme")
    assert "selftest" not in server.run("export", "Acme", "emails")
    assert server.run("check") == "all is well\n"


def test_the_way_through_nginx_over_tls_works(tmp_path: Path) -> None:
    nginx = Nginx(tmp_path)
    nginx.server.start()
    nginx.start()
    try:
        nginx.server.tenant("Acme")
        nginx.server.environ["SSL_CERT_FILE"] = str(nginx.folder / "certificates" / "ca.pem")
        assert " works: " in nginx.server.run("selftest", "Acme")
        nginx.server.environ.pop("SSL_CERT_FILE")
        said = nginx.server.run("selftest", "Acme", status=1)
        assert re.match(r"wrong: https://localhost:\d+ does not answer: .*certificate", said), said
    finally:
        nginx.stop()


def test_an_address_where_nobody_answers_is_named_with_what_was_expected(server: Server) -> None:
    server.tenant("Acme")
    server.environ["BASE_URL"] = "http://127.0.0.1:9"
    said = server.run("selftest", "Acme", status=1)
    assert said.startswith("wrong: http://127.0.0.1:9 does not answer: ")
    assert said.endswith("expected DNS, firewall and proxy to lead to this server\n")


def test_without_a_public_address_there_is_nothing_to_test(server: Server) -> None:
    server.tenant("Acme")
    server.environ.pop("BASE_URL")
    assert server.run("selftest", "Acme", status=1) == ""


Answering = Callable[[http.server.BaseHTTPRequestHandler], None]


@pytest.fixture
def impostor() -> Iterator[Callable[[Answering], str]]:
    """Starts servers that answer in another's place; gives their address."""
    started: list[http.server.ThreadingHTTPServer] = []

    def start(answer: Answering) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # http.server's name
                answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=made.serve_forever, daemon=True).start()
        started.append(made)
        return f"http://127.0.0.1:{made.server_port}"

    yield start
    for each in started:
        each.shutdown()
        each.server_close()


def answer_with(status: int, body: bytes = b"", **headers: str) -> Answering:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def like_ours(handler: http.server.BaseHTTPRequestHandler) -> None:
    """Answers all that is asked, and counts nothing."""
    if "/pixel/" in handler.path:
        answer_with(200, GIF, X_Tracker="recorded")(handler)
    else:
        answer_with(302, Location="https://example.com/")(handler)


@pytest.mark.parametrize(
    "answer, expected",
    [
        pytest.param(answer_with(404), r"something else \(status 404\) answered the pixel", id="another-site"),
        pytest.param(answer_with(200, GIF), "something else .* answered the pixel", id="another-tracker"),
        pytest.param(
            answer_with(200, GIF, X_Tracker="unspooled"), "answered, but not recorded: unspooled", id="full-disk"
        ),
        pytest.param(
            answer_with(200, GIF, X_Tracker="recorded", Age="30"), "came from a cache on the way", id="a-cache"
        ),
        pytest.param(
            answer_with(200, GIF, X_Tracker="recorded"),
            "status 200 and leads to nowhere; expected 302",
            id="no-redirect",
        ),
        pytest.param(
            like_ours,
            "no hit was counted; expected BASE_URL to lead to the server of this database",
            id="another-database",
        ),
    ],
)
def test_whoever_answers_in_our_place_is_found_out(
    stage: Stage,
    impostor: Callable[[Answering], str],
    answer: Answering,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tracker, "SELFTEST_SECONDS", 1.0)
    monkeypatch.setenv("DATABASE_URL", f"sqlite:{stage.settings.database}")
    monkeypatch.setenv("BASE_URL", impostor(answer))
    assert tracker.main(["--env", os.devnull, "selftest", "Acme"]) == 1
    assert re.search(f"^wrong: .*{expected}", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("date, told", [(0, []), (-3_600, ["the clock there says"]), (None, [])])
def test_a_clock_that_is_off_is_named(date: int | None, told: list[str]) -> None:
    said = "whenever" if date is None else formatdate(time.time() + date, usegmt=True)
    pixel = tracker.Answer(200, {"x-tracker": "recorded", "date": said}, GIF, "203.0.113.9")
    link = tracker.Answer(302, {"location": tracker.TEST_DESTINATION}, b"", "203.0.113.9")
    assert [fault[:20] for fault in tracker.answer_faults([pixel, pixel], link)] == told


@pytest.mark.parametrize(
    "ours, seen, lost",
    [
        ("9.9.9.9", "127.0.0.0", True),  # the proxy's own address in place of ours
        ("9.9.9.9", "10.1.2.0", True),
        ("9.9.9.9", "9.9.9.0", False),
        ("127.0.0.1", "127.0.0.0", False),  # it all happens on one machine
        ("9.9.9.9", "", False),  # IP_ADDRESSES=none: nobody can tell
    ],
)
def test_addresses_that_a_proxy_keeps_to_itself_are_named(stage: Stage, ours: str, seen: str, lost: bool) -> None:
    key = f"{tracker.TEST_KEY}1"
    uri = f"/{stage.acme.mail_id}/click/{key}?url=https://example.com/"
    at = tracker.now_ms()
    hits = [hit(stage, key, at - n * 20_000, ip=seen) for n in range(2)]
    segment(stage, *hits, hit(stage, key, at, ip=seen, uri=uri, answer="302"))
    faults = list(tracker.counted_faults(stage.database, stage.acme, key, ours))
    assert [fault.partition(":")[0] for fault in faults] == ["readers' addresses are lost"] * lost


def test_one_pixel_of_two_is_a_cache_on_the_way(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "SELFTEST_SECONDS", 0.5)
    key = f"{tracker.TEST_KEY}1"
    segment(stage, hit(stage, key, tracker.now_ms()))
    [fault] = tracker.counted_faults(stage.database, stage.acme, key, "127.0.0.1")
    assert fault == "the pixels did not both come; expected no cache on the way that answers in this server's place"
