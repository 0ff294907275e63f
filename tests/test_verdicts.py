"""Verdicts: who made a hit, and why we think so. Each signal with what it must catch and, beside it, what it must not."""

from __future__ import annotations

import csv
import itertools
import json
import os
import random
import re
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import NOW, ROOT, Stage

import tracker
from tracker import ASIDE, CERTAIN, CLICK, MACHINE, NO_CONTEXT, OPEN, PERSON, PROBABLE, TYPES, UNCONFIRMED, Context, Hit

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
PHONE, OLD_PHONE = android("SM-S931B"), android("SM-G930F", version=80)
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
WHATSAPP = "WhatsApp/2.25.22.8 A"

HOME, OFFICE, CLOUD = "198.51.100.7", "203.0.113.9", "192.0.2.140"  # none is cut
OFFICES_NETWORK = "203.0.113.0"  # stored truncated
EXCHANGE = "40.107.218.12"  # of Exchange Online Protection, as the whole /24 is
PARTLY_BARRACUDA = "18.184.203.0"
HIDDEN = tracker.HIDDEN_TARGET
_ids = itertools.count(1)


def hit(seconds: float = 0, agent: str = CHROME, type_: int = OPEN, address: str = HOME, **more: Any) -> Hit:
    """A hit some seconds after the beginning of these tests, ordinary unless told otherwise."""
    fields: dict[str, Any] = {"mail_id": "k3v9x2mp", "key": "e1", "url": None, "host": "track.example.com", "why": ""}
    fields |= {"method": "GET", "purpose": "", "answer": "pixel" if type_ == OPEN else "302", **more}
    at = NOW + round(seconds * 1000)
    return Hit(id=f"{next(_ids):024x}", at=at, type=type_, address=address, agent=agent, **fields)


def click(seconds: float = 0, link: int | str = 1, agent: str = CHROME, address: str = HOME, **more: Any) -> Hit:
    url = link if isinstance(link, str) else f"https://acme.com/{link}"
    return hit(seconds, agent, CLICK, address, url=url, **more)


def clicks(*at: float, **more: Any) -> list[Hit]:
    """Clicks at these seconds, each on another link."""
    return [click(seconds, n, **more) for n, seconds in enumerate(at, 1)]


def told(judged: tracker.Judgement) -> str:
    return f"{judged.verdict} {judged.reason} {tracker.STATE_NAMES[judged.state]}"


def alone(one: Hit, context: Context = NO_CONTEXT) -> str:
    return told(tracker.judge([one], context)[0])


def reasons(hits: Sequence[Hit], context: Context = NO_CONTEXT) -> str:
    return " ".join(judged.reason for judged in tracker.judge(hits, context))


def amid_many(hits: Sequence[Hit], context: Context = NO_CONTEXT) -> list[tracker.Judgement]:
    """What is thought of hits that are a piece of a session of too many."""
    order = sorted(hits, key=tracker.in_order)
    judged = dict(zip(order, tracker.judge_crowd(order, context), strict=True))
    return [judged[each] for each in hits]


def delivered(before: float, said: bool = True) -> Context:
    """That the mail was delivered so many seconds before the beginning, as its sender said."""
    return Context(NOW - round(before * 1000), said)


registered = partial(delivered, said=False)  # and nobody said when it was sent


# -- One hit: what its user agent says

HUMAN_CLIENT, HUMAN_BROWSER = "human mail-client person", "human browser person"
PROXY, PROXY_CLICK = "proxy image-proxy person", "bot proxy-click machine"
BOT_WORD, SAMPLING = "bot bot-word machine", "scanner gmail-sampling machine"
NO_AGENT, NO_BROWSER = "bot no-user-agent machine", "bot not-a-browser machine"
SCANNER_WORD = "scanner scanner-word machine"
SOME, MANY = "unconfirmed some-signs unconfirmed", "scanner many-signs machine"

