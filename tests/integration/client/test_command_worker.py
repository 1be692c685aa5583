"""CommandWorker against a real daemon: programs, drains, lost locks, timeouts and signals."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jobd.client import AsyncAdminClient, AsyncJobClient, CommandWorker, Unreachable
from jobd.client.worker import claimer, idle_reasons
from jobd.client.worker.claimer import ClaimOptions
from jobd.client.worker.command_worker import describe
from jobd.client.worker.idle_reasons import remaining_jobs
from jobd.client.worker.process import has_members
from tests.support.client_harness import CommandRun, is_alive, jobctl_run, python_program, wait_for_job, watchdogs_of
from tests.support.daemon_process import DaemonProcess
from tests.support.polling import wait_until
from tests.support.scripted_server import ScriptedServer, ok, serving


@pytest.mark.parametrize(
    ("code", "error_code", "message"),
    [
        (3, "exit:3", "The program ended with exit status 3."),
        (-9, "signal:SIGKILL", "The program was ended by SIGKILL."),
        (-15, "signal:SIGTERM", "The program was ended by SIGTERM."),
        (-40, "signal:40", "The program was ended by 40."),
        (None, "exit:unknown", "The exit status of the program is unknown, because its worker did not reap it."),
    ],
)
def test_exit_statuses_are_described(code: int | None, error_code: str, message: str) -> None:
    assert describe(code) == (error_code, message)


async def test_exit_status_0_completes_the_job_with_its_result(
    client: AsyncJobClient, queue: str, tmp_path: Path
) -> None:
    script = """
    payload=$(cat)
    echo "payload $payload"
    echo "::progress 40 reading"
    echo "::meta pages=12"
    echo "::meta title=A text"
    echo "::result file_path=/tmp/x.pdf"
    echo "::progress many"
    echo to-stderr >&2
    """
    job = await client.create_job(msgspec.Raw(b'{"a" : 1.0}'), queue=queue)
    run = CommandRun(client, tmp_path, queue, script, once=True)
    assert await run.run() == 0
    done = await client.get_job(job.id)
    assert (done.status, done.file_path) == ("completed", "/tmp/x.pdf")
    assert done.metadata_value == {"pages": 12, "title": "A text"}
    assert run.out == 'payload {"a" : 1.0}\n::progress many\n'
    assert run.err == "to-stderr\n"
    start, message = run.messages
    assert start == f"worker run claims jobs of queue {queue}, 1 at a time, at {client.endpoints[0]}"
    assert "not a control line" in message


async def test_progress_is_sent_to_the_daemon(client: AsyncJobClient, queue: str, tmp_path: Path) -> None:
    go = tmp_path / "go"
    script = f"echo '::progress 40 reading'; while [ ! -e {go} ]; do sleep 0.01; done"
    job = await client.create_job(queue=queue)
    running = asyncio.create_task(CommandRun(client, tmp_path, queue, script, once=True).run())
    seen = await wait_for_job(client, job.id, lambda job: job.progress == 40)
    assert seen.progress_message == "reading"
    go.touch()
    assert await running == 0


async def test_the_job_is_in_the_environment_of_the_program(
    client: AsyncJobClient, queue: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOBD_JOB_LEFTOVER", "of an outer run")
    for name in ("ADMIN_TOKEN", "ADMIN_TOKEN_FILE", "ADMIN_READONLY_TOKEN_FILE", "JOBD_ADMIN_URL", "JOBD_ADMIN_LISTEN"):
        monkeypatch.setenv(name, "of the admin API")
    monkeypatch.setenv("JOBD_SOCKET", "/of/the/worker/api")
    job = await client.create_job(queue=queue, kind="k", priority=-3, max_attempts=2)
    run = CommandRun(client, tmp_path, queue, "env | grep -E '^(JOBD_|ADMIN_)' | sort", once=True)
    assert await run.run() == 0
    found = dict(line.split("=", 1) for line in run.out.splitlines())
    done = await client.get_job(job.id)
    granted = (await client.timeline(job.id))[1]
    assert found == {
        "JOBD_SOCKET": "/of/the/worker/api",
        "JOBD_JOB_ID": job.id,
        "JOBD_JOB_QUEUE": queue,
        "JOBD_JOB_KIND": "k",
        "JOBD_JOB_PRIORITY": "-3",
        "JOBD_JOB_ATTEMPT": "1",
        "JOBD_JOB_MAX_ATTEMPTS": "2",
        "JOBD_JOB_STALLS": "0",
        "JOBD_JOB_MAX_STALLS": "3",
        "JOBD_JOB_CREATED_AT": str(job.created_at),
        "JOBD_JOB_RUN_AT": str(job.run_at),
        "JOBD_JOB_STARTED_AT": str(done.started_at),
        "JOBD_JOB_FENCING_TOKEN": str(granted.details["fencing_token"]),
        "JOBD_JOB_WORKER": "run",
    }


@pytest.mark.parametrize(
    ("script", "error_code", "message"),
    [
        ("echo one >&2; echo two >&2; exit 3", "exit:3", "exit status 3: two\nLast lines of stderr:\none\ntwo"),
        ("echo one >&2; exit 3", "exit:3", "The program ended with exit status 3: one"),
        ("kill -KILL $$", "signal:SIGKILL", "The program was ended by SIGKILL."),
        ("exit 127", "exit:127", "The program ended with exit status 127."),
    ],
)
async def test_every_other_end_fails_the_job(
    client: AsyncJobClient, queue: str, tmp_path: Path, script: str, error_code: str, message: str
) -> None:
    job = await client.create_job(queue=queue)
    assert await CommandRun(client, tmp_path, queue, script, once=True).run() == 1
    failed = await client.get_job(job.id)
    assert (failed.status, failed.error_code) == ("failed", error_code)
    assert (failed.error_message or "").endswith(message)


async def test_the_last_progress_is_sent_before_the_failure(client: AsyncJobClient, queue: str, tmp_path: Path) -> None:
    script = "for n in 1 2 3 4 5; do echo ::progress $n; done; exit 1"
    job = await client.create_job(queue=queue)
    await CommandRun(client, tmp_path, queue, script, once=True).run()
    events = await client.timeline(job.id)
    assert events[-2].type == "progress"
    assert events[-2].details["progress"] == 5


async def test_drain_executes_all_due_jobs_and_ends(client: AsyncJobClient, queue: str, tmp_path: Path) -> None:
    jobs = await client.create_jobs({"queue": queue, "payload": n} for n in range(5))
    later = await client.create_job(queue=queue, delay_ms=3_600_000)
    run = CommandRun(client, tmp_path, queue, "cat", drain=True, concurrency=2)
    assert await run.run() == 0
    assert {(await client.get_job(job.id)).status for job in jobs} == {"completed"}
    assert sorted(run.out.splitlines()) == sorted(f"{job.id}: {n}" for n, job in enumerate(jobs))
    assert (await client.get_job(later.id)).status == "queued"
    assert run.messages[1:] == ["drained; 1 job is left: 1 is not due yet."]


async def test_drain_reports_the_remaining_jobs(
    client: AsyncJobClient, daemon: DaemonProcess, queue: str, tmp_path: Path
) -> None:
    """Only for its own queues and kinds."""
    paused = f"{queue}-paused"
    await client.create_jobs({"queue": queue, "kind": kind, "delay_ms": 3_600_000} for kind in ("a", "a", "b"))
    await client.create_job(queue=paused, kind="c")
    daemon.admin("POST", f"queues/{paused}/pause", {})
    (message,) = await _messages_of_drain(client, queue, paused)
    assert message.startswith(
        f"drained; 4 jobs are left: 3 are not due yet, 1 is in queue {paused}, which was paused by "
    )
    expected = "drained; 2 jobs are left: 2 are not due yet."
    assert await _messages_of_drain(client, queue, paused, kinds=["a", "z"]) == [expected]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(idle_reasons, "_PAGE", 1)
        assert await _messages_of_drain(client, queue, paused, kinds=["a", "z"]) == [expected]
    assert await _messages_of_drain(client, queue, paused, kinds=["z"]) == []


async def _messages_of_drain(client: AsyncJobClient, *queues: str, **options: Any) -> list[str]:
    messages: list[str] = []
    worker = CommandWorker(client, ["true"], queues=queues, drain=True, log=messages.append, **options)
    assert await worker.run(signals=False) == 0
    return messages[1:]


async def test_a_paused_queue_is_reported_at_the_start(
    client: AsyncJobClient, daemon: DaemonProcess, queue: str, tmp_path: Path
) -> None:
    daemon.admin("POST", f"queues/{queue}/pause", {"reason": "deploy"})
    run = CommandRun(client, tmp_path, queue, "true", once=True, kinds=["a", "b"])
    running = asyncio.create_task(run.run())
    await wait_until(lambda: len(run.messages) > 1)
    start, pause = run.messages
    assert start.startswith(f"worker run claims jobs of queue {queue} (only a, b), 1 at a time, at unix:")
    assert pause.startswith(f"queue {queue} was paused by ")
    assert pause.endswith(f", until resumed: deploy. Its jobs wait. To resume it: jobctl resume {queue}")
    run.worker.stop()
    assert await running == 1


@pytest.mark.parametrize(
    ("script", "reason"), [("exit 3", "exit status 3"), ("kill -9 $$", "signal SIGKILL"), ("sleep 100", "timeout")]
)
async def test_a_failure_is_reported_with_its_retry(
    script: str, reason: str, client: AsyncJobClient, queue: str, tmp_path: Path
) -> None:
    backoff = {"kind": "fixed", "base_ms": 12_000, "jitter": False}
    job = await client.create_job(queue=queue, max_attempts=2, backoff=backoff)
    last = await client.create_job(queue=queue)
    run = CommandRun(client, tmp_path, queue, script, timeout=0.3 if reason == "timeout" else None)
    running = asyncio.create_task(run.run())
    await wait_until(lambda: len(run.messages) > (4 if reason == "timeout" else 2))
    run.worker.stop()
    assert await running == 0
    messages = [text for text in run.messages if " failed: " in text]
    assert messages == [
        f"job {job.id} failed: {reason}; it is retried in 12 s.",
        f"job {last.id} failed: {reason}; it is not retried: attempt 1 of 1.",
    ]


@pytest.mark.parametrize("base_ms", [0, 500])
async def test_drain_waits_for_the_retries_of_its_own_attempts(
    client: AsyncJobClient, queue: str, tmp_path: Path, base_ms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while another program runs, and for longer than a claim. Not for a job that its creator has scheduled."""
    monkeypatch.setattr(claimer, "POLL_MS", 20)
    backoff = {"kind": "fixed", "base_ms": base_ms, "jitter": False}
    job = await client.create_job(queue=queue, kind="retried", max_attempts=2, backoff=backoff)
    other = await client.create_job(queue=queue)
    await client.create_job(queue=queue, delay_ms=3_600_000)
    ended = tmp_path / "ended"
    script = f'if [ "$JOBD_JOB_KIND" ]; then [ "$JOBD_JOB_ATTEMPT" = 2 ] && touch {ended}; '
    script += f"else while [ ! -e {ended} ]; do sleep 0.01; done; fi"
    run = CommandRun(client, tmp_path, queue, script, drain=True, concurrency=2)
    assert await run.run() == 0
    assert {(await client.get_job(each.id)).status for each in (job, other)} == {"completed"}


