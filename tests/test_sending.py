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
import quopri
import random
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from conftest import BASE, CHROME, NOW, ROOT, Stage, hit, segment, without_settings

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
PIXEL = re.compile(rb'<img src="([^"]+)" width="1" height="1" alt="">')
CLICK = re.compile(
    rb"""https?://[^/"']+/[A-Za-z0-9_-]+/click/([^/"']+)/[A-Za-z0-9_-]{16}/([A-Za-z0-9_-]+)(\?campaign=[^"']+)?"""
)


@dataclass(frozen=True, slots=True)
class Out:
    """How a command ended."""

    status: int
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
            stdout = io.TextIOWrapper(out, encoding="utf-8", newline="")
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
            patch.setattr(sys, "stdout", stdout)
            try:
                ended = tracker.main(["--env", os.devnull, *words])
            except SystemExit as stop:  # argparse leaves this way
                ended = stop.code if isinstance(stop.code, int) else -1
            stdout.flush()
            said = Out(ended, out.getvalue(), self.capsys.readouterr().err)
        assert said.status == status, said
        assert "Traceback" not in said.err
        self.stage.refresh()
        return said

    def instrument(self, *options: str, stdin: bytes = MESSAGE, status: int = 0, tenant: str = "Acme") -> Out:
        """Instrument something for Acme."""
        return self("instrument", tenant, *options, stdin=stdin, status=status)

    def refused(self, *options: str, stdin: bytes = MESSAGE, status: int = 1, tenant: str = "Acme") -> str:
        """What is said of a call that is refused and leaves no trace."""
        before = emails(self.stage)
        said = self.instrument(*options, stdin=stdin, status=status, tenant=tenant)
        assert said.out == b""
        assert (emails(self.stage), spooled(self.stage)) == (before, [])
        return said.err

    def report(self, *options: str, stdin: bytes = MESSAGE) -> Any:
        """The report on what is instrumented."""
        path = self.stage.folder / "report.json"
        self.instrument(*options, "--report", str(path), stdin=stdin)
        return json.loads(path.read_text(encoding="utf-8"))

    def stats(self) -> Any:
        """Acme's numbers, the same from the command and over HTTP."""
        self.stage.drain()
        said = json.loads(self("stats", "Acme", "--json").out)
        told = self.stage.web.get(f"/{self.stage.acme.id}/stats.json").json
        assert said["sent"] == told["sent"] and said["unregistered"] == told["unregistered"]
        return told


@pytest.fixture
def pipe(stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Pipe:
    without_settings(monkeypatch)
    monkeypatch.setenv("DATABASE_URL", f"sqlite:{stage.settings.database}")
    monkeypatch.setenv("BASE_URL", BASE)
    return Pipe(stage, monkeypatch, capsys)


def emails(stage: Stage) -> list[tuple[Any, ...]]:
    return stage.rows("select key, subject, recipient, campaign, registered from emails order by id")


def spooled(stage: Stage) -> list[dict[str, Any]]:
    """The lines of the spool."""
    return [json.loads(line) for path in sorted(stage.spool.glob("*.jsonl")) for line in path.read_bytes().splitlines()]


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


@contextlib.contextmanager
def away(path: Path) -> Iterator[None]:
    """Something is not where it belongs."""
    aside = path.with_name(f"{path.name}-aside")
    path.rename(aside)
    try:
        yield
    finally:
        aside.rename(path)


def database_away(stage: Stage) -> contextlib.AbstractContextManager[None]:
    return away(Path(stage.settings.database))


# -- instrument: what comes out


def test_a_message_comes_out_as_it_went_in_but_for_the_link_and_the_pixel(pipe: Pipe) -> None:
    said = pipe.instrument()
    assert undone(said.out) == MESSAGE
    assert (len(CLICK.findall(said.out)), len(PIXEL.findall(said.out))) == (1, 1)
    assert b'alt="">' + b"</body></html>\r\n" in said.out
    assert said.err == ""


def test_the_links_and_the_pixel_that_come_out_work_and_count(pipe: Pipe) -> None:
    out = pipe.instrument("--email", "e1").out
    pixel, link = PIXEL.findall(out)[0].decode(), [match[0].decode() for match in CLICK.finditer(out)]
    assert follow(pipe.stage, pixel).headers["X-Tracker"] == "recorded"
    assert [follow(pipe.stage, url, status=302).location for url in link] == [LINK]
    sent = pipe.stats()["sent"]
    assert (sent["emails"], sent["opened"]["person"], sent["clicked"]["person"]) == (1, 1, 1)
    assert pipe.stage.check() == []


def test_it_is_a_filter_between_real_pipes_that_needs_no_server(pipe: Pipe) -> None:
    environ = {name: os.environ[name] for name in ("PATH", "DATABASE_URL", "BASE_URL")}
    script = 'cat | "$0" "$1" --env /dev/null instrument Acme --email e1 | cat'
    command = ["sh", "-c", script, sys.executable, str(ROOT / "tracker.py")]
    done = subprocess.run(command, env=environ, input=MESSAGE, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert undone(done.stdout) == MESSAGE
    assert keys(done.stdout) == {"e1"}
    assert emails(pipe.stage) == [("e1", "Grüße aus Bern", "ann@example.org", "", 1)]


def test_a_message_is_registered_with_subject_and_recipient_of_its_headers(pipe: Pipe) -> None:
    before = tracker.now_ms()
    out = pipe.instrument().out
    (row,) = emails(pipe.stage)
    assert row[1:] == ("Grüße aus Bern", "ann@example.org", "", 1)
    assert keys(out) == {row[0]}
    assert re.fullmatch("[A-Za-z0-9_-]{22}", row[0])
    assert pipe.stage.rows("select sent_at between ? and ? from emails", before, tracker.now_ms()) == [(1,)]
    assert pipe.stage.check() == []


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


@pytest.mark.parametrize("sign", ["(", ":", " :", "<", '"', ",", "\\", "[", "=?utf-8?q?"])
def test_a_header_of_nothing_but_signs_keeps_no_message_from_being_instrumented(sign: str, pipe: Pipe) -> None:
    message = f"To: {sign * (50_000 // len(sign))}\r\n".encode() + MESSAGE.replace(b"To: ", b"X-To: ")
    assert undone(pipe.instrument("--email", "e1", stdin=message).out) == message
    assert [row[:2] for row in emails(pipe.stage)] == [("e1", "Grüße aus Bern")]
    assert post(pipe.stage, "?key=e2", message).headers["X-Tracker"] == "instrumented"


def test_what_the_options_say_goes_before_the_headers(pipe: Pipe) -> None:
    out = pipe.instrument(
        *("--email", "e+1@x", "--subject", "Mine", "--recipient", "bob@example.org", "--campaign", "spring")
    ).out
    assert emails(pipe.stage) == [("e+1@x", "Mine", "bob@example.org", "spring", 1)]
    assert keys(out) == {"e+1@x"}
    assert b"campaign" not in out


def test_several_recipients_are_remarked_on_unless_one_is_said(pipe: Pipe) -> None:
    message = MESSAGE.replace(b"Ann <ann@example.org>", b"ann@example.org, bob@example.org")
    said = pipe.instrument("--email", "e1", stdin=message)
    assert undone(said.out) == message
    assert "2 recipients" in said.err and "ann@example.org" in said.err
    assert [row[2] for row in emails(pipe.stage)] == ["ann@example.org"]
    assert pipe.instrument("--recipient", "bob@example.org", stdin=message).err == ""


@pytest.mark.parametrize("which", ["id", "mail_id", "name"])
def test_a_tenant_is_found_by_each_of_its_words(which: str, pipe: Pipe) -> None:
    out = pipe.instrument("--email", "e1", tenant=getattr(pipe.stage.acme, which)).out
    assert f"{BASE}/{pipe.stage.acme.mail_id}/pixel/e1.gif".encode() in out


def test_the_tracking_host_of_the_tenant_is_in_its_links(pipe: Pipe) -> None:
    pipe.stage.change(pipe.stage.acme, tracking_host="t.acme.com")
    out = pipe.instrument("--email", "e1").out
    assert f"https://t.acme.com/{pipe.stage.acme.mail_id}/pixel/e1.gif".encode() in out
    link = next(CLICK.finditer(out))[0].decode()
    assert follow(pipe.stage, link, base="https://t.acme.com", status=302).location == LINK


@pytest.mark.parametrize("host", ["track.example.com", "TRACK.example.com.", "t.acme.com", "t.globex.com"])
def test_links_to_own_hosts_are_left(host: str, pipe: Pipe) -> None:
    pipe.stage.change(pipe.stage.acme, tracking_host="t.acme.com")
    pipe.stage.change(pipe.stage.globex, tracking_host="t.globex.com")
    page = f'<a href="https://{host}/x">1</a><a href="https://sub.{host}/x">2</a>'.encode()
    report = pipe.report("--html", stdin=page)
    assert report["wrapped"] == [f"https://sub.{host}/x"]
    assert [left["url"] for left in report["left"]] == [f"https://{host}/x"]


def test_without_a_public_address_it_refuses_with_the_reason_and_local_helps(pipe: Pipe) -> None:
    pipe.monkeypatch.delenv("BASE_URL")
    assert "BASE_URL" in pipe.refused()
    pipe.monkeypatch.setenv("PORT", "3210")
    out = pipe.instrument("--local", "--email", "e1").out
    assert f"http://localhost:3210/{pipe.stage.acme.mail_id}/pixel/e1.gif".encode() in out
    assert undone(out) == MESSAGE


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--email", "a/b"), "--email: expected 1 to 200 of the characters"),
        (("--email", ".."), "--email: expected"),
        (("--email", "k" * 201), "--email: expected"),
        (("--email", ""), "--email: expected"),
        (("--email", "é"), "--email: expected"),
        (("--recipient", "a\nb"), "--recipient: expected at most 320 characters in one line"),
        (("--recipient", "x" * 321), "--recipient: expected at most 320"),
        (("--subject", "x" * 999), "--subject: expected at most 998"),
        (("--subject", "\udcff"), "--subject: expected"),
        (("--campaign", "x" * 201), "--campaign: expected at most 200"),
        (("--campaign", "a\x00b"), "--campaign: expected"),
    ],
)
def test_a_bad_option_is_refused_by_its_name(options: tuple[str, ...], told: str, pipe: Pipe) -> None:
    assert told in pipe.refused(*options)


