"""`help postfix`, as it stands there, with a real Postfix and a real opendkim on loopback."""

from __future__ import annotations

import contextlib
import email
import email.policy
import json
import os
import re
import shutil
import signal
import smtplib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from email.message import EmailMessage
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import BASE, LOCAL_NAME, Mailbox, OnOurSocket, missing
from frontend import free_port
from test_dist import build
from test_readme import codes
from test_sending import undone

import tracker

HELP = tracker.help_text("postfix")
USER = "nobody"  # in the place of email-tracker
DOMAIN = "acme.example"
SENDER = f"news@{DOMAIN}"
ARCHIVE = f"archive@{DOMAIN}"
ANN, BOB, CLEO, DAN, EVE = (f"{name}@example.org" for name in ("ann", "bob", "cleo", "dan", "eve"))
LINK = "https://acme.com/sale?a=1&b=2"
PAGE = (
    f'<html><body>\r\n<p>Grüße! <a href="{LINK.replace("&", "&amp;")}">The sale</a></p>\r\n.dot\r\n</body></html>\r\n'
)
KEY = re.compile(r"/(?:pixel|click)/([\w-]+)")
# What every Postfix has; `smtp` and `submission`, with ports of ours, take all that we bring them.
MASTER = """\
127.0.0.1:{smtp} inet n - n - - smtpd
  {open}
127.0.0.1:{submission} inet n - n - - smtpd
  {open}
pickup unix n - n 60 1 pickup
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
proxymap unix - - n - - proxymap
smtp unix - - n - - smtp
showq unix n - n - - showq
error unix - - n - - error
retry unix - - n - - error
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
postlog unix-dgram n - n - 1 postlogd
"""
MAIN = """\
compatibility_level = 3.6
queue_directory = {folder}/queue
data_directory = {folder}/lib
maillog_file = {folder}/log
maillog_file_prefixes = {folder}
myhostname = mail.{domain}
mydestination =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks =
smtpd_client_restrictions = reject
smtpd_helo_restrictions = reject
smtpd_sender_restrictions = reject
smtpd_relay_restrictions = reject
alias_maps =
alias_database =
relayhost = [127.0.0.1]:{sink}
virtual_alias_maps = inline:{{ {{ team@{domain} = ann@example.org, bob@example.org }} }}
smtpd_milters = inet:127.0.0.1:{dkim}
smtpd_peername_lookup = no
"""
OPEN = " ".join(f"-o smtpd_{each}_restrictions=" for each in ("client", "helo", "sender"))
OPEN += " -o smtpd_relay_restrictions=permit_inet_interfaces,reject"
OPENDKIM = """\
Domain {domain}
Selector s1
KeyFile {folder}/s1.private
Socket inet:{dkim}@127.0.0.1
Canonicalization relaxed/simple
OversignHeaders From
Mode s
Background no
Syslog no
UserID opendkim
RequireSafeKeys no
"""


def read(content: bytes) -> str:
    """The HTML of a message."""
    made = email.message_from_bytes(content, policy=email.policy.default)
    assert isinstance(made, EmailMessage)
    return str(made.get_content())


class Arrived(NamedTuple):
    """A message as the next server is given it."""

    recipient: str
    sender: str
    options: list[str]  # of MAIL FROM
    content: bytes

    @property
    def keys(self) -> set[str]:
        """Those of its pixel and its links."""
        return {*KEY.findall(read(self.content))}

    @property
    def key(self) -> str:
        (key,) = self.keys
        return key


class Sink(Mailbox):
    """The next server, which offers no DSN."""

    def __init__(self) -> None:
        super().__init__()
        self.arrived: list[Arrived] = []

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802  # aiosmtpd's name
        if "full@example.org" in envelope.rcpt_tos:
            return "552 The mailbox is full"
        about = envelope.mail_from, envelope.mail_options, envelope.content
        self.arrived += [Arrived(recipient, *about) for recipient in envelope.rcpt_tos]
        return "250 OK"


