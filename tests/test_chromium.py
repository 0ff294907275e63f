"""Chromium as the judge: how it shows our pages, what it asks for meanwhile, and where it is led by links.

One is started for all tests; whatever a page or a link asks of another origin is written down, and nothing gets out.
"""

from __future__ import annotations

import base64
import contextlib
import email
import email.policy
import json
import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from email.message import EmailMessage
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
import test_links
from browser import CONTRASTS, HOSTILE_NAME, Chromium, Site, Tab
from conftest import CHROME, ROOT
from load import wait_until

import tracker

# == The stage ==


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One site for all tests here: starting it takes longer than most of them."""
    with contextlib.closing(Site(tmp_path_factory.mktemp("site"))) as made:
        yield made


@pytest.fixture(scope="module")
def tab(site: Site) -> Tab:
    """A tab for all tests that do not read Chromium's logs."""
    return site.tab()


# == Pages ==

SUBJECTS = (
    "<img src=x onerror=console.error(1)>",
    "</title><script>console.error(2)</script>",
    "\"'><svg onload=alert(3)>&lt;b&gt;&amp;",
    "\u202e\u2066right to left \U0001f4a9 " + "W" * 150,
)
AGENTS = ("<script>console.error(4)</script>", "Mozilla/5.0 '\"><img src=https://elsewhere.example/a>", CHROME)
FIGURES = ["25.0 %", "25.0 %", "100.0 %", "4", "1", "1", "2"]  # what an operator should see of this
LONG_HOST = "a" * 63 + ".elsewhere.example"


@pytest.fixture(scope="module")
def mailing(site: Site) -> Site:
    """Four emails with hostile subjects, opened by hostile programs and by a person, who also clicked."""
    emails = [
        {"key": f"h{n}", "subject": subject, "recipient": f"{subject[:40]}@example.org", "campaign": subject}
        for n, subject in enumerate(SUBJECTS)
    ]
    status, answer = site.request("POST", f"/{site.initech['id']}/emails", emails)
    assert status == 201, answer
    mail_id = site.initech["mail_id"]
    for n, agent in enumerate(AGENTS):
        assert site.request("GET", f"/{mail_id}/pixel/h{n}.gif", **{"User-Agent": agent})[0] == 200
    query = quote("?<img src=x onerror=console.error(5)>", safe="")
    for host, expected in (("acme.com", 302), ("elsewhere.example", 200)):
        assert site.request("GET", f"/{mail_id}/click/h2?url=https%3A%2F%2F{host}%2F{query}")[0] == expected
    stats = f"/{site.initech['id']}/stats.json"
    wait_until(lambda: json.loads(site.request("GET", stats)[1])["waiting_hits"] == 0, site.nginx.server)
    return site


def outside(log: Path, site: str) -> list[str]:
    """From a net log: what was asked, or which host was looked up, on behalf of a page of ours, and was not ours.

    What Chromium asks for itself (updates, the time) carries neither our origin as its initiator nor our site as the
    key under which it is kept apart, and no page can make it carry none; a preconnection has such a key as well.
    """
    found = json.loads(log.read_text())
    types = {number: name for name, number in found["constants"]["logEventTypes"].items()}
    others = []
    for event in found["events"]:
        params = event.get("params", {})
        if types[event["type"]] == "URL_REQUEST_START_JOB" and "url" in params:
            ours = "https://localhost" in params["initiator"] + params["network_isolation_key"]
            url = params["url"]
        elif types[event["type"]] == "HOST_RESOLVER_MANAGER_REQUEST" and "host" in params:
            ours = "https://localhost" in params["network_anonymization_key"]
            url = params["host"] + "/"
        else:
            continue
        if ours and not url.startswith(site + "/"):
            others.append(url)
    return others


