"""README and `help` are held against the program: what they list is what there is, and the quick start ends as it says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import fields

import pytest
from conftest import ROOT, Server, Stage

import tracker

README = (ROOT / "README.md").read_text()


def chapter(title: str, text: str = README) -> str:
    """The text of one chapter."""
    match = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert match, f"there is no chapter {title}"
    return match[1]


def table(text: str) -> list[list[str]]:
    """The rows of the tables in a text of Markdown, cells stripped, without the heads."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if not set("".join(row)) <= set("-")]


def codes(text: str, language: str = "sh") -> list[str]:
    """The blocks of code in a text, without their indentation."""
    blocks = re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return list(map(textwrap.dedent, blocks))


def columns(topic: str, title: str) -> dict[str, list[str]]:
    """A table of a text of `help` by its first column: two spaces divide cells, and a line that begins with more goes on."""
    lines = re.sub(r"\n {9,}", " ", chapter(title, tracker.help_text(topic))).splitlines()
    rows = [re.split("  +", line) for line in lines if "  " in line]
    return {name: cells for name, *cells in rows}


# == Lists of README ==


def test_the_table_of_settings_is_that_of_the_program() -> None:
    declared = [each.metadata for each in fields(tracker.Settings) if "variable" in each.metadata]
    expected = [[f"`{m['variable']}`", f"`{m['default']}`" if m["default"] else ""] for m in declared]
    rows = [row for row in table(chapter("Settings")) if row[0] != "variable"]
    assert [row[:2] for row in rows] == expected and all(row[2] for row in rows)


def test_the_table_of_commands_has_each_command_and_that_of_topics_each_topic() -> None:
    rows = table(chapter("Commands"))
    at = next(number for number, row in enumerate(rows) if row[0] == "topic")
    listed = set()
    for row in rows[1:at]:
        first, *more = re.findall("`([a-z ]+)`", row[0])
        listed |= {first, *(f"{first.split()[0]} {word}" for word in more)}
    assert listed == set(tracker.COMMANDS)
    titles = {topic: tracker.help_text(topic).partition("\n")[0] for topic in tracker.HELP_TOPICS}
    assert [f"# {row[0].strip('`')}: {row[1]}" for row in rows[at + 1 :]] == list(titles.values())


@pytest.mark.parametrize("topic", ["README", *tracker.HELP_TOPICS])
def test_topics_and_commands_that_are_named_are_there(topic: str) -> None:
    text = README if topic == "README" else tracker.help_text(topic)
    topics = set(re.findall(r"`(?:tracker\.py )?help ([a-z]+)`", text))
    assert topics <= {*tracker.HELP_TOPICS, "TOPIC"}
    quoted = re.findall(r"`(?:tracker\.py|email-tracker) ([^`]+)`|`((?:tenant|campaign) \w+ [^`]+)`", text)
    code = "\n".join(codes(text)).replace("\\\n", " ")
    lines = re.findall(r"^ *(?:\S*/)?(?:tracker\.py|email-tracker) (.*)$", code, re.MULTILINE)
    for command in ["".join(pair) for pair in quoted] + lines:
        words = shlex.split(re.sub(r"\$\(.*?\)", "x", command), comments=True)
        end = next((at for at, word in enumerate(words) if word in ("<", ">", "|", "||", "&&")), None)
        try:
            tracker.command_line().parse_args(words[:end])
        except SystemExit as stop:
            assert stop.code == 0 or words == ["COMMAND", "--help"], command


def test_readme_is_short_and_a_text_of_help_fits_a_terminal() -> None:
    assert len(README.splitlines()) <= 280
    for topic in tracker.HELP_TOPICS:
        assert max(map(len, tracker.help_text(topic).splitlines())) <= 100, topic
    assert {path.stem for path in (ROOT / "templates" / "help").iterdir()} == set(tracker.HELP_TOPICS)


@pytest.mark.parametrize(
    "words, status, said",
    [
        ("", 0, "tracker.py help TOPIC prints one of these texts, "),
        ("numbers", 0, "# numbers: "),
        ("tenant", 0, "usage: tracker.py tenant "),
        ("tenant set", 0, "usage: tracker.py tenant set "),
        ("tracking", 1, "tracker.py: there is no help on 'tracking'; expected one of instrument, "),
    ],
)
def test_help_is_there_also_where_the_settings_are_wrong(
    words: str, status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PORT", "none")
    try:
        assert tracker.main(["help", *words.split()]) == status
    except SystemExit as stop:  # as argparse prints the help of a command
        assert stop.code == status
    out, err = capsys.readouterr()
    assert (err if status else out).startswith(said)


# == Lists of help ==


def test_the_list_of_urls_is_the_table_of_routes() -> None:
    text = chapter("URLs", tracker.help_text("api"))
    listed = re.findall(r"^([A-Z]+) (/\S*) +(\w+)$", text, re.MULTILINE)
    assert listed == [(route.method, route.pattern, route.access) for route in tracker.ROUTES]


def test_the_fields_of_exports_and_of_stats_are_those_listed(stage: Stage) -> None:
    listed = {name: tuple(cells[0].split()) for name, cells in columns("api", "Exports and fields").items()}
    assert listed.pop("stats") == tuple(stage.web.get(f"/{stage.acme.id}/stats.json").json)
    assert listed == {name: each.fields for name, each in tracker.TABLES.items()}


def test_every_verdict_and_every_reason_is_explained() -> None:
    verdicts = columns("numbers", "Verdicts")
    del verdicts["verdict"]
    assert set(verdicts) == set(tracker.VERDICT_STATES)
    for verdict, (an_open, a_click, _) in verdicts.items():
        name = tracker.STATE_NAMES[tracker.VERDICT_STATES[verdict]].replace("_", " ")
        assert {an_open, a_click} - {"–"} == {name}
    reasons = columns("numbers", "Reasons")
    del reasons["reason"]
    assert {reason: cells[1] for reason, cells in reasons.items()} == {
        reason: tracker.sentence_of(reason) for reason in tracker.verdict_data().reasons
    }
    named = {verdict for cells in reasons.values() for verdict in cells[0].split(", ")}
    assert named <= {*tracker.VERDICT_STATES, "any"}


def test_every_section_is_listed_in_its_order() -> None:
    sections = re.findall(r"^# == ([A-Za-z ]+?) =", (ROOT / "tracker.py").read_text(), re.MULTILINE)
    assert list(columns("design", "How the code is laid out")) == sections


def test_the_quick_start_ends_in_the_number_it_says(server: Server) -> None:
    """Its commands, with this Python and a server that runs already in place of `make run`."""
    server.environ.pop("BASE_URL")
    server.environ["PORT"] = str(server.port)
    printed = ""
    for command in "".join(codes(chapter("Quick start"))).splitlines():
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