@pytest.mark.parametrize(
    "options", [("--pixel", "left"), ("--email", "e1", "--key-placeholder", "{{id}}"), ("--what",)]
)
def test_what_is_no_usage_is_refused_as_such(options: tuple[str, ...], pipe: Pipe) -> None:
    assert "usage: " in pipe.refused(*options, status=2)


def test_a_tenant_that_is_not_there_is_refused(pipe: Pipe) -> None:
    assert "no tenant 'Nobody'" in pipe.refused(tenant="Nobody")
    assert "no tenant ''" in pipe.refused(tenant="")


def test_a_name_that_two_tenants_have_is_refused(pipe: Pipe) -> None:
    pipe.stage.change(pipe.stage.globex, name="Acme")
    assert "2 tenants have the name 'Acme'" in pipe.refused()


# -- instrument: its options


@pytest.mark.parametrize(
    "page",
    [
        PAGE.encode(),
        b'\xff\xfe?\x00<a href="https://elsewhere.example/">\xe4</a>'[2:],
        b'<p>\xe4\xf6\xfc\x80\x00</p><a href="https://elsewhere.example/">x</a>\r\r\n',
        b'\xef\xbb\xbf<a href="https://elsewhere.example/">x</a>',
    ],
)
def test_html_comes_out_as_it_went_in_whatever_its_bytes(page: bytes, pipe: Pipe) -> None:
    out = pipe.instrument("--html", "--email", "e1", "--subject", "S", stdin=page).out
    assert undone(out) == page
    assert (len(CLICK.findall(out)), len(PIXEL.findall(out))) == (1, 1)
    assert emails(pipe.stage) == [("e1", "S", "", "", 1)]


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_html_in_utf_16_is_refused_where_its_mark_says_so(codec: str, pipe: Pipe) -> None:
    page = ("\ufeff" if codec[-1] == "e" else "") + PAGE
    assert "--html: expected HTML in UTF-8" in pipe.refused("--html", stdin=page.encode(codec))


def test_the_report_tells_sizes_in_bytes_also_where_they_are_no_utf_8(pipe: Pipe) -> None:
    page = b"<p>\xe4\xf6\xfc</p>"
    report = pipe.report("--html", "--email", "e1", stdin=page)
    assert report["size_before"] == len(page)


def test_a_link_whose_bytes_are_no_utf_8_is_reported(pipe: Pipe) -> None:
    report = pipe.report("--html", stdin=b'<a href="https://elsewhere.example/\xe4">x</a>')
    assert report["wrapped"] == []
    assert len(report["left"]) == 1


def test_the_pixel_may_be_first_in_the_body(pipe: Pipe) -> None:
    out = pipe.instrument("--pixel", "top").out
    assert re.search(rb"<body class=x><img ", out)
    assert undone(out) == MESSAGE


def test_without_a_pixel_the_email_is_registered_for_its_links(pipe: Pipe) -> None:
    out = pipe.instrument("--pixel", "none").out
    assert (PIXEL.findall(out), len(CLICK.findall(out))) == ([], 1)
    assert undone(out) == MESSAGE
    assert len(emails(pipe.stage)) == 1


def test_without_links_the_email_is_registered_for_its_pixel(pipe: Pipe) -> None:
    out = pipe.instrument("--no-links").out
    assert (len(PIXEL.findall(out)), CLICK.findall(out)) == (1, [])
    assert undone(out) == MESSAGE
    assert len(emails(pipe.stage)) == 1


@pytest.mark.parametrize(
    ("message", "options", "told"),
    [
        (MESSAGE, ("--no-links", "--pixel", "none"), "not asked for"),
        (SIGNED, (), "DKIM-Signature"),
        (SIGNED.replace(b"DKIM-Signature", b"ARC-Seal"), (), "ARC-Seal"),
        (PLAIN, (), "text/plain"),
        (b"", (), ""),
        (b"\x00\xff\r\r\n", (), ""),
        (b"no: mail\r\n\r\n", ("--strict",), ""),
    ],
)
def test_a_message_that_is_not_changed_is_not_registered(
    message: bytes, options: tuple[str, ...], told: str, pipe: Pipe
) -> None:
    said = pipe.instrument(*options, stdin=message)
    assert said.out == message
    assert "nothing was changed, so no email was registered" in said.err and told in said.err
    assert (emails(pipe.stage), spooled(pipe.stage)) == ([], [])


def test_html_in_place_of_a_message_is_named_as_such(pipe: Pipe) -> None:
    assert "HTML that is no message is given with --html" in pipe.instrument(stdin=b"<p>no message</p>").err
    assert "--html" not in pipe.instrument(stdin=b"no message").err


def test_a_signed_message_is_instrumented_by_force(pipe: Pipe) -> None:
    out = pipe.instrument("--force", stdin=SIGNED).out
    assert undone(out) == SIGNED
    assert out != SIGNED
    assert len(emails(pipe.stage)) == 1


@pytest.mark.parametrize("options", [(), ("--html",), ("--html", "--pixel", "top"), ("--key-placeholder", "{{id}}")])
def test_what_was_instrumented_already_comes_out_unchanged(options: tuple[str, ...], pipe: Pipe) -> None:
    once = pipe.instrument("--email", "e1", *options[:3]) if "{{id}}" not in options else pipe.instrument(*options)
    before = emails(pipe.stage)
    again = pipe.instrument(*options, stdin=once.out)
    assert again.out == once.out
    assert "nothing was changed" in again.err
    assert emails(pipe.stage) == before


def test_the_report_says_what_was_done_and_what_was_not(pipe: Pipe) -> None:
    report = pipe.report("--email", "e1")
    assert report["email"] == "e1"
    assert report["wrapped"] == [LINK]
    assert report["left"] == [{"url": "mailto:a@b.example", "reason": "it is no absolute http or https link"}]
    assert report["pixel"] == "placed before </body>"
    assert [part.partition(" ")[2] for part in report["touched"]] == ["text/html"]
    assert report["size_before"] == len(PAGE.encode()) < report["size_after"]
    assert (report["skipped"], report["warnings"]) == ([], [])


def test_a_page_that_grows_past_what_gmail_shows_is_warned_of(pipe: Pipe) -> None:
    page = b"<p>" + b"x" * 100_000
    said = pipe.instrument("--html", stdin=page)
    assert undone(said.out) == page
    assert "Gmail clips" in said.err


