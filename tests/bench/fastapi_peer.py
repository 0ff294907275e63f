"""A tracker after the README of FastAPI and that of aiosqlite: one connection a process, a commit for each hit."""

from __future__ import annotations

import base64
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timezone

import aiosqlite  # type: ignore[import-not-found, unused-ignore]  # not in every environment that checks types
import fastapi  # type: ignore[import-not-found, unused-ignore]

GIF = base64.b64decode("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7")
SCHEMA = """
create table if not exists emails (key text primary key, open_count integer not null default 0);
create table if not exists events (
    id integer primary key, email text not null, user_agent text, ip_address text, created_at text not null
);
"""


@asynccontextmanager
async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
    """Open the database for as long as the process serves."""
    async with aiosqlite.connect(os.environ["BENCH_DATABASE"]) as app.state.database:
        await app.state.database.executescript(SCHEMA)
        yield


async def pixel(key: str, request: fastapi.Request) -> fastapi.Response:
    """GET /pixel/KEY.gif: record the open, answer the image."""
    database = request.app.state.database
    headers = request.headers
    await database.execute(
        "insert into events (email, user_agent, ip_address, created_at) values (?, ?, ?, ?)",
        (key, headers.get("User-Agent"), headers.get("X-Forwarded-For"), datetime.now(timezone.utc).isoformat()),
    )
    await database.execute(
        "insert into emails values (?, 1) on conflict (key) do update set open_count = open_count + 1", (key,)
    )
    await database.commit()
    return fastapi.Response(GIF, media_type="image/gif", headers={"Cache-Control": "no-store"})


application = fastapi.FastAPI(lifespan=lifespan)
application.add_api_route("/pixel/{key}.gif", pixel)
