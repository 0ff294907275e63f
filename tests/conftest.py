"""The cast and the stage: Acme and Globex are tenants, the stranger has no id; each test has a database of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count, islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest
import webtest
from aiosmtpd.controller import Controller

import tracker

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
BASE = "https://track.example.com"
CHROME = (
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/142.0.0.0 Safari/537.36"
)
OPERATOR_KEY = "the-operators-own-key"
LOCAL_NAME = "localhost"  # else both ends of SMTP ask the DNS who they are, which may take long
PROGRAM = (sys.executable, str(ROOT / "tracker.py"), "--env", os.devnull)
SERVE = (*PROGRAM, "serve")
NOW = 1_795_544_485_430  # a Tuesday in November 2026
# Steps at which something may fail are many and slow to try: each run tries a third, the three runs of .ci/run try all.
THIRD = int(os.environ.get("THIRD", "0"))
T = TypeVar("T")
# A folder in memory, where there is such a thing with room.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > 1 << 30 else None
ON_SQLITE = partial(pytest.param, marks=pytest.mark.sqlite)  # one of many examples, which is enough there


def a_third(steps: Iterable[T]) -> Iterator[T]:
    """Every third of them, from the first, the second or the third on, as THIRD says: 0, 1 or 2."""
    return islice(steps, THIRD, None, 3)


def missing(what: str) -> None:
    """Skip for a missing tool, but not where CI promises that it is there."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is missing, and CI must have it")
    pytest.skip(f"{what} is missing")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Other people's real material, which is beside the project and not in it."""
    if not SHARED.is_dir():
        pytest.skip("the folder with other people's mail and user agents is not there")
    return SHARED


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory, where there is such a thing: what a process leaves behind is the same, and a sync costs nothing."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A disk of 64 KB in the place of a folder."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        missing("the right to mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def faults_of(database: tracker.Database) -> list[str]:
    """What `check` finds wrong with the numbers."""
    with database.reading() as connection:
        return tracker.integrity_faults(connection) + tracker.rollup_differences(connection)


def another_database(path: Path) -> None:
    """A database that belongs to nothing here."""
    with tracker.building(str(path)):
        pass


READY = "a database that has its tables"


class Engine(Protocol):
    """Where a test's databases are: the settings of a new one in a folder, or of a copy of another."""

    def __call__(self, folder: Path, model: str = "") -> dict[str, str]: ...


def on_sqlite(folder: Path, model: str = "") -> dict[str, str]:
    return {"DATABASE_URL": f"sqlite:{folder / 'data' / 'tracking.db'}"}


@dataclass
class Stage:
    """A database with Acme (domain acme.com) and Globex (any domain), and an App over it without a drain thread."""

    settings: tracker.Settings
    app: tracker.App
    acme: tracker.Tenant
    globex: tracker.Tenant
    web: webtest.TestApp
    engine: Engine = on_sqlite
    database: tracker.Database = field(init=False)

    def __post_init__(self) -> None:
        self.database = self.app.database

    @property
    def folder(self) -> Path:
        return Path(self.settings.folder)

    @property
    def spool(self) -> Path:
        return self.folder / "spool"

    def pixel(self, key: str, tenant: tracker.Tenant | None = None, agent: str = CHROME, **more: Any) -> Any:
        """One open."""
        return self.web.get(f"/{(tenant or self.acme).mail_id}/pixel/{key}.gif", headers={"User-Agent": agent}, **more)

    def spread(self, seconds: float) -> None:
        """Give the hits that wait times so far apart, the last as it is: a test makes many in a moment, a person doesn't."""
        self.app.spool.close()
        paths = sorted(self.spool.glob("*.jsonl"))
        hits = [(path, json.loads(line)) for path in paths for line in path.read_bytes().splitlines()]
        for path in paths:
            path.write_bytes(b"")
        for later, (path, line) in zip(reversed(range(len(hits))), hits, strict=True):
            line["t"] = round(hits[-1][1]["t"] - later * seconds, 3)
            with path.open("ab") as file:
                file.write(tracker.hit_line(line))

    def drain(self) -> tracker.Drain:
        """Drain, as if every writer had gone."""
        self.app.spool.close()
        return tracker.drain(self.database)

    def health(self) -> dict[str, Any]:
        """What /health says as soon as whoever drains has looked."""
        tracker.Drainer(self.database).turn()
        said: dict[str, Any] = self.web.get("/health").json
        return said

    def rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """Ask the database."""
        with self.database.reading() as connection:
            return [tuple(row) for row in connection.execute(sql, values)]

    def check(self) -> list[str]:
        """What `check` finds wrong with the numbers."""
        return faults_of(self.database)

    def change(self, tenant: tracker.Tenant, **changes: Any) -> None:
        """Change a tenant, and let the app see it at once."""
        with tracker.changing_tenants(self.database) as connection:
            for rule in tracker.RULES:
                tracker.set_tenant_rules(connection, tenant.number, rule, changes.pop(rule, []))
            tracker.change_tenant(connection, tenant.number, **changes)
            if "tz" in changes:
                tracker.count_days_anew(connection, tenant.number)
        self.refresh()

    def another(self) -> tracker.Database:
        """The database, as another process has it."""
        return tracker.open_database(self.settings)

    @contextlib.contextmanager
    def copied(self, folder: Path) -> Iterator[tracker.Settings]:
        """The settings of a copy of the database, which nobody has open, and of what belongs to it, for a while."""
        shutil.copytree(self.folder, folder / "data")
        made = tracker.load_settings({"BASE_URL": BASE, **self.engine(folder, self.settings.database)}, os.devnull)
        yield made
        shutil.rmtree(folder)
        if made.is_shared:
            execute_on_server(made.database, f"drop database {name_of(made.database)} with (force)")

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let commands in this process work on the stage's database."""
        is_shared, database = self.settings.is_shared, self.settings.database
        monkeypatch.setenv("DATABASE_URL", database if is_shared else f"sqlite:{database}")
        if self.settings.data_folder:
            monkeypatch.setenv("DATA_FOLDER", self.settings.data_folder)

    def refresh(self) -> None:
        """Let the app look at tenants.json now, not in a second."""
        self.app.directory._look_at = 0.0


class Postgres:
    """A PostgreSQL server of the session's own, and databases in it."""

    def __init__(self, folder: str) -> None:
        self.folder, self._made, self._numbers = folder, list[str](), count(1)
        shutil.chown(folder, "postgres", "postgres")
        self._run("initdb", "-D", f"{folder}/data", "-A", "trust", "-N", "-E", "UTF8", "--locale=C.UTF-8")
        self.start()

    def _run(self, program: str, *words: str) -> None:
        subprocess.run(as_postgres(program, *words), check=True, cwd=self.folder, stdout=subprocess.DEVNULL)

    def start(self) -> None:
        """Start it; it listens on a socket in its folder."""
        options = f"-k {self.folder} -c listen_addresses='' -c fsync=off -c jit=off"
        self._run("pg_ctl", "-D", f"{self.folder}/data", "-o", options, "-l", f"{self.folder}/log", "-w", "start")

    def stop(self) -> None:
        """Stop it at once; who is connected loses the connection."""
        self._run("pg_ctl", "-D", f"{self.folder}/data", "-m", "immediate", "stop")

    def psql(self, *words: str) -> list[str]:
        """A command that runs statements."""
        return as_postgres("psql", "-h", self.folder, "-v", "ON_ERROR_STOP=0", "-q", "-X", "postgres", *words)

    @cached_property
    def ready(self) -> str:
        """A database that has its tables: a copy of it is made sooner than tables are."""
        with tempfile.TemporaryDirectory() as folder:
            tracker.Postgres(url := self.make(), folder).build()
        self._made.remove(url)
        return url

    def make(self, model: str = "") -> str:
        """The URL of a new database, or of a copy of another that nobody has open."""
        name = f"test{next(self._numbers)}"
        template = name_of(self.ready if model == READY else model) if model else "template1"
        url = f"postgresql://postgres@/{name}?host={self.folder}"
        execute_on_server(url, f"create database {name} template {template} strategy file_copy")
        self._made.append(url)
        return url

    def drop(self) -> None:
        """Remove what was made so far, whoever is connected."""
        while self._made:
            url = self._made.pop()
            execute_on_server(url, f"drop database if exists {name_of(url)} with (force)")


def name_of(url: str) -> str:
    """The name of a database that a test made."""
    [name] = re.findall("/(test[0-9]+)", url)
    return str(name)


def execute_on_server(url: str, sql: str) -> None:
    """Run a statement where a database is, but not in it."""
    psycopg = importlib.import_module("psycopg")
    with contextlib.closing(psycopg.connect(url, dbname="postgres", autocommit=True)) as connection:
        connection.execute(sql)


def as_postgres(program: str, *words: str) -> list[str]:
    """A command of PostgreSQL, run as the user that it wants to be."""
    servers = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not servers or os.geteuid() or "postgres" not in [each.pw_name for each in pwd.getpwall()]:
        missing("PostgreSQL, and root to start it")
    return ["runuser", "-u", "postgres", "--", str(servers[-1].parent / program), *words]


# Its end does not depend on ours: however that comes, the pipe from us is closed then.
AFTERWARDS = 'folder=$1; shift; read -r _; "$@" >/dev/null 2>&1; rm -rf "$folder"'


@contextlib.contextmanager
def running_postgres() -> Iterator[Postgres]:
    """A PostgreSQL for a while. Nothing is left of it, even where we are killed, with all that we started."""
    if importlib.util.find_spec("psycopg") is None:
        missing("psycopg")
    folder = tempfile.mkdtemp(prefix="postgres-", dir=MEMORY)
    stop = as_postgres("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")
    afterwards = ["sh", "-c", AFTERWARDS, "sh", folder, *stop]
    with subprocess.Popen(afterwards, stdin=subprocess.PIPE, start_new_session=True, cwd="/"):
        yield Postgres(folder)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A running PostgreSQL."""
    with running_postgres() as made:
        yield made


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests in files that say BOTH_ENGINES run on each."""
    if "engine" in metafunc.fixturenames:
        both = getattr(metafunc.module, "BOTH_ENGINES", False)
        metafunc.parametrize("engine", ("sqlite", "postgresql")[: 1 + both], indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs PostgreSQL, so that it can be left out; and take out what is marked as SQLite's alone."""
    for item in [*items]:
        on_postgres = "[postgresql" in item.name
        if on_postgres and item.get_closest_marker("sqlite"):
            items.remove(item)
        elif on_postgres or "postgres" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.postgresql)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Where a test's database is."""
    if request.param == "sqlite":
        yield on_sqlite
    else:
        postgres = request.getfixturevalue("postgres")
        yield lambda folder, model="": {"DATABASE_URL": postgres.make(model), "DATA_FOLDER": str(folder / "data")}
        postgres.drop()


def make_stage(folder: Path, engine: Engine = on_sqlite, **settings: str) -> Stage:
    """A stage in a folder; settings by their variables."""
    made = tracker.load_settings({"BASE_URL": BASE, **engine(folder, READY), **settings}, os.devnull)
    database = tracker.open_database(made, make=True)
    with tracker.changing_tenants(database) as connection:
        acme = tracker.add_tenant(connection, "Acme", NOW, allow=["acme.com"])
        globex = tracker.add_tenant(connection, "Globex", NOW, any_domain=True)
    database.close()
    app = tracker.App(made)
    return Stage(made, app, acme, globex, webtest.TestApp(tracker.wsgi(app)), engine)


@pytest.fixture
def stage(tmp_path: Path, engine: Engine) -> Iterator[Stage]:
    """A fresh stage."""
    made = make_stage(tmp_path, engine)
    yield made
    made.app.close()


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A stage that is asked for what it refuses, and so stays as it is: one for all such questions of a file."""
    made = make_stage(tmp_path_factory.mktemp("still"), API_KEY=OPERATOR_KEY)
    yield made
    made.app.close()


@pytest.fixture
def staged(tmp_path: Path, engine: Engine) -> Iterator[Callable[..., Stage]]:
    """Makes stages with settings of the test's own."""
    made: list[Stage] = []

    def make(**settings: str) -> Stage:
        made.append(make_stage(tmp_path / f"stage{len(made)}", engine, **settings))
        return made[-1]

    yield make
    for each in made:
        each.app.close()


def hit(stage: Stage, key: str, at: int = NOW, **more: Any) -> bytes:
    """A line of the spool for Acme: an open by Chrome unless told otherwise; `at` in milliseconds."""
    fields: dict[str, Any] = {
        "id": os.urandom(12).hex(),
        "t": at / 1000,
        "method": "GET",
        "host": "track.example.com",
        "uri": f"/{stage.acme.mail_id}/pixel/{key}.gif",
        "ip": "198.51.100.0",
        "ua": CHROME,
        "answer": "pixel",
    }
    fields.update(more)
    return tracker.hit_line(fields)


def click(stage: Stage, key: str, url: str = "https://acme.com/", at: int = NOW, **more: Any) -> bytes:
    """A line of the spool for a click in Acme's mail that was redirected."""
    uri = f"/{stage.acme.mail_id}/click/{key}?url={url}"
    return hit(stage, key, at, **{"uri": uri, "answer": "302", **more})


def segment(stage: Stage, *lines: bytes, at: int = NOW) -> Path:
    """A finished segment of these lines."""
    path = stage.spool / f"{at:013d}-{os.getpid()}-{os.urandom(6).hex()}.jsonl"
    path.write_bytes(b"".join(lines))
    return path


def hears_signals(worker: int) -> bool:
    """Whether a worker is past the moment after its birth in which gunicorn would lose a signal, and then wait 30 s.

    SIGABRT is the last that a worker learns to catch, and its master never does.
    """
    with contextlib.suppress(OSError):
        caught = Path(f"/proc/{worker}/status").read_text().partition("SigCgt:")[2].split()[0]
        return bool(int(caught, 16) >> (signal.SIGABRT - 1) & 1)
    return False


class Server:
    """The real server: `tracker.py serve` under gunicorn, in a folder of its own, on a free port."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        plain = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "CI", "TMPDIR")}
        self.environ = {
            **plain,
            "DATABASE_URL": f"sqlite:{folder / 'data' / 'tracking.db'}",
            "BASE_URL": self.url,
            # Handing over the listening socket leaves no moment in which another process could take the port.
            "BIND": f"fd://{self.listener.fileno()}",
            **settings,
        }
        self.is_shared = "DATA_FOLDER" in self.environ
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        """Start and wait until there is a worker."""
        self.launch(*SERVE)
        return self

    def launch(self, *command: str, **options: Any) -> None:
        """Start by a command and wait until there is a worker."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                pass_fds=[self.listener.fileno()],
                **{"env": self.environ, "cwd": self.folder, **options},
            )
        deadline = time.monotonic() + 20
        # Where it asks PostgreSQL first, a child of its master is no sign yet: to find libpq, one runs for a moment.
        while not (any(map(hears_signals, self.workers())) if self.is_shared else self.workers()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the server did not start:\n{self.log.read_text()}")
            time.sleep(0.02)

    def workers(self) -> list[int]:
        """The process ids of the workers that live."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children]

    def stop(self) -> str:
        """SIGTERM, wait, and return the log."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(timeout=60)
        self.process = None
        return self.log.read_text()

    def kill(self) -> None:
        """It dies at once, master and workers."""
        assert self.process is not None
        for pid in (self.process.pid, *self.workers()):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def demo(self) -> str:
        """Fill the server's database, which must be empty, with made-up mail; returns the URL of the shop, its first tenant."""
        command = [sys.executable, str(ROOT / "tests" / "demo.py")]
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=120, cwd=self.folder)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[2].removesuffix("/dashboard")

    def run(self, *words: str, status: int = 0, **settings: str) -> str:
        """Run a command of tracker.py on the server's database; returns its stdout."""
        environ = {**self.environ, **settings}
        done = subprocess.run(
            [*PROGRAM, *words], env=environ, capture_output=True, text=True, timeout=120, cwd=self.folder
        )
        assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def tenant(self, name: str, *options: str, keyed: bool = False) -> dict[str, Any]:
        """Make a tenant, to write for whom needs no API key unless it is asked for; returns its ids and URLs."""
        how = options if keyed or "--id" in options else (*options, "--open-writing")
        made: dict[str, Any] = json.loads(self.run("tenant", "add", name, "--json", *how))
        return made

    def first_tenant(self) -> str:
        """The mail id of the tenant that the first run made."""
        match = re.search(r"^(\S+) .* default$", self.run("tenant", "list"), re.MULTILINE)
        assert match
        return match[1]


