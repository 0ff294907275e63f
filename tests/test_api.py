"""Writing over HTTP: registering emails, removing one, making a tenant; what is refused, and how it says so."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import webtest
from conftest import BASE, CHROME, NOW, Stage, click, make_stage, segment

import tracker

OPERATOR_KEY = "the-operators-own-key"
OPERATOR = {"Authorization": f"Bearer {OPERATOR_KEY}"}


def post(stage: Stage, value: Any, status: int = 201, tenant: tracker.Tenant | None = None, **more: Any) -> Any:
    """Register; returns the JSON of the answer."""
    path = f"/{(tenant or stage.acme).id}/emails"
    return stage.web.post_json(path, value, status=status, **more).json


def refused(stage: Stage, value: Any, status: int = 400) -> str:
    """What is said of a registration that is refused and leaves no trace."""
    before = stage.rows("select * from emails")
    answer = post(stage, value, status)
    assert list(answer) == ["error"]
    assert stage.rows("select * from emails") == before
    return str(answer["error"])


def emails(stage: Stage, tenant: tracker.Tenant | None = None) -> list[tuple[Any, ...]]:
    sql = "select key, subject, recipient, campaign, registered from emails where tenant = ? order by id"
    return stage.rows(sql, (tenant or stage.acme).number)


def follow(stage: Stage, url: str, base: str = BASE, **more: Any) -> Any:
    """Ask for a URL that the server gave out, as a person's browser would."""
    assert url.startswith(base + "/")
    extra = {"HTTP_HOST": base.partition("//")[2]}
    return stage.web.get(url[len(base) :], headers={"User-Agent": CHROME}, extra_environ=extra, **more)


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A stage that is asked for what it refuses, and so stays as it is: one for all such questions."""
    made = make_stage(tmp_path_factory.mktemp("still"), API_KEY=OPERATOR_KEY)
    yield made
    made.app.close()


# -- Registering emails


def test_one_email_is_registered_by_an_object(stage: Stage) -> None:
    before = tracker.now_ms()
    answer = post(stage, {"key": "e1", "subject": "Héllo", "recipient": "a@example.org", "campaign": "spring"})
    assert answer == {"key": "e1", "pixel_url": f"{BASE}/{stage.acme.mail_id}/pixel/e1.gif", "links": []}
    assert emails(stage) == [("e1", "Héllo", "a@example.org", "spring", 1)]
    sent_now = "select sent_at = created_at, sent_at between ? and ? from emails"
    assert stage.rows(sent_now, before, tracker.now_ms()) == [(1, 1)]
    assert stage.check() == []


def test_all_fields_may_be_left_out_and_a_key_is_made(stage: Stage) -> None:
    keys = {post(stage, {})["key"] for _ in range(20)}
    assert len(keys) == 20
    # 128 bits in base64url: nobody guesses the key of another's email.
    assert all(re.fullmatch("[A-Za-z0-9_-]{22}", key) for key in keys)
    assert {row[0] for row in emails(stage)} == keys


def test_the_pixel_and_the_links_that_are_returned_work_and_count(stage: Stage) -> None:
    targets = ["https://elsewhere.example/a?b=1&c=%20#d", "http://bücher.example/ü", "HTTPS://ACME.com"]
    answer = post(stage, {"subject": "Hello", "links": targets})
    assert [link["url"] for link in answer["links"]] == targets
    pixel = follow(stage, answer["pixel_url"])
    assert pixel.headers["X-Tracker"] == "recorded"
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
    assert {event[0] for event in stage.rows("select url from event_details where event_type = 'click'")} == set(
        targets
    )
    assert stage.check() == []


def test_every_key_that_is_allowed_gives_urls_that_work(stage: Stage) -> None:
    for key in ("a", "-_.~+@=:", "...", "=1+1", "reader@example.org", "9" * 200, "~"):
        answer = post(stage, {"key": key, "links": ["https://elsewhere.example/"]})
        assert follow(stage, answer["pixel_url"]).headers["X-Tracker"] == "recorded"
        follow(stage, answer["links"][0]["click_url"], status=302)
        stage.drain()
        counts = "select open_person, click_person from email_counts join emails on id = email where key = ?"
        assert stage.rows(counts, key) == [(1, 1)]
    assert stage.rows("select count(*) from emails where registered = 0") == [(0,)]


def test_a_thousand_emails_are_registered_by_one_array_and_answered_in_order(stage: Stage) -> None:
    answers = post(stage, [{"key": f"e{n}", "links": ["https://acme.com/"]} for n in range(1000)])
    assert [answer["key"] for answer in answers] == [f"e{n}" for n in range(1000)]
    assert len({answer["links"][0]["click_url"] for answer in answers}) == 1000
    assert [row[0] for row in emails(stage)] == [f"e{n}" for n in range(1000)]
    assert stage.check() == []


def test_a_thousand_and_one_are_too_many(stage: Stage) -> None:
    assert refused(stage, [{}] * 1001) == "expected at most 1000 emails, got 1001"


def test_an_array_of_nothing_registers_nothing(stage: Stage) -> None:
    assert post(stage, [], 200) == []
    assert emails(stage) == []


def test_an_array_is_registered_whole_or_not_at_all(stage: Stage) -> None:
    post(stage, {"key": "e0", "subject": "before"})
    told = refused(stage, [{"key": "e0", "subject": "after"}, {"key": "e1"}, {"key": "no spaces"}, {"key": "e3"}])
    assert told.startswith("[2].key: ")
    assert emails(stage) == [("e0", "before", "", "", 1)]


def test_an_array_without_keys_gets_a_key_for_each(stage: Stage) -> None:
    answers = post(stage, [{"subject": "one"}, {"subject": "two"}])
    assert [row[:2] for row in emails(stage)] == [(answers[0]["key"], "one"), (answers[1]["key"], "two")]


def test_registering_again_updates_the_email_and_makes_no_second(stage: Stage) -> None:
    first = {"key": "e1", "subject": "one", "recipient": "a@example.org", "campaign": "spring"}
    second = {"key": "e1", "subject": "two", "recipient": "b@example.org", "campaign": "autumn"}
    made = post(stage, first, 201)
    assert post(stage, first, 200) == made  # a client that lost the answer may ask again
    sent_at = stage.rows("select sent_at, created_at from emails")
    follow(stage, made["pixel_url"])
    stage.drain()
    assert post(stage, second, 200) == made
    assert emails(stage) == [("e1", "two", "b@example.org", "autumn", 1)]
    assert stage.rows("select sent_at, created_at from emails") == sent_at
    # Its open moves with it into the other campaign.
    in_campaigns = stage.rows("select campaign, emails, opened_person from campaigns where emails <> 0")
    assert in_campaigns == [("autumn", 1, 1)]
    assert stage.check() == []


def test_the_same_key_twice_in_an_array_is_one_email_and_the_last_word_counts(stage: Stage) -> None:
    post(stage, [{"key": "e1", "subject": "one"}, {"key": "e1", "subject": "two", "campaign": "c"}])
    assert emails(stage) == [("e1", "two", "", "c", 1)]
    assert stage.check() == []


def test_an_email_that_was_opened_before_it_was_registered_is_registered_then(stage: Stage) -> None:
    stage.pixel("e1")
    stage.drain()
    assert emails(stage) == [("e1", "", "", "", 0)]
    post(stage, {"key": "e1", "subject": "late"}, 201)  # new to the sender, so Created
    assert emails(stage) == [("e1", "late", "", "", 1)]
    numbers = stage.web.get(f"/{stage.acme.id}/stats.json").json
    assert (numbers["sent"]["emails"], numbers["sent"]["opened"]["person"]) == (1, 1)
    assert numbers["unregistered"]["emails"] == 0
    assert stage.check() == []


BAD_FIELDS = [
    pytest.param({"key": ""}, "key: expected 1 to 200", id="empty key"),
    pytest.param({"key": "a b"}, "key: expected 1 to 200", id="key with a space"),
    pytest.param({"key": "a/b"}, "key: expected 1 to 200", id="key with a slash"),
    pytest.param({"key": "a%b"}, "key: expected 1 to 200", id="key with a percent sign"),
    pytest.param({"key": "a?b"}, "key: expected 1 to 200", id="key with a question mark"),
    pytest.param({"key": "é"}, "key: expected 1 to 200", id="key beyond ASCII"),
    pytest.param({"key": "."}, "key: expected", id="dot"),
    pytest.param({"key": ".."}, "key: expected", id="dots"),
    pytest.param({"key": "k" * 201}, "key: expected at most 200", id="long key"),
    pytest.param({"key": "k\n"}, "key: expected", id="key with a line break"),
    pytest.param({"key": None}, "key: expected text", id="null key"),
    pytest.param({"key": 5}, "key: expected text", id="number as key"),
    pytest.param({"subject": None}, "subject: expected text", id="null"),
    pytest.param({"subject": ["x"]}, "subject: expected text", id="list as text"),
    pytest.param({"recipient": True}, "recipient: expected text", id="true as text"),
    pytest.param({"campaign": {}}, "campaign: expected text", id="object as text"),
    pytest.param({"subject": "x" * 999}, "subject: expected at most 998 characters, got 999", id="long subject"),
    pytest.param({"recipient": "x" * 321}, "recipient: expected at most 320", id="long recipient"),
    pytest.param({"campaign": "x" * 201}, "campaign: expected at most 200", id="long campaign"),
    pytest.param({"subject": "a\nb"}, "subject: expected text without control", id="line break"),
    pytest.param({"subject": "a\tb"}, "subject: expected text without control", id="tab"),
    pytest.param({"recipient": "a\0b"}, "recipient: expected text without control", id="NUL"),
    pytest.param({"campaign": "a\x7fb"}, "campaign: expected text without control", id="DEL"),
    pytest.param({"subject": "a\ud800b"}, "subject: expected text", id="half a character"),
    pytest.param({"Subject": "x"}, "Subject: unknown field", id="capital"),
    pytest.param({"subjekt": "x"}, "subjekt: unknown field; expected some of", id="unknown field"),
    pytest.param({"mail_id": "x"}, "mail_id: unknown field", id="another table's field"),
    pytest.param({"links": "https://acme.com/"}, "links: expected a list", id="link without a list"),
    pytest.param({"links": [5]}, "links: expected a list of texts", id="number as link"),
    pytest.param({"links": [None]}, "links: expected a list of texts", id="null as link"),
    pytest.param({"links": ["https://a.example/"] * 1001}, "links: expected at most 1000, got 1001", id="many links"),
    pytest.param({"links": ["https://a.example/", ""]}, "links[1]: ", id="empty link"),
    pytest.param({"links": ["https://a.example/", "/b"]}, "links[1]: ", id="relative link"),
    pytest.param({"links": ["ftp://a.example/"]}, "links[0]: its scheme is ftp", id="ftp"),
    pytest.param({"links": ["javascript:alert(1)"]}, "links[0]: its scheme is javascript", id="javascript"),
    pytest.param({"links": ["https://a@b.example/"]}, "links[0]: it holds credentials", id="credentials"),
    pytest.param({"links": ["https:\\\\a.example"]}, "links[0]: ", id="backslashes"),
    pytest.param({"links": ["https://a.example/\r\nX: 1"]}, "links[0]: it holds a control character", id="CRLF"),
    pytest.param({"links": ["https://a.example/\ud800"]}, "links[0]: ", id="half a character in a link"),
    pytest.param({"links": ["https://\ud800/"]}, "links[0]: ", id="half a character in a host"),
    pytest.param({"links": ["https://a.example/" + "x" * 4096]}, "links[0]: it has 4,114 characters", id="long link"),
    pytest.param({"links": ["https://track.example.com/x"]}, "links[0]: it leads back to this server", id="ourselves"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "told"), BAD_FIELDS)
def test_a_bad_field_is_refused_by_its_name_and_place(still: Stage, value: dict[str, Any], told: str) -> None:
    assert refused(still, value).startswith(told)
    assert refused(still, [{"key": "good"}, value]).startswith(f"[1].{told}")


@pytest.mark.parametrize("value", [None, True, 5, 1.5, "text", "", [[]], [None], ["text"], [{"key": "good"}, 5]])
def test_what_is_no_object_is_refused(still: Stage, value: Any) -> None:
    told = refused(still, value)
    assert "expected an object" in told
    assert ("[" in told) == isinstance(value, list)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"{}{}", b"{'key': 'e1'}", b'{"key": "e1",}', b"NaN", b'[{"key": NaN}]', b'{"subject": Infinity}',
     b'{"subject": "\xff"}', b'\xff\xfe{\x00}\x00', b'{"subject": "a\nb"}', b"[" * 100_000, b'{"a":' * 100_000,
     b"9" * 10_000, b"key=e1&subject=x", b"\0"],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
def test_what_is_no_json_is_refused(still: Stage, body: bytes) -> None:
    answer = still.web.post(f"/{still.acme.id}/emails", body, status=400)
    assert answer.json["error"].startswith("expected JSON in UTF-8")
    assert emails(still) == []


def test_json_that_breaks_off_is_refused_with_the_place(still: Stage) -> None:
    answer = still.web.post(f"/{still.acme.id}/emails", b'{"subject": "Sale"\n "key": "e1"}', status=400)
    assert answer.json == {"error": "expected JSON in UTF-8, which this is not from line 2, column 2 on"}


def test_the_content_type_does_not_matter(stage: Stage) -> None:
    for kind in ("application/json", "text/plain", "application/x-www-form-urlencoded"):
        stage.web.post(f"/{stage.acme.id}/emails", b'{"key": "e1"}', content_type=kind)
    assert [row[0] for row in emails(stage)] == ["e1"]


def test_text_of_every_language_is_kept_as_it_is(stage: Stage) -> None:
    text = "Ünïcode 日本語 🎉 \u202eRTL\u202c <b>&amp;</b> 'quotes' \"double\" $name %s"
    post(stage, {"key": "e1", "subject": text, "recipient": text, "campaign": text})
    assert emails(stage) == [("e1", text, text, text, 1)]
    (row,) = stage.web.get(f"/{stage.acme.id}/emails.json").json["rows"]
    assert row["subject"] == text


def test_the_longest_values_that_are_allowed_are_taken(stage: Stage) -> None:
    value = {name: "é" * most for name, most in tracker.FIELD_LIMITS.items() if name != "key"}
    link = "https://a.example/" + "x" * (tracker.MAX_TARGET - 18)
    answer = post(stage, {**value, "key": "k" * 200, "links": [link] * 1000})
    assert emails(stage) == [("k" * 200, "é" * 998, "é" * 320, "é" * 200, 1)]
    assert follow(stage, answer["links"][0]["click_url"], status=302).location == link
    stage.drain()
    assert stage.rows("select url from event_details") == [(link,)]


def test_a_body_over_10_megabytes_is_too_large(stage: Stage) -> None:
    most = 10 << 20
    body = json.dumps({"key": "e1"}).encode()
    stage.web.post(f"/{stage.acme.id}/emails", body + b" " * (most - len(body)), status=201)
    for size in (most + 1, most + 5_000_000):
        answer = stage.web.post(f"/{stage.acme.id}/emails", b" " * size, status=413)
        assert answer.json == {"error": "expected a body of at most 10 MB"}
    # So it is when only the header says so: what is announced is not waited for.
    stage.web.post(f"/{stage.acme.id}/emails", b"{}", headers={"Content-Length": str(most + 1)}, status=413)


@pytest.mark.parametrize("length", ["-1", "+2", "1e1", "0x2", "2.0", "two", "2, 2", " 2"])
def test_a_content_length_that_is_no_number_is_refused(still: Stage, length: str) -> None:
    environ = {"CONTENT_LENGTH": length}
    app = tracker.wsgi(still.app)
    request = webtest.TestRequest.blank(f"/{still.acme.id}/emails", method="POST", body=b"{}")
    request.environ.update(environ)
    assert request.get_response(app).status_int == 400
    assert emails(still) == []


def test_a_body_that_ends_before_its_content_length_is_refused(stage: Stage) -> None:
    # The client died on the way: what came is not what it meant, even where it can be read.
    request = webtest.TestRequest.blank(f"/{stage.acme.id}/emails", method="POST", body=b'{"key": "e1"}')
    request.environ["CONTENT_LENGTH"] = "100"
    assert request.get_response(tracker.wsgi(stage.app)).status_int == 400
    assert emails(stage) == []


# -- The public address


def test_without_a_public_address_links_are_refused_with_the_reason(staged: Callable[..., Stage]) -> None:
    stage = staged(BASE_URL="")
    told = refused(stage, {"key": "e1"}, 409)
    for word in ("public address", "BASE_URL", "tracking host", "--local"):
        assert word in told


def test_local_links_are_made_where_the_operator_says_so(staged: Callable[..., Stage]) -> None:
    stage = staged(BASE_URL="", PORT="3456")
    app = tracker.App(dataclasses.replace(stage.settings, local=True))
    web = webtest.TestApp(tracker.wsgi(app))
    answer = web.post_json(f"/{stage.acme.id}/emails", {"key": "e1"}, status=201).json
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
    assert stage.rows("select event_type, count(*) from event_details group by 1") == [("click", 2), ("open", 1)]


def test_a_link_to_a_tracking_host_of_ours_is_refused(stage: Stage) -> None:
    stage.change(stage.globex, tracking_host="mail.globex.com")
    for url in ("https://mail.globex.com/", "http://MAIL.globex.com./x"):
        assert refused(stage, {"links": [url]}) == "links[0]: it leads back to this server"


# -- Removing an email


def test_a_removed_email_is_in_no_number_any_more(stage: Stage) -> None:
    before = stage.web.get(f"/{stage.acme.id}/stats.json").json
    answer = post(stage, {"key": "e+1@x", "campaign": "c", "links": ["https://elsewhere.example/"]})
    follow(stage, answer["pixel_url"])
    follow(stage, answer["links"][0]["click_url"])
    stage.web.get(f"/{stage.acme.mail_id}/click/e+1@x?url=https%3A%2F%2Fnot-allowed.example%2F")
    # Some of its hits are still in the spool: they must not make the email anew.
    assert stage.web.delete(f"/{stage.acme.id}/emails/e%2B1%40x").json == {"deleted": "e+1@x"}
    after = stage.web.get(f"/{stage.acme.id}/stats.json").json
    for same in ("sent", "unregistered", "activity", "naming_page", "last_hit_at", "waiting_hits"):
        assert after[same] == before[same]
    assert emails(stage) == []
    assert stage.rows("select * from events") == []
    assert stage.check() == []
    stage.web.delete(f"/{stage.acme.id}/emails/e%2B1%40x", status=404)


@pytest.mark.parametrize("key", ["nothing", "a%2Fb", "%00", "%FF", "k" * 300, "..", "%2e%2e"])
def test_an_email_that_is_not_there_cannot_be_removed(still: Stage, key: str) -> None:
    path = f"/{still.acme.id}/emails/{key}"
    answer = still.web.delete(path, status=404, extra_environ={"RAW_URI": path})
    assert answer.json == {"error": "There is no such email."}


def test_removing_an_email_leaves_the_others_alone(stage: Stage) -> None:
    made = post(stage, [{"key": "e1", "campaign": "c"}, {"key": "e2", "campaign": "c"}])
    for answer in made:
        follow(stage, answer["pixel_url"])
    stage.web.delete(f"/{stage.acme.id}/emails/e1")
    numbers = stage.web.get(f"/{stage.acme.id}/stats.json").json
    assert (numbers["sent"]["emails"], numbers["sent"]["opened"]["person"]) == (1, 1)
    assert [row[0] for row in emails(stage)] == ["e2"]
    assert stage.check() == []


# -- Making a tenant


@pytest.fixture
def operated(staged: Callable[..., Stage]) -> Stage:
    """A stage with an operator's key."""
    return staged(API_KEY=OPERATOR_KEY)


