"""The HTTP API of `jobd serve` as a client sees it, call by call."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from msgspec import structs

from jobd.model.responses import JobView
from tests.support.daemon_process import TOKEN, DaemonProcess, DaemonResponse

OLD_MS = 1_600_000_000_000
JOB_FIELDS = {field.name for field in structs.fields(JobView) if field.required}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon for all tests. Each test has its own jobs and queue."""
    config = "[cleanup]\ninterval = '1h'\nrecover_every = '0'\n"
    with DaemonProcess(tmp_path_factory.mktemp("contract"), config) as running:
        yield running


@pytest.fixture
def queue() -> str:
    return f"q-{uuid4().hex[:12]}"


def now() -> int:
    return time.time_ns() // 1_000_000


def create(daemon: DaemonProcess, queue: str, **options: Any) -> dict[str, Any]:
    reply = daemon.post("/v1/jobs", {"queue": queue, **options})
    assert reply.status == 201, reply.body
    return dict(reply.data)


def start(daemon: DaemonProcess, job_id: str, **options: Any) -> dict[str, Any]:
    reply = daemon.post(f"/v1/jobs/{job_id}/start", {"worker": "w-1", **options})
    assert reply.status == 200, reply.body
    return dict(reply.data)


def job(daemon: DaemonProcess, job_id: str) -> dict[str, Any]:
    return dict(daemon.get(f"/v1/jobs/{job_id}").data)


def assert_error(reply: DaemonResponse, status: int, code: str) -> dict[str, Any]:
    assert (reply.status, reply.body.get("error")) == (status, code), reply.body
    assert set(reply.body) == {"success", "error", "message", "details"}
    assert reply.body["message"].endswith((".", "?", "`", '"')) or " " in reply.body["message"]
    return dict(reply.body["details"])


# -- create -----------------------------------------------------------------------------------------------------------


def test_a_job_has_the_documented_fields_and_defaults(daemon: DaemonProcess, queue: str) -> None:
    before = now()
    made = create(daemon, queue, payload={"a": [1, None, "ü"]})
    assert set(made) == JOB_FIELDS
    assert before <= made["created_at"] <= now()
    assert made["created_at"] == made["updated_at"] == made["run_at"]
    defaults = {
        "kind": "", "priority": 0, "status": "queued", "progress": 0, "progress_message": None, "attempt": 0,
        "max_attempts": 1, "stalls": 0, "max_stalls": 3, "on_stall": "auto", "lock": None, "started_at": None,
        "finished_at": None, "expires_at": None, "error_message": None, "error_code": None,
        "stall_after_ms": 600_000, "progress_timeout_ms": 1_800_000,
        "backoff": {"kind": "exponential", "base_ms": 10_000, "max_ms": 3_600_000, "jitter": True},
    }  # fmt: skip
    assert {name: made[name] for name in defaults} == defaults
    assert made["payload"] == {"a": [1, None, "ü"]}
    assert job(daemon, made["id"]) == made
    assert made["id"][14] == "7"  # a UUIDv7


def test_a_repeated_create_is_200_and_a_different_one_409(daemon: DaemonProcess, queue: str) -> None:
    body = {"id": f"{queue}:1", "queue": queue, "payload": 1}
    assert daemon.post("/v1/jobs", body).status == 201
    repeated = daemon.post("/v1/jobs", body)
    assert repeated.status == 200
    assert repeated.data["payload"] == 1
    assert_error(daemon.post("/v1/jobs", {**body, "payload": 2}), 409, "job_exists")
    grant = start(daemon, f"{queue}:1")
    daemon.post(f"/v1/jobs/{queue}:1/complete", {"lock_id": grant["lock_id"]})
    finished = daemon.post("/v1/jobs", body)
    assert (finished.status, finished.data["status"]) == (200, "completed")


# -- start and claim --------------------------------------------------------------------------------------------------


def test_a_grant_names_the_lock_and_only_its_holder_sees_the_secret(daemon: DaemonProcess, queue: str) -> None:
    made = create(daemon, queue, payload={"n": 1})
    grant = start(daemon, made["id"], lock_ttl_ms=60_000)
    assert set(grant) == {"job", "lock_id", "fencing_token", "lock_expires_at", "ttl_ms", "progress_due_at"}
    held = grant["job"]
    assert held["payload"] == {"n": 1}
    assert (held["status"], held["attempt"], held["progress"]) == ("processing", 1, 0)
    assert set(held["lock"]) == {"worker", "fencing_token", "acquired_at", "expires_at"}
    assert held["lock"]["expires_at"] == grant["lock_expires_at"]
    # The wall clock and lock time may tick in different milliseconds.
    assert abs(grant["lock_expires_at"] - held["started_at"] - grant["ttl_ms"]) <= 2
    assert abs(grant["progress_due_at"] - held["started_at"] - 1_800_000) <= 2
    assert grant["lock_id"] not in str(daemon.get(f"/v1/jobs/{made['id']}").body)
    assert grant["lock_id"] not in str(daemon.get(f"/v1/jobs/{made['id']}/timeline").body)
    assert daemon.admin("GET", f"jobs/{made['id']}").data["lock"]["lock_id"] == grant["lock_id"]


