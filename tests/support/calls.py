"""Examples of every declared call: the request, its caller, and what it leads to.

In the examples, worker w-1 holds job "a" in the first of its two attempts, and queue "q" is empty. The tests of the
API, of rules and of properties, the small world and the simulation read this table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple, get_args

from msgspec import Raw
from msgspec.structs import replace

from jobd.model import calls, commands, responses
from jobd.model import requests as wire
from jobd.model.api_call import calls_of
from jobd.model.commands import AnyCommand, Command
from jobd.model.job import Status
from jobd.model.problems import Cure, Problem, ProblemList, Subject

AT: Final = 1_700_000_000_000
PROBLEM: Final = Problem(
    id="no_workers/mail/receipt",
    condition="no_workers",
    severity="critical",
    subject=Subject(type="pair", queue="mail", kind="receipt"),
    since=AT,
    jobs=962,
    title="962 jobs are due, and no worker takes them.",
    cure=[Cure("Start a worker", "jobctl run --queue mail -- CMD")],
)
PROBLEMS: Final = ProblemList([PROBLEM], evaluated_at=AT)
ALERT: Final = responses.AlertView("stalled_jobs", False, None, 0, 5, "look at the workers")
BACKUP: Final = responses.BackupView("b1", "copying", 4096, 8192, 3, AT, None, None)
DISK_USE: Final = responses.DiskUse(
    path="/var/lib/jobd/jobd.db",
    total_bytes=640 << 20,
    free_bytes=56 << 20,
    not_jobd_bytes=357 << 20,
    database_bytes=209 << 20,
    free_page_bytes=18 << 20,
    tail_bytes=4096,
    kinds=[responses.StoredKind("reports", "monthly", 900, 105 << 20, 5 << 20, 0, 90 << 20, 10 << 20)],
    more_kinds=0,
    other_bytes=48 << 20,
    jobs_read=4000,
    measured_at=AT,
)
REPORT: Final = responses.CleanupReport(AT, 1, 2, 3, 4, 5, 6, [], True)
WEBHOOK: Final = responses.WebhookView(
    name="q",
    url="https://e.test/hook",
    events=["job.failed"],
    queues=[],
    state="closed",
    failing_since=None,
    next_attempt_at=None,
    position=9,
    lag=0,
    waiting=1,
    delivered=2,
    failed=3,
    dead_lettered=0,
    last_success_at=AT,
    last_error="500",
    last_error_at=AT,
)
DELIVERY: Final = responses.DeliveryView(
    id=7,
    state="waiting",
    type="job.failed",
    subject="jobs/a",
    message_id="evt_1",
    seq=9,
    at=AT,
    due_at=AT,
    attempts=1,
    ended_at=None,
    status=500,
    error="500",
)
PLANNED: Final = [responses.PlannedJob("a", "failed", "queued")]
SKIPPED: Final = [responses.SkippedJob("b", None, "none")]
PLAN: Final = responses.PlanView("p1", "retry", "r", None, None, 1, PLANNED, SKIPPED, 1, False, None, 1, 2)
STATS: Final = responses.StatsView(3, {"queued": 3}, 0, 0, 0.0, None, 0, AT)
_SCHEDULE: Final[dict[str, Any]] = {
    **{"id": "s", "cron": None, "every_ms": 1_000, "offset_ms": 0, "timezone": "UTC", "job": {}, "overlap": "skip"},
    **{"catch_up": "latest", "jitter_ms": 0, "source": None, "paused": False, "created_at": AT, "updated_at": AT},
    **{"last_fired_at": None, "last_job_id": None, "last_status": None, "skipped": 0, "missed": 0, "last_skip": None},
}
SCHEDULE: Final = responses.ScheduleView(**_SCHEDULE)
# What the actor returns for commands whose handler reads the response.
DATA: Final[dict[type[Command], Any]] = {
    commands.Stats: STATS,
    commands.AppendOutput: responses.OutputGrant(AT, 1, "w-1", 7),
    commands.Why: responses.WhyView("completed", "", None, None, []),
    commands.WhyQueue: responses.QueueWhyView("q", "", []),
    commands.Schedules: responses.ScheduleList([SCHEDULE]),
    **dict.fromkeys((commands.PutSchedule, commands.GetSchedule, commands.PauseSchedule), SCHEDULE),
    **dict.fromkeys((commands.ResumeSchedule, commands.DeleteSchedule), SCHEDULE),
}
RECOVERED: Final = responses.Recovery("a", "reset", "stalled")


class EventOf(NamedTuple):
    """The last event of a call: its type, the status afterwards, and its details."""

    type: str
    after: Status | None
    details: dict[str, Any] | None = None


PROGRESSED: Final = EventOf("progress", "processing", {"progress": 1})


class Example(NamedTuple):
    """A request, the event or the code of the error that it leads to, and the result if a service responds."""

    call: Any
    command: Any
    leads_to: EventOf | str | None = None
    result: Any = None

    @property
    def is_admin(self) -> bool:
        return bool(self.call.auth == "admin")

    @property
    def by(self) -> str:
        """The author of its event."""
        return "admin" if self.is_admin else "worker:w-1" if self.command.is_of_holder else "client"

    @property
    def reason(self) -> str | None:
        """The reason in its event."""
        return getattr(self.command, "reason", None) or getattr(self.command, "error_message", None)


def _examples() -> Iterator[Example]:
    yield from _jobs()
    yield from _admin_jobs()
    yield from _many_jobs()
    yield from _queues()
    yield from _schedules()
    yield from _others()


def _jobs() -> Iterator[Example]:
    api, requests = calls.JobCalls, calls.JobRequests
    created = EventOf("created", "queued")
    held: dict[str, Any] = {"id": "a", "lock_id": "L"}
    result: dict[str, Any] = {"download_url": "u", "file_path": "f", "storage_key": "s"}
    about = commands.About(instance="i", host="h", pid=7, version="1", concurrency=4)
    yield Example(requests.create, commands.Create(id="b", queue="q", priority=1, payload=Raw(b'{"a":1}')), created)
    yield Example(requests.create, commands.Create(id="b", headers={"traceparent": "00-1"}), created)
    yield Example(requests.create, commands.Create(), created)
    yield Example(requests.bulk, commands.Bulk(jobs=[commands.Create(), commands.Create(id="b")]), created)
    yield Example(requests.claim, commands.Claim(worker="w-1", about=about))
    waiting = commands.Claim(worker="w-1", queues=["q"], kinds=["k"], limit=3, wait_ms=60_000, progress_timeout_ms=5)
    yield Example(requests.claim, waiting)
    yield Example(requests.complete, commands.Complete(**held, **result), EventOf("completed", "completed"))
    yield Example(api.get_job, commands.Get(id="a"))
    yield Example(api.wait_for_jobs, commands.WaitForJobs(ids=["a", "b"]))
    yield Example(api.list_jobs, commands.ListJobs())
    listed = commands.ListJobs(status="queued", queue="q", kind="k", worker="w-1", limit=200, cursor="9")
    yield Example(api.list_jobs, listed)
    yield Example(api.timeline, commands.Timeline(id="a"))
    yield Example(api.timeline, commands.Timeline(id="a", limit=5))
    yield Example(api.why, commands.Why(id="a"))
    yield Example(api.validate_job_state, commands.Validate(id="a"))
    start = commands.Start(id="a", worker="w-1", lock_ttl_ms=1_000, stall_after_ms=0, progress_timeout_ms=0)
    yield Example(api.start_processing, start, "already_locked")
    progress = EventOf("progress", "processing", {"progress": 1, "message": "m"})
    yield Example(api.update_progress, commands.Progress(**held, progress=1, message="m"), progress)
    yield Example(api.update_progress, commands.Progress(**held, progress=1, checkpoint=Raw(b"[7]")), PROGRESSED)
    extended = EventOf("extended", "processing", {"lock_expires_at": AT + 1_800_000})
    yield Example(api.extend_job_lock, commands.Extend(**held, additional_ms=86_400_000), extended)
    yield Example(api.append_output, commands.AppendOutput(**held, text="line 1\n"))
    yield Example(api.output, wire.Output(id="a"))
    yield Example(api.output, wire.Output(id="a", after="7.4", wait_ms=5))
    failing = commands.Fail(**held, error_message="e", error_code="c", retry_after_ms=5)
    yield Example(api.fail_job, failing, EventOf("retried", "queued", {"attempt": 1, "run_at": AT + 5}))
    again = replace(failing, checkpoint=Raw(b'{"done":3}'))
    yield Example(api.fail_job, again, EventOf("retried", "queued", {"attempt": 1, "run_at": AT + 5}))
    yield Example(api.fail_job, replace(failing, retry=False), EventOf("failed", "failed"))
    yield Example(api.release_job, commands.Release(**held), EventOf("released", "queued"))
    yield Example(api.release_job, commands.Release(**held, delay_ms=5), EventOf("released", "queued"))
    yield Example(api.cancel_job, commands.Cancel(id="a", reason="r"), EventOf("cancelled", "cancelled"))


def _admin_jobs() -> Iterator[Example]:
    api = calls.AdminJobCalls
    why: dict[str, Any] = {"id": "a", "reason": "r"}
    held: dict[str, Any] = {"id": "a", "lock_id": "L"}
    updates = commands.Updates(priority=1, metadata=Raw(b"[1]"))
    for to in ("queued", "failed", "completed", "cancelled"):
        command = commands.Transition(**why, from_="processing", to=to, updates=updates)
        yield Example(calls.AdminJobRequests.transition, command, EventOf("transitioned", to))
    yield Example(calls.AdminJobRequests.artifact, wire.ArtifactRequest(id="a"), "not_found")
    yield Example(calls.AdminJobRequests.artifact, wire.ArtifactRequest(id="a", late_result=7), "not_found")
    yield Example(api.validate_job, wire.ValidateJob(id="a"))
    yield Example(api.force_fail, commands.ForceFail(**why), EventOf("force_failed", "failed"))
    yield Example(api.force_reset, commands.ForceReset(**why), EventOf("force_reset", "queued"))
    yield Example(api.retry, commands.RetryJob(**why), "invalid_transition")
    extended = EventOf("extended", "processing", {"lock_expires_at": AT + 1_800_000})
    yield Example(api.extend_lock, commands.ExtendLock(**held, additional_ms=86_400_000), extended)
    yield Example(api.release_lock, commands.ReleaseLock(**held), EventOf("released", "queued"))
    yield Example(api.list_jobs, commands.SearchJobs(status="queued", worker="w-1", limit=5))
    yield Example(api.list_jobs, commands.SearchJobs(since=1, until=2, text="a b"))
    yield Example(api.list_jobs, commands.SearchJobs(finished_since=1, finished_until=2, error="0123456789ab"))
    yield Example(api.get_job, commands.GetVersion(id="a"))
    yield Example(api.delete_job, commands.Delete(**why), "invalid_transition")
    yield Example(api.timeline, commands.Timeline(id="a"))
    yield Example(api.why, commands.Why(id="a"))
    yield Example(api.output, wire.Output(id="a"))
    yield Example(api.late_results, commands.LateResults(id="a"))
    yield Example(api.adopt, commands.Adopt(**why), "invalid_transition")
    yield Example(api.adopt, commands.Adopt(**why, result=7), "invalid_transition")
    yield Example(api.cancel_job, commands.Cancel(**why), EventOf("cancelled", "cancelled"))
    yield Example(api.run_now, commands.RunNow(**why), "invalid_transition")
    yield Example(api.copy_job, commands.Copy(id="a"), EventOf("created", "queued"))
    update = commands.Update(**why, priority=3, run_at=AT, max_attempts=3)
    written = {"priority": 3, "run_at": AT, "max_attempts": 3}
    yield Example(api.update_job, update, EventOf("updated", "processing", written))
    yield Example(api.locks, commands.Locks())
    yield Example(api.locks, commands.Locks(limit=5, cursor="7"))


def _many_jobs() -> Iterator[Example]:
    requests, api = calls.ManyJobRequests, calls.ManyJobCalls
    old: dict[str, Any] = {"id": "old", "queue": "q", "status": "completed", "created_at": AT}
    yield Example(requests.import_jobs, commands.Import(**old), EventOf("imported", "completed"))
    yield Example(requests.preview_import, commands.ImportCheck(**old))
    yield Example(requests.export, commands.Export(status="failed", queue="q", kind="k", limit=5, cursor="7"))
    chosen = commands.PlanFilter(status="failed", queue="q", since=1)
    yield Example(requests.plan, commands.MakePlan(action="retry", filter=chosen, reason="r"), result=PLAN)
    group = responses.FailureGroup("0123456789ab", "no", None, 3, 1, 2, ["k"], ["q"], 1, 2, ["a"])
    failures = responses.FailuresView([group], 4, 7, 1, 5, False)
    yield Example(api.failures, wire.FailuresRequest(limit=5), result=failures)
    preview = responses.PreviewView([RECOVERED], 2, ["b"], [], [], False, AT, ["old-1", "old-2"])
    yield Example(api.preview, wire.NoFields(), result=preview)
    yield Example(api.get_plan, commands.PlanCommand(plan_id="p1"), result=PLAN)
    applied = responses.PlanResult("p1", "retry", 1, [responses.UnchangedJob("b", "failed", None, "gone")], [], 3)
    run = commands.RunPlan(plan_id="p1", trial=True, rate=commands.PlanRate(10))
    yield Example(api.apply_plan, run, result=applied)


def _queues() -> Iterator[Example]:
    for api in (calls.QueueCalls, calls.AdminQueueCalls):
        yield Example(api.queue_page, commands.Queues())
        yield Example(api.queue_page, commands.Queues(limit=5, busiest=True))
        yield Example(api.worker_page, commands.Workers())
        yield Example(api.worker_page, commands.Workers(state="silent", limit=5))
    goodbye = commands.Goodbye(name="w-2", instance="i", reason="drained")
    yield Example(calls.QueueCalls.goodbye, goodbye, "worker_not_found")
    admin = calls.AdminQueueCalls
    yield Example(admin.why_queue, commands.WhyQueue(name="q"))
    paused = EventOf("queue_paused", None, {"since": AT, "until": AT + 9})
    yield Example(admin.pause_queue, commands.Pause(name="q", reason="r", until=AT + 9), paused)
    yield Example(admin.resume_queue, commands.Resume(name="q", reason="r"))
    taken_back = responses.TakeBackView("w-1", 1, 1, 0, [RECOVERED], False, AT)
    yield Example(admin.take_back, commands.TakeBack(name="w-1", reason="r"), "worker_not_silent", taken_back)
    for call in (admin.quiet_worker, admin.resume_worker, admin.stop_worker):
        yield Example(call, call.command(name="w-1", reason="r"))
    rule = commands.AddQuietRule(host="h", version="1", queue="q", reason="r", until=AT + 9)
    quieted = {"rule": "q3", "host": "h", "version": "1", "queue": "q", "since": AT, "until": AT + 9}
    yield Example(admin.add_quiet_rule, rule, EventOf("workers_quieted", None, quieted))
    yield Example(admin.end_quiet_rule, commands.EndQuietRule(rule="q0", reason="r"), "quiet_rule_not_found")
    yield Example(admin.quiet_rules, commands.QuietRules())


def _schedules() -> Iterator[Example]:
    put = commands.PutSchedule(
        id="s", cron="0 3 * * *", timezone="Europe/Berlin", job=commands.ScheduledJob(queue="q"), source="app:shop"
    )
    row = {
        **{"id": "s", "timing": {"cron": "0 3 * * *", "timezone": "Europe/Berlin"}, "job": {"queue": "q"}},
        **{"source": "app:shop", "created_at": AT, "updated_at": AT, "timed_from": AT, "version": 3},
    }
    for api in (calls.ScheduleCalls, calls.AdminScheduleCalls):
        yield Example(api.put_schedule, put, EventOf("schedule_put", None, {"schedule": "s", "row": row}))
        yield Example(api.schedule_page, commands.Schedules(source="app:shop", limit=5, cursor="r"))
        yield Example(api.get_schedule, commands.GetSchedule(id="s"), "schedule_not_found")
    admin = calls.AdminScheduleCalls
    for call in (admin.run_schedule, admin.pause_schedule, admin.resume_schedule, admin.delete_schedule):
        yield Example(call, call.command(id="s", reason="r"), "schedule_not_found")


def _others() -> Iterator[Example]:
    events, daemon, store = calls.AdminEventCalls, calls.DaemonCalls, calls.StoreCalls
    for group in (calls.EventRequests, calls.AdminEventRequests):
        yield Example(group.events, wire.EventsRequest(type="created", follow=False))
    for nodes in (calls.NodeCalls, calls.AdminNodeCalls):
        yield Example(nodes.cluster, wire.NoFields(), result=responses.ClusterView(role="single"))
    yield Example(events.audit, commands.AuditLog(who="eve", action="cancel", job_id="a", since=5, limit=5, cursor="7"))
    yield Example(events.webhooks, wire.NoFields(), result=responses.WebhookList([WEBHOOK]))
    page = responses.DeliveryPage([DELIVERY], "7")
    yield Example(events.deliveries, wire.Deliveries(name="q", state="dead-lettered", limit=5, cursor="9"), result=page)
    yield Example(events.resend_delivery, wire.DeliverAgain(name="q", id=7, reason="r"), result=DELIVERY)
    again = wire.DeliverAllAgain(name="q", upto=9, reason="r")
    yield Example(events.resend_dead_lettered, again, result=responses.Resent(3))
    yield Example(events.test_webhook, wire.TestWebhook(name="q", reason="r"), result=DELIVERY)
    yield Example(daemon.stats, commands.Stats())
    yield Example(daemon.health, wire.NoFields())
    yield Example(daemon.force_cleanup, wire.WithReason("r"), result=REPORT)
    yield Example(daemon.cleanup_state, wire.NoFields(), result=responses.CleanupState(REPORT, True, 1234))
    recovered = responses.RecoverStuckView(1, 1, 0, [RECOVERED], AT)
    yield Example(daemon.detect_and_recover_stuck_jobs, wire.WithReason("r"), result=recovered)
    yield Example(daemon.reports, wire.Reports(limit=5), result=responses.ReportList([REPORT]))
    yield Example(daemon.alerts, wire.NoFields(), result=responses.AlertList([ALERT]))
    yield Example(daemon.problems, wire.Problems(severity="critical", queue="mail"), result=PROBLEMS)
    yield Example(daemon.clock, wire.NoFields(), result=responses.ClockView(AT, True, "30 days ahead"))
    accepted = responses.ClockView(AT, False, "The wall clock agrees with the last stored time.")
    yield Example(daemon.accept_clock, wire.WithReason("r"), result=accepted)
    yield Example(daemon.step_down, wire.StepDown("r"), "not_found")
    yield Example(calls.AdminNodeCalls.metrics, wire.NoFields())
    yield Example(calls.StoreRequests.backup, wire.BackupRequest(id="b1"))
    damaged = responses.QuarantineList([responses.QuarantinedJob("bad-1", "checksum")])
    yield Example(store.quarantine, wire.NoFields(), result=damaged)
    yield Example(store.disk, wire.NoFields(), result=DISK_USE)
    rows = responses.CheckedRows("jobs", 3, [responses.DamagedRow("job bad-2", "checksum")], "jobs:3")
    yield Example(store.check_rows, wire.RowCheckRequest(), result=rows)
    yield Example(store.backups, wire.NoFields(), result=responses.BackupList([BACKUP]))


EXAMPLES: Final = tuple(_examples())
CALLS: Final = {(call.method, call.path): call for call in calls_of(*calls.WORKER_API, *calls.ADMIN_API)}
# Examples of commands for the actor.
COMMANDS: Final = tuple(example for example in EXAMPLES if type(example.command) in get_args(AnyCommand))
JOB_COMMANDS: Final = tuple(example for example in COMMANDS if example.command.is_of_job)
HOLDERS: Final = tuple(example for example in JOB_COMMANDS if hasattr(example.command, "lock_id"))


def aimed(command: Command, **fields: Any) -> Any:
    """Return `command` with those of `fields` that it has."""
    names = command.__struct_fields__
    return replace(command, **{name: value for name, value in fields.items() if name in names})


def result_of(call: Any) -> Any:
    """Return the result of a call to which a service responds."""
    return next(example.result for example in EXAMPLES if example.call is call and example.result is not None)
