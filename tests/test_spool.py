"""The spool under faults: whatever dies, fills up or is deleted, each hit is counted once, and none in silence."""

from __future__ import annotations

import ast
import contextlib
import fcntl
import json
import linecache
import os
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import webtest
from conftest import CHROME, NOW, ROOT, Stage, click, hit, make_stage, missing, segment

import tracker

LONGEST = 30  # seconds a child may live: an alarm ends one that hangs
OUTLOOK = "Microsoft Office/16.0 (Windows NT 10.0; Microsoft Outlook 16.0.17928; Pro)"


# -- Children, and faults between two lines


def forked(work: Callable[[], object]) -> int:
    """Do the work in a child process; returns its pid."""
    with warnings.catch_warnings():
        # Python 3.12 warns of a fork where threads live; one left by another test matters to no child of ours.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(LONGEST)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)  # never back into pytest


def ended(pid: int) -> int:
    """Wait for a child: its exit status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_me() -> None:
    """Die as nothing can be prepared for."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail(kind: type[Exception]) -> None:
    """Raise an error of this kind, in the words of a disk."""
    raise kind("disk I/O error")


Place = tuple[str, int]  # a function of tracker.py and a line in it


class Steps:
    """Notes each line of tracker.py before it runs, and does something before one of them."""

    def __init__(self, at: int = -1, do: Callable[[], object] = kill_me) -> None:
        self.seen: list[Place] = []
        self._at = at
        self._do = do
        self._file = tracker.drain.__code__.co_filename

    def __enter__(self) -> Steps:
        self._before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename == self._file else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.seen.append((frame.f_code.co_name, frame.f_lineno))
            if len(self.seen) - 1 == self._at:
                self._do()
        return self._line


# Where the database and the spool change. Elsewhere only memory does, which dies with its process.
VITAL = {
    *("held", "transaction", "reading", "_connect", "_check_identity", "close", "sync_folder", "set_position"),
    *("drain", "_opened_segment", "drain_segment", "record", "read_lines", "_keep_rejected"),
}


def telling(seen: list[Place]) -> list[int]:
    """Which steps to try: each line the first time it ran, the vital ones the last time too, and some at random."""
    first: dict[Place, int] = {}
    last: dict[Place, int] = {}
    for number, place in enumerate(seen):
        first.setdefault(place, number)
        if place[0] in VITAL:
            last[place] = number
    some = random.Random(len(seen)).sample(range(len(seen)), 40)
    return sorted({*first.values(), *last.values(), *some})


def mending_lines() -> set[int]:
    """The lines of tracker.py that clean up after an error: a second error in there is more than a program can mend."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(Path(tracker.drain.__code__.co_filename).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Try):
            parts: list[ast.stmt | ast.ExceptHandler] = [*node.finalbody, *node.handlers]
            for part in parts:
                lines.update(range(part.lineno, (part.end_lineno or part.lineno) + 1))
    return lines


# -- A drain that dies


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory, where there is such a thing: what a process leaves behind is the same, and a sync costs nothing."""
    shm = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as folder:
        yield Path(folder)


Events = list[tuple[str, int, int, str]]


def events_of(database: tracker.Database) -> Events:
    """All events: key, time, type and user agent."""
    sql = "select key, at, type, agent from event_details order by 1, 2, 3, 4"
    with database.reading() as connection:
        return [tuple(row) for row in connection.execute(sql)]


def faults_of(database: tracker.Database) -> list[str]:
    """What check finds wrong."""
    with database.reading() as connection:
        return tracker.integrity_faults(connection) + tracker.rollup_differences(connection)


@dataclass
class Copy:
    """A copy of a wreck: its folder, and the lock that the writer of its live segment holds."""

    folder: Path
    writer: int

    @property
    def database(self) -> tracker.Database:
        """A new one each time, as another process would have."""
        return tracker.Database(str(self.folder / "tracking.db"))

    def let_go(self) -> None:
        """The writer ends."""
        if self.writer >= 0:
            os.close(self.writer)
        self.writer = -1


class Wreck:
    """A prepared folder with one finished and one live segment, copied for each try and drained with a fault."""

    def __init__(self, stage: Stage, home: Path) -> None:
        with stage.database.transaction() as connection:
            known = [tracker.Registration("e1", campaign="spring"), tracker.Registration("e4", campaign="spring")]
            tracker.register_emails(connection, stage.acme.number, known, NOW)
        torn = b'{"id":"torn'
        finished = [
            hit(stage, "e1", NOW + 1),
            click(stage, "e1", at=NOW + 2),
            b"no hit at all\n",
            hit(stage, "e2", NOW + 3, ua="curl/8.5.0"),
            hit(stage, "e3", NOW + 4, uri="/nobody00/pixel/e3.gif"),
        ]
        live = [
            click(stage, "e2", at=NOW + 5, answer="named", why="destination-not-allowed"),
            b'{"t":1}\n',
            hit(stage, "e1", NOW - 6, ua=OUTLOOK),
            hit(stage, "e4", NOW + 7),
            hit(stage, "e1", NOW + 8),
        ]
        self.finished = segment(stage, *finished, torn, at=NOW).name
        self.live = segment(stage, *live, torn, at=NOW + 1).name
        self.rejected = sorted(
            f"{name}-{len(b''.join(before)):010d}"
            for name, before in (
                (self.finished, finished[:2]),
                (self.finished, finished),
                (self.live, live[:1]),
                (self.live, live),
            )
        )
        self.expected: Events = sorted(
            [
                *[("e1", NOW - 6, 1, OUTLOOK), ("e1", NOW + 1, 1, CHROME), ("e1", NOW + 2, 2, CHROME)],
                *[("e1", NOW + 8, 1, CHROME), ("e2", NOW + 3, 1, "curl/8.5.0"), ("e2", NOW + 5, 2, CHROME)],
                ("e4", NOW + 7, 1, CHROME),
            ]
        )
        stage.app.close()  # so that all of the database is in its one file
        self._source, self._home = stage.folder, home
        self._copies = 0
        for _ in range(2):  # twice: only the second finds the caches filled, as the tries will
            with self.copy() as copy:
                self.steps = drain_with_fault(copy.database)

    @contextlib.contextmanager
    def copy(self) -> Iterator[Copy]:
        """A copy whose live segment is locked as its writer would; removed afterwards."""
        self._copies += 1
        folder = self._home / f"copy{self._copies}"
        shutil.copytree(self._source, folder)
        made = Copy(folder, os.open(folder / "spool" / self.live, os.O_WRONLY | os.O_APPEND))
        fcntl.flock(made.writer, fcntl.LOCK_SH)
        try:
            yield made
        finally:
            made.let_go()
            shutil.rmtree(folder)

    def assert_mended(self, copy: Copy, database: tracker.Database, fault: Place) -> None:
        """An ordinary drain, and another once the writer is gone, have each hit counted once and nothing left."""
        assert (tracker.drain(database).troubles, segments(copy.folder)) == ([], [self.live]), fault
        assert events_of(database) == self.expected, fault
        copy.let_go()
        assert (tracker.drain(database).troubles, segments(copy.folder)) == ([], []), fault
        assert sorted(os.listdir(copy.folder / "spool" / "rejected")) == self.rejected, fault
        assert events_of(database) == self.expected, fault
        with database.reading() as connection:
            dropped = connection.execute("select tenant, reason, hits from dropped").fetchall()
        assert dropped == [(0, "unknown-tenant", 1)], fault
        assert faults_of(database) == [], fault
        database.close()


