"""Sending: the command `instrument` in a pipe, templates of mailing tools, their campaigns, and the same over HTTP."""

from __future__ import annotations

import base64
import contextlib
import email
import fcntl
import html
import io
import json
import os
import random
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import EmailMessage
from email.policy import SMTP
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import pytest
from asking import database_away, spooled
from conftest import BASE, CHROME, NOW, Stage, hit, segment, without_settings
from load import locked

import tracker

LINK = "https://elsewhere.example/a?b=1&c=2"
HEADERS = (
    b"From: Acme <news@acme.com>\r\n"
    b"To: Ann <ann@example.org>\r\n"
    b"Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe_aus?=\r\n"
    b" =?utf-8?q?_Bern?=\r\n"
    b"MIME-Version: 1.0\r\n"
    b"Content-Type: text/html; charset=utf-8\r\n"
    b"Content-Transfer-Encoding: 8bit\r\n"
)
PAGE = (
    "<html><body class=x>\r\n<p>Grüße  <A HREF='https://elsewhere.example/a?b=1&amp;c=2'>shop</A>"
    '<a href="mailto:a@b.example">write</a>\r\n</body></html>\r\n'
)
MESSAGE = HEADERS + b"\r\n" + PAGE.encode()
PLAIN = b"To: ann@example.org\nSubject: plain\n\nhttps://acme.com/\n"
SIGNED = b"DKIM-Signature: v=1; a=rsa-sha256; d=acme.com; s=x; b=abc\r\n" + MESSAGE
SEALED = SIGNED.replace(b"DKIM-Signature", b"ARC-Seal")
PIXEL = re.compile(rb'<img src="([^"]+)" width="1" height="1" alt="" style="display:block;float:left">')
HIDDEN = re.compile(rb'<a href="([^"]+)" aria-hidden="true" tabindex="-1" style="display:none"></a>')
CLICK = re.compile(
    rb"""https?://[^/"']+/[A-Za-z0-9_-]+/click/([^/"']+)/[A-Za-z0-9_-]{16}/([A-Za-z0-9_-]+)(\?campaign=[^"']+)?"""
)


class Out(NamedTuple):
    """How a command ended."""

    out: bytes
    err: str


@dataclass(frozen=True, slots=True)
class Pipe:
    """Where commands are run on the database of a stage; what goes in and comes out is bytes."""

    stage: Stage
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *words: str, stdin: bytes = b"", status: int = 0) -> Out:
        """Run a command that must end with this status."""
        out = io.BytesIO()
        self.capsys.readouterr()
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
            patch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="utf-8", newline=""))
            try:
                ended = tracker.main(["--env", os.devnull, *words])
            except SystemExit as stop:  # argparse leaves this way
                ended = int(stop.code or 0)
            sys.stdout.flush()
            said = Out(out.getvalue(), self.capsys.readouterr().err)
        assert ended == status and "Traceback" not in said.err, said
        self.stage.refresh()
        return said

    def instrument(self, *options: str, stdin: bytes = MESSAGE, status: int = 0, tenant: str = "Acme") -> Out:
        return self("instrument", tenant, *options, stdin=stdin, status=status)

    def report(self, *options: str, stdin: bytes = MESSAGE) -> Any:
        path = self.stage.folder / "report.json"
        self.instrument(*options, "--report", str(path), stdin=stdin)
        return json.loads(path.read_text(encoding="utf-8"))

    def people(self, group: str = "sent", range_: str = "7d") -> tuple[int, int, int]:
        """Acme's emails, opened and clicked by persons; the same from the command and over HTTP."""
        self.stage.drain()
        said = json.loads(self("stats", "Acme", "--json", "--range", range_).out)[group]
        assert said == self.stage.web.get(f"/{self.stage.acme.id}/stats.json?range={range_}").json[group]
        return said["emails"], said["opened"]["person"], said["clicked"]["person"]


