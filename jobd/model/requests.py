"""Requests that the daemon answers without a command for the actor."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta

from jobd.model.commands import MAX_NAMES, MAX_WAIT_MS, Command, JobCommand, NamedJobCommand
from jobd.model.fields import BackupId, Cursor, PageLimit, QueueFilter, Reason, RowCursor, doc
from jobd.model.problems import Severity
from jobd.model.responses import DeliveryState
from jobd.model.webhooks import WebhookName

MAX_REPORTS: Final = 500
MAX_GROUPS: Final = 200
MAX_NUMBER: Final = (1 << 63) - 1
MAX_BACK: Final = 10_000

OutputPosition = Annotated[
    str, Meta(pattern=r"^[0-9]{1,19}\.[0-9]{1,19}$(?!\n)", extra={"expected": "the `position` of an earlier response"})
]
Names = Annotated[str, Meta(min_length=1, max_length=MAX_NAMES * 201)]


class NoFields(Command, frozen=True, kw_only=True):
    """A request without fields."""


class WithReason(Command, frozen=True):
    """A call whose only field is the reason for the audit log."""

    reason: Reason | None = None


class StepDown(WithReason, frozen=True, kw_only=True):
    """Make this node step down."""

    force: Annotated[bool, doc("Step down even if no standby is ready to take over.")] = False


class ValidateJob(NamedJobCommand, frozen=True):
    """Get a job, and the issues that validation finds in it."""


class Reports(Command, frozen=True):
    """List the reports of cleanup runs, newest first. The latest 500 are kept."""

    limit: Annotated[int, doc("Maximum number of reports.", ge=1, le=MAX_REPORTS)] = 50


class Problems(Command, frozen=True):
    """List the open problems, the most urgent first."""

    severity: Annotated[Severity, doc("Only problems of this severity.")] | None = None
    queue: QueueFilter | None = None


class FailuresRequest(Command, frozen=True):
    """Group failed and retrying jobs by error, largest groups first."""

    limit: Annotated[int, doc("Maximum number of groups.", ge=1, le=MAX_GROUPS)] = 50


class WebhookCommand(Command, frozen=True):
    """A call about a webhook. The path gives its name."""

    errors = ("not_found",)

    name: Annotated[WebhookName, doc("Name of the webhook.")]


class Deliveries(WebhookCommand, frozen=True, kw_only=True):
    """List the waiting and recent deliveries of a webhook, newest first."""

    state: Annotated[DeliveryState | None, doc("Only deliveries in this state.")] = None
    limit: PageLimit = 50
    cursor: Cursor | None = None


class RowCheckRequest(Command, frozen=True):
    """Check the next rows of the store against their checksums. Quarantine and list the damaged ones.

    A request takes about a quarter of a second.
    """

    cursor: Annotated[RowCursor | None, doc("The `next_cursor` of the previous call.")] = None


class DeliverAgain(WebhookCommand, frozen=True):
    """Send a delivery again now, in any state."""

    id: Annotated[int, doc("Number of the delivery.", ge=1, le=MAX_NUMBER)]
    reason: Reason | None = None


class DeliverAllAgain(WebhookCommand, frozen=True):
    """Send all dead-lettered deliveries again, or those up to a delivery number."""

    upto: Annotated[int, doc("Only deliveries up to this number.", ge=1, le=MAX_NUMBER)] | None = None
    reason: Reason | None = None


class TestWebhook(WebhookCommand, frozen=True):
    """Send a test message to a webhook now. A paused webhook is resumed."""

    reason: Reason | None = None


class EventsRequest(Command, frozen=True, kw_only=True):
    """Stream events as they happen (Server-Sent Events), without gap or repetition after `Last-Event-ID`.

    An event must match all filters. The stream begins after the event in the header `Last-Event-ID`, else after
    `last_event_id`, else `last` events ago, else now. Without `follow` it ends at the end of the event log.
    """

    errors = ("events_gone",)

    queue: Annotated[Names | None, doc("Only events of these queues, separated by commas.")] = None
    job_id: Annotated[Names | None, doc("Only events of these jobs, separated by commas.")] = None
    type: Annotated[Names | None, doc("Only events of these types, separated by commas.")] = None
    last_event_id: (
        Annotated[
            int,
            doc(
                "Continue after this event, like the header `Last-Event-ID`, which takes precedence.",
                ge=0,
                le=MAX_NUMBER,
            ),
        ]
        | None
    ) = None
    last: (
        Annotated[int, doc("Begin this many events ago, with those that the event log still has.", ge=1, le=MAX_BACK)]
        | None
    ) = None
    follow: Annotated[bool, doc("Whether to wait for more events at the end of the event log.")] = True


class ArtifactRequest(JobCommand, frozen=True, kw_only=True):
    """Download the object that `storage_key` names, of a job or of one of its late results, as a file."""

    errors = ("not_found", "artifacts_unavailable", "late_result_not_found")

    late_result: Annotated[int, doc("The `seq` of a late result. Default: the result of the job.", ge=1)] | None = None


class Output(JobCommand, frozen=True, kw_only=True):
    """Get what a job printed: of each of its last 5 grants the last 64 KiB.

    With `wait_ms`, the response comes when there is text after `after`, when the job is finished, or after this time.
    """

    errors = ("output_off", "output_unavailable")

    after: Annotated[OutputPosition | None, doc("Only text after the `position` of an earlier response.")] = None
    wait_ms: Annotated[int, doc("How long to wait for text, in ms.", ge=0, le=MAX_WAIT_MS)] = 0


class BackupRequest(Command, frozen=True, kw_only=True):
    """Download the whole database as a file while the daemon runs. The response begins once the copy has been checked.

    Until then, `backups` shows the progress under `id`.
    """

    errors = ("storage_full",)

    id: Annotated[BackupId | None, doc("Id under which `backups` shows the progress.")] = None
