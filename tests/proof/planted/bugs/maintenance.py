"""Bugs in maintenance and webhooks."""

from __future__ import annotations

from typing import Any

from jobd.maintenance.artifact_sweeper import ArtifactSweeper
from jobd.maintenance.cleanup_pass import CleanupRun
from jobd.maintenance.maintainer import Maintainer
from tests.proof.planted.registry import ACTOR, SIMULATION, bug

MAINTAINER = "tests/unit/maintenance/test_maintainer.py"


@bug(
    "recovery-only-by-cleanup",
    Maintainer._recover_due,
    breaks="a stalled job waits for the cleanup run",
    found_by=SIMULATION,
)
async def _(recover_due: Any, self: Maintainer) -> None: ...


@bug("failed-step-ends-the-run", CleanupRun.step, breaks="one failed step stops the others", found_by=MAINTAINER)
async def _(step_of: Any, self: CleanupRun, name: str, step: Any) -> None:
    await step()


@bug(
    "journal-pruned-by-a-suspect-clock",
    CleanupRun._journal_step,
    breaks="a cleanup run deletes the journal of deleted jobs although the clock is suspect",
    found_by=ACTOR,
)
async def _(journal_step: Any, self: CleanupRun) -> None:
    await self._disk.prune(self._clock.moment().now - self._context.schedule.journal_ms, self._batch)


@bug(
    "object-of-another-job-deleted",
    ArtifactSweeper._try,
    breaks="an object is deleted although another job names its key",
    found_by="tests/unit/maintenance/test_artifact_sweeper.py",
)
async def _(try_: Any, self: ArtifactSweeper, tombstone: Any, named: bool, now: int) -> Any:
    return await try_(self, tombstone, False, now)
