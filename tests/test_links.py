"""Links: ids and keys, signatures that hold for ever, and targets read as a browser reads them."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import html
import random
import re
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import pytest
from conftest import NOW, Stage

import tracker

# Written down once, never to be computed again: mail with these links has been sent, and can't be called back.
SECRET = "a-secret-for-the-golden-links-never-used-elsewhere"
OLDER = "an-older-secret-that-still-verifies-what-it-signed"


class Golden(NamedTuple):
    """A link, and what it consists of."""

    secret: str
    mail_id: str
    key: str
    url: str
    target: str
    signature: str
    location: str


GOLDEN = [
    Golden(
        SECRET, "k3v9x2mp", "e1", "https://acme.com/sale?utm_source=mail&id=7#top",
        "aHR0cHM6Ly9hY21lLmNvbS9zYWxlP3V0bV9zb3VyY2U9bWFpbCZpZD03I3RvcA", "FAMllD4j7q_zMKq5",
        "https://acme.com/sale?utm_source=mail&id=7#top",
    ),
    Golden(  # every character that a key may have, and a URL that is not ASCII
        SECRET, "k3v9x2mp", "Ab.9_~+x@y=z:w-", "https://bücher.example/über uns?q=naïve&größe=5#café",
        "aHR0cHM6Ly9iw7xjaGVyLmV4YW1wbGUvw7xiZXIgdW5zP3E9bmHDr3ZlJmdyw7bDn2U9NSNjYWbDqQ", "fIBEppE_8x_MGxm5",
        "https://xn--bcher-kva.example/%C3%BCber%20uns?q=na%C3%AFve&gr%C3%B6%C3%9Fe=5#caf%C3%A9",
    ),
    Golden(OLDER, "abc123", "e1", "https://acme.com/", "aHR0cHM6Ly9hY21lLmNvbS8", "70tmz3YwWS_uidwD", "https://acme.com/"),
]  # fmt: skip


def ask(stage: Stage, uri: str, status: int | None = None, method: str = "GET", **environ: str) -> Any:
    """Send a request target exactly as it stands here; RAW_URI is where gunicorn puts it."""
    response = stage.web.request("/", method=method, environ={"RAW_URI": uri, **environ}, status="*")
    assert status in (None, response.status_int), f"{uri[:200]}: {response.status}\n{response.text[-900:]}"
    return response


def plain(stage: Stage, tenant: tracker.Tenant, target: str, key: str = "e1") -> str:
    """A plain link, its target encoded as a program would."""
    return f"/{tenant.mail_id}/click/{key}?url={quote(target, safe='', errors='surrogatepass')}"


def signed(stage: Stage, tenant: tracker.Tenant, target: str, key: str = "e1") -> str:
    """A link that this server's secret signed, whatever its target is."""
    encoded = tracker.encode_target(target)
    return f"/{tenant.mail_id}/click/{key}/{tracker.sign(stage.app.secrets[0], tenant.mail_id, encoded)}/{encoded}"


def links_to(stage: Stage, target: str) -> tuple[str, ...]:
    """A plain link of Acme, one of Globex, and a signed one."""
    return plain(stage, stage.acme, target), plain(stage, stage.globex, target), signed(stage, stage.acme, target)


both = pytest.mark.parametrize("link", [plain, signed])


# -- Golden links


@pytest.mark.parametrize("link", GOLDEN)
def test_links_in_mail_already_sent_are_made_so_and_still_lead_where_they_led(
    staged: Callable[..., Stage], link: Golden
) -> None:
    click = f"/{link.mail_id}/click/{link.key}/{link.signature}/{link.target}"
    pixel = f"/{link.mail_id}/pixel/{link.key}.gif"
    assert tracker.click_path(link.secret, link.mail_id, link.key, link.url) == click
    assert tracker.pixel_path(link.mail_id, link.key) == pixel
    assert tracker.decode_target(link.target) == link.url
    assert tracker.verify([link.secret], link.mail_id, link.target, link.signature)
    stage = staged(SECRET_KEY=f"{SECRET},{OLDER}")
    with tracker.changing_tenants(stage.database) as connection:
        tracker.add_tenant(connection, "Sender of old mail", NOW, id=link.mail_id)
    stage.refresh()
    assert ask(stage, click, 302).headers["Location"] == link.location
    assert ask(stage, pixel, 200).headers["X-Tracker"] == "recorded"
    stage.drain()
    assert stage.rows("select key from emails") == [(link.key,)]


def test_a_recipients_link_in_mail_already_sent_is_made_so_and_no_other_signature_fits_it() -> None:
    signed = "fR46Lisrv-1YoYo_"
    assert tracker.sign(SECRET, "k3v9x2mp", "Ab.9_~+x@y=z:w-", tracker.PREFERENCES) == signed
    assert tracker.verify([OLDER, SECRET], "k3v9x2mp", "Ab.9_~+x@y=z:w-", signed, tracker.PREFERENCES)
    for purpose in ("click 1", tracker.CHOICE, "", "preferences 1\0"):
        assert not tracker.verify([SECRET], "k3v9x2mp", "Ab.9_~+x@y=z:w-", signed, purpose)


@pytest.mark.parametrize("link", GOLDEN)
def test_a_signature_can_be_recomputed_from_its_description(link: Golden) -> None:
    """Put together by hand, so that another program could check links too."""
    tenant_key = hmac.new(link.secret.encode(), b"tenant 1" + link.mail_id.encode(), hashlib.sha256).digest()
    fields = b"".join(struct.pack(">I", len(each)) + each for each in (b"click 1", link.target.encode()))
    digest = hmac.new(tenant_key, fields, hashlib.sha256).digest()
    assert base64.b64encode(digest[:12], altchars=b"-_").decode() == link.signature
    assert base64.b64encode(link.url.encode(), altchars=b"-_").decode().rstrip("=") == link.target


# -- Signing


def test_a_signature_is_sixteen_characters_into_which_no_field_slides_from_another() -> None:
    """Were the fields joined without their lengths, these would all sign the same bytes."""
    fields = [("abc", "defg"), ("abcd", "efg"), ("abcde", "fg"), ("abcdefg", ""), ("ab", "cdefg"), ("a", "b\0\0\0\1c")]
    made = {tracker.sign(f"secret number {n}", mail_id, target) for mail_id, target in fields for n in range(50)}
    assert len(made) == 50 * len(fields)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{16}", each) for each in made)
    assert len({tracker.sign(SECRET, *each) for each in fields}) == len(fields)


