"""What comes over the wire that no well-meaning client sends, against the real server: bytes in, bytes out.

Never a 500, never a header that the request smuggled in, and a log without tracebacks, private ids and addresses.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import CHROME, Server

import tracker

OPERATOR_KEY = "the-operators-own-key"


@dataclass(frozen=True)
class Answer:
    """One response as it came over the wire."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Live:
    """A running server and a tenant on it, whose ids are all that a test needs."""

    server: Server
    id: str
    mail_id: str

    def exchange(self, *pieces: bytes) -> bytes:
        """Send, say that no more will come, and read what there is."""
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=20) as connection:
            return talk(connection, *pieces)

    def ask(self, target: str | bytes, *headers: str | bytes, method: str = "GET", body: bytes = b"") -> Answer:
        """One request for one answer; in targets, {id} and {mail_id} are filled in."""
        lines = [method.encode() + b" " + raw(target) + b" HTTP/1.1", *map(raw, headers)]
        if not any(line.lower().startswith(b"host:") for line in lines):
            lines.append(b"Host: track.example.com")
        if body and not any(line.lower().startswith(b"content-length:") for line in lines):
            lines.append(b"Content-Length: %d" % len(body))
        answers = read_answers(self.exchange(self.fill(b"\r\n".join(lines)) + b"\r\n\r\n" + body), method)
        assert len(answers) == 1
        return answers[0]

    def fill(self, data: bytes) -> bytes:
        return data.replace(b"{id}", self.id.encode()).replace(b"{mail_id}", self.mail_id.encode())

    def log_since(self, mark: int) -> str:
        """What the server has written since its log was that long."""
        return self.server.log.read_bytes()[mark:].decode()

    @property
    def mark(self) -> int:
        return self.server.log.stat().st_size


def raw(text: str | bytes) -> bytes:
    return text.encode("latin-1") if isinstance(text, str) else text


def talk(connection: socket.socket, *pieces: bytes) -> bytes:
    try:
        for piece in pieces:
            connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the server has heard enough; its answer may be there all the same
    parts = []
    while part := connection.recv(65_536):
        parts.append(part)
    return b"".join(parts)


