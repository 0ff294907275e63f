"""What becomes of hits, told to other programs: the log of changes and its feed."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from datetime import datetime
from typing import Any

import pytest
from conftest import CHROME, NOW, Stage, click, hit, segment

import tracker

BOTH_ENGINES = True
DAY = tracker.DAY_MS


def keep_changes(stage: Stage, *tenants: tracker.Tenant) -> None:
    with stage.database.transaction() as connection:
        for tenant in tenants or (stage.acme,):
            tracker.set_feed(connection, tenant.number, True)


def drained(stage: Stage, *lines: bytes) -> None:
    segment(stage, *lines)
    assert stage.drain().troubles == []


def ask(stage: Stage, tenant: tracker.Tenant | None = None, status: int | None = None, **asked: Any) -> Any:
    """The feed's answer."""
    parameters = {name: value for name, value in asked.items() if value}
    return stage.web.get(f"/{(tenant or stage.acme).id}/feed.json", parameters, status=status)


def feed(
    stage: Stage, after: str = "", tenant: tracker.Tenant | None = None, limit: int = 1000
) -> list[dict[str, Any]]:
    """All rows behind one, as a reader gets them that goes on until there are no more."""
    found: list[dict[str, Any]] = []
    while True:
        page = ask(stage, tenant, limit=limit, after=after).json
        found += page["rows"]
        if not page["rows"]:
            return found
        after = page["next"]


def told(rows: list[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in names) for row in rows]


# -- What stands in it


def test_the_feed_tells_of_each_hit_that_is_in_a_number_in_full(stage: Stage) -> None:
    keep_changes(stage)
    email = {"key": "e1", "subject": "Sale", "recipient": "ann@example.org", "campaign": "Spring"}
    stage.web.post_json(f"/{stage.acme.id}/emails", {**email, "sent_at": "2026-11-24T09:00:00Z"})
    drained(stage, hit(stage, "e1", NOW), hit(stage, "e1", NOW + 1_000), click(stage, "e1", at=NOW + 9_000))
    opened, clicked = feed(stage)  # the second open repeats the first, and is in no number
    assert set(opened) == set(clicked) == set(tracker.CHANGE_FIELDS)
    about = {"type": "clicked", "event_type": "click", "method": "GET", "url": "https://acme.com/"}
    about |= {"counts_as": "person", "verdict": "human"}
    assert clicked == {
        **{name: clicked[name] for name in ("id", "changed_at", "reason")},
        **email,
        **about,
        "timestamp": tracker.iso_time(NOW + 9_000),
        "user_agent": CHROME,
        "ip_address": "198.51.100.0",
        "before": None,
    }
    assert abs(datetime.fromisoformat(clicked["changed_at"][:-1] + "+00:00").timestamp() - time.time()) < 60
    assert told([opened], "type", "timestamp", "counts_as") == [("opened", tracker.iso_time(NOW), "person")]


def test_a_later_hit_that_shows_what_earlier_ones_were_is_told_as_revised(stage: Stage) -> None:
    keep_changes(stage)
    drained(stage, click(stage, "e1", at=NOW))
    [clicked] = feed(stage)
    drained(stage, click(stage, "e1", at=NOW - 1_000, method="HEAD"), click(stage, "e2", at=NOW))
    first, *later = feed(stage)
    assert first == clicked  # what was told once stays
    assert told(later, "type", "key", "timestamp", "counts_as") == [
        ("revised", "e1", tracker.iso_time(NOW), "machine"),
        ("clicked", "e1", tracker.iso_time(NOW - 1_000), "machine"),
        ("clicked", "e2", tracker.iso_time(NOW), "person"),
    ]
    assert later[0]["before"] == {name: clicked[name] for name in ("verdict", "reason", "counts_as")}
    assert later[0]["reason"] != clicked["reason"]