def segments(folder: Path) -> list[str]:
    """The segments that are there."""
    return [*tracker.segment_sizes(str(folder / "spool"))]


def drain_with_fault(database: tracker.Database, at: int = -1, do: Callable[[], object] = kill_me) -> list[Place]:
    """Drain two hits a transaction, so that a fault can fall between transactions; returns the steps it took."""
    with Steps(at, do) as steps:
        tracker.drain(database, batch=2)
    database.close()
    return steps.seen


def test_a_drain_killed_between_any_two_of_its_steps_counts_each_hit_once(stage: Stage, memory: Path) -> None:
    wreck = Wreck(stage, memory)
    for step in [step for step in telling(wreck.steps) if wreck.steps[step][0] in VITAL or step % 20 == 0]:
        with wreck.copy() as copy:
            assert ended(forked(partial(drain_with_fault, copy.database, step))) == -signal.SIGKILL
            wreck.assert_mended(copy, copy.database, wreck.steps[step])


# A fault leaves files to the collector of garbage that nobody would leave open otherwise.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_drain_that_fails_between_any_two_of_its_steps_counts_each_hit_once(stage: Stage, memory: Path) -> None:
    wreck = Wreck(stage, memory)
    mending = mending_lines()
    errors = (MemoryError, OSError, sqlite3.OperationalError)
    for number, step in enumerate(telling(wreck.steps)):
        if wreck.steps[step][1] in mending:
            continue

        error = MemoryError if wreck.steps[step][0] == "_keep_rejected" else errors[number % len(errors)]
        with wreck.copy() as copy:
            database = copy.database
            with contextlib.suppress(*errors, tracker.StoreError):
                drain_with_fault(database, step, partial(fail, error))
            # No lock may be left behind, for another process; and no open transaction, for this one, which goes on.
            lock = os.open(copy.folder / "write.lock", os.O_RDWR)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(lock)
            wreck.assert_mended(copy, database, wreck.steps[step])


# -- A writer that dies


def test_a_writer_killed_between_any_two_of_its_steps_has_answered_no_hit_that_is_not_counted(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "SEGMENT_BYTES", 1)  # a new segment for each hit, so that there are three births

    def write(name: str, answered: int, at: int) -> list[Place]:
        spool = tracker.Spool(str(stage.spool))
        lines = {f"{name}-{n}": hit(stage, f"{name}-{n}") for n in range(3)}
        with Steps(at) as steps:
            for key, line in lines.items():
                if spool.append(line):
                    os.write(answered, key.encode() + b" ")
        spool.close()
        return steps.seen

    reader, writer = os.pipe()
    steps = write("whole", writer, -1)
    for step in range(len(steps)):
        assert ended(forked(partial(write, f"step{step}", writer, step))) == -signal.SIGKILL
        tracker.drain(stage.database)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answered = Counter(pipe.read().decode().split())
    counted = Counter(key for key, *_ in events_of(stage.database))
    assert set(answered.values()) == set(counted.values()) == {1}
    assert answered.keys() <= counted.keys()
    # At most one hit of each writer was written and not answered.
    assert len(counted) - len(answered) <= len(steps)
    assert segments(stage.folder) == []
    assert stage.check() == []


def test_a_segment_whose_writer_died_before_its_birth_is_left_alone_for_a_day_and_then_removed(stage: Stage) -> None:
    young, old = stage.spool / ".new-0123456789abcdef", stage.spool / ".new-fedcba9876543210"
    line = hit(stage, "e1")
    for path in (young, old):
        path.write_bytes(line)
    day_ago = time.time() - 86_400 - 60
    os.utime(old, (day_ago, day_ago))
    assert stage.drain().hits == 0
    tracker.tidy_spool(stage.database)
    assert (young.exists(), old.exists()) == (True, False)


def test_tidying_goes_on_past_what_it_cannot_remove(stage: Stage) -> None:
    day_ago = time.time() - 86_400 - 60
    folder, old = stage.spool / ".new-0000000000000000", stage.spool / ".new-ffffffffffffffff"
    folder.mkdir()
    old.touch()
    for path in (folder, old):
        os.utime(path, (day_ago, day_ago))
    tracker.tidy_spool(stage.database)
    assert not old.exists()


# -- Many at once


def drained_elsewhere(stage: Stage) -> None:
    """What another process that drains does meanwhile, unless the database is taken."""

    def drain() -> None:
        with contextlib.suppress(tracker.Busy):
            tracker.drain(tracker.Database(stage.database.path), wait=False)

    assert ended(forked(drain)) == 0


def test_a_drain_between_any_two_steps_of_a_writer_loses_no_hit_of_it(stage: Stage) -> None:
    """Most of all the drain that finds a segment without its lock, and takes its writer for dead."""

    def write(name: str, at: int) -> list[Place]:
        spool = tracker.Spool(str(stage.spool))
        lines = [hit(stage, name, NOW + n) for n in range(2)]
        with Steps(at, partial(drained_elsewhere, stage)) as steps:
            assert [spool.append(line) for line in lines] == [True, True], steps.seen[at]
        spool.close()
        return steps.seen

    steps = write("whole", -1)
    for step in range(len(steps)):
        write(f"step{step}", step)
    stage.drain()
    assert segments(stage.folder) == []
    names = ["whole", *[f"step{step}" for step in range(len(steps))]]
    assert events_of(stage.database) == sorted((name, NOW + n, 1, CHROME) for name in names for n in range(2))
    assert stage.check() == []


