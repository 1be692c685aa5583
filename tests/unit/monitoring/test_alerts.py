"""Alerts: each fires above its threshold and not at it, keeps its start, and logs each change once."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from jobd.core.stats import HOURS_NEEDED, SAMPLES_NEEDED, STEP_MS
from jobd.model.commands import Claim, Complete, Create, EndGrants, Fail, Pause, Progress, Release, Start
from jobd.model.job import DAY_MS, HOUR_MS, MINUTE_MS, Job, Options
from jobd.model.responses import AlertView
from jobd.model.storage import DiskSpace
from jobd.model.webhooks import FailingWebhook
from jobd.monitoring.alerts import (
    CLUSTER_NAMES,
    EVALUATE_EVERY_S,
    MEASURE_EVERY_S,
    NAMES,
    PAIRS_PER_SLICE,
    SLICES_PER_CHECK,
    Alerts,
    Thresholds,
)
from jobd.monitoring.health import Health
from jobd.storage.artifacts.base import ArtifactStoreError
from tests.support.memory_storage import MemoryStorage
from tests.support.virtual_engine import VirtualEngine, in_engine, in_virtual_time, row, seconds


def alerts_of(engine: VirtualEngine, thresholds: Thresholds | None = None) -> Alerts:
    health = Health(engine.actor, engine.clock, engine.maintainer)
    return Alerts(engine.state, engine.clock, health, engine.maintainer, thresholds, hold_ms=0, clear_ms=0)


def one(alerts: Alerts, name: str) -> AlertView:
    return {alert.name: alert for alert in alerts.evaluate()}[name]


def firing(alerts: Alerts) -> list[str]:
    return [alert.name for alert in alerts.evaluate() if alert.firing]


@in_engine()
async def test_an_idle_daemon_lists_every_alert_and_fires_none(engine: VirtualEngine) -> None:
    shown = alerts_of(engine).evaluate()
    assert [alert.name for alert in shown] == [name for name in NAMES if name not in CLUSTER_NAMES]
    assert not any(alert.firing for alert in shown)
    assert all(alert.since is None and alert.hint for alert in shown)
    thresholds = [5, 20, 600, 10, 0, 2, 0, 0, 0, 300, 120, 300, 0.5, 90, 0]
    assert [alert.threshold for alert in shown] == thresholds, "list the threshold of each alert, in their order"


@in_virtual_time
async def test_the_hints_of_quiet_alerts_are_true() -> None:
    """Evaluate the same state with two thresholds, below and at the value."""
    failing = FailingWebhook("billing", 300_000, "500: broken")
    async with VirtualEngine() as engine:
        alerts = alerts_of(engine)
        alerts.failing_webhook = lambda: failing
        assert one(alerts, "cleanup_issues").hint == "No cleanup run has finished yet."
        assert one(alerts, "average_processing").hint == "No job is processing, and none completed in the last hour."
        engine.run_maintainer()
        await engine.maintainer.run_cleanup(forced=True)
        assert one(alerts, "cleanup_issues").hint == "The latest cleanup run found no invalid rows."
        for _ in range(HOURS_NEEDED):
            work(engine, "film", 1000)
            await seconds(3600)
        work(engine, "film", 1500)
        await engine.held("a", lock_ttl_ms=HOUR_MS)
        await seconds(2)
        engine.state.counters.recovered[engine.now // STEP_MS] = 1
        report = engine.maintainer.last_report
        assert report is not None
        engine.maintainer.last_report = replace(report, validation_issues_found=1)
        quiet = {alert.name: alert for alert in alerts.evaluate()}
        alerts.thresholds = Thresholds(0, 0, 0, 0, slower_than_usual=1, webhook_failing_ms=0)
        loud = {alert.name: alert for alert in alerts.evaluate()}
        for name in loud:
            if loud[name].firing:
                assert not quiet[name].firing, name
                assert quiet[name].value == loud[name].value > 0, name
                assert quiet[name].hint != loud[name].hint, name
        assert {name for name in loud if loud[name].firing} == {
            "stalled_jobs",
            "processing_jobs",
            "average_processing",
            "cleanup_issues",
            "slower_than_usual",
            "webhook_failing",
        }
        for name in ("stalled_jobs", "processing_jobs", "average_processing", "slower_than_usual"):
            assert "Look" not in quiet[name].hint
            assert "More work" not in quiet[name].hint
        assert quiet["average_processing"].hint.startswith("Jobs take no longer than expected: 2 s")
        assert "few invalid rows" in quiet["cleanup_issues"].hint
        assert quiet["webhook_failing"].hint.startswith("Webhook billing has accepted nothing for 5 min;")


@in_engine()
async def test_stalled_jobs_count_now_and_as_recovered_in_the_last_10_minutes(engine: VirtualEngine) -> None:
    alerts = alerts_of(engine)
    engine.run_maintainer()
    await seconds(1)
    for number in range(6):
        await engine.held(f"job-{number}")
    await seconds(61)
    await engine.yes(Create(id="later"))  # any command advances the time of the state
    await seconds(1)
    now = one(alerts, "stalled_jobs")
    assert (now.firing, now.value, now.since) == (True, 6, engine.now)
    assert now.hint.startswith("6 jobs have stalled, and 0 were recovered")
    await engine.maintainer.recover_stuck()
    recovered = one(alerts, "stalled_jobs")
    assert (recovered.firing, recovered.value, recovered.since) == (True, 6, now.since)
    assert recovered.hint.startswith("0 jobs have stalled, and 6 were recovered in the last 10 minutes.")
    await engine.maintainer.run_cleanup(forced=True)
    assert one(alerts, "stalled_jobs").value == 6, "a cleanup run does not change it"
    await seconds(600)
    after = one(alerts, "stalled_jobs")
    assert (after.firing, after.value, after.since) == (False, 0, None)
    engine.state.stalled["later"] = None
    engine.state.counters.recovered[engine.now // STEP_MS] = 1
    assert one(alerts, "stalled_jobs").hint == "1 job has stalled, and 1 was recovered in the last 10 minutes."
    del engine.state.stalled["later"]


@in_engine()
async def test_exactly_at_the_threshold_nothing_fires(engine: VirtualEngine) -> None:
    alerts = alerts_of(engine, Thresholds(processing_jobs=2))
    for number in range(2):
        await engine.held(f"job-{number}", lock_ttl_ms=HOUR_MS)
    assert one(alerts, "processing_jobs") == AlertView(
        "processing_jobs", False, None, 2, 2, one(alerts, "processing_jobs").hint, "notice"
    )
    await engine.held("one-more", lock_ttl_ms=HOUR_MS)
    assert one(alerts, "processing_jobs").firing


@in_engine()
async def test_average_processing_is_in_seconds(engine: VirtualEngine) -> None:
    alerts = alerts_of(engine, Thresholds(average_processing_ms=10 * MINUTE_MS))
    lock_id = await engine.held("a", lock_ttl_ms=HOUR_MS)
    await seconds(600)
    assert (one(alerts, "average_processing").value, firing(alerts)) == (600, [])
    await seconds(1)
    assert firing(alerts) == ["average_processing"]
    await engine.yes(Progress(id="a", lock_id=lock_id, progress=1))
    await engine.yes(Complete(id="a", lock_id=lock_id))
    assert firing(alerts) == ["average_processing"]
    await seconds(3660)
    assert firing(alerts) == []


@in_virtual_time
async def test_cleanup_issues_fires_until_a_run_finds_few_issues() -> None:
    storage = MemoryStorage()
    for number in range(11):
        storage.put(row(number + 1, progress=120))
    async with VirtualEngine(storage) as engine:
        alerts = alerts_of(engine)
        assert firing(alerts) == []
        engine.run_maintainer()
        await engine.maintainer.run_cleanup(forced=True)
        assert firing(alerts) == ["cleanup_issues"]
        await engine.maintainer.run_cleanup(forced=True)
        assert firing(alerts) == []


@in_engine()
async def test_a_double_grant_fires_for_an_hour_and_names_the_job(engine: VirtualEngine) -> None:
    alerts = alerts_of(engine)
    lock_id = await engine.held("cat-1")
    await engine.yes(EndGrants(ids=["cat-1"], last=True), by="daemon")
    assert firing(alerts) == []
    await engine.yes(Start(id="cat-1", worker="w-2"))
    with capture_logs() as logs:
        now = [one(alerts, "granted_twice") for _ in range(3)][-1]
    assert (now.firing, now.value, now.threshold) == (True, 1, 0)
    tokens = [(1 << 24) + 1, (1 << 24) + 2]
    for expected in ("cat-1", "w-1", "w-2", *map(str, tokens), "jobctl timeline cat-1"):
        assert expected in now.hint
    assert lock_id not in now.hint
    assert [(line["event"], line["hint"]) for line in logs] == [("alert_firing", now.hint)]
    alerts.thresholds = Thresholds(granted_twice=1)
    assert firing(alerts) == []
    alerts.thresholds = Thresholds()
    await seconds(3540)
    assert one(alerts, "granted_twice").firing
    await seconds(60)
    after = one(alerts, "granted_twice")
    assert (after.firing, after.value) == (False, 0)
    assert "cat-1" not in after.hint


def work(engine: VirtualEngine, kind: str, ms: int, count: int = SAMPLES_NEEDED) -> None:
    """Complete jobs at this moment."""
    for _ in range(count):
        engine.state.counters.baselines.add(kind, engine.now, ms)


@in_engine()
async def test_the_slowest_kind_fires_once_and_does_not_flap(engine: VirtualEngine) -> None:
    alerts = alerts_of(engine)
    for _ in range(HOURS_NEEDED):
        work(engine, "film", 1023)
        work(engine, "mail", 40)
        work(engine, "", 511)
        await seconds(3600)
    work(engine, "film", 1023)
    work(engine, "mail", 120)  # three times as slow, but too short to matter
    work(engine, "", 1023)
    exactly = one(alerts, "slower_than_usual")
    assert (exactly.firing, exactly.value, exactly.threshold) == (False, 2.0, 2.0)
    assert exactly.hint.startswith("Jobs of no kind take 1 s")
    with capture_logs() as logs:
        work(engine, "film", 3071, 2)
        found = one(alerts, "slower_than_usual")
        assert (found.firing, found.value) == (True, 3.0)
        assert "Jobs of kind film take 3 s (95th percentile, last hour, 22 jobs); the usual is 1 s." in found.hint
        alerts.thresholds = Thresholds(slower_than_usual=3.1)
        assert firing(alerts) == ["slower_than_usual"], "it continues just below the threshold"
        alerts.thresholds = Thresholds(slower_than_usual=3.4)
        assert firing(alerts) == []
        alerts.thresholds = Thresholds(slower_than_usual=3.1)
        assert firing(alerts) == [], "but it does not begin there"
    assert [line["event"] for line in logs] == ["alert_firing", "alert_resolved"]


@in_engine()
async def test_too_few_jobs_fire_nothing(engine: VirtualEngine) -> None:
    alerts = alerts_of(engine)
    work(engine, "new", 9_000)
    assert one(alerts, "slower_than_usual").value == 0
    for _ in range(HOURS_NEEDED):
        work(engine, "film", 1023)
        await seconds(3600)
    work(engine, "film", 9_000, SAMPLES_NEEDED - 1)
    assert one(alerts, "slower_than_usual").value == 0


@in_virtual_time
async def test_only_completed_jobs_count_for_durations() -> None:
    async with VirtualEngine() as engine:
        alerts = alerts_of(engine)
        for hour in range(HOURS_NEEDED + 1):
            for number in range(SAMPLES_NEEDED):
                lock_id = await engine.held(f"{hour}-{number}", kind="film")
                await seconds(4 if hour == HOURS_NEEDED else 1)
                await engine.yes(Complete(id=f"{hour}-{number}", lock_id=lock_id))
            await seconds(3600 if hour < HOURS_NEEDED else 0)
        assert firing(alerts) == ["slower_than_usual"]
        engine.run_maintainer()
        await engine.maintainer.run_cleanup(forced=True)
        storage = engine.disk
    async with VirtualEngine(storage) as after_a_restart:
        assert one(alerts_of(after_a_restart), "slower_than_usual").value >= 3.5


class MissingArtifactStore:
    """A missing store."""

    place = "/srv"

    async def probe(self) -> None:
        raise ArtifactStoreError("/srv is gone")


@in_engine()
async def test_an_unhealthy_part_fires_with_its_message(engine: VirtualEngine) -> None:
    health = Health(engine.actor, engine.clock, engine.maintainer, artifacts=cast(Any, MissingArtifactStore()))
    alerts = Alerts(engine.state, engine.clock, health, engine.maintainer, hold_ms=0, clear_ms=0)
    assert one(alerts, "database").hint == one(alerts, "storage").hint == "Not measured yet."
    engine.disk.errors["probe"] = OSError("broken")
    await engine.yes(Create(id="a"))
    engine.disk.jobs[1] = replace(engine.disk.jobs[1], progress=7)
    view = await health.view()
    assert firing(alerts) == ["database", "cache", "storage"]
    assert one(alerts, "storage").hint == view.storage.message == "/srv is gone"
    assert one(alerts, "database").hint == view.database.message
    assert (one(alerts, "cache").value, one(alerts, "cache").hint) == (1, view.cache.message)


@in_engine()
async def test_firing_and_resolving_are_logged_once_each(engine: VirtualEngine) -> None:
    alerts = alerts_of(engine)
    with capture_logs() as logs:
        for _ in range(3):
            engine.state.counters.recovered[engine.now // STEP_MS] = 6
            alerts.evaluate()
            await seconds(1)
        began = engine.now - 3000
        for _ in range(3):
            engine.state.counters.recovered[engine.now // STEP_MS] = 5
            alerts.evaluate()
    assert [(line["event"], line["log_level"], line["alert"]) for line in logs] == [
        ("alert_firing", "warning", "stalled_jobs"),
        ("alert_resolved", "info", "stalled_jobs"),
    ]
    assert logs[0]["value"] == 6
    assert logs[0]["threshold"] == 5
    assert logs[1]["since"] == began


@in_engine()
async def test_new_thresholds_apply_at_once(engine: VirtualEngine) -> None:
    alerts = alerts_of(engine)
    await engine.held("a")
    assert firing(alerts) == []
    alerts.thresholds = Thresholds(processing_jobs=0)
    assert firing(alerts) == ["processing_jobs"]


@in_engine()
async def test_alerts_are_evaluated_without_requests(engine: VirtualEngine) -> None:
    alerts = alerts_of(engine)
    running = asyncio.create_task(alerts.run())
    await seconds(1)
    engine.disk.errors["probe"] = OSError("broken")
    with capture_logs() as logs:
        engine.state.counters.recovered[engine.now // STEP_MS] = 6
        await seconds(EVALUATE_EVERY_S)
        assert [line["alert"] for line in logs] == ["stalled_jobs"]
        await seconds(MEASURE_EVERY_S)
        assert [line["alert"] for line in logs] == ["stalled_jobs", "database"]
    assert engine.disk.calls["probe"] == 2
    alerts.stop()
    await running


@in_engine()
async def test_a_bug_does_not_end_the_evaluation(engine: VirtualEngine) -> None:
    alerts = alerts_of(engine)
    counters, engine.state.counters = engine.state.counters, None  # type: ignore[assignment]
    running = asyncio.create_task(alerts.run())
    with capture_logs() as logs:
        await seconds(1)
    assert [line["event"] for line in logs] == ["alerts_failed"]
    engine.state.counters = counters
    counters.recovered[engine.now // STEP_MS] = 6
    with capture_logs() as logs:
        await seconds(EVALUATE_EVERY_S)
    assert [line["event"] for line in logs] == ["alert_firing"]
    alerts.stop()
    await running


@in_engine()
async def test_webhook_failing_fires_with_the_last_error(engine: VirtualEngine) -> None:
    alerts = alerts_of(engine)
    alerts.failing_webhook = lambda: FailingWebhook("billing", 300_000, "500: broken")
    assert not one(alerts, "webhook_failing").firing
    alerts.failing_webhook = lambda: FailingWebhook("billing", 301_000, "500: broken")
    shown = one(alerts, "webhook_failing")
    assert shown.firing
    assert shown.value == 301
    assert "billing" in shown.hint
    assert "500: broken" in shown.hint
    alerts.failing_webhook = lambda: None
    assert not one(alerts, "webhook_failing").firing


@in_engine()
async def test_listeners_are_notified_of_changes_only(engine: VirtualEngine) -> None:
    alerts, announced = alerts_of(engine), []
    alerts.on_change = lambda: announced.append(alerts.known())
    alerts.evaluate()
    assert alerts.known() is None
    assert announced == []
    running = asyncio.create_task(alerts.run())
    await seconds(1)
    assert len(announced) == 1
    assert announced[0] is not None
    alerts.evaluate()
    alerts.failing_webhook = lambda: FailingWebhook("billing", 301_000, "500: broken")
    await seconds(6)
    assert len(announced) == 2
    assert announced[1] is not None
    assert [alert.name for alert in announced[1] if alert.firing] == ["webhook_failing"]
    alerts.failing_webhook = lambda: None
    await seconds(6)
    assert len(announced) == 3, "once more when it resolves"
    alerts.stop()
    await running


# -- hysteresis --------------------------------------------------------------------------------------------------------


def slow_alerts_of(engine: VirtualEngine, thresholds: Thresholds | None = None) -> Alerts:
    """With the default durations, and fed with commits."""
    alerts = Alerts(
        engine.state, engine.clock, Health(engine.actor, engine.clock, engine.maintainer), engine.maintainer, thresholds
    )
    engine.actor.on_commit.append(alerts.attempts.note)
    return alerts


@in_engine()
async def test_an_alert_fires_after_30_s_and_resolves_after_60_s(engine: VirtualEngine) -> None:
    alerts = slow_alerts_of(engine, Thresholds(processing_jobs=0))
    lock_id = await engine.held("a", lock_ttl_ms=HOUR_MS)
    assert firing(alerts) == []
    await seconds(29)
    assert firing(alerts) == []
    await seconds(1)
    shown = one(alerts, "processing_jobs")
    assert (shown.firing, shown.since, shown.severity) == (True, engine.now, "notice")
    await engine.yes(Complete(id="a", lock_id=lock_id))
    shown = one(alerts, "processing_jobs")
    assert (shown.firing, shown.value) == (True, 0)
    assert shown.hint == (
        "Jobs processing: 0, no more than expected. The alert resolves when this has lasted for 1 min."
    ), "it describes the current state"
    await seconds(59)
    assert firing(alerts) == ["processing_jobs"]
    await seconds(1)
    shown = one(alerts, "processing_jobs")
    assert (shown.firing, shown.hint) == (False, "Jobs processing: 0, no more than expected.")


@in_engine()
async def test_alerts_fire_and_resolve_while_a_full_disk_holds_lock_time(engine: VirtualEngine) -> None:
    """And while the wall clock is stepped."""
    alerts = slow_alerts_of(engine, Thresholds(processing_jobs=0))
    engine.clock.hold()
    engine.state.totals["processing"] = 1
    assert firing(alerts) == []
    engine.step_ms -= HOUR_MS
    await seconds(30)
    assert firing(alerts) == ["processing_jobs"]
    engine.state.totals["processing"] = 0
    assert firing(alerts) == ["processing_jobs"]
    engine.step_ms += 2 * HOUR_MS
    await seconds(59)
    assert firing(alerts) == ["processing_jobs"]
    await seconds(1)
    assert firing(alerts) == []


@in_engine()
async def test_a_value_that_flickers_fires_nothing_and_resolves_nothing(engine: VirtualEngine) -> None:
    alerts = slow_alerts_of(engine, Thresholds(processing_jobs=0))
    processing = engine.state.totals
    with capture_logs() as logs:
        for number in range(120):
            processing["processing"] = number % 2
            assert firing(alerts) == []
            await seconds(5)
        processing["processing"] = 1
        for _ in range(7):
            alerts.evaluate()
            await seconds(5)
        for number in range(120):
            processing["processing"] = number % 2
            assert firing(alerts) == ["processing_jobs"]
            await seconds(5)
    processing["processing"] = 0
    assert [line["event"] for line in logs] == ["alert_firing"]
    assert logs[0]["severity"] == "notice"


@in_engine()
async def test_a_restart_resolves_nothing_too_early(engine: VirtualEngine) -> None:
    alerts = slow_alerts_of(engine, Thresholds(processing_jobs=0))
    announced: list[list[str] | None] = []
    alerts.on_change = lambda: announced.append(
        None if (known := alerts.known()) is None else [each.name for each in known if each.firing]
    )
    await engine.held("a", lock_ttl_ms=HOUR_MS)
    running = asyncio.create_task(alerts.run())
    await seconds(29)
    assert alerts.known() is None
    await seconds(7)
    assert alerts.known() is not None
    assert next(each for each in announced if each is not None) == ["processing_jobs"]
    alerts.stop()
    await running


# -- queues without workers, waiting jobs, failing jobs --------------------------------------------------------------


async def firing_after(alerts: Alerts, number: int) -> list[str]:
    """Return the alerts that fire after this many seconds, checked as often as in the daemon."""
    shown = await alerts.check()
    for _ in range(0, number, 5):
        await seconds(5)
        shown = await alerts.check()
    return [alert.name for alert in shown if alert.firing]


@in_engine()
async def test_an_incident_of_failing_attempts_and_missing_workers_fires_its_alerts(engine: VirtualEngine) -> None:
    """520 due jobs waited for 18 minutes without a worker, and every earlier attempt had failed."""
    alerts = slow_alerts_of(engine)
    for number in range(520):
        await engine.yes(Create(id=f"cat-{number}", queue="film", kind="encode"))
    for number in range(20):
        lock_id = await engine.held(f"old-{number}", queue="film", kind="encode")
        await engine.yes(Fail(id=f"old-{number}", lock_id=lock_id, error_message="no codec", retry=False))
    assert await firing_after(alerts, 25) == []
    assert await firing_after(alerts, 10) == ["failure_rate"]
    failing = one(alerts, "failure_rate")
    assert (failing.value, failing.threshold) == (1.0, 0.5)
    assert failing.hint.startswith("20 of 20 attempts in queue film failed in the last 10 minutes.")
    assert "jobctl jobs --queue film --status failed" in failing.hint
    assert await firing_after(alerts, 80) == ["failure_rate"]
    assert await firing_after(alerts, 45) == ["queue_without_workers", "failure_rate"]
    without = one(alerts, "queue_without_workers")
    assert without.value > without.threshold == 120
    for expected in ("queue film, kind encode", "cat-0", "520 queued jobs", "jobctl workers", "jobctl why cat-0"):
        assert expected in without.hint
    assert await firing_after(alerts, 180) == ["queue_without_workers", "queue_waits", "failure_rate"]
    waits = one(alerts, "queue_waits")
    assert waits.value > waits.threshold == 300
    assert "cat-0 of queue film, kind encode" in waits.hint
    assert await firing_after(alerts, 340) == ["queue_without_workers", "queue_waits"], "its attempts are too old"
    await engine.yes(Claim(queues=["film"], kinds=["encode"], worker="w-1", limit=10, lock_ttl_ms=HOUR_MS))
    await engine.yes(Pause(name="film"))
    assert await firing_after(alerts, 55) == ["queue_without_workers", "queue_waits"]
    assert await firing_after(alerts, 10) == []


@in_engine()
async def test_a_claim_of_another_kind_is_not_a_worker_for_the_queue(engine: VirtualEngine) -> None:
    alerts = alerts_of(engine)
    await engine.yes(Create(id="a", kind="film"))
    for _ in range(25):
        await engine.yes(Claim(queues=["default"], kinds=["mail"], worker="w-1"))
        await seconds(5)
    assert await firing_after(alerts, 0) == ["queue_without_workers"]
    await engine.yes(Pause(name="default"))
    await engine.yes(Claim(queues=["default"], kinds=["film"], worker="w-1"))
    assert await firing_after(alerts, 0) == []
    assert await firing_after(alerts, 300) == ["queue_without_workers"], "a paused queue waits on purpose"
    assert one(alerts, "queue_waits").hint == "No due job is waiting. Jobs of paused queues do not count."
    without = one(alerts, "queue_without_workers").hint
    assert "The queue has 1 queued job and was paused by a client at " in without
    assert "until resumed: no reason given. Start a worker before you resume it." in without
    assert "due" not in without


@in_engine()
async def test_a_job_that_returns_to_its_queue_has_not_waited_while_a_worker_held_it(engine: VirtualEngine) -> None:
    alerts = alerts_of(engine)
    lock_id = await engine.held("a", lock_ttl_ms=HOUR_MS)
    await seconds(1800)
    await engine.yes(Release(id="a", lock_id=lock_id))
    assert await firing_after(alerts, 120) == []
    assert one(alerts, "queue_waits").value == one(alerts, "queue_without_workers").value == 120
    assert await firing_after(alerts, 181) == ["queue_without_workers", "queue_waits"]


@in_engine()
async def test_a_suspect_jump_of_the_clock_makes_no_job_wait(engine: VirtualEngine) -> None:
    alerts = alerts_of(engine)
    await engine.yes(Create(id="a"))
    engine.step_ms = 400 * DAY_MS
    await alerts.check()
    assert engine.clock.moment().suspect
    assert one(alerts, "queue_waits").value == one(alerts, "queue_without_workers").value == 0


@in_engine()
async def test_many_kinds_are_scanned_in_slices_and_none_is_omitted(engine: VirtualEngine) -> None:
    alerts = alerts_of(engine)
    kinds = SLICES_PER_CHECK * PAIRS_PER_SLICE // 2 + 10
    for number in range(kinds):
        due = engine.now - 1000 * number
        options = Options(kind=f"k-{number}")
        engine.state.reindex(None, Job(number + 1, f"job-{number}", options, "queued", due, due, due))
    await alerts.check()
    assert one(alerts, "queue_waits").value == 0, "the scan continues at the next check"
    await alerts.check()
    assert one(alerts, "queue_waits").value == kinds - 1


@in_engine()
async def test_failure_rate_fires_at_half_of_the_attempts_of_a_queue(engine: VirtualEngine) -> None:
    alerts = alerts_of(engine)
    engine.actor.on_commit.append(alerts.attempts.note)
    for number in range(20):
        lock_id = await engine.held(f"a-{number}", queue="a")
        if number < 10:
            await engine.yes(Complete(id=f"a-{number}", lock_id=lock_id))
        else:
            assert firing(alerts) == []
            await engine.yes(Fail(id=f"a-{number}", lock_id=lock_id, error_message="e", retry=False))
    assert firing(alerts) == ["failure_rate"]
    alerts.thresholds = Thresholds(failure_rate_attempts=21)
    shown = one(alerts, "failure_rate")
    assert (shown.firing, shown.value) == (False, 0)


@pytest.mark.parametrize(
    ("free", "total", "fires", "expected"),
    [
        (10 << 30, 100 << 30, False, "10.0 GiB of 100.0 GiB"),
        ((10 << 30) - 1, 100 << 30, True, "10.0 GiB of 100.0 GiB"),
        (1 << 30, 4 << 30, False, "1.0 GiB of 4.0 GiB"),
        ((1 << 30) - 1, 4 << 30, True, "1024.0 MiB of 4.0 GiB"),
        (1 << 20, 1 << 29, True, "1.0 MiB of 512.0 MiB"),
    ],
)
def test_disk_nearly_full_fires_below_a_tenth_or_one_gibibyte(
    free: int, total: int, fires: bool, expected: str
) -> None:
    async def evaluate() -> None:
        async with VirtualEngine() as engine:
            engine.disk.disk_space = DiskSpace("/srv/jobd.db", free, total)
            alerts = alerts_of(engine)
            await alerts.check()
            shown = one(alerts, "disk_nearly_full")
            assert shown.firing == fires
            assert shown.hint.startswith(f"{expected} are free on the disk of /srv/jobd.db.")
            assert ("retention" in shown.hint) == fires

    in_virtual_time(evaluate)()


@in_engine()
async def test_a_store_in_memory_has_no_disk_to_fill(engine: VirtualEngine) -> None:
    engine.disk.disk_space = None
    alerts = alerts_of(engine)
    await alerts.check()
    assert one(alerts, "disk_nearly_full").hint == "The free space of the disk is unknown."


@in_engine()
async def test_release_loop_fires_for_a_job_that_is_released_repeatedly(engine: VirtualEngine) -> None:
    alerts = alerts_of(engine)
    engine.state.release_loops["cat-9"] = 20
    shown = one(alerts, "release_loop")
    assert (shown.firing, shown.value, shown.threshold) == (True, 1, 0)
    for expected in ("cat-9", "20 times in a row", "jobctl timeline cat-9", "jobctl cancel cat-9"):
        assert expected in shown.hint
    del engine.state.release_loops["cat-9"]
    assert not one(alerts, "release_loop").firing
