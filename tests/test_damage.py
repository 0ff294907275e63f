"""What happens when …, as `help keep` says it, with real servers: what no other file of tests has."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT, Server, small_disk
from load import counted_keys, data, rows, terminate, wait_until
from test_live import Outcome, assert_counted_once, fire, pixels, post
from test_restore import ask, health


def settled(server: Server) -> bool:
    told = health(server)
    return bool(told["status"] == "ok" and told["waiting_hits"] == 0)


def recorded(server: Server, mail_id: str, prefix: str, many: int) -> Outcome:
    """Hits that were all answered as recorded."""
    outcome = fire(server, pixels(mail_id, prefix, many))
    assert (outcome.broken, outcome.wrong, len(outcome.answered)) == ([], [], many)
    return outcome


# == The database ==


@pytest.mark.parametrize("ends", [("-wal",), ("-wal", "-shm")], ids=["-wal", "-wal and -shm"])
def test_a_wal_that_is_deleted_while_it_serves_costs_nothing_and_needs_no_restore(
    ends: tuple[str, ...], server: Server
) -> None:
    mail_id = server.first_tenant()
    late = server.tenant("Late")
    time.sleep(1.1)  # workers look once a second
    post(server, f"/{late['id']}/emails", {"key": "e1", "subject": "Said"})
    outcomes = [recorded(server, mail_id, "before", 100), recorded(server, late["mail_id"], "late", 10)]
    wait_until(lambda: settled(server), server)
    for _ in range(10):
        assert ask(server, f"/{late['id']}/dashboard")[0] == 200  # all workers have it open
    before = set(server.workers())
    for end in ends:
        (data(server) / f"tracking.db{end}").unlink()
    outcomes.append(recorded(server, mail_id, "after", 100))
    wait_until(lambda: bool(before - set(server.workers())), server)  # whoever drains has ended
    wait_until(lambda: len(server.workers()) == 2, server)
    time.sleep(1.1)  # /health says what was a second ago
    wait_until(lambda: settled(server), server)
    assert terminate(server) == 0
    server.run("drain")  # a worker that still had what is gone may not
    assert_counted_once(server, *outcomes)
    assert rows(server, "select subject from emails where key = 'e1'") == [("Said",)]


def test_pages_that_meet_damage_are_503_and_check_names_it_while_links_work(servers: Callable[..., Server]) -> None:
    server = servers()
    made = server.tenant("Acme")
    server.start()
    email = post(server, f"/{made['id']}/emails", {"key": "e1", "links": ["https://acme.com/"]})
    link = email["links"][0]["click_url"].removeprefix(server.url)
    outcomes = [recorded(server, made["mail_id"], "before", 1_000)]
    server.run("backup", "copy.db")
    server.stop()
    path = data(server) / "tracking.db"
    with path.open("r+b") as file:
        for page in range(2, path.stat().st_size // 4096, 2):
            file.seek(page * 4096)
            file.write(os.urandom(4096))
    server.start()
    outcomes.append(recorded(server, made["mail_id"], "after", 100))
    assert ask(server, link)[0] == 302
    assert ask(server, f"/{made['id']}/dashboard")[0] == 503
    wait_until(lambda: "malformed" in str(health(server)["why"]), server)
    server.run("check", status=1)
    assert ask(server, "/health")[0] == 200
    server.run("restore", "copy.db")
    wait_until(lambda: settled(server), server)
    assert ask(server, f"/{made['id']}/dashboard")[0] == 200
    assert "Traceback" not in server.log.read_text()
    assert ask(server, link)[0] == 302
    assert terminate(server) == 0
    found = counted_keys(server)
    assert found.pop("e1") == 2
    assert found == {sent.key: 1 for outcome in outcomes for sent in outcome.answered}


# == The spool ==


def test_a_spool_that_is_moved_away_is_noticed_within_a_second_and_no_hit_is_lost(
    servers: Callable[..., Server],
) -> None:
    server = servers()
    made = server.tenant("Acme")
    server.start()
    spool = data(server) / "spool"
    outcomes = [recorded(server, made["mail_id"], "before", 50)]
    spool.rename(data(server) / "spool.old")
    time.sleep(1.1)
    printed = fire(server, pixels(made["mail_id"], "moved", 100))
    assert len(printed.wrong) == 100 and all("unspooled" in wrong for wrong in printed.wrong)
    assert "can't be written" in str(health(server)["why"])
    status, _, told = ask(server, f"/{made['id']}/emails", {"key": "e1"})
    assert (status, b"can't be written" in told) == (503, True)
    (data(server) / "spool.old").rename(spool)
    wait_until(lambda: settled(server), server)
    outcomes.append(recorded(server, made["mail_id"], "back", 50))
    assert terminate(server) == 0
    assert "100 hits counted" in server.run("ingest", str(server.log))
    printed.wrong.clear()
    assert_counted_once(server, *outcomes, printed)


def test_a_full_disk_is_told_and_what_it_kept_from_working_works_again_once_there_is_room(
    servers: Callable[..., Server],
) -> None:
    server = servers()
    made = server.tenant("Acme")
    spool = data(server) / "spool"
    instance = (spool / "instance").read_bytes()
    with small_disk(spool):
        for name in ("rejected", "kept"):
            (spool / name).mkdir()
        (spool / "instance").write_bytes(instance)
        server.start()
        filler = spool / "filler"
        with contextlib.suppress(OSError):
            filler.write_bytes(b"x" * 65_536)
        outcome = fire(server, pixels(made["mail_id"], "full", 50))
        assert len(outcome.answered) == 50
        assert "can't be written" in str(health(server)["why"])
        status, _, told = ask(server, f"/{made['id']}/emails", {"key": "e1"})
        assert (status, b"can't be written" in told) == (503, True), told
        filler.unlink()
        wait_until(lambda: health(server)["status"] == "ok", server, 3)  # though no hit came
        post(server, f"/{made['id']}/emails", {"key": "e1"})
        assert terminate(server) == 0
        server.run("ingest", str(server.log))
        outcome.wrong.clear()
        assert_counted_once(server, outcome)


# == tenants.json ==


@pytest.mark.parametrize("content", [None, "[" * 100_000, "{}", "\0" * 1_000])
def test_a_tenants_json_that_says_nothing_sensible_is_written_anew_and_costs_no_answer(
    content: str | None, servers: Callable[..., Server]
) -> None:
    server = servers()
    made = server.tenant("Acme", "--domain", "acme.com")
    server.start()
    link = f"/{made['mail_id']}/click/e1?url=https://acme.com/"
    wait_until(lambda: ask(server, link)[0] == 302, server)
    path = data(server) / "tenants.json"
    written = json.loads(path.read_text())["tenants"]
    path.unlink()
    if content is not None:
        path.write_text(content)
    until = time.monotonic() + 2
    while time.monotonic() < until:
        assert ask(server, link)[0] == 302
    wait_until(lambda: settled(server), server)
    assert json.loads(path.read_text())["tenants"] == written
    assert "Traceback" not in server.log.read_text()


# Kills a command when its change is in the database, and not in tenants.json yet.
KILLER = """
import os, signal, sys
sys.argv = ["tracker.py", "--env", os.devnull, "tenant", "set", "Acme", {option!r}]
import tracker
def look(frame, event, function):
    if event == "c_return" and function.__name__ == "commit":
        os.kill(os.getpid(), signal.SIGKILL)
