"""HTML: which links are wrapped, where the pixel goes, and that nothing else changes."""

from __future__ import annotations

import random
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import tracker

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import html5lib  # type: ignore[import-untyped]

BASE = "https://track.example.com"
PIXEL = f'<img src="{BASE}/k3v9x2mp/pixel/e1.gif" width="1" height="1" alt="">'
TRACKED = re.compile(rf"{BASE}/k3v9x2mp/click/e1/[\w-]{{16}}/([\w-]+)")
SPECIAL = "https://acme.com/"
FUZZ_SECONDS = 2.0

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
SAMPLES = (NEWSLETTER, FRAGMENT, '<a href="https://acme.com/">x</a>' * 20, "", "plain", "<plaintext></body>")


def how(**options: Any) -> tracker.Instrumenting:
    """As a tenant's server instruments its email e1."""
    maker = tracker.LinkMaker(BASE, "k3v9x2mp", "s" * 64, lambda target: target.host == "track.example.com")
    return maker.instrumenting("e1", **options)


def undone(text: str, new: str, edits: list[tracker.Edit]) -> str:
    """The input again: what each edit put in, taken out of the output."""
    pieces, at, place = [], 0, 0
    for edit in edits:
        kept = edit.start - at
        pieces += [new[place : place + kept], text[edit.start : edit.end]]
        place += kept + len(edit.new)
        assert new[place - len(edit.new) : place] == edit.new
        at = edit.end
    return "".join([*pieces, new[place:]])


def instrument(text: str, **options: Any) -> tuple[str, tracker.Report]:
    """Instrument, and see that undoing gives the input back and that a second time changes nothing."""
    new, report = tracker.instrument_html(text, how(**options))
    before, after = (each.encode("utf-8", "surrogatepass").decode("latin-1") for each in (text, new))
    assert undone(before, after, report.edits) == before
    again, report_again = tracker.instrument_html(new, how(**options))
    assert (again, report_again.wrapped) == (new, [])
    return new, report


def links_only(text: str) -> tuple[str, list[str]]:
    """The output with TRACKED in place of each tracked link, and the targets that those decode to."""
    new, report = instrument(text, place="none")
    targets = [tracker.decode_target(encoded) for encoded in TRACKED.findall(new)]
    assert targets == report.wrapped
    return TRACKED.sub("TRACKED", new), report.wrapped


# -- Which links


@pytest.mark.parametrize(
    "text, expected, target",
    [
        ('<a href="https://acme.com/">', '<a href="TRACKED">', SPECIAL),
        ("<a href='https://acme.com/'>", "<a href='TRACKED'>", SPECIAL),
        ("<a href=https://acme.com/>", "<a href=TRACKED>", SPECIAL),
        ("<a href=https://acme.com/ class=x>", "<a href=TRACKED class=x>", SPECIAL),
        ('<A\tHREF\n=\r\n"https://acme.com/" >', '<A\tHREF\n=\r\n"TRACKED" >', SPECIAL),
        ('<area shape="rect" href="https://acme.com/"/>', '<area shape="rect" href="TRACKED"/>', SPECIAL),
        ('<a/href="https://acme.com/"/>', '<a/href="TRACKED"/>', SPECIAL),
        ('<a class="x"href="https://acme.com/">', '<a class="x"href="TRACKED">', SPECIAL),
        ('<a href="HTTPS://Acme.com/Path">', '<a href="TRACKED">', "HTTPS://Acme.com/Path"),
        ('<a href="http://acme.com">', '<a href="TRACKED">', "http://acme.com"),
        ('<a href=" \t https://acme.com/a\nb\r\n">', '<a href="TRACKED">', "https://acme.com/ab"),
        ('<a href="\x01https://acme.com/\x1f">', '<a href="TRACKED">', SPECIAL),
        ("<a href=\"https://acme.com/Jack's\">", '<a href="TRACKED">', "https://acme.com/Jack's"),
        ("<a href='https://acme.com/\"q\"'>", "<a href='TRACKED'>", 'https://acme.com/"q"'),
        ('<a title="href=\'https://acme.com/t\'" href="https://acme.com/">', None, SPECIAL),
        ('<a title="a > b" href="https://acme.com/">', '<a title="a > b" href="TRACKED">', SPECIAL),
        ('<a data-href="https://acme.com/d" href="https://acme.com/">', None, SPECIAL),
        ('<a href="https://acme.com/" href="https://acme.com/2">', None, SPECIAL),
        ('<a href="https://acme.com/?u=https://other.example/&href=x">', None, "https://acme.com/?u=https://other.example/&href=x"),
        ('<a href="https://acme.com/?a[]=1&b=%5B%5D&c={&d=|">', None, "https://acme.com/?a[]=1&b=%5B%5D&c={&d=|"),
        ('<a href="https://acme.com/#/route?x#y">', None, "https://acme.com/#/route?x#y"),
        ('<a href="https://acme.com/grün?ü=ß">', None, "https://acme.com/grün?ü=ß"),
        ('<a href="https://other-tracker.example/c?u=https%3A%2F%2Facme.com">', None, "https://other-tracker.example/c?u=https%3A%2F%2Facme.com"),
        ('<a href="https://track.example.com.evil.example/">', None, "https://track.example.com.evil.example/"),
    ],
)  # fmt: skip
def test_a_link_to_the_web_is_wrapped_and_nothing_but_its_url_changes(
    text: str, expected: str | None, target: str
) -> None:
    new, targets = links_only(text)
    assert targets == [target]
    assert expected is None or new == expected


