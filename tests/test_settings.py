"""Settings: what the operator says through the environment, an env file and secret files, and every way to get it wrong."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import webtest

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
BASES = ("https://t.example", "http://localhost:3000", "http://192.0.2.1", "http://[::1]:80")
BINDS = ("127.0.0.1:3000", "localhost:80", "[::1]:3000", "fd://3", "unix:/run/t/app.sock")
PATHS = ("t.db", "./t.db", "/srv/t.db", "/srv/a b/ü.db")
BOTH = (SECRET, SECRET[::-1])
GOOD: dict[str, dict[str, Any]] = {
    "PORT": {"1": 1, "65535": 65535, " 8080\n": 8080, "": 3000, "  ": 3000},
    "BIND": {**{text: text for text in BINDS}, "": None},
    "DATABASE_URL": {f"sqlite:{path}": path for path in PATHS}
    | {"sqlite:////srv/t.db": "/srv/t.db", "": "data/tracking.db"}
    | {url: url for url in ("postgresql://u:p@host:5432/db", "postgres:///db?host=/run/postgresql")},
    "BASE_URL": {text + end: text for text in BASES for end in ("", "/")}
    | {"HTTPS://Track.Example.COM:8443": "https://track.example.com:8443", "": None}
    | {"https://Tr\u00e4ck.example:8443/a": "https://xn--trck-moa.example:8443/a"}  # as browsers write it
    | {"https://stra\u00dfe.example": "https://xn--strae-oqa.example", "https://t.example.": "https://t.example"}
    | {"https://mail_track.example": "https://mail_track.example", "http://_a.b_": "http://_a.b_"}
    | {"https://Example.com/Track/": "https://example.com/Track", "http://t:1/a.b/~c-d": "http://t:1/a.b/~c-d"},
    "WEB_CONCURRENCY": {"1": 1, "64": 64, "": 2},
    "API_KEY": {"abcdefghijklmnop": "abcdefghijklmnop", "!" * 16: "!" * 16, "": None},
    "SECRET_KEY": {SECRET: (SECRET,), ",".join(BOTH): BOTH, f" {SECRET} ,\n{SECRET[::-1]} ": BOTH, "": None},
    "FORWARDED_ALLOW_IPS": {"*": ("*",), "10.0.0.0/8, ::1": ("10.0.0.0/8", "::1"), "": ("127.0.0.1", "::1")},
    "IP_ADDRESSES": {"truncated": "truncated", "full": "full", "none": "none", "": "truncated"},
    "KEEP_SPOOL_DAYS": {"1": 1, "999": 999, "": 3},
    "KEEP_SPOOL_MB": {"1": 1, "9999999": 9_999_999, "": 2000},
    "RETENTION_DAYS": {"7": 7, "30": 30, "9999": 9999, "": None},
    "AGENT_DAYS": {"1": 1, "999": 999, "": 30},
    "DATA_FOLDER": {"": None},
    "WEBHOOK_NETWORKS": {"": None, "10.0.0.0/8, ::1": ("10.0.0.0/8", "::1")},
}


@pytest.mark.parametrize("variable", FIELDS)
def test_a_good_value_is_taken_and_none_is_the_default(variable: str) -> None:
    for text, expected in GOOD[variable].items():
        assert getattr(load({variable: text}), FIELDS[variable]) == expected, text


BAD = {  # what is said to be expected, and values that are not it
    "PORT": [
        "expected a whole number from 1 to 65535",
        *("0", "65536", "-1", "+80", "80.0", "eighty", "\uff18", "1" * 5000),
    ],
    "WEB_CONCURRENCY": ["expected a whole number from 1 to 64", "0", "65", "auto"],
    "BIND": [
        "expected unix:/path/to/socket or HOST:PORT",
        *("3000", "127.0.0.1", "127.0.0.1:", ":3000", "unix:", "unix:app.sock", "/run/app.sock", "::1:3000"),
        *("http://127.0.0.1:3000", "127.0.0.1:port", "a b:1", "127.0.0.1:65536", "fd://x"),
    ],
    "DATABASE_URL": [
        "expected sqlite:PATH, for example sqlite:data/tracking.db",
        *(
            "data/t.db",
            "sqlite",
            "sqlite:",
            "sqlite::memory:",
            "postgresql://host",
            "postgresql:db",
            "sqlite:x?mode=ro",
        ),
        *("sqlite:a\0b", "sqlite:///x.db", "sqlite:///srv/x.db", "sqlite://x.db", "sqlite://srv/x.db"),
    ],
    "BASE_URL": [
        "expected http:// or https:// and a host, for example https://track.example.com, or https://example.com/track",
        *("track.example.com", "https://", "https:///", "ftp://track.example.com", "//track.example.com"),
        *("https://track.example.com/a b", "https://track.example.com//", "https://track.example.com?a=b"),
        *("https://track.example.com#a", "https://user:pw@track.example.com", "https://track example.com"),
        *("https://t.example/..", "https://t.example/a/./b", "https://t.example/a//b", "https://t.example/%41"),
        *("https://t.example/\u00fc", "https://t.example/a?b", "https://t.example/a;b", "https://t.example/$a"),
        *("https://b\u200dcher.example", "https://track.example.com:", "https://track.example.com:0"),
        *("https://track..example.com", "https://.", "https://-", "https://[::1", "https://[:::]"),
        *("http\u017f://t.example", "https://1.2", "https://a%2eb.example", "https://t\u00e4st.\u2260.example"),
    ],
    "API_KEY": ["expected at least 16 characters without spaces", "hush hush", "a b" * 9, "ü" * 20],
    "SECRET_KEY": [
        "expected keys of at least 32 ASCII characters, newest first",
        # The last is as the environment gives what is not UTF-8: lone surrogates, which nothing can encode later.
        *("hush hush", ",", SECRET[:31], f"{SECRET},short", f"{SECRET} {SECRET[:31]}", os.fsdecode(b"\xff" * 40)),
    ],
    "FORWARDED_ALLOW_IPS": [
        "expected addresses or networks such as 10.0.0.0/8, or *",
        *("localhost", "10.0.0.0/33", "10.0.0.1/8", "::1, nginx", "**", "unix:"),
    ],
    "IP_ADDRESSES": ["expected one of: truncated, full, none", "yes", "FULL", "truncate", "full none"],
    "KEEP_SPOOL_DAYS": ["a whole number from 1 to 999", "0", "1000", "1.5", "three", "-1"],
    "KEEP_SPOOL_MB": ["a whole number from 1 to 9999999", "0", "10000000", "2 GB"],
    "DATA_FOLDER": ["expected an absolute path", "data", "./data"],
    "WEBHOOK_NETWORKS": ["expected addresses or networks", "*", "localhost"],
    "RETENTION_DAYS": ["a whole number from 7 to 9999", "6", "0", "10000", "a year", "-7", "7.5"],
    "AGENT_DAYS": ["a whole number from 1 to 999", "0", "1000", "x"],
}


@pytest.mark.parametrize("variable", BAD)
def test_a_bad_value_is_refused_with_what_was_expected_and_shown_unless_it_is_secret(variable: str) -> None:
    expected, *texts = BAD[variable]
    for text in texts:
        (fault,) = faults({variable: text})
        shown = variable not in ("API_KEY", "SECRET_KEY")
        assert fault.startswith(f"{variable} is {text!r}: " if shown else f"{variable}: ") and expected in fault, text
        assert shown or len(text) < 9 or text not in fault, "a secret in a log"


def test_all_faults_are_reported_at_once() -> None:
    assert set(BAD) == set(GOOD)
    found = faults({variable: texts[1] for variable, texts in BAD.items()})
    assert [re.split("[ :]", fault)[0] for fault in found] == [*FIELDS]
    assert load({"port": "0", "PORTS": "x", "LANG": "C", "DATABASE": "x"}) == load({}), "others do not matter"


# -- Where it listens, where it keeps its files, what it is called


def test_bind_wins_over_port_and_everything_is_kept_beside_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load({"PORT": "8080"}).address == ("[::]:8080" if tracker.is_dual_stack() else "0.0.0.0:8080")
    assert load({"PORT": "8080", "BIND": "unix:/run/a.sock"}).address == "unix:/run/a.sock"
    monkeypatch.chdir(tmp_path)
    assert load({}).folder == str(tmp_path / "data")
    assert load({"DATABASE_URL": "sqlite:/srv/mail/t.db"}).folder == "/srv/mail"
    assert load({"DATABASE_URL": "postgresql://h/d", "DATA_FOLDER": "/srv/mail"}).folder == "/srv/mail"
    assert faults({"DATA_FOLDER": "/srv"})[0].startswith("DATA_FOLDER: expected nothing with SQLite")


@pytest.mark.parametrize(
    "url", ["postgresql://u:hush@h/d", "postgresql://h/d?user=u&password=hush", "postgresql://u:hu@sh@h/d"]
)
def test_a_password_of_a_database_is_never_shown(url: str) -> None:
    assert "hush" not in load({"DATABASE_URL": url}).database_url.replace("hu@sh", "hush")
    (fault,) = faults({"DATABASE_URL": f"{url} "[:-1] + " x"})
    assert "hush" not in fault.replace("hu@sh", "hush")


@pytest.mark.parametrize(
    "environ, tracking_host, expected, locally",
    [
        ({}, None, None, "http://localhost:3000"),
        ({"PORT": "8080"}, None, None, "http://localhost:8080"),
        ({"BIND": "[::1]:8081"}, None, None, "http://localhost:8081"),
        ({"BASE_URL": "https://t.example"}, None, "https://t.example", "https://t.example"),
        ({}, "a.example", "https://a.example", "https://a.example"),
        ({"BASE_URL": "https://t.example/a"}, None, "https://t.example/a", "https://t.example/a"),
        ({"BASE_URL": "https://t.example/a"}, "a.example", "https://a.example", "https://a.example"),
        ({"BASE_URL": "https://t.example:8443"}, "a.example", "https://a.example", "https://a.example"),
        ({"BASE_URL": "http://t.example"}, "a.example", "http://a.example", "http://a.example"),
    ],
)
def test_links_begin_with_a_public_address_or_with_none(
    environ: dict[str, str], tracking_host: str | None, expected: str | None, locally: str
) -> None:
    """A mailing full of localhost links can't be called back, so there is no address by accident."""
    assert load(environ).public_url(tracking_host) == expected
    assert tracker.load_settings(environ, os.devnull, local=True).public_url(tracking_host) == locally