def test_a_report_that_cannot_be_written_is_told_and_leaves_no_trace(pipe: Pipe) -> None:
    environ = {name: os.environ[name] for name in ("PATH", "DATABASE_URL", "BASE_URL")}
    program = [sys.executable, str(ROOT / "tracker.py"), "--env", os.devnull]
    words = ["instrument", "Acme", "--report", str(pipe.stage.folder / "nowhere" / "report.json")]
    done = subprocess.run([*program, *words], env=environ, input=MESSAGE, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"report.json can't be written: No such file" in done.stderr and b"Traceback" not in done.stderr
    assert emails(pipe.stage) == []


# -- instrument: where the database can't be reached


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for the database."""
    monkeypatch.setattr(tracker, "PIPE_PATIENCE", 0.05)
    monkeypatch.setattr(tracker, "BUSY_MS", 50)


@contextlib.contextmanager
def locked(stage: Stage) -> Iterator[None]:
    """Somebody else has the database for himself."""
    with contextlib.closing(sqlite3.connect(stage.settings.database, isolation_level=None)) as other:
        other.execute("begin exclusive")
        yield


@contextlib.contextmanager
def being_written(stage: Stage) -> Iterator[None]:
    """Another process of ours writes and writes."""
    with open(stage.folder / "write.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


UNREACHABLE = pytest.mark.parametrize("unreachable", [database_away, locked, being_written])
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
    assert stage.check() == []
    assert b"all is well" in pipe("check").out


@UNREACHABLE
@pytest.mark.usefixtures("impatient")
def test_strict_leaves_nothing_and_lets_the_mail_system_try_again(unreachable: Unreachable, pipe: Pipe) -> None:
    with unreachable(pipe.stage):
        said = pipe.instrument("--strict", status=75)
    assert said.out == b""
    assert "try again" in said.err
    assert (spooled(pipe.stage), emails(pipe.stage)) == ([], [])
    assert pipe.instrument("--strict").out != b""
    assert len(emails(pipe.stage)) == 1


def test_strict_does_not_promise_a_registration_that_will_not_be(pipe: Pipe) -> None:
    with database_away(pipe.stage):
        said = pipe.instrument("--strict", status=75)
    assert "will be registered" not in said.err


def test_root_acts_as_the_owner_only_where_it_touches_the_data(pipe: Pipe) -> None:
    """The owner may not read root's Python, which loads what reads mail, and charsets, when they are needed."""
    as_owner: list[bool] = [False]
    seen: list[tuple[str, bool]] = []

    @contextlib.contextmanager
    def acting(settings: tracker.Settings) -> Iterator[None]:
        assert as_owner == [False] and settings.folder == str(pipe.stage.folder)
        as_owner[0] = True
        try:
            yield
        finally:
            as_owner[0] = False

    def watched(name: str) -> Callable[..., Any]:
        original = getattr(tracker, name)

        def call(*given: Any, **more: Any) -> Any:
            seen.append((name, as_owner[0]))
            return original(*given, **more)

        return call

    for name in ("find_tenant", "instrument_message", "said_by_headers", "register_emails", "email_line"):
        pipe.monkeypatch.setattr(tracker, name, watched(name))
    pipe.monkeypatch.setattr(tracker, "acting_as_owner", acting)
    pipe.instrument()
    with database_away(pipe.stage):
        pipe.instrument()
    assert [name for name, _ in seen].count("instrument_message") == 2
    assert {name for name, owner in seen if owner} == {"find_tenant", "register_emails", "email_line"}
    assert {name for name, owner in seen if not owner} == {"instrument_message", "said_by_headers"}


@pytest.mark.usefixtures("impatient")
def test_a_writer_that_does_not_end_is_waited_for_once(pipe: Pipe) -> None:
    pipe.monkeypatch.setattr(tracker, "PIPE_PATIENCE", 1.0)
    with being_written(pipe.stage):
        began = time.monotonic()
        pipe.instrument()
    assert time.monotonic() - began < 2.5


@pytest.mark.parametrize("which", ["id", "mail_id", "name"])
def test_a_tenant_is_found_by_each_of_its_words_without_the_database(which: str, pipe: Pipe) -> None:
    with database_away(pipe.stage):
        out = pipe.instrument("--email", "e1", tenant=getattr(pipe.stage.acme, which)).out
    assert f"{BASE}/{pipe.stage.acme.mail_id}/pixel/e1.gif".encode() in out
    pipe.stage.drain()
    assert [row[0] for row in emails(pipe.stage)] == ["e1"]


def test_the_tracking_host_is_known_without_the_database(pipe: Pipe) -> None:
    pipe.stage.change(pipe.stage.acme, tracking_host="t.acme.com")
    with database_away(pipe.stage):
        out = pipe.instrument("--email", "e1").out
    assert f"https://t.acme.com/{pipe.stage.acme.mail_id}/pixel/e1.gif".encode() in out


@pytest.mark.parametrize("options", [(), ("--strict",)])
@pytest.mark.parametrize("tenant", ["Nobody", ""])
def test_a_tenant_that_may_be_there_is_asked_for_again_later(tenant: str, options: tuple[str, ...], pipe: Pipe) -> None:
    with database_away(pipe.stage):
        said = pipe.instrument(*options, tenant=tenant, status=75)
    assert said.out == b""
    assert "tenants.json does not know the tenant" in said.err and "try again" in said.err
    assert spooled(pipe.stage) == []


def test_hits_that_were_drained_before_the_registration_are_its_own(pipe: Pipe) -> None:
    stage = pipe.stage
    with database_away(stage):
        out = pipe.instrument("--email", "e1", "--campaign", "spring").out
    (line,) = stage.spool.glob("*.jsonl")
    with away(line):
        follow(stage, PIXEL.findall(out)[0].decode())
        assert stage.drain().hits == 1
        assert emails(stage) == [("e1", "", "", "", 0)]
    stage.drain()
    assert emails(stage) == [("e1", "Grüße aus Bern", "ann@example.org", "spring", 1)]
    numbers = pipe.stats()
    assert (numbers["sent"]["emails"], numbers["sent"]["opened"]["person"]) == (1, 1)
    assert numbers["unregistered"]["emails"] == 0
    assert stage.check() == []


def test_registration_and_hits_in_one_segment_belong_together_in_any_order(pipe: Pipe) -> None:
    stage = pipe.stage
    line = tracker.email_line(stage.acme.mail_id, tracker.Registration("e1", "S"), NOW)
    segment(stage, hit(stage, "e1"), line, hit(stage, "e1"))
    assert stage.drain().hits == 2
    assert emails(stage) == [("e1", "S", "", "", 1)]
    assert stage.rows("select emails, opened_person from cohorts where grain = 0 and emails") == [(1, 1)]
    assert stage.check() == []


def test_an_unwritable_spool_leaves_the_line_to_ingest_which_counts_it_once(pipe: Pipe) -> None:
    stage = pipe.stage
    with database_away(stage), away(stage.spool):
        said = pipe.instrument("--email", "e1", "--subject", "Grüße \u2028")
    lines = [line for line in said.err.splitlines(keepends=True) if line.startswith("unspooled ")]
    assert len(lines) == 1 and lines[0].isascii()
    log = stage.folder / "log"
    log.write_text(said.err + said.err, encoding="utf-8")
    assert b"1 hits counted, 1 known already, 0 not readable" in pipe("ingest", str(log)).out
    assert b"0 hits counted, 2 known already" in pipe("ingest", str(log)).out
    assert emails(stage) == [("e1", "Grüße \u2028", "ann@example.org", "", 1)]
    assert stage.check() == []


def test_an_unwritable_spool_puts_nothing_but_the_message_out(pipe: Pipe) -> None:
    with database_away(pipe.stage), away(pipe.stage.spool):
        said = pipe.instrument("--email", "e1")
    assert undone(said.out) == MESSAGE


@pytest.mark.parametrize(
    "change",
    [
        {"key": "a/b"},
        {"key": ""},
        {"key": None},
        {"t": "yesterday"},
        {"t": None},
        {"mail_id": 3},
        {"subject": ["S"]},
        {"recipient": None},
        {"campaign": 1},
    ],
)
def test_a_broken_line_of_an_email_is_put_aside_and_holds_up_nobody(change: dict[str, Any], stage: Stage) -> None:
    good = tracker.email_line(stage.acme.mail_id, tracker.Registration("e1", "S", "r@b.example", "c"), NOW)
    segment(stage, (json.dumps(json.loads(good) | change) + "\n").encode(), good)
    assert stage.drain().rejected == 1
    assert len(list((stage.spool / "rejected").iterdir())) == 1
    assert emails(stage) == [("e1", "S", "r@b.example", "c", 1)]
    assert stage.check() == []


def test_a_line_of_an_email_of_nobody_is_dropped_and_counted(stage: Stage) -> None:
    segment(stage, tracker.email_line("nobody-at-all", tracker.Registration("e1"), NOW))
    assert stage.drain().rejected == 0
    assert emails(stage) == []
    assert stage.rows("select tenant, reason, hits from dropped") == [(0, "unknown-tenant", 1)]
    assert stage.check() == []


def test_a_line_keeps_to_the_lengths_that_fields_may_have(stage: Stage) -> None:
    registration = tracker.Registration("e1", "s" * 2000, "r" * 2000, "c" * 2000)
    segment(stage, tracker.email_line(stage.acme.mail_id, registration, NOW))
    assert stage.drain().rejected == 0
    assert emails(stage) == [("e1", "s" * 998, "r" * 320, "c" * 200, 1)]


# -- Templates of mailing tools

PLACEHOLDERS = ["{{ .Subscriber.UUID }}", "{{id}}", "*|UNIQID|*", "%%id%%", "[[id]]", "${id}", "%recipient.id%", "XXX"]


@pytest.mark.parametrize("placeholder", PLACEHOLDERS)
def test_a_placeholder_stands_raw_where_the_key_would_and_any_key_may_take_its_place(
    placeholder: str, pipe: Pipe
) -> None:
    out = pipe.instrument("--key-placeholder", placeholder, "--html", stdin=PAGE.encode()).out
    assert out.count(placeholder.encode()) == 2
    assert (emails(pipe.stage), spooled(pipe.stage)) == ([], [])
    assert b"campaign" not in out
    for key in ("a", "3f1c-9", "k" * 200, "reader@example.org"):
        merged = out.replace(placeholder.encode(), key.encode())
        assert undone(merged) == PAGE.encode()
        assert keys(merged) == {key}
        (link,) = CLICK.finditer(merged)
        assert follow(pipe.stage, link[0].decode(), status=302).location == LINK
        assert follow(pipe.stage, PIXEL.findall(merged)[0].decode()).headers["X-Tracker"] == "recorded"
    pipe.stage.drain()
    assert len(emails(pipe.stage)) == 4


def test_a_placeholder_with_spaces_in_a_link_without_quotes_gets_quotes(pipe: Pipe) -> None:
    page = b"<a href=https://elsewhere.example/>x</a>"
    out = pipe.instrument("--key-placeholder", "{{ id }}", "--html", "--pixel", "none", stdin=page).out
    assert re.fullmatch(rb'<a href="https://track[^"]*/click/{{ id }}/[^"]*">x</a>', out)


@pytest.mark.parametrize(("campaign", "shown"), [("spring", "spring"), ("a b&c=ü/%", "a%20b%26c%3D%C3%BC%2F%25")])
def test_the_campaign_stands_in_each_url_of_a_template(campaign: str, shown: str, pipe: Pipe) -> None:
    out = pipe.instrument("--key-placeholder", "{{id}}", "--campaign", campaign).out
    merged = out.replace(b"{{id}}", b"reader1")
    urls = [PIXEL.findall(merged)[0].decode(), *(match[0].decode() for match in CLICK.finditer(merged))]
    assert [url.partition("?")[2] for url in urls] == [f"campaign={shown}"] * 2
    for url in urls:
        follow(pipe.stage, url)
    pipe.stage.drain()
    assert emails(pipe.stage) == [(f"reader1?campaign={campaign}", "", "", campaign, 0)]
    assert pipe.stage.rows("select open_person, click_person from email_counts") == [(1, 1)]
    assert pipe.stage.check() == []


@pytest.mark.parametrize("options", [(), ("--html",), ("--campaign", "spring"), ("--pixel", "top")])
@pytest.mark.parametrize("placeholder", ["{{ .Subscriber.UUID }}", "*|UNIQID|*", "<%= id %>"])
def test_a_template_that_was_instrumented_comes_out_unchanged(
    placeholder: str, options: tuple[str, ...], pipe: Pipe
) -> None:
    once = pipe.instrument("--key-placeholder", placeholder, *options).out
    assert once != MESSAGE
    assert pipe.instrument("--key-placeholder", placeholder, *options, stdin=once).out == once


@pytest.mark.parametrize(
    "placeholder", ['{{ "id" }}', "{{ 'id' }}", "a/b", "a?b", "a#b", "", "x" * 201, "{{ü}}", "a\nb"]
)
def test_a_placeholder_that_would_break_a_url_is_refused(placeholder: str, pipe: Pipe) -> None:
    assert "--key-placeholder: expected" in pipe.refused("--key-placeholder", placeholder)


def test_a_template_is_made_without_the_database_and_promises_no_registration(pipe: Pipe) -> None:
    with database_away(pipe.stage):
        said = pipe.instrument("--key-placeholder", "{{id}}")
    assert undone(said.out.replace(b"{{id}}", b"e1")) == MESSAGE
    assert spooled(pipe.stage) == []
    assert "will be registered" not in said.err


# -- Campaigns: which one a hit belongs to


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
        ("utm=x&campaign=spring", "spring"),
        ("campaign=spring&campaign=autumn", "spring"),
        ("campaign=a+b%20c%26d%3F", "a b c&d?"),
        ("campaign=%C3%BC", "ü"),
        ("campaign=%20spring%0d%0a%00", "spring"),
        ("campaign=sp%07ring", "spring"),
        ("campaign=" + "x" * 300, "x" * 200),
        ("campaign=%FF", "\ufffd"),
        ("campaign=", ""),
        ("campaign=%20", ""),
        ("xcampaign=spring", ""),
        ("campaign", ""),
        ("", ""),
    ],
)
def test_a_pixel_says_which_campaign_its_open_belongs_to(query: str, campaign: str, stage: Stage) -> None:
    opens(stage, "e1", query)
    assert stage.drain().hits == 1
    assert stage.rows("select campaign, registered from emails") == [(campaign, 0)]
    key = stage.rows("select key from emails")[0][0]
    assert key == (tracker.campaign_key("e1", campaign) if campaign else "e1")
    assert len(key) <= 200
    assert stage.check() == []


