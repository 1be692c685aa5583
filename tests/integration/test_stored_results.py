"""Deletion of artifacts by a real daemon: by hand, by age, and while the store is unavailable."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.daemon_process import DaemonProcess
from tests.support.forked_process import ForkedDaemon
from tests.support.polling import poll_until


@pytest.fixture
def results(tmp_path: Path) -> Path:
    place = tmp_path / "results"
    place.mkdir()
    return place


def daemon_of(tmp_path: Path, url: str) -> DaemonProcess:
    return ForkedDaemon(
        tmp_path,
        variant="eager_sweeper",
        JOBD_ARTIFACTS_URL=url,
        JOBD_LOG_LEVEL="debug",
        JOBD_CLEANUP_INTERVAL="1s",
        JOBD_CLEANUP_MIN_INTERVAL="0",
    )


def done(daemon: DaemonProcess, directory: Path, job_id: str, key: str) -> Path:
    """Store a result and complete the job."""
    daemon.post("/v1/jobs", {"id": job_id})
    lock_id = daemon.post(f"/v1/jobs/{job_id}/start", {"worker": "w"}).data["lock_id"]
    path = directory / key
    path.parent.mkdir(exist_ok=True)
    path.write_text("result")
    daemon.post(f"/v1/jobs/{job_id}/complete", {"lock_id": lock_id, "storage_key": key}).data  # noqa: B018
    return path


def metric(daemon: DaemonProcess, name: str) -> float:
    lines = daemon.admin("GET", "/metrics").body.decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[-1])


@pytest.mark.slow
def test_a_result_is_deleted_with_its_job_by_an_operator_and_by_age(tmp_path: Path, results: Path) -> None:
    with daemon_of(tmp_path, results.as_uri()) as daemon:
        stored = done(daemon, results, "kept", "video/kept.mp4")
        by_hand = done(daemon, results, "by-hand", "video/a.mp4")
        assert daemon.stop() == 0
        daemon.environ["JOBD_RETENTION_COMPLETED"] = "0"  # of jobs that complete from here on
        daemon.start()
        by_age = done(daemon, results, "by-age", "video/b.mp4")
        assert daemon.admin("DELETE", "jobs/by-hand").status == 200
        poll_until(lambda: not by_hand.exists())
        poll_until(lambda: not by_age.exists())
        poll_until(lambda: metric(daemon, "jobd_artifact_tombstones") == 0)
        assert metric(daemon, 'jobd_artifacts_swept_total{outcome="deleted"}') == 2
        assert stored.read_text() == "result"
        poll_until(lambda: daemon.admin("GET", "health").data["storage"]["status"] == "healthy")
        assert [path.name for path in results.rglob("*") if path.is_file()] == ["kept.mp4"]
        assert daemon.stop() == 0


@pytest.mark.slow
def test_tombstones_without_a_store_are_reported_and_kept(tmp_path: Path, results: Path) -> None:
    away = tmp_path / "away"
    with daemon_of(tmp_path, results.as_uri()) as daemon:
        done(daemon, results, "a", "k")
        results.rename(away)
        daemon.admin("DELETE", "jobs/a")
        daemon.wait_for_log(b"event=artifact_not_deleted")
        assert daemon.stop() == 0
        del daemon.environ["JOBD_ARTIFACTS_URL"]
        daemon.start()
        assert b"event=artifacts_wait" in daemon.log
        assert metric(daemon, "jobd_artifact_tombstones") == 1
        done(daemon, away, "b", "unowned")
        assert daemon.admin("DELETE", "jobs/b").status == 200
        assert metric(daemon, "jobd_artifact_tombstones") == 1
        assert daemon.admin("GET", "health").data["storage"]["message"] == "not configured"
        assert daemon.stop() == 0
        away.rename(results)
        daemon.environ["JOBD_ARTIFACTS_URL"] = results.as_uri()
        daemon.start()
        poll_until(lambda: not (results / "k").exists())
        assert (results / "unowned").exists()
