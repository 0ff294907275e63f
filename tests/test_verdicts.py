"""Verdicts: who made a hit, and why we think so."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import NOW, Stage

import tracker
from tracker import ASIDE, CLICK, MACHINE, OPEN, PERSON, UNCONFIRMED

FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:145.0) Gecko/20100101 Firefox/145.0"
SAFARI_IPHONE = (
    "Mozilla/5.0 (iPhone; CPU iPhone OS 18_6 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko)"
    " Version/18.6 Mobile/15E148 Safari/604.1"
)
EDGE = (
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko)"
    " Chrome/141.0.0.0 Safari/537.36 Edg/141.0.0.0"
)
OUTLOOK = "Mozilla/4.0 (compatible; MSIE 7.0; Windows NT 10.0; WOW64; Trident/7.0; Microsoft Outlook 16.0.17928)"
OUTLOOK_OFFICE = "Microsoft Office/16.0 (Windows NT 10.0; Microsoft Outlook 16.0.17928; Pro)"
THUNDERBIRD = "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Thunderbird/140.4.0"
GMAIL_PROXY = "Mozilla/5.0 (X11; Linux) Gecko Firefox/11.0 (via ggpht.com GoogleImageProxy; 2)"
YAHOO_PROXY = "YahooMailProxy; https://help.yahoo.com/kb/yahoo-mail-proxy-SLN28749.html"
APPLE_MPP = "Mozilla/5.0"
GOOGLEBOT = "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)"
HEADLESS = (
    "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) HeadlessChrome/141.0.0.0 Safari/537.36"
)


def one(agent: str = FIREFOX, kind: int = OPEN, method: str = "GET", purpose: str = "", why: str = "") -> tracker.Hit:
    """A hit by this agent, like any other unless told otherwise."""
    return tracker.Hit(
        id="0011223344556677",
        at=NOW,
        type=kind,
        method=method,
        mail_id="k3v9x2mp",
        key="e1",
        url="https://acme.com/" if kind == CLICK else None,
        host="track.example.com",
        ip_address="198.51.100.0",
        user_agent=agent,
        purpose=purpose,
        answer="pixel" if kind == OPEN else "302",
        why=why,
    )


def verdict(hit: tracker.Hit) -> tuple[str, str, int]:
    """The verdict of one hit alone: verdict, reason and state."""
    (judged,) = tracker.judge([hit])
    return judged.verdict, judged.reason, judged.state


HUMAN_CLIENT = ("human", "mail-client", PERSON)
HUMAN_BROWSER = ("human", "browser", PERSON)
PROXY = ("proxy", "image-proxy", PERSON)
BOT_WORD = ("bot", "bot-word", MACHINE)
NO_AGENT = ("bot", "no-user-agent", MACHINE)
NO_BROWSER = ("bot", "not-a-browser", MACHINE)

AGENTS = [
    # agent, as an open, as a click
    pytest.param(FIREFOX, HUMAN_BROWSER, HUMAN_BROWSER, id="firefox"),
    pytest.param(EDGE, HUMAN_BROWSER, HUMAN_BROWSER, id="edge"),
    pytest.param(SAFARI_IPHONE, HUMAN_BROWSER, HUMAN_BROWSER, id="safari-on-a-phone"),
    pytest.param(OUTLOOK, HUMAN_CLIENT, HUMAN_CLIENT, id="outlook"),
    pytest.param(OUTLOOK_OFFICE, HUMAN_CLIENT, HUMAN_CLIENT, id="outlook-in-office"),
    pytest.param(THUNDERBIRD, HUMAN_CLIENT, HUMAN_CLIENT, id="thunderbird"),
    pytest.param(f"  {FIREFOX}  ", HUMAN_BROWSER, HUMAN_BROWSER, id="spaces-around"),
    pytest.param(GMAIL_PROXY, PROXY, ("bot", "proxy-click", MACHINE), id="gmail-proxy"),
    pytest.param(YAHOO_PROXY, PROXY, ("bot", "proxy-click", MACHINE), id="yahoo-proxy"),
    pytest.param(APPLE_MPP, ("prefetch", "apple-mpp", UNCONFIRMED), NO_BROWSER, id="apple-mail-privacy-protection"),
    pytest.param("Mozilla/5.0 ", ("prefetch", "apple-mpp", UNCONFIRMED), NO_BROWSER, id="the-same-and-a-space"),
    pytest.param("Mozilla/4.0", NO_BROWSER, NO_BROWSER, id="almost-the-same"),
    pytest.param("", NO_AGENT, NO_AGENT, id="nothing"),
    pytest.param("   ", NO_AGENT, NO_AGENT, id="spaces-only"),
    pytest.param("-", NO_AGENT, NO_AGENT, id="the-hyphen-that-logs-write-for-nothing"),
    pytest.param("curl/8.14.1", BOT_WORD, BOT_WORD, id="curl"),
    pytest.param("Wget/1.25.0", BOT_WORD, BOT_WORD, id="wget"),
    pytest.param("python-requests/2.32.5", BOT_WORD, BOT_WORD, id="python"),
    pytest.param("Go-http-client/2.0", BOT_WORD, BOT_WORD, id="go"),
    pytest.param(GOOGLEBOT, BOT_WORD, BOT_WORD, id="googlebot"),
    pytest.param(GOOGLEBOT.upper(), BOT_WORD, BOT_WORD, id="googlebot-in-capitals"),
    pytest.param("Acme-Link-Scanner/3.1", BOT_WORD, BOT_WORD, id="a-scanner"),
    pytest.param(HEADLESS, BOT_WORD, BOT_WORD, id="a-browser-without-a-screen"),
    pytest.param("Chat-LinkExpanding 2.1 (+https://chat.example/robots)", BOT_WORD, BOT_WORD, id="chat-preview"),
    pytest.param("acme-thing/1.0 build 7 of an unknown program", NO_BROWSER, NO_BROWSER, id="unknown-program"),
    pytest.param("\\xff\\xfe", NO_BROWSER, NO_BROWSER, id="bytes-that-were-not-text"),
    pytest.param("Mozilla/5.0 (short)", NO_BROWSER, NO_BROWSER, id="too-short-for-a-browser"),
    pytest.param("Mozilla" * 73, NO_BROWSER, NO_BROWSER, id="as-long-as-is-kept"),
]


@pytest.mark.parametrize("agent, as_open, as_click", AGENTS)
def test_the_user_agent_alone_decides_about_an_ordinary_hit(
    agent: str, as_open: tuple[str, str, int], as_click: tuple[str, str, int]
) -> None:
    assert verdict(one(agent, OPEN)) == as_open
    assert verdict(one(agent, CLICK)) == as_click


@pytest.mark.parametrize("kind", [OPEN, CLICK])
@pytest.mark.parametrize("agent", [FIREFOX, OUTLOOK, THUNDERBIRD, GMAIL_PROXY, APPLE_MPP, "", "curl/8.14.1"])
def test_head_is_never_a_person(agent: str, kind: int) -> None:
    assert verdict(one(agent, kind, method="HEAD")) == ("bot", "head", MACHINE)
    assert verdict(one(agent, kind, method="HEAD", purpose="prefetch")) == ("bot", "head", MACHINE)


@pytest.mark.parametrize("kind", [OPEN, CLICK])
@pytest.mark.parametrize("agent", [FIREFOX, THUNDERBIRD, SAFARI_IPHONE])
@pytest.mark.parametrize(
    "purpose", ["prefetch", "Prefetch", "prefetch;prerender", "prefetch;anonymous-client-ip", "preview"]
)
def test_a_hit_that_says_it_was_fetched_ahead_is_unconfirmed(agent: str, kind: int, purpose: str) -> None:
    assert verdict(one(agent, kind, purpose=purpose)) == ("prefetch", "prefetch-header", UNCONFIRMED)


@pytest.mark.parametrize("purpose", ["", "navigate", "image", "pre fetch"])
def test_another_purpose_changes_nothing(purpose: str) -> None:
    assert verdict(one(FIREFOX, purpose=purpose)) == HUMAN_BROWSER


@pytest.mark.parametrize("why", ["destination-not-allowed", "destination-blocked", "suspended"])
@pytest.mark.parametrize("agent, expected", [(FIREFOX, "human"), ("curl/8.14.1", "bot")])
def test_a_click_that_met_the_naming_page_is_set_aside_whoever_made_it(why: str, agent: str, expected: str) -> None:
    """The verdict stays, so that one sees whether people met the page; the state takes it out of every number."""
    assert verdict(one(agent, CLICK, why=why)) == (expected, why, ASIDE)
    assert verdict(one(agent, CLICK, method="HEAD", why=why)) == ("bot", why, ASIDE)


@pytest.mark.parametrize("why", ["no such reason", "' or 1=1", "<b>"])
def test_a_reason_that_we_do_not_know_is_ignored(why: str) -> None:
    """The spool may hold lines that another program wrote."""
    assert verdict(one(FIREFOX, CLICK, why=why)) == HUMAN_BROWSER


def test_each_hit_of_an_email_gets_its_verdict_in_order() -> None:
    hits = [one(GMAIL_PROXY), one(FIREFOX, CLICK), one("curl/8.14.1", CLICK), one(APPLE_MPP), one(method="HEAD")]
    assert [judged.verdict for judged in tracker.judge(hits)] == ["proxy", "human", "bot", "prefetch", "bot"]
    assert tracker.judge([]) == []


def test_judging_twice_gives_the_same() -> None:
    hits = [one(agent.values[0], kind) for agent in AGENTS for kind in (OPEN, CLICK)]  # type: ignore[arg-type]
    assert tracker.judge(hits) == tracker.judge(hits)


def test_every_reason_has_a_sentence() -> None:
    for reason, sentence in tracker.REASONS.items():
        assert sentence[0].isupper(), reason
        assert sentence.endswith("."), reason
        assert len(sentence.split()) >= 3, reason


def test_every_reason_that_can_be_given_is_explained_and_every_explained_one_can_be_given() -> None:
    hits = [one(agent.values[0], kind) for agent in AGENTS for kind in (OPEN, CLICK)]  # type: ignore[arg-type]
    hits += [one(method="HEAD"), one(purpose="prefetch")]
    hits += [one(kind=CLICK, why=why) for why in ("destination-not-allowed", "destination-blocked", "suspended")]
    judged = tracker.judge(hits)
    assert {each.reason for each in judged} == set(tracker.REASONS)
    assert {each.verdict for each in judged} == {"human", "proxy", "prefetch", "bot"}
    assert {each.state for each in judged} == {PERSON, UNCONFIRMED, MACHINE, ASIDE}


# -- From the request to the event


@pytest.mark.parametrize(
    "header, value, expected",
    [
        ("Sec-Purpose", "prefetch", "prefetch-header"),
        ("Sec-Purpose", "prefetch;prerender", "prefetch-header"),
        ("Purpose", "prefetch", "prefetch-header"),
        ("X-Purpose", "preview", "prefetch-header"),
        ("X-Moz", "prefetch", "prefetch-header"),
        ("Sec-Purpose", "", "browser"),
        ("Sec-Fetch-Dest", "image", "browser"),
    ],
)
def test_the_headers_of_browsers_that_fetch_ahead_are_heard(
    stage: Stage, header: str, value: str, expected: str
) -> None:
    headers = {"User-Agent": FIREFOX, header: value}
    stage.web.get(f"/{stage.acme.mail_id}/pixel/e1.gif", headers=headers)
    stage.web.get(f"/{stage.acme.mail_id}/click/e1?url=https://acme.com/", headers=headers, status=302)
    stage.drain()
    assert stage.rows("select event_type, reason from events order by event_type") == [
        ("click", expected),
        ("open", expected),
    ]


@pytest.mark.parametrize(
    "method, headers, expected",
    [
        pytest.param("GET", {"User-Agent": FIREFOX}, ("human", "browser"), id="a-browser"),
        pytest.param("HEAD", {"User-Agent": FIREFOX}, ("bot", "head"), id="head"),
        pytest.param("GET", {}, ("bot", "no-user-agent"), id="without-a-user-agent"),
        pytest.param("GET", {"User-Agent": APPLE_MPP}, ("prefetch", "apple-mpp"), id="apple"),
        pytest.param("GET", {"User-Agent": GMAIL_PROXY}, ("proxy", "image-proxy"), id="gmail"),
    ],
)
def test_an_open_is_stored_with_its_verdict_and_reason(
    stage: Stage, method: str, headers: dict[str, str], expected: tuple[str, str]
) -> None:
    send: Callable[..., Any] = getattr(stage.web, method.lower())
    send(f"/{stage.acme.mail_id}/pixel/e1.gif", headers=headers)
    stage.drain()
    assert stage.rows("select method, verdict, reason from events") == [(method, *expected)]


# -- Other people's user agents


def test_nine_of_ten_user_agents_seen_by_others_are_put_on_the_right_side(shared: Path) -> None:
    """Person or not is what the numbers stand on; which program it was exactly is not."""
    with (shared / "useragents.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    wrong = [
        (row["label"], row["name"], row["user_agent"], verdict(one(row["user_agent"])))
        for row in rows
        if (verdict(one(row["user_agent"]))[2] == PERSON) != (row["label"] in ("human", "proxy"))
    ]
    for each in wrong:
        print(*each, sep="\t")
    assert len(rows) > 300
    assert len(wrong) <= len(rows) // 10