def test_what_a_sender_says_and_rejudge_changes_is_told_too(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_changes(stage)
    stage.web.post_json(f"/{stage.acme.id}/emails", {"key": "e1", "sent_at": "2026-11-24T09:00:00Z"})
    drained(stage, click(stage, "e1", at=NOW))
    last = feed(stage)[-1]["id"]
    delivered = tracker.iso_time(NOW - 1_000)
    stage.web.patch_json(f"/{stage.acme.id}/emails/e1", {"delivered_at": delivered})
    [said] = feed(stage, last)
    assert (said["type"], said["reason"]) == ("revised", "too-soon")
    monkeypatch.setattr(tracker, "judge", lambda hits, _: [tracker.judgement_of("human", "") for _ in hits])
    with stage.database.transaction() as connection:
        tracker.rejudge_emails(connection, 0, 0, 100)
    [again] = feed(stage, said["id"])
    assert (again["before"]["reason"], again["changed_at"] >= said["changed_at"]) == ("too-soon", True)


def test_each_tenant_has_a_feed_of_its_own_if_it_wants_one(stage: Stage) -> None:
    of_globex = f"/{stage.globex.mail_id}/pixel/g1.gif"
    drained(stage, hit(stage, "before"), hit(stage, "g0", uri=of_globex))
    assert "tenant set NAME --feed" in ask(stage, status=409).json["error"]
    assert stage.rows("select * from changes") == []
    keep_changes(stage)
    drained(stage, hit(stage, "e1"), hit(stage, "g1", uri=of_globex))
    keep_changes(stage, stage.globex)
    drained(stage, hit(stage, "e2"), hit(stage, "g2", uri=of_globex.replace("g1", "g2")), hit(stage, "e3"))
    assert told(feed(stage), "key") == [("e1",), ("e2",), ("e3",)]
    assert told(feed(stage, tenant=stage.globex), "key") == [("g2",)]


def test_a_tenant_whose_id_stands_in_mail_tells_of_no_people(stage: Stage) -> None:
    with tracker.changing_tenants(stage.database) as connection:
        hooli = tracker.add_tenant(connection, "Hooli", NOW, id="hooli", api_key_hash=tracker.key_hash("k" * 16))
    stage.refresh()
    keep_changes(stage, hooli)
    stage.web.authorization = ("Bearer", "k" * 16)
    stage.web.post_json("/hooli/emails", {"key": "h1", "recipient": "ann@example.org"})
    drained(stage, hit(stage, "h1", uri="/hooli/pixel/h1.gif"))
    assert feed(stage, tenant=hooli)[0]["recipient"] == "ann@example.org"
    stage.web.authorization = None
    [row] = feed(stage, tenant=hooli)
    assert set(row) == {*tracker.CHANGE_FIELDS} - {*tracker.PERSONAL_FIELDS}


# -- How it is read


def test_pages_of_any_length_and_lines_say_the_same(stage: Stage) -> None:
    keep_changes(stage)
    for n in range(5):
        drained(stage, *(hit(stage, f"e{n}-{each}") for each in range(n)))
    rows = feed(stage)
    assert len(rows) == len({row["id"] for row in rows}) == 10
    assert [feed(stage, limit=limit) for limit in (1, 3, 5, 10)] == [rows] * 4
    for n, row in enumerate(rows):
        assert feed(stage, row["id"]) == rows[n + 1 :]
    answer = ask(stage, format="ndjson", limit=7)
    assert [json.loads(line) for line in answer.text.splitlines()] == rows[:7]
    assert answer.content_type == "application/x-ndjson"
    assert ask(stage, format="ndjson", after=rows[-1]["id"]).body == b""
    assert ask(stage, after=rows[-1]["id"]).json == {"rows": [], "next": rows[-1]["id"]}


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("after=x", "after: expected the id of a change"),
        ("after=0123456789ab-", "after: expected the id of a change"),
        ("limit=0", "limit: expected a whole number from 1 to 1000"),
        ("limit=1001", "limit: expected a whole number from 1 to 1000"),
        ("limit=x", "limit: expected a whole number from 1 to 1000"),
        ("format=csv", "format: expected one of json, ndjson"),
        ("since=2026-11-24", "since: unknown parameter; expected some of after, limit, format"),
    ],
)
@pytest.mark.sqlite
def test_what_cannot_be_read_is_told_with_what_was_expected(stage: Stage, query: str, said: str) -> None:
    assert stage.web.get(f"/{stage.acme.id}/feed.json?{query}", status=400).json["error"].startswith(said)


def test_a_writer_that_is_held_open_makes_no_gap_that_is_filled_later(stage: Stage) -> None:
    """Two processes write, one of them for five seconds, and one gives up; a reader looks all the time."""
    keep_changes(stage)
    seen: list[dict[str, Any]] = []
    ended, begun = threading.Event(), threading.Event()

    def hold(seconds: float, key: str, *, gives_up: bool = False) -> None:
        refused = pytest.raises(tracker.Busy) if gives_up else contextlib.nullcontext()
        with refused, contextlib.closing(stage.another()) as database, database.transaction() as connection:
            tracker.record_lines(connection, [tracker.parse_line(hit(stage, key))], NOW)
            begun.set()
            time.sleep(seconds)
            if gives_up:
                raise tracker.Busy

    def write() -> None:
        hold(0, "given-up", gives_up=True)
        slow = threading.Thread(target=hold, args=(5, "slow"))
        begun.clear()
        slow.start()
        assert begun.wait(20)
        hold(0, "behind")
        slow.join()
        hold(0, "last")
        ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    while True:
        is_last = ended.is_set()
        with contextlib.closing(stage.another()) as database, database.reading() as connection:
            number = int(seen[-1]["id"].rpartition("-")[2]) if seen else 0
            found = tracker.feed_of(connection, stage.acme.number)
            assert found
            seen += tracker.read_changes(connection, stage.acme.number, found, number, 10)[0]
        if is_last:
            break
        time.sleep(0.05)
    writer.join()
    assert told(seen, "key") == [("slow",), ("behind",), ("last",)]
    assert seen == feed(stage)


