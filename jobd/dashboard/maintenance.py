"""Handle the forms for queues, cleanup, recovery, take-backs and the clock, and the pages that confirm them."""

from __future__ import annotations

from typing import Final, Literal
from urllib.parse import urlencode

from jobd.api import operator_actions
from jobd.dashboard.context import ReasonForm, Viewer, redirect_with_flash
from jobd.dashboard.pages import PageData
from jobd.http.request import as_one_entry
from jobd.model.commands import Command, Pause, Resume, TakeBack
from jobd.model.errors import ApiError, checked
from jobd.model.fields import QueueName, WorkerName
from jobd.model.responses import Response

MAX_LISTED: Final = 50  # jobs of each kind
PREVIEW_S: Final = 0.01  # time limit of the scan for invalid jobs
PREVIEW_LIMIT: Final = 1_000  # jobs of each kind in a preview
MAX_CLOCK_JOBS: Final = 50
LABELS: Final = {"run": "Run cleanup", "recover": "Recover stalled jobs"}


class QueueForm(ReasonForm, frozen=True, kw_only=True):
    """`cursor` is that of the page that contains the form."""

    name: QueueName
    cursor: QueueName | None = None
    for_ms: Literal["", "900000", "3600000", "14400000", "86400000"] = ""


async def pause_queue(viewer: Viewer, form: QueueForm) -> Response:
    until = viewer.now + int(form.for_ms) if form.for_ms else None
    command = Pause(name=form.name, reason=form.reason_or_none, until=until)
    return await _change_queue(viewer, form, command, f"Queue {form.name} is paused.")


async def resume_queue(viewer: Viewer, form: QueueForm) -> Response:
    command = Resume(name=form.name, reason=form.reason_or_none)
    return await _change_queue(viewer, form, command, f"Queue {form.name} is resumed.")


async def _change_queue(viewer: Viewer, form: QueueForm, command: Command, message: str) -> Response:
    checked(await viewer.ask(command))
    url = f"/queues?{urlencode({'cursor': form.cursor})}" if form.cursor else "/queues"
    return redirect_with_flash(viewer, url, message)


class CleanupConfirmQuery(Command, frozen=True, kw_only=True):
    what: Literal["run", "recover"]


async def confirm_cleanup(viewer: Viewer, confirmation: CleanupConfirmQuery) -> PageData:
    """Preview a cleanup run or a recovery. The form on the page runs it."""
    services = viewer.app.services
    preview = checked(await services.maintainer.preview(PREVIEW_S if confirmation.what == "run" else 0))
    failed = sum(each.action == "failed" for each in preview.recover)
    by_cleanup = confirmation.what == "run" and (preview.overdue_jobs or preview.deleted_jobs or preview.invalid_jobs)
    return {
        "what": confirmation.what,
        "label": LABELS[confirmation.what],
        "preview": preview,
        "failed": failed,
        "requeued": len(preview.recover) - failed,
        "has_changes": bool(preview.recover or preview.expired_locks or by_cleanup),
        "destructive": bool(failed or by_cleanup),
        "more_stalled": len(preview.recover) >= PREVIEW_LIMIT,
        "max_listed": MAX_LISTED,
        "preview_limit": PREVIEW_LIMIT,
        "clock": services.clock_view(),
    }


async def run_cleanup(viewer: Viewer, form: ReasonForm) -> Response:
    report = await operator_actions.run_cleanup(viewer.app, viewer.context.operator, form.reason_or_none)
    message = (
        f"Cleanup took {report.total_processing_time} ms: {report.stuck_jobs_recovered} recovered, "
        f"{report.expired_jobs_deleted} deleted, {report.validation_issues_fixed} issues fixed."
    )
    return redirect_with_flash(viewer, "/cleanup", message)


async def recover_stuck(viewer: Viewer, form: ReasonForm) -> Response:
    operator = as_one_entry(viewer.context.operator)
    result = checked(await viewer.app.services.maintainer.recover_stuck(operator, form.reason_or_none))
    message = (
        f"Stalled jobs recovered: {result.recovered_jobs} ({result.reset_jobs} requeued, {result.failed_jobs} failed)."
    )
    return redirect_with_flash(viewer, "/cleanup", message)


class TakeBackQuery(Command, frozen=True, kw_only=True):
    name: WorkerName


class TakeBackForm(ReasonForm, frozen=True, kw_only=True):
    name: WorkerName


async def confirm_take_back(viewer: Viewer, confirmation: TakeBackQuery) -> PageData:
    """Preview a take-back. The form on the page runs it."""
    command = TakeBack(name=confirmation.name, dry_run=True)
    preview = await viewer.app.services.maintainer.take_back(command, viewer.context.operator)
    data: PageData = {"name": confirmation.name, "max_listed": MAX_LISTED}
    if isinstance(preview, ApiError):
        return {**data, "preview": None, "api_error": preview, "status": preview.status}
    return {**data, "preview": preview}


async def take_back(viewer: Viewer, form: TakeBackForm) -> Response:
    command = TakeBack(name=form.name, reason=form.reason_or_none)
    operator = as_one_entry(viewer.context.operator)
    result = checked(await viewer.app.services.maintainer.take_back(command, operator))
    message = f"Jobs taken back: {result.recovered_jobs} ({result.reset_jobs} requeued, {result.failed_jobs} failed)."
    return redirect_with_flash(viewer, "/workers", message)


async def confirm_clock(viewer: Viewer, _: Command) -> PageData:
    """Preview which jobs would be deleted by age once the clock is accepted."""
    preview = await viewer.app.services.maintainer.preview(0)
    job_ids = [] if isinstance(preview, ApiError) else preview.kept_jobs
    return {
        "clock": viewer.app.services.clock_view(),
        "count": len(job_ids),
        "is_more": not isinstance(preview, ApiError) and preview.more_kept,
        "named": job_ids[:MAX_CLOCK_JOBS],
        "error": preview.message if isinstance(preview, ApiError) else "",
    }


async def accept_clock(viewer: Viewer, form: ReasonForm) -> Response:
    await operator_actions.accept_clock(viewer.app, viewer.context.operator, form.reason_or_none)
    return redirect_with_flash(viewer, "/alerts", "The clock is accepted. Jobs are expired and deleted by age again.")