@pytest.fixture
def pipe(stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Pipe:
    without_settings(monkeypatch)
    monkeypatch.setenv("DATABASE_URL", f"sqlite:{stage.settings.database}")
    monkeypatch.setenv("BASE_URL", BASE)
    return Pipe(stage, monkeypatch, capsys)


@pytest.fixture(autouse=True)
def numbers_hold(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test, nothing differs from a recount."""
    stage = request.getfixturevalue("stage") if "stage" in request.fixturenames else None
    yield
    assert stage is None or stage.check() == []


def emails(stage: Stage) -> list[tuple[Any, ...]]:
    return stage.rows("select key, subject, recipient, campaign, registered from emails order by id")


def undone(message: bytes) -> bytes:
    """A message without the pixel and with its own links again."""

    def target(match: re.Match[bytes]) -> bytes:
        url = tracker.decode_target(match[2].decode())
        assert url is not None
        return html.escape(url, quote=False).encode()

    return CLICK.sub(target, PIXEL.sub(b"", message))


def keys(message: bytes) -> set[str]:
    """The keys in the links and the pixel of a message."""
    pixels = [re.sub(rb".*/pixel/(.*)\.gif.*", rb"\1", url) for url in PIXEL.findall(message)]
    return {key.decode() for key in [*pixels, *(match[0] for match in CLICK.findall(message))]}


def follow(stage: Stage, url: str, base: str = BASE, **more: Any) -> Any:
    """Ask for a URL that stands in a message, as a person's browser would."""
    assert url.startswith(base + "/")
    extra = {"HTTP_HOST": base.partition("//")[2]}
    return stage.web.get(url[len(base) :], headers={"User-Agent": CHROME}, extra_environ=extra, **more)


# == A message is instrumented, by the command or over HTTP ==

FLAGS = {"links": "--no-links", "force": "--force", "hidden_link": "--hidden-link"}
WAYS = pytest.mark.parametrize("way", ["command", "http"])


def post(stage: Stage, query: str = "", message: bytes = MESSAGE, status: int = 200, **more: Any) -> Any:
    """Instrument a message over HTTP."""
    more.setdefault("content_type", "message/rfc822")
    return stage.web.post(f"/{stage.acme.id}/messages{query}", message, status=status, **more)


def said_of(pipe: Pipe, way: str, message: bytes = MESSAGE, **wanted: str) -> Out:
    """What comes out of a message when these fields of the query, or options of these names, are given."""
    if way == "http":
        answer = post(pipe.stage, f"?{urlencode(wanted)}", message)
        return Out(answer.body, answer.headers["X-Tracker"])
    options = [
        word
        for name, value in wanted.items()
        for word in ([FLAGS[name]] if name in FLAGS else [f"--{'email' if name == 'key' else name}", value])
    ]
    return pipe.instrument(*options, stdin=message)


@WAYS
def test_a_message_comes_out_as_it_went_in_but_for_a_link_and_a_pixel_that_count(way: str, pipe: Pipe) -> None:
    before = tracker.now_ms()
    out = said_of(pipe, way).out
    assert undone(out) == MESSAGE
    assert PIXEL.findall(out) and b'float:left"></body></html>\r\n' in out
    (row,) = emails(pipe.stage)
    assert row[1:] == ("Grüße aus Bern", "ann@example.org", "", 1)
    assert keys(out) == {row[0]} and re.fullmatch("[A-Za-z0-9_-]{22}", row[0])
    assert pipe.stage.rows("select sent_at between ? and ? from emails", before, tracker.now_ms()) == [(1,)]
    (pixel,), (link,) = PIXEL.findall(out), CLICK.finditer(out)
    assert follow(pipe.stage, pixel.decode()).headers["X-Tracker"] == "recorded"
    assert follow(pipe.stage, link[0].decode(), status=302).location == LINK
    assert pipe.people() == (1, 1, 1)


@WAYS
def test_what_is_said_goes_before_the_headers(way: str, pipe: Pipe) -> None:
    out = said_of(pipe, way, key="e+1@x", subject="Füße", recipient="bob@example.org", campaign="spring").out
    assert emails(pipe.stage) == [("e+1@x", "Füße", "bob@example.org", "spring", 1)]
    assert keys(out) == {"e+1@x"} and b"campaign" not in out


@WAYS
@pytest.mark.parametrize(
    ("wanted", "message", "pixels", "links", "told"),
    [
        ({"pixel": "top"}, MESSAGE, 1, 1, ""),
        ({"pixel": "bottom"}, MESSAGE, 1, 1, ""),
        ({"pixel": "none"}, MESSAGE, 0, 1, ""),
        ({"links": "no"}, MESSAGE, 1, 0, ""),
        ({"hidden_link": "yes"}, MESSAGE, 1, 2, ""),
        ({"force": "yes"}, SIGNED, 1, 1, ""),
        ({"links": "no", "pixel": "none"}, MESSAGE, 0, 0, "not asked for"),
        ({}, SIGNED, 0, 0, "DKIM-Signature"),
        ({}, SEALED, 0, 0, "ARC-Seal"),
        ({}, PLAIN, 0, 0, "text/plain"),
        ({}, b"X-Track: clicks\r\n" + MESSAGE, 0, 1, ""),
        ({"hidden_link": "yes"}, b"X-Track: opens\r\n" + MESSAGE, 1, 0, ""),
        ({"hidden_link": "yes"}, b"X-Track: none\r\n" + MESSAGE, 0, 0, "its X-Track says none"),
        ({"links": "no"}, b"X-Track: clicks\n" + MESSAGE, 0, 0, "not asked for"),
        ({"pixel": "</body>"}, MESSAGE.replace(b"body>", b"BODY>"), 1, 1, ""),
    ],
)
def test_what_is_wanted_is_placed_and_a_message_that_is_not_changed_is_not_registered(
    wanted: dict[str, str], message: bytes, pixels: int, links: int, told: str, way: str, pipe: Pipe
) -> None:
    said = said_of(pipe, way, message, **wanted)
    assert (len(PIXEL.findall(said.out)), len(CLICK.findall(said.out))) == (pixels, links)
    assert undone(HIDDEN.sub(b"", said.out)) == re.sub(rb"\AX-Track: \w+\r?\n", b"", message)
    assert (b"<body class=x><img" in said.out) == (wanted.get("pixel") == "top")
    assert len(emails(pipe.stage)) == int(pixels + links > 0) and spooled(pipe.stage) == []
    if way == "http":
        assert said.err == ("instrumented" if pixels + links else "unchanged")
    else:
        assert ("nothing is tracked, so no email was registered" in said.err) == (pixels + links == 0)
        assert told in said.err and ("--html" in said.err) == ("--html" in told)


def test_a_mark_says_where_the_pixel_stands_also_in_html_over_http(pipe: Pipe) -> None:
    marked = PAGE.replace("Grüße", "{{ pixel }}Grüße")
    plain = HEADERS + b"\r\n" + PAGE.encode()
    for way in ("command", "http"):
        out = said_of(pipe, way, HEADERS + b"\r\n" + marked.encode(), pixel="{{ pixel }}", key=way).out
        assert undone(out) == plain and b'float:left">Gr' in out
    sent = {"key": "e1", "html": marked, "pixel": "{{ pixel }}"}
    answer = pipe.stage.web.post_json(f"/{pipe.stage.acme.id}/emails", sent, status=201).json
    assert undone(answer["html"].encode()).decode() == PAGE and 'float:left">Grüße' in answer["html"]
    sent["pixel"] = "pixel"
    refused = pipe.stage.web.post_json(f"/{pipe.stage.acme.id}/emails", sent, status=400).json["error"]
    assert refused.startswith("pixel: expected bottom, top, none, or a mark in the HTML")


NO_MESSAGES = (
    b"hello", b"hello\r\n\r\nSubject: x\r\n", b"\x00\xff\r\r\n", PAGE.encode(), b"<p>no message</p>", b'{"subject": "x"}',
    b"\r\nSubject: x\r\n", b"https://acme.com/", b"Dear Ann: hello\n\nBye", b" Subject: x\r\n\r\nx",
)  # fmt: skip


@pytest.mark.parametrize("body", NO_MESSAGES)
def test_what_is_no_message_is_refused_over_http_and_goes_on_in_a_pipe(body: bytes, pipe: Pipe) -> None:
    told = post(pipe.stage, "", body, 400).json["error"]
    assert told == "expected a message: headers such as From, To and Subject, an empty line, and its body"
    said = pipe.instrument(stdin=body)
    assert said.out == body and "nothing is tracked, so no email was registered" in said.err
    assert ("--html" in said.err) == body.startswith(b"<")
    assert emails(pipe.stage) == []


@pytest.mark.parametrize(
    "message",
    [b"subject: x\n\nhello", b"From a\nTO : x\n", b"X-Odd: y\r\nMIME-Version: 1.0\r\n", b"X-Odd: y\rDate: x\r\rz"],
)
def test_any_header_of_mail_makes_a_message(message: bytes, stage: Stage) -> None:
    assert post(stage, "", message).body == message


@WAYS
@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("key", "a/b", "expected 1 to 200 of the characters"),
        ("key", "", "expected 1 to 200"),
        ("recipient", "x" * 321, "expected at most 320 characters"),
        ("subject", "x" * 999, "expected at most 998 characters"),
        ("campaign", "x" * 201, "expected at most 200 characters"),
        ("campaign", "a\x01b", "expected"),
        ("utm", "x" * 1001, "expected at most 1000 characters"),
    ],
)
def test_a_bad_field_is_refused_by_its_name(field: str, value: str, told: str, way: str, pipe: Pipe) -> None:
    if way == "http":
        said = str(post(pipe.stage, f"?{urlencode({field: value})}", status=400).json["error"])
        assert said.startswith(f"{field}: {told}")
    else:
        option = "--email" if field == "key" else f"--{field}"
        ended = pipe.instrument(option, value, status=1)
        assert f"{option}: {told}" in ended.err and ended.out == b""
    assert (emails(pipe.stage), spooled(pipe.stage)) == ([], [])


UTM = "utm_source=news&utm_medium=e-mail+x&utm_campaign=c-{campaign}"
NAMED = "utm_source=news&utm_medium=e-mail%20x&utm_campaign=c-a%20%26%23%C3%BC"
TARGETS: dict[str, str | None] = {  # URLs, and their targets in an email of the campaign a &#ü, where they are wrapped
    "https://acme.com": f"https://acme.com?{NAMED}",
    "https://acme.com/?a=1#b?c": f"https://acme.com/?a=1&{NAMED}#b?c",
    "https://acme.com/?utm%5Fsource=x&utm_campaign": "https://acme.com/?utm%5Fsource=x&utm_campaign&utm_medium=e-mail%20x",
    "https://acme.com/#utm_source=x": f"https://acme.com/?{NAMED}#utm_source=x",
    **{
        url: url
        for url in ("https://acme.com/unsubscribe?u=1", "https://acme.com/?do=opt-out", "https://acme.com/abmelden")
    },
    f"https://acme.com/{'x' * 4050}": f"https://acme.com/{'x' * 4050}",  # as long as a target may be
    "https://acme.com/leave": None,
    "https://acme.com/?e=[EMAIL]": None,
    "mailto:a@acme.com": None,
}
TAGS = "".join(f'<a href="{html.escape(url)}">x</a>\r\n' for url in TARGETS).encode()


def targets(out: bytes) -> list[str | None]:
    """Where the links of a message lead, as they were signed."""
    return [tracker.decode_target(match[2].decode()) for match in CLICK.finditer(out)]


@WAYS
def test_targets_get_the_parameters_of_their_tenant_or_of_the_request(way: str, pipe: Pipe) -> None:
    message = b"List-Unsubscribe: <https://acme.com/leave>\r\n" + HEADERS.replace(b"8bit", b"binary") + b"\r\n" + TAGS
    urls = [url for url, target in TARGETS.items() if target]
    assert targets(said_of(pipe, way, message, campaign="a &#ü").out) == urls
    pipe("tenant", "set", "Acme", "--utm", UTM)
    out = said_of(pipe, way, message, campaign="a &#ü").out
    assert targets(out) == [*filter(None, TARGETS.values())]
    for match, target in zip(CLICK.finditer(out), targets(out), strict=True):
        location = follow(pipe.stage, match[0].decode(), status=302).location
        assert location == tracker.read_target(str(target)).location
    without = targets(said_of(pipe, way, message).out)
    assert without[0] == "https://acme.com?utm_source=news&utm_medium=e-mail%20x", "an email of no campaign"
    assert targets(said_of(pipe, way, message, utm="a=1").out)[:2] == [
        "https://acme.com?a=1",
        "https://acme.com/?a=1#b?c",
    ]
    assert targets(said_of(pipe, way, message, utm="").out) == urls
    pipe("tenant", "set", "Acme", "--utm", "")
    assert targets(said_of(pipe, way, message, campaign="a &#ü").out) == urls
    assert pipe.stage.rows("select distinct links from emails") == [(len(urls),)]


