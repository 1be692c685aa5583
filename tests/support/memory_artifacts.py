"""An artifact store in memory that fails on demand, for tests of the sweeper and the simulation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from jobd.storage.artifacts.base import ArtifactReader, ArtifactStoreError, Deletion, Judge


class MemoryArtifacts:
    """Objects by key, with the wall time of their upload. `faults` has the keys that cannot be deleted, with the error.

    While `gate` is cleared, deletions wait for it after their check. Every call raises `broken` if it is set.
    """

    place = "memory"

    def __init__(self, wall: Callable[[], int]) -> None:
        self.objects: dict[str, int] = {}
        self.faults: dict[str, str] = {}
        self.broken: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.tried: list[str] = []
        self._wall = wall

    def upload(self, key: str) -> None:
        self.objects[key] = self._wall()

    async def open(self, key: str) -> ArtifactReader | None:
        raise NotImplementedError("reads are tested on real stores")

    async def delete(self, key: str, judge: Judge) -> Deletion:
        self.tried.append(key)
        await self.pause()
        if self.broken is not None:
            raise self.broken
        if key in self.faults:
            raise ArtifactStoreError(self.faults[key])
        while True:
            modified_at = self.objects.get(key)
            if modified_at is None:
                return Deletion("missing")
            verdict = judge(modified_at)
            if verdict != "delete":
                return Deletion("left" if verdict == "leave" else "young", "it is another's", modified_at)
            await self.pause()
            await self.gate.wait()
            if self.objects.get(key) == modified_at:  # as with an ETag
                del self.objects[key]

                return Deletion("deleted")

    async def pause(self) -> None:
        await asyncio.sleep(0)

    async def probe(self) -> None:
        if self.broken is not None:
            raise self.broken

    async def close(self) -> None:
        pass
