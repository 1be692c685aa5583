"""The demo's processes: a throw-away daemon and its workers, in a directory that vanishes with them.

Tells no story. Every process that is started here is ended here, by its own pid, on every way out.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import jobd
from jobd.cli import exit_codes
from jobd.client import AdminClient, JobClient, JobdError

LOCK_TTL_MS: Final = 3_000
_READY_S: Final = 20.0
_STOP_S: Final = 15.0
_SOCKET_PATH_BYTES: Final = 100  # a Unix socket's path may have 107
_PR_SET_PDEATHSIG: Final = 1

_CONFIG: Final = """\
[worker]
socket = "{folder}/worker.sock"
[admin]
listen = "unix:{folder}/admin.sock"
[store]
path = "{folder}/jobs.db"
[cleanup]
recover_every = "500ms"
"""


class Stage:
    """A daemon and workers in a temporary directory. Use it as a context manager: at its end nothing is left."""

    def __init__(self) -> None:
        self.folder = _folder()
        self.sources = self.folder / "in"
        self.results = self.folder / "out"
        self.workers: dict[str, subprocess.Popen[bytes]] = {}
        self.daemon: subprocess.Popen[bytes] | None = None
        self._token = secrets.token_urlsafe(32)

    def __enter__(self) -> Self:
        self.sources.mkdir()
        self.results.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for worker in self.workers.values():
                if kind is None:
                    worker.terminate()
                else:
                    worker.kill()  # nobody waits for what it was doing
            for worker in self.workers.values():
                _end(worker)
            if self.daemon is not None:
                _end(self.daemon)
        finally:
            _remove(self.folder)

    @property
    def log(self) -> Path:
        return self.folder / "jobd.log"

    def jobs(self) -> JobClient:
        return JobClient(f"unix:{self.folder}/worker.sock", retry_for_s=5.0)

    def admin(self) -> AdminClient:
        return AdminClient(f"unix:{self.folder}/admin.sock", token=self._token, retry_for_s=5.0)

    def start_daemon(self) -> int:
        """Start `jobd serve` and wait until it answers; gives its pid. Problem (1) where it does not come up."""
        config = self.folder / "config.toml"
        config.write_text(_CONFIG.format(folder=self.folder), encoding="utf-8")
        secret = {"ADMIN_TOKEN": self._token}
        self.daemon = _start(["jobd", "serve", "--config", str(config)], self.log, secret)
        until_s = time.monotonic() + _READY_S
        while True:
            try:
                with JobClient(f"unix:{self.folder}/worker.sock", retry_for_s=0) as client:
                    client.list_jobs(limit=1)
                return self.daemon.pid
            except JobdError as error:
                if self.daemon.poll() is not None or time.monotonic() > until_s:
                    raise exit_codes.Problem(
                        f"The daemon did not come up: {self.last_words() or error.message}"
                    ) from None
            time.sleep(0.05)

    def last_words(self) -> str:
        """The last line of the daemon's log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        return lines[-1] if lines else ""

    def start_worker(self, name: str) -> int:
        """Start a worker process; gives its pid."""
        command = ["jobd.cli.demo.worker", f"unix:{self.folder}/worker.sock", name, str(LOCK_TTL_MS)]
        command += [str(self.sources), str(self.results)]
        self.workers[name] = _start(command, self.folder / f"{name}.log", {})
        return self.workers[name].pid

    def kill_worker(self, name: str) -> int:
        """SIGKILL: no farewell, no clean-up. Gives what the system says about its end (-9)."""
        self.workers[name].send_signal(signal.SIGKILL)
        return self.workers[name].wait(_STOP_S)

    def stop_daemon(self) -> int:
        """SIGTERM, and its exit code."""
        assert self.daemon is not None
        return _end(self.daemon)


def _folder() -> Path:
    """A temporary directory of ours whose path is short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="jobd-demo-")).resolve()
    if len(os.fsencode(folder)) + len("/worker.sock") > _SOCKET_PATH_BYTES:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="jobd-demo-", dir="/tmp"))
    return folder


def _start(module_and_arguments: list[str], log: Path, secret: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start `python -m MODULE …` with this package, without the caller's settings, in a session of its own."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("JOBD_", "ADMIN_TOKEN"))}
    package = str(Path(jobd.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *module_and_arguments],
            env={**mine, "PYTHONPATH": path, "ENVIRONMENT": "development", **secret},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us; we end them
            preexec_fn=_die_with_parent,
        )


def _die_with_parent() -> None:
    """Linux ends the child when we are gone, even by SIGKILL. Elsewhere this is not there, and only that is lost."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes]) -> int:
    """SIGTERM, after a while SIGKILL; the exit code."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
