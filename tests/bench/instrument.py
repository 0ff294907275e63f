"""How long instrumenting takes: a newsletter in each encoding, ten of it, and what somebody might send to stop us.

Ratios come from one run on one machine: against html.parser of the standard library, which only reads the same page,
and of ten times the size against one.
"""

from __future__ import annotations

import sys
import timeit
from collections.abc import Callable
from email.message import EmailMessage
from email.policy import SMTP
from html.parser import HTMLParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import tracker

ROUNDS = 9
HOSTILE_BYTES = 10_000_000
HOSTILE = (
    *("<", "<a href=", "&", '<a href="', "<a href='x ", "<!--", "</", "<script>", '<a x="', "<a b=c ", '<a href="&amp'),
    *("<a href=http://a.example/>", "<a b=c>", "<!--[if mso]><v:x href=http://a.example/><![endif]-->", "<b>"),
)
HOSTILE_QUOTED = ("=", "=3D", ".", "=\r\n")  # in quoted-printable
ENCODINGS = ("quoted-printable", "base64", "8bit")


def maker() -> tracker.LinkMaker:
    """Links of a tenant whose server is none of the page's."""
    host = "track.example.com"
    return tracker.LinkMaker(f"https://{host}", "k3v9x2mp", "s" * 64, lambda target: target.host == host)


def newsletter(links: int = 80, size: int = 100_000) -> str:
    """A page of about so many bytes."""
    words = "word " * ((size // links - 150) // 5)
    link = '<p style="color:#333">{}&amp; so on <a class="b" href="https://shop.example.com/p/{}?a=1&amp;b={}">more</a></p>\n'
    return "<html><body>\n" + "".join(link.format(words, n, n) for n in range(links)) + "</body></html>\n"


def message(page: str, encoding: str) -> bytes:
    """The page in a message with a plain part before it."""
    made = EmailMessage(policy=SMTP)
    made["Subject"] = "News"
    made.set_content("News")
    made.add_alternative(page, subtype="html", cte=encoding)
    return bytes(made)


HEAD = 'Content-Type: multipart/mixed; boundary="{0}"\r\n\r\n--{0}\r\n'


def nested(size: int) -> bytes:
    """Multiparts in multiparts, none of which ends."""
    return "".join(HEAD.format(n) for n in range(size // 60)).encode()


def nested_alike(size: int) -> bytes:
    """The same as deep as they are read, and then what begins like each of their boundaries."""
    line = "--" + "x" * tracker.MAX_DEPTH
    heads = "".join(HEAD.format("x" * n) for n in range(1, tracker.MAX_DEPTH + 1))
    return (heads + f"{line}\r\n" * 1000 + line * (size // len(line))).encode()


def quoted(unit: str, size: int) -> bytes:
    """A part in quoted-printable."""
    return f"Content-Type: text/html\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n{unit * (size // len(unit))}".encode()


def seconds(work: Callable[..., object], *values: object, rounds: int = ROUNDS) -> float:
    """The shortest of some rounds."""
    return min(timeit.repeat(lambda: work(*values), number=1, repeat=rounds))


def main() -> int:
    """Measure and print."""
    how = tracker.Instrumenting(maker(), "e1")
    page, pages = newsletter(), newsletter(800, 1_000_000)
    html = seconds(tracker.instrument_html, page, how)
    ratio = html / seconds(lambda: HTMLParser().feed(page))
    print(f"instrument {len(page) // 1000} KB of HTML with 80 links: {html * 1000:.1f} ms, {ratio:.2f} of html.parser")
    print(
        f"instrument ten times as much: {seconds(tracker.instrument_html, pages, how, rounds=3) / html:.1f} times as long"
    )
    for encoding in ENCODINGS:
        once = seconds(tracker.instrument_message, message(page, encoding), how)
        more = seconds(tracker.instrument_message, message(pages, encoding), how, rounds=3) / once
        print(f"the same as a message in {encoding}: {once * 1000:.1f} ms; ten times as much: {more:.1f} times as long")
    texts = {repr(unit): (unit * (HOSTILE_BYTES // len(unit))).encode() for unit in HOSTILE}
    mails = {f"{unit!r} in quoted-printable": quoted(unit, HOSTILE_BYTES) for unit in HOSTILE_QUOTED}
    mails |= {"nested multiparts": nested(HOSTILE_BYTES), "boundaries alike": nested_alike(HOSTILE_BYTES)}
    for work, some in ((tracker.instrument_html_bytes, texts), (tracker.instrument_message, mails)):
        for name, raw in some.items():
            print(f"10 MB of {name}: {seconds(work, raw, how, rounds=1):.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
