"""Send artifacts and backups piece by piece, as fast as the client reads.

Artifacts may contain anything, so their headers prevent browsers from rendering them.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Coroutine
from typing import Any, Final, TypeVar
from urllib.parse import quote

import structlog

from jobd.api.auditing import audit_action, audit_read
from jobd.api.services import Services
from jobd.http.http_app import HttpApp
from jobd.http.request import RequestContext
from jobd.http.response import SAFE_HEADERS
from jobd.http.streaming import finish, write
from jobd.maintenance.backups import Backup
from jobd.model.calls import DATABASE_TYPE, FILE_TYPE
from jobd.model.commands import Get, LateResults
from jobd.model.errors import ApiError
from jobd.model.requests import ArtifactRequest, BackupRequest
from jobd.model.responses import JobView, LateResultList, LateResultView
from jobd.model.storage import BackupError, DiskFull
from jobd.storage.artifacts.base import ArtifactStoreError
from jobd.storage.artifacts.downloads import Download

MAX_NAME_CHARS: Final = 150  # characters of a file name

log = structlog.get_logger("jobd.artifacts")


async def send_artifact(app: HttpApp[Services], ctx: RequestContext, query: Any, name: str = "") -> ApiError | None:
    """Send the requested artifact as a file. If reading it fails, abort the connection.

    `name` is the name of the operator, if the session has one.
    """
    key = await _key(app, ctx, query)
    if isinstance(key, ApiError):
        return key
    download = await app.services.downloads.start(key, ctx.abort)
    try:
        if ctx.method != "HEAD":
            await audit_read(app, ctx, "artifact", name=name, job_id=query.id)
        ctx.start(_headers(key), download.size)
        await _send_pieces(download, ctx)
        return None
    finally:
        download.close()


async def _key(app: HttpApp[Services], ctx: RequestContext, request: ArtifactRequest) -> str | ApiError:
    command = Get(id=request.id) if request.late_result is None else LateResults(id=request.id)
    response = await app.actor.ask(command, by=ctx.by, size=ctx.size)
    if isinstance(response, ApiError):
        return response
    view: JobView | LateResultView | None
    if request.late_result is None:
        view, subject = response.data, f"Job {request.id}"
    else:
        listed: LateResultList = response.data
        view = next((late for late in listed.late_results if late.seq == request.late_result), None)
        subject = f"The late result {request.late_result} of job {request.id}"
        if view is None:
            message = (
                f"{subject} does not exist or was deleted. List the late results of the job: jobctl late {request.id}"
            )
            return ApiError("late_result_not_found", message, {"job_id": request.id})
    return view.storage_key or ApiError("not_found", f"{subject} has no artifact: its storage_key is not set.")


async def _send_pieces(download: Download, ctx: RequestContext) -> None:
    try:
        while ctx.method != "HEAD" and (piece := await download.more()):
            await write(ctx, piece)
        await finish(ctx)
    except Exception as error:
        if not (isinstance(error, ConnectionError) and ctx.is_disconnected):  # the client has disconnected
            reason = str(error) if isinstance(error, ArtifactStoreError) else type(error).__name__
            log.warning("download_cut_off", job_id=ctx.job_id, error=reason)
        ctx.abort()
        raise ConnectionResetError("download cut off") from None


def _headers(key: str) -> dict[str, str]:
    return {
        "Content-Type": FILE_TYPE,
        "Content-Disposition": disposition(key),
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "Cross-Origin-Resource-Policy": "same-origin",
        **SAFE_HEADERS,
    }


def disposition(key: str) -> str:
    """Return a Content-Disposition with the last part of the key as the file name."""
    name = key.rpartition("/")[2][-MAX_NAME_CHARS:].lstrip(".") or "artifact"
    ascii_name = "".join(each if each.isascii() and (each.isalnum() or each in " ._-+") else "_" for each in name)
    return f"attachment; filename=\"{ascii_name}\"; filename*=UTF-8''{quote(name, safe='', errors='replace')}"


CONNECTION_CHECK_S: Final = 0.5  # between two checks of the connection of a client that waits for a backup
T = TypeVar("T")


async def send_backup(app: HttpApp[Services], ctx: RequestContext, request: BackupRequest) -> ApiError | None:
    """Make a backup, then send it. If sending fails, abort the connection."""
    await audit_action(app, ctx.operator, "backup")
    log.info("backup_started", by="admin")
    try:
        copy = await _while_connected(app, ctx, app.services.backups.begin(request.id or secrets.token_hex(8)))
    except DiskFull as full:
        return ApiError("storage_full", f"No backup: {full}. Free some space and try again.")
    except BackupError as error:
        log.error("no backup", reason=str(error))
        return ApiError("shutting_down" if app.closing else "internal_error", f"No backup: {error}.")
    if isinstance(copy, ApiError):
        return copy
    failure: str | None = "the client did not read all of it"
    try:
        ctx.start({"Content-Type": DATABASE_TYPE, **SAFE_HEADERS}, copy.size)
        await _send_backup(copy, ctx)
        failure = None
        return None
    finally:
        copy.close(failure)


async def _while_connected(app: HttpApp[Services], ctx: RequestContext, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`. Cancel it if the client disconnects or the daemon stops."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            if ctx.is_disconnected:
                raise ConnectionResetError("the client has disconnected")
            if app.closing:
                raise BackupError("the daemon is stopping")
            await asyncio.wait([task], timeout=CONNECTION_CHECK_S)
    finally:
        task.cancel()
        await asyncio.wait([task])
    return task.result()


async def _send_backup(copy: Backup, ctx: RequestContext) -> None:
    remaining = copy.size
    try:
        while remaining > 0 and (piece := await copy.read()):
            remaining -= len(piece)
            await write(ctx, piece)
        with contextlib.suppress(ConnectionError):  # a client that has received everything may disconnect
            await finish(ctx)
    except Exception as error:
        log.error("backup cut off", error=type(error).__name__)
        ctx.abort()
        raise ConnectionResetError("backup cut off") from None
