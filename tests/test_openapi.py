"""templates/openapi.json is held against the program: its routes, the fields of its tables, what it reads and answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from asking import bearer, call
from conftest import OPERATOR_KEY, ROOT, Stage

import tracker

SPEC: dict[str, Any] = json.loads((ROOT / "templates" / "openapi.json").read_bytes())
OPERATIONS = {(method.upper(), path): each for path, item in SPEC["paths"].items() for method, each in item.items()}
ROWS = {"emails": "Email", "events": "Event", "links": "Link", "campaigns": "Campaign", "clients": "Client"}


def resolved(value: Any) -> Any:
    """A part of the file, or what it refers to."""
    if "$ref" not in value:
        return value
    place: Any = SPEC
    for name in value["$ref"].removeprefix("#/").split("/"):
        place = place[name]
    return place


def parts(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in a part of the file, with those that they refer to."""
    if isinstance(value, dict):
        value = resolved(value)
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from parts(each)


def parameters(operation: dict[str, Any], place: str) -> list[str]:
    return [each["name"] for each in map(resolved, operation.get("parameters", ())) if each["in"] == place]


# == Against what the program says of itself ==


def test_each_route_is_described_and_nothing_else() -> None:
    assert sorted(OPERATIONS) == sorted((route.method, route.pattern) for route in tracker.ROUTES)
    assert len({each["operationId"] for each in OPERATIONS.values()}) == len(OPERATIONS)
    keys: dict[str, list[dict[str, list[str]]]] = {
        tracker.WRITER: [{"tenantKey": []}, {"operatorKey": []}],
        tracker.OPERATOR: [{"operatorKey": []}],
    }
    for route in tracker.ROUTES:
        each = OPERATIONS[route.method, route.pattern]
        assert each["tags"] == [route.access]
        assert (
            each.get("security", []) == keys.get(route.access, []) or route.pattern == "/health"
        )  # who may give a key
        assert parameters(each, "path") == re.findall(r"{(\w+)}", route.pattern)
    assert tracker.__version__.partition(".dev")[0] == SPEC["info"]["version"]


def test_each_part_is_used_somewhere() -> None:
    used: set[str] = set()
    new = references(SPEC["paths"])
    while new - used:
        used |= new
        new = {name for each in used for name in references(resolved({"$ref": f"#/components/{each}"}))}
    kinds = ("schemas", "parameters", "responses")
    assert used == {f"{kind}/{name}" for kind in kinds for name in SPEC["components"][kind]}


def references(value: Any) -> set[str]:
    return set(re.findall(r'"#/components/(\w+/\w+)"', json.dumps(value)))


def test_rows_have_the_fields_of_their_tables() -> None:
    for name, table in tracker.TABLES.items():
        row = SPEC["components"]["schemas"][ROWS[name]]
        assert tuple(row["properties"]) == table.fields
        assert set(row["required"]) == set(table.fields) - set(tracker.PERSONAL_FIELDS)
    change = SPEC["components"]["schemas"]["Change"]
    assert tuple(change["properties"]) == tracker.CHANGE_FIELDS
    assert set(change["required"]) == set(tracker.CHANGE_FIELDS) - set(tracker.PERSONAL_FIELDS)


def test_every_answer_forbids_further_properties() -> None:
    objects = [
        part for each in OPERATIONS.values() for part in parts(each["responses"]) if part.get("type") == "object"
    ]
    assert len(objects) > 100
    assert all(part["additionalProperties"] is False for part in objects)


def test_every_error_that_programs_get_is_an_error_in_json() -> None:
    for (method, path), each in OPERATIONS.items():
        route = next(route for route in tracker.ROUTES if (route.method, route.pattern) == (method, path))
        for status, answer in each["responses"].items():
            if status >= "4" and (route.errors is tracker.as_json or route.access != tracker.ANYONE):
                assert "application/json" in resolved(answer)["content"], (method, path, status)


# == Against what it reads ==


@pytest.mark.parametrize(
    ("method", "path"),
    [pair for pair, each in OPERATIONS.items() if "application/json" in str(each.get("requestBody"))],
)
def test_the_fields_of_a_body_are_those_that_are_read(still: Stage, method: str, path: str) -> None:
    schema = resolved(OPERATIONS[method, path]["requestBody"]["content"]["application/json"]["schema"])
    schema = resolved(schema.get("oneOf", [schema])[0])
    target = path.format(id=still.acme.id, key="k", tenant="Acme")
    answer = call(still, method, target, b'{"no such": 1}', bearer(OPERATOR_KEY))
    assert answer.json["error"] == f"no such: unknown field; expected some of {', '.join(schema['properties'])}"
    for name, each in schema["properties"].items():  # and each is of the type that is said
        body = json.dumps({name: {"string": 5, "boolean": "true", "integer": "5", "array": "x"}[type_of(each)]})
        answer = call(still, method, target, body.encode(), bearer(OPERATOR_KEY))
        assert answer.status == 400 and answer.json["error"].startswith(f"{name}: expected "), answer.text


def type_of(schema: Any) -> str:
    kind = resolved(resolved(schema).get("oneOf", [schema])[-1])["type"]
    return str(kind[0] if isinstance(kind, list) else kind)


STRICT = [pair for pair in OPERATIONS if re.fullmatch(r"/{id}/(\w+\.(json|csv)|messages|.*}\.json)", pair[1])]


@pytest.mark.parametrize(("method", "path"), STRICT)
def test_the_parameters_of_a_query_are_those_that_are_read(still: Stage, method: str, path: str) -> None:
    target = path.format(id=still.acme.id, campaign="Spring")
    answer = call(still, method, f"{target}?whole=&no%20such=1", b"Subject: x\r\n\r\n" if method == "POST" else b"")
    known = set(answer.json["error"].partition("expected some of ")[2].split(", "))
    assert known == set(parameters(OPERATIONS[method, path], "query")), answer.text
