"""The commands, run in this process as a person runs them: what they print, what they change, how they fail."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import demo
import pytest
import webtest
from conftest import BASE, CHROME, NOW, ROOT, Stage, click, hit, segment, without_settings

import tracker

MACHINE = "python-requests/2.32.4"


@dataclass(frozen=True, slots=True)
class Said:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass
class Terminal:
    """Where commands are run: settings in the environment, a folder without a database."""

    folder: Path
    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch
    apps: list[tracker.App] = field(default_factory=list)

    @property
    def database(self) -> Path:
        return self.folder / "data" / "tracking.db"

    @property
    def spool(self) -> Path:
        return self.database.parent / "spool"

    def __call__(self, *words: str, status: int = 0, stdin: str = "") -> Said:
        """Run a command that must end with this status."""
        self.capsys.readouterr()
        self.monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
        try:
            ended = tracker.main(["--env", os.devnull, *words])
        except SystemExit as stop:  # argparse leaves this way
            ended = stop.code if isinstance(stop.code, int) else -1
        said = Said(ended, *self.capsys.readouterr())
        assert said.status == status, said
        assert "Traceback" not in said.out + said.err
        return said

    def add(self, name: str, *options: str) -> dict[str, Any]:
        """Make a tenant; returns its ids and URLs."""
        made: dict[str, Any] = self("tenant", "add", name, "--json", *options).json
        return made

    def web(self) -> webtest.TestApp:
        """An App over the terminal's database."""
        app = tracker.App(tracker.load_settings(os.environ, os.devnull))
        self.apps.append(app)
        return webtest.TestApp(tracker.wsgi(app))

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """Ask the database."""
        with contextlib.closing(sqlite3.connect(self.database)) as connection:
            return connection.execute(sql).fetchall()

    def change(self, sql: str) -> None:
        """Change the database behind the program's back."""
        with contextlib.closing(sqlite3.connect(self.database)) as connection, connection:
            connection.execute(sql)


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """A terminal; its database is that of `stage`, in the tests that ask for both."""
    without_settings(monkeypatch)
    monkeypatch.setenv("DATABASE_URL", f"sqlite:{tmp_path / 'data' / 'tracking.db'}")
    monkeypatch.setenv("BASE_URL", BASE)
    monkeypatch.chdir(tmp_path)
    made = Terminal(tmp_path, capsys, monkeypatch)
    yield made
    for app in made.apps:
        app.close()


# == What is refused: rows of argv, status and what is said; Acme is there, and nothing changes ==

REFUSED = [
    ("tenant add X --id ab", 1, "3 to 64"),
    ("tenant add X --id pixel", 1, "word of the URLs"),
    ("tenant add X --domain https://acme.com/", 1, "acme.com"),
    ("tenant add X --domain localhost", 1, "two labels"),
    ("tenant add X --domain ''", 1, "expected a domain"),
    ("tenant add X --domain acme.com:port", 1, "HOST:PORT"),
    ("tenant add X --tracking-host localhost", 1, "two labels"),
    ("tenant add X --tracking-host track.acme.com:8080", 1, "without a port"),
    ("tenant add X --tracking-host 192.0.2.1", 1, "domain name"),
    ("tenant add X --tracking-host track.example.com", 1, "BASE_URL"),
    ("tenant add X --own here", 1, "'here': expected an address or a network"),
    ("tenant add X --tz Nowhere/Land", 1, "tz is 'Nowhere/Land'; expected a time zone"),
    ("tenant add X --id abc123", 1, "taken"),
    ("tenant add X --tracking-host t.acme.com", 1, "(abc123)"),
    *(
        (f"tenant {command} '{name}'", 1, "expected one line")
        for command in ("add", "set Acme --name")
        for name in ("", " ")
    ),
    (f"tenant add {'x' * 201}", 1, "expected one line"),
    ("tenant add 'two\nlines'", 1, "expected one line"),
    ("tenant set Acme --name a\x1b[31mred", 1, "expected one line"),
    ("tenant set Acme --name B --domain a/b", 1, "a/b"),
    ("tenant set Acme --name B --block x", 1, "two labels"),
    ("tenant set Acme --name B --tracking-host 'no dots'", 1, "no dots"),
    ("tenant set Acme --name B --tz ../../etc/passwd", 1, "expected a time zone"),
    *(
        (f"tenant set Acme --name B {option} '{text}'", 1, f"{text!r}: expected an address or a network")
        for option in ("--own", "--not-own")
        for text in ("", "the office", "203.0.113", "203.0.113.7/33", "203.0.113.7:80")
    ),
    *(
        (f"tenant set Acme --own {text}", 1, f"'{text}': expected a network of one's own")
        for text in ("0.0.0.0/0", "2000::/3")
    ),
    ("tenant show Nobody", 1, "tenant list"),
    ("stats Acme --tz Nowhere/Land", 1, "Nowhere/Land"),
    ("stats Acme --range 9y", 2, "9y"),
    ("rejudge --since yesterday", 1, "expected a time"),
    ("ingest .", 1, ".: Is a directory"),
    ("judge nowhere.jsonl", 1, "nowhere.jsonl: No such file"),
    ("nginx --output nowhere/x.conf", 1, "nowhere/x.conf: No such file"),
    *(
        (words, 2, "usage: tracker.py")
        for words in (
            *("unknown", "tenant", "tenant unknown", "tenant add", "tenant add X --unknown", "tenant add X Y"),
            *("tenant add X --id", "tenant show", "stats", "serve now", "drain --json", "--unknown"),
        )
    ),
]


@pytest.mark.parametrize(("words", "status", "told"), REFUSED, ids=[words for words, *_ in REFUSED])
def test_what_is_wrong_is_named_and_changes_nothing(words: str, status: int, told: str, run: Terminal) -> None:
    run.add("Acme", "--id", "abc123", "--tracking-host", "t.acme.com")
    before = run("tenant", "show", "Acme").out
    said = run(*shlex.split(words), status=status)
    assert said.out == "" and told in said.err
    assert run("tenant", "show", "Acme").out == before
    assert len(run("tenant", "list", "--json").json) == 1


@pytest.mark.parametrize("option", ["--domain localhost", "--own here", "--tz Nowhere/Land", "--tracking-host here"])
def test_a_first_tenant_that_is_refused_makes_no_database(option: str, run: Terminal) -> None:
    run("tenant", "add", "X", *option.split(), status=1)
    assert not os.path.exists(os.path.dirname(run.database))


# == tenant add, set, show, list ==