def wait_until(true: Callable[[], object], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def answers(port: int) -> bool:
    """Whether somebody listens on a port."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False


class Postfix:
    """Postfix, opendkim and the tracker's data in a folder, put together as `help postfix` says."""

    def __init__(self, folder: Path, sink: Sink, python: str) -> None:
        self.folder, self.sink, self.data = folder, sink, folder / "data"
        self.smtp, self.submission, self.back, self.dkim = (free_port() for _ in range(4))
        path = f"{os.environ['PATH']}:/usr/sbin"
        self.environ = {"PATH": path, "MAIL_CONFIG": str(folder / "etc"), "LC_ALL": "C"}
        self._python = python
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        for name in ("etc", "queue", "lib", "data"):
            (self.folder / name).mkdir()
        ports = {"smtp": self.smtp, "submission": self.submission, "dkim": self.dkim, "sink": self.sink.port}
        for name, text in (("etc/main.cf", MAIN), ("etc/master.cf", MASTER), ("opendkim.conf", OPENDKIM)):
            (self.folder / name).write_text(text.format(folder=self.folder, domain=DOMAIN, open=OPEN, **ports))
        self.say("opendkim-genkey", "-b", "1024", "-d", DOMAIN, "-s", "s1")
        for name, user in (("lib", "postfix"), ("data", USER), ("s1.private", "opendkim")):
            shutil.chown(self.folder / name, user)
        public = "".join(re.findall('"(.*?)"', (self.folder / "s1.txt").read_text()))
        (self.folder / "public").write_text(f"s1._domainkey.{DOMAIN} {public}\n")
        (self.folder / "verify.conf").write_text(f"Mode v\nTestPublicKeys {self.folder}/public\n")
        commands = self._installed()
        self.track("tenant", "add", "My shop")
        self.start_signer()
        self._launch("postfix", "start-fg")
        wait_until(lambda: answers(self.submission), "Postfix does not listen")
        self.say("sh", "-ec", commands)
        wait_until(lambda: answers(self.back), "Postfix was not reloaded")

    def _installed(self) -> str:
        """Put the script of `help postfix` in its place; returns the commands there, with other paths and ports."""
        (script,), (commands,) = codes(HELP, "python"), codes(HELP)
        stand_ins = {
            "/usr/local/bin/": f"{self.folder}/",
            "/usr/bin/python3": self._python,
            "/etc/postfix/": f"{self.folder}/etc/",
            "user=email-tracker": f"user={USER}",
            "submission/inet": f"127.0.0.1:{self.submission}/inet",
            "10026": str(self.back),
        }
        for path, stand_in in stand_ins.items():
            assert path in script + commands
            script, commands = script.replace(path, stand_in), commands.replace(path, stand_in)
        (self.folder / "settings").write_text(f"BASE_URL={BASE}\nDATABASE_URL=sqlite:{self.data}/tracking.db\n")
        words = f"'{self._python}' -I '{self.folder}/program' --env '{self.folder}/settings'"
        for name, text in (("email-tracker-filter", script), ("email-tracker", f'#!/bin/sh\nexec {words} "$@"\n')):
            (self.folder / name).write_text(text)
            (self.folder / name).chmod(0o755)
        return commands

    def say(self, *words: object) -> str:
        """Run a command; returns what it prints."""
        command = [*map(str, words)]
        done = subprocess.run(command, env=self.environ, capture_output=True, timeout=60, cwd=self.folder)
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout!r}\n{done.stderr!r}"
        return done.stdout.decode()

    def track(self, *words: str) -> str:
        """A command of the tracker, given by root."""
        return self.say(self.folder / "email-tracker", *words)

    def _launch(self, name: str, *words: object) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            command = [name, *map(str, words)]
            self._running[name] = subprocess.Popen(command, env=self.environ, stdout=log, stderr=log, cwd=self.folder)

    def start_signer(self) -> None:
        self._launch("opendkim", "-f", "-x", self.folder / "opendkim.conf")
        wait_until(lambda: answers(self.dkim), "opendkim does not listen")

    def stop_signer(self) -> None:
        if signer := self._running.pop("opendkim", None):
            signer.kill()  # told to end, it would wait for its clients
            signer.wait(timeout=30)

    def stop(self) -> None:
        """Both end, by the ids of their processes."""
        self.stop_signer()
        if postfix := self._running.pop("postfix", None):
            with contextlib.suppress(OSError):
                os.kill(int((self.folder / "queue" / "pid" / "master.pid").read_text()), signal.SIGTERM)
            postfix.wait(timeout=30)

    @contextlib.contextmanager
    def client(self, port: int = 0) -> Iterator[smtplib.SMTP]:
        """Somebody who hands in mail."""
        with smtplib.SMTP("127.0.0.1", port or self.submission, LOCAL_NAME, timeout=20) as client:
            yield client

    def send(self, content: bytes, *recipients: str, sender: str = SENDER, options: Sequence[str] = ()) -> None:
        with self.client() as client:
            assert client.sendmail(sender, recipients, content, options) == {}

    def _waiting(self, *queues: str) -> int:
        return sum(path.is_file() for queue in queues for path in (self.folder / "queue" / queue).rglob("*"))

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def settled(self, kept: int = 0) -> list[Arrived]:
        """Wait until all is delivered, but so many messages that Postfix keeps; returns what arrived, by recipients."""
        wait_until(lambda: not self._waiting("maildrop", "incoming", "active"), "not delivered")
        assert self._waiting("deferred") == kept, self.log()[-5000:]
        arrived, self.sink.arrived = self.sink.arrived, []
        return sorted(arrived)

    def try_again(self) -> None:
        """Postfix tries at once what it kept."""
        tries = self.log().count(": from=<")
        self.say("postqueue", "-f")
        wait_until(lambda: self.log().count(": from=<") > tries, "nothing was tried again")

    def set(self, name: str, value: str) -> None:
        """Change main.cf."""
        self.say("postconf", "-e", f"{name}={value}")
        self.say("postfix", "reload")

    def emails(self) -> dict[str, str]:
        """The recipients of the emails that are registered, by their keys, newest first."""
        table = json.loads(self.track("export", "My shop", "emails", "--format", "json"))
        return {row["key"]: row["recipient"] for row in table["rows"]}

    def verdict(self, arrived: Arrived) -> str:
        """What opendkim says of the signature: pass, fail, or "none"."""
        (self.folder / "message").write_bytes(arrived.content.replace(b"\r\n", b"\n"))
        said = self.say("opendkim", "-x", self.folder / "verify.conf", "-vv", "-t", self.folder / "message")
        return str((re.findall(r"\bdkim=(\w+)", said) or ["none"])[0])