def post_tenant(stage: Stage, value: Any, status: int = 201) -> Any:
    return stage.web.post_json("/tenants", value, headers=OPERATOR, status=status).json


def tenant_refused(stage: Stage, value: Any, status: int = 400) -> str:
    before = stage.rows("select * from tenants")
    answer = post_tenant(stage, value, status)
    assert list(answer) == ["error"]
    assert stage.rows("select * from tenants") == before
    return str(answer["error"])


def test_a_new_tenant_gets_two_ids_and_works_at_once(operated: Stage) -> None:
    made = post_tenant(operated, {"name": " Initech "})
    assert list(made) == ["name", "id", "mail_id", "dashboard_url", "pixel_url"]
    assert made["name"] == "Initech"
    assert re.fullmatch("[A-Za-z0-9_-]{22}", made["id"])
    assert re.fullmatch("[a-z0-9]{8}", made["mail_id"])
    operated.refresh()
    assert follow(operated, made["pixel_url"]).headers["X-Tracker"] == "recorded"
    page = follow(operated, made["dashboard_url"])
    assert "Initech" in page
    # Only signed links redirect, until somebody says where plain ones may lead.
    assert follow(operated, f"{BASE}/{made['mail_id']}/click/e1?url=https%3A%2F%2Facme.com%2F").status_int == 200


