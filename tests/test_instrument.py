"""Instrumenting: which links are wrapped, where the pixel goes, and that every other byte of HTML and messages stays."""

from __future__ import annotations

import base64
import binascii
import codecs
import copy
import csv
import email
import email.message
import email.policy
import html
import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
from bench import instrument as bench
from conftest import BASE, CHROME, ROOT, SHARED, Mailbox, Server
from test_live import get
from test_readme import codes

import tracker

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import html5lib  # type: ignore[import-untyped]

URL = "https://acme.com/sale?utm_source=mail&id=7"
ROOT_URL = "https://acme.com/"
PIXEL = f'<img src="{BASE}/k3v9x2mp/pixel/e1.gif" width="1" height="1" alt="" style="display:block;float:left">'
PAGE = f'<html><body><p>Hello</p><a href="{URL}">Sale</a></body></html>'
TRACKED = re.compile(rf"{BASE}/k3v9x2mp/click/e1/[\w-]{{16}}/([\w-]+)")
SECONDS = 1.0  # for each kind of accidents

NEWSLETTER = """<!DOCTYPE html>
<html lang="de"><head><meta charset="utf-8"><title>Neues <a href="https://acme.com/title"></title>
<style>a::before { content: '<a href="https://acme.com/style">' }</style></head>
<BODY bgcolor=#ffffff>
<!-- <a href="https://acme.com/comment">old</a> -->
<table><tr><td><A HREF="https://acme.com/sale?a=1&amp;b=2#grün" title="a > b">Grüße</A>
<a class=b href='https://acme.com/O%27Neil?q=s+Bar'>x</a><a href=https://acme.com/plain>y</a>
<!--[if mso]><v:roundrect href="https://acme.com/button" fillcolor="#f00"><![endif]-->
<a href="mailto:a@acme.com">mail</a><a href="#top">top</a><a href="{{unsubscribe_url}}">out</a></td></tr></table>
<script type="application/ld+json">{"url": "<a href='https://acme.com/json'>"}</script>
</BODY></html>
"""
FRAGMENT = (
    '<p>Hello <a href="  https://acme.com/\n  path ">there</a>,\n<br>&copy; <a href="https://acme.com/?a=1&copy=2'
)
WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
PAGES = (NEWSLETTER, FRAGMENT, '<a href="https://acme.com/">x</a>' * 20, "", "plain", "<plaintext></body>")


def is_ours(target: tracker.Target) -> bool:
    return target.host == "track.example.com"


def how(leads_back: Callable[[tracker.Target], bool] = is_ours, **options: Any) -> tracker.Instrumenting:
    """As a tenant's server instruments its email e1."""
    maker = tracker.LinkMaker(BASE, "k3v9x2mp", "s" * 64, leads_back)
    return tracker.Instrumenting(maker, "e1", **options)


def tracked(url: str) -> str:
    """The tracked URL of a URL."""
    return how().wrap(url)


def undone(raw: bytes, new: bytes, edits: list[tracker.Edit]) -> bytes:
    """The input again, each edit taken back; fails if they are not in order, or not what is in the output."""
    pieces, at, place = [], 0, 0
    for edit in edits:
        assert at <= edit.start <= edit.end <= len(raw)
        kept = edit.start - at
        pieces += [new[place : place + kept], raw[edit.start : edit.end]]
        place += kept + len(edit.new)
        assert new[place - len(edit.new) : place] == edit.new.encode("latin-1")
        at = edit.end
    return b"".join([*pieces, new[place:]])


def instrument(text: str, **options: Any) -> tuple[str, tracker.Report]:
    """Instrument HTML, and see that undoing gives it back and that a second time changes nothing."""
    new, report = tracker.instrument_html(text, how(**options))
    raw = text.encode("utf-8", "surrogatepass")
    assert undone(raw, new.encode("utf-8", "surrogatepass"), report.edits) == raw
    again, report_again = tracker.instrument_html(new, how(**options))
    assert (again, report_again.wrapped) == (new, [])
    return new, report


def links_only(text: str) -> tuple[str, list[str]]:
    """The output with TRACKED in place of each tracked link, and the targets that those decode to."""
    new, report = instrument(text, pixel="none")
    targets = [tracker.decode_target(encoded) for encoded in TRACKED.findall(new)]
    assert targets == report.wrapped
    return TRACKED.sub("TRACKED", new), report.wrapped


# == HTML ==

# -- Which links


TAGS = (  # with URL where it stands
    '<a href="URL">', "<a href='URL'>", "<a href=URL>", "<a href=URL class=x>", '<A\tHREF\n=\r\n"URL" >',
    '<area shape="rect" href="URL"/>', '<a/href="URL"/>', '<a class="x"href="URL">', '<a title="a > b" href="URL">',
    '<a title="href=\'https://acme.com/t\'" href="URL">', '<a data-href="https://acme.com/d" href="URL">',
    '<a href="URL" href="https://acme.com/2">',
    # What only looks like a wish not to be tracked.
    *(f'<a {said} href="URL">' for said in (
        'data-track="on"', "data-track", 'clicktracking="on"', 'data-msys-clicktrack="1"', "class=data-no-track",
        'disable-tracking="false"', 'title="data-no-track"', 'data-skip-click="false"', "data-no-tracking",
        'class="untracked-x not-untracked"', 'title="untracked"', 'class=""', "untracked",
    )),
    # What Outlook alone does not see is live.
    *(f'{start}<a href="URL">x</a><!--<![endif]-->' for start in (
        "<!--[if !mso]><!-->", "<!--[if !mso]><!-- -->", "<![if !mso]>",
    )),
    # Signs that begin no tag.
    *(f"{sign}<a href='URL'>" for sign in ("a < b ", "<", "<3 ", "x</>")),
)  # fmt: skip
TARGETS = {  # by what is written
    " \t https://acme.com/a\nb\r\n": "https://acme.com/ab",
    "\x01https://acme.com/\x1f": ROOT_URL,
    "&#104;ttps&colon;&sol;/acme.com/": ROOT_URL,
    **{url: url for url in (
        "HTTPS://Acme.com/Path", "http://acme.com", "https://acme.com/Jack's", 'https://acme.com/"q"',
        "https://acme.com/?u=https://other.example/&href=x", "https://acme.com/?a[]=1&b=%5B%5D&c={&d=|",
        "https://acme.com/#/route?x#y", "https://acme.com/grün?ü=ß", "https://track.example.com.evil.example/",
        "https://other-tracker.example/c?u=https%3A%2F%2Facme.com",
        # What only looks like a placeholder.
        *(ROOT_URL + rest for rest in ("?a=%7Bx%7D", "{", "}{", "%%", "?q=100%25%", "[x]", "*|", "?%recipient")),
        *(ROOT_URL + rest for rest in (
            "?f[0]=a&a[]=1&range=[1,5]", "?filter[status]=new&page[size]=9#x", "?f[aa][bb]=1", "?only[new]", "?x=[a-z]",
            "?in=[[1,2],[3,4]]", "?tags=[red,blue]", "file[1].pdf", "?a=%5BEMAIL%5D", "?a=%7B%22b%22%3A%7B%7D%7D",
            "?q=%20EM%20", "?q=%C3%A4bc%C3%BCd%AAff%BB", "?q=%ABcd%EFgh%AB", "?a=5%&b=6%", "?$filter=a&$top=5",
            "@JohnDoe/post", "@ann@acme.org", "@Track", "~ann/~x", "__init__.py", "#:~:text=a,b", "?a=$5$",
        )),
        "http://[2001:db8::1]/x", "http://[fe80::1]:8080/?a[b]=1",
    )},
}  # fmt: skip


def test_a_link_to_the_web_is_wrapped_and_nothing_but_its_url_changes() -> None:
    for text in TAGS:
        assert links_only(text.replace("URL", ROOT_URL)) == (text.replace("URL", "TRACKED"), [ROOT_URL])
    for written, target in TARGETS.items():
        quote = "'" if '"' in written else '"'
        assert links_only(f"<a href={quote}{written}{quote}>") == (f"<a href={quote}TRACKED{quote}>", [target])


@pytest.mark.parametrize(
    "written, target",
    [
        ("?a=1&amp;b=2", "?a=1&b=2"), ("?a=1&b=2", "?a=1&b=2"), ("?a=1&#038;b=2", "?a=1&b=2"),
        ("?a=1&#x26;b=2", "?a=1&b=2"), ("?a=1&amp;amp;b=2", "?a=1&amp;b=2"), ("?a=1&copy;=2", "?a=1©=2"),
        ("?a=1&copy=2&section=3&times=4", "?a=1&copy=2&section=3&times=4"), ("?a=&copy", "?a=©"),
        ("?a=&copyx", "?a=&copyx"), ("?a=&copy.x", "?a=©.x"), ("?a=&notit;", "?a=&notit;"), ("?a=&notin;", "?a=∉"),
        ("?a=&unknown;", "?a=&unknown;"), ("?a=&#128;", "?a=€"), ("?a=&#228", "?a=ä"),
        ("?a=&#xD800;&#x110000;&#99999999999;", "?a=\ufffd\ufffd\ufffd"), ("?a=&#;&#x;&;", "?a=&#;&#x;&;"),
    ],
)  # fmt: skip
def test_character_references_are_decoded_once_by_the_rule_for_attributes(written: str, target: str) -> None:
    assert links_only(f'<a href="https://acme.com/{written}">')[1] == [f"https://acme.com/{target}"]
    tree = html5lib.parse(f'<a href="https://acme.com/{written}">', namespaceHTMLElements=False)
    assert tree.find(".//a").get("href") == f"https://acme.com/{target}"


PLACEHOLDERS = (
    "{{url}}", "{id}", "${id}", "*|ID|*", "%%id%%", "<%= id %>", "[[id]]", "%recipient.id%", "%recipient_id%", "{% x %}",
    "@TrackLink", "[EMAIL]", "[email]", "[UNIQID]", "[subscriber:email]", "[subscriber:firstname | default:reader]",
    "[Name,fallback=friend]", "[first_name,fallback=]", "[% member:email %]", "$[UD:EMAIL]$", "#{id}", "{!Contact.Email}",
    "%EMAIL%", "%FIRSTNAME%", "%First Name%", "%CAMPAIGN%", "%20%DATE%", "%EMAIL%20", "*%7CEMAIL%7C*", "%7B%7Bid%7D%7D",
    "#recipient:email#", "##EMAIL##", "@@email@@", "~~email~~", "@EMAIL@", "$EMAIL$", "«Email»", "<?= $id ?>",
)  # fmt: skip
LONGEST = ROOT_URL + "x" * (tracker.MAX_TARGET - len(ROOT_URL))
LEFT_LINKS = {  # by a part of the reason
    "it is no absolute http or https link": (
        "mailto:a@acme.com", "tel:+1", "javascript:alert(1)", "data:text/html,x", "cid:1@x", "fb://page",
        "ftp://acme.com/", "/path", "path", "?q", "acme.com", "www.acme.com", "//acme.com/", "http://",
        "https:/acme.com", "https:acme.com", "http:///x", "https://?x", "https:\\\\acme.com\\",
        "intent://acme.com#Intent;scheme=https;end",
    ),
    "placeholder": (*PLACEHOLDERS, *(f"https://acme.com/?x={each}&y=1" for each in PLACEHOLDERS)),
    "it leads to this server already": (
        f"{BASE}/k3v9x2mp/click/e1/x/y", BASE, "http://TRACK.example.com:80/x", "https://track.example.com./",
    ),
    "expected": ("https://user:pw@acme.com/", "https://acme.com:99999/", "https://a b.example/"),
    "it has 4,097 characters; expected at most 4,096": (f"{LONGEST}y",),
}  # fmt: skip


