"""Instrumenting messages: the HTML parts change where they must, and every other byte stays as it was."""

from __future__ import annotations

import base64
import binascii
import codecs
import copy
import email
import email.message
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import BASE, SHARED

import tracker

SECRET = "s" * 64
MAIL_ID = "k3v9x2mp"
KEY = "e1"
URL = "https://acme.com/sale?utm_source=mail&id=7"
PIXEL = f'<img src="{BASE}{tracker.pixel_path(MAIL_ID, KEY)}" width="1" height="1" alt="">'
PAGE = f'<html><body><p>Hello</p><a href="{URL}">Sale</a></body></html>'
FILES = sorted((SHARED / "mail").glob("*.eml")) if SHARED.is_dir() else []
BREAKS = [pytest.param("\r\n", id="crlf"), pytest.param("\n", id="lf")]
BLANKS = re.compile(rb"[ \t\r\n]+")


def tracked(url: str) -> str:
    """The tracked URL of a URL."""
    return BASE + tracker.click_path(SECRET, MAIL_ID, KEY, url)


def is_ours(url: str) -> bool:
    """Whether a URL leads to the tracking host: the whole host is compared."""
    try:
        return tracker.read_target(url).host == "track.example.com"
    except tracker.BadTarget:
        return False


def how(**options: Any) -> tracker.Instrumenting:
    """What a sender wants: links and a pixel, unless told otherwise."""
    made: dict[str, Any] = {"wrap": tracked, "is_ours": is_ours, "pixel_url": BASE + tracker.pixel_path(MAIL_ID, KEY)}
    return tracker.Instrumenting(**{**made, **options})


def undone(raw: bytes, new: bytes, edits: list[tracker.Edit]) -> bytes:
    """The new message with each edit taken back; fails if they are not in order, or not what is in the message."""
    pieces, at, place = [], 0, 0
    for edit in edits:
        assert at <= edit.start <= edit.end <= len(raw)
        kept = edit.start - at
        pieces += [new[place : place + kept], raw[edit.start : edit.end]]
        place += kept + len(edit.new)
        assert new[place - len(edit.new) : place] == edit.new.encode("latin-1")
        at = edit.end
    return b"".join([*pieces, new[place:]])


def instrument(raw: bytes, *, force: bool = False, **options: Any) -> tuple[bytes, tracker.Report]:
    """Instrument a message, and see that undoing gives it back and that a second time changes nothing."""
    wanted = how(**options)
    new, report = tracker.instrument_message(raw, wanted, force=force)
    assert undone(raw, new, report.edits) == raw
    again, report_again = tracker.instrument_message(new, wanted, force=force)
    assert again == new
    assert (report_again.edits, report_again.wrapped) == ([], [])
    return new, report


def left_alone(raw: bytes, part: str, reason: str, **options: Any) -> None:
    """A message that stays as it is, with the reason in the report."""
    new, report = instrument(raw, **options)
    assert new == raw
    assert [said for name, said in report.skipped if name == part and reason in said], report.skipped
    assert (report.edits, report.wrapped, report.touched) == ([], [], [])
    assert report.pixel.startswith("not placed")


def lines(text: str, ends: str) -> bytes:
    """A text of LF lines with these line ends, a byte a character."""
    return text.replace("\n", ends).encode("latin-1")


def single(body: bytes | str, *headers: str, kind: str = "text/html; charset=utf-8", ends: str = "\r\n") -> bytes:
    """A message of one part."""
    head = ["From: a@acme.com", "Subject: Sale", "MIME-Version: 1.0", f"Content-Type: {kind}", *headers, "", ""]
    return ends.join(head).encode("latin-1") + (body.encode() if isinstance(body, str) else body)


def part(kind: str, body: bytes | str, *headers: str, ends: str = "\r\n") -> bytes:
    """A part of a multipart."""
    head = ends.join([f"Content-Type: {kind}", *headers, "", ""]).encode("latin-1")
    return head + (body.encode() if isinstance(body, str) else body)


def parts(*inner: bytes, boundary: str = "b1", ends: str = "\r\n", close: str = "--") -> bytes:
    """The body of a multipart."""
    edge = f"--{boundary}".encode()
    end = ends.encode()
    body = b"".join(edge + end + each + end for each in inner)
    return body + (edge + close.encode() + end if close else b"")


def multipart(kind: str, *inner: bytes, boundary: str = "b1", headers: tuple[str, ...] = ()) -> bytes:
    """A message of several parts."""
    return single(parts(*inner, boundary=boundary), *headers, kind=f'multipart/{kind}; boundary="{boundary}"')


def body_of(message: bytes) -> bytes:
    """What stands behind the first blank line."""
    return re.split(rb"\r\n\r\n|\n\n|\r\r", message, maxsplit=1)[1]


def unquote_qp(body: bytes) -> bytes:
    """Decode quoted-printable as mail programs do: an "=" that is no escape stands for itself."""
    body = re.sub(rb"[ \t]+(?=[\r\n]|\Z)", b"", body)
    body = re.sub(rb"=(?:\r\n|\n|\r|\Z)", b"", body)
    return re.sub(rb"=([0-9A-Fa-f]{2})", lambda escape: bytes.fromhex(escape[1].decode()), body)


def qp(text: str) -> str:
    """Encode the least that quoted-printable needs."""
    return text.replace("=", "=3D")


def assert_lines_fit(raw: bytes, new: bytes) -> None:
    """No line that is new is longer than quoted-printable allows, begins with a dot, or ends otherwise than others."""
    old, now = (re.split(rb"\r\n|\n|\r", each) for each in (raw, new))
    assert [line for line in Counter(now) - Counter(old) if len(line) > 76] == []
    assert sum(line.startswith(b".") for line in now) <= sum(line.startswith(b".") for line in old)
    assert {*re.findall(rb"\r\n|\n|\r", new)} <= {*re.findall(rb"\r\n|\n|\r", raw)}


def expected(page: bytes, charset: str = "utf-8") -> bytes:
    """What instrument_html makes of the bytes of a page."""
    return tracker.instrument_html(page.decode(charset), how())[0].encode(charset)


QP = "Content-Transfer-Encoding: quoted-printable"
BASE64 = "Content-Transfer-Encoding: base64"


# -- Bytes


@pytest.mark.parametrize("ends", BREAKS)
def test_only_the_html_part_changes_and_it_changes_as_html_does(ends: str) -> None:
    before = lines(
        "From alice Tue Nov 24 10:00:00 2026\nFrom: a@acme.com\nX-Odd:   two  spaces \nSubject: =?utf-8?q?S=C3=A4le?=\n"
        'Content-Type: multipart/alternative;\n\tboundary="b1"\n\na preamble\n--b1\n'
        f"Content-Type: text/plain\n\n{URL}\n--b1  \ncontent-TYPE: Text/HTML\n\n",
        ends,
    )
    after = lines("\n--b1--\t\nan epilogue <a href='http://acme.com/'>x</a>\n\n\n", ends)
    new, report = instrument(before + PAGE.encode() + after)
    assert new == before + expected(PAGE.encode()) + after
    assert report.wrapped == [URL]
    assert report.touched == ["2 text/html"]
    assert report.skipped == [("1 text/plain", "plain text is left as it is")]
    assert report.pixel == "placed before </body>"
    assert (report.size_before, report.size_after) == (len(PAGE), len(expected(PAGE.encode())))


@pytest.mark.parametrize("ends", ["\r\n", "\n", "\r"])
@pytest.mark.parametrize("final", [True, False])
def test_line_ends_and_a_missing_final_one_stay_as_they_are(ends: str, final: bool) -> None:
    page = PAGE.replace("<", "\n<") + "\n" * final
    raw = single(lines(page, ends), ends=ends)
    new, _ = instrument(raw)
    assert new == single(expected(lines(page, ends)), ends=ends)


