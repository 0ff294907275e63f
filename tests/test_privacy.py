"""What must not be stored any more: one person is forgotten, old facts go, and the numbers stay as they were."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from conftest import CHROME, NOW, ON_SQLITE, Postgres, Stage, click, hit, make_stage, segment

import tracker

BOTH_ENGINES = True
ANN = "Ann.Lee@example.com"
IPHONE = "Mozilla/5.0 (iPhone; CPU iPhone OS 18_6 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Mobile/15E148"
DAY = tracker.DAY_MS
URL = f"https://acme.com/off?e={quote(ANN)}"


class Told:
    """Commands on a stage, and what they say."""

    def __init__(self, stage: Stage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        stage.use(monkeypatch)
        self._capsys = capsys

    def __call__(self, *words: object, status: int = 0) -> str:
        assert tracker.main(["--env", os.devnull, *map(str, words)]) == status
        out, err = self._capsys.readouterr()
        return out + err


@pytest.fixture
def run(stage: Stage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Told:
    return Told(stage, capsys, monkeypatch)


def numbers(database: tracker.Database) -> dict[str, Any]:
    """Every number that is read, without rows of zeros; of times only those that are no email's."""
    found: dict[str, Any] = {}
    with database.reading() as connection:
        for table, (keys, columns, _) in tracker.ROLLUPS.items():
            if table not in ("email_counts", "link_counts"):
                sql = f"select {', '.join((*keys, *columns))} from {table} where {' + '.join(columns)} > 0"
                found[table] = sorted(map(tuple, connection.execute(sql)))
    return found


def without_urls(found: dict[str, Any]) -> dict[str, Any]:
    """Numbers, with those of a campaign's links together."""
    sums: dict[Any, list[int]] = {}
    for tenant, campaign, _, *counts in found["links"]:
        so_far = sums.setdefault((tenant, campaign), [0] * len(counts))
        sums[tenant, campaign] = [a + b for a, b in zip(so_far, counts, strict=True)]
    return found | {"links": sums}


def send_mail(stage: Stage) -> None:
    """Three emails to Ann, one known by her address, and some of others; with hits of many kinds."""
    said = [
        ("a1", ANN, "Spring", f"Hello {ANN}"),
        ("a2", ANN.lower(), "", "Sale"),
        ("b1", "bob@example.com", "Spring", "Sale"),
    ]
    said.append(("c1", "joann.lee@example.com", "Spring", "Sale"))
    emails = [
        {"key": key, "recipient": to, "campaign": name, "subject": text, "sent_at": "2026-11-24T09:00:00Z"}
        for key, to, name, text in said
    ]
    stage.web.post_json(f"/{stage.acme.id}/emails", emails)
    by_address = f"/{stage.acme.mail_id}/pixel/{quote(ANN)}.gif"
    lines = [
        *(hit(stage, key, NOW + n * 3_600_000) for n, key in enumerate(("a1", "a2", "b1", "c1", "a1"))),
        *(click(stage, key, at=NOW + 5_000) for key in ("a1", "b1")),
        click(stage, "a1", quote(URL), at=NOW + 9_000),
        click(stage, "a2", at=NOW + 1_000, method="HEAD"),
        hit(stage, "", NOW, uri=by_address),
        hit(stage, "", NOW + DAY, uri=f"{by_address}?campaign=Spring"),
        click(stage, "a1", "https://other.example/x", NOW + 2_000_000, answer="named", why="destination-not-allowed"),
    ]
    segment(stage, *lines)
    stage.drain()


def forget(stage: Stage, address: str = ANN) -> int:
    return tracker.let_go(stage.database, stage.acme.number, [address], tracker.FORGOTTEN).emails


def written(*texts: str) -> re.Pattern[bytes]:
    """Texts as files may have them."""
    forms: set[bytes] = set()
    for text in texts:
        for each in (text, text.lower(), text.upper()):
            raw = each.encode()
            forms |= {raw, quote(each, safe="").encode(), each.replace("@", "\\u0040").encode()}
            for n in range(3):
                middle = base64.b64encode(b"x" * n + raw)[n and n + 1 : -4]
                forms |= {middle, middle.translate(bytes.maketrans(b"+/", b"-_"))}
    return re.compile(rb"(?<![o])(?:" + b"|".join(map(re.escape, sorted(forms))) + b")")  # joann is somebody else


def files_with(pattern: re.Pattern[bytes], folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.rglob("*")) if path.is_file() and pattern.search(path.read_bytes())]


# -- Numbers