@pytest.mark.parametrize(
    "written, target",
    [
        ("?a=1&amp;b=2", "?a=1&b=2"),
        ("?a=1&b=2", "?a=1&b=2"),
        ("?a=1&#038;b=2", "?a=1&b=2"),
        ("?a=1&#x26;b=2", "?a=1&b=2"),
        ("?a=1&amp;amp;b=2", "?a=1&amp;b=2"),
        ("?a=1&copy=2&section=3&times=4", "?a=1&copy=2&section=3&times=4"),
        ("?a=1&copy;=2", "?a=1©=2"),
        ("?a=&copy", "?a=©"),
        ("?a=&copyx", "?a=&copyx"),
        ("?a=&copy.x", "?a=©.x"),
        ("?a=&notit;", "?a=&notit;"),
        ("?a=&notin;", "?a=∉"),
        ("?a=&unknown;", "?a=&unknown;"),
        ("?a=&#128;", "?a=€"),
        ("?a=&#xD800;&#x110000;&#99999999999;", "?a=\ufffd\ufffd\ufffd"),
        ("?a=&#228", "?a=ä"),
        ("?a=&#;&#x;&;", "?a=&#;&#x;&;"),
    ],
)
def test_character_references_are_decoded_once_by_the_rule_for_attributes(written: str, target: str) -> None:
    assert links_only(f'<a href="https://acme.com/{written}">')[1] == [f"https://acme.com/{target}"]
    tree = html5lib.parse(f'<a href="https://acme.com/{written}">', namespaceHTMLElements=False)
    assert tree.find(".//a").get("href") == f"https://acme.com/{target}"


def test_a_scheme_of_character_references_is_read() -> None:
    assert links_only('<a href="&#104;ttps&colon;&sol;/acme.com/">')[1] == [SPECIAL]
    assert links_only('<a href="&#109;&#97;&#105;lto:a@acme.com">')[1] == []


@pytest.mark.parametrize(
    "url",
    [
        *(
            "mailto:a@acme.com",
            "tel:+1",
            "javascript:alert(1)",
            "data:text/html,x",
            "cid:1@x",
            "fb://page",
            "ftp://acme.com/",
        ),
        *(
            "/path",
            "path",
            "?q",
            "acme.com",
            "www.acme.com",
            "//acme.com/",
            "http://",
            "https:/acme.com",
            "https:acme.com",
        ),
        *("http:///x", "https://?x", "https:\\\\acme.com\\", "intent://acme.com#Intent;scheme=https;end"),
    ],
)
def test_what_is_no_absolute_web_link_is_left_and_told(url: str) -> None:
    new, report = instrument(f'<a href="{url}">', place="none")
    assert new == f'<a href="{url}">'
    assert report.left == [(url, "it is no absolute http or https link")]


@pytest.mark.parametrize("url", ["", " ", "#", "#top", "\n#x"])
def test_empty_links_and_anchors_are_left_without_a_word(url: str) -> None:
    new, report = instrument(f'<a href="{url}">', place="none")
    assert (new, report.left) == (f'<a href="{url}">', [])


