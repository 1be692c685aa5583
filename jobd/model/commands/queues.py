"""List queues, pause and resume them."""

from __future__ import annotations

from typing import Annotated

from jobd.model import fields
from jobd.model.commands.command import Command, Read
from jobd.model.fields import doc


class Queues(Read, frozen=True, kw_only=True):
    """List the queues that have jobs or are paused, with their counts, oldest due job and pause.

    Pages are ordered by name and have up to 200 queues. With `busiest` there is one page: the queues with the most
    queued and processing jobs.
    """

    limit: fields.PageLimit = fields.MAX_PAGE
    cursor: Annotated[fields.QueueName | None, doc("The `next_cursor` of the previous page.")] = None
    paused: Annotated[bool | None, doc("Only queues that are paused, or only those that are not.")] = None
    busiest: Annotated[
        bool, doc("Order by the number of queued and processing jobs instead of by name. There is no next page.")
    ] = False


class WhyQueue(Read, frozen=True):
    """Explain for each kind of a queue why the job that has been due longest waits, and what happens next."""

    name: fields.QueueName


class Pause(Command, frozen=True):
    """Grant no jobs of a queue until an operator resumes it, or until `until`. A pause survives a restart."""

    admission = "change"
    audit_name = "pause"

    name: fields.QueueName
    reason: fields.Reason | None = None
    until: Annotated[fields.UnixMs | None, doc("When the daemon resumes the queue, in Unix ms.")] = None


class Resume(Command, frozen=True):
    """Grant the jobs of a queue again."""

    admission = "change"
    audit_name = "resume"

    name: fields.QueueName
    reason: fields.Reason | None = None