@pytest.mark.parametrize("is_completed", [True, False], ids=["completed", "cancelled"])
async def test_drain_does_not_wait_for_a_retry_that_it_cannot_have(
    client: AsyncJobClient, admin: AsyncAdminClient, queue: str, tmp_path: Path, is_completed: bool
) -> None:
    backoff = {"kind": "fixed", "base_ms": 1_000, "jitter": False}
    job = await client.create_job(queue=queue, max_attempts=2, backoff=backoff)
    run = CommandRun(client, tmp_path, queue, "exit 3", drain=True)
    running = asyncio.create_task(run.run())
    await wait_for_job(client, job.id, lambda job: job.error_code is not None)
    if is_completed:
        updates = {"download_url": "https://files/1"}
        await admin.transition_job_state(job.id, "queued", "completed", updates=updates)
    else:
        await client.cancel_job(job.id)
    assert await running == (0 if is_completed else 1)


async def test_remaining_jobs_are_unknown_without_a_daemon(tmp_path: Path) -> None:
    async with AsyncJobClient(f"unix:{tmp_path}/none", retry_for_s=0) as client:
        assert await remaining_jobs(client, ClaimOptions(worker="w")) is None


async def test_once_executes_one_job(client: AsyncJobClient, queue: str, tmp_path: Path) -> None:
    first, second = await client.create_jobs([{"queue": queue}, {"queue": queue}])
    assert await CommandRun(client, tmp_path, queue, "true", once=True).run() == 0
    assert (await client.get_job(first.id)).status == "completed"
    assert (await client.get_job(second.id)).status == "queued"


