"""The page on which a recipient says no: who gets it, in which language, what it says, and what a choice does and when."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import re
from typing import Any

import pytest
from asking import database_away
from conftest import BASE, Stage, click, hit, segment
from test_privacy import ANN, Told, numbers, run, send_mail, turn_until_all_is_done

import tracker

BOTH_ENGINES = True
UUID = "5f3c1c9e-7b0a-4c66-9a51-0c1de2f3a4b5"
__all__ = ["run"]  # a fixture


def link(stage: Stage, key: str, tenant: tracker.Tenant | None = None, signed: str | None = None) -> str:
    """The link in a mail, as its path."""
    mail_id = (tenant or stage.acme).mail_id
    signature = tracker.sign(stage.app.secrets[0], mail_id, key if signed is None else signed, tracker.PREFERENCES)
    return f"/{mail_id}/preferences/{tracker.key_in_path(key)}/{signature}"


def choose(stage: Stage, path: str, choice: str, status: int = 200) -> str:
    """Load the page and send its form."""
    form = stage.web.get(path).forms[0]
    return str(form.submit("choice", value=choice, status=status).text)


def known(stage: Stage) -> tuple[Any, ...]:
    return tuple(
        sorted(stage.rows(f"select * from {table}"), key=repr)
        for table in ("emails", "events", "gone", "carried", "dropped")
    )


def lines_of(stage: Stage, folder: str = "") -> bytes:
    return b"".join(path.read_bytes() for path in sorted((stage.spool / folder).glob("*.jsonl")))


# -- What it says


def test_the_page_says_what_is_stored_of_the_mail_and_changes_nothing(stage: Stage) -> None:
    send_mail(stage)
    before = known(stage)
    page = stage.web.get(link(stage, "a1"))
    assert stage.web.head(link(stage, "a1")).headers["Content-Length"] == page.headers["Content-Length"]
    for said in ("your address", "that it was sent on 2026-11-24", "images were loaded: 2", "was followed: 2"):
        assert said in page.text
    assert "until the sender deletes them" in page.text and "a part of your internet address" in page.text
    for private in (ANN, "Spring", "Hello", stage.acme.id, stage.acme.mail_id, "Acme", "script"):
        assert private.lower() not in page.text.lower().replace("spring", ""), private
    assert dict(tracker.PAGE_HEADERS).items() <= dict(page.headers).items()
    assert "<li>nothing</li>" in stage.web.get(link(stage, "unknown")).text
    stage.change(stage.acme, retention_days=60)
    assert "deleted after 60 days" in stage.web.get(link(stage, "a1")).text
    stage.drain()
    assert (known(stage), lines_of(stage)) == (before, b"")


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("asked", "language"),
    [
        ("de-AT,de;q=0.9,en;q=0.8", "de"), ("fr", "fr"), ("it-IT", "it"), ("es;q=0.5, pt", "es"), ("en;q=0.4, de;q=0.7", "de"),
        ("", "en"), ("pt-BR,pt;q=0.9", "en"), ("*", "en"), ("x" * 9000, "en"), ("de" * 900 + ",;q=", "en"), ("DE", "de"),
        ("den, fra;q=0.9, esp", "en"),
    ],
)  # fmt: skip
def test_the_page_is_in_the_readers_language(asked: str, language: str, stage: Stage) -> None:
    page = stage.web.get(link(stage, "a1"), headers={"Accept-Language": asked})
    assert f'<html lang="{language}">' in page.text
    assert html.escape(stage.app.pages.languages[language]["stop"]) in page.text
    done = page.forms[0].submit("choice", value="stop", headers={"Accept-Language": asked})
    assert f'<html lang="{language}">' in done.text
    assert html.escape(stage.app.pages.languages[language]["done-stop"]) in done.text


def test_every_language_has_the_same_texts_with_the_same_places() -> None:
    texts = {language: tracker.read_words(f"preferences.{language}") for language in tracker.LANGUAGES}
    assert len({text["title"] for text in texts.values()}) == len(texts)
    for language, text in texts.items():
        assert text["lang"] == language
        assert {name: each.count("{}") for name, each in text.items()} == {
            name: each.count("{}") for name, each in texts["en"].items()
        }


@pytest.mark.sqlite
def test_an_address_is_told_as_it_is_kept(stage: Stage) -> None:
    for setting, said in (("none", "browser."), ("full", "and your internet address.")):
        stage.app.settings = dataclasses.replace(stage.settings, ip_addresses=setting)
        assert said in stage.web.get(link(stage, "a1")).text


# -- What a choice does


@pytest.mark.parametrize("choice", ["stop", "erase"])
def test_a_choice_holds_for_all_mail_to_the_address(choice: str, stage: Stage) -> None:
    send_mail(stage)
    before = numbers(stage.database)
    assert "not tracked any more" in choose(stage, link(stage, "a1"), choice)
    since = tracker.now_ms() + 60_000
    segment(stage, hit(stage, "a2", since), click(stage, "a1", at=since), hit(stage, "b1", since))
    stage.drain()
    kept = {"a1", "a2", "b1", "c1"} if choice == "stop" else {"b1", "c1"}
    assert {key for (key,) in stage.rows("select key from emails")} >= kept
    assert (stage.rows("select 1 from emails where recipient = ?", ANN) == []) == (choice == "erase")
    assert stage.rows("select key from event_details where at >= ?", since) == [("b1",)]
    assert sorted(stage.rows("select reason, hits from dropped")) == [("untracked-click", 1), ("untracked-open", 1)]
    said = stage.web.post_json(f"/{stage.acme.id}/emails", {"key": "n", "recipient": ANN.upper()}).json
    assert said["untracked"] and said["preferences"] == BASE + link(stage, "n")
    assert "untracked" not in stage.web.post_json(f"/{stage.globex.id}/emails", {"recipient": ANN}).json
    assert stage.check() == []
    for table in ("cohorts", "campaigns"):
        rows = [row for row in numbers(stage.database)[table] if row[0] == stage.acme.number]
        assert rows == before[table]
    page = stage.web.get(link(stage, "a1")).text
    assert "you want no tracking" in page and ("your address, or" in page) == (choice == "stop")
    gone = (stage.folder / "gone").read_text()
    choose(stage, link(stage, "a2"), choice)
    stage.drain()
    assert {line.split()[0] for line in (stage.folder / "gone").read_text().splitlines()} >= {
        line.split()[0] for line in gone.splitlines()
    }


@pytest.mark.parametrize("choice", ["stop", "erase"])
def test_a_choice_holds_for_an_address_in_whatever_case(choice: str, stage: Stage) -> None:
    people = {"k1": "änn@example.com", "k2": "ÄNN@Example.com", "k3": "Änn@example.com", "k4": "ann@example.com"}
    said = [{"key": key, "recipient": address} for key, address in people.items()]
    stage.web.post_json(f"/{stage.acme.id}/emails", said)
    choose(stage, link(stage, "k2"), choice)
    stage.drain()
    left = {key for (key,) in stage.rows("select key from emails")}
    assert left == ({*people} if choice == "stop" else {"k4"})
    since = tracker.now_ms() + 60_000
    segment(stage, *(hit(stage, key, since) for key in people))
    stage.drain()
    assert stage.rows("select key from event_details") == [("k4",)]
    assert stage.check() == []


def test_where_no_address_is_known_a_choice_holds_for_the_key(stage: Stage) -> None:
    by_tool = f"/{stage.acme.mail_id}/pixel/{UUID}.gif?campaign=Spring"
    segment(stage, hit(stage, "", uri=by_tool), hit(stage, UUID), hit(stage, "u1"), hit(stage, "u2"))
    stage.drain()
    tool = link(stage, UUID, signed="")  # as instrument --key-placeholder makes it
    assert "images were loaded: 2" in stage.web.get(tool).text
    choose(stage, tool, "erase")
    choose(stage, link(stage, "u1"), "stop")
    since = tracker.now_ms() + 60_000
    segment(stage, hit(stage, "", since, uri=by_tool), hit(stage, "u1", since), hit(stage, "u2", since))
    stage.drain()
    assert sorted(stage.rows("select key, count(*) from event_details group by key")) == [("u1", 1), ("u2", 2)]
    assert stage.rows("select reason, hits from dropped") == [("untracked-open", 2)]
    assert stage.check() == []


@pytest.mark.sqlite
def test_a_choice_is_kept_while_the_database_is_away_and_holds_from_its_own_time(stage: Stage) -> None:
    send_mail(stage)
    with database_away(stage):
        page = stage.web.get(link(stage, "a1"))
        assert "be looked up just now" in page.text
        assert "not tracked any more" in page.forms[0].submit("choice", value="stop").text
    [line] = map(json.loads, lines_of(stage).splitlines())
    at = round(line["t"] * 1000)
    assert {name: line[name] for name in ("kind", "key", "choice")} == {"kind": "choice", "key": "a1", "choice": "stop"}
    segment(stage, hit(stage, "a1", at - 1), hit(stage, "a1", at), hit(stage, "a2", at + 1), at=1)  # an older segment
    stage.database.ahead = 0.0  # the newest segment is next, and that is the one with hits
    stage.drain()
    assert stage.rows("select key, at from event_details where at >= ?", at - 1) == [("a1", at - 1)]
    assert {at} == {since for (since,) in stage.rows("select at from gone where kind = 'untracked'")}
    text = (stage.folder / "gone").read_text()
    assert re.fullmatch(rf"([0-9a-f]{{32}} {at} untracked\n)+", text)
    choose(stage, link(stage, "a1"), "erase")
    segment(stage, hit(stage, "a1", at - 5))  # erasing reaches what came before and is drained later
    stage.drain()
    assert ("forgotten", 1) in stage.rows("select reason, hits from dropped")
    assert stage.rows("select 1 from event_details where key = 'a1'") == []


@pytest.mark.sqlite
@pytest.mark.parametrize("choice", ["stop", "erase"])
def test_a_choice_holds_for_an_address_that_is_told_only_afterwards(choice: str, stage: Stage) -> None:
    send_mail(stage)
    at = tracker.now_ms() - 5000
    with database_away(stage):
        choose(stage, link(stage, "n1"), choice)
    spooled = tracker.email_line(stage.acme.mail_id, tracker.Registration("n1", recipient=ANN.upper(), at=at), at)
    later = stage.spool / f"{at + 60_000}-1-00000000-emails.jsonl"  # as `instrument` makes one beside that of a worker
    later.write_bytes(spooled)
    stage.drain()
    known = {key for (key,) in stage.rows("select key from emails")}
    assert known & {"a1", "a2", "b1", "n1"} == ({"a1", "a2", "b1", "n1"} if choice == "stop" else {"b1"})
    people = (stage.acme, ANN, True), (stage.acme, "bob@example.com", False), (stage.globex, ANN, False)
    for tenant, address, said in people:
        answer = stage.web.post_json(f"/{tenant.id}/emails", {"recipient": address}).json
        assert ("untracked" in answer) == said
    segment(stage, hit(stage, "a2", tracker.now_ms() + 60_000))
    stage.drain()
    assert ("untracked-open", 1) in stage.rows("select reason, hits from dropped")
    assert stage.check() == []


@pytest.mark.sqlite
def test_no_backup_undoes_a_choice_nor_brings_back_what_was_erased(stage: Stage, run: Told) -> None:
    send_mail(stage)
    run("backup", stage.folder / "copy.db")
    choose(stage, link(stage, "b1"), "stop")
    stage.drain()
    run("backup", stage.folder / "later.db")
    choose(stage, link(stage, "a1"), "erase")
    stage.drain()
    turn_until_all_is_done(tracker.drainer_of(stage.database, stage.settings))
    before = sorted(stage.rows("select hash, kind, at from gone"))
    for copy in ("copy.db", "later.db", "copy.db"):
        run("restore", stage.folder / copy)
        assert stage.rows("select key from emails order by key") == [("b1",), ("c1",)]
        assert sorted(stage.rows("select hash, kind, at from gone")) == before
        assert stage.check() == []
    assert {at for _, kind, at in before if kind == "untracked"}


def test_what_was_erased_is_in_no_file_any_more(stage: Stage) -> None:
    send_mail(stage)
    (stage.spool / "rejected" / "x").write_bytes(b'{"recipient": "' + ANN.encode() + b'"}\n')
    choose(stage, link(stage, "a1"), "erase")
    stage.drain()
    assert [*(stage.spool / "rejected").iterdir()] == []
    turn_until_all_is_done(tracker.drainer_of(stage.database, stage.settings))
    assert not re.search(rb"/a[12]\.gif|\"a[12]\"", lines_of(stage, "kept"))
    held = [path for path in stage.folder.rglob("*") if path.is_file() and b"Ann.Lee" in path.read_bytes()]
    assert held == []


def test_many_choices_of_one_recipient_are_one(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "MOST_CHOICES", 3)
    send_mail(stage)
    token = stage.web.get(link(stage, "a1")).forms[0]["token"].value
    for n in range(20):
        stage.web.post(link(stage, "a1"), {"token": token, "choice": ("stop", "erase")[n % 2]})
    choose(stage, link(stage, "b1"), "stop")
    assert stage.drain().troubles == []
    assert stage.rows("select key from emails order by key") == [("b1",), ("c1",)]
    assert lines_of(stage).count(b'"kind":"choice"') == 21
    assert stage.check() == []


def test_choices_for_keys_that_somebody_made_up_leave_so_much_a_day_and_cost_nobody_elses(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has one link that a tool filled in can write any other random UUID into it."""
    monkeypatch.setattr(tracker, "MOST_UNKNOWN", 2)
    send_mail(stage)
    for n in range(5):
        choose(stage, link(stage, f"{n}{UUID[1:]}", signed=""), "stop")
    stage.drain()
    assert stage.rows("select count(*) from gone") == [(4,)]  # of each, as a key and as an address
    choose(stage, link(stage, "a1"), "erase")
    stage.drain()
    assert ("a1",) not in stage.rows("select key from emails")
    assert stage.check() == []


