"""Problems: conditions that hold for a subject and need an operator, and views of them."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Struct

from jobd.model.fields import doc
from jobd.model.times import clock_time

Severity = Literal["critical", "warning", "notice"]  # the worst first
Unit = Literal["jobs", "ms", "percent", "bytes"]


class Subject(Struct, frozen=True, omit_defaults=True, kw_only=True, gc=False):
    """What a problem is about. Only the parts that identify it are set."""

    type: Annotated[str, doc("`pair` (a queue and a kind), `queue`, `kind`, `job`, `worker`, `node`, and so on.")]
    queue: Annotated[str | None, doc("Name of the queue.")] = None
    kind: Annotated[str | None, doc("Kind of the jobs.")] = None
    host: Annotated[str | None, doc("Machine of the workers.")] = None
    version: Annotated[str | None, doc("Version of the workers.")] = None
    worker: Annotated[str | None, doc("Name of the worker.")] = None
    job: Annotated[str | None, doc("Id of the job.")] = None
    webhook: Annotated[str | None, doc("Name of the webhook.")] = None
    node: Annotated[str | None, doc("Name of the node of the cluster.")] = None
    schedule: Annotated[str | None, doc("Id of the schedule.")] = None
    code: Annotated[str | None, doc("Code of the error response.")] = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The names that identify it; its type if there are none. A worker is identified by its name alone."""
        if self.type == "worker" and self.worker is not None:
            return (self.worker,)
        named = (self.queue, self.kind, self.version, self.host, self.worker, self.job, self.webhook, self.node)
        return tuple(each for each in (*named, self.schedule, self.code) if each) or (self.type,)

    def is_part_of(self, whole: Subject) -> bool:
        """Return whether `whole` has every part that identifies it, and there is one."""
        named = [name for name in self.__struct_fields__ if name != "type" and getattr(self, name) is not None]
        return bool(named) and all(getattr(self, name) == getattr(whole, name) for name in named)

    def overlaps(self, other: Subject) -> bool:
        """Return whether no part that both have differs, and the queue is the same."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in _SHARED)
        return all(one is None or two is None or one == two for one, two in pairs)


_SHARED = ("queue", "kind", "host", "version")


class Cure(Struct, frozen=True, gc=False):
    """A way to end a problem, or to look further."""

    label: Annotated[str, doc("What it does, in a few words.")]
    command: Annotated[str | None, doc("The command, or null.")] = None
    href: Annotated[str | None, doc("Path of the page of the dashboard, or null.")] = None
    changes: Annotated[bool, doc("Whether it changes something.")] = False


class Problem(Struct, frozen=True, kw_only=True, gc=False):
    """A condition that holds for a subject."""

    id: Annotated[str, doc("The condition and the subject: `no_workers/mail/receipt`.")]
    condition: Annotated[str, doc("Name of the condition.")]
    severity: Annotated[Severity, doc("How urgent it is: `critical`, `warning` or `notice`.")]
    subject: Annotated[Subject, doc("What it is about.")]
    since: Annotated[int, doc("When it was first found, in Unix ms.")]
    over_since: Annotated[
        int | None, doc("Since when its condition has not held, in Unix ms. It closes after a minute. Null: it holds.")
    ] = None
    jobs: Annotated[int, doc("How many jobs it concerns, or 0.")] = 0
    value: Annotated[float, doc("The measured value.")] = 0
    unit: Annotated[Unit, doc("Unit of the value: `jobs`, `ms`, `percent` or `bytes`.")] = "jobs"
    title: Annotated[str, doc("What is wrong, as a sentence.")] = ""
    cause: Annotated[str, doc("Why, as far as it is known, or empty.")] = ""
    cure: Annotated[list[Cure], doc("What to do, the most likely first.")] = []
    hides: Annotated[list[str], doc("Ids of open problems that this one explains. They are not listed.")] = []
    rest: Annotated[int, doc("How many further subjects of this condition are not listed.")] = 0

    @property
    def name(self) -> str:
        """The subject in a few words."""
        return " / ".join(self.subject.parts)

    @property
    def sentence(self) -> str:
        """Title and cause, and since when the condition has not held."""
        over = "" if self.over_since is None else f"Over since {clock_time(self.over_since)}: closes within a minute."
        return " ".join(filter(None, (self.title, self.cause, over)))


class ProblemList(Struct, frozen=True):
    """What needs an operator, the most urgent first."""

    problems: Annotated[list[Problem], doc("The open problems.")]
    known: Annotated[list[Problem], doc("Conditions that somebody explained, such as pauses with a reason.")] = []
    rest: Annotated[int, doc("How many further subjects have problems that are not listed.")] = 0
    evaluated_at: Annotated[int | None, doc("When they were evaluated, in Unix ms. Null: not known yet.")] = None