def test_mixed_line_ends_stay_as_they_are() -> None:
    raw = single(PAGE.replace("<p>", "\n<p>\r\n\r<br>\n\r\n"))
    new, _ = instrument(raw)
    assert body_of(new) == expected(body_of(raw))


def test_an_mbox_line_before_the_headers_is_no_header() -> None:
    raw = b"From alice@acme.com Tue Nov 24 10:00:00 2026\n" + single(PAGE, ends="\n")
    new, report = instrument(raw)
    assert report.wrapped == [URL]
    assert body_of(new) == expected(PAGE.encode())


def test_the_end_of_a_multipart_may_be_missing() -> None:
    kind = 'multipart/alternative; boundary="b1"'
    raw = single(parts(part("text/plain", "x"), part("text/html", PAGE), close=""), kind=kind)
    new, report = instrument(raw)
    assert report.wrapped == [URL]
    assert new == raw.replace(PAGE.encode(), expected(PAGE.encode()))


def test_a_final_line_break_may_be_missing_behind_the_last_boundary() -> None:
    raw = multipart("mixed", part("text/html", PAGE)).rstrip(b"\r\n")
    new, report = instrument(raw)
    assert report.wrapped == [URL]
    assert new.endswith(b"</html>\r\n--b1--")


@pytest.mark.parametrize("boundary", ["b1", "b1-", "b1--", "--b1", "=_b 1", "b1'()+_,-./:=?", "b" * 70])
def test_boundaries_may_be_of_any_kind(boundary: str) -> None:
    new, report = instrument(
        multipart("alternative", part("text/plain", "x"), part("text/html", PAGE), boundary=boundary)
    )
    assert report.touched == ["2 text/html"]
    assert body_of(new) == parts(part("text/plain", "x"), part("text/html", expected(PAGE.encode())), boundary=boundary)


@pytest.mark.parametrize(
    "outer, inner", [("abc", "abcd"), ("abcd", "abc"), ("abc", "abc_1"), ("a", "-a"), ("Abc", "abc")]
)
def test_boundaries_may_be_similar(outer: str, inner: str) -> None:
    inside = part(
        f"multipart/alternative; boundary={inner}",
        parts(part("text/plain", "x"), part("text/html", PAGE), boundary=inner),
    )
    _, report = instrument(multipart("mixed", inside, part("application/pdf", "%PDF"), boundary=outer))
    assert report.touched == ["1.2 text/html"]
    assert [name for name, _ in report.skipped] == ["1.1 text/plain", "2 application/pdf"]


def test_an_inner_multipart_without_an_end_is_ended_by_the_outer_one() -> None:
    inside = part("multipart/alternative; boundary=in", parts(part("text/html", PAGE), boundary="in", close=""))
    raw = multipart("mixed", inside, part("text/html", PAGE, "Content-Disposition: attachment"))
    new, report = instrument(raw)
    assert report.touched == ["1.1 text/html"]
    assert new == raw.replace(PAGE.encode(), expected(PAGE.encode()), 1)


@pytest.mark.parametrize(
    "line", ["--b1x", "--b1 x", " --b1", "--b1---", "--b", "x--b1"], ids=lambda line: str(line).replace(" ", "_")
)
def test_a_line_like_a_boundary_is_none(line: str) -> None:
    page = f"<pre>\r\n{line}\r\n</pre>{PAGE}"
    new, report = instrument(multipart("mixed", part("text/html", page)))
    assert report.touched == ["1 text/html"]
    assert body_of(new) == parts(part("text/html", expected(page.encode())))


# -- Transfer encodings: quoted-printable


@pytest.mark.parametrize("ends", BREAKS)
def test_of_quoted_printable_only_the_edited_span_is_new(ends: str) -> None:
    before = lines(
        "=3chtml=3E =\n caf=c3=a9 = x =zz  \t\n.dot =2e =\t \n" + "long " * 30 + "\n<body>\n<p>a =\n<a href=3D'", ends
    )
    middle = lines("'>=e2=80=9d</a>\nmore=20=\nand =41 more  \n", ends)
    after = lines("</body>\n.\n=20\n</html>", ends)
    raw = single(before + b"http://acme.com/" + middle + after, QP, ends=ends)
    new, report = instrument(raw)
    assert report.wrapped == ["http://acme.com/"]
    body = body_of(new)
    assert body.startswith(before)
    assert middle in body
    assert body.endswith(after)
    assert unquote_qp(body) == expected(unquote_qp(body_of(raw)))
    assert_lines_fit(raw, new)
    assert len(re.findall(rb"(?<!\r)\n", new)) == (0 if ends == "\r\n" else new.count(b"\n"))


@pytest.mark.parametrize("ends", BREAKS)
@pytest.mark.parametrize(
    "value", ["http://acme.=\ncom/a=3D=\n1", "=\nhttp://acme.com/a=3D1=\n", "http=3a//acme.com/a=\n=3d1"]
)
def test_a_link_may_stand_over_soft_line_breaks(value: str, ends: str) -> None:
    raw = single(lines(f'<p>x</p><a href=3D"{value}">y</a>', ends), QP, ends=ends)
    new, report = instrument(raw)
    assert report.wrapped == ["http://acme.com/a=1"]
    assert unquote_qp(body_of(new)) == expected(unquote_qp(body_of(raw)))
    assert_lines_fit(raw, new)


@pytest.mark.parametrize("ends", BREAKS)
def test_many_links_may_stand_on_a_line(ends: str) -> None:
    raw = single(
        lines('<a href=3D"http://a.de/">.</a><a href=3Dhttp://b.de/>.</a>=\n.<a href=3D"http://c.de/">', ends), QP
    )
    new, report = instrument(raw)
    assert report.wrapped == ["http://a.de/", "http://b.de/", "http://c.de/"]
    assert unquote_qp(body_of(new)) == expected(unquote_qp(body_of(raw)))
    assert_lines_fit(raw, new)


@pytest.mark.parametrize("ends", BREAKS)
@pytest.mark.parametrize("tail", ["", "=\n", "\n", "=\n.x", "\n.x", ".", "..", "...=\nx"])
def test_quoted_printable_lines_stay_short_wherever_a_link_begins(tail: str, ends: str) -> None:
    for column in range(10, 77):
        for quote in ("", '"', "'"):
            text = "x" * (column - len(f"<a href=3D{quote}")) + f"<a href=3D{quote}"
            value = f"http://acme.com/{quote}"
            raw = single(lines(f"{text}=\n{value}>{tail}", ends), QP, ends=ends)
            if len(text + value) < 76:
                raw = single(lines(f"{text}{value}>{tail}", ends), QP, ends=ends)
            new, report = instrument(raw)
            assert report.wrapped == ["http://acme.com/"]
            assert unquote_qp(body_of(new)) == expected(unquote_qp(body_of(raw)))
            assert_lines_fit(raw, new)


@pytest.mark.parametrize("ends", BREAKS)
@pytest.mark.parametrize("last", [".", "x", "=3D", "=2E", "=20", "..", "=C3=A9"])
@pytest.mark.parametrize("behind", ["", "</body>", "</body>\n", "\n", "=\n", "=\n</body>", "<!-- .", "=\n.</p", " \n"])
def test_quoted_printable_lines_stay_short_wherever_the_pixel_goes(last: str, behind: str, ends: str) -> None:
    for column in range(len(last), 77):
        line = "x" * (column - len(last)) + last
        if len(line) + len(behind.partition("\n")[0]) > 76:
            continue
        raw = single(lines(line + behind, ends), QP, ends=ends)
        new, _ = instrument(raw)
        assert unquote_qp(body_of(new)) == expected(unquote_qp(body_of(raw)))
        assert_lines_fit(raw, new)


