"""The benchmark: what it computes from what it measured, and one short run of it all. No time is asserted."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import pytest
from bench import bench
from conftest import ROOT, missing

if TYPE_CHECKING:
    from _typeshed import TraceFunction

BENCH = ROOT / "tests" / "bench" / "bench.py"


def measured(rate: float, p99_ms: float = 10.0, bad: int = 0) -> bench.Measurement:
    """A run of ten seconds with so many good answers a second."""
    return bench.Measurement(round(rate * 10) + bad, 10.0, bad, 0, p99_ms / 2, p99_ms)


def one_round(hello: float = 1000, flask: float = 200, pixel: float = 900, p99_ms: float = 20.0) -> bench.Round:
    """A round in which clicks are as fast as pixels."""
    mine = measured(pixel, p99_ms)
    return {
        "hello": measured(hello),
        "flask": measured(flask),
        "pixel": mine,
        "signed click": mine,
        "plain click": mine,
    }


ACCOUNT = bench.Account("at the end", 1000, 1010, 32, "all is well")
RESULTS = bench.Results(
    rounds=[one_round()],
    memory={"hello": bench.Memory(20.0, 25.0, 10_000), "us": bench.Memory(30.0, 35.0, 10_000, 36.4)},
    starts={"hello": [0.1, 0.2, 0.1], "us": [0.3, 0.15, 0.2]},
    backlog=bench.Backlog(measured(900), 450, 90),
    accounts=[ACCOUNT],
)


# == What is computed ==


def test_the_sums_are_read_from_the_last_line_that_wrk_prints() -> None:
    output = """Running 1s test @ http://127.0.0.1:3000/
  1 threads and 32 connections
Requests/sec:   5210.27

{"requests": 5310, "seconds": 1.009, "bad": 3, "broken": 1, "p50_ms": 5.8, "p99_ms": 10.46}
"""
    assert bench.read_wrk(output) == bench.Measurement(5310, 1.009, 3, 1, 5.8, 10.46)


@pytest.mark.parametrize("output", ["", "unable to connect", "{}", '{"requests": 1}', "[1]", "3"])
def test_what_holds_no_sums_is_an_error_that_says_what_wrk_said(output: str) -> None:
    with pytest.raises(bench.BenchError, match=r"wrk printed no sums; it said: "):
        bench.read_wrk(output)


def test_only_good_answers_count_in_the_rate() -> None:
    it = bench.Measurement(requests=100, seconds=2.0, bad=40, broken=7, p50_ms=1, p99_ms=2)
    assert (it.good, it.rate) == (60, 30.0)


def test_a_ratio_to_nothing_is_not_known_and_stays_out_of_the_median() -> None:
    assert bench.ratio(1, 0) is None
    assert bench.median([1.0, None, 3.0]) == 2.0
    assert bench.median([None]) is None


def test_ratios_are_taken_within_a_round() -> None:
    # The medians of the rates are 1000 and 900, but no round had a ratio above 0.9.
    rounds = [one_round(hello=1000, pixel=800), one_round(hello=1125, pixel=900), one_round(hello=10000, pixel=9000)]
    assert bench.rate_ratio(rounds, "pixel", "hello") == pytest.approx(0.8)
    assert bench.rate_ratio(rounds, "pixel", "flask") == pytest.approx(4.5)
    assert bench.p99_ratio(rounds, "pixel", "hello") == 2.0


def test_a_summary_has_medians_and_the_sum_of_errors() -> None:
    rounds = [{"hello": measured(1000), "flask": measured(rate, bad=rate)} for rate in (100, 300, 200)]
    assert bench.summarise(rounds, "flask") == bench.Summary("flask", 200.0, 0.2, 5.0, 10.0, 1.0, 600)


def test_every_figure_stands_beside_its_bar() -> None:
    figures = {figure.name: figure for figure in RESULTS.figures()}
    assert list(figures) == list(bench.BARS)
    found = {name: (figure.value and round(figure.value, 3), figure.met) for name, figure in figures.items()}
    assert found == {
        "pixel: requests/s, of hello's": (0.9, True),
        "pixel: p99, of hello's": (2.0, True),
        "signed click: requests/s, of hello's": (0.9, True),
        "signed click: p99, of hello's": (2.0, None),
        "plain click: requests/s, of hello's": (0.9, None),
        "plain click: p99, of hello's": (2.0, None),
        "pixel: requests/s, of flask's": (4.5, True),
        "memory after the first requests, of hello's": (1.5, None),
        "memory after some 10,000 hits, of hello's": (1.4, True),
        "memory after a million hits, of hello's": (1.456, None),
        "memory growth from 10,000 hits to a million": (0.04, True),
        "cold start, of hello's": (2.0, True),
        "cold start of email-tracker.pyz, of hello's": (None, None),
        "backlog under full load, in seconds": (0.5, True),
    }


@pytest.mark.parametrize(
    ("sign", "value", "met"), [(">=", 0.8, True), (">=", 0.79, False), ("<=", 3.0, True), ("<=", 3.1, False)]
)
def test_a_bar_is_met_at_its_bound(sign: str, value: float, met: bool) -> None:
    assert bench.Bar(sign, 0.8 if sign == ">=" else 3.0).met(value) is met


@pytest.mark.parametrize(
    ("account", "trouble"),
    [
        (replace(ACCOUNT, counted=1000), None),
        (replace(ACCOUNT, counted=1032), None),
        (replace(ACCOUNT, counted=999), "at the end: 1 of 1000 answered hits are not in the database"),
        (
            replace(ACCOUNT, counted=1033),
            "at the end: 33 hits more than were answered are in the database; expected at most 32",
        ),
        (replace(ACCOUNT, check="1 faults"), "at the end: check says: 1 faults"),
    ],
    ids=["all", "and all that was cut off", "lost", "twice", "fault"],
)
def test_a_lost_hit_one_counted_twice_and_a_fault_are_troubles(account: bench.Account, trouble: str | None) -> None:
    assert replace(RESULTS, accounts=[account]).troubles() == ([trouble] if trouble else [])


def test_a_missed_bar_is_reported_and_is_no_trouble(capsys: pytest.CaptureFixture[str]) -> None:
    slow = replace(RESULTS, rounds=[one_round(pixel=1)])
    bench.print_report({"cores": "2"}, slow, sys.stdout)
    assert "pixel: requests/s, of hello's                           0.00     >= 0.80   NO" in capsys.readouterr().out
    assert not slow.troubles()


def test_programs_get_valid_json() -> None:
    plan = bench.Plan(rounds=1, seconds=1, minute=1, starts=1, million=False)
    nothing = replace(RESULTS, rounds=[{**one_round(), "flask": measured(0)}])
    text = json.dumps(bench.as_json({"cores": "2"}, plan, nothing), allow_nan=False)
    figures = {figure["name"]: figure for figure in json.loads(text)["figures"]}
    assert figures["pixel: requests/s, of hello's"]["bar"] == {"sign": ">=", "bound": 0.8}
    assert figures["pixel: requests/s, of flask's"]["value"] is None


def test_without_nginx_and_wrk_a_sentence_says_what_to_install(tmp_path: Path) -> None:
    if shutil.which("wrk", path="/usr/sbin"):
        pytest.skip("wrk is where it is always found")
    done = subprocess.run(
        [sys.executable, BENCH, "--quick"],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "bench.py: nginx and wrk are needed: apt install nginx wrk\n"


# == All of it ==


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A quick run, in a folder of the test's own."""
    try:
        bench.find_tools(os.environ.get("PATH", os.defpath))
    except bench.BenchError:
        missing("nginx or wrk")
    try:
        bench.require_packages()
    except bench.BenchError as error:
        pytest.skip(str(error))  # also in CI: `make test` alone does not install them
    folder = tmp_path / "b"
    folder.mkdir()
    return [sys.executable, str(BENCH), "--quick", "--folder", str(folder), "--json", str(tmp_path / "bench.json")]


