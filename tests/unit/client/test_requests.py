"""The requests of both APIs, compared with the routes of the daemon, and the methods that send them."""

from __future__ import annotations

import inspect
from typing import Any

import msgspec
import pytest

from jobd.client import AdminClient, AsyncAdminClient, AsyncJobClient, InvalidRequest, JobClient, requests, uuid7
from jobd.client.api_request import ApiRequest, request_for
from jobd.client.apis import AdminApi, WorkerApi
from jobd.model.api_call import calls_of
from jobd.model.calls import ADMIN, ADMIN_API, WORKER_API
from jobd.model.responses import JobView
from tests.support.client_harness import JOB


def test_the_clients_differ_only_in_the_calls_that_transfer_files() -> None:
    only_blocking = {"import_jobs", "preview_import", "backup", "download_artifact"}
    for blocking, coroutines in ((JobClient, AsyncJobClient), (AdminClient, AsyncAdminClient)):
        names = {name for name in dir(blocking) if not name.startswith("_")}
        assert names - only_blocking <= {*dir(coroutines)}
    assert only_blocking <= {*dir(AdminClient)}


def test_a_request_has_the_given_fields_in_its_path_query_or_body() -> None:
    changed = request_for(AdminApi.pause_queue, "q/1", "why", until=5)
    assert (changed.method, changed.path) == ("POST", f"{ADMIN}/queues/q%2F1/pause")
    assert msgspec.json.decode(changed.body or b"") == {"reason": "why", "until": 5}
    assert len(changed.headers["Idempotency-Key"]) == 36
    named = request_for(AdminApi.extend_lock, "j", "secret", 5)
    assert msgspec.json.decode(named.body or b"") == {"jobId": "j", "lockId": "secret", "additionalTime": 5}
    assert request_for(AdminApi.queue_page, limit=7, busiest=True).path == f"{ADMIN}/queues?limit=7&busiest=true"
    assert request_for(AdminApi.health).path == f"{ADMIN}/health"
    assert request_for(WorkerApi.list_jobs, queue="\udcff").path == "/v1/jobs?queue=%ED%B3%BF", "the daemon rejects it"


def test_a_call_whose_repetition_has_another_result_is_not_repeated() -> None:
    assert {call.name for call in calls_of(*WORKER_API, *ADMIN_API) if not call.repeatable} == {
        "take_back", "detect_and_recover_stuck_jobs", "step_down", "resend_delivery", "resend_dead_lettered",
        "test_webhook", "import_jobs", "preview_import", "append_output",
    }  # fmt: skip
    assert [request_for(AdminApi.take_back, "w", dry_run=dry).repeatable for dry in (False, True)] == [False, True]


def test_a_client_sends_the_key_and_the_version_of_its_caller_with_changes() -> None:
    sent: list[ApiRequest[Any]] = []
    keyed, conditional = JobClient("unix:/x").with_key("k1"), AdminClient("unix:/x", token="t").if_match("0a1b")
    for client in (keyed, conditional):
        client.send = lambda request, *_: sent.append(request)  # type: ignore[assignment]
        client.cancel_job("j")
        client.get_job("j")
    assert [each.headers.get("Idempotency-Key") for each in (sent[0], sent[1])] == ["k1", None]
    assert [each.headers.get("If-Match") for each in sent] == [None, None, '"0a1b"', None]
    for key in ("", "ключ", "é", "a\nb", "k" * 201, "\udcff"):
        for use in (keyed.with_key, lambda key: requests.create_job(idempotency_key=key)):
            with pytest.raises(InvalidRequest, match="Idempotency-Key must be 1 to 200 printable ASCII characters"):
                use(key)


def test_methods_show_the_arguments_and_docstrings_of_their_calls() -> None:
    assert list(inspect.signature(JobClient.claim).parameters)[:3] == ["self", "worker", "queues"]
    assert next(iter(inspect.signature(JobClient("unix:/x").claim).parameters)) == "worker"
    assert AsyncJobClient.claim.__doc__ == requests.claim.__doc__
    assert inspect.iscoroutinefunction(AsyncJobClient.claim)


def test_create_makes_an_id() -> None:
    request = requests.create_job({"n": 1}, queue="video", delay_ms=5)
    fields = msgspec.json.decode(request.body or b"")
    assert fields == {"id": fields["id"], "payload": {"n": 1}, "queue": "video", "delay_ms": 5}
    assert len(fields["id"]) == 36
    assert fields["id"][14] == "7"
    assert request.repeatable
    assert msgspec.json.decode(requests.create_job(id="mine").body or b"") == {"id": "mine"}


def test_bulk_makes_an_id_for_each_job_without_one() -> None:
    fields = msgspec.json.decode(requests.create_jobs([{"payload": 1}, {"id": "b", "payload": None}]).body or b"")
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
        ("a\udcff", "/v1/jobs/a%ED%B3%BF"),
    ],
)
def test_an_id_is_one_segment_of_the_path(job_id: str, path: str) -> None:
    assert request_for(WorkerApi.get_job, job_id).path == path
    assert request_for(WorkerApi.start_processing, job_id, "w").path == f"{path}/start"


def test_an_empty_id_is_rejected() -> None:
    with pytest.raises(InvalidRequest):
        request_for(WorkerApi.get_job, "")


def test_one_queue_may_be_a_string() -> None:
    assert msgspec.json.decode(requests.claim("w", queues="video").body or b"")["queues"] == ["video"]
    for request in (
        request_for(WorkerApi.start_processing, "a", "w", progress_timeout_ms=0),
        requests.claim("w", progress_timeout_ms=0),
    ):
        assert msgspec.json.decode(request.body or b"") == {"worker": "w", "progress_timeout_ms": 0}


def test_a_job_can_be_read_although_python_cannot_hold_its_payload() -> None:
    body = msgspec.json.encode({"success": True, "data": JOB}).replace(b'{"a":1}', b"1e999")
    job = request_for(WorkerApi.get_job, "j1").read(body)
    assert bytes(job.payload) == b"1e999"  # type: ignore[arg-type]
    assert job.metadata_value == {"m": [1]}
    with pytest.raises(msgspec.DecodeError):
        _ = job.payload_value
    assert "payload=b'1e999'" in repr(job)


def test_a_printed_job_shows_its_payload_and_no_missing_fields() -> None:
    text = repr(request_for(WorkerApi.get_job, "j1").read(msgspec.json.encode({"success": True, "data": JOB})))
    assert text.startswith("JobView(id='j1', ")
    assert "payload={'a': 1}" in text
    assert "metadata={'m': [1]}" in text
    assert "msgspec" not in text
    assert "UNSET" not in text


def test_unknown_fields_of_a_job_are_skipped() -> None:
    job = request_for(WorkerApi.get_job, "j1").read(msgspec.json.encode({"success": True, "data": JOB, "more": 1}))
    assert isinstance(job, JobView)
    assert (job.id, job.payload_value, job.repeated) == ("j1", {"a": 1}, msgspec.UNSET)
