"""Fill a new database with a year of one tenant's mail: a million emails and ten million events, within minutes.

Emails and events are written as the tracker would have, in the order of time, and the tracker itself makes all
roll-ups of them.
"""

from __future__ import annotations

import bisect
import math
import random
import sqlite3
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import tracker

EMAILS, EVENTS = 1_000_000, 10_000_000
CAMPAIGNS, EMAILS_A_CAMPAIGN = 500, 100  # at most, and at least
LINKS = 20  # of a campaign
DAYS = 365
CLICK_SHARE = 0.1
WITHOUT_CAMPAIGN = 0.1  # of the emails: receipts, passwords
UNREGISTERED = 0.005  # of those: known from their hits alone
OPENED = 0.7  # of the emails, by whomever or whatever
SKEW = 1.3  # how much more often some are opened than others
FAITHFUL = 0.95  # of the hits come from the program that the recipient reads mail with
TAIL_HOURS = 20.0  # in which most of the hits come
CACHE_MEBIBYTES = 1024
ZONE = "Europe/Rome"
COMMON_WORD, RARE_WORD = "Acme", "Zeppelin"  # in the subject of each campaign's email, and of few
SUBJECTS = (
    "new arrivals",
    "spring sale",
    "five things we learned",
    "your cart is waiting",
    "thank you",
    "what is next",
)
NAMES = ("anna", "bruno", "carla", "deniz", "elena", "farid", "giulia", "hiro", "ines", "jonas", "kemal", "lucia")

_IPHONE = "Mozilla/5.0 (iPhone; CPU iPhone OS 18_{} like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko)"
OPENERS: tuple[tuple[float, str, Iterable[int]], ...] = (  # share, user agent, and its versions
    (26, "Mozilla/5.0 (Windows NT 5.1; rv:11.0) Gecko Firefox/11.0 (via ggpht.com GoogleImageProxy)", (0,)),
    (5, "YahooMailProxy; https://help.yahoo.com/kb/yahoo-mail-proxy-SLN28749.html", (0,)),
    (25, "Mozilla/5.0", (0,)),
    (14, f"{_IPHONE} Mobile/15E148", range(7)),
    (10, "Microsoft Office/16.0 (Windows NT 10.0; Microsoft Outlook 16.0.{}; Pro)", range(17_900, 18_000)),
    (5, "Mozilla/5.0 (X11; Linux x86_64; rv:{0}.0) Gecko/20100101 Thunderbird/{0}.0", range(115, 141)),
    (5, "Mozilla/5.0 (Linux; Android 15; Pixel {}) AppleWebKit/537.36 (KHTML, like Gecko) Version/4.0", range(5, 10)),
    (4, "Barracuda Sentinel (EE)", (0,)),
    (4, "python-requests/2.{}.0", range(20, 33)),
    (1, "", (0,)),
    (1, "SomeTool/{}", range(200)),
)
_CHROME = "Mozilla/5.0 ({}) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/{{}}.0.0.0 {}Safari/537.36"
CLICKERS: tuple[tuple[float, str, Iterable[int]], ...] = (
    (40, _CHROME.format("Windows NT 10.0; Win64; x64", ""), range(120, 146)),
    (20, _CHROME.format("Linux; Android 10; K", "Mobile "), range(120, 146)),
    (25, f"{_IPHONE} Version/18.5 Safari/604.1", range(7)),
    (8, "Barracuda Sentinel (EE)", (0,)),
    (5, "python-requests/2.{}.0", range(20, 33)),
    (2, "Mozilla/5.0 (Windows NT 10.0; rv:{0}.0) Gecko/20100101 Firefox/{0}.0", range(115, 146)),
)
REPEATS, SIGNS, MANY_SIGNS, OWN, HEADS = 0.03, 0.04, 0.02, 0.002, 0.005  # shares of the hits that are judged otherwise


class Numbered(dict[Any, int]):
    """Texts or tuples that the database keeps once, numbered as they come."""

    def __missing__(self, key: Any) -> int:
        self[key] = len(self) + 1
        return self[key]

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """Each as a row, behind its number."""
        return ((number, *key) if isinstance(key, tuple) else (number, key) for key, number in self.items())


class Mailing(NamedTuple):
    """Emails that are sent at once."""

    number: int
    name: str  # of the campaign; "" for none
    sent_at: int
    first: int  # id of its emails
    emails: int
    events: int


Event = tuple[int, int, int, str | None, int, int, int | None, str, int]
# at, email, type, method, judgement, agent, url, address, own: sorted, they are in the order of time


