"""A daemon for benchmarks, with the default configuration, on a chosen disk; and loads against it."""

from __future__ import annotations

import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from tests import ROOT
from tests.benchmarks.work import LoadRequest

READY_S: Final = 120.0
STOP_S: Final = 60.0


class BenchFailed(Exception):
    """The daemon or the load failed; the message is the end of its output."""


class BenchDaemon:
    """A daemon in a new directory in `directory` (None: the default). It runs while the context is open.

    `settings` are additional environment variables of the daemon, `command` the words before its own.
    """

    def __init__(
        self, directory: Path | None, settings: Mapping[str, str] | None = None, command: Sequence[str] = ()
    ) -> None:
        self._settings = dict(settings or {})
        self._command = command
        self._directory = Path(tempfile.mkdtemp(prefix="jobd-bench-", dir=directory))
        self._sockets = tempfile.mkdtemp(prefix="jobd-bench-")  # the path of a socket can have 107 bytes
        self._token = secrets.token_urlsafe(32)
        self._process: subprocess.Popen[bytes] | None = None
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(self._socket("notify"))
        self._log = (self._directory / "log").open("w+b")
        (self._directory / "config.toml").touch()  # hides the configuration of this machine

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._log.close()
        self._notify.close()
        shutil.rmtree(self._directory)
        shutil.rmtree(self._sockets)

    # -- the daemon ----------------------------------------------------------------------------------------------------

    def start(self) -> float:
        """Start the daemon and return the seconds until it is ready."""
        own = self._settings | {
            "ADMIN_TOKEN": self._token,
            "JOBD_CONFIG": self._path("config.toml"),
            "JOBD_WORKER_SOCKET": self._socket("worker"),
            "JOBD_ADMIN_LISTEN": f"unix:{self._socket('admin')}",
            "JOBD_STORE_PATH": self._path("jobd.db"),
            "JOBD_LOG_LEVEL": "warning",
            "NOTIFY_SOCKET": self._socket("notify"),
        }
        others = {name: value for name, value in os.environ.items() if not name.startswith("JOBD_")}
        began = time.perf_counter()
        words = [*self._command, sys.executable, "-m", "jobd", "serve"]
        self._process = subprocess.Popen(words, env=others | own, stderr=self._log)
        if not self._wait_ready(self._process.pid):
            raise BenchFailed(f"the daemon did not start: {self._log_tail()}")
        return time.perf_counter() - began

    def stop(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        if self._process.wait(STOP_S) != 0:
            raise BenchFailed(f"the daemon ended with {self._process.returncode}: {self._log_tail()}")

    def _wait_ready(self, pid: int) -> bool:
        """Wait for READY=1 as systemd does; false if the daemon exits or takes too long."""
        ended = os.pidfd_open(pid)
        try:
            while self._notify.fileno() in select.select([self._notify.fileno(), ended], [], [], READY_S)[0]:
                if b"READY=1" in self._notify.recv(4096):
                    return True
            return False
        finally:
            os.close(ended)

    @property
    def pid(self) -> int:
        """Return the pid of the daemon."""
        assert self._process is not None
        return self._process.pid

    def memory(self) -> tuple[int, int]:
        """Return the bytes that the daemon allocated, and its resident bytes: these include mapped files."""
        status = Path(f"/proc/{self.pid}/status").read_text("ascii")
        allocated, resident = (int(status.partition(name)[2].split()[0]) * 1024 for name in ("RssAnon:", "VmRSS:"))
        return allocated, resident

    def _cpu_s(self) -> float:
        assert self._process is not None
        if self._process.poll() is not None:
            raise BenchFailed(f"the daemon ended with {self._process.returncode}: {self._log_tail()}")
        # The CPU clock of clock_getcpuclockid(3): /proc counts in ticks of 10 ms, and a short load takes less.
        return time.clock_gettime(~self._process.pid << 3 | 2)

    # -- load ----------------------------------------------------------------------------------------------------------

    def load(self, kind: str, **asked: Any) -> dict[str, Any]:
        """Run a load of load.py in its own process. `daemon_cores` and `load_cores` are the CPU time of both sides."""
        request = LoadRequest(kind, self._socket("worker"), self._socket("admin"), self._token, **asked)
        request.store = self._path("jobd.db")
        words = [sys.executable, "-m", "tests.benchmarks.load", msgspec.json.encode(request).decode()]
        began, cpu_s = time.perf_counter(), self._cpu_s()
        run = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
        if run.returncode:
            raise BenchFailed(f"the load {kind} ended with {run.returncode}: {run.stderr[-2000:]}{self._log_tail()}")
        figures: dict[str, Any] = msgspec.json.decode(run.stdout)
        figures["daemon_cores"] = (self._cpu_s() - cpu_s) / (time.perf_counter() - began)
        return figures

    def _socket(self, name: str) -> str:
        return os.path.join(self._sockets, f"{name}.sock")

    def _path(self, name: str) -> str:
        return str(self._directory / name)

    def _log_tail(self) -> str:
        self._log.seek(0)
        return self._log.read()[-2000:].decode("utf-8", "replace")