def test_tenant_add_prints_ids_and_urls_that_work(run: Terminal) -> None:
    said = run("tenant", "add", "Acme", "--domain", "acme.com")
    shown = dict(line.split(maxsplit=1) for line in said.out.splitlines())
    assert shown["name"] == "Acme" and shown["id"] != shown["mail_id"] and said.err == ""
    assert shown["dashboard_url"] == f"{BASE}/{shown['id']}/dashboard"
    assert shown["pixel_url"].startswith(f"{BASE}/{shown['mail_id']}/pixel/")
    made = run.add("Globex", "--domain", "acme.com")
    assert set(made) >= {"name", "id", "mail_id", "dashboard_url", "pixel_url"}
    web = run.web()
    assert web.get(made["pixel_url"].removeprefix(BASE)).headers["X-Tracker"] == "recorded"
    assert "Globex" in web.get(made["dashboard_url"].removeprefix(BASE))


def test_tenant_add_with_id_makes_both_ids_that_and_warns_who_can_open_the_dashboard(run: Terminal) -> None:
    said = run("tenant", "add", "Acme", "--id", "abc123", "--json")
    assert (said.json["id"], said.json["mail_id"]) == ("abc123", "abc123")
    assert "every recipient can open this dashboard" in said.err
    assert "tenant set abc123 --domain" in said.err  # how plain links are made to redirect
    web = run.web()
    assert web.get("/abc123/pixel/e1.gif").headers["X-Tracker"] == "recorded"
    assert web.get("/abc123/dashboard").status_int == 200


@pytest.mark.parametrize(
    ("options", "host", "status"),
    [
        (("--domain", "acme.com"), "acme.com", 302),
        (("--domain", "acme.com"), "shop.acme.com", 302),
        (("--domain", "acme.com"), "globex.com", 200),
        (("--domain", "acme.com", "--domain", "globex.com"), "globex.com", 302),
        (("--domain", "acme.com:8443"), "acme.com:8443", 302),
        (("--domain", "acme.com:8443"), "acme.com", 200),
        (("--domain", "münchen.example"), "xn--mnchen-3ya.example", 302),
        (("--any-domain",), "anything.example", 302),
        (("--any-domain", "--block", "acme.com"), "acme.com", 200),
        (("--domain", "acme.com", "--suspend"), "acme.com", 200),
        ((), "acme.com", 200),
    ],
)
def test_tenant_add_and_tenant_set_say_where_plain_links_may_lead(
    options: tuple[str, ...], host: str, status: int, run: Terminal
) -> None:
    made, other = run.add("Acme", *options), run.add("Globex")
    run("tenant", "set", "Globex", *options)
    for each in (made, other):
        assert run.web().get(f"/{each['mail_id']}/click/e1?url=https://{host}/").status_int == status


def test_tenant_add_takes_all_that_tenant_set_takes(run: Terminal) -> None:
    words = ("--block", "evil.com", "--tz", "Europe/Rome", "--own", "203.0.113.7", "--suspend")
    made = run.add("Acme", *words)
    shown = run("tenant", "show", made["id"], "--json").json
    assert (shown["blocked"], shown["tz"], shown["own_addresses"]) == (["evil.com"], "Europe/Rome", ["203.0.113.7"])
    assert shown["suspended"] is True


@pytest.mark.parametrize(
    ("base", "options", "begins"),
    [
        (BASE, ("--tracking-host", "Track.Acme.com"), "https://track.acme.com/"),
        ("", ("--tracking-host", "track.acme.com"), "https://track.acme.com/"),
        ("", ("--local",), "http://localhost:3210/"),
    ],
)
def test_links_of_a_new_tenant_begin_with(base: str, options: tuple[str, ...], begins: str, run: Terminal) -> None:
    run.monkeypatch.setenv("BASE_URL", base)
    run.monkeypatch.setenv("PORT", "3210")
    assert run.add("Acme", *options)["pixel_url"].startswith(begins)


def test_without_a_public_address_tenant_add_refuses_and_tenant_show_says_to_set_it(run: Terminal) -> None:
    run.monkeypatch.delenv("BASE_URL")
    said = run("tenant", "add", "Acme", "--json", status=1)
    assert said.out == ""
    assert "BASE_URL" in said.err and "--local" in said.err and "called back" in said.err
    assert not run.database.exists()
    run.add("Acme", "--local")
    assert "BASE_URL" in run("tenant", "show", "Acme").out
    assert "http://localhost:3000/" in run("tenant", "show", "Acme", "--local").out


def test_tenant_set_changes_name_and_rules_and_shows_them(run: Terminal) -> None:
    made = run.add("Acme", "--domain", "acme.com")
    words = ("--name", "Acme Shoes", "--domain", "shoes.com", "--remove-domain", "acme.com", "--block", "evil.com")
    shown = run("tenant", "set", "Acme", "--json", *words).json
    assert (shown["name"], shown["domains"], shown["blocked"]) == ("Acme Shoes", ["shoes.com"], ["evil.com"])
    assert (shown["id"], shown["mail_id"]) == (made["id"], made["mail_id"])
    for options, name, expected in (
        (("--any-domain",), "domains", ["any"]),
        (("--no-any-domain",), "domains", ["shoes.com"]),
        (("--unblock", "evil.com"), "blocked", []),
        (("--tracking-host", "track.acme.com"), "tracking_host", "track.acme.com"),
        (("--tracking-host", ""), "tracking_host", ""),
        (("--suspend",), "suspended", True),
        (("--no-suspend",), "suspended", False),
    ):
        assert run("tenant", "set", "Acme Shoes", "--json", *options).json[name] == expected


def test_a_tenant_is_known_by_its_ids_even_where_they_are_anothers_name_and_by_its_name(run: Terminal) -> None:
    made = run.add("Acme & Söhne")
    run.add(made["mail_id"])
    run.add(made["id"])
    for by in ("id", "mail_id", "name"):
        assert run("tenant", "show", made[by], "--json").json["id"] == made["id"]


def test_a_name_that_two_tenants_have_is_an_error_that_lists_their_mail_ids(run: Terminal) -> None:
    ids = [run.add("Acme")["mail_id"] for _ in range(2)]
    for words in (("tenant", "show"), ("tenant", "set"), ("tenant", "key"), ("tenant", "rotate"), ("stats",)):
        said = run(*words, "Acme", status=1)
        assert all(mail_id in said.err for mail_id in ids) and said.out == ""
    assert "Acme" in run("tenant", "remove", "Acme", "--yes", status=1).err
    assert len(run("tenant", "list", "--json").json) == 2