# -- Secret files


SECRET_FILES = {  # what is wrong, what the file holds, what is said
    "too short": (b"hush hush", "expected keys of at least 32 ASCII characters"),
    "no text": (b"\xff" * 40, "can't decode"),
    "empty": (b"\n", "/empty is empty; expected the value in it"),  # else another one would sign
    "missing": (None, "/missing can't be read: No such file"),
    "a folder": (None, "/a folder can't be read: Is a directory"),
    "beside the value": (SECRET.encode(), "set SECRET_KEY or SECRET_KEY_FILE, not both"),
}


@pytest.mark.parametrize("case", SECRET_FILES)
def test_a_secret_file_that_is_of_no_use_is_named_and_not_shown(case: str, tmp_path: Path) -> None:
    content, told = SECRET_FILES[case]
    path = tmp_path / case
    if case == "a folder":
        path.mkdir()
    elif content:
        path.write_bytes(content)
    (fault,) = faults({"SECRET_KEY_FILE": str(path), "SECRET_KEY": SECRET if case == "beside the value" else ""})
    assert fault.startswith("SECRET_KEY: ") and told in fault
    assert "hush" not in fault and SECRET not in fault


# -- Env file


def env_file(folder: Path, text: str) -> Path:
    """An env file of this text."""
    path = folder / "tracker.env"
    path.write_text(text, encoding="utf-8")
    return path