def test_the_watch_sees_whatever_a_page_could_do_wrong(site: Site, tmp_path: Path) -> None:
    """The counterpart of the next test, which asserts that nothing was seen."""
    page = b"""<!doctype html><title>watched</title><link rel=preconnect href=https://early.example>
        <img src=/no-such.gif><img src=https://elsewhere.example/a>
        <img src=data:image/gif,x><script>console.error("said"); alert("asked"); undefined.x</script>
        <p style="color: #999; background: #888">pale <span style="margin-left: 2000px">far</span>"""
    policy = f"default-src 'unsafe-inline'; img-src {site.url} https://elsewhere.example"
    with contextlib.closing(Chromium(tmp_path, f"--log-net-log={tmp_path}/net.json")) as made:
        tab = made.tab(site.url + "/")
        site.pace(2)
        tab.go(site.url + "/")
        assert tab.complaints == []
        tab.served[site.url + "/watched"] = (page, policy)
        tab.go(site.url + "/watched")
        complaints = "\n".join(tab.complaints)
        for expected in (
            "console: ",
            "'said'",
            "dialog: ",
            "'asked'",
            "exception: ",
            "Content Security",
            "status 404: ",
        ):
            assert expected in complaints
        assert tab.elsewhere == ["https://elsewhere.example/a"]
        assert tab.run("document.documentElement.scrollWidth > innerWidth")
        assert min(contrast for _, contrast in tab.run(CONTRASTS)) < 2
    assert outside(tmp_path / "net.json", site.url), "the preconnection, which is no request yet"


def test_our_pages_render_whole_and_ask_nobody_else_for_anything(mailing: Site, tmp_path: Path) -> None:
    site = mailing
    dashboard = f"{site.url}/{site.initech['id']}/dashboard?machines=1"
    naming = site.plain(site.initech, f"https://{LONG_HOST}/?<img src=x onerror=console.error(6)>", key="h3")
    pages = {dashboard: 200, naming: 200, f"{site.url}/": 200, f"{site.url}/nothing/here": 404}
    with contextlib.closing(Chromium(tmp_path, f"--log-net-log={tmp_path}/net.json")) as made:
        tab = made.tab(site.url + "/")
        for url, status in pages.items():
            site.pace(3)
            tab.go(url)
            # Frames have been painted by then, and what they need has been asked for.
            frame = "requestAnimationFrame(() => "
            tab.run(f"new Promise(done => {frame}{frame}setTimeout(done, 50))))")
            # Chromium complains about every document that isn't 2xx.
            complaints = [each for each in tab.complaints if status == 200 or url not in each]
            assert (tab.statuses, complaints, tab.elsewhere) == ([status], [], []), url
            folders = {urlsplit(each).path.split("/")[1] for each in (*tab.asked, url)}
            assert folders <= {"favicon.ico", "assets", urlsplit(url).path.split("/")[1]}
            assert tab.run("document.documentElement.scrollWidth <= innerWidth"), url
            assert tab.run("document.styleSheets.length") == 1
            assert tab.run("document.querySelectorAll('script, img, style, iframe, [onerror], [onload]').length") == 0
            assert min(contrast for _, contrast in tab.run(CONTRASTS)) >= 4.5, url
            if url == dashboard:
                assert tab.text("h1") == [HOSTILE_NAME]
                assert tab.text(".figures b") == FIGURES
                # Newest first; where a cell has no room for all of it, it is cut for the eye and not in the text.
                assert tab.text(".emails td:nth-child(2)") == list(reversed(SUBJECTS))
                bars = tab.run("Array.from(document.querySelectorAll('.bars > path'), e => e.getBBox().height)")
                assert [height > 0 for height in bars] == [True, False, True]  # people, unconfirmed, machines
            elif url == naming:
                assert tab.text("h1") == [f"This link leads to {LONG_HOST}"]
    assert outside(tmp_path / "net.json", site.url) == []


# == Where links lead ==

