"""Writing over HTTP: registering emails, saying more of them, removing one, making a tenant; what is refused, and how."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest
import webtest
from asking import bearer, call
from conftest import BASE, CHROME, NOW, OPERATOR_KEY, Stage, click, hit, segment

import tracker

BOTH_ENGINES = True

SENT = "2026-11-24T18:21:24.430Z"  # one second before NOW
SIX = [f"https://acme.com/{n}" for n in range(6)]


def post(stage: Stage, value: Any, status: int = 201, tenant: tracker.Tenant | None = None, **more: Any) -> Any:
    """Register; returns the JSON of the answer."""
    path = f"/{(tenant or stage.acme).id}/emails"
    return stage.web.post_json(path, value, status=status, **more).json


def patch(stage: Stage, key: str, value: Any, status: int = 200) -> Any:
    """Say more of an email."""
    return stage.web.patch_json(f"/{stage.acme.id}/emails/{key}", value, status=status).json


def post_tenant(stage: Stage, value: Any, status: int = 201) -> Any:
    """Make a tenant, as the operator."""
    return stage.web.post_json("/tenants", value, headers=bearer(OPERATOR_KEY), status=status).json


def refused(stage: Stage, value: Any, status: int = 400, ask: Callable[..., Any] = post) -> str:
    """What is said of a request that is refused and leaves no trace."""
    before = stage.rows("select * from emails"), stage.rows("select * from tenants")
    answer = ask(stage, value, status)
    assert list(answer) == ["error"]
    assert (stage.rows("select * from emails"), stage.rows("select * from tenants")) == before
    return str(answer["error"])


def emails(stage: Stage, tenant: tracker.Tenant | None = None) -> list[tuple[Any, ...]]:
    sql = "select key, subject, recipient, campaign, registered from emails where tenant = ? order by id"
    return stage.rows(sql, (tenant or stage.acme).number)


def follow(stage: Stage, url: str, base: str = BASE, **more: Any) -> Any:
    """Ask for a URL that the server gave out, as a person's browser would."""
    assert url.startswith(base + "/")
    extra = {"HTTP_HOST": base.partition("//")[2]}
    return stage.web.get(url[len(base) :], headers={"User-Agent": CHROME}, extra_environ=extra, **more)


@pytest.fixture
def operated(staged: Callable[..., Stage]) -> Stage:
    """A stage with an operator's key."""
    return staged(API_KEY=OPERATOR_KEY)


# -- Registering emails


def test_one_email_is_registered_by_an_object(stage: Stage) -> None:
    before = tracker.now_ms()
    answer = post(stage, {"key": "e1", "subject": "Héllo", "recipient": "a@example.org", "campaign": "spring"})
    signature = tracker.sign(stage.app.secrets[0], stage.acme.mail_id, "e1", tracker.PREFERENCES)
    assert answer == {
        "key": "e1",
        "pixel_url": f"{BASE}/{stage.acme.mail_id}/pixel/e1.gif",
        "links": [],
        "preferences": f"{BASE}/{stage.acme.mail_id}/preferences/e1/{signature}",
    }
    assert emails(stage) == [("e1", "Héllo", "a@example.org", "spring", 1)]
    sent_now = "select sent_at = created_at, sent_at between ? and ? from emails"
    assert stage.rows(sent_now, before, tracker.now_ms()) == [(1, 1)]
    assert stage.check() == []


def test_all_fields_may_be_left_out_and_a_key_is_made(stage: Stage) -> None:
    keys = {post(stage, {})["key"] for _ in range(10)} | {each["key"] for each in post(stage, [{}] * 10)}
    assert len(keys) == 20
    # 128 bits in base64url: nobody guesses the key of another's email.
    assert all(re.fullmatch("[A-Za-z0-9_-]{22}", key) for key in keys)
    assert {row[0] for row in emails(stage)} == keys


def test_the_pixel_and_the_links_that_are_returned_work_and_count(stage: Stage) -> None:
    targets = ["https://elsewhere.example/a?b=1&c=%20#d", "http://bücher.example/ü", "HTTPS://ACME.com"]
    answer = post(stage, {"subject": "Hello", "links": targets})
    assert [link["url"] for link in answer["links"]] == targets
    assert follow(stage, answer["pixel_url"]).headers["X-Tracker"] == "recorded"
    # Signed, so they lead anywhere, whatever hosts the tenant allows to plain links.
    assert [follow(stage, link["click_url"], status=302).location for link in answer["links"]] == [
        "https://elsewhere.example/a?b=1&c=%20#d",
        "http://xn--bcher-kva.example/%C3%BC",
        "https://acme.com",
    ]
    stage.spread(20)
    stage.drain()
    (row,) = stage.web.get(f"/{stage.acme.id}/emails.json").json["rows"]
    assert (row["key"], row["subject"], row["opens_person"], row["clicks_person"]) == (answer["key"], "Hello", 1, 3)
    assert {row[0] for row in stage.rows("select url from event_details where url is not null")} == set(targets)
    assert stage.check() == []


def test_every_key_that_is_allowed_gives_urls_that_work(stage: Stage) -> None:
    keys = ("a", "-_.~+@=:", "...", "=1+1", "reader@example.org", "9" * 200, "~")
    for answer in post(stage, [{"key": key, "links": ["https://elsewhere.example/"]} for key in keys]):
        assert follow(stage, answer["pixel_url"]).headers["X-Tracker"] == "recorded"
        follow(stage, answer["links"][0]["click_url"], status=302)
    stage.drain()
    counts = stage.rows("select key, open_person, click_person from email_counts join emails on id = email")
    assert sorted(counts) == sorted((key, 1, 1) for key in keys)


