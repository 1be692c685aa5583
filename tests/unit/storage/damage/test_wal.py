"""A write-ahead log with a changed byte: damage is detected, and the effects of a crash are accepted."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest
from msgspec.structs import replace

from jobd.storage.backup import restore
from jobd.storage.damage import wal
from jobd.storage.files import StoreUnreadable
from jobd.storage.offline import doctor
from jobd.storage.store import Store
from tests.support.factories import ChangeFactory
from tests.support.store_files import open_store, read_file, write_file

HEADER = 32
FRAME = 24 + 4096


@pytest.fixture
async def killed(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ChangeFactory:
    """A store with twelve jobs, each written by its own commit, as after a kill. No slice has written the tables."""
    monkeypatch.setattr(Store, "_plan_slice", lambda self: None)
    maker = ChangeFactory()
    other = str(tmp_path / "running.db")
    async with open_store(other) as (store, _):
        for number in range(12):
            created = maker.create(f"job-{number}")
            if number < 4:
                created = replace(created, payload=b'"%s"' % (b"x" * 60_000))
            await store.write(maker.batch([created]))
        for suffix in ("", "-wal", ".epoch"):
            shutil.copy(f"{other}{suffix}", f"{path}{suffix}")
    return maker


def commits(path: str) -> list[int]:
    """Return the offsets of the last frames of all transactions."""
    log = read_file(f"{path}-wal")
    places = range(HEADER, len(log), FRAME)
    return [place for place in places if struct.unpack_from(">I", log, place + 4) != (0,)]


def change(path: str, *places: int) -> None:
    log = bytearray(read_file(f"{path}-wal"))
    for place in places:
        log[place] ^= 4
    write_file(f"{path}-wal", log)


async def ids(path: str) -> list[str]:
    async with open_store(path) as (_, found):
        assert found.faults == []
        return [job.id for job in found.live()]


async def test_an_undamaged_log_is_accepted(path: str, killed: ChangeFactory) -> None:
    assert doctor.check(path) == []
    assert len(await ids(path)) == 12


@pytest.mark.parametrize("place", ["header", "salt of the header", "a page", "a frame", "the commit before the last"])
async def test_commits_after_a_changed_byte_are_detected(path: str, killed: ChangeFactory, place: str) -> None:
    where = {
        "header": 9,
        "salt of the header": 17,
        "a page": commits(path)[-5] + FRAME + 24 + 700,
        "a frame": commits(path)[-5] + FRAME + 12,
        "the commit before the last": commits(path)[-2] + 24 + 1000,
    }
    change(path, where[place])
    before = read_file(path), read_file(f"{path}-wal")
    for _ in range(2):
        with pytest.raises(StoreUnreadable, match=r"jobd.db-wal is damaged after \d+ pages"):
            await ids(path)
        with pytest.raises(StoreUnreadable, match="jobd restore"):
            doctor.check(path)
    assert (read_file(path), read_file(f"{path}-wal")) == before


async def test_an_incomplete_last_transaction_is_accepted(path: str, killed: ChangeFactory) -> None:
    begins, ends = commits(path)[-2] + FRAME, commits(path)[-1]
    change(path, begins + 24 + 3, ends + 24 + 900)
    assert len(await ids(path)) == 11


async def test_a_torn_frame_header_that_looks_like_a_commit_is_accepted(path: str, killed: ChangeFactory) -> None:
    """If a sector ends inside it, its first half may be from an older generation of the log."""
    places = range(commits(path)[3] + FRAME, commits(path)[-1], FRAME)
    torn = next(place for place in places if place // 512 != (place + 15) // 512)
    ends = next(place for place in commits(path) if place > torn)
    log = bytearray(read_file(f"{path}-wal")[: ends + FRAME])  # its transaction is the last one
    log[torn + 4 : torn + 8] = b"\0\0\0\7"
    write_file(f"{path}-wal", log)
    before = sum(place < torn for place in commits(path))
    assert len(await ids(path)) < before < 12


async def test_frames_of_an_older_generation_are_ignored(path: str, killed: ChangeFactory, tmp_path: Path) -> None:
    maker = killed
    async with open_store(path) as (store, _):
        store._connection.raw.execute("PRAGMA wal_checkpoint(RESTART)")
        await store.write(maker.batch([maker.create("later")]))
        contents = [(suffix, read_file(f"{path}{suffix}")) for suffix in ("", "-wal")]
    for suffix, content in contents:
        write_file(f"{path}{suffix}", content)
    assert len(commits(path)) > 5
    assert len(await ids(path)) == 13


async def test_a_log_too_short_for_a_header_has_no_frames(path: str, killed: ChangeFactory) -> None:
    write_file(f"{path}-wal", read_file(f"{path}-wal")[:20])
    assert not wal.has_frames(f"{path}-wal")
    assert not wal.is_damaged(f"{path}-wal", 0)


async def test_a_restore_of_the_store_to_itself_continues_before_the_damage(path: str, killed: ChangeFactory) -> None:
    change(path, commits(path)[-5] + FRAME + 24)
    damaged = read_file(f"{path}-wal")
    old_path = restore(path, path)
    assert old_path is not None
    assert read_file(f"{old_path}-wal") == damaged
    async with open_store(path) as (_, found):
        assert sorted(job.id for job in found.live()) == [f"job-{number}" for number in range(8)]
        assert found.marked
        assert found.numbers.epoch == 2
