"""Verdicts: who made a hit, and why we think so. Each signal with what it must catch and, beside it, what it must not."""

from __future__ import annotations

import csv
import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import NOW, ROOT, Stage

import tracker
from tracker import ASIDE, CERTAIN, CLICK, MACHINE, NO_CONTEXT, OPEN, PERSON, PROBABLE, UNCONFIRMED, Context, Hit

WEBKIT = "AppleWebKit/537.36 (KHTML, like Gecko)"
IOS = "Mozilla/5.0 (iPhone; CPU iPhone OS 18_6 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko)"
WINDOWS, MAC, LINUX = "Windows NT 10.0; Win64; x64", "Macintosh; Intel Mac OS X 10_15_7", "X11; Linux x86_64"


def chrome(version: int, system: str = WINDOWS, more: str = "") -> str:
    """Chrome of some version, and what is built on it."""
    return f"Mozilla/5.0 ({system}) {WEBKIT} Chrome/{version}.0.0.0 Safari/537.36{more}"


def android(model: str, more: str = "", version: int = 141) -> str:
    """A browser on a phone."""
    return f"Mozilla/5.0 (Linux; Android 14; {model}) {WEBKIT} Chrome/{version}.0.0.0 Mobile Safari/537.36{more}"


CHROME, EDGE = chrome(141), chrome(141, more=" Edg/141.0.0.0")
TWO_YEARS_OLD, OLD = chrome(125), chrome(80)  # at the time of these tests, in November 2026: more than 2, more than 4
FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:145.0) Gecko/20100101 Firefox/145.0"
IPHONE = f"{IOS} Version/18.6 Mobile/15E148 Safari/604.1"
PHONE = android("SM-S931B")
OUTLOOK = "Mozilla/4.0 (compatible; MSIE 7.0; Windows NT 10.0; WOW64; Trident/7.0; Microsoft Outlook 16.0.18827)"
THUNDERBIRD = "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Thunderbird/140.4.0"
GMAIL_PROXY = "Mozilla/5.0 (X11; Linux) Gecko Firefox/11.0 (via ggpht.com GoogleImageProxy; 2)"
YAHOO_PROXY = "YahooMailProxy; https://help.yahoo.com/kb/of-another-number.html"
APPLE_MPP = "Mozilla/5.0"
GMAIL_PREFETCH = chrome(42, more=" Edge/12.246 Mozilla/5.0")
GMAIL_SAMPLING = chrome(42, more=" Edge/12.246 Gmail-content-sampling")
BARRACUDA = "Barracuda Sentinel (EE)"
GOOGLEBOT = "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)"
CURL = "curl/8.14.1"

HOME, OFFICE, CLOUD = "198.51.100.7", "203.0.113.9", "192.0.2.140"  # none is cut
OFFICES_NETWORK = "203.0.113.0"  # stored truncated
EXCHANGE = "40.107.218.12"  # of Exchange Online Protection, as the whole /24 is
HIDDEN = tracker.HIDDEN_TARGET
_ids = itertools.count(1)


def hit(seconds: float = 0, agent: str = CHROME, kind: int = OPEN, address: str = HOME, **more: Any) -> Hit:
    """A hit some seconds after the beginning of these tests, ordinary unless told otherwise."""
    fields: dict[str, Any] = {
        "id": f"{next(_ids):024x}",
        "at": NOW + round(seconds * 1000),
        "type": kind,
        "method": "GET",
        "mail_id": "k3v9x2mp",
        "key": "e1",
        "url": None,
        "host": "track.example.com",
        "address": address,
        "agent": agent,
        "purpose": "",
        "answer": "pixel" if kind == OPEN else "302",
        "why": "",
    }
    return Hit(**{**fields, **more})


def click(seconds: float = 0, link: int | str = 1, agent: str = CHROME, address: str = HOME, **more: Any) -> Hit:
    """A click on one of the mail's links, or on the hidden one."""
    url = link if isinstance(link, str) else f"https://acme.com/{link}"
    return hit(seconds, agent, CLICK, address, url=url, **more)


def clicks(*at: float, agent: str = CHROME, address: str = HOME) -> list[Hit]:
    """Clicks at these seconds, each on another link."""
    return [click(seconds, n, agent, address) for n, seconds in enumerate(at, 1)]


def verdict(one: Hit, context: Context = NO_CONTEXT) -> tuple[str, str, int]:
    """The verdict of one hit alone: verdict, reason and state."""
    (judged,) = tracker.judge([one], context)
    return judged.verdict, judged.reason, judged.state


def reasons(hits: Sequence[Hit], context: Context = NO_CONTEXT) -> list[str]:
    """The reasons of hits that are judged together."""
    return [judged.reason for judged in tracker.judge(hits, context)]


def delivered(before: float) -> Context:
    """That the mail was delivered so many seconds before the beginning, as its sender said."""
    return Context(NOW - round(before * 1000), said=True)


def registered(before: float) -> Context:
    """That it was registered so many seconds before, and nobody said when it was sent."""
    return Context(NOW - round(before * 1000), said=False)


# -- One hit: what its user agent says

HUMAN_CLIENT = ("human", "mail-client", PERSON)
HUMAN_BROWSER = ("human", "browser", PERSON)
PROXY, PROXY_CLICK = ("proxy", "image-proxy", PERSON), ("bot", "proxy-click", MACHINE)
BOT_WORD, SCANNER_WORD = ("bot", "bot-word", MACHINE), ("scanner", "scanner-word", MACHINE)
NO_AGENT, NO_BROWSER = ("bot", "no-user-agent", MACHINE), ("bot", "not-a-browser", MACHINE)
SAMPLING = ("scanner", "gmail-sampling", MACHINE)

