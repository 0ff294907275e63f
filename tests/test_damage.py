"""What happens when …, as `help keep` says it, with real servers: what no other file of tests has."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, Server, small_disk
from load import counted_keys, data, rows, terminate, wait_until
from test_live import Outcome, assert_counted_once, fire, pixels, post
from test_readme import columns
from test_restore import ask, health


def settled(server: Server) -> bool:
    told = health(server)
    return bool(told["status"] == "ok" and told["waiting_hits"] == 0)


def recorded(server: Server, mail_id: str, prefix: str, many: int) -> Outcome:
    """Hits that were all answered as recorded."""
    outcome = fire(server, pixels(mail_id, prefix, many))
    assert (outcome.broken, outcome.wrong, len(outcome.answered)) == ([], [], many)
    return outcome


# == The table of `help keep` ==

RESTORED = "test_whatever_happens_to_the_database_under_load_nothing_answered_is_missing_after_a_restore"
WAL = "test_a_wal_that_is_deleted_while_it_serves_costs_nothing_and_needs_no_restore"
HELD = {  # what happens when …, and the tests that hold it
    "tracking.db is deleted or replaced": [
        "test_while_the_database_is_replaced_hits_are_recorded_and_when_it_is_back_each_is_counted_once",
        RESTORED,
    ],
    "it is overwritten or cut short": [
        "test_a_server_that_is_started_on_a_broken_database_serves_pixels_and_links_and_says_what_to_do",
        RESTORED,
    ],
    "bits of it flip further inside": ["test_pages_that_meet_damage_are_503_and_check_names_it_while_links_work"],
    "-wal is deleted while it runs": [WAL],
    "-shm is deleted while it runs": [WAL],
    "-wal and -shm are deleted": [WAL],
    "power fails": [  # the disk then has a database without its newest transactions, and segments
        WAL,
        "test_half_a_line_waits_in_a_live_segment_and_is_put_aside_in_a_finished_one",
        "test_what_the_database_does_not_have_whole_is_never_deleted",
    ],
    "a restore is killed": ["test_a_restore_that_is_killed_anywhere_and_run_again_counts_each_hit_once"],
    "a backup is killed": [
        "test_a_backup_that_is_killed_anywhere_harms_nothing_and_what_it_leaves_is_whole_or_refused"
    ],
    "a shell locks the database": [
        "test_while_another_writes_hits_are_recorded_and_numbers_say_that_some_still_wait",
        "test_every_answered_request_is_counted_once_while_workers_die_and_the_database_is_locked",
    ],
    "a shell reads for long": ["test_a_reader_that_holds_checkpoints_up_before_the_damage_costs_no_hit"],
    "a segment can't be read": ["test_a_segment_that_cannot_be_read_is_named_and_the_others_are_drained"],
    "after a restore, one of -emails": [
        "test_while_what_was_said_of_emails_cannot_be_read_it_is_told_how_to_register_others"
    ],
    "a line can't be read": ["test_a_line_that_is_no_hit_is_put_aside_and_its_neighbours_are_counted"],
    "the spool can't be written": [
        "test_a_hit_that_is_lost_on_the_way_is_printed_instead_and_the_next_opens_another_segment"
    ],
    "the spool is moved away": ["test_a_spool_that_is_moved_away_is_noticed_within_a_second_and_no_hit_is_lost"],
    "spool/kept is full": ["test_where_there_is_too_little_room_the_oldest_goes_first_and_that_is_told"],
    "tenants.json is deleted or stale": [
        "test_a_tenants_json_that_says_nothing_sensible_is_written_anew_and_costs_no_answer",
        "test_where_a_kill_left_tenants_json_and_database_different_whoever_drains_makes_them_alike",
    ],
    "a worker is killed": ["test_whoever_is_killed_under_load_every_answered_hit_is_counted_once"],
    "a worker hangs": [
        "test_a_worker_that_hangs_is_told_by_health_and_replaced_and_no_hit_is_lost",
        "test_a_worker_that_is_aborted_breaks_at_most_the_request_in_its_hands",
    ],
    "SIGUSR2 starts a second master": ["test_a_second_master_that_sigusr2_starts_takes_over_without_a_lost_request"],
    "one tenant has very many hits": ["test_no_tenant_waits_long_for_what_others_do"],
    "the clock leaps": [
        "test_a_clock_that_leaps_under_a_running_server_deletes_nothing_and_loses_no_hit",
        "test_a_clock_that_leaps_a_year_and_back_deletes_nothing",
        "test_a_hit_of_a_time_that_no_clock_has_counts_now_and_stays_unconfirmed",
    ],
    "the disk is full": ["test_a_full_disk_is_told_and_what_it_kept_from_working_works_again_once_there_is_room"],
}


def test_every_row_of_what_happens_when_is_held_by_a_test_that_is_there() -> None:
    _, *rows = columns("keep", "What happens when …")
    assert rows == [*HELD] and all(HELD.values())
    there = {
        name for path in Path(__file__).parent.glob("*.py") for name in re.findall("def (test_\\w+)", path.read_text())
    }
    assert {name for names in HELD.values() for name in names} <= there


# == The database ==


@pytest.mark.parametrize("ends", [("-wal",), ("-shm",), ("-wal", "-shm")], ids=" and ".join)
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


TWO_IN_ONE_PROCESS = """
import os, sys, tracker
path = sys.argv[1]
first, second = tracker.Database(path), tracker.Database(path)
with first.reading():
    pass
