"""Run one seed, and reduce a failing one to the faults that matter.

The same seed gives the same trace. Nothing is kept between runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Iterator, MutableMapping
from random import Random
from typing import Any, Final

import structlog
from msgspec import Struct, field

from jobd.core import decide
from tests.proof.simulation.clients import SimClient, SimCreator, SimOperator, SimWorker
from tests.proof.simulation.cluster.cluster import Cluster
from tests.proof.simulation.cluster.injector import ClusterFaultInjector
from tests.proof.simulation.cluster.scenario import CLUSTER_FAULTS, draw_cluster
from tests.proof.simulation.final_phase import FinalPhase
from tests.proof.simulation.injector import FaultInjector
from tests.proof.simulation.loop import SimLoop
from tests.proof.simulation.machine import EXPECTED, Machine
from tests.proof.simulation.scenario import FAULTS, MISHAPS, draw
from tests.proof.simulation.trace import Trace

LONGEST_S: Final = 24 * 3_600.0  # virtual time, for seeds in which little happens


class SeedOutcome(Struct):
    """The result of a seed. `broken` is (invariant, description, job id), or None if every invariant held.

    `digest` and `story` are empty unless requested.
    """

    seed: int
    steps: int
    digest: str
    fired: dict[str, int] = field(default_factory=dict)
    broken: tuple[str, str, str | None] | None = None
    story: list[str] = field(default_factory=list)
    without: list[str] = field(default_factory=list)


def simulate(
    seed: int,
    steps: int,
    *,
    without: frozenset[str] = frozenset(),
    with_story: bool = False,
    with_digest: bool = False,
    cluster: bool = False,
) -> SeedOutcome:
    """Run `seed` until this many commands were decided, then its final phase. `cluster`: on several nodes."""
    journal = Trace(keep_lines=with_story, with_digest=with_digest)
    loop = SimLoop(Random(f"{seed}: loop"))
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        machine = runner.run(run_machine(seed, steps, loop, journal, without, cluster=cluster))
    broken = machine.monitor.first
    return SeedOutcome(
        seed=seed,
        steps=machine.monitor.steps,
        digest=journal.digest,
        fired=dict(machine.fired),
        broken=None if broken is None else (broken.rule, broken.what, broken.job_id),
        story=journal.story(broken.job_id if broken else None) if with_story else [],
        without=sorted(without),
    )


async def run_machine(
    seed: int, steps: int, loop: SimLoop, journal: Trace, without: frozenset[str], *, cluster: bool = False
) -> Machine:
    machine: Machine
    chaos: FaultInjector | ClusterFaultInjector
    if cluster:
        plan, options = draw_cluster(seed, without)
        machine = nodes = Cluster(seed, plan, options, loop, journal)
        chaos = ClusterFaultInjector(nodes)
    else:
        machine = Machine(seed, draw(seed, without), loop, journal)
        chaos = FaultInjector(machine)
    machine.enough = steps
    with _watched(machine), machine.constants():
        supervisor = asyncio.create_task(machine.keep_running())
        others = [asyncio.create_task(chaos.live())]
        tasks = [asyncio.create_task(client.live()) for client in _clients(machine)]
        enough = loop.call_later(LONGEST_S, machine.finished.set)
        await machine.finished.wait()
        enough.cancel()
        if machine.monitor.first is None:
            closing = asyncio.create_task(FinalPhase(machine).run([*tasks, *others]))
            await _wait_for_end(closing, machine)
            others.append(closing)
        await _end(machine, [*tasks, *others, supervisor])
    return machine


def _clients(machine: Machine) -> list[SimClient]:
    plan = machine.scenario
    return [
        *(SimCreator(machine, f"c-{number}") for number in range(plan.creators)),
        *(SimWorker(machine, f"w-{number}") for number in range(plan.workers)),
        *(SimOperator(machine, f"o-{number}") for number in range(plan.operators)),
    ]


async def _wait_for_end(closing: asyncio.Task[None], machine: Machine) -> None:
    """Wait until the final phase is over or an invariant broke."""
    while not closing.done() and machine.monitor.first is None:
        await asyncio.wait([closing], timeout=60)
    if closing.done():
        closing.result()


async def _end(machine: Machine, tasks: list[asyncio.Task[Any]]) -> None:
    """Stop the daemon, gracefully if nothing broke, and end all tasks."""
    await machine.shut_down()
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result


@contextlib.contextmanager
def _watched(machine: Machine) -> Iterator[None]:
    """Check all decisions, and silence the log except for unexpected failures."""
    before, original = structlog.get_config(), decide.decide

    def listen(_: Any, __: str, entry: MutableMapping[str, Any]) -> str:
        if entry.get("exc_info"):
            machine.note("log", entry["event"])
            _check_logged_error(machine, entry["event"], sys.exc_info()[1])
        raise structlog.DropEvent

    structlog.configure(
        processors=[listen],
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        cache_logger_on_first_use=False,
    )
    decide.decide = machine.monitor.decide
    try:
        yield
    finally:
        decide.decide = original
        structlog.configure(**before)


def _check_logged_error(machine: Machine, event: str, error: BaseException | None) -> None:
    """Check that a logged failure was injected."""
    if error is not None and not isinstance(error, EXPECTED):
        machine.monitor.fail("log", f"{event}: {error!r}")


# -- when something broke ---------------------------------------------------------------------------------------------


def reduce_failure(seed: int, steps: int, broken: tuple[str, str, str | None], *, cluster: bool = False) -> SeedOutcome:
    """Reproduce a failure with as few faults and mishaps as possible, with its trace."""
    without: frozenset[str] = frozenset()
    for name in (*(CLUSTER_FAULTS if cluster else FAULTS), *MISHAPS):
        tried = simulate(seed, steps, without=without | {name}, cluster=cluster)
        if tried.broken is not None and tried.broken[0] == broken[0]:
            without |= {name}
    return simulate(seed, steps, without=without, with_story=True, cluster=cluster)
