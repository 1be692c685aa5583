"""The names of SPEC 6, which the dashboards and scripts of the replaced manager use, and the headers of a daemon."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest

from tests.support.daemon_process import DaemonResponse
from tests.support.forked_process import ForkedDaemon


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedDaemon]:
    """One daemon for all tests. Each test has its own jobs and queue."""
    config = "[cleanup]\ninterval = '1h'\nrecover_every = '0'\n"
    with ForkedDaemon(tmp_path_factory.mktemp("contract"), config) as running:
        yield running


@pytest.fixture
def queue() -> str:
    return f"q-{uuid4().hex[:12]}"


def create(daemon: ForkedDaemon, queue: str) -> str:
    return str(daemon.post("/v1/jobs", {"queue": queue}).data["id"])


def start(daemon: ForkedDaemon, job_id: str, **options: Any) -> dict[str, Any]:
    return dict(daemon.post(f"/v1/jobs/{job_id}/start", {"worker": "w-1", **options}).data)


def assert_error(reply: DaemonResponse, status: int, code: str) -> dict[str, Any]:
    assert (reply.status, reply.body.get("error")) == (status, code), reply.body
    assert set(reply.body) == {"success", "error", "message", "details"}
    return dict(reply.body["details"])


def test_an_idempotency_key_repeats_the_response_and_not_the_effect(daemon: ForkedDaemon, queue: str) -> None:
    key = {"Idempotency_Key": f"key {queue}"}
    first = daemon.post("/v1/jobs", {"queue": queue}, **key)
    repeated = daemon.post("/v1/jobs", {"queue": queue}, **key)
    assert (repeated.status, repeated.data) == (201, first.data)
    assert repeated.headers["Idempotent-Replayed"] == "true"
    assert "Idempotent-Replayed" not in first.headers
    assert_error(daemon.post("/v1/jobs", {"queue": f"{queue}x"}, **key), 422, "idempotency_key_reused")


def test_stats_health_and_cleanup_have_the_names_of_existing_dashboards(daemon: ForkedDaemon, queue: str) -> None:
    create(daemon, queue)
    start(daemon, create(daemon, queue))
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


def test_operators_calls_have_the_names_of_existing_scripts(daemon: ForkedDaemon, queue: str) -> None:
    job_id = create(daemon, queue)
    grant = start(daemon, job_id, lock_ttl_ms=60_000)
    named = {"jobId": job_id, "lockId": grant["lock_id"]}
    longer = daemon.admin("POST", "extend-lock", {**named, "additionalTime": 120_000}).data
    assert longer["lockExpiresAt"] > grant["lock_expires_at"]
    failed = daemon.admin("POST", "force-fail", {"jobId": job_id, "reason": "hung"}).data
    assert (failed["jobId"], failed["previousStatus"], failed["reason"]) == (job_id, "processing", "hung")
    lost = daemon.post(f"/v1/jobs/{job_id}/complete", {"lock_id": grant["lock_id"]})
    assert assert_error(lost, 409, "lock_lost")["rule"] == "force-fail"
    assert daemon.admin("POST", "force-reset", {"jobId": job_id}).data["previousStatus"] == "failed"
    named["lockId"] = start(daemon, job_id)["lock_id"]
    assert daemon.admin("POST", "release-lock", named).data["status"] == "queued"
    assert_error(daemon.admin("POST", "extend-lock", named), 409, "lock_lost")
    move = {"jobId": job_id, "from": "queued", "to": "cancelled", "updates": {"priority": 7}, "reason": "r"}
    assert daemon.admin("POST", "transition", move).data["previousStatus"] == "queued"
    assert daemon.get(f"/v1/jobs/{job_id}").data["priority"] == 7
    assert_error(daemon.admin("POST", "transition", {**move, "from": "processing"}), 409, "invalid_transition")
    assert daemon.admin("GET", f"validate-job?jobId={job_id}").data["job"]["id"] == job_id
    assert daemon.admin("DELETE", f"jobs/{job_id}").data["id"] == job_id
