from pathlib import Path

import pytest
from mypy import api

MIXED_UP = """\
from jobd.model.clocks import BootMs, BootS, MonotonicS
from jobd.model.commands import Moment
from jobd.model.job import Job, LockDeadlines

def mixed_up(job: Job, deadlines: LockDeadlines, at: Moment, boot_ms: BootMs, boot_s: BootS, now_s: MonotonicS) -> None:
    assert deadlines.is_live(at.lock_ms) and job.run_at <= at.now and at.wall(deadlines.expires) > 0
    deadlines.is_live(at.now)
    assert job.run_at <= at.lock_ms
    at.wall(boot_ms)
    assert deadlines.expires + 1_000 > job.run_at
    duration_ms: int = at.lock_ms - at.now
    assert now_s < boot_s
    now_s = at.now
"""


@pytest.mark.slow
def test_mypy_finds_a_mixed_up_clock(tmp_path: Path) -> None:
    (tmp_path / "mixed_up.py").write_text(MIXED_UP)
    found, _, _ = api.run(["--strict", "--cache-dir=/dev/null", "--no-error-summary", str(tmp_path / "mixed_up.py")])
    assert [int(line.split(":")[1]) for line in found.splitlines()] == [7, 8, 9, 10, 11, 12, 13]