def test_a_signature_verifies_with_its_secret_for_its_tenant_and_target_and_nothing_else() -> None:
    other, link = "another secret, of thirty-two or more", ("k3v9x2mp", "aHR0cA")
    made = tracker.sign(SECRET, *link)
    for keys in ([SECRET], [other, SECRET], [SECRET, other]):
        assert tracker.verify(keys, *link, made)
    others = [(mail_id, link[1]) for mail_id in ("k3v9x2mq", "K3V9X2MP", "")]
    for changed in (*others, (link[0], "aHR0cB"), (link[0], "")):
        assert not tracker.verify([SECRET], *changed, made)
    for end in (0, 1, 8, 15):
        for given in (made[:end], made[:end].ljust(16, "A"), made[:end] + "é", made[:end] + "\ud800"):
            assert not tracker.verify([SECRET], *link, given)
    assert not tracker.verify([other], *link, made) and not tracker.verify([], *link, made)


SPELLINGS = (
    *("aHR0cHM6Ly9hLmIv=", "aHR0cHM6Ly9hLmIvYw==", "aHR0cHM6Ly9hLmIvYx", "aHR0cHM6Ly9hLmIvYw\n", "aHR0cHM6 Ly9hLmIv"),
    *("aHR0cHM6Ly9hLmIvP+8", "aHR0cHM6Ly9hLmIv/w", "aHR0cHM6Ly9hLmIv!", "aHR0cHM6L", "aHR0cHM6Ly9hLmIvé"),
    *("_w", "7aCA", "wIA"),  # no UTF-8, a surrogate, an overlong character
)


def test_a_target_has_one_spelling_and_every_other_one_is_refused(stage: Stage) -> None:
    for segment in SPELLINGS:
        assert tracker.decode_target(segment) is None
        # Even a signature that is right for this spelling does not help.
        signature = tracker.sign(stage.app.secrets[0], stage.acme.mail_id, segment)
        uri = f"/{stage.acme.mail_id}/click/e1/{signature}/{quote(segment, safe='')}"
        assert "Location" not in ask(stage, uri, 404).headers


CHANGES = [
    *({"signature": text} for text in ("{signature:.15}", "{signature}A", "{signature}%3D", "%20{signature}")),
    *({"signature": text} for text in ("{signature}%0A", "%FF%FF", "", "{swapped}")),
    *({"target": text} for text in ("{target:.22}", "{target}%3D", "")),
    *({"key": text} for text in ("", "%2E%2E", "a%0Ab", "a%2Fb", "a" * 201)),
    *({"mail_id": text} for text in ("{mail_id}x", "{globex}")),
]


def test_a_link_that_is_not_whole_is_not_found(stage: Stage) -> None:
    whole = signed(stage, stage.acme, "https://acme.com/")[1:].split("/")
    fields = dict(zip(("mail_id", "click", "key", "signature", "target"), whole, strict=True))
    assert len(fields["target"]) == 23
    others = {"swapped": fields["signature"].swapcase(), "globex": stage.globex.mail_id}
    for change in CHANGES:
        changed = {name: text.format(**fields, **others) for name, text in change.items()}
        assert "Location" not in ask(stage, "/" + "/".join({**fields, **changed}.values()), 404).headers


def test_the_key_of_the_email_is_not_signed_so_that_a_mailing_tool_can_merge_its_own(stage: Stage) -> None:
    made = signed(stage, stage.acme, "https://elsewhere.example/", key="TEMPLATE")
    for key in ("e1", "recipient-0002", "a@b.example", "x" * 200):
        uri = made.replace("TEMPLATE", key)
        for link in (uri, uri.replace("@", "%40").replace("/click", "/%63lick")):  # as mail programs may encode it
            assert ask(stage, link, 302).headers["Location"] == "https://elsewhere.example/"
    stage.drain()
    assert {len(key) for (key,) in stage.rows("select key from emails")} == {2, 14, 11, 200}


def test_each_secret_key_verifies_and_the_first_signs(staged: Callable[..., Stage]) -> None:
    newest, older = "n" * 32, "o" * 32
    stage = staged(SECRET_KEY=f"{newest},{older}")
    assert stage.app.secrets[:2] == (newest, older)
    for secret in stage.app.secrets:  # the third is the database's own: mail may carry it
        ask(stage, tracker.click_path(secret, stage.acme.mail_id, "e1", "https://elsewhere.example/"), 302)
    ask(stage, tracker.click_path("x" * 32, stage.acme.mail_id, "e1", "https://elsewhere.example/"), 404)
    assert len(stage.app.secrets) == 3


def test_head_gets_the_redirect_without_a_body_which_nobody_may_keep(stage: Stage) -> None:
    for uri in links_to(stage, "https://acme.com/a"):
        response = ask(stage, uri, 302, "HEAD")
        assert (response.headers["Location"], response.body) == ("https://acme.com/a", b"")
        assert (response.headers["Cache-Control"], response.headers["X-Robots-Tag"]) == ("no-store", "noindex")


def test_the_longest_link_that_can_be_signed_can_be_asked_for() -> None:
    """gunicorn refuses a longer request line, so a longer link would be dead in every mail."""
    for character in "aü日😀":
        url = "https://acme.com/".ljust(tracker.MAX_TARGET, character)
        with contextlib.suppress(tracker.BadTarget):  # saying no while the mail is being made is good too
            path = tracker.click_path(SECRET, "m" * 64, "k" * 200, url)
            assert len(f"GET {path} HTTP/1.1\r\n") <= tracker.MAX_REQUEST_LINE


# -- Reading request targets


TARGETS = {
    "/": ("",), "/a/b": ("a", "b"), "/a/b/": ("a", "b"), "/a//b": ("a", "b"), "//host/a": ("host", "a"), "//": ("",),
    "/a%2Fb/c": ("a/b", "c"), "/a%252Fb": ("a%2Fb",), "/a/../b": ("a", "..", "b"), "/a/%2e%2E/b": ("a", "..", "b"),
    "/a%0Ab": ("a\nb",), "/a%00b": ("a\0b",), "/%FF%c3%bc": ("�ü",), "/%zz%": ("%zz%",), "/a+b": ("a+b",),
    "/a%3Fb": ("a?b",), "/a#b": ("a#b",), "http://host/a": ("a",), "HTTPS://host:1/a/b": ("a", "b"), "http://host": (),
    "*": (), "": (), "a/b": ("b",),
}  # fmt: skip


def test_a_request_target_is_split_on_slashes_and_decoded_once() -> None:
    for uri, segments in TARGETS.items():
        assert tracker.split_target(uri) == (segments, "")
        for query in ("b=c&d", "b?c", "b=%2F%20"):
            assert tracker.split_target(f"{uri}?{query}") == (segments, query)


NO_HITS = (
    *("/m/pixel/k.png", "/m/pixel/k.GIF", "//pixel/k.gif", "/x/../m/pixel/k.gif"),
    *("/m/click/k/s/", "/m/click/k/s", "/m/click/?url=x", "/m/click?url=x", "/m/Click/k?url=x"),
    *("/m/dashboard", "*"),
)