PEOPLE = [
    # Browsers
    pytest.param(CHROME, HUMAN_BROWSER, id="chrome"),
    pytest.param(EDGE, HUMAN_BROWSER, id="edge"),
    pytest.param(FIREFOX, HUMAN_BROWSER, id="firefox"),
    pytest.param(f"  {FIREFOX}  ", HUMAN_BROWSER, id="spaces-around"),
    pytest.param(FIREFOX.upper(), HUMAN_BROWSER, id="capitals"),
    pytest.param(IPHONE, HUMAN_BROWSER, id="safari-on-a-phone"),
    pytest.param(chrome(141, more=" Avast/141.0.7"), HUMAN_BROWSER, id="avast-secure-browser"),
    pytest.param(chrome(141, more=" AVG/141.0.7"), HUMAN_BROWSER, id="avg-secure-browser"),
    pytest.param(chrome(141, more=" Norton/141.0.7"), HUMAN_BROWSER, id="norton-private-browser"),
    pytest.param(chrome(141, more=" Avira/141.0.7"), HUMAN_BROWSER, id="avira-secure-browser"),
    pytest.param(chrome(141, more=" CCleaner/141.0.7"), HUMAN_BROWSER, id="ccleaner-browser"),
    pytest.param(FIREFOX + " Cyberfox/52.9.1", HUMAN_BROWSER, id="cyberfox"),
    pytest.param(f"Mozilla/5.0 ({LINUX}; rv:6.7) Goanna/20251001 PaleMoon/33.9", HUMAN_BROWSER, id="palemoon"),
    pytest.param(chrome(109, "Windows NT 6.1; Win64; x64"), HUMAN_BROWSER, id="the-last-chrome-for-windows-7"),
    pytest.param("Opera/9.80 (J2ME/MIDP; Opera Mini/8.1; U; en) Presto/2.12", HUMAN_BROWSER, id="opera-mini"),
    pytest.param("Mozilla/4.0 (compatible; MSIE 8.0; Windows NT 6.1)", HUMAN_BROWSER, id="internet-explorer"),
    pytest.param("Lynx/2.9.2 libwww-FM/2.14", HUMAN_BROWSER, id="lynx"),
    pytest.param("w3m/0.5.4", HUMAN_BROWSER, id="w3m"),
    pytest.param("Links (2.31; Linux; text)", HUMAN_BROWSER, id="links"),
    # Phones whose names are words of machines, and browsers inside other programs
    pytest.param(android("CUBOT X90"), HUMAN_BROWSER, id="cubot"),
    pytest.param(android("CUBOT_NOTE_40"), HUMAN_BROWSER, id="cubot-with-an-underscore"),
    pytest.param(android("SM-A556B; wv", " Instagram 410.1.0 Android"), HUMAN_BROWSER, id="in-instagram"),
    pytest.param(android("SM-A556B; wv", " [FB_IAB/FB4A;FBAV/540.0.0;]"), HUMAN_BROWSER, id="in-facebook-on-android"),
    pytest.param(f"{IOS} Mobile/15E148 [FBAN/FBIOS;FBAV/540.0.0;]", HUMAN_BROWSER, id="in-facebook-on-ios"),
    pytest.param(f"{IOS} Mobile/15E148 [LinkedInApp]/9.31", HUMAN_BROWSER, id="in-linkedin"),
    pytest.param(f"{IOS} Mobile/15E148 Snapchat/13.6", HUMAN_BROWSER, id="in-snapchat"),
    pytest.param(f"{IOS} GSA/390.0 Mobile/15E148 Safari/604.1", HUMAN_BROWSER, id="in-the-google-app"),
    pytest.param(android("M2101K6G; wv", version=66), HUMAN_BROWSER, id="an-old-webview-on-a-phone"),
    pytest.param(f"{IOS} Mobile/15E148", HUMAN_BROWSER, id="a-webview-of-an-iphone"),
    pytest.param(
        chrome(132, more=" Slack_SSB/4.45").replace("Safari", "Electron/35 Safari"), HUMAN_BROWSER, id="slack"
    ),
    # Mail programs
    pytest.param(OUTLOOK, HUMAN_CLIENT, id="outlook-for-windows"),
    pytest.param(
        "Microsoft Office/16.0 (Windows NT 10.0; Microsoft Outlook 16.0.18827; Pro)", HUMAN_CLIENT, id="office"
    ),
    pytest.param("MacOutlook/16.101 (Intelx64 Mac OS X Version 15.6)", HUMAN_CLIENT, id="outlook-for-mac"),
    pytest.param("Microsoft Outlook/16.101 CFNetwork/1568 Darwin/24.6", HUMAN_CLIENT, id="outlook-for-mac-of-late"),
    pytest.param("Outlook-iOS/729.5", HUMAN_CLIENT, id="outlook-for-ios"),
    pytest.param("Outlook-Android/2.1", HUMAN_CLIENT, id="outlook-for-android"),
    pytest.param(THUNDERBIRD, HUMAN_CLIENT, id="thunderbird"),
    pytest.param("Mail/3826.700 CFNetwork/1568 Darwin/24.6", HUMAN_CLIENT, id="apple-mail"),
    pytest.param("Airmail 5.7 rv:712 (Macintosh; Mac OS X 15.6; de_DE)", HUMAN_CLIENT, id="airmail"),
    pytest.param("CamelHttpStream/1.0 Evolution/3.56", HUMAN_CLIENT, id="evolution"),
    pytest.param("Acme Mail/3.1 (Windows)", HUMAN_CLIENT, id="a-mail-program-that-no-list-has"),
]
MACHINES = [
    # agent, as an open, as a click
    pytest.param("", NO_AGENT, NO_AGENT, id="nothing"),
    pytest.param("   ", NO_AGENT, NO_AGENT, id="spaces-only"),
    pytest.param("-", NO_AGENT, NO_AGENT, id="the-hyphen-that-logs-write-for-nothing"),
    pytest.param(APPLE_MPP, ("prefetch", "apple-mpp", UNCONFIRMED), NO_BROWSER, id="apple-mail-privacy-protection"),
    pytest.param("Mozilla/5.0 ", ("prefetch", "apple-mpp", UNCONFIRMED), NO_BROWSER, id="the-same-and-a-space"),
    pytest.param("Mozilla/4.0", NO_BROWSER, NO_BROWSER, id="almost-the-same"),
    pytest.param(GMAIL_PREFETCH, ("prefetch", "gmail-prefetch", UNCONFIRMED), SAMPLING, id="gmail-prefetch"),
    pytest.param(GMAIL_SAMPLING, SAMPLING, SAMPLING, id="gmail-sampling"),
    pytest.param(
        chrome(42, more=" Edge/12.246"), HUMAN_BROWSER, ("unconfirmed", "some-signs", UNCONFIRMED), id="edge-12"
    ),
    pytest.param(GMAIL_PROXY, PROXY, PROXY_CLICK, id="gmail-proxy"),
    pytest.param("(via ggpht.com)", PROXY, PROXY_CLICK, id="gmail-proxy-of-old"),
    pytest.param(YAHOO_PROXY, PROXY, PROXY_CLICK, id="yahoo-proxy"),
    pytest.param("Mozilla/5.0 AcmeEmailProxy/3", PROXY, PROXY_CLICK, id="a-proxy-that-no-list-has"),
    pytest.param("Slack-ImgProxy (+https://api.slack.com/robots)", BOT_WORD, BOT_WORD, id="a-proxy-of-a-chat"),
    pytest.param(BARRACUDA, SCANNER_WORD, SCANNER_WORD, id="barracuda"),
    pytest.param("Acme-Link-Scanner/3.1", SCANNER_WORD, SCANNER_WORD, id="a-scanner"),
    pytest.param("Mozilla/5.0 (compatible; AcmeSecurity/2)", SCANNER_WORD, SCANNER_WORD, id="a-word-for-security"),
    pytest.param(chrome(141, more=" AcmeVirusScan"), SCANNER_WORD, SCANNER_WORD, id="a-scanner-in-a-browser"),
    pytest.param(CURL, BOT_WORD, BOT_WORD, id="curl"),
    pytest.param("Wget/1.25.0", BOT_WORD, BOT_WORD, id="wget"),
    pytest.param("python-requests/2.32.5", BOT_WORD, BOT_WORD, id="python"),
    pytest.param("Go-http-client/2.0", BOT_WORD, BOT_WORD, id="go"),
    pytest.param("libwww-perl/6.79", BOT_WORD, BOT_WORD, id="perl"),
    pytest.param(GOOGLEBOT, BOT_WORD, BOT_WORD, id="googlebot"),
    pytest.param(GOOGLEBOT.upper(), BOT_WORD, BOT_WORD, id="googlebot-in-capitals"),
    pytest.param(android("Pixel 9", " (compatible; AcmeBot/2.1)"), BOT_WORD, BOT_WORD, id="a-bot-on-a-phone"),
    pytest.param(CHROME.replace("Chrome", "HeadlessChrome"), BOT_WORD, BOT_WORD, id="a-browser-without-a-screen"),
    pytest.param("Chat-LinkExpanding 2.1 (+https://chat.example/robots)", BOT_WORD, BOT_WORD, id="chat-preview"),
    pytest.param(f"Mozilla/5.0 ({WINDOWS}) {WEBKIT} BingPreview/1.0b", BOT_WORD, BOT_WORD, id="preview-of-outlook-com"),
    pytest.param("WhatsApp/2.25.22.8 A", BOT_WORD, BOT_WORD, id="preview-of-whatsapp"),
    pytest.param("acme-thing/1.0 build 7 of an unknown program", NO_BROWSER, NO_BROWSER, id="unknown-program"),
    pytest.param("\\xff\\xfe", NO_BROWSER, NO_BROWSER, id="bytes-that-were-not-text"),
    pytest.param("Mozilla/5.0 (short)", NO_BROWSER, NO_BROWSER, id="too-short-for-a-browser"),
    pytest.param(chrome(141, more=" acme"), NO_BROWSER, NO_BROWSER, id="a-browser-with-a-bare-name-behind"),
    pytest.param("Mozilla" * 73, NO_BROWSER, NO_BROWSER, id="as-long-as-is-kept"),
]


@pytest.mark.parametrize("agent, expected", PEOPLE)
def test_what_people_read_mail_with_is_a_person(agent: str, expected: tuple[str, str, int]) -> None:
    assert verdict(hit(0, agent)) == expected
    assert verdict(click(0, 1, agent)) == expected


@pytest.mark.parametrize("agent, as_open, as_click", MACHINES)
def test_what_fetches_by_itself_is_told_by_its_name_or_shape(
    agent: str, as_open: tuple[str, str, int], as_click: tuple[str, str, int]
) -> None:
    assert verdict(hit(0, agent)) == as_open
    assert verdict(click(0, 1, agent)) == as_click


def test_an_agent_that_was_seen_before_is_not_judged_again() -> None:
    tracker.judge_agent.cache_clear()
    for _ in range(5):
        assert tracker.judge_agent(FIREFOX, OPEN).verdict == "human"
    assert (tracker.judge_agent.cache_info().misses, tracker.judge_agent.cache_info().hits) == (1, 4)


@pytest.mark.parametrize(
    "piece", ["mail-", ".mail_", "a.", "a@", "@", "cfnetwork/", "safari/1", "(Windows NT", "mozilla/5.0 ("]
)
def test_no_agent_takes_long_to_judge(piece: str) -> None:
    """Anybody may send one that is as long as is kept, and new each time."""
    agent = (piece * tracker.MAX_AGENT)[: tracker.MAX_AGENT]
    begin = time.perf_counter()
    for n in range(100):
        tracker.judge([click(n, 1, f"{n}{agent}"[: tracker.MAX_AGENT])])
    assert time.perf_counter() - begin < 0.4  # a pattern that goes back and forth takes a second or more


