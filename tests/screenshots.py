"""The pictures of README: the real server on a demo's database, as Chromium shows it. Run by `make screenshots`."""

from __future__ import annotations

import json
import struct
import sys
import tempfile
import urllib.request
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from browser import Chromium  # noqa: E402  # it imports the tracker, which is beside the tests
from conftest import Server  # noqa: E402

FOLDER = ROOT / "tests" / "screenshots"
WIDTH, MOST = 1040, 150_000  # pixels across, and bytes
MARGIN = 16
SHOWN = {"dashboard": "links", "email": "timeline"}  # the section with which each picture ends


# == PNG: what Chromium writes is twice as large as a picture of so few colours need be ==


def chunks(picture: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The parts of a PNG, with their types."""
    start = 8
    while start < len(picture):
        length, kind = struct.unpack_from(">I4s", picture, start)
        yield kind, picture[start + 8 : start + 8 + length]
        start += 12 + length


def pixels(picture: bytes) -> list[list[bytes]]:
    """Rows of pixels of a PNG with eight bits each for red, green and blue, its filters undone (W3C PNG, 9)."""
    header = next(body for kind, body in chunks(picture) if kind == b"IHDR")
    width, height, *form = struct.unpack(">IIBBBBB", header)
    assert form == [8, 2, 0, 0, 0], form
    data = zlib.decompress(b"".join(body for kind, body in chunks(picture) if kind == b"IDAT"))
    size = 3 * width
    above, rows = bytearray(size + 3), []
    for start in range(0, height * (size + 1), size + 1):
        line = bytearray(3) + data[start + 1 : start + 1 + size]  # with a pixel of nothing before the first
        way = data[start]
        for x in range(3, size + 3) if way else ():
            left, up, corner = line[x - 3], above[x], above[x - 3]
            if way == 4:
                distances = [(abs(up - corner), left), (abs(left - corner), up), (abs(left + up - 2 * corner), corner)]
                guess = min(distances, key=lambda each: each[0])[1]
            else:
                guess = (left, up, (left + up) // 2)[way - 1]
            line[x] = (line[x] + guess) & 255
        rows.append([bytes(line[x : x + 3]) for x in range(3, size + 3, 3)])
        above = line
    return rows


def with_palette(picture: bytes) -> bytes:
    """A PNG with the 256 most frequent colours of another that differ visibly; what is left are the edges of letters."""
    rows = pixels(picture)
    counts = Counter(pixel for row in rows for pixel in row)
    different: dict[tuple[int, ...], bytes] = {}  # else shades of grey would leave no room for those of links
    for colour, _ in counts.most_common():
        different.setdefault(tuple(part >> 3 for part in colour), colour)
    palette = list(different.values())[:256]
    nearest = {
        colour: min(
            range(len(palette)), key=lambda n: sum((a - b) ** 2 for a, b in zip(palette[n], colour, strict=True))
        )
        for colour in counts
    }
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0),
        b"PLTE": b"".join(palette),
        b"IDAT": zlib.compress(b"".join(b"\0" + bytes(nearest[pixel] for pixel in row) for row in rows), 9),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts.items()
    )


# == The pictures ==


def end_of(section: str) -> str:
    """JavaScript: where a section of a page ends, in pixels from the top of the window."""
    return f"document.querySelector('[aria-labelledby={section}]').getBoundingClientRect().bottom"


def main() -> int:
    """Make both pictures anew."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        server.environ["BASE_URL"] = f"http://localhost:{server.port}"
        shop = server.demo()
        server.start()
        chromium = Chromium(Path(folder))
        try:
            with urllib.request.urlopen(f"{shop.replace('localhost', '127.0.0.1')}/events.json") as answer:
                events = json.load(answer)["rows"]
            # An email to which much happened, and not long ago.
            key = next(row["key"] for row in events if row["reason"] == "hidden-link")
            tab = chromium.tab(server.environ["BASE_URL"] + "/")
            tab.screen(WIDTH, "light")
            for name, path in (("dashboard", "dashboard"), ("email", f"emails/{key}")):
                tab.go(f"{shop}/{path}")
                assert (tab.statuses, tab.complaints, tab.elsewhere) == ([200], [], [])
                picture = with_palette(tab.picture(int(tab.run(end_of(SHOWN[name]))) + MARGIN))
                print(f"tests/screenshots/{name}.png: {len(picture):,} bytes")
                if len(picture) > MOST:
                    print(f"which is more than {MOST:,}: end it with less", file=sys.stderr)
                    return 1
                FOLDER.mkdir(exist_ok=True)
                (FOLDER / f"{name}.png").write_bytes(picture)
        finally:
            chromium.close()
            server.stop()
            server.listener.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
