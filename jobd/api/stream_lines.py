"""A line of a stream of commands: which call it is, as the command that the call's own path would give.

Knows no connection and judges no job: what a line may ask for, and under which key, is what its call may.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct
from msgspec.structs import asdict

from jobd.http.auth import Gate
from jobd.http.decoding import Limits, Shape, explain, malformed, part_of
from jobd.model.commands import (
    Bulk,
    Cancel,
    Claim,
    Command,
    Complete,
    Create,
    Extend,
    Fail,
    Get,
    IdempotencyKey,
    OnJob,
    Progress,
    Release,
    Start,
)
from jobd.model.errors import invalid_request_error

OpName = Literal[
    "create", "bulk", "start", "claim", "progress", "extend", "complete", "fail", "release", "cancel", "get"
]  # fmt: skip


class Op(Struct, frozen=True):
    """One kind of line: the call that it stands for (the tests hold it equal to that call's route)."""

    command: type[Command]
    method: str
    path: str
    key: bool = False  # whether an idempotency key counts


OPS: Final[dict[str, Op]] = {
    "create": Op(Create, "POST", "/v1/jobs", key=True),
    "bulk": Op(Bulk, "POST", "/v1/jobs/bulk", key=True),
    "start": Op(Start, "POST", "/v1/jobs/{id}/start", key=True),
    "claim": Op(Claim, "POST", "/v1/claim", key=True),
    "progress": Op(Progress, "POST", "/v1/jobs/{id}/progress"),
    "extend": Op(Extend, "POST", "/v1/jobs/{id}/extend"),
    "complete": Op(Complete, "POST", "/v1/jobs/{id}/complete"),
    "fail": Op(Fail, "POST", "/v1/jobs/{id}/fail"),
    "release": Op(Release, "POST", "/v1/jobs/{id}/release"),
    "cancel": Op(Cancel, "POST", "/v1/jobs/{id}/cancel", key=True),
    "get": Op(Get, "GET", "/v1/jobs/{id}"),
}


class StreamedCommand(Command, frozen=True, kw_only=True):
    """A line: `op` says which call, `id` is the job's where the call's path has it (of `create`: the id to be), and
    the fields of the call's body stand beside them."""

    op: OpName
    id: str | None = None
    idempotency_key: str | None = None


class StreamedAnswer(Struct, frozen=True, omit_defaults=True):
    """The answer to a line: that of its call, with the HTTP status that it would have."""

    success: bool
    status: int
    data: Any = None
    replayed: bool = False
    error: str = ""
    message: str = ""
    details: dict[str, Any] = {}


class Line(Struct, frozen=True):
    """What a line asks for, and what it says of itself."""

    command: Command
    by: str
    job_id: str | None
    key: IdempotencyKey | None


class _Mark(Struct):
    """What is looked at first: which kind of line it is."""

    op: OpName
    idempotency_key: str | None = None


_read_mark: Final = msgspec.json.Decoder(_Mark).decode


def _line_part(op: str, command: type[Command]) -> type[Any]:
    """`command` as its line has it."""
    return part_of(command, None, also=[("op", Literal[op]), ("idempotency_key", str | None, None)], kind="Line")


# What a line of each kind is read as.
PARTS: Final = {name: _line_part(name, op.command) for name, op in OPS.items()}


class _LineShape(Shape):
    """How the lines of one kind are read: as the bodies of its call, with what only lines have beside it."""

    def __init__(self, op: str, command: type[Command], limits: Limits) -> None:
        super().__init__(command, None, limits, part=PARTS[op])

    def _joined(self, part: Any, value: str | None) -> Command:
        named = asdict(part)
        del named["op"], named["idempotency_key"]
        return self.command(**named)


@cache
def shapes(limits: Limits) -> dict[str, Shape]:
    """What reads the lines of each kind."""
    return {name: _LineShape(name, op.command, limits) for name, op in OPS.items()}


class LineReader:
    """Reads the lines of the streams at one door."""

    def __init__(self, gate: Gate, limits: Limits) -> None:
        self._gate = gate
        self._shapes = shapes(limits)

    def read(self, line: bytes) -> Line:
        """The command of a line. Raises Refused where it is none."""
        try:
            mark = _read_mark(line)
        except msgspec.ValidationError as fault:
            raise explain(str(fault), _Mark) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
            raise malformed(fault) from None
        op = OPS[mark.op]
        command: Any = self._shapes[mark.op].from_body(line)
        if isinstance(command, Claim) and command.wait_ms:
            message = "a claim in a stream does not wait: those behind it would. Leave it out, or send POST /v1/claim."
            raise invalid_request_error("$.wait_ms", message)
        job_id = command.id if isinstance(command, (Create, OnJob)) else None
        by = f"worker:{command.worker}" if isinstance(command, (Start, Claim)) else "client"
        return Line(command, by, job_id, self._key(op, job_id, mark.idempotency_key, line))

    def _key(self, op: Op, job_id: str | None, key: str | None, line: bytes) -> IdempotencyKey | None:
        """Its scope is that of the call; the body that has to be the same again is the line."""
        if key is None or not op.key:
            return None
        return self._gate.key_use(key, op.method, op.path.replace("{id}", job_id or ""), line)
