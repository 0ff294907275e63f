"""Downloads for spreadsheets: to the byte, as LibreOffice opens them, and beside the exports that scripts know."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
from asking import add_one_id, get, register
from conftest import CHROME, NOW, Stage, click, hit, missing, segment

import tracker

MARK = b"\xef\xbb\xbf"
HEAD = (
    "timestamp,event_type,recipient,subject,campaign,client,device,verdict,reason,url,key,method,user_agent,ip_address"
)
OUTLOOK = "Microsoft Office/16.0 (Windows NT 10.0; Microsoft Outlook 16.0.17928; Pro)"
TABLE, TEXT, OFFICE = (f"{{urn:oasis:names:tc:opendocument:xmlns:{each}:1.0}}" for each in ("table", "text", "office"))


@pytest.fixture
def mailing(stage: Stage) -> Stage:
    """An email of the campaign Frühling, opened at 18:21:25 UTC and clicked an hour later."""
    said = tracker.Registration("e1", "Grüße, =1+1", "zoë@example.org", "Frühling", sent_at=NOW - 3_600_000)
    register(stage, stage.acme, said)
    segment(stage, hit(stage, "e1", ua=OUTLOOK), click(stage, "e1", "https://acme.com/schöne", NOW + 3_600_000))
    stage.drain()
    return stage


def test_a_download_for_a_spreadsheet_has_a_mark_local_times_and_whom_and_what_an_event_was_about(
    mailing: Stage,
) -> None:
    found = get(mailing, f"/{mailing.acme.id}/events.csv?whole&tz=Europe/Rome")
    assert found["Content-Type"] == "text/csv; charset=utf-8"
    whom = 'zoë@example.org,"Grüße, =1+1",Frühling'
    assert found.body[:3] == MARK and found.body[3:].decode() == "\r\n".join(
        (
            HEAD,
            f"2026-11-24 20:21:25,click,{whom},Chrome,desktop,human,browser,https://acme.com/schöne,e1,GET,"
            f'"{CHROME}",198.51.100.0',
            f"2026-11-24 19:21:25,open,{whom},Outlook,desktop,human,mail-client,,e1,GET,{OUTLOOK},198.51.100.0",
            "",
        )
    )
    emails = get(mailing, f"/{mailing.acme.id}/emails.csv?whole&tz=America/New_York").text.splitlines()
    assert emails[0].lstrip("\ufeff") == ",".join(tracker.EMAILS.fields)
    assert "2026-11-24 12:21:25,1,0,0,person,2026-11-24 13:21:25,1,0,0,person,2026-11-24 14:21:25" in emails[1]


def test_what_scripts_ask_for_is_without_mark_and_with_the_cursor_as_ever(mailing: Stage) -> None:
    for query in ("", "?limit=1"):
        text = get(mailing, f"/{mailing.acme.id}/events.json{query}").text
        assert text.startswith(
            '{"rows": [\n{"key": "e1", "event_type": "click", "timestamp": "2026-11-24T19:21:25.430Z", '
        )
    plain = get(mailing, f"/{mailing.acme.id}/events.csv?limit=1").body.decode().split("\r\n")
    assert plain[0] == "key,event_type,timestamp,method,verdict,reason,url,user_agent,ip_address,next"
    assert plain[1].startswith("e1,click,2026-11-24T19:21:25.430Z,GET,human,browser,https://acme.com/schöne,")
    assert plain[1].endswith(f",{NOW + 3_600_000}-2")


def test_a_download_that_must_end_before_the_last_row_says_so(mailing: Stage) -> None:
    lines = get(mailing, f"/{mailing.acme.id}/events.csv?whole&limit=1").text.splitlines()
    assert len(lines) == 3 and lines[-1] == tracker.MORE_ROWS.join('""')
    assert len(get(mailing, f"/{mailing.acme.id}/events.csv?whole&limit=2").text.splitlines()) == 3


def test_who_may_see_no_people_gets_none_in_a_spreadsheet_either(stage: Stage) -> None:
    tenant = add_one_id(stage)
    register(stage, tenant, tracker.Registration("k", "Secret", "secret@example.org", "spring"))
    segment(stage, hit(stage, "k", uri=f"/{tenant.mail_id}/pixel/k.gif"))
    stage.drain()
    text = get(stage, f"/{tenant.id}/events.csv?whole").text
    assert "spring" in text and "ecret" not in text and "198.51" not in text
    assert "recipient" not in text and "subject" not in text


def test_the_command_writes_what_the_page_gives_in_the_zone_of_the_tenant(
    mailing: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mailing.change(mailing.acme, tz="Asia/Kolkata")
    mailing.use(monkeypatch)
    command = ["--env", os.devnull, "export", "Acme"]
    for table in ("emails", "events", "links", "campaigns"):
        output = tmp_path / f"{table}.csv"
        assert tracker.main([*command, table, "--spreadsheet", "--output", str(output)]) == 0
        page = get(mailing, f"/{mailing.acme.id}/{table}.csv?whole")
        assert output.read_bytes() == page.body
    assert b"\r\n2026-11-25 00:51:25,click," in (tmp_path / "events.csv").read_bytes()
    assert tracker.main([*command, "events", "--spreadsheet", "--format", "json"]) == 1
    assert "--spreadsheet: expected a table, as CSV" in capsys.readouterr().err


def cells_of(path: Path) -> list[list[tuple[str, str]]]:
    """The rows that LibreOffice finds in a CSV as it would open it itself: of each cell its type, and its value or text."""
    if (program := shutil.which("soffice")) is None:
        missing("LibreOffice (libreoffice-calc-nogui)")
    profile = f"-env:UserInstallation=file://{path.parent}/profile"
    # Commas, quotation marks, the encoding as it sees it, from the first line on, and dates are recognised.
    convert = [str(program), profile, "--headless", "--infilter=CSV:44,34,,1,,0,false,true", "--convert-to", "fods"]
    subprocess.run([*convert, path.name], cwd=path.parent, check=True, capture_output=True, timeout=120)
    rows = []
    for row in ElementTree.parse(path.with_suffix(".fods")).getroot().iter(f"{TABLE}table-row"):
        cells = [(each.get(f"{OFFICE}value-type"), each) for each in row.iter(f"{TABLE}table-cell")]
        rows.append(
            [
                (kind, each.get(f"{OFFICE}date-value") or "".join(each.itertext()).strip())
                for kind, each in cells
                if kind
            ]
        )
    return rows


def test_libreoffice_finds_letters_and_real_dates_in_a_download(mailing: Stage, tmp_path: Path) -> None:
    (path := tmp_path / "events.csv").write_bytes(get(mailing, f"/{mailing.acme.id}/events.csv?whole").body)
    head, clicked, opened = cells_of(path)[:3]
    assert [text for _, text in head] == HEAD.split(",")
    assert (clicked[0], opened[0]) == (("date", "2026-11-24T19:21:25"), ("date", "2026-11-24T18:21:25"))
    assert clicked[2:5] == [("string", "zoë@example.org"), ("string", "Grüße, =1+1"), ("string", "Frühling")]


def test_the_download_links_of_pages_are_for_spreadsheets_in_the_zone_of_the_page(mailing: Stage) -> None:
    number = mailing.rows("select id from urls")[0][0]
    for page in ("dashboard", "campaigns/Fr%C3%BChling", "emails/e1", "people/e1", f"links/{number}"):
        text = get(mailing, f"/{mailing.acme.id}/{page}?tz=Asia/Kolkata").text
        links = [html.unescape(link) for link in re.findall(r'href="\.\.?/([a-z]+\.csv[^"]*)"', text)]
        assert links
        for link in links:
            found = get(mailing, f"/{mailing.acme.id}/{link}")
            assert (found.status, found.body[:3]) == (200, MARK)
            assert "events" not in link or b"\r\n2026-11-25 00:51:25,click," in found.body
