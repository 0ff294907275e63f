"""Settings: what the operator says through the environment, an env file and secret files, and every way to get it wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

import tracker

SECRET = "0123456789abcdef0123456789abcdef"
VARIABLES = [each.metadata["variable"] for each in fields(tracker.Settings) if "variable" in each.metadata]


def load(environ: Mapping[str, str], env_file: str | Path = os.devnull) -> tracker.Settings:
    """Load settings without the env file that a machine may have at its usual place."""
    return tracker.load_settings(environ, str(env_file))


def faults(environ: Mapping[str, str], env_file: str | Path = os.devnull) -> list[str]:
    """What is wrong with these settings."""
    with pytest.raises(tracker.SettingsError) as caught:
        load(environ, env_file)
    assert str(caught.value) == "\n".join(caught.value.faults)
    return caught.value.faults


# -- Values


def test_without_any_setting_the_defaults_are_those_of_the_contract() -> None:
    settings = load({})
    assert (settings.port, settings.bind, settings.database) == (3000, None, "data/tracking.db")
    assert (settings.base_url, settings.web_concurrency) == (None, 2)
    assert (settings.api_key, settings.secret_key) == (None, None)
    assert settings.forwarded_allow_ips == ("127.0.0.1", "::1")
    assert settings.ip_addresses == "truncated"
    assert settings.address == "0.0.0.0:3000"


@pytest.mark.parametrize(
    "variable, text, name, expected",
    [
        ("PORT", "1", "port", 1),
        ("PORT", "65535", "port", 65535),
        ("PORT", " 8080\n", "port", 8080),
        ("PORT", "", "port", 3000),
        ("PORT", "  ", "port", 3000),
        ("BIND", "127.0.0.1:3000", "bind", "127.0.0.1:3000"),
        ("BIND", "localhost:80", "bind", "localhost:80"),
        ("BIND", "[::1]:3000", "bind", "[::1]:3000"),
        ("BIND", "unix:/run/email-tracker/app.sock", "bind", "unix:/run/email-tracker/app.sock"),
        ("BIND", "fd://3", "bind", "fd://3"),
        ("DATABASE_URL", "sqlite:data/tracking.db", "database", "data/tracking.db"),
        ("DATABASE_URL", "sqlite:t.db", "database", "t.db"),
        ("DATABASE_URL", "sqlite:./t.db", "database", "./t.db"),
        ("DATABASE_URL", "sqlite:/srv/t.db", "database", "/srv/t.db"),
        ("DATABASE_URL", "sqlite:////srv/t.db", "database", "/srv/t.db"),
        ("DATABASE_URL", "sqlite:/srv/a b/ü.db", "database", "/srv/a b/ü.db"),
        ("BASE_URL", "https://track.example.com", "base_url", "https://track.example.com"),
        ("BASE_URL", "https://track.example.com/", "base_url", "https://track.example.com"),
        ("BASE_URL", "HTTPS://Track.Example.COM:8443", "base_url", "https://track.example.com:8443"),
        ("BASE_URL", "http://localhost:3000", "base_url", "http://localhost:3000"),
        ("BASE_URL", "http://192.0.2.1", "base_url", "http://192.0.2.1"),
        ("BASE_URL", "http://[::1]:3000", "base_url", "http://[::1]:3000"),
        ("WEB_CONCURRENCY", "1", "web_concurrency", 1),
        ("WEB_CONCURRENCY", "64", "web_concurrency", 64),
        ("API_KEY", "abcdefghijklmnop", "api_key", "abcdefghijklmnop"),
        ("API_KEY", "!" * 16, "api_key", "!" * 16),
        ("SECRET_KEY", SECRET, "secret_key", (SECRET,)),
        ("SECRET_KEY", f"{SECRET},{SECRET[::-1]}", "secret_key", (SECRET, SECRET[::-1])),
        ("SECRET_KEY", f" {SECRET} ,\n{SECRET[::-1]} ", "secret_key", (SECRET, SECRET[::-1])),
        ("FORWARDED_ALLOW_IPS", "*", "forwarded_allow_ips", ("*",)),
        ("FORWARDED_ALLOW_IPS", "10.0.0.0/8, ::1", "forwarded_allow_ips", ("10.0.0.0/8", "::1")),
        ("IP_ADDRESSES", "truncated", "ip_addresses", "truncated"),
        ("IP_ADDRESSES", "full", "ip_addresses", "full"),
        ("IP_ADDRESSES", "none", "ip_addresses", "none"),
    ],
)
def test_a_good_value_is_taken(variable: str, text: str, name: str, expected: Any) -> None:
    assert getattr(load({variable: text}), name) == expected


BAD = {
    "PORT": (
        "expected a whole number from 1 to 65535",
        ("0", "65536", "-1", "+80", "80.0", "eighty", "\uff18", "1" * 5000),
    ),
    "WEB_CONCURRENCY": ("expected a whole number from 1 to 64", ("0", "65", "auto")),
    "BIND": (
        "expected unix:/path/to/socket or HOST:PORT",
        (
            *("3000", "127.0.0.1", "127.0.0.1:", ":3000", "unix:", "unix:app.sock", "/run/app.sock", "::1:3000"),
            *("http://127.0.0.1:3000", "127.0.0.1:port", "a b:1", "127.0.0.1:65536", "fd://x"),
        ),
    ),
    "DATABASE_URL": (
        "expected sqlite:PATH, for example sqlite:data/tracking.db",
        (
            "data/t.db",
            "sqlite",
            "sqlite:",
            "sqlite::memory:",
            "postgresql://host/db",
            "sqlite:x?mode=ro",
            "sqlite:a\0b",
        ),
    ),
    "BASE_URL": (
        "expected http:// or https:// and a host, without a path",
        (
            *("track.example.com", "https://", "https:///", "ftp://track.example.com", "//track.example.com"),
            *("https://track.example.com/mail", "https://track.example.com//", "https://track.example.com?a=b"),
            *("https://track.example.com#a", "https://user:pw@track.example.com", "https://track example.com"),
            *("https://b\u00fccher.example", "https://track.example.com:", "https://track.example.com:0"),
            *("https://track..example.com", "https://.", "https://-", "https://[::1", "https://[:::]"),
        ),
    ),
    "API_KEY": ("expected at least 16 characters without spaces", ("short", "a b" * 9, "ü" * 20)),
    "SECRET_KEY": (
        "expected keys of at least 32 characters, newest first",
        # The last is as the environment gives what is not UTF-8: lone surrogates, which nothing can encode later.
        ("short", SECRET[:31], f"{SECRET},short", f"{SECRET} {SECRET[:31]}", os.fsdecode(b"\xff" * 40)),
    ),
    "FORWARDED_ALLOW_IPS": (
        "expected addresses or networks such as 10.0.0.0/8, or *",
        ("localhost", "10.0.0.0/33", "10.0.0.1/8", "::1, nginx", "**", "unix:"),
    ),
    "IP_ADDRESSES": ("expected one of: truncated, full, none", ("yes", "FULL", "truncate", "full none")),
}


@pytest.mark.parametrize("variable", BAD)
def test_a_bad_value_is_refused_with_what_was_expected(variable: str) -> None:
    expected, texts = BAD[variable]
    for text in texts:
        (fault,) = faults({variable: text})
        assert fault.startswith(variable) and expected in fault, text


@pytest.mark.parametrize("variable, text", [("PORT", "eighty"), ("BASE_URL", "nowhere"), ("IP_ADDRESSES", "some")])
def test_a_fault_shows_the_value_that_is_wrong(variable: str, text: str) -> None:
    assert faults({variable: text})[0].startswith(f"{variable} is '{text}': ")


@pytest.mark.parametrize("variable", ["API_KEY", "SECRET_KEY"])
def test_a_fault_does_not_show_a_secret(variable: str, tmp_path: Path) -> None:
    for environ in ({variable: "hush hush"}, {f"{variable}_FILE": str(tmp_path / "secret")}):
        (tmp_path / "secret").write_text("hush hush")
        (fault,) = faults(environ)
        assert "hush" not in fault
        assert fault.startswith(f"{variable}: expected")


@pytest.mark.parametrize("text", ["sqlite:///x.db", "sqlite:///srv/x.db", "sqlite://x.db", "sqlite://srv/x.db"])
def test_a_database_that_could_be_in_two_places_is_refused(text: str) -> None:
    """Programs differ on whether sqlite:///x is absolute; a guess would start a second, empty database."""
    (fault,) = faults({"DATABASE_URL": text})
    assert f"{text} can be read in two ways" in fault
    assert "expected sqlite:PATH" in fault


