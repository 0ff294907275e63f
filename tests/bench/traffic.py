"""Made-up traffic for the drain: registrations and lines of the spool, the same at each run and for each version.

A workload is a list of steps: what is registered, and what is then in the spool.
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tracker
from bench.fill import CLICKERS, OPENERS

MAIL_ID, DASHBOARD_ID = "mailmail", "acmes-dashboard"  # the same for every version, as the lines are
BEGIN = 1_795_000_000_000
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
CAMPAIGNS = 20
LINKS = 6  # of a campaign
AGENTS = [pattern.format(next(iter(versions))) for _, pattern, versions in (*OPENERS, *CLICKERS[:3])]
READERS, MACHINES, BROWSERS = AGENTS[:7], AGENTS[7:-3], AGENTS[-3:]


class Step(NamedTuple):
    """What happens next."""

    emails: list[tracker.Registration]
    lines: list[bytes]
    timed: bool = True


Workload = list[Step]


def key(n: int) -> str:
    """The key of an email."""
    return f"k{n:07d}abcdefghijk"


def registrations(count: int) -> list[tracker.Registration]:
    """Emails of twenty campaigns, sent before BEGIN."""
    return [
        tracker.Registration(
            key(n),
            subject=f"Number {n % CAMPAIGNS} of the news",
            recipient=f"reader{n}@example{n % 50}.com",
            campaign=f"Campaign {n % CAMPAIGNS}",
            sent_at=BEGIN - HOUR - n % 7 * 15 * MINUTE,
            links=LINKS,
        )
        for n in range(count)
    ]


class Asked(NamedTuple):
    """Who asked for what."""

    agent: str
    address: str
    url: str = ""  # "" for the pixel
    method: str = "GET"


class Writer:
    """Writes lines as workers do."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self._targets: dict[str, str] = {}

    def address(self) -> str:
        """One of many."""
        return f"{self.chance.randrange(60, 200)}.{self.chance.randrange(256)}.{self.chance.randrange(256)}.7"

    def line(self, at: int, email: int, asked: Asked, campaign: str = "") -> bytes:
        """A hit."""
        agent, address, url, method = asked
        if url and url not in self._targets:
            self._targets[url] = tracker.signed_target("s" * 64, MAIL_ID, url)
        what = f"click/{key(email)}/{self._targets[url]}" if url else f"pixel/{key(email)}.gif"
        hit: dict[str, Any] = {
            "id": f"{self.chance.getrandbits(96):024x}",
            "t": at / 1000,
            "method": method,
            "host": "track.example.com",
            "uri": f"/{MAIL_ID}/{what}{f'?campaign={campaign}' if campaign else ''}",
            "ip": address,
            "ua": agent,
            "answer": "302" if url else "pixel",
        }
        return tracker.hit_line(hit)


