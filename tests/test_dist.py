"""The one file that `make dist` builds: the same bytes each time, started from anywhere, under any Python, replaced as it runs."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, Server
from load import counted_keys, data, segments, terminate, wait_until
from test_live import fire, get, launch, pixels

SOURCES = {"tracker.py", "schema.sql", "pixel.gif", "templates", ".make"}
MOST_BYTES = 1_050_000  # of which tracker.py, as source and compiled, is 640,000
ALONE = ("-I", "-S")  # neither the environment's modules nor installed ones, nor those of the folder one is in
DAMAGED = b"raise SystemExit('this source was read')\n"


def run(*command: object, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a program with nothing in its environment but PATH and these variables."""
    env = {"PATH": os.environ["PATH"], **environ}
    return subprocess.run([*map(str, command)], env=env, cwd=cwd, capture_output=True, text=True, timeout=60)


def copy_sources(folder: Path) -> Path:
    """What the file is built from, in a folder of its own: `dist/` in the checkout is the user's."""
    shutil.copytree(ROOT, folder, ignore=lambda path, names: {*names} - SOURCES if path == str(ROOT) else ())
    return folder


def attempt(folder: Path, *options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the builder in a folder."""
    return run(sys.executable, *options, folder / ".make" / "dist.py", cwd=folder, **environ)


def build(folder: Path) -> Path:
    """Build the file from copies of the sources in a new folder."""
    done = attempt(copy_sources(folder), PYTHONHASHSEED="0")
    assert done.returncode == 0, done.stderr
    return folder / "dist" / "email-tracker.pyz"


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file, for those who only read it."""
    return build(tmp_path_factory.mktemp("dist") / "sources")


@pytest.fixture
def program(built: Path, tmp_path: Path) -> Path:
    """A copy of the file, alone in a folder."""
    (tmp_path / "bin").mkdir()
    return Path(shutil.copy(built, tmp_path / "bin"))


@pytest.fixture
def server(servers: Callable[..., Server]) -> Server:
    """A server that is not started yet."""
    return servers()


def assert_counts_and_ends(server: Server, mail_id: str) -> None:
    """That a server answers, and counts before it ends."""
    outcome = fire(server, pixels(mail_id, "dist", 30))
    assert outcome.wrong == [] and len(outcome.answered) == 30
    assert terminate(server) == 0
    assert segments(server) == []
    assert counted_keys(server) == {sent.key: 1 for sent in outcome.answered}


def members(path: Path) -> dict[str, bytes]:
    """What is in the file."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewrite(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    """Replace the file whole by one whose contents were changed: a new file under the same name."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(new, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members(path).items():
            archive.writestr(name, change(name, content))
    new.chmod(0o755)
    new.replace(path)


# == Building ==


def test_nothing_is_built_where_the_same_sources_would_give_other_bytes(tmp_path: Path) -> None:
    folder = copy_sources(tmp_path / "sources")
    for options, seed in (((), "1"), (("-I",), "0"), (("-OO",), "0")):  # with -I the seed is not read
        done = attempt(folder, *options, PYTHONHASHSEED=seed)
        assert done.returncode == 1
        assert "PYTHONHASHSEED=0" in done.stderr and "make dist" in done.stderr and "Traceback" not in done.stderr
        assert not (folder / "dist").exists()


def test_make_dist_builds_without_hash_randomisation() -> None:
    done = run("make", "-n", "dist", cwd=ROOT)
    assert re.search(r"PYTHONHASHSEED=0 PYTHONOPTIMIZE= \S+python \.make/dist\.py$", done.stdout, re.MULTILINE)


def test_the_same_sources_give_the_same_bytes_wherever_and_whenever_they_are_built(built: Path, tmp_path: Path) -> None:
    elsewhere = copy_sources(tmp_path / "another folder" / "with a longer name")
    (elsewhere / "dist").mkdir()
    (elsewhere / "dist" / "email-tracker.pyz").write_bytes(b"an older and longer one" * 100_000)
    for path in elsewhere.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
        os.utime(path, (981_173_106, 981_173_106))  # in 2001
    time.sleep(max(0, 2.1 - (time.time() - built.stat().st_mtime)))  # a zip's times are exact to two seconds
    done = attempt(elsewhere, PYTHONHASHSEED="0", TZ="Pacific/Auckland", LC_ALL="C")
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "dist" / "email-tracker.pyz").read_bytes() == built.read_bytes()


# == What is in it ==


def test_the_file_is_small_and_can_be_executed(built: Path) -> None:
    assert built.stat().st_size < MOST_BYTES
    assert stat.S_IMODE(built.stat().st_mode) == 0o755
    assert built.read_bytes().startswith(b"#!/usr/bin/env python3\n")


