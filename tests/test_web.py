"""Who may ask for what: the access of every route, methods and paths, whose address it is, and what never leaves."""

from __future__ import annotations

import contextlib
import html
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urljoin

import pytest
from asking import (
    ACME_KEY,
    Answer,
    add_one_id,
    assert_error,
    assert_private,
    bearer,
    call,
    database_away,
    get,
    register,
    spooled,
)
from conftest import CHROME, NOW, OPERATOR_KEY, Stage, click, hit, make_stage, segment

import tracker

GLOBEX_KEY = "the-key-that-globex-has"
DELIVERED_AT = tracker.iso_time(NOW - 1_000)


# -- Who may see what: the access column of the routes

# How every route is called: by GET as it is, or as here: with a query behind its pattern, and a body.
GETS = """
/{mail_id}/pixel/{key}.gif /{mail_id}/click/{key}/{signature}/{target} /health /openapi.json /assets/{name} /robots.txt
/favicon.ico / /{id} /{id}/dashboard /{id}/stats.json /{id}/emails.json /{id}/emails.csv /{id}/events.json /{id}/events.csv
/{id}/links.json /{id}/links.csv /{id}/campaigns.json /{id}/campaigns.csv /{id}/clients.json /{id}/clients.csv /{id}/campaigns/{campaign}
/{id}/campaigns/{campaign}.json /{id}/feed.json /{id}/emails/{key} /{id}/links/{link} /{id}/people/{key}
"""
CALLS: dict[tuple[str, str], tuple[str, bytes]] = {
    **{("GET", pattern): ("", b"") for pattern in GETS.split()},
    ("GET", "/{mail_id}/click/{key}"): ("?url=https%3A%2F%2Facme.com%2F", b""),
    ("POST", "/{id}/emails"): ("", b'{"key": "new", "subject": "Written by a test"}'),
    ("POST", "/{id}/messages"): ("", b'Content-Type: text/html\r\n\r\n<a href="https://acme.com/">shop</a>'),
    ("POST", "/{id}/campaigns"): ("", b'{"campaign": "spring", "sent": 10}'),
    ("POST", "/{id}/forgotten"): ("", b'{"address": "ann@example.com"}'),
    # Delivered a second before the click of the cast, which so becomes a scanner's: its roll-ups change too.
    ("PATCH", "/{id}/emails/{key}"): ("", json.dumps({"subject": "Said later", "delivered_at": DELIVERED_AT}).encode()),
    ("DELETE", "/{id}/emails/{key}"): ("", b""),
    ("POST", "/{id}/untracked"): ("", b'{"addresses": ["reader@Acme.example"]}'),
    ("GET", "/{mail_id}/preferences/{key}/{signature}"): ("", b""),
    ("POST", "/{mail_id}/preferences/{key}/{signature}"): ("", b"choice=stop&token=none"),
    ("GET", "/tenants"): ("", b""),
    ("POST", "/tenants"): ("", b'{"name": "Initech", "id": "initech"}'),
    ("GET", "/tenants/{tenant}"): ("", b""),
    ("PATCH", "/tenants/{tenant}"): ("", b'{"suspended": true}'),
    ("DELETE", "/tenants/{tenant}"): ("", b""),
    ("GET", "/tenants/{tenant}/webhooks"): ("", b""),
    ("POST", "/tenants/{tenant}/webhooks"): ("", b'{"url": "https://crm.example.com/hook"}'),
    ("DELETE", "/tenants/{tenant}/webhooks"): ("?url=https://crm.example.com/hook", b""),
}


def routes(*access: str) -> list[Any]:
    found = [route for route in tracker.ROUTES if not access or route.access in access]
    return [pytest.param(route, id=f"{route.method} {route.pattern}") for route in found]


