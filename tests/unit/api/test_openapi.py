"""The OpenAPI documents are valid, complete and described, and agree with the decoders."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema_rs import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from jobd.api import admin_routes, openapi, worker_routes
from jobd.api.command_stream import LINE_TYPES, StreamedCommand, line_decoders
from jobd.api.openapi import document, error_codes
from jobd.http.auth import Authenticator, accepted_hosts
from jobd.http.decoding import Limits, RequestDecoder
from jobd.http.routing import Route
from jobd.model import errors
from jobd.model.errors import ApiException
from jobd.model.events import StreamedEvent
from jobd.model.job import storage_key_error
from tests.support.http_harness import TOKEN, HttpHarness

TABLES: dict[str, Sequence[Route]] = {"worker": worker_routes.ROUTES, "admin": admin_routes.ROUTES}
DOCUMENTS: dict[str, dict[str, Any]] = {name: document(name, table) for name, table in TABLES.items()}


def call_of(route: Route) -> str:
    return f"{route.method} {route.path}"


BY_DOCUMENT = pytest.mark.parametrize("name", TABLES)


def operations(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return every call of a document."""
    for path, methods in DOCUMENTS[name]["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def resolved(name: str, operation: dict[str, Any]) -> dict[str, Any]:
    """Return `operation`, or the component that it refers to."""
    found: dict[str, Any] = DOCUMENTS[name]
    if "$ref" not in operation:
        return operation
    for step in operation["$ref"].removeprefix("#/").split("/"):
        found = found[step]
    return found


@BY_DOCUMENT
def test_a_document_is_valid_openapi(name: str) -> None:
    OpenAPIV31SpecValidator(json.loads(json.dumps(DOCUMENTS[name]))).validate()
    assert DOCUMENTS[name]["openapi"].startswith("3.1.")


@BY_DOCUMENT
def test_every_route_is_in_its_document_and_nothing_else(name: str) -> None:
    assert [call for call, _ in operations(name)] == [
        call_of(route) for route in sorted(TABLES[name], key=lambda route: list(_paths(name)).index(route.path))
    ]
    ids = [operation["operationId"] for _, operation in operations(name)]
    assert len(ids) == len(set(ids))


def _paths(name: str) -> dict[str, None]:
    return dict.fromkeys(route.path for route in TABLES[name])


@BY_DOCUMENT
def test_every_call_has_a_tag_with_a_description(name: str) -> None:
    headings = {tag["name"]: tag["description"] for tag in DOCUMENTS[name]["tags"]}
    used = {heading for _, operation in operations(name) for heading in operation["tags"]}
    assert used == set(headings)
    assert all(headings.values())


def test_every_tag_is_used() -> None:
    assert {route.tag for table in TABLES.values() for route in table} == openapi.TAGS.keys()


@BY_DOCUMENT
def test_a_call_documents_its_success_and_its_errors(name: str) -> None:
    operation = dict(operations(name))
    for route in TABLES[name]:
        responses = operation[call_of(route)]["responses"]
        wanted = {route.status, *route.other_statuses}
        wanted |= {errors.ERROR_STATUS[code] for code in error_codes(route)}
        assert {int(status) for status in responses} == wanted
        kinds = resolved(name, responses[str(route.status)])["content"]
        assert list(kinds) == [route.content_type]
        for code in error_codes(route):
            assert f"`{code}`" in resolved(name, responses[str(errors.ERROR_STATUS[code])])["description"]
        headers = {each["name"] for each in operation[call_of(route)]["parameters"] if each["in"] == "header"}
        wanted_headers = {"Idempotency-Key"} if route.key else set()
        taken = call_of(route).endswith(("/export", "/backup", "/artifact"))  # recorded in the audit log
        if route.auth == "admin" and (route.method != "GET" or taken):
            wanted_headers.add("X-Jobd-Operator")
            wanted_headers |= {"If-Match"} if route.takes_version else set()
        elif route.path in ("/v1/jobs/{id}/cancel", "/v1/commands"):
            wanted_headers.add("X-Jobd-Client")
        assert headers == wanted_headers | ({"Last-Event-ID"} if route.response is StreamedEvent else set())
        assert (operation[call_of(route)]["security"] == [{"token": []}]) == (route.auth == "admin")
        assert ("requestBody" in operation[call_of(route)]) == (route.method != "GET")


@BY_DOCUMENT
def test_every_call_field_and_parameter_is_described(name: str) -> None:
    assert all(operation["summary"].endswith(".") for _, operation in operations(name))
    queries = [each for _, operation in operations(name) for each in operation["parameters"] if each["in"] == "query"]
    schemas = DOCUMENTS[name]["components"]["schemas"]
    fields = [
        (f"{shape}.{field}", operation)
        for shape in schemas
        for field, operation in schemas[shape]["properties"].items()
    ]
    fields += [(each["name"], each["schema"]) for each in queries]
    assert [field for field, operation in fields if not operation.get("description")] == []
    assert fields


@pytest.mark.parametrize("route", [route for table in TABLES.values() for route in table], ids=call_of)
def test_the_error_codes_of_a_call_are_known(route: Route) -> None:
    assert {*route.errors, *route.request.errors} <= set(errors.ERROR_CODES)


def test_every_error_code_is_documented_except_those_of_unknown_paths() -> None:
    documented = {code for table in TABLES.values() for route in table for code in error_codes(route)}
    assert set(errors.ERROR_STATUS) - documented == {"method_not_allowed"}


@pytest.fixture(params=TABLES)
async def listener(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[str, HttpHarness]]:
    authenticator = Authenticator(request.param, tokens=[TOKEN], hosts=accepted_hosts("127.0.0.1"))
    async with HttpHarness(tuple(TABLES[request.param]), tmp_path, authenticator=authenticator) as opened:
        yield request.param, opened


async def test_a_document_is_served_without_a_token(listener: tuple[str, HttpHarness]) -> None:
    name, harness = listener
    for _ in range(2):
        response = await harness.request("GET", "/openapi.json")
        assert (response.status, response.headers["content-type"]) == (200, "application/json")
        assert response.json["paths"] == json.loads(json.dumps(DOCUMENTS[name]["paths"]))
        assert response.json["info"]["title"] == f"jobd {name} API"
    assert (await harness.request("GET", "/openapi.json?x=1")).status == 400
    assert (await harness.request("GET", "/openapi.json", headers={"Host": "evil.example"})).status == 403
    assert harness.actor.received == []


# -- bodies: schema and decoder agree ----------------------------------------------------------------------------------

# Call, or kind of line -> its document, the name of its schema, its decoder, the value of its path.
DECODERS: dict[str, tuple[str, str, RequestDecoder, str | None]] = {
    call_of(route): (
        name,
        route.request.__name__,
        RequestDecoder(route.request, route.path_field, Limits()),
        "a" if route.path_field else None,
    )
    for name, table in TABLES.items()
    for route in table
    if route.method != "GET" and route.request is not StreamedCommand
}
DECODERS |= {
    f"line {op}": ("worker", LINE_TYPES[op].__name__, decoder, None) for op, decoder in line_decoders(Limits()).items()
}
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def near(name: str, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Generate values that a schema accepts, and some just outside of it."""
    schema = resolved(name, schema) | {key: value for key, value in schema.items() if key != "$ref"}
    if "anyOf" in schema:
        return st.one_of([near(name, choice) for choice in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from([*schema["enum"], "", schema["enum"][0].upper()])
    kind = schema.get("type")
    if kind == "object" and "properties" in schema:
        fields = {field: near(name, part) | JSON_VALUES for field, part in schema["properties"].items()}
        optional = {field: part for field, part in fields.items() if field not in schema["required"]}
        needed = {field: near(name, schema["properties"][field]) for field in schema["required"]}
        return st.fixed_dictionaries(needed, optional={**optional, "stranger": JSON_VALUES})
    if kind == "array":
        return st.lists(near(name, schema["items"]), max_size=schema.get("maxItems", 3) + 1)
    if kind in ("integer", "number"):
        low, high = schema.get("minimum", -10), schema.get("maximum", 10)
        edges = st.sampled_from([low - 1, low, high, high + 1, low + 0.5])  # JSON Schema accepts 5.0
        return st.integers(low, high) | edges
    if kind == "string":
        return st.text(st.sampled_from("aZ9.:-_/ \n\x00\x7fé"), max_size=12) | st.sampled_from(["job-1", "a" * 201])
    return {"null": st.none(), "boolean": st.booleans()}.get(str(kind), JSON_VALUES)


@cache
def body_of(call: str) -> tuple[st.SearchStrategy[Any], Draft202012Validator]:
    """Return a strategy of bodies for a call, and the validator of its schema."""
    name, called, _, _ = DECODERS[call]
    schema = {"$ref": f"#/components/schemas/{called}"}
    return near(name, schema), Draft202012Validator(schema | {"components": DOCUMENTS[name]["components"]})


def value_at(body: Any, path: str) -> Any:
    """Return the value in `body` at a path such as `$.jobs[3].priority`, None if there is none."""
    for name, index in re.findall(r"\.([^.\[]+)|\[(\d+)\]", path):
        try:
            body = body[int(index)] if index else body[name]
        except (TypeError, KeyError, IndexError):
            return None
    return body


def is_beside_its_schema(rejection: errors.ApiError, body: Any) -> bool:
    """Return whether `body` may be rejected because of the named field although its schema accepts it.

    A storage key can be invalid in ways that no schema expresses, and JSON Schema counts 5.0 as an integer.
    """
    field = rejection.details["field"]
    value = value_at(body, field)
    if field in ("$.storage_key", "$.updates.storage_key"):
        fault = storage_key_error(value) if isinstance(value, str) else None
        return fault is not None and fault in rejection.message
    return isinstance(value, float) and value.is_integer() and "got a number" in rejection.message


@pytest.mark.parametrize(
    ("body", "field", "message", "fair"),
    [
        (
            {"storage_key": "../up"},
            "$.storage_key",
            "`$.storage_key` " + (storage_key_error("../up") or "") + ".",
            True,
        ),
        ({"updates": {"storage_key": "/a"}}, "$.updates.storage_key", (storage_key_error("/a") or "") + ".", True),
        ({"storage_key": "fine"}, "$.storage_key", "expected a string.", False),
        ({"storage_key": 5}, "$.storage_key", "expected a string, got a number.", False),
        ({"storage_key": "../up"}, "$.x", "is not a field of this request. Known fields: lock_id, storage_key.", False),
        ({"jobs": [{"priority": 5.0}]}, "$.jobs[0].priority", "expected an integer, got a number.", True),
        ({"jobs": [{"priority": 5.5}]}, "$.jobs[0].priority", "expected an integer, got a number.", False),
        ({"jobs": [{"priority": 5}]}, "$.jobs[0].priority", "expected an integer, got a number.", False),
        ({"jobs": [{"priority": 5.0}]}, "$.jobs[1].priority", "expected an integer, got a number.", False),
        ([5.0], "$", "expected an object, got a number.", False),
    ],
)
def test_some_checks_go_beyond_the_schema(body: Any, field: str, message: str, fair: bool) -> None:
    assert is_beside_its_schema(errors.ApiError("invalid_request", message, {"field": field}), body) == fair


@pytest.mark.slow
@pytest.mark.parametrize("call", DECODERS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_the_decoder_accepts_a_body_exactly_if_its_schema_does(call: str, data: st.DataObject) -> None:
    """The decoder also checks values, such as the segments of a storage key and the size of a payload."""
    _, _, decoder, given_by_path = DECODERS[call]
    strategy, schema = body_of(call)
    body = data.draw(strategy)
    try:
        taken: object = decoder.from_body(json.dumps(body).encode(), given_by_path)
    except ApiException as no:
        taken = no.error
    if isinstance(taken, errors.ApiError):
        assert taken.code == "invalid_request"
        assert is_beside_its_schema(taken, body) or not schema.is_valid(body), taken.message
    else:
        assert type(taken) is decoder.command
        assert schema.is_valid(body)
