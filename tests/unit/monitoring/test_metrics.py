"""Metrics: exact names, consistent values, bounded labels, and no state shared with the thread."""

from __future__ import annotations

import asyncio
import math
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

import jobd
from jobd.core.state import State
from jobd.core.stats import HOURS_NEEDED, OTHER_QUEUES, SAMPLES_NEEDED, Histogram
from jobd.engine.actor import COMMIT_BUCKETS_S, Actor
from jobd.engine.clock import Clock
from jobd.engine.disk_full import WriteLimit
from jobd.engine.event_feed import EventFeed
from jobd.engine.idempotency import IdempotencyStore
from jobd.maintenance.artifact_sweeper import SweepStats
from jobd.maintenance.cleanup_run import CleanupSchedule
from jobd.maintenance.maintainer import Maintainer
from jobd.model import commands as cmd
from jobd.model.errors import ERROR_STATUS
from jobd.model.job import SECOND_MS, Job, Options, Policy
from jobd.model.responses import ClusterView, Response
from jobd.monitoring.health import Health
from jobd.monitoring.metrics import (
    COMMITS_KEPT,
    LAG_EVERY_S,
    MAX_BUCKETS_SCANNED,
    PROBLEM_QUEUES,
    QUEUES_SHOWN,
    Metrics,
    capped,
    oldest_due_s,
    quantile,
    text,
)
from jobd.monitoring.problems.board import ProblemBoard
from jobd.monitoring.problems.catalogue import ALERTS, OF_CLUSTER
from jobd.monitoring.problems.condition import Scene
from jobd.storage.store import Store
from tests.support.memory_storage import MemoryStorage
from tests.support.virtual_engine import VirtualEngine, in_engine, in_virtual_time, row, seconds


def metrics_of(engine: VirtualEngine, *errors: Counter[str], store_path: str = ":memory:") -> Metrics:
    health = Health(engine.actor, engine.clock, engine.maintainer)
    scene = Scene(state=engine.state, clock=engine.clock, health=health, cleanup=engine.maintainer)
    problems = ProblemBoard(scene, hold_ms=0, clear_ms=0)
    return Metrics(
        engine.actor,
        engine.maintainer,
        problems,
        engine.clock,
        SweepStats(),
        store_path,
        lambda: errors,
        EventFeed(engine.disk, 0, 1),
    )


def read(body: bytes) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(body.decode())}


def value(body: bytes, sample: str, **labels: str) -> float:
    found = [
        each.value
        for family in text_string_to_metric_families(body.decode())
        for each in family.samples
        if each.name == sample and each.labels == labels
    ]
    assert len(found) == 1, f"{sample}{labels}: {found}"
    return found[0]


def shown(engine: VirtualEngine, *errors: Counter[str]) -> bytes:
    """Render without the thread, which virtual time does not wait for."""
    return text(metrics_of(engine, *errors).families())


class RealStoreParts:
    """Everything on a real store."""

    def __init__(self, store: Store, actor: Actor, maintainer: Maintainer, metrics: Metrics) -> None:
        self.store = store
        self.actor = actor
        self.maintainer = maintainer
        self.metrics = metrics

    async def yes(self, command: cmd.AnyCommand) -> Response:
        response = await self.actor.ask(command)
        assert isinstance(response, Response), response
        return response


@asynccontextmanager
async def real(path: Path) -> AsyncIterator[RealStoreParts]:
    store, opened = await Store.open(str(path))
    async with store:
        clock = Clock(opened.numbers)
        state = State.opened(opened)
        policy = Policy(keep_completed_ms=1)
        actor = Actor(store, state, IdempotencyStore(opened.keys, 1000), clock, policy, random=os.urandom)
        maintainer = Maintainer(actor, clock, CleanupSchedule(batch=2))
        health = Health(actor, clock, maintainer, take_faults=store.take_faults)
        problems = ProblemBoard(Scene(state=state, clock=clock, health=health, cleanup=maintainer))
        metrics = Metrics(actor, maintainer, problems, clock, SweepStats(), str(path), tuple, EventFeed(store, 0, 1))
        running = [asyncio.create_task(run()) for run in (actor.run, maintainer.run, problems.run, metrics.run)]
        yield RealStoreParts(store, actor, maintainer, metrics)
        for part in (metrics, problems, maintainer):
            part.stop()
        await asyncio.gather(*running[1:])
        await health.close()
        actor.stop()
        await running[0]