# -- keys -------------------------------------------------------------------------------------------------------------


def test_an_idempotency_key_repeats_the_response_and_not_the_effect(daemon: DaemonProcess, queue: str) -> None:
    key = {"Idempotency_Key": f"key {queue}"}
    first = daemon.post("/v1/jobs", {"queue": queue}, **key)
    repeated = daemon.post("/v1/jobs", {"queue": queue}, **key)
    assert (repeated.status, repeated.data) == (201, first.data)
    assert repeated.headers["Idempotent-Replayed"] == "true"
    assert "Idempotent-Replayed" not in first.headers
    assert_error(daemon.post("/v1/jobs", {"queue": f"{queue}x"}, **key), 422, "idempotency_key_reused")
    assert_error(daemon.post("/v1/jobs", {}, Idempotency_Key="x" * 201), 400, "invalid_request")


# -- reading ----------------------------------------------------------------------------------------------------------


def test_timeline_why_and_validate_describe_a_job(daemon: DaemonProcess, queue: str) -> None:
    made = create(daemon, queue)
    path = f"/v1/jobs/{made['id']}"
    why = daemon.get(f"{path}/why").data
    assert set(why) == {"state", "because", "next", "blocked_by", "do"}
    assert why["state"] == "queued"
    lock = {"lock_id": start(daemon, made["id"])["lock_id"]}
    why = daemon.get(f"{path}/why").data
    assert set(why["next"]) == {"what", "at", "rule", "latest_at"}
    assert "w-1" in why["because"]
    daemon.post(f"{path}/complete", lock)
    events = daemon.get(f"{path}/timeline").data["events"]
    assert [event["type"] for event in events] == ["created", "granted", "completed"]
    assert all(set(event) == {"seq", "at", "type", "from", "to", "by", "reason", "details"} for event in events)
    assert [(event["from"], event["to"]) for event in events][1:] == [
        ("queued", "processing"),
        ("processing", "completed"),
    ]
    found = daemon.get(f"{path}/validate").data
    assert (found["isValid"], found["canProceed"]) == (True, True)
    assert found["issues"][0]["type"] == "warning"
    assert set(found["issues"][0]) == {"type", "field", "message", "fix"}


# -- operators --------------------------------------------------------------------------------------------------------


def test_admin_needs_a_token_before_anything_else(daemon: DaemonProcess) -> None:
    for token in ("Bearer wrong", f"Basic {TOKEN}", "", "Bearer"):
        assert_error(daemon.admin("GET", "stats", Authorization=token), 401, "unauthorized")
    assert_error(daemon.admin("POST", "nothing", {}, Authorization="Bearer no"), 401, "unauthorized")
    assert daemon.admin("GET", "/healthz", Authorization="").status == 200
    assert daemon.admin("GET", "/readyz", Authorization="").status == 200


def test_stats_health_and_cleanup_have_the_names_of_existing_dashboards(daemon: DaemonProcess, queue: str) -> None:
    create(daemon, queue)
    start(daemon, create(daemon, queue)["id"])
    stats = daemon.admin("GET", "stats").data
    assert set(stats) == {
        "totalJobs", "byStatus", "stuckJobs", "lockedJobs", "averageProcessingTime", "oldestProcessingJob",
        "stuckJobsRecovered", "timestamp", "cleanupRunning", "timeSinceLastCleanup", "disk", "store",
    }  # fmt: skip
    assert set(stats["byStatus"]) == {"queued", "processing", "completed", "failed", "cancelled"}
    assert set(stats["oldestProcessingJob"]) == {"id", "age", "progress"}
    assert stats["totalJobs"] == sum(stats["byStatus"].values())
    while (health := daemon.admin("GET", "health")).status != 200:  # it may be slow for a moment
        time.sleep(0.1)
    assert health.data["database"]["status"] == health.data["cache"]["status"] == "healthy"
    assert health.data["storage"] == {"status": "healthy", "message": "not configured"}
    assert set(health.data["cleanupStatus"]) >= {"running", "timeSinceLastCleanup"}
    report = daemon.admin("POST", "cleanup", {}).data
    assert set(report) == {
        "timestamp", "stuckJobsRecovered", "expiredJobsDeleted", "expiredLocksCleared", "validationIssuesFixed",
        "totalProcessingTime", "errors", "validationIssuesFound", "forced",
    }  # fmt: skip
    assert (report["forced"], report["errors"]) == (True, [])
    state = daemon.admin("GET", "cleanup").data
    assert state["lastReport"] == report
    assert set(state) == {
        "lastReport", "cleanupRunning", "timeSinceLastCleanup", "failedSinceLastSuccess", "lastFailure",
    }  # fmt: skip
    assert daemon.admin("GET", "reports").data["reports"][0] == report