def test_of_a_person_who_is_forgotten_every_number_stays_and_no_fact(stage: Stage) -> None:
    send_mail(stage)
    before, links = numbers(stage.database), stage.rows("select count(*) from links where clicks_person > 0")
    assert forget(stage) == 4
    assert stage.check() == []
    assert without_urls(numbers(stage.database)) == without_urls(before)
    assert stage.rows("select key from emails order by 1") == [("b1",), ("c1",)]
    assert stage.rows("select count(*) from event_details where key not in ('b1', 'c1')") == [(0,)]
    assert stage.rows("select url from urls order by 1") == [("https://acme.com/",), ("other",)]
    assert stage.rows("select count(*) from links where clicks_person > 0") <= links
    with tracker.changing_tenants(stage.database) as connection:
        tracker.rebuild_rollups(connection)
    assert without_urls(numbers(stage.database)) == without_urls(before)


def test_numbers_that_are_carried_move_to_the_days_of_another_zone(staged: Callable[..., Stage]) -> None:
    stages = staged(), staged()
    found = []
    for n, stage in enumerate(stages):
        send_mail(stage)
        for what in range(2):
            if what == n:
                forget(stage)
            else:
                with stage.database.transaction() as connection:
                    tracker.change_tenant(connection, stage.acme.number, tz="Asia/Kolkata")
                    tracker.count_days_anew(connection, stage.acme.number)
        assert stage.check() == []
        found.append(numbers(stage.database))
    assert found[0] == found[1]


def test_what_comes_in_after_somebody_was_forgotten_is_counted_as_dropped(stage: Stage) -> None:
    send_mail(stage)
    forget(stage)
    before = numbers(stage.database)
    lines = [hit(stage, "a1", NOW - DAY), hit(stage, "a1", tracker.now_ms() + 60_000), click(stage, "a2", at=NOW + DAY)]
    again = tracker.Registration("a9", recipient=ANN.upper(), subject="again")
    segment(stage, *lines, tracker.email_line(stage.acme.mail_id, again, NOW))
    stage.drain()
    assert stage.rows("select reason, hits from dropped") == [("forgotten", 3)]
    assert numbers(stage.database) == before
    stage.web.post_json(f"/{stage.acme.id}/emails", {"key": "a1", "recipient": ANN})  # said anew, of a new mail
    segment(stage, hit(stage, "a1", tracker.now_ms() + 1_000))
    stage.drain()
    assert stage.rows("select key from event_details where key = 'a1'") == [("a1",)]
    assert stage.check() == []


def test_an_email_that_is_deleted_takes_only_its_own_part_of_what_is_carried(stage: Stage) -> None:
    send_mail(stage)
    for key in ("a1", "a2"):
        stage.web.delete(f"/{stage.acme.id}/emails/{key}")
    without = numbers(stage.database)
    assert forget(stage) == 2
    assert without_urls(numbers(stage.database)) == without_urls(without)
    for key in ("b1", "c1"):
        stage.web.delete(f"/{stage.acme.id}/emails/{key}")
    assert stage.check() == []
    assert stage.rows("select sum(emails) from cohorts where grain = 0") == [(2,)]  # those known by her address


# -- Files


def test_forget_leaves_nothing_of_a_person_in_any_file(stage: Stage, run: Told) -> None:
    stage.web.post_json(f"/{stage.acme.id}/emails", {"key": "a0", "recipient": ANN})
    send_mail(stage)
    shown = json.loads(run("forget", "Acme", ANN, "--show"))
    assert {each["key"]: len(each["hits"]) for each in shown["emails"]} == {
        "a0": 0,
        "a1": 5,
        "a2": 2,
        ANN: 1,
        f"{ANN}?campaign=Spring": 1,
    }
    (stage.spool / "rejected" / "x").write_bytes(b'{"id": 1, "recipient": "' + ANN.encode() + b'"}\n')
    (stage.spool / "rejected" / "y").write_bytes(b"bob's\n")
    live = stage.spool / "0000000000001-1-aaaaaaaa.jsonl"
    live.write_bytes(
        hit(stage, "a1") + hit(stage, "b1") + hit(stage, "", uri=f"/{stage.acme.id}/pixel/{quote(ANN)}.gif")
    )
    theirs = written(ANN, URL)
    assert len(files_with(theirs, stage.folder)) >= 3
    sizes = {path.name: path.stat().st_size for path in stage.spool.rglob("*.jsonl")}
    lines = sum(path.read_bytes().count(b"\n") for path in stage.spool.rglob("*.jsonl"))
    said = run("forget", "Acme", ANN.upper())
    assert "forgot 5 emails" in said and "no file here has anything of it" in said
    assert files_with(theirs, stage.folder) == []
    assert not re.search(
        rb"a[0-9]\.gif|\"a[0-9]\"", b"".join(path.read_bytes() for path in stage.spool.rglob("*.jsonl"))
    )
    assert {path.name: path.stat().st_size for path in stage.spool.rglob("*.jsonl")} == sizes
    assert sum(path.read_bytes().count(b"\n") for path in stage.spool.rglob("*.jsonl")) == lines
    assert [path.name for path in (stage.spool / "rejected").iterdir()] == ["y"]
    assert stage.rows("select count(*) from event_details where key = 'b1'") == [(3,)]
    if not stage.database.is_shared:
        run("backup", stage.folder / "copy.db")
        assert files_with(theirs, stage.folder) == []
    assert run("check") == "all is well\n"
    assert "forgot 0 emails" in run("forget", "Acme", ANN)


