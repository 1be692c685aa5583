"""The calls of both APIs.

Each group is a part of the methods of the clients (client/apis.py), but the groups whose names end in `Requests`: for
their calls, the clients have methods of their own.
"""

from __future__ import annotations

from typing import Final, TypeVar, Unpack

from jobd.model import commands, requests, responses
from jobd.model.api_call import EVENT_STREAM, ApiCall, CallGroup, CallOptions
from jobd.model.events import StreamedEvent
from jobd.model.problems import ProblemList

ADMIN: Final = "/admin/job-management"
FILE_TYPE: Final = "application/octet-stream"
DATABASE_TYPE: Final = "application/vnd.sqlite3"
METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
RUN_MS: Final = 5 * 60_000  # a run over millions of jobs

T = TypeVar("T")


def _view(response: type[T], path: str, run_ms: int = 0, **options: Unpack[CallOptions]) -> ApiCall[[], T]:
    """Return the call of a view without parameters."""
    return ApiCall(requests.NoFields, response, "GET", path, run_ms=run_ms, **options)


# ---------------------------------------------------------------------------------------------------------------------
# The worker API.


class JobRequests(CallGroup, tag="Jobs"):
    create = ApiCall(
        commands.Create,
        responses.JobView,
        "POST",
        "/v1/jobs",
        key=True,
        status=201,
        other_statuses={200: "An earlier request with the same content created this job."},
    )
    bulk = ApiCall(commands.Bulk, responses.JobList, "POST", "/v1/jobs/bulk", key=True, status=201)
    claim = ApiCall(commands.Claim, responses.Grants, "POST", "/v1/claim", key=True)
    complete = ApiCall(commands.Complete, responses.JobView, "POST", "/v1/jobs/{id}/complete")


class JobCalls(CallGroup, tag="Jobs"):
    get_job = ApiCall(commands.Get, responses.JobView, "GET", "/v1/jobs/{id}")
    wait_for_jobs = ApiCall(commands.WaitForJobs, responses.JobEnds, "POST", "/v1/jobs/wait")
    list_jobs = ApiCall(commands.ListJobs, responses.JobPage, "GET", "/v1/jobs")
    timeline = ApiCall(commands.Timeline, responses.TimelineView, "GET", "/v1/jobs/{id}/timeline").then(
        lambda view: view.events
    )
    why = ApiCall(commands.Why, responses.WhyView, "GET", "/v1/jobs/{id}/why")
    validate_job_state = ApiCall(commands.Validate, responses.Validation, "GET", "/v1/jobs/{id}/validate")
    start_processing = ApiCall(commands.Start, responses.GrantView, "POST", "/v1/jobs/{id}/start", key=True)
    update_progress = ApiCall(commands.Progress, responses.LockState, "POST", "/v1/jobs/{id}/progress")
    append_output = ApiCall(
        commands.AppendOutput, responses.OutputEnd, "POST", "/v1/jobs/{id}/output", repeatable=False
    )
    output = ApiCall(requests.Output, responses.OutputView, "GET", "/v1/jobs/{id}/output")
    extend_job_lock = ApiCall(commands.Extend, responses.LockState, "POST", "/v1/jobs/{id}/extend")
    fail_job = ApiCall(commands.Fail, responses.JobView, "POST", "/v1/jobs/{id}/fail")
    release_job = ApiCall(commands.Release, responses.JobView, "POST", "/v1/jobs/{id}/release")
    cancel_job = ApiCall(commands.Cancel, responses.JobView, "POST", "/v1/jobs/{id}/cancel", key=True)


class QueueCalls(CallGroup, tag="Queues and workers"):
    queue_page = ApiCall(commands.Queues, responses.QueueList, "GET", "/v1/queues")
    queues = queue_page.then(lambda page: page.queues)
    worker_page = ApiCall(commands.Workers, responses.WorkerList, "GET", "/v1/workers")
    workers = worker_page.then(lambda page: page.workers)
    goodbye = ApiCall(commands.Goodbye, responses.GoodbyeView, "POST", "/v1/workers/{name}/goodbye")


class ScheduleCalls(CallGroup, tag="Schedules"):
    put_schedule = ApiCall(
        commands.PutSchedule,
        responses.ScheduleView,
        "PUT",
        "/v1/schedules/{id}",
        other_statuses={201: "The schedule is new."},
    )
    schedule_page = ApiCall(commands.Schedules, responses.ScheduleList, "GET", "/v1/schedules")
    schedules = schedule_page.then(lambda page: page.schedules)
    get_schedule = ApiCall(commands.GetSchedule, responses.ScheduleView, "GET", "/v1/schedules/{id}")


