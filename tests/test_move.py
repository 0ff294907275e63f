"""From one engine to the other: `move` there and back, and `export --postgresql`, which psql makes a database of."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import re
import subprocess
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CHROME, NOW, PROGRAM, Postgres, Server, Stage, click, hit, make_stage, segment

import tracker

SCHEMA = tracker.resource("schema.sql").decode()
ODD_TEXTS = ("back\\slash", "tab\tand\nline\r", r"\N", r"\.", "Grüße \U0001f600 ' \" $$", ":name %s %")
Main = Callable[..., str]


@pytest.fixture(scope="module", autouse=True)
def dropped(postgres: Postgres) -> Iterator[None]:
    """Leave no databases behind."""
    yield
    postgres.drop()


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Stage]:
    """A SQLite database in which a little of everything is."""
    stage = make_stage(tmp_path)
    emails = [
        tracker.Registration(f"r{n}", f"Zeppelin {n} \\N Grüße", f"r{n}@example.org", "Spring", NOW) for n in range(3)
    ]
    with stage.database.transaction() as connection:
        tracker.register_emails(connection, stage.acme.number, emails, NOW)
    lines = [(click if n % 3 else hit)(stage, f"e{n % 9}", at=NOW + n * 7_000_000) for n in range(60)]
    segment(stage, *lines, *(hit(stage, f"u{n}", ua=text) for n, text in enumerate(ODD_TEXTS)))
    stage.drain()
    stage.web.delete(f"/{stage.acme.id}/emails/e8")
    yield stage
    stage.app.close()


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """Runs a command on a database; returns what it says."""

    def run(settings: tracker.Settings, *words: str, status: int = 0) -> str:
        url = settings.database if settings.is_shared else f"sqlite:{settings.database}"
        monkeypatch.setenv("DATABASE_URL", url)
        monkeypatch.setenv("BASE_URL", settings.base_url or "")
        monkeypatch.setenv("DATA_FOLDER", settings.data_folder or "")
        capsys.readouterr()
        ended = tracker.main(["--env", os.devnull, *words])
        said = "".join(capsys.readouterr())
        assert ended == status, said
        return said

    return run


def on(url: str, there: Stage) -> tracker.Settings:
    """The settings of the same machine, on PostgreSQL."""
    return dataclasses.replace(there.settings, database=url, data_folder=str(there.folder))


def content(settings: tracker.Settings) -> dict[str, Any]:
    """All rows but the marks."""
    with contextlib.closing(tracker.open_database(settings)) as database, database.reading() as connection:
        return {
            table: Counter(map(tuple, connection.execute(f"select * from {table}").fetchall()))
            for table in tracker.tables()
            if table != "marks"
        }


def stats(settings: tracker.Settings, main: Main) -> dict[str, Any]:
    """Acme's stats.json, but for the time it is of."""
    said: dict[str, Any] = json.loads(main(settings, "stats", "Acme", "--range", "all", "--json"))
    return {**said, "range": {**said["range"], "to": ""}}


def shape(postgres: Postgres, url: str) -> str:
    """Every table, column, index, key and view of a database, as PostgreSQL describes it."""
    queries = (
        "select table_name, column_name, data_type, is_nullable, is_identity, collation_name from information_schema.columns"
        " where table_schema = 'public' order by table_name, ordinal_position",
        "select indexdef from pg_indexes where schemaname = 'public' order by indexdef",
        "select conrelid::regclass::text, pg_get_constraintdef(oid) as told from pg_constraint order by 1, 2",
        "select viewname, definition from pg_views where schemaname = 'public' order by viewname",
        "select value from marks where name = 'schema'",
    )
    return psql(postgres, url, *queries)


def psql(postgres: Postgres, url: str, *queries: str, file: str = "") -> str:
    """What psql says."""
    command = [*postgres.psql()[:-1], "-A", "-t", url]
    given = file or ";\n".join(queries)
    done = subprocess.run(command, input=given, capture_output=True, text=True, encoding="utf-8", cwd="/")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_psql_makes_of_an_export_a_database_that_agrees_with_itself_and_a_server_goes_on(
    there: Stage, postgres: Postgres, main: Main, servers: Callable[..., Server], tmp_path: Path, kind: str
) -> None:
    source = there.settings
    there.app.close()
    if kind == "postgresql":
        source = on(postgres.make(), there)
        main(there.settings, "move", source.database)
    before, numbers = content(source), stats(source, main)
    file = tmp_path / "all.sql"
    assert "like a password" in main(source, "export", "--postgresql", "--output", str(file))
    assert file.stat().st_mode & 0o777 == 0o600
    new, fresh = on(postgres.make(), there), on(postgres.make(), there)
    assert psql(postgres, new.database, file=file.read_text()) == ""
    assert content(new) == before
    assert main(new, "check") == "all is well\n"
    assert stats(new, main) == numbers
    tracker.open_database(dataclasses.replace(fresh, data_folder=str(tmp_path / "fresh")), make=True).close()
    assert (said := shape(postgres, new.database)) == shape(postgres, fresh.database)
    assert said.count("FOREIGN KEY") == SCHEMA.count("not null references ") > 0
    assert said.count("CREATE INDEX") == SCHEMA.count("\ncreate index ") > 0

    server = servers(DATABASE_URL=new.database, DATA_FOLDER=str(there.folder)).start()
    urllib.request.urlopen(f"{server.url}/{there.acme.mail_id}/pixel/e1.gif").read()
    server.stop()
    assert sum(content(new)["events"].values()) == sum(before["events"].values()) + 1
    assert main(new, "check") == "all is well\n"