HOSTILE: dict[str, tuple[str, ...]] = {
    **{f"refused: {group}": urls for group, urls in test_links.REFUSED.items()},
    "elsewhere": tuple(test_links.ELSEWHERE),
    "a tenant's own": tuple(test_links.ACME),
    "slashes, control characters and credentials": (
        "https://acme.com\\@evil.com", "https://acme.com\\.evil.com/", "https:\\\\evil.com", "https://evil.com\\",
        "https://acme.com?\\@evil.com/", "https://acme.com#\\@evil.com/", "https://acme.com%5c@evil.com",
        "https://acme.com\t.evil.com/", "\thttps://evil.com", "java\nscript:alert(1)", "https://acme.com\n@evil.com/",
        "/\t/evil.com", "https\n://evil.com", "\n//evil.com", "https://acme.com/?a\nb", "h\nttp:evil.com",
        "\x01https://evil.com/", "\x1fjavascript:alert(1)", "\0", "https://acme.com\x0b/",
        "https://evil.com\x08@acme.com/", "https://acme.com/ \0", "https://acme.com\x85.evil.com/",
        "\x85https://evil.com/", "https://acme.com%2F@evil.com/", "https://acme.com%23@evil.com/",
        "https://evil.com#@acme.com", "https://acme.com;@evil.com/", "http://acme.com:@evil.com",
        "https://acme.com @evil.com/", "https://%61cme.com@evil.com", "https:////acme.com/", "https:///",
        "https:?evil.com", "https:@evil.com", "https:acme.com@evil.com/", "https:.evil.com", "/https://evil.com/",
        "..", "//", "evil.com:80", "localhost:3000/", "://evil.com", ":https://evil.com", "%68ttps://evil.com/",
        "https%3A%2F%2Fevil.com", "1https://evil.com/", "[::1]/", "@evil.com",
    ),
    "other schemes": (
        "javascript:\n//https://acme.com", "\0javascript:alert(1)", "javascript&colon;alert(1)",
        "data:text/html;base64,PHNjcmlwdD4=", "vb\tscript:msgbox(1)", "file://acme.com/a",
        "filesystem:https://acme.com/temporary/a", "about:blank", "ws://acme.com", "chrome://settings",
        "https.://acme.com/", "feed:https://acme.com/", "jar:https://acme.com!/", "http\u017f://evil.com/",
        "\u212attps://evil.com",
    ),
    "names": (
        "hTTp://aCmE.CoM:80", "HtTpS://EvIl.CoM?A", "https://ACME.com.EVIL.com/", "https://\u0251cme.com",
        "https://acme.com\u2215evil.com/", "https://acme.com\u2044evil.com/", "https://acme\xb7com/",
        "https://acme.com\u3033evil.com/", "https://acme.com\u30ce.evil.com/", "https://\u24b6cme.com/",
        "https://\u0130.com/", "https://\u2488com/", "https://a\u2100b.com/", "https://a\u33a2b.com",
        "https://\u03f2.com/", "https://\u1fb3.com/", "https://\u13a0.com/", "https://\uab70.com/",
        "https://\u1c82.com/", "https://\u01c5.com/", "https://\u0149.com/", "https://\ud55c\uae00.kr/",
        "https://\u1112\u1161\u11ab.kr/", "https://\u1e9b\u0323.com/", "https://a--b.com/", "https://xn--a.com/",
        "https://xn--bcher-kva.example/", "https://xn--xn--a-0.com/", "https://xn--aü.com/", "https://i\u2764.ws/",
        "https://a\u0378b.com/", "https://a\ue000b.com/", "https://a\uffffb.com/", f"https://{'a' * 64}.com/",
        f"https://{'u' * 300}.com/", f"https://{'ü' * 50}.com/", f"https://{'ü' * 60}.com/",
        f"https://{'.'.join(['a' * 49] * 5)}.com/", f"https://{'a.' * 600}com/", f"https://{'a' * 2000}@evil.com/",
        "https://acme.com/?" + "ü" * 600, "https://evil.com/" + "../" * 500, f"https://acme.com{'.' * 300}evil.com/",
    ),
    "dots, spaces and what is not seen": (
        "https://acme\u2024com/", "https://acme\ufe52com/", "https://%2e/", "https://acme.com%2e/",
        "https://acme.com%2e%2e/", "https://evil.com.:443/", "https://acme\ufe0f.com/", "https://acme\U000e0101.com/",
        "https://ac\u034fme.com/", "https://ac\u180bme.com/", "https://a\u115fb.com/", "https://a\u3164b.com/",
        "https://acme.com\u2028/", "https://acme.com/\u200b", "https://acme.com/#\ufeff", "\ufeffhttps://evil.com/",
        "https:\u200b//evil.com/", "https://ac%C2%ADme.com/", "https://ac%E2%80%8Bme.com/",
        "https://acme\U000e0061.com", "https://a\u17b4b.com/", "https ://acme.com/", "https://acme\xa0.com/",
        "\xa0https://evil.com/", "https://acme.com/\xa0", "\u3000//evil.com", "https://acme.com%20/", " //evil.com/",
        " ", "https://acme.com/a b?c d#e f", "https://evil.com\u2003@acme.com/", "https://acme.com/?a=b ",
        "https://acme.com:443 /", "https://acme\ud800.com/", "https://acme.com/\ud800", "https://acme.com/?\udfff",
        "https://acme.com/#\udc80x", "\ud800https://evil.com/", "https:\ud800//evil.com/", "https://\\ud800.com/",
        "https://acme.com/\ud83d", "https://\ud83d\ude00.com/",
    ),
    "percent signs and separators": (
        "https://%/", "https://acme.com%00.evil.com/", "https://acme.com%0d%0aX-Header: a/",
        "https://acme.com/%0d%0aX:%201", "https://acme.com/%00", "https://%E2%98%83.com", "https://acme.com/%",
        "https://%65%76%69%6c%2e%63%6f%6d/", "https://acme.com%09/", "https://acme%C0%AEcom/",
        "https://%ed%a0%80.com/", "https://%5B::1%5D/", "https://%u0061cme.com/", "https:\uff0f\uff0fevil.com/",
        "https\uff1a//evil.com/", "https://acme.com|evil.com/", "https://acme.com`/", "https://acme.com{evil.com}/",
        "https://acme.com&evil.com/", "https://acme.com(evil.com)/", "https://acme.com=evil.com/", "https://_a.com/",
    ),
    "addresses and ports": (
        "http://256.0.0.1/", "http://0x/", "http://1.2.3.08/", "http://127.0.0.1../", "http://acme.0x1g/",
        "http://1e3/", "http://127.0.0.1:080/", "http://169.254.169.254/", "http://\u0661.0.0.1/", "http://0.0.0.0/",
        "http://127.0.0.-1/", "http://\xb9\xb2\u2077.0.0.1/", "http://0x7f.0x0.0x0.0x1/", "http://127.0.0.1%00/",
        "http://127.0.0.1.acme.com/", "http://[1::2:0:0:0:3]/", "http://[::127.0.0.1]/",
        "http://[64:ff9b::127.0.0.1]/", "http://[::ffff:0:127.0.0.1]/", "http://[::ffff:0x7f.0.0.1]",
        "http://[::ffff:01.2.3.4]/", "http://[::1%00]/", "http://[::]/", "http://[::1]:/",
        "http://[1:2:3:4:5:6:7::]/", "http://[::\uff11]/", "http://[::1]@evil.com/", "http://[acme.com]/",
        "http://[::1].acme.com/", "https://acme.com:0000000000443/", "https://acme.com:4 43/",
        "https://acme.com::443/", "https://acme.com:443.evil.com/", "https://acme.com:%34%34%33/",
        "https://acme.com:443?@evil.com", "https://acme.com:/@evil.com", "https://acme.com:evil.com/",
    ),
    "templates, and one URL in another": (
        "{{url}}", "https://acme.com/{{path}}", "*|URL|*", "https://*|HOST|*/", "%%url%%", "https://${host}/",
        "[URL]", "https://<%= host %>/", "https://$host/", "null", "https://undefined/", "&#104;ttps://evil.com/",
        "https&#58;//evil.com/", "&lt;a href=https://evil.com&gt;", "https://acme.com/https://evil.com/",
        "https://evil.com?https://acme.com/", "https://https://evil.com/", "https://acme.com/.//evil.com",
        "https://acme.com/%2e%2e/%2f/evil.com", "https://acme.com?next=https://evil.com", "http://https//evil.com",
        "https://acme.com&url=https://evil.com/", "https://acme.com/&url=https://evil.com/",
    ),
}  # fmt: skip
# What looks like a name, and browsers refuse.
REFUSED: dict[str, tuple[str, ...]] = {
    "names of two directions": (
        "https://a\u05d0b.com/", "https://\u05d0a.com/", "https://\u0661.com/", "https://1\u05d0.com/",
    ),
    "signs that hold a dot": ("https://a\u33c7b.com/", "https://acme\ufe12com/", "https://\U0001f100com/"),
    "punycode of nothing beside another name": ("https://xn--0\u3002com/", "https://\u00fc.xn--bcher-kva0/"),
}  # fmt: skip
SCHEMES = (*HOSTILE["other schemes"], *HOSTILE["refused: other schemes"])
HALF = re.compile("[\ud800-\udfff]")  # of a character
EVERYTHING = [url for urls in HOSTILE.values() for url in urls]

