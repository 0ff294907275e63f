"""How the project is put together: what stands at its top, what make offers, how tracker.py is ordered."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import ROOT

import tracker

TOP_LEVEL = {"tracker.py", "schema.sql", "pixel.gif", "templates", "tests", "Makefile", "README.md"}
SECTIONS = (
    "Settings, Links, Verdicts, Instrument, Messages, Database, PostgreSQL, Tenants, Counting, Emails, Recording, Tables, "
    "Spool, Privacy, Outward, Stats, Pages, Web, Hits, Views, API, Routes and application, Server, Commands, Operating"
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
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout of the project")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {
        name for path in listed.stdout.split("\0") if (name := path.split("/")[0])[:1] not in (".", "")
    } == TOP_LEVEL


# == make ==


def made(*words: str) -> str:
    """What make prints."""
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
def sections() -> dict[str, range]:
    """The lines of each section, by its name; "" above the first."""
    banners = [(match[1], SOURCE.count("\n", 0, match.start()) + 1) for match in BANNER.finditer(SOURCE)]
    return {
        name: range(line, end) for (name, line), (_, end) in pairwise([("", 0), *banners, ("", SOURCE.count("\n") + 2)])
    }


def section_of(node: ast.AST) -> str:
    """The section in which a node stands."""
    return next(name for name, lines in sections().items() if getattr(node, "lineno", 0) in lines)


def test_the_sections_of_tracker_py_are_those_of_the_design_and_their_banners_have_one_form() -> None:
    assert BANNER.findall(SOURCE) == SECTIONS.split(", ")
    banners = re.findall(r"^(# ==.*)\n(.*)", SOURCE, re.MULTILINE)
    assert len(banners) == len(sections()) - 1
    assert {len(banner) for banner, _ in banners} == {104}
    assert [below for _, below in banners if not re.fullmatch("# [A-Z].*[.]", below)] == []


def names_used_abroad() -> Iterator[tuple[str, str, str]]:
    """Names of the module that another section than theirs reads: that section, the name, its section."""
    homes: dict[str, str] = {}
    for statement in TREE.body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            homes[statement.name] = section_of(statement)
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            named = (node for target in targets for node in ast.walk(target) if isinstance(node, ast.Name))
            homes |= {node.id: section_of(statement) for node in named}
    for statement in TREE.body:
        nodes = list(ast.walk(statement))
        names = [node for node in nodes if isinstance(node, ast.Name)]
        own = {node.arg for node in nodes if isinstance(node, ast.arg)}
        if not isinstance(statement, (ast.Assign, ast.AnnAssign)):
            own |= {name.id for name in names if isinstance(name.ctx, ast.Store)}
        for name in names:
            if name.id in homes and name.id not in own and homes[name.id] != section_of(name):
                yield section_of(name), name.id, homes[name.id]


def test_a_section_uses_only_what_stands_above_it_and_has_no_underscore() -> None:
    order = ["", *BANNER.findall(SOURCE)]
    used = list(names_used_abroad())
    assert len(used) > 500
    assert [row for row in used if order.index(row[0]) < order.index(row[2]) or re.match("_[^_]", row[1])] == []


def test_no_section_is_longer_than_a_thousand_lines_and_no_function_than_sixty() -> None:
    assert {name: len(lines) for name, lines in sections().items() if len(lines) > 1_000} == {}
    functions = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
    assert [each.name for each in functions if (each.end_lineno or 0) - each.lineno >= 60] == []


def strings() -> Iterator[tuple[ast.AST, str]]:
    """All text in code: an f-string as one, its values left out, and no docstrings."""
    skipped: set[ast.AST] = {node.value for node in ast.walk(TREE) if isinstance(node, ast.Expr)}
    for node in ast.walk(TREE):
        if isinstance(node, ast.JoinedStr):
            parts = [part for part in node.values if isinstance(part, ast.Constant)]
            skipped |= set(parts)
            yield node, "…".join(str(part.value) for part in parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            yield node, node.value


SQL_SECTIONS = {"Database", "PostgreSQL", "Tenants", "Counting", "Emails", "Recording", "Tables", "Privacy", "Outward"}


def test_sql_stands_and_is_run_only_in_its_sections() -> None:
    statements = [(section_of(node), text) for node, text in strings() if STATEMENT.search(text)]
    assert len([section for section, _ in statements if section in SQL_SECTIONS]) > 30  # the pattern finds statements
    assert [each for each in statements if each[0] not in SQL_SECTIONS] == []
    names = ("execute", "executemany", "executescript")
    calls = [node for node in ast.walk(TREE) if isinstance(node, ast.Attribute) and node.attr in names]
    assert [node.lineno for node in calls if section_of(node) not in SQL_SECTIONS] == []


def test_only_one_function_calls_start_response() -> None:
    functions = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
    assert [each.name for each in functions if "start_response(" in "\n".join(map(ast.unparse, each.body))] == ["send"]


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
print({"argparse", "csv", "email.message", "gunicorn", "html.parser", "http.client", "logging", "subprocess"} & {*sys.modules})
"""


def test_importing_tracker_reads_and_opens_nothing_and_loads_nothing_that_only_some_commands_need() -> None:
    """Each worker would carry what it loads."""
    done = subprocess.run([sys.executable, "-S", "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("set()\n", "", 0)


def test_each_cache_has_a_bound() -> None:
    caches = {name: each for name, each in vars(tracker).items() if hasattr(each, "cache_parameters")}
    bounds = {name: each.cache_parameters()["maxsize"] or 9_999 for name, each in caches.items()}
    assert bounds and {name: bound for name, bound in bounds.items() if bound > 1024} == {}


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "bench").glob("*.py")), ids=lambda path: path.stem)
def test_the_bench_can_be_imported(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not run here, but what it uses must be there."""
    if path.stem.endswith("_peer"):
        pytest.importorskip(path.stem.removesuffix("_peer"))  # which `make bench` installs
        monkeypatch.setenv("BENCH_DATABASE", str(tmp_path / "bench.db"))
    importlib.import_module(f"bench.{path.stem}")
