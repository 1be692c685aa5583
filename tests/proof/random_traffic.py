"""Random traffic that needs no operator must open no problem above a notice.

`python -m tests.proof.random_traffic [--seeds N] [--seed K]`

Each seed draws queues, kinds, their load and enough workers for it, and runs them in virtual time. Attempts fail, jobs
are delayed, cancelled, released and snoozed, bursts come, workers restart and single ones are killed, and queues are
paused for a while with a reason. Exit code 1 if a problem opened.
"""

from __future__ import annotations

import argparse
import logging
import sys
from random import Random
from typing import Any, Final

import structlog

from jobd.maintenance.cleanup_run import CleanupSchedule
from jobd.model.commands import Cancel, Complete, Create, Extend, Fail, Goodbye, Pause, Progress, Release
from jobd.model.errors import ApiError
from jobd.model.job import HOUR_MS, MINUTE_MS, SECOND_MS
from tests.support.problem_stage import Stage
from tests.support.virtual_engine import VirtualEngine, in_virtual_time, seconds

SCHEDULE: Final = CleanupSchedule(recover_every_ms=10_000)
SHORT_S: Final = 30 * 60
LONG_S: Final = 5 * 60 * 60  # enough for a usual duration, and for a change of it
LONG_EVERY: Final = 20  # seeds
TAKES_S: Final = (0.2, 2.0, 10.0, 40.0)  # jobs of a kind, on average
BUSY: Final = 0.4  # part of their time in which workers are busy, at most
MOST_A_SECOND: Final = 0.1  # new jobs of a kind
KILLED_EVERY_S: Final = 4 * 60 * 60  # of work of one worker
BURST_S: Final = 90  # in which all workers of a queue finish a burst
RENEWS_S: Final = 20
REPORT_EVERY: Final = 10  # seeds


