"""The rules for commands that only read.

The actor reads history (timelines, late results, pages) from the storage after the commit, see Response.read.
"""

from __future__ import annotations

from typing import assert_never

from jobd.core import guards, views
from jobd.core.explain import explain, explain_queue
from jobd.core.job_validation import validate
from jobd.core.rules import plan_rules
from jobd.core.transaction import Transaction
from jobd.model.commands import (
    AuditLog,
    Export,
    Get,
    GetVersion,
    LateResults,
    ListJobs,
    Locks,
    Queues,
    SearchJobs,
    Stats,
    Timeline,
    Validate,
    WaitForJobs,
    Why,
    WhyQueue,
    Workers,
)
from jobd.model.flat_job import NO_ERROR
from jobd.model.job import FINISHED
from jobd.model.responses import (
    AuditPage,
    ExportPage,
    HistoryRead,
    JobEnd,
    JobEnds,
    JobPage,
    LateResultList,
    Response,
    TimelineView,
    ValidateJobView,
)

OfJob = Get | GetVersion | Timeline | Why | Validate | LateResults
Reading = OfJob | WaitForJobs | ListJobs | WhyQueue | Queues | Workers | Stats | Locks | Export | AuditLog


def read(tx: Transaction, command: Reading) -> Response:
    match command:
        case Get() | GetVersion() | Timeline() | Why() | Validate() | LateResults():
            return _of_job(tx, command)
        case WaitForJobs():
            return Response(_ends(tx, command))
        case ListJobs():
            if command.cursor is not None and lists_by_end(command) != ("." in command.cursor):
                raise guards.invalid("cursor", "This cursor belongs to a list with another status.")
            return Response(JobPage([], None), read=HistoryRead(page=command))
        case Export():
            return Response(ExportPage([], None), read=HistoryRead(export=command))
        case AuditLog():
            return Response(AuditPage([], None), read=HistoryRead(audit=command))
        case WhyQueue():
            return Response(explain_queue(command.name, tx.state, tx.at, tx.policy))
        case Queues():
            return Response(views.queues(tx.state, command))
        case Workers():
            return Response(views.workers(tx.state, tx.at, command))
        case Stats():
            return Response(views.stats(tx.state, tx.state.counters, tx.at))
        case Locks():
            return Response(views.locks(tx.state, tx.at, command, admin=tx.call.admin))
        case _:
            assert_never(command)


def _ends(tx: Transaction, command: WaitForJobs) -> JobEnds:
    jobs = [(job_id, tx.state.get(job_id)) for job_id in command.ids]
    ends = [
        JobEnd(id_, None) if job is None else JobEnd(id_, job.status, (job.error or NO_ERROR).message)
        for id_, job in jobs
    ]
    return JobEnds(ends, all(job is None or job.status in FINISHED for _, job in jobs))


def lists_by_end(command: ListJobs) -> bool:
    """Return whether the jobs are in the order of their ends: those in one finished status are."""
    return searched_status(command) in FINISHED


def searched_status(command: ListJobs) -> str | None:
    """Return the status of the jobs to list. A search for an error lists failed jobs, unless it has a status."""
    is_for_error = isinstance(command, SearchJobs) and command.error is not None
    return command.status or ("failed" if is_for_error else None)


def _of_job(tx: Transaction, command: OfJob) -> Response:
    job = guards.find(tx, command.id)
    match command:
        case Get():
            return views.job_response(tx, job)
        case GetVersion():
            shown = views.job_response(tx, job)
            shown.data.version = plan_rules.version(job, tx.state.late_results.get(job.seq))
            return shown
        case Timeline():
            return Response(TimelineView([]), read=HistoryRead(timeline=job.seq, events=command.limit))
        case LateResults():
            return Response(LateResultList([]), read=HistoryRead(late=job.seq))
        case Why():
            ended = HistoryRead(ended=job) if job.status in FINISHED else None
            return Response(explain(job, tx.state, tx.at, tx.policy, tx.late.results.get(job.seq)), read=ended)
        case Validate():
            found = validate(job, tx.at, tx.policy)
            if not tx.call.admin:
                return Response(found)
            shown = views.job_response(tx, job)
            shown.data = ValidateJobView(job.id, shown.data, found, tx.at.now)
            return shown
        case _:
            assert_never(command)