def test_retention_that_this_version_does_not_have_is_refused_and_not_ignored() -> None:
    (fault,) = faults({"RETENTION_DAYS": "90"})
    assert fault.startswith("RETENTION_DAYS: ")
    assert "expects" in fault


def test_all_faults_are_reported_at_once() -> None:
    assert set(BAD) == set(VARIABLES), "a new setting belongs into this test"
    found = faults({variable: texts[0] for variable, (_, texts) in BAD.items()})
    assert [re.split("[ :]", fault)[0] for fault in found] == VARIABLES
    assert all("expected" in fault for fault in found)


def test_other_variables_of_the_environment_do_not_matter() -> None:
    assert load({"port": "0", "PORTS": "x", "LANG": "C", "DATABASE": "x"}) == load({})


# -- Where it listens, where it keeps its files, what it is called


def test_bind_wins_over_port() -> None:
    assert load({"PORT": "8080"}).address == "0.0.0.0:8080"
    assert load({"PORT": "8080", "BIND": "unix:/run/a.sock"}).address == "unix:/run/a.sock"


def test_everything_is_kept_beside_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load({}).folder == str(tmp_path / "data")
    assert load({"DATABASE_URL": "sqlite:t.db"}).folder == str(tmp_path)
    assert load({"DATABASE_URL": "sqlite:/srv/mail/t.db"}).folder == "/srv/mail"