@pytest.mark.sqlite
def test_a_choice_that_can_not_be_written_is_said_to_have_failed_and_is_in_the_log_for_ingest(
    stage: Stage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, run: Told
) -> None:
    send_mail(stage)
    form = stage.web.get(link(stage, "a1")).forms[0]
    aside = stage.spool.rename(stage.folder / "aside")
    assert "could not be stored" in form.submit("choice", value="stop", status=503).text
    aside.rename(stage.spool)
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("unspooled ")]
    log = stage.folder / "log"
    log.write_text(line + "\n")
    run("ingest", log)
    assert {kind for (kind,) in stage.rows("select kind from gone")} == {"untracked"}


# -- Who can't choose


def forged(stage: Stage) -> list[str]:
    """Links that nobody made, or made for something else."""
    good, secret = link(stage, "a1"), stage.app.secrets[0]
    head, _, signature = good.rpartition("/")
    as_click = tracker.sign(secret, stage.acme.mail_id, "a1")
    as_token = tracker.sign(secret, stage.acme.mail_id, f"{tracker.now_ms() // tracker.DAY_MS} a1", tracker.CHOICE)
    return [
        *(f"{head}/{each}" for each in (as_click, as_token, signature[:-1], f"{signature}A", signature.swapcase(), "%00", "A" * 16)),
        *(link(stage, key, signed="a1") for key in ("a2", "b1", "A1", "a1.", ANN)),
        *(link(stage, key, signed="") for key in ("a1", "1", "1234567890" * 4, ANN, "5f3c1c9e-7b0a-1c66-9a51-0c1de2f3a4b5")),
        link(stage, "a1", stage.globex).replace(stage.globex.mail_id, stage.acme.mail_id),
        link(stage, "a1").replace(stage.acme.mail_id, stage.globex.mail_id),
        link(stage, "a1").replace(stage.acme.mail_id, stage.acme.id),
        link(stage, "a1").replace(stage.acme.mail_id, "nobody"),
        good.replace("/a1/", "/a1%3Fcampaign=x/"),
        good.replace("/a1/", "/../"),
    ]  # fmt: skip


