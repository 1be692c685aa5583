"""Workers, directives and quiet rules."""

from __future__ import annotations

from typing import Annotated

from msgspec import Struct

from jobd.model.commands import About, DirectiveAction, GoodbyeReason, WorkerState
from jobd.model.events import QueuePause
from jobd.model.fields import doc
from jobd.model.responses import shared
from jobd.model.responses.cleanup_views import Recovery


class LostJobView(Struct, frozen=True):
    """A job that was taken back from a worker."""

    id: shared.JobIdText
    progress: Annotated[float, doc("Its progress, in percent.")]
    at: Annotated[int, doc("When it was taken back, in Unix ms.")]


class WorkerView(Struct, frozen=True):
    """A worker: its state, its latest claim and the jobs that it holds."""

    worker: shared.WorkerText
    state: Annotated[
        WorkerState,
        doc(
            "`silent` (it holds a job whose lock has expired), `busy`, `waiting` (for a job), `idle`, `died` (its last "
            "job was taken back from it, and it was not heard since) or `gone`."
        ),
    ]
    jobs: Annotated[list[str], doc("Ids of the first jobs that the worker holds.")]
    held: Annotated[int, doc("How many jobs the worker holds.")]
    expired: Annotated[int, doc("How many of the jobs have an expired lock.")]
    queues: Annotated[list[str] | None, doc("Queues of the latest claim. Null if none is known.")]
    kinds: Annotated[list[str] | None, doc("Kinds of the latest claim. Null: all kinds.")]
    waiting: Annotated[bool, doc("Whether a claim of the worker waits for a job now.")]
    about: Annotated[About | None, doc("The worker's description of itself, or null.")]
    last_seen_at: Annotated[
        int, doc("When the worker was last seen, in Unix ms. The current time while one of its claims waits.")
    ]
    goodbye: Annotated[GoodbyeReason | None, doc("Why the worker ended, if it said so.")] = None
    lost: Annotated[LostJobView | None, doc("The job that was taken back from a worker that died.")] = None
    quiet: Annotated[bool, doc("Whether the worker gets no jobs: by a directive or by a quiet rule.")] = False
    directive: Annotated[DirectiveAction | None, doc("The directive for its next claim, or null.")] = None


class WorkerGroup(Struct, frozen=True):
    """The workers of one version on one host. Null: they did not say."""

    host: Annotated[str | None, doc("The `host` of their `about`.")]
    version: Annotated[str | None, doc("The `version` of their `about`.")]
    by_state: Annotated[dict[WorkerState, int], doc("Number of workers in each state.")]
    quiet: Annotated[int, doc("How many of them get no jobs.")] = 0


class WorkerList(Struct):
    """A page of workers, most recently seen first."""

    workers: Annotated[list[WorkerView], doc("The workers.")]
    next_cursor: shared.NextCursor
    by_state: Annotated[dict[WorkerState, int], doc("Number of workers in each state, over all pages.")]
    groups: Annotated[list[WorkerGroup], doc("The same by host and version: the 100 largest groups, over all pages.")]
    since: Annotated[int, doc("Start of the daemon, in Unix ms. Workers last seen before it are unknown.")]


class GoodbyeView(Struct, frozen=True):
    """The state of a worker after its goodbye."""

    worker: shared.WorkerText
    state: Annotated[WorkerState, doc("`busy` if it holds a job.")]


class DirectedView(Struct, frozen=True):
    """A directive to a worker."""

    worker: shared.WorkerText
    action: Annotated[DirectiveAction, doc("`quiet`, `resume` or `stop`.")]
    state: Annotated[WorkerState, doc("The state of the worker.")]
    sent: Annotated[
        bool, doc("Whether a waiting claim was answered with it or shows that it is obeyed. Else the next is.")
    ]


class TakeBackView(Struct, frozen=True, rename="camel"):
    """The grants that a take-back ended, or would end."""

    worker: shared.WorkerText
    recovered_jobs: Annotated[int, doc("How many stalled jobs were recovered.")]
    reset_jobs: Annotated[int, doc("How many of them returned to their queue.")]
    failed_jobs: Annotated[int, doc("How many of them failed.")]
    details: Annotated[list[Recovery], doc("What was done to each job.")]
    more: Annotated[bool, doc("Whether there are more jobs than `details` shows.")]
    timestamp: shared.Timestamp


class QuietRuleView(Struct, frozen=True):
    """A quiet rule: which workers get no jobs, and why."""

    id: Annotated[str, doc("Id of the rule.")]
    host: Annotated[str | None, doc("Only workers of this host, or null.")]
    version: Annotated[str | None, doc("Only workers of this version, or null.")]
    queue: Annotated[str | None, doc("Only for jobs of this queue, or null.")]
    reason: Annotated[str, doc("Why.")]
    by: Annotated[str, doc("The operator, as in `by` of events.")]
    at: Annotated[int, doc("Since when, in Unix ms.")]
    until: Annotated[int | None, doc("When the daemon ends it, in Unix ms, or null.")]
    workers: Annotated[int, doc("How many workers it covers now, without those that died or are gone.")] = 0

    @property
    def described(self) -> str:
        """The words after "quiet", as those of a pause."""
        return QueuePause(self.at, self.by, self.reason, self.until).describe()


class QuietRuleList(Struct, frozen=True):
    """The quiet rules."""

    rules: Annotated[list[QuietRuleView], doc("The rules, oldest first.")]