def test_a_new_tenants_options_are_obeyed(operated: Stage) -> None:
    made = post_tenant(
        operated,
        {"name": "Initech", "id": "initech-1", "domains": ["initech.com", "shop.example:8443"], "tracking_host": "Mail.Initech.com"},
    )  # fmt: skip
    assert (made["id"], made["mail_id"]) == ("initech-1", "initech-1")
    assert made["dashboard_url"] == f"{BASE}/initech-1/dashboard"
    assert made["pixel_url"] == "https://mail.initech.com/initech-1/pixel/test.gif"
    operated.refresh()
    for url, status in (
        ("https://www.initech.com/", 302),
        ("https://shop.example:8443/", 302),
        ("https://shop.example/", 200),
        ("https://elsewhere.example/", 200),
    ):
        operated.web.get(f"/initech-1/click/e1?url={url}", extra_environ={"HTTP_HOST": "mail.initech.com"}, status=status)  # fmt: skip


def test_a_tenant_may_lead_anywhere_if_the_operator_says_so(operated: Stage) -> None:
    made = post_tenant(operated, {"name": "Initech", "any_domain": True})
    operated.refresh()
    operated.web.get(f"/{made['mail_id']}/click/e1?url=https%3A%2F%2Felsewhere.example%2F", status=302)
    assert post_tenant(operated, {"name": "Initech", "any_domain": False})["mail_id"] != made["mail_id"]