class Traffic:
    """The clients of one seed. A queue has workers that take all of its kinds."""

    def __init__(self, stage: Stage, seed: int, slower: float) -> None:
        self.dice = Random(seed)
        self._stage = stage
        self._slower = slower  # factor for the load of a long run
        self._names = 0
        self._about = [{"host": f"web-{number % 3}", "version": f"2.{number % 2}"} for number in range(6)]

    def begin(self) -> None:
        for number in range(self.dice.randint(1, 5)):
            queue = f"q{number}"
            kinds = {f"{queue}-k{each}": self.dice.choice(TAKES_S) for each in range(self.dice.randint(1, 3))}
            workers = self.dice.randint(3, 6)
            fails = self.dice.choice((0.0, 0.02, 0.15))
            rate = min(workers * self.dice.uniform(0.1, BUSY) / sum(kinds.values()), MOST_A_SECOND) / self._slower
            for kind, takes_s in kinds.items():
                self._stage.act(self._creates(queue, kind, rate, takes_s, workers))
            for _ in range(workers):
                self._stage.act(self._workers(queue, kinds, fails))
            if self.dice.random() < 0.3:
                self._stage.act(self._pauses(queue))

    async def _ask(self, command: Any) -> Any:
        """Return the response. Errors are part of the traffic: a job was cancelled, or its queue paused."""
        return await self._stage.engine.actor.ask(command)

    async def _creates(self, queue: str, kind: str, rate: float, takes_s: float, workers: int) -> None:
        while True:
            await seconds(self.dice.expovariate(rate))
            burst = max(round(BURST_S * workers * BUSY / takes_s), 1)
            for _ in range(self.dice.randint(1, min(burst, 400)) if self.dice.random() < 0.002 else 1):
                later = self.dice.random() < 0.1
                command = Create(
                    queue=queue,
                    kind=kind,
                    max_attempts=5,
                    priority=self.dice.choice((0, 0, 0, -5, 5)),
                    delay_ms=self.dice.randint(0, 10 * MINUTE_MS) if later else None,
                    expires_at=self._stage.engine.now + 2 * HOUR_MS if self.dice.random() < 0.2 else None,
                )
                job = (await self._ask(command)).data
                if self.dice.random() < 0.02:
                    await self._ask(Cancel(id=job.id, reason="the customer left"))

    async def _workers(self, queue: str, kinds: dict[str, float], fails: float) -> None:
        """Be one worker after another: each works until its program is restarted or killed."""
        while True:
            self._names += 1
            name, about = f"w-{self._names}", self.dice.choice(self._about)
            until_s = self.dice.expovariate(1 / 3_000)
            while until_s > 0:
                wait_ms = self.dice.choice((0, 5_000, 30_000))
                grants = await self._stage.claim(queue, name, wait_ms, stall_after_ms=0, **about)
                if not grants:
                    await seconds(0 if wait_ms else 2)
                    until_s -= wait_ms / SECOND_MS + 2
                    continue
                takes_s = self.dice.expovariate(1 / kinds[grants[0].job.kind])
                is_killed = self.dice.random() < takes_s / KILLED_EVERY_S
                await self._works(grants[0], takes_s / 2 if is_killed else takes_s, fails, is_killed=is_killed)
                until_s -= takes_s
                if is_killed:
                    break
            else:
                await self._ask(Goodbye(name=name))
            await seconds(self.dice.uniform(1, 10))

    async def _works(self, granted: Any, takes_s: float, fails: float, *, is_killed: bool) -> None:
        """Work on a job: renew its lock, perhaps report progress, and end it unless the worker is killed."""
        held = {"id": granted.job.id, "lock_id": granted.lock_id}
        reports = self.dice.random() < 0.5
        left_s = takes_s
        while left_s > 0:
            await seconds(min(left_s, RENEWS_S))
            left_s -= RENEWS_S
            done = 100 * max(1 - left_s / takes_s, 0.0)
            command = Progress(progress=min(done, 99.0), **held) if reports and left_s > 0 else Extend(**held)
            if isinstance(await self._ask(command), ApiError):  # it was cancelled
                return
        if is_killed:
            return
        roll = self.dice.random()
        if roll < fails:
            await self._ask(Fail(error_message=self.dice.choice(("timed out", "no such file", "503")), **held))
        elif roll > 0.98:
            await self._ask(Release(delay_ms=self.dice.choice((None, 60_000)), **held))
        else:
            await self._ask(Complete(**held))

    async def _pauses(self, queue: str) -> None:
        while True:
            await seconds(self.dice.expovariate(1 / 1_800))
            until = self._stage.engine.now + self.dice.randint(SECOND_MS, 2 * MINUTE_MS)
            await self._ask(Pause(name=queue, reason="deploy", until=until))


def opened(seed: int) -> list[str]:
    """Run the traffic of a seed. Return the problems above a notice that opened."""
    found: list[str] = []
    is_long = seed % LONG_EVERY == 0

    async def run() -> None:
        async with VirtualEngine(schedule=SCHEDULE) as engine, Stage(engine) as stage:
            Traffic(stage, seed, 3.0 if is_long else 1.0).begin()
            await seconds(LONG_S if is_long else SHORT_S)
            assert engine.state.totals["completed"]
            urgent = [each for each in stage.listed.values() if each.severity != "notice"]
            found.extend(f"{each.id}: {each.title} {each.cause}" for each in urgent)

    in_virtual_time(run)()
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proof.random_traffic", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="how many seeds, from --seed on")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    given = parser.parse_args(arguments)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    failed = 0
    for seed in range(given.seed, given.seed + given.seeds):
        if problems := opened(seed):
            failed += 1
            print(f"seed {seed}:", *problems, sep="\n  ")
        if (seed + 1) % REPORT_EVERY == 0:
            print(f"{seed + 1 - given.seed} of {given.seeds} seeds", file=sys.stderr)
    print(f"{given.seeds} seeds: {given.seeds - failed} without a problem above a notice")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
