"""The records that simulated daemons append, written into the tables of a real store."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random

import pytest

from jobd.journal import record
from jobd.journal.memory import MemoryJournal
from jobd.model.journal import Record
from jobd.storage.startup import connect, start
from tests.proof.simulation.loop import SimLoop
from tests.proof.simulation.run import run_machine
from tests.proof.simulation.trace import Trace
from tests.support.memory_tables import MemoryTables
from tests.support.projection_harness import content_of, differences

WITHOUT = frozenset({"restore", "rot"})  # a restored disk has older numbers, and damage is not in the records
SKIPPED = ("audited", "marked")  # parts of one action are merged; a new epoch file marks the store


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(100, 103))
def test_a_real_store_has_the_rows_of_a_simulated_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    records: list[Record] = []
    append = MemoryJournal.append

    def note(self: MemoryJournal, made: Record) -> None:
        append(self, made)
        records.append(made)

    monkeypatch.setattr(MemoryJournal, "append", note)
    loop = SimLoop(Random(f"{seed}: loop"))
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        machine = runner.run(run_machine(seed, 300, loop, Trace(keep_lines=False), WITHOUT))
    assert machine.monitor.first is None
    path, dice, expected = str(tmp_path / "jobd.db"), Random(seed), MemoryTables()
    compared = 0
    while True:
        conn = connect(path, "FULL")
        projection, found = start(conn, path)
        for made in records[compared : projection.last]:
            expected.apply(record.decode(made)[0])
        compared = projection.last
        tables = content_of(projection.db, found)
        tables.numbers = expected.numbers
        assert [line for line in differences(expected, tables) if not line.startswith(SKIPPED)] == []
        if compared == len(records):
            break
        for made in records[compared : compared + dice.randrange(1, 200)]:
            projection.journal.append(made)
        conn.close()  # a kill
    conn.close()
    for name in ("jobs", "payloads", "queues", "keys", "suspects"):  # cleanup deletes other rows past the journal
        assert getattr(expected, name) == getattr(machine.disk, name)
