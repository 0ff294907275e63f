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
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pytest
from conftest import ROOT, Server
from load import counted_keys, data, segments, terminate, wait_until
from test_live import fire, get, launch, pixels

SOURCES = ("tracker.py", "schema.sql", "pixel.gif", "templates", ".make")
MOST_BYTES = 1_000_000
ALONE = ("-I", "-S")  # neither the environment's modules nor installed ones, nor those of the folder one is in
DAMAGED = b"raise SystemExit('this source was read')\n"


def copy_sources(folder: Path) -> Path:
    """What the file is built from, in a folder of its own: `dist/` in the checkout is the user's."""
    folder.mkdir(parents=True)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def attempt(folder: Path, *options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the builder in a folder, with these variables as well."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, *options, str(folder / ".make" / "dist.py")]
    return subprocess.run(command, env={**plain, **environ}, cwd=folder, capture_output=True, text=True, timeout=60)


def build(folder: Path, *options: str, **environ: str) -> Path:
    """Build the file from copies of the sources in a new folder."""
    done = attempt(copy_sources(folder), *options, PYTHONHASHSEED="0", **environ)
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
def server(tmp_path: Path) -> Iterator[Server]:
    """A server that is not started yet."""
    folder = tmp_path / "server"
    folder.mkdir()
    made = Server(folder)
    yield made
    made.listener.close()
    made.stop()


def members(path: Path) -> dict[str, bytes]:
    """What is in the file."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewrite(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    """Replace the file whole by one whose contents were changed: a new file under the same name."""
    rewritten = BytesIO(b"#!/usr/bin/env python3\n")
    rewritten.seek(0, os.SEEK_END)
    with zipfile.ZipFile(rewritten, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members(path).items():
            archive.writestr(name, change(name, content))
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(rewritten.getvalue())
    new.chmod(0o755)
    new.replace(path)


def run(*command: object, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a program with nothing in its environment but PATH and these variables."""
    return subprocess.run(
        [str(word) for word in command],
        env={"PATH": os.environ["PATH"], **environ},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )


# == Building ==


@pytest.mark.parametrize(
    ("options", "environ"),
    [
        ((), {"PYTHONHASHSEED": "1"}),
        (("-I",), {"PYTHONHASHSEED": "0"}),
        (("-OO",), {"PYTHONHASHSEED": "0"}),
    ],
    ids=["another seed", "a seed that is not read", "-OO"],
)
def test_nothing_is_built_where_the_same_sources_would_give_other_bytes(
    options: tuple[str, ...], environ: dict[str, str], tmp_path: Path
) -> None:
    folder = copy_sources(tmp_path / "sources")
    done = attempt(folder, *options, **environ)
    assert done.returncode == 1
    assert "PYTHONHASHSEED=0" in done.stderr and "make dist" in done.stderr and "Traceback" not in done.stderr
    assert not (folder / "dist").exists()


def test_make_dist_builds_without_hash_randomisation() -> None:
    done = subprocess.run(["make", "-n", "dist"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert re.search(r"PYTHONHASHSEED=0 PYTHONOPTIMIZE= \S+python \.make/dist\.py$", done.stdout, re.MULTILINE), (
        done.stderr
    )


def test_the_same_sources_give_the_same_bytes_wherever_and_whenever_they_are_built(built: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "another folder" / "with a longer name"
    elsewhere.parent.mkdir()
    copy_sources(elsewhere)
    shutil.rmtree(elsewhere / "templates")
    (elsewhere / "templates" / "help").mkdir(parents=True)
    for template in sorted((ROOT / "templates").rglob("*.*"), reverse=True):  # listed in another order
        shutil.copy(template, elsewhere / template.relative_to(ROOT))
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


def as_if_another_python_built_it(name: str, content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:] if name.endswith(".pyc") else content


def test_the_running_python_uses_the_compiled_forms(program: Path, server: Server) -> None:
    rewrite(program, spoil_sources)
    launch(server, *ALONE, str(program), "--env", os.devnull, "serve")
    assert fire(server, pixels(server.first_tenant(), "compiled", 5)).wrong == []
    assert terminate(server) == 0


def test_without_a_compiled_form_that_fits_it_is_the_source_that_runs(program: Path) -> None:
    def version() -> subprocess.CompletedProcess[str]:
        return run(sys.executable, *ALONE, program, "--version", cwd=program.parent)

    rewrite(program, as_if_another_python_built_it)
    assert version().returncode == 0
    rewrite(program, spoil_sources)
    assert "this source was read" in version().stderr


# == Starting it ==


@pytest.fixture
def ways(program: Path, tmp_path: Path) -> dict[str, tuple[list[object], Path, str]]:
    """Ways to start the file: words, the folder one is in, and what the program is called then."""
    python = tmp_path / "python"
    python.mkdir()
    (python / "python3").symlink_to(sys.executable)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "tracker-link").symlink_to(program)
    (elsewhere / "relative-link.pyz").symlink_to(Path("..", "bin", program.name))
    renamed = Path(shutil.copy(program, tmp_path / "bin" / "email-tracker"))
    alone = [sys.executable, *ALONE]
    path = f"{python}{os.pathsep}{os.environ['PATH']}"
    return {
        "its whole path": ([*alone, program], elsewhere, program.name),
        "its name": ([*alone, program.name], program.parent, program.name),
        "a relative path": ([*alone, Path("..", "bin", program.name)], elsewhere, program.name),
        "a link": ([*alone, "tracker-link"], elsewhere, "tracker-link"),
        "a relative link": ([*alone, elsewhere / "relative-link.pyz"], tmp_path, "relative-link.pyz"),
        "another name": ([*alone, renamed], elsewhere, "email-tracker"),
        "itself": (["env", f"PATH={path}", f"./{program.name}"], program.parent, program.name),
        "a command": (["env", f"PATH={renamed.parent}:{path}", "email-tracker"], elsewhere, "email-tracker"),
    }


def test_the_file_runs_however_it_is_called_and_goes_by_that_name(
    ways: dict[str, tuple[list[object], Path, str]],
) -> None:
    for words, folder, name in ways.values():
        misused = run(*words, "no-such-command", cwd=folder)
        assert misused.returncode == 2
        assert f"{name}: " in misused.stderr and f"usage: {name} " in misused.stderr
        assert not re.search(r"\btracker\.py\b", misused.stderr)


def test_nothing_is_written_beside_the_file(program: Path, tmp_path: Path) -> None:
    program.chmod(0o444)
    program.parent.chmod(0o555)
    before = program.read_bytes()
    try:
        database = f"sqlite:{tmp_path / 'data' / 'tracking.db'}"
        command = (sys.executable, *ALONE, program.name, "--env", os.devnull, "tenant", "add", "Acme", "--local")
        assert run(*command, cwd=program.parent, DATABASE_URL=database).returncode == 0
        assert os.listdir(program.parent) == [program.name]
        assert program.read_bytes() == before
    finally:
        program.parent.chmod(0o755)


def test_the_file_warns_of_nothing_where_warnings_are_errors(program: Path, tmp_path: Path) -> None:
    environ = {"DATABASE_URL": f"sqlite:{tmp_path / 'data' / 'tracking.db'}", "BASE_URL": "https://track.example.com"}
    for words in (("tenant", "add", "Acme", "--any-domain"), ("stats", "Acme"), ("check",), ("nginx",)):
        done = run(sys.executable, *ALONE, "-W", "error", "-X", "dev", program, *words, cwd=tmp_path, **environ)
        assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr


# == Serving ==


def test_the_file_alone_serves_and_drains_before_it_ends(program: Path, server: Server) -> None:
    here = shutil.copy(program, server.folder)
    launch(server, *ALONE, os.path.basename(here), "--env", os.devnull)  # by a relative path
    outcome = fire(server, pixels(server.first_tenant(), "alone", 50))
    assert outcome.wrong == [] and len(outcome.answered) == 50
    assert terminate(server) == 0
    assert segments(server) == []
    assert counted_keys(server) == {sent.key: 1 for sent in outcome.answered}
    assert f"{program.name} tenant show default" in server.log.read_text()
    assert set(os.listdir(server.folder)) == {program.name, "data", "server.log"}


def test_gunicorn_serves_the_tracker_in_the_file(program: Path, server: Server) -> None:
    here = Path(shutil.copy(program, server.folder)).name
    command = (sys.executable, *ALONE, here, "--env", os.devnull, "tenant", "add", "Acme", "--json")
    made = json.loads(run(*command, cwd=server.folder, **server.environ).stdout)
    gunicorn = ("-m", "gunicorn", "--no-control-socket", "--bind", server.environ["BIND"], "--workers", "2")
    launch(server, *gunicorn, "--pythonpath", here, "tracker")
    outcome = fire(server, pixels(made["mail_id"], "bare", 50))
    assert outcome.wrong == [] and len(outcome.answered) == 50
    status, _, page = get(server.port, f"/{made['id']}/dashboard")
    assert status == 200 and b"Acme" in page
    assert terminate(server) == 0
    assert counted_keys(server) == {sent.key: 1 for sent in outcome.answered}


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

    launch(server, *ALONE, str(program), "--env", os.devnull, "serve")
    if fate == "replaced":
        rewrite(program, other)  # an atomic rename
    else:
        program.unlink()
        program.write_bytes(b"no zip at all")
    [tenant] = json.loads(server.run("tenant", "list", "--json"))
    made = json.loads(server.run("tenant", "show", tenant["mail_id"], "--json"))
    for generation in range(2):  # at last by workers that were born afterwards
        outcome = fire(server, pixels(made["mail_id"], f"worker{generation}", 30))
        assert outcome.wrong == [] and outcome.broken == []
        for path in (
            *(f"/{made['id']}/dashboard", f"/{made['id']}/stats.json", f"/{made['id']}/emails.csv"),
            *(f"/{made['id']}/events.json", f"/{made['id']}/links.csv", "/health", "/", "/favicon.ico", "/robots.txt"),
        ):
            assert get(server.port, path)[0] == 200, path
        [style] = re.findall(rb"/assets/style\.\w+\.css", get(server.port, f"/{made['id']}/dashboard")[2])
        assert get(server.port, style.decode())[0] == 200
        assert get(server.port, "/nowhere/at/all")[0] == 404
        assert (
            get(server.port, f"/{made['mail_id']}/click/k?url=https://elsewhere.example/")[0] == 200
        )  # the naming page
        for nonsense, status in ((b"NONSENSE\r\n\r\n", b"400"), (b"GET / HTTP/9.9\r\n\r\n", b"505")):
            assert raw(server, nonsense).startswith((b"HTTP/1.1 " + status, b"HTTP/1.1 400"))
        old = server.workers()
        for worker in old:
            os.kill(worker, 9)
        wait_until(lambda: len(set(server.workers()) - set(old)) == 2, server)  # noqa: B023
    assert terminate(server) == 0
    assert segments(server) == []
    assert sum(counted_keys(server).values()) == 62  # with a click for each generation
    assert "Traceback" not in server.log.read_text()
    assert server.run("check") == "all is well\n"


def raw(server: Server, request: bytes) -> bytes:
    """The whole answer to these bytes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(request)
        with contextlib.suppress(ConnectionResetError):
            return b"".join(iter(lambda: connection.recv(65_536), b""))
    return b""


# == Other Pythons ==


def other_pythons() -> list[str]:
    """Pythons of other versions than this one that are on this machine, one for each, from 3.10 on."""
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    names = [str(path) for path in root.glob("versions/*/bin/python3")]
    names += [f"python3.{minor}" for minor in range(10, 20)]
    ask = "import sys; print(sys.version_info[0], sys.version_info[1], sys.version_info.releaselevel)"
    found: dict[tuple[int, int], str] = {}
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            done = subprocess.run([name, "-I", "-c", ask], capture_output=True, text=True, timeout=30)
            major, minor, level = done.stdout.split()
            if level == "final":
                found.setdefault((int(major), int(minor)), name)
    return [found[version] for version in sorted(found) if version >= (3, 10) and version != sys.version_info[:2]]


def test_the_file_runs_under_other_pythons_than_the_one_that_built_it(program: Path, tmp_path: Path) -> None:
    others = other_pythons()
    if not others:
        pytest.skip("there is no other Python from 3.10 on")
    for number, python in enumerate(others[:1] + others[1:][-1:]):  # the oldest and the newest
        folder = tmp_path / f"other{number}"
        folder.mkdir()
        server = Server(folder)
        try:

            def command(*words: str) -> str:
                done = run(python, *ALONE, program, "--env", os.devnull, *words, cwd=folder, **server.environ)  # noqa: B023
                assert done.returncode == 0, (python, done.stderr)  # noqa: B023
                return done.stdout

            assert command("--version").startswith("email-tracker ")
            made = json.loads(command("tenant", "add", "Acme", "--json"))
            launch(server, *ALONE, str(program), "--env", os.devnull, "serve", program=python)
            outcome = fire(server, pixels(made["mail_id"], "other", 20))
            assert outcome.wrong == [] and len(outcome.answered) == 20, python
            assert terminate(server) == 0
            assert os.listdir(data(server) / "spool" / "rejected") == []
            assert counted_keys(server) == {sent.key: 1 for sent in outcome.answered}
            assert command("check") == "all is well\n"
        finally:
            server.listener.close()
            server.stop()
