"""Build, keep and apply operators' plans. Plans are in memory only, and are applied once, in slices."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any, Final

import structlog
from msgspec import Struct
from msgspec.structs import asdict, replace

from jobd.core.rules import plan_rules
from jobd.engine.actor import Actor
from jobd.engine.clock import Clock, loop_time
from jobd.maintenance.plan_builder import PAUSE_S, PlanBuilder
from jobd.model.clocks import MonotonicS
from jobd.model.commands import ApplyEndings, ApplyPlan, ExpectedVersion, MakePlan, Operator, RecordAction
from jobd.model.errors import ApiError
from jobd.model.job import HOUR_MS, MINUTE_MS, SECOND_MS
from jobd.model.responses import ChangedJob, PlanResult, PlanSlice, PlanView

MAX_PLANS: Final = 20
MAX_JOBS: Final = 100_000  # of all kept plans
KEPT_MS: Final = 15 * MINUTE_MS
APPLIED_KEPT_MS: Final = 12 * HOUR_MS  # long enough to read results the next morning
MAX_APPLIED: Final = 100  # applied plans; MAX_JOBS applies to them separately, so new plans displace no result
MAX_NAMED: Final = 100  # unchanged jobs listed in an audit entry
MAX_NAMED_SIZE: Final = 4_000  # total length of their ids
SLICE: Final = 50  # jobs per command
MAX_BUILDERS: Final = 4  # plans that are built at the same time

log = structlog.get_logger("jobd.plans")


class Plan(Struct):
    """A plan and its progress: `at` of its jobs are done."""

    view: PlanView
    expected: list[ExpectedVersion]
    until_s: MonotonicS
    done: PlanSlice
    at: int = 0
    task: asyncio.Task[PlanResult | ApiError] | None = None

    @property
    def is_under_way(self) -> bool:
        return self.view.result is None and self.task is not None and not self.task.done()


class Planner:
    """Builds, keeps and applies plans. `close` waits for the current slices."""

    def __init__(self, actor: Actor, clock: Clock) -> None:
        self._actor = actor
        self._clock = clock
        self._plans: dict[str, Plan] = {}  # by id, oldest first
        self._lock = asyncio.Semaphore(1)
        self._builders = 0
        self._stopping = False

    async def close(self) -> None:
        self._stopping = True
        tasks = [plan.task for plan in self._plans.values() if plan.task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- building ------------------------------------------------------------------------------------------------------

    async def make(self, request: MakePlan, plan_id: str) -> PlanView | ApiError:
        """Build a plan of what the action would do now, and keep it as `plan_id`."""
        if self._builders >= MAX_BUILDERS:
            return ApiError("overloaded", "Other plans are being built. Try again in a second.")
        builder = PlanBuilder(request, self._actor, self._clock, self._lock)
        self._builders += 1
        try:
            error = await builder.run()
        finally:
            self._builders -= 1
        if error is not None:
            return error
        now = self._clock.moment().now
        view = PlanView(
            plan_id=plan_id,
            action=request.action,
            reason=request.reason,
            filter=request.filter,
            scope=None if request.ids is not None else plan_rules.scope(request.action),
            count=len(builder.jobs),
            jobs=builder.jobs,
            skipped=builder.skipped,
            skipped_count=builder.skipped_count,
            more=builder.more,
            next_cursor=builder.next_cursor,
            made_at=now,
            expires_at=now + KEPT_MS,
            with_late_results=sum(job.late_results > 0 for job in builder.jobs),
        )
        until_s = loop_time() + KEPT_MS / SECOND_MS
        self._keep(Plan(view, builder.expected, until_s, PlanSlice(0, [], [])))
        return view

    def _keep(self, plan: Plan) -> None:
        """Keep a plan. Drop empty plans first, then the oldest ones, but none that is being applied."""
        self._forget_old()
        self._plans[plan.view.plan_id] = plan
        waiting = [each for each in self._plans.values() if each.view.result is None]
        self._drop_excess(sorted(waiting, key=lambda each: each.view.count > 0), MAX_PLANS, plan)

    def _drop_excess(self, plans: list[Plan], max_plans: int, latest: Plan) -> None:
        """Drop plans from the start of `plans` until `max_plans` with MAX_JOBS jobs are left, but never `latest`."""
        left, jobs = len(plans), sum(plan.view.count for plan in plans)
        for plan in plans:
            if left <= max_plans and jobs <= MAX_JOBS:
                break
            if plan is not latest and not plan.is_under_way:
                del self._plans[plan.view.plan_id]
                left, jobs = left - 1, jobs - plan.view.count

    def _forget_old(self) -> None:
        now_s = loop_time()
        for plan_id, plan in list(self._plans.items()):
            if now_s >= plan.until_s and not plan.is_under_way:
                del self._plans[plan_id]

    # -- reading and applying ------------------------------------------------------------------------------------------

    def find(self, plan_id: str) -> PlanView | ApiError:
        self._forget_old()
        plan = self._plans.get(plan_id)
        if plan is None:
            minutes = KEPT_MS // MINUTE_MS
            message = (
                f"There is no plan {plan_id}. The latest {MAX_PLANS} plans are kept for {minutes} min, and results for "
                f"{APPLIED_KEPT_MS // HOUR_MS} h, until the daemon restarts. Build the plan again: it leaves out jobs "
                "that were changed already. The audit log also has the results of applied plans."
            )
            return ApiError("plan_not_found", message, {"plan_id": plan_id})
        return plan.view

    async def apply(self, plan_id: str, operator: Operator) -> PlanResult | ApiError:
        """Apply a plan to its jobs that have not changed since. Repeated calls return the first result.

        The plan continues if the caller disconnects. If it ends early, for example on a full disk, the error says so,
        and the next call continues with the rest.
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
            chunk = plan.expected[plan.at : plan.at + SLICE]
            error = await self._apply_slice(plan, chunk, operator)
            if error is not None:
                await self._audit(plan, operator)
                left = {"applied": plan.done.applied, "left": view.count - plan.at}
                done = f"{left['applied']} jobs were changed, {left['left']} are left"
                message = f"{error.message} {done}. Apply the plan again."
                return ApiError(error.code, message, error.details | left)
            plan.at += len(chunk)
            await asyncio.sleep(PAUSE_S)
        at = self._clock.moment().now
        result = PlanResult(view.plan_id, view.action, plan.done.applied, plan.done.changed, plan.done.rejected, at)
        self._keep_result(plan, result)
        if view.count:
            await self._audit(plan, operator)
        return result

    def _keep_result(self, plan: Plan, result: PlanResult) -> None:
        plan.view = replace(plan.view, result=result, expires_at=result.applied_at + APPLIED_KEPT_MS)
        plan.until_s = loop_time() + APPLIED_KEPT_MS / SECOND_MS
        plan.expected = []
        self._plans[plan.view.plan_id] = self._plans.pop(plan.view.plan_id, plan)  # newest last
        self._drop_excess([each for each in self._plans.values() if each.view.result is not None], MAX_APPLIED, plan)

    async def _apply_slice(self, plan: Plan, chunk: list[ExpectedVersion], operator: Operator) -> ApiError | None:
        """Apply one slice. Return an error if the command was rejected."""
        if self._stopping:
            return ApiError("shutting_down", "The daemon is stopping.")
        view = plan.view
        kind = ApplyEndings if plan_rules.is_ending(view.action) else ApplyPlan
        command = kind(action=view.action, jobs=chunk, reason=view.reason)
        response = await self._actor.ask(command, by=operator.by, admin=True, operator=operator)
        if isinstance(response, ApiError):
            return response
        done: PlanSlice = response.data
        was = {job.id: job.from_ for job in view.jobs[plan.at : plan.at + len(chunk)]}
        plan.done.applied += done.applied
        plan.done.changed += [_with_from(each, was) for each in done.changed]
        plan.done.rejected += [_with_from(each, was) for each in done.rejected]
        return None

    async def _audit(self, plan: Plan, operator: Operator) -> None:
        """Write one audit entry with the plan and its results."""
        view, done = plan.view, plan.done
        details: dict[str, Any] = {
            "plan_id": view.plan_id,
            "planned": view.count,
            "changed_meanwhile": len(done.changed),
            "rejected": len(done.rejected),
        }
        if undone := _first_ids([*done.changed, *done.rejected]):
            details["left_undone"] = undone
        if view.filter is not None:
            details["filter"] = {name: value for name, value in asdict(view.filter).items() if value is not None}
        response = await self._actor.ask(RecordAction(what=f"plan-{view.action}", details=details), operator=operator)
        if isinstance(response, ApiError):
            log.warning("audit_missed", what=f"plan-{view.action}", by=operator.by, reason=response.code)


def _first_ids(jobs: list[ChangedJob]) -> list[str]:
    """Return the first ids: at most MAX_NAMED, and at most MAX_NAMED_SIZE characters."""
    sizes = itertools.accumulate(len(job.id) for job in jobs[:MAX_NAMED])
    return [job.id for job, size in zip(jobs, sizes, strict=False) if size <= MAX_NAMED_SIZE]


def _with_from(changed: ChangedJob, was: dict[str, str]) -> ChangedJob:
    return replace(changed, from_=was[changed.id])
