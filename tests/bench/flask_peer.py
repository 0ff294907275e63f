"""A tracker as one writes it in an evening: Flask, a sqlite3 connection for each request, a commit for each hit.

Nothing here is slower than it need be in such a program, and nothing is tuned: it is what a small tracker is when
nobody has thought about speed.
"""

from __future__ import annotations

import base64
import os
import sqlite3
from datetime import datetime, timezone

import flask  # type: ignore[import-not-found, unused-ignore]  # not in every environment that checks types

DATABASE = os.environ["BENCH_DATABASE"]
GIF = base64.b64decode("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7")
SCHEMA = """
create table if not exists emails (
    key text primary key,
    open_count integer not null default 0
);
create table if not exists events (
    id integer primary key,
    email text not null,
    user_agent text,
    ip_address text,
    created_at text not null
);
"""


def connection() -> sqlite3.Connection:
    """This request's own connection, made when it is first asked for."""
    if "connection" not in flask.g:
        flask.g.connection = sqlite3.connect(DATABASE)
    made: sqlite3.Connection = flask.g.connection
    return made


def close_connection(error: BaseException | None = None) -> None:
    """At the end of each request."""
    if (made := flask.g.pop("connection", None)) is not None:
        made.close()


def pixel(key: str) -> flask.Response:
    """GET /pixel/KEY.gif: record the open, answer the image."""
    address = flask.request.headers.get("X-Forwarded-For", flask.request.remote_addr)
    connection().execute(
        "insert into events (email, user_agent, ip_address, created_at) values (?, ?, ?, ?)",
        (key, flask.request.headers.get("User-Agent"), address, datetime.now(timezone.utc).isoformat()),
    )
    connection().execute(
        "insert into emails values (?, 1) on conflict (key) do update set open_count = open_count + 1", (key,)
    )
    connection().commit()
    return flask.Response(GIF, mimetype="image/gif", headers={"Cache-Control": "no-store"})


# Calls where one would write decorators: where Flask is not installed, a checker of types objects to those.
application = flask.Flask(__name__)
application.teardown_appcontext(close_connection)
application.add_url_rule("/pixel/<key>.gif", view_func=pixel)

with sqlite3.connect(DATABASE) as first:
    first.executescript(SCHEMA)
first.close()
