"""The programs of docs/examples/tasks: each runs with a worker of its tasks, and prints what it says here."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Final

import pytest

from tests import ROOT
from tests.support.daemon_process import DaemonProcess, die_with_us

TASKS: Final = ROOT / "docs/examples/tasks"
SHOWN: Final = {
    "images": "a.png.webp completed\n812 False\n",
    "mail": "queued True\nTrue\n8\nJobFailed\nJobCancelled\n",
    "video": "[0, 2, 4, 6] 10\n",
    "billing": "22.10\n",
    "signup": "A@B.C 2\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in TASKS.glob("*.py")))
def test_a_program_of_tasks_runs_with_its_worker(name: str, daemon: DaemonProcess) -> None:
    environ = {**os.environ, "JOBD_SOCKET": daemon.socket, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jobd.cli.ctl.main", "worker", f"{name}:app"]
    with subprocess.Popen(command, cwd=TASKS, env=environ, stderr=subprocess.PIPE, preexec_fn=die_with_us) as worker:
        program = [sys.executable, "-W", "error", f"{name}.py"]
        done = subprocess.run(program, cwd=TASKS, env=environ, capture_output=True, text=True, timeout=150)
        worker.terminate()
        assert (done.stdout, done.stderr) == (SHOWN[name], "")
    assert worker.returncode == 0
