"""How the pages look and are used: on screens of three widths, light and dark, on paper, with a mouse and with keys alone.

Each picture that was looked at is left in the tests' temporary folder. What is asserted of accessibility is WCAG 2.2 AA.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.resources
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from browser import CONTRASTS, Site, Tab
from conftest import ROOT

import tracker

SUBJECTS = (
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
    "\u202egnp.exe from right to left",
    "\U0001f389" * 60,
    "W" * 300,
    "A subject with many words that goes on and on " * 6,
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The demo's shop, and Initech with five odd emails."""
    with contextlib.closing(Site(tmp_path_factory.mktemp("site"), demo=True)) as made:
        emails = [
            {"key": f"odd{n}", "subject": text, "recipient": f"{text[:40]}@example.org", "campaign": text[:200]}
            for n, text in enumerate(SUBJECTS)
        ]
        assert made.request("POST", f"/{made.initech['id']}/emails", emails)[0] == 201
        for n in range(len(SUBJECTS)):
            assert made.request("GET", f"/{made.initech['mail_id']}/pixel/odd{n}.gif")[0] == 200
        for host in ("acme.com", "elsewhere.example"):
            made.request("GET", f"/{made.initech['mail_id']}/click/odd2?url=https://{host}/{'a' * 150}?b=%26c")
        yield made


@pytest.fixture
def tab(site: Site) -> Iterator[Tab]:
    """A tab of the test's own."""
    made = site.tab()
    yield made
    made.call("Page.close")


def paths(site: Site) -> dict[str, str]:
    """The pages that are looked at; those of an empty tenant are made on the way."""
    campaign = next(row["campaign"] for row in rows(site, "campaigns") if row["campaign"] != "Orders")
    story = next(row["key"] for row in rows(site, "events") if row["reason"] == "hidden-link")  # to which much happened
    return {
        "dashboard": f"{site.shop}/dashboard",
        "24h": f"{site.shop}/dashboard?range=24h",
        "90d-machines": f"{site.shop}/dashboard?range=90d&machines=1",
        "12m-sorted": f"{site.shop}/dashboard?range=12m&sort=campaigns.opened.up",
        "single-day": f"{site.shop}/dashboard?from=2026-01-01&to=2026-01-01",
        "campaign": f"{site.shop}/campaigns/{quote(campaign, safe='')}",
        "email": f"{site.shop}/emails/{story}",
        "person": f"{site.shop}/people/{story}",
        "link": f"{site.shop}/links/1",
        "odd-dashboard": f"/{site.initech['id']}/dashboard?machines=1",
        "odd-campaign": f"/{site.initech['id']}/campaigns/{quote(SUBJECTS[3][:200])}",
        "odd-email": f"/{site.initech['id']}/emails/odd2",
        "naming": f"/{site.initech['mail_id']}/click/odd2?url=https://{'a' * 63}.example/{'a' * 150}",
        "error": f"{site.shop}/emails/nobody",
    }


def rows(site: Site, table: str) -> Any:
    """The rows of an export of the shop."""
    status, answer = site.request("GET", f"{site.shop}/{table}.json")
    assert status == 200
    return json.loads(answer)["rows"]


def typed(tab: Tab, selector: str, text: str) -> None:
    """Type into a field."""
    tab.run(f"document.querySelector('{selector}').{'select' if 'tz' in selector else 'focus'}()")
    for letter in text:
        tab.press(letter)


def entered(site: Site, tab: Tab, selector: str = "") -> None:
    """Press Enter on what has the focus, or is given it, and see that it leads to a page that is whole."""
    if selector:
        tab.run(f"document.querySelector('{selector}').focus()")
    site.pace(2)
    tab.follow(lambda: tab.press("Enter"))
    assert (tab.statuses, tab.complaints) == ([200], [])


def open_page(site: Site, tab: Tab, path: str, width: int = 1600, scheme: str = "light") -> None:
    """Go to a page, and see that nothing was complained of."""
    site.pace(4)
    tab.screen(width, scheme)
    tab.go(site.url + path)
    status = 404 if path.endswith("/nobody") else 200
    # Chromium complains about every document that isn't 2xx.
    complaints = [each for each in tab.complaints if status == 200 or path not in each]
    assert (tab.statuses, complaints, tab.elsewhere) == ([status], [], []), path


# == Looks ==


