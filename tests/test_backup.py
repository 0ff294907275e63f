"""Backing up while the server is in use, putting the copy back; and root's commands on data that are another user's."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import BASE, PROGRAM, Server, Stage, hears_signals, hit, segment, small_disk, without_settings
from load import Sent, counted, counted_keys, data, locked, rows, segments, terminate, wait_until
from test_dist import build
from test_live import assert_counted_once, fire, get, pixels, post

import tracker

KEY = "k" * 32
LARGE = 20_000  # emails: some MB, so that a copy takes long enough to be stopped in its middle
OWNER, GROUP = 12_345, 23_456  # nobody's


# == The command ==


class Said(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def run(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Said]:
    """Runs commands on the stage's database, in a folder beside it."""
    without_settings(monkeypatch)
    monkeypatch.setenv("DATABASE_URL", f"sqlite:{stage.settings.database}")
    monkeypatch.setenv("BASE_URL", BASE)
    (tmp_path / "backups").mkdir()
    monkeypatch.chdir(tmp_path / "backups")

    def command(*words: object) -> Said:
        capsys.readouterr()
        status = tracker.main(["--env", os.devnull, *map(str, words)])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return Said(status, said.out, said.err)

    return command


def whole(path: Path) -> sqlite3.Connection:
    """Open a backup, which must be a whole database, without leaving anything beside it."""
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True)
    assert connection.execute("pragma integrity_check").fetchall() == [("ok",)]
    return connection


def keys_in(path: Path) -> Counter[str]:
    """How many events each key has in a backup."""
    with contextlib.closing(whole(path)) as connection:
        found = connection.execute("select key from emails join events on events.email = emails.id")
        return Counter(key for (key,) in found)


@pytest.mark.parametrize("umask", [0o000, 0o177])
def test_only_its_owner_may_read_a_backup(umask: int, run: Callable[..., Said]) -> None:
    old = os.umask(umask)
    try:
        assert run("backup", "copy.db").status == 0
    finally:
        os.umask(old)
    found = os.stat("copy.db")
    assert stat.S_IMODE(found.st_mode) == 0o600 and found.st_uid == os.geteuid()


def test_a_backup_is_one_file_that_holds_everything_also_what_waited(stage: Stage, run: Callable[..., Said]) -> None:
    segment(stage, *(hit(stage, f"finished-{number}") for number in range(30)))
    stage.pixel("unfinished")  # its segment is still written to
    assert stage.rows("select count(*) from events") == [(0,)]
    said = run("backup", "copy.db")
    assert said.err == "" and f"copy.db: {os.stat('copy.db').st_size:,} bytes, a full backup." in said.out
    assert "like a password" in said.out and "sign links" in said.out
    assert os.listdir() == ["copy.db"]  # no -wal, -shm or -journal, which nobody would copy with it
    with contextlib.closing(whole(Path("copy.db"))) as copy:
        for (table,) in stage.rows("select name from sqlite_master where type = 'table'"):
            assert copy.execute(f"select * from {table}").fetchall() == stage.rows(f"select * from {table}"), table
    assert keys_in(Path("copy.db")) == {"unfinished": 1} | {f"finished-{n}": 1 for n in range(30)}


