"""Pixels that nginx answers by itself (`tracker.py nginx --pixels`) are counted as those that the tracker answers."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from conftest import CHROME, Stage
from load import PIXEL, rows, wait_until
from test_nginx import CLIENTS, Front, fronts, reload, request
from test_raw import read_answers

import tracker

REQUESTS = int(os.environ.get("PIXEL_REQUESTS", "900"))
HOST = "t.acme.test"
NO_LIMIT = ("--unregistered-a-day", "10000000")
ACME, GLOBEX = ("Acme", "--tracking-host", HOST, *NO_LIMIT), ("Globex", "--own", "127.17.0.0/16", *NO_LIMIT)
KEY_LETTERS = "abcXYZ019._~+@=:-"
PURPOSES = ("Sec-Purpose: prefetch", "Purpose: preview", "X-Moz: prefetch", "Sec-GPC: 1", "DNT: 1", "X-Purpose: |x")


class Asker:
    """Makes requests for pixels of the same kinds again and again: plain, with wrong bytes, in odd encodings."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)

    def one(self, number: int) -> tuple[str, bytes, str]:
        """A host, a request with `{Acme}` and `{Globex}` for mail ids, and the last byte of the network it comes from."""
        chance = self.chance
        key = f"k{number}" + "".join(chance.choices(KEY_LETTERS, k=chance.randrange(12)))
        path = f"/{{{chance.choice(('Acme', 'Globex'))}}}/pixel/{quote(key, safe='+=:~')}.gif"
        path += chance.choice(("", "", "?campaign=Spring", "?campaign=Fr%C3%BChling&x=1"))
        kind = number % 3
        if kind == 1:  # a byte of the path or the query is another
            place = chance.randrange(path.index("pixel"), len(path))
            path = (
                path[:place] + chr(chance.choice([*range(0x21, 0x7B), 0x7E, *range(0xA1, 0x100)])) + path[place + 1 :]
            )
        elif kind == 2:
            path = self.odd(path)
        agent = chance.choice(
            (CHROME, "Mozilla/5.0 (Android 14; Mobile; rv:128.0)", "curl/8.5.0", "", 'odd "\\\x80\xe9')
        )
        headers = chance.sample(PURPOSES, chance.randrange(2))
        method = chance.choice(("GET", "GET", "GET", "HEAD"))
        made = request(path, method, *headers, "Connection: close", host="HOST").replace(
            CHROME.encode(), agent.encode("latin-1")
        )
        return chance.choice(("localhost", HOST)), made, chance.choice(("127.16", "127.17"))

    def odd(self, path: str) -> str:
        chance = self.chance
        place = chance.randrange(path.index("pixel"), len(path))
        letter = path[place]
        return chance.choice(
            (
                path[:place] + f"%{ord(letter):02X}" + path[place + 1 :],
                path[:place] + f"%{ord(letter):02x}" + path[place + 1 :],
                path[:place] + "%2F" + path[place:],
                path[:place] + "/" + path[place:],
                path[:place] + "%00" + path[place:],
                path.replace("/pixel/", "/./pixel/"),
                path.replace("/pixel/", "/x/../pixel/"),
                path.replace("/pixel/", "/campaigns/..%2Fpixel%2F"),
                path.replace(".gif", ".GIF"),
                path.replace(".gif", ".gif.gif"),
                path.replace(".gif", ".gif#part"),
                path + "&" * chance.randrange(3) + "?%zz",
            )
        )


def events(front: Front) -> Counter[Any]:
    """What is stored of each hit but its time and its id."""
    front.server.run("drain")
    kept = "key, type, address, agent, purpose, method, verdict, reason, own, (select name from tenants where number = tenant)"
    return Counter(rows(front.server, f"select {kept} from event_details"))


@pytest.fixture
def both(tmp_path: Path) -> Iterator[list[Front]]:
    """A server whose pixels nginx answers, and one whose it does not."""
    with ExitStack() as stack:
        made = []
        for pixels in (True, False):
            folder = tmp_path / str(pixels)
            folder.mkdir()
            made.append(stack.enter_context(fronts(folder, ACME, GLOBEX, pixels=pixels, kept="truncated")))
        yield made