@pytest.mark.parametrize(
    "environ, local, tracking_host, expected",
    [
        ({}, False, None, None),
        ({}, True, None, "http://localhost:3000"),
        ({"PORT": "8080"}, True, None, "http://localhost:8080"),
        ({"BASE_URL": "https://t.example"}, False, None, "https://t.example"),
        ({"BASE_URL": "https://t.example"}, True, None, "https://t.example"),
        ({}, False, "news.acme.com", "https://news.acme.com"),
        ({"BASE_URL": "https://t.example:8443"}, False, "news.acme.com", "https://news.acme.com"),
        ({"BASE_URL": "http://t.example"}, False, "news.acme.com", "http://news.acme.com"),
    ],
)
def test_links_begin_with_a_public_address_or_with_none(
    environ: dict[str, str], local: bool, tracking_host: str | None, expected: str | None
) -> None:
    """A mailing full of localhost links can't be called back, so there is no address by accident."""
    assert tracker.load_settings(environ, os.devnull, local=local).public_url(tracking_host) == expected


# -- Secret files


@pytest.mark.parametrize("variable", ["API_KEY", "SECRET_KEY"])
def test_a_secret_may_be_read_from_a_file(variable: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    settings = load({f"{variable}_FILE": str(tmp_path / "secret")})
    assert settings.api_key == (SECRET if variable == "API_KEY" else None)
    assert settings.secret_key == ((SECRET,) if variable == "SECRET_KEY" else None)


@pytest.mark.parametrize(
    "content, told",
    [
        pytest.param(f"{SECRET}\n{SECRET[::-1]}\n".encode(), None, id="several-one-a-line"),
        pytest.param(b"\xff" * 40, "", id="no-text"),
        pytest.param(b"\n", "is empty; expected the value in it", id="empty"),  # else another one would sign
        pytest.param(None, "can't be read: No such file", id="missing"),
        pytest.param("folder", "can't be read: Is a directory", id="a-folder"),
    ],
)
def test_what_a_secret_file_holds_is_taken_or_named(
    content: bytes | str | None, told: str | None, tmp_path: Path
) -> None:
    path = tmp_path if content == "folder" else tmp_path / "secret"
    if isinstance(content, bytes):
        path.write_bytes(content)
    if told is None:
        assert load({"SECRET_KEY_FILE": str(path)}).secret_key == (SECRET, SECRET[::-1])
    else:
        (fault,) = faults({"SECRET_KEY_FILE": str(path)})
        assert fault.startswith("SECRET_KEY: ") and told in fault and (not told or str(path) in fault)


def test_a_secret_and_its_file_together_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    (fault,) = faults({"SECRET_KEY": SECRET, "SECRET_KEY_FILE": str(tmp_path / "secret")})
    assert "set SECRET_KEY or SECRET_KEY_FILE, not both" in fault
    assert SECRET not in fault


# -- Env file


def env_file(folder: Path, text: str) -> Path:
    """An env file of this text."""
    path = folder / "tracker.env"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text, expected",
    [
        pytest.param("PORT=8080", {"PORT": "8080"}, id="plain"),
        pytest.param("PORT=8080\r\nBIND=a:1\r\n", {"PORT": "8080", "BIND": "a:1"}, id="windows-line-ends"),
        pytest.param("# a comment\n; another\n\n  \n PORT=1", {"PORT": "1"}, id="comments-and-empty-lines"),
        pytest.param("  PORT = 8080  ", {"PORT": "8080"}, id="spaces-around"),
        pytest.param("API_KEY='a b'", {"API_KEY": "a b"}, id="single-quotes"),
        pytest.param('API_KEY=" a "', {"API_KEY": " a "}, id="double-quotes-keep-spaces"),
        pytest.param("API_KEY=\"a'", {"API_KEY": "\"a'"}, id="quotes-that-do-not-match-stay"),
        pytest.param('API_KEY="', {"API_KEY": '"'}, id="one-quote-alone-stays"),
        pytest.param('API_KEY=""', {"API_KEY": ""}, id="quotes-around-nothing"),
        pytest.param('API_KEY=a"b"c', {"API_KEY": 'a"b"c'}, id="quotes-inside-stay"),
        pytest.param("API_KEY=a#b # c", {"API_KEY": "a#b # c"}, id="a-hash-after-the-value-is-part-of-it"),
        pytest.param("API_KEY=a=b=", {"API_KEY": "a=b="}, id="equals-signs-in-the-value"),
        pytest.param("API_KEY=", {"API_KEY": ""}, id="empty-value"),
        pytest.param("API_KEY=a\nAPI_KEY=b", {"API_KEY": "b"}, id="the-last-of-two-counts"),
        pytest.param("DATABASE_URL=sqlite:/srv/ü.db", {"DATABASE_URL": "sqlite:/srv/ü.db"}, id="utf-8"),
        pytest.param("x1_=1", {"x1_": "1"}, id="any-name"),
        pytest.param("", {}, id="empty"),
    ],
)
def test_an_env_file_is_read_as_systemd_reads_it(tmp_path: Path, text: str, expected: dict[str, str]) -> None:
    found: list[str] = []
    assert tracker.read_env_file(str(env_file(tmp_path, text)), found) == expected
    assert found == []


