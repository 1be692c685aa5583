"""Commands: both sides of every bound of every field, and the defaults."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest
from msgspec import UNSET, Raw

from jobd.model import commands
from jobd.model import commands as cmd
from jobd.model.clocks import LockMs
from jobd.model.job import LATEST_MS, BackoffOptions
from jobd.model.requests import BackupRequest, RowCheckRequest

YEAR_MS = 365 * 86_400_000
DAY_MS = 86_400_000
EARLIEST = 100_000_000_000
LATEST = 253_402_300_799_999
LONG = "x" * 200
TEXT = "x" * 4_096

HELD = {"id": "a", "lock_id": "l"}
START = {"id": "a", "worker": "w"}
MOVED = {"jobId": "a", "from": "queued", "to": "failed"}

# Command, its required fields, a field, its outermost valid values, and invalid ones just beyond.
BOUNDS: list[tuple[Any, dict[str, Any], str, list[Any], list[Any]]] = [
    (cmd.Create, {}, "id", ["a", LONG, "A-z_0.9:", "...", ".a"], ["", "x" * 201, "a b", "a/b", "a\n", "é", ".", ".."]),
    (cmd.Import, {}, "id", ["a", "..."], ["", ".", ".."]),
    (cmd.Start, {"worker": "w"}, "id", ["a", ".", ".."], ["", "a/b"]),
    (cmd.Create, {}, "queue", ["a", LONG, "..."], ["", "x" * 201, "a b", "a\n", ".", ".."]),
    (cmd.Create, {}, "kind", ["", LONG, "à la carte", "a" * 200], ["x" * 201, "a\n", "\x00", "a\x1f", "\x7f"]),
    (cmd.Create, {}, "priority", [-1_000, 1_000], [-1_001, 1_001, 0.5]),
    (cmd.Create, {}, "max_attempts", [1, 1_000], [0, 1_001]),
    (cmd.Create, {}, "max_stalls", [0, 1_000], [-1, 1_001]),
    (cmd.Create, {}, "on_stall", ["auto", "requeue", "fail"], ["", "other"]),
    (cmd.Create, {}, "stall_after_ms", [0, YEAR_MS], [-1, YEAR_MS + 1]),
    (cmd.Create, {}, "progress_timeout_ms", [0, YEAR_MS], [-1, YEAR_MS + 1]),
    (cmd.Create, {}, "run_at", [EARLIEST, LATEST], [EARLIEST - 1, LATEST + 1]),
    (cmd.Create, {}, "delay_ms", [0, YEAR_MS], [-1, YEAR_MS + 1]),
    (cmd.Create, {}, "expires_in_ms", [1, YEAR_MS], [0, YEAR_MS + 1, None]),
    (cmd.Create, {}, "expires_at", [EARLIEST, LATEST], [EARLIEST - 1, LATEST + 1]),
    (cmd.Create, {}, "backoff", [{"kind": "fixed"}, {"kind": "exponential"}], [{"kind": "linear"}, {"other": 1}]),
    (cmd.Create, {}, "backoff", [{"base_ms": 0}, {"base_ms": YEAR_MS}], [{"base_ms": -1}, {"base_ms": YEAR_MS + 1}]),
    (cmd.Create, {}, "backoff", [{"max_ms": 0}, {"max_ms": YEAR_MS}], [{"max_ms": -1}, {"max_ms": YEAR_MS + 1}]),
    (cmd.Bulk, {}, "jobs", [[{}]], [[], None]),
    (cmd.ListJobs, {}, "status", ["queued", "processing", "completed", "failed", "cancelled"], ["", "odd"]),
    (cmd.ListJobs, {}, "limit", [1, 200], [0, 201]),
    (cmd.ListJobs, {}, "cursor", ["0", "9" * 18], ["", "9" * 19, "-1", "1 "]),
    (cmd.SearchJobs, {}, "since", [0, LATEST_MS], [-1, LATEST_MS + 1]),
    (cmd.SearchJobs, {}, "finished_since", [0, LATEST_MS], [-1, LATEST_MS + 1]),
    (cmd.SearchJobs, {}, "finished_until", [0, LATEST_MS], [-1, LATEST_MS + 1]),
    (cmd.SearchJobs, {}, "until", [0, LATEST_MS], [-1, LATEST_MS + 1]),
    (cmd.SearchJobs, {}, "text", ["t", LONG], ["", "x" * 201]),
    (cmd.Start, {"id": "a"}, "worker", ["w", LONG, "a b"], ["", "x" * 201, "a\n", "\x00", "\x1f", "\x7f"]),
    (cmd.Start, START, "lock_ttl_ms", [1_000, DAY_MS], [999, DAY_MS + 1]),
    (cmd.Start, START, "stall_after_ms", [0, YEAR_MS], [-1, YEAR_MS + 1]),
    (cmd.Start, START, "progress_timeout_ms", [0, YEAR_MS], [-1, YEAR_MS + 1]),
    (cmd.Claim, {"worker": "w"}, "progress_timeout_ms", [0, YEAR_MS], [-1, YEAR_MS + 1]),
    (cmd.Claim, {"worker": "w"}, "queues", [["q"], ["q"] * 100], [[], ["q"] * 101, [""]]),
    (cmd.Claim, {"worker": "w"}, "kinds", [[""], ["k"] * 100], [[], ["k"] * 101]),
    (cmd.Claim, {"worker": "w"}, "limit", [0, 100], [-1, 101]),
    (cmd.Claim, {"worker": "w"}, "wait_ms", [0, 60_000], [-1, 60_001]),
    (
        cmd.Claim,
        {"worker": "w"},
        "about",
        [None, {}, {"instance": "~" * 200, "host": " " * 253, "version": "1" * 100}],
        [{"instance": "x" * 201}, {"host": "x" * 254}, {"version": "x" * 101}, {"host": "\u00e9"}, {"host": "a\n"}],
    ),
    (
        cmd.Start,
        START,
        "about",
        [{"pid": 1, "concurrency": 1}, {"pid": 2**32 - 1, "concurrency": 100_000}],
        [{"pid": 0}, {"pid": 2**32}, {"pid": "1"}, {"concurrency": 0}, {"concurrency": 100_001}, {"other": 1}, "w", []],
    ),
    (cmd.Progress, HELD, "progress", [0, 0.5, 100], [-0.1, 100.1]),
    (cmd.Progress, HELD | {"progress": 1}, "message", ["", TEXT], [TEXT + "x"]),
    (cmd.Progress, {"id": "a", "progress": 1}, "lock_id", ["l", LONG], ["", "x" * 201]),
    (cmd.Extend, HELD, "additional_ms", [1, DAY_MS], [0, DAY_MS + 1]),
    (cmd.Complete, HELD, "download_url", ["u", TEXT], ["", TEXT + "x", "a\x00"]),
    (cmd.Fail, HELD, "error_message", ["e", TEXT], ["", TEXT + "x"]),
    (cmd.Fail, HELD | {"error_message": "e"}, "error_code", ["", LONG], ["x" * 201, "a\n", "\x00", "\x1f", "\x7f"]),
    (cmd.Fail, HELD | {"error_message": "e"}, "retry_after_ms", [0, YEAR_MS], [-1, YEAR_MS + 1]),
    (cmd.ForceFail, {"jobId": "a"}, "reason", ["", TEXT], [TEXT + "x"]),
    (cmd.Transition, MOVED, "updates", [{"error_message": "e"}, {"error_message": TEXT}], [{"error_message": ""}]),
    (cmd.Transition, MOVED, "updates", [{"priority": 1}], [{"error_message": TEXT + "x"}, {"status": "queued"}]),
    (cmd.Update, {"id": "a"}, "max_attempts", [1, 1_000], [0, 1_001]),
    (cmd.Adopt, {"id": "a"}, "result", [1, 10**12], [0, -1]),
    (cmd.Export, {}, "limit", [1, 200], [0, 201]),
    (cmd.Export, {}, "cursor", ["0", "9" * 18], ["", "9" * 19, "-1"]),
    (cmd.AuditLog, {}, "who", ["w", "x" * 64], ["", "x" * 65]),
    (cmd.AuditLog, {}, "action", ["w", "x" * 40], ["", "x" * 41]),
    (cmd.AuditLog, {}, "since", [0, LATEST_MS], [-1, LATEST_MS + 1]),
    (cmd.AuditLog, {}, "limit", [1, 200], [0, 201]),
    (cmd.AuditLog, {}, "cursor", ["0", "9" * 18], ["", "9" * 19, "-1"]),
    (cmd.Locks, {}, "limit", [1, 200], [0, 201]),
    (cmd.Locks, {}, "cursor", ["0", "9" * 18], ["", "9" * 19, "-1"]),
    (cmd.Timeline, {"id": "a"}, "limit", [1, 1_000], [0, 1_001]),
    (cmd.Workers, {}, "limit", [1, 200], [0, 201]),
    (
        cmd.Workers,
        {},
        "cursor",
        ["0 w", "9" * 18 + " " + LONG, "1 " + "x" * 218],
        ["0", "9" * 19 + " w", "1 " + "x" * 219],
    ),
    (
        cmd.SearchJobs,
        {},
        "error",
        ["0123456789ab"],
        ["0" * 11, "0" * 13, "0" * 11 + "g", "0" * 11 + "A", "0" * 12 + "\n"],
    ),
    (cmd.PlanFilter, {}, "text", ["t", LONG], ["", "x" * 201]),
    (cmd.PlanFilter, {}, "error", ["0123456789ab"], ["0" * 11]),
    (cmd.MakePlan, {"action": "retry"}, "ids", [["a"], ["a"] * 10_000], [[], ["a"] * 10_001, [""]]),
    (cmd.MakePlan, {}, "action", [*get_args(cmd.PlanAction)], ["", "deletes", "stuck"]),
    (
        cmd.MakePlan,
        {"action": "retry"},
        "cursor",
        ["failed.0", "x" * 20 + "." + "9" * 18],
        ["failed", "failed.0\n", ".0"],
    ),
    (cmd.MakePlan, {"action": "retry"}, "cursor", ["a.1"], ["x" * 21 + ".0", "failed." + "9" * 19, "Failed.0", "a:1"]),
    (
        RowCheckRequest,
        {},
        "cursor",
        ["jobs:0", "late_results:" + "9" * 18],
        ["jobs", "jobs:0\n", "jobs.0", "JOBS:0", ":0"],
    ),
    (BackupRequest, {}, "id", ["a", "A-z_0.9", "x" * 64], ["", "x" * 65, "a b", "a\n", "a/b"]),
    (cmd.Import, {"id": "a"}, "attempt", [0, 1_000_000], [-1, 1_000_001]),
    (cmd.Import, {"id": "a"}, "stalls", [0, 1_000_000], [-1, 1_000_001]),
]


@pytest.mark.parametrize(
    ("kind", "needed", "field", "taken", "rejected"), BOUNDS, ids=lambda part: getattr(part, "__name__", None)
)
def test_bounds(kind: Any, needed: dict[str, Any], field: str, taken: list[Any], rejected: list[Any]) -> None:
    for value in taken:
        assert msgspec.convert(needed | {field: value}, kind) is not None
    for value in rejected:
        with pytest.raises(msgspec.ValidationError, match=rf"\$\.{field}"):
            msgspec.convert(needed | {field: value}, kind)


def test_the_defaults_of_commands() -> None:
    create = msgspec.json.decode(b"{}", type=cmd.Create)
    expected: dict[str, Any] = {
        "queue": "default",
        "kind": "",
        "payload": Raw(b"null"),
        "priority": 0,
        "max_attempts": 1,
        "backoff": BackoffOptions("exponential", 10_000, 3_600_000, True),
    }
    given = {name: value for name, value in msgspec.structs.asdict(create).items() if value not in (None, UNSET)}
    assert given == expected
    imported = msgspec.json.decode(b'{"id":"a"}', type=cmd.Import)
    expected |= {"id": "a", "status": "queued", "attempt": 0, "stalls": 0}
    given = {name: value for name, value in msgspec.structs.asdict(imported).items() if value not in (None, UNSET)}
    assert given == expected
    claim = cmd.Claim(worker="w")
    assert (claim.queues, claim.kinds, claim.limit, claim.wait_ms) == (["default"], None, 1, 0)
    assert claim.queues is not cmd.Claim(worker="w").queues
    lists = (cmd.ListJobs(), cmd.SearchJobs(), cmd.AuditLog(), cmd.Export(), cmd.Locks())
    assert [each.limit for each in lists] == [50, 50, 50, 200, None]
    assert cmd.Fail(id="a", lock_id="l", error_message="e").retry is True
    assert cmd.Transition(id="a", from_="queued", to="failed").updates == cmd.Updates()
    call = cmd.IssuedCommand(claim)
    assert (call.by, call.seed, call.admin) == ("client", b"", False)


def test_commands_accept_the_names_that_existing_dashboards_send() -> None:
    expected = {"jobId": "a", "lockId": "l", "additionalTime": 5}
    assert msgspec.convert(expected, cmd.ExtendLock) == cmd.ExtendLock(id="a", lock_id="l", additional_ms=5)
    assert msgspec.convert({"jobId": "a", "lockId": "l"}, cmd.ReleaseLock) == cmd.ReleaseLock(id="a", lock_id="l")
    assert msgspec.convert(MOVED, cmd.Transition) == cmd.Transition(id="a", from_="queued", to="failed")


def test_a_recorded_action_is_done_by_default() -> None:
    assert cmd.RecordAction(what="w").outcome == "done"
    assert (commands.MAX_PLANNING_S, commands.MAX_EVENTS, commands.MAX_PLAN) == (10.0, 1_000, 10_000)


def test_an_operator_without_a_name_is_called_admin() -> None:
    eve, nobody = cmd.Operator("eve", "10.0.0.7"), cmd.Operator("", "10.0.0.7")
    assert [(who.who, who.by) for who in (eve, nobody)] == [("eve", "admin:eve"), ("admin", "admin")]


def test_a_moment_converts_lock_time_to_wall_time() -> None:
    at = cmd.Moment(now=1_000, lock_ms=LockMs(300), offset=700)
    assert (at.believed, at.wall(LockMs(301))) == (1_000, 1_001)
    assert cmd.Moment(1_000, LockMs(300), 700, trusted=900).believed == 900
    assert [cmd.Moment(1_000, LockMs(300), 700, ahead=ms).aging for ms in (-5, 5)] == [1_005, 1_000]


def test_a_command_names_its_worker_as_the_sender() -> None:
    senders = [cmd.Claim(worker="w"), cmd.Start(id="a", worker="w"), cmd.Create()]
    assert [command.sender() for command in senders] == ["worker:w", "worker:w", None]