def test_forged_links_and_those_of_another_tenant_change_nothing(stage: Stage) -> None:
    send_mail(stage)
    before = known(stage)
    token = stage.web.get(link(stage, "a1")).forms[0]["token"].value
    for each in forged(stage):
        for answer in (
            stage.web.get(each, status="*"),
            stage.web.post(each, {"token": token, "choice": "erase"}, status="*"),
        ):
            assert answer.status_int in (404, 405), each
            assert not {stage.acme.mail_id, stage.acme.id, "a1"} & {*re.split(r"[^\w.-]+", answer.text)}
    stage.drain()
    assert (known(stage), lines_of(stage)) == (before, b"")
    # Of another tenant, with a good link: the other's own, who has no such mail.
    choose(stage, link(stage, "a1", stage.globex), "erase")
    stage.drain()
    assert known(stage)[:2] == before[:2]
    assert stage.web.get(link(stage, "a1")).text.count("your address, or") == 1


def test_without_a_fresh_token_nothing_is_chosen(stage: Stage) -> None:
    send_mail(stage)
    path, secret, today = link(stage, "a1"), stage.app.secrets[0], tracker.now_ms() // tracker.DAY_MS

    def token(day: int, key: str = "a1", mail_id: str = stage.acme.mail_id, purpose: str = tracker.CHOICE) -> str:
        return tracker.sign(secret, mail_id, f"{day} {key}", purpose)

    stale = [
        token(today - 2),
        token(today - 400),
        token(today + 1),
        token(today, "a2"),
        token(today, mail_id="x"),
        "",
        "é\0",
    ]
    stale += [token(today, purpose=tracker.PREFERENCES), path.rpartition("/")[2]]
    for each in stale:
        answer = stage.web.post(path, {"token": each, "choice": "erase"}, status=400)
        assert "open for too long" in answer.text
        assert answer.forms[0]["token"].value in (token(today), token(today + 1))
    for body in (b"", b"choice=erase", b"\xff=\xff&&&=", b"choice=all&token=" + token(today).encode()):
        stage.web.post(path, body, status=400)
    stage.web.post(path, b"x" * 300_000, status=413)
    stage.web.get(f"{path}?choice=erase&token={token(today)}")
    stage.drain()
    assert stage.rows("select * from gone") == [] and lines_of(stage) == b""
    stage.web.post(path, {"token": token(today - 1), "choice": "stop"})
    stage.drain()
    assert stage.rows("select * from gone") != []