@pytest.mark.parametrize("reason", LEFT_LINKS)
def test_a_link_that_is_left_is_told_with_the_reason(reason: str) -> None:
    for url in LEFT_LINKS[reason]:
        new, report = instrument(f'<a href="{url}">', pixel="none")
        assert new == f'<a href="{url}">'
        assert [(left, reason in said) for left, said in report.left] == [(url, True)]
    assert links_only(f'<a href="{LONGEST}">')[1] == [LONGEST]


def test_a_list_of_a_query_hides_no_placeholder_beside_it() -> None:
    for query in ("?f[aa]=[EMAIL]", "?f[aa][bb]=1&[EMAIL]=1", "?a[]=%EMAIL%", "?f[aa]=1&b=x[EMAIL]", "[EMAIL]?f[aa]=1"):
        assert instrument(f'<a href="https://acme.com/{query}">', pixel="none")[1].wrapped == [], query


def test_empty_links_anchors_and_other_tags_are_left_without_a_word() -> None:
    tags = ("link", "base", "img", "abbr", "article", "form", "v:fill", "v:roundrect", "ab", "svg")
    others = [f'<{tag} href="https://acme.com/" src="https://acme.com/" action="https://acme.com/">' for tag in tags]
    for text in (*others, *(f'<a href="{url}">' for url in ("", " ", "#", "#top", "\n#x"))):
        new, report = instrument(text, pixel="none")
        assert (new, report.wrapped, report.left) == (text, [], [])


@pytest.mark.parametrize(
    "placeholder",
    [
        '{{ url "x" }}',
        '{% url "x" %}',
        '<%= url "x" %>',
        '${url["x"]}',
        '#{url["x"]}',
        '[[data:x:"y"]]',
        '<?= $a["x"] ?>',
    ],
)
def test_a_placeholder_with_the_quotes_of_its_attribute_in_it_is_not_cut_in_two(placeholder: str) -> None:
    text = f'<a href="https://acme.com/{placeholder}">x</a>'
    new, report = instrument(text, pixel="none")
    assert new == text
    (left,) = report.left
    assert left[0] == text.split('"')[1].rstrip() and "placeholder" in left[1]


@pytest.mark.parametrize(
    "said",
    [
        'data-track="off"', "DATA-TRACK=OFF", 'clicktracking="off"', "clicktracking=off", "data-skip-click",
        'data-skip-click="true"', "data-no-track", "data-pm-no-track", "data-as-no-track", "ses:no-track",
        'disable-tracking="true"', 'mc:disable-tracking="true"', "mautic:disable-tracking", 'data-msys-clicktrack="0"',
        'class="untracked"', "CLASS=Untracked", 'class="btn\tuntracked  big"', "class=' untracked\n'",
    ],
)  # fmt: skip
def test_a_tag_may_say_that_its_link_is_not_tracked(said: str) -> None:
    for text in (f'<a {said} href="https://acme.com/">', f'<a href="https://acme.com/" {said}>'):
        new, report = instrument(text, pixel="none")
        assert new == text
        ((url, reason),) = report.left
        assert (url, reason.partition("=")[0]) == (ROOT_URL, f"its tag says {said.partition('=')[0].lower()}")


def test_without_links_only_the_pixel_is_placed() -> None:
    new, report = instrument(NEWSLETTER, links=False)
    assert (new, report.wrapped, report.left) == (NEWSLETTER.replace("</BODY>", PIXEL + "</BODY>"), [], [])


def test_a_tag_of_more_attributes_than_any_has_is_none() -> None:
    words = " b" * (tracker.MAX_ATTRIBUTES - 1)
    assert links_only(f'<a href="https://acme.com/"{words}>')[1] == [ROOT_URL]
    text = f'<a href="https://acme.com/"{words} b>'
    new, report = instrument(text)
    assert (new, report.wrapped) == (PIXEL + text, [])


# -- What holds no link


@pytest.mark.parametrize(
    "hidden",
    [
        "<!-- {} -->", "<!-- {} --!>", "<!--{}-- >-->", "<!-->", "<!--->", "<!-- -- {} > -->", "<!--!>{}-->",
        "<!x {0[0]}x>", "<?php {0[0]}x>", "</ {0[0]}x>", "<style>{}</style>", "<style>{}</styles></style foo>",
        "<STYLE>{}</style/>", "<script>{}</script>", "<script><!-- <script>{}</script>{} --></script>",
        "<script><!-- {} </script>", "<title>{}</title>", "<textarea>{}</TEXTAREA\n>", "<xmp>{}</xmp>",
        "<iframe>{}</iframe>", "<noframes>{}</noframes>",
    ],
)  # fmt: skip
def test_comments_and_raw_text_hold_no_links_and_end_where_browsers_end_them(hidden: str) -> None:
    link = '<a href="https://acme.com/{}">'
    text = hidden.format(link.format("hidden"), link.format("hidden")) + link.format("live")
    assert links_only(text)[1] == ["https://acme.com/live"]


def test_what_does_not_end_is_left_and_the_pixel_stands_before_it() -> None:
    starts = ("<!-- x", "<title>x", "<script>x", "<plaintext>", "<a", "</", "<!", "<![CDATA[x", "<a href='", "<?")
    links = ('<a href="https://acme.com/', '<a href=https://acme.com/ class="x', "<style><a href='https://acme.com/'>")
    for text in (*starts, *links):
        new, report = instrument("<p>x</p>" + text)
        assert (new, report.wrapped) == (f"<p>x</p>{PIXEL}{text}", [])


def test_conditional_comments_hold_links_of_a_area_and_vml() -> None:
    names = "<a href='{}a'><v:roundrect href=\"{}v\"><V:RECT href={}r>"
    end = '<o:x href="https://acme.com/o"><![endif]-->'
    new, targets = links_only(f"<!--[if gte mso 9]>{names.replace('{}', ROOT_URL)}{end}")
    assert targets == ["https://acme.com/a", "https://acme.com/v", "https://acme.com/r"]
    assert new == "<!--[if gte mso 9]><a href='TRACKED'><v:roundrect href=\"TRACKED\"><V:RECT href=TRACKED>" + end


# -- The pixel


@pytest.mark.parametrize(
    "text, told",
    [
        ("<body>x|</body></html>", "before </body>"), ("<BODY>x|</BODY >", "before </body>"),
        ("<body></body>y|</body>z", "before </body>"), ("<html><p>x|</html>\n", "before </html>"),
        ("<body>x|</body><!-- </body> --><script></body></script>", "before </body>"),
        ("<body>x|</body><!--[if mso]></body><![endif]-->", "before </body>"), ("<p>x</p>\n|", "at the end"),
        ("|", "at the end"), ("x|<a href='", "at the end, before unfinished markup"),
        ("x|<!-- </body>", "at the end, before unfinished markup"), ("<body>x|</body><plaintext></body>", "before </body>"),
        ("x|<plaintext></body>", "at the end, before unfinished markup"),
    ],
)  # fmt: skip
def test_the_pixel_stands_at_the_end_of_the_body(text: str, told: str) -> None:
    new, report = instrument(text.replace("|", ""))
    assert (new, report.pixel) == (text.replace("|", PIXEL), f"placed {told}")


def test_top_puts_it_first_in_the_body_where_that_is_to_be_seen_and_none_nowhere() -> None:
    pages = ("<html><head></head><body class='a>b'>|x</body>", "<html><head></head>|x</html>", "<p>x|")
    for text in (*pages, "<!-- <body> --><BODY>|x<body>"):
        assert instrument(text.replace("|", ""), pixel="top")[0] == text.replace("|", PIXEL)
    assert instrument("<body></body>", pixel="none")[1].pixel == "not placed: not asked for"


MARKS = ("{{pixel}}", "*|PIXEL|*", "%%pixel%%", "[[ open pixel ]]", "<!-- pixel -->", "<x-pixel/>")


@pytest.mark.parametrize("mark", MARKS)
def test_the_pixel_stands_where_a_mark_in_the_text_says_and_no_mark_is_left_there(mark: str) -> None:
    hidden = (
        f'<title>{mark}</title><a title="{mark}" href={mark}></a><style>{mark}</style><!--[if mso]>{mark}<![endif]-->'
    )
    hidden = hidden if "<" not in mark else "<title>x</title>"
    page = f"<body>{hidden}<p>a@@b</p>@@<p>c</p></body>"
    text = page.replace("@@", mark)
    new, report = instrument(text, pixel=mark)
    assert new == page.replace("@@", PIXEL, 1).replace("@@", "")
    assert (report.pixel, report.warnings()) == (f"placed where {mark} was", [])
    for off in (how(pixel=mark, opens=False), how(pixel=mark, tool_campaign=None, opens=False, links=False)):
        new, report = tracker.instrument_html(text, off)
        assert (new, report.tracks) == (page.replace("@@", ""), False), "nobody is to read a mark"
    new, report = instrument(f"{PIXEL}{text}", pixel=mark)
    assert (new, report.pixel) == (PIXEL + page.replace("@@", ""), tracker.THERE)
    new, report = instrument(page.replace("@@", ""), pixel=mark)
    assert new == page.replace("@@", "").replace("</body>", f"{PIXEL}</body>")
    assert report.pixel == f"placed before </body>: {mark} is not in the text"
    assert report.warnings() == [f"the pixel was {report.pixel}"]


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("coding", ["quoted-printable", "base64", "8bit"])
def test_a_mark_is_found_in_whichever_part_has_it(coding: str, mark: str) -> None:
    marked = f"<body><p>{mark}</p>{'x' * 900}</body>".encode()
    other = part("text/html", in_coding(marked, coding), f"{ENCODING}: {coding}")
    new, report = instrument_mail(multipart("mixed", HTML, other), pixel=mark)
    first, second = (decoded(each) for _, each in numbered(email.message_from_bytes(new)) if not each.is_multipart())
    assert first == expected(PAGE.encode(), pixel="none")
    assert BLANKS.sub(b"", second) == BLANKS.sub(b"", marked.replace(mark.encode(), PIXEL.encode()))
    assert report.pixel == f"placed where {mark} was" and report.wrapped == [URL]


def test_there_is_no_second_pixel_and_another_image_is_none_of_ours() -> None:
    path = "/k3v9x2mp/pixel/e1.gif"
    ours = (PIXEL, f"<IMG alt=x SRC='{BASE.upper()}{path}'>", f"<img src={BASE}{path}?campaign=x>")
    others = (
        f"<img src='https://acme.com{path}'>", f"<!-- {PIXEL} -->", f"<img src='{BASE}/logo.gif'>",
        f"<img src='{BASE}/other/pixel/e1.gif'>", f"<img src='{BASE}/k3v9x2mp/pixel/e10.gif'>",
    )  # fmt: skip
    for image in ours:
        new, report = instrument(f"<body>{image}x</body>")
        assert (new, report.pixel) == (f"<body>{image}x</body>", tracker.THERE)
    for image in others:
        assert instrument(f"<body>{image}x</body>")[0] == f"<body>{image}x{PIXEL}</body>"


