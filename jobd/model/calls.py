"""The calls of both APIs.

Each group is a part of the methods of the clients (client/apis.py), but the groups whose names end in `Requests`: for
their calls, the clients have methods of their own.
"""

from __future__ import annotations

from typing import Final

from jobd.model import responses
from jobd.model.api_call import EVENT_STREAM, ApiCall, CallGroup
from jobd.model.commands import (
    Adopt,
    AuditLog,
    Bulk,
    Cancel,
    Claim,
    Complete,
    Create,
    Delete,
    Export,
    Extend,
    ExtendLock,
    Fail,
    ForceFail,
    ForceReset,
    Get,
    GetVersion,
    Import,
    ImportCheck,
    LateResults,
    ListJobs,
    Locks,
    MakePlan,
    Pause,
    PlanCommand,
    Progress,
    Queues,
    Release,
    ReleaseLock,
    Resume,
    RetryJob,
    RunNow,
    SearchJobs,
    Start,
    Stats,
    TakeBack,
    Timeline,
    Transition,
    Update,
    Validate,
    Why,
    Workers,
)
from jobd.model.events import StreamedEvent
from jobd.model.requests import (
    ArtifactRequest,
    BackupRequest,
    DeliverAgain,
    DeliverAllAgain,
    Deliveries,
    EventsRequest,
    FailuresRequest,
    NoFields,
    Reports,
    RowCheckRequest,
    StepDown,
    TestWebhook,
    ValidateJob,
    WithReason,
)
from jobd.model.responses import AdminLockView, JobPage, JobView, LockState, TransitionView

ADMIN: Final = "/admin/job-management"
FILE_TYPE: Final = "application/octet-stream"
DATABASE_TYPE: Final = "application/vnd.sqlite3"
METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
RUN_MS: Final = 5 * 60_000  # a run over millions of jobs

# ---------------------------------------------------------------------------------------------------------------------
# The worker API.


class JobRequests(CallGroup, tag="Jobs"):
    create = ApiCall(
        Create,
        JobView,
        "POST",
        "/v1/jobs",
        key=True,
        status=201,
        other_statuses={200: "An earlier request with the same content created this job."},
    )
    bulk = ApiCall(Bulk, responses.JobList, "POST", "/v1/jobs/bulk", key=True, status=201)
    claim = ApiCall(Claim, responses.Grants, "POST", "/v1/claim", key=True)
    complete = ApiCall(Complete, JobView, "POST", "/v1/jobs/{id}/complete")


class JobCalls(CallGroup, tag="Jobs"):
    get_job = ApiCall(Get, JobView, "GET", "/v1/jobs/{id}")
    list_jobs = ApiCall(ListJobs, JobPage, "GET", "/v1/jobs")
    timeline = ApiCall(Timeline, responses.TimelineView, "GET", "/v1/jobs/{id}/timeline").then(lambda view: view.events)
    why = ApiCall(Why, responses.WhyView, "GET", "/v1/jobs/{id}/why")
    validate_job_state = ApiCall(Validate, responses.Validation, "GET", "/v1/jobs/{id}/validate")
    start_processing = ApiCall(Start, responses.GrantView, "POST", "/v1/jobs/{id}/start", key=True)
    update_progress = ApiCall(Progress, LockState, "POST", "/v1/jobs/{id}/progress")
    extend_job_lock = ApiCall(Extend, LockState, "POST", "/v1/jobs/{id}/extend")
    fail_job = ApiCall(Fail, JobView, "POST", "/v1/jobs/{id}/fail")
    release_job = ApiCall(Release, JobView, "POST", "/v1/jobs/{id}/release")
    cancel_job = ApiCall(Cancel, JobView, "POST", "/v1/jobs/{id}/cancel", key=True)


class QueueCalls(CallGroup, tag="Queues and workers"):
    queue_page = ApiCall(Queues, responses.QueueList, "GET", "/v1/queues")
    queues = queue_page.then(lambda page: page.queues)
    worker_page = ApiCall(Workers, responses.WorkerList, "GET", "/v1/workers")
    workers = worker_page.then(lambda page: page.workers)


class EventRequests(CallGroup, tag="Events"):
    events = ApiCall(EventsRequest, StreamedEvent, "GET", "/v1/events", content_type=EVENT_STREAM)


class NodeCalls(CallGroup, tag="The daemon"):
    cluster = ApiCall(
        NoFields,
        responses.ClusterView,
        "GET",
        "/v1/cluster",
        on_standby=True,
        summary="Return the state of the cluster: its nodes, its leader, and how far this node is behind.",
    )


# ---------------------------------------------------------------------------------------------------------------------
# The admin API. Paths are those that existing dashboards expect.