def test_what_belongs_to_another_tenant_is_a_conflict(operated: Stage) -> None:
    post_tenant(operated, {"name": "Initech", "id": "initech", "tracking_host": "mail.initech.com"})
    for taken in ("initech", operated.acme.id, operated.acme.mail_id):
        assert "taken" in tenant_refused(operated, {"name": "x", "id": taken}, 409)
    for host in ("mail.initech.com", "MAIL.initech.com."):
        told = tenant_refused(operated, {"name": "x", "tracking_host": host}, 409)
        assert told.startswith("the tracking host mail.initech.com belongs to another tenant")
        assert operated.acme.id not in told


def test_the_id_of_a_removed_tenant_stays_taken(operated: Stage) -> None:
    with tracker.changing_tenants(operated.database) as connection:
        tracker.remove_tenant(connection, operated.acme, NOW)
    # Mail with it is still out there; its hits must not become another's.
    tenant_refused(operated, {"name": "x", "id": operated.acme.mail_id}, 409)


def test_two_tenants_may_have_the_same_name(operated: Stage) -> None:
    assert post_tenant(operated, {"name": "Acme"})["id"] != operated.acme.id


@pytest.mark.parametrize("id_", ["abc", "a-b_C9", "0" * 64, "_x_"])
def test_an_id_may_be_of_these_forms(operated: Stage, id_: str) -> None:
    made = post_tenant(operated, {"name": "x", "id": id_})
    operated.refresh()
    assert follow(operated, made["pixel_url"]).headers["X-Tracker"] == "recorded"
    assert operated.web.get(f"/{id_}/dashboard").status_int == 200