@pytest.mark.parametrize("behind", ["", ".", "...", "." * 30, "." * 69, ".=\n.", "=\n.", "\n."])
@pytest.mark.parametrize("ends", BREAKS)
def test_quoted_printable_lines_stay_short_behind_a_pixel_at_the_top(behind: str, ends: str) -> None:
    for before in range(76 - len(f"<body>{behind.partition(chr(10))[0]}")):
        raw = single(lines(f"{'x' * before}<body>{behind}", ends), QP, ends=ends)
        new, report = instrument(raw, pixel="top")
        assert report.pixel == "placed first in the body, behind <body>"
        assert unquote_qp(body_of(new)) == unquote_qp(body_of(raw)).replace(b"<body>", b"<body>" + PIXEL.encode())
        assert_lines_fit(raw, new)


@pytest.mark.parametrize("length", [0, 1, 30, 60, 74])
@pytest.mark.parametrize("ends", BREAKS)
def test_a_line_stays_short_behind_a_link_that_ends_in_a_line_break(length: int, ends: str) -> None:
    raw = single(lines(f'<a href=3D"http://acme.com/\n">{"x" * length}', ends), QP, ends=ends)
    new, report = instrument(raw)
    assert report.wrapped == ["http://acme.com/"]
    assert unquote_qp(body_of(new)) == expected(unquote_qp(body_of(raw)))
    assert_lines_fit(raw, new)


def test_a_line_stays_short_between_links_that_end_in_line_breaks() -> None:
    raw = single('<a href=3D"http://a.de/\r\n"><a href=3D"http://b.de/\r\n"><a href=3D"http://c.de/\r\n">.', QP)
    new, _ = instrument(raw)
    assert unquote_qp(body_of(new)) == expected(unquote_qp(body_of(raw)))
    assert_lines_fit(raw, new)


@pytest.mark.parametrize(
    "body", ["", "=", "=\r\n", "\r\n", "x=", "x  ", "  ", "=\r\n=\r\n", "x=\r\n\r\n", "=3", "x =\t"]
)
def test_a_quoted_printable_part_may_end_anyhow(body: str) -> None:
    raw = single(body, QP)
    new, _ = instrument(raw)
    assert unquote_qp(body_of(new)) == expected(unquote_qp(body.encode()))


# -- Transfer encodings: base64


def in_base64(data: bytes, width: int, ends: str) -> bytes:
    """Encode in lines of this width."""
    letters = base64.b64encode(data).decode()
    return "".join(letters[at : at + width] + ends for at in range(0, len(letters), width)).encode()


@pytest.mark.parametrize("ends", BREAKS)
@pytest.mark.parametrize("width", [76, 72, 60, 4])
def test_base64_keeps_its_width_its_line_ends_and_the_lines_before_the_first_edit(width: int, ends: str) -> None:
    page = ("<p>" + "Hällo " * 60 + "</p>" + PAGE).encode()
    raw = single(in_base64(page, width, ends), BASE64, ends=ends)
    new, report = instrument(raw)
    assert report.wrapped == [URL]
    old_lines, new_lines = (body_of(each).decode().split(ends) for each in (raw, new))
    assert base64.b64decode("".join(new_lines)) == expected(page)
    assert {len(line) for line in new_lines[:-2]} == {width}
    assert new_lines[-1] == ""
    kept = page.index(b"https://") // 3 * 4 // width
    assert new_lines[:kept] == old_lines[:kept]


def test_base64_in_one_long_line_stays_one_line() -> None:
    page = ("x" * 3000 + PAGE).encode()
    new, _ = instrument(single(base64.b64encode(page), BASE64))
    assert body_of(new) == base64.b64encode(expected(page))


def test_base64_in_one_short_line_gets_lines_of_the_usual_width() -> None:
    new, _ = instrument(single(base64.b64encode(b"<p>x</p>"), BASE64))
    new_lines = body_of(new).split(b"\r\n")
    assert base64.b64decode(b"".join(new_lines)) == expected(b"<p>x</p>")
    assert {len(line) for line in new_lines[:-1]} == {76}


@pytest.mark.parametrize("behind", ["", "\r\n", "\r\n\r\n\r\n", "  \r\n", "\r\n \r\n"])
def test_blank_lines_behind_base64_stay(behind: str) -> None:
    raw = single(in_base64(PAGE.encode(), 76, "\r\n").rstrip() + behind.encode(), BASE64)
    new, report = instrument(raw)
    assert report.wrapped == [URL]
    assert base64.b64decode(body_of(new)) == expected(PAGE.encode())
    assert re.findall(rb"\s*\Z", new)[0] == behind.encode()


def test_base64_lines_may_have_odd_lengths() -> None:
    letters = base64.b64encode(PAGE.encode())
    raw = single(b"\r\n".join([letters[:7], b"", letters[7:50], letters[50:99], letters[99:]]), BASE64)
    new, _ = instrument(raw)
    assert base64.b64decode(body_of(new)) == expected(PAGE.encode())


def test_base64_lines_of_odd_lengths_stay_up_to_the_first_edit() -> None:
    page = b"x" * 60 + PAGE.encode()
    letters = base64.b64encode(page)
    kept = letters[:7] + b"  \r\n\r\n" + letters[7:20] + b"\r\n" + letters[20:60] + b"\r\n"
    new, _ = instrument(single(kept + letters[60:], BASE64))
    assert body_of(new).startswith(kept)
    assert base64.b64decode(body_of(new)) == expected(page)


@pytest.mark.parametrize(
    "body",
    [
        "PGI+!",
        "PGI",
        "PGI+P",
        "=PGI",
        "PGI+\r\n-- \r\nlist footer",
        "PGI=PGI+",
        "PGI+ PGI+",
        "PG\xe9+",
        "====",
        "PGI+==",
    ],
)
def test_base64_that_is_broken_is_left_alone(body: str) -> None:
    left_alone(single(body.encode("latin-1"), BASE64), "1 text/html", "base64")


def test_an_empty_base64_part_gets_the_pixel() -> None:
    new, _ = instrument(single("", BASE64))
    assert base64.b64decode(body_of(new)) == PIXEL.encode()


# -- Transfer encodings: those that encode nothing, and words that are none


@pytest.mark.parametrize(
    "token", ["", "7bit", "7Bit", "7bits", "7-bit", "8bit", "8BIT", "8bits", "8-bit", "8bit;", "binary", " 8bit ; "]
)
def test_plain_encodings_are_spliced(token: str) -> None:
    page = PAGE.replace("Hello", "Grüße")
    new, report = instrument(single(page, f"Content-Transfer-Encoding: {token}"))
    assert report.wrapped == [URL]
    assert body_of(new) == expected(page.encode())


@pytest.mark.parametrize("token", ["quoted-printable", "Quoted-Printable", "quoted printable", "quoted-printable;"])
def test_quoted_printable_may_be_called_so(token: str) -> None:
    new, report = instrument(single(qp(PAGE), f"Content-Transfer-Encoding: {token}"))
    assert report.wrapped == [URL]
    assert unquote_qp(body_of(new)) == expected(PAGE.encode())


@pytest.mark.parametrize(
    "token", ["text/html", "x-uuencode", "uuencode", "utf-8", "base-64", "7bit 8bit", "\xe9", "=3D"]
)
def test_unknown_transfer_encodings_are_left_alone(token: str) -> None:
    left_alone(single(PAGE, f"Content-Transfer-Encoding: {token}"), "1 text/html", "Content-Transfer-Encoding")


def test_two_transfer_encodings_are_left_alone() -> None:
    left_alone(
        single(PAGE, "Content-Transfer-Encoding: 7bit", QP), "1 text/html", "2 headers Content-Transfer-Encoding"
    )


@pytest.mark.parametrize("token", ["quoted-printable", "base64", "x-gzip"])
def test_a_multipart_that_is_encoded_itself_is_left_alone(token: str) -> None:
    raw = multipart("mixed", part("text/html", PAGE), headers=(f"Content-Transfer-Encoding: {token}",))
    left_alone(raw, "multipart/mixed", "Content-Transfer-Encoding")


