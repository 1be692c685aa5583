"""What the forms of pages do that are about no job: queues, cleanup, the clock.

Asks for it, and says on the next page what came of it.
"""

from __future__ import annotations

from jobd.answers import Answer
from jobd.commands import Command, Pause, Refusal, Resume
from jobd.dashboard.guests import Guest, ReasonForm, go_on
from jobd.job import QueueName
from jobd.visits import in_parts


class QueueForm(ReasonForm, frozen=True, kw_only=True):
    name: QueueName


async def pause(guest: Guest, asked: QueueForm) -> Answer | Refusal:
    return await _on_queue(guest, Pause(name=asked.name, reason=asked.why), f"Queue {asked.name} is paused.")


async def resume(guest: Guest, asked: QueueForm) -> Answer | Refusal:
    return await _on_queue(
        guest, Resume(name=asked.name, reason=asked.why), f"Queue {asked.name} hands out its jobs again."
    )


async def _on_queue(guest: Guest, command: Command, message: str) -> Answer | Refusal:
    done = await guest.ask(command)
    return done if isinstance(done, Refusal) else go_on(guest, "/queues", message)


async def run_cleanup(guest: Guest, asked: ReasonForm) -> Answer:
    await guest.note("cleanup", reason=asked.why)
    report = await guest.site.rooms.run_cleanup(forced=True)
    message = (
        f"The pass took {report.total_processing_time} ms: {report.stuck_jobs_recovered} recovered, "
        f"{report.expired_jobs_deleted} deleted, {report.validation_issues_fixed} issues fixed."
    )
    return go_on(guest, "/cleanup", message)


async def recover(guest: Guest, asked: ReasonForm) -> Answer | Refusal:
    done = await guest.site.rooms.recover_stuck(in_parts(guest.visit.operator), asked.why)
    if isinstance(done, Refusal):
        return done
    message = f"{done.recovered_jobs} stuck jobs recovered: {done.reset_jobs} queued again, {done.failed_jobs} failed."
    return go_on(guest, "/cleanup", message)


async def accept_clock(guest: Guest, asked: ReasonForm) -> Answer:
    await guest.site.rooms.accept_clock()
    await guest.note("accept-clock", reason=asked.why)
    return go_on(guest, "/alerts", "The clock is taken as right: jobs are deleted by age again.")