GOOD = (
    "https://acme.com/", "HTTPS://ACME.com/Sale", "https://www.acme.com/a/b/c.html", "http://acme.com:8080/a?b#c",
    "https://acme.com#top", "https://acme.com/?", "https://acme.com/?#",
    "https://acme.com/sale?utm_source=mail&utm_medium=email&id=7#top", "https://acme.com/?a=1&a=2&b[]=3&c%5B%5D=4",
    "https://acme.com/?q=a+b%20c", "https://acme.com/?next=https%3A%2F%2Fother.example%2F%3Fa%3Db%26c",
    "https://acme.com/?next=https://other.example/?a=b", "https://acme.com/%E2%82%AC",
    "https://acme.com/\u20ac?\u20ac#\u20ac", "https://acme.com/über uns?q=naïve café#größe",
    "https://acme.com/\U0001f600?\U0001f600", "https://acme.com/100%", "https://acme.com/a;b=c,d/e",
    "https://acme.com/~ann/!$&'()*+,;=:@-._~", "https://acme.com/@ann", "https://acme.com/a|b^c`d{e}f[g]",
    "https://acme.com/?a|b^c`d{e}f[g]'\"<>", 'https://acme.com/#a|b^c`d{e}f[g]"<>', "https://acme.com/#\\b",
    "https://acme.com/a//b///c", "https://acme.com/a/./b/../c", "https://acme.com/?a?b??c", "https://acme.com/#a#b",
    "https://acme.com/" + "long/" * 500, "https://acme.com/?" + "&".join(f"k{n}=v{n}" for n in range(300)),
    "https://acme.com/%00%0d%0a%7f%ff", "https://acme.com.", "https://xn--bcher-kva.example/",
    "https://faß.de/straße", "https://\u65e5\u672c\u8a9e.jp/\u65e5\u672c",
    "https://\u043f\u0440\u0438\u043c\u0435\u0440.\u0440\u0444/\u044f",
    "https://\u05d3\u05d5\u05d2\u05de\u05d4.\u05e7\u05d5\u05dd/",
    "https://\u0645\u062b\u0627\u0644.\u0625\u062e\u062a\u0628\u0627\u0631/", "https://\ud55c\uad6d.com/",
    "https://\u0e44\u0e17\u0e22.com/", "https://\u4f8b\u5b50.\u6d4b\u8bd5",
    "https://sub-domain.under_score.acme.com/", "https://r3---sn.acme.com/", "https://1.2.acme.com/",
    "http://192.0.2.1:8000/a", "http://[2001:db8::1]:8080/a?b", "https://intranet/",
    "https://acme.com/index.php?page=1&amp;x=2", "https://acme.com/a=b&c=d",
    "https://acme.com/?email=ann%40acme.com&n=%C3%BC",
)  # fmt: skip