PIXELS = {"/m/pixel/k.gif": "k", "/m/pixel/.gif": "", "/m/pixel/a.gif.gif": "a.gif", "/m/pixel/a%2Fb.gif": "a/b"}
HITS: dict[str, object] = {
    **{uri: (True, "m", key, None) for uri, key in PIXELS.items()},
    **dict.fromkeys(("/m/pixel/k.gif?cache=1", "http://host/m/pixel/k.gif"), (True, "m", "k", None)),
    **dict.fromkeys(("/m/pixel/k.gif/", "/m//pixel/k.gif", "//m/pixel//k.gif//"), (True, "m", "k", None)),
    **dict.fromkeys(("/m/click/k/s/aHR0cA", "/m/click/k/s/aHR0cA?url=x"), (False, "m", "k", "http")),
    **dict.fromkeys(("/m/click/k/s/t", "/m/click/k/s/t/", "/m/click/k/s/a%2Fb", "/m/click/k"), (False, "m", "k", None)),
    "/m/click/k?url=x": (False, "m", "k", "x"),
    **dict.fromkeys(NO_HITS),
}


def test_workers_and_drain_recognise_a_hit_by_its_request_target() -> None:
    assert {uri: tracker.recognise(*tracker.split_target(uri)) for uri in HITS} == HITS


QUERIES = {
    "url=https%3A%2F%2Facme.com%2Fa": "https://acme.com/a", "url=https%3a%2f%2facme.com": "https://acme.com",
    "url=https%3A%2F%2Fa.b%2F%3Fx%3D1%26y%3D2&utm=z": "https://a.b/?x=1&y=2",
    "url=https://a.b/?x=1&y=2#f": "https://a.b/?x=1&y=2#f", "url=HTTPS://a.b/?x=1&y=2": "HTTPS://a.b/?x=1&y=2",
    "url=https://a.b/%20+%26?q=a+b": "https://a.b/%20+%26?q=a+b",
    "url=https://a.b/&url=https://c.d/": "https://a.b/&url=https://c.d/",
    "url=https%3A%2F%2Fa.b%2F%3Fq%3Da+b": "https://a.b/?q=a b",
    "url=https%3A%2F%2Fa.b%2F%3Fq%3Da%2Bb": "https://a.b/?q=a+b",
    "url=https%3A%2F%2Fa.b%2F%2520": "https://a.b/%20", "url=https:%2F%2Fa.b%2Fc&x=1": "https://a.b/c",
    "url=https%3A//a.b/c&x=1": "https://a.b/c", "url=https%3A%2F%2Fa.b&url=https%3A%2F%2Fc.d": "https://a.b",
    "utm=1&url=https://a.b/": "https://a.b/", "url=https%3A%2F%2Fa.b%2F%FF": "https://a.b/�",
    "url=https%3A%2F%2Fa.b%2F%0A": "https://a.b/\n", "url=//a.b/": "//a.b/", "url=": "", "url=&x=1": "",
    **dict.fromkeys(("", "url", "x=1", "curl=https://a.b/", "URL=https://a.b/", "x=url=https://a.b/")),
}  # fmt: skip


def test_the_target_of_a_plain_link_is_read_from_the_raw_query() -> None:
    assert {query: tracker.plain_url(query) for query in QUERIES} == QUERIES


def test_a_plain_link_that_names_no_destination_says_what_was_expected(stage: Stage) -> None:
    for query in ("", "?", "?x=1", "?url=", "?url=%20", "?url=+&x=1"):
        assert "?url=" in ask(stage, f"/{stage.acme.mail_id}/click/e1{query}", 400).text


def test_a_link_written_by_hand_keeps_its_ampersands_through_to_the_events(stage: Stage) -> None:
    uri = f"/{stage.acme.mail_id}/click/e1?url=https://acme.com/a?x=1&y=%202&url=z"
    assert ask(stage, uri, 302).headers["Location"] == "https://acme.com/a?x=1&y=%202&url=z"
    stage.drain()
    assert stage.rows("select url from event_details") == [("https://acme.com/a?x=1&y=%202&url=z",)]


# -- Targets: what is refused everywhere. Where a browser would read another host than a filter does, nobody may.

REFUSED = {
    "backslashes, which are slashes to a browser": (
        "https://evil.com\\@acme.com/", "https://evil.com\\.acme.com/", "https://acme.com/\\evil.com",
        "https:\\\\evil.com\\", "https:/\\evil.com/", "\\\\evil.com/", "/\\evil.com/",
        "https://evil.com%5C.acme.com/", "https://acme.com:443\\@evil.com/",
    ),
    "credentials": (
        "https://acme.com@evil.com/", "https://acme.com:443@evil.com/", "https://user:secret@acme.com/",
        "https://@acme.com/", "https://a@b@acme.com/", "https://acme.com%40evil.com/",
        "https://acme.com\uff20evil.com/",
    ),
    "control characters, of which a browser drops some": (
        "ht\ttps://evil.com/", "https:/\t/evil.com/", "https://acme\t.com/", "https://acme.com/a\tb",
        "https://acme.com/\n", "https://ac\rme.com/", "https://acme.com/\r\nSet-Cookie: a=b",
        "https://acme.com\0.evil.com/", "https://acme.com/?a=\0", "\x01https://acme.com/", "https://acme.com/\x7f",
        "https://acme.com/#\x1b[2J", "https://evil.com%00.acme.com/", "https://evil.com%09.acme.com/",
        "https://evil.com%0A.acme.com/",
    ),
    "no scheme, or slashes that a browser mends": (
        "//evil.com/", "///evil.com/", "https:evil.com/", "https:/evil.com/", "https:///evil.com/",
        "https://///evil.com/", "https:", "https://", "https://?acme.com", "https://#acme.com", "https://:443/",
        "acme.com", "acme.com:443/", "/a", "?a=b", ".",
    ),
    "other schemes": (
        "javascript:alert(1)", "JaVaScRiPt:alert(1)//https://acme.com/", "javascript://acme.com/%0aalert(1)",
        " javascript:alert(1)", "data:text/html,<script>alert(1)</script>", "vbscript:msgbox(1)",
        "file:///etc/passwd", "ftp://acme.com/", "mailto:ann@acme.com", "blob:https://acme.com/1",
        "view-source:https://acme.com/", "intent://acme.com/#Intent;scheme=https;end", "wss://acme.com/",
        "https+x://acme.com/", "\uff48ttps://acme.com/",
    ),
    "addresses": ("http://[::1]:65536/", "https://<b>acme</b>.com/"),
    "length": ("https://acme.com/" + "a" * 4080,),
}  # fmt: skip
BAD_HOSTS = {
    "characters that stand for separators": (
        "evil.com%2F.acme.com", "evil.com%3F.acme.com", "evil.com%23.acme.com", "acme.com%3A443", "acme%20.com",
        "acme%252Ecom", "acme%.com", "acme.com%2", "%FF.acme.com", "evil.com\uff0f.acme.com",
        "evil.com\uff1f.acme.com", "evil.com\uff03.acme.com", "acme.com\uff1a443", "evil.com\uff3c.acme.com",
        "acme\uff052Ecom", "evil.c\u2100.acme.com", "evil.com\u2215.acme.com", "evil.com\u2044.acme.com",
        "acme\u2488com", "acme\u2026com",
    ),
    "names that no registry has, and characters that a browser drops or forbids": (
        "acme..com", ".acme.com", "acme.com..", "..", ".", "acme\u3002\uff0ecom", f"{'a' * 64}.acme.com",
        f"{'ü' * 60}.acme.com", f"{'.'.join(['a' * 49] * 5)}.acme", "-acme.com", "acme-.com", "xn--.com",
        "xn--acme-.com", "ac\u200dme.com", "ac\u200cme.com", "ac\u200bme.com", "ac\xadme.com", "\ufeffacme.com",
        "acme.com\u202e", "FA\u1e9e.de", "\U0001f600.acme.com", "\u0301acme.com", "acme.com .evil.com",
        " acme.com", "acme.com ", "acme\u3000.com", 'acme.com"', "acme,com", "*.acme.com", "acme.com;evil.com",
    ),
    "addresses in spellings that only some programs read": (
        "0x7f.1", "0x7f000001", "0X7F.0.0.1", "127.0.0.0x1", "127.0.0.0x", "2130706433", "0177.0.0.1",
        "127.0.0.01", "127.1", "127.0.1", "127.0.0.1.1", "127.0.0.256", "\uff10\uff58\uff17\uff46\uff0e\uff11",
        "%30x7f.1", "127\u30021", "\u2460\u2461\u2466.1", "acme.com.1", "acme.0x", "0", "::1", "[::1", "::1]",
        "[fe80::1%25eth0]", "[fe80::1%eth0]", "[]", "[::1]acme.com", "acme.com[::1]", "[:::1]",
        "[1:2:3:4:5:6:7:8:9]", "[::12345]", "[::127.1]", "%5B::1%5D", "[127.0.0.1]", "[v1.a]",
    ),
    "ports": (
        "acme.com:0", "acme.com:65536", "acme.com:4294967739", "acme.com:https", "acme.com:+443", "acme.com:-1",
        "acme.com:\uff14\uff14\uff13", "acme.com:\u0664\u0664\u0663", "acme.com:443:443", "acme.com: 443",
        "acme.com:0x1bb",
    ),
}  # fmt: skip
REFUSED |= {name: tuple(f"https://{host}/" for host in hosts) for name, hosts in BAD_HOSTS.items()}


