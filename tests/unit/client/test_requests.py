"""The requests of both APIs, compared with the routes of the daemon, and the methods that send them."""

from __future__ import annotations

import inspect
from typing import Any

import msgspec
import pytest

from jobd.api import admin as admin_api
from jobd.api import worker
from jobd.client import (
    AdminClient,
    AsyncAdminClient,
    AsyncJobClient,
    InvalidRequest,
    JobClient,
    admin_requests,
    uuid7,
    worker_requests,
)
from jobd.client.protocol import (
    ApiRequest,
    job_path,
)
from jobd.model.responses import JobView
from tests.support.client_harness import (
    JOB,
)


def _placeholders(method: str, path: str) -> tuple[str, str]:
    return method, path.split("?")[0].replace("/x", "/{}").replace("/q/", "/{}/").replace("/w/", "/{}/")


def _all_requests() -> list[ApiRequest[Any]]:
    """Build a request of every call of both APIs."""
    given = {
        "job_id": "x",
        "queue": "q",
        "worker": "w",
        "lock_id": "l",
        "progress": 1,
        "error_message": "e",
        "from_status": "failed",
        "to_status": "queued",
        "jobs": [],
        "webhook": "q",
        "delivery": 1,
        "action": "retry",
        "plan_id": "x",
    }
    found = []
    for module in (worker_requests, admin_requests):
        for name, build in inspect.getmembers(module, inspect.isfunction):
            if build.__module__ != module.__name__ or name.startswith(("_", "read_")):
                continue
            needed = [
                parameter.name
                for parameter in inspect.signature(build).parameters.values()
                if parameter.default is inspect.Parameter.empty
            ]
            assert set(needed) <= set(given), f"{name}: give its arguments {set(needed) - set(given)} a value above"
            found.append(build(**{name: given[name] for name in needed}))
    return found


def test_every_route_of_the_daemon_has_a_call_and_every_call_a_route() -> None:
    streams = {"/v1/commands", "/v1/events", "/admin/job-management/events"}
    unasked = {"/healthz", "/readyz"} | streams
    routes = {
        (route.method, "/".join("{}" if part.startswith("{") else part for part in route.path.split("/")))
        for route in (*worker.ROUTES, *admin_api.ROUTES)
        if route.path not in unasked and route.path.startswith(("/v1", "/admin", "/metrics"))
    }
    received = {_placeholders(request.method, request.path) for request in _all_requests()}
    assert received - routes == set(), "calls without a route"
    missing = routes - received - {("GET", "/openapi.json")}
    assert not missing, f"{missing} need a function in client/worker_requests.py or admin_requests.py"


def test_calls_send_an_idempotency_key_if_their_routes_take_one() -> None:
    keyed = {
        (route.method, "/".join("{}" if part.startswith("{") else part for part in route.path.split("/")))
        for route in (*worker.ROUTES, *admin_api.ROUTES)
        if route.key
    }
    sent = {
        _placeholders(request.method, request.path)
        for request in _all_requests()
        if "Idempotency-Key" in request.headers
    }
    # A create is repeatable because of its job id.
    assert sent == keyed - {("POST", "/v1/jobs")}, (
        "requests have a key, by default a uuid7, if their route has key=True"
    )


def test_both_clients_have_every_call() -> None:
    for module, blocking, coroutines in (
        (worker_requests, JobClient, AsyncJobClient),
        (admin_requests, AdminClient, AsyncAdminClient),
    ):
        names = {
            name
            for name, build in inspect.getmembers(module, inspect.isfunction)
            if build.__module__ == module.__name__ and not name.startswith("_")
        }
        assert names <= {*dir(blocking), "queue_page"}
        only_blocking = {"import_jobs", "preview_import", "backup", "download_artifact"}
        assert names | {"iterate_jobs", "iterate_queues", "events"} <= {*dir(coroutines), "queue_page"} | only_blocking