def target(url: str) -> tracker.Target | None:
    """Where we say that a URL leads; None if it is refused."""
    try:
        return tracker.read_target(url)
    except tracker.BadTarget:
        return None


def disagreements(tab: Tab, urls: Iterable[str]) -> list[str]:
    """Of the URLs that we accept, those that Chromium reads otherwise, or refuses, or whose Location it reads otherwise."""
    accepted = {url: made for url in urls if (made := target(url))}
    of_location = tab.read([made.location for made in accepted.values()])
    return [
        f"{url!r} is {made}, to Chromium {read}, and {made.location!r} is {led}"
        for (url, made), read, led in zip(accepted.items(), tab.read(list(accepted)), of_location, strict=True)
        if read.place != (urlsplit(made.location).scheme, made.host, made.port)
        or read.scheme not in ("http", "https")
        or not (read.url == read.based == read.link == led.url == led.based == led.link)
    ]


def test_there_are_hundreds_of_hostile_urls() -> None:
    accepted = sum(target(url) is not None for url in EVERYTHING)
    assert accepted > 100 and len(EVERYTHING) - accepted > 250, "else agreement would say little"
    assert len(set(EVERYTHING)) > 400 and len(set(GOOD)) > 40


@pytest.mark.parametrize("group", HOSTILE)
def test_whatever_we_accept_chromium_reads_as_we_do(tab: Tab, group: str) -> None:
    """So what Chromium refuses, or reads as a path or another scheme, we refuse. To refuse more is nobody's harm."""
    assert disagreements(tab, HOSTILE[group]) == []


