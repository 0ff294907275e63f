"""systemd's files, held against systemd's own tools; and its sockets, with a process that holds them as systemd does."""

from __future__ import annotations

import array
import contextlib
import http.client
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import CHROME, SERVE, Server, missing
from load import PIXEL, counted_keys, rows, segments, terminate, wait_until

import tracker

# `systemd-analyze verify` asks whether what is executed is there. Any program will do.
PYTHON = shutil.which("sh") or "/bin/sh"
COMMAND = (PYTHON, "-I", "/usr/local/bin/email-tracker")
SETTINGS_FILE = "/etc/email-tracker.env"
DATABASE = "sqlite:/var/lib/email-tracker/tracking.db"
SOCKET = "unix:/run/email-tracker/app.sock"
README = {"BASE_URL": "https://track.example.com", "BIND": SOCKET, "DATABASE_URL": DATABASE}
TYPICAL = {
    "as in the README": README,
    "on an address": {"BIND": "127.0.0.1:3000", "DATABASE_URL": DATABASE},
    "with nothing but a database": {"DATABASE_URL": "sqlite:/var/lib/customers/tracker-1/tracking.db"},
    "with PostgreSQL": {"DATABASE_URL": "postgresql://t:p@db.example/t", "DATA_FOLDER": "/var/lib/email-tracker"},
}
MOST_EXPOSED = {False: 1.0, True: 1.7}  # of 10, without and with a network; systemd calls up to 2 SAFE
CLIENTS = 8


def settings(**environ: str) -> tracker.Settings:
    return tracker.load_settings(environ, os.devnull)


def printed(name: str, environ: dict[str, str] = README, command: tuple[str, ...] = COMMAND) -> str:
    """One of the files for systemd."""
    return tracker.systemd_file(settings(**environ), name, command, SETTINGS_FILE)


def unit(name: str, environ: dict[str, str]) -> dict[str, str]:
    """The settings of a unit. Which section each stands in is systemd's to say."""
    lines = printed(name, environ).splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


# == The files ==


