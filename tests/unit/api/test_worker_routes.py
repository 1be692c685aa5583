"""The routes of the worker API, each with an example, over a real socket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import msgspec.inspect
import pytest

from jobd.api.worker_routes import ROUTES
from jobd.model.commands import (
    About,
    Bulk,
    Cancel,
    Claim,
    Command,
    Complete,
    Create,
    Extend,
    Fail,
    Get,
    JobCommand,
    ListJobs,
    Progress,
    Queues,
    Release,
    Start,
    Timeline,
    Validate,
    Why,
    Workers,
)
from tests.support.http_harness import HttpHarness

# Call, example of a body (or query), command.
CALLS: list[tuple[str, str, str, Command]] = [
    ("POST", "/v1/jobs", '{"id":"a","queue":"q"}', Create(id="a", queue="q")),
    ("POST", "/v1/jobs/bulk", '{"jobs":[{},{"id":"b"}]}', Bulk(jobs=[Create(), Create(id="b")])),
    ("GET", "/v1/jobs/{id}", "", Get(id="j")),
    ("GET", "/v1/jobs", "status=failed&queue=q&kind=k&worker=w&limit=200&cursor=9",
     ListJobs(status="failed", queue="q", kind="k", worker="w", limit=200, cursor="9")),
    ("GET", "/v1/jobs/{id}/timeline", "", Timeline(id="j")),
    ("GET", "/v1/jobs/{id}/why", "", Why(id="j")),
    ("GET", "/v1/jobs/{id}/validate", "", Validate(id="j")),
    ("POST", "/v1/jobs/{id}/start", '{"worker":"w","lock_ttl_ms":1000,"stall_after_ms":0,"progress_timeout_ms":0}',
     Start(id="j", worker="w", lock_ttl_ms=1000, stall_after_ms=0, progress_timeout_ms=0)),
    ("POST", "/v1/claim",
     '{"worker":"w","queues":["q"],"kinds":["k"],"limit":100,"wait_ms":60000,"progress_timeout_ms":5}',
     Claim(worker="w", queues=["q"], kinds=["k"], limit=100, wait_ms=60000, progress_timeout_ms=5)),
    ("POST", "/v1/claim", '{"worker":"w","about":{"instance":"i","host":"h","pid":7,"version":"1","concurrency":4}}',
     Claim(worker="w", about=About(instance="i", host="h", pid=7, version="1", concurrency=4))),
    ("POST", "/v1/jobs/{id}/progress", '{"lock_id":"x","progress":1,"message":"m"}',
     Progress(id="j", lock_id="x", progress=1, message="m")),
    ("POST", "/v1/jobs/{id}/extend", '{"lock_id":"x","additional_ms":1000}',
     Extend(id="j", lock_id="x", additional_ms=1000)),
    ("POST", "/v1/jobs/{id}/complete", '{"lock_id":"x","download_url":"u","file_path":"f","storage_key":"s"}',
     Complete(id="j", lock_id="x", download_url="u", file_path="f", storage_key="s")),
    ("POST", "/v1/jobs/{id}/fail", '{"lock_id":"x","error_message":"m","error_code":"c","retry":false}',
     Fail(id="j", lock_id="x", error_message="m", error_code="c", retry=False)),
    ("POST", "/v1/jobs/{id}/release", '{"lock_id":"x","delay_ms":5}', Release(id="j", lock_id="x", delay_ms=5)),
    ("POST", "/v1/jobs/{id}/cancel", '{"reason":"r"}', Cancel(id="j", reason="r")),
    ("GET", "/v1/queues", "", Queues()),
    ("GET", "/v1/workers", "", Workers()),
]  # fmt: skip
KEYED = {Create, Bulk, Start, Claim, Cancel}


def plain(command: Any) -> Any:
    """Convert to builtins, so that raw values compare by their text."""
    return msgspec.json.decode(msgspec.json.encode(command))


@pytest.mark.parametrize(("method", "path", "body", "command"), CALLS)
async def test_a_call_is_its_command(tmp_path: Path, method: str, path: str, body: str, command: Command) -> None:
    target = path.replace("{id}", "j")
    async with HttpHarness(ROUTES, tmp_path) as harness:
        if method == "GET":
            response = await harness.request("GET", f"{target}?{body}" if body else target)
        else:
            response = await harness.request(method, target, body, {"Idempotency-Key": "k"})
        assert response.status == 200, response.json
        [envelope] = harness.actor.received
        assert type(envelope.command) is type(command)
        assert plain(envelope.command) == plain(command)
        assert envelope.admin is False
        assert (envelope.key is not None) == (type(command) in KEYED)


def test_every_call_has_an_example_and_no_route_is_missing() -> None:
    probes = {("GET", "/v1/cluster"), ("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/openapi.json")}
    probes |= {("GET", "/v1/events"), ("POST", "/v1/commands")}  # see test_event_stream.py, test_command_stream.py
    different = {(route.method, route.path) for route in ROUTES} ^ ({call[:2] for call in CALLS} | probes)
    assert not different, f"{different}: a route needs an example in CALLS, and an example a route"


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_the_types_of_a_route_can_be_described(route: Any) -> None:
    assert len(msgspec.inspect.multi_type_info([route.request, route.response])) == 2
    if issubclass(route.request, JobCommand):
        assert route.path_field == "id"
    assert route.auth == ("anyone" if route.path in {"/healthz", "/readyz", "/openapi.json"} else "worker")
    assert route.status == (201 if route.request in {Create, Bulk} else 200)