async def test_every_metric_has_a_type_and_a_help_text(tmp_path: Path) -> None:
    """Its name, type and labels are compared with the documents in test_docs.py."""
    async with real(tmp_path / "jobd.db") as daemon:
        await daemon.maintainer.run_cleanup(forced=True)
        body = await daemon.metrics.render()
    lines = body.decode().splitlines()
    helped = [line for line in lines if line.startswith("# HELP")]
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert names == [line.split()[2] for line in helped]
    assert len(names) == len(set(names)) > 40
    assert all(len(line.split(maxsplit=3)[3]) > 10 for line in helped)


async def test_job_lifecycles_on_a_real_store_are_counted(tmp_path: Path) -> None:
    """Recovery, deletion, validation, the journal and reports work on SQLite as in memory."""
    async with real(tmp_path / "jobd.db") as daemon:
        now = time.time_ns() // 1_000_000
        for number in range(5):
            await daemon.yes(cmd.Create(id=f"old-{number}", queue="video"))
            granted = (await daemon.yes(cmd.Start(id=f"old-{number}", worker="w"))).data
            await daemon.yes(cmd.Complete(id=f"old-{number}", lock_id=granted.lock_id, file_path="/x"))
        await daemon.yes(cmd.Create(id="dead"))
        await daemon.yes(cmd.Start(id="dead", worker="w", lock_ttl_ms=1, stall_after_ms=0))
        while "dead" in daemon.actor.state.processing:
            await daemon.maintainer.recover_stuck()
            await asyncio.sleep(0.05)
        report = await daemon.maintainer.run_cleanup(forced=True)
        reports = await daemon.maintainer.reports(9)  # that of the first timer may be among them
        assert reports[0] == report
        assert [error for each in reports for error in each.errors] == []
        assert sum(each.expired_jobs_deleted for each in reports) == 5
        assert sum(each.stuck_jobs_recovered for each in reports) == 1
        await daemon.actor.full_disk.measure()
        body = await daemon.metrics.render()
        assert value(body, "jobd_jobs", status="queued") == 1
        queues = {sample.labels["queue"] for sample in read(body)["jobd_queue_jobs"].samples}
        assert "video" not in queues, "it has no jobs now"
        assert value(body, "jobd_grants_total", queue="video") == 5
        assert value(body, "jobd_stalls_total") == value(body, "jobd_recovered_total", action="reset") == 1
        assert value(body, "jobd_cleanup_found_total", kind="deleted") == 5
        assert value(body, "jobd_processing_seconds_count", queue="video") == 5
        assert value(body, "jobd_processing_seconds_bucket", queue="video", le="+Inf") == 5
        assert value(body, "jobd_cleanup_last_timestamp_seconds") * 1000 == pytest.approx(report.timestamp)
        assert report.timestamp >= now
        assert value(body, "jobd_cleanup_runs_total") == daemon.maintainer.totals.runs >= 1
        assert value(body, "jobd_commit_seconds_count") == value(body, "jobd_batch_commands_count") >= 10
        assert value(body, "jobd_database_bytes") > 0
        storage = shutil.disk_usage(tmp_path)
        assert value(body, "jobd_disk_free_bytes") == pytest.approx(storage.free, abs=1 << 28)
        assert value(body, "jobd_disk_total_bytes") == storage.total
        assert value(body, "jobd_wal_bytes") == (tmp_path / "jobd.db-wal").stat().st_size
        vitals = await daemon.metrics.vitals()
        assert (vitals.commit_p99_s or 0) > 0
        assert vitals.database_bytes == (tmp_path / "jobd.db").stat().st_size
        assert vitals.wal_bytes == (tmp_path / "jobd.db-wal").stat().st_size
        assert (vitals.mailbox, vitals.parked) == (0, 0)
        assert vitals.uptime_ms > 0
        assert value(body, "jobd_build_info", version=jobd.__version__, python=platform.python_version()) == 1


@in_virtual_time
async def test_the_events_that_the_tables_lack_are_counted() -> None:
    async with VirtualEngine(MemoryStorage(slices_wait=True)) as engine:
        await engine.yes(cmd.Create(id="a"))
        body = text(metrics_of(engine).families())
        assert value(body, "jobd_tail_events") == engine.disk.behind > 0


@in_engine()
async def test_the_leader_of_a_cluster_counts_its_appends(engine: VirtualEngine) -> None:
    metrics = metrics_of(engine)
    assert not read(text(metrics.families()))["jobd_leader"].samples
    metrics.cluster = lambda: ClusterView(role="leader")
    metrics.append_seconds = Histogram.empty(COMMIT_BUCKETS_S)
    metrics.append_seconds.add(0.0007, COMMIT_BUCKETS_S)
    body = text(metrics.families())
    assert value(body, "jobd_leader") == 1
    assert value(body, "jobd_standby_lag_events") == 0
    assert value(body, "jobd_journal_append_seconds_bucket", le="0.0005") == 0
    assert value(body, "jobd_journal_append_seconds_bucket", le="0.001") == 1
    assert value(body, "jobd_journal_append_seconds_sum") == 0.0007


