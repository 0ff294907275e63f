"""The spool under faults: whatever dies, fills up or is deleted, each hit is counted once, and none in silence."""

from __future__ import annotations

import ast
import contextlib
import errno
import fcntl
import gc
import io
import json
import linecache
import os
import random
import re
import signal
import socket
import sqlite3
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from conftest import (
    CHROME,
    NOW,
    ON_SQLITE,
    Stage,
    a_third,
    another_database,
    click,
    faults_of,
    hit,
    segment,
    small_disk,
)

import tracker

BOTH_ENGINES = True
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


kill_me = partial(signal.raise_signal, signal.SIGKILL)  # nothing can be prepared for it


def fail(error: type[Exception]) -> None:
    """Raise an error, in the words of a disk."""
    raise error("disk I/O error")


DAY = 86_400_000
Place = tuple[str, int]  # a function of tracker.py and a line in it


class Steps:
    """Notes each line of tracker.py before it runs, and does something before one of them, or the next that is not spared."""

    def __init__(self, at: int = -1, do: Callable[[], object] = kill_me, spared: Collection[int] = ()) -> None:
        self.seen: list[Place] = []
        self._at = at
        self._do = do
        self._spared = spared
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
            if 0 <= self._at < len(self.seen) and frame.f_lineno not in self._spared:
                self._at = -1
                self._do()
        return self._line


# Where the database and the spool change. Elsewhere only memory does, which dies with its process.
VITAL = {
    *(
        "take_lock",
        "write_lock",
        "transaction",
        "reading",
        "_connect",
        "_disconnect",
        "_check_contents",
        "close",
        "sync_folder",
        "set_position",
    ),
    *("drain", "_keep", "take_turns", "drain_some", "_drain_batch", "record_some", "read_lines", "_keep_rejected"),
}
# In PostgreSQL, where a try takes longer: what begins, is sent and ends there, and what comes before and after.
VITAL_THERE = {"_begun", "_transaction", "transaction", "run", "commit", "set_position", "record_some", "_keep"}


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


Events = list[tuple[str, int, int, str]]


def events_of(database: tracker.Database) -> Events:
    """All events: key, time, type and user agent; `check` must find nothing wrong with them."""
    assert faults_of(database) == []
    with database.reading() as connection:
        return connection.execute("select key, at, type, agent from event_details order by 1, 2, 3, 4").fetchall()


def counted(stage: Stage) -> list[str]:
    """The keys of all events."""
    return [key for key, *_ in events_of(stage.database)]


def drained(stage: Stage) -> tuple[int, int, list[str]]:
    """Drain: how many hits, how many bad lines, and troubles."""
    report = tracker.drain(stage.database)
    return report.hits, report.rejected, report.troubles


def segments(folder: Path) -> list[str]:
    """The segments that are there."""
    return [*tracker.segments_in(str(folder / "spool"))]


@pytest.fixture(autouse=True)
def swept(stage: Stage) -> Iterator[None]:
    """Whatever a test does: with all writers gone, a drain leaves no segment, and `check` finds nothing wrong."""
    yield
    assert stage.drain().troubles == []
    assert (segments(stage.folder), stage.check()) == ([], [])