@pytest.mark.parametrize("group", REFUSED)
def test_what_chromium_refuses_for_its_letters_alone_we_refuse(tab: Tab, group: str) -> None:
    assert {read.url for read in tab.read(REFUSED[group])} == {None}
    assert [url for url in REFUSED[group] if target(url)] == []


def test_chromium_reads_no_url_of_another_scheme_where_we_see_http(tab: Tab) -> None:
    """The counterpart: Chromium does read these schemes, so that agreeing with it says something."""
    schemes = {read.scheme for read in tab.read(SCHEMES)}
    assert schemes >= {"javascript", "data", "vbscript", "file", "ftp", "mailto", "blob", "intent", "ws", "wss", ""}
    assert [url for url in SCHEMES if target(url)] == []


def test_plainly_good_urls_are_accepted_and_lead_where_chromium_goes(tab: Tab) -> None:
    assert [url for url in GOOD if target(url) is None] == []
    assert disagreements(tab, GOOD) == []
    # The whole URL, path and query included, so it is worth that Chromium sees differences there.
    one, other = tab.read(["https://acme.com/%41?b", "https://acme.com/A?b"])
    assert one.url != other.url


@pytest.mark.parametrize("host", ["a{}b", "{}", "{}b", "a.{}"])
def test_each_character_that_unicode_maps_leads_to_no_other_host(tab: Tab, host: str) -> None:
    """All that compatibility or case makes another, marks and signs; what Chromium refuses is another matter."""
    urls = [f"https://{host.format(character)}.com/" for character in mapped_characters()]
    accepted = {url: made.location for url in urls if (made := target(url))}
    assert len(urls) > 8000 and len(accepted) > 2000
    led = zip(accepted.items(), tab.read(list(accepted)), strict=True)
    assert [(place, read.url) for place, read in led if read.url not in (None, place[1])] == []


