"""A live server is asked for what templates/openapi.json describes, and for much else, and answers as it says there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from conftest import OPERATOR_KEY, Server, missing
from test_openapi import OPERATIONS, SPEC

APART = Path(sys.prefix) / "apart"  # where make puts schemathesis
HOOKS = """
import schemathesis
schemathesis.serializer.alias("message/rfc822", "text/plain")

@schemathesis.hook
def before_call(context, case, kwargs):
    kwargs["allow_redirects"] = False  # nobody else is asked
"""
CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "503"]
[phases.coverage]
unexpected-methods = []  # test_web.py has them
[[operations]]
include-path-regex = '[.]csv$'  # what answers these in JSON too
phases.coverage.enabled = false
"""
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,ignored_auth"
)
EXAMPLES = 3  # of each operation, beside those at the limits of each field
SECONDS = 120  # in which it must have ended: some fifteen do, where nobody else works


def test_a_server_gives_no_answer_that_is_not_described(servers: Callable[..., Server]) -> None:
    if not (APART / "schemathesis").is_dir():
        missing("schemathesis")
    server = servers(API_KEY=OPERATOR_KEY)
    shop = server.demo()
    server.start()
    server.run("tenant", "key", "Acme Shoes")
    server.run("tenant", "set", "Acme Shoes", "--feed")
    with urlopen(f"{server.url}/openapi.json") as answer:
        spec = json.load(answer)
    assert spec == SPEC
    with urlopen(f"{shop}/emails.json?limit=1&show=clicked") as answer:
        [email] = json.load(answer)["rows"]
    guessed = {  # what no generator would hit upon
        "id": [shop.rpartition("/")[2], "nobody"],
        "mail_id": [json.loads(server.run("tenant", "show", "Acme Shoes", "--json"))["mail_id"]],
        "key": [email["key"], "nothing"],
        "campaign": [email["campaign"]],
        "link": ["1", "2", "3"],
        "tenant": ["Globex Weekly", "nobody"],
    }
    for part in (*spec["components"]["parameters"].values(), *described(spec["paths"])):
        if part["in"] == "path" and part["name"] in guessed:
            part["schema"] = {"enum": guessed[part["name"]]}
    for name, text in (("openapi.json", json.dumps(spec)), ("hooks.py", HOOKS), ("schemathesis.toml", CONFIG)):
        (server.folder / name).write_text(text)
    words = ["--url", server.url, "-c", CHECKS, "-n", str(EXAMPLES), "--phases", "coverage,fuzzing", "--seed", "1"]
    words += ["-H", f"Authorization: Bearer {OPERATOR_KEY}", "--no-color", "--warnings", "off"]
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", *words],
        env={**os.environ, "PYTHONPATH": str(APART), "SCHEMATHESIS_HOOKS": "hooks"},
        cwd=server.folder,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Tested: {len(OPERATIONS)}\n" in done.stdout
    assert int(re.findall(r"(\d+) generated", done.stdout)[0]) > 1_000


def described(paths: dict[str, Any]) -> list[dict[str, Any]]:
    """The parameters of operations that stand there themselves."""
    every = (each for item in paths.values() for method in item.values() for each in method.get("parameters", ()))
    return [each for each in every if "$ref" not in each]