@pytest.mark.sqlite
def test_somebody_who_was_forgotten_comes_back_from_no_backup_and_no_number_changes(stage: Stage, run: Told) -> None:
    send_mail(stage)
    run("backup", stage.folder / "copy.db")
    stage.web.post_json(f"/{stage.acme.id}/emails", {"key": "a7", "recipient": ANN, "sent_at": "2026-11-24T09:00:00Z"})
    stage.drain()
    run("forget", "Acme", ANN)
    before = numbers(stage.database)
    for _ in range(2):
        said = run("restore", stage.folder / "copy.db")
        assert stage.check() == [], said
        found = numbers(stage.database)
        assert [each for each in found if found[each] != before[each]] == ["cohorts"]  # a7's, of which nothing was kept
        assert stage.rows("select key from emails order by 1") == [("b1",), ("c1",)]
    (stage.folder / "copy.db").unlink()
    for aside in stage.folder.glob("set-aside-*"):
        assert str(aside) in run("forget", "Acme", ANN)
    for path in stage.folder.glob("set-aside-*/*"):
        path.unlink()
    assert files_with(written(ANN), stage.folder) == []


def turn_until_all_is_done(drainer: tracker.Drainer) -> None:
    """Let it begin what is to be done once a minute, and go on with it as long as that takes."""
    for _ in range(2):  # at first it does not know yet whether the clock is right
        drainer._tidy_at = 0.0
        drainer.turn()
    while drainer._chore:
        drainer.turn()
    assert drainer._state["trouble"] == ""


def test_the_drainer_cleans_files_after_a_person_was_forgotten_by_the_api(stage: Stage) -> None:
    send_mail(stage)
    home = f"/{stage.acme.id}/forgotten"
    shown = stage.web.post_json(home, {"address": ANN, "show": True}).json
    assert [each["key"] for each in shown["emails"]] and shown["address"] == ANN
    for wrong in ({"address": ""}, {"address": "a\nb"}, {"addres": ANN}, {}):
        assert "expected" in stage.web.post_json(home, wrong, status=400).json["error"]
    assert stage.web.post_json(f"/{stage.globex.id}/forgotten", {"address": ANN}).json == {"forgotten": 0}
    assert stage.web.post_json(home, {"address": ANN}).json == {"forgotten": 4}
    drainer = tracker.drainer_of(stage.database, stage.settings)
    turn_until_all_is_done(drainer)
    assert files_with(written(ANN), stage.folder) == []


@pytest.mark.sqlite
def test_what_an_older_program_left_in_free_pages_is_looked_for_and_the_file_written_anew(
    stage: Stage, run: Told
) -> None:
    stage.database.close()
    with contextlib.closing(sqlite3.connect(stage.settings.database)) as old:
        old.execute("pragma secure_delete = off")
        number = stage.acme.number
        for n in range(200):
            row = (number, f"x{n}", ANN, 1, NOW, NOW)
            old.execute(
                "insert into emails (tenant, key, recipient, registered, created_at, sent_at) values (?, ?, ?, ?, ?, ?)",
                row,
            )
        old.execute("delete from emails where key like 'x%'")
        old.commit()
    assert files_with(written(ANN), stage.folder)
    run("forget", "Acme", ANN)
    assert files_with(written(ANN), stage.folder) == []
    assert run("check") == "all is well\n"