@pytest.mark.parametrize("targets", REFUSED.values(), ids=REFUSED)
def test_a_target_that_browsers_mend_or_refuse_leads_nowhere(stage: Stage, targets: tuple[str, ...]) -> None:
    for target in targets:
        with pytest.raises(tracker.BadTarget, match="expected"):
            tracker.click_path(SECRET, "k3v9x2mp", "e1", target)
        for uri in links_to(stage, target):
            response = ask(stage, uri, 400)
            assert "Location" not in response.headers
            assert "expected" in response.text, "the page says what would have been right"
            assert "<a " not in response.text, "nor is there a link to it"


# Targets that are not Acme's, with the Location that takes a browser there.
NAMES = {
    "\u0430cme.com": "xn--cme-5cd.com", "acme.c\u03bfm": "acme.xn--cm-jbc", "ac\u0131e.com": "xn--ace-kua.com",
    **dict.fromkeys(
        ("bücher.example", "BÜCHER.example", "bu\u0308cher.example", "b%C3%BCcher.example", "XN--BCHER-KVA.example"),
        "xn--bcher-kva.example",
    ),
    "faß.de": "xn--fa-hia.de", "\u03b2\u03cc\u03bb\u03bf\u03c2.com": "xn--nxasmm1c.com",
    "\u0392\u038c\u039b\u039f\u03a3.com": "xn--nxasmq6b.com", "\u65e5\u672c\u8a9e.jp": "xn--wgv71a119e.jp",
    "\u05d3\u05d5\u05d2\u05de\u05d4.com": "xn--6dbbec0c.com", "\uff45\uff56\uff49\uff4c.com": "evil.com",
    "\ufb01sh.com": "fish.com", "\u017fale.com": "sale.com", "\u2167.com": "viii.com", "evil.com:00080": "evil.com:80",
    **dict.fromkeys(
        ("127.0.0.1.", "\uff11\uff12\uff17.\uff10.\uff10.\uff11", "127\u30020\u30020\u30021", "127%2E0%2E0%2E1"),
        "127.0.0.1",
    ),
    "[0:0:0:0:0:0:0:1]": "[::1]", "[2001:DB8::00A]:8080": "[2001:db8::a]:8080",
    "[::ffff:127.0.0.1]": "[::ffff:7f00:1]", "[::FFFF:7f00:1]": "[::ffff:7f00:1]",
}  # fmt: skip
ELSEWHERE = {f"https://{name}/": f"https://{host}/" for name, host in NAMES.items()} | {
    url: url for url in (
        "https://acme.com.evil.com/", "https://notacme.com/", "https://acme.com-evil.com/", "https://acme.co/",
        "https://com/", "https://evil.com/https://acme.com/", "https://evil.com/@acme.com",
        "https://evil.com?acme.com", "https://evil.com?@acme.com/", "https://evil.com?\\@acme.com",
        "https://evil.com#@acme.com/", "https://acme.com:8443/", "https://acme.com:1/", "https://acme.com:65535/",
        "http://intranet/", "https://track.example.com:8443/", "https://example.com/", "https://a.track.example.com/",
        "https://evil.com./a", "https://_a.evil.com/", "https://r3---sn.evil.com/", "https://1.2.evil.com/",
        "https://fass.de/", "http://127.0.0.1/", "http://169.254.169.254/a", "http://[::1]/",
        "http://[1:0:2:3:4:5:6:7]/", f"https://{'a' * 63}.com/",
    )
}  # fmt: skip


def test_a_target_elsewhere_is_named_unless_signed_or_any_domain_is_allowed(stage: Stage) -> None:
    for target, location in ELSEWHERE.items():
        host = (urlsplit(location).hostname or "").rstrip(".")
        host = f"[{host}]" if ":" in host else host
        named = ask(stage, plain(stage, stage.acme, target), 200)
        assert "Location" not in named.headers
        assert f"<bdi>{host}</bdi>" in named.text
        assert links_of(named.text) == [f'href="{location}" rel="noreferrer nofollow"']
        assert ask(stage, plain(stage, stage.globex, target), 302).headers["Location"] == location
        assert ask(stage, signed(stage, stage.acme, target), 302).headers["Location"] == location