@pytest.mark.parametrize("ends", BREAKS)
def test_lines_that_would_get_too_long_are_broken_inside_the_tags_only(ends: str) -> None:
    page = "".join(f'<p>a <a class="x" href="http://acme.com/{n}" id=y>link</a> b.</p>' for n in range(15)) + "</body>"
    assert len(page) < 998
    new, report = instrument(single(page, ends=ends))
    assert len(report.wrapped) == 15
    body = body_of(new).decode()
    assert max(map(len, body.split(ends))) <= 998
    assert re.sub(r"<[^>]*>", "", body) == re.sub(r"<[^>]*>", "", page)
    assert BLANKS.sub(b"", body.encode()) == BLANKS.sub(b"", expected(page.encode()))
    assert re.findall(r'href="([^"]*)"', body) == [tracked(f"http://acme.com/{n}") for n in range(15)]


@pytest.mark.parametrize("length", range(700, 1000, 7))
@pytest.mark.parametrize("before, behind", [("x", ""), ("", "x")])
def test_no_line_passes_998_by_our_doing(length: int, before: str, behind: str) -> None:
    page = PAGE.replace("Hello", before * (length - len(PAGE))).replace("Sale", behind * (length - len(PAGE)))
    new, report = instrument(single(f"{page}\r\n<p>.</p>\r\n"))
    assert report.wrapped == [URL]
    assert max(map(len, new.split(b"\r\n"))) <= 998
    assert new.endswith(b"</body></html>\r\n<p>.</p>\r\n")


def test_a_line_that_was_too_long_already_gets_no_longer_than_it_was() -> None:
    page = "x" * 3000 + PAGE + "y" * 3000
    new, report = instrument(single(page))
    assert report.wrapped == [URL]
    assert max(map(len, new.split(b"\r\n"))) <= len(page)
    assert re.sub(rb"<[^>]*>", b"", body_of(new)).decode() == re.sub("<[^>]*>", "", page)


def test_a_link_whose_tracked_form_is_longer_than_a_line_is_left_with_the_reason() -> None:
    long = "http://acme.com/" + "x" * 800
    new, report = instrument(single(PAGE.replace(URL, long) + PAGE))
    assert report.wrapped == [URL]
    assert [(url, "longer than a line" in reason) for url, reason in report.left] == [(long, True)]
    assert f'href="{long}"'.encode() in new


@pytest.mark.parametrize("headers", [(QP,), (BASE64,), ("Content-Transfer-Encoding: binary",)])
def test_a_long_link_is_wrapped_where_lines_do_not_matter(headers: tuple[str, ...]) -> None:
    long = "http://acme.com/" + "x" * 1500
    page = PAGE.replace(URL, long).encode()
    _, report = instrument(single(base64.encodebytes(page) if headers == (BASE64,) else page, *headers))
    assert report.wrapped == [long]


# -- Charsets


@pytest.mark.parametrize(
    "label",
    [
        *(
            "default",
            "default_charset",
            "unknown-8bit",
            "x-unknown",
            "gb2312_charset",
            "chinesebig5",
            "_",
            "..",
            "x" * 900,
        ),
        *("hex", "base64", "rot13", "rot_13", "punycode", "undefined", "unicode-escape", "raw_unicode_escape", "idna"),
        *("zlib", "bz2", "uu", "quopri", "aliases", "mbcs", "oem", '"a b"', "a\xe9", "utf8mb4", "ansi_x3.4", "utf-8;"),
    ],
)
def test_a_charset_that_nobody_knows_does_not_matter_to_what_is_ascii(label: str) -> None:
    page = PAGE.replace("Hello", "H\xe9llo").encode("latin-1")
    new, report = instrument(single(page, kind=f"text/html; charset={label}"))
    assert report.wrapped == [URL]
    assert body_of(new) == expected(page, "latin-1")


@pytest.mark.parametrize("label", ["default", "hex", "rot13", "punycode", "unicode-escape", "us-ascii", "utf-8"])
def test_a_url_that_can_not_be_read_in_its_charset_is_left(label: str) -> None:
    page = '<a href="http://acme.com/gr\xfcn">x</a>'.encode("latin-1")
    new, report = instrument(single(page, kind=f"text/html; charset={label}"))
    assert report.wrapped == []
    assert report.left == [("http://acme.com/gr\xfcn", "its characters can't be read in the part's charset")]
    assert body_of(new) == page + PIXEL.encode()


@pytest.mark.parametrize(
    "label, url",
    [
        ("iso-8859-1", "http://acme.com/grün"),
        ("windows-1252", "http://acme.com/“5€”"),
        ("utf-8", "https://bücher.example/é?ü#✓"),
        ("UTF-8", "https://acme.com/😀"),
        ("Shift_JIS", "https://acme.com/表示能力"),
        ("euc-jp", "https://acme.com/日本"),
        ("gb2312", "https://acme.com/中文"),
        ("gb18030", "https://acme.com/中€文"),
        ("big5", "https://acme.com/功能"),
        ("koi8-r", "https://acme.com/привет"),
        ("iso-2022-jp", "https://acme.com/ユーザー名"),
    ],
)
@pytest.mark.parametrize("headers", [(), (QP,), (BASE64,)])
def test_a_url_that_is_not_ascii_is_read_in_the_charset_of_its_part(
    label: str, url: str, headers: tuple[str, ...]
) -> None:
    page = PAGE.replace(URL, url).encode(label)
    body = {(): page, (QP,): binascii.b2a_qp(page), (BASE64,): base64.encodebytes(page)}[headers]
    new, report = instrument(single(body, *headers, kind=f'text/html; charset="{label}"'))
    assert report.wrapped == [url]
    assert email.message_from_bytes(new).get_payload(decode=True) == expected(page, label)


@pytest.mark.parametrize(
    "label, text",
    [
        ("iso-2022-jp", "ユーザー名 メーカー様"),
        ("iso-2022-jp-2", "メーカー様 한글"),
        ("iso-2022-jp-ext", "メーカー様"),
        ("iso-2022-jp-ext", "ｼﾅﾘｵ 表ｼﾅﾘｵ"),
        ("iso-2022-kr", "한글 메일을 드립니다 낯설다"),
        ("hz-gb-2312", "中文。“￥”"),
        ("hz", "中文~ 中文"),
    ],
)
def test_letters_that_look_like_markup_in_a_shifting_charset_hide_no_link(label: str, text: str) -> None:
    page = f'{text}<a title="{text}" href="{URL}">{text}</a>{text}<p>{text}</p></body>'.encode(
        "hz" if label == "hz-gb-2312" else label
    )
    new, report = instrument(single(page, kind=f"text/html; charset={label}"))
    assert report.wrapped == [URL]
    assert body_of(new) == page.replace(URL.encode(), tracked(URL).encode()).replace(
        b"</body>", PIXEL.encode() + b"</body>"
    )


@pytest.mark.parametrize("label", ["iso-2022-jp", "iso-2022-kr", "utf-8"])
def test_the_marks_of_hz_are_text_in_other_charsets(label: str) -> None:
    page = f'<p>~{{</p><a href="{URL}">x</a></body>'
    new, report = instrument(single(page, kind=f"text/html; charset={label}"))
    assert report.wrapped == [URL]
    assert body_of(new) == expected(page.encode())


@pytest.mark.parametrize("label", ["iso-2022-jp", "iso-2022-jp-2"])
@pytest.mark.parametrize("letters", [b"\x1b(I<EX5\x1b(B", b"\x1b.A\x1bN<a", b"\x1b$BMM\x1bN<MM<M\x1b(B"])
def test_katakana_and_letters_of_a_single_shift_hide_no_link(letters: bytes, label: str) -> None:
    page = letters + f'<a href="{URL}">'.encode()
    new, report = instrument(single(page, kind=f"text/html; charset={label}"))
    assert report.wrapped == [URL]
    assert body_of(new) == letters + f'<a href="{tracked(URL)}">{PIXEL}'.encode()