def test_targets_get_the_parameters_of_their_tenant_also_in_templates_and_without_a_database(pipe: Pipe) -> None:
    pipe("tenant", "set", "Acme", "--utm", UTM)
    with database_away(pipe.stage):
        out = pipe.instrument("--html", "--key-placeholder", "{{id}}", "--campaign", "a &#ü", stdin=TAGS).out
    leave = {"https://acme.com/leave": f"https://acme.com/leave?{NAMED}"}  # there is no header that says what it is
    assert targets(out) == [*filter(None, (TARGETS | leave).values())]
    assert pipe.report("--html", "--utm", "a=1", "--hidden-link", stdin=TAGS)["wrapped"][0] == "https://acme.com?a=1"


def test_links_and_html_of_an_email_have_the_same_targets(stage: Stage) -> None:
    stage.change(stage.acme, utm=UTM)
    value = {"links": [LINK, "https://acme.com"], "html": PAGE, "campaign": "a &#ü"}
    for more, end in (({}, NAMED), ({"utm": "b=9&x=2"}, "x=2"), ({"utm": ""}, "")):
        said = stage.web.post_json(f"/{stage.acme.id}/emails", value | more, status=201).json
        first, second = said["links"]
        assert (first["url"], second["url"]) == (LINK, "https://acme.com")
        wanted = f"{LINK}&{end}".rstrip("&")
        assert (
            targets(first["click_url"].encode())
            == targets(said["html"].encode())
            == said["report"]["wrapped"]
            == [wanted]
        )
        assert stage.rows("select links from emails where key = ?", said["key"]) == [(2,)]
    answer = stage.web.post_json(f"/{stage.acme.id}/emails", {"utm": "a={b}"}, status=400).json
    assert answer["error"].startswith("utm 'a={b}': expected NAME=VALUE")


@pytest.mark.parametrize("sign", ["(", ":", " :", "<", '"', ",", "\\", "[", "=?utf-8?q?"])
def test_a_header_of_nothing_but_signs_keeps_no_message_from_being_instrumented(sign: str, pipe: Pipe) -> None:
    message = f"To: {sign * (50_000 // len(sign))}\r\n".encode() + MESSAGE.replace(b"To: ", b"X-To: ")
    for way in ("command", "http"):
        assert undone(said_of(pipe, way, message, key=way).out) == message
    assert [row[:2] for row in emails(pipe.stage)] == [("command", "Grüße aus Bern"), ("http", "Grüße aus Bern")]


def test_without_a_public_address_a_message_is_refused_with_the_reason(
    pipe: Pipe, staged: Callable[..., Stage]
) -> None:
    assert "BASE_URL" in post(staged(BASE_URL=""), status=409).json["error"]
    pipe.monkeypatch.delenv("BASE_URL")
    assert "BASE_URL" in pipe.instrument(status=1).err and emails(pipe.stage) == []
    pipe.monkeypatch.setenv("PORT", "3210")
    out = pipe.instrument("--local", "--email", "e1").out
    assert f"http://localhost:3210/{pipe.stage.acme.mail_id}/pixel/e1.gif".encode() in out
    assert undone(out) == MESSAGE


# == The command ==


@pytest.mark.parametrize(
    ("headers", "subject", "recipient"),
    [
        (b"Subject: one\r\n\ttwo\r\n  three\r\nTo: a@b.example\r\n", "one two three", "a@b.example"),
        (b"subject: =?iso-8859-1?B?SOlsbG8=?=\nTO: =?utf-8?q?J=C3=B6rg?= <j@b.example>\n", "Héllo", "j@b.example"),
        (b"Subject: =?nonsense?q?abc?=\nTo: undisclosed-recipients:;\n", "=?nonsense?q?abc?=", ""),
        (b"Cc: a@b.example\n", "", "a@b.example"),
        (b"Bcc: a@b.example\nSubject:\n", "", "a@b.example"),
        (b'To: "Doe, Ann" <ann@b.example>\nSubject: a\x07b\n', "a b", "ann@b.example"),
        (b"Subject: " + b"x" * 990 + b"\n " + b"y" * 20 + b"\n", "x" * 990 + " " + "y" * 7, ""),
        ("Subject: Grüße\nTo: Jörg <j@b.example>\n".encode(), "Grüße", "j@b.example"),  # RFC 6532
    ],
)
def test_headers_of_every_form_are_read(headers: bytes, subject: str, recipient: str, pipe: Pipe) -> None:
    pipe.instrument(stdin=headers + b"Content-Type: text/html\n\n<p>hello</p>\n")
    assert [row[1:3] for row in emails(pipe.stage)] == [(subject, recipient)]


def test_several_recipients_are_remarked_on_unless_one_is_said(pipe: Pipe) -> None:
    message = MESSAGE.replace(b"Ann <ann@example.org>", b"ann@example.org, bob@example.org")
    said = pipe.instrument("--email", "e1", stdin=message)
    assert undone(said.out) == message
    assert "2 recipients" in said.err and "ann@example.org" in said.err
    assert [row[2] for row in emails(pipe.stage)] == ["ann@example.org"]
    assert pipe.instrument("--recipient", "bob@example.org", stdin=message).err == ""


def test_what_the_command_warns_of_an_answer_over_http_says_too(pipe: Pipe) -> None:
    several = MESSAGE.replace(b"To: Ann <ann@example.org>", b"Cc: a@b.example\r\nTo: a@c.example, b@c.example")
    broken = MESSAGE.replace(b"<A HREF", b"<A HREF='https://u:p@acme.com/\xc3\xbc'>y</A><A HREF")
    wide = MESSAGE.replace(b"</body>", b"x" * 100_000 + b"\r\n</body>")
    for message, told in ((several, "of 3 recipients"), (broken, "it holds credentials"), (wide, "Gmail clips")):
        (warning,) = post(pipe.stage, "?key=e1", message).headers.getall("X-Warning")
        assert told in warning
        assert told in pipe.instrument("--email", "e1", stdin=message).err
        answer = post(pipe.stage, "?key=e1", message, headers={"Accept": "application/json"}).json
        assert [each.encode("ascii", "backslashreplace").decode() for each in answer["report"]["warnings"]] == [warning]
    assert "X-Warning" not in post(pipe.stage, "?recipient=a@b.example", several).headers
    assert "X-Warning" not in post(pipe.stage).headers


def test_a_message_with_an_id_has_for_a_recipient_the_same_key_at_each_try(pipe: Pipe) -> None:
    def tried(id_: str, recipient: str, tenant: str = "Acme") -> str:
        """The key of a message that is tried by the command, by it without a database, and over HTTP."""
        message = f"{id_}\r\n".encode() + MESSAGE
        one = pipe.instrument("--recipient", recipient, stdin=message, tenant=tenant).out
        with database_away(pipe.stage):
            two = pipe.instrument("--recipient", recipient, stdin=message, tenant=tenant).out
        path = f"/{getattr(pipe.stage, tenant.lower()).id}/messages?{urlencode({'recipient': recipient})}"
        three = pipe.stage.web.post(path, message, content_type="message/rfc822")
        (key,) = keys(one)
        assert keys(two) == keys(three.body) == {three.headers["X-Email-Key"]} == {key} and tracker.is_key(key)
        return key

    made = [tried("Message-ID: <1@acme.example>", "ann@example.org")]
    assert tried("message-id:\r\n <1@acme.example>", "ann@example.org") == made[0]
    made.append(tried("Message-ID: <1@acme.example>", "bob@example.org"))
    made.append(tried("Message-ID: <1@acme.example>", "größe@example.org"))
    made.append(tried("Message-ID: <größe@acme.example>", "ann@example.org"))
    made.append(tried("Message-ID: <1@acme.example>a", "nn@example.org"))
    made.append(tried("Message-ID: <1@acme.example>", "ann@example.org", tenant="Globex"))
    assert len({*made}) == len(made)
    pipe.stage.drain()
    assert {*made} <= {row[0] for row in emails(pipe.stage)}


@pytest.mark.parametrize("id_", [b"", b"Message-ID:\r\n", b"Message-ID: <1@acme.example>\r\n"])
def test_without_an_id_or_a_recipient_each_try_has_a_key_of_its_own(id_: bytes, pipe: Pipe) -> None:
    options = () if b"<" in id_ else ("--recipient", "ann@example.org")
    one, two = (pipe.instrument(*options, stdin=id_ + MESSAGE).out for _ in range(2))
    query = "?recipient=ann@example.org" if options else ""
    three, four = (post(pipe.stage, query, id_ + MESSAGE).body for _ in range(2))
    assert len(set.union(*map(keys, (one, two, three, four)))) == len(emails(pipe.stage)) == 4
    assert pipe.instrument(*options, "--email", "e1", stdin=id_ + MESSAGE).out.count(b"/e1") == 2


