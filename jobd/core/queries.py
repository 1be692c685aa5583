"""The rules for commands that only read.

The actor reads history (timelines, late results, pages) from the storage after the commit, see Response.read.
"""

from __future__ import annotations

from typing import assert_never

from jobd.core import plan_rules, transitions, views
from jobd.core.changeset import Draft
from jobd.core.explain import explain
from jobd.core.validation import validate
from jobd.model.commands import (
    AuditLog,
    Export,
    Get,
    GetVersion,
    LateResults,
    ListJobs,
    Locks,
    Queues,
    Stats,
    Timeline,
    Validate,
    Why,
    Workers,
)
from jobd.model.errors import ApiError
from jobd.model.job import FINISHED
from jobd.model.responses import (
    AuditPage,
    ExportPage,
    HistoryRead,
    JobPage,
    LateResultList,
    Response,
    TimelineView,
    ValidateJobView,
    VersionedJob,
)

OfJob = Get | GetVersion | Timeline | Why | Validate | LateResults
Reading = OfJob | ListJobs | Queues | Workers | Stats | Locks | Export | AuditLog


def answer(draft: Draft, command: Reading) -> Response | ApiError:
    match command:
        case Get() | GetVersion() | Timeline() | Why() | Validate() | LateResults():
            return _of_job(draft, command)
        case ListJobs():
            return Response(JobPage([], None), read=HistoryRead(page=command))
        case Export():
            return Response(ExportPage([], None), read=HistoryRead(export=command))
        case AuditLog():
            return Response(AuditPage([], None), read=HistoryRead(audit=command))
        case Queues():
            return Response(views.queues(draft.book, command))
        case Workers():
            return Response(views.workers(draft.book, draft.at, command))
        case Stats():
            return Response(views.stats(draft.book, draft.book.figures, draft.at))
        case Locks():
            return Response(views.locks(draft.book, draft.at, command, admin=draft.call.admin))
        case _:
            assert_never(command)


def _of_job(draft: Draft, command: OfJob) -> Response | ApiError:
    job = transitions.find(draft, command.id)
    if isinstance(job, ApiError):
        return job
    match command:
        case Get():
            return transitions.job_answer(draft, job)
        case GetVersion():
            shown = transitions.job_answer(draft, job)
            shown.data = VersionedJob(shown.data, plan_rules.version(job, draft.book.latest_late(job.seq)))
            return shown
        case Timeline():
            return Response(TimelineView([]), read=HistoryRead(timeline=job.seq, events=command.limit))
        case LateResults():
            return Response(LateResultList([]), read=HistoryRead(late=job.seq))
        case Why():
            ended = HistoryRead(ended=job) if job.status in FINISHED else None
            return Response(explain(job, draft.book, draft.at, draft.policy), read=ended)
        case Validate():
            found = validate(job, draft.at, draft.policy)
            if not draft.call.admin:
                return Response(found)
            shown = transitions.job_answer(draft, job)
            shown.data = ValidateJobView(job.id, shown.data, found, draft.at.now)
            return shown
        case _:
            assert_never(command)