DIVIDER = '<div style="border:none;border-top:solid {} 1.0pt;padding:3.0pt 0in 0in 0in"><p>From: Ann</p></div>|'
QUOTATIONS = (  # what mail programs put around what they quote, which stands for |
    "<blockquote>|</blockquote>", '<BLOCKQUOTE type=cite class="x"><blockquote>y</blockquote>|</BLOCKQUOTE>',
    '<div class="gmail_quote">On Monday Ann wrote:<div>x</div><div>|</div></div>', "<div class='gmail_quote y'>|</div>",
    '<div dir=ltr class="gmail_quote gmail_quote_container"><div dir="ltr" class="gmail_attr">x</div>|</div>',
    '<div class="yahoo_quoted"><div>|</div></div>', '<div class="moz-forward-container">|</div>',
    '<hr><div id="divRplyFwdMsg" dir="ltr">From: Ann</div><div>|</div>', '<div id=divRplyFwdMsg>x</div></div>|',
    '<div id="mail-editor-reference-message-container">x</div>|', f"<div>{DIVIDER.format('#E1E1E1')}</div>",
    DIVIDER.format("#B5C4DF"), "<p style='border-top: solid #e1e1e1 1pt'>x</p>|", "<blockquote>never ends |",
)  # fmt: skip
OTHERS = ("k3v9x2mp/{}/e2", "globex12/{}/e2", "globex12/{}/e1")  # of other emails, and of another tenant


@pytest.mark.parametrize("quotation", QUOTATIONS)
@pytest.mark.parametrize("around", ["<body>Dear Bob|</body>", "<p>Dear Bob</p>|", "|<p>Dear Bob</p>"])
def test_what_is_quoted_of_another_mail_does_not_stand_for_this_ones_own(around: str, quotation: str) -> None:
    text = around.replace("|", quotation)
    signed = f"{tracker.sign('s' * 64, 'globex12', tracker.encode_target(URL))}/{tracker.encode_target(URL)}"
    hidden = how().hidden_url().replace("k3v9x2mp/click/e1", "{}")
    for other in OTHERS:
        pixel, click = (f"{BASE}/{other.format(kind)}" for kind in ("pixel", "click"))
        old = f'<img src="{pixel}.gif">', f'<a href="{click}/{signed}">x</a>', hidden.format(other.format("click"))
        quoted = text.replace("|", f'{old[0]}{old[1]}<a href="{old[2]}"></a>')
        new, report = instrument(quoted, hidden_link=True)
        assert (new.count(PIXEL), report.pixel.startswith("placed ")) == (1, True)
        assert report.hidden_link.startswith("placed ") and new.count(how().hidden_url()) == 1
        assert (report.wrapped, TRACKED.findall(new)) == (
            [URL],
            [
                tracker.encode_target(each)
                for each in (
                    "about:blank",
                    URL,
                )
            ],
        )
        undone_ = new.replace(tracked(URL), f"{click}/{signed}").replace(PIXEL, "")
        assert re.sub(rf'<a href="{how().hidden_url()}"[^>]*></a>', "", undone_) == quoted


@pytest.mark.parametrize("quotation", QUOTATIONS)
def test_a_pixel_of_this_email_counts_where_nothing_is_quoted_and_where_we_put_it(quotation: str) -> None:
    for text in (f"<body>x{quotation}</body>", f"<p>x{quotation}"):
        new, report = instrument(text.replace("|", PIXEL + "y"))
        assert (new.count(PIXEL), report.pixel.startswith("placed ")) == (2, True), "it is a quoted one"
        for there in (text.replace("|", ""), f"{PIXEL}x" + text.replace("|", "z")):
            new, report = instrument(there)
            assert new.count(PIXEL) == 1
            assert instrument(new)[1].pixel == tracker.THERE
    closed = "<!--[if mso]><blockquote><![endif]--><blockquote>a<div>b</blockquote><div class=gmail_quote>c<div>d</div><blockquote>e</div>"
    text = f'<p>A saying: {closed}<div class="gmail_quoted"><div id=x>{PIXEL}</div></div></p>'
    assert instrument(text)[1].pixel == tracker.THERE, "behind quotations, and in what is none"


def test_a_link_of_another_email_is_made_this_ones_and_what_leads_nowhere_is_left() -> None:
    old = f"{BASE}/k3v9x2mp/click/e2"
    made = {
        f"{old}/{'x' * 16}/{tracker.encode_target(URL)}": URL,
        f"{old}/{'x' * 16}/{tracker.encode_target(URL)}?campaign=spring": URL,
        f"{BASE.upper()}/globex12/click/%7B%7Bid%7D%7D/x/{tracker.encode_target(URL)}": URL,
        f"{old}?url=https%3A%2F%2Facme.com%2F": ROOT_URL,
    }
    for url, target in made.items():
        assert links_only(f'<a href="{url}">') == ('<a href="TRACKED">', [target])
        assert instrument(f'<a data-track=off href="{url}">')[1].wrapped == []
    nested = tracker.encode_target(tracked(URL))
    for url in (
        f"{old}/x/{nested}",
        f"{old}/x/{nested[:-1]}",
        f"{old}/x/y",
        old,
        f"{BASE}/k3v9x2mp/click/e1?url={URL}",
    ):
        _, report = instrument(f'<a href="{url}">')
        assert report.left == [(url, "it leads to this server already")]


def test_there_is_no_second_hidden_link_and_nothing_is_said_of_the_first() -> None:
    once, report = instrument(PAGE, hidden_link=True)
    assert report.hidden_link == "placed first in the body, behind <body>"
    _, report = instrument(once, hidden_link=True)
    assert (report.hidden_link, [url for url, _ in report.left]) == (tracker.THERE, [tracked(URL)])


PREFERENCES = how().preferences_url()
LINE = f'<p><a href="{PREFERENCES}">Tracking preferences</a></p>'


@pytest.mark.parametrize("mark", ["{{tracking_preferences}}", "{{ tracking_preferences }}"])
def test_a_mark_becomes_the_url_of_the_recipients_page_wherever_it_stands(mark: str) -> None:
    page = '<a href="{}">no</a> <a href=https://acme.com/>x</a> <p>{}</p></body>'
    new, report = instrument(page.format(mark, mark), preferences="No")
    assert new == page.format(PREFERENCES, PREFERENCES).replace(
        "https://acme.com/", tracked("https://acme.com/")
    ).replace("</body>", f"{PIXEL}</body>")
    assert (report.preferences, report.left) == ("placed where its mark was", [])
    new, report = tracker.instrument_html(page.format(mark, mark), how().untracked())
    assert (new, report.tracks) == (page.format(PREFERENCES, PREFERENCES), False)


def test_a_line_of_long_words_is_broken_between_them() -> None:
    words = "日本語の言葉 " * 28  # of which each letter takes eight in HTML
    new, _ = instrument_mail(single("<body>x</body>"), preferences=words.strip())
    assert max(map(len, new.splitlines())) <= 998
    assert " ".join(html.unescape(new.decode()).split()).count(words.strip()) == 1


def test_a_line_leads_to_the_recipients_page_where_something_is_tracked() -> None:
    new, report = instrument("<body>x</body>", preferences="Tracking preferences")
    assert new == f"<body>x{PIXEL}{LINE}</body>" and report.preferences == "placed before </body>"
    new, _ = instrument("<body>x</body>", preferences="Für <Sie>")
    assert ">F&#252;r &lt;Sie&gt;</a></p></body>" in new
    for options in ({}, {"preferences": "x", "opens": False}):
        new, report = instrument("<body>x</body>", **options)
        assert "/preferences/" not in new and report.preferences.startswith("not placed")


def test_a_report_tells_everything_its_sizes_are_bytes_and_what_gmail_would_clip_is_told() -> None:
    page = "ü" * 49_000
    _, report = instrument(page)
    assert (report.size_before, report.size_after, report.warnings()) == (98_000, 98_000 + len(PIXEL), [])
    _, report = instrument(page + "ü" * 1000)
    assert report.size_after == 100_000 + len(PIXEL)
    assert report.warnings()[0].startswith(f"the HTML has {report.size_after:,} bytes, 100,000 before")
    told = instrument(NEWSLETTER)[1].as_json()
    paths = ("sale?a=1&b=2#grün", "O%27Neil?q=s+Bar", "plain", "button")
    assert told["wrapped"] == [f"https://acme.com/{path}" for path in paths]
    assert [left["url"] for left in told["left"]] == ["mailto:a@acme.com", "{{unsubscribe_url}}"]
    assert told["pixel"] == "placed before </body>"


def real_files(request: pytest.FixtureRequest, pattern: str) -> list[bytes]:
    """Other people's pages or messages."""
    return [path.read_bytes()[:100_000] for path in (request.getfixturevalue("shared") / "mail").glob(pattern)]


def reading(text: str) -> tuple[list[tuple[str, dict[str, str]]], str]:
    """What an HTML5 parser reads: tags with attributes, links as the targets they lead to, and text; not the pixel."""
    tree = html5lib.parse(text, namespaceHTMLElements=False)
    tags = []
    for node in tree.iter():
        node.text = "" if callable(node.tag) else node.text  # of a comment
        attributes = {name: value for name, value in node.attrib.items() if name != "href"}
        if href := tracker.browser_trim(node.get("href", "")):
            tracked = TRACKED.fullmatch(href)
            attributes["href"] = str(tracker.decode_target(tracked[1])) if tracked else href
        if "/pixel/e1.gif" not in node.get("src", ""):
            tags.append((str(node.tag), attributes))
    return tags, "".join(tree.itertext())


@pytest.mark.parametrize("origin", ["own", "shared"])
def test_a_page_reads_as_before_but_for_links_and_pixel(origin: str, request: pytest.FixtureRequest) -> None:
    pages = [text.encode() for text in PAGES] if origin == "own" else real_files(request, "*.html")
    for text in (raw.decode("utf-8", "surrogateescape") for raw in pages if not raw.startswith(WIDE_MARKS)):
        new, report = instrument(text)
        assert reading(new) == reading(text)
        assert new.count(PIXEL) == report.pixel.startswith("placed") or origin == "shared"
        assert report.pixel.startswith("placed") or origin == "own"
        assert len(report.edits) == len(report.wrapped) + report.pixel.startswith("placed")


# == Messages ==

FILES = sorted((SHARED / "mail").glob("*.eml")) if SHARED.is_dir() else []
BREAKS = [pytest.param("\r\n", id="crlf"), pytest.param("\n", id="lf")]
BLANKS = re.compile(rb"[ \t\r\n]+")
QP = "Content-Transfer-Encoding: quoted-printable"
BASE64 = "Content-Transfer-Encoding: base64"


def instrument_mail(raw: bytes, *, force: bool = False, **options: Any) -> tuple[bytes, tracker.Report]:
    """Instrument a message, and see that undoing gives it back and that a second time changes nothing."""
    new, report = tracker.instrument_message(raw, how(**options), force=force)
    assert undone(raw, new, report.edits) == raw
    again, report_again = tracker.instrument_message(new, how(**options), force=force)
    assert again == new
    assert (report_again.edits, report_again.wrapped) == ([], [])
    return new, report


def left_alone(raw: bytes, part: str, reason: str, **options: Any) -> None:
    """A message that stays as it is, with the reason in the report."""
    new, report = instrument_mail(raw, **options)
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


def part(kind: str, body: bytes | str, *headers: str) -> bytes:
    """A part of a multipart."""
    return single(body, *headers, kind=kind).partition(b"MIME-Version: 1.0\r\n")[2]