for end in ("-wal", "-shm"):
    os.unlink(path + end)
second.leave = lambda: print("leaves")
try:
    with second.transaction() as connection:
        connection.execute("insert into marks values ('x', 'y')")
    print("wrote")
except tracker.StoreError as error:
    print(error)
os._exit(0)
"""


def test_a_process_that_has_what_was_taken_away_open_elsewhere_writes_nothing_and_ends(server: Server) -> None:
    assert terminate(server) == 0
    path = str(data(server) / "tracking.db")
    command = [sys.executable, "-c", TWO_IN_ONE_PROCESS, path]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    [leaves, why] = said.stdout.splitlines()
    assert (leaves, said.stderr) == ("leaves", "")
    assert why == f"{path}: its -wal or -shm was taken away while it was open; this process must end"


OPENED_AT_ONCE = """
import os, sys, tracker
path = sys.argv[1]
first, second = tracker.Database(path), tracker.Database(path)
look = tracker.file_id

def file_id(path):  # just when the second has looked, the first opens the database, and makes -wal and -shm
    found = look(path)
    if str(path).endswith("-shm"):
        tracker.file_id = look
        with first.reading():
            pass
    return found

tracker.file_id = file_id
second.leave = lambda: print("leaves")
with second.reading():
    print("reads")
os._exit(0)
"""


def test_a_thread_that_opens_the_database_while_another_does_takes_nothing_away(server: Server) -> None:
    assert terminate(server) == 0
    path = data(server) / "tracking.db"
    assert not path.with_name("tracking.db-wal").exists()
    command = [sys.executable, "-uc", OPENED_AT_ONCE, str(path)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (said.stdout, said.stderr) == ("reads\n", "")


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
        outcomes: list[Outcome] = []

        def is_told() -> bool:
            """Whether the worker that was asked tells of it: it may have had room still, in a block or in what it freed."""
            with contextlib.suppress(OSError), filler.open("ab") as file:
                file.write(b"x" * 65_536)
            outcomes.append(fire(server, pixels(made["mail_id"], f"full{len(outcomes)}-", 50)))
            assert len(outcomes[-1].answered) == 50
            return "can't be written" in str(health(server)["why"])

        wait_until(is_told, server)
        status, _, told = ask(server, f"/{made['id']}/emails", {"key": "e1"})
        assert (status, b"can't be written" in told) == (503, True), told
        filler.unlink()
        wait_until(lambda: health(server)["status"] == "ok", server, 3)  # though no hit came
        post(server, f"/{made['id']}/emails", {"key": "e1"})
        assert terminate(server) == 0
        server.run("ingest", str(server.log))
        for outcome in outcomes:
            outcome.wrong.clear()
        assert_counted_once(server, *outcomes)


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