class EventRequests(CallGroup, tag="Events"):
    events = ApiCall(requests.EventsRequest, StreamedEvent, "GET", "/v1/events", content_type=EVENT_STREAM)


class NodeCalls(CallGroup, tag="The daemon"):
    cluster = _view(
        responses.ClusterView,
        "/v1/cluster",
        on_standby=True,
        summary="Return the state of the cluster: its nodes, its leader, and how far this node is behind.",
    )


# ---------------------------------------------------------------------------------------------------------------------
# The admin API. Paths are those that existing dashboards expect.


class AdminJobRequests(CallGroup, tag="Jobs", base=ADMIN, auth="admin"):
    transition = ApiCall(commands.Transition, responses.TransitionView, "POST", "/transition", key=True)
    artifact = ApiCall(
        requests.ArtifactRequest, bytes, "GET", "/jobs/{id}/artifact", content_type=FILE_TYPE, audited=True
    )


class AdminJobCalls(CallGroup, tag="Jobs", base=ADMIN, auth="admin"):
    validate_job = ApiCall(requests.ValidateJob, responses.ValidateJobView, "GET", "/validate-job")
    force_fail = ApiCall(commands.ForceFail, responses.TransitionView, "POST", "/force-fail", key=True)
    force_reset = ApiCall(commands.ForceReset, responses.TransitionView, "POST", "/force-reset", key=True)
    retry = ApiCall(commands.RetryJob, responses.TransitionView, "POST", "/retry", key=True)
    extend_lock = ApiCall(commands.ExtendLock, responses.AdminLockView, "POST", "/extend-lock", key=True)
    release_lock = ApiCall(commands.ReleaseLock, responses.AdminLockView, "POST", "/release-lock", key=True)
    list_jobs = ApiCall(commands.SearchJobs, responses.JobPage, "GET", "/jobs")
    get_job = ApiCall(commands.GetVersion, responses.JobView, "GET", "/jobs/{id}")
    delete_job = ApiCall(commands.Delete, responses.JobView, "DELETE", "/jobs/{id}", key=True)
    timeline = ApiCall(commands.Timeline, responses.TimelineView, "GET", "/jobs/{id}/timeline").then(
        lambda view: view.events
    )
    why = ApiCall(commands.Why, responses.WhyView, "GET", "/jobs/{id}/why")
    output = ApiCall(requests.Output, responses.OutputView, "GET", "/jobs/{id}/output")
    late_results = ApiCall(commands.LateResults, responses.LateResultList, "GET", "/jobs/{id}/late-results").then(
        lambda view: view.late_results
    )
    adopt = ApiCall(commands.Adopt, responses.JobView, "POST", "/jobs/{id}/adopt", key=True)
    cancel_job = ApiCall(commands.Cancel, responses.JobView, "POST", "/jobs/{id}/cancel", key=True)
    copy_job = ApiCall(commands.Copy, responses.JobView, "POST", "/jobs/{id}/copy", key=True, status=201)
    run_now = ApiCall(commands.RunNow, responses.JobView, "POST", "/jobs/{id}/run-now", key=True)
    update_job = ApiCall(commands.Update, responses.JobView, "POST", "/jobs/{id}/update", key=True)
    locks = ApiCall(commands.Locks, responses.LockList, "GET", "/locks").then(lambda view: view.locks)


class ManyJobRequests(CallGroup, tag="Many jobs", base=ADMIN, auth="admin"):
    import_jobs = ApiCall(commands.Import, responses.ImportResult, "POST", "/import", body="lines", repeatable=False)
    preview_import = ApiCall(
        commands.ImportCheck, responses.ImportPreview, "POST", "/import/preview", body="lines", repeatable=False
    )
    export = ApiCall(commands.Export, responses.ExportPage, "GET", "/export", audited=True)
    plan = ApiCall(commands.MakePlan, responses.PlanView, "POST", "/plans", run_ms=RUN_MS)