@pytest.mark.sqlite
def test_a_file_of_nginx_is_replaced_by_a_copy_of_the_same_age(request: pytest.FixtureRequest) -> None:
    if os.geteuid():
        pytest.skip("only root makes files of others")
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are root's alone
    request.addfinalizer(partial(shutil.rmtree, folder))
    folder.chmod(0o777)
    path = folder / "0000000000001-0-aaaaaaaa-nginx.jsonl"
    path.write_bytes(b"mine\nyours\n")
    path.chmod(0o644)
    os.utime(path, (5, 5))
    os.seteuid(65534)
    try:
        tracker._overwrite(str(path), {5: b"     \n"})
    finally:
        os.seteuid(0)
    assert path.read_bytes() == b"mine\n     \n"
    assert path.stat().st_mtime == 5 and [each.name for each in folder.iterdir()] == [path.name]


def test_what_a_kill_left_to_be_forgotten_is_forgotten_at_the_next_start(stage: Stage) -> None:
    send_mail(stage)
    before = numbers(stage.database)
    with pytest.raises(ZeroDivisionError), stage.database.transaction() as connection:
        released = tracker.release(connection, stage.acme.number, [ANN], [tracker.FORGOTTEN], tracker.now_ms())
        tracker.write_gone(str(stage.folder), released.gone)
        raise ZeroDivisionError
    assert len(stage.rows("select key from emails")) == 6
    with tracker.changing_tenants(stage.database) as connection:
        tracker.forget_gone(str(stage.folder), connection)
    assert stage.rows("select key from emails order by 1") == [("b1",), ("c1",)]
    assert without_urls(numbers(stage.database)) == without_urls(before)
    assert stage.check() == []
    for _ in tracker.clean_files(stage.database):
        pass
    assert files_with(written(ANN), stage.folder) == []


def test_each_machine_cleans_its_own_spool(postgres: Postgres, tmp_path: Path) -> None:
    url = postgres.make()
    one = make_stage(tmp_path, lambda folder, model="": {"DATABASE_URL": url, "DATA_FOLDER": str(folder / "one")})
    settings = dataclasses.replace(one.settings, data_folder=str(tmp_path / "two"))
    two = tracker.open_database(settings, make=True)
    send_mail(one)
    Path(two.spool, "0000000000001-1-aaaaaaaa.jsonl").write_bytes(hit(one, "a1") + hit(one, "b1"))
    assert tracker.drain(two).hits == 2
    kept = Path(two.spool, "kept", "0000000000001-1-aaaaaaaa.jsonl")
    assert b"a1.gif" in kept.read_bytes()
    forget(one)
    for database in (one.database, two):
        for _ in tracker.clean_files(database):
            pass
    assert b"a1.gif" not in kept.read_bytes() and b"b1.gif" in kept.read_bytes()
    assert files_with(written(ANN), tmp_path) == []
    two.close()
    one.app.close()
    postgres.drop()


# -- Retention


def retire(stage: Stage, days: int, agent_days: int = 30) -> None:
    """What a day's retention does."""
    settings = dataclasses.replace(stage.settings, retention_days=days, agent_days=agent_days)
    for _ in tracker.retire(stage.database, settings):
        pass


def send_old_mail(stage: Stage, now: int) -> None:
    """Mail of the last hundred days, and what was made of it then, and again lately."""
    emails = [
        tracker.Registration(
            f"e{n}", "Sale", f"r{n}@example.com", ("Spring", "")[n % 2], now - (100 - n) * DAY + 3_600_000
        )
        for n in range(0, 100, 5)
    ]
    with stage.database.transaction() as connection:
        tracker.register_emails(connection, stage.acme.number, emails, now)
    lines = []
    for n, each in enumerate(emails):
        sent = each.sent_at or 0
        lines += [
            hit(stage, each.key, sent + 3_600_000, ua=IPHONE if n > 12 else f"{IPHONE} {n}"),
            hit(stage, each.key, sent + 3_700_000),
        ]
        lines += [click(stage, each.key, at=sent + 3_800_000), click(stage, f"u{n}", at=sent + 5_000)]
        lines.append(hit(stage, each.key, now - DAY + n * 60_000))
        lines.append(
            click(stage, each.key, f"https://other.example/{n}", sent + 1, answer="named", why="destination-blocked")
        )
    segment(stage, *lines)
    stage.drain()