def parts(*inner: bytes, boundary: str = "b1", close: str = "--") -> bytes:
    """The body of a multipart."""
    edge = f"--{boundary}".encode()
    body = b"".join(edge + b"\r\n" + each + b"\r\n" for each in inner)
    return body + (edge + close.encode() + b"\r\n" if close else b"")


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


def in_base64(data: bytes, width: int, ends: str) -> bytes:
    """Encode in lines of this width."""
    letters = base64.b64encode(data).decode()
    return "".join(letters[at : at + width] + ends for at in range(0, len(letters), width)).encode()


def in_coding(data: bytes, coding: str) -> bytes:
    """A body in a transfer encoding."""
    if coding == "base64":
        return base64.encodebytes(data)
    return binascii.b2a_qp(data) if coding == "quoted-printable" else data


def expected(page: bytes, charset: str = "utf-8", **options: Any) -> bytes:
    """What instrument_html makes of the bytes of a page."""
    return tracker.instrument_html(page.decode(charset), how(**options))[0].encode(charset)


HTML = part("text/html", PAGE)
INSTRUMENTED = part("text/html", expected(PAGE.encode()))


@pytest.mark.parametrize("ends", BREAKS)
def test_only_the_html_part_changes_and_it_changes_as_html_does(ends: str) -> None:
    before = lines(
        "From alice Tue Nov 24 10:00:00 2026\nFrom: a@acme.com\nX-Odd:   two  spaces \nSubject: =?utf-8?q?S=C3=A4le?=\n"
        'Content-Type: multipart/alternative;\n\tboundary="b1"\n\na preamble\n--b1\n'
        f"Content-Type: text/plain\n\n{URL}\n--b1  \ncontent-TYPE: Text/HTML\n\n",
        ends,
    )
    after = lines("\n--b1--\t\nan epilogue <a href='http://acme.com/'>x</a>\n\n\n", ends)
    new, report = instrument_mail(before + PAGE.encode() + after)
    assert new == before + expected(PAGE.encode()) + after
    assert report.wrapped == [URL]
    assert report.touched == ["2 text/html"]
    assert report.skipped == [("1 text/plain", "plain text is left as it is")]
    assert report.pixel == "placed before </body>"
    assert (report.size_before, report.size_after) == (len(PAGE), len(expected(PAGE.encode())))


@pytest.mark.parametrize("ends", ["\r\n", "\n", "\r"])
@pytest.mark.parametrize("final", [True, False])
def test_line_ends_and_a_missing_final_one_stay_as_they_are(ends: str, final: bool) -> None:
    page = lines(PAGE.replace("<", "\n<") + "\n" * final, ends)
    assert instrument_mail(single(page, ends=ends))[0] == single(expected(page), ends=ends)
    mixed = "\ufeff".encode() + PAGE.replace("<p>", "\n<p>\r\n\r<br>\n\r\n").encode()  # with the mark of UTF-8
    assert instrument_mail(single(mixed, ends=ends))[0] == single(expected(mixed), ends=ends)


def test_the_end_of_a_multipart_may_be_missing_or_without_a_line_break() -> None:
    kind = 'multipart/alternative; boundary="b1"'
    open_end = single(parts(part("text/plain", "x"), HTML, close=""), kind=kind)
    inner = part("multipart/alternative; boundary=in", parts(HTML, boundary="in", close=""))
    inside = multipart("mixed", inner, part("text/html", "x", "Content-Disposition: attachment"))
    for raw in (open_end, inside, multipart("mixed", HTML).rstrip(b"\r\n")):
        new, report = instrument_mail(raw)
        assert report.wrapped == [URL]
        assert new == raw.replace(PAGE.encode(), expected(PAGE.encode()))


def test_boundaries_may_be_of_any_kind() -> None:
    for boundary in ("b1", "b1-", "b1--", "--b1", "=_b 1", "b1'()+_,-./:=?", "b" * 70):
        new, report = instrument_mail(multipart("alternative", part("text/plain", "x"), HTML, boundary=boundary))
        assert report.touched == ["2 text/html"]
        assert body_of(new) == parts(part("text/plain", "x"), INSTRUMENTED, boundary=boundary)


@pytest.mark.parametrize("outer, inner", [("abc", "abcd"), ("abcd", "abc"), ("abc", "abc_1"), ("a", "-a"), ("A", "a")])
def test_boundaries_may_be_similar(outer: str, inner: str) -> None:
    inside = part(f"multipart/related; boundary={inner}", parts(part("text/plain", "x"), HTML, boundary=inner))
    _, report = instrument_mail(multipart("mixed", inside, part("application/pdf", "%PDF"), boundary=outer))
    assert report.touched == ["1.2 text/html"]
    assert [name for name, _ in report.skipped] == ["1.1 text/plain", "2 application/pdf"]


@pytest.mark.parametrize("line", ["--b1x", "--b1 x", " --b1", "--b1---", "--b", "x--b1"])
def test_a_line_like_a_boundary_is_none(line: str) -> None:
    page = "\r\n".join(["<pre>", *[line] * 9_000, f"</pre>{PAGE}"])
    new, report = instrument_mail(multipart("mixed", part("text/html", page)))
    assert report.touched == ["1 text/html"]
    assert body_of(new) == parts(part("text/html", expected(page.encode())))


# -- Transfer encodings: quoted-printable


def instrument_qp(body: bytes, ends: str, **options: Any) -> tuple[bytes, tracker.Report]:
    """Instrument, and see that no new line is longer than allowed, begins with a dot, or ends otherwise than others."""
    raw = single(body, QP, ends=ends)
    new, report = instrument_mail(raw, **options)
    assert unquote_qp(body_of(new)) == expected(unquote_qp(body), **options)
    old, now = (re.split(rb"\r\n|\n|\r", each) for each in (raw, new))
    assert [line for line in Counter(now) - Counter(old) if len(line) > 76] == []
    assert sum(line.startswith(b".") for line in now) <= sum(line.startswith(b".") for line in old)
    assert {*re.findall(rb"\r\n|\n|\r", new)} <= {*re.findall(rb"\r\n|\n|\r", raw)}
    return body_of(new), report


@pytest.mark.parametrize("ends", BREAKS)
def test_of_quoted_printable_only_the_edited_span_is_new(ends: str) -> None:
    before = lines(
        "=3chtml=3E =\n caf=c3=a9 = x =zz  \t\n.dot =2e =\t \n" + "long " * 30 + "\n<body>\n<p>a =\n<a href=3D'", ends
    )
    middle = lines("'>=e2=80=9d</a>\nmore=20=\nand =41 more  \n", ends)
    after = lines("</body>\n.\n=20\n</html>", ends)
    body, report = instrument_qp(before + b"http://acme.com/" + middle + after, ends)
    assert report.wrapped == ["http://acme.com/"]
    assert body.startswith(before) and middle in body and body.endswith(after)


@pytest.mark.parametrize("ends", BREAKS)
@pytest.mark.parametrize(
    "body, targets",
    [
        *((f'<p>x</p><a href=3D"{value}">y</a>', ["http://acme.com/a=1"]) for value in (
            "http://acme.=\ncom/a=3D=\n1", "=\nhttp://acme.com/a=3D1=\n", "http=3a//acme.com/a=\n=3d1",
        )),
        ('<a href=3D"http://a.de/">.</a><a href=3Dhttp://b.de/>.</a>=\n.<a href=3D"http://c.de/">',
         ["http://a.de/", "http://b.de/", "http://c.de/"]),
        *((f'<a href=3D"http://acme.com/\n">{"x" * length}', ["http://acme.com/"]) for length in (0, 1, 30, 60, 74)),
        ('<a href=3D"http://a.de/\n"><a href=3D"http://b.de/\n"><a href=3D"http://c.de/\n">.',
         ["http://a.de/", "http://b.de/", "http://c.de/"]),
        *((body, []) for body in ("", "=", "=\n", "\n", "x=", "x  ", "  ", "=\n=\n", "x=\n\n", "=3", "x =\t", "=0A=")),
    ],
)  # fmt: skip
def test_quoted_printable_may_be_broken_and_end_anyhow(body: str, targets: list[str], ends: str) -> None:
    assert instrument_qp(lines(body, ends), ends)[1].wrapped == targets


@pytest.mark.parametrize("ends", BREAKS)
def test_quoted_printable_lines_stay_short_wherever_a_link_begins(ends: str) -> None:
    tails = ("", "=\n", "\n", "=\n.x", "\n.x", ".", "..", "...=\nx")
    for tail, column, quote in itertools.product(tails, range(10, 77), ("", '"', "'")):
        text = f"<a href=3D{quote}".rjust(column, "x")
        value = f"http://acme.com/{quote}"
        soft = "" if len(text + value) < 76 else "=\n"
        assert instrument_qp(lines(f"{text}{soft}{value}>{tail}", ends), ends)[1].wrapped == ["http://acme.com/"]


@pytest.mark.parametrize("ends", BREAKS)
def test_quoted_printable_lines_stay_short_wherever_the_pixel_goes(ends: str) -> None:
    lasts = (".", "x", "=3D", "=2E", "=20", "..", "=C3=A9")
    behinds = ("", "</body>", "</body>\n", "\n", "=\n", "=\n</body>", "<!-- .", "=\n.</p", " \n")
    for last, behind in itertools.product(lasts, behinds):
        for column in range(len(last), 77 - len(behind.partition("\n")[0])):
            instrument_qp(lines(last.rjust(column, "x") + behind, ends), ends)
    for behind in ("", ".", "...", "." * 30, "." * 69, ".=\n.", "=\n.", "\n."):
        for before in range(76 - len(f"<body>{behind.partition(chr(10))[0]}")):
            report = instrument_qp(lines(f"{'x' * before}<body>{behind}", ends), ends, pixel="top")[1]
            assert report.pixel == "placed first in the body, behind <body>"


# -- Transfer encodings: base64


@pytest.mark.parametrize("ends", BREAKS)
@pytest.mark.parametrize("width", [76, 72, 60, 4])
def test_base64_keeps_its_width_its_line_ends_and_the_lines_before_the_first_edit(width: int, ends: str) -> None:
    page = ("<p>" + "Hällo " * 60 + "</p>" + PAGE).encode()
    raw = single(in_base64(page, width, ends), BASE64, ends=ends)
    new, report = instrument_mail(raw)
    assert report.wrapped == [URL]
    old_lines, new_lines = (body_of(each).decode().split(ends) for each in (raw, new))
    assert base64.b64decode("".join(new_lines)) == expected(page)
    assert {len(line) for line in new_lines[:-2]} == {width}
    assert new_lines[-1] == ""
    kept = page.index(b"https://") // 3 * 4 // width
    assert new_lines[:kept] == old_lines[:kept]


def test_base64_in_one_line_stays_one_line_if_it_is_long() -> None:
    for page, widths in ((b"x" * 3000 + PAGE.encode(), set()), (b"<p>x</p>", {76}), (b"", {76})):
        body = body_of(instrument_mail(single(base64.b64encode(page), BASE64))[0])
        assert base64.b64decode(body) == expected(page)
        assert {len(line) for line in body.split(b"\r\n")[:-1]} == widths