def test_tenant_list_has_the_numbers_of_30_days_counts_what_waits_and_shows_no_dashboard_ids(
    stage: Stage, run: Terminal
) -> None:
    now = tracker.now_ms()
    with stage.database.transaction() as connection:
        mails = [tracker.Registration(f"k{number}") for number in range(4)]
        tracker.register_emails(connection, stage.acme.number, mails, now)
        tracker.register_emails(connection, stage.acme.number, [tracker.Registration("old")], now - 40 * 86_400_000)
    lines = [hit(stage, "k0", now), hit(stage, "k1", now, ua="Mozilla/5.0"), hit(stage, "k2", now, ua=MACHINE)]
    segment(stage, *lines, hit(stage, "old", now))  # they wait in the spool: the command must drain first
    listed = run("tenant", "list", "--json")
    assert stage.acme.id not in listed.out + run("tenant", "list").out
    acme, globex = listed.json
    assert (acme["name"], acme["sent"], acme["opened"], acme["opened_unconfirmed"]) == ("Acme", 4, 1, 1)
    assert acme["mail_id"] == stage.acme.mail_id and acme["last_hit_at"] and not acme["suspended"]
    assert (globex["name"], globex["sent"], globex["last_hit_at"]) == ("Globex", 0, None)
    head, *table = run("tenant", "list").out.splitlines()
    assert head.split()[:3] == ["mail_id", "sent", "opened"]
    assert table[0].split()[:3] == [stage.acme.mail_id, "4", "1–2"] and table[0].endswith(" Acme")
    assert "none" in table[1]


# == tenant key, rotate, remove ==


def write(web: webtest.TestApp, id_: str, key: str, token: str = "") -> int:
    """Try to register an email; returns the status."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    status = web.post_json(f"/{id_}/emails", {"key": key}, headers=headers, expect_errors=True).status_int
    return int(status)


def test_an_api_key_is_printed_once_stored_hashed_and_needed_until_it_is_another_or_none(run: Terminal) -> None:
    made = run.add("Acme")
    assert write(run.web(), made["id"], "k1") == 201
    key = run("tenant", "key", "Acme").out.strip()
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", key)
    for path in run.database.parent.rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes(), path
    assert key not in run("tenant", "show", "Acme").out
    assert [write(run.web(), made["id"], "k2", token) for token in ("", key)] == [401, 201]
    second = run("tenant", "key", "Acme", "--json").json["api_key"]
    assert [write(run.web(), made["id"], "k3", token) for token in (key, second)] == [401, 201]
    assert "no API key" in run("tenant", "key", "Acme", "--remove").out
    assert run("tenant", "show", "Acme", "--json").json["api_key"] is False
    assert write(run.web(), made["id"], "k4") == 201


def test_writing_for_a_one_id_tenant_needs_a_key(run: Terminal) -> None:
    run.add("Acme", "--id", "abc123")
    assert write(run.web(), "abc123", "k1") == 403
    key = run("tenant", "key", "abc123").out.strip()
    assert write(run.web(), "abc123", "k1", key) == 201
    assert "writing is closed" in run("tenant", "key", "abc123", "--remove").out
    assert write(run.web(), "abc123", "k2") == 403


@pytest.mark.parametrize("options", [(), ("--id", "abc123")], ids=["two ids", "one id"])
def test_after_rotate_the_old_dashboard_is_gone_and_old_mail_works(options: tuple[str, ...], run: Terminal) -> None:
    made = run.add("Acme", "--domain", "acme.com", *options)
    rotated = run("tenant", "rotate", "Acme", "--json").json
    assert rotated["id"] != made["id"] and rotated["mail_id"] == made["mail_id"]
    web = run.web()
    assert web.get(f"/{made['id']}/dashboard", expect_errors=True).status_int == 404
    assert web.get(f"/{rotated['id']}/dashboard").status_int == 200
    assert web.get(f"/{made['mail_id']}/pixel/e1.gif").headers["X-Tracker"] == "recorded"
    assert web.get(f"/{made['mail_id']}/click/e1?url=https://acme.com/").status_int == 302
    stats = web.get(f"/{rotated['id']}/stats.json").json
    assert stats["unregistered"]["emails"] == 1  # counted for the tenant all the same


def test_remove_asks_for_the_name_and_a_wrong_one_deletes_nothing(run: Terminal) -> None:
    made = run.add("Acme")
    for wrong in ("acme\n", "\n", made["mail_id"] + "\n"):
        said = run("tenant", "remove", "Acme", stdin=wrong, status=1)
        assert "naming page" in said.out and "nothing was deleted" in said.err
    run("tenant", "remove", "Acme", stdin="", status=1)  # the end of the input
    assert run("tenant", "show", "Acme", "--json").json["id"] == made["id"]
    said = run("tenant", "remove", "Acme", stdin="Acme\n")
    assert "deleted Acme" in said.out and "naming page" in said.out
    assert run("tenant", "list", "--json").json == []


def test_remove_deletes_everything_of_that_tenant_and_nothing_else(stage: Stage, run: Terminal) -> None:
    for tenant in (stage.acme, stage.globex):
        answer = stage.web.post_json(
            f"/{tenant.id}/emails", [{"key": "k1", "campaign": "Spring", "recipient": "a@b.c"}]
        )
        assert answer.status_int == 201
        stage.pixel("k1", tenant)
        stage.pixel("unregistered", tenant)
        stage.web.get(f"/{tenant.mail_id}/click/k1?url=https://acme.com/")
        stage.web.get(f"/{tenant.mail_id}/click/k1?url=https://elsewhere.example/")
    stage.drain()

    def numbers_of_globex() -> Any:
        numbers = run("stats", "Globex", "--json").json
        numbers["range"].pop("to")  # the time goes on
        return numbers

    before = numbers_of_globex()
    run("tenant", "set", "Acme", "--own", "203.0.113.7")
    run("tenant", "remove", "Acme", "--yes")
    assert run.rows("select * from tenant_rules") == []
    for table in ("emails", "events", "urls", "reasons", "uniques", "cohorts", "campaigns", "links", "named_hosts"):
        assert {row[0] for row in run.rows(f"select tenant from {table}")} <= {stage.globex.number}, table
    assert numbers_of_globex() == before
    assert "no tenant" in run("stats", "Acme", status=1).err
    assert run("check").out == "all is well\n"


def test_links_in_the_mail_of_a_removed_tenant_show_the_naming_page_and_its_mail_id_stays_reserved(
    run: Terminal,
) -> None:
    made = run.add("Acme", "--id", "abc123", "--any-domain")
    web = run.web()
    signed = tracker.click_path(run.apps[0].secrets[0], "abc123", "e1", "https://acme.com/shoes")
    assert web.get(signed).status_int == 302
    run("tenant", "remove", made["id"], "--yes")
    web = run.web()
    for path in (signed, "/abc123/click/e1?url=https://acme.com/shoes"):
        page = web.get(path)
        assert page.status_int == 200 and "https://acme.com/shoes" in page
    assert web.get("/abc123/dashboard", expect_errors=True).status_int == 404
    assert "taken" in run("tenant", "add", "New", "--id", "abc123", status=1).err


# == stats, drain, ingest ==


def test_stats_says_as_json_what_stats_json_says_and_to_people_the_dashboards_figures(
    stage: Stage, run: Terminal
) -> None:
    stage.web.post_json(f"/{stage.acme.id}/emails", [{"key": "k1"}, {"key": "k2"}])
    stage.pixel("k1")
    stage.web.get(f"/{stage.acme.mail_id}/click/k1?url=https://acme.com/", headers={"User-Agent": CHROME})
    words = ("stats", "Acme", "--range", "7d", "--tz", "Europe/Rome")
    printed = run(*words, "--json").json
    served = stage.web.get(f"/{stage.acme.id}/stats.json?range=7d&tz=Europe/Rome").json
    for numbers in (printed, served):  # the time goes on between the two
        numbers["range"].pop("to")
    assert printed == served
    assert printed["sent"]["emails"] == 2 and printed["sent"]["opened"]["person"] == 1
    assert printed["activity"]["clicks"]["hits"]["person"] == 1
    first, *figures = run(*words).out.splitlines()
    values = {line.split()[0]: line.split()[1] for line in figures}
    assert (first, values["Sent"], values["Opened"]) == ("Acme: 7 days, Europe/Rome", "2", "50.0")


def test_drain_counts_all_batches_that_wait_and_keeps_apart_what_it_cannot_read(stage: Stage, run: Terminal) -> None:
    run.monkeypatch.setattr(tracker, "BACKLOG_BATCH", 2)
    segment(stage, hit(stage, "k1"), b"no hit\n", hit(stage, "k2"), click(stage, "k1"))
    said = run("drain")
    assert "drained 3 hits" in said.out and "1 lines" in said.out
    assert list(run.spool.glob("*.jsonl")) == []
    assert [path.read_bytes() for path in (run.spool / "rejected").iterdir()] == [b"no hit\n"]
    assert "drained 0 hits" in run("drain").out
    assert run.rows("select count(*) from events") == [(3,)]


def journal(line: bytes) -> bytes:
    """A line as a service's log has it."""
    return b"Nov 24 21:14:45 mail email-tracker[4711]: unspooled " + line