@pytest.mark.sqlite
def test_a_tenants_own_host_shows_its_page_and_no_other(stage: Stage) -> None:
    stage.change(stage.acme, tracking_host="t.acme.test")
    stage.web.get(link(stage, "a1"), headers={"Host": "t.acme.test"})
    stage.web.get(link(stage, "a1", stage.globex), headers={"Host": "t.acme.test"}, status=404)


@pytest.mark.sqlite
def test_links_of_a_removed_tenant_lead_nowhere_and_leave_nothing(stage: Stage, run: Told) -> None:
    path = link(stage, "a1")
    run("tenant", "remove", stage.acme.id, "--yes")
    stage.refresh()
    stage.web.get(path, status=404)
    assert lines_of(stage) == b""


# -- How the link gets into mail


def instrument(run: Told, monkeypatch: pytest.MonkeyPatch, text: str, *words: str) -> str:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))
    return run("instrument", "Acme", "--local", *words)


MAIL = "To: <{}>\nSubject: x\nContent-Type: text/html\n\n" + '<body><a href="https://acme.com/">x</a>{}</body>\n'


@pytest.mark.sqlite
def test_the_command_places_links_that_work(stage: Stage, run: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    found = re.compile(r'<a href="https?://[^/]+(/\w+/preferences/[^"]+)">([^<]+)</a>')
    for words, said in (((), "Tracking preferences"), (("Nein danke",), "Nein danke")):
        told = instrument(run, monkeypatch, MAIL.format(ANN, ""), "--preferences", *words)
        [(path, text)] = found.findall(told)
        assert text == said and "your address, or" in stage.web.get(path).text
    page = MAIL.partition("\n\n")[2].format('<a href="{{tracking_preferences}}">no</a>')
    told = instrument(run, monkeypatch, page, "--html", "--key-placeholder", "{{ .Id }}", "--campaign", "Spring")
    [(path, text)] = found.findall(told)
    assert path.endswith("?campaign=Spring") and text == "no"
    choose(stage, path.replace("{{ .Id }}", UUID), "stop")
    for key in ("1", "ann@example.com", "a" * 40):
        stage.web.get(path.replace("{{ .Id }}", key), status=404)
    assert "expected" in run("instrument", "Acme", "--local", "--preferences", "a\nb", status=1)


@pytest.mark.sqlite
def test_of_who_is_not_tracked_nothing_is_in_mail_spool_database_or_exports(
    stage: Stage, run: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("untrack", "Acme", ANN)
    before = {path: path.read_bytes() for path in stage.folder.rglob("*.jsonl")}
    message = MAIL.format(ANN, "")
    told = instrument(run, monkeypatch, message, "--preferences")
    assert message in told and "/preferences/" not in told
    path = re.findall(
        r"/\w+/preferences/\S+(?=\")", instrument(run, monkeypatch, MAIL.format(ANN, '{{tracking_preferences}}"'))
    )
    assert "Nothing" not in path and "<li>nothing</li>" in stage.web.get(path[0]).text
    stage.drain()
    assert {path: path.read_bytes() for path in stage.folder.rglob("*.jsonl")} == before
    assert stage.rows("select * from emails") == []
    for table in ("emails", "events", "links", "campaigns"):
        assert ANN.lower() not in run("export", "Acme", table).lower()
