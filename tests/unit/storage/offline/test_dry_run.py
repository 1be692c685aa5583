"""What a restore or a repair would do: a description, with the errors of the real call, and no writes."""

from __future__ import annotations

import glob
import os
import shutil
from pathlib import Path

import pytest

from jobd.model.job import FINISHED, LIVE
from jobd.model.storage import DiskFull
from jobd.storage import backup, files
from jobd.storage.files import StoreBusy, StoreTooNew, StoreUnreadable
from jobd.storage.offline import doctor, dry_run
from jobd.storage.schema import migrations
from tests.support import store_files


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "here").mkdir()
    return str(tmp_path / "here" / "jobd.db")


@pytest.fixture
def copy(tmp_path: Path) -> str:
    return str(tmp_path / "copy.db")


def state(*names: str) -> dict[str, tuple[bytes, int]]:
    return {
        name: (store_files.read_file(name), os.stat(name).st_mtime_ns)
        for path in names
        for name in glob.glob(f"{path}*")
    }


async def test_a_restore_shows_what_it_would_end_and_replace(path: str, copy: str) -> None:
    maker = await store_files.make_store(copy)
    await store_files.make_store(path, seed=12)
    files.write_epoch(path, 4)
    before = state(path, copy)
    report = "\n".join(dry_run.restore(copy, path))
    assert state(path, copy) == before
    held = sum(job.status == "processing" for job in maker.jobs.values())
    assert held
    for words in (
        f"would restore {copy} to {path}",
        "it is a jobd store and its structure is intact",
        "the checksums of all rows are correct",
        f"it has {len(maker.jobs)} jobs",
        f"{held} processing",
        f"processing: {held}; their grants would end by their stall rule",
        "epoch 5 or later would begin",
        f"would be kept as {path}.",
    ):
        assert words in report
    backup.restore(copy, path)
    async with store_files.open_store(path) as (_, found):  # as described
        assert found.numbers.epoch == 5


async def test_a_dry_run_creates_no_files(path: str, copy: str) -> None:
    await store_files.make_store(copy)
    assert "no database would be replaced" in dry_run.restore(copy, path)[-1]
    assert os.listdir(os.path.dirname(path)) == []


async def test_the_epoch_of_the_old_store_counts(path: str, copy: str) -> None:
    await store_files.make_store(copy)
    await store_files.make_store(path)
    with store_files.edit_store(path) as conn:
        migrations.change_meta(conn, epoch=7)
    store_files.remove(f"{path}.epoch")
    assert "epoch 8 or later would begin" in "\n".join(dry_run.restore(copy, path))


async def test_an_unreadable_store_would_be_kept_unchanged(path: str, copy: str) -> None:
    await store_files.make_store(copy)
    store_files.write_file(path, b"rubbish" * 1_000)
    assert "the existing file cannot be read, and would be kept" in dry_run.restore(copy, path)[-1]


async def test_a_damaged_row_is_reported_and_the_dry_run_continues(path: str, copy: str) -> None:
    maker = await store_files.make_store(copy)
    with store_files.edit_store(copy) as conn:
        conn.execute("UPDATE jobs SET created_at = created_at + 1")
        conn.execute("UPDATE jobs SET status = CAST(x'ff' AS TEXT) WHERE seq = (SELECT max(seq) FROM jobs)")
    report = dry_run.restore(copy, path)
    assert any("WARNING" in line and "defects" in line for line in report)
    named = [line for line in report if line.startswith("        job ")]
    assert len(named) == min(dry_run.MAX_SHOWN, len(maker.jobs))
    assert any(f"jobd doctor --store {copy}" in line for line in report)
    backup.restore(copy, path)


async def test_an_older_file_would_be_migrated(path: str, copy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await store_files.make_store(copy)
    monkeypatch.setattr(migrations, "VERSION", migrations.VERSION + 1)
    report = "\n".join(dry_run.restore(copy, path))
    assert f"its schema version is {migrations.VERSION - 1}" in report
    assert f"would first be copied and migrated to {migrations.VERSION}" in doctor.recount(copy, is_dry_run=True)


async def test_a_file_in_use_by_a_daemon_is_reported(path: str, copy: str) -> None:
    await store_files.make_store(copy)
    with files.FileLock(copy):
        assert any("WARNING" in line and str(os.getpid()) in line for line in dry_run.restore(copy, path))


@pytest.mark.parametrize("what", ["missing", "rubbish", "foreign", "newer", "meta", "page", "epoch", "folder"])
async def test_a_dry_run_raises_the_errors_of_the_restore(path: str, copy: str, what: str) -> None:
    await store_files.make_store(copy)
    await store_files.make_store(path, seed=12)
    if what == "epoch":
        store_files.write_file(f"{path}.epoch", b"rubbish")
    elif what == "folder":
        path = f"{path}-nowhere/jobd.db"
    else:
        store_files.damage_backup(copy, what)
    before = state(path, copy)
    errors: list[Exception] = []
    for call in (dry_run.restore, backup.restore):
        with pytest.raises((StoreTooNew, StoreUnreadable, OSError)) as caught:
            call(copy, path)
        errors.append(caught.value)
        if call is dry_run.restore:
            assert state(path, copy) == before
    assert type(errors[0]) is type(errors[1])
    assert getattr(errors[0], "errno", None) == getattr(errors[1], "errno", None)


async def test_a_store_in_use_is_rejected(path: str, copy: str) -> None:
    await store_files.make_store(copy)
    async with store_files.open_store(path):
        before = store_files.read_file(path)
        with pytest.raises(StoreBusy, match=str(os.getpid())):
            dry_run.restore(copy, path)
        assert store_files.read_file(path) == before
    with store_files.edit_store(path) as conn:
        conn.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreBusy):
            dry_run.restore(copy, path)
    dry_run.restore(copy, path)


