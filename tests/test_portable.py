"""Every statement of the program, as PostgreSQL reads it: the schema and the selects are text that it takes too."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain, product
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import NOW, ROOT, Postgres, Stage, click, hit, make_stage, segment

import tracker

ALONE = {  # statements that are SQLite's alone, by how they begin, with the reason
    "pragma": "settings and checks of a file",
    "begin": "a transaction that writes is begun as one",
    "rollback": "as begun",
    "vacuum": "writes a file anew",
}
BESIDE_SQLITE = ("# == PostgreSQL", "# == Tenants")  # between these lines
SOURCE = (ROOT / "tracker.py").read_text(encoding="utf-8")


class Recorder(sqlite3.Connection):
    """A connection that remembers its statements, and from which lines of the program they came."""

    said: ClassVar[dict[str, None]] = {}
    lines: ClassVar[set[int]] = set()

    def _remember(self, sql: str) -> None:
        self.said.setdefault(sql)
        frame = sys._getframe(2)
        while frame and Path(frame.f_code.co_filename).name == "tracker.py":
            self.lines.add(frame.f_lineno)
            assert frame.f_back
            frame = frame.f_back

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        self._remember(sql)
        return super().execute(sql, *values)

    def executemany(self, sql: str, *values: Any) -> sqlite3.Cursor:
        self._remember(sql)
        return super().executemany(sql, *values)


def use_all_of(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do everything with a database that the program can do."""
    number, web, home = stage.acme.number, stage.web, f"/{stage.acme.id}"
    with stage.database.transaction() as connection:
        for tenant, keeps in ((number, True), (stage.globex.number, True), (stage.globex.number, False)):
            tracker.set_feed(connection, tenant, keeps)
        tracker.set_webhook(connection, tracker.Webhook(number, "http://127.0.0.1:9/"))
    new = [tracker.Registration(f"e{n}", "Grüße", f"r{n}@example.org", "Spring", NOW) for n in range(9)]
    for emails in (new, [each._replace(campaign="Autumn", delivered_at=NOW) for each in new[:3]]):
        with stage.database.transaction() as connection:
            tracker.register_emails(connection, number, emails, NOW)
    lines = [
        *(hit(stage, f"e{n}", NOW + n) for n in range(4)),
        *(click(stage, "e1", at=NOW + n) for n in range(3)),
        *(hit(stage, "x", uri=f"/{stage.acme.id}/pixel/e1.gif"), hit(stage, "u")),
        hit(stage, "v", uri=f"/{stage.acme.mail_id}/pixel/v.gif?campaign=Spring"),
        click(stage, "u", "https://other.example/", answer="named", why="destination-not-allowed"),
        *(click(stage, "e5", at=NOW + 100_000 + n * 3_600_000) for n in range(2)),
        click(stage, "e5", "https://acme.com/off?only=5", at=NOW + 9_000_000),
        click(stage, "e5", at=NOW + 101_000, method="HEAD"),  # the first click was a scanner's
        *(hit(stage, "e1", NOW - 600_000), click(stage, "e1", at=NOW - 1_000, method="HEAD")),
        tracker.email_line(stage.acme.mail_id, tracker.Registration("e10", "S", "r", "Spring"), NOW),
    ]
    for line in lines:
        segment(stage, line)
        stage.drain()
    tracker.ingest(stage.database, [b"unspooled " + hit(stage, "e2", NOW + 99)])
    web.post_json(f"{home}/campaigns", {"campaign": "Spring", "sent": 50})
    web.post_json(f"{home}/campaigns", {"campaign": "Spring", "sent": 60})
    web.patch_json(f"{home}/emails/e1", {"sent_at": "2026-11-24T09:00:00Z"})
    web.get(f"{home}/feed.json")
    pages = product(
        ("dashboard", "stats.json", "campaigns/Spring", "campaigns/Spring.json", "emails/e1", "people/e1", "links/1"),
        PAGE_QUERIES,
    )
    exports = product((f"{table}.csv" for table in tracker.TABLES), EXPORT_QUERIES)
    for path, query in chain(pages, exports):
        assert web.get(f"{home}/{path}?{query}", status="*").status_int in (200, 400)  # not each knows each
    for table in tracker.TABLES.values():
        for order in table.orders:
            for page in ("dashboard", "campaigns/Spring")[: 2 if table.name in ("links", "emails") else 1]:
                web.get(f"{home}/{page}?sort={table.name}.{order}")
    monkeypatch.setenv("DATABASE_URL", f"sqlite:{stage.settings.database}")
    monkeypatch.setenv("BASE_URL", "https://track.example.com")
    assert tracker.main(["--env", os.devnull, "backup", f"{stage.folder}/backup.db"]) == 0
    with tracker.changing_tenants(stage.database) as connection:  # a tenant that no backup ever knew, and goes
        tracker.remove_tenant(connection, tracker.add_tenant(connection, "Hooli", NOW), NOW)
    web.delete(f"{home}/emails/e3")
    web.get("/nobody/dashboard", status=404)  # looked for among the shares
    tracker.Drainer(stage.database).turn()
    tracker.tidy_spool(stage.database, 3, 2000)
    for each in (stage.spool / "kept").iterdir():
        each.unlink()
    with stage.database.transaction() as connection:
        connection.execute("update positions set updated_at = 0")
        connection.execute("update reasons set hits = hits + 1")
    tracker.tidy_spool(stage.database, 3, 2000)
    web.post_json(f"{home}/forgotten", {"address": "r5@example.org"})
    for key in ("e8", "unknown"):
        signature = tracker.sign(stage.app.secrets[0], stage.acme.mail_id, key, tracker.PREFERENCES)
        web.get(f"/{stage.acme.mail_id}/preferences/{key}/{signature}").forms[0].submit("choice", value="erase")
    segment(stage, *(hit(stage, "e2", NOW + n, ua=f"{n}{'x' * 400}") for n in range(300)))  # room to be given back
    stage.drain()
    for days in (9_000, 1):
        settings = dataclasses.replace(stage.settings, retention_days=days, agent_days=1)
        assert [*tracker.retire(stage.database, settings)]
    web.patch_json(f"{home}/emails/e2", {"subject": "Later"})
    stage.database.rewrite()
    stage.app.database.close()
    (stage.folder / "secret.key").unlink()
    tracker.App(stage.settings).close()
    for words in (*COMMANDS, f"restore {stage.folder}/backup.db"):
        assert tracker.main(["--env", os.devnull, *words.split()]) in (0, 1), words


