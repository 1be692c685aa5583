"""Build, keep and apply operators' plans. Plans are in memory only, and are applied once, in slices."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import structlog
from msgspec import Struct, field
from msgspec.structs import asdict, replace

from jobd.core import guards
from jobd.core.rules import plan_rules
from jobd.engine.actor import Actor
from jobd.engine.clock import Clock, loop_time
from jobd.maintenance.plan_builder import PAUSE_S, PlanBuilder
from jobd.model.clocks import MonotonicS
from jobd.model.commands import ApplyEndings, ApplyPlan, ExpectedVersion, MakePlan, Operator, PlanRate, RecordAction
from jobd.model.errors import ApiError
from jobd.model.events import Event
from jobd.model.job import FINISHED, HOUR_MS, MINUTE_MS, SECOND_MS
from jobd.model.responses import PlanOutcome, PlanResult, PlanSlice, PlanTrial, PlanView, UnchangedJob

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
    """A plan and its progress: `at` of its jobs are done.

    `trial` has whether the first job completed, `begun` is set while that is awaited. The jobs from `rated_from` on
    become due at `rate` from `rated_at` on. `states` has how the changed jobs of a retry have ended since.
    """

    view: PlanView
    expected: list[ExpectedVersion]
    until_s: MonotonicS
    done: PlanSlice
    at: int = 0
    task: asyncio.Task[PlanResult | ApiError] | None = None
    trial: asyncio.Future[bool] | None = None
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    rate: PlanRate | None = None
    rated_from: int = 0
    rated_at: int = 0
    due_until: int | None = None
    states: dict[str, str] = field(default_factory=dict)

    def next_chunk(self, limit: int) -> list[ExpectedVersion]:
        """Return the next jobs, each with the time at which it is to be due."""
        chunk = self.expected[self.at : self.at + limit]
        if (rate := self.rate) is None or not self.rated_at:
            return chunk
        first = self.at - self.rated_from
        due = [self.rated_at + number * rate.per_ms // rate.count for number in range(first, first + len(chunk))]
        self.due_until = due[-1]
        return [replace(job, run_at=at) for job, at in zip(chunk, due, strict=True)]

    def note(self, event: Event) -> None:
        """Record what happened to a job of the plan."""
        status, job_id = event.to_status, event.job_id
        if event.type in ("retried_by_operator", "force_reset"):
            self.states[job_id] = "waiting"
        elif job_id in self.states and status is not None:
            self.states[job_id] = status if status in FINISHED else "waiting"
        trial = self.trial
        if trial is None or trial.done() or self.view.trial is None or job_id != self.view.trial.job_id:
            return
        if status is None or status in FINISHED or event.type == "retried":
            trial.set_result(status == "completed")

    @property
    def outcome(self) -> PlanOutcome | None:
        if not self.states:
            return None
        counts = Counter(self.states.values())
        return PlanOutcome(*(counts[each] for each in PlanOutcome.__struct_fields__))

    @property
    def is_under_way(self) -> bool:
        return self.view.result is None and self.task is not None and not self.task.done()


class Planner:
    """Builds, keeps and applies plans. `close` waits for the current slices."""

    def __init__(self, actor: Actor, clock: Clock) -> None:
        self._actor = actor
        self._clock = clock
        self._plans: dict[str, Plan] = {}  # by id, oldest first
        self._watched: dict[str, Plan] = {}  # by job: the latest plan that retries it
        self._lock = asyncio.Semaphore(1)
        self._builders = 0
        self._stopping = False
        actor.on_commit.append(self._note)

    async def close(self) -> None:
        self._stopping = True
        for plan in self._plans.values():
            if plan.trial is not None and not plan.trial.done():
                plan.trial.set_result(False)
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
            created_at=now,
            expires_at=now + KEPT_MS,
            with_late_results=sum(job.late_results > 0 for job in builder.jobs),
            ages=builder.ages,
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
                self._drop(plan)
                left, jobs = left - 1, jobs - plan.view.count

    def _forget_old(self) -> None:
        now_s = loop_time()
        for plan in list(self._plans.values()):
            if now_s >= plan.until_s and not plan.is_under_way:
                self._drop(plan)

    def _drop(self, plan: Plan) -> None:
        del self._plans[plan.view.plan_id]
        for job_id in plan.states:
            if self._watched.get(job_id) is plan:
                del self._watched[job_id]

    def _note(self, changes: Sequence[Event]) -> None:
        """Record how the jobs of applied plans end. Called after each commit."""
        if self._watched:
            for event in changes:
                if (plan := self._watched.get(event.job_id)) is not None:
                    plan.note(event)

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
        return replace(plan.view, outcome=plan.outcome)

    async def apply(
        self, plan_id: str, operator: Operator, *, trial: bool = False, rate: PlanRate | None = None
    ) -> PlanResult | ApiError:
        """Apply a plan to its jobs that have not changed since. Repeated calls return the first result.

        The plan continues if the caller disconnects. If it ends early, for example on a full disk, the error says so,
        and the next call continues with the rest. A call returns while a trial is under way.
        """
        found = self.find(plan_id)
        if isinstance(found, ApiError):
            return found
        if found.result is not None:
            return replace(found.result, repeated=True)
        if (trial or rate is not None) and not plan_rules.may_wait(found.action):
            name = "trial" if trial else "rate"
            return guards.invalid(name, f"{found.action} takes no `{name}`; only retry and force-reset do.").error
        plan = self._plans[plan_id]
        if plan.task is None or plan.task.done():
            if plan.at == 0:
                plan.rate = rate
                plan.trial = asyncio.get_running_loop().create_future() if trial else None
            plan.task = asyncio.create_task(self._apply(plan, operator))
        begun = asyncio.create_task(plan.begun.wait())
        await asyncio.wait({plan.task, begun}, return_when=asyncio.FIRST_COMPLETED)
        begun.cancel()
        if plan.trial is None or plan.trial.done():
            await asyncio.wait({plan.task})
        return plan.task.result() if plan.task.done() else self._result(plan)

    def _result(self, plan: Plan) -> PlanResult:
        view, done = plan.view, plan.done
        return PlanResult(
            view.plan_id,
            view.action,
            done.applied,
            done.changed_meanwhile,
            done.rejected,
            self._clock.moment().now,
            left=view.count - plan.at,
            trial=view.trial,
            due_until=plan.due_until,
        )

    async def _apply(self, plan: Plan, operator: Operator) -> PlanResult | ApiError:
        operator = replace(operator, part_of=plan.view.plan_id)
        error = None
        while plan.trial is not None and not plan.done.applied and plan.at < plan.view.count and error is None:
            error = await self._apply_slice(plan, plan.next_chunk(1), operator)
        has_passed = error is None and (plan.trial is None or await self._has_passed(plan, plan.trial))
        if has_passed and not plan.rated_at:
            plan.rated_from, plan.rated_at = plan.at, self._clock.moment().now
        while has_passed and plan.at < plan.view.count and error is None:
            error = await self._apply_slice(plan, plan.next_chunk(SLICE), operator)
            await asyncio.sleep(PAUSE_S)
        if error is not None:
            await self._audit(plan, operator)
            left = {"applied": plan.done.applied, "left": plan.view.count - plan.at}
            done = f"{left['applied']} jobs were changed, {left['left']} are left"
            message = f"{error.message} {done}. Apply the plan again."
            return ApiError(error.code, message, error.details | left)
        result = self._result(plan)
        self._keep_result(plan, result)
        if plan.view.count:
            await self._audit(plan, operator)
        return result

    async def _has_passed(self, plan: Plan, trial: asyncio.Future[bool]) -> bool:
        """Wait for the first attempt of the trial. Return whether it completed, or no job was left to try."""
        if not plan.done.applied:
            plan.view = replace(plan.view, trial=None)
            return True
        plan.begun.set()
        has_passed = await trial
        plan.begun.clear()
        assert plan.view.trial is not None
        plan.view = replace(plan.view, trial=replace(plan.view.trial, state="completed" if has_passed else "failed"))
        return has_passed

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
        command = kind(action=view.action, jobs=chunk, reason=view.reason, plan=view.plan_id, planned=view.count)
        if plan_rules.may_wait(view.action):
            self._watched |= dict.fromkeys((job.id for job in chunk), plan)
        if plan.trial is not None and not plan.done.applied:
            plan.view = replace(view, trial=PlanTrial(chunk[0].id, "waiting"))
        response = await self._actor.ask(command, by=operator.by, admin=True, operator=operator)
        if isinstance(response, ApiError):
            return response
        done: PlanSlice = response.data
        was = {job.id: job.from_ for job in view.jobs[plan.at : plan.at + len(chunk)]}
        plan.done.applied += done.applied
        plan.done.changed_meanwhile += [_with_from(each, was) for each in done.changed_meanwhile]
        plan.done.rejected += [_with_from(each, was) for each in done.rejected]
        plan.at += len(chunk)
        return None

    async def _audit(self, plan: Plan, operator: Operator) -> None:
        """Write one audit entry with the plan and its results."""
        view, done = plan.view, plan.done
        details: dict[str, Any] = {
            "plan_id": view.plan_id,
            "planned": view.count,
            "changed_meanwhile": len(done.changed_meanwhile),
            "rejected": len(done.rejected),
        }
        if undone := _first_ids([*done.changed_meanwhile, *done.rejected]):
            details["not_changed"] = undone
        if view.trial is not None:
            details["trial"] = asdict(view.trial)
        if plan.rate is not None:
            details["rate"] = asdict(plan.rate)
        if view.filter is not None:
            details["filter"] = {name: value for name, value in asdict(view.filter).items() if value is not None}
        response = await self._actor.ask(RecordAction(what=f"plan-{view.action}", details=details), operator=operator)
        if isinstance(response, ApiError):
            log.warning("audit_missed", action=f"plan-{view.action}", by=operator.by, reason=response.code)


def _first_ids(jobs: list[UnchangedJob]) -> list[str]:
    """Return the first ids: at most MAX_NAMED, and at most MAX_NAMED_SIZE characters."""
    sizes = itertools.accumulate(len(job.id) for job in jobs[:MAX_NAMED])
    return [job.id for job, size in zip(jobs, sizes, strict=False) if size <= MAX_NAMED_SIZE]


def _with_from(changed: UnchangedJob, was: dict[str, str]) -> UnchangedJob:
    return replace(changed, from_=was[changed.id])