def test_what_came_after_a_copy_was_made_is_counted_from_what_the_spool_keeps(
    there: Stage, postgres: Postgres, main: Main
) -> None:
    """As after pg_restore."""
    source, restored = on(postgres.make(), there), on(postgres.make(), there)
    there.app.close()
    main(there.settings, "move", source.database)
    script = main(source, "export", "--postgresql").rpartition("tracker.py: note")[0]
    segment(there, *(hit(there, f"later{n}") for n in range(3)))
    assert "drained 3 hits" in main(source, "drain")
    psql(postgres, restored.database, file=script)
    assert "drained 3 hits" in main(restored, "drain")
    assert content(restored)["emails"].keys() == content(source)["emails"].keys()
    assert main(restored, "check") == "all is well\n"


def test_what_stands_in_the_tables_as_numbers_is_read_as_times_and_words_in_views(
    there: Stage, postgres: Postgres, main: Main
) -> None:
    url = postgres.make()
    psql(postgres, url, file=main(there.settings, "export", "--postgresql").rpartition("tracker.py: note")[0])
    ask = ("set timezone = 'UTC'", "select {} order by 1, 2, 3 limit 1")
    views = {
        "key, at, event_type, counts_as, verdict from readable_events": "e0|2026-11-24 18:21:25.43+00|open|person|human",
        "key, created_at, registered, campaign from readable_emails": "e0|2026-11-24 18:21:25.43+00|f|",
        "campaign, emails, first_email_at from readable_campaigns": "Spring|3|2026-11-24 18:21:25.43+00",
        "url, clicks_person, campaign from readable_links": r"https://acme.com/\|\d+\|",
        "begins_at, event_type, hits from readable_quarters": r"2026-11-24 18:15:00\+00\|open\|\d+",
    }
    for query, expected in views.items():
        said = psql(postgres, url, ask[0], ask[1].format(query)).strip()
        assert said == expected or re.fullmatch(expected, said), query
    counted = psql(postgres, url, *("select count(*) from " + query.split()[-1] for query in views)).split()
    assert int(counted[0]) == there.rows("select count(*) from events")[0][0]
    assert int(counted[1]) == there.rows("select count(*) from emails")[0][0]


@pytest.mark.parametrize(
    "words",
    [
        ["--postgresql", "--campaign", "Spring"],
        ["Acme", "--postgresql"],
        ["Acme", "emails", "--postgresql"],
        ["Acme"],
        [],
    ],
)
def test_an_export_is_of_one_table_or_of_everything(there: Stage, main: Main, words: list[str]) -> None:
    assert "expected TENANT and" in (said := main(there.settings, "export", *words, status=1)) or "no filter" in said


def test_a_move_to_postgresql_and_back_keeps_everything(there: Stage, postgres: Postgres, main: Main) -> None:
    waiting = segment(there, hit(there, "late", NOW + 1))
    there.app.close()
    before, moved = content(there.settings), on(postgres.make(), there)
    said = main(there.settings, "move", moved.database)
    assert f"DATABASE_URL={tracker.without_password(moved.database)}\nDATA_FOLDER={there.folder}\n" in said
    assert "was moved" in main(there.settings, "check", status=1)
    assert content(moved) == before
    assert "drained 1 hits" in main(moved, "drain")
    assert not waiting.exists()
    assert main(moved, "check") == "all is well\n"
    assert main(moved, "tenant", "add", "Initech")
    after = content(moved)
    path = f"{there.folder}/again.db"
    Path(f"{path}.new").write_text("of a move that was killed")
    assert f"DATABASE_URL=sqlite:{path}\nDATA_FOLDER=\n" in main(moved, "move", f"sqlite:{path}")
    assert "was moved" in main(moved, "check", status=1)
    back = dataclasses.replace(there.settings, database=path)
    assert content(back) == after
    assert main(back, "check") == "all is well\n"
    assert not Path(f"{path}.new").exists()