class ManyJobCalls(CallGroup, tag="Many jobs", base=ADMIN, auth="admin"):
    failures = ApiCall(requests.FailuresRequest, responses.FailuresView, "GET", "/failures")
    preview = _view(
        responses.PreviewView,
        "/preview",
        summary="Show what recovery and a cleanup run would do now: the first 1000 jobs of each kind. Changes nothing.",
        errors=("overloaded", "shutting_down", "outcome_unknown"),
    )
    get_plan = ApiCall(
        commands.PlanCommand,
        responses.PlanView,
        "GET",
        "/plans/{plan_id}",
        summary="Get a plan, with its result if it was applied. Plans are kept for 15 min, applied plans for 12 h.",
    )
    apply_plan = ApiCall(
        commands.RunPlan,
        responses.PlanResult,
        "POST",
        "/plans/{plan_id}/apply",
        run_ms=RUN_MS,
    )


class AdminQueueCalls(CallGroup, tag="Queues and workers", base=ADMIN, auth="admin"):
    pause_queue = ApiCall(commands.Pause, responses.PausedView, "POST", "/queues/{name}/pause", key=True)
    resume_queue = ApiCall(commands.Resume, responses.PausedView, "POST", "/queues/{name}/resume", key=True)
    queue_page = ApiCall(commands.Queues, responses.QueueList, "GET", "/queues")
    queues = queue_page.then(lambda page: page.queues)
    why_queue = ApiCall(commands.WhyQueue, responses.QueueWhyView, "GET", "/queues/{name}/why")
    worker_page = ApiCall(commands.Workers, responses.WorkerList, "GET", "/workers")
    workers = worker_page.then(lambda page: page.workers)
    # Without a dry run it is not repeated, because the worker is not silent any more.
    take_back = ApiCall(
        commands.TakeBack, responses.TakeBackView, "POST", "/workers/{name}/take-back", repeatable=False, run_ms=RUN_MS
    )
    quiet_worker = ApiCall(commands.QuietWorker, responses.DirectedView, "POST", "/workers/{name}/quiet")
    resume_worker = ApiCall(commands.ResumeWorker, responses.DirectedView, "POST", "/workers/{name}/resume")
    stop_worker = ApiCall(commands.StopWorker, responses.DirectedView, "POST", "/workers/{name}/stop")
    add_quiet_rule = ApiCall(commands.AddQuietRule, responses.QuietRuleView, "POST", "/quiet")
    end_quiet_rule = ApiCall(commands.EndQuietRule, responses.QuietRuleView, "DELETE", "/quiet/{rule}")
    quiet_rules = ApiCall(commands.QuietRules, responses.QuietRuleList, "GET", "/quiet").then(lambda view: view.rules)


class AdminScheduleCalls(CallGroup, tag="Schedules", base=ADMIN, auth="admin"):
    put_schedule = ApiCall(
        commands.PutSchedule, responses.ScheduleView, "PUT", "/schedules/{id}", **ScheduleCalls.put_schedule.options
    )
    schedule_page = ApiCall(commands.Schedules, responses.ScheduleList, "GET", "/schedules")
    schedules = schedule_page.then(lambda page: page.schedules)
    get_schedule = ApiCall(commands.GetSchedule, responses.ScheduleView, "GET", "/schedules/{id}")
    run_schedule = ApiCall(commands.RunSchedule, responses.JobView, "POST", "/schedules/{id}/run", key=True, status=201)
    pause_schedule = ApiCall(commands.PauseSchedule, responses.ScheduleView, "POST", "/schedules/{id}/pause", key=True)
    resume_schedule = ApiCall(
        commands.ResumeSchedule, responses.ScheduleView, "POST", "/schedules/{id}/resume", key=True
    )
    delete_schedule = ApiCall(commands.DeleteSchedule, responses.ScheduleView, "DELETE", "/schedules/{id}", key=True)


class AdminEventRequests(CallGroup, tag="Events", base=ADMIN, auth="admin"):
    events = ApiCall(requests.EventsRequest, StreamedEvent, "GET", "/events", content_type=EVENT_STREAM)


class AdminEventCalls(CallGroup, tag="Events", base=ADMIN, auth="admin"):
    audit = ApiCall(commands.AuditLog, responses.AuditPage, "GET", "/audit")
    webhooks = _view(responses.WebhookList, "/webhooks", summary="List the configured webhooks and their state.").then(
        lambda view: view.webhooks
    )
    deliveries = ApiCall(requests.Deliveries, responses.DeliveryPage, "GET", "/webhooks/{name}/deliveries")
    resend_delivery = ApiCall(
        requests.DeliverAgain, responses.DeliveryView, "POST", "/webhooks/{name}/resend", repeatable=False
    )
    resend_dead_lettered = ApiCall(
        requests.DeliverAllAgain, responses.Resent, "POST", "/webhooks/{name}/resend-dead-lettered", repeatable=False
    ).then(lambda view: view.resent)
    test_webhook = ApiCall(
        requests.TestWebhook, responses.DeliveryView, "POST", "/webhooks/{name}/test", repeatable=False
    )


