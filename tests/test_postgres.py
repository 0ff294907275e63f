"""Every command on a database in PostgreSQL; machines of different versions; what a machine writes down of the database."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import NOW, PROGRAM, ROOT, Postgres, Server

import tracker

HIT = {"id": "0" * 24, "t": NOW / 1000, "method": "GET", "host": "h", "uri": "/{}/pixel/e1.gif", "ip": "198.51.100.0"}
SAID = {  # by command: its other words and its standard input, and what it says; in an order in which all of them work
    "serve": (None, "", ""),  # runs all the while
    "tenant add": ("Acme --domain acme.example", "", "dashboard_url"),
    "tenant set": ("Acme --tz Europe/Rome", "", "Europe/Rome"),
    "tenant list": ("", "", "Acme"),
    "tenant show": ("Acme", "", "tz +Europe/Rome"),
    "tenant key": ("Acme", "", r"^[\w-]{40,}$"),
    "tenant rotate": ("Acme", "", "dashboard_url"),
    "tenant share": ("Acme", "", "/dashboard$"),
    "tenant shares": ("Acme", "", r"\(all\)"),
    "instrument": ("Acme --html --strict", '<a href="https://acme.example/">x</a>', "/click/"),
    "ingest": ("-", "unspooled " + json.dumps({**HIT, "ua": "x", "answer": "pixel"}), "1 hits counted"),
    "campaign add": ("Acme Spring --sent 9", "", "9 sent"),
    "campaign list": ("Acme", "", "Spring: 9 sent"),
    "stats": ("Acme --range all", "", "Sent +10 "),
    "report": ("Acme --since all", "", "Spring: first sent"),
    "export": ("Acme events", "", "e1"),
    "selftest": ("Acme", "", "works"),
    "untrack": ("Acme ann@example.com", "", "tracks 1 recipient no more"),
    "drain": ("", "", "drained 0 hits"),
    "tenant webhook add": ("Acme https://192.0.2.1/", "", "^whsec_"),
    "tenant webhook list": ("Acme", "", "^on +https://192.0.2.1/"),
    "tenant webhook test": (None, "", ""),  # it asks the network; see test_webhooks.py
    "deliver": ("", "", "^$"),
    "tenant webhook remove": ("Acme https://192.0.2.1/", "", "^$"),
    "judge": ("-", json.dumps(HIT), "open"),
    "rejudge": ("", "", "all hits are judged as before"),
    "forget": ("Acme no@body.example", "", "forgot 0 emails"),
    "check": ("--repair", "", "all is well"),
    "backup": ("x.db", "", "use pg_dump"),
    "restore": ("x.db", "", "use pg_dump"),
    "version": ("", "", "SQLite"),
    "status": ("--json", "", '"rejected_lines": 0'),
    "config": ("", "", "DATABASE_URL=postgresql://postgres"),
    "nginx": ("", "", "server_name"),
    "systemd": ("backup.timer", "", "use pg_dump"),
    "help": ("scale", "", "PostgreSQL"),
    "tenant remove": ("Acme --yes", "", "deleted Acme"),
    "move": ("sqlite:{}/tracking.db", "", "DATABASE_URL=sqlite:"),
}


@pytest.fixture(scope="module", autouse=True)
def dropped(postgres: Postgres) -> Iterator[None]:
    """Leave no databases behind."""
    yield
    postgres.drop()


@pytest.fixture
def machine(postgres: Postgres, servers: Callable[..., Server], tmp_path: Path) -> Server:
    """A running server whose database is in PostgreSQL."""
    made = servers(DATABASE_URL=postgres.make(), DATA_FOLDER=str(tmp_path / "data")).start()
    urllib.request.urlopen(f"{made.url}/health").close()  # to look for psycopg's library has processes of its own
    return made


def run(machine: Server, *words: str, given: str = "", program: str = PROGRAM[1]) -> tuple[int, str]:
    """Run a command as on the machine; its status, and what it says."""
    command, environ = [sys.executable, program, *PROGRAM[2:], *words], {**machine.environ, "BIND": "127.0.0.1:3000"}
    done = subprocess.run(command, input=given, env=environ, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def test_every_command_works_on_postgresql_or_says_what_does(machine: Server) -> None:
    assert set(SAID) == set(tracker.COMMANDS)
    folder = machine.environ["DATA_FOLDER"]
    for name, (words, given, expected) in SAID.items():
        if words is None:
            continue
        if "{}" in given:
            tenants = json.loads(Path(folder, "tenants.json").read_text())["tenants"]
            given = given.replace("{}", next(key for key, each in tenants.items() if each["name"] == "Acme"))
        status, said = run(machine, *name.split(), *words.format(folder).split(), given=given)
        assert (status, bool(re.search(expected, said, re.MULTILINE))) == (int("pg_dump" in expected), True), said
        assert "Traceback" not in said and (name in ("help", "version") or "SQLite" not in said), said


def answered(machine: Server) -> str:
    """What is said of a pixel."""
    tenant, *_ = json.loads(Path(machine.environ["DATA_FOLDER"], "tenants.json").read_text())["tenants"]
    with urllib.request.urlopen(f"{machine.url}/{tenant}/pixel/e1.gif") as answer:
        return str(answer.headers["X-Tracker"])


def wait_for(machine: Server, status: str, why: str) -> None:
    """Wait until /health says so."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with urllib.request.urlopen(f"{machine.url}/health") as answer:
            said = json.loads(answer.read())
        if said["status"] == status and why in str(said):
            return
        time.sleep(0.1)
    raise AssertionError(said)