BROWSERS = [
    *(CHROME, EDGE, FIREFOX, f"  {FIREFOX}  ", FIREFOX.upper(), IPHONE, FIREFOX + " Cyberfox/52.9.1"),
    *(chrome(141, more=f" {vendor}/141.0.7") for vendor in ("Avast", "AVG", "Norton", "Avira", "CCleaner")),
    *(chrome(109, "Windows NT 6.1; Win64; x64"), f"Mozilla/5.0 ({LINUX}; rv:6.7) Goanna/20251001 PaleMoon/33.9"),
    *(
        "Opera/9.80 (J2ME/MIDP; Opera Mini/8.1; U; en) Presto/2.12",
        "Mozilla/4.0 (compatible; MSIE 8.0; Windows NT 6.1)",
    ),
    *("Lynx/2.9.2 libwww-FM/2.14", "w3m/0.5.4", "Links (2.31; Linux; text)"),
    # Phones whose names are words of machines, and browsers inside other programs
    *(android("CUBOT X90"), android("CUBOT_NOTE_40"), android("M2101K6G; wv", version=66)),
    *(android("SM-A556B; wv", more) for more in (" Instagram 410.1.0 Android", " [FB_IAB/FB4A;FBAV/540.0.0;]")),
    *(f"{IOS} Mobile/15E148{app}" for app in ("", " [FBAN/FBIOS;FBAV/5;]", " [LinkedInApp]/9.31", " Snapchat/13.6")),
    f"{IOS} GSA/390.0 Mobile/15E148 Safari/604.1",
    chrome(132, more=" Slack_SSB/4.45").replace("Safari", "Electron/35 Safari"),
    # A name without a version on a phone, agents that a reader cut short, televisions, consoles, the last century
    *(f"{IPHONE} Acme", android("SM-A556B", " AcmeMobile-Android"), android("K", " (Acme android@141.0.0.0)")),
    *("Mozilla/5.0 (Linux; Android 10)", f"AcmeTV/2.1 Mozilla/5.0 (Linux; Tizen 8.0) {WEBKIT} TV Safari/537.36"),
    *(
        "HbbTV/1.5.1 (+DRM;Acme;TV55)",
        "Acme/0.7 (Console; U; de-DE)",
        "acme browser/3.0",
        "Mozilla/6.0 (Amiga) Safari 3.1",
    ),
    *("Mozilla/3.0 (compatible; Acme/2.2; BeOS)", "Mozilla/5.0 (Macintosh; rv:9.3.0) Acme/20120101 AcmeFox"),
    "Mozilla/4.61 [en] (X11; U) - Acme (2.0)",
    # Names with spaces before all, brackets that were lost, telephones with keys, and what calls itself a browser
    *(f"Acme TV/1.0 {android('BOX')}", f"AcmeSign/8.2 (XT1)Mozilla/5.0 (X11; Linux aarch64) {WEBKIT} Chrome/99.0"),
    *(android("K").replace("(", "").replace(")", ""), "ACME_X2/V1 Linux/4.1 Android/10 Browser/AppleWebKit537.36"),
    *("Acme-V360/08.B7 MIB/2.2.1 Profile/MIDP-2.0 Configuration/CLDC-1.1", "AcmeBrowser/Mini2.8 (Phone/07.97)"),
    *(chrome(141, more=" ACMEBROWSER"), f"{chrome(101, LINUX)} TV"),
    f"Mozilla/5.0 (Console 4 PRO) {WEBKIT.replace('Gecko', 'Gecko, HEVC, UHD')} ACME/1.0",
]
MAIL_CLIENTS = [
    *(OUTLOOK, THUNDERBIRD, "Outlook-iOS/729.5", "Outlook-Android/2.1", "CamelHttpStream/1.0 Evolution/3.56"),
    "Microsoft Office/16.0 (Windows NT 10.0; Microsoft Outlook 16.0.18827; Pro)",
    *("MacOutlook/16.101 (Intelx64 Mac OS X Version 15.6)", "Microsoft Outlook/16.101 CFNetwork/1568 Darwin/24.6"),
    *("Mail/3826.700 CFNetwork/1568 Darwin/24.6", "Airmail 5.7 rv:712 (Macintosh; Mac OS X 15.6; de_DE)"),
    *(
        "Acme Mail/3.1 (Windows)",
        "Acme/413 (Macintosh; OS X 15.1)",
        "Acme 1.0 rv:14 (Android 16; Pixel 9)",
    ),  # in no list
    *("Nine/5.1.1", "Canary/500", "Android/14-email", "ZohoMail-Desktop/1.6", "PocoMail 4.9 (5000)", "Trojita/0.8"),
]
BOTS = [
    *(CURL, "Wget/1.25.0", "python-requests/2.32.5", "Go-http-client/2.0", "libwww-perl/6.79"),
    *(GOOGLEBOT, GOOGLEBOT.upper(), android("Pixel 9", " (compatible; AcmeBot/2.1)")),
    CHROME.replace("Chrome", "HeadlessChrome"),
    # Previews, and a proxy of a chat
    *(WHATSAPP, "Chat-LinkExpanding 2.1 (+https://chat.example/robots)"),
    *(f"Mozilla/5.0 ({WINDOWS}) {WEBKIT} BingPreview/1.0b", "Slack-ImgProxy (+https://api.slack.com/robots)"),
    # A host as a name, within the engine's brackets or before it, engines and models that drive a browser
    *(chrome(141, more=" acme.example.com/2.0"), chrome(141, more=" Match by acme.net"), "acme.io"),
    *(CHROME.replace("Gecko)", "Gecko, Acme)"), CHROME.replace("AppleWebKit", "Acme/6.0 AppleWebKit")),
    *(f"Mozilla/5.0 (linux) {WEBKIT} jsdom/22.1", chrome(141, more=" Agent-Acme/0.9"), "Acme (acme@gmail.com)"),
    *("Mozilla/5.0 (compatible; MSIE mutant; not Windows)", "AcmeImageProxy/2.0 python-requests/2.25"),
    *("StartpageImageProxy/3.0", "Mozilla/4.0 (compatible; Acme)", "EmailWolf 2.0"),
]
SECURITY = [
    BARRACUDA,
    "Acme-Link-Scanner/3.1",
    "Mozilla/5.0 (compatible; AcmeSecurity/2)",
    chrome(141, more=" AcmeVirusScan"),
]
SHAPELESS = [
    *("Mozilla/4.0", "Mozilla/5.0 (short)", "\\xff\\xfe"),
    *(chrome(141, more=more) for more in (" acme", " Acme-Renderer", " Acme Tester (63c85ddb)")),
    f"Mozilla/5.0 ({WINDOWS}) AcmeShell/6.0.0",
    *(CHROME.replace("Chrome", "Acme Chrome"), f"Mozilla/5.0 (Unknown; Linux x86_64) {WEBKIT} Acme/1.2"),
    *(f"{FIREFOX} Acme", CHROME.replace("(Windows", "(acme.tool; Windows"), CHROME.replace(WINDOWS, f"{LINUX}; Acme")),
    f"Acme/1.0 {CHROME}",
    *("acme-thing/1.0 build 7 of an unknown program", "Mozilla" * 73),  # the latter is as long as is kept
]
AGENTS: list[tuple[list[str], str, str]] = [  # what is thought of an open and of a click by each
    (BROWSERS, HUMAN_BROWSER, HUMAN_BROWSER),
    (MAIL_CLIENTS, HUMAN_CLIENT, HUMAN_CLIENT),
    (["", "   ", "-"], NO_AGENT, NO_AGENT),  # logs write a hyphen for nothing
    ([APPLE_MPP, APPLE_MPP + " "], "prefetch apple-mpp unconfirmed", NO_BROWSER),
    ([GMAIL_PREFETCH], "prefetch gmail-prefetch unconfirmed", SAMPLING),
    ([GMAIL_SAMPLING], SAMPLING, SAMPLING),
    ([chrome(42, more=" Edge/12.246")], SOME, SOME),
    (
        [GMAIL_PROXY, "(via ggpht.com)", YAHOO_PROXY, "Mozilla/5.0 AcmeEmailProxy/3", "Acme/9.1 (via mail.acme.org)"],
        PROXY,
        PROXY_CLICK,
    ),
    (SECURITY, SCANNER_WORD, SCANNER_WORD),
    (BOTS, BOT_WORD, BOT_WORD),
    (SHAPELESS, NO_BROWSER, NO_BROWSER),
]


@pytest.mark.parametrize("agents, as_open, as_click", AGENTS)
def test_an_agent_is_told_by_its_name_or_shape(agents: list[str], as_open: str, as_click: str) -> None:
    found = {agent: (alone(hit(0, agent)), alone(click(0, 1, agent))) for agent in agents}
    assert found == dict.fromkeys(agents, (as_open, as_click))


PIECES = (
    "mail-",
    ".mail_",
    "a.",
    "a@",
    "a.com",
    "(a",
    "; u",
    " a-",
    ") a/1",
    "a ",
    "@",
    "cfnetwork/",
    "safari/1",
    "(Windows NT",
    "mozilla/5.0 (",
    "rambler",
    "android ",
    "x11) a/1.",
    "a (a) ",
    "proxy",
    " browser",
)


@pytest.mark.parametrize("piece", PIECES)
def test_no_agent_takes_long_to_judge(piece: str) -> None:
    """Anybody may send one that is as long as is kept, and new each time."""
    begin = time.process_time()
    for n in range(100):
        agent = f"{n}{piece * tracker.MAX_AGENT}"[: tracker.MAX_AGENT]
        tracker.judge([click(n, 1, agent)])
        tracker.client_of(agent)
    assert time.process_time() - begin < 0.6  # a pattern that goes back and forth takes a second or more


# -- One hit: method, headers, address, answer

ODD = [FIREFOX, OUTLOOK, GMAIL_PROXY, APPLE_MPP, "", CURL, BARRACUDA, OLD, IPHONE, THUNDERBIRD]


def both(agent: str, **more: Any) -> set[str]:
    return {alone(hit(0, agent, **more)), alone(click(0, 1, agent, **more))}


@pytest.mark.parametrize("agent", ODD)
def test_head_is_never_a_person_and_the_senders_own_hits_are_set_aside(agent: str) -> None:
    assert both(agent, method="HEAD") == both(agent, method="HEAD", purpose="prefetch") == {"scanner head machine"}
    own = {"self own-address set_aside"} if agent != GMAIL_PROXY else {PROXY, PROXY_CLICK}  # all its readers are there
    assert both(agent, own=True) == own
    assert reasons(clicks(0, 0.1, 0.2, own=True)) == "own-address own-address own-address"
    assert alone(click(0, HIDDEN, method="HEAD", own=True)) == "self own-address set_aside"


@pytest.mark.parametrize("agent", [FIREFOX, THUNDERBIRD, IPHONE, CURL])
def test_a_hit_that_says_it_was_fetched_ahead_is_unconfirmed(agent: str) -> None:
    for purpose in ("prefetch", "Prefetch", "prefetch;prerender", "prerender", "preview"):
        assert both(agent, purpose=purpose) == {"prefetch prefetch-header unconfirmed"}
    for purpose in ("", "navigate", "image", "pre fetch"):
        assert both(agent, purpose=purpose) == both(agent)


NETWORKS: dict[str | None, list[str]] = {  # whether an address is a mail filter's
    CERTAIN: [
        *("40.107.218.12", "40.107.218.0", "40.93.1.1", "52.103.255.254", "52.238.78.88"),  # Exchange
        *("209.222.82.0", "18.184.203.230"),  # Barracuda
        *("2a01:111:f400::25", "2a01:111:f400::"),
    ],
    PROBABLE: ["52.238.78.0", PARTLY_BARRACUDA, "40.94.29.84", "40.94.0.0"],
    None: [
        *("40.95.0.1", "52.104.0.1", "52.238.78.89", "18.184.203.1", "2a01:111:f402::"),  # next to those
        "20.0.0.10",  # a Windows 365 desktop in Azure
        *("", "40.no-address"),  # not stored, and of a line that another program wrote
    ],
}


