"""What does not fit into one message: an import comes in line by line, a backup goes out piece by piece.

Decides nothing about jobs: each line is one command to the actor.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import deque
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

import msgspec
import structlog
from aiohttp import web
from msgspec import Struct

from jobd.answers import Answer, Imported
from jobd.batch import DiskFull, NoBackup
from jobd.bodies import Limits, Refused, Shape, refused
from jobd.commands import BackupId, Command, Import, Refusal
from jobd.job import is_job_id
from jobd.replies import PATIENCE_S, SAFE
from jobd.visits import Request, Visit, in_parts
from jobd.web import Copy, Web, note, welcome

AHEAD_LINES: Final = 64  # commands of one import that wait for their commit at the same time
AHEAD_BYTES: Final = 4 << 20
SHOWN_REFUSALS: Final = 1_000
LOOK_S: Final = 0.5  # between two looks whether the client of a backup is still there
BACKUP_KIND: Final = "application/vnd.sqlite3"
# Refusals that the next line would meet as well: the import stops there, and can be sent again later.
STOPPING: Final = frozenset({"overloaded", "shutting_down", "outcome_unknown", "storage_full", "too_many_jobs"})

T = TypeVar("T")

log = structlog.get_logger("jobd.web")


class RefusedLine(Struct, frozen=True):
    """`line` counts from 1; `id` is null where the line does not tell it."""

    line: int
    id: str | None
    reason: str


class ImportReport(Struct, rename="camel"):
    """What became of an import. `refused` shows the first SHOWN_REFUSALS of them, `refused_count` counts all."""

    imported: int = 0
    skipped: int = 0
    refused_count: int = 0
    refused: list[RefusedLine] = []

    def refuse(self, line: int, job_id: str | None, reason: str) -> None:
        self.refused_count += 1
        if len(self.refused) < SHOWN_REFUSALS:
            self.refused.append(RefusedLine(line, job_id, reason))


class _Id(Struct):
    id: str


class Ahead(Struct):
    """A line on its way through the actor."""

    line: int
    job_id: str
    size: int
    task: asyncio.Task[Answer | Refusal]


class Lines:
    """The lines of a stream without their ends; None in place of one that is over `limits.body` bytes.

    `rests`: between two lines there may be any time. Raises Refused where a line does not arrive within its deadline
    (408), the framing of the stream is broken (400), or the stream ended too early (400, after its lines).
    """

    def __init__(self, request: Request, limits: Limits, *, rests: bool = False) -> None:
        self._request = request
        self._content = request.content
        self._limits = limits
        self._rests = rests
        self._buffer = bytearray()
        self._is_over = False
        self._is_last = False

    def __aiter__(self) -> Lines:
        return self

    async def __anext__(self) -> bytes | None:
        if not self._has_line():
            await self._fill()
        if self._is_last and self._request.is_truncated:
            message = (
                "The stream ended too early. The bytes after the last line feed were not read. Send that line again."
            )
            raise refused("invalid_request", message)
        if self._is_last and not self._buffer:
            raise StopAsyncIteration
        end = self._buffer.find(b"\n")
        line = bytes(self._buffer if end < 0 else self._buffer[:end])
        del self._buffer[: len(line) + 1]
        is_over = self._is_over or len(line) > self._limits.body
        self._is_over = False
        return None if is_over else line

    def _has_line(self) -> bool:
        return self._is_last or b"\n" in self._buffer

    async def _fill(self) -> None:
        """Until a whole line has come, or the rest."""
        try:
            if self._rests and not self._buffer:
                await self._take_piece()
            async with asyncio.timeout(self._limits.body_deadline_s):
                while not self._has_line():
                    if len(self._buffer) > self._limits.body:
                        self._is_over = True
                        self._buffer.clear()
                    await self._take_piece()
        except TimeoutError:
            message = f"No whole line arrived within {self._limits.body_deadline_s:g} s."
            raise refused("request_timeout", message) from None
        except web.RequestPayloadError:
            raise refused("invalid_request", "The stream is broken: its chunks or its length are wrong.") from None

    async def _take_piece(self) -> None:
        piece = await self._content.readany()
        self._buffer += piece
        self._is_last = not piece


async def take_in(site: Web, visit: Visit, _: Any) -> Answer | Refusal:
    """Import: each line of the body is created, skipped or refused by itself, in the order of the lines."""
    welcome(visit)
    return await Importing(site, visit).run()


class Importing:
    """One import: a few lines are on their way through the actor while the next ones are read."""

    def __init__(self, site: Web, visit: Visit) -> None:
        self._site = site
        assert visit.request is not None
        self._request = visit.request
        self._by = visit.by
        self._operator = in_parts(visit.operator)
        self._shape = Shape(Import, None, site.limits)
        self._report = ImportReport()
        self._lines = 0
        self._ahead: deque[Ahead] = deque()
        self._bytes = 0
        self._stop: Refusal | None = None

    async def run(self) -> Answer | Refusal:
        try:
            await self._read()
            await self._settle(0, 0)
            self._report.refused.sort(key=lambda no: no.line)
            await self._note()
            return self._stop or Answer(self._report)
        finally:
            for ahead in self._ahead:
                ahead.task.cancel()

    async def _note(self) -> None:
        """The lines that made jobs are one row of the audit log already; it is told what became of the others."""
        report = self._report
        counts = {"imported": report.imported, "skipped": report.skipped, "refused": report.refused_count}
        await note(self._site, self._operator, "import", counts)

    async def _read(self) -> None:
        try:
            async for line in Lines(self._request, self._site.limits):
                self._lines += 1
                self._send(self._lines, line)
                await self._settle(AHEAD_LINES, AHEAD_BYTES)
                if self._stop is not None:
                    return
        except Refused as no:
            await self._settle(0, 0)
            self._stop = self._stop or self._stopped(no.refusal, self._lines + 1)

    def _send(self, number: int, line: bytes | None) -> None:
        if line is None:
            self._refuse(number, None, f"The line is over {self._site.limits.body} bytes.")
            return
        if not line.strip():
            return
        try:
            command = self._shape.from_body(line)
        except Refused as no:
            self._refuse(number, _id_of(line), no.refusal.message)
            return
        assert isinstance(command, Import)
        asked = self._asked(command, len(line))
        self._ahead.append(Ahead(number, command.id, len(line), asyncio.ensure_future(asked)))
        self._bytes += len(line)

    async def _settle(self, lines: int, size: int) -> None:
        """Take answers, oldest first, until at most `lines` lines of `size` bytes are on their way."""
        while self._ahead and (len(self._ahead) > lines or self._bytes > size):
            first = self._ahead.popleft()
            self._bytes -= first.size
            self._count(first, await first.task)

    def _asked(self, command: Import, size: int) -> Coroutine[Any, Any, Answer | Refusal]:
        return self._site.actor.ask(command, by=self._by, admin=True, size=size, operator=self._operator)

    def _refuse(self, line: int, job_id: str | None, reason: str) -> None:
        self._report.refuse(line, job_id, reason)

    def _count(self, line: Ahead, answer: Answer | Refusal) -> None:
        if isinstance(answer, Answer):
            done: Imported = answer.data
            self._report.skipped += done.skipped
            self._report.imported += not done.skipped
        elif answer.code in STOPPING:
            self._stop = self._stop or self._stopped(answer, line.line)
        else:
            self._refuse(line.line, line.job_id, answer.message)

    def _stopped(self, why: Refusal, line: int) -> Refusal:
        """The import ends early: what has been done stays, and a second run skips it."""
        message = f"The import stopped at line {line}: {why.message} Send it again; what is there already is skipped."
        return Refusal(why.code, message, {**why.details, "line": line})


def _id_of(line: bytes) -> str | None:
    """The id in a line that is no job, for the report."""
    try:
        job_id = msgspec.json.decode(line, type=_Id).id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return job_id if is_job_id(job_id) else None


class BackupAsked(Command, frozen=True, kw_only=True):
    """Under `id` its progress is told, beside this call."""

    id: BackupId | None = None


async def give_out(site: Web, visit: Visit, asked: BackupAsked) -> web.StreamResponse | Refusal:
    """Backup: copied and checked, then the pieces. Where they stop half-way the connection is cut: the client knows."""
    await note(site, visit.operator, "backup")
    try:
        copy = await _while_there(site, visit, site.rooms.backup(asked.id or secrets.token_hex(8)))
    except DiskFull as full:
        return Refusal("storage_full", f"No backup: {full}. Free some and try again.")
    except NoBackup as why:
        log.error("no backup", reason=str(why))
        return Refusal("shutting_down" if site.closing else "internal_error", f"No backup: {why}.")
    if isinstance(copy, Refusal):
        return copy
    left: str | None = "it was not read to its end"
    try:
        response = web.StreamResponse(headers={"Content-Type": BACKUP_KIND, "Server": "jobd", **SAFE})
        response.content_length = copy.size
        assert visit.request is not None
        await response.prepare(visit.request)
        await _pass_on(response, copy, visit)
        left = None
        return response
    finally:
        copy.leave(left)


async def _while_there(site: Web, visit: Visit, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives. It is given up when the client goes away, or the daemon stops: neither waits for minutes."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            if visit.is_cut:
                raise ConnectionResetError("the client is gone")
            if site.closing:
                raise NoBackup("the daemon is stopping")
            await asyncio.wait([task], timeout=LOOK_S)
    finally:
        task.cancel()
        await asyncio.wait([task])
    return task.result()


async def _pass_on(response: web.StreamResponse, copy: Copy, visit: Visit) -> None:
    transport = visit.connection.transport
    left = copy.size
    try:
        while left > 0 and (piece := await copy.more()):
            left -= len(piece)
            await write(response, piece)
        with contextlib.suppress(ConnectionError):  # who has all of it may hang up at once
            await _drain(visit)
            await finish(response)
    except Exception as error:
        log.error("backup cut off", error=type(error).__name__)
        if transport is not None:
            transport.abort()
        raise ConnectionResetError("backup cut off") from None


async def _drain(visit: Visit) -> None:
    """Wait until all is out: an answer with a length has no end of its own that would be waited for."""
    assert visit.request is not None
    async with asyncio.timeout(PATIENCE_S):
        await visit.request.writer.drain()


def notice_hangup(request: Request, response: web.StreamResponse) -> None:
    """Let the connection send a comment when the client of these events stops sending: a closed client resets it."""
    request.probe = b"3\r\n:\n\n\r\n" if response.chunked else b":\n\n"


async def write(response: web.StreamResponse, piece: bytes) -> None:
    """Send `piece`; a client that does not read is waited for, but not for ever."""
    async with asyncio.timeout(PATIENCE_S):
        await response.write(piece)


async def finish(response: web.StreamResponse) -> None:
    """Send the end; the client may have to read much before that is out."""
    async with asyncio.timeout(PATIENCE_S):
        await response.write_eof()
