"""Build dist/email-tracker.pyz, the whole program in one file: `make dist`.

The same sources, Python and gunicorn give the same bytes. Each source has its .pyc beside it, because a Python that
runs from a zip keeps no __pycache__ and would compile everything at each start; a Python of another version than the
one that built the file passes over them and reads the sources.
"""

from __future__ import annotations

import importlib.util
import io
import marshal
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "dist" / "email-tracker.pyz"
MAIN = """\
import os
import sys

sys.path[0] = os.path.abspath(sys.path[0])  # the file is found again from whatever folder

import tracker

sys.exit(tracker.main())
"""
CHECKED_BY_NOBODY = 0b01  # a hash stands where the source's time would, and is not compared: PEP 552
# Half of gunicorn, loaded only where asked for: packages, and kinds of workers.
UNUSED = {"asgi", "ctl", "dirty", "http2", "instrument", "uwsgi"}
UNUSED |= {"base_async.py", "gasgi.py", "ggevent.py", "gthread.py", "gtornado.py"}
LONG_AGO = (1980, 1, 1, 0, 0, 0)  # no time of building


def sources() -> dict[str, bytes]:
    """What goes into the file, by its name there."""
    found = {"__main__.py": MAIN.encode()}
    for name in ("tracker.py", "schema.sql", "pixel.gif"):
        found[name] = (ROOT / name).read_bytes()
    for path in (ROOT / "templates").rglob("*.*"):
        found[path.relative_to(ROOT).as_posix()] = path.read_bytes()
    for file in distribution("gunicorn").files or ():
        if file.name == "LICENSE":
            found["gunicorn/LICENSE"] = file.read_binary()
        elif file.suffix == ".py" and UNUSED.isdisjoint(file.parts):
            found[file.as_posix()] = file.read_binary()
    return found


def compiled(name: str, source: bytes) -> bytes:
    """The .pyc of a source."""
    code = compile(source, f"{TARGET.name}/{name}", "exec", dont_inherit=True, optimize=0)
    flags = CHECKED_BY_NOBODY.to_bytes(4, "little")
    return importlib.util.MAGIC_NUMBER + flags + importlib.util.source_hash(source) + marshal.dumps(code)


def build() -> bytes:
    """The bytes of the whole file."""
    contents = sources()
    contents.update({f"{name}c": compiled(name, contents[name]) for name in sorted(contents) if name.endswith(".py")})
    zipped = io.BytesIO()
    zipped.write(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in sorted(contents):
            about = zipfile.ZipInfo(name, LONG_AGO)
            about.compress_type = zipfile.ZIP_DEFLATED
            about.external_attr = 0o644 << 16
            about.create_system = 3  # Unix, whatever builds it
            archive.writestr(about, contents[name])
    return zipped.getvalue()


if __name__ == "__main__":
    if sys.flags.hash_randomization or sys.flags.optimize:
        # Sets would be written in another order each time; marshal marks what the compiling process uses elsewhere too.
        sys.exit("expected PYTHONHASHSEED=0 and no -O, so that the same sources give the same bytes; use `make dist`")
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_bytes(build())
    TARGET.chmod(0o755)
    print(f"dist/{TARGET.name}: {TARGET.stat().st_size / 1000:,.0f} kB, fastest under Python {sys.version.split()[0]}")