def test_a_machine_of_an_older_version_answers_and_keeps_its_hits_until_it_is_brought_up_to_date(
    machine: Server, tmp_path: Path
) -> None:
    newer = tmp_path / "newer"
    shutil.copytree(ROOT / "templates", newer / "templates")
    for name, version in (("tracker.py", "SCHEMA_VERSION = {}"), ("schema.sql", "pragma user_version = {};")):
        old, new = (version.format(tracker.SCHEMA_VERSION + later) for later in (0, 1))
        text = (ROOT / name).read_text(encoding="utf-8")
        assert old in text
        (newer / name).write_text(text.replace(old, new), encoding="utf-8")
    shutil.copy(ROOT / "pixel.gif", newer)
    (newer / "templates" / "schema" / f"{tracker.SCHEMA_VERSION + 1}.sql").write_text(
        "begin;\nalter table emails add column note text not null default '';\n"
        f"pragma user_version = {tracker.SCHEMA_VERSION + 1};\ncommit;\n"
    )
    program = str(newer / "tracker.py")
    status, said = run(machine, "stats", "default", program=program)
    assert (status, "was made by an older version: start `serve`" in said) == (1, True), said

    assert run(machine, "tenant", "add", "Acme", program=program)[0] == 0  # which makes tables, like `serve`
    status, said = run(machine, "stats", "default")
    assert (status, "use the newer program" in said) == (1, True), said
    assert answered(machine) == "recorded"
    wait_for(machine, "degraded", "use the newer program")
    assert run(machine, "drain")[0] == 1
    machine.kill()
    assert run(machine, "drain", program=program)[1].startswith("drained 1 hits")
    assert run(machine, "check", program=program)[1] == "all is well\n"


def test_the_key_that_signs_links_is_written_again_where_it_is_gone(machine: Server) -> None:
    key_file = Path(machine.environ["DATA_FOLDER"], "secret.key")
    wait_for(machine, "ok", "")
    key = key_file.read_text()
    key_file.unlink()
    until = time.monotonic() + 60
    while not key_file.exists():
        assert time.monotonic() < until
        time.sleep(0.1)
    assert (key_file.read_text(), key_file.stat().st_mode & 0o777) == (key, 0o600)