@pytest.mark.parametrize("behind", ["", "\r\n", "\r\n\r\n\r\n", "  \r\n", "\r\n \r\n"])
def test_base64_lines_of_odd_lengths_stay_up_to_the_first_edit_and_blank_ones_behind(behind: str) -> None:
    page = b"x" * 60 + PAGE.encode()
    letters = base64.b64encode(page)
    kept = letters[:7] + b"  \r\n\r\n" + letters[7:20] + b"\r\n" + letters[20:60] + b"\r\n"
    new, _ = instrument_mail(single(kept + letters[60:99] + b"\r\n" + letters[99:] + behind.encode(), BASE64))
    assert body_of(new).startswith(kept)
    assert base64.b64decode(body_of(new)) == expected(page)
    assert re.findall(rb"\s*\Z", new)[0] == behind.encode()


# -- Transfer encodings: those that encode nothing, and words that are none


@pytest.mark.parametrize(
    "token", ["", "7bit", "7Bit", "7bits", "7-bit", "8bit", "8BIT", "8bits", "8-bit", "8bit;", "binary", " 8bit ; ",
              "quoted-printable", "Quoted-Printable", "quoted printable", "quoted-printable;"],
)  # fmt: skip
def test_encodings_may_be_called_so(token: str) -> None:
    page = PAGE.replace("Hello", "Grüße")
    is_quoted = "rintable" in token
    raw = single(page.replace("=", "=3D") if is_quoted else page, f"Content-Transfer-Encoding: {token}")
    new, report = instrument_mail(raw)
    assert report.wrapped == [URL]
    assert (unquote_qp(body_of(new)) if is_quoted else body_of(new)) == expected(page.encode())


@pytest.mark.parametrize("ends", BREAKS)
def test_what_only_some_programs_take_for_an_encoding_must_be_borne_out_by_the_body(ends: str) -> None:
    odd = ("quoted-printable;", "Quoted-Printable ;", "quoted printable", "quoted-printable; ")
    plain = ("<p>Hello</p>", PAGE, '<a href="https://acme.com/?id=12">x</a>', "a =\nb = c", "", "<p width=3D>=</p>")
    for token, body in itertools.product(odd, plain):
        left_alone(single(lines(body, ends), f"{ENCODING}: {token}", ends=ends), "1 text/html", "may be in it or not")
        new, report = instrument_mail(single(lines("<p>Hello =3D=\n</p>", ends), f"{ENCODING}: {token}", ends=ends))
        assert report.pixel.startswith("placed ") and b'src=3D"' in new
    for body in ("hello123", "", "aGVsbG8="):
        left_alone(single(body, f"{ENCODING}: base64;", ends=ends), "1 text/html", "may be in it or not")
    assert instrument_mail(single(base64.b64encode(PAGE.encode()), f"{ENCODING}: base64;", ends=ends))[1].wrapped == [
        URL
    ]
    for body in plain[:2]:
        assert instrument_mail(single(lines(body, ends), QP, ends=ends))[1].pixel.startswith("placed ")


@pytest.mark.parametrize("ends", BREAKS)
def test_lines_that_would_get_too_long_are_broken_inside_the_tags_only(ends: str) -> None:
    page = "".join(f'<p>a <a class="x" href="http://acme.com/{n}" id=y>link</a> b.</p>' for n in range(15)) + "</body>"
    assert len(page) < 998
    new, report = instrument_mail(single(page, ends=ends))
    assert len(report.wrapped) == 15
    body = body_of(new).decode()
    assert max(map(len, body.split(ends))) <= 998
    assert re.sub(r"<[^>]*>", "", body) == re.sub(r"<[^>]*>", "", page)
    assert BLANKS.sub(b"", body.encode()) == BLANKS.sub(b"", expected(page.encode()))
    assert re.findall(r'href="([^"]*)"', body) == [tracked(f"http://acme.com/{n}") for n in range(15)]


@pytest.mark.parametrize("before, behind", [("x", ""), ("", "x")])
def test_no_line_passes_998_by_our_doing(before: str, behind: str) -> None:
    for length in range(700, 1000, 7):
        fill = length - len(PAGE)
        page = PAGE.replace("Hello", before * fill).replace("Sale", behind * fill)
        new, report = instrument_mail(single(f"{page}\r\n<p>.</p>\r\n"))
        assert report.wrapped == [URL]
        assert max(map(len, new.split(b"\r\n"))) <= 998
        assert new.endswith(b"</body></html>\r\n<p>.</p>\r\n")
    page = "x" * 3000 + PAGE + "y" * 3000  # too long already
    new, report = instrument_mail(single(page))
    assert report.wrapped == [URL]
    assert max(map(len, new.split(b"\r\n"))) <= len(page)
    assert re.sub(rb"<[^>]*>", b"", body_of(new)).decode() == re.sub("<[^>]*>", "", page)


def test_a_link_whose_tracked_form_is_longer_than_a_line_is_left_with_the_reason_where_lines_matter() -> None:
    long = "http://acme.com/" + "x" * 800
    new, report = instrument_mail(single(PAGE.replace(URL, long) + PAGE))
    assert report.wrapped == [URL]
    assert [(url, "longer than a line" in reason) for url, reason in report.left] == [(long, True)]
    assert f'href="{long}"'.encode() in new
    page = PAGE.replace(URL, long).encode()
    for header, body in ((QP, page), (BASE64, base64.encodebytes(page)), ("Content-Transfer-Encoding: binary", page)):
        assert instrument_mail(single(body, header))[1].wrapped == [long]


# -- Charsets


@pytest.mark.parametrize(
    "label",
    [
        "default", "default_charset", "unknown-8bit", "x-unknown", "gb2312_charset", "chinesebig5", "_", "..",
        "x" * 900, "hex", "base64", "rot13", "rot_13", "punycode", "undefined", "unicode-escape", "idna",
        "raw_unicode_escape", "zlib", "bz2", "uu", "quopri", "aliases", "mbcs", "oem", '"a b"', "a\xe9", "utf8mb4",
        "ansi_x3.4", "utf-8;", "us-ascii", "utf-8",
    ],
)  # fmt: skip
def test_a_charset_that_is_wrong_or_that_nobody_knows_matters_to_what_is_not_ascii_alone(label: str) -> None:
    page = PAGE.replace("Hello", "H\xe9llo").encode("latin-1")
    new, report = instrument_mail(single(page, kind=f"text/html; charset={label}"))
    assert report.wrapped == [URL]
    assert body_of(new) == expected(page, "latin-1")
    page = '<a href="http://acme.com/gr\xfcn">x</a>'.encode("latin-1")
    new, report = instrument_mail(single(page, kind=f"text/html; charset={label}"))
    assert report.left == [("http://acme.com/gr\xfcn", "its characters can't be read in the part's charset")]
    assert body_of(new) == page + PIXEL.encode()


@pytest.mark.parametrize(
    "label, url",
    [
        ("iso-8859-1", "http://acme.com/grün"), ("windows-1252", "http://acme.com/“5€”"),
        ("utf-8", "https://bücher.example/é?ü#✓"), ("UTF-8", "https://acme.com/😀"),
        ("Shift_JIS", "https://acme.com/表示能力"),
        ("euc-jp", "https://acme.com/日本"), ("gb2312", "https://acme.com/中文"), ("gb18030", "https://acme.com/中€文"),
        ("big5", "https://acme.com/功能"), ("koi8-r", "https://acme.com/привет"),
        ("iso-2022-jp", "https://acme.com/ユーザー名"),
    ],
)  # fmt: skip
def test_a_url_that_is_not_ascii_is_read_in_the_charset_of_its_part(label: str, url: str) -> None:
    page = PAGE.replace(URL, url).encode(label)
    for headers, body in (((), page), ((QP,), binascii.b2a_qp(page)), ((BASE64,), base64.encodebytes(page))):
        new, report = instrument_mail(single(body, *headers, kind=f'text/html; charset="{label}"'))
        assert report.wrapped == [url]
        assert email.message_from_bytes(new).get_payload(decode=True) == expected(page, label)


@pytest.mark.parametrize(
    "label, text",
    [
        ("iso-2022-jp", "ユーザー名 メーカー様".encode("iso-2022-jp")),
        ("iso-2022-jp-2", "メーカー様 한글".encode("iso-2022-jp-2")),
        ("iso-2022-jp-ext", "メーカー様 ｼﾅﾘｵ 表ｼﾅﾘｵ".encode("iso-2022-jp-ext")),
        ("iso-2022-kr", "한글 메일을 드립니다 낯설다".encode("iso-2022-kr")),
        ("hz-gb-2312", "中文。“￥”".encode("hz")), ("hz", "中文~ 中文".encode("hz")), ("hz", b"~~{"),
        *((label, letters) for label in ("iso-2022-jp", "iso-2022-jp-2") for letters in (
            b"\x1b(I<EX5\x1b(B", b"\x1b.A\x1bN<a", b"\x1b$BMM\x1bN<MM<M\x1b(B",  # katakana, and a single shift
        )),
        *((label, b"~{") for label in ("iso-2022-jp", "iso-2022-kr", "utf-8")),  # the marks of hz are text elsewhere
    ],
)  # fmt: skip
def test_letters_that_look_like_markup_in_a_shifting_charset_hide_no_link(label: str, text: bytes) -> None:
    page = b'%b<a title="%b" href="%b">%b</a>%b<p>%b</p></body>' % (text, text, URL.encode(), text, text, text)
    new, report = instrument_mail(single(page, kind=f"text/html; charset={label}"))
    assert report.wrapped == [URL]
    wrapped = page.replace(URL.encode(), tracked(URL).encode())
    assert body_of(new) == wrapped.replace(b"</body>", PIXEL.encode() + b"</body>")


WIDE = "it is in UTF-16 or UTF-32; send it in UTF-8 to have it instrumented"


@pytest.mark.parametrize(
    "label, page, reason",
    [
        *((codec, PAGE.encode(codec), WIDE) for codec in ("utf-16", "utf-16-le", "utf-32", "utf-32-be")),
        *((label, ("\ufeff" + PAGE).encode(codec), WIDE) for label, codec in (
            ("utf-8", "utf-16-le"), ("utf-8", "utf-16-be"), ("x-odd", "utf-32-le"), ("utf-8", "utf-32-be"),
        )),
        ("utf-7", PAGE.encode(), "its charset 'utf-7' does not keep ASCII as it is"),
        ("cp037", PAGE.encode("cp037"), "cp037"),
        *((label, PAGE.encode(), label) for label in ("unicode-1-1-utf-7", "johab")),
    ],
)  # fmt: skip
def test_charsets_in_which_markup_is_no_ascii_are_left_alone(label: str, page: bytes, reason: str) -> None:
    for headers, body in (((), page), ((BASE64,), base64.encodebytes(page))):
        left_alone(single(body, *headers, kind=f"text/html; charset={label}"), "1 text/html", reason)


# -- Which parts


def nested(depth: int) -> bytes:
    """HTML in this many multiparts, with a part before and one behind it at each depth."""
    inside = HTML
    for level in range(depth, 0, -1):
        kind = ("mixed", "Alternative", "RELATED")[level % 3]
        around = (part("text/plain", "x"), inside, part("image/png", "\x89PNG"))
        inside = part(f"Multipart/{kind}; boundary=b{level}.", parts(*around, boundary=f"b{level}."))
    return b"Subject: Sale\r\nMIME-Version: 1.0\r\n" + inside


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 5, 10, 30, 50])
def test_html_is_found_at_any_depth(depth: int) -> None:
    raw = nested(depth)
    new, report = instrument_mail(raw)
    assert report.touched == [(".".join(["2"] * depth) or "1") + " text/html"]
    assert new == raw.replace(PAGE.encode(), expected(PAGE.encode()))
    assert len(report.skipped) == 2 * depth


