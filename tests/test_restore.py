"""Nothing that was answered is lost or counted twice: damage, restores and moves, with real servers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import webtest
from conftest import BASE, CHROME, NOW, ROOT, Server, Stage, a_third, hit, segment

import tracker


def ask(server: Server, path: str, body: object = None, method: str | None = None) -> tuple[int, dict[str, str], bytes]:
    """One request; follows no redirect, and takes errors as answers."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"User-Agent": CHROME}, method=method)
    try:
        with urllib.request.build_opener(Stays()).open(request, timeout=20) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


class Stays(urllib.request.HTTPRedirectHandler):
    """Follows no redirect."""

    def redirect_request(self, *_: Any) -> None:
        return None


def health(server: Server) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(ask(server, "/health")[2])
    return answer


def becomes(happens: Callable[[], object], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < until
        time.sleep(0.05)


def events(server: Server) -> Counter[str]:
    """The keys of the emails of all events, and how many each has."""
    with closing(sqlite3.connect(f"file:{server.folder}/data/tracking.db?mode=ro", uri=True)) as connection:
        return Counter(key for (key,) in connection.execute("select key from event_details"))


class Load:
    """Somebody who opens one mail after the other, each once, and remembers which of them were answered as recorded."""

    def __init__(self, server: Server, mail_id: str) -> None:
        self.server, self.mail_id = server, mail_id
        self.answered: list[str] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def send(self, number: int) -> None:
        for _ in range(number):
            key = f"k{len(self.answered)}"
            status, headers, _ = ask(self.server, f"/{self.mail_id}/pixel/{key}.gif")
            assert (status, headers["X-Tracker"]) == (200, "recorded")
            self.answered.append(key)

    def _run(self) -> None:
        while not self._ended.wait(0.005):
            self.send(1)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def overwritten(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def without_first_page(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(4096))


def without_wal_and_shm(path: Path) -> None:
    for end in ("-wal", "-shm"):
        os.unlink(f"{path}{end}")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "deleted": Path.unlink,
    "garbage": overwritten,
    "truncated": truncated,
    "emptied": lambda path: os.truncate(path, 0),
    "first page": without_first_page,
    "wal gone": lambda path: os.unlink(f"{path}-wal"),
    "wal and shm gone": without_wal_and_shm,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_whatever_happens_to_the_database_restore_brings_back_every_hit_once(
    damage: str, servers: Callable[..., Server]
) -> None:
    server = servers().start()
    acme = server.tenant("Acme", "--domain", "acme.com")
    path = server.folder / "data" / "tracking.db"
    load = Load(server, acme["mail_id"])
    load.send(20)
    server.run("drain")
    backup = server.folder / "backup.db"
    server.run("backup", str(backup))
    load.send(20)
    server.run("drain")
    late = server.tenant("Late")  # and is not in the backup
    becomes(lambda: ask(server, f"/{late['mail_id']}/pixel/of-late.gif")[1]["X-Tracker"] == "recorded", 3)
    with load:
        time.sleep(0.5)
        DAMAGE[damage](path)
        if "wal" not in damage:  # there the workers end and start anew, sooner than one may ask
            becomes(lambda: health(server)["status"] == "degraded", 2.5)
        time.sleep(0.5)
        said = server.run("restore", str(backup))
        becomes(lambda: health(server)["status"] == "ok", 4)
        time.sleep(0.3)
    assert "counted" in said
    becomes(lambda: health(server)["waiting_hits"] == 0, 5)
    server.run("drain")
    found = events(server)
    assert found.pop("of-late") >= 1
    assert found == dict.fromkeys(load.answered, 1)
    assert server.run("check") == "all is well\n"


@pytest.fixture
def damaged(stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Restored]:
    monkeypatch.setenv("DATABASE_URL", f"sqlite:{stage.settings.database}")
    monkeypatch.setenv("BASE_URL", BASE)
    yield Restored(stage, capsys)


class Restored:
    """A stage whose database is copied, goes on, and is put back."""

    def __init__(self, stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
        self.stage, self.capsys = stage, capsys

    def run(self, *words: object, status: int = 0) -> str:
        assert tracker.main(["--env", os.devnull, *map(str, words)]) == status
        out, err = self.capsys.readouterr()
        return out + err

    def backup(self, name: str) -> Path:
        self.run("backup", self.stage.folder / name)
        return self.stage.folder / name

    def put_in_place(self, copy: Path) -> None:
        """What `restore` does before it drains."""
        path, folder = self.stage.settings.database, str(self.stage.folder)
        with copy.open("rb") as backup, tracker.restoring(path, backup) as (connection, _, _):
            tracker.take_over_tenants(folder, connection)
            tracker.forget_gone(folder, connection)

    def emails(self) -> list[tuple[Any, ...]]:
        return self.stage.rows(
            "select key, subject, recipient, campaign, registered, sent_at, delivered_at, time_said, links, told_at,"
            " created_at from emails order by key"
        )

    def facts(self) -> list[Any]:
        return [
            self.emails(),
            self.stage.rows("select key, at, type, verdict, reason from event_details order by key, at"),
        ]


def test_what_was_said_of_emails_is_said_again_to_a_restored_database_in_its_order(damaged: Restored) -> None:
    stage, web, home = damaged.stage, damaged.stage.web, f"/{damaged.stage.acme.id}"
    web.post_json(f"{home}/emails", {"key": "e1", "subject": "First", "recipient": "ann@example.org"})
    copy = damaged.backup("copy.db")
    web.patch_json(f"{home}/emails/e1", {"subject": "Second", "delivered_at": "2026-11-24T09:00:00Z"})
    web.post_json(f"{home}/emails", {"key": "e1", "subject": "Third", "sent_at": "2026-11-24T08:00:00Z"})
    web.post_json(f"{home}/emails", [{"key": f"n{n}", "campaign": "Spring"} for n in range(3)])
    web.post_json(f"{home}/emails", {"key": "K1"})
    stage.pixel("K1?campaign=Spring".partition("?")[0], params={"campaign": "Spring"})
    stage.pixel("u1")
    stage.drain()
    before = damaged.facts()
    for _ in range(2):
        said = damaged.run("restore", copy)
        assert damaged.facts() == before, said
        assert stage.check() == []


def test_what_was_deleted_comes_back_from_no_backup(damaged: Restored) -> None:
    stage, web, home = damaged.stage, damaged.stage.web, f"/{damaged.stage.acme.id}"
    for key in ("e1", "e2", "e3"):
        web.post_json(f"{home}/emails", {"key": key})
        stage.pixel(key)
    stage.drain()
    copy = damaged.backup("copy.db")
    for key in ("e1", "e2"):
        web.delete(f"{home}/emails/{key}")
    stage.pixel("e2")  # nor does a hit of later make it anew, unless it was registered again
    web.post_json(f"{home}/emails", [{"key": "e4"}, {"key": "e5"}])
    for key in ("e4", "e5"):
        web.delete(f"{home}/emails/{key}")
    web.post_json(f"{home}/emails", {"key": "e5"})
    stage.pixel("e5")
    stage.drain()
    before = damaged.facts()
    damaged.run("restore", copy)
    assert damaged.facts() == before
    assert [row[0] for row in damaged.emails()] == ["e3", "e5"]
    dropped = "select hits from dropped where reason = 'deleted'"
    [(before,)] = stage.rows(dropped)
    for key in ("e1", "e2", "e4"):
        stage.pixel(key)
    stage.drain()
    assert (damaged.emails()[-1][0], stage.rows(dropped)) == ("e5", [(before + 3,)])


def test_tenants_and_suspensions_of_after_the_backup_outlive_a_restore(damaged: Restored) -> None:
    stage = damaged.stage
    copy = damaged.backup("copy.db")
    damaged.run("tenant", "add", "Late", "--domain", "late.example", "--tracking-host", "t.late.example")
    damaged.run("tenant", "set", "Acme", "--suspend")
    damaged.run("tenant", "remove", "Globex", "--yes")
    stage.refresh()
    [late] = [mail_id for mail_id, each in stage.app.directory.refresh().tenants.items() if each["name"] == "Late"]
    link = f"/{late}/click/k?url=https://late.example/"
    assert stage.web.get(link, headers={"Host": "t.late.example"}).status_int == 302
    before = json.loads((stage.folder / "tenants.json").read_text())
    assert len(before["tenants"][late]["api_key_sha256"]) == 64  # so it is not open to whoever has its dashboard id
    told = damaged.run("restore", copy)
    assert f"Late ({late}) has a new dashboard id" in told
    after = json.loads((stage.folder / "tenants.json").read_text())
    for each in (before, after):
        each.pop("mark")
        each["tenants"][late].pop("id_sha256")
    assert after == before
    stage.refresh()
    stage.drain()
    assert stage.web.get(link, headers={"Host": "t.late.example"}).status_int == 302
    assert stage.rows("select key from event_details") == [("k",)]


def test_an_older_backup_after_a_newer_one_and_the_newer_again_count_each_hit_once(damaged: Restored) -> None:
    stage, copies = damaged.stage, []
    for number in range(3):
        stage.pixel(f"e{number}")
        stage.drain()
        stage.pixel(f"w{number}")  # waits while the backup is made; the next drain counts it
        copies.append(damaged.backup(f"{number}.db"))
    before = damaged.facts()
    for number in (2, 0, 1, 1, 2, 0):
        damaged.run("restore", copies[number])
        assert damaged.facts() == before, number


@pytest.mark.parametrize("days", [0, 1, 31])
def test_a_move_to_another_server_counts_every_hit_once_however_long_it_takes(damaged: Restored, days: int) -> None:
    stage = damaged.stage
    stage.pixel("before")
    stage.drain()
    copy = damaged.backup("copy.db")
    stage.pixel("old")
    stage.drain()
    stage.pixel("waits")
    stage.app.spool.close()
    arrived = stage.folder.parent / "arrived"
    shutil.copytree(stage.spool, arrived)
    damaged.run("restore", copy)
    shutil.rmtree(stage.spool / "kept")
    (stage.spool / "kept").mkdir()
    stage.pixel("new")
    stage.drain()
    with stage.database.transaction() as connection:
        connection.execute("update positions set updated_at = updated_at - ?", (days * 86_400_000,))
    tracker.tidy_spool(stage.database, 3, 2000)
    for name in ("", "kept"):
        for path in (arrived / name).glob("*.jsonl"):
            if not (stage.spool / name / path.name).exists():
                path.rename(stage.spool / name / path.name)
    stage.drain()
    found = Counter(key for (key,) in stage.rows("select key from event_details"))
    assert found == dict.fromkeys(("before", "old", "waits", "new"), 1)


def test_a_restore_that_is_killed_anywhere_and_run_again_counts_each_hit_once(damaged: Restored) -> None:
    stage = damaged.stage
    stage.pixel("e1")
    stage.drain()
    copy = damaged.backup("copy.db")
    stage.pixel("e2")
    stage.web.post_json(f"/{stage.acme.id}/emails", {"key": "e3"})
    stage.drain()
    before = damaged.facts()
    stage.app.close()
    command = ["--env", os.devnull, "restore", str(copy)]
    for step in a_third(count()):
        was_killed = killed_at(step, command)
        done = subprocess.run([sys.executable, "tracker.py", *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert damaged.facts() == before, step
        if not was_killed:
            break
    assert step > 20


def test_a_backup_that_is_killed_anywhere_harms_nothing_and_what_it_leaves_is_whole_or_refused(
    damaged: Restored,
) -> None:
    damaged.stage.pixel("e1")
    damaged.stage.drain()
    before = damaged.facts()
    copies = Path(damaged.stage.settings.folder) / "copies"
    os.mkdir(copies)
    refused = 0
    for step in a_third(count()):
        was_killed = killed_at(step, ["--env", os.devnull, "backup", str(copies / f"{step}.db")])
        if (copy := copies / f"{step}.db").exists():
            done = [sys.executable, "tracker.py", "--env", os.devnull, "restore", str(copy)]
            refused += subprocess.run(done, cwd=ROOT, capture_output=True).returncode != 0
        assert damaged.facts() == before
        if not was_killed:
            break
    assert 0 < refused < step


def killed_at(step: int, command: list[str]) -> bool:
    """Run a command that is killed at its nth step with a file of the data; whether it lived to have so many."""
    program = f"import sys; sys.argv[1:] = {command!r}; step = {step}\n{KILLER}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


KILLER = """
import os, signal, tracker
seen = 0
def hook(event, arguments):
    global seen
    if event in ("os.rename", "os.link", "os.remove", "os.mkdir", "sqlite3.connect", "open"):
        path = str(arguments[0])
        if "/data/" in path:
            seen += 1
            if seen > step:
                os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
sys.exit(tracker.main())
"""


def test_restore_says_what_it_cannot_use_and_changes_nothing(damaged: Restored, staged: Callable[..., Stage]) -> None:
    stage = damaged.stage
    stage.pixel("e1")
    stage.drain()
    before = damaged.facts()
    other = staged()
    other.app.close()
    whole = damaged.backup("whole.db").read_bytes()
    told = {
        "nothing there": "No such file",
        "no database": "file is not a database",
        "another": "is a copy of another database than the spool here belongs to",
        "torn": "malformed",
    }
    for name, content in {"no database": b"hello" * 999, "torn": whole[: len(whole) // 2]}.items():
        (stage.folder / name).write_bytes(content)
    shutil.copy(other.settings.database, stage.folder / "another")
    for name, fault in told.items():
        said = damaged.run("restore", stage.folder / name, status=1)
        assert fault in said and name in said, said
        assert damaged.facts() == before
    assert not list(stage.folder.glob("*.new"))


def newer(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("pragma user_version = 99")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


BROKEN: dict[str, Callable[[Path], None]] = {
    **{name: DAMAGE[name] for name in ("deleted", "garbage", "truncated", "emptied", "first page")},
    "newer": newer,
    "a folder": a_folder,
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_server_that_is_started_on_a_broken_database_serves_pixels_and_links_and_says_what_to_do(
    damage: str, servers: Callable[..., Server]
) -> None:
    server = servers().start()
    acme = server.tenant("Acme")
    sent = {"key": "e1", "links": ["https://acme.com/"]}
    link = json.loads(ask(server, f"/{acme['id']}/emails", sent)[2])["links"][0]["click_url"].removeprefix(server.url)
    backup = server.folder / "backup.db"
    server.run("backup", str(backup))
    server.stop()
    BROKEN[damage](server.folder / "data" / "tracking.db")
    server.start()
    status, headers, _ = ask(server, f"/{acme['mail_id']}/pixel/e1.gif")
    assert (status, headers["X-Tracker"]) == (200, "recorded")
    status, headers, _ = ask(server, link)
    assert (status, headers["Location"]) == (302, "https://acme.com/")
    assert ask(server, f"/{acme['id']}/dashboard")[0] == 503
    told = health(server)
    assert told["status"] == "degraded" and told["why"], told
    server.run("restore", str(backup))
    becomes(lambda: ask(server, f"/{acme['id']}/dashboard")[0] == 200, 5)
    assert "Traceback" not in server.stop()
    assert events(server) == {"e1": 2}


def test_hits_of_before_a_deletion_stay_gone_where_the_key_has_come_again(damaged: Restored) -> None:
    stage = damaged.stage
    stage.pixel("e1")
    late = stage.spool.rename(stage.folder / "late")
    shutil.copytree(late, stage.spool, ignore=lambda *_: [path.name for path in late.glob("*.jsonl")])
    stage.app.spool.close()
    stage.web.post_json(f"/{stage.acme.id}/emails", {"key": "e1"})
    stage.web.delete(f"/{stage.acme.id}/emails/e1")
    stage.web.post_json(f"/{stage.acme.id}/emails", {"key": "e1"})
    stage.pixel("e1")
    stage.drain()
    for path in late.glob("*.jsonl"):
        path.rename(stage.spool / path.name)
    stage.drain()
    assert stage.rows("select count(*) from events") == [(1,)]
    assert stage.rows("select reason, hits from dropped") == [("deleted", 1)]


def test_backups_that_are_kept_are_the_newest_and_nothing_else_goes(
    damaged: Restored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "foreign.db").write_text("x")
    seconds = iter(range(1_800_000_000, 1_800_000_100))
    monkeypatch.setattr(time, "gmtime", lambda *_: real_gmtime(next(seconds)))
    for _ in range(4):
        damaged.run("backup", tmp_path, "--keep", 2)
    found = sorted(path.name for path in tmp_path.glob("*.db"))
    assert len(found) == 3 and found[0] == "foreign.db"
    damaged.run("backup", tmp_path, "--keep", 5)
    assert sorted(path.name for path in tmp_path.glob("*.db"))[:3] == found
    assert "expected how many backups" in damaged.run("backup", tmp_path, "--keep", 0, status=1)


real_gmtime = time.gmtime


def test_words_on_one_email_in_segments_of_all_sizes_are_said_again_in_the_order_of_their_times(
    damaged: Restored, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, email = damaged.stage, f"/{damaged.stage.acme.id}/emails/e1"
    monkeypatch.setattr(tracker, "SEGMENT_SECONDS", 0)  # each word begins a segment of its own
    stage.web.post_json(email.removesuffix("/e1"), {"key": "e1", "subject": "First", "recipient": "ann@example.org"})
    copy = damaged.backup("copy.db")
    others = tracker.App(stage.settings)
    another = webtest.TestApp(tracker.wsgi(others))
    words: list[tuple[webtest.TestApp, dict[str, str]]] = [
        (stage.web, {"subject": "Second " * 100, "campaign": "Spring"}),
        (another, {"subject": "Third"}),
        (stage.web, {"campaign": "Summer", "recipient": "bob@example.org " * 10}),
        (another, {"recipient": ""}),
    ]
    for web, word in words:
        time.sleep(0.01)
        web.patch_json(email, word)
    others.close()
    before = damaged.facts()
    assert [row[1:4] for row in damaged.emails()] == [("Third", "", "Summer")]
    damaged.run("restore", copy)
    assert damaged.facts() == before


def test_a_text_that_was_said_to_be_empty_is_not_filled_by_what_was_said_before(stage: Stage) -> None:
    stage.web.post_json(f"/{stage.acme.id}/emails", {"key": "e1", "subject": "", "campaign": "Spring"})
    early = tracker.Registration("e1", subject="Old", recipient="ann@example.org", campaign="Winter")
    line = tracker.email_line(stage.acme.mail_id, early, NOW)
    for _ in range(2):
        segment(stage, line)
        stage.drain()
        assert stage.rows("select subject, recipient, campaign from emails") == [("", "ann@example.org", "Spring")]
        line = line.replace(b"ann@", b"bob@")


def test_of_what_backup_and_tenants_json_say_of_a_tenant_the_stricter_holds_after_a_restore(damaged: Restored) -> None:
    stage = damaged.stage
    damaged.run(
        "tenant", "set", "Acme", "--domain", "old.example", "--tracking-host", "one.example", "--forward", "old"
    )
    damaged.run("tenant", "set", "Globex", "--block", "always.example")
    damaged.run("tenant", "key", "Globex")
    copy = damaged.backup("copy.db")
    for words in (
        ("set", "Acme", "--remove-domain", "old.example", "--block", "shop.acme.com", "--tracking-host", ""),
        ("set", "Globex", "--no-any-domain", "--tracking-host", "one.example", "--unblock", "always.example"),
        ("set", "Acme", "--forward", "new", "--no-forward", "old", "--utm", "a=1"),
        ("add", "Young", "--forward", "young", "--utm", "b=2"),
    ):
        damaged.run("tenant", *words)
    damaged.run("tenant", "set", "Globex", "--open-writing")
    key = damaged.run("tenant", "key", "Acme").strip()
    told = damaged.run("tenant", "rotate", "Acme")
    said = damaged.run("restore", copy)
    stage.refresh()
    for tenant, url in (
        (stage.acme, "https://old.example/"),
        (stage.acme, "https://shop.acme.com/"),
        (stage.globex, "https://anywhere.example/"),
        (stage.globex, "https://always.example/"),
    ):
        assert stage.web.get(f"/{tenant.mail_id}/click/k", params={"url": url}).status_int == 200, url
    assert stage.web.get(f"/{stage.acme.mail_id}/click/k", params={"url": "https://acme.com/"}).status_int == 302
    assert stage.web.get(f"/{stage.acme.id}/dashboard", status=404)  # the id that was given up opens nothing again
    assert "Acme" in said and "has a new dashboard id" in said and told
    path = f"/{re.findall('Acme .*: (.+)', said)[0]}/emails"
    assert stage.web.post_json(path, {}, status=401)
    assert stage.web.post_json(path, {}, headers={"Authorization": f"Bearer {key}"}, status=201)
    assert stage.web.post_json(f"/{stage.globex.id}/emails", {}, status=401)
    hosts = dict(stage.rows("select name, tracking_host from tenants"))
    assert hosts == {"Acme": None, "Globex": "one.example", "Young": None}
    assert stage.rows("select value from tenant_rules where rule = 'forward'") == [("young",)]
    assert stage.rows("select utm from tenants where utm <> '' order by utm") == [("a=1",), ("b=2",)]
    assert "all is well" in damaged.run("check")


def test_after_a_restore_shares_are_those_there_were_before_it(damaged: Restored) -> None:
    stage = damaged.stage
    old, kept = (damaged.run("tenant", "share", "Acme").split()[-1] for _ in range(2))
    copy = damaged.backup("copy.db")
    new = damaged.run("tenant", "share", "Acme").split()[-1]
    damaged.run("tenant", "shares", "Acme", "--revoke", old)
    damaged.run("restore", copy)
    stage.refresh()
    for url, status in ((old, 404), (kept, 200), (new, 200)):
        stage.web.get(url.removeprefix("https://track.example.com"), status=status)
    assert "all is well" in damaged.run("check")


def test_a_change_of_tenants_that_is_killed_anywhere_is_in_the_database_and_in_tenants_json_or_in_neither(
    damaged: Restored,
) -> None:
    stage = damaged.stage
    stage.app.close()
    outcomes = set()

    def suspended() -> bool:
        [(found,)] = stage.rows("select suspended from tenants where name = 'Acme'")
        return bool(found)

    for step in range(60):
        word = "--no-suspend" if suspended() else "--suspend"
        words = [str(ROOT / "tracker.py"), "--env", os.devnull, "tenant", "set", "Acme", word]
        code = f"import sys; sys.argv[:] = {words!r}; step = {step}\n{KILLER}"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        committed = suspended()
        damaged.run("drain")
        entry = json.loads((stage.folder / "tenants.json").read_text())["tenants"][stage.acme.mail_id]
        assert entry["suspended"] == suspended() == committed, step
        outcomes.add((word, committed))
        if not done.returncode:
            break
    assert not done.returncode
    assert len(outcomes) > 2 and damaged.run("check") == "all is well\n"


def test_a_hit_without_a_time_of_a_deleted_email_comes_back_from_no_restore(damaged: Restored) -> None:
    stage, emails = damaged.stage, f"/{damaged.stage.acme.id}/emails"
    copy = damaged.backup("copy.db")
    segment(stage, *(hit(stage, key, t=0) for key in ("e1", "e2", "e3")))
    segment(stage, tracker.email_line(stage.acme.mail_id, tracker.Registration("e1", "Old"), 0)).rename(
        stage.spool / f"{NOW}-1-{'ab' * 12}-emails.jsonl"
    )
    stage.drain()
    for key in ("e1", "e2"):
        stage.web.delete(f"{emails}/{key}")
    stage.web.post_json(emails, {"key": "e2"})
    damaged.run("restore", copy)
    assert stage.rows("select key from event_details") == [("e3",)]
    assert stage.rows("select key, subject from emails order by key") == [("e2", ""), ("e3", "")]


def test_restore_names_each_time_of_which_nothing_is_there_and_what_it_cannot_know(damaged: Restored) -> None:
    stage = damaged.stage
    stage.pixel("e1")
    stage.drain()
    copy = damaged.backup("copy.db")
    with closing(sqlite3.connect(copy)) as connection:
        connection.execute("update positions set updated_at = ?", (NOW,))
        connection.commit()
    hour = 3_600_000
    for path in (*stage.spool.glob("*.jsonl"), *stage.spool.glob("kept/*.jsonl")):
        path.unlink()
    for folder, began, ended in (("kept", 2, 3), ("kept", 5, 8), ("", 6, 9), ("kept", 12, tracker.now_ms() / hour)):
        at = NOW + began * hour if began else NOW
        path = segment(stage, hit(stage, f"e{began}"), at=at)
        until = NOW + ended * hour if ended < 100 else tracker.now_ms()
        os.utime(path, (until / 1000, until / 1000))
        path.rename(stage.spool / folder / path.name)
    said = damaged.run("restore", copy)
    gaps = [(NOW, NOW + 2 * hour), (NOW + 3 * hour, NOW + 5 * hour), (NOW + 9 * hour, NOW + 12 * hour)]
    told = [f"from {tracker.iso_time(began)} to {tracker.iso_time(ended)}" for began, ended in gaps]
    noted = re.findall("note: what came (.*), if any, is neither in the backup nor the spool", said)
    assert noted == told
    assert "what was said since the backup of campaigns" in said


MANY = 150_000  # more than a fast machine registers in the time that three requests have for it


def test_while_a_restored_database_is_still_told_of_emails_nobody_says_more_of_them(damaged: Restored) -> None:
    stage, emails = damaged.stage, f"/{damaged.stage.acme.id}/emails"
    stage.web.post_json(emails, {"key": "e1", "subject": "First"})
    copy = damaged.backup("copy.db")
    lines = (
        tracker.email_line(stage.acme.mail_id, tracker.Registration(f"n{n}"), tracker.now_ms()) for n in range(MANY)
    )
    (stage.spool / "kept" / f"{tracker.now_ms()}-1-{'ab' * 12}-emails.jsonl").write_bytes(b"".join(lines))
    damaged.put_in_place(copy)
    body = b'{"subject": "Second"}'
    for method, path in (("PATCH", f"/n{MANY - 1}"), ("DELETE", f"/n{MANY - 1}"), ("POST", ""), ("PATCH", "/e1")):
        answer = stage.web.request(emails + path, method=method, body=body, expect_errors=True)
        assert (answer.status_int, answer.headers.get("Retry-After")) == (503, "5"), (method, path)
    assert stage.drain().troubles == []
    stage.web.patch_json(f"{emails}/n{MANY - 1}", {"subject": "Second"})
    assert stage.rows("select count(*), max(subject) from emails where key like 'n%'") == [(MANY, "Second")]
    stage.web.patch_json(f"{emails}/n5x", {"subject": "Second"}, status=404)


def test_what_is_said_of_emails_after_a_restore_takes_nothing_from_what_was_said_before(damaged: Restored) -> None:
    stage, emails = damaged.stage, f"/{damaged.stage.acme.id}/emails"
    copy = damaged.backup("copy.db")
    stage.web.post_json(emails, {"key": "e1", "subject": "First"})
    damaged.put_in_place(copy)
    answer = stage.web.post_json(emails, {"key": "e2"}, expect_errors=True)
    stage.drain()
    if answer.status_int != 201:
        stage.web.post_json(emails, {"key": "e2"})
    stage.drain()
    assert stage.rows("select key from emails order by key") == [("e1",), ("e2",)]


def test_what_was_ingested_is_counted_once_after_a_restore_too(damaged: Restored) -> None:
    stage = damaged.stage
    copy, log = damaged.backup("copy.db"), stage.folder / "log"
    lines = [b"unspooled " + hit(stage, key) for key in ("e1", "e2")]
    lines.append(b"unspooled " + hit(stage, "e3", uri="/nobody/pixel/e3.gif"))
    log.write_bytes(b"".join(lines))
    assert f"{log}: 2 hits counted, 0 known already, 1 dropped (unknown-tenant), 0 not" in damaged.run("ingest", log)
    before = damaged.facts()
    for _ in range(2):
        assert f"{log}: 0 hits counted, 3 known already, 0 not" in damaged.run("ingest", log)
        damaged.run("restore", copy)
        assert damaged.facts() == before
    [kept] = stage.spool.glob("kept/*-ingest.jsonl")
    assert len(kept.read_bytes().splitlines()) == 3
    kept.rename(kept.parent / kept.name.replace("-ingest", "1-ingest"))  # as if another server had kept it too
    stage.drain()
    assert damaged.facts() == before