def test_operators_can_force_transitions(daemon: DaemonProcess, queue: str) -> None:
    made = create(daemon, queue)
    job_id = made["id"]
    lock = {"lock_id": start(daemon, job_id)["lock_id"]}
    failed = daemon.admin("POST", "force-fail", {"jobId": job_id, "reason": "hung"}).data
    assert (failed["jobId"], failed["previousStatus"], failed["reason"]) == (job_id, "processing", "hung")
    assert job(daemon, job_id)["error_message"] == "hung"
    assert assert_error(daemon.post(f"/v1/jobs/{job_id}/complete", lock), 409, "lock_lost")["rule"] == "force-fail"
    reset = daemon.admin("POST", "force-reset", {"jobId": job_id}).data
    assert reset["previousStatus"] == "failed"
    fresh = job(daemon, job_id)
    expected = ("queued", 0, 0, None, None)
    assert (fresh["status"], fresh["attempt"], fresh["stalls"], fresh["error_message"], fresh["expires_at"]) == expected
    assert_error(daemon.admin("POST", "force-reset", {"jobId": job_id}), 409, "invalid_transition")
    move = {"jobId": job_id, "from": "processing", "to": "failed"}
    assert_error(daemon.admin("POST", "transition", move), 409, "invalid_transition")
    assert_error(
        daemon.admin("POST", "transition", {**move, "from": "queued", "to": "processing"}), 409, "invalid_transition"
    )
    moved = daemon.admin(
        "POST", "transition", {**move, "from": "queued", "to": "cancelled", "updates": {"priority": 7}, "reason": "r"}
    )
    assert moved.data["previousStatus"] == "queued"
    assert (job(daemon, job_id)["status"], job(daemon, job_id)["priority"]) == ("cancelled", 7)
    assert_error(daemon.admin("POST", "force-fail", {"jobId": job_id}), 409, "invalid_transition")
    assert_error(daemon.admin("POST", "force-fail", {}), 400, "invalid_request")
    assert_error(daemon.admin("POST", "force-fail", {"jobId": "nowhere"}), 404, "job_not_found")
    assert daemon.admin("DELETE", f"jobs/{job_id}").data["id"] == job_id
    assert_error(daemon.get(f"/v1/jobs/{job_id}"), 404, "job_not_found")


def test_operators_can_release_locks_and_update_jobs(daemon: DaemonProcess, queue: str) -> None:
    made = create(daemon, queue, run_at=now() + 60_000)
    job_id = made["id"]
    assert daemon.admin("POST", f"jobs/{job_id}/run-now").data["run_at"] <= now()
    changed = daemon.admin("POST", f"jobs/{job_id}/update", {"priority": 3, "max_attempts": 4}).data
    assert (changed["priority"], changed["max_attempts"]) == (3, 4)
    grant = start(daemon, job_id, lock_ttl_ms=60_000)
    named = {"jobId": job_id, "lockId": grant["lock_id"]}
    longer = daemon.admin("POST", "extend-lock", {**named, "additionalTime": 120_000}).data
    assert longer["lockExpiresAt"] > grant["lock_expires_at"]
    assert grant["lock_id"] in {held["lock_id"] for held in daemon.admin("GET", "locks").data["locks"]}
    back = daemon.admin("POST", "release-lock", named).data
    assert (back["status"], back["lock"]) == ("queued", None)
    assert_error(daemon.admin("POST", "extend-lock", named), 409, "lock_lost")
    assert daemon.admin("GET", f"validate-job?jobId={job_id}").data["job"]["id"] == job_id
    assert_error(daemon.admin("GET", "validate-job"), 400, "invalid_request")


def test_an_import_keeps_jobs_unchanged(daemon: DaemonProcess, queue: str) -> None:
    lines = [
        f'{{"id": "{queue}:done", "queue": "{queue}", "status": "completed", "progress": 40, "created_at": {OLD_MS}}}',
        f'{{"id": "{queue}:lost", "queue": "{queue}", "status": "processing", "progress": 10, "worker": "old-1"}}',
        f'{{"id": "{queue}:new", "queue": "{queue}", "payload": {{"a": 1}}}}',
        f'{{"id": "{queue}:new", "queue": "{queue}"}}',
        f'{{"id": "{queue}:bad", "status": "odd"}}',
        "not json",
    ]
    with daemon.admin_connection() as connection:
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/x-ndjson"}
        connection.request("POST", "/admin/job-management/import", "\n".join(lines).encode(), headers)
        response = DaemonResponse(connection.getresponse()).data
    assert (response["imported"], response["skipped"]) == (3, 1)
    assert [(line["line"], line["id"]) for line in response["refused"]] == [(5, f"{queue}:bad"), (6, None)]
    assert job(daemon, f"{queue}:done")["created_at"] == OLD_MS
    lost = job(daemon, f"{queue}:lost")
    assert (lost["status"], lost["error_code"]) == (
        "failed",
        "stalled",
    )  # it had reported progress and has no attempt left
    assert "half done" in lost["error_message"]
    report = daemon.admin("POST", "cleanup", {}).data
    assert report["validationIssuesFixed"] >= 1
    assert job(daemon, f"{queue}:done")["progress"] == 100
