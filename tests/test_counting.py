"""Counting: the same numbers whatever the order, roll-ups that equal their recount, and nothing left of what is removed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import webtest
from conftest import CHROME, NOW, ON_SQLITE, Stage, a_third, click, faults_of, hit, make_stage, segment

import tracker

BOTH_ENGINES = True

HOUR = 3_600_000
DAY = 24 * HOUR
QUARTER = 900_000
GOOGLE = "Mozilla/5.0 (Windows NT 5.1; rv:11.0) Gecko Firefox/11.0 (via ggpht.com GoogleImageProxy)"
OUTLOOK = "Microsoft Office/16.0 (Windows NT 10.0; Microsoft Outlook 16.0.17928; Pro)"
APPLE = "Mozilla/5.0"  # what Apple's privacy proxy sends: nobody can tell whether a person looked
CURL = "curl/8.5.0"
IPHONE = "Mozilla/5.0 (iPhone; CPU iPhone OS 18_6 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Mobile/15E148"
OLD_CHROME = "Mozilla/5.0 (Windows NT 10.0) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/80.0.1 Safari/537.36"
NAMED: dict[str, Any] = {"answer": "named", "why": "destination-not-allowed"}  # a click that met the naming page


IF_NEW = "on conflict do nothing"


# -- Databases, compared by what they say

# Each table without its row ids: what stands for them is joined in. Rows of roll-ups that say nothing but zero are no rows.
LOGICAL = {
    "emails": "select tenant, key, subject, recipient, campaign, registered, created_at, sent_at, delivered_at, time_said,"
    " links, search from emails",
    "events": "select tenant, key, type, at, agent, address, url, method, purpose, own, fixed, verdict, reason"
    " from event_details",
    "email_counts": "select tenant, key, email_counts.* from email_counts join emails on emails.id = email",
    "link_counts": "select emails.tenant, key, urls.url, link_counts.*"
    " from link_counts join emails on emails.id = email join urls on urls.id = link_counts.url",
    "reasons": "select tenant, grain, time, type, verdict, reason, hits from reasons"
    " join judgements on judgements.id = judgement",
    "links": "select links.tenant, urls.url, host, links.* from links join urls on urls.id = links.url",
    **{
        table: f"select * from {table}"
        for table in ("uniques", "cohorts", "campaigns", "campaign_times", "clients", "named_hosts")
    },
    "campaign_hits": "select tenant, campaign, type, verdict, reason, client, device, hits from campaign_hits"
    " join judgements on judgements.id = judgement",
    "dropped": "select * from dropped",
    "urls": "select tenant, urls.url as target, host from urls",
    "tenants": "select name, id_in_mail_at from tenants",
}

Content = dict[str, list[tuple[Any, ...]]]


def content(database: tracker.Database) -> Content:
    """What a database says, whatever the numbers of its rows."""
    found: Content = {}
    with database.reading() as connection:
        for name, sql in LOGICAL.items():
            cursor = connection.execute(sql)
            names = [column[0] for column in cursor.description]
            kept = [n for n, column in enumerate(names) if column != "email" and not (column == "url" in names[:n])]
            numbers = [n for n in kept if name in tracker.ROLLUPS and names[n] in tracker.ROLLUPS[name].numbers]
            rows = [tuple(row[n] for n in kept) for row in cursor if not numbers or any(row[n] for n in numbers)]
            found[name] = sorted(rows, key=repr)
    return found


def stats_of(database: tracker.Database, tenant: tracker.Tenant) -> dict[str, Any]:
    """What stats.json says at a time a week after the hits."""
    with database.reading() as connection:
        period = tracker.period_of(connection, tenant, {"range": "all", "tz": "Europe/Rome"}, NOW + 7 * DAY)
        return tracker.stats_json(tracker.read_stats(connection, tenant, period), tenant.name, 0)


@pytest.fixture(autouse=True)
def checked(stage: Stage) -> Iterator[None]:
    """Whatever a test of this file does, check finds nothing wrong in the end."""
    yield


def register(stage: Stage, *emails: tracker.Registration, at: int = NOW, tenant: tracker.Tenant | None = None) -> int:
    """Register emails of Acme, or of another tenant."""
    with stage.database.transaction() as connection:
        return tracker.register_emails(connection, (tenant or stage.acme).number, emails, at)


def count(stage: Stage, *lines: bytes) -> None:
    """Drain these lines."""
    segment(stage, *lines)
    report = stage.drain()
    assert (report.hits, report.rejected, report.troubles) == (len(lines), 0, [])


def unique(stage: Stage, type_: int = tracker.OPEN) -> list[tuple[Any, ...]]:
    """Where Acme's emails are unique: quarter (counted from NOW's), state and number."""
    sql = "select time - ?, state, emails from uniques where tenant = ? and grain = 0 and type = ? and emails > 0 order by 1, 2"
    return stage.rows(sql, NOW // QUARTER, stage.acme.number, type_)


def sums(stage: Stage, table: str, key: Any) -> dict[str, int]:
    """The numbers of one of Acme's cohorts or campaigns that are not zero."""
    column = {"cohorts": "grain = 0 and time", "campaigns": "campaign"}[table]
    columns = ("emails", *tracker.GROUP_COLUMNS)
    rows = stage.rows(
        f"select {', '.join(columns)} from {table} where tenant = ? and {column} = ?", stage.acme.number, key
    )
    return {name: number for row in rows for name, number in zip(columns, row, strict=True) if number}


# -- Order


@dataclass(frozen=True)
class Mail:
    """A registration that is made at some moment among the hits."""

    tenant: tracker.Tenant
    email: tracker.Registration
    at: int


