"""What the forms of pages do that are about no job: queues, cleanup, the clock.

Asks for it, and says on the next page what came of it. What would be done is shown first where nobody can tell.
"""

from __future__ import annotations

from typing import Final, Literal
from urllib.parse import urlencode

from jobd.dashboard.context import ReasonForm, Viewer, redirect_with_flash
from jobd.dashboard.pages import PAUSED_QUEUES, PageData, banners, query
from jobd.http.request import as_one_entry
from jobd.model.commands import Command, Pause, Resume, TakeBack
from jobd.model.errors import ApiError, ApiException
from jobd.model.job import QueueName, Worker
from jobd.model.responses import Response

MAX_LISTED: Final = 50  # jobs of each kind
PREVIEW_S: Final = 0.01  # for jobs that are wrong: a page does not wait until all were looked at
PREVIEW_LIMIT: Final = 1_000  # that a preview has of each kind
MAX_CLOCK_JOBS: Final = 50  # jobs that the page about the clock names
LABELS: Final = {"run": "Run a cleanup pass", "recover": "Recover stuck jobs"}


class QueueForm(ReasonForm, frozen=True, kw_only=True):
    """`cursor`: of the page of queues from which it is asked for."""

    name: QueueName
    cursor: QueueName | None = None
    for_ms: Literal["", "900000", "3600000", "14400000", "86400000"] = ""


async def pause_queue(viewer: Viewer, asked: QueueForm) -> Response | ApiError:
    until = viewer.now + int(asked.for_ms) if asked.for_ms else None
    command = Pause(name=asked.name, reason=asked.reason_or_none, until=until)
    return await _change_queue(viewer, asked, command, f"Queue {asked.name} is paused.")


async def resume_queue(viewer: Viewer, asked: QueueForm) -> Response | ApiError:
    return await _change_queue(
        viewer,
        asked,
        Resume(name=asked.name, reason=asked.reason_or_none),
        f"Queue {asked.name} hands out its jobs again.",
    )


async def _change_queue(viewer: Viewer, asked: QueueForm, command: Command, message: str) -> Response | ApiError:
    done = await viewer.ask(command)
    place = f"/queues?{urlencode({'cursor': asked.cursor})}" if asked.cursor else "/queues"
    return done if isinstance(done, ApiError) else redirect_with_flash(viewer, place, message)


class CleanupConfirmQuery(Command, frozen=True, kw_only=True):
    what: Literal["run", "recover"]


async def confirm_cleanup(viewer: Viewer, asked: CleanupConfirmQuery) -> PageData:
    """What a pass, or recovery, would do now. It is done by the form on that page."""
    services = viewer.app.services
    seen = await services.maintainer.preview(PREVIEW_S if asked.what == "run" else 0)
    if isinstance(seen, ApiError):
        raise ApiException(seen)
    [paused] = await query(viewer, PAUSED_QUEUES)
    failed = sum(each.action == "failed" for each in seen.recover)
    passed = asked.what == "run" and (seen.expired_jobs or seen.deleted_jobs or seen.mended_jobs)
    return {
        "what": asked.what,
        "label": LABELS[asked.what],
        "preview": seen,
        "failed": failed,
        "requeued": len(seen.recover) - failed,
        "has_changes": bool(seen.recover or seen.expired_locks or passed),
        "destructive": bool(failed or passed),
        "more_stuck": len(seen.recover) >= PREVIEW_LIMIT,
        "max_listed": MAX_LISTED,
        "preview_limit": PREVIEW_LIMIT,
        "clock": services.clock_view(),
        **banners(viewer, paused),
    }


async def run_cleanup(viewer: Viewer, asked: ReasonForm) -> Response:
    await viewer.record_audit("cleanup", reason=asked.reason_or_none)
    report = await viewer.app.services.maintainer.run_cleanup(forced=True)
    message = (
        f"The pass took {report.total_processing_time} ms: {report.stuck_jobs_recovered} recovered, "
        f"{report.expired_jobs_deleted} deleted, {report.validation_issues_fixed} issues fixed."
    )
    return redirect_with_flash(viewer, "/cleanup", message)


async def recover_stuck(viewer: Viewer, asked: ReasonForm) -> Response | ApiError:
    done = await viewer.app.services.maintainer.recover_stuck(as_one_entry(viewer.visit.operator), asked.reason_or_none)
    if isinstance(done, ApiError):
        return done
    message = f"{done.recovered_jobs} stuck jobs recovered: {done.reset_jobs} queued again, {done.failed_jobs} failed."
    return redirect_with_flash(viewer, "/cleanup", message)


class TakeBackQuery(Command, frozen=True, kw_only=True):
    name: Worker


class TakeBackForm(ReasonForm, frozen=True, kw_only=True):
    name: Worker


async def confirm_take_back(viewer: Viewer, asked: TakeBackQuery) -> PageData:
    """Preview a take-back. The form on the page does it."""
    seen = await viewer.app.services.maintainer.take_back(
        TakeBack(name=asked.name, dry_run=True), viewer.visit.operator
    )
    [paused] = await query(viewer, PAUSED_QUEUES)
    is_refused = isinstance(seen, ApiError)
    shown: PageData = {"refusal": seen, "status": seen.status} if isinstance(seen, ApiError) else {}
    return {
        "name": asked.name,
        "preview": None if is_refused else seen,
        "max_listed": MAX_LISTED,
        **shown,
        **banners(viewer, paused),
    }


async def take_back(viewer: Viewer, asked: TakeBackForm) -> Response | ApiError:
    command = TakeBack(name=asked.name, reason=asked.reason_or_none)
    done = await viewer.app.services.maintainer.take_back(command, as_one_entry(viewer.visit.operator))
    if isinstance(done, ApiError):
        return done
    message = f"Jobs taken back: {done.recovered_jobs} ({done.reset_jobs} queued again, {done.failed_jobs} failed)."
    return redirect_with_flash(viewer, "/workers", message)


async def confirm_clock(viewer: Viewer) -> PageData:
    """Preview what deletion by age would do once the clock is accepted. Raise ApiException if it takes no reads."""
    [paused] = await query(viewer, PAUSED_QUEUES)
    seen = await viewer.app.services.maintainer.preview(0)
    held = [] if isinstance(seen, ApiError) else seen.held_jobs
    return {
        "clock": viewer.app.services.clock_view(),
        "count": len(held),
        "is_more": not isinstance(seen, ApiError) and seen.more_held,
        "named": held[:MAX_CLOCK_JOBS],
        "error": seen.message if isinstance(seen, ApiError) else "",
        **banners(viewer, paused),
    }


async def accept_clock(viewer: Viewer, asked: ReasonForm) -> Response | ApiError:
    view = await viewer.app.services.accept_clock()
    if isinstance(view, ApiError):
        return view
    await viewer.record_audit("accept-clock", reason=asked.reason_or_none)
    return redirect_with_flash(viewer, "/alerts", "The clock is accepted. Jobs are deleted and failed by age again.")
