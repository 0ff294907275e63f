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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import CHROME, Server

import tracker

OPERATOR_KEY = "the-operators-own-key"


class Answer(NamedTuple):
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
        """Send, with {id} and {mail_id} filled in, say that no more will come, and read what there is."""
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=20) as connection:
            return talk(connection, *map(self.fill, pieces))

    def ask(self, target: str, *headers: str, method: str = "GET", body: bytes = b"") -> Answer:
        """One request for one answer."""
        lines = [f"{method} {target} HTTP/1.1", *headers]
        named = {line.partition(":")[0] for line in headers}
        lines += [] if "Host" in named else ["Host: track.example.com"]
        lines += [] if "Content-Length" in named or not body else [f"Content-Length: {len(self.fill(body))}"]
        (answer,) = read_answers(self.exchange("\r\n".join([*lines, "", ""]).encode("latin-1") + body), method)
        return answer

    def fill(self, data: bytes) -> bytes:
        return data.replace(b"{id}", self.id.encode()).replace(b"{mail_id}", self.mail_id.encode())

    def events(self, key: str) -> list[dict[str, Any]]:
        """The hits of an email."""
        return [row for row in self.rows("events") if row["key"] == key]

    def rows(self, table: str) -> list[dict[str, Any]]:
        """An export."""
        rows: list[dict[str, Any]] = json.loads(self.ask(f"/{{id}}/{table}.json").body)["rows"]
        return rows

    @contextlib.contextmanager
    def harmless_log(self) -> Iterator[list[str]]:
        """What the server writes meanwhile: no traceback, private id, client's address, or data of a reader."""
        mark = self.server.log.stat().st_size
        log: list[str] = []
        yield log
        log += self.server.log.read_bytes()[mark:].decode().splitlines()
        for secret in (self.id, "203.0.113.77", "127.0.0.1", "reader@example.org", OPERATOR_KEY, "Traceback"):
            assert [line for line in log if secret in line] == []


def talk(connection: socket.socket, *pieces: bytes) -> bytes:
    # The server may have heard enough, and may have answered.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for piece in pieces:
            connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)
    return b"".join(iter(lambda: connection.recv(65_536), b""))


