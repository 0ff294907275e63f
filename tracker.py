# /// script
# requires-python = ">=3.10"
# dependencies = ["gunicorn==27.0.1"]
# ///
# SPDX-License-Identifier: MIT
"""Email tracker: who opened and clicked the mail you sent, told truthfully, from one file on your own server.

A hit (a request for a pixel or a link) is appended to a spool and answered; a drain judges hits in batches and
moves them into SQLite, exactly once; the dashboard reads roll-ups. The sections below use only what stands above
them; `grep '^# == ' tracker.py` prints the contents. README.md says how to run it and what the numbers mean.
"""

from __future__ import annotations

import atexit
import base64
import binascii
import bisect
import codecs
import contextlib
import errno
import gc
import hashlib
import hmac
import html
import html.entities
import importlib
import ipaddress
import json
import math
import operator
import os
import re
import secrets
import shutil
import signal
import socket
import sqlite3
import string
import sys
import threading
import time
import traceback
import unicodedata
import weakref
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import date, datetime, timedelta, timezone, tzinfo
from functools import lru_cache, partial
from http import HTTPStatus
from itertools import accumulate, chain, groupby, islice, pairwise, repeat, starmap, takewhile
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TextIO, cast
from urllib.parse import parse_qsl, quote, unquote, unquote_plus

try:
    import fcntl
except ImportError:
    sys.exit("The tracker runs on Linux, macOS and BSD; on Windows, start it in WSL, which is a Linux")

if TYPE_CHECKING:
    import email.message
    import http.client
    import logging
    from argparse import ArgumentParser, Namespace

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    Network = ipaddress.IPv4Network | ipaddress.IPv6Network

__version__ = "0.7.0"

# The file this program came in, and what a person calls it: tracker.py, or the zip that holds it.
PROGRAM_FILE = os.path.abspath(getattr(globals().get("__loader__"), "archive", __file__))
PROGRAM = os.path.basename(PROGRAM_FILE)

# == Settings ==========================================================================================
# What the operator says through the environment, what goes wrong, and the program's own files.

ENV_FILE = "/etc/email-tracker.env"
NETWORK_KINDS = "nfs4?|cifs|smb(3|fs)|9p|virtiofs|afs|lustre|(fuse[.])?(ceph|glusterfs)|fuse[.](sshfs|s3fs|rclone)"
# Letters and marks that nobody sees, of which browsers drop some and refuse others; and the capital of ß, which they
# have changed their mind about.
UNSURE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u1e9e\ufe00-\ufe0f\U000e0100-\U000e01ef]")
_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
IPV4 = re.compile(rf"((?:{_OCTET}\.){{3}}){_OCTET}")  # as Python reads it too, at a tenth of the time


class BadInput(ValueError):
    """What a person or a program gave us can't be used; the text says what was expected."""


class BadTarget(BadInput):
    """Why a URL can't be a link's target, in a sentence for the person who wrote it."""


class StoreError(Exception):
    """What keeps a command or a page from working, in a sentence for the operator."""


class SettingsError(Exception):
    """Everything that is wrong with the settings, a line for each fault."""


def resource(name: str) -> bytes:
    """A file that belongs to this module, beside it or in the same zip."""
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        return bytes(globals()["__loader__"].get_data(os.path.join(folder, name)))
    except OSError:
        raise StoreError(f"{name} is missing in {folder}: copy email-tracker.pyz, which `make dist` builds") from None


def path_of(url: str) -> str:
    """The path of a URL of our own, without the slash at its end."""
    return re.sub("^https?://[^/]*", "", url)


@lru_cache(maxsize=1024)
def read_host(name: str) -> str:
    """Read a host as a browser would: IDNA, lower case, canonical addresses. Raises BadTarget."""
    try:
        if name.startswith("["):
            address = ipaddress.IPv6Address(name[1:-1])
            if address.scope_id:
                raise ValueError("browsers take no zone")
            # Browsers write the embedded IPv4 address in hexadecimal; Python does or doesn't, by its version.
            low = int(address) & 0xFFFF_FFFF
            return f"[::ffff:{low >> 16:x}:{low & 0xFFFF:x}]" if address.ipv4_mapped else f"[{address}]"
        text = re.sub("[.\u3002\uff0e\uff61]", ".", unquote(name, errors="strict"))  # what browsers take for a dot
        rootless = text.removesuffix(".")
        host = ".".join(map(_ascii_label, rootless.split(".")))
        is_number = re.fullmatch(r"[0-9]+|0x[0-9a-f]*", host.rpartition(".")[2])
        # Browsers read 0x7f.1 and 2130706433 as addresses; only the usual spelling is a host here.
        if len(host) > 253 or (is_number and not IPV4.fullmatch(host)):
            raise ValueError("it is too long, or an address in another spelling")
    except ValueError:
        raise BadTarget(f"its host {name[:80]!r} is malformed; expected a domain name or an IP address") from None
    return host if is_number else host + text[len(rootless) :]


def _ascii_label(label: str) -> str:
    """One label of a host in ASCII. Raises ValueError for what no browser or registry would have."""
    if not label.isascii() and len(label) <= 253:  # to encode many takes quadratic time
        label = _mapped(label)
        if not all(c == "-" or unicodedata.category(c)[0] in "LMN" for c in label):
            raise ValueError("it holds a sign")
        label = label if label.isascii() else "xn--" + label.encode("punycode").decode()
    label = label.lower()
    is_label = re.fullmatch("[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", label)
    if not is_label or (label.startswith("xn--") and not _is_punycode(label[4:])):
        raise ValueError("it is no label")
    return label


def _is_punycode(text: str) -> bool:
    """Whether browsers would make this label in punycode, and its letters run in one direction."""
    shown = text.encode().decode("punycode")
    if shown.isascii() or shown.startswith("xn--") or shown.encode("punycode").decode() != text:
        return False
    directions = [unicodedata.bidirectional(c) for c in shown]
    right_to_left = not {"R", "AL", "AN"}.isdisjoint(directions)
    if right_to_left and ("L" in directions or directions[0] not in ("R", "AL")):
        return False
    return _mapped(shown) == shown and unicodedata.category(shown[0])[0] != "M"


def _mapped(label: str) -> str:
    """A label in the letters that browsers make of it (UTS 46; ß and ς stay), or ValueError if that is not sure."""
    if UNSURE.search(label):
        raise ValueError("it holds what browsers drop or refuse")
    nfkc = partial(unicodedata.normalize, "NFKC")
    return nfkc("".join(c if c in "ßς" else nfkc(nfkc(c).casefold()) for c in label))


def is_port(text: str) -> bool:
    return re.fullmatch("[0-9]{1,5}", text) is not None and 0 < int(text) < 65536


def _matching(pattern: str, expected: str, make: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """What makes a value of a text that fits a pattern, whose groups are ports."""

    def convert(text: str) -> Any:
        if not (match := re.fullmatch(pattern, text)) or not all(map(is_port, filter(None, match.groups()))):
            raise ValueError(f"expected {expected}")
        return make(text)

    return convert


def database_place(text: str) -> str:
    if re.fullmatch(r"postgres(ql)?://[^/?#\s]*/[^/?#\s]+(\?\S*)?", text):
        return text
    path = text.removeprefix("sqlite:")
    # sqlite:///x is relative to some programs and absolute to others: don't guess where the data is.
    if path in (text, "", ":memory:") or re.search(r"[\0?]|^//(?!//)", path):
        example = "sqlite:data/tracking.db or sqlite:/srv/tracker/tracking.db"
        raise BadInput(f"expected sqlite:PATH, for example {example}, or postgresql://USER:PASSWORD@HOST/DATABASE")
    return re.sub("^/+", "/", path)


def without_password(url: str) -> str:
    """A URL of a database as it may be shown."""
    return re.sub("(?<=[?&]password=)[^&]*", "…", re.sub("(?<=://)([^:/?@]*):.*@", r"\1:…@", url))


def _base_url(text: str) -> str:
    host, path = r"[^\s/?#@%:\[\]]+|\[[0-9A-Fa-f:.]+\]", r"(?:/(?!\.\.?(?:/|$))[A-Za-z0-9_.~-]+)*"
    match = re.fullmatch(rf"([A-Za-z]+)://({host})(:([0-9]+))?({path})/?", text)
    with contextlib.suppress(ValueError):
        if match and match[1].lower() in ("http", "https") and is_port(match[4] or "80"):
            return f"{match[1].lower()}://{read_host(match[2]).removesuffix('.')}{match[3] or ''}{match[5]}"
    expected = "https://track.example.com, or https://example.com/track where a path leads to this server"
    raise ValueError(f"expected http:// or https:// and a host, for example {expected}")


def _secrets(text: str) -> tuple[str, ...]:
    keys = tuple(re.split(r"[\s,]+", text))
    if not all(re.fullmatch("[!-~]{32,}", key) for key in keys):
        raise ValueError("expected keys of at least 32 ASCII characters, newest first, with commas or spaces between")
    return keys


def _networks(text: str) -> tuple[str, ...]:
    entries = tuple(text.replace(",", " ").split())
    for entry in entries:
        try:
            entry == "*" or ipaddress.ip_network(entry)
        except ValueError:
            raise ValueError(f"expected addresses or networks such as 10.0.0.0/8, or *; {entry!r} is neither") from None
    return entries


def _addresses(text: str) -> tuple[str, ...]:
    if "*" in (entries := _networks(text)):
        raise ValueError("expected addresses or networks such as 10.0.0.0/8, not *")
    return entries


def _setting(variable: str, convert: Callable[[str], Any], default: str = "", *, secret: bool = False) -> Any:
    """Declare one setting: the source for parsing, `config` and the table in README."""
    about = {"variable": variable, "convert": convert, "default": default, "secret": secret}
    return field(default=convert(default) if default else None, metadata=about)


_workers = _matching("[1-9]|[1-5][0-9]|6[0-4]", "a whole number from 1 to 64", int)
_days = _matching("[1-9][0-9]{0,2}", "a whole number from 1 to 999", int)
RETENTION = "[7-9]|[1-9][0-9]{1,3}"  # days
_retention = _matching(RETENTION, "a whole number from 7 to 9999", int)
_megabytes = _matching("[1-9][0-9]{0,6}", "a whole number from 1 to 9999999", int)
_bind = _matching(
    r"unix:/.+|fd://[0-9]+|(?:\[[0-9A-Fa-f:.]+\]|[^\s:/]+):([0-9]+)",
    "unix:/path/to/socket or HOST:PORT, for example 127.0.0.1:3000",
)
_api_key = _matching("[!-~]{16,}", "at least 16 characters without spaces")
_kept = _matching("truncated|full|none", "one of: truncated, full, none")
_folder = _matching("(?s:/.*)", "an absolute path, such as /var/lib/email-tracker")


@lru_cache(maxsize=1)
def is_dual_stack() -> bool:
    """Whether a socket of this machine that listens on [::] takes IPv4 too."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::", 0))
            return not probe.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class Settings:
    port: int = _setting("PORT", _matching("([0-9]+)", "a whole number from 1 to 65535", int), "3000")
    bind: str | None = _setting("BIND", _bind)
    database: str = _setting("DATABASE_URL", database_place, "sqlite:data/tracking.db")
    base_url: str | None = _setting("BASE_URL", _base_url)
    web_concurrency: int = _setting("WEB_CONCURRENCY", _workers, "2")
    api_key: str | None = _setting("API_KEY", _api_key, secret=True)
    secret_key: tuple[str, ...] | None = _setting("SECRET_KEY", _secrets, secret=True)
    forwarded_allow_ips: tuple[str, ...] = _setting("FORWARDED_ALLOW_IPS", _networks, "127.0.0.1,::1")
    ip_addresses: str = _setting("IP_ADDRESSES", _kept, "truncated")
    keep_spool_days: int = _setting("KEEP_SPOOL_DAYS", _days, "3")
    keep_spool_mb: int = _setting("KEEP_SPOOL_MB", _megabytes, "2000")
    retention_days: int | None = _setting("RETENTION_DAYS", _retention)
    agent_days: int = _setting("AGENT_DAYS", _days, "30")
    webhook_networks: tuple[str, ...] | None = _setting("WEBHOOK_NETWORKS", _addresses)
    data_folder: str | None = _setting("DATA_FOLDER", _folder)
    local: bool = False  # `--local`: links may lead to this machine
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)  # where each value comes from

    @property
    def is_shared(self) -> bool:
        """Whether the database is a server's, which other machines may use too."""
        return re.match("postgres(ql)?://", self.database) is not None

    @property
    def database_url(self) -> str:
        """Where the database is, as it may be shown."""
        return without_password(self.database) if self.is_shared else f"sqlite:{self.database}"

    @property
    def folder(self) -> str:
        """Where everything of this machine beside the database lives: spool, lock, tenants.json, secret.key."""
        if self.is_shared:
            return os.path.abspath(self.data_folder or "data")
        return os.path.dirname(os.path.abspath(self.database))

    @property
    def spool(self) -> str:
        return os.path.join(self.folder, "spool")

    @property
    def address(self) -> str:
        """What gunicorn binds."""
        return self.bind or f"{'[::]' if is_dual_stack() else '0.0.0.0'}:{self.port}"

    @property
    def base_path(self) -> str:
        """What paths at BASE_URL begin with: /track, or nothing. At tracking hosts they don't."""
        return path_of(self.base_url or "")

    @property
    def base_pattern(self) -> str:
        """The same as a regular expression, nginx's too: a slash too many is none."""
        return re.escape(self.base_path).replace("/", "/+")

    def public_url(self, tracking_host: str | None = None) -> str | None:
        """The address links begin with, or None where nobody said it and `--local` was not given."""
        if tracking_host:
            return f"{(self.base_url or 'https:').partition(':')[0]}://{tracking_host}"
        if self.base_url or not self.local:
            return self.base_url
        bound = re.search(":([0-9]+)$", self.address)
        return f"http://localhost:{bound[1] if bound else self.port}"


def read_env_file(path: str, faults: list[str]) -> dict[str, str]:
    """Read lines NAME=value as systemd does (EnvironmentFile); what is wrong goes to faults."""
    values = {}
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        hint = "; expected to be root, or one of the file's group" if isinstance(error, PermissionError) else ""
        faults.append(f"{path}: can't be read: {getattr(error, 'strerror', error)}{hint}")
        return {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if match := re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(?:([\"'])(.*)\2|(.*))", line):
            values[match[1]] = match[4] if match[2] is None else match[3]
        elif line and line[0] not in "#;":
            faults.append(f"{path}, line {number}: expected NAME=value")
    return values


def _given(variable: str, sources: Mapping[str, Mapping[str, str]]) -> tuple[str, str]:
    """What the first source that has it says of a variable, itself or in the file that X_FILE names; and where it did."""
    for name, source in sources.items():
        text, path = (source.get(each, "").strip() for each in (variable, f"{variable}_FILE"))
        if text and path:
            raise ValueError(f"set {variable} or {variable}_FILE, not both")
        if path:
            with open(path, encoding="utf-8") as file:
                text = file.read().strip()
            if not text:
                raise ValueError(f"{path} is empty; expected the value in it")
        if text:
            return text, f"{path}, which {name} names" if path else name
    return "", "by default"


def load_settings(environ: Mapping[str, str], env_file: str | None = None, *, local: bool = False) -> Settings:
    """Read the environment and, for what it does not say, an env file. SettingsError has all faults: one look mends all."""
    faults: list[str] = []
    env_file = env_file or (ENV_FILE if os.path.exists(ENV_FILE) else os.devnull)
    sources = {"the environment": environ, env_file: read_env_file(env_file, faults)}
    origins: dict[str, str] = {}
    values: dict[str, Any] = {"local": local, "origins": origins}
    for each in fields(Settings):
        variable, text = each.metadata.get("variable", ""), ""
        try:
            if variable:
                text, origins[variable] = _given(variable, sources)
                values |= {each.name: each.metadata["convert"](text)} if text else {}
        except (OSError, ValueError) as error:
            told = f"{error.filename} can't be read: {error.strerror}" if isinstance(error, OSError) else error
            text = without_password(text) if variable == "DATABASE_URL" else text
            shown = f" is {text!r}" if text and not each.metadata["secret"] else ""
            faults.append(f"{variable}{shown}: {told}")
    if faults:
        raise SettingsError("\n".join(faults))
    settings = Settings(**values)
    if settings.data_folder and not settings.is_shared:
        faults.append(f"DATA_FOLDER: expected nothing with SQLite, whose data is in the folder of {settings.database}")
    if fault := network_file_system_fault(os.path.realpath(settings.folder)):
        faults.append(f"{'DATA_FOLDER' if settings.is_shared else 'DATABASE_URL'}: {fault}")
    if faults:
        raise SettingsError("\n".join(faults))
    return settings


def network_file_system_fault(folder: str, mounts: str = "/proc/self/mounts") -> str | None:
    """Say so if the deepest mount above a folder (of two on one point, the last) is a network file system."""
    kind, depth = "", -1
    # Where there is no such list, it is not Linux, and nobody to ask.
    with contextlib.suppress(OSError), open(mounts, encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            _, point, this_kind, *_ = line.split(" ")
            point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point)
            if (folder + "/").startswith(point.rstrip("/") + "/") and len(point) >= depth:
                kind, depth = this_kind, len(point)
    if re.fullmatch(NETWORK_KINDS, kind):
        return f"{folder} is on {kind}; expected a local disk: locks do not hold on a network"
    return None


# == Links =============================================================================================
# Ids, keys, signatures and targets. Pure: no file, no database, no clock.

MAX_TARGET = 4096  # characters; what browsers and mail programs handle everywhere
MAX_TARGET_BYTES = 2 * MAX_TARGET  # in UTF-8: more, in base64 and beside a long user agent, would not fit a spool line
MAX_KEY = 200
KEY = re.compile(r"[A-Za-z0-9._~+@=:-]{1,200}")
ROUTE_WORDS = re.compile(
    "admin|api|assets|campaigns|click|clients|dashboard|emails|events|favicon|feed|forget|forgotten|health|"
    "links|messages|openapi|people|pixel|preferences|robots|static|stats|tenants|untracked|webhooks",
    re.IGNORECASE,
)
NAMES_READER = re.compile(r"[?#].*|/[^/?#]+(?:@|%(?:25)*40).*")  # of a URL, what may do so
UNFIT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # in a text of one line: control characters, lone surrogates
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(?://([^/?#]+))?")
MAX_CAMPAIGN = 200  # characters of a campaign's name
MAX_UTM = 1000  # characters of the parameters that all links get
UTM_EXAMPLE = "utm_source=news&utm_medium=email&utm_campaign={campaign}"
PARAMETER = r"[A-Za-z0-9_.~:\[\]-]{1,100}"  # the name of one, as tenants may tell it
PLAIN_URL = re.compile(r"(?:^|&)url=(([^&]*).*)", re.DOTALL)
CAMPAIGN = re.compile(r"(?:^|&)campaign=([^&]*)")
DEFAULT_PORTS = {"http": 80, "https": 443}
UNTRACKED_KEY = "untracked~"  # in the place of the key in hits that say that they want no tracking
TEST_KEY = "selftest~"  # begins the keys of test emails, whose hits are the sender's own and in no number
PREFERENCES, CHOICE = "preferences 1", "choice 1"  # what is signed for: a recipient's link, and the form it leads to
# A random UUID (RFC 9562 §5.4): to know another's is to have their mail. Other keys of a tool may be guessed.
UNGUESSABLE = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", re.IGNORECASE)
HIDDEN_TARGET = "about:blank"  # of the link that only machines follow; no link that anybody writes leads there


class Meant(BadTarget):
    """Why a link stays of which its sender knows that it would."""


class Target(NamedTuple):
    """Where a link leads, once a URL has been read and found fit."""

    location: str  # ASCII, ready for the Location header
    host: str  # lower case, IDNA, without a final dot
    port: int


def new_dashboard_id() -> str:
    """128 random bits; never begins with "-", which would be an option on a command line."""
    made = secrets.token_urlsafe(16)
    return made if made[0] != "-" else new_dashboard_id()


def new_mail_id() -> str:
    """Short, since it stands in every link; without letters and digits that are read for each other."""
    return "".join(secrets.choice("abcdefghjkmnpqrstuvwxyz23456789") for _ in range(8))


new_key = new_dashboard_id  # the key of an email is as hard to guess, and a word on command lines too


def id_fault(text: str) -> str | None:
    """Why a text can't be a tenant's id, or None."""
    if not re.fullmatch("[A-Za-z0-9_][A-Za-z0-9_-]{2,63}", text):
        return "expected 3 to 64 of the characters A-Z a-z 0-9 _ -, not beginning with -"
    if ROUTE_WORDS.fullmatch(text):
        return f"{text!r} is a word of the URLs; choose another"
    return None


def is_key(text: str) -> bool:
    return KEY.fullmatch(text) is not None and text not in (".", "..")


@lru_cache(maxsize=128)
def _tenant_key(secret: str, mail_id: str) -> bytes:
    return hmac.digest(secret.encode(), b"tenant 1" + mail_id.encode(), "sha256")


def sign(secret: str, mail_id: str, signed: str, purpose: str = "click 1") -> str:
    """Sign a click link: 16 characters for the target as it stands in the path. Or something else, for a purpose of its own."""
    # The length before each field keeps fields from sliding into each other.
    said = b"".join(len(text).to_bytes(4, "big") + text for text in (purpose.encode(), signed.encode()))
    mac = hmac.digest(_tenant_key(secret, mail_id), said, "sha256")
    return base64.urlsafe_b64encode(mac[:12]).decode()


def key_of_mail(secret: str, mail_id: str, message_id: str, recipient: str) -> str:
    """The key of one mail to one recipient: as hard to guess as a new one, and each time the same."""
    text = message_id.encode()
    said = b"\0\0\0\5key 1" + len(text).to_bytes(4, "big") + text + recipient.encode()
    mac = hmac.digest(_tenant_key(secret, mail_id), said, "sha256")
    return re.sub("^-", "_", base64.urlsafe_b64encode(mac[:18]).decode())


def verify(secrets_: Sequence[str], mail_id: str, signed: str, signature: str, purpose: str = "click 1") -> bool:
    """Whether one of the secrets made this signature."""
    given = signature.encode("utf-8", "replace")
    return any(hmac.compare_digest(sign(secret, mail_id, signed, purpose).encode(), given) for secret in secrets_)


def encode_target(url: str) -> str:
    """Put a URL into a path segment: UTF-8 in base64url without padding."""
    return base64.urlsafe_b64encode(url.encode()).decode().rstrip("=")


def decode_target(segment: str) -> str | None:
    """Read what encode_target wrote; None for anything else, also for another spelling of the same bytes."""
    try:
        url = base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4)).decode()
    except ValueError:
        return None
    return url if encode_target(url) == segment else None


HIDDEN_SEGMENT = encode_target(HIDDEN_TARGET)


def key_in_path(key: str) -> str:
    return quote(key, safe="~+@=:")


def pixel_path(mail_id: str, key: str) -> str:
    return f"/{mail_id}/pixel/{key_in_path(key)}.gif"


def click_path(secret: str, mail_id: str, key: str, url: str) -> str:
    """The signed path of one link in one email. Raises BadTarget."""
    return f"/{mail_id}/click/{key_in_path(key)}/{signed_target(secret, mail_id, url)}"


def signed_target(secret: str, mail_id: str, url: str) -> str:
    """What a signed path ends with, for every email: the signature and the target. Raises BadTarget."""
    read_target(url)
    if (size := len(url.encode())) > MAX_TARGET_BYTES:
        raise BadTarget(f"it has {size:,} bytes in UTF-8; expected at most {MAX_TARGET_BYTES:,}")
    target = encode_target(url)
    return f"{sign(secret, mail_id, target)}/{target}"


def split_target(uri: str) -> tuple[tuple[str, ...], str]:
    """Split a request target into decoded path segments and the raw query: the one reading of a path."""
    if not uri.startswith("/"):
        uri = re.sub(r"^(?i:https?)://[^/?]*", "", uri)  # absolute form, RFC 9112 §3.2.2
    path, _, query = uri.partition("?")
    segments = path.split("/")[1:]  # before it is decoded, so that %2F stays inside of one
    if "" in segments:  # a slash too many is none: links are put together by many hands
        segments = [segment for segment in segments if segment] or [""]
    if "%" in path:
        segments = [unquote(segment, errors="replace") for segment in segments]
    return tuple(segments), query


def plain_url(query: str) -> str | None:
    """The target of a plain link, from the raw query; None if it names none."""
    match = PLAIN_URL.search(query)
    if not match:
        return None
    rest, value = match.groups()
    # With "://" in it, it was written by hand and not encoded, so all that follows belongs to it, "&" included.
    return str(rest) if "://" in value else unquote_plus(value, errors="replace")


def campaign_of(query: str) -> str:
    """The campaign that a hit names, or "": for keys that nobody registers. Never a part of a plain link's URL."""
    url = PLAIN_URL.search(query)
    match = CAMPAIGN.search(query[: url.start()] if url and "://" in url[2] else query)
    name = unquote_plus(match[1], errors="replace") if match else ""
    return UNFIT.sub("", name).strip(" ")[:MAX_CAMPAIGN]


def with_parameters(url: str, wanted: Iterable[tuple[str, str]]) -> str:
    """A URL with these parameters in its query, but for those that it has already; all else of it stays as it is."""
    front, mark, fragment = url.partition("#")
    query = front.partition("?")[2]
    there = {unquote_plus(each.partition("=")[0]) for each in query.split("&")}
    encode = partial(quote, safe="", errors="surrogateescape")
    new = "&".join(f"{encode(name)}={encode(value)}" for name, value in wanted if name not in there)
    joint = "?" if "?" not in front else "&" if query and not query.endswith("&") else ""
    return f"{front}{joint}{new}{mark}{fragment}" if new else url


def forwarded(location: str, query: str, names: Collection[str]) -> str:
    """A link's location with what its own query says under utm_… and these names; no more: a stranger may write it."""
    if "utm" not in query and not names:
        return location
    said = parse_qsl(query, keep_blank_values=True, errors="surrogateescape")
    longer = with_parameters(location, [each for each in said if each[0].startswith("utm_") or each[0] in names])
    return longer if len(longer) <= len(location) + MAX_TARGET else location


def read_parameter(text: str) -> str:
    """Read the name of a parameter that links forward. Raises BadInput."""
    if not re.fullmatch(PARAMETER, text) or text == "url":  # the target of plain links
        raise BadInput(f"{text!r}: expected a parameter's name but url, 1 to 100 of A-Z a-z 0-9 _ . ~ : [ ] -")
    return text


def read_utm(text: str, name: str = "utm") -> str:
    """Read the parameters that all links get, "" for none. Raises BadInput."""
    pair = rf"({PARAMETER})=(?:[^\x00-\x1f\x7f\ud800-\udfff&#{{}}]|{{campaign}})+"
    names = [match[1] for match in re.finditer(pair, text)]
    if text and (not re.fullmatch(rf"{pair}(?:&{pair})*", text) or len({*names}) < len(names) or len(text) > MAX_UTM):
        told = f"NAME=VALUE, joined by &, each name once, such as {UTM_EXAMPLE}, at most {MAX_UTM:,} characters"
        told += " (in a value %26 stands for &, and there is no # and no other brace)"
        raise BadInput(f"{name} {text[:80]!r}: expected {told}")
    return text


def filled_utm(text: str, campaign: str) -> list[tuple[str, str]]:
    """The parameters that links in an email get; where it has no campaign, not those that would name it."""
    said = [(name, value) for name, value in parse_qsl(text) if campaign or "{campaign}" not in value]
    return [(name, value.replace("{campaign}", campaign)) for name, value in said]


def path_reader(pattern: str) -> Callable[[tuple[str, ...]], list[str] | None]:
    """What reads split paths by a pattern: the values of its {names}, or None."""
    parts = pattern.split("/")[1:]
    names = [place for place, part in enumerate(parts) if part.startswith("{")]
    others = [place for place in range(len(parts)) if place not in names]
    words_of = operator.itemgetter(*others) if others else lambda _: ()
    words, suffix = words_of(parts), parts[-1].partition("}")[2]

    def read(segments: tuple[str, ...]) -> list[str] | None:
        if len(segments) != len(parts) or words_of(segments) != words or not segments[-1].endswith(suffix):
            return None
        values = [segments[place] for place in names]
        if "" in values:
            return None
        if suffix:
            values[-1] = values[-1].removesuffix(suffix)
        return values

    return read


PIXEL_PATH = "/{mail_id}/pixel/{key}.gif"
SIGNED_PATH = "/{mail_id}/click/{key}/{signature}/{target}"
PLAIN_PATH = "/{mail_id}/click/{key}"
PREFERENCES_PATH = "/{mail_id}/preferences/{key}/{signature}"
_read_pixel, _read_signed, _read_plain = map(path_reader, (PIXEL_PATH, SIGNED_PATH, PLAIN_PATH))


def recognise(segments: tuple[str, ...], query: str) -> tuple[bool, str, str, str | None] | None:
    """Read a hit's request target: whether an open, mail id, key, URL of a click; None if it is no hit."""
    if values := _read_pixel(segments):
        return True, values[0], values[1], None
    if values := _read_signed(segments):
        return False, values[0], values[1], decode_target(values[3])
    if values := _read_plain(segments):
        return False, values[0], values[1], plain_url(query)
    return None


@lru_cache(maxsize=4)  # who wraps a link asks about its URL several times in a row
def read_target(url: str) -> Target:
    """Read a URL as a browser would (url.spec.whatwg.org) and make it safe for a Location header.

    Where browsers mend a URL in ways that have misled filters (backslashes, missing slashes, tabs, credentials, odd
    spellings of an IPv4 address) it is refused: a sender never needs it, so nothing is left to disagree about.
    Raises BadTarget.
    """
    if len(url) > MAX_TARGET:
        raise BadTarget(f"it has {len(url):,} characters; expected at most {MAX_TARGET:,}")
    if UNFIT.search(url):
        raise BadTarget("it holds a control character, or half a character; expected none")
    match = URL.match(url := url.strip(" "))
    if match and match[1].lower() not in DEFAULT_PORTS:
        raise BadTarget(f"its scheme is {match[1]}; expected http or https")
    if not match or not match[2]:
        raise BadTarget("it is relative or malformed; expected http:// or https:// and a host")
    scheme, authority = match[1].lower(), match[2]
    if "\\" in url and re.match(r"[^?#]*\\", url):
        raise BadTarget("it holds a backslash, which browsers read as a slash; expected none before the query")
    if "@" in authority:
        raise BadTarget("it holds credentials (an @ before the path); expected a host alone")
    host, given = _host_and_port(authority)
    port = given or DEFAULT_PORTS[scheme]
    shown_port = "" if port == DEFAULT_PORTS[scheme] else f":{port}"
    tail = quote(url[match.end() :], safe="!#$%&'()*+,/:;=?@[]\\^_`{|}~")
    return Target(f"{scheme}://{host}{shown_port}{tail}", host.rstrip("."), port)


def _host_and_port(text: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::([0-9]{0,5}))?", text)
    if not match or not is_port(match[2] or "80"):
        raise BadTarget("its host and port are malformed; expected HOST, or HOST:PORT with a port from 1 to 65535")
    return read_host(match[1]), int(match[2]) if match[2] else None


def read_destination(text: str) -> str:
    """Read HOST or HOST:PORT as `--domain` and `--block` take it. Raises BadInput."""
    try:
        host, port = _host_and_port(text.strip())
    except BadTarget as error:
        raise BadInput(f"{text!r}: {error}") from None
    host = host.rstrip(".")
    if "." not in host and ":" not in host:
        raise BadInput(f"{text!r}: expected at least two labels, such as acme.com")
    return f"{host}:{port}" if port else host


def covers(destinations: Collection[str], target: Target, *, any_port: bool = False) -> bool:
    """Whether destinations hold a target's host or a domain above it, on a default port or the port given."""
    if not destinations:
        return False  # as most lists of blocked ones are
    labels = target.host.split(".")
    names = {".".join(labels[n:]) for n in range(len(labels))}
    forms = {f"{name}:{target.port}" for name in names}
    if any_port or target.port in DEFAULT_PORTS.values():
        forms |= names
    return not forms.isdisjoint(destinations)


@lru_cache(maxsize=512)
def read_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An address, with or without a port; IPv4 in IPv6 is IPv4. None if it is none."""
    match = re.fullmatch(r"\[([0-9A-Fa-f:.]+)\](?::[0-9]+)?|([0-9.]+)(?::[0-9]+)?|([0-9A-Fa-f:.]+)", text)
    with contextlib.suppress(ValueError):
        parsed = ipaddress.ip_address(match[match.lastindex or 0] if match else "")
        return getattr(parsed, "ipv4_mapped", None) or parsed
    return None


LEAST_OWN_PREFIX = {4: 8, 6: 19}  # 10.0.0.0/8 is somebody's own; a /0 would set every hit aside


def read_own_network(text: str) -> str:
    """Read an address or a network that a tenant calls its own. Raises BadInput."""
    try:
        network = ipaddress.ip_network(text.strip(), strict=False)
    except ValueError:
        raise BadInput(f"{text!r}: expected an address or a network, such as 203.0.113.7 or 203.0.113.0/24") from None
    if network.prefixlen < (least := LEAST_OWN_PREFIX[network.version]):
        raise BadInput(f"{text!r}: expected a network of one's own, not a part of the Internet: at least /{least}")
    return str(network.network_address if network.num_addresses == 1 else network)


def campaign_key(key: str, campaign: str) -> str:
    """The key of an email that nobody registered, in a campaign that its hits name: as its URL has it, if that fits."""
    whole = f"{key}?campaign={campaign}"
    if len(whole) <= MAX_KEY:
        return whole
    digest = hashlib.sha256(whole.encode()).hexdigest()
    return f"{key[: MAX_KEY - len(digest) - 1]}?{digest}"


@lru_cache(maxsize=1024)
def url_host(url: str) -> str:
    """The host that a target leads to, with the port unless it is a default one; "" for what can't be read."""
    try:
        target = read_target(url)
    except BadTarget:
        return ""
    return target.host if target.port in DEFAULT_PORTS.values() else f"{target.host}:{target.port}"


# == Verdicts ==========================================================================================
# Who made a hit, and why we think so. Pure: an email's hits and its context decide, without a clock or a look-up.
# What is known of programs, networks and reasons is data, in templates/*.txt.

OPEN, CLICK = 1, 2
PERSON, UNCONFIRMED, MACHINE, ASIDE = 1, 2, 3, 4
TYPES = {OPEN: "open", CLICK: "click"}
STATES = {PERSON: "person", UNCONFIRMED: "unconfirmed", MACHINE: "machine"}  # best first
STATE_NAMES = {**STATES, ASIDE: "set_aside"}  # what is set aside is in no number
VERDICT_STATES = {"human": PERSON, "proxy": PERSON, "prefetch": UNCONFIRMED, "unconfirmed": UNCONFIRMED}
VERDICT_STATES |= {"scanner": MACHINE, "bot": MACHINE, "self": ASIDE}
CERTAIN, PROBABLE = "certain", "probable"
NAMING_REASONS = ("destination-not-allowed", "destination-blocked", "suspended")  # why a click met the naming page
_ASIDE_REASONS = {"repeat", "forged-link", *NAMING_REASONS}

SESSION_GAP_MS = 900_000  # of quiet between two sessions of an email
MAX_SESSION = 50  # hits; in a longer one each is judged by itself, so that nobody can make judging slow
CROWD_NEAR = 20  # hits of such a session, before and after a click, that are looked at
BURST_MS = 3_000
COMPANY_MS = 10_000  # from a hit to what belongs to it
SOON_MS = 2_000  # Mautic takes 2 s, Marketo 1 s
REPEAT_MS = 60_000  # proxies and Outlook ask again for up to a minute: ahoy_email#138, Litmus on Yahoo
SIGN_IN_MS = 60_000  # who waits for a mail to sign in clicks after 8 s: so soon is a sign, never a verdict
OPEN_VOTES, CLICK_VOTES, SCANNER_VOTES = 2, 4, 6  # an open or a click is doubtful, a click a scanner's


class Judgement(NamedTuple):
    """What is thought of a hit, why, and how certain that is."""

    verdict: str
    reason: str
    certainty: str

    @property
    def state(self) -> int:
        """What the hit counts as."""
        return ASIDE if self.reason in _ASIDE_REASONS else VERDICT_STATES[self.verdict]


class Hit(NamedTuple):
    """One request for a pixel or a link, as the spool has it."""

    id: str
    at: int  # milliseconds since 1970, UTC
    type: int
    method: str
    mail_id: str
    key: str
    url: str | None
    host: str
    address: str
    agent: str
    purpose: str
    answer: str
    why: str  # for an answer that is not the usual one: a reason
    campaign: str = ""  # that its URL names
    own: bool = False  # whether it came from an address that the tenant calls its own
    fixed: Judgement | None = None  # what it stays, because what it was judged by was cut
    signed: bool = False  # whether its URL is one that we signed, so that nobody made it up
    asks: bool = False  # by Sec-GPC or DNT, not to be tracked


class Context(NamedTuple):
    """What is known of an email beside its hits."""

    begin: int | None = None  # when it was delivered, or else sent, in milliseconds since 1970
    said: bool = False  # by its sender; else that is when it was registered, which has half the weight
    links: int | None = None  # how many different ones


NO_CONTEXT = Context()


# -- What templates/ says


class Programs(NamedTuple):
    """A line of agents.txt."""

    section: str
    family: str
    names: list[str]  # anywhere in it; looking for each takes a tenth of the time of one pattern
    pattern: re.Pattern[str] | None  # of what needs its surroundings

    def fit(self, agent: str) -> bool:
        """Whether an agent, in lower case, is one of them."""
        return any(map(agent.__contains__, self.names)) or bool(self.pattern and self.pattern.search(agent))


class VerdictData(NamedTuple):
    """What verdicts know of the world."""

    programs: list[Programs]  # of which the first that fits decides
    chrome_years: list[tuple[int, int]]  # a year, and the first version in it
    filters: dict[str, list[tuple[Network, str]]]  # with their certainty, by the first part of their addresses
    reasons: dict[str, tuple[str, str]]  # certainty and sentence
    signs: dict[str, tuple[int, str]]  # votes against a person, and what is told of it
    shapes: dict[str, re.Pattern[str]]  # of user agents and headers


@lru_cache(maxsize=1)
def verdict_data() -> VerdictData:
    """Read and compile it: on first use, or before processes are forked that share it."""
    programs, filters = [], defaultdict(list)
    for section, family, text in _lines("agents.txt"):
        words = text.split(", ")
        patterns = "|".join(word[1:-1] for word in words if word.startswith("/"))
        names = [word for word in words if not word.startswith("/")]
        programs.append(Programs(section, family, names, re.compile(patterns) if patterns else None))
    for certainty, _, text in _lines("networks.txt"):
        for network in text.split(", "):
            filters[re.split("[.:]", network)[0]].append((ipaddress.ip_network(network), certainty))
    years = [(int(year), int(version)) for _, year, version in _lines("chrome.txt")]
    reasons = {reason: (certainty, text) for certainty, reason, text in _lines("reasons.txt")}
    signs = {sign: (int(text.split()[0]), text.partition(" ")[2]) for _, sign, text in _lines("signs.txt")}
    shapes = {name: re.compile(pattern) for _, name, pattern in _lines("shapes.txt")}
    return VerdictData(programs, years, filters, reasons, signs, shapes)


def _lines(name: str) -> Iterator[tuple[str, str, str]]:
    """The lines `name = text` of a file, each after the [section] that it stands in."""
    section = ""
    for line in resource(f"templates/{name}").decode().splitlines():
        if line.startswith("["):
            section = line[1:-1]
        elif line and not line.startswith("#"):
            key, _, text = line.partition(" = ")
            yield section, key, text


@lru_cache(maxsize=256)  # more than there are pairs that occur
def judgement_of(verdict: str, reason: str) -> Judgement:
    """That verdict for that reason, which may be another version's."""
    return Judgement(verdict, reason, verdict_data().reasons.get(reason, (PROBABLE, ""))[0])


_scanner = partial(judgement_of, "scanner")


def sentence_of(reason: str) -> str:
    """What a person is told of a reason; nothing, if it is another version's."""
    return verdict_data().reasons.get(reason, (PROBABLE, ""))[1]


# -- What a hit says of itself

TRUNCATED = (".0", "::")  # so end addresses that stand for their network (IPv4 /24, IPv6 /48), as far as one sees


@lru_cache(maxsize=1024)
def judge_agent(agent: str, type_: int) -> Judgement:
    agent = agent.strip().lower()
    section = next(each.section for each in verdict_data().programs if each.section != "family" and each.fit(agent))
    return judgement_of(*section.split(", ")[0 if type_ == OPEN else -1].split())


@lru_cache(maxsize=1024)
def client_of(agent: str) -> tuple[str, str]:
    """A user agent's family of programs, and its device: mobile, desktop, or "" if a proxy hides it."""
    people = [each for each in verdict_data().programs if not each.section.startswith(("scanner", "bot"))]
    family, _, device = agent.removesuffix(")").partition(" (")
    if device in ("", "mobile", "desktop") and family in ("Others", *(each.family for each in people if each.family)):
        return family, device  # as family_of has it
    hidden = judge_agent(agent, OPEN).reason in ("image-proxy", "apple-mpp")
    agent = agent.strip().lower()
    devices = (name for name in ("mobile", "desktop") if verdict_data().shapes[name].search(agent))
    return next((each.family for each in people if each.fit(agent)), "Others"), "" if hidden else next(devices, "")


def family_of(agent: str) -> str:
    """What is kept of a user agent that is old: what client_of says of it, which it also says of that."""
    family, device = client_of(agent)
    return f"{family} ({device})" if device else family


@lru_cache(maxsize=1024)
def chrome_released_at(agent: str) -> float:
    """About when a desktop Chrome came out, in milliseconds; infinity for all else, and for a new one."""
    data = verdict_data()
    match = data.shapes["desktop-chrome"].search(agent)
    version = int(match[1]) if match and not data.shapes["last-chrome"].search(agent) else -1
    for (year, first), (_, following) in pairwise(data.chrome_years):
        if first <= version < following:
            days = 365 * (version - first) // (following - first)
            return (datetime(year, 1, 1, tzinfo=timezone.utc).timestamp() + days * 86_400) * 1000
    return math.inf


@lru_cache(maxsize=1024)
def filter_network(address: str) -> str | None:
    """Whether an address is a mail filter's: CERTAIN, or PROBABLE if a part of the network is that it stands for."""
    whole, cut = (128, 48) if ":" in address else (32, 24)
    length = cut if address.endswith(TRUNCATED) else whole
    with contextlib.suppress(ValueError):  # of a line that another program wrote
        for network, certainty in verdict_data().filters.get(address.replace(":", ".").partition(".")[0], ()):
            if network.overlaps(ipaddress.ip_network(f"{address}/{length}", strict=False)):
                return certainty if network.prefixlen <= length else PROBABLE
    return None


def _judge_by_itself(hit: Hit, context: Context) -> Judgement:
    """Judge a hit by what it says of itself; the first rule that fits wins."""
    if hit.fixed:
        return hit.fixed
    by_agent = judge_agent(hit.agent, hit.type)
    if hit.answer == "404":
        return _scanner("forged-link")
    if hit.own and by_agent.reason not in ("image-proxy", "proxy-click"):
        return judgement_of("self", "own-address")
    if hit.url == HIDDEN_TARGET:
        return _scanner("hidden-link")
    if hit.method == "HEAD":
        return _scanner("head")
    if hit.purpose and verdict_data().shapes["prefetch"].search(hit.purpose):
        return judgement_of("prefetch", "prefetch-header")
    if by_agent.verdict != "human":
        return by_agent
    if filter_network(hit.address) == CERTAIN:
        return _scanner("filter-network")
    if hit.type == CLICK and context.said and context.begin is not None and 0 <= hit.at - context.begin < SOON_MS:
        return _scanner("too-soon")
    # An open is never a machine's by signs alone, and no network is one: mail is read on the web, through many of them.
    is_doubtful = hit.type == OPEN and by_agent.reason == "browser" and votes_of(*signs_of(hit, context)) >= OPEN_VOTES
    return judgement_of("unconfirmed", "some-signs") if is_doubtful else by_agent


def signs_of(hit: Hit, context: Context) -> list[str]:
    """What speaks for or against a person in a hit alone, by the names of signs.txt."""
    signs, since = [_age(hit)], -1 if context.begin is None else hit.at - context.begin
    if since >= SIGN_IN_MS:
        signs.append("later")
    elif since >= 0 and context.said:
        signs.append("soon")
    elif since >= 0 and hit.type == CLICK:
        signs.append("soon-registered" if since >= SOON_MS else "at-once-registered")
    if hit.type == CLICK and filter_network(hit.address) == PROBABLE:
        signs.append("perhaps-filter")
    return signs


@lru_cache(maxsize=1024)
def votes_of(*signs: str) -> int:
    return sum(verdict_data().signs[sign][0] for sign in signs)


def _age(hit: Hit) -> str:
    """A scanner's Chrome may be years old; phones are often as old with people."""
    years = (hit.at - chrome_released_at(hit.agent)) / (365.25 * 86_400_000)
    return "very-old" if years > 4 else "old" if years > 2 else "current"


def _weigh(hit: Hit, judgement: Judgement, context: Context, more: Iterable[str] = ()) -> Judgement:
    """The last word on a click that seems a person's, by its own signs and more."""
    if hit.type != CLICK or hit.fixed:
        return judgement
    if judgement.verdict == "human":
        judgement = _by_votes([*signs_of(hit, context), *more], judgement, "many-signs")
    return _named(hit, judgement)


def _by_votes(signs: Iterable[str], judgement: Judgement, reason: str) -> Judgement:
    """What signs make of a click: a scanner's for that reason, doubtful, or what it was."""
    if (votes := votes_of(*signs)) >= SCANNER_VOTES:
        return _scanner(reason)
    return judgement_of("unconfirmed", "some-signs") if votes >= CLICK_VOTES else judgement


def _named(click: Hit, judgement: Judgement) -> Judgement:
    """Who it was stays known of a click that met the naming page, but it counts in no rate."""
    return judgement_of(judgement.verdict, click.why) if click.why in NAMING_REASONS else judgement


# -- Hits in the light of their neighbours

_PEOPLES = ("human", "unconfirmed")
_UNNAMED = {"hidden-link", "head", "with-head", "filter-network", "too-soon"}  # scanners that do not name themselves
_TELLING = {"hidden-link", "head", "burst"}  # what shows whose the opens by the same program were
# After these the same address, or the same rare program, is taken for the scanner it was.
_FOLLOWED = _TELLING | {"with-head", "with-hidden-link", "after-scanner", "gmail-sampling", "scanner-word", "bot-word"}

Signs = dict[int, list[str]]  # that neighbours are of, by a hit's place in its session


def judge(hits: Sequence[Hit], context: Context = NO_CONTEXT) -> list[Judgement]:
    """Judge the hits of one email in the light of their sessions, whatever the order they are given in."""
    if len(hits) == 1:
        return [_weigh(hits[0], _judge_by_itself(hits[0], context), context)]
    judgements: dict[int, Judgement] = {}
    for session in sessions_of(hits):
        judged = judge_session([hits[n] for n in session], context)
        judgements.update(zip(session, judged, strict=True))
    return [judgements[n] for n in range(len(hits))]


def sessions_of(hits: Sequence[Hit]) -> Iterator[list[int]]:
    """The places of an email's hits in each session, in order: with at most 15 minutes between two."""
    order, start = sorted(range(len(hits)), key=lambda n: in_order(hits[n])), 0
    for end in range(1, len(order) + 1):
        if end == len(order) or hits[order[end]].at - hits[order[end - 1]].at > SESSION_GAP_MS:
            yield order[start:end]
            start = end


def in_order(hit: Hit) -> tuple[Any, ...]:
    """What hits are sorted by: time, then content, so that ties are the same in any drain."""
    said = hit.method, hit.agent, hit.address, hit.purpose, hit.own, hit.why, hit.fixed or ()
    return hit.at, hit.type, hit.url or "", *said


def judge_session(hits: Sequence[Hit], context: Context, signs: Signs | None = None) -> list[Judgement]:
    """Judge the hits of one session, which are in order, as judge does; `signs` is filled with those of neighbours."""
    if len(hits) > MAX_SESSION:
        return judge_crowd(hits, context)
    judged = [_judge_by_itself(hit, context) for hit in hits]
    if any(hit.type == CLICK or judged[n].verdict in ("scanner", "bot") for n, hit in enumerate(hits)):
        signs = {} if signs is None else signs
        reasons = {each.reason for each in judged}
        if "mail-client" in reasons and "browser" in reasons:
            _find_lookups(hits, judged)
        if "head" in reasons:
            _find_company(hits, judged, "head", operator.attrgetter("type", "url", "address", "agent"))
        _find_bursts(hits, judged, context, signs)
        if "hidden-link" in reasons:
            _find_company(hits, judged, "hidden-link", operator.attrgetter("type"))  # mautic#9798
        _find_followers(hits, judged, signs)
        judged = [_weigh(hit, judged[n], context, signs.get(n, ())) for n, hit in enumerate(hits)]
        _find_echoes(hits, judged)
    _find_repeats(hits, judged)
    return judged


def explain(hits: Sequence[Hit], context: Context) -> list[list[str]]:
    """What speaks against a person in each hit of an email, and for one, by the names of signs.txt."""
    found = [signs_of(hit, context) * (judge_agent(hit.agent, hit.type).verdict in ("human", "proxy")) for hit in hits]
    for session in sessions_of(hits):
        of_neighbours: Signs = {}
        judge_session([hits[n] for n in session], context, of_neighbours)
        for place, names in of_neighbours.items():
            found[session[place]] += names
    return found


def judge_crowd(hits: Sequence[Hit], context: Context) -> list[Judgement]:
    """Judge hits in order, of a session of too many: each by itself, but no click is certainly a person's.

    It is a scanner's where its program or its address asked for several other links near it. A piece of a session
    will do, with CROWD_NEAR + 1 hits on each side of a hit's millisecond, or all within 3 seconds.
    """
    judged = [_weigh(hit, _judge_by_itself(hit, context), context) for hit in hits]
    times = [hit.at for hit in hits]
    links_near = lru_cache(maxsize=1)(partial(_links_near, hits, times))  # hits of one millisecond share a look
    for n, hit in enumerate(hits):
        if hit.type == CLICK and judged[n].verdict == "human" and not hit.fixed:
            links = links_near(hit.at)
            most = max(len(links["agent", hit.agent]), len(links["address", hit.address]) if hit.address else 0)
            judged[n] = _named(hit, judgement_of("scanner" if most > 3 else "unconfirmed", "crowded"))
    return judged


def _links_near(hits: Sequence[Hit], times: Sequence[int], at: int) -> dict[tuple[str, str], set[str | None]]:
    """The links that each program and each address asked for near a time; times alone say what is near."""
    first, end = bisect.bisect_left(times, at - BURST_MS), bisect.bisect_right(times, at + BURST_MS)
    before, after = bisect.bisect_left(times, at) - CROWD_NEAR - 1, bisect.bisect_right(times, at) + CROWD_NEAR
    if before >= first:
        first = bisect.bisect_right(times, times[before])
    if after < end:
        end = bisect.bisect_left(times, times[after])
    links: dict[tuple[str, str], set[str | None]] = defaultdict(set)
    for hit in hits[first:end]:
        if hit.type == CLICK:
            links["agent", hit.agent].add(hit.url)
            links["address", hit.address].add(hit.url)
    return links


def _find_lookups(hits: Sequence[Hit], judged: list[Judgement]) -> None:
    """A mail program that asks for a link before it hands it to the browser has not clicked: the browser has."""
    browsers = [hit for n, hit in enumerate(hits) if hit.type == CLICK and judged[n].reason == "browser"]
    for n, hit in enumerate(hits):
        if hit.type == CLICK and judged[n].reason == "mail-client" and not hit.fixed:
            same = (each.at - hit.at for each in browsers if (each.url, each.address) == (hit.url, hit.address))
            if any(0 <= later <= COMPANY_MS for later in same):  # new Outlook: 1.5 s before
                judged[n] = judgement_of("bot", "look-up")


def _find_bursts(hits: Sequence[Hit], judged: list[Judgement], context: Context, signs: Signs) -> None:
    """Several links at once: the first is what the last is, a scanner's where enough else speaks for that."""
    windows = [(1_000, 3, 2), (BURST_MS, 3, 3)]  # with so many hits on so many links; Marketo, autoemails.com
    if context.links is not None and context.links >= 3:
        windows.append((15_000, context.links, context.links))  # every link of the mail; mautic#8692: 10 s
    fit = [each.verdict == "human" or each.reason in _UNNAMED for each in judged]
    clicks = [n for n, hit in enumerate(hits) if hit.type == CLICK and fit[n]]
    if all(later.at - hit.at > windows[-1][0] for hit, later in pairwise([hits[n] for n in clicks])):
        return  # as nearly always
    for run in _runs(hits, clicks, windows):
        places = {hits[n].address for n in run}
        # A proxy hides where the mail was opened.
        readers = {hits[n].address for n in range(run[0]) if hits[n].type == OPEN and judged[n].verdict in _PEOPLES}
        is_read = places & readers or any(judged[n].verdict == "proxy" for n in range(run[0]))
        found = ["several", "opened-there" if is_read else "not-opened-there"]
        fast, faster = (_runs(hits, run, [(1_000, links, links)]) for links in (3, 4))
        found += ["faster-than-hands"] if faster else ["fast"] if fast else []
        found += ["from-several"] * (len(places) > 1)  # several programs at one are the people of an office
        found += ["with-scanner"] * any(judged[n].reason in _UNNAMED for n in run)
        most = max((signs_of(hits[n], context) for n in run), key=lambda signs: votes_of(*signs))
        for n in run:
            signs[n] = found
            if judged[n].verdict == "human" and not hits[n].fixed:
                judged[n] = _by_votes([*found, *most], judged[n], "burst")
    for run in _runs(hits, [n for n in clicks if _age(hits[n]) != "current" and n not in signs], [(BURST_MS, 2, 2)]):
        for n in run:
            signs[n] = ["two-by-old"]


def _runs(hits: Sequence[Hit], clicks: Sequence[int], windows: Iterable[tuple[int, int, int]]) -> list[list[int]]:
    """Parts of the places of clicks with so many hits on so many links in so short a time; those that overlap are one."""
    times, joined = [hits[n].at for n in clicks], set[int]()  # those in one window with the click before
    for window, least_hits, least_links in windows:
        for first, at in enumerate(times):
            end = bisect.bisect_right(times, at + window)
            if end - first >= least_hits and len({hits[n].url for n in clicks[first:end]}) >= least_links:
                joined.update(range(first + 1, end))
    runs: list[list[int]] = []
    for place, n in enumerate(clicks):
        if place in joined:
            runs[-1].append(n)
        else:
            runs.append([n])
    return [run for run in runs if len(run) > 1]


def _find_company(hits: Sequence[Hit], judged: list[Judgement], reason: str, same: Callable[[Hit], Any]) -> None:
    """What comes within 10 seconds of such a hit, and is the same, is the scanner's as well."""
    times: dict[Any, list[int]] = defaultdict(list)
    for n, hit in enumerate(hits):
        if judged[n].reason == reason:
            times[same(hit)].append(hit.at)
    for n, hit in enumerate(hits):
        near = times.get(same(hit), ())
        if judged[n].verdict in _PEOPLES and not hit.fixed and any(abs(hit.at - at) <= COMPANY_MS for at in near):
            judged[n] = _scanner(f"with-{reason}")


def _find_followers(hits: Sequence[Hit], judged: list[Judgement], signs: Signs) -> None:
    """What a scanner's address, or its program if that is a rare one, asks for within 15 minutes is its too."""
    if _FOLLOWED.isdisjoint([each.reason for each in judged]):
        return
    until: dict[tuple[str, str], int] = {}
    scanners = {(hit.address, hit.agent) for n, hit in enumerate(hits) if judged[n].reason in _TELLING}
    for n, hit in enumerate(hits):
        places = (hit.address, ""), (hit.address, hit.agent), ("", hit.agent)
        if judged[n].verdict in _PEOPLES and not hit.fixed:
            here, same_here, same = (until.get(place, -1) >= hit.at for place in places)
            here = here and hit.address != "" and judge_agent(hit.agent, hit.type).reason == "browser"
            same_here = same_here and hit.address != ""
            if same_here or (here and not hit.address.endswith(TRUNCATED)) or (same and _age(hit) != "current"):
                judged[n] = _scanner("after-scanner")
            # At any time of the session: filters load the images first.
            elif hit.type == OPEN and places[1] in scanners and (hit.address or _age(hit) != "current"):
                judged[n] = _scanner("with-scanner")
            elif here and hit.type == CLICK:  # another program in the same network, so doubtful
                signs[n] = [*signs.get(n, ()), "scanner-there"]
        if judged[n].reason in _FOLLOWED and not verdict_data().shapes["device-preview"].search(hit.agent):
            until.update(dict.fromkeys(places, hit.at + SESSION_GAP_MS))


def _find_echoes(hits: Sequence[Hit], judged: list[Judgement]) -> None:
    """A click that repeats a person's at once from another address and system is a scanner's."""
    people: dict[str | None, list[tuple[str, str, int]]] = defaultdict(list)  # who clicked a link, and when
    for n, hit in enumerate(hits):
        if hit.type == CLICK and judged[n].verdict in _PEOPLES:
            system, earlier = _system(hit.agent), people[hit.url]
            places = {place for place, other, at in earlier if other != system and hit.at - at <= 15_000}
            if places - {"", hit.address} and hit.address and not hit.fixed:  # resend-node#901: 12 s
                judged[n] = _named(hit, _scanner("echo"))
            elif judged[n].verdict == "human":  # not a doubtful one: a scanner may test a link before the person does
                earlier.append((hit.address, system, hit.at))


@lru_cache(maxsize=1024)
def _system(agent: str) -> str:
    match = verdict_data().shapes["system"].search(agent)
    return match[0] if match else ""


def _find_repeats(hits: Sequence[Hit], judged: list[Judgement]) -> None:
    """Opens by one program within a minute of the first are one: the later ones are in no number."""
    anchors: dict[tuple[str, str], int] = {}
    for n, hit in enumerate(hits):
        if hit.type == OPEN and judged[n].state != ASIDE:
            who = judged[n].verdict, hit.agent
            if hit.at - anchors.get(who, -math.inf) <= REPEAT_MS and not hit.fixed:
                judged[n] = judgement_of(judged[n].verdict, "repeat")
            else:
                anchors[who] = hit.at


# == Instrument ========================================================================================
# Wrap the links of HTML and place the pixel, and change nothing else. Pure: no file, no database, no clock.
# HTML is read as browsers read it (html.spec.whatwg.org, 13.2.5), and not with html.parser, which ends comments, texts
# and attributes elsewhere, and not at the same place in every Python.

MAX_WRAPPED = 10_000  # links of a message; whoever has more writes no mail
MAX_TAGS = 50_000  # links and images of a page; more, and it is left as it is
MAX_ATTRIBUTES = 10_000  # of a tag; what has more is taken for a tag that does not end
CLIPPED_BYTES = 100_000  # Gmail clips a message at about 102 kB, and with it a pixel at its end
PIXEL_PLACES = ("bottom", "top", "none")
LINE_BREAK = re.compile(r"\r\n|\n|\r")
PREFERENCES_MARK = re.compile(r"\{\{ ?tracking_preferences ?\}\}")  # in whose place the URL of a recipient's page goes
LINK_TAGS = {"a", "area"}
WANTED_TAGS = {*LINK_TAGS, "img", "body", "/body", "/head", "/html"}
QUOTING_TAGS = {"blockquote", "/blockquote", "div", "/div", "p"}  # and what they say where they hold a quoted mail
QUOTE_CLASSES = {"gmail_quote", "yahoo_quoted", "protonmail_quote", "moz-forward-container"}
DIVIDER_IDS = {"divRplyFwdMsg", "OLK_SRC_BODY_SECTION", "mail-editor-reference-message-container"}  # Outlook's
DIVIDER_STYLE = re.compile(r"border-top:\s*solid\s+#(?:e1e1e1|b5c4df)\b", re.IGNORECASE)  # and of older ones
RAW_TEXT = {"iframe", "noembed", "noframes", "script", "style", "textarea", "title", "xmp"}
NOT_TRACKED = {  # what a tag may say to keep its link, and the word that counts; "": any but "false"
    "data-track": "off",
    "clicktracking": "off",
    "data-msys-clicktrack": "0",
    "disable-tracking": "true",
    **dict.fromkeys(("data-skip-click", "data-no-track", "data-pm-no-track", "data-as-no-track", "ses:no-track"), ""),
    **dict.fromkeys(("mc:disable-tracking", "mautic:disable-tracking"), ""),
    "class": "untracked",
}
PLACEHOLDERS = (  # of template languages and mailing tools, how they begin and end
    *(("{", "}"), ("*|", "|*"), ("%%", "%%"), ("%recipient", "%"), ("«", "»"), ("@TrackLink", "")),
    # These may hold a quote, which ends their attribute before they do.
    *(("{{", ""), ("{%", ""), ("${", ""), ("#{", ""), ("<%", ""), ("<?", "")),
)
NAMED_PLACEHOLDER = re.compile(  # that has a sign which stands in ordinary URLs too
    r"""
      [?&] [^?&=#\[\]]+ (?: \[ [^?&=#\[\]]* \] )+ (?=[=&#]|\Z)    # none: a list, such as f[name]=
    | (   \[\[ [\s#/]* [A-Za-z]
        | (?<!//) \[ [%#$!*]? \s? [A-Za-z]\w[\w.:|\ -]* (?: ,\s*fallback= [^\[\]]* )? [%*]? \]
        | % (?![0-9A-Fa-f]{2}) [A-Za-z][\w.:\ -]+ %                  # of its two %, one begins no escape
        | % [A-Za-z][\w.:\ -]{2,} % (?![0-9A-Fa-f]{2})
        | ([#@~$])\2 \w[^#@~$]* \2\2 | \# [A-Za-z][\w.:]+ \# | ([@$]) [A-Z][A-Z0-9_]+ \3
        | %7[Bb]%7[Bb] | \*%7[Cc] [^*]* %7[Cc]\*                      # as editors write {{ and *|
      )""",
    re.VERBOSE,
)
# All placeholders have something of this, and few URLs do.
ODD_IN_URLS = re.compile(r"[^\w/:.?&=+,;!()'#%-]|%(?![0-9A-Fa-f]{2})|%7[BCbc]|#.*#", re.ASCII)

# Each alternative ends where no other could begin, so nothing is tried twice, and the lookahead with its back-reference
# keeps what it found: a tag without an end is given up in one pass.
_NAME = r"[^\t\n\f\r />][^\t\n\f\r />=]*(?![^\t\n\f\r />=])"
_VALUE = r"""(?:"[^"]*"|'[^']*'|[^\t\n\f\r >"'][^\t\n\f\r >]*(?![^\t\n\f\r >])|(?=>))"""
_ATTRIBUTE = rf"[\t\n\f\r /]*{_NAME}(?:[\t\n\f\r ]*=[\t\n\f\r ]*{_VALUE}|(?![\t\n\f\r ]*=))"
TAG_REST = re.compile(rf"(?=((?:{_ATTRIBUTE}){{0,{MAX_ATTRIBUTES}}}))\1[\t\n\f\r /]*>")
ATTRIBUTE = re.compile(rf"[\t\n\f\r /]*({_NAME})(?:[\t\n\f\r ]*=[\t\n\f\r ]*({_VALUE})|(?![\t\n\f\r ]*=))")
MARKUP = re.compile(r"<(?:(!--(?:-?>)?)|(/?)([A-Za-z][^\t\n\f\r />]*)|[!?]|/(?:[^>]|\Z))")
CONDITIONAL = re.compile(r"<!--\[if\b[^\]>]*\]>", re.IGNORECASE)
COMMENT_END = re.compile(r"--!?>")
SCRIPT_TURN = re.compile(r"<!--(?:-?>)?|-->|<(/?)script(?=[\t\n\f\r />])", re.IGNORECASE)
CHARACTER_REFERENCE = re.compile(r"&(?:#([0-9]+);?|#[xX]([0-9A-Fa-f]+);?|([A-Za-z0-9]+;?))")
UNSUBSCRIBES = re.compile(r"unsub|\bopt[_-]?out|abmeld|abbestell|desabon|desinscri|disiscri", re.IGNORECASE)
WEB_LINK = re.compile(r"https?://[^/?#\\]", re.IGNORECASE)
C0_OR_SPACE = "".join(map(chr, range(33)))
NEEDS_NO_QUOTES = re.compile(r"[^\s\"'=<>`]+")


class Edit(NamedTuple):
    """Put `new` in place of what stands from start up to end."""

    start: int
    end: int
    new: str
    attribute: tuple[int, int] | None = None  # of a link: where its attribute begins and ends; a line may break there

    @property
    def growth(self) -> int:
        """By how many characters the text gets longer."""
        return len(self.new) - (self.end - self.start)


Encode = Callable[[list[Edit]], list[Edit]]  # edits of an encoded text, of edits of what it holds


@dataclass(frozen=True, slots=True)
class LinkMaker:
    """What the links and the pixel of a tenant's emails are made of."""

    base: str  # the public address that they begin with
    mail_id: str
    secret: str
    leads_back: Callable[[Target], bool]  # whether a target leads to this server
    utm: str = ""  # what the tenant's links get, unless something else is said

    def is_ours(self, url: str) -> bool:
        """Whether a URL leads to this server; what can't be read does not."""
        try:
            return self.leads_back(read_target(url))
        except BadTarget:
            return False


@dataclass(frozen=True, slots=True)
class Instrumenting:
    """What to put into an email, as its sender wants it."""

    maker: LinkMaker
    key: str
    pixel: str = "bottom"  # one of PIXEL_PLACES, or a mark in the text of the HTML, in whose place it goes
    links: bool = True
    hidden_link: bool = False  # one that only machines follow
    tool_campaign: str | None = None  # with it, the key is what a mailing tool replaces by its own ids
    opens: bool = True  # whether the pixel is placed at all
    placeholder: re.Pattern[str] | None = None  # what a URL holds that is left for a tool to fill in
    utm: Collection[tuple[str, str]] = ()  # parameters that targets get
    preferences: str = ""  # the words of a line that leads to where a recipient says no, if there is to be one

    def untracked(self) -> Instrumenting:
        """The same, but nothing is placed or wrapped."""
        return replace(self, opens=False, links=False, hidden_link=False)

    def target(self, url: str) -> str:
        """Where the tracked link of a URL leads."""
        if not self.utm or UNSUBSCRIBES.search(url):
            return url
        longer = with_parameters(url, self.utm)
        return longer if len(longer) <= MAX_TARGET else url

    def wrap(self, url: str) -> str:
        """The tracked URL of a target, safe in HTML as it is. Raises BadTarget with the reason."""
        return self._url("click", f"/{signed_target(self.maker.secret, self.maker.mail_id, url)}")

    def hidden_url(self) -> str:
        """Of the link that only machines follow."""
        signature = sign(self.maker.secret, self.maker.mail_id, HIDDEN_SEGMENT)
        return self._url("click", f"/{signature}/{HIDDEN_SEGMENT}")

    def pixel_url(self) -> str:
        """Of the image that tells of opens."""
        return self._url("pixel", ".gif")

    def preferences_url(self) -> str:
        """Of the page on which a recipient says no. Where a tool fills in the key, the signature holds for all (UNGUESSABLE)."""
        signed = self.key if self.tool_campaign is None else ""
        return self._url("preferences", f"/{sign(self.maker.secret, self.maker.mail_id, signed, PREFERENCES)}")

    def target_beneath(self, url: str) -> str:
        """Where a link to this server leads if it is another email's, such as a quoted one's; else Meant."""
        hit = recognise(*split_target(url.removeprefix(self.maker.base)))
        target = hit[3] if hit and not any(self._path("click") + end in url for end in "/?") else None
        if not target or target == HIDDEN_TARGET or self.maker.is_ours(target):
            raise Meant("" if f"/{HIDDEN_SEGMENT}?" in f"{url}?" else "it leads to this server already")
        return target

    def _path(self, what: str) -> str:
        return f"/{self.maker.mail_id}/{what}/{key_in_path(self.key) if self.tool_campaign is None else self.key}"

    def _url(self, what: str, end: str) -> str:
        query = f"?campaign={quote(self.tool_campaign, safe='')}" if self.tool_campaign else ""
        return f"{self.maker.base}{self._path(what)}{end}{query}"


def placeholder_fault(text: str) -> str | None:
    """Why a text can't stand for the keys of a mailing tool, or None."""
    if re.fullmatch(rf"[^\x00-\x1f\x7f-\U0010ffff\"'/?#]{{1,{MAX_KEY}}}", text):
        return None
    return f"expected 1 to {MAX_KEY} characters of ASCII, such as {{{{ .Id }}}}, without \" ' / ? #, which would end it"


def read_placeholder(text: str) -> re.Pattern[str]:
    """Read what finds placeholders in URLs. Raises BadInput."""
    try:
        if not (pattern := re.compile(text)).search(""):  # else every URL would have one
            return pattern
        fault = "it finds nothing at all, too"
    except (re.error, OverflowError, RecursionError) as error:
        fault = str(error)
    raise BadInput(f"--placeholder {text!r}: expected a regular expression, such as '__[A-Z]+__': {fault}")


def read_pixel_place(text: str, name: str) -> str:
    """Read where the pixel goes: one of PIXEL_PLACES, or a mark that begins and ends with a sign. Raises BadInput."""
    if text not in PIXEL_PLACES and not re.fullmatch(r"(?![ \w])[ -~]{3,200}(?<![ \w])", text):
        raise BadInput(f"{name}: expected {', '.join(PIXEL_PLACES)}, or a mark in the HTML, such as {{{{pixel}}}}")
    return text


@dataclass(slots=True)
class Report:
    """What became of a message. Sizes are bytes of the HTML without its transfer encoding."""

    wrapped: list[str] = field(default_factory=list)  # targets, in order, each as often as it occurs
    left: list[tuple[str, str]] = field(default_factory=list)  # URLs and reasons
    pixel: str = "not placed: there is no HTML that can hold it"
    hidden_link: str = "not placed: there is no HTML that can hold it"
    preferences: str = "not placed: not asked for"
    touched: list[str] = field(default_factory=list)  # parts, such as "1.2 text/html"
    skipped: list[tuple[str, str]] = field(default_factory=list)  # parts and reasons
    size_before: int = 0
    size_after: int = 0
    edits: list[Edit] = field(default_factory=list)  # of the whole; a character of new text is a byte
    notes: list[str] = field(default_factory=list)  # what the sender should know
    faults: dict[str, list[str]] = field(default_factory=dict)  # URLs that the sender meant to be wrapped, by reasons
    tracks: bool = False  # whether anything was wrapped or placed, so that the email is one to register

    @property
    def links(self) -> int | None:
        """How many different links were wrapped, if any."""
        return len(set(self.wrapped)) or None

    def warnings(self) -> list[str]:
        """What the sender should know before the message is sent."""
        told = [
            f"links left as they are: {len(urls)}, such as {re.sub('//[^/]*@', '//', urls[0])[:200]!r}: {reason}"
            for reason, urls in islice(self.faults.items(), 5)
        ]
        if self.size_after > CLIPPED_BYTES:
            size = f"the HTML has {self.size_after:,} bytes, {self.size_before:,} before"
            told.append(f"{size}: Gmail clips a message at about 102,000, and a pixel at its end with it")
        return [*self.notes, *told]

    def as_json(self) -> dict[str, Any]:
        """The report for programs."""
        return {
            "wrapped": self.wrapped,
            "left": [{"url": url, "reason": reason} for url, reason in self.left],
            "pixel": self.pixel,
            "hidden_link": self.hidden_link,
            "preferences": self.preferences,
            "touched": self.touched,
            "skipped": [{"part": part, "reason": reason} for part, reason in self.skipped],
            "size_before": self.size_before,
            "size_after": self.size_after,
            "warnings": self.warnings(),
        }


THERE = "not placed: one of ours is there already"
NOT_ASKED_FOR = "not placed: not asked for"


class Unclear(ValueError):
    """Why a part, or the message, is left as it is."""


def apply_edits(text: str, edits: Iterable[Edit]) -> str:
    """The text with its edits, which are in order and do not overlap."""
    parts, at = [], 0
    for edit in edits:
        parts += [text[at : edit.start], edit.new]
        at = edit.end
    return "".join([*parts, text[at:]])


def instrument_html(text: str, how: Instrumenting) -> tuple[str, Report]:
    """Wrap the links of an HTML text and place the pixel. The report is about its UTF-8."""
    new, report = instrument_html_bytes(text.encode("utf-8", "surrogatepass"), how)
    return new.decode("utf-8", "surrogatepass"), report


def instrument_html_bytes(raw: bytes, how: Instrumenting) -> tuple[bytes, Report]:
    """As instrument_html, of UTF-8; bytes that are none stay as they are, and a link with some in it is left."""
    content = raw.decode("latin-1")
    return instrument_pages(content, [Page(content, content)], how, Report())


# -- HTML: where its tags are, and what their attributes say


class Tag(NamedTuple):
    """A start or end tag, where it stands, and whether in a conditional comment, which only Outlook reads."""

    name: str  # lower case; "/name" for an end tag
    start: int
    end: int
    conditional: bool


class Attribute(NamedTuple):
    """Where an attribute begins, and where its value stands, without the quotes if it has any."""

    begin: int
    start: int
    end: int
    quoted: bool


def decode_attribute(text: str) -> str:
    """Decode the character references of an attribute's value, once, by the rule for attributes."""

    def decode(match: re.Match[str]) -> str:
        decimal, hexadecimal, name = match.groups()
        if name:
            # Without its semicolon it is text if a letter, a digit or "=" follows: `?a=1&copy=2` holds no ©.
            literal = not name.endswith(";") and text[match.end() : match.end() + 1] == "="
            return match[0] if literal else html.entities.html5.get(name, match[0])
        number = int((decimal or hexadecimal).lstrip("0")[:8] or "0", 10 if decimal else 16)
        # A few stand for others, as html.unescape knows; but what it leaves out is kept.
        return html.unescape(f"&#{number};") or chr(number)

    return CHARACTER_REFERENCE.sub(decode, text) if "&" in text else text


def read_tags(
    text: str, at: int = 0, end: int = sys.maxsize, *, conditional: bool = False, wanted: Collection[str] = WANTED_TAGS
) -> Iterator[Tag]:
    """The wanted tags of an HTML text, in order, in linear time; last one named "" where the text ends unfinished."""
    end = min(end, len(text))
    while match := MARKUP.search(text, at, end):
        start = match.start()
        comment, slash, name = match.groups()
        if comment:
            over = match if comment.endswith(">") else COMMENT_END.search(text, match.end(), end)
            at = over.end() if over else -1
            condition = CONDITIONAL.match(text, start, end)
            if condition and at > 0 and not conditional:  # such comments hold tags, and those of VML (`v:…`) too
                inner = read_tags(text, condition.end(), at, conditional=True, wanted=wanted)
                yield from (tag for tag in inner if tag.name)
        elif name:
            name = slash + name.lower()
            rest = TAG_REST.match(text, match.end(), end)
            at = rest.end() if rest else -1
            if rest and (name in wanted or (conditional and name.startswith("v:"))):
                yield Tag(name, start, at, conditional)
            if rest and name in RAW_TEXT:
                at = _end_of_raw_text(text, name, at, end)
            elif name == "plaintext":
                at = -1
        else:
            at = text.find(">", match.end() - 1, end) + 1 or -1
        if at < 0:
            yield Tag("", start, end, conditional)
            return


def _end_of_raw_text(text: str, name: str, at: int, end: int) -> int:
    """Where the end tag of an element that holds text and no markup begins, or -1."""
    # A script in a script, within what looks like a comment, hides the end tag: 13.2.5.17 to 13.2.5.31.
    turns = SCRIPT_TURN if name == "script" else re.compile(rf"<(/){name}(?=[\t\n\f\r />])", re.IGNORECASE)
    escaped = nested = False
    for match in turns.finditer(text, at, end):
        if match[0].endswith(">"):
            escaped = nested = False
        elif match[0] == "<!--":
            escaped = True
        elif match[1] and not nested:
            return match.start()
        else:
            nested = escaped and not match[1]
    return -1


def read_quotations(text: str) -> Iterator[tuple[int, int]]:
    """Where mail programs put the mail that one answers or forwards; behind Outlook's divider, all that follows."""
    name, start, depth = "", len(text), 0
    for tag in read_tags(text, wanted=QUOTING_TAGS):
        if tag.conditional:
            continue
        if depth:
            depth += (tag.name == name) - (tag.name == f"/{name}")
            if not depth:
                yield start, tag.start
            continue
        said = {name: text[place.start : place.end] for name, place in read_attributes(text, tag).items()}
        is_divider = said.get("id") in DIVIDER_IDS or DIVIDER_STYLE.search(said.get("style", ""))
        if is_divider or tag.name == "blockquote" or not QUOTE_CLASSES.isdisjoint(said.get("class", "").split()):
            name, start, depth = "" if is_divider else tag.name, tag.start, 1
    if depth:
        yield start, len(text)


def read_marks(text: str, mark: str) -> Iterator[tuple[int, int]]:
    """Where a mark stands in the text of an HTML text, and not within tags, comments and the like."""
    stand_in = f"<x{' ' * (len(mark) - 3)}>"
    for tag in read_tags(text.replace(mark, stand_in), wanted={"x"}):
        if tag.name and not tag.conditional and text.startswith(mark, tag.start):
            yield tag.start, tag.end


def read_attributes(text: str, tag: Tag) -> dict[str, Attribute]:
    """The attributes of a tag by their names in lower case; of several of one name the first counts."""
    found: dict[str, Attribute] = {}
    for match in ATTRIBUTE.finditer(text, tag.start + 1 + len(tag.name), tag.end):
        name, value = match.groups()
        start, end = match.span(2) if value is not None else (match.end(), match.end())
        quoted = bool(value) and value[0] in "\"'"
        found.setdefault(name.lower(), Attribute(match.start(1), start + quoted, end - quoted, quoted))
    return found


# -- HTML: what to change in it


class Page(NamedTuple):
    """HTML to instrument."""

    content: str  # without its transfer encoding; a character is a byte
    text: str  # in which to look for tags: the content, but for letters that look like ASCII and are none
    codec: str = "utf-8"
    name: str = "the page"
    unsubscribe: Collection[str] = ()  # the URLs of List-Unsubscribe, as url_meaning makes them
    start: int = 0  # where its body begins in the message
    encode: Encode = list  # for its body
    longest: float = math.inf  # what a line may hold: no attribute and no pixel may be longer
    stale: tuple[Edit, ...] = ()  # what takes headers out that would be wrong of a part that was changed
    is_text: bool = False  # and no HTML: nothing is tracked in it

    def read(self, place: Attribute) -> str:
        """The value of an attribute as it is written. Raises BadTarget."""
        value = self.content[place.start : place.end]
        try:
            plain = value.isascii() and value == self.text[place.start : place.end]
            return value if plain else value.encode("latin-1").decode(self.codec)
        except UnicodeError:
            raise BadTarget("its characters can't be read in the part's charset") from None


def instrument_pages(text: str, pages: list[Page], how: Instrumenting, report: Report) -> tuple[bytes, Report]:
    """Wrap the links of the pages of a text, and put the hidden link and the pixel into the first that can hold them."""
    found = [(page, [*islice(read_tags(page.text), MAX_TAGS + 1)]) for page in pages if not page.is_text]
    marks = {page.name: [*read_marks(page.text, how.pixel)] for page in pages if how.pixel not in PIXEL_PLACES}
    found.sort(key=lambda each: not marks.get(each[0].name))
    additions = _additions(found, how, report)
    for page, tags in found:
        report.size_before += len(page.content)
        report.size_after += len(page.content)
        if len(tags) > MAX_TAGS:  # it is no mail
            report.skipped.append((page.name, f"it has more than {MAX_TAGS:,} links and images"))
            continue
        edits: list[Edit] = []
        for name, (markup, where) in [*additions.items()]:
            if len(markup) > page.longest:
                said = f"not placed: its {len(markup)} characters are more than a line of this part may have"
            else:
                place, said = _place(page.text, tags, where)
                span = (place, place)
                if name == "pixel" and marks:
                    if spans := marks[page.name]:
                        span, said = spans.pop(0), f"placed where {where} was"
                    else:
                        said = f"{said}: {where} is not in the text"
                        report.notes.append(f"the pixel was {said}")
                edits.append(Edit(*span, markup))
                del additions[name]
            setattr(report, name, said)
        links = [tag for tag in tags if tag.name in LINK_TAGS or tag.name.startswith("v:")] if how.links else []
        edits += filter(None, [_link_edit(page, tag, how, report) for tag in links])
        if edits:
            report.tracks = True
        edits += [Edit(*span, "") for span in marks.get(page.name, ())]  # nobody is to read a mark
        edits += _preference_edits(page, tags, how, report)
        report.size_after += sum(edit.growth for edit in edits)
        made = _change(page, edits, report)
        if broken := sum(len(edit.new.splitlines()) > 1 for edit in made if page.longest < math.inf):
            most = f"since a line may have {page.longest} characters"
            report.notes.append(f"{page.name}: line breaks were put into {broken} tags, {most}")
    for page in pages:
        if page.is_text:
            _change(page, _preference_edits(page, [], how, report, LINE_BREAK.search(page.text + text)), report)
    report.edits = sorted(dict.fromkeys(report.edits), key=lambda edit: edit.start)
    return apply_edits(text, report.edits).encode("latin-1"), report


def _change(page: Page, edits: list[Edit], report: Report) -> list[Edit]:
    """Note edits of a page as those of the whole."""
    if not edits:
        return []
    report.touched.append(page.name)
    made = page.encode(sorted(edits, key=lambda edit: edit.start))
    made = [Edit(page.start + start, page.start + end, new) for start, end, new, _ in made]
    report.edits += [*made, *page.stale]
    return made


def _preference_edits(
    page: Page, tags: list[Tag], how: Instrumenting, report: Report, line_break: re.Match[str] | None = None
) -> list[Edit]:
    """What puts the URL of the recipient's page in place of its marks; without one a line at the end, if that is asked for."""
    url = how.preferences_url()
    if marks := [Edit(*mark.span(), url) for mark in PREFERENCES_MARK.finditer(page.text)]:
        report.preferences = "placed where its mark was"
        return marks
    if not (how.preferences and report.tracks):
        return []
    if url in page.text:
        report.preferences = THERE
        return []
    if page.is_text:
        end = len(page.text.rstrip(" \t\r\n"))  # no more: other letters may be bytes of a character
        words = unicodedata.normalize("NFKD", how.preferences).encode("ascii", "ignore").decode()
        return [Edit(end, end, f"{(line_break[0] if line_break else '') * 2}{words}: {url}")]
    place, report.preferences = _place(page.text, tags, "bottom")
    words = html.escape(how.preferences).encode("ascii", "xmlcharrefreplace").decode()
    return [Edit(place, place, f'<p><a href="{url}">{words}</a></p>')]


def _additions(found: list[tuple[Page, list[Tag]]], how: Instrumenting, report: Report) -> dict[str, tuple[str, str]]:
    """What is asked for and not there, by its field of the report: its markup, and where it goes."""

    def is_there(names: Collection[str], attribute: str, wanted: str, where: str) -> bool:
        path = wanted.removeprefix(how.maker.base).partition("?")[0]
        for page, tags in found:
            ours = []
            for tag in (tag for tag in tags if tag.name in names):
                place = read_attributes(page.text, tag).get(attribute)
                url = browser_trim(decode_attribute(page.text[place.start : place.end])) if place else ""
                if f"{path}?" in f"{url}?" and how.maker.is_ours(url):
                    ours.append(tag)
            if ours and not all(_is_quoted(page.text, ours, _place(page.text, tags, where)[0])):
                return True
        return False

    link = f'<a href="{how.hidden_url()}" aria-hidden="true" tabindex="-1" style="display:none"></a>'
    # Out of the text's flow: within it, HTML5 would give it a line of its own, and set apart what is next to it.
    image = f'<img src="{how.pixel_url()}" width="1" height="1" alt="" style="display:block;float:left">'
    additions = {}
    for name, asked, tags, attribute, url, markup, where in (
        # First of all, since some follow the first link only.
        ("hidden_link", how.hidden_link, LINK_TAGS, "href", how.hidden_url(), link, "first"),
        ("pixel", how.opens and how.pixel != "none", {"img"}, "src", how.pixel_url(), image, how.pixel),
    ):
        if not asked:
            setattr(report, name, NOT_ASKED_FOR)
        elif is_there(tags, attribute, url, where):
            setattr(report, name, THERE)
        else:
            additions[name] = markup, where
    return additions


def _is_quoted(text: str, tags: list[Tag], place: int) -> Iterator[bool]:
    """Of each tag, whether it stands in a quotation, and not just where we would put it, which may be in one that never ends."""
    quotations = list(read_quotations(text))
    for tag in tags:
        n = bisect.bisect_right(quotations, (tag.start, sys.maxsize)) - 1
        yield n >= 0 and tag.start < quotations[n][1] and place not in (tag.start, tag.end)


def _place(text: str, tags: list[Tag], where: str) -> tuple[int, str]:
    """Where an addition goes, and how a report says it: "top", "bottom", or "first", which is before all links as well."""
    live = [tag for tag in tags if not tag.conditional]
    if where == "first":
        links = [(tag.start, "placed before the first link") for tag in live if tag.name == "a"]
        return min([_place(text, tags, "top"), *links], key=lambda place: place[0])
    if where == "top":
        for name in ("body", "/head"):
            if first := next((tag.end for tag in live if tag.name == name), 0):
                return first, f"placed first in the body, behind <{name}>"
    last = {tag.name: tag.start for tag in live}
    for name in ("/body", "/html", ""):
        if name in last:
            return last[name], f"placed before <{name}>" if name else "placed at the end, before unfinished markup"
    return len(text), "placed at the end"


def _link_edit(page: Page, tag: Tag, how: Instrumenting, report: Report) -> Edit | None:
    """What wraps a tag's link, if it is to be wrapped; else the report says why not."""
    attributes = read_attributes(page.text, tag)
    url = page.text[href.start : href.end] if (href := attributes.get("href")) else ""
    if href is None or PREFERENCES_MARK.search(url):
        return None
    try:
        url = browser_trim(decode_attribute(page.read(href)))
        url = how.target_beneath(url) if how.maker.is_ours(url) else url
        _refuse_other_links(page, url, attributes, how)
        if len(report.wrapped) >= MAX_WRAPPED:
            raise BadTarget(f"the message has more than {MAX_WRAPPED:,} links")
        target = how.target(url)
        tracked = how.wrap(target)
        if not href.quoted and not NEEDS_NO_QUOTES.fullmatch(tracked):
            tracked = f'"{tracked}"'
        begin, end = href.begin, href.end + href.quoted
        edit = Edit(href.start, href.end, tracked, (begin, end))
        if end - begin + edit.growth > page.longest:
            raise BadTarget(f"its tracked link is longer than a line of this part may be ({page.longest} characters)")
    except BadTarget as error:
        if reason := str(error):
            report.left.append((url, reason))
        if not isinstance(error, Meant):
            report.faults.setdefault(reason, []).append(url)
        return None
    report.wrapped.append(target)
    return edit


def holds_placeholder(url: str) -> bool:
    """Whether a template language or a mailing tool would put something else in place of a part of a URL."""
    url = url[:MAX_TARGET]  # what is longer is left in any case
    if not ODD_IN_URLS.search(url):
        return False
    for begin, end in PLACEHOLDERS:
        _, found, rest = url.partition(begin)
        if found and end in rest:
            return True
    return any(match[1] for match in NAMED_PLACEHOLDER.finditer(url))


def browser_trim(url: str) -> str:
    """A URL without what browsers drop of it: spaces and control characters around it, tabs and line breaks in it."""
    return re.sub("[\t\r\n]", "", url.strip(C0_OR_SPACE))


def url_meaning(url: str) -> str:
    """What the spellings of a URL have in common: its host as a browser reads it, and what is behind it, decoded."""
    try:
        location, host, _ = read_target(url)
    except BadTarget:
        return url
    return f"{host}/{unquote(re.split('://[^/?#]*/*', location.partition('#')[0], maxsplit=1)[-1])}"


def _refuse_other_links(page: Page, url: str, attributes: Mapping[str, Attribute], how: Instrumenting) -> None:
    """Raise Meant, with the reason, for a link that stays as it is; with none for one that nobody asks about."""
    if (how.placeholder and how.placeholder.search(url)) or holds_placeholder(url):
        raise Meant("it holds a placeholder of a template; instrument after the merge to track it")
    if not url or url.startswith("#"):
        raise Meant
    if not WEB_LINK.match(url):
        raise Meant("it is no absolute http or https link")
    for name, value in NOT_TRACKED.items():
        if name in attributes:
            said = page.text[attributes[name].start : attributes[name].end].strip().lower()
            if value in said.split() if value else said != "false":
                raise Meant(f"its tag says {name}" + f"={value}" * bool(value))
    if page.unsubscribe and url_meaning(url) in page.unsubscribe:
        raise Meant("it is the message's List-Unsubscribe")


# == Messages ==========================================================================================
# Where the HTML of a message stands. Pure. A message is read as latin-1, in which a character is a byte, and so are all places.

MAX_DEPTH = 50  # of parts in parts
MAX_PARTS = 1_000  # more, and a message is no mail
MAX_EDGES = 10_000  # places that look like a boundary
MAX_LINES = 250_000  # of an encoded part; of full ones, 10 MB are half as many
MAX_HEADERS = 256_000  # bytes, of one part
MAX_PARAMETERS = 2_000  # bytes of a Content-Type: to read many of them takes quadratic time
MAX_LINE = 998  # RFC 5322 §2.1.1, without the line break
MESSAGE_HEADERS = {"from", "to", "cc", "bcc", "subject", "date", "message-id", "mime-version", "content-type"}
TRACK_HEADER = "X-Track"  # of a message: what its sender wants tracked
TRACK_WORDS = ({"none"}, {"opens"}, {"clicks"}, {"opens", "clicks"})
WALKED = {"multipart/mixed", "multipart/alternative", "multipart/related"}
OTHER_PARTS = {
    **dict.fromkeys(("multipart/signed", "multipart/encrypted"), "it is signed or encrypted, which a change breaks"),
    **dict.fromkeys(("application/pkcs7-mime", "application/x-pkcs7-mime"), "it is signed or encrypted (S/MIME)"),
    "multipart/report": "it reports on another message",
}
BLANK_LINE = re.compile(r"(?:\A|\r\n|\n|\r(?!\n))(\r\n|\n|\r)")
SPACED_COLON = re.compile(r"((?:\A|[\r\n])[!-9;-~]+)[ \t]+:")
BOUNDARY_REST = re.compile(r"(--)?[ \t]*(?:\r\n|\n|\r|\Z)")
NO_HEADER = re.compile(r"(?:\A|[\r\n])(?![!-9;-~]+[ \t]*:|[ \t\r\n]|\Z)")


class Part(NamedTuple):
    """One part of a message: what its headers say, and where its body stands."""

    number: str  # "1.2", as IMAP counts
    headers: email.message.Message
    kind: str  # such as text/html
    charset: str
    boundary: str | None
    start: int
    end: int
    has_body: bool  # whether a blank line ends its headers

    def __str__(self) -> str:
        return f"{self.number} {self.kind}"

    def header(self, name: str) -> str:
        """A header's value, "" without one; of those that must be there once, Unclear if it is not."""
        values = self.headers.get_all(name, [""])
        if len(values) > 1:
            raise Unclear(f"it has {len(values)} headers {name}; expected one")
        return re.sub(r"[\r\n]+", "", str(values[0])).strip()


def instrument_message(raw: bytes, how: Instrumenting, *, force: bool = False) -> tuple[bytes, Report]:
    """Wrap the links and place the pixel in the HTML of a message, with `force` also if that breaks a signature over it."""
    text = raw.decode("latin-1")
    report = Report()
    mbox = LINE_BREAK.search(text) if text.startswith("From ") else None  # a line before the headers
    start = mbox.end() if mbox else 0
    try:
        whole = read_part(text, start, len(text))
        for name in ("DKIM-Signature", "ARC-Seal"):
            if name in whole.headers and not force:
                raise Unclear(f"it has a {name}, which any change breaks; instrument before signing, or force it")
        how = _as_its_header_says(whole, how, report)
        pages = _read_pages(text, start, whole, how, report)
    except Unclear as error:
        return raw, Report(pixel="not placed: the message is left as it is", skipped=[("the message", str(error))])
    report.edits = _header_edits(text, start, whole.start, TRACK_HEADER)
    return instrument_pages(text, pages, how, report)


def _as_its_header_says(whole: Part, how: Instrumenting, report: Report) -> Instrumenting:
    """Track of a message only what its X-Track says, if it has one. Raises Unclear, to track nothing, if that is no word."""
    if (said := whole.headers.get_all(TRACK_HEADER)) is None:
        return how
    told = ", ".join(map(str, said))
    words = {*re.findall(r"[^\s,]+", told.lower())}
    if words not in TRACK_WORDS:
        raise Unclear(f"its {TRACK_HEADER} is {told[:40]!r}; expected none, opens, clicks, or both of these")
    if words == {"none"}:
        report.skipped.append(("the message", f"its {TRACK_HEADER} says none"))
    clicks = "clicks" in words
    return replace(how, opens="opens" in words, links=how.links and clicks, hidden_link=how.hidden_link and clicks)


def _header_edits(text: str, start: int, end: int, name: str) -> list[Edit]:
    """What takes the headers of a name out, with the lines that they are folded into."""
    line = rf"(?<![^\r\n]){name}[ \t]*:[^\r\n]*(?:(?:\r\n|\n|\r)[ \t][^\r\n]*)*(?:\r\n|\n|\r|\Z)"
    return [Edit(*match.span(), "") for match in re.compile(line, re.IGNORECASE).finditer(text, start, end)]


def read_headers(text: str) -> email.message.Message:
    """Read headers up to the blank line behind them."""
    import email.parser

    # A space before the colon is old, and allowed (RFC 5322 §4.5.8), but the parser takes it for the end of headers.
    return email.parser.HeaderParser().parsestr(SPACED_COLON.sub(r"\1:", text))


def _headers_of(raw: bytes) -> email.message.Message:
    head, *_ = re.split(rb"\r\n\r\n|\n\n|\r\r", raw[:MAX_HEADERS], maxsplit=1)
    try:
        return read_headers(head.decode("utf-8"))
    except UnicodeDecodeError:
        return read_headers(head.decode("latin-1"))


def is_message(raw: bytes) -> bool:
    """Whether it begins with headers, of which one is of mail."""
    return not MESSAGE_HEADERS.isdisjoint(name.lower() for name in _headers_of(raw))


def key_of_message(maker: LinkMaker, raw: bytes, recipient: str) -> str:
    """The key of a message for a recipient, by its Message-ID: the same at each try. A new one where either is missing."""
    message_id = str(_headers_of(raw).get("Message-ID", "")).strip()
    return key_of_mail(maker.secret, maker.mail_id, message_id, recipient) if message_id and recipient else new_key()


def decode_words(text: str) -> str:
    """Decode the encoded words of a header (RFC 2047); one that can't be read stays as it is."""
    import email.header

    with contextlib.suppress(Exception):  # whatever a header of a stranger's makes of the parser
        return str(email.header.make_header(email.header.decode_header(text)))
    return text


def said_by_headers(raw: bytes) -> tuple[str, list[str]]:
    """Read the subject of a message and the addresses of To, Cc and Bcc; "" and none where they can't be read."""
    import email.utils

    headers = _headers_of(raw)

    def decoded(value: object) -> str:
        return " ".join(UNFIT.sub(" ", decode_words(str(value))).split())

    named = [str(each) for name in ("To", "Cc", "Bcc") for each in headers.get_all(name, [])]
    addresses: list[tuple[str, str]] = []
    with contextlib.suppress(Exception):  # such as RecursionError, for comments in comments
        addresses = email.utils.getaddresses(named)
    return decoded(headers.get("Subject", "")), [decoded(address) for _, address in addresses if "@" in address]


def read_part(text: str, start: int, end: int, number: str = "") -> Part:
    """Read the headers of a part. Raises Unclear where they have no end or no meaning."""
    head = text[start : min(start + MAX_HEADERS, end)]
    if blank := BLANK_LINE.search(head):
        head = head[: blank.start(1)]
    elif len(head) == MAX_HEADERS:
        raise Unclear(f"its headers have more than {MAX_HEADERS:,} bytes")
    if NO_HEADER.search(head):
        raise Unclear("its headers hold a line that is no header")
    headers = read_headers(head)
    if len(headers.get("Content-Type", "")) > MAX_PARAMETERS:
        raise Unclear(f"its Content-Type has more than {MAX_PARAMETERS:,} bytes")
    try:
        kind = headers.get_content_type()
        charset = headers.get_content_charset() if kind in ("text/html", "text/plain") else None
        boundary = headers.get_boundary() if kind in WALKED else None
    except Exception:  # whatever a header of a stranger's makes of the parser
        raise Unclear("its Content-Type can't be read") from None
    body = start + blank.end() if blank else end
    return Part(number, headers, kind, charset or "utf-8", boundary, body, end, blank is not None)


def _read_pages(text: str, start: int, whole: Part, how: Instrumenting, report: Report) -> list[Page]:
    """The HTML that readers see, what is shown first of all, and text that gets something; the report has all other parts."""
    said = "".join(map(str, whole.headers.get_all("List-Unsubscribe", [])))
    forms = (said, decode_words(said), said.encode("latin-1", "replace").decode("utf-8", "replace"))
    unsubscribe = {url_meaning(url) for form in forms for url in re.findall("<([^<>]*)>", re.sub(r"\s", "", form))}
    pages: list[Page] = []
    count = 1
    waiting = [("" if whole.kind in WALKED else "1", start, len(text), tuple[Edit, ...]())]
    while waiting:
        name, start, end, stale = waiting.pop()
        try:
            part = read_part(text, start, end, name)
            name = str(part).strip()
            stale += tuple(_header_edits(text, start, part.start, "Content-Length"))
            _refuse_other_parts(part)
            if part.kind in ("text/html", "text/plain"):
                page = _read_page(text, part, unsubscribe)._replace(stale=stale, is_text=part.kind == "text/plain")
                if page.is_text and not (how.preferences or PREFERENCES_MARK.search(page.text)):
                    raise Unclear("plain text is left as it is")
                pages.append(page)
                continue
            if part.number.count(".") == MAX_DEPTH - 1:
                raise Unclear(f"it stands in {MAX_DEPTH} other parts")
            spans = split_parts(text, part)
        except Unclear as error:
            report.skipped.append((name, str(error)))
            continue
        count += len(spans)
        if count > MAX_PARTS:
            raise Unclear(f"it has more than {MAX_PARTS:,} parts")
        inner = [(f"{part.number}.{n}".lstrip("."), *span, stale) for n, span in enumerate(spans, 1)]
        # Of alternatives the last is shown (RFC 2046 §5.1.4).
        waiting += inner if part.kind == "multipart/alternative" else reversed(inner)
    return pages


def _refuse_other_parts(part: Part) -> None:
    """Raise Unclear, with the reason, for a part that holds no HTML to instrument."""
    disposition = part.header("Content-Disposition").partition(";")[0].strip().lower()
    if disposition not in ("", "inline"):
        raise Unclear("it is an attachment")
    if part.kind not in ("text/html", "text/plain", *WALKED):
        raise Unclear(OTHER_PARTS.get(part.kind, "only text/html is instrumented"))
    if not part.has_body:
        raise Unclear("it has no body")
    part.header("Content-Type")
    token = part.header("Content-Transfer-Encoding")
    if part.kind in WALKED and token.rstrip("; \t").lower() not in ("", "7bit", "8bit", "binary"):
        raise Unclear(f"its Content-Transfer-Encoding is {token[:40]!r}, which parts in parts can't have")
    if "Content-MD5" in part.headers:
        raise Unclear("it has a Content-MD5, which any change breaks")


def split_parts(text: str, part: Part) -> list[tuple[int, int]]:
    """Where the parts of a multipart stand; a missing end is put up with. Raises Unclear if its boundary is nowhere."""
    if not part.boundary:
        raise Unclear("its boundary is not given")
    opening = f"--{part.boundary}"
    edges = []  # where a part begins, and where the one before it ends
    at = part.start - 1
    for _ in range(MAX_EDGES):  # since parts in parts are read once for each depth
        at = text.find(opening, at + 1, part.end)
        if at < 0:
            edges.append((part.end, part.end))
            break
        line = BOUNDARY_REST.match(text, at + len(opening), part.end)
        if line and text[at - 1] in "\r\n":  # which belongs to it
            edges.append((line.end(), at - (2 if text.endswith("\r\n", 0, at) else 1)))
            if line[1]:
                break
    else:
        raise Unclear(f"its boundary is there {MAX_EDGES:,} times or more")
    if len(edges) < 2:
        raise Unclear("its boundary is nowhere")
    return [(begin, max(begin, end)) for (begin, _), (_, end) in pairwise(edges)]


# -- Charsets and transfer encodings. Each finds the bytes that an edit means, and encodes only what is new.

ENCODED_LINE = 76  # RFC 2045 §6.7 and §6.8
UNCHANGED = {"", "7bit", "7bits", "7-bit", "8bit", "8bits", "8-bit", "binary"}  # encodings that encode nothing
QP_ESCAPE = re.compile("=([0-9A-Fa-f]{2})")
# What does not stand for itself: an escape, a soft line break, spaces at the end of a line. To look for those takes most
# of the time, so it is done where there are any.
QP_TOKEN = re.compile(r"=(?:([0-9A-Fa-f]{2})|[ \t]*(?:\r\n|\n|\r|\Z))")
QP_TOKEN_OR_SPACES = re.compile(rf"{QP_TOKEN.pattern}|(?<![ \t])[ \t]+(?=[\r\n]|\Z)")
BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}")
SHIFTED = {  # by the beginnings of charsets in which ASCII stands for other letters between marks: where it does
    # Kanji, katakana of half the width, letters of another set for one character (ESC N), and between SO and SI.
    "iso2022": re.compile(r"\x1b(?:\$(?:[@AB]|\([@-Z])|\(I)[^\x1b]*(?:\x1b[.N][^\x1b]*)*|\x1bN.|\x0e[^\x0f]*"),
    "hz": re.compile(r"~~|~\{(?:[!-}][!-~])*"),
}
BYTE_ORDER_MARKS = ("\xff\xfe", "\xfe\xff", "\0\0\xfe\xff")  # of UTF-16 and UTF-32
NO_CHARSETS = {"idna", "punycode", "raw-unicode-escape", "undefined", "unicode-escape"}  # Python's, and nobody else's
MARKUP_BYTES = b"AZaz09 <>\"'=/&#;:?.-_"


def _read_page(text: str, part: Part, unsubscribe: Collection[str]) -> Page:
    """Read the HTML of a part. Raises Unclear, with the reason, to leave it as it is."""
    content, encode, longest = decode_part(text, part)
    if "-----BEGIN PGP" in content:
        raise Unclear("it holds a PGP block, which any change may break")
    try:
        codec = codecs.lookup(part.charset).name.replace("_", "-")
        "".encode(codec)  # raises LookupError for those of Python's that are no charsets, such as hex
    except (LookupError, ValueError):
        codec = "ascii"
    codec = "ascii" if codec in NO_CHARSETS else codec
    if codec.startswith(("utf-16", "utf-32")) or content.startswith(BYTE_ORDER_MARKS):
        raise Unclear("it is in UTF-16 or UTF-32; send it in UTF-8 to have it instrumented")
    if codec in ("utf-7", "johab") or MARKUP_BYTES.decode(codec, "replace") != MARKUP_BYTES.decode():
        raise Unclear(f"its charset {part.charset[:40]!r} does not keep ASCII as it is")
    shown = content
    for begin, shifted in SHIFTED.items():
        if part.charset.replace("-", "").startswith(begin):
            shown = shifted.sub(_blank, content)
    return Page(content, shown, codec, str(part), unsubscribe, part.start, encode, longest)


def _blank(run: re.Match[str]) -> str:
    """Put in place of letters that are shifted what is no markup."""
    if run.end() == len(run.string) and run[0] != "~~":
        raise Unclear("it ends among letters that are shifted")
    return "_" * len(run[0])


def decode_part(text: str, part: Part) -> tuple[str, Encode, float]:
    """Undo a part's transfer encoding: what Page calls content, encode and longest. Raises Unclear."""
    said = part.header("Content-Transfer-Encoding")
    token = said.rstrip("; \t").lower()
    body = text[part.start : part.end]
    found = LINE_BREAK.search(body) or LINE_BREAK.search(text)
    line_break = found[0] if found else "\r\n"
    if token == "binary":
        return body, list, math.inf
    if token in UNCHANGED:
        return body, partial(_plain_edits, body, line_break), MAX_LINE
    if max(map(body.count, "\r\n")) > MAX_LINES:
        raise Unclear(f"it has more than {MAX_LINES:,} lines")
    # A word that only some take for what is meant must be borne out by the body: others show it as it stands.
    unsure = Unclear(f"its Content-Transfer-Encoding is {said[:40]!r}, and its body may be in it or not")
    if token == "base64":
        content, encode = _decode_base64(body, line_break)
        if said.lower() != token and "<" not in content:
            raise unsure
        return content, encode, math.inf
    if token in ("quoted-printable", "quoted printable"):
        if said.lower() != "quoted-printable" and ("=" not in body or "=" in QP_TOKEN.sub("", body)):
            raise unsure
        return *_decode_quoted_printable(body, line_break), math.inf
    raise Unclear(f"its Content-Transfer-Encoding is {token[:40]!r}, which is unknown")


def _line_around(text: str, start: int, end: int, most: int) -> tuple[int, int]:
    """Where the line of a span begins and ends; so many characters before and behind it are looked at."""
    nearest, furthest = max(start - most, 0), min(end + most, len(text))
    line_break = LINE_BREAK.search(text, end, furthest)
    begin = max(text.rfind(each, nearest, start) for each in "\r\n") + 1 or nearest
    return begin, line_break.start() if line_break else furthest


def _plain_edits(body: str, line_break: str, edits: list[Edit]) -> list[Edit]:
    """Where a line would get longer than SMTP takes, its links and the pixel get lines of their own, within their tags."""
    lines: list[list[Edit]] = []
    end = -1
    for edit in edits:
        if edit.start > end:
            lines.append([])
        lines[-1].append(edit)
        _, end = _line_around(body, edit.start, edit.end, MAX_LINE + 1)
    found: list[Edit] = []
    for line in lines:
        begin, end = _line_around(body, line[0].start, line[-1].end, MAX_LINE + 1)
        fits = end - begin + sum(edit.growth for edit in line) <= MAX_LINE
        for edit in line:
            if fits:
                found.append(edit)
            elif edit.attribute:
                begin, end = edit.attribute
                new = body[begin : edit.start] + edit.new + body[edit.end : end]
                found.append(Edit(begin, end, f"{line_break}{new}{line_break}"))
            elif not edit.new.endswith(">"):  # a URL in text, or in an attribute, where browsers drop a line break
                found.append(edit._replace(new=line_break + edit.new))
            else:  # the pixel, or a line of words: none of the spaces in it matters
                found.append(edit._replace(new=edit.new.replace(" ", line_break)[:-1] + f"{line_break}>"))
    return found


def _decode_base64(body: str, line_break: str) -> tuple[str, Encode]:
    """Lines before the first edit stay; from there on all of it is encoded anew, in lines as long as before."""
    lines = [(match.start(), match[0].rstrip(" \t")) for match in re.finditer(r"[^ \t\r\n][^\r\n]*", body)]
    letters = "".join(line for _, line in lines)
    try:
        if not BASE64.fullmatch(letters) or len(letters) % 4:
            raise ValueError
        content = binascii.a2b_base64(letters).decode("latin-1")
    except ValueError:
        raise Unclear("its base64 can't be read exactly") from None
    width = max((len(line) for _, line in lines), default=0)
    if len(lines) == 1:
        width = max(width, ENCODED_LINE) if width <= MAX_LINE else sys.maxsize
    width = width // 4 * 4 or ENCODED_LINE

    def encode(edits: list[Edit]) -> list[Edit]:
        begin = end = kept = before = 0
        for start, line in lines:
            if before % 4 == 0 and before <= edits[0].start // 3 * 4:
                begin, kept = start, before // 4 * 3
            before += len(line)
            end = start + len(line)
        rest = apply_edits(content, edits)[kept:]
        encoded = binascii.b2a_base64(rest.encode("latin-1"), newline=False).decode()
        return [Edit(begin, end, line_break.join(encoded[at : at + width] for at in range(0, len(encoded), width)))]

    return content, encode


def _decode_quoted_printable(body: str, line_break: str) -> tuple[str, Encode]:
    """Decode, remembering where. An "=" that is no escape stands for itself, as mail programs read it."""
    # Of each token, where it ends, and twice the decoded place behind it; one more where what is put at that place
    # stands before the token, since it is the last of its line.
    ends, keys = array("I", [0]), array("I", [0])
    dropped = 0

    def decode(token: re.Match[str]) -> str:
        nonlocal dropped
        letter = chr(int(token[1], 16)) if token[1] else ""
        end = token.end()
        dropped += len(token[0]) - len(letter)
        is_last = not letter and (end == len(body) or not token[0].startswith("="))
        ends.append(end)
        keys.append(2 * (end - dropped) + is_last)
        return letter

    def place(key: int) -> int:
        n = bisect.bisect_right(keys, key) - 1
        return ends[n] + key // 2 - keys[n] // 2

    def encode(edits: list[Edit]) -> list[Edit]:
        found = []
        for edit in edits:
            start = end = place(2 * edit.start)
            if edit.end > edit.start:
                # Up to the end of the last character that is replaced, and not to the beginning of the next one:
                # a soft line break in between stays.
                end = place(2 * edit.end - 1)
                end += 3 if QP_ESCAPE.match(body, end) else 1
            found.append(Edit(start, end, edit.new))
        return _quoted_printable_edits(body, line_break, found)

    has_spaces = any(space + end in body + "\n" for space in " \t" for end in "\r\n")
    return (QP_TOKEN_OR_SPACES if has_spaces else QP_TOKEN).sub(decode, body), encode


def _quoted_printable_edits(body: str, line_break: str, edits: list[Edit]) -> list[Edit]:
    """Encode what is new, and break lines only there and directly behind."""
    found: list[Edit] = []
    done = column = 0  # where the last edit ended, and at which column
    for start, end, new, _ in edits:
        begin, line_end = _line_around(body, start, end, ENCODED_LINE + 1)
        column = column + start - done if begin <= done else start - begin
        rest = body[end:line_end]
        moved = ""
        if column == ENCODED_LINE:
            # There is no room for a soft line break: what stands before it moves to the next line as well.
            last = start - 3 if QP_ESCAPE.fullmatch(body, start - 3, start) else start - 1
            moved, start = body[last:start].replace(".", "=2E"), last
            column = len(moved)
            moved = f"={line_break}{moved}"
        new, column = encode_quoted_printable(new, column, line_break)
        # The next edit may have to begin with a soft line break.
        room = ENCODED_LINE - (not rest.endswith("="))
        while rest.startswith(".") and column + len(rest) > room:
            dot, column = encode_quoted_printable(".", column, line_break)  # no line may begin with it
            new, rest, end = new + dot, rest[1:], end + 1
        if column + len(rest) > room and column and rest:
            new, column = f"{new}={line_break}", 0
        found.append(Edit(start, end, moved + new))
        done = end
    return found


def encode_quoted_printable(new: str, column: int, line_break: str) -> tuple[str, int]:
    """Encode text from a column on, and say where it ends. No line begins with a dot, which SMTP would double or drop."""
    out: list[str] = []
    for letter in new:
        if letter in "\r\n":
            out.append(letter)
            column = 0
            continue
        token = letter if " " <= letter <= "~" and letter != "=" else f"={ord(letter):02X}"
        if column + len(token) >= ENCODED_LINE:
            out.append(f"={line_break}")
            column = 0
        if column == 0 and token == ".":
            token = "=2E"
        out.append(token)
        column += len(token)
    return "".join(out), column


# == Database ==========================================================================================
# One file, one connection a process, one writer at a time; whose spool it is. Uses no section but Settings.

SCHEMA_VERSION = 8
MOVED = -1  # in place of the version
FIRST_VERSION = 5  # the oldest that is brought up to date, by the files in templates/schema
QUARTER_MS = 900_000
DAY_MS = 86_400_000
AS_QUARTERS = ""  # in place of a zone: its days are told later
BUSY_MS = 5_000  # how long to wait for a lock that is not ours (a shell, a copy)
CACHE_KIBIBYTES = 1024  # of pages, in each worker; twice as much saved no time
CHECKPOINT_BYTES = 16 << 20  # of WAL, before it is moved into the database: pages that change often are moved once
READ_BYTES = 1 << 20  # of a file, at a time
MAGIC = b"SQLite format 3\0"  # with which a database begins (sqlite.org/fileformat2.html)
WAY_OUT = "`restore FILE` puts a backup in its place and counts what came since"


class Conflict(StoreError):
    """What was asked for is taken, or is no longer there."""


class Busy(StoreError):
    """Somebody else is writing, and the caller did not want to wait."""


class OutOfTime(Busy):
    """Not all could be done in the time that there was."""


@contextlib.contextmanager
def _plain_errors(path: str) -> Iterator[None]:
    """Turn what the machine does to SQLite into sentences that name the file; what a value causes stays as it is."""
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError, sqlite3.ProgrammingError):
        raise
    except sqlite3.Error as error:
        if "locked" in str(error):
            raise Busy(f"{path}: {error} by another process") from error
        raise StoreError(f"{path}: {error}") from error
    except UnicodeDecodeError as error:  # in a damaged schema
        raise StoreError(f"{path} is damaged: {error}; {WAY_OUT}") from error


def take_lock(fd: int, *, wait: bool = False) -> bool:
    """Take the exclusive lock on an open file; returns whether it is ours, which without waiting it may not be."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


@contextlib.contextmanager
def write_lock(folder: str, patience: float) -> Iterator[None]:
    """Hold `write.lock`, as every writer of a database does; waits up to `patience` seconds for it. Raises Busy."""
    path = os.path.join(folder, "write.lock")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(f"can't write to {path}: {error.strerror}") from error
    until = time.monotonic() + patience
    try:
        while not take_lock(fd, wait=patience == math.inf):
            if time.monotonic() >= until:
                raise Busy("another process is writing")
            time.sleep(0.01)
        yield
    finally:
        os.close(fd)


def check_for_traces(path: str, folder: str) -> None:
    """Raises StoreError where no database is and traces of one are: to make a new one would hide the loss."""
    for name in ("spool/instance", "secret.key"):
        if os.path.exists(trace := os.path.join(folder, name)):
            raise StoreError(
                f"no database at {path}, but {trace} says that there was one: put it back, or restore it from a backup "
                "(to begin anew, move the whole folder away; its spool may hold hits that were not counted yet)"
            )


FileId = tuple[int, int]  # device and inode
_DATABASES: weakref.WeakSet[Database] = weakref.WeakSet()  # SQLite shares a -shm among a process's connections
ABANDONED: set[object] = set()  # which must never be closed, not even by being forgotten
_HEADERS: dict[FileId, int] = {}  # descriptors of databases: to close one would drop SQLite's locks in this process


def file_id(path: str | int) -> FileId | None:
    """Which file that is, by its name or a descriptor; None if there is none."""
    with contextlib.suppress(FileNotFoundError):
        found = os.stat(path)
        return found.st_dev, found.st_ino
    return None


def zone_named(name: str) -> tzinfo | None:
    """The time zone of that name, or None where this machine does not know it."""
    if name == "UTC":
        return timezone.utc
    import zoneinfo  # only who asks for another zone pays for it

    try:
        return zoneinfo.ZoneInfo(name)
    except (ValueError, OSError, zoneinfo.ZoneInfoNotFoundError):
        return None


@lru_cache(maxsize=1024)
def local_day(zone: str, quarter: int) -> int:
    """The day on which a quarter begins in a zone, counted from 1970; in UTC where the zone is not known here."""
    if zone == AS_QUARTERS:
        return quarter
    begin = datetime.fromtimestamp(quarter * QUARTER_MS // 1000, zone_named(zone) or timezone.utc)
    return begin.toordinal() - FIRST_DAY


FIRST_DAY = date(1970, 1, 1).toordinal()


def check_version(version: int, path: str) -> None:
    """Raises StoreError if a database is of another version: each hit would look like one that can't be counted."""
    if version == SCHEMA_VERSION:
        return
    if version == MOVED:
        raise StoreError(f"{path} was moved: say where to in DATABASE_URL, and restart the server")
    if version > SCHEMA_VERSION:
        told = f"has schema version {version}, this program knows {SCHEMA_VERSION}; use the newer program"
    elif version < 1:
        told = "is no database of this program; expected one made by `serve` or `tenant add`"
    elif version < FIRST_VERSION:
        told = "was made by a version before 0.6.0: move its folder away to begin anew, or use the program that made it"
    else:
        told = "was made by an older version: start `serve`, which brings it up to date"
    raise StoreError(f"{path} {told}")


def _know_functions(connection: sqlite3.Connection) -> None:
    connection.create_function("local_day", 2, local_day, deterministic=True)
    connection.create_function("client_name", 1, lambda agent: client_of(agent)[0], deterministic=True)
    connection.create_function("client_device", 1, lambda agent: client_of(agent)[1], deterministic=True)


def open_connection(path: str) -> sqlite3.Connection:
    """Connect to a database that is there, and is ours. Raises StoreError if it is neither."""
    uri = f"file:{quote(path)}?mode=rw"
    with _plain_errors(path):
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        try:
            check_version(connection.execute("pragma user_version").fetchone()[0], path)
            # What is deleted is overwritten.
            for setting in ("synchronous = full", "wal_autocheckpoint = 0", "foreign_keys = on", "secure_delete = on"):
                connection.execute(f"pragma {setting}")
            connection.execute(f"pragma cache_size = {-CACHE_KIBIBYTES}")
            _know_functions(connection)
        except BaseException:
            connection.close()
            raise
    return connection


TEXT_COLUMNS = frozenset(
    {"key", "word", "host", "agent", "target", "campaign", "mail_id", "hash", "name", "text", "whose"}
    | {"client", "device", "reason"}
)  # of sets; all others are numbers


def wanted(*columns: str) -> str:
    """A table of what a statement is asked for: the rows, however many, that as_set packs into `:wanted`."""
    if len(columns) == 1:
        return f"(select value as {columns[0]} from json_each(:wanted)) as wanted"
    places = ", ".join(f"json_extract(value, '$[{n}]') as {column}" for n, column in enumerate(columns))
    return f"(select {places} from json_each(:wanted)) as wanted"


as_set = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False).encode


def for_each(connection: sqlite3.Connection, rows: Iterable[Any], sql: str, **values: Any) -> sqlite3.Cursor:
    """Run a statement for a set of values or rows. What is run before rows are fetched takes one round trip together."""
    return connection.execute(sql, {"wanted": as_set([*rows]), **values})


def delete_rows(connection: sqlite3.Connection, table: str, column: str, ids: Iterable[int]) -> None:
    """Delete the rows that have one of these numbers in a column."""
    for_each(connection, ids, f"delete from {table} where {column} in (select wanted.id from {wanted('id')})")


INSTEAD = "excluded.{column}"
ADDED = "{table}.{column} + excluded.{column}"
EARLIER = "case when excluded.{column} < {table}.{column} then excluded.{column} else {table}.{column} end"
LATER = "case when excluded.{column} > coalesce({table}.{column}, 0) then excluded.{column} else {table}.{column} end"


def upsert(
    connection: sqlite3.Connection, table: str, keys: Sequence[str], changes: Mapping[str, str], rows: Collection[Any]
) -> None:
    """Insert rows of these keys and columns; where the keys are there, change each column as is said of it."""
    if not rows:
        return
    names = *keys, *changes
    changed = (f"{column} = {change.format(table=table, column=column)}" for column, change in changes.items())
    connection.executemany(
        f"insert into {table} ({', '.join(names)}) values ({', '.join('?' * len(names))})"
        f" on conflict ({', '.join(keys)}) do update set {', '.join(changed)}",
        rows,
    )


class Database:
    """One SQLite file and, in each process, one connection to it, shared by the process's threads under a mutex.

    Every write holds `write.lock`, checkpoints too: SQLite before 3.51.3 can corrupt a WAL that two connections reset
    at once (sqlite.org/wal.html, "walreset"). Commands wait their turn in the lock's queue; a worker has `patience`
    for some seconds only, since while it waits it answers no pixel.
    """

    def __init__(self, path: str, patience: float = math.inf) -> None:
        self.path = os.path.abspath(path)
        self.is_shared = False  # with other machines, which each have a spool and a tenants.json
        self.folder = os.path.dirname(self.path)
        self.spool = os.path.join(self.folder, "spool")
        self.is_foreign = False  # whether the spool is another machine's, which may come back
        self.kept_seen = -1  # when spool/kept was last changed, if all in it is in this database
        self.paces: dict[str, int] = {}  # how many lines of each segment fit into the time of a transaction
        self.ahead = 0.0  # seconds that a drain gave to the newest segments and not yet to the oldest
        self._mutex = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._pid = 0
        self._files: list[FileId | None] = [None] * 3  # the database, its -wal and its -shm, as they were opened
        self.leave: Callable[[], object] = lambda: None  # what ends this process, where it lives on by itself
        self._header = -1  # a descriptor of the file, of _HEADERS
        self._size = 0  # of the file when all was in it
        self._patience = patience
        _DATABASES.add(self)

    def _connect(self, *, locked: bool = False) -> sqlite3.Connection:
        """The connection, where it is to the files that are there, else a new one. Raises StoreError."""
        found = self._ids()
        if self._connection is not None and self._pid == os.getpid():
            if found == self._files:
                if os.fstat(self._header).st_size < self._size:  # truncated, or vacuumed
                    self._size = self._measured()
                return self._connection
            self._disconnect(self._connection, found, locked)
        if found[0] is None:
            check_for_traces(self.path, self.folder)
            raise StoreError(f"no database at {self.path}; `serve` or `tenant add` makes it, DATABASE_URL says where")
        if self._connection is not None:
            ABANDONED.add(self._connection)  # it must not be used or closed on the far side of a fork
        self._connection, self._pid = None, os.getpid()
        # Looked at again where they seem to be others: a thread may just have opened it, and made them.
        if any(other.has_others(found) and other.has_others(self._ids()) for other in list(_DATABASES)):
            raise self._end()
        wal = f"{self.path}-wal"
        if found[0] != self._files[0] and found[1] == self._files[1] is not None and os.stat(wal).st_size:
            raise StoreError(f"{self.path} was replaced, but beside it is the -wal of the one before; {WAY_OUT}")
        if found[0] not in _HEADERS:
            try:
                header = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise StoreError(f"{self.path}: {error.strerror}") from error
            _HEADERS[file_id(header) or found[0]] = header
        connection, files = open_connection(self.path), self._ids()
        header = _HEADERS.get(found[0], -1)
        if files[0] != found[0] or header < 0:
            connection.close()
            raise StoreError(f"{self.path} was replaced while it was being opened; try again")
        self._header, self._files, self._size, self.kept_seen = header, files, os.fstat(header).st_size, -1
        self._connection = connection
        return connection

    def _ids(self) -> list[FileId | None]:
        """Which files are there now, by `stat` alone."""
        return [file_id(self.path + end) for end in ("", "-wal", "-shm")]

    def has_others(self, found: list[FileId | None]) -> bool:
        """Whether this process has the database open here, but with another -wal or -shm than are found."""
        is_open = self._connection is not None and self._pid == os.getpid()
        return is_open and found[0] == self._files[0] and found != self._files

    def _end(self) -> StoreError:
        """Let this process end; returns what to raise until it has."""
        self.leave()
        return StoreError(f"{self.path}: its -wal or -shm was taken away while it was open; this process must end")

    def _disconnect(self, connection: sqlite3.Connection, found: list[FileId | None], locked: bool) -> None:
        """Close the connection, unless others see another -wal or -shm than it has. Raises StoreError then.

        To close it would write its WAL over what others have written since. Where only the -wal is gone, nobody has
        another yet: a checkpoint rescues all that is in it. A database that is not in its place is left as it is.
        """
        if self.has_others(found):
            ABANDONED.add(connection)
            atexit.register(os._exit, 1)
            if found[1] is None and found[2] == self._files[2]:
                self._checkpoint(connection, locked)
            raise self._end()
        connection.close()
        self._connection = None

    def _check_contents(self, connection: sqlite3.Connection) -> None:
        """Whether the file is a database still, of this version, and whose spool this is. Raises StoreError."""
        if os.pread(self._header, len(MAGIC), 0) != MAGIC:
            raise StoreError(f"{self.path} is damaged: it does not begin as a database does; {WAY_OUT}")
        check_version(connection.execute("pragma user_version").fetchone()[0], self.path)
        instance = read_small_file(self.spool, "instance")
        if instance is None:
            hint = "if it was put back from a backup, `serve` makes one: start it"
            raise StoreError(f"{self.path} has no spool (there is no spool/instance beside it); {hint}")
        if stored_secret(connection, "instance") != instance:
            hint = "(spool/instance names another database); put back the pair that does"
            raise StoreError(f"{self.path} and {self.spool} do not belong together {hint}")

    def _checkpoint(self, connection: sqlite3.Connection, locked: bool) -> None:
        """Move the whole WAL into the file. Raises Busy where somebody reads."""
        with contextlib.nullcontext() if locked else write_lock(self.folder, 0):
            connection.execute("pragma busy_timeout = 0")
            if connection.execute("pragma wal_checkpoint(truncate)").fetchone()[0]:
                raise Busy("somebody reads; the WAL is moved when they have ended")
            self._size = self._measured()

    def _measured(self) -> int:
        """How long the file is. Raises StoreError where its header says more.

        To be asked only after a whole checkpoint, or where it is shorter than it was: a checkpoint under way writes the
        first page first.
        """
        head, size = os.pread(self._header, 32, 0), os.fstat(self._header).st_size
        page, pages = int.from_bytes(head[16:18], "big"), int.from_bytes(head[28:32], "big")
        if size < pages * (65_536 if page == 1 else page):
            raise StoreError(f"{self.path} is damaged: {size} bytes long, and its header says {pages} pages; {WAY_OUT}")
        return size

    @contextlib.contextmanager
    def transaction(self, *, wait: bool = True) -> Iterator[sqlite3.Connection]:
        """One write transaction, alone among all processes; committed at the end, rolled back by any error.

        Raises Busy if somebody else writes and wait is False; StoreError if the database is gone, damaged or another.
        """
        with self._mutex, _plain_errors(self.path), write_lock(self.folder, self._patience if wait else 0):
            connection = self._connect(locked=True)
            self._check_contents(connection)
            connection.execute(f"pragma busy_timeout = {BUSY_MS if wait else 0}")
            try:
                connection.execute("begin immediate")
                yield connection
                connection.commit()  # if that is not done yet
            finally:
                if connection.in_transaction:
                    connection.execute("rollback")
            with contextlib.suppress(Busy, FileNotFoundError):  # next time
                if os.stat(f"{self.path}-wal").st_size >= CHECKPOINT_BYTES:
                    self._checkpoint(connection, locked=True)

    @contextlib.contextmanager
    def checkpointed(self) -> Iterator[sqlite3.Connection]:
        """A time in which all that was ever committed is in the file itself, and nobody writes. Raises Busy."""
        with self._mutex, _plain_errors(self.path), write_lock(self.folder, 0):
            connection = self._connect(locked=True)
            self._check_contents(connection)
            self._checkpoint(connection, locked=True)
            yield connection

    @contextlib.contextmanager
    def reading(self, *, wait: bool = True) -> Iterator[sqlite3.Connection]:
        """One consistent view of the database; nothing can be written."""
        with self._mutex, _plain_errors(self.path):
            connection = self._connect()
            connection.execute(f"pragma busy_timeout = {BUSY_MS if wait else 0}")
            try:
                connection.execute("begin")
                self._check_contents(connection)
                yield connection
            finally:
                if connection.in_transaction:
                    connection.execute("rollback")

    def holds(self, texts: Collection[bytes]) -> bool:
        """Whether the file holds any of some texts, what is free in it and the WAL included. Raises Busy.

        SQLite overwrites what is deleted, but not all that was left behind where it once divided a page.
        """
        with self.checkpointed():
            size, header = self._size, self._header
        longest = max(map(len, texts))
        parts = (os.pread(header, READ_BYTES + longest, at) for at in range(0, size, READ_BYTES))
        return any(text in part for part in parts for text in texts)

    def rewrite(self) -> None:
        """Write the whole database anew, with nothing in it that was deleted; hits wait meanwhile. Raises Busy."""
        with self._mutex, _plain_errors(self.path), write_lock(self.folder, math.inf):
            connection = self._connect(locked=True)
            connection.execute("pragma auto_vacuum = incremental")  # also where an older program made it
            connection.execute("vacuum")
            self._checkpoint(connection, locked=True)

    def enlarge_cache(self, mebibytes: int) -> None:
        """Give this process's connection more memory, for much work at once."""
        with self._mutex, _plain_errors(self.path):
            self._connect().execute(f"pragma cache_size = {-1024 * mebibytes}")

    def close(self, *, wait: bool = True) -> None:
        """Close this process's connection; the last one to close moves the WAL into the database."""
        with self._mutex, contextlib.ExitStack() as until_closed:
            if self._connection is not None and self._pid == os.getpid():
                # Whoever keeps the lock from us has the database open, so we are not the last.
                with contextlib.suppress(StoreError):
                    until_closed.enter_context(write_lock(self.folder, self._patience if wait else 0))
                self._disconnect(self._connection, self._ids(), locked=True)

    def build(self) -> None:
        """Make the database, its spool and its secret where there are none, or bring it up to date, or StoreError."""
        with write_lock(self.folder, math.inf):
            if not os.path.exists(self.path):
                check_for_traces(self.path, self.folder)
                with building(self.path) as connection:
                    made = [(name, secrets.token_hex(32)) for name in ("link", "instance")]
                    connection.executemany("insert into secrets (name, value) values (?, ?)", made)
            _upgrade_database(self.path)
            with contextlib.closing(open_connection(self.path)) as connection, _plain_errors(self.path):
                adopt_folder(self, *(stored_secret(connection, name) for name in ("instance", "link")))


def stored_secret(connection: sqlite3.Connection, name: str) -> str | None:
    """One of the secrets that the database holds: `link`, which signs links, or `instance`."""
    row = connection.execute("select value from secrets where name = ?", (name,)).fetchone()
    return row and str(row[0])


def integrity_faults(connection: sqlite3.Connection) -> list[str]:
    """What SQLite itself finds wrong with the file, and rows that refer to nothing."""
    faults = []
    if isinstance(connection, sqlite3.Connection):
        checks = (row[0] for row in connection.execute("pragma integrity_check"))
        faults += [f"integrity_check: {check}" for check in checks if check != "ok"]
        faults += [f"foreign_key_check: {tuple(row)}" for row in connection.execute("pragma foreign_key_check")]
    for table, column, referred in (
        *(("events", "agent", "agents"), ("events", "url", "urls"), ("events", "judgement", "judgements")),
        *(("link_counts", "url", "urls"), ("links", "url", "urls"), ("reasons", "judgement", "judgements")),
    ):
        sql = f"select count(*) from {table} where {column} is not null and {column} not in (select id from {referred})"
        if missing := connection.execute(sql).fetchone()[0]:
            faults.append(f"{table}: {missing} rows refer to {referred} that are not there")
    sql = "select count(*) from events join emails on emails.id = events.email where emails.tenant <> events.tenant"
    if others := connection.execute(sql).fetchone()[0]:
        faults.append(f"events: {others} are another tenant's than their emails")
    return faults


def copy_database(connection: sqlite3.Connection, copy: sqlite3.Connection, name: str) -> None:
    """Copy the whole database into an empty one, as it is at this moment. Raises StoreError."""
    with _plain_errors(name):
        copy.execute("pragma journal_mode = off")  # whoever finds half a copy has no use for it
        # In smaller steps SQLite would begin anew with every write in between, so under load it would never end.
        connection.backup(copy, pages=-1)


def read_small_file(*path: str) -> str | None:
    """The text of a file of one line, or None if it is not there."""
    try:
        with open(os.path.join(*path), encoding="utf-8", errors="replace") as small_file:
            return small_file.read().strip()
    except OSError:
        return None


def write_small_file(path: str, text: str, mode: int, *, sync: bool = True) -> None:
    """Replace a file whole: readers see the old text or the new, never a part; so does who looks after a power failure."""
    temporary = f"{path}.{secrets.token_hex(6)}.new"
    try:
        with open(temporary, "x", encoding="utf-8", opener=partial(os.open, mode=mode)) as new_file:
            new_file.write(text)
            if sync:
                new_file.flush()
                os.fsync(new_file.fileno())
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if sync:
        sync_folder(os.path.dirname(path))


def append_to(path: str, data: bytes) -> int:
    """Append to a file what a transaction will commit; returns how long it is then. Raises StoreError."""
    try:
        with open(path, "ab", opener=partial(os.open, mode=0o640)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        if size == len(data):  # it is new
            sync_folder(os.path.dirname(path))
    except OSError as error:
        raise StoreError(f"can't write to {path}: {error.strerror}; nothing was changed") from error
    return size


def sync_folder(folder: str) -> None:
    """Make creations, renames and removals in a folder survive a power failure."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def building(path: str) -> Iterator[sqlite3.Connection]:
    """A transaction in a new database, which gets its name at the end: nobody ever opens a half-made one."""
    new = f"{path}.new"
    os.close(os.open(new, os.O_CREAT | os.O_TRUNC, 0o600))  # recipients' addresses come into it
    try:
        with contextlib.closing(sqlite3.connect(new, isolation_level=None)) as connection:
            connection.execute("pragma auto_vacuum = incremental")
            connection.executescript(resource("schema.sql").decode())
        with contextlib.closing(open_connection(new)) as connection, _plain_errors(new):
            connection.execute("begin")
            yield connection
            connection.commit()
            connection.execute("pragma journal_mode = wal")
        os.rename(new, path)
        sync_folder(os.path.dirname(path))
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)


def _upgrade_database(path: str) -> None:
    """Bring the schema of an older database up to date, each version in one transaction."""
    with _plain_errors(path), contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        version = connection.execute("pragma user_version").fetchone()[0]
        _know_functions(connection)
        for later in range(version + 1, SCHEMA_VERSION + 1) if version >= FIRST_VERSION else ():
            connection.executescript(resource(f"templates/schema/{later}.sql").decode())


def adopt_folder(database: Database, instance: str | None, link: str | None) -> None:
    """Give a new or restored database its spool and a copy of its secret. Raises Conflict if that is another's."""
    spool, folder = database.spool, database.folder
    for name in (spool, os.path.join(spool, "rejected"), os.path.join(spool, "kept")):
        os.makedirs(name, mode=0o750, exist_ok=True)
    if read_small_file(spool, "instance") is None:
        write_small_file(os.path.join(spool, "instance"), f"{instance}\n", 0o640)
    key_file = os.path.join(folder, "secret.key")
    kept = read_small_file(key_file)
    if link and kept is None:
        write_small_file(key_file, f"{link}\n", 0o600)
    elif link and kept != link:
        raise Conflict(
            f"{key_file} and the secret in {database.path} differ, and mail already sent carries links signed with one of "
            f"them: if the database is right, move {key_file} away; if the file is right, restore the database it belongs to"
        )


@contextlib.contextmanager
def restoring(path: str, backup: BinaryIO) -> Iterator[tuple[sqlite3.Connection, int, str]]:
    """Make a backup the database, once it has caught up with the files here in the transaction that this yields.

    With it come when the backup last drained, and the folder in which what was there is set aside. A server may run
    meanwhile: it sees that the file is another, and opens that one. After a kill, run it again. Raises StoreError.
    """
    folder, copy = os.path.dirname(path), f"{path}.{secrets.token_hex(6)}.new"
    aside = f"{folder}/set-aside-{time.strftime('%Y-%m-%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(3)}"
    try:
        with open(copy, "xb", opener=partial(os.open, mode=0o600)) as file:
            shutil.copyfileobj(backup, file)
        _upgrade_database(copy)
        with contextlib.closing(open_connection(copy)) as connection, _plain_errors(copy):
            if faults := integrity_faults(connection):
                raise StoreError(f"{copy} is damaged: {faults[0]}")
            if read_small_file(folder, "spool", "instance") not in (None, stored_secret(connection, "instance")):
                raise StoreError(f"{copy} is a copy of another database than the spool here belongs to")
            connection.execute("pragma journal_mode = wal")
            with write_lock(folder, math.inf):  # while nobody deletes anything, or changes tenants
                connection.execute("begin")
                [(drained_at,)] = connection.execute("select max(updated_at) from positions")
                connection.execute("update feeds set epoch = ? || tenant", (secrets.token_hex(6),))
                yield connection, drained_at or 0, aside
                connection.commit()
                connection.close()
                os.mkdir(aside, 0o700)
                for end in ("", "-wal", "-shm"):
                    with contextlib.suppress(FileNotFoundError):
                        os.rename(path + end, os.path.join(aside, os.path.basename(path) + end))
                os.rename(copy, path)
                sync_folder(folder)
    except OSError as error:
        raise StoreError(f"{error.filename or folder}: {error.strerror}; run it again when that is mended") from error
    except StoreError as error:
        raise StoreError(f"{error}; nothing was changed".replace(copy, backup.name)) from error
    finally:
        for end in ("", "-wal", "-shm"):
            with contextlib.suppress(OSError):
                os.unlink(copy + end)


# -- Positions of segments


def position_of(connection: sqlite3.Connection, segment: str) -> int:
    """How many bytes of a segment are in the database."""
    row = connection.execute("select position from positions where segment = ? /* for update */", (segment,)).fetchone()
    return int(row[0]) if row else 0


def positions_of(connection: sqlite3.Connection, segments: Iterable[str]) -> dict[str, int]:
    """How many bytes of segments are in the database, of those of which it knows anything."""
    sql = f"select segment, position from {wanted('name')} cross join positions where segment = wanted.name"
    return dict(for_each(connection, segments, sql))


def set_position(connection: sqlite3.Connection, name: str, position: int, now: int, before: int | None = None) -> None:
    """Remember how far a segment is drained; raises Busy where that is not what was read before."""
    sql = """
        insert into positions values (:name, :position, :now) on conflict (segment) do update
        set position = excluded.position, updated_at = excluded.updated_at
        where positions.position = coalesce(:before, positions.position) returning 1
    """
    asked = {"name": name, "position": position, "now": now, "before": before}
    if not connection.execute(sql, asked).fetchall():
        raise Busy(f"{name} was drained by somebody else meanwhile")


def forget_positions(connection: sqlite3.Connection, present: Iterable[str], before: int) -> None:
    """Forget what was before a time: allowances, and positions of segments that are gone; and remember which time it was."""
    old = connection.execute("select segment from positions where updated_at < ?", (before,)).fetchall()
    connection.execute("delete from allowances where day >= 0 and day < ?", (before // DAY_MS,))
    if gone := {name for (name,) in old}.difference(present):
        for_each(connection, gone, f"delete from positions where segment in (select wanted.name from {wanted('name')})")
        set_mark(connection, "positions_since", str(before))


def new_ids(connection: sqlite3.Connection, ids: Iterable[str]) -> set[str]:
    """Those of the ids of lines of a log that never came before; from now on they have."""
    asked = f"select wanted.word from {wanted('word')}"
    sql = f"insert into ingested {asked} where 1 = 1 on conflict (hit_id) do nothing returning hit_id"
    return {id_ for (id_,) in for_each(connection, ids, sql)}


# -- Marks, and what is gone


def marks_of(connection: sqlite3.Connection) -> dict[str, str]:
    """What a database knows of itself, so that an older backup in its place is told from it."""
    return dict(connection.execute("select name, value from marks").fetchall())


def set_mark(connection: sqlite3.Connection, name: str, value: str) -> None:
    upsert(connection, "marks", ("name",), {"value": INSTEAD}, [(name, value)])


class Machine(NamedTuple):
    """Another machine that drains into this database, as it last said."""

    name: str
    at: int
    waiting: int | None


def machines_of(connection: sqlite3.Connection, now: int) -> dict[str, Machine]:
    """The machines that drained in the last month, by what their spool/instance says."""
    rows = connection.execute("select name, value from marks where name >= 'machine:' and name < 'machine;'").fetchall()
    found = {name.partition(":")[2]: Machine(*json.loads(value)) for name, value in rows}
    return {instance: each for instance, each in found.items() if each.at > now - 30 * DAY_MS}


def tell_of_machine(database: Database, waiting: int | None, now: int) -> tuple[list[Machine], str]:
    """Say of this machine that it drained; returns the others, and what is wrong with its spool/instance, if it is."""
    instance, name = read_small_file(database.spool, "instance") or "", socket.gethostname()
    with database.transaction(wait=False) as connection:
        others = machines_of(connection, now)
        before = others.pop(instance, None)
        if before and (link := stored_secret(connection, "link")) != read_small_file(database.folder, "secret.key"):
            write_small_file(os.path.join(database.folder, "secret.key"), f"{link}\n", 0o600)
        set_mark(connection, f"machine:{instance}", json.dumps([name, now, waiting]))
    if before and before.name != name and now - before.at < 10_000:
        return [*others.values()], f"spool/instance is also {before.name}'s: delete it on one of them and restart that"
    return [*others.values()], ""


FORGOTTEN, DELETED = "forgotten", "deleted"  # kinds of what is gone
UNTRACKED = "untracked"  # another one, which holds from its time on
CHOICES = {"stop": (UNTRACKED,), "erase": (UNTRACKED, FORGOTTEN)}  # what a recipient may choose
Gone = dict[tuple[str, str], int]  # by hash and kind: up to which time


def gone_hash(secret: str, mail_id: str, word: str) -> str:
    """What is kept of an email's key, or of <a recipient's address>: who does not know it learns nothing by that."""
    return hmac.digest(secret.encode(), f"{mail_id}/{word}".encode(), "sha256").hex()[:32]


AGED = "aged~"  # with which the key of an old email begins; the hash of the one it had follows


def as_person(address: str) -> str:
    """A recipient's address, as it is told from keys."""
    return f"<{address.lower()}>"


def gone_hashes(connection: sqlite3.Connection, tenant: int, words: Iterable[str]) -> dict[str, str]:
    """Keys of emails, and addresses as as_person has them, by what is kept of them when they are gone."""
    sql = "select mail_id, value from tenants join secrets on secrets.name = 'instance' where number = ?"
    mail_id, secret = connection.execute(sql, (tenant,)).fetchone()
    return {
        word.removeprefix(AGED) if word.startswith(AGED) else gone_hash(secret, mail_id, word): word for word in words
    }


def remember_gone(connection: sqlite3.Connection, gone: Gone) -> None:
    """Never again make of these hashes what was said, or came, up to these times."""
    # A deletion holds up to the last time; no tracking from the first one on.
    change = "case when (excluded.at < gone.at) = (gone.kind = 'untracked') then excluded.at else gone.at end"
    upsert(connection, "gone", ("hash", "kind"), {"at": change}, [(*key, at) for key, at in gone.items()])
    for kind in {FORGOTTEN, UNTRACKED}.intersection(kind for _, kind in gone):
        set_mark(connection, kind, secrets.token_hex(8))  # see clean_files, and Batch


def gone_among(connection: sqlite3.Connection, tenant: int, words: Collection[str]) -> dict[str, dict[str, int]]:
    """Those of keys, and of addresses as as_person has them, that are gone: by each kind, up to when."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    if words:
        hashes = gone_hashes(connection, tenant, words)
        sql = f"select gone.hash, kind, at from {wanted('hash')} cross join gone where gone.hash = wanted.hash"
        for hash_, kind, at in for_each(connection, hashes, sql):
            found[hashes[hash_]][kind] = at
    return found


def write_gone(folder: str, gone: Gone) -> None:
    """Write into the file `gone` too what must be gone from every backup; before the commit. Raises StoreError."""
    lines = "".join(f"{hash_} {at} {kind}\n" for (hash_, kind), at in gone.items())
    append_to(os.path.join(folder, "gone"), lines.encode())


def read_gone(folder: str, connection: sqlite3.Connection) -> Gone:
    """What the file `gone` says that this database does not know, since it was copied before."""
    known = {(hash_, kind): at for hash_, kind, at in connection.execute("select hash, kind, at from gone")}
    line = re.compile("^([0-9a-f]{32}) ([0-9]{1,15})(?: ([a-z]+))?$", re.MULTILINE)
    text = read_small_file(folder, "gone") or ""
    told: Gone = {}
    for hash_, at, kind in line.findall(text):
        key, chosen = (hash_, kind or DELETED), min if kind == UNTRACKED else max
        told[key] = chosen(told.get(key, int(at)), int(at))
    return {key: at for key, at in told.items() if key not in known or (key[1] != UNTRACKED and at > known[key])}


# == PostgreSQL ========================================================================================
# A database that machines share; uses Database alone. templates/schema/postgresql.sql says what differs, and why.

_IN_SCHEMA = (
    ("--.*", ""),
    ("^(begin|commit);", ""),
    ("integer primary key( autoincrement)?", "bigint generated by default as identity primary key"),
    (r"\binteger\b", "bigint"),
    (r"\btext\b", 'text collate "C"'),
    (r"\) without rowid", ")"),
    (
        r"create table (\w+) ([^;]+?\n *(\w+) .*) references (.*\))([^;]+;)",
        r"create table \1 \2\5 alter table \1 add foreign key (\3) references \4;",
    ),
    (r"\b0 as at\b", "0::bigint as at"),  # a number alone has 32 bits
    (r",\s*unique \(tenant, url\)\s*\)", ");\ncreate unique index urls_by_url on urls (tenant, md5(url))"),
    ("pragma user_version = ([0-9]+)", r"update marks set value = '\1' where name = 'schema'"),
)
_IN_COPY = str.maketrans({"\\": r"\\", "\n": r"\n", "\r": r"\r", "\t": r"\t"})
_IN_STATEMENTS = (
    (
        r"(?s)cross join events\s+where events\.id in \(\s*select near\.id (.*?)\)\s+limit :",
        r"cross join lateral (select near.* \1) as events limit :",
    ),
    (r"\bgroup_concat\b", "string_agg"),
    (r"/\* (for update) \*/", r"\1"),
    (r"\?", "%s"),
    ("(?<!:):([a-z_]+)", r"%(\1)s"),
    (r"\burls\.url = (wanted\.target|%\(\w+\)s)", r"md5(urls.url) = md5(\1) and urls.url = \1"),
)
_SELECT_VERSION = "select value from marks where name = 'schema'"
# Statements are planned to read few rows of large tables, and to compile one takes longer than to run it.
_FOR_FEW_ROWS = "set local random_page_cost = 1.1; set local jit = off"
_CONNECT = {  # unless the URL says otherwise: a machine that went silent is noticed within seconds
    "connect_timeout": 5,
    "keepalives_idle": 4,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "application_name": "email-tracker",
    "client_encoding": "utf8",
}


def _as_postgres(name: str) -> str:
    """The schema, or what brings one up to date, as PostgreSQL reads it."""
    schema = resource(name).decode()
    for pattern, instead in _IN_SCHEMA:
        schema = re.sub(pattern, instead, schema, flags=re.MULTILINE)
    return schema


def tables() -> list[str]:
    """The names of the tables, each behind those it refers to."""
    return re.findall(r"^create table (\w+)", resource("schema.sql").decode(), re.MULTILINE)


def postgres_schema() -> tuple[str, str]:
    """The schema as PostgreSQL reads it: its tables, and what is better made when they are full."""
    schema, table = _as_postgres("schema.sql"), "create table [^;]+;"
    rest = resource("templates/schema/postgresql.sql").decode().replace("@@schema", re.sub(table, "", schema))
    return "\n".join(re.findall(table, schema)), rest


def _set_in_postgres(match: re.Match[str]) -> str:
    columns = re.findall(r" as (\w+)", match[1])
    place = "->> {}" if len(columns) > 1 else "#>> '{{}}'"
    values = [
        f"(value {place.format(n)}){'' if column in TEXT_COLUMNS else '::bigint'} as {column}"
        for n, column in enumerate(columns)
    ]
    return f"(select {', '.join(values)} from json_array_elements(:wanted::json)) as wanted"


@lru_cache(maxsize=1024)
def translated(sql: str) -> str:
    """A statement as psycopg and PostgreSQL read it."""
    sql = re.sub(r"\(select ((?:(?!select).)+) from json_each\(:wanted\)\) as wanted", _set_in_postgres, sql)
    sql = re.sub(r"json_extract\(carried\.key, '\$\[(\d)\]'\)", r"(carried.key::json ->> \1)", sql)
    parts = re.split("('(?:[^']|'')*')", sql.replace("%", "%%"))
    for pattern, instead in _IN_STATEMENTS:
        parts[::2] = [re.sub(pattern, instead, part) for part in parts[::2]]
    return "".join(parts)


@lru_cache(maxsize=1024)
def _insertion(sql: str) -> tuple[str, list[str]]:
    """An insertion of all rows of a JSON text, in place of one of a row; and the names of the values of a row."""
    insert = re.fullmatch(r"\s*insert into (\w+) \(([^)]+)\)\s+values \(([^)]+)\)(.*)", sql, re.DOTALL)
    assert insert, sql
    columns, values = (re.split(r",\s*", part) for part in insert.group(2, 3))
    taken = [column if value == "?" else value for column, value in zip(columns, values, strict=True)]
    rows = f"select {', '.join(taken)} from json_populate_recordset(null::{insert[1]}, %s)"
    given = [column for column in columns if column in taken]
    return f"insert into {insert[1]} ({insert[2]}) {rows}{insert[4]}", given


@lru_cache(maxsize=1)
def _psycopg() -> Any:
    """The driver, which only who says postgresql needs. Raises StoreError where there is none."""
    try:
        psycopg = importlib.import_module("psycopg")
    except ImportError as error:
        raise StoreError(
            f"DATABASE_URL says postgresql, for which psycopg 3.1 or later is needed ({error}): "
            f"`apt install python3-psycopg`, or `{sys.executable} -m pip install 'psycopg[binary]'`"
        ) from None
    as_number = dict.fromkeys(("dump", "quote"), lambda _, value: b"%d" % value)
    number = type("Number", (psycopg.adapt.Dumper,), as_number)
    for type_ in (int, bool):
        psycopg.adapters.register_dumper(type_, number)
    whole = type("Whole", (psycopg.adapt.Loader,), {"load": lambda _, text: int(bytes(text))})
    psycopg.adapters.register_loader("numeric", whole)
    return psycopg


class _Awaited:
    """A cursor whose rows have yet to come. PostgreSQL's timeout for who falls silent runs after a sync, not a flush."""

    def __init__(self, cursor: Any, sync: Callable[[], None]) -> None:
        self._cursor, self._sync = cursor, sync

    def __getattr__(self, name: str) -> Any:
        if self._cursor.pgresult is None:
            self._sync()
        return getattr(self._cursor, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.fetchall())


class PostgresConnection:
    """What this program uses of sqlite3's connections, on one of psycopg's."""

    def __init__(self, url: str) -> None:
        asked = dict(parse_qsl(url.partition("?")[2]))
        how = {name: value for name, value in _CONNECT.items() if name not in asked}
        self.raw = _psycopg().connect(url, autocommit=True, prepare_threshold=None, **how)  # for poolers' sake
        self.pipeline: Any = None  # while statements wait for no answers

    def execute(self, sql: str, values: Any = ()) -> Any:
        """Run a statement; its rows."""
        cursor = self.raw.execute(translated(sql), values)
        return _Awaited(cursor, self.sync) if self.pipeline else cursor

    def sync(self) -> None:
        """Send all that was said in a pipeline, and read the answers."""
        self.send_all()
        self.pipeline.sync()

    def send_all(self) -> None:
        """Let the sync that comes next leave nothing unsent.

        psycopg sends its last command with one flush. What that could not send, since the server was busy, it would
        forget, and both sides would wait for ever; so the last command is one that flushes until nothing is left.
        """
        commands = self.pipeline.command_queue

        def send_rest() -> None:
            if self.raw.pgconn.flush():
                commands.append(send_rest)

        commands.append(lambda: commands.append(send_rest))  # behind the sync

    def executemany(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """Insert rows by one statement. No key may be twice among them."""
        insert, names = _insertion(sql)
        if given := [dict(zip(names, row, strict=True)) for row in rows]:
            self.raw.execute(insert, [as_set(given)])

    def commit(self) -> None:
        """End the transaction, if one is under way."""
        if self.raw.info.transaction_status:
            self.raw.execute("commit")

    def run(self, statements: str, lines: Iterable[str] = ()) -> Any:
        """Run several statements in one round trip, or a `copy` of lines; the row that the last one found."""
        cursor = self.raw.cursor()
        if lines:
            with cursor.copy(statements) as copy:
                return any(map(copy.write, lines))
        cursor.execute(statements)
        while cursor.nextset():
            pass
        return cursor.fetchone() if cursor.description else None


class Postgres(Database):
    """A database of a PostgreSQL server, shared by machines that each have a spool of their own.

    One of them writes at a time: it locks a row, in the first statement of its transaction, and then sees what the one
    before committed. A way that breaks, also during a commit, is an error; the position of a segment says what was committed.
    """

    def __init__(self, url: str, folder: str, patience: float = math.inf) -> None:
        super().__init__(os.path.join(folder, "database"), patience)
        self.path = without_password(url)
        self.is_shared = True
        self._url = url
        self._postgres: PostgresConnection | None = None

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what psycopg says into sentences, and what a value causes into what SQLite makes of it."""
        psycopg = _psycopg()
        try:
            yield
        except psycopg.Error as error:
            told = str(error.diag.message_primary or error).strip().replace("\n", " ")
            if error.sqlstate == "42P01":  # of a table; see PostgreSQL's appendix A
                told = "has no tables of this program; `serve` or `tenant add` makes them"
            elif isinstance(error, (psycopg.IntegrityError, psycopg.DataError)):
                raise sqlite3.DataError(told) from error
            # Of a lock, of transactions that have to be tried again, and of a deadlock.
            kind = Busy if error.sqlstate in ("55P03", "40001", "40P01") else StoreError
            raise kind(f"{self.path}: {told}") from error

    def _begun(self, begin: str) -> tuple[PostgresConnection, Any]:
        """The connection, a new one where the old one broke, in a transaction; and what its last statement found."""
        if self._postgres is not None and self._pid != os.getpid():
            ABANDONED.add(self._postgres)  # it must not be used or closed on the far side of a fork
            self._postgres = None
        if self._postgres is not None and not self._postgres.raw.closed:
            try:
                return self._postgres, self._postgres.run(begin)
            except _psycopg().OperationalError:
                if not self._postgres.raw.closed:
                    raise
        self._postgres, self._pid, self.kept_seen = PostgresConnection(self._url), os.getpid(), -1
        return self._postgres, self._postgres.run(begin)

    @contextlib.contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        """A transaction that begins so, with a statement that reads the version."""
        with self._mutex, self._errors():
            try:
                connection, version = self._begun(begin)
                check_version(int(version[0]) if version else 0, self.path)
                yield cast("sqlite3.Connection", connection)
            finally:
                raw = self._postgres and self._postgres.raw
                if raw and not raw.closed and raw.info.transaction_status:
                    raw.execute("rollback")

    @contextlib.contextmanager
    def transaction(self, *, wait: bool = True) -> Iterator[sqlite3.Connection]:
        """One write transaction, alone among all machines; committed at the end, rolled back by any error.

        Who does not want to wait waits for half a second: nobody would ever meet a moment between two others' turns.
        """
        of_worker = self._patience < math.inf
        begin = f"""
            begin isolation level read committed; {_FOR_FEW_ROWS};
            set local lock_timeout = {500 if not wait else int(self._patience * 1000) if of_worker else 0};
            set local idle_in_transaction_session_timeout = '{1 if of_worker else 60}s';
            set local statement_timeout = '{20 if of_worker else 0}s';
            {_SELECT_VERSION} for no key update
        """
        with self._transaction(begin) as connection:
            yield connection
            connection.commit()  # if that is not done yet

    @contextlib.contextmanager
    def checkpointed(self) -> Iterator[sqlite3.Connection]:
        """A time in which nobody writes; all that was ever committed is safe with the server."""
        with self.transaction(wait=False) as connection:
            yield connection

    @contextlib.contextmanager
    def reading(self, *, wait: bool = True) -> Iterator[sqlite3.Connection]:
        """One consistent view of the database; nothing is written but what know_clients tells."""
        begin = f"begin isolation level repeatable read; {_FOR_FEW_ROWS}; {_SELECT_VERSION}"
        with self._transaction(begin) as connection:
            yield connection

    def holds(self, texts: Collection[bytes]) -> bool:
        """Nobody but the server can look into its files."""
        return False

    def enlarge_cache(self, mebibytes: int) -> None:
        """The server has its own."""

    def close(self, *, wait: bool = True) -> None:
        """Close this process's connection."""
        with self._mutex:
            if self._postgres is not None and self._pid == os.getpid():
                self._postgres.raw.close()
                self._postgres = None

    @contextlib.contextmanager
    def building(self) -> Iterator[tuple[PostgresConnection, int | None]]:
        """A transaction in which nobody else makes or changes tables; and the version of those that are there."""
        with self._errors():
            connection = PostgresConnection(self._url)
            with contextlib.closing(connection.raw), connection.raw.transaction():
                lock = "select pg_advisory_xact_lock(hashtext('email-tracker'))"
                [is_there] = connection.run(f"{lock}; select to_regclass('marks')")
                version = connection.run(f"{_SELECT_VERSION} for no key update") if is_there else None
                yield connection, version and int(version[0])

    def build(self) -> None:
        """Make the tables, or bring them up to date, and this machine's spool. Raises StoreError where all is gone."""
        with self.building() as (connection, version):
            if version is None:
                check_for_traces(self.path, self.folder)
                made = ", ".join(f"('{name}', '{secrets.token_hex(32)}')" for name in ("link", "instance"))
                connection.run(f"{''.join(postgres_schema())}; insert into secrets values {made}")
            elif FIRST_VERSION <= version < SCHEMA_VERSION:
                know_clients(cast("sqlite3.Connection", connection))
                for later in range(version + 1, SCHEMA_VERSION + 1):
                    connection.run(_as_postgres(f"templates/schema/{later}.sql"))
            link = stored_secret(cast("sqlite3.Connection", connection), "link")
        adopt_folder(self, secrets.token_hex(32), link)


@contextlib.contextmanager
def pipelined(connection: sqlite3.Connection) -> Iterator[None]:
    """Statements in here wait for no answers but those whose rows are fetched, where the database may be far away."""
    if not isinstance(connection, PostgresConnection) or connection.pipeline:
        yield
        return
    try:
        with connection.raw.pipeline() as connection.pipeline:
            yield
            connection.send_all()
    finally:
        connection.pipeline = None


def know_clients(connection: sqlite3.Connection) -> None:
    """Tell the views of recounts what agents are, where they can't ask Python."""
    if isinstance(connection, PostgresConnection):
        agents = connection.execute("select agent from agents").fetchall()
        rows = [(agent, *client_of(agent)) for (agent,) in agents]
        upsert(connection, "agent_clients", ("agent",), dict.fromkeys(("client", "device"), INSTEAD), rows)
        connection.execute("delete from agent_clients where agent not in (select agent from agents)")


def open_database(settings: Settings, patience: float = math.inf, *, make: bool = False) -> Database:
    """The database of the settings; if that is wanted, made where there is none. Raises StoreError."""
    place, folder = settings.database, settings.folder
    database = Postgres(place, folder, patience) if settings.is_shared else Database(place, patience)
    if make:
        try:
            os.makedirs(database.folder, mode=0o750, exist_ok=True)
            database.build()
        except OSError as error:
            told = f"{error.strerror}; expected a folder this user may write to"
            raise StoreError(f"can't write to {database.folder}: {told}") from error
    return database


def _rows_of(connection: sqlite3.Connection, table: str) -> Iterator[Any]:
    """The names of a table's columns, then its rows, some at a time, but for the version."""
    cursor = connection.raw.cursor(table) if isinstance(connection, PostgresConnection) else connection.cursor()
    with contextlib.closing(cursor):
        cursor.execute(f"select * from {table}" + " where name <> 'schema'" * (table == "marks"))
        yield [column[0] for column in cursor.description]
        while some := cursor.fetchmany(1000):
            yield some


def copying(connection: sqlite3.Connection) -> Iterator[tuple[str, Iterable[str]]]:
    """What makes a copy of a database in PostgreSQL: statements, each with the lines that are to follow it."""
    made, rest = postgres_schema()
    yield made, ()
    for table in tables():
        columns = ", ".join(next(rows := _rows_of(connection, table)))
        yield f"copy {table} ({columns}) from stdin", _copy_lines(rows)
    yield f"{rest}; analyze", ()  # else nothing is known of the tables for a minute, and all of them are read


def _copy_lines(rows: Iterator[Iterable[Sequence[Any]]]) -> Iterator[str]:
    for some in rows:
        cells = ((r"\N" if value is None else str(value).translate(_IN_COPY) for value in row) for row in some)
        yield "".join("\t".join(row) + "\n" for row in cells)
    yield "\\.\n"


def psql_script(connection: sqlite3.Connection) -> Iterator[bytes]:
    """A copy of a database for psql, which makes all of it or, where the database is not empty, nothing."""
    yield b"\\set ON_ERROR_STOP on\nset client_encoding = 'UTF8';\nbegin;\n"
    for statement, lines in chain(copying(connection), [("commit", ())]):
        yield f"{statement};\n".encode()
        yield from map(str.encode, lines)


@contextlib.contextmanager
def moving(settings: Settings, target: str) -> Iterator[sqlite3.Connection]:
    """Copy all into an empty database of the other engine, to be looked at before the old one is used no more."""
    new = replace(settings, database=target, data_folder=settings.folder)
    if new.is_shared == settings.is_shared or new.folder != settings.folder:
        place = f"a file in {settings.folder}, where the spool is"
        raise StoreError(f"expected {place if settings.is_shared else 'postgresql://USER:PASSWORD@HOST/DATABASE'}")
    with contextlib.closing(open_database(settings)) as source, source.transaction() as old:
        if new.is_shared:
            with Postgres(target, new.folder).building() as (copy, version):
                if version is not None:
                    raise StoreError(f"{new.database_url} has tables of this program; expected an empty database")
                for statement, lines in copying(old):
                    copy.run(statement, lines)
                yield cast("sqlite3.Connection", copy)
            old.execute(f"pragma user_version = {MOVED}")
            return
        if os.path.exists(target):
            raise StoreError(f"{target} is there already; expected none")
        old.execute("set local idle_in_transaction_session_timeout = 0")  # while the copy is looked at
        with building(target) as file:
            for table in tables():
                columns = next(rows := _rows_of(old, table))
                marks = ", ".join("?" * len(columns))
                insert = f"insert into {table} ({', '.join(columns)}) values ({marks})"
                file.executemany(insert, chain.from_iterable(rows))
            yield file
            write_small_file(os.path.join(source.spool, "instance"), f"{stored_secret(old, 'instance')}\n", 0o640)
        set_mark(old, "schema", str(MOVED))


# == Tenants ===========================================================================================
# Customers of the server, their rules, and tenants.json, by which workers know them without a database.

RULES = {  # each with the name that it has for users, and what reads a value of it
    "allow": ("domains", read_destination),
    "block": ("blocked", read_destination),
    "own": ("own_addresses", read_own_network),
    "forward": ("forwarded", read_parameter),
}
NEEDS_A_KEY = "an id of one's own stands in mail, so whoever gets mail could write; expected a tenant with two ids"
NO_PUBLIC_URL = (
    "this server does not know its public address, and a mailing full of localhost links can't be called back: "
    "set BASE_URL=https://track.example.com, or give the tenant a tracking host; to try it on this machine, start "
    "`serve` (or the command) with --local"
)


class Share(NamedTuple):
    """An address that can only read a tenant's numbers, as the table has it."""

    hash: str  # of the id that it has in the place of the dashboard's; which so is in no backup
    campaign: str  # the only one whose numbers it shows; "": all
    created_at: int
    ends_at: int


@dataclass(frozen=True, slots=True)
class Tenant:
    """A customer of the server, as the table has it."""

    number: int
    id: str
    mail_id: str
    name: str
    tracking_host: str | None
    any_domain: bool
    suspended: bool
    api_key_hash: str | None
    id_in_mail_at: int | None
    created_at: int
    tz: str  # the zone in which its days begin
    unregistered_a_day: int | None = None  # how many emails hits alone may make; None: as many as usual
    utm: str = ""  # parameters that targets get, as read_utm takes them
    retention_days: int | None = None  # how long facts are kept; 0: for ever; None: as RETENTION_DAYS says
    ignore_gpc: bool = False  # whether hits that ask not to be tracked count like others
    share: Share | None = None  # by which it is read: then `id` is the share's, and its own is not known

    @property
    def one_id(self) -> bool:
        """Whether the id that stands in mail also opens the dashboard."""
        return self.id == self.mail_id


def _tenants(connection: sqlite3.Connection, which: str, **values: str | int) -> list[Tenant]:
    names, flags = Tenant.__slots__[:-1], ("any_domain", "suspended", "ignore_gpc")
    rows = connection.execute(f"select {', '.join(names)} from tenants {which}", values)
    read = ((bool(value) if name in flags else value for name, value in zip(names, row, strict=True)) for row in rows)
    return list(starmap(Tenant, read))


def tenant_by_id(connection: sqlite3.Connection, id_: str) -> Tenant | None:
    return next(iter(_tenants(connection, "where id = :id", id=id_)), None)


def tenant_by_share(connection: sqlite3.Connection, id_: str, now: int) -> Tenant | None:
    """The tenant that a share's id opens for reading."""
    sql = "select tenant, hash, campaign, created_at, ends_at from shares where hash = ? and ends_at > ?"
    for number, *about in connection.execute(sql, (key_hash(id_), now)).fetchall():
        [tenant] = _tenants(connection, "where number = :number", number=number)
        return replace(tenant, id=id_, share=Share(*about))
    return None


def shares_of(connection: sqlite3.Connection, tenant: int, now: int = 0) -> list[Share]:
    """A tenant's shares; of those that have not ended, with the time."""
    sql = "select hash, campaign, created_at, ends_at from shares where tenant = ? and ends_at > ? order by 3, 1"
    return list(starmap(Share, connection.execute(sql, (tenant, now))))


def set_shares(connection: sqlite3.Connection, tenant: int, shares: Iterable[Sequence[Any]]) -> None:
    """Make these a tenant's shares, and no others."""
    connection.execute("delete from shares where tenant = ?", (tenant,))
    sql = "insert into shares (tenant, hash, campaign, created_at, ends_at) values (?, ?, ?, ?, ?)"
    connection.executemany(sql, [(tenant, *share) for share in shares])


def new_api_key() -> str:
    return secrets.token_urlsafe(32)


def key_hash(key: str) -> str:
    """What is stored of an API key or a dashboard id. They are random, so one round of SHA-256 is enough."""
    return hashlib.sha256(key.encode("utf-8", "backslashreplace")).hexdigest()


def list_tenants(connection: sqlite3.Connection) -> list[Tenant]:
    """All tenants, oldest first."""
    return _tenants(connection, "order by number")


class NotThere(BadInput):
    """There is no tenant, or nothing of a tenant's, that a word means."""


def find_tenant(connection: sqlite3.Connection, word: str) -> Tenant:
    """The tenant that a command's word means: a dashboard id, a mail id or a name. Raises BadInput."""
    found = _tenants(connection, "where id = :word or mail_id = :word or name = :word", word=word)
    found = found or namesakes(connection, word)
    by_id = [tenant for tenant in found if word in (tenant.id, tenant.mail_id)]
    if not found:
        raise NotThere(f"no tenant {word!r}; `tenant list` shows them")
    if len(found) > 1 and not by_id:
        ids = ", ".join(tenant.mail_id for tenant in found)
        raise BadInput(f"{len(found)} tenants have the name {word!r}; say which by its mail id: {ids}")
    return (by_id or found)[0]


def namesakes(connection: sqlite3.Connection, name: str) -> list[Tenant]:
    """The tenants of a name, whatever its case."""
    return [each for each in list_tenants(connection) if each.name.casefold() == name.casefold()]


def _is_taken(connection: sqlite3.Connection, id_: str) -> bool:
    """Whether an id is or was in use, as a dashboard id or a mail id."""
    sql = "select 1 from tenants where :id in (id, mail_id) union all select 1 from retired_ids where mail_id = :id"
    return connection.execute(sql, {"id": id_}).fetchone() is not None


def add_tenant(connection: sqlite3.Connection, name: str, now: int, allow: Iterable[str] = (), **more: Any) -> Tenant:
    """Make a tenant; an `id` is both its ids. Raises Conflict if that or the tracking host is taken."""
    id_ = more.pop("id", None)
    if id_ is not None and (fault := id_fault(id_)):
        raise BadInput(f"id: {fault}")
    if id_ is not None and _is_taken(connection, id_):
        raise Conflict(f"the id {id_!r} is taken, now or by mail already sent; choose another")
    mail_id = id_ or new_mail_id()
    while id_ is None and _is_taken(connection, mail_id):
        mail_id = new_mail_id()
    sql = "insert into tenants (id, mail_id, name, created_at) values (?, ?, ?, ?) returning number"
    [(number,)] = connection.execute(sql, (id_ or new_dashboard_id(), mail_id, name, now)).fetchall()
    change_tenant(connection, number, **more)
    set_tenant_rules(connection, number, "allow", allow)
    return find_tenant(connection, more.get("mail_id", mail_id))


def change_tenant(connection: sqlite3.Connection, tenant: int, **changes: Any) -> None:
    """Set columns of a tenant. Raises Conflict if the tracking host is taken."""
    host = changes.get("tracking_host")
    sql = "select mail_id from tenants where tracking_host = ? and number <> ?"
    if row := connection.execute(sql, (host, tenant)).fetchone():
        raise Conflict(f"the tracking host {host} belongs to another tenant ({row[0]})")
    for column, value in changes.items():
        connection.execute(f"update tenants set {column} = ? where number = ?", (value, tenant))


def tenant_rules(connection: sqlite3.Connection, tenant: int) -> dict[str, list[str]]:
    """The hosts that a tenant allows and blocks, its own networks, what its links forward: each of RULES."""
    found: dict[str, list[str]] = {rule: [] for rule in RULES}
    sql = "select rule, value from tenant_rules where tenant = ? order by rule, value"
    for rule, value in connection.execute(sql, (tenant,)):
        found[rule].append(value)
    return found


def set_tenant_rules(
    connection: sqlite3.Connection, tenant: int, rule: str, add: Iterable[str], remove: Iterable[str] = ()
) -> None:
    """Add and remove values of one of RULES."""
    sql = "insert into tenant_rules (tenant, rule, value) values (?, ?, ?) on conflict (tenant, rule, value) do nothing"
    connection.executemany(sql, [(tenant, rule, value) for value in add])
    sql = f"""
        delete from tenant_rules where tenant = :tenant and rule = :rule
        and value in (select wanted.word from {wanted("word")})
    """
    connection.execute(sql, {"tenant": tenant, "rule": rule, "wanted": as_set([*remove])})


_RETIRE = "insert into retired_ids (mail_id, retired_at) values (?, ?) on conflict (mail_id) do nothing"


def remove_tenant(connection: sqlite3.Connection, tenant: Tenant, now: int) -> None:
    """Delete all of a tenant's data. Its mail id is kept from ever being another's: mail with it is still out there."""
    number = (tenant.number,)
    for table in ("email_counts", "link_counts"):
        connection.execute(f"delete from {table} where email in (select id from emails where tenant = ?)", number)
    has_tenant = r"^create table (\w+).*\n(?: .*\n)*? +tenant "
    for table in reversed(re.findall(has_tenant, resource("schema.sql").decode(), re.MULTILINE)):  # first what refers
        connection.execute(f"delete from {table} where tenant = ?", number)
    connection.execute("delete from tenants where number = ?", number)
    connection.execute(_RETIRE, (tenant.mail_id, now))


class Feed(NamedTuple):
    """How a tenant's changes are numbered, where they are kept."""

    epoch: str  # another one after each restore: then numbers stand for other changes
    last: int
    swept: int  # the last number that is too old to be kept


def feed_of(connection: sqlite3.Connection, tenant: int) -> Feed | None:
    sql = "select epoch, last, swept from feeds where tenant = ?"
    return next(starmap(Feed, connection.execute(sql, (tenant,))), None)


def set_feed(connection: sqlite3.Connection, tenant: int, keeps: bool) -> None:
    """Keep a tenant's changes from now on, if that is not done yet; or none, also of those there are."""
    if not keeps:
        for table in ("feeds", "changes"):
            connection.execute(f"delete from {table} where tenant = ?", (tenant,))
        connection.execute("update webhooks set position = 0 where tenant = ?", (tenant,))  # the next ones begin at 1
    elif feed_of(connection, tenant) is None:
        connection.execute("insert into feeds (tenant, epoch) values (?, ?)", (tenant, secrets.token_hex(6)))


# -- tenants.json


def directory_of(connection: sqlite3.Connection) -> dict[str, Any]:
    """What must be known of tenants without a database; of dashboard ids only a hash, by which `instrument` finds them."""
    as_they_are = ("name", "tracking_host", "any_domain", "suspended", "ignore_gpc", "utm")
    tenants = {
        tenant.mail_id: {
            **{name: getattr(tenant, name) for name in as_they_are},
            "id_sha256": key_hash(tenant.id),
            "api_key_sha256": tenant.api_key_hash,
            "shares": [[*share] for share in shares_of(connection, tenant.number)],
            **tenant_rules(connection, tenant.number),
        }
        for tenant in list_tenants(connection)
    }
    retired = [row[0] for row in connection.execute("select mail_id from retired_ids order by mail_id")]
    return {"mark": marks_of(connection).get("tenants"), "tenants": tenants, "retired": retired}


def directory_faults(database: Database, connection: sqlite3.Connection) -> list[str]:
    """Whether tenants.json says what the database says."""
    with contextlib.suppress(ValueError, RecursionError):
        if json.loads(read_small_file(database.folder, "tenants.json") or "") == directory_of(connection):
            return []
    return ["tenants.json: differs from the database; `check --repair` or a restart writes it anew"]


@contextlib.contextmanager
def changing_tenants(database: Database, *, elsewhere: bool = False) -> Iterator[sqlite3.Connection]:
    """A transaction that changes tenants, or sees that another machine did; then tenants.json is written."""
    path = os.path.join(database.folder, "tenants.json")
    with database.transaction() as connection:
        if not database.is_shared:  # else it is right, whatever a file of one of its machines says
            take_over_tenants(database.folder, connection)
        elif not elsewhere:
            set_mark(connection, "tenants", secrets.token_hex(8))
        yield connection
        outcome = "nothing was changed"
        try:
            write_small_file(f"{path}.next", json.dumps(directory_of(connection), indent=1) + "\n", 0o640)
            connection.commit()
            # A kill here leaves a file that is one change behind; whoever drains knows by its mark, and writes it anew.
            outcome = "the database has the change"
            os.rename(f"{path}.next", path)
            sync_folder(database.folder)
        except OSError as error:
            raise StoreError(f"can't write to {path}: {error.strerror}; {outcome}") from error


def told_change(folder: str) -> str | None:
    """The mark of the change that tenants.json was made from, or None if it has none."""
    with contextlib.suppress(OSError), open(os.path.join(folder, "tenants.json"), "rb") as file:
        found = re.search(rb'"mark": "([0-9a-f]+)"', file.read(100))
        return found and found[1].decode()
    return None


def take_over_tenants(folder: str, connection: sqlite3.Connection) -> None:
    """Begin a change of tenants: where an older database was put in place, with what only tenants.json knows.

    That is which tenants there are, those that are new with a new dashboard id, their shares, and of each rule the stricter.
    """
    mark, marks, now = told_change(folder), marks_of(connection), time.time_ns() // 1_000_000
    is_behind = mark not in (None, marks.get("tenants"), marks.get("tenants_before"))
    set_mark(connection, "tenants_before", mark or "")
    set_mark(connection, "tenants", secrets.token_hex(8))
    if not is_behind:
        return
    told, known = Directory(folder).refresh(), {tenant.mail_id: tenant for tenant in list_tenants(connection)}
    for mail_id in told.retired & known.keys():
        remove_tenant(connection, known[mail_id], now)
    connection.executemany(_RETIRE, [(mail_id, now) for mail_id in told.retired])
    for mail_id, entry in told.tenants.items():
        tenant = known.get(mail_id)
        if tenant is None:
            if _is_taken(connection, mail_id):
                continue
            about = {name: entry.get(name, False) for name in ("any_domain", "ignore_gpc")} | {"mail_id": mail_id}
            tenant = add_tenant(connection, entry["name"], now, allow=entry["allow"], **about)
            set_tenant_rules(connection, tenant.number, "forward", entry.get("forward", ()))
        elif key_hash(tenant.id) != entry["id_sha256"]:  # the one it had is no longer its
            change_tenant(connection, tenant.number, id=new_dashboard_id())
        any_domain, suspended = tenant.any_domain and entry["any_domain"], tenant.suspended or entry["suspended"]
        key = entry.get("api_key_sha256") or tenant.api_key_hash  # 0.7.0.dev0 and before did not write it
        about = {"any_domain": any_domain, "suspended": suspended, "utm": entry.get("utm", tenant.utm)}
        about["ignore_gpc"] = tenant.ignore_gpc and entry.get("ignore_gpc", False)
        change_tenant(connection, tenant.number, api_key_hash=key, **about)
        set_shares(connection, tenant.number, entry.get("shares", ()))
        with contextlib.suppress(Conflict):
            change_tenant(connection, tenant.number, tracking_host=entry["tracking_host"])
        rules = tenant_rules(connection, tenant.number)
        for rule in ("allow", "forward"):
            set_tenant_rules(connection, tenant.number, rule, (), {*rules[rule]}.difference(entry.get(rule, ())))
        for rule in ("block", "own"):
            set_tenant_rules(connection, tenant.number, rule, entry[rule])


@lru_cache(maxsize=128)
def read_origin(url: str) -> tuple[str, int]:
    """Host and port of a URL of our own; port 443 where none is given (80 is the same server)."""
    match = re.match(r"[^/]*//([^/]*?)(?::([0-9]{0,5}))?(?:/|$)", url)
    name, port = match.groups() if match else ("", "")
    with contextlib.suppress(BadTarget):
        name = read_host(name)
    return name.lower().rstrip("."), int(port or DEFAULT_PORTS["https"])


def _forms(name: str) -> tuple[str, str]:
    """How a name is looked up: as it is, else without regard to case."""
    return name, f"\0{name.casefold()}"


class Directory:
    """What tenants.json says; what it last said, when it is gone."""

    def __init__(self, folder: str) -> None:
        self._path = os.path.join(folder, "tenants.json")
        self._look_at = 0.0
        self._seen: tuple[int, int, int] | None = None
        self.trouble: str | None = None
        self._load({"tenants": {}, "retired": []})
        self.known = False  # whether the file was ever read
        self.refresh()  # what workers know from their birth on
        self._look_at = 0.0  # the first request looks again

    def refresh(self) -> Directory:
        """Look at the file, once a second at most."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + 1.0
            try:
                found = os.stat(self._path)
                seen = (found.st_ino, found.st_mtime_ns, found.st_size)
                if seen != self._seen:
                    with open(self._path, encoding="utf-8") as file:
                        self._load(json.load(file))
                    self._seen = seen
                self.trouble = None
            except OSError as error:
                self.trouble = f"tenants.json: {error.strerror}"
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                self.trouble = "tenants.json: expected what this program writes; `check --repair` writes it anew"
        return self

    def find(self, word: str) -> str | None:
        """The mail id of the tenant that a command's word means: a dashboard id, a mail id or a name."""
        forms = key_hash(word), *_forms(word)
        return word if word in self.tenants else next(filter(None, map(self._words.get, forms)), None)

    def is_own(self, mail_id: str, address: str) -> bool:
        networks = self._own.get(mail_id, ())
        parsed = read_address(address) if networks else None
        return parsed is not None and any(parsed in network for network in networks)

    def _load(self, content: dict[str, Any]) -> None:
        tenants: dict[str, dict[str, Any]] = content["tenants"]
        retired = frozenset(content["retired"])
        owners = {entry["tracking_host"]: mail_id for mail_id, entry in tenants.items() if entry["tracking_host"]}
        own = {mail_id: list(map(ipaddress.ip_network, entry["own"])) for mail_id, entry in tenants.items()}
        names = [(form, mail_id) for mail_id, entry in tenants.items() for form in _forms(entry["name"])]
        called = Counter(form for form, _ in names)  # a name that two tenants have finds none
        words = {form: mail_id for form, mail_id in names if called[form] == 1}
        words |= {entry["id_sha256"]: mail_id for mail_id, entry in tenants.items()}
        self.tenants, self.retired, self.host_owners, self._own, self._words = tenants, retired, owners, own, words
        self.known = True


def read_tenant_name(text: str) -> str:
    """Read what a tenant is to be called. Raises BadInput."""
    name = text.strip()
    if not 0 < len(name) <= 200 or UNFIT.search(name):
        raise BadInput(f"name: expected one line of 1 to 200 characters, not {text[:60]!r}")
    return name


def read_each(read: Callable[[str], str], texts: Iterable[str], name: str) -> list[str]:
    try:
        return list(map(read, texts))
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from None


def read_tracking_host(settings: Settings, text: str) -> str:
    """Read a tenant's tracking host. Raises BadInput."""
    (host,) = read_each(read_destination, [text], "tracking_host")
    if ":" in host or IPV4.fullmatch(host):
        raise BadInput(f"tracking_host {text!r}: expected a domain name such as track.acme.com, without a port")
    if settings.base_url and host == read_origin(settings.base_url)[0]:
        raise BadInput(f"tracking_host {text!r} is BASE_URL's own; expected another one that leads to this server")
    return host


def tenant_summary(settings: Settings, tenant: Tenant) -> dict[str, Any]:
    """What somebody needs to use a tenant; None for URLs where nobody said the public address."""
    public = settings.public_url(tenant.tracking_host)
    private = settings.public_url() or public
    return {
        "name": tenant.name,
        "id": tenant.id,
        "mail_id": tenant.mail_id,
        "dashboard_url": private and f"{private}/{tenant.id}/dashboard",
        "pixel_url": public and public + pixel_path(tenant.mail_id, "test"),
    }


def tenant_about(settings: Settings, connection: sqlite3.Connection, tenant: Tenant) -> dict[str, Any]:
    """All that is set of a tenant, by the names that change it over HTTP."""
    rules = tenant_rules(connection, tenant.number)
    same = ("utm", "tz", "suspended", "any_domain", "ignore_gpc", "retention_days", "unregistered_a_day")
    about: dict[str, Any] = tenant_summary(settings, tenant) | {name: getattr(tenant, name) for name in same}
    about |= {name: rules[rule] for rule, (name, _) in RULES.items()}
    about["feed"] = feed_of(connection, tenant.number) is not None
    if tenant.retention_days is None:
        about["retention_days"] = settings.retention_days
    return about | {"tracking_host": tenant.tracking_host or "", "api_key": bool(tenant.api_key_hash)}


# == Counting ==========================================================================================
# From judged hits to numbers: those of an email are a pure function of its registration and its judged hits.
# Whatever changes, the roll-ups change by what is new minus what was.

NO_QUARTER = -1  # the cohort of the emails that nobody registered: they have no time of sending
QUARTER, DAY = 0, 1  # grains of roll-ups
# New ones by hits alone, of a tenant.
A_DAY = {"unregistered": 10_000, "agent": 10_000, "url": 10_000, "campaign": 1_000}
A_REGISTERED_EMAIL = 100  # new plain URLs of one, which come beside those of a day
OTHER = "other"  # in place of what is beyond: strangers must not fill the disk
MAX_AGENT = 512
FAR = 1 << 60  # milliseconds: before and after all times
MOSTLY_MS = 3 * SESSION_GAP_MS  # back in time, which is as far as nearly all sessions reach

Tally = list[Any]  # as its columns have it: for each of STATES how many hits, and when the first came
HITS, FIRST = ({state: 2 * n + column for n, state in enumerate(STATES)} for column in (0, 1))  # where a state's stand
Cell = tuple[str, tuple[Any, ...], str]  # one number of one roll-up: its table, key and column


# What matters of a judged hit to the numbers by time: tenant, quarter, type, judgement, and what it is about: the agent of an
# open, or the host of a click that met the naming page. To those of its campaign the campaign matters, in place of the quarter.
Shape = tuple[int, int, int, int, str]
CampaignHit = tuple[int, str, int, int, str]


class Standing(NamedTuple):
    """All that matters of an email to the numbers by email."""

    tenant: int
    campaign: str
    registered: bool
    is_test: bool
    sent: int  # in this quarter
    opened: int | None = None  # the best state of its opens …
    opened_in: int = 0  # … since this quarter
    clicked: int | None = None
    clicked_in: int = 0


# What many emails have alike: how they count, with their tenant, campaign, whether they are registered, when they were sent,
# and what became of them, as columns; and one of these columns, with since when they are in it.
Group = tuple[int, str, bool, int, tuple[str, ...]]
Moment = tuple[int, str, str, int]


def best_of(tally: Tally) -> tuple[int | None, int]:
    """The best state that a tally has hits of, under which an email is unique, and the quarter in which the first came."""
    for state in STATES:
        if tally[HITS[state]]:
            return state, tally[FIRST[state]] // QUARTER_MS
    return None, 0


def cells_of_hit(shape: Shape, judgement: Judgement, zone: str) -> Iterator[Cell]:
    """The numbers that a judged hit is in. Days are those of the zone."""
    tenant, quarter, type_, number, about = shape
    day = local_day(zone, quarter)
    yield "reasons", (tenant, QUARTER, quarter, type_, number), "hits"
    yield "reasons", (tenant, DAY, day, type_, number), "hits"
    if type_ == OPEN and judgement.state in (PERSON, UNCONFIRMED):
        yield "clients", (tenant, day, *client_of(about)), f"opens_{STATES[judgement.state]}"
    if judgement.reason in NAMING_REASONS:
        yield "named_hosts", (tenant, about, judgement.reason), "clicks"


def cell_of_campaign_hit(hit: CampaignHit, judgement: Judgement) -> Cell:
    """The number that a judged hit of a campaign is in."""
    tenant, campaign, type_, number, about = hit
    is_read = type_ == OPEN and judgement.state in (PERSON, UNCONFIRMED)
    return "campaign_hits", (tenant, campaign, type_, number, *(client_of(about) if is_read else ("", ""))), "hits"


_OPENED, _CLICKED = ({state: f"{verb}_{name}" for state, name in STATES.items()} for verb in ("opened", "clicked"))
_UNIQUE = {name: (OPEN, state) for state, name in _OPENED.items()}
_UNIQUE |= {name: (CLICK, state) for state, name in _CLICKED.items()}


def parts_of(email: Standing) -> tuple[Group | None, list[Moment]]:
    """The group that an email is in as it stands, and its moments."""
    tenant, campaign, registered, is_test, sent, opened, opened_in, clicked, clicked_in = email
    campaign = "" if is_test else campaign
    moments = []
    if opened:
        moments.append((tenant, campaign, _OPENED[opened], opened_in))
    if clicked:
        moments.append((tenant, campaign, _CLICKED[clicked], clicked_in))
    if clicked == PERSON != opened:  # a click by a person proves that the mail was read
        moments.append((tenant, campaign, "click_only", clicked_in))
        if opened == UNCONFIRMED:
            moments.append((tenant, campaign, "click_only_unconfirmed", max(opened_in, clicked_in)))
    columns = tuple(column for _, _, column, _ in moments)
    if campaign and registered:
        moments.append((tenant, campaign, "emails", sent))
    return None if is_test else (tenant, campaign, registered, sent, columns), moments


def cells_of_group(group: Group, zone: str) -> Iterator[Cell]:
    """The numbers by mailing that an email of this group is in. Days are those of the zone."""
    tenant, campaign, registered, sent, columns = group
    groups: list[tuple[str, tuple[Any, ...]]] = [("cohorts", (tenant, QUARTER, sent))]
    if sent != NO_QUARTER:
        groups.append(("cohorts", (tenant, DAY, local_day(zone, sent))))
    if campaign:
        groups.append(("campaigns", (tenant, campaign)))
    for table, key in groups:
        for column in columns:
            yield table, key, column
        # An unregistered email is counted as sent where its campaign was declared, as one of those.
        if registered or (table == "cohorts" and sent == NO_QUARTER):
            yield table, key, "emails"


def cells_of_moment(moment: Moment, zone: str) -> Iterator[Cell]:
    """The numbers by time that an email is in since this moment. Days are those of the zone."""
    tenant, campaign, column, quarter = moment
    for grain, time_ in ((QUARTER, quarter), (DAY, local_day(zone, quarter))):
        if column in _UNIQUE:
            yield "uniques", (tenant, grain, time_, *_UNIQUE[column]), "emails"
        if campaign:
            yield "campaign_times", (tenant, campaign, grain, time_), column


def cells_of_link(tenant: int, campaign: str, url: int, tally: Tally) -> Iterator[tuple[Cell, int]]:
    """The numbers that the clicks of one link in one email are in, and how often."""
    key = tenant, campaign, url
    for state, name in STATES.items():
        if hits := tally[HITS[state]]:
            yield ("links", key, f"clicks_{name}"), hits
    best, _ = best_of(tally)
    if best:
        yield ("links", key, f"emails_{STATES[best]}"), 1


class Rollup(NamedTuple):
    """The columns of a table of numbers."""

    keys: tuple[str, ...]
    numbers: tuple[str, ...]
    others: tuple[str, ...] = ()  # that are no sums


GROUP_COLUMNS = tuple(f"{verb}_{state}" for verb in ("opened", "clicked") for state in STATES.values())
GROUP_COLUMNS += ("click_only", "click_only_unconfirmed")
LINK_COLUMNS = tuple(f"{noun}_{state}" for noun in ("clicks", "emails") for state in STATES.values())
TALLIES = tuple(f"{type_}_{state}" for type_ in TYPES.values() for state in STATES.values())
CLICK_TALLIES = TALLIES[len(STATES) :]
TALLY_COLUMNS = tuple(f"{tally}{end}" for tally in TALLIES for end in ("", "_first"))
CLICK_COLUMNS = TALLY_COLUMNS[len(TALLY_COLUMNS) // 2 :]
ROLLUPS = {  # in the order in which their recounts build on each other
    "email_counts": Rollup(("email",), TALLIES, (*(f"{tally}_first" for tally in TALLIES), "last_at")),
    "link_counts": Rollup(("email", "url"), CLICK_TALLIES, tuple(f"{tally}_first" for tally in CLICK_TALLIES)),
    "uniques": Rollup(("tenant", "grain", "time", "type", "state"), ("emails",)),
    "reasons": Rollup(("tenant", "grain", "time", "type", "judgement"), ("hits",)),
    "cohorts": Rollup(("tenant", "grain", "time"), ("emails", *GROUP_COLUMNS)),
    "campaigns": Rollup(("tenant", "campaign"), ("emails", *GROUP_COLUMNS), ("last_at",)),
    "campaign_times": Rollup(("tenant", "campaign", "grain", "time"), ("emails", *GROUP_COLUMNS)),
    "campaign_hits": Rollup(("tenant", "campaign", "type", "judgement", "client", "device"), ("hits",)),
    "links": Rollup(("tenant", "campaign", "url"), LINK_COLUMNS),
    "clients": Rollup(("tenant", "day", "client", "device"), ("opens_person", "opens_unconfirmed")),
    "named_hosts": Rollup(("tenant", "host", "reason"), ("clicks",)),
}


def add_to_rollups(connection: sqlite3.Connection, cells: Mapping[Cell, int]) -> None:
    """Add numbers, positive and negative, to roll-ups, and set the times that are no sums: one upsert a table."""
    tables: dict[str, dict[tuple[Any, ...], dict[str, int]]] = defaultdict(lambda: defaultdict(dict))
    for (table, key, column), number in cells.items():
        if number:
            tables[table][key][column] = number
    for table, rows in tables.items():
        keys, columns, times = ROLLUPS[table]
        values = [(*key, *map(row.get, columns, repeat(0)), *map(row.get, times)) for key, row in rows.items()]
        upsert(connection, table, keys, dict.fromkeys(columns, ADDED) | dict.fromkeys(times, LATER), values)


def carry(connection: sqlite3.Connection, tenant: int, cells: Mapping[Cell, int]) -> None:
    """Keep numbers of a tenant whose facts go. Cells have quarters in place of days, since zones may change."""
    rows: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
    for (table, key, name), number in cells.items():
        if number:
            change = LATER if name == "last_at" else EARLIER if name.endswith("_first") else ADDED
            rows[change].append((tenant, table, as_set([*key]), name, number))
    for change, some in rows.items():
        upsert(connection, "carried", ("tenant", "rollup", "key", "name"), {"number": change}, some)


def _recounted(table: str) -> str:
    """The rows of a roll-up as they are counted anew: from facts, with what is carried of those that are gone."""
    keys, numbers, times = ROLLUPS[table]
    parts = {}
    for place, name in enumerate(keys):
        part = f"json_extract(carried.key, '$[{place}]')"
        parts[name] = part if name in TEXT_COLUMNS else f"cast({part} as bigint)"
    if "grain" in parts:
        parts["time"] = f"case {parts['grain']} when {DAY} then local_day(tz, {parts['time']}) else {parts['time']} end"
    if "day" in parts:
        parts["day"] = f"local_day(tz, {parts['day']})"
    values = [*parts.values(), *(f"case carried.name when '{name}' then carried.number else 0 end" for name in numbers)]
    values += [f"case carried.name when '{name}' then carried.number end" for name in times]
    totals = {**dict.fromkeys(numbers, "sum"), **dict.fromkeys(times, "min")}
    totals |= {"last_at": "max"} if "last_at" in times else {}
    columns, sums = [*totals], [f"{total}({name}) as {name}" for name, total in totals.items()]
    return f"""
        select {", ".join((*keys, *sums))} from (
            select {", ".join((*keys, *columns))} from recount_{table} union all
            select {", ".join(values)} from carried join tenants on tenants.number = carried.tenant
            where rollup = '{table}'
        ) as parts group by {", ".join(keys)}
    """


def rollup_differences(connection: sqlite3.Connection, most: int = 20) -> list[str]:
    """Compare each roll-up with its recount; a line for each row that differs, up to `most` a roll-up and side."""
    found = []
    know_clients(connection)
    for table, (keys, numbers, others) in ROLLUPS.items():
        columns, counts = ", ".join((*keys, *numbers, *others)), " or ".join(f"{column} <> 0" for column in numbers)
        # A row of zeros is as good as none: what is taken back leaves one, and what is set aside makes none.
        sources = table, f"({_recounted(table)}) as recounted"
        kept, anew = (f"select {columns} from {rows} where {counts}" for rows in sources)
        for label, sql in (("recounted", f"{anew} except {kept}"), ("in the roll-up", f"{kept} except {anew}")):
            rows = connection.execute(f"{sql} limit {most}").fetchall()
            found += [f"{table}: {label} only: {tuple(row)}" for row in rows]
    return found


def _count_anew(connection: sqlite3.Connection, table: str, where: str = "", values: Sequence[int] = ()) -> None:
    columns = ", ".join(chain(*ROLLUPS[table]))
    connection.execute(f"delete from {table} {where}", values)
    recounted = f"select {columns} from ({_recounted(table)}) as recounted {where}"
    connection.execute(f"insert into {table} ({columns}) {recounted}", values)


def rebuild_rollups(connection: sqlite3.Connection) -> None:
    """Replace each roll-up by its recount."""
    know_clients(connection)
    for table in ROLLUPS:
        _count_anew(connection, table)


def count_days_anew(connection: sqlite3.Connection, tenant: int) -> None:
    """Count a tenant's numbers by day anew: its days begin at other times now."""
    know_clients(connection)
    for table, rollup in ROLLUPS.items():
        for column, by_day in (("grain", "grain = 1"), ("day", "day > 0")):
            if column in rollup.keys:
                _count_anew(connection, table, f"where tenant = ? and {by_day}", (tenant,))


# == Emails ============================================================================================
# What the database has of emails: registrations, tallies, stored hits, and these judged together with new ones.


class Registration(NamedTuple):
    """What a sender says of an email. Times are in milliseconds since 1970, UTC; None: not said."""

    key: str
    subject: str | None = None
    recipient: str | None = None
    campaign: str | None = None
    sent_at: int | None = None  # None: as it was said before, or now
    delivered_at: int | None = None
    links: int | None = None  # how many different ones the message has
    at: int = 0  # when it was said; 0: now; UNDATED: nobody knows, so before all that has a time

    def joined(self, other: Registration) -> Registration:
        """All that was said: what is not later than the last word fills only what is empty."""
        earlier, later = (self, other) if other.at >= self.at else (other, self)
        return earlier._replace(**{name: value for name, value in later._asdict().items() if value is not None})


UNDATED = 1
SAID_OF_EMAILS = ("subject", "recipient", "campaign")  # texts, each a bit of emails.cleared, from the first on
_SAID_TIMES = ("created_at", "sent_at", "delivered_at", "time_said", "told_at")
SAID_COLUMNS = (*SAID_OF_EMAILS, "search", "registered", *_SAID_TIMES, "cleared", "links")


class SpooledEmail(NamedTuple):
    """A registration in the spool: one that had to wait, or a copy for who restores an older database."""

    id: str
    mail_id: str
    registration: Registration


class Choice(NamedTuple):
    """What a recipient chose, in the spool."""

    id: str
    mail_id: str
    key: str  # of the mail that led there
    kinds: tuple[str, ...]  # of what is gone by it
    at: int


Line = Hit | SpooledEmail | Choice


class Stored(NamedTuple):
    """An event, and the hit that it was."""

    id: int
    judgement: int
    url: int | None
    hit: Hit


new_tuple = tuple.__new__  # of a named tuple, in a third of the time: there are several for each hit


class Email:
    """An email, what is counted of it, and what will be."""

    id: int
    tenant: int
    key: str
    registered: int
    campaign: str
    created_at: int
    sent_at: int | None
    last_at: int | None

    def __init__(self, row: Sequence[Any]) -> None:
        self.id, self.tenant, self.key, self.registered, self.campaign, self.created_at, self.sent_at, *facts = row
        begin, said, links, self.last_at, *counts = facts
        self.context = new_tuple(Context, (begin, said == 1, links)) if self.registered else NO_CONTEXT
        self.opens: Tally = counts[:6] if self.last_at else [*NO_TALLY]
        self.clicks: Tally = counts[6:] if self.last_at else [*NO_TALLY]
        self.links: dict[int, tuple[Tally, Tally]] = {}  # the tallies that were read: as they were, and as they will be
        self.before: Standing | None = None  # where that may have changed
        self.stored: dict[int, Stored] = {}  # by number: those that were read

    def standing(self) -> Standing:
        """Where it stands by what is counted now."""
        sent = NO_QUARTER if self.sent_at is None else self.sent_at // QUARTER_MS
        said = self.tenant, self.campaign, self.registered == 1, self.key.startswith(TEST_KEY), sent
        return Standing(*said, *best_of(self.opens), *best_of(self.clicks))


NO_TALLY = (0, None) * len(STATES)
_EMAIL_FACTS = f"""
    select emails.id, emails.tenant, emails.key, emails.registered, emails.campaign, emails.created_at,
           coalesce(emails.sent_at, campaign_sends.sent_at),
           coalesce(emails.delivered_at, emails.sent_at),
           case when emails.delivered_at is not null or emails.time_said = 1 then 1 else 0 end,
           emails.links, email_counts.last_at,
           {", ".join(TALLY_COLUMNS)}
    from {{}} cross join emails
    left join email_counts on email_counts.email = emails.id
    left join campaign_sends on emails.registered = 0 and campaign_sends.tenant = emails.tenant
        and campaign_sends.campaign = emails.campaign
"""
EVENT_FACTS = """
    select events.email, events.at, events.id, events.judgement, events.url, events.agent, events.type, events.method,
           events.address, events.purpose, events.own, events.fixed
    from {} cross join events
"""


def find_emails(
    connection: sqlite3.Connection, tenant: int, keys: Collection[str], *, has_old: bool = True
) -> dict[str, Email]:
    """Those of the emails that are known, by key; an old one, whose own key is not known any more, by what that was."""
    sql = _EMAIL_FACTS.format(wanted("key")) + "where emails.tenant = :tenant and emails.key = wanted.key"
    found = {email.key: email for email in map(Email, for_each(connection, sorted(keys), sql, tenant=tenant))}
    if has_old and (unknown := {*keys} - found.keys()):
        hashes = {f"{AGED}{hash_}": key for hash_, key in gone_hashes(connection, tenant, unknown).items()}
        for email in map(Email, for_each(connection, sorted(hashes), sql, tenant=tenant)):
            found[hashes[email.key]] = email
    return found


def emails_by_id(connection: sqlite3.Connection, ids: Iterable[int]) -> list[Email]:
    sql = _EMAIL_FACTS.format(wanted("id")) + "where emails.id = wanted.id"
    return [*map(Email, for_each(connection, ids, sql))]


def fold_text(*texts: str) -> str:
    """Texts to search in, or for: without case and accents, in any language. Words of one are none of another."""
    text = "\n".join(filter(None, texts)).casefold()
    if text.isascii():
        return text
    decomposed = unicodedata.normalize("NFKD", text)
    return "".join(c for c in decomposed if not unicodedata.combining(c)).translate(_BARE_LETTERS)


_BARE_LETTERS = str.maketrans({"ø": "o", "đ": "d", "ł": "l", "ħ": "h", "ŧ": "t", "\u0131": "i", "æ": "ae", "œ": "oe"})


NO_DAY = -1  # of an allowance that is a campaign's
ALL_NETWORKS = -1
Rooms = Mapping[str, tuple[int, str, int]]  # by what needs it: for how many, whose it is, and of which day


def network_of(hit: Hit) -> int:
    """A number for the network a hit came from: its /24, or /48 in IPv6; where no address is kept, for its agent."""
    network, _, _ = hit.address.rpartition(".")
    return binascii.crc32((network or ":".join(hit.address.split(":")[:3]) or hit.agent).encode())


# -- The session of a hit


def session_reaches(times: Iterable[int], since: int, at: int) -> bool:
    """Whether a session up to a time may have begun before what was read of it."""
    begin = at
    for earlier in sorted((time_ for time_ in times if time_ <= at), reverse=True):
        if begin - earlier > SESSION_GAP_MS:
            return False
        begin = earlier
    return since < at - MOSTLY_MS and begin - SESSION_GAP_MS < at - MOSTLY_MS


def take_links(rows: Iterable[Sequence[Any]], emails: Mapping[int, Email]) -> None:
    """Give emails the tallies of their links."""
    for id_, url, *counts in rows:
        emails[id_].links[url] = counts, [*counts]


Session = list[tuple[Hit, Stored | None]]  # hits in order, each with its event if it is stored already


def judge_together(email: Email, new: Sequence[Hit]) -> tuple[list[Judgement], list[tuple[Stored, Judgement]]]:
    """Judge new hits of an email, which are in order, with the stored ones around them, and say what those are now.

    A session that is too long to be judged together may not be read whole. Then only those stored hits are judged anew
    that a new one is near to (what is near to them was read), and those of a session that was not too long before.
    """
    if not email.stored:
        return judge(new, email.context), []
    judgements: list[Judgement] = []
    judged: list[tuple[Stored, Judgement]] = []
    both: Session = [*((each.hit, each) for each in email.stored.values()), *((hit, None) for hit in new)]
    for places in sessions_of([hit for hit, _ in both]):
        session = [both[n] for n in places]
        if all(stored for _, stored in session):
            continue
        concerned = _concerned(session) if len(session) > MAX_SESSION else range(len(session))
        hits = [hit for hit, _ in session]
        for n, (judgement, (_, stored)) in enumerate(zip(judge_session(hits, email.context), session)):  # noqa: B905
            if stored is None:
                judgements.append(judgement)
            elif n in concerned:
                judged.append((stored, judgement))
    return judgements, judged


def _concerned(session: Session) -> set[int]:
    """The places in a session that is too long of the hits that new ones may make something else of."""
    found: set[int] = set()
    stored = [n for n, (_, each) in enumerate(session) if each]
    for places in sessions_of([session[n][0] for n in stored]):  # as they were without new ones
        if len(places) <= MAX_SESSION:
            found.update(stored[place] for place in places)
    for n, (_, each) in enumerate(session):
        if each is None:
            found.update(range(max(n - MAX_SESSION // 2, 0), min(n + MAX_SESSION // 2, len(session))))
    return found


# == Recording =========================================================================================
# From registrations and hits to facts and numbers: looking up, judging with what is stored, counting, all in sets.

ALL_EVENTS = 1 << 40


# What is stored once: how its numbers are looked up, and how it is inserted.
INTERNED = {
    "agent": (
        f"select agents.agent, agents.id from {wanted('agent')} cross join agents where agents.agent = wanted.agent",
        f"insert into agents (agent) select wanted.agent from {wanted('agent')} returning agent, id",
    ),
    "url": (
        f"""
        select urls.url, urls.id from {wanted("target")} cross join urls
        where urls.tenant = :tenant and urls.url = wanted.target
        """,
        f"""
        insert into urls (tenant, url, host) select :tenant, wanted.target, wanted.host
        from {wanted("target", "host")} returning url, id
        """,
    ),
}


class TooMuch(StoreError):
    """More would have to be read than fits into the time of one transaction."""


class Batch:
    """What one transaction changes: gathered in memory, and written once, at the end. It remembers nothing longer."""

    def __init__(self, connection: sqlite3.Connection, now: int, room: int = ALL_EVENTS) -> None:
        self.connection = connection
        self.now = now
        self.room = room  # for how many stored hits, of the sessions that new ones come into
        self._shapes: dict[Shape, int] = defaultdict(int)
        self._campaign_hits: dict[CampaignHit, int] = defaultdict(int)
        self._standings: dict[Standing, int] = defaultdict(int)
        self._cells: dict[Cell, int] = defaultdict(int)
        self._with_old: set[int] = set()  # tenants that have emails whose own keys are not known any more
        self._has_untracked = False
        self._carries_for = 0  # a tenant, where facts go and their numbers stay
        self._carried: dict[Cell, int] = defaultdict(int)
        self.dropped: dict[tuple[int, str, int], int] = defaultdict(int)
        self._emails: list[Email] = []  # whose counts may have changed
        self._events: list[tuple[Any, ...]] = []
        self._revised: list[tuple[int, int]] = []
        self._last_event: int | None = FAR  # behind which events are new; None: no tenant of these hits has a feed
        self._began: dict[int, int] = {}  # emails that were first spoken of earlier than was known
        self._firsts: list[tuple[Tally, Email, int, int, int | None]] = []  # tallies whose first hit went
        self._left: set[tuple[int, str, int]] = set()  # campaigns that an email left, perhaps with their last hit
        self._used: list[tuple[Any, ...]] = []  # of allowances
        self._tenants: dict[int, tuple[str, int | None]] = {}  # of hits: zones, and how many new emails a day
        self._numbers: dict[Judgement, tuple[int, int]] = {}  # and their states
        self._judgements: dict[int, Judgement] = {}
        self._texts: dict[str, dict[int | None, Any]] = {"agent": {}, "url": {None: None}}  # by number, as far as known

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            with pipelined(self.connection):
                self.write()

    def _read_judgements(self) -> None:
        for number, verdict, reason in self.connection.execute("select id, verdict, reason from judgements"):
            judgement = self._judgements[number] = judgement_of(verdict, reason)
            self._numbers[judgement] = number, judgement.state

    def _number(self, judgement: Judgement) -> tuple[int, int]:
        """The number of a judgement, and its state; of a pair that never occurred, in a new row."""
        if judgement not in self._numbers:
            row = (judgement.verdict, judgement.reason, judgement.state)
            sql = "insert into judgements (verdict, reason, state) values (?, ?, ?) returning id"
            number = self.connection.execute(sql, row).fetchone()[0]
            self._numbers[judgement], self._judgements[number] = (number, judgement.state), judgement
        return self._numbers[judgement]

    # -- Recording hits

    def record(self, hits: Iterable[Hit]) -> None:
        """Judge hits, those of each email together, and count them."""
        for tenant, groups in self._by_tenant(hits).items():
            asked = {what: self._ask_interned(tenant, what, groups.values()) for what in INTERNED}
            emails = self._emails_of(tenant, groups)
            by_id = {email.id: email for email, _ in emails}
            agents, urls = (self._interned(tenant, what, *asked[what], emails) for what in ("agent", "url"))
            is_over = OTHER in agents or OTHER in urls
            clicked = [(email, urls[hit.url]) for email, new in emails for hit in new if hit.url is not None]
            links = self._ask_links(clicked)
            self._read_stored(emails, by_id)
            judged = []
            for email, new in emails:
                judgements, again = judge_together(email, new)
                judged.append((email, new, judgements, self._otherwise(again) if again else []))
            take_links(links, by_id)
            more = [(email, each.url) for email, _, _, revised in judged for each, _ in revised if each.url is not None]
            take_links(self._ask_links([(email, url) for email, url in more if url not in email.links]), by_id)
            for email, new, judgements, revised in judged:
                self._revise(email, revised)
                for hit, judgement in zip(new, judgements):  # noqa: B905  # as long as each other
                    number, state = self._numbers.get(judgement) or self._number(judgement)
                    if is_over:
                        hit = self._within(tenant, hit, judgement, agent=agents, url=urls)
                    url = urls[hit.url] if hit.url is not None else None
                    method = "HEAD" if hit.method == "HEAD" else None
                    said = hit.address or None, hit.purpose or None, 1 if hit.own else 0, 1 if hit.fixed else 0
                    event = (tenant, email.id, hit.at, hit.type, method, number, agents[hit.agent], url, *said)
                    self._events.append(event)
                    self._count(email, hit, url, number, state, 1)
                if email.last_at is None or new[-1].at > email.last_at:
                    email.last_at = new[-1].at
                if not email.registered and new[0].at < email.created_at:
                    self._began[email.id] = email.created_at = new[0].at

    def _ask_interned(self, tenant: int, what: str, hits: Iterable[list[Hit]]) -> tuple[set[str], sqlite3.Cursor]:
        """Ask for the numbers of agents or URLs of hits, which are stored once."""
        texts = {*map(operator.attrgetter(what), chain.from_iterable(hits))} - {None}
        return texts, for_each(self.connection, {*texts, OTHER}, INTERNED[what][0], tenant=tenant)

    def _interned(
        self, tenant: int, what: str, texts: set[str], asked: sqlite3.Cursor, emails: Iterable[tuple[Email, list[Hit]]]
    ) -> dict[str, int]:
        """Their numbers; those of new ones over a limit are that of OTHER."""
        known = dict(asked)
        others: set[str] = set()
        if new := texts - known.keys():
            pairs = [(email, hit) for email, hits in emails for hit in hits if getattr(hit, what) in new]
            others = self._over_texts(tenant, what, pairs)
            stored = [text for text in dict.fromkeys(getattr(hit, what) for _, hit in pairs) if text not in others]
            if others and OTHER not in known:
                stored.append(OTHER)
            rows = [(text, url_host(text)) for text in stored] if what == "url" else stored
            known |= for_each(self.connection, rows, INTERNED[what][1], tenant=tenant)
        self._texts[what].update((number, text) for text, number in known.items())
        return known | dict.fromkeys(others, known.get(OTHER, 0))

    def _over_texts(self, tenant: int, what: str, pairs: list[tuple[Email, Hit]]) -> set[str]:
        """Those of new agents or URLs that are over a limit: no URL that we signed, nor the first ones of a registered email."""
        signed = {hit.url for _, hit in pairs if hit.signed}
        pairs.sort(key=lambda pair: pair[0].registered)
        plain = {getattr(hit, what): (email, hit) for email, hit in pairs if what != "url" or hit.url not in signed}
        own = {
            text: (A_REGISTERED_EMAIL, email.key, hit.at // DAY_MS)
            for text, (email, hit) in plain.items()
            if what == "url" and email.registered
        }
        return self._over(tenant, what, {text: hit for text, (_, hit) in plain.items()}, own)

    def _over(self, tenant: int, what: str, new: Mapping[str, Hit], own: Rooms) -> set[str]:
        """Those of the new things that hits bring which are over what they have of their own, and then over what a tenant
        may have on the day of the hit. Of each, one network has no more than half of what others leave."""
        if not new:
            return set()
        _, a_day = self._tenants[tenant]
        of_day = A_DAY[what] if a_day is None else a_day if what == "unregistered" else max(a_day, A_DAY[what])
        tries = [
            (text, most, (whose, day, ALL_NETWORKS), (whose, day, network_of(hit)))
            for text, hit in new.items()
            for most, whose, day in filter(None, (own.get(text), (of_day, "", hit.at // DAY_MS)))
        ]
        sql = f"""
            select allowances.whose, allowances.day, allowances.network, allowances.used
            from {wanted("whose", "day", "network")} cross join allowances
            where allowances.tenant = :tenant and allowances.day = wanted.day and allowances.what = :what
                and allowances.whose = wanted.whose and allowances.network = wanted.network
        """
        asked = sorted({each for _, _, *allowances in tries for each in allowances})
        rows = for_each(self.connection, asked, sql, tenant=tenant, what=what)
        used = Counter({(whose, day, network): number for whose, day, network, number in rows})
        before, over = used.copy(), {*new}
        for text, most, of_all, of_network in tries:
            if text not in over:
                continue
            if used[of_all] < most // 10:  # far from it, networks are not counted yet
                used[of_all] += 1
            elif used[of_all] + used[of_network] < most:
                used.update((of_all, of_network))
            else:
                continue
            over.remove(text)
        self._used += ((tenant, what, *each, number) for each, number in used.items() if number != before[each])
        return over

    def _within(self, tenant: int, hit: Hit, judgement: Judgement, **numbers: Mapping[str, int]) -> Hit:
        """A hit as it is stored: where its agent or its URL is over a limit, without that, and judged for good."""
        for what, known in numbers.items():
            text = getattr(hit, what)
            if text not in (None, OTHER) and known[text] == known.get(OTHER):
                self.dropped[tenant, f"{what}-limit", hit.at // DAY_MS] += 1
                instead: dict[str, Any] = {what: OTHER, "fixed": judgement}
                hit = hit._replace(**instead)
        return hit

    def _by_tenant(self, hits: Iterable[Hit]) -> dict[int, dict[tuple[str, str], list[Hit]]]:
        """Hits that can become events, by tenant, and by key and campaign; others are dropped by the first reason that fits."""
        hits = [*hits]
        sql = f"""
            select tenants.number, tenants.mail_id, tenants.id, tenants.tracking_host, tenants.id_in_mail_at,
                   (select 1 from emails where emails.tenant = tenants.number and emails.key > '{AGED}'
                        and emails.key < '{AGED}~' limit 1),
                   (select (select coalesce(max(id), 0) from events) from feeds where feeds.tenant = tenants.number),
                   (select count(*) from marks where name = '{UNTRACKED}'),
                   tenants.ignore_gpc, tenants.tz, tenants.unregistered_a_day
            from {wanted("word")} cross join tenants
            where tenants.mail_id = wanted.word or tenants.id = wanted.word or tenants.tracking_host = wanted.word
        """
        asked = for_each(self.connection, {word for hit in hits for word in (hit.mail_id, hit.host)}, sql)
        self._read_judgements()
        tenants = asked.fetchall()
        by_mail_id = {mail_id: number for number, mail_id, *_ in tenants}
        ignoring = {number for number, *_, ignores, _, _ in tenants if ignores}
        self._has_untracked = any(row[-4] for row in tenants)
        by_id = {id_: (number, last or 0) for number, _, id_, _, last, *_ in tenants}
        owners = {host: mail_id for _, mail_id, _, host, *_ in tenants if host}
        self._with_old = {row[0] for row in tenants if row[5]}
        self._last_event = next((row[6] for row in tenants if row[6] is not None), None)
        self._tenants = {number: (tz, a_day) for number, *_, tz, a_day in tenants}
        found: dict[int, dict[tuple[str, str], list[Hit]]] = defaultdict(lambda: defaultdict(list))
        in_mail: dict[int, int] = {}
        for hit in hits:
            tenant, last = by_mail_id.get(hit.mail_id, 0), 0
            if not tenant:
                tenant, last = by_id.get(hit.mail_id, (0, 0))
                reason = "dashboard-id" if tenant else "unknown-tenant"
                if tenant:
                    in_mail[tenant] = max(hit.at, last, in_mail.get(tenant, 0))
            elif owners.get(hit.host, hit.mail_id) != hit.mail_id:
                reason = "wrong-host"
            elif not is_key(hit.key):
                reason = "bad-key"
            elif hit.type == CLICK and hit.answer not in ("302", "named", "hidden"):
                reason = "not-redirected"
            elif hit.asks and (tenant not in ignoring or hit.key == UNTRACKED_KEY):
                reason = f"untracked-{TYPES[hit.type]}"
            else:
                found[tenant][hit.key, hit.campaign].append(hit)
                continue
            self.dropped[tenant, reason, hit.at // DAY_MS] += 1
        for tenant, at in in_mail.items():
            change_tenant(self.connection, tenant, id_in_mail_at=at)
        return found

    def _emails_of(self, tenant: int, groups: dict[tuple[str, str], list[Hit]]) -> list[tuple[Email, list[Hit]]]:
        """The emails that hits belong to, in the order of their numbers, with their hits in order."""
        named = {pair: campaign_key(*pair) for pair in groups if pair[1]}
        asked = {*(key for key, _ in groups), *named.values()}
        known = find_emails(self.connection, tenant, asked, has_old=tenant in self._with_old)
        by_key: dict[str, list[Hit]] = {}
        for pair, hits in groups.items():
            key = pair[0]
            # Mailing tools give each subscriber one id for all campaigns, and an email is one message.
            if pair in named and not (key in known and known[key].registered):
                key = named[pair]
            by_key.setdefault(key, []).extend(hits)
        for hits in by_key.values():
            if len(hits) > 1:
                hits.sort(key=in_order)
        early = {key for key, hits in by_key.items() if key not in known or hits[0].at < known[key].created_at}
        # Of a hit without a time (which is fixed) nobody knows whether it came before its email was deleted.
        early |= {key for key, hits in by_key.items() for hit in hits if hit.fixed}
        for key, since in self._untracked(tenant, by_key).items():
            for hit in (hits := by_key[key]):
                if hit.at >= since:
                    self.dropped[tenant, f"untracked-{TYPES[hit.type]}", hit.at // DAY_MS] += 1
            by_key[key] = [hit for hit in hits if hit.at < since]
        for key, kinds in gone_among(self.connection, tenant, early).items():
            if not (kinds := {kind: at for kind, at in kinds.items() if kind != UNTRACKED}):
                continue
            # What nobody registered again never comes back: a deleted email's pixel is still out there.
            reason, gone_at = FORGOTTEN if FORGOTTEN in kinds else DELETED, max(kinds.values())
            later = [hit for hit in by_key[key] if key in known and hit.at > gone_at and not hit.fixed]
            if len(later) < len(by_key[key]):
                self.dropped[tenant, reason, self.now // DAY_MS] += len(by_key[key]) - len(later)
            by_key[key] = later
        if unknown := {key: hits for key, hits in by_key.items() if hits and key not in known}:
            known |= self._make_unregistered(tenant, unknown)
        emails = [(known[key], hits) for key, hits in by_key.items() if hits and key in known]
        emails.sort(key=lambda pair: pair[0].id)
        self._emails += [email for email, _ in emails]
        return emails

    def _untracked(self, tenant: int, keys: Iterable[str]) -> dict[str, int]:
        """Those of keys, or of the addresses that some tools take for keys, that are not to be tracked, and from when on."""
        if not self._has_untracked:
            return {}
        owns = {key: key.partition("?")[0] for key in keys}
        words = {key: {key, own, as_person(own) if "@" in own else own} for key, own in owns.items()}
        gone = gone_among(self.connection, tenant, {*chain.from_iterable(words.values())})
        found = {key: [gone[word][UNTRACKED] for word in words[key] if UNTRACKED in gone[word]] for key in words}
        return {key: min(since) for key, since in found.items() if since}

    def _make_unregistered(self, tenant: int, by_key: Mapping[str, list[Hit]]) -> dict[str, Email]:
        """Make the emails that hits speak of, as far as strangers may: beside those of the day, twice as many of a campaign
        as it was said to have."""
        firsts = {key: hits[0] for key, hits in by_key.items()}
        campaigns = {key: first.campaign for key, first in firsts.items() if first.campaign and key != first.key}
        sql = f"""
            select wanted.campaign, 2 * coalesce(campaign_sends.sent, 0), campaign_sends.sent_at
            from {wanted("campaign")} left join campaign_sends
                on campaign_sends.tenant = :tenant and campaign_sends.campaign = wanted.campaign
            where campaign_sends.sent is not null
                or exists (select 1 from campaigns where tenant = :tenant and campaigns.campaign = wanted.campaign)
        """
        asked = for_each(self.connection, {*campaigns.values(), OTHER}, sql, tenant=tenant) if campaigns else ()
        known = {campaign: (twice, sent_at) for campaign, twice, sent_at in asked}
        room = {key: (known[name][0], name, NO_DAY) for key, name in campaigns.items() if known.get(name, (0,))[0]}
        over = self._over(tenant, "unregistered", firsts, room)
        made = [key for key in firsts if key not in over]
        new = {campaigns[key]: firsts[key] for key in made if key in campaigns and campaigns[key] not in known}
        others = self._over(tenant, "campaign", new, {})
        for what, keys in (("unregistered", over), ("campaign", [key for key in made if campaigns.get(key) in others])):
            for hit in chain.from_iterable(by_key[key] for key in keys):
                self.dropped[tenant, f"{what}-limit", hit.at // DAY_MS] += 1
        rows = []
        for key in made:
            campaign = OTHER if campaigns.get(key) in others else campaigns.get(key, "")
            rows.append((key, campaign, firsts[key].at, fold_text(key, campaign) if campaign else ""))
        sql = f"""
            insert into emails (tenant, key, campaign, registered, created_at, search)
            select :tenant, wanted.key, wanted.campaign, 0, wanted.at, wanted.text
            from {wanted("key", "campaign", "at", "text")} returning key, id
        """
        ids = dict(for_each(self.connection, rows, sql, tenant=tenant)) if rows else {}
        found = {}
        for key, campaign, at, _ in rows:
            sent_at = known[campaign][1] if campaign in known else None
            found[key] = email = Email((ids[key], tenant, key, 0, campaign, at, sent_at, None, 0, None, None))
            self._standings[email.standing()] += 1
        return found

    # -- The session of a hit

    def _read_stored(self, emails: Iterable[tuple[Email, list[Hit]]], by_id: Mapping[int, Email]) -> None:
        """Read the stored hits of the sessions that new hits come into: up to MAX_SESSION and one on each side of a hit."""
        before: list[tuple[int, int, int]] = []  # emails, and after which and up to which time
        after: list[tuple[int, int, int]] = []
        for email, hits in emails:
            last_at = -FAR if email.last_at is None else email.last_at
            floor = -FAR
            for n, hit in enumerate(hits):
                if floor >= last_at or hit.at > last_at + SESSION_GAP_MS:
                    break
                before.append((email.id, floor, hit.at))
                if hit.at < last_at:
                    after.append((email.id, hit.at, hits[n + 1].at if n + 1 < len(hits) else FAR))
                floor = hit.at
        # Nearly all sessions are short; of the others all is read.
        mostly = self._ask_near([(email, max(since, at - MOSTLY_MS), at) for email, since, at in before], "desc")
        rows = self._near(mostly, self._ask_near(after, "asc"))
        times: dict[int, list[int]] = defaultdict(list)
        for row in rows:
            times[row[0]].append(row[1])
        long = [each for each in before if session_reaches(times[each[0]], *each[1:])]
        rows += self._near(self._ask_near(long, "desc"))
        self._take_events(rows, by_id)

    def _ask_near(self, spans: Sequence[tuple[int, int, int]], order: str) -> Iterable[Sequence[Any]]:
        """Ask for events later than the first and up to the second of two times, from that end on which `order` begins."""
        sql = f"""
            {EVENT_FACTS.format(wanted("email", "since", "until"))} where events.id in (
                select near.id from events as near
                where near.email = wanted.email and near.at > wanted.since and near.at <= wanted.until
                order by near.at {order} limit :most)
            limit :room
        """
        return for_each(self.connection, spans, sql, most=MAX_SESSION + 1, room=self.room + 1) if spans else ()

    def _near(self, *asked: Iterable[Sequence[Any]]) -> list[Sequence[Any]]:
        """The rows. Raises TooMuch where they are more than may be read in one transaction."""
        rows = [*chain(*asked)]
        self.room -= len(rows)
        if self.room < 0:
            raise TooMuch("more hits are stored around these than may be read at once")
        return rows

    def _take_events(self, rows: Collection[Sequence[Any]], emails: Mapping[int, Email]) -> None:
        """Give emails their events, from rows as EVENT_FACTS has them."""
        agents, urls = self._texts.values()
        unknown = {("agent", row[5]) for row in rows if row[5] not in agents}
        if unknown := unknown | {("url", row[4]) for row in rows if row[4] not in urls}:
            sql = f"""
                select wanted.word, wanted.id, coalesce(agents.agent, urls.url) from {wanted("word", "id")}
                left join agents on wanted.word = 'agent' and agents.id = wanted.id
                left join urls on wanted.word = 'url' and urls.id = wanted.id
            """
            for what, id_, text in for_each(self.connection, unknown, sql):
                self._texts[what][id_] = text
        for email, at, id_, number, url, agent, type_, method, address, purpose, own, fixed in rows:
            judgement = self._judgements[number]
            why = judgement.reason if judgement.reason in NAMING_REASONS else ""
            said = method or "GET", "", "", urls[url], "", address or "", agents[agent], purpose or "", "", why
            hit = new_tuple(Hit, ("", at, type_, *said, "", own == 1, judgement if fixed else None, False))
            emails[email].stored[id_] = Stored(id_, number, url, hit)

    def _ask_links(self, clicked: Collection[tuple[Email, int]]) -> Iterable[Sequence[Any]]:
        """Ask for the tallies of links of emails."""
        for email, url in clicked:
            email.links[url] = [*NO_TALLY], [*NO_TALLY]
        sql = f"""
            select link_counts.* from {wanted("email", "url")} cross join link_counts
            where link_counts.email = wanted.email and link_counts.url = wanted.url
        """
        return for_each(self.connection, sorted({(email.id, url) for email, url in clicked}), sql) if clicked else ()

    def _read_all(self, emails: Iterable[Email]) -> None:
        """The tallies of all links of emails, and all their events."""
        self._read_judgements()
        by_id = {email.id: email for email in emails}
        sql = f"select link_counts.* from {wanted('id')} cross join link_counts where link_counts.email = wanted.id"
        take_links(for_each(self.connection, by_id, sql), by_id)
        sql = EVENT_FACTS.format(wanted("id")) + "where events.email = wanted.id"
        self._take_events(for_each(self.connection, by_id, sql).fetchall(), by_id)

    # -- Counting

    def _otherwise(self, judged: Iterable[tuple[Stored, Judgement]]) -> list[tuple[Stored, Judgement]]:
        """Those of stored hits that are judged otherwise now than they were."""
        return [pair for pair in judged if self._judgements[pair[0].judgement] != pair[1]]

    def _revise(self, email: Email, revised: Iterable[tuple[Stored, Judgement]]) -> None:
        """Count hits that are judged otherwise now than they were."""
        for stored, judgement in revised:
            number, state = self._number(judgement)
            self._revised.append((stored.id, number))
            before = self._judgements[stored.judgement].state
            self._count(email, stored.hit, stored.url, stored.judgement, before, -1)
            self._count(email, stored.hit, stored.url, number, state, 1)

    def _count(self, email: Email, hit: Hit, url: int | None, judgement: int, state: int, times: int) -> None:
        """Count a hit by its time and in the tallies of its email, or take it out again: 1 time or -1 times."""
        type_, at = hit.type, hit.at
        about = hit.agent if type_ == OPEN else url_host(hit.url or "") if hit.why else ""
        self._shapes[email.tenant, at // QUARTER_MS, type_, judgement, about] += times
        if email.campaign:
            self._campaign_hits[email.tenant, email.campaign, type_, judgement, about] += times
        if state == ASIDE:
            return
        self._tally(email.opens if type_ == OPEN else email.clicks, email, hit, None, state, times)
        if url is not None:
            self._tally(email.links[url][1], email, hit, url, state, times)

    def _tally(self, tally: Tally, email: Email, hit: Hit, url: int | None, state: int, times: int) -> None:
        first = tally[FIRST[state]]
        if first is None or hit.at <= first:
            if email.before is None:
                email.before = email.standing()
            if times > 0:
                tally[FIRST[state]] = hit.at
            else:
                self._firsts.append((tally, email, hit.type, state, url))
        tally[HITS[state]] += times
        if not tally[HITS[state]]:
            tally[FIRST[state]] = None

    # -- Registering, deleting, judging anew

    def register(self, tenant: int, registrations: Collection[Registration]) -> int:
        """Register emails, or update those whose key is known; returns how many are new."""
        known = find_emails(self.connection, tenant, {each.key for each in registrations})
        said = self._said_before(known)
        # Of what is said now nothing was deleted, whatever the clock says; of what is read again, that of before.
        again = [each for each in registrations if each.at]
        words = {each.key for each in again if each.key not in known}
        words |= {as_person(each.recipient) for each in registrations if each.recipient}
        gone = gone_among(self.connection, tenant, words)
        untracked: Gone = {}
        began: dict[str, int] = {}  # when emails were first spoken of that were not registered
        for each in registrations:
            key, at = each.key, each.at or self.now
            person = gone[as_person(each.recipient or "")]
            until = [end for kind, end in (*gone[key].items(), *person.items()) if kind != UNTRACKED and each.at]
            if at < max(until, default=-FAR):
                continue
            if at >= person.get(UNTRACKED, FAR):  # instrumented where that could not be known
                untracked |= {(hash_, UNTRACKED): at for hash_ in gone_hashes(self.connection, tenant, [key])}
                continue
            if key in said:
                said[key] = said[key].joined(each._replace(at=at))
            else:
                said[key], began[key] = each, at if at != UNDATED else self.now
        rows = []
        for key, each in said.items():
            sent_at = each.sent_at or began.get(key) or known[key].sent_at or 0
            created_at = sent_at if key in began else known[key].created_at
            campaign = (each.campaign or "").strip(" ")  # as hits and declarations name it
            texts = each.subject or "", each.recipient or "", campaign
            name = known[key].key if key in known else key
            search = fold_text(name, *texts) if any(texts) else ""
            times = created_at, sent_at, each.delivered_at, int(each.sent_at is not None), each.at or self.now
            told = each.subject, each.recipient, each.campaign
            cleared = sum(1 << n for n, text in enumerate(told) if text == "") if "" in told else 0
            rows.append((tenant, name, *texts, search, 1, *times, cleared, each.links))
            if key not in known:
                self._standings[Standing(tenant, campaign, True, key.startswith(TEST_KEY), sent_at // QUARTER_MS)] += 1
        upsert(self.connection, "emails", ("tenant", "key"), dict.fromkeys(SAID_COLUMNS, INSTEAD), rows)
        remember_gone(self.connection, untracked)
        if known:
            self._replace(known, find_emails(self.connection, tenant, known))
        return len(began)

    def _said_before(self, known: Mapping[str, Email]) -> dict[str, Registration]:
        """What was said of those of emails that are registered, by key."""
        texts = (
            f"case when emails.{name} <> '' or emails.cleared & {1 << n} <> 0 then emails.{name} end"
            for n, name in enumerate(SAID_OF_EMAILS)
        )
        sql = f"""
            select emails.key, {", ".join(texts)},
                   case when emails.time_said = 1 then emails.sent_at end, emails.delivered_at, emails.links, emails.told_at
            from {wanted("id")} cross join emails where emails.id = wanted.id and emails.registered = 1
        """
        asked = {email.key: key for key, email in known.items()}
        rows = for_each(self.connection, [email.id for email in known.values() if email.registered], sql)
        return {asked[row[0]]: Registration(*row) for row in rows}

    def _replace(self, known: Mapping[str, Email], new: Mapping[str, Email]) -> None:
        """What is said of emails changed: count them, and where it matters their links and hits, anew."""
        changed: dict[str, Email] = {}
        for key, email in new.items():
            old = known[key]
            email.before = old.standing()
            if old.last_at is not None and (old.campaign, old.context) != (email.campaign, email.context):
                changed[key] = email
            else:
                self._emails.append(email)
        self.judge_anew(changed.values())
        for key, email in changed.items():
            for stored in email.stored.values():  # which were all read
                self._count(known[key], stored.hit, None, stored.judgement, ASIDE, -1)  # in the campaign that it left
                self._count(email, stored.hit, None, stored.judgement, ASIDE, 1)

    def judge_anew(self, emails: Collection[Email]) -> int:
        """Judge all hits of emails anew; returns how many are judged otherwise now."""
        self._emails += emails
        self._read_all(emails)
        before = len(self._revised)
        for email in emails:
            stored = email.stored.values()
            judgements = judge([each.hit for each in stored], email.context)
            self._revise(email, self._otherwise(zip(stored, judgements, strict=True)))
        return len(self._revised) - before

    def delete(self, tenant: int, keys: Collection[str], *, carries: bool = False) -> int:
        """Remove emails and their events. Their part in every number goes too, or is carried; returns how many there were."""
        emails = [*find_emails(self.connection, tenant, keys).values()]
        self._read_all(emails)
        self._carries_for = tenant if carries else 0
        ids = [email.id for email in emails]
        for table in ("changes", "events", "email_counts", "link_counts", "emails"):
            delete_rows(self.connection, table, "id" if table == "emails" else "email", ids)
        sql = f"""
            delete from carried where tenant = :tenant and rollup in ('email_counts', 'link_counts')
                and key in (select wanted.key from {wanted("key")})
        """
        rows = [as_set(key) for email in emails for key in ([email.id], *([email.id, url] for url in email.links))]
        for_each(self.connection, rows, sql, tenant=tenant)
        links: Counter[Cell] = Counter()
        for email in emails:
            self._standings[email.standing()] -= 1
            self._left.add((tenant, email.campaign, email.last_at or 0))
            for stored in email.stored.values():  # by their time; the tallies go with the email
                self._count(email, stored.hit, None, stored.judgement, ASIDE, -1)
            for url, (tally, _) in email.links.items():
                links.update(dict(cells_of_link(tenant, email.campaign, url, tally)))
        urls = {url for email in emails for url in (*email.links, *(each.url for each in email.stored.values()))}
        unused = self.remove_urls(tenant, urls, links)  # they may be one person's
        instead = self._number_of_other(tenant) if carries and any(cell[1][2] in unused for cell in links) else 0
        for (table, (*key, url), name), number in links.items():
            cell = table, (*key, instead if url in unused else url), name
            if carries:
                self._carried[cell] += number
            if carries == (url in unused):
                self._cells[cell] += number if carries else -number
        return len(emails)

    def remove_urls(
        self, tenant: int, urls: Iterable[int | None], links: Mapping[Cell, int], nothing: int = 0
    ) -> set[int]:
        """Remove those of URLs that no event has, and no link but these that go; says which they were."""
        own: Counter[int] = Counter()
        for (_, (_, _, url), _), number in links.items():
            own[url] += number
        sql = f"""
            select wanted.id from {wanted("id", "value")}
            where not exists (select 1 from events where events.url = wanted.id) and wanted.value = coalesce((
                select sum({" + ".join(LINK_COLUMNS)}) from links
                where links.tenant = :tenant and links.url = wanted.id), :nothing)
        """
        asked = [(url, own[url] or nothing) for url in sorted(url for url in {*urls} if url is not None)]
        unused = {id_ for (id_,) in for_each(self.connection, asked, sql, tenant=tenant, nothing=nothing)}
        for table, column in (("links", "url"), ("urls", "id")):
            delete_rows(self.connection, table, column, unused)
        return unused

    def _number_of_other(self, tenant: int) -> int:
        """The number of what stands in the place of URLs that a tenant must not keep."""
        look_up, insert = INTERNED["url"]
        known = for_each(self.connection, [OTHER], look_up, tenant=tenant).fetchall()
        known = known or for_each(self.connection, [(OTHER, "")], insert, tenant=tenant).fetchall()
        return int(known[0][1])

    def declare(self, tenant: int, campaign: str, sent: int, sent_at: int | None) -> bool:
        """Say, or say anew, how many emails of a campaign nobody registers, and when; whether it is the first time."""
        sql = "select sent, sent_at from campaign_sends where tenant = ? and campaign = ?"
        before = self.connection.execute(sql, (tenant, campaign)).fetchone()
        at = sent_at if sent_at is not None else before[1] if before else self.now
        # Emails that hits have made already come into the campaign's cohort, or move with it.
        sql = "select id from emails where tenant = ? and campaign = ? and registered = 0 and campaign <> ''"
        emails = emails_by_id(self.connection, [row[0] for row in self.connection.execute(sql, (tenant, campaign))])
        for email in emails:
            email.before = email.standing()
            email.sent_at = at
        self._emails += emails
        for number, time_ in ((-before[0], before[1]), (sent, at)) if before else ((sent, at),):
            self._standings[Standing(tenant, campaign, True, False, time_ // QUARTER_MS)] += number
        changes = dict.fromkeys(("sent", "sent_at"), INSTEAD)
        upsert(self.connection, "campaign_sends", ("tenant", "campaign"), changes, [(tenant, campaign, sent, at)])
        return before is None

    # -- Writing

    def write(self) -> None:
        """Write what was gathered, once, at the end."""
        self.connection.executemany(
            "insert into events (tenant, email, at, type, method, judgement, agent, url, address, purpose, own,"
            " fixed) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            self._events,
        )
        if self._last_event is not None and (self._events or self._revised):
            self._log_changes()
        self._set("events", "judgement", self._revised)
        self._find_firsts()
        self._write_counts()
        self._write_cells()
        if left := sorted(each for each in self._left if each[1]):
            sql = f"""
                update campaigns set last_at = (
                    select max(email_counts.last_at) from emails join email_counts on email_counts.email = emails.id
                    where emails.tenant = campaigns.tenant and emails.campaign = campaigns.campaign
                        and emails.campaign <> '' and substr(emails.key, 1, 9) <> 'selftest~')
                from {wanted("tenant", "campaign", "at")}
                where campaigns.tenant = wanted.tenant and campaigns.campaign = wanted.campaign
                    and campaigns.last_at = wanted.at
            """
            self.connection.execute(sql, {"wanted": as_set(left)})
        upsert(
            self.connection, "allowances", ("tenant", "what", "whose", "day", "network"), {"used": INSTEAD}, self._used
        )
        dropped = [(*key, hits) for key, hits in self.dropped.items()]
        upsert(self.connection, "dropped", ("tenant", "reason", "day"), {"hits": ADDED}, dropped)

    def _log_changes(self) -> None:
        """Number what becomes of hits, for who follows it: new ones that are in a number, and what is judged otherwise now."""
        sql = f"""
            insert into changes (tenant, number, at, email, event, before, after)
            select feeds.tenant, feeds.last + row_number() over (partition by feeds.tenant order by changed.id), :now,
                   changed.email, changed.id, changed.before, changed.after
            from (
                select tenant, email, id, cast(null as bigint) as before, judgement as after
                from events where events.id > :last
                union all
                select events.tenant, events.email, events.id, events.judgement, wanted.value
                from {wanted("id", "value")} cross join events where events.id = wanted.id
            ) as changed join feeds on feeds.tenant = changed.tenant
            where exists (
                select 1 from judgements where judgements.id in (changed.before, changed.after) and state <> {ASIDE})
        """
        for_each(self.connection, self._revised, sql, now=self.now, last=self._last_event)
        sql = "select max(number) from changes where changes.tenant = feeds.tenant and changes.number > feeds.last"
        self.connection.execute(f"update feeds set last = coalesce(({sql}), last)")

    def _set(self, table: str, column: str, values: Collection[tuple[int, int]]) -> None:
        """Set a column of rows, given with their ids."""
        if values:
            changes = f"{column} = wanted.value from {wanted('id', 'value')}"
            for_each(self.connection, values, f"update {table} set {changes} where {table}.id = wanted.id")

    def _find_firsts(self) -> None:
        """When the first of the hits came that count so, where the one that was is judged otherwise now."""
        stale = [first for first in self._firsts if first[0][HITS[first[3]]]]
        if not stale:
            return
        sql = f"""
            select wanted.n, (
                select events.at from events join judgements on judgements.id = events.judgement
                where events.email = wanted.email and events.at >= wanted.since and events.type = wanted.type
                    and judgements.state = wanted.state and (wanted.url is null or events.url = wanted.url)
                order by events.at limit 1)
            from {wanted("n", "email", "since", "type", "state", "url")}
        """
        asked = [
            (n, email.id, tally[FIRST[state]], type_, state, url)
            for n, (tally, email, type_, state, url) in enumerate(stale)
        ]
        for n, at in for_each(self.connection, asked, sql):
            tally, _, _, state, _ = stale[n]
            tally[FIRST[state]] = at

    def _write_counts(self) -> None:
        """What is counted of emails and of their links, and where they stand now."""
        counts: list[tuple[Any, ...]] = []
        links: list[tuple[Any, ...]] = []
        for email in self._emails:
            campaign = email.campaign
            if email.before is not None and (now := email.standing()) != email.before:
                self._standings[email.before] -= 1
                self._standings[now] += 1
                campaign = email.before.campaign
            if campaign != email.campaign:
                self._left.add((email.tenant, campaign, email.last_at or 0))
            for url, (old, new) in email.links.items():
                if old != new or campaign != email.campaign:
                    for name, tally, times in ((campaign, old, -1), (email.campaign, new, 1)):
                        for cell, number in cells_of_link(email.tenant, name, url, tally):
                            self._cells[cell] += times * number
                    links.append((email.id, url, *new))
            if email.last_at is not None:
                counts.append((email.id, *email.opens, *email.clicks, email.last_at))
                if email.campaign and not email.key.startswith(TEST_KEY):
                    cell = "campaigns", (email.tenant, email.campaign), "last_at"
                    self._cells[cell] = max(self._cells[cell], email.last_at)
        upsert(self.connection, "email_counts", ("email",), dict.fromkeys((*TALLY_COLUMNS, "last_at"), INSTEAD), counts)
        upsert(self.connection, "link_counts", ("email", "url"), dict.fromkeys(CLICK_COLUMNS, INSTEAD), links)
        self._set("emails", "created_at", [*self._began.items()])

    def _write_cells(self) -> None:
        zones = {number: tz for number, (tz, _) in self._tenants.items()}
        if others := {tenant for tenant, *_ in chain(self._shapes, self._standings)} - zones.keys():
            sql = f"select number, tz from {wanted('id')} cross join tenants where number = wanted.id"
            zones |= for_each(self.connection, others, sql)
        cells, sign = self._cells, 1
        if self._carries_for:
            zones, cells, sign = dict.fromkeys(zones, AS_QUARTERS), self._carried, -1
        for shape, times in self._shapes.items():
            for cell in cells_of_hit(shape, self._judgements[shape[3]], zones[shape[0]]):
                cells[cell] += sign * times
        for hit, times in self._campaign_hits.items():
            cells[cell_of_campaign_hit(hit, self._judgements[hit[3]])] += sign * times
        groups: dict[Group | None, int] = defaultdict(int)
        moments: dict[Moment, int] = defaultdict(int)
        for standing, times in self._standings.items():
            group, since = parts_of(standing)
            groups[group] += times
            for moment in since:
                moments[moment] += times
        for group, times in groups.items():
            for cell in cells_of_group(group, zones[group[0]]) if group and times else ():
                cells[cell] += sign * times
        for moment, times in moments.items():
            for cell in cells_of_moment(moment, zones[moment[0]]) if times else ():
                cells[cell] += sign * times
        add_to_rollups(self.connection, self._cells)
        if self._carried:
            carry(self.connection, self._carries_for, self._carried)


def register_emails(connection: sqlite3.Connection, tenant: int, said: Collection[Registration], now: int) -> int:
    """Register emails, or update those whose key is known; returns how many are new."""
    with Batch(connection, now) as changes:
        return changes.register(tenant, said)


def rejudge_emails(connection: sqlite3.Connection, after: int, since: int, most: int) -> tuple[int, int] | None:
    """Judge anew the next `most` emails with hits since a time; the last one's number, and how many hits changed."""
    sql = "select email from email_counts where email > ? and last_at >= ? order by email limit ?"
    ids = [row[0] for row in connection.execute(sql, (after, since, most))]
    if not ids:
        return None
    with Batch(connection, time.time_ns() // 1_000_000) as changes:
        return ids[-1], changes.judge_anew(emails_by_id(connection, ids))


def record_lines(
    connection: sqlite3.Connection, lines: Sequence[Line], now: int, room: int = ALL_EVENTS
) -> tuple[Counter[str], int]:
    """Record lines but choices; returns how many were dropped, by reason, and how many stored hits were read. Raises TooMuch."""
    spooled: dict[str, list[Registration]] = defaultdict(list)  # these first, since hits may be theirs
    for line in lines:
        if isinstance(line, SpooledEmail):
            spooled[line.mail_id].append(line.registration)
    unknown = 0
    for mail_id, registrations in spooled.items():
        if row := connection.execute("select number from tenants where mail_id = ?", (mail_id,)).fetchone():
            register_emails(connection, row[0], registrations, now)
        else:
            unknown += len(registrations)
    with Batch(connection, now, room) as batch:
        if unknown:
            batch.dropped[0, "unknown-tenant", now // DAY_MS] = unknown
        batch.record([line for line in lines if isinstance(line, Hit)])
    dropped: Counter[str] = Counter()
    for (_, reason, _), hits in batch.dropped.items():
        dropped[reason] += hits
    return dropped, room - batch.room


CHANGES_MS = 8 * DAY_MS  # for which changes are kept
SWEPT_CHANGES = 1_000  # of a tenant, in one transaction


def sweep_changes(connection: sqlite3.Connection, now: int) -> None:
    """Remove some of the changes that are kept too long."""
    oldest = f"""
        select number, at from changes where changes.tenant = feeds.tenant order by number limit {SWEPT_CHANGES}
    """
    sql = f"update feeds set swept = coalesce((select max(number) from ({oldest}) as oldest where at < ?), swept)"
    connection.execute(sql, (now - CHANGES_MS,))
    connection.execute("""
        delete from changes where (tenant, number) in (
            select changes.tenant, changes.number from feeds cross join changes
            where changes.tenant = feeds.tenant and changes.number <= feeds.swept)
    """)


# -- Who is to be forgotten, or not to be tracked any more


def untracked_among(connection: sqlite3.Connection, tenant: int, words: Iterable[str]) -> set[str]:
    """Those of keys, and of addresses as as_person has them, that are not to be tracked."""
    return {word for word, kinds in gone_among(connection, tenant, {*words}).items() if UNTRACKED in kinds}


def keys_of_person(connection: sqlite3.Connection, tenant: int, address: str) -> tuple[list[str], set[str]]:
    """The keys of the emails to an address, and of those that have it as their key; and the ways it is spelt in."""
    # The column knows no lower case but that of ASCII: other letters are looked for as they are, and in both cases.
    is_theirs = "recipient <> '' and lower(recipient) in (:same, :small, :large)"
    sql = f"select recipient, key from emails where tenant = :tenant and {is_theirs}"
    forms = {"same": address, "small": address.lower(), "large": address.upper()}
    forms = {name: form.encode().lower().decode() for name, form in forms.items()}  # of bytes, only those of ASCII
    found = connection.execute(sql, {"tenant": tenant, **forms}).fetchall()
    sql = f"""
        select emails.key from {wanted("key")} cross join emails
        where emails.tenant = :tenant and emails.key > wanted.key || '?' and emails.key < wanted.key || '@'
    """
    spelt = {address, address.lower(), *(recipient for recipient, _ in found)}
    keys = {key for _, key in found}.union(key for (key,) in for_each(connection, spelt, sql, tenant=tenant))
    keys.update(email.key for email in find_emails(connection, tenant, spelt).values())
    return sorted(keys), spelt


class Released(NamedTuple):
    """What became of people."""

    emails: int
    spelt: set[str]  # the ways that their addresses are spelt in
    gone: Gone  # for write_gone, before the commit


def release(
    connection: sqlite3.Connection, tenant: int, people: Iterable[str], kinds: Iterable[str], at: int, *more: str
) -> Released:
    """Track people no more from a time on, in mail that was sent too; or forget all emails to them, but for their numbers."""
    keys, spelt = {*more}, set[str]()
    for person in people:
        found, forms = keys_of_person(connection, tenant, person)
        keys.update(found)
        spelt |= forms
    emails = len(keys) - len(more)
    words = keys.union(map(as_person, spelt))
    gone = {(hash_, kind): at for hash_ in gone_hashes(connection, tenant, words) for kind in kinds}
    remember_gone(connection, gone)
    if FORGOTTEN in kinds:
        with Batch(connection, at) as changes:
            changes.delete(tenant, keys, carries=True)
        sql = f"delete from allowances where tenant = :tenant and whose in (select wanted.key from {wanted('key')})"
        for_each(connection, keys, sql, tenant=tenant)
    return Released(emails, spelt, gone)


def told_late(connection: sqlite3.Connection, lines: Iterable[Line]) -> list[Choice]:
    """What was chosen, for the addresses that only these lines tell, since the database was away when mail was sent."""
    told: dict[str, list[Registration]] = defaultdict(list)
    for line in lines:
        if isinstance(line, SpooledEmail) and line.registration.recipient:
            told[line.mail_id].append(line.registration)
    found = []
    for mail_id, emails in told.items():
        for (tenant,) in connection.execute("select number from tenants where mail_id = ?", (mail_id,)).fetchall():
            pairs = [(each, each.recipient or "") for each in emails]
            gone = gone_among(connection, tenant, {word for each, to in pairs for word in (each.key, as_person(to))})
            for each, to in pairs:
                known = {DELETED, *gone[as_person(to)]}
                chosen = {kind: at for kind, at in gone[each.key].items() if kind not in known and each.at <= at}
                found += [Choice("", mail_id, to, (*chosen,), max(chosen.values()))] if chosen else []
    return found


MOST_UNKNOWN = 10_000  # choices a day for keys that no email of a tenant has


def choose(folder: str, connection: sqlite3.Connection, choices: Iterable[Choice]) -> set[str]:
    """Do what recipients chose, for their address where it is known, else for the key; returns spellings of who is forgotten.

    Of keys that no email has, so many a day: who has one link that a tool filled in can make up more.
    """
    spelt, gone = set[str](), Gone()
    sql = """
        select number, coalesce(max(recipient), ''), count(emails.id) from tenants
        left join emails on emails.tenant = number and emails.key = :key
        where mail_id = :mail_id group by number
    """
    count = """
        insert into allowances (tenant, day, what, whose, network, used) values (?, ?, 'choice', '', -1, 1)
        on conflict (tenant, day, what, whose, network) do update set used = allowances.used + 1 returning used
    """
    for each in {choice[1:4]: choice for choice in sorted(choices, key=lambda each: -each.at)}.values():
        for number, address, known in connection.execute(sql, {"mail_id": each.mail_id, "key": each.key}).fetchall():
            if not known and connection.execute(count, (number, each.at // DAY_MS)).fetchone()[0] > MOST_UNKNOWN:
                continue
            released = release(connection, number, [address or each.key], each.kinds, each.at, each.key)
            gone |= released.gone
            spelt |= released.spelt if FORGOTTEN in each.kinds else set()
    write_gone(folder, gone)
    return spelt


# == Tables ============================================================================================
# What pages and exports read: each table described once and read by one function; and the roll-ups.

# -- Roll-ups


class Span(NamedTuple):
    """A time of which numbers are read: from one quarter, or one day of the tenant's own zone, up to another."""

    by_day: int  # 0 or 1
    start: int
    end: int


UNREGISTERED = Span(0, NO_QUARTER, 0)  # the cohort of the emails that nobody registered
_IN_SPAN = "tenant = :tenant and grain = :by_day and time >= :start and time < :end"


def cohort_in(connection: sqlite3.Connection, tenant: int, span: Span) -> dict[str, int]:
    names = ROLLUPS["cohorts"].numbers
    sums = ", ".join(f"coalesce(sum({name}), 0)" for name in names)
    sql = f"select {sums} from cohorts where {_IN_SPAN}"
    return dict(zip(names, connection.execute(sql, {"tenant": tenant, **span._asdict()}).fetchone(), strict=True))


def uniques_in(connection: sqlite3.Connection, tenant: int, span: Span) -> list[tuple[int, int, int]]:
    """(type, state, emails)."""
    sql = f"select type, state, sum(emails) from uniques where {_IN_SPAN} group by type, state"
    return connection.execute(sql, {"tenant": tenant, **span._asdict()}).fetchall()


def hits_in(connection: sqlite3.Connection, tenant: int, steps: list[list[Span]]) -> list[list[tuple[Any, ...]]]:
    """Of each step, in the spans that it is made of: (verdict, reason, type, state, hits)."""
    # Each span is summed up alone, and by one number: to sort a year of quarters, or by two, takes a third longer.
    sql = f"""
        select place, (
            select group_concat('[' || pair || ',' || hits || ']', ',') from (
                select 2 * judgement + type - 1 as pair, sum(hits) as hits from reasons
                where tenant = :tenant and grain = by_day and time >= since and time < until group by 1
            ) as sums
        ) from {wanted("place", "by_day", "since", "until")}
    """
    rows = connection.execute("select id, verdict, reason, state from judgements")
    judged = {2 * row[0] + type_ - 1: (row[1], row[2], type_, row[3]) for row in rows for type_ in TYPES}
    found: list[list[tuple[Any, ...]]] = [[] for _ in steps]
    spans = [(place, *span) for place, spans in enumerate(steps) for span in spans]
    for place, sums in for_each(connection, spans, sql, tenant=tenant):
        found[place] += [(*judged[pair], hits) for pair, hits in json.loads(f"[{sums or ''}]")]
    return found


def first_quarter(connection: sqlite3.Connection, tenant: int) -> int | None:
    """The quarter with which a tenant's numbers begin: the first sending or the first hit."""
    sql = "select time from {} where tenant = ? and grain = 0 and time >= 0 order by time limit 1"
    rows = (connection.execute(sql.format(table), (tenant,)).fetchone() for table in ("reasons", "cohorts"))
    return min((row[0] for row in rows if row), default=None)


def named_clicks(connection: sqlite3.Connection, tenant: int) -> list[tuple[str, str, int]]:
    """Hosts that met the naming page, most clicks first: (host, reason, clicks)."""
    sql = "select host, reason, clicks from named_hosts where tenant = ? and clicks > 0 order by clicks desc, host limit 20"
    return connection.execute(sql, (tenant,)).fetchall()


def dropped_hits(connection: sqlite3.Connection, tenant: int, since: int = 0) -> dict[str, int]:
    """Hits that became no event, or one without what was over a limit, since a day, by reason."""
    sql = "select reason, sum(hits) from dropped where tenant = ? and day >= ? group by reason order by reason"
    return dict(connection.execute(sql, (tenant, since)).fetchall())


def limits_met(connection: sqlite3.Connection, since: int) -> list[str]:
    """Why hits since a day were over a limit, of whatever tenant."""
    sql = "select distinct reason from dropped where day >= ? order by reason"
    return [reason for (reason,) in connection.execute(sql, (since,)) if reason.removesuffix("-limit") in A_DAY]


def hits_so_far(connection: sqlite3.Connection) -> int:
    """How many hits became events since the database was made, removed ones included."""
    return int(connection.execute("select coalesce(max(id), 0) from events").fetchone()[0])


def last_hit_at(connection: sqlite3.Connection, tenant: int) -> int | None:
    sql = "select at from events where tenant = ? order by at desc limit 1"
    return next((row[0] for row in connection.execute(sql, (tenant,))), None)


# -- Numbers of campaigns


def campaigns_sent(
    connection: sqlite3.Connection, tenant: int, campaigns: Collection[str]
) -> dict[str, tuple[int, int]]:
    """In which quarters the first and the last email of each were sent; where none was told of, the first one was opened
    or clicked."""
    time = """
        select time from campaign_times
        where tenant = :tenant and campaign_times.campaign = wanted.campaign and grain = 0
    """
    sql = f"""
        select wanted.campaign,
            ({time} and emails > 0 order by time limit 1),
            ({time} and emails > 0 order by time desc limit 1),
            ({time} and {" + ".join(GROUP_COLUMNS)} > 0 order by time limit 1)
        from {wanted("campaign")}
    """
    rows = for_each(connection, campaigns, sql, tenant=tenant)
    sent = {campaign: (seen, seen) if first is None else (first, last) for campaign, first, last, seen in rows}
    return {campaign: times for campaign, times in sent.items() if times[0] is not None}


def campaigns_before(connection: sqlite3.Connection, tenant: int, quarter: int, most: int) -> list[tuple[str, int]]:
    """The last campaigns whose first email was sent before that quarter, newest first, and in which quarter."""
    sql = """
        select campaign, begun from (
            select campaigns.campaign, (
                select time from campaign_times as times where times.tenant = campaigns.tenant
                and times.campaign = campaigns.campaign and grain = 0 and times.emails > 0 order by time limit 1) as begun
            from campaigns where tenant = ? and emails > 0
        ) as mailings where begun < ? order by begun desc, campaign desc limit ?
    """
    return connection.execute(sql, (tenant, quarter, most)).fetchall()


def campaign_sums(
    connection: sqlite3.Connection, tenant: int, times: Sequence[tuple[str, list[Span]]]
) -> list[dict[str, int]]:
    """What the emails of a campaign came to in some spans together, for each of `times`."""
    names = ROLLUPS["campaign_times"].numbers
    sql = f"""
        select place, {", ".join(f"sum({name})" for name in names)}
        from {wanted("place", "campaign", "by_day", "since", "until")} cross join campaign_times
        where campaign_times.tenant = :tenant and campaign_times.campaign = wanted.campaign and grain = by_day
            and time >= since and time < until
        group by place
    """
    asked = [(place, name, *span) for place, (name, spans) in enumerate(times) for span in spans]
    found = [dict.fromkeys(names, 0) for _ in times]
    for place, *sums in for_each(connection, asked, sql, tenant=tenant):
        found[place] = dict(zip(names, sums, strict=True))
    return found


def campaign_opens(
    connection: sqlite3.Connection, tenant: int, spans: Iterable[tuple[str, int, int]], width: int
) -> list[tuple[str, int, int]]:
    """How many emails people first opened in steps of `width` quarters from one up to another: (campaign, step, emails)."""
    sql = f"""
        select wanted.campaign, (time - since) / :width, sum(opened_person)
        from {wanted("campaign", "since", "until")} cross join campaign_times
        where campaign_times.tenant = :tenant and campaign_times.campaign = wanted.campaign and grain = 0
            and time >= since and time < until and opened_person > 0
        group by 1, 2 order by 1, 2
    """
    return for_each(connection, [*spans], sql, tenant=tenant, width=width).fetchall()


def campaign_hits(connection: sqlite3.Connection, tenant: int, campaign: str) -> list[tuple[Any, ...]]:
    """(verdict, reason, type, state, hits)."""
    sql = """
        select verdict, reason, type, state, sum(hits) from campaign_hits join judgements on judgements.id = judgement
        where tenant = ? and campaign = ? group by verdict, reason, type, state
    """
    return connection.execute(sql, (tenant, campaign)).fetchall()


_LAST = "\U0010ffff"  # behind whatever a text goes on with
_A_TEST = f"key >= '{TEST_KEY}' and key < '{TEST_KEY}{_LAST}'"


def has_emails(connection: sqlite3.Connection, tenant: int) -> bool:
    """Whether a tenant has any email, registered or known from its hits, but for those of tests."""
    sql = f"select 1 from emails where tenant = ? and not ({_A_TEST}) limit 1"
    return connection.execute(sql, (tenant,)).fetchone() is not None


# -- The tables. The fields of exports are a contract, listed in README.

TIMES_AS_NUMBERS = ("created_at", "sent_at", "opened_at", "clicked_at", "timestamp", "first_email_at", "last_hit_at")
# What strangers wrote, and a spreadsheet might run.
FOREIGN_FIELDS = ("key", "subject", "recipient", "campaign", "url", "user_agent", "ip_address")
PERSONAL_FIELDS = ("recipient", "subject", "ip_address")  # not for who has an id that stands in mail
MOST_SORTED = 10_000  # the newest rows, which are sorted or filtered at once: no counter has an index
MOST_SEARCHED = 20_000  # the newest emails, in which a piece of text is looked for
MOST_BEGIN = 1_000  # older ones that are found by their beginning
MOST_CLICKED = 10  # links that are told of one email in a table
RANGE_PARAMETERS = ("range", "on", "from", "to")  # a name, a day, or from a day to a day
EXPORT_TYPES = {"csv": "text/csv; charset=utf-8", "json": "application/json; charset=utf-8"}
_READERS = f"""
    select lower(newest.recipient) from (
        select id, recipient from emails where tenant = :tenant order by created_at desc, id desc limit {MOST_SORTED}
    ) as newest join email_counts on email_counts.email = newest.id
    where open_person + open_unconfirmed + click_person > 0
"""  # who may have opened or clicked anything
SHOWN = {  # which emails a table shows, by what their readers did: in words, and in SQL
    "all": ("All", "1 = 1"),
    "opened": ("Opened", "opens_person > 0 or clicks_person > 0"),
    "unconfirmed": ("Maybe read", "opens_unconfirmed > 0 and opens_person = 0 and clicks_person = 0"),
    "not-opened": ("Not opened", "opens_person + opens_unconfirmed + clicks_person = 0"),
    "clicked": ("Clicked", "clicks_person > 0"),
    "not-clicked": ("Not clicked", "clicks_person = 0"),
    "never": ("Never opened any", f"recipient <> '' and lower(recipient) not in ({_READERS})"),
}


class Column(NamedTuple):
    head: str
    kind: str  # of its cells
    field: str  # that they show, perhaps with others
    order: str = ""  # the name by which it is sorted; "": it is not
    sql: str = ""  # what is compared then; "": its text


@dataclass(frozen=True, slots=True)
class Table:
    name: str
    title: str
    empty: str  # what a page says where there are no rows
    fields: tuple[str, ...]  # of exports
    columns: tuple[Column, ...]  # of pages
    scopes: Mapping[str, str]  # SQL, by what it is narrowed to: the first that is asked for holds
    rows: str  # SQL: the ids that are wanted, each with its fields
    source: str = ""  # what `ids` reads
    ids: str = """
        select id, at, case when {shown} then 1 else 0 end as fits, {sort} as sort_key from {source}
        where {scope} and (at, id) < (:at, :id) order by at desc, id desc limit :looked
    """  # SQL: which rows, with their age, whether they fit what is shown, and what they are sorted by
    more: tuple[str, ...] = ()  # fields that only pages show
    spreadsheet: tuple[str, ...] = ()  # those of spreadsheets, where they have others than exports
    filters: tuple[str, ...] = ()  # the parameters that narrow its exports
    usual: str = ""  # the order on a page that nobody sorted; "": newest first

    def told(self, people: bool, in_spreadsheet: bool = False) -> list[str]:
        """Which fields an export has; without those that tell of people, if they must not be told."""
        fields = self.spreadsheet if in_spreadsheet and self.spreadsheet else self.fields
        return [name for name in fields if people or name not in PERSONAL_FIELDS]

    @property
    def orders(self) -> dict[str, str]:
        return {column.order: column.sql or f"lower({column.field})" for column in self.columns if column.order}


_OF_PERSON = """
    select other.id from emails as one join emails as other
    on other.tenant = one.tenant and lower(other.recipient) = lower(one.recipient) and other.recipient <> ''
    where one.tenant = :tenant and one.key = :person and one.recipient <> ''
"""  # the emails of the recipient of one: an address in a URL would come into logs
EMAILS = Table(
    "emails",
    "Emails",
    "No emails yet. Register one by POST, or send mail with a pixel: it appears here with its first hit.",
    fields=(
        *("key", "subject", "recipient", "campaign", "registered", "created_at", "sent_at"),
        *("opens_person", "opens_unconfirmed", "opens_machine", "opened_as", "opened_at"),
        *("clicks_person", "clicks_unconfirmed", "clicks_machine", "clicked_as", "clicked_at"),
    ),
    more=("delivered_at", "began_at"),
    filters=("campaign", "q", "show", "person"),
    columns=(
        Column("Recipient", "person", "recipient", "recipient"),
        Column("Subject", "subject", "subject", "subject"),
        Column("Opened", "done", "opens", "opens", "opens_person * 1000000 + opens_unconfirmed"),
        Column("Clicked", "done", "clicks", "clicks", "clicks_person * 1000000 + clicks_unconfirmed"),
        Column("Sent", "time", "began_at", "sent", "created_at"),
        Column("Campaign", "text", "campaign", "campaign"),
    ),
    scopes={
        "key": "tenant = :tenant and key = :key",
        "person": f"id in ({_OF_PERSON})",
        "search": f"id in (select id from {wanted('id')})",
        "campaign": "tenant = :tenant and campaign = :campaign and campaign <> ''",
        # Tests are looked up, by the index: to read each key would double the time to sort the newest emails.
        "": f"tenant = :tenant and id not in (select id from emails where tenant = :tenant and {_A_TEST})",
    },
    source="email_details",
    rows=f"select id, {{fields}} from email_details where id in (select id from {wanted('id')})",
)
_IN_CAMPAIGN = "select id from emails where tenant = :tenant and campaign = :campaign and campaign <> ''"
_OF_CAMPAIGN = "(select campaign from emails where emails.id = events.email) = :campaign"
_OF_VERDICT = "judgement in (select id from judgements where verdict = :verdict)"
EVENTS = Table(
    "events",
    "Just now",
    "Nothing so far.",
    fields=("key", "event_type", "timestamp", "method", "verdict", "reason", "url", "user_agent", "ip_address"),
    more=("recipient", "subject", "campaign"),
    spreadsheet=(
        *("timestamp", "event_type", "recipient", "subject", "campaign", "client", "device"),
        *("verdict", "reason", "url", "key", "method", "user_agent", "ip_address"),
    ),
    filters=("key", "person", "url", "campaign", "since", "until", "verdict"),
    columns=(
        Column("When", "time", "timestamp"),
        Column("What", "text", "event_type"),
        Column("Email", "email", "recipient"),
        Column("With, or where to", "way", "url"),
        Column("By", "by", "verdict"),
    ),
    scopes={
        "key": "email = (select id from emails where tenant = :tenant and key = :key) and at >= :since",
        "person": f"email in ({_OF_PERSON}) and at >= :since",
        "url": "url = (select id from urls where tenant = :tenant and urls.url = :url) and at >= :since",
        "campaign": f"email in ({_IN_CAMPAIGN}) and at >= :since",  # only of a few: they are sorted
        "": "tenant = :tenant and at >= :since",
    },
    source="events",
    rows=f"""
        select details.id, details.key, event_type, at, method, verdict, reason, url, agent, address,
               recipient, subject, campaign
        from {wanted("id")} cross join event_details as details join emails on emails.id = details.email
        where details.id = wanted.id
    """,
)
CLICKS = replace(
    EVENTS,
    title="Who clicked",
    empty="Nobody so far.",
    columns=(
        Column("When", "time", "timestamp"),
        Column("Recipient", "person", "recipient"),
        Column("Campaign", "text", "campaign"),
        Column("With", "with", "user_agent"),
        Column("By", "by", "verdict"),
    ),
)
DONE = replace(
    EVENTS,
    title="What happened",
    columns=(*EVENTS.columns[:2], Column("Email", "mail", "subject"), *EVENTS.columns[3:]),
)
_THEN_CLICKS = "* 1000000 + sum(clicks_person)"
LINKS = Table(
    "links",
    "Links",
    "No link was clicked yet.",
    fields=("url", *LINK_COLUMNS),
    more=("campaigns", "campaign"),
    filters=("campaign",),
    columns=(
        Column("Destination", "url", "url", "url", "(select url from urls where urls.id = links.url)"),
        Column("Clicks", "number", "clicks_person", "clicks", "sum(clicks_person)"),
        Column("In emails", "number", "emails_person", "people", f"sum(emails_person) {_THEN_CLICKS}"),
        Column("Share of clicks", "part", "clicks_person"),
        Column("Maybe", "few", "clicks_unconfirmed", "unconfirmed", f"sum(clicks_unconfirmed) {_THEN_CLICKS}"),
        Column("Machines", "few", "clicks_machine", "machines", f"sum(clicks_machine) {_THEN_CLICKS}"),
        Column("Campaign", "campaigns", "campaign", "campaign", "max(campaign)"),
    ),
    scopes={
        "link": "links.tenant = :tenant and links.url = :link and campaign = coalesce(:campaign, campaign)",
        "campaign": "links.tenant = :tenant and campaign = :campaign",
        "": "links.tenant = :tenant",
    },
    ids="""
        select url as id, 0 as at, 1 as fits, {sort} as sort_key from links
        where {scope} and url < :id
        and url <> coalesce((select id from urls where tenant = :tenant and urls.url = :left_out), 0)
        group by url order by url desc limit :looked
    """,
    rows=f"""
        select links.url, urls.url, {", ".join(f"sum({column})" for column in LINK_COLUMNS)},
               count(nullif(campaign, '')), max(campaign)
        from {wanted("id")} cross join links join urls on urls.id = links.url
        where links.url = wanted.id and {{scope}} group by links.url, urls.url
    """,
    usual="people",
)
_OF_ALL = "* 1.0 / coalesce(nullif(emails, 0), 1)"
CAMPAIGNS = Table(
    "campaigns",
    "Campaigns",
    "No campaigns yet: name one when you register or instrument mail.",
    fields=("campaign", "emails", *GROUP_COLUMNS[:-1], "first_email_at", "last_hit_at"),
    more=GROUP_COLUMNS[-1:],
    columns=(
        Column("Campaign", "campaign", "campaign", "campaign"),
        Column("Sent", "number", "emails", "sent", "emails"),
        Column("Opened", "share", "Opened", "opened", f"(opened_person + click_only) {_OF_ALL}"),
        Column("Clicked", "share", "Clicked", "clicked", f"clicked_person {_OF_ALL}"),
        Column("First sent", "time", "first_email_at", "first", "coalesce(first_email_at, 0)"),
        Column("Last activity", "time", "last_hit_at", "last", "coalesce(last_hit_at, 0)"),
        Column("First 2 days", "spark", "campaign"),
    ),
    scopes={"campaign": "tenant = :tenant and campaign = :campaign", "": "tenant = :tenant"},
    ids="""
        select id, at, 1 as fits, {sort} as sort_key from campaign_details
        where {scope} and id > :name order by id limit :looked
    """,
    rows=f"select id, {{fields}} from campaign_details where {{scope}} and id in (select key from {wanted('key')})",
    usual="first",
)
PROGRAMS = Table(
    "clients",
    "Mail programs",
    "No mail was opened in this range.",
    fields=("client", "device", "opens_person", "opens_unconfirmed"),
    more=("emails",),
    filters=("campaign", *RANGE_PARAMETERS, "tz"),
    columns=(
        Column("Opened with", "program", "client", "client", "client"),
        Column("Device", "device", "device", "device", "device"),
        Column("Opens", "number", "opens_person", "people", "sum(opens_person)"),
        Column("Maybe read", "few", "opens_unconfirmed", "unconfirmed", "sum(opens_unconfirmed)"),
        Column("Share", "range", "opens", "share", "sum(opens_person + opens_unconfirmed)"),
    ),
    scopes={
        "campaign": """(
            select client, device, case state when 1 then hits else 0 end as opens_person,
                   case state when 2 then hits else 0 end as opens_unconfirmed
            from campaign_hits join judgements on judgements.id = judgement
            where tenant = :tenant and campaign = :campaign and type = 1 and state in (1, 2)
        ) as clients""",
        "": "clients where tenant = :tenant and day >= :first_day and day < :end_day",
    },
    ids="""
        select client || '|' || device as id, 0 as at, 1 as fits, {sort} as sort_key from {scope}
        group by client, device having sum(opens_person + opens_unconfirmed) > 0
    """,
    rows="""
        select client || '|' || device, client, device, sum(opens_person), sum(opens_unconfirmed),
               sum(sum(opens_person + opens_unconfirmed)) over ()
        from {scope} group by client, device
    """,
    usual="share",
)
TABLES = {table.name: table for table in (EMAILS, EVENTS, LINKS, CAMPAIGNS, PROGRAMS)}


# -- Their reader


class Cursor(NamedTuple):
    """Where rows go on: behind the one with this time and id; where they are sorted, after `id` rows."""

    at: int
    id: Any  # a number; of campaigns, the name

    def __str__(self) -> str:
        return f"{self.at}-{encode_target(self.id) if isinstance(self.id, str) else self.id}"


NEWEST = Cursor(1 << 62, 1 << 62)


def read_cursor(text: str, table: Table) -> Cursor:
    """Read what a `next` field said; "" is the beginning. Raises BadInput."""
    at, _, id_ = text.partition("-")
    known = decode_target(id_) if table is CAMPAIGNS else re.fullmatch("[0-9]{1,18}", id_) and int(id_)
    if text and (known is None or not re.fullmatch("[0-9]{1,18}", at)):
        raise BadInput("after: expected what `next` said on the page before")
    return Cursor(int(at), known) if text else NEWEST


ALL_ROWS = 1 << 40


class Wanted(NamedTuple):
    campaign: str | None = None
    key: str | None = None  # of an email
    search: str = ""
    shown: str = "all"  # one of SHOWN
    verdict: str = ""  # of events
    since: int = 0
    days: tuple[int, int] = (0, 0)  # from which up to which
    order: str = ""  # one of the table's
    ascending: bool = False
    people: bool = True  # whether recipients and subjects may be searched
    shared: bool = False  # by who has a share: of destinations without what may name a reader, their queries
    whole: bool = False  # for an export: newest first, and with the hidden link
    link: int | None = None  # by its number
    url: str | None = None  # that was clicked
    person: str | None = None  # the key of an email to them
    after: Cursor = NEWEST
    most: int = ALL_ROWS


class Rows(NamedTuple):
    table: Table
    rows: list[tuple[Any, ...]]  # each an id and the fields
    next: Cursor | None = None  # where the next ones begin
    found: tuple[int, int] | None = None  # how many of the newest emails have a text that was searched for; older ones
    links: Mapping[int, list[str]] = {}  # by the id of an email: which ones people clicked

    def named(self, people: bool = True) -> list[dict[str, Any]]:
        """The rows, by the names of their fields; without those that tell of people, if they must not be told."""
        names = ("id", *self.table.fields, *self.table.more)
        rows = [dict(zip(names, row, strict=True), links=self.links.get(row[0], [])) for row in self.rows]
        return [{name: row[name] for name in row if people or name not in PERSONAL_FIELDS} for row in rows]


def read_table(connection: sqlite3.Connection, tenant: int, table: Table, asked: Wanted) -> Rows:
    """Rows of a table: which ones first, so that no more are read than these."""
    order = asked.order or ("" if asked.whole and table is not PROGRAMS else table.usual)
    begin = asked.after.id if order and asked.after != NEWEST else 0
    narrow = next(name for name in table.scopes if not name or getattr(asked, name))
    fits = SHOWN[asked.shown][1]
    if table is EVENTS and (asked.campaign or asked.verdict):
        fits = " and ".join([_OF_CAMPAIGN] * bool(asked.campaign) + [_OF_VERDICT] * bool(asked.verdict))
        if narrow == "campaign":
            hits = sum(row[-1] for row in campaign_hits(connection, tenant, asked.campaign or ""))
            narrow = "campaign" if hits <= MOST_SORTED else ""
    looked, is_part = asked.most + 1, fits != SHOWN["all"][1]
    if order or is_part:
        looked = ALL_ROWS if table is CAMPAIGNS else MOST_SORTED
    values = {**asked._asdict(), **(NEWEST if order else asked.after)._asdict(), "tenant": tenant, "looked": looked}
    values["name"] = asked.after.id if isinstance(asked.after.id, str) else ""
    values |= {"first_day": asked.days[0], "end_day": asked.days[1], "left_out": "" if asked.whole else HIDDEN_TARGET}
    scope = table.scopes[narrow]
    found = None
    if asked.search and "search" in table.scopes:
        values["wanted"], found = search_emails(connection, asked, values)
    sort = table.orders.get(order, "0")
    ids = table.ids.format(scope=scope, source=table.source, shown=fits, sort=sort)
    sql = f"select id, at from ({ids}) as newest where fits = 1"  # which leaves them in their order
    by_number = table is CAMPAIGNS and order == "campaign"
    if order and not by_number:
        ends = "at desc, id desc" if table is EMAILS else "id"
        sql += f" order by sort_key {'asc' if asked.ascending else 'desc'}, {ends} limit :most offset :begin"
        values |= {"begin": begin, "most": asked.most + 1}
    picked, following = [], None
    those: Iterable[tuple[Any, ...]] = connection.execute(sql, values)
    if by_number:
        those = sorted(those, key=lambda row: in_reading_order(row[0]), reverse=not asked.ascending)
    for id_, at in those:
        picked.append(Cursor(at, id_))
        if len(picked) > asked.most:
            following = Cursor(0, begin + asked.most) if order else picked[-2]
            break
    if is_part and not (order or following):
        sql = table.ids.format(scope=scope, source=table.source, shown="1 = 1", sort="0")
        last = connection.execute(f"{sql} offset {MOST_SORTED - 1}", {**values, "looked": 1}).fetchone()
        following = last and Cursor(last[1], last[0])
    values["wanted"] = as_set(page := [each.id for each in picked[: asked.most]])
    fields = ", ".join((*table.fields, *table.more))
    rows = {row[0]: row for row in connection.execute(table.rows.format(scope=scope, fields=fields), values)}
    if table is LINKS and asked.shared:
        rows = {id_: (id_, NAMES_READER.sub("", url), *counts) for id_, url, *counts in rows.values()}
    links = clicked_links(connection, page) if table is EMAILS and not asked.whole else {}
    return Rows(table, [rows[id_] for id_ in page], following, found, links)


def in_reading_order(name: str) -> str:
    """What names are sorted by, so that No. 9 comes before No. 10."""
    return re.sub("[0-9]+", lambda digits: digits[0].zfill(MAX_CAMPAIGN), name.lower())


def search_emails(connection: sqlite3.Connection, asked: Wanted, values: dict[str, Any]) -> tuple[str, tuple[int, int]]:
    """The emails found that may be looked at; how many of the newest have a text in them; how many older begin so."""
    piece = re.sub(r"([%_\\])", r"\\\1", fold_text(asked.search))
    values = {**values, "text": asked.search, "end": asked.search + _LAST, "piece": f"%{piece}%"}
    some = f"{EMAILS.scopes['campaign'] if asked.campaign else 'tenant = :tenant'} and not ({_A_TEST})"
    texts = "case when search = '' then lower(key) else search end" if asked.people else "lower(key)"
    sql = f"""
        select count(case when (at, id) >= (:at, :id) then 1 end), group_concat(id || '', ',') from (
            select created_at as at, id, {texts} as text from emails
            where {some} order by created_at desc, id desc limit {MOST_SEARCHED}
        ) as newest where text like :piece escape '\\'
    """
    before, ids = connection.execute(sql, values).fetchone()  # ids newest first, as they were found
    newest = ids.split(",") if ids else []
    keys = f"select id from emails where {some} and key >= :text and key < :end limit {MOST_BEGIN}"
    recipients = f"""
        select id from emails where {some} and recipient <> ''
        and lower(recipient) >= lower(:text) and lower(recipient) < lower(:end) limit {MOST_BEGIN}
    """
    rows = (row for sql in (keys, recipients)[: 1 + asked.people] for row in connection.execute(sql, values))
    older = {str(id_) for (id_,) in rows}.difference(newest)
    return f"[{','.join([*newest[before:][: values['looked']], *older])}]", (len(newest), len(older))


def person_of(connection: sqlite3.Connection, tenant: int, key: str) -> tuple[str, dict[str, int]]:
    """The recipient of an email, "" where none is known, and what became of all that they got, by the names of a group's."""
    names = GROUP_COLUMNS[:-2]
    sums = (f"count(case when {verb}_as = '{state}' then 1 end)" for verb, state in (name.split("_") for name in names))
    sql = f"""
        select coalesce(max(recipient), ''), coalesce(sum(registered), 0), {", ".join(sums)},
               count(case when clicked_as = 'person' and coalesce(opened_as, '') <> 'person' then 1 end),
               count(case when clicked_as = 'person' and opened_as = 'unconfirmed' then 1 end)
        from email_details where id in ({_OF_PERSON})
    """
    recipient, *numbers = connection.execute(sql, {"tenant": tenant, "person": key}).fetchone()
    return recipient, dict(zip(("emails", *GROUP_COLUMNS), numbers, strict=True))


def clicked_links(connection: sqlite3.Connection, emails: Iterable[int]) -> dict[int, list[str]]:
    """Which links people clicked in emails: the first ones, since whoever has a mail may follow any number."""
    sql = f"""
        select firsts.email, urls.url from (
            select email, url, row_number() over (partition by email order by click_person_first, url) as place
            from {wanted("id")} cross join link_counts where link_counts.email = wanted.id and click_person > 0
        ) as firsts join urls on urls.id = firsts.url where place <= :most order by firsts.email, place
    """
    found: dict[int, list[str]] = defaultdict(list)
    for email, url in connection.execute(sql, {"wanted": as_set(list(emails)), "most": MOST_CLICKED}):
        found[email].append(url)
    return found


def iso_time(at: int | None) -> str | None:
    """A time as ISO 8601, UTC, or None."""
    if at is None:
        return None
    return datetime.fromtimestamp(at / 1000, timezone.utc).isoformat(timespec="milliseconds")[:23] + "Z"


# == Spool =============================================================================================
# Hits on their way: a worker appends lines to its own segment; a drain moves them into the database, exactly once.

SEGMENT = re.compile(r"[0-9]{13}-[0-9]+-[0-9a-f]{8,}(-emails|-ingest|-nginx)?\.jsonl")
SLOT = re.compile(r"[0-9]{7}\.jsonl")  # what nginx logs, where it answers pixels
SLOT_SECONDS = 15  # between two looks at those, by who drains again and again
SLOT_GROWS_SECONDS = 60  # after the look: nginx may be about to write a line into it
MAX_HIT_LINE = 16_384  # bytes with the newline; what we write
MAX_PURPOSE = 20  # characters of that header, which anybody can write: "prefetch;prerender" has 18
MAX_READ_LINE = 65_536  # bytes; what we read before we skip to the next newline
SEGMENT_BYTES = 16 << 20
SEGMENT_SECONDS = 3600
RETRY_SECONDS = 1.0  # between two tries to open a segment while none can be written
DRAIN_BATCH = 4_000  # lines a transaction, at most: enough for one fsync; more would cost little less each
DRAIN_SECONDS = 0.25  # that a transaction should take, at most: meanwhile nobody else writes, and pages wait
TRIPS = 6  # to the database and back, that one needs at least
MOST_CHOICES = 50  # of recipients, that a transaction does
DRAIN_EVENTS = 30_000  # stored hits that it may read: judging those of long sessions anew takes that long
BACKLOG_BATCH = 50_000  # lines for the command `drain`, which has nobody to wait for it
POSITIONS_DAYS = 400  # that a position is remembered: then a spool of old counts nothing twice, wherever it comes from
EARLIEST, LATEST = 946_684_800.0, 4_102_444_800.0  # the years 2000 and 2100, in seconds: another time is no time


def now_ms() -> int:
    """The time, in milliseconds since 1970, UTC."""
    return time.time_ns() // 1_000_000


def log(message: str, **about: object) -> None:
    """One line to stdout. Never give it a dashboard id, an address or a target."""
    words = " ".join(f"{name}={value}" for name, value in about.items())
    line = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} [{os.getpid()}] {message} {words}".rstrip()
    _print(line.replace("\n", "\\n"), sys.stdout)


def _print(line: str, stream: TextIO) -> None:
    """One line, in one write; a log that can't be written must not keep a reader from an answer."""
    with contextlib.suppress(OSError):
        stream.write(_ascii(line) + "\n")
        stream.flush()


def _ascii(text: str) -> str:
    """A text as any log can keep it: nobody knows in which encoding, and names of files may be in none."""
    return text.encode("ascii", "backslashreplace").decode()


# -- Lines

FIELD_LIMITS = {"key": MAX_KEY, "subject": 998, "recipient": 320, "campaign": MAX_CAMPAIGN}
TIMES_OF_EMAILS = ("sent_at", "delivered_at")  # in milliseconds; where the sender said so
TEXT_FIELDS = ("method", "host", "uri", "ip", "ua", "answer", "purpose", "why")
HIT_TEXTS, EMAIL_TEXTS = ("id", *TEXT_FIELDS), ("id", "mail_id", "key", *SAID_OF_EMAILS)
_write_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_read_json = json.JSONDecoder().raw_decode
# Nine of ten lines: the path of a pixel in which nothing is encoded. What this finds in it, recognise does.
_read_pixel_uri = re.compile(PIXEL_PATH.replace(".", r"\.").format(mail_id="([^/%?]+)", key="([^/%?]+)")).fullmatch


def hit_line(fields_: dict[str, Any]) -> bytes:
    """One hit as the spool keeps it: a line of JSON."""
    return f"{_write_json(fields_)}\n".encode("utf-8", "backslashreplace")


def untracked_hit(mail_id: str, type_: int) -> dict[str, str]:
    """What is written of a hit that is not to be tracked in the place of who made it, and for which email."""
    way = f"pixel/{UNTRACKED_KEY}.gif" if type_ == OPEN else f"click/{UNTRACKED_KEY}?url={UNTRACKED_KEY}"
    return {"gpc": "1", "uri": f"/{quote(mail_id, safe='')}/{way}", "ip": "", "ua": ""}


def email_line(mail_id: str, registration: Registration, at: int) -> bytes:
    """A registration as the spool keeps it: a line of JSON of its own kind."""
    about = {"kind": "email", "id": secrets.token_hex(12), "t": at / 1000, "mail_id": mail_id, "key": registration.key}
    said = {name: getattr(registration, name) for name in (*SAID_OF_EMAILS, "links", *TIMES_OF_EMAILS)}
    return hit_line(about | {name: value for name, value in said.items() if value is not None})


def read_object(line: bytes) -> dict[str, Any]:
    """Read a line of JSON that holds one object; one without an id gets its own. Raises BadInput."""
    text = line.decode("utf-8", "surrogateescape").strip(" \t\r\n")  # what JSON takes for white space
    try:
        raw, end = _read_json(text)
        if end != len(text) or not isinstance(raw, dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise BadInput("expected one JSON object") from None
    if raw.get("id", "") == "":
        raw["id"] = hashlib.sha256(line.strip()).hexdigest()
    return raw


def choice_line(mail_id: str, key: str, choice: str) -> bytes:
    """What a recipient chooses now, as the spool keeps it."""
    about = {"kind": "choice", "id": secrets.token_hex(12), "t": round(time.time(), 3)}
    return hit_line(about | {"mail_id": mail_id, "key": key, "choice": choice})


def parse_line(line: bytes) -> Line:
    """Read a line of the spool. Unknown fields are ignored; raises BadInput if it is of no kind that is known."""
    raw = read_object(line)
    said_at: Any = raw.get("t")
    undated = type(said_at) in (float, int) and not EARLIEST < said_at < LATEST  # as by a clock at boot
    at = now_ms() if undated else read_time(said_at)
    if raw.get("kind") == "email":
        return _spooled_email(raw, UNDATED if undated else at)
    if raw.get("kind") == "choice":
        id_, mail_id, key, choice = _texts(raw, ("id", "mail_id", "key", "choice"))
        if not is_key(key) or choice not in CHOICES:
            raise BadInput(f"choice: expected {' or '.join(CHOICES)}, and the key of an email")
        return Choice(id_, mail_id, key, CHOICES[choice], at)
    id_, method, host, uri, address, agent, answer, purpose, why = _texts(raw, HIT_TEXTS)
    if pixel := _read_pixel_uri(uri):
        (mail_id, key), is_open, url, query = pixel.groups(), True, None, ""
    else:
        segments, query = split_target(uri)
        asked = recognise(segments, query)
        if asked is None:
            raise BadInput("uri: expected a pixel or a click")
        is_open, mail_id, key, url = asked
        if url is None and not is_open and answer in ("302", "named", "hidden"):
            raise BadInput("uri: expected a link with a target")
    return Hit(  # by names it would take twice the time
        id_,
        at,
        OPEN if is_open else CLICK,
        method or "GET",
        mail_id,
        key,
        url and url.strip(" ")[:MAX_TARGET],
        host_name(host),
        address[:45],
        agent[:MAX_AGENT],
        purpose[:MAX_PURPOSE],
        answer,
        why,
        campaign_of(query) if query else "",
        raw.get("own") is True or key.startswith(TEST_KEY),
        judgement_of("unconfirmed", "undated") if undated else None,
        not is_open and len(segments) > 3,  # with a signature and a target
        "1" in (raw.get("gpc"), raw.get("dnt")),
    )


def _spooled_email(raw: dict[str, Any], at: int) -> SpooledEmail:
    id_, mail_id, key, *texts = _texts(raw, EMAIL_TEXTS)
    if not is_key(key):
        raise BadInput("key: expected the key of an email")
    subject, recipient, campaign = (
        text[: FIELD_LIMITS[name]] if name in raw else None for name, text in zip(SAID_OF_EMAILS, texts, strict=True)
    )
    links = raw.get("links")
    links = links if type(links) is int and 0 <= links <= MAX_WRAPPED else None
    sent_at, delivered_at = (raw[name] if type(raw.get(name)) is int else None for name in TIMES_OF_EMAILS)
    said = Registration(key, subject, recipient, campaign, sent_at, delivered_at, links, at)
    return SpooledEmail(id_, mail_id, said)


def read_time(value: Any) -> int:
    """Milliseconds since 1970, of seconds. Raises BadInput."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]+(\.[0-9]+)?", value):
        value = float(value)  # nginx can only write its $msec as text where it writes JSON strings
    if type(value) in (float, int) and EARLIEST < value < LATEST:
        return int(value * 1000 + 0.5)
    raise BadInput("t: expected seconds since 1970")


def _texts(raw: dict[str, Any], names: tuple[str, ...]) -> Sequence[str]:
    """The texts of fields, in what UTF-8 can spell and without NUL; "" where one is missing. Raises BadInput."""
    texts = [raw.get(name, "") for name in names]
    try:
        whole = "".join(texts)
    except TypeError:
        wrong = next(name for name, text in zip(names, texts, strict=True) if not isinstance(text, str))
        raise BadInput(f"{wrong}: expected text") from None
    if whole.isascii() and "\0" not in whole:
        return texts  # as in nearly all lines
    return [_mended(text) for text in texts]


def _mended(text: str) -> str:
    try:
        data = text.encode("utf-8", "surrogateescape")  # bytes that were no UTF-8
    except UnicodeEncodeError:
        data = text.encode("utf-8", "backslashreplace")  # lone surrogates, which JSON can spell and UTF-8 can't
    return data.decode("utf-8", "backslashreplace").replace("\0", "\\x00")  # a NUL ends a text in other programs


@lru_cache(maxsize=256)
def host_name(host: str) -> str:
    """The host of a Host header: lower case, without port and final dot."""
    return re.sub(":[0-9]*$", "", host.strip().lower()).rstrip(".")


# -- Writing


class Spool:
    """The writing end: appends hits to a segment of this process's own."""

    def __init__(self, folder: str, kind: str = "") -> None:
        self.folder = folder
        self.failing = False
        self._kind = kind  # "-emails" for registrations, which are drained first
        self._fd, self._pid, self._size = -1, 0, 0
        self._opened = self._looked_at = self._retry_at = 0.0
        self._path = ""
        self._mutex = threading.Lock()

    def append(self, line: bytes) -> bool:
        """Write one hit; where that is impossible, print it for `ingest` and return False."""
        with self._mutex:
            written = self._write(line)
            self.failing = not written
        if not written:
            _print("unspooled " + json.dumps(json.loads(line), separators=(",", ":")), sys.stderr)
        return written

    def works(self) -> bool:
        """Whether hits can be written; tried with an empty line, where the last one could not."""
        with self._mutex:
            self.failing = self.failing and not self._write(b"\n")
            return not self.failing

    def _write(self, line: bytes) -> bool:
        now = time.monotonic()
        if self._pid != os.getpid() or self._size >= SEGMENT_BYTES or now - self._opened >= SEGMENT_SECONDS:
            self.close()
        if self._fd >= 0 and now - self._looked_at >= 1:
            self._looked_at = now  # a folder that was moved away takes hits to where nobody reads
            if file_id(self._path) != file_id(self._fd):
                self.close()
        if self._fd < 0 and (now < self._retry_at or not self._open(now)):
            return False
        with contextlib.suppress(OSError):
            # A segment somebody deleted still takes writes, which nobody will ever read.
            if os.write(self._fd, line) == len(line) and os.fstat(self._fd).st_nlink:
                self._size += len(line)
                return True
        self.close()  # its end may be torn: never write behind that
        self._retry_at = now + RETRY_SECONDS
        return False

    def _open(self, now: float) -> bool:
        """Open a segment: locked before it has a name that the drain looks at, or the drain would call it finished."""
        born = os.path.join(self.folder, f".new-{secrets.token_hex(8)}")
        path = os.path.join(self.folder, f"{now_ms():013d}-{os.getpid()}-{secrets.token_hex(12)}{self._kind}.jsonl")
        fd = -1
        try:
            fd = os.open(born, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o640)
            fcntl.flock(fd, fcntl.LOCK_SH)
            os.rename(born, path)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            with contextlib.suppress(OSError):
                os.unlink(born)
            self._retry_at = now + RETRY_SECONDS
            if not self.failing:
                log("the spool can't be written", folder=self.folder, error=error.strerror)
            return False
        self._fd, self._path, self._pid, self._size = fd, path, os.getpid(), 0
        self._opened = self._looked_at = now
        return True

    def close(self) -> None:
        """Finish the segment; the next hit opens another. After a fork this closes only the copy of the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def keep_lines(database: Database, connection: sqlite3.Connection, kind: str, lines: bytes) -> None:
    """Append lines that are recorded in this transaction to a kept segment, for who restores an older database.

    The position behind them is committed with them, so this database never reads them. Whoever writes holds the lock, so
    all lines of a kind go to one segment, of this folder (in a copy of it another server would go on), which is the newest
    of its kind: whoever reads them one segment after the other reads them in their order.
    """
    now, kept = now_ms(), os.path.join(database.spool, "kept")
    found = segments_in(kept)
    ours = f"-{os.stat(kept).st_ino}-"
    name = max((each for each in found if kind in each and int(each[:13]) <= now), default="0" * 13)
    is_old = int(name[:13]) < now - SEGMENT_SECONDS * 1000
    if is_old or ours not in name or position_of(connection, name) != found[name].st_size:
        name = f"{now:013d}{ours}{secrets.token_hex(12)}{kind}.jsonl"
    set_position(connection, name, append_to(os.path.join(kept, name), lines), now)


def tell_emails(database: Database, connection: sqlite3.Connection, tenant: Tenant, said: list[Registration]) -> int:
    """Register emails, in the database and in a segment that is kept; returns how many are new. Raises Busy."""
    await_replay(database, connection)
    now = now_ms()
    lines = (email_line(tenant.mail_id, each, now) for each in said)
    keep_lines(database, connection, "-emails", b"".join(lines))
    return register_emails(connection, tenant.number, said, now)


# -- Drain

# What a line may cause, in contrast to what the machine does (a full disk, a lock, too little memory).
LINE_FAULTS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError),
    *(sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError, sqlite3.ProgrammingError),
)


def segments_in(folder: str) -> dict[str, os.stat_result]:
    """The segments in a folder, oldest first: files, whatever else has such a name."""
    found = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if SEGMENT.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                        found[entry.name] = entry.stat()
    except OSError as error:
        raise StoreError(f"can't read the spool {folder}: {error.strerror}") from error
    return dict(sorted(found.items()))


class Segment(NamedTuple):
    """A segment of which not all is in the database, or whose writer may be gone."""

    name: str
    position: int
    size: int  # how much of it is to be drained now
    changed_at: int
    kept: bool  # in spool/kept: its writer is gone
    finished: bool = False  # whether we know so


def waiting_segments(database: Database, connection: sqlite3.Connection, troubles: list[str]) -> list[Segment]:
    """What there is to drain, the oldest first; what can't be told goes to troubles."""
    found = {(name, False): about for name, about in segments_in(database.spool).items()}
    kept = os.path.join(database.spool, "kept")
    changed_at = os.stat(kept).st_mtime_ns if os.path.isdir(kept) else -1
    since = 0  # then and later, each position is remembered
    if changed_at != database.kept_seen:  # else nothing is new there, and only a restored database knows less
        found |= {(name, True): about for name, about in segments_in(kept).items()}
        since = int(marks_of(connection).get("positions_since", 0))
    positions = positions_of(connection, [name for name, _ in found])
    waiting = []
    for (name, is_kept), about in found.items():
        position, size = positions.get(name, 0), about.st_size
        if is_kept and position < size and name not in positions and int(name[:13]) <= since:
            troubles.append(f"segment kept/{name}: too old to know whether it was counted; move it away")
        elif not is_kept or position < size:
            waiting.append(Segment(name, position, size, about.st_mtime_ns, is_kept))
    unsettled = time.time_ns() - changed_at < 1_000_000_000  # what changes in the same moment leaves the same time
    database.kept_seen = -1 if troubles or any(each.kept for each in waiting) or unsettled else changed_at
    return waiting


def take_slots(spool: str, pause: int) -> None:
    """Give what nginx has logged a name in the spool, before a byte is read; nginx then begins another file."""
    folder = os.path.join(spool, "nginx")
    if not os.path.isdir(folder):
        return
    now = now_ms()
    newest = max((int(name[:13]) for name in segments_in(spool) if "-nginx" in name), default=0)
    if abs(now - newest) >= pause * 1000:  # who drains again and again would make a segment each time
        for slot in filter(SLOT.fullmatch, os.listdir(folder)):
            name = f"{now:013d}-0-{secrets.token_hex(12)}-nginx.jsonl"
            with contextlib.suppress(FileNotFoundError):  # another drain was quicker
                os.rename(os.path.join(folder, slot), os.path.join(spool, name))


def await_replay(database: Database, connection: sqlite3.Connection) -> None:
    """Raises Busy while a restored database has not read all that was said of emails: later words come after those."""
    if any(each.kept and "-emails" in each.name for each in waiting_segments(database, connection, [])):
        raise Busy("what was said of emails since the backup is being read")


def drain(
    database: Database,
    *,
    batch: int = DRAIN_BATCH,
    seconds: float = DRAIN_SECONDS,
    wait: bool = True,
    until: float = math.inf,
) -> Drain:
    """Move all hits that are complete in the spool when this begins into the database.

    A transaction has up to `batch` lines, and fewer where they take longer than `seconds`; stops at `until`
    (time.monotonic) with OutOfTime. One segment's trouble doesn't stop the others. Raises Busy, if wait is False and somebody
    else writes, and StoreError where there is no database.
    """
    work = Drain(database, batch, seconds, wait, until)
    take_slots(database.spool, SLOT_SECONDS if until < math.inf else 0)
    with database.reading(wait=wait) as connection:
        began = time.monotonic()
        differs = told_change(database.folder) != marks_of(connection).get("tenants")
        work.trip = time.monotonic() - began
        waiting = waiting_segments(database, connection, work.troubles)
    if differs:
        with changing_tenants(database, elsewhere=database.is_shared):
            if not database.is_shared:
                log("tenants.json differed from the database; it is written anew")
    collects = gc.isenabled()
    gc.disable()  # thousands of hits come and go, none of them in a cycle; to look for such takes a twentieth of the time
    try:
        for each in waiting:
            while "-emails" in each.name and work.drain_some(each):
                pass  # first and whole, since hits may be theirs
        work.take_turns([each for each in waiting if "-emails" not in each.name])
    finally:
        database.paces = work.paces
        if collects:
            gc.enable()
    return work


def _keep(spool: str, name: str) -> None:
    """Move a segment that is drained to its end to spool/kept."""
    kept = os.path.join(spool, "kept", name)
    if os.path.lexists(kept):
        raise FileExistsError(errno.EEXIST, "another segment of its name is in spool/kept; move one away")
    os.rename(os.path.join(spool, name), kept)  # not by a link, since nginx's files are not ours
    sync_folder(os.path.dirname(kept))
    sync_folder(spool)


@dataclass(slots=True)
class Drain:
    """How a drain is to go about it, and what came of it."""

    database: Database
    batch: int
    seconds: float
    wait: bool
    until: float
    paces: dict[str, int] = field(default_factory=dict)  # lines that a transaction of each segment takes
    trip: float = 0.0  # seconds to the database and back
    synced: set[tuple[str, int]] = field(default_factory=set)  # segments up to their goals
    share: float = 0.0  # of the stored hits that the last transaction might read
    hits: int = 0
    emails: int = 0
    rejected: int = 0
    troubles: list[str] = field(default_factory=list)

    def take_turns(self, waiting: list[Segment]) -> None:
        """Drain segments, a transaction at a time: half of the time goes to those that were written to last, where the
        hits of now are, one after the other; half to the one that has waited longest."""
        waiting.sort(key=lambda each: each.changed_at)
        while waiting:
            newest = self.database.ahead <= 0
            each, began = waiting.pop(-1 if newest else 0), time.monotonic()
            if self.drain_some(each):
                waiting.insert(1 if newest else 0, each)
            took = time.monotonic() - began
            self.database.ahead += took if newest else -took

    def drain_some(self, segment: Segment) -> bool:
        """Record some lines of a segment, up to its end as found, or as it is once its writer is gone; is there more?"""
        name, spool = segment.name, self.database.spool
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            with open(os.open(os.path.join(spool, "kept" * segment.kept, name), flags), "rb", READ_BYTES) as file:
                grows = "-nginx" in name and now_ms() - int(name[:13]) < SLOT_GROWS_SECONDS * 1000
                # Lines are only written to a kept one by who holds the lock; nobody is told so while we lock the other.
                if (segment.kept or (not grows and take_lock(file.fileno()))) and not self.database.is_foreign:
                    # Now the end, and not before: a hit could have been written in between.
                    segment = segment._replace(size=os.fstat(file.fileno()).st_size, finished=True)
                more = segment.position != segment.size  # else nothing is new, and nothing to lock
                if more and time.monotonic() > self.until:
                    raise OutOfTime("not all hits could be drained in time")
                more = more and self._drain_batch(segment, file)
                if segment.finished and not (more or segment.kept):
                    _keep(spool, name)
                return more
        except FileNotFoundError:
            pass  # another drain finished it
        except Busy:
            raise
        except Exception as error:
            told = f"segment {name}: {getattr(error, 'strerror', None) or repr(error)}"
            if segment.kept and "-emails" in name:
                told += "; nothing can be registered until it is read, or moved out of spool/kept"
            self.troubles.append(told)
        return False

    def _drain_batch(self, segment: Segment, file: BinaryIO) -> bool:
        """Record as many lines as fit into the time of a transaction; puts one aside that breaks the program."""
        # At first few, since nobody knows yet how long they take.
        lines = self.paces.get(segment.name) or self.database.paces.get(segment.name) or max(self.batch // 8, 1)
        began = time.monotonic()
        try:
            more = self.record_some(segment, file, lines)
        except (TooMuch, *LINE_FAULTS) as error:
            if lines > 1:  # down to the one that it is
                self.paces[segment.name] = lines // 2
                if isinstance(error, TooMuch):
                    self.batch = lines // 2  # it would be as much again
                return True
            about = f"{type(error).__name__}: {error}"
            log("a line of the spool can't be counted and goes to spool/rejected", error=about)
            more = self.record_some(segment, file, lines, reject=True)
        took = time.monotonic() - began
        own = max(took - TRIPS * self.trip, 0.001)  # the way takes its time, however few they are
        fit = round(lines * min(self.seconds / own, 0.9 / max(self.share, 0.1), 4.0 if more else 1.0))
        least = 500 if self.database.is_shared else 1  # hits of many tenants need more round trips
        self.paces[segment.name] = min(max(fit, lines // 2, least), self.batch)
        time.sleep(took / 10 if more else 0)  # for others to write
        return more

    def record_some(self, segment: Segment, file: BinaryIO, lines: int, *, reject: bool = False) -> bool:
        """Record so many lines in one transaction, or put them aside; returns whether there is more to be drained now."""
        good: list[Line] = []
        taken = rejected = 0
        # A position must never be ahead of what a power failure leaves of the segment; nobody has to wait for that.
        if (segment.name, segment.size) not in self.synced:
            os.fdatasync(file.fileno())
            self.synced.add((segment.name, segment.size))
        with self.database.transaction(wait=self.wait) as connection, pipelined(connection):
            begin = position = position_of(connection, segment.name)
            now, about = now_ms(), os.fstat(file.fileno())
            if position > max(segment.size, about.st_size):
                reached = f"drained to {position} but only {about.st_size} bytes long; going on at its end"
                self.troubles.append(f"segment {segment.name}: {reached}")
                set_position(connection, segment.name, about.st_size, now)
                return False
            if position >= segment.size or not about.st_nlink:
                return False  # another drain was here while we waited for the lock
            for line, end in islice(read_lines(file, position, segment.size, segment.finished), lines):
                try:
                    if reject or not line.endswith(b"\n"):
                        raise BadInput("torn, or longer than any of ours")
                    if not line.isspace():
                        good.append(parse_line(line))
                except BadInput:
                    _keep_rejected(self.database.spool, f"{segment.name}-{position:010d}", line)
                    rejected += 1
                taken, position = taken + 1, end
            if not taken:
                return False
            if "-ingest" in segment.name:
                good = unseen_lines(connection, good)
            room = DRAIN_EVENTS if self.seconds < math.inf and len(good) > 1 else ALL_EVENTS
            if len(good) > 1 and sum(isinstance(line, Choice) for line in good) > MOST_CHOICES:
                raise TooMuch("many recipients' choices")
            _, read = _record(self.database, connection, good, now, room)
            self.share = read / room
            set_position(connection, segment.name, position, now, begin)
            connection.commit()  # in the pipeline
        self.hits += (hits := sum(isinstance(line, Hit) for line in good))
        self.emails += len(good) - hits
        self.rejected += rejected
        return taken == lines and position < segment.size


def read_lines(file: BinaryIO, position: int, goal: int, finished: bool) -> Iterator[tuple[bytes, int]]:
    """The lines from a position to a goal, with their newlines if they have such, and the positions after them."""
    file.seek(position)
    while position < goal:
        line = rest = file.readline(MAX_READ_LINE)
        position += len(rest)
        while rest and not rest.endswith(b"\n"):  # longer than any of ours: its beginning will do
            rest = file.readline(READ_BYTES)
            position += len(rest)
        if not line or not (rest or finished):
            return  # the writer may be about to write the rest
        yield line, position


def unseen_lines(connection: sqlite3.Connection, lines: Iterable[Line]) -> list[Line]:
    """Those of lines that come from a log whose ids never came before; each comes once, however often it is given."""
    by_id = {line.id: line for line in lines}
    new = new_ids(connection, by_id)
    return [line for id_, line in by_id.items() if id_ in new]


def _keep_rejected(spool: str, name: str, line: bytes) -> None:
    """Put a line that can't be read where a person finds it; its name makes a retry write the same file."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        with open(os.open(os.path.join(spool, "rejected", name), flags, 0o640), "wb") as kept:
            kept.write(line.removesuffix(b"\n") + b"\n")
    except OSError:
        # The drain must go on, whatever stands in its way.
        _print(f"rejected {name} {line[:MAX_HIT_LINE]!r}", sys.stderr)


def spellings(words: Iterable[str]) -> set[bytes]:
    """Words as files may have them: as they are, folded, escaped in JSON, percent-encoded, and anywhere in base64."""
    found = set()
    for text in {each for word in words for each in (word, word.lower(), fold_text(word))}:
        raw, quoted = text.encode(), quote(text, safe="").encode()
        found |= {raw, quoted, quoted.lower(), json.dumps(text)[1:-1].encode()}
        for shift in range(3):  # what comes before it fills a part of the first letter, what follows one of the last
            coded = base64.b64encode(bytes(shift) + raw)[-(-shift * 8 // 6) : (shift + len(raw)) * 8 // 6]
            found |= {coded, coded.translate(bytes.maketrans(b"+/", b"-_"))}
    return found


def erase_rejected(spool: str, texts: Collection[bytes]) -> None:
    """Overwrite and remove the lines that could not be read and hold any of some texts."""
    folder = os.path.join(spool, "rejected")
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError), open(os.path.join(folder, name), "r+b") as file:
            line = file.read()
            if any(text in each for text in texts for each in (line, line.lower())):
                os.pwrite(file.fileno(), bytes(len(line)), 0)
                os.fsync(file.fileno())
                os.unlink(file.name)


def _record(
    database: Database, connection: sqlite3.Connection, lines: Sequence[Line], now: int, room: int = ALL_EVENTS
) -> tuple[Counter[str], int]:
    """Do what recipients chose, which holds from its own time on; then record the other lines, as record_lines."""
    if choices := [*(line for line in lines if isinstance(line, Choice)), *told_late(connection, lines)]:
        erase_rejected(database.spool, spellings(choose(database.folder, connection, choices)))
    return record_lines(connection, lines, now, room)


def ingest(database: Database, lines: Iterable[bytes]) -> tuple[Counter[str], list[str]]:
    """Record a log's `unspooled {…}`, each id once; how many were counted, known or dropped, and what is unreadable."""
    outcome: Counter[str] = Counter()
    troubles = []
    numbered = enumerate(lines, 1)
    while some := [*islice(numbered, DRAIN_BATCH)]:
        raw: dict[str, bytes] = {}
        batch = []
        for number, line in some:
            _, found, rest = line.partition(b"unspooled {")
            try:
                if found:
                    batch.append(parse_line(b"{" + rest))
                    raw[batch[-1].id] = b"{" + rest.rstrip() + b"\n"
            except BadInput as error:
                troubles.append(f"line {number}: {error}")
        with database.transaction() as connection:
            new = unseen_lines(connection, batch)
            if new:
                keep_lines(database, connection, "-ingest", b"".join(raw[line.id] for line in new))
            dropped, _ = _record(database, connection, new, now_ms())
        counted = len(new) - dropped.total()
        outcome += dropped + Counter(counted=counted, known=len(batch) - len(new))
    return outcome, troubles


# What state.json says: when it was written, what troubles the drain, what tidying cut, and what there is of each.
NO_NEWS = {"at": 0.0, "trouble": "", "cut": "", "waiting": None, "rejected": None, "drained": 0}
NO_NEWS |= {"limits": (), "machines": ()}


class Drainer(threading.Thread):
    """A daemon thread that drains while its worker serves: in one worker, while that lives, which alone needs the memory.

    It holds `drain.lock`, and each time writes into state.json how things are, for all who are asked about it. `drain
    --follow` does it in a process of its own: each time it touches `drain.follow`, and workers let it go before.
    """

    FOLLOW_SECONDS = 5.0  # after which workers drain that see no more of `drain --follow`
    WAKE_SECONDS = 0.5
    TURN_SECONDS = 1.0  # after which it looks anew what there is to drain
    TIDY_SECONDS = 60.0
    CHORE_SECONDS = 0.25
    TELL_SECONDS = 1.5
    LONGEST_BUSY = 60.0

    def __init__(
        self,
        database: Database,
        days: int = 3,
        megabytes: int = 2000,
        *,
        follows: bool = False,
        chores: Callable[[Database], Iterator[None]] = lambda _: iter(()),
    ) -> None:
        super().__init__(name="drain", daemon=True)
        self._chores = chores  # what is begun once a minute, and done some of it at a time
        self._chore: Iterator[None] | None = None
        self._follows = follows
        self.database = database
        self._keep = days, megabytes
        self._state: dict[str, Any] = {**NO_NEWS, "drained": read_state(database.folder)["drained"]}
        self._told_at = -math.inf
        self._tidy_at = -math.inf
        self._clock = math.inf  # how far the clock is ahead of the time since boot
        self._drained_at = time.monotonic()
        self._lock = -1
        self._ended = threading.Event()

    def stop(self) -> None:
        """Stop after the transaction under way."""
        self._ended.set()
        self.join(timeout=10)
        self._let_go()

    def run(self) -> None:
        """Drain until somebody calls stop."""
        while not self._ended.is_set():
            with contextlib.suppress(OSError):  # a full disk must not end the thread: it is tried again
                if self._is_ours():
                    self.turn()
            self._ended.wait(0.1 if (self._state["waiting"] or 0) > DRAIN_BATCH else self.WAKE_SECONDS)

    def turn(self) -> None:
        """Tidy where it is time, drain for a second, and write down how things are. Raises OSError if that can't be."""
        state, troubles = self._state, []
        try:
            self._tidy()
            with contextlib.suppress(OutOfTime):  # the next turn goes on
                troubles = drain(self.database, until=time.monotonic() + self.TURN_SECONDS).troubles
            self._drained_at = time.monotonic()
            for _ in self._chore or ():
                if time.monotonic() > self._drained_at + self.CHORE_SECONDS:
                    break
            else:
                self._chore = None
        except Busy as error:  # others write
            if time.monotonic() - self._drained_at > self.LONGEST_BUSY:
                troubles = [f"nothing could be counted for over a minute: {error}"]
        except StoreError as error:
            troubles, state["waiting"] = [str(error)], None
        except Exception as error:  # the thread must outlive whatever happens, and says what it was
            troubles = [f"{type(error).__name__}: {error}"]
        with contextlib.suppress(StoreError, OSError), self.database.reading(wait=False) as connection:
            state["waiting"] = waiting_hits(self.database, connection)
            state["limits"] = limits_met(connection, now_ms() // DAY_MS)
            # A monitor takes a counter that falls for one that began anew, and newest hits may be removed.
            state["drained"] = max(state["drained"], hits_so_far(connection))
        if self.database.is_shared and not troubles and time.monotonic() - self._told_at > self.TELL_SECONDS:
            with contextlib.suppress(StoreError):
                state["machines"], clone = tell_of_machine(self.database, state["waiting"], now_ms())
                troubles += [clone] if clone else []
                self._told_at = -math.inf if clone else time.monotonic()
        trouble = _ascii("; ".join(troubles))
        if trouble != state["trouble"]:
            log(f"drain: {trouble or 'goes on'}")
        state |= {"at": time.time(), "trouble": trouble, "rejected": 0}
        with contextlib.suppress(OSError):
            state["rejected"] = len(os.listdir(os.path.join(self.database.folder, "spool", "rejected")))
        write_small_file(os.path.join(self.database.folder, "state.json"), json.dumps(state), 0o640, sync=False)

    def _tidy(self) -> None:
        """Tidy the spool once a minute, but not where the clock has just leapt: it may leap back."""
        if time.monotonic() < self._tidy_at:
            return
        clock = time.time() - time.monotonic()
        leapt = abs(clock - self._clock) > DAY_MS / 1000
        with contextlib.suppress(Busy):  # a reader is in the way: the next turn tries again
            self._state["cut"] = tidy_spool(self.database, *self._keep, delete=not leapt)
            self._clock, self._tidy_at = clock, time.monotonic() + self.TIDY_SECONDS
            if not leapt:
                self._chore = self._chore or self._chores(self.database)

    def _is_ours(self) -> bool:
        """Whether this one is to drain; asked again and again, so that another takes over from a dead one."""
        lock, follower = (os.path.join(self.database.folder, f"drain.{end}") for end in ("lock", "follow"))
        if self._follows:
            write_small_file(follower, "", 0o640, sync=False)
        elif os.path.exists(follower) and time.time() - os.stat(follower).st_mtime < self.FOLLOW_SECONDS:
            self._let_go()
            return False
        if self._lock < 0:
            self._lock = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        return take_lock(self._lock)

    def _let_go(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1


def drain_for_reading(database: Database, seconds: float = 0.1) -> bool:
    """Drain what is in the spool now, before numbers are read; False if not all of it could be counted."""
    began = time.monotonic()
    while time.monotonic() < began + seconds / 5:  # and no longer, where others write: they are at it
        try:
            return not drain(database, wait=False, until=began + seconds).troubles
        except Busy:
            time.sleep(0.01)
    return False


# -- What waits, and what is kept


def waiting_hits(database: Database, connection: sqlite3.Connection) -> int:
    """About how many hits are not in the database yet: by the length of the first ones of the longest that waits."""
    waiting = waiting_segments(database, connection, [])
    if not waiting or not (size := sum(max(each.size - each.position, 0) for each in waiting)):
        return 0
    last = max(waiting, key=lambda each: each.size - each.position)
    sample = b""
    path = os.path.join(database.spool, "kept" * last.kept, last.name)
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(last.position)
        sample = file.read(MAX_READ_LINE)
    return -(-size * sample.count(b"\n") // len(sample)) if b"\n" in sample else 1


def missing_hours(database: Database, since: int) -> list[tuple[int, int]]:
    """Each time of an hour or more since a time of which neither spool/ nor spool/kept has a segment."""
    gaps, end = [], since
    found = segments_in(database.spool) | segments_in(os.path.join(database.spool, "kept"))
    spans = sorted((int(name[:13]), about.st_mtime_ns // 1_000_000) for name, about in found.items())
    for begin, last in (*spans, (now_ms(), 0)):
        if begin - end >= SEGMENT_SECONDS * 1000:
            gaps.append((end, begin))
        end = max(begin, last, end)
    return gaps


def position_faults(database: Database, connection: sqlite3.Connection) -> list[str]:
    """Segments that are shorter than what was drained of them."""
    found = segments_in(database.spool) | segments_in(os.path.join(database.spool, "kept"))
    return [
        f"positions: {name} is drained to {position} but only {found[name].st_size} bytes long"
        for name, position in positions_of(connection, found).items()
        if found[name].st_size < position
    ]


BACKLOG = 100_000  # hits that wait: more than a drain leaves behind when all is well
LATEST_NEWS = 10.0  # seconds after which what is in state.json is old, and that is the news


def read_state(folder: str) -> dict[str, Any]:
    """How things are, as the worker wrote that drains: what troubles it, what was cut, waits and was rejected."""
    state: dict[str, Any] = dict(NO_NEWS)
    with contextlib.suppress(ValueError, TypeError):
        state |= json.loads(read_small_file(folder, "state.json") or "{}")
    if not abs(time.time() - state["at"]) <= LATEST_NEWS:
        state |= {"trouble": "nobody has drained for some time; expected a worker that does", "waiting": None}
    return state


def tidy_spool(database: Database, days: int, megabytes: int, *, delete: bool = True) -> str:
    """Delete what is kept too long or takes too much room, but nothing that only the spool has; says what was cut."""
    spool, kept = database.spool, os.path.join(database.spool, "kept")
    now, cut = now_ms(), ""
    # One is deleted only if all of it is in the file of the database itself, not in a WAL that can be lost.
    with database.checkpointed() as connection:
        found = segments_in(kept)
        positions = positions_of(connection, found)
        room = (megabytes << 20) - sum(about.st_size for about in found.values())
        for name, about in found.items():
            age = now - about.st_mtime_ns // 1_000_000
            if not delete or positions.get(name) != about.st_size or (age <= days * DAY_MS and room >= 0):
                continue
            os.unlink(os.path.join(kept, name))
            room += about.st_size
            if age <= days * DAY_MS:
                cut = f"KEEP_SPOOL_MB={megabytes} keeps hits for {age // 3_600_000} hours only, not {days} days"
    if not delete:
        return cut
    with database.transaction(wait=False) as connection:
        days = 1000 if database.is_shared else POSITIONS_DAYS  # a machine that was away for long knows them still
        forget_positions(connection, [*segments_in(spool), *segments_in(kept)], now - days * DAY_MS)
        sweep_changes(connection, now)
    for name in os.listdir(spool):
        path = os.path.join(spool, name)
        with contextlib.suppress(OSError):
            if name.startswith(".new-") and os.lstat(path).st_mtime < time.time() - DAY_MS / 1000:
                os.unlink(path)  # it never had a hit: those come after the rename
    return cut


# == Privacy ===========================================================================================
# What must not be stored any more goes from the database, the spool and what is restored; its numbers stay.

RETIRED_EVENTS = 400  # that a transaction removes, or looks at, as emails: 0.1 s, in which nobody else writes


def delete_emails(folder: str, connection: sqlite3.Connection, tenant: int, keys: Collection[str], now: int) -> int:
    """Remove emails, so that no hit of before and no restored backup makes them again; returns how many there were."""
    with Batch(connection, now) as changes:
        if found := changes.delete(tenant, keys):
            gone = {(hash_, DELETED): now for hash_ in gone_hashes(connection, tenant, keys)}
            remember_gone(connection, gone)
            write_gone(folder, gone)
    return found


def forget_gone(folder: str, connection: sqlite3.Connection) -> None:
    """Remove what is gone since this database was copied, or since a kill came between."""
    new = read_gone(folder, connection)
    remember_gone(connection, new)
    for tenant in list_tenants(connection) if new else ():
        sql = "select key, recipient from emails where tenant = ?"
        emails = dict(connection.execute(sql, (tenant.number,)).fetchall())
        words = gone_hashes(connection, tenant.number, {*emails, *map(as_person, emails.values())})
        for kind in (FORGOTTEN, DELETED):
            gone = {words[hash_] for hash_, each in new if each == kind and hash_ in words}
            keys = [key for key, address in emails.items() if key in gone or as_person(address) in gone]
            with Batch(connection, 0) as changes:
                changes.delete(tenant.number, keys, carries=kind == FORGOTTEN)


# -- What is stored, and how people are let go


def read_person(text: str) -> str:
    """Read the address of a recipient. Raises BadInput."""
    address = text.strip()
    if not 0 < len(address) <= FIELD_LIMITS["recipient"] or UNFIT.search(address):
        raise BadInput("address: expected a recipient's, such as ann@example.com")
    return address


def let_go(database: Database, tenant: int, people: Iterable[str], kind: str) -> Released:
    """Track people no more, or forget all emails to them but for their numbers: up to now, in what is restored too."""
    with database.transaction() as connection:
        await_replay(database, connection)
        released = release(connection, tenant, people, [kind], now_ms())
        write_gone(database.folder, released.gone)
    if kind == FORGOTTEN:
        erase_rejected(database.spool, spellings(released.spelt))
    return released


def stored_of_mail(connection: sqlite3.Connection, mail_id: str, key: str, days: int) -> dict[str, Any]:
    """What the database has of a mail, and of who got it, in the order in which the page for recipients says it."""
    facts: dict[str, Any] = {}
    sql = "select number, coalesce(retention_days, ?) from tenants where mail_id = ?"
    for tenant, kept in connection.execute(sql, (days, mail_id)).fetchall():
        asked = (Wanted(key=each, whole=True) for each in keys_of_person(connection, tenant, key)[0])
        emails = [email for each in asked for email in read_table(connection, tenant, EMAILS, each).named()]
        facts["said"] = any(email["recipient"] or email["subject"] for email in emails)
        sent = [each["sent_at"] for each in emails if each["sent_at"]]
        facts["sent"] = sent and (iso_time(min(sent)) or "")[:10]
        for type_ in ("opens", "clicks"):
            facts[type_] = sum(email[f"{type_}_{state}"] for email in emails for state in STATES.values())
        words = {key, *(as_person(email["recipient"] or key) for email in emails)}
        facts["untracked"] = untracked_among(connection, tenant, words)
        facts["days" if kept else "ever"] = (facts["opens"] or facts["clicks"]) and (kept or True)
    return facts


def stored_of_person(connection: sqlite3.Connection, tenant: int, address: str) -> dict[str, Any]:
    """All that the database has of a recipient."""
    emails = []
    for key in keys_of_person(connection, tenant, address)[0]:
        [email] = read_table(connection, tenant, EMAILS, Wanted(key=key, whole=True)).named()
        hits = read_table(connection, tenant, EVENTS, Wanted(key=key, whole=True)).named()
        emails.append(email | {"hits": hits})
    return {"address": address, "emails": emails}


def texts_with(connection: sqlite3.Connection, address: str) -> list[str]:
    """Texts of emails, and URLs, of whatever tenant, that have an address in them; or a longer one that ends with it."""
    sql = """
        select search || key from emails where search like :piece escape '\\' or lower(key) like :piece escape '\\'
        union all select url from urls where lower(url) like :piece escape '\\' limit 1000
    """
    piece = re.sub(r"([%_\\])", r"\\\1", fold_text(address))
    return [text for (text,) in connection.execute(sql, {"piece": f"%{piece}%"})]


# -- Files

# Nearly all lines, in a tenth of the time: a hit whose path has nothing encoded and names no campaign; our registrations.
_find_hit = re.compile(rb'"uri":"/([\w-]+)/(?:pixel/([\w.~+@=:-]+)\.gif|click/([\w.~+@=:-]+))[/"?]').search
_find_email = re.compile(rb'"mail_id":"([\w-]+)","key":"([^"\\]+)"(?:.*,"recipient":"([^"\\]*)")?').search


def _words_of(line: bytes) -> tuple[str, set[str]]:
    """Whose a line of the spool is: the tenant, and keys or an address, as what is gone is named."""
    if (hit := _find_hit(line)) and b"campaign" not in line:
        mail_id, words = hit[1].decode(), {key := (hit[2] or hit[3]).decode()}
        return mail_id, words | {as_person(key)} if "@" in key else words
    if (email := _find_email(line)) and b"\\" not in line:
        return email[1].decode(), {email[2].decode(), as_person((email[3] or b"").decode())}
    with contextlib.suppress(BadInput):
        found = parse_line(line)
        about = found.registration if isinstance(found, SpooledEmail) else found
        named = campaign_key(found.key, found.campaign) if isinstance(found, Hit) else about.key
        return found.mail_id, {about.key, named, as_person(getattr(about, "recipient", "") or about.key)}
    return "", set()


def _left_of(line: bytes, gone: Collection[tuple[str, int]]) -> bytes:
    """What stays of a line, in as many bytes, where some of whose it is is gone: of hits of who is not tracked, that they were."""
    try:
        found = parse_line(line)
    except BadInput:
        return line
    at = found.registration.at if isinstance(found, SpooledEmail) else found.at
    is_undated = isinstance(found, Hit) and found.fixed is not None
    kinds = {kind for kind, since in gone if (at >= since if kind == UNTRACKED else at <= since or is_undated)}
    if not kinds:
        return line
    new, text = b"", line.removesuffix(b"\n")
    if FORGOTTEN not in kinds and isinstance(found, Hit):
        about = {"id": found.id, "t": at / 1000, "answer": found.answer}
        new = hit_line(about | untracked_hit(found.mail_id, found.type))[:-1]
    return (new if len(new) <= len(text) else b"").ljust(len(text)) + line[len(text) :]


def _overwrite(path: str, lines: Mapping[int, bytes]) -> None:
    """Write over lines of a segment, by where they begin; a file of nginx's, which we may not write to, is replaced by a copy."""
    about, flags = os.stat(path), os.O_CLOEXEC | os.O_NOFOLLOW
    copy = os.path.join(os.path.dirname(path), f".new-{secrets.token_hex(8)}")
    try:
        fd = os.open(path, os.O_WRONLY | flags)
    except PermissionError:
        shutil.copyfile(path, copy)
        fd = os.open(copy, os.O_WRONLY | flags)
    try:
        for begin, line in lines.items():
            os.pwrite(fd, line, begin)  # as long as the one before, so that positions hold
        os.fsync(fd)
        os.utime(fd, ns=(about.st_atime_ns, about.st_mtime_ns))  # by which it is kept
    finally:
        os.close(fd)
    if os.path.exists(copy):
        os.rename(copy, path)
        sync_folder(os.path.dirname(path))


def _clean_segments(database: Database, found: Mapping[str, str]) -> Generator[None, None, bool]:
    """Take out of drained lines, by segments and their folders, what is gone, some at a time; whether none waits for nginx."""
    with database.reading() as connection:
        gone = defaultdict(list)
        for hash_, kind, at in connection.execute("select hash, kind, at from gone where kind <> ?", (DELETED,)):
            gone[hash_].append((kind, at))
        secret, tenants = stored_secret(connection, "instance") or "", list_tenants(connection)
        mail_ids = {id_: each.mail_id for each in tenants for id_ in (each.id, each.mail_id)}
        ignoring = {each.mail_id for each in tenants if each.ignore_gpc}
        positions = positions_of(connection, found)
    is_whole, kept = True, os.path.join(database.spool, "kept")
    for name, position in positions.items():
        path = os.path.join(found[name], name)
        path = path if os.path.exists(path) else os.path.join(kept, name)
        with contextlib.suppress(FileNotFoundError), open(path, "rb", READ_BYTES) as file:
            changed, begin = dict[int, bytes](), 0
            for n, (line, end) in enumerate(read_lines(file, 0, position, finished=True), 1):
                asks = b'"gpc":"1"' in line or b'"dnt":"1"' in line  # as nginx writes it, beside all else
                mail_id, words = _words_of(line) if gone or asks else ("", ())
                mail_id = mail_ids.get(mail_id, "")
                those = [each for word in words for each in gone.get(gone_hash(secret, mail_id, word), ())]
                those += [(UNTRACKED, 0)] * (asks and UNTRACKED_KEY not in words and mail_id not in ignoring)
                if those and (left := _left_of(line, those)) != line:
                    changed[begin] = left
                begin = end
                if n % 1000 == 0:
                    yield
            if changed and (os.access(path, os.W_OK) or found[name] == kept):
                _overwrite(path, changed)
            elif changed:
                is_whole = False
        yield
    return is_whole


def is_clean(database: Database, connection: sqlite3.Connection) -> tuple[bool, int]:
    """Whether this machine's files have nothing of who was forgotten; and when that was so, at least."""
    marks = marks_of(connection)
    cleaned, _, at = marks.get(f"cleaned:{read_small_file(database.spool, 'instance')}", " 0").partition(" ")
    return cleaned == marks.get("forgotten", ""), int(at)


def clean_files(database: Database) -> Iterator[None]:
    """Take out of this machine's files what they have of who was forgotten since it was last done, and of who is not tracked
    where a segment has been put aside since; some of it at a time."""
    began, instance, kept = now_ms(), read_small_file(database.spool, "instance"), os.path.join(database.spool, "kept")
    with database.reading() as connection:
        (done, since), forgotten = is_clean(database, connection), marks_of(connection).get("forgotten", "")
    if not done and drain(database).troubles:
        return
    aside = {
        name: about for name, about in segments_in(kept).items() if not done or about.st_ctime_ns > since * 1_000_000
    }
    found = {**dict.fromkeys({} if done else segments_in(database.spool), database.spool), **dict.fromkeys(aside, kept)}
    if (found or not done) and (yield from _clean_segments(database, found)):
        with database.transaction() as connection:
            set_mark(connection, f"cleaned:{instance}", f"{forgotten} {began}")
        with database.checkpointed() if not done else contextlib.nullcontext():
            pass  # and nothing of it is in the WAL any more


# -- Retention


class Expiry(Batch):
    """A transaction in which old facts of one tenant go, and their numbers stay."""

    def expire(self, tenant: int, before: int) -> int:
        """Remove the oldest events, of before a time; returns how many there were."""
        sql = EVENT_FACTS.format("(select 1 as one) as one")
        sql += "where events.tenant = :tenant and events.at < :before order by events.at limit :most"
        rows = self.connection.execute(sql, {"tenant": tenant, "before": before, "most": RETIRED_EVENTS}).fetchall()
        self._read_judgements()
        self._carries_for, carried = tenant, self._carried
        emails = {email.id: email for email in emails_by_id(self.connection, {row[0] for row in rows})}
        self._take_events(rows, emails)
        urls = set()
        for email in emails.values():
            for _, number, url, hit in email.stored.values():
                state = self._judgements[number].state
                self._count(email, hit, None, number, ASIDE, -1)
                last = "email_counts", (email.id,), "last_at"
                carried[last] = max(carried[last], hit.at)
                for table, key in (("email_counts", (email.id,)), ("link_counts", (email.id, url))):
                    if state != ASIDE and key[-1] is not None:
                        name = f"{TYPES[hit.type]}_{STATES[state]}"
                        carried[table, key, name] += 1
                        first = table, key, f"{name}_first"
                        carried[first] = min(carried.get(first, FAR), hit.at)
                urls.add(url)
        known = wanted("email", "id")
        sql = f"delete from changes where (email, event) in (select wanted.email, wanted.id from {known})"
        for_each(self.connection, [(row[0], row[2]) for row in rows], sql)
        delete_rows(self.connection, "events", "id", [row[2] for row in rows])
        self.remove_urls(tenant, urls, {}, nothing=-1)
        return len(rows)

    def cut_agents(self, rows: Iterable[tuple[int, int]]) -> set[int]:
        """Leave of the agents of events, given with their ids, only what they are families of; returns those they have now."""
        events = [*rows]
        sql = f"select agents.id, agents.agent from {wanted('id')} cross join agents where agents.id = wanted.id"
        texts = dict(for_each(self.connection, {agent for _, agent in events}, sql))
        families = {agent: family_of(text) for agent, text in texts.items()}
        look_up, insert = INTERNED["agent"]
        known = dict(for_each(self.connection, {*families.values()}, look_up))
        known |= for_each(self.connection, {*families.values()} - known.keys(), insert)
        changed = [(event, known[families[agent]]) for event, agent in events if families[agent] != texts[agent]]
        self._set("events", "agent", changed)
        self._set("events", "fixed", [(event, 1) for event, _ in events])
        return {known[family] for family in families.values()}


def _age_emails(
    connection: sqlite3.Connection, tenant: int, before: int, after: tuple[int, int]
) -> tuple[int, int] | None:
    """Take recipient, subject and key from some emails of before a time; returns behind which to go on, if any."""
    sql = """
        select id, created_at, key, campaign, recipient || subject from emails
        where tenant = :tenant and created_at < :before and (created_at, id) > (:at, :id)
        order by created_at, id limit :most
    """
    about = {"tenant": tenant, "before": before, "at": after[0], "id": after[1], "most": RETIRED_EVENTS}
    rows = connection.execute(sql, about).fetchall()
    kept = (AGED, TEST_KEY)  # which says that it is a test's
    old = {key: (id_, campaign) for id_, _, key, campaign, said in rows if said or not key.startswith(kept)}
    hashes = gone_hashes(connection, tenant, old)
    keys = {key: key if key.startswith(kept) else f"{AGED}{hash_}" for hash_, key in hashes.items()}
    sql = f"""
        update emails set key = wanted.key, search = wanted.text, recipient = '', subject = ''
        from {wanted("id", "key", "text")} where emails.id = wanted.id
    """
    texts = [(id_, keys[key], fold_text(keys[key], name) if name else "") for key, (id_, name) in old.items()]
    for_each(connection, texts, sql)
    return (rows[-1][1], rows[-1][0]) if len(rows) == RETIRED_EVENTS else None


def _retire_agents(database: Database, cuts: Mapping[int, int]) -> Iterator[None]:
    """Cut the agents of events that tenants had before a time, and remove those that no event has any more."""
    used, families, last = set[int](), set[int](), 0
    with database.reading() as connection:
        asked = "select coalesce(max(events.id), 0), (select max(id) from agents) from events"
        [(end, newest)] = connection.execute(asked).fetchall()
    while last < end:
        sql = "select id, agent, tenant, at, fixed from events where id > ? order by id limit ?"
        with database.transaction() as connection, (changes := Expiry(connection, now_ms())):
            rows = connection.execute(sql, (last, RETIRED_EVENTS)).fetchall()
            last = rows[-1][0] if rows else end
            old = [row for row in rows if row[3] < cuts.get(row[2], 0) and not (row[4] and row[1] in families)]
            used.update(row[1] for row in rows if row not in old)
            families |= changes.cut_agents([row[:2] for row in old])
        yield
    used |= families
    with database.reading() as connection:
        unused = [id_ for (id_,) in connection.execute("select id from agents where id <= ?", (newest or 0,))]
    while unused := [id_ for id_ in unused if id_ not in used]:
        with database.transaction() as connection:
            used.update(agent for (agent,) in connection.execute("select agent from events where id > ?", (end,)))
            some = {*unused[:RETIRED_EVENTS]}
            delete_rows(connection, "agents", "id", some - used)
            used |= some
        yield


def retire(database: Database, settings: Settings) -> Iterator[None]:
    """Remove what is older than its tenant keeps it, once a day, a transaction at a time; numbers stay."""
    now = now_ms()
    with database.reading() as connection:
        done, tenants = marks_of(connection).get("retired"), list_tenants(connection)
    days = {each.number: each.retention_days for each in tenants}
    days = {number: settings.retention_days if each is None else each for number, each in days.items()}
    kept = {number: each for number, each in days.items() if each}
    doing = f"{now // DAY_MS} {settings.agent_days} {kept}"
    if not kept or done == doing:
        return
    for tenant, each in kept.items():
        before, more = now - each * DAY_MS, True
        after: tuple[int, int] | None = (-FAR, 0)
        while more:
            with database.transaction() as connection, (changes := Expiry(connection, now)):
                more = changes.expire(tenant, before) == RETIRED_EVENTS
            yield
        while after:
            with database.transaction() as connection:
                after = _age_emails(connection, tenant, before, after)
            yield
        with database.transaction() as connection:
            sql = "delete from allowances where tenant = ? and day between 0 and ?"
            connection.execute(sql, (tenant, before // DAY_MS))
    # What is left of a session that was cut stays as it was judged.
    cuts = {tenant: now - min(settings.agent_days, each - 1) * DAY_MS for tenant, each in kept.items()}
    yield from _retire_agents(database, cuts)
    more = not database.is_shared
    while more:
        with database.transaction() as connection:
            asked = ("auto_vacuum", "freelist_count", "page_count")
            is_cut, free, pages = (connection.execute(f"pragma {each}").fetchone()[0] for each in asked)
            if more := is_cut and free > pages // 10:  # what is new needs some room
                connection.execute(f"pragma incremental_vacuum({RETIRED_EVENTS})").fetchall()
        yield
    with database.transaction() as connection:
        set_mark(connection, "retired", doing)


def _chores(settings: Settings, database: Database) -> Iterator[None]:
    yield from clean_files(database)
    yield from retire(database, settings)


def drainer_of(database: Database, settings: Settings, *, follows: bool = False) -> Drainer:
    """What drains and tidies, as the settings say."""
    days, megabytes = settings.keep_spool_days, settings.keep_spool_mb
    return Drainer(database, days, megabytes, follows=follows, chores=partial(_chores, settings))


# == Outward ===========================================================================================
# What becomes of hits, told to other programs: the feed that they read, the webhooks that it is sent to.

CHANGE_FIELDS = ("id", "type", "changed_at", *EVENTS.fields, *EVENTS.more, "counts_as", "before")


def read_changes(
    connection: sqlite3.Connection, tenant: int, feed: Feed, after: int, most: int, held: int | None = None
) -> tuple[list[dict[str, Any]], int]:
    """Changes behind a number, oldest first, by CHANGE_FIELDS; and the number behind which to go on.

    Of those that are held back for some milliseconds, a hit is told as it is judged now; what that tells already is left out.
    """
    sql = """
        select event, number, at, before, after from changes where tenant = :tenant and number > :number
            and (before is null or not exists (
                select 1 from changes as first where first.email = changes.email and first.event = changes.event
                    and first.before is null and first.at > changes.at - :held and :held > 0))
        order by number limit :most
    """
    asked = {"tenant": tenant, "number": after, "held": held or 0, "most": most}
    found_all = connection.execute(sql, asked).fetchall()
    until = FAR if held is None else now_ms() - held
    changes = [*takewhile(lambda row: row[2] <= until, found_all)]
    last = feed.last if len(changes) == len(found_all) < most else changes[-1][1] if changes else after
    events = {row[0]: row[1:] for row in for_each(connection, {row[0] for row in changes}, EVENTS.rows)}
    rows = connection.execute("select id, verdict, reason, state from judgements")
    judged = {
        id_: {"verdict": verdict, "reason": why, "counts_as": STATE_NAMES[state]} for id_, verdict, why, state in rows
    }
    found = []
    for event, number, at, before, became in changes:
        told = dict(zip((*EVENTS.fields, *EVENTS.more), events[event], strict=True))
        type_ = "revised" if before else "opened" if told["event_type"] == "open" else "clicked"
        told |= {"id": f"{feed.epoch}-{number}", "type": type_, "changed_at": iso_time(at)}
        now = judged[became] if held is None else {}
        counts_as = STATE_NAMES[judgement_of(told["verdict"], told["reason"]).state]
        told |= {"timestamp": iso_time(told["timestamp"]), "counts_as": counts_as, **now, "before": judged.get(before)}
        found.append({name: told[name] for name in CHANGE_FIELDS})
    return found, last


# -- Webhooks

CHANGE_TYPES = ("opened", "clicked", "revised")
HELD_MS = 60_000  # before it is sent: what turns out to be a scanner's within that time is told right at once
IN_FLIGHT = 4  # requests to one webhook
SENT_AT_ONCE = 1_000  # changes, at most, between two looks into the database; none is longer than 32 KB
WEBHOOK_SECONDS = 10.0  # for one request
GIVE_UP_MS = 3 * DAY_MS
PAUSES = 5.0, 21_600.0  # seconds between two tries: as long as it has failed already, but not less and not more
PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # whose last 32 bits are an address of IPv4


class Webhook(NamedTuple):
    """Where a tenant's changes are sent to, as the table has it: no more than a place in them."""

    tenant: int
    url: str
    types: str = ",".join(CHANGE_TYPES)
    people_only: int = 0
    secrets: str = ""  # the newest first
    position: int = 0  # the number up to which all was sent
    failing_since: int | None = None
    trouble: str = ""  # the last one, while it fails
    off: int = 0  # 1: it failed for too long

    def wants(self, change: Mapping[str, Any]) -> bool:
        states = {change["counts_as"], (change["before"] or change)["counts_as"]}
        return change["type"] in self.types.split(",") and (not self.people_only or STATES[PERSON] in states)

    def headers(self, id_: str, body: bytes, now: int) -> dict[str, str]:
        """What goes with a body, signed as standardwebhooks.com says."""
        signed = f"{id_}.{now // 1000}.".encode() + body
        keys = [base64.b64decode(secret.removeprefix("whsec_")) for secret in self.secrets.split()]
        signatures = [base64.b64encode(hmac.digest(key, signed, "sha256")).decode() for key in keys]
        about = {"webhook-id": id_, "webhook-timestamp": str(now // 1000)}
        about["webhook-signature"] = " ".join(f"v1,{each}" for each in signatures)
        return about | {"Content-Type": "application/json", "User-Agent": f"email-tracker/{__version__}"}


_PROGRESS = ("position", "failing_since", "trouble", "off")  # what changes as it is sent to


def webhooks_of(connection: sqlite3.Connection, tenant: int | None = None) -> list[Webhook]:
    sql = f"select {', '.join(Webhook._fields)} from webhooks where tenant = coalesce(?, tenant) order by tenant, url"
    return [*map(Webhook._make, connection.execute(sql, (tenant,)))]


def set_webhook(connection: sqlite3.Connection, webhook: Webhook) -> None:
    upsert(connection, "webhooks", ("tenant", "url"), dict.fromkeys(Webhook._fields[2:], INSTEAD), [webhook])


def add_webhook(connection: sqlite3.Connection, webhook: Webhook, rotate: bool) -> dict[str, Any]:
    """Send to a URL from now on; or change how, and switch it on, where it stood. Tells its secrets. Raises BadInput."""
    tenant, url, types = webhook[:3]
    if not {*types.split(",")} <= {*CHANGE_TYPES}:
        raise BadInput(f"events: expected some of {', '.join(CHANGE_TYPES)}")
    if not re.fullmatch(r"https?://[A-Za-z0-9.:\[\]-]+(/[!-~]*)?", url) or len(url) > 2000 or not url_host(url):
        raise BadInput("url: expected https://, a host in ASCII, perhaps a port and a path; at most 2000 characters")
    set_feed(connection, tenant, True)
    feed, known = feed_of(connection, tenant), {each.url: each for each in webhooks_of(connection, tenant)}
    before = known.get(url) or webhook._replace(position=feed.last if feed else 0)
    kept = before.secrets.split()
    if rotate or not kept:
        kept = [f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}", *kept[:1]]
    set_webhook(connection, webhook._replace(secrets=" ".join(kept), position=before.position))
    return {"url": url, "secrets": kept}


def webhooks_about(connection: sqlite3.Connection, tenant: int) -> list[dict[str, Any]]:
    """Where a tenant's changes are sent, and whether that works; no secrets, which only who adds a webhook is told."""
    feed, found = feed_of(connection, tenant), []
    for each in webhooks_of(connection, tenant):
        about = {"url": each.url, "events": each.types.split(","), "people_only": bool(each.people_only)}
        about |= {"state": "off" if each.off else "on", "behind": feed.last - each.position if feed else 0}
        found.append({**about, "failing_since": iso_time(each.failing_since), "trouble": each.trouble})
    return found


def find_webhook(connection: sqlite3.Connection, tenant: str, url: str) -> Webhook:
    """The webhook that leads to a URL, of the tenant that a word means. Raises BadInput."""
    for each in webhooks_of(connection, find_tenant(connection, tenant).number):
        if each.url == url:
            return each
    raise NotThere(f"no webhook has the url {url!r}; `tenant webhook list` shows them")


def remove_webhook(connection: sqlite3.Connection, webhook: Webhook) -> None:
    connection.execute("delete from webhooks where tenant = ? and url = ?", webhook[:2])


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is one of the internet, also where it only stands for one of IPv4."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.sixtofour or (ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in NAT64 else None)
        inner = address.ipv4_mapped or inner
        return is_public(inner) if inner else address in PUBLIC_IPV6 and address.is_global
    return address.is_global and not address.is_multicast


class Lane:
    """A connection to where a webhook leads, which is kept; one request at a time."""

    def __init__(self, url: str, networks: Iterable[str]) -> None:
        self.until = math.inf  # when a request that is under way has taken too long
        self._networks = [*map(ipaddress.ip_network, networks)]
        self._scheme, _, rest = url.partition("://")
        self._host, _, path = rest.partition("/")
        self._path, self._connection = f"/{path}", cast("http.client.HTTPConnection | None", None)

    def _connect(self) -> http.client.HTTPConnection:
        """Connect to an address that was looked at: a name may lead to another the next time. Raises OSError."""
        import http.client
        import ssl

        host, port = read_origin(f"{self._scheme}://{self._host}")
        host = host.strip("[]")
        port = port if self._scheme == "https" or port != DEFAULT_PORTS["https"] else DEFAULT_PORTS["http"]
        found = [read_address(each[4][0]) for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        allowed = [each for each in found if each and any(each in network for network in self._networks)]
        public = [each for each in found if each and is_public(each)] if self._scheme == "https" else []
        if not (usable := allowed + public):
            told = ", ".join(sorted({*map(str, found)}))
            raise OSError(f"{host} is {told}: expected https and a public address, or one of WEBHOOK_NETWORKS")
        raw = socket.create_connection((str(usable[0]), port), WEBHOOK_SECONDS)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else a body waits 40 ms for its headers' receipt
        self._connection = connection = http.client.HTTPConnection(self._host, timeout=WEBHOOK_SECONDS)
        connection.sock, connection.auto_open = raw, 0  # else it would connect by itself
        if self._scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host)
        return connection

    def post(self, body: bytes, headers: dict[str, str]) -> str:
        """Send one request; what is wrong with the answer, "" if nothing."""
        from http.client import HTTPException

        self.until = time.monotonic() + WEBHOOK_SECONDS
        for is_kept in (self._connection is not None, False):
            try:
                connection = self._connection or self._connect()
                connection.request("POST", self._path, body, {"Host": self._host, **headers})
                answer = connection.getresponse()
                answer.read(READ_BYTES)
                if time.monotonic() >= self.until:
                    raise OSError
                if not answer.isclosed() or answer.will_close:
                    self.close()
                return "" if 200 <= answer.status < 300 else f"answered {answer.status}"
            except (OSError, HTTPException) as error:
                self.close()
                trouble = str(error) or type(error).__name__
                if time.monotonic() >= self.until:
                    return f"took longer than {WEBHOOK_SECONDS:.0f} s"
                if not is_kept:  # else it had just hung up
                    return trouble
        return trouble

    def close(self, *, late: bool = False) -> None:
        """Hang up; of a request that takes too long, in another thread than its own, so that it ends."""
        if (connection := self._connection) is None:
            return
        if late and connection.sock:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)
        elif not late:
            connection.close()
            self._connection = None


class Courier(threading.Thread):
    """Sends a webhook what it wants, in a thread of its own: a receiver that hangs delays no other."""

    def __init__(self, database: Database, webhook: Webhook, networks: Iterable[str], held: int = HELD_MS) -> None:
        super().__init__(daemon=True)
        self._database, self._key, self._held = database, webhook[:2], held
        self._lanes = [Lane(webhook.url, networks) for _ in range(IN_FLIGHT)]
        self._done: set[str] = set()  # ids of what was sent behind something that was not

    def run(self) -> None:
        """Go on until there is no such webhook, or it is switched off."""
        pause: float | None = 0.0
        while pause is not None:
            time.sleep(pause)
            try:
                pause = self.turn()
            except StoreError as error:
                log(f"webhooks wait: {error}")
                pause = PAUSES[0]
        self.close()

    def close(self) -> None:
        for lane in self._lanes:
            lane.close()

    def turn(self) -> float | None:
        """Send what is due; after how many seconds to look again, None: never."""
        with self._database.reading() as connection:
            of_tenant = webhooks_of(connection, self._key[0])
            webhook = next((each for each in of_tenant if each[:2] == self._key and not each.off), None)
            feed = feed_of(connection, self._key[0])
            if webhook is None or feed is None:
                return None
            position = max(webhook.position, feed.swept)
            changes, last = read_changes(connection, webhook.tenant, feed, position, SENT_AT_ONCE, self._held)
        due = [each for each in changes if webhook.wants(each) and each["id"] not in self._done]
        if not due and last == webhook.position:
            return 1.0
        trouble, now = self._send(webhook, due), now_ms()
        left = [int(each["id"].rpartition("-")[2]) for each in due if each["id"] not in self._done]
        position = left[0] - 1 if left else last
        since = None if not left else now if position > webhook.position else webhook.failing_since or now
        self._done = {id_ for id_ in self._done if left and int(id_.rpartition("-")[2]) > position}
        values = position, since, trouble, int(since is not None and now - since > GIVE_UP_MS)
        with self._database.transaction() as connection:
            changed = ", ".join(f"{name} = ?" for name in _PROGRESS)
            connection.execute(f"update webhooks set {changed} where tenant = ? and url = ?", (*values, *self._key))
        return 0.0 if since is None else min(max((now - since) / 1000, PAUSES[0]), PAUSES[1])

    def _send(self, webhook: Webhook, due: Iterable[dict[str, Any]]) -> str:
        """Send changes, those of one email in order; says what went wrong, "" if nothing."""
        parts: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for each in due:
            parts[binascii.crc32(each["key"].encode()) % IN_FLIGHT].append(each)
        troubles: list[str] = []

        def send_in(lane: Lane, changes: Iterable[dict[str, Any]]) -> None:
            for each in changes:
                told = {"type": each["type"], "timestamp": each["changed_at"], "data": each}
                body = json.dumps(told, ensure_ascii=False).encode("utf-8", "backslashreplace")
                trouble = lane.post(body, webhook.headers(each["id"], body, now_ms()))
                lane.until = math.inf
                if trouble:
                    troubles.append(trouble)
                    return
                self._done.add(each["id"])

        threads = [
            threading.Thread(target=send_in, args=(self._lanes[n], part), daemon=True) for n, part in parts.items()
        ]
        for thread in threads:
            thread.start()
        while alive := [thread for thread in threads if thread.is_alive()]:
            alive[0].join(0.1)
            for lane in self._lanes:
                if time.monotonic() > lane.until:
                    lane.close(late=True)
        return next(iter(troubles), "")


# == Stats =============================================================================================
# Read models: what pages, stats.json and commands show. No SQL, no HTML.

RANGES = {"24h": "24 hours", "7d": "7 days", "30d": "30 days", "90d": "90 days", "12m": "12 months", "all": "all"}
DEFAULT_RANGE = "30d"
DAYS_BACK = {"24h": 1, "7d": 6, "30d": 29, "90d": 89, "12m": 364}  # whole days before today
MOST_SENT = 1_000_000_000  # emails of a campaign
NO_CAMPAIGNS = (".", "..")  # to a browser, an address that ends so is another
MOST_HOURS = 2  # days of a range of one's own that is shown by hours
MOST_DAYS = 92  # … and by days
MOST_WEEKS = 104  # beyond two years, months
HOUR_MS = 3_600_000
Days = tuple[date, date]  # the first and the last


@dataclass(frozen=True, slots=True)
class Period:
    """A range of time, cut into the steps of a curve; times in milliseconds."""

    name: str  # of a range; "" for one from a day to a day
    zone: tzinfo
    starts: list[int]  # of each step
    end: int
    step: str  # hour, day, week or month

    def day(self, at: int) -> date:
        return datetime.fromtimestamp(at / 1000, self.zone).date()

    @property
    def days(self) -> tuple[int, int]:
        """From which day up to which, counted from 1970."""
        first, last = (local_day(str(self.zone), at // QUARTER_MS) for at in (self.starts[0], self.end - 1))
        return first, last + 1

    def spans(self, tenant_zone: str) -> list[Span]:
        """Its steps: in days where they are whole days of the tenant's own zone, else in quarters."""
        by_day = self.step != "hour" and str(self.zone) == tenant_zone
        bounds = [*(start // QUARTER_MS for start in self.starts), -(-self.end // QUARTER_MS)]
        if by_day:
            bounds = [*(local_day(tenant_zone, quarter) for quarter in bounds[:-1]), self.days[1]]
        return [Span(int(by_day), *each) for each in pairwise(bounds)]

    @staticmethod
    def parts(span: Span, tenant_zone: str) -> list[Span]:
        """A span, with the whole days of the tenant's own zone that are in it as days: the fewest rows."""
        if span.by_day or (zone := zone_named(tenant_zone)) is None:
            return [span]
        first, last = local_day(tenant_zone, span.start - 1) + 1, local_day(tenant_zone, span.end)
        begin, end = (-(-_midnight(date.fromordinal(FIRST_DAY + day), zone) // QUARTER_MS) for day in (first, last))
        return [Span(0, span.start, begin), Span(1, first, last), Span(0, end, span.end)] if first < last else [span]

    def span(self, tenant_zone: str) -> Span:
        spans = self.spans(tenant_zone)
        return spans[0]._replace(end=spans[-1].end)


def read_zone(name: str) -> tzinfo:
    if (found := zone_named(name)) is None:
        raise BadInput(f"tz is {name[:60]!r}; expected a time zone such as Europe/Rome or UTC")
    return found


def zone_of(tenant: Tenant, asked: str | None = None) -> tzinfo:
    """The zone that is asked for, else the tenant's own, or UTC where this machine does not know that. Raises BadInput."""
    return read_zone(asked) if asked else zone_named(tenant.tz) or timezone.utc


def read_period(name: str, zone: tzinfo, now: int, first: int | None, days: Days | None = None) -> Period:
    """Cut a range that ends now (or with `days`) into the hours, days, weeks or months of a zone; "all" begins with `first`."""
    if days is None and name not in RANGES:
        raise BadInput(f"range is {name[:60]!r}; expected one of {', '.join(RANGES)}")
    local = datetime.fromtimestamp(now / 1000, zone)
    last, end = local.date(), now + 1
    begin = last - timedelta(days=DAYS_BACK.get(name, 0))
    if days:
        name, begin, last, end = "", *days, _midnight(days[1] + timedelta(days=1), zone)
    elif name == "all" and first is not None:
        begin = min(datetime.fromtimestamp(first / 1000, zone).date(), last)
    step, starts = _steps(begin, last, whole=name in ("12m", "all"))
    moments = [_midnight(day, zone) for day in starts]
    if name == "24h":
        hour = local.replace(minute=0, second=0, microsecond=0)
        moments = [math.floor(hour.timestamp()) * 1000 - 23 * HOUR_MS]
    if step == "hour":
        moments = list(range(moments[0], end, HOUR_MS))
    return Period(name, zone, moments, end, step)


def _steps(begin: date, last: date, whole: bool) -> tuple[str, list[date]]:
    """The days with which steps begin, as fine as the eye can take; if they must be whole, at least weeks."""
    length = (last - begin).days + 1
    step = "hour" if length <= MOST_HOURS else "day"
    if whole or length > MOST_DAYS:
        step = "week" if begin.weekday() + length <= 7 * MOST_WEEKS else "month"

    def place(day: date) -> int:
        return day.weekday() if step == "week" else day.day - 1 if step == "month" else 0

    if whole:
        begin -= timedelta(days=place(begin))
    days = (begin + timedelta(days=n) for n in range((last - begin).days + 1))
    return step, [day for day in days if day == begin or place(day) == 0]


def _midnight(day: date, zone: tzinfo) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=zone).timestamp()) * 1000


def read_days(asked: Mapping[str, str], today: date) -> Days | None:
    """The range of one's own that is asked for: `on` a day, or `from` one `to` another. Raises BadInput."""
    names = ["on"] if "on" in asked else ["from", "to"] if asked.keys() & {"from", "to"} else []
    found = []
    for name in names:
        text = asked.get(name, str(today))
        try:
            found.append(date.fromisoformat(text))
        except ValueError:
            raise BadInput(f"{name} is {text[:40]!r}; expected a day such as 2026-11-30") from None
    if found and not date(2000, 1, 1) <= found[0] <= found[-1] < date(2100, 1, 1):
        expected = "a day of this century" if len(found) == 1 else "two days of this century, in order"
        raise BadInput(f"{' and '.join(names)}: expected {expected}")
    return (found[0], found[-1]) if found else None


@dataclass(frozen=True, slots=True)
class Totals:
    emails: int
    opened: dict[str, int]  # how many of them, by state
    clicked: dict[str, int]
    clicked_without_open: int  # clicked by a person, though no open by a person was seen: read all the same
    clicked_with_unconfirmed: int  # of these: with an unconfirmed open

    @property
    def read(self) -> int:
        return self.opened["person"] + self.clicked_without_open

    @property
    def maybe_read(self) -> int:
        return self.opened["unconfirmed"] - self.clicked_with_unconfirmed

    @property
    def is_exceeded(self) -> bool:
        """Whether more keys answered than emails were told of: some of them were made up, so there is no rate."""
        return 0 < self.emails < max(sum(self.opened.values()), sum(self.clicked.values()), self.read)

    @property
    def rates(self) -> dict[str, tuple[float, float] | None]:
        """Shares of the emails, and of those that were read: by people at least, and with the unconfirmed at most."""
        opened, clicked = self.opened, self.clicked
        emails, read = (0, 0) if self.is_exceeded else (self.emails, self.read)
        parts = {
            "By opens alone": (opened["person"], opened["unconfirmed"], emails),
            "Opened": (self.read, self.maybe_read, emails),
            "Clicked": (clicked["person"], clicked["unconfirmed"], emails),
            "Click-to-open": (clicked["person"], 0, read),
        }
        ends = {label: (low, min(low + more, of), of) for label, (low, more, of) in parts.items()}
        return {label: (low / of, high / of) if of else None for label, (low, high, of) in ends.items()}


Counts = dict[str, dict[str, int]]  # by "opens" and "clicks", and by state, as stats.json has them


@dataclass(frozen=True, slots=True)
class Stats:
    period: Period
    sent: Totals  # of the mail sent in the period, whenever it was opened
    unregistered: Totals  # of the emails that nobody registered; in no rate
    hits: Counts  # in the period
    emails: Counts  # unique: emails that came under a state in the period
    steps: list[Counts]  # hits in each step
    reasons: list[dict[str, Any]]  # what the hits in the period were judged, and why, as stats.json has it
    named: list[tuple[str, str, int]]
    dropped: dict[str, int]  # so far, by reason
    over: dict[str, int]  # of those in the period, by the limit that was met
    untracked: dict[str, int]  # hits in the period that asked not to be tracked, by their type
    last_hit_at: int | None
    before: tuple[Totals, Counts] | None  # what was sent, and hits, in the same length of time before
    machines: list[Machine]  # that drain into this database, where several do
    webhooks: list[Webhook]


def totals_of(sums: Mapping[str, int]) -> Totals:
    opened, clicked = ({state: sums[f"{verb}_{state}"] for state in STATES.values()} for verb in ("opened", "clicked"))
    return Totals(sums["emails"], opened, clicked, sums["click_only"], sums["click_only_unconfirmed"])


def reasons_of(rows: Iterable[Sequence[Any]]) -> list[dict[str, Any]]:
    """What hits were judged, and why, most first, as stats.json has it; of rows as `hits_in` has them."""
    sums: Counter[tuple[int, str, str, int]] = Counter()
    for verdict, reason, type_, state, hits in rows:
        sums[type_, verdict, reason, state] += hits
    return [
        {"event_type": TYPES[each[0]], "verdict": each[1], "reason": each[2], "counts_as": STATE_NAMES[each[3]]}
        | {"hits": sums[each]}
        for each in sorted(filter(sums.get, sums), key=lambda each: (each[0], -sums[each], each))
    ]


def counts_of(rows: Iterable[Sequence[Any]], states: Mapping[int, str] = STATE_NAMES) -> Counts:
    """The sums of rows that end with type, state and count."""
    counts = {f"{word}s": dict.fromkeys(states.values(), 0) for word in TYPES.values()}
    for *_, type_, state, count in rows:
        counts[f"{TYPES[type_]}s"][states[state]] += count
    return counts


def read_stats(connection: sqlite3.Connection, tenant: Tenant, period: Period) -> Stats:
    """Read a period's numbers from the roll-ups; events are never counted here."""
    number, span = tenant.number, period.span(tenant.tz)
    parts = period.parts(span, tenant.tz)
    past = span._replace(start=2 * span.start - span.end, end=span.start)  # as long, and as much of it has passed
    spans = past, *period.spans(tenant.tz)
    hits_before, *steps = hits_in(connection, number, [period.parts(each, tenant.tz) for each in spans])
    before = totals_of(cohort_in(connection, number, past)), counts_of(hits_before)
    recent = dropped_hits(connection, number, period.days[0])
    return Stats(
        period=period,
        sent=totals_of(cohort_in(connection, number, span)),
        unregistered=totals_of(cohort_in(connection, number, UNREGISTERED)),
        hits=counts_of(chain(*steps)),
        emails=counts_of(chain(*(uniques_in(connection, number, part) for part in parts)), STATES),
        steps=list(map(counts_of, steps)),
        reasons=reasons_of(chain(*steps)),
        named=named_clicks(connection, number),
        dropped=dropped_hits(connection, number),
        over={what: recent[f"{what}-limit"] for what in A_DAY if f"{what}-limit" in recent},
        untracked={each: recent[f"untracked-{each}"] for each in TYPES.values() if f"untracked-{each}" in recent},
        last_hit_at=last_hit_at(connection, number),
        before=None if period.name == "all" else before,
        machines=[*machines_of(connection, now_ms()).values()],
        webhooks=webhooks_of(connection, tenant.number),
    )


def period_of(connection: sqlite3.Connection, tenant: Tenant, asked: Mapping[str, str], now: int) -> Period:
    """The range that is asked for, by its name or from a day to a day. Raises BadInput."""
    zone = zone_of(tenant, asked.get("tz"))
    days = read_days(asked, datetime.fromtimestamp(now / 1000, zone).date())
    first = first_quarter(connection, tenant.number) if asked.get("range") == "all" else None
    return read_period(asked.get("range", DEFAULT_RANGE), zone, now, first and first * QUARTER_MS, days)


# -- Campaigns

MOST_BEFORE = 5  # campaigns with which one is compared
FIRST_HOURS = 48  # after the first sending, which are shown by the hour


@dataclass(frozen=True, slots=True)
class CampaignStats:
    """The numbers of a campaign so far. Opens and clicks in steps are emails, each where it first had the state it counts as."""

    campaign: str
    begun: int  # when its first email was sent, in milliseconds, to the quarter of an hour
    age: int  # since then
    last_hit_at: int | None
    sent: Totals
    before: dict[str, Totals]  # the campaigns before, newest first, as they were at the same age
    before_sums: Totals | None  # all of them as one, so that a small one weighs little: for rates
    hits: Counts
    reasons: list[dict[str, Any]]  # as those of Stats
    half_after: int | None  # milliseconds after `begun` by which half of what people opened was; None: sent for days
    period: Period  # hours for the first two days, then its steps: days, or longer ones
    hours: int  # how many of the steps are hours
    steps: list[Counts]


def read_campaign_period(zone: tzinfo, begun: int, last: int, now: int, is_steady: bool) -> tuple[Period, int]:
    """A campaign's time up to the last hit: the hours of two days, up to midnight, then days or longer steps; and how many
    are hours. Of one that is sent for longer than that, days alone."""
    first = datetime.fromtimestamp(begun / 1000, zone).replace(minute=0, second=0, microsecond=0)
    hour = math.floor(first.timestamp()) * 1000
    turn = datetime.fromtimestamp(begun / 1000 + FIRST_HOURS * 3_600 - 1, zone).date() + timedelta(days=1)
    day_after = datetime.fromtimestamp(last / 1000, zone).date() + timedelta(days=1)
    turn = first.date() if is_steady else turn
    by_hour = _midnight(turn, zone)
    end = min(max(now, hour) + 1, max(by_hour, _midnight(day_after, zone)))
    hours = list(range(hour, min(by_hour, end), HOUR_MS))
    if end <= by_hour:
        return Period("", zone, hours, end, "hour"), len(hours)
    step, days = _steps(turn, datetime.fromtimestamp((end - 1) / 1000, zone).date(), whole=False)
    period = Period("", zone, [*hours, *(_midnight(day, zone) for day in days)], end, "day" if step == "hour" else step)
    return period, len(hours)


def read_campaign(
    connection: sqlite3.Connection, tenant: Tenant, campaign: str, zone: tzinfo, now: int
) -> CampaignStats | None:
    """The numbers of a campaign from the roll-ups; None if there is nothing of it."""
    number, quarter = tenant.number, now // QUARTER_MS + 1
    rows = read_table(connection, number, CAMPAIGNS, Wanted(campaign=campaign)).named()
    begun, ended = campaigns_sent(connection, number, [campaign]).get(campaign, (None, 0))
    if not rows or begun is None:
        return None
    last = max(rows[0]["last_hit_at"] or 0, ended * QUARTER_MS)
    is_steady = ended - begun > FIRST_HOURS * HOUR_MS // QUARTER_MS
    period, hours = read_campaign_period(zone, begun * QUARTER_MS, last, now, is_steady)
    is_alone = tenant.share is not None and tenant.share.campaign != ""  # then the others are not to be told of
    others = {} if is_alone else dict(campaigns_before(connection, number, begun, MOST_BEFORE))
    bounds = [0, *(at // QUARTER_MS for at in period.starts[1:]), quarter]  # what came before is in the first step
    own = [(campaign, *each) for each in pairwise(bounds)]
    past = ((name, 0, first + max(quarter - begun, 0)) for name, first in others.items())
    times = [(name, Period.parts(Span(0, *span), tenant.tz)) for name, *span in (*own, *past)]
    sums = campaign_sums(connection, number, times)
    steps = [{"opens": each.opened, "clicks": each.clicked} for each in map(totals_of, sums[: len(own)])]
    before = zip(others, sums[len(own) :], strict=True)
    comparable = {name: each for name, each in before if not totals_of(each).is_exceeded}
    together = sum(map(Counter, comparable.values()), Counter[str]())
    hits = campaign_hits(connection, number, campaign)
    return CampaignStats(
        campaign=campaign,
        begun=begun * QUARTER_MS,
        age=max(now - begun * QUARTER_MS, 0),
        last_hit_at=rows[0]["last_hit_at"],
        sent=totals_of(rows[0]),
        before={name: totals_of(each) for name, each in comparable.items()},
        before_sums=totals_of(together) if comparable else None,
        hits=counts_of(hits),
        reasons=reasons_of(hits),
        half_after=None if is_steady else _half_after(connection, number, campaign, begun, quarter),
        period=period,
        hours=hours,
        steps=steps,
    )


def _half_after(connection: sqlite3.Connection, tenant: int, campaign: str, begun: int, until: int) -> int | None:
    """How long after the first sending people had opened half of the emails that they opened so far."""
    opens = campaign_opens(connection, tenant, [(campaign, 0, until)], 1)
    so_far = list(accumulate(emails for *_, emails in opens))
    if not opens:
        return None
    _, quarter, _ = opens[bisect.bisect_left(so_far, (so_far[-1] + 1) // 2)]
    return max(quarter + 1 - begun, 1) * QUARTER_MS


def campaign_curves(connection: sqlite3.Connection, tenant: int, campaigns: Collection[str]) -> dict[str, list[int]]:
    """How many emails people first opened in each of the first hours of campaigns."""
    sent = campaigns_sent(connection, tenant, campaigns)
    curves = {campaign: [0] * FIRST_HOURS for campaign in sent}
    spans = ((campaign, first, first + FIRST_HOURS * HOUR_MS // QUARTER_MS) for campaign, (first, _) in sent.items())
    for campaign, hour, emails in campaign_opens(connection, tenant, spans, HOUR_MS // QUARTER_MS):
        curves[campaign][hour] = emails
    return curves


def read_declaration(campaign: str, sent: int, at: str | None, name: str = "sent_at") -> tuple[str, int, int | None]:
    """Check what somebody says of a campaign; the time in milliseconds since 1970. Raises BadInput."""
    if campaign.strip(" ") in ("", *NO_CAMPAIGNS) or len(campaign) > MAX_CAMPAIGN or UNFIT.search(campaign):
        raise BadInput(f"campaign: expected a name of 1 to {MAX_CAMPAIGN} characters in one line, not . or ..")
    if not 0 <= sent <= MOST_SENT:
        raise BadInput(f"sent: expected a whole number from 0 to {MOST_SENT:,}")
    return campaign.strip(" "), sent, None if at is None else read_iso_time(at, name)


def read_iso_time(text: str, name: str) -> int:
    """Milliseconds since 1970 of a time such as 2026-11-30T09:00:00Z. Raises BadInput."""
    try:
        at = datetime.fromisoformat(re.sub("[Zz]$", "+00:00", text.strip()))
    except ValueError:
        at = None
    if at is None or at.tzinfo is None or not EARLIEST < at.timestamp() < LATEST:
        raise BadInput(f"{name}: expected a time with its zone, such as 2026-11-30T09:00:00Z, not {text[:40]!r}")
    return round(at.timestamp() * 1000)


def _sent_json(sent: Totals) -> dict[str, Any]:
    return {**asdict(sent), "open_rate": sent.rates["By opens alone"], "click_rate": sent.rates["Clicked"]}


def campaign_json(stats: CampaignStats, name: str, programs: Rows, links: Rows, waiting: int) -> dict[str, Any]:
    """The numbers of a campaign as JSON; `help api` lists the fields."""
    period, before, clicks = stats.period, stats.before_sums, stats.hits["clicks"]["person"]
    steps = zip(period.starts, stats.steps, strict=True)
    return {
        "tenant": name,
        "campaign": stats.campaign,
        "first_sent_at": iso_time(stats.begun),
        "age_hours": round(stats.age / HOUR_MS, 2),
        "sent": _sent_json(stats.sent),
        "before": before and {"campaigns": [*stats.before], "sent": _sent_json(before)},
        "half_of_opens_after_hours": stats.half_after and stats.half_after / HOUR_MS,
        "activity": stats.hits,
        "reasons": stats.reasons,
        "clients": [{field: row[field] for field in PROGRAMS.fields} for row in programs.named()],
        "links": [
            {field: row[field] for field in LINKS.fields} | {"share": row["clicks_person"] / clicks if clicks else None}
            for row in links.named()
        ],
        "waiting_hits": waiting,
        "steps": [
            {"from": iso_time(at), "step": "hour" if n < stats.hours else period.step, **emails}
            for n, (at, emails) in enumerate(steps)
        ],
    }


def stats_json(stats: Stats, name: str, waiting: int) -> dict[str, Any]:
    """The numbers as stats.json has them; README lists the fields."""
    period = stats.period
    begin, end = iso_time(period.starts[0]), iso_time(period.end - 1)
    return {
        "tenant": name,
        "range": {"name": period.name, "from": begin, "to": end, "tz": str(period.zone)},
        "sent": _sent_json(stats.sent),
        "unregistered": asdict(stats.unregistered),
        "activity": {noun: {"hits": hits, "emails": stats.emails[noun]} for noun, hits in stats.hits.items()},
        "reasons": stats.reasons,
        "before": stats.before and {"sent": asdict(stats.before[0]), **stats.before[1]},
        "naming_page": [{"host": host, "reason": reason, "clicks": clicks} for host, reason, clicks in stats.named],
        "dropped": stats.dropped,
        "last_hit_at": iso_time(stats.last_hit_at),
        "waiting_hits": waiting,
        "steps": [{"from": iso_time(at), **hits} for at, hits in zip(period.starts, stats.steps, strict=True)],
    }


# == Pages =============================================================================================
# HTML. Everything is escaped unless it is Markup, which only Template.render, joined and tag make.


class Markup(str):
    __slots__ = ()


class Template(string.Template):
    def render(self, **values: object) -> Markup:
        """Fill in every $name; a missing one is a KeyError."""
        return Markup(self.substitute({name: _escaped(value) for name, value in values.items()}))


def _escaped(value: object) -> str:
    return value if isinstance(value, Markup) else html.escape(str(value))


def joined(*parts: object) -> Markup:
    return Markup("".join(map(_escaped, parts)))


def tag(name: str, /, *content: object, **attributes: object) -> Markup:
    """An element; without an attribute that is "", and `class_` is for the word that Python has for itself."""
    given = {word.rstrip("_").replace("_", "-"): value for word, value in attributes.items() if value != ""}
    said = "".join(f' {word}="{_escaped(value)}"' for word, value in given.items())
    return Markup(f"<{name}{said}" + (f">{joined(*content)}</{name}>" if content else "/>"))


LANGUAGES = ("en", "de", "fr", "it", "es")  # of recipients


def read_words(name: str) -> dict[str, str]:
    """Texts of pages, by their names."""
    lines = resource(f"templates/{name}.txt").decode().splitlines()
    return dict(line.split(" = ") for line in lines if line and line[0] != "#")


class Pages:
    """The templates and the files they point to, read once."""

    NAMES = (
        "page dashboard empty campaign email link person message naming preferences _activity "
        "_curve _downloads _range _reason _search _table _timeline _trial _trial_hits"
    )

    def __init__(self, root: str = "") -> None:
        self.root = root
        self.templates = {name: Template(resource(f"templates/{name}.html").decode()) for name in self.NAMES.split()}
        self.words = read_words("words")
        self.languages = {language: read_words(f"preferences.{language}") for language in LANGUAGES}
        stylesheet = re.sub(rb"/\*.*?\*/|\n *|(?<=[{:;,]) | (?=[{}])", b"", resource("templates/style.css"))
        for_ever = "max-age=31536000, immutable"
        self.stylesheet_name = f"style.{hashlib.sha256(stylesheet).hexdigest()[:16]}.css"
        self.files = {  # each with its type, and for how long it may be kept: the stylesheet's name holds its hash
            f"assets/{self.stylesheet_name}": ("text/css; charset=utf-8", f"public, {for_ever}", stylesheet),
            "favicon.ico": ("image/svg+xml", "max-age=86400", resource("templates/icon.svg")),
            "openapi.json": (EXPORT_TYPES["json"], "max-age=3600", resource("templates/openapi.json")),
            "robots.txt": ("text/plain; charset=utf-8", "max-age=86400", b"User-agent: *\nDisallow: /\n"),
        }
        self.pixel = resource("pixel.gif")

    def page(self, title: str, template: str, language: str = "en", /, **values: object) -> str:
        about = {"title": title, "lang": language, "root": self.root, "stylesheet": self.stylesheet_name}
        return self.templates["page"].render(body=self.templates[template].render(**values), **about)

    def message(self, title: str, text: str) -> str:
        return self.page(title, "message", title=title, text=text)


# -- Who reads, and what was asked for

KEPT = (*RANGE_PARAMETERS, "tz", "q", "show")  # on the way to other pages and back
TABLE_ROWS = (8, 80, 800)  # of campaigns and links: at first, and what "More" gives


@dataclass(frozen=True, slots=True)
class View:
    """Who reads a page, how they see times, and what they asked for; makes the links to the page asked otherwise."""

    pages: Pages
    tenant: Tenant
    zone: tzinfo
    now: int
    people: bool  # whether recipients, subjects and addresses may be shown
    segments: tuple[str, ...]  # of the path
    asked: Mapping[str, str]  # parameters that are not the default
    campaign: str | None = None  # whose page it is
    are_hidden: bool = False  # whether readers come through a proxy that is not believed
    about: Mapping[str, str] = field(default_factory=dict)  # what else it is of, as exports are asked for it

    def page(self, title: str, template: str, /, within: str = "", **values: object) -> str:
        """A page of the tenant's, perhaps within a campaign, with the ways back."""
        home, way = f"{self.base}/dashboard{self.kept}", joined()
        if within:
            way = joined(tag("a", tag("bdi", within), href=page_url(self, "campaigns", within)), " \u203a ")
        return self.pages.page(title, template, name=self.tenant.name, home=home, way=way, **values)

    @property
    def base(self) -> str:
        """From this page to where the pages of its tenant begin; relative, since a page has many links."""
        return "." if len(self.segments) == 2 else ".."

    def url(self, **changes: str) -> str:
        """This page with other parameters; "" takes one away."""
        query = {name: value for name, value in {**self.asked, **changes}.items() if value}
        return "?" + "&".join(f"{name}={quote(value, safe=':,')}" for name, value in query.items())

    @property
    def kept(self) -> str:
        """What links to other pages keep of what was asked for here, as a query."""
        return query_of(self, KEPT) and f"?{query_of(self, KEPT)}"

    def range_url(self, **asked: str) -> str:
        return self.url(**{**dict.fromkeys((*RANGE_PARAMETERS, "after"), ""), **asked})

    def most(self, table: str) -> int:
        """How many rows of a table that goes on in place are shown."""
        return next((rows for rows in TABLE_ROWS if self.asked.get(table) == str(rows)), TABLE_ROWS[0])

    def time(self, at: int | None) -> str:
        return f"{datetime.fromtimestamp(at / 1000, self.zone):%d %b %Y %H:%M}" if at else ""

    def ago(self, at: int | None) -> Markup:
        """A time as `3 minutes ago`, with the time itself beside it for who points at it."""
        if not at:
            return joined("–")
        return tag("span", ago((self.now - at) / 1000), title=self.time(at))


# -- Numbers, times and names, as people read them

NBSP = "\N{NO-BREAK SPACE}"
STATE_WORDS = {"person": "by people", "unconfirmed": "maybe read", "machine": "by machines"}
BY = {"person": "a person", "unconfirmed": "maybe a person", "machine": "a machine", "set_aside": "not counted"}
LEAST_COMPARED = 50  # on both sides: a rate of fewer says nothing


def counted(number: int, noun: str) -> str:
    """`1 email`, `2 emails`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


Amount = int | tuple[float, float] | None  # a number, or a rate: what is certain, and what may be


def ends_of(rate: tuple[float, float]) -> list[str]:
    """A rate in percent: one figure where it is certain, and two where it is not: at least, and at most."""
    low, high = (round(100 * share, 6) for share in rate)
    if high - low >= 2:  # so far apart, decimals say nothing; and neither end may promise too much
        return [f"{math.floor(low)}", f"{math.ceil(high)}"]
    return list(dict.fromkeys((f"{low:.1f}", f"{high:.1f}")))


def told(amount: Amount) -> str:
    if amount is None:
        return "–"
    return f"{amount:,}" if isinstance(amount, int) else f"{'–'.join(ends_of(amount))}{NBSP}%"


class Figure(NamedTuple):
    label: str
    now: Amount
    then: Amount  # in the time before; None: there was none
    detail: str  # what it is made of
    of: int = LEAST_COMPARED  # of how many emails a rate is, now or then: the fewer

    @property
    def before(self) -> str:
        """What it was in the time before."""
        if self.then is None or not (self.now or self.then) or self.of < LEAST_COMPARED:
            return ""
        return f"{told(self.then) if self.then else 'none'} before"


def made_of(counts: Mapping[str, int]) -> str:
    """`2 by people, 1 maybe read`: what is zero is not told, and machines have a figure of their own."""
    return ", ".join(f"{counts[state]:,} {STATE_WORDS[state]}" for state in ("person", "unconfirmed") if counts[state])


def happened(row: Mapping[str, Any], noun: str) -> list[str]:
    """What was done to one email, the surest first: `opened 3 times`, `maybe read`, `by machines once`."""
    verb, maybe = {"opens": ("opened", "maybe read"), "clicks": ("clicked", "maybe clicked")}[noun]
    numbers = {state: row[f"{noun}_{state}"] for state in STATE_WORDS}
    words = {"person": verb, "unconfirmed": maybe, "machine": "by machines"}
    is_read = noun == "opens" and row["clicks_person"] > 0 and not row["opens_person"]
    some = (state for state in STATE_WORDS if numbers[state] and not (is_read and state == "unconfirmed"))
    often = {state: " once" if number == 1 else f" {number:,} times" for state, number in numbers.items()}
    told = (words[state] + often[state] * (state != "unconfirmed") for state in some)
    return [*["read, as a click shows"] * is_read, *told]


def program_name(client: str, device: str) -> str:
    """A mail program as pages call it: what a provider's proxy hides is told as that."""
    return f"via {client.partition(',')[0]}" if client in hidden_programs() and not device else client


@lru_cache(maxsize=1)
def hidden_programs() -> set[str]:
    sections = ("proxy image-proxy", "prefetch")
    return {each.family for each in verdict_data().programs if each.section.startswith(sections)}


def by_whom(row: Mapping[str, Any]) -> str:
    """Who made a request, in a marketer's words."""
    return BY[STATE_NAMES[judgement_of(row["verdict"], row["reason"]).state]]


UNITS = (  # of a length of time: how many seconds it has, and up to how many a length is told in it
    *(("second", 1, 60), ("minute", 60, 2 * 3_600), ("hour", 3_600, 86_400), ("day", 86_400, 14 * 86_400)),
    *(("week", 7 * 86_400, 365 * 86_400), ("year", 365 * 86_400, math.inf)),
)


def lasting(seconds: float) -> str:
    """A length of time in one unit: `2 hours`."""
    noun, size = next((noun, size) for noun, size, limit in UNITS if seconds < limit)
    return counted(int(seconds // size), noun)


def ago(seconds: float) -> str:
    return "just now" if seconds < 60 else f"{lasting(seconds)} ago"


def short_url(url: str) -> str:
    return "(hidden link)" if url == HIDDEN_TARGET else re.sub(r"^https?://(?:www\.)?", "", url).rstrip("/")


def breakable(text: str) -> Markup:
    """An address as text, which a line can end in behind each @, dot and slash."""
    first, *others = re.split("(?<=[@./])(?=.)", text)
    return joined(first, *(joined(tag("wbr"), part) for part in others))


# -- Tables: a cell for each kind of column

SHORT = 24  # characters, which every table has room for: what is longer is told whole to who points at it
WITHOUT_SUBJECT = ("(not registered)", "(no subject)")  # by whether the email is registered
Row = Mapping[str, Any]


def text_cell(text: str, whole: str = "", url: str = "", head: bool = False) -> Markup:
    """A text that somebody else wrote, which the table may have to cut off; the whole is told to who points at it."""
    shown = tag("bdi", text)
    content = tag("a", shown, href=url) if url else shown
    return tag("th" if head else "td", content, scope="row" * head, title=whole or text * (len(text) > SHORT))


def share_bar(low: float, high: float) -> Markup:
    """A rate as a bar: what is certain, and what may be."""
    certain, rest = (f"{100 * min(share, 1):.0f}%" for share in (low, high - low))
    unsure = tag("rect", x=certain, width=rest) if high > low else ""
    return tag("svg", tag("rect", width=certain), unsure, aria_hidden="true")


def rate_cell(rate: tuple[float, float], whole: str = "") -> Markup:
    return tag("td", share_bar(*rate), f" {told(rate)}", class_="share", title=whole)


def share_cell(row: Row, label: str) -> Markup:
    """How many of a campaign's emails people certainly and perhaps opened or clicked, as a small bar and the rate."""
    totals = totals_of(row)
    certain, rate = {"Opened": totals.read, "Clicked": totals.clicked["person"]}[label], totals.rates[label]
    if rate:
        return rate_cell(rate, f"{certain:,} of {totals.emails:,}")
    # Keys that nobody was told of: what they make is no rate.
    of = f", of {totals.emails:,} told of" * totals.is_exceeded
    return tag("td", f"{certain:,}{of}" if certain or of else "–")


def spark_cell(hours: Sequence[int]) -> Markup:
    """How the opens of the first two days came, two hours a step: its shape alone."""
    steps = [sum(pair) for pair in zip(hours[::2], hours[1::2], strict=True)]
    runs = groupby(16 - round(16 * opens / max(*steps, 1)) for opens in steps)
    shape = "".join(f"V{height}h{3 * len([*run])}" for height, run in runs)
    path = tag("path", d=f"M0 16{shape}V16z")
    return tag("td", tag("svg", path, viewBox=f"0 0 {3 * len(steps)} 16", aria_hidden="true", class_="spark"))


def done_cell(row: Row, noun: str) -> Markup:
    """The surest of what was done to an email, with the links that people clicked; all of it to who points at it."""
    parts, links = happened(row, noun), ", ".join(map(short_url, row["links"])) if noun == "clicks" else ""
    css = "" if parts else "none"
    said = [parts[0].capitalize() if parts else "–", *([" ", tag("small", links)] if links else [])]
    whole = ", ".join((*parts, links) if links else parts)
    return tag("td", *said, title=whole * (len(parts) > 1 or len(whole) > SHORT), class_=css)


FEW = {"clicks_unconfirmed": "maybe", "clicks_machine": "machines", "opens_unconfirmed": "maybe read"}
CELLS: dict[str, Callable[[View, Row, str], Markup]] = {
    "text": lambda view, row, name: text_cell(row[name]),
    "device": lambda view, row, name: tag("td", row[name] or "not disclosed"),
    "program": lambda view, row, name: tag("th", program_name(row[name], row["device"]), scope="row"),
    "number": lambda view, row, name: tag("td", f"{row[name]:,}", class_="number"),
    "few": lambda view, row, name: tag(
        "td", f"{row[name]:,}" if row[name] else "", class_="number", data_of=FEW[name] * (row[name] > 0)
    ),
    "time": lambda view, row, name: tag("td", view.ago(row[name])),
    "url": lambda view, row, name: text_cell(
        short_url(row[name]),
        row[name],
        url="" if view.tenant.share else page_url(view, "links", str(row["id"]), "campaign"),  # whose page names people
        head=True,
    ),
    "with": lambda view, row, name: text_cell(program_name(*client_of(row[name])), row[name]),
    "mail": lambda view, row, name: text_cell(row.get(name) or row["key"], url=page_url(view, "emails", row["key"])),
    "done": lambda view, row, name: done_cell(row, name),
    "by": lambda view, row, name: tag("td", by_whom(row)),
    "campaign": lambda view, row, name: text_cell(row[name], url=page_url(view, "campaigns", row[name]), head=True),
    "share": lambda view, row, name: share_cell(row, name),
    "range": lambda view, row, name: rate_cell(
        (row[f"{name}_person"] / row["emails"], (row[f"{name}_person"] + row[f"{name}_unconfirmed"]) / row["emails"])
    ),
    "part": lambda view, row, name: rate_cell((row[name] / row["of"],) * 2) if row[name] else tag("td", ""),
    "spark": lambda view, row, name: spark_cell(row["curves"].get(row[name], [0, 0])),
    "subject": lambda view, row, name: text_cell(
        row.get(name) or WITHOUT_SUBJECT[row["registered"]],
        url=page_url(view, "emails", row["key"]),
        head="person" in view.about,  # else its head is the recipient
    ),
    "email": lambda view, row, name: text_cell(
        row.get(name) or row["key"], url=page_url(view, "emails", row["key"]), head=True
    ),
    "person": lambda view, row, name: text_cell(
        row.get(name) or row["key"], url=page_url(view, "people" if row.get(name) else "emails", row["key"]), head=True
    ),
    "way": lambda view, row, name: text_cell(
        short_url(row[name]) if row[name] else program_name(*client_of(row["user_agent"])),
        row[name] or row["user_agent"],
    ),
    "campaigns": lambda view, row, name: text_cell(
        row[name] if row["campaigns"] == 1 else counted(row["campaigns"], "campaign") if row["campaigns"] else "–"
    ),
}


def page_url(view: View, kind: str, name: str, *also: str) -> str:
    query = query_of(view, (*KEPT, *also))
    return f"{view.base}/{kind}/{quote(name, safe='')}{query and '?' + query}"


def query_of(view: View, names: Iterable[str]) -> str:
    """Some of what was asked for, to ask it of an export."""
    asked = {**view.asked, **view.about, "campaign": view.campaign or ""}
    return "&".join(f"{name}={quote(asked[name], safe='')}" for name in names if asked.get(name))


def export_url(view: View, table: str, form: str, filters: Iterable[str] = ()) -> str:
    """Where a table can be taken away, as far as the page shows it; as CSV for a spreadsheet, with the times of the page."""
    query = query_of(view, dict.fromkeys((*filters, "tz")) if form == "csv" else filters)
    words = "&".join(filter(None, ("whole" * (form == "csv"), query)))
    return f"{view.base}/{table}.{form}{'?' * bool(words)}{words}"


LARGEST_FIRST = ("number", "few", "share", "range", "done", "time")  # kinds of columns; of times, the newest


def column_head(view: View, table: str, column: Column) -> Markup:
    """The head of a column, by which the table is sorted, texts from A to Z; the other way round where it is."""
    css = "number" if column.kind in ("number", "few") else ""
    if not column.order:
        return tag("th", column.head, scope="col", class_=css)
    order, now = f"{table}.{column.order}", view.asked.get("sort", "")
    direction = {order: "descending", f"{order}.up": "ascending"}.get(now, "")
    ways = (order, f"{order}.up") if column.kind in LARGEST_FIRST else (f"{order}.up", order)
    url = view.url(sort=ways[now == ways[0]], after="") + f"#{table}"
    return tag("th", tag("a", column.head, href=url), scope="col", class_=css, aria_sort=direction)


def table_end(view: View, rows: Rows, name: str) -> Markup:
    """Where a table goes on, and where it can be taken away."""
    if rows.table is EVENTS:
        return joined()
    more = joined()
    larger = next((str(most) for most in TABLE_ROWS if most > view.most(name)), "")
    after, value = ("after", str(rows.next)) if rows.table in (EMAILS, CLICKS) else (name, larger)
    if rows.next and value:
        more = joined(tag("a", "More", href=f"{view.url(**{after: value})}#{name}", rel="next"), " · ")
    csv, json_ = (export_url(view, name, form, rows.table.filters) for form in EXPORT_TYPES)
    return joined(more, "Download ", tag("a", "CSV", href=csv), " or ", tag("a", "JSON", href=json_))


def is_shown(view: View, table: str, column: Column, rows: Sequence[Row]) -> bool:
    """Whether a column says anything: not, if it is the same, or nothing, in all rows, or was not given."""
    if column.kind in ("part", "spark"):
        return {"part": "of", "spark": "curves"}[column.kind] in rows[0]
    if column.kind == "few" and not view.asked.get("sort", "").startswith(f"{table}.{column.order}"):
        return any(row[column.field] for row in rows)
    return not (view.campaign and column.head == "Campaign") and not (
        "person" in view.about and column.kind == "person"
    )


def emails_shown(view: View, rows: Rows) -> Markup:
    """Which emails a table shows, and buttons for others; how many a search found."""
    items, found, now = list[Markup](), joined(), view.asked.get("show", "all")
    for name, (label, _) in SHOWN.items():
        url = view.url(show="" if name == "all" else name, after="") + "#emails"
        about = view.pages.words[f"show-{name}"].format(MOST_SORTED)
        items.append(tag("li", tag("a", label, href=url, title=about, aria_current="true" * (name == now))))
    if rows.found:
        newest, older = rows.found
        also = f" and {older:,} older that begin so" if older else ""
        text = f": {newest:,} of the newest {MOST_SEARCHED:,}{also}. "
        everything = tag("a", "Show all", href=view.url(q="", after="") + "#emails")
        found = tag("p", "Found by “", tag("bdi", view.asked.get("q", "")), f"”{text}", everything, class_="found")
    return joined(tag("ul", *items, class_="strip", aria_label="Which emails are shown"), found)


def table_section(view: View, rows: Rows, **given: Any) -> Markup:
    """A table; of campaigns with `curves`, by their names; of links with `of` how many clicks each has its share."""
    table = rows.table
    name, text, is_older = "hits" if table is EVENTS else table.name, table.empty, "after" in view.asked
    above = emails_shown(view, rows) if table is EMAILS else ""
    if rows.next:
        text = f"None of the {'next' if is_older else 'newest'} {MOST_SORTED:,} is like that."
    elif table is EMAILS and ("q" in view.asked or view.asked.get("show", "all") != "all"):
        nobody = "Nobody" if view.asked.get("show") == "never" else "No email"
        text = f"{'No older email' if is_older else nobody} is like that."
    if not rows.rows:
        end = tag("p", table_end(view, rows, name), class_="quiet take") if rows.next else ""
        said = tag("h2", table.title, id=name), above, tag("p", text, class_="quiet"), end
        return tag("section", *said, aria_labelledby=name)
    named = [{**row, **given} for row in rows.named(view.people)]
    columns = [column for column in table.columns if is_shown(view, name, column, named)]
    lines = ((CELLS[column.kind](view, row, column.field) for column in columns) for row in named)
    body = joined(*(tag("tr", *line) for line in lines))
    heads = joined(*(column_head(view, name, column) for column in columns))
    note = "" if view.campaign or table is EVENTS else "whole days of the range" if table is PROGRAMS else "of all time"
    title, what = joined(table.title, " ", tag("small", note)), table.title.lower()
    told = {"name": name, "what": what, "title": title, "above": above, "take": table_end(view, rows, name)}
    return view.pages.templates["_table"].render(**told, heads=heads, rows=body)


# -- The curve

_LINE, _CELL = Template("<tr><th>$label$cells"), Template("<td>$text")  # hundreds, so without the ends that HTML spares
PANELS = {"opens": (16, 120), "clicks": (164, 60)}  # where one begins and how high it is, in pixels


def round_top(value: int) -> int:
    """The least even one of 2, 3, 4, 6, 8, 10, 20, 30, … that is not below the value: a round axis with a middle."""
    tops: Iterator[int] = (step * 10**zeros for zeros in range(19) for step in (2, 3, 4, 6, 8, 10))
    return next(top for top in tops if top >= value and top % 2 == 0)


def bars_of(steps: Sequence[Counts], states: Iterable[str], tops: Mapping[str, int]) -> dict[str, str]:
    bars = dict.fromkeys(STATE_WORDS, "")
    for n, step in enumerate(steps):
        for noun, (top, height) in PANELS.items():
            count, above = 0, top + height
            for state in states:
                count += step[noun][state]
                upper = top + height - round(height * count / tops[noun])
                if step[noun][state]:
                    upper = min(upper, above - 1)  # the least is seen as well
                    bars[state] += f"M{n}.5 {upper}v{above - upper}"
                above = upper
    return bars


def curve(view: View, period: Period, counts: Sequence[Counts], hours: int = 0) -> Markup:
    """Opens and clicks over time as bars, people at the bottom; the first steps may be hours."""
    # Across, a step is a unit, stretched to the width of the window; up, a unit is a pixel: so letters keep their size.
    states = list(STATE_WORDS)[: 3 if "machines" in view.asked else 2]
    tops = {noun: round_top(max(sum(step[noun][state] for state in states) for step in counts)) for noun in PANELS}
    width = 100 / len(counts)
    steps, rows = [], []
    marks: list[Markup] = []
    for n, step in enumerate(counts):
        label = step_label(period, n, hours)
        numbers = {noun: [f"{step[noun][state]:,}" for state in states] for noun in PANELS}
        told = " · ".join(f"{'+'.join(some)} {noun}" for noun, some in numbers.items())
        rect = tag("rect", x=f"{round(n * width, 2)}%", width=f"{round(width, 2)}%")
        steps.append(tag("a", rect, tag("text", f"{label}: {told}"), href=step_url(view, period, n)))
        if any(step[noun][state] for noun in PANELS for state in states):
            cells = (_CELL.render(text=each) for each in chain(*numbers.values()))
            rows.append(_LINE.render(label=label, cells=joined(*cells)))
        if n % -(-len(counts) // 8) == 0:  # at most eight labels fit
            css = "m n" if len(marks) % (4 if hours else 2) else "m"
            marks.append(tag("text", label, x=f"{n * width + width / 2:.1f}%", y=242, class_=css))
    heads = (f"{noun.capitalize()} {STATE_WORDS[state].removesuffix(' read')}" for noun in PANELS for state in states)
    return view.pages.templates["_curve"].render(
        opens_top=f"{tops['opens']:,}",
        opens_middle=f"{tops['opens'] // 2:,}",
        clicks_top=f"{tops['clicks']:,}",
        count=len(counts),
        steps=joined(*steps),
        marks=joined(*marks),
        nothing="" if rows else tag("text", "Nothing in this range", class_="nothing", x="50%", y=110),
        heads=joined(*(tag("th", head, scope="col") for head in heads)),
        rows=joined(*rows),
        step="hour, then a " * (0 < hours < len(counts)) + period.step,
        **bars_of(counts, states, tops),
    )


def step_url(view: View, period: Period, n: int) -> str:
    """The dashboard of a step's day, or days; a campaign's curve leads nowhere, since no dashboard is of it alone."""
    if view.campaign:
        return ""
    begin, end = (str(period.day(at)) for at in (period.starts[n], [*period.starts, period.end][n + 1] - 1))
    return view.range_url(**({"on": begin} if period.step in ("hour", "day") else {"from": begin, "to": end}))


def step_label(period: Period, n: int, hours: int) -> str:
    local = datetime.fromtimestamp(period.starts[n] / 1000, period.zone)
    day = f"{local.day} {local:%b}"
    return local.strftime(f"{day} %H:%M" if n < hours else {"hour": "%H:%M", "month": "%b %Y"}.get(period.step, day))


# -- Figures


def sent_figures(totals: Totals, before: Totals | None = None) -> list[Figure]:
    """What became of some mail, the most important first."""
    only, of = totals.clicked_without_open, f", of {totals.emails:,} told of" * totals.is_exceeded
    person, maybe = totals.opened["person"], totals.maybe_read
    parts = {
        f"{person:,} by people": person,
        f"{only:,} {'more ' * (person > 0)}clicked, so they read it": only,
        f"{maybe:,} maybe read": maybe,
    }
    details = {
        "Opened": "; ".join(filter(parts.get, parts)) + of,
        "Clicked": made_of(totals.clicked) + of,
        "Click-to-open": f"of {counted(totals.read, 'email')} that people read" if totals.read else "",
        "Sent": "emails",
    }
    now, then = ({**each.rates, "Sent": each.emails} if each else {} for each in (totals, before))
    figures = []
    for label, detail in details.items():
        sizes = (each.read if label == "Click-to-open" else each.emails for each in (totals, before or totals))
        least = LEAST_COMPARED if label == "Sent" else min(sizes)
        figures.append(Figure(label, now[label], then.get(label), detail, least))
    return figures


def activity_figures(now: Counts, emails: Counts, then: Counts | None = None) -> list[Figure]:
    """What came in, in how many emails: opens and clicks by people, and machines in a figure of their own."""
    figures = []
    for noun, maybe in {"opens": "read", "clicks": "by people"}.items():
        of, unsure = emails[noun]["person"], now[noun]["unconfirmed"]
        parts = {f"by people, in {counted(of, 'email')}": of, f"{unsure:,} maybe {maybe}": unsure}
        detail = "; ".join(filter(parts.get, parts))
        figures.append(Figure(noun.capitalize(), now[noun]["person"], then[noun]["person"] if then else None, detail))
    machines, before = ({noun: each[noun]["machine"] for noun in each} if each else {} for each in (now, then))
    detail = " and ".join(counted(number, noun[:-1]) for noun, number in machines.items() if number)
    detail = detail and f"{detail}, in no other number"
    return [*figures, Figure("Machines", sum(machines.values()), sum(before.values()) if then else None, detail)]


def figure_list(view: View, figures: Iterable[Figure]) -> Markup:
    """Figures as a list, the most important first; it is larger, and says what a range means."""
    items: list[Markup] = []
    for figure in figures:
        label, now = figure.label, figure.now
        about, first, lines, why = view.pages.words[label], label == "Opened", list[Markup](), joined()
        if first and isinstance(now, tuple):
            means = view.pages.words["range"].format(*ends_of(now)).split(" | ") if len(ends_of(now)) > 1 else ()
            lines = [share_bar(*now), *(tag("small", text) for text in means)]
        if label in ("Opened", "Machines") and "person" not in view.about:
            why = joined(" ", tag("a", "Why?", href="#why"))
        if whose := "of this campaign" * bool(view.campaign) or "to this person" * ("person" in view.about):
            about = re.sub("(sent )?in this range(, whenever [a-z ]+ sent)?", whose, about)
        change = tag("span", figure.before, class_="change")
        told_all = tag("b", told(now)), " ", change, *lines, tag("small", figure.detail, why)
        items.append(tag("div", tag("dt", label, title=about), tag("dd", *told_all), class_="first" * first))
    return joined(*items)


# -- Pages


def kept_fields(view: View, *without: str) -> Markup:
    """What a form must send along, so that the page stays what it is otherwise."""
    kept = ((name, value) for name, value in view.asked.items() if name not in without)
    return joined(*(tag("input", type="hidden", name=name, value=value) for name, value in kept))


def search_form(view: View) -> Markup:
    if view.tenant.share:
        return joined()
    return view.pages.templates["_search"].render(
        kept=kept_fields(view, "q", "after", "sort"),
        text=view.asked.get("q", ""),
        about="recipient, subject, campaign or key" if view.people else "key",
    )


def activity_part(view: View, figures: Iterable[Figure], drawn: Markup, reasons: Iterable[Row], below: str) -> Markup:
    """What came in: figures, their curve, and why they are so."""
    machines = "machines" in view.asked
    other = view.url(machines="" if machines else "1") + "#curve"
    line, lines = view.pages.templates["_reason"], list[Markup]()
    for row in reasons:
        said = {**row, "hits": f"{row['hits']:,}", "counts_as": BY[row["counts_as"]]}
        lines.append(line.render(**said, sentence=sentence_of(row["reason"]) or row["reason"]))
    return view.pages.templates["_activity"].render(
        figures=figure_list(view, figures),
        machines_key=joined(" + ", tag("span", "by machines", class_="machine")) if machines else "",
        machines=tag("a", f"{'Without' if machines else 'With'} machines", href=other),
        curve=drawn,
        following=below,
        reasons=joined(*lines),
    )


def range_form(view: View, period: Period, typed: Mapping[str, str], fault: str) -> Markup:
    """Days and a zone of one's own; with what is wrong about them, and still as they were typed."""
    days = {"from": period.day(period.starts[0]), "to": period.day(period.end - 1), "tz": period.zone}
    return view.pages.templates["_range"].render(
        kept=kept_fields(view, *RANGE_PARAMETERS, "tz", "after"),
        open="open" if fault or not period.name else "",
        fault=tag("p", re.sub("^tz", "time zone", fault), class_="fault", role="alert") if fault else "",
        **{{"from": "begin", "to": "end", "tz": "zone"}[name]: typed.get(name, day) for name, day in days.items()},
    )


def dashboard_page(
    view: View, stats: Stats, tables: Mapping[str, Rows], curves: Mapping[str, Any], waiting: int, form: Markup
) -> str:
    period, tenant = stats.period, view.tenant
    days = dict.fromkeys(f"{day.day} {day:%b %Y}" for day in map(period.day, (period.starts[0], period.end - 1)))
    name = RANGES[period.name].replace("all", "all so far").capitalize() + ": " if period.name else ""
    sent_before, hits_before = stats.before or (None, None)
    ranges = (
        tag("li", tag("a", label, href=view.range_url(range=name), aria_current="page" * (name == period.name)))
        for name, label in RANGES.items()
    )
    before = RANGES.get(period.name, "same length of time")
    figures = activity_figures(stats.hits, stats.emails, hits_before)
    given = {"campaigns": {"curves": curves}}
    csv = {f"{name}_csv": export_url(view, name, "csv") for name in ("emails", "events")}
    return view.page(
        f"{tenant.name}: opens and clicks",
        "dashboard",
        told=f"{name}{' – '.join(days)}, {period.zone}",  # `30 days: 31 Oct 2026 – 29 Nov 2026, UTC`
        last_hit=view.ago(stats.last_hit_at) if stats.last_hit_at else "none so far",
        ranges=joined(*ranges),
        range_form=form,
        notices=joined(*dashboard_notices(view, stats, waiting)),
        sent=figure_list(view, sent_figures(stats.sent, sent_before)),
        compared=f"; compared with the {before} before" if stats.before else "",
        activity=activity_part(view, figures, curve(view, period, stats.steps), stats.reasons, "campaigns"),
        search=search_form(view),
        downloads=joined() if tenant.share else view.pages.templates["_downloads"].render(exports=view.base, **csv),
        exports=view.base,
        parameters=query_of(view, (*RANGE_PARAMETERS, "tz")),
        **{name: table_section(view, tables[name], **given.get(name, {})) if name in tables else "" for name in TABLES},
    )


def empty_page(view: View, stats: Stats, waiting: int, trial: Markup, hits: Rows) -> str:
    """What somebody sees who has sent nothing yet."""
    return view.page(
        f"{view.tenant.name}: opens and clicks",
        "empty",
        notices=joined(*dashboard_notices(view, stats, waiting)),
        trial=trial,
        hits=table_section(view, hits) if hits.rows else "",
    )


def campaign_page(view: View, stats: CampaignStats, tables: Mapping[str, Rows]) -> str:
    before, compared = stats.before_sums, ""
    *rates, sent = sent_figures(stats.sent, before)
    if before:
        compared = f", with what the {counted(len(stats.before), 'campaign')} before had come to when as old"
        sent = sent._replace(then=round(before.emails / len(stats.before)))
    half = ""
    if stats.half_after:  # rounded up, since it is said of a time within which they had
        hours, days = (-(-stats.half_after // size) for size in (HOUR_MS, DAY_MS))
        took = counted(days, "day") if hours > FIRST_HOURS else counted(hours, "hour")
        half = f"Half of the emails that people opened had been opened within {took}. "
    activity = activity_figures(stats.hits, {"opens": stats.sent.opened, "clicks": stats.sent.clicked})
    drawn = curve(view, stats.period, stats.steps, stats.hours)
    given = {"links": {"of": stats.hits["clicks"]["person"]}}
    return view.page(
        f"{stats.campaign}: {view.tenant.name}",
        "campaign",
        campaign=stats.campaign,
        first=f"about {view.time(stats.begun)}, {ago(stats.age / 1000)}",
        last=view.ago(stats.last_hit_at),
        now=f"{view.time(view.now)}, {view.zone}",
        age=lasting(stats.age // 1000),
        compared=compared,
        figures=figure_list(view, [*rates, sent]),
        half=half,
        activity=activity_part(view, activity, drawn, stats.reasons, "links"),
        numbers=f"{view.base}/campaigns/{quote(stats.campaign, safe='')}.json?{query_of(view, ['tz'])}",
        search=search_form(view),
        **{"emails": "", **{name: table_section(view, rows, **given.get(name, {})) for name, rows in tables.items()}},
    )


def evidence_of(row: Row) -> Hit:
    """A hit as far as a page has it, to say what speaks for and against a person in it."""
    reason, agent, type_ = row["reason"], row["user_agent"], CLICK if row["event_type"] == "click" else OPEN
    cut = judgement_of(row["verdict"], reason) if not agent and reason != "no-user-agent" else None
    said = row["method"], "", "", row["url"], "", row.get("ip_address") or "", agent or ""
    purpose, own = "prefetch" * (reason == "prefetch-header"), reason == "own-address"
    return Hit("", row["timestamp"], type_, *said, purpose, "", reason, own=own, fixed=cut)


def weighed(signs: Iterable[str]) -> str:
    """What spoke for and against, in a line."""
    told = {"For a person": list[str](), "Against": list[str]()}
    for votes, text in map(verdict_data().signs.__getitem__, signs):
        told["Against" if votes else "For a person"].append(text)
    return " ".join(f"{side}: {'; '.join(texts)}." for side, texts in told.items() if texts)


def timeline_row(view: View, hit: Row, signs: Iterable[str], arrived: int | None, arrival: str) -> Markup:
    at, url, agent, after = hit["timestamp"], hit["url"], hit["user_agent"], ""
    client = client_of(agent)
    if arrived:
        after = f"{lasting(abs(at - arrived) // 1000)} {'after' if at >= arrived else 'before'} {arrival}"
    said = (tag("small", text) for text in (sentence_of(hit["reason"]), weighed(signs)) if text)
    why = tag("b", by_whom(hit)), *said
    return tag(
        "tr",
        tag("th", tag("time", view.time(at), datetime=iso_time(at)), tag("small", after), scope="row"),
        tag("td", hit["event_type"] + ", HEAD" * (hit["method"] == "HEAD")),
        tag("td", *why, class_="wide", title=f"{hit['verdict']} {hit['reason']}"),
        text_cell(", ".join(filter(None, (program_name(*client), client[1]))), agent or "(no user agent)"),
        text_cell(short_url(url), url) if url else tag("td", ""),
        tag("td", hit.get("ip_address") or "–"),
    )


def email_page(view: View, emails: Rows, hits: Rows, context: Context) -> str:
    [email] = emails.named(view.people)
    signs = explain(list(map(evidence_of, hits.named())), context)
    timeline = zip(reversed(hits.named(view.people)), reversed(signs), strict=True)
    key, subject, delivered = email["key"], email.get("subject"), email["delivered_at"]
    recipient: str = email.get("recipient") or ""
    reader = tag("a", breakable(recipient), href=page_url(view, "people", key)) if recipient else "–" * view.people
    arrived, arrival = delivered or email["sent_at"], "it was delivered" if delivered else "it was sent"
    about = {
        "Recipient": reader,
        "Sent": view.time(email["sent_at"]) or "not registered",
        "Delivered": view.time(delivered),
        "Opens": ", ".join(happened(email, "opens")).capitalize() or "–",
        "Clicks": ", ".join(happened(email, "clicks")).capitalize() or "–",
        "Key": key,
    }
    return view.page(
        f"{subject or key}: {view.tenant.name}",
        "email",
        within=email["campaign"],
        title=subject or f"Email {key}",
        about=joined(
            *(tag("div", tag("dt", name), tag("dd", tag("bdi", about[name]))) for name in about if about[name])
        ),
        timeline=view.pages.templates["_timeline"].render(
            hits=joined(*(timeline_row(view, *each, arrived, arrival) for each in timeline)),
            count=counted(len(hits.rows), "request") + (" of more; all are in the export" if hits.next else ""),
            **{form: export_url(replace(view, about={"key": key}), "events", form, ("key",)) for form in EXPORT_TYPES},
            zone=view.zone,
        )
        if hits.rows
        else tag("p", EVENTS.empty, class_="quiet"),
    )


def link_page(view: View, links: Rows, clicks: Rows) -> str:
    """A link, and who clicked it: people alone, unless machines are asked for."""
    [link] = links.named()
    url, machines = link["url"], "machines" in view.asked
    way = tag("a", breakable(url), href=url, rel="noreferrer nofollow") if re.match("https?://", url) else url
    other = view.url(machines="" if machines else "1")
    people, unsure, others = (link[f"clicks_{state}"] for state in STATES.values())
    more = f"; {unsure:,} maybe by people" * (unsure > 0) + f"; {others:,} by machines" * (others > 0)
    return view.page(
        f"{short_url(url)}: {view.tenant.name}",
        "link",
        title=breakable(short_url(url)),
        within=view.campaign or "",
        destination=way,
        numbers=f"{counted(people, 'click')} by people, in {counted(link['emails_person'], 'email')}{more}.",
        machines=tag("a", "Show people alone" if machines else "Show machines too", href=other),
        clicks=table_section(view, clicks),
    )


def person_page(view: View, recipient: str, totals: Totals, emails: Rows, done: Rows) -> str:
    """All that one recipient got and did."""
    return view.page(
        f"{recipient}: {view.tenant.name}",
        "person",
        recipient=breakable(recipient),
        figures=figure_list(view, sent_figures(totals)),
        emails=table_section(view, emails),
        done=table_section(view, done),
    )


def can_allow(host: str, reason: str) -> bool:
    """Whether `tenant set --domain` would make links to this host redirect."""
    try:
        return reason == "destination-not-allowed" and read_destination(host) == host
    except BadInput:
        return False


def dashboard_notices(view: View, stats: Stats, waiting: int) -> Iterator[Markup]:
    """What a reader must know before believing the numbers; what whoever runs this tracker can do, apart from it."""
    tenant, others, words = view.tenant, stats.unregistered, view.pages.words

    def notice(name: str, **values: object) -> Markup:
        text, *commands = (part.format(tenant=tenant, **values) for part in words[name].split(" | "))
        more = tag("details", tag("summary", "For the operator"), *(tag("pre", tag("code", each)) for each in commands))
        return tag("div", tag("p", text), more if commands and not tenant.share else "", class_="notice")

    if tenant.share:
        yield notice("shared", until=view.time(tenant.share.ends_at))
    if zone_named(tenant.tz) is None:
        yield notice("no-zone")
    if view.are_hidden:
        yield notice("hidden")
    if waiting:
        yield notice("waiting", requests=counted(waiting, "request"))
    if len(stats.machines) > 1:
        late = [each for each in stats.machines if each.at < now_ms() - 5_000]
        names = "".join(f"; {each.name} not since {view.time(each.at)}" for each in late)
        yield notice("drained", machines=counted(len(stats.machines) - len(late), "machine"), late=names)
    if tenant.id_in_mail_at and not (tenant.one_id or tenant.share):
        yield notice("id-in-mail", seen=view.time(tenant.id_in_mail_at))
    if tenant.suspended:
        yield notice("suspended-now")
    for each in stats.webhooks if not tenant.share else ():
        if each.off:
            yield notice("webhook-off", url=each.url, trouble=each.trouble)
    if others.emails:
        parts = {"Opened": made_of(others.opened), "Clicked": made_of(others.clicked)}
        told = " ".join(f"{verb}: {text}." for verb, text in parts.items() if text)
        yield notice("of-nobody", emails=counted(others.emails, "email"), told=told)
    if stats.untracked:
        some = " and ".join(counted(hits, type_) for type_, hits in stats.untracked.items())
        yield notice("untracked", requests=some)
    for what, hits in stats.over.items():
        yield notice("over", requests=counted(hits, "request"), what=words[what])
    for host, reason, clicks in stats.named:
        name = "named-allow" if can_allow(host, reason) else "named"
        yield notice(name, clicks=counted(clicks, "click"), host=host or "other hosts", why=words[reason])
    if tenant.one_id and not view.people:
        yield notice("no-people")


# == Web ===============================================================================================
# Requests, responses and errors; nothing here knows what the tracker does.

TEXT_TYPE = "text/plain; charset=utf-8"
MAX_BODY = 10 << 20
HEAVY_BYTES = 256 << 10  # of a body; a larger one is read and worked on alone
HEAVY_ROWS = 1_000  # of an export
REASON_PHRASES = {status.value: status.phrase for status in HTTPStatus}
PAGE_HEADERS = [
    (
        "Content-Security-Policy",
        "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Robots-Tag", "noindex"),
    ("Cache-Control", "no-store"),
]

Headers = Sequence[tuple[str, str]]


@dataclass(eq=False)
class HTTPError(Exception):
    """An answer that is not the one asked for; may be raised anywhere below the application."""

    status: int
    message: str
    headers: Headers = ()


class Proxies:
    """Who may say on whose behalf a request comes."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self._anyone = "*" in allowed
        self._networks: list[Network] = [ipaddress.ip_network(entry) for entry in allowed if entry != "*"]
        self._hosts = {str(network.network_address) for network in self._networks}
        self._only_hosts = all(network.num_addresses == 1 for network in self._networks)

    def client(self, peer: str, forwarded: str) -> tuple[str, bool]:
        """The client's address; and whether a proxy was not believed: then readers behind it all have its own."""
        # X-Forwarded-For from the right, up to the first that is no proxy of ours: further left stands only what a
        # client may have made up. A peer without an address is a unix socket's.
        if peer and not self._anyone and not self._is_proxy(peer):
            return peer, forwarded != ""
        client = peer
        for text in reversed(forwarded.split(",")):
            if address := text.strip():
                client = address
                if not self._is_proxy(address):
                    break
        return client, False

    def _is_proxy(self, address: str) -> bool:
        if self._only_hosts and IPV4.fullmatch(address):
            return address in self._hosts
        parsed = read_address(address)
        return parsed is not None and any(parsed in network for network in self._networks)


class Request(NamedTuple):
    environ: WSGIEnvironment
    method: str
    uri: str  # the request target as received, without the path of BASE_URL
    segments: tuple[str, ...]
    query: str
    host: str  # of the Host header, without port
    address: str  # the client's, after believed proxies; "" if unknown
    is_hidden: bool  # whether a proxy said another's address, and was not believed

    @property
    def origin(self) -> str:
        """Where the request went, as a URL without its scheme."""
        return "//" + utf8(self.environ.get("HTTP_HOST", ""))

    def parameters(self) -> dict[str, str]:
        """The query's parameters; the first of a name counts."""
        return dict(reversed(parse_qsl(self.query, keep_blank_values=True)))

    def bearer(self) -> str | None:
        """The key of `Authorization: Bearer KEY`."""
        scheme, _, key = utf8(self.environ.get("HTTP_AUTHORIZATION", "")).partition(" ")
        return key.strip() if scheme.lower() == "bearer" else None

    @property
    def is_heavy(self) -> bool:
        """Whether its body is large, or may be."""
        said, is_chunked = self.environ.get("CONTENT_LENGTH") or "", "HTTP_TRANSFER_ENCODING" in self.environ
        return len(said) > 6 or (int(said) > HEAVY_BYTES if said.isdecimal() else is_chunked)

    def body(self) -> bytes:
        """The whole body. Raises HTTPError 400 if it is not there, 413 if it is too large."""
        stream, said = self.environ["wsgi.input"], self.environ.get("CONTENT_LENGTH") or ""
        if not re.fullmatch("[0-9]{0,15}", said):
            raise HTTPError(400, "Content-Length: expected a number")
        if not said and not self.environ.get("wsgi.input_terminated"):
            return b""  # such a server would wait for ever
        length = int(said or MAX_BODY + 1)
        try:
            body: bytes = stream.read(min(length, MAX_BODY + 1))
        except Exception:  # gunicorn's errors for broken chunks have no common ancestor but this
            raise HTTPError(400, "expected a whole body; it broke off") from None
        if max(len(body), int(said or 0)) > MAX_BODY:
            raise HTTPError(413, f"expected a body of at most {MAX_BODY >> 20} MB")
        if said and len(body) < length:
            raise HTTPError(400, f"expected a whole body of {length} bytes; it broke off after {len(body)}")
        return body


class Response(NamedTuple):
    status: int
    headers: Headers
    body: bytes | Generator[bytes, None, None]


def utf8(text: str) -> str:
    """Text that WSGI gave as latin-1, read as the UTF-8 it most likely is."""
    return text if text.isascii() else text.encode("latin-1", "replace").decode("utf-8", "backslashreplace")


def read_request(environ: WSGIEnvironment, proxies: Proxies, mount: re.Pattern[str] | None) -> Request:
    """What the handlers need of a request, below BASE_URL's path. Raises HTTPError 400 for headers that are two."""
    if not (uri := environ.get("RAW_URI") or environ.get("REQUEST_URI")):
        path = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
        uri = quote(path.encode("latin-1", "replace"), safe="/~+@=:!$&'()*,;") or "/"
        if environ.get("QUERY_STRING"):
            uri += "?" + environ["QUERY_STRING"]
    host = environ.get("HTTP_HOST", "")
    forwarded = environ.get("HTTP_X_FORWARDED_FOR", "")
    if has_break(host + forwarded + environ.get("HTTP_USER_AGENT", "") + environ.get("HTTP_AUTHORIZATION", "")):
        raise HTTPError(400, "a header holds a line break or NUL; expected none")
    uri = utf8(uri)
    if mount and (found := mount.match(uri)):
        uri = "/" + uri[found.end() :]
    client, is_hidden = proxies.client(environ.get("REMOTE_ADDR", ""), forwarded)
    is_hidden = is_hidden or "HTTP_X_NOT_BELIEVED" in environ  # by the printed nginx
    target = split_target(uri)
    return Request(environ, environ["REQUEST_METHOD"], uri, *target, host_name(utf8(host)), client, is_hidden)


def has_break(text: str) -> bool:
    """Whether a header would end early or be two."""
    return "\n" in text or "\r" in text or "\0" in text


@lru_cache(maxsize=512)
def kept_address(address: str, setting: str) -> str:
    """What is kept of an address before anything is written: IP_ADDRESSES decides."""
    if setting == "truncated" and (match := IPV4.fullmatch(address)):
        return match[1] + "0"
    if (parsed := read_address(address)) is None or setting == "none":
        return ""
    if setting == "full":
        return str(parsed)
    return str(ipaddress.ip_network(f"{parsed}/{24 if parsed.version == 4 else 48}", strict=False).network_address)


@contextlib.contextmanager
def heavy(folder: str, wait: bool = False) -> Iterator[None]:
    """One such request at a time on the whole server: others would keep all workers from answering pixels."""
    with open(os.path.join(folder, "heavy.lock"), "ab") as lock:
        if not take_lock(lock.fileno(), wait=wait):
            raise HTTPError(503, "Another large request is under way; try again.", [("Retry-After", "2")])
        yield


def html_response(status: int, page: str, headers: Headers = ()) -> Response:
    return Response(status, [("Content-Type", "text/html; charset=utf-8"), *PAGE_HEADERS, *headers], page.encode())


def json_response(status: int, value: object, headers: Headers = ()) -> Response:
    """JSON, which nobody may keep or frame."""
    indent = None if isinstance(value, list) else 1  # a thousand items, indented, would take a worker's memory for good
    body = json.dumps(value, ensure_ascii=False, indent=indent).encode("utf-8", "backslashreplace") + b"\n"
    return Response(status, [("Content-Type", EXPORT_TYPES["json"]), *PAGE_HEADERS, *headers], body)


def send(response: Response, method: str, start_response: StartResponse) -> Iterable[bytes]:
    """The only place that calls start_response. HEAD gets the headers of a GET and no body."""
    status, headers, body = response
    headers = [*headers, ("Content-Length", str(len(body)))] if isinstance(body, bytes) else list(headers)
    for name, value in headers:
        if has_break(value):
            raise ValueError(f"header {name} would hold a line break")
    start_response(f"{status} {REASON_PHRASES[status]}", headers)
    if method != "HEAD":
        return [body] if isinstance(body, bytes) else body
    if not isinstance(body, bytes):
        body.close()
    return [b""]


# == Hits ==============================================================================================
# What outlives a request, and the handlers that everybody reaches: pixels, links, health, files.

NEVER_KEPT = "no-store, no-cache, max-age=0, must-revalidate, private"
PIXEL_HEADERS = (("Content-Type", "image/gif"), ("Cache-Control", NEVER_KEPT))
REDIRECT_HEADERS = (("Cache-Control", "no-store"), ("X-Robots-Tag", "noindex"), ("Content-Type", TEXT_TYPE))
PURPOSE_HEADERS = ("HTTP_SEC_PURPOSE", "HTTP_PURPOSE", "HTTP_X_PURPOSE", "HTTP_X_MOZ")
MOST_FOR_READERS = 500  # hits that wait, which who asks for numbers drains first: a worker waits for that
REST_SECONDS = 0.003  # that a page takes longer while there is a backlog: who asks again and again leaves it time
HIDDEN_SECONDS = 86_400  # for which it is said that readers are hidden
HIDDEN_SHARE = 10  # one hit of so many: some readers' own proxies say X-Forwarded-For too, and so may a stranger
HIDDEN = (
    "a proxy's X-Forwarded-For is not believed, so its readers all have one address; if the proxy is yours, "
    "expected it in FORWARDED_ALLOW_IPS, or nginx's file printed with `--real-ip-from NETWORK`"
)
BEARER = (("WWW-Authenticate", "Bearer"),)
OPERATORS = "Expected the operator's key: Authorization: Bearer API_KEY."
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"  # Prometheus' text form
UNKNOWN_A_SECOND = 100  # hits for unknown mail ids that a worker records in a second


class App:
    """What outlives a request: settings, spool, database, directory, secrets, pages."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.pages = Pages(settings.base_path)
        mount = f"(?:(?i:https?)://[^/?]*)?{settings.base_pattern}(?=[/?]|$)/*"
        self.mount = re.compile(mount) if settings.base_path else None
        verdict_data()  # as with pages: its files may be others later
        self.proxies = Proxies(settings.forwarded_allow_ips)
        self.database = open_database(settings, patience=5.0)  # seconds for its turn to write; then it is a 503
        self.spool = Spool(settings.spool)
        self.choices = Spool(settings.spool, "-emails")  # which are drained before hits
        self.directory = Directory(settings.folder)
        self._secrets = link_secrets(settings, self.database)
        self.drainer: Drainer | None = None
        self._started_in = 0
        self._unknown = (0, 0)  # a second, and the hits for unknown mail ids in it
        self._hits, self._hidden = 0, 0  # and of them those by a proxy that was not believed

    @property
    def secrets(self) -> tuple[str, ...]:
        """The keys that sign links; looked for again where the database was made after this process began."""
        self._secrets = self._secrets or link_secrets(self.settings, self.database)
        return self._secrets

    def start(self) -> None:
        """Begin to drain in this process, once."""
        if self._started_in != os.getpid():
            self._started_in = os.getpid()
            sys.setswitchinterval(0.0005)  # the drain gives way to a request so often, and not after 5 ms each time
            own = open_database(self.settings, patience=1.0)  # a connection that no request waits for
            self.database.leave = own.leave = partial(os.kill, os.getpid(), signal.SIGTERM)
            self.drainer = drainer_of(own, self.settings)
            self.drainer.start()
            atexit.register(self.close)

    def close(self) -> None:
        """Finish the segment, drain what is left, close the database: for the end of a process."""
        self.spool.close()
        self.choices.close()
        if self.drainer is not None and self._started_in == os.getpid():
            self.drainer.stop()
            self.drainer = None
            until, busy = time.monotonic() + 10.0, True
            with contextlib.suppress(StoreError):
                while busy and time.monotonic() < until:
                    with contextlib.suppress(Busy):  # others write for longer than a request could wait
                        drain(self.database, until=until)
                        busy = False
        with contextlib.suppress(StoreError, OSError):
            self.database.close()

    def record(self, request: Request, mail_id: str, answered: str, why: str = "") -> str:
        """Append a hit to the spool; says `recorded`, or what became of it."""
        if self.directory.known and mail_id not in self.directory.tenants:
            now, (second, count) = int(time.monotonic()), self._unknown
            self._unknown = now, count + 1 if now == second else 1
            if self._unknown[1] > UNKNOWN_A_SECOND:
                return "too many"
        self._hits += 1
        if request.is_hidden:
            self._heed_hidden()
        environ = request.environ
        hit = {
            "id": os.urandom(12).hex(),
            "t": round(time.time(), 3),
            "method": request.method,
            "host": request.host[:253],
            "uri": request.uri,
            "ip": kept_address(request.address, self.settings.ip_addresses),
            "ua": utf8(environ.get("HTTP_USER_AGENT", ""))[:MAX_AGENT],
            "answer": answered,
        }
        for header in PURPOSE_HEADERS:
            if header in environ and (purpose := utf8(environ[header])):
                hit["purpose"] = purpose[:64]
                break
        if gpc := environ.get("HTTP_SEC_GPC"):
            hit["gpc"] = utf8(gpc)[:8]
        if gpc == "1" or environ.get("HTTP_DNT") == "1":
            ignores = self.directory.tenants.get(mail_id, {}).get("ignore_gpc")
            hit |= {"gpc": "1"} if ignores else untracked_hit(mail_id, OPEN if answered == "pixel" else CLICK)
        if why:
            hit["why"] = why
        if self.directory.is_own(mail_id, request.address):  # before the address is cut
            hit["own"] = True
        line = hit_line(hit)
        if len(line) > MAX_HIT_LINE:
            return "too long"
        return "recorded" if self.spool.append(line) else "unspooled"

    def _heed_hidden(self) -> None:
        """Write down that readers are hidden, if it is true of a good part of the hits; say so in the log once a day."""
        self._hidden += 1
        if self._hits > 1_000:  # what was long ago must not outweigh what is
            self._hits, self._hidden = self._hits // 2, self._hidden // 2
        if self._hidden * HIDDEN_SHARE >= self._hits and not are_readers_hidden(self.settings.folder):
            log(f"readers: {HIDDEN}")
            with contextlib.suppress(OSError):  # a full disk
                write_small_file(hidden_file(self.settings.folder), "", 0o640)

    def is_others_host(self, request: Request, mail_id: str) -> bool:
        """Whether a request came to another tenant's tracking host."""
        return self.directory.refresh().host_owners.get(request.host, mail_id) != mail_id

    @contextlib.contextmanager
    def numbers(self) -> Iterator[tuple[sqlite3.Connection, int]]:
        """A reading after a drain, with about how many hits could not be counted in time."""
        waiting = 1  # at least, where that can't be told
        try:
            with self.database.reading() as connection:
                waiting = waiting_hits(self.database, connection)
            if 0 < waiting <= MOST_FOR_READERS and drain_for_reading(self.database):
                waiting = 0
        except StoreError as error:
            log(f"numbers without a drain: {error}")
        if waiting > BACKLOG:
            time.sleep(REST_SECONDS)
        with self.database.reading() as connection:
            yield connection, waiting


def hidden_file(folder: str) -> str:
    """What is written when it is noticed that readers are hidden, and holds for a day."""
    return os.path.join(folder, "hidden")


def are_readers_hidden(folder: str) -> bool:
    with contextlib.suppress(OSError):
        return time.time() - os.stat(hidden_file(folder)).st_mtime < HIDDEN_SECONDS
    return False


def link_secrets(settings: Settings, database: Database) -> tuple[str, ...]:
    """The keys that verify links, the one that signs first; the database's own always does. Raises StoreError."""
    own = read_small_file(settings.folder, "secret.key")  # its fast copy, so that links work without the database
    is_there = database.is_shared or os.path.exists(database.path)
    if not own and is_there:
        with database.reading() as connection:
            own = stored_secret(connection, "link")
    found = (*(settings.secret_key or ()), *((own,) if own else ()))
    if not found and is_there:
        raise StoreError(
            f"the key that signs links is neither in {database.path} nor in {settings.folder}/secret.key: restore either "
            "from a backup, or give it as SECRET_KEY; a new one would break every link in mail already sent"
        )
    return found


def leads_back(settings: Settings, directory: Directory, urls: Iterable[str], target: Target) -> bool:
    """Whether a target leads to this server, as far as it can know: BASE_URL, tracking hosts, and these URLs."""
    own = [read_origin(url) for url in (settings.base_url, *urls) if url]
    if target.host in directory.host_owners:
        own.append((target.host, DEFAULT_PORTS["https"]))
    ports = [port for host, port in own if host == target.host]
    web = DEFAULT_PORTS.values()  # the ports of one server
    is_ours = target.port in ports or (target.port in web and any(port in web for port in ports))
    if not (is_ours and settings.base_path and target.host == read_origin(settings.base_url or "")[0]):
        return is_ours
    path = unquote(re.sub("[?#].*", "", path_of(target.location)))  # the rest of that host is another's
    return f"{os.path.normpath('/' + path.lstrip('/'))}/".startswith(f"{settings.base_path}/")


def link_maker(
    settings: Settings, directory: Directory, keys: Sequence[str], mail_id: str, tracking_host: str | None, *urls: str
) -> LinkMaker | None:
    """What makes a tenant's links, but none to these URLs of ours; None where nobody said the public address."""
    base = settings.public_url(tracking_host)
    if base is None:
        return None
    utm = directory.refresh().tenants.get(mail_id, {}).get("utm", "")
    return LinkMaker(base, mail_id, keys[0], partial(leads_back, settings, directory, (base, *urls)), utm)


# -- Hits


def pixel(app: App, request: Request, mail_id: str, key: str) -> Response:
    """Always the GIF, whatever is wrong; X-Tracker says what."""
    if app.is_others_host(request, mail_id):
        note = "wrong host"
    elif not is_key(key):
        note = "bad key"
    else:
        note = app.record(request, mail_id, "pixel")
        if app.directory.known and mail_id not in app.directory.tenants:
            note = "unknown tenant"  # or younger than tenants.json: the drain decides
    return Response(200, (*PIXEL_HEADERS, ("X-Tracker", note)), app.pages.pixel)


NOT_OURS = "This link is not complete, or it is not one that this server made."
NOBODYS = "This link belongs to nobody on this server."


def signed_click(app: App, request: Request, mail_id: str, key: str, signature: str, target: str) -> Response:
    """Redirect to the signed target, with or without a database."""
    if app.is_others_host(request, mail_id):
        raise HTTPError(404, NOBODYS)
    if not is_key(key):
        raise HTTPError(404, NOT_OURS)
    if target == HIDDEN_SEGMENT and verify(app.secrets, mail_id, target, signature):
        app.record(request, mail_id, "hidden")
        return html_response(200, "<!doctype html><title></title>\n")
    return _lead_on(app, request, mail_id, _signed_target(app.secrets, mail_id, target, signature), signed=True)


def plain_click(app: App, request: Request, mail_id: str, key: str) -> Response:
    """Redirect to a URL that anybody could have written, but only where the tenant's links may lead."""
    if app.is_others_host(request, mail_id) or not is_key(key):
        raise HTTPError(404, NOBODYS)
    if app.directory.known and mail_id not in app.directory.tenants and mail_id not in app.directory.retired:
        app.record(request, mail_id, "404")  # a dashboard id, perhaps: then the drain warns its owner
        raise HTTPError(404, NOBODYS)
    return _lead_on(app, request, mail_id, _plain_target(request.query), signed=False)


# A mailing has the same few links for all its readers, so the last ones are kept. What raises is not.
@lru_cache(maxsize=256)
def _plain_target(query: str) -> Target:
    url = plain_url(query)
    if url is None or not url.strip():
        raise HTTPError(400, "This link names no destination; expected ?url= and an encoded http or https URL.")
    return _readable_target(url)


@lru_cache(maxsize=256)  # a cache of its own: nobody but those who can sign fills it
def _signed_target(secret_keys: tuple[str, ...], mail_id: str, encoded: str, signature: str) -> Target:
    url = decode_target(encoded) if verify(secret_keys, mail_id, encoded, signature) else None
    if url is None:
        raise HTTPError(404, NOT_OURS)
    return _readable_target(url)


def _readable_target(url: str) -> Target:
    try:
        return read_target(url)
    except BadTarget as error:
        raise HTTPError(400, f"This link's destination can't be used: {error}.") from None


def _lead_on(app: App, request: Request, mail_id: str, target: Target, *, signed: bool) -> Response:
    """Redirect to where a link leads, or show the page that names it."""
    if leads_back(app.settings, app.directory, (request.origin,), target):
        raise HTTPError(400, "This link's destination can't be used: it leads back to this server.")
    if reason := _why_named(app, mail_id, target, signed=signed):
        app.record(request, mail_id, "named", reason)
        title = f"This link leads to {target.host}"
        return html_response(200, app.pages.page(title, "naming", host=target.host, location=target.location))
    app.record(request, mail_id, "302")
    location = target.location
    if request.query:
        location = forwarded(location, request.query, app.directory.tenants.get(mail_id, {}).get("forward", ()))
    return Response(302, (("Location", location), *REDIRECT_HEADERS), b"")


def _why_named(app: App, mail_id: str, target: Target, *, signed: bool) -> str | None:
    """The reason for which a click meets the naming page, or None if it may be redirected."""
    tenant = app.directory.tenants.get(mail_id)
    if mail_id in app.directory.retired or (tenant and tenant["suspended"]):
        return "suspended"
    if tenant and covers(tenant["block"], target, any_port=True):
        return "destination-blocked"
    # A tenant may be younger than tenants.json; a signature proves that this server made the link.
    if signed or (tenant and (tenant["any_domain"] or covers(tenant["allow"], target))):
        return None
    return "destination-not-allowed"


# -- What a recipient wants


def preferences(app: App, request: Request, mail_id: str, key: str, signature: str) -> Response:
    """Say to a recipient what is stored of a mail, and offer to say no; changes nothing."""
    words = _recipients_words(app, request, mail_id, key, signature)
    return _preferences_page(app, mail_id, key, words)


def post_preferences(app: App, request: Request, mail_id: str, key: str, signature: str) -> Response:
    """Write down what a recipient chose. It holds from now on; the drain does it, as soon as there is a database."""
    words = _recipients_words(app, request, mail_id, key, signature)
    if request.is_heavy:
        raise HTTPError(413, "Expected a form.")
    said = dict(parse_qsl(request.body().decode("utf-8", "replace")))
    choice, token, today = said.get("choice", ""), said.get("token", ""), now_ms() // DAY_MS
    is_fresh = any(verify(app.secrets, mail_id, f"{day} {key}", token, CHOICE) for day in (today, today - 1))
    if not is_fresh or choice not in CHOICES:
        return _preferences_page(app, mail_id, key, words, 400, "again")
    if not app.choices.append(choice_line(mail_id, key, choice)):
        return _preferences_page(app, mail_id, key, words, 503, "failed")
    page = app.pages.page(words["title"], "message", words["lang"], title=words["title"], text=words[f"done-{choice}"])
    return html_response(200, page)


def _recipients_words(app: App, request: Request, mail_id: str, key: str, signature: str) -> Mapping[str, str]:
    """The words of the page that a link leads to, in the reader's language. Raises HTTPError 404 if it is no link of ours."""
    is_known = mail_id in app.directory.refresh().tenants or not app.directory.known
    if app.is_others_host(request, mail_id) or not is_known:
        raise HTTPError(404, NOBODYS)
    is_merged = UNGUESSABLE.fullmatch(key) and verify(app.secrets, mail_id, "", signature, PREFERENCES)
    if not is_key(key) or not (is_merged or verify(app.secrets, mail_id, key, signature, PREFERENCES)):
        raise HTTPError(404, NOT_OURS)
    said = str(request.environ.get("HTTP_ACCEPT_LANGUAGE", ""))[:500].lower()
    asked = re.findall(r"([a-z]{2,8})[a-z0-9-]*\s*(?:;\s*q=([01](?:\.[0-9]{0,3})?))?\s*(?:,|$)", said)
    ranked = sorted(asked, key=lambda each: -float(each[1] or 1))  # of equal ones the first
    return next((app.pages.languages[name] for name, _ in ranked if name in LANGUAGES), app.pages.languages["en"])


def _preferences_page(
    app: App, mail_id: str, key: str, words: Mapping[str, str], status: int = 200, note: str = ""
) -> Response:
    try:
        with app.database.reading() as connection:
            facts = stored_of_mail(connection, mail_id, key, app.settings.retention_days or 0)
        told = [words[name].format(value) for name, value in facts.items() if value] or [words["nothing"]]
    except StoreError:
        told = [words["away"]]
    page = app.pages.page(
        words["title"],
        "preferences",
        words["lang"],
        note=tag("p", words[note], class_="fault", role="alert") if note else "",
        about=words["about"].format(words[f"address-{app.settings.ip_addresses}"]),
        stored=joined(*(tag("li", each) for each in told)),
        token=sign(app.secrets[0], mail_id, f"{now_ms() // DAY_MS} {key}", CHOICE),
        **{name: words[name] for name in ("title", "this_mail", "stop", "stop_means", "erase", "erase_means", "reach")},
    )
    return html_response(status, page)


# -- What else anybody may ask for


def home(app: App, request: Request) -> Response:
    """Say what this host is to somebody who found it in a mail."""
    text = "This host serves images and links in mail, so that whoever sent the mail can see whether it was read. "
    text += "If you have a question about a mail, ask its sender."
    return html_response(200, app.pages.message("An email tracker", text))


def file(app: App, request: Request, name: str = "") -> Response:
    """What is the same for everybody, and may be kept for a while."""
    if (found := app.pages.files.get("/".join(request.segments))) is None:
        raise HTTPError(404, "There is no such file.")
    type_, kept, body = found
    return Response(
        200, [("Content-Type", type_), ("Cache-Control", kept), ("X-Content-Type-Options", "nosniff")], body
    )


def health(app: App, request: Request) -> Response:
    """Whether hits are recorded and counted, and why not; by what was written down a moment ago, so it waits for nobody."""
    state, folder, known = read_state(app.settings.folder), app.settings.folder, app.directory.refresh()
    slots = os.path.join(app.settings.spool, "nginx")
    disk = shutil.disk_usage(slots) if os.path.isdir(slots) else None
    faults = {
        f"drain: {state['trouble']}": state["trouble"],
        "spool: can't be written; hits are printed to stderr as `unspooled`, replay them with `ingest`": not app.spool.works(),
        f"{known.trouble}; workers go by what they knew": known.trouble,
        f"drain: about {state['waiting']} hits wait to be counted": (state["waiting"] or 0) > BACKLOG,
        f"spool: {state['cut']}": state["cut"],
        "disk: less than a tenth is free, and where it is full, hits that nginx answers are lost": disk is not None
        and disk.free < disk.total / 10,
        f"spool: {state['rejected']} lines could not be read and were put into spool/rejected": state["rejected"],
    }
    why = [fault for fault, is_so in faults.items() if is_so]
    value = {
        "status": "degraded" if why else "ok",
        # Anybody may ask, so it is not said where things are.
        "why": [each.replace(folder + "/", "").replace(folder, "the data folder") for each in why],
        "waiting_hits": state["waiting"],
        "rejected_lines": state["rejected"],
        "limits": state["limits"],
        "notes": [f"readers: {HIDDEN}"] * are_readers_hidden(folder),  # no fault: anybody can bring it about
        "version": __version__,
    }
    if state["machines"]:
        value["machines"] = [
            {"name": name, "drained_at": iso_time(at), "waiting_hits": waiting}
            for name, at, waiting in state["machines"]
        ]
    asked, status = request.parameters(), 503 if why and "strict" in request.parameters() else 200
    if request.bearer() is None or app.settings.api_key is None:
        return json_response(status, value)
    if not is_operator(app, request):
        raise HTTPError(401, OPERATORS, BEARER)
    value["figures"] = figures = {"ok": int(not why), **_figures(app.settings, state)}
    if "version=0.0.4" not in request.environ.get("HTTP_ACCEPT", "") and asked.get("format") != "prometheus":
        return json_response(status, value)
    lines = (f"email_tracker_{name} {number}\n" for name, number in figures.items() if number is not None)
    return Response(status, [("Content-Type", METRICS_TYPE), *PAGE_HEADERS], "".join(lines).encode())


def _figures(settings: Settings, state: dict[str, Any]) -> dict[str, int | None]:
    """What the operator's monitor is told: hits so far, sizes on this machine, and which limits were met today."""
    segments = (segments_in(folder).values() for folder in (settings.spool, os.path.join(settings.spool, "kept")))
    files = [] if settings.is_shared else [settings.database, f"{settings.database}-wal"]
    return {
        "hits": None if state["waiting"] is None else state["drained"] + state["waiting"],
        "drained_hits_total": state["drained"],
        "waiting_hits": state["waiting"],
        "rejected_lines": state["rejected"],
        "database_bytes": sum(os.path.getsize(each) for each in files if os.path.exists(each)) if files else None,
        "spool_bytes": sum(about.st_size for about in chain(*segments)),
        **{f"{what}_limit_met": int(f"{what}-limit" in state["limits"]) for what in A_DAY},
    }


def wants_json(request: Request) -> bool:
    return "application/json" in request.environ.get("HTTP_ACCEPT", "")


def is_for_programs(request: Request) -> bool:
    """Whether who asks is no browser that shows pages."""
    return request.method not in ("GET", "HEAD") or wants_json(request) or "".join(request.segments).endswith(".json")


def has_key(app: App, request: Request, tenant: Tenant) -> bool:
    """Whether a request carries the tenant's API key or the operator's."""
    if (key := request.bearer()) is None:
        return False
    return hmac.compare_digest(key_hash(key), tenant.api_key_hash or "") or is_operator(app, request)


def is_operator(app: App, request: Request) -> bool:
    """Whether a request carries the operator's key."""
    key, wanted = request.bearer(), app.settings.api_key
    return key is not None and wanted is not None and hmac.compare_digest(key.encode(), wanted.encode())


# == Views =============================================================================================
# Handlers for who reads: pages, numbers and exports.

EMAIL_ROWS = 8  # on a page, and so on: enough to see at once, and a page stays under 60 kB
CAMPAIGN_EMAIL_ROWS = 50
HIT_ROWS = 5
TIMELINE_ROWS = 200
NO_CAMPAIGN = "There is no such campaign."
ASKED = (*RANGE_PARAMETERS, "tz", "q", "show", "sort", "after", "campaigns", "links", "events", "machines")
MOST_TYPED = 200  # characters of a search
MOST_ASKED = 60  # of any other parameter: no zone's name is longer


def _view(app: App, request: Request, tenant: Tenant, campaign: str | None = None, forgiving: bool = False) -> View:
    parameters = request.parameters()
    # Cut to what is heeded: each of the many links of the page repeats it.
    cut = {name: parameters.get(name, "")[: MOST_TYPED if name == "q" else MOST_ASKED] for name in ASKED}
    asked = {name: value for name, value in cut.items() if value and (name, value) != ("tz", tenant.tz)}
    people = tenant.share is None and (not tenant.one_id or has_key(app, request, tenant))
    zone = zone_of(tenant, None if forgiving else parameters.get("tz"))  # the form says what is wrong with it
    are_hidden = are_readers_hidden(app.settings.folder)
    return View(app.pages, tenant, zone, now_ms(), people, request.segments, asked, campaign, are_hidden)


def _wanted(request: Request, view: View, table: Table, **more: Any) -> Wanted:
    """Which rows of a table the request asks for. Raises HTTPError 400 for what can't be."""
    parameters = request.parameters()
    if (shown := parameters.get("show") or "all") not in SHOWN:
        raise HTTPError(400, f"show: expected one of {', '.join(SHOWN)}")
    sort = parameters.get("sort", "")
    name, _, order = sort.removesuffix(".up").partition(".")
    known = [f"{each.name}.{order}" for each in TABLES.values() for order in each.orders]
    if sort and (f"{name}.{order}" not in known or (order in PERSONAL_FIELDS and not view.people)):
        raise HTTPError(400, f"sort: expected one of {', '.join(known)}, with .up the other way round")
    if table is EMAILS:
        more |= {"search": UNFIT.sub("", parameters.get("q", "").strip()[:MOST_TYPED]), "shown": shown}
    if table is EMAILS or "whole" in more:
        more["after"] = read_cursor(parameters.get("after", ""), table)
    if name == table.name and "whole" not in more:
        more |= {"order": order, "ascending": sort.endswith(".up")}
    return Wanted(campaign=view.campaign, people=view.people, shared=view.tenant.share is not None, **more)


def dashboard(app: App, request: Request, tenant: Tenant) -> Response:
    view, tables = _view(app, request, tenant, forgiving=True), {}
    rows = {"emails": EMAIL_ROWS, "events": HIT_ROWS, "clients": ALL_ROWS}
    with app.numbers() as (connection, waiting):
        view, period, fault = _period_typed(connection, view)
        for name, table in TABLES.items():
            if tenant.share and table in (EMAILS, EVENTS):
                continue
            asked = _wanted(request, view, table, days=period.days, most=rows.get(name) or view.most(name))
            tables[name] = read_table(connection, tenant.number, table, asked)
        stats = read_stats(connection, tenant, period)
        curves = campaign_curves(connection, tenant.number, [row["campaign"] for row in tables["campaigns"].named()])
        if not (fault or tenant.share or has_emails(connection, tenant.number)):
            trial = _trial(app, request, tenant)
            return html_response(200, empty_page(view, stats, waiting, trial, tables["events"]))
    form = range_form(view, period, request.parameters() if fault else {}, fault)
    return html_response(400 if fault else 200, dashboard_page(view, stats, tables, curves, waiting, form))


def _period_typed(connection: sqlite3.Connection, view: View) -> tuple[View, Period, str]:
    """The range that a form asks for; where it can't be, as much of it as can, and what is wrong."""
    faults = []
    for wrong in ((), ("tz",), RANGE_PARAMETERS, (*RANGE_PARAMETERS, "tz")):
        asked = {name: value for name, value in view.asked.items() if name not in wrong}
        try:
            period = period_of(connection, view.tenant, asked, view.now)
        except BadInput as error:
            faults.append(str(error))
        else:
            break
    return replace(view, asked=asked, zone=period.zone), period, faults[0] if faults else ""


TEST_DESTINATION = "https://example.com/"  # reserved for such uses (RFC 2606); nobody of ours ever asks for it


def _trial(app: App, request: Request, tenant: Tenant) -> Markup:
    """What a tenant without any hit is shown: what to put into a first mail, and a pixel and a link to try."""
    public, key = app.settings.public_url(tenant.tracking_host), f"{TEST_KEY}page"
    hits = joined("To try it from here, open this page under the address that links begin with.")
    if public and read_origin(public)[0] == request.host and app.secrets:
        hits = app.pages.templates["_trial_hits"].render(
            test_pixel=path_of(public) + pixel_path(tenant.mail_id, key),
            test_click=path_of(public) + click_path(app.secrets[0], tenant.mail_id, key, TEST_DESTINATION),
        )
    base = f"{public or 'https://track.example.com'}/{tenant.mail_id}"
    return app.pages.templates["_trial"].render(program=PROGRAM, mail_id=tenant.mail_id, base=base, trial_hits=hits)


def campaign_view(app: App, request: Request, tenant: Tenant, campaign: str) -> Response:
    view = _view(app, request, tenant, campaign)
    rows = {"links": view.most("links"), "clients": ALL_ROWS}
    rows |= {} if tenant.share else {"emails": CAMPAIGN_EMAIL_ROWS}
    with app.numbers() as (connection, _):
        if (stats := read_campaign(connection, tenant, campaign, view.zone, view.now)) is None:
            raise HTTPError(404, NO_CAMPAIGN)
        tables = {
            name: read_table(connection, tenant.number, TABLES[name], _wanted(request, view, TABLES[name], most=most))
            for name, most in rows.items()
        }
    return html_response(200, campaign_page(view, stats, tables))


def email_view(app: App, request: Request, tenant: Tenant, key: str) -> Response:
    """One email and its newest hits, as a page, or as JSON for who says so: by its Accept, or by .json behind the key."""
    view, is_json = _view(app, request, tenant), wants_json(request)
    with app.numbers() as (connection, _):
        email = read_table(connection, tenant.number, EMAILS, Wanted(key=key))
        if not email.rows and key.endswith(".json"):  # which a key may end with too
            key, is_json = key.removesuffix(".json"), True
            email = read_table(connection, tenant.number, EMAILS, Wanted(key=key))
        if not email.rows:
            raise HTTPError(404, "There is no such email.")
        hits = read_table(connection, tenant.number, EVENTS, Wanted(key=key, most=TIMELINE_ROWS))
        context = find_emails(connection, tenant.number, [key])[key].context
    if is_json:
        [about], events = (_objects(rows, rows.table.told(view.people)) for rows in (email, hits))
        return json_response(200, {**about, "events": events})
    return html_response(200, email_page(view, email, hits, context))


def _known_parameters(request: Request, *known: str) -> dict[str, str]:
    """The query of a program. Raises HTTPError 400 for a misspelt name, which would be answered as if it were not there."""
    parameters = request.parameters()
    for name in reversed(parameters):  # the first, as it was written
        if name not in known:
            raise HTTPError(400, f"{name[:MOST_ASKED]}: unknown parameter; expected some of {', '.join(known)}")
    return parameters


def link_view(app: App, request: Request, tenant: Tenant, link: str) -> Response:
    """Who clicked a link, in all campaigns or in one."""
    number = int(link) if re.fullmatch("[0-9]{1,18}", link) else 0
    campaign = request.parameters().get("campaign") or None
    view = _view(app, request, tenant, campaign)
    verdict, after = "" if "machines" in view.asked else "human", read_cursor(view.asked.get("after", ""), EVENTS)
    with app.numbers() as (connection, _):
        links = read_table(connection, tenant.number, LINKS, Wanted(campaign, link=number, whole=True))
        if not number or not links.rows:
            raise HTTPError(404, "There is no such link.")
        url = links.named()[0]["url"]
        asked = Wanted(campaign, url=url, verdict=verdict, most=CAMPAIGN_EMAIL_ROWS, after=after)
        clicks = read_table(connection, tenant.number, EVENTS, asked)
    view = replace(view, about={"url": url, "verdict": verdict}, asked={**view.asked, "campaign": campaign or ""})
    return html_response(200, link_page(view, links, clicks._replace(table=CLICKS)))


def person_view(app: App, request: Request, tenant: Tenant, key: str) -> Response:
    """All that the recipient of an email got and did."""
    view = replace(_view(app, request, tenant), about={"person": key})
    with app.numbers() as (connection, _):
        recipient, sums = person_of(connection, tenant.number, key)
        if not recipient or not view.people:
            raise HTTPError(404, "There is no such person.")
        asked = _wanted(request, view, EMAILS, most=CAMPAIGN_EMAIL_ROWS, person=key)._replace(search="")
        emails = read_table(connection, tenant.number, EMAILS, asked)
        done = read_table(connection, tenant.number, EVENTS, Wanted(person=key, most=view.most("events")))
    return html_response(200, person_page(view, recipient, totals_of(sums), emails, done._replace(table=DONE)))


def stats_view(app: App, request: Request, tenant: Tenant, campaign: str = "") -> Response:
    """The numbers of a range, or of a campaign, as JSON: as its page has them, of all time."""
    is_own, campaign = campaign != "", campaign or request.parameters().get("campaign", "")
    _known_parameters(request, *(() if campaign else RANGE_PARAMETERS), "tz", *["campaign"] * (not is_own))
    view = _view(app, request, tenant, campaign)
    with app.numbers() as (connection, waiting):
        if not campaign:
            stats = read_stats(connection, tenant, period_of(connection, tenant, view.asked, view.now))
            return json_response(200, stats_json(stats, tenant.name, waiting))
        if (numbers := read_campaign(connection, tenant, campaign, view.zone, view.now)) is None:
            raise HTTPError(404, NO_CAMPAIGN)
        asked = Wanted(campaign=campaign, shared=tenant.share is not None, most=TABLE_ROWS[-1])
        programs, links = (read_table(connection, tenant.number, table, asked) for table in (PROGRAMS, LINKS))
    return json_response(200, campaign_json(numbers, tenant.name, programs, links, waiting))


def export(app: App, request: Request, tenant: Tenant) -> Response:
    """A table as JSON or CSV, newest first, or campaigns by their names; up to MAX_ROWS rows."""
    name, _, form = request.segments[-1].partition(".")
    table = TABLES[name]
    of_csv = ("whole", "tz") if "whole" in request.parameters() else ("whole",)
    known = dict.fromkeys(("limit", "after", *table.filters, *(of_csv if form == "csv" else ())))
    parameters = _known_parameters(request, *known)
    view = _view(app, request, tenant, parameters.get("campaign"))
    narrow = {name: parameters.get(name) for name in ("key", "person", "url")}
    asked = narrowed(_wanted(request, view, table, whole=True, **narrow), parameters)
    if asked.person and not view.people:
        raise HTTPError(404, "There is no such person.")
    limit = parameters.get("limit", str(MOST_CAMPAIGNS if table is CAMPAIGNS else MAX_ROWS))
    if not re.fullmatch("[0-9]{1,6}", limit) or not 1 <= int(limit) <= MAX_ROWS:
        raise HTTPError(400, f"limit: expected a whole number from 1 to {MAX_ROWS}")
    asked = asked._replace(most=int(limit))
    with app.numbers() as (connection, _):  # drained, so that the export is complete
        if "range" in table.filters:
            asked = asked._replace(days=period_of(connection, tenant, view.asked, view.now).days)
    zone = view.zone if form == "csv" and "whole" in parameters else None
    rows = export_rows(app.database, tenant.number, table, form, asked, zone)
    alone = partial(heavy, app.settings.folder) if asked.most > HEAVY_ROWS else contextlib.nullcontext
    body = _sent(rows, alone, request.environ["wsgi.errors"])
    next(body)
    headers = ("Content-Type", EXPORT_TYPES[form]), ("Content-Disposition", f'attachment; filename="{name}.{form}"')
    return Response(200, (*headers, *PAGE_HEADERS), body)


def _sent(
    rows: Iterator[bytes], alone: Callable[[bool], contextlib.AbstractContextManager[object]], errors: Any
) -> Generator[bytes, None, None]:
    """An export as it is sent. What comes first is nothing, and may be refused; a reader who takes his time holds up nobody."""
    with alone(False):
        yield b""
    try:
        while True:
            with alone(True):
                part = next(rows, None)
            if part is None:
                return
            yield part
    except Exception:
        errors.write(f"an export broke off\n{traceback.format_exc()}")  # the server would log the private URL too
        raise OSError(errno.EPIPE, "an export broke off") from None  # the server cuts the connection, silently


MOST_CHANGES = 1_000  # at once
FEED_TYPES = {"json": EXPORT_TYPES["json"], "ndjson": "application/x-ndjson"}


def feed_view(app: App, request: Request, tenant: Tenant) -> Response:
    """What became of hits, oldest first, behind the change whose id is given, or from the oldest one on."""
    parameters = _known_parameters(request, "after", "limit", "format")
    after, limit, form = map(parameters.get, ("after", "limit", "format"), ("", "1000", "json"))
    if form not in FEED_TYPES:
        raise HTTPError(400, f"format: expected one of {', '.join(FEED_TYPES)}")
    if not re.fullmatch("[0-9]{1,4}", limit) or not 1 <= int(limit) <= MOST_CHANGES:
        raise HTTPError(400, f"limit: expected a whole number from 1 to {MOST_CHANGES}")
    cursor = re.fullmatch("([0-9a-f]{12,32})-([0-9]{1,18})", after)
    if after and not cursor:
        raise HTTPError(400, "after: expected the id of a change, or what `next` said")
    view = _view(app, request, tenant)
    with app.numbers() as (connection, _):
        if (feed := feed_of(connection, tenant.number)) is None:
            raise HTTPError(409, f"No changes are kept: `{PROGRAM} tenant set NAME --feed` begins with it.")
        begin = int(cursor[2]) if cursor else feed.swept
        if cursor and (cursor[1] != feed.epoch or not feed.swept <= begin <= feed.last):
            told = "after: the changes behind this one are no longer known; begin anew behind `oldest`"
            return json_response(410, {"error": told, "oldest": f"{feed.epoch}-{feed.swept}"})
        rows, last = read_changes(connection, tenant.number, feed, begin, int(limit))
    left_out = () if view.people else PERSONAL_FIELDS
    lines = [json.dumps({name: row[name] for name in row if name not in left_out}, ensure_ascii=False) for row in rows]
    following = f"{feed.epoch}-{last}"
    body = "".join(f"{line}\n" for line in lines)
    if form == "json":
        body = '{"rows": [\n' + ",\n".join(lines) + f'\n], "next": "{following}"}}\n'
    headers = ("Content-Type", FEED_TYPES[form]), *PAGE_HEADERS
    return Response(200, headers, body.encode("utf-8", "backslashreplace"))


# -- Exports

MAX_ROWS = 100_000  # of an export over HTTP: a sync worker that streams for minutes is killed, and blocks pixels
MOST_CAMPAIGNS = 10_000  # where nobody says how many: strangers can make up more
CHUNK_ROWS = 500  # read at once: the database is free in between; more takes memory, and saves no time
MOST_PIECES = MAX_ROWS // CHUNK_ROWS  # of an export over HTTP, each a look at MOST_SORTED rows where few of them fit


def narrowed(asked: Wanted, said: Mapping[str, str | None]) -> Wanted:
    """The events of a time and of a verdict, where they are said. Raises BadInput."""
    if (verdict := said.get("verdict") or "") and verdict not in VERDICT_STATES:
        raise BadInput(f"verdict: expected one of {', '.join(VERDICT_STATES)}")
    since, until = (text and read_iso_time(text, name) for name in ("since", "until") for text in [said.get(name)])
    after = min(asked.after, Cursor(until, 0)) if until else asked.after
    return asked._replace(verdict=verdict, since=since or 0, after=after)


def export_rows(
    database: Database, tenant: int, table: Table, form: str, asked: Wanted, zone: tzinfo | None = None
) -> Iterator[bytes]:
    """A table as JSON or CSV, in pieces, in constant memory; the database is free in between. With a zone, for a spreadsheet."""
    names = table.told(asked.people, zone is not None)
    pages = _pages_of(database, tenant, table, asked._replace(whole=True))
    return _json_lines(names, pages) if form == "json" else _csv_lines(names, pages, zone)


def _pages_of(database: Database, tenant: int, table: Table, asked: Wanted) -> Iterator[Rows]:
    """The rows in pieces, of which only the last says where more follow."""
    following: Cursor | None = asked.after
    limit, pieces = asked.most, 0
    while following:
        asked = asked._replace(after=following, most=limit if table is PROGRAMS else min(CHUNK_ROWS, limit))
        with database.reading() as connection:
            page = read_table(connection, tenant, table, asked)
        limit -= len(page.rows)
        pieces += 1
        is_enough = limit <= 0 or (asked.most <= MAX_ROWS and pieces == MOST_PIECES)
        following = None if is_enough else page.next
        yield page._replace(next=None) if following else page


def _formatted(
    page: Rows, names: Sequence[str], formats: Mapping[str, Callable[[Any], Any]]
) -> Iterator[tuple[Any, ...]]:
    """The rows with each cell as its field is written; by columns, which is faster."""
    columns = dict(zip(("id", *page.table.fields, *page.table.more), zip(*page.rows, strict=True), strict=False))
    if "client" in names and "user_agent" in columns:
        columns["client"], columns["device"] = zip(*map(client_of, columns["user_agent"]), strict=True)
    written = {name: map(form, columns[name]) for name, form in formats.items() if name in columns}
    return zip(*({**columns, **written}.get(name, ()) for name in names), strict=True)


_JSON_FORMATS: dict[str, Callable[[Any], Any]] = {**dict.fromkeys(TIMES_AS_NUMBERS, iso_time), "registered": bool}
_as_json = json.JSONEncoder(ensure_ascii=False).encode


def _objects(rows: Rows, names: Sequence[str]) -> list[dict[str, Any]]:
    return [dict(zip(names, row, strict=True)) for row in _formatted(rows, names, _JSON_FORMATS)]


def _json_lines(names: Sequence[str], pages: Iterator[Rows]) -> Iterator[bytes]:
    """{"rows": [...], "next": cursor or null}, a row a line."""
    following, between = None, "\n"
    yield b'{"rows": ['
    for page in pages:
        if lines := ",\n".join(map(_as_json, _objects(page, names))):
            yield (between + lines).encode("utf-8", "backslashreplace")
            between = ",\n"
        following = page.next
    yield f'\n], "next": {json.dumps(following and str(following))}}}\n'.encode()


def csv_cell(value: object) -> object:
    """Keep a spreadsheet from running what a stranger wrote: such text gets an apostrophe (owasp.org, CSV injection)."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


MORE_ROWS = "There are more rows: ask for fewer, or let whoever runs this tracker write all by the command `export`."


_CSV_FORMATS = {**dict.fromkeys(TIMES_AS_NUMBERS, iso_time), **dict.fromkeys(FOREIGN_FIELDS, csv_cell)}


def _csv_lines(names: Sequence[str], pages: Iterator[Rows], zone: tzinfo | None) -> Iterator[bytes]:
    """RFC 4180 with a header; its last column, `next`, says where more follows. With a zone: for a spreadsheet."""
    import csv
    import io

    formats, header = _CSV_FORMATS, [[*names, "next"]]
    if zone:
        form = "%Y-%m-%d %H:%M:%S"
        times = dict.fromkeys(
            TIMES_AS_NUMBERS, lambda at: f"{datetime.fromtimestamp(at / 1000, zone):{form}}" if at else ""
        )
        formats = {**formats, **times}
        header = [[*names]]
        yield codecs.BOM_UTF8  # without which Excel takes it for another encoding
    for page in pages:
        rows = list(_formatted(page, names, formats))
        if zone:
            lines = rows + [(MORE_ROWS,)] * bool(page.next)
        else:
            rows = rows or [("",) * len(names)] * bool(page.next)  # none fits so far, and there is more to look at
            ends = [""] * (len(rows) - 1) + [str(page.next or "")]
            lines = [(*row, end) for row, end in zip(rows, ends, strict=False)]
        csv.writer(buffer := io.StringIO()).writerows([*header, *lines])
        yield buffer.getvalue().encode("utf-8", "backslashreplace")
        header = []


# == API ===============================================================================================
# Handlers for who writes: registering, instrumenting, campaigns, tenants.

MAX_LINKS = 20_000  # in one request: signing a million would take longer than a worker may
MAX_REGISTRATIONS = 1_000


# -- The fields of what is sent

EXPECTED = {str: "text", bool: "true or false", int: "a whole number", list: "a list of texts"}


class Field(NamedTuple):
    form: type[Any]  # str, bool, int, or list: of texts
    most: int = 0  # characters in one line, or texts in a list; 0: as many as there are
    words: tuple[str, ...] = ()  # one of these
    read: Callable[[Any, str], Any] | None = None  # what makes more of a value; takes the field's name too
    nullable: bool = False


def read_fields(value: object, known: Mapping[str, Field], where: str = "") -> dict[str, Any]:
    """The fields that an object has, of those we know: a misspelt one must not be lost silently. Raises BadInput."""
    if not isinstance(value, dict):
        raise BadInput(f"{where.rstrip('.')}: expected an object".lstrip(": "))
    for name in sorted(value):
        if name not in known:
            raise BadInput(f"{where}{name}: unknown field; expected some of {', '.join(known)}")
    return {name: _read_field(value[name], known[name], where + name) for name in known if name in value}


def _read_field(value: Any, field_: Field, name: str) -> Any:
    form, most, words, read, nullable = field_
    if value is None and nullable:
        return None
    if value.__class__ is not form or (form is list and not all(isinstance(text, str) for text in value)):
        raise BadInput(f"{name}: expected {EXPECTED[form]}")
    if words and value not in words:
        raise BadInput(f"{name}: expected one of {', '.join(words)}")
    if most and len(value) > most:
        raise BadInput(f"{name}: expected at most {most}{' characters' * (form is str)}, got {len(value)}")
    if most and form is str and UNFIT.search(value):
        raise BadInput(f"{name}: expected text without control characters")
    return read(value, name) if read else value


def _read_key(text: str, name: str) -> str:
    if not is_key(text):
        raise BadInput(f"{name}: expected 1 to {MAX_KEY} of the characters A-Z a-z 0-9 . _ ~ + @ = : -, not . or ..")
    return text


def _read_campaign(text: str, name: str) -> str:
    if text.strip(" ") in NO_CAMPAIGNS:
        raise BadInput(f"{name}: expected another name than . and .., which no page can have")
    return text


_TEXTS = Field(list, 1000)
_A_TIME = Field(str, 40, read=lambda text, name: read_iso_time(text, name) if text else None)
_YES_NO = Field(str, words=("yes", "no"), read=lambda text, _: text == "yes")
_A_KEY = Field(str, MAX_KEY, read=_read_key)
_UTM = {"utm": Field(str, MAX_UTM, read=read_utm)}
_SAID_FIELDS = {name: Field(str, FIELD_LIMITS[name]) for name in SAID_OF_EMAILS}
_SAID_FIELDS |= dict.fromkeys(("sent_at", "delivered_at"), _A_TIME)
_SAID_FIELDS["campaign"] = _SAID_FIELDS["campaign"]._replace(read=_read_campaign)
EMAIL_FIELDS = {"key": _A_KEY, **_SAID_FIELDS, **_UTM, "pixel": Field(str, read=read_pixel_place)}
_MESSAGE_FIELDS = dict(EMAIL_FIELDS)
EMAIL_FIELDS |= {"links": _TEXTS, "html": Field(str), "hidden_link": Field(bool)}
_MESSAGE_FIELDS |= dict.fromkeys(("links", "force", "hidden_link"), _YES_NO)
_PERSON_FIELDS = {"address": Field(str), "show": Field(bool)}
_CAMPAIGN_FIELDS = {"campaign": Field(str, MAX_CAMPAIGN), "sent": Field(int), "sent_at": Field(str, 40)}
_WEBHOOK_FIELDS = {"url": Field(str), "events": Field(list, 3), "people_only": Field(bool), "rotate": Field(bool)}


def _read_a_day(number: int, name: str) -> int:
    if not 0 <= number <= MOST_SENT:
        raise BadInput(f"{name}: expected a number of emails, 0 or more")
    return number


def _read_retention(days: int | str, name: str) -> int | None:
    if not re.fullmatch(f"|0|{RETENTION}", str(days)):
        raise BadInput(f"{name}: expected a whole number of days from 7 to 9999, 0, or none for RETENTION_DAYS")
    return int(days) if days != "" else None


def tenant_fields(settings: Settings) -> dict[str, Field]:
    """What can be said of a tenant: columns, RULES by the names that they have for users, and who may write."""
    return {
        "name": Field(str, 200, read=lambda text, _: read_tenant_name(text)),
        **{name: _TEXTS._replace(read=partial(read_each, read)) for name, read in RULES.values()},
        **dict.fromkeys(("any_domain", "suspended", "ignore_gpc", "feed", "open_writing"), Field(bool)),
        "tracking_host": Field(str, 253, read=lambda text, _: read_tracking_host(settings, text) if text else None),
        "tz": Field(str, 60, read=lambda text, _: str(read_zone(text))),
        **_UTM,
        "retention_days": Field(int, read=_read_retention, nullable=True),
        "unregistered_a_day": Field(int, read=_read_a_day, nullable=True),
    }


def _json_body(request: Request) -> Any:
    try:
        return json.loads(request.body().decode("utf-8-sig"), parse_constant=int)  # which NaN is not
    except (ValueError, RecursionError) as error:
        raise HTTPError(400, f"expected JSON in UTF-8: {error}") from None


# -- Emails


def registration_of(message: bytes, key: str, report: Report, **said: Any) -> Registration:
    """What to register of a message: what is said, else what its headers say, and of several recipients the first."""
    subject, recipients = said_by_headers(message)
    if len(recipients) > 1 and "recipient" not in said:
        several = f"of {len(recipients)} recipients, whom opens can't tell apart"
        report.notes.append(f"{several}, {recipients[0]} is registered")
    found = {"subject": subject, "recipient": next(iter(recipients), "")}
    cut: dict[str, Any] = {name: text[: FIELD_LIMITS[name]] for name, text in found.items()}
    return Registration(key, **cut, links=report.links).joined(Registration(key, **said))


def _link_maker(app: App, request: Request, tenant: Tenant) -> LinkMaker:
    maker = link_maker(app.settings, app.directory, app.secrets, tenant.mail_id, tenant.tracking_host, request.origin)
    if maker is None:
        raise HTTPError(409, NO_PUBLIC_URL)
    return maker


NO_TRACKING = ("the message", f"{UNTRACKED}: who gets it wants no tracking")  # of a report


def recipients_of(message: bytes, said: Mapping[str, Any]) -> list[str]:
    """Who gets a message: who is said to, else those in its headers."""
    return [said["recipient"]] if said.get("recipient") else said_by_headers(message)[1]


def as_recipients_want(
    connection: sqlite3.Connection, tenant: int, how: Instrumenting, recipients: Iterable[str]
) -> Instrumenting:
    """How to instrument an email: not at all, where one of those who get it wants no tracking."""
    if untracked_among(connection, tenant, map(as_person, recipients)):
        return how.untracked()
    return how


def post_emails(app: App, request: Request, tenant: Tenant) -> Response:
    """Register one email (an object) or up to 1,000 (an array), all or none."""
    maker = _link_maker(app, request, tenant)
    body = _json_body(request)
    values = body if isinstance(body, list) else [body]
    if len(values) > MAX_REGISTRATIONS:
        raise HTTPError(400, f"expected at most {MAX_REGISTRATIONS} emails, got {len(values)}")
    registrations, answers, links = [], [], 0
    said = (value.get("recipient") for value in values if isinstance(value, dict))
    with app.database.reading() as connection:
        people = {as_person(each) for each in said if isinstance(each, str)}
        untracked = untracked_among(connection, tenant.number, people)
    for n, value in enumerate(values):
        where = f"[{n}]." if body is values else ""
        registration, about = _new_email(maker, value, where, untracked)
        links += len(about["links"]) + len(about.get("report", {"wrapped": ()})["wrapped"])
        if links > MAX_LINKS:
            raise HTTPError(400, f"{where}links: expected at most {MAX_LINKS} in one request")
        registrations += [registration] * ("untracked" not in about)
        answers.append(about)
    with app.database.transaction() as connection:
        made = tell_emails(app.database, connection, tenant, registrations)
    return json_response(201 if made else 200, answers if body is values else answers[0])


def _new_email(
    maker: LinkMaker, value: object, where: str, untracked: Collection[str]
) -> tuple[Registration, dict[str, Any]]:
    said = read_fields(value, EMAIL_FIELDS, where)
    key, urls, html = said.pop("key", "") or new_key(), said.pop("links", []), said.pop("html", None)
    utm = filled_utm(said.pop("utm", maker.utm), said.get("campaign", ""))
    place, hidden = said.pop("pixel", "bottom"), said.pop("hidden_link", False)
    how = Instrumenting(maker, key, place, hidden_link=hidden, utm=utm)
    about: dict[str, Any] = {"key": key, "pixel_url": how.pixel_url(), "links": []}
    if as_person(said.get("recipient", "")) in untracked:
        how = how.untracked()
        about |= {"pixel_url": "", "untracked": True}
    targets = {*map(how.target, urls)}
    for n, url in enumerate(urls):
        try:
            if maker.is_ours(url):
                raise BadTarget("it leads back to this server")
            target = how.target(url)
            about["links"].append({"url": url, "click_url": how.wrap(target) if how.links else target})
        except BadTarget as error:
            raise BadInput(f"{where}links[{n}]: {error}") from None
    if html is not None:
        about["html"], report = instrument_html(html, how)
        about["report"] = report.as_json()
        targets |= set(report.wrapped)
    about["preferences"] = how.preferences_url()
    return Registration(key, **said, links=len(targets) or None), about


def post_messages(app: App, request: Request, tenant: Tenant) -> Response:
    """Instrument a message, and register it as an email; what is said of it in the query goes before its headers."""
    maker = _link_maker(app, request, tenant)
    if request.environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower() not in ("message/rfc822", ""):
        raise HTTPError(415, "Content-Type: expected message/rfc822")
    said = read_fields(request.parameters(), _MESSAGE_FIELDS)
    given, force = said.pop("key", ""), said.pop("force", False)
    place, links, hidden = said.pop("pixel", "bottom"), said.pop("links", True), said.pop("hidden_link", False)
    if not is_message(raw := request.body()):
        raise HTTPError(400, "expected a message: headers such as From, To and Subject, an empty line, and its body")
    key = given or key_of_message(maker, raw, said.get("recipient", ""))
    utm = filled_utm(said.pop("utm", maker.utm), said.get("campaign", ""))
    how = Instrumenting(maker, key, place, links, hidden, utm=utm)
    with app.database.reading() as connection:
        how = as_recipients_want(connection, tenant.number, how, recipients_of(raw, said))
    message, report = instrument_message(raw, how, force=force)
    report.skipped += [NO_TRACKING] * (not how.opens)
    if report.tracks:
        with app.database.transaction() as connection:
            tell_emails(app.database, connection, tenant, [registration_of(raw, key, report, **said)])
    if wants_json(request):
        text = base64.b64encode(message).decode()
        about = {"key": key, "message_base64": text, "preferences": how.preferences_url()}
        return json_response(200, {**about, "report": report.as_json()})
    notes = [("X-Email-Key", key), ("X-Tracker", "instrumented" if report.tracks else "unchanged")]
    notes += [("X-Warning", each.encode("ascii", "backslashreplace").decode()) for each in report.warnings()]
    return Response(200, [("Content-Type", "message/rfc822"), *PAGE_HEADERS, *notes], message)


def patch_email(app: App, request: Request, tenant: Tenant, key: str) -> Response:
    """Say more of an email that is registered: its times, above all, when the sender's system knows them."""
    registration = Registration(key, **read_fields(_json_body(request), _SAID_FIELDS))
    drain_for_reading(app.database)
    with app.database.transaction() as connection:
        await_replay(app.database, connection)
        if not any(email.registered for email in find_emails(connection, tenant.number, [key]).values()):
            raise HTTPError(404, "There is no such email.")
        tell_emails(app.database, connection, tenant, [registration])
    return json_response(200, {"changed": key})


def delete_email_view(app: App, request: Request, tenant: Tenant, key: str) -> Response:
    drain_for_reading(app.database)
    with app.database.transaction() as connection:
        await_replay(app.database, connection)  # in one with the deletion: a restore may come at any moment
        if not delete_emails(app.database.folder, connection, tenant.number, [key], now_ms()):
            raise HTTPError(404, "There is no such email.")
    return json_response(200, {"deleted": key})


def post_forgotten(app: App, request: Request, tenant: Tenant) -> Response:
    """Forget a recipient, or show all that is stored of one: an address must not stand in a URL."""
    said = read_fields(_json_body(request), _PERSON_FIELDS)
    address = read_person(said.get("address", ""))
    drain_for_reading(app.database)
    if said.get("show"):
        with app.database.reading() as connection:
            return json_response(200, stored_of_person(connection, tenant.number, address))
    return json_response(200, {"forgotten": let_go(app.database, tenant.number, [address], FORGOTTEN).emails})


def post_untracked(app: App, request: Request, tenant: Tenant) -> Response:
    """Track recipients no more, in mail that was sent too."""
    said = read_fields(_json_body(request), {"addresses": _TEXTS})
    addresses = list(map(read_person, said.get("addresses", ())))
    released = let_go(app.database, tenant.number, addresses, UNTRACKED)
    return json_response(200, {"untracked": len(addresses), "emails": released.emails})


# -- Campaigns and tenants


def post_campaigns(app: App, request: Request, tenant: Tenant) -> Response:
    """Say how many emails of a campaign a mailing tool sent under its own ids, and when."""
    said = read_fields(_json_body(request), _CAMPAIGN_FIELDS)
    wanted = read_declaration(said.get("campaign", ""), said.get("sent", -1), said.get("sent_at") or None)
    with app.database.transaction() as connection, Batch(connection, now_ms()) as changes:
        first = changes.declare(tenant.number, *wanted)
    return json_response(201 if first else 200, {"campaign": wanted[0], "sent": wanted[1]})


def _said_of_tenant(app: App, request: Request, **more: Field) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """What a request says of a tenant: columns to set, and the values of RULES."""
    said = read_fields(_json_body(request), {**tenant_fields(app.settings), **more})
    said |= {"api_key_hash": None} if said.pop("open_writing", False) else {}
    rules = {rule: said.pop(name) for rule, (name, _) in RULES.items() if name in said}
    return said, rules


def set_tenant(
    connection: sqlite3.Connection, tenant: Tenant, columns: dict[str, Any], rules: Iterable[tuple[str, Any, Any]]
) -> None:
    """Change a tenant: columns, and RULES each with what to add and to remove."""
    if tenant.one_id and columns.get("api_key_hash", "") is None:
        raise BadInput(f"open_writing: {NEEDS_A_KEY}")
    if "feed" in columns:
        set_feed(connection, tenant.number, columns.pop("feed"))
    change_tenant(connection, tenant.number, **columns)
    if "tz" in columns:
        count_days_anew(connection, tenant.number)
    for rule in rules:
        set_tenant_rules(connection, tenant.number, *rule)


def post_tenants(app: App, request: Request) -> Response:
    columns, rules = _said_of_tenant(app, request, id=Field(str, 64))
    name, id_ = columns.pop("name", None) or read_tenant_name(""), columns.pop("id", "") or None
    key = None if "api_key_hash" in columns else new_api_key()
    columns["api_key_hash"] = key and key_hash(key)
    if app.settings.public_url(columns.get("tracking_host")) is None:
        raise HTTPError(409, NO_PUBLIC_URL)
    with changing_tenants(app.database) as connection:
        tenant = add_tenant(connection, name, now_ms(), id=id_)
        set_tenant(connection, tenant, columns, [(rule, new, ()) for rule, new in rules.items()])
        tenant = find_tenant(connection, tenant.mail_id)
    return json_response(201, {**tenant_summary(app.settings, tenant), "api_key": key})


def get_tenants(app: App, request: Request) -> Response:
    with app.database.reading() as connection:
        rows = [tenant_about(app.settings, connection, each) for each in list_tenants(connection)]
    return json_response(200, {"rows": rows})


def get_tenant(app: App, request: Request, word: str) -> Response:
    with app.database.reading() as connection:
        return json_response(200, tenant_about(app.settings, connection, find_tenant(connection, word)))


def patch_tenant(app: App, request: Request, word: str) -> Response:
    """Change what is said of a tenant; a list replaces the one before."""
    columns, rules = _said_of_tenant(app, request)
    with changing_tenants(app.database) as connection:
        tenant = find_tenant(connection, word)
        before = tenant_rules(connection, tenant.number)
        set_tenant(connection, tenant, columns, [(rule, new, {*before[rule]} - {*new}) for rule, new in rules.items()])
    return get_tenant(app, request, tenant.mail_id)


def delete_tenant(app: App, request: Request, word: str) -> Response:
    with changing_tenants(app.database) as connection:
        remove_tenant(connection, tenant := find_tenant(connection, word), now_ms())
    return json_response(200, {"deleted": tenant.mail_id})


def get_webhooks(app: App, request: Request, word: str) -> Response:
    with app.database.reading() as connection:
        return json_response(200, {"rows": webhooks_about(connection, find_tenant(connection, word).number)})


def post_webhooks(app: App, request: Request, word: str) -> Response:
    """Make a webhook of a tenant, or change the one that leads there."""
    said = read_fields(_json_body(request), _WEBHOOK_FIELDS)
    with app.database.transaction() as connection:
        tenant, types = find_tenant(connection, word).number, ",".join(said.get("events", CHANGE_TYPES))
        webhook = Webhook(tenant, said.get("url", ""), types, int(said.get("people_only", False)))
        told = add_webhook(connection, webhook, said.get("rotate", False))
    return json_response(200, told)


def delete_webhook(app: App, request: Request, word: str) -> Response:
    url = read_fields(request.parameters(), {"url": Field(str)}).get("url", "")
    with app.database.transaction() as connection:
        remove_webhook(connection, find_webhook(connection, word, url))
    return json_response(200, {"deleted": url})


# == Routes and application ============================================================================
# Which handler answers what, and who may ask. The access column is the security policy; a test walks it.

ANYONE = "anyone"
SHARED = "shared"  # has the dashboard id in the path, or the id of a share, which may be of one campaign alone
READER = "reader"  # has the dashboard id in the path
WRITER = "writer"  # has the dashboard id and, where the tenant has one, its API key; or the operator's key
OPERATOR = "operator"  # has API_KEY


def to_tidy(app: App, request: Request, tenant: Tenant) -> Response:
    """Lead to a page's own address, since its links are relative; from a tenant's id alone to its first page."""
    segments, only = request.segments, tenant.share and tenant.share.campaign
    if len(segments) == 1 or (only and segments[1:] == ("dashboard",)):
        segments = (tenant.id, "campaigns", only) if only else (tenant.id, "dashboard")
    path = app.settings.base_path + "".join("/" + quote(segment, safe="~+@=:") for segment in segments)
    query = "?" * bool(request.query) + quote(request.query, safe="!#$%&'()*+,/:;=?@[]\\^_`{|}~")
    return Response(302, [("Location", path + query), ("Content-Type", TEXT_TYPE), *PAGE_HEADERS], b"")


def as_page(app: App, error: HTTPError) -> Response:
    titles = {400: "This address can't be used", 404: "Not found", 500: "Something broke", 503: "Not now"}
    page = app.pages.message(titles.get(error.status, "This did not work"), error.message)
    return html_response(error.status, page, error.headers)


def as_json(app: App, error: HTTPError) -> Response:
    return json_response(error.status, {"error": error.message}, error.headers)


@dataclass(slots=True)
class Route:
    method: str
    pattern: str  # the handler gets what its names stand for; {id} becomes the tenant
    handler: Callable[..., Response]
    access: str
    errors: Callable[[App, HTTPError], Response] = as_page
    read: Callable[[tuple[str, ...]], list[str] | None] = field(init=False)

    def __post_init__(self) -> None:
        self.read = path_reader(self.pattern)


ROUTES = (
    Route("GET", PIXEL_PATH, pixel, ANYONE),
    Route("GET", SIGNED_PATH, signed_click, ANYONE),
    Route("GET", PLAIN_PATH, plain_click, ANYONE),
    Route("GET", PREFERENCES_PATH, preferences, ANYONE),
    Route("POST", PREFERENCES_PATH, post_preferences, ANYONE),
    Route("GET", "/health", health, ANYONE, as_json),
    Route("GET", "/openapi.json", file, ANYONE),
    Route("GET", "/assets/{name}", file, ANYONE),
    Route("GET", "/robots.txt", file, ANYONE),
    Route("GET", "/favicon.ico", file, ANYONE),
    Route("GET", "/", home, ANYONE),
    Route("GET", "/tenants", get_tenants, OPERATOR, as_json),
    Route("POST", "/tenants", post_tenants, OPERATOR, as_json),
    Route("GET", "/tenants/{tenant}", get_tenant, OPERATOR, as_json),
    Route("PATCH", "/tenants/{tenant}", patch_tenant, OPERATOR, as_json),
    Route("DELETE", "/tenants/{tenant}", delete_tenant, OPERATOR, as_json),
    Route("GET", "/tenants/{tenant}/webhooks", get_webhooks, OPERATOR, as_json),
    Route("POST", "/tenants/{tenant}/webhooks", post_webhooks, OPERATOR, as_json),
    Route("DELETE", "/tenants/{tenant}/webhooks", delete_webhook, OPERATOR, as_json),
    Route("GET", "/{id}/dashboard", dashboard, SHARED),
    Route("GET", "/{id}/stats.json", stats_view, SHARED, as_json),
    *(
        Route("GET", f"/{{id}}/{name}.{form}", export, READER if table in (EMAILS, EVENTS) else SHARED, as_json)
        for name, table in TABLES.items()
        for form in ("json", "csv")
    ),
    Route("GET", "/{id}/feed.json", feed_view, READER, as_json),
    Route("GET", "/{id}/campaigns/{campaign}.json", stats_view, SHARED, as_json),
    Route("GET", "/{id}/campaigns/{campaign}", campaign_view, SHARED),
    Route("GET", "/{id}/emails/{key}", email_view, READER),
    Route("GET", "/{id}/links/{link}", link_view, READER),
    Route("GET", "/{id}/people/{key}", person_view, READER),
    Route("POST", "/{id}/emails", post_emails, WRITER, as_json),
    Route("POST", "/{id}/messages", post_messages, WRITER, as_json),
    Route("POST", "/{id}/forgotten", post_forgotten, WRITER, as_json),
    Route("POST", "/{id}/untracked", post_untracked, WRITER, as_json),
    Route("POST", "/{id}/campaigns", post_campaigns, WRITER, as_json),
    Route("PATCH", "/{id}/emails/{key}", patch_email, WRITER, as_json),
    Route("DELETE", "/{id}/emails/{key}", delete_email_view, WRITER, as_json),
    Route("GET", "/{id}", to_tidy, SHARED),
)
PROGRAMS_PATH = re.compile(rf"(tenants(/.*)?|[^/]+/(messages|stats|feed|{'|'.join(TABLES)})([/.].*)?)")
NOTHING_HERE = "There is nothing at this address."


def answer(app: App, environ: WSGIEnvironment) -> Response:
    """Answer one request, errors included; only the unforeseen is raised."""
    errors: Callable[[App, HTTPError], Response] = as_page
    methods: set[str] = set()
    try:
        request = read_request(environ, app.proxies, app.mount)
        method = "GET" if request.method == "HEAD" else request.method
        for route in ROUTES:
            if (values := route.read(request.segments)) is not None:
                if route.handler is to_tidy and (methods or method != "GET"):  # whose pattern fits any word
                    break
                errors = as_json if route.access != ANYONE and is_for_programs(request) else route.errors
                if route.method == method:
                    return _dispatch(app, request, route, values)
                methods |= {"GET", "HEAD"} if route.method == "GET" else {route.method}
        if is_for_programs(request) or (not methods and PROGRAMS_PATH.fullmatch("/".join(request.segments))):
            errors = as_json
        if not methods:
            raise HTTPError(404, NOTHING_HERE)
        allow = ", ".join(sorted(methods))
        raise HTTPError(405, f"Expected one of the methods {allow}.", [("Allow", allow)])
    except HTTPError as error:
        return errors(app, error)
    except (BadInput, Conflict) as error:
        status = 404 if isinstance(error, NotThere) else 400 if isinstance(error, BadInput) else 409
        return errors(app, HTTPError(status, str(error)))
    except Busy:
        told = "The database is busy just now; nothing was changed, try again."
        return errors(app, HTTPError(503, told, [("Retry-After", "5")]))
    except StoreError as error:
        log(f"a page could not be answered: {error}")
        how = "read" if request.method in ("GET", "HEAD") else "written"
        told = f"The database can't be {how} just now. Hits are recorded all the same, and counted later."
        return errors(app, HTTPError(503, told, [("Retry-After", "30")]))


def _dispatch(app: App, request: Request, route: Route, values: list[str]) -> Response:
    """Hold a request against its route's access, then let the handler answer."""
    if route.access == ANYONE:
        return route.handler(app, request, *values)
    if route.access == OPERATOR:
        if app.settings.api_key is None:
            raise HTTPError(404, NOTHING_HERE)
        if not is_operator(app, request):
            raise HTTPError(401, OPERATORS, BEARER)
        return route.handler(app, request, *values)
    with app.database.reading() as connection:
        tenant = tenant_by_id(connection, values[0])
        if tenant is None and route.access == SHARED:
            tenant = tenant_by_share(connection, values[0], now_ms())
    if tenant is None or app.is_others_host(request, tenant.mail_id):
        raise HTTPError(404, NOTHING_HERE)
    if route.access == WRITER and (tenant.one_id or tenant.api_key_hash) and not has_key(app, request, tenant):
        if tenant.api_key_hash:
            raise HTTPError(401, "Expected the tenant's API key: Authorization: Bearer KEY.", BEARER)
        raise HTTPError(403, "This tenant's id stands in mail, so writing needs an API key: `tenant key` makes one.")
    if tenant.share and (only := tenant.share.campaign):
        if route.handler is dashboard:
            return to_tidy(app, request, tenant)
        asked = values[1] if len(values) > 1 else request.parameters().get("campaign")
        if route.handler is not to_tidy and asked != only:
            raise HTTPError(404, NOTHING_HERE)
    path = request.uri.partition("?")[0]
    if route.errors is as_page and path[:1] == "/" and path.count("/") > len(request.segments) > 1:
        return to_tidy(app, request, tenant)
    with heavy(app.settings.folder) if request.is_heavy and route.method != "GET" else contextlib.nullcontext():
        return route.handler(app, request, tenant, *values[1:])


def wsgi(app: App) -> WSGIApplication:
    def respond(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        try:
            response = answer(app, environ)
        except Exception:
            # The traceback, since whoever reads the log needs to know where; not the URI, which may hold a private id.
            environ["wsgi.errors"].write(f"unforeseen error while answering a {method}\n{traceback.format_exc()}")
            response = as_page(app, HTTPError(500, "The server made a mistake, which is in its log."))
        return send(response, method, start_response)

    return respond


_serving = threading.Lock()
_app = lru_cache(lambda: App(load_settings(os.environ)))


def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """The WSGI application for `gunicorn tracker`: builds itself, from the environment, on its first call."""
    with _serving:
        app = _app()
    app.start()
    return wsgi(app)(environ, start_response)


# == Server ============================================================================================
# How the application is served: by gunicorn, as the owner of its data, with files for nginx and systemd around it.

GUNICORN_TIMEOUT = 30  # seconds for one request, and for the last ones after SIGTERM
MAX_REQUEST_LINE = 16_384  # a plain link spells a target of 4,096 characters in up to 12,288
MOST_HEADER = 65_536  # of one header, as in the file for nginx: cookies of a parent domain grow to tens of kilobytes
MOST_HEADERS = 4 * MOST_HEADER  # of all together: gunicorn's own limit is their number, times what one may have
LONGEST_HASHED_NAME = 46  # of the 64 bytes that a bucket of nginx's table of names has by itself
SYSTEMD_FILES = ("service", "socket", "sysusers", "drain.service", "deliver.service", "backup.service", "backup.timer")
HIDDEN_FOLDERS = ("/home/", "/root/", "/run/user/", "/tmp/", "/var/tmp/")


def data_owner(folder: str) -> tuple[int, int] | None:
    """User and group of a folder, or of the nearest there is above it, if we are root and it is not root's."""
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    found = os.stat(folder)
    return (found.st_uid, found.st_gid) if os.geteuid() == 0 and found.st_uid else None


@contextlib.contextmanager
def acting_as_owner(settings: Settings) -> Iterator[None]:
    """Where root runs a command, touch the data as its owner: a file of root's among them would stop the service."""
    if (owner := data_owner(settings.folder)) is None:
        yield
        return
    group, groups = os.getegid(), os.getgroups()
    os.setgroups([owner[1]])
    os.setegid(owner[1])
    os.seteuid(owner[0])
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


def probe(settings: Settings) -> None:
    """Say at the start, not at the first hit, that the spool can't be written, and that the address is taken."""
    folder = settings.spool
    new = os.path.join(folder, f".new-{secrets.token_hex(8)}")
    try:
        with acting_as_owner(settings):
            os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640))
            os.unlink(new)
    except OSError as error:
        raise StoreError(f"can't write to the spool {folder}: {error.strerror}; hits would be lost") from error
    host, _, port = settings.address.rpartition(":")
    # systemd listens, or a master that SIGUSR2 told to start us, and gunicorn takes over the socket.
    given = os.environ.get("LISTEN_PID") == str(os.getpid()) or "GUNICORN_FD" in os.environ
    if given or not port.isdecimal() or settings.address.startswith(("unix:", "fd:")):
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:  # gunicorn would try eleven times
        both = host == "[::]" and is_dual_stack()
        socket.create_server((host.strip("[]"), int(port)), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise StoreError(f"can't listen on {settings.address}: {error.strerror}; choose another PORT or BIND") from None


def without_private(record: logging.LogRecord) -> str:
    """What one of gunicorn's log records says, without addresses and paths, which hold private ids."""
    private = r"(Invalid request .*?(?=['\"])|Error handling request ).*"
    text = re.sub(private, r"\1(hidden)", record.getMessage(), flags=re.DOTALL)
    if record.exc_info:
        text += " | " + "".join(traceback.format_exception(*record.exc_info)).strip()
    return re.sub(r"ip=\S+", "ip=(hidden)", text)


has_body = re.compile(rb"\r\n(content-length|transfer-encoding):", re.IGNORECASE).search


class Connection(socket.socket):
    """One whose answer leaves in one piece, and who then hangs up; gunicorn's would wait until the other side has."""

    held = b""
    is_whole = False  # the request was read, and has no body

    def recv(self, size: int, flags: int = 0) -> bytes:
        data = b"" if self.is_whole else super().recv(size, flags)
        if data.startswith((b"GET ", b"HEAD ")) and data.endswith(b"\r\n\r\n") and not has_body(data):
            self.is_whole = True
        return data

    def sendall(self, data: Any, flags: int = 0) -> None:
        self.held += data
        if len(self.held) > 65_536:
            super().sendall(self.held)
            self.held = b""

    def shutdown(self, how: int) -> None:
        super().sendall(self.held)
        if not self.is_whole:  # else to hang up cuts nothing off
            super().shutdown(how)


def forgiving_request() -> type:
    """gunicorn's request, but no header that nobody reads has a say, and bytes beyond ASCII in a path are read."""
    from gunicorn.http import errors, message

    message.MAX_REQUEST_LINE = MAX_REQUEST_LINE  # it would cap limit_request_line at 8,190

    class Request(message.Request):  # type: ignore[misc]  # gunicorn has no types
        def parse(self, unreader: Any) -> Any:
            self.max_buffer_headers = MOST_HEADERS
            return super().parse(unreader)

        def parse_request_line(self, line: bytes) -> None:
            if not line.isascii():  # some clients don't encode what they are given
                line = re.sub(rb"[\x80-\xff]", lambda byte: b"%%%02X" % ord(byte[0]), line)
            super().parse_request_line(line)

        def parse_headers(self, data: bytes, from_trailer: bool = False) -> Any:
            try:
                return super().parse_headers(data, from_trailer)
            # What says where a request ends stays as strict: its length, its chunks, line breaks, names of headers.
            except (errors.ExpectationFailed, errors.InvalidHeader):
                self._policy_expect_continue = False
                return super().parse_headers(re.sub(rb"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]", b"?", data), from_trailer)

    return Request


def run_gunicorn(settings: Settings, app: App) -> None:
    """Serve until SIGTERM; then requests already accepted are answered and the spool is drained."""
    import logging

    # gunicorn reads these itself, and more strictly than we do.
    os.environ["WEB_CONCURRENCY"] = str(settings.web_concurrency)
    os.environ["FORWARDED_ALLOW_IPS"] = ",".join(settings.forwarded_allow_ips)
    try:
        from gunicorn.app.base import BaseApplication
    except ImportError:
        raise StoreError("gunicorn is not installed for this Python; use `make run`, or .venv/bin/python") from None
    from gunicorn import http, util
    from gunicorn.glogging import Logger
    from gunicorn.workers.sync import SyncWorker

    http.RequestParser.mesg_class = forgiving_request()
    # What it would make for each request, though it stays the same for a second, and for ever.
    http_date = lru_cache(maxsize=1)(util.http_date)
    util.http_date = lambda: http_date(int(time.time()))
    http.wsgi.WSGIErrorsWrapper = lru_cache(maxsize=1)(http.wsgi.WSGIErrorsWrapper)

    class StdoutLogger(Logger):  # type: ignore[misc]  # gunicorn has no types
        def setup(self, cfg: Any) -> None:
            super().setup(cfg)
            handler = logging.Handler()
            handler.emit = lambda record: log(without_private(record))  # type: ignore[method-assign]
            self.error_log.handlers[:] = [handler]

    class Worker(SyncWorker):  # type: ignore[misc]  # gunicorn has no types
        said_at = -math.inf

        def run(self) -> None:
            """Serve, with settings that stand: to look them up took gunicorn a fifth of each request."""
            self.cfg.__dict__.update({name: setting.get() for name, setting in self.cfg.settings.items()})
            super().run()

        def notify(self) -> None:
            """Tell the master that this worker lives: once a second, not before each request."""
            if time.monotonic() - self.said_at >= 1:
                self.said_at = time.monotonic()
                super().notify()

        def accept(self, listener: Any) -> None:
            descriptor, address = listener._accept()  # closed on exec, and waits, without being told
            self.handle(listener, Connection(listener.family, listener.type, fileno=descriptor), address)

    class Server(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
        def load_config(self) -> None:
            classes = {"logger_class": StdoutLogger, "worker_class": Worker}
            for name, value in {**gunicorn_options(settings, app), **classes}.items():
                self.cfg.set(name, value)

        def load(self) -> WSGIApplication:
            return wsgi(app)

    heed_sigterm()
    Server().run()


def _heartbeat_folder(settings: Settings) -> str:
    """Where workers tell the master that they live: in memory, where that can be, so that it waits for no disk."""
    import tempfile

    with contextlib.suppress(FileNotFoundError):
        return "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
    log("neither /dev/shm nor /tmp can be written to; what workers say that they live goes to the data folder")
    return settings.folder


def gunicorn_options(settings: Settings, app: App) -> dict[str, Any]:
    user, group = data_owner(settings.folder) or (os.geteuid(), os.getegid())

    def share_memory(server: object) -> None:
        gc.collect()
        gc.freeze()  # the collector's marks would copy each page that is loaded before the fork
        gc.set_threshold(20_000, 20, 20)  # requests leave few cycles; a look every 700 objects costs a hundredth

    return {
        "user": user,
        "group": group,
        "bind": settings.address,
        "workers": settings.web_concurrency,
        "preload_app": True,  # workers share the memory of what is loaded before they are born
        "control_socket_disable": True,  # it would make a folder in the user's home
        "timeout": GUNICORN_TIMEOUT,
        "graceful_timeout": GUNICORN_TIMEOUT,
        "limit_request_line": MAX_REQUEST_LINE,
        "limit_request_fields": MOST_HEADERS,  # it makes as many of it as it can
        "limit_request_field_size": MOST_HEADER,
        "http_parser": "python",  # where its other one is installed too: which would know nothing of forgiving_request
        "forwarder_headers": "",  # or a header SCRIPT_NAME would be part of the path
        "secure_scheme_headers": {},  # nothing here asks for the scheme, and contradictions about it would be a 400
        "proc_name": "email-tracker",
        "worker_tmp_dir": _heartbeat_folder(settings),
        "when_ready": share_memory,
        "post_worker_init": lambda worker: app.start(),
    }


def heed_sigterm() -> None:
    """End a worker whose SIGTERM comes before it listens for it: gunicorn would lose it, and then wait 30 s in vain."""

    mask = signal.pthread_sigmask
    hold, let_it_come = (partial(mask, how, {signal.SIGTERM}) for how in (signal.SIG_BLOCK, signal.SIG_UNBLOCK))

    def end_by_it() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        let_it_come()

    # The signal waits until the child has the default back: the master's handler is not for it.
    os.register_at_fork(before=hold, after_in_parent=let_it_come, after_in_child=end_by_it)


def server_file(name: str, /, **values: str) -> str:
    """Fill in one of the files for nginx and systemd. `@@` marks what is, since they use `$` and `%` themselves."""
    values["program"] = PROGRAM
    return re.sub(r"@@(\w+)", lambda match: values[match[1]], resource(f"templates/{name}").decode())


def nginx_group() -> str:
    """The group that nginx's workers run in, on this machine; Debian's where there is none."""
    import grp

    known = {group.gr_name for group in grp.getgrall()}
    return next((name for name in ("www-data", "nginx", "http") if name in known), "www-data")


def share_spool(settings: Settings) -> None:
    """Make the folder of the spool that nginx writes into; it can pass through those above, and read nothing there."""
    folder = os.path.join(settings.spool, "nginx")
    try:
        with acting_as_owner(settings):
            os.makedirs(folder, mode=0o750, exist_ok=True)
            for above in (settings.folder, settings.spool):
                os.chmod(above, os.stat(above).st_mode | 0o001)
        shutil.chown(folder, group=nginx_group())
        os.chmod(folder, 0o2770)
    except (OSError, LookupError) as error:
        raise StoreError(f"{folder} can't be given to nginx's group {nginx_group()}: {error}; expected root") from error


def _refuse_odd_path(path: str, reader: str) -> None:
    if not re.fullmatch(r"/[\w./+@-]+", path, re.ASCII):
        raise BadInput(f"{path!r}: expected an absolute path of letters, digits and . _ + @ -, for {reader} to read")


def has_certificate(folder: str, host: str) -> bool:
    try:
        return os.stat(os.path.join(folder, host, "fullchain.pem")).st_size > 0
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StoreError(f"can't look for certificates in {folder}: {error.strerror}; expected to be root") from error


def _nginx_pixels(settings: Settings, tenants: Mapping[str, Any], root: str) -> str:
    """How nginx logs pixels: what is kept of an address, and which addresses are the senders' own."""
    kept = {"full": "$remote_addr", "none": "", "truncated": "$email_tracker_cut_address"}[settings.ip_addresses]
    blocks = own = ""
    for number, (mail_id, entry) in enumerate(tenants.items()):
        if entry["own"]:
            networks = "".join(f"\n    {network} true;" for network in entry["own"])
            blocks += f"\ngeo $email_tracker_own_{number} {{\n    default false;{networks}\n}}"
            own += f"\n    {mail_id} $email_tracker_own_{number};"
    said = {"root": root, "longest": str(MAX_KEY), "kept": kept, "blocks": blocks, "own": own}
    return server_file("_nginx_pixels.conf", **said)


def nginx_locations(settings: Settings, log_folder: str, networks: Sequence[str], whose: str | None, path: str) -> str:
    """What a server of nginx needs for a path: `whose` pixels it answers, which networks are proxies before it."""
    _refuse_odd_path(log_folder, "nginx")
    believed = "".join(f"    set_real_ip_from {network};\n" for network in networks)
    believed += "    real_ip_header X-Forwarded-For;\n    real_ip_recursive on;\n" * bool(networks)
    more = {"believed": believed, "answered": "", "pixels": "", "path": path, "log_folder": log_folder}
    if whose is not None:
        more["pixels"] = server_file("_nginx_pixel.conf", cache_control=NEVER_KEPT, spool=settings.spool)
        more["answered"] = server_file("_nginx_answered.conf", whose=whose)
    return server_file("_nginx_locations.conf", **more)


def nginx_file(
    settings: Settings,
    hosts: Mapping[str, bool],
    http_port: int,
    tenants: Mapping[str, Any] | None,
    networks: Sequence[str],
    **places: str,
) -> str:
    """nginx's configuration for hosts, each with whether it has its certificate yet; given tenants, it answers pixels.

    nginx does not start without a certificate that it was told of: until it is there, a host only answers those who
    make it. Raises BadInput for what nginx would read as something else.
    """
    for path in places.values():
        _refuse_odd_path(path, "nginx")
    if not is_port(str(http_port)):
        raise BadInput(f"--http-port is {http_port}: expected a port from 1 to 65535")
    if settings.address.startswith("fd:"):
        raise StoreError(f"BIND is {settings.address}; expected where nginx finds the tracker: unix:/path or HOST:PORT")
    if settings.address.startswith("unix:"):
        _refuse_odd_path(settings.address.removeprefix("unix:"), "nginx")
    upstream = re.sub(r"^(0\.0\.0\.0|\[::\]):", "127.0.0.1:", settings.address)
    match = re.match("(https?)://[^/]*?(:([0-9]+))?(?:/|$)", settings.base_url or "")
    scheme, shown_port, port = match.groups("") if match else ("https", "", "")
    owners = {entry["tracking_host"]: mail_id for mail_id, entry in (tenants or {}).items()}
    servers = []
    for host, is_certified in hosts.items():
        # A longer name keeps nginx from starting. Larger buckets are a setting that all its sites share and that must
        # not stand twice, so such a name becomes a pattern, which needs none.
        server_name = host if len(host) <= LONGEST_HASHED_NAME else f'"~^{re.escape(host)}$"'
        whose = f" = {owners[host]}" if host in owners else ""  # a tracking host answers for its tenant alone
        locations = nginx_locations(settings, places["log_folder"], networks, None if tenants is None else whose, "")
        server = partial(server_file, server_name=server_name, locations=locations, **places)
        certificate, listen = "", _nginx_listen(port or http_port)
        if scheme == "https":
            otherwise = f"return 301 https://{host}{shown_port}$request_uri;" if is_certified else "return 503;"
            servers.append(server("_nginx_challenge.conf", listen=_nginx_listen(http_port), otherwise=otherwise))
            certificate = server_file("_nginx_certificate.conf", host=host, **places)
            listen = _nginx_listen(port or DEFAULT_PORTS["https"], " ssl")
        if scheme == "http" or is_certified:
            servers.append(server("_nginx_server.conf", listen=listen, certificate=certificate))
    root = f"(?:{settings.base_pattern})?" if settings.base_path else ""
    logged = "" if tenants is None else _nginx_pixels(settings, tenants, root)
    more = {"peer": "$realip_remote_addr" if networks else "$remote_addr", "servers": "\n".join(servers)}
    more["networks"] = "".join(f"\n    {network} -;" for network in networks)
    return server_file("nginx.conf", upstream=upstream, root=root, pixels=logged, **more)


def _nginx_listen(port: object, options: str = "") -> str:
    addresses = ("", "[::]:") if os.path.exists("/proc/net/if_inet6") else ("",)  # else nginx would not start
    return "\n".join(f"    listen {address}{port}{options};" for address in addresses)


def systemd_file(settings: Settings, name: str, command: Sequence[str], env_file: str) -> str:
    """One of SYSTEMD_FILES. Raises BadInput for what can't work."""
    for path in (*command[::2], settings.folder, env_file):
        _refuse_odd_path(path, "systemd")
    if name == "socket":
        listen, permissions = settings.address.removeprefix("unix:"), ""
        if listen != settings.address:
            _refuse_odd_path(listen, "systemd")
            permissions = server_file("_systemd_permissions.socket", group=nginx_group())
        elif read_address(listen) is None:
            raise BadInput(f"BIND is {listen}; expected unix:/path or ADDRESS:PORT: systemd looks up no names")
        return server_file("systemd.socket", listen=listen, permissions=permissions)
    for path in (*command[::2], settings.folder):
        if name.endswith("service") and f"{path}/".startswith(HIDDEN_FOLDERS):
            expected = "the program in /usr/local/bin (see --program), a Python in /usr/bin, the database in /var/lib"
            raise BadInput(f"{path}: a service can't read what is in {', '.join(HIDDEN_FOLDERS)}; expected {expected}")
    state = re.fullmatch("/var/lib/([^/]+)", settings.folder)
    mode = "0751" if os.path.isdir(os.path.join(settings.spool, "nginx")) else "0750"  # whether nginx passes through
    written = f"StateDirectory={state[1]}\nStateDirectoryMode={mode}" if state else f"ReadWritePaths={settings.folder}"
    network = " AF_INET AF_INET6" if settings.is_shared or name == "deliver.service" else "\nPrivateNetwork=yes"
    process = server_file("_systemd_process.service", env_file=env_file, written=written, network=network)
    return server_file(f"systemd.{name}", command=" ".join(command), process=process, folder=settings.folder)


# == Commands ==========================================================================================
# The command line: each command is a function whose docstring is its help, below its options.

_TOPICS = "instrument postfix api numbers dashboard keep scale elsewhere privacy costs design"
HELP_TOPICS = tuple(_TOPICS.split())
CLEAN_SECONDS = 120.0  # that `forget` waits for others, who read, and for nginx
PIPE_PATIENCE = 5.0  # seconds that `instrument` waits for the database: a mail system waits for it

Option = tuple[str, dict[str, Any]]
Run = Callable[..., "int | None"]  # takes arguments and settings, returns an exit status
COMMANDS: dict[str, tuple[Run, tuple[Option, ...]]] = {}  # by their words, in the order of help
COMMAND_GROUPS = {
    "tenant": "make, change, list and remove tenants",
    "tenant webhook": "send what becomes of hits to other programs",
    "campaign": "say how many emails were sent without being registered, list campaigns",
}


def command(*options: Option) -> Callable[[Run], Run]:
    """Make a function the command that its name says, after `cmd_`; its docstring is the help."""

    def register(run: Run) -> Run:
        COMMANDS[run.__name__.removeprefix("cmd_").replace("_", " ")] = (run, options)
        return run

    return register


def option(form: str, about: str, **how: Any) -> Option:
    """What a command takes: `--name VALUE`, `--name VALUE...` often, `--flag`, or `name VALUE` without its name."""
    name, _, value = form.partition(" ")
    if value:
        how["metavar"] = value
    elif name.startswith("--") and not how:
        how["action"] = "store_true"
    if "default" in how:
        about += f"; default: {how['default']}"
    if value.endswith("..."):
        how |= {"action": "append", "default": []}
    return name, {"help": about, **how}


TENANT = option("tenant TENANT", "a tenant's dashboard id, mail id or name")
LOCAL = option("--local", "without BASE_URL, make links to this machine, for a trial")
JSON = option("--json", "print JSON, for programs")
OUTPUT = option("--output FILE", "write the file there, whole or not at all (default: print it)")


def say(args: Namespace, value: Any, lines: Iterable[str]) -> None:
    """Print what a command found out: as JSON where that was asked for, else in lines."""
    for line in [json.dumps(value, ensure_ascii=False)] if args.json else lines:
        print(line)


def tell(*texts: str) -> None:
    """Say something to the person at the terminal, beside what is printed."""
    for line in "\n".join(texts).splitlines():
        print(f"{PROGRAM}: {line}", file=sys.stderr)


@contextlib.contextmanager
def new_file(path: str, mode: int) -> Iterator[BinaryIO]:
    """A file that was not there; nothing is left of it where it does not become whole."""
    try:
        with open(path, "xb", opener=partial(os.open, mode=mode)) as file:
            yield file
    except FileExistsError:
        raise StoreError(f"{path} is there already; expected the name of a new file") from None
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(path)
        if isinstance(error, OSError):
            raise StoreError(f"{path}: {error.strerror}") from error
        raise


@contextlib.contextmanager
def database_of(
    settings: Settings, *, make: bool = False, drained: bool = False, patience: float = math.inf
) -> Iterator[Database]:
    """The database, touched as its owner; if that is wanted, made where there is none, or what waits counted first."""
    with acting_as_owner(settings), contextlib.closing(open_database(settings, patience, make=make)) as database:
        with database.reading():
            pass  # a missing database is named before anything else that is missing with it
        if drained:
            drain_first(database)
        yield database


def drain_first(database: Database) -> None:
    """Count what waits before numbers are read; says so, where not all of it could be counted."""
    try:
        is_long = (read_state(database.folder)["waiting"] or 0) > BACKLOG  # a server is at it
        if is_long or not drain_for_reading(database, seconds=10.0):
            tell("note: some hits are still waiting to be counted")
    except StoreError as error:
        tell(f"note: waiting hits could not be counted: {error}")


@command(LOCAL)
def cmd_serve(args: Namespace, settings: Settings) -> None:
    """Serve the tracker under gunicorn (the default command). Makes the database on its first run."""
    try:
        with database_of(settings, make=True) as database, changing_tenants(database) as connection:
            forget_gone(database.folder, connection)
            if not list_tenants(connection):
                add_tenant(connection, "default", now_ms(), api_key_hash=key_hash(new_api_key()))
                # Ids and keys are for a person and not for a log.
                show = f"{PROGRAM} tenant show default{' --local' * settings.local}"
                log(f"made the tenant default; its URLs: {show}; a key to write with: {PROGRAM} tenant key default")
    except StoreError as error:
        if isinstance(error, Conflict) or not os.path.exists(os.path.join(settings.folder, "tenants.json")):
            raise
        # Mail already sent goes on working: its hits wait in the spool until there is a sound database.
        log(f"serving pixels and links only: {error}")
    probe(settings)
    if settings.local:
        log(f"open {settings.public_url()} (a tenant's dashboard: {PROGRAM} tenant show NAME --local)")
    with acting_as_owner(settings):
        app = App(settings)
        with contextlib.suppress(OSError):  # a full disk
            drainer_of(app.database, settings).turn()  # /health is asked at once
            os.unlink(hidden_file(settings.folder))  # it may be mended
        app.database.close()  # a connection must not live through a fork
    run_gunicorn(settings, app)


# -- Tenants

TENANT_OPTIONS = (  # what `tenant add` and `tenant set` take alike
    option("--domain HOST...", "plain links may lead to this domain"),
    option("--remove-domain HOST...", "… may no longer"),
    option("--any-domain", "whether plain links may lead anywhere (an open redirect)", action="yes or no"),
    option("--tracking-host HOST", "its own host for links, a CNAME to this server; '' for none"),
    option("--block HOST...", "no link, signed or plain, leads there"),
    option("--unblock HOST...", "links may lead there again"),
    option("--tz ZONE", "in which zone its days begin, such as Europe/Rome"),
    option("--unregistered-a-day NUMBER", f"emails that hits alone may make, not {A_DAY['unregistered']:,}", type=int),
    option("--retention DAYS", "how long facts are kept; 0: for ever; '': RETENTION_DAYS", dest="retention_days"),
    option("--own ADDRESS...", "the sender's own address or network, whose hits are set aside"),
    option("--not-own ADDRESS...", "… is no longer the sender's own"),
    option("--utm TEXT", f"parameters that links' targets get, such as {UTM_EXAMPLE}; '' for none"),
    option("--forward NAME...", "links forward this parameter of theirs to the target, as they do utm_…"),
    option("--no-forward NAME...", "… no longer"),
    option("--ignore-gpc", "whether hits that ask for no tracking (Sec-GPC, DNT) count as others", action="yes or no"),
    option("--suspend", "whether all links show the naming page", action="yes or no", dest="suspended"),
    option("--feed", "whether what becomes of its hits is kept for feed.json, for 8 days", action="yes or no"),
    option("--open-writing", "whoever has the dashboard URL may write and delete over HTTP, without an API key"),
    LOCAL,
    JSON,
)


def _read_changes(args: Namespace, settings: Settings) -> tuple[dict[str, Any], list[Any]]:
    """Read TENANT_OPTIONS before anything is opened or made: columns to set, RULES each with what to add and to remove."""
    known = {name: each.read for name, each in tenant_fields(settings).items() if name in (*Tenant.__slots__, "feed")}
    given = {name: said for name in known if (said := getattr(args, name)) is not None}
    words = {name: f"--{name.removesuffix('_days').replace('_', '-')}" for name in known}
    columns = {name: read(said, words[name]) if (read := known[name]) else said for name, said in given.items()}
    columns |= {"api_key_hash": None} if args.open_writing else {}
    rules = (
        ("allow", read_destination, args.domain, args.remove_domain),
        ("block", read_destination, args.block, args.unblock),
        ("own", read_own_network, args.own, args.not_own),
        ("forward", read_parameter, args.forward, args.no_forward),
    )
    return columns, [(rule, [*map(read, add)], [*map(read, remove)]) for rule, read, add, remove in rules]


@command(
    option("name NAME", "what to call the tenant"),
    option("--id ID", "one id of your own for mail and dashboard (recipients can then open the dashboard)"),
    option("--another", "also where there is a tenant of this name; name them by their ids then"),
    *TENANT_OPTIONS,
)
def cmd_tenant_add(args: Namespace, settings: Settings) -> None:
    """Make a tenant and print its ids, its URLs and, this once, the API key that writing over HTTP needs."""
    if settings.public_url(args.tracking_host) is None:
        raise StoreError(NO_PUBLIC_URL)
    columns, rules = _read_changes(args, settings)
    key = None if args.open_writing else new_api_key()
    columns["api_key_hash"] = key and key_hash(key)
    with database_of(settings, make=True) as database, changing_tenants(database) as connection:
        if not args.another and (others := namesakes(connection, columns["name"])):
            whose = f"{others[0].name!r} ({others[0].mail_id})"
            raise BadInput(f"there is a tenant {whose} already; expected another name, or --another for one more of it")
        tenant = add_tenant(connection, columns["name"], now_ms(), id=args.id)
        set_tenant(connection, tenant, columns, rules)
    cmd_tenant_show(args, settings, tenant.id, key)
    if key:
        tell("note: POST, PATCH and DELETE need the API key, which is shown this once; `tenant key` makes another")
    if tenant.one_id:
        tell("note: every recipient can open this dashboard, so it names nobody but to who sends the API key")
    if not args.domain and not args.any_domain:
        allow = f"{PROGRAM} tenant set {tenant.mail_id} --domain acme.com"
        tell(f"note: plain links (?url=…) lead to the naming page, signed ones redirect; so that all do: {allow}")


@command(TENANT, option("--name NAME", "another name"), *TENANT_OPTIONS)
def cmd_tenant_set(args: Namespace, settings: Settings) -> None:
    """Change what a tenant is called, where its links may lead, and whether they lead anywhere."""
    columns, rules = _read_changes(args, settings)
    with database_of(settings) as database, changing_tenants(database) as connection:
        tenant = find_tenant(connection, args.tenant)
        set_tenant(connection, tenant, columns, rules)
    cmd_tenant_show(args, settings, tenant.id)


@command(JSON)
def cmd_tenant_list(args: Namespace, settings: Settings) -> None:
    """List tenants with what they sent in 30 days (as in `stats`), what people opened of it, and their last hit."""
    rows, now = [], now_ms()
    lines = ["mail_id                  sent          opened  last hit             name"]
    with database_of(settings, drained=True) as database, database.reading() as connection:
        for tenant in list_tenants(connection):
            span = read_period("30d", zone_of(tenant), now, None).span(tenant.tz)
            sums = cohort_in(connection, tenant.number, span)
            last = last_hit_at(connection, tenant.number) or 0
            at = iso_time(last) if last >= now - 30 * DAY_MS else None
            sent, people, unsure = sums["emails"], sums["opened_person"], sums["opened_unconfirmed"]
            row = {"mail_id": tenant.mail_id, "name": tenant.name, "sent": sent, "opened": people}
            rows.append({**row, "opened_unconfirmed": unsure, "last_hit_at": at, "suspended": tenant.suspended})
            opened = f"{people}–{people + unsure}" if unsure else people
            name = tenant.name + " (suspended)" * tenant.suspended
            lines.append(f"{tenant.mail_id:20} {sent:>8} {opened:>15}  {(at or 'none')[:19]:20} {name}")
    say(args, rows, lines)


@command(TENANT, LOCAL, JSON)
def cmd_tenant_show(args: Namespace, settings: Settings, word: str = "", key: str | None = None) -> None:
    """Print a tenant's ids, URLs and rules."""
    with database_of(settings) as database, database.reading() as connection:
        about = tenant_about(settings, connection, find_tenant(connection, word or args.tenant))
    about |= {"domains": ["any"]} if about.pop("any_domain") else {}
    about |= {"api_key": key} if key else {}
    unknown = "(set BASE_URL, or add --local)"
    shown = {name: ", ".join(value) if isinstance(value, list) else value for name, value in about.items()}
    shown = {name: unknown if text is None and name.endswith("_url") else text for name, text in shown.items()}
    lines = [f"{name:14} {text}" for name, text in shown.items() if text not in ("", None)]
    say(args, about, lines)


@command(TENANT, option("--remove", "take the key away"), JSON)
def cmd_tenant_key(args: Namespace, settings: Settings) -> None:
    """Make a tenant a new API key and print it, this once; the old one stops working."""
    key = None if args.remove else new_api_key()
    with database_of(settings) as database, changing_tenants(database) as connection:
        tenant = find_tenant(connection, args.tenant)
        change_tenant(connection, tenant.number, api_key_hash=key and key_hash(key))
    closed = "writing is closed" if tenant.one_id else "its dashboard id writes"
    say(args, {"api_key": key}, [key or f"{tenant.name} has no API key now; {closed}"])


@command(TENANT, LOCAL, JSON)
def cmd_tenant_rotate(args: Namespace, settings: Settings) -> None:
    """Give a tenant a new dashboard id; the old one opens nothing any more, mail already sent works on."""
    id_ = new_dashboard_id()
    with database_of(settings) as database, changing_tenants(database) as connection:
        tenant = find_tenant(connection, args.tenant)
        change_tenant(connection, tenant.number, id=id_, id_in_mail_at=None)
    cmd_tenant_show(args, settings, id_)


MOST_SHARED = 3_650  # days
SHARE_NAME = 8  # characters of its hash


@command(
    TENANT,
    option("--campaign CAMPAIGN", "only the numbers of this campaign"),
    option("--days DAYS", "for how long", type=int, default=30),
    LOCAL,
    JSON,
)
def cmd_tenant_share(args: Namespace, settings: Settings) -> None:
    """Make an address under which numbers can be read, without recipients and single emails. Prints it, this once."""
    if not 1 <= args.days <= MOST_SHARED:
        raise BadInput(f"--days: expected a number of days from 1 to {MOST_SHARED:,}")
    campaign = read_declaration(args.campaign, 0, None)[0] if args.campaign is not None else ""
    id_, now = new_dashboard_id(), now_ms()
    share = Share(key_hash(id_), campaign, now, now + args.days * DAY_MS)
    with database_of(settings) as database, changing_tenants(database) as connection:
        tenant = find_tenant(connection, args.tenant)
        if (url := tenant_summary(settings, replace(tenant, id=id_))["dashboard_url"]) is None:
            raise StoreError(NO_PUBLIC_URL)
        set_shares(connection, tenant.number, [*shares_of(connection, tenant.number, now), share])
        is_known = read_table(connection, tenant.number, CAMPAIGNS, Wanted(campaign=campaign)).rows
    if campaign and not is_known:
        tell(f"note: there is no campaign {campaign!r} so far; until there is one, the address shows nothing")
    url = url.removesuffix("/dashboard") if campaign else url
    say(args, {"url": url, "campaign": campaign, "ends_at": iso_time(share.ends_at)}, [url])


@command(TENANT, option("--revoke SHARE", "end this one: its address, or its name as listed"), JSON)
def cmd_tenant_shares(args: Namespace, settings: Settings) -> None:
    """List the addresses that `tenant share` made and that open a tenant's numbers now; end one."""
    with database_of(settings) as database:
        using = changing_tenants(database) if args.revoke else database.reading()
        with using as connection:
            tenant = find_tenant(connection, args.tenant)
            shares = {share.hash[:SHARE_NAME]: share for share in shares_of(connection, tenant.number, now_ms())}
            if args.revoke:
                names = {args.revoke, *(key_hash(part)[:SHARE_NAME] for part in args.revoke.split("/"))} & shares.keys()
                if len(names) != 1:
                    raise BadInput("--revoke: expected the address of a share, or its name as `tenant shares` lists it")
                del shares[names.pop()]
                set_shares(connection, tenant.number, shares.values())
    told, lines = [], ["share      campaign         made and ends"]
    for name, share in shares.items():
        made, ends = iso_time(share.created_at), iso_time(share.ends_at)
        told.append({"share": name, "campaign": share.campaign, "created_at": made, "ends_at": ends})
        lines.append(f"{name}   {share.campaign or '(all)':15}  {made}  {ends}")
    say(args, told, lines)


@command(TENANT, option("--yes", "don't ask"))
def cmd_tenant_remove(args: Namespace, settings: Settings) -> None:
    """Delete a tenant and all its data. Its mail id stays reserved; links in its old mail show the naming page."""
    with database_of(settings) as database, database.reading() as connection:
        tenant = find_tenant(connection, args.tenant)
    if not args.yes:
        print(f"This deletes {tenant.name} and its numbers; its old links will show the naming page.")
        print("Type its name to go on: ", end="", flush=True)
        if sys.stdin.readline().strip() != tenant.name:
            raise StoreError("expected its name on standard input, or --yes; nothing was deleted")
    with database_of(settings) as database, changing_tenants(database) as connection:
        remove_tenant(connection, find_tenant(connection, tenant.id), now_ms())
    print(f"deleted {tenant.name}; links in its old mail show the naming page from now on")


URL_OF_WEBHOOK = option("url URL", "where it leads")


@command(
    TENANT,
    URL_OF_WEBHOOK,
    option("--events TYPES", "what is sent, with commas between", default=",".join(CHANGE_TYPES)),
    option("--people-only", "nothing of machines"),
    option("--rotate", "make another secret; the one before signs too, until it is done again"),
    JSON,
)
def cmd_tenant_webhook_add(args: Namespace, settings: Settings) -> None:
    """Send what becomes of hits to a URL from now on (`deliver` does). Again: change it, and switch it on. Prints its secrets."""
    with database_of(settings) as database, database.transaction() as connection:
        tenant = find_tenant(connection, args.tenant).number
        told = add_webhook(connection, Webhook(tenant, args.url, args.events, int(args.people_only)), args.rotate)
    say(args, told, told["secrets"])


@command(TENANT, JSON)
def cmd_tenant_webhook_list(args: Namespace, settings: Settings) -> None:
    """List where what becomes of a tenant's hits is sent, and whether that works."""
    with database_of(settings) as database, database.reading() as connection:
        told = webhooks_about(connection, find_tenant(connection, args.tenant).number)
    lines = []
    for each in told:
        what = ",".join(each["events"]) + ", people only" * each["people_only"]
        since = f", since {each['failing_since']}: {each['trouble']}" if each["failing_since"] else ""
        lines.append(f"{each['state']:4} {each['url']} ({what}), {each['behind']:,} behind{since}")
    say(args, told, lines)


@command(TENANT, URL_OF_WEBHOOK)
def cmd_tenant_webhook_test(args: Namespace, settings: Settings) -> int:
    """Send a webhook an event of the type `test` now, and say what was answered."""
    with database_of(settings) as database, database.reading() as connection:
        webhook = find_webhook(connection, args.tenant, args.url)
    at = now_ms()
    body = json.dumps({"type": "test", "timestamp": iso_time(at), "data": {}}).encode()
    lane = Lane(webhook.url, settings.webhook_networks or ())
    trouble = lane.post(body, webhook.headers(f"test-{at}", body, at))
    lane.close()
    print(f"{webhook.url}: {trouble or 'took it'}")
    return 1 if trouble else 0


@command(TENANT, URL_OF_WEBHOOK)
def cmd_tenant_webhook_remove(args: Namespace, settings: Settings) -> None:
    """Send nothing to a URL any more."""
    with database_of(settings) as database, database.transaction() as connection:
        remove_webhook(connection, find_webhook(connection, args.tenant, args.url))


# -- Sending


@command(
    TENANT,
    option("--email KEY", "the key of the email (default: by Message-ID and --recipient, or a new one)"),
    option("--key-placeholder TEXT", "a mailing tool's mark for its own ids; registers nothing"),
    option("--recipient RECIPIENT", "the recipient's address (default: the first of the headers)"),
    option("--subject SUBJECT", "the subject (default: that of the headers)"),
    option("--campaign CAMPAIGN", "the campaign that the email belongs to"),
    option("--html", "standard input is HTML, not a message"),
    option("--pixel PLACE", "bottom, top, none, or a mark in the HTML, such as {{pixel}}", default="bottom"),
    option("--no-links", "leave the links as they are", dest="links", action="store_false"),
    option("--hidden-link", "add a link that only scanners see; whatever follows it is known to be one"),
    option(
        "--preferences TEXT",
        "add a line with this text that leads to where the recipient says no; without TEXT: Tracking preferences",
        nargs="?",
        const="Tracking preferences",
    ),
    option("--utm TEXT", "parameters that links' targets get, in place of the tenant's; '' for none"),
    option("--placeholder REGEX", "leave URLs in which this is found, besides those with a known placeholder"),
    option("--force", "also messages with a signature that a change breaks"),
    option("--strict", f"if it can't be registered, write nothing and exit {os.EX_TEMPFAIL}: mail systems try again"),
    option("--report FILE", "write there, as JSON, what was done and what was not, and why"),
    LOCAL,
)
def cmd_instrument(args: Namespace, settings: Settings) -> int:
    """Wrap the links of a message and place the pixel: standard input to standard output. Registers it as an email."""
    names = ("email", "pixel", "utm", "preferences", *SAID_OF_EMAILS)
    given = {name: text for name in names if (text := getattr(args, name)) is not None}
    said = read_fields(given, {**EMAIL_FIELDS, "email": EMAIL_FIELDS["key"], "preferences": Field(str, 200)}, "--")
    mark = args.key_placeholder
    if mark is not None and (fault := placeholder_fault(mark)):
        raise BadInput(f"--key-placeholder: {fault}")
    if mark and "email" in said:
        raise BadInput("--email and --key-placeholder: expected one of them")
    given_key, _, _ = said.pop("email", mark), said.pop("pixel"), said.pop("preferences", "")
    # Nothing but the message may get into the message.
    with contextlib.redirect_stdout(sys.stderr), open(args.report or os.devnull, "w", encoding="utf-8") as report_file:
        raw = sys.stdin.buffer.read()
        if args.html and raw.decode("latin-1").startswith(tuple(BYTE_ORDER_MARKS)):
            raise BadInput("--html: expected HTML in UTF-8, not UTF-16 or UTF-32")
        try:
            key, new, report = _wrapped(args, settings, given_key, raw, said)
        except StoreError as error:
            tell(f"{error}; nothing was written, try again")
            return os.EX_TEMPFAIL
        json.dump({"email": key, **report.as_json()}, report_file, ensure_ascii=False, indent=1)
    sys.stdout.buffer.write(new)
    notes = report.warnings()
    if not report.tracks:
        reasons = "; ".join(f"{part}: {reason}" for part, reason in report.skipped[:3]) or report.pixel
        hint = "; HTML that is no message is given with --html" if not args.html and raw.lstrip()[:1] == b"<" else ""
        notes = [f"nothing is tracked, so no email was registered ({reasons}){hint}", *notes]
    tell(*(f"note: {each}" for each in notes))
    return 0


def _wrapped(
    args: Namespace, settings: Settings, key: str | None, raw: bytes, said: dict[str, Any]
) -> tuple[str, bytes, Report]:
    """Instrument and register, wherever the database is and whatever its state: a mail system waits."""
    # The owner of the data may not read root's Python, so little is done as the owner.
    database = open_database(settings, patience=PIPE_PATIENCE)
    registers = args.key_placeholder is None
    try:
        with acting_as_owner(settings):
            maker = _link_maker_of(args.tenant, settings, database)
        tool = None if registers else args.campaign or ""
        message = b"" if args.html else raw
        key = key or key_of_message(maker, message, said.get("recipient", ""))
        left = None if args.placeholder is None else read_placeholder(args.placeholder)
        utm = filled_utm(said.pop("utm", maker.utm), args.campaign or "")
        how = Instrumenting(maker, key, args.pixel, args.links, args.hidden_link, tool, placeholder=left, utm=utm)
        how = replace(how, preferences=args.preferences or "")
        people = recipients_of(message, said)
        with acting_as_owner(settings), contextlib.suppress(StoreError), database.reading() as connection:
            number = find_tenant(connection, args.tenant).number  # where it can't be read, the drain heeds it
            how = as_recipients_want(connection, number, how, people)
        new, report = instrument_html_bytes(raw, how) if args.html else instrument_message(raw, how, force=args.force)
        report.skipped += [NO_TRACKING] * (not how.opens)
        if report.tracks and registers:
            email = registration_of(message, key, report, **said)
            with acting_as_owner(settings):
                _register(settings, database, maker.mail_id, email, strict=args.strict)
        return key, new, report
    finally:
        with acting_as_owner(settings), contextlib.suppress(StoreError):
            database.close(wait=False)


def _link_maker_of(word: str, settings: Settings, database: Database) -> LinkMaker:
    """What makes a tenant's links: it is known from the database or, where that can't be read, from tenants.json."""
    directory = Directory(settings.folder).refresh()
    try:
        with database.reading() as connection:
            tenant = find_tenant(connection, word)
        mail_id, host = tenant.mail_id, tenant.tracking_host
    except StoreError as error:
        if not (mail_id := directory.find(word) or ""):
            raise Busy(f"{error}; and tenants.json does not know the tenant {word!r}") from error
        host = directory.tenants[mail_id]["tracking_host"]
    if (maker := link_maker(settings, directory, link_secrets(settings, database), mail_id, host)) is None:
        raise BadInput(NO_PUBLIC_URL)
    return maker


def _register(settings: Settings, database: Database, mail_id: str, email: Registration, *, strict: bool) -> None:
    """Register an email in the database or, where that can't be, through the spool. Raises StoreError if strict."""
    try:
        with database.transaction() as connection:
            tell_emails(database, connection, find_tenant(connection, mail_id), [email])
    except StoreError as error:
        if strict:
            raise
        tell(f"note: the email will be registered when the database can be written to again: {error}")
        with contextlib.closing(Spool(settings.spool, "-emails")) as spool:
            spool.append(email_line(mail_id, email, now_ms()))


@command(
    TENANT,
    option("name NAME", "the campaign, as --campaign or ?campaign= name it"),
    option("--sent NUMBER", "how many emails; again: instead of before", type=int, required=True),
    option("--at TIME", "when, such as 2026-11-30T09:00:00Z (default: now)"),
)
def cmd_campaign_add(args: Namespace, settings: Settings) -> None:
    """Say how many emails of a campaign a mailing tool sent under its own ids, which nobody registers."""
    wanted = read_declaration(args.name, args.sent, args.at, "--at")
    with database_of(settings) as database, database.transaction() as connection:
        tenant = find_tenant(connection, args.tenant)
        with Batch(connection, now_ms()) as changes:
            first = changes.declare(tenant.number, *wanted)
    print(f"{wanted[0]}: {args.sent:,} sent" + ("" if first else ", in place of what was said before"))


@command(TENANT, JSON)
def cmd_campaign_list(args: Namespace, settings: Settings) -> None:
    """Print a tenant's campaigns: emails sent, and how many were opened and clicked."""
    with database_of(settings, drained=True) as database, database.reading() as connection:
        tenant = find_tenant(connection, args.tenant).number
        rows = read_table(connection, tenant, CAMPAIGNS, Wanted(order="campaign", ascending=True)).named()
    campaigns = [{name: row[name] for name in ("campaign", "emails", *GROUP_COLUMNS[:-1])} for row in rows]
    line = "{campaign}: {emails:,} sent, opened by people {opened_person:,}, clicked by people {clicked_person:,}"
    too_many = "; more keys answered than were told of, so some are made up"
    say(args, campaigns, (line.format_map(row) + too_many * totals_of(row).is_exceeded for row in rows))


def _figure_text(figure: Figure, beside: str = "") -> str:
    return f"{figure.label:13} {told(figure.now):>12}   {beside}{figure.detail}".rstrip()


def _stats_texts(name: str, stats: Stats) -> list[str]:
    """The numbers of a range, in lines."""
    figures = *sent_figures(stats.sent), *activity_figures(stats.hits, stats.emails)
    return [f"{name}: {RANGES[stats.period.name]}, {stats.period.zone}", *map(_figure_text, figures)]


def _reason_texts(reasons: Iterable[Row]) -> Iterator[str]:
    for row in reasons:
        what = f"{row['event_type']}s, {row['counts_as'].replace('_', ' ')}: {row['verdict']}, {row['reason']}"
        yield f"{row['hits']:>8,} {what}. {sentence_of(row['reason'])}"


@command(
    TENANT,
    option("--range", "the time that is counted", choices=RANGES, default=DEFAULT_RANGE),
    option("--tz ZONE", "time zone, such as Europe/Rome; default: the tenant's own"),
    option("--why", "list the hits by what they count as, and why"),
    JSON,
)
def cmd_stats(args: Namespace, settings: Settings) -> None:
    """Print a tenant's numbers; with --json as stats.json has them."""
    with database_of(settings, drained=True) as database, database.reading() as connection:
        tenant = find_tenant(connection, args.tenant)
        period = period_of(connection, tenant, {"range": args.range, "tz": args.tz or ""}, now_ms())
        stats = read_stats(connection, tenant, period)
        waiting = waiting_hits(database, connection)
    lines = _stats_texts(tenant.name, stats)
    lines += _reason_texts(stats.reasons) if args.why else ()
    if waiting:
        lines.append(f"about {waiting} hits are still waiting to be counted")
    say(args, stats_json(stats, tenant.name, waiting), lines)


MOST_REPORTED = 20  # campaigns, the newest


@command(
    TENANT,
    option("--campaign NAME", "of this campaign alone, since it was first sent"),
    option("--since", "of this time, and of each campaign that began in it; default: 7d", choices=RANGES, default="7d"),
)
def cmd_report(args: Namespace, settings: Settings) -> None:
    """Print the numbers of a tenant, or of one campaign, as a text to hand on: for cron to mail."""
    now = now_ms()
    with database_of(settings, drained=True) as database, database.reading() as connection:
        tenant = find_tenant(connection, args.tenant)
        lines, names = [], [args.campaign]
        if args.campaign is None:
            period = period_of(connection, tenant, {"range": args.since}, now)
            stats = read_stats(connection, tenant, period)
            lines += _stats_texts(tenant.name, stats)
            begun = campaigns_before(connection, tenant.number, now // QUARTER_MS + 1, MOST_REPORTED)
            names = [name for name, quarter in begun if quarter * QUARTER_MS >= period.starts[0]]
        for name in names:
            lines += [""] * bool(lines) + [*_campaign_report(connection, tenant, name, now)]
    print("\n".join(lines))


def _campaign_report(connection: sqlite3.Connection, tenant: Tenant, campaign: str, now: int) -> Iterator[str]:
    """What a campaign's page says, in lines. Raises BadInput."""
    zone = zone_of(tenant)
    if (stats := read_campaign(connection, tenant, campaign, zone, now)) is None:
        raise BadInput(f"no campaign {campaign!r}; `campaign list` shows them")
    begun = datetime.fromtimestamp(stats.begun / 1000, zone)
    yield f"{campaign}: first sent about {begun:%d %b %Y %H:%M} ({zone}), {ago(stats.age / 1000)}"
    number, before = len(stats.before), stats.before_sums
    for figure in sent_figures(stats.sent, before):
        beside = f"({counted(number, 'campaign')} before, as old: {told(figure.then)}) " if figure.then else ""
        yield _figure_text(figure, beside if figure.label != "Sent" else "")
    if stats.half_after:
        yield f"Half of what people opened was opened within {lasting(stats.half_after // 1000)}."
    asked = Wanted(campaign=campaign, most=TABLE_ROWS[0])
    programs, links = (read_table(connection, tenant.number, table, asked).named() for table in (PROGRAMS, LINKS))
    yield from ["Opened with (by people, and maybe):"] * bool(programs)
    for row in programs:
        what = ", ".join(filter(None, (row["client"], row["device"])))
        yield f"{row['opens_person']:>8,} {row['opens_unconfirmed']:>8,} {what}"
    yield from ["Links (emails in which people clicked, and their clicks):"] * bool(links)
    for row in links:
        yield f"{row['emails_person']:>8,} {row['clicks_person']:>8,} {row['url']}"
    yield from ["Requests, and what they count as:"] * bool(stats.reasons)
    yield from _reason_texts(stats.reasons)


@command(
    ("tenant", {**TENANT[1], "nargs": "?"}),
    option("table", "which table", choices=("emails", "events", "links", "campaigns"), nargs="?"),
    option("--postgresql", "instead: all tables of all tenants, as SQL that `psql -f` makes a database of"),
    option("--format", "how it is written", choices=EXPORT_TYPES, default="csv"),
    option("--spreadsheet", "for Excel and others: the tenant's times, events with recipient, subject, program"),
    option("--output FILE", "a new file (default: standard output)"),
    option("--campaign NAME", "emails, events and links of this campaign only"),
    option("--search TEXT", "emails with this in their recipient, key, subject or campaign"),
    option("--show", "emails by what their readers did; default: all", choices=SHOWN),
    option("--key KEY", "events of this email only"),
    option("--person KEY", "emails and events of the recipient of this email only"),
    option("--url URL", "clicks of this link only"),
    option("--since TIME", "events from then on, such as 2026-11-30T09:00:00Z"),
    option("--until TIME", "events before then"),
    option("--verdict VERDICT", "events with this verdict", choices=[*VERDICT_STATES]),
)
def cmd_export(args: Namespace, settings: Settings) -> None:
    """Write a whole table of a tenant, newest first, as CSV or JSON; in constant memory, however long it is."""
    if {args.tenant is None, args.table is None} != {args.postgresql}:
        raise BadInput("expected TENANT and the name of a table, or --postgresql alone")
    if args.spreadsheet and (args.postgresql or args.format != "csv"):
        raise BadInput("--spreadsheet: expected a table, as CSV")
    options = {name: name for name in (*EVENTS.filters, "show")} | {"q": "search"}
    filters = () if args.postgresql else TABLES[args.table].filters
    for parameter, name in options.items():
        text = getattr(args, name)
        if text is not None and parameter not in filters:
            takes = ", ".join(f"--{options[each]}" for each in filters) or "none"
            raise BadInput(f"--{name} is no filter of {args.table or 'all tables'}; its filters: {takes}")
        if UNFIT.search(text or ""):
            raise BadInput(f"--{name}: expected text in one line, in UTF-8")
    mode = 0o600 if args.postgresql else 0o666
    output = new_file(args.output, mode) if args.output else contextlib.nullcontext(sys.stdout.buffer)
    with output as file, database_of(settings, drained=True) as database:
        with database.reading() as connection:
            if args.postgresql:
                file.writelines(psql_script(connection))
                tell("note: the key that signs links is in it; keep it like a password")
                return
            tenant = find_tenant(connection, args.tenant)
        what = Wanted(args.campaign, args.key, args.search or "", args.show or "all", url=args.url, person=args.person)
        asked = narrowed(what, vars(args))
        zone = zone_of(tenant) if args.spreadsheet else None
        for piece in export_rows(database, tenant.number, TABLES[args.table], args.format, asked, zone):
            file.write(piece)


@command(
    TENANT,
    option("address ADDRESS", "the recipient's address"),
    option("--show", "erase nothing, print all that is stored of that person, as JSON"),
)
def cmd_forget(args: Namespace, settings: Settings) -> int:
    """Erase all that is stored of one recipient, here and in what is restored; numbers stay. Ends when all files are clean."""
    address = read_person(args.address)
    with database_of(settings, drained=True) as database:
        with database.reading() as connection:
            tenant = find_tenant(connection, args.tenant)
            if args.show:
                print(json.dumps(stored_of_person(connection, tenant.number, address), ensure_ascii=False, indent=1))
                return 0
        forgotten, spelt, _ = let_go(database, tenant.number, [address], FORGOTTEN)
        print(f"forgot {forgotten} emails to that address; what they counted stays in the numbers", flush=True)
        trouble = _until_clean(database, address, spellings(spelt))
        others = [name for name in sorted(os.listdir(settings.folder)) if name.startswith("set-aside-")]
    until = time.strftime("%Y-%m-%d", time.gmtime(time.time() + 14 * DAY_MS / 1000))
    tell(f"note: backups made before today have it still, as kept by `backup --keep 14` each night: until {until}")
    tell(*(f"note: so does {settings.folder}/{name}, which `restore` put aside: delete it" for name in others))
    tell(f"wrong: {trouble}" if trouble else "no file here has anything of it any more")
    return 1 if trouble else 0


@command(TENANT, option("addresses ADDRESS", "recipients' addresses", nargs="+"))
def cmd_untrack(args: Namespace, settings: Settings) -> None:
    """Track recipients no more: nothing is added to mail to them, and hits of mail already sent count in totals only."""
    addresses = list(map(read_person, args.addresses))
    with database_of(settings) as database:
        with database.reading() as connection:
            number = find_tenant(connection, args.tenant).number
        emails = let_go(database, number, addresses, UNTRACKED).emails
    print(f"tracks {counted(len(addresses), 'recipient')} no more, with {counted(emails, 'email')} already sent")


def _until_clean(database: Database, address: str, texts: Collection[bytes]) -> str:
    """Wait until no file has an address that was forgotten; returns what is in the way, if anything is for long."""
    trouble = "some of the spool can't be drained, or overwritten yet; it is tried each minute"
    until = time.monotonic() + CLEAN_SECONDS
    while time.monotonic() < until:
        try:
            for _ in clean_files(database):
                pass
            with database.reading() as connection:
                (done, _), others = is_clean(database, connection), texts_with(connection, address)
            if done:
                if not others and database.holds(texts):
                    database.rewrite()
                whole = re.compile(rf"(?<![\w.+-]){re.escape(address)}", re.IGNORECASE)
                return "other emails, or links, have it in their texts" if any(map(whole.search, others)) else ""
        except Busy as error:
            trouble = str(error)
        time.sleep(0.5)
    return trouble


# == Operating =========================================================================================
# Commands for who runs a server, and the way from the command line to each.

REJUDGE_EMAILS = 500  # in one transaction: between two, the service writes
SELFTEST_SECONDS = 10.0  # for an answer, and for hits to be counted
CLOCK_SECONDS = 120.0  # that two clocks may differ


def _to_read(path: str) -> contextlib.AbstractContextManager[BinaryIO]:
    return contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb")


class Answer(NamedTuple):
    status: int
    headers: Any  # with a method `get` that takes names in lower case
    body: bytes
    address: str  # that we had in that connection


@command(TENANT, LOCAL)
def cmd_selftest(args: Namespace, settings: Settings) -> int:
    """Ask for a pixel and a link through the public address, as a reader would, and look for both in the numbers."""
    from http.client import HTTPException

    with database_of(settings) as database:
        with database.reading() as connection:
            tenant = find_tenant(connection, args.tenant)
        if (public := settings.public_url(tenant.tracking_host)) is None:
            raise StoreError(NO_PUBLIC_URL)
        key = f"{TEST_KEY}{secrets.token_hex(8)}"
        link = click_path(link_secrets(settings, database)[0], tenant.mail_id, key, TEST_DESTINATION)
        with contextlib.suppress(OSError):
            os.unlink(hidden_file(settings.folder))  # of before
        try:
            pixels = [_ask(public, pixel_path(tenant.mail_id, key)) for _ in range(2)]
            faults = [*answer_faults(pixels, _ask(public, link))]
            faults = faults or [*counted_faults(database, tenant, key, pixels[0].address)]
            faults += [f"readers' addresses are lost: {HIDDEN}"] * are_readers_hidden(settings.folder)
        except (OSError, HTTPException) as error:
            faults = [f"{public} does not answer: {error}; expected DNS, firewall and proxy to lead to this server"]
        with database.transaction() as connection:
            delete_emails(database.folder, connection, tenant.number, [key], now_ms())
    works = f"{public} works: two pixels and a link were answered and counted, as your own, and are removed again"
    print("\n".join(f"wrong: {fault}" for fault in faults) or works)
    return 1 if faults else 0


def _ask(public: str, path: str) -> Answer:
    """One request; never follows a redirect. Raises OSError and HTTPException."""
    import http.client

    scheme, host = public.removesuffix(path_of(public)).split("://")
    make = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
    with contextlib.closing(make(host, timeout=SELFTEST_SECONDS)) as connection:
        agent = f"Mozilla/5.0 (email-tracker {__version__} selftest)"
        connection.request("GET", path_of(public) + path, headers={"User-Agent": agent})
        address = connection.sock.getsockname()[0]
        answer = connection.getresponse()
        return Answer(answer.status, answer.headers, answer.read(), address)


def answer_faults(pixels: Sequence[Answer], link: Answer) -> Iterator[str]:
    from email.utils import parsedate_to_datetime

    location = link.headers.get("location", "nowhere")
    if (link.status, location) != (302, TEST_DESTINATION):
        yield f"the link has status {link.status} and leads to {location}; expected 302 and {TEST_DESTINATION}"
    for answer in pixels:
        note = answer.headers.get("x-tracker")
        if answer.status != 200 or answer.body != resource("pixel.gif") or note is None:
            yield f"something else (status {answer.status}) answered the pixel; expected BASE_URL to lead to this server"
            return
        if note not in ("recorded", "logged", "unknown tenant"):
            yield f"the pixel was answered, but not recorded: {note}"
            return
        if answer.headers.get("age", "0") != "0":
            yield "the pixel came from a cache on the way; expected the proxy to heed Cache-Control: no-store"
            return
    with contextlib.suppress(ValueError, TypeError):  # no date, or none that can be read
        there = parsedate_to_datetime(pixels[-1].headers.get("date", ""))
        if abs(there.timestamp() - time.time()) > CLOCK_SECONDS:
            yield f"the clock there says {there:%Y-%m-%d %H:%M} UTC; expected the time that it is here"


def counted_faults(database: Database, tenant: Tenant, key: str, address: str) -> Iterator[str]:
    """What is wrong with how the hits were counted; waits for them."""
    until = time.monotonic() + SELFTEST_SECONDS
    hits: list[dict[str, Any]] = []
    while len(hits) < 3 and time.monotonic() < until:
        drain_first(database)
        with database.reading() as connection:
            hits = read_table(connection, tenant.number, EVENTS, Wanted(key=key, most=10)).named()
        time.sleep(0.1)
    types = [hit["event_type"] for hit in hits]
    if not hits:
        yield f"no hit was counted; expected BASE_URL to lead to the server of this database ({database.path})"
    elif types.count("open") < 2:
        yield "the pixels did not both come; expected no cache on the way that answers in this server's place"
    elif "click" not in types:
        yield "the link was answered, but its hit did not come"
    if any(hit["verdict"] != "self" for hit in hits):
        yield "the hits were not counted as your own; expected a server of the same version"
    ours, *seen = (read_address(each or "") for each in (address, *(hit["ip_address"] for hit in hits)))
    if ours and not ours.is_private and (lost := {str(each) for each in seen if each and each.is_private}):
        expected = "expected the proxy to set X-Forwarded-For, and to stand in FORWARDED_ALLOW_IPS"
        yield f"readers' addresses are lost: yours was seen as {', '.join(lost)}; {expected}"


@command(
    option("--follow", "go on until stopped, in place of the server's workers"),
    option("--spool PATH", "the spool of a machine that was lost; its files stay as they are"),
)
def cmd_drain(args: Namespace, settings: Settings) -> int:
    """Move the hits that wait in the spool into the database, in large batches; for a backlog."""
    with database_of(settings, patience=1.0 if args.follow else math.inf) as database:
        if args.spool:
            if not settings.is_shared:
                raise BadInput("--spool: expected a database that machines share, of which this is another's spool")
            if read_small_file(args.spool, "instance") is None:
                raise BadInput(f"--spool: {args.spool} has no file `instance`; expected a folder `spool`")
            database.spool, database.is_foreign = args.spool, True
        if args.follow:
            database.leave = partial(os.kill, os.getpid(), signal.SIGTERM)
            drainer_of(database, settings, follows=True).run()
        database.enlarge_cache(64)
        report = drain(database, batch=BACKLOG_BATCH, seconds=math.inf)
    print(f"drained {report.hits} hits, put {report.rejected} lines into spool/rejected", flush=True)
    tell(*(f"note: {trouble}" for trouble in report.troubles))
    return 1 if report.troubles else 0


@command(
    option("--follow", "go on until stopped"),
    option("--held SECONDS", "for how long a change is held back", type=int, default=HELD_MS // 1000),
)
def cmd_deliver(args: Namespace, settings: Settings) -> int:
    """Send what became of hits to webhooks; without --follow, once what is due now. One such process at a time."""
    if not 0 <= args.held <= 86_400:
        raise BadInput("--held: expected a number of seconds from 0 to 86400")
    path = os.path.join(settings.folder, "deliver.lock")
    with database_of(settings) as database, open(path, "ab") as lock:
        if not take_lock(lock.fileno(), wait=args.follow):
            raise Busy("another `deliver` is at it")
        couriers: dict[tuple[Any, ...], Courier] = {}
        while True:
            webhooks = list[Webhook]()
            try:
                with database.reading() as connection:
                    webhooks = [each for each in webhooks_of(connection) if not each.off]
            except StoreError:
                if not args.follow:  # else it is looked again in a second
                    raise
            for webhook in webhooks:
                key = webhook[:2]
                if key not in couriers or not couriers[key].is_alive():
                    couriers[key] = Courier(database, webhook, settings.webhook_networks or (), args.held * 1000)
                    if args.follow:
                        couriers[key].start()
            if not args.follow:
                pauses = [courier.turn() for courier in couriers.values()]
                for courier in couriers.values():
                    courier.close()
                return int(any(pause and pause >= PAUSES[0] for pause in pauses))
            time.sleep(1)


@command(option("file FILE", "a log; without one, standard input", nargs="*"))
def cmd_ingest(args: Namespace, settings: Settings) -> int:
    """Count hits that the server printed as `unspooled`: give it the log. Each hit counts once, however often given."""
    failed = 0
    for path in args.file or ["-"]:
        with _to_read(path) as lines, database_of(settings) as database:
            outcome, troubles = ingest(database, lines)
        counted, known = (outcome.pop(name, 0) for name in ("counted", "known"))
        dropped = "".join(f", {number} dropped ({reason})" for reason, number in sorted(outcome.items()))
        print(f"{path}: {counted} hits counted, {known} known already{dropped}, {len(troubles)} not readable")
        tell(*(f"note: {path}, {trouble}" for trouble in troubles))
        failed |= bool(troubles)
    return failed


@command(option("file FILE", "lines of the spool; -: standard input", nargs="?", default="-"), JSON)
def cmd_judge(args: Namespace, settings: Settings) -> None:
    """Judge a file of hits of one email, lines of the spool, and say why. For support, and to try rules on one's own logs.

    A first line may say what is known of the email: {"email": {"sent_at": …, "delivered_at": …, "links": 4,
    "own_addresses": ["203.0.113.7"]}}, times in seconds since 1970 or as 2026-11-30T09:00:00Z. A hit is a line
    {"t": …, "uri": "/MAIL_ID/pixel/KEY.gif", "ip": …, "ua": …}, t in seconds since 1970.
    """
    with _to_read(args.file) as file:
        about, hits = read_hits_to_judge(file, args.file)
    if len({(hit.mail_id, hit.key) for hit in hits}) > 1:
        tell("note: these hits have several keys; they are judged as hits of one email all the same")
    line = "{at}  {event_type:5}  {verdict:11}  {certainty:8}  {:11}  {reason}: {sentence}"
    for hit, judgement in zip(hits, judge(hits, about), strict=True):
        counts_as, sentence = STATE_NAMES[judgement.state], sentence_of(judgement.reason)
        told = {"at": iso_time(hit.at), "event_type": TYPES[hit.type], **judgement._asdict()}
        told |= {"counts_as": counts_as, "sentence": sentence}
        say(args, told, [line.format(counts_as.replace("_", " "), **told)])


def read_hits_to_judge(lines: Iterable[bytes], name: str) -> tuple[Context, list[Hit]]:
    """Read what `judge` is given. Raises BadInput with the line and what was expected there."""
    known = ("t", *TEXT_FIELDS, "own", "id", "gpc")
    context = NO_CONTEXT
    own: list[Network] = []
    hits: list[Hit] = []
    unknown: set[str] = set()
    for number, line in enumerate(lines, 1):
        try:
            if number == 1 and line.lstrip().startswith(b'{"email"'):
                context, own = _read_email_to_judge(read_object(line)["email"])
            elif line.strip():
                if not isinstance(hit := parse_line(line), Hit):
                    raise BadInput("expected a hit, not a registration")
                unknown |= read_object(line).keys() - set(known)
                address = read_address(hit.address)
                is_own = hit.own or any(address in network for network in own if address)
                hits.append(hit._replace(own=is_own))
        except BadInput as error:
            raise BadInput(f"{name}, line {number}: {error}") from None
    if unknown:
        tell(f"note: no field of a hit, so ignored: {', '.join(sorted(unknown))}; expected some of {', '.join(known)}")
    return context, hits


def _read_email_to_judge(said: Any) -> tuple[Context, list[Network]]:
    known = ("sent_at", "delivered_at", "links", "own_addresses")
    if not isinstance(said, dict) or not set(said) <= set(known):
        raise BadInput(f"email: expected an object with some of {', '.join(known)}")
    begin = None
    for name in known[:2]:  # what is said of its delivery goes before its sending
        if (value := said.get(name)) is not None:
            try:
                begin = read_time(value)
            except BadInput:
                begin = read_iso_time(str(value), name)
    links, own = said.get("links"), said.get("own_addresses", [])
    if links is not None and (type(links) is not int or links < 0):
        raise BadInput("links: expected how many different links the mail has")
    if not isinstance(own, list) or not all(isinstance(text, str) for text in own):
        raise BadInput("own_addresses: expected a list of addresses and networks")
    return Context(begin, begin is not None, links), [ipaddress.ip_network(read_own_network(text)) for text in own]


@command(option("--since TIME", "only emails with hits since then, as 2026-11-30T09:00:00Z"))
def cmd_rejudge(args: Namespace, settings: Settings) -> None:
    """Judge stored hits anew by the rules of this version, and correct every number. Skips what was erased."""
    since = read_iso_time(args.since, "--since") if args.since else 0
    found: tuple[int, int] | None = (0, 0)
    changed = 0
    with database_of(settings, drained=True) as database:
        while found:
            changed += found[1]
            with database.transaction() as connection:
                found = rejudge_emails(connection, found[0], since, REJUDGE_EMAILS)
    print(f"{changed:,} hits are judged otherwise than before" if changed else "all hits are judged as before")


def _only_sqlite(settings: Settings) -> None:
    if settings.is_shared:
        raise StoreError(
            "PostgreSQL has its own backups: use pg_dump and pg_restore, or a replica. Positions of segments are in them, "
            "so `serve` counts by itself what came later and is in spool/kept still"
        )


@command(
    option("file FILE", "a file that is not there yet; with --keep, the folder of the backups"),
    option("--keep NUMBER", "name the file by the time, and delete the oldest but for so many", type=int),
)
def cmd_backup(args: Namespace, settings: Settings) -> None:
    """Copy the database into a new file, while it is in use: all hits drained so far, and the key that signs links."""
    _only_sqlite(settings)
    os.nice(19)  # nobody waits for it
    name = args.file
    if args.keep is not None:
        if args.keep < 1:
            raise BadInput("--keep: expected how many backups to keep, 1 or more")
        name = os.path.join(args.file, time.strftime("tracking-%Y-%m-%dT%H%M%SZ.db", time.gmtime()))
    path = os.path.abspath(name)  # :memory: and file:… mean something else to SQLite
    # Opened by whoever asks for the backup, then written to while acting as the owner of the data.
    with new_file(name, 0o600) as file:
        copying = contextlib.closing(sqlite3.connect(path, isolation_level=None))
        with copying as copy, database_of(settings, drained=True) as database, database.reading() as connection:
            copy_database(connection, copy, name)
        os.fsync(file.fileno())
        sync_folder(os.path.dirname(path))
    if args.keep is not None:
        found = {each for each in os.listdir(args.file) if re.fullmatch(r"tracking-[0-9T-]{17}Z\.db", each)}
        others = sorted(found - {os.path.basename(name)}, reverse=True)  # this one stays, whatever the clock said
        for old in others[args.keep - 1 :]:
            os.unlink(os.path.join(args.file, old))
    size = os.path.getsize(path)
    print(f"{name}: {size:,} bytes, a full backup. Keep it like a password: who has it can sign links as you do.")
    if settings.secret_key:
        tell("note: SECRET_KEY is not in it; keep that too, since links in mail already sent are signed with it")
    if cut := read_state(settings.folder)["cut"]:
        tell(f"note: {cut}: back up at least as often")


def _faults(database: Database) -> list[str]:
    with database.transaction() as connection:  # so that nobody changes tenants meanwhile
        elsewhere = position_faults(database, connection) + directory_faults(database, connection)
    with database.reading() as connection:
        return integrity_faults(connection) + rollup_differences(connection) + elsewhere


@command(option("--repair", "rebuild the roll-ups and tenants.json"))
def cmd_check(args: Namespace, settings: Settings) -> int:
    """Hold the database against itself: integrity, every roll-up against a recount, positions, tenants.json."""
    with database_of(settings) as database:
        found = _faults(database)
        if args.repair and found:
            with changing_tenants(database) as connection:  # writes tenants.json too
                rebuild_rollups(connection)
            print(f"rebuilt the roll-ups and tenants.json; there were {len(found)} faults")
            found = _faults(database)
    print(*found, f"{len(found)} faults" if found else "all is well", sep="\n")
    return 1 if found else 0


@command(option("file FILE", "a backup"))
def cmd_restore(args: Namespace, settings: Settings) -> int:
    """Put a backup in the place of the database, and count what came since it was made. The server may go on running.

    What was there is set aside in a folder beside it. Hits and registrations of the last days are read again from
    spool/kept, each once; a second restore, or one that was killed and is run again, does no harm.
    """
    for end in ("-wal", "-journal"):
        if os.path.exists(args.file + end):
            raise BadInput(f"{args.file}{end} is there; expected a file that `backup` made, which is whole by itself")
    _only_sqlite(settings)
    with open(args.file, "rb") as backup, acting_as_owner(settings):
        path = os.path.abspath(settings.database)
        with restoring(path, backup) as (connection, made_at, aside):
            known = {tenant.id for tenant in list_tenants(connection)}
            take_over_tenants(settings.folder, connection)
            forget_gone(settings.folder, connection)
            adopted = [tenant for tenant in list_tenants(connection) if tenant.id not in known]
    with database_of(settings, make=True) as database:
        report = drain(database, batch=BACKLOG_BATCH, seconds=math.inf)
        troubles = report.troubles + _faults(database)
        gaps = missing_hours(database, made_at) if made_at else ()
    print(f"{args.file} is in place, made about {iso_time(made_at)}; what was there is in {aside}")
    print(f"counted {report.hits} hits and {report.emails} registrations that came since")
    for began, ended in gaps:
        span = f"from {iso_time(began)} to {iso_time(ended)}"
        tell(f"note: what came {span}, if any, is neither in the backup nor the spool")
    for tenant in adopted:
        about = f"{tenant.name} ({tenant.mail_id}) has a new dashboard id"
        tell(f"note: {about}, since it got its own after the backup: {tenant.id}")
    tell("note: what was said since the backup of campaigns and settings of tenants is not known; say it again")
    tell(*(f"wrong: {trouble}" for trouble in troubles))
    return 1 if troubles else 0


@command(option("to URL", "postgresql://USER:PASSWORD@HOST/DATABASE, or sqlite:PATH"))
def cmd_move(args: Namespace, settings: Settings) -> None:
    """Copy the database to PostgreSQL, or from there into a file: sqlite:PATH. The server may go on: hits wait meanwhile."""
    with acting_as_owner(settings), moving(settings, database_place(args.to)) as connection:
        if differences := [*integrity_faults(connection), *rollup_differences(connection)]:
            raise StoreError(f"nothing was moved; first `check --repair` has to mend this: {differences[0]}")
    print("All was moved, and the old database refuses to be used. Change the settings so, and restart the server:")
    print(f"DATABASE_URL={without_password(args.to)}")
    print(f"DATA_FOLDER={'' if settings.is_shared else settings.folder}")


@command()
def cmd_version(args: Namespace, settings: Settings) -> None:
    """Print the versions of what runs here, with licences."""
    try:
        from gunicorn import __version__ as gunicorn
    except ImportError:
        gunicorn = "is not installed"
    print(f"email-tracker {__version__} (MIT)\ngunicorn {gunicorn} (MIT)")
    print(f"running on Python {sys.version.split()[0]} (PSF-2.0), SQLite {sqlite3.sqlite_version} (public domain)")


@command(JSON)
def cmd_status(args: Namespace, settings: Settings) -> int:
    """Say whether anything arrives: the last hit, what waits, what was rejected. Ends with 1 where something is wrong."""
    with database_of(settings) as database, database.reading() as connection:
        tenants = list_tenants(connection)
        hits = [(last_hit_at(connection, each.number) or 0, each.name) for each in tenants]
        firsts = [first_quarter(connection, each.number) for each in tenants]
    (at, name), state = max(hits, default=(0, "")), read_state(settings.folder)
    since = min((first * QUARTER_MS for first in firsts if first is not None), default=None)
    drained = iso_time(round(state["at"] * 1000)) if state["at"] > 0 else None
    about = {"last_hit_at": iso_time(at or None), "tenant": name, "waiting_hits": state["waiting"]}
    about |= {"rejected_lines": state["rejected"], "since": iso_time(since), "drained_at": drained}
    lines = [
        f"last hit   {iso_time(at)}, {ago((now_ms() - at) / 1000)}, of {name}" if at else "last hit   none so far",
        f"since      {f'{iso_time(since)}: the first hit, or the first email sent' if since else 'nothing was sent'}",
        f"waiting    {'unknown' if state['waiting'] is None else state['waiting']} hits to be counted",
        f"rejected   {state['rejected']} lines that could not be read, in spool/rejected",
        f"counted    {drained or 'never'}",
        *([f"wrong      {state['trouble']}"] if state["trouble"] else []),
    ]
    say(args, {**about, "trouble": state["trouble"]}, lines)
    return 1 if state["trouble"] else 0


@command(JSON)
def cmd_config(args: Namespace, settings: Settings) -> None:
    """Print the settings in force, secrets masked, and where each comes from."""
    shown: dict[str, Any] = {}
    for each in fields(Settings):
        if variable := each.metadata.get("variable"):
            value = getattr(settings, each.name)
            shown[variable] = "(set)" if each.metadata["secret"] and value is not None else value
    shown["DATABASE_URL"] = settings.database_url
    texts = {name: ",".join(value) if isinstance(value, tuple) else value for name, value in shown.items()}
    lines = []
    for origin, names in groupby(texts, settings.origins.__getitem__):
        lines.append(f"# {origin if origin == 'by default' else f'from {origin}'}")
        lines += [f"{name}={'(unset)' if texts[name] is None else texts[name]}" for name in names]
    say(args, {**shown, "origins": settings.origins}, lines)


def _put_out(path: str | None, text: str) -> None:
    """Print a file, or write it whole: a shell's `>` would empty the old one even when there is nothing new."""
    if path is None:
        print(text, end="")
        return
    try:
        write_small_file(os.path.abspath(path), text, 0o644)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error


@command(
    option("--certificates", "the folder of HOST/fullchain.pem and HOST/privkey.pem", default="/etc/letsencrypt/live"),
    option("--webroot", "where certbot puts its proofs (its --webroot)", default="/var/www/email-tracker"),
    option("--log-folder", "where nginx keeps its logs", default="/var/log/nginx"),
    option("--http-port PORT", "for plain HTTP", type=int, default=80),
    option("--pixels", "nginx answers pixels by itself and logs them into the spool; see `help keep` before"),
    option("--real-ip-from NETWORK...", "of a proxy before nginx, which is believed about readers' addresses"),
    option("--location", "instead: what belongs into the server of a site of yours, below whose path BASE_URL is"),
    OUTPUT,
)
def cmd_nginx(args: Namespace, settings: Settings) -> None:
    """Print nginx's configuration: a server for BASE_URL, if it has no path, and for each tenant's tracking host."""
    if settings.base_url is None:
        raise StoreError("BASE_URL is not set; expected the public address, such as https://track.example.com")
    with database_of(settings) as database, database.reading() as connection:
        tracking_hosts = sorted(tenant.tracking_host for tenant in list_tenants(connection) if tenant.tracking_host)
    base, networks = read_origin(settings.base_url)[0], [read_own_network(text) for text in args.real_ip_from]
    if args.location:
        about = (os.path.abspath(args.log_folder), networks, "" if args.pixels else None, settings.base_path)
        _put_out(args.output, nginx_locations(settings, *about))
        return
    if settings.base_path:
        tell(f"note: the server of {base}, which you have, needs what `nginx --location` prints; see `help elsewhere`")
    names = (*[base] * (not settings.base_path), *tracking_hosts)
    hosts = {host: has_certificate(args.certificates, host) for host in names}
    places = {name: os.path.abspath(getattr(args, name)) for name in ("certificates", "webroot", "log_folder")}
    tenants = None
    if args.pixels:
        share_spool(settings)
        tenants = Directory(settings.folder).refresh().tenants
    _put_out(args.output, nginx_file(settings, hosts, args.http_port, tenants, networks, **places))
    for host, is_certified in hosts.items():
        if settings.base_url.startswith("https:") and not is_certified:
            ask = f'certbot certonly --webroot -w {args.webroot} -d {host} --deploy-hook "systemctl reload nginx"'
            tell(f"note: {host} has no certificate; reload nginx with this file, then: {ask}; then print it anew")


@command(
    option("file", "which file", choices=SYSTEMD_FILES),
    option("--program FILE", "where it will be (by itself, where it is now)", default=PROGRAM_FILE),
    OUTPUT,
)
def cmd_systemd(args: Namespace, settings: Settings) -> None:
    """Print a unit: of the service, its socket, or daily backups (a service and its timer); or the line of its user."""
    if not os.path.isabs(settings.data_folder or "" if settings.is_shared else settings.database):
        names = "DATABASE_URL, such as sqlite:/var/lib/email-tracker/tracking.db, or with PostgreSQL in DATA_FOLDER"
        raise StoreError(f"what is meant depends on the folder; expected an absolute path in {names}, in {ENV_FILE}")
    if args.file.startswith("backup"):
        _only_sqlite(settings)
    command = (sys.executable, "-I", os.path.abspath(args.program))
    _put_out(args.output, systemd_file(settings, args.file, command, os.path.abspath(args.env or ENV_FILE)))


def command_line() -> ArgumentParser:
    from argparse import ArgumentParser, BooleanOptionalAction

    parser = ArgumentParser(prog=PROGRAM, description=(__doc__ or "").partition("\n")[0])
    parser.set_defaults(run=cmd_serve, local=False, json=False)
    about = "print the versions of what runs here, with licences"
    parser.add_argument("--version", dest="run", action="store_const", const=cmd_version, help=about)
    about = f"settings that the environment does not give (default: {ENV_FILE}, where it exists)"
    parser.add_argument("--env", metavar="FILE", help=about)
    groups = {"": parser.add_subparsers(title="commands", metavar="COMMAND")}
    for words, (run, options) in COMMANDS.items():
        group, _, name = words.rpartition(" ")
        if group not in groups:
            above, _, word = group.rpartition(" ")
            made = groups[above].add_parser(word, help=COMMAND_GROUPS[group])
            groups[group] = made.add_subparsers(title="commands", metavar="COMMAND", required=True)
        about = (run.__doc__ or "").strip()
        made = groups[group].add_parser(name, help=re.split(r"[.:;]\s", about)[0].rstrip("."), description=about)
        made.set_defaults(run=run)
        made.register("action", "yes or no", BooleanOptionalAction)
        for option_name, how in options:
            made.add_argument(option_name, **how)
    return parser


@command(option("words TOPIC", "a topic or a command; without one, list the topics", nargs="*"))
def cmd_help(args: Namespace, settings: Settings) -> None:
    """Print a text on a topic, such as `numbers` or `keep`, or the options of a command."""
    asked = " ".join(args.words)
    if asked in HELP_TOPICS:
        print(help_text(asked), end="")
    elif not asked:
        print(f"{PROGRAM} help TOPIC prints one of these texts, {PROGRAM} COMMAND --help the options of a command:\n")
        for topic in HELP_TOPICS:
            title = help_text(topic).partition("\n")[0]
            print(f"{topic:11} {title.removeprefix(f'# {topic}: ')}")
    elif asked in COMMANDS or asked in COMMAND_GROUPS:
        command_line().parse_args([*args.words, "--help"])
    else:
        raise BadInput(f"there is no help on {asked!r}; expected one of {', '.join(HELP_TOPICS)}, or a command")


def help_text(topic: str) -> str:
    """One chapter of the manual; its first line is `# topic: what it is about`."""
    return resource(f"templates/help/{topic}.txt").decode()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for failure, 2 for usage."""
    _open_closed_streams()
    try:
        try:
            return _run(sys.argv[1:] if argv is None else list(argv))
        finally:
            sys.stdout.flush()
    except (SettingsError, StoreError, BadInput) as error:
        tell(str(error))
        return 2 if isinstance(error, SettingsError) else 1
    except OSError as error:
        # What could not be written must not be tried again at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not isinstance(error, BrokenPipeError):  # whoever read our output has gone, and knows
            tell(f"{error.filename or 'standard output'}: {error.strerror}")
    except KeyboardInterrupt:
        pass
    return 1


def _run(argv: list[str]) -> int:
    args = command_line().parse_args(argv)
    if sqlite3.sqlite_version_info < (3, 35):
        raise StoreError(f"SQLite {sqlite3.sqlite_version} is too old; expected 3.35 or later")
    # Help is wanted most where the settings are wrong, or not for this user to read.
    is_help = args.run in (cmd_help, cmd_version)
    settings = Settings() if is_help else load_settings(os.environ, args.env, local=args.local)
    return int(args.run(args, settings) or 0)


def _open_closed_streams() -> None:
    """Put /dev/null where a standard stream is closed: a file of ours must never get its number."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


if __name__ == "__main__":
    sys.exit(main())
