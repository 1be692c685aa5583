"""Stored results: what a store of artifacts has to do, and whose an object is that lies under the key of a deleted job.

Touches none itself: directories are in artifact_files.py, buckets in artifact_s3.py. What is deleted when is the matter
of sweeper.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, Protocol

from msgspec import Struct

from jobd.model.job import HOUR_MS, MINUTE_MS
from jobd.model.storage import Tombstone

Verdict = Literal["delete", "wait", "leave"]
Judge = Callable[[int], Verdict]  # of the time at which an object was last modified, Unix ms


class Margins(Struct, frozen=True):
    """Who stores an object names it within the hour: a younger one may be that of a job that is about to.

    `skew_ms`: by how much the clock of a store may differ from ours; S3 itself allows no more.
    """

    young_ms: int = HOUR_MS
    skew_ms: int = 15 * MINUTE_MS


MARGINS: Final = Margins()
PIECE_BYTES: Final = 256 << 10  # read in one go


class ArtifactStoreError(Exception):
    """The store could not do it, now; the text is a sentence for the operator, and has no secret in it."""


class Deletion(Struct, frozen=True):
    """What came of a deletion. `missing`: nothing is there. `left`: it is not ours to delete, and `why`."""

    what: Literal["deleted", "missing", "young", "left"]
    why: str = ""
    modified_at: int = 0  # of a young one, Unix ms


class ArtifactReader(Protocol):
    """An object on its way out: `size` bytes, the same object to the end, whoever puts another in its place."""

    size: int

    async def more(self) -> bytes:
        """The next piece, nothing at the end. Raises StoreFault, also where the object ends before its size."""

    def close(self) -> None:
        """No more of it is wanted. Does not wait."""


class ArtifactStore(Protocol):
    """Where the objects are. A call that takes too long may be cancelled, and does no harm if it still takes effect."""

    place: str  # for people

    async def open(self, key: str) -> ArtifactReader | None:
        """The object under `key`, to be read; None where nothing lies there. Raises StoreFault."""

    async def delete(self, key: str, judge: Judge) -> Deletion:
        """Delete the object under `key` if `judge` says so, and no other that comes there meanwhile.

        When this returns the deletion outlives a power cut. Raises StoreFault.
        """

    async def probe(self) -> None:
        """Write an object, read it back, delete it. Raises StoreFault."""

    async def close(self) -> None: ...


def judge(tombstone: Tombstone, margins: Margins, now: int, modified_at: int) -> Verdict:
    """Whether an object that was last modified then goes with the deleted job.

    Written after the deletion, it is another's. Written lately, it may be that of a job which has not named it yet.
    """
    if modified_at > tombstone.at + margins.skew_ms:
        return "leave"
    return "wait" if now < modified_at + margins.young_ms else "delete"
