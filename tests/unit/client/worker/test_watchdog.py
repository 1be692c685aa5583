"""The watchdog process, which ends the programs of a killed worker."""

from __future__ import annotations

import asyncio
import signal
import subprocess

from jobd.client.worker import watchdog
from jobd.client.worker.watchdog import Watchdog
from tests.support.client_harness import ProgramRun
from tests.support.polling import wait_until


async def test_a_killed_watchdog_is_replaced_by_one_with_all_groups() -> None:
    watchdog_ = Watchdog(10)
    first, second = await ProgramRun().start("sleep", "1000"), await ProgramRun().start("sleep", "1000")
    watchdog_.started(1, first._process.pid)
    before = watchdog_._process
    assert before is not None
    before.kill()
    await asyncio.to_thread(before.wait)
    watchdog_.started(2, second._process.pid)
    assert watchdog_._process is not before
    await asyncio.to_thread(watchdog_.close)
    await asyncio.gather(first.done, second.done)
    assert (first.returncode, second.returncode) == (-signal.SIGTERM, -signal.SIGTERM)


async def test_a_killed_watchdog_is_replaced_without_another_event() -> None:
    watchdog_ = Watchdog(10)
    program = await ProgramRun().start("sleep", "1000")
    watchdog_.started(1, program._process.pid)
    before = watchdog_._process
    assert before is not None
    before.kill()
    await wait_until(lambda: watchdog_._process not in (None, before))
    await asyncio.to_thread(watchdog_.close)
    await program.done
    assert program.returncode == -signal.SIGTERM


async def test_a_watchdog_finds_a_starting_program_by_its_token() -> None:
    watchdog_ = Watchdog(10)
    started = await ProgramRun().start("sleep", "1000", JOBD_JOB_FENCING_TOKEN="4711")
    other = await ProgramRun().start("sleep", "1000", JOBD_JOB_FENCING_TOKEN="4712")
    watchdog_.starting(4710)
    watchdog_.starting(4711)
    watchdog_.started(4712, other._process.pid)
    watchdog_.ended(4712)
    await asyncio.to_thread(watchdog_.close)
    await started.done
    assert started.returncode == -signal.SIGTERM
    assert not other.done.done()
    other.abort()
    await other.done


def test_a_watchdog_kills_a_program_that_ignores_sigterm() -> None:
    with subprocess.Popen(
        ["sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.01; done"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as program:
        assert program.stdout is not None
        program.stdout.readline()
        watchdog.end({program.pid, program.pid}, 0.1)
        assert program.wait() == -signal.SIGKILL