def test_a_target_in_which_something_is_is_left_as_it_is_and_the_source_goes_on(
    there: Stage, postgres: Postgres, main: Main
) -> None:
    full, foreign = on(postgres.make(), there), on(postgres.make(), there)
    tracker.open_database(dataclasses.replace(full, data_folder=f"{there.folder}-2"), make=True).close()
    psql(postgres, foreign.database, "create table events (a int)")
    assert "expected an empty database" in main(there.settings, "move", full.database, status=1)
    assert "already exists" in main(there.settings, "move", foreign.database, status=1)
    assert psql(postgres, foreign.database, "select tablename from pg_tables where schemaname = 'public'") == "events\n"
    assert "is there already" in main(full, "move", f"sqlite:{there.settings.database}", status=1)
    for words, expected in {
        "sqlite:/elsewhere/x.db": "expected postgresql://",
        "postgresql://nobody@127.0.0.1:1/x": "127.0.0.1",
        "mysql://x": "expected sqlite:PATH",
    }.items():
        assert expected in main(there.settings, "move", words, status=1)
    assert "expected a file in" in main(full, "move", "sqlite:/elsewhere/x.db", status=1)
    for left in (there.settings, dataclasses.replace(full, data_folder=f"{there.folder}-2")):
        assert main(left, "check", "--repair")
        assert main(left, "check") == "all is well\n"


def test_what_does_not_agree_with_itself_is_not_moved(there: Stage, postgres: Postgres, main: Main) -> None:
    url = postgres.make()
    with there.database.transaction() as connection:
        connection.execute("update uniques set emails = emails + 1")
    assert "nothing was moved; first `check --repair`" in main(there.settings, "move", url, status=1)
    assert psql(postgres, url, "select count(*) from pg_tables where schemaname = 'public'") == "0\n"
    main(there.settings, "check", "--repair")
    main(there.settings, "move", url)
    assert main(on(url, there), "check") == "all is well\n"
    psql(postgres, url, "update uniques set emails = emails + 1")
    path = Path(there.folder, "again.db")
    assert "nothing was moved" in main(on(url, there), "move", f"sqlite:{path}", status=1)
    assert [each for each in there.folder.iterdir() if each.name.startswith(path.name)] == []
    main(on(url, there), "check", "--repair")


def test_a_move_that_is_killed_leaves_all_as_it_was_and_is_run_again(
    there: Stage, postgres: Postgres, main: Main, tmp_path: Path
) -> None:
    url, before = postgres.make(), content(there.settings)
    psycopg = importlib.import_module("psycopg")
    environ = {**os.environ, "DATABASE_URL": f"sqlite:{there.settings.database}"}
    with contextlib.closing(psycopg.connect(url, autocommit=True)) as raw:

        def locks(held: str) -> int:
            """How many hold, or wait for, the lock of who makes tables."""
            query = f"select count(*) from pg_locks where locktype = 'advisory' and {held} granted"
            return int(raw.execute(query).fetchone()[0])

        raw.execute("select pg_advisory_lock(hashtext('email-tracker'))")
        move = subprocess.Popen([*PROGRAM, "move", url], env=environ)
        while not locks("not"):
            assert move.poll() is None
            time.sleep(0.01)
        raw.execute("select pg_advisory_unlock(hashtext('email-tracker'))")
        while not locks(""):
            assert move.poll() is None
        move.kill()
        move.wait()
        while locks(""):
            time.sleep(0.01)
    if "moved" not in main(there.settings, "check", status=int(move.returncode == 0)):
        main(there.settings, "move", url)
    assert content(on(url, there)) == before


def test_hits_that_come_while_all_is_moved_wait_and_are_counted_there(
    postgres: Postgres, servers: Callable[..., Server]
) -> None:
    server = servers().start()
    acme = server.tenant("Acme")
    ended, sent = threading.Event(), 0

    def hits() -> None:
        nonlocal sent
        while not ended.is_set():
            request = urllib.request.Request(
                f"{server.url}/{acme['mail_id']}/pixel/e{sent % 50}.gif", headers={"User-Agent": CHROME}
            )
            with urllib.request.urlopen(request, timeout=20) as answer:
                assert answer.status == 200
            sent += 1

    sending = threading.Thread(target=hits)
    sending.start()
    try:
        while sent < 50:
            time.sleep(0.01)
        url = postgres.make()
        said = server.run("move", url)
        during = sent
        while sent < during + 50:
            time.sleep(0.01)
    finally:
        ended.set()
        sending.join()
    server.stop()
    server.environ |= dict(re.findall("^(DATA_FOLDER)=(.*)$", said, re.MULTILINE)) | {"DATABASE_URL": url}
    server.start()
    server.stop()  # which counts what it can
    server.run("drain")
    assert server.run("check") == "all is well\n"
    assert psql(postgres, url, "select count(*) from events") == f"{sent}\n"
