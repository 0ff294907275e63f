"""README is held against the program: what it lists is what there is, and its quick start ends in the number it says."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields

from conftest import ROOT, Server

import tracker

README = (ROOT / "README.md").read_text()


def chapter(title: str) -> str:
    """The text of one chapter."""
    match = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert match, f"README has no chapter {title}"
    return match[1]


def table(text: str) -> list[list[str]]:
    """The rows of the tables in a text, cells stripped, without the heads."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if not set("".join(row)) <= set("-")]


def test_the_table_of_urls_is_the_table_of_routes() -> None:
    listed = [tuple(row[:2]) for row in table(chapter("URLs")) if row[0].startswith(("GET", "POST", "PATCH", "DELETE"))]
    assert listed == [(f"{route.method} `{route.pattern}`", route.access) for route in tracker.ROUTES]


TABLES = {**tracker.TABLES, "campaigns": tracker.CAMPAIGN_FIELDS, "clients": tracker.CLIENT_FIELDS}


def test_the_fields_of_exports_are_those_listed() -> None:
    listed = {row[0]: tuple(re.findall(r"`(\w+)`", row[1])) for row in table(chapter("URLs")) if row[0] in TABLES}
    assert listed == TABLES


def test_the_fields_of_stats_are_those_listed() -> None:
    listed = next(row[1] for row in table(chapter("URLs")) if row[0] == "stats")
    period = tracker.read_period("7d", "UTC", 1_795_544_485_430, None)
    nothing = tracker.Totals(0, dict.fromkeys(tracker.STATES.values(), 0), dict.fromkeys(tracker.STATES.values(), 0), 0)
    hits = {kind: dict.fromkeys((*tracker.STATES, tracker.ASIDE), 0) for kind in tracker.TYPES}
    stats = tracker.Stats(period, nothing, nothing, hits, hits, [], [], [], {}, None, None)
    assert re.findall(r"`(\w+)`", listed) == list(tracker.stats_json(stats, "Acme", 0))


def test_the_table_of_settings_is_that_of_the_program() -> None:
    declared = [each.metadata for each in fields(tracker.Settings) if "variable" in each.metadata]
    expected = [[f"`{m['variable']}`", f"`{m['default']}`" if m["default"] else "", m["help"]] for m in declared]
    assert [row for row in table(chapter("Settings")) if row[0] != "variable"] == expected


def test_every_command_is_listed_and_every_listed_command_exists() -> None:
    listed = {word for row in table(chapter("Commands"))[1:] for word in re.findall(r"`([a-z]+)", row[0])}
    groups = r"`(?:tenant|campaign) ([a-z]+)`"
    listed |= {word for row in table(chapter("Commands"))[1:] for word in re.findall(groups, row[0])}
    assert listed == {word for words in tracker.COMMANDS for word in words.split()}


def test_every_verdict_and_every_section_is_explained() -> None:
    rows = table(chapter("What the numbers mean"))
    first_words = [row[0].strip("`") for row in rows]
    at = first_words.index("reason")
    assert set(first_words[1:at]) == set(tracker.VERDICT_STATES)
    states = {row[0].strip("`"): row[2:] for row in rows[1:at]}
    for verdict, counts_as in states.items():
        name = tracker.STATE_NAMES[tracker.VERDICT_STATES[verdict]].replace("_", " ")
        assert set(counts_as) <= {name, "–"} and name in counts_as
    assert {row[0].strip("`"): row[2] for row in rows[at + 1 :]} == {
        reason: about.sentence for reason, about in tracker.REASONS.items()
    }
    sections = re.findall(r"^# == ([A-Za-z ]+?) =", (ROOT / "tracker.py").read_text(), re.MULTILINE)
    layout = chapter("How the code is laid out").replace("\n", " ")
    places = [layout.find(section) for section in sections]
    assert -1 not in places
    assert places == sorted(places)


def test_the_quick_start_ends_in_the_number_it_says(server: Server) -> None:
    """Its commands, with this Python and a server that runs already in place of `make run`."""
    commands = "\n".join(re.findall(r"^```sh\n(.*?)^```$", chapter("Quick start"), re.MULTILINE | re.DOTALL))
    server.environ.pop("BASE_URL")
    server.environ["PORT"] = str(server.port)
    printed = ""
    for command in commands.splitlines():
        if command == "make run":
            continue
        found = re.search(r"^pixel_url +(\S+)$", printed, re.MULTILINE)
        command = command.replace(".venv/bin/python tracker.py", f"{sys.executable} {ROOT / 'tracker.py'}")
        command = command.replace("PIXEL_URL", found[1] if found else "")
        done = subprocess.run(
            command, shell=True, env=server.environ, cwd=server.folder, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        printed += done.stdout
    assert re.search(r"^Opens +1 .*1 by machines", printed, re.MULTILINE), printed
