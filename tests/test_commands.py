"""The commands, run in this process as a person runs them: what they print, what they change, how they fail."""

from __future__ import annotations

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
        self.apps.append(tracker.App(tracker.load_settings(os.environ, os.devnull)))
        return webtest.TestApp(tracker.wsgi(self.apps[-1]))

    def sql(self, statement: str) -> list[tuple[Any, ...]]:
        """Ask the database, or change it behind the program's back."""
        with contextlib.closing(sqlite3.connect(self.database)) as connection, connection:
            return connection.execute(statement).fetchall()


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

NO_NETWORKS = ("", "here", "203.0.113", "203.0.113.7/33", "203.0.113.7:80")
REFUSED = [
    ("tenant add X --id ab", 1, "3 to 64"),
    ("tenant add X --id pixel", 1, "word of the URLs"),
    ("tenant add X --id abc123", 1, "taken"),
    ("tenant add X --tracking-host t.acme.com", 1, "(abc123)"),
    *(
        (f"tenant {command} {option}", 1, told)
        for command in ("add X", "set Acme --name B")
        for option, told in (
            ("--domain https://acme.com/", "acme.com"),
            ("--domain localhost", "two labels"),
            ("--domain ''", "expected a domain"),
            ("--domain acme.com:port", "HOST:PORT"),
            ("--block x", "two labels"),
            ("--tracking-host 'no dots'", "no dots"),
            ("--tracking-host localhost", "two labels"),
            ("--tracking-host track.acme.com:8080", "without a port"),
            ("--tracking-host 192.0.2.1", "domain name"),
            ("--tracking-host track.example.com", "BASE_URL"),
            ("--tz ../../etc/passwd", "tz is '../../etc/passwd'; expected a time zone"),
            ("--utm utm_source", "--utm 'utm_source': expected NAME=VALUE"),
            *((f"--utm {text}", "such as utm_source=news&") for text in ("a=1&a=2", "a={x}", "?a=1", "a=#")),
            ("--forward ''", "'': expected a parameter's name"),
            *(
                (f"--no-forward '{text}'", "expected a parameter's name")
                for text in ("a b", "a=b", "a&b", "url", "ü", "x" * 101)
            ),
            ("--not-own here", "'here': expected an address or a network"),
            *((f"--own '{text}'", f"{text!r}: expected an address or a network") for text in NO_NETWORKS),
            *((f"--own {text}", f"'{text}': expected a network of one's own") for text in ("0.0.0.0/0", "2000::/3")),
        )
    ),
    *(
        (f"tenant {command} '{name}'", 1, "expected one line")
        for command in ("add", "set Acme --name")
        for name in ("", " ", "x" * 201, "two\nlines", "a\x1b[31mred")
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
    assert shown["name"] == "Acme" and shown["id"] != shown["mail_id"]
    assert said.err.count("note: ") == 1 and "API key, which is shown this once" in said.err
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


def test_links_begin_with_the_tenants_host_or_with_base_url_and_without_both_there_are_none(run: Terminal) -> None:
    hosted = ("--tracking-host", "Track.Acme.com")
    run.monkeypatch.delenv("BASE_URL")
    said = run("tenant", "add", "Acme", "--json", status=1)
    assert said.out == ""
    assert "BASE_URL" in said.err and "--local" in said.err and "called back" in said.err
    assert not run.database.exists()
    run.monkeypatch.setenv("PORT", "3210")
    assert run.add("Local", "--local")["pixel_url"].startswith("http://localhost:3210/")
    assert run.add("Acme", *hosted)["pixel_url"].startswith("https://track.acme.com/")
    assert "BASE_URL" in run("tenant", "show", "Local").out
    assert "http://localhost:3210/" in run("tenant", "show", "Local", "--local").out
    run.monkeypatch.setenv("BASE_URL", BASE)
    assert run("tenant", "show", "Acme", "--json").json["pixel_url"].startswith("https://track.acme.com/")


def test_tenant_set_and_tenant_add_change_name_and_rules_and_show_them(run: Terminal) -> None:
    made, words = run.add("Acme", "--domain", "acme.com"), ("--domain", "shoes.com", "--block", "evil.com")
    shown = run("tenant", "set", "Acme", "--json", "--name", "Shoes", *words, "--remove-domain", "acme.com").json
    assert (shown["name"], shown["id"], shown["mail_id"]) == ("Shoes", made["id"], made["mail_id"])
    assert (shown["domains"], shown["blocked"]) == (["shoes.com"], ["evil.com"])
    for option, name, expected in (
        ("--any-domain", "domains", ["any"]),
        ("--no-any-domain", "domains", ["shoes.com"]),
        ("--unblock=evil.com", "blocked", []),
        ("--suspend", "suspended", True),
        ("--no-suspend", "suspended", False),
        ("--tz=Europe/Rome", "tz", "Europe/Rome"),
        ("--own=203.0.113.7", "own_addresses", ["203.0.113.7"]),
        ("--utm=a=1&b={campaign}", "utm", "a=1&b={campaign}"),
        ("--utm=", "utm", ""),
        ("--forward=ref", "forwarded", ["ref"]),
        ("--no-forward=ref", "forwarded", []),
        ("--forward=a[b]", "forwarded", ["a[b]"]),
        ("--tracking-host=track.acme.com", "tracking_host", "track.acme.com"),
        ("--tracking-host=", "tracking_host", ""),
    ):
        assert run("tenant", "set", "Shoes", "--json", option).json[name] == expected
        if expected != "track.acme.com":  # which is taken now
            added = run.add(f"New {option}", *words, option)
            assert run("tenant", "show", added["id"], "--json").json[name] == expected


def test_a_tenant_is_known_by_its_ids_even_where_they_are_anothers_name_and_by_its_name(run: Terminal) -> None:
    made = run.add("Acme & Söhne")
    run.add(made["mail_id"])
    run.add(made["id"])
    for by in ("id", "mail_id", "name"):
        assert run("tenant", "show", made[by], "--json").json["id"] == made["id"]


def test_a_name_is_taken_without_regard_to_case_unless_there_are_to_be_two(run: Terminal) -> None:
    first = run.add("Größe & Söhne")
    for name in ("Größe & Söhne", "GRÖSSE & söhne", " größe & Söhne "):
        said = run("tenant", "add", name, status=1)
        assert first["mail_id"] in said.err and "--another" in said.err
        assert run("tenant", "show", name.strip(), "--json").json["id"] == first["id"]
    assert len(run("tenant", "list", "--json").json) == 1
    second = run.add("größe & söhne", "--another")
    # As it is written it means one of the two, otherwise both.
    assert run("tenant", "show", "größe & söhne", "--json").json["id"] == second["id"]
    assert run("tenant", "show", "Größe & Söhne", "--json").json["id"] == first["id"]
    assert "2 tenants have the name" in run("stats", "GRÖSSE & SÖHNE", status=1).err
    directory = tracker.Directory(str(run.database.parent))
    found = [directory.find(name) for name in ("größe & söhne", "Größe & Söhne", "GRÖSSE & SÖHNE")]
    assert found == [second["mail_id"], first["mail_id"], None]
    run("tenant", "remove", first["id"], "--yes")
    assert tracker.Directory(str(run.database.parent)).find("GRÖSSE & SÖHNE") == second["mail_id"]


def test_a_name_that_two_tenants_have_is_an_error_that_lists_their_mail_ids(run: Terminal) -> None:
    ids = [run.add("Acme", *more)["mail_id"] for more in ((), ["--another"])]
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


@pytest.mark.parametrize("by", ["add", "add --json", "key"])
def test_an_api_key_is_printed_once_stored_hashed_and_needed_until_it_is_another_or_none(
    by: str, run: Terminal
) -> None:
    if by == "add":
        run("tenant", "show", "Acme", status=1)
        shown = dict(line.split(maxsplit=1) for line in run("tenant", "add", "Acme").out.splitlines())
        key, made = shown["api_key"], run("tenant", "show", "Acme", "--json").json
    else:
        made = run.add("Acme")
        key = made["api_key"] if by == "add --json" else run("tenant", "key", "Acme").out.strip()
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", key)
    for path in run.database.parent.rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes(), path
    assert key not in run("tenant", "show", "Acme").out + run("tenant", "set", "Acme", "--domain", "a.example").out
    assert [write(run.web(), made["id"], "k2", token) for token in ("", key)] == [401, 201]
    second = run("tenant", "key", "Acme", "--json").json["api_key"]
    assert [write(run.web(), made["id"], "k3", token) for token in (key, second)] == [401, 201]
    assert "no API key" in run("tenant", "key", "Acme", "--remove").out
    assert run("tenant", "show", "Acme", "--json").json["api_key"] is False
    assert write(run.web(), made["id"], "k4") == 201


def test_with_open_writing_the_dashboard_id_writes_until_there_is_a_key(run: Terminal) -> None:
    added, shut = run.add("Acme", "--open-writing"), run.add("Globex")
    assert (added["api_key"], bool(shut["api_key"])) == (False, True)
    assert "API key" not in run("tenant", "add", "Initech", "--open-writing").err
    assert run("tenant", "set", "Globex", "--open-writing", "--json").json["api_key"] is False
    for made in (added, shut):
        assert write(run.web(), made["id"], "k1") == 201
        key = run("tenant", "key", made["id"]).out.strip()
        assert [write(run.web(), made["id"], "k2", token) for token in ("", key)] == [401, 201]
        run("tenant", "set", made["id"], "--domain", "acme.com")  # which says nothing of writing
        assert write(run.web(), made["id"], "k3") == 401


def test_the_tenant_of_the_first_start_writes_only_by_a_key_that_is_made_for_it(run: Terminal) -> None:
    for name in ("probe", "run_gunicorn"):
        run.monkeypatch.setattr(tracker, name, lambda *_: None)
    assert "a key to write with: tracker.py tenant key default" in run("serve").out
    id_ = run("tenant", "show", "default", "--json").json["id"]
    assert write(run.web(), id_, "k1") == 401
    assert write(run.web(), id_, "k1", run("tenant", "key", "default").out.strip()) == 201


def test_writing_for_a_one_id_tenant_needs_a_key(run: Terminal) -> None:
    first = run.add("Acme", "--id", "abc123")["api_key"]
    assert [write(run.web(), "abc123", "k1", token) for token in ("", first)] == [401, 201]
    key = run("tenant", "key", "abc123").out.strip()
    assert [write(run.web(), "abc123", "k1", token) for token in (first, key)] == [401, 200]
    assert "writing is closed" in run("tenant", "key", "abc123", "--remove").out
    assert write(run.web(), "abc123", "k2") == 403
    for words in ("set abc123 --open-writing", "add X --id xyz --open-writing"):
        assert "an id of one's own stands in mail" in run("tenant", *words.split(), status=1).err
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


def test_a_share_opens_numbers_until_it_is_revoked_or_its_days_are_over(run: Terminal) -> None:
    made = run.add("Acme")
    run("campaign", "add", "Acme", "Spring", "--sent", "9")
    first, second = (run("tenant", "share", "Acme", *more).out.strip() for more in ((), ("--campaign", "Spring")))
    third = run("tenant", "share", "Acme", "--days", "1", "--json").json
    assert "no campaign" in run("tenant", "share", "Acme", "--campaign", "Sprong").err
    assert {url.partition("://")[2].partition("/")[0] for url in (first, second)} == {"track.example.com"}
    assert made["id"] not in first + second + third["url"]
    web = run.web()

    def status(url: str) -> int:
        path = url.removeprefix("https://track.example.com") + "/campaigns/Spring" * (url == second)
        found: int = web.get(path, expect_errors=True).status_int
        return found

    assert [status(url) for url in (first, second, third["url"])] == [200, 200, 200]
    listed = run("tenant", "shares", "Acme", "--json").json
    assert [each["campaign"] for each in listed] == ["", "Spring", "", "Sprong"]
    assert "Spring" in run("tenant", "shares", "Acme").out
    assert first.split("/")[3] not in run("tenant", "shares", "Acme").out + run("tenant", "show", "Acme").out
    for wrong in ("x", "https://track.example.com/", made["id"], ""):
        assert wrong == "" or "--revoke: expected" in run("tenant", "shares", "Acme", "--revoke", wrong, status=1).err
    assert len(run("tenant", "shares", "Acme", "--revoke", first, "--json").json) == 3
    assert len(run("tenant", "shares", "Acme", "--revoke", listed[1]["share"], "--json").json) == 2
    assert [status(url) for url in (first, second, third["url"])] == [404, 404, 200]
    run.sql(f"update shares set ends_at = {tracker.now_ms() - 1} where campaign = ''")
    assert status(third["url"]) == 404
    assert [each["campaign"] for each in run("tenant", "shares", "Acme", "--json").json] == ["Sprong"]
    for days in ("0", "-1", "3651"):
        assert "--days: expected" in run("tenant", "share", "Acme", "--days", days, status=1).err
    run("tenant", "rotate", "Acme")
    assert "all is well" in run("check").out


def test_remove_asks_for_the_name_and_a_wrong_one_deletes_nothing(run: Terminal) -> None:
    made = run.add("Acme")
    for wrong in ("acme\n", "\n", made["mail_id"] + "\n", ""):
        said = run("tenant", "remove", "Acme", stdin=wrong, status=1)
        assert "naming page" in said.out and "nothing was deleted" in said.err
    assert run("tenant", "show", "Acme", "--json").json["id"] == made["id"]
    for words, stdin in (("remove", "Acme\n"), ("remove --yes", "")):
        said = run("tenant", *words.split(), "Acme", stdin=stdin)
        assert "deleted Acme" in said.out and "naming page" in said.out
        assert run("tenant", "list", "--json").json == []
        run.add("Acme")


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
    assert run.sql("select count(*) from events") == [(3,)]


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
    assert run.sql("select count(*) from events") == [(4,)]
    assert run("check").out == "all is well\n"


# == check ==


@pytest.mark.parametrize(
    ("sql", "named"),
    [
        ("update reasons set hits = hits + 1 where type = 1", "reasons"),
        ("update uniques set emails = 0", "uniques"),
        ("update cohorts set opened_person = opened_person + 1", "cohorts"),
        ("delete from campaigns", "campaigns"),
        ("update campaign_times set opened_person = 0", "campaign_times"),
        ("delete from campaign_hits", "campaign_hits"),
        ("update links set clicks_person = clicks_person + 5", "links"),
        ("update named_hosts set clicks = 99", "named_hosts"),
        ("update email_counts set open_machine = 7", "email_counts"),
        ("delete from link_counts", "link_counts"),
    ],
)
def test_check_lists_what_is_wrong_with_a_roll_up_and_repair_mends_it(
    sql: str, named: str, stage: Stage, run: Terminal
) -> None:
    stage.web.post_json(f"/{stage.acme.id}/emails", [{"key": "k1", "campaign": "Spring"}, {"key": "k2"}])
    aside: dict[str, Any] = {"answer": "named", "why": "destination-not-allowed"}
    for key in ("k1", "k2", "unregistered"):
        segment(stage, hit(stage, key), hit(stage, key, ua=MACHINE), click(stage, key))
        segment(stage, click(stage, key, "https://other.example/", **aside))
    before = run("stats", "Acme", "--json").json["activity"]
    run.sql(sql)
    *faults, summary = run("check", status=1).out.splitlines()
    built_on_it = ("links", "cohort", "campaigns", "activity", "reason")
    assert faults and all(fault.startswith((named, *built_on_it)) for fault in faults)
    assert any(fault.startswith(f"{named}:") for fault in faults)
    assert summary == f"{len(faults)} faults"
    assert run("check", "--repair").out.endswith("all is well\n")
    assert run("check").out == "all is well\n"
    assert run("stats", "Acme", "--json").json["activity"] == before
    # What is lost is lost, and goes on being said.
    run.sql("delete from emails where key = 'k2'")
    for words in (("check",), ("check", "--repair")):
        assert "foreign_key_check" in run(*words, status=1).out


def test_check_notices_that_tenants_json_is_not_right_and_repair_writes_it(run: Terminal) -> None:
    run.add("Acme")
    path = run.database.parent / "tenants.json"
    right = json.loads(path.read_text())
    for content in ("", "{}", "not JSON"):
        path.write_text(content)
        assert "tenants.json" in run("check", status=1).out
        run("check", "--repair")
        found = json.loads(path.read_text())
        assert found.pop("mark") != right["mark"]
        assert found == {name: right[name] for name in ("tenants", "retired")}


def test_check_notices_a_segment_that_is_shorter_than_what_was_drained_of_it(stage: Stage, run: Terminal) -> None:
    stage.pixel("k1")
    tracker.drain(stage.database)  # the segment is still its writer's, so it stays
    [path] = run.spool.glob("*.jsonl")
    os.truncate(path, 10)
    assert path.name in run("check", status=1).out


# == config, make demo ==


def test_config_prints_the_settings_in_force_and_masks_secrets(run: Terminal) -> None:
    assert run("config", "--json").json["API_KEY"] is None
    given = {"SECRET_KEY": "s3cret-" * 6, "API_KEY": "operator-key-of-32-characters-xx", "WEB_CONCURRENCY": "7"}
    for name, value in given.items():
        run.monkeypatch.setenv(name, value)
    shown = run("config", "--json").json
    assert (shown["API_KEY"], shown["SECRET_KEY"], shown["WEB_CONCURRENCY"]) == ("(set)", "(set)", 7)
    assert (shown["BASE_URL"], shown["DATABASE_URL"]) == (BASE, f"sqlite:{run.database}")
    assert shown.pop("origins")["PORT"] == "by default"
    lines = dict(line.split("=", 1) for line in run("config").out.splitlines() if not line.startswith("# "))
    assert (lines["API_KEY"], lines["SECRET_KEY"], lines["WEB_CONCURRENCY"]) == ("(set)", "(set)", "7")
    assert (
        set(lines)
        == set(shown)
        == {each.metadata["variable"] for each in dataclasses.fields(tracker.Settings) if "variable" in each.metadata}
    )


def test_config_says_where_each_value_comes_from(run: Terminal) -> None:
    secret, env = run.folder / "secret", run.folder / "tracker.env"
    secret.write_text("s3cret-" * 6)
    env.write_text(f"PORT=8080\nBASE_URL=https://other.example\nSECRET_KEY_FILE={secret}\n")
    told, where = {}, ""
    for line in run("--env", str(env), "config").out.splitlines():
        where = line if line.startswith("# ") else where
        told[line.partition("=")[0]] = where
    assert told["PORT"] == f"# from {env}"
    assert told["BASE_URL"] == told["DATABASE_URL"] == "# from the environment"
    assert told["SECRET_KEY"] == f"# from {secret}, which {env} names"
    assert told["BIND"] == told["IP_ADDRESSES"] == "# by default"
    origins = run("--env", str(env), "config", "--json").json["origins"]
    assert {f"# {'from ' * (each != 'by default')}{each}" for each in origins.values()} == set(told.values())


def test_status_says_whether_anything_arrives(stage: Stage, run: Terminal) -> None:
    said = run("status", status=1)  # nobody drains
    assert "last hit   none so far" in said.out and "nobody has drained for some time" in said.out
    segment(stage, hit(stage, "k1", NOW), b"no hit\n")
    stage.pixel("k2")
    stage.drain()
    stage.pixel("k3")
    stage.health()
    (at,) = stage.rows("select max(at) from events")[0]
    about = run("status", "--json").json
    assert (about["last_hit_at"], about["tenant"]) == (tracker.iso_time(at), "Acme")
    assert (about["waiting_hits"], about["rejected_lines"], about["trouble"]) == (0, 1, "")
    assert about["since"] <= tracker.iso_time(NOW) and about["drained_at"]
    out = run("status").out
    assert f"last hit   {tracker.iso_time(at)}, just now, of Acme" in out and "rejected   1 lines" in out


def test_where_there_is_no_fcntl_as_on_windows_one_sentence_says_which_systems_there_are() -> None:
    code = "import runpy, sys; sys.modules['fcntl'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    for name in ("tracker.py", "tests/demo.py"):
        command = [sys.executable, "-c", code, str(ROOT / name)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        told = "The tracker runs on Linux, macOS and BSD; on Windows, start it in WSL, which is a Linux\n"
        assert (done.returncode, done.stdout, done.stderr) == (1, "", told)


def test_serve_local_says_what_to_open_and_serve_does_not(run: Terminal) -> None:
    run.monkeypatch.delenv("BASE_URL")
    for name in ("probe", "run_gunicorn"):
        run.monkeypatch.setattr(tracker, name, lambda *_: None)
    assert " open http://localhost:3000 (a tenant's dashboard: tracker.py tenant show" in run("serve", "--local").out
    assert " open " not in run("serve").out


def test_version_is_a_command_too(run: Terminal) -> None:
    assert run("version").out == run("--version").out != ""


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
    *("tenant share Acme", "tenant shares Acme", "tenant shares Acme --revoke x", "untrack Acme a@b.example"),
    *("tenant remove Acme --yes", "stats Acme", "drain", "ingest", "check", "check --repair"),
]


@pytest.mark.parametrize("words", NEED_A_DATABASE)
def test_a_command_that_needs_a_database_says_that_there_is_none_and_makes_none(words: str, run: Terminal) -> None:
    said = run(*words.split(), status=1)
    assert said.err.startswith(f"tracker.py: no database at {run.database}; ") and said.err.count("\n") == 1
    assert said.out == "" and not run.database.parent.exists()
    run.add("Acme")
    run.database.unlink()  # it was lost
    for each in (words, "tenant add Acme"):
        said = run(*each.split(), status=1)
        assert "no database at" in said.err and "says that there was one" in said.err and "backup" in said.err
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


def test_help_says_what_each_command_is_for_and_explains_each_option(run: Terminal) -> None:
    for words in (*tracker.COMMANDS, *tracker.COMMAND_GROUPS):
        *above, name = words.split()
        assert re.search(rf"^    {name}\s+\S+ \S+ \S", run(*above, "--help").out, re.MULTILINE), words
        assert f"usage: tracker.py {words}" in run(*words.split(), "--help").out
    for words, (_, options) in tracker.COMMANDS.items():
        assert all(len(how["help"].split()) >= 2 for _, how in options), words


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


GMAIL_PROXY = "Mozilla/5.0 (X11; Linux) Gecko Firefox/11.0 (via ggpht.com GoogleImageProxy; 2)"


def hits_file(run: Terminal, *lines: bytes) -> str:
    path = run.folder / "hits.jsonl"
    path.write_bytes(b"".join(lines))
    return str(path)


def test_judge_says_who_made_each_hit_and_why_to_people_and_to_programs(stage: Stage, run: Terminal) -> None:
    """In the order given, a line each; it needs no database and makes none."""
    stage.app.close()
    made = [
        (hit(stage, "e1", ua="Mozilla/5.0"), "open", "prefetch", "certain", "unconfirmed", "apple-mpp"),
        (click(stage, "e1", ua=MACHINE, ip="192.0.2.0"), "click", "bot", "certain", "machine", "bot-word"),
        (hit(stage, "e1", ua=GMAIL_PROXY), "open", "proxy", "certain", "person", "image-proxy"),
        (hit(stage, "e1", ua=GMAIL_PROXY), "open", "proxy", "certain", "set_aside", "repeat"),
    ]
    path = hits_file(run, b"\n", *(line for line, *_ in made))
    run.monkeypatch.setenv("DATABASE_URL", "sqlite:nowhere/tracking.db")
    names = ("at", "event_type", "verdict", "certainty", "counts_as", "reason", "sentence")
    rows = [(str(tracker.iso_time(NOW)), *row, tracker.sentence_of(row[-1])) for _, *row in made]
    for line, (*cells, reason, sentence) in zip(run("judge", path).out.splitlines(), rows, strict=True):
        cells = [cell.replace("_", " ") for cell in cells]
        assert re.split(r"\s{2,}", line, maxsplit=5) == [*cells, f"{reason}: {sentence}"]
    told = run("judge", path, "--json").out.splitlines()
    assert list(map(json.loads, told)) == [dict(zip(names, row, strict=True)) for row in rows]
    assert not (run.folder / "nowhere").exists()


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
    for links, doubtful in (("null", 0), ("4", 4), ("5", 0)):
        first = f'{{"email": {{"links": {links}}}}}\n'.encode()
        assert run("judge", hits_file(run, first, *lines)).out.count(" some-signs: ") == doubtful


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


def test_rejudge_counts_what_waits_first_and_goes_on_from_email_to_email(stage: Stage, run: Terminal) -> None:
    """What it judges, and since when, is in test_counting.py."""
    run.monkeypatch.setattr(tracker, "REJUDGE_EMAILS", 2)
    segment(stage, *(hit(stage, f"e{n}") for n in range(5)))
    assert run("rejudge").out == "all hits are judged as before\n"
    run.sql("insert into judgements (verdict, reason, state) values ('bot', 'not-a-browser', 3)")
    run.sql("update events set judgement = (select id from judgements where reason = 'not-a-browser')")
    run("check", "--repair")
    assert run("rejudge").out == "5 hits are judged otherwise than before\n"
    assert run("check").out == "all is well\n"


# == the sender's own addresses ==


def test_own_addresses_are_shown_as_they_are_read_and_can_be_taken_back(run: Terminal) -> None:
    run.add("Acme")
    own = ("--own", "203.0.113.7", "--own", "2001:DB8::/48", "--own", " 198.51.100.9/24", "--own", "203.0.113.7/32")
    shown = run("tenant", "set", "Acme", *own, "--json").json
    assert shown["own_addresses"] == ["198.51.100.0/24", "2001:db8::/48", "203.0.113.7"]
    assert run("tenant", "show", "Acme", "--json").json == shown
    taken = run("tenant", "set", "Acme", "--not-own", "198.51.100.0/24", "--not-own", "2001:db8::/48", "--json").json
    assert taken["own_addresses"] == ["203.0.113.7"]


def test_workers_hear_of_own_addresses_within_a_second_and_of_their_end(run: Terminal) -> None:
    made, web = run.add("Acme"), run.web()
    for words in ((), ("--own", "203.0.113.7"), ("--not-own", "203.0.113.7")):
        run("tenant", "set", "Acme", *words)
        run.apps[0].directory._look_at = 0.0
        web.get(f"/{made['mail_id']}/pixel/e1.gif", extra_environ={"REMOTE_ADDR": "203.0.113.7"})
    [path] = run.spool.glob("*.jsonl")
    assert [json.loads(line).get("own") for line in path.read_bytes().splitlines()] == [None, True, None]