@pytest.mark.parametrize("which", ["id", "mail_id", "name"])
@pytest.mark.parametrize("host", ["", "t.acme.com"])
@pytest.mark.parametrize("reachable", [True, False])
def test_a_tenant_is_found_by_each_of_its_words_and_its_host_is_in_its_links(
    reachable: bool, host: str, which: str, pipe: Pipe
) -> None:
    if host:
        pipe.stage.change(pipe.stage.acme, tracking_host=host)
    with contextlib.nullcontext() if reachable else database_away(pipe.stage):
        out = pipe.instrument("--email", "e1", tenant=getattr(pipe.stage.acme, which)).out
    base = f"https://{host}" if host else BASE
    assert f"{base}/{pipe.stage.acme.mail_id}/pixel/e1.gif".encode() in out
    link = next(CLICK.finditer(out))[0].decode()
    assert follow(pipe.stage, link, base=base, status=302).location == LINK
    pipe.stage.drain()
    assert [row[0] for row in emails(pipe.stage)] == ["e1"]


@pytest.mark.parametrize("host", ["track.example.com", "TRACK.example.com.", "t.acme.com", "t.globex.com"])
def test_links_to_own_hosts_are_left(host: str, pipe: Pipe) -> None:
    pipe.stage.change(pipe.stage.acme, tracking_host="t.acme.com")
    pipe.stage.change(pipe.stage.globex, tracking_host="t.globex.com")
    page = f'<a href="https://{host}/x">1</a><a href="https://sub.{host}/x">2</a>'.encode()
    report = pipe.report("--html", stdin=page)
    assert report["wrapped"] == [f"https://sub.{host}/x"]
    assert [left["url"] for left in report["left"]] == [f"https://{host}/x"]


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        *(
            (f"instrument Acme --pixel {shlex.quote(place)}", 1, "--pixel: expected bottom, top, none, or a mark")
            for place in ("left", "", "{{", "pixel}}", "{{ü}}", "{" + "x" * 200 + "}", "{{a\nb}}")
        ),
        ("instrument Acme --email e1 --key-placeholder {{id}}", 1, "expected one of them"),
        ("instrument Acme --report nowhere/report.json", 1, "report.json: No such file"),
        ("instrument Nobody", 1, "no tenant 'Nobody'"),
        ("instrument ''", 1, "no tenant ''"),
        ("instrument Twins", 1, "2 tenants have the name 'Twins'"),
        ("instrument Acme --subject '\udcff'", 1, "--subject: expected"),
        *(
            (f"instrument Acme --key-placeholder {shlex.quote(placeholder)}", 1, "--key-placeholder: expected")
            for placeholder in ('{{ "id" }}', "{{ 'id' }}", "a/b", "a?b", "a#b", "", "x" * 201, "{{ü}}", "a\nb")
        ),
        *(
            (f"instrument Acme --placeholder {shlex.quote(regex)}", 1, "expected a regular expression, such as")
            for regex in ("[", "a*", "", "x{9999999999}", "(?P<")
        ),
        ("campaign add Acme c", 2, "usage: "),
        ("campaign add Acme c --sent 1.5", 2, "usage: "),
        ("campaign add Nobody c --sent 1", 1, "no tenant 'Nobody'"),
        ("campaign list Nobody", 1, "no tenant 'Nobody'"),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_no_trace(words: str, status: int, told: str, pipe: Pipe) -> None:
    if "Twins" in words:
        for twin in (pipe.stage.acme, pipe.stage.globex):
            pipe.stage.change(twin, name="Twins")
    said = pipe(*shlex.split(words), stdin=MESSAGE, status=status)
    assert told in said.err and said.out == b""
    assert (emails(pipe.stage), spooled(pipe.stage)) == ([], [])


@pytest.mark.parametrize("before", [b"<p>\xe4\xf6\xfc\x80\x00</p>\r\r\n", b"\xef\xbb\xbf"])
def test_html_comes_out_as_it_went_in_whatever_its_bytes(before: bytes, pipe: Pipe) -> None:
    page = before + PAGE.encode()
    out = pipe.instrument("--html", "--email", "e1", "--subject", "S", stdin=page).out
    assert undone(out) == page
    assert (len(CLICK.findall(out)), len(PIXEL.findall(out))) == (1, 1)
    assert emails(pipe.stage) == [("e1", "S", "", "", 1)]


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_html_in_utf_16_is_refused_where_its_mark_says_so(codec: str, pipe: Pipe) -> None:
    page = ("\ufeff" if codec[-1] == "e" else "") + PAGE
    assert "--html: expected HTML in UTF-8" in pipe.instrument("--html", stdin=page.encode(codec), status=1).err


@pytest.mark.parametrize(
    "options",
    [
        ("--email", "e1"),
        ("--email", "e1", "--html", "--pixel", "top"),
        ("--key-placeholder", "{{ .Subscriber.UUID }}", "--campaign", "spring"),
        ("--key-placeholder", "*|UNIQID|*", "--pixel", "top"),
        ("--key-placeholder", "<%= id %>", "--html", "--campaign", "spring"),
    ],
    ids=" ".join,
)
def test_what_was_instrumented_already_comes_out_unchanged(options: tuple[str, ...], pipe: Pipe) -> None:
    once = pipe.instrument(*options).out
    before = emails(pipe.stage)
    again = pipe.instrument(*options, stdin=once)
    assert once != MESSAGE and again.out == once
    assert "nothing is tracked" in again.err
    assert emails(pipe.stage) == before


def test_the_report_says_what_was_done_and_what_was_not(pipe: Pipe) -> None:
    report = pipe.report("--email", "e1")
    assert (report["email"], report["wrapped"]) == ("e1", [LINK])
    assert report["left"] == [{"url": "mailto:a@b.example", "reason": "it is no absolute http or https link"}]
    assert [part.partition(" ")[2] for part in report["touched"]] == ["text/html"]
    assert (report["skipped"], report["warnings"]) == ([], [])
    page = b'<p>\xe4\xf6\xfc</p><a href="https://elsewhere.example/\xe4">x</a>'
    report = pipe.report("--html", stdin=page)
    assert report["size_before"] == len(page), "in bytes, also where they are no UTF-8"
    assert (report["wrapped"], len(report["left"])) == ([], 1)
    assert report["hidden_link"] == "not placed: not asked for"
    placed = pipe.report("--hidden-link")
    assert placed["hidden_link"].startswith("placed ") and placed["wrapped"] == [LINK], "it is no link of the sender's"
    assert "Gmail clips" in pipe.instrument("--html", stdin=b"<p>" + b"x" * 100_000).err


# == Where the database can't be reached ==


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for the database."""
    monkeypatch.setattr(tracker, "PIPE_PATIENCE", 0.05)
    monkeypatch.setattr(tracker, "BUSY_MS", 50)


@contextlib.contextmanager
def being_written(stage: Stage) -> Iterator[None]:
    """Another process of ours writes and writes."""
    with open(stage.folder / "write.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def held(stage: Stage) -> contextlib.AbstractContextManager[None]:
    return locked(Path(stage.settings.database))


UNREACHABLE = pytest.mark.parametrize("unreachable", [database_away, held, being_written])
Unreachable = Callable[[Stage], contextlib.AbstractContextManager[None]]


@UNREACHABLE
@pytest.mark.usefixtures("impatient")
def test_where_the_database_cannot_be_reached_the_email_waits_in_the_spool(
    unreachable: Unreachable, pipe: Pipe
) -> None:
    stage = pipe.stage
    before = tracker.now_ms()
    with unreachable(stage):
        said = pipe.instrument("--email", "e1", "--campaign", "spring")
    assert undone(said.out) == MESSAGE
    assert keys(said.out) == {"e1"}
    assert said.err.count("the email will be registered when") == 1
    (line,) = spooled(stage)
    assert (line["kind"], line["mail_id"], line["key"]) == ("email", stage.acme.mail_id, "e1")
    assert before <= line["t"] * 1000 <= tracker.now_ms()
    assert emails(stage) == []
    time.sleep(0.01)
    assert b"drained 0 hits, put 0 lines" in pipe("drain").out
    assert emails(stage) == [("e1", "Grüße aus Bern", "ann@example.org", "spring", 1)]
    assert stage.rows("select sent_at, created_at from emails") == [(round(line["t"] * 1000),) * 2]
    assert spooled(stage) == []
    assert b"all is well" in pipe("check").out


@UNREACHABLE
@pytest.mark.usefixtures("impatient")
def test_strict_leaves_nothing_and_lets_the_mail_system_try_again(unreachable: Unreachable, pipe: Pipe) -> None:
    with unreachable(pipe.stage):
        said = pipe.instrument("--strict", status=75)
    assert said.out == b""
    assert "try again" in said.err and "will be registered" not in said.err
    assert (spooled(pipe.stage), emails(pipe.stage)) == ([], [])
    assert pipe.instrument("--strict").out != b""
    assert len(emails(pipe.stage)) == 1


def test_root_acts_as_the_owner_only_where_it_touches_the_data(pipe: Pipe) -> None:
    """The owner may not read root's Python, which loads what reads mail, and charsets, when they are needed."""
    acting: list[str] = []
    seen: set[tuple[str, int]] = set()

    @contextlib.contextmanager
    def as_owner(settings: tracker.Settings) -> Iterator[None]:
        acting.append(settings.folder)
        yield
        acting.pop()

    def watch(name: str, original: Callable[..., Any]) -> None:
        def call(*given: Any, **more: Any) -> Any:
            seen.add((name, len(acting)))
            return original(*given, **more)

        pipe.monkeypatch.setattr(tracker, name, call)

    in_data, in_mail = ("find_tenant", "register_emails", "email_line"), ("instrument_message", "said_by_headers")
    for name in (*in_data, *in_mail):
        watch(name, getattr(tracker, name))
    pipe.monkeypatch.setattr(tracker, "acting_as_owner", as_owner)
    pipe.instrument()
    with database_away(pipe.stage):
        pipe.instrument()
    assert seen == {*((name, 1) for name in in_data), *((name, 0) for name in in_mail)}


