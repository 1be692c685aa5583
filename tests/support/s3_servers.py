"""Real S3 servers on loopback: Debian's radosgw on its own file, and moto for conditional deletions.

Each is a process of the test run, with one user whose keys are below.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.conftest import tool_missing
from tests.support.daemon_process import die_with_us, free_port

KEY: Final = "key-of-tests"
SECRET: Final = "secret-of-tests-0123456789abcdef"
END_S: Final = 20  # radosgw-admin takes 0.05 s to exit; 1 of 25 runs on a busy machine hangs


@contextlib.contextmanager
def radosgw(directory: Path) -> Iterator[str]:
    """Run Debian's object gateway on its dbstore, an SQLite file. Yield the endpoint."""
    for program in ("radosgw", "radosgw-admin"):
        if shutil.which(program) is None:
            tool_missing(program, "radosgw")
    port = free_port()
    (directory / "ceph.conf").write_text("[global]\n")
    options = [
        "--no-mon-config",
        f"--conf={directory}/ceph.conf",
        "--rgw-backend-store=dbstore",
        "--rgw-config-store=dbstore",
        f"--dbstore-db-dir={directory}",
        f"--dbstore-config-uri=file://{directory}/config.db",
        f"--rgw-data={directory}",
        f"--run-dir={directory}",
        "--admin-socket=",
    ]
    user = ["user", "create", "--uid=tests", "--display-name=tests", f"--access-key={KEY}", f"--secret-key={SECRET}"]
    _create_user(["radosgw-admin", *options, *user])
    serving = [
        "--name=client.rgw",
        "-f",
        f"--log-file={directory}/log",
        f"--rgw-frontends=beast endpoint=127.0.0.1:{port}",
    ]
    with _running(["radosgw", *options, *serving], directory, port):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def moto(directory: Path) -> Iterator[str]:
    """Run moto, which supports conditional deletions. Yield the endpoint."""
    port = free_port()
    with _running([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], directory, port):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def _running(command: list[str], directory: Path, port: int) -> Iterator[None]:
    with (directory / "output").open("wb") as output:
        process = subprocess.Popen(command, cwd=directory, stdout=output, stderr=output, preexec_fn=die_with_us)
        try:
            while not _accepts(port):
                assert process.poll() is None, (directory / "output").read_text()
                time.sleep(0.05)
            yield
        finally:
            process.terminate()
            _wait_or_kill(process)


def _create_user(command: list[str]) -> None:
    """Run radosgw-admin until it exits or prints the user, because it may hang at exit."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=die_with_us)
    try:
        output, errors = process.communicate(timeout=END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
    assert b'"user_id": "tests"' in output, errors.decode()


def _wait_or_kill(process: subprocess.Popen[bytes]) -> None:
    """Wait for a terminated process, and kill it if it hangs."""
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