def plan(chance: random.Random, emails: int, events: int, now: int) -> list[Mailing]:
    """All mailings of the year, oldest first: a few large campaigns, many small ones, and what is sent day by day."""
    campaigns = max(1, min(CAMPAIGNS, emails // EMAILS_A_CAMPAIGN))
    singles = min(DAYS, campaigns)  # mailings without a campaign
    sizes = [chance.uniform(0.6, 1.4) * (6 if n % 50 == 1 else 1) for n in range(campaigns)]
    shares = [size / sum(sizes) * (1 - WITHOUT_CAMPAIGN) for size in sizes] + [WITHOUT_CAMPAIGN / singles] * singles
    begin = now - DAYS * tracker.DAY_MS
    times = [
        begin + int((n + chance.random()) * DAYS * tracker.DAY_MS / count)
        for count in (campaigns, singles)
        for n in range(count)
    ]
    found, first, done, events_done = [], 1, 0.0, 0
    for number in sorted(range(len(shares)), key=times.__getitem__):
        done += shares[number]  # 1 at the end, up to what rounding takes off
        count = round(done * emails) - first + 1
        share = round(done * events) - events_done
        name = f"Week {times[number] // tracker.DAY_MS // 7 % 53 + 1}: campaign {number}" if number < campaigns else ""
        found.append(Mailing(number, name, times[number], first, count, share))
        first, events_done = first + count, events_done + share
    return found


def email_rows(chance: random.Random, mailing: Mailing, tenant: int) -> Iterator[tuple[Any, ...]]:
    """Its emails, as the table has them."""
    subject = f"{COMMON_WORD}: {chance.choice(SUBJECTS)}, no. {mailing.number}"
    for n in range(mailing.emails):
        id_ = mailing.first + n
        at = mailing.sent_at + n * 20
        key = f"m{mailing.number}-{chance.getrandbits(96):024x}"
        if not mailing.name and chance.random() < UNREGISTERED:
            yield id_, tenant, key, "", "", "", 0, at, None, None, ""
            continue
        rare = f" {RARE_WORD}" if id_ % 20_011 == 7 else ""
        person = chance.randrange(200_000)
        recipient = f"{NAMES[person % len(NAMES)]}.{person}@example{person % 97}.com"
        texts = (subject + rare, recipient, mailing.name)
        yield id_, tenant, key, *texts, 1, at, at, LINKS, tracker.fold_text(key, *texts)


Agents = tuple[list[tuple[int, int]], list[float]]  # pairs of user agent and judgement; how often each, summed up


class Hits:
    """Makes the events of mailings."""

    def __init__(self, chance: random.Random, now: int) -> None:
        self.chance, self.now = chance, now
        self.judgements, self.agents, self.urls = Numbered(), Numbered(), Numbered()
        self.addresses = [f"198.{chance.randrange(18, 52)}.{chance.randrange(256)}.0" for _ in range(3_000)]
        who = {tracker.OPEN: OPENERS, tracker.CLICK: CLICKERS}
        self.agents_of = {type_: self._agents(agents, type_) for type_, agents in who.items()}
        self.signs_of = {type_: self._otherwise(type_) for type_ in who}

    def _agents(self, agents: Sequence[tuple[float, str, Iterable[int]]], type_: int) -> Agents:
        pairs, weights, total = [], [], 0.0
        for share, pattern, versions in agents:
            names = [pattern.format(version) for version in versions]
            for name in names:
                judged = tracker.judge_agent(name, type_)
                pairs.append((self.agents[name], self.judgements[judged.verdict, judged.reason, judged.state]))
                total += share / len(names)
                weights.append(total)
        return pairs, weights

    def _otherwise(self, type_: int) -> list[tuple[float, int]]:
        """Judgements that come from neighbours, addresses and times: up to which random number each is given."""
        aside, unconfirmed, machine = tracker.ASIDE, tracker.UNCONFIRMED, tracker.MACHINE
        shares = [(OWN, ("self", "own-address", aside)), (HEADS, ("scanner", "head", machine))]
        if type_ == tracker.OPEN:
            shares.append((REPEATS, ("human", "repeat", aside)))
        else:
            shares += [(SIGNS, ("unconfirmed", "some-signs", unconfirmed)), (MANY_SIGNS, ("scanner", "burst", machine))]
        found, total = [], 0.0
        for share, judgement in shares:
            total += share
            found.append((total, self.judgements[judgement]))
        return found

    def of(self, mailing: Mailing) -> list[Event]:
        """The events of a mailing, by time."""
        chance, emails = self.chance, mailing.emails
        if not emails:
            return []
        opened = chance.sample(range(mailing.first, mailing.first + emails), max(1, int(emails * OPENED)))
        opens = round(mailing.events * (1 - CLICK_SHARE))
        site = f"https://shop.example.com/{mailing.number}"
        offers = [f"{site}/offer-{n}?utm_campaign={mailing.number}" for n in range(1, LINKS)]
        urls = [self.urls[url] for url in ("https://www.example.com/", *offers)]
        found = list(self._hits(tracker.OPEN, mailing, opened, [None], opens))
        few = opened[: max(1, len(opened) // 3)]
        clicks = mailing.events - opens
        found += self._hits(tracker.CLICK, mailing, few, urls, clicks)
        found.sort()
        return found

    def _hits(
        self, type_: int, mailing: Mailing, emails: Sequence[int], urls: Sequence[int | None], count: int
    ) -> Iterator[Event]:
        agents, otherwise = self.agents_of[type_], self.signs_of[type_]
        random_, many, sent_at = self.chance.random, len(emails), mailing.sent_at
        left = self.now - sent_at
        tail, most = TAIL_HOURS * 3_600_000, otherwise[-1][0]
        own, head = otherwise[0][1], otherwise[1][1]
        chosen = self.chance.choices(agents[0], cum_weights=agents[1], k=many)  # each recipient's own program
        others = self.chance.choices(agents[0], cum_weights=agents[1], k=count)
        links = self.chance.choices(urls, cum_weights=[n**0.7 for n in range(1, len(urls) + 1)], k=count)
        places = self.chance.choices(self.addresses, k=count)
        spread = self.chance.expovariate
        for other, url, address in zip(others, links, places, strict=True):
            place = int(many * random_() ** SKEW)
            agent, judgement = chosen[place] if random_() < FAITHFUL else other
            after = int(spread(1.0) * tail)
            if after >= left:
                after = int(random_() * left)
            if (luck := random_()) < most:
                judgement = next(number for bound, number in otherwise if luck < bound)
            at = sent_at + after + (60_000 if after + 60_000 < left else 0)
            method = "HEAD" if judgement == head else None
            yield at, emails[place], type_, method, judgement, agent, url, address, int(judgement == own)


def in_time(mailings: Sequence[Mailing], hits: Hits) -> Iterator[list[Event]]:
    """The events of all mailings in the order of time, in pieces: those before the next mailing is sent."""
    waiting: list[Event] = []
    for mailing, until in zip(mailings, [*(each.sent_at for each in mailings[1:]), math.inf], strict=True):
        waiting += hits.of(mailing)
        waiting.sort()
        end = bisect.bisect_left(waiting, (until,))
        yield waiting[:end]
        del waiting[:end]


def _insert(connection: sqlite3.Connection, mailings: Sequence[Mailing], hits: Hits, tenant: int) -> None:
    """Emails and events, and what they refer to. Indexes are made at the end: one by one they'd take most of the time."""
    indexes = connection.execute(
        "select name, sql from sqlite_master where type = 'index' and sql is not null and tbl_name in ('emails', 'events')"
    ).fetchall()
    for name, _ in indexes:
        connection.execute(f"drop index {name}")

    def insert(table: str, columns: str, rows: Iterable[tuple[Any, ...]]) -> None:
        marks = ", ".join("?" * (columns.count(",") + 1))
        connection.executemany(f"insert into {table} ({columns}) values ({marks})", rows)

    columns = "id, tenant, key, subject, recipient, campaign, registered, created_at, sent_at, links, search"
    for mailing in mailings:
        insert("emails", columns, email_rows(hits.chance, mailing, tenant))
    columns = "at, email, type, method, judgement, agent, url, address, own, tenant"
    for events in in_time(mailings, hits):
        insert("events", columns, ((*event, tenant) for event in events))
    insert("agents", "id, agent", hits.agents.rows())
    insert("judgements", "id, verdict, reason, state", hits.judgements.rows())
    urls = ((number, url, tenant, tracker.url_host(url)) for number, url in hits.urls.rows())
    insert("urls", "id, url, tenant, host", urls)
    for _, sql in indexes:
        connection.execute(sql)


def fill(folder: Path, emails: int = EMAILS, events: int = EVENTS) -> None:
    """Make a database in a folder and fill it, up to now."""
    now, chance = tracker.now_ms(), random.Random(1)
    database = tracker.open_database(tracker.Settings(database=str(folder / "tracking.db")), make=True)
    try:
        with tracker.changing_tenants(database) as connection:
            tenant = tracker.add_tenant(connection, "Acme", now - DAYS * tracker.DAY_MS, any_domain=True)
            tracker.change_tenant(connection, tenant.number, tz=ZONE)
        database.enlarge_cache(CACHE_MEBIBYTES)
        with database.transaction() as connection:
            _insert(connection, plan(chance, emails, events, now), Hits(chance, now), tenant.number)
            tracker.rebuild_rollups(connection)
    finally:
        database.close()