@pytest.mark.usefixtures("impatient")
def test_a_writer_that_does_not_end_is_waited_for_once(pipe: Pipe) -> None:
    pipe.monkeypatch.setattr(tracker, "PIPE_PATIENCE", 1.0)
    with being_written(pipe.stage):
        began = time.monotonic()
        pipe.instrument()
    assert time.monotonic() - began < 2.5


@pytest.mark.parametrize("options", [(), ("--strict",)])
@pytest.mark.parametrize("tenant", ["Nobody", ""])
def test_a_tenant_that_may_be_there_is_asked_for_again_later(tenant: str, options: tuple[str, ...], pipe: Pipe) -> None:
    with database_away(pipe.stage):
        said = pipe.instrument(*options, tenant=tenant, status=75)
    assert said.out == b"" and spooled(pipe.stage) == []
    assert "tenants.json does not know the tenant" in said.err and "try again" in said.err


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_hits_before_and_after_a_registration_in_the_spool_are_its_own(place: int, at_once: bool, pipe: Pipe) -> None:
    stage = pipe.stage
    lines = [hit(stage, "e1", tracker.now_ms() - 60_000), hit(stage, "e1", tracker.now_ms() - 90_000)]
    lines.insert(place, tracker.email_line(stage.acme.mail_id, tracker.Registration("e1", "S"), tracker.now_ms()))
    for some in [lines] if at_once else [[line] for line in lines]:
        segment(stage, *some)
        stage.drain()
    assert emails(stage) == [("e1", "S", "", "", 1)]
    assert pipe.people() == (1, 1, 0)
    assert pipe.people("unregistered") == (0, 0, 0)


def test_an_unwritable_spool_leaves_the_line_to_ingest_which_counts_it_once(pipe: Pipe) -> None:
    stage = pipe.stage
    with database_away(stage):
        aside = stage.spool.rename(stage.folder / "aside")
        said = pipe.instrument("--email", "e1", "--subject", "Grüße \u2028")
        aside.rename(stage.spool)
    assert undone(said.out) == MESSAGE
    lines = [line for line in said.err.splitlines(keepends=True) if line.startswith("unspooled ")]
    assert len(lines) == 1 and lines[0].isascii()
    log = stage.folder / "log"
    log.write_text(said.err + said.err, encoding="utf-8")
    assert b"1 hits counted, 1 known already, 0 not readable" in pipe("ingest", str(log)).out
    assert b"0 hits counted, 2 known already" in pipe("ingest", str(log)).out
    assert emails(stage) == [("e1", "Grüße \u2028", "ann@example.org", "", 1)]


def test_a_broken_line_of_an_email_is_put_aside_and_holds_up_nobody(stage: Stage) -> None:
    changes: list[dict[str, Any]] = [{"key": key} for key in ("a/b", "", None)] + [{"t": at} for at in ("now", None)]
    changes += [{"mail_id": 3}, {"subject": ["S"]}, {"recipient": None}, {"campaign": 1}]
    good = tracker.email_line(stage.acme.mail_id, tracker.Registration("e1", "S", "r@b.example", "c"), NOW)
    segment(stage, *((json.dumps(json.loads(good) | change) + "\n").encode() for change in changes), good)
    assert stage.drain().rejected == len(changes)
    assert len(list((stage.spool / "rejected").iterdir())) == len(changes)
    assert emails(stage) == [("e1", "S", "r@b.example", "c", 1)]


def test_a_line_keeps_to_the_lengths_of_fields_and_one_of_nobody_is_dropped_and_counted(stage: Stage) -> None:
    registration = tracker.Registration("e1", "s" * 2000, "r" * 2000, "c" * 2000)
    segment(stage, *(tracker.email_line(whose, registration, NOW) for whose in ("nobody-at-all", stage.acme.mail_id)))
    assert stage.drain().rejected == 0
    assert emails(stage) == [("e1", "s" * 998, "r" * 320, "c" * 200, 1)]
    assert stage.rows("select tenant, reason, hits from dropped") == [(0, "unknown-tenant", 1)]


# == Templates of mailing tools ==

PLACEHOLDERS = ["{{ .Subscriber.UUID }}", "{{id}}", "*|UNIQID|*", "%%id%%", "[[id]]", "${id}", "%recipient.id%", "XXX"]


@pytest.mark.parametrize("placeholder", PLACEHOLDERS)
def test_a_placeholder_stands_raw_where_the_key_would_and_any_key_may_take_its_place(
    placeholder: str, pipe: Pipe
) -> None:
    with database_away(pipe.stage):  # a template needs none, and nothing is registered
        said = pipe.instrument("--key-placeholder", placeholder, "--html", stdin=PAGE.encode())
    assert said.out.count(placeholder.encode()) == 2 and b"campaign" not in said.out
    assert "will be registered" not in said.err
    assert (emails(pipe.stage), spooled(pipe.stage)) == ([], [])
    for key in ("a", "3f1c-9", "k" * 200, "reader@example.org"):
        merged = said.out.replace(placeholder.encode(), key.encode())
        assert undone(merged) == PAGE.encode() and keys(merged) == {key}
        (link,) = CLICK.finditer(merged)
        assert follow(pipe.stage, link[0].decode(), status=302).location == LINK
        assert follow(pipe.stage, PIXEL.findall(merged)[0].decode()).headers["X-Tracker"] == "recorded"
    pipe.stage.drain()
    assert len(emails(pipe.stage)) == 4
    bare = b"<a href=https://elsewhere.example/>x</a>"
    quoted = pipe.instrument("--key-placeholder", placeholder, "--html", "--pixel", "none", stdin=bare).out
    assert quoted.startswith(b'<a href="https://track') == (" " in placeholder)


def test_a_url_with_a_placeholder_that_is_named_is_left(pipe: Pipe) -> None:
    urls = ["https://acme.com/?u=__USER__", "https://acme.com/--name--", "https://acme.com/__init__.py"]
    page = "".join(f'<a href="{url}">x</a>' for url in urls).encode()
    report = pipe.report("--html", "--placeholder", "__[A-Z]+__|--[a-z]+--", stdin=page)
    assert ([left["url"] for left in report["left"]], report["wrapped"]) == (urls[:2], urls[2:])
    assert {"placeholder" in left["reason"] for left in report["left"]} == {True}
    assert pipe.report("--html", stdin=page)["wrapped"] == urls


# What listmonk takes for a link that it is to wrap: any URL up to its mark, and in older versions anything in a line.
LISTMONK = [r"https?://[-\w.~!#$&'()*+,/:;=?@\[\]]*@TrackLink", "https?://.+?@TrackLink"]


