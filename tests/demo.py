"""Fills an empty database with half a year of made-up mail of two tenants, and prints their dashboards. See `make demo`.

The numbers are such as senders see: newsletters twice a week that some 40 % of people open for certain, Apple's machines
load many more of, and 3 % click; notes on orders that nearly everybody opens; gateways that follow every link.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tracker  # it is in the folder above

HOUR_MS, DAY_MS = 3_600_000, 86_400_000
WEEKS = 30  # more than 26, so that also the last 90 days have as many before them
BATCH = 2_000  # hits, or emails, in one transaction

WINDOWS = "Mozilla/5.0 (Windows NT 10.0; Win64; x64)"
BROWSER = f"{WINDOWS} AppleWebKit/537.36 (KHTML, like Gecko) Chrome/142.0.0.0 Safari/537.36"
PHONE = "Mozilla/5.0 (iPhone; CPU iPhone OS 18_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Mobile/15E148"
APPLE = "Mozilla/5.0"  # all that its proxies say
GATEWAY = "Barracuda Sentinel (EE)"
CLIENTS = {  # what people read mail with, by weight
    "Mozilla/5.0 (Windows NT 5.1; rv:11.0) Gecko Firefox/11.0 (via ggpht.com GoogleImageProxy)": 31,
    APPLE: 26,
    "Microsoft Office/16.0 (Windows NT 10.0; Microsoft Outlook 16.0.18227; Pro)": 13,
    PHONE: 9,
    BROWSER: 8,
    "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Thunderbird/140.3.0": 5,
    "YahooMailProxy; https://help.yahoo.com/kb/yahoo-mail-proxy-SLN28749.html": 4,
}
FIRST = ["ada", "ben", "chloe", "dario", "eva", "finn", "grace", "hugo", "ines", "jonas", "kira", "liam", "maya"]
LAST = ["abbott", "bauer", "costa", "dubois", "evans", "fischer", "garcia", "hansen", "ito", "jansen", "kim", "lopez"]


@dataclass(frozen=True)
class Sender:
    """A tenant, and what it sends."""

    name: str
    site: str
    readers: int
    days: Sequence[int]  # on which a newsletter goes out: how many before today, within a week
    subjects: Sequence[str]
    links: Sequence[str]  # the first is followed most
    orders: int = 0  # a day
    rules: dict[str, Any] = field(default_factory=dict)


SENDERS = (
    Sender(
        name="Acme Shoes",
        site="https://acme.example.com/",
        readers=150,
        days=(3, 6),
        subjects=["New arrivals", "Boots for the rain", "Last sizes", "How we make a sole", "Sandals", "Thank you"],
        links=("new", "sale", "boots", "sandals", "journal/how-we-make-a-sole", "stores", "account"),
        orders=14,
        rules={"allow": ["acme.example.com"]},
    ),
    Sender(
        name="Globex Weekly",
        site="https://globex.example.org/",
        readers=90,
        days=(2,),
        subjects=("Five things we learned", "The long read", "Letters from readers", "A year in charts"),
        links=("read/lead", "read/second", "letters", "archive"),
        rules={"any_domain": True},
    ),
)


@dataclass(frozen=True)
class Reader:
    """A person who gets mail: what with, where, and how gladly."""

    address: str
    client: str
    network: str
    gladness: float  # the chance that a newsletter is opened
    gateway: bool  # whether the mail goes through a filter that follows links


class Mailing:
    """Makes up the emails and hits of one sender; the same ones at each time, counted from now."""

    def __init__(self, sender: Sender, tenant: tracker.Tenant, now: int) -> None:
        self.sender, self.tenant, self.now = sender, tenant, now
        self.chance = random.Random(sender.name)
        self.emails: list[tracker.Registration] = []
        self.hits: list[dict[str, Any]] = []
        addresses = [f"{first}.{last}@example.com" for first in FIRST for last in LAST]
        self.readers = [self.reader(address) for address in self.chance.sample(addresses, sender.readers)]

    def reader(self, address: str) -> Reader:
        [client] = self.chance.choices(list(CLIENTS), list(CLIENTS.values()))
        network = f"198.51.{self.chance.randrange(256)}.0"
        return Reader(address, client, network, self.chance.betavariate(1.7, 1.4), self.chance.random() < 0.06)

    def make(self) -> None:
        """All mail of the weeks until now, and what became of it."""
        today = self.now - self.now % DAY_MS
        for days in range(7 * WEEKS, -1, -1):
            if days % 7 in {day % 7 for day in self.sender.days} and days >= min(self.sender.days):
                self.newsletter(today - days * DAY_MS + 9 * HOUR_MS)
            for _ in range(self.sender.orders):
                self.order(today - days * DAY_MS + int(self.chance.triangular(6, 23, 18) * HOUR_MS))
        if self.sender.orders:  # something has just happened
            latest = self.email("Your order is on its way", self.readers[0], "Orders", self.now - HOUR_MS)
            self.hit(latest, self.now - 180_000, PHONE)
        self.hits = [hit for hit in self.hits if hit["t"] * 1000 < self.now]

    def email(self, subject: str, reader: Reader, campaign: str, sent_at: int) -> str:
        """Register an email; returns its key."""
        key = f"{self.chance.getrandbits(128):032x}"
        self.emails.append(tracker.Registration(key, subject, reader.address, campaign, sent_at))
        return key

    def newsletter(self, sent_at: int) -> None:
        """One email to each reader. A gateway tests some, and the sender looks at one in the office."""
        number = len({each.campaign for each in self.emails}) + 1
        subject = self.sender.subjects[number % len(self.sender.subjects)]
        keys = [self.email(subject, reader, f"No. {number}: {subject}", sent_at) for reader in self.readers]
        for key, reader in zip(keys, self.readers, strict=True):
            self.read(key, reader, sent_at, reader.gladness, 0.055, self.sender.links, hours=7.0)
        self.hit(keys[0], sent_at + 40_000, BROWSER, own=True)
        self.story(keys[1], sent_at)

    def order(self, sent_at: int) -> None:
        """A note that an order is on its way, which people wait for."""
        if sent_at < self.now - 600_000:
            reader, number = self.chance.choice(self.readers), 10_000 + 3 * len(self.emails)
            key = self.email(f"Your order {number} is on its way", reader, "Orders", sent_at)
            self.read(key, reader, sent_at, 0.85, 0.25, ("orders",), hours=1.0)

    def read(
        self, key: str, reader: Reader, sent_at: int, opened: float, clicked: float, links: Sequence[str], hours: float
    ) -> None:
        """What becomes of one email: machines first, then perhaps its reader, within a day or two and not at night."""
        if reader.gateway:
            self.hit(key, sent_at + self.chance.randrange(2_000, 20_000), GATEWAY, network="192.0.2.0")
            self.follow_all(key, sent_at + 20_000, links, GATEWAY)
        at = sent_at + 60_000 + int(self.chance.expovariate(1 / (hours * HOUR_MS)))
        if at // HOUR_MS % 24 < 6:
            at += self.chance.randrange(4, 8) * HOUR_MS
        is_apple = reader.client == APPLE
        reads = self.chance.random() < opened
        if is_apple and self.chance.random() < 0.9:
            loaded_at = sent_at + int(self.chance.expovariate(1 / (2 * HOUR_MS))) + 90_000
            self.hit(key, loaded_at, APPLE, network="17.58.0.0")
        if not reads:
            return
        for _ in range(0 if is_apple else self.chance.choice((1, 1, 1, 1, 2))):
            self.hit(key, at, reader.client, network=reader.network)
            at += int(self.chance.expovariate(1 / (5 * HOUR_MS)))
        if self.chance.random() < clicked:
            [path] = self.chance.choices(links, range(len(links), 0, -1))
            browser = PHONE if is_apple else BROWSER
            self.hit(key, at + 25_000, browser, self.sender.site + path, network=reader.network)

    def follow_all(self, key: str, at: int, links: Iterable[str], agent: str) -> None:
        """A gateway tests every link."""
        for number, path in enumerate(links):
            self.hit(key, at + 400 * number, agent, self.sender.site + path, network="192.0.2.0")

    def story(self, key: str, sent_at: int) -> None:
        """Much that happens to one email: a gateway that passes for a browser, Apple, and then its reader."""
        self.hit(key, sent_at + 4_000, BROWSER, tracker.HIDDEN_TARGET, network="192.0.2.0")
        self.follow_all(key, sent_at + 4_400, self.sender.links[:2], BROWSER)
        self.hit(key, sent_at + 9 * 60_000, APPLE, network="17.58.0.0")
        read_at = sent_at + 3 * HOUR_MS
        for later in (0, 4_000):
            self.hit(key, read_at + later, PHONE)
        self.hit(key, read_at + 40_000, PHONE, self.sender.site + self.sender.links[1])

    def hit(
        self, key: str, at: int, agent: str, url: str = "", *, network: str = "198.51.100.0", own: bool = False
    ) -> None:
        """An open or, with a URL, a click: a line of the spool."""
        path = f"/{self.tenant.mail_id}/" + (f"click/{key}?url={url}" if url else f"pixel/{key}.gif")
        line: dict[str, Any] = {"t": at / 1000, "uri": path, "ip": network, "ua": agent}
        self.hits.append({**line, "answer": "302" if url else "pixel", **({"own": True} if own else {})})

    def record(self, database: tracker.Database) -> None:
        """Put all of it into the database."""
        for emails in batches(self.emails):
            with database.transaction() as connection:
                tracker.register_emails(connection, self.tenant.number, emails, self.now)
        for hits in batches(sorted(self.hits, key=lambda hit: hit["t"])):
            read = [tracker.parse_line(tracker.hit_line(hit)) for hit in hits]
            with database.transaction() as connection:
                tracker.record_lines(connection, read, self.now)


def batches(whole: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """A list in pieces."""
    for start in range(0, len(whole), BATCH):
        yield whole[start : start + BATCH]


def main() -> int:
    """Fill the database that DATABASE_URL names, which must be empty."""
    settings = tracker.load_settings(os.environ, os.devnull, local=True)
    with contextlib.closing(tracker.open_database(settings, make=True)) as database:
        with tracker.changing_tenants(database) as connection:
            if tracker.list_tenants(connection):
                sys.exit(f"{database.path} has tenants already; expected an empty one: set DATABASE_URL to a new one")
            now = tracker.now_ms()
            tenants = [tracker.add_tenant(connection, each.name, now, **each.rules) for each in SENDERS]
        for sender, tenant in zip(SENDERS, tenants, strict=True):
            mailing = Mailing(sender, tenant, now)
            mailing.make()
            mailing.record(database)
            print(f"{tenant.name}: {settings.public_url()}/{tenant.id}/dashboard")
    return 0


if __name__ == "__main__":
    sys.exit(main())