def test_the_same_requests_make_the_same_events_whoever_answers_them(both: list[Front]) -> None:
    asker = Asker(7)
    asked = [asker.one(number) for number in range(REQUESTS)]
    sources = [f"{network}.{n >> 8 & 255}.{n & 255}" for n, (_, _, network) in enumerate(asked)]
    told: list[list[tuple[int, bytes, str]]] = []
    for front in both:
        answers = []
        for (host, made, _), source in zip(asked, sources, strict=True):
            for name in ("Acme", "Globex"):
                made = made.replace(f"{{{name}}}".encode(), front.mail_id(name).encode())
            [answer] = read_answers(
                front.exchange(made.replace(b"HOST", host.encode()), source=source),
                "GET" if b"GET " in made[:5] else "HEAD",
            )
            answers.append(
                (answer.status, answer.body if answer.status == 200 else b"", answer.headers.get("x-tracker", ""))
            )
        told.append(answers)
    by_nginx, by_tracker = told
    assert {note for _, _, note in by_nginx} > {"logged", "wrong host"}
    assert sum(note == "logged" for _, _, note in by_nginx) > REQUESTS / 4
    assert [(status, body, note.replace("logged", "recorded")) for status, body, note in by_nginx] == by_tracker
    found = [events(front) for front in both]
    assert found[0] == found[1]
    sql = "select tenant, sum(hits) from dropped where reason = 'untracked-open' group by tenant order by tenant"
    untracked = [rows(front.server, sql) for front in both]
    assert untracked[0] == untracked[1]
    recorded = sum(note == "recorded" for _, _, note in by_tracker)
    assert found[0].total() == recorded - sum(hits for _, hits in untracked[0]) < recorded


def test_reloads_rotations_and_killed_workers_cost_no_hit_that_nginx_answered(tmp_path: Path) -> None:
    with fronts(tmp_path, ACME, GLOBEX, pixels=True) as front:
        answered: list[str] = []
        ended = threading.Event()

        def read(reader: int) -> None:
            for n in range(100_000):
                if ended.is_set():
                    return
                key = f"r{reader}n{n}"
                answer = front.ask(front.pixel("Globex", key), source="127.16.0.1")
                assert (answer.status, answer.body, answer.headers["x-tracker"]) == (200, PIXEL, "logged")
                answered.append(key)

        readers = [threading.Thread(target=read, args=(number,)) for number in range(CLIENTS)]
        for each in readers:
            each.start()
        for _ in range(6):
            front.server.run("drain")  # takes the file over that nginx writes
            reload(front)
            os.kill(front.server.workers()[0], signal.SIGKILL)
            wait_until(lambda: len(front.server.workers()) == 2, front.server)
        ended.set()
        for each in readers:
            each.join()
        front.server.run("drain")
        assert Counter(key for (key,) in rows(front.server, "select key from event_details")) == Counter(answered)
        assert len(answered) > 100


def test_the_drain_of_a_worker_takes_what_nginx_logs_in_large_pieces_and_a_command_at_once(stage: Stage) -> None:
    folder = stage.spool / "nginx"
    folder.mkdir()
    drainer = tracker.Drainer(stage.database)
    taken = []
    for n, drain in enumerate((drainer.turn, drainer.turn, stage.drain)):
        uri = f"/{stage.acme.mail_id}/pixel/e{n}.gif"
        line = {"id": f"{n:032}", "t": tracker.now_ms() / 1000, "method": "GET", "uri": uri, "ua": CHROME}
        with (folder / "1795932.jsonl").open("ab") as file:
            file.write(tracker.hit_line(line))
        drain()
        taken.append(len(list(stage.spool.glob("*-nginx.jsonl"))))
    assert taken == [1, 1, 2]
    assert stage.rows("select count(*) from event_details") == [(3,)]


def test_what_nginx_logged_is_kept_like_other_segments_once_nobody_writes_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stage.spool / "nginx"
    folder.mkdir()
    line = tracker.hit_line(
        {"id": "a" * 32, "t": "1795932.5", "method": "GET", "uri": f"/{stage.acme.mail_id}/pixel/e1.gif", "ua": CHROME}
    ).replace(b'"1795932.5"', b"%.3f" % (tracker.now_ms() / 1000))
    (folder / "1795932.jsonl").write_bytes(line + line[:40])
    stage.drain()
    [segment] = list(stage.spool.glob("*-nginx.jsonl"))
    assert re.fullmatch(r"[0-9]{13}-0-[0-9a-f]{24}-nginx\.jsonl", segment.name)
    with segment.open("ab") as file:  # which nginx had opened before
        file.write(line[40:].replace(b"e1.gif", b"e2.gif"))
    (folder / "1795932.jsonl").write_bytes(line.replace(b"e1.gif", b"e3.gif"))
    stage.drain()
    assert stage.rows("select key from event_details order by key") == [("e1",), ("e2",), ("e3",)]
    assert len(list(stage.spool.glob("*-nginx.jsonl"))) == 2
    monkeypatch.setattr(tracker, "SLOT_GROWS_SECONDS", 0)
    stage.drain()
    assert [list(stage.spool.glob("*-nginx.jsonl")), len(list((stage.spool / "kept").glob("*-nginx.jsonl")))] == [[], 2]
    assert stage.rows("select count(*) from event_details") == [(3,)]