@pytest.mark.parametrize("address, expected", [(one, kind) for kind, some in NETWORKS.items() for one in some])
def test_a_mail_filters_network_is_proof_and_a_part_of_what_was_stored_is_a_sign(
    address: str, expected: str | None
) -> None:
    assert tracker.filter_network(address) == expected
    for agent, otherwise in ((EDGE, HUMAN_BROWSER), (OUTLOOK, HUMAN_CLIENT)):
        thought = {"scanner filter-network machine"} if expected == CERTAIN else {otherwise}
        assert both(agent, address=address) == thought
    # A proxy and a bot say themselves what they are.
    assert alone(hit(0, GMAIL_PROXY, address=address)) == PROXY
    assert alone(click(0, 1, CURL, address)) == BOT_WORD


@pytest.mark.parametrize("why", tracker.NAMING_REASONS)
def test_a_click_that_met_the_naming_page_is_set_aside_whoever_made_it(why: str) -> None:
    """The verdict stays, so that one sees whether people met the page; the state takes it out of every number."""
    for agent, verdict in ((FIREFOX, "human"), (CURL, "bot"), (OLD, "unconfirmed")):
        assert alone(click(0, 1, agent, why=why)) == f"{verdict} {why} set_aside"
        assert alone(click(0, 1, agent, why=why, method="HEAD")) == f"scanner {why} set_aside"
    burst, echo = clicks(0, 0.5, 1, why=why), [click(0, why=why), click(5, 1, IPHONE, CLOUD, why=why)]
    assert [told(each) for each in tracker.judge(burst)] == [f"scanner {why} set_aside"] * 3
    assert [told(each) for each in tracker.judge(echo)] == [f"human {why} set_aside", f"scanner {why} set_aside"]


def test_of_an_answer_and_its_reason_only_what_is_known_matters() -> None:
    """The spool may hold lines that another program wrote."""
    assert alone(click(0, answer="404", own=True)) == "scanner forged-link set_aside"
    assert alone(click(0, answer="named")) == HUMAN_BROWSER
    for why in ("no such reason", "<b>", "repeat"):
        assert alone(click(0, why=why)) == HUMAN_BROWSER
    assert alone(click(0, HIDDEN, IPHONE)) == "scanner hidden-link machine"
    assert alone(click(0, "https://acme.com/about:blank", IPHONE)) == HUMAN_BROWSER


# -- One hit: time, and signs that weigh together

TOO_SOON = "scanner too-soon machine"
DAY = 86_400
SIGNS = {  # seconds since delivery or registration, the browser, where from, what is thought of a click
    "a sign-in mail clicked after 8 s": (delivered(8), CHROME, HOME, HUMAN_BROWSER),
    "before anybody can read": (delivered(1.999), CHROME, HOME, TOO_SOON),
    "just not too soon": (delivered(2), CHROME, HOME, HUMAN_BROWSER),
    "in the moment of delivery": (delivered(0), CHROME, HOME, TOO_SOON),
    "before the time that was said": (delivered(-1), CHROME, HOME, HUMAN_BROWSER),
    "soon after registration alone": (registered(0.5), CHROME, HOME, HUMAN_BROWSER),
    "the same and 2 years old": (registered(0.5), TWO_YEARS_OLD, HOME, SOME),
    "half a sign and one": (registered(8), TWO_YEARS_OLD, HOME, HUMAN_BROWSER),
    "two signs": (delivered(8), TWO_YEARS_OLD, HOME, SOME),
    "early ends after a minute": (delivered(60), TWO_YEARS_OLD, HOME, HUMAN_BROWSER),
    "2 years old alone": (delivered(DAY), TWO_YEARS_OLD, HOME, HUMAN_BROWSER),
    "4 years old alone": (delivered(DAY), OLD, HOME, SOME),
    "4 years old and half a sign": (registered(8), OLD, HOME, SOME),
    "4 years old and early": (delivered(8), OLD, HOME, MANY),
    "partly a filter's network": (delivered(DAY), CHROME, PARTLY_BARRACUDA, HUMAN_BROWSER),
    "the same and early": (delivered(8), CHROME, PARTLY_BARRACUDA, SOME),
    "the same and 4 years old": (delivered(DAY), OLD, PARTLY_BARRACUDA, MANY),
    "safe links": (delivered(DAY), chrome(57, "Windows NT 6.1"), HOME, SOME),
    "an old edge": (delivered(8), chrome(79, more=" Edg/79.0.309.43"), HOME, MANY),
    "a bot needs no signs": (delivered(8), "", HOME, NO_AGENT),
}
OLD_WITH_PEOPLE = [
    # The last for old Windows and for two old Macs, and what is built on an old Chrome
    *(chrome(109, "Windows NT 6.1; Win64; x64"), chrome(103, "Macintosh; Intel Mac OS X 10_12_6"), chrome(116, MAC)),
    *(chrome(86, more=" QIHU 360SE"), chrome(94, more=" Core/1.94.2 QQBrowser/12.0")),
    chrome(87, LINUX).replace("Chrome", "QtWebEngine/5 Chrome"),
    # Phones, a Chromebook at its end, another browser, and a version to come
    *(OLD_PHONE, android("M2101K6G; wv", version=66), chrome(80, "X11; CrOS x86_64 12739")),
    *(FIREFOX.replace("145", "52"), chrome(999)),
]


@pytest.mark.parametrize("context, agent, address, expected", SIGNS.values(), ids=SIGNS)
def test_signs_of_a_scanner_weigh_together_on_a_click(
    context: Context, agent: str, address: str, expected: str
) -> None:
    assert alone(click(0, 1, agent, address), context) == expected


OPENED = {  # since when, the program, where from, what is thought of an open
    "half a second after delivery": (delivered(0.5), CHROME, HOME, SOME),
    "within a minute of it": (delivered(59.999), FIREFOX, HOME, SOME),
    "later": (delivered(60), FIREFOX, HOME, HUMAN_BROWSER),
    "nobody said when it was delivered": (registered(0.5), FIREFOX, HOME, HUMAN_BROWSER),
    "before the time that was said": (delivered(-1), CHROME, HOME, HUMAN_BROWSER),
    "2 years old": (delivered(DAY), TWO_YEARS_OLD, HOME, SOME),
    "never a machine's by signs alone": (delivered(0.5), OLD, PARTLY_BARRACUDA, SOME),
    "by no network alone": (delivered(DAY), CHROME, "40.94.29.84", HUMAN_BROWSER),
    "a mail program at once": (delivered(0.5), OUTLOOK, HOME, HUMAN_CLIENT),
    "a proxy at once": (delivered(0.5), GMAIL_PROXY, "40.94.29.84", PROXY),
    "phones are as old with people": (delivered(DAY), OLD_PHONE, HOME, HUMAN_BROWSER),
}


@pytest.mark.parametrize("context, agent, address, expected", OPENED.values(), ids=OPENED)
def test_a_browsers_open_at_once_or_with_an_old_one_is_doubtful(
    context: Context, agent: str, address: str, expected: str
) -> None:
    assert alone(hit(0, agent, OPEN, address), context) == expected
    assert told(tracker.judge([hit(0, agent, OPEN, address), click(90, 1, PHONE, OFFICE)], context)[0]) == expected


def test_what_is_old_with_people_is_no_sign() -> None:
    found = {agent: alone(click(0, 1, agent), delivered(8)) for agent in OLD_WITH_PEOPLE}
    assert found == dict.fromkeys(OLD_WITH_PEOPLE, HUMAN_BROWSER)
    assert {alone(hit(0, agent), delivered(DAY)) for agent in OLD_WITH_PEOPLE} == {HUMAN_BROWSER}


def test_a_browser_grows_old_with_the_hits_own_time_and_one_beyond_the_table_does_not() -> None:
    """So an old program of ours, whose table has no later year, takes nobody's new browser for an old one."""
    year = 365.25 * DAY
    assert [alone(click(n * year, 1, CHROME)) for n in range(6)] == [HUMAN_BROWSER] * 3 + [SOME] * 3
    newest = chrome(max(version for _, version in tracker.verdict_data().chrome_years))
    assert alone(click(20 * year, 1, newest)) == HUMAN_BROWSER