def overflow(tab: Tab, width: int) -> list[str]:
    """What stands out of the window, apart from what scrolls in a region of its own."""
    found: list[str] = tab.run(f"""Array.from(document.querySelectorAll("body *"))
        .filter(e => !e.closest(".scroll *, svg *, .skip") && e.checkVisibility())
        .filter(e => e.getBoundingClientRect().right > {width} + 0.5 || e.getBoundingClientRect().left < -0.5)
        .map(e => e.outerHTML.slice(0, 100))""")
    return found


# What no tree of accessibility says. Sizes are those of WCAG 2.2, 2.5.8; the steps of a curve are also in a table.
FAULTS = """(() => {
    const found = [], all = selector => Array.from(document.querySelectorAll(selector)).filter(e => e.checkVisibility());
    const say = (what, e) => found.push(what + ": " + e.outerHTML.slice(0, 120));
    if (document.documentElement.lang !== "en") found.push("lang");
    if (!document.title) found.push("title");
    const ids = Array.from(document.querySelectorAll("[id]"), e => e.id);
    ids.filter((id, n) => ids.indexOf(id) !== n).forEach(id => found.push("id twice: " + id));
    if (all("h1").length !== 1) found.push("h1: " + all("h1").length);
    let level = 0;
    for (const e of all("h1, h2, h3, h4, h5, h6")) {
        if (+e.tagName[1] > level + 1) say("heading jumps", e);
        level = +e.tagName[1];
    }
    for (const e of all("img")) if (!e.hasAttribute("alt")) say("alt", e);
    for (const e of all("[tabindex]")) if (e.tabIndex > 0) say("tabindex", e);
    for (const e of all("[onclick], [style], script, style")) say("not allowed", e);
    for (const table of document.querySelectorAll("table")) {
        for (const e of table.querySelectorAll("thead th")) if (e.scope !== "col") say("scope", e);
        for (const row of table.querySelectorAll("tbody tr")) {
            const heads = row.querySelectorAll("th");
            if (heads.length > 1 || row.cells.length !== table.tHead.rows[0].cells.length) say("row", row);
            // A first cell that is a head is a row's in any case; the curve has too many to say so each time.
            if (!table.matches(".steps-table")) for (const e of heads) if (e.scope !== "row") say("scope", e);
        }
        if (!table.closest(".scroll[role=region][tabindex='0']")) say("no region", table);
    }
    for (const e of document.querySelectorAll("[aria-labelledby], [aria-describedby]"))
        for (const name of ["aria-labelledby", "aria-describedby"])
            if (e.hasAttribute(name) && !document.getElementById(e.getAttribute(name))) say("nobody has that id", e);
    for (const e of all("a[href^='#']")) if (!document.getElementById(e.hash.slice(1))) say("leads nowhere", e);
    for (const e of all("a, input:not([type=hidden]), select, button, summary")) {
        if (e.closest(".skip, svg")) continue;
        const box = e.getBoundingClientRect();
        if (box.width < 24 || box.height < 24) say(`${box.width} x ${box.height}`, e);
    }
    return found;
})()"""
NAMED = {
    *("link", "button", "textbox", "searchbox", "combobox", "Date", "DateTime", "region", "heading", "navigation"),
    *("DisclosureTriangle", "columnheader", "rowheader", "img", "image", "option"),
}  # fmt: skip


# The rules of axe-core (WCAG and good practice), which a package of Python brings along.
AXE = importlib.resources.files("axe_core_python").joinpath("axe.min.js")
VIOLATIONS = "axe.run().then(found => found.violations.map(each => [each.id, ...each.nodes.map(node => node.html)]))"


