"""The HTTP API of `jobd serve` as a client sees it, call by call."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest

from tests.support.daemon_process import TOKEN, DaemonProcess, DaemonResponse

OLD_MS = 1_600_000_000_000
JOB_FIELDS = {
    "id", "queue", "kind", "payload", "priority", "status", "progress", "progress_message", "attempt", "max_attempts",
    "backoff", "stalls", "max_stalls", "on_stall", "stall_after_ms", "progress_timeout_ms", "created_at", "updated_at",
    "run_at", "started_at", "finished_at", "expires_at", "lock", "download_url", "file_path", "storage_key", "metadata",
    "error_message", "error_code",
}  # fmt: skip


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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("priority", 1001), ("priority", -1001), ("priority", 1.5), ("priority", "1"), ("max_attempts", 0),
        ("queue", ""), ("queue", "a b"), ("id", ""), ("id", "x" * 201), ("id", "a/b"), ("id", "ü"), ("kind", "a\nb"),
        ("on_stall", "never"), ("stall_after_ms", -1), ("progress_timeout_ms", -1), ("run_at", 1_700_000_000),
        ("expires_at", 1), ("unknown", 1), ("backoff", {"kind": "linear"}), ("max_stalls", -1), ("status", "queued"),
    ],
)  # fmt: skip
def test_a_field_outside_its_bounds_is_a_400_that_names_it(daemon: DaemonProcess, field: str, value: Any) -> None:
    details = assert_error(daemon.post("/v1/jobs", {field: value}), 400, "invalid_request")
    assert field in str(details["field"]) or field == "unknown"


def test_bulk_is_all_or_nothing_and_in_order(daemon: DaemonProcess, queue: str) -> None:
    reply = daemon.post("/v1/jobs/bulk", {"jobs": [{"queue": queue, "payload": n} for n in range(20)]})
    assert reply.status == 201
    assert [made["payload"] for made in reply.data["jobs"]] == list(range(20))
    grants = daemon.post("/v1/claim", {"worker": "w", "queues": [queue], "limit": 20}).data["grants"]
    assert [grant["job"]["payload"] for grant in grants] == list(range(20))
    daemon.post("/v1/jobs", {"id": f"{queue}:taken", "queue": queue})
    bad = [{"id": f"{queue}:new", "queue": queue}, {"id": f"{queue}:taken", "queue": queue, "payload": 1}]
    assert_error(daemon.post("/v1/jobs/bulk", {"jobs": bad}), 409, "job_exists")
    assert_error(daemon.get(f"/v1/jobs/{queue}:new"), 404, "job_not_found")
    assert_error(daemon.post("/v1/jobs/bulk", {"jobs": [{}] * 1001}), 413, "too_large")


def test_size_and_content_type_of_bodies_are_checked(daemon: DaemonProcess, queue: str) -> None:
    assert_error(daemon.post("/v1/jobs", {"payload": "x" * (256 * 1024)}), 413, "too_large")
    assert_error(daemon.post("/v1/jobs", {"payload": "x" * (1024 * 1024)}), 413, "too_large")
    assert_error(daemon.post("/v1/jobs", {}, Content_Type="text/plain"), 415, "unsupported_media_type")
    assert_error(daemon.post("/v1/jobs", {}, Content_Encoding="gzip"), 415, "unsupported_media_type")
    assert_error(daemon.get("/v1/nothing"), 404, "not_found")
    assert_error(daemon.get("/v1/claim"), 405, "method_not_allowed")


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


def test_a_start_has_its_error_codes(daemon: DaemonProcess, queue: str) -> None:
    made = create(daemon, queue)
    grant = start(daemon, made["id"])
    details = assert_error(daemon.post(f"/v1/jobs/{made['id']}/start", {"worker": "w-2"}), 409, "already_locked")
    assert details["locked_by"] == "w-1"
    assert details["lock_expires_at"] == grant["lock_expires_at"]
    assert 0 < details["retry_after_ms"] <= 900_000
    later = create(daemon, queue, run_at=now() + 60_000)
    details = assert_error(daemon.post(f"/v1/jobs/{later['id']}/start", {"worker": "w"}), 409, "not_due")
    assert 0 < details["retry_after_ms"] <= 60_000
    waiting = create(daemon, queue)
    daemon.admin("POST", f"queues/{queue}/pause")
    assert_error(daemon.post(f"/v1/jobs/{waiting['id']}/start", {"worker": "w"}), 409, "queue_paused")
    assert daemon.post("/v1/claim", {"worker": "w", "queues": [queue]}).data == {"grants": []}
    daemon.admin("POST", f"queues/{queue}/resume")
    start(daemon, waiting["id"])
    daemon.post(f"/v1/jobs/{made['id']}/complete", {"lock_id": grant["lock_id"]})
    assert_error(daemon.post(f"/v1/jobs/{made['id']}/start", {"worker": "w"}), 409, "invalid_transition")
    assert_error(daemon.post("/v1/jobs/nowhere/start", {"worker": "w"}), 404, "job_not_found")
    assert_error(daemon.post(f"/v1/jobs/{made['id']}/start", {}), 400, "invalid_request")
    assert_error(
        daemon.post(f"/v1/jobs/{made['id']}/start", {"worker": "w", "lock_ttl_ms": 999}), 400, "invalid_request"
    )


def test_claim_is_by_priority_then_run_at_then_creation_over_queues_and_kinds(
    daemon: DaemonProcess, queue: str
) -> None:
    other = f"{queue}-b"
    past = now() - 60_000
    create(daemon, queue, id=f"{queue}:3", kind="a")
    create(daemon, other, id=f"{queue}:4", kind="b")
    create(daemon, queue, id=f"{queue}:2", run_at=past)
    create(daemon, other, id=f"{queue}:1", priority=-1)
    create(daemon, queue, id=f"{queue}:5", priority=5, run_at=past)
    create(daemon, queue, id=f"{queue}:never", run_at=now() + 60_000, priority=-1000)
    only_b = daemon.post("/v1/claim", {"worker": "w", "queues": [queue, other], "kinds": ["b"], "limit": 5})
    assert [grant["job"]["id"] for grant in only_b.data["grants"]] == [f"{queue}:4"]
    rest = daemon.post("/v1/claim", {"worker": "w", "queues": [queue, other], "limit": 100})
    assert [grant["job"]["id"] for grant in rest.data["grants"]] == [f"{queue}:{n}" for n in (1, 2, 3, 5)]
    tokens = [grant["fencing_token"] for grant in rest.data["grants"]]
    assert tokens == sorted(tokens)
    assert min(tokens) >> 24 >= 1


# -- the lock holder --------------------------------------------------------------------------------------------------


def test_reports_renew_a_lock_and_never_shorten_it(daemon: DaemonProcess, queue: str) -> None:
    made = create(daemon, queue)
    grant = start(daemon, made["id"], lock_ttl_ms=60_000)
    lock = {"lock_id": grant["lock_id"]}
    response = daemon.post(f"/v1/jobs/{made['id']}/progress", {**lock, "progress": 42.5, "message": "half"}).data
    assert set(response) == {"lock_expires_at", "ttl_ms", "progress_due_at", "cancel_requested"}
    assert response["cancel_requested"] is False
    assert response["lock_expires_at"] >= grant["lock_expires_at"]
    assert (job(daemon, made["id"])["progress"], job(daemon, made["id"])["progress_message"]) == (42.5, "half")
    longer = daemon.post(f"/v1/jobs/{made['id']}/extend", {**lock, "additional_ms": 600_000}).data
    assert longer["lock_expires_at"] > response["lock_expires_at"] + 500_000
    assert longer["extended"] is True
    shorter = daemon.post(f"/v1/jobs/{made['id']}/extend", {**lock, "additional_ms": 1_000}).data
    assert shorter["extended"] is False
    assert abs(shorter["lock_expires_at"] - longer["lock_expires_at"]) <= 1
    cut = daemon.post(f"/v1/jobs/{made['id']}/extend", {**lock, "additional_ms": 86_400_000}).data
    assert cut["lock_expires_at"] == cut["progress_due_at"]
    for wrong in (-1, 101, "1", None):
        assert_error(
            daemon.post(f"/v1/jobs/{made['id']}/progress", {**lock, "progress": wrong}), 400, "invalid_request"
        )


def test_a_complete_can_be_repeated(daemon: DaemonProcess, queue: str) -> None:
    made = create(daemon, queue)
    grant = start(daemon, made["id"])
    path, lock = f"/v1/jobs/{made['id']}", {"lock_id": grant["lock_id"]}
    result = {"download_url": "https://x/y", "file_path": "../odd", "storage_key": "a/b", "metadata": {"k": [1]}}
    done = daemon.post(f"{path}/complete", {**lock, **result}).data
    assert {name: done[name] for name in result} == result
    assert (done["status"], done["progress"], done["lock"]) == ("completed", 100, None)
    assert done["expires_at"] == done["finished_at"] + 7 * 86_400_000
    repeated = daemon.post(f"{path}/complete", {**lock, **result})
    assert (repeated.status, repeated.data["repeated"]) == (200, True)
    released = daemon.post(f"{path}/release", lock)
    assert (released.status, released.data["repeated"], released.data["status"]) == (200, True, "completed")
    assert_error(daemon.post(f"{path}/complete", {**lock, "download_url": "https://other"}), 409, "invalid_transition")
    assert_error(daemon.post(f"{path}/fail", {**lock, "error_message": "x"}), 409, "invalid_transition")
    assert_error(daemon.post(f"{path}/cancel"), 409, "invalid_transition")
    assert_error(daemon.post(f"{path}/complete", {"lock_id": "other"}), 409, "lock_lost")


@pytest.mark.parametrize("key", ["/abs", "a/../b", "..", "a\x00b", ""])
def test_a_storage_key_cannot_leave_the_store(daemon: DaemonProcess, queue: str, key: str) -> None:
    made = create(daemon, queue)
    lock = {"lock_id": start(daemon, made["id"])["lock_id"]}
    assert_error(daemon.post(f"/v1/jobs/{made['id']}/complete", {**lock, "storage_key": key}), 400, "invalid_request")
    for late in (1_700_000_000, now() - 1000):
        body = {**lock, "expires_at": late}
        assert_error(daemon.post(f"/v1/jobs/{made['id']}/complete", body), 400, "invalid_request")
    assert job(daemon, made["id"])["status"] == "processing"


def test_fail_retries_with_backoff_and_then_fails(daemon: DaemonProcess, queue: str) -> None:
    backoff = {"kind": "fixed", "base_ms": 40, "jitter": False}
    made = create(daemon, queue, max_attempts=2, backoff=backoff)
    path = f"/v1/jobs/{made['id']}"
    lock = {"lock_id": start(daemon, made["id"])["lock_id"]}
    back = daemon.post(f"{path}/fail", {**lock, "error_message": "disk on fire", "error_code": "E1"}).data
    assert (back["status"], back["error_message"], back["error_code"]) == ("queued", "disk on fire", "E1")
    assert back["run_at"] == back["updated_at"] + 40
    assert (back["attempt"], back["progress"], back["started_at"]) == (1, 0, None)
    assert_error(daemon.post(f"{path}/extend", lock), 409, "invalid_transition")
    grants: list[Any] = []
    while not grants:
        grants = daemon.post("/v1/claim", {"worker": "w", "queues": [queue], "wait_ms": 5000}).data["grants"]
    last = daemon.post(f"{path}/fail", {"lock_id": grants[0]["lock_id"], "error_message": "again"}).data
    assert (last["status"], last["attempt"], last["error_message"]) == ("failed", 2, "again")
    assert last["expires_at"] == last["finished_at"] + 30 * 86_400_000


def test_fail_can_forbid_a_retry_or_set_its_delay(daemon: DaemonProcess, queue: str) -> None:
    made = create(daemon, queue, max_attempts=5)
    lock = {"lock_id": start(daemon, made["id"])["lock_id"]}
    body = {**lock, "error_message": "x", "retry_after_ms": 5000}
    back = daemon.post(f"/v1/jobs/{made['id']}/fail", body).data
    assert back["run_at"] == back["updated_at"] + 5000
    other = create(daemon, queue, max_attempts=5)
    lock = {"lock_id": start(daemon, other["id"])["lock_id"]}
    failed = daemon.post(f"/v1/jobs/{other['id']}/fail", {**lock, "error_message": "x", "retry": False}).data
    assert failed["status"] == "failed"


def test_release_refunds_the_attempt_and_keeps_the_position(daemon: DaemonProcess, queue: str) -> None:
    first, second = create(daemon, queue), create(daemon, queue)
    lock = {"lock_id": start(daemon, first["id"])["lock_id"]}
    back = daemon.post(f"/v1/jobs/{first['id']}/release", lock).data
    assert (back["status"], back["attempt"], back["run_at"]) == ("queued", 0, first["run_at"])
    grants = daemon.post("/v1/claim", {"worker": "w", "queues": [queue], "limit": 2}).data["grants"]
    assert [grant["job"]["id"] for grant in grants] == [first["id"], second["id"]]
    lock = {"lock_id": grants[0]["lock_id"]}
    delayed = daemon.post(f"/v1/jobs/{first['id']}/release", {**lock, "delay_ms": 60_000}).data
    assert delayed["run_at"] == delayed["updated_at"] + 60_000


def test_cancel_ends_the_grant_at_once(daemon: DaemonProcess, queue: str) -> None:
    made = create(daemon, queue)
    lock = {"lock_id": start(daemon, made["id"])["lock_id"]}
    done = daemon.post(f"/v1/jobs/{made['id']}/cancel", {"reason": "not wanted"}).data
    assert (done["status"], done["lock"]) == ("cancelled", None)
    for verb, body in (("progress", {"progress": 1}), ("extend", {}), ("complete", {}), ("release", {})):
        details = assert_error(daemon.post(f"/v1/jobs/{made['id']}/{verb}", {**lock, **body}), 409, "lock_lost")
        assert (details["reason"], details["cancel_requested"]) == ("cancelled", True)


def test_past_the_progress_timeout_only_results_are_accepted(daemon: DaemonProcess, queue: str) -> None:
    made = create(daemon, queue, progress_timeout_ms=1)
    lock = {"lock_id": start(daemon, made["id"])["lock_id"]}
    while daemon.admin("GET", "stats").data["stuckJobs"] == 0:
        pass
    for verb, body in (("progress", {"progress": 1}), ("extend", {})):
        reply = daemon.post(f"/v1/jobs/{made['id']}/{verb}", {**lock, **body})
        assert_error(reply, 409, "progress_timeout")
        assert "progress_timeout" in reply.body["message"]
    assert daemon.post(f"/v1/jobs/{made['id']}/complete", lock).data["status"] == "completed"


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


def test_the_key_of_a_claim_lasts_as_long_as_its_grants(daemon: DaemonProcess, queue: str) -> None:
    for _ in range(2):
        create(daemon, queue)
    key = {"Idempotency_Key": f"claim {queue}"}
    body = {"worker": "w-1", "queues": [queue]}
    first = daemon.post("/v1/claim", body, **key).data["grants"]
    repeated = daemon.post("/v1/claim", body, **key)
    assert [grant["lock_id"] for grant in repeated.data["grants"]] == [first[0]["lock_id"]]
    assert repeated.headers["Idempotent-Replayed"] == "true"
    daemon.post(f"/v1/jobs/{first[0]['job']['id']}/complete", {"lock_id": first[0]["lock_id"]})
    anew = daemon.post("/v1/claim", body, **key)
    assert anew.data["grants"][0]["job"]["id"] != first[0]["job"]["id"]
    assert "Idempotent-Replayed" not in anew.headers


# -- reading ----------------------------------------------------------------------------------------------------------


def test_jobs_are_paged_newest_first(daemon: DaemonProcess, queue: str) -> None:
    ids = [create(daemon, queue)["id"] for _ in range(5)]
    start(daemon, ids[0])
    page = daemon.get(f"/v1/jobs?queue={queue}&limit=2").data
    assert [found["id"] for found in page["jobs"]] == [ids[4], ids[3]]
    seen = [*page["jobs"]]
    while page["next_cursor"] is not None:
        page = daemon.get(f"/v1/jobs?queue={queue}&limit=2&cursor={page['next_cursor']}").data
        seen += page["jobs"]
    assert [found["id"] for found in seen] == ids[::-1]
    held = daemon.get(f"/v1/jobs?queue={queue}&status=processing&worker=w-1").data["jobs"]
    assert [found["id"] for found in held] == [ids[0]]
    for wrong in ("limit=0", "limit=201", "status=lost", "colour=red", "limit=1&limit=2"):
        assert_error(daemon.get(f"/v1/jobs?{wrong}"), 400, "invalid_request")


def test_timeline_why_and_validate_describe_a_job(daemon: DaemonProcess, queue: str) -> None:
    made = create(daemon, queue)
    path = f"/v1/jobs/{made['id']}"
    why = daemon.get(f"{path}/why").data
    assert set(why) == {"state", "because", "next", "blocked_by", "do"}
    assert why["state"] == "queued"
    lock = {"lock_id": start(daemon, made["id"])["lock_id"]}
    why = daemon.get(f"{path}/why").data
    assert set(why["next"]) == {"what", "at", "rule"}
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


def test_queues_and_workers_are_listed(daemon: DaemonProcess, queue: str) -> None:
    made = create(daemon, queue)
    start(daemon, made["id"], worker=f"worker-{queue}")
    waiting = create(daemon, queue)
    shown = next(view for view in daemon.get("/v1/queues").data["queues"] if view["name"] == queue)
    assert (shown["queued"], shown["processing"], shown["paused"]) == (1, 1, False)
    assert shown["oldest_due_at"] == waiting["run_at"]
    workers = {view["worker"]: view["jobs"] for view in daemon.get("/v1/workers").data["workers"]}
    assert workers[f"worker-{queue}"] == [made["id"]]


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


def test_a_late_result_is_kept_and_adopted(daemon: DaemonProcess, queue: str) -> None:
    job_id = create(daemon, queue, payload={"n": 1})["id"]
    lock = {"lock_id": start(daemon, job_id)["lock_id"]}
    assert_error(daemon.admin("POST", f"jobs/{job_id}/adopt"), 409, "invalid_transition")
    daemon.admin("POST", "force-reset", {"jobId": job_id})
    assert_error(daemon.admin("POST", f"jobs/{job_id}/adopt"), 404, "late_result_not_found")
    done = {**lock, "file_path": "/out", "metadata": {"a": [1, None]}}
    response = assert_error(daemon.post(f"/v1/jobs/{job_id}/complete", done), 409, "lock_lost")
    assert assert_error(daemon.post(f"/v1/jobs/{job_id}/complete", done), 409, "lock_lost") == response
    (late,) = daemon.admin("GET", f"jobs/{job_id}/late-results").data["late_results"]
    assert (late["seq"], late["file_path"], late["metadata"]) == (response["late_result"], "/out", {"a": [1, None]})
    assert set(late) == {
        "seq", "at", "worker", "fencing_token", "download_url", "file_path", "storage_key", "metadata", "expires_at",
        "rejection",
    }  # fmt: skip
    assert f"jobctl adopt {job_id}" in daemon.get(f"/v1/jobs/{job_id}/why").data["do"][0]
    assert_error(
        daemon.admin("POST", f"jobs/{job_id}/adopt", {"result": late["seq"] + 1}), 404, "late_result_not_found"
    )
    assert_error(daemon.admin("POST", f"jobs/{job_id}/adopt", {"result": 0}), 400, "invalid_request")
    adopted = daemon.admin("POST", f"jobs/{job_id}/adopt", {"result": late["seq"], "reason": "whole"}).data
    assert (adopted["status"], adopted["file_path"], adopted["payload"]) == ("completed", "/out", {"n": 1})
    assert_error(daemon.admin("POST", f"jobs/{job_id}/adopt"), 409, "invalid_transition")
    kinds = [event["type"] for event in daemon.get(f"/v1/jobs/{job_id}/timeline").data["events"]]
    assert kinds == ["created", "granted", "force_reset", "late_result", "adopted"]
    assert_error(daemon.get(f"/v1/jobs/{job_id}/late-results"), 404, "not_found")


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