def link_of(stage: Stage, tenant: tracker.Tenant) -> str:
    """The number of a tenant's link; any, where its database is away."""
    with contextlib.suppress(tracker.StoreError):
        return str(stage.rows("select max(id) from urls where tenant = ?", tenant.number)[0][0])
    return "1"


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
        "link": link_of(stage, tenant) if "{link}" in route.pattern else "",
        "tenant": tenant.mail_id,
        "name": stage.app.pages.stylesheet_name,
        "target": link,
        "signature": tracker.sign(stage.app.secrets[0], tenant.mail_id, link),
        **instead,
    }
    if "/preferences/" in route.pattern:
        signed = tenant.mail_id, captures["key"], tracker.PREFERENCES
        captures["signature"] = tracker.sign(stage.app.secrets[0], *signed)
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
        with stage.database.transaction() as connection:
            tracker.set_feed(connection, tenant.number, True)
        said = (f"Subject of {tenant.name}", f"reader@{tenant.name}.example", f"campaign-of-{tenant.name.lower()}")
        register(stage, tenant, tracker.Registration(key, *said))
        opened = hit(stage, key, uri=f"/{tenant.mail_id}/pixel/{key}.gif")
        clicked = hit(stage, key, uri=f"/{tenant.mail_id}/click/{key}?url=https://{tenant.name}.example/", answer="302")
        segment(stage, opened, clicked)
    stage.drain()
    return stage


def everything_of(stage: Stage, tenant: tracker.Tenant) -> list[list[tuple[Any, ...]]]:
    """All rows that belong to a tenant."""
    tables = ("emails", "events", "uniques", "reasons", "cohorts", "campaigns", "campaign_times", "campaign_hits")
    others = ("links", "urls", "tenant_rules", "shares", "feeds", "changes", "webhooks")
    rows = (stage.rows(f"select * from {table} where tenant = ?", tenant.number) for table in (*tables, *others))
    owned = [sorted(each, key=repr) for each in rows]
    return [*owned, stage.rows("select * from tenants where number = ?", tenant.number)]


def everything(stage: Stage) -> list[list[list[tuple[Any, ...]]]]:
    return [everything_of(stage, tenant) for tenant in (stage.acme, stage.globex)]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """The cast, for all questions that change nothing: what is read, for which nobody needs Acme's key, and what is refused."""
    made = cast(make_stage(tmp_path_factory.mktemp("played"), API_KEY=OPERATOR_KEY))
    made.change(made.acme, api_key_hash=tracker.key_hash(ACME_KEY))
    yield made
    made.app.close()


def test_every_route_is_known_to_these_tests() -> None:
    assert {(route.method, route.pattern) for route in tracker.ROUTES} == set(CALLS)
    accesses = {tracker.ANYONE, tracker.SHARED, tracker.READER, tracker.WRITER, tracker.OPERATOR}
    assert {route.access for route in tracker.ROUTES} == accesses
    # Whose path has no id in it is public, or the operator's.
    private = (tracker.SHARED, tracker.READER, tracker.WRITER)
    assert all((route.access in private) == route.pattern.startswith("/{id}") for route in tracker.ROUTES)


@pytest.mark.parametrize("route", routes(tracker.SHARED, tracker.READER, tracker.WRITER))
def test_who_has_no_dashboard_id_finds_nothing(played: Stage, route: tracker.Route) -> None:
    before, acme = everything(played), played.acme
    # The second is what every recipient knows: the id that stands in mail. The operator's key does not replace the id.
    for id_ in ("nobody", acme.mail_id, acme.id[:-1], acme.id + "x", acme.id.swapcase(), "Acme", "*", "%25", "%00"):
        for headers in ({}, bearer(OPERATOR_KEY)):
            answer = use(played, route, acme, headers, id=id_)
            assert "nothing at this address" in assert_error(answer, 404)
            is_for_programs = route.access == tracker.WRITER or route.pattern.endswith((".json", ".csv"))
            assert answer["Content-Type"].startswith("application/json") == is_for_programs
    assert everything(played) == before


# Those of whose captures one names something of a tenant's.
OWNED = [
    param
    for param in routes(tracker.SHARED, tracker.READER, tracker.WRITER)
    if re.search("{(key|campaign|link)}", param.values[0].pattern)
]


@pytest.mark.parametrize("route", OWNED)
def test_another_tenants_email_is_not_there_and_stays_as_it_is(played: Stage, route: tracker.Route) -> None:
    before = everything(played)
    for tenant, name in ((played.acme, "globex"), (played.globex, "acme"), (played.acme, "nobody")):
        others = {"key": f"mail-of-{name}", "campaign": f"campaign-of-{name}"}
        others["link"] = "9" * 18 if name == "nobody" else link_of(played, getattr(played, name))
        assert_error(use(played, route, tenant, bearer(OPERATOR_KEY), **others), 404)
    assert everything(played) == before