@pytest.mark.parametrize("id_", ["ab", "a" * 65, "a b", "a/b", "a.b", "é" * 3, "-abc", "abc\n", "%61bc", "abc?", "a:b"])
def test_an_id_of_another_form_is_refused(still: Stage, id_: str) -> None:
    assert tenant_refused(still, {"name": "x", "id": id_}).startswith("id: expected")


def words_of_the_routes() -> set[str]:
    """The literal words that a path can begin with, or have behind an id."""
    words = {re.sub(r"\..*", "", part) for route in tracker.ROUTES for part in route.pattern.split("/")[1:]}
    return {word for word in words if re.fullmatch("[a-z]{3,}", word)}


def test_an_id_is_never_a_word_of_the_routes(operated: Stage) -> None:
    words = words_of_the_routes()
    assert words >= {"pixel", "click", "health", "assets", "tenants", "dashboard", "emails", "robots", "favicon"}
    for word in sorted(words):
        for spelt in (word, word.upper(), word.title()):
            assert tenant_refused(operated, {"name": "x", "id": spelt}).startswith("id: ")


BAD_TENANTS = [
    pytest.param([], "expected an object", id="array"),
    pytest.param({}, "name: ", id="no name"),
    pytest.param({"name": ""}, "name: ", id="empty name"),
    pytest.param({"name": "  "}, "name: ", id="blank name"),
    pytest.param({"name": None}, "name: expected text", id="null name"),
    pytest.param({"name": "x" * 201}, "name: expected at most 200", id="long name"),
    pytest.param({"name": "a\nb"}, "name: expected text without control", id="line break in name"),
    pytest.param({"name": "\ud800"}, "name: expected text", id="half a character"),
    pytest.param({"name": "x", "domain": "acme.com"}, "domain: unknown field; expected some of", id="unknown field"),
    pytest.param({"name": "x", "mail_id": "abc"}, "mail_id: unknown field", id="mail id"),
    pytest.param({"name": "x", "id": 5}, "id: expected text", id="number as id"),
    pytest.param({"name": "x", "domains": "acme.com"}, "domains: expected a list", id="domain without a list"),
    pytest.param({"name": "x", "domains": [1]}, "domains: expected a list of texts", id="number as domain"),
    pytest.param({"name": "x", "domains": ["a.example"] * 1001}, "domains: expected at most 1000", id="many domains"),
    pytest.param({"name": "x", "any_domain": 1}, "any_domain: expected true or false", id="number as flag"),
    pytest.param({"name": "x", "any_domain": "true"}, "any_domain: expected true or false", id="text as flag"),
    pytest.param({"name": "x", "tracking_host": ["a.example"]}, "tracking_host: expected text", id="list as host"),
]