@pytest.fixture
def server(tmp_path: Path, engine: Engine) -> Iterator[Server]:
    """A running server with two workers."""
    made = Server(tmp_path, **engine(tmp_path)).start()
    yield made
    made.stop()
    made.listener.close()


@pytest.fixture
def servers(tmp_path: Path, engine: Engine) -> Iterator[Callable[..., Server]]:
    """Makes servers that are not started yet, each in a folder of its own."""
    made: list[Server] = []

    def make(**settings: str) -> Server:
        folder = tmp_path / f"server{len(made)}"
        folder.mkdir()
        made.append(Server(folder, **{**engine(folder), **settings}))
        return made[-1]

    yield make
    for each in made:
        each.listener.close()
        if each.process is not None:
            each.stop()


def without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every setting of the tracker out of the environment, as a value or as the name of a file."""
    for each in dataclasses.fields(tracker.Settings):
        if "variable" in each.metadata:
            monkeypatch.delenv(each.metadata["variable"], raising=False)
            monkeypatch.delenv(f"{each.metadata['variable']}_FILE", raising=False)


class Mailbox:
    """An SMTP server that keeps what it is given, as it was on the wire."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802  # aiosmtpd's name
        self.received.append(envelope.content)
        return "250 OK"


class OnOurSocket(Controller):
    """A controller that serves a socket which listens already, so that no other process can take the port."""

    def _create_server(self) -> Awaitable[Any]:
        return self.loop.create_server(self._factory_invoker, sock=self.handler.listener)


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    """A running SMTP server on loopback."""
    box = Mailbox()
    controller = OnOurSocket(box, hostname="127.0.0.1", port=box.port, server_hostname=LOCAL_NAME)
    controller.start()
    yield box
    controller.stop()
    box.listener.close()
