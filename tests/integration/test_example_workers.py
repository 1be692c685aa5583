"""The example workers in other languages: each is killed at 60 %, and its next attempt continues there."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from jobd.client import JobClient
from tests import ROOT
from tests.conftest import tool_missing
from tests.support.cli_harness import node_program
from tests.support.daemon_process import die_with_us
from tests.support.forked_process import ForkedDaemon
from tests.support.scripted_server import ReceivedRequest, ScriptedServer, serving

EXAMPLES = ROOT / "docs/examples"


def command_of(name: str, directory: Path) -> list[str]:
    """Return the command of an example. A Go program is compiled first."""
    if name == "worker.mts":
        return [str(node_program()), str(EXAMPLES / name)]
    if shutil.which("go") is None:
        tool_missing("go", "golang-go")
    program = str(directory / "worker")
    environ = {**os.environ, "GOTOOLCHAIN": "local", "GOFLAGS": ""}
    subprocess.run(["go", "build", "-o", program, str(EXAMPLES / name)], env=environ, check=True)
    return [program]


@pytest.mark.slow
@pytest.mark.timeout(600)  # the first build compiles the standard library
@pytest.mark.parametrize("name", ["worker.go", "worker.mts"])
def test_a_worker_that_is_killed_continues_at_its_checkpoint(name: str, tmp_path: Path) -> None:
    command = command_of(name, tmp_path)
    path = tmp_path / "lossy.sock"
    with ForkedDaemon(tmp_path) as daemon, JobClient(f"unix:{daemon.socket}") as client:
        job = client.create_job([1, 2, 3, 4, 5.5], headers={"trace": "t-1"})
        server = ScriptedServer(behind=daemon.socket)
        environ: dict[str, Any] = {**os.environ, "JOBD_SOCKET": str(path), "ONCE": "1"}
        for variable in ("JOBD_URL", "JOBD_WORKER_TOKEN_FILE"):
            environ.pop(variable, None)
        with serving(server, path), subprocess.Popen(command, env=environ, preexec_fn=die_with_us) as first:

            def is_killed(received: ReceivedRequest) -> bool:
                if received.path.endswith("/progress") and received.json["progress"] == 60:
                    first.kill()
                    return True
                return False

            server.loses = is_killed
            assert first.wait(60) == -9
            [at_60] = server.lost
        assert client.get_job(job.id).checkpoint_value == {"done": 3, "sum": 6}
        client.release_job(job.id, lock_id=at_60.json["lock_id"])  # as if the lock had expired

        server = ScriptedServer(behind=daemon.socket)
        with serving(server, path):
            second = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
        assert (second.returncode, second.stdout) == (0, f"{job.id} completed t-1\n"), second.stderr
        reported = [each.json["progress"] for each in server.received if each.path.endswith("/progress")]
        assert reported == [80, 100]
        job = client.get_job(job.id)
        assert (job.status, job.metadata_value) == ("completed", {"sum": 15.5, "count": 5})
        assert daemon.stop() == 0