@pytest.mark.parametrize(
    "tag", ["link", "base", "img", "abbr", "article", "form", "v:fill", "v:roundrect", "ab", "svg"]
)
def test_other_tags_are_left(tag: str) -> None:
    text = f'<{tag} href="https://acme.com/" src="https://acme.com/" action="https://acme.com/">'
    assert links_only(text) == (text, [])


@pytest.mark.parametrize(
    "placeholder",
    [
        "{{url}}",
        "{id}",
        "${id}",
        "*|ID|*",
        "%%id%%",
        "<%= id %>",
        "[[id]]",
        "%recipient.id%",
        "%recipient_id%",
        "{% x %}",
    ],
)
def test_a_url_that_holds_a_placeholder_is_left_and_told(placeholder: str) -> None:
    for url in (placeholder, f"https://acme.com/?x={placeholder}&y=1"):
        _, report = instrument(f'<a href="{url}">')
        assert [(left, "placeholder" in reason) for left, reason in report.left] == [(url, True)]


@pytest.mark.parametrize("placeholder", ['{{ url "x" }}', '{% url "x" %}', '<%= url "x" %>'])
def test_a_placeholder_with_the_quotes_of_its_attribute_in_it_is_not_cut_in_two(placeholder: str) -> None:
    text = f'<a href="https://acme.com/{placeholder}">x</a>'
    new, report = instrument(text, place="none")
    assert new == text
    (left,) = report.left
    assert left[0] == text.split('"')[1].rstrip() and "placeholder" in left[1]


@pytest.mark.parametrize("rest", ["?a=%7Bx%7D", "{", "}{", "%%", "?q=100%25%", "[x]", "*|", "?%recipient"])
def test_what_only_looks_like_a_placeholder_is_wrapped(rest: str) -> None:
    assert links_only(f'<a href="https://acme.com/{rest}">')[1] == [f"https://acme.com/{rest}"]


@pytest.mark.parametrize(
    "attribute",
    [
        *('data-track="off"', "DATA-TRACK=OFF", 'clicktracking="off"', "clicktracking=off", "data-skip-click"),
        *('data-skip-click="true"', "data-no-track", "data-pm-no-track", "data-as-no-track", "ses:no-track"),
        *(
            'disable-tracking="true"',
            'mc:disable-tracking="true"',
            "mautic:disable-tracking",
            'data-msys-clicktrack="0"',
        ),
    ],
)
def test_a_tag_may_say_that_its_link_is_not_tracked(attribute: str) -> None:
    for text in (f'<a {attribute} href="https://acme.com/">', f'<a href="https://acme.com/" {attribute}>'):
        new, report = instrument(text, place="none")
        assert new == text
        assert report.left == [(SPECIAL, f"its tag says {attribute.partition('=')[0].lower()}")]


@pytest.mark.parametrize(
    "attribute",
    ['data-track="on"', "data-track", 'clicktracking="on"', 'data-msys-clicktrack="1"', 'disable-tracking="false"',
     'title="data-no-track"', 'data-skip-click="false"', "data-no-tracking", "class=data-no-track"],
)  # fmt: skip
def test_other_attributes_and_values_do_not_stop_tracking(attribute: str) -> None:
    assert links_only(f'<a {attribute} href="https://acme.com/">')[1] == [SPECIAL]


@pytest.mark.parametrize(
    "url", [f"{BASE}/k3v9x2mp/click/e1/x/y", BASE, "http://TRACK.example.com:80/x", "https://track.example.com./"]
)
def test_a_link_of_our_own_is_left(url: str) -> None:
    assert instrument(f'<a href="{url}">')[1].left == [(url, "it leads to this server already")]


def test_a_link_is_wrapped_up_to_the_longest_target_and_then_left() -> None:
    longest = SPECIAL + "x" * (tracker.MAX_TARGET - len(SPECIAL))
    assert links_only(f'<a href="{longest}">')[1] == [longest]
    _, report = instrument(f'<a href="{longest}y">')
    assert [reason for _, reason in report.left] == ["it has 4,097 characters; expected at most 4,096"]


@pytest.mark.parametrize("url", ["https://user:pw@acme.com/", "https://acme.com:99999/", "https://a b.example/"])
def test_what_no_link_may_lead_to_is_left_with_the_reason(url: str) -> None:
    _, report = instrument(f'<a href="{url}">')
    assert [left for left, _ in report.left] == [url] and report.wrapped == []


def test_the_same_url_twice_is_two_links() -> None:
    assert links_only('<a href="https://acme.com/"><a href="https://acme.com/">')[1] == [SPECIAL, SPECIAL]