def test_ingest_counts_each_hit_of_a_log_once_and_names_the_line_it_cannot_read(stage: Stage, run: Terminal) -> None:
    log = run.folder / "journal.txt"
    other = b"Nov 24 21:14:44 mail email-tracker[4711]: [7] Booting worker {with braces}\n"
    k1, k2, k3 = (journal(hit(stage, key)) for key in ("k1", "k2", "k3"))
    log.write_bytes(other + k1 + k2 + other + k3 + hit(stage, "k4"))
    assert run("ingest", str(log)).out == f"{log}: 3 hits counted, 0 known already, 0 not readable\n"
    assert run("ingest", str(log), str(log)).out == f"{log}: 0 hits counted, 3 known already, 0 not readable\n" * 2
    log.write_bytes(k1 + journal(b'{"t": "yesterday"}\n') + journal(hit(stage, "k5")))
    said = run("ingest", str(log), status=1)
    assert f"{log}, line 2: t: expected seconds since 1970" in said.err
    assert said.out == f"{log}: 1 hits counted, 1 known already, 1 not readable\n"
    assert run.rows("select count(*) from events") == [(4,)]
    assert run("check").out == "all is well\n"


# == check ==


def fill(stage: Stage) -> None:
    """Some emails with events of each kind."""
    stage.web.post_json(f"/{stage.acme.id}/emails", [{"key": "k1", "campaign": "Spring"}, {"key": "k2"}])
    for key in ("k1", "k2", "unregistered"):
        stage.pixel(key)
        stage.pixel(key, agent=MACHINE)
        stage.web.get(f"/{stage.acme.mail_id}/click/{key}?url=https://acme.com/", headers={"User-Agent": CHROME})
        stage.web.get(f"/{stage.acme.mail_id}/click/{key}?url=https://other.example/")
    stage.drain()


@pytest.mark.parametrize(
    ("sql", "named"),
    [
        ("update reasons set hits = hits + 1 where type = 1", "reasons"),
        ("update uniques set emails = 0", "uniques"),
        ("update cohorts set opened_person = opened_person + 1", "cohorts"),
        ("delete from campaigns", "campaigns"),
        ("update links set clicks_person = clicks_person + 5", "links"),
        ("update named_hosts set clicks = 99", "named_hosts"),
        ("update email_counts set open_machine = 7", "email_counts"),
        ("delete from link_counts", "link_counts"),
    ],
)
def test_check_lists_what_is_wrong_with_a_roll_up_and_repair_mends_it(
    sql: str, named: str, stage: Stage, run: Terminal
) -> None:
    fill(stage)
    before = run("stats", "Acme", "--json").json["activity"]
    run.change(sql)
    said = run("check", status=1)
    *faults, summary = said.out.splitlines()
    built_on_it = ("links", "cohort", "campaigns", "activity", "reason")
    assert faults and all(fault.startswith((named, *built_on_it)) for fault in faults)
    assert any(fault.startswith(f"{named}:") for fault in faults)
    assert summary == f"{len(faults)} faults"
    assert run("check", "--repair").out.endswith("all is well\n")
    assert run("check").out == "all is well\n"
    assert run("stats", "Acme", "--json").json["activity"] == before


def test_check_notices_that_tenants_json_is_not_right_and_repair_writes_it(run: Terminal) -> None:
    run.add("Acme")
    path = run.database.parent / "tenants.json"
    right = path.read_text()
    for content in (None, "{}", "not JSON"):
        path.unlink()
        if content is not None:
            path.write_text(content)
        assert "tenants.json" in run("check", status=1).out
        run("check", "--repair")
        assert path.read_text() == right


def test_check_notices_events_that_belong_to_no_email(stage: Stage, run: Terminal) -> None:
    fill(stage)
    run.change("delete from emails where key = 'k2'")
    # Roll-ups can be counted again; what is lost is lost, and goes on being said.
    for words in (("check",), ("check", "--repair")):
        assert "foreign_key_check" in run(*words, status=1).out


