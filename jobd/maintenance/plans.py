"""Plans of operators: made by looks at what is on the disk, kept in memory for a while, applied slice by slice, once.

Decides nothing about a job: what a plan would do is said by plan_rules.py, what it does by the rules, as they do it.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any, Final

import structlog
from msgspec import Struct
from msgspec.structs import asdict, replace

from jobd.core import plan_rules
from jobd.engine.actor import Actor
from jobd.engine.clock import Clock
from jobd.maintenance.plan_builder import PAUSE_S, PlanBuilder
from jobd.model.commands import ApplyEndings, ApplyPlan, ExpectedVersion, MakePlan, Operator, RecordAction
from jobd.model.errors import ApiError
from jobd.model.job import HOUR_MS, MINUTE_MS, SECOND_MS
from jobd.model.responses import ChangedJob, PlanResult, PlanSlice, PlanView

MAX_PLANS: Final = 20
MAX_JOBS: Final = 100_000  # of all plans that are kept
KEPT_MS: Final = 15 * MINUTE_MS
APPLIED_KEPT_MS: Final = 12 * HOUR_MS  # what a plan came to: for who reads it after a night
MAX_APPLIED: Final = 100  # of those, which have MOST_JOBS of their own: new plans push no result out
MAX_NAMED: Final = 100  # jobs that were left undone, in the audit log,
MAX_NAMED_SIZE: Final = 4_000  # and characters of their ids
SLICE: Final = 50  # jobs of one command
MAX_BUILDERS: Final = 4  # plans being made, look by look in turn

log = structlog.get_logger("jobd.plans")


class Plan(Struct):
    """A plan and how far it has been applied: `at` jobs of it."""

    view: PlanView
    expected: list[ExpectedVersion]
    until_s: float  # loop time
    done: PlanSlice
    at: int = 0
    task: asyncio.Task[PlanResult | ApiError] | None = None

    @property
    def is_under_way(self) -> bool:
        return self.view.result is None and self.task is not None and not self.task.done()


class Planner:
    """Makes, keeps and applies plans. `close` waits for the slice under way."""

    def __init__(self, actor: Actor, clock: Clock) -> None:
        self._actor = actor
        self._clock = clock
        self._plans: dict[str, Plan] = {}  # by id, the oldest first
        self._lock = asyncio.Semaphore(1)
        self._builders = 0
        self._stopping = False

    async def close(self) -> None:
        self._stopping = True
        tasks = [plan.task for plan in self._plans.values() if plan.task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- making -------------------------------------------------------------------------------------------------------

    async def make(self, asked: MakePlan, plan_id: str) -> PlanView | ApiError:
        """A plan of what `asked.action` would do now, to be found again as `plan_id`."""
        if self._builders >= MAX_BUILDERS:
            return ApiError("overloaded", "Other plans are being made; try again after a second.")
        search = PlanBuilder(asked, self._actor, self._clock, self._lock)
        self._builders += 1
        try:
            refusal = await search.run()
        finally:
            self._builders -= 1
        if refusal is not None:
            return refusal
        now = self._clock.moment().now
        view = PlanView(
            plan_id=plan_id,
            action=asked.action,
            reason=asked.reason,
            filter=asked.filter,
            scope=None if asked.ids is not None else plan_rules.ONLY[asked.action],
            count=len(search.jobs),
            jobs=search.jobs,
            skipped=search.skipped,
            skipped_count=search.skipped_count,
            more=search.more,
            next_cursor=search.next_cursor,
            made_at=now,
            expires_at=now + KEPT_MS,
            with_late_results=sum(job.late_results > 0 for job in search.jobs),
        )
        until_s = asyncio.get_running_loop().time() + KEPT_MS / SECOND_MS
        self._keep(Plan(view, search.expected, until_s, PlanSlice(0, [], [])))
        return view

    def _keep(self, plan: Plan) -> None:
        """Plans that have nothing go first, then the oldest, but none that is being applied."""
        self._forget_old()
        self._plans[plan.view.plan_id] = plan
        waiting = [each for each in self._plans.values() if each.view.result is None]
        self._make_room(sorted(waiting, key=lambda each: each.view.count > 0), MAX_PLANS, plan)

    def _make_room(self, plans: list[Plan], most: int, latest: Plan) -> None:
        """Of `plans`, which are in the order in which they go, keep `most` with MOST_JOBS jobs, and `latest`."""
        left, jobs = len(plans), sum(plan.view.count for plan in plans)
        for plan in plans:
            if left <= most and jobs <= MAX_JOBS:
                break
            if plan is not latest and not plan.is_under_way:
                del self._plans[plan.view.plan_id]
                left, jobs = left - 1, jobs - plan.view.count

    def _forget_old(self) -> None:
        now_s = asyncio.get_running_loop().time()
        for plan_id, plan in list(self._plans.items()):
            if now_s >= plan.until_s and not plan.is_under_way:
                del self._plans[plan_id]

    # -- looking and applying -----------------------------------------------------------------------------------------

    def find(self, plan_id: str) -> PlanView | ApiError:
        self._forget_old()
        plan = self._plans.get(plan_id)
        if plan is None:
            minutes = KEPT_MS // MINUTE_MS
            message = (
                f"There is no plan {plan_id}: it is kept for {minutes} min, at most {MAX_PLANS} of them, what it "
                f"came to for {APPLIED_KEPT_MS // HOUR_MS} h, and neither over a restart. Make it anew; what was done "
                "already is left out. What became of plans that were applied is in the audit log, too."
            )
            return ApiError("plan_not_found", message, {"plan_id": plan_id})
        return plan.view

    async def apply(self, plan_id: str, operator: Operator) -> PlanResult | ApiError:
        """Do what the plan says, to every job that is still what it saw. Once: whoever asks again gets the same answer.

        It goes on where who asked does not wait any more. Where it has to stop half-way (a full disk) the refusal says
        so, and the next call goes on with the rest.
        """
        found = self.find(plan_id)
        if isinstance(found, ApiError):
            return found
        if found.result is not None:
            return replace(found.result, repeated=True)
        plan = self._plans[plan_id]
        if plan.task is None or plan.task.done():
            plan.task = asyncio.create_task(self._apply(plan, operator))
        return await asyncio.shield(plan.task)

    async def _apply(self, plan: Plan, operator: Operator) -> PlanResult | ApiError:
        view = plan.view
        operator = replace(operator, part_of=view.plan_id)
        while plan.at < view.count:
            some = plan.expected[plan.at : plan.at + SLICE]
            refusal = await self._apply_slice(plan, some, operator)
            if refusal is not None:
                await self._audit(plan, operator)
                left = {"applied": plan.done.applied, "left": view.count - plan.at}
                message = (
                    f"{refusal.message} {left['applied']} jobs were done, {left['left']} are left: apply it again."
                )
                return ApiError(refusal.code, message, refusal.details | left)
            plan.at += len(some)
            await asyncio.sleep(PAUSE_S)
        at = self._clock.moment().now
        result = PlanResult(view.plan_id, view.action, plan.done.applied, plan.done.changed, plan.done.refused, at)
        self._keep_result(plan, result)
        await self._audit(plan, operator)
        return result

    def _keep_result(self, plan: Plan, result: PlanResult) -> None:
        """It was applied: from now on it is kept for what it came to."""
        plan.view = replace(plan.view, result=result, expires_at=result.applied_at + APPLIED_KEPT_MS)
        plan.until_s = asyncio.get_running_loop().time() + APPLIED_KEPT_MS / SECOND_MS
        plan.expected = []
        self._plans[plan.view.plan_id] = self._plans.pop(plan.view.plan_id, plan)  # the latest comes last
        self._make_room([each for each in self._plans.values() if each.view.result is not None], MAX_APPLIED, plan)

    async def _apply_slice(self, plan: Plan, some: list[ExpectedVersion], operator: Operator) -> ApiError | None:
        """One command; why it was not taken, if it was not."""
        if self._stopping:
            return ApiError("shutting_down", "The daemon is stopping.")
        view = plan.view
        kind = ApplyEndings if plan_rules.is_ending(view.action) else ApplyPlan
        command = kind(action=view.action, jobs=some, reason=view.reason)
        answer = await self._actor.ask(command, by=operator.by, admin=True, operator=operator)
        if isinstance(answer, ApiError):
            return answer
        done: PlanSlice = answer.data
        was = {job.id: job.from_ for job in view.jobs[plan.at : plan.at + len(some)]}
        plan.done.applied += done.applied
        plan.done.changed += [_from(each, was) for each in done.changed]
        plan.done.refused += [_from(each, was) for each in done.refused]
        return None

    async def _audit(self, plan: Plan, operator: Operator) -> None:
        """The audit log has one row of a plan, which says what the plan was and what became of it."""
        view, done = plan.view, plan.done
        details: dict[str, Any] = {
            "plan_id": view.plan_id,
            "planned": view.count,
            "changed_meanwhile": len(done.changed),
        }
        details["refused"] = len(done.refused)
        if undone := _named([*done.changed, *done.refused]):
            details["left_undone"] = undone
        if view.filter is not None:
            details["filter"] = {name: value for name, value in asdict(view.filter).items() if value is not None}
        kept = await self._actor.ask(RecordAction(what=f"plan-{view.action}", details=details), operator=operator)
        if isinstance(kept, ApiError):
            log.warning("audit_missed", what=f"plan-{view.action}", by=operator.by, reason=kept.code)


def _named(jobs: list[ChangedJob]) -> list[str]:
    """The ids of the first of them: MOST_NAMED, in NAMED_SIZE characters."""
    sizes = itertools.accumulate(len(job.id) for job in jobs[:MAX_NAMED])
    return [job.id for job, size in zip(jobs, sizes, strict=False) if size <= MAX_NAMED_SIZE]


def _from(changed: ChangedJob, was: dict[str, str]) -> ChangedJob:
    return replace(changed, from_=was[changed.id])
