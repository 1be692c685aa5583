"""Read artifacts for downloads: a limited number at a time, piece by piece, as fast as the client reads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from jobd.model.errors import api_error
from jobd.storage.artifacts.base import ArtifactReader, ArtifactStore, ArtifactStoreError

CALL_S: Final = 10.0  # for one piece from the store
CLOSING_S: Final = 1.0  # for the last pieces when the daemon stops


log = structlog.get_logger("jobd.artifacts")


class Downloads:
    """Where downloads begin, at most `most` at a time. `store`: None where none is set up."""

    def __init__(self, store: ArtifactStore | None, most: int) -> None:
        self._store = store
        self._most = most
        self._open: set[Download] = set()
        self._is_closed = False

    @property
    def has_store(self) -> bool:
        return self._store is not None

    async def begin(self, key: str, cut: Callable[[], None]) -> Download:
        """The object under `key`. `cut` ends the connection of one who does not read. Raises Refused."""
        if self._store is None:
            message = "No store of artifacts is set up here, so there is nothing to download: see artifacts.url."
            raise api_error("not_found", message)
        if self._is_closed:
            raise api_error("shutting_down", "The daemon is stopping; ask again in a moment.")
        if len(self._open) >= self._most:
            message = f"{self._most} downloads are under way (limits.downloads); try again in a moment."
            raise api_error("overloaded", message)
        download = Download(self._open, cut)  # its place is taken while it is looked for
        try:
            async with asyncio.timeout(CALL_S):
                reading = await self._store.open(key)
        except (ArtifactStoreError, TimeoutError) as fault:
            download.leave()
            log.warning("artifact_not_read", key=key, error=str(fault) or f"no answer within {CALL_S:g} s")
            raise api_error("storage_unavailable", "The store of artifacts cannot be read now; try again.") from fault
        except BaseException:
            download.leave()
            raise
        if reading is None:
            download.leave()
            raise api_error("not_found", f"Nothing lies in the store of artifacts under {key!r} (any more).")
        download.take(reading)
        return download

    def close(self) -> None:
        """No new ones. Those under way may end; whoever takes longer is cut off soon."""
        self._is_closed = True
        if self._open:
            asyncio.get_running_loop().call_later(CLOSING_S, self._cut_all)

    def _cut_all(self) -> None:
        for download in list(self._open):
            download.cut()


class Download:
    """One that is under way, among the others of `places`."""

    def __init__(self, places: set[Download], cut: Callable[[], None]) -> None:
        self.size = 0
        self.cut = cut
        self._places = places
        self._reading: ArtifactReader | None = None
        places.add(self)

    def take(self, reading: ArtifactReader) -> None:
        self._reading = reading
        self.size = reading.size

    async def more(self) -> bytes:
        assert self._reading is not None
        async with asyncio.timeout(CALL_S):
            return await self._reading.more()

    def leave(self) -> None:
        self._places.discard(self)
        if self._reading is not None:
            self._reading.close()