# Targets that are Acme's, however they are spelled.
ACME = {
    **{url: url for url in (
        "https://acme.com", "https://www.shop.acme.com/", "https://acme.com./", "http://acme.com:443/",
        "https://acme.com//evil.com", "https://acme.com/@evil.com", "https://acme.com?@evil.com",
        "https://acme.com#@evil.com", "https://acme.com/javascript:alert(1)", "https://acme.com/#\\evil.com",
        "https://acme.com/%5Cevil.com", "https://acme.com/../%2e%2e/a", "https://acme.com/" + "a" * 4079,
    )},
    **dict.fromkeys((
        "https://acme.com:443/", "https://acme.com:/", "https://acme.com:00443/", "https://%61cme.com/",
        "https://%41CME.com/", "https://acme%2Ecom/", "https://\uff21\uff23\uff2d\uff25.com/",
        "https://acme\uff0ecom/", "https://acme\u3002com/", "https://acme\uff61com/", "https://acme%E3%80%82com/",
        "https://\U0001d41a\U0001d41c\U0001d426\U0001d41e.com/",
    ), "https://acme.com/"),
    "HTTPS://ACME.COM/A": "https://acme.com/A", "hTTp://aCmE.CoM/": "http://acme.com/",
    "http://acme.com:80/": "http://acme.com/", "https://acme.com\u3002/": "https://acme.com./",
    "https://\u212aelvin.acme.com/": "https://kelvin.acme.com/",
    "https://bücher.acme.com/": "https://xn--bcher-kva.acme.com/", "  https://acme.com/a  ": "https://acme.com/a",
    "https://acme.com/%0d%0aX: 1": "https://acme.com/%0d%0aX:%201",
    "https://acme.com/\u2028": "https://acme.com/%E2%80%A8", "https://acme.com/\x85": "https://acme.com/%C2%85",
    "https://acme.com/<b>\"'": "https://acme.com/%3Cb%3E%22'",
}  # fmt: skip


def test_a_target_on_the_tenants_own_domain_is_redirected_to(stage: Stage) -> None:
    for target, location in ACME.items():
        for uri in links_to(stage, target):
            assert ask(stage, uri, 302).headers["Location"] == location, target


HOSTS = {
    "acme\ufe0f.com": "acme.com", "acme\U000e0101.com": "acme.com", "ac\u034fme.com": "acme.com",
    "ac\u180bme.com": "acme.com", "\u03f2.com": "xn--4xa.com", "\U0001d6d3.com": "xn--4xa.com",
    "\u1fb3.com": "xn--mxaq.com", "a\u0345.com": "xn--a-gmb.com", "\u13a0.com": "xn--58d.com",
    "\uab70.com": "xn--58d.com", "\u1c82.com": "xn--n1a.com",
    **dict.fromkeys(("a\u115fb.com", "a\u3164b.com", "FA%E1%BA%9E.de", "a\u33c2.com", "acme\ufe52com")),
}  # fmt: skip


def test_a_host_is_read_as_a_browser_reads_it_or_not_at_all() -> None:
    """Where a browser folds a character, drops it, or refuses it (None), another reading would name another host."""
    for name, host in HOSTS.items():
        with contextlib.suppress(tracker.BadTarget):
            assert tracker.read_target(f"https://{name}/").host == host


def test_half_a_character_is_refused_and_in_a_plain_link_never_reaches_the_host(stage: Stage) -> None:
    for target in ("https://acme\ud800.com/", "https://acme.com/\ud800", "https://a.b/?\udfff", "https://a.b/#\udc80x"):
        with pytest.raises(tracker.BadTarget, match="expected"):
            tracker.click_path(SECRET, "k3v9x2mp", "e1", target)
        encoded = base64.urlsafe_b64encode(target.encode("utf-8", "surrogatepass")).decode().rstrip("=")
        signature = tracker.sign(stage.app.secrets[0], stage.acme.mail_id, encoded)
        ask(stage, f"/{stage.acme.mail_id}/click/e1/{signature}/{encoded}", 404)
    # There its bytes are no UTF-8, so they are read as replacement characters: bad in a host, harmless in a path.
    ask(stage, plain(stage, stage.globex, "https://acme\ud800.com/"), 400)
    response = ask(stage, plain(stage, stage.globex, "https://acme.com/\ud800"), 302)
    assert response.headers["Location"] == "https://acme.com/" + "%EF%BF%BD" * 3


OURS = """
    https://track.example.com/ https://track.example.com HTTPS://TRACK.EXAMPLE.COM/x https://track.example.com./
    https://track.example.com:443/ http://track.example.com/ http://track.example.com:80/
    http://track.example.com:443/ https://track.example.com:/ https://track%2Eexample.com/
    https://track。example.com/ https://\uff54rack.example.com/ https://track.example.com?x https://track.example.com#x
    https://news.globex.com/ http://NEWS.globex.com.:80/ http://seen.example.org/ https://seen.example.org./x
"""


@both
def test_no_link_leads_back_to_ourselves(stage: Stage, link: Callable[..., str]) -> None:
    """Our host is BASE_URL's, every tenant's tracking host, and the one that this request came to."""
    stage.change(stage.globex, tracking_host="news.globex.com")
    for target in OURS.split():
        response = ask(stage, link(stage, stage.acme, target), 400, HTTP_HOST="seen.example.org")
        assert "Location" not in response.headers and "<a " not in response.text
        assert "leads back to this server" in response.text


@pytest.mark.parametrize("host, names", [("localhost", "localhost LOCALHOST."), ("[0:0:0:0:0:0:0:1]", "[::1] [::0:1]")])
def test_a_server_on_a_port_of_its_own_may_link_to_its_neighbours(
    staged: Callable[..., Stage], host: str, names: str
) -> None:
    stage = staged(BASE_URL=f"http://{host}:3000")
    for name in (host, *names.split()):
        for port, status in ((3000, 400), (8000, 302)):
            for target in (f"http://{name}:{port}/x", f"https://{name}:{port}"):
                ask(stage, plain(stage, stage.globex, target), status, HTTP_HOST=f"{host}:3000")


# -- What a link's own query says