def test_methods_show_the_arguments_and_docstrings_of_their_calls() -> None:
    assert list(inspect.signature(JobClient.claim).parameters)[:3] == ["self", "worker", "queues"]
    assert next(iter(inspect.signature(JobClient("unix:/x").claim).parameters)) == "worker"
    assert AsyncJobClient.claim.__doc__ == worker_requests.claim.__doc__
    assert inspect.iscoroutinefunction(AsyncJobClient.claim)


def test_create_makes_an_id() -> None:
    request = worker_requests.create_job({"n": 1}, queue="video", delay_ms=5)
    fields = msgspec.json.decode(request.body or b"")
    assert fields == {"id": fields["id"], "payload": {"n": 1}, "queue": "video", "delay_ms": 5}
    assert len(fields["id"]) == 36
    assert fields["id"][14] == "7"
    assert request.repeatable
    assert msgspec.json.decode(worker_requests.create_job(id="mine").body or b"") == {"id": "mine"}


def test_bulk_makes_an_id_for_each_job_without_one() -> None:
    fields = msgspec.json.decode(
        worker_requests.create_jobs([{"payload": 1}, {"id": "b", "payload": None}]).body or b""
    )
    assert [set(job) for job in fields["jobs"]] == [{"id", "payload"}, {"id", "payload"}]
    assert fields["jobs"][1]["id"] == "b"


def test_uuid7_sorts_by_time_and_has_version_and_variant() -> None:
    made = [uuid7() for _ in range(50)]
    assert len(set(made)) == 50
    assert [name[:13] for name in made] == sorted(name[:13] for name in made)
    assert all(name[14] == "7" and name[19] in "89ab" for name in made)


@pytest.mark.parametrize(
    ("job_id", "path"),
    [
        ("a:b-c.d_e", "/v1/jobs/a:b-c.d_e"),
        ("a/b", "/v1/jobs/a%2Fb"),
        ("..", "/v1/jobs/%2E%2E"),
        (".", "/v1/jobs/%2E"),
        ("é", "/v1/jobs/%C3%A9"),
    ],
)
def test_an_id_is_one_segment_of_the_path(job_id: str, path: str) -> None:
    assert job_path("/v1/jobs", job_id) == path
    assert job_path("/v1/jobs", job_id, "start") == f"{path}/start"


def test_an_empty_id_is_rejected() -> None:
    with pytest.raises(InvalidRequest):
        worker_requests.get_job("")


def test_one_queue_may_be_a_string() -> None:
    assert msgspec.json.decode(worker_requests.claim("w", queues="video").body or b"")["queues"] == ["video"]
    for request in (
        worker_requests.start_processing("a", "w", max_processing_ms=0),
        worker_requests.claim("w", max_processing_ms=0),
    ):
        assert msgspec.json.decode(request.body or b"") == {"worker": "w", "max_processing_ms": 0}


def test_a_job_can_be_read_although_python_cannot_hold_its_payload() -> None:
    body = msgspec.json.encode({"success": True, "data": JOB}).replace(b'{"a":1}', b"1e999")
    job = worker_requests.get_job("j1").read(body)
    assert bytes(job.payload) == b"1e999"  # type: ignore[arg-type]
    assert job.metadata_value == {"m": [1]}
    with pytest.raises(msgspec.DecodeError):
        _ = job.payload_value
    assert "payload=b'1e999'" in repr(job)


def test_a_printed_job_shows_its_payload_and_no_missing_fields() -> None:
    text = repr(worker_requests.get_job("j1").read(msgspec.json.encode({"success": True, "data": JOB})))
    assert text.startswith("JobInfo(id='j1', ")
    assert "payload={'a': 1}" in text
    assert "metadata={'m': [1]}" in text
    assert "msgspec" not in text
    assert "UNSET" not in text


def test_unknown_fields_of_a_job_are_skipped() -> None:
    job = worker_requests.get_job("j1").read(msgspec.json.encode({"success": True, "data": JOB, "more": 1}))
    assert isinstance(job, JobView)
    assert (job.id, job.payload_value, job.repeated) == ("j1", {"a": 1}, msgspec.UNSET)