# -- Together

in_cloud = partial(clicks, address=CLOUD)  # a burst, or what may be one
BURST, OFFICE_BURST = in_cloud(0, 0.5, 1), clicks(0, 0.5, 1, address=OFFICES_NETWORK)  # a scanner's: too fast for hands
BURSTS = "burst burst burst"
HEAD, TRAPPED, NEXT = click(method="HEAD"), click(0, HIDDEN, address=CLOUD), "198.51.100.8"
PHONED, IPAD = click(0, 1, PHONE), IPHONE.replace("iPhone", "iPad")
LATE = [click(at, 9, FIREFOX, CLOUD) for at in (800, 1_600)]
TOGETHER: dict[str, tuple[Sequence[Hit], str] | tuple[Sequence[Hit], str, Context]] = {
    "fetched ahead, then visited": ([click(0, purpose="prefetch"), click(6)], "prefetch-header browser"),
    # A GET beside its HEAD is the same program
    "a get 10 s after its head": ([HEAD, click(10)], "head with-head"),
    "a get later": ([HEAD, click(10.001)], "head after-scanner"),
    "a get 10 s before its head": ([HEAD, click(-10)], "head with-head"),
    "a get longer before": ([HEAD, click(-10.001)], "head browser"),
    "a get of another link": ([HEAD, click(-1, 2)], "head browser"),
    "a get by another program": ([HEAD, click(-1, 1, IPHONE)], "head browser"),
    "a get from another address": ([HEAD, click(-1, 1, CHROME, OFFICE)], "head browser"),
    "a get of the pixel": ([HEAD, hit(-1)], "head with-scanner"),
    "a person next to it, minutes later": ([HEAD, click(0.4), click(300, 1, IPHONE, NEXT)], "head with-head browser"),
    # Bursts: links followed faster than a person can are a scanner's, the first as well as the last
    "3 links in 3 s": (clicks(0, 1.5, 3), "some-signs " * 3),
    "3 links in more": (clicks(0, 1.5, 3.001), "browser " * 3),
    "two tabs in one moment": (clicks(0, 0), "browser " * 2),
    "all links of the mail in 15 s": (clicks(0, 5, 10, 15), "some-signs " * 4, Context(links=4)),
    "all links in more": (clicks(0, 5, 10, 15.001), "browser " * 4, Context(links=4)),
    "all links but one": (clicks(0, 5, 10, 15), "browser " * 4, Context(links=5)),
    "nobody said how many there are": (clicks(0, 5, 10, 15), "browser " * 4),
    "both links of a mail of two": (clicks(0, 10), "browser " * 2, Context(links=2)),
    "one before and one after": (clicks(-4, 0, 0.5, 1, 7), "browser burst burst burst after-scanner"),
    "two bursts that share a click": (clicks(0, 2, 3, 5, 6), "some-signs " * 5),
    "3 clicks on 2 links in 1 s": ([click(0, 1), click(0.5, 2), click(1, 1)], "some-signs " * 3),
    "the same in more": ([click(0, 1), click(0.5, 2), click(1.001, 1)], "browser " * 3),
    "a link clicked three times in impatience": ([click(0), click(0.2), click(0.4)], "browser " * 3),
    "a double click and another link": ([click(0), click(0.3), click(2, 2)], "browser " * 3),
    "from many places": ([click(), click(1, 2, EDGE, OFFICE), click(2, 3, FIREFOX, CLOUD)], "burst " * 3),
    "an open amid it": ([*BURST, hit(1, OUTLOOK)], f"{BURSTS} mail-client"),
    "a click from elsewhere": ([*BURST, click(6, 2, FIREFOX)], f"{BURSTS} browser"),
    "a click long after it": ([*BURST, click(6), click(1_202, 2, address=CLOUD)], f"{BURSTS} browser browser"),
    "with two": ([click(0, 3, CHROME, EXCHANGE), click(1, 4, method="HEAD"), click(2, 5)], "filter-network head burst"),
    "bots make none": ([*in_cloud(0, 1, agent=CURL), click(2, 3)], "bot-word bot-word browser"),
    "scanners' names neither": ([*in_cloud(0, 1, agent=BARRACUDA), click(2, 3)], "scanner-word scanner-word browser"),
    # Clicks within 10 seconds of the hidden link, from whatever address
    "10 s after it": ([TRAPPED, click(10, 1, FIREFOX)], "hidden-link with-hidden-link"),
    "10 s before it": ([TRAPPED, click(-10, 1, FIREFOX)], "hidden-link with-hidden-link"),
    "longer after it": ([TRAPPED, click(10.001, 1, FIREFOX)], "hidden-link browser"),
    "an open beside it": ([TRAPPED, hit(1, THUNDERBIRD, address=OFFICE)], "hidden-link mail-client"),
    # What follows a scanner
    "a proxy beside a filter": ([*BURST, hit(60, GMAIL_PROXY, address=CLOUD)], f"{BURSTS} image-proxy"),
    "a mail program beside a filter": ([*BURST, hit(60, OUTLOOK, address=CLOUD)], f"{BURSTS} mail-client"),
    "its hits extend its 15 minutes": ([*BURST, *LATE], f"{BURSTS} after-scanner after-scanner"),
    "a person's do not": ([*BURST, click(800, 9), click(1_600, 9, FIREFOX, CLOUD)], f"{BURSTS} browser browser"),
    # A truncated address is many people's: the same program is the scanner, a colleague only doubtful
    "the same program there": ([*OFFICE_BURST, click(62, 9, CHROME, OFFICES_NETWORK)], f"{BURSTS} after-scanner"),
    "a colleague": ([*OFFICE_BURST, click(60, 9, FIREFOX, OFFICES_NETWORK)], f"{BURSTS} some-signs"),
    "a colleague's open": ([*OFFICE_BURST, hit(61, FIREFOX, address=OFFICES_NETWORK)], f"{BURSTS} browser"),
    "with one more sign": ([*OFFICE_BURST, click(60, 9, TWO_YEARS_OLD, OFFICES_NETWORK)], f"{BURSTS} many-signs"),
    # A scanner that changes its address is known by its program only if that is rare
    **{
        f"elsewhere, {name}": (
            [*in_cloud(0, 0.5, 1, agent=agent), click(60, 9, agent, address)],
            f"{BURSTS} {expected}",
        )
        for name, agent, address, expected in (
            ("a rare program", OLD, OFFICE, "after-scanner"),
            ("also one of two years", TWO_YEARS_OLD, OFFICE, "after-scanner"),
            ("a common one", CHROME, OFFICE, "browser"),
            ("old phones are common", OLD_PHONE, OFFICE, "browser"),
        )
    },
    # WhatsApp and iMessage fetch from the phone of whoever pastes the link
    **{
        f"a preview made on a phone, {address}": (
            [click(0, 1, preview, address), click(20, 1, IPHONE, address), click(30, 2, IPHONE, address)],
            "bot-word browser browser",
        )
        for address, preview in (
            (HOME, WHATSAPP),
            (OFFICES_NETWORK, f"{IPHONE} facebookexternalhit/1.1 Twitterbot/1.0"),
        )
    },
    # A click that repeats a person's at once, from elsewhere
    **{
        f"after a phone at home: {name}": ([PHONED, second], f"browser {expected}")
        for name, second, expected in (
            ("another address and another system", click(12, 1, CHROME, CLOUD), "echo"),
            ("15 s later", click(15, 1, CHROME, CLOUD), "echo"),
            ("later", click(15.001, 1, CHROME, CLOUD), "browser"),
            ("the same system", click(12, 1, PHONE.replace("141", "140"), CLOUD), "browser"),
            ("the same address", click(12, 1, CHROME, HOME), "browser"),
            ("another link", click(12, 2, CHROME, CLOUD), "browser"),
            ("a server with linux is no android", click(12, 1, FIREFOX, CLOUD), "echo"),
            ("addresses are not stored", click(12, 1, CHROME, ""), "browser"),
            ("with signs of its own", click(12, 1, OLD, CLOUD), "echo"),
            ("a bot says so itself", click(12, 1, CURL, CLOUD), "bot-word"),
            ("an open", hit(12, CHROME, OPEN, CLOUD), "browser"),
        )
    },
    "safe links tests, then lets one go": ([click(0, 1, OLD, CLOUD), click(3, 1, IPHONE)], "some-signs browser"),
    "after a filter's network": ([click(0, 1, CHROME, EXCHANGE), click(3, 1, IPHONE)], "filter-network browser"),
    "of an echo there is none": (
        [PHONED, click(12, 1, CHROME, CLOUD), click(24, 1, IPAD, OFFICE)],
        "browser echo browser",
    ),
    "an ipad is an iphone": ([click(0, 1, IPHONE), click(5, 1, IPAD, CLOUD)], "browser browser"),
    # Opens by the same program within a minute of the first are one: one each 50 seconds would else never count again
    "repeats are told from the first": (
        [hit(at, YAHOO_PROXY, address=f"192.0.2.{n}") for n, at in enumerate((0, 12, 60, 60.001, 110, 121))],
        "image-proxy repeat repeat image-proxy repeat image-proxy",
    ),
    "a bot's": ([hit(at, CURL) for at in (0, 1, DAY)], "bot-word repeat bot-word"),
    "another program": ([hit(0, OUTLOOK), hit(1, IPHONE)], "mail-client browser"),
    "clicks": ([click(0), click(0.3)], "browser browser"),
    "what is set aside is no first": ([hit(0, own=True), hit(1)], "own-address browser"),
    "another verdict": ([hit(0, purpose="prefetch"), hit(1)], "prefetch-header browser"),
    # Sessions
    "15 minutes of quiet": ([*BURST, click(901, address=CLOUD)], "burst burst burst after-scanner"),
    "more of it ends a session": ([*BURST, click(901.001, address=CLOUD)], "burst burst burst browser"),
}