ENV_FILES = {
    "": {},
    "PORT=8080\r\nBIND=a:1\r\n": {"PORT": "8080", "BIND": "a:1"},
    "# a comment\n; another\n\n  \n PORT=1": {"PORT": "1"},
    "API_KEY=a\nAPI_KEY=b": {"API_KEY": "b"},
    "DATABASE_URL=sqlite:/srv/ü.db": {"DATABASE_URL": "sqlite:/srv/ü.db"},
    "  x1_ = 8080  ": {"x1_": "8080"},
    "A='a b'": {"A": "a b"},
    'A=" a "': {"A": " a "},
    "A=\"a'": {"A": "\"a'"},
    'A="': {"A": '"'},
    'A=""': {"A": ""},
    'A=a"b"c': {"A": 'a"b"c'},
    "A=a#b # c": {"A": "a#b # c"},
    "A=a=b=": {"A": "a=b="},
    "A=": {"A": ""},
}


def test_an_env_file_is_read_as_systemd_reads_it(tmp_path: Path) -> None:
    found: list[str] = []
    read = {text: tracker.read_env_file(str(env_file(tmp_path, text)), found) for text in ENV_FILES}
    assert (read, found) == (ENV_FILES, [])


def test_a_line_of_an_env_file_that_says_nothing_is_a_fault_with_its_number(tmp_path: Path) -> None:
    lines = ["PORT", "PORT 8080", "=8080", "export PORT=8080", "1PORT=8080", "PO-RT=1", "PORT: 8080"]
    path = env_file(tmp_path, "\n".join(["# first", *lines]))
    assert faults({}, path) == [f"{path}, line {number}: expected NAME=value" for number in range(2, 9)]