@pytest.mark.parametrize("rule", LISTMONK, ids=["new", "old"])
def test_listmonk_finds_nothing_to_wrap_among_our_links_and_its_own_links_are_left_to_it(rule: str, pipe: Pipe) -> None:
    urls = [
        "https://acme.com/sale",
        "https://acme.com/?a=1&amp;b=[1,5]#c",
        "https://acme.com/@ann",
        "http://acme.com/ü",
    ]
    others = ["{{ UnsubscribeURL }}", "https://acme.com/own@TrackLink", "https://acme.com/?e={{ .Subscriber.Email }}"]
    body = "".join(f'<p><a href="{url}">x</a>' for url in urls) + "".join(f'\n<a href="{url}">y</a>' for url in others)
    options = ("--html", "--key-placeholder", "{{ .Subscriber.UUID }}", "--campaign", "Spring")
    out = pipe.instrument(*options, stdin=body.encode()).out.decode()
    assert re.findall(r'<a href="(.*?)">y</a>', out) == others
    assert re.findall(rule, out) == [others[1]]
    links = [match[0].decode() for match in CLICK.finditer(out.replace("{{ .Subscriber.UUID }}", "5f3c").encode())]
    assert [follow(pipe.stage, link, status=302).location for link in links] == [
        html.unescape(url).replace("ü", "%C3%BC") for url in urls
    ]


def test_the_campaign_stands_in_each_url_of_a_template(pipe: Pipe) -> None:
    out = pipe.instrument("--key-placeholder", "{{id}}", "--campaign", "a b&c=ü/%").out.replace(b"{{id}}", b"reader1")
    urls = [PIXEL.findall(out)[0].decode(), *(match[0].decode() for match in CLICK.finditer(out))]
    assert [url.partition("?")[2] for url in urls] == ["campaign=a%20b%26c%3D%C3%BC%2F%25"] * 2
    for url in urls:
        follow(pipe.stage, url)
    pipe.stage.drain()
    assert emails(pipe.stage) == [("reader1?campaign=a b&c=ü/%", "", "", "a b&c=ü/%", 0)]
    assert pipe.stage.rows("select open_person, click_person from email_counts") == [(1, 1)]


# == Campaigns: which one a hit belongs to ==


def opens(stage: Stage, key: str, query: str = "campaign=spring") -> None:
    """A person opens a mail whose pixel has this query."""
    stage.web.get(f"/{stage.acme.mail_id}/pixel/{key}.gif?{query}", headers={"User-Agent": CHROME})


def clicks(stage: Stage, key: str, query: str, status: int = 302) -> Any:
    """A person follows a plain link with this query."""
    return stage.web.get(f"/{stage.acme.mail_id}/click/{key}?{query}", headers={"User-Agent": CHROME}, status=status)


@pytest.mark.parametrize(
    ("query", "campaign"),
    [
        ("campaign=spring", "spring"),
        ("utm=x&campaign=spring&campaign=autumn", "spring"),
        ("campaign=a+b%20c%26d%3F%C3%BC", "a b c&d?ü"),
        ("campaign=%20sp%07ring%0d%0a%00", "spring"),
        ("campaign=" + "x" * 300, "x" * 200),
        ("campaign=%FF", "\ufffd"),
        *((nothing, "") for nothing in ("", "campaign", "campaign=", "campaign=%20", "xcampaign=spring")),
    ],
)
def test_a_pixel_says_which_campaign_its_open_belongs_to(query: str, campaign: str, stage: Stage) -> None:
    opens(stage, "e1", query)
    assert stage.drain().hits == 1
    key = tracker.campaign_key("e1", campaign) if campaign else "e1"
    assert emails(stage) == [(key, "", "", campaign, 0)] and len(key) <= 200


SHOP = "https://acme.com/"


@pytest.mark.parametrize(
    ("query", "campaign", "url"),
    [
        ("url=https%3A%2F%2Facme.com%2F%3Fa%3D1&campaign=spring", "spring", f"{SHOP}?a=1"),
        ("campaign=spring&url=https%3A%2F%2Facme.com%2F", "spring", SHOP),
        (f"campaign=spring&url={SHOP}?a=1&campaign=autumn", "spring", f"{SHOP}?a=1&campaign=autumn"),
        (f"url={SHOP}?a=1&campaign=autumn", "", f"{SHOP}?a=1&campaign=autumn"),
        ("url=https%3A%2F%2Facme.com%2F%3Fx%26campaign%3Dautumn", "", f"{SHOP}?x&campaign=autumn"),
    ],
)
def test_a_link_says_which_campaign_its_click_belongs_to(query: str, campaign: str, url: str, stage: Stage) -> None:
    assert clicks(stage, "e1", query).location == url
    path = tracker.click_path(stage.app.secrets[0], stage.acme.mail_id, "e2", url)
    follow(stage, f"{BASE}{path}?campaign={campaign}", status=302)
    stage.drain()
    assert [row[3] for row in emails(stage)] == [campaign] * 2
    assert stage.rows("select url from urls") == [(url,)]


def test_one_subscriber_has_an_email_in_each_campaign_also_with_the_longest_keys(stage: Stage) -> None:
    campaigns = ("x" * 200, "x" * 199 + "y")
    for key in ("k" * 199 + "a", "k" * 199 + "b"):
        for campaign in (*campaigns, campaigns[0]):
            opens(stage, key, f"campaign={campaign}")
    opens(stage, "sub1")
    clicks(stage, "sub1", f"campaign=spring&url={SHOP}")
    opens(stage, "sub1", "")
    stage.spread(70)
    stage.drain()
    rows = stage.rows("select key, open_person, click_person from emails join email_counts on email = id order by id")
    assert [each[1:] for each in rows] == [(2, 0), (1, 0), (2, 0), (1, 0), (1, 1), (1, 0)]
    assert [each[0] for each in rows[4:]] == ["sub1?campaign=spring", "sub1"]
    assert [(len(row[0]), row[3]) for row in emails(stage)[:4]] == [(200, each) for each in campaigns * 2]


def test_a_registered_key_keeps_to_what_was_registered(stage: Stage) -> None:
    stage.web.post_json(f"/{stage.acme.id}/emails", {"key": "e1", "campaign": " winter "})
    opens(stage, "e1", "campaign=spring")
    clicks(stage, "e1", f"campaign=autumn&url={SHOP}")
    opens(stage, "e1", "")
    stage.spread(70)
    stage.drain()
    assert emails(stage) == [("e1", "", "", "winter", 1)]
    assert stage.rows("select open_person, click_person from email_counts") == [(2, 1)]


# == Campaigns: how many were sent ==


def declare(pipe: Pipe, name: str, number: int, *options: str) -> str:
    said = pipe("campaign", "add", "Acme", name, "--sent", str(number), *options).out.decode()
    assert b"all is well" in pipe("check").out
    return said


@pytest.mark.parametrize("when", ["before", "between", "after", "never"])
def test_a_campaign_may_be_declared_before_and_after_its_hits(when: str, pipe: Pipe) -> None:
    stage = pipe.stage
    if when == "before":
        assert declare(pipe, "spring", 1000) == "spring: 1,000 sent\n"
    for key in ("sub1", "sub2", "sub1"):
        opens(stage, key)
    clicks(stage, "sub1", f"campaign=spring&url={SHOP}")
    opens(stage, "sub1", "campaign=autumn")
    if when == "between":
        stage.drain()
        declare(pipe, "spring", 1000)
    opens(stage, "sub1")
    opens(stage, "sub3")
    stage.drain()
    pipe("campaign", "add", "Globex", "autumn", "--sent", "7")  # nothing of Acme's
    if when == "after":
        declare(pipe, "spring", 1000)
    expected = ((0, 0, 0), (4, 4, 1)) if when == "never" else ((1000, 3, 1), (1, 1, 0))
    assert (pipe.people(), pipe.people("unregistered")) == expected


def test_a_campaign_may_be_declared_again_with_another_number_and_time_also_over_http(pipe: Pipe) -> None:
    stage = pipe.stage
    declare(pipe, "spring", 1000)
    opens(stage, "sub1")
    assert pipe.people() == (1000, 1, 0)
    assert declare(pipe, "spring", 0) == "spring: 0 sent, in place of what was said before\n"
    opens(stage, "sub2")
    assert pipe.people() == (0, 2, 0)
    declare(pipe, "spring", 500, "--at", "2025-03-01T09:00:00+01:00")
    assert (pipe.people(), pipe.people(range_="all"), pipe.people("unregistered")) == (
        (0, 0, 0),
        (500, 2, 0),
        (0, 0, 0),
    )
    path = f"/{stage.acme.id}/campaigns"
    answer = stage.web.post_json(path, {"campaign": " spring ", "sent": 600}, status=200)
    assert answer.json == {"campaign": "spring", "sent": 600}
    assert stage.rows("select sent, sent_at from campaign_sends") == [(600, 1_740_816_000_000)], "where it was"
    now = tracker.iso_time(tracker.now_ms())
    stage.web.post_json(path, {"campaign": "spring", "sent": 700, "sent_at": now}, status=200)
    stage.web.post_json(path, {"campaign": "autumn", "sent": 9}, status=201)
    pipe.instrument("--email", "e1", "--campaign", "spring")  # counts beside those that were declared
    opens(stage, "e1")
    assert pipe.people() == (710, 3, 0)
    assert b"spring: 701 sent, opened by people 3, clicked by people 0\n" in pipe("campaign", "list", "Acme").out
    pipe("tenant", "remove", "Acme", "--yes")
    assert stage.rows("select * from campaign_sends") == []


