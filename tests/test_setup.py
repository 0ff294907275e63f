"""How the project is put together: what stands at its top, what make offers, how tracker.py is ordered."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT, missing

import tracker

TOP_LEVEL = {"tracker.py", "schema.sql", "pixel.gif", "templates", "tests", "Makefile", "README.md"}
SECTIONS = (
    "Settings, Links, Verdicts, Instrument, Database, Tenants, Counting, Recording, Tables, Spool, Stats, Pages, Web, "
    "Hits, Views, API, Routes and application, Server, Commands"
)
SOURCE = (ROOT / "tracker.py").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
MAKEFILE = (ROOT / "Makefile").read_text()
BANNER = re.compile(r"^# == (.+?) =+$", re.MULTILINE)
STATEMENT = re.compile(
    r"^\s*(select\b.+\bfrom|with\s.+\bas\s*\(|create\s+(table|index|view)|drop\s+table|alter\s+table|pragma)\b"
    r"|\b(insert\s+(or\s+\w+\s+)?into|replace\s+into|delete\s+from|update\s+\w+\s+set|union(\s+all)?\s+select)\b",
    re.IGNORECASE | re.DOTALL,
)


def test_the_visible_top_level_is_the_seven_names_of_the_design() -> None:
    if shutil.which("git") is None:
        missing("git")
    asked = subprocess.run(["git", "rev-parse", "--show-prefix"], cwd=ROOT, capture_output=True, text=True)
    if asked.returncode != 0 or asked.stdout.strip():
        pytest.skip("this is no git checkout of the project")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = {path.split("/")[0] for path in listed.stdout.split("\0") if path}
    assert {name for name in names if not name.startswith(".")} == TOP_LEVEL


# == make ==


def made(*words: str) -> str:
    """What make prints."""
    if shutil.which("make") is None:
        missing("make")
    return subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_each_list_of_packages_is_known_by_its_own_copy_so_that_none_is_installed_twice() -> None:
    copies = dict(re.findall(r"\bcmp -s (\S+) (\S+);", made("-n", "bench-packages", "lint-packages")))
    assert len(copies) == len(set(copies.values())) == 4


def test_make_help_lists_every_target_that_a_person_may_want() -> None:
    listed = dict(re.findall(r"^make (\S+) +(\S.*)$", made("help"), re.MULTILINE))
    explained = dict(re.findall(r"^([a-z-]+):.*?## (.+)$", MAKEFILE, re.MULTILINE))
    assert listed == explained
    assert set(listed) >= {"help", "run", "demo", "test", "lint", "format", "clean"}
    [phony] = re.findall(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)
    assert set(listed) <= set(phony.split())  # a file of that name must not keep make from its work


def test_the_pins_at_the_top_of_tracker_py_are_those_of_the_makefile() -> None:
    [block] = re.findall(r"^# /// script\n((?:#.*\n)+?)# ///$", SOURCE, re.MULTILINE)
    [listed] = re.findall(r"^# dependencies = (\[.*\])$", block, re.MULTILINE)
    assert '# requires-python = ">=3.10"\n' in block
    [packages] = re.findall(r"(?ms)^define RUNTIME_PACKAGES\n(.*?)^endef$", MAKEFILE)
    pinned = re.findall(r"^([A-Za-z0-9._-]+==\S+)", packages, re.MULTILINE)
    assert pinned and sorted(ast.literal_eval(listed)) == sorted(pinned)
    assert packages.count("--hash=sha256:") >= len(pinned)


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-lint.txt"])
def test_each_package_for_developers_is_pinned_with_hashes_and_comes_from_wherever_pip_is_told(name: str) -> None:
    text = (ROOT / "tests" / name).read_text()
    entries = re.split(r"\n(?=\S)", text.rstrip("\n"))
    for entry in entries:
        if not entry.startswith("#"):
            head, *hashes = entry.split(" \\\n")
            assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*( ; \S.*)?", head), entry
            assert hashes and all(re.fullmatch(r" {4}--hash=sha256:[0-9a-f]{64}", each) for each in hashes), entry
    assert "://" not in text and "index" not in text


# == tracker.py ==


@cache
def section_lines() -> dict[str, range]:
    """The lines of each section, by its name."""
    starts = [(match[1], SOURCE.count("\n", 0, match.start()) + 1) for match in BANNER.finditer(SOURCE)]
    ends = [*starts[1:], ("", SOURCE.count("\n") + 2)]
    return {name: range(line, end) for (name, line), (_, end) in zip(starts, ends, strict=True)}


def section_of(node: ast.AST) -> str:
    """The section in which a node stands; "" above the first."""
    line = getattr(node, "lineno", 0)
    return next((name for name, lines in section_lines().items() if line in lines), "")


def test_the_sections_of_tracker_py_are_those_of_the_design_in_their_order() -> None:
    assert BANNER.findall(SOURCE) == SECTIONS.split(", ")


def test_all_banners_have_one_form_and_say_what_lives_below() -> None:
    lines = SOURCE.splitlines()
    banners = [number for number, line in enumerate(lines) if line.startswith("# ==")]
    assert len(banners) == len(BANNER.findall(SOURCE))
    for number in banners:
        assert len(lines[number]) == len(lines[banners[0]])
        assert re.match(r"# [A-Z].*[.]$", lines[number + 1]), lines[number]


def global_names(statement: ast.stmt) -> Iterator[ast.Name]:
    """The names that a statement of the module reads from the module: none of its arguments and variables."""
    nodes = list(ast.walk(statement))
    own = {node.arg for node in nodes if isinstance(node, ast.arg)}
    if not isinstance(statement, (ast.Assign, ast.AnnAssign)):
        own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in nodes:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in own:
            yield node


def test_a_section_calls_only_what_stands_above_it() -> None:
    order = {name: place for place, name in enumerate(["", *BANNER.findall(SOURCE)])}
    defined = {node.name: section_of(node) for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    upwards = [
        f"line {name.lineno}, in {section_of(name)}: {name.id} is in {defined[name.id]}"
        for statement in TREE.body
        for name in global_names(statement)
        if name.id in defined and order[defined[name.id]] > order[section_of(name)]
    ]
    assert upwards == []


def test_a_name_with_an_underscore_stays_in_its_section() -> None:
    homes = {
        name.id: section_of(name)
        for statement in TREE.body
        for name in ast.walk(statement)
        if isinstance(name, ast.Name)
        and isinstance(name.ctx, ast.Store)
        and isinstance(statement, (ast.Assign, ast.AnnAssign))
    }
    homes |= {node.name: section_of(node) for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    abroad = {
        f"{name.id} of {homes[name.id]} is used in {section_of(name)}"
        for statement in TREE.body
        for name in global_names(statement)
        if re.match("_[^_]", name.id) and name.id in homes and homes[name.id] != section_of(name)
    }
    assert abroad == set()


def test_no_section_is_longer_than_a_thousand_lines_and_no_function_than_sixty() -> None:
    assert {name: len(lines) for name, lines in section_lines().items() if len(lines) > 1_000} == {}
    lengths = {
        f"{node.name}, line {node.lineno}": (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(TREE)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def strings(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """All text in code: an f-string as one, its values left out, and no docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            assert isinstance(first, ast.Expr)
            skipped.add(first.value)
        if isinstance(node, ast.JoinedStr):
            parts = [part for part in node.values if isinstance(part, ast.Constant)]
            skipped |= set(parts)
            yield node, "…".join(str(part.value) for part in parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            yield node, node.value


SQL_SECTIONS = {"Database", "Tenants", "Counting", "Recording", "Tables"}


def test_sql_stands_only_in_its_sections() -> None:
    found = [(section_of(node), text) for node, text in strings(TREE) if STATEMENT.search(text)]
    assert len([section for section, _ in found if section in SQL_SECTIONS]) > 30  # the pattern finds statements
    assert [(section, text) for section, text in found if section not in SQL_SECTIONS] == []


def test_only_these_sections_run_statements() -> None:
    calls = [
        (section_of(node), node.lineno)
        for node in ast.walk(TREE)
        if isinstance(node, ast.Attribute) and node.attr in ("execute", "executemany", "executescript")
    ]
    assert [call for call in calls if call[0] not in SQL_SECTIONS] == []


def test_only_one_function_calls_start_response() -> None:
    callers = {
        function.name
        for function in ast.walk(TREE)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "start_response"
    }
    assert callers == {"send"}


IMPORT = """
import ast, importlib, os, sys
source = open("tracker.py", encoding="utf-8").read()
for node in ast.parse(source).body:  # what the standard library does when it is imported is not tracker's doing
    if isinstance(node, ast.Import):
        for each in node.names: importlib.import_module(each.name)
    elif isinstance(node, ast.ImportFrom) and node.module != "__future__": importlib.import_module(node.module)

class Watched(dict):
    def __getattribute__(self, name):
        print("environment:", name)
        return super().__getattribute__(name)
    __getitem__ = __contains__ = lambda self, name: print("environment:", name)

def hook(event, given):
    if event in ("open", "sqlite3.connect", "os.mkdir", "subprocess.Popen", "socket.bind"):
        path = str(given[0]) if given else ""
        if not path.endswith("tracker.py") and "__pycache__" not in path: print(event + ":", path)

os.environ = Watched()
sys.path.insert(0, os.getcwd())
sys.dont_write_bytecode = True
importlib.invalidate_caches()
import_tracker = compile("import tracker", "import", "exec")
sys.addaudithook(hook)
exec(import_tracker)
"""


def test_importing_tracker_reads_no_environment_and_opens_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_importing_tracker_loads_nothing_that_only_some_commands_need() -> None:
    """Each worker would carry it."""
    say = "import sys, tracker; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-S", "-c", say], cwd=ROOT, capture_output=True, text=True, timeout=60)
    heavy = {"argparse", "csv", "email.message", "gunicorn", "html.parser", "http.client", "logging", "subprocess"}
    assert "tracker" in done.stdout.split(), done.stderr
    assert heavy & set(done.stdout.split()) == set()


def test_each_cache_has_a_bound() -> None:
    bounds = {
        name: each.cache_parameters()["maxsize"]
        for name, each in vars(tracker).items()
        if hasattr(each, "cache_parameters")
    }
    assert bounds and all(bound is not None and bound <= 1024 for bound in bounds.values()), bounds


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "bench").glob("*.py")), ids=lambda path: path.stem)
def test_the_bench_can_be_imported(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not run here, but what it uses must be there."""
    if path.stem == "flask_peer":
        pytest.importorskip("flask")  # which `make bench` installs
        monkeypatch.setenv("BENCH_DATABASE", str(tmp_path / "bench.db"))
    importlib.import_module(f"bench.{path.stem}")