def read_answers(data: bytes, method: str = "GET") -> list[Answer]:
    """Read responses as strictly as RFC 9112 is written; whatever does not fit fails the test."""
    answers = []
    while data:
        head, separator, rest = data.partition(b"\r\n\r\n")
        assert separator, data
        status_line, *lines = head.decode("ascii").split("\r\n")
        match = re.fullmatch(r"HTTP/1\.[01] ([1-5][0-9][0-9]) [ -~]*", status_line)
        assert match, status_line
        headers = {}
        for line in lines:
            field = re.fullmatch(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ([\t -~]*)", line)
            assert field, line
            assert field[1].lower() not in headers, f"{field[1]} twice"
            headers[field[1].lower()] = field[2]
        status = int(match[1])
        if method == "HEAD" or status == 100:
            body = b""
        elif "transfer-encoding" in headers:
            assert headers["transfer-encoding"] == "chunked"
            body, rest = read_chunks(rest)
        else:
            length = int(headers["content-length"])
            assert len(rest) >= length
            body, rest = rest[:length], rest[length:]
        answers.append(Answer(status, headers, body))
        data = rest
    return answers


def read_chunks(data: bytes) -> tuple[bytes, bytes]:
    """A chunked body to its end, and what follows."""
    body = b""
    while True:
        match = re.match(rb"([0-9A-Fa-f]+)\r\n", data)
        assert match, data[:80]
        size, start = int(match[1], 16), match.end()
        assert data[start + size : start + size + 2] == b"\r\n"
        body, data = body + data[start : start + size], data[start + size + 2 :]
        if size == 0:
            return body, data


def assert_harmless(answer: Answer) -> None:
    assert answer.status < 500
    assert "x-evil" not in answer.headers
    assert "set-cookie" not in answer.headers
    assert b"Traceback" not in answer.body
    assert b"<script" not in answer.body


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """One server for all the tests here: it must take them one after the other without harm."""
    server = Server(tmp_path_factory.mktemp("raw"), API_KEY=OPERATOR_KEY).start()
    try:
        made = server.tenant("Acme", "--domain", "acme.com")
        yield Live(server, made["id"], made["mail_id"])
        log = server.stop()
        assert log.count("Booting worker") == 2, "a worker died on the way"
    finally:
        server.stop()
        server.listener.close()


# -- Request targets

BAD_KEY = "bad key"
TARGETS = [
    pytest.param("/{mail_id}/pixel/a%2Fb.gif", 200, BAD_KEY, id="slash in a key"),
    pytest.param("/{mail_id}/pixel/a%0Ab.gif", 200, BAD_KEY, id="line feed in a key"),
    pytest.param("/{mail_id}/pixel/a%0D%0AX-Evil:%201.gif", 200, BAD_KEY, id="CRLF in a key"),
    pytest.param("/{mail_id}/pixel/a%00.gif", 200, BAD_KEY, id="NUL in a key"),
    pytest.param("/{mail_id}/pixel/%FF%FE.gif", 200, BAD_KEY, id="key that is not UTF-8"),
    pytest.param("/{mail_id}/pixel/%2e%2e.gif", 200, BAD_KEY, id="dots as a key"),
    pytest.param("/{mail_id}/pixel/a%.gif", 200, BAD_KEY, id="percent sign alone"),
    pytest.param("/{mail_id}/pixel/a%2541.gif", 200, BAD_KEY, id="encoded twice"),
    pytest.param("/{mail_id}/pixel/" + "a" * 201 + ".gif", 200, BAD_KEY, id="long key"),
    pytest.param("/{mail_id}/pixel/e1.gif?" + "x" * 7000, 200, "recorded", id="long query"),
    pytest.param('/{mail_id}/pixel/e1.gif?"\\<>^`{|}', 200, "recorded", id="query with odd characters"),
    pytest.param("/{mail_id}/pixel/e1.gif?a=%00%0D%0A&b=%FF", 200, "recorded", id="query with odd bytes"),
    pytest.param("/%00%0A/pixel/e1.gif", 200, "unknown tenant", id="mail id of odd bytes"),
    pytest.param("http://track.example.com/{mail_id}/pixel/e1.gif", 200, "recorded", id="absolute form"),
    pytest.param("HTTP://Elsewhere.example:1/{mail_id}/pixel/e1.gif", 200, "recorded", id="absolute form, other host"),
    pytest.param("/{mail_id}%2Fpixel%2Fe1.gif", 404, None, id="slashes encoded"),
    pytest.param("//{mail_id}/pixel/e1.gif", 404, None, id="two slashes first"),
    pytest.param("/{mail_id}//pixel/e1.gif", 404, None, id="two slashes inside"),
    pytest.param("/./{mail_id}/pixel/e1.gif", 404, None, id="dot"),
    pytest.param("/x/../{mail_id}/pixel/e1.gif", 404, None, id="dots"),
    pytest.param("/{id}/../{id}/dashboard", 404, None, id="dots around a dashboard"),
    pytest.param("/{id}/dashboard/.", 404, None, id="dot behind a dashboard"),
    pytest.param("/../../../../etc/passwd", 404, None, id="out of the folder"),
    pytest.param("/assets/..%2F..%2Ftracker.py", 404, None, id="out of the assets"),
    pytest.param("/assets/%2e%2e/tracker.py", 404, None, id="out of the assets, encoded"),
    pytest.param("/assets/%00", 404, None, id="NUL as an asset"),
    pytest.param("/health%0D%0AX-Evil:%201", 404, None, id="CRLF in a path"),
    pytest.param("/%C0%AF/%E0%80%AF/%F5", 404, None, id="overlong UTF-8"),
    pytest.param("/%ED%A0%80/dashboard", 404, None, id="surrogate"),
    pytest.param("/" + "/" * 5000, 404, None, id="slashes only"),
    pytest.param("/" + "a/" * 3000, 404, None, id="many segments"),
    pytest.param("/{id}/dashboard#fragment", 404, None, id="fragment"),
    pytest.param("/{id}/stats.json?tz=%0D%0AX-Evil:1", 400, None, id="CRLF in a time zone"),
    pytest.param("/{id}/dashboard?range=%3Cscript%3E%00", 400, None, id="script in a range"),
    pytest.param("/{id}/emails.csv?limit=%D9%A1", 400, None, id="Arabic digit"),
    pytest.param("/{id}/events.json?after=" + "9" * 18 + "-" + "9" * 18, 200, None, id="largest cursor"),
    pytest.param("/{mail_id}/click/e1/signature/target", 404, None, id="forged signature"),
    pytest.param("/{mail_id}/click/e1/%FF%00/%0D%0A", 404, None, id="signature of odd bytes"),
    pytest.param("/{mail_id}/click/e1/" + "A" * 16 + "/" + "A" * 6000, 404, None, id="long forged target"),
    pytest.param(b"/\xff\xfe", 400, None, id="bytes beyond ASCII"),
    pytest.param("/caf\xe9", 400, None, id="latin-1"),
    pytest.param(b"/\x00", 400, None, id="NUL"),
    pytest.param(b"/a b", 400, None, id="space"),
    pytest.param(b"health", 400, None, id="no slash"),
    pytest.param("/" + "a" * 16_000, 404, None, id="as long as can be"),
    pytest.param("/" + "a" * 17_000, 414, None, id="huge"),
]


@pytest.mark.parametrize(("target", "status", "note"), TARGETS)
def test_an_odd_target_gets_a_plain_answer(live: Live, target: str | bytes, status: int, note: str | None) -> None:
    answer = live.ask(target)
    assert_harmless(answer)
    assert answer.status == status
    assert answer.headers.get("x-tracker") == note
    if note:
        assert (answer.body[:6], len(answer.body)) == (b"GIF89a", 43)


@pytest.mark.parametrize(
    "target", ["*", "track.example.com:443", "http://track.example.com", "http://", "ftp://x/health"]
)
@pytest.mark.parametrize("method", ["GET", "OPTIONS", "CONNECT", "TRACE", "PROPFIND", "X"])
def test_targets_that_are_no_path_and_methods_that_are_not_ours_are_refused(
    live: Live, method: str, target: str
) -> None:
    answer = live.ask(target, method=method)
    assert_harmless(answer)
    assert answer.status in (400, 404, 405) or target == "http://track.example.com"


CRLF_TARGETS = [
    pytest.param("https%3A%2F%2Facme.com%2F%0D%0AX-Evil%3A%201", None, id="encoded"),
    pytest.param("https%3A%2F%2Facme.com%2F%0AX-Evil%3A%201", None, id="line feed"),
    pytest.param("https%3A%2F%2Facme.com%2F%0DX-Evil%3A%201", None, id="carriage return"),
    pytest.param("https%3A%2F%2Facme.com%2F%00", None, id="NUL"),
    pytest.param("%0D%0Ahttps%3A%2F%2Facme.com%2F", None, id="before the scheme"),
    pytest.param("https%3A%2F%2Facme.com%0D%0AX-Evil%3A%201", None, id="in the host"),
    pytest.param("https%3A%2F%2Facme.com%2F%250D%250AX-Evil", "https://acme.com/%0D%0AX-Evil", id="encoded twice"),
    pytest.param("https://acme.com/%0D%0AX-Evil:1", "https://acme.com/%0D%0AX-Evil:1", id="by hand"),
    # Characters whose low byte is CR or LF: servers that cut code points in half have split headers at them.
    pytest.param(
        "https%3A%2F%2Facme.com%2F%E5%98%8D%E5%98%8AX", "https://acme.com/%E5%98%8D%E5%98%8AX", id="low bytes"
    ),
    pytest.param("https%3A%2F%2Facme.com%2F%C2%85%E2%80%A8X", "https://acme.com/%C2%85%E2%80%A8X", id="other breaks"),
    pytest.param("https%3A%2F%2Facme.com%2F%FFX", "https://acme.com/%EF%BF%BDX", id="not UTF-8"),
    pytest.param("https%3A%2F%2Facme.com%2F%3F%22%3E%3Cscript%3E", "https://acme.com/?%22%3E%3Cscript%3E", id="script"),
]


@pytest.mark.parametrize(("target", "location"), CRLF_TARGETS)
def test_a_redirect_holds_no_header_but_ours(live: Live, target: str, location: str | None) -> None:
    for method in ("GET", "HEAD"):
        answer = live.ask(f"/{{mail_id}}/click/e1?url={target}", method=method)
        assert_harmless(answer)
        assert answer.status == (302 if location else 400)
        assert answer.headers.get("location") == location


def test_the_naming_page_escapes_what_a_link_says(live: Live) -> None:
    answer = live.ask(
        "/{mail_id}/click/e1?url=https%3A%2F%2Fevil.example%2F%22%3E%3Cscript%3Ealert(1)%3C%2Fscript%3E%0C"
    )
    assert answer.status == 400  # a form feed is a control character
    answer = live.ask("/{mail_id}/click/e1?url=https%3A%2F%2Fevil.example%2F%22%3E%3Cscript%3Ealert(1)%3C%2Fscript%3E")
    assert_harmless(answer)
    assert answer.status == 200


# -- Headers


@pytest.mark.parametrize(
    ("headers", "statuses"),
    [
        pytest.param(["Host: a.example", "Host: b.example"], {400}, id="two hosts"),
        pytest.param(["Host: "], {200}, id="empty host"),
        pytest.param(["Host: \xff\xfe"], {200}, id="host of bytes"),
        pytest.param(["Host: a.example\r\n X-Evil: 1"], {400}, id="folded line"),
        pytest.param(["Host: a\0b"], {400}, id="NUL in a header"),
        pytest.param(["X: a\rX-Evil: 1"], {400}, id="carriage return alone"),
        pytest.param(["No colon"], {400}, id="no colon"),
        pytest.param(["Bad(name: 1"], {400}, id="bad name"),
        pytest.param(["Content-Length: x"], {400}, id="length that is a word"),
        pytest.param(["Content-Length: -1"], {400}, id="negative length"),
        pytest.param(["Content-Length: 1, 2"], {400}, id="two lengths in one"),
        pytest.param(["Content-Length: 0", "Content-Length: 5"], {400}, id="two lengths"),
        pytest.param(["Content-Length: \xb2"], {400}, id="length that is a superscript"),
        pytest.param(["Content-Length: 5", "Transfer-Encoding: chunked"], {400}, id="length and chunks"),
        pytest.param(["Transfer-Encoding: gzip"], {400, 501}, id="unknown coding"),
        pytest.param(["Expect: something"], {417}, id="unknown expectation"),
        pytest.param([f"X-{n}: 1" for n in range(300)], {431}, id="many headers"),
        pytest.param(["X: " + "x" * 9000], {431}, id="huge header"),
        pytest.param(["User-Agent: \xff\xfe\x80"], {200}, id="user agent of bytes"),
        pytest.param(["User-Agent: " + "x" * 8000], {200}, id="long user agent"),
        pytest.param(["X-Forwarded-For: " + "1.1.1.1, " * 800 + "x"], {200}, id="long list of proxies"),
        pytest.param(["X-Forwarded-For: \xff, ::::, 1.2.3.4.5, [::1, 99999999999"], {200}, id="odd addresses"),
        pytest.param(["Authorization: Bearer \xff"], {200}, id="key of bytes"),
        pytest.param(["Sec-Purpose: \xff", "Sec-GPC: \xff\xff", "X-Moz: \t"], {200}, id="purpose of bytes"),
        pytest.param(["Range: bytes=0-0", "If-None-Match: *", "Connection: upgrade", "Upgrade: h2c"], {200}, id="others"),
    ],
)  # fmt: skip
def test_odd_headers_get_a_plain_answer(live: Live, headers: list[str], statuses: set[int]) -> None:
    for target in ("/{mail_id}/pixel/e1.gif", "/{id}/dashboard"):
        answer = live.ask(target, *headers)
        assert_harmless(answer)
        assert answer.status in statuses


def test_a_header_with_underscores_does_not_pass_for_the_proxys(live: Live) -> None:
    live.ask("/{mail_id}/pixel/underscore.gif", "X-Forwarded-For: 203.0.113.77", "X_Forwarded_For: 198.51.100.7")
    (event,) = [event for event in events(live) if event["key"] == "underscore"]
    assert event["ip_address"] == "203.0.113.0"


def events(live: Live) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(live.ask("/{id}/events.json").body)["rows"]
    return rows


def test_bytes_that_are_no_http_do_no_harm(live: Live) -> None:
    for data in (b"", b"\r\n\r\n", b"\0" * 100, b"\x16\x03\x01\x02\x00\x01", b"GET", b"GET / HTTP/1.1\r\nHost: x",
                 b"GET / HTTP/1.1\nHost: x\n\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
                 b"GET /\r\n\r\n", b"get / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1 X\r\n\r\n", b"\xff" * 10_000):  # fmt: skip
        for answer in read_answers(live.exchange(data)):
            assert_harmless(answer)
            assert answer.status == 400 or data.startswith(b"\xff")
    assert live.ask("/health").status == 200


# -- Bodies


CHUNKED = b"POST /{id}/emails HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_a_whole_chunked_body_is_read(live: Live) -> None:
    chunks = b'6\r\n{"key"\r\n006;extension=1\r\n:"c1"}\r\n0\r\n\r\n'
    (answer,) = read_answers(live.exchange(live.fill(CHUNKED), chunks))
    assert answer.status == 201
    assert json.loads(answer.body)["key"] == "c1"


BROKEN_CHUNKS = [
    pytest.param(b"zz\r\n{}\r\n0\r\n\r\n", id="no number"),
    pytest.param(b"-2\r\n{}\r\n0\r\n\r\n", id="negative"),
    pytest.param(b"2\r\n{}", id="no end"),
    pytest.param(b"2\r\n{}XX0\r\n\r\n", id="no line break"),
    pytest.param(b"5\r\n{}", id="cut off"),
    pytest.param(b"", id="nothing"),
]


@pytest.mark.parametrize("chunks", BROKEN_CHUNKS)
def test_a_broken_chunked_body_is_the_clients_mistake(live: Live, chunks: bytes) -> None:
    mark = live.mark
    answers = read_answers(live.exchange(live.fill(CHUNKED) + chunks))
    assert [answer.status for answer in answers] == [400]
    assert "Traceback" not in live.log_since(mark)


def test_a_body_that_breaks_off_registers_nothing(live: Live) -> None:
    for body in (b'{"key": "cut-off"}', b'{"key": "cut', b""):
        answer = live.ask("/{id}/emails", "Content-Length: 100", method="POST", body=body)
        assert_harmless(answer)
        assert answer.status == 400
    keys = [row["key"] for row in json.loads(live.ask("/{id}/emails.json").body)["rows"]]
    assert "cut-off" not in keys


def test_a_body_over_10_megabytes_is_too_large_in_chunks_too(live: Live) -> None:
    head = b"POST /{id}/emails HTTP/1.1\r\nHost: x\r\n"
    megabyte = b" " * (1 << 20)
    chunk = b"100000\r\n" + megabyte + b"\r\n"
    length = b"Content-Length: %d\r\n\r\n" % ((10 << 20) + 1)
    chunked = (b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 10, b"1\r\n \r\n0\r\n\r\n")
    for pieces in ((length, *[megabyte] * 10, b" "), chunked):
        (answer,) = read_answers(live.exchange(live.fill(head), *pieces))
        assert answer.status == 413
        assert json.loads(answer.body) == {"error": "expected a body of at most 10 MB"}


def test_a_client_that_waits_for_100_continue_gets_it(live: Live) -> None:
    lines = b"POST /{id}/emails HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}"
    assert [answer.status for answer in read_answers(live.exchange(live.fill(lines)))] == [100, 201]


# -- Several requests in one go


def test_what_is_sent_behind_a_request_gets_an_answer_of_its_own_or_none(live: Live) -> None:
    # A server that took the second for the first one's body, or the body for a request, would answer a stranger.
    first = live.fill(b"GET /{mail_id}/pixel/pipelined.gif HTTP/1.1\r\nHost: x\r\n\r\n")
    second = b"GET /robots.txt HTTP/1.1\r\nHost: x\r\n\r\n"
    answers = read_answers(live.exchange(first + second))
    assert answers[0].headers["x-tracker"] == "recorded"
    assert [answer.headers["content-type"] for answer in answers[1:]] in ([], ["text/plain; charset=utf-8"])


def test_a_request_inside_a_body_is_no_request(live: Live) -> None:
    inner = live.fill(b"GET /{mail_id}/pixel/smuggled.gif HTTP/1.1\r\nHost: x\r\n\r\n")
    for answer in (
        live.ask("/{id}/emails", method="POST", body=inner),
        live.ask("/{mail_id}/pixel/outer.gif", body=inner),
        live.ask("/nothing", method="POST", body=inner),
    ):
        assert_harmless(answer)
    assert not [event for event in events(live) if event["key"] == "smuggled"]


def test_a_request_that_comes_in_pieces_is_one_request(live: Live) -> None:
    lines = live.fill(b"GET /{mail_id}/pixel/e1.gif HTTP/1.1\r\nHost: x\r\n\r\n")
    (answer,) = read_answers(live.exchange(*(bytes([byte]) for byte in lines)))
    assert answer.headers["x-tracker"] == "recorded"


@pytest.mark.parametrize(
    "target",
    ["/", "/health", "/nothing", "/{mail_id}/pixel/e1.gif", "/{mail_id}/click/e1?url=https%3A%2F%2Facme.com%2F",
     "/{mail_id}/click/e1?url=https%3A%2F%2Felsewhere.example%2F", "/{id}/dashboard", "/{id}/stats.json",
     "/{id}/emails.json", "/{id}/events.csv", "/{id}/emails"],
)  # fmt: skip
def test_nothing_follows_the_headers_of_an_answer_to_head(live: Live, target: str) -> None:
    got, head = live.ask(target), live.ask(target, method="HEAD")
    assert head.status == got.status
    assert head.body == b""
    # Chunks have no place without a body: RFC 9110 §9.3.2 lets a server leave such fields out.
    assert set(head.headers) == set(got.headers) - {"transfer-encoding"}


# -- The client's address


def test_the_real_server_believes_its_proxy_and_keeps_a_part_of_the_address(live: Live) -> None:
    live.ask("/{mail_id}/pixel/proxied.gif", "X-Forwarded-For: 6.6.6.6, 203.0.113.77", f"User-Agent: {CHROME}")
    (event,) = [event for event in events(live) if event["key"] == "proxied"]
    assert (event["ip_address"], event["verdict"], event["user_agent"]) == ("203.0.113.0", "human", CHROME)


def test_whoever_connects_by_the_unix_socket_is_believed(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:  # the path of a socket may have 107 bytes, and tmp_path is long
        path = os.path.join(folder, "app.sock")
        server = Server(tmp_path, BIND=f"unix:{path}", WEB_CONCURRENCY="1", BASE_URL="https://track.example.com")
        server.start()
        try:
            mail_id = server.first_tenant()
            for key, forwarded in (("said", b"X-Forwarded-For: 6.6.6.6, 203.0.113.77\r\n"), ("silent", b"")):
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                    connection.settimeout(20)
                    connection.connect(path)
                    target = f"/{mail_id}/pixel/{key}.gif".encode()
                    (answer,) = read_answers(
                        talk(connection, b"GET " + target + b" HTTP/1.1\r\n" + forwarded + b"\r\n")
                    )
                    assert answer.headers["x-tracker"] == "recorded"
        finally:
            server.stop()
            server.listener.close()
        opened = contextlib.closing(tracker.Database(str(tmp_path / "data" / "tracking.db")))
        with opened as database, database.reading() as connection_:
            sql = "select key, address from event_details order by key"
            rows = connection_.execute(sql).fetchall()
        assert rows == [("said", "203.0.113.0"), ("silent", None)]


# -- The log

ADDRESS = "X-Forwarded-For: 203.0.113.77"


def secrets_in(live: Live, log: str) -> list[str]:
    """What must not be in a log: a private id, a client's address (the server's own aside), a reader's data."""
    lines = [line for line in log.splitlines() if "Listening at" not in line]
    secrets = (live.id, "203.0.113.77", "127.0.0.1", "reader@example.org", OPERATOR_KEY)
    return [line for line in lines if any(secret in line for secret in secrets)]


def test_the_log_holds_no_private_id_no_address_and_no_traceback_whatever_is_asked_for(live: Live) -> None:
    mark = live.mark
    registration = json.dumps({"key": "logged", "recipient": "reader@example.org"}).encode()
    statuses = [
        live.ask(target, ADDRESS, *headers, method=method, body=body).status
        for method, target, body, headers in (
            ("GET", "/{id}/dashboard", b"", []),
            ("GET", "/{id}/dashboard?range=x", b"", []),
            ("GET", "/{id}/stats.json", b"", []),
            ("GET", "/{id}/emails.csv", b"", []),
            ("GET", "/{id}/nothing", b"", []),
            ("GET", "http://track.example.com/{id}/dashboard", b"", []),
            ("PUT", "/{id}/dashboard", b"", []),
            ("POST", "/{id}/emails", registration, []),
            ("POST", "/{id}/emails", b"{", []),
            ("DELETE", "/{id}/emails/logged", b"", []),
            ("DELETE", "/{id}/emails/logged", b"", []),
            ("POST", "/tenants", b"{}", []),
            ("POST", "/tenants", b"{}", [f"Authorization: Bearer {OPERATOR_KEY}"]),
            ("GET", "/{id}/pixel/e1.gif", b"", []),
            ("GET", "/{mail_id}/pixel/e1.gif", b"", ["Referer: https://track.example.com/{id}/dashboard"]),
            ("GET", "/{mail_id}/click/e1?url=ftp://x", b"", []),
        )
    ]  # fmt: skip
    assert statuses == [200, 400, 200, 200, 404, 200, 405, 201, 400, 200, 404, 401, 400, 200, 200, 400]
    log = live.log_since(mark)
    assert secrets_in(live, log) == []
    assert "Traceback" not in log


def test_a_client_that_hangs_up_leaves_no_private_id_and_no_traceback_in_the_log(live: Live) -> None:
    mark = live.mark
    registrations = json.dumps([{"subject": "x" * 900}] * 1000).encode()
    assert live.ask("/{id}/emails", method="POST", body=registrations).status == 201
    for target in (b"/{id}/emails.json", b"/{id}/emails.csv", b"/{id}/dashboard"):
        with socket.create_connection(("127.0.0.1", live.server.port), timeout=20) as connection:
            # An answer of a megabyte does not fit into the buffers of a connection that nobody reads.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(live.fill(b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n\r\n"))
            assert connection.recv(100)
    with socket.create_connection(("127.0.0.1", live.server.port), timeout=20) as connection:
        connection.sendall(live.fill(b"GET /{id}/dash"))
    # The answers that nobody read are over when the lock of the exports is free.
    deadline = time.monotonic() + 20
    while live.ask("/{id}/emails.json?limit=1").status == 503:
        assert time.monotonic() < deadline
    assert secrets_in(live, live.log_since(mark)) == []
    assert "Traceback" not in live.log_since(mark)


@pytest.mark.parametrize(
    "request_head",
    [
        pytest.param(b"GET /{id}/dashboard", id="no version"),
        pytest.param(b"GET /{id}/dash board HTTP/1.1", id="space"),
        pytest.param(b"GET /{id}/dashboard\xff HTTP/1.1", id="byte beyond ASCII"),
        pytest.param(b"GET {id}/dashboard HTTP/1.1", id="no slash"),
        pytest.param(b"GET http://[/{id}/dashboard HTTP/1.1", id="bracket"),
        pytest.param(b"get /{id}/dashboard HTTP/1.1", id="method in small letters"),
        pytest.param(b"GET /{id}/dashboard HTTP/9.9", id="unknown version"),
        pytest.param(b"GET / HTTP/1.1\r\nReferer https://track.example.com/{id}/dashboard", id="header without colon"),
        pytest.param(b"GET / HTTP/1.1\r\nExpect: {id}", id="expectation"),
        pytest.param(b"GET / HTTP/1.1\r\nX-{id}(: 1", id="name of a header"),
    ],
)
def test_a_malformed_request_leaves_no_private_id_in_the_log(live: Live, request_head: bytes) -> None:
    # Such a line is typed by somebody who copies a dashboard's address by hand, or comes from a broken proxy.
    mark = live.mark
    answers = read_answers(live.exchange(live.fill(request_head) + b"\r\nHost: x\r\n\r\n"))
    assert [answer.status // 100 for answer in answers] == [4]
    log = live.log_since(mark)
    assert log.count("\n") == 1  # the refusal is logged, on one line
    assert secrets_in(live, log) == []


@pytest.mark.parametrize("target", ["/{id}/dashboard", "http://track.example.com/{id}/dashboard?x=1"])
def test_gunicorns_own_errors_are_logged_without_the_private_url(live: Live, target: str) -> None:
    # What gunicorn writes when an answer can't be sent: "Error handling request METHOD URI".
    uri = live.fill(target.encode()).decode()
    for message, values in (("Error handling request %s %s", ("GET", uri)), ("Error handling request %s", (uri,))):
        record = logging.LogRecord("gunicorn.error", logging.ERROR, "", 0, message, values, None)
        line = tracker.one_line(record)
        assert "Error handling request" in line
        assert live.id not in line