@pytest.mark.parametrize(
    ("query", "campaign", "url"),
    [
        ("url=https%3A%2F%2Facme.com%2F%3Fa%3D1&campaign=spring", "spring", "https://acme.com/?a=1"),
        ("campaign=spring&url=https%3A%2F%2Facme.com%2F", "spring", "https://acme.com/"),
        (
            "campaign=spring&url=https://acme.com/?a=1&campaign=autumn",
            "spring",
            "https://acme.com/?a=1&campaign=autumn",
        ),
        ("url=https://acme.com/?a=1&campaign=autumn", "", "https://acme.com/?a=1&campaign=autumn"),
        ("url=https%3A%2F%2Facme.com%2F%3Fx%26campaign%3Dautumn", "", "https://acme.com/?x&campaign=autumn"),
    ],
)
def test_a_plain_link_says_which_campaign_its_click_belongs_to(
    query: str, campaign: str, url: str, stage: Stage
) -> None:
    assert clicks(stage, "e1", query).location == url
    stage.drain()
    assert stage.rows("select campaign from emails") == [(campaign,)]
    assert stage.rows("select url from urls") == [(url,)]
    assert stage.check() == []


def test_a_signed_link_says_which_campaign_its_click_belongs_to(stage: Stage) -> None:
    path = tracker.click_path(stage.app.secrets[0], stage.acme.mail_id, "e1", LINK)
    follow(stage, f"{BASE}{path}?campaign=spring", status=302)
    opens(stage, "e1")
    stage.drain()
    assert emails(stage) == [("e1?campaign=spring", "", "", "spring", 0)]
    assert stage.check() == []


def test_one_subscriber_has_an_email_in_each_campaign(stage: Stage) -> None:
    for query in ("campaign=spring", "campaign=autumn", "", "campaign=spring"):
        opens(stage, "sub1", query)
    stage.spread(20)
    stage.drain()
    rows = stage.rows("select key, campaign, open_person from emails join email_counts on email = id order by key")
    assert rows == [("sub1", "", 1), ("sub1?campaign=autumn", "autumn", 1), ("sub1?campaign=spring", "spring", 2)]
    assert stage.check() == []


def test_the_longest_keys_and_campaigns_stay_apart(stage: Stage) -> None:
    longest = "k" * 199
    for key in (longest + "a", longest + "b"):
        for campaign in ("x" * 200, "x" * 199 + "y", "x" * 200):
            opens(stage, key, f"campaign={campaign}")
    stage.drain()
    assert stage.rows("select count(*), count(distinct key), max(length(key)) from emails") == [(4, 4, 200)]
    assert stage.check() == []


def test_a_registered_key_keeps_to_what_was_registered(pipe: Pipe) -> None:
    stage = pipe.stage
    stage.web.post_json(f"/{stage.acme.id}/emails", {"key": "e1", "campaign": "winter"})
    opens(stage, "e1", "campaign=spring")
    clicks(stage, "e1", "campaign=autumn&url=https%3A%2F%2Facme.com%2F")
    opens(stage, "e1", "")
    stage.spread(20)
    stage.drain()
    assert emails(stage) == [("e1", "", "", "winter", 1)]
    assert stage.rows("select open_person, click_person from email_counts") == [(2, 1)]
    assert stage.check() == []