@pytest.mark.parametrize("row", TOGETHER.values(), ids=TOGETHER)
def test_a_hit_is_judged_in_the_light_of_its_neighbours_in_whatever_order(row: tuple[Any, ...]) -> None:
    hits, expected, *context = row
    assert reasons(hits, *context).split() == expected.split()
    assert tracker.judge(hits[::-1], *context) == tracker.judge(hits, *context)[::-1]


READ, READ_BY_PROXY = hit(-300, OUTLOOK), hit(-300, GMAIL_PROXY, address=CLOUD)
TABS = clicks(0, 1.5, 3)
HUMAN, UNSURE, SCANNER = "human browser person", "unconfirmed some-signs unconfirmed", "scanner burst machine"
SWEEPS: dict[str, tuple[list[Hit], Context, str]] = {  # hits, what is known of the mail, what is thought of all clicks
    "three tabs, opened there": ([READ, *TABS], NO_CONTEXT, HUMAN),
    "or in gmail, wherever that is": ([READ_BY_PROXY, *TABS], NO_CONTEXT, HUMAN),
    "opened somewhere else": ([hit(-300, OUTLOOK, address=OFFICE), *TABS], NO_CONTEXT, UNSURE),
    "not opened in this session": (TABS, delivered(DAY), UNSURE),
    "opened after that": ([*TABS[:2], hit(2.9, OUTLOOK), TABS[2]], NO_CONTEXT, UNSURE),
    "apple loaded the images": ([hit(-300, APPLE_MPP), *TABS], NO_CONTEXT, UNSURE),
    "soon after delivery": (TABS, delivered(20), SCANNER),
    "soon, but opened there": ([hit(-5, OUTLOOK), *TABS], delivered(20), UNSURE),
    "soon, but opened there by a browser": ([hit(-5), *TABS], delivered(20), UNSURE),
    "one before the minute ends is enough": (TABS, delivered(59), SCANNER),
    "two years old": (clicks(0, 1.5, 3, agent=TWO_YEARS_OLD), NO_CONTEXT, SCANNER),
    "two years old, opened there": ([READ, *clicks(0, 1.5, 3, agent=TWO_YEARS_OLD)], NO_CONTEXT, UNSURE),
    "three in a second": (clicks(0, 0.5, 1), NO_CONTEXT, SCANNER),
    "three in a second, opened there": ([READ, *clicks(0, 0.5, 1)], NO_CONTEXT, UNSURE),
    "four in a second, opened there": ([READ, *clicks(0, 0.3, 0.6, 1)], NO_CONTEXT, SCANNER),
    "from several addresses": (
        [click(0, 1), click(1, 2, CHROME, NEXT), click(2, 3, EDGE, OFFICE)],
        NO_CONTEXT,
        SCANNER,
    ),
    "all links in 15 s, opened there": ([READ, *clicks(0, 5, 10)], Context(links=3), HUMAN),
    "all links in 15 s": (clicks(0, 5, 10), Context(links=3), UNSURE),
    "all links in 15 s, soon": (clicks(0, 5, 10), Context(NOW - 20_000, True, 3), SCANNER),
    "in a network with a filter": ([READ, *clicks(0, 1.5, 3, address=PARTLY_BARRACUDA)], NO_CONTEXT, SCANNER),
    "two by a current browser": (clicks(0, 0.1), delivered(DAY), HUMAN),
    "two by one of two years": (clicks(0, 3, agent=TWO_YEARS_OLD), delivered(DAY), SOME),
    "two with more between": (clicks(0, 3.001, agent=TWO_YEARS_OLD), delivered(DAY), HUMAN),
    "two of two years near a filter": (clicks(0, 3, agent=TWO_YEARS_OLD, address="40.94.1.2"), NO_CONTEXT, MANY),
}


@pytest.mark.parametrize("hits, context, expected", SWEEPS.values(), ids=SWEEPS)
def test_a_sweep_is_a_scanners_only_where_something_else_speaks_for_it(
    hits: list[Hit], context: Context, expected: str
) -> None:
    judged = zip(hits, tracker.judge(hits, context), strict=True)
    assert {told(each) for one, each in judged if one.type == CLICK} == {expected}


FASTER = in_cloud(0, 0.3, 0.6, 0.9)
OWN_LOOK = click(0, 1, "Mozilla/5.0 (Windows NT 10.0) AppleWebKit/537.36 (KHTML, like Gecko) Edg/150.0 OneOutlook/1.26")
TAKEN_BACK: dict[str, tuple[list[Hit], str]] = {  # opens beside what only scanners do, and what is thought of all
    "before and after a sweep": (
        [hit(-400, address=CLOUD), *FASTER, hit(400, address=CLOUD)],
        f"with-scanner burst {BURSTS} after-scanner",
    ),
    "before the hidden link": ([hit(-400, address=CLOUD), TRAPPED], "with-scanner hidden-link"),
    "by another program there": ([hit(-400, FIREFOX, address=CLOUD), *FASTER], f"browser burst {BURSTS}"),
    "by the same from elsewhere": ([hit(-400), *BURST], f"browser {BURSTS}"),
    "in another session": ([hit(-901, address=CLOUD), *BURST], f"browser {BURSTS}"),
    "no addresses, a current browser": (
        [hit(-400, address=""), *clicks(0, 0.3, 0.6, 0.9, address="")],
        f"browser burst {BURSTS}",
    ),
    "no addresses, an old one": (
        [hit(-400, TWO_YEARS_OLD, address=""), *clicks(0, 0.5, 1, address="", agent=TWO_YEARS_OLD)],
        f"with-scanner {BURSTS}",
    ),
    "a proxy's never": ([hit(-400, GMAIL_PROXY, address=CLOUD), *FASTER], f"image-proxy burst {BURSTS}"),
    "nor that of who opens tabs": ([hit(-300), *TABS], "browser browser browser browser"),
    "after a doubtful sweep": ([*TABS, hit(60)], "some-signs some-signs some-signs browser"),
    "a mail program's own look at a link": ([OWN_LOOK, click(1.5, 1, EDGE)], "look-up browser"),
    "from the same place only": ([OWN_LOOK, click(1.5, 1, EDGE, OFFICE)], "mail-client browser"),
    "of the same link only": ([OWN_LOOK, click(1.5, 2, EDGE)], "mail-client browser"),
    "10 seconds later at most": ([OWN_LOOK, click(10, 1, EDGE), click(20.001, 1, EDGE)], "look-up browser browser"),
    "later is another click": ([OWN_LOOK, click(10.001, 1, EDGE)], "mail-client browser"),
    "the browser comes second": ([OWN_LOOK, click(-1, 1, EDGE)], "mail-client browser"),
}