@pytest.mark.parametrize(("value", "told"), BAD_TENANTS)
def test_a_bad_option_of_a_tenant_is_refused_by_its_name(still: Stage, value: Any, told: str) -> None:
    assert tenant_refused(still, value).startswith(told)


BAD_HOSTS = ["com", "localhost", "*.acme.com", "https://acme.com", "acme.com/x", "a b.com", "acme..com", "acme.com:x"]


@pytest.mark.parametrize("domain", [*BAD_HOSTS, "", "\ud800.com"])
def test_a_domain_that_is_none_is_refused_with_what_was_expected(still: Stage, domain: str) -> None:
    assert "expected" in tenant_refused(still, {"name": "x", "domains": ["acme.com", domain]})


@pytest.mark.parametrize("host", [*BAD_HOSTS, "192.0.2.1", "[2001:db8::1]", "mail.acme.com:8443", "track.example.com"])
def test_a_tracking_host_that_can_be_none_is_refused_with_what_was_expected(still: Stage, host: str) -> None:
    assert "expected" in tenant_refused(still, {"name": "x", "tracking_host": host})


def test_a_host_that_is_refused_is_refused_by_the_name_of_its_field(operated: Stage) -> None:
    # A tenant has hosts in two fields: without the name, whoever reads the error can't tell which is meant.
    assert "domains" in tenant_refused(operated, {"name": "x", "domains": ["acme.com", "com"]})
    assert re.search("tracking.host", tenant_refused(operated, {"name": "x", "tracking_host": "com"}))