@pytest.mark.parametrize("inline", [True, False])
@in_engine()
async def test_the_commit_mode_is_shown(engine: VirtualEngine, inline: bool) -> None:
    engine.disk.commits_inline = inline
    body = text(metrics_of(engine).families())
    assert value(body, "jobd_commit_mode", mode="inline") == inline
    assert value(body, "jobd_commit_mode", mode="thread") == (not inline)


@pytest.mark.parametrize(
    ("counts", "bound"),
    [
        ([0, 0, 0], None),
        ([99, 1, 0], 1),
        ([98, 2, 0], 2),
        ([0, 1, 0], 2),
        ([0, 0, 1], math.inf),
        ([990, 9, 1], 1),
        ([980, 10, 10], 2),
        ([980, 9, 11], math.inf),
    ],
)
def test_a_quantile_is_the_bound_of_its_bucket(counts: list[int], bound: float | None) -> None:
    assert quantile(0.99, counts, (1, 2)) == bound


@in_engine()
async def test_the_slowest_commits_are_those_of_the_last_minutes(engine: VirtualEngine) -> None:
    metrics = metrics_of(engine)
    engine.actor.commit_seconds.add(0.003, COMMIT_BUCKETS_S)
    assert metrics.commit_p99_s() == 0.005
    running = asyncio.create_task(metrics.run())
    await seconds((COMMITS_KEPT + 2) * LAG_EVERY_S)
    assert metrics.commit_p99_s() is None
    metrics.stop()
    await running


@in_engine()
async def test_a_store_in_memory_has_no_files(engine: VirtualEngine) -> None:
    engine.disk.disk_space = None
    await engine.actor.full_disk.measure()
    body = shown(engine)
    assert value(body, "jobd_database_bytes") == value(body, "jobd_wal_bytes") == 0
    assert read(body)["jobd_disk_free_bytes"].samples == read(body)["jobd_disk_total_bytes"].samples == []


async def test_vitals_of_a_store_in_memory_have_no_sizes() -> None:
    async with VirtualEngine() as engine:
        vitals = await metrics_of(engine).vitals()
        assert (vitals.database_bytes, vitals.wal_bytes) == (0, 0)


@in_engine()
async def test_locks_stalled_jobs_and_waiting_claims(engine: VirtualEngine) -> None:
    await engine.held("a", lock_ttl_ms=60_000)
    await engine.held("b", lock_ttl_ms=600_000)
    parked = asyncio.create_task(engine.yes(cmd.Claim(worker="w", wait_ms=60_000)))
    await seconds(1)
    engine.actor.unread.add(7)
    assert value(shown(engine), "jobd_parked_claims") == 1
    assert value(shown(engine), "jobd_response_bytes") == 7
    assert value(shown(engine), "jobd_locked_jobs") == 2
    await parked
    await seconds(1)
    engine.disk.gate.clear()
    tasks = [asyncio.create_task(engine.yes(cmd.Create())) for _ in range(4)]
    await engine.disk.at_gate.wait()
    tasks += [asyncio.create_task(engine.yes(cmd.Create())) for _ in range(3)]
    await seconds(0)
    body = shown(engine)
    assert value(body, "jobd_mailbox_commands") == 3
    assert value(body, "jobd_locked_jobs") == 1
    assert value(body, "jobd_stalled_jobs") == 1
    engine.disk.gate.set()
    await asyncio.gather(*tasks)