@pytest.mark.parametrize(
    "meanwhile",
    ["another hit is written", "another hit is written, the last", "another drains", "another drains the last"],
)
def test_whatever_happens_between_any_two_steps_of_a_drain_each_hit_is_counted_once(
    stage: Stage, meanwhile: str
) -> None:
    def drain(name: str, at: int) -> list[Place]:
        spool = tracker.Spool(str(stage.spool))
        assert spool.append(hit(stage, name, NOW))

        def happen() -> None:
            if "hit" in meanwhile:
                assert spool.append(hit(stage, name, NOW + 1))
            if "last" in meanwhile:
                spool.close()
            if "drains" in meanwhile:
                drained_elsewhere(stage)

        # Busy: where the other is in the middle of its work, this one is to come again.
        with Steps(at, happen) as steps, contextlib.suppress(tracker.Busy):
            tracker.drain(stage.database, wait=False)
        spool.close()
        tracker.drain(stage.database)
        return steps.seen

    drain("warm", -1)
    steps = drain("whole", -1)
    tried = [step for step, (function, _) in enumerate(steps) if function in VITAL]
    for step in tried:
        drain(f"step{step}", step)
    assert segments(stage.folder) == []
    hits = 2 if "hit" in meanwhile else 1
    expected = [("warm", NOW), ("whole", NOW), *[(f"step{step}", NOW + n) for step in tried for n in range(hits)]]
    assert [row[:2] for row in events_of(stage.database)] == sorted(expected)
    assert stage.check() == []


def test_drains_that_run_at_once_and_are_killed_count_what_is_written_meanwhile_once_each(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "SEGMENT_BYTES", 4_000)  # a new segment about every dozen hits
    lines = [hit(stage, f"e{n % 7}", NOW + n) for n in range(600)]
    done = stage.folder / "done"

    def write(mine: list[bytes]) -> None:
        spool = tracker.Spool(str(stage.spool))
        for line in mine:
            assert spool.append(line)
            time.sleep(0.001)

    def drain() -> None:
        database = tracker.Database(stage.database.path)
        while not done.exists():
            with contextlib.suppress(tracker.Busy):
                tracker.drain(database, batch=5, wait=bool(os.getpid() % 2))
        database.close()

    writers = [forked(partial(write, lines[n::2])) for n in range(2)]
    drains = [forked(drain) for _ in range(3)]
    for _ in range(8):
        time.sleep(0.04)
        killed = drains.pop(0)
        os.kill(killed, signal.SIGKILL)
        assert ended(killed) == -signal.SIGKILL
        drains.append(forked(drain))
    assert [ended(pid) for pid in writers] == [0, 0]
    done.touch()
    assert [ended(pid) for pid in drains] == [0, 0, 0]
    assert stage.drain().troubles == []
    assert segments(stage.folder) == []
    assert events_of(stage.database) == sorted((f"e{n % 7}", NOW + n, 1, CHROME) for n in range(600))
    assert stage.check() == []


@pytest.mark.parametrize(
    "before", ["fcntl.flock(fd, fcntl.LOCK_EX", "with self.database.reading("], ids=["the lock", "the first look"]
)
def test_a_drain_that_waited_while_another_finished_its_segment_counts_nothing_again(stage: Stage, before: str) -> None:
    """The other also forgot the position, since the segment had been idle for longer than positions are kept."""
    spool = tracker.Spool(str(stage.spool))
    assert spool.append(hit(stage, "e1"))
    tracker.drain(stage.database)
    with stage.database.transaction() as connection:
        connection.execute("update positions set updated_at = updated_at - 2 * 86400000")
    with Steps() as steps:
        tracker.drain(stage.database)
    wait = next(n for n, (_, line) in enumerate(steps.seen) if before in linecache.getline(tracker.__file__, line))

    def meanwhile() -> None:
        spool.close()
        other = tracker.Database(stage.database.path)
        tracker.drain(other)
        tracker.tidy_spool(other)
        other.close()

    with Steps(wait, meanwhile):
        tracker.drain(stage.database)
    assert segments(stage.folder) == []
    assert stage.rows("select key from emails join events on events.email = emails.id") == [("e1",)]
    assert stage.check() == []


# -- Live segments and finished ones


def test_a_segment_is_drained_while_its_writer_lives_and_removed_when_it_is_gone(stage: Stage) -> None:
    stage.pixel("e1")
    live = segments(stage.folder)
    assert tracker.drain(stage.database).hits == 1
    assert segments(stage.folder) == live
    stage.pixel("e2")
    assert segments(stage.folder) == live
    assert tracker.drain(stage.database).hits == 1
    stage.app.spool.close()
    assert tracker.drain(stage.database).hits == 0
    assert segments(stage.folder) == []
    assert [key for key, *_ in events_of(stage.database)] == ["e1", "e2"]
    assert stage.check() == []


def test_half_a_line_waits_in_a_live_segment_and_is_put_aside_in_a_finished_one(stage: Stage) -> None:
    spool = tracker.Spool(str(stage.spool))
    assert spool.append(hit(stage, "e1"))
    line = hit(stage, "e2")
    os.write(spool._fd, line[:50])
    for _ in range(2):
        tracker.drain(stage.database)
        assert [key for key, *_ in events_of(stage.database)] == ["e1"]
        assert tracker.rejected_lines(str(stage.folder)) == 0
    os.write(spool._fd, line[50:])
    assert tracker.drain(stage.database).hits == 1
    os.write(spool._fd, hit(stage, "e3")[:-1])  # all of it but the newline: nobody was told that it was recorded
    spool.close()
    report = tracker.drain(stage.database)
    assert (report.hits, report.rejected) == (0, 1)
    assert segments(stage.folder) == []
    [kept] = (stage.spool / "rejected").iterdir()
    assert json.loads(kept.read_bytes())["uri"].endswith("/e3.gif")
    assert [key for key, *_ in events_of(stage.database)] == ["e1", "e2"]
    assert stage.check() == []


def test_a_segment_is_followed_by_another_at_its_size_and_after_its_time(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "SEGMENT_BYTES", 1_000)
    spool = tracker.Spool(str(stage.spool))
    lines = [hit(stage, f"e{n}") for n in range(9)]
    for line in lines[:8]:
        assert spool.append(line)
    found = segments(stage.folder)
    sizes = sorted((stage.spool / name).stat().st_size for name in found)
    assert len(found) > 1
    assert sum(sizes) == sum(map(len, lines[:8]))
    assert sizes[-1] < 1_000 + len(lines[0])
    monkeypatch.undo()
    spool._opened -= tracker.SEGMENT_SECONDS
    assert spool.append(lines[8])
    [last] = set(segments(stage.folder)) - set(found)
    assert (stage.spool / last).read_bytes() == lines[8]
    tracker.drain(stage.database)
    assert segments(stage.folder) == [last]  # only the last still has a writer
    spool.close()
    tracker.drain(stage.database)
    assert [key for key, *_ in events_of(stage.database)] == [f"e{n}" for n in range(9)]
    assert stage.check() == []


