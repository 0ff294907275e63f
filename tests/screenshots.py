"""The pictures of README: the real server on a demo's database, as Chromium shows it. Run by `make screenshots`."""

from __future__ import annotations

import json
import sys
import tempfile
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from browser import Chromium  # noqa: E402  # it imports the tracker, which is beside the tests
from conftest import Server  # noqa: E402

FOLDER = ROOT / "tests" / "screenshots"
WIDTH, MOST = 1040, 150_000  # pixels across, and bytes
MARGIN = 16
SHOWN = {"dashboard": "links", "email": "timeline"}  # the section with which each picture ends


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
                picture = tab.picture(int(tab.run(end_of(SHOWN[name]))) + MARGIN)
                print(f"tests/screenshots/{name}.webp: {len(picture):,} bytes")
                if len(picture) > MOST:
                    print(f"which is more than {MOST:,}: end it with less", file=sys.stderr)
                    return 1
                FOLDER.mkdir(exist_ok=True)
                (FOLDER / f"{name}.webp").write_bytes(picture)
        finally:
            chromium.close()
            server.stop()
            server.listener.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
