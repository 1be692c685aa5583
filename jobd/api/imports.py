"""Import jobs, one per line of the request body, and preview an import."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Final

import msgspec
from msgspec import Struct

from jobd.api.auditing import audit_action
from jobd.api.services import Services
from jobd.http.decoding import RequestDecoder
from jobd.http.http_app import HttpApp
from jobd.http.request import RequestContext, as_one_entry
from jobd.http.streaming import LineStream
from jobd.model.commands import Import, ImportCheck
from jobd.model.errors import SHUTTING_DOWN, ApiError, ApiException
from jobd.model.job import LIVE, is_job_id
from jobd.model.responses import Imported, ImportPreview, ImportResult, PreviewedLine, RejectedLine, Response

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


async def import_jobs(app: HttpApp[Services], ctx: RequestContext, _: Any) -> Response | ApiError:
    """Import the lines of the body independently and in order: create, skip or reject each job."""
    ctx.send_continue()
    return await Importer(app, ctx, Import).run()


async def preview_import(app: HttpApp[Services], ctx: RequestContext, _: Any) -> Response | ApiError:
    """Preview an import, whose lines are dry runs."""
    ctx.send_continue()
    return await Importer(app, ctx, ImportCheck).run()


class Importer:
    """One import, or its preview. Lines are read while earlier ones are pending.

    A dry run of a line does not see the lines before it, so a preview remembers what they would create.
    """

    def __init__(self, app: HttpApp[Services], ctx: RequestContext, command: type[Import]) -> None:
        self._app = app
        self._ctx = ctx
        self._is_preview = command is ImportCheck
        self._operator = None if self._is_preview else as_one_entry(ctx.operator)
        self._decoder = RequestDecoder(command, None, app.limits)
        self._report = ImportPreview()
        self._first: dict[int, int] = {}  # hash of an id that a preview would create -> its first line
        self._live = 0  # unfinished jobs that it would create
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
        """Return the report. Record the counts of an import in the audit entry of the created jobs."""
        report = self._report
        report.lines.sort(key=lambda each: each.line)
        if self._is_preview:
            return self._stop if self._stop is not None and report.stops_at is None else Response(report)
        imported, skipped, rejected = report.would_import, report.would_skip, report.would_reject
        counts = {"imported": imported, "skipped": skipped, "refused": rejected}
        await audit_action(self._app, self._operator, "import", counts)
        lines = [RejectedLine(each.line, each.id, each.reason or "") for each in report.lines]
        return self._stop or Response(ImportResult(imported, skipped, rejected, lines))

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
        call = self._app.actor.ask(command, by=self._ctx.by, admin=True, size=len(line), operator=self._operator)
        self._pending.append(PendingLine(number, command.id, len(line), asyncio.ensure_future(call)))
        self._bytes += len(line)

    async def _await_responses(self, lines: int, size: int) -> None:
        """Wait for responses, oldest first, until at most `lines` lines of `size` bytes are pending."""
        while self._pending and (len(self._pending) > lines or self._bytes > size):
            first = self._pending.popleft()
            self._bytes -= first.size
            self._handle_response(first, await first.task)

    def _handle_response(self, line: PendingLine, response: Response | ApiError) -> None:
        if self._is_preview and self._stop is not None:
            return  # the import would have stopped before this line
        if isinstance(response, Response):
            self._count(line.line, response.data)
        elif response.code == "too_many_jobs" and self._is_preview:
            self._stop_at(line.line, response)
        elif response.code in STOP_CODES:
            self._stop = self._stop or self._stop_error(response, line.line)
        else:
            self._reject(line.line, line.job_id, response.message)

    def _count(self, line: int, done: Imported) -> None:
        report, status, reason = self._report, done.status, done.reason
        is_skipped, is_live = done.skipped, status in LIVE
        if self._is_preview and not is_skipped:
            if (first := self._first.setdefault(hash(done.job_id), line)) != line:
                is_skipped, status, reason = True, None, f"Line {first} has the same id."
            elif is_live and self._live >= done.room:
                return self._stop_at(line, ApiError("too_many_jobs", "The limit of unfinished jobs would be reached."))
            elif len(self._first) > MAX_PREVIEW_LINES:
                message = f"A preview reads at most {MAX_PREVIEW_LINES} lines. Split the file."
                self._stop = ApiError("too_large", message, {"limit": MAX_PREVIEW_LINES})
            else:
                self._live += is_live
        report.would_skip += is_skipped
        report.would_import += not is_skipped
        if self._is_preview:
            self._show(PreviewedLine(line, done.job_id, "skip" if is_skipped else "create", status, reason))

    def _reject(self, line: int, job_id: str | None, reason: str) -> None:
        self._report.would_reject += 1
        self._show(PreviewedLine(line, job_id, "reject", None, reason))

    def _show(self, line: PreviewedLine) -> None:
        if len(self._report.lines) < (SHOWN_LINES if self._is_preview else SHOWN_REJECTIONS):
            self._report.lines.append(line)
        else:
            self._report.more = True

    def _stop_at(self, line: int, error: ApiError) -> None:
        self._stop = error
        self._report.stops_at, self._report.stop_reason = line, error.message

    def _stop_error(self, error: ApiError, line: int) -> ApiError:
        """Return the error of an import that stops early. Its jobs remain, and a second run skips them."""
        message = f"The import stopped at line {line}: {error.message} Send it again; existing jobs are skipped."
        return ApiError(error.code, message, {**error.details, "line": line})


def _id_of(line: bytes) -> str | None:
    try:
        job_id = msgspec.json.decode(line, type=_Id).id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return job_id if is_job_id(job_id) else None
