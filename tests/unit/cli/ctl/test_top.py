"""The rates and frames of `jobctl top`."""

from __future__ import annotations

import io
from typing import Any

import pytest
from msgspec.structs import replace
from rich.console import Console

from jobd.cli import terminal as show
from jobd.cli.ctl.top import WINDOW_S, HeldJob, Sampler, TopFrame, WorkerRow, render
from jobd.model.responses import QueueView, StatsView
from tests.support.calls import PROBLEM

STATS = StatsView(
    total_jobs=3,
    by_status={"queued": 1, "processing": 1, "completed": 0, "failed": 1, "cancelled": 0},
    stuck_jobs=0,
    locked_jobs=1,
    average_processing_time=1.5,
    oldest_processing_job=None,
    stuck_jobs_recovered=0,
    timestamp=1_772_366_400_000,
    cleanup_running=False,
    time_since_last_cleanup=None,
)


def test_rates_cover_a_window() -> None:
    now = [100.0]
    samples = Sampler(lambda: now[0])

    def rates(granted: int) -> tuple[float, float]:
        per_second, over_s = samples.rates(f'x 1\njobd_events_total{{type="granted"}} {granted}.0\n')
        assert set(per_second) == {"created", "granted", "completed", "failed", "retried", "stalled"}
        return per_second["granted"], over_s

    assert rates(100) == (0.0, 0.0)
    now[0] += 2
    assert rates(104) == (2.0, 2.0)
    now[0] += WINDOW_S - 2
    assert rates(120) == (2.0, 10.0)
    now[0] += 5
    assert rates(120) == (1.2, 13.0)  # the window starts at the last sample before it
    now[0] += 20
    assert rates(10) == (0.0, 20.0)  # the daemon was killed and continues from an earlier count


def drawn(frame: TopFrame, *, width: int, height: int, note: str = "") -> list[str]:
    out = Console(file=io.StringIO(), width=width, force_terminal=False)
    with out.capture() as held:
        out.print(render(frame, note, height, width))
    return [line.rstrip() for line in held.get().splitlines()]


def a_frame(queues: int = 3, **fields: Any) -> TopFrame:
    made: dict[str, Any] = {
        "stats": STATS,
        "per_second": {"created": 1.5, "granted": 0.0},
        "over_s": 10.0,
        "queues": [QueueView(f"queue-{n}", n == 0, n, 1, 0, 0, 0, None) for n in range(queues)],
        "workers": [
            WorkerRow("w\x1b[2J", "busy", 1, "mail (kinds: \x1b)", None, 2, [HeldJob("a", 42.5), HeldJob("b", 0)])
        ],
        "problems": [],
    }
    return TopFrame(**{**made, **fields})


def test_a_frame_shows_jobs_queues_and_workers() -> None:
    text = "\n".join(drawn(a_frame(problems=[PROBLEM]), width=100, height=40, note="The daemon is away."))
    for part in (
        "queued 1  processing 1  completed 0  failed 1  cancelled 0", "stalled 0  locked 1  average 1.5 s",
        "per second (over 10 s): created 1.5  granted 0", "The daemon is away.", "CRITICAL mail / receipt",
        "962 jobs are due", "paused", "CANCELLED", "a 42.5 %  b 0 %", "w\\x1b[2J",
    ):  # fmt: skip
        assert part in text
    assert "\x1b" not in text


@pytest.mark.parametrize(("width", "height"), [(40, 10), (60, 20), (80, 24), (200, 60)])
def test_a_frame_fits_its_terminal(width: int, height: int) -> None:
    held = [HeldJob("x" * 200, 1.0)]
    workers = [
        WorkerRow(f"worker-with-a-long-name-{n}", "silent", 1, "q" * 200, "host " + "h" * 200, 1, held)
        for n in range(100)
    ]
    problems = [replace(PROBLEM, title="a title that is long " * 10)] * 2
    lines = drawn(a_frame(100, workers=workers, problems=problems), width=width, height=height)
    assert max(map(len, lines)) <= width
    assert len(lines) <= max(height, 18)
    assert any(line.startswith("and ") for line in lines)
    assert "QUEUE" in "".join(lines)


@pytest.mark.parametrize(("width", "columns"), [(40, 2), (60, 2), (80, 4), (200, 5)])
def test_figures_are_not_cut_beside_long_names(width: int, columns: int) -> None:
    long = "a-queue-with-quite-a-long-name-" + "x" * 20
    queues = [QueueView(name, False, 12_345, 67_890, 24_680, 13_579, 11_111, None) for name in ("q", f"{long}-high")]
    queues.append(replace(queues[0], name=f"{long}-low"))
    workers = [WorkerRow("worker-" + "y" * 60 + "-7", "busy", 1, None, None, 54_321, [HeldJob("z" * 200, 1.0)])]
    problems = [replace(PROBLEM, title="More jobs than expected are processing.")]
    rates = {"created": 1234.5, "granted": 1000.1, "completed": 999.9, "failed": 0.5, "retried": 12.3, "stalled": 0.0}
    frame = replace(a_frame(workers=workers, problems=problems, per_second=rates), queues=queues)
    lines = drawn(frame, width=width, height=40)
    text = "\n".join([*lines, ""])
    assert max(map(len, lines)) <= width
    for count in ["12345", "67890", "13579", "24680", "11111"][:columns]:
        assert text.count(f" {count}") == 3, count
    for part in ("54321", "cancelled 0", "average 1.5 s", *(f"{n} {rate:g}" for n, rate in rates.items())):
        assert part in text, part
    assert (text.count("-high "), text.count("-low ")) == (1, 1), "both ends of a name are seen"
    assert "CRITICAL mail / receipt" in text or width <= 60


def test_a_frame_in_a_pipe_is_complete_and_a_long_name_moves_only_its_line() -> None:
    queues = [QueueView(name, False, 1, 2, 3, 4, 5, None) for name in ("q" * 200, "short")]
    lines = drawn(replace(a_frame(), queues=queues), width=show.UNBOUNDED, height=100)
    (long,) = [line for line in lines if line.startswith("qq")]
    (short,) = [line for line in lines if line.startswith("short")]
    assert long.split()[0] == "q" * 200
    assert len(short) < 100
