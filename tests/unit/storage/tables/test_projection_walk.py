"""Random walks over a store: batches, slices, kills, full disks, damaged rows and backups, compared with a model.

The model is the batches folded in memory (tests/support/memory_tables.py).
"""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from random import Random

import pytest

from jobd.model.job import LIVE
from jobd.model.storage import BadRows, DiskFull, OpenedStore
from jobd.storage import queries, startup
from jobd.storage.backup import finish_copy
from jobd.storage.startup import connect, start
from jobd.storage.tables import projection as projections
from tests.support.memory_tables import MemoryTables
from tests.support.projection_harness import EVERYTHING, Writer, content_of, differences, fail_commits
from tests.support.store_files import remove_quarantined

ACTIONS = {
    "write": 8,
    "project": 1,
    "kill": 2,
    "fill the disk": 1,
    "fail an append": 1,
    "damage a row": 1,
    "clear the cache of rows": 1,
    "load a job": 1,
    "back up": 1,
}


class Walk:
    def __init__(self, path: str, seed: int) -> None:
        self.path = path
        self.dice = Random(seed)
        self.writer = Writer(seed)
        self.damaged: set[int] = set()  # seqs of jobs whose damaged rows may be in their table
        found = self.open()
        self.writer.maker.numbers = self.writer.tables.numbers = found.numbers

    def open(self) -> OpenedStore:
        self.conn = connect(self.path, "FULL")
        self.projection, found = start(self.conn, self.path)
        self.reported = 0
        return found

    def act(self, action: str) -> None:
        match action:
            case "write":
                self._write()
            case "project":
                self.projection.project()
            case "kill":
                self.conn.close()
                assert not self.open().marked
            case "fill the disk" if not self.damaged:
                self._fill_disk()
            case "fail an append" if not self.damaged:
                self._fail_append()
            case "damage a row" if self.writer.maker.jobs:
                self._damage()
            case "clear the cache of rows":
                self.projection.db.on_rollback()
            case "load a job" if self.writer.maker.jobs:
                self._load()
            case "back up" if not self.damaged:
                self._back_up()
        self._forget_quarantined()
        if action not in ("write", "damage a row", "clear the cache of rows"):
            self.check()

    def _write(self) -> None:
        undo = self.writer.maker.snapshot()
        batch = self.writer.batch()
        try:
            self.projection.append(batch, self.reported)
        except BadRows:  # its slice has quarantined a job that the batch changes
            undo()
        else:
            self.writer.tables.apply(batch)

    def _fill_disk(self) -> None:
        fail_commits(self.projection, sqlite3.SQLITE_FULL)
        if self.projection.behind:
            with pytest.raises(DiskFull):
                self.projection.project()
        self.check()
        self.projection.db.before_commit = lambda: None

    def _fail_append(self) -> None:
        fail_commits(self.projection, sqlite3.SQLITE_FULL)
        undo = self.writer.maker.snapshot()
        with pytest.raises(DiskFull):
            self.projection.append(self.writer.batch(), self.reported)
        undo()
        self.projection.db.before_commit = lambda: None

    def _damage(self) -> None:
        self.projection.project()
        self._forget_quarantined()
        if jobs := list(self.writer.maker.jobs):
            seq = self.dice.choice(jobs)
            self.damaged.add(seq)
            self.conn.execute("UPDATE jobs SET created_at = created_at + 1 WHERE seq = ?", (seq,))

    def _load(self) -> None:
        """Load a job as the store does."""
        db, job = self.projection.db, self.dice.choice(list(self.writer.maker.jobs.values()))
        if self.projection.touches([job.id], [], []):
            loaded = self.projection.read(queries.load, db, [job.id], [], [])
        else:
            loaded = queries.load(db, [job.id], [], [])
        assert loaded.jobs == ({} if loaded.bad else {job.id: job})

    def _back_up(self) -> None:
        """Copy the files at one moment, and open the copy."""
        copy = f"{self.path}-copy"
        for suffix in ("", "-wal"):
            shutil.copy(self.path + suffix, copy + suffix)
        Path(f"{copy}.epoch").unlink(missing_ok=True)
        finish_copy(copy)
        conn = connect(copy, "FULL")
        projection, found = start(conn, copy)
        tables = content_of(projection.db, found)
        conn.close()
        assert (found.marked, found.numbers.epoch > self.writer.tables.numbers.epoch) == (True, True)
        tables.marked, tables.numbers = False, self.writer.tables.numbers
        assert self._differences(tables) == []

    def _forget_quarantined(self) -> None:
        """Remove the jobs that were quarantined since the last call from the model, as the actor does."""
        db, maker = self.projection.db, self.writer.maker
        jobs = {job.id: job for job in maker.jobs.values()}
        for number in range(self.reported, db.quarantined_count):
            aside = db.recently_quarantined[number]
            assert aside.is_moved
            if (job := jobs.get(aside.id)) is not None:
                assert aside.uncounted == (None if job.status in LIVE else (job.options.queue, job.status))
        self.reported = db.quarantined_count
        for job in [jobs[job_id] for job_id in db.quarantined if job_id in jobs]:
            remove_quarantined(maker, job)
            self.writer.tables.remove(job.seq)
            self.damaged.discard(job.seq)

    def check(self) -> None:
        """Compare what a read has with the model, and the totals with a recount."""
        db = self.projection.db
        self.projection.read(queries.find_jobs, db, EVERYTHING)  # quarantines the damaged rows
        self._forget_quarantined()
        assert self._differences(self.projection.read(lambda: content_of(db, startup._read_all(db)))) == []
        if not self.projection.behind:
            live, live_xor, finished, finished_xor = 0, 0, 0, 0
            for status, crc in self.conn.execute("SELECT status, crc FROM jobs NOT INDEXED"):
                if status in LIVE:
                    live, live_xor = live + 1, live_xor ^ crc
                else:
                    finished, finished_xor = finished + 1, finished_xor ^ crc
            assert db.totals == (live, live_xor, finished, finished_xor)

    def _differences(self, tables: MemoryTables) -> list[str]:
        expected = self.writer.tables
        expected.queues = dict(self.writer.maker.queues)
        expected.late_results = {seq: kept for seq, kept in expected.late_results.items() if seq in expected.jobs}
        # A job whose row was found damaged when its deletion was written is in quarantine instead.
        tables.deleted |= {
            seq: at for seq, at in expected.deleted.items() if seq not in tables.deleted and self._is_aside(seq)
        }
        return differences(expected, tables)

    def _is_aside(self, seq: int) -> bool:
        return bool(self.conn.execute("SELECT 1 FROM quarantined_jobs WHERE seq = ?", (seq,)).fetchone())


@pytest.mark.parametrize("seed", range(8))
def test_a_store_has_what_was_written(path: str, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(projections, "SLICE_EVENTS", 10)
    monkeypatch.setattr(projections, "BATCHES_PER_SLICE", 0)
    monkeypatch.setattr(projections, "MAX_BEHIND", 25 if seed % 2 else 30_000)
    walk = Walk(path, seed)
    for action in walk.dice.choices(list(ACTIONS), list(ACTIONS.values()), k=60):
        walk.act(action)
    walk.act("kill")
    walk.conn.close()