@pytest.mark.parametrize("slices", [7, ON_SQLITE(1_000)])
def test_old_facts_go_and_every_number_stays_to_the_hit(
    slices: int, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "RETIRED_EVENTS", slices)
    now = tracker.now_ms()
    send_old_mail(stage, now)
    before, tallies = numbers(stage.database), tallies_of(stage)
    assert stage.check() == []
    retire(stage, 40, 10)
    assert stage.check() == []
    assert (numbers(stage.database), tallies_of(stage)) == (before, tallies)
    assert stage.rows(f"select count(*) from events where at < {now - 40 * DAY}") == [(0,)]
    assert stage.rows("select count(*) from events") == [(20 + 8 * 5,)]
    old = f"select count(*) from emails where created_at < {now - 40 * DAY}"
    assert stage.rows(old) == stage.rows(f"{old} and recipient = '' and subject = '' and key like 'aged~%'") == [(24,)]
    assert stage.rows("select count(*) from emails where key like 'aged~%'") == [(24,)]
    assert sorted(row[0] for row in stage.rows("select agent from agents")) == sorted(
        [CHROME, IPHONE, "Apple Mail (mobile)", "Chrome (desktop)"]
    )
    assert stage.rows(f"select count(*) from events where fixed = 0 and at < {now - 10 * DAY}") == [(0,)]
    assert stage.rows("select count(*) from urls where url like 'https://other.example/%'") == [(8,)]
    with stage.database.transaction() as connection:
        tracker.rebuild_rollups(connection)
    assert (numbers(stage.database), tallies_of(stage)) == (before, tallies)
    retire(stage, 40, 10)
    assert (numbers(stage.database), tallies_of(stage)) == (before, tallies)


@pytest.mark.sqlite
def test_room_that_becomes_free_is_given_back(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "RETIRED_EVENTS", 100)
    path, now = Path(stage.settings.database), tracker.now_ms()
    segment(stage, *(hit(stage, f"k{n % 40}", now - 100 * DAY + n * 1000) for n in range(4000)))
    stage.drain()
    sizes = []
    for days in (0, 50):
        if days:
            retire(stage, days)
        with stage.database.checkpointed():
            sizes.append(path.stat().st_size)
    assert sizes[1] < 0.6 * sizes[0]
    assert stage.check() == [] and stage.rows("pragma integrity_check") == [("ok",)]


def tallies_of(stage: Stage) -> list[Any]:
    """What is counted of each email and link."""
    columns = ", ".join(tracker.TALLY_COLUMNS)
    clicks, sums = ", ".join(tracker.CLICK_COLUMNS), " + ".join(tracker.CLICK_TALLIES)
    return [
        stage.rows(f"select email, {columns}, last_at from email_counts order by 1"),
        stage.rows(f"select email, url, {clicks} from link_counts where {sums} > 0 order by 1, 2"),
    ]


def test_later_hits_and_words_of_old_mail_find_it_by_the_hash_of_its_key(stage: Stage, run: Told) -> None:
    now = tracker.now_ms()
    send_old_mail(stage, now)
    retire(stage, 40)
    emails = stage.rows("select count(*) from emails")
    by_campaign = f"/{stage.acme.mail_id}/pixel/e0.gif?campaign=Spring"
    segment(stage, hit(stage, "e0", now), click(stage, "u0", at=now), hit(stage, "", now + 60_000, uri=by_campaign))
    stage.drain()
    stage.web.post_json(f"/{stage.acme.id}/emails", {"key": "e5", "subject": "again", "recipient": ANN})
    stage.web.patch_json(f"/{stage.acme.id}/emails/e10", {"campaign": "Autumn"})
    assert stage.rows("select count(*) from emails") == emails
    assert stage.check() == []
    page = stage.web.get(f"/{stage.acme.id}/emails/{aged(stage, 'e0')}")
    assert page.status_int == 200
    retire(stage, 39)
    assert stage.rows("select count(*) from emails where recipient = ? or subject = 'again'", ANN) == [(0,)]
    stage.web.delete(f"/{stage.acme.id}/emails/e5")
    stage.web.delete(f"/{stage.acme.id}/emails/{aged(stage, 'e10')}")
    segment(stage, hit(stage, "e5", now + 1), hit(stage, "e10", now + 1))
    stage.drain()
    assert stage.rows("select sum(hits) from dropped where reason = 'deleted'") == [(2,)]
    run("rejudge")
    assert stage.check() == []


def aged(stage: Stage, key: str) -> str:
    """The key that an old email has now."""
    with stage.database.reading() as connection:
        return tracker.find_emails(connection, stage.acme.number, [key])[key].key