async def test_free_disk_space_is_checked(path: str, copy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await store_files.make_store(copy)
    real = os.statvfs(path.rpartition("/")[0])
    short = os.statvfs_result((real.f_bsize, 4096, 10, 10, os.path.getsize(copy) // 4096 - 1, 1, 1, 1, 1, 255))
    monkeypatch.setattr("jobd.storage.offline.dry_run.os.statvfs", lambda _: short)
    with pytest.raises(DiskFull, match="KiB are free"):
        dry_run.restore(copy, path)


# ---------------------------------------------------------------------------------------------------------------------
# Repairs


async def test_accept_writes_what_its_dry_run_shows(path: str) -> None:
    maker = await store_files.make_store(path)
    job = store_files.pick(maker, frozenset({"processing"}))
    assert job.grant is not None
    await store_files.leave_tail(path, maker.batch([maker.progress(job, 99)]))  # in the log of the database
    shutil.copytree(os.path.dirname(path), f"{os.path.dirname(path)}-unedited")
    with store_files.edit_store(path) as conn:  # and of one without a log
        conn.execute("UPDATE jobs SET body = json_set(body, '$.priority', 77) WHERE seq = ?", (job.seq,))
    reports = []
    for each in (path, f"{os.path.dirname(path)}-unedited/jobd.db"):
        before = {name: file for name, file in state(each).items() if not name.endswith(".lock")}
        reports.append(doctor.accept(each, [job.id], is_dry_run=True))
        doctor.recount(each, is_dry_run=True)
        assert {name: file for name, file in state(each).items() if not name.endswith(".lock")} == before
    assert f"job {job.id}: the row in quarantine would be accepted" in reports[0]
    assert f"job {job.id}: the row would be accepted" in reports[1]
    assert "priority 77" in reports[0]
    assert job.grant.lock_id not in reports[0]
    assert "the counts would not change" in reports[1]
    doctor.accept(path, [job.id])
    assert doctor.check(path) == []


@pytest.mark.parametrize("statuses", [LIVE, FINISHED], ids=["live", "finished"])
async def test_a_job_accepted_from_quarantine_is_counted(path: str, statuses: frozenset[str]) -> None:
    maker = await store_files.make_store(path)
    job = store_files.pick(maker, statuses)
    queue = job.options.queue
    with store_files.edit_store(path) as conn:
        conn.execute("UPDATE jobs SET queue = 'other' WHERE seq = ?", (job.seq,))
    async with store_files.open_store(path) as (store, _):
        await store.load([job.id], [], [])
    with store_files.edit_store(path) as conn:
        conn.execute("UPDATE quarantined_jobs SET row = json_set(row, '$.queue', ?)", (queue,))
    report = doctor.accept(path, [job.id], is_dry_run=True)
    assert "the row in quarantine would be accepted" in report
    live = sum(each.status in LIVE for each in maker.jobs.values())
    assert f"the counts would be: {live} live and {len(maker.jobs) - live} finished jobs" in report
    doctor.accept(path, [job.id])
    assert doctor.check(path) == []


async def test_a_recount_shows_the_differences(path: str) -> None:
    maker = await store_files.make_store(path)
    job = store_files.pick(maker, FINISHED)
    report = doctor.recount(path, is_dry_run=True)
    assert "all indexes would be rebuilt" in report
    assert "the counts would not change" in report
    with store_files.edit_store(path) as conn:
        conn.execute("DELETE FROM jobs WHERE seq = ?", (job.seq,))
    report = doctor.recount(path, is_dry_run=True)
    assert "the counts would be: " in report
    assert f"queue {job.options.queue}: " in report
    doctor.recount(path)
    assert "the counts would not change" in doctor.recount(path, is_dry_run=True)


async def test_different_rows_are_reported_even_if_the_counts_agree(path: str) -> None:
    maker = await store_files.make_store(path)
    job = store_files.pick(maker, LIVE)
    with store_files.edit_store(path) as conn:
        conn.execute("UPDATE jobs SET crc = crc + 1 WHERE seq = ?", (job.seq,))
    assert "the rows differ from those that are recorded" in doctor.recount(path, is_dry_run=True)


async def test_repairs_are_shown_only_for_a_store_that_is_not_in_use(path: str) -> None:
    with pytest.raises(StoreUnreadable, match="does not exist"):
        doctor.recount(path, is_dry_run=True)
    assert not store_files.exists(path)
    async with store_files.open_store(path):
        with pytest.raises(StoreBusy):
            doctor.recount(path, is_dry_run=True)