class AdminJobRequests(CallGroup, tag="Jobs", base=ADMIN, auth="admin"):
    transition = ApiCall(Transition, TransitionView, "POST", "/transition", key=True)
    artifact = ApiCall(ArtifactRequest, bytes, "GET", "/jobs/{id}/artifact", content_type=FILE_TYPE, audited=True)


class AdminJobCalls(CallGroup, tag="Jobs", base=ADMIN, auth="admin"):
    validate_job = ApiCall(ValidateJob, responses.ValidateJobView, "GET", "/validate-job")
    force_fail = ApiCall(ForceFail, TransitionView, "POST", "/force-fail", key=True)
    force_reset = ApiCall(ForceReset, TransitionView, "POST", "/force-reset", key=True)
    retry = ApiCall(RetryJob, TransitionView, "POST", "/retry", key=True)
    extend_lock = ApiCall(ExtendLock, AdminLockView, "POST", "/extend-lock", key=True)
    release_lock = ApiCall(ReleaseLock, AdminLockView, "POST", "/release-lock", key=True)
    list_jobs = ApiCall(SearchJobs, JobPage, "GET", "/jobs")
    get_job = ApiCall(GetVersion, JobView, "GET", "/jobs/{id}")
    delete_job = ApiCall(Delete, JobView, "DELETE", "/jobs/{id}", key=True)
    timeline = ApiCall(Timeline, responses.TimelineView, "GET", "/jobs/{id}/timeline").then(lambda view: view.events)
    why = ApiCall(Why, responses.WhyView, "GET", "/jobs/{id}/why")
    late_results = ApiCall(LateResults, responses.LateResultList, "GET", "/jobs/{id}/late-results").then(
        lambda view: view.late_results
    )
    adopt = ApiCall(Adopt, JobView, "POST", "/jobs/{id}/adopt", key=True)
    cancel_job = ApiCall(Cancel, JobView, "POST", "/jobs/{id}/cancel", key=True)
    run_now = ApiCall(RunNow, JobView, "POST", "/jobs/{id}/run-now", key=True)
    update_job = ApiCall(Update, JobView, "POST", "/jobs/{id}/update", key=True)
    locks = ApiCall(Locks, responses.LockList, "GET", "/locks").then(lambda view: view.locks)


class ManyJobRequests(CallGroup, tag="Many jobs", base=ADMIN, auth="admin"):
    import_jobs = ApiCall(Import, responses.ImportResult, "POST", "/import", body="lines", repeatable=False)
    preview_import = ApiCall(
        ImportCheck, responses.ImportPreview, "POST", "/import/preview", body="lines", repeatable=False
    )
    export = ApiCall(Export, responses.ExportPage, "GET", "/export", audited=True)
    plan = ApiCall(MakePlan, responses.PlanView, "POST", "/plans", run_ms=RUN_MS)


class ManyJobCalls(CallGroup, tag="Many jobs", base=ADMIN, auth="admin"):
    failures = ApiCall(FailuresRequest, responses.FailuresView, "GET", "/failures")
    preview = ApiCall(
        NoFields,
        responses.PreviewView,
        "GET",
        "/preview",
        summary="Show what recovery and a cleanup run would do now: the first 1000 jobs of each kind. Changes nothing.",
        errors=("overloaded", "shutting_down", "outcome_unknown"),
    )
    get_plan = ApiCall(
        PlanCommand,
        responses.PlanView,
        "GET",
        "/plans/{plan_id}",
        summary="Get a plan, with its result if it was applied. Plans are kept for 15 min, applied plans for 12 h.",
    )
    apply_plan = ApiCall(
        PlanCommand,
        responses.PlanResult,
        "POST",
        "/plans/{plan_id}/apply",
        run_ms=RUN_MS,
        summary="Apply a plan to every job that has not changed since. A repeated request returns the same result.",
    )


class AdminQueueCalls(CallGroup, tag="Queues and workers", base=ADMIN, auth="admin"):
    pause_queue = ApiCall(Pause, responses.PausedView, "POST", "/queues/{name}/pause", key=True)
    resume_queue = ApiCall(Resume, responses.PausedView, "POST", "/queues/{name}/resume", key=True)
    queue_page = ApiCall(Queues, responses.QueueList, "GET", "/queues")
    queues = queue_page.then(lambda page: page.queues)
    worker_page = ApiCall(Workers, responses.WorkerList, "GET", "/workers")
    workers = worker_page.then(lambda page: page.workers)
    # Without a dry run it is not repeated, because the worker is not silent any more.
    take_back = ApiCall(
        TakeBack, responses.TakeBackView, "POST", "/workers/{name}/take-back", repeatable=False, run_ms=RUN_MS
    )


class AdminEventRequests(CallGroup, tag="Events", base=ADMIN, auth="admin"):
    events = ApiCall(EventsRequest, StreamedEvent, "GET", "/events", content_type=EVENT_STREAM)


