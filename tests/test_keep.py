"""The lines for a shell in `help keep` are run as they stand there, with stand-ins for what belongs to the machine."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from conftest import ROOT, Server
from load import counted, data, rows, terminate, wait_until
from test_damage import recorded, settled
from test_live import assert_counted_once, post
from test_readme import chapter, codes
from test_restore import ask

import tracker

KEEP = tracker.help_text("keep")
LOGGED = 'echo "${0##*/} $*" >>"$HOME/log"\n'
# It refuses to print units that name a place which a service can't read.
TRACKER = """
import os, sys, tracker
if sys.argv[1] == "systemd":
    sys.executable = "/usr/bin/python3"
    os.environ["DATABASE_URL"] = "sqlite:/var/lib/email-tracker/tracking.db"
    sys.argv += ["--program", "/usr/local/bin/email-tracker"]
sys.exit(tracker.main(["--env", os.devnull, *sys.argv[1:]]))
"""
STAND_INS = {  # for what isn't on every machine, or must not be changed there
    "systemctl": LOGGED
    + 'case $1 in stop) kill "$(cat "$HOME/pid")"; while [ -e "$HOME/pid" ]; do sleep 0.05; done; esac',
    "chown": LOGGED,
    "scp": 'exec cp "$@"',
    "curl": LOGGED,
    "email-tracker": f"PYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.quote(sys.executable)} -c '{TRACKER}' \"$@\"",
}


class Shell:
    """A shell of root's on a server, whose folders are in that of the test."""

    def __init__(self, server: Server, new: Server | None = None) -> None:
        self.server, self.home = server, server.folder
        self._places = {
            "root@NEW:/var/lib/email-tracker": str(data(new or server)),
            "/var/lib/email-tracker-backups": str(self.home / "backups"),
            "/var/lib/email-tracker": str(data(server)),
            "/etc/systemd/system": str(self.home / "units"),
            "/usr/local/bin": str(self.home / "bin"),
            "/root": str(self.home / "root"),
            "NEW_FILE": str(self.home / "new-file"),
        }
        for folder in ("bin", "units", "root", "backups"):
            (self.home / folder).mkdir()
        for name, what in STAND_INS.items():
            path = self.home / "bin" / name
            path.write_text(f"#!/bin/sh\n{what}\n")
            path.chmod(0o755)
        self.environ = {
            **server.environ,
            "HOME": str(self.home),
            "PATH": f"{self.home / 'bin'}:{os.environ['PATH']}",
        }

    def run(self, lines: str) -> str:
        """Run lines, of which none may fail; the server may be stopped by them."""
        lines = re.sub(r"(?<!\w)(?:" + "|".join(self._places) + ")", lambda found: self._places[found[0]], lines)
        process = self.server.process
        if process is not None:
            (self.home / "pid").write_text(str(process.pid))
        command = ["bash", "-euo", "pipefail", "-c", lines]
        with subprocess.Popen(
            command,
            env=self.environ,
            cwd=self.home / "root",
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as shell:
            until = time.monotonic() + 60
            while shell.poll() is None:
                assert time.monotonic() < until
                if process is not None and process.poll() is not None:
                    self.server.process = None
                    (self.home / "pid").unlink(missing_ok=True)
                time.sleep(0.02)
            assert shell.stdout is not None
            said = shell.stdout.read()
        assert shell.returncode == 0, f"{lines}\n{said}"
        return said

    def log(self) -> list[str]:
        """What the stand-ins were asked for."""
        path = self.home / "log"
        return path.read_text().splitlines() if path.exists() else []


def block(title: str, number: int = 0) -> str:
    return codes(chapter(title, KEEP))[number]


def quoted(title: str, beginning: str) -> str:
    """A command that stands in the text of a chapter."""
    [found] = re.findall(rf"`({beginning}[^`]*)`", chapter(title, KEEP))
    return str(found)


def test_the_lines_for_a_backup_each_night_set_up_units_whose_command_makes_one(servers: Callable[..., Server]) -> None:
    server = servers()
    made = server.tenant("Acme")
    server.start()
    shell = Shell(server)
    outcome = recorded(server, made["mail_id"], "hit", 20)
    shell.run(block("Back up"))
    assert shell.log() == ["systemctl daemon-reload", "systemctl enable --now email-tracker-backup.timer"]
    units = {path.name: path.read_text() for path in (server.folder / "units").iterdir()}
    assert set(units) == {"email-tracker-backup.service", "email-tracker-backup.timer"}
    [words] = re.findall(r"^ExecStart=.* (backup .*)$", units["email-tracker-backup.service"], re.MULTILINE)
    shell.run(f"email-tracker {words}\n{quoted('Back up', 'email-tracker backup')}")
    [nightly], [single] = ([*(server.folder / folder).glob("*.db")] for folder in ("backups", "root"))
    assert terminate(server) == 0
    for copy in (nightly, single):
        shell.run(quoted("Restore", "email-tracker restore").replace("FILE", str(copy)))
        assert_counted_once(server, outcome)


def test_the_lines_for_an_upgrade_and_back_put_the_file_in_place_and_restart(servers: Callable[..., Server]) -> None:
    server = servers()
    made = server.tenant("Acme")
    server.start()
    shell = Shell(server)
    outcomes = [recorded(server, made["mail_id"], "before", 20)]
    program = server.folder / "bin" / "email-tracker"
    old, new = program.read_bytes(), program.read_bytes() + b"# newer\n"
    (server.folder / "new-file").write_bytes(new)
    shell.run(block("Upgrade"))
    assert (program.read_bytes(), program.stat().st_mode & 0o777) == (new, 0o755)
    [copy] = (server.folder / "root").glob("before-upgrade-*.db")
    assert shell.log() == ["systemctl restart email-tracker.service"]
    assert terminate(server) == 0
    server.start()
    outcomes.append(recorded(server, made["mail_id"], "after", 20))
    shell.run(f"{quoted('Upgrade', 'install')}\nemail-tracker restore {copy}")
    assert program.read_bytes() == old
    assert_counted_once(server, *outcomes)


@pytest.mark.parametrize("days", [1, 31])
def test_the_lines_for_a_move_count_every_hit_once_however_long_nobody_does_the_last_step(
    days: int, servers: Callable[..., Server]
) -> None:
    """From the moment the database is moved aside the old server only answers and spools, even after a restart."""
    old, new = servers(), servers()
    made = old.tenant("Acme", "--domain", "acme.com")
    old.start()
    outcomes = [recorded(old, made["mail_id"], "before", 50)]
    post(old, f"/{made['id']}/emails", {"key": "e1", "subject": "Said"})
    wait_until(lambda: settled(old), old)
    shell, there = Shell(old, new), Shell(new)
    first, last = block("Move to another server, losing nothing"), block("Move to another server, losing nothing", 2)
    move, backup = first.rsplit("DATABASE_URL", 1)
    shell.run(move)
    outcomes.append(recorded(old, made["mail_id"], "moved", 50))
    shell.run(f"DATABASE_URL{backup}")
    assert ask(old, f"/{made['id']}/dashboard")[0] == 503
    assert terminate(old) == 0
    old.start()
    outcomes.append(recorded(old, made["mail_id"], "restarted", 50))
    data(new).mkdir()
    (old.folder / "root" / "move.db").rename(new.folder / "root" / "move.db")
    there.run(quoted("Move to another server, losing nothing", "email-tracker restore"))
    new.start()
    there.run(block("Move to another server, losing nothing", 1))
    [asked] = there.log()
    assert asked.endswith(" https://track.example.com/health")
    outcomes.append(recorded(new, made["mail_id"], "arrived", 50))
    wait_until(lambda: settled(new), new)
    assert terminate(new) == 0
    with contextlib.closing(sqlite3.connect(data(new) / "tracking.db")) as connection, connection:
        set_back = connection.execute("update positions set updated_at = updated_at - ?", (days * tracker.DAY_MS,))
        assert set_back.rowcount > 0
    new.start()
    here, _, on_the_new = last.partition("# on the new one")
    shell.run(here)
    assert old.process is None
    there.run(f"#{on_the_new}")
    wait_until(lambda: counted(new) >= 200, new)
    assert there.log()[1:] == ["chown -R email-tracker: arrived"]
    assert [*(data(new) / "arrived").rglob("*.jsonl")] == []
    assert_counted_once(new, *outcomes)
    assert rows(new, "select subject from emails where key = 'e1'") == [("Said",)]
    assert not (data(old) / "tracking.db").exists()