# -- Campaigns: how many were sent


def sent(pipe: Pipe) -> tuple[int, int, int]:
    """Emails sent, opened and clicked by persons."""
    group = pipe.stats()["sent"]
    return group["emails"], group["opened"]["person"], group["clicked"]["person"]


def unregistered(pipe: Pipe) -> tuple[int, int]:
    group = pipe.stats()["unregistered"]
    return group["emails"], group["opened"]["person"]


def declare(pipe: Pipe, name: str, number: int, *options: str) -> str:
    said = pipe("campaign", "add", "Acme", name, "--sent", str(number), *options).out.decode()
    assert pipe.stage.check() == []
    assert b"all is well" in pipe("check").out
    return said


def test_hits_without_a_declaration_stand_in_no_denominator(pipe: Pipe) -> None:
    opens(pipe.stage, "sub1")
    opens(pipe.stage, "sub2", "")
    assert sent(pipe) == (0, 0, 0)
    assert unregistered(pipe) == (2, 2)
    assert pipe.stage.check() == []


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_a_campaign_may_be_declared_before_and_after_its_hits(when: str, pipe: Pipe) -> None:
    stage = pipe.stage
    if when == "before":
        assert declare(pipe, "spring", 1000) == "spring: 1,000 sent\n"
    for key in ("sub1", "sub2", "sub1"):
        opens(stage, key)
    clicks(stage, "sub1", "campaign=spring&url=https%3A%2F%2Facme.com%2F")
    opens(stage, "sub1", "campaign=autumn")
    if when == "between":
        stage.drain()
        assert sent(pipe) == (0, 0, 0)
        declare(pipe, "spring", 1000)
    opens(stage, "sub1")
    opens(stage, "sub3")
    if when == "after":
        stage.drain()
        declare(pipe, "spring", 1000)
    assert sent(pipe) == (1000, 3, 1)
    assert unregistered(pipe) == (1, 1)
    assert stage.rows("select emails, opened_person, clicked_person from campaigns where campaign = 'spring'") == [
        (1000, 3, 1)
    ]
    assert stage.check() == []


def test_a_campaign_may_be_declared_again_with_another_number(pipe: Pipe) -> None:
    declare(pipe, "spring", 1000)
    opens(pipe.stage, "sub1")
    assert sent(pipe) == (1000, 1, 0)
    assert declare(pipe, "spring", 1200) == "spring: 1,200 sent, in place of what was said before\n"
    assert sent(pipe) == (1200, 1, 0)
    declare(pipe, "spring", 0)
    assert sent(pipe) == (0, 1, 0)
    opens(pipe.stage, "sub2")
    assert sent(pipe) == (0, 2, 0)
    assert pipe.stage.check() == []


def test_a_campaign_is_counted_by_the_time_it_was_sent_at(pipe: Pipe) -> None:
    stage = pipe.stage
    opens(stage, "sub1")
    stage.drain()
    declare(pipe, "spring", 500, "--at", "2025-03-01T09:00:00+01:00")
    opens(stage, "sub2")
    assert sent(pipe) == (0, 0, 0)
    told = json.loads(pipe("stats", "Acme", "--json", "--range", "all").out)["sent"]
    assert (told["emails"], told["opened"]["person"]) == (500, 2)
    assert stage.rows("select sent_at from campaign_sends") == [(1_740_816_000_000,)]
    declare(pipe, "spring", 600)  # stays where it was
    assert stage.rows("select sent, sent_at from campaign_sends") == [(600, 1_740_816_000_000)]
    now = tracker.iso_time(tracker.now_ms())
    assert now is not None
    declare(pipe, "spring", 600, "--at", now)
    assert sent(pipe) == (600, 2, 0)
    assert unregistered(pipe) == (0, 0)


def test_registered_emails_of_a_campaign_count_beside_those_that_were_declared(pipe: Pipe) -> None:
    pipe.instrument("--email", "e1", "--campaign", "spring")
    declare(pipe, "spring", 10)
    opens(pipe.stage, "e1")
    opens(pipe.stage, "sub1")
    assert sent(pipe) == (11, 2, 0)
    listed = json.loads(pipe("campaign", "list", "Acme", "--json").out)
    assert [(each["campaign"], each["emails"], each["opened_person"]) for each in listed] == [("spring", 11, 2)]
    assert pipe("campaign", "list", "Acme").out == b"spring: 11 sent, opened by people 2, clicked by people 0\n"
    assert pipe.stage.check() == []


def test_campaigns_of_one_tenant_are_not_those_of_another(pipe: Pipe) -> None:
    pipe("campaign", "add", "Globex", "spring", "--sent", "7")
    opens(pipe.stage, "sub1")
    assert sent(pipe) == (0, 0, 0)
    assert unregistered(pipe) == (1, 1)
    assert pipe.stage.check() == []


def test_a_tenant_with_campaigns_can_be_removed(pipe: Pipe) -> None:
    opens(pipe.stage, "sub1")
    pipe.stage.drain()
    declare(pipe, "spring", 7)
    pipe("tenant", "remove", "Acme", "--yes")
    assert pipe.stage.rows("select * from campaign_sends") == []
    assert pipe.stage.check() == []
    assert b"all is well" in pipe("check").out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("", "--sent", "1"), "campaign: expected a name of 1 to 200 characters"),
        ((" ", "--sent", "1"), "campaign: expected"),
        (("x" * 201, "--sent", "1"), "campaign: expected"),
        (("a\nb", "--sent", "1"), "campaign: expected"),
        (("c", "--sent", "-1"), "sent: expected a number from 0 to 1,000,000,000"),
        (("c", "--sent", "1000000001"), "sent: expected"),
        (("c", "--sent", "9" * 30), "sent: expected"),
        (("c", "--sent", "1", "--at", "yesterday"), "--at: expected a time with its zone"),
        (("c", "--sent", "1", "--at", "2026-11-30T09:00:00"), "--at: expected"),
        (("c", "--sent", "1", "--at", "1970-01-01T00:00:00Z"), "--at: expected"),
        (("c", "--sent", "1", "--at", "9999-12-31T23:59:59-12:00"), "--at: expected"),
        (("c", "--sent", "1", "--at", "0001-01-01T00:00:00+14:00"), "--at: expected"),
        (("c", "--sent", "1", "--at", ""), "--at: expected"),
    ],
)
def test_a_declaration_that_cannot_be_is_refused_with_what_was_expected(
    words: tuple[str, ...], told: str, pipe: Pipe
) -> None:
    said = pipe("campaign", "add", "Acme", *words, status=1)
    assert told in said.err
    assert said.out == b""
    assert pipe.stage.rows("select * from campaign_sends") == []


@pytest.mark.parametrize("words", [("c",), ("c", "--sent", "many"), ("c", "--sent", "1.5"), ("--sent", "1")])
def test_a_declaration_without_its_number_is_no_usage(words: tuple[str, ...], pipe: Pipe) -> None:
    assert "usage: " in pipe("campaign", "add", "Acme", *words, status=2).err


@pytest.mark.parametrize("words", [("add", "Nobody", "c", "--sent", "1"), ("list", "Nobody")])
def test_a_campaign_of_nobody_is_refused(words: tuple[str, ...], pipe: Pipe) -> None:
    assert "no tenant 'Nobody'" in pipe("campaign", *words, status=1).err


def test_a_campaign_may_be_declared_over_http(pipe: Pipe) -> None:
    path = f"/{pipe.stage.acme.id}/campaigns"
    answer = pipe.stage.web.post_json(path, {"campaign": " spring ", "sent": 1000}, status=201)
    assert answer.json == {"campaign": "spring", "sent": 1000}
    opens(pipe.stage, "sub1")
    assert sent(pipe) == (1000, 1, 0)
    pipe.stage.web.post_json(path, {"campaign": "spring", "sent": 900, "sent_at": "2026-01-01T00:00:00Z"}, status=200)
    assert pipe.stage.rows("select sent, sent_at from campaign_sends") == [(900, 1_767_225_600_000)]
    assert pipe.stage.check() == []


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"sent": 1}, "campaign: expected a name of 1 to 200 characters in one line"),
        ({"campaign": "", "sent": 1}, "campaign: expected a name"),
        ({"campaign": 5, "sent": 1}, "campaign: expected text"),
        ({"campaign": "x" * 201, "sent": 1}, "campaign: expected at most 200 characters, got 201"),
        ({"campaign": "a\nb", "sent": 1}, "campaign: expected text without control characters"),
        ({"campaign": "\ud800", "sent": 1}, "campaign: expected"),
        ({"campaign": "c"}, "sent: expected a number"),
        ({"campaign": "c", "sent": "1"}, "sent: expected a number"),
        ({"campaign": "c", "sent": True}, "sent: expected a number"),
        ({"campaign": "c", "sent": 1.5}, "sent: expected a number"),
        ({"campaign": "c", "sent": -1}, "sent: expected a number from 0 to 1,000,000,000"),
        ({"campaign": "c", "sent": 10**30}, "sent: expected a number from 0"),
        ({"campaign": "c", "sent": 1, "sent_at": "now"}, "sent_at: expected a time with its zone"),
        ({"campaign": "c", "sent": 1, "sent_at": 5}, "sent_at: expected text"),
        ({"campaign": "c", "sent": 1, "at": "now"}, "at: unknown field; expected some of campaign, sent, sent_at"),
        ([], "expected an object"),
    ],
)
def test_a_bad_field_of_a_campaign_is_refused_by_its_name(value: Any, told: str, stage: Stage) -> None:
    answer = stage.web.post_json(f"/{stage.acme.id}/campaigns", value, status=400)
    assert told in answer.json["error"]
    assert stage.rows("select * from campaign_sends") == []