# -- One hit: method, headers, address, answer


@pytest.mark.parametrize("agent", [FIREFOX, OUTLOOK, GMAIL_PROXY, APPLE_MPP, "", CURL, BARRACUDA, OLD])
def test_head_is_never_a_person(agent: str) -> None:
    for each in (hit(0, agent, method="HEAD"), click(0, 1, agent, method="HEAD", purpose="prefetch")):
        assert verdict(each) == ("scanner", "head", MACHINE)


@pytest.mark.parametrize("agent", [FIREFOX, THUNDERBIRD, IPHONE, CURL])
@pytest.mark.parametrize("purpose", ["prefetch", "Prefetch", "prefetch;prerender", "prerender", "preview"])
def test_a_hit_that_says_it_was_fetched_ahead_is_unconfirmed(agent: str, purpose: str) -> None:
    for each in (hit(0, agent, purpose=purpose), click(0, 1, agent, purpose=purpose)):
        assert verdict(each) == ("prefetch", "prefetch-header", UNCONFIRMED)


@pytest.mark.parametrize("purpose", ["", "navigate", "image", "pre fetch"])
def test_another_purpose_changes_nothing(purpose: str) -> None:
    assert verdict(click(0, purpose=purpose)) == HUMAN_BROWSER


def test_a_browser_that_fetched_ahead_is_a_person_when_it_goes_there() -> None:
    assert reasons([click(0, purpose="prefetch"), click(6)]) == ["prefetch-header", "browser"]


NETWORKS = [
    # address, whether it is a mail filter's
    pytest.param("40.107.218.12", CERTAIN, id="exchange"),
    pytest.param("40.107.218.0", CERTAIN, id="exchange-truncated"),
    pytest.param("40.93.1.1", CERTAIN, id="exchange-in-the-upper-half"),
    pytest.param("40.94.29.84", None, id="next-to-exchange"),
    pytest.param("52.103.255.254", CERTAIN, id="last-of-a-wide-network"),
    pytest.param("52.104.0.1", None, id="first-after-it"),
    pytest.param("20.0.0.10", None, id="windows-365-desktop-in-azure"),
    pytest.param("52.238.78.88", CERTAIN, id="a-single-address"),
    pytest.param("52.238.78.89", None, id="the-address-after-it"),
    pytest.param("52.238.78.0", PROBABLE, id="a-single-address-truncated"),
    pytest.param("209.222.82.0", CERTAIN, id="barracuda-as-wide-as-what-is-stored"),
    pytest.param("18.184.203.230", CERTAIN, id="barracuda-in-a-cloud"),
    pytest.param("18.184.203.1", None, id="its-neighbour-in-that-cloud"),
    pytest.param("18.184.203.0", PROBABLE, id="truncated-it-may-be-either"),
    pytest.param("2a01:111:f400::25", CERTAIN, id="ipv6"),
    pytest.param("2a01:111:f400::", CERTAIN, id="ipv6-truncated"),
    pytest.param("2a01:111:f402::", None, id="ipv6-next-to-it"),
    pytest.param("", None, id="not-stored"),
    pytest.param("40.no-address", None, id="of-a-line-that-another-program-wrote"),
]


@pytest.mark.parametrize("address, expected", NETWORKS)
def test_a_mail_filters_network_is_proof_and_a_part_of_what_was_stored_is_a_sign(
    address: str, expected: str | None
) -> None:
    assert tracker.filter_network(address) == expected
    proof = ("scanner", "filter-network", MACHINE)
    for each in (hit(0, EDGE, address=address), click(0, 1, EDGE, address), click(0, 1, OUTLOOK, address)):
        assert (verdict(each) == proof) == (expected == CERTAIN)
        assert (verdict(each)[2] == PERSON) == (expected != CERTAIN)
    # A proxy and a bot say themselves what they are.
    assert verdict(hit(0, GMAIL_PROXY, address=address)) == PROXY
    assert verdict(click(0, 1, CURL, address)) == BOT_WORD


@pytest.mark.parametrize("agent", [CHROME, OUTLOOK, CURL, APPLE_MPP, "", BARRACUDA])
def test_the_senders_own_hits_are_set_aside_whatever_they_are(agent: str) -> None:
    own = ("self", "own-address", ASIDE)
    for each in (hit(0, agent), click(0, 1, agent), hit(0, agent, method="HEAD"), click(0, HIDDEN, agent)):
        assert verdict(each._replace(own=True)) == own
        assert verdict(each) != own
    assert reasons([each._replace(own=True) for each in clicks(0, 0.1, 0.2, 0.3)]) == ["own-address"] * 4


@pytest.mark.parametrize("agent", [GMAIL_PROXY, YAHOO_PROXY])
def test_an_image_proxy_is_never_the_sender(agent: str) -> None:
    """A whole provider's readers come from there."""
    assert verdict(hit(0, agent, own=True)) == PROXY
    assert verdict(click(0, 1, agent, own=True)) == PROXY_CLICK


@pytest.mark.parametrize("why", sorted(tracker.NAMING_REASONS))
@pytest.mark.parametrize("agent, expected", [(FIREFOX, "human"), (CURL, "bot"), (OLD, "unconfirmed")])
def test_a_click_that_met_the_naming_page_is_set_aside_whoever_made_it(why: str, agent: str, expected: str) -> None:
    """The verdict stays, so that one sees whether people met the page; the state takes it out of every number."""
    assert verdict(click(0, 1, agent, why=why)) == (expected, why, ASIDE)
    assert verdict(click(0, 1, agent, why=why, method="HEAD")) == ("scanner", why, ASIDE)
    burst = tracker.judge([each._replace(why=why) for each in clicks(0, 1, 2)])
    assert [(each.verdict, each.reason) for each in burst] == [("scanner", why)] * 3
    echoed = tracker.judge([click(0, why=why), click(5, 1, IPHONE, CLOUD, why=why)])
    assert [(each.verdict, each.reason) for each in echoed] == [("human", why), ("scanner", why)]


@pytest.mark.parametrize("why", ["no such reason", "' or 1=1", "<b>", "repeat"])
def test_a_reason_that_we_do_not_know_is_ignored(why: str) -> None:
    """The spool may hold lines that another program wrote."""
    assert verdict(click(0, why=why)) == HUMAN_BROWSER


def test_a_forged_link_is_a_scanners_and_no_event() -> None:
    assert verdict(click(0, answer="404", own=True)) == ("scanner", "forged-link", ASIDE)
    assert verdict(click(0, answer="named")) == HUMAN_BROWSER


# -- One hit: time, and signs that weigh together

VOTES = [
    # seconds since delivery or registration, who says so, the browser, where from, what is thought
    pytest.param(8, delivered, CHROME, HOME, ("human", "browser"), id="a-sign-in-mail-clicked-after-8-s"),
    pytest.param(1.999, delivered, CHROME, HOME, ("scanner", "too-soon"), id="before-anybody-can-read"),
    pytest.param(2, delivered, CHROME, HOME, ("human", "browser"), id="just-not-too-soon"),
    pytest.param(0, delivered, CHROME, HOME, ("scanner", "too-soon"), id="in-the-moment-of-delivery"),
    pytest.param(-1, delivered, CHROME, HOME, ("human", "browser"), id="before-the-time-that-was-said"),
    pytest.param(0.5, registered, CHROME, HOME, ("human", "browser"), id="soon-after-registration-alone"),
    pytest.param(0.5, registered, TWO_YEARS_OLD, HOME, ("unconfirmed", "some-signs"), id="the-same-and-2-years-old"),
    pytest.param(8, registered, TWO_YEARS_OLD, HOME, ("human", "browser"), id="half-a-sign-and-one"),
    pytest.param(8, delivered, TWO_YEARS_OLD, HOME, ("unconfirmed", "some-signs"), id="two-signs"),
    pytest.param(60, delivered, TWO_YEARS_OLD, HOME, ("human", "browser"), id="early-ends-after-a-minute"),
    pytest.param(86_400, delivered, TWO_YEARS_OLD, HOME, ("human", "browser"), id="2-years-old-alone"),
    pytest.param(86_400, delivered, OLD, HOME, ("unconfirmed", "some-signs"), id="4-years-old-alone"),
    pytest.param(8, registered, OLD, HOME, ("unconfirmed", "some-signs"), id="4-years-old-and-half-a-sign"),
    pytest.param(8, delivered, OLD, HOME, ("scanner", "many-signs"), id="4-years-old-and-early"),
    pytest.param(86_400, delivered, CHROME, "18.184.203.0", ("human", "browser"), id="partly-a-filters-network"),
    pytest.param(8, delivered, CHROME, "18.184.203.0", ("unconfirmed", "some-signs"), id="the-same-and-early"),
    pytest.param(86_400, delivered, OLD, "18.184.203.0", ("scanner", "many-signs"), id="the-same-and-4-years-old"),
    pytest.param(86_400, delivered, chrome(57, "Windows NT 6.1"), HOME, ("unconfirmed", "some-signs"), id="safe-links"),
    pytest.param(8, delivered, chrome(79, more=" Edg/79.0.309.43"), HOME, ("scanner", "many-signs"), id="an-old-edge"),
    pytest.param(8, delivered, "", HOME, ("bot", "no-user-agent"), id="a-bot-needs-no-signs"),
]