def mapped_characters() -> Iterator[str]:
    """Every character that is no plain letter or digit of its own."""
    for number in (*range(0x21, 0xD800), *range(0xF900, 0x20000), *range(0x2F800, 0x2FA20), *range(0xE0000, 0xE0200)):
        character = chr(number)
        category = unicodedata.category(character)
        is_another = category[0] in "MCPSZ" or unicodedata.normalize("NFKC", character).casefold() != character
        if is_another and category != "Cn" and character not in "/?#":
            yield character


def test_the_naming_page_leads_where_it_says_and_tells_nothing_there(site: Site, tab: Tab) -> None:
    for url in (
        "https://elsewhere.example/a?b=1&c='<x>\"#d",
        "http://b\u00fccher.example:8080/\u00fc",
        "https://\u0430cme.com/",
    ):
        (read,) = tab.read([url])
        site.pace()
        tab.go(site.plain(site.acme, url))
        assert tab.statuses == [200] and tab.elsewhere == []
        assert tab.text("h1") == [f"This link leads to {read.host}"]
        assert tab.run("Array.from(document.links, link => link.href)") == [read.url]
        assert len(tab.text(".destination")) == 1
        tab.run("document.links[0].click()")
        while not tab.elsewhere:
            tab.chromium.hear()
        assert (tab.elsewhere, tab.referrers) == ([read.url], [""])


# What Chromium asks for, where Acme allows it.
ACMES = re.compile(r"https?://([^/?#@:]+\.)?acme\.com\.?(:80|:443)?(?=[/?#]|\Z)")


def test_chromium_goes_where_we_said_and_nowhere_that_a_tenant_has_not_allowed(site: Site, tab: Tab) -> None:
    """Every hostile URL as it stands in a plain link, which may lead to acme.com only, and signed, which may lead anywhere."""
    went, wrong = 0, []
    urls = [url for urls in (HOSTILE | REFUSED).values() for url in urls]
    accepted = {url: made.location for url in urls if (made := target(url))}
    refused = [url for url in urls if url not in accepted]
    places = dict(zip(accepted, tab.read(list(accepted.values())), strict=True))
    for n, url in enumerate((*accepted, *refused[::5])):
        # Half a character can't be put into a link as it is.
        site.pace()
        tab.go(site.plain(site.acme, url, raw=n % 3 > 0 and not HALF.search(url)), whole=False)
        (status, *more), elsewhere = tab.statuses, list(tab.elsewhere)
        led = len(elsewhere) == (status == 302) and all(map(ACMES.match, elsewhere))
        if more or status not in (200, 302, 400) or not led:
            wrong.append(f"{url!r} plain: {tab.statuses} {elsewhere}")
        went += status == 302
        if url in accepted:
            tab.go(site.signed(site.globex, url), whole=False)
            if (tab.statuses, tab.elsewhere) != ([302], [places[url].url]):
                wrong.append(f"{url!r} signed: {tab.statuses} {tab.elsewhere}, expected {places[url].url}")
    assert wrong == []
    assert went > 50 and len(places) > 120


# == A message on its whole way ==

INBOX = "https://webmail.example/inbox"  # where a reader looks at it; Chromium gets it from the test


def newsletter() -> bytes:
    """Plain text, and HTML in quoted-printable, as a sender's program writes them."""
    made = EmailMessage(policy=email.policy.SMTP)
    made["From"] = "Umbrella <news@umbrella.example>"
    made["To"] = "Jörg <joerg@example.org>"
    made["Subject"] = "Grüße – 10 % auf alles"
    made.set_content("Grüße! https://umbrella.example/sale\n")
    link = '<a href="https://umbrella.example/sale?a=1&amp;copy=2#größe">hier</a>'
    page = f'<html><body><p style="color: green">Grüße, Jörg: {link}</p></body></html>\n'
    made.add_alternative(page, subtype="html", cte="quoted-printable")
    return bytes(made)