def test_check_notices_a_segment_that_is_shorter_than_what_was_drained_of_it(stage: Stage, run: Terminal) -> None:
    stage.pixel("k1")
    tracker.drain(stage.database)  # the segment is still its writer's, so it stays
    [path] = run.spool.glob("*.jsonl")
    os.truncate(path, 10)
    assert path.name in run("check", status=1).out


# == config, make demo ==


def test_config_prints_the_settings_in_force_and_masks_secrets(run: Terminal) -> None:
    secret, key = "s3cret-" * 6, "operator-key-of-32-characters-xx"
    run.monkeypatch.setenv("SECRET_KEY", secret)
    run.monkeypatch.setenv("API_KEY", key)
    run.monkeypatch.setenv("WEB_CONCURRENCY", "7")
    for options in ((), ("--json",)):
        said = run("config", *options)
        assert secret not in said.out and key not in said.out
    shown = said.json
    assert set(shown) == {
        each.metadata["variable"] for each in dataclasses.fields(tracker.Settings) if "variable" in each.metadata
    }
    assert (shown["API_KEY"], shown["SECRET_KEY"], shown["WEB_CONCURRENCY"]) == ("(set)", "(set)", 7)
    assert shown["BASE_URL"] == BASE
    lines = dict(line.split("=", 1) for line in run("config").out.splitlines())
    assert lines["WEB_CONCURRENCY"] == "7" and lines["API_KEY"] == "(set)" and set(lines) == set(shown)
    run.monkeypatch.delenv("API_KEY")
    assert run("config", "--json").json["API_KEY"] is None


def test_all_faults_in_the_settings_are_listed_at_once(run: Terminal) -> None:
    faulty = {"PORT": "http", "WEB_CONCURRENCY": "0", "BASE_URL": "track.example.com", "DATABASE_URL": "mysql://x"}
    for name, value in faulty.items():
        run.monkeypatch.setenv(name, value)
    run.monkeypatch.setenv("API_KEY_FILE", str(run.folder / "missing"))
    for words in (("config",), ("tenant", "list"), ("serve",), ()):
        said = run(*words, status=2)
        lines = said.err.splitlines()
        assert len(lines) == 5 and said.out == ""
        for name, value in faulty.items():
            [line] = [line for line in lines if line.startswith(f"tracker.py: {name} ")]
            assert value in line and "expected" in line
        assert any(line.startswith("tracker.py: API_KEY:") for line in lines)


def test_the_demo_fills_an_empty_database_with_two_tenants_whose_numbers_look_like_real_mail(run: Terminal) -> None:
    run.monkeypatch.delenv("BASE_URL")
    run.capsys.readouterr()
    assert demo.main() == 0
    urls = re.findall(r"http://localhost:3000(/\S+/dashboard)", run.capsys.readouterr().out)
    assert len(urls) == len(set(urls)) == 2
    assert run("check").out == "all is well\n"
    web = run.web()
    for url in urls:
        stats = web.get(url.replace("/dashboard", "/stats.json"), {"range": "90d"}).json
        sent, before = stats["sent"], stats["before"]["sent"]
        assert 0.35 < sent["opened"]["person"] / sent["emails"] < 0.5
        assert 0.2 < sent["opened"]["unconfirmed"] / sent["emails"] < 0.3
        assert 0.02 < sent["clicked"]["person"] / sent["emails"] < 0.1  # notes on orders are clicked more
        assert sent["opened"]["machine"] > 0
        assert 0.9 < sent["emails"] / before["emails"] < 1.1
    with pytest.raises(SystemExit, match="has tenants already"):
        demo.main()


# == What goes wrong ==

NEED_A_DATABASE = [
    *("tenant set Acme --any-domain", "tenant list", "tenant show Acme", "tenant key Acme", "tenant rotate Acme"),
    *("tenant remove Acme --yes", "stats Acme", "drain", "ingest", "check", "check --repair"),
]


@pytest.mark.parametrize("words", NEED_A_DATABASE)
def test_a_command_that_needs_a_database_says_that_there_is_none_and_makes_none(words: str, run: Terminal) -> None:
    said = run(*words.split(), status=1)
    assert said.err.startswith(f"tracker.py: no database at {run.database}; ") and said.err.count("\n") == 1
    assert said.out == "" and not run.database.parent.exists()
    run.add("Acme")
    run.database.unlink()  # it was lost
    assert "no database at" in run(*words.split(), status=1).err
    assert not run.database.exists()


def test_no_command_makes_a_new_database_where_one_was_lost(run: Terminal) -> None:
    run.add("Acme")
    run.database.unlink()
    said = run("tenant", "add", "Acme", status=1)
    assert "says that there was one" in said.err and "backup" in said.err
    assert not run.database.exists()


def spoil(path: Path, what: bytes | None) -> None:
    """Put a file in the place of another, or a folder."""
    path.unlink(missing_ok=True)
    if what is None:
        path.mkdir()
    else:
        path.write_bytes(what)


@pytest.mark.parametrize("what", ["a folder", "nothing", "a shopping list", "a database of another program"])
def test_what_is_no_database_of_ours_is_named_and_left_as_it_is(what: str, run: Terminal) -> None:
    run.add("Acme")
    with contextlib.closing(sqlite3.connect("another.db")) as connection:
        connection.execute("create table notes (note)")
    contents = {"nothing": b"", "a shopping list": b"milk\n" * 400, "a folder": None}
    spoil(run.database, contents.get(what, Path("another.db").read_bytes()))
    before = run.database.read_bytes() if run.database.is_file() else None
    for words in ("tenant add Globex", *NEED_A_DATABASE):
        said = run(*words.split(), status=1)
        assert str(run.database) in said.err and said.out == "", words
        assert (run.database.read_bytes() if run.database.is_file() else None) == before, words


def test_a_file_that_cannot_be_written_is_named(run: Terminal) -> None:
    run.add("Acme")
    for name in ("tenants.json", "write.lock"):
        spoil(run.database.parent / name, None)
        assert name in run("tenant", "set", "Acme", "--any-domain", status=1).err


def parsers(parser: argparse.ArgumentParser, above: str = "") -> dict[str, tuple[str, argparse.ArgumentParser]]:
    """All commands below a parser: what the list above them says of each, and its own parser."""
    found = {}
    for group in parser._actions:
        if not isinstance(group, argparse._SubParsersAction):
            continue
        listed = {choice.dest: choice.help or "" for choice in group._choices_actions}
        for name, each in group.choices.items():
            found[f"{above}{name}"] = (listed.get(name, ""), each)
            found |= parsers(each, f"{above}{name} ")
    return found


