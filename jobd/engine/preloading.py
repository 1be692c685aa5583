"""Read what the decisions of a batch need and memory does not hold: finished jobs, stored responses, some payloads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from jobd.core.rules.late_result_rules import late_results_needed
from jobd.core.state import State
from jobd.engine.envelope import Envelope
from jobd.engine.idempotency import IdempotencyStore
from jobd.model.commands import Claim, Create
from jobd.model.job import Policy, extra_keys, headers_key
from jobd.model.storage import JobStorage, LateResultRows, Payload, StoredResponse


class Preloaded(Struct):
    """What was read from the disk for the decisions of one batch."""

    responses: dict[str, StoredResponse] = field(default_factory=dict)  # digest -> a response that may be replayed
    requests: dict[str, Payload] = field(default_factory=dict)  # by job id
    payloads: dict[int, bytes] = field(default_factory=dict)  # bodies by key
    late: LateResultRows = field(default_factory=LateResultRows)


def needs_no_read(batch: list[Envelope], state: State) -> bool:
    """Return whether memory has all that the decisions need: the commands name no job, or come from holders."""
    return all(envelope.key is None and _is_in_memory(envelope.command, state) for envelope in batch)


def _is_in_memory(command: Any, state: State) -> bool:
    if command.is_of_holder:
        return state.holds(command.id, command.lock_id)
    kind = type(command)
    return kind is Claim or (kind is Create and command.id is None)


async def preload(
    batch: list[Envelope],
    state: State,
    disk: JobStorage,
    keys: IdempotencyStore,
    policy: Policy,
    *,
    before_read: Callable[[], None],
) -> Preloaded:
    """Read what the decisions of `batch` need. `before_read` is called before each read."""
    known = Preloaded()
    naming = [(envelope, ids) for envelope in batch if (ids := envelope.command.job_ids())]
    named = dict.fromkeys(job_id for _, ids in naming for job_id in ids)
    unknown = [job_id for job_id in named if state.get(job_id) is None and job_id not in state.quarantined]
    digests = [envelope.key.digest for envelope in batch if envelope.key is not None]
    stored = [digest for digest in digests if keys.is_stored(digest)]
    if unknown or stored:
        before_read()
        loaded = await disk.load(unknown, [], stored)
        known.responses = loaded.responses
        for finished in loaded.jobs.values():
            state.finished.keep(finished)
    deletable = {job_id for envelope, _ in naming for job_id in envelope.command.deleted_ids()}
    firsts = [ids for envelope, ids in naming if _needs_payload_first(envelope, deletable)]
    jobs = [job for ids in firsts for job_id in ids if (job := state.get(job_id)) is not None]
    if jobs:
        before_read()
        wanted = {key: job.id for job in jobs for key in (job.seq, *extra_keys(job))}
        loaded = await disk.load([], list(wanted), [])
        known.payloads = {key: payload.body for key, payload in loaded.payloads.items()}
        known.requests = {wanted[key]: payload for key, payload in loaded.payloads.items() if key >= 0}
        for job in jobs:
            if (headers := known.payloads.get(headers_key(job.seq))) is not None and job.id in known.requests:
                known.requests[job.id] = replace(known.requests[job.id], headers=headers)
    asks = {late_results_needed(state, envelope.command, policy): None for envelope, _ in naming}
    late = [each for each in asks if each is not None]
    if late:
        before_read()
        known.late = await disk.read_late_results(sorted(late, key=lambda each: each.with_results))
    return known


def _needs_payload_first(envelope: Envelope, deletable: set[str]) -> bool:
    """Return whether the payload or request hash of the job is read before the decision.

    The decision needs it, or the job may be deleted in this batch (`deletable`) before the response shows it.
    """
    command: Any = envelope.command
    if command.needs_payload:
        return True
    return command.is_of_job and (command.id in deletable or (envelope.key is not None and command.stores_job))
