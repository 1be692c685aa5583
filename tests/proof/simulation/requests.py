"""Random requests: every command of both APIs with every option, valid or not.

The disk is read only to name jobs and locks that exist.
"""

from __future__ import annotations

from random import Random
from typing import Any, Final

from msgspec import UNSET, Raw, UnsetType

from jobd.core.rules.plan_rules import version
from jobd.engine.waiting_claims import FEW
from jobd.maintenance.cron import latest_time, next_times
from jobd.model import commands as cmd
from jobd.model.job import EARLIEST_MS, SECOND_MS, STATUSES, YEAR_MS, BackoffOptions, Job
from jobd.model.schedules import Schedule
from tests.proof.simulation.disk import SimDisk
from tests.proof.simulation.scenario import Scenario
from tests.support.calls import COMMANDS, aimed

# Commands of operators for which `operation` has no case: their examples are sent.
OF_CASES: Final = (
    cmd.AddQuietRule, cmd.Adopt, cmd.Cancel, cmd.Delete, cmd.DeleteSchedule, cmd.EndQuietRule, cmd.ExtendLock,
    cmd.ForceFail, cmd.ForceReset, cmd.Import, cmd.Pause, cmd.PauseSchedule, cmd.PutSchedule, cmd.QuietWorker,
    cmd.ReleaseLock, cmd.Resume, cmd.ResumeSchedule, cmd.ResumeWorker, cmd.RetryJob, cmd.RunNow, cmd.RunSchedule,
    cmd.StopWorker, cmd.TakeBack, cmd.Transition, cmd.Update,
)  # fmt: skip
OTHERS: Final = tuple(
    example.command
    for example in COMMANDS
    if example.is_admin and example.command.admission != "read" and not isinstance(example.command, OF_CASES)
)
TIMINGS: Final[tuple[dict[str, Any], ...]] = (
    {"every_ms": 2_500, "offset_ms": 700},
    {"every_ms": 7_000},
    {"every_ms": 20_000},
    {"every_ms": 60_000, "offset_ms": 90_000},
    {"cron": "* * * * *"},
)