@pytest.mark.parametrize("hits, expected", TAKEN_BACK.values(), ids=TAKEN_BACK)
def test_a_scanners_program_opened_nothing_and_a_mail_programs_look_up_is_no_click(
    hits: list[Hit], expected: str
) -> None:
    assert reasons(hits).split() == expected.split()
    assert tracker.judge(hits[::-1]) == tracker.judge(hits)[::-1]


def test_what_spoke_for_and_against_a_person_is_known_of_each_hit() -> None:
    hits = [hit(-900, OLD), hit(0, OUTLOOK), *TABS, hit(5, CURL), click(3_600, 1, TWO_YEARS_OLD, PARTLY_BARRACUDA)]
    tabs, late = ["current", "later", "several", "opened-there"], ["old", "later", "perhaps-filter"]
    assert tracker.explain(hits, Context(NOW - 930_000, True)) == [
        *(["very-old", "soon"], ["current", "later"], *[tabs] * 3, [], late),
    ]
    told = tracker.explain([*BURST, click(60, 1, FIREFOX, CLOUD)], registered(30))
    swept = ["current", "soon-registered", "several", "not-opened-there", "fast"]
    assert told == [swept] * 3 + [["current", "later"]]
    assert tracker.explain([*CROWD, click()], NO_CONTEXT) == [["current"]] * 51


FOLLOWED = {
    "hidden-link": [TRAPPED],
    "head": [click(0, method="HEAD", address=CLOUD)],
    "burst": in_cloud(0, 0, 0),
    **{agent[-30:]: in_cloud(0, agent=agent) for agent in (GMAIL_SAMPLING, BARRACUDA, CURL)},
}


@pytest.mark.parametrize("scanner", FOLLOWED.values(), ids=FOLLOWED)
def test_what_comes_from_a_scanners_address_within_15_minutes_is_its_too(scanner: list[Hit]) -> None:
    late = [click(899, 7, FIREFOX, CLOUD), hit(900, IPHONE, address=CLOUD)]
    found = reasons([click(-20, 7, FIREFOX, CLOUD), *scanner, *late]).split()
    assert (found[0], *found[-2:]) == ("browser", "after-scanner", "after-scanner")
    for other in (click(900.001, 7, FIREFOX, CLOUD), click(20, 7, FIREFOX, OFFICE)):
        assert reasons([*scanner, other]).endswith("browser")


# -- Sessions of too many hits

CROWDED, CROWDED_MACHINE = "unconfirmed crowded unconfirmed", "scanner crowded machine"
CROWD = [hit(60 + n, OUTLOOK, address=f"10.0.{n}.7") for n in range(50)]  # as many as are judged together


@pytest.mark.parametrize("methods", [["GET"], ["HEAD", "GET"]], ids=" and ".join)
@pytest.mark.parametrize("links", [40, 50, 51, 70, 300])
def test_no_click_of_a_sweep_is_a_persons_however_many_links_it_has(links: int, methods: list[str]) -> None:
    asked = [(link, method) for link in range(links) for method in methods]
    hits = [click(n / len(asked), link, method=method) for n, (link, method) in enumerate(asked)]
    together = "with-head" if "HEAD" in methods else "burst"
    assert set(reasons(hits).split()) - {"head"} == {"crowded" if len(hits) > tracker.MAX_SESSION else together}
    assert {judged.state for judged in tracker.judge(hits)} == {MACHINE}
    spread = [each._replace(address=f"192.0.2.{n % 250}", agent=chrome(150 + n)) for n, each in enumerate(hits)]
    assert PERSON not in {judged.state for judged in tracker.judge(spread)}


AMID_MANY = {  # clicks that come with those, and what is thought of the first
    "alone": ([click()], CROWDED),
    "with two other links": (clicks(0, 0, 0), CROWDED),
    "with three in the same moment": (clicks(0, 0, 0, 0), CROWDED_MACHINE),
    "before and after": (clicks(0, -3, 3, 3), CROWDED_MACHINE),
    "the third comes late": (clicks(0, 0, 0, 3.001), CROWDED),
    "few links": ([click(0, 1), click(0, 1), *(click(1, 2) for _ in range(5))], CROWDED),
    "one program": ([click(n, n, CHROME, f"10.0.0.{n}") for n in range(4)], CROWDED_MACHINE),
    "one address": ([click(n, n, chrome(141 + n), OFFICE) for n in range(4)], CROWDED_MACHINE),
    "no address": ([click(n, n, chrome(141 + n), "") for n in range(4)], CROWDED),
    "by head": ([click(), *(click(1, n, method="HEAD") for n in range(2, 5))], CROWDED_MACHINE),
    "20 hits away": ([click(0, 9), *(hit(n / 50) for n in range(1, 17)), *clicks(1, 1, 1, 1)], CROWDED_MACHINE),
    "20 hits before": ([click(2, 9), *(hit(1 + n / 50) for n in range(1, 17)), *clicks(1, 1, 1, 1)], CROWDED_MACHINE),
    "one more after it": ([click(0, 9), *(hit(n / 50) for n in range(1, 18)), *clicks(1, 1, 1, 1)], CROWDED),
    "one more before it": ([click(2, 9), *(hit(1 + n / 50) for n in range(1, 18)), *clicks(1, 1, 1, 1)], CROWDED),
    "signs of its own": ([click(0, 1, OLD)], SOME),
    "a bot": ([click(0, 1, CURL)], BOT_WORD),
    "an open, and again": ([hit(1), hit(0)], HUMAN_BROWSER),
    "on the naming page": ([click(why="suspended")], "unconfirmed suspended set_aside"),
    "a scanner there": (clicks(0, 0, 0, 0, why="suspended"), "scanner suspended set_aside"),
}


@pytest.mark.parametrize("hits, expected", AMID_MANY.values(), ids=AMID_MANY)
def test_among_too_many_hits_no_click_is_certainly_a_persons(hits: list[Hit], expected: str) -> None:
    first, *others = tracker.judge([*hits, *CROWD])
    assert told(first) == expected
    assert amid_many(hits)[0] == first
    assert {judged.reason for judged in others[len(hits) - 1 :]} == {"mail-client"}


def test_a_session_has_too_many_hits_from_the_51st_on_and_another_has_not() -> None:
    assert tracker.MAX_SESSION == 50
    assert reasons([*CROWD[1:], click()]).endswith("browser")
    assert reasons([*CROWD, click(), *clicks(90_000, 90_000, 90_001)]).endswith("crowded burst burst burst")


def test_a_key_that_very_many_people_read_makes_no_machines_of_them() -> None:
    dice = random.Random(5)
    hits = []
    for n in range(3_000):
        agent, address = dice.choice((CHROME, EDGE, IPHONE, PHONE, FIREFOX)), f"10.{n % 250}.{n // 250}.9"
        at = dice.random() * 6 * 3_600
        hits += [hit(at, agent, address=address), click(at + 9, dice.randrange(8), agent, address)]
    judged = tracker.judge(hits)
    assert ({each.state for each in judged[::2]}, {each.state for each in judged[1::2]}) == ({PERSON}, {UNCONFIRMED})


PROGRAMS = (CHROME, OLD, PHONE, IPHONE, OUTLOOK, GMAIL_PROXY, YAHOO_PROXY, APPLE_MPP, BARRACUDA, CURL, GMAIL_SAMPLING)