def test_a_thousand_emails_are_registered_by_one_array_and_answered_in_order(stage: Stage) -> None:
    answers = post(stage, [{"key": f"e{n}", "links": ["https://acme.com/"]} for n in range(1000)])
    assert [answer["key"] for answer in answers] == [f"e{n}" for n in range(1000)]
    assert len({answer["links"][0]["click_url"] for answer in answers}) == 1000
    assert [row[0] for row in emails(stage)] == [f"e{n}" for n in range(1000)]
    assert stage.check() == []
    assert refused(stage, [{}] * 1001) == "expected at most 1000 emails, got 1001"
    assert post(stage, [], 200) == []


def test_an_array_is_registered_whole_or_not_at_all(stage: Stage) -> None:
    post(stage, {"key": "e0", "subject": "before"})
    told = refused(stage, [{"key": "e0", "subject": "after"}, {"key": "e1"}, {"key": "no spaces"}, {"key": "e3"}])
    assert told.startswith("[2].key: ")
    assert emails(stage) == [("e0", "before", "", "", 1)]


def test_registering_again_updates_what_is_said_and_makes_no_second(stage: Stage) -> None:
    first = {"key": "e1", "subject": "one", "recipient": "a@example.org", "campaign": "spring"}
    made = post(stage, first, 201)
    assert post(stage, first, 200) == made  # a client that lost the answer may ask again
    # In one array as well, the last word counts; what is not said again stays.
    again = [{"key": "e1", "subject": "x"}, {"key": "e1", "subject": "", "campaign": "autumn"}]
    assert post(stage, again, 200)[0] == made
    assert emails(stage) == [("e1", "", "a@example.org", "autumn", 1)]
    assert stage.check() == []


def test_an_email_that_was_opened_before_it_was_registered_is_registered_then(stage: Stage) -> None:
    stage.pixel("e1")
    stage.drain()
    assert emails(stage) == [("e1", "", "", "", 0)]
    post(stage, {"key": "e1", "subject": "late"}, 201)  # new to the sender, so Created
    assert emails(stage) == [("e1", "late", "", "", 1)]


def test_text_of_every_language_and_the_longest_values_are_kept_as_they_are(stage: Stage) -> None:
    text = "Ünïcode 日本語 🎉 \u202eRTL\u202c <b>&amp;</b> 'quotes' \"double\" $name %s"
    post(stage, {"key": "e1", "subject": text, "recipient": text, "campaign": text})
    assert emails(stage) == [("e1", text, text, text, 1)]
    (row,) = stage.web.get(f"/{stage.acme.id}/emails.json").json["rows"]
    assert row["subject"] == text
    value = {name: "é" * most for name, most in tracker.FIELD_LIMITS.items() if name != "key"}
    link = "https://a.example/" + "x" * (tracker.MAX_TARGET - 18)
    answer = post(stage, {**value, "key": "k" * 200, "links": [link] * 1000})
    assert emails(stage)[1:] == [("k" * 200, "é" * 998, "é" * 320, "é" * 200, 1)]
    assert follow(stage, answer["links"][0]["click_url"], status=302).location == link
    stage.drain()
    assert stage.rows("select url from event_details") == [(link,)]


def test_one_request_can_ask_for_so_many_links_and_no_more(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "MAX_LINKS", 3)
    value = [{"key": f"k{n}", "links": ["https://acme.com/", "https://acme.com/2"]} for n in range(2)]
    assert refused(stage, value) == "[1].links: expected at most 3 in one request"


