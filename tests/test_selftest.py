"""selftest: the whole way from the public address to the numbers, and what is said where it is broken."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator
from email.utils import formatdate
from http.client import HTTPSConnection
from pathlib import Path
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
from conftest import Server, Stage, click, hit, segment
from frontend import Nginx
from load import counted_keys

import tracker

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

GIF = tracker.resource("pixel.gif")


def test_a_server_that_works_is_told_so_and_nothing_is_left_of_the_test(server: Server) -> None:
    server.tenant("Acme")
    works = "works: two pixels and a link were answered and counted, as your own, and are removed again"
    assert server.run("selftest", "Acme") == f"{server.url} {works}\n"
    assert "Sent                     0" in server.run("stats", "Acme")
    assert counted_keys(server) == {}
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


@pytest.mark.parametrize("settings, words, hidden", [
    ({"FORWARDED_ALLOW_IPS": "10.0.0.1"}, (), True), ({}, (), True), ({}, ("--real-ip-from", "127.0.0.0/8"), False),
])  # fmt: skip
def test_a_proxy_whose_word_is_not_believed_is_found(
    tmp_path: Path, settings: dict[str, str], words: tuple[str, ...], hidden: bool
) -> None:
    nginx = Nginx(tmp_path, (), *words, **settings)
    nginx.server.start()
    nginx.start()
    try:
        nginx.server.tenant("Acme")
        environ = nginx.server.environ
        environ["SSL_CERT_FILE"] = str(nginx.folder / "certificates" / "ca.pem")
        with OneMore(nginx) as port:  # before nginx
            said = nginx.server.run("selftest", "Acme", status=int(hidden), BASE_URL=f"http://127.0.0.1:{port}")
        assert ("wrong: readers' addresses are lost: a proxy's X-Forwarded-For is not believed" in said) == hidden
        assert "wrong" not in nginx.server.run("selftest", "Acme")  # it looks at its own requests, not at the last ones
    finally:
        nginx.stop()


def test_an_address_where_nobody_answers_is_named_and_without_one_there_is_nothing_to_test(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"sqlite:{stage.settings.database}")
    monkeypatch.setenv("BASE_URL", "http://127.0.0.1:9")
    assert tracker.main(["--env", os.devnull, "selftest", "Acme"]) == 1
    said = capsys.readouterr().out
    assert said.startswith("wrong: http://127.0.0.1:9 does not answer: ")
    assert said.endswith("expected DNS, firewall and proxy to lead to this server\n")
    monkeypatch.delenv("BASE_URL")
    assert tracker.main(["--env", os.devnull, "selftest", "Acme"]) == 1
    assert capsys.readouterr().out == ""


@contextlib.contextmanager
def OneMore(nginx: Nginx) -> Iterator[int]:  # noqa: N802
    """A proxy of somebody else before nginx, on a port of its own; it says whose request it is."""

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        made = HTTPSConnection(nginx.host, nginx.port, context=nginx.context())
        with contextlib.closing(made) as connection:
            headers = {"X-Forwarded-For": environ["REMOTE_ADDR"], "User-Agent": environ["HTTP_USER_AGENT"]}
            connection.request("GET", environ["PATH_INFO"], headers=headers)
            got = connection.getresponse()
            kept = [
                (name, value) for name, value in got.getheaders() if name in ("Location", "X-Tracker", "Content-Type")
            ]
            start_response(f"{got.status} {got.reason}", kept)
            return [got.read()]

    with make_server("127.0.0.1", 0, answer, handler_class=Quiet) as proxy:
        threading.Thread(target=proxy.serve_forever, args=[0.02]).start()
        yield proxy.server_port
        proxy.shutdown()


def answer_with(status: str, body: bytes = b"", **headers: str) -> WSGIApplication:
    def answer(_environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        start_response(status, [(name.replace("_", "-"), value) for name, value in headers.items()])
        return [body]

    return answer


def like_ours(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answers all that is asked, and counts nothing."""
    link = answer_with("302 Found", Location=tracker.TEST_DESTINATION)
    pixel = answer_with("200 OK", GIF, **RECORDED)
    return (pixel if "/pixel/" in environ["PATH_INFO"] else link)(environ, start_response)


class Quiet(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


RECORDED = {"X_Tracker": "recorded"}
IMPOSTORS: dict[str, tuple[WSGIApplication, str]] = {
    "another site": (answer_with("404 No"), r"something else \(status 404\) answered the pixel"),
    "another tracker": (answer_with("200 OK", GIF), "something else .* answered the pixel"),
    "full disk": (answer_with("200 OK", GIF, X_Tracker="unspooled"), "answered, but not recorded: unspooled"),
    "a cache": (answer_with("200 OK", GIF, Age="30", **RECORDED), "came from a cache on the way"),
    "no redirect": (answer_with("200 OK", GIF, **RECORDED), "status 200 and leads to nowhere; expected 302"),
    "another database": (like_ours, "no hit was counted; expected BASE_URL to lead to the server of this database"),
}


@pytest.mark.parametrize("answer, expected", IMPOSTORS.values(), ids=IMPOSTORS)
def test_whoever_answers_in_our_place_is_found_out(
    stage: Stage,
    answer: WSGIApplication,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tracker, "SELFTEST_SECONDS", 1.0)
    monkeypatch.setenv("DATABASE_URL", f"sqlite:{stage.settings.database}")
    with make_server("127.0.0.1", 0, answer, handler_class=Quiet) as impostor:
        threading.Thread(target=impostor.serve_forever, args=[0.02]).start()
        monkeypatch.setenv("BASE_URL", f"http://127.0.0.1:{impostor.server_port}")
        assert tracker.main(["--env", os.devnull, "selftest", "Acme"]) == 1
        impostor.shutdown()
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
    at = tracker.now_ms()
    pixels = [hit(stage, key, at - age, ip=seen) for age in (0, 20_000)]
    segment(stage, *pixels, click(stage, key, tracker.TEST_DESTINATION, at, ip=seen))
    faults = list(tracker.counted_faults(stage.database, stage.acme, key, ours))
    assert [fault.partition(":")[0] for fault in faults] == ["readers' addresses are lost"] * lost


def test_one_pixel_of_two_is_a_cache_on_the_way(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "SELFTEST_SECONDS", 0.5)
    key = f"{tracker.TEST_KEY}1"
    segment(stage, hit(stage, key, tracker.now_ms()))
    [fault] = tracker.counted_faults(stage.database, stage.acme, key, "127.0.0.1")
    assert fault == "the pixels did not both come; expected no cache on the way that answers in this server's place"
