"""`jobd dev` in a directory of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobd.client import JobClient
from tests.support.daemon_process import die_with_us, free_port


@contextmanager
def _running(directory: Path, **environ: str) -> Iterator[dict[str, str]]:
    """Run `jobd dev`. Yield the variables that a shell has after the printed lines."""
    command = [sys.executable, "-m", "jobd", "dev", "--port", str(free_port())]
    daemon = subprocess.Popen(
        command,
        cwd=directory,
        env=os.environ | {"JOBD_JOURNAL_URL": "postgresql://other"} | environ,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_us,
    )
    try:
        assert daemon.stdout is not None
        lines = "".join(daemon.stdout.readline() for _ in range(3))
        shown = subprocess.run(
            ["sh", "-c", f'{lines}\necho "$JOBD_SOCKET"; echo "$ADMIN_TOKEN"; echo "$JOBD_ADMIN_URL"'],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        found = dict(zip(("JOBD_SOCKET", "ADMIN_TOKEN", "JOBD_ADMIN_URL"), shown, strict=True))
        assert lines.splitlines()[-1] == f"# Dashboard: {found['JOBD_ADMIN_URL']}/sign-in#{found['ADMIN_TOKEN']}"
        yield found
        daemon.send_signal(signal.SIGINT)
        assert daemon.wait(30) == 0
    finally:
        daemon.kill()
        daemon.communicate()


def test_jobs_stay_in_the_directory(tmp_path: Path) -> None:
    with _running(tmp_path) as first, JobClient(first["JOBD_SOCKET"]) as client:
        client.create_job({"n": 1}, id="a")
    token = "a-token-of-this-shell-with-enough-characters"
    with _running(tmp_path, ADMIN_TOKEN=token) as second, JobClient(second["JOBD_SOCKET"]) as client:
        assert client.get_job("a").status == "queued"
        health = [sys.executable, "-m", "jobd.cli.ctl.main", "health"]
        assert subprocess.run(health, env=os.environ | second, stdout=subprocess.DEVNULL).returncode == 0
    assert len(first["ADMIN_TOKEN"]) > 24
    assert first["ADMIN_TOKEN"] != second["ADMIN_TOKEN"] == token