@pytest.fixture(scope="module")
def started() -> Iterator[Postfix]:
    """Not in pytest's folders, which others may not enter; and the same goes for many a Python."""
    for name in ("postfix", "opendkim", "opendkim-genkey"):
        if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None:
            missing(name)
    if os.geteuid() != 0:
        missing("root, without whom Postfix does not start,")
    with tempfile.TemporaryDirectory() as name:
        folder, sink = Path(name), Sink()
        folder.chmod(0o755)
        shutil.copy(build(folder / "sources"), folder / "program")
        (folder / "program").chmod(0o755)
        for python in (sys.executable, "/usr/bin/python3"):
            words = [python, "-I", str(folder / "program"), "--version"]
            with contextlib.suppress(OSError):
                if subprocess.run(words, user=USER, capture_output=True, timeout=60).returncode == 0:
                    break
        else:
            missing("a Python that another user may run")
        controller = OnOurSocket(sink, hostname="127.0.0.1", port=sink.port, server_hostname=LOCAL_NAME)
        controller.start()
        made = Postfix(folder, sink, python)
        try:
            made.start()
            yield made
        finally:
            made.stop()
            controller.stop()
            sink.listener.close()


@pytest.fixture
def postfix(started: Postfix) -> Iterator[Postfix]:
    """Each test leaves nothing behind in the queue."""
    yield started
    assert started.settled() == []


def message(page: str = PAGE, **headers: str) -> bytes:
    """A message of HTML with an id of its own."""
    told = {
        "From": f"Acme <{SENDER}>",
        "To": ANN,
        "Subject": "The spring sale",
        "Date": "Sun, 29 Nov 2026 12:00:00 +0000",
        "Message-ID": f"<{os.urandom(8).hex()}@{DOMAIN}>",
        "MIME-Version": "1.0",
        "Content-Type": "text/html; charset=utf-8",
        "Content-Transfer-Encoding": "8bit",
        **headers,
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in told.items())
    return f"{head}\r\n{page}".encode()


def assert_tracked(postfix: Postfix, arrived: list[Arrived], *recipients: str) -> None:
    """Each of them got one copy, which is signed, and its own email in the numbers; there are no other new ones."""
    assert [each.recipient for each in arrived] == sorted(recipients)
    registered = dict(list(postfix.emails().items())[: len(recipients)])
    assert registered == {each.key: each.recipient for each in arrived}
    assert [postfix.verdict(each) for each in arrived] == ["pass"] * len(arrived)


# == Who gets what ==