@pytest.mark.parametrize("since, who_says, agent, address, expected", VOTES)
def test_signs_of_a_scanner_weigh_together_on_a_click_and_never_on_an_open(
    since: float, who_says: Callable[[float], Context], agent: str, address: str, expected: tuple[str, str]
) -> None:
    assert verdict(click(0, 1, agent, address), who_says(since))[:2] == expected
    assert verdict(hit(0, agent, OPEN, address), who_says(since)) == verdict(hit(0, agent))


@pytest.mark.parametrize(
    "agent",
    [
        pytest.param(chrome(109, "Windows NT 6.1; Win64; x64"), id="the-last-for-windows-7"),
        pytest.param(chrome(103, "Macintosh; Intel Mac OS X 10_12_6"), id="the-last-for-an-old-mac"),
        pytest.param(chrome(116, MAC), id="the-last-for-macos-10.14"),
        pytest.param(chrome(86, more=" QIHU 360SE"), id="360-is-built-on-an-old-chrome"),
        pytest.param(chrome(94, more=" Core/1.94.2 QQBrowser/12.0"), id="qqbrowser"),
        pytest.param(f"Mozilla/5.0 ({LINUX}) {WEBKIT} QtWebEngine/5.15 Chrome/87.0 Safari/537.36", id="in-a-program"),
        pytest.param(android("SM-G930F", version=80), id="an-old-phone"),
        pytest.param(android("M2101K6G; wv", version=66), id="an-old-webview-on-a-phone"),
        pytest.param(chrome(80, "X11; CrOS x86_64 12739"), id="a-chromebook-at-its-end"),
        pytest.param(FIREFOX.replace("145", "52"), id="another-browser"),
        pytest.param(chrome(999), id="a-version-to-come"),
    ],
)
def test_what_is_old_with_people_is_no_sign(agent: str) -> None:
    assert verdict(click(0, 1, agent), delivered(8)) == HUMAN_BROWSER


def test_a_browser_grows_old_with_the_hits_own_time_and_one_beyond_the_table_does_not() -> None:
    """So an old program of ours, whose table has no later year, takes nobody's new browser for an old one."""
    year = 365.25 * 86_400
    assert [verdict(click(n * year, 1, CHROME))[0] for n in range(6)] == ["human"] * 3 + ["unconfirmed"] * 3
    newest = chrome(max(version for _, version in tracker.verdict_data().chrome_years))
    assert verdict(click(20 * year, 1, newest)) == HUMAN_BROWSER


# -- Together: HEAD


@pytest.mark.parametrize("seconds, expected", [(0.4, "with-head"), (10, "with-head"), (10.001, "browser")])
@pytest.mark.parametrize("head_first", [True, False])
def test_a_get_beside_its_head_is_the_same_program(seconds: float, expected: str, head_first: bool) -> None:
    head, get = click(method="HEAD"), click()
    late = NOW + round(seconds * 1000)
    pair = [head, get._replace(at=late)] if head_first else [get, head._replace(at=late)]
    wanted = "after-scanner" if head_first and expected == "browser" else expected
    assert dict(zip((each.method for each in pair), reasons(pair), strict=True)) == {"HEAD": "head", "GET": wanted}


@pytest.mark.parametrize(
    "get",
    [
        pytest.param(click(1, 2), id="another-link"),
        pytest.param(click(1, 1, IPHONE), id="another-program"),
        pytest.param(click(1, 1, CHROME, OFFICE), id="another-address"),
        pytest.param(hit(1), id="the-pixel"),
    ],
)
def test_another_get_is_not_the_heads(get: Hit) -> None:
    assert "with-head" not in reasons([get._replace(at=NOW - 1000), click(method="HEAD")])
    assert reasons([get._replace(at=NOW - 1000), click(method="HEAD")])[0] == "browser"


def test_a_person_on_a_phone_minutes_after_a_link_checker_is_a_person() -> None:
    """Also from the next address in the same network."""
    checker = [click(2, method="HEAD", address=CLOUD), click(2.4, address=CLOUD)]
    assert reasons([*checker, click(300, 1, IPHONE, "192.0.2.61")]) == ["head", "with-head", "browser"]


# -- Together: bursts


BURSTS = [
    # clicks at these seconds, each on another link
    pytest.param([0, 1.5, 3], None, "burst", id="3-links-in-3-s"),
    pytest.param([0, 1.5, 3.001], None, "browser", id="3-links-in-more"),
    pytest.param([0, 3], None, "browser", id="two-tabs-opened-quickly"),
    pytest.param([0, 0], None, "browser", id="two-tabs-in-one-moment"),
    pytest.param([0, 5, 10, 15], 4, "burst", id="all-links-of-the-mail-in-15-s"),
    pytest.param([0, 5, 10, 15.001], 4, "browser", id="all-links-in-more"),
    pytest.param([0, 5, 10, 15], 5, "browser", id="all-links-but-one"),
    pytest.param([0, 5, 10, 15], None, "browser", id="nobody-said-how-many-there-are"),
    pytest.param([0, 10], 2, "browser", id="both-links-of-a-mail-of-two"),
    pytest.param([0], 1, "browser", id="the-only-link"),
]


@pytest.mark.parametrize("at, links, expected", BURSTS)
def test_links_followed_faster_than_a_person_can_are_a_scanners_the_first_as_well_as_the_last(
    at: list[float], links: int | None, expected: str
) -> None:
    hits = clicks(*at)
    assert reasons(hits, Context(links=links)) == [expected] * len(at)
    assert {judged.state for judged in tracker.judge(hits, Context(links=links))} == (
        {MACHINE} if expected == "burst" else {PERSON}
    )


RUSHES = [
    # seconds and links
    pytest.param([(0, 1), (0.5, 2), (1, 1)], "burst", id="3-clicks-on-2-links-in-1-s"),
    pytest.param([(0, 1), (0.5, 2), (1.001, 1)], "browser", id="in-more"),
    pytest.param([(0, 1), (0.2, 1), (0.4, 1)], "browser", id="a-link-clicked-three-times-in-impatience"),
    pytest.param([(0, 1), (0.3, 1), (2, 2)], "browser", id="a-double-click-and-another-link"),
]


@pytest.mark.parametrize("pairs, expected", RUSHES)
def test_three_clicks_in_a_second_are_a_scanners_if_they_are_on_different_links(
    pairs: list[tuple[float, int]], expected: str
) -> None:
    assert reasons([click(*pair) for pair in pairs]) == [expected] * len(pairs)


def test_a_gateway_may_spread_a_burst_over_many_addresses_and_programs() -> None:
    hits = [click(0, 1, CHROME, HOME), click(1, 2, EDGE, OFFICE), click(2, 3, FIREFOX, CLOUD)]
    assert reasons(hits) == ["burst"] * 3


def test_the_click_of_a_person_long_after_a_burst_is_a_person_and_so_is_an_open_amid_it() -> None:
    """Of another address the click may come at once."""
    hits = [*clicks(0, 1, 2, address=CLOUD), hit(1, OUTLOOK), click(6, 2, FIREFOX), click(1_202, 2, address=CLOUD)]
    assert reasons(hits) == ["burst"] * 3 + ["mail-client", "browser", "browser"]


@pytest.mark.parametrize(
    "agent, reason", [(CURL, "bot-word"), (BARRACUDA, "scanner-word"), (GMAIL_PROXY, "proxy-click")]
)
def test_what_names_itself_keeps_its_reason_and_makes_no_burst_of_others(agent: str, reason: str) -> None:
    named = [click(0, 1, agent, CLOUD), click(1, 2, agent, CLOUD)]
    assert reasons([*named, click(2, 3)]) == [reason, reason, "browser"]


def test_what_does_not_name_itself_makes_a_burst_with_others() -> None:
    hits = [click(0, 1, CHROME, EXCHANGE), click(1, 2, method="HEAD", address=CLOUD), click(2, 3)]
    assert reasons(hits) == ["filter-network", "head", "burst"]


# -- Together: the hidden link


