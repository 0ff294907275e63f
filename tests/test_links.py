"""Links: ids and keys, signatures that hold for ever, and targets read as a browser reads them."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import html.parser
import re
import sqlite3
import struct
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote

import pytest
import webtest
from conftest import NOW, Stage

import tracker

# Written down once, never to be computed again: mail with these links has been sent, and can't be called back.
SECRET = "a-secret-for-the-golden-links-never-used-elsewhere"
OLDER = "an-older-secret-that-still-verifies-what-it-signed"
GOLDEN = [
    pytest.param(
        SECRET,
        "k3v9x2mp",
        "e1",
        "https://acme.com/sale?utm_source=mail&id=7#top",
        "aHR0cHM6Ly9hY21lLmNvbS9zYWxlP3V0bV9zb3VyY2U9bWFpbCZpZD03I3RvcA",
        "FAMllD4j7q_zMKq5",
        "/k3v9x2mp/click/e1/FAMllD4j7q_zMKq5/aHR0cHM6Ly9hY21lLmNvbS9zYWxlP3V0bV9zb3VyY2U9bWFpbCZpZD03I3RvcA",
        "/k3v9x2mp/pixel/e1.gif",
        "https://acme.com/sale?utm_source=mail&id=7#top",
        id="plain-words",
    ),
    pytest.param(
        SECRET,
        "k3v9x2mp",
        "Ab.9_~+x@y=z:w-",
        "https://bücher.example/über uns?q=naïve&größe=5#café",
        "aHR0cHM6Ly9iw7xjaGVyLmV4YW1wbGUvw7xiZXIgdW5zP3E9bmHDr3ZlJmdyw7bDn2U9NSNjYWbDqQ",
        "fIBEppE_8x_MGxm5",
        "/k3v9x2mp/click/Ab.9_~+x@y=z:w-/fIBEppE_8x_MGxm5/"
        "aHR0cHM6Ly9iw7xjaGVyLmV4YW1wbGUvw7xiZXIgdW5zP3E9bmHDr3ZlJmdyw7bDn2U9NSNjYWbDqQ",
        "/k3v9x2mp/pixel/Ab.9_~+x@y=z:w-.gif",
        "https://xn--bcher-kva.example/%C3%BCber%20uns?q=na%C3%AFve&gr%C3%B6%C3%9Fe=5#caf%C3%A9",
        id="every-character-a-key-may-have-and-a-url-that-is-not-ascii",
    ),
    pytest.param(
        OLDER,
        "abc123",
        "e1",
        "https://acme.com/",
        "aHR0cHM6Ly9hY21lLmNvbS8",
        "70tmz3YwWS_uidwD",
        "/abc123/click/e1/70tmz3YwWS_uidwD/aHR0cHM6Ly9hY21lLmNvbS8",
        "/abc123/pixel/e1.gif",
        "https://acme.com/",
        id="another-secret-and-tenant",
    ),
]
GOLDEN_NAMES = "secret, mail_id, key, url, target, signature, click, pixel, location"


def ask(stage: Stage, uri: str, status: int | None = None, method: str = "GET", **environ: str) -> Any:
    """Send a request target exactly as it stands here; RAW_URI is where gunicorn puts it."""
    # "*" lets webtest return any status: the test compares it, and sees the page where it differs.
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


def remove(stage: Stage, tenant: tracker.Tenant) -> None:
    """Remove a tenant, and let the app see it at once."""
    with tracker.changing_tenants(stage.database) as connection:
        tracker.remove_tenant(connection, tenant, NOW)
    stage.refresh()


# -- Golden links


@pytest.mark.parametrize(GOLDEN_NAMES, GOLDEN)
def test_links_are_made_as_in_mail_already_sent(
    secret: str,
    mail_id: str,
    key: str,
    url: str,
    target: str,
    signature: str,
    click: str,
    pixel: str,
    location: str,
) -> None:
    assert tracker.encode_target(url) == target
    assert tracker.decode_target(target) == url
    assert tracker.sign(secret, mail_id, target) == signature
    assert tracker.click_path(secret, mail_id, key, url) == click
    assert tracker.pixel_path(mail_id, key) == pixel
    assert tracker.verify([secret], mail_id, target, signature)


@pytest.mark.parametrize(GOLDEN_NAMES, GOLDEN)
def test_links_in_mail_already_sent_still_lead_where_they_led(
    staged: Callable[..., Stage],
    secret: str,
    mail_id: str,
    key: str,
    url: str,
    target: str,
    signature: str,
    click: str,
    pixel: str,
    location: str,
) -> None:
    stage = staged(SECRET_KEY=f"{SECRET},{OLDER}")
    with tracker.changing_tenants(stage.database) as connection:
        tracker.add_tenant(connection, "Sender of old mail", NOW, id_=mail_id)
    stage.refresh()
    assert ask(stage, click, 302).headers["Location"] == location
    assert ask(stage, pixel, 200).headers["X-Tracker"] == "recorded"
    stage.drain()
    assert stage.rows("select key from emails") == [(key,)]


@pytest.mark.parametrize(GOLDEN_NAMES, GOLDEN)
def test_a_signature_can_be_recomputed_from_its_description(
    secret: str,
    mail_id: str,
    key: str,
    url: str,
    target: str,
    signature: str,
    click: str,
    pixel: str,
    location: str,
) -> None:
    """Put together by hand, so that another program could check links too."""
    tenant_key = hmac.new(secret.encode(), b"tenant 1" + mail_id.encode(), hashlib.sha256).digest()
    fields = b"".join(struct.pack(">I", len(each)) + each for each in (b"click 1", target.encode()))
    digest = hmac.new(tenant_key, fields, hashlib.sha256).digest()
    assert base64.b64encode(digest[:12], altchars=b"-_").decode() == signature
    assert base64.b64encode(url.encode(), altchars=b"-_").decode().rstrip("=") == target


# -- Signing


def test_a_signature_is_sixteen_characters_that_need_no_escaping() -> None:
    made = {tracker.sign(f"secret number {n}, long enough to count", "k3v9x2mp", "aHR0cA") for n in range(200)}
    assert len(made) == 200
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{16}", each) for each in made)


def test_fields_of_a_signature_can_not_slide_into_each_other() -> None:
    """Were the fields joined without their lengths, these would all sign the same bytes."""
    signatures = {
        tracker.sign(SECRET, mail_id, target)
        for mail_id, target in [("abc", "defg"), ("abcd", "efg"), ("abcde", "fg"), ("abcdefg", ""), ("ab", "cdefg")]
    }
    assert len(signatures) == 5


def test_a_signature_binds_its_target_with_the_length() -> None:
    """A field that holds what looks like the next field is still one field."""
    inner = "a" + "\0\0\0\x01" + "b"
    assert tracker.sign(SECRET, "k3v9x2mp", inner) != tracker.sign(SECRET, "k3v9x2mp", "ab")


@pytest.mark.parametrize(
    "secrets_, mail_id, target, signature, expected",
    [
        pytest.param([SECRET], "k3v9x2mp", "aHR0cA", None, True, id="its-own"),
        pytest.param(["another secret, of thirty-two or more", SECRET], "k3v9x2mp", "aHR0cA", None, True, id="rotated"),
        pytest.param([SECRET, "another secret, of thirty-two or more"], "k3v9x2mp", "aHR0cA", None, True, id="newest"),
        pytest.param(["another secret, of thirty-two or more"], "k3v9x2mp", "aHR0cA", None, False, id="other-secret"),
        pytest.param([], "k3v9x2mp", "aHR0cA", None, False, id="no-secret"),
        pytest.param([SECRET], "k3v9x2mq", "aHR0cA", None, False, id="other-tenant"),
        pytest.param([SECRET], "K3V9X2MP", "aHR0cA", None, False, id="other-case-of-the-tenant"),
        pytest.param([SECRET], "k3v9x2mp", "aHR0cB", None, False, id="other-target"),
        pytest.param([SECRET], "k3v9x2mp", "", None, False, id="no-target"),
        pytest.param([SECRET], "k3v9x2mp", "aHR0cA", "", False, id="no-signature"),
        pytest.param([SECRET], "k3v9x2mp", "aHR0cA", "A" * 16, False, id="made-up"),
        pytest.param([SECRET], "k3v9x2mp", "aHR0cA", "é" * 16, False, id="not-ascii"),
        pytest.param([SECRET], "k3v9x2mp", "aHR0cA", "\ud800" * 16, False, id="lone-surrogates"),
    ],
)
def test_only_a_secret_of_ours_verifies_its_own_signature(
    secrets_: list[str], mail_id: str, target: str, signature: str | None, expected: bool
) -> None:
    given = tracker.sign(SECRET, "k3v9x2mp", "aHR0cA") if signature is None else signature
    assert tracker.verify(secrets_, mail_id, target, given) is expected


@pytest.mark.parametrize("cut", [0, 1, 8, 15])
def test_a_shortened_signature_verifies_nothing(cut: int) -> None:
    assert not tracker.verify([SECRET], "k3v9x2mp", "aHR0cA", tracker.sign(SECRET, "k3v9x2mp", "aHR0cA")[:cut])


@pytest.mark.parametrize(
    "segment",
    [
        pytest.param("aHR0cHM6Ly9hLmIv=", id="padding-where-none-is-needed"),
        pytest.param("aHR0cHM6Ly9hLmIvYw==", id="padding-of-standard-base64"),
        pytest.param("aHR0cHM6Ly9hLmIvYx", id="bits-left-over"),
        pytest.param("aHR0cHM6Ly9hLmIvYw\n", id="line-break"),
        pytest.param("aHR0cHM6 Ly9hLmIv", id="space"),
        pytest.param("aHR0cHM6Ly9hLmIvP+8", id="plus-of-the-other-alphabet"),
        pytest.param("aHR0cHM6Ly9hLmIv/w", id="slash-of-the-other-alphabet"),
        pytest.param("aHR0cHM6Ly9hLmIv!", id="other-characters"),
        pytest.param("aHR0cHM6L", id="impossible-length"),
        pytest.param("_w", id="not-utf-8"),
        pytest.param("7aCA", id="surrogate-in-utf-8"),
        pytest.param("wIA", id="overlong-utf-8"),
        pytest.param("aHR0cHM6Ly9hLmIvé", id="not-ascii"),
    ],
)
def test_a_target_has_one_spelling_and_every_other_one_is_refused(stage: Stage, segment: str) -> None:
    assert tracker.decode_target(segment) is None
    # Even a signature that is right for this spelling does not help.
    signature = tracker.sign(stage.app.secrets[0], stage.acme.mail_id, segment)
    uri = f"/{stage.acme.mail_id}/click/e1/{signature}/{quote(segment, safe='')}"
    assert "Location" not in ask(stage, uri, 404).headers


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda mail, key, sig, target: (mail, key, sig[:-1], target), id="signature-shortened"),
        pytest.param(lambda mail, key, sig, target: (mail, key, sig + "A", target), id="signature-longer"),
        pytest.param(lambda mail, key, sig, target: (mail, key, sig + "%3D", target), id="signature-padded"),
        pytest.param(lambda mail, key, sig, target: (mail, key, sig.swapcase(), target), id="signature-in-other-case"),
        pytest.param(lambda mail, key, sig, target: (mail, key, "%20" + sig, target), id="signature-after-a-space"),
        pytest.param(lambda mail, key, sig, target: (mail, key, sig + "%0A", target), id="signature-and-a-line-break"),
        pytest.param(lambda mail, key, sig, target: (mail, key, "%FF" * 16, target), id="signature-not-utf-8"),
        pytest.param(lambda mail, key, sig, target: (mail, key, "", target), id="signature-empty"),
        pytest.param(lambda mail, key, sig, target: (mail, key, sig, target[:-1]), id="target-shortened"),
        pytest.param(lambda mail, key, sig, target: (mail, key, sig, target + "%3D"), id="target-padded"),
        pytest.param(lambda mail, key, sig, target: (mail, key, sig, ""), id="target-empty"),
        pytest.param(lambda mail, key, sig, target: (mail, "", sig, target), id="key-empty"),
        pytest.param(lambda mail, key, sig, target: (mail, "%2E%2E", sig, target), id="key-two-dots"),
        pytest.param(lambda mail, key, sig, target: (mail, "a%0Ab", sig, target), id="key-with-a-line-break"),
        pytest.param(lambda mail, key, sig, target: (mail, "a%2Fb", sig, target), id="key-with-a-slash"),
        pytest.param(lambda mail, key, sig, target: (mail, "a" * 201, sig, target), id="key-too-long"),
        pytest.param(lambda mail, key, sig, target: (mail + "x", key, sig, target), id="another-tenant"),
    ],
)
def test_a_link_that_is_not_whole_is_not_found(stage: Stage, change: Callable[..., Sequence[str]]) -> None:
    mail_id, _, key, signature, target = signed(stage, stage.acme, "https://acme.com/")[1:].split("/")
    mail_id, key, signature, target = change(mail_id, key, signature, target)
    response = ask(stage, f"/{mail_id}/click/{key}/{signature}/{target}", 404)
    assert "Location" not in response.headers


def test_another_tenants_signature_is_not_good_for_this_one(stage: Stage) -> None:
    uri = signed(stage, stage.globex, "https://evil.com/").replace(stage.globex.mail_id, stage.acme.mail_id)
    ask(stage, uri, 404)


def test_the_key_of_the_email_is_not_signed_so_that_a_mailing_tool_can_merge_its_own(stage: Stage) -> None:
    for key in ("e1", "recipient-0002", "a@b.example", "x" * 200):
        uri = signed(stage, stage.acme, "https://elsewhere.example/", key="TEMPLATE").replace("TEMPLATE", key)
        assert ask(stage, uri, 302).headers["Location"] == "https://elsewhere.example/"
    stage.drain()
    assert {key for (key,) in stage.rows("select key from emails")} == {
        "e1",
        "recipient-0002",
        "a@b.example",
        "x" * 200,
    }


def test_a_mail_program_may_percent_encode_a_link_that_needs_none(stage: Stage) -> None:
    uri = (
        signed(stage, stage.acme, "https://acme.com/", key="a@b.example")
        .replace("@", "%40")
        .replace("/click", "/%63lick")
    )
    assert ask(stage, uri, 302).headers["Location"] == "https://acme.com/"


def test_each_secret_key_verifies_and_the_first_signs(staged: Callable[..., Stage]) -> None:
    newest, older = "n" * 32, "o" * 32
    stage = staged(SECRET_KEY=f"{newest},{older}")
    assert stage.app.secrets[:2] == (newest, older)
    for secret in stage.app.secrets:  # the third is the database's own: mail may carry it
        ask(stage, tracker.click_path(secret, stage.acme.mail_id, "e1", "https://elsewhere.example/"), 302)
    ask(stage, tracker.click_path("x" * 32, stage.acme.mail_id, "e1", "https://elsewhere.example/"), 404)
    assert len(stage.app.secrets) == 3


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_signed_link_works_when_the_database_is_gone(stage: Stage, method: str) -> None:
    uri = signed(stage, stage.acme, "https://elsewhere.example/")
    stage.app.close()
    for path in stage.folder.glob("tracking.db*"):
        path.rename(stage.folder / f"moved-{path.name}")
    stage.app = tracker.App(stage.settings)  # as a worker that starts now
    stage.web = webtest.TestApp(tracker.wsgi(stage.app))
    response = ask(stage, uri, 302, method)
    assert response.headers["Location"] == "https://elsewhere.example/"
    stage.app.spool.close()
    (segment,) = stage.spool.glob("*.jsonl")
    assert uri in segment.read_text(), "the click waits in the spool"
    assert not (stage.folder / "tracking.db").exists(), "nothing made a new database"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_signed_link_works_while_somebody_else_holds_the_database(stage: Stage, method: str) -> None:
    uri = signed(stage, stage.acme, "https://elsewhere.example/")
    with contextlib.closing(sqlite3.connect(stage.settings.database, isolation_level=None)) as other:
        other.execute("begin exclusive")
        response = ask(stage, uri, 302, method)
        other.execute("rollback")
    assert response.headers["Location"] == "https://elsewhere.example/"
    stage.drain()
    assert stage.rows("select event_type, method, url from event_details") == [
        ("click", method, "https://elsewhere.example/")
    ]


def test_head_gets_the_redirect_without_a_body(stage: Stage) -> None:
    for uri in (signed(stage, stage.acme, "https://acme.com/a"), plain(stage, stage.acme, "https://acme.com/a")):
        response = ask(stage, uri, 302, "HEAD")
        assert response.headers["Location"] == "https://acme.com/a"
        assert response.body == b""


def test_a_redirect_may_be_kept_by_nobody(stage: Stage) -> None:
    headers = ask(stage, signed(stage, stage.acme, "https://acme.com/"), 302).headers
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Robots-Tag"] == "noindex"


def test_making_a_signed_link_refuses_a_target_that_it_could_not_lead_to() -> None:
    for url in ("javascript:alert(1)", "https://acme.com@evil.com/", "/relative", ""):
        with pytest.raises(tracker.BadTarget, match="expected"):
            tracker.click_path(SECRET, "k3v9x2mp", "e1", url)


@pytest.mark.parametrize("character", ["a", "ü", "日", "😀"])
def test_the_longest_link_that_can_be_signed_can_be_asked_for(character: str) -> None:
    """gunicorn refuses a longer request line, so a longer link would be dead in every mail."""
    url = "https://acme.com/" + character * (tracker.MAX_TARGET - len("https://acme.com/"))
    try:
        path = tracker.click_path(SECRET, "m" * 64, "k" * 200, url)
    except tracker.BadTarget:
        return  # saying no while the mail is being made is good too
    assert len(f"GET {path} HTTP/1.1\r\n") <= tracker.MAX_REQUEST_LINE


# -- Reading request targets


@pytest.mark.parametrize(
    "uri, segments, query",
    [
        pytest.param("/", ("",), "", id="root"),
        pytest.param("/a/b", ("a", "b"), "", id="usual"),
        pytest.param("/a/b/", ("a", "b", ""), "", id="slash-at-the-end"),
        pytest.param("/a//b", ("a", "", "b"), "", id="empty-segment"),
        pytest.param("//host/a", ("", "host", "a"), "", id="two-slashes-are-no-host"),
        pytest.param("/a%2Fb/c", ("a/b", "c"), "", id="encoded-slash-stays-inside"),
        pytest.param("/a%252Fb", ("a%2Fb",), "", id="decoded-once"),
        pytest.param("/a/../b", ("a", "..", "b"), "", id="dots-are-a-segment"),
        pytest.param("/a/%2e%2E/b", ("a", "..", "b"), "", id="encoded-dots-too"),
        pytest.param("/a%0Ab", ("a\nb",), "", id="line-break"),
        pytest.param("/a%00b", ("a\0b",), "", id="nul"),
        pytest.param("/%FF%c3%bc", ("�ü",), "", id="not-utf-8"),
        pytest.param("/%zz%", ("%zz%",), "", id="broken-encoding"),
        pytest.param("/a+b", ("a+b",), "", id="plus-is-a-plus"),
        pytest.param("/a?b=c&d", ("a",), "b=c&d", id="query"),
        pytest.param("/a?b?c", ("a",), "b?c", id="second-question-mark"),
        pytest.param("/a%3Fb?c", ("a?b",), "c", id="encoded-question-mark"),
        pytest.param("/a?b=%2F%20", ("a",), "b=%2F%20", id="query-stays-raw"),
        pytest.param("/a#b", ("a#b",), "", id="fragment-that-no-client-sends"),
        pytest.param("http://host/a?b", ("a",), "b", id="absolute-form"),
        pytest.param("HTTPS://host:1/a/b", ("a", "b"), "", id="absolute-form-with-port"),
        pytest.param("http://host", (), "", id="absolute-form-without-path"),
        pytest.param("http://host?b", (), "b", id="absolute-form-with-query-only"),
        pytest.param("*", (), "", id="asterisk-form"),
        pytest.param("", (), "", id="nothing"),
        pytest.param("a/b", ("b",), "", id="no-slash-first"),
    ],
)
def test_a_request_target_is_split_on_slashes_and_decoded_once(uri: str, segments: tuple[str, ...], query: str) -> None:
    assert tracker.split_target(uri) == (segments, query)


@pytest.mark.parametrize(
    "uri, expected",
    [
        pytest.param("/m/pixel/k.gif", tracker.Asked(True, "m", "k", None), id="pixel"),
        pytest.param("/m/pixel/k.gif?cache=1", tracker.Asked(True, "m", "k", None), id="pixel-with-query"),
        pytest.param("/m/pixel/a.gif.gif", tracker.Asked(True, "m", "a.gif", None), id="pixel-of-a-key-like-a-file"),
        pytest.param("/m/pixel/.gif", tracker.Asked(True, "m", "", None), id="pixel-without-key"),
        pytest.param("/m/pixel/a%2Fb.gif", tracker.Asked(True, "m", "a/b", None), id="pixel-of-a-bad-key"),
        pytest.param("http://host/m/pixel/k.gif", tracker.Asked(True, "m", "k", None), id="pixel-in-absolute-form"),
        pytest.param("/m/pixel/k.png", None, id="pixel-of-another-type"),
        pytest.param("/m/pixel/k.GIF", None, id="pixel-in-capitals"),
        pytest.param("//pixel/k.gif", None, id="pixel-without-tenant"),
        pytest.param("/m/pixel/k.gif/", None, id="pixel-with-a-slash-behind"),
        pytest.param("/m//pixel/k.gif", None, id="pixel-with-two-slashes"),
        pytest.param("/x/../m/pixel/k.gif", None, id="pixel-through-dots"),
        pytest.param("/m/click/k/s/t", tracker.Asked(False, "m", "k", None), id="signed"),
        pytest.param("/m/click/k/s/t?url=x", tracker.Asked(False, "m", "k", None), id="signed-ignores-a-query"),
        pytest.param("/m/click/k/s/", None, id="signed-without-target"),
        pytest.param("/m/click/k/s", None, id="signed-cut-short"),
        pytest.param("/m/click/k/s/t/", None, id="signed-with-a-slash-behind"),
        pytest.param("/m/click/k/s/a%2Fb", tracker.Asked(False, "m", "k", None), id="signed-with-a-slash-inside"),
        pytest.param("/m/click/k?url=x", tracker.Asked(False, "m", "k", "x"), id="plain"),
        pytest.param("/m/click/k", tracker.Asked(False, "m", "k", None), id="plain-without-target"),
        pytest.param("/m/click/?url=x", None, id="plain-without-key"),
        pytest.param("/m/click?url=x", None, id="plain-cut-short"),
        pytest.param("/m/Click/k?url=x", None, id="click-in-capitals"),
        pytest.param("/m/dashboard", None, id="a-page"),
        pytest.param("*", None, id="asterisk-form"),
    ],
)
def test_workers_and_drain_recognise_a_hit_by_its_request_target(uri: str, expected: object) -> None:
    assert tracker.recognise(*tracker.split_target(uri)) == expected


@pytest.mark.parametrize(
    "query, expected",
    [
        pytest.param("url=https%3A%2F%2Facme.com%2Fa", "https://acme.com/a", id="encoded"),
        pytest.param("url=https%3a%2f%2facme.com", "https://acme.com", id="encoded-in-lower-case"),
        pytest.param("url=https%3A%2F%2Fa.b%2F%3Fx%3D1%26y%3D2&utm=z", "https://a.b/?x=1&y=2", id="encoded-ends-at-&"),
        pytest.param("url=https://a.b/?x=1&y=2#f", "https://a.b/?x=1&y=2#f", id="by-hand-goes-on-after-&"),
        pytest.param("url=HTTPS://a.b/?x=1&y=2", "HTTPS://a.b/?x=1&y=2", id="by-hand-in-capitals"),
        pytest.param("url=https://a.b/%20+%26?q=a+b", "https://a.b/%20+%26?q=a+b", id="by-hand-is-not-decoded"),
        pytest.param("url=https://a.b/&url=https://c.d/", "https://a.b/&url=https://c.d/", id="by-hand-and-a-second"),
        pytest.param("url=https%3A%2F%2Fa.b%2F%3Fq%3Da+b", "https://a.b/?q=a b", id="encoded-plus-is-a-space"),
        pytest.param("url=https%3A%2F%2Fa.b%2F%3Fq%3Da%2Bb", "https://a.b/?q=a+b", id="encoded-%2B-is-a-plus"),
        pytest.param("url=https%3A%2F%2Fa.b%2F%2520", "https://a.b/%20", id="decoded-once"),
        pytest.param("url=https:%2F%2Fa.b%2Fc&x=1", "https://a.b/c", id="slashes-encoded-only"),
        pytest.param("url=https%3A//a.b/c&x=1", "https://a.b/c", id="colon-encoded-only"),
        pytest.param("url=https%3A%2F%2Fa.b&url=https%3A%2F%2Fc.d", "https://a.b", id="the-first-of-two-counts"),
        pytest.param("utm=1&url=https://a.b/", "https://a.b/", id="not-the-first-parameter"),
        pytest.param("url=https%3A%2F%2Fa.b%2F%FF", "https://a.b/�", id="not-utf-8"),
        pytest.param("url=https%3A%2F%2Fa.b%2F%0A", "https://a.b/\n", id="line-break-for-read_target-to-refuse"),
        pytest.param("url=//a.b/", "//a.b/", id="without-scheme"),
        pytest.param("url=", "", id="empty"),
        pytest.param("url=&x=1", "", id="empty-before-another"),
        pytest.param("", None, id="no-query"),
        pytest.param("url", None, id="no-value"),
        pytest.param("x=1", None, id="another-parameter"),
        pytest.param("curl=https://a.b/", None, id="ends-like-it"),
        pytest.param("URL=https://a.b/", None, id="in-capitals"),
        pytest.param("x=url=https://a.b/", None, id="inside-another-value"),
    ],
)
def test_the_target_of_a_plain_link_is_read_from_the_raw_query(query: str, expected: str | None) -> None:
    assert tracker.plain_url(query) == expected


@pytest.mark.parametrize("query", ["", "?", "?x=1", "?url=", "?url=%20", "?url=+&x=1"])
def test_a_plain_link_that_names_no_destination_says_what_was_expected(stage: Stage, query: str) -> None:
    assert "?url=" in ask(stage, f"/{stage.acme.mail_id}/click/e1{query}", 400).text


def test_a_link_written_by_hand_keeps_its_ampersands_through_to_the_events(stage: Stage) -> None:
    uri = f"/{stage.acme.mail_id}/click/e1?url=https://acme.com/a?x=1&y=%202&url=z"
    assert ask(stage, uri, 302).headers["Location"] == "https://acme.com/a?x=1&y=%202&url=z"
    stage.drain()
    assert stage.rows("select url from event_details") == [("https://acme.com/a?x=1&y=%202&url=z",)]


# -- Targets: what is refused everywhere. Where a browser would read another host than a filter does, nobody may.

REFUSED = {
    # backslashes are slashes to a browser
    "backslash-before-@": "https://evil.com\\@acme.com/",
    "backslash-ends-the-host": "https://evil.com\\.acme.com/",
    "backslash-in-the-path": "https://acme.com/\\evil.com",
    "backslashes-for-slashes": "https:\\\\evil.com\\",
    "one-slash-one-backslash": "https:/\\evil.com/",
    "backslash-host-without-scheme": "\\\\evil.com/",
    "slash-backslash-without-scheme": "/\\evil.com/",
    "encoded-backslash-in-the-host": "https://evil.com%5C.acme.com/",
    "backslash-after-the-port": "https://acme.com:443\\@evil.com/",
    # credentials
    "credentials-that-look-like-the-host": "https://acme.com@evil.com/",
    "credentials-with-a-port": "https://acme.com:443@evil.com/",
    "credentials-on-an-allowed-host": "https://user:secret@acme.com/",
    "credentials-empty": "https://@acme.com/",
    "credentials-with-two-@": "https://a@b@acme.com/",
    "encoded-@-in-the-host": "https://acme.com%40evil.com/",
    "full-width-@-in-the-host": "https://acme.com\uff20evil.com/",
    # control characters; a browser drops tabs and line breaks anywhere
    "tab-in-the-scheme": "ht\ttps://evil.com/",
    "tab-between-the-slashes": "https:/\t/evil.com/",
    "tab-in-the-host": "https://acme\t.com/",
    "tab-in-the-path": "https://acme.com/a\tb",
    "line-feed-at-the-end": "https://acme.com/\n",
    "carriage-return-in-the-host": "https://ac\rme.com/",
    "another-header": "https://acme.com/\r\nSet-Cookie: a=b",
    "nul-in-the-host": "https://acme.com\0.evil.com/",
    "nul-in-the-query": "https://acme.com/?a=\0",
    "control-character-first": "\x01https://acme.com/",
    "del-in-the-path": "https://acme.com/\x7f",
    "escape-in-the-fragment": "https://acme.com/#\x1b[2J",
    "encoded-nul-in-the-host": "https://evil.com%00.acme.com/",
    "encoded-tab-in-the-host": "https://evil.com%09.acme.com/",
    "encoded-line-feed-in-the-host": "https://evil.com%0A.acme.com/",
    # no scheme, or slashes that a browser mends
    "no-scheme": "//evil.com/",
    "three-slashes": "///evil.com/",
    "scheme-without-slashes": "https:evil.com/",
    "scheme-with-one-slash": "https:/evil.com/",
    "scheme-with-three-slashes": "https:///evil.com/",
    "scheme-with-five-slashes": "https://///evil.com/",
    "scheme-alone": "https:",
    "scheme-and-slashes": "https://",
    "no-host-but-a-query": "https://?acme.com",
    "no-host-but-a-fragment": "https://#acme.com",
    "no-host-but-a-port": "https://:443/",
    "host-alone": "acme.com",
    "host-and-port-alone": "acme.com:443/",
    "path-alone": "/a",
    "query-alone": "?a=b",
    "dot": ".",
    # other schemes
    "javascript": "javascript:alert(1)",
    "javascript-in-mixed-case": "JaVaScRiPt:alert(1)//https://acme.com/",
    "javascript-with-a-host": "javascript://acme.com/%0aalert(1)",
    "javascript-after-a-space": " javascript:alert(1)",
    "data": "data:text/html,<script>alert(1)</script>",
    "vbscript": "vbscript:msgbox(1)",
    "file": "file:///etc/passwd",
    "ftp": "ftp://acme.com/",
    "mailto": "mailto:ann@acme.com",
    "blob": "blob:https://acme.com/1",
    "view-source": "view-source:https://acme.com/",
    "intent": "intent://acme.com/#Intent;scheme=https;end",
    "websocket": "wss://acme.com/",
    "scheme-like-https": "https+x://acme.com/",
    "scheme-in-full-width": "\uff48ttps://acme.com/",
    # characters that stand for separators
    "encoded-slash-in-the-host": "https://evil.com%2F.acme.com/",
    "encoded-question-mark-in-the-host": "https://evil.com%3F.acme.com/",
    "encoded-hash-in-the-host": "https://evil.com%23.acme.com/",
    "encoded-colon-in-the-host": "https://acme.com%3A443/",
    "encoded-space-in-the-host": "https://acme%20.com/",
    "encoded-twice": "https://acme%252Ecom/",
    "percent-alone": "https://acme%.com/",
    "percent-cut-short": "https://acme.com%2/",
    "encoded-bytes-that-are-not-utf-8": "https://%FF.acme.com/",
    "full-width-slash": "https://evil.com\uff0f.acme.com/",
    "full-width-question-mark": "https://evil.com\uff1f.acme.com/",
    "full-width-hash": "https://evil.com\uff03.acme.com/",
    "full-width-colon": "https://acme.com\uff1a443/",
    "full-width-backslash": "https://evil.com\uff3c.acme.com/",
    "full-width-percent": "https://acme\uff052Ecom/",
    "account-of-holds-a-slash": "https://evil.c\u2100.acme.com/",
    "division-slash": "https://evil.com\u2215.acme.com/",
    "fraction-slash": "https://evil.com\u2044.acme.com/",
    "digit-with-a-full-stop": "https://acme\u2488com/",
    "ellipsis": "https://acme\u2026com/",
    # names that no registry has, and characters that a browser drops or forbids
    "empty-label": "https://acme..com/",
    "empty-label-first": "https://.acme.com/",
    "two-dots-at-the-end": "https://acme.com../",
    "dots-only": "https://../",
    "dot-only": "https://./",
    "ideographic-dots-side-by-side": "https://acme。\uff0ecom/",
    "label-of-64": f"https://{'a' * 64}.acme.com/",
    "label-of-64-in-punycode": f"https://{'ü' * 60}.acme.com/",
    "host-of-254": f"https://{'.'.join(['a' * 49] * 5)}.acme/",
    "hyphen-first": "https://-acme.com/",
    "hyphen-last": "https://acme-.com/",
    "punycode-of-nothing": "https://xn--.com/",
    "punycode-of-ascii": "https://xn--acme-.com/",
    "zero-width-joiner": "https://ac\u200dme.com/",
    "zero-width-non-joiner": "https://ac\u200cme.com/",
    "zero-width-space": "https://ac\u200bme.com/",
    "soft-hyphen": "https://ac\u00adme.com/",
    "byte-order-mark": "https://\ufeffacme.com/",
    "right-to-left-override": "https://acme.com\u202e/",
    "capital-sharp-s": "https://FAẞ.de/",
    "emoji": "https://😀.acme.com/",
    "accent-first": "https://\u0301acme.com/",
    "space-in-the-host": "https://acme.com .evil.com/",
    "space-before-the-host": "https:// acme.com/",
    "space-after-the-host": "https://acme.com /",
    "ideographic-space-in-the-host": "https://acme\u3000.com/",
    "markup-in-the-host": "https://<b>acme</b>.com/",
    "quote-in-the-host": 'https://acme.com"/',
    "comma-in-the-host": "https://acme,com/",
    "asterisk-in-the-host": "https://*.acme.com/",
    "semicolon-in-the-host": "https://acme.com;evil.com/",
    # addresses in spellings that only some programs read
    "ipv4-hexadecimal": "http://0x7f.1/",
    "ipv4-hexadecimal-in-one": "http://0x7f000001/",
    "ipv4-hexadecimal-in-capitals": "http://0X7F.0.0.1/",
    "ipv4-hexadecimal-last": "http://127.0.0.0x1/",
    "ipv4-hexadecimal-empty": "http://127.0.0.0x/",
    "ipv4-in-one-number": "http://2130706433/",
    "ipv4-octal": "http://0177.0.0.1/",
    "ipv4-leading-zeros": "http://127.0.0.01/",
    "ipv4-two-parts": "http://127.1/",
    "ipv4-three-parts": "http://127.0.1/",
    "ipv4-five-parts": "http://127.0.0.1.1/",
    "ipv4-too-large": "http://127.0.0.256/",
    "ipv4-full-width-hexadecimal": "http://\uff10\uff58\uff17\uff46\uff0e\uff11/",
    "ipv4-encoded-hexadecimal": "http://%30x7f.1/",
    "ipv4-ideographic-dots": "http://127。1/",
    "ipv4-circled-digits": "http://①②⑦.1/",
    "name-that-ends-in-a-number": "http://acme.com.1/",
    "name-that-ends-in-hexadecimal": "http://acme.0x/",
    "zero": "http://0/",
    "ipv6-without-brackets": "http://::1/",
    "ipv6-not-closed": "http://[::1/",
    "ipv6-not-opened": "http://::1]/",
    "ipv6-with-a-zone": "http://[fe80::1%25eth0]/",
    "ipv6-with-a-raw-zone": "http://[fe80::1%eth0]/",
    "ipv6-empty": "http://[]/",
    "ipv6-with-text-behind": "http://[::1]acme.com/",
    "ipv6-with-text-before": "http://acme.com[::1]/",
    "ipv6-three-colons": "http://[:::1]/",
    "ipv6-nine-groups": "http://[1:2:3:4:5:6:7:8:9]/",
    "ipv6-five-digits": "http://[::12345]/",
    "ipv6-with-short-ipv4": "http://[::127.1]/",
    "ipv6-encoded-brackets": "http://%5B::1%5D/",
    "ipv4-in-brackets": "http://[127.0.0.1]/",
    "ipv-future": "http://[v1.a]/",
    # ports
    "port-0": "https://acme.com:0/",
    "port-65536": "https://acme.com:65536/",
    "port-of-many-digits": "https://acme.com:4294967739/",
    "port-of-letters": "https://acme.com:https/",
    "port-with-a-sign": "https://acme.com:+443/",
    "port-with-a-minus": "https://acme.com:-1/",
    "port-in-full-width-digits": "https://acme.com:\uff14\uff14\uff13/",
    "port-in-arabic-digits": "https://acme.com:٤٤٣/",
    "port-twice": "https://acme.com:443:443/",
    "port-after-a-space": "https://acme.com: 443/",
    "port-in-hexadecimal": "https://acme.com:0x1bb/",
    "port-behind-ipv6-65536": "http://[::1]:65536/",
    # length
    "one-character-too-long": "https://acme.com/" + "a" * 4080,
}


@pytest.mark.parametrize("target", [pytest.param(target, id=name) for name, target in REFUSED.items()])
def test_a_target_that_browsers_mend_or_refuse_leads_nowhere(stage: Stage, target: str) -> None:
    with pytest.raises(tracker.BadTarget, match="expected"):
        tracker.read_target(target)
    for uri in (
        plain(stage, stage.acme, target),
        plain(stage, stage.globex, target),
        signed(stage, stage.acme, target),
    ):
        response = ask(stage, uri, 400)
        assert "Location" not in response.headers
        assert "expected" in response.text, "the page says what would have been right"
        assert "<a " not in response.text, "nor is there a link to it"


# Targets that are not Acme's, with the host that a browser reads and the Location that takes it there.
ELSEWHERE = {
    "acme-as-a-prefix": ("https://acme.com.evil.com/", "https://acme.com.evil.com/", "acme.com.evil.com"),
    "acme-as-a-suffix": ("https://notacme.com/", "https://notacme.com/", "notacme.com"),
    "acme-with-a-hyphen": ("https://acme.com-evil.com/", "https://acme.com-evil.com/", "acme.com-evil.com"),
    "acme-of-another-end": ("https://acme.co/", "https://acme.co/", "acme.co"),
    "above-acme": ("https://com/", "https://com/", "com"),
    "acme-in-the-path": ("https://evil.com/https://acme.com/", "https://evil.com/https://acme.com/", "evil.com"),
    "acme-behind-@-in-the-path": ("https://evil.com/@acme.com", "https://evil.com/@acme.com", "evil.com"),
    "acme-in-the-query": ("https://evil.com?acme.com", "https://evil.com?acme.com", "evil.com"),
    "acme-behind-@-in-the-query": ("https://evil.com?@acme.com/", "https://evil.com?@acme.com/", "evil.com"),
    "backslash-in-the-query": ("https://evil.com?\\@acme.com", "https://evil.com?\\@acme.com", "evil.com"),
    "acme-behind-@-in-the-fragment": ("https://evil.com#@acme.com/", "https://evil.com#@acme.com/", "evil.com"),
    "another-port": ("https://acme.com:8443/", "https://acme.com:8443/", "acme.com"),
    "the-least-port": ("https://acme.com:1/", "https://acme.com:1/", "acme.com"),
    "the-greatest-port": ("https://acme.com:65535/", "https://acme.com:65535/", "acme.com"),
    "port-with-zeros": ("https://evil.com:00080/", "https://evil.com:80/", "evil.com"),
    "single-label": ("http://intranet/", "http://intranet/", "intranet"),
    "our-host-on-another-port": (
        "https://track.example.com:8443/",
        "https://track.example.com:8443/",
        "track.example.com",
    ),
    "above-our-host": ("https://example.com/", "https://example.com/", "example.com"),
    "below-our-host": ("https://a.track.example.com/", "https://a.track.example.com/", "a.track.example.com"),
    "final-dot": ("https://evil.com./a", "https://evil.com./a", "evil.com"),
    "underscore": ("https://_a.evil.com/", "https://_a.evil.com/", "_a.evil.com"),
    "hyphens-inside": ("https://r3---sn.evil.com/", "https://r3---sn.evil.com/", "r3---sn.evil.com"),
    "digits-only-in-a-label": ("https://1.2.evil.com/", "https://1.2.evil.com/", "1.2.evil.com"),
    "cyrillic-a-for-a": ("https://\u0430cme.com/", "https://xn--cme-5cd.com/", "xn--cme-5cd.com"),
    "greek-omicron-for-o": ("https://acme.c\u03bfm/", "https://acme.xn--cm-jbc/", "acme.xn--cm-jbc"),
    "dotless-i": ("https://ac\u0131e.com/", "https://xn--ace-kua.com/", "xn--ace-kua.com"),
    "umlaut": ("https://bücher.example/", "https://xn--bcher-kva.example/", "xn--bcher-kva.example"),
    "umlaut-in-capitals": ("https://BÜCHER.example/", "https://xn--bcher-kva.example/", "xn--bcher-kva.example"),
    "umlaut-of-two-characters": (
        "https://bu\u0308cher.example/",
        "https://xn--bcher-kva.example/",
        "xn--bcher-kva.example",
    ),
    "umlaut-percent-encoded": (
        "https://b%C3%BCcher.example/",
        "https://xn--bcher-kva.example/",
        "xn--bcher-kva.example",
    ),
    "umlaut-in-punycode": ("https://XN--BCHER-KVA.example/", "https://xn--bcher-kva.example/", "xn--bcher-kva.example"),
    "sharp-s": ("https://faß.de/", "https://xn--fa-hia.de/", "xn--fa-hia.de"),
    "two-s-are-another-host": ("https://fass.de/", "https://fass.de/", "fass.de"),
    "final-sigma": ("https://βόλος.com/", "https://xn--nxasmm1c.com/", "xn--nxasmm1c.com"),
    "final-sigma-in-capitals": ("https://ΒΌΛΟΣ.com/", "https://xn--nxasmq6b.com/", "xn--nxasmq6b.com"),
    "hebrew": ("https://דוגמה.com/", "https://xn--6dbbec0c.com/", "xn--6dbbec0c.com"),
    "japanese": ("https://日本語.jp/", "https://xn--wgv71a119e.jp/", "xn--wgv71a119e.jp"),
    "full-width-letters": ("https://\uff45\uff56\uff49\uff4c.com/", "https://evil.com/", "evil.com"),
    "ligature": ("https://ﬁsh.com/", "https://fish.com/", "fish.com"),
    "long-s": ("https://\u017fale.com/", "https://sale.com/", "sale.com"),
    "roman-numeral": ("https://\u2167.com/", "https://viii.com/", "viii.com"),
    "ipv4": ("http://127.0.0.1/", "http://127.0.0.1/", "127.0.0.1"),
    "ipv4-final-dot": ("http://127.0.0.1./", "http://127.0.0.1/", "127.0.0.1"),
    "ipv4-full-width-digits": ("http://\uff11\uff12\uff17.\uff10.\uff10.\uff11/", "http://127.0.0.1/", "127.0.0.1"),
    "ipv4-ideographic-dots": ("http://127。0。0。1/", "http://127.0.0.1/", "127.0.0.1"),
    "ipv4-encoded-dots": ("http://127%2E0%2E0%2E1/", "http://127.0.0.1/", "127.0.0.1"),
    "ipv4-of-link-local": ("http://169.254.169.254/a", "http://169.254.169.254/a", "169.254.169.254"),
    "ipv6": ("http://[::1]/", "http://[::1]/", "[::1]"),
    "ipv6-in-full": ("http://[0:0:0:0:0:0:0:1]/", "http://[::1]/", "[::1]"),
    "ipv6-in-capitals-with-port": ("http://[2001:DB8::00A]:8080/", "http://[2001:db8::a]:8080/", "[2001:db8::a]"),
    "ipv6-one-zero-group": ("http://[1:0:2:3:4:5:6:7]/", "http://[1:0:2:3:4:5:6:7]/", "[1:0:2:3:4:5:6:7]"),
    "ipv6-mapped": ("http://[::ffff:127.0.0.1]/", "http://[::ffff:7f00:1]/", "[::ffff:7f00:1]"),
    "ipv6-mapped-in-hexadecimal": ("http://[::FFFF:7f00:1]/", "http://[::ffff:7f00:1]/", "[::ffff:7f00:1]"),
    "label-of-63": (f"https://{'a' * 63}.com/", f"https://{'a' * 63}.com/", f"{'a' * 63}.com"),
}


@pytest.mark.parametrize(
    "target, location, host", [pytest.param(*values, id=name) for name, values in ELSEWHERE.items()]
)
def test_a_target_elsewhere_is_named_unless_signed_or_any_domain_is_allowed(
    stage: Stage, target: str, location: str, host: str
) -> None:
    named = ask(stage, plain(stage, stage.acme, target), 200)
    assert "Location" not in named.headers
    assert f"<bdi>{host}</bdi>" in named.text
    assert links_of(named.text) == [{"href": location, "rel": "noreferrer nofollow"}]
    assert ask(stage, plain(stage, stage.globex, target), 302).headers["Location"] == location
    assert ask(stage, signed(stage, stage.acme, target), 302).headers["Location"] == location


# Targets that are Acme's, however they are spelled.
ACME = {
    "host-alone": ("https://acme.com", "https://acme.com"),
    "capitals": ("HTTPS://ACME.COM/A", "https://acme.com/A"),
    "mixed-case": ("hTTp://aCmE.CoM/", "http://acme.com/"),
    "subdomain": ("https://www.shop.acme.com/", "https://www.shop.acme.com/"),
    "final-dot": ("https://acme.com./", "https://acme.com./"),
    "default-port": ("https://acme.com:443/", "https://acme.com/"),
    "default-port-of-http": ("http://acme.com:80/", "http://acme.com/"),
    "default-port-of-the-other-scheme": ("http://acme.com:443/", "http://acme.com:443/"),
    "port-empty": ("https://acme.com:/", "https://acme.com/"),
    "port-with-zeros": ("https://acme.com:00443/", "https://acme.com/"),
    "encoded-letter": ("https://%61cme.com/", "https://acme.com/"),
    "encoded-capital": ("https://%41CME.com/", "https://acme.com/"),
    "encoded-dot": ("https://acme%2Ecom/", "https://acme.com/"),
    "full-width-letters": ("https://\uff21\uff23\uff2d\uff25.com/", "https://acme.com/"),
    "full-width-dot": ("https://acme\uff0ecom/", "https://acme.com/"),
    "ideographic-dot": ("https://acme。com/", "https://acme.com/"),
    "half-width-ideographic-dot": ("https://acme｡com/", "https://acme.com/"),
    "ideographic-dot-at-the-end": ("https://acme.com。/", "https://acme.com./"),
    "encoded-ideographic-dot": ("https://acme%E3%80%82com/", "https://acme.com/"),
    "kelvin-sign": ("https://\u212aelvin.acme.com/", "https://kelvin.acme.com/"),
    "mathematical-letters": ("https://\U0001d41a\U0001d41c\U0001d426\U0001d41e.com/", "https://acme.com/"),
    "idn-below-acme": ("https://bücher.acme.com/", "https://xn--bcher-kva.acme.com/"),
    "spaces-around": ("  https://acme.com/a  ", "https://acme.com/a"),
    "slashes-in-the-path": ("https://acme.com//evil.com", "https://acme.com//evil.com"),
    "@-in-the-path": ("https://acme.com/@evil.com", "https://acme.com/@evil.com"),
    "@-in-the-query": ("https://acme.com?@evil.com", "https://acme.com?@evil.com"),
    "@-in-the-fragment": ("https://acme.com#@evil.com", "https://acme.com#@evil.com"),
    "colon-in-the-path": ("https://acme.com/javascript:alert(1)", "https://acme.com/javascript:alert(1)"),
    "backslash-in-the-fragment": ("https://acme.com/#\\evil.com", "https://acme.com/#\\evil.com"),
    "encoded-backslash-in-the-path": ("https://acme.com/%5Cevil.com", "https://acme.com/%5Cevil.com"),
    "encoded-line-break-in-the-path": ("https://acme.com/%0d%0aX: 1", "https://acme.com/%0d%0aX:%201"),
    "dots-in-the-path": ("https://acme.com/../%2e%2e/a", "https://acme.com/../%2e%2e/a"),
    "line-separator-in-the-path": ("https://acme.com/\u2028", "https://acme.com/%E2%80%A8"),
    "next-line-in-the-path": ("https://acme.com/\x85", "https://acme.com/%C2%85"),
    "markup-in-the-path": ("https://acme.com/<b>\"'", "https://acme.com/%3Cb%3E%22'"),
    "as-long-as-may-be": ("https://acme.com/" + "a" * 4079, "https://acme.com/" + "a" * 4079),
}


@pytest.mark.parametrize("target, location", [pytest.param(*values, id=name) for name, values in ACME.items()])
def test_a_target_on_the_tenants_own_domain_is_redirected_to(stage: Stage, target: str, location: str) -> None:
    assert len(target) <= tracker.MAX_TARGET
    for uri in (
        plain(stage, stage.acme, target),
        plain(stage, stage.globex, target),
        signed(stage, stage.acme, target),
    ):
        assert ask(stage, uri, 302).headers["Location"] == location


@pytest.mark.parametrize(
    "target, host",
    [
        pytest.param("https://acme\ufe0f.com/", "acme.com", id="variation-selector"),
        pytest.param("https://acme\U000e0101.com/", "acme.com", id="variation-selector-supplement"),
        pytest.param("https://ac\u034fme.com/", "acme.com", id="grapheme-joiner"),
        pytest.param("https://ac\u180bme.com/", "acme.com", id="mongolian-selector"),
        pytest.param("https://a\u115fb.com/", None, id="hangul-filler"),
        pytest.param("https://a\u3164b.com/", None, id="hangul-filler-of-compatibility"),
        pytest.param("https://FA%E1%BA%9E.de/", None, id="capital-sharp-s-percent-encoded"),
        pytest.param("https://\u03f2.com/", "xn--4xa.com", id="lunate-sigma"),
        pytest.param("https://\U0001d6d3.com/", "xn--4xa.com", id="mathematical-final-sigma"),
        pytest.param("https://\u1fb3.com/", "xn--mxaq.com", id="iota-below"),
        pytest.param("https://a\u0345.com/", "xn--a-gmb.com", id="iota-below-as-a-mark"),
        pytest.param("https://\u13a0.com/", "xn--58d.com", id="cherokee"),
        pytest.param("https://\uab70.com/", "xn--58d.com", id="cherokee-small"),
        pytest.param("https://\u1c82.com/", "xn--n1a.com", id="cyrillic-narrow-o"),
        pytest.param("https://a\u33c2.com/", None, id="am-with-full-stops"),
        pytest.param("https://acme\ufe52com/", None, id="small-full-stop"),
    ],
)
def test_a_host_is_read_as_a_browser_reads_it_or_not_at_all(target: str, host: str | None) -> None:
    """Where a browser folds a character, drops it, or refuses it (None), another reading would name another host."""
    with contextlib.suppress(tracker.BadTarget):
        assert tracker.read_target(target).host == host


@pytest.mark.parametrize(
    "target",
    ["https://acme\ud800.com/", "https://acme.com/\ud800", "https://acme.com/?\udfff", "https://acme.com/#\udc80x"],
)
def test_half_a_character_is_refused(stage: Stage, target: str) -> None:
    with pytest.raises(tracker.BadTarget, match="expected"):
        tracker.read_target(target)
    with pytest.raises(tracker.BadTarget, match="expected"):
        tracker.click_path(SECRET, "k3v9x2mp", "e1", target)
    encoded = base64.urlsafe_b64encode(target.encode("utf-8", "surrogatepass")).decode().rstrip("=")
    signature = tracker.sign(stage.app.secrets[0], stage.acme.mail_id, encoded)
    ask(stage, f"/{stage.acme.mail_id}/click/e1/{signature}/{encoded}", 404)


def test_half_a_character_in_a_plain_link_never_reaches_the_host(stage: Stage) -> None:
    """Its bytes are no UTF-8, so they are read as replacement characters: bad in a host, harmless in a path."""
    ask(stage, plain(stage, stage.globex, "https://acme\ud800.com/"), 400)
    response = ask(stage, plain(stage, stage.globex, "https://acme.com/\ud800"), 302)
    assert response.headers["Location"] == "https://acme.com/" + "%EF%BF%BD" * 3


@pytest.mark.parametrize(
    "target",
    [
        "https://track.example.com/",
        "https://track.example.com",
        "HTTPS://TRACK.EXAMPLE.COM/x",
        "https://track.example.com./",
        "https://track.example.com:443/",
        "http://track.example.com/",
        "http://track.example.com:80/",
        "http://track.example.com:443/",
        "https://track.example.com:/",
        "https://track%2Eexample.com/",
        "https://track。example.com/",
        "https://\uff54rack.example.com/",
        "https://track.example.com?x",
        "https://track.example.com#x",
        "https://news.globex.com/",
        "http://NEWS.globex.com.:80/",
        "http://seen.example.org/",
        "https://seen.example.org./x",
    ],
)
@pytest.mark.parametrize("kind", ["plain", "signed"])
def test_no_link_leads_back_to_ourselves(stage: Stage, target: str, kind: str) -> None:
    """Our host is BASE_URL's, every tenant's tracking host, and the one that this request came to."""
    stage.change(stage.globex, tracking_host="news.globex.com")
    uri = (plain if kind == "plain" else signed)(stage, stage.acme, target)
    response = ask(stage, uri, 400, HTTP_HOST="seen.example.org")
    assert "Location" not in response.headers
    assert "leads back to this server" in response.text
    assert "<a " not in response.text


def test_a_server_on_a_port_of_its_own_may_link_to_its_neighbours(staged: Callable[..., Stage]) -> None:
    stage = staged(BASE_URL="http://localhost:3000")
    uri = plain(stage, stage.globex, "http://localhost:8000/a")
    assert ask(stage, uri, 302, HTTP_HOST="localhost:3000").headers["Location"] == "http://localhost:8000/a"
    for target in ("http://localhost:3000/", "http://LOCALHOST.:3000/x", "https://localhost:3000"):
        ask(stage, plain(stage, stage.globex, target), 400, HTTP_HOST="localhost:3000")


def test_a_link_to_our_own_ipv6_address_leads_nowhere_however_it_is_spelled(staged: Callable[..., Stage]) -> None:
    stage = staged(BASE_URL="http://[0:0:0:0:0:0:0:1]:3000")
    for target in ("http://[::1]:3000/", "http://[0:0:0:0:0:0:0:1]:3000/"):
        ask(stage, plain(stage, stage.globex, target), 400)


def test_a_tenants_links_are_not_found_on_the_tracking_host_of_another(stage: Stage) -> None:
    stage.change(stage.globex, any_domain=True, tracking_host="news.globex.com")
    for link in (plain, signed):
        ask(stage, link(stage, stage.acme, "https://acme.com/"), 404, HTTP_HOST="news.globex.com")
        ask(stage, link(stage, stage.globex, "https://acme.com/"), 302, HTTP_HOST="news.globex.com:443")


# -- Location


@pytest.mark.parametrize(
    "target, location",
    [
        pytest.param("https://a.b/x?q=1&r=%26#f?g#h", "https://a.b/x?q=1&r=%26#f?g#h", id="query-and-fragment-stay"),
        pytest.param("https://a.b?", "https://a.b?", id="empty-query-stays"),
        pytest.param("https://a.b/#", "https://a.b/#", id="empty-fragment-stays"),
        pytest.param("https://a.b/%41%2f%c3%bc", "https://a.b/%41%2f%c3%bc", id="encoded-is-not-encoded-again"),
        pytest.param("https://a.b/100%", "https://a.b/100%", id="percent-alone-stays"),
        pytest.param("https://a.b/%zz", "https://a.b/%zz", id="broken-encoding-stays"),
        pytest.param("https://a.b/ü", "https://a.b/%C3%BC", id="path-as-utf-8"),
        pytest.param("https://a.b/?ü#ü", "https://a.b/?%C3%BC#%C3%BC", id="query-and-fragment-as-utf-8"),
        pytest.param("https://a.b/😀", "https://a.b/%F0%9F%98%80", id="beyond-the-basic-plane"),
        pytest.param("https://a.b/e\u0301", "https://a.b/e%CC%81", id="accents-stay-as-they-are-composed"),
        pytest.param("https://a.b/a b?c d", "https://a.b/a%20b?c%20d", id="spaces"),
        pytest.param("https://a.b/a+b?c+d", "https://a.b/a+b?c+d", id="plus-stays"),
        pytest.param("https://a.b/!$&'()*+,;=:@-._~[]|^`{}", "https://a.b/!$&'()*+,;=:@-._~[]|^`{}", id="ascii-stays"),
        pytest.param('https://a.b/"<>', "https://a.b/%22%3C%3E", id="what-would-end-an-attribute"),
        pytest.param("https://A.B/A?B#C", "https://a.b/A?B#C", id="case-of-the-rest-stays"),
    ],
)
def test_location_is_ascii_and_changes_nothing_that_it_need_not(target: str, location: str) -> None:
    made = tracker.read_target(target)
    assert made.location == location
    assert made.location.isascii()
    assert tracker.read_target(location).location == location, "reading it again changes nothing"


# -- Destinations


@pytest.mark.parametrize(
    "text, expected",
    [
        ("acme.com", "acme.com"),
        (" ACME.com. ", "acme.com"),
        ("acme.com:8443", "acme.com:8443"),
        ("acme.com:08443", "acme.com:8443"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("BÜCHER.example:81", "xn--bcher-kva.example:81"),
        ("faß.de", "xn--fa-hia.de"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("192.0.2.1", "192.0.2.1"),
        ("[2001:DB8::1]", "[2001:db8::1]"),
        ("[::1]:3000", "[::1]:3000"),
    ],
)
def test_a_destination_is_kept_as_targets_are_read(text: str, expected: str) -> None:
    assert tracker.read_destination(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "com", "localhost", "localhost:3000", "com.", ".com", "acme..com", "*.acme.com", "*", "acme com"),
        *(
            "https://acme.com",
            "acme.com/",
            "acme.com/a",
            "acme.com?x",
            "user@acme.com",
            "acme.com:https",
            "acme.com:1:2",
        ),
        *("0x7f.1", "127.1", "1.2.3.4.5", "::1", "[::1", "acme.com\\", "acme.com\n.evil.com", "a" * 64 + ".com"),
        *("acme.com:0", "acme.com:65536", "acme.com:99999"),
    ],
)
def test_a_destination_that_is_no_domain_is_refused_with_what_was_expected(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        tracker.read_destination(text)


@pytest.mark.parametrize(
    "destination, url, expected",
    [
        ("acme.com", "https://acme.com/", True),
        ("acme.com", "http://acme.com/", True),
        ("acme.com", "https://a.b.acme.com/", True),
        ("acme.com", "https://acme.com./", True),
        ("acme.com", "https://notacme.com/", False),
        ("acme.com", "https://acme.com.evil.com/", False),
        ("acme.com", "https://acme.com-evil.com/", False),
        ("acme.com", "https://com/", False),
        ("www.acme.com", "https://acme.com/", False),
        ("www.acme.com", "https://www.acme.com/", True),
        ("acme.com", "https://acme.com:8443/", False),
        ("acme.com", "http://acme.com:8080/", False),
        ("acme.com:8443", "https://acme.com:8443/", True),
        ("acme.com:8443", "https://www.acme.com:8443/", True),
        ("acme.com:8443", "https://acme.com/", False),
        ("acme.com:8443", "https://acme.com:84/", False),
        ("acme.com:443", "https://acme.com/", True),
        ("acme.com:443", "https://www.acme.com:443/", True),
        ("acme.com:443", "http://acme.com/", False),
        ("acme.com:80", "http://acme.com/", True),
        ("bücher.example", "https://BÜCHER.example/", True),
        ("bücher.example", "https://shop.xn--bcher-kva.example/", True),
        ("bücher.example", "https://bucher.example/", False),
        ("faß.de", "https://fass.de/", False),
        ("192.0.2.1", "http://192.0.2.1/", True),
        ("192.0.2.1", "http://1.192.0.2.1.evil.com/", False),
        ("[2001:db8::1]", "http://[2001:DB8:0::1]/", True),
        ("[2001:db8::1]", "http://[2001:db8::2]/", False),
    ],
)
def test_a_domain_covers_itself_and_what_is_below_it_on_its_port(destination: str, url: str, expected: bool) -> None:
    assert tracker.covers([tracker.read_destination(destination)], tracker.read_target(url)) is expected


def test_no_destinations_cover_nothing() -> None:
    assert not tracker.covers([], tracker.read_target("https://acme.com/"))


@pytest.mark.parametrize(
    "allowed, target, status",
    [
        ("acme.com", "https://www.acme.com/", 302),
        ("acme.com", "https://notacme.com/", 200),
        ("acme.com", "https://acme.com.evil.com/", 200),
        ("acme.com", "https://acme.com:8443/", 200),
        ("shop.example:8443", "https://shop.example:8443/", 302),
        ("shop.example:8443", "https://shop.example/", 200),
        ("shop.example:443", "https://shop.example/", 302),
        ("xn--bcher-kva.example", "https://BÜCHER.example/", 302),
    ],
)
def test_a_plain_link_leads_where_the_tenants_domains_allow(
    stage: Stage, allowed: str, target: str, status: int
) -> None:
    stage.change(stage.acme, allow=[allowed])
    ask(stage, plain(stage, stage.acme, target), status)


def test_a_tenant_without_domains_redirects_signed_links_only(stage: Stage) -> None:
    stage.change(stage.globex, any_domain=False)
    ask(stage, plain(stage, stage.globex, "https://acme.com/"), 200)
    ask(stage, signed(stage, stage.globex, "https://acme.com/"), 302)


# -- The naming page


def links_of(page: str) -> list[dict[str, str | None]]:
    """The attributes of every link on a page, as a browser reads them."""
    found: list[dict[str, str | None]] = []

    class Links(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag == "a":
                found.append(dict(attrs))

    Links().feed(page)
    return found


def stats(stage: Stage, tenant: tracker.Tenant) -> Any:
    """stats.json, which drains first."""
    stage.app.spool.close()
    return stage.web.get(f"/{tenant.id}/stats.json").json


def test_the_naming_page_names_the_host_and_has_one_bare_link_to_it(stage: Stage) -> None:
    response = ask(stage, plain(stage, stage.acme, "https://evil.com/a?b=1&c='<x>\"#d"), 200)
    assert "Location" not in response.headers
    assert "Refresh" not in response.headers
    assert "http-equiv" not in response.text.lower()
    assert "<script" not in response.text.lower()
    assert "<bdi>evil.com</bdi>" in response.text
    # The link is the destination itself, so what the reader does next is not counted, and no link of ours is shown.
    assert links_of(response.text) == [{"href": "https://evil.com/a?b=1&c='%3Cx%3E%22#d", "rel": "noreferrer nofollow"}]
    assert "b=1&amp;c=" in response.text
    assert "<x>" not in response.text


def test_the_naming_page_may_be_kept_indexed_and_framed_by_nobody(stage: Stage) -> None:
    headers = ask(stage, plain(stage, stage.acme, "https://evil.com/"), 200).headers
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Robots-Tag"] == "noindex"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]


def test_the_naming_page_shows_a_look_alike_in_ascii(stage: Stage) -> None:
    text = ask(stage, plain(stage, stage.acme, "https://\u0430cme.com/"), 200).text
    assert "<bdi>xn--cme-5cd.com</bdi>" in text
    assert "\u0430cme.com" not in text


def test_a_click_that_met_the_naming_page_is_set_aside_and_counts_in_no_rate(stage: Stage) -> None:
    with stage.database.transaction() as connection:
        registration = tracker.Registration("e1", recipient="ann@acme.com", campaign="spring")
        tracker.register_emails(connection, stage.acme.number, [registration], tracker.now_ms())
    for path in ("/a", "/b"):
        ask(stage, plain(stage, stage.acme, f"https://evil.com{path}"), 200)
    numbers = stats(stage, stage.acme)
    assert numbers["naming_page"] == [{"host": "evil.com", "reason": "destination-not-allowed", "clicks": 2}]
    assert numbers["sent"]["emails"] == 1
    assert not any(numbers["sent"]["clicked"].values())
    assert numbers["sent"]["click_rate"] == [0.0, 0.0]
    assert numbers["activity"]["clicks"]["hits"] == {"person": 0, "unconfirmed": 0, "machine": 0, "set_aside": 2}
    assert stage.rows("select key, event_type, reason, url from event_details order by url") == [
        ("e1", "click", "destination-not-allowed", "https://evil.com/a"),
        ("e1", "click", "destination-not-allowed", "https://evil.com/b"),
    ]
    assert stage.check() == []


def test_a_click_that_was_redirected_does_count(stage: Stage) -> None:
    """The counterpart, so that the test above does not pass because nothing counts."""
    with stage.database.transaction() as connection:
        tracker.register_emails(connection, stage.acme.number, [tracker.Registration("e1")], tracker.now_ms())
    stage.web.get(
        plain(stage, stage.acme, "https://acme.com/"),
        headers={"User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:145.0) Gecko/20100101 Firefox/145.0"},
        status=302,
    )
    numbers = stats(stage, stage.acme)
    assert numbers["sent"]["clicked"] == {"person": 1, "unconfirmed": 0, "machine": 0}
    assert numbers["sent"]["click_rate"] == [1.0, 1.0]
    assert numbers["naming_page"] == []


@pytest.mark.parametrize("link", [plain, signed])
@pytest.mark.parametrize(
    "target",
    [
        "https://acme.com/",
        "https://www.acme.com/",
        "https://ACME.com./",
        "https://acme%2Ecom/",
        pytest.param("https://acme.com:8443/", id="on-another-port"),
    ],
)
def test_a_blocked_host_is_named_and_never_redirected_to(stage: Stage, link: Callable[..., str], target: str) -> None:
    stage.change(stage.globex, block=["acme.com"])
    response = ask(stage, link(stage, stage.globex, target), 200)
    assert "Location" not in response.headers
    ask(stage, link(stage, stage.globex, "https://other.example/"), 302)
    assert [(each["reason"], each["clicks"]) for each in stats(stage, stage.globex)["naming_page"]] == [
        ("destination-blocked", 1)
    ]


def test_blocking_is_stronger_than_allowing(stage: Stage) -> None:
    stage.change(stage.acme, allow=["acme.com"], block=["old.acme.com"])
    ask(stage, plain(stage, stage.acme, "https://old.acme.com/"), 200)
    ask(stage, plain(stage, stage.acme, "https://new.acme.com/"), 302)


@pytest.mark.parametrize("blocked", ["acme.com:443", "acme.com:8443"])
def test_a_host_blocked_on_one_port_is_named_on_that_port_only(stage: Stage, blocked: str) -> None:
    stage.change(stage.globex, block=[blocked])
    ask(stage, signed(stage, stage.globex, f"https://{blocked}/"), 200)
    ask(stage, signed(stage, stage.globex, "https://acme.com:9000/"), 302)


@pytest.mark.parametrize("link", [plain, signed])
def test_a_suspended_tenants_links_are_named_until_it_is_restored(stage: Stage, link: Callable[..., str]) -> None:
    uri = link(stage, stage.acme, "https://acme.com/")
    stage.change(stage.acme, suspended=True)
    assert "<bdi>acme.com</bdi>" in ask(stage, uri, 200).text
    ask(stage, link(stage, stage.globex, "https://acme.com/"), 302)
    stage.change(stage.acme, suspended=False)
    ask(stage, uri, 302)
    assert [(each["reason"], each["clicks"]) for each in stats(stage, stage.acme)["naming_page"]] == [("suspended", 1)]


@pytest.mark.parametrize("link", [plain, signed])
def test_a_removed_tenants_links_are_named_since_nobody_vouches_for_them(
    stage: Stage, link: Callable[..., str]
) -> None:
    uri = link(stage, stage.globex, "https://acme.com/")
    remove(stage, stage.globex)
    response = ask(stage, uri, 200)
    assert "<bdi>acme.com</bdi>" in response.text
    assert "Location" not in response.headers
    stage.drain()
    assert stage.rows("select count(*) from events") == [(0,)]


def test_a_removed_tenants_link_still_refuses_what_every_link_refuses(stage: Stage) -> None:
    remove(stage, stage.globex)
    ask(stage, plain(stage, stage.globex, "javascript:alert(1)"), 400)
    ask(stage, plain(stage, stage.globex, "https://track.example.com/"), 400)


@pytest.mark.parametrize("mail_id", ["nobody99", "%00%00%00", "a%2Fb", "..", "dashboard"])
def test_a_plain_link_of_an_unknown_tenant_is_not_found(stage: Stage, mail_id: str) -> None:
    response = ask(stage, f"/{mail_id}/click/e1?url=https://acme.com/", 404)
    assert "acme.com" not in response.text


def test_a_dashboard_id_in_a_plain_link_is_not_found_and_not_counted(stage: Stage) -> None:
    ask(stage, f"/{stage.acme.id}/click/e1?url=https://acme.com/", 404)
    stage.drain()
    assert stage.rows("select count(*) from events") == [(0,)]


def test_a_plain_link_of_a_bad_key_is_not_found(stage: Stage) -> None:
    for key in ("..", "%2E", "a%0Ab", "a%2Fb", "a%20b", "%C3%BC", "a" * 201):
        ask(stage, f"/{stage.acme.mail_id}/click/{key}?url=https://acme.com/", 404)


def test_while_nobody_can_say_who_is_a_tenant_plain_links_are_named_and_signed_ones_redirect(
    stage: Stage,
) -> None:
    (stage.folder / "tenants.json").unlink()
    ask(stage, plain(stage, stage.acme, "https://acme.com/"), 200)
    ask(stage, signed(stage, stage.acme, "https://acme.com/"), 302)


# -- Ids and keys


def test_a_dashboard_id_is_128_random_bits_that_no_command_line_takes_for_an_option() -> None:
    made = [tracker.new_dashboard_id() for _ in range(3000)]
    assert len(set(made)) == 3000
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{21}", each) for each in made)
    assert not any(tracker.id_fault(each) for each in made)


def test_a_mail_id_is_short_and_has_no_characters_that_are_read_for_each_other() -> None:
    made = [tracker.new_mail_id() for _ in range(3000)]
    assert len(set(made)) > 2990
    assert set("".join(made)) == set("abcdefghjkmnpqrstuvwxyz23456789")
    assert {len(each) for each in made} == {8}


def test_a_made_key_is_a_key() -> None:
    made = [tracker.new_key() for _ in range(3000)]
    assert len(set(made)) == 3000
    assert all(tracker.is_key(each) and len(each) == 22 for each in made)


@pytest.mark.parametrize("text", ["abc", "abc123", "A-b_C9", "_ab", "0-0", "a" * 64, "dashboards", "click1"])
def test_these_can_be_the_id_of_a_tenant(text: str) -> None:
    assert tracker.id_fault(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ab",
        "a" * 65,
        "-ab",
        "--help",
        "a.b",
        "a b",
        "a/b",
        "abc\n",
        "ab\0",
        "äbc",
        "\uff41\uff42\uff43",
        "a%62c",
        "a~b",
        "a@b.c",
    ],
)
def test_these_can_not_be_the_id_of_a_tenant(text: str) -> None:
    assert "expected" in (tracker.id_fault(text) or "")


def test_no_word_of_the_routes_can_be_an_id_in_any_case() -> None:
    words = {part.split(".")[0] for route in tracker.ROUTES for part in route.pattern.split("/")} - {""}
    for word in sorted(word for word in words if not word.startswith("{")):
        assert tracker.id_fault(word), word
        assert tracker.id_fault(word.upper()), word


@pytest.mark.parametrize("text", ["e", "1", "...", ".a", "a.gif", "Ab.9_~+x@y=z:w-", "a" * 200, "-", "a@b.example"])
def test_these_can_be_the_key_of_an_email(text: str) -> None:
    assert tracker.is_key(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "a" * 201,
        "a b",
        "a/b",
        "a\\b",
        "a\n",
        "\n",
        "a\0",
        "a?b",
        "a#b",
        "a%b",
        "ü",
        "a&b",
        "<b>",
        "{{id}}",
    ],
)
def test_these_can_not_be_the_key_of_an_email(text: str) -> None:
    assert not tracker.is_key(text)


@pytest.mark.parametrize("key", ["e", "...", ".a", "a.gif", "Ab.9_~+x@y=z:w-", "a" * 200, "-"])
def test_whatever_can_be_a_key_comes_back_out_of_its_links(stage: Stage, key: str) -> None:
    secret, mail_id = stage.app.secrets[0], stage.acme.mail_id
    pixel = tracker.recognise(*tracker.split_target(tracker.pixel_path(mail_id, key)))
    click = tracker.recognise(*tracker.split_target(tracker.click_path(secret, mail_id, key, "https://acme.com/")))
    assert pixel == (True, mail_id, key, None)
    assert click == (False, mail_id, key, "https://acme.com/")


def test_a_link_with_a_made_key_needs_no_escaping_in_html_or_quoted_printable() -> None:
    path = tracker.click_path(SECRET, "k3v9x2mp", tracker.new_key(), "https://acme.com/?a=1&b='\"<ü>")
    assert re.fullmatch(r"[A-Za-z0-9_/-]+", path)