@pytest.mark.parametrize("route", routes(tracker.WRITER))
def test_what_one_tenant_writes_changes_nothing_of_anothers(stage: Stage, route: tracker.Route) -> None:
    # Both have an email with the same key: it is a key inside its tenant.
    register(cast(stage), stage.globex, tracker.Registration("new", "Globex"), tracker.Registration("mail-of-acme"))
    before = everything_of(stage, stage.globex)
    answer = use(stage, route, stage.acme)
    assert answer.status in (200, 201)
    assert_private(answer)
    assert everything_of(stage, stage.globex) == before
    assert stage.check() == []


@pytest.mark.parametrize("route", routes(tracker.SHARED, tracker.READER))
def test_who_has_the_dashboard_id_reads_and_sees_nothing_of_another_tenant(played: Stage, route: tracker.Route) -> None:
    answer = use(played, route, played.acme)
    assert answer.status == (302 if route.pattern == "/{id}" else 200)
    assert_private(answer)
    assert b"globex" not in answer.body.lower()
    assert played.globex.id.encode() not in answer.body
    # A cursor that another tenant's export gave out opens nothing either.
    ((at, number),) = played.rows("select at, id from events where tenant = 2 and type = 2")
    after = get(played, target_of(played, route, played.acme) + f"?after={at + 1}-{number + 1}")
    assert b"globex" not in after.body.lower()


SHARE, SPRING_SHARE, ENDED_SHARE = "the-id-of-a-share", "of-one-campaign", "one-that-ended"


def share(stage: Stage) -> None:
    """Acme's numbers under three addresses: all, those of one campaign, and an old one; and mail of two more campaigns."""
    register(
        stage, stage.acme, tracker.Registration("w", "Secret", "ann@acme.example", "Winter", sent_at=NOW - 86_400_000)
    )
    register(stage, stage.acme, tracker.Registration("s", "Secret", "bob@acme.example", "Spring/1", sent_at=NOW))
    segment(stage, hit(stage, "w", ip="203.0.113.0"), hit(stage, "s", ip="203.0.113.0"))
    ends = "/off?e=a-reader#a-reader", "/off/reader@x.test/a", "/a-reader%40x.test", "/to/a-reader%2540x.test", "/x/@us"
    for end in ends:
        segment(stage, click(stage, "s", f"https://acme.com{end}", ip="203.0.113.0"))
    stage.drain()
    shares = (
        (SHARE, "", 0, 4_000_000_000_000),
        (SPRING_SHARE, "Spring/1", 0, 4_000_000_000_000),
        (ENDED_SHARE, "", 0, NOW),
    )
    with stage.database.transaction() as connection:
        tracker.set_shares(connection, stage.acme.number, [(tracker.key_hash(each[0]), *each[1:]) for each in shares])


@pytest.fixture(scope="module")
def lent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    made = cast(make_stage(tmp_path_factory.mktemp("lent"), API_KEY=OPERATOR_KEY))
    share(made)
    yield made
    made.app.close()


def assert_tells_nobody(stage: Stage, answer: Answer) -> None:
    """That it names no recipient, no single email, and none of the ids that open more."""
    told = answer.text + repr(answer.headers)
    people = (
        "ann@",
        "bob@",
        "reader@",
        "Secret",
        "Subject of",
        "203.0.113",
        "198.51.100",
        "mail-of-acme",
        "a-reader",
        "/emails",
        "/events",
    )
    for word in (stage.acme.id, stage.globex.id, *people):
        assert word not in told, word


