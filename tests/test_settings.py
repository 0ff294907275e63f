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


def load(environ: Mapping[str, str], env_file: str | Path = os.devnull) -> tracker.Settings:
    """Load settings without the env file that a machine may have at its usual place."""
    return tracker.load_settings(environ, str(env_file))


def faults(environ: Mapping[str, str], env_file: str | Path = os.devnull) -> list[str]:
    """What is wrong with these settings."""
    with pytest.raises(tracker.SettingsError) as caught:
        load(environ, env_file)
    return str(caught.value).splitlines()


# -- Values


FIELDS = {each.metadata["variable"]: each.name for each in fields(tracker.Settings) if "variable" in each.metadata}
GOOD: dict[str, dict[str, Any]] = {
    "PORT": {"1": 1, "65535": 65535, " 8080\n": 8080, "": 3000, "  ": 3000},
    "BIND": {text: text for text in ("127.0.0.1:3000", "localhost:80", "[::1]:3000", "fd://3", "unix:/run/t/app.sock")},
    "DATABASE_URL": {
        **{f"sqlite:{path}": path for path in ("t.db", "./t.db", "/srv/t.db", "/srv/a b/ü.db")},
        "sqlite:////srv/t.db": "/srv/t.db",
        "": "data/tracking.db",
    },
    "BASE_URL": {
        **{
            text: text for text in ("https://t.example", "http://localhost:3000", "http://192.0.2.1", "http://[::1]:80")
        },
        "https://t.example/": "https://t.example",
        "HTTPS://Track.Example.COM:8443": "https://track.example.com:8443",
        "": None,
    },
    "WEB_CONCURRENCY": {"1": 1, "64": 64, "": 2},
    "API_KEY": {"abcdefghijklmnop": "abcdefghijklmnop", "!" * 16: "!" * 16, "": None},
    "SECRET_KEY": {
        SECRET: (SECRET,),
        f"{SECRET},{SECRET[::-1]}": (SECRET, SECRET[::-1]),
        f" {SECRET} ,\n{SECRET[::-1]} ": (SECRET, SECRET[::-1]),
        "": None,
    },
    "FORWARDED_ALLOW_IPS": {"*": ("*",), "10.0.0.0/8, ::1": ("10.0.0.0/8", "::1"), "": ("127.0.0.1", "::1")},
    "IP_ADDRESSES": {"truncated": "truncated", "full": "full", "none": "none", "": "truncated"},
}


@pytest.mark.parametrize("variable", FIELDS)
def test_a_good_value_is_taken_and_none_is_the_default(variable: str) -> None:
    for text, expected in GOOD[variable].items():
        assert getattr(load({variable: text}), FIELDS[variable]) == expected, text


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
            *("data/t.db", "sqlite", "sqlite:", "sqlite::memory:", "postgresql://host/db", "sqlite:x?mode=ro"),
            *("sqlite:a\0b", "sqlite:///x.db", "sqlite:///srv/x.db", "sqlite://x.db", "sqlite://srv/x.db"),
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
    "API_KEY": ("expected at least 16 characters without spaces", ("hush hush", "a b" * 9, "ü" * 20)),
    "SECRET_KEY": (
        "expected keys of at least 32 characters, newest first",
        # The last is as the environment gives what is not UTF-8: lone surrogates, which nothing can encode later.
        ("hush hush", ",", SECRET[:31], f"{SECRET},short", f"{SECRET} {SECRET[:31]}", os.fsdecode(b"\xff" * 40)),
    ),
    "FORWARDED_ALLOW_IPS": (
        "expected addresses or networks such as 10.0.0.0/8, or *",
        ("localhost", "10.0.0.0/33", "10.0.0.1/8", "::1, nginx", "**", "unix:"),
    ),
    "IP_ADDRESSES": ("expected one of: truncated, full, none", ("yes", "FULL", "truncate", "full none")),
    "RETENTION_DAYS": ("so it expects this to be unset", ("90", "0")),  # which this version does not have
}