def test_a_writer_that_waits_too_long_is_told_to_come_back(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that waited for ever would answer no pixel meanwhile, and be killed."""
    monkeypatch.setattr(stage.database, "_patience", 0.05)
    with contextlib.closing(tracker.open_database(stage.settings)) as others, others.transaction():
        answer = stage.web.post_json(f"/{stage.acme.id}/emails", {"key": "k1"}, status=503)
    assert answer.headers["Retry-After"]
    post(stage, {"key": "k1"}, 201)


# -- What is refused: fields by their names and places, what is no JSON, what is no body

TIMES = ["yesterday", "2026-11-24", "2026-11-24T12:00:00", "2026-02-30T12:00:00Z", "1969-01-01T00:00:00Z",
         "9999-12-31T23:59:59Z", "1795544485", 1795544485, True, None, ["2026-11-24T12:00:00Z"],
         "2026-11-24T12:00:00Z" + " " * 30, "\x00"]  # fmt: skip
SAID: list[tuple[str, str, list[Any]]] = [  # field, what is told, values
    ("subject", ": expected text", [None, ["x"], "a\ud800b"]),
    ("subject", ": expected at most 998 characters, got 999", ["x" * 999]),
    ("subject", ": expected text without control characters", ["a\nb", "a\tb"]),
    ("recipient", ": expected text", [True, "a\0b"]),
    ("recipient", ": expected at most 320 characters, got 321", ["x" * 321]),
    ("campaign", ": expected text", [{}, "a\x7fb"]),
    ("campaign", ": expected at most 200 characters, got 201", ["x" * 201]),
    ("campaign", ": expected another name than . and ..", [".", "..", " . ", ".. "]),
    ("sent_at", ": expected ", TIMES),
    ("delivered_at", ": expected ", TIMES),
    ("Subject", ": unknown field; expected some of ", ["x"]),
    ("mail_id", ": unknown field; expected some of ", ["x"]),  # another table's
]
OF_EMAILS: list[tuple[str, str, list[Any]]] = [
    *SAID,
    ("key", ": expected 1 to 200", ["", "a b", "a/b", "a%b", "a?b", "é", ".", ".."]),
    ("key", ": expected at most 200 characters, got 201", ["k" * 201]),
    ("key", ": expected text", [None, 5, "k\n"]),
    ("html", ": expected text", [None, 5]),
    ("hidden_link", ": expected true or false", [None, "yes", 1]),
    ("links", ": expected a list of texts", ["https://acme.com/", [5], [None]]),
    ("links", ": expected at most 1000, got 1001", [["https://a.example/"] * 1001]),
    ("links", "[1]: ", [["https://a.example/", ""], ["https://a.example/", "/b"]]),
    ("links", "[0]: its scheme is ", [["ftp://a.example/"], ["javascript:alert(1)"]]),
    ("links", "[0]: it holds credentials", [["https://a@b.example/"]]),
    ("links", "[0]: it holds a control character", [["https://a.example/\r\nX: 1"]]),
    ("links", "[0]: ", [["https:\\\\a.example"], ["https://a.example/\ud800"], ["https://\ud800/"]]),
    ("links", "[0]: it has 4,114 characters", [["https://a.example/" + "x" * 4096]]),
    ("links", "[0]: it leads back to this server", [["https://track.example.com/x"]]),
]
HOSTS = ["com", "localhost", "*.acme.com", "https://acme.com", "acme.com/x", "a b.com", "acme..com", "acme.com:x"]
OF_TENANTS: list[tuple[str, str, list[Any]]] = [
    ("name", ": ", ["", "  "]),
    ("name", ": expected text", [None, "a\nb", "\ud800"]),
    ("name", ": expected at most 200", ["x" * 201]),
    ("domain", ": unknown field; expected some of name, domains, blocked", ["acme.com"]),
    ("mail_id", ": unknown field", ["abc"]),
    ("id", ": expected text", [5, "abc\n"]),
    ("id", ": expected", ["ab", "a" * 65, "a b", "a/b", "a.b", "é" * 3, "-abc", "%61bc", "abc?", "a:b"]),
    ("domains", ": expected a list of texts", ["acme.com", [1]]),
    ("domains", ": expected at most 1000", [["a.example"] * 1001]),
    ("any_domain", ": expected true or false", [1, "true"]),
    ("open_writing", ": expected true or false", [1, "true"]),
    ("tracking_host", ": expected text", [["a.example"]]),
    # A tenant has hosts in two fields: without the name, whoever reads the error can't tell which is meant.
    ("domains", ": ", [["acme.com", host] for host in (*HOSTS, "", "\ud800.com")]),
    ("tracking_host", "", [*HOSTS, "192.0.2.1", "[2001:db8::1]", "mail.acme.com:8443", "track.example.com"]),
]


@pytest.mark.parametrize(("name", "told", "values"), OF_EMAILS)
def test_a_bad_field_is_refused_by_its_name_and_place(still: Stage, name: str, told: str, values: list[Any]) -> None:
    for value in values:
        assert refused(still, {name: value}).startswith(f"{name}{told}")
        assert refused(still, [{"key": "good"}, {name: value}]).startswith(f"[1].{name}{told}")


NOT_LATER: list[tuple[str, str, list[Any]]] = [("key", ": unknown", ["other"]), ("links", ": unknown", [SIX])]


@pytest.mark.parametrize(("name", "told", "values"), [*SAID, *NOT_LATER])
def test_what_can_not_be_said_later_is_refused(still: Stage, name: str, told: str, values: list[Any]) -> None:
    post(still, {"key": "known", "subject": "Sale"}, None)  # type: ignore[arg-type]
    for value in values:
        said = {"recipient": "not@this.example", name: value}  # what else is said with it is not done either
        assert refused(still, said, ask=lambda *asked: patch(still, "known", *asked[1:])).startswith(f"{name}{told}")


@pytest.mark.parametrize(("name", "told", "values"), OF_TENANTS)
def test_a_bad_option_of_a_tenant_is_refused_by_its_name(still: Stage, name: str, told: str, values: list[Any]) -> None:
    for value in values:
        error = refused(still, {"name": "x", name: value}, ask=post_tenant)
        assert error.startswith(f"{name}{told}") and "expected" in error


def test_what_is_no_object_is_refused(still: Stage) -> None:
    values: list[Any] = [None, True, 5, 1.5, "text", "", [[]], [None], ["text"], [{"key": "good"}, 5]]
    for value in values:
        told = refused(still, value)
        assert "expected an object" in told
        assert ("[" in told) == isinstance(value, list)
        assert "expected an object" in refused(still, [value], ask=post_tenant)


BODIES = [b"", b"{", b"{}{}", b"{'key': 'e1'}", b'{"key": "e1",}', b"NaN", b'[{"key": NaN}]', b'{"subject": Infinity}',
          b'{"subject": "\xff"}', b'\xff\xfe{\x00}\x00', b'{"subject": "a\nb"}', b"[" * 100_000, b'{"a":' * 100_000,
          b"9" * 10_000, b"key=e1&subject=x", b"\0"]  # fmt: skip


def test_what_is_no_json_is_refused(still: Stage) -> None:
    before = emails(still)
    for body in BODIES:
        answer = still.web.post(f"/{still.acme.id}/emails", body, status=400)
        assert answer.json["error"].startswith("expected JSON in UTF-8"), body[:20]
    assert emails(still) == before


def test_json_may_begin_with_a_byte_order_mark(operated: Stage) -> None:
    home, mark = f"/{operated.acme.id}", b"\xef\xbb\xbf"
    for method, path, body, status in (
        ("POST", f"{home}/emails", b'{"key": "e1"}', 201),
        ("POST", f"{home}/emails", b'[{"key": "e2"}]', 201),
        ("PATCH", f"{home}/emails/e1", b'{"subject": "x"}', 200),
        ("POST", f"{home}/campaigns", b'{"campaign": "c", "sent": 1}', 201),
        ("POST", "/tenants", b'{"name": "x"}', 201),
    ):
        headers = bearer(OPERATOR_KEY)
        operated.web.request(path, method=method, body=mark + body, headers=headers, status=status)
        operated.web.request(path, method=method, body=mark + mark + body, headers=headers, status=400)
    assert [row[:2] for row in emails(operated)] == [("e1", "x"), ("e2", "")]


def test_json_that_breaks_off_is_refused_with_the_place_and_its_content_type_does_not_matter(stage: Stage) -> None:
    answer = stage.web.post(f"/{stage.acme.id}/emails", b'{"subject": "Sale"\n "key": "e1"}', status=400)
    assert "line 2 column 2" in answer.json["error"]
    for content_type in ("application/json", "text/plain", "application/x-www-form-urlencoded"):
        stage.web.post(f"/{stage.acme.id}/emails", b'{"key": "e1"}', content_type=content_type)
    assert [row[0] for row in emails(stage)] == ["e1"]


def test_a_body_over_10_megabytes_is_too_large(stage: Stage) -> None:
    most = 10 << 20
    body = json.dumps({"key": "e1"}).encode()
    stage.web.post(f"/{stage.acme.id}/emails", body + b" " * (most - len(body)), status=201)
    answer = stage.web.post(f"/{stage.acme.id}/emails", b" " * (most + 1), status=413)
    assert answer.json == {"error": "expected a body of at most 10 MB"}
    # So it is when only the header says so: what is announced is not waited for.
    stage.web.post(f"/{stage.acme.id}/emails", b"{}", headers={"Content-Length": str(most + 1)}, status=413)


def test_a_content_length_that_is_no_number_or_not_the_bodys_is_refused(still: Stage) -> None:
    # Where it is more than what came, the client died on the way: what came is not what it meant, though it can be read.
    before = emails(still)
    for length in ("-1", "+2", "1e1", "0x2", "2.0", "two", "2, 2", " 2", "²", "9" * 5000, "100"):
        request = webtest.TestRequest.blank(f"/{still.acme.id}/emails", method="POST", body=b'{"key": "e1"}')
        request.environ["CONTENT_LENGTH"] = length
        assert request.get_response(tracker.wsgi(still.app)).status_int == 400, length
    assert emails(still) == before


# -- The public address


def test_without_a_public_address_links_are_refused_unless_they_may_be_local(staged: Callable[..., Stage]) -> None:
    stage = staged(BASE_URL="", PORT="3456", API_KEY=OPERATOR_KEY)
    told = refused(stage, {"key": "e1"}, 409)
    for word in ("public address", "BASE_URL", "tracking host", "--local"):
        assert word in told
    assert "BASE_URL" in refused(stage, {"name": "x"}, 409, post_tenant)
    made = post_tenant(stage, {"name": "x", "tracking_host": "mail.acme.com"})
    assert made["pixel_url"] == f"https://mail.acme.com/{made['mail_id']}/pixel/test.gif"
    assert made["dashboard_url"] == f"https://mail.acme.com/{made['id']}/dashboard"
    app = tracker.App(dataclasses.replace(stage.settings, local=True))
    answer = webtest.TestApp(tracker.wsgi(app)).post_json(f"/{stage.acme.id}/emails", {"key": "e1"}, status=201).json
    assert answer["pixel_url"] == f"http://localhost:3456/{stage.acme.mail_id}/pixel/e1.gif"
    app.close()


@pytest.mark.parametrize(
    ("base_url", "begins"), [(BASE, "https://"), ("http://track.example.com:8080", "http://"), ("", "https://")]
)
def test_a_tracking_host_stands_in_every_link(staged: Callable[..., Stage], base_url: str, begins: str) -> None:
    stage = staged(BASE_URL=base_url)
    stage.change(stage.acme, tracking_host="mail.acme.com")
    answer = post(stage, {"links": ["https://elsewhere.example/", "https://acme.com/"]})
    base = f"{begins}mail.acme.com"
    assert follow(stage, answer["pixel_url"], base).headers["X-Tracker"] == "recorded"
    for link in answer["links"]:
        assert follow(stage, link["click_url"], base, status=302).location == link["url"]
    stage.drain()
    assert stage.rows("select url is null, count(*) from event_details group by 1") == [(0, 2), (1, 1)]
    for url in ("https://mail.acme.com/", "http://MAIL.acme.com./x"):
        assert refused(stage, {"links": [url]}) == "links[0]: it leads back to this server"


# -- What a sender knows of an email, at once or later: times, links, and whether it wants a hidden link


def links_of(stage: Stage) -> list[int | None]:
    return [row[0] for row in stage.rows("select links from emails order by id")]


def test_how_many_links_an_email_has_is_known_from_what_is_registered(stage: Stage) -> None:
    page = "".join(f'<a href="{url}">x</a>' for url in SIX[:4])
    post(stage, [{"key": "e1", "links": [*SIX[:2], SIX[0]]}, {"key": "e2", "html": page}, {"key": "e3"}])
    post(stage, {"key": "e4", "links": SIX[3:], "html": page})
    assert links_of(stage) == [2, 4, None, 6]
    post(stage, {"key": "e4"}, 200)
    assert links_of(stage)[3] == 6, "not said again, it stays"


def test_html_gets_a_hidden_link_where_its_sender_wants_one(stage: Stage) -> None:
    page = '<body><a href="https://acme.com/">x</a></body>'
    answer = post(stage, {"key": "e1", "html": page, "hidden_link": True})
    hidden = re.findall(r'<a href="([^"]+)" aria-hidden="true"[^>]*></a>', answer["html"])
    assert answer["report"]["hidden_link"].startswith("placed ")
    assert (len(hidden), links_of(stage)) == (1, [1])
    assert follow(stage, hidden[0]).text.strip() == "<!doctype html><title></title>"
    stage.drain()
    assert found(stage) == {"hidden-link"}
    for said in ({}, {"hidden_link": False}):
        assert "aria-hidden" not in post(stage, {"html": page, **said})["html"]


def clicked(stage: Stage, *urls: str, gap: int = 0) -> None:
    """Clicks that were made, and drained, before their email was registered, or before all was known of it."""
    segment(stage, *(click(stage, "e1", url, NOW + n * gap) for n, url in enumerate(urls)))
    stage.drain()


def found(stage: Stage) -> set[str]:
    assert stage.check() == []
    return {row[0] for row in stage.rows("select reason from event_details")}


@pytest.mark.parametrize("first", [{}, {"key": "e1"}, {"key": "e1", "sent_at": "2026-11-20T00:00:00Z"}])
@pytest.mark.parametrize("field", ["sent_at", "delivered_at"])
def test_hits_are_judged_anew_when_times_are_said_later(stage: Stage, field: str, first: dict[str, str]) -> None:
    if first:
        post(stage, first)
    clicked(stage, "https://acme.com/")
    assert found(stage) == {"browser"}
    post(stage, {"key": "e1", field: SENT}, 200 if first else 201)
    assert found(stage) == {"too-soon"}
    for said in (
        {"delivered_at": "2026-11-24T18:21:15Z"},  # the mail was waiting, or the clock was wrong
        {"subject": "Sale", "sent_at": SENT},  # delivery goes before sending
    ):
        post(stage, {"key": "e1", **said}, 200)
        assert found(stage) == {"browser"}


@pytest.mark.parametrize("drained", [True, False], ids=["counted", "waiting"])
@pytest.mark.parametrize("state", ["machine", "person"])
def test_a_time_of_delivery_makes_a_click_a_second_later_a_scanners(stage: Stage, drained: bool, state: str) -> None:
    post(stage, {"key": "e1", "campaign": "spring", "sent_at": "2026-11-23T18:21:25Z"})
    later = [click(stage, "e1", at=NOW + 60_000)] * (state == "person")  # a minute later she clicked too
    segment(stage, hit(stage, "e1", NOW), click(stage, "e1", at=NOW + 1_000), *later)
    if drained:
        stage.drain()
    # Later delivery takes that back: the click came before, so it tells nothing.
    at_once = {"some-signs", "too-soon", *(["browser"] if later else [])}
    for delivered, expected, reasons in ((NOW, state, at_once), (NOW + 1_001, "person", {"browser"})):
        patch(stage, "e1", {"delivered_at": tracker.iso_time(delivered)})
        numbers = stage.web.get(f"/{stage.acme.id}/stats.json?range=all").json
        assert numbers["sent"]["clicked"] == {"person": 0, "unconfirmed": 0, "machine": 0, expected: 1}
        assert found(stage) == reasons


def test_hits_are_judged_anew_when_it_becomes_known_how_many_links_an_email_has(stage: Stage) -> None:
    clicked(stage, *SIX, gap=3_000)
    assert found(stage) == {"browser"}
    post(stage, {"key": "e1", "links": SIX})
    assert found(stage) == {"some-signs"}
    post(stage, {"key": "e1", "links": [*SIX, "https://acme.com/one-more"]}, 200)
    assert found(stage) == {"browser"}


def test_what_is_said_of_an_email_later_replaces_that_and_nothing_else(stage: Stage) -> None:
    first = {"key": "e1", "subject": "Hello", "recipient": "ann@example.org", "campaign": "spring"}
    post(stage, {**first, "sent_at": SENT})
    times = "select sent_at, delivered_at, time_said from emails"
    assert stage.rows(times) == [(NOW - 1_000, None, 1)]
    said = {"campaign": " autumn ", "sent_at": "2026-11-24T12:00:00+01:00"}
    assert patch(stage, "e1", said) == patch(stage, "e1", {}) == {"changed": "e1"}
    assert emails(stage) == [("e1", "Hello", "ann@example.org", "autumn", 1)]
    patch(stage, "e1", {"subject": "", "delivered_at": SENT})
    assert emails(stage) == [("e1", "", "ann@example.org", "autumn", 1)]
    assert stage.rows(times) == [(1_795_518_000_000, NOW - 1_000, 1)]
    assert stage.check() == []


def test_nothing_is_said_of_an_email_that_nobody_registered(stage: Stage) -> None:
    post(stage, {"key": "theirs"}, tenant=stage.globex)
    segment(stage, hit(stage, "unregistered"), click(stage, "unregistered"))
    stage.drain()
    stage.pixel("waiting")  # a hit that is not counted yet makes no email of it either
    for key in ("nobody", "unregistered", "waiting", "theirs", "a%20b"):
        assert patch(stage, key, {"subject": "x", "delivered_at": SENT}, 404) == {"error": "There is no such email."}
    assert sorted(emails(stage)) == [(key, "", "", "", 0) for key in ("unregistered", "waiting")]
    assert stage.rows("select delivered_at from emails where delivered_at is not null") == []
    assert stage.check() == []


# -- Removing an email


def test_a_removed_email_is_in_no_number_any_more_and_the_others_are(stage: Stage) -> None:
    follow(stage, post(stage, {"key": "e2", "campaign": "c"})["pixel_url"])
    before = stage.web.get(f"/{stage.acme.id}/stats.json").json
    # Some of its hits are still in the spool: they must not make the email anew.
    follow(stage, post(stage, {"key": "e+1@x", "campaign": "c"})["pixel_url"])
    stage.web.get(f"/{stage.acme.mail_id}/click/e+1@x?url=https%3A%2F%2Fnot-allowed.example%2F")
    assert stage.web.delete(f"/{stage.acme.id}/emails/e%2B1%40x").json == {"deleted": "e+1@x"}
    after = stage.web.get(f"/{stage.acme.id}/stats.json").json
    for same in ("sent", "unregistered", "activity", "naming_page", "waiting_hits"):
        assert after[same] == before[same]
    assert [row[0] for row in emails(stage)] == ["e2"]
    assert stage.check() == []
    stage.web.delete(f"/{stage.acme.id}/emails/e%2B1%40x", status=404)


def test_later_hits_of_a_removed_email_are_counted_as_dropped_until_it_is_registered_again(stage: Stage) -> None:
    posted = post(stage, {"key": "e1", "campaign": "c", "links": ["https://acme.com/"]})
    stage.pixel("unregistered")
    stage.drain()
    for key in ("e1", "unregistered"):
        stage.web.delete(f"/{stage.acme.id}/emails/{key}")
    before = stage.web.get(f"/{stage.acme.id}/stats.json").json
    click = f"/{stage.acme.mail_id}/click/unregistered?url=https://acme.com/"
    follow(stage, posted["pixel_url"])
    stage.drain()
    follow(stage, posted["links"][0]["click_url"], status=302)
    stage.web.head(f"/{stage.acme.mail_id}/pixel/e1.gif")
    stage.web.get(click, status=302)
    stage.drain()
    after = stage.web.get(f"/{stage.acme.id}/stats.json").json
    assert (before["dropped"], after["dropped"]) == ({}, {"deleted": 4})
    assert (emails(stage), stage.rows("select * from events")) == ([], [])
    assert all(after[same] == before[same] for same in ("sent", "unregistered", "activity", "last_hit_at"))
    post(stage, {"key": "e1"}, 201)
    follow(stage, posted["pixel_url"])
    stage.drain()
    assert stage.rows("select key, type from event_details") == [("e1", 1)]
    assert stage.rows("select sum(hits) from dropped") == [(4,)]
    assert stage.check() == []


def test_an_email_that_is_not_there_cannot_be_removed(still: Stage) -> None:
    for key in ("nothing", "a%2Fb", "%00", "%FF", "k" * 300, "..", "%2e%2e"):
        path = f"/{still.acme.id}/emails/{key}"
        answer = still.web.delete(path, status=404, extra_environ={"RAW_URI": path})
        assert answer.json == {"error": "There is no such email."}


# -- Making a tenant


def test_a_new_tenant_gets_two_ids_and_works_at_once(operated: Stage) -> None:
    made = post_tenant(operated, {"name": " Initech "})
    assert list(made) == ["name", "id", "mail_id", "dashboard_url", "pixel_url", "api_key"]
    assert made["name"] == "Initech"
    assert re.fullmatch("[A-Za-z0-9_-]{22}", made["id"])
    assert re.fullmatch("[a-z0-9]{8}", made["mail_id"])
    operated.refresh()
    assert follow(operated, made["pixel_url"]).headers["X-Tracker"] == "recorded"
    assert "Initech" in follow(operated, made["dashboard_url"])
    # Only signed links redirect, until somebody says where plain ones may lead.
    plain = "click/e1?url=https%3A%2F%2Facme.com%2F"
    assert follow(operated, f"{BASE}/{made['mail_id']}/{plain}").status_int == 200
    free = post_tenant(operated, {"name": "Initech", "any_domain": True})  # two may have the same name
    operated.refresh()
    assert follow(operated, f"{BASE}/{free['mail_id']}/{plain}").status_int == 302


def test_a_new_tenant_writes_by_the_key_that_is_told_once_unless_writing_is_to_be_open(operated: Stage) -> None:
    made, one, free = (
        post_tenant(operated, {"name": "x", **more}) for more in ({}, {"id": "abc"}, {"open_writing": True})
    )
    for each in (made, one):
        path, value = f"/{each['id']}/emails", {"key": "k1"}
        assert re.fullmatch(r"[A-Za-z0-9_-]{43}", each["api_key"])
        operated.web.post_json(path, value, status=401)
        operated.web.post_json(path, value, headers=bearer(each["api_key"]), status=201)
        operated.web.patch_json(f"{path}/k1", {}, status=401)
        operated.web.delete(f"{path}/k1", status=401)
        operated.web.delete(f"{path}/k1", headers=bearer(each["api_key"]))
        assert each["api_key"] not in str(operated.rows("select * from tenants"))
    assert free["api_key"] is None
    operated.web.post_json(f"/{free['id']}/emails", {"key": "k1"}, status=201)
    assert refused(operated, {"name": "x", "id": "own", "open_writing": True}, ask=post_tenant).startswith(
        "open_writing: "
    )


def test_a_new_tenants_options_are_obeyed(operated: Stage) -> None:
    made = post_tenant(
        operated,
        {"name": "Initech", "id": "initech-1", "domains": ["initech.com", "shop.example:8443"], "tracking_host": "Mail.Initech.com"},
    )  # fmt: skip
    assert (made["id"], made["mail_id"]) == ("initech-1", "initech-1")
    assert made["dashboard_url"] == f"{BASE}/initech-1/dashboard"
    base = "https://mail.initech.com"
    assert made["pixel_url"] == f"{base}/initech-1/pixel/test.gif"
    operated.refresh()
    for host in ("www.initech.com", "shop.example:8443", "shop.example", "elsewhere.example"):
        status = 302 if host in ("www.initech.com", "shop.example:8443") else 200
        follow(operated, f"{base}/initech-1/click/e1?url=https://{host}/", base, status=status)
    # Workers go by a file that may lie on every server, so no dashboard id is in it but where it stands in mail anyway.
    secret = post_tenant(operated, {"name": "x", "domains": ["acme.com"]})
    known = (operated.folder / "tenants.json").read_text()
    assert json.loads(known)["tenants"][secret["mail_id"]]["allow"] == ["acme.com"]
    assert secret["id"] not in known


def test_what_belongs_or_belonged_to_another_tenant_is_a_conflict(operated: Stage) -> None:
    post_tenant(operated, {"name": "Initech", "id": "initech", "tracking_host": "mail.initech.com"})
    with tracker.changing_tenants(operated.database) as connection:
        tracker.remove_tenant(connection, operated.globex, NOW)  # mail with its id is still out there
    for taken in ("initech", operated.acme.id, operated.acme.mail_id, operated.globex.mail_id):
        assert "taken" in refused(operated, {"name": "x", "id": taken}, 409, post_tenant)
    for host in ("mail.initech.com", "MAIL.initech.com."):
        told = refused(operated, {"name": "x", "tracking_host": host}, 409, post_tenant)
        assert told.startswith("the tracking host mail.initech.com belongs to another tenant")
        assert operated.acme.id not in told


def test_an_id_may_be_of_these_forms(operated: Stage) -> None:
    for id_ in ("abc", "a-b_C9", "0" * 64, "_x_"):
        made = post_tenant(operated, {"name": "x", "id": id_})
        operated.refresh()
        assert follow(operated, made["pixel_url"]).headers["X-Tracker"] == "recorded"
        assert operated.web.get(f"/{id_}/dashboard").status_int == 200


def test_an_id_is_never_a_word_of_the_routes(still: Stage) -> None:
    parts = {part.partition(".")[0] for route in tracker.ROUTES for part in route.pattern.split("/")[1:]}
    words = {part for part in parts if re.fullmatch("[a-z]{3,}", part)}
    assert words >= {"pixel", "click", "health", "assets", "tenants", "dashboard", "emails", "robots", "favicon"}
    for word in sorted(words):
        for spelt in (word, word.upper(), word.title()):
            assert refused(still, {"name": "x", "id": spelt}, ask=post_tenant).startswith("id: ")


# -- Tenants, as their operator sees and changes them

CHANGES: dict[str, Any] = {
    "name": "Acme & Sons",
    "domains": ["acme.com", "acme.net:8443"],
    "blocked": ["bad.example.com"],
    "own_addresses": ["203.0.113.0/24"],
    "forwarded": ["ref"],
    "any_domain": True,
    "suspended": True,
    "ignore_gpc": True,
    "feed": True,
    "tracking_host": "mail.acme.com",
    "tz": "Europe/Rome",
    "utm": "utm_source=news",
    "retention_days": 90,
    "unregistered_a_day": 0,
}


def ask(stage: Stage, method: str, tenant: str, value: Any = None, status: int = 200) -> Any:
    """Ask for a tenant as the operator."""
    path = f"/tenants/{quote(tenant, safe='')}"
    answer = call(stage, method, path, b"" if value is None else json.dumps(value).encode(), bearer(OPERATOR_KEY))
    assert answer.status == status, answer.text
    return answer.json


def test_what_is_changed_of_a_tenant_is_shown_and_what_is_not_said_stays(operated: Stage) -> None:
    before = ask(operated, "GET", "Acme")
    assert (before["domains"], before["retention_days"], before["api_key"]) == (["acme.com"], None, False)
    for name, value in CHANGES.items():
        assert ask(operated, "PATCH", operated.acme.mail_id, {name: value})[name] == value
    after = ask(operated, "GET", operated.acme.mail_id)
    base = "https://mail.acme.com"
    assert after == {**before, **CHANGES, "pixel_url": f"{base}/{operated.acme.mail_id}/pixel/test.gif"}
    # A list replaces the one before; what is none is as for others.
    none: dict[str, Any] = {
        "domains": [],
        "tracking_host": "",
        "utm": "",
        "retention_days": None,
        "unregistered_a_day": None,
    }
    assert ask(operated, "PATCH", operated.acme.mail_id, none) == {**after, **none, "pixel_url": before["pixel_url"]}
    assert ask(operated, "GET", "Globex")["any_domain"] is True and ask(operated, "GET", "Globex")["tz"] == "UTC"


def test_a_change_of_a_tenant_is_heeded_at_once(operated: Stage) -> None:
    post(operated, {"key": "e1", "sent_at": "2026-11-24T23:30:00Z"})
    plain = f"/{operated.acme.mail_id}/click/e1?url=https%3A%2F%2Facme.com%2F"
    assert operated.web.get(plain).status_int == 302
    for changes, status in (({"suspended": True}, 200), ({"suspended": False}, 302), ({"domains": []}, 200)):
        ask(operated, "PATCH", "Acme", changes)
        operated.refresh()
        assert operated.web.get(plain).status_int == status
    ask(operated, "PATCH", "Acme", {"tz": "Asia/Tokyo"})
    operated.drain()
    assert operated.check() == []  # the numbers by day were counted anew


def test_a_tenant_is_made_with_all_that_can_be_changed(operated: Stage) -> None:
    made = post_tenant(operated, CHANGES)
    shown = ask(operated, "GET", made["id"])
    assert {name: shown[name] for name in CHANGES} == CHANGES
    assert shown["api_key"] is True


def test_tenants_are_listed_oldest_first_and_found_by_each_of_their_names(operated: Stage) -> None:
    made = post_tenant(operated, {"name": "A/B + é?"})
    rows = operated.web.get("/tenants", headers=bearer(OPERATOR_KEY)).json["rows"]
    assert [row["name"] for row in rows] == ["Acme", "Globex", "A/B + é?"]
    for word in (made["name"], made["name"].upper(), made["id"], made["mail_id"]):
        assert ask(operated, "GET", word) == rows[2]
    post_tenant(operated, {"name": "acme"})
    assert "2 tenants have the name 'ACME'" in ask(operated, "GET", "ACME", status=400)["error"]
    for method, value in (("GET", None), ("PATCH", {"name": "x"}), ("DELETE", None)):
        for word in ("Nobody", "dashboard", "emails.json", operated.acme.id[:-1], "%00"):
            assert "no tenant" in ask(operated, method, word, value, 404)["error"]


def test_a_tenant_that_is_removed_is_gone_and_its_mail_id_is_nobodys(operated: Stage) -> None:
    post(operated, {"key": "e1"})
    assert ask(operated, "DELETE", "Acme") == {"deleted": operated.acme.mail_id}
    ask(operated, "GET", operated.acme.mail_id, status=404)
    assert emails(operated) == []
    assert operated.rows("select name from tenants") == [("Globex",)]
    assert "taken" in refused(operated, {"name": "x", "id": operated.acme.mail_id}, 409, post_tenant)
    assert operated.check() == []


OF_CHANGES: list[tuple[str, str, list[Any]]] = [
    ("name", ": expected", ["", " ", None]),
    ("id", ": unknown field; expected some of ", ["another"]),
    ("tz", "", ["Nowhere/Land", "", 5]),
    ("own_addresses", ": ", [["here"], ["0.0.0.0/0"], "203.0.113.7", None]),
    ("blocked", ": ", [["localhost"]]),
    ("forwarded", ": ", [["url"], ["a b"]]),
    ("suspended", ": expected true or false", ["yes", 1, None]),
    ("utm", "", ["utm_source", None]),
    ("retention_days", ": expected a whole number", [6, -1, 10_000, 7.5, "90", True]),
    ("unregistered_a_day", ": expected a", [-1, 1 << 70, "5", 0.5]),
    ("tracking_host", "", ["track.example.com", "192.0.2.1"]),
]


@pytest.mark.parametrize(("name", "told", "values"), OF_CHANGES)
def test_a_bad_change_of_a_tenant_is_refused_by_its_name(still: Stage, name: str, told: str, values: list[Any]) -> None:
    for value in values:
        said = {"ignore_gpc": True, name: value}  # what else is said with it is not done either
        error = refused(still, said, ask=lambda *asked: ask(asked[0], "PATCH", "Acme", *asked[1:]))
        assert error.startswith(f"{name}{told}") and "expected" in error


def test_what_belongs_to_another_or_would_let_readers_write_is_no_change(operated: Stage) -> None:
    ask(operated, "PATCH", "Globex", {"tracking_host": "mail.globex.com"})
    told = ask(operated, "PATCH", "Acme", {"tracking_host": "mail.globex.com"}, 409)["error"]
    assert told.startswith("the tracking host mail.globex.com belongs to another tenant")
    made = post_tenant(operated, {"name": "One", "id": "one-id"})
    assert ask(operated, "PATCH", "One", {"open_writing": True}, 400)["error"].startswith("open_writing: ")
    operated.web.post_json("/one-id/emails", {}, status=401)
    operated.web.post_json("/one-id/emails", {}, headers=bearer(made["api_key"]), status=201)


# -- Figures for the operator's monitor


def figures(stage: Stage) -> dict[str, float]:
    """What Prometheus reads."""
    accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1"
    answer = stage.web.get("/health", headers={**bearer(OPERATOR_KEY), "Accept": accept})
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.text == stage.web.get("/health?format=prometheus", headers=bearer(OPERATOR_KEY)).text
    lines = re.findall(r"^email_tracker_([a-z_]+) ([0-9]+)$", answer.text, re.MULTILINE)
    assert len(lines) == answer.text.count("\n")
    return {name: int(number) for name, number in lines}


def test_the_operators_monitor_is_told_figures(operated: Stage) -> None:
    def known() -> Any:
        tracker.Drainer(operated.database).turn()
        return operated.web.get("/health", headers=bearer(OPERATOR_KEY)).json["figures"]

    operated.pixel("e1")
    operated.pixel("e2")
    assert known()["hits"] == known()["drained_hits_total"] == 2
    segment(operated, hit(operated, "e3"), b"no hit\n")
    made = known()
    assert (made["drained_hits_total"], made["rejected_lines"], made["waiting_hits"], made["ok"]) == (3, 1, 0, 0)
    assert (made["database_bytes"] is None) == operated.settings.is_shared
    assert (made["database_bytes"] or 1 << 20) > 1 << 16 and made["spool_bytes"] > 100
    assert figures(operated) == {name: number for name, number in made.items() if number is not None}
    assert {name for name in made if name.endswith("_met")} == {f"{what}_limit_met" for what in tracker.A_DAY}
    # A counter never falls, whatever is removed.
    with operated.database.transaction() as connection:
        tracker.delete_emails(operated.database.folder, connection, operated.acme.number, ["e1", "e2", "e3"], NOW)
    assert known()["drained_hits_total"] == 3


def test_who_has_not_the_operators_key_is_told_what_he_was_before(
    operated: Stage, staged: Callable[..., Stage]
) -> None:
    for stage, status in ((operated, 401), (staged(), 200)):
        tracker.Drainer(stage.database).turn()
        plain = stage.web.get("/health")
        assert list(plain.json) == ["status", "why", "waiting_hits", "rejected_lines", "limits", "notes", "version"]
        for path, headers in (
            ("/health?format=prometheus", {}),
            ("/health", {"Accept": "text/plain; version=0.0.4"}),
            ("/health", {"Authorization": f"Basic {OPERATOR_KEY}"}),
        ):
            answer = stage.web.get(path, headers=headers)
            assert (answer.body, answer.headers) == (plain.body, plain.headers)
        for key in ("wrong", "", OPERATOR_KEY + "x"):
            answer = stage.web.get("/health", headers=bearer(key), status=status)
            assert "operator's key" in answer.text if status == 401 else answer.body == plain.body
