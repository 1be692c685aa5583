"""Apply committed batches to a state, so that a standby has the state of its leader in memory.

The batches are as decoded: their changes have events and no rows.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from jobd.core.state import State
from jobd.model.events import QUIET, Event, fold, fold_quiet
from jobd.model.job import FINISHED, Job
from jobd.model.schedules import fold_schedule, schedule_id
from jobd.model.storage import Batch


def rows_needed(state: State, batch: Batch) -> list[str]:
    """Return the ids of the finished jobs that `batch` changes and memory does not hold."""
    ids = {}
    for event in batch.changes:
        if event.from_status in FINISHED and event.changes is not None:
            ids[event.job_id] = event.from_status
    return [job_id for job_id in ids if state.get(job_id) is None and job_id not in state.quarantined]


def apply(state: State, batch: Batch, loaded: Iterable[Job] = ()) -> None:
    """Apply `batch`. `loaded` has the rows before it that `rows_needed` names.

    Raises LookupError if a row is missing and not in quarantine.
    """
    for job in loaded:
        state.finished.keep(job)
    numbers = batch.numbers
    state.advance(numbers.wall_ms, numbers.lock_ms)
    for event in batch.changes:
        if event.job_seq:
            _apply_change(state, event)
        elif event.type in QUIET:
            state.set_quiet(fold_quiet(state.quiet, event))
        if (name := schedule_id(event)) is not None:
            state.set_schedule(name, fold_schedule(state.schedules.get(name), event))
    for seq in batch.checked:
        state.unvalidated.pop(seq, None)
    for name, row in batch.queues.items():
        if row.pause != state.paused.get(name):
            state.set_paused(name, row.pause)
    state.epoch, state.next_token = numbers.epoch, numbers.next_token
    state.next_job, state.next_event = numbers.next_job, numbers.next_event
    state.clock = numbers.clock
    state.finished.trim()


def _apply_change(state: State, event: Event) -> None:
    if event.type == "imported":
        state.unvalidated[event.job_seq] = event.job_id
    elif event.type == "deleted":
        state.unvalidated.pop(event.job_seq, None)
    elif event.changes is None:
        return  # a late result or a late call
    if event.from_status is None:
        after = fold(None, event)
        assert after is not None
        state.reindex(None, replace(after, options=state.shared(after.options)))
    elif (before := state.get(event.job_id)) is not None:
        state.reindex(before, fold(before, event))
    elif event.job_id in state.quarantined:
        return
    elif event.type == "deleted":
        state.count_as((event.queue, event.from_status), -1)
    else:
        raise LookupError(f"event {event.seq} changes job {event.job_id}, which has no row")


def finish(state: State) -> None:
    """Make the state equal to one that was just opened: it knows workers that hold jobs, and grants are in order."""
    state.forget_workers()
    presence = state.presence
    for job_id, job in state.processing.items():
        if job.grant is not None and job.deadlines is not None:
            presence.add_job(job.grant.worker, job_id, job.updated_at)
            if not job.deadlines.is_live(presence.lock_ms):
                presence.set_expired(job.grant.worker, job_id, True)
    state.processing.order()
