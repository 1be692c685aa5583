"""Every declared call with its examples, over a real socket: its command, its caller, and the response of a service."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Any, Final

import msgspec
import msgspec.inspect
import pytest

from jobd.api import admin_routes, worker_routes
from jobd.client.api_request import request_of
from jobd.http.auth import Authenticator
from jobd.model import commands
from jobd.model.commands import JobCommand, RecordAction, Tick
from jobd.model.errors import ApiError
from jobd.model.responses import EmptyResponse, Response
from tests.support.calls import CALLS, COMMANDS, DATA, EXAMPLES, Example
from tests.support.http_harness import TOKEN, HttpHarness, ReceivedResponse

TABLES: Final = {"worker": worker_routes.ROUTES, "admin": admin_routes.ROUTES}
AUTH: Final = {"Authorization": f"Bearer {TOKEN}"}
READER: Final = "reader-token-0123456789abcdef"
# Routes that are no calls: probes and documents, which need no token, and the stream of commands.
PUBLIC: Final = {("GET", path) for path in ("/healthz", "/readyz", "/openapi.json")}
STREAM: Final = ("POST", "/v1/commands")

Harnesses = dict[str, HttpHarness]


@pytest.fixture
async def harnesses(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Harnesses]:
    tokens = Authenticator("admin", tokens=[TOKEN])
    worker = HttpHarness(TABLES["worker"], tmp_path_factory.mktemp("worker"))
    admin = HttpHarness(TABLES["admin"], tmp_path_factory.mktemp("admin"), authenticator=tokens, admin=True)
    async with worker, admin:
        yield {"worker": worker, "admin": admin}


async def send(harness: HttpHarness, example: Example, headers: dict[str, str] = AUTH) -> ReceivedResponse:
    request = request_of(example.call, example.command)
    return await harness.request(request.method, request.path, request.body, {**headers, "Idempotency-Key": "k"})


def test_every_declared_call_has_an_example_and_a_route() -> None:
    examples = {(example.call.method, example.call.path) for example in EXAMPLES}
    assert not CALLS.keys() - examples, "a declared call needs an example in tests/support/calls.py"
    routes = {(route.method, route.path) for table in TABLES.values() for route in table}
    assert routes == CALLS.keys() | PUBLIC | {STREAM}


async def test_a_call_is_its_command(harnesses: Harnesses) -> None:
    lines_or_services = ("import_jobs", "preview_import", "take_back")
    for example in (each for each in COMMANDS if each.call.name not in lines_or_services):
        harness = harnesses[example.call.auth]
        harness.actor.received.clear()
        data = DATA.get(type(example.command), EmptyResponse())
        harness.actor.respond = lambda _, data=data: Response(data)
        response = await send(harness, example)
        assert response.status == 200, (example, response.json)
        envelope, *noted = harness.actor.received
        assert envelope.command == example.command
        assert (envelope.key is not None) == bool(example.call.options.get("key")), example
        by = "admin" if example.is_admin else example.command.sender() or "client"
        if by == "client" and isinstance(example.command, commands.Cancel):
            by = f"client:uid {os.getuid()}, pid {os.getpid()}"
        assert (envelope.by, envelope.admin) == (by, example.is_admin)
        then: dict[type, Any] = {commands.Export: RecordAction(what="export"), commands.Why: commands.Get(id="a")}
        added = then.get(type(example.command))
        assert [each.command for each in noted] == ([] if added is None else [added])


async def test_a_call_of_a_service_returns_its_result(harnesses: Harnesses) -> None:
    for example in (each for each in EXAMPLES if each.result is not None):
        assert (await send(harnesses[example.call.auth], example)).data == msgspec.to_builtins(example.result), example
    # Only audit entries.
    received = harnesses["admin"].actor.received
    assert {type(envelope.command) for envelope in received} == {RecordAction, Tick}
    assert harnesses["worker"].actor.received == []


async def test_every_call_except_the_public_ones_needs_the_token(harnesses: Harnesses) -> None:
    for route in TABLES["admin"]:
        path = route.path.replace("{id}", "a").replace("{name}", "q").replace("{plan_id}", "p1")
        response = await harnesses["admin"].request(route.method, path)
        assert response.status == (200 if (route.method, route.path) in PUBLIC else 401), route.path
    assert harnesses["admin"].actor.received == []


async def test_a_read_only_token_may_read_everything_without_secrets(harnesses: Harnesses) -> None:
    harness = harnesses["admin"]
    harness.app.authenticator.replace_tokens([TOKEN], [READER])
    harness.actor.respond = lambda command: ApiError("job_not_found", "It is asked, which is enough here.")
    for example in (each for each in EXAMPLES if each.is_admin):
        harness.actor.received.clear()
        response = await send(harness, example, {"Authorization": f"Bearer {READER}"})
        if example.call.method != "GET" or example.call.name == "backup":
            assert (response.status, response.error) == (403, "forbidden"), example
            assert "admin token" in response.json["message"]
            assert harness.actor.received == []
        else:
            assert response.status in (200, 404), example
            shows_lock_ids = any(envelope.admin for envelope in harness.actor.received)
            assert not shows_lock_ids or example.call.name == "validate_job", example


@pytest.mark.parametrize("name", TABLES)
def test_the_types_of_a_route_can_be_described(name: str) -> None:
    for route in TABLES[name]:
        assert len(msgspec.inspect.multi_type_info([route.request, route.response])) == 2
        assert route.auth == ("anyone" if (route.method, route.path) in PUBLIC else name)
        assert name == "admin" or not issubclass(route.request, JobCommand) or route.path_field == "id"