async def test_cancelling_a_job_ends_its_process_group(client: AsyncJobClient, queue: str, tmp_path: Path) -> None:
    script = "trap 'echo stopped; exit 0' TERM; sleep 1000 & echo ::progress 1; echo $$; while :; do sleep 0.01; done"
    job = await client.create_job(queue=queue)
    run = CommandRun(client, tmp_path, queue, script, once=True, lock_ttl_ms=30_000)
    running = asyncio.create_task(run.run())
    await wait_for_job(client, job.id, lambda job: job.progress == 1)
    await client.cancel_job(job.id)
    assert await running == 1
    group, output = run.out.splitlines()
    assert output == "stopped"
    assert not has_members(int(group))
    assert (await client.get_job(job.id)).status == "cancelled"
    assert any("stopping its work" in text for text in run.messages)


@pytest.mark.parametrize(
    ("stops", "limits"),
    [
        (1, {"grace_s": 0.05, "kill_after_s": 0.2}),
        (2, {"grace_s": 10_000, "kill_after_s": 0.2}),
        (3, {"grace_s": 10_000, "kill_after_s": 10_000}),
    ],
    ids=["grace over", "second signal", "third signal"],
)
async def test_after_the_grace_the_group_is_stopped_and_the_job_released(
    client: AsyncJobClient, queue: str, tmp_path: Path, stops: int, limits: dict[str, float]
) -> None:
    script = "trap '' TERM; echo ::progress 1; echo $$; while :; do sleep 0.01; done"
    job = await client.create_job(queue=queue)
    run = CommandRun(client, tmp_path, queue, script, **limits)
    running = asyncio.create_task(run.run())
    await wait_for_job(client, job.id, lambda job: job.progress == 1)
    for _ in range(stops):
        run.worker.stop()
    assert await running == 0
    assert not has_members(int(run.out))
    back = await client.get_job(job.id)
    assert (back.status, back.attempt) == ("queued", 0)
    assert [event.type for event in await client.timeline(job.id)][-1] == "released"