def test_two_tildes_of_hz_are_one_and_hide_nothing() -> None:
    new, report = instrument(single(f'~~{{<a href="{URL}">', kind="text/html; charset=hz"))
    assert report.wrapped == [URL]
    assert body_of(new) == f'~~{{<a href="{tracked(URL)}">{PIXEL}'.encode()


@pytest.mark.parametrize(
    "label, page, headers, reason",
    [
        ("utf-16", base64.encodebytes(PAGE.encode("utf-16")), (BASE64,), "in UTF-16 or UTF-32; send it in UTF-8"),
        ("utf-16-le", base64.encodebytes(PAGE.encode("utf-16-le")), (BASE64,), "UTF-16"),
        ("utf-32-be", base64.encodebytes(PAGE.encode("utf-32-be")), (BASE64,), "UTF-16"),
        ("utf-8", base64.encodebytes(PAGE.encode("utf-16")), (BASE64,), "UTF-16"),
        ("utf-8", base64.encodebytes(codecs.BOM_UTF16_BE + PAGE.encode("utf-16-be")), (BASE64,), "UTF-16"),
        ("utf-8", base64.encodebytes(codecs.BOM_UTF32_BE + PAGE.encode("utf-32-be")), (BASE64,), "UTF-16"),
        ("utf-7", PAGE.encode(), (), "utf-7"),
        ("unicode-1-1-utf-7", PAGE.encode(), (), "utf-7"),
        ("cp037", PAGE.encode("cp037"), (), "cp037"),
        ("johab", PAGE.encode(), (), "johab"),
    ],
)
def test_charsets_that_can_not_be_edited_exactly_are_left_alone(
    label: str, page: bytes, headers: tuple[str, ...], reason: str
) -> None:
    raw = single(page, *headers, kind=f"text/html; charset={label}")
    new, report = instrument(raw)
    assert new == raw
    assert [name for name, said in report.skipped if re.search(reason, said)] == ["1 text/html"], report.skipped


def test_the_mark_of_utf_8_stays_first() -> None:
    page = b"\xef\xbb\xbf" + PAGE.encode()
    new, _ = instrument(single(page))
    assert body_of(new) == expected(page)


# -- Which parts


def nested(depth: int) -> bytes:
    """HTML in this many multiparts, with a part before and one behind it at each depth."""
    inside = part("text/html", PAGE)
    for level in range(depth, 0, -1):
        kind = ("mixed", "Alternative", "RELATED")[level % 3]
        around = (part("text/plain", "x"), inside, part("image/png", "\x89PNG"))
        inside = part(f"Multipart/{kind}; boundary=b{level}.", parts(*around, boundary=f"b{level}."))
    return b"Subject: Sale\r\nMIME-Version: 1.0\r\n" + inside


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 5, 10, 30, 50])
def test_html_is_found_at_any_depth(depth: int) -> None:
    raw = nested(depth)
    new, report = instrument(raw)
    assert report.touched == [(".".join(["2"] * depth) or "1") + " text/html"]
    assert new == raw.replace(PAGE.encode(), expected(PAGE.encode()))
    assert len(report.skipped) == 2 * depth


def test_html_is_given_up_where_it_is_too_deep() -> None:
    left_alone(nested(51), ".".join(["2"] * 50) + " multipart/mixed", "50 other parts")


def test_a_message_of_too_many_parts_is_left_alone() -> None:
    left_alone(multipart("mixed", *[part("text/html", PAGE)] * 1001), "the message", "1,000 parts")


def test_a_part_of_more_links_than_mail_has_is_left_and_the_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "MAX_TAGS", 20)
    page = f'<a href="{URL}">' * 21
    left_alone(single(page), "1 text/html", "more than 20 links and images")
    raw = multipart("mixed", part("text/html", PAGE), part("text/html", page))
    new, report = instrument(raw)
    assert new == raw.replace(PAGE.encode(), expected(PAGE.encode()))
    assert (report.pixel, report.touched) == ("placed before </body>", ["1 text/html"])
    assert report.skipped == [("2 text/html", "it has more than 20 links and images")]


def test_lines_without_end_that_only_begin_like_a_boundary_are_left_alone() -> None:
    like = "--b1x\r\n"
    _, report = instrument(multipart("mixed", part("text/html", like * 9_000 + PAGE)))
    assert report.wrapped == [URL]
    raw = multipart("mixed", part("text/html", like * 10_000 + PAGE))
    left_alone(raw, "multipart/mixed", "10,000 lines or more begin as its boundary does")


def test_two_html_parts_have_their_links_wrapped_and_one_pixel() -> None:
    alternative = part(
        "multipart/alternative; boundary=b2", parts(part("text/plain", "x"), part("text/html", PAGE), boundary="b2")
    )
    raw = multipart(
        "mixed", alternative, part("image/png", "x"), part("text/html", PAGE, "Content-Disposition: inline")
    )
    new, report = instrument(raw)
    assert report.touched == ["1.2 text/html", "3 text/html"]
    assert report.wrapped == [URL, URL]
    assert new.count(PIXEL.encode()) == 1
    assert new.index(PIXEL.encode()) < new.index(b"image/png")
    assert report.size_before == 2 * len(PAGE)


@pytest.mark.parametrize(
    "shown",
    [
        pytest.param(part("text/html", "<b>shown</b>"), id="page"),
        pytest.param(
            part(
                "multipart/related; boundary=b2",
                parts(part("text/html", "<b>shown</b>"), part("text/html", PAGE), boundary="b2"),
            ),
            id="page-with-a-page-in-it",
        ),
    ],
)
def test_of_alternatives_the_last_is_shown_and_has_the_pixel(shown: bytes) -> None:
    raw = multipart("alternative", part("text/plain", "x"), part("text/html", PAGE), shown, part("text/calendar", "x"))
    new, report = instrument(raw)
    assert report.pixel == "placed at the end"
    assert new.count(PIXEL.encode()) == 1
    assert b"<b>shown</b>" + PIXEL.encode() in new
    assert report.wrapped == [URL] * raw.count(URL.encode())


def test_a_pixel_of_ours_in_any_html_part_is_the_only_one() -> None:
    raw = multipart("mixed", part("text/html", PAGE), part("text/html", PIXEL))
    new, report = instrument(raw)
    assert new.count(b"/pixel/") == 1
    assert report.pixel == tracker.PIXEL_THERE


def test_a_message_in_no_need_of_anything_is_returned_as_it_is() -> None:
    raw = single(PAGE)
    new, report = instrument(raw, pixel="none", links=False)
    assert new == raw
    assert (report.touched, report.pixel) == ([], "not placed: not asked for")


HTML = part("text/html", PAGE)
MESSAGE = b"Subject: inner\r\n" + part("text/html", PAGE)

