"""Tables about jobs."""

from __future__ import annotations

import re

import msgspec
import pytest
from msgspec.structs import replace

from jobd.cli import tables
from jobd.client import JobView
from jobd.model.events import EventView, StreamedEvent
from jobd.model.problems import Cure
from jobd.model.responses import KindWhy, QueueWhyView, WhyView
from tests.support.calls import PROBLEM
from tests.support.client_harness import JOB


def test_an_event_is_a_line() -> None:
    event = StreamedEvent(7, 1_000, "granted", "queued", "processing", "worker:w", None, {"ttl_ms": 60_000}, "a", "q")
    time, *rest = tables.event_line(event).split("  ")
    assert time.startswith("1970-01-01 ")
    assert rest == ["7", "granted", "a (q)", "queued → processing", "worker:w", "ttl_ms=1 min"]
    failed = StreamedEvent(7, 1_000, "failed", None, None, "admin", "one\ntwo", {"error_code": "E"}, "a", "q")
    assert tables.event_line(failed).split("  ")[1:] == ["7", "failed", "a (q)", "admin", "one …", "error_code=E"]
    paused = StreamedEvent(8, 1_000, "queue_paused", None, None, "admin", "why", {}, None, "q")
    assert tables.event_line(paused).split("  ")[1:] == ["8", "queue_paused", "queue q", "admin", "why"]


def test_why_names_what_blocks_a_job_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    tables.why(WhyView("queued", "It is paused.", None, "queue_paused", []))
    tables.why(WhyView("queued", "It waits.", None, "no worker", []))
    assert capsys.readouterr().out.splitlines()[1::2] == ["blocked by: the pause of its queue", "blocked by: no worker"]


def test_why_begins_with_the_problem_and_its_cures(capsys: pytest.CaptureFixture[str]) -> None:
    problem = replace(PROBLEM, cure=[*PROBLEM.cure, Cure("See the page", None)])
    view = WhyView("queued", "It waits.", None, None, [], problem=problem)
    tables.queue_why(QueueWhyView("mail", "Due.", [KindWhy("receipt", 1_962, "a", view)], [PROBLEM]))
    assert capsys.readouterr().out.splitlines() == [
        "problem: mail / receipt: 962 jobs are due, and no worker takes them.",
        "cure: Start a worker: jobctl run --queue mail -- CMD",
        "Due.",
        "",
        "kind receipt: 1,962 due, the oldest is a",
        "problem: mail / receipt: 962 jobs are due, and no worker takes them.",
        "cure: Start a worker: jobctl run --queue mail -- CMD",
        "cure: See the page",
        "queued: It waits.",
    ]


def test_why_shows_the_first_line_of_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    tables.why(WhyView("failed", "It failed: boom\nTraceback", None, None, ["Retry it"]))
    assert capsys.readouterr().out == "failed: It failed: boom …\ndo: Retry it\n"


def test_a_finished_job_shows_its_last_worker_and_its_deletion(capsys: pytest.CaptureFixture[str]) -> None:
    view = msgspec.json.decode(msgspec.json.encode({**JOB, "expires_at": 2_000}), type=JobView)
    tables.job(view)
    text = capsys.readouterr().out
    assert re.search(r"^expires +1970-", text, re.M)
    assert "last worker" not in text
    granted = [
        EventView(1, 1_000, "granted", "queued", "processing", "worker:a:1", None, {}),
        EventView(2, 1_000, "granted", "queued", "processing", "worker:b:2", None, {}),
        EventView(3, 1_000, "completed", "processing", "completed", "admin", None, {}),
    ]
    tables.job(msgspec.structs.replace(view, status="completed", started_at=1_000, finished_at=1_500), granted)
    text = capsys.readouterr().out
    assert re.search(r"^kept until +1970-", text, re.M)
    assert re.search(r"^last worker +b:2$", text, re.M)