@pytest.mark.parametrize(
    "seconds, expected",
    [(-10.001, "browser"), (-10, "with-hidden-link"), (10, "with-hidden-link"), (10.001, "browser")],
)
def test_clicks_within_10_seconds_of_the_hidden_link_are_the_scanners(seconds: float, expected: str) -> None:
    """Whatever address they come from, as scanners change theirs; later ones only from the same."""
    hits = [click(0, HIDDEN, address=CLOUD), click(seconds, 1, FIREFOX), hit(seconds, THUNDERBIRD, address=OFFICE)]
    assert reasons(hits) == ["hidden-link", expected, "mail-client"]


def test_the_hidden_link_alone_is_enough_and_a_link_that_looks_like_it_is_none() -> None:
    assert verdict(click(0, HIDDEN, IPHONE)) == ("scanner", "hidden-link", MACHINE)
    assert verdict(click(0, "https://acme.com/about:blank", IPHONE)) == HUMAN_BROWSER


# -- Together: what follows a scanner

SCANNERS = [
    pytest.param([click(0, HIDDEN, address=CLOUD)], id="hidden-link"),
    pytest.param([click(0, method="HEAD", address=CLOUD)], id="head"),
    pytest.param(clicks(0, 0, 0, address=CLOUD), id="burst"),
    pytest.param([click(0, 1, GMAIL_SAMPLING, CLOUD)], id="gmail-sampling"),
    pytest.param([click(0, 1, BARRACUDA, CLOUD)], id="scanner-word"),
    pytest.param([click(0, 1, CURL, CLOUD)], id="bot-word"),
]


@pytest.mark.parametrize("scanner", SCANNERS)
def test_what_comes_from_a_scanners_address_within_15_minutes_is_its_too(scanner: list[Hit]) -> None:
    before = click(-20, 7, FIREFOX, CLOUD)
    late = [click(899, 7, FIREFOX, CLOUD), hit(900, IPHONE, address=CLOUD)]
    assert reasons([before, *scanner, *late])[-2:] == ["after-scanner"] * 2
    assert reasons([before, *scanner, *late])[0] == "browser"
    assert reasons([*scanner, click(900.001, 7, FIREFOX, CLOUD)])[-1] == "browser"
    assert reasons([*scanner, click(20, 7, FIREFOX, OFFICE)])[-1] == "browser"


@pytest.mark.parametrize("agent", [GMAIL_PROXY, OUTLOOK, APPLE_MPP])
def test_mail_programs_and_proxies_are_no_scanners_for_their_address(agent: str) -> None:
    """A filter in a company's own network stands beside its people."""
    judged = tracker.judge([*clicks(0, 1, 2, address=OFFICE), hit(60, agent, address=OFFICE)])
    assert judged[-1] == tracker.judge([hit(60, agent)])[0]


def test_each_hit_of_a_scanner_extends_its_15_minutes_and_a_persons_does_not() -> None:
    extended = [*clicks(0, 1, 2, address=CLOUD), *(click(800 * n, 9, FIREFOX, CLOUD) for n in range(1, 5))]
    assert reasons(extended) == ["burst"] * 3 + ["after-scanner"] * 4
    others = [*clicks(0, 1, 2, address=CLOUD), click(800, 9, IPHONE), click(1_600, 9, FIREFOX, CLOUD)]
    assert reasons(others)[-2:] == ["browser", "browser"]


def test_a_colleague_in_the_same_truncated_network_is_only_doubtful() -> None:
    """Stored truncated, an address is 256 of them: the same browser is the scanner, another one may be anybody's."""
    scanner = clicks(0, 1, 2, address=OFFICES_NETWORK)
    follow = [click(60, 9, FIREFOX, OFFICES_NETWORK), hit(61, FIREFOX, address=OFFICES_NETWORK)]
    judged = tracker.judge([*scanner, *follow, click(62, 9, CHROME, OFFICES_NETWORK)])[3:]
    assert [each.reason for each in judged] == ["some-signs", "browser", "after-scanner"]
    assert [each.state for each in judged] == [UNCONFIRMED, PERSON, MACHINE]


def test_a_doubtful_colleague_with_one_more_sign_is_a_scanner() -> None:
    hits = [*clicks(0, 1, 2, address=OFFICES_NETWORK), click(60, 9, TWO_YEARS_OLD, OFFICES_NETWORK)]
    assert reasons(hits)[-1] == "many-signs"


@pytest.mark.parametrize(
    "agent, expected",
    [
        pytest.param(OLD, "after-scanner", id="a-rare-program-is-known-by-its-name"),
        pytest.param(TWO_YEARS_OLD, "after-scanner", id="also-one-of-two-years"),
        pytest.param(CHROME, "browser", id="a-common-one-is-not"),
        pytest.param(android("SM-G930F", version=80), "browser", id="old-phones-are-common"),
        pytest.param(FIREFOX, "browser", id="nor-is-another-browser"),
    ],
)
def test_a_scanner_that_changes_its_address_is_known_by_its_program_only_if_that_is_rare(
    agent: str, expected: str
) -> None:
    assert reasons([*clicks(0, 1, 2, agent=agent, address=CLOUD), click(60, 9, agent, OFFICE)])[-1] == expected


def test_a_common_browser_is_not_rare_for_coming_from_a_network_that_is_partly_a_filters() -> None:
    hits = [*clicks(0, 1, 2, address=CLOUD), click(60, 9, CHROME, "18.184.203.0")]
    assert reasons(hits)[-1] == "browser"


@pytest.mark.parametrize(
    "preview", ["WhatsApp/2.25.22.8 A", IPHONE + " facebookexternalhit/1.1 Facebot Twitterbot/1.0"]
)
@pytest.mark.parametrize("address", [HOME, OFFICES_NETWORK])
def test_a_preview_that_a_messenger_makes_on_a_phone_casts_no_doubt_on_the_phone(preview: str, address: str) -> None:
    """WhatsApp and iMessage fetch from the phone of whoever pastes the link."""
    hits = [click(0, 1, preview, address), click(20, 1, IPHONE, address), click(30, 2, IPHONE, address)]
    assert reasons(hits) == ["bot-word", "browser", "browser"]


# -- Together: echoes

ECHOES = [
    # the click that repeats the first, which came from a phone at home
    pytest.param(click(12, 1, CHROME, CLOUD), "echo", id="another-address-and-another-system"),
    pytest.param(click(15, 1, CHROME, CLOUD), "echo", id="15-seconds-later"),
    pytest.param(click(15.001, 1, CHROME, CLOUD), "browser", id="later"),
    pytest.param(click(12, 1, PHONE.replace("141", "140"), CLOUD), "browser", id="the-same-system"),
    pytest.param(click(12, 1, CHROME, HOME), "browser", id="the-same-address"),
    pytest.param(click(12, 1, PHONE, CLOUD), "browser", id="the-same-phone-that-changed-its-network"),
    pytest.param(click(12, 2, CHROME, CLOUD), "browser", id="another-link"),
    pytest.param(click(12, 1, FIREFOX, CLOUD), "echo", id="a-server-with-linux-is-no-android"),
    pytest.param(click(12, 1, CHROME, ""), "browser", id="addresses-are-not-stored"),
    pytest.param(click(12, 1, OLD, CLOUD), "echo", id="with-signs-of-its-own"),
    pytest.param(click(12, 1, CURL, CLOUD), "bot-word", id="a-bot-says-so-itself"),
    pytest.param(hit(12, CHROME, OPEN, CLOUD), "browser", id="an-open"),
]


@pytest.mark.parametrize("second, expected", ECHOES)
def test_a_click_that_is_repeated_at_once_from_elsewhere_is_echoed_by_a_scanner(second: Hit, expected: str) -> None:
    assert reasons([click(0, 1, PHONE), second]) == ["browser", expected]


def test_a_person_who_comes_right_after_a_scanner_is_not_its_echo() -> None:
    """Safe Links tests the link with an old Chrome, then lets the person go there."""
    assert reasons([click(0, 1, OLD, CLOUD), click(3, 1, IPHONE)]) == ["some-signs", "browser"]
    assert reasons([click(0, 1, CHROME, EXCHANGE), click(3, 1, IPHONE)]) == ["filter-network", "browser"]


def test_an_echo_is_told_by_the_person_and_not_by_another_echo() -> None:
    hits = [click(0, 1, PHONE), click(12, 1, CHROME, CLOUD), click(24, 1, IPHONE, OFFICE)]
    assert reasons(hits) == ["browser", "echo", "browser"]


# -- Together: repeats


