"""Alerts: each fires above its threshold and not at it, knows since when, and is logged once each way."""

from __future__ import annotations

import asyncio

from msgspec.structs import replace
from structlog.testing import capture_logs

from jobd.alerts import EVALUATE_EVERY_S, MEASURE_EVERY_S, NAMES, Alerts, Thresholds
from jobd.answers import AlertView
from jobd.commands import Complete, Create, Progress
from jobd.health import Health
from jobd.job import HOUR_MS, MINUTE_MS
from tests.household import Household, in_virtual_time, row, seconds
from tests.memory_disk import MemoryDisk


def alerts_of(house: Household, thresholds: Thresholds | None = None) -> Alerts:
    health = Health(house.actor, house.clock, house.cleaner)
    return Alerts(house.book, house.clock, health, house.cleaner, thresholds)


def one(alerts: Alerts, name: str) -> AlertView:
    return {alert.name: alert for alert in alerts.evaluate()}[name]


def firing(alerts: Alerts) -> list[str]:
    return [alert.name for alert in alerts.evaluate() if alert.firing]


@in_virtual_time
async def test_a_quiet_daemon_fires_nothing_and_names_every_alert() -> None:
    async with Household() as house:
        shown = alerts_of(house).evaluate()
        assert [alert.name for alert in shown] == list(NAMES)
        assert not any(alert.firing for alert in shown)
        assert all(alert.since is None and alert.hint for alert in shown)
        assert [alert.threshold for alert in shown] == [5, 20, 600, 10, 0, 0]


@in_virtual_time
async def test_stuck_jobs_count_now_and_as_recovered_since_the_last_pass() -> None:
    async with Household() as house:
        alerts = alerts_of(house)
        house.keep()
        await seconds(1)
        for number in range(6):
            await house.held(f"job-{number}")
        await seconds(61)
        await house.yes(Create(id="later"))  # whatever comes in lets the book see the time
        await seconds(1)
        now = one(alerts, "stuck_jobs")
        assert (now.firing, now.value, now.since) == (True, 6, house.now)
        await house.cleaner.recover_stuck()
        recovered = one(alerts, "stuck_jobs")
        assert (recovered.firing, recovered.value, recovered.since) == (True, 6, now.since)
        assert recovered.hint.startswith("0 jobs are stuck now, 6 were recovered since the last pass.")
        await house.cleaner.run_pass(forced=True)
        after = one(alerts, "stuck_jobs")
        assert (after.firing, after.value, after.since) == (False, 0, None)


@in_virtual_time
async def test_exactly_at_the_threshold_nothing_fires() -> None:
    async with Household() as house:
        alerts = alerts_of(house, Thresholds(processing_jobs=2))
        for number in range(2):
            await house.held(f"job-{number}", lock_ttl_ms=HOUR_MS)
        assert one(alerts, "processing_jobs") == AlertView(
            "processing_jobs", False, None, 2, 2, one(alerts, "processing_jobs").hint
        )
        await house.held("one-more", lock_ttl_ms=HOUR_MS)
        assert one(alerts, "processing_jobs").firing


@in_virtual_time
async def test_average_processing_is_in_seconds() -> None:
    async with Household() as house:
        alerts = alerts_of(house, Thresholds(average_processing_ms=10 * MINUTE_MS))
        lock_id = await house.held("a", lock_ttl_ms=HOUR_MS)
        await seconds(600)
        assert (one(alerts, "average_processing").value, firing(alerts)) == (600, [])
        await seconds(1)
        assert firing(alerts) == ["average_processing"]
        await house.yes(Progress(id="a", lock_id=lock_id, progress=1))
        await house.yes(Complete(id="a", lock_id=lock_id))
        assert firing(alerts) == ["average_processing"]
        await seconds(3660)
        assert firing(alerts) == []


@in_virtual_time
async def test_a_pass_that_found_many_issues_fires_until_one_finds_few() -> None:
    disk = MemoryDisk()
    for number in range(11):
        disk.put(row(number + 1, progress=120))
    async with Household(disk) as house:
        alerts = alerts_of(house)
        assert firing(alerts) == []
        house.keep()
        await house.cleaner.run_pass(forced=True)
        assert firing(alerts) == ["pass_issues"]
        await house.cleaner.run_pass(forced=True)
        assert firing(alerts) == []


@in_virtual_time
async def test_what_is_not_healthy_fires_with_its_message() -> None:
    async with Household() as house:
        health = Health(house.actor, house.clock, house.cleaner)
        alerts = Alerts(house.book, house.clock, health, house.cleaner)
        assert one(alerts, "database").hint == "It was not measured yet."
        house.disk.errors["probe"] = OSError("broken")
        await house.yes(Create(id="a"))
        house.disk.jobs[1] = replace(house.disk.jobs[1], progress=7)
        view = await health.view()
        assert firing(alerts) == ["database", "cache"]
        assert one(alerts, "database").hint == view.database.message
        assert (one(alerts, "cache").value, one(alerts, "cache").hint) == (1, view.cache.message)


@in_virtual_time
async def test_firing_and_resolving_are_logged_once_each() -> None:
    async with Household() as house:
        alerts = alerts_of(house)
        with capture_logs() as logs:
            for _ in range(3):
                house.book.figures.since_report.recovered = 6
                alerts.evaluate()
                await seconds(1)
            began = house.now - 3000
            for _ in range(3):
                house.book.figures.since_report.recovered = 5
                alerts.evaluate()
        assert [(line["event"], line["log_level"], line["alert"]) for line in logs] == [
            ("alert_firing", "warning", "stuck_jobs"),
            ("alert_resolved", "info", "stuck_jobs"),
        ]
        assert logs[0]["value"] == 6
        assert logs[0]["threshold"] == 5
        assert logs[1]["since"] == began


@in_virtual_time
async def test_new_thresholds_are_in_force_at_once() -> None:
    async with Household() as house:
        alerts = alerts_of(house)
        await house.held("a")
        assert firing(alerts) == []
        alerts.thresholds = Thresholds(processing_jobs=0)
        assert firing(alerts) == ["processing_jobs"]


@in_virtual_time
async def test_alerts_are_noticed_without_anybody_asking() -> None:
    async with Household() as house:
        alerts = alerts_of(house)
        running = asyncio.create_task(alerts.run())
        await seconds(1)
        house.disk.errors["probe"] = OSError("broken")
        with capture_logs() as logs:
            house.book.figures.since_report.recovered = 6
            await seconds(EVALUATE_EVERY_S)
            assert [line["alert"] for line in logs] == ["stuck_jobs"]
            await seconds(MEASURE_EVERY_S)
            assert [line["alert"] for line in logs] == ["stuck_jobs", "database"]
        assert house.disk.calls["probe"] == 2
        alerts.stop()
        await running


@in_virtual_time
async def test_a_bug_does_not_end_the_watch() -> None:
    async with Household() as house:
        alerts = alerts_of(house)
        figures, house.book.figures = house.book.figures, None  # type: ignore[assignment]
        running = asyncio.create_task(alerts.run())
        with capture_logs() as logs:
            await seconds(1)
        assert [line["event"] for line in logs] == ["alerts_failed"]
        house.book.figures = figures
        figures.since_report.recovered = 6
        with capture_logs() as logs:
            await seconds(EVALUATE_EVERY_S)
        assert [line["event"] for line in logs] == ["alert_firing"]
        alerts.stop()
        await running