class AdminEventCalls(CallGroup, tag="Events", base=ADMIN, auth="admin"):
    audit = ApiCall(AuditLog, responses.AuditPage, "GET", "/audit")
    webhooks = ApiCall(
        NoFields, responses.WebhookList, "GET", "/webhooks", summary="List the configured webhooks and their state."
    ).then(lambda view: view.webhooks)
    deliveries = ApiCall(Deliveries, responses.DeliveryPage, "GET", "/webhooks/{name}/deliveries")
    deliver_again = ApiCall(DeliverAgain, responses.DeliveryView, "POST", "/webhooks/{name}/resend", repeatable=False)
    deliver_all_again = ApiCall(
        DeliverAllAgain, responses.Resent, "POST", "/webhooks/{name}/resend-dead-lettered", repeatable=False
    ).then(lambda view: view.resent)
    test_webhook = ApiCall(TestWebhook, responses.DeliveryView, "POST", "/webhooks/{name}/test", repeatable=False)


class DaemonCalls(CallGroup, tag="The daemon", base=ADMIN, auth="admin"):
    stats = ApiCall(Stats, responses.StatsView, "GET", "/stats")
    health = ApiCall(
        NoFields,
        responses.HealthView,
        "GET",
        "/health",
        summary="Return the health of database, memory, artifact store and cleanup, measured at most 5 s ago.",
        other_statuses={503: "A part is unhealthy; the same body says which."},
    )
    force_cleanup = ApiCall(
        WithReason,
        responses.CleanupReport,
        "POST",
        "/cleanup",
        run_ms=RUN_MS,
        summary="Start a cleanup run, or wait for the one in progress, and return its report.",
    )
    cleanup_state = ApiCall(
        NoFields,
        responses.CleanupState,
        "GET",
        "/cleanup",
        summary="Return the state of cleanup and the report of the last run.",
    )
    # Not repeated, because the second request would find no stalled job.
    detect_and_recover_stuck_jobs = ApiCall(
        WithReason,
        responses.RecoverStuckView,
        "POST",
        "/recover-stuck",
        repeatable=False,
        run_ms=RUN_MS,
        summary="Recover the jobs that are stalled now.",
    )
    reports = ApiCall(Reports, responses.ReportList, "GET", "/reports").then(lambda view: view.reports)
    alerts = ApiCall(NoFields, responses.AlertList, "GET", "/alerts", summary="List all alerts, firing or not.").then(
        lambda view: view.alerts
    )
    clock = ApiCall(
        NoFields,
        responses.ClockView,
        "GET",
        "/clock",
        summary="Return the time of the daemon's clock, and whether the clock is suspect.",
    )
    accept_clock = ApiCall(
        WithReason,
        responses.ClockView,
        "POST",
        "/clock/accept",
        summary="Accept the clock as correct. Jobs are deleted and failed by age again.",
    )
    # Not repeated, because the second request would reach the next leader.
    step_down = ApiCall(
        StepDown,
        responses.ClusterView,
        "POST",
        "/cluster/step-down",
        repeatable=False,
        summary="Make this node step down, so that a standby takes over at once. The process ends with code 75.\n\n"
        "It is rejected if no standby is ready, unless `force` is true.",
        errors=("not_found", "no_standby"),
    )


class AdminNodeCalls(CallGroup, tag="The daemon", auth="admin"):
    cluster = ApiCall(NoFields, responses.ClusterView, "GET", "/v1/cluster", **NodeCalls.cluster.options)
    metrics = ApiCall(
        NoFields,
        str,
        "GET",
        "/metrics",
        on_standby=True,
        content_type=METRICS_TYPE,
        summary="Return metrics in the Prometheus text format.",
    )


class StoreRequests(CallGroup, tag="The store", base=ADMIN, auth="admin"):
    backup = ApiCall(BackupRequest, bytes, "GET", "/backup", content_type=DATABASE_TYPE, secret=True)


class StoreCalls(CallGroup, tag="The store", base=ADMIN, auth="admin"):
    quarantine = ApiCall(
        NoFields, responses.QuarantineList, "GET", "/quarantine", summary="List the damaged jobs in quarantine."
    ).then(lambda view: view.jobs)
    check_rows = ApiCall(RowCheckRequest, responses.CheckedRows, "GET", "/check-rows")
    backups = ApiCall(
        NoFields,
        responses.BackupList,
        "GET",
        "/backups",
        summary="List the backups in progress and the last 20 that ended, newest first.",
    ).then(lambda view: view.backups)


WORKER_API: Final = (JobRequests, JobCalls, QueueCalls, EventRequests, NodeCalls)
ADMIN_API: Final = (
    AdminJobRequests,
    AdminJobCalls,
    ManyJobRequests,
    ManyJobCalls,
    AdminQueueCalls,
    AdminEventRequests,
    AdminEventCalls,
    DaemonCalls,
    AdminNodeCalls,
    StoreRequests,
    StoreCalls,
)