class Season:
    """Hundreds of hits of every kind, and the registrations of the mail they belong to; always the same."""

    def __init__(self, stage: Stage, home: Path) -> None:
        self.stage, self._home = stage, home
        dice = random.Random(20261124)
        machines = (CURL, "", "Barracuda Sentinel (EE)", "Mozilla/5.0 (short)")
        agents = (*(CHROME, IPHONE, OLD_CHROME, OUTLOOK, GOOGLE, APPLE) * 3, *machines)
        pages = ("", "shoes?size=42", "b", "%C3%A9")
        urls = [f"https://acme.com/{page}" for page in pages]
        self.lines: list[bytes] = []
        for number in range(700):
            tenant = dice.choice((stage.acme, stage.acme, stage.globex))
            key = f"e{dice.randrange(14)}"  # e0 to e9 are registered, by either tenant or by both
            # Mostly close to others, so that they are judged together; some in the same second, or the same moment.
            at = NOW + dice.randrange(-3 * DAY, 3 * DAY)
            if dice.random() < 0.8:
                at = NOW + dice.randrange(-2, 2) * DAY + dice.choice((0, 0, QUARTER, 3 * QUARTER))
                at += dice.choice((0, 500, dice.randrange(4_000), dice.randrange(40_000), dice.randrange(QUARTER)))
            more: dict[str, Any] = {
                "id": f"{number:024x}",
                "ua": dice.choice(agents),
                "ip": dice.choice(("198.51.100.0", "203.0.113.7", "40.107.3.0", "2001:db8::", "")),
                **({"own": True} if dice.random() < 0.05 else {}),
                "method": dice.choice(("GET",) * 6 + ("HEAD",)),
                "purpose": dice.choice(("",) * 6 + ("prefetch", "prefetch;prerender")),
            }
            if dice.random() < 0.45:
                url, signed, luck = dice.choice(urls), f"/{tenant.mail_id}/click/{key}/{'s' * 16}/", dice.random()
                more |= {"uri": f"/{tenant.mail_id}/click/{key}?url={url}", "answer": "302"}
                if luck < 0.2:
                    host = dice.choice(("other.example", "evil.example"))
                    more["uri"] = f"/{tenant.mail_id}/click/{key}?url=https://{host}/{dice.randrange(3)}"
                    more |= {"answer": "named", "why": dice.choice(("destination-not-allowed", "destination-blocked"))}
                elif luck < 0.36:
                    more["uri"] = signed + tracker.encode_target(url)
                elif luck < 0.42:
                    more |= {"uri": signed + tracker.encode_target(tracker.HIDDEN_TARGET), "answer": "hidden"}
                elif luck < 0.48:
                    more["answer"] = "404"
            else:
                more["uri"] = f"/{tenant.mail_id}/pixel/{key}.gif"
                if dice.random() < 0.15:
                    strange = (f"{tenant.id}/pixel/{key}", "nobody00/pixel/e1", f"{tenant.mail_id}/pixel/a%20b")
                    more["uri"] = f"/{dice.choice(strange)}.gif"
            self.lines.append(hit(stage, key, at, **more))
        quiet = NOW + 5 * DAY  # what chance seldom makes
        self.lines += [
            click(stage, "e13", "https://acme.com/e13", quiet, id="echo1"),
            click(stage, "e13", "https://acme.com/e13", quiet + 6_000, id="echo2", ua=IPHONE, ip="203.0.113.7"),
            click(stage, "e12", at=quiet, id="head1", method="HEAD"),
            click(stage, "e12", at=quiet + 6_000, id="head2"),
            click(stage, "e1", at=NOW - 400, id="soon"),
            *(click(stage, "e10", f"https://acme.com/{n}", quiet + n * 300, id=f"burst{n}") for n in range(3)),
            *(hit(stage, "e11", quiet + n * 6_000, id=f"again{n}", ua=GOOGLE, ip="") for n in range(5)),
        ]
        self.mail = [
            Mail(
                tenant,
                tracker.Registration(
                    f"e{n}",
                    f"Subject {n}",
                    f"reader{n}@example.com",
                    dice.choice(("", "spring", "autumn")),
                    sent_at=NOW - 1_000 if n % 4 == 1 else None,
                    delivered_at=NOW + 500 if n % 4 == 2 else None,
                    links=dice.choice((None, 3, 4)),
                ),
                NOW + n * 7 * QUARTER - DAY,
            )
            for tenant in (stage.acme, stage.globex)
            for n in range(10)
            if n % 3 or tenant is stage.acme
        ]
        stage.app.close()  # so that all of the database is in its one file, and nobody has it open

    @contextlib.contextmanager
    def played(self, seed: int, registered: str) -> Iterator[tracker.Database]:
        """A copy of the stage that drained all hits, in an order, batches and segments that the seed gives."""
        copied = self.stage.copied(self._home / f"order{seed}")
        with copied as settings, contextlib.closing(tracker.open_database(settings)) as database:
            self._play(database, seed, registered)
            yield database

    def _play(self, database: tracker.Database, seed: int, registered: str) -> None:
        dice = random.Random(seed)
        lines = dice.sample(self.lines, len(self.lines))
        mail = dice.sample(self.mail, len(self.mail))
        pieces = sorted(dice.sample(range(1, len(lines)), 6))
        moments = {"before": [0] * len(mail), "after": [len(pieces)] * len(mail)}.get(
            registered, [dice.randrange(len(pieces) + 1) for _ in mail]
        )
        for piece, (start, end) in enumerate(zip([0, *pieces], [*pieces, len(lines)], strict=True)):
            if registered != "after":
                self._register(database, [each for each, moment in zip(mail, moments, strict=True) if moment == piece])
            name = f"{NOW + dice.randrange(1000):013d}-1-{seed:04x}{piece:04x}.jsonl"
            Path(database.spool, name).write_bytes(b"".join(lines[start:end]))
            if dice.random() < 0.6 or piece == len(pieces):  # else it is drained together with the next
                batch = max(dice.choice((1, 3, 10, 40, 1000)), 40 * database.is_shared)  # there each takes its time
                assert tracker.drain(database, batch=batch).troubles == []
        if registered == "after":
            self._register(database, mail)

    def outcome(self, seed: int, registered: str) -> tuple[Content, list[dict[str, Any]]]:
        """What comes of all hits in such an order; and that check finds no fault in it."""
        with self.played(seed, registered) as database:
            assert faults_of(database) == [], seed
            return content(database), [stats_of(database, each) for each in (self.stage.acme, self.stage.globex)]

    def _register(self, database: tracker.Database, mail: Iterable[Mail]) -> None:
        with database.transaction() as connection:
            for each in mail:
                tracker.register_emails(connection, each.tenant.number, [each.email], each.at)


