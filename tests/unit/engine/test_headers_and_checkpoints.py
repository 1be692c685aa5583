"""Headers and checkpoints: in every grant, until the job is completed or reset."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec import UNSET, Raw

from jobd.model import commands as cmd
from jobd.model.job import CHECKPOINT_BYTES, HEADER_BYTES, Extra
from jobd.model.responses import JobView
from jobd.model.storage import FormatNotRead
from tests.support.virtual_engine import VirtualEngine, in_checked_engine, key, seconds

HEADERS = {"traceparent": "00-1"}
POINT = Raw(b'{"page": 7}')


async def granted(engine: VirtualEngine) -> tuple[JobView, str]:
    """Claim the job. Return it, and the lock id."""
    (grant,) = (await engine.yes(cmd.Claim(worker="w-1"))).grants
    return grant.job, grant.lock_id


async def shown(engine: VirtualEngine, lock_id: str, **fields: Any) -> Any:
    """Return the checkpoint that the next grant has after a progress report with these fields."""
    await engine.yes(cmd.Progress(id="a", lock_id=lock_id, progress=1, **fields))
    await engine.yes(cmd.Release(id="a", lock_id=lock_id, delay_ms=0))
    return (await granted(engine))[0].checkpoint


@in_checked_engine()
async def test_every_grant_has_headers_and_the_latest_checkpoint(engine: VirtualEngine) -> None:
    created = await engine.yes(cmd.Create(id="a", headers=HEADERS, max_attempts=5), key=key("k"))
    assert (created.headers, created.checkpoint) == (HEADERS, UNSET)
    assert (await engine.yes(cmd.Create(id="a", headers=HEADERS, max_attempts=5))).headers == HEADERS
    job, lock_id = await granted(engine)
    assert (job.headers, job.checkpoint) == (HEADERS, UNSET)
    await engine.yes(cmd.Progress(id="a", lock_id=lock_id, progress=1, checkpoint=Raw(b"1")))
    failed = await engine.yes(
        cmd.Fail(id="a", lock_id=lock_id, error_message="e", retry_after_ms=0, checkpoint=POINT), key=key("f")
    )
    assert failed.checkpoint == POINT
    job, lock_id = await granted(engine)
    assert (job.headers, job.checkpoint, job.checkpoint_value) == (HEADERS, POINT, {"page": 7})
    (listed,) = (await engine.yes(cmd.ListJobs())).jobs
    (exported,) = (await engine.yes(cmd.Export())).jobs
    assert (listed.headers, listed.checkpoint) == (exported.headers, exported.checkpoint) == (HEADERS, POINT)
    await engine.yes(cmd.Complete(id="a", lock_id=lock_id))
    done = await engine.yes(cmd.Get(id="a"))
    assert (done.headers, done.checkpoint, done.checkpoint_value) == (HEADERS, UNSET, None)
    await engine.yes(cmd.Delete(id="a"))
    assert engine.disk.payloads == {}


@in_checked_engine()
async def test_null_removes_a_checkpoint_and_a_report_without_one_keeps_it(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a"))
    _, lock_id = await granted(engine)
    assert await shown(engine, lock_id, checkpoint=POINT) == POINT
    assert await shown(engine, engine.state.processing["a"].grant.lock_id) == POINT  # type: ignore[union-attr]
    lock_id = engine.state.processing["a"].grant.lock_id  # type: ignore[union-attr]
    assert await shown(engine, lock_id, checkpoint=Raw(b"null")) is UNSET
    assert engine.state.processing["a"].extra is None


@pytest.mark.parametrize(("command", "kept"), [(cmd.RetryJob, POINT), (cmd.ForceReset, UNSET)])
@in_checked_engine()
async def test_only_a_force_reset_removes_the_checkpoint(engine: VirtualEngine, command: Any, kept: Any) -> None:
    await engine.yes(cmd.Create(id="a"))
    _, lock_id = await granted(engine)
    await engine.yes(cmd.Fail(id="a", lock_id=lock_id, error_message="e", checkpoint=POINT))
    await engine.yes(command(id="a"))
    assert (await granted(engine))[0].checkpoint == kept


@in_checked_engine()
async def test_an_exported_job_is_imported_with_headers_checkpoint_and_origin(engine: VirtualEngine) -> None:
    given = cmd.Import(id="a", headers=HEADERS, checkpoint=POINT, copied_from="old")
    await engine.yes(given)
    (exported,) = (await engine.yes(cmd.Export())).jobs
    await engine.yes(msgspec.structs.replace(exported, id="b"))
    job = await engine.yes(cmd.Get(id="b"))
    assert (job.headers, job.checkpoint, job.copied_from) == (HEADERS, POINT, "old")
    assert (await engine.yes(cmd.ImportCheck(id="z", headers=HEADERS))).status == "queued"
    assert "z" not in engine.state.jobs
    await engine.yes(cmd.Import(id="c", copied_from="a"))
    assert engine.state.jobs["c"].extra == Extra(copied_from="a")


@in_checked_engine()
async def test_a_copy_has_options_headers_and_payload_and_no_checkpoint(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Import(id="a", queue="q", kind="k", headers=HEADERS, checkpoint=POINT, payload=Raw(b"[1]")))
    response = await engine.respond(cmd.Copy(id="a"), admin=True, key=key("c"))
    job = response.data
    assert (response.status, job.queue, job.kind, job.headers, job.copied_from) == (201, "q", "k", HEADERS, "a")
    assert (job.status, job.payload, job.checkpoint) == ("queued", Raw(b"[1]"), UNSET)
    again = await engine.yes(cmd.Copy(id=job.id, payload=Raw(b"2")))
    assert (again.payload, again.headers, again.copied_from) == (Raw(b"2"), HEADERS, job.id)
    engine.disk.older_node = "old"
    assert (await engine.no(cmd.Copy(id="a"))).code == "upgrade_incomplete"


@in_checked_engine()
async def test_headers_and_checkpoints_that_are_too_large_are_rejected(engine: VirtualEngine) -> None:
    headers = {"name": "ä" * (HEADER_BYTES // 2 - 1)}
    rejected = await engine.no(cmd.Create(headers=headers))
    assert (rejected.code, rejected.details) == ("invalid_request", {"field": "$.headers"})
    assert f"have {HEADER_BYTES + 2} bytes" in rejected.message
    await engine.yes(cmd.Create(headers={"n": headers["name"] + "x"}))
    lock_id = await engine.held()
    large = Raw(b'"%s"' % (b"x" * CHECKPOINT_BYTES))
    rejected = await engine.no(cmd.Fail(id="a", lock_id=lock_id, error_message="e", checkpoint=large))
    assert (rejected.code, rejected.details) == ("invalid_request", {"field": "$.checkpoint"})
    largest = Raw(b'"%s"' % (b"x" * (CHECKPOINT_BYTES - 2)))
    await engine.yes(cmd.Fail(id="a", lock_id=lock_id, error_message="e", checkpoint=largest))


@in_checked_engine()
async def test_nothing_is_changed_while_a_node_does_not_read_the_format(engine: VirtualEngine) -> None:
    lock_id = await engine.held()
    engine.disk.older_node = "old"
    count = len(engine.disk.batches)
    for command in (
        cmd.Create(headers=HEADERS),
        cmd.Bulk(jobs=[cmd.Create(), cmd.Create(headers=HEADERS)]),
        cmd.Progress(id="a", lock_id=lock_id, progress=1, checkpoint=POINT),
        cmd.Fail(id="a", lock_id=lock_id, error_message="e", checkpoint=POINT),
        cmd.Import(id="c", copied_from="a"),
    ):
        rejected = await engine.no(command)
        assert (rejected.code, rejected.details["node"]) == ("upgrade_incomplete", "old")
    assert len(engine.disk.batches) == count
    await engine.yes(cmd.Create(headers={}))
    await engine.yes(cmd.Progress(id="a", lock_id=lock_id, progress=1))


@in_checked_engine()
async def test_a_node_that_registers_between_decision_and_write_is_named(engine: VirtualEngine) -> None:
    class Registers(FormatNotRead):
        def __init__(self) -> None:
            engine.disk.older_node = "old"

    task = await engine.writing(cmd.Create(headers=HEADERS))
    engine.disk.write_errors.append(Registers())
    engine.disk.gate.set()
    await seconds(1)
    assert (await task).code == "upgrade_incomplete"
