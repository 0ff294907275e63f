"""What tests of the real server under load share: requests and what must become of them, its spool, its end, a lock."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from conftest import CHROME, ROOT, SHARED, Server, hears_signals

import tracker

PIXEL = (ROOT / "pixel.gif").read_bytes()
# Where the folder with real user agents is missing.
AGENTS = (
    CHROME,
    "Mozilla/5.0",
    "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Thunderbird/140.3.0",
    "Mozilla/5.0 (Windows NT 5.1; rv:11.0) Gecko Firefox/11.0 (via ggpht.com GoogleImageProxy)",
    "python-requests/2.32.4",
)


# == The server ==


def data(server: Server) -> Path:
    """The folder of a server's database."""
    return server.folder / "data"


def segments(server: Server) -> list[str]:
    """The segments in a server's spool."""
    return sorted(path.name for path in (data(server) / "spool").glob("*.jsonl"))


def database_of(server: Server) -> tracker.Database:
    """A server's database, as another process has it."""
    return tracker.open_database(tracker.load_settings(server.environ, os.devnull))


def rows(server: Server, sql: str) -> list[tuple[Any, ...]]:
    """Ask a server's database, whether the server runs or not."""
    if server.is_shared:
        with contextlib.closing(database_of(server)) as database, database.reading() as connection:
            return connection.execute(sql).fetchall()
    with contextlib.closing(sqlite3.connect(data(server) / "tracking.db", timeout=10)) as connection:
        return connection.execute(sql).fetchall()


def counted_keys(server: Server) -> Counter[str]:
    """How many events each key has."""
    return Counter(row[0] for row in rows(server, "select key from emails join events on events.email = emails.id"))


def counted(server: Server) -> int:
    """How many events there are."""
    return int(rows(server, "select count(*) from events")[0][0])


def wait_until(true: Callable[[], bool], server: Server, seconds: float = 30) -> None:
    """Wait for what a server does on its own; gives up when the server has ended or the time is up."""
    deadline = time.monotonic() + seconds
    while not true():
        ended = server.process is not None and server.process.poll() is not None
        assert not ended and time.monotonic() < deadline, f"waited in vain:\n{server.log.read_text()}"
        time.sleep(0.02)


def terminate(server: Server) -> int:
    """SIGTERM; returns the exit status."""
    process = server.process
    assert process is not None
    wait_until(lambda: server.workers() != [] and all(map(hears_signals, server.workers())), server)
    server.stop()
    assert process.returncode is not None
    return process.returncode


@contextlib.contextmanager
def locked(database: Path) -> Iterator[None]:
    """Somebody else holds the database for himself, as a shell with an open transaction does."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None, timeout=30)) as other:
        other.execute("begin exclusive")
        yield


# == Requests ==


@dataclass(frozen=True, slots=True)
class Sent:
    """One request for a pixel or a link. Each comes from an address of its own, which tells it from all others."""

    address: str
    mail_id: str
    key: str
    path: str
    agent: str
    method: str
    url: str | None  # the target; None for a pixel
    redirects: bool = True  # whether a click is redirected, and not named

    def event(self) -> dict[str, Any]:
        """The event that must become of it, as exports show it."""
        return {
            "key": self.key,
            "event_type": "click" if self.url else "open",
            "method": self.method,
            "url": self.url,
            "user_agent": self.agent,
            "ip_address": self.address,
        }

    def fault(self, status: int, headers: dict[str, str], body: bytes) -> str | None:
        """What is wrong with an answer."""
        if self.url is None:
            gif = PIXEL if self.method == "GET" else b""
            right = (status, body, headers.get("x-tracker")) == (200, gif, "recorded")
        elif self.redirects:
            right = status == 302 and headers.get("location") == self.url
        else:
            right = status == 200 and (self.method == "HEAD" or escape(self.url).encode() in body)
        return None if right else f"{self.method} {self.path}: {status} {headers} {body[:200]!r}"


def user_agents() -> list[str]:
    """Real user agents, where the folder with them is there."""
    table = SHARED / "useragents.tsv"
    lines = table.read_text(encoding="utf-8").splitlines()[1:] if table.is_file() else []
    return [line.split("\t")[2].strip() for line in lines] or list(AGENTS)


# == Numbers ==


STATES = ("person", "unconfirmed", "machine")  # best first
STATE_OF = {
    **dict.fromkeys(("human", "proxy"), "person"),
    **dict.fromkeys(("prefetch", "unconfirmed"), "unconfirmed"),
    **dict.fromkeys(("scanner", "bot"), "machine"),
    "self": "set_aside",
}


def recounted(events: Iterable[dict[str, Any]], registered: set[str]) -> dict[str, Any]:
    """What stats.json must say, counted from the events."""
    reasons = Counter[tuple[str, str, str, str]]()
    best: dict[str, dict[str, str]] = {"open": {}, "click": {}}  # state of each email
    seen = set(registered)
    for event in events:
        type_, key, state = event["event_type"], event["key"], STATE_OF[event["verdict"]]
        if event["reason"] in ("destination-not-allowed", "destination-blocked", "suspended", "repeat"):
            state = "set_aside"
        reasons[type_, event["verdict"], event["reason"], state] += 1
        seen.add(key)
        if state != "set_aside":
            best[type_][key] = min(state, best[type_].get(key, state), key=STATES.index)

    def hits(type_: str) -> dict[str, int]:
        found = Counter[str]()
        for (each, _, _, state), number in reasons.items():
            found[state] += number if each == type_ else 0
        return {state: found[state] for state in (*STATES, "set_aside")}

    def emails(type_: str, keys: set[str]) -> dict[str, int]:
        found = Counter(state for key, state in best[type_].items() if key in keys)
        return {state: found[state] for state in STATES}

    def group(keys: set[str]) -> dict[str, Any]:
        opened, clicked = ({key for key in keys if best[type_].get(key) == "person"} for type_ in best)
        numbers = {"opened": emails("open", keys), "clicked": emails("click", keys)}
        unsure = {key for key in clicked if best["open"].get(key) == "unconfirmed"}
        only = {"clicked_without_open": len(clicked - opened), "clicked_with_unconfirmed": len(unsure)}
        return {"emails": len(keys), **numbers, **only}

    fields = ("event_type", "verdict", "reason", "counts_as")
    ordered = sorted(reasons.items(), key=lambda item: (item[0][0] == "click", -item[1], item[0]))
    return {
        "sent": group(registered),
        "unregistered": group(seen - registered),
        "activity": {f"{type_}s": {"hits": hits(type_), "emails": emails(type_, seen)} for type_ in best},
        "reasons": [{**dict(zip(fields, rule, strict=True)), "hits": number} for rule, number in ordered],
    }