@pytest.mark.parametrize("route", routes(tracker.SHARED, tracker.READER, tracker.WRITER))
def test_a_share_reads_numbers_without_people_and_nothing_else(lent: Stage, route: tracker.Route) -> None:
    before = everything(lent)
    for headers in ({}, bearer(OPERATOR_KEY), bearer(ACME_KEY)):
        answer = use(lent, route, lent.acme, headers, id=SHARE)
        assert answer.status == (404 if route.access != tracker.SHARED else 302 if route.pattern == "/{id}" else 200)
        assert_private(answer)
        assert_tells_nobody(lent, answer)
        assert_error(use(lent, route, lent.acme, headers, id=ENDED_SHARE), 404)
        assert_error(use(lent, route, lent.acme, headers, id=tracker.key_hash(SHARE)), 404)
        assert_error(use(lent, route, lent.globex, headers, id=SHARE), 404) if "{campaign}" in route.pattern else None
    assert everything(lent) == before


@pytest.mark.parametrize("route", routes(tracker.SHARED, tracker.READER, tracker.WRITER))
@pytest.mark.parametrize("query", ["", "?campaign=Spring/1", "?campaign=Winter", "?campaign=Spring/1&campaign=Winter"])
def test_a_share_of_one_campaign_tells_of_no_other(lent: Stage, route: tracker.Route, query: str) -> None:
    for campaign in ("Spring%2F1", "Winter", "campaign-of-acme"):
        answer = use(lent, route, lent.acme, id=SPRING_SHARE, campaign=campaign + query)
        assert_tells_nobody(lent, answer)
        told = re.sub("campaign=Winter", "", answer.text)  # which the query of a page keeps
        assert "Winter" not in told and "campaign-of" not in told
        if campaign != "Spring%2F1" and "{campaign}" in route.pattern:
            assert answer.status == 404
    whole = get(lent, target_of(lent, route, lent.acme, id=SPRING_SHARE) + query) if route.method == "GET" else None
    if whole and "{campaign}" not in route.pattern and query[:18] != "?campaign=Spring/1":
        assert whole.status == (302 if route.pattern in ("/{id}", "/{id}/dashboard") else 404)


def test_what_a_share_shows_is_what_the_dashboard_shows(lent: Stage) -> None:
    for path in (
        "stats.json",
        "campaigns.json",
        "links.json",
        "clients.csv",
        "campaigns/Winter.json",
        "stats.json?campaign=Winter",
    ):
        own, shared = (get(lent, f"/{id_}/{path}").text for id_ in (lent.acme.id, SHARE))
        moving = r"(\"(to|from|age_hours)\": .*)"
        # A query, or an address in the path, may name a reader.
        own = re.sub(r"(\?e=a-reader|/reader@|/a-reader%(25)?40)[^\"]*", "", own)
        assert re.sub(moving, "", own) == re.sub(moving, "", shared), path
    alone = json.loads(get(lent, f"/{SPRING_SHARE}/campaigns/Spring%2F1.json").text)
    whole = json.loads(get(lent, f"/{lent.acme.id}/campaigns/Spring%2F1.json").text)
    assert (
        alone["sent"] == whole["sent"]
        and alone["sent"]["opened"]["person"] + alone["sent"]["opened"]["unconfirmed"] == 1
    )
    assert whole["before"]["campaigns"] and alone["before"] is None


def test_links_on_a_shares_pages_stay_in_it_and_lead_somewhere(lent: Stage) -> None:
    """From page to page, as somebody would click, also the downloads."""
    for id_, least in ((SHARE, 12), (SPRING_SHARE, 3)):
        seen, waiting = set[str](), [f"/{id_}"]
        while waiting and len(seen) < 150:
            url = waiting.pop()
            if url.partition("#")[0] in seen:
                continue
            seen.add(url.partition("#")[0])
            answer = get(lent, url.partition("#")[0])
            assert answer.status in (200, 302), url
            assert_tells_nobody(lent, answer)
            links = re.findall(' href="([^"]+)"', answer.text) if "html" in answer["Content-Type"] else []
            for link in [*links, *([answer["Location"]] if answer.status == 302 else [])]:
                to = urljoin(url, html.unescape(link))
                assert to.startswith((f"/{id_}/", "/assets/", "/favicon.ico")), (url, link)
                waiting.append(to)
        assert len(seen) >= least
    assert (
        get(lent, f"/{SPRING_SHARE}/dashboard?range=7d")["Location"] == f"/{SPRING_SHARE}/campaigns/Spring%2F1?range=7d"
    )


