"""The example programs of tasks: each runs with a worker of its tasks, and prints what it says here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests import ROOT
from tests.support.daemon_process import DaemonProcess, die_with_us

EXAMPLES: Final = ROOT / "docs/examples"
PROGRAMS: Final = [EXAMPLES / "celery_port.py", *sorted((EXAMPLES / "tasks").glob("*.py"))]
SHOWN: Final = {
    "celery_port": "[1, 1]\n",
    "images": "a.png.webp completed\n812 False\n",
    "mail": "queued True\nTrue\n8\nJobFailed\nJobCancelled\n",
    "video": "[0, 2, 4, 6] 10\n",
    "billing": "22.10\n",
    "signup": "A@B.C 2\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_of_tasks_runs_with_its_worker(program: Path, daemon: DaemonProcess) -> None:
    environ = {**os.environ, "JOBD_SOCKET": daemon.socket, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jobd.cli.ctl.main", "worker", f"{program.stem}:app"]
    with subprocess.Popen(
        command, cwd=program.parent, env=environ, stderr=subprocess.PIPE, preexec_fn=die_with_us
    ) as worker:
        caller = [sys.executable, "-W", "error", str(program)]
        done = subprocess.run(caller, cwd=program.parent, env=environ, capture_output=True, text=True, timeout=150)
        worker.terminate()
        assert (done.stdout, done.stderr) == (SHOWN[program.stem], "")
    assert worker.returncode == 0