@pytest.mark.parametrize(
    "line", ["PORT", "PORT 8080", "=8080", "export PORT=8080", "1PORT=8080", "PO-RT=1", "PORT: 8080"]
)
def test_a_line_of_an_env_file_that_says_nothing_is_a_fault_with_its_number(tmp_path: Path, line: str) -> None:
    path = env_file(tmp_path, f"# first\n{line}\n")
    (fault,) = faults({}, path)
    assert fault == f"{path}, line 2: expected NAME=value"


@pytest.mark.parametrize("content", [None, b"API_KEY=\xff\n"], ids=["missing", "no text"])
def test_an_env_file_that_can_not_be_read_is_a_fault_that_names_it(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "tracker.env"
    if content is not None:
        path.write_bytes(content)
    found = faults({"IP_ADDRESSES": "some"}, path)
    assert len(found) == 2 and f"{path}: can't be read: " in found[0]


def test_an_env_file_gives_what_the_environment_does_not(tmp_path: Path) -> None:
    path = env_file(tmp_path, "PORT=8080\nWEB_CONCURRENCY=8\n")
    settings = load({"PORT": "9090"}, path)
    assert (settings.port, settings.web_concurrency) == (9090, 8)


def test_a_bad_value_of_an_env_file_does_not_matter_where_the_environment_has_another(tmp_path: Path) -> None:
    assert load({"PORT": "9090"}, env_file(tmp_path, "PORT=eighty\n")).port == 9090


@pytest.mark.parametrize(
    "in_file, in_environment", [("SECRET_KEY_FILE", "SECRET_KEY"), ("SECRET_KEY", "SECRET_KEY_FILE")]
)
def test_the_environment_wins_also_where_one_of_the_two_says_it_by_a_file(
    tmp_path: Path, in_file: str, in_environment: str
) -> None:
    values = {"file": SECRET, "environment": SECRET[::-1]}
    for name, value in values.items():
        (tmp_path / name).write_text(value)

    def said(variable: str, where: str) -> str:
        return str(tmp_path / where) if variable.endswith("_FILE") else values[where]

    path = env_file(tmp_path, f"{in_file}={said(in_file, 'file')}\n")
    settings = load({in_environment: said(in_environment, "environment")}, path)
    assert settings.secret_key == (values["environment"],)


def test_an_env_file_may_point_at_a_secret_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    assert load({}, env_file(tmp_path, f"API_KEY_FILE={tmp_path / 'secret'}\n")).api_key == SECRET


# -- File systems


def test_the_folder_of_this_test_is_on_a_local_disk(tmp_path: Path) -> None:
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        assert tracker.network_file_system_fault(str(tmp_path), mounts.read()) is None


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs"])
def test_a_folder_on_a_network_file_system_is_refused_with_its_kind(kind: str) -> None:
    mounts = f"/dev/vda / ext4 rw 0 0\nserver:/x /mnt/data {kind} rw 0 0\n"
    assert kind in str(tracker.network_file_system_fault("/mnt/data/not/there/yet", mounts))
    assert tracker.network_file_system_fault("/mnt/database", mounts) is None


def test_the_deepest_mount_above_a_folder_counts_and_of_two_on_one_point_the_last() -> None:
    mounts = "x / nfs4 rw 0 0\nx /mnt autofs rw 0 0\nx /mnt nfs4 rw 0 0\n/dev/vda /mnt/disk ext4 rw 0 0\n"
    assert tracker.network_file_system_fault("/mnt/disk/a", mounts) is None
    assert tracker.network_file_system_fault("/mnt/a", mounts) is not None
    assert tracker.network_file_system_fault("/home", mounts) is not None


def test_a_mount_point_with_a_space_is_found() -> None:
    mounts = "x / ext4 rw 0 0\nx /mnt/my\\040data nfs rw 0 0\n"
    assert tracker.network_file_system_fault("/mnt/my data/tracker", mounts) is not None


# -- Importing


def test_the_first_request_of_a_badly_configured_application_says_what_is_wrong(tmp_path: Path) -> None:
    """The counterpart: what importing does not read is read when it is needed."""
    script = "import tracker; tracker.application({'REQUEST_METHOD': 'GET'}, print)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "PORT": "bad"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert done.returncode != 0
    assert "PORT is 'bad': expected a whole number from 1 to 65535" in done.stderr
    assert list(tmp_path.iterdir()) == []