async def test_without_the_program_nothing_is_claimed(client: AsyncJobClient, queue: str, tmp_path: Path) -> None:
    job = await client.create_job(queue=queue)
    messages: list[str] = []
    worker = CommandWorker(client, ["/nonexistent/program"], queues=[queue], log=messages.append, drain=True)
    assert await worker.run(signals=False) == 1
    assert "no such program" in messages[0]
    assert (await client.timeline(job.id))[-1].type == "created"


async def test_a_program_that_is_not_executable_has_its_own_message(tmp_path: Path) -> None:
    program = tmp_path / "my script.sh"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o644)
    messages: list[str] = []
    for command in (str(program), str(tmp_path)):
        worker = CommandWorker(f"unix:{tmp_path}/none", [command], log=messages.append, drain=True)
        assert await worker.run(signals=False) == 1
    assert f"it is not executable: chmod +x '{program}'. No job was claimed." in messages[0]
    assert "it is a directory" in messages[1]


async def test_a_job_is_released_if_its_program_cannot_be_started(
    client: AsyncJobClient, queue: str, tmp_path: Path
) -> None:
    program = tmp_path / "program"
    program.write_text("#!/nonexistent/interpreter\n")
    program.chmod(0o755)
    job = await client.create_job(queue=queue)
    messages: list[str] = []
    worker = CommandWorker(client, [str(program)], queues=[queue], log=messages.append)
    assert await worker.run(signals=False) == 1
    assert "Its job was released" in messages[1]
    back = await client.get_job(job.id)
    assert (back.status, back.attempt) == ("queued", 0)