def test_hits_that_come_late_and_in_any_order_are_each_told_once(stage: Stage) -> None:
    keep_changes(stage)
    after, seen = "", []
    for n, at in enumerate((0, -5, 30, -60, 3, -61, 29)):
        drained(stage, hit(stage, f"e{n % 2}", NOW + at * 3_600_000), hit(stage, f"f{n}", NOW + at))
        rows = feed(stage, after)
        seen += rows
        after = rows[-1]["id"]
    assert len(told(seen, "id")) == len({*told(seen, "id")})
    events = stage.rows("select key, at from event_details where state < 4")
    assert sorted(told(seen, "key", "timestamp")) == sorted((key, tracker.iso_time(at)) for key, at in events)
    assert [int(row["id"].rpartition("-")[2]) for row in seen] == [*range(1, len(seen) + 1)]


# -- What is gone from it


def test_what_is_too_old_goes_and_whoever_had_not_read_it_is_told_where_it_begins(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_changes(stage)
    drained(stage, *(hit(stage, f"old{n}") for n in range(3)))
    old = feed(stage)
    with stage.database.transaction() as connection:
        connection.execute(f"update changes set at = at - {8 * DAY + 60_000}")
    drained(stage, *(hit(stage, f"new{n}") for n in range(3)))
    monkeypatch.setattr(tracker, "SWEPT_CHANGES", 2)
    for left in (["old2", "new0", "new1", "new2"], ["new0", "new1", "new2"], ["new0", "new1", "new2"]):
        tracker.tidy_spool(stage.database, 3, 2000)
        assert told(feed(stage), "key") == [(key,) for key in left]
    gone = ask(stage, after=old[0]["id"], status=410).json
    assert told(feed(stage, gone["oldest"]), "key") == [("new0",), ("new1",), ("new2",)]
    assert told(feed(stage, old[2]["id"]), "key") == [("new0",), ("new1",), ("new2",)]


@pytest.mark.sqlite
def test_after_a_restore_an_older_cursor_is_gone_and_what_is_read_from_the_oldest_is_all(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.use(monkeypatch)
    keep_changes(stage)
    keep_changes(stage, stage.globex)
    drained(stage, hit(stage, "e1"), hit(stage, "e2"))
    before = feed(stage)
    copy = stage.folder / "copy.db"
    assert tracker.main(["--env", os.devnull, "backup", str(copy)]) == 0
    drained(stage, hit(stage, "e3"))
    last = feed(stage)[-1]["id"]
    assert tracker.main(["--env", os.devnull, "restore", str(copy)]) == 0
    for cursor in (before[0]["id"], last):
        gone = ask(stage, after=cursor, status=410).json
        rows = feed(stage, gone["oldest"])
        assert told(rows, "key") == [("e1",), ("e2",), ("e3",)]
        assert {row["id"] for row in rows}.isdisjoint({row["id"] for row in before})
    epochs = stage.rows("select epoch from feeds")
    assert len(epochs) == len({*epochs}) == 2


def test_who_is_forgotten_and_what_is_deleted_or_old_is_in_no_change(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.use(monkeypatch)
    keep_changes(stage)
    emails = [{"key": f"e{n}", "recipient": f"r{n}@example.org"} for n in range(3)]
    stage.web.post_json(f"/{stage.acme.id}/emails", emails)
    now = tracker.now_ms()
    lines = [hit(stage, f"e{n}", now) for n in range(3)]
    drained(stage, *lines, hit(stage, "e2", now - 30 * DAY), click(stage, "e1", at=now))
    rows = feed(stage)
    assert tracker.main(["--env", os.devnull, "forget", "Acme", "R0@example.org"]) == 0
    stage.web.delete(f"/{stage.acme.id}/emails/e1")
    [kept, old] = sorted(feed(stage, rows[0]["id"]), key=lambda row: row["timestamp"], reverse=True)
    assert (kept["key"], old["key"]) == ("e2", "e2")
    assert tracker.main(["--env", os.devnull, "tenant", "set", "Acme", "--retention", "7"]) == 0
    assert [*tracker.retire(stage.database, stage.settings)]
    assert told(feed(stage), "id") == [(kept["id"],)]
    assert stage.rows("select count(*) from changes") == [(1,)]
    assert stage.check() == []


# -- Turning it on and off


def test_a_feed_that_is_switched_off_keeps_nothing_and_begins_anew(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.use(monkeypatch)
    ids = []
    for n in range(2):
        assert tracker.main(["--env", os.devnull, "tenant", "set", "Acme", "--feed", "--json"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["feed"] is True
        drained(stage, hit(stage, f"e{n}"))
        assert tracker.main(["--env", os.devnull, "tenant", "set", "Acme", "--feed", "--name", "Acme"]) == 0
        [row] = feed(stage)
        ids.append(row["id"])
        ask(stage, after=ids[0], status=(200, 410)[n])
        assert tracker.main(["--env", os.devnull, "tenant", "set", "Acme", "--no-feed"]) == 0
        ask(stage, status=409)
        assert stage.rows("select (select count(*) from feeds) + (select count(*) from changes)") == [(0,)]
    assert len({*ids}) == 2
    capsys.readouterr()
    assert tracker.main(["--env", os.devnull, "tenant", "add", "Initech", "--feed", "--local", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["feed"] is True