def test_a_backup_that_was_put_in_place_says_to_start_the_server_which_makes_its_spool(
    stage: Stage, run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.pixel("ann")
    assert run("backup", "copy.db").status == 0
    restored = tmp_path / "restored" / "tracking.db"
    restored.parent.mkdir()
    shutil.copy("copy.db", restored)
    monkeypatch.setenv("DATABASE_URL", f"sqlite:{restored}")
    for command in ("check", "stats", "drain"):
        said = run(command, *(["Acme"] if command == "stats" else []))
        assert (said.status, said.out) == (1, "")
        assert f"{restored} has no spool" in said.err and "`serve` makes one: start it" in said.err
    # What `serve` does first.
    database = tracker.open_database(tracker.Settings(database=str(restored)), make=True)
    with contextlib.closing(database), tracker.changing_tenants(database):
        pass
    assert run("check").out == "all is well\n"


def test_a_backup_says_that_secret_key_is_not_in_it(run: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", KEY)
    said = run("backup", "copy.db")
    assert said.status == 0 and "note: SECRET_KEY is not in it" in said.err
    assert KEY.encode() not in Path("copy.db").read_bytes() and KEY not in said.out + said.err


@pytest.mark.parametrize("kind", ["file", "empty file", "link to a file", "dangling link", "folder"])
def test_a_backup_replaces_nothing(kind: str, tmp_path: Path, run: Callable[..., Said]) -> None:
    path, target = Path("copy.db"), tmp_path / "target"
    if "link" in kind:
        path.symlink_to(target)
    if kind == "folder":
        path.mkdir()
    elif kind != "dangling link":
        path.write_bytes(b"" if "empty" in kind else b"precious")
    before = path.lstat()
    said = run("backup", path)
    assert (said.status, said.out) == (1, "")
    assert f"{path} is there already; expected the name of a new file" in said.err
    assert path.lstat() == before and target.exists() == (kind == "link to a file")
    assert kind in ("folder", "empty file", "dangling link") or path.read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["no-folder/copy.db", "file/copy.db", "", "folder/"])
def test_a_backup_that_can_not_be_written_is_said_in_a_sentence(name: str, run: Callable[..., Said]) -> None:
    Path("file").touch()
    said = run("backup", name)
    assert said.status == 1 and f"{name}: " in said.err and said.err.count("\n") == 1
    assert os.listdir() == ["file"]


@pytest.mark.parametrize("name", [":memory:", "file:copy.db?mode=memory", "copy.db?mode=memory", "a b%20c#d"])
def test_no_name_of_a_file_means_anything_else_to_sqlite(name: str, stage: Stage, run: Callable[..., Said]) -> None:
    """SQLite keeps `:memory:` nowhere, and may read a name that begins with `file:` as a URI: then the backup is empty."""
    stage.pixel("ann")
    assert run("backup", name).status == 0
    assert os.listdir() == [name]
    assert stat.S_IMODE(os.stat(name).st_mode) == 0o600
    assert keys_in(Path(name)) == {"ann": 1}


def test_no_half_backup_is_left_where_there_is_no_database(
    run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"sqlite:{tmp_path / 'nothing' / 'tracking.db'}")
    said = run("backup", "copy.db")
    assert said.status == 1 and f"no database at {tmp_path}/nothing" in said.err
    assert os.listdir() == [] and not (tmp_path / "nothing").exists()


def test_a_backup_while_another_process_writes_says_that_hits_are_missing_from_it(
    stage: Stage, run: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    drain = tracker.drain_for_reading
    monkeypatch.setattr(tracker, "drain_for_reading", lambda database, seconds: drain(database, seconds=0.2))
    stage.pixel("before")
    run("drain")
    stage.pixel("waiting")
    with locked(Path(stage.settings.database)):
        said = run("backup", "copy.db")
    assert said.status == 0 and "waiting" in said.err
    assert keys_in(Path("copy.db")) == {"before": 1}


@pytest.mark.parametrize("full", ["disk", "files"])
def test_no_half_backup_is_left_where_there_is_no_room(stage: Stage, tmp_path: Path, full: str) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    # Files beyond 32 or 64 KB, by how large the shell's blocks are.
    limited = ["sh", "-c", 'ulimit -f 64; exec "$@"', "sh"] if full == "files" else []
    environ = {"PATH": os.environ["PATH"], "DATABASE_URL": f"sqlite:{stage.settings.database}"}
    command = [*limited, *PROGRAM, "backup", "copy.db"]
    with small_disk(folder) if full == "disk" else contextlib.nullcontext():
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, cwd=folder)
        assert os.listdir(folder) == []
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r".*copy\.db: .*\n", done.stderr)
    assert stage.check() == []


# == A server in use ==


def enlarge(server: Server, mail_id: str) -> None:
    """Register many emails."""
    database = tracker.Database(str(data(server) / "tracking.db"))
    with contextlib.closing(database), database.transaction() as connection:
        tenant = tracker.find_tenant(connection, mail_id)
        subject = "A subject of some length " * 4
        mails = [tracker.Registration(f"large-{n:06d}", subject, f"reader{n}@example.org") for n in range(LARGE)]
        tracker.register_emails(connection, tenant.number, mails, tracker.now_ms())