def test_a_tenant_needs_a_public_address_of_the_server_or_a_tracking_host(staged: Callable[..., Stage]) -> None:
    stage = staged(API_KEY=OPERATOR_KEY, BASE_URL="")
    assert "BASE_URL" in tenant_refused(stage, {"name": "x"}, 409)
    made = post_tenant(stage, {"name": "x", "tracking_host": "mail.acme.com"})
    assert made["pixel_url"] == f"https://mail.acme.com/{made['mail_id']}/pixel/test.gif"
    assert made["dashboard_url"] == f"https://mail.acme.com/{made['id']}/dashboard"


def test_a_new_tenant_is_seen_by_the_workers_without_the_database(operated: Stage) -> None:
    made = post_tenant(operated, {"name": "x", "domains": ["acme.com"]})
    known = json.loads((operated.folder / "tenants.json").read_text())["tenants"]
    assert known[made["mail_id"]]["allow"] == ["acme.com"]
    # It may lie on every server, so no dashboard id is in it.
    assert made["id"] not in (operated.folder / "tenants.json").read_text()


def test_a_field_that_is_not_given_again_stays(stage: Stage) -> None:
    first = {"key": "k1", "subject": "Sale", "recipient": "ann@example.org", "campaign": "Spring"}
    stage.web.post_json(f"/{stage.acme.id}/emails", first)
    stage.web.post_json(f"/{stage.acme.id}/emails", {"key": "k1", "subject": "", "links": ["https://acme.com/"]})
    assert stage.rows("select subject, recipient, campaign from emails") == [("", "ann@example.org", "Spring")]
    assert stage.check() == []


def test_one_request_can_ask_for_so_many_links_and_no_more(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "MAX_LINKS", 3)
    emails = [{"key": f"k{n}", "links": ["https://acme.com/", "https://acme.com/2"]} for n in range(2)]
    answer = stage.web.post_json(f"/{stage.acme.id}/emails", emails, status=400)
    assert answer.json["error"] == "[1].links: expected at most 3 in one request"
    assert stage.rows("select * from emails") == []