def test_help_says_what_each_command_is_for_and_explains_each_option(run: Terminal) -> None:
    found = parsers(tracker.command_line())
    assert set(found) == {*tracker.COMMANDS, *tracker.COMMAND_GROUPS}
    for command, (listed, parser) in found.items():
        assert len(listed.split()) >= 3, command
        *above, name = command.split()
        assert re.search(rf"^    {name}\b", run(*above, "--help").out, re.MULTILINE), command
        said = run(*command.split(), "--help").out
        assert f"usage: tracker.py {command}" in said
        for action in parser._actions:
            if not isinstance(action, argparse._SubParsersAction):
                assert len((action.help or "").split()) >= 2, f"{command} {action.dest}"


def test_a_file_for_nginx_is_written_whole_or_not_at_all(run: Terminal) -> None:
    """A shell's `>` would leave an empty file, and nginx would take the site away at its next reload."""
    path = run.folder / "email-tracker.conf"
    path.write_text("the old one")
    run.monkeypatch.setenv("BASE_URL", "https://track.example.com")
    assert "no database at" in run("nginx", "--output", str(path), status=1).err
    assert path.read_text() == "the old one"
    run.add("Acme")
    printed = run("nginx").out
    assert run("nginx", "--output", str(path)).out == ""
    assert path.read_text() == printed and "server_name track.example.com;" in printed
    assert sorted(entry.name for entry in run.folder.iterdir()) == ["data", path.name]


def test_version_names_what_runs_and_its_licences(run: Terminal) -> None:
    ours, gunicorn, below = run("--version").out.splitlines()
    assert ours == f"email-tracker {tracker.__version__} (MIT)"
    assert re.fullmatch(r"gunicorn [0-9.]+ \(MIT\)", gunicorn)
    assert "Python" in below and sqlite3.sqlite_version in below


@pytest.mark.parametrize(
    ("shell", "words"),
    [
        *(('"$@" | true', words) for words in ("tenant list", "tenant show Acme --json", "config", "--help")),
        ('"$@" >&-', "tenant list"),
        ('"$@" >/dev/full', "tenant list"),
        ('"$@" 2>&-', "tenant show Nobody"),
        ('"$@" <&-', "ingest"),
        ('"$@" <&-', "tenant remove Acme"),
    ],
)
def test_readers_that_have_gone_and_closed_and_full_streams_end_a_command_without_a_traceback(
    shell: str, words: str, run: Terminal
) -> None:
    run.add("Acme")
    environ = {name: os.environ[name] for name in ("PATH", "DATABASE_URL", "BASE_URL")}
    command = ["sh", "-c", shell, "sh", sys.executable, str(ROOT / "tracker.py"), "--env", os.devnull, *words.split()]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert done.returncode in (0, 1) and (done.stderr == "" or "|" not in shell)
    assert [tenant["name"] for tenant in run("tenant", "list", "--json").json] == ["Acme"]


def test_ctrl_c_ends_a_command_without_a_traceback(run: Terminal) -> None:
    run.add("Acme")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    run.monkeypatch.setattr(tracker, "find_tenant", interrupted)
    assert run("tenant", "show", "Acme", status=1).err == ""


# == judge ==


IPHONE = "Mozilla/5.0 (iPhone; CPU iPhone OS 18_6 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Mobile/15E148"
GMAIL_PROXY = "Mozilla/5.0 (X11; Linux) Gecko Firefox/11.0 (via ggpht.com GoogleImageProxy; 2)"


def hits_file(run: Terminal, *lines: bytes) -> str:
    path = run.folder / "hits.jsonl"
    path.write_bytes(b"".join(lines))
    return str(path)


def test_judge_says_who_made_each_hit_and_why(stage: Stage, run: Terminal) -> None:
    """In the order given, for people to read, a line each; it needs no database and changes none."""
    stage.app.close()
    path = hits_file(
        run,
        hit(stage, "e1", ua="Mozilla/5.0"),
        click(stage, "e1", at=NOW + 60_000),
        click(stage, "e1", ua=MACHINE, ip="192.0.2.0"),
    )
    run.monkeypatch.setenv("DATABASE_URL", "sqlite:nowhere/tracking.db")
    said = run("judge", path)
    at = tracker.iso_time(NOW)
    assert [re.split(r"\s{2,}", line, maxsplit=5) for line in said.out.splitlines()] == [
        [at, "open", "prefetch", "certain", "unconfirmed", f"apple-mpp: {tracker.sentence_of('apple-mpp')}"],
        [tracker.iso_time(NOW + 60_000), "click", "human", "probable", "person", "browser: A web browser."],
        [at, "click", "bot", "certain", "machine", f"bot-word: {tracker.sentence_of('bot-word')}"],
    ]
    assert said.err == ""
    assert not (run.folder / "nowhere").exists()


def test_judge_says_the_same_to_programs(stage: Stage, run: Terminal) -> None:
    path = hits_file(run, hit(stage, "e1", ua=GMAIL_PROXY), b"\n", hit(stage, "e1", NOW + 400, ua=GMAIL_PROXY))
    told = [json.loads(line) for line in run("judge", path, "--json").out.splitlines()]
    common = {"event_type": "open", "verdict": "proxy", "certainty": "certain"}
    first = {"reason": "image-proxy", "counts_as": "person", "sentence": tracker.sentence_of("image-proxy")}
    second = {"reason": "repeat", "counts_as": "set_aside", "sentence": tracker.sentence_of("repeat")}
    assert told == [
        {"at": tracker.iso_time(NOW), **common, **first},
        {"at": tracker.iso_time(NOW + 400), **common, **second},
    ]


@pytest.mark.parametrize("words", [("-",), ()])
def test_judge_and_ingest_read_standard_input(words: tuple[str, ...], stage: Stage, run: Terminal) -> None:
    line = hit(stage, "e1")
    assert json.loads(run("judge", *words, "--json", stdin=line.decode()).out)["verdict"] == "human"
    assert run("judge", *words).out == ""
    said = run("ingest", *words, stdin=journal(line).decode())
    assert said.out == "-: 1 hits counted, 0 known already, 0 not readable\n"