def left_over(folder: Path) -> list[str]:
    """Processes that know the folder, and what is in it."""
    about = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if os.fsencode(folder / "bench-") in words:
            about.append(process.name)
    return about + [path.name for path in folder.iterdir()]


def test_a_quick_run_measures_everything_loses_nothing_and_cleans_up(command: list[str], tmp_path: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [each["name"] for each in found["summaries"]] == ["hello", "flask", "pixel", "signed click", "plain click"]
    assert [each["errors"] for each in found["summaries"] if each["name"] not in ("hello", "flask")] == [0, 0, 0]
    assert len(found["measured"]["rounds"]) == 2
    unknown = {each["name"] for each in found["figures"] if each["value"] is None}
    assert unknown - {"cold start of email-tracker.pyz, of hello's"} == {
        "memory after a million hits, of hello's",
        "memory growth from 10,000 hits to a million",
    }
    assert not found["troubles"]
    assert "pixel: requests/s, of hello's" in done.stdout
    assert not left_over(tmp_path / "b")


@pytest.fixture
def heard() -> Iterator[None]:
    """What is started hears SIGINT: a shell's job in the background is born deaf to it, and so are the tests in it."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_whoever_stops_it_finds_nothing_left(command: list[str], tmp_path: Path, number: signal.Signals) -> None:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        # By then all servers run.
        assert any(line.startswith("round 1") for line in process.stderr)
        assert left_over(tmp_path / "b")
        process.send_signal(number)
        said = process.communicate(timeout=120)[1]
    assert (process.returncode, said) == (130, "bench.py: stopped\n")
    assert not left_over(tmp_path / "b")


@pytest.fixture
def stoppable() -> Iterator[None]:
    """Signals mean here what they mean to the benchmark."""
    old = {number: signal.signal(number, bench.interrupted) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in old.items():
        signal.signal(number, handler)


def stopped_at(step: int, run: Callable[[], None]) -> bool:
    """Run, and send SIGTERM at one of the steps that are made in bench.py; whether there were so many."""
    steps = itertools.count(1)

    def trace(frame: FrameType, event: str, _: object) -> TraceFunction | None:
        if frame.f_code.co_filename != bench.__file__:
            return None
        frame.f_trace_opcodes = True
        if next(steps) == step:
            signal.raise_signal(signal.SIGTERM)
        return trace

    old = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(old)
    return next(steps) > step


@pytest.mark.usefixtures("stoppable")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a log that was just being opened
def test_no_moment_is_so_bad_that_a_process_outlives_who_is_stopped_in_it(tmp_path: Path) -> None:
    def run() -> None:
        with bench.temporary_folder(tmp_path) as folder, bench.running(["sleep", "600"], {}, folder / "log"):
            pass

    before = bench.process_tree(os.getpid())
    for step in itertools.count(1):
        stopped = stopped_at(step, run)
        after = bench.process_tree(os.getpid())
        assert after == before, step
        assert list(tmp_path.iterdir()) == [], step
        if not stopped:
            break
    assert step > 50  # else there was no moment at all


def test_a_tracker_that_does_not_run_is_a_failure_with_a_sentence(command: list[str], tmp_path: Path) -> None:
    done = subprocess.run([*command, "--program", "false"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("bench.py: false --env /dev/null tenant add bench")
    assert "Traceback" not in done.stderr
    assert not left_over(tmp_path / "b")