def sequence(dice: random.Random, number: int, agents: Sequence[str] = PROGRAMS) -> list[Hit]:
    """Many hits of one email in a row, most of them close together, of every kind that matters to others."""
    at, made = 0.0, []
    for _ in range(number):
        at += dice.choice((0, 0, 0.001, 0.01, 0.3, 2, 20, 400))
        agent, address = dice.choice(agents), dice.choice((HOME, OFFICE, CLOUD, EXCHANGE, ""))
        more = {"method": dice.choice(("GET",) * 6 + ("HEAD",)), "own": dice.random() < 0.05}
        more |= {"purpose": dice.choice(("",) * 8 + ("prefetch",)), "why": dice.choice(("",) * 8 + ("suspended",))}
        link = dice.choice((1, 1, 1, 1, 2, 2, 3, 4, 5, 6, 7, HIDDEN))
        is_click = dice.random() < 0.6
        made.append(click(at, link, agent, address, **more) if is_click else hit(at, agent, OPEN, address, **more))
    return made


def test_of_a_piece_of_a_crowded_session_is_said_what_is_said_in_the_whole_and_in_any_order() -> None:
    dice, seen = random.Random(20261126), set()
    for _ in range(20):
        hits = sequence(dice, 300, (CHROME, EDGE, PHONE, OLD, CURL))
        whole = dict(zip(hits, tracker.judge(hits), strict=True))
        seen |= {told(judged) for judged in whole.values()}
        shuffled = dice.sample(hits, 300)
        assert dict(zip(shuffled, tracker.judge(shuffled), strict=True)) == whole
        times = [each.at for each in hits]
        for n in range(0, 300, 25):
            begin, end = times.index(times[n]), 300 - times[::-1].index(times[n])
            piece = dice.sample(near := hits[max(begin - 21, 0) : end + 21], len(near))
            found = dict(zip(piece, amid_many(piece), strict=True))
            assert [found[each] for each in hits[begin:end]] == [whole[each] for each in hits[begin:end]]
    assert seen >= {CROWDED, CROWDED_MACHINE, SOME}


