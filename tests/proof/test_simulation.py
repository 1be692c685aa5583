"""Some seeds of the simulation, and tests of the simulation itself. The long run: `make simulation`."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections import Counter
from random import Random
from typing import Final

import pytest

from jobd.engine.actor import Actor
from jobd.engine.batch import DecidedBatch, Decider
from jobd.model.commands import Stats
from tests import ROOT
from tests.proof.simulation import __main__ as program
from tests.proof.simulation.expected import never
from tests.proof.simulation.loop import InlineExecutor, SimLoop
from tests.proof.simulation.machine import Machine, SimCall
from tests.proof.simulation.run import SeedOutcome, reduce_failure, simulate
from tests.proof.simulation.scenario import FAULTS, MISHAPS, draw
from tests.proof.simulation.trace import Trace

SEEDS: Final = (78, 131, 32, 99, 152, 93, 136, 143, 83, 103, 80, 67, 121, 3, 0, *range(1_000, 1_015))
RARE: Final = 8  # of about 200 events, commands, errors and faults need more seeds than these
STEPS: Final = 300

# CPU-bound, so it takes many times as long on a busy machine.
pytestmark = pytest.mark.timeout(300)


def held(outcome: SeedOutcome) -> str:
    """Return an empty string, or what broke with the command that repeats it."""
    if outcome.broken is None:
        return ""
    return f"{outcome.broken[:2]}: python -m tests.proof.simulation --seed {outcome.seed} --seeds 1 --steps {STEPS}"


def test_every_invariant_holds_and_nearly_every_event_error_and_fault_occurs() -> None:
    """`make simulation` requires all of them."""
    fired: Counter[str] = Counter()
    for seed in SEEDS:
        outcome = simulate(seed, STEPS)
        assert not held(outcome)
        fired.update(outcome.fired)
    assert len(never(fired)) <= RARE, never(fired)


@pytest.mark.parametrize("cluster", [False, True])
def test_the_same_seed_gives_the_same_trace(cluster: bool) -> None:
    """In processes with different hash seeds, too, and without a story."""
    code = f"""if True:
        from functools import partial
        from tests.proof.simulation.run import simulate
        play = partial(simulate, steps=150, cluster={cluster}, with_digest=True)
        told, first, other = play(3, with_story=True), play(3), play(4)
        assert (told.digest, told.steps, told.fired) == (first.digest, first.steps, first.fired)
        assert simulate(3, 150, cluster={cluster}).digest == ""
        print(first.digest, other.digest)"""
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    [digests] = printed
    first, other = digests.split()
    assert first != other


def test_a_bug_is_found_and_described(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An actor that responds although nothing was written."""

    async def write(self: Actor, plan: DecidedBatch) -> dict[int, bytes]:
        self._decider.committed(plan)
        return {}

    monkeypatch.setattr(Actor, "_write", write)
    assert program.main(["--seeds", "3", "--steps", "50", "--failing", "2"]) == 1
    expected = capsys.readouterr().out
    assert "0 seeds held, 2 failed" in expected
    assert (expected.count("Seed 0: "), expected.count("Seed 1: "), expected.count("Seed 2: ")) == (1, 1, 0)
    assert "S6 broke" in expected
    assert "With only the faults [] and the client mishaps []" in expected
    assert "is not on the disk" in expected


def test_the_faults_that_matter_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the faults without which the invariant holds are left."""

    def roll_back(self: Decider, plan: DecidedBatch) -> None:
        self.keys.rollback()  # the jobs stay as the rejected batch had them

    monkeypatch.setattr(Decider, "roll_back", roll_back)
    found = next(outcome for seed in range(50) if (outcome := simulate(seed, 300)).broken is not None)
    assert found.broken is not None
    least = reduce_failure(found.seed, 300, found.broken)
    assert least.broken is not None
    assert least.story
    from tests.proof.simulation.scenario import draw

    assert set(draw(found.seed, frozenset(least.without)).faults) & {"full disk", "rot"}


def test_a_caller_that_left_gets_nothing() -> None:
    """Seed 5789: a caller left at the moment of its response, and the handler failed on that."""
    expected: list[str] = []
    loop = SimLoop(Random("gone"))

    async def ask_and_go() -> None:
        machine = Machine(0, draw(0, frozenset(FAULTS) | frozenset(MISHAPS)), loop, Trace(keep_lines=False))
        loop.on_error = expected.append
        running = asyncio.create_task(machine.keep_running())
        while machine.daemon is None or not machine.daemon.is_open:  # noqa: ASYNC110 - the machine has no event for it
            await asyncio.sleep(0.1)
        for turns in range(8):
            asking = asyncio.create_task(machine.call(SimCall("somebody", Stats())))
            for _ in range(turns):
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.sleep(1)
        machine.off = True
        await machine.daemon.stop()
        running.cancel()

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(ask_and_go())
        gc.collect()
    assert expected == []


def test_the_end_of_a_run_waits_for_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", lambda _: None)  # a thread that has not run yet
    loop = SimLoop(Random("end"))
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        loop.set_default_executor(InlineExecutor())
        runner.run(asyncio.sleep(1))


def test_the_program_counts_events(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--seeds", "12", "--steps", "60", "--jobs", "2"]) == 0
    expected = capsys.readouterr().out
    assert "12 seeds" in expected
    assert "never happened: " in expected
    assert "event created" in expected
