"""`jobctl worker` with a program of tasks, in one process and in several."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobd.cli.ctl.main import main
from jobd.client import AsyncJobClient, JobClient
from jobd.client.app.worker_processes import WorkerProcesses
from tests.support.client_harness import wait_for_job, wait_until_finished
from tests.support.daemon_process import DaemonProcess, die_with_us
from tests.support.polling import wait_until

TASKS = """
import os, signal, time
from datetime import timedelta
from jobd import App, current_job

app = App("processes")

@app.task
def double(n: int) -> int:
    current_job().log(f"doubles {n}")
    return 2 * n

@app.task
def pid() -> int:
    return os.getpid()

@app.task(timeout=timedelta(milliseconds=200))
def endless() -> None:
    while True:
        sum(range(1000))

@app.task
def resumes(rows: int) -> int:
    start = current_job().checkpoint or 0
    for row in range(start, rows):
        current_job().progress(100 * row / rows, checkpoint=row)
        if row == 60 and start == 0:
            time.sleep(1000)
    return start

@app.task
def until_killed(path: str) -> str:
    if os.path.exists(path):
        return "second run"
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(1000)
    return "first run"
"""


@pytest.fixture
def program(tmp_path: Path, daemon: DaemonProcess, queue: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Return the command line of a worker, which runs in the directory of the tasks."""
    (tmp_path / "some_tasks.py").write_text(TASKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JOBD_SOCKET", daemon.socket)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    yield [sys.executable, "-m", "jobd.cli.ctl.main", "worker", "some_tasks:app", "--queues", queue]
    sys.modules.pop("some_tasks", None)


@pytest.mark.parametrize("processes", [[], ["--processes", "2"]], ids=["one", "several"])
def test_a_worker_says_what_it_does_and_drains(
    program: list[str], queue: str, daemon: DaemonProcess, processes: list[str]
) -> None:
    worker = subprocess.Popen([*program, *processes], stderr=subprocess.PIPE, text=True, preexec_fn=die_with_us)
    with worker, JobClient(f"unix:{daemon.socket}") as client:
        jobs = [client.create_job({"n": n}, queue=queue, kind="double") for n in range(4)]
        assert [client.wait_for_job(job.id, timeout_s=60).metadata_value for job in jobs] == [0, 2, 4, 6]
        worker.terminate()
        assert worker.stderr is not None
        shown = worker.stderr.read()
        assert worker.wait() == 0
    first, *_ = shown.splitlines()
    count = processes[1] if processes else "1"
    assert first.startswith(f"jobd 0.1.0: app processes, processes: {count}, tasks: double (default), pid (default)")
    assert f"claims jobs of queue {queue} (only double, pid, endless, resumes, until_killed)" in shown
    assert f"job {jobs[3].id}: doubles 3\n" in shown
    assert f"job {jobs[3].id} (double) completed after " in shown


def _processes(program: list[str], daemon: DaemonProcess, log: list[str], **options: Any) -> WorkerProcesses:
    client = AsyncJobClient(f"unix:{daemon.socket}")
    command = [*program, "--lock-ttl", "3s"]
    return WorkerProcesses(client, command, options.pop("count", 1), "w", log.append, **options)


async def test_a_task_that_ignores_its_timeout_is_killed_and_its_neighbour_put_back(
    program: list[str], queue: str, daemon: DaemonProcess, client: AsyncJobClient, tmp_path: Path
) -> None:
    log: list[str] = []
    processes = _processes([*program, "--concurrency", "2"], daemon, log, kill_after_s=0.2)
    neighbour = await client.create_job({"path": str(tmp_path / "ran")}, queue=queue, kind="until_killed")
    running = asyncio.create_task(processes.run())
    await wait_until((tmp_path / "ran").exists)
    endless = await wait_until_finished(client, (await client.create_job(queue=queue, kind="endless")).id)
    assert (endless.status, endless.error_code, endless.attempt) == ("failed", "timeout", 1)
    assert endless.error_message == (
        "The run took longer than its timeout of 200 ms. It did not end within 200 ms, so its process was killed."
    )
    done = await wait_until_finished(client, neighbour.id)
    assert (done.status, done.metadata_value, done.attempt) == ("completed", "second run", 1)
    assert "released" in [event.type for event in await client.timeline(neighbour.id)]
    processes.stop()
    assert await running == 0
    assert [line.split(":")[0] for line in log] == [
        f"job {endless.id}",
        f"job {neighbour.id} ran in the same process; it is put back.",
    ]


async def test_the_death_of_a_process_loses_no_job(
    program: list[str], queue: str, daemon: DaemonProcess, client: AsyncJobClient, tmp_path: Path
) -> None:
    log: list[str] = []
    processes = _processes(program, daemon, log, count=2)
    running = asyncio.create_task(processes.run())
    job = await client.create_job({"path": str(tmp_path / "ran")}, queue=queue, kind="until_killed")
    await wait_until(lambda: (tmp_path / "ran").exists() and (tmp_path / "ran").stat().st_size > 0)
    others = [await client.create_job({"n": n}, queue=queue, kind="double") for n in range(20)]
    os.kill(int((tmp_path / "ran").read_text()), signal.SIGKILL)
    done = [await wait_until_finished(client, each.id) for each in (job, *others)]
    assert {each.status for each in done} == {"completed"}
    assert done[0].metadata_value == "second run"
    processes.stop()
    assert await running == 0
    assert any("was ended by SIGKILL" in line for line in log)


async def test_a_killed_worker_continues_from_its_checkpoint(
    program: list[str], queue: str, daemon: DaemonProcess, client: AsyncJobClient
) -> None:
    processes = _processes([*program, "--concurrency", "2"], daemon, [])
    running = asyncio.create_task(processes.run())
    pid = await _pid(client, queue)
    job = await client.create_job({"rows": 100}, queue=queue, kind="resumes", max_attempts=2)
    await wait_for_job(client, job.id, lambda seen: seen.progress >= 60)
    os.kill(pid, signal.SIGKILL)
    done = await wait_until_finished(client, job.id)
    assert (done.status, done.metadata_value) == ("completed", 60)
    processes.stop()
    assert await running == 0


async def _pid(client: AsyncJobClient, queue: str) -> int:
    job = await wait_until_finished(client, (await client.create_job(queue=queue, kind="pid")).id)
    assert isinstance(job.metadata_value, int)
    return job.metadata_value


async def test_a_process_that_cannot_work_ends_the_worker(program: list[str], daemon: DaemonProcess) -> None:
    processes = _processes([*program, "--url", "http://127.0.0.1:1", "--token-file", "/dev/null"], daemon, [], count=2)
    assert await processes.run() == 78


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_tasks:app", "no_such_tasks:app: there is no module 'no_such_tasks'. Modules are found from /"),
        ("some_tasks:tasks", "some_tasks:tasks: some_tasks.tasks is no App; write some_tasks:app"),
    ],
)
@pytest.mark.usefixtures("program")
def test_a_target_that_is_no_app_is_an_error(target: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["worker", target]) == 78
    assert message in capfd.readouterr().err