@pytest.fixture(params=list(TYPICAL))
def units(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    """The units as files, with settings that operators have."""
    made = {name: printed(name, TYPICAL[request.param]) for name in tracker.SYSTEMD_FILES if name != "sysusers"}
    paths = [tmp_path / re.findall("for /etc/systemd/system/(.+)[.]$", text, re.MULTILINE)[0] for text in made.values()]
    for path, text in zip(paths, made.values(), strict=True):
        path.write_text(text)
    return paths


def analyze(*words: object) -> str:
    """What systemd-analyze says, on whichever stream."""
    if shutil.which("systemd-analyze") is None:
        missing("systemd-analyze")
    command, environ = ["systemd-analyze", *map(str, words)], {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ)
    return done.stdout + done.stderr


def complaints(*paths: Path) -> list[str]:
    """What systemd has against our units. It looks at the machine's own as well, which are none of our business."""
    return [line for line in analyze("verify", "--man=no", *paths).splitlines() if "email-tracker" in line]


def test_systemd_has_nothing_against_the_units(units: list[Path]) -> None:
    assert complaints(*units) == []
    # It would say so if there were something.
    for path in units:
        path.write_text(path.read_text().replace("[Unit]", "[Unit]\nRequries=sockets.target"))
    assert len(complaints(*units)) == len(units)


def test_the_services_are_exposed_as_little_as_systemd_can_tell(units: list[Path]) -> None:
    services = [path for path in units if path.suffix == ".service"]
    for path in services:
        said = analyze("security", "--offline=true", "--no-pager", path)
        if "unrecognized option" in said:
            missing("systemd-analyze security --offline, which systemd has from 250 on,")
        found = re.search(rf"Overall exposure level for {path.name}: ([0-9.]+)", said)
        assert found and float(found[1]) <= MOST_EXPOSED["AF_INET" in path.read_text()], said
    assert len(services) == 4


def test_a_service_has_no_network_but_to_a_database_elsewhere_and_to_webhooks() -> None:
    for name in ("service", "drain.service", "deliver.service"):
        for case, environ in TYPICAL.items():
            service, away = unit(name, environ), case == "with PostgreSQL" or name == "deliver.service"
            assert service.get("PrivateNetwork") == (None if away else "yes")
            assert service["RestrictAddressFamilies"].split() == ["AF_UNIX", *(["AF_INET", "AF_INET6"] if away else [])]
            assert service["StateDirectory" if "customers" not in str(environ) else "ReadWritePaths"]


def test_the_timer_makes_a_backup_each_day_and_keeps_fourteen() -> None:
    service, calendar = printed("backup.service"), unit("backup.timer", README)["OnCalendar"]
    assert "elapse" in analyze("calendar", calendar) and re.fullmatch(r"\*-\*-\* \d\d:\d\d", calendar)
    assert f"\nExecStart={' '.join(COMMAND)} backup --keep 14 /var/lib/email-tracker-backups\n" in service
    for name in ("email-tracker", "email-tracker-backups"):
        assert f"\nStateDirectory={name}\n" in service


def test_the_user_is_made_with_the_data_folder_as_its_home(tmp_path: Path) -> None:
    if shutil.which("systemd-sysusers") is None:
        missing("systemd-sysusers")
    (tmp_path / "etc").mkdir()
    line = tmp_path / "email-tracker.conf"
    line.write_text(printed("sysusers"))
    command = ["systemd-sysusers", f"--root={tmp_path}", str(line)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    name, _, _, _, about, home, shell = (tmp_path / "etc" / "passwd").read_text().splitlines()[-1].split(":")
    assert (name, about, home) == ("email-tracker", "Email tracker", "/var/lib/email-tracker")
    assert shell.endswith("nologin")


@pytest.mark.parametrize(
    ("folder", "state"),
    [
        ("/var/lib/email-tracker", "email-tracker"),
        ("/var/lib/email-tracker/one", None),
        ("/srv/var/lib/email-tracker", None),
    ],
)
def test_the_service_may_write_in_the_data_folder_makes_it_where_systemd_can_and_is_not_stopped_before_it_has_drained(
    folder: str, state: str | None
) -> None:
    service = unit("service", {"DATABASE_URL": f"sqlite:{folder}/tracking.db"})
    assert (service.get("StateDirectory"), service.get("ReadWritePaths")) == (state, None if state else folder)
    assert int(service["TimeoutStopSec"]) > tracker.GUNICORN_TIMEOUT  # what is left is for draining the spool


@pytest.mark.parametrize(
    ("environ", "listens"),
    [
        ({"BIND": SOCKET}, "/run/email-tracker/app.sock"),
        ({"BIND": "[::1]:3000"}, "[::1]:3000"),
        ({"PORT": "8080"}, tracker.Settings(port=8080).address),
        ({"PORT": "8080", "BIND": SOCKET}, "/run/email-tracker/app.sock"),
    ],
)
def test_the_socket_listens_where_the_settings_say_and_only_the_web_server_may_connect_to_a_file(
    environ: dict[str, str], listens: str
) -> None:
    listener = unit("socket", environ)
    assert listener["ListenStream"] == listens
    assert listener.get("SocketMode") == ("0660" if listens.startswith("/") else None)
    assert listener.get("SocketGroup") in (("www-data", "nginx", "http") if listens.startswith("/") else (None,))


# == What can't work ==

HIDDEN = "/home/ann/email-tracker.pyz"


@pytest.mark.parametrize(
    ("name", "environ", "command", "env_file", "says"),
    [
        *((name, {}, (PYTHON, "-I", "/opt/a b"), "/e", "'/opt/a b': expected") for name in tracker.SYSTEMD_FILES),
        ("sysusers", {}, ("/opt/100%/python", "-I", "/t"), "/e", "'/opt/100%/python': expected"),
        ("backup.service", {}, (PYTHON, "-I", HIDDEN), "/e", f"{HIDDEN}: a service can't read what is in /home/"),
        ("service", {}, COMMAND, "/opt/$HOME/e", "'/opt/$HOME/e': expected"),
        ("service", {"DATABASE_URL": "sqlite:/opt/a;b/t.db"}, COMMAND, "/e", "'/opt/a;b': expected an absolute path"),
        ("service", {}, (PYTHON, "-I", HIDDEN), "/e", f"{HIDDEN}: a service can't read what is in /home/"),
        ("service", {}, (HIDDEN, "-I", "/t"), "/e", f"{HIDDEN}: a service can't read"),
        *(
            ("service", {"DATABASE_URL": f"sqlite:{folder}/t.db"}, COMMAND, "/e", f"{folder}: a service can't read")
            for folder in ("/home/ann/data", "/root/data", "/tmp/data", "/var/tmp/data", "/run/user/1000/data")
        ),
        ("socket", {"BIND": "unix:/run/%n.sock"}, COMMAND, "/e", "'/run/%n.sock': expected an absolute path"),
        ("socket", {"BIND": "fd://7"}, COMMAND, "/e", "BIND is fd://7; expected unix:/path or ADDRESS:PORT"),
    ],
)
def test_what_systemd_would_read_as_something_else_or_could_not_see_is_refused(
    name: str, environ: dict[str, str], command: tuple[str, ...], env_file: str, says: str
) -> None:
    with pytest.raises(tracker.BadInput, match=re.escape(says)):
        tracker.systemd_file(settings(**{**README, **environ}), name, command, env_file)


@pytest.mark.parametrize("bind", ["localhost:3000", "*:3000"])
def test_a_host_that_systemd_can_not_listen_on_is_refused_or_made_an_address(bind: str, tmp_path: Path) -> None:
    """systemd looks no names up: "Failed to parse address value", and then the socket does not start."""
    path = tmp_path / "email-tracker.socket"
    with contextlib.suppress(tracker.BadInput, tracker.SettingsError):
        path.write_text(printed("socket", {"BIND": bind}))
        assert [line for line in complaints(path) if "address" in line] == []


@pytest.mark.parametrize("database", ["sqlite:data/tracking.db", "postgresql://t@db.example/t"])
def test_a_relative_data_folder_is_refused(
    database: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", database)
    assert tracker.main(["--env", os.devnull, "systemd", "socket", "--program", "/usr/local/bin/email-tracker"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and "expected an absolute path" in said.err and SETTINGS_FILE in said.err


@pytest.mark.parametrize("name", tracker.SYSTEMD_FILES)
def test_the_command_prints_each_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "settings.env").write_text("".join(f"{key}={value}\n" for key, value in README.items()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", PYTHON)
    for variable in README:
        monkeypatch.delenv(variable, raising=False)
    assert tracker.main(["--env", "settings.env", "systemd", name, "--program", COMMAND[-1]]) == 0
    expected = tracker.systemd_file(settings(**README), name, COMMAND, str(tmp_path / "settings.env"))
    said = capsys.readouterr()
    assert (said.out, said.err) == (expected, "")


# == A socket that is held for it ==

# What systemd does between fork and exec: the socket becomes descriptor 3, LISTEN_PID the process's own.
AS_SYSTEMD = """\
import os, sys
held = int(sys.argv[1])
if held != 3:
    os.dup2(held, 3)
    os.close(held)
os.set_inheritable(3, True)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"""


class Activated(Server):
    """A server whose socket the test holds, as systemd would, over as many starts as there are."""

    def __init__(self, folder: Path, listener: socket.socket, bind: str, **settings: str) -> None:
        super().__init__(folder, BASE_URL="http://tracker.test", BIND=bind, **settings)
        self.listener.close()
        self.listener = listener
        self.log.touch()
        self.notifications = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notifications.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.notifications.bind(str(folder / "notify"))
        self.notifications.settimeout(20)

    def start(self) -> Activated:
        """Start, and wait until it says that it is ready, as the unit's Type=notify does."""
        environ = {**self.environ, "NOTIFY_SOCKET": str(self.folder / "notify")}
        program = (sys.executable, "-I", "-S", "-c", AS_SYSTEMD, str(self.listener.fileno()))
        self.launch(*program, *SERVE, env=environ)
        assert self.process is not None
        state, sender = self.notification()
        assert "READY=1" in state.splitlines(), state
        assert sender == self.process.pid  # systemd would not hear anybody else: NotifyAccess=main
        return self

    def notification(self) -> tuple[str, int]:
        """What the server says to systemd, and which process says it."""
        size = struct.calcsize("3i")
        try:
            message, ancillary, _, _ = self.notifications.recvmsg(4096, socket.CMSG_SPACE(size))
        except TimeoutError:
            raise AssertionError(f"it never said that it is ready:\n{self.log.read_text()}") from None
        [(_, _, credentials)] = ancillary
        return message.decode(), array.array("i", credentials[:size])[0]

    def get(self, path: str, address: str = "198.18.0.1") -> tuple[int, bytes]:
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection("tracker.test", timeout=60)
        connection.sock = socket.socket(self.listener.family)
        connection.sock.settimeout(60)
        connection.sock.connect(self.listener.getsockname())
        with contextlib.closing(connection):
            connection.request("GET", path, headers={"User-Agent": CHROME, "X-Forwarded-For": address})
            with connection.getresponse() as answer:  # where the body breaks off, it still holds the socket
                return answer.status, answer.read()

    def close(self) -> None:
        self.listener.close()
        self.stop()
        self.notifications.close()


@pytest.fixture(params=["unix", "TCP"])
def activated(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Activated]:
    """A server that is not started yet; BIND says where its socket listens, as in the settings file of the service."""
    if request.param == "unix":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "app.sock"))
        listener.listen(128)
        made = Activated(tmp_path, listener, f"unix:{tmp_path}/app.sock")
    else:
        listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        made = Activated(tmp_path, listener, f"127.0.0.1:{listener.getsockname()[1]}")
    yield made
    made.close()


def identity(server: Activated) -> tuple[int, int] | None:
    """Which file the socket is, if it is one: the one that was bound at first, or another in its place."""
    if server.listener.family != socket.AF_UNIX:
        return None
    found = os.stat(server.listener.getsockname())
    return found.st_ino, found.st_mode


def test_a_server_serves_on_the_socket_it_is_given_believes_the_proxy_and_leaves_it(activated: Activated) -> None:
    before = identity(activated)
    activated.environ["IP_ADDRESSES"] = "full"
    activated.start()
    mail_id = activated.first_tenant()
    for number in range(20):  # each is answered at once: what is ready can serve
        assert activated.get(f"/{mail_id}/pixel/given-{number}.gif", "203.0.113.9") == (200, PIXEL)
    assert identity(activated) == before
    assert terminate(activated) == 0
    assert identity(activated) == before
    assert segments(activated) == []
    assert counted_keys(activated) == {f"given-{number}": 1 for number in range(20)}
    assert rows(activated, "select distinct address from event_details") == [("203.0.113.9",)]
    with contextlib.closing(socket.socket(activated.listener.family)) as client:
        client.connect(activated.listener.getsockname())  # and waits for the next start


@pytest.mark.parametrize("activated", ["TCP"], indirect=True)
def test_what_bind_says_is_not_tried_where_a_socket_is_given(activated: Activated) -> None:
    activated.environ["BIND"] = "unix:/proc/no/such/folder/app.sock"  # nobody could
    activated.start()
    assert activated.get("/health")[0] == 200
    assert "/proc/no" not in activated.log.read_text()


@pytest.mark.parametrize("activated", ["TCP"], indirect=True)
def test_a_socket_that_was_given_to_another_process_is_not_taken(activated: Activated) -> None:
    """A command that the service's own environment reaches must say that the port is taken, not serve beside it."""
    activated.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": "1"}
    with pytest.raises(AssertionError, match="choose another PORT") as failed:
        activated.run("serve")
    assert "Retrying" not in str(failed.value)  # as gunicorn would, eleven times


def test_a_restart_under_load_loses_no_connection_and_no_hit(activated: Activated) -> None:
    activated.start()
    mail_id = activated.first_tenant()
    before = identity(activated)
    answered: list[str] = []
    finished = threading.Event()

    def client(name: int) -> None:
        while not finished.is_set():
            key = f"client-{name}-{len(answered)}"
            assert activated.get(f"/{mail_id}/pixel/{key}.gif") == (200, PIXEL)
            answered.append(key)

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client, name) for name in range(CLIENTS)]
        try:
            wait_until(lambda: len(answered) >= 100 or any(each.done() for each in clients), activated)
            assert terminate(activated) == 0
            silent = len(answered)
            time.sleep(0.05)  # all clients wait in the socket now
            assert identity(activated) == before
            assert len(answered) - silent <= CLIENTS  # nobody answers: it was a stop
            activated.start()
            enough = len(answered) + 100
            wait_until(lambda: len(answered) >= enough or any(each.done() for each in clients), activated)
        finally:
            finished.set()
    for each in clients:
        each.result()  # raises what it was ended by
    assert terminate(activated) == 0
    assert identity(activated) == before
    assert segments(activated) == []
    assert counted_keys(activated) == Counter(answered)
    assert activated.run("check") == "all is well\n"


@pytest.mark.parametrize("activated", ["unix"], indirect=True)
def test_what_waits_in_the_socket_of_a_server_that_was_killed_is_answered_by_the_next(activated: Activated) -> None:
    activated.start()
    mail_id = activated.first_tenant()
    activated.kill()
    with ThreadPoolExecutor(60) as pool:
        paths = [f"/{mail_id}/pixel/waits-{number}.gif" for number in range(60)]
        waiting = [pool.submit(activated.get, path) for path in paths]
        time.sleep(0.1)
        assert not any(each.done() for each in waiting)
        activated.start()
    assert [each.result() for each in waiting] == [(200, PIXEL)] * 60
    assert terminate(activated) == 0
    assert counted_keys(activated) == {f"waits-{number}": 1 for number in range(60)}