def test_a_child_writes_a_segment_of_its_own_and_leaves_its_parents_alone(stage: Stage) -> None:
    spool = tracker.Spool(str(stage.spool))
    assert spool.append(hit(stage, "parent1"))
    [parents] = segments(stage.folder)
    line = hit(stage, "child")

    def write() -> None:
        assert spool.append(line)
        spool.close()

    pid = forked(write)
    assert ended(pid) == 0
    [childs] = set(segments(stage.folder)) - {parents}
    assert childs.split("-")[1] == str(pid)
    tracker.drain(stage.database)
    assert segments(stage.folder) == [parents]  # still live, though the child closed its copy
    assert spool.append(hit(stage, "parent2"))
    assert segments(stage.folder) == [parents]
    spool.close()
    tracker.drain(stage.database)
    assert [key for key, *_ in events_of(stage.database)] == ["child", "parent1", "parent2"]
    assert stage.check() == []


def test_a_hit_for_a_segment_that_somebody_deleted_is_printed_and_the_next_opens_another(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracker, "RETRY_SECONDS", 0.0)
    notes = [stage.pixel("e1").headers["X-Tracker"]]
    tracker.drain(stage.database)
    [live] = segments(stage.folder)
    (stage.spool / live).unlink()
    notes += [stage.pixel(key).headers["X-Tracker"] for key in ("e2", "e3")]
    assert notes == ["recorded", "unspooled", "recorded"]
    log = capsys.readouterr().err.encode().splitlines()
    assert tracker.ingest(stage.database, log) == (1, 0, [])
    stage.drain()
    assert [key for key, *_ in events_of(stage.database)] == ["e1", "e2", "e3"]
    assert stage.check() == []


# -- A disk that is full