async def test_drain_without_a_daemon_ends_after_its_timeout(
    queue: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claimer, "RETRY_FOR_S", 0.1)
    run = CommandRun(f"unix:{tmp_path}/none", tmp_path, queue, "true", drain=True)
    with pytest.raises(Unreachable):
        await run.run()


def test_a_command_and_a_positive_concurrency_are_needed() -> None:
    with pytest.raises(ValueError, match="a command is needed"):
        CommandWorker("unix:/x", [])
    with pytest.raises(ValueError, match="concurrency"):
        CommandWorker("unix:/x", ["true"], concurrency=0)


@pytest.mark.parametrize("what", ["claim", "progress", "complete"])
async def test_lost_responses_cause_no_second_run(
    daemon: DaemonProcess, client: AsyncJobClient, queue: str, tmp_path: Path, what: str
) -> None:
    server = ScriptedServer(behind=daemon.socket)
    server.loses = lambda received: (
        received.path.endswith(f"/{what}") and received.body not in [lost.body for lost in server.lost]
    )
    job = await client.create_job(queue=queue)
    with serving(server, tmp_path / "p") as endpoint:
        run = CommandRun(endpoint, tmp_path, queue, "echo ::progress 5; echo ran", once=True)
        assert await run.run() == 0
    assert run.out == "ran\n"
    assert server.lost
    assert [event.type for event in await client.timeline(job.id)].count("completed") == 1


async def test_a_result_that_the_daemon_rejects_fails_the_job(
    client: AsyncJobClient, queue: str, tmp_path: Path
) -> None:
    job = await client.create_job(queue=queue)
    script = 'big=$(head -c 60000 /dev/zero | tr "\\0" x); for n in $(seq 20); do echo "::meta k$n=$big"; done'
    assert await CommandRun(client, tmp_path, queue, script, once=True).run() == 1
    failed = await client.get_job(job.id)
    assert (failed.status, failed.error_code) == ("failed", "complete:too_large")