def test_any_number_of_hits_is_judged_in_time() -> None:
    """Twenty thousand, in sessions as long as are judged together, and in one: in squares that would be minutes."""
    begin = time.process_time()
    gaps = [n // 50 * 10_000 + n % 50 / 4 for n in range(20_000)]
    tracker.judge([click(at, 1, (PHONE, CHROME)[n % 2], f"10.0.{n % 256}.1") for n, at in enumerate(gaps)])
    tracker.judge([click(n / 10, n) for n in range(20_000)])
    tracker.judge([click(n // 10_000, n) for n in range(20_000)])
    assert time.process_time() - begin < 10


# -- What was judged for good

FIXED = {  # what is fixed, what comes with it, what that is thought to be
    "a person beside one": ("human browser", [click(2, 2)], "browser"),
    "one of a burst": ("human browser", [click(1, 2), click(2, 3)], "burst burst"),
    "a scanner of a burst": ("scanner filter-network", [click(1, 2), click(2, 3)], "burst burst"),
    "a bot makes no burst": ("bot bot-word", [click(1, 2), click(2, 3)], "browser browser"),
    "the hidden link": ("scanner hidden-link", [click(1, 2)], "with-hidden-link"),
    "a head of whom nobody knows": ("scanner head", [click(1)], "browser"),
    "a scanner without an address": ("scanner burst", [hit(60)], "browser"),
    "no echo of nowhere": ("human browser", [click(5, 1, PHONE, CLOUD)], "browser"),
}


@pytest.mark.parametrize("judged, others, expected", FIXED.values(), ids=FIXED)
def test_what_was_cut_keeps_its_verdict_and_others_see_that_only(judged: str, others: list[Hit], expected: str) -> None:
    kept = tracker.judgement_of(*judged.split())
    cut = click(agent="", address="", fixed=kept)
    assert reasons([cut, *others], delivered(1)) == f"{kept.reason} {expected}"
    assert tracker.judge([cut], delivered(1)) == amid_many([cut]) == [kept]


def test_no_rule_changes_what_is_fixed() -> None:
    """Whatever its neighbours are; some agents and addresses may still be there."""
    dice = random.Random(20261127)
    pairs = ("human", "browser"), ("proxy", "repeat"), ("scanner", "head"), ("unconfirmed", "suspended")
    thought = [tracker.judgement_of(*pair) for pair in pairs]
    for number in (2, 10, 40, 60) * 25:
        hits = [each._replace(fixed=dice.choice([*thought, None, None])) for each in sequence(dice, number)]
        judged = (amid_many if dice.random() < 0.2 else tracker.judge)(hits, Context(links=3))
        assert all(each.fixed in (None, kept) for each, kept in zip(hits, judged, strict=True))


def test_the_order_in_which_hits_are_given_does_not_matter() -> None:
    dice, seen = random.Random(20261125), set()
    for _ in range(400):
        context = dice.choice((NO_CONTEXT, delivered(5), Context(links=3)))
        hits = sequence(dice, dice.randrange(2, 40), dice.choice((PROGRAMS, (PHONE, CHROME))))
        hits += [each._replace(at=each.at + DAY * 1000) for each in dice.sample(hits, len(hits) // 2)]
        # Hits that are alike have one judgement or several, which of them has which is nobody's business.
        expected = sorted(zip(map(tracker.in_order, hits), tracker.judge(hits, context), strict=True))
        seen |= {judged.reason for _, judged in expected}
        for _ in range(4):
            dice.shuffle(hits)
            assert sorted(zip(map(tracker.in_order, hits), tracker.judge(hits, context), strict=True)) == expected
    assert seen >= {"burst", "with-hidden-link", "with-head", "after-scanner", "echo", "repeat", "some-signs"}
    assert seen >= {"with-scanner", "look-up", "many-signs"}
    assert tracker.judge([]) == []


# -- The data


def test_the_data_says_each_thing_once_and_words_in_lower_case() -> None:
    programs, years = tracker.verdict_data().programs, tracker.verdict_data().chrome_years
    names = [name for each in programs for name in each.names]
    patterns = [each.pattern.pattern for each in programs if each.pattern]
    assert sorted(names) == sorted({name.strip().lower() for name in names})
    assert sorted(patterns) == sorted({re.sub(r"(?<!\\)[A-Z]", "", pattern) for pattern in patterns})
    rules = {rule for each in programs for rule in each.section.split(", ")} - {"family"}
    assert {rule.split()[0] for rule in rules} <= set(tracker.VERDICT_STATES)
    assert all(tracker.sentence_of(rule.split()[1]) for rule in rules)
    assert years == sorted(years) and [year for year, _ in years] == list(range(2014, years[-1][0] + 1))


def test_every_reason_and_every_verdict_is_given_above_and_said_in_a_sentence() -> None:
    examples: list[tuple[Any, ...]] = [([*CROWD, click()],), *((row[0], *row[2:]) for row in TOGETHER.values())]
    examples += [([make(agent=agents[0])],) for agents, *_ in AGENTS for make in (hit, click)]
    examples += [([click(agent=agent, address=address)], about) for about, agent, address, _ in SIGNS.values()]
    examples += [([click(answer="404")],), *((hits,) for hits, _ in TAKEN_BACK.values())]
    examples += [([click(why=why)],) for why in tracker.NAMING_REASONS]
    pairs = [pair for hits, *about in examples for pair in zip(hits, tracker.judge(hits, *about), strict=True)]
    given, of = {judged.reason: judged for _, judged in pairs}, {(judged.reason, one.type) for one, judged in pairs}
    given["undated"] = tracker.judgement_of("unconfirmed", "undated")  # which the spool gives
    assert set(given) == set(tracker.verdict_data().reasons)
    rows = re.findall("^([a-z-]+)  +[a-z, ]+?  +(opens|clicks|both)  ", tracker.help_text("numbers"), re.MULTILINE)
    types = {(reason, TYPES[type_]) for reason, type_ in of}
    assert types <= {
        (reason, type_) for reason, said in rows for type_ in ("open", "click") if said in (f"{type_}s", "both")
    }
    assert {judged.verdict for judged in given.values()} == set(tracker.VERDICT_STATES)
    assert set(tracker.VERDICT_STATES.values()) == {PERSON, UNCONFIRMED, MACHINE, ASIDE} == set(tracker.STATE_NAMES)
    for code, (certainty, sentence) in tracker.verdict_data().reasons.items():
        assert given[code].certainty == certainty and certainty in (CERTAIN, PROBABLE), code
        assert re.fullmatch("[a-z]+(-[a-z]+)*", code), code
        assert re.fullmatch(r"[A-Z].*\.", sentence) and len(sentence.split()) >= 3, code
    assert tracker.judgement_of("human", "of-another-version").certainty == PROBABLE
    assert tracker.sentence_of("of-another-version") == ""


# -- From the request to the event

AHEAD = [
    *({"Sec-Purpose": purpose} for purpose in ("prefetch", "prefetch;prerender")),
    *({name: "prefetch"} for name in ("Purpose", "X-Purpose", "X-Moz")),
]


def test_an_event_is_stored_with_the_verdict_that_its_request_deserves(stage: Stage) -> None:
    for n, headers in enumerate([{}, {"Sec-Purpose": ""}, {"Sec-Fetch-Dest": "image"}, *AHEAD]):
        about = {"User-Agent": FIREFOX, **headers}
        stage.web.get(f"/{stage.acme.mail_id}/pixel/e{n}.gif", headers=about)
        stage.web.get(f"/{stage.acme.mail_id}/click/e{n}?url=https://acme.com/", headers=about, status=302)
    stage.web.head(f"/{stage.acme.mail_id}/pixel/head.gif", headers={"User-Agent": FIREFOX})
    stage.drain()
    found = [reason for (reason,) in stage.rows("select reason from event_details order by key, type")]
    assert found == ["browser"] * 6 + ["prefetch-header"] * 10 + ["head"]


# -- Other people's user agents and sequences

PEOPLE = ("human", "proxy")


def rows_of(shared: Path) -> list[dict[str, str]]:
    """Of both lists, each row with the list it is in."""
    found = []
    for name in ("useragents.tsv", "useragents2.tsv"):
        with (shared / name).open(encoding="utf-8", newline="") as file:
            found += [{**row, "list": name} for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    return found


def scenarios_of(shared: Path, name: str = "scenarios.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (shared / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name, wrong", [("useragents.tsv", 0), ("useragents2.tsv", 0.015)])
def test_user_agents_seen_by_others_are_put_on_the_right_side_and_in_the_right_class(
    shared: Path, name: str, wrong: float
) -> None:
    """Person or not is what the numbers stand on; which program it was exactly matters less."""
    rows = [(row["label"], row["user_agent"]) for row in rows_of(shared) if row["list"] == name]
    judged = [(label, tracker.judge_agent(agent, OPEN).verdict) for label, agent in rows]
    assert len(rows) > 300
    assert len([1 for label, found in judged if (found in PEOPLE) != (label in PEOPLE)]) <= wrong * len(rows)
    assert len([1 for label, found in judged if found != label]) <= 0.08 * len(rows)


def words_of_agents() -> Iterator[tuple[str, str, Any]]:
    """Each word and each pattern of agents.txt: what it makes of an open, and whether it fits an agent."""
    section = ""
    for line in (ROOT / "templates" / "agents.txt").read_text(encoding="utf-8").splitlines():
        section = line[1:-1].split()[0] if line.startswith("[") else section
        _, is_rule, words = line.partition(" = ")
        for word in words.split(", ") if is_rule and section != "family" and not line.startswith("#") else ():
            yield section, word, re.compile(word[1:-1] if word.startswith("/") else re.escape(word)).search


@pytest.mark.parametrize("fifth", range(5))
def test_the_rules_hold_for_agents_that_they_were_not_written_for(shared: Path, fifth: int) -> None:
    """Without the words that fit agents of one fifth of the lists only, that fifth is judged nearly as well."""
    words = [(section, fits) for section, _, fits in words_of_agents()]
    rows = [(row["label"] in PEOPLE, row["user_agent"].strip().lower()) for row in rows_of(shared)]
    fitting = [[n for n, (_, fits) in enumerate(words) if fits(agent)] for _, agent in rows]
    only = set().union(*fitting[fifth::5])
    only -= set().union(*(some for n, some in enumerate(fitting) if n % 5 != fifth))
    firsts = [next(n for n in some if n not in only) for some in fitting[fifth::5]]
    right = [(words[n][0] in PEOPLE) == is_person for n, (is_person, _) in zip(firsts, rows[fifth::5], strict=True)]
    print(f"fifth {fifth}: {len(only)} words left out, {sum(right)} of {len(right)} right")
    assert sum(right) >= 0.96 * len(right)


def spool_lines(scenario: dict[str, Any]) -> Iterator[bytes]:
    """A scenario as `judge` reads it: what is known of the email, then its hits."""
    about = scenario.get("context", "delivered +0 s")
    email: dict[str, Any] = {"sent_at": NOW / 1000, "links": scenario.get("links")}
    if said := re.search(r"delivered \+([0-9]+) s", about):
        email["delivered_at"] = NOW / 1000 + int(said[1])
    if said := re.search(r"([0-9]+) links?", about):
        email["links"] = int(said[1]) + ("unsubscribe" in about)
    if said := re.search(r"session is at ([0-9.]+)", about):
        email["own_addresses"] = [said[1]]
    yield json.dumps({"email": email}).encode() + b"\n"
    for number, each in enumerate(scenario["hits"]):
        uri, answer, name = "/k3v9x2mp/pixel/e1.gif", "pixel", each["target"]
        if name != "open":
            target = HIDDEN if name == "honeypot" else f"https://acme.com/{name.removeprefix('click:')}"
            uri = f"/k3v9x2mp/click/e1/{'s' * 16}/{tracker.encode_target(target)}"
            answer = {"honeypot": "hidden", "bad-token": "404"}.get(name, "302")
        fields = {"id": f"{number:024x}", "t": NOW / 1000 + each["t"], "method": each["method"], "uri": uri}
        fields |= {"host": "track.example.com", "ip": each["ip"], "ua": each["user_agent"], "answer": answer}
        yield tracker.hit_line({**fields, "purpose": each.get("headers", "").partition(": ")[2]})


def test_the_command_judge_says_of_sequences_of_hits_what_a_careful_analyst_does(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenarios = [*scenarios_of(shared), *scenarios_of(shared, "scenarios2.jsonl")]
    assert len(scenarios) == 18
    for scenario in scenarios:
        path = tmp_path / f"{scenario['id']}.jsonl"
        path.write_bytes(b"".join(spool_lines(scenario)))
        assert tracker.main(["--env", os.devnull, "judge", str(path), "--json"]) == 0
        for wanted, line in zip(scenario["hits"], capsys.readouterr().out.splitlines(), strict=True):
            found = json.loads(line)
            # What repeats an open is a person's, and stands in no total: the scenario says so in its sum.
            again = "+repeat" * (found["reason"] == "repeat" and "human+repeat" in wanted["accept"])
            assert found["verdict"] + again in wanted["accept"], (scenario["id"], wanted)
            if "counts" in wanted:
                is_counted = wanted["counts"] and found["reason"] != "repeat"
                assert (found["counts_as"] == "person") == is_counted, (scenario["id"], wanted)


def test_no_string_of_theirs_stands_in_the_program(shared: Path) -> None:
    """Rules name products, words and shapes; a copied string of more than 40 characters would be the answer to a sample."""
    files = [ROOT / "tracker.py", *(ROOT / "templates").glob("*.txt")]
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    agents = {row["user_agent"] for row in rows_of(shared)}
    for name in ("scenarios.jsonl", "scenarios2.jsonl"):
        agents |= {each["user_agent"] for scenario in scenarios_of(shared, name) for each in scenario["hits"]}
    assert max(len(word) for _, word, _ in words_of_agents() if not word.startswith("/")) <= 24
    windows = {agent[start : start + 41] for agent in agents for start in range(len(agent) - 40)}
    assert len(windows) > 5_000
    assert sorted(window for window in windows if window in source) == []