NEWS, REF = "utm_source=news", ["ref", "a[b]", "r"]
FORWARDED = [  # target, the link's own query, what the tenant forwards, where the link leads
    ("https://acme.com", NEWS, [], f"https://acme.com?{NEWS}"),
    ("https://acme.com/", f"{NEWS}&utm_x=&utm_id=7", [], f"https://acme.com/?{NEWS}&utm_x=&utm_id=7"),
    ("https://acme.com/a?b=1#c?d&e", f"x=1&{NEWS}", [], f"https://acme.com/a?b=1&{NEWS}#c?d&e"),
    ("https://acme.com/a?#c", NEWS, [], f"https://acme.com/a?{NEWS}#c"),
    ("https://acme.com/a?b&", NEWS, [], f"https://acme.com/a?b&{NEWS}"),
    ("https://acme.com/a??", NEWS, [], f"https://acme.com/a??&{NEWS}"),
    ("https://acme.com/a&", NEWS, [], f"https://acme.com/a&?{NEWS}"),
    # What the target has already, however it is written.
    ("https://acme.com/?utm_source=shop", f"{NEWS}&utm_id=7", [], "https://acme.com/?utm_source=shop&utm_id=7"),
    ("https://acme.com/?utm%5Fsource", NEWS, [], "https://acme.com/?utm%5Fsource"),
    ("https://acme.com/?a=1&utm_source=", "utm%5Fsource=news", [], "https://acme.com/?a=1&utm_source="),
    ("https://acme.com/#?utm_source=shop", NEWS, [], f"https://acme.com/?{NEWS}#?utm_source=shop"),
    # What the tenant tells, and nothing else.
    ("https://acme.com/", "ref=7&next=https://evil.com&a[b]=1", REF, "https://acme.com/?ref=7&a%5Bb%5D=1"),
    ("https://acme.com/", "ref=1&ref=2&refs=3&Ref=4&xutm_a=5&a%5bb%5d=6", REF, "https://acme.com/?ref=1&ref=2&a%5Bb%5D=6"),
    ("https://acme.com/?ref=0", "ref=7", REF, "https://acme.com/?ref=0"),
    ("https://acme.com/", "next=https://evil.com&campaign=Spring&UTM_A=1&=2&&utm", [], "https://acme.com/"),
    # What it says can't be more than a value.
    ("https://acme.com/", "utm_a=1%26next=2%23x%0D%0ASet-Cookie:b", [], "https://acme.com/?utm_a=1%26next%3D2%23x%0D%0ASet-Cookie%3Ab"),
    ("https://acme.com/", "utm_a=a+b%20c%FF%ED%A0%80/..//@\\", [], "https://acme.com/?utm_a=a%20b%20c%FF%ED%A0%80%2F..%2F%2F%40%5C"),
    ("https://acme.com/", "utm_a=gr\xc3\xb6\xc3\x9fe%C3%9F", [], "https://acme.com/?utm_a=gr%C3%B6%C3%9Fe%C3%9F"),
    ("https://acme.com/", f"utm_a={'%00' * 2000}", [], "https://acme.com/"),  # more than a header should have to hold
]  # fmt: skip


def test_a_link_forwards_campaign_parameters_and_those_its_tenant_tells(stage: Stage) -> None:
    for target, query, names, location in FORWARDED:
        stage.change(stage.globex, forward=names)
        link = plain(stage, stage.globex, target)
        for uri in (
            f"{signed(stage, stage.globex, target)}?{query}",
            f"{link}&{query}",
            link.replace("?", f"?{query}&"),
        ):
            assert ask(stage, uri, 302).headers["Location"] == location
            assert ask(stage, uri, 302, method="HEAD").headers["Location"] == location
        with tracker.changing_tenants(stage.database) as connection:
            tracker.set_tenant_rules(connection, stage.globex.number, "forward", (), names)
    stage.drain()
    recorded = stage.rows("select distinct urls.url from events join urls on urls.id = events.url")
    assert {url for (url,) in recorded} == {target for target, *_ in FORWARDED}


def test_a_plain_link_whose_target_is_not_encoded_forwards_what_stands_before_it(stage: Stage) -> None:
    uri = f"/{stage.globex.mail_id}/click/e1?{NEWS}&url=https://acme.com/?a=1&utm_id=7&{NEWS}"
    for query, location in (
        (uri, f"?a=1&utm_id=7&{NEWS}"),
        (uri.replace("news&", "x&utm_y=z&"), f"?a=1&utm_id=7&{NEWS}&utm_y=z"),
    ):
        assert ask(stage, query, 302).headers["Location"] == f"https://acme.com/{location}"


def test_where_a_link_may_lead_is_decided_by_its_target_and_not_by_what_it_forwards(stage: Stage) -> None:
    stage.change(stage.acme, forward=REF, block=["bad.example"])
    for link, target, status in (
        *((link, "https://bad.example/", 200) for link in (plain, signed)),
        (plain, "https://notacme.example/", 200),
        (signed, f"https://{NEWS}.track.example.com/", 400),
    ):
        uri = link(stage, stage.acme, target)
        response = ask(stage, f"{uri}{'&' if '?' in uri else '?'}{NEWS}&ref=https://acme.com/", status)
        assert "Location" not in response.headers and "utm_source=news&" not in response.text


def test_whatever_a_link_forwards_its_target_keeps_all_that_it_has() -> None:
    dice = random.Random(5)
    words = [
        "utm_",
        "ref",
        "=",
        "&",
        "#",
        "?",
        "/",
        "\\",
        "@",
        "%0A",
        "%",
        "%23",
        "\n",
        " ",
        "é",
        "\udc80",
        "https://evil.com",
        "<",
    ]
    for _ in range(3000):
        target = "https://acme.com" + "".join(
            dice.choices(["/", "?", "#", "&", "=", "a", "ref", "utm_a"], k=dice.randrange(9))
        )
        location = tracker.read_target(target if target[16:17] in "/?#" else target[:16]).location
        query = "".join(dice.choices(words, k=dice.randrange(12)))
        found = tracker.forwarded(location, query, ["ref"])
        (front, mark, fragment), (page, _, rest) = location.partition("#"), location.partition("#")[0].partition("?")
        assert found.startswith(front) and found.endswith(mark + fragment), (location, query)
        new = found[len(front) : len(found) - len(mark + fragment)]
        assert re.fullmatch(r"([?&]?(utm_[\w.~%-]*|ref)=[\w.~%-]*(&|$))*", new, re.ASCII), (location, query)
        assert found.partition("#")[0].partition("?")[0] == page and found.isascii()
        assert not {name.partition("=")[0] for name in rest.split("&")} & {
            name.partition("=")[0] for name in new.strip("?&").split("&") if new
        }


NO_UTM = (
    *(
        "utm_source",
        "utm_source=",
        "=news",
        "?utm_source=news",
        "utm_source=AT&T",
        "utm_source=a&utm_source=b",
        "&a=1",
        "a=1&",
    ),
    *(
        "a=1&&b=2",
        "a b=1",
        "a=#b",
        "a={b}",
        "a={campaign",
        "a={{campaign}}",
        "a=\n",
        "a=\ud800",
        "ü=1",
        f"a={'b' * 999}",
        " ",
    ),
)
SOME_UTM = {  # and what an email of the campaign {campaign}&=%41 gets
    "": [],
    "utm_source=news": [("utm_source", "news")],
    "a=1+2%263=%C3%BC&b=%&c=ü": [("a", "1 2&3=ü"), ("b", "%"), ("c", "ü")],
    "a[b]=x-{campaign}-{campaign}": [("a[b]", "x-{campaign}&=%41-{campaign}&=%41")],
    f"a={'b' * 998}": [("a", "b" * 998)],
}


