"""Stored results out to those who ask: so many at a time, piece by piece, as fast as they are read.

Decides nothing about jobs. What is given out is never shown by a browser as a page: it is others' bytes under our name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, Final
from urllib.parse import quote

import structlog
from aiohttp import hdrs, web
from msgspec import Meta

from jobd.answers import JobView, LateResultList, LateResultView
from jobd.artifacts import ArtifactStore, Reading, StoreFault
from jobd.bodies import refused
from jobd.commands import Get, LateResults, OnJob, Refusal
from jobd.replies import PATIENCE_S, SAFE
from jobd.streams import write
from jobd.visits import Visit
from jobd.web import Download, Web, note_look

KIND: Final = "application/octet-stream"
CALL_S: Final = 10.0  # for one piece from the store
CLOSING_S: Final = 1.0  # for the last pieces when the daemon stops
SHOWN_NAME: Final = 150  # characters of a file's name

log = structlog.get_logger("jobd.artifacts")


class Artifact(OnJob, frozen=True, kw_only=True):
    """The object that a job's `storage_key` names, or that of its late result with this `seq`."""

    late_result: Annotated[int, Meta(ge=1)] | None = None


class Downloads:
    """Where downloads begin, at most `most` at a time. `store`: None where none is set up."""

    def __init__(self, store: ArtifactStore | None, most: int) -> None:
        self._store = store
        self._most = most
        self._open: set[_Download] = set()
        self._is_closed = False

    @property
    def has_store(self) -> bool:
        return self._store is not None

    async def begin(self, key: str, cut: Callable[[], None]) -> Download:
        """The object under `key`. `cut` ends the connection of one who does not read. Raises Refused."""
        if self._store is None:
            message = "No store of artifacts is set up here, so there is nothing to download: see artifacts.url."
            raise refused("not_found", message)
        if self._is_closed:
            raise refused("shutting_down", "The daemon is stopping; ask again in a moment.")
        if len(self._open) >= self._most:
            message = f"{self._most} downloads are under way (limits.downloads); try again in a moment."
            raise refused("overloaded", message)
        download = _Download(self._open, cut)  # its place is taken while it is looked for
        try:
            async with asyncio.timeout(CALL_S):
                reading = await self._store.open(key)
        except (StoreFault, TimeoutError) as fault:
            download.leave()
            log.warning("artifact_not_read", key=key, error=str(fault) or f"no answer within {CALL_S:g} s")
            raise refused("storage_unavailable", "The store of artifacts cannot be read now; try again.") from fault
        except BaseException:
            download.leave()
            raise
        if reading is None:
            download.leave()
            raise refused("not_found", f"Nothing lies in the store of artifacts under {key!r} (any more).")
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


class _Download:
    """One that is under way, among the others of `places`."""

    def __init__(self, places: set[_Download], cut: Callable[[], None]) -> None:
        self.size = 0
        self.cut = cut
        self._places = places
        self._reading: Reading | None = None
        places.add(self)

    def take(self, reading: Reading) -> None:
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


async def give(site: Web, visit: Visit, asked: Any, name: str = "") -> web.StreamResponse | Refusal:
    """The artifact that is asked for, as a file to be kept. Where it breaks off the connection is cut.

    `name` is that of who asks, where his session knows it.
    """
    key = await _key(site, visit, asked)
    if isinstance(key, Refusal):
        return key
    transport, request = visit.connection.transport, visit.request
    if transport is None or request is None:
        raise ConnectionResetError("the client is gone")
    download = await site.rooms.download(key, transport.abort)
    try:
        if visit.method != hdrs.METH_HEAD:
            await note_look(site, visit, "artifact", name=name, job_id=asked.id)
        response = web.StreamResponse(headers=_headers(key))
        response.content_length = download.size
        await response.prepare(request)
        await _pass_on(response, download, visit)
        return response
    finally:
        download.leave()


async def _key(site: Web, visit: Visit, asked: Artifact) -> str | Refusal:
    """What names the object."""
    command = Get(id=asked.id) if asked.late_result is None else LateResults(id=asked.id)
    looked = await site.actor.ask(command, by=visit.by, size=visit.size)
    if isinstance(looked, Refusal):
        return looked
    named: JobView | LateResultView | None
    if asked.late_result is None:
        named, what = looked.data, f"Job {asked.id}"
    else:
        listed: LateResultList = looked.data
        named = next((late for late in listed.late_results if late.seq == asked.late_result), None)
        what = f"The late result {asked.late_result} of job {asked.id}"
        if named is None:
            message = f"{what} is not there (any more). See those that it has: jobctl late {asked.id}"
            return Refusal("late_result_not_found", message, {"job_id": asked.id})
    return named.storage_key or Refusal("not_found", f"{what} names no stored result: it has no storage_key.")


async def _pass_on(response: web.StreamResponse, download: Download, visit: Visit) -> None:
    try:
        while visit.method != hdrs.METH_HEAD and (piece := await download.more()):
            await write(response, piece)
        async with asyncio.timeout(PATIENCE_S):
            await response.write_eof()
    except Exception as error:
        if not (isinstance(error, ConnectionError) and visit.is_cut):  # then the client has enough
            told = str(error) if isinstance(error, StoreFault) else type(error).__name__
            log.warning("download_cut_off", job_id=visit.job_id, error=told)
        if visit.connection.transport is not None:
            visit.connection.transport.abort()
        raise ConnectionResetError("download cut off") from None


def _headers(key: str) -> dict[str, str]:
    return {
        "Content-Type": KIND,
        "Content-Disposition": disposition(key),
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Server": "jobd",
        **SAFE,
    }


def disposition(key: str) -> str:
    """What makes a browser keep a file under the last part of its key, whatever characters that has."""
    name = key.rpartition("/")[2][-SHOWN_NAME:].lstrip(".") or "artifact"
    plain = "".join(each if each.isascii() and (each.isalnum() or each in " ._-+") else "_" for each in name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='', errors='replace')}"