def test_opens_by_the_same_program_within_10_seconds_of_the_first_are_one_open() -> None:
    """Anchored at the first: a program that loads it every 8 seconds would else never count again."""
    hits = [hit(seconds, YAHOO_PROXY, address=f"192.0.2.{n}") for n, seconds in enumerate((0, 8, 10, 10.001, 18, 26))]
    judged = tracker.judge(hits)
    assert [each.reason for each in judged] == [
        "image-proxy",
        "repeat",
        "repeat",
        "image-proxy",
        "repeat",
        "image-proxy",
    ]
    assert {each.verdict for each in judged} == {"proxy"}
    assert [each.state for each in judged] == [PERSON, ASIDE, ASIDE, PERSON, ASIDE, PERSON]


@pytest.mark.parametrize(
    "agent, first",
    [(APPLE_MPP, "apple-mpp"), (CURL, "bot-word"), (OUTLOOK, "mail-client"), (CHROME, "browser")],
)
def test_repeats_are_told_of_every_kind_of_open(agent: str, first: str) -> None:
    assert reasons([hit(0, agent), hit(1, agent), hit(86_400, agent)]) == [first, "repeat", first]


@pytest.mark.parametrize(
    "hits, expected",
    [
        pytest.param([hit(0, OUTLOOK), hit(1, IPHONE)], ["mail-client", "browser"], id="another-program"),
        pytest.param([click(0), click(0.3)], ["browser", "browser"], id="clicks"),
        pytest.param([hit(0, own=True), hit(1)], ["own-address", "browser"], id="what-is-set-aside-is-no-first"),
        pytest.param([hit(0, purpose="prefetch"), hit(1)], ["prefetch-header", "browser"], id="another-verdict"),
    ],
)
def test_these_are_no_repeats(hits: list[Hit], expected: list[str]) -> None:
    assert reasons(hits) == expected


# -- Sessions


@pytest.mark.parametrize("quiet, expected", [(900, "after-scanner"), (900.001, "browser")])
def test_a_session_ends_after_15_minutes_of_quiet(quiet: float, expected: str) -> None:
    assert reasons([*clicks(0, 1, 2), click(2 + quiet)])[-1] == expected


def test_sessions_do_not_know_of_each_other() -> None:
    """Whatever stands between them in the list."""
    day = 86_400
    first, second, third = clicks(0, 1, 2), [click(day), click(day + 1, 2)], [hit(2 * day, YAHOO_PROXY)] * 2
    apart = [each for session in (first, second, third) for each in tracker.judge(session)]
    assert tracker.judge([*first, *second, *third]) == apart
    mixed = list(zip([*first, *second, *third], apart, strict=True))
    random.Random(7).shuffle(mixed)
    assert [each.verdict for each in tracker.judge([one for one, _ in mixed])] == [each.verdict for _, each in mixed]


# -- Sessions of too many hits


def sweep(links: int, methods: Sequence[str] = ("GET",), seconds: float = 1) -> list[Hit]:
    """Every link of a mail, by each method in turn."""
    asked = [(link, method) for link in range(links) for method in methods]
    return [click(n * seconds / len(asked), link, method=method) for n, (link, method) in enumerate(asked)]


@pytest.mark.parametrize("methods", [["GET"], ["HEAD", "GET"]], ids=" and ".join)
@pytest.mark.parametrize("links", [40, 50, 51, 70, 300])
def test_no_click_of_a_sweep_is_a_persons_however_many_links_it_has(links: int, methods: list[str]) -> None:
    hits = sweep(links, methods)
    reason = "crowded" if len(hits) > tracker.MAX_SESSION else "with-head" if "HEAD" in methods else "burst"
    assert {judged.state for judged in tracker.judge(hits)} == {MACHINE}
    assert set(reasons([each for each in hits if each.method == "GET"])) <= {"crowded", "burst"}
    assert {judged for each, judged in zip(hits, reasons(hits), strict=True) if each.method == "GET"} == {reason}
    spread = [each._replace(address=f"192.0.2.{n % 250}", agent=chrome(150 + n)) for n, each in enumerate(hits)]
    assert PERSON not in {judged.state for judged in tracker.judge(spread)}


CROWD = [hit(60 + n, OUTLOOK, address=f"10.0.{n}.7") for n in range(50)]  # as many as are judged together
CROWDED = [
    # clicks that come with those, what is thought of the first
    pytest.param([click()], ("unconfirmed", "crowded", UNCONFIRMED), id="alone"),
    pytest.param(clicks(0, 0, 0), ("unconfirmed", "crowded", UNCONFIRMED), id="with-two-other-links"),
    pytest.param(clicks(0, 0, 0, 0), ("scanner", "crowded", MACHINE), id="with-three-in-the-same-moment"),
    pytest.param(clicks(0, -3, 3, 3), ("scanner", "crowded", MACHINE), id="before-and-after"),
    pytest.param(clicks(0, 0, 0, 3.001), ("unconfirmed", "crowded", UNCONFIRMED), id="the-third-comes-late"),
    pytest.param([click(0, 1)] * 2 + [click(1, 2)] * 3, ("unconfirmed", "crowded", UNCONFIRMED), id="few-links"),
    pytest.param(
        [click(n, n, CHROME, f"10.0.0.{n}") for n in range(4)], ("scanner", "crowded", MACHINE), id="one-program"
    ),
    pytest.param(
        [click(n, n, chrome(141 + n), OFFICE) for n in range(4)], ("scanner", "crowded", MACHINE), id="one-address"
    ),
    pytest.param(
        [click(n, n, chrome(141 + n), "") for n in range(4)], ("unconfirmed", "crowded", UNCONFIRMED), id="no-address"
    ),
    pytest.param(
        [click(), *(click(1, n, method="HEAD") for n in range(2, 5))], ("scanner", "crowded", MACHINE), id="by-head"
    ),
    pytest.param(
        [click(), *(hit(n / 50, OUTLOOK) for n in range(1, 21)), *clicks(1, 2, 2, 2)],
        ("unconfirmed", "crowded", UNCONFIRMED),
        id="behind-20-others",
    ),
    pytest.param([click(0, 1, OLD)], ("unconfirmed", "some-signs", UNCONFIRMED), id="signs-of-its-own"),
    pytest.param([click(0, 1, CURL)], BOT_WORD, id="a-bot"),
    pytest.param([hit(0), hit(1)], HUMAN_BROWSER, id="an-open"),
    pytest.param([hit(1), hit(0)], HUMAN_BROWSER, id="an-open-again"),
    pytest.param([click(why="suspended")], ("unconfirmed", "suspended", ASIDE), id="on-the-naming-page"),
    pytest.param(
        [each._replace(why="suspended") for each in clicks(0, 0, 0, 0)],
        ("scanner", "suspended", ASIDE),
        id="a-scanner-there",
    ),
]


@pytest.mark.parametrize("hits, expected", CROWDED)
def test_among_too_many_hits_no_click_is_certainly_a_persons(hits: list[Hit], expected: tuple[str, str, int]) -> None:
    first = tracker.judge([*hits, *CROWD])[0]
    assert (first.verdict, first.reason, first.state) == expected
    assert tracker.judge(hits, crowded=True)[0] == first
    assert {judged.reason for judged in tracker.judge([*hits, *CROWD])[len(hits) :]} == {"mail-client"}


def test_a_session_has_too_many_hits_from_the_51st_on() -> None:
    assert tracker.MAX_SESSION == 50
    assert reasons([*CROWD[1:], click()])[-1] == "browser"
    assert reasons([*CROWD, click()])[-1] == "crowded"
    assert reasons([*CROWD, click(), *clicks(90_000, 90_001, 90_002)])[-3:] == ["burst"] * 3, "another session"


def test_a_key_that_very_many_people_read_makes_no_machines_of_them() -> None:
    dice = random.Random(5)
    hits = []
    for n in range(3_000):
        agent, address = dice.choice((CHROME, EDGE, IPHONE, PHONE, FIREFOX)), f"10.{n % 250}.{n // 250}.9"
        at = dice.random() * 6 * 3_600
        hits += [hit(at, agent, address=address), click(at + 9, dice.randrange(8), agent, address)]
    judged = tracker.judge(hits)
    assert {each.state for each in judged[::2]} == {PERSON}
    assert {each.state for each in judged[1::2]} == {UNCONFIRMED}


def crowd(dice: random.Random, number: int) -> list[Hit]:
    """Many hits in a row, some of them together."""
    at, made = 0.0, []
    for _ in range(number):
        at += dice.choice((0, 0, 0, 0.001, 0.01, 0.3, 2, 20))
        agent, address = dice.choice((CHROME, EDGE, PHONE, OLD, CURL)), dice.choice((HOME, OFFICE, CLOUD, ""))
        method = dice.choice(("GET", "GET", "GET", "HEAD"))
        made.append(
            click(at, dice.randrange(9), agent, address, method=method) if dice.random() < 0.7 else hit(at, agent)
        )
    return made


