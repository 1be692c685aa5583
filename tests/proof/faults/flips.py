"""Flip single bits of a closed store, all over its files: no wrong data is ever served.

The expected result does not depend on the position of the bit, only on what is missing or wrong.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
from msgspec.structs import replace

from jobd.model.storage import JobQuery
from jobd.storage import store_file
from jobd.storage.files import StoreError
from jobd.storage.offline import doctor
from jobd.storage.store import Store
from tests.proof.faults.harness import Counts, Trial, check
from tests.proof.faults.ledger import Ledger
from tests.proof.faults.load import load
from tests.proof.faults.store_check import StoreContents, contents
from tests.support.daemon_process import DaemonProcess, call

PAGE: Final = 4096
KINDS: Final = {2: "index branches", 5: "table branches", 10: "index leaves", 13: "table leaves"}
BY_DAEMON: Final = 100  # one of this many flips is tested with a daemon, all with the store
RESUMED: Final = 20  # events between the positions where readers of the feed resume
EXIT_CODES: Final = (74, 78)


Where = Literal["database", "log", "journal"]


class OriginalStore:
    """The files and contents of a store as the daemon left it.

    For flips in the log or in the journal, the daemon was killed. For the journal, the log was then checkpointed.
    """

    def __init__(self, trial: Trial, where: Where) -> None:
        home = trial.directory / "original"
        home.mkdir()
        ledger = Ledger()
        with DaemonProcess(home) as daemon:
            for number in range(3 if trial.timed else 1):
                with load(daemon, ledger, f"load-{number}", 80):
                    pass
            _write_unusual_rows(daemon)
            if where == "database":
                assert daemon.stop() == 0
            else:
                _kill_with_tail(daemon)
        self.path = home / "jobd.db"
        if where == "journal":
            with closing(sqlite3.connect(self.path)) as conn:
                conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.contents = contents(self.path)
        self.files = {
            suffix: Path(f"{self.path}{suffix}").read_bytes()
            for suffix in ("", "-wal", ".epoch")
            if Path(f"{self.path}{suffix}").exists()
        }

    def write_flipped(self, directory: Path, suffix: str, at: int, bit: int) -> Path:
        """Write the store to `place` with one bit flipped."""
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        for each, content in self.files.items():
            text = bytearray(content)
            if each == suffix:
                text[at] ^= 1 << bit
            file = directory / f"jobd.db{each}"
            file.write_bytes(text)
            file.chmod(0o600)
        return directory / "jobd.db"


def _kill_with_tail(daemon: DaemonProcess) -> None:
    """Kill the daemon before it has written its latest batches into the tables."""
    for number in range(10):
        for each in range(10):
            assert daemon.post("/v1/jobs", {"id": f"last-{number}-{each}"}).status == 201
        daemon.kill()
        with store_file.read_only(str(daemon.store)) as conn:
            if conn.execute("SELECT count(*) FROM journal").fetchone() != (0,):
                return
        daemon.start()
    raise AssertionError("the tables had every batch at each kill")


def _write_unusual_rows(daemon: DaemonProcess) -> None:
    """Write rows of every other kind: long payloads, a result, a deleted job, a paused queue, a report, keys."""
    for number in range(4):
        job = {"id": f"odd-{number}", "queue": f"queue-{number}", "payload": "y" * (5000 * number), "priority": number}
        assert daemon.post("/v1/jobs", job, Idempotency_Key=f"key-{number}").status == 201
    lock = daemon.post("/v1/jobs/odd-1/start", {"worker": "w"}).data["lock_id"]
    for number in range(40):
        assert daemon.post("/v1/jobs/odd-1/progress", {"lock_id": lock, "progress": number}).status == 200
    done = {"lock_id": lock, "metadata": {"size": [1, 2]}, "storage_key": "a/b", "download_url": "https://x/y"}
    assert daemon.post("/v1/jobs/odd-1/complete", done).status == 200
    assert daemon.post("/v1/jobs/odd-2/cancel", {"reason": "no more"}).status == 200
    assert daemon.admin("DELETE", "jobs/odd-2").status == 200
    assert daemon.admin("POST", "queues/queue-3/pause", {}).status == 200
    assert daemon.admin("POST", "cleanup", {}).status == 200


# ---------------------------------------------------------------------------------------------------------------------
# What a store serves, compared with what was in it


async def _compare_store(path: Path, holds: StoreContents) -> tuple[str, bool, set[str]]:
    """Open the store. Return the result in a word, whether anything is missing, and the missing jobs."""
    try:
        store, opened = await Store.open(str(path))
    except StoreError as error:
        return "rejected" if str(path) in str(error) else f"rejected without naming the file: {error}", False, set()
    async with store:
        noticed = bool(opened.faults or opened.quarantined)
        loaded = await store.load(list(holds.jobs), [], [])
        assert loaded.jobs == {job_id: holds.jobs[job_id] for job_id in loaded.jobs}, "another job is served"
        for job in opened.live():
            assert holds.jobs[job.id] == job, "another live job is in memory"
        missing = {job_id for job_id in holds.jobs if job_id not in loaded.jobs and job_id not in loaded.bad}
        noticed |= bool(loaded.bad)
        lost = await _compare_payloads(store, holds, set(loaded.jobs)) or await _compare_pages(store, holds)
        lost = await _compare_feed(store, holds) or lost
        lost = await _compare_journals(store, holds, set(loaded.jobs)) or lost
        noticed |= bool(store.take_faults())
    return "detected" if noticed else "without effect", lost or bool(missing), missing


async def _compare_payloads(store: Store, holds: StoreContents, ids: set[str]) -> bool:
    seqs = {holds.jobs[job_id].seq: job_id for job_id in ids}
    loaded = await store.load([], list(seqs), [])
    for seq, payload in loaded.payloads.items():
        assert msgspec.json.decode(payload.body) == holds.payloads[seqs[seq]], f"{seqs[seq]} has another payload"
    return False  # a payload that is not served is in `bad`, which the check of the jobs covers


async def _compare_pages(store: Store, holds: StoreContents) -> bool:
    seen = 0
    query = JobQuery(limit=50)
    while True:
        page = await store.find_jobs(query)
        for job, body in page.jobs:
            assert holds.jobs[job.id] == job, f"{job.id} is another on a page"
            assert msgspec.json.decode(body) == holds.payloads[job.id], f"{job.id} has another payload on a page"
        seen += len(page.jobs)
        if page.next_before is None:
            return seen < len(holds.jobs)
        query = replace(query, before=page.next_before)


async def _compare_feed(store: Store, holds: StoreContents) -> bool:
    """Return whether a reader that resumes anywhere misses an event that it is not told about."""
    written = {event.seq: event for events in holds.events.values() for event in events}
    lost = False
    for after in (0, *sorted(written)[::RESUMED]):
        page = await store.events_after(after, len(written))
        for event in page.events:
            assert written.get(event.seq, event) == event, f"event {event.seq} is another in the feed"
        missing = {seq for seq in written if after < seq <= page.end} - {event.seq for event in page.events}
        lost = lost or any(seq > page.gone_to for seq in missing)
    return lost


async def _compare_journals(store: Store, holds: StoreContents, ids: set[str]) -> bool:
    lost = False
    for job_id in ids:
        written = {event.seq: event for event in holds.events[job_id]}
        served = await store.timeline(holds.jobs[job_id].seq)
        for event in served:
            assert written.get(event.seq) == event, f"{job_id} has another event in its journal"
        lost = lost or len(served) < len(written)
    return lost


def _doctor_reports(path: Path) -> bool:
    try:
        return bool(doctor.check(str(path)))
    except StoreError:
        return True


def _inspect(path: Path, holds: StoreContents) -> tuple[str, bool]:
    """Return the result of a flip in a word, and whether anything was missing. Fails if a response was wrong."""
    named = _doctor_reports(path)
    verdict, lost, missing = asyncio.run(_compare_store(path, holds))
    assert not lost or verdict == "detected" or named, f"missing and not reported: {missing or 'events'}"
    if verdict == "without effect" and named:
        verdict = "reported by the doctor"
    return verdict, lost


# ---------------------------------------------------------------------------------------------------------------------
# The same over HTTP


def _check_over_http(path: Path, responses: dict[str, Any]) -> None:
    """Check that each response equals the one before, or is an error about damage."""
    with DaemonProcess.not_started(path.parent) as daemon:
        daemon.launch()
        if not daemon.gets_ready():
            assert daemon.process.wait() in EXIT_CODES
            assert b"event=cannot_start" in daemon.log, daemon.log.decode()
            return
        missing = []
        with closing(daemon.worker()) as connection:
            for job_id, before in responses.items():
                reply = call(connection, "GET", f"/v1/jobs/{job_id}")
                if reply.status == 200:
                    assert _stable_fields(reply.data) == before, f"{job_id} is served as {reply.data}, it was {before}"
                elif reply.error != "job_quarantined":
                    assert reply.error == "job_not_found", reply.body
                    missing.append(job_id)
        assert not missing or b" level=error " in daemon.log, f"missing and not reported: {missing}"
        assert daemon.stop() == 0, daemon.log.decode()


def _stable_fields(job: dict[str, Any]) -> dict[str, Any]:
    """Return what a restart does not change: locks keep the time that they had left."""
    return {name: value for name, value in job.items() if name not in ("lock", "updated_at")}


def _read_jobs(trial: Trial, original: OriginalStore) -> dict[str, Any]:
    path = original.write_flipped(trial.directory / "whole", "none", 0, 0)
    with DaemonProcess(path.parent) as daemon:
        found = {job_id: _stable_fields(daemon.get(f"/v1/jobs/{job_id}").data) for job_id in original.contents.jobs}
        assert daemon.stop() == 0
    return found


# ---------------------------------------------------------------------------------------------------------------------


def flips(trial: Trial, where: Where) -> Counts:
    """Flip `trial.rounds` bits, evenly spread over the database, its journal or the log (see OriginalStore)."""
    original = OriginalStore(trial, where)
    suffix = "-wal" if where == "log" else ""
    content = original.files[suffix]
    places = _journal_bytes(original.path) if where == "journal" else range(len(content))
    responses = _read_jobs(trial, original)
    chance = random.Random(0)
    counts: Counter[str] = Counter({"flips": trial.rounds, "bytes": len(places), "jobs": len(original.contents.jobs)})
    last = LastTransaction(content) if where == "log" else None
    for number in range(trial.rounds):
        at = places[(number * len(places) + chance.randrange(len(places))) // trial.rounds]
        bit = chance.randrange(8)
        path = original.write_flipped(trial.directory / "flipped", suffix, at, bit)
        try:
            if last is not None and last.contains(at):
                counts["in the last transaction, indistinguishable from a torn write"] += 1
                continue
            verdict, lost = _inspect(path, original.contents)
            assert not verdict.startswith("rejected without"), verdict
            if number % BY_DAEMON == 0:
                path = original.write_flipped(trial.directory / "flipped", suffix, at, bit)
                _check_over_http(path, responses)
                counts["opened by a daemon"] += 1
        except Exception as error:
            raise AssertionError(f"bit {bit} of byte {at} of jobd.db{suffix}: {error!r}") from error
        counts[verdict] += 1
        counts["with missing rows, all reported"] += lost
        if where == "database":
            counts[f"in {_kind(content, at)}"] += 1
    return dict(counts)


def _journal_bytes(path: Path) -> Sequence[int]:
    """Return the places of the bytes of the table `journal`, which has a tail."""
    with closing(sqlite3.connect(path)) as conn:
        pages = conn.execute("SELECT pageno FROM dbstat WHERE name = 'journal' ORDER BY pageno").fetchall()
    return [at for (page,) in pages for at in range((page - 1) * PAGE, page * PAGE)]


def _kind(content: bytes, at: int) -> str:
    page = at // PAGE * PAGE
    if at < 100:
        return "the header"
    return KINDS.get(content[page + 100 if page == 0 else page], "overflow and free pages")


class LastTransaction:
    """The last transaction of a log. A crash may leave it incomplete, so damage to it cannot be detected."""

    FRAME: Final = 24 + PAGE

    def __init__(self, log: bytes) -> None:
        places = range(32, len(log) - self.FRAME + 1, self.FRAME)
        ours = [place for place in places if log[place + 8 : place + 16] == log[16:24]]  # of the log's current round
        commits = [place for place in ours if any(log[place + 4 : place + 8])]
        # The header of the commit before counts too: damage to it may be a torn write.
        self._head_before = commits[-2] if len(commits) > 1 else 0
        self._begins = commits[-2] + self.FRAME if len(commits) > 1 else 32
        self._ends = ours[-1] + self.FRAME

    def contains(self, at: int) -> bool:
        return self._begins <= at < self._ends or 0 <= at - self._head_before < 24


@check(rounds=3_000, few=10)
def flipped_bits(trial: Trial) -> Counts:
    """One bit of the closed database is flipped: no wrong response, missing rows are reported."""
    return flips(trial, "database")


@check(rounds=1_000, few=5)
def flipped_bits_in_the_log(trial: Trial) -> Counts:
    """One bit of the write-ahead log is flipped after a kill: no commit is skipped silently."""
    return flips(trial, "log")


@check(rounds=1_000, few=5)
def flipped_bits_in_the_journal(trial: Trial) -> Counts:
    """One bit of the journal is flipped after a kill, before the tables are written: no commit is skipped silently."""
    return flips(trial, "journal")
