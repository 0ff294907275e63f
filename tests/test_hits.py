"""What everybody reaches: pixels, links and hosts, the line that becomes of a hit, health, and the files of pages."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import webtest
from asking import Page, assert_private, call, database_away, get, register, spooled
from conftest import BASE, CHROME, NOW, Stage, another_database, hit, segment

import tracker

# -- Pixels


def is_transparent_pixel(gif: bytes) -> bool:
    """A whole GIF89a of one pixel, and that pixel transparent (gif89a specification, §18, §20, §23, §27)."""
    size = int.from_bytes(gif[6:8], "little"), int.from_bytes(gif[8:10], "little")
    control = gif[13 + (3 * 2 ** ((gif[10] & 7) + 1) if gif[10] & 0x80 else 0) :]
    is_transparent = control[:3] == b"\x21\xf9\x04" and control[3] & 1 == 1 and control[7:9] == b"\x00\x2c"
    return gif[:6] == b"GIF89a" and size == (1, 1) and is_transparent and gif[-1:] == b"\x3b"


PIXELS = {  # path, Host, and what became of it
    "known": ("/{mail_id}/pixel/e1.gif", "track.example.com", "recorded"),
    "any host": ("/{mail_id}/pixel/e1.gif?cache=123&x=%0d%0a", "other.example", "recorded"),
    "no key": ("/{mail_id}/pixel/.gif", "", "bad key"),
    "dots": ("/{mail_id}/pixel/%2e%2e.gif", "", "bad key"),
    "slash": ("/{mail_id}/pixel/a%2Fb.gif", "", "bad key"),
    "NUL": ("/{mail_id}/pixel/a%00b.gif", "", "bad key"),
    "line break": ("/{mail_id}/pixel/%0d%0aX-Evil:1.gif", "", "bad key"),
    "not UTF-8": ("/{mail_id}/pixel/%FF.gif", "", "bad key"),
    "too long": ("/{mail_id}/pixel/" + "k" * 201 + ".gif", "", "bad key"),
    "unknown tenant": ("/nobody/pixel/e1.gif", "track.example.com", "unknown tenant"),
    "dashboard id": ("/{id}/pixel/e1.gif", "track.example.com", "unknown tenant"),
    "another's host": ("/{mail_id}/pixel/e1.gif", "mail.globex.com", "wrong host"),
    "one's own host": ("/{globex}/pixel/e1.gif", "mail.globex.com", "recorded"),
}


@pytest.mark.parametrize(("path", "host", "note"), PIXELS.values(), ids=PIXELS)
def test_a_pixel_is_always_the_gif_and_says_what_became_of_the_hit(
    stage: Stage, path: str, host: str, note: str
) -> None:
    stage.change(stage.globex, tracking_host="mail.globex.com")
    target = path.format(id=stage.acme.id, mail_id=stage.acme.mail_id, globex=stage.globex.mail_id)
    answer = get(stage, target, HTTP_HOST=host)
    assert is_transparent_pixel(answer.body)
    assert (answer.status, answer["Content-Type"], answer["Content-Length"]) == (200, "image/gif", "43")
    assert answer["Cache-Control"] == "no-store, no-cache, max-age=0, must-revalidate, private"
    assert answer["X-Tracker"] == note
    assert [line["uri"] for line in spooled(stage)] == [target] * (note in ("recorded", "unknown tenant"))


def test_hits_for_unknown_mail_ids_are_recorded_at_most_100_a_second_and_all_answered(stage: Stage) -> None:
    began = time.monotonic()
    for n in range(250):
        assert get(stage, f"/nobody{n}/pixel/e1.gif")["X-Tracker"] == "unknown tenant"
    assert get(stage, "/nobody/click/e1?url=https://acme.com/").status == 404
    seconds = int(time.monotonic()) - int(began) + 1
    assert 100 <= len(spooled(stage)) <= 100 * seconds
    known = len(spooled(stage))
    for n in range(120):
        assert stage.pixel(f"e{n}").headers["X-Tracker"] == "recorded"  # those of tenants are not held up by a flood
    assert len(spooled(stage)) == known + 120


def test_a_hit_with_the_dashboard_id_is_answered_not_counted_and_warned_of(stage: Stage) -> None:
    old, warning = stage.acme.id, "id stands in mail"
    assert warning not in get(stage, f"/{old}/dashboard").text
    get(stage, f"/{old}/pixel/e1.gif")
    assert get(stage, f"/{old}/click/e1?url=https://acme.com/").status == 404
    stage.drain()
    assert stage.rows("select * from emails") == []
    assert stage.rows("select reason, hits from dropped where tenant = ?", stage.acme.number) == [("dashboard-id", 2)]
    page = Page(get(stage, f"/{old}/dashboard").text)
    (notice,) = [text for text in page.notices if warning in text]
    assert f"tenant rotate {stage.acme.mail_id}" in notice
    assert warning not in get(stage, f"/{stage.globex.id}/dashboard").text


@pytest.mark.parametrize("fresh", [False, True], ids=["running", "started without it"])
def test_a_hit_opens_no_database(stage: Stage, fresh: bool) -> None:
    mail_id, secret = stage.acme.mail_id, stage.app.secrets[0]
    with database_away(stage):
        app = tracker.App(stage.settings) if fresh else stage.app
        now = Stage(stage.settings, app, stage.acme, stage.globex, webtest.TestApp(tracker.wsgi(app)))
        assert now.pixel("e1").headers["X-Tracker"] == "recorded"
        for link in (
            tracker.click_path(secret, mail_id, "e1", "https://anywhere.example/"),
            f"/{mail_id}/click/e1?url=https%3A%2F%2Facme.com%2F",
        ):
            answer = get(now, link, headers={"User-Agent": CHROME})
            assert (answer.status, answer["Cache-Control"], answer["X-Robots-Tag"]) == (302, "no-store", "noindex")
        app.spool.close()
    assert [line["answer"] for line in spooled(stage)] == ["pixel", "302", "302"]
    assert stage.drain().hits == 3
    assert stage.check() == []


# -- Tracking hosts


def test_links_of_a_tenant_work_on_its_tracking_host_and_on_the_servers_own(stage: Stage) -> None:
    stage.change(stage.acme, tracking_host="mail.acme.com")
    stage.change(stage.globex, tracking_host="mail.globex.com")
    mail_id = stage.acme.mail_id
    signed = tracker.click_path(stage.app.secrets[0], mail_id, "e1", "https://anywhere.example/")
    plain = f"/{mail_id}/click/e1?url=https%3A%2F%2Fwww.acme.com%2F"
    for host in ("mail.acme.com", "Mail.Acme.com:8443", "track.example.com", "127.0.0.1:3000"):
        assert get(stage, signed, HTTP_HOST=host)["Location"] == "https://anywhere.example/"
    for path in (signed, plain):
        assert get(stage, path, HTTP_HOST="mail.globex.com").status == 404
        assert get(stage, path, HTTP_HOST="MAIL.globex.com.:80").status == 404
    assert len(spooled(stage)) == 4  # a click on another tenant's host is not counted


def test_the_drain_counts_no_hit_on_another_tenants_host(stage: Stage) -> None:
    # nginx answers pixels by itself and writes such lines without asking whose host it is.
    stage.change(stage.globex, tracking_host="mail.globex.com")
    segment(stage, hit(stage, "e1", host="Mail.Globex.com:443"), hit(stage, "e2", host="mail.acme.com"))
    stage.drain()
    assert stage.rows("select key from emails") == [("e2",)]
    assert stage.rows("select reason, hits from dropped") == [("wrong-host", 1)]


# -- The line in the spool: others read it, and nginx writes it


def test_a_hit_is_one_line_of_json_with_these_fields(stage: Stage) -> None:
    target = f"/{stage.acme.mail_id}/pix%65l/e1.gif?a=%41&b=c+d%00"
    before = time.time()
    get(
        stage, target, {"User-Agent": CHROME, "Sec-Purpose": "prefetch", "Sec-GPC": "?0"}, HTTP_HOST="Track.Example.com"
    )
    (path,) = stage.spool.glob("*.jsonl")
    assert path.read_bytes().count(b"\n") == 1
    (line,) = spooled(stage)
    assert re.fullmatch("[0-9a-f]{16,}", line.pop("id"))
    assert before - 0.001 <= line.pop("t") <= time.time() + 0.001
    asked = {"method": "GET", "host": "track.example.com", "uri": target}  # as it came, not as it was understood
    assert line == {**asked, "ip": "192.0.2.0", "ua": CHROME, "answer": "pixel", "purpose": "prefetch", "gpc": "?0"}
    get(stage, f"/{stage.acme.mail_id}/pixel/e1.gif")  # what says nothing is left out
    assert list(spooled(stage)[1]) == ["id", "t", "method", "host", "uri", "ip", "ua", "answer"]


ASKING = ({"Sec-GPC": "1"}, {"DNT": "1"}, {"DNT": "1", "Sec-GPC": "0"}, {"DNT": "0", "Sec-GPC": "1"})


@pytest.mark.parametrize("headers", ASKING, ids=str)
def test_who_asks_not_to_be_tracked_is_counted_without_email_link_program_or_address(
    stage: Stage, headers: dict[str, str]
) -> None:
    register(stage, stage.acme, tracker.Registration("mail-of-ann", "Sale", "ann@example.org", "Spring"))
    stage.pixel("mail-of-ann")
    stage.drain()
    before = stage.web.get(f"/{stage.acme.id}/stats.json").json
    said = {"User-Agent": "Her own program", "Sec-Purpose": "prefetch", **headers}
    mail_id, link = stage.acme.mail_id, "https://acme.com/for-ann"
    signed = tracker.click_path(stage.app.secrets[0], mail_id, "mail-of-ann", link)
    assert get(stage, f"/{mail_id}/pixel/mail-of-ann.gif?campaign=Spring", said)["X-Tracker"] == "recorded"
    assert get(stage, f"/{mail_id}/click/mail-of-ann?url={link}", said)["Location"] == link
    assert get(stage, signed, said)["Location"] == link
    lines = b"".join(path.read_bytes() for path in stage.spool.glob("*.jsonl"))
    assert lines.count(b"\n") == 3
    for word in (b"mail-of", b"for-ann", tracker.encode_target(link).encode(), b"program", b"192.0.2", b"Spring"):
        assert word not in lines
    stage.drain()
    assert stage.rows("select key, agent from event_details") == [("mail-of-ann", CHROME)]  # what came before stays
    assert stage.rows("select count(*) from agents where agent like 'Her%'") == [(0,)]
    assert stage.rows("select key from emails") == [("mail-of-ann",)]
    after = stage.web.get(f"/{stage.acme.id}/stats.json").json
    assert after["dropped"] == {"untracked-click": 2, "untracked-open": 1}
    assert [after[name] for name in ("sent", "reasons")] == [before[name] for name in ("sent", "reasons")]
    page = stage.web.get(f"/{stage.acme.id}/dashboard")
    assert "In this range 1 open and 2 clicks asked not to be tracked" in page.text
    assert stage.check() == []


@pytest.mark.parametrize(
    "headers", [{"Sec-GPC": "0"}, {"DNT": "0"}, {"DNT": "unspecified"}, {"Sec-GPC": "11"}], ids=str
)
def test_a_header_that_does_not_ask_changes_nothing(stage: Stage, headers: dict[str, str]) -> None:
    get(stage, f"/{stage.acme.mail_id}/pixel/e1.gif", {"User-Agent": CHROME, **headers})
    stage.drain()
    assert stage.rows("select key, agent from event_details") == [("e1", CHROME)]
    assert "asked not to be tracked" not in stage.web.get(f"/{stage.acme.id}/dashboard").text


def test_what_nginx_logged_of_who_asks_is_counted_in_the_same_way(stage: Stage) -> None:
    segment(
        stage, hit(stage, "e1", gpc="1", dnt=""), hit(stage, "e1", gpc="", dnt="1"), hit(stage, "e2", gpc="", dnt="")
    )
    stage.drain()
    assert stage.rows("select key from emails") == [("e2",)]
    assert stage.rows("select reason, hits from dropped") == [("untracked-open", 2)]


def test_a_tenant_may_ignore_that_hits_ask(stage: Stage) -> None:
    other = f"/{stage.globex.mail_id}/pixel/e1.gif"
    stage.change(stage.acme, ignore_gpc=True)
    for path in (f"/{stage.acme.mail_id}/pixel/e1.gif", other):
        get(stage, path, {"User-Agent": CHROME, "DNT": "1"})
    segment(stage, hit(stage, "e2", gpc="1"))
    get(
        stage, f"/{stage.acme.mail_id}/pixel/{tracker.UNTRACKED_KEY}.gif", {"Sec-GPC": "1"}
    )  # as before it ignored them
    stage.drain()
    assert stage.rows("select tenant, key from emails order by key") == [(1, "e1"), (1, "e2")]
    assert stage.rows("select tenant, reason, hits from dropped") == [
        (1, "untracked-open", 1),
        (2, "untracked-open", 1),
    ]
    stage.change(stage.acme, ignore_gpc=False)
    get(stage, f"/{stage.acme.mail_id}/pixel/e3.gif", {"DNT": "1"})
    stage.drain()
    assert stage.rows("select count(*) from emails") == [(2,)]


def test_the_line_says_how_the_hit_was_answered_and_why(stage: Stage) -> None:
    def ask(host: str, method: str = "GET") -> None:
        call(stage, method, f"/{stage.acme.mail_id}/click/e1?url=https%3A%2F%2F{host}%2F")

    ask("acme.com", "HEAD")
    ask("elsewhere.example")
    stage.change(stage.acme, block=["bad.acme.com"])
    ask("bad.acme.com")
    stage.change(stage.acme, suspended=True)
    ask("acme.com")
    named = [("named", why) for why in ("destination-not-allowed", "destination-blocked", "suspended")]
    assert [(line["answer"], line.get("why")) for line in spooled(stage)] == [("302", None), *named]
    assert spooled(stage)[0]["method"] == "HEAD"


def test_the_uri_is_put_together_where_the_server_does_not_give_it(stage: Stage) -> None:
    path = f"/{stage.acme.mail_id}/pixel/a+b@c.gif"
    get(stage, path + "?x=%2F", RAW_URI="")
    get(stage, path + "?x=%2F", RAW_URI="", REQUEST_URI="/" + path.lstrip("/") + "?y=1")
    assert [line["uri"] for line in spooled(stage)] == [path + "?x=%2F", path + "?y=1"]
    stage.drain()
    assert stage.rows("select key from emails") == [("a+b@c",)]


AGENTS = {  # as they are sent, and as they are kept
    "UTF-8": (b"Caf\xc3\xa9 \xe2\x82\xac", "Café €"),
    "latin-1": (b"Caf\xe9", "Caf\\xe9"),
    "bytes": (b"\xff\xfe\x80", "\\xff\\xfe\\x80"),
    "JSON's own characters": (b'quo"te\\ and \t tab', 'quo"te\\ and \t tab'),
    "very long": (b"x" * 100_000, "x" * 512),
}


@pytest.mark.parametrize(("sent", "kept"), AGENTS.values(), ids=AGENTS)
def test_a_user_agent_of_any_bytes_is_kept_as_readable_text(stage: Stage, sent: bytes, kept: str) -> None:
    agent = sent.decode("latin-1")
    assert get(stage, f"/{stage.acme.mail_id}/pixel/e1.gif", {"User-Agent": agent})["X-Tracker"] == "recorded"
    assert spooled(stage)[0]["ua"] == kept
    assert stage.drain().rejected == 0
    assert stage.rows("select agent from event_details") == [(kept,)]


def test_a_line_has_at_most_16_kilobytes_whatever_was_sent(stage: Stage) -> None:
    headers = dict.fromkeys(("User-Agent", "Sec-Purpose", "Sec-GPC"), '"' * 8000)
    for junk in ("x" * 8000, '"' * 8000, "\x01" * 8000, "\xff" * 8000):
        answer = get(stage, f"/{stage.acme.mail_id}/pixel/e1.gif?{junk}", headers, HTTP_HOST="h" * 8000)
        assert answer.status == 200
        assert answer["X-Tracker"] in ("recorded", "too long")
    for path in stage.spool.glob("*.jsonl"):
        assert all(len(line) <= 16_384 for line in path.read_bytes().splitlines(keepends=True))
    assert len(spooled(stage)) >= 1
    assert stage.drain().rejected == 0


# -- Health, assets, and the rest of what anybody may ask for


def test_health_is_ok_when_all_is_well(stage: Stage) -> None:
    stage.pixel("e1")
    stage.health()
    for target in ("/health", "/health?strict"):
        answer = get(stage, target)
        assert answer.status == 200
        well = {
            "status": "ok",
            "version": tracker.__version__,
            "rejected_lines": 0,
            "limits": [],
            "notes": [],
            "why": [],
        }
        assert answer.json == {**well, "waiting_hits": 0}


HIDDEN = "X-Forwarded-For is not believed"


def test_a_proxy_that_is_not_believed_is_told_of_once_in_the_log_and_on_the_dashboard_and_in_health(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "Readers are hidden" not in get(stage, f"/{stage.acme.id}/dashboard").text
    for n in range(5):
        said = {"X-Forwarded-For": "203.0.113.7"} if n % 2 else {}
        assert get(stage, f"/{stage.acme.mail_id}/pixel/e{n}.gif", said, REMOTE_ADDR="172.17.0.1").status == 200
    log = capsys.readouterr().out
    assert log.count(HIDDEN) == 1 and "172.17" not in log and "203.0.113" not in log
    said_of_health = stage.health()
    assert (said_of_health["status"], len(said_of_health["notes"])) == ("ok", 1)
    assert HIDDEN in said_of_health["notes"][0]
    assert "Readers are hidden" in get(stage, f"/{stage.acme.id}/dashboard").text


def test_nginx_tells_of_proxies_too(stage: Stage) -> None:
    get(
        stage,
        f"/{stage.acme.mail_id}/pixel/e1.gif",
        {"X-Forwarded-For": "172.17.0.1", "X-Not-Believed": "1"},
        REMOTE_ADDR="",
    )
    assert HIDDEN in stage.health()["notes"][0]


@pytest.mark.parametrize(
    "peer, said", [("127.0.0.1", "203.0.113.7"), ("", "203.0.113.7, 127.0.0.1"), ("203.0.113.9", "")]
)
def test_where_readers_are_not_hidden_nothing_is_said(stage: Stage, peer: str, said: str) -> None:
    get(stage, f"/{stage.acme.mail_id}/pixel/e1.gif", {"X-Forwarded-For": said} if said else {}, REMOTE_ADDR=peer)
    assert stage.health()["notes"] == []


def test_a_stranger_among_many_readers_who_says_that_he_is_a_proxy_is_not_told_of(stage: Stage) -> None:
    for n in range(30):
        said = {"X-Forwarded-For": "203.0.113.7"} if n in (15, 25) else {}
        get(stage, f"/{stage.acme.mail_id}/pixel/e{n}.gif", said, REMOTE_ADDR="203.0.113.9")
    assert stage.health()["notes"] == []
    for n in range(5):  # and a proxy, who comes again and again, is
        get(
            stage, f"/{stage.acme.mail_id}/pixel/f{n}.gif", {"X-Forwarded-For": "203.0.113.7"}, REMOTE_ADDR="172.17.0.1"
        )
    assert len(stage.health()["notes"]) == 1


def test_what_is_no_longer_so_is_no_longer_said(stage: Stage) -> None:
    get(stage, f"/{stage.acme.mail_id}/pixel/e1.gif", {"X-Forwarded-For": "203.0.113.7"}, REMOTE_ADDR="172.17.0.1")
    path = stage.folder / "hidden"
    os.utime(path, (0, 0))
    assert stage.health()["notes"] == []
    get(stage, f"/{stage.acme.mail_id}/pixel/e1.gif", {"X-Forwarded-For": "203.0.113.7"}, REMOTE_ADDR="172.17.0.1")
    assert len(stage.health()["notes"]) == 1


def degraded(stage: Stage) -> list[str]:
    """The reasons of /health, which is degraded, and says so to ?strict by its status; leaks nothing."""
    stage.health()
    answer, strict = get(stage, "/health"), get(stage, "/health?strict")
    assert (answer.status, strict.status) == (200, 503)
    assert answer.body == strict.body
    assert answer.json["status"] == "degraded"
    secrets = [str(stage.folder), "/tracking.db"]
    secrets += [word for tenant in (stage.acme, stage.globex) for word in (tenant.id, tenant.mail_id, tenant.name)]
    assert not [word for word in secrets if word in answer.text]
    reasons: list[str] = answer.json["why"]
    return reasons


IN_PLACE = {  # what stands in the place of the database, and what is said of it
    "nothing": (str, "no database at"),
    "another": (
        another_database,
        "belong|replaced",
    ),
    "no database": (lambda path: path.write_bytes(b"not a database " * 1000), "is not a database|replaced"),
}


@pytest.mark.parametrize(("put", "told"), IN_PLACE.values(), ids=IN_PLACE)
def test_health_says_what_is_wrong_with_the_database(stage: Stage, put: Callable[[Path], object], told: str) -> None:
    path = stage.folder / "tracking.db"
    for _ in range(2):  # before it was ever opened, and under an open connection
        with database_away(stage):
            put(path)
            (why,) = degraded(stage)
            assert re.match(f"drain: .*({told})", why)
            path.unlink(missing_ok=True)
        assert stage.health()["status"] == "ok"


def test_health_and_the_dashboard_say_which_limit_was_met_but_that_is_no_fault_of_ours(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tracker.A_DAY, "agent", 1)
    monkeypatch.setitem(tracker.A_DAY, "unregistered", 1)
    for agent in ("Mozilla/5.0 one", "Mozilla/5.0 two", "Mozilla/5.0 three"):
        stage.pixel("e1", agent=agent)
    stage.pixel("nobody")
    stage.drain()
    said = stage.health()
    assert (said["status"], said["limits"]) == ("ok", ["agent-limit", "unregistered-limit"])
    assert get(stage, "/health?strict").status == 200  # or a stranger could make a platform restart us
    text = get(stage, f"/{stage.acme.id}/dashboard").text
    assert "In this range 2 requests are counted without the name of their program" in text
    assert "In this range 1 request for emails that nobody registered" in text
    assert "In this range" not in get(stage, f"/{stage.globex.id}/dashboard").text
    dropped = {"agent-limit": 2, "unregistered-limit": 1}
    assert get(stage, f"/{stage.acme.id}/stats.json").json["dropped"] == dropped


def test_health_counts_lines_that_could_not_be_read(stage: Stage) -> None:
    segment(stage, b"not a hit\n", hit(stage, "e1"), b'{"t": 1}\n')
    stage.drain()
    assert degraded(stage) == ["spool: 2 lines could not be read and were put into spool/rejected"]
    assert stage.health()["rejected_lines"] == 2


def test_while_the_spool_cannot_be_written_readers_get_answers_hits_are_printed_and_health_says_so(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    away = stage.spool.rename(stage.folder / "away")
    assert stage.pixel("e1").headers["X-Tracker"] == "unspooled"
    assert get(stage, f"/{stage.acme.mail_id}/click/e1?url=https%3A%2F%2Facme.com%2F").status == 302
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("unspooled ")]
    assert [json.loads(line.removeprefix("unspooled "))["answer"] for line in lines] == ["pixel", "302"]
    assert [why.partition(":")[0] for why in degraded(stage)] == ["drain", "spool"]
    assert "ingest" in degraded(stage)[1]
    away.rename(stage.spool)
    stage.app.spool._retry_at = 0.0  # a second has passed
    assert stage.health()["status"] == "ok"  # also where no hit comes any more
    assert stage.pixel("e2").headers["X-Tracker"] == "recorded"


def test_the_stylesheet_has_the_hash_of_its_content_in_its_name_and_is_kept_for_ever(stage: Stage) -> None:
    (path,) = [link for link in Page(get(stage, "/").text).links if link.startswith("/assets/")]
    answer = get(stage, path)
    assert hashlib.sha256(answer.body).hexdigest()[:16] in path
    assert answer["Content-Type"] == "text/css; charset=utf-8"
    assert answer["Cache-Control"] == "public, max-age=31536000, immutable"
    assert answer["X-Content-Type-Options"] == "nosniff"
    assert not re.search(r"url\(|@import|//", re.sub(r"/\*.*?\*/", "", answer.text, flags=re.DOTALL))


def test_the_home_page_says_in_one_sentence_what_this_host_is_and_whom_to_ask(stage: Stage) -> None:
    answer = get(stage, "/")
    assert_private(answer)
    assert get(stage, "/robots.txt").text.split("\n")[:2] == ["User-agent: *", "Disallow: /"]
    icon = get(stage, "/favicon.ico")
    assert icon["Content-Type"] == "image/svg+xml"
    assert icon.text.lstrip().startswith("<svg") and "<script" not in icon.text
    page = Page(answer.text)
    assert "This host serves images and links in mail" in page.text
    assert "ask its sender" in page.text
    assert "Acme" not in page.text


# -- Tenants that workers do not know yet, or can't read about


def test_a_signed_link_of_a_tenant_that_workers_do_not_know_yet_redirects(stage: Stage) -> None:
    """tenants.json is looked at once a second; the signature proves that this server made the link."""
    stage.pixel("k1")
    with tracker.changing_tenants(stage.database) as connection:
        young = tracker.add_tenant(connection, "Young", NOW)
    path = tracker.click_path(stage.app.secrets[0], young.mail_id, "k1", "https://acme.com/")
    stage.app.directory._look_at = float("inf")
    assert stage.web.get(path, headers={"User-Agent": CHROME}).status_int == 302
    stage.drain()
    assert stage.rows("select verdict, reason from event_details where url is not null") == [("human", "browser")]


def test_an_app_that_is_older_than_its_database_learns_the_secret(tmp_path: Path) -> None:
    environ = {"DATABASE_URL": f"sqlite:{tmp_path}/data/tracking.db", "BASE_URL": BASE}
    settings = tracker.load_settings(environ, os.devnull)
    app = tracker.App(settings)
    web = webtest.TestApp(tracker.wsgi(app))
    assert web.get("/health").json["status"] == "degraded"
    database = tracker.open_database(settings, make=True)
    with tracker.changing_tenants(database) as connection:
        acme = tracker.add_tenant(connection, "Acme", NOW)
    database.close()
    app.directory._look_at = 0.0
    made = web.post_json(f"/{acme.id}/emails", {"links": ["https://acme.com/"]}).json
    assert web.get(made["links"][0]["click_url"].removeprefix(BASE)).location == "https://acme.com/"
    app.close()


MALFORMED = ("[]", "null", '{"tenants": []}', '{"tenants": {"abc": {}}, "retired": []}', "{", "[" * 100_000)


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: text[:50])
def test_a_malformed_directory_of_tenants_stops_no_pixel_and_is_reported(text: str, stage: Stage) -> None:
    assert stage.pixel("k1").headers["X-Tracker"] == "recorded"
    (stage.folder / "tenants.json").write_text(text)
    stage.refresh()
    assert stage.pixel("k2").headers["X-Tracker"] == "recorded"
    stage.refresh()
    health = stage.web.get("/health").json
    assert health["status"] == "degraded" and any("tenants.json" in why for why in health["why"])