DECLARED: dict[str, Any] = {"campaign": "c", "sent": 1, "sent_at": "2026-11-24T09:00:00Z"}


@pytest.mark.parametrize(
    ("field", "told", "values"),
    [
        ("campaign", "campaign: expected a name of 1 to 200 characters", ["", " "]),
        ("campaign", "campaign: expected", ["x" * 201, "a\nb"]),
        ("sent", "sent: expected a whole number from 0 to 1,000,000,000", [-1, 10**9 + 1, 10**30]),
        ("sent_at", "at: expected a time with its zone", ["yesterday", "2026-11-30T09:00:00"]),
        ("sent_at", "at: expected", [" ", "1970-01-01T00:00:00Z", "9999-12-31T23:59:59-12:00"]),
        ("sent_at", "at: expected", ["0001-01-01T00:00:00+14:00"]),
    ],
)
def test_a_declaration_that_cannot_be_is_refused_with_what_was_expected(
    field: str, told: str, values: list[Any], pipe: Pipe
) -> None:
    for value in values:
        declared = {**DECLARED, field: value}
        words = (declared["campaign"], "--sent", str(declared["sent"]), "--at", declared["sent_at"])
        said = pipe("campaign", "add", "Acme", *words, status=1)
        assert told in said.err and said.out == b""
        answer = pipe.stage.web.post_json(f"/{pipe.stage.acme.id}/campaigns", declared, status=400)
        assert told in answer.json["error"]
    assert pipe.stage.rows("select * from campaign_sends") == []


def test_emails_of_a_declared_campaign_have_room_up_to_twice_the_declared_number(pipe: Pipe) -> None:
    stage = pipe.stage
    pipe.monkeypatch.setitem(tracker.A_DAY, "unregistered", 4)  # of which one network has half
    counts = "select campaign, count(*) from emails group by 1 order by 1"
    declare(pipe, "spring", 5)
    for n in range(4):
        opens(stage, f"sub{n}")
        opens(stage, f"other{n}", "campaign=autumn")
    stage.drain()
    for number in (5, 6):
        if number > 5:
            declare(pipe, "spring", number)
        for n in range(8):
            opens(stage, f"sub{n}")
        stage.drain()
        assert stage.rows(counts) == [("autumn", 2), ("spring", number + 1)]  # half, and half of the first tenth
    assert stage.rows("select reason, sum(hits) from dropped group by 1") == [("unregistered-limit", 5)]


def test_where_more_keys_answer_than_were_told_of_there_is_no_rate(pipe: Pipe) -> None:
    """Whoever holds one mail can make up keys."""
    stage = pipe.stage
    declare(pipe, "spring", 2)
    for n in range(3):
        opens(stage, f"sub{n}")
        stage.drain()
        clicks(stage, f"sub{n}", f"campaign=spring&url={SHOP}")
        stage.drain()
        page = stage.web.get(f"/{stage.acme.id}/campaigns/spring").text
        table = stage.web.get(f"/{stage.acme.id}/dashboard?range=all").text
        sent = stage.web.get(f"/{stage.acme.id}/stats.json?range=all").json["sent"]
        told, listed = (pipe(*words, "Acme").out.decode() for words in (("stats",), ("campaign", "list")))
        share = [(n + 1) / 2] * 2 if n < 2 else None
        assert (sent["open_rate"], sent["click_rate"], sent["opened"]["person"]) == (share, share, n + 1)
        said = [text.count("3 by people, of 2 told of") for text in (page, table, told)]
        assert said == [0 if share else 2] * 3
        assert ("3, of 2 told of" in table) == ("more keys answered" in listed) == (share is None)
        assert not re.search("150|[^0-9]300.?%", page + told)


def test_an_email_of_a_campaign_can_be_removed_by_its_key(pipe: Pipe) -> None:
    stage = pipe.stage
    declare(pipe, "spring", 10)
    for query in ("campaign=spring", "campaign=autumn"):
        opens(stage, "abc", query)
    path = f"/{stage.acme.id}/emails/abc%3Fcampaign%3Dspring"
    assert stage.web.delete(path).json == {"deleted": "abc?campaign=spring"}
    assert [row[0] for row in emails(stage)] == ["abc?campaign=autumn"]
    assert (pipe.people(), pipe.people("unregistered")) == ((10, 0, 0), (1, 1, 0))
    stage.web.delete(path, status=404)
    opens(stage, "abc")  # in the campaign of spring: what was deleted does not come back
    assert (pipe.people(), stage.rows("select reason, hits from dropped")) == ((10, 0, 0), [("deleted", 1)])


def test_the_numbers_are_the_same_in_whatever_order_things_arrive(staged: Callable[..., Stage]) -> None:
    def arrive(order: random.Random | None) -> dict[str, list[str]]:
        """What the tables say in the end, whatever the order of inserts; that roll-ups agree with it is checked."""
        stage, pick = staged(), random.Random(4)  # the same hits in each run
        home, mail_id = f"/{stage.acme.id}", stage.acme.mail_id
        steps: list[list[bytes] | dict[str, Any]] = []  # a segment, or a declaration
        for start in range(0, 75, 15):
            lines = [hit(stage, f"e{n}", NOW + n * 700_000) for n in range(3)]
            for n in range(start, start + 15):
                key, campaign = f"sub{pick.randrange(6)}", pick.choice(["spring", "autumn", "none"])
                path = pick.choice(["pixel/{}.gif?campaign={}", "click/{}?campaign={}&url=https%3A%2F%2Facme.com%2F"])
                answer, agent = "pixel" if "pixel" in path else "302", pick.choice([CHROME, "python-requests/2.32.4"])
                uri = f"/{mail_id}/{path.format(key, campaign)}"
                lines.append(hit(stage, key, NOW + n * 400_000, uri=uri, answer=answer, ua=agent))
            steps.append(lines)
        steps += [{**DECLARED, "campaign": name, "sent": number} for name, number in (("spring", 50), ("autumn", 4))]
        for key in ("e0", "e1"):
            steps.append([tracker.email_line(mail_id, tracker.Registration(key, "S", "r", "spring"), NOW)])
        if order is not None:
            order.shuffle(steps)
        for step in steps:
            if isinstance(step, dict):
                stage.web.post_json(f"{home}/campaigns", step)
            else:
                segment(stage, *step)
                stage.drain()
            assert stage.check() == []
        tables = ("emails", "events", "links", "campaigns", "clients")
        paths = {name: f"{home}/{name}.json{'?range=all' * (name == 'clients')}" for name in tables}
        told = {name: stage.web.get(path).json["rows"] for name, path in paths.items()}
        told["dropped"] = stage.rows("select * from dropped")
        return {name: sorted(map(str, rows)) for name, rows in told.items()}

    expected = arrive(None)
    assert len(expected["emails"]) > 15 and all(expected[name] for name in expected if name != "dropped")
    order = random.Random(1)
    for _ in range(6):
        assert arrive(order) == expected


# == Over HTTP ==


def test_each_email_of_an_array_gets_its_own_html(stage: Stage) -> None:
    values = [{"key": "e1", "html": PAGE}, {"key": "e2", "links": [LINK]}, {"key": "e3", "html": ""}]
    first, second, third = stage.web.post_json(f"/{stage.acme.id}/emails", values, status=201).json
    assert set(first) == set(third) == {"key", "pixel_url", "links", "html", "preferences", "report"}
    assert set(second) == {"key", "pixel_url", "links", "preferences"}
    out = first["html"].encode()
    assert undone(out) == PAGE.encode() and keys(out) == {"e1"}
    assert PIXEL.findall(out)[0].decode() == first["pixel_url"]
    assert (first["report"]["wrapped"], first["report"]["size_after"]) == ([LINK], len(out))
    assert (
        third["html"]
        == f'<img src="{third["pixel_url"]}" width="1" height="1" alt="" style="display:block;float:left">'
    )
    assert [row[0] for row in emails(stage)] == ["e1", "e2", "e3"]