def test_the_file_holds_the_program_its_files_and_gunicorn_and_nothing_else(built: Path) -> None:
    held = members(built)
    assert list(held) == sorted(held)  # not in the order in which a folder happens to be listed
    ours = {name: content for name, content in held.items() if not name.startswith("gunicorn/")}
    files = [ROOT / "tracker.py", ROOT / "schema.sql", ROOT / "pixel.gif", *(ROOT / "templates").rglob("*.*")]
    expected = {str(path.relative_to(ROOT)): path.read_bytes() for path in files}
    assert {name for name in ours if name not in expected} == {"__main__.py", "__main__.pyc", "tracker.pyc"}
    assert {name: ours[name] for name in expected} == expected
    assert {Path(name).suffix for name in set(held) - set(ours)} == {".py", ".pyc", ""}
    [licence] = [path for path in importlib.metadata.files("gunicorn") or () if path.name == "LICENSE"]
    assert held["gunicorn/LICENSE"] == licence.read_binary()


def test_each_source_has_its_compiled_form_beside_it(built: Path) -> None:
    held = members(built)
    sources = {name for name in held if name.endswith(".py")}
    assert {f"{name}c" for name in sources} == {name for name in held if name.endswith(".pyc")}
    for name in sources:
        magic, flags, digest = held[f"{name}c"][:4], held[f"{name}c"][4:8], held[f"{name}c"][8:16]
        assert magic == importlib.util.MAGIC_NUMBER
        assert flags == b"\1\0\0\0"  # PEP 552: a hash of the source, which nobody compares
        assert digest == importlib.util.source_hash(held[name])


def spoil_sources(name: str, content: bytes) -> bytes:
    return DAMAGED if name.endswith(".py") else content


def test_the_running_python_uses_the_compiled_forms(program: Path, server: Server) -> None:
    rewrite(program, spoil_sources)
    launch(server, *ALONE, str(program), "--env", os.devnull, "serve")
    assert_counts_and_ends(server, server.first_tenant())


def test_without_a_compiled_form_that_fits_it_is_the_source_that_runs(program: Path) -> None:
    rewrite(program, lambda name, content: b"of another Python" if name.endswith(".pyc") else content)
    assert run(sys.executable, *ALONE, program, "--version", cwd=program.parent).returncode == 0
    rewrite(program, spoil_sources)
    assert "this source was read" in run(sys.executable, *ALONE, program, "--version", cwd=program.parent).stderr


# == Starting it ==


def test_the_file_runs_however_it_is_called_and_goes_by_that_name(program: Path, tmp_path: Path) -> None:
    for made in ("python", "elsewhere"):
        (tmp_path / made).mkdir()
    (tmp_path / "python" / "python3").symlink_to(sys.executable)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "tracker-link").symlink_to(program)
    (elsewhere / "relative-link.pyz").symlink_to(Path("..", "bin", program.name))
    renamed = Path(shutil.copy(program, program.parent / "email-tracker"))
    alone, path = [sys.executable, *ALONE], f"{tmp_path / 'python'}{os.pathsep}{os.environ['PATH']}"
    ways: list[tuple[list[object], Path, str]] = [  # words, the folder one is in, what the program is called then
        ([*alone, program], elsewhere, program.name),
        ([*alone, program.name], program.parent, program.name),
        ([*alone, Path("..", "bin", program.name)], elsewhere, program.name),
        ([*alone, "tracker-link"], elsewhere, "tracker-link"),
        ([*alone, elsewhere / "relative-link.pyz"], tmp_path, "relative-link.pyz"),
        ([*alone, renamed], elsewhere, "email-tracker"),
        (["env", f"PATH={path}", f"./{program.name}"], program.parent, program.name),
        (["env", f"PATH={renamed.parent}:{path}", "email-tracker"], elsewhere, "email-tracker"),
    ]
    for words, folder, name in ways:
        misused = run(*words, "no-such-command", cwd=folder)
        assert misused.returncode == 2
        assert f"{name}: " in misused.stderr and f"usage: {name} " in misused.stderr
        assert not re.search(r"\btracker\.py\b", misused.stderr)


def test_nothing_is_written_beside_the_file_and_it_warns_of_nothing_where_warnings_are_errors(
    program: Path, tmp_path: Path
) -> None:
    before = program.read_bytes()
    program.chmod(0o444)
    program.parent.chmod(0o555)
    environ = {"DATABASE_URL": f"sqlite:{tmp_path / 'data' / 'tracking.db'}", "BASE_URL": "https://track.example.com"}
    try:
        for words in (("tenant", "add", "Acme", "--any-domain"), ("stats", "Acme"), ("check",), ("nginx",)):
            strict = (*ALONE, "-W", "error", "-X", "dev")
            done = run(
                sys.executable, *strict, program.name, "--env", os.devnull, *words, cwd=program.parent, **environ
            )
            assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
        assert (os.listdir(program.parent), program.read_bytes()) == ([program.name], before)
    finally:
        program.parent.chmod(0o755)


# == Serving ==


def test_the_file_alone_serves_and_drains_before_it_ends(program: Path, server: Server) -> None:
    here = shutil.copy(program, server.folder)
    launch(server, *ALONE, os.path.basename(here), "--env", os.devnull)  # by a relative path
    assert_counts_and_ends(server, server.first_tenant())
    assert f"{program.name} tenant show default" in server.log.read_text()
    assert set(os.listdir(server.folder)) == {program.name, "data", "server.log"}