@pytest.mark.parametrize("variable", BAD)
def test_a_bad_value_is_refused_with_what_was_expected_and_shown_unless_it_is_secret(variable: str) -> None:
    expected, texts = BAD[variable]
    for text in texts:
        (fault,) = faults({variable: text})
        shown = variable not in ("API_KEY", "SECRET_KEY", "RETENTION_DAYS")
        assert fault.startswith(f"{variable} is {text!r}: " if shown else f"{variable}: ") and expected in fault, text
        assert shown or len(text) < 9 or text not in fault, "a secret in a log"


def test_all_faults_are_reported_at_once() -> None:
    assert set(BAD) == {*GOOD, "RETENTION_DAYS"}
    found = faults({variable: texts[0] for variable, (_, texts) in BAD.items()})
    assert [re.split("[ :]", fault)[0] for fault in found] == [*FIELDS, "RETENTION_DAYS"]


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


@pytest.mark.parametrize(
    "content, told",
    [
        pytest.param(f"{SECRET}\n{SECRET[::-1]}\n".encode(), None, id="several-one-a-line"),
        pytest.param(b"hush hush", "expected", id="too-short"),
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
        assert fault.startswith("SECRET_KEY: ") and told in fault and "hush" not in fault
        assert str(path) in fault or told in ("", "expected")


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


def test_an_env_file_gives_what_the_environment_does_not_also_by_a_secret_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    path = env_file(tmp_path, f"PORT=eighty\nWEB_CONCURRENCY=8\nAPI_KEY_FILE={tmp_path / 'secret'}\n")
    settings = load({"PORT": "9090"}, path)
    assert (settings.port, settings.web_concurrency, settings.api_key) == (9090, 8, SECRET)


@pytest.mark.parametrize("by_file", ["the file", "the environment"])
def test_the_environment_wins_also_where_one_of_the_two_says_it_by_a_file(tmp_path: Path, by_file: str) -> None:
    (tmp_path / "secret").write_text(SECRET)
    said = [{"SECRET_KEY_FILE": str(tmp_path / "secret")}, {"SECRET_KEY": SECRET[::-1]}]
    in_file, environ = said if by_file == "the file" else said[::-1]
    path = env_file(tmp_path, "".join(f"{name}={value}" for name, value in in_file.items()))
    assert load(environ, path).secret_key == (SECRET[::-1] if by_file == "the file" else SECRET,)


# -- File systems


def test_the_folder_of_this_test_is_on_a_local_disk(tmp_path: Path) -> None:
    assert tracker.network_file_system_fault(str(tmp_path)) is None
    assert tracker.network_file_system_fault(str(tmp_path), str(tmp_path / "not Linux")) is None


LOCAL, NFS = "/dev/vda / ext4 rw 0 0", "server:/x / nfs4 rw 0 0"


@pytest.mark.parametrize(
    "folder, mounts, kind",
    [
        *(
            ("/mnt/data/new", [LOCAL, f"x /mnt/data {kind} rw 0 0"], kind)
            for kind in ("nfs", "cifs", "9p", "fuse.sshfs")
        ),
        pytest.param("/mnt/database", [LOCAL, "x /mnt/data nfs rw 0 0"], None, id="a mount beside it"),
        pytest.param("/mnt/disk/a", [NFS, "x /mnt/disk ext4 rw 0 0", "x /mnt nfs4 rw 0 0"], None, id="the deepest"),
        pytest.param("/mnt/a", [LOCAL, "x /mnt autofs rw 0 0", "x /mnt nfs4 rw 0 0"], "nfs4", id="the last on a point"),
        pytest.param("/home", [NFS], "nfs4", id="the root"),
        pytest.param("/mnt/my data/tracker", [LOCAL, r"x /mnt/my\040data nfs rw 0 0"], "nfs", id="a space"),
    ],
)
def test_a_folder_on_a_network_file_system_is_refused_with_its_kind(
    folder: str, mounts: list[str], kind: str | None, tmp_path: Path
) -> None:
    (tmp_path / "mounts").write_text("\n".join([*mounts, ""]))
    fault = tracker.network_file_system_fault(folder, str(tmp_path / "mounts")) or ""
    assert fault.startswith(f"DATABASE_URL: {folder} is on {kind}; expected") if kind else fault == ""


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
