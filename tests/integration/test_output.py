"""The output of a job over HTTP: who may send it, how it is followed, and what is left of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon_process import UnixConnection, call
from tests.support.forked_process import ForkedDaemon
from tests.support.polling import poll_until

PATH = "/v1/jobs/a/output"


def begin(worker: UnixConnection) -> str:
    """Create job "a" and return the lock of its grant."""
    assert call(worker, "POST", "/v1/jobs", {"id": "a"}).status == 201
    [grant] = call(worker, "POST", "/v1/claim", {"worker": "w-1"}).data["grants"]
    return str(grant["lock_id"])


def follows(daemon: ForkedDaemon) -> bool:
    """Return whether a request waits for output: it counts as an event stream."""
    return b"\njobd_event_streams 1.0\n" in daemon.admin("GET", "/metrics").body


def error(response: Any) -> tuple[int, str]:
    return response.status, response.body["error"]


def test_output_is_followed_to_the_end_of_the_job(tmp_path: Path) -> None:
    with ForkedDaemon(tmp_path) as daemon, closing(daemon.worker()) as worker, closing(daemon.worker()) as follower:
        lock = {"lock_id": begin(worker)}
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(call, follower, "GET", f"{PATH}?wait_ms=60000")
            poll_until(lambda: follows(daemon))
            assert call(worker, "POST", PATH, {**lock, "text": "one\n"}).data == {"end": 4}
            view = waiting.result(10).data
            assert ([each["text"] for each in view["grants"]], view["finished"]) == (["one\n"], False)
            after = f"{PATH}?after={view['position']}"
            assert call(worker, "GET", f"{after}&wait_ms=1").data["grants"] == []
            waiting = pool.submit(call, follower, "GET", f"{after}&wait_ms=60000")
            assert call(worker, "POST", "/v1/jobs/a/complete", lock).status == 200
            view = waiting.result(10).data
            assert (view["grants"], view["finished"], view["status"]) == ([], True, "completed")
        shown = daemon.admin("GET", "/admin/job-management/jobs/a/output").data
        assert [each["text"] for each in shown["grants"]] == ["one\n"]
        assert error(call(worker, "POST", PATH, {**lock, "text": "late"})) == (409, "invalid_transition")
        assert daemon.admin("DELETE", "/admin/job-management/jobs/a", {"reason": "test"}).status == 200
        assert error(call(worker, "GET", PATH)) == (404, "job_not_found")
        assert call(worker, "POST", "/v1/jobs", {"id": "a"}).status == 201
        poll_until(lambda: call(worker, "GET", PATH).data["grants"] == [])


def test_output_of_others_too_much_or_too_often_is_rejected(tmp_path: Path) -> None:
    with ForkedDaemon(tmp_path) as daemon, closing(daemon.worker()) as worker:
        lock = {"lock_id": begin(worker)}
        assert error(call(worker, "POST", PATH, {"lock_id": "x", "text": "y"})) == (409, "lock_lost")
        assert error(call(worker, "POST", PATH, {**lock, "text": "ö" * 8193})) == (413, "too_large")
        sent = [call(worker, "POST", PATH, {**lock, "text": "y"}) for _ in range(4)]
        assert [each.status for each in sent] == [200, 200, 200, 429]
        assert 0 < sent[-1].body["details"]["retry_after_ms"] <= 1000


@pytest.mark.parametrize("cause", ["lost", "unusable"])
def test_jobs_go_on_without_the_file(tmp_path: Path, cause: str) -> None:
    with ForkedDaemon(tmp_path) as daemon, closing(daemon.worker()) as worker:
        lock = {"lock_id": begin(worker)}
        assert call(worker, "POST", PATH, {**lock, "text": "y"}).status == 200
        [file] = tmp_path.rglob("*.output")
        file.unlink()
        if cause == "unusable":
            file.mkdir()
            assert error(call(worker, "POST", PATH, {**lock, "text": "y"})) == (503, "output_unavailable")
            assert error(call(worker, "GET", PATH)) == (503, "output_unavailable")
            assert "Is a directory" in daemon.admin("GET", "/admin/job-management/health").data["database"]["message"]
        else:
            assert call(worker, "GET", PATH).data["grants"] == []
        assert call(worker, "POST", "/v1/jobs/a/complete", lock).status == 200


def test_output_can_be_turned_off(tmp_path: Path) -> None:
    with ForkedDaemon(tmp_path, "[limits]\noutput_bytes = 0\n") as daemon, closing(daemon.worker()) as worker:
        lock = {"lock_id": begin(worker)}
        assert error(call(worker, "POST", PATH, {**lock, "text": "y"})) == (409, "output_off")
        assert error(call(worker, "GET", PATH)) == (409, "output_off")
        assert call(worker, "POST", "/v1/jobs/a/complete", lock).status == 200
        assert list(tmp_path.rglob("*.output")) == []