def test_each_tenant_keeps_facts_as_long_as_it_is_told_to(stage: Stage, run: Told) -> None:
    now = tracker.now_ms()
    send_old_mail(stage, now)
    for said in ("6", "1.5", "-1", "10000", "ten"):
        assert "--retention: expected" in run("tenant", "set", "Acme", "--retention", said, status=1)
    run("tenant", "set", "Acme", "--retention", "0")
    retire(stage, 40)
    assert stage.rows(f"select count(*) from events where at < {now - 40 * DAY}") != [(0,)]
    assert "retention_days 60" in run("tenant", "set", "Acme", "--retention", "60")
    retire(stage, 40)
    assert stage.rows(f"select count(*) from events where at < {now - 60 * DAY}") == [(0,)]
    assert stage.rows(f"select count(*) from events where at < {now - 40 * DAY}") != [(0,)]
    run("tenant", "set", "Acme", "--retention", "")
    drainer = tracker.drainer_of(stage.database, dataclasses.replace(stage.settings, retention_days=40))
    turn_until_all_is_done(drainer)
    assert stage.rows(f"select count(*) from events where at < {now - 40 * DAY}") == [(0,)]
    assert stage.check() == []


def test_what_is_left_of_a_program_is_what_it_was_counted_as(shared: Path) -> None:
    agents = set(re.split(r"[\t\n]", (shared / "useragents.tsv").read_text(encoding="utf-8")))
    for agent in {CHROME, IPHONE, "", "curl/8", "Thunderbird", "a (b) (mobile)", *agents}:
        family = tracker.family_of(agent)
        assert tracker.client_of(family) == tracker.client_of(agent), agent
        assert tracker.family_of(family) == family


# -- What help says


def told_of() -> dict[str, set[str]]:
    """What `help privacy` says is stored: places, each with its columns or fields where it lists them."""
    text = tracker.help_text("privacy").partition("\n## What is stored where")[2].partition("\n## ")[0]
    found: dict[str, set[str]] = {}
    for names, columns, more in re.findall(
        r"^([a-z_]+(?:, [a-z_]+)*)(?: {2,}(.*))?$((?:\n {10,}.*$)*)", text, re.MULTILINE
    ):
        found |= {name: {*columns.split(), *more.split()} for name in names.split(", ")}
    return found


def test_help_says_of_every_table_column_and_field_of_the_spool_that_it_is_stored() -> None:
    told = told_of()
    schema = dict(
        re.findall(r"^create table (\w+) (.*?);$", tracker.resource("schema.sql").decode(), re.MULTILINE | re.DOTALL)
    )
    assert set(told) == {*schema, "spool"}
    for table in ("emails", "events"):
        assert told[table] == {*re.findall(r"^    (\w+) +(?:integer|text)\b", schema[table], re.MULTILINE)}, table


def test_help_says_of_every_field_that_is_written_into_the_spool(stage: Stage) -> None:
    stage.change(stage.acme, own=["203.0.113.7"])
    headers = {"Sec-GPC": "1", "Purpose": "prefetch", "X-Forwarded-For": "203.0.113.7"}
    stage.pixel(
        "e1",
        extra_environ={
            "REMOTE_ADDR": "127.0.0.1",
            **{f"HTTP_{k.upper().replace('-', '_')}": v for k, v in headers.items()},
        },
    )
    stage.web.get(f"/{stage.acme.mail_id}/click/e1?url=https://other.example/")
    stage.app.spool.close()
    said = tracker.Registration("e1", "s", "r@example.com", "c", NOW, NOW, 1)
    lines = [line for path in stage.spool.glob("*.jsonl") for line in path.read_bytes().splitlines()]
    lines += [tracker.email_line(stage.acme.mail_id, said, NOW), tracker.choice_line(stage.acme.mail_id, "e1", "stop")]
    written_now = {name for line in lines for name in json.loads(line)}
    assert written_now >= {"own", "gpc", "purpose", "why", "recipient", "delivered_at"}
    assert written_now | {*tracker.HIT_TEXTS, *tracker.EMAIL_TEXTS} == told_of()["spool"]


# -- Who wants no tracking


def test_who_is_untracked_counts_in_totals_only_from_then_on(stage: Stage, run: Told) -> None:
    send_mail(stage)
    stage.drain()
    before = stage.rows("select key, at, type from event_details order by at")
    assert "tracks 1 recipient no more, with 4 emails already sent" in run("untrack", "Acme", ANN.upper())
    [(since,)] = set(stage.rows("select at from gone where kind = 'untracked'"))
    early, late = since - 1000, since + 1000
    path = f"/{stage.acme.mail_id}/pixel/{quote(ANN)}.gif?campaign=Next"
    lines = [hit(stage, "a1", early), hit(stage, "a1", late), click(stage, "a2", "https://acme.com/", late)]
    segment(stage, *lines, hit(stage, "x", late, uri=path), hit(stage, "b1", late))
    stage.drain()
    new = sorted({*stage.rows("select key, at, type from event_details")} - {*before})
    assert new == [("a1", early, 1), ("b1", late, 1)]
    assert sorted(stage.rows("select reason, hits from dropped")) == [("untracked-click", 1), ("untracked-open", 2)]
    assert "2 opens and 1 click asked not to be tracked" in stage.web.get(f"/{stage.acme.id}/dashboard?range=all").text
    assert stage.check() == []
    run("untrack", "Acme", ANN, "carol@example.com")
    assert {since} < {at for (at,) in stage.rows("select at from gone where kind = 'untracked'")}  # hers stays
    assert [*stage.rows("select min(at) from gone where kind = 'untracked'")] == [(since,)]