def test_each_of_five_recipients_gets_one_copy_signed_and_with_a_key_of_its_own(postfix: Postfix) -> None:
    people = (ANN, BOB, CLEO, DAN, EVE)  # in To, in Cc, in a header that Postfix removes, and in none
    postfix.send(message(To=f"{ANN}, {BOB}", Cc=CLEO, Bcc=DAN), *people)
    arrived = postfix.settled()
    assert_tracked(postfix, arrived, *people)
    for each in arrived:
        assert each.sender == SENDER and b"\nBcc:" not in each.content
        assert [other.recipient for other in arrived if other.key.encode() in each.content] == [each.recipient]
        changed = each._replace(content=each.content.replace(b"The sale", b"the sale"))
        assert postfix.verdict(changed) == "fail"


def test_the_archive_gets_one_copy_and_those_of_a_list_one_each_and_no_readers_key_is_in_it(postfix: Postfix) -> None:
    postfix.set("always_bcc", ARCHIVE)
    try:
        postfix.send(message(), CLEO, f"team@{DOMAIN}")
        arrived = postfix.settled()
    finally:
        postfix.set("always_bcc", "")
    assert_tracked(postfix, arrived, ANN, BOB, CLEO, ARCHIVE)
    assert len({each.key for each in arrived}) == 4


def test_mail_of_strangers_is_left_alone(postfix: Postfix) -> None:
    content, before = message(), postfix.emails()
    with postfix.client(postfix.smtp) as client:
        client.sendmail("stranger@example.net", [ANN, BOB], content)
    arrived = postfix.settled()
    assert [each.recipient for each in arrived] == [ANN, BOB]
    assert all(each.content.endswith(content) for each in arrived) and postfix.emails() == before


def test_what_is_signed_already_goes_out_as_it_came(postfix: Postfix) -> None:
    with postfix.client(postfix.smtp) as client:
        client.sendmail(SENDER, [ANN], message())
    (signed,) = postfix.settled()
    postfix.send(signed.content, BOB)
    (arrived,) = postfix.settled()
    assert arrived.content.endswith(signed.content) and postfix.verdict(arrived) == "pass"


def test_a_message_says_itself_what_of_it_is_tracked(postfix: Postfix) -> None:
    content, before = message(), postfix.emails()
    for person, word in ((ANN, "none"), (BOB, "opens"), (CLEO, "clicks")):
        postfix.send(f"X-Track: {word}\r\n".encode() + content, person)
    arrived = postfix.settled()
    assert [each.recipient for each in arrived] == [ANN, BOB, CLEO]
    found = [(each.content.count(b"/pixel/"), each.content.count(b"/click/")) for each in arrived]
    assert found == [(0, 0), (1, 0), (0, 1)] and all(undone(each.content).endswith(content) for each in arrived)
    assert not any(b"X-Track" in each.content for each in arrived)
    assert {key: person for key, person in postfix.emails().items() if key not in before} == {
        each.key: each.recipient for each in arrived[1:]
    }


# == What it holds ==


def encoded(encoding: str, page: str = PAGE) -> bytes:
    """A message in an encoding of the standard library's."""
    made = EmailMessage(policy=email.policy.SMTP)
    made.set_content(page, subtype="html", cte=encoding)
    told = dict(made.items())
    return message(**told).partition(b"\r\n\r\n")[0] + b"\r\n\r\n" + bytes(made).partition(b"\r\n\r\n")[2]


def test_every_other_byte_arrives_as_it_was_sent(postfix: Postfix) -> None:
    long = PAGE.replace("Grüße!", f"Grüße! {'x' * 800}")
    latin = message(**{"Content-Type": "text/html; charset=iso-8859-1"})
    sent = {
        "utf8": message(),
        "latin": latin.decode().encode("iso-8859-1"),
        "long": message(long),
        "quoted": encoded("quoted-printable", long + "....\r\n"),
        "base64": encoded("base64"),
        "dots": message(".\r\n" + PAGE + "..\r\n.\r\n"),
        "raw": message(Subject="Größe"),
    }
    for name, content in sent.items():
        postfix.send(content, f"{name}@example.org", options=["BODY=8BITMIME"] if name == "utf8" else [])
    arrived = postfix.settled()
    assert_tracked(postfix, arrived, *(f"{name}@example.org" for name in sent))
    for each in arrived:
        content = sent[each.recipient.partition("@")[0]]
        assert "BODY=8BITMIME" in each.options and "SMTPUTF8" not in each.options
        if each.recipient.startswith(("quoted", "base64")):  # lines are broken anew
            assert undone(read(each.content).encode()) == read(content).encode()
        else:
            assert undone(each.content).endswith(content)


