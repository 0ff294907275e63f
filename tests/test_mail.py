"""The ways to instrument mail that `help` tells of, run as they stand there, against a real server and a real mailbox."""

from __future__ import annotations

import csv
import email
import email.policy
import json
import os
import re
import subprocess
import sys
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from conftest import CHROME, ROOT, Mailbox, Server
from test_live import get
from test_readme import codes

import tracker

INSTRUMENT = tracker.help_text("instrument")
RECIPIENTS = 1_000


def script(name: str) -> str:
    """The block of code in `help instrument` that begins with this comment."""
    (found,) = [block for block in codes(INSTRUMENT, "python") if block.startswith(f"# {name}\n")]
    return found


def run(name: str, folder: Path, server: Server, id_: str, mailbox: Mailbox, *words: str) -> None:
    """Run a script of `help instrument`."""
    (folder / name).write_text(script(name))
    environ = {
        **server.environ,
        "API": f"{server.url}/{id_}",
        "SMTP_HOST": "127.0.0.1",
        "SMTP_PORT": str(mailbox.port),
    }
    done = subprocess.run([sys.executable, name, *words], cwd=folder, env=environ, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()


def html_of(raw: bytes) -> tuple[str, str]:
    """The recipient of a message, and its HTML."""
    message = email.message_from_bytes(raw, policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    body = message.get_body(("html",))
    assert body is not None
    return str(message["To"]), str(body.get_content())


def key_of(page: str, mail_id: str) -> str:
    """The one key that pixel and links of an instrumented page have."""
    (key,) = set(re.findall(rf"/{mail_id}/(?:pixel|click)/([\w-]+)", page))
    return str(key)


def asked(server: Server, id_: str, what: str) -> dict[str, Any]:
    """What the API answers."""
    found: dict[str, Any] = json.loads(get(server.port, f"/{id_}/{what}")[2])
    return found


def rows(server: Server, id_: str) -> list[dict[str, Any]]:
    """The tenant's emails."""
    found: list[dict[str, Any]] = asked(server, id_, "emails.json?limit=5000")["rows"]
    return found


def test_the_script_sends_a_tracked_message(server: Server, mailbox: Mailbox, tmp_path: Path) -> None:
    tenant = server.tenant("Acme")
    run("send.py", tmp_path, server, tenant["id"], mailbox)
    (raw,) = mailbox.received
    recipient, page = html_of(raw)
    key = key_of(page, tenant["mail_id"])
    assert page.count("/pixel/") == page.count("/click/") == 1
    (row,) = rows(server, tenant["id"])
    assert (row["key"], row["recipient"], row["campaign"]) == (key, "ann@example.org", "Spring")
    assert "ann@example.org" in recipient
    status, headers, _ = get(server.port, re.findall(rf"{server.url}(/\w+/click/[^\"]+)", page)[0])
    assert (status, headers["location"]) == (302, "https://acme.com/sale?a=1&b=2")


def test_the_mail_merge_gives_each_of_a_thousand_recipients_their_own(
    server: Server, mailbox: Mailbox, tmp_path: Path
) -> None:
    tenant = server.tenant("Acme")
    people = [(f"reader{n}@example.org", f"Reader <{n}>") for n in range(RECIPIENTS)]
    with (tmp_path / "people.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("address", "name"), *people])
    run("merge.py", tmp_path, server, tenant["id"], mailbox, "people.csv")
    arrived = dict(map(html_of, mailbox.received))
    assert set(arrived) == {address for address, _ in people}
    keys = {address: key_of(page, tenant["mail_id"]) for address, page in arrived.items()}
    assert len(set(keys.values())) == RECIPIENTS
    assert all(f"Hello Reader &lt;{n}&gt;" in arrived[address] for n, (address, _) in enumerate(people))
    assert {row["recipient"]: row["key"] for row in rows(server, tenant["id"])} == keys
    pixel = re.findall(rf"{server.url}(/\w+/pixel/[^\"]+)", arrived["reader7@example.org"])[0]
    get(server.port, pixel, **{"User-Agent": CHROME})
    opened = [row["recipient"] for row in rows(server, tenant["id"]) if row["opened_as"] == "person"]
    assert opened == ["reader7@example.org"]
    assert asked(server, tenant["id"], "stats.json")["sent"]["emails"] == RECIPIENTS


def test_the_filter_hands_each_recipient_their_own_back_to_postfix(server: Server, tmp_path: Path) -> None:
    tenant = server.tenant("My shop")
    (found,) = codes(tracker.help_text("postfix"))
    words, message, taken = (tmp_path / name for name in ("words", "message", "taken"))
    stand_ins = {
        "/usr/local/bin/email-tracker": f"'{sys.executable}' '{ROOT}/tracker.py' --env {os.devnull}",
        "/usr/sbin/sendmail": f"'{tmp_path}/sendmail'",
    }
    for path, stand_in in stand_ins.items():
        assert found.count(path) == 1
        found = found.replace(path, stand_in)
    scripts = {
        "filter": found,
        "sendmail": f"#!/bin/sh\necho \"$@\" > '{words}'\ncat > '{message}'\ntest ! -e '{taken}'\n",
    }
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    mail = b"To: list@example.org\nContent-Type: text/html\n\n<body><a href='https://acme.com/'>x</a></body>\n"

    def passed(recipient: str, status: int, database: str = "") -> str:
        environ = {**server.environ, **({"DATABASE_URL": database} if database else {}), "TMPDIR": str(tmp_path)}
        command = [str(tmp_path / "filter"), "news@acme.example", recipient]
        done = subprocess.run(command, input=mail, env=environ, capture_output=True, timeout=60)
        assert (done.returncode, done.stdout) == (status, b""), done.stderr.decode()
        assert list(tmp_path.glob("tmp.*")) == []
        return words.read_text() if words.exists() else ""

    for recipient in ("ann@example.org", "bob@example.org"):
        assert passed(recipient, 0) == f"-G -i -f news@acme.example -- {recipient}\n"
        page = message.read_text()
        assert (page.count("/pixel/"), page.count("/click/")) == (1, 1)
    assert sorted(row["recipient"] for row in rows(server, tenant["id"])) == ["ann@example.org", "bob@example.org"]
    taken.touch()  # Postfix does not take it back
    passed("ann@example.org", 1)
    words.unlink()
    assert passed("ann@example.org", 75, f"sqlite:{tmp_path}/nowhere/tracking.db") == ""


def test_a_template_is_instrumented_that_a_tool_merges(server: Server, tmp_path: Path) -> None:
    server.tenant("My shop")
    (tmp_path / "page.html").write_text('<body><a href="https://acme.com/">x</a></body>')
    (commands,) = [block for block in codes(INSTRUMENT) if "--key-placeholder" in block]
    commands = commands.replace("tracker.py", f"'{sys.executable}' '{ROOT}/tracker.py' --env {os.devnull}")
    subprocess.run(["sh", "-ec", commands], cwd=tmp_path, env=server.environ, check=True, timeout=60)
    page = (tmp_path / "tracked.html").read_text()
    merged = page.replace("{{ .Subscriber.UUID }}", "5f3c")
    for path in re.findall(rf"{server.url}([^\"]+)", merged):
        assert get(server.port, path, **{"User-Agent": CHROME})[0] in (200, 302)
    told = server.run("campaign", "list", "My shop")
    assert told == "Spring: 1,000 sent, opened by people 1, clicked by people 1\n"
