"""Limits on what strangers invent, at full size: forged keys take no reader of a mailing tool's campaign away.

`make test-faults` runs it and prints figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from random import Random

import pytest
from conftest import CHROME, Server
from load import AGENTS, Sent, counted_keys, rows, terminate
from test_live import Outcome, address, fire

SENT = 2_000
FORGED = 16_000  # more than a campaign of so many and a day admit together
PROXIED, PROXIES = 1_200, ("64.233.172.7", "69.147.64.7", "2a02:26f7:d0c0:4000::7")


def forgers(mail_id: str) -> Iterator[Sent]:
    """Requests of one network, each with a key that nobody was sent."""
    for n in range(FORGED):
        yield opened(mail_id, f"forged{n}", f"203.0.113.{n % 256}", "Forger/1.0")


def readers(mail_id: str) -> list[Sent]:
    """Whoever was sent a mail opens it: most through the few networks of mail providers, the others from home."""
    made = [
        opened(mail_id, f"reader{n}", PROXIES[n % len(PROXIES)], f"{AGENTS[3]} {n % len(PROXIES)}")
        for n in range(PROXIED)
    ]
    made += [
        opened(mail_id, f"reader{n}", address(163 * (n - PROXIED)), f"{CHROME} {n % 40}") for n in range(PROXIED, SENT)
    ]
    Random(7).shuffle(made)
    return made


def opened(mail_id: str, key: str, address: str, agent: str) -> Sent:
    return Sent(address, mail_id, key, f"/{mail_id}/pixel/{key}.gif?campaign=Spring", agent, "GET", None)


@pytest.mark.parametrize("kept", ["truncated", "none"])
def test_forged_keys_of_one_network_take_no_reader_of_a_declared_campaign_away(
    kept: str, servers: Callable[..., Server]
) -> None:
    server = servers(IP_ADDRESSES=kept)
    made = server.tenant("Acme")
    server.run("campaign", "add", "Acme", "Spring", "--sent", str(SENT))
    server.start()
    began = time.monotonic()
    outcomes: list[Outcome] = []
    for requests in (forgers(made["mail_id"]), readers(made["mail_id"])):
        outcomes.append(fire(server, requests))
        server.run("drain")
    assert [(len(each.answered), each.broken, each.wrong) for each in outcomes] == [(FORGED, [], []), (SENT, [], [])]
    assert terminate(server) == 0
    found = counted_keys(server)
    counted = {key.partition("?")[0]: times for key, times in found.items() if key.startswith("reader")}
    forged = len(found) - len(counted)
    [(dropped,)] = rows(server, "select coalesce(sum(hits), 0) from dropped where reason = 'unregistered-limit'")
    print(f"\naddresses {kept}: {len(counted)} readers and {forged} forged keys counted, {dropped} not", end="")
    print(f", in {time.monotonic() - began:.0f} s")
    assert counted == {f"reader{n}": 1 for n in range(SENT)}
    assert forged + dropped == FORGED
    assert dropped > 0
    assert server.run("check") == "all is well\n"
