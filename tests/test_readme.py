"""README and `help` are held against the program: what they list is what there is, and the quick start ends as it says."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import fields
from typing import Any

import pytest
from conftest import ROOT, Server, Stage

import tracker

README = (ROOT / "README.md").read_text()


def chapter(title: str, text: str = README) -> str:
    """The text of one chapter, which must be there."""
    return re.split(rf"^## {title}\n", text, flags=re.MULTILINE)[1].partition("\n## ")[0]


def table(text: str) -> list[list[str]]:
    """The rows of the tables in a text of Markdown, cells stripped, without the lines below the heads."""
    rows = re.findall(r"^\|(?!-)(.*)\|$", text, re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")] for row in rows]


def codes(text: str, language: str = "sh") -> list[str]:
    """The blocks of code in a text, without their indentation."""
    return list(map(textwrap.dedent, re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)))


def columns(topic: str, title: str) -> dict[str, list[str]]:
    """A table of a text of `help` by its first column: two spaces divide cells, and a line that begins with more goes on."""
    lines = re.sub(r"\n {9,}", " ", chapter(title, tracker.help_text(topic))).splitlines()
    rows = [re.split("  +", line) for line in lines if "  " in line]
    return {name: cells for name, *cells in rows}


# == Lists of README ==


def test_the_table_of_settings_is_that_of_the_program() -> None:
    declared = [each.metadata for each in fields(tracker.Settings) if "variable" in each.metadata]
    _, *rows = table(chapter("Settings"))
    assert [row[:2] for row in rows] == [
        [f"`{each['variable']}`", f"`{each['default']}`" if each["default"] else ""] for each in declared
    ]
    assert all(row[2] for row in rows)


def test_the_table_of_commands_has_each_command_and_that_of_topics_each_topic() -> None:
    _, *rows = table(chapter("Commands"))
    at = rows.index(["topic", "what it is about"])
    listed = set()
    for name, _ in rows[:at]:
        first, *more = re.findall("`([a-z ]+)`", name)
        listed |= {first, *(f"{first.rpartition(' ')[0]} {word}" for word in more)}
    assert listed == set(tracker.COMMANDS)
    titles = [tracker.help_text(topic).partition("\n")[0] for topic in tracker.HELP_TOPICS]
    assert [f"# {name.strip('`')}: {about}" for name, about in rows[at + 1 :]] == titles


@pytest.mark.parametrize("topic", ["README", *tracker.HELP_TOPICS])
def test_topics_and_commands_that_are_named_are_there(topic: str) -> None:
    text = README if topic == "README" else tracker.help_text(topic)
    assert set(re.findall(r"`(?:tracker\.py )?help ([a-z]+)`", text)) <= {*tracker.HELP_TOPICS}
    quoted = re.findall(r"`(?:tracker\.py|email-tracker) ([^`]+)`|`((?:tenant|campaign) \w+ [^`]+)`", text)
    code = "\n".join(codes(text)).replace("\\\n", " ")
    lines = re.findall(r"^ *(?:\S*/)?(?:tracker\.py|email-tracker) (.*)$", code, re.MULTILINE)
    for command in ["".join(pair) for pair in quoted] + lines:
        words = shlex.split(re.sub(r"\$\(.*?\)", "x", command), comments=True)
        end = next((at for at, word in enumerate(words) if word in ("<", ">", "|", "||", "&&")), None)
        try:
            tracker.command_line().parse_args(words[:end])
        except SystemExit as stop:
            assert stop.code == 0 or words == ["COMMAND", "--help"] or command in tracker.COMMANDS, command


def test_readme_is_short_and_a_text_of_help_fits_a_terminal() -> None:
    assert len(README.splitlines()) <= 280
    for topic in tracker.HELP_TOPICS:
        assert max(map(len, tracker.help_text(topic).splitlines())) <= 100, topic
    assert {path.stem for path in (ROOT / "templates" / "help").iterdir()} == set(tracker.HELP_TOPICS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "tracker.py help TOPIC prints one of these texts, "),
        ("numbers", "# numbers: "),
        ("tenant", "usage: tracker.py tenant "),
        ("tenant set", "usage: tracker.py tenant set "),
        ("tracking", "tracker.py: there is no help on 'tracking'; expected one of instrument, "),
    ],
)
def test_help_is_there_also_where_the_settings_are_wrong(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PORT", "none")
    with contextlib.suppress(SystemExit):  # as argparse prints the help of a command
        assert tracker.main(["help", *words.split()]) == (words == "tracking")
    assert capsys.readouterr()[words == "tracking"].startswith(said)


# == Lists of help ==


def test_the_list_of_urls_is_the_table_of_routes() -> None:
    text = chapter("URLs", tracker.help_text("api"))
    listed = re.findall(r"^([A-Z]+) (/\S*) +(\w+)$", text, re.MULTILINE)
    assert listed == [(route.method, route.pattern, route.access) for route in tracker.ROUTES]


def test_the_fields_of_exports_and_of_stats_are_those_listed(stage: Stage) -> None:
    listed = {name: tuple(cells[0].split()) for name, cells in columns("api", "Exports and fields").items()}
    assert listed.pop("stats") == tuple(stage.web.get(f"/{stage.acme.id}/stats.json").json)
    stage.web.post_json(f"/{stage.acme.id}/emails", {"key": "e1", "campaign": "Spring"})
    assert listed.pop("campaign") == tuple(stage.web.get(f"/{stage.acme.id}/campaigns/Spring.json").json)
    assert listed == {name: each.fields for name, each in tracker.TABLES.items()}


def test_every_verdict_and_every_reason_is_explained() -> None:
    _, *verdicts = columns("numbers", "Verdicts").items()
    assert {verdict: {an_open, a_click} - {"–"} for verdict, (an_open, a_click, _) in verdicts} == {
        verdict: {tracker.STATE_NAMES[state].replace("_", " ")} for verdict, state in tracker.VERDICT_STATES.items()
    }
    _, *reasons = columns("numbers", "Reasons").items()
    assert [(reason, why) for reason, (*_, why) in reasons] == [
        (reason, tracker.sentence_of(reason)) for reason in dict(reasons)
    ]
    assert set(dict(reasons)) == set(tracker.verdict_data().reasons)
    named = {verdict for _, (some, *_) in reasons for verdict in some.split(", ")}
    assert named <= {*tracker.VERDICT_STATES, "any"}


def test_every_sign_is_explained_with_its_votes() -> None:
    told = re.findall("^([0-9])  +(?:both|clicks)  +(.+)$", tracker.help_text("numbers"), re.MULTILINE)
    assert told == [(str(votes), text) for votes, text in tracker.verdict_data().signs.values() if votes]


def test_every_section_is_listed_in_its_order() -> None:
    sections = re.findall(r"^# == ([A-Za-z ]+?) =", (ROOT / "tracker.py").read_text(), re.MULTILINE)
    assert list(columns("design", "How the code is laid out")) == sections


def test_the_quick_start_ends_in_the_number_it_says(server: Server) -> None:
    """Its commands, with this Python and a server that runs already in place of `make run`."""
    server.environ.pop("BASE_URL")
    server.environ["PORT"] = str(server.port)
    printed = ""
    clone, first, *commands = "".join(codes(chapter("Quick start"))).splitlines()
    assert (clone.split()[:2], first) == (["git", "clone"], "make run")
    for command in commands:
        command = command.replace(".venv/bin/python tracker.py", f"{sys.executable} {ROOT / 'tracker.py'}")
        command = command.replace("PIXEL_URL", "".join(re.findall(r"pixel_url +(\S+)", printed)))
        where: dict[str, Any] = {"env": server.environ, "cwd": server.folder}
        printed += subprocess.run(command, shell=True, check=True, stdout=subprocess.PIPE, text=True, **where).stdout
    assert re.search(r"^Machines +1 +1 open, in no other number$", printed, re.MULTILINE), printed