class DaemonCalls(CallGroup, tag="The daemon", base=ADMIN, auth="admin"):
    stats = ApiCall(commands.Stats, responses.StatsView, "GET", "/stats")
    health = _view(
        responses.HealthView,
        "/health",
        summary="Return the health of database, memory, artifact store and cleanup, measured at most 5 s ago.",
        other_statuses={503: "A part is unhealthy; the same body says which."},
    )
    force_cleanup = ApiCall(
        requests.WithReason,
        responses.CleanupReport,
        "POST",
        "/cleanup",
        run_ms=RUN_MS,
        summary="Start a cleanup run, or wait for the one in progress, and return its report.",
    )
    cleanup_state = _view(
        responses.CleanupState, "/cleanup", summary="Return the state of cleanup and the report of the last run."
    )
    # Not repeated, because the second request would find no stalled job.
    detect_and_recover_stuck_jobs = ApiCall(
        requests.WithReason,
        responses.RecoverStuckView,
        "POST",
        "/recover-stuck",
        repeatable=False,
        run_ms=RUN_MS,
        summary="Recover the jobs that are stalled now.",
    )
    reports = ApiCall(requests.Reports, responses.ReportList, "GET", "/reports").then(lambda view: view.reports)
    alerts = _view(responses.AlertList, "/alerts", summary="List all alerts, firing or not.").then(
        lambda view: view.alerts
    )
    problems = ApiCall(
        requests.Problems,
        ProblemList,
        "GET",
        "/problems",
        summary="List what needs an operator, the most urgent first, and what is known.",
    )
    clock = _view(
        responses.ClockView,
        "/clock",
        summary="Return the time of the daemon's clock, and whether the clock is suspect.",
    )
    accept_clock = ApiCall(
        requests.WithReason,
        responses.ClockView,
        "POST",
        "/clock/accept",
        summary="Accept the clock as correct. Jobs are deleted and failed by age again.",
    )
    # Not repeated, because the second request would reach the next leader.
    step_down = ApiCall(
        requests.StepDown,
        responses.ClusterView,
        "POST",
        "/cluster/step-down",
        repeatable=False,
        summary="Make this node step down, so that a standby takes over at once. The process ends with code 75.\n\n"
        "It is rejected if no standby is ready, unless `force` is true.",
        errors=("not_found", "no_standby"),
    )


class AdminNodeCalls(CallGroup, tag="The daemon", auth="admin"):
    cluster = _view(responses.ClusterView, "/v1/cluster", **NodeCalls.cluster.options)
    metrics = _view(
        str,
        "/metrics",
        on_standby=True,
        content_type=METRICS_TYPE,
        summary="Return metrics in the Prometheus text format.",
    )


class StoreRequests(CallGroup, tag="The store", base=ADMIN, auth="admin"):
    backup = ApiCall(requests.BackupRequest, bytes, "GET", "/backup", content_type=DATABASE_TYPE, secret=True)


class StoreCalls(CallGroup, tag="The store", base=ADMIN, auth="admin"):
    quarantine = _view(responses.QuarantineList, "/quarantine", summary="List the damaged jobs in quarantine.").then(
        lambda view: view.jobs
    )
    disk = _view(
        responses.DiskUse,
        "/disk",
        run_ms=RUN_MS,
        summary="Return what the disk of the store holds: the files exactly, the jobs of each kind from a sample.",
    )
    check_rows = ApiCall(requests.RowCheckRequest, responses.CheckedRows, "GET", "/check-rows")
    backups = _view(
        responses.BackupList,
        "/backups",
        summary="List the backups in progress and the last 20 that ended, newest first.",
    ).then(lambda view: view.backups)


WORKER_API: Final = (JobRequests, JobCalls, QueueCalls, ScheduleCalls, EventRequests, NodeCalls)
ADMIN_API: Final = (
    AdminJobRequests,
    AdminJobCalls,
    ManyJobRequests,
    ManyJobCalls,
    AdminQueueCalls,
    AdminScheduleCalls,
    AdminEventRequests,
    AdminEventCalls,
    DaemonCalls,
    AdminNodeCalls,
    StoreRequests,
    StoreCalls,
)