def test_emails_of_a_declared_campaign_have_room_up_to_the_declared_number(pipe: Pipe) -> None:
    stage = pipe.stage
    pipe.monkeypatch.setattr(tracker, "UNREGISTERED_A_DAY", 2)
    declare(pipe, "spring", 5)
    for n in range(4):
        opens(stage, f"sub{n}")
        opens(stage, f"other{n}", "campaign=autumn")
    stage.drain()
    for n in range(8):
        opens(stage, f"sub{n}")
    stage.drain()
    counts = "select campaign, count(*) from emails group by 1 order by 1"
    assert stage.rows(counts) == [("autumn", 2), ("spring", 5)]
    assert stage.rows("select reason, sum(hits) from dropped group by 1") == [("unregistered-limit", 5)]
    declare(pipe, "spring", 6)
    for n in range(8):
        opens(stage, f"sub{n}")
    stage.drain()
    assert stage.rows(counts) == [("autumn", 2), ("spring", 6)]
    assert stage.check() == []


@pytest.mark.parametrize("declared", [False, True])
def test_an_email_of_a_campaign_can_be_removed_by_its_key(declared: bool, pipe: Pipe) -> None:
    stage = pipe.stage
    if declared:
        declare(pipe, "spring", 10)
    opens(stage, "abc")
    opens(stage, "abc", "campaign=autumn")
    clicks(stage, "abc", "campaign=spring&url=https%3A%2F%2Facme.com%2F")
    path = f"/{stage.acme.id}/emails/abc%3Fcampaign%3Dspring"
    assert stage.web.delete(path).json == {"deleted": "abc?campaign=spring"}
    assert [row[0] for row in emails(stage)] == ["abc?campaign=autumn"]
    assert stage.check() == []
    assert sent(pipe) == ((10 if declared else 0), 0, 0)
    assert unregistered(pipe) == (1, 1)
    stage.web.delete(path, status=404)
    opens(stage, "abc")
    assert sent(pipe)[1] == int(declared)
    assert stage.check() == []


def everything(stage: Stage) -> list[Any]:
    """What the tables hold, but for numbers that the order of inserts gives."""
    return [
        stage.rows(sql)
        for sql in (
            "select * from cohorts where emails or opened_person or clicked_person order by 1, 2",
            "select * from campaigns order by 1, 2",
            "select tenant, grain, time, type, verdict, reason, hits from reasons"
            " join judgements on judgements.id = judgement where hits order by 1, 2, 3, 4, 5, 6",
            "select * from uniques where emails order by 1, 2, 3, 4, 5",
            "select host, links.* from links join urls on urls.id = links.url order by 1",
            "select key, campaign, registered, created_at, sent_at from emails order by key",
            "select key, open_person, open_person_first, click_person, click_person_first from email_counts"
            " join emails on id = email order by key",
            "select * from dropped order by 1, 2, 3",
        )
    ]


def test_the_numbers_are_the_same_in_whatever_order_things_arrive(staged: Callable[..., Stage]) -> None:
    def arrive(order: random.Random | None) -> list[Any]:
        stage = staged()
        pick = random.Random(4)  # the same hits in each run

        def a_segment(start: int) -> Callable[[], object]:
            lines = []
            for n in range(start, start + 15):
                key, campaign = f"sub{pick.randrange(6)}", pick.choice(["spring", "autumn", "none"])
                kind = pick.choice(["pixel/{}.gif?campaign={}", "click/{}?campaign={}&url=https%3A%2F%2Facme.com%2F"])
                uri = f"/{stage.acme.mail_id}/" + kind.format(key, campaign)
                answer = "pixel" if "pixel" in kind else "302"
                agent = pick.choice([CHROME, "python-requests/2.32.4"])
                lines.append(hit(stage, key, NOW + n * 400_000, uri=uri, answer=answer, ua=agent))
            lines += [hit(stage, f"e{n}", NOW + n * 700_000) for n in range(3)]
            return lambda: (segment(stage, *lines), stage.drain())

        def a_declaration(campaign: str, number: int) -> Callable[[], object]:
            value = {"campaign": campaign, "sent": number, "sent_at": "2026-11-24T09:00:00Z"}
            return lambda: stage.web.post_json(f"/{stage.acme.id}/campaigns", value)

        def a_registration(key: str) -> Callable[[], object]:
            line = tracker.email_line(stage.acme.mail_id, tracker.Registration(key, "S", "r", "spring"), NOW)
            return lambda: (segment(stage, line), stage.drain())

        steps = [a_segment(n) for n in range(0, 75, 15)]
        steps += [a_declaration("spring", 50), a_declaration("autumn", 4), a_registration("e0"), a_registration("e1")]
        if order is not None:
            order.shuffle(steps)
        for step in steps:
            step()
            assert stage.check() == []
        return everything(stage)

    expected = arrive(None)
    assert len(expected[5]) > 15
    order = random.Random(1)
    for _ in range(6):
        assert arrive(order) == expected


# -- POST /{id}/emails with html


def test_html_is_returned_with_links_and_pixel(stage: Stage) -> None:
    answer = stage.web.post_json(f"/{stage.acme.id}/emails", {"key": "e1", "html": PAGE}, status=201).json
    assert set(answer) == {"key", "pixel_url", "links", "html", "report"}
    out = answer["html"].encode()
    assert undone(out) == PAGE.encode()
    assert keys(out) == {"e1"}
    assert PIXEL.findall(out)[0].decode() == answer["pixel_url"]
    (link,) = CLICK.finditer(out)
    assert follow(stage, link[0].decode(), status=302).location == LINK
    assert answer["report"]["wrapped"] == [LINK]
    assert answer["report"]["pixel"] == "placed before </body>"
    assert (answer["report"]["size_before"], answer["report"]["size_after"]) == (len(PAGE.encode()), len(out))
    assert emails(stage) == [("e1", "", "", "", 1)]


def test_each_email_of_an_array_gets_its_own_html(stage: Stage) -> None:
    values = [{"key": "e1", "html": PAGE}, {"key": "e2", "links": [LINK]}, {"key": "e3", "html": ""}]
    answers = stage.web.post_json(f"/{stage.acme.id}/emails", values, status=201).json
    assert [("html" in answer, "report" in answer) for answer in answers] == [(True,) * 2, (False,) * 2, (True,) * 2]
    assert keys(answers[0]["html"].encode()) == {"e1"}
    assert answers[2]["html"] == f'<img src="{answers[2]["pixel_url"]}" width="1" height="1" alt="">'
    assert [row[0] for row in emails(stage)] == ["e1", "e2", "e3"]


@pytest.mark.parametrize("value", [None, 5, ["<p>"], {"a": 1}, True])
def test_html_that_is_no_text_is_refused_with_its_place(value: Any, stage: Stage) -> None:
    path = f"/{stage.acme.id}/emails"
    assert stage.web.post_json(path, {"html": value}, status=400).json == {"error": "html: expected text"}
    answer = stage.web.post_json(path, [{}, {"html": value}], status=400)
    assert answer.json == {"error": "[1].html: expected text"}
    assert emails(stage) == []


def test_html_with_half_a_character_is_answered(stage: Stage) -> None:
    body = rb'{"key": "e1", "html": "\ud800<a href=\"https://elsewhere.example/\ud800\">x</a>"}'
    answer = stage.web.post(f"/{stage.acme.id}/emails", body, status="*")
    assert answer.status_int in (201, 400)


