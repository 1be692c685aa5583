"""Delete the artifacts of deleted jobs and late results, in the order of their tombstones.

A crash loses nothing: a tombstone is written with the deletion of the job (or late result) that named the artifact,
and is removed after the artifact is gone. An artifact that does not exist counts as deleted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

import structlog
from msgspec import Struct
from msgspec.structs import replace

from jobd.engine.clock import Clock, loop_time
from jobd.maintenance.stoppable_loop import StoppableLoop
from jobd.model.clocks import MonotonicS
from jobd.model.events import Event
from jobd.model.job import MINUTE_MS, SECOND_MS
from jobd.model.journal import JournalOutcomeUnknown, LeadershipLost
from jobd.model.storage import MAX_POSTPONE_MS, CannotWrite, JobStorage, Tombstone
from jobd.model.times import duration
from jobd.storage.artifacts.base import MARGINS, ArtifactStore, ArtifactStoreError, Deletion, Margins, Verdict, judge

log = structlog.get_logger("jobd.artifacts")

SLICE: Final = 20
PAUSE_S: Final = 0.01  # between slices, so that workers get the disk
POLL_S: Final = 3.0  # while tombstones wait that are not due yet
CALL_TIMEOUT_S: Final = 10.0  # per artifact
RETRY_MS: Final = 2 * SECOND_MS  # after the first failure; doubles each time
MAX_RETRY_MS: Final = 10 * MINUTE_MS
DEGRADED_AFTER_S: Final = 300.0
MAX_FAILING: Final = 1_000  # failing tombstones whose first failure is remembered
# Keys of `_failing` that are not tombstone numbers: unreadable tombstones, and the database.
DAMAGED: Final = "damaged"
STORE: Final = "store"


class SweepStats(Struct):
    """Waiting tombstones, and counters since the process started."""

    waiting: int = 0
    deleted: int = 0
    kept: int = 0  # because another job uses the artifact
    failures: int = 0
    behind_ms: int = 0  # since the oldest due tombstone became due

    def expect(self, count: int) -> None:
        """Count new tombstones that were written to the disk."""
        self.waiting += count


class SweepResult(Struct, frozen=True):
    """The result of processing one tombstone. `error` is a sentence."""

    tombstone: Tombstone
    outcome: Deletion | None
    error: str = ""


class ArtifactSweeper(StoppableLoop):
    """Sweeps from `run` until `stop`. `expect` counts new tombstones and wakes it. Call `committed` with every commit.

    `check` raises an error if another node may lead, whose jobs the tables of this one lack. Nothing is deleted then.
    """

    def __init__(
        self,
        storage: JobStorage,
        artifacts: ArtifactStore,
        clock: Clock,
        stats: SweepStats,
        margins: Margins = MARGINS,
        *,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.stats = stats
        self._storage = storage
        self._artifacts = artifacts
        self._clock = clock
        self._margins = margins
        self._check = check
        self._newly_named: set[str] | None = None  # keys that jobs have named since the slice began
        # Tombstone number -> loop time of its first failure, latest error.
        self._failing: dict[int | str, tuple[MonotonicS, str]] = {}

    async def run(self) -> None:
        """Sweep until `stop`, which lets the current slice finish. Log errors and continue."""
        while not self._stopping:
            pause_s = POLL_S
            try:
                self._newly_named = set()
                if await self._slice():
                    pause_s = PAUSE_S
            except (CannotWrite, LeadershipLost, JournalOutcomeUnknown) as error:
                log.warning("artifact_sweep_waits", reason=str(error))
            except Exception as error:
                self._record_exception(error)
            else:
                self._failing.pop(STORE, None)
            self._newly_named = None
            has_work = self.stats.waiting > 0 or self._failing or pause_s < POLL_S
            await self._pause(pause_s if has_work else None)

    def expect(self, count: int) -> None:
        """Count new tombstones, and sweep."""
        self.stats.expect(count)
        self._wake.set()

    def committed(self, changes: Sequence[Event]) -> None:
        """Note the keys that committed changes name, because a slice has read those of earlier ones."""
        if self._newly_named is None:
            return
        for change in changes:
            for named_by in (change.after, change.late):
                if named_by is not None and named_by.result is not None and named_by.result.storage_key is not None:
                    self._newly_named.add(named_by.result.storage_key)

    def degraded_reason(self) -> str | None:
        """Return why artifacts are not deleted in time, as a sentence, or None."""
        if not self._failing:
            return None
        since, why = min(self._failing.values())
        failing_s = loop_time() - since
        if failing_s < DEGRADED_AFTER_S:
            return None
        is_counted = self._failing.keys().isdisjoint((STORE, DAMAGED))
        artifacts = f"{len(self._failing)} artifacts of deleted jobs" if is_counted else "Artifacts of deleted jobs"
        return f"{artifacts} cannot be deleted, the first for {duration(failing_s * 1000)}: {why}"

    # -- slices --------------------------------------------------------------------------------------------------------

    async def _slice(self) -> bool:
        """Process the due tombstones. Return whether more can be processed at once."""
        at = self._clock.moment()
        if at.suspect:
            return False  # as with deletion by age, nothing is deleted until the clock is trusted
        now = at.now
        self._check()
        due = await self._storage.due_tombstones(now, SLICE)
        self._check()
        self.stats.waiting -= due.damaged
        self.stats.behind_ms = max((now - each.due_at for each, _ in due.found), default=0)
        self._record_unmoved(due.unmoved)
        # If only a late result names a key, the artifact stays until that result is deleted.
        held = {each.job_seq for each, named in due.found if not named} & due.held
        young = Deletion("young", modified_at=now)
        results = [SweepResult(each, young) for each, _ in due.found if each.job_seq in held]
        free = [each for each in due.found if each[0].job_seq not in held]
        results += await asyncio.gather(*(self._try(*each, now) for each in free))
        finished = [
            each.tombstone.job_seq for each in results if each.outcome is not None and each.outcome.what != "young"
        ]
        later = [self._postpone(each, now) for each in results if each.tombstone.job_seq not in finished]
        if results:
            await self._storage.update_tombstones(finished, later)
        self.stats.waiting -= len(finished)
        for result in results:
            self._record(result)
        if len(results) < SLICE:
            self.stats.behind_ms = 0
        return len(results) == SLICE and not all(each.error for each in results)

    async def _try(self, tombstone: Tombstone, named: bool, now: int) -> SweepResult:
        """Delete one artifact, unless a job names its key. The store is called anyway: it cleans up after a crash."""
        newly_named = self._newly_named
        assert newly_named is not None

        def decide(modified_at: int) -> Verdict:
            nonlocal named
            self._check()
            named = named or tombstone.key in newly_named
            return "leave" if named else judge(tombstone, self._margins, now, modified_at)

        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                outcome = await self._artifacts.delete(tombstone.key, decide)
            if named and outcome.what == "left" and outcome.modified_at:  # otherwise the store has a reason of its own
                outcome = replace(outcome, why="another job names its key")
            return SweepResult(tombstone, outcome)
        except TimeoutError:
            return SweepResult(tombstone, None, f"{self._artifacts.place} has not responded for {CALL_TIMEOUT_S:g} s.")
        except (ArtifactStoreError, LeadershipLost, JournalOutcomeUnknown) as error:
            return SweepResult(tombstone, None, str(error))
        except Exception as error:
            log.exception("artifact_store_failed", key=tombstone.key)
            return SweepResult(tombstone, None, f"{self._artifacts.place}: {type(error).__name__}: {error}")

    def _postpone(self, result: SweepResult, now: int) -> Tombstone:
        """Return the tombstone with its next due time. An artifact that is too young is due when it is old enough."""
        tombstone, outcome = result.tombstone, result.outcome
        if outcome is not None:
            return replace(
                tombstone, due_at=min(outcome.modified_at + self._margins.young_ms, now + MAX_POSTPONE_MS), tries=0
            )
        wait_ms = min(RETRY_MS << min(tombstone.tries, 10), MAX_RETRY_MS)
        return replace(tombstone, due_at=now + wait_ms, tries=tombstone.tries + 1)

    def _record(self, result: SweepResult) -> None:
        tombstone, outcome = result.tombstone, result.outcome
        fields = {"job_id": tombstone.job_id, "key": tombstone.key}
        if outcome is None:
            self.stats.failures += 1
            self._record_failure(tombstone.job_seq, result.error)
            log.warning("artifact_not_deleted", **fields, attempts=tombstone.tries + 1, error=result.error)
            return
        self._failing.pop(tombstone.job_seq, None)
        if outcome.what == "deleted":
            self.stats.deleted += 1
            log.debug("artifact_deleted", **fields)
        elif outcome.what == "left":
            self.stats.kept += 1
            log.info("artifact_left", **fields, reason=outcome.why)

    def _record_unmoved(self, count: int) -> None:
        """Record damaged tombstones that could not be quarantined."""
        if count:
            self._record_failure(DAMAGED, f"{count} damaged tombstones cannot be quarantined; run: jobd doctor")
        else:
            self._failing.pop(DAMAGED, None)

    def _record_exception(self, error: Exception) -> None:
        """Record a storage error or an internal error. Log the traceback the first time only."""
        self.stats.failures += 1
        log.warning(
            "artifact_sweep_failed", error=f"{type(error).__name__}: {error}", exc_info=STORE not in self._failing
        )
        self._record_failure(STORE, f"the job store failed: {error}")

    def _record_failure(self, what: int | str, why: str) -> None:
        since = self._failing[what][0] if what in self._failing else loop_time()
        if what in self._failing or len(self._failing) < MAX_FAILING:
            self._failing[what] = since, why