class RequestGenerator:
    """Draw commands. The argument `now` is wall time in Unix ms."""

    def __init__(self, dice: Random, plan: Scenario, disk: SimDisk) -> None:
        self.dice = dice
        self.plan = plan
        self.disk = disk
        self.time_dice = Random(repr(dice.getstate()[1][:8]))  # depends on the seed, without a draw from `dice`
        self.place_dice = Random(f"places {self.time_dice.getstate()[1][:8]}")

    # -- words --------------------------------------------------------------------------------------------------------

    def chance(self, of: float) -> bool:
        return self.dice.random() < of

    def maybe(self, of: float, *values: Any) -> Any:
        return self.dice.choice(values) if self.dice.random() < of else None

    def new_id(self) -> str:
        return f"j{self.dice.randrange(self.plan.ids)}"

    def job_id(self) -> str:
        """Return the id of a job, usually of one that exists."""
        ids = list(self.disk.ids)
        if ids and self.chance(0.95):
            return self.dice.choice(ids[-12:])
        return self.new_id()

    def schedule_id(self) -> str:
        """Return the id of a schedule if there is one."""
        return self.dice.choice(list(self.disk.schedules) or ["none"])

    def queue(self) -> str:
        return self.dice.choice(self.plan.queues)

    def kind(self) -> str:
        return self.dice.choice(self.plan.kinds)

    def time(self, now: int) -> int:
        near = now + self.dice.choice((-60_000, -1, 0, 1, 3_000, 30_000, 4_000_000))
        return near if self.time_dice.random() < 0.9 else self.time_dice.choice((EARLIEST_MS, now + 20 * YEAR_MS))

    # -- creators -----------------------------------------------------------------------------------------------------

    def create(self, now: int, *, named: float = 0.7) -> cmd.Create:
        run_at = self.maybe(0.1, self.time(now))
        return cmd.Create(
            id=self.new_id() if self.chance(named) else None,
            queue=self.queue(),
            kind=self.kind(),
            payload=Raw(self.dice.choice((b"null", b'{"a":1}', b'"text"'))),
            headers=self.time_dice.choice((UNSET, UNSET, UNSET, {"t": "1"})),
            priority=self.dice.choice((0, 0, 0, -1, 5)),
            max_attempts=self.dice.choice((1, 1, 2, 3)),
            backoff=self.dice.choice(
                (
                    BackoffOptions(),
                    BackoffOptions(base_ms=0),
                    BackoffOptions(kind="fixed", base_ms=700),
                    BackoffOptions(base_ms=50, jitter=False),
                )
            ),
            max_stalls=self.maybe(0.3, 0, 1, 5),
            on_stall=self.maybe(0.4, "auto", "requeue", "fail"),
            stall_after_ms=self.maybe(0.3, 0, 1_000, 20_000),
            progress_timeout_ms=self.maybe(0.3, 0, 2_000, 10_000, 45_000),
            run_at=run_at,
            delay_ms=self.maybe(0.15 if run_at is None else 0.1, 0, 700, 5_000),
            expires_at=self.maybe(0.15, now + 2_000, now + 20_000, now - 5),
        )

    def bulk(self, now: int) -> cmd.Bulk:
        return cmd.Bulk(jobs=[self.create(now, named=0.4) for _ in range(self.dice.randint(1, 4))])

    def cancel(self) -> cmd.Cancel:
        return cmd.Cancel(id=self.job_id(), reason=self.maybe(0.5, "not wanted"))

    # -- workers ------------------------------------------------------------------------------------------------------

    def claim(self, worker: str) -> cmd.Claim:
        queues = [self.queue() for _ in range(self.dice.randint(1, 3))]
        kinds = [self.kind() for _ in range(self.dice.randint(1, 2))] if self.chance(0.3) else None
        if kinds is not None and self.time_dice.random() < 0.3:
            kinds += [f"unused-{number}" for number in range(FEW)]  # such a claim is found in another way
        limit: int = self.dice.choice((1, 1, 1, 2, 5, 100))
        busy: bool | UnsetType = UNSET
        if self.place_dice.random() < 0.1:  # it has no free place, or it is quiet
            limit, busy = 0, self.place_dice.choice((True, True, UNSET))
        return cmd.Claim(
            worker=worker,
            queues=queues,
            kinds=kinds,
            limit=limit,
            busy=busy,
            wait_ms=self.dice.choice((0, 300, 3_000, 10_000, 60_000)),
            lock_ttl_ms=self.maybe(0.4, 1_000, 4_000, 60_000),
            stall_after_ms=self.maybe(0.4, 0, 0, 2_000),
            progress_timeout_ms=self.maybe(0.2, 0, 3_000, 20_000),
        )

    def start(self, worker: str) -> cmd.Start:
        return cmd.Start(
            id=self.job_id(),
            worker=worker,
            lock_ttl_ms=self.maybe(0.4, 1_000, 4_000, 60_000),
            stall_after_ms=self.maybe(0.4, 0, 0, 2_000),
            progress_timeout_ms=self.maybe(0.2, 0, 3_000, 20_000),
        )

    # -- operators ----------------------------------------------------------------------------------------------------

    def operation(self, now: int) -> cmd.AnyCommand:
        job_id, dice = self.job_id(), self.dice
        job = self.disk.job(job_id)
        lock_id = job.grant.lock_id if job is not None and job.grant is not None else "none"
        match dice.randrange(20 + len(OTHERS)):
            case 0:
                return cmd.ForceFail(id=job_id, reason=self.maybe(0.5, "by hand"))
            case 1:
                return cmd.ForceReset(id=job_id)
            case 2:
                return cmd.RetryJob(id=job_id)
            case 3 | 4:
                status = job.status if job is not None and self.chance(0.9) else "queued"
                return self.transition(job_id, status, now)
            case 5:
                return cmd.ExtendLock(id=job_id, lock_id=lock_id, additional_ms=self.maybe(0.7, 1, 2_000, 60_000))
            case 6:
                return cmd.ReleaseLock(id=job_id, lock_id=lock_id)
            case 7:
                return cmd.RunNow(id=job_id) if self.chance(0.7) else cmd.RecordAction(what="cleanup")
            case 8:
                return cmd.Update(
                    id=job_id,
                    priority=self.maybe(0.5, -3, 0, 9),
                    run_at=self.maybe(0.3, self.time(now)),
                    max_attempts=self.maybe(0.3, 1, 4),
                )
            case 9:
                return cmd.Delete(id=job_id)
            case 10:
                return cmd.Pause(
                    name=self.queue(), reason=self.maybe(0.3, "deploy"), until=self.maybe(0.5, self.time(now))
                )
            case 11:
                return cmd.Resume(name=self.queue())
            case 12:
                return cmd.TakeBack(name=f"w-{self.dice.randrange(4)}", dry_run=self.chance(0.2))
            case 13 | 14:
                return self.adoption(job_id) if self.chance(0.7) else self.planned(job_id)
            case 15:
                return self.import_job(now)
            case 16:
                if self.disk.quiet and self.chance(0.6):
                    return cmd.EndQuietRule(rule=next(iter(self.disk.quiet)))
                return cmd.AddQuietRule(queue=self.queue(), reason="bad", until=now + dice.randrange(1, 20_000))
            case 17:
                directive = dice.choice((cmd.QuietWorker, cmd.ResumeWorker, cmd.ResumeWorker, cmd.StopWorker))
                return directive(name=f"w-{dice.randrange(4)}")
            case 18 | 19:
                return self.schedule_control(now)
            case number:
                return aimed(OTHERS[number - 20], id=job_id, lock_id=lock_id, name=self.queue())  # type: ignore[no-any-return]

    def planned(self, job_id: str) -> cmd.ApplyPlan:
        """Return a slice of a plan, of which some jobs have changed since."""
        known = [(each, self.disk.job(each)) for each in dict.fromkeys((job_id, self.job_id(), self.job_id()))]
        seen = [
            cmd.ExpectedVersion(each, "other" if job is None or self.chance(0.2) else self._version(job))
            for each, job in known
        ]
        kind = cmd.ApplyPlan if self.chance(0.5) else cmd.ApplyEndings
        action: cmd.PlanAction = self.dice.choice(("retry", "force-reset", "cancel", "force-fail", "delete"))
        plan: cmd.ApplyPlan = kind(action=action, jobs=seen)
        return self._maintenance_plan(known) if self.time_dice.random() < 0.3 else plan

    def _maintenance_plan(self, known: list[tuple[str, Job | None]]) -> cmd.ApplyPlan:
        """Return the same jobs as a plan of recovery or cleanup."""
        dice = self.time_dice
        action: cmd.PlanAction = dice.choice(("recover-stuck", "cleanup"))

        def seen(job: Job | None) -> str:
            late = None if job is None else self._late(job)
            return "other" if job is None or dice.random() < 0.1 else version(job, late, action)

        return cmd.ApplyEndings(action=action, jobs=[cmd.ExpectedVersion(each, seen(job)) for each, job in known])

    def _late(self, job: Job) -> int | None:
        return max((late.seq for late in self.disk.late_results.get(job.seq, ())), default=None)

    def _version(self, job: Job) -> str:
        """Return the version that a caller who has just read the job knows. After a restart it has no late result."""
        late = self._late(job)
        return version(job, late if self.chance(0.7) else None)

    def adoption(self, job_id: str) -> cmd.Adopt:
        """Adopt a late result, usually of a job that has one."""
        kept = {self.disk.jobs[seq].id: lates for seq, lates in self.disk.late_results.items() if seq in self.disk.jobs}
        if kept and self.chance(0.8):
            job_id = self.dice.choice(list(kept))
        seqs = [late.seq for late in kept.get(job_id, ())]
        return cmd.Adopt(id=job_id, result=self.maybe(0.4, *seqs, 7), reason=self.maybe(0.5, "it is right"))

    def transition(self, job_id: str, status: Any, now: int) -> cmd.Transition:
        updates = cmd.Updates(
            error_message=self.maybe(0.2, "said so"),
            priority=self.maybe(0.2, 1),
            run_at=self.maybe(0.2, self.time(now)),
            max_attempts=self.maybe(0.2, 2),
            storage_key=self.maybe(0.2, "a/b"),
            metadata=self.maybe(0.2, Raw(b"[1]")),
        )
        return cmd.Transition(id=job_id, from_=status, to=self.dice.choice(STATUSES), updates=updates)

    def import_job(self, now: int) -> cmd.Import:
        """Import a job with arbitrary fields."""
        kind, options = cmd.ImportCheck if self.chance(0.2) else cmd.Import, self.time_dice
        return kind(
            id=self.new_id(),
            queue=self.queue(),
            kind=self.kind(),
            priority=options.choice((0, 0, -1000, 1000)),
            max_attempts=options.choice((1, 2, 1000)),
            backoff=options.choice((BackoffOptions(), BackoffOptions(base_ms=0, max_ms=0))),
            max_stalls=options.choice((None, 0, 1000)),
            on_stall=options.choice((None, "auto", "requeue", "fail")),
            stall_after_ms=options.choice((None, 0, 2_000, 45_000)),
            progress_timeout_ms=options.choice((None, 0, 2_000, 45_000)),
            progress_message=options.choice((None, "so far")),
            file_path=options.choice((None, "/x")),
            metadata=options.choice((None, Raw(b"null"), Raw(b"{}"))),
            error_code=options.choice((None, "", "x")),
            payload=Raw(b"[]"),
            status=self.dice.choice(STATUSES),
            progress=self.maybe(0.5, 0, 40, 100),
            attempt=self.dice.randint(0, 2),
            stalls=self.dice.randint(0, 2),
            created_at=self.maybe(0.4, self.time(now)),
            updated_at=self.maybe(0.4, self.time(now)),
            run_at=self.maybe(0.4, self.time(now)),
            started_at=self.maybe(0.4, self.time(now)),
            finished_at=self.maybe(0.4, self.time(now)),
            expires_at=self.maybe(0.4, self.time(now)),
            worker=self.maybe(0.3, "w-old"),
            error_message=self.maybe(0.3, "once"),
        )

    def maintenance(self, now: int) -> cmd.AnyCommand:
        """Send a command of cleanup, but about any job at any time: each is checked when it is applied."""
        ids = [self.job_id() for _ in range(self.dice.randint(1, 3))]
        schedule = self.disk.schedules.get(self.schedule_id())
        if schedule is not None and schedule.fires_after(now) <= now and self.chance(0.5):
            return self.firing(schedule, now)
        return self.dice.choice(
            (cmd.Recover(limit=1), cmd.Expire(limit=1), cmd.DeleteExpired(ids=ids), cmd.RepairJobs(ids=ids))
        )

    # -- schedules ----------------------------------------------------------------------------------------------------

    def schedule(self, source: str | None = "app:sim") -> cmd.PutSchedule:
        dice = self.time_dice
        return cmd.PutSchedule(
            id=f"s{dice.randrange(3)}",
            **dice.choice(TIMINGS),
            job=cmd.ScheduledJob(queue=dice.choice(self.plan.queues), expires_in_ms=dice.choice((UNSET, 20_000))),
            overlap=dice.choice(("skip", "allow")),
            catch_up=dice.choice(("latest", "latest", "none")),
            jitter_ms=dice.choice((0, 0, 3_000)),
            source=source,
        )

    def schedule_control(self, now: int) -> cmd.AnyCommand:
        name, dice = self.schedule_id(), self.time_dice
        match dice.randrange(8):
            case 0:
                return cmd.DeleteSchedule(id=name)
            case 1 | 2:
                return cmd.PauseSchedule(id=name, until=dice.choice((None, now + 5_000, now + 60_000)))
            case 3:
                return self.schedule(source=None)
            case 4 | 5:
                return cmd.ResumeSchedule(id=name)
            case _:
                at = dice.choice((None, now // SECOND_MS * SECOND_MS - 60_000))
                return cmd.RunSchedule(id=name, scheduled_at=at, force=dice.random() < 0.5)

    def firing(self, schedule: Schedule, now: int) -> cmd.Fire:
        """Send the last firing again, or the next one if its time has come, beside the timer."""
        after = schedule.fires_after(now)
        at, missed = schedule.last_at or after, 0
        if next_times(schedule.timing, after, 1)[0] <= now:
            at, missed = latest_time(schedule.timing, after, now)
        version = schedule.version - self.chance(0.1)  # one that is void
        is_missed = self.time_dice.random() < 0.2
        return cmd.Fire(id=schedule.id, version=version, scheduled_at=at, missed=missed, is_missed=is_missed)

    # -- everybody ----------------------------------------------------------------------------------------------------

    def read(self) -> cmd.AnyCommand:
        match self.dice.randrange(11):
            case 0 | 1:
                return cmd.Get(id=self.job_id())
            case 2:
                return cmd.Timeline(id=self.job_id())
            case 3:
                return cmd.Why(id=self.job_id()) if self.time_dice.random() < 0.7 else cmd.WhyQueue(name=self.queue())
            case 4:
                return cmd.Validate(id=self.job_id()) if self.chance(0.7) else cmd.GetVersion(id=self.job_id())
            case 5:
                kind = self.dice.choice((cmd.ListJobs, cmd.SearchJobs))
                return kind(
                    status=self.maybe(0.3, *STATUSES),
                    queue=self.maybe(0.3, self.queue()),
                    limit=self.dice.choice((1, 50)),
                    cursor=self.maybe(0.3, "7"),
                )
            case 6:
                return self.dice.choice(
                    (
                        cmd.Queues(),
                        cmd.Workers(),
                        cmd.QuietRules(),
                        cmd.Schedules(),
                        cmd.GetSchedule(id=self.schedule_id()),
                        cmd.WaitForJobs(ids=[self.job_id()], wait_ms=0),
                        cmd.Export(limit=self.dice.choice((1, 50)), cursor=self.maybe(0.3, "7")),
                    )
                )
            case 7:
                return cmd.Stats()
            case 8:
                return cmd.Locks() if self.chance(0.6) else cmd.Preview(limit=2)
            case 9:
                return cmd.LateResults(id=self.job_id()) if self.chance(0.7) else cmd.AuditLog(limit=2)
            case _:
                return cmd.Ping() if self.chance(0.5) else cmd.Goodbye(f"w-{self.dice.randrange(3)}")
