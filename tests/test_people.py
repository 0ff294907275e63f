"""People in a hurry, in offices, with two devices and many tabs, are no machines."""

from __future__ import annotations

from collections import Counter

import people

import tracker
from tracker import CLICK, MACHINE, PERSON, UNCONFIRMED, Hit


def has_burst(clicks: list[Hit], links: int) -> bool:
    """Whether there are three links within three seconds of one another, or all of three or more within fifteen."""
    pairs = [(least, window) for least, window in ((3, 3_000), (links, 15_000)) if least >= 3]
    return any(
        len({each.url for each in clicks if first.at <= each.at <= first.at + window}) >= least
        for first in clicks
        for least, window in pairs
    )


def test_of_two_thousand_sessions_of_people_none_is_a_machines_and_few_clicks_are_unconfirmed() -> None:
    states: Counter[tuple[int, int, bool]] = Counter()
    for _, mail in people.sessions():
        burst = has_burst([each for each in mail.hits if each.type == CLICK], mail.links)
        judged = tracker.judge(mail.hits, mail.context)
        states.update((hit.type, each.state, burst) for hit, each in zip(mail.hits, judged, strict=True))
    assert [about for about in states if about[1] == MACHINE] == []
    assert states[CLICK, UNCONFIRMED, False] == 0
    doubtful = states[CLICK, UNCONFIRMED, True]
    assert 0 < doubtful <= 0.05 * (doubtful + sum(states[CLICK, PERSON, burst] for burst in (False, True)))