def test_nothing_is_added_to_mail_to_who_is_untracked_and_nothing_stored(stage: Stage, run: Told) -> None:
    home, headers = f"/{stage.acme.id}", {"Content-Type": "message/rfc822"}
    message = f"From: a@acme.com\r\nTo: Ann <{ANN.lower()}>\r\nSubject: Secret\r\nContent-Type: text/html\r\n\r\n"
    raw = f'{message}<body><a href="https://acme.com/">x</a></body>\r\n'.encode()
    assert stage.web.post(f"{home}/messages", raw, headers=headers).headers["X-Tracker"] == "instrumented"
    run("forget", "Acme", ANN)
    said = stage.web.post_json(f"{home}/untracked", {"addresses": [ANN]}).json
    assert said == {"untracked": 1, "emails": 0}
    answer = stage.web.post(f"{home}/messages", raw, headers=headers)
    assert (answer.body, answer.headers["X-Tracker"]) == (raw, "unchanged")
    report = stage.web.post(f"{home}/messages", raw, headers={**headers, "Accept": "application/json"}).json["report"]
    assert report["wrapped"] == [] and "untracked" in report["skipped"][0]["reason"]
    html = '<a href="https://acme.com/">x</a>'
    emails = [
        {"key": "n1", "recipient": ANN, "subject": "Secret", "links": ["https://acme.com/"], "html": html},
        {"key": "n2", "recipient": "bob@example.com", "links": ["https://acme.com/"]},
    ]
    ann, bob = stage.web.post_json(f"{home}/emails", emails).json
    assert ann["untracked"] and ann["pixel_url"] == "" and ann["html"] == html
    assert ann["links"] == [{"url": "https://acme.com/", "click_url": "https://acme.com/"}]
    assert "untracked" not in bob and "/click/n2/" in bob["links"][0]["click_url"]
    stage.web.post_json(f"/{stage.globex.id}/emails", {"key": "g1", "recipient": ANN})  # another sender's choice
    assert stage.rows("select key from emails order by key") == [("g1",), ("n2",)]
    kept = b"".join(path.read_bytes() for path in (stage.spool / "kept").glob("*.jsonl"))
    assert b"Secret" not in kept and b'"n1"' not in kept


def test_what_was_instrumented_before_it_could_be_known_is_not_stored(stage: Stage, run: Told) -> None:
    run("untrack", "Acme", ANN)
    [(since,)] = stage.rows("select at from gone")
    said = (("late", since + 1), ("early", since - 1))
    lines = (tracker.email_line(stage.acme.mail_id, tracker.Registration(key, "S", ANN), at) for key, at in said)
    segment(stage, *lines).rename(stage.spool / f"{NOW}-1-{'ab' * 12}-emails.jsonl")
    segment(stage, hit(stage, "late", since + 9), hit(stage, "early", since - 1), hit(stage, "other", since + 9))
    stage.drain()
    assert stage.rows("select key from event_details order by key") == [("early",), ("other",)]
    assert stage.rows("select reason, hits from dropped") == [("untracked-open", 1)]


@pytest.mark.sqlite
def test_a_backup_made_before_somebody_was_untracked_changes_nothing(stage: Stage, run: Told) -> None:
    send_mail(stage)
    stage.drain()
    copy = stage.folder / "copy.db"
    run("backup", copy)
    run("untrack", "Acme", ANN)
    [(since,)] = set(stage.rows("select at from gone where kind = 'untracked'"))
    segment(stage, hit(stage, "a1", since - 1000), hit(stage, "a1", since + 1000), hit(stage, "a2", since + 1000))
    stage.drain()
    before = numbers(stage.database), stage.rows("select * from dropped"), sorted(stage.rows("select * from gone"))
    for _ in range(2):
        run("restore", copy)
        after = numbers(stage.database), stage.rows("select * from dropped"), sorted(stage.rows("select * from gone"))
        assert after == before
    segment(stage, hit(stage, "a1", since + 5000))
    stage.drain()
    assert len(stage.rows("select 1 from events where at > ?", since)) == 0