def assert_accessible(tab: Tab, path: str, width: int) -> None:
    """What a page says to those who do not see it, and whether everything has a name and a place."""
    tab.run("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert tab.run(FAULTS) == [], path
    if width > 320:  # it takes a second; what differs on a phone is looked at above
        tab.run(f"{AXE.read_text()}; 0")
        assert tab.run(VIOLATIONS) == [], path
    tree = [node for node in tab.call("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    roles: dict[str, list[str]] = {}
    for node in tree:
        roles.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    assert {role for role, names in roles.items() if role in NAMED and "" in names} == set(), path
    assert len(roles["main"]) == 1
    if path.endswith("/nobody") or "/click/" in path:
        return
    assert len(roles["banner"]) == 1
    if tab.text("#trial"):
        return
    assert roles["navigation"] == ["Range" if "dashboard" in path else "Where this is"]
    assert len(roles["region"]) > 1
    if "dashboard" in path:
        assert len(roles["contentinfo"]) == 1
        assert len(roles.get("rowheader", [])) == tab.run("document.querySelectorAll('tbody th').length")
        assert roles["search"] and {"Search", "From", "to", "time zone"} <= {n for r in roles.values() for n in r}


@pytest.mark.parametrize("width, scheme", [(320, "light"), (320, "dark"), (768, "dark"), (1600, "light")])
def test_every_page_is_whole_and_accessible_on_every_screen(
    site: Site, tab: Tab, tmp_path: Path, width: int, scheme: str
) -> None:
    pages = paths(site)
    pages["empty"] = f"/{site.nginx.server.tenant(f'Empty {width} {scheme}')['id']}/dashboard"
    for name, path in pages.items():
        open_page(site, tab, path, width, scheme)
        # Not innerWidth: a phone makes that as wide as what it has to show.
        assert tab.run("document.documentElement.scrollWidth") <= width, name
        assert overflow(tab, width) == [], name
        contrasts = tab.run(CONTRASTS)
        assert contrasts
        assert [(text, contrast) for text, contrast in contrasts if contrast < 4.5] == [], name
        assert tab.run("document.getAnimations().length") == 0
        is_white = tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert is_white == (scheme == "light")
        (tmp_path / f"{name}-{width}-{scheme}.webp").write_bytes(tab.picture())
        if scheme == "light":
            assert_accessible(tab, path, width)
    assert "Your first mail" in tab.text("h2")


@pytest.mark.parametrize("name", ["dashboard", "campaign", "email", "person", "link", "odd-dashboard", "odd-email"])
def test_paper_is_white_and_has_whole_tables_and_no_controls(site: Site, tab: Tab, tmp_path: Path, name: str) -> None:
    open_page(site, tab, paths(site)[name], 794, "dark")
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    tab.call("Emulation.setEmulatedMedia", media="print", features=features)
    assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.run("document.documentElement.scrollWidth") <= 794
    assert [text for text in tab.run(CONTRASTS) if text[1] < 4.5] == []
    controls = "Array.from(document.querySelectorAll('form, button, .skip, nav ul, .take'))"
    assert tab.run(f"{controls}.filter(e => e.checkVisibility()).length") == 0
    assert re.findall("Download|Show|With machines|Why|More", " ".join(tab.text("body"))) == []
    (tmp_path / f"{name}-print.webp").write_bytes(tab.picture())


# What a phone cuts off or hides sideways, and of how many lines the rows of a table are.
CUT = """Array.from(document.querySelectorAll(".scroll, .figures b, td.share, td.number, .campaigns td, .strip a"))
    .filter(e => e.checkVisibility() && e.scrollWidth > e.clientWidth && e.clientWidth).map(e => e.outerHTML.slice(0, 80))"""
LINES = """table => Array.from(document.querySelectorAll(`.${table} tbody tr`), row => new Set(Array.from(row.cells)
    .filter(e => e.checkVisibility()).map(e => Math.round(e.getBoundingClientRect().top / 8))).size)"""


@pytest.mark.parametrize("width", [320, 360, 430])
def test_on_a_phone_a_row_is_two_lines_and_rates_and_numbers_are_whole(site: Site, tab: Tab, width: int) -> None:
    for name in ("dashboard", "90d-machines", "campaign", "email", "person", "link"):
        open_page(site, tab, paths(site)[name], width)
        assert tab.run(CUT) == [], name
    open_page(site, tab, paths(site)["dashboard"], width)
    seen = tab.text(".campaigns tbody tr")
    assert seen and all(re.search(r"\n\d+\n+[\d–]+ %\n+[\d.]+ %\n", text) for text in seen), seen
    assert set(tab.run(f"({LINES})('campaigns')")) == {2}
    assert set(tab.run(f"({LINES})('emails')")) <= {2, 3}  # a third has the links that somebody clicked


def test_a_wide_screen_has_tables_beside_each_other(site: Site, tab: Tab) -> None:
    open_page(site, tab, paths(site)["dashboard"], 1920)
    places = {
        name: tab.run(f"document.getElementById('{name}').getBoundingClientRect().top")
        for name in ("campaigns", "links")
    }
    assert places["campaigns"] == places["links"]


def test_a_campaign_prints_on_one_sheet_that_says_whose_it_is_and_of_when(site: Site, tab: Tab) -> None:
    for name, sheets in {"campaign": 1, "dashboard": 2}.items():
        open_page(site, tab, paths(site)[name], 794)
        paper = base64.b64decode(
            tab.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, preferCSSPageSize=True)["data"]
        )
        assert len(re.findall(rb"/Type /Page\b", paper)) == sheets, name
    tab.go(site.url + paths(site)["campaign"])
    tab.call("Emulation.setEmulatedMedia", media="print")
    shown = " ".join(tab.text("header"))
    assert "Acme Shoes" in shown and re.search(r"as of \d\d \w+ \d{4} \d\d:\d\d, UTC", shown)


# == The curve ==

STEPS = """Array.from(document.querySelectorAll(".steps a"), a => {
    const text = a.querySelector("text"), box = a.querySelector("rect").getBoundingClientRect();
    const told = text.getBoundingClientRect();
    return {
        told: text.textContent, opacity: getComputedStyle(text).opacity, left: told.left, right: told.right,
        x: box.x + box.width / 2, y: box.y + box.height / 2, focused: a === document.activeElement,
    };
})"""


@pytest.mark.parametrize(
    "width, asked",
    [(320, "range=24h"), (320, "range=90d&machines=1"), (768, "range=30d"), (1600, "range=12m&machines=1")],
)
def test_a_step_of_the_curve_tells_its_values_to_who_points_at_it(site: Site, tab: Tab, width: int, asked: str) -> None:
    open_page(site, tab, f"{site.shop}/dashboard?{asked}", width)
    tab.run("document.querySelector('.curve').scrollIntoView({block: 'center'})")
    steps = tab.run(STEPS)
    assert {step["opacity"] for step in steps} == {"0"}
    for n in (0, len(steps) // 2, len(steps) - 1):
        tab.point(steps[n]["x"], steps[n]["y"])
        now = tab.run(STEPS)
        assert [m for m, step in enumerate(now) if step["opacity"] == "1"] == [n]
        assert now[n]["left"] >= 0 and now[n]["right"] <= width, now[n]
        # What stands there else gives way.
        assert tab.run("getComputedStyle(document.querySelector('.curve > text')).opacity") == "0"
        assert re.fullmatch(r"[^:]+(:\d\d)?: [\d,+]+ opens · [\d,+]+ clicks", now[n]["told"])


def test_a_step_of_the_curve_tells_its_values_to_who_uses_keys(site: Site, tab: Tab) -> None:
    open_page(site, tab, f"{site.shop}/dashboard?machines=1", 320)
    tab.run("document.querySelector('.legend a').focus()")
    tab.press("Tab")  # the link that skips the curve
    for n in range(3):
        tab.press("Tab")
        steps = tab.run(STEPS)
        assert [m for m, step in enumerate(steps) if step["focused"]] == [n]
        assert [m for m, step in enumerate(steps) if step["opacity"] == "1"] == [n]
        assert steps[n]["left"] >= 0 and steps[n]["right"] <= 320
    entered(site, tab)
    assert re.search(r"machines=1&on=\d{4}-\d\d-\d\d$", tab.run("location.search"))


# == Keys alone ==

TABBABLE = "a[href], button, input:not([type=hidden]), select, summary, [tabindex='0']"
FOCUSED = f"""(() => {{
    const all = Array.from(document.querySelectorAll("{TABBABLE}")).filter(e => e.checkVisibility());
    const e = document.activeElement, drawn = e.closest("svg") ? e.querySelector("rect") : e;
    const box = drawn.getBoundingClientRect(), style = getComputedStyle(drawn);
    const ring = e.closest("svg") ? style.stroke !== "none" && parseFloat(style.strokeWidth) >= 2
        : style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
    const seen = box.width > 0 && box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth;
    return {{index: all.indexOf(e), all: all.length, name: e.outerHTML.slice(0, 80), ring, seen}};
}})()"""


@pytest.mark.parametrize("name", ["dashboard", "campaign", "email"])
@pytest.mark.parametrize("width", [320, 1600])
def test_a_walk_with_tab_meets_everything_in_order_and_visibly(site: Site, tab: Tab, name: str, width: int) -> None:
    open_page(site, tab, paths(site)[name], width)
    met: list[int] = []
    while True:
        tab.press("Tab")
        now = tab.run(FOCUSED)
        if now["index"] == -1 or (met and now["index"] < met[-1]):
            break  # beyond the end of the page
        assert now["ring"] and now["seen"], now
        if not met or now["index"] != met[-1]:  # a date has several fields
            met.append(now["index"])
        assert len(met) <= now["all"]
    assert met == list(range(len(met)))
    assert len(met) == tab.run(FOCUSED)["all"]


def test_skip_links_come_first_and_lead_past_what_they_skip(site: Site, tab: Tab) -> None:
    open_page(site, tab, f"{site.shop}/dashboard", 320)
    tab.press("Tab")
    assert tab.run("document.activeElement.innerText") == "Skip to the numbers"
    tab.press("Enter")
    tab.press("Tab")
    assert tab.run("document.activeElement.closest('main').id") == "numbers"
    while tab.run("document.activeElement.innerText") != "Skip the curve":
        tab.press("Tab")
    tab.press("Enter")
    tab.press("Tab")
    assert tab.run("document.activeElement.closest('[aria-labelledby]').getAttribute('aria-labelledby')") == "campaigns"


def test_why_these_numbers_opens_by_key_and_by_the_links_that_ask(site: Site, tab: Tab) -> None:
    is_open = "document.querySelector('#why').checkVisibility()"
    open_page(site, tab, f"{site.shop}/dashboard")
    assert not tab.run(is_open)
    for selector, opens in ((".reasons summary", True), (".reasons summary", False), (".figures a", True)):
        tab.run(f"document.querySelector('{selector}').focus()")
        tab.press("Enter")
        assert tab.run(is_open) is opens
    titles = tab.run("Array.from(document.querySelectorAll('#why + .scroll td[title]'), e => e.title)")
    reasons = {title.split()[-1] for title in titles}
    assert {"hidden-link", "burst", "repeat", "own-address", "apple-mpp", "image-proxy", "browser"} <= reasons


MOST_TABS = 10  # to the search


def test_emails_are_searched_with_keys_alone(site: Site, tab: Tab) -> None:
    open_page(site, tab, f"{site.shop}/dashboard?range=7d")
    for _ in range(MOST_TABS):
        tab.press("Tab")
        if tab.run("document.activeElement.name") == "q":
            break
    for letter in "ben.":
        tab.press(letter)
    tab.press("Tab")
    assert tab.run("document.activeElement.innerText") == "Find"
    entered(site, tab)
    assert tab.run("location.search + location.hash") == "?range=7d&q=ben.#emails"
    entered(site, tab, ".strip a[href*=opened]")
    assert dict(tab.run("Array.from(new URLSearchParams(location.search))")) == {
        "range": "7d",
        "q": "ben.",
        "show": "opened",
    }
    found, done = tab.text(".emails tbody th"), tab.text(".emails tbody td:nth-child(3)")
    assert found and all(text.startswith("ben.") for text in found)
    assert all(re.match("Opened|Maybe", text) for text in done)
    assert "Found by “ben.”" in tab.text(".found")[0]


def test_a_range_is_asked_for_with_keys_alone(site: Site, tab: Tab) -> None:
    open_page(site, tab, f"{site.shop}/dashboard?machines=1&range=7d")
    tab.run("document.querySelector('.own summary').focus()")
    tab.press("Enter")
    typed(tab, "[name=from]", "10012026")  # in the order of American English, which is Chromium's without a locale
    typed(tab, "[name=tz]", "Asia/Kolkata")
    entered(site, tab)
    asked = tab.run("Object.fromEntries(new URLSearchParams(location.search))")
    assert (asked["from"], asked["tz"], asked["machines"]) == ("2026-10-01", "Asia/Kolkata", "1")
    assert tab.run("document.querySelector('[name=tz]').value") == "Asia/Kolkata"
    assert tab.run("document.querySelectorAll('[aria-current=page]').length") == 0


def test_faults_of_a_form_are_told_in_the_form_and_what_was_typed_is_still_there(site: Site, tab: Tab) -> None:
    open_page(site, tab, f"{site.shop}/dashboard?from=2026-11-10&to=2026-11-12&machines=1")
    typed(tab, "[name=tz]", "Europe/Rom")
    site.pace(2)
    tab.follow(lambda: tab.press("Enter"))
    assert tab.statuses == [400]
    assert tab.text(".range .fault") == ["time zone is 'Europe/Rom'; expected a time zone such as Europe/Rome or UTC"]
    fields = "Array.from(document.querySelectorAll('.range input:not([type=hidden])'), e => e.value)"
    assert tab.run(fields) == ["2026-11-10", "2026-11-12", "Europe/Rom"]
    assert "10 Nov 2026 – 12 Nov 2026, UTC" in tab.text("header .quiet")[0]
    typed(tab, "[name=tz]", "Europe/Rome")
    entered(site, tab)
    assert "10 Nov 2026 – 12 Nov 2026, Europe/Rome" in tab.text("header .quiet")[0]


def test_range_zone_and_search_stay_on_the_way_to_other_pages_and_back(site: Site, tab: Tab) -> None:
    asked = {"from": "2026-11-01", "to": "2026-11-20", "tz": "Asia/Tokyo", "q": "example", "show": "opened"}
    open_page(site, tab, f"{site.shop}/dashboard?{urlencode(asked)}")
    for there in (".campaigns tbody a", ".hits tbody a", ".emails tbody a"):
        for link in (there, ".path a"):
            entered(site, tab, link)
            assert dict(tab.run("Array.from(new URLSearchParams(location.search))")) == asked, link
        assert "1 Nov 2026 – 20 Nov 2026, Asia/Tokyo" in tab.text("header .quiet")[0]
        assert tab.run("document.querySelector('[name=q]').value") == "example"


def test_zones_are_offered_by_names_that_are_zones(site: Site, tab: Tab) -> None:
    open_page(site, tab, f"{site.shop}/dashboard")
    offered = tab.run("Array.from(document.querySelector('[name=tz]').list.options, e => e.value)")
    assert len(offered) > 40 and offered == [name for name in offered if tracker.zone_named(name)]


def test_tables_are_sorted_by_their_heads(site: Site, tab: Tab) -> None:
    open_page(site, tab, f"{site.shop}/dashboard")
    for direction in ("ascending", "descending"):
        entered(site, tab, ".emails thead a")
        assert tab.run("document.querySelector('.emails thead th').ariaSort") == direction
        found = tab.text(".emails tbody th")
        assert found == sorted(found, reverse=direction == "descending")
        assert tab.run("location.hash") == "#emails"


# == Colours ==


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2.2 defines it."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [part / 255 for part in bytes.fromhex(digits)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


STYLE = (ROOT / "templates" / "style.css").read_text()
TEXTS = tuple(itertools.product(("ink", "quiet", "link"), ("paper", "panel")))
SHAPES = (
    *(("person", "paper"), ("unconfirmed", "paper"), ("machine", "paper"), ("person", "line")),  # bars
    *(("quiet", "paper"), ("link", "paper"), ("link", "panel"), ("warn", "paper")),  # borders, the ring of focus, the mark of a notice
)  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_of_the_stylesheet_have_contrast_enough(scheme: str) -> None:
    assert contrast("#000", "#ffffff") == pytest.approx(21)
    light, dark = re.findall(r":root \{([^}]*--[^}]*)\}", STYLE)
    colours = dict(re.findall(r"--(\w+): (#\w+)", light + dark * (scheme == "dark")))
    found = {(one, other): contrast(colours[one], colours[other]) for one, other in (*TEXTS, *SHAPES)}
    assert {pair: value for pair, value in found.items() if value < (4.5 if pair in TEXTS else 3)} == {}


def test_the_stylesheet_names_its_colours_once_and_moves_nothing() -> None:
    text, rest = STYLE, re.sub(r":root \{[^}]*\}", "", STYLE)
    assert re.findall(r"#[0-9a-f]{3,8}\b|rgb|hsl", rest) == []
    assert set(re.findall(r"--(\w+):", text)) == set(re.findall(r"var\(--(\w+)\)", text))
    assert re.findall(r"animation|transition|scroll-behavior|@keyframes|url\(|@import|!important", text) == []


# == What README shows ==


def test_pictures_of_readme_exist_and_are_small() -> None:
    named = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert named
    for path in named:
        picture = (ROOT / path).read_bytes()
        kind = picture[8:12] == b"WEBP" or (path.endswith(".svg") and picture.startswith(b"<svg "))
        assert kind and len(picture) <= 150_000, path