def test_parameters_for_all_links_are_read_or_refused_with_what_was_expected() -> None:
    for text in NO_UTM:
        with pytest.raises(tracker.BadInput, match=r"^--utm .*: expected NAME=VALUE, joined by &"):
            tracker.read_utm(text, "--utm")
    for text, filled in SOME_UTM.items():
        assert tracker.filled_utm(tracker.read_utm(text), "{campaign}&=%41") == filled
        assert tracker.filled_utm(text, "") == [(name, value) for name, value in filled if "campaign" not in value]


# -- Location

UNCHANGED = [
    "/x?q=1&r=%26#f?g#h",
    "?",
    "/#",
    "/%41%2f%c3%bc",
    "/100%",
    "/%zz",
    "/a+b?c+d",
    "/!$&'()*+,;=:@-._~[]|^`{}",
    "/A?B#C",
]
TAILS = {tail: tail for tail in UNCHANGED} | {
    "/ü": "/%C3%BC", "/?ü#ü": "/?%C3%BC#%C3%BC", "/😀": "/%F0%9F%98%80", "/e\u0301": "/e%CC%81",
    "/a b?c d": "/a%20b?c%20d", '/"<>': "/%22%3C%3E",
}  # fmt: skip


def test_location_is_ascii_and_changes_nothing_that_it_need_not() -> None:
    for tail, expected in TAILS.items():
        location = f"https://a.b{expected}"
        assert tracker.read_target(f"https://A.b{tail}").location == location
        assert tracker.read_target(location).location == location, "reading it again changes nothing"


# -- Destinations


DESTINATIONS = {
    "acme.com": "acme.com", " ACME.com. ": "acme.com", "acme.com:8443": "acme.com:8443",
    "acme.com:08443": "acme.com:8443", "bücher.example": "xn--bcher-kva.example",
    "BÜCHER.example:81": "xn--bcher-kva.example:81", "faß.de": "xn--fa-hia.de",
    "xn--bcher-kva.example": "xn--bcher-kva.example", "192.0.2.1": "192.0.2.1", "[2001:DB8::1]": "[2001:db8::1]",
    "[::1]:3000": "[::1]:3000",
}  # fmt: skip
NO_DESTINATIONS = (
    *("", " ", "com", "localhost", "localhost:3000", "com.", ".com", "acme..com", "*.acme.com", "*", "acme com"),
    *("https://acme.com", "acme.com/", "acme.com/a", "acme.com?x", "user@acme.com", "acme.com:https"),
    *("acme.com:1:2", "0x7f.1", "127.1", "1.2.3.4.5", "::1", "[::1", "acme.com\\", "acme.com\n.evil.com"),
    *("a" * 64 + ".com", "acme.com:0", "acme.com:65536", "acme.com:99999"),
)


def test_a_destination_is_kept_as_targets_are_read_and_what_is_none_is_refused_with_what_was_expected() -> None:
    assert {text: tracker.read_destination(text) for text in DESTINATIONS} == DESTINATIONS
    for text in NO_DESTINATIONS:
        with pytest.raises(tracker.BadInput, match="expected"):
            tracker.read_destination(text)


COVERED = {  # what a destination covers; after it, what it does not
    "acme.com": ("https://acme.com http://acme.com https://a.b.acme.com https://acme.com.",
        "https://notacme.com https://acme.com.evil.com https://acme.com-evil.com https://com https://acme.com:8443 "
        "http://acme.com:8080"),
    "www.acme.com": ("https://www.acme.com", "https://acme.com"),
    "acme.com:8443": ("https://acme.com:8443 https://www.acme.com:8443", "https://acme.com https://acme.com:84"),
    "acme.com:443": ("https://acme.com https://www.acme.com:443", "http://acme.com"),
    "acme.com:80": ("http://acme.com", "https://acme.com"),
    "bücher.example": ("https://BÜCHER.example https://shop.xn--bcher-kva.example", "https://bucher.example"),
    "faß.de": ("https://faß.de", "https://fass.de"),
    "192.0.2.1": ("http://192.0.2.1", "http://1.192.0.2.1.evil.com"),
    "[2001:db8::1]": ("http://[2001:DB8:0::1]", "http://[2001:db8::2]"),
}  # fmt: skip


@pytest.mark.parametrize("destination", COVERED)
def test_a_domain_covers_itself_and_what_is_below_it_on_its_port(destination: str) -> None:
    for urls, expected in zip(COVERED[destination], (True, False), strict=True):
        for url in urls.split():
            target = tracker.read_target(f"{url}/")
            assert tracker.covers([tracker.read_destination(destination)], target) is expected, url
            assert not tracker.covers([], target)


SOME = {"allow": ["acme.com", "shop.example:8443", "xn--bcher-kva.example"]}
BLOCKING = {"any_domain": True, "block": ["bad.example"]}
STRONGER = {
    "any_domain": False,
    "allow": ["acme.com", "acme.com:8443"],
    "block": ["old.acme.com:443", "odd.acme.com:8443"],
}
NOT_ALLOWED, BLOCKED, SUSPENDED = tracker.NAMING_REASONS
POLICIES: list[tuple[dict[str, Any], str, str | None, str | None]] = [
    # what a tenant is told beside what it was, a target, why a plain link to it is named and not redirected, and why a signed one
    *((SOME, f"https://{host}/", None, None) for host in ("www.acme.com", "shop.example:8443", "BÜCHER.example")),
    *((SOME, f"https://{host}/", NOT_ALLOWED, None) for host in ("notacme.com", "acme.com:8443", "shop.example")),
    *(
        (BLOCKING, f"https://{host}/", BLOCKED, BLOCKED)
        for host in ("www.bad.example", "BAD.example.", "bad%2Eexample:8443")
    ),
    (BLOCKING, "https://other.example/", None, None),
    *((STRONGER, f"https://{host}/", BLOCKED, BLOCKED) for host in ("old.acme.com", "odd.acme.com:8443")),
    *((STRONGER, f"https://{host}/", None, None) for host in ("old.acme.com:8443", "odd.acme.com", "new.acme.com")),
    ({**SOME, "suspended": True}, "https://acme.com/", SUSPENDED, SUSPENDED),
    ({**SOME, "suspended": False}, "https://acme.com/", None, None),
]


