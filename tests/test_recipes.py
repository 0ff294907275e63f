"""The recipes of `help api`, run as they stand there: programs that others write for this one, and Caddy in front."""

from __future__ import annotations

import base64
import contextlib
import hmac
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email import message_from_bytes, policy
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
from conftest import CHROME, Mailbox, Server, missing
from frontend import free_port
from test_readme import chapter, codes
from test_schemathesis import APART

import tracker

RECIPES = chapter("Recipes", tracker.help_text("api"))
PYTHON, DJANGO, RECEIVER = codes(RECIPES, "python")


@dataclass
class Sender:
    """Somebody who follows a recipe, with a tenant on a running server."""

    server: Server
    tenant: dict[str, Any]

    def run(self, *command: str, **environ: str) -> str:
        """Run a program as a recipe says; returns what it prints."""
        done = subprocess.run(
            command, env=self.environ(environ), cwd=self.server.folder, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def environ(self, more: Mapping[str, str]) -> dict[str, str]:
        url = f"{self.server.url}/{self.tenant['id']}"
        return {"PATH": os.environ["PATH"], "TRACKER": url, "TRACKER_KEY": self.tenant["api_key"], **more}

    def emails(self) -> list[dict[str, Any]]:
        with urlopen(f"{self.server.url}/{self.tenant['id']}/emails.json") as answer:
            rows: list[dict[str, Any]] = json.load(answer)["rows"]
        return rows

    def write(self, name: str, text: str) -> str:
        (self.server.folder / name).write_text(text)
        return name


@pytest.fixture
def sender(server: Server) -> Sender:
    return Sender(server, server.tenant("Acme", keyed=True))


def html_of(message: bytes) -> str:
    """The HTML of a message, decoded."""
    body = message_from_bytes(message, policy=policy.default).get_body(("html",))
    assert body is not None
    return str(body.get_content())


def test_a_recipe_is_short() -> None:
    every = [lines for language in ("python", "js", "sh", "caddyfile") for lines in codes(RECIPES, language)]
    assert len(every) == 6
    assert all(len(each.splitlines()) <= 32 for each in every)


def test_python_sends_a_tracked_message(sender: Sender, mailbox: Mailbox) -> None:
    sender.run(sys.executable, sender.write("send.py", PYTHON), SMTP_PORT=str(mailbox.port))
    html = html_of(mailbox.received[0])
    assert f"{sender.server.url}/{sender.tenant['mail_id']}/click/" in html and "/pixel/" in html
    [email] = sender.emails()
    assert (email["subject"], email["recipient"], email["campaign"]) == ("Sale", "ann@example.org", "Spring")


def test_node_instruments_html_and_reads_what_people_did(sender: Sender) -> None:
    if shutil.which("node") is None:
        missing("node")
    [recipe] = codes(RECIPES, "js")
    name = sender.write("clicks.js", recipe)
    html = sender.run("node", name)
    assert html.count("/click/") == html.count("/pixel/") == 1
    pixel = html.partition('src="')[2].partition('"')[0]
    urlopen(Request(pixel, headers={"User-Agent": CHROME})).close()
    sender.server.run("drain")
    assert f" open {Path(pixel).stem} null\n" in sender.run("node", name)


def test_curl_registers_says_more_and_reads(sender: Sender) -> None:
    [recipe] = codes(RECIPES, "sh")
    printed, found, read = sender.run("sh", "-eu", sender.write("ask.sh", recipe)), [], json.JSONDecoder()
    while printed := printed.strip():
        value, end = read.raw_decode(printed)
        found.append(value)
        printed = printed[end:]
    registered, changed, stats = found
    assert registered["links"][0]["url"] == "https://acme.com/orders/1001"
    assert changed == {"changed": "order-1001"}
    assert stats["sent"]["emails"] == 1
    assert (sender.server.folder / "clicked.csv").read_bytes().startswith(b"\xef\xbb\xbfkey,subject,")


SEND_BY_DJANGO = """
from django.conf import settings

settings.configure(EMAIL_BACKEND="tracked.Backend", EMAIL_HOST="127.0.0.1", EMAIL_PORT=%d, SECRET_KEY="x", USE_I18N=False)

from django.core.mail import EmailMultiAlternatives, send_mail
from django.core.mail.utils import DNS_NAME

DNS_NAME._fqdn = "localhost"  # else it asks the DNS
html = '<p><a href="https://acme.com/sale">All shoes</a></p>'
for recipients in (["ann@example.org"], ["bob@example.org", "cy@example.org"]):
    message = EmailMultiAlternatives("Sale", "All shoes", "shop@acme.com", recipients)
    message.attach_alternative(html, "text/html")
    message.send()
send_mail("Note", "No HTML", "shop@acme.com", ["ann@example.org"])
"""


def test_django_sends_tracked_messages_and_untracked_ones_where_the_tracker_is_away(
    sender: Sender, mailbox: Mailbox
) -> None:
    if not (APART / "django").is_dir():
        missing("Django")
    sender.write("tracked.py", DJANGO)
    command = sys.executable, sender.write("send.py", SEND_BY_DJANGO % mailbox.port)
    sender.run(*command, PYTHONPATH=str(APART))
    tracked, to_two, note = mailbox.received
    assert "/click/" in html_of(tracked) and "/pixel/" in html_of(tracked)
    assert 'href="https://acme.com/sale"' in html_of(to_two) and b"No HTML" in note
    assert [(email["subject"], email["recipient"]) for email in sender.emails()] == [("Sale", "ann@example.org")]
    sender.run(*command, PYTHONPATH=str(APART), TRACKER=f"http://127.0.0.1:{free_port()}/away")
    assert html_of(mailbox.received[3]) == html_of(to_two)


# The example of standardwebhooks.com: secret, id and payload.
SECRET, OTHER = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"
ID, PAYLOAD = "msg_p5jXN8AQM9LWM0D4loKWxJek", b'{"test": 2432232314}'


def signature(secret: str, at: int, body: bytes = PAYLOAD) -> str:
    key = base64.b64decode(secret.removeprefix("whsec_"))
    return "v1," + base64.b64encode(hmac.digest(key, f"{ID}.{at}.".encode() + body, "sha256")).decode()


def test_a_receiver_takes_what_is_signed_and_nothing_else(tmp_path: Path) -> None:
    assert signature(SECRET, 1_614_265_330) == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    (tmp_path / "receiver.py").write_text(RECEIVER)
    port, now = free_port(), int(time.time())
    with running(tmp_path, sys.executable, "receiver.py", PORT=str(port), WEBHOOK_SECRETS=f"{OTHER} {SECRET}"):
        url, good = f"http://127.0.0.1:{port}/", signature(SECRET, now)
        for given, at, status in (
            (good, now, 204),
            (signature(OTHER, now), now, 204),
            (f"v1a,xyz {signature('whsec_AAAA', now)} {good}", now, 204),
            (good, now - 1, 401),
            (good[:3] + chr(ord(good[3]) ^ 1) + good[4:], now, 401),
            (signature("whsec_AAAA", now), now, 401),
            (signature(SECRET, now, b"{}"), now, 401),
            (signature(SECRET, now - 400), now - 400, 401),
            ("", now, 401),
        ):
            headers = {"webhook-id": ID, "webhook-timestamp": str(at), "webhook-signature": given}
            assert post(url, headers) == status, given
        assert post(url, {}) == 401
    assert (tmp_path / "log").read_text().count(f"{ID} {{'test': 2432232314}}\n") == 3


def post(url: str, headers: Mapping[str, str]) -> int:
    """The status of the answer, once there is a server."""
    deadline = time.monotonic() + 20
    while True:
        try:
            with urlopen(Request(url, PAYLOAD, dict(headers))) as answer:
                return int(answer.status)
        except HTTPError as error:
            with error:
                return error.code
        except URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


@contextlib.contextmanager
def running(folder: Path, *command: str, **environ: str) -> Iterator[None]:
    """A program that runs for a while; what it prints is in the file `log`."""
    with (folder / "log").open("wb") as log:
        plain = {"PATH": os.environ["PATH"], "HOME": str(folder), **environ}
        process = subprocess.Popen(command, cwd=folder, env=plain, stdout=log, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_caddy_in_front_says_whose_request_it_is_and_keeps_no_log(sender: Sender, tmp_path: Path) -> None:
    if shutil.which("caddy") is None:
        missing("caddy")
    [recipe] = codes(RECIPES, "caddyfile")
    sender.write("Caddyfile", recipe)
    checked = subprocess.run(
        ["caddy", "validate"], cwd=sender.server.folder, capture_output=True, text=True, timeout=60
    )
    assert checked.returncode == 0, checked.stderr
    port = free_port()
    site = {"SITE": f"http://127.0.0.1:{port}", "UPSTREAM": f"127.0.0.1:{sender.server.port}"}
    front = running(sender.server.folder, "caddy", "run", CADDY_ADMIN=f"unix/{tmp_path}/admin", **site)
    with front:
        url = f"http://127.0.0.1:{port}/{sender.tenant['mail_id']}/pixel/e1.gif"
        assert post(url, {}) == 405  # it has begun
        with urlopen(Request(url, headers={"X-Forwarded-For": "203.0.113.7", "User-Agent": CHROME})) as answer:
            assert answer.read() == tracker.resource("pixel.gif")
        key = {"Authorization": f"Bearer {sender.tenant['api_key']}"}
        with urlopen(Request(f"http://127.0.0.1:{port}/{sender.tenant['id']}/emails", b"{}", key)) as answer:
            assert answer.status == 201
    with urlopen(f"{sender.server.url}/{sender.tenant['id']}/events.json") as answer:
        [event] = json.load(answer)["rows"]
    assert event["ip_address"] == "127.0.0.0"  # of who asked Caddy, not of whom he says to be
    assert sender.tenant["mail_id"] not in (sender.server.folder / "log").read_text()