KEYS = ("not-this-one", GLOBEX_KEY, "", ACME_KEY + "x", ACME_KEY.upper(), tracker.key_hash(ACME_KEY), "\xe9\xff")
HEADERS = ({"Authorization": ACME_KEY}, {"Authorization": f"Basic {ACME_KEY}"}, {"X-Api-Key": ACME_KEY})
WRONG_KEYS: tuple[dict[str, str], ...] = ({}, *map(bearer, KEYS), *HEADERS)


@pytest.mark.parametrize("route", routes(tracker.WRITER))
def test_writing_needs_the_tenants_key_once_there_is_one(staged: Callable[..., Stage], route: tracker.Route) -> None:
    stage = cast(staged(API_KEY=OPERATOR_KEY))
    stage.change(stage.acme, api_key_hash=tracker.key_hash(ACME_KEY))
    stage.change(stage.globex, api_key_hash=tracker.key_hash(GLOBEX_KEY))
    before = everything(stage)
    for headers in WRONG_KEYS:
        answer = use(stage, route, stage.acme, headers)
        assert "API key" in assert_error(answer, 401)
        assert answer["WWW-Authenticate"] == "Bearer"
    assert everything(stage) == before
    assert use(stage, route, stage.acme, {"Authorization": f"bearer  {ACME_KEY}"}).status in (200, 201)
    register(stage, stage.acme, tracker.Registration("mail-of-acme"))
    assert use(stage, route, stage.acme, bearer(OPERATOR_KEY)).status in (200, 201)


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
@pytest.mark.parametrize("api_key", ["", OPERATOR_KEY])
def test_the_operators_routes_need_the_operators_key(
    staged: Callable[..., Stage], api_key: str, route: tracker.Route
) -> None:
    stage = staged(API_KEY=api_key)
    stage.change(stage.acme, api_key_hash=tracker.key_hash(ACME_KEY))
    with stage.database.transaction() as connection:
        tracker.add_webhook(connection, tracker.Webhook(stage.acme.number, "https://crm.example.com/hook"), False)
    before = everything(stage)
    for headers in (*WRONG_KEYS, bearer("None"), bearer(ACME_KEY), {"Authorization": f"Basic {OPERATOR_KEY}"}):
        answer = use(stage, route, stage.acme, headers)
        assert_error(answer, 401 if api_key else 404)
        assert not api_key or answer["WWW-Authenticate"] == "Bearer"
    assert everything(stage) == before
    answer = use(stage, route, stage.acme, bearer(OPERATOR_KEY))
    assert answer.status in ((200, 201) if api_key else (404,))
    assert_private(answer)


@pytest.mark.parametrize("route", routes(tracker.SHARED, tracker.READER, tracker.WRITER))
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
        assert use(stage, route, stage.acme, host=host).status in (200, 201, 302)