LEFT = [
    # message, part, words of the reason
    pytest.param(single(PAGE, kind="text/plain"), "1 text/plain", "plain text", id="plain-text"),
    pytest.param(b"Subject: x\r\n\r\n" + PAGE.encode(), "1 text/plain", "plain text", id="no-content-type"),
    pytest.param(b"\r\n" + PAGE.encode(), "1 text/plain", "plain text", id="no-headers"),
    pytest.param(b"", "1 text/plain", "plain text", id="nothing"),
    pytest.param(single(PAGE, kind="texthtml"), "1 text/plain", "plain text", id="malformed-type"),
    pytest.param(single(PAGE, kind="text/x-amp-html"), "1 text/x-amp-html", "only text/html", id="amp"),
    pytest.param(single(PAGE, kind="text/watch-html"), "1 text/watch-html", "only text/html", id="watch"),
    pytest.param(single(PAGE, kind="text/calendar"), "1 text/calendar", "only text/html", id="calendar"),
    pytest.param(single(PAGE, kind="text/enriched"), "1 text/enriched", "only text/html", id="enriched"),
    pytest.param(single(PAGE, kind="application/xhtml+xml"), "1 application/xhtml+xml", "only text/html", id="xhtml"),
    pytest.param(single(PAGE, "Content-Disposition: attachment"), "1 text/html", "attachment", id="all-attached"),
    pytest.param(
        multipart("mixed", part("text/html", PAGE, 'Content-Disposition: ATTACHMENT;\r\n filename="a.html"')),
        "1 text/html",
        "attachment",
        id="attachment",
    ),
    pytest.param(
        multipart("mixed", part("text/html", PAGE, "Content-Disposition: x-odd")), "1 text/html", "attachment", id="odd"
    ),
    pytest.param(
        multipart("mixed", part("text/html", PAGE, "Content-Disposition: inline", "Content-Disposition: attachment")),
        "1 text/html",
        "2 headers Content-Disposition",
        id="two-dispositions",
    ),
    pytest.param(single(MESSAGE, kind="message/rfc822"), "1 message/rfc822", "only text/html", id="whole-forwarded"),
    *(
        pytest.param(
            multipart("mixed", part(f"message/{kind}", MESSAGE)), f"1 message/{kind}", "only text/html", id=kind
        )
        for kind in ("rfc822", "partial", "external-body", "global", "delivery-status")
    ),
    *(
        pytest.param(multipart(kind, HTML), f"1 multipart/{kind}", reason, id=kind)
        for kind, reason in [
            ("report", "reports on another message"),
            ("signed", "signed or encrypted"),
            ("encrypted", "signed or encrypted"),
            ("digest", "only text/html"),
            ("parallel", "only text/html"),
            ("form-data", "only text/html"),
        ]
    ),
    *(
        pytest.param(
            multipart("mixed", part(f"multipart/{kind}; boundary=in", parts(HTML, boundary="in"))),
            f"1 multipart/{kind}",
            reason,
            id=f"{kind}-inside",
        )
        for kind, reason in [("report", "reports on"), ("signed", "signed or"), ("encrypted", "signed or")]
    ),
    *(
        pytest.param(single("MIIG", kind=kind), f"1 {kind}", "S/MIME", id=kind.partition("/")[2])
        for kind in ("application/pkcs7-mime", "application/x-pkcs7-mime")
    ),
    pytest.param(single(f"<pre>-----BEGIN PGP SIGNED MESSAGE-----</pre>{PAGE}"), "1 text/html", "PGP", id="inline-pgp"),
    pytest.param(
        single(base64.encodebytes(f"-----BEGIN PGP MESSAGE-----{PAGE}".encode()), BASE64),
        "1 text/html",
        "PGP",
        id="pgp64",
    ),
    pytest.param(single(PAGE, "Content-MD5: Q2hlY2sgSW50ZWdyaXR5IQ=="), "1 text/html", "Content-MD5", id="md5"),
    pytest.param(
        multipart("mixed", HTML, headers=("Content-MD5: Q2hlY2sgSW50ZWdyaXR5IQ==",)),
        "multipart/mixed",
        "Content-MD5",
        id="md5-of-all",
    ),
    pytest.param(
        single(PAGE, "Content-Type: text/html"), "1 text/html", "2 headers Content-Type", id="content-type-twice"
    ),
    pytest.param(
        single(PAGE, "Content-Type: text/plain"), "1 text/html", "2 headers Content-Type", id="two-content-types"
    ),
    pytest.param(
        single(parts(HTML), 'Content-Type: multipart/mixed; boundary="b2"', kind="multipart/mixed; boundary=b1"),
        "multipart/mixed",
        "2 headers Content-Type",
        id="two-boundaries",
    ),
    pytest.param(single(parts(HTML), kind="multipart/mixed; boundary=b2"), "multipart/mixed", "nowhere", id="nowhere"),
    pytest.param(single(parts(HTML), kind="multipart/mixed"), "multipart/mixed", "not given", id="no-boundary"),
    pytest.param(single(parts(HTML), kind='multipart/mixed; boundary=""'), "multipart/mixed", "not given", id="empty"),
    pytest.param(
        single("--b1--\r\n" + PAGE, kind="multipart/mixed; boundary=b1"), "multipart/mixed", "nowhere", id="end"
    ),
    pytest.param(multipart("mixed", b"no header here\r\n\r\n" + HTML), "1", "no header", id="part-without-headers"),
    pytest.param(b"no header here\r\n" + single(PAGE), "the message", "no header", id="message-without-headers"),
    pytest.param(
        b"Content-Type: text/html\r\n" + b"X-A: b\r\n" * 40_000 + b"\r\nx", "the message", "256,000", id="long-headers"
    ),
    pytest.param(single(PAGE, kind=f"text/html; {'a=b; ' * 1000}"), "the message", "4,096", id="long-content-type"),
    pytest.param(single(PAGE, "DKIM-Signature: v=1; a=rsa-sha256"), "the message", "DKIM-Signature", id="dkim"),
    pytest.param(single(PAGE, "dkim-signature: v=1"), "the message", "DKIM-Signature", id="dkim-in-lower-case"),
    pytest.param(single(PAGE, "ARC-Seal: i=1"), "the message", "ARC-Seal", id="arc"),
]


@pytest.mark.parametrize("raw, name, reason", LEFT)
def test_what_must_not_change_or_is_unclear_stays_as_it_is(raw: bytes, name: str, reason: str) -> None:
    left_alone(raw, name, reason)


@pytest.mark.parametrize("raw, name, reason", LEFT)
def test_force_is_for_signatures_over_the_whole_alone(raw: bytes, name: str, reason: str) -> None:
    if reason in ("DKIM-Signature", "ARC-Seal"):
        new, report = instrument(raw, force=True)
        assert report.wrapped == [URL]
        assert body_of(new) == expected(PAGE.encode())
    else:
        left_alone(raw, name, reason, force=True)


def is_a_part(raw: Any, name: Any, reason: Any) -> bool:
    """Whether what is left would be left as a part of another message as well."""
    return bool(
        name != "the message" and reason != "no header" and b"content-type:" in raw.partition(b"\r\n\r\n")[0].lower()
    )


@pytest.mark.parametrize("raw", [pytest.param(case.values[0], id=case.id) for case in LEFT if is_a_part(*case.values)])
def test_what_stays_as_it_is_does_not_keep_html_beside_it_from_being_instrumented(raw: bytes) -> None:
    head, _, body = raw.partition(b"\r\n\r\n")
    outer = b"MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=outer\r\n\r\n"
    raw = outer + parts(raw, HTML, boundary="outer")
    new, report = instrument(raw)
    assert report.touched == ["2 text/html"]
    assert new == outer + parts(head + b"\r\n\r\n" + body, part("text/html", expected(PAGE.encode())), boundary="outer")


def test_a_signature_over_an_attached_message_does_not_matter() -> None:
    attached = part("message/rfc822", b"DKIM-Signature: v=1\r\n" + MESSAGE)
    _, report = instrument(multipart("mixed", HTML, attached))
    assert report.touched == ["1 text/html"]


@pytest.mark.parametrize("odd", ["X-Odd : y", "X-Odd\t: y"])
@pytest.mark.parametrize("header", ["DKIM-Signature: v=1", "Content-MD5: xyz", "Content-Disposition: attachment"])
@pytest.mark.parametrize("ends", ["\r\n", "\n", "\r"])
def test_a_header_with_a_space_before_its_colon_hides_no_header_behind_it(odd: str, header: str, ends: str) -> None:
    raw = single(PAGE, odd, header, ends=ends)
    new, report = instrument(raw)
    assert new == raw
    assert report.wrapped == []