def read_answers(data: bytes, method: str = "GET") -> list[Answer]:
    """Read responses as strictly as RFC 9112 is written; whatever does not fit, or is no plain answer, fails the test."""
    answers = []
    while data:
        head, separator, rest = data.partition(b"\r\n\r\n")
        assert separator, data
        status_line, *lines = head.decode("ascii").split("\r\n")
        match = re.fullmatch(r"HTTP/1\.[01] ([1-5][0-9][0-9]) [ -~]*", status_line)
        assert match, status_line
        fields = [re.fullmatch(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ([\t -~]*)", line) for line in lines]
        assert all(fields), lines
        headers = {field[1].lower(): field[2] for field in fields if field}
        assert len(headers) == len(lines), "a header twice"
        body, status = b"", int(match[1])
        if "transfer-encoding" in headers and method != "HEAD":
            assert headers["transfer-encoding"] == "chunked"
            body, rest = read_chunks(rest)
        elif method != "HEAD" and status != 100:
            length = int(headers["content-length"])
            assert len(rest) >= length
            body, rest = rest[:length], rest[length:]
        assert status < 500 or status == 503 or headers.get("server") == "nginx"  # which has more to say of strangers
        assert not {"x-evil", "set-cookie"} & set(headers)
        assert b"Traceback" not in body and (b"<script" not in body or "html" not in headers["content-type"])
        answers.append(Answer(status, headers, body))
        data = rest
    return answers


def read_chunks(data: bytes) -> tuple[bytes, bytes]:
    """A chunked body to its end, and what follows."""
    body, size = b"", -1
    while size:
        line, _, data = data.partition(b"\r\n")
        size = int(line, 16)
        assert data[size : size + 2] == b"\r\n"
        body, data = body + data[:size], data[size + 2 :]
    return body, data


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """One server for all the tests here: it must take them one after the other without harm."""
    server = Server(tmp_path_factory.mktemp("raw"), API_KEY=OPERATOR_KEY).start()
    made = server.tenant("Acme", "--domain", "acme.com")
    yield Live(server, made["id"], made["mail_id"])
    log = server.stop()
    server.listener.close()
    assert log.count("Booting worker") == 2, "a worker died on the way"


# -- Request targets

TARGETS: dict[tuple[int, str | None], tuple[str, ...]] = {
    (200, "bad key"): (
        "/{mail_id}/pixel/a%2Fb.gif", "/{mail_id}/pixel/a%0Ab.gif", "/{mail_id}/pixel/a%0D%0AX-Evil:%201.gif",
        "/{mail_id}/pixel/a%00.gif", "/{mail_id}/pixel/%FF%FE.gif", "/{mail_id}/pixel/%2e%2e.gif",
        "/{mail_id}/pixel/a%.gif", "/{mail_id}/pixel/a%2541.gif", "/{mail_id}/pixel/" + "a" * 201 + ".gif",
    ),
    (200, "recorded"): (
        "/{mail_id}/pixel/e1.gif?" + "x" * 7000, '/{mail_id}/pixel/e1.gif?"\\<>^`{|}',
        "/{mail_id}/pixel/e1.gif?a=%00%0D%0A&b=%FF", "http://track.example.com/{mail_id}/pixel/e1.gif",
        "HTTP://Elsewhere.example:1/{mail_id}/pixel/e1.gif", "//{mail_id}/pixel/e1.gif", "/{mail_id}//pixel/e1.gif//",
        "http://track.example.com//{mail_id}/pixel/e1.gif/",
    ),
    (200, "unknown tenant"): ("/%00%0A/pixel/e1.gif",),
    (200, None): ("/" + "/" * 5000, "/{id}/events.json?after=" + "9" * 18 + "-" + "9" * 18,),
    (404, None): (
        "/{mail_id}%2Fpixel%2Fe1.gif",
        "/./{mail_id}/pixel/e1.gif", "/x/../{mail_id}/pixel/e1.gif", "/{id}/../{id}/dashboard", "/{id}/dashboard/.",
        "/../../../../etc/passwd", "/assets/..%2F..%2Ftracker.py", "/assets/%2e%2e/tracker.py", "/assets/%00",
        "/health%0D%0AX-Evil:%201", "/%C0%AF/%E0%80%AF/%F5", "/%ED%A0%80/dashboard",
        "/" + "a/" * 3000, "/{id}/dashboard#fragment", "/{mail_id}/click/e1/signature/target",
        "/{mail_id}/click/e1/%FF%00/%0D%0A", "/{mail_id}/click/e1/" + "A" * 16 + "/" + "A" * 6000, "/" + "a" * 16_000,
        "/\xff\xfe", "/caf\xe9",
    ),
    (400, None): (
        "/{id}/stats.json?tz=%0D%0AX-Evil:1", "/{id}/dashboard?range=%3Cscript%3E%00", "/{id}/emails.csv?limit=%D9%A1",
        "/\x00", "/a b", "health",
    ),
    (414, None): ("/" + "a" * 17_000,),
}  # fmt: skip


@pytest.mark.parametrize("status, note", TARGETS)
def test_an_odd_target_gets_a_plain_answer(live: Live, status: int, note: str | None) -> None:
    for target in TARGETS[status, note]:
        answer = live.ask(target)
        assert (answer.status, answer.headers.get("x-tracker")) == (status, note), target
        if note:
            assert (answer.body[:6], len(answer.body)) == (b"GIF89a", 43)


def test_targets_that_are_no_path_and_methods_that_are_not_ours_are_refused(live: Live) -> None:
    for target in ("*", "track.example.com:443", "http://track.example.com", "http://", "ftp://x/health"):
        for method in ("GET", "OPTIONS", "CONNECT", "TRACE", "PROPFIND", "X"):
            status = live.ask(target, method=method).status
            assert status in (400, 404, 405) or target == "http://track.example.com"


@pytest.mark.parametrize(
    "target, location",
    [
        *((f"https%3A%2F%2Facme.com%2F{breaks}X-Evil%3A%201", None) for breaks in ("%0D%0A", "%0A", "%0D", "%00")),
        ("%0D%0Ahttps%3A%2F%2Facme.com%2F", None), ("https%3A%2F%2Facme.com%0D%0AX-Evil%3A%201", None),
        ("https%3A%2F%2Facme.com%2F%250D%250AX-Evil", "https://acme.com/%0D%0AX-Evil"),
        ("https://acme.com/%0D%0AX-Evil:1", "https://acme.com/%0D%0AX-Evil:1"),
        # Characters whose low byte is CR or LF: servers that cut code points in half have split headers at them.
        ("https%3A%2F%2Facme.com%2F%E5%98%8D%E5%98%8AX", "https://acme.com/%E5%98%8D%E5%98%8AX"),
        ("https%3A%2F%2Facme.com%2F%C2%85%E2%80%A8X", "https://acme.com/%C2%85%E2%80%A8X"),
        ("https%3A%2F%2Facme.com%2F%FFX", "https://acme.com/%EF%BF%BDX"),
        ("https%3A%2F%2Facme.com%2F%3F%22%3E%3Cscript%3E", "https://acme.com/?%22%3E%3Cscript%3E"),
    ],
)  # fmt: skip
def test_a_redirect_holds_no_header_but_ours(live: Live, target: str, location: str | None) -> None:
    for method in ("GET", "HEAD"):
        answer = live.ask(f"/{{mail_id}}/click/e1?url={target}", method=method)
        assert (answer.status, answer.headers.get("location")) == (302 if location else 400, location)
    assert live.ask("/{mail_id}/click/e1?url=https%3A%2F%2Fevil.example%2F%22%3E%3Cscript%3E").status == 200


# -- Headers

ODD_HEADERS: dict[int, tuple[tuple[str, ...], ...]] = {
    200: (
        ("Host: ",), ("Host: \xff\xfe",), ("User-Agent: \xff\xfe\x80",), ("User-Agent: " + "x" * 8000,),
        ("X-Forwarded-For: " + "1.1.1.1, " * 800 + "x",), ("Authorization: Bearer \xff",),
        ("X-Forwarded-For: \xff, ::::, 1.2.3.4.5, [::1, 99999999999",),
        ("Sec-Purpose: \xff", "Sec-GPC: \xff\xff", "X-Moz: \t"),
        ("Range: bytes=0-0", "If-None-Match: *", "Connection: upgrade", "Upgrade: h2c"),
        ("SCRIPT_NAME: /x",), ("PATH_INFO: /x",),  # of its proxy, which gunicorn would believe
    ),
    400: (
        ("Host: a.example", "Host: b.example"), ("Host: a.example\r\n X-Evil: 1",), ("Host: a\0b",),
        ("X: a\rX-Evil: 1",), ("No colon",), ("Bad(name: 1",), ("Content-Length: x",), ("Content-Length: -1",),
        ("Content-Length: 1, 2",), ("Content-Length: 0", "Content-Length: 5"), ("Content-Length: \xb2",),
        ("Content-Length: 5", "Transfer-Encoding: chunked"), ("Transfer-Encoding: gzip",),
    ),
    431: (("X: " + "x" * 65_600,), tuple(f"X-{n}: " + "x" * 60_000 for n in range(5))),
}  # fmt: skip


@pytest.mark.parametrize("status", ODD_HEADERS)
def test_odd_headers_get_a_plain_answer(live: Live, status: int) -> None:
    for headers in ODD_HEADERS[status]:
        for target in ("/{mail_id}/pixel/e1.gif", "/{id}/dashboard"):
            assert live.ask(target, *headers).status == status, headers


UNREAD: dict[str, tuple[str, ...]] = {
    "a cookie of 8.2 kB": ("Cookie: a=" + "x" * 8_200,),
    "cookies of 60 kB": ("Cookie: " + "; ".join(f"c{n}=" + "x" * 1_990 for n in range(30)),),
    "a cookie twice": ("Cookie: a=" + "x" * 9_000, "Cookie: b=" + "x" * 9_000),
    "101 headers": tuple(f"X-{n}: 1" for n in range(101)),
    "900 headers": tuple(f"X-{n}: 1" for n in range(900)),
    "a long referrer": ("Referer: https://acme.com/?" + "x" * 20_000,),
    "an expectation": ("Expect: foo",),
    "another expectation": ("EXPECT: 100-continue, foo",),
    "an empty expectation": ("Expect:",),
    "control characters": ("Cookie: a=\x01\x7f\x1b", "X-Odd: \x0b"),
    "bytes beyond ASCII": ("Cookie: a=\xff\xfe", "X-Ma\x2dn: \xfc"),
    "names with underscores": ("X_Forwarded_Proto: gopher", "HTTP_HOST: evil.example"),
    "contradictions": ("X-Forwarded-Proto: http", "X-Forwarded-Proto: https", "X-Forwarded-Ssl: off"),
    "odd conditions": ("If-Match: x", "If-None-Match: *", "If-Modified-Since: never", "Range: bytes=9-1", "TE: x"),
}


def signed_link(ask: Callable[..., Answer], id_: str, key: str) -> str:
    """The path of a signed link in a new email; it leads to https://acme.com/."""
    made = ask(f"/{id_}/emails", method="POST", body=json.dumps({"key": key, "links": ["https://acme.com/"]}).encode())
    return re.sub("^https?://[^/]+", "", json.loads(made.body)["links"][0]["click_url"])


@pytest.mark.parametrize("what", UNREAD)
def test_whatever_a_header_says_that_nobody_reads_a_hit_is_counted(live: Live, what: str) -> None:
    key = f"unread-{list(UNREAD).index(what)}"
    link = signed_link(live.ask, live.id, key)
    assert live.ask(f"/{{mail_id}}/pixel/{key}.gif", *UNREAD[what]).headers["x-tracker"] == "recorded"
    answer = live.ask(link, *UNREAD[what])
    assert (answer.status, answer.headers["location"]) == (302, "https://acme.com/")
    assert sorted(event["event_type"] for event in live.events(key)) == ["click", "open"]


STRICT = {  # what may say where a request ends, beside what is forgiven; the status
    "a length after a header with a control character": (b"X: \x01\r\nContent-\x01Length: 5", 400),
    "a length that ends with one": (b"Content-Length: 5\x0b", 400),
    "a coding that begins with one": (b"Transfer-Encoding: \x0bchunked\r\nContent-Length: 40", 501),
    "a coding with a space, and one": (b"Transfer-Encoding : chunked\r\nX: \x01", 400),
    "a coding and a length, and one": (b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\nX: \x01", 400),
    "two lengths and an expectation": (b"Content-Length: 1\r\nContent-Length: 2\r\nExpect: foo", 400),
    "a folded expectation": (b"Expect: foo\r\n Transfer-Encoding: chunked", 400),
    "a coding after a bare line feed": (b"Expect: a\nTransfer-Encoding: chunked", 400),
    "a length after a bare carriage return": (b"X: \x01\rContent-Length: 5", 400),
    "NUL": (b"Cookie: \x00\x01", 400),
}


@pytest.mark.parametrize("what", STRICT)
def test_what_is_forgiven_hides_no_second_request(live: Live, what: str) -> None:
    headers, status = STRICT[what]
    inner = b"GET /{mail_id}/pixel/inner.gif HTTP/1.1\r\nHost: x\r\n\r\n"
    outer = b"GET /{mail_id}/pixel/outer.gif HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n\r\n0\r\n\r\n"
    answer = live.exchange(outer + inner)
    assert answer.startswith(b"HTTP/1.1 %d " % status) and answer.count(b"HTTP/1.1 ") == 1
    assert not live.events("inner") and not live.events("outer")


RAW = {  # targets of hits, in bytes as some clients send them; whose hit it is, and where it leads
    "/{mail_id}/pixel/raw-1.gif?campaign=Frühling": ("raw-1?campaign=Frühling", None),
    "/{mail_id}/pixel/raw-2.gif?campaign=春🌸": ("raw-2?campaign=春🌸", None),
    "/{mail_id}/pixel/raw-3.gif?campaign=%C3%BCü": ("raw-3?campaign=üü", None),
    "/{mail_id}/click/raw-4?url=https://acme.com/größe": ("raw-4", "https://acme.com/gr%C3%B6%C3%9Fe"),
    "/{mail_id}/click/raw-5?url=https%3A%2F%2Facme.com%2Fgrö%C3%9F": ("raw-5", "https://acme.com/gr%C3%B6%C3%9F"),
    "/{mail_id}/click/raw-6?campaign=ü&url=https://acme.com/?q=春": (
        "raw-6?campaign=ü",
        "https://acme.com/?q=%E6%98%A5",
    ),
}


@pytest.mark.parametrize("target", RAW)
def test_bytes_beyond_ascii_are_read_as_browsers_would_have_sent_them(live: Live, target: str) -> None:
    key, location = RAW[target]
    answer = live.ask(target.encode().decode("latin-1"))
    assert (answer.status, answer.headers.get("location")) == (302 if location else 200, location)
    assert len(live.events(key)) == 1


def test_bytes_that_are_no_utf_8_are_counted_too(live: Live) -> None:
    assert live.ask("/{mail_id}/pixel/latin-1.gif?campaign=Fr\xfchling").headers["x-tracker"] == "recorded"
    assert len(live.events("latin-1?campaign=Fr\ufffdhling")) == 1
    assert live.ask("/{mail_id}/pixel/\xfc.gif").headers["x-tracker"] == "bad key"


def test_bytes_that_are_no_http_do_no_harm(live: Live) -> None:
    for data in (b"", b"\r\n\r\n", b"\0" * 100, b"\x16\x03\x01\x02\x00\x01", b"GET", b"GET / HTTP/1.1\r\nHost: x",
                 b"GET / HTTP/1.1\nHost: x\n\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
                 b"GET /\r\n\r\n", b"get / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1 X\r\n\r\n", b"\xff" * 10_000):  # fmt: skip
        for answer in read_answers(live.exchange(data)):
            assert answer.status == 400 or data.startswith(b"\xff")
    assert live.ask("/health").status == 200


POST = b"POST /{id}/emails HTTP/1.1\r\nHost: x\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


def test_a_whole_body_is_read_and_one_that_is_broken_or_breaks_off_is_the_clients_mistake(live: Live) -> None:
    answers = read_answers(live.exchange(POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}"))
    assert [answer.status for answer in answers] == [100, 201]
    (answer,) = read_answers(live.exchange(CHUNKED, b'6\r\n{"key"\r\n006;extension=1\r\n:"c1"}\r\n0\r\n\r\n'))
    assert (answer.status, json.loads(answer.body)["key"]) == (201, "c1")
    end = b"0\r\n\r\n"
    for chunks in (b"zz\r\n{}\r\n" + end, b"-2\r\n{}\r\n" + end, b"2\r\n{}", b"2\r\n{}XX" + end, b"5\r\n{}", b""):
        with live.harmless_log():
            assert [answer.status for answer in read_answers(live.exchange(CHUNKED + chunks))] == [400]
    for body in (b'{"key": "cut-off"}', b'{"key": "cut', b""):
        assert live.ask("/{id}/emails", "Content-Length: 100", method="POST", body=body).status == 400
    assert b"cut-off" not in live.ask("/{id}/emails.json").body


def test_a_body_over_10_megabytes_is_too_large_in_chunks_too(live: Live) -> None:
    megabyte = b" " * (1 << 20)
    length = POST + b"Content-Length: %d\r\n\r\n" % ((10 << 20) + 1)
    chunks = [b"100000\r\n" + megabyte + b"\r\n"] * 10
    for pieces in ((length, *[megabyte] * 10, b" "), (CHUNKED, *chunks, b"1\r\n \r\n0\r\n\r\n")):
        (answer,) = read_answers(live.exchange(*pieces))
        assert (answer.status, json.loads(answer.body)) == (413, {"error": "expected a body of at most 10 MB"})


def test_what_is_sent_behind_a_request_gets_an_answer_of_its_own_or_none(live: Live) -> None:
    # A server that took the second for the first one's body, or the body for a request, would answer a stranger.
    first = b"GET /{mail_id}/pixel/pipelined.gif HTTP/1.1\r\nHost: x\r\n\r\n"
    answers = read_answers(live.exchange(first + b"GET /robots.txt HTTP/1.1\r\nHost: x\r\n\r\n"))
    assert answers[0].headers["x-tracker"] == "recorded"
    assert [answer.headers["content-type"] for answer in answers[1:]] in ([], ["text/plain; charset=utf-8"])
    pieces = [bytes([byte]) for byte in live.fill(first)]
    assert read_answers(live.exchange(*pieces))[0].headers["x-tracker"] == "recorded", "in pieces it is one request"
    for method, target in (("POST", "/{id}/emails"), ("GET", "/{mail_id}/pixel/outer.gif"), ("POST", "/nothing")):
        live.ask(target, method=method, body=first.replace(b"pipelined", b"smuggled"))
    assert not live.events("smuggled"), "a request inside a body is none"


def test_nothing_follows_the_headers_of_an_answer_to_head(live: Live) -> None:
    for path in ("", "health", "nothing", "{mail_id}/pixel/e1.gif", "{mail_id}/click/e1?url=https%3A%2F%2Facme.com",
                 "{mail_id}/click/e1?url=https%3A%2F%2Felsewhere.example", "{id}/dashboard", "{id}/stats.json",
                 "{id}/emails.json", "{id}/events.csv", "{id}/emails"):  # fmt: skip
        got, head = live.ask(f"/{path}"), live.ask(f"/{path}", method="HEAD")
        assert (head.status, head.body) == (got.status, b"")
        # Chunks have no place without a body: RFC 9110 §9.3.2 lets a server leave such fields out.
        assert set(head.headers) == set(got.headers) - {"transfer-encoding"}


# -- The client's address


def test_the_real_server_believes_its_proxy_and_keeps_a_part_of_the_address(live: Live) -> None:
    forwarded = "X-Forwarded-For: 6.6.6.6, 203.0.113.77"
    live.ask("/{mail_id}/pixel/proxied.gif", forwarded, "X_Forwarded_For: 198.51.100.7", f"User-Agent: {CHROME}")
    (event,) = live.events("proxied")
    assert (event["ip_address"], event["verdict"], event["user_agent"]) == ("203.0.113.0", "human", CHROME)


def test_whoever_connects_by_the_unix_socket_is_believed(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:  # the path of a socket may have 107 bytes, and tmp_path is long
        path = os.path.join(folder, "app.sock")
        server = Server(tmp_path, BIND=f"unix:{path}", WEB_CONCURRENCY="1", BASE_URL="https://track.example.com")
        server.start()
        try:
            mail_id = server.first_tenant()
            for key, forwarded in (("said", "X-Forwarded-For: 6.6.6.6, 203.0.113.77\r\n"), ("silent", "")):
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                    connection.settimeout(20)
                    connection.connect(path)
                    request = f"GET /{mail_id}/pixel/{key}.gif HTTP/1.1\r\n{forwarded}\r\n".encode()
                    (answer,) = read_answers(talk(connection, request))
                    assert answer.headers["x-tracker"] == "recorded"
        finally:
            server.stop()
            server.listener.close()
        opened = contextlib.closing(tracker.Database(str(tmp_path / "data" / "tracking.db")))
        with opened as database, database.reading() as reading:
            rows = reading.execute("select key, address from event_details order by key").fetchall()
        assert [tuple(row) for row in rows] == [("said", "203.0.113.0"), ("silent", None)]


# -- The log

ASKED = (  # method, target, body, further header, status
    ("GET", "/{id}/dashboard", b"", "", 200), ("GET", "/{id}/dashboard?range=x", b"", "", 400),
    ("GET", "/{id}/stats.json", b"", "", 200), ("GET", "/{id}/emails.csv", b"", "", 200),
    ("GET", "/{id}/nothing", b"", "", 404), ("GET", "http://track.example.com/{id}/dashboard", b"", "", 200),
    ("PUT", "/{id}/dashboard", b"", "", 405), ("POST", "/{id}/emails", b"{", "", 400),
    ("POST", "/{id}/emails", b'{"key": "logged", "recipient": "reader@example.org"}', "", 201),
    ("DELETE", "/{id}/emails/logged", b"", "", 200), ("DELETE", "/{id}/emails/logged", b"", "", 404),
    ("POST", "/tenants", b"{}", "", 401), ("POST", "/tenants", b"{}", f"Authorization: Bearer {OPERATOR_KEY}", 400),
    ("GET", "/{id}/pixel/e1.gif", b"", "", 200), ("GET", "/{mail_id}/click/e1?url=ftp://x", b"", "", 400),
    ("GET", "/{mail_id}/pixel/e1.gif", b"", "Referer: https://track.example.com/{id}/dashboard", 200),
)  # fmt: skip


def test_the_log_holds_no_private_id_no_address_and_no_traceback_whatever_is_asked_for(live: Live) -> None:
    with live.harmless_log():
        for method, target, body, header, status in ASKED:
            headers = ["X-Forwarded-For: 203.0.113.77", *([header] if header else [])]
            assert live.ask(target, *headers, method=method, body=body).status == status, target


def test_a_client_that_hangs_up_leaves_no_private_id_and_no_traceback_in_the_log(live: Live) -> None:
    registrations = json.dumps([{"subject": "x" * 900}] * 1000).encode()
    assert live.ask("/{id}/emails", method="POST", body=registrations).status == 201
    with live.harmless_log():
        for target in (b"/{id}/emails.json HTTP/1.1", b"/{id}/emails.csv HTTP/1.1", b"/{id}/dashboard HTTP/1.1"):
            with socket.create_connection(("127.0.0.1", live.server.port), timeout=20) as connection:
                # An answer of a megabyte does not fit into the buffers of a connection that nobody reads.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.sendall(live.fill(b"GET " + target + b"\r\nHost: x\r\n\r\n"))
                assert connection.recv(100)
        live.exchange(b"GET /{id}/dash")
        # The answers that nobody read are over when the lock of the exports is free.
        deadline = time.monotonic() + 20
        while live.ask("/{id}/emails.json?limit=1").status == 503:
            assert time.monotonic() < deadline


def test_a_malformed_request_leaves_no_private_id_in_the_log(live: Live) -> None:
    # Such a line is typed by somebody who copies a dashboard's address by hand, or comes from a broken proxy.
    for head in (b"GET /{id}/dashboard", b"GET /{id}/dash board HTTP/1.1", b"GET {id}/dashboard HTTP/1.1",
                 b"GET http://[/{id}/dashboard HTTP/1.1", b"get /{id} HTTP/1.1",
                 b"GET /{id}/dashboard HTTP/9.9", b"GET / HTTP/1.1\r\nReferer https://track.example.com/{id}",
                 b"GET / HTTP/1.1\r\nX-{id}(: 1"):  # fmt: skip
        with live.harmless_log() as log:
            answers = read_answers(live.exchange(head + b"\r\nHost: x\r\n\r\n"))
            assert [answer.status // 100 for answer in answers] == [4]
        assert len(log) == 1, "the refusal is logged, on one line"


def test_gunicorns_own_errors_are_logged_without_the_private_url(live: Live) -> None:
    # What gunicorn writes when an answer can't be sent: "Error handling request METHOD URI".
    uri = f"http://track.example.com/{live.id}/dashboard?x=1"
    for message, values in (("Error handling request %s %s", ("GET", uri)), ("Error handling request %s", (uri,))):
        line = tracker.without_private(logging.LogRecord("gunicorn.error", logging.ERROR, "", 0, message, values, None))
        assert "Error handling request" in line and live.id not in line