def test_without_its_database_a_private_page_is_a_503(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    for connected in (False, True):  # a database that is removed under an open connection is as gone as any other
        with database_away(stage):
            for route in tracker.ROUTES:
                if route.access in (tracker.SHARED, tracker.READER, tracker.WRITER):
                    answer = use(stage, route, stage.acme)
                    assert "Hits are recorded all the same" in assert_error(answer, 503)
                    assert int(answer["Retry-After"]) > 0
                    assert str(stage.folder) not in answer.text
        assert stage.acme.id not in capsys.readouterr().out
        assert connected or get(stage, f"/{stage.acme.id}/stats.json").status == 200


# -- Methods and paths


@pytest.mark.parametrize("route", [param for param in routes() if param.values[0].method == "GET"])
def test_head_is_answered_like_get_without_a_body(played: Stage, route: tracker.Route) -> None:
    target, key = (
        target_of(played, route, played.acme),
        bearer(OPERATOR_KEY) if route.access == tracker.OPERATOR else {},
    )
    more = ("&" if "?" in target else "?") + "range=x&limit=x&after=x"  # what a route that knows it refuses
    for each in (target, target.replace(played.acme.id, "nobody"), target + more):
        got, head = get(played, each, key), call(played, "HEAD", each, headers=key)
        assert (head.status, head.headers) == (got.status, got.headers)
        assert head.body == b""
        if "Content-Length" in got:
            assert int(got["Content-Length"]) == len(got.body)
    assert get(played, target, key).status in (200, 302)  # a HEAD of an export has let go of its lock


@pytest.mark.parametrize("route", routes())
def test_another_method_is_refused_and_the_right_ones_named(played: Stage, route: tracker.Route) -> None:
    before = everything(played)
    target = target_of(played, route, played.acme)
    allowed = {each.method for each in tracker.ROUTES if each.pattern == route.pattern}
    allowed |= {"HEAD"} if "GET" in allowed else set()
    for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"} - allowed:
        answer = call(played, method, target, b"{}")
        assert_private(answer)
        if route.pattern == "/{id}":  # any word fits: nobody is told that there is something
            assert answer.status == 404
            continue
        assert answer.status == 405
        assert set(answer["Allow"].split(", ")) == allowed
    assert everything(played) == before


UNKNOWN = """
/nothing /Health /%2Fhealth /%2568ealth /health%00 /health%0A /assets/ /assets/style.css
/assets/..%2Ftracker.py /assets/../tracker.py /./{id}/dashboard
/{id}/../{id}/dashboard /{id}/Dashboard /{id}%2Fdashboard /{id}/dashboard%00 /{id}/emails.xml /{id}/tenants.json
/{mail_id}/pixel/a.png /{mail_id}/pixel/ /{mail_id}/pixel/a/b.gif /{mail_id}/click /{mail_id}/click/ /{mail_id}/click//
/{mail_id}/click/a/b //pixel/a.gif /{mail_id}%2Fpixel%2Fa.gif //evil.example /{mail_id}/pixel%2F/a.gif
//evil.example/dashboard/ //evil.example//{id}/dashboard/ ///{mail_id}/click//a/b
"""


def test_an_unknown_path_is_a_404(played: Stage) -> None:
    before = spooled(played)
    for target in UNKNOWN.format(id=played.acme.id, mail_id=played.acme.mail_id).split():
        assert get(played, target).status == 404, target
        assert call(played, "POST", target, b"{}").status in (404, 405)  # 405 where a GET might find something
    assert spooled(played) == before


@pytest.mark.parametrize("spell", [
    lambda path: path + "/", lambda path: "/" + path, lambda path: path.replace("/", "//"), lambda path: f"//{path}///",
])  # fmt: skip
@pytest.mark.parametrize("route", routes(tracker.ANYONE, tracker.SHARED, tracker.READER))
def test_a_slash_too_many_changes_nothing(played: Stage, route: tracker.Route, spell: Callable[[str], str]) -> None:
    target = target_of(played, route, played.acme)
    path, mark, query = target.partition("?")
    answer = get(played, spell(path) + mark + query)
    if route.access in (tracker.SHARED, tracker.READER) and "Location" in answer:  # pages have links that are relative
        assert answer["Location"] == (f"{path}/dashboard" if route.pattern == "/{id}" else target)
        answer = get(played, answer["Location"])
    wanted = get(played, f"{path}/dashboard" if route.pattern == "/{id}" else target)
    times = rb"\d+ seconds? ago|just now|\d{4}-\d\d-\d\dT[\d:.]+Z"
    without_times = [re.sub(times, b"", each.body) for each in (answer, wanted)]
    assert (answer.status, answer.headers) == (wanted.status, wanted.headers)
    assert without_times[0] == without_times[1]


def test_a_hit_with_slashes_too_many_is_counted(stage: Stage) -> None:
    link = tracker.click_path(stage.app.secrets[0], stage.acme.mail_id, "slashed", "https://acme.com//a//b/")
    for path in (f"//{stage.acme.mail_id}/pixel/slashed.gif", f"/{stage.acme.mail_id}//pixel///slashed.gif/"):
        assert get(stage, path)["X-Tracker"] == "recorded"
    for path in (f"{link}/", f"//{link}//?a=b", link.replace("/click/", "//click//")):
        assert get(stage, path)["Location"] == "https://acme.com//a//b/"  # what a link leads to is as it was
    assert (
        get(stage, f"/{stage.acme.mail_id}//click/slashed/?url=https://acme.com//c/")["Location"]
        == "https://acme.com//c/"
    )
    stage.drain()
    assert stage.rows("select type, count(*) from event_details where key = 'slashed' group by 1") == [(1, 2), (2, 4)]


@pytest.mark.parametrize("target", [
    "POST /{id}/mesages", "PUT /nothing", "DELETE /{id}/campaigns/x", "PATCH /{mail_id}/pixel/a.gif", "POST /",
    "GET /{id}/emails/a/b", "GET /{id}/emails.xml", "GET /{id}/messages/a", "GET /{id}/stats", "GET /tenants/acme/x/x",
    "HEAD /{id}/events.json/a", "GET /{id}/emails/nobody.json", "GET /nobody/stats.json", "GET /{id}/campains.json",
])  # fmt: skip
def test_programs_are_told_in_json_that_a_path_is_wrong(played: Stage, target: str) -> None:
    method, path = target.format(id=played.acme.id, mail_id=played.acme.mail_id).split()
    answer = call(played, method, path, b"{}" if method != "HEAD" else b"")
    assert answer.status in (404, 405)
    assert answer["Content-Type"].startswith("application/json")


def test_people_are_told_on_a_page_that_a_path_is_wrong(played: Stage) -> None:
    for path in (
        "/nobody/dashboard",
        f"/{played.acme.id}/emails/nobody",
        f"/{played.acme.id}/campaigns/nobody",
        "/a/b",
    ):
        assert get(played, path)["Content-Type"].startswith("text/html")


def test_a_path_is_decoded_once(stage: Stage) -> None:
    assert get(stage, "/%68ealth").status == 200
    assert get(stage, f"/{stage.acme.mail_id}/pix%65l/a%2Bb.gif")["X-Tracker"] == "recorded"
    stage.drain()
    assert stage.rows("select key from emails") == [("a+b",)]


# -- Addresses: what is believed of X-Forwarded-For, and what is kept

# By FORWARDED_ALLOW_IPS: who connects, what X-Forwarded-For says, and whose address it is.
PROXIES: dict[str, list[tuple[str, str | None, str]]] = {
    "127.0.0.1,::1": [
        ("198.51.100.7", None, "198.51.100.7"),
        ("198.51.100.7", "203.0.113.77", "198.51.100.7"),  # not a proxy of ours
        ("127.0.0.1", None, "127.0.0.1"),  # a proxy that says nothing
        ("127.0.0.1", "203.0.113.77", "203.0.113.77"),
        ("127.0.0.1", "6.6.6.6, 203.0.113.77", "203.0.113.77"),  # made up on the left
        ("127.0.0.1", "127.0.0.1, 203.0.113.77", "203.0.113.77"),  # a proxy made up on the left
        ("::1", "6.6.6.6,203.0.113.77", "203.0.113.77"),
        ("::ffff:127.0.0.1", "203.0.113.77", "203.0.113.77"),
        ("127.0.0.1", "203.0.113.77:4711", "203.0.113.77"),
        ("127.0.0.1", "[2001:db8:1:2::5]:443", "2001:db8:1:2::5"),
        ("127.0.0.1", "2001:DB8:1:2:0:0:0:5", "2001:db8:1:2::5"),
        ("127.0.0.1", "::ffff:203.0.113.77", "203.0.113.77"),
        ("127.0.0.1", "203.0.113.77, , ", "203.0.113.77"),
        ("127.0.0.1", "203.0.113.77, unknown", ""),
        ("127.0.0.1", "203.0.113.77, 1.2.3.4.5", ""),
        ("127.0.0.1", "\xff\xfe", ""),
        ("", "6.6.6.6, 203.0.113.77", "203.0.113.77"),  # a unix socket
        ("", None, ""),
    ],
    "10.0.0.0/8": [
        ("10.0.0.1", "6.6.6.6, 203.0.113.77, 10.2.3.4", "203.0.113.77"),  # two proxies
        ("10.0.0.1", "10.9.9.9, 10.1.1.1", "10.9.9.9"),  # proxies only
        ("127.0.0.1", "203.0.113.77", "127.0.0.1"),  # loopback is not on the list
    ],
    "*": [
        ("198.51.100.7", "6.6.6.6, 203.0.113.77", "203.0.113.77"),
        ("198.51.100.7", None, "198.51.100.7"),
    ],
}


@pytest.mark.parametrize("proxies", PROXIES)
def test_the_address_that_is_kept_is_the_clients(staged: Callable[..., Stage], proxies: str) -> None:
    stage = staged(FORWARDED_ALLOW_IPS=proxies, IP_ADDRESSES="full")
    for n, (peer, forwarded, _) in enumerate(PROXIES[proxies]):
        headers = {} if forwarded is None else {"X-Forwarded-For": forwarded}
        get(stage, f"/{stage.acme.mail_id}/pixel/e{n}.gif", headers, REMOTE_ADDR=peer)
    clients = [client for *_, client in PROXIES[proxies]]
    assert [line["ip"] for line in spooled(stage)] == clients
    stage.drain()
    assert [row[0] for row in stage.rows("select coalesce(address, '') from event_details order by id")] == clients


KEPT = {
    **dict.fromkeys(("", "truncated"), ("203.0.113.0", "203.0.113.0", "2001:db8:1::", "")),  # nobody in particular
    "full": ("203.0.113.77", "203.0.113.77", "2001:db8:1:2::5", ""),
    "none": ("",) * 4,
}


@pytest.mark.parametrize("setting", KEPT)
def test_an_address_is_cut_before_anything_is_written(staged: Callable[..., Stage], setting: str) -> None:
    stage = staged(**({"IP_ADDRESSES": setting} if setting else {}))
    for n, address in enumerate(("203.0.113.77", "::ffff:203.0.113.77", "2001:db8:1:2::5", "made up")):
        get(stage, f"/{stage.acme.mail_id}/pixel/e{n}.gif", REMOTE_ADDR=address)
        get(stage, f"/{stage.acme.mail_id}/pixel/e{n}x.gif", {"X-Forwarded-For": address}, REMOTE_ADDR="127.0.0.1")
    twice = [address for address in KEPT[setting] for _ in range(2)]
    assert [line["ip"] for line in spooled(stage)] == twice
    stage.drain()
    assert [row[0] for row in stage.rows("select coalesce(address, '') from event_details order by key")] == twice


@pytest.mark.parametrize("setting", ["truncated", "full", "none"])
def test_a_hit_from_an_own_address_is_set_aside_however_it_is_cut(staged: Callable[..., Stage], setting: str) -> None:
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


# -- The unforeseen


def test_the_unforeseen_is_a_bare_500_and_a_traceback_in_the_log(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(app: tracker.App, request: tracker.Request, tenant: tracker.Tenant) -> tracker.Response:
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(tracker, "ROUTES", (tracker.Route("GET", "/{id}/broken", broken, tracker.READER),))
    for method in ("GET", "HEAD"):
        answer = call(stage, method, f"/{stage.acme.id}/broken?recipient=reader@example.org", unforeseen=True)
        assert answer.status == 500
        assert_private(answer)
        assert b"mistake of ours" not in answer.body and b"Traceback" not in answer.body
        assert "Traceback" in answer.errors and "ZeroDivisionError: a mistake of ours" in answer.errors
        assert stage.acme.id not in answer.errors and "reader@example.org" not in answer.errors
        assert call(stage, method, "/nothing").status == 404  # and it goes on


def test_a_header_with_a_line_break_never_leaves_the_server(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(app: tracker.App, request: tracker.Request) -> tracker.Response:
        return tracker.Response(200, [("Content-Type", "text/plain\r\nX-Evil: 1")], b"")

    monkeypatch.setattr(tracker, "ROUTES", (tracker.Route("GET", "/broken", broken, tracker.ANYONE),))
    with pytest.raises(ValueError, match="line break"):
        get(stage, "/broken")


@pytest.mark.parametrize("name", ["Host", "User-Agent", "Authorization", "X-Forwarded-For"])
def test_a_header_that_no_server_should_have_let_through_is_refused(stage: Stage, name: str) -> None:
    for junk in ("a\r\nX-Evil: 1", "a\nb", "a\0b"):
        assert_error(get(stage, f"/{stage.acme.mail_id}/pixel/e1.gif", {name: junk}), 400)
    assert spooled(stage) == []
