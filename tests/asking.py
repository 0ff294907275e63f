"""What tests that ask over HTTP share: requests through wsgiref's validator (PEP 3333), answers, and pages as read."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any
from urllib.parse import unquote_to_bytes
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

from conftest import NOW, Stage

import tracker

ACME_KEY = "the-key-that-acme-has"


@dataclass(frozen=True)
class Answer:
    """A response, read to its end."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    errors: str  # what was written to wsgi.errors

    def __getitem__(self, name: str) -> str:
        (value,) = [value for each, value in self.headers if each.lower() == name.lower()]
        return value

    def __contains__(self, name: str) -> bool:
        return any(each.lower() == name.lower() for each, _ in self.headers)

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def environ_of(
    method: str, target: str, body: bytes = b"", headers: Mapping[str, str] | None = None, **more: Any
) -> dict[str, Any]:
    """A WSGI environment as gunicorn makes it; headers by their names, in latin-1 as PEP 3333 wants them."""
    path, _, query = target.partition("?")
    environ: dict[str, Any] = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
        "QUERY_STRING": query,
        "RAW_URI": target,
        "REMOTE_ADDR": "192.0.2.9",
        "HTTP_HOST": "track.example.com",
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": io.StringIO(),
        **({"CONTENT_LENGTH": str(len(body))} if body else {}),
        **{"HTTP_" + name.upper().replace("-", "_"): value for name, value in (headers or {}).items()},
        **more,
    }
    setup_testing_defaults(environ)
    return environ


def call(
    stage: Stage,
    method: str,
    target: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    unforeseen: bool = False,
    **more: Any,
) -> Answer:
    """One request, read to its end and closed; unless it is announced, nothing unforeseen may have happened."""
    environ = environ_of(method, target, body, headers, **more)
    log: io.StringIO = environ["wsgi.errors"]  # before the validator puts its own in its place
    started: list[tuple[str, list[tuple[str, str]]]] = []

    def start_response(status: str, response_headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        started.append((status, response_headers))
        return lambda data: None

    with contextlib.closing(validator(tracker.wsgi(stage.app))(environ, start_response)) as parts:  # type: ignore[type-var]
        read = b"".join(parts)
    ((status, sent_headers),) = started
    assert unforeseen or log.getvalue() == ""
    return Answer(int(status.split()[0]), sent_headers, read, log.getvalue())


def get(stage: Stage, target: str, headers: Mapping[str, str] | None = None, **more: Any) -> Answer:
    return call(stage, "GET", target, headers=headers, **more)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def register(stage: Stage, tenant: tracker.Tenant, *emails: tracker.Registration, at: int | None = None) -> None:
    """Register emails as the API does, at a time of the test's choice."""
    with stage.database.transaction() as connection:
        tracker.register_emails(connection, tenant.number, emails, tracker.now_ms() if at is None else at)


def spooled(stage: Stage) -> list[dict[str, Any]]:
    """The hits that wait in the spool, in order."""
    lines = b"".join(path.read_bytes() for path in sorted(stage.spool.glob("*.jsonl")))
    return [json.loads(line) for line in lines.splitlines()]


def add_one_id(stage: Stage, id_: str = "abc123") -> tracker.Tenant:
    """A tenant whose mail id opens its dashboard."""
    with tracker.changing_tenants(stage.database) as connection:
        tenant = tracker.add_tenant(connection, "One", NOW, id=id_)
    stage.refresh()
    return tenant


@contextlib.contextmanager
def database_away(stage: Stage) -> Iterator[None]:
    """The database file under another name for a while."""
    path = stage.folder / "tracking.db"
    path.rename(stage.folder / "away.db")
    yield
    assert not path.exists(), "somebody made a new database"
    (stage.folder / "away.db").rename(path)


class Page(HTMLParser):
    """What a browser would make of a page: its tags and its text, and of that the title and the notices."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = self.title = ""
        self.notices: list[str] = []
        self._began, self._kind = 0, ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "title" or dict(attrs).get("class") == "notice":
            self._began, self._kind = len(self.text), dict(attrs).get("class") or tag

    def handle_data(self, data: str) -> None:
        self.text += data.replace("\N{NO-BREAK SPACE}", " ")

    def handle_endtag(self, tag: str) -> None:
        if tag == "title" and not self.title:
            self.title = self.text[self._began :]
        if tag == "div" and self._kind == "notice":
            self.notices.append(self.text[self._began :])
            self._kind = ""

    @property
    def links(self) -> list[str]:
        return [value or "" for _, attrs in self.tags for name, value in attrs.items() if name in ("href", "src")]


def assert_private(answer: Answer) -> None:
    """The headers that keep a private page private."""
    assert answer["Referrer-Policy"] == "no-referrer"
    assert answer["X-Robots-Tag"] == "noindex"
    assert answer["Cache-Control"] == "no-store"
    assert answer["X-Content-Type-Options"] == "nosniff"
    policy = answer["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe-" not in policy


def assert_error(answer: Answer, status: int) -> str:
    """The answer is this error, with private headers and a sentence; returns the sentence."""
    assert answer.status == status, answer.text
    assert_private(answer)
    if answer["Content-Type"].startswith("application/json"):
        assert list(answer.json) == ["error"]
        return str(answer.json["error"])
    assert answer["Content-Type"] == "text/html; charset=utf-8"
    return Page(answer.text).text
