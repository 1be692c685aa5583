"""Read artifacts for downloads: a limited number at a time, in pieces, as fast as the client reads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from jobd.model.errors import api_error
from jobd.storage.artifacts.base import ArtifactReader, ArtifactStore, ArtifactStoreError

CALL_S: Final = 10.0  # timeout per piece
CLOSING_S: Final = 1.0  # after which running downloads are cut when the daemon stops

log = structlog.get_logger("jobd.artifacts")


class Downloads:
    """Starts downloads, at most `limit` at a time. Without artifacts.url, `store` is None."""

    def __init__(self, store: ArtifactStore | None, limit: int) -> None:
        self._store = store
        self._limit = limit
        self._open: set[Download] = set()
        self._is_closed = False

    @property
    def has_store(self) -> bool:
        return self._store is not None

    async def start(self, key: str, cut: Callable[[], None]) -> Download:
        """Start to download the object `key`. `cut` closes the connection of a slow client. Raises ApiException."""
        if self._store is None:
            message = "This daemon has no artifact store, so there is nothing to download. See artifacts.url."
            raise api_error("not_found", message)
        if self._is_closed:
            raise api_error("shutting_down", "The daemon is stopping. Try again in a moment.")
        if len(self._open) >= self._limit:
            message = f"{self._limit} downloads are in progress (limits.downloads). Try again in a moment."
            raise api_error("overloaded", message)
        download = Download(self._open, cut)  # counted while the object is being opened
        try:
            async with asyncio.timeout(CALL_S):
                reading = await self._store.open(key)
        except (ArtifactStoreError, TimeoutError) as error:
            download.close()
            log.warning("artifact_not_read", key=key, error=str(error) or f"no response within {CALL_S:g} s")
            raise api_error("artifacts_unavailable", "The artifact store cannot be read now. Try again.") from error
        except BaseException:
            download.close()
            raise
        if reading is None:
            download.close()
            raise api_error("not_found", f"The artifact store has no object {key!r}.")
        download.attach(reading)
        return download

    def close(self) -> None:
        """Reject new downloads, and cut the running ones after CLOSING_S."""
        self._is_closed = True
        if self._open:
            asyncio.get_running_loop().call_later(CLOSING_S, self._cut_all)

    def _cut_all(self) -> None:
        for download in list(self._open):
            download.cut()


class Download:
    """A download in progress. It is in `open_downloads` until it is closed."""

    def __init__(self, open_downloads: set[Download], cut: Callable[[], None]) -> None:
        self.size = 0
        self.cut = cut
        self._open_downloads = open_downloads
        self._reading: ArtifactReader | None = None
        open_downloads.add(self)

    def attach(self, reading: ArtifactReader) -> None:
        self._reading = reading
        self.size = reading.size

    async def more(self) -> bytes:
        assert self._reading is not None
        async with asyncio.timeout(CALL_S):
            return await self._reading.more()

    def close(self) -> None:
        self._open_downloads.discard(self)
        if self._reading is not None:
            self._reading.close()