sys.setprofile(look)
tracker.main()
"""


@pytest.mark.parametrize("option", ["--suspend", "--no-suspend"])
def test_where_a_kill_left_tenants_json_and_database_different_whoever_drains_makes_them_alike(
    option: str, servers: Callable[..., Server]
) -> None:
    server = servers()
    made = server.tenant("Acme")
    server.run("tenant", "set", "Acme", "--no-suspend" if option == "--suspend" else "--suspend")

    def states() -> tuple[bool, bool]:
        """Whether the tenant is suspended: by the file, by the database."""
        told = json.loads((data(server) / "tenants.json").read_text())["tenants"][made["mail_id"]]
        return bool(told["suspended"]), bool(rows(server, "select suspended from tenants where name = 'Acme'")[0][0])

    command = [sys.executable, "-c", KILLER.format(option=option)]
    environ = {**server.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, env=environ, cwd=server.folder, timeout=60).returncode == -signal.SIGKILL
    wanted = option == "--suspend"
    assert states() == (not wanted, wanted)
    server.start()
    wait_until(lambda: states() == (wanted, wanted), server, 3)
    assert server.run("check") == "all is well\n"


def test_check_calls_nothing_wrong_while_tenants_change(servers: Callable[..., Server]) -> None:
    server = servers()
    server.tenant("Acme")
    ended = threading.Event()

    def change() -> None:
        while not ended.is_set():
            server.run("tenant", "set", "Acme", "--suspend")
            server.run("tenant", "set", "Acme", "--no-suspend")

    with ThreadPoolExecutor(1) as pool:
        changing = pool.submit(change)
        try:
            assert {server.run("check") for _ in range(12)} == {"all is well\n"}
        finally:
            ended.set()
        changing.result()
