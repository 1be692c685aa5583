"""The rules for schedules: put, fire, run, pause, resume, delete."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec import UNSET, Raw, convert

from jobd.core.rules.schedule_rules import MAX_JOB_BYTES
from jobd.model import commands as cmd
from jobd.model.commands import Fire, PutSchedule, RunSchedule, ScheduledJob, scheduled_job_id
from jobd.model.events import QueuePause
from jobd.model.job import DAY_MS, HOUR_MS, BackoffOptions, Extra, Policy
from jobd.model.responses import Response, ScheduleView
from jobd.model.schedules import Schedule
from jobd.model.storage import EXTRA_FORMAT
from tests.support.rule_harness import NOW, RuleHarness

JOB: dict[str, Any] = {
    "queue": "q",
    "kind": "k",
    "payload": Raw(b'{"a":1}'),
    "max_attempts": 3,
    "expires_in_ms": 500,
    "headers": {"trace": "t1"},
}


def put(rules: RuleHarness, **fields: Any) -> ScheduleView:
    given: dict[str, Any] = {"id": "s", "every_ms": 1_000, "job": ScheduledJob(**JOB)} | fields
    view: ScheduleView = rules.accept_admin(PutSchedule(**given))
    return view


def fire(rules: RuleHarness, at: int, **fields: Any) -> list[str]:
    """Send a firing of the current version; return the types of its events."""
    given: dict[str, Any] = {"id": "s", "version": schedule(rules).version, "scheduled_at": at}
    decision = rules.decide(Fire(**given | fields))
    return [change.type for change in decision.changes]


def schedule(rules: RuleHarness) -> Schedule:
    return rules.state.schedules["s"]


def test_a_time_creates_one_job_with_the_fields_of_the_schedule(rules: RuleHarness) -> None:
    put(rules)
    assert fire(rules, NOW + 1_000) == ["created"]
    job = rules.job(scheduled_job_id("s", NOW + 1_000))
    assert (job.options.queue, job.options.kind, job.options.max_attempts) == ("q", "k", 3)
    assert (job.run_at, job.expires_at, job.extra) == (
        NOW + 1_000,
        NOW + 500,
        Extra("s", NOW + 1_000, len(b'{"trace":"t1"}')),
    )
    assert rules.last().details == {"schedule": "s", "scheduled_at": NOW + 1_000, "missed": 0}
    assert (schedule(rules).last_fired_at, schedule(rules).last_job_id) == (NOW + 1_000, job.id)


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"cron": "@daily", "every_ms": 1_000}, "cron and every_ms are both given."), ({}, "Neither cron nor every_ms")],
)
def test_a_schedule_has_one_timing(rules: RuleHarness, fields: dict[str, Any], words: str) -> None:
    request = PutSchedule(id="s", job=ScheduledJob(**JOB), **fields)
    assert words in str(rules.reject(request, "invalid_request", admin=True))


@pytest.mark.parametrize("at", [NOW + 1_000, NOW + 500, NOW, NOW - DAY_MS])
def test_no_time_fires_again_or_before_the_schedule_was_made(rules: RuleHarness, at: int) -> None:
    put(rules, overlap="allow")
    fire(rules, NOW + 1_000)
    assert fire(rules, at) == []
    rules.now -= HOUR_MS  # the clock was set back
    assert fire(rules, at) == []
    assert fire(rules, NOW + 2_000) == ["created"]


def test_a_time_that_a_wrong_clock_wrote_does_not_stop_the_schedule(rules: RuleHarness) -> None:
    rules.now += 3 * DAY_MS
    put(rules, overlap="allow")
    fire(rules, rules.now + 1_000)
    rules.now = NOW
    assert fire(rules, NOW) == ["created"]
    assert fire(rules, NOW) == []
    rules.now += 2 * DAY_MS + HOUR_MS
    assert fire(rules, rules.now) == ["created"], "the time at which it was made counts again"


def test_what_makes_a_firing_void(rules: RuleHarness) -> None:
    put(rules)
    assert fire(rules, NOW + 1_000, version=0) == []
    rules.trusted = NOW - DAY_MS
    assert fire(rules, NOW + 1_000) == [], "the clock is suspect"
    rules.trusted = None
    rules.accept_admin(cmd.PauseSchedule(id="s"))
    assert fire(rules, NOW + 1_000) == []
    old = schedule(rules).version
    rules.now += 5_000
    rules.accept_admin(cmd.ResumeSchedule(id="s"))
    assert fire(rules, NOW + 6_000, version=old) == [], "it was computed before the pause"
    assert fire(rules, NOW + 5_000) == [], "it passed during the pause"
    assert fire(rules, NOW + 6_000) == ["created"]
    rules.accept_admin(cmd.DeleteSchedule(id="s", reason="why"))
    assert (rules.last().queue, rules.last().reason) == ("q", "why")
    assert rules.decide(Fire(id="s", version=old, scheduled_at=NOW + 9_000)).changes == []


def test_a_time_is_skipped_while_the_last_job_is_unfinished(rules: RuleHarness) -> None:
    put(rules)
    fire(rules, NOW + 1_000)
    assert fire(rules, NOW + 3_000, missed=1) == ["schedule_skipped"]
    first = scheduled_job_id("s", NOW + 1_000)
    assert rules.last().reason == f"{first} of this schedule is still queued."
    view = rules.accept_admin(cmd.GetSchedule(id="s"))
    assert (view.skipped, view.missed, view.last_skip.scheduled_at, view.last_status) == (1, 1, NOW + 3_000, "queued")
    assert schedule(rules).skips_in_a_row == 1
    assert fire(rules, NOW + 3_000) == []
    rules.accept(cmd.Cancel(id=first))
    assert fire(rules, NOW + 4_000) == ["created"]
    assert schedule(rules).skips_in_a_row == 0
    put(rules, overlap="allow")
    assert fire(rules, NOW + 5_000) == ["created"]


def test_a_time_whose_id_is_taken_is_skipped(rules: RuleHarness) -> None:
    put(rules)
    rules.create(scheduled_job_id("s", NOW + 1_000))
    assert fire(rules, NOW + 1_000) == ["schedule_skipped"]
    assert "id_taken" in (rules.last().reason or "")


def test_missed_times_are_counted(rules: RuleHarness) -> None:
    put(rules, catch_up="none")
    assert fire(rules, NOW + 9_000, missed=8, is_missed=True) == ["schedule_missed"]
    assert rules.last().queue == schedule(rules).queue
    assert (schedule(rules).missed, schedule(rules).last_at, schedule(rules).last_fired_at) == (9, NOW + 9_000, None)


def test_a_firing_respects_the_limits_of_jobs(rules: RuleHarness) -> None:
    rules.policy = Policy(live_jobs=1)
    put(rules)
    rules.create("a")
    rules.reject(Fire(id="s", version=schedule(rules).version, scheduled_at=NOW + 1_000), "too_many_jobs")
    assert schedule(rules).last_at is None, "it is made up later"


def test_nothing_changes_while_a_node_does_not_read_records_of_schedules(rules: RuleHarness) -> None:
    put(rules)
    kept = rules.accept_admin(cmd.AddQuietRule(host="h", reason="r", until=NOW + 1))
    new = ScheduledJob(queue="other")
    rules.state.too_old_for = lambda format: "old" if format == EXTRA_FORMAT else None
    version = schedule(rules).version
    for command in (
        PutSchedule(id="s", every_ms=1_000, job=new),
        Fire(id="s", version=version, scheduled_at=NOW + 1_000),
        Fire(id="s", version=version, scheduled_at=NOW + 1_000, is_missed=True),
        RunSchedule(id="s"),
        cmd.PauseSchedule(id="s"),
        cmd.DeleteSchedule(id="s"),
        cmd.AddQuietRule(host="other", reason="r"),
        cmd.EndQuietRule(rule=kept.id),
        cmd.Import(id="a", schedule_id="s"),
    ):
        rejected = rules.reject(command, "upgrade_incomplete", admin=True)
        assert rejected.details == {"node": "old"}
    rules.advance(2)
    assert rules.decide(cmd.EndPauses()).changes == []
    put(rules, job=ScheduledJob(**JOB))
    rules.state.too_old_for = lambda format: None
    assert [change.type for change in rules.decide(cmd.EndPauses()).changes] == ["workers_resumed"]


def test_the_same_request_changes_nothing(rules: RuleHarness) -> None:
    put(rules, source="app:a")
    rules.accept_admin(cmd.PauseSchedule(id="s", reason="why"))
    before = schedule(rules)
    rules.advance(5_000)
    assert put(rules, source="app:a", paused=False).paused
    assert schedule(rules) is before


def test_only_a_changed_timing_counts_from_now(rules: RuleHarness) -> None:
    put(rules)
    first = schedule(rules)
    rules.advance(5_000)
    put(rules, overlap="allow")
    assert (schedule(rules).timed_from, schedule(rules).version) == (first.timed_from, first.version)
    assert schedule(rules).updated_at == NOW + 5_000
    changed = rules.decide(PutSchedule(id="s", every_ms=2_000, job=ScheduledJob()), admin=True).answer
    assert isinstance(changed, Response)
    assert (changed.status, schedule(rules).timed_from) == (200, NOW + 5_000)
    assert schedule(rules).version > first.version


def test_who_may_put_a_schedule(rules: RuleHarness) -> None:
    request = {"id": "s", "every_ms": 1_000, "job": ScheduledJob()}
    error = rules.reject(PutSchedule(**request), "invalid_request")
    assert error.details == {"field": "$.source"}, "a program needs a source"
    rules.accept(PutSchedule(**request, source="app:a"))
    error = rules.reject(PutSchedule(**request, source="app:b"), "schedule_owned")
    assert error.details == {"source": "app:a"}
    put(rules)  # an operator takes it over
    error = rules.reject(PutSchedule(**request, source="app:a"), "schedule_owned")
    assert "belongs to an operator" in error.message


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"cron": "0 0 * * *"}, "cron"),
        ({"every_ms": None}, "cron"),
        ({"job": ScheduledJob(payload=Raw(b'"' + b"x" * MAX_JOB_BYTES + b'"'))}, "job"),
        ({"job": ScheduledJob(backoff=BackoffOptions("fixed", 5, 4))}, "backoff.max_ms"),
    ],
    ids=["both", "none", "large", "backoff"],
)
def test_invalid_requests(rules: RuleHarness, fields: dict[str, Any], field: str) -> None:
    request = {"id": "s", "every_ms": 1_000, "job": ScheduledJob()} | fields
    error = rules.reject(PutSchedule(**request), "invalid_request", admin=True)
    assert error.details == {"field": f"$.{field}"}


def test_the_job_of_a_schedule_has_a_limited_size(rules: RuleHarness) -> None:
    size = len(msgspec.json.encode(ScheduledJob(payload=Raw(b'""'))))
    put(rules, job=ScheduledJob(payload=Raw(b'"' + b"x" * (MAX_JOB_BYTES - size) + b'"')))


def test_the_number_of_schedules_is_limited(rules: RuleHarness) -> None:
    rules.policy = Policy(schedules=1)
    put(rules)
    put(rules, overlap="allow")
    command = PutSchedule(id="t", every_ms=1_000, job=ScheduledJob())
    assert rules.reject(command, "too_many_schedules", admin=True).details == {"limit": 1}
    rules.policy = Policy()
    assert [rules.respond(command, admin=True).status for _ in range(2)] == [201, 200]


def test_jitter_is_the_same_for_a_time_and_within_its_bound(rules: RuleHarness) -> None:
    put(rules, jitter_ms=HOUR_MS, overlap="allow")
    for number in range(1, 9):
        fire(rules, NOW + 1_000 * number)
    shifts = [job.run_at - job.extra.scheduled_at for job in rules.rows.values() if job.extra]  # type: ignore[operator]
    assert all(0 <= shift <= HOUR_MS for shift in shifts)
    assert len(set(shifts)) > 4


def test_an_operator_runs_a_schedule(rules: RuleHarness) -> None:
    assert put(rules, paused=True).paused_by == "admin"
    now = rules.accept_admin(RunSchedule(id="s"))
    assert (now.id.startswith("s:run:"), now.scheduled_at) == (True, UNSET)
    assert (now.schedule_id, schedule(rules).last_job_id, schedule(rules).last_at) == ("s", now.id, None)
    rules.reject(RunSchedule(id="s"), "schedule_busy", admin=True)
    at = NOW - DAY_MS - NOW % 1_000
    made = rules.accept_admin(RunSchedule(id="s", scheduled_at=at, force=True))
    assert (made.id, made.scheduled_at) == (scheduled_job_id("s", at), at)
    assert rules.last().details == {"schedule": "s", "scheduled_at": at}
    count = len(rules.events)
    assert rules.accept_admin(RunSchedule(id="s", scheduled_at=at)).id == made.id
    assert len(rules.events) == count, "repeating it creates nothing"
    rules.reject(RunSchedule(id="s", scheduled_at=at + 1), "invalid_request", admin=True)
    rules.create(scheduled_job_id("s", at + 1_000))
    rules.reject(RunSchedule(id="s", scheduled_at=at + 1_000), "job_exists", admin=True)


def test_pause_and_resume(rules: RuleHarness) -> None:
    put(rules)
    view = rules.accept_admin(cmd.PauseSchedule(id="s", reason="why", until=NOW + 9))
    assert (view.paused, view.pause_reason, view.paused_until, view.paused_by) == (True, "why", NOW + 9, "admin")
    assert view.pause == QueuePause(NOW, "admin", "why", NOW + 9)
    count = len(rules.events)
    rules.accept_admin(cmd.PauseSchedule(id="s"))
    assert len(rules.events) == count
    rules.reject(cmd.PauseSchedule(id="s", until=NOW), "invalid_request", admin=True)
    assert not rules.accept_admin(cmd.ResumeSchedule(id="s")).paused
    count = len(rules.events)
    rules.accept_admin(cmd.ResumeSchedule(id="s"))
    assert len(rules.events) == count


def test_a_restored_store_starts_with_its_schedules_paused(rules: RuleHarness) -> None:
    put(rules)
    put(rules, id="t", paused=True)
    rules.accept(cmd.EndGrants(ids=[], last=False), by="daemon")
    assert schedule(rules).pause is None
    decision = rules.decide(cmd.EndGrants(ids=[], last=True), by="daemon")
    assert [(change.type, change.details) for change in decision.changes] == [
        ("schedule_paused", {"schedule": "s", "until": None})
    ]


def test_pages_of_schedules(rules: RuleHarness) -> None:
    for name in "cab":
        put(rules, id=name, source="app:x" if name == "b" else None)
    page = rules.accept_admin(cmd.Schedules(limit=2))
    assert ([each.id for each in page.schedules], page.next_cursor) == (["a", "b"], "b")
    assert rules.accept_admin(cmd.Schedules(limit=1)).next_cursor == "a"
    page = rules.accept_admin(cmd.Schedules(limit=2, cursor="b"))
    assert ([each.id for each in page.schedules], page.next_cursor) == (["c"], None)
    assert [each.id for each in rules.accept_admin(cmd.Schedules(source="app:x")).schedules] == ["b"]
    rules.reject(cmd.GetSchedule(id="nope"), "schedule_not_found")


def test_a_row_survives_its_stored_form(rules: RuleHarness) -> None:
    view = put(rules, cron="0 0 * * *", every_ms=None, timezone="Europe/Berlin", jitter_ms=5)
    assert (view.cron, view.every_ms, view.timezone, view.jitter_ms) == ("0 0 * * *", None, "Europe/Berlin", 5)
    details = rules.last().details
    assert details is not None
    assert convert(details["row"], Schedule) == schedule(rules)


def test_why_names_the_schedule_of_a_job(rules: RuleHarness) -> None:
    put(rules)
    fire(rules, NOW + 1_000)
    assert rules.accept(cmd.Why(id=scheduled_job_id("s", NOW + 1_000))).schedule_id == "s"