def test_a_short_write_ends_its_segment_and_the_hit_is_printed_instead(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [hit(stage, f"e{n}") for n in range(8)]
    monkeypatch.setattr(tracker, "RETRY_SECONDS", 0.0)
    reader, writer = os.pipe()

    def write() -> None:
        # A limit on the size of files cuts a write short as a full disk does, without a disk to fill.
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(lines[0]) * 5 // 2, resource.RLIM_INFINITY))
        sys.stderr = open(writer, "w", encoding="utf-8")  # noqa: SIM115
        spool = tracker.Spool(str(stage.spool))
        assert [spool.append(line) for line in lines] == [True, True, False, True, True, False, True, True]

    assert ended(forked(write)) == 0
    os.close(writer)
    with open(reader, "rb") as pipe:
        log = pipe.read().splitlines(keepends=True)
    printed = [json.loads(line.removeprefix(b"unspooled ")) for line in log]
    assert printed == [json.loads(lines[2]), json.loads(lines[5])]
    assert len(segments(stage.folder)) == 3
    report = tracker.drain(stage.database)
    assert (report.hits, report.rejected) == (6, 2)
    assert tracker.ingest(stage.database, log) == (2, 0, [])
    assert tracker.ingest(stage.database, log) == (0, 2, [])
    assert [key for key, *_ in events_of(stage.database)] == [f"e{n}" for n in range(8)]
    assert stage.check() == []


@pytest.fixture
def small_disk(stage: Stage) -> Iterator[Path]:
    """The spool on a disk of 64 KB; returns a file that takes most of it."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        missing("the right to mount a small disk")
    instance = (stage.spool / "instance").read_bytes()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(stage.spool)]
    if subprocess.run(mount, capture_output=True).returncode:
        missing("the right to mount a small disk")
    try:
        (stage.spool / "rejected").mkdir()
        (stage.spool / "instance").write_bytes(instance)
        filler = stage.spool / "filler"
        filler.write_bytes(b"x" * 40_000)
        yield filler
    finally:
        stage.app.spool.close()
        subprocess.run(["umount", "-l", str(stage.spool)], check=True)


def test_on_a_full_disk_hits_are_answered_and_printed_and_each_is_counted_once_in_the_end(
    stage: Stage, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tracker.RETRY_SECONDS == 1.0
    monkeypatch.setattr(tracker, "RETRY_SECONDS", 1e9)  # the test says when a second has gone by
    notes: dict[str, str] = {}

    def hits(count: int) -> set[str]:
        fresh = [f"e{len(notes) + n}" for n in range(count)]
        notes.update((key, stage.pixel(key, status=200).headers["X-Tracker"]) for key in fresh)
        return {notes[key] for key in fresh}

    assert hits(10) == {"recorded"}
    assert hits(190) == {"recorded", "unspooled"}
    assert hits(10) == {"unspooled"}
    assert len(segments(stage.folder)) == 1  # nothing was tried again yet
    for tries in (2, 3):
        stage.app.spool._retry_at = 0.0
        assert hits(10) == {"unspooled"}
        assert len(segments(stage.folder)) == tries
    why = stage.web.get("/health").json["why"]
    assert any("unspooled" in line for line in why)
    assert stage.web.get("/health?strict", status=503).json["status"] == "degraded"

    small_disk.unlink()
    stage.app.spool._retry_at = 0.0
    assert hits(10) == {"recorded"}
    assert not stage.app.spool.failing
    log = capsys.readouterr().err.encode().splitlines()
    spooled = {key for key, note in notes.items() if note == "recorded"}
    printed = [json.loads(line.removeprefix(b"unspooled "))["uri"] for line in log if line.startswith(b"unspooled ")]
    assert sorted(printed) == sorted(f"/{stage.acme.mail_id}/pixel/{key}.gif" for key in notes.keys() - spooled)

    assert stage.drain().hits == len(spooled)
    assert tracker.ingest(stage.database, log) == (len(notes) - len(spooled), 0, [])
    assert tracker.ingest(stage.database, log) == (0, len(notes) - len(spooled), [])
    assert sorted(key for key, *_ in events_of(stage.database)) == sorted(notes)
    assert segments(stage.folder) == []
    assert stage.check() == []


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_a_printed_hit_can_be_ingested_whatever_the_encoding_of_the_log(stage: Stage, encoding: str) -> None:
    agent = f"{CHROME} Größe → 😀"
    program = "import sys, tracker; tracker.Spool('/nowhere').append(sys.stdin.buffer.read())"
    printed = subprocess.run(
        [sys.executable, "-c", program],
        input=hit(stage, "e1", ua=agent),
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=True,
        timeout=LONGEST,
    )
    assert tracker.ingest(stage.database, printed.stderr.splitlines()) == (1, 0, [])
    assert events_of(stage.database) == [("e1", NOW, 1, agent)]


# -- Lines that are no hits, and odd ones that are


def odd(stage: Stage, text: str) -> bytes:
    """A line of JSON with this text behind its last field."""
    return hit(stage, "odd")[:-2] + text.encode() + b"}\n"


BAD_LINES: dict[str, Callable[[Stage], bytes]] = {
    "words": lambda stage: b"this is no JSON\n",
    "half an object": lambda stage: hit(stage, "odd")[:70] + b"\n",
    "two objects": lambda stage: hit(stage, "odd")[:-1] + hit(stage, "odd"),
    "bytes that are no UTF-8": lambda stage: b"\xff\xfe\x00\x80\n",
    "a byte order mark": lambda stage: b"\xef\xbb\xbf" + hit(stage, "odd"),
    "NUL bytes, as a crash leaves them": lambda stage: b"\0" * 5_000 + b"\n",
    "a megabyte": lambda stage: hit(stage, "odd", purpose="x" * 1_000_000),
    "five megabytes, more than one read": lambda stage: hit(stage, "odd", purpose="x" * 5_000_000),
    "an array": lambda stage: b"[]\n",
    "a number": lambda stage: b"1\n",
    "null": lambda stage: b"null\n",
    "an empty object": lambda stage: b"{}\n",
    "NaN for a time": lambda stage: hit(stage, "odd", t=float("nan")),
    "no end for a time": lambda stage: hit(stage, "odd", t=float("inf")),
    "true for a time": lambda stage: hit(stage, "odd", t=True),
    "a list for a time": lambda stage: hit(stage, "odd", t=[1]),
    "words for a time": lambda stage: hit(stage, "odd", t="noon"),
    "milliseconds for a time": lambda stage: hit(stage, "odd", t=NOW),
    "a time before there was mail": lambda stage: hit(stage, "odd", t=-1),
    "a time of 400 digits": lambda stage: hit(stage, "odd", t=10**400),
    "a time of 10,000 digits": lambda stage: hit(stage, "odd", t="9" * 10_000).replace(b'"999', b"999", 1),
    "a number for a URI": lambda stage: hit(stage, "odd", uri=7),
    "null for a user agent": lambda stage: hit(stage, "odd", ua=None),
    "an object for an id": lambda stage: hit(stage, "odd", id={}),
    "a list for a host": lambda stage: hit(stage, "odd", host=["a"]),
    "deep nesting": lambda stage: b"[" * 60_000 + b"\n",
    "deep nesting in an unknown field": lambda stage: odd(stage, ',"more":' + "[" * 25_000 + "]" * 25_000),
    "the URI of a dashboard": lambda stage: hit(stage, "odd", uri=f"/{stage.acme.id}/dashboard"),
    "an empty URI": lambda stage: hit(stage, "odd", uri=""),
    "a click without a target that was redirected": lambda stage: click(
        stage, "odd", uri=f"/{stage.acme.mail_id}/click/odd"
    ),
    "a hidden link without a target": lambda stage: click(
        stage, "odd", uri=f"/{stage.acme.mail_id}/click/odd", answer="hidden"
    ),
}


@pytest.mark.parametrize("make", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_line_that_is_no_hit_is_put_aside_and_its_neighbours_are_counted(
    stage: Stage, make: Callable[[Stage], bytes]
) -> None:
    before, bad, after = hit(stage, "before"), make(stage), hit(stage, "after")
    name = segment(stage, before, bad, after).name
    report = tracker.drain(stage.database)
    assert (report.hits, report.rejected, report.troubles) == (2, 1, [])
    assert segments(stage.folder) == []
    kept = stage.spool / "rejected" / f"{name}-{len(before):010d}"
    assert list((stage.spool / "rejected").iterdir()) == [kept]
    assert kept.read_bytes() == bad[:-1][: tracker.MAX_READ_LINE] + b"\n"
    assert [key for key, *_ in events_of(stage.database)] == ["after", "before"]
    assert stage.check() == []
    health = stage.web.get("/health").json
    assert (health["status"], health["rejected_lines"]) == ("degraded", 1)


ODD_LINES: dict[str, Callable[[Stage], bytes]] = {
    "unknown fields": lambda stage: odd(stage, ',"more":{"a":[1,2.5e300,null,1e999,NaN]}'),
    "a field that stands twice": lambda stage: odd(stage, ',"method":"HEAD","method":"GET"'),
    "a carriage return": lambda stage: hit(stage, "odd")[:-1] + b"\r\n",
    "empty lines around it": lambda stage: b"\n \n" + hit(stage, "odd") + b"\n",
    "a time in quotes, as nginx writes it": lambda stage: hit(stage, "odd", t=f"{NOW / 1000:.3f}"),
    "an absolute URI": lambda stage: hit(
        stage, "odd", uri=f"http://track.example.com/{stage.acme.mail_id}/pixel/odd.gif"
    ),
    "a long user agent": lambda stage: hit(stage, "odd", ua="x" * 20_000),
    "a long address": lambda stage: hit(stage, "odd", ip="1" * 20_000),
    "NUL in a user agent": lambda stage: hit(stage, "odd", ua="a\0b"),
    "half a character in a user agent": lambda stage: odd(stage, ',"ua":"a\\ud800b"'),
    "half a character in its id": lambda stage: odd(stage, ',"id":"a\\udfffb"'),
    "bytes that are no UTF-8, as nginx copies them": lambda stage: hit(stage, "odd", ua="Caf?").replace(b"?", b"\xe9"),
    "NUL in a target": lambda stage: click(stage, "odd", "https://acme.com/%00"),
    "no bytes of a target": lambda stage: click(stage, "odd", ""),
    "a target of 8,000 characters": lambda stage: click(stage, "odd", "https://acme.com/" + "x" * 8_000),
    "a target that is no UTF-8": lambda stage: click(stage, "odd", "https%3A//acme.com/%ff%fe"),
    "reasons that nobody knows": lambda stage: hit(stage, "odd", why="because"),
    "a naming page for an open": lambda stage: hit(stage, "odd", why="suspended"),
    "no method, host, address and user agent": lambda stage: hit(stage, "odd", method="", host="", ip="", ua=""),
    "no id": lambda stage: hit(stage, "odd", id=""),
}


@pytest.mark.parametrize("make", ODD_LINES.values(), ids=ODD_LINES.keys())
def test_an_odd_line_is_counted_as_the_hit_that_it_is(stage: Stage, make: Callable[[Stage], bytes]) -> None:
    segment(stage, hit(stage, "before"), make(stage), hit(stage, "after"))
    report = tracker.drain(stage.database)
    assert (report.hits, report.rejected, report.troubles) == (3, 0, [])
    assert [key for key, *_ in events_of(stage.database)] == ["after", "before", "odd"]
    assert stage.check() == []


def test_bytes_that_are_no_utf8_can_still_be_read_in_the_events(stage: Stage) -> None:
    segment(stage, hit(stage, "e1", ua="Caf? bar").replace(b"?", b"\xe9"))
    tracker.drain(stage.database)
    assert events_of(stage.database) == [("e1", NOW, 1, "Caf\\xe9 bar")]


@pytest.mark.parametrize(
    ("fields", "reason", "tenant"),
    [
        ({"uri": "/nobody00/pixel/e1.gif"}, "unknown-tenant", False),
        ({"uri": "/{mail_id}/pixel/a%20b.gif"}, "bad-key", True),
        ({"uri": "/{mail_id}/pixel/%00.gif"}, "bad-key", True),
        ({"uri": "/{mail_id}/pixel/...gif"}, "bad-key", True),
        ({"uri": "/{mail_id}/pixel/" + "x" * 9_000 + ".gif"}, "bad-key", True),
        ({"uri": "/{mail_id}/click/e1?url=https://acme.com", "answer": "404"}, "not-redirected", True),
        ({"uri": "/{mail_id}/click/e1", "answer": "400"}, "not-redirected", True),
        ({"uri": "/{id}/pixel/e1.gif"}, "dashboard-id", True),
    ],
    ids=[
        "tenant",
        "key with a space",
        "key with NUL",
        "two dots",
        "long key",
        "not found",
        "no target",
        "dashboard id",
    ],
)
def test_a_hit_that_can_become_no_event_is_counted_by_its_reason(
    stage: Stage, fields: dict[str, Any], reason: str, tenant: bool
) -> None:
    ids = {"mail_id": stage.acme.mail_id, "id": stage.acme.id}
    segment(stage, hit(stage, "e1", **{**fields, "uri": fields["uri"].format(**ids)}))
    report = tracker.drain(stage.database)
    assert (report.hits, report.rejected) == (1, 0)
    assert stage.rows("select tenant, reason, hits from dropped") == [(stage.acme.number if tenant else 0, reason, 1)]
    assert stage.rows("select * from events") == []
    assert stage.check() == []


@pytest.mark.parametrize("live", [True, False], ids=["live", "finished"])
def test_lines_that_lie_across_two_reads_are_read_whole_in_one_drain(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, live: bool
) -> None:
    monkeypatch.setattr(
        tracker, "BYTES_A_HIT", 1
    )  # so that a read is of two of the longest lines, a third of this segment
    lines = [hit(stage, f"e{n % 10}", NOW + n, purpose="x" * (n * 97 % 800)) for n in range(500)]
    lines[250:250] = [hit(stage, "odd", purpose="x" * 200_000), b"short\n", hit(stage, "odd", purpose="x" * 65_400)]
    path = segment(stage, *lines)
    with path.open("rb") as writer:
        if live:
            fcntl.flock(writer, fcntl.LOCK_SH)
        report = tracker.drain(stage.database, batch=300)
    assert (report.hits, report.rejected) == (500, 3)
    assert path.exists() == live
    assert [at for _, at, *_ in sorted(events_of(stage.database), key=lambda row: row[1])] == [*range(NOW, NOW + 500)]
    assert stage.check() == []


def test_a_line_too_long_to_be_a_hit_waits_for_its_end_in_a_live_segment(stage: Stage) -> None:
    spool = tracker.Spool(str(stage.spool))
    assert spool.append(hit(stage, "e1"))
    os.write(spool._fd, b"x" * 100_000)
    tracker.drain(stage.database)
    assert tracker.rejected_lines(str(stage.folder)) == 0
    os.write(spool._fd, b"x\n" + hit(stage, "e2"))
    tracker.drain(stage.database)
    assert tracker.rejected_lines(str(stage.folder)) == 1
    assert [key for key, *_ in events_of(stage.database)] == ["e1", "e2"]
    spool.close()


@pytest.mark.parametrize("what", ["a file", "a link to nowhere", "nothing"])
def test_where_bad_lines_cannot_be_kept_they_are_printed_and_the_drain_goes_on(
    stage: Stage, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rejected = stage.spool / "rejected"
    rejected.rmdir()
    if what == "a file":
        rejected.touch()
    elif what == "a link to nowhere":
        rejected.symlink_to("nowhere")
    name = segment(stage, hit(stage, "e1"), b"no hit\n", hit(stage, "e2")).name
    report = tracker.drain(stage.database)
    assert (report.hits, report.rejected, report.troubles) == (2, 1, [])
    assert segments(stage.folder) == []
    printed = capsys.readouterr().err
    assert printed.startswith(f"rejected {name}-")
    assert "no hit" in printed
    assert [key for key, *_ in events_of(stage.database)] == ["e1", "e2"]
    assert stage.check() == []


# -- Foreign things in the spool


def test_what_is_no_segment_is_left_alone_and_keeps_nobody_from_counting(stage: Stage, tmp_path: Path) -> None:
    spool, early = stage.spool, "0000000000000-1-{:08x}.jsonl"  # before all segments
    line = hit(stage, "foreign")
    real = segment(stage, hit(stage, "e1"), at=NOW)
    outside = tmp_path / "outside.jsonl"
    outside.write_bytes(line)
    (spool / early.format(1)).mkdir()
    (spool / early.format(2)).symlink_to(outside)
    (spool / early.format(3)).symlink_to(real)
    (spool / early.format(4)).symlink_to("nowhere")
    (spool / early.format(5)).symlink_to(early.format(5))
    (spool / early.format(6)).symlink_to("rejected")
    os.mkfifo(spool / early.format(7))
    for name in (
        ".hidden.jsonl",
        f".{early.format(8)}",
        "notes.txt",
        early.format(9).replace(".jsonl", ".jsonl.gz"),
        early.format(10) + "~",
        early.format(11).upper(),
        early.format(12) + "\n",
        early.format(13)[1:],
        "0000000000000-1-x.jsonl",
        "-rf",
        "caf\udce9.jsonl",
    ):
        (spool / name).write_bytes(line)
    (spool / "folder").mkdir()
    (spool / "folder" / early.format(14)).write_bytes(line)
    present = {path.name for path in spool.iterdir()} - {real.name}
    segment(stage, hit(stage, "e2"), at=NOW + 1)

    def drain() -> None:  # in a child, since a drain that opens a FIFO and waits for its writer would wait for ever
        report = tracker.drain(tracker.Database(stage.database.path))
        assert (report.hits, report.rejected, report.troubles) == (2, 0, [])

    assert ended(forked(drain)) == 0
    assert {path.name for path in spool.iterdir()} == present
    assert outside.read_bytes() == line
    assert [key for key, *_ in events_of(stage.database)] == ["e1", "e2"]
    assert stage.check() == []
    tracker.tidy_spool(stage.database)
    health = stage.web.get("/health").json
    assert (health["status"], health["waiting_hits"]) == ("ok", 0)


def test_a_socket_among_the_segments_keeps_nobody_from_counting(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stage.spool)  # a socket's path may have hardly more than a hundred characters
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("0000000000000-1-00000001.jsonl")
        segment(stage, hit(stage, "e1"))
        assert tracker.drain(stage.database).hits == 1


def test_a_segment_that_cannot_be_read_is_named_and_the_others_are_drained() -> None:
    # Root may read everything, so this needs another user, and a folder which that one can come into.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        stage = make_stage(Path(folder))
        unreadable = segment(stage, hit(stage, "e1"), at=NOW)
        segment(stage, hit(stage, "e2"), at=NOW + 1)
        unreadable.chmod(0)
        stage.app.close()
        nobody = 65534

        def drain() -> None:
            if os.geteuid() == 0:
                os.setgid(nobody)
                os.setuid(nobody)
            report = tracker.drain(tracker.Database(stage.database.path))
            assert (report.hits, report.troubles) == (1, [f"segment {unreadable.name}: Permission denied"])

        if os.geteuid() == 0:
            os.chmod(folder, 0o755)
            for path in (stage.folder, *stage.folder.rglob("*")):
                os.chown(path, nobody, nobody)
        assert ended(forked(drain)) == 0
        unreadable.chmod(0o640)
        assert tracker.drain(stage.database).hits == 1
        assert [key for key, *_ in events_of(stage.database)] == ["e1", "e2"]
        assert stage.check() == []
        stage.app.close()


# -- A database that is gone, or another


def lose(stage: Stage, how: str, kept: Path) -> None:
    """Take the database away while the app runs, and put something else in its place, or nothing."""
    path = Path(stage.database.path)
    copy = stage.folder / "copy.db"
    if how == "by an older copy":
        with stage.database.reading() as connection, contextlib.closing(sqlite3.connect(copy)) as target:
            connection.backup(target)
        stage.pixel("e2")
        stage.drain()
    elif how == "by another":
        tracker._build_database(str(copy), tracker.resource("schema.sql").decode())
    path.rename(kept)
    if how != "by nothing":
        copy.rename(path)


@pytest.mark.parametrize("how", ["by nothing", "by another", "by an older copy"])
def test_while_the_database_is_replaced_hits_are_recorded_and_when_it_is_back_each_is_counted_once(
    stage: Stage, tmp_path: Path, how: str
) -> None:
    stage.pixel("e1")
    stage.web.get(f"/{stage.acme.id}/dashboard")
    lose(stage, how, tmp_path / "kept.db")
    before = sorted(path.name for path in stage.folder.iterdir())

    assert stage.pixel("e3", status=200).headers["X-Tracker"] == "recorded"
    signed = tracker.click_path(stage.app.secrets[0], stage.acme.mail_id, "e3", "https://acme.com/")
    for uri in (signed, f"/{stage.acme.mail_id}/click/e3?url=https://acme.com/"):
        assert stage.web.get(uri, headers={"User-Agent": CHROME}, status=302).location == "https://acme.com/"
    sentence = "The database can't be read just now. Hits are recorded all the same, and counted later."
    page = stage.web.get(f"/{stage.acme.id}/dashboard", status=503).text
    assert sentence.replace("'", "&#x27;") in page or sentence in page
    assert stage.web.get(f"/{stage.acme.id}/stats.json", status=503).json == {"error": sentence}
    assert stage.web.post_json(f"/{stage.acme.id}/emails", {"key": "k"}, status=503).json == {"error": sentence}
    assert stage.web.get("/health").json["status"] == "degraded"
    with pytest.raises(tracker.StoreError):
        tracker.drain(stage.database)
    if how == "by nothing":
        with pytest.raises(tracker.StoreError, match="there was one: put it back, or restore it from a backup"):
            tracker.create_database(stage.settings.database, tracker.resource("schema.sql").decode())
        fresh = tracker.App(stage.settings)
        assert webtest.TestApp(tracker.wsgi(fresh)).get(f"/{stage.acme.mail_id}/pixel/e4.gif").status_int == 200
        fresh.close()
    assert sorted(path.name for path in stage.folder.iterdir()) == before
    stage.app.close()

    (tmp_path / "kept.db").rename(stage.database.path)
    app = tracker.App(stage.settings)
    tracker.drain(app.database)
    keys = Counter(key for key, *_ in events_of(app.database))
    assert keys == {
        "e1": 1,
        "e3": 3,
        **({"e2": 1} if how == "by an older copy" else {"e4": 1} if how == "by nothing" else {}),
    }
    assert faults_of(app.database) == []
    assert segments(stage.folder) == []
    app.close()


def test_a_database_and_the_spool_of_another_are_refused(stage: Stage, tmp_path: Path) -> None:
    other = make_stage(tmp_path / "other")
    segment(stage, hit(stage, "e1"))
    instance = stage.spool / "instance"
    own = instance.read_text()
    instance.write_text((other.spool / "instance").read_text())
    for ask in (lambda: tracker.drain(stage.database), lambda: events_of(stage.database)):
        with pytest.raises(tracker.StoreError, match="do not belong together"):
            ask()
    assert stage.pixel("e2").headers["X-Tracker"] == "recorded"
    instance.unlink()
    with pytest.raises(tracker.StoreError, match="has no spool"):
        tracker.drain(stage.database)
    instance.write_text(own)
    stage.drain()
    assert [key for key, *_ in events_of(stage.database)] == ["e1", "e2"]
    other.app.close()


def test_a_key_file_that_differs_from_the_database_is_refused_with_the_way_to_repair_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key_file = stage.folder / "secret.key"
    own = key_file.read_text()
    key_file.write_text("0123456789abcdef" * 4 + "\n")
    with pytest.raises(tracker.StoreError, match=re.escape(f"if the database is right, move {key_file} away")):
        tracker.create_database(stage.settings.database, tracker.resource("schema.sql").decode())
    monkeypatch.setenv("DATABASE_URL", f"sqlite:{stage.settings.database}")
    monkeypatch.setenv("BIND", "127.0.0.1:1")  # no other server may be disturbed, should it start after all
    assert tracker.main(["--env", os.devnull, "serve"]) == 1
    assert f"move {key_file} away" in capsys.readouterr().err
    key_file.unlink()
    tracker.create_database(stage.settings.database, tracker.resource("schema.sql").decode()).close()
    assert key_file.read_text() == own
    assert key_file.stat().st_mode & 0o777 == 0o600


def test_a_database_whose_key_is_nowhere_is_refused(stage: Stage) -> None:
    with stage.database.transaction() as connection:
        connection.execute("delete from secrets where name = 'link'")
    (stage.folder / "secret.key").unlink()
    with pytest.raises(tracker.StoreError, match="restore either from a backup, or give it as SECRET_KEY"):
        tracker.link_secrets(stage.settings, stage.database)


# -- Positions


@pytest.mark.parametrize("live", [True, False], ids=["live", "finished"])
def test_a_position_beyond_the_end_of_its_segment_is_reported_and_goes_on_at_the_end(stage: Stage, live: bool) -> None:
    spool = tracker.Spool(str(stage.spool))
    assert spool.append(hit(stage, "e1"))
    [name] = segments(stage.folder)
    with stage.database.transaction() as connection:
        tracker.set_position(connection, name, 1_000_000, NOW)
    if not live:
        spool.close()
    [trouble] = tracker.drain(stage.database).troubles
    assert re.fullmatch(f"segment {name}: drained to 1000000 but only [0-9]+ bytes long; going on at its end", trouble)
    assert segments(stage.folder) == ([name] if live else [])
    if live:
        assert spool.append(hit(stage, "e2"))
        assert tracker.drain(stage.database).troubles == []
        assert [key for key, *_ in events_of(stage.database)] == ["e2"]
    spool.close()


def test_the_position_of_a_segment_that_is_gone_is_forgotten_a_day_later_and_that_of_one_that_is_there_never(
    stage: Stage,
) -> None:
    spool = tracker.Spool(str(stage.spool))
    assert spool.append(hit(stage, "e1"))
    [live] = segments(stage.folder)
    gone = segment(stage, hit(stage, "e2"), at=NOW + 1).name
    tracker.drain(stage.database)
    tracker.tidy_spool(stage.database)
    assert {name for (name,) in stage.rows("select segment from positions")} == {live, gone}
    with stage.database.transaction() as connection:
        connection.execute("update positions set updated_at = updated_at - 86400000 - 1")
    tracker.tidy_spool(stage.database)
    assert stage.rows("select segment from positions") == [(live,)]
    spool.close()
    tracker.drain(stage.database)
    assert [key for key, *_ in events_of(stage.database)] == ["e1", "e2"]


# -- One writer at a time


@contextlib.contextmanager
def elsewhere(hold: Callable[[], object]) -> Iterator[None]:
    """Another process holds what `hold` returns, until the end of the block."""
    ready, tell = os.pipe()
    wait, release = os.pipe()

    def work() -> None:
        held = hold()
        os.write(tell, b".")
        os.read(wait, 1)
        del held

    pid = forked(work)
    os.close(tell)
    os.close(wait)
    try:
        assert os.read(ready, 1) == b"."
        yield
    finally:
        os.write(release, b".")
        os.close(release)
        os.close(ready)
        assert ended(pid) == 0


def hold_write_lock(stage: Stage) -> object:
    """As another drain does."""
    fd = os.open(stage.folder / "write.lock", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def hold_database(stage: Stage, how: str) -> object:
    """As somebody at a shell may."""
    connection = sqlite3.connect(stage.database.path, isolation_level=None)
    connection.execute(f"begin {how}")
    return connection


HOLDERS: dict[str, Callable[[Stage], object]] = {
    "write.lock": hold_write_lock,
    "begin immediate": lambda stage: hold_database(stage, "immediate"),
    "begin exclusive": lambda stage: hold_database(stage, "exclusive"),
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS.keys())
def test_while_another_process_writes_hits_are_recorded_and_numbers_say_that_some_still_wait(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, hold: Callable[[Stage], object]
) -> None:
    monkeypatch.setattr(tracker.drain_for_reading, "__defaults__", (0.1,))  # how long a page waits for the drain
    stage.pixel("e1")
    stage.drain()
    with elsewhere(lambda: hold(stage)):
        assert stage.pixel("e2").headers["X-Tracker"] == "recorded"
        with pytest.raises(tracker.Busy):
            tracker.drain(stage.database, wait=False)
        with pytest.raises(tracker.Busy), stage.database.transaction(wait=False):
            pass
        assert "still waiting" in stage.web.get(f"/{stage.acme.id}/dashboard", status=200).text
        stats = stage.web.get(f"/{stage.acme.id}/stats.json?range=all", status=200).json
        assert stats["waiting_hits"] >= 1
        assert stats["activity"]["opens"]["hits"]["person"] == 1
        assert stage.web.get("/health").json["status"] == "ok"
    assert "still waiting" not in stage.web.get(f"/{stage.acme.id}/dashboard", status=200).text
    stats = stage.web.get(f"/{stage.acme.id}/stats.json?range=all").json
    assert (stats["waiting_hits"], stats["activity"]["opens"]["hits"]["person"]) == (0, 2)
    assert stage.check() == []


def test_a_writer_that_waits_writes_when_the_other_has_ended(stage: Stage) -> None:
    def register() -> None:
        database = tracker.Database(stage.database.path)
        with database.transaction() as connection:
            tracker.register_emails(connection, stage.acme.number, [tracker.Registration("e1")], NOW)
        database.close()

    with elsewhere(lambda: hold_write_lock(stage)):
        pid = forked(register)
        assert stage.rows("select key from emails") == []
    assert ended(pid) == 0
    assert stage.rows("select key from emails") == [("e1",)]
    assert stage.check() == []


def test_a_drain_that_runs_out_of_time_says_so_and_the_next_goes_on(stage: Stage) -> None:
    segment(stage, *[hit(stage, f"e{n}") for n in range(5)])
    with pytest.raises(tracker.Busy, match="in time"):
        tracker.drain(stage.database, until=0.0)
    assert not tracker.drain_for_reading(stage.database, seconds=0.0)
    assert tracker.drain_for_reading(stage.database, seconds=30.0)
    assert [key for key, *_ in events_of(stage.database)] == [f"e{n}" for n in range(5)]


def test_a_line_that_breaks_the_program_is_put_aside_and_holds_up_no_other(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows such a line; this one stands for it."""
    judge = tracker.judge

    def broken(hits: list[tracker.Hit], *about: Any, **more: Any) -> list[tracker.Judgement]:
        if any(each.agent == "the unforeseen" for each in hits):
            raise TypeError("nobody thought of this")
        return judge(hits, *about, **more)

    monkeypatch.setattr(tracker, "judge", broken)
    lines = [hit(stage, f"e{n}", NOW + n) for n in range(7)]
    lines[3] = hit(stage, "e3", ua="the unforeseen")
    segment(stage, *lines)
    report = stage.drain()
    assert (report.hits, report.rejected) == (6, 1)
    assert segments(stage.folder) == []
    (kept,) = (stage.spool / "rejected").iterdir()
    assert kept.read_bytes() == lines[3]
    assert stage.check() == []