def restore(backup: Path, server: Server) -> None:
    """Put a backup in the place of a server's database, as the README tells one to: a plain copy."""
    data(server).mkdir(exist_ok=True)
    for path in data(server).glob("tracking.db*"):
        path.unlink()
    shutil.copy(backup, data(server) / "tracking.db")


def test_a_backup_that_was_made_under_load_is_restored_on_another_server(servers: Callable[..., Server]) -> None:
    server = servers()
    made = server.tenant("Acme", "--domain", "acme.example")
    enlarge(server, made["mail_id"])
    server.start()
    signed = post(server, f"/{made['id']}/emails", {"key": "signed", "links": ["https://acme.example/sale?a=1&b=2"]})
    link = signed["links"][0]["click_url"].removeprefix(server.url)
    first = fire(server, pixels(made["mail_id"], "first", 200))
    wait_until(lambda: counted(server) >= 200, server)
    stopped = threading.Event()
    sent: list[Sent] = []

    def endless() -> Iterator[Sent]:
        for request in pixels(made["mail_id"], "load", 50_000):
            if stopped.is_set():
                return
            sent.append(request)
            yield request

    backup = server.folder / "copy.db"
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(fire, server, endless())
        try:
            wait_until(lambda: len(sent) >= 100, server)
            at_the_start = len(sent)
            server.run("backup", str(backup))
            at_the_end = len(sent)
            assert at_the_end > at_the_start
            wait_until(lambda: counted(server) >= at_the_end, server)
        finally:
            stopped.set()
    outcome = load.result()
    assert outcome.broken == []
    held = keys_in(backup)
    assert {each.key for each in first.answered} - set(held) == set()  # all that was counted before
    assert {each.key for each in sent[: at_the_start - 20]} - set(held) == set()  # and what had waited, drained first
    assert set(held.values()) == {1}
    assert_counted_once(server, first, outcome)

    other = servers()
    restore(backup, other)
    other.start()
    assert counted_keys(other) == held
    status, headers, _ = get(other.port, link)
    assert (status, headers["location"]) == (302, "https://acme.example/sale?a=1&b=2")
    wait_until(lambda: counted_keys(other) - held == Counter(["signed"]), other)
    assert terminate(other) == 0
    assert other.run("check") == "all is well\n"
    assert rows(other, "select count(*) from emails where registered") == [(LARGE + 1,)]


def test_hits_are_counted_while_a_backup_is_being_written(servers: Callable[..., Server], tmp_path: Path) -> None:
    server = servers()
    made = server.tenant("Acme")
    enlarge(server, made["mail_id"])
    server.start()
    before = fire(server, pixels(made["mail_id"], "before", 50))
    wait_until(lambda: counted(server) == 50, server)
    size = int(rows(server, "select page_count * page_size from pragma_page_count, pragma_page_size")[0][0])
    for number in range(20):
        backup = tmp_path / f"copy{number}.db"
        command = [*PROGRAM, "backup", str(backup)]
        with subprocess.Popen(command, env=server.environ, stdout=subprocess.DEVNULL, cwd=server.folder) as process:
            while process.poll() is None and not (backup.exists() and backup.stat().st_size):
                time.sleep(0.0005)
            process.send_signal(signal.SIGSTOP)
            try:
                in_the_middle = process.poll() is None and 0 < backup.stat().st_size < size * 0.9
                if in_the_middle:
                    meanwhile = fire(server, pixels(made["mail_id"], "meanwhile", 50))
                    wait_until(lambda: counted(server) == 100, server)
            finally:
                process.send_signal(signal.SIGCONT)
            assert process.wait(60) == 0
        if in_the_middle:
            break
        backup.unlink()
    else:
        pytest.skip("this machine copies faster than one can look")
    assert keys_in(backup) == Counter(each.key for each in before.answered)  # as it was at one moment
    assert_counted_once(server, before, meanwhile)


