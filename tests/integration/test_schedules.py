"""Schedules of a real daemon: over kills, and through the commands of operators."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli_harness import CliDaemon, Jobctl
from tests.support.forked_process import ForkedDaemon
from tests.support.polling import poll_until

pytestmark = pytest.mark.slow

FILE = """
[[schedules]]
id = "night"
cron = "0 3 * * mon-fri"
timezone = "Europe/Berlin"
queue = "reports"
payload = {text = "ü\\u007f", days = [1, 2]}

[[schedules]]
id = "poll"
every_ms = 3600000
overlap = "allow"
payload_json = '{"since": null}'
"""


def test_each_second_fires_once_over_kills(tmp_path: Path) -> None:
    body = {"every_ms": 1_000, "overlap": "allow", "job": {"queue": "ticks"}, "source": "app:test"}
    with ForkedDaemon(tmp_path) as daemon:
        assert daemon.admin("PUT", "/admin/job-management/schedules/tick", {**body, "source": None}).status == 201

        def fired() -> list[dict[str, Any]]:
            return list(reversed(daemon.get("/v1/jobs?queue=ticks&limit=200").data["jobs"]))

        for count in (2, 4, 6):
            poll_until(lambda: len(fired()) >= count)  # noqa: B023
            if count < 6:
                daemon.kill()
                daemon.start()
        jobs, view = fired(), daemon.admin("GET", "/admin/job-management/schedules/tick").data
        times = [job["scheduled_at"] for job in jobs]
        assert times == sorted(set(times))
        gaps = sum((later - earlier) // 1_000 - 1 for earlier, later in pairwise(times))
        assert gaps == view["missed"], "a time that did not fire is counted"
        assert all(job["id"].startswith("tick:2") for job in jobs)


def test_a_file_of_schedules(jobctl: Jobctl, tmp_path: Path, running: CliDaemon) -> None:
    file = tmp_path / "jobs.toml"
    file.write_text(FILE)
    assert jobctl.ok("settings", "apply", str(file), "--dry-run") == "night: new\npoll: new\n"
    assert jobctl.ok("settings", "apply", str(file)) == "night: new\npoll: new\n"
    assert jobctl.ok("settings", "apply", str(file), "--dry-run") == "night: unchanged\npoll: unchanged\n"
    exported = jobctl.ok("settings", "export")
    file.write_text(exported.replace("mon-fri", "mon"))
    assert jobctl.ok("settings", "apply", str(file), "--dry-run") == "night: changed\npoll: unchanged\n"
    assert jobctl.ok("settings", "apply", str(file)) == "night: changed\npoll: unchanged\n"
    shown = jobctl.ok("schedule", "night")
    assert "At 03:00 on Monday, Europe/Berlin" in shown
    job = json.loads(jobctl.ok("schedule", "run", "poll", "--json"))
    assert (job["payload"], job["schedule_id"]) == ({"since": None}, "poll")
    assert "paused" in jobctl.ok("schedule", "pause", "poll", "--reason", "month end")
    assert "month end" in jobctl.ok("schedule", "poll")
    assert "poll" in jobctl.ok("schedules")
    jobctl.ok("schedule", "resume", "poll")
    file.write_text("")
    assert jobctl.ok("settings", "apply", str(file), "--prune") == "night: deleted\npoll: deleted\n"
    file.write_text("[[queues]]\n")
    jobctl.rejects(78, "[[schedules]]", "settings", "apply", str(file))
    invalid = (
        ('cron = "0 0 30-31 2 *"', 4, "has the day-of-month 30-31: use 1-31, L or LW"),
        ("every_ms = 5", 4, "every_ms"),
        ('every_ms = 60000\npayload_json = "{"', 78, "payload_json is no JSON text: Expecting property name"),
    )
    for line, status, words in invalid:
        file.write_text(f'[[schedules]]\nid = "bad"\n{line}\n')
        code, message = jobctl.rejected("settings", "apply", str(file))[:2]
        assert (code, f"{file}: schedule bad: " in message, words in message) == (status, True, True), message
    assert jobctl.rejected("schedule", "stop", "poll")[0] == 2
    assert jobctl.rejected("schedule", "rm", "poll")[0] == 4


@pytest.mark.usefixtures("running")
def test_the_schedules_of_an_app(jobctl: Jobctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ops_app.py").write_text(
        "from jobd import App\napp = App('ops')\n"
        "@app.schedule('0 3 * * *')\n@app.task\ndef tidy(days: int = 30) -> None: ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert jobctl.ok("settings", "apply", "ops_app:app") == "tidy: new\n"
    assert jobctl.ok("settings", "apply", "ops_app:app", "--dry-run", "--prune") == "tidy: unchanged\n"
    jobctl.rejects(2, "MODULE:APP", "settings", "apply", "nowhere")
    jobctl.ok("schedule", "rm", "tidy")
