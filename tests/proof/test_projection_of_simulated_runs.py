"""The records that simulated daemons append, written into the tables of a real store and applied to a state."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random

import pytest

from jobd.core import replay
from jobd.core.state import State
from jobd.journal import record
from jobd.model.journal import Record
from jobd.model.storage import OpenedStore
from jobd.storage.startup import connect, start
from tests.proof.simulation.loop import SimLoop
from tests.proof.simulation.run import run_machine
from tests.proof.simulation.trace import Trace
from tests.support.memory_journal import MemoryJournal
from tests.support.memory_tables import MemoryTables
from tests.support.projection_harness import content_of, differences
from tests.support.rule_harness import snapshot

WITHOUT = frozenset({"restore", "rot"})  # a restored disk has older numbers, and damage is not in the records
SKIPPED = ("audited", "marked")  # parts of one action are merged; a new epoch file marks the store


def _check_state(warm: State, opened: State, found: OpenedStore) -> None:
    """Compare a state that followed the records with one that was read from the tables."""
    opened.unvalidated = dict(found.unvalidated)
    for state in (warm, opened):
        state.finished.clear()
        state.advance(found.numbers.wall_ms, found.numbers.lock_ms)
    replay.finish(warm)
    warm.epoch, warm.next_token = opened.epoch, opened.next_token  # each start begins an epoch
    warm.next_event = opened.next_event
    assert snapshot(warm) == snapshot(opened)
    assert list(warm.processing) == list(opened.processing)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("seed", "cluster"), [(100, False), (101, False), (102, False), (3, True), (5, True)])
def test_a_real_store_has_the_rows_of_a_simulated_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, cluster: bool
) -> None:
    records: list[Record] = []
    append = MemoryJournal.append

    def note(self: MemoryJournal, made: Record) -> None:
        append(self, made)
        records.append(made)

    monkeypatch.setattr(MemoryJournal, "append", note)
    loop = SimLoop(Random(f"{seed}: loop"))
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        machine = runner.run(run_machine(seed, 300, loop, Trace(keep_lines=False), WITHOUT, cluster=cluster))
    assert machine.monitor.first is None
    path, dice, expected = str(tmp_path / "jobd.db"), Random(seed), MemoryTables()
    compared, warm = 0, State()
    while True:
        conn = connect(path, "FULL")
        projection, found = start(conn, path)
        for made in records[compared : projection.last]:
            batch = record.decode(made)[0]
            rows = [job for job_id in replay.rows_needed(warm, batch) if (job := expected.job(job_id)) is not None]
            replay.apply(warm, batch, rows)
            expected.apply(batch)
        compared = projection.last
        tables = content_of(projection.db, found)
        tables.numbers = expected.numbers
        assert [line for line in differences(expected, tables) if not line.startswith(SKIPPED)] == []
        _check_state(warm, State.opened(found), found)
        if compared == len(records):
            break
        for made in records[compared : compared + dice.randrange(1, 200)]:
            projection.journal.append(made)
        conn.close()  # a kill
    conn.close()
    for name in ("jobs", "payloads", "queues", "keys", "unvalidated", "events", "deleted", "tombstones", "figures"):
        assert getattr(expected, name) == getattr(machine.disk, name)