def test_a_part_of_more_links_than_mail_has_is_left_and_the_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "MAX_TAGS", 20)
    page = f'<a href="{URL}">' * 21
    left_alone(single(page), "1 text/html", "more than 20 links and images")
    assert len(instrument(page[: -len(page) // 21])[1].wrapped) == 20
    html, report = instrument(page)
    assert (html, report.pixel) == (page, "not placed: there is no HTML that can hold it")
    assert report.skipped == [("the page", "it has more than 20 links and images")]
    raw = multipart("mixed", HTML, part("text/html", page))
    new, report = instrument_mail(raw)
    assert new == raw.replace(PAGE.encode(), expected(PAGE.encode()))
    assert (report.pixel, report.touched) == ("placed before </body>", ["1 text/html"])
    assert report.skipped == [("2 text/html", "it has more than 20 links and images")]


def test_two_html_parts_have_their_links_wrapped_and_one_pixel() -> None:
    alternative = part("multipart/alternative; boundary=b2", parts(part("text/plain", "x"), HTML, boundary="b2"))
    shown = part("text/html", PAGE, "Content-Disposition: inline")
    attached = part("message/rfc822", b"DKIM-Signature: v=1\r\n" + HTML)
    new, report = instrument_mail(multipart("mixed", alternative, part("image/png", "x"), shown, attached))
    assert report.touched == ["1.2 text/html", "3 text/html"]
    assert report.wrapped == [URL, URL]
    assert new.count(PIXEL.encode()) == 1
    assert new.index(PIXEL.encode()) < new.index(b"image/png")
    assert report.size_before == 2 * len(PAGE)


def test_of_alternatives_the_last_is_shown_and_has_the_pixel() -> None:
    page = part("text/html", "<b>shown</b>")
    for shown in (page, part("multipart/related; boundary=b2", parts(page, HTML, boundary="b2"))):
        raw = multipart("alternative", part("text/plain", "x"), HTML, shown, part("text/calendar", "x"))
        new, report = instrument_mail(raw)
        assert report.pixel == "placed at the end"
        assert new.count(PIXEL.encode()) == 1
        assert b"<b>shown</b>" + PIXEL.encode() in new
        assert report.wrapped == [URL] * raw.count(URL.encode())


def test_a_pixel_of_ours_in_any_html_part_is_the_only_one() -> None:
    new, report = instrument_mail(multipart("mixed", HTML, part("text/html", PIXEL)))
    assert new.count(b"/pixel/") == 1
    assert report.pixel == tracker.THERE
    new, report = instrument_mail(single(PAGE), pixel="none", links=False)
    assert (new, report.touched, report.pixel) == (single(PAGE), [], "not placed: not asked for")


MESSAGE = b"Subject: inner\r\n" + HTML
MD5 = "Content-MD5: Q2hlY2sgSW50ZWdyaXR5IQ=="
ENCODING = "Content-Transfer-Encoding"
MIXED = "multipart/mixed"
ATTACHED = ("Content-Disposition: inline", "Content-Disposition: attachment")


def inside(kind: str, body: bytes | str, *headers: str) -> bytes:
    """A message with one part."""
    return multipart("mixed", part(kind, body, *headers))


LEFT: dict[tuple[str, str], tuple[bytes, ...]] = {  # messages by the part that is left and words of the reason
    ("1 text/plain", "plain text"): (
        b"Subject: x\r\n\r\n" + PAGE.encode(), b"\r\n" + PAGE.encode(),
        *(single(PAGE, kind=kind) for kind in ("texthtml", "text/plain")),
    ),
    ("1 text/plain", "no body"): (b"",),
    **{(f"1 {kind}", "only text/html"): (single(PAGE, kind=kind),) for kind in (
        "text/x-amp-html", "text/watch-html", "text/calendar", "text/enriched", "application/xhtml+xml",
    )},
    **{(f"1 message/{kind}", "only text/html"): (
        inside(f"message/{kind}", MESSAGE), single(MESSAGE, kind=f"message/{kind}")
    ) for kind in ("rfc822", "partial", "external-body", "global", "delivery-status")},
    **{(f"1 multipart/{kind}", reason): (
        multipart(kind, HTML), inside(f"multipart/{kind}; boundary=in", parts(HTML, boundary="in"))
    ) for kind, reason in (
        ("report", "reports on another message"), ("signed", "signed or encrypted"),
        ("encrypted", "signed or encrypted"), ("digest", "only text/html"), ("parallel", "only text/html"),
        ("form-data", "only text/html"),
    )},
    **{(f"1 application/{kind}", "S/MIME"): (single("MIIG", kind=f"application/{kind}"),)
       for kind in ("pkcs7-mime", "x-pkcs7-mime")},
    ("1 text/html", "attachment"): (
        single(PAGE, ATTACHED[1]), inside("text/html", PAGE, 'Content-Disposition: ATTACHMENT;\r\n filename="a.html"'),
        inside("text/html", PAGE, "Content-Disposition: x-odd"),
    ),
    ("1 text/html", "2 headers Content-Disposition"): (inside("text/html", PAGE, *ATTACHED),),
    ("1 text/html", "PGP"): (
        single(f"<pre>-----BEGIN PGP SIGNED MESSAGE-----</pre>{PAGE}"),
        single(base64.encodebytes(f"-----BEGIN PGP MESSAGE-----{PAGE}".encode()), BASE64),
    ),
    # A space before a colon does not hide the headers behind it.
    ("1 text/html", "Content-MD5"): (single(PAGE, MD5), *(
        single(PAGE, odd, MD5, ends=ends) for odd in ("X-Odd : y", "X-Odd\t: y") for ends in ("\r\n", "\n", "\r")
    )),
    ("1 text/html", "2 headers Content-Type"): tuple(
        single(PAGE, f"Content-Type: text/{kind}") for kind in ("html", "plain")
    ),
    ("1 text/html", f"2 headers {ENCODING}"): (single(PAGE, f"{ENCODING}: 7bit", QP),),
    ("1 text/html", f"its {ENCODING} is"): tuple(single(PAGE, f"{ENCODING}: {token}") for token in (
        "text/html", "x-uuencode", "uuencode", "utf-8", "base-64", "7bit 8bit", "\xe9", "=3D",
    )),
    ("1 text/html", "its base64"): tuple(single(body.encode("latin-1"), BASE64) for body in (
        "PGI+!", "PGI", "PGI+P", "=PGI", "PGI+\r\n-- \r\nlist footer", "PGI=PGI+", "PGI+ PGI+", "PG\xe9+", "====",
        "PGI+==",
    )),
    ("1 text/html", "that are shifted"): (
        single(b"<p>x</p>\x1b$B%a!<%+!<MM", kind="text/html; charset=iso-2022-jp"),
    ),
    ("1 text/html", "no body"): (
        b"Content-Type: text/html\r\n", b"Content-Type: text/html",
        multipart("mixed", b"Content-Type: text/html\r\nX-A: b"),
    ),
    (MIXED, "Content-MD5"): (multipart("mixed", HTML, headers=(MD5,)),),
    (MIXED, ENCODING): tuple(multipart("mixed", HTML, headers=(f"{ENCODING}: {token}",))
                             for token in ("quoted-printable", "base64", "x-gzip")),
    (MIXED, "10,000 times or more"): (inside("text/html", "--b1x\r\n" * 10_000 + PAGE),),
    (MIXED, "2 headers Content-Type"): (
        single(parts(HTML), 'Content-Type: multipart/mixed; boundary="b2"', kind="multipart/mixed; boundary=b1"),
    ),
    (MIXED, "nowhere"): (
        single(parts(HTML), kind="multipart/mixed; boundary=b2"),
        single("--b1--\r\n" + PAGE, kind="multipart/mixed; boundary=b1"),
    ),
    (MIXED, "not given"): (single(parts(HTML), kind=MIXED), single(parts(HTML), kind='multipart/mixed; boundary=""')),
    ("1", "no header"): (multipart("mixed", b"no header here\r\n\r\n" + HTML),),
    (".".join(["2"] * 50) + " multipart/mixed", "50 other parts"): (nested(51),),
    ("the message", "no header"): (b"no header here\r\n" + single(PAGE),),
    ("the message", "256,000"): (b"Content-Type: text/html\r\n" + b"X-A: b\r\n" * 40_000 + b"\r\nx",),
    ("the message", "2,000"): (single(PAGE, kind=f"text/html; {'a=b; ' * 400}"),),
    ("the message", "1,000 parts"): (multipart("mixed", *[HTML] * 1001),),
    ("the message", "DKIM-Signature"): tuple(
        single(PAGE, f"{name}: v=1; a=rsa-sha256") for name in ("DKIM-Signature", "dkim-signature")
    ),
    ("the message", "ARC-Seal"): (single(PAGE, "ARC-Seal: i=1"),),
}  # fmt: skip


@pytest.mark.parametrize(
    "raw, name, reason",
    [(raw, *why) for why, some in LEFT.items() for raw in some],
    ids=[f"{name}, {reason}" for (name, reason), some in LEFT.items() for _ in some],
)
def test_what_must_not_change_or_is_unclear_stays_and_html_beside_it_is_instrumented(
    raw: bytes, name: str, reason: str
) -> None:
    left_alone(raw, name, reason)
    if reason in ("DKIM-Signature", "ARC-Seal"):
        new, report = instrument_mail(raw, force=True)
        assert (body_of(new), report.wrapped) == (expected(PAGE.encode()), [URL])
    else:
        left_alone(raw, name, reason, force=True)
    if name == "the message" or reason in ("no header", "50 other parts") or not raw.startswith((b"From", b"Content")):
        return  # it would not be left as a part of another message
    outer = b"MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=outer\r\n\r\n"
    new, report = instrument_mail(outer + parts(raw, HTML, boundary="outer"))
    assert report.touched == ["2 text/html"]
    assert new == outer + parts(raw, INSTRUMENTED, boundary="outer")


def test_a_link_that_equals_list_unsubscribe_is_left() -> None:
    page = PAGE + f'<a href="{URL.replace("&", "&amp;")}">unsubscribe</a><a href="{URL}9">x</a>'
    for header in (
        f"List-Unsubscribe: <{URL}>", f"list-unsubscribe: <mailto:a@acme.com>, <{URL}>",
        f"List-Unsubscribe: <mailto:a@acme.com?subject=x>,\r\n <{URL}>",
        f"List-Unsubscribe:\r\n\t<{URL[:25]}\r\n {URL[25:]}>",
        f"List-Unsubscribe: <http://other.example/>\r\nList-Unsubscribe: <{URL}>",
    ):  # fmt: skip
        for raw in (single(page, header), multipart("alternative", part("text/html", page), headers=(header,))):
            new, report = instrument_mail(raw)
            assert report.wrapped == [URL + "9"]
            assert report.left == [(URL, "it is the message's List-Unsubscribe")] * 2
            assert header.encode() in new


@pytest.mark.parametrize(
    "header, written",
    [
        ("https://Acme.COM:443/out", "https://acme.com/out"), ("https://acme.com/out", "https://ACME.com./out"),
        ("https://acme.com/?to=a@b.example", "https://acme.com/?to=a%40b.example"),
        ("https://acme.com/?to=a%40b.example", "https://acme.com?to=a@b.example"),
        ("https://acme.com/%7Eann/%2f", "https://acme.com/~ann/%2F"), ("https://acme.com", "https://acme.com/"),
        ("https://xn--bcher-kva.example/", "https://bücher.example/"), ("https://acme.com/?x=ü", "https://acme.com/?x=%C3%BC"),
        ("https://acme.com/out", "https://acme.com/out#top"), ("https://a.de/=?x=1?=&b", "https://a.de/=?x=1?=&amp;b"),
    ],
)  # fmt: skip
def test_however_list_unsubscribe_and_its_link_are_written_the_link_is_left(header: str, written: str) -> None:
    words = "".join(f"=?utf-8?{chance}?=\r\n " for chance in (
        "q?" + "".join(f"={byte:02X}" for byte in f"<{header[:9]}".encode()),
        "b?" + base64.b64encode(f"{header[9:]}>".encode()).decode(),
    ))  # fmt: skip
    page = f'<a href="{written}">out</a><a href="https://acme.com/sale">x</a><a href="https://sub.acme.com/out">x</a>'
    for said in (f"<{header}>", f"<mailto:a@acme.com>, <{header}>", words.strip()):
        raw = lines("", "") + b"List-Unsubscribe: " + said.encode() + b"\r\n" + single(page)
        assert instrument_mail(raw)[1].wrapped == ["https://acme.com/sale", "https://sub.acme.com/out"], said


def test_what_python_itself_makes_of_a_long_list_unsubscribe_is_read() -> None:
    out = "https://acme.com/unsubscribe?list=" + "x" * 90 + "&who=ann%40example.org"
    for said in (f"<{out}>", f"<mailto:out@acme.com?subject={'y' * 80}>, <{out}>"):
        made = EmailMessage(policy=email.policy.SMTP)
        made["Subject"], made["List-Unsubscribe"] = "Sale", said
        made.set_content(f'<a href="{URL}">x</a><a href="{out.replace("&", "&amp;")}">out</a>', subtype="html")
        raw = bytes(made)
        assert b"=?utf-8?" in raw, "it is no longer written so"
        assert instrument_mail(raw)[1].wrapped == [URL]


def test_a_length_that_would_be_wrong_is_taken_out_and_one_that_is_right_stays() -> None:
    length = b"Content-Length: 99\r\n"
    for name in (b"Content-Length: 99\r\n", b"content-length :\r\n 99\r\n", length * 2):
        for raw in (name + single(PAGE), b"From a\r\n" + name + single(PAGE), multipart("mixed", name + HTML)):
            new, report = instrument_mail(raw)
            assert (b"ength" in new, report.wrapped) == (False, [URL])
            assert new == instrument_mail(raw.replace(name, b""))[0]
        for plain in (name + b"Subject: x\r\n\r\nhello", name + single("x", "DKIM-Signature: v=1")):
            assert instrument_mail(plain)[0] == plain
    inner = part("multipart/alternative; boundary=in", parts(length + part("text/plain", "x"), HTML, boundary="in"))
    raw = length + multipart("mixed", length + inner, length + part("image/png", "x"))
    new, _ = instrument_mail(raw)
    assert [piece.startswith(length) for piece in re.split(rb"--(?:b1|in)\r\n", new)] == [
        False,
        False,
        True,
        False,
        True,
    ]


@pytest.mark.parametrize("ends", BREAKS)
@pytest.mark.parametrize("coding", ["7bit", "quoted-printable", "base64"])
def test_a_text_beside_tracked_html_gets_a_line_or_the_url_in_place_of_its_marks(coding: str, ends: str) -> None:
    decoders: dict[str, Callable[[bytes], bytes]] = {"7bit": bytes, "quoted-printable": unquote_qp}
    decode = decoders.get(coding, base64.b64decode)
    edge, end = lines("\n--b1\n", ends), lines("\n--b1--\n", ends)
    head = lines('Content-Type: multipart/alternative; boundary="b1"\n', ends) + edge
    page = edge + lines('Content-Type: text/html\n\n<a href="https://acme.com/">x</a>', ends)
    for text, wanted in (
        ("Hello\n\n", f"Hello\n\nNo fur: {PREFERENCES}\n\n"),
        ("Hello {{tracking_preferences}}. .\n", f"Hello {PREFERENCES}. .\n"),
        *((f"{end}\n", f"{end}\n\nNo fur: {PREFERENCES}\n") for end in ("voil\xc3\xa0", "wait\x85", "\x1c")),
    ):
        encoded = in_coding(lines(text, ends), coding)
        raw = head + lines(f"Content-Type: text/plain\nContent-Transfer-Encoding: {coding}\n\n", ends) + encoded
        new, report = instrument_mail(raw + page + end, preferences="No für")
        assert report.touched == ["2 text/html", "1 text/plain"] and not report.notes
        assert decode(body_of(new.split(edge)[1])) == lines(wanted, ends)
        assert coding != "quoted-printable" or max(map(len, re.split(rb"[\r\n]", new.split(edge)[1]))) <= 76
        new, report = instrument_mail(raw + end, preferences="No")  # in which nothing is tracked
        assert decode(body_of(new.split(edge)[1]).replace(end, b"")) == lines(wanted if "{{" in text else text, ends)
        assert not report.tracks


def test_what_the_sender_would_not_expect_is_warned_of_and_what_they_know_is_not() -> None:
    known = (
        NEWSLETTER
        + f'<a data-track=off href="{URL}">x</a><a href="{tracked(URL)}">x</a><a href="http://acme.com/{{{{x}}}}">'
    )
    assert instrument(known)[1].warnings() == []
    bad = {
        "https://ann:secret@acme.com/": "it holds credentials", "https://acme.com:99999/": "malformed",
        f"{LONGEST}y": "4,097 characters", "https://acme.com\\x": "backslash", "https://a b.example/": "malformed",
    }  # fmt: skip
    for url, told in bad.items():
        (warning,) = instrument(f'{known}<a href="{url}">x</a><a href="{url}">x</a>')[1].warnings()
        assert warning.startswith("links left as they are: 2, such as 'https://a") and told in warning
        assert "secret" not in warning
    assert len(instrument("".join(f'<a href="https://x {n}/">x</a>' for n in range(100)))[1].warnings()) == 5
    (warning,) = tracker.instrument_html_bytes(b"<a href='https://acme.com/\xfc'>x</a>", how())[1].warnings()
    assert "can't be read" in warning
    long = f"https://acme.com/{'x' * 690}"
    for page, told in (
        (f'<a href="{long}">x</a>', "longer than a line"),
        ("x" * 950 + PAGE, "line breaks were put into 2 tags"),
    ):
        for coding, warned in (("7bit", 1), ("8bit", 1), ("quoted-printable", 0), ("base64", 0), ("binary", 0)):
            body = in_coding(page.encode(), coding)
            warnings = instrument_mail(single(body, f"{ENCODING}: {coding}"))[1].warnings()
            assert [told in each for each in warnings] == [True] * warned


# -- What a message itself says is to be tracked

TRACK_HEADERS = {  # by whether the pixel is placed and links are wrapped: what the headers say
    (False, False): ("X-Track: none", "x-track : None ", "X-TRACK:\r\n none", "X-Track: none\r\nX-Track: none"),
    (True, False): ("X-Track: opens", "X-track: \tOPENS", "X-Track:\r\n\topens\r\n "),
    (False, True): ("X-Track: clicks", "X-Track:clicks,", "X-Track: clicks\r\nx-track: clicks"),
    (True, True): ("X-Track: opens, clicks", "X-Track: clicks opens", "X-Track: opens\r\nX-Track: clicks"),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("ends", ["\r\n", "\n", "\r"])
def test_a_header_says_what_of_a_message_is_tracked_and_does_not_go_out(ends: str, first: bool) -> None:
    bare = single(PAGE, ends=ends)
    for (opens, clicks), headers in TRACK_HEADERS.items():
        want = how(pixel="bottom" if opens else "none", links=clicks, hidden_link=clicks)
        for said in (each.replace("\r\n", ends) for each in headers):
            raw = (said + ends).encode() + bare if first else single(PAGE, said, ends=ends)
            new, report = tracker.instrument_message(raw, how(hidden_link=True))
            assert (new, report.tracks) == (tracker.instrument_message(bare, want)[0], opens or clicks), said
            assert undone(raw, new, report.edits) == raw
            assert (("the message", "its X-Track says none") in report.skipped) == (not opens and not clicks)
            assert tracker.instrument_message(raw, how(pixel="none", links=False))[1].tracks is False


@pytest.mark.parametrize(
    "said", ["off", "no", "", " ", "opens; clicks", "none, opens", "open", "true", "=?utf-8?q?none?=", "\xe9"]
)
def test_a_message_whose_header_says_no_word_that_is_known_goes_out_as_it_is(said: str) -> None:
    left_alone(single(PAGE, f"X-Track: {said}"), "the message", "expected none, opens, clicks")
    for raw in (
        multipart("mixed", HTML, headers=("X-Tracking: none", "X-Track-Opens: no")),
        inside("text/html", PAGE, "X-Track: none"),
    ):
        assert instrument_mail(raw)[1].wrapped == [URL], "it is another header, or one of a part"


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


def wanted(page: bytes, message: email.message.Message, whole: email.message.Message, pixel: bool) -> bytes:
    """What instrument_html makes of a part."""
    lists = "".join(map(str, whole.get_all("List-Unsubscribe", [])))
    spared = {tracker.read_target(url) for url in re.findall("<(http[^>]*)>", re.sub(r"\s", "", lists))}
    charset = message.get_content_charset() or "utf-8"
    try:
        page.decode(charset)
    except (LookupError, ValueError):
        charset = "latin-1"
    made = how(pixel="bottom" if pixel else "none", leads_back=spared.__contains__)
    return tracker.instrument_html(page.decode(charset), made)[0].encode(charset)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("ends", ["", *BREAKS])
@pytest.mark.parametrize("name", [path.name for path in FILES] or ["none"])
def test_real_mail_differs_in_its_links_and_the_pixel_alone(name: str, ends: str, force: bool, shared: Path) -> None:
    """The report fits the message, and nobody who reads mail sees another difference."""
    raw = (shared / "mail" / name).read_bytes()
    raw = re.sub(rb"\r\n|\n|\r", ends.encode(), raw) if ends else raw
    new, report = instrument_mail(raw, force=force)
    if ends:
        assert {*re.findall(rb"\r\n|\n|\r", new)} <= {ends.encode()}
    old_whole, new_whole = email.message_from_bytes(raw), email.message_from_bytes(new)
    old_parts, new_parts = list(numbered(old_whole)), list(numbered(new_whole))
    assert [(number, seen(each)) for number, each in old_parts] == [(number, seen(each)) for number, each in new_parts]
    touched = {each.removesuffix(" text/html") for each in report.touched}
    assert not touched & {name.split()[0] for name, _ in report.skipped}
    assert new.count(b"/pixel/e1.gif") <= 1
    assert bool(report.edits) == bool(report.touched) == (new != raw)
    pixels = 0
    for (number, old), (_, new_part) in zip(old_parts, new_parts, strict=True):
        if number not in touched:
            assert old.is_multipart() or new_part.get_payload() == old.get_payload()
            continue
        before, after = decoded(old), decoded(new_part)
        has_pixel = b"/pixel/e1.gif" in after
        pixels += has_pixel
        should = wanted(before, old, old_whole, has_pixel)
        if max(map(len, should.splitlines())) > 998:
            after, should = BLANKS.sub(b"", after), BLANKS.sub(b"", should)
        assert after == should
    assert pixels == report.pixel.startswith("placed")
    assert report.size_after >= report.size_before
    assert all(reason for _, reason in [*report.left, *report.skipped])


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
    eagerness = chance.choice([0.0, 0.05, 0.5])
    tail = chance.choice([" ", "  \t", ""]) if odd else ""
    width = chance.choice([20, 60, 75, 75, 75]) - len(tail)
    out: list[str] = []
    for text in data.decode("latin-1").split(ends):
        line = ""
        for n, letter in enumerate(text):
            token = letter if " " <= letter <= "~" or letter == "\t" else f"={ord(letter):02X}"
            illegal = odd and re.match(r"[g-z.<>\"/][a-zA-Z0-9<>./]", text[n + 1 :]) and len(line) < 60
            must = (letter == "=" and not illegal) or (letter == "." and not line)
            if must or (letter in " \t" and n + 1 == len(text)) or chance.random() < eagerness:
                token = f"={ord(letter):02{chance.choice('xX') if odd else 'X'}}"
            if len(line) + len(token) > width:
                out.append(f"{line}={tail}{ends}")
                line, token = "", "=2E" if token == "." else token
            line += token
        out.append(f"{line}{tail}{ends}")
    return "".join(out).removesuffix(f"{tail}{ends}").encode()


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("coding", ["quoted-printable", "odd-quoted-printable", "base64", "8bit"])
@pytest.mark.parametrize("ends", BREAKS)
def test_what_is_decoded_is_what_html_alone_becomes(coding: str, ends: str, seed: int) -> None:
    chance = random.Random(f"{coding} {seed}")
    for _ in range(12):
        body = page = random_page(chance, ends).encode()
        if coding == "base64":
            body = in_base64(page, chance.choice([76, 72, 60, 64, 4, 10_000]), ends).strip()
            body += (ends * chance.randrange(3)).encode()
        elif coding != "8bit":
            body = random_qp(chance, page, ends, odd=coding.startswith("odd"))
            assert unquote_qp(body) == page, "the test's own encoder is wrong"
            instrument_qp(body, ends)
        raw = single(body, f"Content-Transfer-Encoding: {coding.removeprefix('odd-')}", ends=ends)
        new, _ = instrument_mail(raw)
        head = len(raw) - len(body)
        assert new[:head] == raw[:head]
        should = expected(page)
        if coding == "base64":
            assert base64.b64decode(new[head:]) == should
        elif coding == "8bit" and max(map(len, should.split(ends.encode()))) > 998:
            assert BLANKS.sub(b"", new[head:]) == BLANKS.sub(b"", should)
            assert max(map(len, new.split(ends.encode()))) <= max(998, *map(len, raw.split(ends.encode())))
        elif coding == "8bit":
            assert new[head:] == should


# -- Whatever comes

SAMPLES = [
    nested(2),
    single(PAGE.replace("=", "=3D"), QP),
    single(base64.encodebytes(PAGE.encode()), BASE64),
    single("ユーザー名 メーカー様".encode("iso-2022-jp") + PAGE.encode(), kind="text/html; charset=iso-2022-jp"),
    single(base64.encodebytes(PAGE.encode("utf-16")), BASE64, kind="text/html; charset=utf-16"),
    multipart("mixed", part("text/html", PAGE.replace("=", "=3D"), QP), HTML, headers=(f"List-Unsubscribe: <{URL}>",)),
]
TOKENS = [
    b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\n\n", b"--b1", b"--b1--", b"=", b"=\r\n", b"=3D", b".", b'"', b"'", b"<",
    b">", b"&", b"\0", b"\x1b$B", b"\x1b(B", b"~{", b"\xff\xfe", b"\xfe\xff", b"\x85", b"\xe2\x80\xa8", b"<!--", b"-->",
    b"--!>", b"</body>", b"<body>", b"<script>", b"</script>", b"<title>", b"<plaintext>", b"<!--[if mso]>",
    b"<![endif]-->", b"&amp;", b"<a href=", b'<a href="http://a.de/">', PIXEL.encode(), "ü".encode(),
    b"Content-Type: text/html; charset=", b"utf-16-le", b"base64", b"hex", b"; boundary=b1",
    b"Content-Transfer-Encoding: base64\r\n", b"charset*=hex''x", b"boundary*0=b;", b"From x\n", b"x" * 1000, b" :",
]  # fmt: skip


def accidents(samples: list[bytes]) -> Iterator[bytes]:
    """Messages or pages after a few accidents, for some time."""
    chance = random.Random(4)
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        data = bytearray(chance.choice(samples))
        for _ in range(chance.choice([1, 1, 2, 5, 20])):
            at = chance.randrange(len(data) + 1)
            to = min(len(data), at + chance.choice([0, 1, 2, 10, 300]))
            other = chance.randrange(len(data) + 1)
            changes = (b"", data[at:to] * 2, chance.randbytes(to - at), data[at:to] + data[other : other + 200])
            data[at:to] = chance.choice([*changes, chance.choice(TOKENS)])
        yield bytes(data)


@pytest.mark.parametrize("origin", ["own", "shared"])
@pytest.mark.parametrize("kind", ["html", "eml"])
def test_no_accident_raises_touches_a_header_or_can_not_be_undone(
    kind: str, origin: str, request: pytest.FixtureRequest
) -> None:
    own = {"html": [text.encode() for text in PAGES], "eml": SAMPLES}
    samples = own[kind] if origin == "own" else real_files(request, f"*.{kind}")
    for raw in accidents([sample[: 20_000 if kind == "html" else None] for sample in samples]):
        if kind == "html":
            new, report = tracker.instrument_html_bytes(raw, how())
            again, report_again = tracker.instrument_html_bytes(new, how())
            assert (again, report_again.wrapped) == (new, []), raw
            assert new.count(b"/k3v9x2mp/pixel/") <= raw.count(b"/k3v9x2mp/pixel/") + 1
            assert undone(raw, new, report.edits) == raw, raw
            continue
        for force in (False, True):
            new, report = tracker.instrument_message(raw, how(), force=force)
            assert undone(raw, new, report.edits) == raw, raw
            before, after = (numbered(email.message_from_bytes(each)) for each in (raw, new))
            assert new == raw or [seen(each) for _, each in before] == [seen(each) for _, each in after], raw


SIZE = 500_000
HOSTILE = {
    **{f"{unit!r} in HTML": single(unit * (SIZE // len(unit)), f"{ENCODING}: binary") for unit in bench.HOSTILE},
    **{f"{unit!r} in quoted-printable": bench.quoted(unit, SIZE) for unit in bench.HOSTILE_QUOTED},
    "links in quoted-printable": bench.quoted("<a href=3Dhttp://a.de/>", SIZE),
    "multiparts in multiparts": bench.nested(SIZE),
    "boundaries alike": bench.nested_alike(SIZE),
    "parameters": single(PAGE, kind="text/html; " + "a*0=b;" * (SIZE // 6)),
    "comments in comments": single(PAGE, "To: " + "(" * SIZE),
}  # fmt: skip


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE)
def test_no_message_takes_more_than_linear_time(raw: bytes) -> None:
    """What would take quadratic time takes minutes at this size; what does not, a tenth of a second."""
    start = time.process_time()
    tracker.instrument_message(raw, how())
    tracker.said_by_headers(raw)
    assert time.process_time() - start < 3


# == The ways of `help instrument`, as they stand there ==

INSTRUMENT = tracker.help_text("instrument")
RECIPIENTS = 200


def run(name: str, folder: Path, server: Server, tenant: dict[str, Any], mailbox: Mailbox, *words: str) -> None:
    """Run a script of `help instrument`: the block that begins with this comment."""
    (script,) = [block for block in codes(INSTRUMENT, "python") if block.startswith(f"# {name}\n")]
    (folder / name).write_text(script)
    how = {"API": f"{server.url}/{tenant['id']}", "KEY": tenant["api_key"], "SMTP_HOST": "127.0.0.1"}
    environ = {**server.environ, **how, "SMTP_PORT": str(mailbox.port)}
    command = [sys.executable, name, *words]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()


def html_of(raw: bytes) -> tuple[str, str]:
    """The recipient of a message, and its HTML."""
    message = email.message_from_bytes(raw, policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    body = message.get_body(("html",))
    assert body is not None
    return message["To"].addresses[0].addr_spec, str(body.get_content())


def rows(server: Server, id_: str) -> list[dict[str, Any]]:
    """The tenant's emails."""
    found: list[dict[str, Any]] = json.loads(get(server.port, f"/{id_}/emails.json?limit=5000")[2])["rows"]
    return found


def test_the_scripts_send_each_recipient_their_own(server: Server, mailbox: Mailbox, tmp_path: Path) -> None:
    tenant = server.tenant("Acme", keyed=True)
    people = [(f"reader{n}@example.org", f"Reader <{n}>") for n in range(RECIPIENTS)]
    with (tmp_path / "people.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("address", "name"), *people])
    run("send.py", tmp_path, server, tenant, mailbox)
    run("merge.py", tmp_path, server, tenant, mailbox, "people.csv")
    arrived = dict(map(html_of, mailbox.received))
    assert set(arrived) == {"ann@example.org", *dict(people)}
    assert all(f"Hello Reader &lt;{n}&gt;" in arrived[address] for n, (address, _) in enumerate(people))
    named = re.compile(rf"/{tenant['mail_id']}/(?:pixel|click)/([\w-]+)")
    keys = {address: {*named.findall(page)} for address, page in arrived.items()}
    assert len(set.union(*keys.values())) == RECIPIENTS + 1
    registered = rows(server, tenant["id"])
    assert {row["recipient"]: {row["key"]} for row in registered} == keys
    assert [row["campaign"] for row in registered if row["recipient"] == "ann@example.org"] == ["Spring"]
    page = arrived["ann@example.org"]
    assert page.count("/pixel/") == page.count("/click/") == 1
    status, headers, _ = get(server.port, re.findall(rf"{server.url}(/\w+/click/[^\"]+)", page)[0])
    assert (status, headers["location"]) == (302, "https://acme.com/sale?a=1&b=2")
    pixel = re.findall(rf"{server.url}(/\w+/pixel/[^\"]+)", arrived["reader7@example.org"])[0]
    get(server.port, pixel, **{"User-Agent": CHROME})
    opened = [row["recipient"] for row in rows(server, tenant["id"]) if row["opened_as"] == "person"]
    assert opened == ["reader7@example.org"]


def test_a_template_is_instrumented_that_a_tool_merges(server: Server, tmp_path: Path) -> None:
    server.tenant("My shop")
    (tmp_path / "page.html").write_text('<body><a href="https://acme.com/">x</a></body>')
    (commands,) = [block for block in codes(INSTRUMENT) if "--key-placeholder" in block]
    commands = commands.replace("tracker.py", f"'{sys.executable}' '{ROOT}/tracker.py' --env {os.devnull}")
    subprocess.run(["sh", "-ec", commands], cwd=tmp_path, env=server.environ, check=True, timeout=60)
    merged = (tmp_path / "tracked.html").read_text().replace("{{ .Subscriber.UUID }}", "5f3c")
    for path in re.findall(rf"{server.url}([^\"]+)", merged):
        assert get(server.port, path, **{"User-Agent": CHROME})[0] in (200, 302)
    assert server.run("campaign", "list", "My shop") == "Spring: 1,000 sent, opened by people 1, clicked by people 1\n"