def test_html_has_no_more_links_than_one_request_may_ask_for_and_half_a_character_breaks_nothing(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"/{stage.acme.id}/emails"
    half = rb'{"html": "\ud800<a href=\"https://elsewhere.example/\ud800\">x</a>"}'
    assert stage.web.post(path, half, status="*").status_int in (201, 400)
    monkeypatch.setattr(tracker, "MAX_LINKS", 3)
    stage.web.post_json(path, [{"html": PAGE}, {"html": PAGE, "links": [LINK]}], status=201)
    before = len(emails(stage))
    answer = stage.web.post_json(path, [{"html": PAGE * 2}, {"html": PAGE * 2}], status=400)
    assert answer.json == {"error": "[1].links: expected at most 3 in one request"}
    assert len(emails(stage)) == before


def test_an_answer_says_its_type_its_key_and_whether_it_was_changed_or_is_json_with_a_report(stage: Stage) -> None:
    once = post(stage, "?key=e1&links=yes&force=no", content_type='Message/RFC822; charset="utf-8"')
    assert (once.headers["Content-Type"], once.headers["X-Tracker"]) == ("message/rfc822", "instrumented")
    assert once.headers["X-Email-Key"] == "e1"
    again = post(stage, "?key=e1", once.body)
    assert (again.body, again.headers["X-Tracker"]) == (once.body, "unchanged")
    for accept in ("application/json", "text/html, application/json;q=0.9"):
        answer = post(stage, "?key=e1", headers={"Accept": accept}).json
        assert set(answer) == {"key", "message_base64", "preferences", "report"} and answer["key"] == "e1"
        assert undone(base64.b64decode(answer["message_base64"])) == MESSAGE
        assert answer["report"]["wrapped"] == [LINK]
        left = post(stage, "", PLAIN, headers={"Accept": accept}).json["report"]
        assert (left["wrapped"], left["touched"]) == ([], []) and left["pixel"].startswith("not placed")
    other = post(stage, "?key=e2", once.body)
    (pixel,) = PIXEL.findall(once.body)
    assert PIXEL.findall(other.body) == [pixel, pixel.replace(b"e1", b"e2")], "it is another email"
    assert [row[0] for row in emails(stage)] == ["e1", "e2"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("pixel=left", "pixel: expected bottom, top, none, or a mark in the HTML"),
        ("links=false", "links: expected one of yes, no"),
        ("force=1", "force: expected one of yes, no"),
        ("hidden_link=", "hidden_link: expected one of"),
        ("sent_at=soon", "sent_at: expected"),
        ("delivered_at=2026", "delivered_at: expected"),
        ("Force=yes", "Force: unknown field; expected some of key"),
        ("html=x", "html: unknown field"),
        ([], "expected an object"),
        ({"sent": 1}, "campaign: expected a name"),
        ({"campaign": 5, "sent": 1}, "campaign: expected text"),
        ({"campaign": "\ud800", "sent": 1}, "campaign: expected"),
        *(({"campaign": "c", "sent": sent}, "sent: expected a whole number") for sent in (None, "1", True, 1.5)),
        ({**DECLARED, "sent_at": 5}, "sent_at: expected text"),
        ({**DECLARED, "at": "now"}, "at: unknown field; expected some of campaign, sent, sent_at"),
    ],
)
def test_a_bad_word_of_the_query_or_field_of_a_campaign_is_refused_by_its_name(
    given: Any, told: str, stage: Stage
) -> None:
    path = f"/{stage.acme.id}/campaigns"
    is_query = isinstance(given, str)
    answer = post(stage, f"?{given}", status=400) if is_query else stage.web.post_json(path, given, status=400)
    assert told in answer.json["error"]
    assert emails(stage) == [] and stage.rows("select * from campaign_sends") == []


def test_a_message_is_of_its_type_and_has_something_in_it_and_at_most_10_megabytes(stage: Stage) -> None:
    for kind in ("text/html", "application/json", "text/plain", "message/rfc8222"):
        assert "Content-Type: expected message/rfc822" in post(stage, status=415, content_type=kind).json["error"]
    whole = MESSAGE + b"x" * ((10 << 20) - len(MESSAGE))
    assert "expected a message" in post(stage, "", b"", 400).json["error"]
    assert post(stage, "", whole + b"x", 413).json == {"error": "expected a body of at most 10 MB"}
    assert emails(stage) == []
    assert undone(post(stage, message=whole).body) == whole


# == The hidden link ==


@pytest.mark.parametrize("place", ["bottom", "top", "none"])
@pytest.mark.parametrize("encoding", ["8bit", "quoted-printable", "base64"])
def test_one_hidden_link_stands_first_in_the_body_of_a_message(encoding: str, place: str, pipe: Pipe) -> None:
    message = EmailMessage(policy=SMTP)
    message.set_content(PAGE, subtype="html", cte=encoding)
    options = ("--hidden-link", "--pixel", place, "--email", "e1")
    out = pipe.instrument(*options, stdin=bytes(message)).out
    page = email.message_from_bytes(out, policy=SMTP).get_content().encode()
    assert len(HIDDEN.findall(page)) == 1 and len(PIXEL.findall(page)) == int(place != "none")
    assert re.search(rb"<body class=x>" + HIDDEN.pattern, page), "some gateways follow the first link only"
    assert undone(HIDDEN.sub(b"", page)).replace(b"\r", b"") == PAGE.replace("\r", "").encode()
    assert all(len(line) <= 998 for line in out.split(b"\r\n"))
    assert pipe.instrument(*options, stdin=out).out == out, "a second time places no second one"
    assert pipe.instrument(*options[1:], stdin=out).out == out, "nor is it wrapped as a link of its own"


@pytest.mark.parametrize(
    ("before", "behind"),
    [
        ("<html><head></head><body>", "<a href='https://acme.com/'>x</a></body></html>"),
        ("<title>x</title></head>", "<a href='https://acme.com/'>x</a>"),
        ("<table><tr><td>Hi ", "<a href='https://acme.com/'>x</a><a name=y>"),
        ("<!--[if mso]><a href='https://acme.com/'>x</a><![endif]-->", "<a name=y>"),
        ("<p>Hello</p>", ""),
    ],
    ids=["body", "no body but a head", "a piece of HTML", "not in a comment", "no link"],
)
def test_the_hidden_link_comes_before_every_other(before: str, behind: str, pipe: Pipe) -> None:
    page = (before + behind).encode()
    assert HIDDEN.findall(pipe.instrument("--html", stdin=page).out) == []
    out = pipe.instrument("--html", "--hidden-link", "--pixel", "none", "--no-links", stdin=page).out
    assert HIDDEN.sub(b"|", out).decode() == f"{before}|{behind}"


@pytest.mark.parametrize("options", [("--email", "e1"), ("--key-placeholder", "{{ id }}", "--campaign", "spring")])
def test_whoever_follows_the_hidden_link_gets_an_empty_page_and_is_a_scanner_also_a_moment_before(
    options: tuple[str, ...], pipe: Pipe
) -> None:
    out = pipe.instrument("--hidden-link", *options).out.replace(b"{{ id }}", b"e1")
    link = next(match[0].decode() for match in CLICK.finditer(HIDDEN.sub(b"", out)))
    follow(pipe.stage, link, status=302)
    pipe.stage.drain()
    counts = "select click_person, click_machine from email_counts"
    assert pipe.stage.rows(counts) == [(1, 0)]
    answer = follow(pipe.stage, html.unescape(HIDDEN.findall(out)[0].decode()))
    assert (answer.status_int, re.sub("<[^>]*>", "", answer.text).strip()) == (200, "")
    assert "Location" not in answer.headers
    pipe.stage.drain()
    key = "e1?campaign=spring" if "spring" in options else "e1"
    rows = pipe.stage.rows("select key, verdict, reason from event_details order by reason")
    assert rows == [(key, "scanner", "hidden-link"), (key, "scanner", "with-hidden-link")]
    assert pipe.stage.rows(counts) == [(0, 2)]


# == What the sender says of an email ==


def test_a_message_over_http_may_say_when_it_was_sent_and_delivered_and_is_judged_by_that(stage: Stage) -> None:
    post(stage, "?key=e1&hidden_link=yes&sent_at=2026-11-30T09:00:00Z&delivered_at=2026-11-30T10:00:02%2B01:00")
    sent_at = tracker.read_iso_time("2026-11-30T09:00:00Z", "")
    known = stage.rows("select key, sent_at, delivered_at, time_said, links from emails")
    assert known == [("e1", sent_at, sent_at + 2_000, 1, 1)]
    out = post(stage, f"?key=e2&delivered_at={tracker.iso_time(tracker.now_ms())}").body
    follow(stage, next(match[0].decode() for match in CLICK.finditer(out)), status=302)
    stage.drain()
    assert stage.rows("select verdict, reason from event_details") == [("scanner", "too-soon")]
