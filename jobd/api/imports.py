"""Import jobs, one per line of the request body, and preview an import."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from typing import Any, Final

import msgspec
from msgspec import Struct, structs

from jobd.api.auditing import audit_action
from jobd.api.services import Services
from jobd.http.app import App
from jobd.http.decoding import RequestDecoder
from jobd.http.request import RequestContext, as_one_entry
from jobd.http.streaming import LineStream
from jobd.model.commands import Import, ImportCheck
from jobd.model.errors import SHUTTING_DOWN, ApiError, ApiException
from jobd.model.job import LIVE, is_job_id
from jobd.model.responses import (
    ImportCheckResult,
    Imported,
    ImportPreview,
    ImportResult,
    PreviewedLine,
    RejectedLine,
    Response,
)

AHEAD_LINES: Final = 64  # pending lines of one import
AHEAD_BYTES: Final = 4 << 20  # of pending lines
SHOWN_LINES: Final = 10_000  # of a preview
MAX_PREVIEW_LINES: Final = 1_000_000  # their ids are kept to find duplicates
SHOWN_REJECTIONS: Final = 1_000
# Errors that the next line would get as well. The import stops, and can be sent again later.
STOP_CODES: Final = frozenset(
    {"overloaded", "shutting_down", "not_leader", "outcome_unknown", "storage_full", "too_many_jobs"}
)


class _Id(Struct):
    id: str


class PendingLine(Struct):
    """A line whose command is pending."""

    line: int
    job_id: str
    size: int
    task: asyncio.Task[Response | ApiError]


async def import_jobs(app: App[Services], ctx: RequestContext, _: Any) -> Response | ApiError:
    """Import the lines of the body independently and in order: create, skip or reject each job."""
    ctx.send_continue()
    return await Importer(app, ctx).run()


class Importer:
    """One import. Lines are read while earlier ones are pending."""

    def __init__(self, app: App[Services], ctx: RequestContext) -> None:
        self._app = app
        self._ctx = ctx
        self._by = ctx.by
        self._operator = as_one_entry(ctx.operator)
        self._decoder = RequestDecoder(Import, None, app.limits)
        self._report = ImportResult()
        self._lines = 0
        self._pending: deque[PendingLine] = deque()
        self._bytes = 0
        self._stop: ApiError | None = None

    async def run(self) -> Response | ApiError:
        try:
            await self._read()
            await self._await_responses(0, 0)
        finally:
            for line in self._pending:
                line.task.cancel()
        return await self._result()

    async def _result(self) -> Response | ApiError:
        """Return the report, and record its counts in the audit entry of the created jobs."""
        report = self._report
        report.refused.sort(key=lambda rejected: rejected.line)
        counts = {"imported": report.imported, "skipped": report.skipped, "refused": report.refused_count}
        await audit_action(self._app, self._operator, "import", counts)
        return self._stop or Response(report)

    async def _read(self) -> None:
        try:
            async for line in LineStream(self._ctx, self._app.limits):
                if self._app.closing:
                    self._stop = self._stop or self._stop_error(SHUTTING_DOWN, self._lines + 1)
                    return
                self._lines += 1
                self._send(self._lines, line)
                await self._await_responses(AHEAD_LINES, AHEAD_BYTES)
                if self._stop is not None:
                    return
        except ApiException as rejected:
            await self._await_responses(0, 0)
            self._stop = self._stop or self._stop_error(rejected.error, self._lines + 1)

    def _send(self, number: int, line: bytes | None) -> None:
        if line is None:
            self._reject(number, None, f"The line is over {self._app.limits.body} bytes.")
            return
        if not line.strip():
            return
        try:
            command = self._decoder.from_body(line)
        except ApiException as rejected:
            self._reject(number, _id_of(line), rejected.error.message)
            return
        assert isinstance(command, Import)
        pending = self._submit(command, len(line))
        self._pending.append(PendingLine(number, command.id, len(line), asyncio.ensure_future(pending)))
        self._bytes += len(line)

    async def _await_responses(self, lines: int, size: int) -> None:
        """Wait for responses, oldest first, until at most `lines` lines of `size` bytes are pending."""
        while self._pending and (len(self._pending) > lines or self._bytes > size):
            first = self._pending.popleft()
            self._bytes -= first.size
            self._handle_response(first, await first.task)

    def _submit(self, command: Import, size: int) -> Coroutine[Any, Any, Response | ApiError]:
        return self._app.actor.ask(command, by=self._by, admin=True, size=size, operator=self._operator)

    def _reject(self, line: int, job_id: str | None, reason: str) -> None:
        self._report.refused_count += 1
        if len(self._report.refused) < SHOWN_REJECTIONS:
            self._report.refused.append(RejectedLine(line, job_id, reason))

    def _handle_response(self, line: PendingLine, response: Response | ApiError) -> None:
        if isinstance(response, Response):
            line_result: Imported = response.data
            self._report.skipped += line_result.skipped
            self._report.imported += not line_result.skipped
        elif response.code in STOP_CODES:
            self._stop = self._stop or self._stop_error(response, line.line)
        else:
            self._reject(line.line, line.job_id, response.message)

    def _stop_error(self, error: ApiError, line: int) -> ApiError:
        """Return the error of an import that stops early. Its jobs remain, and a second run skips them."""
        message = f"The import stopped at line {line}: {error.message} Send it again; existing jobs are skipped."
        return ApiError(error.code, message, {**error.details, "line": line})


def _id_of(line: bytes) -> str | None:
    """Return the id in an invalid line, for the report."""
    try:
        job_id = msgspec.json.decode(line, type=_Id).id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return job_id if is_job_id(job_id) else None


async def preview_import(app: App[Services], ctx: RequestContext, _: Any) -> Response | ApiError:
    """Preview an import. Nothing is written."""
    ctx.send_continue()
    return await _ImportPreviewer(app, ctx).run()


class _ImportPreviewer(Importer):
    """An import that only checks its lines."""

    def __init__(self, app: App[Services], ctx: RequestContext) -> None:
        super().__init__(app, ctx)
        self._preview = ImportPreview()
        self._first: dict[int, int] = {}  # hash of an id that would be created -> its first line
        self._live = 0

    async def _result(self) -> Response | ApiError:
        if self._stop is not None and self._preview.stops_at is None:
            return self._stop
        self._preview.lines.sort(key=lambda each: each.line)
        return Response(self._preview)

    def _submit(self, command: Import, size: int) -> Coroutine[Any, Any, Response | ApiError]:
        return self._app.actor.ask(ImportCheck(**structs.asdict(command)), by=self._by, admin=True, size=size)

    def _reject(self, line: int, job_id: str | None, reason: str) -> None:
        self._preview.would_reject += 1
        self._show(PreviewedLine(line, job_id, "reject", None, reason))

    def _handle_response(self, line: PendingLine, response: Response | ApiError) -> None:
        if self._stop is not None:
            return  # the import would have stopped before this line
        if isinstance(response, Response):
            self._preview_line(line, response.data)
        elif response.code == "too_many_jobs":
            self._stop_at(line.line, response)
        elif response.code in STOP_CODES:
            self._stop = self._stop_error(response, line.line)
        else:
            self._reject(line.line, line.job_id, response.message)

    def _preview_line(self, line: PendingLine, check: ImportCheckResult) -> None:
        if check.what == "create" and (first := self._first.get(hash(check.job_id))) is not None:
            reason = f"Line {first} has the same id."
            check = ImportCheckResult(check.job_id, "skip", None, reason, check.room)
        if check.what == "skip":
            self._preview.would_skip += 1
        elif check.status in LIVE and self._live >= check.room:
            self._stop_at(line.line, ApiError("too_many_jobs", "The limit of unfinished jobs would be reached."))
            return
        else:
            self._preview.would_import += 1
            self._live += check.status in LIVE
            self._first[hash(check.job_id)] = line.line
        self._show(PreviewedLine(line.line, check.job_id, check.what, check.status, check.reason))
        if len(self._first) > MAX_PREVIEW_LINES:
            message = f"A preview reads at most {MAX_PREVIEW_LINES} lines. Split the file."
            self._stop = ApiError("too_large", message, {"limit": MAX_PREVIEW_LINES})

    def _stop_at(self, line: int, error: ApiError) -> None:
        self._stop = error
        self._preview.stops_at, self._preview.stop_reason = line, error.message

    def _show(self, line: PreviewedLine) -> None:
        if len(self._preview.lines) < SHOWN_LINES:
            self._preview.lines.append(line)
        else:
            self._preview.more = True