def lines_by_key(stage: Stage) -> dict[str, list[dict[str, Any]]]:
    """The lines that are kept, by the key in their path."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in (stage.spool / "kept").glob("*.jsonl"):
        for line in map(json.loads, filter(bytes.strip, path.read_bytes().splitlines())):
            key = line.get("key") or re.split(r"[/.?]", line["uri"].partition("/")[2])[2]
            found.setdefault(key, []).append(line)
    return found


@pytest.mark.parametrize("slot", ["", "-nginx"])
def test_kept_lines_of_who_is_not_tracked_say_that_somebody_was_and_are_read_again_as_that(
    slot: str, stage: Stage, run: Told
) -> None:
    send_mail(stage)
    stage.change(stage.globex, ignore_gpc=True)
    run("untrack", "Acme", ANN)
    [(since,)] = set(stage.rows("select at from gone where kind = 'untracked'"))
    early, late = since - 1000, since + 1000
    ends = f"{quote(ANN)}.gif", f"{ANN}.gif", f"{quote(ANN)}.gif?campaign=Spring"
    uris = [f"/{stage.acme.mail_id}/pixel/{end}" for end in ends]
    others = f"/{stage.globex.mail_id}/pixel/g1.gif"
    lines = [hit(stage, "a1", early), hit(stage, "a1", late), click(stage, "a2", at=late), hit(stage, "b1", late)]
    lines += [hit(stage, "", late, uri=uri) for uri in uris]
    lines += [
        hit(stage, "b1", late, dnt="1"),
        hit(stage, "b1", late, gpc="1"),
        hit(stage, "", late, uri=others, gpc="1"),
    ]
    path = segment(stage, *lines)
    path = path.rename(path.with_name(f"{NOW}-0-{'ab' * 12}{slot}.jsonl"))
    stage.drain()
    size = (stage.spool / "kept" / path.name).stat().st_size
    dropped = sorted(stage.rows("select reason, day, hits from dropped"))
    assert [sum(hits for reason, _, hits in dropped if type_ in reason) for type_ in ("open", "click")] == [6, 1]
    turn_until_all_is_done(tracker.drainer_of(stage.database, stage.settings))
    kept = lines_by_key(stage)
    assert [line["t"] for line in kept["a1"] if "uri" in line and line["t"] > early / 1000] == []
    assert any(line["t"] == early / 1000 for line in kept["a1"]) and len(kept["g1"]) == 1
    assert ANN not in kept and all(line["ip"] == line["ua"] == "" for line in kept["untracked~"])
    assert len(kept["untracked~"]) == 7 and (stage.spool / "kept" / path.name).stat().st_size == size
    assert not {"dnt", "gpc"} & {*chain.from_iterable(kept["b1"])}
    with stage.database.transaction() as connection:  # as in an older database
        connection.execute("delete from dropped")
        connection.execute("delete from positions where segment = ?", (path.name,))
    stage.database.kept_seen = -1
    stage.drain()
    assert sorted(stage.rows("select reason, day, hits from dropped")) == dropped


def test_mail_that_is_registered_after_its_recipient_was_forgotten_stays_in_kept_lines(stage: Stage, run: Told) -> None:
    send_mail(stage)
    run("forget", "Acme", ANN)
    stage.web.post_json(f"/{stage.acme.id}/emails", {"key": "a9", "recipient": ANN})
    segment(stage, hit(stage, "a9", tracker.now_ms()))
    stage.drain()
    stage.web.post_json(f"/{stage.acme.id}/forgotten", {"address": "carol@example.com"})
    turn_until_all_is_done(tracker.drainer_of(stage.database, stage.settings))
    kept = lines_by_key(stage)
    assert len(kept["a9"]) == 2 and "a1" not in kept


def test_instrument_leaves_mail_to_who_is_untracked_as_it_is(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, run: Told
) -> None:
    run("untrack", "Acme", ANN)
    raw = b'To: <%s>\nSubject: x\nContent-Type: text/html\n\n<a href="https://acme.com/">x</a>\n' % ANN.encode()
    for words, same in (((), True), (("--recipient", "bob@example.com"), False), (("--recipient", ANN.lower()), True)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
        told = run("instrument", "Acme", "--local", *words)
        assert ("/click/" not in told) == same and ("untracked" in told) == same, told
    assert stage.rows("select recipient from emails") == [("bob@example.com",)]