def test_without_links_only_the_pixel_is_placed() -> None:
    new, report = instrument(NEWSLETTER, links=False)
    assert (new, report.wrapped, report.left) == (NEWSLETTER.replace("</BODY>", PIXEL + "</BODY>"), [], [])


def test_a_page_of_more_links_and_images_than_mail_has_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "MAX_TAGS", 20)
    assert len(instrument('<a href="https://acme.com/">' * 20)[1].wrapped) == 20
    page = '<a href="https://acme.com/"><img src="x">' * 11
    new, report = instrument(page)
    assert (new, report.wrapped, report.pixel) == (page, [], "not placed: the page is left as it is")
    assert report.skipped == [("the page", "it has more than 20 links and images")]


def test_a_tag_of_more_attributes_than_any_has_is_none() -> None:
    words = " b" * (tracker.MAX_ATTRIBUTES - 1)
    assert links_only(f'<a href="https://acme.com/"{words}>')[1] == [SPECIAL]
    text = f'<a href="https://acme.com/"{words} b>'
    new, report = instrument(text)
    assert (new, report.wrapped) == (PIXEL + text, [])


# -- What holds no link


@pytest.mark.parametrize(
    "hidden, live",
    [
        ("<!-- {} -->", "{}"), ("<!-- {} --!>", "{}"), ("<!--{}-- >-->", "{}"), ("<!-->", "{}"), ("<!--->", "{}"),
        ("<!-- -- {} > -->", "{}"), ("<!x {0[0]}x>", "{}"), ("<?php {0[0]}x>", "{}"), ("</ {0[0]}x>", "{}"),
        ("<style>{}</style>", "{}"), ("<style>{}</styles></style foo>", "{}"), ("<STYLE>{}</style/>", "{}"),
        ("<script>{}</script>", "{}"), ("<script><!-- <script>{}</script>{} --></script>", "{}"),
        ("<script><!-- {} </script>", "{}"), ("<title>{}</title>", "{}"), ("<textarea>{}</TEXTAREA\n>", "{}"),
        ("<xmp>{}</xmp>", "{}"), ("<iframe>{}</iframe>", "{}"), ("<noframes>{}</noframes>", "{}"),
    ],
)  # fmt: skip
def test_comments_and_raw_text_hold_no_links_and_end_where_browsers_end_them(hidden: str, live: str) -> None:
    link = '<a href="https://acme.com/{}">'
    text = hidden.format(link.format("hidden"), link.format("hidden")) + live.format(link.format("live"))
    assert links_only(text)[1] == ["https://acme.com/live"]


@pytest.mark.parametrize(
    "text",
    ['<a href="https://acme.com/', "<a href=https://acme.com/", '<a href="https://acme.com/" class="x', "<!-- x",
     "<title>x", "<script>x", "<plaintext>", "<a", "</", "<!", "<![CDATA[x", "<style><a href='https://acme.com/'>"],
)  # fmt: skip
def test_what_does_not_end_is_left_and_the_pixel_stands_before_it(text: str) -> None:
    new, report = instrument("<p>x</p>" + text)
    assert new == f"<p>x</p>{PIXEL}{text}"
    assert report.wrapped == []


@pytest.mark.parametrize(
    "text",
    [
        "a < b <a href='https://acme.com/'>",
        "<<a href='https://acme.com/'>",
        "<3 <a href='https://acme.com/'>",
        "x</><a href='https://acme.com/'>",
    ],
)
def test_a_sign_that_begins_no_tag_hides_none(text: str) -> None:
    assert links_only(text)[1] == [SPECIAL]


def test_conditional_comments_hold_links_of_a_area_and_vml() -> None:
    inside = '<a href="https://acme.com/a"><v:roundrect href="https://acme.com/v"><V:RECT href=https://acme.com/r><o:x href="https://acme.com/o">'
    text = f"<!--[if gte mso 9]>{inside}<![endif]-->"
    new, targets = links_only(text)
    assert targets == ["https://acme.com/a", "https://acme.com/v", "https://acme.com/r"]
    assert new == text.replace("https://acme.com/a", "TRACKED").replace("https://acme.com/v", "TRACKED").replace(
        "https://acme.com/r", "TRACKED"
    )


