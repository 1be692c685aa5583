"""Define the interface of artifact stores, and decide which objects of deleted jobs may be deleted.

`filesystem.py` and `s3.py` implement the interface. `maintenance/artifact_sweeper.py` decides when to delete.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, Literal, Protocol

from msgspec import Struct

from jobd.model.job import HOUR_MS, MINUTE_MS
from jobd.model.storage import Tombstone

Verdict = Literal["delete", "wait", "leave"]
Judge = Callable[[int], Verdict]  # takes the time of the last change of an object, in Unix ms


class Margins(Struct, frozen=True):
    """Tolerances of the sweeper.

    An object younger than `young_ms` may belong to a job that has not named it yet. `skew_ms` is the largest expected
    difference between the clocks of the artifact store and the daemon; S3 rejects requests beyond it.
    """

    young_ms: int = HOUR_MS
    skew_ms: int = 15 * MINUTE_MS


MARGINS: Final = Margins()
PIECE_BYTES: Final = 256 << 10  # per read


class ArtifactStoreError(Exception):
    """The artifact store failed. The message is for operators and contains no secret."""


class Deletion(Struct, frozen=True):
    """The result of a deletion. `missing`: there is no object. `left`: it must not be deleted, because of `why`."""

    what: Literal["deleted", "missing", "young", "left"]
    why: str = ""
    modified_at: int = 0  # of a young object, Unix ms


class ArtifactReader:
    """Reads an object of `size` bytes, even if another object replaces it meanwhile.

    `read` returns bytes of the object from one offset to another, and raises ArtifactStoreError. `close` does not wait.
    """

    def __init__(
        self,
        name: str,
        size: int,
        read: Callable[[int, int], Awaitable[bytes]],
        *,
        piece_bytes: int = PIECE_BYTES,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.size = size
        self.close = close
        self._name = name
        self._read = read
        self._piece_bytes = piece_bytes
        self._at = 0

    async def more(self) -> bytes:
        """Return the next piece, empty at the end. Raises ArtifactStoreError, e.g. if the object is too short."""
        if self._at == self.size:
            return b""
        piece = await self._read(self._at, min(self._at + self._piece_bytes, self.size))
        if not piece:
            raise ArtifactStoreError(f"{self._name} became shorter while it was read.")
        self._at += len(piece)
        return piece


class ArtifactStore(Protocol):
    """A store of objects. A cancelled call may still take effect."""

    place: str  # a directory or URL, for messages

    async def open(self, key: str) -> ArtifactReader | None:
        """Open the object `key` for reading; None if there is none. Raises ArtifactStoreError."""

    async def delete(self, key: str, judge: Judge) -> Deletion:
        """Delete the object `key` if `judge` agrees, but not an object that replaces it in the meantime.

        The deletion is durable when this returns. Raises ArtifactStoreError.
        """

    async def probe(self) -> None:
        """Write an object, read it back, delete it. Raises ArtifactStoreError."""

    async def close(self) -> None: ...


def judge(tombstone: Tombstone, margins: Margins, now: int, modified_at: int) -> Verdict:
    """Decide whether to delete the object of a deleted job, by the time of its last change.

    An object that was written after the deletion belongs to another job. A recent object may belong to a job that has
    not named it yet.
    """
    if modified_at > tombstone.at + margins.skew_ms:
        return "leave"
    return "wait" if now < modified_at + margins.young_ms else "delete"


def kept(verdict: Verdict, modified_at: int) -> Deletion | None:
    """Return the result for an object that `verdict` keeps, else None."""
    if verdict == "leave":
        return Deletion("left", "it was written after the job was deleted", modified_at)
    return Deletion("young", "", modified_at) if verdict == "wait" else None