def test_smtputf8_is_asked_for_where_it_was(postfix: Postfix) -> None:
    person, sender = "jörg@example.org", f"größe@{DOMAIN}"
    postfix.send(message(To=person), person, options=["SMTPUTF8"])
    postfix.send(message(), ANN, sender=sender, options=["SMTPUTF8"])
    postfix.send(message(To=f"{BOB}, {person}"), BOB, options=["SMTPUTF8"])
    arrived = postfix.settled()
    assert_tracked(postfix, arrived, person, ANN, BOB)
    assert all("SMTPUTF8" in each.options for each in arrived)
    assert {each.recipient: each.sender for each in arrived} == {person: SENDER, ANN: sender, BOB: SENDER}


def test_addresses_of_every_form_are_handed_back_as_they_came(postfix: Postfix) -> None:
    people = (
        "o'neil+sale@example.org",
        '"a b"@example.org',
        "a=b/c@example.org",
        '"a\\"b"@example.org',
    )
    for person in people:
        postfix.send(message(), person)
    postfix.send(message(), ANN, sender="")
    arrived = postfix.settled()
    assert_tracked(postfix, arrived, *people, ANN)
    assert {each.recipient for each in arrived if each.sender == "<>"} == {ANN}


# == When something is wrong ==


def test_a_client_is_promised_no_report_of_success_and_gets_those_of_failure(postfix: Postfix) -> None:
    with postfix.client() as client:
        client.ehlo()
        assert not client.has_extn("dsn")
        assert [client.mail(SENDER, [word])[0] for word in ("RET=HDRS", "ENVID=1")] == [501, 501]
        assert client.mail(SENDER)[0] == 250
        assert [client.rcpt(ANN, [f"NOTIFY={word}"])[0] for word in ("SUCCESS", "SUCCESS,FAILURE")] == [501, 501]
    postfix.send(message(), ANN)
    postfix.send(message(), "full@example.org")
    report, arrived = sorted(postfix.settled(), key=lambda each: each.sender)
    assert (report.recipient, report.sender) == (SENDER, "<>") and b"552 The mailbox is full" in report.content
    assert (arrived.recipient, arrived.sender) == (ANN, SENDER)


def test_what_would_grow_too_large_is_refused_at_the_door(postfix: Postfix) -> None:
    with postfix.client() as client:
        client.ehlo()
        assert client.mail(SENDER, ["SIZE=10000001"])[0] == 552
        assert client.mail(SENDER, ["SIZE=10000000"])[0] == 250


@pytest.mark.parametrize("fault", ["gone", "damaged"])
def test_without_a_database_the_message_goes_out_and_is_registered_later(fault: str, postfix: Postfix) -> None:
    path = postfix.data / "tracking.db"
    path.rename(path.with_suffix(".away"))
    if fault == "damaged":
        path.write_bytes(b"no database\n" * 1000)
    postfix.send(message(), ANN, BOB)
    arrived = postfix.settled()
    path.with_suffix(".away").rename(path)
    assert_tracked(postfix, arrived, ANN, BOB)


@pytest.mark.parametrize("fault", ["data", "program", "signer", "limit"])
def test_what_cannot_be_handed_back_is_kept_and_each_try_has_the_same_key(fault: str, postfix: Postfix) -> None:
    before, away = postfix.emails(), postfix.folder / "away"
    if fault == "limit":  # as if its line had been forgotten
        postfix.set("tracker_destination_recipient_limit", "50")
    elif fault == "signer":
        postfix.stop_signer()
    else:
        (postfix.folder / fault).rename(away)
    try:
        postfix.send(message(), ANN, BOB, CLEO)
        assert postfix.settled(kept=1) == []
        postfix.try_again()
        assert postfix.settled(kept=1) == []
    finally:
        if fault == "limit":
            postfix.set("tracker_destination_recipient_limit", "1")
        elif fault == "signer":
            postfix.start_signer()
        else:
            away.rename(postfix.folder / fault)
    assert fault != "limit" or "set tracker_destination_recipient_limit=1" in postfix.log()
    tried = [person for key, person in postfix.emails().items() if key not in before]
    assert sorted(tried) == ([ANN, BOB, CLEO] if fault == "signer" else [])
    postfix.try_again()
    assert_tracked(postfix, postfix.settled(), ANN, BOB, CLEO)
    assert len(postfix.emails()) == len(before) + 3