def test_a_writer_that_waits_too_long_for_its_turn_is_told_to_come_back(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that waited for ever would answer no pixel meanwhile, and be killed."""
    monkeypatch.setattr(stage.database, "_patience", 0.05)
    with tracker.WriteLock(stage.settings.folder).held(0):
        answer = stage.web.post_json(f"/{stage.acme.id}/emails", {"key": "k1"}, status=503)
    assert answer.headers["Retry-After"]
    stage.web.post_json(f"/{stage.acme.id}/emails", {"key": "k1"}, status=201)


# -- What a sender knows of an email, at once or later: times, links, and whether it wants a hidden link

SENT = "2026-11-24T18:21:24.430Z"  # one second before NOW
SIX = [f"https://acme.com/{n}" for n in range(6)]


def known(stage: Stage) -> list[tuple[Any, ...]]:
    return stage.rows("select key, sent_at, delivered_at, time_said, links from emails order by id")


def test_the_times_of_sending_and_delivery_may_be_said(stage: Stage) -> None:
    times = {"sent_at": SENT, "delivered_at": "2026-11-24T19:21:25+01:00"}
    post(stage, [{"key": "both", **times}, {"key": "sent", "sent_at": SENT}, {"key": "none"}])
    both, sent, none = known(stage)
    assert both == ("both", NOW - 1_000, NOW - 430, 1, None)
    assert sent == ("sent", NOW - 1_000, None, 1, None)
    assert none[2:] == (None, 0, None) and none[1] > NOW - 366 * 86_400_000
    assert stage.check() == []


@pytest.mark.parametrize("field", ["sent_at", "delivered_at"])
@pytest.mark.parametrize("value", ["soon", "2026-13-01", 1795544485, True, ["2026-11-24"]])
def test_a_time_that_is_none_is_refused_by_its_field(still: Stage, field: str, value: Any) -> None:
    assert refused(still, [{}, {field: value}]).startswith(f"[1].{field}: ")


def test_how_many_links_an_email_has_is_known_from_what_is_registered(stage: Stage) -> None:
    page = "".join(f'<a href="{url}">x</a>' for url in SIX[:4])
    post(stage, [{"key": "e1", "links": [*SIX[:2], SIX[0]]}, {"key": "e2", "html": page}, {"key": "e3"}])
    post(stage, {"key": "e4", "links": SIX[3:], "html": page})
    assert [row[4] for row in known(stage)] == [2, 4, None, 6]
    post(stage, {"key": "e4"}, 200)
    assert known(stage)[3][4] == 6, "not said again, it stays"


def test_html_gets_a_hidden_link_where_its_sender_wants_one(stage: Stage) -> None:
    page = '<body><a href="https://acme.com/">x</a></body>'
    answer = post(stage, {"key": "e1", "html": page, "hidden_link": True})
    hidden = re.findall(r'<a href="([^"]+)" aria-hidden="true"[^>]*></a>', answer["html"])
    assert answer["report"]["hidden_link"].startswith("placed ")
    assert (len(hidden), known(stage)[0][4]) == (1, 1)
    assert follow(stage, hidden[0]).text.strip() == "<!doctype html><title></title>"
    stage.drain()
    assert stage.rows("select verdict, reason from event_details") == [("scanner", "hidden-link")]
    for value in (None, "yes", 1):
        assert "hidden_link" in refused(stage, {"html": page, "hidden_link": value})
    for said in ({}, {"hidden_link": False}):
        assert "aria-hidden" not in post(stage, {"html": page, **said})["html"]
    assert stage.check() == []


def clicked(stage: Stage, *urls: str, gap: int = 0, agent: str = CHROME) -> None:
    """Clicks that were counted before their email was registered, or before all was known of it."""
    segment(stage, *(click(stage, "e1", url, NOW + n * gap, ua=agent) for n, url in enumerate(urls)))
    stage.drain()


def found(stage: Stage) -> set[str]:
    assert stage.check() == []
    return {row[0] for row in stage.rows("select reason from event_details")}


@pytest.mark.parametrize("first", [None, {"key": "e1"}, {"key": "e1", "sent_at": "2026-11-20T00:00:00Z"}])
@pytest.mark.parametrize("field", ["sent_at", "delivered_at"])
def test_hits_are_judged_anew_when_it_is_said_later_when_an_email_was_sent_or_delivered(
    stage: Stage, field: str, first: dict[str, str] | None
) -> None:
    if first:
        post(stage, first)
    clicked(stage, "https://acme.com/")
    assert found(stage) == {"browser"}
    post(stage, {"key": "e1", field: SENT}, 200 if first else 201)
    assert found(stage) == {"too-soon"}
    assert stage.rows("select click_person, click_machine from email_counts") == [(0, 1)]
    post(
        stage, {"key": "e1", "delivered_at": "2026-11-24T18:21:15Z"}, 200
    )  # the mail was waiting, or the clock was wrong
    assert found(stage) == {"browser"}
    assert stage.rows("select click_person, click_machine from email_counts") == [(1, 0)]


def test_hits_are_judged_anew_when_it_becomes_known_how_many_links_an_email_has(stage: Stage) -> None:
    clicked(stage, *SIX, gap=3_000)
    assert found(stage) == {"browser"}
    post(stage, {"key": "e1", "links": SIX})
    assert found(stage) == {"burst"}
    post(stage, {"key": "e1", "links": [*SIX, "https://acme.com/one-more"]}, 200)
    assert found(stage) == {"browser"}


def test_a_registration_that_says_nothing_new_changes_no_verdict(stage: Stage) -> None:
    post(stage, {"key": "e1", "delivered_at": SENT})
    clicked(stage, "https://acme.com/")
    post(stage, {"key": "e1", "subject": "Sale", "sent_at": "2026-11-20T00:00:00Z"}, 200)
    assert found(stage) == {"too-soon"}, "delivery goes before sending"


def test_more_may_be_said_of_a_registered_email_and_of_no_other(stage: Stage) -> None:
    post(stage, {"key": "e1", "subject": "Sale", "campaign": "Spring"})
    clicked(stage, "https://acme.com/")
    path = f"/{stage.acme.id}/emails/e1"
    assert stage.web.patch_json(path, {"delivered_at": SENT, "recipient": "ann@example.org"}).json == {"changed": "e1"}
    assert found(stage) == {"too-soon"}
    assert stage.rows("select subject, recipient, campaign from emails") == [("Sale", "ann@example.org", "Spring")]
    before = stage.rows("select * from emails")
    segment(stage, click(stage, "unregistered"))
    for key, value, status in (
        ("e2", {}, 404),
        ("unregistered", {}, 404),
        ("e1", {"sent_at": "soon"}, 400),
        ("e1", {"links": SIX}, 400),
        ("e1", [], 400),
    ):
        stage.web.patch_json(f"/{stage.acme.id}/emails/{key}", value, status=status)
    stage.web.patch_json(f"/{stage.acme.mail_id}/emails/e1", {}, status=404)
    stage.web.patch_json(f"/{stage.globex.id}/emails/e1", {}, status=404)
    assert stage.rows("select * from emails where registered") == before
    assert stage.check() == []
