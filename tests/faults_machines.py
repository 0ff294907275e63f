"""Three machines with one PostgreSQL, nginx before them, under load, while one of them, the database or its way fails.

After each: every answered hit is counted once, no reader saw an error, and the numbers are those that SQLite makes of the
same spools. `make test-faults` runs it and prints figures.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench import traffic
from conftest import SERVE, Postgres, Server
from faults import NO_LIMIT, Readers, ask, health, lay, lines_of, settled
from frontend import BareNginx, free_port
from load import data, terminate, wait_until
from ways import Way, on_way

import tracker

MACHINES, READERS = 3, 3
REGISTERED = 3_000  # of the keys that readers ask for
CLICKS, SESSIONS = 900, 300  # of each machine, in emails that all of them know
CUTS = 100
GONE_SECONDS, SILENT_SECONDS, LOADED_SECONDS = 60, 9, 60
BATCHES, MOST_STATEMENTS = (200, 200, 2_000, 20_000), 30  # the first one brings all that is new

FRONT = """
upstream machines {{ {servers} }}
server {{
    listen 127.0.0.1:{port};
    access_log off;
    location / {{
        proxy_pass http://machines;
        proxy_set_header Host $http_host;
        proxy_set_header X-Forwarded-For $remote_addr;
    }}
}}
"""


class Machines:
    """Servers with folders, ports and spools of their own, and a way of its own to the one database; nginx in front."""

    def __init__(self, folder: Path, postgres: Postgres) -> None:
        self.postgres, self.url = postgres, postgres.make()
        self.front = BareNginx(folder)
        self.port = self.front.http_port
        self.ways, self.servers, self.kills = [], [], 0
        for n in range(MACHINES):
            place, port = folder / f"machine{n}", free_port(besides=self.port)
            place.mkdir()
            way = Way(socket_of(postgres)).start()
            server = Server(
                place,
                DATABASE_URL=over(way, self.url),
                DATA_FOLDER=str(place / "data"),
                BASE_URL=f"http://127.0.0.1:{self.port}",
                BIND=f"127.0.0.1:{port}",
            )
            server.port = port
            self.ways.append(way)
            self.servers.append(server)
        self.options = ("Acme", "--any-domain", *NO_LIMIT)
        self.acme = self.servers[0].tenant(*self.options)
        for server in self.servers:
            server.start()
        told = " ".join(f"server 127.0.0.1:{each.port} fail_timeout=0;" for each in self.servers)
        self.front.lay(FRONT.format(servers=told, port=self.port))
        self.front.launch()
        for n in range(0, REGISTERED, 1000):
            emails = [{"key": f"k{m}", "recipient": f"r{m}@example.org"} for m in range(n, n + 1000)]
            assert ask(self, "POST", f"/{self.acme['id']}/emails", emails).status == 201
        clicks = "/{mail_id}/click/{key}?url=https%3A%2F%2Fb.example%2F{n}"
        for n, server in enumerate(self.servers):
            lay(server, [*lines_of(self.acme["mail_id"], CLICKS, SESSIONS, 600, clicks)], n + 2)

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """Ask the database, on a way that nothing ever happens to."""
        with contextlib.closing(tracker.Postgres(self.url, os.devnull)) as database, database.reading() as connection:
            return [tuple(row) for row in connection.execute(sql).fetchall()]

    def counted(self) -> int:
        return int(self.rows("select count(*) from events")[0][0])

    def kill(self, server: Server) -> None:
        server.kill()
        server.process = None
        self.kills += 1

    def settle(self, seconds: float = 60) -> float:
        """Wait until all is counted; how long that took."""
        began = time.monotonic()
        for server in self.servers:
            wait_until(lambda: settled(server), server, seconds)  # noqa: B023
        return time.monotonic() - began

    def stop(self) -> None:
        for way in self.ways:
            way.delay = 0
            way.open.set()
        self.front.stop()
        for server in self.servers:
            if server.process is not None:
                server.stop()
            server.listener.close()
        for way in self.ways:
            way.stop()

    def cut(self) -> Counter[str]:
        """How many commits ended otherwise than well, by how."""
        ended = sum((way.ended for way in self.ways), Counter[str]())
        return Counter({how: times for how, times in ended.items() if how})

    @contextlib.contextmanager
    def loaded(self, seconds: float = 3) -> Iterator[Readers]:
        """Readers who ask while something is done, and for some seconds more; afterwards all must be well."""
        with Readers(self, self.acme["mail_id"], READERS) as readers:
            time.sleep(1)
            yield readers
            time.sleep(seconds)
        took = self.settle()
        print(f"{len(readers.answered)} hits answered, the last counted {took:.1f} s later")
        self.assert_counted_once(readers)

    # -- What must be true at the end

    def assert_counted_once(self, readers: Readers) -> None:
        """What was answered is in the database, each once; nothing else is; and SQLite makes the same numbers of it."""
        assert (readers.wrong, readers.broken) == ([], [])
        for server in self.servers:
            assert terminate(server) == 0
            server.run("drain")
        found = Counter(key for (key,) in self.rows("select key from emails join events on events.email = emails.id"))
        spooled = Counter(itertools.chain.from_iterable(map(spooled_keys, self.servers)))
        assert found - spooled == Counter()
        assert spooled - found == Counter()
        assert set(readers.answered) - set(found) == set()
        # A machine that is killed after it wrote a hit and before it answered: nginx asks another one.
        assert sum(times > 1 for key, times in found.items() if key[0] == "k") <= READERS * self.kills
        for server in self.servers:
            assert os.listdir(data(server) / "spool" / "rejected") == []
        server = self.servers[0]
        assert server.run("check") == "all is well\n"
        assert self.stats(server) == self.stats(self.on_sqlite())

    def stats(self, server: Server) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(server.run("stats", self.acme["mail_id"], "--range", "all", "--json"))
        del told["range"]["to"]  # which is now
        return told

    def on_sqlite(self) -> Server:
        """A server, not started, whose SQLite has drained the same spools."""
        folder = self.front.folder.parent / "sqlite"
        folder.mkdir()
        server = Server(folder, BASE_URL=self.servers[0].environ["BASE_URL"])
        server.listener.close()
        server.tenant(*self.options)
        with (
            contextlib.closing(tracker.Database(str(data(server) / "tracking.db"))) as database,
            tracker.changing_tenants(database) as connection,
        ):
            tenants = {each.name: each.number for each in tracker.list_tenants(connection)}
            tracker.change_tenant(connection, tenants["Acme"], id=self.acme["id"], mail_id=self.acme["mail_id"])
        for path in itertools.chain.from_iterable(map(segment_paths, self.servers)):
            shutil.copy(path, data(server) / "spool" / path.name)
        server.run("drain")
        assert server.run("check") == "all is well\n"
        return server


def segment_paths(server: Server) -> list[Path]:
    """All segments that a machine has, counted or not."""
    return sorted((data(server) / "spool").rglob("*.jsonl"))


def socket_of(postgres: Postgres) -> Path:
    return Path(postgres.folder) / ".s.PGSQL.5432"


def over(way: Way, url: str) -> str:
    """The URL of a database by a way."""
    [name] = re.findall("/(test[0-9]+)", url)
    return f"postgresql://postgres@127.0.0.1:{way.port}/{name}?sslmode=disable"


def drained_by(server: Server) -> int:
    """How many segments a machine counted to their ends itself, as it alone puts them aside."""
    return len(segment_paths(server)) - len([*(data(server) / "spool").glob("*.jsonl")])


def spooled_keys(server: Server) -> Iterator[str]:
    """The key of each hit that a machine wrote."""
    for path in segment_paths(server):
        for line in path.read_text().splitlines():
            if uri := json.loads(line).get("uri"):
                yield re.split("/(?:pixel|click)/", uri)[1].partition("?")[0].removesuffix(".gif")


@pytest.fixture
def machines(tmp_path: Path, postgres: Postgres) -> Iterator[Machines]:
    """Three running machines."""
    made = Machines(tmp_path, postgres)
    yield made
    made.stop()


# == What fails ==


def test_under_load_all_three_drain_however_long_the_way_to_the_database_is(machines: Machines) -> None:
    with machines.loaded() as readers:
        for milliseconds in (0, 2, 50):
            for way in machines.ways:
                way.delay = milliseconds / 2000
            began, counted = time.monotonic(), machines.counted()
            time.sleep(LOADED_SECONDS / 3)
            pace = (machines.counted() - counted) / (time.monotonic() - began)
            print(f"\n{milliseconds} ms of round trip: {pace:.0f} hits counted a second", end="; ")
    assert all(drained_by(server) for server in machines.servers)
    assert len(readers.answered) > 20 * LOADED_SECONDS


def test_machines_that_are_killed_and_ways_that_break_in_commits_lose_no_hit_and_double_none(
    machines: Machines,
) -> None:
    cuts = itertools.chain.from_iterable(
        zip(("done", "unsent", "", "sent", "done") * CUTS, [""] * 5 * CUTS, strict=True)
    )
    with machines.loaded():
        for server in machines.servers[:2]:
            machines.kill(server)
            time.sleep(2)
            server.start()
        for way in machines.ways:
            way.cuts = cuts
        wait_until(lambda: sum(machines.cut().values()) >= CUTS, machines.servers[2], 120)
        for way in machines.ways:
            way.cuts = iter(())
        print(f"\n{machines.kills} killed, cut in commits {dict(machines.cut())}", end=": ")


def test_the_database_may_be_restarted_and_be_gone_for_a_minute(machines: Machines) -> None:
    print("\nthe database restarted and gone", end=": ")
    with machines.loaded():
        for seconds in (0, GONE_SECONDS):
            machines.postgres.stop()
            time.sleep(seconds)
            machines.postgres.start()
            time.sleep(3)


def test_a_machine_that_falls_silent_while_it_writes_stops_the_others_for_seconds_only_and_may_be_lost(
    machines: Machines, tmp_path: Path
) -> None:
    """What it spooled is counted elsewhere, and not again when it is back."""
    lost, other = machines.servers[2], machines.servers[0]
    way, longest, copy = machines.ways[2], 0.0, tmp_path / "copy"
    with machines.loaded():
        way.freezes = True
        wait_until(lambda: not way.open.is_set(), lost)
        counted, since, began = machines.counted(), time.monotonic(), time.monotonic()
        while time.monotonic() < began + SILENT_SECONDS:
            time.sleep(0.1)
            if (now := machines.counted()) > counted:
                longest, counted, since = max(longest, time.monotonic() - since), now, time.monotonic()
        longest = max(longest, time.monotonic() - since)
        print(f"\none silent for {SILENT_SECONDS} s, nothing counted for {longest:.1f} s", end="; ")
        machines.kill(lost)
        shutil.copytree(data(lost) / "spool", copy)
        newest = max(copy.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
        os.truncate(newest, newest.stat().st_size - 40)  # as where a copy was under way
        before = machines.counted()
        said = other.run("drain", "--spool", str(copy))
        print(f"drained elsewhere, {said.strip()}", end=": ")
        assert machines.counted() > before
        way.open.set()
        time.sleep(2)
        lost.start()
    assert longest < SILENT_SECONDS


def test_two_machines_with_one_instance_are_told_of(machines: Machines) -> None:
    first, clone, other = machines.servers
    machines.kill(clone)
    (data(clone) / "spool" / "instance").write_bytes((data(first) / "spool" / "instance").read_bytes())
    clone.launch("unshare", "--uts", "sh", "-c", 'hostname clone && exec "$@"', "sh", *SERVE)
    wait_until(lambda: any("spool/instance" in why for why in health(clone)["why"]), clone)
    wait_until(lambda: any("spool/instance is also clone" in why for why in health(first)["why"]), first)
    assert health(other)["why"] == []


# == What a batch runs ==


def test_a_batch_of_any_size_runs_the_same_statements(postgres: Postgres, tmp_path: Path) -> None:
    found: list[tuple[int, int]] = []
    with on_way(socket_of(postgres)) as way:
        place = traffic.Place(tmp_path / "data", url=over(way, postgres.make()))
        place.register(traffic.registrations(sum(BATCHES)))
        for first, count in zip(itertools.accumulate(BATCHES, initial=0), BATCHES, strict=False):
            statements, trips = way.statements, way.trips
            run_batch(place, first, count)
            found.append((way.statements - statements, way.trips - trips))
        place.database.close()
    print(f"\nstatements and round trips of batches of {BATCHES}: {found}")
    assert len(set(found[1:])) == 1
    assert max(statements for statements, _ in found) <= MOST_STATEMENTS


def run_batch(place: traffic.Place, first: int, count: int) -> None:
    """Record so many opens of as many emails in one transaction."""
    writer = traffic.Writer(count)
    asked = [traffic.Asked(writer.chance.choice(traffic.READERS), writer.address()) for _ in range(count)]
    lines = [writer.line(traffic.BEGIN + n, n, each) for n, each in enumerate(asked, first)]
    with place.database.transaction() as connection:
        tracker.record_lines(connection, [tracker.parse_line(line) for line in lines], traffic.BEGIN)