def test_a_backup_put_back_counts_what_the_spool_still_holds_once(servers: Callable[..., Server]) -> None:
    server = servers()
    made = server.tenant("Acme")
    server.start()
    outcomes = [fire(server, pixels(made["mail_id"], "before", 100))]
    wait_until(lambda: counted(server) == 100, server)
    backup = server.folder / "copy.db"
    server.run("backup", str(backup))
    # Counted after the backup, in segments which the server still writes to.
    outcomes += [fire(server, pixels(made["mail_id"], "after", 100))]
    wait_until(lambda: counted(server) == 200, server)
    with locked(data(server) / "tracking.db"):
        outcomes += [fire(server, pixels(made["mail_id"], "waiting", 100))]  # and never counted by it
        server.kill()
    assert counted(server) == 200

    restore(backup, server)
    assert counted(server) == 100
    server.start()
    wait_until(lambda: counted(server) >= 300, server)
    outcomes += [fire(server, pixels(made["mail_id"], "at-last", 50))]
    assert_counted_once(server, *outcomes)
    assert len(counted_keys(server)) == 350


# == Root, and data that are another user's ==


@dataclass(frozen=True, slots=True)
class Owned:
    """A data folder of another user's, the program in one file, and a place that only root may enter."""

    folder: Path
    python: str
    program: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def private(self) -> Path:
        return self.folder / "root"

    def environ(self, **settings: str) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "DATABASE_URL": f"sqlite:{self.data / 'tracking.db'}",
            "BASE_URL": BASE,
            **settings,
        }

    def words(self, *words: object) -> list[str]:
        return [self.python, "-I", str(self.program), "--env", os.devnull, *map(str, words)]

    def run(self, *words: object, status: int = 0, stdin: str = "", **settings: str) -> str:
        """Run a command as root, in root's own folder; returns its stdout."""
        done = subprocess.run(
            self.words(*words),
            env=self.environ(**settings),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=self.private,
        )
        assert done.returncode == status, f"{words}: {done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout

    def strangers(self, folder: Path | None = None) -> list[str]:
        """What in a folder is not the owner's and the owner's group's."""
        paths = [folder or self.data, *(folder or self.data).rglob("*")]
        return [str(path) for path in paths if (path.lstat().st_uid, path.lstat().st_gid) != (OWNER, GROUP)]


@pytest.fixture(scope="session")
def one_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program in one file."""
    return build(tmp_path_factory.mktemp("backup") / "sources")


@pytest.fixture
def owned(one_file: Path) -> Iterator[Owned]:
    """Only for root. Not in pytest's folders, which others may not enter; and the same goes for many a Python."""
    if os.geteuid() != 0:
        pytest.skip("only root can act as another user")
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        (folder / "root").mkdir(mode=0o700)
        (folder / "data").mkdir(mode=0o750)
        os.chown(folder / "data", OWNER, GROUP)
        program = Path(shutil.copy(one_file, folder / "email-tracker"))
        program.chmod(0o755)
        for python in (sys.executable, "/usr/bin/python3"):
            with contextlib.suppress(OSError):
                if not subprocess.run(
                    [python, "-I", program, "--version"], user=OWNER, group=GROUP, capture_output=True, timeout=60
                ).returncode:
                    yield Owned(folder, python, program)
                    break
        else:
            pytest.skip("no Python that another user may run")
    finally:
        shutil.rmtree(folder)


def test_commands_of_root_leave_the_data_to_their_owner(owned: Owned) -> None:
    def said(*words: object) -> str:
        output = owned.run(*words)
        assert owned.strangers() == [], words
        return output

    made = json.loads(said("tenant", "add", "Acme", "--json"))
    assert {"tracking.db", "spool", "secret.key", "tenants.json"} <= set(os.listdir(owned.data))
    said("tenant", "set", "Acme", "--domain", "acme.com", "--name", "Acme Shoes")
    said("tenant", "key", made["mail_id"])
    mail_id = json.loads(said("tenant", "rotate", made["mail_id"], "--json"))["mail_id"]
    said("tenant", "list")

    fields = {"t": time.time(), "method": "GET", "answer": "pixel"}
    lines = [tracker.hit_line({**fields, "id": f"{n}", "uri": f"/{mail_id}/pixel/k{n}.gif"}) for n in range(3)]
    log = owned.private / "server.log"
    log.write_bytes(b"unspooled " + lines[0])
    log.chmod(0o600)
    assert f"{log}: 1 hits counted" in said("ingest", log)
    assert "0 hits counted, 1 known already" in said("ingest", "server.log")  # relative to where root is
    for line, command in zip(lines[1:], (("drain",), ("stats", mail_id)), strict=True):
        waiting = owned.data / "spool" / f"{int(time.time() * 1000):013d}-1-{os.urandom(6).hex()}.jsonl"
        waiting.write_bytes(line)
        os.chown(waiting, OWNER, GROUP)
        said(*command)
        assert not waiting.exists()
    (owned.data / "tenants.json").unlink()
    assert "all is well" in said("check", "--repair")
    assert (owned.data / "tenants.json").exists()
    assert said("check") == "all is well\n"
    said("config")
    said("tenant", "remove", mail_id, "--yes")