def test_an_env_file_that_can_not_be_read_is_a_fault_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "no text").write_bytes(b"API_KEY=\xff\n")
    for path in (tmp_path / "missing", tmp_path / "no text"):
        found = faults({"IP_ADDRESSES": "some"}, path)
        assert len(found) == 2 and f"{path}: can't be read: " in found[0]


def test_an_env_file_gives_what_the_environment_does_not_also_by_a_file_with_a_secret_a_line(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("\n".join(BOTH))
    path = env_file(tmp_path, f"PORT=eighty\nWEB_CONCURRENCY=8\nSECRET_KEY_FILE={tmp_path / 'secret'}\n")
    settings = load({"PORT": "9090", "SECRET_KEY": ""}, path)
    assert (settings.port, settings.web_concurrency, settings.secret_key) == (9090, 8, BOTH)


def test_the_environment_wins_also_where_one_of_the_two_says_it_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    by_file, itself = ("SECRET_KEY_FILE", str(tmp_path / "secret")), ("SECRET_KEY", SECRET[::-1])
    assert load(dict([itself]), env_file(tmp_path, "=".join(by_file))).secret_key == (SECRET[::-1],)
    assert load(dict([by_file]), env_file(tmp_path, "=".join(itself))).secret_key == (SECRET,)


# -- File systems

LOCAL, NFS = "/dev/vda / ext4 rw 0 0", "server:/x / nfs4 rw 0 0"
MOUNTS = {  # what of, a folder, what is mounted, the network file system that it is on
    **{kind: ("/mnt/data/new", [LOCAL, f"x /mnt/data {kind} rw 0 0"], kind) for kind in ("nfs", "cifs", "9p")},
    "a mount beside it": ("/mnt/database", [LOCAL, "x /mnt/data nfs rw 0 0"], None),
    "the deepest": ("/mnt/disk/a", [NFS, "x /mnt/disk ext4 rw 0 0", "x /mnt nfs4 rw 0 0"], None),
    "the last on a point": ("/mnt/a", [LOCAL, "x /mnt autofs rw 0 0", "x /mnt nfs4 rw 0 0"], "nfs4"),
    "the root": ("/home", [NFS], "nfs4"),
    "a space": ("/mnt/my data/tracker", [LOCAL, r"x /mnt/my\040data fuse.sshfs rw 0 0"], "fuse.sshfs"),
}


@pytest.mark.parametrize("folder, mounts, kind", MOUNTS.values(), ids=MOUNTS)
def test_a_folder_on_a_network_file_system_is_refused_with_its_kind(
    folder: str, mounts: list[str], kind: str | None, tmp_path: Path
) -> None:
    assert tracker.network_file_system_fault(str(tmp_path)) is None, "where these tests run"
    assert tracker.network_file_system_fault(str(tmp_path), str(tmp_path / "not Linux")) is None
    (tmp_path / "mounts").write_text("\n".join([*mounts, ""]))
    fault = tracker.network_file_system_fault(folder, str(tmp_path / "mounts")) or ""
    assert fault.startswith(f"{folder} is on {kind}; expected") if kind else fault == ""


# -- The application


def test_the_first_request_of_a_badly_configured_application_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counterpart of an import that reads nothing: what is needed is read then."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PORT", "bad")
    with pytest.raises(tracker.SettingsError, match="PORT is 'bad': expected a whole number from 1 to 65535"):
        webtest.TestApp(tracker.application).get("/")
    assert list(tmp_path.iterdir()) == []
