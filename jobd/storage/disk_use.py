"""Tell what the disk of a store holds: its files exactly, and from a sample what the jobs of each kind take.

The sample reads some rows at places that are spread over the row numbers. Each row stands for as many others as the
gaps between the row numbers suggest. It blocks the storage thread for about a millisecond at a time.
"""

from __future__ import annotations

import os
import sqlite3
import time
from typing import Final

import msgspec
from msgspec import Raw, Struct
from msgspec.structs import replace

from jobd.model.responses import DiskUse, StoredKind
from jobd.storage.connection import page_bytes, read_number
from jobd.storage.database import Database, is_corrupt
from jobd.storage.files import log_of
from jobd.storage.startup import MEMORY

PLACES: Final = 200
ROWS: Final = 20  # at each place
SLICE_S: Final = 0.0004  # after which no further place begins
PLACE_S: Final = 0.0006  # after which a place ends early, as one with few rows makes the estimate worse
MAX_KINDS: Final = 100
_SPREAD: Final = 0.618034  # the golden ratio, so that no period of the row numbers decides which rows are read
_SAMPLE: Final = (
    "SELECT seq, queue, kind, CAST(body AS BLOB), length(id) + length(queue) + length(kind) + "
    "ifnull(length(error_message), 0) + ifnull(length(worker), 0) + ifnull(length(storage_key), 0), "
    "ifnull((SELECT length(body) FROM payloads WHERE job_seq = jobs.seq), 0), "
    "ifnull((SELECT sum(length(body)) FROM events INDEXED BY events_job WHERE job_seq = jobs.seq), 0) "
    "FROM jobs NOT INDEXED WHERE seq >= ? AND seq < ? ORDER BY seq LIMIT ?"
)


class _Result(Struct):
    metadata: Raw = Raw()


_decode_result: Final = msgspec.json.Decoder(_Result).decode


class Sample(Struct):
    """A sample in progress: the next place, and per queue and kind the rows that it stands for and their bytes."""

    place: int = 0
    jobs_read: int = 0
    kinds: dict[tuple[str, str], list[float]] = {}  # jobs, and bytes of rows, payloads, results and events


def read_slice(db: Database, sample: Sample) -> bool:
    """Read the next places for about a millisecond. Return whether there are more."""
    db.check()
    until_s = time.perf_counter() + SLICE_S
    first, last = db.rows("SELECT (SELECT min(seq) FROM jobs), (SELECT max(seq) FROM jobs)")[0]
    while sample.place < PLACES and first is not None:
        begin, end = (first + (last + 1 - first) * place // PLACES for place in (sample.place, sample.place + 1))
        sample.place += 1
        try:
            _read_place(db, sample, begin, end)
        except sqlite3.DatabaseError as error:
            if not is_corrupt(error):
                raise  # damaged rows are reported by the code that uses them
        if time.perf_counter() >= until_s:
            return sample.place < PLACES
    return False


def _read_place(db: Database, sample: Sample, begin: int, end: int) -> None:
    """Read some rows with numbers from `begin` up to `end`: the first ones if there are few jobs in the store."""
    spare = max(end - begin - ROWS, 0) if db.totals[0] + db.totals[2] > PLACES * ROWS else 0
    start = begin + int(spare * (sample.place * _SPREAD % 1))
    rows, span = [], end - start
    until_s = time.perf_counter() + PLACE_S
    cursor = db.conn.execute(_SAMPLE, (start, end, ROWS))
    for row in cursor:
        rows.append(row)
        if len(rows) == ROWS or time.perf_counter() > until_s:
            span = row[0] + 1 - start
            break
    cursor.close()
    sample.jobs_read += len(rows)
    for _, queue, kind, body, record_bytes, payload_bytes, event_bytes in rows:
        result_bytes = _result_bytes(body)
        sizes = (1, record_bytes + len(body) - result_bytes, payload_bytes, result_bytes, event_bytes)
        sums = sample.kinds.setdefault((queue, kind), [0.0] * len(sizes))
        for index, size in enumerate(sizes):
            sums[index] += size * (end - begin) / span


def _result_bytes(body: bytes) -> int:
    try:
        return len(_decode_result(body).metadata)
    except msgspec.MsgspecError:
        return 0


def report(db: Database, path: str, sample: Sample, now: int) -> DiskUse:
    """Return the sizes of the files at `path` and the result of a finished sample."""
    db.check()
    used_bytes, free_bytes = page_bytes(db.conn)
    tail_bytes = read_number(db.conn, "SELECT ifnull(sum(length(body)), 0) FROM journal")
    scale = (db.totals[0] + db.totals[2]) / (sum(sums[0] for sums in sample.kinds.values()) or 1)
    kinds = [
        StoredKind(queue, kind, *(round(each * scale) for each in (count, sum(sizes), *sizes)))
        for (queue, kind), (count, *sizes) in sample.kinds.items()
    ]
    kinds.sort(key=lambda each: -each.bytes)
    use = DiskUse(
        path=path,
        database_bytes=used_bytes,
        free_page_bytes=free_bytes,
        tail_bytes=tail_bytes,
        kinds=kinds[:MAX_KINDS],
        more_kinds=max(len(kinds) - MAX_KINDS, 0),
        other_bytes=max(used_bytes - tail_bytes - sum(each.bytes for each in kinds), 0),
        jobs_read=sample.jobs_read,
        measured_at=now,
    )
    return use if path == MEMORY else _with_files(use, os.path.abspath(path))


def _with_files(use: DiskUse, path: str) -> DiskUse:
    """Add the sizes of the files whose names begin with that of the store, and of the rest of the disk."""
    sizes: dict[str, int] = {}
    for entry in os.scandir(os.path.dirname(path)):
        if entry.name.startswith(os.path.basename(path)) and entry.is_file():
            sizes[entry.path] = entry.stat().st_blocks * 512
    disk = os.statvfs(path)
    total_bytes, unused = disk.f_blocks * disk.f_frsize, disk.f_bfree * disk.f_frsize
    wal_bytes = sizes.get(log_of(path), 0)
    return replace(
        use,
        path=path,
        total_bytes=total_bytes,
        free_bytes=disk.f_bavail * disk.f_frsize,
        wal_bytes=wal_bytes,
        side_bytes=sum(sizes.values()) - sizes.get(path, 0) - wal_bytes,
        not_jobd_bytes=max(total_bytes - unused - sum(sizes.values()), 0),
    )