AGO = NOW // 1000 - 1


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        ("{}", "browser"),
        ('{"delivered_at": "2026-11-24T18:21:24.430Z", "links": 4, "own_addresses": ["203.0.113.0/24"]}', "too-soon"),
        (f'{{"sent_at": {AGO}}}', "too-soon"),
        (f'{{"sent_at": "{AGO}.000"}}', "too-soon"),
        (f'{{"sent_at": {AGO}, "delivered_at": {AGO - 8}}}', "browser"),
        ('{"own_addresses": ["198.51.100.0"]}', "own-address"),
        ('{"own_addresses": ["198.51.0.0/16"]}', "own-address"),
    ],
)
def test_a_first_line_may_say_what_is_known_of_the_email(first: str, reason: str, stage: Stage, run: Terminal) -> None:
    path = hits_file(run, b' {"email": %s}\n' % first.encode(), click(stage, "e1"))
    assert json.loads(run("judge", path, "--json").out)["reason"] == reason


def test_how_many_links_a_mail_has_tells_who_followed_them_all(stage: Stage, run: Terminal) -> None:
    lines = [click(stage, "e1", f"https://acme.com/{n}", NOW + 5_000 * n) for n in range(4)]
    assert run("judge", hits_file(run, *lines)).out.count("burst") == 0
    assert run("judge", hits_file(run, b'{"email": {"links": 4}}\n', *lines)).out.count("burst") == 4
    assert run("judge", hits_file(run, b'{"email": {"links": 5}}\n', *lines)).out.count("burst") == 0