@pytest.mark.parametrize(
    "start, end",
    [
        ("<!--[if !mso]><!-->", "<!--<![endif]-->"),
        ("<!--[if !mso]><!-- -->", "<!-- <![endif]-->"),
        ("<![if !mso]>", "<![endif]>"),
    ],
)
def test_what_outlook_alone_does_not_see_is_live(start: str, end: str) -> None:
    text = f'{start}<a href="https://acme.com/">x</a>{end}'
    assert links_only(text) == (text.replace(SPECIAL, "TRACKED"), [SPECIAL])


# -- The pixel


@pytest.mark.parametrize(
    "text, where",
    [
        ("<body>x|</body></html>", "before </body>"),
        ("<BODY>x|</BODY >", "before </body>"),
        ("<body></body>y|</body>z", "before </body>"),
        ("<body>x|</body><!-- </body> --><script></body></script>", "before </body>"),
        ("<body>x|</body><!--[if mso]></body><![endif]-->", "before </body>"),
        ("<html><p>x|</html>\n", "before </html>"),
        ("<p>x</p>\n|", "at the end"),
        ("|", "at the end"),
        ("x|<a href='", "at the end, before unfinished markup"),
        ("x|<!-- </body>", "at the end, before unfinished markup"),
        ("x|<plaintext></body>", "at the end, before unfinished markup"),
        ("<body>x|</body><plaintext></body>", "before </body>"),
    ],
)
def test_the_pixel_stands_at_the_end_of_the_body(text: str, where: str) -> None:
    new, report = instrument(text.replace("|", ""))
    assert (new, report.pixel) == (text.replace("|", PIXEL), f"placed {where}")


@pytest.mark.parametrize(
    "text",
    [
        "<html><head></head><body class='a>b'>|x</body>",
        "<html><head></head>|x</html>",
        "<p>x|",
        "<!-- <body> --><BODY>|x<body>",
    ],
)
def test_top_puts_it_first_in_the_body_where_that_is_to_be_seen(text: str) -> None:
    assert instrument(text.replace("|", ""), place="top")[0] == text.replace("|", PIXEL)


def test_none_places_none() -> None:
    new, report = instrument("<body></body>", place="none")
    assert (new, report.pixel) == ("<body></body>", "not placed: not asked for")


@pytest.mark.parametrize(
    "image", [PIXEL, f"<IMG alt=x SRC='{BASE}/other/pixel/e2.gif'>", f"<img src={BASE}/k3v9x2mp/pixel/x.gif>"]
)
def test_there_is_no_second_pixel(image: str) -> None:
    new, report = instrument(f"<body>{image}</body>")
    assert (new, report.pixel) == (f"<body>{image}</body>", "not placed: one of ours is there already")


@pytest.mark.parametrize(
    "image", ["<img src='https://acme.com/pixel/e1.gif'>", f"<!-- {PIXEL} -->", f"<img src='{BASE}/logo.gif'>"]
)
def test_another_image_is_no_pixel_of_ours(image: str) -> None:
    assert instrument(f"<body>{image}</body>")[0] == f"<body>{image}{PIXEL}</body>"


# -- The report


def test_sizes_are_bytes_and_what_gmail_would_clip_is_told() -> None:
    page = "ü" * 49_000
    _, report = instrument(page)
    assert (report.size_before, report.size_after, report.warnings()) == (98_000, 98_000 + len(PIXEL), [])
    _, report = instrument(page + "ü" * 1000)
    assert report.size_after == 100_000 + len(PIXEL)
    assert report.warnings()[0].startswith(f"the HTML has {report.size_after:,} bytes, 100,000 before")


def test_a_report_tells_everything_to_programs() -> None:
    told = instrument(NEWSLETTER)[1].as_json()
    assert told["wrapped"] == [
        *("https://acme.com/sale?a=1&b=2#grün", "https://acme.com/O%27Neil?q=s+Bar", "https://acme.com/plain"),
        "https://acme.com/button",
    ]
    assert [left["url"] for left in told["left"]] == ["mailto:a@acme.com", "{{unsubscribe_url}}"]
    assert told["pixel"] == "placed before </body>"


# -- Real pages