class Writer:
    """A worker's end of the spool."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.spool = tracker.Spool(str(stage.spool))

    def __call__(self, *keys: str, at: int = NOW) -> None:
        """Opens, which must be recorded."""
        for key in keys:
            assert self.spool.append(hit(self.stage, key, at))


@pytest.fixture
def write(stage: Stage) -> Iterator[Writer]:
    """Writes opens, and lives until the end of the test."""
    made = Writer(stage)
    yield made
    made.spool.close()


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
        places = [(self.finished, finished[:2]), (self.finished, finished), (self.live, live[:1]), (self.live, live)]
        self.rejected = sorted(f"{name}-{len(b''.join(before)):010d}" for name, before in places)
        self.expected: Events = [
            *[("e1", NOW - 6, 1, OUTLOOK), ("e1", NOW + 1, 1, CHROME), ("e1", NOW + 2, 2, CHROME)],
            *[("e1", NOW + 8, 1, CHROME), ("e2", NOW + 3, 1, "curl/8.5.0"), ("e2", NOW + 5, 2, CHROME)],
            ("e4", NOW + 7, 1, CHROME),
        ]
        stage.app.close()  # so that all of the database is in its one file, and nobody has it open
        self._stage, self._home = stage, home / "copy"
        self.folder = self._home / "data"
        for _ in range(2):  # twice: only the second finds the caches filled, as the tries will
            with self.copy():
                self.steps = drain_with_fault(self.database())
        tells, is_shared = telling(self.steps), stage.settings.is_shared
        self.telling = [*a_third(step for step in tells if not is_shared or self.steps[step][0] in VITAL_THERE)]

    def database(self) -> tracker.Database:
        """A new one each time, as another process would have."""
        return tracker.open_database(self._settings)

    @contextlib.contextmanager
    def copy(self) -> Iterator[None]:
        """A copy whose live segment is locked as its writer would; removed afterwards."""
        copied, live = self._stage.copied(self._home), self.folder / "spool" / self.live
        with copied as self._settings, live.open("ab") as self._writer:
            fcntl.flock(self._writer, fcntl.LOCK_SH)
            yield

    def assert_others_can_write(self) -> None:
        with contextlib.closing(self.database()) as other, other.transaction(wait=False):
            pass

    def assert_mended(self, database: tracker.Database, fault: Place) -> None:
        """An ordinary drain, and another once the writer is gone, have each hit counted once and nothing left."""
        assert (tracker.drain(database).troubles, segments(self.folder)) == ([], [self.live]), fault
        assert events_of(database) == self.expected, fault
        self._writer.close()
        assert (tracker.drain(database).troubles, segments(self.folder)) == ([], []), fault
        assert sorted(os.listdir(self.folder / "spool" / "rejected")) == self.rejected, fault
        assert events_of(database) == self.expected, fault
        with database.reading() as connection:
            dropped = connection.execute("select tenant, reason, hits from dropped").fetchall()
        database.close()
        assert dropped == [(0, "unknown-tenant", 1)], fault


def drain_with_fault(
    database: tracker.Database, at: int = -1, do: Callable[[], object] = kill_me, spared: Collection[int] = ()
) -> list[Place]:
    """Drain two hits a transaction, so that a fault can fall between transactions; returns the steps it took.

    The clock goes on when it is looked at, so that turns are the same each time.
    """
    with pytest.MonkeyPatch.context() as patched, Steps(at, do, spared) as steps:
        patched.setattr(time, "monotonic", partial(next, count(0.0, 0.001)))
        tracker.drain(database, batch=2)
    database.close()
    return steps.seen


def test_a_drain_killed_between_any_two_of_its_steps_counts_each_hit_once(stage: Stage, memory: Path) -> None:
    wreck = Wreck(stage, memory)
    for step in [step for step in wreck.telling if wreck.steps[step][0] in VITAL or step % 20 == 0]:
        with wreck.copy():
            assert ended(forked(partial(drain_with_fault, wreck.database(), step))) == -signal.SIGKILL
            wreck.assert_mended(wreck.database(), wreck.steps[step])


# A fault leaves files to the collector of garbage that nobody would leave open otherwise.
@pytest.mark.filterwarnings(
    "ignore:unclosed|connection:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_a_drain_that_fails_between_any_two_of_its_steps_counts_each_hit_once(stage: Stage, memory: Path) -> None:
    wreck = Wreck(stage, memory)
    mending = mending_lines()
    errors = (MemoryError, OSError, sqlite3.OperationalError)
    for number, step in enumerate(wreck.telling):
        if wreck.steps[step][1] in mending:
            continue
        error = MemoryError if wreck.steps[step][0] == "_keep_rejected" else errors[number % len(errors)]
        with wreck.copy():
            database = wreck.database()
            with contextlib.suppress(*errors, tracker.StoreError):
                drain_with_fault(database, step, partial(fail, error), mending)  # steps differ where others ran before
            # No lock may be left behind, for another process; and no open transaction, for this one, which goes on.
            wreck.assert_others_can_write()
            wreck.assert_mended(database, wreck.steps[step])
    gc.collect()  # here, where it may find something


# -- A writer that dies


def write_with_fault(
    stage: Stage, name: str, at: int, do: Callable[[], object], tell: Callable[[str], object]
) -> list[Place]:
    """Write three hits, and tell which were recorded; returns the steps it took."""
    spool = tracker.Spool(str(stage.spool))
    lines = {f"{name}-{n}": hit(stage, f"{name}-{n}") for n in range(3)}
    with Steps(at, do) as steps:
        for key, line in lines.items():
            if spool.append(line):
                tell(key)
    spool.close()
    return steps.seen


@pytest.mark.sqlite
def test_a_writer_killed_between_any_two_of_its_steps_has_answered_no_hit_that_is_not_counted(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "SEGMENT_BYTES", 1)  # a new segment for each hit, so that there are three births
    told = stage.folder / "told"

    def tell(key: str) -> None:
        with told.open("a") as file:
            file.write(f"{key} ")

    steps = write_with_fault(stage, "whole", -1, kill_me, tell)
    for step in range(len(steps)):
        assert ended(forked(partial(write_with_fault, stage, f"step{step}", step, kill_me, tell))) == -signal.SIGKILL
        tracker.drain(stage.database)
    answered, keys = told.read_text().split(), counted(stage)
    assert len(set(answered)) == len(answered) and len(set(keys)) == len(keys)
    assert set(answered) <= set(keys)
    assert len(keys) - len(answered) <= len(steps)  # at most one hit of each writer was written and not answered


@pytest.mark.sqlite
def test_a_segment_whose_writer_died_before_its_birth_is_left_alone_for_a_day_and_then_removed(stage: Stage) -> None:
    folder, young, old = (stage.spool / f".new-{n * 16}" for n in "0af")
    folder.mkdir()  # tidying goes on past what it can't remove
    for path in (young, old):
        path.write_bytes(hit(stage, "e1"))
    day_ago = time.time() - 86_400 - 60
    for path in (folder, old):
        os.utime(path, (day_ago, day_ago))
    assert stage.drain().hits == 0
    tracker.tidy_spool(stage.database, 3, 2000)
    assert (young.exists(), old.exists()) == (True, False)


# -- Many at once


def drained_elsewhere(stage: Stage) -> None:
    """What another process that drains does meanwhile, unless the database is taken."""

    def drain() -> None:
        with contextlib.suppress(tracker.Busy):
            tracker.drain(stage.another(), wait=False)

    assert ended(forked(drain)) == 0


@pytest.mark.sqlite
def test_a_drain_between_any_two_steps_of_a_writer_loses_no_hit_of_it(stage: Stage) -> None:
    """Most of all the drain that finds a segment without its lock, and takes its writer for dead."""
    answered: list[str] = []
    meanwhile = partial(drained_elsewhere, stage)
    steps = write_with_fault(stage, "whole", -1, meanwhile, answered.append)
    for step in range(len(steps)):
        write_with_fault(stage, f"step{step}", step, meanwhile, answered.append)
    stage.drain()
    assert len(answered) == 3 * (1 + len(steps))
    assert counted(stage) == sorted(answered)


@pytest.mark.parametrize(
    "meanwhile", [*map(ON_SQLITE, ("a hit is written", "the last hit is written", "another drains")), "the last drains"]
)
def test_whatever_happens_between_any_two_steps_of_a_drain_each_hit_is_counted_once(
    stage: Stage, meanwhile: str
) -> None:
    def drain(name: str, at: int) -> list[Place]:
        write = Writer(stage)
        write(name)

        def happen() -> None:
            if "hit" in meanwhile:
                write(name, at=NOW + 1)
            if "last" in meanwhile:
                write.spool.close()
            if "drains" in meanwhile:
                drained_elsewhere(stage)

        # Busy: where the other is in the middle of its work, this one is to come again.
        with Steps(at, happen) as steps, contextlib.suppress(tracker.Busy):
            tracker.drain(stage.database, wait=False)
        write.spool.close()
        tracker.drain(stage.database)
        return steps.seen

    drain("warm", -1)
    vital = VITAL_THERE if stage.settings.is_shared else VITAL
    tried = [*a_third(step for step, (function, _) in enumerate(drain("whole", -1)) if function in vital)]
    for step in tried:
        drain(f"step{step}", step)
    hits = 2 if "hit" in meanwhile else 1
    expected = [("warm", NOW), ("whole", NOW), *[(f"step{step}", NOW + n) for step in tried for n in range(hits)]]
    assert [row[:2] for row in events_of(stage.database)] == sorted(expected)


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
        database = stage.another()
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
    assert events_of(stage.database) == sorted((f"e{n % 7}", NOW + n, 1, CHROME) for n in range(600))


@pytest.mark.parametrize("before", ["fcntl.flock(fd, fcntl.LOCK_EX", "with database.reading("])
def test_a_drain_that_waited_while_another_finished_its_segment_counts_nothing_again(
    stage: Stage, write: Writer, before: str
) -> None:
    """The other also forgot the position, since the segment had been idle for longer than positions are kept."""
    write("e1")
    tracker.drain(stage.database)
    with stage.database.transaction() as connection:
        connection.execute("update positions set updated_at = updated_at - ?", (500 * DAY,))
    with Steps() as steps:
        tracker.drain(stage.database)
    wait = next(n for n, (_, line) in enumerate(steps.seen) if before in linecache.getline(tracker.__file__, line))

    def meanwhile() -> None:
        write.spool.close()
        other = stage.another()
        tracker.drain(other)
        tracker.tidy_spool(other, 3, 2000)
        other.close()

    with Steps(wait, meanwhile):
        tracker.drain(stage.database)
    assert counted(stage) == ["e1"]


# -- Live segments and finished ones


def test_half_a_line_waits_in_a_live_segment_and_is_put_aside_in_a_finished_one(stage: Stage, write: Writer) -> None:
    write("e1")
    live = segments(stage.folder)
    line, long = hit(stage, "e2"), hit(stage, "odd", purpose="x" * 100_000)
    whole_but_newline = hit(stage, "e3")[:-1]  # nobody was told that it was recorded
    parts = [b"", line[:50], b"", line[50:], long[:70_000], long[70_000:], whole_but_newline]
    gives = [(1, 0), (0, 0), (0, 0), (1, 0), (0, 0), (0, 1), (0, 0)]
    for part, (hits, rejected) in zip(parts, gives, strict=True):
        os.write(write.spool._fd, part)
        assert drained(stage) == (hits, rejected, [])
        assert segments(stage.folder) == live
    write.spool.close()
    assert drained(stage) == (0, 1, [])
    assert json.loads(max((stage.spool / "rejected").iterdir()).read_bytes())["uri"].endswith("/e3.gif")
    assert counted(stage) == ["e1", "e2"]


@pytest.mark.sqlite
def test_a_segment_is_followed_by_another_at_its_size_and_after_its_time(
    stage: Stage, write: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "SEGMENT_BYTES", 1_000)
    write(*[f"e{n}" for n in range(8)])
    found = tracker.segments_in(str(stage.spool))
    assert len(found) > 1
    assert max(about.st_size for about in found.values()) < 1_000 + len(hit(stage, "e1"))
    monkeypatch.undo()
    write.spool._opened -= tracker.SEGMENT_SECONDS
    write("e8")
    [last] = set(segments(stage.folder)) - set(found)
    assert drained(stage) == (9, 0, [])
    assert segments(stage.folder) == [last]  # only the last still has a writer


@pytest.mark.sqlite
def test_a_child_writes_a_segment_of_its_own_and_leaves_its_parents_alone(stage: Stage, write: Writer) -> None:
    write("parent1")
    [parents] = segments(stage.folder)

    def work() -> None:
        write("child")
        write.spool.close()

    pid = forked(work)
    assert ended(pid) == 0
    [childs] = set(segments(stage.folder)) - {parents}
    assert f"-{pid}-" in childs
    tracker.drain(stage.database)
    assert segments(stage.folder) == [parents]  # still live, though the child closed its copy
    write("parent2")
    tracker.drain(stage.database)
    assert segments(stage.folder) == [parents]
    assert counted(stage) == ["child", "parent1", "parent2"]


@pytest.mark.parametrize("fault", ["its segment is deleted", "its write is cut short"])
def test_a_hit_that_is_lost_on_the_way_is_printed_instead_and_the_next_opens_another_segment(
    stage: Stage, fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracker, "RETRY_SECONDS", 0.0)
    notes = [stage.pixel("e1").headers["X-Tracker"]]
    assert drained(stage) == (1, 0, [])
    [live] = segments(stage.folder)
    with monkeypatch.context() as patched:
        if "deleted" in fault:
            (stage.spool / live).unlink()
        else:
            write = os.write
            patched.setattr(os, "write", lambda fd, line: write(fd, line[:50]))
        notes.append(stage.pixel("e2").headers["X-Tracker"])
    notes.append(stage.pixel("e3").headers["X-Tracker"])
    assert notes == ["recorded", "unspooled", "recorded"]
    log = capsys.readouterr().err.encode().splitlines()
    assert [tracker.ingest(stage.database, log) for _ in range(2)] == [({"counted": 1}, []), ({"known": 1}, [])]
    assert drained(stage) == (1, "short" in fault, [])
    assert counted(stage) == ["e1", "e2", "e3"]


# -- A disk that is full


@pytest.mark.sqlite
def test_on_a_full_disk_hits_are_answered_and_printed_and_each_is_counted_once_in_the_end(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracker, "RETRY_SECONDS", 1e9)  # the test says when a second has gone by
    filler = stage.spool / "filler"
    notes: dict[str, str] = {}

    def hits(count: int) -> set[str]:
        fresh = [f"e{len(notes) + n}" for n in range(count)]
        notes.update((key, stage.pixel(key, status=200).headers["X-Tracker"]) for key in fresh)
        return {notes[key] for key in fresh}

    instance = (stage.spool / "instance").read_bytes()
    with small_disk(stage.spool), contextlib.closing(stage.app.spool):
        for name in ("rejected", "kept"):
            (stage.spool / name).mkdir()
        (stage.spool / "instance").write_bytes(instance)
        filler.write_bytes(b"x" * 40_000)
        assert hits(10) == {"recorded"}
        assert hits(190) == {"recorded", "unspooled"}
        for tries in (1, 2, 3):
            assert hits(10) == {"unspooled"}
            assert len(segments(stage.folder)) == tries  # one was tried when a second had gone by, and only then
            stage.app.spool._retry_at = 0.0
        filler.unlink()
        assert hits(10) == {"recorded"}
        log = capsys.readouterr().err.encode().splitlines()
        spooled = Counter(notes.values())["recorded"]
        assert stage.drain().hits == spooled
    assert tracker.ingest(stage.database, log) == ({"counted": len(notes) - spooled}, [])
    assert tracker.ingest(stage.database, log) == ({"known": len(notes) - spooled}, [])
    assert counted(stage) == sorted(notes)


@pytest.mark.sqlite
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_a_printed_hit_can_be_ingested_whatever_the_encoding_of_the_log(
    stage: Stage, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, log = f"{CHROME} Größe → 😀", io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(log, encoding))
    assert not tracker.Spool("/nowhere").append(hit(stage, "e1", ua=agent))
    assert tracker.ingest(stage.database, log.getvalue().splitlines()) == ({"counted": 1}, [])
    assert events_of(stage.database) == [("e1", NOW, 1, agent)]


# -- Lines that are no hits, and odd ones that are


def odd(**fields: Any) -> Callable[[Stage], bytes]:
    """A hit of the email `odd` with these fields; MAIL_ID and ID stand for Acme's."""

    def make(stage: Stage) -> bytes:
        line = hit(stage, "odd", **fields)
        return line.replace(b"MAIL_ID", stage.acme.mail_id.encode()).replace(b"{ID}", stage.acme.id.encode())

    return make