@pytest.mark.parametrize(
    ("number", "line", "told"),
    [
        (1, b'{"email": []}', "email: expected an object"),
        (1, b'{"email": {"sent": 1}}', "an object with some of sent_at, delivered_at, links, own_addresses"),
        (1, b'{"email": {"sent_at": "soon"}}', "sent_at"),
        (1, b'{"email": {"sent_at": true}}', "sent_at: expected a time"),
        (1, b'{"email": {"delivered_at": -5}}', "delivered_at: expected a time"),
        (1, b'{"email": {"links": "4"}}', "links: expected how many"),
        (1, b'{"email": {"links": -1}}', "links: expected how many"),
        (1, b'{"email": {"own_addresses": "203.0.113.7"}}', "own_addresses: expected a list"),
        (1, b'{"email": {"own_addresses": ["the office"]}}', "'the office': expected an address or a network"),
        (1, b'{"email": {', "expected one JSON object"),
        (1, b'{"email": ' + b"[" * 100_000, "expected one JSON object"),
        (3, b"no hit", ""),
        (3, b'{"email": {"links": 4}}', ""),
        (3, b'{"id": "a1", "t": 1, "uri": "/x"}', ""),
        (3, b"[]", ""),
        (3, b'{"id": "a1", "t": 1795544485, "kind": "email", "mail_id": "x", "key": "e1"}', ""),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_line_that_says_nothing_sensible_is_refused_by_its_number(
    number: int, line: bytes, told: str, stage: Stage, run: Terminal
) -> None:
    path = hits_file(run, hit(stage, "e1") * (number - 1), line + b"\n", hit(stage, "e1"))
    said = run("judge", path, status=1)
    assert said.out == "" and f"{path}, line {number}: " in said.err and told in said.err


def test_hits_with_several_keys_are_judged_with_a_note(stage: Stage, run: Terminal) -> None:
    lines = [click(stage, f"e{n}", f"https://acme.com/{n}", NOW + n) for n in range(3)]
    said = run("judge", hits_file(run, *lines))
    assert said.out.count("burst") == 3
    assert "several keys" in said.err


def test_judge_names_fields_that_no_hit_has(stage: Stage, run: Terminal) -> None:
    line = {"t": NOW / 1000, "uri": f"/{stage.acme.mail_id}/pixel/e1.gif", "answer": "pixel"}
    said = run("judge", stdin=json.dumps({**line, "user_agent": "Mozilla/5.0"}))
    assert "no field of a hit, so ignored: user_agent; expected some of t, method, host, uri, ip, ua" in said.err
    assert "no-user-agent" in said.out
    assert run("judge", stdin=json.dumps({**line, "ua": "Mozilla/5.0"})).err == ""
    assert "-, line 1: t: expected" in run("judge", stdin="{}", status=1).err


# == rejudge ==


def misjudge(run: Terminal, where: str, verdict: str = "bot", reason: str = "not-a-browser", state: int = 3) -> None:
    """Put a judgement into the database that today's rules would not give, and the numbers that go with it."""
    run.change(f"insert or ignore into judgements (verdict, reason, state) values ('{verdict}', '{reason}', {state})")
    judgement = f"select id from judgements where verdict = '{verdict}' and reason = '{reason}' and state = {state}"
    run.change(f"update events set judgement = ({judgement}) where {where}")
    run("check", "--repair")


def states(run: Terminal) -> Any:
    rows = run.rows(
        "select key, open_person, open_machine, click_person, click_machine from emails join email_counts on email = id"
    )
    return {key: counts for key, *counts in rows}


def test_rejudge_applies_todays_rules_to_stored_hits_and_corrects_every_number(stage: Stage, run: Terminal) -> None:
    segment(stage, hit(stage, "e1"), click(stage, "e1"), hit(stage, "e2", ua=MACHINE), hit(stage, "e3"))
    run("drain")
    before, dashboard = states(run), run("stats", "Acme", "--json").json
    misjudge(run, "email in (select id from emails where key in ('e1', 'e2'))", "human", "browser", 1)
    misjudge(run, "email in (select id from emails where key = 'e3')")
    assert states(run) != before
    assert run("rejudge").out == "2 hits are judged otherwise than before\n"
    assert states(run) == before == {"e1": [1, 0, 1, 0], "e2": [0, 1, 0, 0], "e3": [1, 0, 0, 0]}
    assert run("stats", "Acme", "--json").json["sent"] == dashboard["sent"]
    assert run("check").out == "all is well\n"
    assert run("rejudge").out == "all hits are judged as before\n"


def test_rejudge_looks_at_whole_sessions(stage: Stage, run: Terminal) -> None:
    lines = [click(stage, "e1", f"https://acme.com/{n}", NOW + n * 1000) for n in range(3)]
    segment(stage, *lines, hit(stage, "e1", NOW + 9_000, ua=GMAIL_PROXY), hit(stage, "e1", NOW + 9_500, ua=GMAIL_PROXY))
    run("drain")
    misjudge(run, "type = 2", "human", "browser", 1)
    misjudge(run, "type = 1", "proxy", "image-proxy", 1)
    assert run("rejudge").out == "4 hits are judged otherwise than before\n"
    judged = "select reason from event_details order by at"
    assert [row[0] for row in run.rows(judged)] == ["burst"] * 3 + ["image-proxy", "repeat"]
    assert run("check").out == "all is well\n"


def test_rejudge_since_a_time_leaves_emails_without_later_hits(stage: Stage, run: Terminal) -> None:
    day = 86_400_000
    segment(stage, hit(stage, "old", NOW - 5 * day), hit(stage, "new", NOW - 5 * day), hit(stage, "new", NOW))
    run("drain")
    misjudge(run, "1")
    said = run("rejudge", "--since", tracker.iso_time(NOW - day) or "")
    assert said.out == "2 hits are judged otherwise than before\n"
    assert states(run) == {"old": [0, 1, 0, 0], "new": [2, 0, 0, 0]}
    assert run("check").out == "all is well\n"


def test_rejudge_leaves_what_was_judged_by_an_agent_or_an_address_that_was_erased(stage: Stage, run: Terminal) -> None:
    segment(
        stage,
        *(hit(stage, "e1", NOW + n * 20_000, ua=agent) for n, agent in enumerate((CHROME, MACHINE, GMAIL_PROXY))),
        click(stage, "e2", ip="40.107.218.0"),
        click(stage, "e3"),
        click(stage, "e3", at=NOW + 5_000, ip="203.0.113.0", ua=IPHONE),
    )
    run("drain")
    judged = run.rows("select verdict, reason from event_details order by email, at")
    assert [row[1] for row in judged] == ["browser", "bot-word", "image-proxy", "filter-network", "browser", "echo"]
    run.change("insert or ignore into agents (agent) values ('')")
    run.change("update events set fixed = 1, agent = (select id from agents where agent = '') where type = 1")
    run.change("update events set fixed = 1, address = null where type = 2")
    run.change(
        "update events set fixed = 0 where email in (select id from emails where key = 'e3') and at = (select min(at) from events)"
    )
    misjudge(run, "fixed = 0")
    assert run("rejudge").out == "1 hits are judged otherwise than before\n"
    assert run.rows("select verdict, reason from event_details order by email, at") == judged
    assert run("check").out == "all is well\n"


def test_rejudge_counts_what_waits_first_and_goes_on_from_email_to_email(stage: Stage, run: Terminal) -> None:
    run.monkeypatch.setattr(tracker, "REJUDGE_EMAILS", 2)
    segment(stage, *(hit(stage, f"e{n}") for n in range(5)))
    assert run("rejudge").out == "all hits are judged as before\n"
    misjudge(run, "1")
    assert run("rejudge").out == "5 hits are judged otherwise than before\n"


# == the sender's own addresses ==


def visit(web: webtest.TestApp, mail_id: str, address: str, agent: str = CHROME) -> None:
    """An open and a click from an address."""
    extra = {"REMOTE_ADDR": address}
    web.get(f"/{mail_id}/pixel/e1.gif", headers={"User-Agent": agent}, extra_environ=extra)
    web.get(
        f"/{mail_id}/click/e1?url=https://acme.com/", headers={"User-Agent": agent}, extra_environ=extra, status=302
    )


def spool_of(run: Terminal) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(run.spool.glob("*.jsonl")) for line in path.read_bytes().splitlines()]


def test_own_addresses_are_shown_as_they_are_read_and_can_be_taken_back(run: Terminal) -> None:
    run.add("Acme")
    own = ("--own", "203.0.113.7", "--own", "2001:DB8::/48", "--own", " 198.51.100.9/24", "--own", "203.0.113.7/32")
    shown = run("tenant", "set", "Acme", *own, "--json").json
    assert shown["own_addresses"] == ["198.51.100.0/24", "2001:db8::/48", "203.0.113.7"]
    assert run("tenant", "show", "Acme", "--json").json == shown
    taken = run("tenant", "set", "Acme", "--not-own", "198.51.100.0/24", "--not-own", "2001:db8::/48", "--json").json
    assert taken["own_addresses"] == ["203.0.113.7"]


def test_hits_from_an_own_address_are_marked_before_it_is_truncated_and_stand_in_no_number(run: Terminal) -> None:
    made = run.add("Acme", "--domain", "acme.com")
    run("tenant", "set", "Acme", "--own", "203.0.113.7", "--own", "2001:db8:5::/48")
    web = run.web()
    for address in ("203.0.113.7", "2001:db8:5::1", "203.0.113.8"):
        visit(web, made["mail_id"], address)
    lines = spool_of(run)
    assert [line.get("own") for line in lines] == [True] * 4 + [None] * 2
    assert [line["ip"] for line in lines] == ["203.0.113.0"] * 2 + ["2001:db8:5::"] * 2 + ["203.0.113.0"] * 2
    run.apps[0].spool.close()
    run("drain")
    judged = run.rows("select event_type, verdict, reason, count(*) from event_details group by 1, 2, 3 order by 2, 1")
    ours = [("click", "self", "own-address", 2), ("open", "self", "own-address", 2)]
    assert judged == [("click", "human", "browser", 1), ("open", "human", "browser", 1), *ours]
    assert states(run) == {"e1": [1, 0, 1, 0]}
    activity = run("stats", "Acme", "--json").json["activity"]
    assert [activity[kind]["hits"] for kind in ("opens", "clicks")] == [
        {"person": 1, "unconfirmed": 0, "machine": 0, "set_aside": 2}
    ] * 2
    assert run("check").out == "all is well\n"


def test_an_image_proxy_is_never_the_sender_and_another_tenant_has_its_own_addresses(run: Terminal) -> None:
    made, other = run.add("Acme", "--any-domain"), run.add("Globex", "--any-domain")
    run("tenant", "set", "Acme", "--own", "203.0.113.7")
    web = run.web()
    visit(web, made["mail_id"], "203.0.113.7", GMAIL_PROXY)
    visit(web, other["mail_id"], "203.0.113.7")
    run.apps[0].spool.close()
    run("drain")
    assert sorted(row[0] for row in run.rows("select verdict from event_details")) == ["bot", "human", "human", "proxy"]


def test_workers_hear_of_own_addresses_within_a_second_and_of_their_end(run: Terminal) -> None:
    made = run.add("Acme", "--domain", "acme.com")
    web = run.web()
    for words in ((), ("--own", "203.0.113.7"), ("--not-own", "203.0.113.7")):
        run("tenant", "set", "Acme", *words)
        run.apps[0].directory._look_at = 0.0
        visit(web, made["mail_id"], "203.0.113.7")
    assert [line.get("own") for line in spool_of(run)] == [None, None, True, True, None, None]
