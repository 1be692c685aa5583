"""Snapshots in parts: compressed, checked, and put in place as a whole or not at all."""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import AsyncIterator, Callable
from io import BytesIO
from random import Random

import pytest

from jobd.model.journal import SNAPSHOT_PART_BYTES, BadSnapshot
from jobd.model.storage import DiskFull
from jobd.storage.cluster import joining, snapshots
from tests.support.store_files import edit_store, exists, make_store, read_file, write_file


async def parts_of(content: bytes) -> list[bytes]:
    return [part async for part in snapshots.compressed(BytesIO(content))]


async def given(parts: list[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


@pytest.fixture
async def content(path: str) -> bytes:
    """The file of a store that belongs to the cluster `memory`."""
    await make_store(f"{path}.source")
    joining.convert_to_cluster(f"{path}.source", "memory")
    return read_file(f"{path}.source")


@pytest.mark.parametrize("size", [0, 1, SNAPSHOT_PART_BYTES, 3 * SNAPSHOT_PART_BYTES + 7, 9 << 20])
async def test_any_content_survives_in_parts_of_the_same_size(size: int) -> None:
    content = Random(size).randbytes(size)
    parts = await parts_of(content)
    assert zlib.decompress(b"".join(parts)) == content
    assert all(len(part) == SNAPSHOT_PART_BYTES for part in parts[:-1])
    assert 0 < len(parts[-1]) <= SNAPSHOT_PART_BYTES


async def test_a_store_is_made_from_a_snapshot(path: str, content: bytes) -> None:
    write_file(f"{path}.restoring", b"of an installation that was killed")
    await snapshots.install(path, given(await parts_of(content)), "memory")
    assert read_file(path) == content
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert not exists(f"{path}.restoring")


def damaged(content: bytes) -> bytes:
    return content[:-4096] + bytes(4096)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda parts, content: [b"x", *parts], "cannot be decompressed"),
        (lambda parts, content: parts[:-1], "incomplete"),
        (lambda parts, content: [parts[0][:-5]], "incomplete"),
        (lambda parts, content: [zlib.compress(b"no database" * 99)], "cannot be used: .* is not a jobd database"),
        (lambda parts, content: [zlib.compress(content[:100] + bytes(5_000))], "cannot be used"),
        (lambda parts, content: [zlib.compress(damaged(content))], "is damaged"),
    ],
)
async def test_an_unusable_snapshot_leaves_nothing(
    path: str, content: bytes, change: Callable[[list[bytes], bytes], list[bytes]], reason: str
) -> None:
    with pytest.raises(BadSnapshot, match=reason):
        await snapshots.install(path, given(change(await parts_of(content), content)), "memory")
    assert not exists(path)
    assert not exists(f"{path}.restoring")


async def test_a_snapshot_of_another_cluster_or_of_a_single_machine_is_refused(path: str, content: bytes) -> None:
    with pytest.raises(BadSnapshot, match="belongs to another cluster"):
        await snapshots.install(path, given(await parts_of(content)), "other")
    with edit_store(f"{path}.source") as conn:
        conn.execute("DELETE FROM cluster")
    with pytest.raises(BadSnapshot, match="belongs to another cluster"):
        await snapshots.install(path, given(await parts_of(read_file(f"{path}.source"))), "memory")


async def test_a_full_disk_leaves_nothing(path: str, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(BytesIO):
        def write(self, content: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(snapshots, "open", lambda name, mode: Full(), raising=False)
    with pytest.raises(DiskFull, match="No space left"):
        await snapshots.install(path, given(await parts_of(content)), "memory")
    assert not exists(f"{path}.restoring")