def test_links_in_html_count_among_those_that_one_request_may_ask_for(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "MAX_LINKS", 3)
    path = f"/{stage.acme.id}/emails"
    stage.web.post_json(path, [{"key": "e1", "html": PAGE}, {"key": "e2", "html": PAGE, "links": [LINK]}], status=201)
    answer = stage.web.post_json(path, [{"key": f"f{n}", "html": PAGE * 2} for n in range(2)], status=400)
    assert answer.json == {"error": "[1].links: expected at most 3 in one request"}
    assert [row[0] for row in emails(stage)] == ["e1", "e2"]


# -- POST /{id}/messages


def post(stage: Stage, query: str = "", message: bytes = MESSAGE, status: int = 200, **more: Any) -> Any:
    """Instrument a message over HTTP."""
    more.setdefault("content_type", "message/rfc822")
    return stage.web.post(f"/{stage.acme.id}/messages{query}", message, status=status, **more)


def refused(stage: Stage, query: str = "", message: bytes = MESSAGE, status: int = 400, **more: Any) -> str:
    """What is said of a message that is refused and leaves no trace."""
    answer = post(stage, query, message, status, **more)
    assert list(answer.json) == ["error"]
    assert emails(stage) == []
    return str(answer.json["error"])


def test_a_message_comes_back_instrumented_and_is_registered(stage: Stage) -> None:
    answer = post(stage)
    assert undone(answer.body) == MESSAGE
    assert answer.headers["Content-Type"] == "message/rfc822"
    assert answer.headers["X-Tracker"] == "instrumented"
    key = answer.headers["X-Email-Key"]
    assert keys(answer.body) == {key}
    assert emails(stage) == [(key, "Grüße aus Bern", "ann@example.org", "", 1)]
    (link,) = CLICK.finditer(answer.body)
    assert follow(stage, link[0].decode(), status=302).location == LINK
    assert stage.check() == []


@pytest.mark.parametrize("accept", ["application/json", "text/html, application/json;q=0.9"])
def test_whoever_accepts_json_gets_the_report_too(accept: str, stage: Stage) -> None:
    answer = post(stage, "?key=e1", headers={"Accept": accept}).json
    assert set(answer) == {"key", "message_base64", "report"}
    assert answer["key"] == "e1"
    assert undone(base64.b64decode(answer["message_base64"])) == MESSAGE
    assert answer["report"]["wrapped"] == [LINK]


def test_the_query_goes_before_the_headers(stage: Stage) -> None:
    answer = post(stage, f"?key=e%2B1&recipient=bob@example.org&subject={quote('Füße')}&campaign=spring")
    assert emails(stage) == [("e+1", "Füße", "bob@example.org", "spring", 1)]
    assert keys(answer.body) == {"e+1"}


@pytest.mark.parametrize(
    ("query", "pixels", "links"),
    [
        ("?pixel=top", 1, 1),
        ("?pixel=bottom&links=yes&force=no", 1, 1),
        ("?pixel=none", 0, 1),
        ("?links=no", 1, 0),
    ],
)
def test_the_query_says_what_is_wanted(query: str, pixels: int, links: int, stage: Stage) -> None:
    body = post(stage, query).body
    assert (len(PIXEL.findall(body)), len(CLICK.findall(body))) == (pixels, links)
    assert undone(body) == MESSAGE
    assert (b"<body class=x><img" in body) == ("top" in query)
    assert len(emails(stage)) == 1


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("?key=", "key: expected 1 to 200"),
        ("?key=a%2Fb", "key: expected 1 to 200"),
        ("?key=..", "key: expected"),
        ("?key=" + "k" * 201, "key: expected at most 200"),
        ("?recipient=" + "r" * 321, "recipient: expected at most 320 characters, got 321"),
        ("?subject=a%0Ab", "subject: expected text without control characters"),
        ("?campaign=" + "c" * 201, "campaign: expected at most 200"),
        ("?pixel=left", "pixel: expected one of bottom, top, none"),
        ("?pixel=", "pixel: expected one of"),
        ("?links=false", "links: expected one of yes, no"),
        ("?force=1", "force: expected one of yes, no"),
        ("?Force=yes", "Force: unknown field; expected some of key"),
        ("?html=x", "html: unknown field"),
    ],
)
def test_a_bad_word_of_the_query_is_refused_by_its_name(query: str, told: str, stage: Stage) -> None:
    assert told in refused(stage, query)


@pytest.mark.parametrize("kind", ["text/html", "application/json", "text/plain", "message/rfc8222"])
def test_another_type_of_content_is_refused(kind: str, stage: Stage) -> None:
    assert "Content-Type: expected message/rfc822" in refused(stage, status=415, content_type=kind)


@pytest.mark.parametrize("kind", ["Message/RFC822", 'message/rfc822; charset="utf-8"'])
def test_the_type_may_be_spelt_in_these_ways(kind: str, stage: Stage) -> None:
    assert undone(post(stage, content_type=kind).body) == MESSAGE


def test_an_empty_message_is_refused(stage: Stage) -> None:
    assert "expected a message" in refused(stage, message=b"")


def test_a_message_of_over_10_megabytes_is_too_large(stage: Stage) -> None:
    whole = MESSAGE + b"x" * ((10 << 20) - len(MESSAGE))
    assert refused(stage, message=whole + b"x", status=413) == "expected a body of at most 10 MB"
    assert undone(post(stage, message=whole).body) == whole


@pytest.mark.parametrize("message", [PLAIN, SIGNED, b"\x00\xff", b"no header at all"])
def test_a_message_that_stays_unchanged_is_not_registered(message: bytes, stage: Stage) -> None:
    answer = post(stage, message=message)
    assert answer.body == message
    assert answer.headers["X-Tracker"] == "unchanged"
    assert emails(stage) == []
    report = post(stage, message=message, headers={"Accept": "application/json"}).json["report"]
    assert (report["wrapped"], report["touched"]) == ([], [])
    assert report["pixel"].startswith("not placed")


def test_a_signed_message_is_changed_by_force_only(stage: Stage) -> None:
    assert undone(post(stage, "?force=yes", SIGNED).body) == SIGNED
    assert len(emails(stage)) == 1


def test_what_came_back_may_be_sent_again_and_stays_as_it_is(stage: Stage) -> None:
    once = post(stage, "?key=e1").body
    again = post(stage, message=once)
    assert (again.body, again.headers["X-Tracker"]) == (once, "unchanged")
    assert [row[0] for row in emails(stage)] == ["e1"]


@pytest.mark.parametrize("path", ["messages", "campaigns", "emails"])
def test_a_tenant_with_an_api_key_wants_it(path: str, pipe: Pipe) -> None:
    stage = pipe.stage
    key = pipe("tenant", "key", "Acme").out.decode().strip()
    body = {"messages": MESSAGE, "campaigns": b'{"campaign": "c", "sent": 1}', "emails": b"{}"}[path]
    for headers, status in (({}, 401), ({"Authorization": "Bearer x"}, 401), ({"Authorization": f"Bearer {key}"}, 2)):
        answer = stage.web.post(
            f"/{stage.acme.id}/{path}", body, content_type="message/rfc822", headers=headers, status="*"
        )
        assert answer.status_int == status or answer.status_int // 100 == status
        assert bool(stage.rows("select key from emails union select campaign from campaign_sends")) == (status == 2)


@pytest.mark.parametrize("path", ["messages", "campaigns"])
def test_only_the_dashboard_id_writes(path: str, stage: Stage) -> None:
    stage.web.post(f"/{stage.acme.mail_id}/{path}", MESSAGE, content_type="message/rfc822", status=404)
    stage.web.get(f"/{stage.acme.id}/{path}", status=405)
    assert emails(stage) == []


def test_without_a_public_address_a_message_is_refused_with_the_reason(staged: Callable[..., Stage]) -> None:
    assert "BASE_URL" in refused(staged(BASE_URL=""), status=409)


# -- Odds and ends


def test_spaces_round_a_campaign_make_no_other_campaign(stage: Stage) -> None:
    for campaign in ("spring", " spring", "spring "):
        stage.web.post_json(f"/{stage.acme.id}/emails", {"campaign": campaign})
    assert stage.rows("select campaign, emails from campaigns where emails") == [("spring", 3)]


# -- The hidden link

HIDDEN = re.compile(rb'<a href="([^"]+)" aria-hidden="true" tabindex="-1" style="display:none"></a>')


def encoded(name: str) -> bytes:
    """A message of two alternatives whose HTML is encoded so."""
    bodies = {
        "8bit": PAGE.encode(),
        "quoted-printable": quopri.encodestring(PAGE.encode()).replace(b"\n", b"\r\n").replace(b"\r\r", b"\r"),
        "base64": base64.encodebytes(PAGE.encode()).replace(b"\n", b"\r\n"),
    }
    kind = f"Content-Type: text/html; charset=utf-8\r\nContent-Transfer-Encoding: {name}\r\n\r\n".encode()
    plain = b"Content-Type: text/plain\r\n\r\nshop: https://elsewhere.example/\r\n"
    inner = b"".join(b"--b\r\n" + part + b"\r\n" for part in (plain, kind + bodies[name])) + b"--b--\r\n"
    return (
        b'To: ann@example.org\r\nMIME-Version: 1.0\r\nContent-Type: multipart/alternative; boundary="b"\r\n\r\n' + inner
    )