def odd_click(url: str, **fields: Any) -> Callable[[Stage], bytes]:
    """A click on a link with this target, as it stands in the path."""
    return odd(**{"uri": f"/MAIL_ID/click/odd{url}", "answer": "302", **fields})


def text(words: str) -> Callable[[Stage], bytes]:
    """A hit with this JSON behind its last field."""
    return lambda stage: hit(stage, "odd")[:-2] + words.encode() + b"}\n"


BAD_LINES: dict[str, Callable[[Stage], bytes]] = {
    "words": lambda stage: b"this is no JSON\n",
    "half an object": lambda stage: hit(stage, "odd")[:70] + b"\n",
    "two objects": lambda stage: hit(stage, "odd")[:-1] + hit(stage, "odd"),
    "bytes that are no UTF-8": lambda stage: b"\xff\xfe\x00\x80\n",
    "a byte order mark": lambda stage: b"\xef\xbb\xbf" + hit(stage, "odd"),
    "NUL bytes, as a crash leaves them": lambda stage: b"\0" * 5_000 + b"\n",
    "a megabyte": odd(purpose="x" * 1_000_000),
    "five megabytes, more than one read": odd(purpose="x" * 5_000_000),
    "an array": lambda stage: b"[]\n",
    "an empty object": lambda stage: b"{}\n",
    "true for a time": odd(t=True),
    "a list for a time": odd(t=[1]),
    "a time of 10,000 digits": lambda stage: hit(stage, "odd", t="9" * 10_000).replace(b'"999', b"999", 1),
    "a number for a URI": odd(uri=7),
    "null for a user agent": odd(ua=None),
    "an object for an id": odd(id={}),
    "a list for what nobody needs": odd(why=[]),
    "deep nesting": lambda stage: b"[" * 60_000 + b"\n",
    "deep nesting in an unknown field": text(',"more":' + "[" * 25_000 + "]" * 25_000),
    "the URI of a dashboard": odd(uri="/{ID}/dashboard"),
    "an empty URI": odd(uri=""),
    "a click without a target that was redirected": odd_click(""),
    "a hidden link without a target": odd_click("", answer="hidden"),
}