@pytest.mark.parametrize("odd", ["X-Odd : y", "X-Odd\t: y"])
def test_a_header_with_a_space_before_its_colon_hides_no_transfer_encoding(odd: str) -> None:
    raw = single(base64.encodebytes(PAGE.encode()), odd, BASE64)
    new, _ = instrument(raw)
    assert new == raw or base64.b64decode(body_of(new)) == expected(PAGE.encode())


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"Content-Type: text/html", id="no-line-break"),
        pytest.param(b"Content-Type: text/html\r\n", id="no-blank-line"),
        pytest.param(multipart("mixed", b"Content-Type: text/html"), id="no-line-break-in-a-part"),
        pytest.param(multipart("mixed", b"Content-Type: text/html\r\n"), id="no-blank-line-in-a-part"),
        pytest.param(multipart("mixed", b"Content-Type: text/html\r\nX-A: b"), id="several-headers-in-a-part"),
    ],
)
def test_headers_without_a_blank_line_behind_them_get_nothing(raw: bytes) -> None:
    new, report = instrument(raw)
    assert new == raw
    assert report.skipped
    assert report.pixel.startswith("not placed")


@pytest.mark.parametrize(
    "page", ["", "<", "x</", "x<a", "x<!", "x<!--", "x<?", "x</a", "&", "x<a href='", "x</a ", "=", "\r"]
)
def test_a_page_may_end_anyhow_and_still_gets_one_pixel(page: str) -> None:
    new, report = instrument(single(page))
    assert report.pixel.startswith("placed")
    assert body_of(new).replace(PIXEL.encode(), b"") == page.encode()


def test_no_pixel_stands_among_the_letters_of_a_shift_that_does_not_end() -> None:
    page = "メーカー様".encode("iso-2022-jp").removesuffix(b"\x1b(B")
    new, _ = instrument(single(b"<p>x</p>" + page, kind="text/html; charset=iso-2022-jp"))
    assert body_of(new).endswith(page)


# -- List-Unsubscribe


@pytest.mark.parametrize(
    "header",
    [
        f"List-Unsubscribe: <{URL}>",
        f"list-unsubscribe: <mailto:a@acme.com>, <{URL}>",
        f"List-Unsubscribe: <mailto:a@acme.com?subject=x>,\r\n <{URL}>",
        f"List-Unsubscribe:\r\n\t<{URL[:25]}\r\n {URL[25:]}>",
        f"List-Unsubscribe: <http://other.example/>\r\nList-Unsubscribe: <{URL}>",
    ],
)
def test_a_link_that_equals_list_unsubscribe_is_left(header: str) -> None:
    page = PAGE + f'<a href="{URL.replace("&", "&amp;")}">unsubscribe</a><a href="{URL}9">x</a>'
    new, report = instrument(single(page, header))
    assert report.wrapped == [URL + "9"]
    assert report.left == [(URL, "it is the message's List-Unsubscribe")] * 2
    assert header.encode() in new


def test_list_unsubscribe_holds_for_html_in_parts_too() -> None:
    _, report = instrument(multipart("alternative", HTML, headers=(f"List-Unsubscribe: <{URL}>",)))
    assert report.wrapped == []


# -- Real mail


def numbered(message: email.message.Message, number: str = "") -> Iterator[tuple[str, email.message.Message]]:
    """Each part with its number, as IMAP counts; what stands in an attached message has the number of that."""
    yield number or ("" if message.is_multipart() else "1"), message
    if message.is_multipart():
        walked = message.get_content_maintype() == "multipart"
        for n, each in enumerate(message.get_payload(), 1):
            assert isinstance(each, email.message.Message)
            yield from numbered(each, f"{number}.{n}".lstrip(".") if walked else f"{number or 1}!")


def seen(message: email.message.Message) -> tuple[Any, ...]:
    """What a reader sees of a part beside its body."""
    return (message.get_content_type(), message.items(), message.preamble, message.epilogue, message.get_unixfrom())


def decoded(message: email.message.Message) -> bytes:
    """The body of a part without its transfer encoding."""
    bare = copy.copy(message)
    del bare["Content-Transfer-Encoding"]
    body = bare.get_payload(decode=True)
    assert isinstance(body, bytes)
    token = str(message.get("Content-Transfer-Encoding", "")).strip("; \t").lower()
    if token in ("quoted-printable", "quoted printable"):
        return unquote_qp(body)
    return base64.b64decode(body) if token == "base64" else body


def reading(page: bytes, message: email.message.Message, whole: email.message.Message, pixel: bool) -> bytes:
    """What instrument_html makes of a part."""
    lists = "".join(map(str, whole.get_all("List-Unsubscribe", [])))
    spared = re.findall("<([^>]*)>", re.sub(r"\s", "", lists))

    def wrap(url: str) -> str:
        if url in spared:
            raise tracker.BadTarget("it is spared")
        return tracked(url)

    charset = message.get_content_charset() or "utf-8"
    try:
        page.decode(charset)
    except (LookupError, ValueError):
        charset = "latin-1"
    wanted = how(wrap=wrap, pixel="bottom" if pixel else "none")
    return tracker.instrument_html(page.decode(charset), wanted)[0].encode(charset)


def assert_sane(raw: bytes, new: bytes, report: tracker.Report) -> None:
    """The report fits the message, and nobody who reads mail sees another difference than links and the pixel."""
    old_whole, new_whole = email.message_from_bytes(raw), email.message_from_bytes(new)
    old_parts, new_parts = list(numbered(old_whole)), list(numbered(new_whole))
    assert [(number, seen(each)) for number, each in old_parts] == [(number, seen(each)) for number, each in new_parts]
    touched = {each.split()[0] for each in report.touched}
    assert all(each.endswith(" text/html") for each in report.touched)
    assert not touched & {name.split()[0] for name, _ in report.skipped}
    assert new.count(b"/pixel/e1.gif") <= 1
    assert bool(report.edits) == bool(report.touched) == (new != raw)
    pixels = 0
    for (number, old), (_, new_part) in zip(old_parts, new_parts, strict=True):
        if number not in touched:
            if not old.is_multipart():
                assert new_part.get_payload() == old.get_payload()
            continue
        before, after = decoded(old), decoded(new_part)
        has_pixel = b"/pixel/e1.gif" in after
        pixels += has_pixel
        wanted = reading(before, old, old_whole, has_pixel)
        if max(map(len, wanted.splitlines())) > 998:
            after, wanted = BLANKS.sub(b"", after), BLANKS.sub(b"", wanted)
        assert after == wanted
    assert pixels == report.pixel.startswith("placed")
    assert report.size_after >= report.size_before
    for reason in (reason for _, reason in [*report.left, *report.skipped]):
        assert reason


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", [path.name for path in FILES] or ["none"])
def test_real_mail_differs_in_its_links_and_the_pixel_alone(name: str, force: bool, shared: Path) -> None:
    raw = (shared / "mail" / name).read_bytes()
    new, report = instrument(raw, force=force)
    assert_sane(raw, new, report)


@pytest.mark.parametrize("ends", BREAKS)
@pytest.mark.parametrize("name", [path.name for path in FILES] or ["none"])
def test_real_mail_may_come_with_other_line_ends(name: str, ends: str, shared: Path) -> None:
    raw = re.sub(rb"\r\n|\n|\r", ends.encode(), (shared / "mail" / name).read_bytes())
    new, report = instrument(raw, force=True)
    assert_sane(raw, new, report)
    if ends == "\n":
        assert b"\r" not in new
    else:
        assert not re.search(rb"(?<!\r)\n", new)


# -- Random mail