def judge_together(monkeypatch: pytest.MonkeyPatch, hits: int) -> None:
    """Let sessions have no more hits than that, and crowded ones no larger a neighbourhood than is read then."""
    monkeypatch.setattr(tracker, "MAX_SESSION", hits)
    monkeypatch.setattr(tracker, "CROWD_NEAR", min(hits // 2 - 2, tracker.CROWD_NEAR))


@pytest.mark.parametrize("together", [256, ON_SQLITE(50), ON_SQLITE(8), 6])
def test_the_same_hits_and_registrations_in_any_order_give_the_same_database(
    stage: Stage, memory: Path, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    """Also where sessions have more hits than are judged together; and PostgreSQL makes the same of them as SQLite."""
    judge_together(monkeypatch, together)
    season, plain = Season(stage, memory), Season(make_stage(memory / "plain"), memory / "plain")
    seen = Counter(json.loads(line)["id"] for line in season.lines)
    assert len(seen) == len(season.lines)
    whole = plain.outcome(0, "before")
    # The season has something of everything, or it would prove little.
    found, stats = whole
    assert all(found.values())
    assert len(found["events"]) + sum(row[-1] for row in found["dropped"]) == len(season.lines)
    assert {row[-2] for row in found["events"]} == set(tracker.VERDICT_STATES)
    reasons = {"repeat", "after-scanner", "echo", "with-head", "with-hidden-link", "too-soon"}
    assert {row[-1] for row in found["events"]} >= {*reasons, "own-address", "burst"}
    dropped = {"unknown-tenant", "dashboard-id", "bad-key", "not-redirected"}
    assert {row[1] for row in found["dropped"]} == dropped
    assert {row[5] for row in found["emails"]} == {0, 1}
    assert all(one["naming_page"] for one in stats)
    for seed in range(1, 4) if stage.settings.is_shared else a_third(range(1, 25)):
        assert season.outcome(seed, ("before", "after", "among")[seed % 3]) == whole, seed
    plain.stage.app.close()


@pytest.mark.parametrize("together", [256, ON_SQLITE(8), ON_SQLITE(6)])
def test_a_few_hits_about_a_pause_between_sessions_are_judged_alike_in_whatever_order_they_are_drained(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    """A late one may make one session of two. Each order is an email of its own; what is drained is one hit of each."""
    judge_together(monkeypatch, together)
    dice = random.Random(20261125)
    orders = 8
    steps: list[list[bytes]] = [[] for _ in range(6)]
    for case in range(250):
        hits: list[tuple[Callable[..., bytes], dict[str, Any]]] = []
        for _ in range(dice.randrange(2, 9)):
            at = NOW + dice.choice((0, 8, 14, 16, 24)) * 60_000 + dice.choice((0, 0, 1, 900, 5_000, 59_000))
            agent = dice.choice((CHROME, CHROME, CHROME, IPHONE, CURL))
            said = {"at": at, "ua": agent, "ip": dice.choice(("192.0.2.7", "192.0.2.8"))}
            if dice.random() < 0.6:
                hits.append((click, {"url": f"https://acme.com/{dice.randrange(2)}", **said}))
            else:
                hits.append((hit, said))
        for order in range(orders):
            in_order = sorted(hits, key=lambda each: each[1]["at"]) if not order else dice.sample(hits, len(hits))
            for make, said in in_order:
                step = steps[0 if not order else dice.randrange(6)]
                step.append(make(stage, f"case{case}-{order}", **said))
    monkeypatch.setitem(tracker.A_DAY, "unregistered", 500 * orders)
    for step in steps:
        count(stage, *step)
        assert stage.check() == []
    found: dict[str, list[tuple[Any, ...]]] = {}
    for key, *event in stage.rows("select key, at, type, url, address, agent, verdict, reason from event_details"):
        found.setdefault(key, []).append(tuple(event))
    assert len(found) == 250 * orders
    for key, events in found.items():
        assert sorted(events, key=repr) == sorted(found[f"{key.partition('-')[0]}-0"], key=repr), key


MINUTES = [NOW + minute * 60_000 for minute in range(tracker.MAX_SESSION)]


@pytest.mark.parametrize("last", [(50,), (69, 59)], ids=["grows", "is made of two"])
def test_a_session_that_becomes_too_long_is_judged_as_one_whose_hits_came_at_once(
    stage: Stage, last: tuple[int, ...]
) -> None:
    at = [*MINUTES, *(NOW + minute * 60_000 for minute in last)]
    count(stage, *(click(stage, "at-once", at=each) for each in at))
    count(stage, *(click(stage, "one-by-one", at=each) for each in MINUTES))
    for each in at[len(MINUTES) :]:
        count(stage, click(stage, "one-by-one", at=each))
    found = stage.rows("select key, reason, count(*) from event_details group by 1, 2 order by 1")
    assert found == [(key, "crowded", len(at)) for key in ("at-once", "one-by-one")]


@pytest.mark.sqlite
def test_a_session_is_read_in_one_statement_and_a_long_one_in_two_however_many_emails_there_are(stage: Stage) -> None:
    def reads(*lines: bytes) -> int:
        said: list[str] = []
        with stage.database.reading() as connection:
            connection.set_trace_callback(said.append)
        count(stage, *lines)
        connection.set_trace_callback(None)
        return sum("cross join events" in sql for sql in said)

    assert [reads(*(hit(stage, f"e{n}", at) for n in range(9))) for at in MINUTES] == [0] + 30 * [1] + 19 * [2]


@pytest.mark.parametrize("batch", [ON_SQLITE(1), 7, 4_000])
@pytest.mark.parametrize("methods", [("GET",), ("HEAD", "GET")], ids=["get", "head-and-get"])
@pytest.mark.parametrize("links", [40, 70, 300])
def test_a_sweep_of_links_is_no_persons_however_long_it_is(
    stage: Stage, links: int, methods: tuple[str, ...], batch: int
) -> None:
    step = 1_000 / (links * len(methods))
    lines = [
        click(stage, "e1", f"https://acme.com/{n}", NOW + int((n * len(methods) + m) * step), method=method)
        for n in range(links)
        for m, method in enumerate(methods)
    ]
    segment(stage, *lines)
    assert tracker.drain(stage.database, batch=batch).hits == len(lines)
    assert stage.rows("select distinct verdict from event_details") == [("scanner",)]


# -- Uniques


def test_an_email_is_unique_under_its_best_state_at_the_time_it_first_had_it(stage: Stage) -> None:
    register(stage, tracker.Registration("e1"))
    machine, unconfirmed, person = tracker.MACHINE, tracker.UNCONFIRMED, tracker.PERSON
    for quarter, agent, expected in (
        *((5, CURL, (5, machine)), (6, APPLE, (6, unconfirmed)), (7, CHROME, (7, person))),
        *((8, CHROME, (7, person)), (1, CURL, (7, person)), (2, CHROME, (2, person))),
    ):
        count(stage, hit(stage, "e1", NOW + quarter * QUARTER, ua=agent))
        assert unique(stage) == [(*expected, 1)]
    assert sums(stage, "cohorts", NOW // QUARTER) == {"emails": 1, "opened_person": 1}


def test_clicks_are_unique_by_email_and_by_link_in_an_email(stage: Stage) -> None:
    register(stage, tracker.Registration("e1"), tracker.Registration("e2"))
    shoes, hats = "https://acme.com/shoes", "https://acme.com/hats"
    count(
        stage,
        click(stage, "e1", shoes, NOW, ua=CURL, ip="203.0.113.0"),
        click(stage, "e1", shoes, NOW + 20_000),
        click(stage, "e1", shoes, NOW + 40_000),
        click(stage, "e1", hats, NOW + 60_000),
        click(stage, "e2", shoes, NOW),
        click(stage, "e2", hats, NOW + 20_000, ua=CURL),
    )
    assert unique(stage, tracker.CLICK) == [(0, tracker.PERSON, 2)]
    columns = "clicks_person, clicks_unconfirmed, clicks_machine, emails_person, emails_unconfirmed, emails_machine"
    rows = stage.rows(f"select urls.url, {columns} from links join urls on urls.id = links.url order by 1")
    assert rows == [(hats, 1, 0, 1, 1, 0, 1), (shoes, 3, 0, 1, 2, 0, 0)]


def test_a_click_that_met_the_naming_page_is_in_no_rate_and_counted_by_its_host(stage: Stage) -> None:
    register(stage, tracker.Registration("e1", campaign="spring"))
    count(stage, *[click(stage, "e1", f"https://other.example/{n}", NOW + n, **NAMED) for n in range(3)])
    assert unique(stage, tracker.CLICK) == []
    assert sums(stage, "campaigns", "spring") == {"emails": 1}
    assert [row[1:-1] for row in stage.rows("select * from email_counts")] == [(0, None) * 6]
    assert stage.rows(f"select * from links where {' + '.join(tracker.LINK_COLUMNS)} > 0") == []
    sql = "select host, reason, clicks from named_hosts"
    assert stage.rows(sql) == [("other.example", "destination-not-allowed", 3)]


# -- Registration


def test_an_email_registered_after_its_hits_moves_from_the_unregistered_to_its_cohort(stage: Stage) -> None:
    count(stage, hit(stage, "e1", NOW), click(stage, "e1", at=NOW + 1))
    opened = {"emails": 1, "opened_person": 1, "clicked_person": 1}
    assert sums(stage, "cohorts", tracker.NO_QUARTER) == opened
    assert register(stage, tracker.Registration("e1", campaign="spring"), at=NOW + 3 * QUARTER) == 1
    assert sums(stage, "cohorts", tracker.NO_QUARTER) == {}
    assert sums(stage, "cohorts", NOW // QUARTER + 3) == opened
    assert sums(stage, "campaigns", "spring") == opened


def test_an_email_is_created_when_it_is_registered_and_else_at_its_earliest_hit(stage: Stage) -> None:
    register(stage, tracker.Registration("e1"), at=NOW)
    for at in (NOW, NOW + HOUR, NOW - HOUR):
        count(stage, *(hit(stage, key, at) for key in ("e1", "e2", "e3")))
    register(stage, tracker.Registration("e2"), at=NOW)
    register(stage, tracker.Registration("e1", sent_at=NOW + HOUR), at=NOW + DAY)
    found = stage.rows("select key, created_at, sent_at from emails order by key")
    assert found == [("e1", NOW, NOW + HOUR), ("e2", NOW, NOW), ("e3", NOW - HOUR, None)]


def test_an_email_registered_again_keeps_its_time_and_moves_to_its_new_campaign(stage: Stage) -> None:
    first = tracker.Registration("e1", "Hello", "ann@example.com", "spring")
    assert register(stage, first) == 1
    count(stage, hit(stage, "e1", NOW + 1), click(stage, "e1", at=NOW + 2, ua=CURL))
    assert register(stage, first._replace(campaign="autumn", subject="Hello again"), at=NOW + DAY) == 0
    numbers = {"emails": 1, "opened_person": 1, "clicked_machine": 1}
    assert sums(stage, "campaigns", "spring") == {}
    assert sums(stage, "campaigns", "autumn") == numbers
    assert sums(stage, "cohorts", NOW // QUARTER) == numbers
    assert sums(stage, "cohorts", (NOW + DAY) // QUARTER) == {}
    assert stage.rows("select subject, sent_at from emails") == [("Hello again", NOW)]
    register(stage, first._replace(campaign=""), at=NOW + DAY)
    assert sums(stage, "campaigns", "autumn") == {}


def test_an_email_registered_twice_at_once_is_counted_as_if_one_had_come_after_the_other(stage: Stage) -> None:
    """Each time of delivery changes what its clicks are, the second one anew what the first one made of them."""
    links = [click(stage, f"e{n}", at=NOW + 1_000) for n in range(3)]
    count(stage, *links)
    times = {"e0": (NOW, NOW), "e1": (NOW, NOW - HOUR), "e2": (NOW - HOUR, NOW)}
    twice = [tracker.Registration(key, delivered_at=at) for key, both in times.items() for at in both]
    assert register(stage, *twice, at=NOW - DAY) == 3
    found = stage.rows("select key, reason from event_details order by key")
    assert found == [("e0", "too-soon"), ("e1", "browser"), ("e2", "too-soon")]
    numbers = {"emails": 3, "clicked_person": 1, "clicked_machine": 2, "click_only": 1}
    assert sums(stage, "cohorts", (NOW - DAY) // QUARTER) == numbers


def from_networks(stage: Stage, campaign: str = "", at: int = NOW, **networks: int) -> None:
    """So many new keys from each network, whose name is the second part of its addresses."""
    more = f"?campaign={campaign}" if campaign else ""
    for name, keys in networks.items():
        uris = (f"/{stage.acme.mail_id}/pixel/{name}-{at // DAY}-{n}.gif{more}" for n in range(keys))
        count(stage, *(hit(stage, "", at, uri=uri, ip=f"198.{name[1:]}.7.0") for uri in uris))


def made(stage: Stage) -> dict[str, int]:
    """How many unregistered emails each network made."""
    return Counter(key.partition("-")[0] for (key,) in stage.rows("select key from emails where registered = 0"))


def test_beyond_the_limit_of_a_hits_day_unknown_keys_are_only_counted(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert f"at most {tracker.A_DAY['unregistered']:,} a day" in tracker.resource("templates/help/numbers.txt").decode()
    monkeypatch.setitem(tracker.A_DAY, "unregistered", 8)
    register(stage, tracker.Registration("known"))
    from_networks(stage, n1=10, n2=10)
    from_networks(stage, at=NOW + DAY, n1=10)
    from_networks(stage, n3=10, n1=10)
    assert made(stage) == {"n1": 8, "n2": 2, "n3": 1}  # of each day, each has half of what the others leave
    globex = f"/{stage.globex.mail_id}/pixel/theirs.gif"
    count(stage, hit(stage, "", uri=globex), hit(stage, "known"))  # another tenant's limit is its own
    dropped = stage.rows("select tenant, reason, day, hits from dropped order by day")
    limit = stage.acme.number, "unregistered-limit"
    assert dropped == [(*limit, NOW // DAY, 6 + 8 + 9 + 6), (*limit, NOW // DAY + 1, 6)]
    register(stage, tracker.Registration(f"n1-{NOW // DAY}-9"))  # who registers is never held back
    count(stage, hit(stage, f"n1-{NOW // DAY}-9", NOW + 2))
    assert sums(stage, "cohorts", NOW // QUARTER) == {"emails": 2, "opened_person": 2}


def test_a_tenant_has_a_limit_of_its_own_where_it_was_given_one(stage: Stage) -> None:
    stage.change(stage.acme, unregistered_a_day=4)
    from_networks(stage, n1=9)
    assert made(stage) == {"n1": 2}


@pytest.mark.parametrize("kept", [True, False], ids=["addresses", "no addresses"])
def test_forged_keys_take_no_declared_campaigns_readers_away(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    monkeypatch.setitem(tracker.A_DAY, "unregistered", 1_000)
    stage.web.post_json(f"/{stage.acme.id}/campaigns", {"campaign": "Spring", "sent": 200})
    path = f"/{stage.acme.mail_id}/pixel/{{}}.gif?campaign=Spring"
    proxies = ["64.233.1.0", "64.233.2.0", "64.233.3.0"]

    def came(key: str, address: str, agent: str) -> bytes:
        return hit(stage, "", uri=path.format(key), ip=address if kept else "", ua=agent)

    count(stage, *(came(f"forged{n}", "198.51.100.0", "Forger/1.0") for n in range(1_200)))
    proxied = [came(f"reader{n}", proxies[n % 3], f"Proxy/{n % 3}") for n in range(120)]
    others = [came(f"reader{n}", f"203.0.{n}.0", f"{CHROME} {n % 40}") for n in range(120, 200)]
    count(stage, *proxied)
    count(stage, *others)
    readers = "select count(*) from events join emails on emails.id = email where key like 'reader%'"
    assert stage.rows(readers) == [(200,)]


# Something new of each kind in the n-th hit, what is stored of it then, and the mark of a hit that is without it.
MADE_UP: dict[str, tuple[Callable[..., bytes], str, int]] = {
    "agent": (lambda stage, n, **more: hit(stage, "r1", ua=f"{OUTLOOK} {n}", **more), "select agent from agents", 1),
    "url": (lambda stage, n, **more: click(stage, "u1", f"https://x.com/{n}", **more), "select url from urls", 1),
    "campaign": (
        lambda stage, n, **more: hit(stage, "", uri=f"/{stage.acme.mail_id}/pixel/u{n}.gif?campaign=c{n}", **more),
        "select campaign from campaigns",
        0,
    ),
}


@pytest.mark.parametrize("what", MADE_UP)
def test_beyond_the_limit_of_a_hits_day_what_strangers_make_up_is_other(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    make, stored, fixed = MADE_UP[what]
    register(stage, tracker.Registration("r1"), at=NOW - 9 * DAY)
    told = re.sub(r"\s+", " ", tracker.resource("templates/help/keep.txt").decode())
    assert f"{tracker.A_DAY[what]:,} {what}" in told.replace("user agents", "agents").replace("plain URLs", "urls")
    monkeypatch.setitem(tracker.A_DAY, what, 20)
    for n in range(60):  # an hour apart, of several days, from as many networks; a batch each
        count(stage, make(stage, n, at=NOW + n * HOUR, ip=f"198.{n}.7.0"))
    days = Counter((NOW + n * HOUR) // DAY for n in range(60))
    whole = sum(min(number, 20) for number in days.values())
    found = [row[0] for row in stage.rows(stored)]
    assert (len(found), found.count("other")) == (whole + 1, 1)
    over = "select day, hits from dropped where reason = ? order by day"
    beyond = stage.rows(over, f"{what}-limit")
    assert dict(beyond) == {day: number - 20 for day, number in days.items() if number > 20}
    verdicts = "select distinct verdict, reason from event_details"
    before = stage.rows(verdicts)
    assert len(before) == 1  # by the whole text, whatever is stored of it
    assert stage.rows("select sum(fixed) from events") == [(fixed * (60 - whole),)]
    with stage.database.transaction() as connection:
        assert tracker.rejudge_emails(connection, 0, 0, 100) is not None
    assert stage.rows(verdicts) == before
    count(stage, make(stage, 0, at=NOW + 59 * HOUR))  # what is stored already goes on being told
    assert stage.rows(over, f"{what}-limit") == beyond


def test_of_what_may_be_made_up_one_network_leaves_others_their_half(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tracker.A_DAY, "agent", 200)  # of whose first tenth no network is asked
    count(stage, *(hit(stage, "e1", NOW + n, ua=f"Forger {n}") for n in range(400)))
    assert stage.rows("select count(*) from agents where agent like 'Forger%'") == [(110,)]
    count(stage, *(hit(stage, "e2", NOW + n, ua=f"Reader {n}", ip="203.0.113.0") for n in range(40)))
    assert stage.rows("select count(*) from agents where agent like 'Reader%'") == [(40,)]


def test_urls_that_were_signed_and_the_first_of_a_registered_email_are_under_no_limit_of_a_day(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tracker.A_DAY, "url", 0)
    monkeypatch.setattr(tracker, "A_REGISTERED_EMAIL", 10)
    register(stage, tracker.Registration("r1"), at=NOW - DAY)
    paths = [tracker.click_path("0" * 16, stage.acme.mail_id, "u1", f"https://signed.com/{n}") for n in range(30)]
    count(stage, *(click(stage, "u1", uri=path) for path in paths))
    count(stage, *(click(stage, "r1", f"https://plain.com/{n}", ip=f"198.{n}.7.0") for n in range(30)))
    hosts = stage.rows("select host, count(*) from urls group by 1 order by 1")
    assert hosts == [("", 1), ("plain.com", 10), ("signed.com", 30)]


FILLERS: dict[
    str, Callable[[Stage, str], bytes]
] = {  # hits that are as large in the database as strangers can make them
    "agents": lambda stage, text: hit(stage, "r1", ua=text[:512]),
    "plain URLs": lambda stage, text: click(stage, "u1", f"https://acme.com/{text[:4000]}"),
    "hosts": lambda stage, text: click(stage, "u1", f"https://{text[:60]}.{text[60:120]}.com/", **NAMED),
    "campaigns": lambda stage, text: hit(stage, "", uri=f"/{stage.acme.mail_id}/pixel/u1.gif?campaign={text[:190]}"),
    "keys": lambda stage, text: hit(stage, "", uri=f"/{stage.acme.mail_id}/pixel/{text[:200]}.gif"),
    "all at once": lambda stage, text: click(
        stage, "u1", f"https://{text[:60]}.com/{text[:3900]}", ua=text[:512], purpose=text, ip="2001:db8:1:2:3:4:5:6"
    ),
}


@pytest.mark.sqlite
@pytest.mark.parametrize("fill", FILLERS.values(), ids=FILLERS)
def test_a_stranger_fills_at_most_150_bytes_a_hit_after_the_allowance_of_a_day(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, fill: Callable[[Stage, str], bytes]
) -> None:
    for what in tracker.A_DAY:
        monkeypatch.setitem(tracker.A_DAY, what, 20)
    register(stage, tracker.Registration("r1"), at=NOW - DAY)
    dice, size = random.Random(12), "select page_count * page_size from pragma_page_count, pragma_page_size"
    sizes = []
    for hits in (500, 2_000):
        segment(stage, *(fill(stage, f"{dice.getrandbits(16_000):x}") for _ in range(hits)))
        assert stage.drain().hits == hits
        sizes += stage.rows(size)
    assert (sizes[1][0] - sizes[0][0]) / 2_000 <= 150


# -- Removal


@pytest.mark.parametrize("after", [0, -60_000])
def test_an_email_that_is_registered_again_after_its_deletion_is_there_whatever_the_clock_says(
    stage: Stage, after: int
) -> None:
    register(stage, tracker.Registration("e1"))
    with stage.database.transaction() as connection:
        tracker.delete_emails(stage.settings.folder, connection, stage.acme.number, ["e1"], NOW)
    assert register(stage, tracker.Registration("e1", subject="again"), at=NOW + after) == 1
    assert stage.rows("select key, subject from emails") == [("e1", "again")]


def test_a_deleted_email_leaves_a_database_that_never_had_it(stage: Stage, memory: Path) -> None:
    season, number = Season(stage, memory), stage.acme.number
    gone = {"e1", "e2", "e4", "e12", "e13"}  # registered ones with and without a campaign, and unregistered ones
    with season.played(1, "among") as database:
        with database.transaction() as connection:
            for key in sorted(gone):
                for there in (1, 0):
                    with tracker.Batch(connection, NOW) as changes:
                        assert changes.delete(number, [key]) == there
        assert faults_of(database) == []
        found = content(database)

    ours = re.compile(rf"/{stage.acme.mail_id}/(?:pixel|click)/(?:{'|'.join(sorted(gone))})(?:[./?].*)?")
    never = Season(stage, memory)
    never.lines = [line for line in season.lines if not ours.fullmatch(json.loads(line)["uri"])]
    never.mail = [each for each in season.mail if each.tenant.number != number or each.email.key not in gone]
    assert 0 < len(season.lines) - len(never.lines) < 200
    with never.played(2, "among") as without:
        expected = content(without)
    for name in LOGICAL.keys() - {"dropped"}:
        assert found[name] == expected[name], name


def tables_of_tenants(connection: Any) -> dict[str, str]:
    """How to count a tenant's rows in each table that can have some."""
    queries = {}
    for table in re.findall(r"^create table (\w+)", tracker.resource("schema.sql").decode(), re.MULTILINE):
        columns = {column[0] for column in connection.execute(f"select * from {table}").description}
        if "tenant" in columns:
            queries[table] = f"select count(*) from {table} where tenant = :tenant"
        elif "email" in columns:
            queries[table] = f"select count(*) from {table} where email in (select id from old_emails)"
    return queries


def test_nothing_of_a_removed_tenant_stays_in_any_table(
    stage: Stage, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tracker.A_DAY, "unregistered", 2)
    with Season(stage, memory).played(1, "among") as database:
        nothing_stays(stage, database)


def nothing_stays(stage: Stage, database: tracker.Database) -> None:
    number = {"tenant": stage.globex.number}
    with tracker.changing_tenants(database) as connection:
        tracker.set_tenant_rules(connection, stage.globex.number, "block", ["evil.example"])
        tracker.set_shares(connection, stage.globex.number, [(tracker.key_hash("a-share"), "", NOW, NOW)])
        tracker.set_feed(connection, stage.globex.number, True)
        tracker.set_webhook(connection, tracker.Webhook(stage.globex.number, "https://crm.example/"))
        connection.execute("insert into changes select tenant, id, at, email, id, null, judgement from events")
        with tracker.Batch(connection, NOW) as changes:
            changes.declare(stage.globex.number, "spring", 10, None)
        [(key,)] = connection.execute("select key from emails where tenant = :tenant limit 1", number).fetchall()
        with tracker.Batch(connection, NOW) as changes:
            assert changes.delete(stage.globex.number, [key], carries=True) == 1
        connection.execute(
            f"create temp table old_emails as select id from emails where tenant = {stage.globex.number}"
        )
        queries = tables_of_tenants(connection)
        before = {table: connection.execute(sql, number).fetchone()[0] for table, sql in queries.items()}
        # A table that is added one day comes in here by itself, and must be given rows to remove.
        assert len(before) >= 12
        assert all(before.values()), before
        tracker.remove_tenant(connection, stage.globex, NOW)
        after = {table: connection.execute(sql, number).fetchone()[0] for table, sql in queries.items()}
        assert set(after.values()) == {0}, after
        assert [each.mail_id for each in tracker.list_tenants(connection)] == [stage.acme.mail_id]
    assert faults_of(database) == []
    assert {row[0] for row in content(database)["events"]} == {stage.acme.number}
    directory = json.loads(Path(database.folder, "tenants.json").read_text())
    assert (list(directory["tenants"]), directory["retired"]) == ([stage.acme.mail_id], [stage.globex.mail_id])
    # No later tenant is given the number of the removed one: what still reads by it must not read another's.
    with tracker.changing_tenants(database) as connection:
        assert tracker.add_tenant(connection, "Initech", NOW).number > stage.globex.number


# -- Check

ADDED_ROWS = {  # with the tenant, the email and the URL that the test made
    "email_counts": "insert into email_counts select max(id), 1, 5, 0, null, 0, null, 0, null, 0, null, 0, null, 5 from emails",
    "link_counts": "insert into link_counts select (select max(id) from emails), max(id), 1, 5, 0, null, 0, null from urls",
    "uniques": "insert into uniques values (1, 0, 7, 1, 1, 1)",
    "reasons": "insert into reasons values (1, 1, 7, 1, 1, 1)",
    "cohorts": "insert into cohorts values (1, 0, 7, 1, 0, 0, 0, 0, 0, 0, 0, 0)",
    "campaigns": "insert into campaigns values (1, 'winter', 1, 0, 0, 0, 0, 0, 0, 0, null, 0)",
    "campaign_times": "insert into campaign_times values (1, 'winter', 0, 7, 1, 0, 0, 0, 0, 0, 0, 0, 0)",
    "campaign_hits": "insert into campaign_hits values (1, 'winter', 1, 1, 'Added', '', 1)",
    "links": "insert into links values (1, 'winter', (select max(id) from urls) + 1, 1, 0, 0, 0, 0, 0)",
    "clients": "insert into clients values (1, 7, 'Added', '', 1, 0)",
    "named_hosts": "insert into named_hosts values (1, 'added.example', 'suspended', 1)",
}


@pytest.mark.parametrize("table", tracker.ROLLUPS)
def test_check_names_a_roll_up_that_differs_in_whatever_number_and_a_rebuild_mends_it(stage: Stage, table: str) -> None:
    register(stage, tracker.Registration("e1", campaign="spring"))
    register(stage, tracker.Registration("e2"))
    count(stage, hit(stage, "e1"), click(stage, "e1"), click(stage, "e1", "https://other.example/", **NAMED))
    before = content(stage.database)
    assert stage.check() == []
    _, numbers, others = tracker.ROLLUPS[table]
    damages = [f"update {table} set {column} = coalesce({column}, 0) + 1" for column in (*numbers, *others)]
    damages += [f"update {table} set {numbers[-1]} = -1", f"delete from {table}", ADDED_ROWS[table]]
    for damage in damages:
        with stage.database.transaction() as connection:
            assert connection.execute(damage).rowcount >= 1
            found = tracker.rollup_differences(connection)
            assert any(line.startswith(f"{table}: ") for line in found), (damage, found)
            tracker.rebuild_rollups(connection)
    assert stage.check() == []
    assert content(stage.database) == before


def test_a_campaign_of_which_nothing_counts_is_no_difference_and_has_its_last_hit_all_the_same(stage: Stage) -> None:
    where = f"/{stage.acme.mail_id}/click/{{}}?campaign=spring&url=https://other.example/"
    count(stage, hit(stage, "e1", NOW, uri=where.format("e1"), **NAMED))
    assert stage.check() == []
    count(stage, hit(stage, "e2", NOW - 50_000, uri=f"/{stage.acme.mail_id}/pixel/e2.gif?campaign=spring"))
    assert stage.check() == []
    assert stage.rows("select campaign, last_at from campaigns") == [("spring", NOW)]
    with stage.database.transaction() as connection, tracker.Batch(connection, NOW) as changes:
        changes.declare(stage.acme.number, "autumn", 0, None)


def test_hits_of_a_test_email_are_not_the_last_ones_of_the_campaign_it_names(stage: Stage) -> None:
    open_of = f"/{stage.acme.mail_id}/pixel/{{}}.gif?campaign=spring"
    count(stage, hit(stage, "e1", NOW - 50_000, uri=open_of.format("e1")))
    count(stage, hit(stage, "test", NOW, uri=open_of.format(f"{tracker.TEST_KEY}1")))
    register(stage, tracker.Registration("e2", campaign="spring"))
    count(stage, hit(stage, "e2", NOW - 60_000))
    register(stage, tracker.Registration("e2", campaign="autumn"))
    assert stage.rows("select last_at from campaigns where campaign = 'spring'") == [(NOW - 50_000,)]


def test_check_finds_rows_that_refer_to_nothing(stage: Stage) -> None:
    count(stage, hit(stage, "e1"))
    with stage.database.reading() as connection:  # so it stays as it was
        connection.execute("delete from agents")
        assert "events: 1 rows refer to agents that are not there" in tracker.integrity_faults(connection)


# -- Size


@pytest.mark.sqlite
def test_an_event_costs_at_most_98_bytes_at_ten_events_an_email(stage: Stage) -> None:
    """All that hits add to the database: events, their indexes, counts, roll-ups and interned texts; `emails` apart."""
    dice = random.Random(7)
    others = [f"Mozilla/5.0 (Linux; Android 15; Model {n}) AppleWebKit/537.36 Mobile Safari/537.36" for n in range(300)]
    agents = [CHROME] * 300 + [GOOGLE] * 600 + [OUTLOOK] * 200 + [APPLE] * 600 + others
    urls = [f"https://acme.com/articles/2026/11/a-title-of-some-length-{n}?utm_source=news" for n in range(40)]
    keys = [f"{dice.getrandbits(128):032x}" for _ in range(1_000)]
    lines: list[tuple[int, bytes]] = []
    for number, key in enumerate(keys):
        for _ in range(10):
            # Sent over twenty minutes; read within hours, and some the days after.
            at = NOW + number * 1_200 + int(dice.expovariate(1 / (8 * HOUR)))
            address = f"{dice.randrange(1, 224)}.{dice.randrange(256)}.{dice.randrange(256)}.0"
            if dice.random() < 0.2:
                lines.append((at, click(stage, key, dice.choice(urls), at, ip=address)))
            else:
                lines.append((at, hit(stage, key, at, ua=dice.choice(agents), ip=address)))
    register(stage, *[tracker.Registration(key, "Subject", "r@example.com", "spring") for key in keys])
    [(pages, size)] = stage.rows("select page_count, page_size from pragma_page_count, pragma_page_size")
    segment(stage, *[line for _, line in sorted(lines)])
    assert tracker.drain(stage.database, batch=200).hits == 10_000
    [(more_pages,)] = stage.rows("select page_count from pragma_page_count")
    assert stage.rows("select freelist_count from pragma_freelist_count") == [(0,)]
    assert (more_pages - pages) * size / 10_000 <= 98


# -- Many at once, and others' databases


def test_an_error_in_a_transaction_leaves_nothing_of_it(stage: Stage) -> None:
    with pytest.raises(KeyError), stage.database.transaction() as connection:
        tracker.register_emails(connection, stage.acme.number, [tracker.Registration("e1")], NOW)
        raise KeyError
    assert stage.rows("select * from emails") == []
    assert register(stage, tracker.Registration("e1")) == 1


def test_what_is_written_while_reading_is_not_kept(stage: Stage) -> None:
    with stage.database.reading() as connection:
        tracker.set_position(connection, "x", 1, 1)
    assert stage.rows("select * from positions") == []


OTHER_SCHEMAS = {  # version, whether the database is open already, and what is said
    "newer": (99, False, "has schema version 99, this program knows 8; use the newer program"),
    "older": (4, False, "was made by a version before 0.6.0"),
    "none": (0, False, "is no database of this program; expected one made by `serve` or `tenant add`"),
    "made newer meanwhile": (9, True, "has schema version 9, this program knows 8; use the newer program"),
}


@pytest.mark.sqlite
@pytest.mark.parametrize(("version", "is_open", "advice"), OTHER_SCHEMAS.values(), ids=OTHER_SCHEMAS)
def test_a_database_with_another_schema_is_refused_and_left_as_it_is_and_no_hit_is_lost(
    stage: Stage, version: int, is_open: bool, advice: str
) -> None:
    path = Path(stage.database.path)
    stage.pixel("e1")
    assert stage.check() == []
    if not is_open:
        stage.app.close()
    with contextlib.closing(sqlite3.connect(path)) as shell:
        shell.execute(f"pragma user_version = {version}")
        before = path.read_bytes()
        with pytest.raises(tracker.StoreError, match=advice):
            stage.drain()
        assert stage.pixel("e2").headers["X-Tracker"] == "recorded"
        assert path.read_bytes() == before
        shell.execute(f"pragma user_version = {tracker.SCHEMA_VERSION}")
    assert (stage.drain().hits, [*(stage.spool / "rejected").iterdir()]) == (2, [])


def test_hits_that_an_older_rule_judged_keep_their_verdicts_until_they_are_judged_anew(stage: Stage) -> None:
    browser, machine = ("human", "browser", tracker.PERSON), tracker.MACHINE
    named = ("human", "destination-not-allowed", tracker.ASIDE)
    # Each hit, what was thought of it, and what is thought of it now.
    told: list[tuple[bytes, tuple[str, str, int], str]] = [
        (hit(stage, "e1"), browser, "with-scanner"),
        (hit(stage, "e1", NOW + 3_000), browser, "repeat"),
        (click(stage, "e1", at=NOW + 30_000, method="HEAD"), ("bot", "head", machine), "head"),
        (click(stage, "e1", at=NOW + 33_000), browser, "with-head"),
        *((click(stage, "e2", f"https://acme.com/{n}", NOW + n * 500), browser, "burst") for n in range(3)),
        (click(stage, "e3", "https://other.example/", **NAMED), named, "destination-not-allowed"),
        (hit(stage, "e4", ua=APPLE), ("prefetch", "apple-mpp", tracker.UNCONFIRMED), "apple-mpp"),
        (hit(stage, "e5", ua=CURL), ("bot", "bot-word", machine), "bot-word"),
        (click(stage, "e5", at=NOW + 60_000, ip="203.0.113.0"), browser, "browser"),
        (hit(stage, "e6", ua="Barracuda Sentinel (EE)"), ("bot", "bot-word", machine), "scanner-word"),
    ]
    register(stage, *[tracker.Registration(f"e{n}", campaign="spring") for n in (1, 2, 3, 4)], at=NOW - HOUR)
    count(stage, *(line for line, _, _ in told))
    wanted = content(stage.database)
    sql = "select id, reason from event_details order by key, at"
    found = stage.rows(sql)
    assert [reason for _, reason in found] == [reason for _, _, reason in told]
    with stage.database.transaction() as connection:
        for (id_, _), (_, old, _) in zip(found, told, strict=True):
            connection.execute(f"insert into judgements (verdict, reason, state) values (?, ?, ?) {IF_NEW}", old)
            is_old = "(select id from judgements where (verdict, reason, state) = (?, ?, ?))"
            connection.execute(f"update events set judgement = {is_old} where id = ?", (*old, id_))
        tracker.rebuild_rollups(connection)
    assert [reason for _, reason in stage.rows(sql)] == [reason for _, (_, reason, _), _ in told]
    sent = stats_of(stage.database, stage.acme)["sent"]
    assert sent["opened"] == {"person": 1, "unconfirmed": 1, "machine": 0}
    assert sent["clicked"] == {"person": 2, "unconfirmed": 0, "machine": 0}
    assert sent["clicked_without_open"] == 1
    for since, otherwise in ((NOW + 33_000, 4), (0, 4), (0, 0)):
        with stage.database.transaction() as connection:
            _, changed = tracker.rejudge_emails(connection, 0, since, 100) or (0, 0)
        assert (changed, stage.check()) == (otherwise, [])
    assert content(stage.database) == wanted


# -- What was erased, and what was never there


def judged(stage: Stage) -> list[tuple[Any, ...]]:
    return stage.rows("select verdict, reason from event_details order by at, id")


@pytest.mark.parametrize("one_by_one", [False, True])
def test_without_addresses_and_agents_hits_are_judged_anew_as_with_them(stage: Stage, one_by_one: bool) -> None:
    """A server may store no addresses, and a program send no agent: that is not the same as having been erased."""
    old: dict[str, Any] = {"ua": OLD_CHROME, "ip": ""}
    burst = [click(stage, "e1", f"https://acme.com/{n}", NOW + 1_000 * n, **old) for n in range(3)]
    later = [click(stage, "e1", f"https://acme.com/{n}", NOW + 60_000 + 500 * n, **old) for n in range(3)]
    silent = [hit(stage, "e2", NOW + at, ua="") for at in (100_000, 101_000)]
    lines = [*burst, *later, *silent, hit(stage, "e2", NOW + 99_000, ua="")]  # the first open of the three comes last
    for batch in [[line] for line in lines] if one_by_one else [lines]:
        count(stage, *batch)
    no_agent = [("bot", "no-user-agent"), ("bot", "repeat"), ("bot", "repeat")]
    assert judged(stage) == [("scanner", "burst")] * 6 + no_agent


def test_what_is_fixed_stays_as_it_was_judged(stage: Stage) -> None:
    """Whatever it was judged by: an agent, an address, or both beside others'."""
    openers, office = (CHROME, GOOGLE, APPLE, CURL), "203.0.113.0"
    lines = [
        *(hit(stage, "e1", NOW + n * 200, ua=agent) for n, agent in enumerate((*openers, "Barracuda Sentinel"))),
        *(hit(stage, "e1", NOW + 1_000 + n, ua=agent) for n, agent in enumerate(openers)),  # repeats
        *(click(stage, "e2", f"https://acme.com/{n}", NOW + DAY + n * 500, ip=office) for n in range(3)),
        click(stage, "e2", at=NOW + DAY + 60_000, ip=office),
        click(stage, "e2", at=NOW + DAY + 61_000, ip=office, ua=IPHONE),
        click(stage, "e4", at=NOW + 3 * DAY, ip="40.107.218.0"),
        click(stage, "e5", at=NOW + 4 * DAY),
        click(stage, "e5", at=NOW + 4 * DAY + 6_000, ua=IPHONE, ip="203.0.113.0"),
        hit(stage, "e6", NOW + 5 * DAY, method="HEAD"),
        click(stage, "e7", at=NOW + 6 * DAY, answer="named", why="destination-not-allowed"),
    ]
    count(stage, *lines)
    before = judged(stage)
    assert {"repeat", "after-scanner", "some-signs", "filter-network", "echo"} <= {row[1] for row in before}
    for cut in ("address = null", "agent = (select id from agents where agent = '')"):
        with stage.database.transaction() as connection:
            connection.execute(f"insert into agents (agent) values ('') {IF_NEW}")
            connection.execute(f"update events set fixed = 1, {cut}")
            tracker.rebuild_rollups(connection)  # some are by agent
            tracker.rejudge_emails(connection, 0, 0, 100)
        assert judged(stage) == before
        assert stage.check() == []


@pytest.mark.sqlite
def test_a_closed_database_keeps_no_descriptor(stage: Stage) -> None:
    stage.app.close()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        database = tracker.Database(stage.database.path)
        with database.transaction():
            pass
        database.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.sqlite
@pytest.mark.parametrize("version", range(tracker.FIRST_VERSION, tracker.SCHEMA_VERSION))
def test_a_database_of_a_version_before_is_brought_up_to_date_and_counts_on(
    stage: Stage, tmp_path: Path, version: int
) -> None:
    register(stage, *(tracker.Registration(key, campaign="Spring") for key in ("e1", "e2")))
    count(
        stage,
        hit(stage, "e1", ua=IPHONE),
        click(stage, "e1"),
        hit(stage, "e2", NOW + 2 * HOUR, ua=APPLE),
        click(stage, "e2"),
        hit(stage, "u1", uri=f"/{stage.acme.mail_id}/pixel/u1.gif?campaign=Spring"),
    )
    stage.change(stage.acme, own=["203.0.113.7"], block=["bad.example"])
    path = tmp_path / "older" / "tracking.db"
    path.parent.mkdir()
    before, rules = content(stage.database), stage.rows("select * from tenant_rules order by rule")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as old:
        old.executescript(as_of_version(version, tracker.resource("schema.sql").decode()))
        old.execute("attach ? as now", (stage.database.path,))
        for (table,) in old.execute(
            "select name from main.sqlite_master where type = 'table' and name <> 'sqlite_sequence'"
        ).fetchall():
            if table != "unregistered_days":
                columns = ", ".join(row[1] for row in old.execute(f"pragma main.table_info({table})"))
                old.execute(f"insert into main.{table} ({columns}) select {columns} from now.{table}")
        old.execute("detach now")
        if version == 5:
            old.execute("insert into unregistered_days values (1, 20000, 7)")
        old.execute("pragma journal_mode = wal")
    with pytest.raises(tracker.StoreError, match="was made by an older version: start `serve`"):
        tracker.open_connection(str(path))
    with contextlib.closing(tracker.open_database(tracker.Settings(database=str(path)), make=True)) as database:
        with database.reading() as connection:
            found = connection.execute("select * from allowances").fetchall()
            assert connection.execute("select * from tenant_rules order by rule").fetchall() == rules
        allowances = [(1, -1, "unregistered", "Spring", -1, 1), (1, 20_000, "unregistered", "", -1, 7)]
        assert version > 5 or found == allowances
        assert faults_of(database) == []
        assert content(database) == before
    web = webtest.TestApp(tracker.wsgi(app := tracker.App(tracker.Settings(database=str(path), local=True))))
    with contextlib.closing(app):
        web.post_json(f"/{stage.acme.id}/emails", {"key": "u1"}, status=201)  # its dashboard id writes, as it did
    assert shape(path) == shape(Path(stage.database.path))


def test_what_a_database_lacks_of_this_version_is_made_and_counted_where_it_is(stage: Stage) -> None:
    register(stage, tracker.Registration("e1", campaign="Spring"))
    count(stage, hit(stage, "e1", ua=IPHONE), hit(stage, "e1", NOW + DAY, ua=CURL), click(stage, "e1"))
    with stage.database.transaction() as connection:
        tracker.remember_gone(connection, {("0123456789abcdef0123456789abcdef", tracker.DELETED): NOW})
    before = content(stage.database)
    with stage.database.transaction() as connection:
        for table in ("campaign_times", "campaign_hits"):
            connection.execute(f"drop view recount_{table}")
            connection.execute(f"drop table {table}")
        for table in ("shares", "feeds", "changes", "webhooks"):
            connection.execute(f"drop table {table}")
        for column in ("utm", "ignore_gpc", "retention_days"):
            connection.execute(f"alter table tenants drop column {column}")
        for view in ("readable_campaigns", "campaign_details", "recount_cohorts", "recount_campaigns"):
            connection.execute(f"drop view if exists {view}")
        for table in ("cohorts", "campaigns"):
            connection.execute(f"alter table {table} drop column click_only_unconfirmed")
        connection.execute("drop table carried")
        connection.execute("alter table gone rename to gone_of_kinds")
        connection.execute("create table gone (hash text primary key, at bigint not null)")
        connection.execute("insert into gone select hash, at from gone_of_kinds")
        connection.execute("drop table gone_of_kinds")
        shared = "update marks set value = '6' where name = 'schema'"
        connection.execute(shared if stage.database.is_shared else "pragma user_version = 6")
    stage.database.close()
    with contextlib.closing(tracker.open_database(stage.settings, make=True)) as database:
        assert faults_of(database) == []
        assert content(database) == before
        with database.transaction() as connection:
            rules = tracker.tenant_rules(connection, stage.acme.number)
            tracker.set_tenant_rules(connection, stage.acme.number, "forward", ["r"])
            assert tracker.tenant_rules(connection, stage.acme.number) == rules | {"forward": ["r"]}
        with database.reading() as connection:
            gone = connection.execute("select hash, kind, at from gone").fetchall()
        assert gone == [("0123456789abcdef0123456789abcdef", "deleted", NOW)]


def as_of_version(version: int, schema: str) -> str:
    """The schema as it was: 5 in 0.6; without what came since."""
    schema = schema.replace("events (url, at)", "events (url)")
    schema = re.sub(r"^ +click_only_unconfirmed integer.*\n", "", schema, flags=re.MULTILINE)
    counted = r"(sum\(unsure\)|count\(case when clicked = 1 and opened = 2 then 1 end\)) as click_only_unconfirmed"
    schema = re.sub(rf",\s+({counted}|sum\(click_only_unconfirmed\)|click_only_unconfirmed)", "", schema)
    schema = re.sub(
        r"^create table (shares|carried|feeds|changes|webhooks) .*?;\n\n", "", schema, flags=re.MULTILINE | re.DOTALL
    )
    schema = re.sub(r"^ +(retention_days|ignore_gpc) .*\n", "", schema, flags=re.MULTILINE)
    schema = schema.replace("(length(utm) <= 1000),", "(length(utm) <= 1000)")
    gone = "create table gone (hash text primary key, at integer not null) without rowid;\n"
    schema = re.sub(r"^create table gone .*?;\n", gone, schema, flags=re.MULTILINE | re.DOTALL)
    if version < 7:
        campaigns = r"^create (table|view) (recount_)?campaign_(times|hits) .*?;\n\n"
        schema = re.sub(campaigns, "", schema, flags=re.MULTILINE | re.DOTALL)
        schema = re.sub(r"^ +utm .*\n", "", schema, flags=re.MULTILINE).replace("'own', 'forward'", "'own'")
        schema = schema.replace("(unregistered_a_day >= 0),", "(unregistered_a_day >= 0)")
    if version == 5:
        schema = re.sub(r"^create table (marks|gone|allowances) .*?;\n", "", schema, flags=re.MULTILINE | re.DOTALL)
        schema = schema.replace("create index dropped_by_day on dropped (day);\n", "")
        schema = re.sub(r"^ +(told_at|cleared|unregistered_a_day) .*\n", "", schema, flags=re.MULTILINE)
        schema = schema.replace("between 1 and 60),  ", "between 1 and 60)")
        schema += (
            "create table unregistered_days (tenant integer, day integer, emails integer, primary key (tenant, day));"
        )
    return re.sub("pragma user_version = [0-9]+;", f"pragma user_version = {version};", schema)


def shape(path: Path) -> dict[str, list[Any]]:
    """The columns of each table, and the text of all else."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("select type, name, sql from sqlite_master where name not like 'sqlite_%'").fetchall()
        return {
            name: connection.execute(f"pragma table_info({name})").fetchall() if type_ == "table" else [sql]
            for type_, name, sql in rows
        }