def reading(text: str) -> list[tuple[str, dict[str, str] | str]]:
    """What an HTML5 parser reads: tags with their attributes, and texts."""
    found: list[tuple[str, dict[str, str] | str]] = []

    def walk(node: Any) -> None:
        found.append((str(node.tag), dict(node.attrib)))
        if callable(node.tag):
            found.append(("comment", node.text or ""))
        elif node.text:
            found.append(("text", node.text))
        for child in node:
            walk(child)
            if child.tail:
                if found[-1][0] == "text":
                    found[-1] = ("text", str(found[-1][1]) + child.tail)
                else:
                    found.append(("text", child.tail))

    walk(html5lib.parse(text, namespaceHTMLElements=False))
    return found


def is_pixel(attributes: dict[str, str] | str) -> bool:
    return isinstance(attributes, Mapping) and "/pixel/e1.gif" in attributes.get("src", "")


def assert_reads_the_same(text: str, new: str, report: tracker.Report) -> None:
    """But for the wrapped links outside of comments and the one pixel."""
    before, after = reading(text), reading(new)
    pixels = [n for n, (_, attributes) in enumerate(after) if is_pixel(attributes)]
    assert len(pixels) == (1 if report.pixel.startswith("placed") else 0)
    for place in pixels:
        del after[place]
        if 0 < place < len(after) and after[place - 1][0] == after[place][0] == "text":
            after[place - 1 : place + 1] = [("text", str(after[place - 1][1]) + str(after[place][1]))]
    assert len(before) == len(after)
    wrapped = list(report.wrapped)
    for (old_tag, old), (tag, attributes) in zip(before, after, strict=True):
        if old == attributes:
            continue
        if isinstance(old, str) or isinstance(attributes, str):
            assert old_tag == tag == "comment"  # a conditional one
            assert TRACKED.search(str(attributes))
            continue
        assert tag == old_tag and {**old, "href": ""} == {**attributes, "href": ""}
        match = TRACKED.fullmatch(attributes["href"])
        assert match
        target = tracker.decode_target(match[1])
        assert target == tracker.browser_trim(old["href"]) and target in wrapped


@pytest.mark.parametrize("text", SAMPLES, ids=range(len(SAMPLES)))
def test_a_page_reads_as_before_but_for_links_and_pixel(text: str) -> None:
    new, report = instrument(text)
    assert_reads_the_same(text, new, report)


def pages(shared: Path) -> Iterator[tuple[str, str]]:
    for path in sorted((shared / "mail").glob("*.html")):
        if "utf-16" not in path.name:
            yield path.name, path.read_bytes().decode("utf-8", "surrogateescape")


def test_real_pages_read_as_before_but_for_links_and_pixel(shared: Path) -> None:
    found = dict(pages(shared))
    assert len(found) > 15
    for name, text in found.items():
        new, report = instrument(text)
        assert report.pixel.startswith("placed"), name
        assert len(report.edits) == len(report.wrapped) + 1, name
        assert_reads_the_same(text, new, report)


# -- Whatever comes

BITS = (
    *(
        "<",
        ">",
        "</",
        "<!--",
        "-->",
        "--!>",
        "<a href=",
        '"',
        "'",
        "=",
        " ",
        "\n",
        "&",
        "&amp;",
        "</body>",
        "<script>",
        "</script>",
    ),
    *(
        "<title>",
        "<plaintext>",
        "<!--[if mso]>",
        "<![endif]-->",
        '<a href="https://acme.com/">',
        "\0",
        "ü",
        "<body>",
        PIXEL,
    ),
)


def mutated(text: str, chance: random.Random) -> str:
    """The text with a few pieces deleted, doubled, put in or cut off."""
    for _ in range(chance.randint(1, 6)):
        start = chance.randint(0, len(text))
        end = min(len(text), start + chance.randint(0, 40))
        piece = chance.choice(["", text[start:end] * 2, chance.choice(BITS)])
        text = text[:start] + piece + (text[end:] if chance.random() < 0.95 else "")
    return text


def fuzz(samples: list[str]) -> None:
    chance = random.Random(4)
    until = time.monotonic() + FUZZ_SECONDS
    while time.monotonic() < until:
        text = mutated(chance.choice(samples), chance)
        new, report = instrument(text)
        assert new.count("/k3v9x2mp/pixel/") <= text.count("/k3v9x2mp/pixel/") + 1
        assert report.size_after >= report.size_before or report.wrapped


def test_whatever_a_page_is_made_of_it_is_instrumented_and_comes_back() -> None:
    fuzz(list(SAMPLES))


def test_whatever_becomes_of_real_pages_they_are_instrumented_and_come_back(shared: Path) -> None:
    fuzz([text[:20_000] for _, text in pages(shared)])