@in_engine()
async def test_the_wait_of_the_oldest_due_job_of_each_queue(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a", queue="film", priority=9))
    await seconds(40)
    await engine.yes(cmd.Create(id="b", queue="film"))
    await engine.yes(cmd.Create(id="c", queue="later", run_at=engine.now + 9_000))
    await engine.yes(cmd.Pause(name="film"), by="admin")
    await seconds(2)
    body = shown(engine)
    assert value(body, "jobd_queue_oldest_due_seconds", queue="film") == 42
    assert value(body, "jobd_queue_oldest_due_seconds", queue="later") == 0
    assert value(body, "jobd_queue_paused", queue="film") == 1
    assert value(body, "jobd_queue_paused", queue="later") == 0


@in_engine()
async def test_times_of_schedules_are_counted_by_outcome(engine: VirtualEngine) -> None:
    await engine.yes(cmd.PutSchedule(id="s", every_ms=SECOND_MS, job=cmd.ScheduledJob(), source="app:shop"))
    version = engine.state.schedules["s"].version
    fires: list[dict[str, Any]] = [{"missed": 4}, {"missed": 1}, {}, {"missed": 2, "is_missed": True}]
    for number, fields in enumerate(fires, 1):
        at = engine.now + number * SECOND_MS
        await engine.yes(cmd.Fire(id="s", version=version, scheduled_at=at, **fields), by="schedule:s")
    await engine.yes(cmd.RunSchedule(id="s", force=True))
    found = {
        name: value(shown(engine), "jobd_schedule_fired_total", outcome=name) for name in ("fired", "skipped", "missed")
    }
    assert found == {"fired": 1, "skipped": 2, "missed": 8}


@in_engine()
async def test_only_queues_with_very_many_kinds_are_skipped(engine: VirtualEngine) -> None:
    for number in range(MAX_BUCKETS_SCANNED):
        await engine.yes(cmd.Create(id=f"a-{number}", queue="many", kind=str(number)))
    assert oldest_due_s(engine.state, engine.now + 1_000) == {"many": 1}
    await engine.yes(cmd.Create(id="b", queue="many", kind="one more"))
    await engine.yes(cmd.Create(id="c", queue="few"))
    assert oldest_due_s(engine.state, engine.now + 1_000) == {"few": 1}


@in_engine(policy=Policy(keep_failed_ms=4 * SECOND_MS))
async def test_durations_double_grants_quarantine_and_the_clock(engine: VirtualEngine) -> None:
    body = shown(engine)
    assert value(body, "jobd_granted_twice_total") == value(body, "jobd_quarantined_jobs") == 0
    assert value(body, "jobd_clock_suspect") == 0
    assert value(body, "jobd_mailbox_limit_commands") == 10_000
    assert read(body)["jobd_processing_p95_seconds"].samples == []
    for hour in range(HOURS_NEEDED + 1):
        for _ in range(SAMPLES_NEEDED):
            engine.state.counters.baselines.add("film", engine.now, 1023 if hour < HOURS_NEEDED else 4095)
        await seconds(3600 if hour < HOURS_NEEDED else 0)
    await engine.held("a")
    await engine.yes(cmd.EndGrants(ids=["a"], last=True), by="daemon")
    await engine.yes(cmd.Start(id="a", worker="w-2"))
    engine.state.quarantine("bad", "its checksum is wrong")
    engine.step_ms = 3 * SECOND_MS
    body = shown(engine)
    assert value(body, "jobd_processing_p95_seconds", kind="film", window="hour") == 4.095
    assert value(body, "jobd_processing_p95_seconds", kind="film", window="usual") == 1.023
    assert value(body, "jobd_granted_twice_total") == value(body, "jobd_quarantined_jobs") == 1
    assert value(body, "jobd_clock_suspect") == 1


@in_engine()
async def test_errors_of_all_listeners_are_summed_and_every_code_is_listed(engine: VirtualEngine) -> None:
    body = shown(engine, Counter(already_locked=2, not_found=1), Counter(already_locked=3))
    assert value(body, "jobd_rejections_total", code="already_locked") == 5
    assert value(body, "jobd_rejections_total", code="lock_lost") == 0
    assert len(read(body)["jobd_rejections"].samples) == len(ERROR_STATUS)


@in_engine()
async def test_the_write_limit_of_a_full_disk(engine: VirtualEngine) -> None:
    assert value(shown(engine), "jobd_disk_full") == 0
    for closed in WriteLimit:
        engine.actor.full_disk.write_limit = closed
        assert value(shown(engine), "jobd_disk_full") == closed


@in_virtual_time
async def test_validation_issues_by_type() -> None:
    storage = MemoryStorage()
    for number in range(11):
        storage.put(row(number + 1, progress=120))
    storage.put(row(20, "nobody", "processing"))
    async with VirtualEngine(storage) as engine:
        assert not read(shown(engine))["jobd_cleanup_last_timestamp_seconds"].samples
        await engine.cleanup()
        body = shown(engine)
        assert value(body, "jobd_validation_issues_total", type="error") == 11
        assert value(body, "jobd_validation_issues_total", type="critical") == 1
        assert value(body, "jobd_cleanup_found_total", kind="issues") == 12


@in_engine()
async def test_problems_by_condition_and_the_jobs_of_the_worst_queues(engine: VirtualEngine) -> None:
    metrics = metrics_of(engine)
    problems = metrics._problems
    for number in range(PROBLEM_QUEUES + 3):
        await engine.yes(cmd.Create(queue=f"q-{number}"))
    problems._first = engine.clock.boot_ms()
    await seconds(200)
    await problems.check()
    body = text(metrics.families())
    labels = {"condition": "no_workers", "severity": "warning"}
    assert value(body, "jobd_problems", **labels) == value(body, "jobd_problems_opened_total", **labels) == 53
    assert value(body, "jobd_problems", condition="disk", severity="critical") == 0
    assert value(body, "jobd_problem_jobs", condition="", queue="(other)") == 3
    assert len(read(body)["jobd_problem_jobs"].samples) == PROBLEM_QUEUES + 1
    assert value(body, "jobd_alert_firing", alert="queue_without_workers") == 1
    assert len(read(body)["jobd_alert_firing"].samples) == sum(each not in OF_CLUSTER for each in ALERTS.values())


@in_engine()
async def test_queue_labels_are_limited_and_the_rest_is_summed(engine: VirtualEngine) -> None:
    for number in range(QUEUES_SHOWN + 30):
        await engine.yes(cmd.Create(id=f"a-{number}", queue=f"q-{number}"))
        await engine.yes(cmd.Start(id=f"a-{number}", worker="w"))
    body = shown(engine)
    queues = {sample.labels["queue"] for sample in read(body)["jobd_queue_jobs"].samples}
    assert len(queues) == QUEUES_SHOWN + 1
    assert value(body, "jobd_queue_jobs", queue=OTHER_QUEUES, status="processing") == 30
    assert value(body, "jobd_queue_jobs", queue="q-0", status="processing") == 1
    assert value(body, "jobd_grants_total", queue=OTHER_QUEUES) == 30
    total = sum(sample.value for sample in read(body)["jobd_queue_jobs"].samples)
    assert total == QUEUES_SHOWN + 30


@pytest.mark.parametrize("count", [0, QUEUES_SHOWN, QUEUES_SHOWN + 1])
def test_capped_at_its_boundary(count: int) -> None:
    state = State()
    for number in range(count):
        state.reindex(None, Job(number, f"job-{number}", Options(f"q-{number}"), "queued", 1, 1, 1))
    shown_queues = capped(state)
    assert len(shown_queues) == min(count, QUEUES_SHOWN + 1)
    assert sum(counts["queued"] for _, counts in shown_queues) == count
    assert (shown_queues[-1][0] == OTHER_QUEUES) == (count > QUEUES_SHOWN) if shown_queues else True


@in_engine()
async def test_histograms_are_cumulative(engine: VirtualEngine) -> None:
    for number, ms in enumerate((50, 100, 101, 15_000_000)):
        lock_id = await engine.held(f"job-{number}", lock_ttl_ms=86_400_000, progress_timeout_ms=0)
        await seconds(ms / 1000)
        await engine.yes(cmd.Complete(id=f"job-{number}", lock_id=lock_id))
    body = shown(engine)
    buckets = {
        sample.labels["le"]: sample.value
        for sample in read(body)["jobd_processing_seconds"].samples
        if sample.name.endswith("_bucket")
    }
    assert (buckets["0.1"], buckets["0.5"], buckets["14400.0"], buckets["+Inf"]) == (2, 3, 3, 4)
    assert value(body, "jobd_processing_seconds_sum", queue="default") == pytest.approx(15_000.251, abs=0.01)


@in_engine()
async def test_metrics_that_are_not_formatted_yet_share_nothing_with_the_state(engine: VirtualEngine) -> None:
    """Values that the thread reads must not change meanwhile."""
    await engine.held("a")
    metrics = metrics_of(engine, Counter(not_due=1))
    families = metrics.families()
    before = text(families)
    lock_id = await engine.held("b", queue="other")
    await engine.yes(cmd.Complete(id="b", lock_id=lock_id))
    engine.state.counters.note(engine.disk.batches[-1].changes[-1:])
    assert text(families) == before
    assert text(metrics.families()) != before


@pytest.mark.slow
async def test_the_lag_of_the_loop_is_measured() -> None:
    async with VirtualEngine() as engine:
        metrics = metrics_of(engine)
        assert value(text(metrics.families()), "jobd_loop_lag_seconds") == 0
        running = asyncio.create_task(metrics.run())
        await asyncio.sleep(0)
        time.sleep(LAG_EVERY_S + 0.2)  # this is the lag
        metrics.stop()
        await running
        assert value(await metrics.render(), "jobd_loop_lag_seconds") >= 0.1
