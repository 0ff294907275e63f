"""Machines that share a database in PostgreSQL: turns, lost connections, a machine that is lost, moves there and back."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import NOW, Postgres, Stage, hit, make_stage, segment
from ways import on_way

import tracker


@pytest.fixture
def settings(postgres: Postgres, tmp_path: Path) -> Callable[[str], tracker.Settings]:
    """Settings of machines that share one database, by their names."""
    url = postgres.make()
    return lambda name: tracker.load_settings(
        {"DATABASE_URL": url, "DATA_FOLDER": str(tmp_path / name), "BASE_URL": "https://track.example.com"}
    )


@pytest.fixture
def stage(postgres: Postgres, tmp_path: Path) -> Iterator[Stage]:
    """A machine with tenants, hits and mail."""

    def engine(folder: Path, model: str = "") -> dict[str, str]:
        return {"DATABASE_URL": postgres.make(model), "DATA_FOLDER": str(folder / "one")}

    made = make_stage(tmp_path, engine)
    yield made
    made.app.close()


def another(stage: Stage, name: str = "two") -> tracker.Database:
    """The same database, as another machine has it."""
    folder = str(stage.folder.parent / name)
    return tracker.open_database(dataclasses.replace(stage.settings, data_folder=folder), make=True)


def put(database: tracker.Database, name: str, *lines: bytes) -> None:
    """A segment in a machine's spool."""
    Path(database.spool, name).write_bytes(b"".join(lines))


def events(stage: Stage) -> int:
    return int(stage.rows("select count(*) from events")[0][0])


def test_machines_take_turns_and_count_each_hit_once(stage: Stage) -> None:
    machines = [another(stage, f"machine{n}") for n in range(3)]
    for n, database in enumerate(machines):
        for part in range(3):
            lines = [hit(stage, f"e{n}-{part}-{i % 7}", NOW + i, id=f"{n}{part}{i}") for i in range(150)]
            put(database, f"{NOW + part:013d}-{n}-{n:04x}{part:04x}.jsonl", *lines)

    def drained(database: tracker.Database) -> list[str]:
        troubles: list[str] = []
        while not troubles and tracker.segments_in(database.spool):
            with contextlib.suppress(tracker.Busy):
                troubles += tracker.drain(database, batch=20, wait=False).troubles
        database.close()
        return troubles

    with ThreadPoolExecutor(len(machines)) as pool:
        troubles = [*pool.map(drained, machines)]
    assert (events(stage), troubles) == (3 * 3 * 150, [[]] * 3)
    assert stage.check() == []


def test_a_position_that_somebody_else_wrote_meanwhile_is_never_written_over(stage: Stage) -> None:
    """As where an engine lost a lock: the transaction that read an older position is rolled back."""
    for before, message in ((0, ""), (5, "drained by somebody else"), (0, "drained by somebody else")):
        expected = pytest.raises(tracker.Busy, match=message) if message else contextlib.nullcontext()
        with expected, stage.database.transaction() as connection:
            tracker.set_position(connection, "s", 7 if message else 3, NOW, before)
    assert stage.rows("select position from positions") == [(3,)]
    with (
        stage.database.transaction() as connection,
        contextlib.closing(tracker.PostgresConnection(stage.settings.database).raw) as raw,
    ):
        assert tracker.position_of(connection, "s") == 3
        assert raw.execute("select segment from positions for update skip locked").fetchall() == []


