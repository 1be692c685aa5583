"""Programs and their process groups."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobd.client.worker import exec_program, process
from jobd.client.worker.process import Program, has_members
from tests.support.client_harness import ProgramRun, is_alive
from tests.support.polling import wait_until

LINGER_S = 0.05


@pytest.fixture(autouse=True)
def short_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "LINGER_S", LINGER_S)


async def test_a_program_gets_its_input_and_its_output_is_read() -> None:
    run = ProgramRun()
    program = await run.start("sh", "-c", 'cat; echo "$WORD" >&2; exit 3', stdin=b"in" * 100_000, WORD="err")
    await program.done
    assert (bytes(run.out), bytes(run.err), program.returncode) == (b"in" * 100_000, b"err\n", 3)


async def test_a_program_gets_its_own_environment_and_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LC_CTYPE", raising=False)  # without a locale, Python sets it for itself and its children
    run = ProgramRun()
    program = await run.start("sh", "-c", 'env; printf "%s" "$0"; kill -PIPE $$', os.fsdecode(b"\xff"), LC_ALL="C")
    await program.done
    assert b"LC_CTYPE" not in run.out
    assert run.out.endswith(b"\xff")
    assert program.returncode == -signal.SIGPIPE


async def test_a_program_that_cannot_be_executed_raises_its_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        await ProgramRun().start(str(tmp_path / "nothing"))


async def test_a_program_is_not_started_by_files_that_were_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not look like a failure of the program, which would use an attempt of each job."""
    monkeypatch.setattr(exec_program, "__file__", str(tmp_path / "gone.py"))
    with pytest.raises(OSError, match=r"gone\.py.* has failed: .*can't open file"):
        await ProgramRun().start("true")


async def test_a_program_may_leave_its_input_unread() -> None:
    program = await ProgramRun().start("true", stdin=b"x" * 1_000_000)
    await program.done
    assert program.returncode == 0


async def test_an_exit_status_is_unknown_if_sigchld_is_ignored() -> None:
    """The kernel then reaps the program, and subprocess takes its return code for 0."""
    previous = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        run = ProgramRun()
        program = await run.start("sh", "-c", "echo out; exit 3")
        await program.done
    finally:
        signal.signal(signal.SIGCHLD, previous)
    assert (bytes(run.out), program.returncode) == (b"out\n", None)