PAGE_QUERIES = ("", "range=all", "range=24h&tz=Asia/Tokyo", "q=gru", "show=clicked", "on=2026-11-24")
EXPORT_QUERIES = ("", "campaign=Spring", "key=e1", "q=spring", "show=opened&limit=2", "campaign=Spring&verdict=human")
COMMANDS = (
    *(
        "tenant list",
        "tenant show acme",
        "status",
        "tenant set Acme --tz Europe/Rome --domain a.example --own 203.0.113.7",
    ),
    *("tenant set Acme --remove-domain a.example --tracking-host t.acme.example", "tenant add Initech", "stats Acme"),
    *("forget Acme R5@example.org --show", "forget Acme r5@example.org", "forget Acme nobody@example.org"),
    *("check", "check --repair", "campaign list Acme", "campaign add Acme Spring --sent 9", "rejudge", "drain"),
    *(
        f"backup {tempfile.mkdtemp()}/backup.db",
        "tenant key Acme",
        "tenant rotate Acme",
        "tenant share Acme --campaign x",
    ),
    *("tenant webhook add Acme http://127.0.0.1:9/", "deliver --held 0", "tenant webhook list Acme"),
    "tenant webhook remove Acme http://127.0.0.1:9/",
    *("tenant shares Acme", "untrack Acme a@b.example", "tenant remove Globex --yes"),
)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, None]]:
    """All statements that the program runs."""
    connect = sqlite3.connect
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sqlite3, "connect", lambda *words, **more: connect(*words, factory=Recorder, **more))
        stage = make_stage(tmp_path_factory.mktemp("portable"))
        use_all_of(stage, monkeypatch)
        stage.app.close()
        yield Recorder.said


def test_everything_that_runs_a_statement_was_used(said: dict[str, None]) -> None:
    """Or the other test would prove little."""
    lines = SOURCE.splitlines()
    begin, end = (next(n for n, line in enumerate(lines) if line.startswith(each)) for each in BESIDE_SQLITE)
    unused = [
        f"{call.lineno}: {lines[call.lineno - 1]}"
        for call in ast.walk(ast.parse(SOURCE))
        if isinstance(call, ast.Call)
        and re.search(r"\b(execute|executemany|for_each)$", ast.unparse(call.func))
        and Recorder.lines.isdisjoint(range(call.lineno, (call.end_lineno or call.lineno) + 1))
        and not re.search("pragma|rollback", lines[call.lineno - 1])
        and not begin < call.lineno < end
    ]
    assert unused == []
    assert len(said) > 80


def for_psql(sql: str) -> str:
    """A statement as the program gives it to PostgreSQL, to be prepared."""
    names: list[str] = []

    def a_parameter(match: re.Match[str]) -> str:
        if match[1] is None or match[1] not in names:
            names.append(match[1] or "?")
        return f"${names.index(match[1]) + 1 if match[1] else len(names)}"

    return re.sub(r"(?<!%)%(?:s|\(([a-z_]+)\)s)", a_parameter, tracker.translated(sql)).replace("%%", "%")


def test_postgresql_takes_the_schema_and_every_statement(postgres: Postgres, said: dict[str, None]) -> None:
    wanted = [sql for sql in said if not sql.lower().startswith(tuple(ALONE))]
    script = [*tracker.postgres_schema()]
    script += [f"\\echo --{n}\nprepare s{n} as {for_psql(sql)};" for n, sql in enumerate(wanted)]
    done = subprocess.run(postgres.psql(), input="\n".join(script), capture_output=True, text=True, cwd="/")
    errors = re.findall(r"ERROR: .*(?:\n(?!psql|ERROR).*)*", done.stderr)
    assert errors == [], "\n".join(errors)
    assert done.stdout.count("--") == len(wanted) > 80
    unused = [begin for begin in ALONE if not any(sql.lower().startswith(begin) for sql in said)]
    assert unused == []
