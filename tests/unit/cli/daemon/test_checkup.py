"""The checks of `jobd doctor --running`, against prepared responses and metrics."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

import jobd
from jobd.api import admin_routes as admin_api
from jobd.cli.daemon import checkup
from jobd.cli.daemon.checkup import examine
from jobd.client import AdminClient
from jobd.model import responses
from tests.support.calls import DELIVERY, WEBHOOK
from tests.support.http_harness import FakeActor, HttpHarness


async def _findings(directory: Path, prepare: Callable[[HttpHarness], None]) -> dict[str, str]:
    """Return the findings of `jobd doctor --running` for prepared responses."""
    stats = responses.StatsView(9, {}, 2, 0, 0.0, None, 0, 1_772_366_400_000)
    async with HttpHarness(
        admin_api.ROUTES, directory, admin=True, actor=FakeActor(lambda _: responses.Response(stats))
    ) as harness:
        harness.fakes.deliveries_page = responses.DeliveryPage([], None)
        prepare(harness)
        with AdminClient(f"unix:{harness.path}", token="canary-token-0123456789", retry_for_s=0) as client:
            found = await asyncio.to_thread(examine, client)
    assert all(finding.what and finding.fix for finding in found)
    return {finding.where: finding.what for finding in found}


async def test_the_doctor_names_every_problem(tmp_path: Path) -> None:
    def prepare(harness: HttpHarness) -> None:
        harness.fakes.status = "degraded"

    found = await _findings(tmp_path, prepare)
    assert set(found) == {
        "database",
        "cache",
        "storage",
        "clock",
        "job bad-1",
        "validation",
        "jobs",
        "no_workers/mail/receipt",
    }
    assert found["database"].startswith("degraded: ")
    assert found["jobs"] == "2 stalled now"


async def test_the_doctor_finds_nothing_in_a_healthy_daemon(tmp_path: Path) -> None:
    def prepare(harness: HttpHarness) -> None:
        harness.fakes.accepted = True

    assert set(await _findings(tmp_path, prepare)) == {"job bad-1", "validation", "jobs", "no_workers/mail/receipt"}


async def test_the_doctor_names_failing_webhooks_and_dead_lettered_messages(tmp_path: Path) -> None:
    now = 1_700_000_000_000

    def failing(harness: HttpHarness) -> None:
        harness.fakes.hooks = [replace(WEBHOOK, failing_since=now - 60_000, waiting=3, last_error="500: no")]

    def lost(harness: HttpHarness, ended_at: int) -> None:
        dead_lettered = replace(DELIVERY, state="dead-lettered", ended_at=ended_at, error="401")
        harness.fakes.deliveries_page = responses.DeliveryPage([dead_lettered], None)

    finding = (await _findings(tmp_path, failing))["webhook q"]
    assert "3 are waiting" in finding
    assert finding.endswith("500: no")
    finding = (await _findings(tmp_path, lambda harness: lost(harness, now)))["webhook q"]
    assert "messages were dead-lettered" in finding
    assert finding.endswith("401")
    assert "webhook q" not in await _findings(tmp_path, lambda harness: lost(harness, now - 86_400_000))


MIB = 1 << 20


PASSED = {
    "disk": ("jobd_disk_free_bytes {}", 256 * MIB - 1, 256 * MIB, "256.0 MiB is free"),
    "write-ahead log": ("jobd_wal_bytes {}", 256 * MIB + 1, 256 * MIB, "grown to 256.0 MiB"),
    "event loop": ("jobd_loop_lag_seconds {}", 0.51, 0.5, "blocked for 0.5 s"),
    "mailbox": ("jobd_mailbox_limit_commands 100.0\njobd_mailbox_commands {}", 51, 50, "51% full"),
    "artifacts": ("jobd_artifact_sweep_behind_seconds {}", 901, 900, "15 min 1 s behind"),
    "queue film": ('jobd_queue_oldest_due_seconds{{queue="film"}} {}', 3601, 3600, "1 h"),
}


@pytest.mark.parametrize("where", PASSED)
def test_the_doctor_compares_figures_with_the_thresholds_of_the_rules(where: str) -> None:
    line, wrong, right, finding = PASSED[where]
    (found,) = checkup._metrics(f"{line.format(wrong)}\n")
    assert (found.where, finding in found.what) == (where, True), found
    assert list(checkup._metrics(f"{line.format(right)}\n")) == []
    assert list(checkup._metrics("jobd_stalled_jobs 0\n")) == []


def test_the_doctor_names_some_of_many_queues_and_none_that_is_paused() -> None:
    lines = [f'jobd_queue_oldest_due_seconds{{queue="q-{number}"}} {4_000 + number}' for number in range(13)]
    lines.append('jobd_queue_paused{queue="q-12"} 1')
    found = list(checkup._metrics("\n".join(lines) + "\n"))
    assert [each.where for each in found] == [*(f"queue q-{number}" for number in range(11, 1, -1)), "queues"]
    assert "of 2 more queues" in found[-1].what


def test_the_thresholds_of_the_doctor_are_those_of_the_rules() -> None:
    text = (Path(jobd.__file__).parent / "monitoring" / "jobd.rules.yml").read_text("utf-8")
    rules = {rule["alert"]: rule["expr"] for group in msgspec.yaml.decode(text)["groups"] for rule in group["rules"]}
    for each in checkup.THRESHOLDS:
        assert each.metric in rules[each.rule]
        sign, bound = rules[each.rule].rpartition("<" if each.is_least else ">")[1:]
        assert sign
        assert math.prod(float(factor) for factor in bound.split("*")) == each.bound, each.rule
