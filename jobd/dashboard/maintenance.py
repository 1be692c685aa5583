"""What the forms of pages do that are about no job: queues, cleanup, the clock.

Asks for it, and says on the next page what came of it. What would be done is shown first where nobody can tell.
"""

from __future__ import annotations

from typing import Final, Literal
from urllib.parse import urlencode

from jobd.dashboard.context import Guest, ReasonForm, go_on
from jobd.dashboard.pages import PAUSED, Shown, query, strip
from jobd.http.request import in_parts
from jobd.model.commands import Command, Pause, Resume, TakeBack
from jobd.model.errors import ApiError, ApiException
from jobd.model.job import QueueName, Worker
from jobd.model.responses import Response

MOST_SHOWN: Final = 50  # jobs of each kind
LOOK_S: Final = 0.01  # for jobs that are wrong: a page does not wait until all were looked at
MOST_SEEN: Final = 1_000  # that a preview has of each kind
MOST_NAMED: Final = 50  # jobs that the page about the clock names
LABELS: Final = {"run": "Run a cleanup pass", "recover": "Recover stuck jobs"}


class QueueForm(ReasonForm, frozen=True, kw_only=True):
    """`cursor`: of the page of queues from which it is asked for."""

    name: QueueName
    cursor: QueueName | None = None
    for_ms: Literal["", "900000", "3600000", "14400000", "86400000"] = ""


async def pause(guest: Guest, asked: QueueForm) -> Response | ApiError:
    until = guest.now + int(asked.for_ms) if asked.for_ms else None
    command = Pause(name=asked.name, reason=asked.why, until=until)
    return await _on_queue(guest, asked, command, f"Queue {asked.name} is paused.")


async def resume(guest: Guest, asked: QueueForm) -> Response | ApiError:
    return await _on_queue(
        guest, asked, Resume(name=asked.name, reason=asked.why), f"Queue {asked.name} hands out its jobs again."
    )


async def _on_queue(guest: Guest, asked: QueueForm, command: Command, message: str) -> Response | ApiError:
    done = await guest.ask(command)
    place = f"/queues?{urlencode({'cursor': asked.cursor})}" if asked.cursor else "/queues"
    return done if isinstance(done, ApiError) else go_on(guest, place, message)


class ChorePage(Command, frozen=True, kw_only=True):
    what: Literal["run", "recover"]


async def confirm(guest: Guest, asked: ChorePage) -> Shown:
    """What a pass, or recovery, would do now. It is done by the form on that page."""
    rooms = guest.site.rooms
    seen = await rooms.preview(LOOK_S if asked.what == "run" else 0)
    if isinstance(seen, ApiError):
        raise ApiException(seen)
    [paused] = await query(guest, PAUSED)
    failed = sum(each.action == "failed" for each in seen.recover)
    passed = asked.what == "run" and (seen.expired_jobs or seen.deleted_jobs or seen.mended_jobs)
    return {
        "what": asked.what,
        "label": LABELS[asked.what],
        "seen": seen,
        "failed": failed,
        "back": len(seen.recover) - failed,
        "is_something": bool(seen.recover or seen.expired_locks or passed),
        "is_grave": bool(failed or passed),
        "is_cut": len(seen.recover) >= MOST_SEEN,
        "most": MOST_SHOWN,
        "most_seen": MOST_SEEN,
        "clock": rooms.clock(),
        **strip(guest, paused),
    }


async def run_cleanup(guest: Guest, asked: ReasonForm) -> Response:
    await guest.note("cleanup", reason=asked.why)
    report = await guest.site.rooms.run_cleanup(forced=True)
    message = (
        f"The pass took {report.total_processing_time} ms: {report.stuck_jobs_recovered} recovered, "
        f"{report.expired_jobs_deleted} deleted, {report.validation_issues_fixed} issues fixed."
    )
    return go_on(guest, "/cleanup", message)


async def recover(guest: Guest, asked: ReasonForm) -> Response | ApiError:
    done = await guest.site.rooms.recover_stuck(in_parts(guest.visit.operator), asked.why)
    if isinstance(done, ApiError):
        return done
    message = f"{done.recovered_jobs} stuck jobs recovered: {done.reset_jobs} queued again, {done.failed_jobs} failed."
    return go_on(guest, "/cleanup", message)


class TakeBackPage(Command, frozen=True, kw_only=True):
    name: Worker


class TakeBackForm(ReasonForm, frozen=True, kw_only=True):
    name: Worker


async def confirm_take_back(guest: Guest, asked: TakeBackPage) -> Shown:
    """Preview a take-back. The form on the page does it."""
    seen = await guest.site.rooms.take_back(TakeBack(name=asked.name, dry_run=True), guest.visit.operator)
    [paused] = await query(guest, PAUSED)
    is_refused = isinstance(seen, ApiError)
    shown: Shown = {"refusal": seen, "status": seen.status} if isinstance(seen, ApiError) else {}
    return {
        "name": asked.name,
        "seen": None if is_refused else seen,
        "most": MOST_SHOWN,
        **shown,
        **strip(guest, paused),
    }


async def take_back(guest: Guest, asked: TakeBackForm) -> Response | ApiError:
    command = TakeBack(name=asked.name, reason=asked.why)
    done = await guest.site.rooms.take_back(command, in_parts(guest.visit.operator))
    if isinstance(done, ApiError):
        return done
    message = f"Jobs taken back: {done.recovered_jobs} ({done.reset_jobs} queued again, {done.failed_jobs} failed)."
    return go_on(guest, "/workers", message)


async def confirm_clock(guest: Guest) -> Shown:
    """Preview what deletion by age would do once the clock is accepted. Raise ApiException if the actor takes no reads."""
    [paused] = await query(guest, PAUSED)
    seen = await guest.site.rooms.preview(0)
    held = [] if isinstance(seen, ApiError) else seen.held_jobs
    return {
        "clock": guest.site.rooms.clock(),
        "count": len(held),
        "is_more": not isinstance(seen, ApiError) and seen.more_held,
        "named": held[:MOST_NAMED],
        "fault": seen.message if isinstance(seen, ApiError) else "",
        **strip(guest, paused),
    }


async def accept_clock(guest: Guest, asked: ReasonForm) -> Response | ApiError:
    view = await guest.site.rooms.accept_clock()
    if isinstance(view, ApiError):
        return view
    await guest.note("accept-clock", reason=asked.why)
    return go_on(guest, "/alerts", "The clock is accepted. Jobs are deleted and failed by age again.")