async def test_a_program_is_killed_if_no_thread_can_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def recorded(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*args, **options))
        return started[-1]

    def reject(**options: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(subprocess, "Popen", recorded)
    monkeypatch.setattr(process, "threading", SimpleNamespace(Thread=reject))
    with pytest.raises(RuntimeError, match="can't start new thread"):
        await ProgramRun().start("sleep", "1000")
    [program] = started
    try:
        assert program.returncode == -signal.SIGKILL
        assert all(pipe is not None and pipe.closed for pipe in (program.stdin, program.stdout, program.stderr))
    finally:
        program.kill()


async def test_a_program_can_handle_sigterm() -> None:
    run = ProgramRun()
    program = await run.start("sh", "-c", "trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 0.01; done")
    await run.has_output.wait()
    await program.stop(asyncio.Event())
    assert program.done.done()
    assert (bytes(run.out), program.returncode) == (b"up\nbye\n", 7)


async def test_a_program_that_ignores_sigterm_is_killed_with_its_whole_group() -> None:
    run = ProgramRun()
    script = "trap '' TERM; sleep 1000 & echo $$; wait; sleep 1000"
    program = await run.start("sh", "-c", script, kill_after_s=0.2)
    await run.has_output.wait()
    group = int(run.out)
    assert has_members(group)
    await program.stop(asyncio.Event())
    assert program.done.done()
    assert program.returncode == -signal.SIGKILL
    assert not has_members(group)


async def test_at_once_means_sigkill_without_delay() -> None:
    run = ProgramRun()
    program = await run.start("sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.01; done", kill_after_s=1000)
    await run.has_output.wait()
    at_once = asyncio.Event()
    at_once.set()
    await program.stop(at_once)
    assert program.returncode == -signal.SIGKILL


async def test_a_suspended_program_is_stopped() -> None:
    run = ProgramRun()
    program = await run.start("sh", "-c", "echo $$; kill -STOP $$", kill_after_s=1000)
    await run.has_output.wait()
    await program.stop(asyncio.Event())
    assert program.returncode == -signal.SIGTERM


async def test_children_that_outlive_their_program_are_stopped() -> None:
    run = ProgramRun()
    program = await run.start(
        "sh", "-c", "echo $$; (trap 'echo child gone; exit' TERM; while :; do sleep 0.01; done) & exit 0"
    )
    await program.done
    assert program.returncode == 0
    assert not has_members(int(run.out.split()[0]))


async def test_children_that_ignore_sigterm_are_killed() -> None:
    run = ProgramRun()
    program = await run.start("sh", "-c", "trap '' TERM; echo $$; sleep 1000 & exit 4", kill_after_s=0.2)
    await program.done
    assert program.returncode == 4
    assert not has_members(int(run.out.split()[0]))


async def test_a_child_in_another_group_with_open_output_does_not_delay_the_end(tmp_path: Path) -> None:
    run = ProgramRun()
    program = await run.start("sh", "-c", "setsid sleep 1000 & echo $!; exit 0")
    await program.done
    assert program.returncode == 0
    os.kill(int(run.out), signal.SIGKILL)


@pytest.mark.slow
async def test_a_child_in_another_group_that_writes_forever_does_not_delay_the_end(tmp_path: Path) -> None:
    run = ProgramRun()
    ready = tmp_path / "ready"
    script = f"setsid sh -c 'echo $$; : > {ready}; exec yes' & while [ ! -e {ready} ]; do sleep 0.01; done"
    program = await run.start("sh", "-c", script)
    await program.done
    assert program.returncode == 0
    child = int(run.out.split(b"\n", 1)[0])
    await asyncio.to_thread(_until_gone, child)  # `yes` gets SIGPIPE after its reader has gone


async def test_a_child_in_another_group_that_writes_now_and_then_does_not_delay_the_end(tmp_path: Path) -> None:
    run = ProgramRun()
    child = f"echo $$; touch {tmp_path}/started; while sleep {LINGER_S / 5}; do echo x; done"
    script = f"setsid sh -c '{child}' & until [ -e {tmp_path}/started ]; do sleep 0.01; done"
    program = await run.start("sh", "-c", script)
    try:
        async with asyncio.timeout(process.LINGER_ROUNDS * LINGER_S * 10):
            await asyncio.shield(program.done)
        assert program.returncode == 0
    finally:
        os.kill(int(run.out.split(b"\n", 1)[0]), signal.SIGKILL)


def _until_gone(pid: int) -> None:
    while Path(f"/proc/{pid}").exists():
        os.sched_yield()


@pytest.mark.parametrize("script", ["seq 20000", "trap '' TERM; sleep 1000 & seq 20000"], ids=["alone", "with a child"])
async def test_a_slow_reader_gets_the_whole_output(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if a child of the program has to be killed."""
    monkeypatch.setattr(process, "READ_S", 0)
    got = bytearray()
    gate = asyncio.Event()

    async def slow(piece: bytes) -> None:
        await gate.wait()
        got.extend(piece)

    async def nothing(piece: bytes) -> None:
        pass

    program = await Program.start(["sh", "-c", script], os.environ, b"", slow, nothing, kill_after_s=0.05)
    asyncio.get_running_loop().call_later(4 * LINGER_S, gate.set)
    await program.done
    assert got == b"".join(b"%d\n" % number for number in range(1, 20001))


@pytest.mark.parametrize("has_ended", [False, True], ids=["running", "ended"])
async def test_a_program_can_be_stopped_although_its_output_is_not_read(
    has_ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "READ_S", 0.05)
    pieces: asyncio.Queue[bytes] = asyncio.Queue()

    async def blocked(piece: bytes) -> None:
        pieces.put_nowait(piece)
        await asyncio.Event().wait()

    async def nothing(piece: bytes) -> None:
        pass

    script = "echo $$" if has_ended else "echo $$; exec yes"
    program = await Program.start(["sh", "-c", script], os.environ, b"", blocked, nothing, kill_after_s=10)
    pid = int((await pieces.get()).split(b"\n", 1)[0])
    if has_ended:
        await wait_until(lambda: not is_alive(pid))
    await program.stop(asyncio.Event())
    assert program.done.done()
    assert program.returncode == (0 if has_ended else -signal.SIGTERM)