def test_of_a_piece_of_a_crowded_session_is_said_what_is_said_in_the_whole_and_in_any_order() -> None:
    dice = random.Random(20261126)
    seen = set()
    for _ in range(20):
        hits = crowd(dice, 300)
        whole = {each.id: judged for each, judged in zip(hits, tracker.judge(hits), strict=True)}
        seen |= {(judged.verdict, judged.reason) for judged in whole.values()}
        dice.shuffle(hits)
        assert {each.id: judged for each, judged in zip(hits, tracker.judge(hits), strict=True)} == whole
        hits.sort(key=lambda each: each.at)
        times = [each.at for each in hits]
        for n in range(0, 300, 25):
            begin, end = times.index(times[n]), 300 - times[::-1].index(times[n])
            piece = hits[max(begin - 21, 0) : end + 21]
            dice.shuffle(piece)
            found = dict(zip((each.id for each in piece), tracker.judge(piece, crowded=True), strict=True))
            assert [found[each.id] for each in hits[begin:end]] == [whole[each.id] for each in hits[begin:end]]
    assert seen >= {("scanner", "crowded"), ("unconfirmed", "crowded"), ("unconfirmed", "some-signs")}


# -- What was judged for good


def fixed(one: Hit, verdict: str, reason: str) -> Hit:
    """A hit whose agent and address were cut after it was judged."""
    return one._replace(agent="", address="", fixed=tracker.Judgement(verdict, reason, PROBABLE))


FIXED = [
    # what is fixed, what comes with it, what that is thought to be
    pytest.param(("human", "browser"), clicks(1, 2)[1:], ["browser"], id="a-person-beside-one"),
    pytest.param(("human", "browser"), [click(1, 2), click(2, 3)], ["burst"] * 2, id="one-of-a-burst"),
    pytest.param(("scanner", "filter-network"), [click(1, 2), click(2, 3)], ["burst"] * 2, id="a-scanner-of-a-burst"),
    pytest.param(("bot", "bot-word"), [click(1, 2), click(2, 3)], ["browser"] * 2, id="a-bot-makes-no-burst"),
    pytest.param(("scanner", "hidden-link"), [click(1, 2)], ["with-hidden-link"], id="the-hidden-link"),
    pytest.param(("scanner", "head"), [click(1)], ["browser"], id="a-head-of-whom-nobody-knows"),
    pytest.param(("scanner", "burst"), [hit(60)], ["browser"], id="a-scanner-without-an-address"),
    pytest.param(("human", "browser"), [click(5, 1, PHONE, CLOUD)], ["browser"], id="no-echo-of-nowhere"),
]


@pytest.mark.parametrize("judged, others, expected", FIXED)
def test_what_was_cut_keeps_its_verdict_and_others_see_that_only(
    judged: tuple[str, str], others: list[Hit], expected: list[str]
) -> None:
    kept = fixed(click(), *judged)
    found = tracker.judge([kept, *others], delivered(1))
    assert found[0] == kept.fixed
    assert [each.reason for each in found[1:]] == expected
    assert tracker.judge([kept], delivered(1)) == tracker.judge([kept], crowded=True) == [kept.fixed]


def test_no_rule_changes_what_is_fixed() -> None:
    """Whatever its neighbours are; some agents and addresses may still be there."""
    dice = random.Random(20261127)
    thought = [tracker.Judgement(verdict, reason, PROBABLE) for verdict, reason in
               [("human", "browser"), ("proxy", "repeat"), ("scanner", "head"), ("unconfirmed", "suspended")]]  # fmt: skip
    for number in (2, 10, 40, 60) * 25:
        hits = [each._replace(fixed=dice.choice([*thought, None, None])) for each in crowd(dice, number)]
        judged = tracker.judge(hits, Context(links=3), crowded=dice.random() < 0.2)
        assert all(each.fixed in (None, kept) for each, kept in zip(hits, judged, strict=True))