def test_a_link_leads_where_its_tenant_allows_and_is_named_elsewhere_for_a_reason(stage: Stage) -> None:
    expected: Counter[str] = Counter()
    for changes, target, *whys in POLICIES:
        stage.change(stage.acme, **changes)
        for link, why in zip((plain, signed), whys, strict=True):
            response = ask(stage, link(stage, stage.acme, target), 200 if why else 302)
            assert ("Location" in response.headers) is (why is None)
            expected.update([why] if why else [])
        ask(stage, plain(stage, stage.globex, target), 302)
    stage.change(stage.globex, any_domain=False)  # and so none
    ask(stage, plain(stage, stage.globex, "https://acme.com/"), 200)
    stage.app.spool.close()
    named = stage.web.get(f"/{stage.acme.id}/stats.json").json["naming_page"]
    found = {why: sum(each["clicks"] for each in named if each["reason"] == why) for why in tracker.NAMING_REASONS}
    assert found == expected


# -- The naming page


def links_of(page: str) -> list[str]:
    """The attributes of every link on a page."""
    return [html.unescape(each) for each in re.findall(r"<a\s+([^>]*)>", page)]


def test_the_naming_page_names_the_host_and_has_one_bare_link_to_it(stage: Stage) -> None:
    response = ask(stage, plain(stage, stage.acme, "https://evil.com/a?b=1&c='<x>\"#d"), 200)
    assert not {"Location", "Refresh"} & {*response.headers}
    assert "http-equiv" not in response.text.lower() and "<script" not in response.text.lower()
    assert "<bdi>evil.com</bdi>" in response.text
    # The link is the destination itself, so what the reader does next is not counted, and no link of ours is shown.
    assert links_of(response.text) == ['href="https://evil.com/a?b=1&c=\'%3Cx%3E%22#d" rel="noreferrer nofollow"']
    assert "b=1&amp;c=" in response.text and "<x>" not in response.text
    assert (response.headers["Cache-Control"], response.headers["X-Robots-Tag"]) == ("no-store", "noindex")
    assert response.headers["Referrer-Policy"] == "no-referrer"
    assert "frame-ancestors 'none'" in response.headers["Content-Security-Policy"]
    assert "unsafe" not in response.headers["Content-Security-Policy"]


@both
def test_a_removed_tenants_links_are_named_since_nobody_vouches_for_them(
    stage: Stage, link: Callable[..., str]
) -> None:
    uri = link(stage, stage.globex, "https://acme.com/")
    with tracker.changing_tenants(stage.database) as connection:
        tracker.remove_tenant(connection, stage.globex, NOW)
    stage.refresh()
    response = ask(stage, uri, 200)
    assert "<bdi>acme.com</bdi>" in response.text
    assert "Location" not in response.headers
    for target in ("javascript:alert(1)", "https://track.example.com/"):
        ask(stage, link(stage, stage.globex, target), 400)
    stage.drain()
    assert stage.rows("select count(*) from events") == [(0,)]


def test_a_plain_link_of_nobody_or_with_a_bad_key_is_not_found_and_not_counted(stage: Stage) -> None:
    for mail_id in ("nobody99", "%00%00%00", "a%2Fb", "..", "dashboard", stage.acme.id):
        assert "acme.com" not in ask(stage, f"/{mail_id}/click/e1?url=https://acme.com/", 404).text
    for key in ("..", "%2E", "a%0Ab", "a%2Fb", "a%20b", "%C3%BC", "a" * 201):
        ask(stage, f"/{stage.acme.mail_id}/click/{key}?url=https://acme.com/", 404)
    stage.drain()
    assert stage.rows("select count(*) from events") == [(0,)]


def test_while_nobody_knows_the_tenants_plain_links_are_named_and_signed_ones_redirect(stage: Stage) -> None:
    (stage.folder / "tenants.json").unlink()
    stage.app.directory = tracker.Directory(str(stage.folder))  # as in a process that was born without the file
    ask(stage, plain(stage, stage.acme, "https://acme.com/"), 200)
    ask(stage, signed(stage, stage.acme, "https://acme.com/"), 302)


# -- Ids and keys


def test_ids_and_keys_that_are_made_are_random_and_can_be_typed() -> None:
    ids = {make() for make in (tracker.new_dashboard_id, tracker.new_key) for _ in range(3000)}
    assert len(ids) == 6000
    # 128 bits that no command line takes for an option
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{21}", each) for each in ids)
    assert not any(map(tracker.id_fault, ids)) and all(map(tracker.is_key, ids))
    # Short, without characters that are read for each other
    mail_ids = {tracker.new_mail_id() for _ in range(3000)}
    assert len(mail_ids) > 2990 and {len(each) for each in mail_ids} == {8}
    assert set("".join(mail_ids)) == set("abcdefghjkmnpqrstuvwxyz23456789")


IDS = ("abc", "abc123", "A-b_C9", "_ab", "0-0", "a" * 64, "dashboards", "click1")
NO_IDS = (
    *("", "ab", "a" * 65, "-ab", "--help", "a.b", "a b", "a/b", "abc\n", "ab\0", "äbc", "\uff41\uff42\uff43"),
    *("a%62c", "a~b", "a@b.c"),
)
KEYS = ("e", "1", "...", ".a", "a.gif", "Ab.9_~+x@y=z:w-", "a" * 200, "-", "a@b.example")
NO_KEYS = (
    *("", ".", "..", "a" * 201, "a b", "a/b", "a\\b", "a\n", "\n", "a\0", "a?b", "a#b", "a%b", "ü", "a&b", "<b>"),
    "{{id}}",
)


def test_an_id_of_a_tenant_is_a_word_and_a_key_of_an_email_needs_no_escaping() -> None:
    assert {text: tracker.id_fault(text) for text in IDS} == dict.fromkeys(IDS)
    assert [text for text in NO_IDS if "expected" not in (tracker.id_fault(text) or "")] == []
    assert {text for text in (*KEYS, *NO_KEYS) if tracker.is_key(text)} == {*KEYS}


def test_no_word_of_the_routes_can_be_an_id_in_any_case() -> None:
    words = {part.split(".")[0] for route in tracker.ROUTES for part in route.pattern.split("/")} - {""}
    words = {word for word in words if not word.startswith("{")}
    assert [each for word in words for each in (word, word.upper()) if not tracker.id_fault(each)] == []


def test_whatever_can_be_a_key_comes_back_out_of_its_links_and_a_made_one_needs_no_escaping(stage: Stage) -> None:
    secret, mail_id = stage.app.secrets[0], stage.acme.mail_id
    url = "https://acme.com/?a=1&b='\"<ü>"
    for key in KEYS:
        pixel = tracker.recognise(*tracker.split_target(tracker.pixel_path(mail_id, key)))
        click = tracker.recognise(*tracker.split_target(tracker.click_path(secret, mail_id, key, url)))
        assert (pixel, click) == ((True, mail_id, key, None), (False, mail_id, key, url))
    # Neither in HTML nor in quoted-printable
    assert re.fullmatch(r"[A-Za-z0-9_/-]+", tracker.click_path(secret, mail_id, tracker.new_key(), url))
