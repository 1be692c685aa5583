"""Workers that die, and workers that are suspended past the end of their lock: real processes (worker.py)."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any, Final

from tests.proof.faults.daemons import sigstopped
from tests.proof.faults.harness import Counts, Trial, check
from tests.proof.faults.store_check import checked_contents
from tests.support.daemon_process import DaemonProcess, call, die_with_us
from tests.support.polling import poll_until

LOCK_TTL_MS: Final = 1_000
RECOVER_EVERY_MS: Final = 2_000
LATE_MS: Final = 1_000  # beyond the recovery period
WORKERS: Final = 4
TIMEOUT_S: Final = 150.0


class RealWorker:
    """A worker's process and its output."""

    def __init__(self, daemon: DaemonProcess, queue: str, lock_ttl_ms: int = LOCK_TTL_MS) -> None:
        command = [sys.executable, "-m", "tests.proof.faults.worker", daemon.socket, queue, str(lock_ttl_ms)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=die_with_us,
        )
        self._stderr_lines: list[str] = []
        self._stderr_reader = threading.Thread(target=self._read_stderr)
        self._stderr_reader.start()

    def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        self._stderr_lines += self.process.stderr  # until it ends

    def __enter__(self) -> RealWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._stderr_reader.join()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()

    @property
    def stderr(self) -> str:
        """Return the stderr of the process. It is complete once the process has ended."""
        return "".join(self._stderr_lines)

    def next_report(self) -> dict[str, Any]:
        """Return the next line of stdout, decoded."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the worker has ended: {self.stderr}"
        said: dict[str, Any] = json.loads(line)
        return said

    def finish_job(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


def _wait_until_expired(daemon: DaemonProcess, job_id: str) -> None:
    """Wait until the daemon shows the lock as expired."""

    def is_expired() -> bool:
        job = daemon.get(f"/v1/jobs/{job_id}").data
        assert job["status"] == "processing"
        return job["lock"] is None or job["lock"]["expires_at"] <= time.time() * 1000

    poll_until(is_expired, every_s=0.05)


def next_state(daemon: DaemonProcess, job_id: str, *, after: str = "processing") -> dict[str, Any]:
    """Wait until the job has left the status `after`; return it."""

    def left() -> dict[str, Any] | None:
        job: dict[str, Any] = daemon.get(f"/v1/jobs/{job_id}").data
        return job if job["status"] != after else None

    job = poll_until(left, every_s=0.02)
    assert job is not None
    return job


@check(rounds=15)
def sleeping_worker(trial: Trial) -> Counts:
    """A worker sleeps past its lock: accepted until recovery has acted, then lock_lost; the new token is larger.

    Recovery runs on request, so that it does not come first.
    """
    counts = {"endings accepted after the lock expired": 0, "endings rejected": 0, "running jobs stopped": 0}
    with DaemonProcess(trial.directory, "[cleanup]\nrecover_every = '0'\ninterval = '1h'\n") as daemon:
        with RealWorker(daemon, "q") as worker:
            for number in range(trial.rounds):
                job_id = f"job-{number}"
                assert daemon.post("/v1/jobs", {"id": job_id, "queue": "q", "max_attempts": 3}).status == 201
                begun = worker.next_report()
                assert (begun["said"], begun["job"]) == ("begun", job_id), worker.stderr
                (_check_accepted, _check_rejected, _check_stopped)[number % 3](daemon, worker, begun)
                counts[tuple(counts)[number % 3]] += 1
        assert daemon.stop() == 0
    store = checked_contents(daemon.store)
    assert all(job.status == "completed" for job in store.jobs.values())
    return {**counts, "tokens": len(store.tokens)}


def _check_accepted(daemon: DaemonProcess, worker: RealWorker, begun: dict[str, Any]) -> None:
    """Check that no other worker gets the job and its holder can end it."""
    with sigstopped(worker.process):
        _wait_until_expired(daemon, begun["job"])
        worker.finish_job()
    assert worker.next_report()["said"] == "done"
    assert next_state(daemon, begun["job"])["status"] == "completed"


def _recover(daemon: DaemonProcess, begun: dict[str, Any]) -> dict[str, Any]:
    """Recover the job and grant it to another worker; return the new grant."""
    recovered = daemon.admin("POST", "recover-stuck", {}).data
    assert [(one["jobId"], one["action"]) for one in recovered["details"]] == [(begun["job"], "reset")]
    grant: dict[str, Any] = daemon.post(f"/v1/jobs/{begun['job']}/start", {"worker": "the next"}).data
    assert grant["fencing_token"] > begun["token"], "the new token has to be the larger one"
    return grant


def _check_rejected(daemon: DaemonProcess, worker: RealWorker, begun: dict[str, Any]) -> None:
    """Check that a worker whose work ended while it was suspended cannot complete a job that was granted again."""
    with sigstopped(worker.process):
        _wait_until_expired(daemon, begun["job"])
        grant = _recover(daemon, begun)
        before = daemon.get(f"/v1/jobs/{begun['job']}").data
        worker.finish_job()
    assert worker.next_report()["said"] in ("done", "lost")  # it may notice before it completes
    _check_next_job(daemon, worker)
    _check_new_grant(daemon, before, grant)


def _check_stopped(daemon: DaemonProcess, worker: RealWorker, begun: dict[str, Any]) -> None:
    """Check that a worker that wakes up gets lock_lost, stops the work and claims another job."""
    with sigstopped(worker.process):
        _wait_until_expired(daemon, begun["job"])
        grant = _recover(daemon, begun)
        before = daemon.get(f"/v1/jobs/{begun['job']}").data
    assert worker.next_report() == {"said": "lost", "job": begun["job"]}
    _check_next_job(daemon, worker)
    _check_new_grant(daemon, before, grant)


def _check_next_job(daemon: DaemonProcess, worker: RealWorker) -> None:
    """Check that the worker claims again, so it has given up the lost job."""
    job_id = daemon.post("/v1/jobs", {"queue": "q"}).data["id"]
    begun = worker.next_report()
    assert (begun["said"], begun["job"]) == ("begun", job_id)
    worker.finish_job()
    assert worker.next_report()["said"] == "done"
    assert next_state(daemon, job_id)["status"] == "completed"


def _check_new_grant(daemon: DaemonProcess, before: dict[str, Any], grant: dict[str, Any]) -> None:
    path = f"/v1/jobs/{before['id']}"
    assert daemon.get(path).data == before, "the former holder has changed the job"
    # Late calls and results of the former holder are stored, but do not change the job.
    timeline = daemon.get(f"{path}/timeline").data["events"]
    events = [event for event in timeline if event["type"] not in ("late_result", "late_call")]
    assert events[-1]["type"] == "granted", events[-1]
    assert events[-1]["by"] == "worker:the next"
    done = daemon.post(f"{path}/complete", {"lock_id": grant["lock_id"], "metadata": 1})
    assert done.data["status"] == "completed"


# -- dead --------------------------------------------------------------------------------------------------------------


@check(rounds=10)
def dead_worker(trial: Trial) -> Counts:
    """The job of a dead worker is offered again within the recovery period + 1 s, and not before its lock expires."""
    late_ms: list[int] = []
    at_once = WORKERS if trial.timed else WORKERS // 2
    with DaemonProcess(trial.directory, f"[cleanup]\nrecover_every = '{RECOVER_EVERY_MS}ms'\n") as daemon:
        for number in range(trial.rounds):
            with ExitStack() as stack, ThreadPoolExecutor(at_once) as pool:
                workers = [stack.enter_context(RealWorker(daemon, f"q-{number}-{each}")) for each in range(at_once)]
                for each in range(at_once):
                    job = {"id": f"job-{number}-{each}", "queue": f"q-{number}-{each}", "max_attempts": 9}
                    assert daemon.post("/v1/jobs", job).status == 201
                for each, worker in enumerate(workers):
                    assert worker.next_report()["job"] == f"job-{number}-{each}"
                offered = [pool.submit(_wait_for_job, daemon, f"q-{number}-{each}") for each in range(at_once)]
                for worker in workers:
                    worker.process.kill()
                    worker.process.wait()
                at_ms = [one.result() for one in offered]
            late_ms += [_check_grant_time(daemon, f"job-{number}-{each}", at, trial) for each, at in enumerate(at_ms)]
        assert daemon.stop() == 0
    checked_contents(daemon.store)
    return {
        "workers killed": len(late_ms),
        "ms from lock expiry to the next grant, at most": max(late_ms),
        "at least": min(late_ms),
    }


def _wait_for_job(daemon: DaemonProcess, queue: str) -> int:
    """Return the wall time at which the job was granted again."""
    with closing(daemon.worker()) as connection:
        wait = {"worker": "the next", "queues": [queue], "wait_ms": 30_000}
        grants = call(connection, "POST", "/v1/claim", wait).data["grants"]
    assert grants, f"the job in {queue} was not offered again within 30 s"
    return int(time.time() * 1000)


def _check_grant_time(daemon: DaemonProcess, job_id: str, offered_at: int, trial: Trial) -> int:
    """Return the ms between the expiry of the lock and the next grant."""
    events = daemon.get(f"/v1/jobs/{job_id}/timeline").data["events"]
    seen = [event["type"] for event in events]
    assert seen.count("stalled") == 1 or not trial.timed, seen  # a busy machine may stop a worker for a moment
    assert seen[-1] == "granted", seen
    index = len(seen) - 1 - seen[::-1].index("stalled")
    stalled, sign_of_life = events[index], events[index - 1]
    if sign_of_life["type"] == "lock_expired":
        sign_of_life = events[index - 2]
    expires_at = sign_of_life["at"] + LOCK_TTL_MS
    assert stalled["at"] >= expires_at, f"recovered {expires_at - stalled['at']} ms before its lock has expired"
    assert events[-1]["at"] >= stalled["at"]
    late_ms: int = offered_at - expires_at
    assert late_ms <= RECOVER_EVERY_MS + LATE_MS or not trial.timed, f"{job_id} was offered {late_ms} ms late"
    return late_ms