def test_what_root_instruments_is_its_owners_also_where_it_is_registered_through_the_spool(owned: Owned) -> None:
    owned.run("tenant", "add", "Acme")
    spooled = owned.data / "spool"
    for there in (True, False):
        if not there:
            (owned.data / "tracking.db").rename(owned.private / "aside.db")
        assert "/pixel/" in owned.run("instrument", "Acme", "--html", stdin="<body><p>Hello</p></body>")
        assert owned.strangers() == []
        assert bool([*spooled.glob("*-emails.jsonl")]) is not there


def test_a_backup_by_root_is_roots(owned: Owned) -> None:
    owned.run("tenant", "add", "Acme")
    for name in ("copy.db", str(owned.private / "another.db")):  # in a folder that the owner may not enter
        owned.run("backup", name)
        found = (owned.private / name).stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, os.getegid(), 0o600)
        assert keys_in(owned.private / name) == {}
    assert sorted(os.listdir(owned.private)) == ["another.db", "copy.db"]
    assert owned.strangers() == []
    for path in owned.data.glob("tracking.db*"):
        path.rename(owned.private / path.name)
    owned.run("backup", "failed.db", status=1)  # is taken away again, though the owner could not
    assert not (owned.private / "failed.db").exists()


@pytest.mark.parametrize("above", ["owner", "root"])
def test_a_data_folder_that_is_not_there_yet_belongs_to_whom_the_one_above_does(above: str, owned: Owned) -> None:
    parent = owned.data if above == "owner" else owned.private
    owned.run("tenant", "add", "Acme", DATABASE_URL=f"sqlite:{parent}/deep/below/tracking.db")
    assert (parent / "deep" / "below" / "tracking.db").exists()
    if above == "owner":
        assert owned.strangers() == []
    else:
        paths = [parent / "deep", *(parent / "deep").rglob("*")]
        assert {(path.stat().st_uid, path.stat().st_gid) for path in paths} == {(0, os.getegid())}


def identities(pid: int) -> tuple[list[int], list[int], list[int]]:
    """The users, groups and further groups that a process has: real, effective, saved and of files."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    uids, gids, groups = ([int(word) for word in lines[name].split()] for name in ("Uid", "Gid", "Groups"))
    return uids, gids, groups


def test_workers_of_a_server_that_root_starts_act_as_the_owner_and_so_may_its_service_later(owned: Owned) -> None:
    # Its data folder is the owned one; the log is root's.
    server = Server(owned.private)
    (owned.private / "data").symlink_to(owned.data)
    answered: list[Sent] = []
    try:
        for generation, options in enumerate(({}, {"user": OWNER, "group": GROUP, "extra_groups": []})):
            environ = owned.environ(BIND=server.environ["BIND"])
            server.launch(*owned.words("serve"), env=environ, cwd="/", **options)
            wait_until(lambda: len(server.workers()) == 2 and all(map(hears_signals, server.workers())), server)
            [tenant] = json.loads(owned.run("tenant", "list", "--json"))
            for worker in server.workers():
                uids, gids, groups = identities(worker)
                assert set(uids) == {OWNER} and set(gids) == {GROUP} and set(groups) <= {GROUP}
            answered += fire(server, pixels(tenant["mail_id"], f"generation{generation}", 30)).answered
            assert owned.strangers() == []
            assert terminate(server) == 0
            assert owned.strangers() == []
            assert segments(server) == []
    finally:
        server.listener.close()
        server.stop()
    # If root asked SQLite here, its files would be root's: look for the events in a backup.
    owned.run("backup", "copy.db")
    assert len(answered) == 60
    assert keys_in(owned.private / "copy.db") == Counter(each.key for each in answered)
    assert owned.strangers() == []