def html_of(message: bytes) -> bytes:
    """The decoded HTML of a message."""
    parts = [part for part in email.message_from_bytes(message).walk() if part.get_content_type() == "text/html"]
    body = parts[-1].get_payload(decode=True)
    assert isinstance(body, bytes)
    return body


@pytest.mark.parametrize("place, where", [("bottom", b"</body>"), ("top", b"<body class=x>")])
@pytest.mark.parametrize("encoding", ["8bit", "quoted-printable", "base64"])
def test_one_hidden_link_stands_first_in_the_body_of_a_message(
    encoding: str, place: str, where: bytes, pipe: Pipe
) -> None:
    out = pipe.instrument("--hidden-link", "--pixel", place, "--email", "e1", stdin=encoded(encoding)).out
    page = html_of(out)
    assert len(HIDDEN.findall(page)) == 1 and len(PIXEL.findall(page)) == 1
    assert re.search(rb"<body class=x>" + HIDDEN.pattern, page), "some gateways follow the first link only"
    assert (where + b"<a href" in page or b'alt="">' + where in page) and keys(page) == {"e1"}
    assert undone(HIDDEN.sub(b"", page)).replace(b"\r", b"") == html_of(encoded(encoding)).replace(b"\r", b"")
    assert all(len(line) <= 998 for line in out.split(b"\r\n"))


@pytest.mark.parametrize(
    "before, behind",
    [
        pytest.param("<html><head></head><body>", "<a href='https://acme.com/'>x</a></body></html>", id="body"),
        pytest.param("<title>x</title></head>", "<a href='https://acme.com/'>x</a>", id="no-body-but-a-head"),
        pytest.param("<table><tr><td>Hi ", "<a href='https://acme.com/'>x</a><a name=y>", id="a-piece-of-html"),
        pytest.param("<!--[if mso]><a href='https://acme.com/'>x</a><![endif]-->", "<a name=y>", id="not-in-a-comment"),
        pytest.param("<p>Hello</p>", "", id="no-link"),
    ],
)
def test_the_hidden_link_comes_before_every_other(before: str, behind: str, pipe: Pipe) -> None:
    page = (before + behind).encode()
    assert HIDDEN.findall(pipe.instrument("--html", stdin=page).out) == []
    out = pipe.instrument("--html", "--hidden-link", "--pixel", "none", "--no-links", stdin=page).out
    assert HIDDEN.sub(b"|", out).decode() == f"{before}|{behind}"


@pytest.mark.parametrize("encoding", ["8bit", "quoted-printable", "base64"])
@pytest.mark.parametrize("options", [(), ("--pixel", "top"), ("--pixel", "none")])
def test_a_second_time_places_no_second_hidden_link(encoding: str, options: tuple[str, ...], pipe: Pipe) -> None:
    out = pipe.instrument("--hidden-link", "--email", "e1", *options, stdin=encoded(encoding)).out
    assert pipe.instrument("--hidden-link", "--email", "e1", *options, stdin=out).out == out
    assert pipe.instrument("--email", "e1", *options, stdin=out).out == out, "nor is it wrapped as a link of its own"


def test_the_report_says_where_the_hidden_link_is_and_why_it_is_not(pipe: Pipe) -> None:
    assert pipe.report()["hidden_link"] == "not placed: not asked for"
    assert pipe.report("--hidden-link")["hidden_link"].startswith("placed ")
    twice = pipe.instrument("--hidden-link", "--email", "e1").out
    assert pipe.report("--hidden-link", "--email", "e1", stdin=twice)["hidden_link"] == tracker.HIDDEN_THERE
    told = pipe.report("--hidden-link", stdin=PLAIN)
    assert (told["hidden_link"], told["wrapped"]) == ("not placed: not asked for", [])
    assert pipe.report("--hidden-link")["wrapped"] == [LINK], "it is no link of the sender's"


@pytest.mark.parametrize("options", [(), ("--key-placeholder", "{{ id }}", "--campaign", "spring")])
def test_whoever_follows_the_hidden_link_gets_an_empty_page_and_is_a_scanner(
    options: tuple[str, ...], pipe: Pipe
) -> None:
    out = pipe.instrument("--hidden-link", *(options or ("--email", "e1")), stdin=MESSAGE).out
    url = html.unescape(HIDDEN.findall(out)[0].decode()).replace("{{ id }}", "e1")
    answer = follow(pipe.stage, url)
    assert (answer.status_int, re.sub("<[^>]*>", "", answer.text).strip()) == (200, "")
    assert "Location" not in answer.headers
    pipe.stage.drain()
    sql = "select key, event_type, verdict, reason from event_details"
    key = "e1?campaign=spring" if options else "e1"
    assert pipe.stage.rows(sql) == [(key, "click", "scanner", "hidden-link")]
    assert pipe.stage.rows("select click_person, click_machine from email_counts") == [(0, 1)]
    assert pipe.stage.check() == []


def test_a_hidden_link_whose_signature_is_not_ours_is_no_link(pipe: Pipe) -> None:
    url = HIDDEN.findall(pipe.instrument("--hidden-link").out)[0].decode()
    forged = re.sub("/click/([^/]+)/[^/]{16}/", rf"/click/\1/{'A' * 16}/", url)
    assert pipe.stage.web.get(forged[len(BASE) :], status=404)
    globex = url.replace(pipe.stage.acme.mail_id, pipe.stage.globex.mail_id)
    assert pipe.stage.web.get(globex[len(BASE) :], status=404)
    assert spooled(pipe.stage) == []


def test_clicks_beside_the_hidden_link_are_judged_anew_when_it_is_followed(pipe: Pipe) -> None:
    """A person's numbers are corrected in the same moment."""
    out = pipe.instrument("--hidden-link", "--email", "e1").out
    link = next(match[0].decode() for match in CLICK.finditer(HIDDEN.sub(b"", out)))
    follow(pipe.stage, link, status=302)
    assert pipe.stats()["sent"]["clicked"]["person"] == 1
    follow(pipe.stage, HIDDEN.findall(out)[0].decode())
    assert pipe.stats()["sent"]["clicked"] == {"person": 0, "unconfirmed": 0, "machine": 1}
    assert pipe.stage.rows("select reason from event_details order by reason") == [
        ("hidden-link",),
        ("with-hidden-link",),
    ]
    assert pipe.stage.check() == []


# -- What the sender says of an email: the hidden link, and when it was sent and delivered


def known(stage: Stage) -> list[tuple[Any, ...]]:
    return stage.rows("select key, sent_at, delivered_at, time_said, links from emails order by id")


def test_a_message_over_http_may_have_a_hidden_link_and_times(stage: Stage) -> None:
    query = "key=e1&hidden_link=yes&sent_at=2026-11-30T09:00:00Z&delivered_at=2026-11-30T10:00:02%2B01:00"
    path = f"/{stage.acme.id}/messages"
    answer = stage.web.post(f"{path}?{query}", MESSAGE, content_type="message/rfc822")
    assert len(HIDDEN.findall(answer.body)) == 1
    sent_at = tracker.read_iso_time("2026-11-30T09:00:00Z", "")
    assert known(stage) == [("e1", sent_at, sent_at + 2_000, 1, 1)]
    for fields in ("", "hidden_link=no"):
        answer = stage.web.post(f"{path}?{fields}", MESSAGE, content_type="message/rfc822")
        assert HIDDEN.findall(answer.body) == []
    for fault in ("hidden_link=1", "hidden_link=", "sent_at=soon", "delivered_at=2026"):
        answer = stage.web.post(f"{path}?{fault}", MESSAGE, content_type="message/rfc822", status=400)
        assert fault.partition("=")[0] in answer.json["error"]
    assert stage.check() == []


def test_a_message_whose_delivery_is_said_has_its_clicks_judged_by_that(stage: Stage) -> None:
    said = tracker.iso_time(tracker.now_ms())
    path = f"/{stage.acme.id}/messages?key=e1&delivered_at={quote(said or '')}"
    out = stage.web.post(path, MESSAGE, content_type="message/rfc822").body
    follow(stage, next(match[0].decode() for match in CLICK.finditer(out)), status=302)
    stage.drain()
    assert stage.rows("select verdict, reason from event_details") == [("scanner", "too-soon")]