@pytest.mark.parametrize("moment", ["begin", "work", "commit", "committed"])
def test_a_connection_that_breaks_loses_no_hit_and_counts_none_twice(
    stage: Stage, moment: str, monkeypatch: Any
) -> None:
    """Also where the commit happened and its answer was lost."""
    segment(stage, *(hit(stage, f"e{n}", NOW + n) for n in range(10)))
    commit, record = tracker.PostgresConnection.commit, tracker.record_lines

    def cut(connection: tracker.PostgresConnection) -> None:
        with socket.fromfd(connection.raw.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as way:
            way.shutdown(socket.SHUT_RDWR)

    def breaking_commit(connection: tracker.PostgresConnection) -> None:
        monkeypatch.undo()
        if moment == "committed":
            commit(connection)
        cut(connection)
        if moment == "committed":
            raise tracker.StoreError("the answer was lost")
        commit(connection)

    def breaking_record(connection: Any, *rest: Any) -> None:
        monkeypatch.undo()
        cut(connection)
        record(connection, *rest)

    if moment == "begin":
        with stage.database.reading() as connection:
            pass
        cut(connection)  # type: ignore[arg-type]
    elif moment == "work":
        monkeypatch.setattr(tracker, "record_lines", breaking_record)
    else:
        monkeypatch.setattr(tracker.PostgresConnection, "commit", breaking_commit)
    report = tracker.drain(stage.database)
    assert bool(report.troubles) == (moment != "begin"), report.troubles
    assert stage.drain().troubles == []
    assert events(stage) == 10
    assert stage.check() == []


REFUSE_TWICE = """
    create sequence tries;
    create function refuse() returns trigger language plpgsql as $$ begin
        if nextval('tries') < 3 then raise exception 'try again' using errcode = '40001'; end if;
        return new;
    end $$;
    create constraint trigger refuse after insert or update on positions
        deferrable initially {moment} for each row execute function refuse();
"""


@pytest.mark.parametrize("moment", ["immediate", "deferred"])
def test_a_transaction_that_the_database_refuses_as_of_others_is_tried_again(stage: Stage, moment: str) -> None:
    """As distributed engines do with 40001, at any statement or at the commit."""
    with stage.database.transaction() as connection:
        cast("tracker.PostgresConnection", connection).run(REFUSE_TWICE.format(moment=moment))
    segment(stage, *(hit(stage, f"e{n}", NOW + n) for n in range(10)))
    drainer = tracker.Drainer(stage.database)
    for tried in range(3):
        assert events(stage) == 0, tried
        drainer.turn()
        assert tracker.read_state(str(stage.folder))["trouble"] == ""
    assert events(stage) == 10
    assert stage.check() == []


def test_a_machine_that_goes_silent_with_the_lock_holds_up_others_for_seconds_only(stage: Stage) -> None:
    database = tracker.open_database(stage.settings, patience=5.0)
    with database.transaction() as connection:
        limits = [
            connection.execute(f"show {name}").fetchone()[0]
            for name in (
                "idle_in_transaction_session_timeout",
                "statement_timeout",
                "lock_timeout",
                "transaction_isolation",
            )
        ]
        with pytest.raises(tracker.Busy), stage.database.transaction(wait=False):
            pass
    database.close()
    assert limits == ["1s", "20s", "5s", "read committed"]


def test_a_machine_that_goes_silent_in_the_middle_of_a_batch_loses_the_lock(stage: Stage) -> None:
    taken = 0
    silent, other = (tracker.open_database(stage.settings, patience=30.0) for _ in range(2))
    with pytest.raises(tracker.StoreError), silent.transaction() as connection, tracker.pipelined(connection):
        tracker.set_position(connection, "s", 1, NOW)
        with other.transaction():  # sooner than its patience ends
            taken += 1
        connection.commit()
    for database in (silent, other):
        database.close()
    assert (taken, stage.rows("select * from positions")) == (1, [])


def batch_of(stage: Stage, name: str, hits: int, *, new: bool) -> tuple[list[bytes], list[bytes]]:
    """So many hits in a batch: of registered emails, in sessions of hits that have to be counted before, which come first.

    With what is new: of emails that nobody registered, with links that nobody clicked, and some that are dropped.
    """
    keys = [f"{name}-{n}" for n in range(hits // (7 if new else 4))]
    with contextlib.closing(stage.another()) as database, database.transaction() as connection:
        emails = [tracker.Registration(key, campaign="Spring", sent_at=NOW - 3_600_000) for key in keys]
        tracker.register_emails(connection, stage.acme.number, emails, NOW)

    def clicked(key: str, at: int, link: str, **more: str) -> bytes:
        return hit(stage, key, at, uri=f"/{stage.acme.mail_id}/click/{key}/{link}", answer="302", **more)

    old, fresh = (
        tracker.signed_target(stage.app.secrets[0], stage.acme.mail_id, f"https://acme.com/{each}")
        for each in ("", name)
    )
    laid = [line for key in keys for line in (hit(stage, key), clicked(key, NOW + 100_000, old))]
    lines = []
    for key in keys:
        lines += [
            hit(stage, key, NOW - 600_000),  # late
            clicked(key, NOW + 101_000, old, method="HEAD"),  # so the click before was a scanner's
            *(hit(stage, key, NOW + 900_000), clicked(key, NOW + 905_000, old)),
        ]
        if new:
            of_one = f"new-{key}"
            lines += [
                hit(stage, of_one),
                clicked(of_one, NOW + 9_000, fresh),
                hit(stage, key, uri="/nobody/pixel/x.gif"),
            ]
    return laid, lines


def test_megabytes_of_a_batch_reach_a_server_that_is_busy(postgres: Postgres) -> None:
    connection, found = tracker.PostgresConnection(postgres.make()), []
    large = json.dumps(["x" * 40] * 100_000)

    def ask() -> None:
        for _ in range(2):
            with tracker.pipelined(cast("sqlite3.Connection", connection)):
                connection.execute("select pg_sleep(0.3)")  # so the socket's buffer is full meanwhile
                found.append(
                    connection.execute("select json_array_length((:large)::json)", {"large": large}).fetchone()
                )
                connection.execute("select json_array_length((:large)::json)", {"large": large})

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(60)
    assert not asking.is_alive(), "both sides wait for each other"
    assert found == [(100_000,)] * 2
    connection.raw.close()


@pytest.mark.parametrize(("new", "most"), [(False, (30, 7)), (True, (30, 12))])
def test_a_batch_runs_as_few_statements_in_as_few_round_trips_however_many_hits_it_has(
    new: bool, most: tuple[int, int], postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tracker.A_DAY, "unregistered", 1_000_000)
    found = set()
    with on_way(Path(postgres.folder) / ".s.PGSQL.5432") as way:
        name = postgres.make().partition("?")[0].rpartition("/")[2]
        url = f"postgresql://postgres@127.0.0.1:{way.port}/{name}?sslmode=disable"
        stage = make_stage(tmp_path, lambda folder, *_: {"DATABASE_URL": url, "DATA_FOLDER": str(folder / "one")})
        database = stage.another()  # a command's, which may take its time
        for hits in (20, 200, 2_000, 20_000):
            laid, lines = batch_of(stage, str(hits), hits, new=new)
            segment(stage, *laid)
            assert tracker.drain(database, batch=8 * hits, seconds=math.inf).troubles == []
            segment(stage, *lines)
            with database.reading() as connection:
                [waiting] = tracker.waiting_segments(database, connection, [])
            before = way.statements, way.trips
            work = tracker.Drain(database, 8 * hits, math.inf, True, math.inf)
            assert (work.drain_some(waiting), work.hits, work.troubles) == (False, len(lines), [])
            if hits > 20:  # the first one brings judgements
                found.add((way.statements - before[0], way.trips - before[1]))
        database.close()
        stage.app.close()
    [(statements, trips)] = found  # the same for all
    assert (statements <= most[0], trips <= most[1]) == (True, True), found


def read_directory(database: tracker.Database) -> Any:
    return json.loads(Path(database.folder, "tenants.json").read_text())


def test_each_machine_hears_of_tenants_and_tells_when_the_others_drained(stage: Stage, monkeypatch: Any) -> None:
    other = another(stage)
    tracker.Drainer(other).turn()
    before = read_directory(other)
    assert before == read_directory(stage.database)
    assert Path(other.folder, "secret.key").read_text() == (stage.folder / "secret.key").read_text()
    with tracker.changing_tenants(stage.database) as connection:
        tracker.change_tenant(connection, stage.acme.number, suspended=1)
    monkeypatch.setattr(socket, "gethostname", lambda: "web2")
    tracker.Drainer(other).turn()
    assert read_directory(other) == read_directory(stage.database) != before
    monkeypatch.setattr(socket, "gethostname", lambda: "web1")
    (told,) = stage.health()["machines"]
    assert (told["name"], told["waiting_hits"]) == ("web2", 0)
    assert "2 machines drained within 5 s." in stage.web.get(f"/{stage.acme.id}/dashboard").text
    with stage.database.transaction() as connection:
        instance = tracker.read_small_file(other.spool, "instance")
        tracker.set_mark(connection, f"machine:{instance}", json.dumps(["web2", NOW, 3]))
    assert "1 machine drained within 5 s; web2 not since" in stage.web.get(f"/{stage.acme.id}/dashboard").text
    other.close()


def test_machines_with_the_same_instance_are_told(stage: Stage, monkeypatch: Any) -> None:
    other = another(stage)
    shutil.copy(stage.spool / "instance", Path(other.spool, "instance"))
    for name in ("web1", "web2"):
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        tracker.Drainer(other).turn()
    assert "spool/instance is also web1's" in tracker.read_state(other.folder)["trouble"]
    other.close()


def test_the_spool_of_a_lost_machine_is_drained_elsewhere_and_it_may_come_back(stage: Stage, monkeypatch: Any) -> None:
    lost = another(stage, "lost")
    lines = [hit(stage, f"e{n}", NOW + n) for n in range(20)]
    name = f"{NOW:013d}-1-00000001.jsonl"
    put(lost, name, *lines[:19], lines[19][:40])  # its last line was not written to its end yet
    stage.use(monkeypatch)
    assert tracker.main(["drain", "--spool", lost.spool]) == 0
    assert events(stage) == 19
    assert Path(lost.spool, name).exists()
    put(lost, name, *lines)
    assert tracker.drain(lost).hits == 1
    assert events(stage) == 20
    lost.close()


@pytest.mark.parametrize("words", [["backup", "x.db"], ["restore", "x.db"]])
def test_what_postgresql_does_by_itself_is_said_in_a_sentence(
    stage: Stage, words: list[str], monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.use(monkeypatch)
    assert tracker.main(words) == 1
    assert "pg_dump" in capsys.readouterr().err


def test_check_finds_and_mends_wrong_numbers(
    stage: Stage, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    segment(stage, *(hit(stage, f"e{n}", NOW + n) for n in range(5)))
    stage.drain()
    stage.use(monkeypatch)
    assert tracker.main(["check"]) == 0
    with stage.database.transaction() as connection:
        connection.execute("update uniques set emails = emails + 1")
    assert tracker.main(["check"]) == 1
    assert tracker.main(["check", "--repair"]) in (0, 1)
    assert tracker.main(["check"]) == 0


def test_without_psycopg_a_sentence_says_how_to_get_it(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "psycopg", None)
    tracker._psycopg.cache_clear()
    with pytest.raises(tracker.StoreError, match="apt install python3-psycopg"):
        tracker.open_database(settings("x"), make=True)
