"""The daemon process of the tests: it ends with them, and its output never blocks it."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.support.daemon_process import DaemonProcess, die_with_us

STARTER = """
import sys, time
from pathlib import Path
from tests.support.daemon_process import DaemonProcess
with DaemonProcess(Path(sys.argv[1])) as daemon:
    print(daemon.process.pid, flush=True)
    time.sleep(1000)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_daemon_dies_with_the_tests_that_were_killed(tmp_path: Path) -> None:
    root = ROOT
    command = [sys.executable, "-c", STARTER, str(tmp_path)]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, preexec_fn=die_with_us) as starter:
        assert starter.stdout is not None
        handle = os.pidfd_open(int(starter.stdout.readline()))
        try:
            assert not select.select([handle], [], [], 0)[0]  # it runs
            starter.kill()
            assert select.select([handle], [], [], 30)[0]
        finally:
            os.close(handle)


@pytest.mark.slow
def test_a_daemon_that_logs_more_than_a_pipe_holds_continues(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, "[log]\nlevel = 'debug'\n") as daemon:
        jobs = [{"id": f"job-{number}"} for number in range(1_000)]
        daemon.post("/v1/jobs/bulk", {"jobs": jobs})
        assert "job_id=job-999" in daemon.wait_for_log(b"event=created logger=jobd.facts job_id=job-999")
        assert daemon.stop() == 0
    assert daemon.log.count(b"event=created") == 1_000
    with pytest.raises(AssertionError, match="the daemon has ended"):
        daemon.wait_for_log(b"never said")
