"""Send a copy of the tables through a shared journal, compressed and in parts, and start a store from one."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO, Final

from jobd.model.journal import SNAPSHOT_PART_BYTES, BadSnapshot
from jobd.storage import files, startup
from jobd.storage.cluster import membership
from jobd.storage.files import StoreError
from jobd.storage.schema import migrations

_READ_BYTES: Final = 4 << 20
_LEVEL: Final = 1  # a third of the size in a third of the time of the default level


async def compressed(file: BinaryIO) -> AsyncIterator[bytes]:
    """Yield the content of `file` as a zlib stream, in parts of at most SNAPSHOT_PART_BYTES."""
    stream, waiting, is_ended = zlib.compressobj(_LEVEL), bytearray(), False
    while not is_ended:
        content = await asyncio.to_thread(file.read, _READ_BYTES)
        is_ended = not content
        waiting += stream.flush() if is_ended else await asyncio.to_thread(stream.compress, content)
        while len(waiting) >= SNAPSHOT_PART_BYTES or (is_ended and waiting):
            part = bytes(waiting[:SNAPSHOT_PART_BYTES])
            del waiting[:SNAPSHOT_PART_BYTES]
            yield part


async def install(path: str, parts: AsyncIterator[bytes], cluster_id: str) -> None:
    """Make the store at `path`, which does not exist, from a snapshot. Raises BadSnapshot or DiskFull."""
    new = f"{path}.restoring"
    try:
        await asyncio.to_thread(Path(new).unlink, missing_ok=True)
        await asyncio.to_thread(files.create_private, new)
        await _receive(new, parts)
        await asyncio.to_thread(_check, new, cluster_id)
        await asyncio.to_thread(files.put_in_place, new, path)
    finally:
        await asyncio.to_thread(Path(new).unlink, missing_ok=True)


async def _receive(new: str, parts: AsyncIterator[bytes]) -> None:
    stream = zlib.decompressobj()
    with await asyncio.to_thread(open, new, "wb") as file:
        async for part in parts:
            try:
                content = await asyncio.to_thread(stream.decompress, part)
            except zlib.error as error:
                raise BadSnapshot(f"the snapshot cannot be decompressed: {error}") from error
            with files.raising_disk_full():
                await asyncio.to_thread(file.write, content)
        with files.raising_disk_full():
            await asyncio.to_thread(file.flush)
    if not stream.eof:
        raise BadSnapshot("the snapshot is incomplete")


def _check(new: str, cluster_id: str) -> None:
    try:
        with startup.opened_read_only(new) as (conn, _):
            migrations.check_meta(conn, new)
            found = membership.read(conn)
            (line,) = conn.execute("PRAGMA quick_check(1)").fetchone()
    except StoreError as error:
        raise BadSnapshot(f"the snapshot cannot be used: {error}") from error
    if found is None or found.cluster_id != cluster_id:
        raise BadSnapshot("the snapshot belongs to another cluster")
    if line != "ok":
        raise BadSnapshot(f"the snapshot is damaged: {line}")