async def test_sigterm_to_jobctl_run_releases_the_job(
    client: AsyncJobClient, daemon: DaemonProcess, queue: str
) -> None:
    job = await client.create_job(queue=queue)
    argv = ("--grace", "50ms", "--", "sh", "-c", "echo ::progress 1; echo $$; sleep 1000")
    run = jobctl_run(daemon.socket, queue, *argv)
    async with python_program(*run, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        await wait_for_job(client, job.id, lambda job: job.progress == 1)
        process.send_signal(signal.SIGTERM)
        out, err = await asyncio.to_thread(process.communicate)
    assert process.returncode == 0, err
    assert not has_members(int(out))
    back = await client.get_job(job.id)
    assert (back.status, back.attempt) == ("queued", 0)


async def test_a_failed_program_fails_its_job_even_if_the_parent_ignores_sigchld(
    client: AsyncJobClient, daemon: DaemonProcess, queue: str
) -> None:
    job = await client.create_job(queue=queue)
    previous = signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # inherited over exec
    try:
        run = jobctl_run(daemon.socket, queue, "--once", "--", "sh", "-c", "exit 3")
        async with python_program(*run, stderr=subprocess.PIPE) as process:
            await asyncio.to_thread(process.communicate)
    finally:
        signal.signal(signal.SIGCHLD, previous)
    failed = await client.get_job(job.id)
    assert (failed.status, failed.error_code) == ("failed", "exit:3")


async def test_jobctl_run_ends_although_its_stderr_is_not_read(
    client: AsyncJobClient, daemon: DaemonProcess, queue: str
) -> None:
    job = await client.create_job(queue=queue)
    read, full = os.pipe()
    os.set_blocking(full, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(full, b"x" * 4096)
    os.set_blocking(full, True)
    async with python_program(*jobctl_run(daemon.socket, queue, "--once", "--", "true"), stderr=full) as process:
        assert await asyncio.to_thread(process.wait, 30) == 0
    os.close(read)
    os.close(full)
    assert (await client.get_job(job.id)).status == "completed"


async def test_a_locale_without_utf8_does_not_stop_jobctl_run(
    client: AsyncJobClient, daemon: DaemonProcess, queue: str
) -> None:
    job = await client.create_job(queue=queue, kind="größe")
    run = jobctl_run(daemon.socket, queue, "--once", "--", "sh", "-c", 'echo "::meta kind=$JOBD_JOB_KIND"')
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    async with python_program(*run, environ=locale) as process:
        assert await asyncio.to_thread(process.wait, 30) == 0
    assert (await client.get_job(job.id)).metadata_value == {"kind": "größe"}


async def test_a_program_is_stopped_after_its_timeout(client: AsyncJobClient, queue: str, tmp_path: Path) -> None:
    script = "trap 'echo stopped >&2; exit 0' TERM; sleep 1000 & echo $$; while :; do sleep 0.01; done"
    job = await client.create_job(queue=queue)
    run = CommandRun(client, tmp_path, queue, script, once=True, timeout=0.5)
    assert await run.run() == 1
    failed = await client.get_job(job.id)
    assert (failed.status, failed.error_code) == ("failed", "timeout")
    assert failed.error_message is not None
    first, *_, last = failed.error_message.splitlines()
    assert (first, last) == ("The run took longer than its timeout of 500 ms. Last lines of stderr:", "stopped")
    assert not has_members(int(run.out))


@pytest.mark.parametrize(("limit", "sent"), [({}, 0), ({"progress_timeout_ms": 5000}, 5000)])
async def test_locks_have_no_progress_timeout_by_default(tmp_path: Path, limit: dict[str, Any], sent: int) -> None:
    server = ScriptedServer()
    server.always = lambda received: ok({"grants": []})
    with serving(server, tmp_path / "p") as endpoint:
        await CommandWorker(endpoint, ["true"], drain=True, **limit).run(signals=False)
    assert server.received[0].json["progress_timeout_ms"] == sent
    assert server.received[0].json["about"].keys() == {"instance", "host", "pid", "version", "concurrency"}


async def test_killing_the_worker_with_its_watchdog_ends_its_program(
    client: AsyncJobClient, daemon: DaemonProcess, queue: str, tmp_path: Path
) -> None:
    script = f"echo $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; while :; do sleep 0.01; done"
    await client.create_job(queue=queue)
    async with python_program(*jobctl_run(daemon.socket, queue, "--", "sh", "-c", script)) as process:
        await wait_until((tmp_path / "pid").exists)
        program = int((tmp_path / "pid").read_text())
        for watchdog in await asyncio.to_thread(watchdogs_of, process.pid):
            os.kill(process.pid, signal.SIGSTOP)  # it starts no other one
            os.kill(watchdog, signal.SIGKILL)
    try:
        await wait_until(lambda: not has_members(program))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program, signal.SIGKILL)


@pytest.mark.parametrize("is_stubborn", [False, True], ids=["SIGTERM ends it", "it ignores SIGTERM"])
async def test_killing_the_worker_ends_its_programs_and_their_children(
    client: AsyncJobClient, daemon: DaemonProcess, queue: str, tmp_path: Path, is_stubborn: bool
) -> None:
    trap = "trap '' TERM;" if is_stubborn else ""
    script = f"{trap} sleep 1000 & echo ::meta child=$!; echo $$ $! > {tmp_path}/pids.new; "
    script += f"mv {tmp_path}/pids.new {tmp_path}/pids; wait; while :; do sleep 0.01; done"
    await client.create_job(queue=queue)
    run = jobctl_run(daemon.socket, queue, "--lock-ttl", "1s", "--", "sh", "-c", script)
    async with python_program(*run) as process:
        await wait_until((tmp_path / "pids").exists)
        program, child = map(int, (tmp_path / "pids").read_text().split())
        watchdogs = await asyncio.to_thread(watchdogs_of, process.pid)
        assert len(watchdogs) == 1
    await wait_until(lambda: not has_members(program) and not is_alive(child))
    await wait_until(lambda: not is_alive(watchdogs[0]))


async def test_no_watchdog_is_left_after_the_end(client: AsyncJobClient, queue: str, tmp_path: Path) -> None:
    await client.create_job(queue=queue)
    assert await CommandRun(client, tmp_path, queue, "true", once=True).run() == 0
    assert watchdogs_of(os.getpid()) == []