def test_gunicorn_serves_the_tracker_in_the_file(program: Path, server: Server) -> None:
    made = server.tenant("Acme")
    here = Path(shutil.copy(program, server.folder)).name
    gunicorn = ("-m", "gunicorn", "--no-control-socket", "--bind", server.environ["BIND"], "--workers", "2")
    launch(server, *gunicorn, "--pythonpath", here, "tracker")
    status, _, page = get(server.port, f"/{made['id']}/dashboard")
    assert status == 200 and b"Acme" in page
    assert_counts_and_ends(server, made["mail_id"])


@pytest.mark.parametrize("words", [("serve",), ("tenant", "add", "Acme", "--local")], ids=lambda w: w[0])
def test_tracker_py_alone_says_to_copy_the_file_that_holds_all(words: tuple[str, ...], tmp_path: Path) -> None:
    alone = shutil.copy(ROOT / "tracker.py", tmp_path)
    done = run(sys.executable, alone, "--env", os.devnull, *words, cwd=tmp_path)
    assert done.returncode == 1
    assert "copy email-tracker.pyz" in done.stderr and "make dist" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "data" / "tracking.db").exists()


@pytest.mark.parametrize("fate", ["replaced", "spoiled"])
def test_a_server_goes_on_when_its_file_is_another_or_gone(fate: str, program: Path, server: Server) -> None:
    def other(name: str, content: bytes) -> bytes:
        # Every source another, longer and of another length when packed: nothing stands where it stood.
        return DAMAGED + os.urandom(3000).hex().encode() if name.endswith(".py") else content[::-1]

    made = server.tenant("Acme")
    launch(server, *ALONE, str(program), "--env", os.devnull, "serve")
    if fate == "replaced":
        rewrite(program, other)  # an atomic rename
    else:
        program.unlink()
        program.write_bytes(b"no zip at all")
    ours = ("dashboard", "stats.json", "emails.csv", "events.json", "links.csv")
    found = [*(f"/{made['id']}/{page}" for page in ours), "/health", "/", "/favicon.ico", "/robots.txt"]
    found.append(f"/{made['mail_id']}/click/k?url=https://elsewhere.example/")  # the naming page
    for generation in range(2):  # at last by workers that were born afterwards
        outcome = fire(server, pixels(made["mail_id"], f"worker{generation}", 30))
        assert outcome.wrong == [] and outcome.broken == []
        style = re.findall(r"/assets/style\.\w+\.css", get(server.port, found[0])[2].decode())
        assert {path: get(server.port, path)[0] for path in (*found, *style)} == dict.fromkeys([*found, *style], 200)
        assert style and get(server.port, "/nowhere/at/all")[0] == 404
        for nonsense, status in ((b"NONSENSE\r\n\r\n", b"400"), (b"GET / HTTP/9.9\r\n\r\n", b"505")):
            with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
                connection.sendall(nonsense)
                assert connection.makefile("rb").readline().split()[1] in (status, b"400")
        old = server.workers()
        for worker in old:
            os.kill(worker, 9)
        wait_until(lambda: len(set(server.workers()) - set(old)) == 2, server)  # noqa: B023
    assert terminate(server) == 0
    assert segments(server) == []
    assert sum(counted_keys(server).values()) == 62  # with a click for each generation
    assert "Traceback" not in server.log.read_text()
    assert server.run("check") == "all is well\n"


# == Other Pythons ==


def other_pythons() -> list[str]:
    """Pythons of other versions than this one that are on this machine, one for each, from 3.10 on."""
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    names = [*map(str, root.glob("versions/*/bin/python3")), *(f"python3.{minor}" for minor in range(10, 20))]
    found: dict[int, str] = {}
    for name in names:
        with contextlib.suppress(OSError):
            match = re.fullmatch(r"Python 3\.([0-9]+)\.[0-9]+\n", run(name, "-V", cwd=ROOT).stdout)
            if match and int(match[1]) >= 10 and int(match[1]) != sys.version_info[1]:
                found.setdefault(int(match[1]), name)
    return [found[version] for version in sorted(found)]


def test_the_file_runs_under_other_pythons_than_the_one_that_built_it(
    program: Path, servers: Callable[..., Server]
) -> None:
    others = other_pythons()
    if not others:
        pytest.skip("there is no other Python from 3.10 on")
    for python in {others[0], others[-1]}:
        server = servers()

        def command(*words: str) -> str:
            done = run(python, *ALONE, program, "--env", os.devnull, *words, cwd=server.folder, **server.environ)  # noqa: B023
            assert done.returncode == 0, (python, done.stderr)  # noqa: B023
            return done.stdout

        assert command("--version").startswith("email-tracker ")
        mail_id = json.loads(command("tenant", "add", "Acme", "--json"))["mail_id"]
        launch(server, *ALONE, str(program), "--env", os.devnull, "serve", program=python)
        assert_counts_and_ends(server, mail_id)
        assert os.listdir(data(server) / "spool" / "rejected") == []
        assert command("check") == "all is well\n"