@pytest.mark.sqlite
@pytest.mark.parametrize("make", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_line_that_is_no_hit_is_put_aside_and_its_neighbours_are_counted(
    stage: Stage, make: Callable[[Stage], bytes]
) -> None:
    before, bad, after = hit(stage, "before"), make(stage), hit(stage, "after")
    name = segment(stage, before, bad, after).name
    assert drained(stage) == (2, 1, [])
    kept = stage.spool / "rejected" / f"{name}-{len(before):010d}"
    assert list((stage.spool / "rejected").iterdir()) == [kept]
    assert kept.read_bytes() == bad[:-1][: tracker.MAX_READ_LINE] + b"\n"
    assert counted(stage) == ["after", "before"]
    health = stage.health()
    assert (health["status"], health["rejected_lines"]) == ("degraded", 1)


ODD_LINES: dict[str, Callable[[Stage], bytes]] = {
    "unknown fields": text(',"more":{"a":[1,2.5e300,null,1e999,NaN]}'),
    "a field that stands twice": text(',"method":"HEAD","method":"GET"'),
    "a carriage return": lambda stage: hit(stage, "odd")[:-1] + b"\r\n",
    "empty lines around it": lambda stage: b"\n \n" + hit(stage, "odd") + b"\n",
    "a time in quotes, as nginx writes it": odd(t=f"{NOW / 1000:.3f}"),
    "an absolute URI": odd(uri="http://track.example.com/MAIL_ID/pixel/odd.gif"),
    "a query": odd(uri="/MAIL_ID/pixel/odd.gif?campaign=spring"),
    "an encoded path": odd(uri="/MAIL_ID/pixel/%6fdd.gif"),
    "a long user agent": odd(ua="x" * 20_000),
    "a long address": odd(ip="1" * 20_000),
    "NUL in a user agent": odd(ua="a\0b"),
    "half a character in a user agent": text(',"ua":"a\\ud800b"'),
    "half a character in its id": text(',"id":"a\\udfffb"'),
    "NUL in a target": odd_click("?url=https://acme.com/%00"),
    "no bytes of a target": odd_click("?url="),
    "a target of 8,000 characters": odd_click("?url=https://acme.com/" + "x" * 8_000),
    "a target that is no UTF-8": odd_click("?url=https%3A//acme.com/%ff%fe"),
    "reasons that nobody knows": odd(why="because"),
    "a naming page for an open": odd(why="suspended"),
    "no method, host, address and user agent": odd(method="", host="", ip="", ua=""),
    "no id": odd(id=""),
}


@pytest.mark.parametrize("make", ODD_LINES.values(), ids=ODD_LINES.keys())
def test_an_odd_line_is_counted_as_the_hit_that_it_is(stage: Stage, make: Callable[[Stage], bytes]) -> None:
    segment(stage, hit(stage, "before"), make(stage), hit(stage, "after"))
    assert drained(stage) == (3, 0, [])
    assert counted(stage) in (["after", "before", "odd"], ["after", "before", "odd?campaign=spring"])


@pytest.mark.parametrize(
    "wrong", [float("nan"), float("inf"), -1, 0.5, NOW, 10**400], ids=lambda wrong: str(wrong)[:20]
)
def test_a_hit_of_a_time_that_no_clock_has_counts_now_and_stays_unconfirmed(stage: Stage, wrong: float) -> None:
    segment(stage, hit(stage, "e1", tracker.now_ms()), odd(t=wrong)(stage))
    assert drained(stage) == (2, 0, [])
    sql = "select at, verdict, reason, fixed from event_details where key = 'odd'"
    [(at, *judged)] = stage.rows(sql)
    assert (abs(tracker.now_ms() - at) < 60_000, judged) == (True, ["unconfirmed", "undated", 1])


def test_bytes_that_are_no_utf8_can_still_be_read_in_the_events(stage: Stage) -> None:
    segment(stage, hit(stage, "e1", ua="Caf? bar").replace(b"?", b"\xe9"))
    assert drained(stage) == (1, 0, [])
    assert events_of(stage.database) == [("e1", NOW, 1, "Caf\\xe9 bar")]


@pytest.mark.sqlite
def test_the_path_that_is_read_at_a_glance_is_read_as_all_others_are(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(line: bytes) -> object:
        try:
            return tracker.parse_line(line)
        except tracker.BadInput as error:
            return str(error)

    chance = random.Random(1)
    pieces = [*"/a%?#é \n\0+\\/", "pixel", "click", ".gif", ".GIF", "%2F", "%2e", "&url=x", ".."]
    pieces += ["selftest~", "http://x", "?campaign=b"]
    uris = ["/" + "".join(chance.choices(pieces, k=chance.randrange(1, 8))) for _ in range(3_000)]
    uris += ["/{}{}/pixel/{}{}.gif".format(*chance.choices(pieces, k=4)) for _ in uris]
    assert 100 < sum(1 for uri in uris if tracker._read_pixel_uri(uri)) < 3_000
    lines = [make(stage) for make in (*BAD_LINES.values(), *ODD_LINES.values())]
    lines += [tracker.hit_line({"t": NOW / 1000, "uri": uri}) for uri in uris]
    monkeypatch.setattr(tracker, "now_ms", lambda: NOW)
    at_a_glance = [read(line) for line in lines]
    monkeypatch.setattr(tracker, "_read_pixel_uri", lambda uri: None)
    assert at_a_glance == [read(line) for line in lines]


def test_hits_that_can_become_no_event_are_counted_by_their_reason(stage: Stage) -> None:
    bad_keys = ["a%20b", "%00", "..", "x" * 9_000]
    make = [
        odd(uri="/nobody00/pixel/e1.gif"),
        *(odd(uri=f"/MAIL_ID/pixel/{key}.gif") for key in bad_keys),
        odd_click("?url=https://acme.com", answer="404"),
        odd_click("", answer="400"),
        odd(uri="/{ID}/pixel/e1.gif"),
    ]
    segment(stage, *(each(stage) for each in make))
    assert drained(stage) == (len(make), 0, [])
    acmes = [("bad-key", len(bad_keys)), ("dashboard-id", 1), ("not-redirected", 2)]
    expected = [(0, "unknown-tenant", 1), *((stage.acme.number, *row) for row in acmes)]
    assert stage.rows("select tenant, reason, hits from dropped order by tenant, reason") == expected
    assert counted(stage) == []


@pytest.mark.parametrize("live", [True, False], ids=["live", "finished"])
def test_lines_that_lie_across_two_reads_are_read_whole_in_one_drain(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, live: bool
) -> None:
    monkeypatch.setattr(tracker, "READ_BYTES", 10_000)
    lines = [hit(stage, f"e{n % 10}", NOW + n, purpose="x" * (n * 97 % 800)) for n in range(500)]
    lines[250:250] = [hit(stage, "odd", purpose="x" * 200_000), b"short\n", hit(stage, "odd", purpose="x" * 65_400)]
    path = segment(stage, *lines)
    with path.open("rb") as writer:
        if live:
            fcntl.flock(writer, fcntl.LOCK_SH)
        report = tracker.drain(stage.database, batch=300)
    assert (report.hits, report.rejected) == (500, 3)
    assert path.exists() == live
    assert sorted(at for _, at, *_ in events_of(stage.database)) == [*range(NOW, NOW + 500)]


@pytest.mark.sqlite
@pytest.mark.parametrize(
    "put", [Path.touch, partial(Path.symlink_to, target="nowhere"), str], ids=["file", "link", "no"]
)
def test_where_bad_lines_cannot_be_kept_they_are_printed_and_the_drain_goes_on(
    stage: Stage, put: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    rejected = stage.spool / "rejected"
    rejected.rmdir()
    put(rejected)
    name = segment(stage, hit(stage, "e1"), b"no hit\n", hit(stage, "e2")).name
    assert drained(stage) == (2, 1, [])
    assert re.match(f"rejected {name}-[0-9]+ .*no hit", capsys.readouterr().err)
    assert counted(stage) == ["e1", "e2"]


def watched(monkeypatch: pytest.MonkeyPatch, see: Callable[[list[Any]], object]) -> list[int]:
    """Let somebody see the lines of each transaction; returns how many they were."""
    tried: list[int] = []
    record = tracker.record_lines

    def record_watched(connection: sqlite3.Connection, lines: list[Any], now: int, room: int) -> Any:
        tried.append(len(lines))
        see(lines)
        return record(connection, lines, now, room)

    monkeypatch.setattr(tracker, "record_lines", record_watched)
    return tried


@pytest.mark.parametrize("place", [0, 3, 699], ids=["the first", "one of many", "the last"])
def test_a_line_that_breaks_the_program_is_put_aside_and_holds_up_no_other(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    """Nobody knows such a line; this one stands for it."""

    def see(lines: list[Any]) -> None:
        if any(line.agent == "the unforeseen" for line in lines):
            raise TypeError("nobody thought of this")

    tried = watched(monkeypatch, see)
    lines = [hit(stage, f"e{n % 9}", NOW + n) for n in range(700)]
    lines[place] = hit(stage, "odd", ua="the unforeseen")
    segment(stage, *lines)
    assert drained(stage) == (699, 1, [])
    (kept,) = (stage.spool / "rejected").iterdir()
    assert kept.read_bytes() == lines[place]
    assert "odd" not in counted(stage)
    assert sum(tried) < 5 * len(lines)  # those before it are not tried again and again


@pytest.mark.sqlite
def test_the_newest_segments_have_half_of_the_time_and_the_oldest_has_the_other(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, turns = [0.0], []

    def see(lines: list[Any]) -> None:
        clock[0] += 0.01 * len(lines)
        turns.append((lines[0].key, len(lines)))

    watched(monkeypatch, see)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for n, (key, many) in enumerate({"oldest": 80, "old": 10, "new": 5, "newest": 50}.items()):
        written = segment(stage, *[hit(stage, key, NOW + m) for m in range(many)], at=NOW - n)
        os.utime(written, (n, n))
    assert tracker.drain(stage.database, batch=20, seconds=0.2).hits == 145
    first = [("newest", 2), ("oldest", 2), ("new", 2), ("oldest", 8), ("old", 2), ("newest", 8), ("oldest", 20)]
    assert turns[: len(first)] == first


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("microseconds", "expected"), [(1000, [100, *[200] * 14, 100]), (100, [100, 400, 800, 800, 800, 100])]
)
def test_a_transaction_takes_as_many_lines_as_fit_into_the_time(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, microseconds: int, expected: list[int]
) -> None:
    clock = [0.0]

    def see(lines: list[Any]) -> None:
        clock[0] += microseconds / 1e6 * len(lines)

    tried = watched(monkeypatch, see)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    segment(stage, *[hit(stage, f"e{n % 9}", NOW + n) for n in range(3_000)])
    assert tracker.drain(stage.database, batch=800, seconds=0.2).hits == 3_000
    assert tried == expected


# -- Foreign things in the spool


def test_what_is_no_segment_is_left_alone_and_keeps_nobody_from_counting(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool, early = stage.spool, "0000000000000-1-{:08x}.jsonl"  # before all segments
    line = hit(stage, "foreign")
    real = segment(stage, hit(stage, "e1"), at=NOW)
    outside = tmp_path / "outside.jsonl"
    outside.write_bytes(line)
    for number, target in enumerate([str(outside), str(real), "nowhere", early.format(6), "rejected"], 2):
        (spool / early.format(number)).symlink_to(target)
    os.mkfifo(spool / early.format(7))
    monkeypatch.chdir(spool)  # a socket's path may have hardly more than a hundred characters
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(early.format(8))
    right = early.format(9)
    for name in (
        f".{right}",
        f"{right}.gz",
        f"{right}~",
        right.upper(),
        f"{right}\n",
        right[1:],
        "-rf",
        "caf\udce9.jsonl",
    ):
        (spool / name).write_bytes(line)
    (spool / early.format(1)).mkdir()
    (spool / early.format(1) / right).write_bytes(line)
    present = {path.name for path in spool.iterdir()} - {real.name}
    segment(stage, hit(stage, "e2"), at=NOW + 1)

    def drain() -> None:  # in a child, since a drain that opens a FIFO and waits for its writer would wait for ever
        report = tracker.drain(stage.another())
        assert (report.hits, report.rejected, report.troubles) == (2, 0, [])

    assert ended(forked(drain)) == 0
    assert {path.name for path in spool.iterdir()} == present
    assert outside.read_bytes() == line
    assert counted(stage) == ["e1", "e2"]
    health = stage.health()
    assert (health["status"], health["waiting_hits"]) == ("ok", 0)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (EOFError(), "EOFError()"),
    ],
)
def test_a_segment_that_cannot_be_read_is_named_and_the_others_are_drained(
    error: Exception, told: str, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreadable = segment(stage, hit(stage, "e1"), at=NOW)
    segment(stage, hit(stage, "e2"), at=NOW + 1)
    opened = os.open

    def refusing(path: str, *more: Any) -> int:
        if path == str(unreadable):
            raise error
        return opened(path, *more)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refusing)  # root may read whatever the permission bits say
        assert drained(stage) == (1, 0, [f"segment {unreadable.name}: {told}"])
    assert drained(stage) == (1, 0, [])
    assert counted(stage) == ["e1", "e2"]


def test_while_what_was_said_of_emails_cannot_be_read_it_is_told_how_to_register_others(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    register = partial(stage.web.post_json, f"/{stage.acme.id}/emails")
    register({"key": "e1"}, status=201)
    [told] = (stage.spool / "kept").glob("*-emails.jsonl")
    with stage.database.transaction() as connection:
        connection.execute("delete from positions")  # as in a database that was restored
    opened = os.open

    def refusing(path: str, *more: Any) -> int:
        if path == str(told):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *more)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refusing)  # root may read whatever the permission bits say
        [why] = drained(stage)[2]
        register({"key": "e2"}, status=503)
    assert why.endswith("Permission denied; nothing can be registered until it is read, or moved out of spool/kept")
    told.rename(stage.folder / told.name)
    register({"key": "e2"}, status=201)


@pytest.mark.parametrize("error", [EOFError("ended"), sqlite3.OperationalError("connection lost")])
def test_a_segment_at_which_the_unforeseen_or_the_database_fails_is_no_bad_line_and_stops_no_other(
    error: Exception, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def see(lines: list[Any]) -> None:
        if lines[0].key == "e1":
            raise error

    failing = segment(stage, hit(stage, "e1"), at=NOW)
    segment(stage, hit(stage, "e2"), at=NOW + 1)
    with monkeypatch.context() as patched:
        watched(patched, see)
        hits, rejected, [trouble] = drained(stage)
    assert (hits, rejected) == (1, 0)
    assert failing.name in trouble and str(error) in trouble
    assert drained(stage) == (1, 0, [])
    assert counted(stage) == ["e1", "e2"]


# -- A database that is gone, or another


@pytest.mark.sqlite
@pytest.mark.parametrize("by", ["nothing", "another", "an older copy"])
def test_while_the_database_is_replaced_hits_are_recorded_and_when_it_is_back_each_is_counted_once(
    stage: Stage, by: str
) -> None:
    """What becomes of links and of /health meanwhile is held in test_hits.py."""
    stage.pixel("e1")
    stage.drain()
    path, copy, kept = (stage.folder / name for name in ("tracking.db", "copy.db", "kept.db"))
    if by == "an older copy":
        with stage.database.reading() as connection, contextlib.closing(sqlite3.connect(copy)) as target:
            connection.backup(target)
    elif by == "another":
        another_database(copy)
    stage.pixel("e2")
    stage.drain()
    path.rename(kept)
    if by != "nothing":
        copy.rename(path)
    before = {*stage.folder.iterdir()}

    assert stage.pixel("e3", status=200).headers["X-Tracker"] == "recorded"
    sentence = "The database can't be read just now. Hits are recorded all the same, and counted later."
    page = stage.web.get(f"/{stage.acme.id}/dashboard", status=503).text
    assert sentence.replace("'", "&#x27;") in page or sentence in page
    assert stage.web.get(f"/{stage.acme.id}/stats.json", status=503).json == {"error": sentence}
    refused = stage.web.post_json(f"/{stage.acme.id}/emails", {"key": "k"}, status=503).json
    assert refused == {"error": sentence.replace("read", "written")}
    with pytest.raises(tracker.StoreError):
        tracker.drain(stage.database)
    if by == "nothing":
        with pytest.raises(tracker.StoreError, match="there was one: put it back, or restore it from a backup"):
            tracker.open_database(stage.settings, make=True)
    assert {*stage.folder.iterdir()} == before

    stage.app.close()
    kept.rename(path)
    assert stage.drain().hits == 1
    assert counted(stage) == ["e1", "e2", "e3"]


@pytest.mark.sqlite
def test_a_link_key_that_differs_from_the_databases_or_is_nowhere_is_refused_with_the_way_to_repair_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key_file = stage.folder / "secret.key"
    own = key_file.read_text()
    key_file.write_text("0123456789abcdef" * 4 + "\n")
    monkeypatch.setenv("DATABASE_URL", f"sqlite:{stage.settings.database}")
    monkeypatch.setenv("BIND", "127.0.0.1:1")  # no other server may be disturbed, should it start after all
    assert tracker.main(["--env", os.devnull, "serve"]) == 1
    assert f"if the database is right, move {key_file} away" in capsys.readouterr().err
    key_file.unlink()
    tracker.open_database(stage.settings, make=True).close()
    assert (key_file.read_text(), key_file.stat().st_mode & 0o777) == (own, 0o600)
    key_file.unlink()
    with stage.database.transaction() as connection:
        connection.execute("delete from secrets where name = 'link'")
    with pytest.raises(tracker.StoreError, match="restore either from a backup, or give it as SECRET_KEY"):
        tracker.link_secrets(stage.settings, stage.database)


# -- Positions


@pytest.mark.parametrize("live", [True, False], ids=["live", "finished"])
def test_a_position_beyond_the_end_of_its_segment_is_reported_and_goes_on_at_the_end(
    stage: Stage, write: Writer, live: bool
) -> None:
    write("e1")
    [name] = segments(stage.folder)
    with stage.database.transaction() as connection:
        tracker.set_position(connection, name, 1_000_000, NOW)
    if not live:
        write.spool.close()
    [trouble] = tracker.drain(stage.database).troubles
    assert re.fullmatch(f"segment {name}: drained to 1000000 but only [0-9]+ bytes long; going on at its end", trouble)
    assert segments(stage.folder) == ([name] if live else [])
    write("e2")
    assert drained(stage) == (1, 0, [])
    assert counted(stage) == ["e2"]


def test_the_position_of_a_segment_that_is_gone_is_forgotten_after_400_days_and_that_of_one_that_is_there_never(
    stage: Stage, write: Writer
) -> None:
    """After 1,000 where machines share the database: one may have been away for long."""
    known = 1_000 if stage.settings.is_shared else 400
    write("e1")
    [live] = segments(stage.folder)
    gone = segment(stage, hit(stage, "e2"), at=NOW + 1).name
    tracker.drain(stage.database)
    copy = (stage.spool / "kept" / gone).read_bytes()
    (stage.spool / "kept" / gone).unlink()
    for days, left in ((known - 1, {live, gone}), (2, {live})):
        with stage.database.transaction() as connection:
            connection.execute("update positions set updated_at = updated_at - ?", (days * DAY,))
        tracker.tidy_spool(stage.database, 3, 2000)
        assert {name for (name,) in stage.rows("select segment from positions")} == left
    old = f"{NOW - (known + 100) * DAY:013d}{gone[13:]}"
    (stage.spool / "kept" / old).write_bytes(copy)
    assert drained(stage) == (0, 0, [f"segment kept/{old}: too old to know whether it was counted; move it away"])
    (stage.spool / "kept" / old).unlink()
    assert counted(stage) == ["e1", "e2"]


# -- What is kept


def ages(stage: Stage, days: float) -> None:
    """Let all that is kept be so much older."""
    for path in (stage.spool / "kept").iterdir():
        at = path.stat().st_mtime - days * 86_400
        os.utime(path, (at, at))


def kept(stage: Stage) -> list[str]:
    return sorted(path.name for path in (stage.spool / "kept").iterdir())


def test_a_drained_segment_is_kept_for_three_days_and_not_longer(stage: Stage) -> None:
    name = segment(stage, hit(stage, "e1")).name
    stage.drain()
    assert (kept(stage), segments(stage.folder)) == ([name], [])
    ages(stage, 2.9)
    assert (tracker.tidy_spool(stage.database, 3, 2000), kept(stage)) == ("", [name])
    ages(stage, 0.2)
    assert (tracker.tidy_spool(stage.database, 3, 2000), kept(stage)) == ("", [])


def test_where_there_is_too_little_room_the_oldest_goes_first_and_that_is_told(stage: Stage) -> None:
    names = [segment(stage, hit(stage, f"e{n}"), b" " * 700_000 + b"\n", at=NOW + n).name for n in range(3)]
    stage.drain()
    ages(stage, 1)
    assert "keeps hits for 24 hours only, not 3 days" in tracker.tidy_spool(stage.database, 3, 1)
    assert kept(stage) == names[2:]


def test_what_the_database_does_not_have_whole_is_never_deleted(stage: Stage) -> None:
    name = segment(stage, hit(stage, "e1")).name
    stage.drain()
    with stage.database.transaction() as connection:
        connection.execute("update positions set position = position - 1")
    ages(stage, 100)
    tracker.tidy_spool(stage.database, 3, 1)
    assert kept(stage) == [name]


@pytest.mark.sqlite
def test_nothing_is_deleted_while_a_reader_keeps_the_wal_from_being_moved(stage: Stage) -> None:
    drainer = tracker.Drainer(stage.database)
    drainer.turn()
    name = segment(stage, hit(stage, "e1")).name
    stage.drain()
    ages(stage, 100)
    with contextlib.closing(sqlite3.connect(stage.database.path)) as shell:
        shell.execute("begin")
        shell.execute("select count(*) from events").fetchone()
        segment(stage, hit(stage, "e2"), at=NOW + 1)
        stage.drain()
        drainer._tidy_at = 0.0  # a minute has passed
        drainer.turn()
        assert name in kept(stage)
    drainer.turn()  # and not a minute later
    assert name not in kept(stage)


def test_a_clock_that_leaps_a_year_and_back_deletes_nothing(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker.Drainer, "TIDY_SECONDS", 0.0)
    drainer, true_time = tracker.Drainer(stage.database), time.time
    name = segment(stage, hit(stage, "e1")).name
    for years in (0, 0, 1, 0, 0):
        monkeypatch.setattr(time, "time", lambda years=years: true_time() + years * 365 * 86_400)
        monkeypatch.setattr(tracker, "now_ms", lambda: int(time.time() * 1000))
        drainer.turn()
        assert kept(stage) == [name]


def test_two_segments_of_one_name_are_told_and_neither_is_written_over(stage: Stage) -> None:
    path = segment(stage, hit(stage, "e1"))
    stage.drain()
    line = hit(stage, "e2")
    path.write_bytes(line)
    [fault] = stage.drain().troubles
    assert "another segment of its name is in spool/kept" in fault
    assert (path.read_bytes(), kept(stage)) == (line, [path.name])
    path.unlink()


# -- One writer at a time


@contextlib.contextmanager
def holding(stage: Stage, what: str) -> Iterator[None]:
    """Somebody else has the database: another drain, or a person at a shell who runs this statement."""
    if what == "another":
        with contextlib.closing(stage.another()) as other, other.transaction():
            yield
    else:
        with contextlib.closing(sqlite3.connect(stage.database.path, isolation_level=None)) as connection:
            connection.execute(what)
            yield


@pytest.mark.parametrize("held", ["another", ON_SQLITE("begin immediate"), ON_SQLITE("begin exclusive")])
def test_while_another_writes_hits_are_recorded_and_numbers_say_that_some_still_wait(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, held: str
) -> None:
    monkeypatch.setattr(tracker.drain_for_reading, "__defaults__", (0.1,))  # how long a page waits for the drain

    def waiting_and_opened() -> tuple[int, int]:
        stats = stage.web.get(f"/{stage.acme.id}/stats.json?range=all").json
        return stats["waiting_hits"], stats["activity"]["opens"]["hits"]["person"]

    stage.pixel("e1")
    stage.drain()
    with holding(stage, held):
        assert stage.pixel("e2").headers["X-Tracker"] == "recorded"
        with pytest.raises(tracker.Busy):
            tracker.drain(stage.database, wait=False)
        with pytest.raises(tracker.Busy), stage.database.transaction(wait=False):
            pass
        assert "still waiting" in stage.web.get(f"/{stage.acme.id}/dashboard", status=200).text
        assert waiting_and_opened() == (1, 1)
        assert stage.health()["status"] == "ok"
    assert "still waiting" not in stage.web.get(f"/{stage.acme.id}/dashboard", status=200).text
    assert waiting_and_opened() == (0, 2)


@pytest.mark.sqlite
def test_hits_of_now_wait_for_none_of_500_segments(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(500):
        segment(stage, hit(stage, f"old{n}"), at=NOW + n)
    for n in range(3):
        stage.pixel(f"live{n}")
    clock, opened, real = [0.0], [], os.open

    def see(lines: list[Any]) -> None:  # the first transaction takes all the time that a reader has
        clock[0] += 1.0

    def noted(path: str, *more: Any) -> int:
        opened.append(path)
        return real(path, *more)

    watched(monkeypatch, see)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(os, "open", noted)
    assert not tracker.drain_for_reading(stage.database)
    monkeypatch.undo()
    assert counted(stage) == ["live0", "live1", "live2"]
    assert sum(path.endswith(".jsonl") for path in opened) == 2  # at the second, the time was up


@pytest.mark.parametrize(("waiting", "counted_at_once"), [(400, True), (600, False)])
def test_who_asks_for_numbers_leaves_a_backlog_to_the_drain(stage: Stage, waiting: int, counted_at_once: bool) -> None:
    segment(stage, *[hit(stage, f"e{n}") for n in range(waiting)])
    stats = stage.web.get(f"/{stage.acme.id}/stats.json?range=all").json
    assert (stats["waiting_hits"] == 0, len(counted(stage)) == waiting) == (counted_at_once,) * 2


def test_a_writer_that_waits_writes_when_the_other_has_ended(stage: Stage) -> None:
    stage.pixel("e1")
    database = stage.another()
    other = threading.Thread(target=tracker.drain, args=[database])
    with holding(stage, "another"):
        other.start()
        other.join(0.1)
        assert other.is_alive() and stage.rows("select key from emails") == []
    other.join(LONGEST)
    database.close()
    assert stage.rows("select key from emails") == [("e1",)]


def test_a_drain_that_runs_out_of_time_says_so_and_the_next_goes_on(stage: Stage) -> None:
    segment(stage, *[hit(stage, f"e{n}") for n in range(5)])
    with pytest.raises(tracker.Busy, match="in time"):
        tracker.drain(stage.database, until=0.0)
    assert not tracker.drain_for_reading(stage.database, seconds=0.0)
    assert tracker.drain_for_reading(stage.database, seconds=30.0)
    assert counted(stage) == [f"e{n}" for n in range(5)]


# -- Who drains


@pytest.fixture
def drainers(stage: Stage) -> Iterator[list[tracker.Drainer]]:
    """Two, as two workers have them; who starts one need not stop it."""
    made = [tracker.Drainer(stage.database) for _ in range(2)]
    yield made
    for drainer in made:
        if drainer.is_alive():
            drainer.stop()


def test_one_drainer_drains_while_it_lives_and_then_another_takes_over(
    stage: Stage, drainers: list[tracker.Drainer]
) -> None:
    first, second = drainers
    first.start()
    stage.pixel("e1")
    wait_for(lambda: stage.rows("select count(*) from events") == [(1,)])
    second.start()
    time.sleep(2 * tracker.Drainer.WAKE_SECONDS)
    assert (first._is_ours(), second._is_ours()) == (True, False)
    first.stop()
    stage.pixel("e2")
    wait_for(lambda: stage.rows("select count(*) from events") == [(2,)])


@pytest.mark.sqlite
def test_what_keeps_a_drainer_from_draining_is_told_by_all(stage: Stage, drainers: list[tracker.Drainer]) -> None:
    instance = stage.spool / "instance"
    right = instance.read_text()
    instance.write_text("another\n")
    stage.pixel("e1")
    drainers[0].start()
    wait_for(lambda: "do not belong together" in trouble(stage))
    instance.write_text(right)
    wait_for(lambda: trouble(stage) == "")


def trouble(stage: Stage) -> str:
    """What troubles whoever drains."""
    said: str = tracker.read_state(str(stage.folder))["trouble"]
    return said


def test_what_waits_is_told_also_while_others_write(stage: Stage) -> None:
    stage.pixel("e1")
    impatient = contextlib.closing(tracker.open_database(stage.settings, patience=0.1))
    with holding(stage, "another"), impatient as database:
        tracker.Drainer(database).turn()
    said = tracker.read_state(str(stage.folder))
    assert (said["trouble"], said["waiting"]) == ("", 1)


def test_that_nobody_has_drained_for_ten_seconds_is_news(stage: Stage) -> None:
    assert "nobody has drained" in trouble(stage)
    tracker.Drainer(stage.database).turn()
    assert trouble(stage) == ""
    state = json.loads((stage.folder / "state.json").read_text())
    (stage.folder / "state.json").write_text(json.dumps({**state, "at": state["at"] - 11}))
    assert "nobody has drained" in trouble(stage)


def test_a_drainer_outlives_a_drain_lock_that_cannot_be_opened(stage: Stage, drainers: list[tracker.Drainer]) -> None:
    lock = stage.folder / "drain.lock"
    lock.mkdir()
    drainers[0].start()
    stage.pixel("e1")
    time.sleep(2 * tracker.Drainer.WAKE_SECONDS)
    lock.rmdir()
    wait_for(lambda: stage.rows("select count(*) from events") == [(1,)])


def wait_for(happens: Callable[[], bool], seconds: float = 15) -> None:
    """Wait until something is so."""
    until = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < until
        time.sleep(0.05)