def opens(count: int) -> Workload:
    """Opens within half a day of a tenth as many registered emails."""
    writer, emails = Writer(1), max(count // 10, 1)
    chance = writer.chance
    readers = [Asked(chance.choice(READERS), writer.address()) for _ in range(emails)]
    times = sorted(BEGIN + chance.randrange(12 * HOUR) for _ in range(count))
    lines = [writer.line(at, n, readers[n]) for at in times for n in (chance.randrange(emails),)]
    return [Step(registrations(emails), lines)]


def days(count: int) -> Workload:
    """Three days of all there is: readers, clicks, scanners, HEADs, late hits, keys nobody registered or registers later."""
    writer, emails = Writer(2), max(count // 4, 20)
    hits: list[tuple[int, bytes]] = []
    while len(hits) < count:
        # A few are read much more than others; some keys are registered by nobody, and half of these name a campaign.
        email = int(emails * 1.03 * writer.chance.random() ** 1.3)
        for at, about in _visit(writer, BEGIN + writer.chance.randrange(3 * DAY), email):
            campaign = "promo" if email >= emails and email % 2 else ""
            late = writer.chance.choice([0] * 9 + [2 * HOUR])
            written_at = at + writer.chance.randrange(2000 + late)
            hits.append((written_at, writer.line(at, email, about, campaign)))
    hits.sort(key=lambda hit: hit[0])
    lines = [line for _, line in hits]
    known, half, third = registrations(emails), emails // 2, len(lines) // 3
    return [Step(known[:half], lines[:third]), Step(known[half:], lines[third:])]


def _visit(writer: Writer, at: int, email: int) -> Iterator[tuple[int, Asked]]:
    """What one program does with an email, and when."""
    chance = writer.chance
    urls = [f"https://shop{email % CAMPAIGNS}.example.com/offer/{n}" for n in range(LINKS)]
    address, reader = writer.address(), READERS[email % len(READERS)]
    luck = chance.random()
    if luck < 0.1:  # a scanner follows all links at once
        agent = chance.choice([*MACHINES, *BROWSERS])
        for url in chance.sample(urls, LINKS - 1):
            at += chance.randrange(700)
            yield at, Asked(agent, address, url, chance.choice(["GET", "GET", "HEAD"]))
        return
    for _ in range(1 + int(chance.expovariate(1.2))):
        yield at, Asked(reader, address)
        at += int(chance.expovariate(1 / MINUTE))
    if luck > 0.6:  # a reader clicks, some for a whole quarter of an hour
        for _ in range(1 + int(chance.expovariate(1.0 if luck < 0.97 else 0.1)) % 20):
            at += int(chance.expovariate(1 / (40 * MINUTE // 60)))
            yield at, Asked(BROWSERS[email % len(BROWSERS)], address, chance.choice(urls))


def worst(emails: int) -> Workload:
    """One client with clicks in many emails: sessions as long as are judged together; then one hit an email, four times."""
    writer = Writer(3)
    urls = [f"https://shop.example.com/offer/{n}" for n in range(300)]

    def click(email: int, n: int) -> bytes:
        agent = MACHINES[1] if n % 7 == 3 else BROWSERS[0]
        asked = Asked(agent, writer.address(), urls[(n * 7 + email) % 300])
        return writer.line(BEGIN + n * 20_000 + email, email, asked)

    before = tracker.MAX_SESSION - 4
    laid = Step(registrations(emails), [click(email, n) for email in range(emails) for n in range(before)], timed=False)
    return [laid, *(Step([], [click(email, before + n) for email in range(emails)]) for n in range(4))]


def new_emails(count: int) -> Workload:
    """Registrations alone."""
    return [Step(registrations(count), [])]


class Place:
    """A new database with one tenant, into which workloads are laid; with a URL, that of an empty one of PostgreSQL."""

    def __init__(self, folder: Path, zone: str = "UTC", url: str = "") -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self.folder, path = folder, str(folder / "tracking.db")
        if make := getattr(tracker, "create_database", None):  # in an older version
            self.database = make(path, tracker.resource("schema.sql").decode())
        else:
            settings = tracker.Settings(database=url or path, data_folder=str(folder) if url else None)
            self.database = tracker.open_database(settings, make=True)
        with tracker.changing_tenants(self.database) as connection:
            self.tenant = tracker.add_tenant(connection, "Acme", BEGIN - DAY, any_domain=True)
            tracker.change_tenant(connection, self.tenant.number, id=DASHBOARD_ID, mail_id=MAIL_ID, tz=zone)
        self.segments = 0

    def register(self, emails: list[tracker.Registration]) -> None:
        """Register emails, a thousand a transaction."""
        for first in range(0, len(emails), 1000):
            with self.database.transaction() as connection:
                tracker.register_emails(connection, self.tenant.number, emails[first : first + 1000], BEGIN)

    def spool(self, lines: list[bytes]) -> None:
        """Write a segment whose writer is gone."""
        self.segments += 1
        name = f"{self.segments:013d}-1-{self.segments:08x}.jsonl"
        (self.folder / "spool" / name).write_bytes(b"".join(lines))

    def drain(self, count: int, **options: Any) -> None:
        """Drain what is in the spool, which must be so many hits."""
        report = tracker.drain(self.database, **options)
        if (report.hits, report.rejected, report.troubles) != (count, 0, []):
            sys.exit(f"{count} hits were in the spool, but {report}")

    def run(self, work: Workload) -> tuple[float, float]:
        """Seconds of processor time that registering took, and draining."""
        registering = draining = 0.0
        for step in work:
            began = time.process_time()
            self.register(step.emails)
            registering += time.process_time() - began
            self.spool(step.lines)
            began = time.process_time()
            self.drain(len(step.lines), **({} if step.timed else {"batch": 20_000}))
            draining += time.process_time() - began if step.timed else 0.0
        return registering, draining