PAGES = {
    "a block": "<body style='margin:0'><div style='height:300px'>x</div></body>",
    "paragraphs": "<body><p>x</p><p>y</p></body>",
    "text": "<body>text<br></body>",
    "a table": "<body style='margin:0'><table width=100%><tr><td>x</td></tr></table></body>",
    "a grid": "<body style='display:grid'><p>x</p></body>",
    "cleared": "<body><div style='clear:both;height:300px'>x</div></body>",
}


@pytest.mark.parametrize("doctype", ["<!doctype html>", ""], ids=["html5", "quirks"])
def test_the_pixel_makes_a_page_no_more_than_a_pixel_higher_wherever_it_stands(tab: Tab, doctype: str) -> None:
    maker = tracker.LinkMaker("https://track.example", "k3v9x2mp", "s", lambda target: False)
    image = "data:image/gif;base64," + base64.b64encode((ROOT / "pixel.gif").read_bytes()).decode()

    def height(page: str) -> float:
        tab.served[INBOX] = (page.encode(), "")
        tab.go(INBOX)
        assert tab.run("Array.from(document.images).every(each => each.naturalWidth == 1)")
        return float(tab.run("document.documentElement.getBoundingClientRect().height"))

    for name, page in PAGES.items():
        before = height(doctype + page)
        for place in ("bottom", "top"):
            how = tracker.Instrumenting(maker, "e1", place)
            new = tracker.instrument_html(doctype + page, how)[0].replace(how.pixel_url(), image)
            assert new.count(image) == 1
            assert 0 <= height(new) - before <= 1, f"{name}, {place}"


def test_an_instrumented_message_is_opened_clicked_and_counted(site: Site, tmp_path: Path) -> None:
    server = site.nginx.server
    umbrella = server.tenant("Umbrella")
    command = [sys.executable, str(ROOT / "tracker.py"), "--env", os.devnull, "instrument", "Umbrella"]
    piped = subprocess.run(command, input=newsletter(), env=server.environ, capture_output=True, timeout=60, check=True)
    arrived = email.message_from_bytes(piped.stdout, policy=email.policy.default)
    assert isinstance(arrived, EmailMessage)
    body = arrived.get_body(("html",))
    assert isinstance(body, EmailMessage)
    # A site of the world may not load what is on this machine, and the tracker of a test is.
    allowed = "--disable-features=LocalNetworkAccessChecks,HttpsUpgrades,HttpsFirstBalancedModeAutoEnable"
    with contextlib.closing(Chromium(tmp_path, f"--user-agent={CHROME}", allowed)) as reader:
        tab = reader.tab(site.url + "/")
        tab.served[INBOX] = (body.get_content().encode(), "default-src 'none'; style-src 'unsafe-inline'; img-src *")
        tab.go(INBOX)
        (pixel,) = tab.asked
        assert pixel.startswith(f"{site.url}/{umbrella['mail_id']}/pixel/")
        assert tab.run("document.images[0].naturalWidth") == 1, tab.complaints
        assert tab.text("p") == ["Grüße, Jörg: hier"]
        tab.run("document.links[0].click()")
        target = "https://umbrella.example/sale?a=1&copy=2#gr%C3%B6%C3%9Fe"
        while target not in tab.elsewhere:
            tab.chromium.hear()
        assert {urlsplit(url).hostname for url in tab.elsewhere} <= {"umbrella.example", "webmail.example"}  # its icon
        page = reader.tab(site.url + "/")
        site.pace(2)
        page.go(umbrella["dashboard_url"])
        figures = " ".join(page.text("main"))
        assert "1 by people" in figures
    sent = json.loads(site.request("GET", f"/{umbrella['id']}/stats.json")[1])["sent"]
    assert (sent["emails"], sent["opened"]["person"], sent["clicked"]["person"]) == (1, 1, 1)
