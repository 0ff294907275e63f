"""Two thousand sessions, or more, of people with current browsers and mail programs, made up by what is known of them.

None of these hits is a machine's (but for what Apple and Gmail fetch ahead), whatever rules there will be: so these
sessions were fixed, with their seed, before the rules that are held to them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tracker import CLICK, OPEN, Context, Hit

SEED = 20261128
DELIVERED = 1_795_000_000_000  # in November 2026
KIT = "AppleWebKit/537.36 (KHTML, like Gecko)"
IOS = "Mozilla/5.0 (iPhone; CPU iPhone OS 18_7 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko)"
WINDOWS = f"Mozilla/5.0 (Windows NT 10.0; Win64; x64) {KIT}"
CHROME, EDGE = f"{WINDOWS} Chrome/151.0.0.0 Safari/537.36", f"{WINDOWS} Chrome/150.0.0.0 Safari/537.36 Edg/150.0.0.0"
FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:150.0) Gecko/20100101 Firefox/150.0"
MAC = "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 (KHTML, like Gecko)"
PHONE = f"Mozilla/5.0 (Linux; Android 10; K) {KIT} Chrome/150.0.0.0 Mobile Safari/537.36"
GMAIL = "Mozilla/5.0 (Windows NT 5.1; rv:11.0) Gecko Firefox/11.0 (via ggpht.com GoogleImageProxy)"
OUTLOOK = "Microsoft Office/16.0 (Windows NT 10.0; Microsoft Outlook 16.0.18827; Pro)"
READERS = [  # what a mail is opened with ("" with images off), whether a proxy asks for them, the browser, how many of 20
    *((GMAIL, True, CHROME, 4), (GMAIL, True, PHONE, 2), ("Mozilla/5.0", True, f"{IOS} Version/26.2 Safari/604.1", 4)),
    *((OUTLOOK, False, EDGE, 3), ("", False, EDGE, 2), (MAC, False, f"{MAC} Version/26.2 Safari/605.1.15", 1)),
    *((FIREFOX, False, FIREFOX, 1), (CHROME, False, CHROME, 2)),  # webmail
    (FIREFOX.replace("Firefox", "Thunderbird"), False, FIREFOX, 1),
]


class Reader(NamedTuple):
    """One person at one place."""

    opens: str
    by_proxy: bool
    clicks: str
    address: str


class Mail:
    """The hits of one mail, as its readers cause them."""

    def __init__(self, dice: random.Random) -> None:
        self.dice, self.links, self.hits = dice, dice.randrange(1, 9), list[Hit]()
        self.kept = dice.choice(("full", "truncated", "truncated", "none"))
        self.context = Context(DELIVERED, said=dice.random() < 0.7, links=self.links if dice.random() < 0.8 else None)

    def reader(self, at: str = "") -> Reader:
        """Somebody, at an address of their own or at that one."""
        opens, by_proxy, clicks, _ = self.dice.choices(READERS, [often for *_, often in READERS])[0]
        return Reader(opens, by_proxy, clicks, at or self.place())

    def place(self) -> str:
        network = f"198.51.{self.dice.randrange(1, 255)}"
        return {"full": f"{network}.{self.dice.randrange(1, 255)}", "truncated": f"{network}.0", "none": ""}[self.kept]

    def hit(self, at: float, type_: int, agent: str, address: str, link: int = 0) -> None:
        url, answer = (f"https://acme.com/{link}", "302") if link else (None, "pixel")
        made = (
            f"{len(self.hits):024x}",
            DELIVERED + round(at * 1000),
            type_,
            "GET",
            "k3v9x2mp",
            "e1",
            url,
            "track.example",
        )
        self.hits.append(Hit(*made, address, agent, "", answer, ""))

    def open(self, at: float, who: Reader) -> float:
        """They open it; returns when they have read what they wanted."""
        # Apple's fetches when it likes, and what Gmail has fetched is shown again without asking.
        asked = self.dice.uniform(1, at) if who.opens == "Mozilla/5.0" else at
        if who.opens:
            self.hit(asked, OPEN, who.opens, self.place() if who.by_proxy else who.address)
        return at + self.dice.uniform(2, 90)

    def click(self, at: float, who: Reader, link: int = 0) -> None:
        self.hit(at, CLICK, who.clicks, who.address, link or self.dice.randrange(1, self.links + 1))

    def read(self, at: float, who: Reader, clicks: int) -> float:
        at = self.open(at, who)
        for _ in range(clicks):
            self.click(at, who)
            at += self.dice.uniform(4, 200)  # looks at the page, and comes back
        return at


def plain(mail: Mail, at: float) -> None:
    mail.read(at, mail.reader(), mail.dice.randrange(4))


def fast_reader(mail: Mail, _: float) -> None:
    """Waits for the mail, as one does for a code or a link to sign in."""
    mail.read(mail.dice.uniform(3, 40), mail.reader(), 1)


def double_click(mail: Mail, at: float) -> None:
    who, link = mail.reader(), mail.dice.randrange(1, mail.links + 1)
    at = mail.open(at, who)
    for n in range(mail.dice.choice((2, 2, 3))):
        mail.click(at + n * mail.dice.uniform(0.1, 0.5), who, link)


def office(mail: Mail, at: float) -> None:
    """Colleagues read what came to all of them, behind one address."""
    address = mail.place()
    for _ in range(mail.dice.randrange(2, 6)):
        mail.read(at + mail.dice.uniform(0, 900), mail.reader(address), mail.dice.randrange(3))


def phone_then_laptop(mail: Mail, at: float) -> None:
    at = mail.read(at, Reader(GMAIL, True, PHONE, mail.place()), 1)
    later = at + mail.dice.uniform(20, 7_200)
    mail.click(mail.open(later, who := mail.reader()), who, int((mail.hits[-1].url or "/1").rpartition("/")[2]))


def forwarded(mail: Mail, at: float) -> None:
    at = mail.read(at, mail.reader(), mail.dice.randrange(2))
    mail.read(at + mail.dice.choice((60, 600, 86_400)) * mail.dice.random(), mail.reader(), mail.dice.randrange(1, 3))


def all_in_tabs(mail: Mail, at: float) -> None:
    """Reads, then opens every link in a tab of its own: sometimes without having asked for images for an hour."""
    at = mail.open(at + 60, who := mail.reader()) + mail.dice.choice((0, 0, 0, 0, 3_600))
    for link in range(1, mail.links + 1):
        mail.click(at, who, link)
        at += mail.dice.uniform(0.6, 4)


KINDS: list[tuple[Callable[[Mail, float], None], int]] = [  # how many of a hundred
    *((plain, 44), (fast_reader, 14), (double_click, 10), (office, 9), (phone_then_laptop, 8), (forwarded, 9)),
    (all_in_tabs, 6),
]


def sessions(number: int = 2_000, seed: int = SEED) -> Iterator[tuple[str, Mail]]:
    """So many mails and what people did with each, some seconds to some days after it was delivered."""
    dice = random.Random(seed)
    for kind, _ in dice.choices(KINDS, [often for _, often in KINDS], k=number):
        mail = Mail(dice)
        kind(mail, min(4 + dice.lognormvariate(8, 2), 500_000))
        yield kind.__name__, mail