def test_any_number_of_hits_is_judged_in_time() -> None:
    """Twenty thousand, in sessions as long as are judged together, and in one: in squares that would be minutes."""
    begin = time.perf_counter()
    gaps = [n // 50 * 10_000 + n % 50 / 4 for n in range(20_000)]
    tracker.judge([click(at, 1, (PHONE, CHROME)[n % 2], f"10.0.{n % 256}.1") for n, at in enumerate(gaps)])
    tracker.judge([click(n / 10, n) for n in range(20_000)])
    tracker.judge([click(n // 10_000, n) for n in range(20_000)])
    assert time.perf_counter() - begin < 10


# -- In any order


def sequence(dice: random.Random) -> list[Hit]:
    """Some hits of one email, mostly close together, of every kind that matters to others."""
    agents = (CHROME, OLD, PHONE, IPHONE, OUTLOOK, GMAIL_PROXY, YAHOO_PROXY, APPLE_MPP, BARRACUDA, CURL, GMAIL_SAMPLING)
    made = []
    for _ in range(dice.randrange(2, 40)):
        at = dice.choice((0, 0, 86_400)) + dice.choice(
            (0, 1, dice.random() * 4, dice.random() * 60, dice.random() * 2_000)
        )
        address = dice.choice((HOME, OFFICE, CLOUD, OFFICES_NETWORK, EXCHANGE, ""))
        more: dict[str, Any] = {"method": dice.choice(("GET",) * 6 + ("HEAD",)), "own": dice.random() < 0.05}
        more |= {"purpose": dice.choice(("",) * 8 + ("prefetch",))}
        if dice.random() < 0.4:
            made.append(hit(at, dice.choice(agents), OPEN, address, **more))
        else:
            why = dice.choice(("",) * 8 + ("suspended",))
            made.append(click(at, dice.choice((1, 1, 2, 3, HIDDEN)), dice.choice(agents), address, why=why, **more))
    return made


def test_the_order_in_which_hits_are_given_does_not_matter() -> None:
    dice, seen = random.Random(20261125), set()
    for _ in range(400):
        hits, context = sequence(dice), dice.choice((NO_CONTEXT, delivered(5), Context(links=3)))
        expected = sorted(
            zip(hits, tracker.judge(hits, context), strict=True), key=lambda pair: tracker.in_order(pair[0])
        )
        seen |= {judged.reason for _, judged in expected}
        for _ in range(4):
            dice.shuffle(hits)
            found = zip(hits, tracker.judge(hits, context), strict=True)
            again = sorted(found, key=lambda pair: tracker.in_order(pair[0]))
            assert [(tracker.in_order(one), judged) for one, judged in again] == [
                (tracker.in_order(one), judged) for one, judged in expected
            ]
    assert seen >= {
        "burst",
        "with-hidden-link",
        "with-head",
        "after-scanner",
        "echo",
        "repeat",
        "some-signs",
        "many-signs",
    }


def test_each_hit_of_an_email_gets_its_verdict_in_the_order_given() -> None:
    hits = [
        hit(9, GMAIL_PROXY),
        click(8),
        click(7, 1, CURL, CLOUD),
        hit(6, APPLE_MPP),
        hit(5, method="HEAD", address=""),
    ]
    assert [judged.verdict for judged in tracker.judge(hits)] == ["proxy", "human", "bot", "prefetch", "scanner"]
    assert tracker.judge(hits) == tracker.judge(hits)
    assert tracker.judge([]) == []


# -- The data


def test_the_data_says_each_thing_once_and_for_agents_in_lower_case() -> None:
    programs = tracker.verdict_data().programs
    names = [name for each in programs for name in each.names]
    patterns = [each.pattern.pattern for each in programs if each.pattern]
    assert sorted(names) == sorted({name.strip().lower() for name in names})
    assert len({*patterns}) == len(patterns)
    assert not any(re.search(r"(?<!\\)[A-Z]", pattern) for pattern in patterns)
    rules = {rule for each in programs for rule in each.section.split(", ")} - {"family"}
    for rule in rules:
        verdict, reason = rule.split()
        assert verdict in tracker.VERDICT_STATES and tracker.sentence_of(reason)
    years = tracker.verdict_data().chrome_years
    assert years == sorted(years) and [year for year, _ in years] == list(range(2014, years[-1][0] + 1))


def test_the_data_is_read_on_first_use_and_once() -> None:
    code = "import tracker; print(tracker.verdict_data.cache_info().currsize)"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout == "0\n"
    assert tracker.verdict_data() is tracker.verdict_data()


# -- Reasons

EXAMPLES: dict[str, tuple[list[Hit], Context]] = {
    "browser": ([hit()], NO_CONTEXT),
    "mail-client": ([hit(0, OUTLOOK)], NO_CONTEXT),
    "image-proxy": ([hit(0, GMAIL_PROXY)], NO_CONTEXT),
    "apple-mpp": ([hit(0, APPLE_MPP)], NO_CONTEXT),
    "gmail-prefetch": ([hit(0, GMAIL_PREFETCH)], NO_CONTEXT),
    "prefetch-header": ([hit(0, purpose="prefetch")], NO_CONTEXT),
    "some-signs": ([click(0, 1, OLD)], NO_CONTEXT),
    "many-signs": ([click(0, 1, OLD)], delivered(8)),
    "hidden-link": ([click(0, HIDDEN)], NO_CONTEXT),
    "with-hidden-link": ([click(0, HIDDEN), click(5)], NO_CONTEXT),
    "head": ([hit(0, method="HEAD")], NO_CONTEXT),
    "with-head": ([click(0, method="HEAD"), click(1)], NO_CONTEXT),
    "burst": (clicks(0, 1, 2), NO_CONTEXT),
    "too-soon": ([click()], delivered(1)),
    "after-scanner": ([*clicks(0, 1, 2), click(60)], NO_CONTEXT),
    "crowded": ([*CROWD, click()], NO_CONTEXT),
    "echo": ([click(0, 1, PHONE), click(5, 1, CHROME, CLOUD)], NO_CONTEXT),
    "filter-network": ([hit(0, address=EXCHANGE)], NO_CONTEXT),
    "gmail-sampling": ([click(0, 1, GMAIL_SAMPLING)], NO_CONTEXT),
    "scanner-word": ([hit(0, BARRACUDA)], NO_CONTEXT),
    "bot-word": ([hit(0, CURL)], NO_CONTEXT),
    "proxy-click": ([click(0, 1, GMAIL_PROXY)], NO_CONTEXT),
    "no-user-agent": ([hit(0, "")], NO_CONTEXT),
    "not-a-browser": ([hit(0, "acme-thing/1.0")], NO_CONTEXT),
    "forged-link": ([click(0, answer="404")], NO_CONTEXT),
    "own-address": ([hit(0, own=True)], NO_CONTEXT),
    "repeat": ([hit(), hit(1)], NO_CONTEXT),
    **{why: ([click(0, why=why)], NO_CONTEXT) for why in tracker.NAMING_REASONS},
}


@pytest.mark.parametrize("reason", sorted(EXAMPLES))
def test_every_reason_can_be_given_and_says_how_certain_it_is(reason: str) -> None:
    found = {judged.reason: judged for judged in tracker.judge(*EXAMPLES[reason])}
    assert reason in found
    assert found[reason].certainty == tracker.verdict_data().reasons[reason][0]


def test_every_reason_has_an_example_and_a_sentence_that_a_user_understands() -> None:
    assert set(tracker.verdict_data().reasons) == set(EXAMPLES)
    for code, (certainty, sentence) in tracker.verdict_data().reasons.items():
        assert certainty in (CERTAIN, PROBABLE), code
        assert re.fullmatch("[a-z]+(-[a-z]+)*", code), code
        assert sentence[0].isupper() and sentence.endswith("."), code
        assert len(sentence.split()) >= 3, code


def test_every_verdict_counts_as_something_and_can_be_given() -> None:
    given = {judged.verdict: judged for example in EXAMPLES.values() for judged in tracker.judge(*example)}
    assert set(given) == set(tracker.VERDICT_STATES)
    assert set(tracker.VERDICT_STATES.values()) == {PERSON, UNCONFIRMED, MACHINE, ASIDE} == set(tracker.STATE_NAMES)


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
    assert stage.rows("select event_type, reason from event_details order by event_type") == [
        ("click", expected),
        ("open", expected),
    ]


@pytest.mark.parametrize(
    "method, headers, expected",
    [
        pytest.param("GET", {"User-Agent": FIREFOX}, ("human", "browser"), id="a-browser"),
        pytest.param("HEAD", {"User-Agent": FIREFOX}, ("scanner", "head"), id="head"),
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
    assert stage.rows("select method, verdict, reason from event_details") == [(method, *expected)]


# -- Other people's user agents and sequences


def rows_of(shared: Path) -> list[dict[str, str]]:
    with (shared / "useragents.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def scenarios_of(shared: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (shared / "scenarios.jsonl").read_text(encoding="utf-8").splitlines()]


def test_user_agents_seen_by_others_are_put_on_the_right_side_and_in_the_right_class(shared: Path) -> None:
    """Person or not is what the numbers stand on; which program it was exactly matters less."""
    rows = rows_of(shared)
    found = [(row, tracker.judge_agent(row["user_agent"], OPEN)) for row in rows]
    people = ("human", "proxy")
    wrong_side = [(row, got) for row, got in found if (got.verdict in people) != (row["label"] in people)]
    wrong_class = [(row, got) for row, got in found if got.verdict != row["label"]]
    for row, got in wrong_class:
        print(row["label"], got.verdict, got.reason, row["user_agent"], sep="\t")
    assert len(rows) > 300
    assert len(wrong_side) <= 0.03 * len(rows)
    assert len(wrong_class) <= 0.08 * len(rows)


def spool_lines(scenario: dict[str, Any]) -> list[bytes]:
    """A scenario as `judge` reads it: what is known of the email, then its hits."""
    about = scenario["context"]
    email: dict[str, Any] = {"sent_at": NOW / 1000}
    if said := re.search(r"delivered \+([0-9]+) s", about):
        email["delivered_at"] = NOW / 1000 + int(said[1])
    if said := re.search(r"([0-9]+) links?", about):
        email["links"] = int(said[1]) + ("unsubscribe" in about)
    if said := re.search(r"session is at ([0-9.]+)", about):
        email["own_addresses"] = [said[1]]
    lines = [json.dumps({"email": email}).encode() + b"\n"]
    for number, each in enumerate(scenario["hits"]):
        uri, answer = "/k3v9x2mp/pixel/e1.gif", "pixel"
        if each["target"] != "open":
            name = each["target"]
            target = HIDDEN if name == "honeypot" else f"https://acme.com/{name.removeprefix('click:')}"
            uri = f"/k3v9x2mp/click/e1/{'s' * 16}/{tracker.encode_target(target)}"
            answer = {"honeypot": "hidden", "bad-token": "404"}.get(name, "302")
        fields = {"id": f"{number:024x}", "t": NOW / 1000 + each["t"], "method": each["method"], "uri": uri}
        fields |= {"host": "track.example.com", "ip": each["ip"], "ua": each["user_agent"], "answer": answer}
        lines.append(tracker.hit_line({**fields, "purpose": each["headers"].partition(": ")[2]}))
    return lines


def assert_right(scenario: dict[str, Any], found: list[tuple[str, str, str]]) -> None:
    """Compare verdict, reason and what it counts as with what a careful analyst says of each hit."""
    for wanted, (given, reason, counts_as) in zip(scenario["hits"], found, strict=True):
        assert given in wanted["accept"], (scenario["id"], wanted)
        # What repeats an open is a person's, and stands in no total: the scenario says so in its sum.
        assert (counts_as == "person") == (wanted["counts"] and reason != "repeat"), (scenario["id"], wanted)


def test_sequences_of_hits_are_judged_as_a_careful_analyst_does(shared: Path) -> None:
    scenarios = scenarios_of(shared)
    assert len(scenarios) == 10
    for scenario in scenarios:
        context, hits = tracker.read_hits_to_judge(spool_lines(scenario), scenario["id"])
        judged = tracker.judge(hits, context)
        assert_right(scenario, [(each.verdict, each.reason, tracker.STATE_NAMES[each.state]) for each in judged])


def test_the_command_judge_says_the_same_of_these_sequences(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for scenario in scenarios_of(shared):
        path = tmp_path / f"{scenario['id']}.jsonl"
        path.write_bytes(b"".join(spool_lines(scenario)))
        assert tracker.main(["--env", os.devnull, "judge", str(path), "--json"]) == 0
        out, err = capsys.readouterr()
        told = [json.loads(line) for line in out.splitlines()]
        assert_right(scenario, [(each["verdict"], each["reason"], each["counts_as"]) for each in told])
        assert err == ""


def test_no_string_of_theirs_stands_in_the_program(shared: Path) -> None:
    """Rules name products, words and shapes; a copied string of more than 40 characters would be the answer to a sample."""
    files = [ROOT / "tracker.py", *(ROOT / "templates").glob("*.txt")]
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    agents = {row["user_agent"] for row in rows_of(shared)}
    agents |= {each["user_agent"] for scenario in scenarios_of(shared) for each in scenario["hits"]}
    windows = {agent[start : start + 41] for agent in agents for start in range(len(agent) - 40)}
    assert len(windows) > 5_000
    assert sorted(window for window in windows if window in source) == []