def random_page(chance: random.Random, ends: str) -> str:
    """A small page of links and of what surrounds them in mail."""
    urls = ["http://a.de/", "https://acme.com/?a=1&b=2", "mailto:a@acme.com", "#top", "http://acme.com/" + "p." * 40]
    urls += ["http://acme.com/\u00fc", " http://b.de/x ", f"http://c.de/{ends}", "http://d.de/&amp;=3D", "{{link}}"]
    pieces: list[Callable[[], str]] = [
        lambda: f'<a href="{chance.choice(urls)}">',
        lambda: f"<A class='x' HREF = '{chance.choice(urls)}' id=z>",
        lambda: f"<area href={chance.choice(urls).strip().split(ends)[0]}>",
        lambda: "." * chance.randrange(1, 90),
        lambda: "word " * chance.randrange(1, 20),
        lambda: " " * chance.randrange(1, 5) + ends,
        lambda: ends * chance.randrange(1, 3) + "." * chance.randrange(2),
        lambda: chance.choice(["caf\u00e9", "\u8868", "=", "==", "=3D", "=2E", "\t", "a=b", "</a>", "<p>", "\u00a0"]),
        lambda: chance.choice(["<!-- <a href='http://no.de/'> -->", "<style>a>b</style>", "</body>", "<a href="]),
    ]
    weights = [3, 1, 1, 1, 3, 1, 2, 4, 0.3]
    return "".join(chance.choices(pieces, weights)[0]() for _ in range(chance.randrange(1, 25)))


def random_qp(chance: random.Random, data: bytes, ends: str, odd: bool) -> bytes:
    """Encode anyhow that decodes to the same: more escapes than needed and, if odd, also what is not allowed."""
    out: list[str] = []
    line = ""
    eagerness = chance.choice([0.0, 0.05, 0.5])
    tail = chance.choice([" ", "  \t", ""]) if odd else ""
    width = chance.choice([20, 60, 75, 75, 75]) - len(tail)
    for sign, follows in re.findall(rb"(\r\n|\n|.)(?=(..)?)", data, re.DOTALL):
        if sign == ends.encode():
            last = re.search(r"[ \t]\Z", line)
            if last:
                soft = len(line) + 2 > 76
                line = f"{line[:-1]}=\n={ord(last[0]):02X}" if soft else f"{line[:-1]}={ord(last[0]):02X}"
            out.append(f"{line}{tail}{ends}".replace("\n=", f"{ends}=") if "\n" in line else line + tail + ends)
            line = ""
            continue
        byte = sign[0] if len(sign) == 1 else 13
        token = chr(byte) if 32 <= byte < 127 or byte == 9 else f"={byte:02X}"
        illegal = odd and re.fullmatch(rb"[g-z.<>\"/][a-zA-Z0-9<>./]", follows or b"") and len(line) < 60
        if (byte == 61 and not illegal) or chance.random() < eagerness or (byte == 46 and not line):
            token = f"={byte:02{chance.choice('xX') if odd else 'X'}}"
        if len(line) + len(token) > width:
            out.append(f"{line}={tail}{ends}")
            line = ""
            token = "=2E" if token == "." else token
        line += token
    if line.endswith((" ", "\t")):
        out.append(f"{line[:-1]}={ends}={ord(line[-1]):02X}")
    else:
        out.append(line)
    return "".join(out).encode()


def random_base64(chance: random.Random, data: bytes, ends: str) -> bytes:
    """Encode in lines of some width, with or without a line end, perhaps with blank lines behind."""
    return (
        in_base64(data, chance.choice([76, 72, 60, 64, 4, 10_000]), ends).strip()
        + (ends * chance.randrange(3)).encode()
    )


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("coding", ["quoted-printable", "odd-quoted-printable", "base64", "8bit"])
@pytest.mark.parametrize("ends", BREAKS)
def test_what_is_decoded_is_what_html_alone_becomes(coding: str, ends: str, seed: int) -> None:
    chance = random.Random(f"{coding} {seed}")
    for _ in range(12):
        page = random_page(chance, ends).encode()
        if coding == "base64":
            body = random_base64(chance, page, ends)
        elif coding == "8bit":
            body = page
        else:
            body = random_qp(chance, page, ends, odd=coding.startswith("odd"))
            assert unquote_qp(body) == page, "the test's own encoder is wrong"
        raw = single(body, f"Content-Transfer-Encoding: {coding.removeprefix('odd-')}", ends=ends)
        new, _ = instrument(raw)
        head = len(raw) - len(body)
        assert new[:head] == raw[:head]
        wanted = expected(page)
        if coding == "base64":
            assert base64.b64decode(new[head:]) == wanted
        elif coding == "8bit":
            if max(map(len, wanted.split(ends.encode()))) > 998:
                assert BLANKS.sub(b"", new[head:]) == BLANKS.sub(b"", wanted)
                assert max(map(len, new.split(ends.encode()))) <= max(998, *map(len, raw.split(ends.encode())))
            else:
                assert new[head:] == wanted
        else:
            assert unquote_qp(new[head:]) == wanted
            assert_lines_fit(raw, new)
            if ends == "\r\n":
                assert not re.search(rb"(?<!\r)\n|\r(?!\n)", new)


SAMPLES = [
    nested(2),
    single(qp(PAGE), QP),
    single(base64.encodebytes(PAGE.encode()), BASE64),
    single("ユーザー名 メーカー様".encode("iso-2022-jp") + PAGE.encode(), kind="text/html; charset=iso-2022-jp"),
    single(base64.encodebytes(PAGE.encode("utf-16")), BASE64, kind="text/html; charset=utf-16"),
    multipart("mixed", part("text/html", qp(PAGE), QP), HTML, headers=(f"List-Unsubscribe: <{URL}>",)),
]
TOKENS = [
    *(
        b"\r",
        b"\n",
        b"\r\n",
        b"\r\n\r\n",
        b"\n\n",
        b"--b1",
        b"--b1--",
        b"=",
        b"=\r\n",
        b"=3D",
        b".",
        b'"',
        b"'",
        b"<",
        b">",
    ),
    *(
        b"&",
        b"\0",
        b"\x1b$B",
        b"\x1b(B",
        b"~{",
        b"\xff\xfe",
        b"\xfe\xff",
        b"\x85",
        b"\xe2\x80\xa8",
        b"<!--",
        b"</body>",
    ),
    *(
        b'<a href="http://a.de/">',
        b"Content-Type: text/html; charset=",
        b"utf-16-le",
        b"base64",
        b"hex",
        b"; boundary=b1",
    ),
    *(b"Content-Transfer-Encoding: base64\r\n", b"charset*=hex''x", b"boundary*0=b;", b"From x\n", b"x" * 1000, b" :"),
]


def mutated(chance: random.Random, raw: bytes) -> bytes:
    """A message after a few accidents."""
    data = bytearray(raw)
    for _ in range(chance.choice([1, 1, 2, 5, 20])):
        at = chance.randrange(len(data) + 1)
        to = min(len(data), at + chance.choice([0, 1, 2, 10, 300]))
        accident = chance.randrange(5)
        if accident == 0:
            data[at:to] = b""
        elif accident == 1:
            data[at:at] = data[at:to]
        elif accident == 2:
            data[at:to] = chance.randbytes(to - at)
        elif accident == 3:
            data[at:at] = chance.choice(TOKENS)
        else:
            other = chance.randrange(len(data) + 1)
            data[at:at] = data[other : other + 200]
    return bytes(data)


@pytest.mark.parametrize("origin", ["own", "shared"])
def test_no_accident_raises_touches_a_header_or_can_not_be_undone(origin: str, request: pytest.FixtureRequest) -> None:
    samples = SAMPLES
    if origin == "shared":
        folder: Path = request.getfixturevalue("shared")
        samples = [each for path in sorted((folder / "mail").glob("*.eml")) if len(each := path.read_bytes()) < 100_000]
    chance = random.Random(origin)
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        raw = mutated(chance, chance.choice(samples))
        for force in (False, True):
            new, report = tracker.instrument_message(raw, how(), force=force)
            assert undone(raw, new, report.edits) == raw, raw
            if new != raw:
                old_parts, new_parts = (numbered(email.message_from_bytes(each)) for each in (raw, new))
                assert [seen(each) for _, each in old_parts] == [seen(each) for _, each in new_parts], raw
