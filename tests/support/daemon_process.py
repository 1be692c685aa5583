"""A real `jobd serve` process in its own directory, for tests that start, call, kill and restart it."""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Self

TOKEN = "token-for-tests-0123456789abcdef"
READY = b"event=ready"
TIMEOUT_S = 180.0  # the timeout of a test

_LIBC = ctypes.CDLL(None)  # loaded here, because a child between fork and exec should do little
_PR_SET_PDEATHSIG = 1


def die_with_us() -> None:
    """Make Linux kill the child when its parent thread ends, even if pytest is killed. Used as `preexec_fn`."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class UnixConnection(http.client.HTTPConnection):
    """An HTTP connection over a Unix socket."""

    def __init__(self, path: str, timeout: float = 30) -> None:
        super().__init__("jobd", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class DaemonResponse:
    """A response: status, headers and decoded body."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        text = response.read()
        is_json = (response.headers.get("Content-Type") or "").startswith("application/json")
        self.body: Any = json.loads(text) if is_json else text

    @property
    def data(self) -> Any:
        assert self.body["success"] is True, self.body
        return self.body["data"]

    @property
    def error(self) -> str:
        assert self.body["success"] is False, self.body
        return str(self.body["error"])


def call(
    connection: http.client.HTTPConnection, method: str, path: str, body: Any = None, **headers: str
) -> DaemonResponse:
    text = None if body is None else json.dumps(body)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None:
        given.setdefault("Content-Type", "application/json")
    connection.request(method, path, text, given)
    return DaemonResponse(connection.getresponse())


class ApiCalls:
    """Calls over the two Unix sockets of a daemon."""

    socket: str
    admin_socket: str

    def worker(self) -> UnixConnection:
        return UnixConnection(self.socket)

    def post(self, path: str, body: Any = None, **headers: str) -> DaemonResponse:
        with closing(self.worker()) as connection:
            return call(connection, "POST", path, {} if body is None else body, **headers)

    def get(self, path: str) -> DaemonResponse:
        with closing(self.worker()) as connection:
            return call(connection, "GET", path)

    def admin(self, method: str, path: str, body: Any = None, **headers: str) -> DaemonResponse:
        """Call a path below /admin/job-management, or an absolute path."""
        headers.setdefault("Authorization", f"Bearer {TOKEN}")
        path = path if path.startswith("/") else f"/admin/job-management/{path}"
        with closing(UnixConnection(self.admin_socket)) as connection:
            return call(connection, method, path, body, **headers)


class DaemonProcess(ApiCalls):
    """A daemon process. Its context waits until the daemon is ready, and kills it at the end if it still runs.

    `variant` is a function of daemon_variants, or empty. `prefix` is a program that starts the daemon, such as strace.
    """

    def __init__(self, directory: Path, config: str = "", *, variant: str = "", **environ: str) -> None:
        self.directory = directory
        self.socket = str(directory / "worker.sock")
        self.admin_socket = str(directory / "admin.sock")
        self.store = directory / "jobd.db"
        self.config = directory / "config.toml"
        self.config.write_text(config)
        self.environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("JOBD_")},
            "ADMIN_TOKEN": TOKEN,
            "JOBD_WORKER_SOCKET": self.socket,
            "JOBD_ADMIN_LISTEN": f"unix:{self.admin_socket}",
            "JOBD_STORE_PATH": str(self.store),
            "JOBD_LOG_FORMAT": "logfmt",
            **environ,
        }
        self.prefix: list[str] = []
        self.variant = variant
        self._process: subprocess.Popen[bytes] | None = None
        self._has_output = threading.Condition()
        self._lines: list[bytes] = []
        self._next_index = 0
        self._log_reader: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_running:
            self.process.kill()
            self.process.wait()
        self._join_reader()

    @classmethod
    @contextmanager
    def not_started(
        cls, directory: Path, config: str = "", *, variant: str = "", **environ: str
    ) -> Iterator[DaemonProcess]:
        """Prepare the daemon without starting it."""
        with ExitStack() as stack:
            yield stack.push(cls(directory, config, variant=variant, **environ))

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process that was started last."""
        assert self._process is not None, "the daemon was not started"
        return self._process

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """The code of the process that was started last, or None while it runs and before."""
        return self._process.poll() if self._process else None

    def spawn(self, stderr: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
        program = ["tests.support.daemon_variants", self.variant] if self.variant else ["jobd"]
        command = [*self.prefix, sys.executable, "-m", *program, "serve", "--config", str(self.config)]
        return subprocess.Popen(command, env=self.environ, stderr=stderr, preexec_fn=die_with_us)

    def start(self) -> None:
        """Start the daemon and wait until it logs that it is ready. Fail with its log if it ends instead."""
        self.launch()
        self.wait_for_log(READY)

    def launch(self, stderr: int = subprocess.PIPE) -> None:
        """Start the process without waiting. Its log is read only from a pipe."""
        self._process = self.spawn(stderr)
        if stderr == subprocess.PIPE:
            self._log_reader = threading.Thread(target=self._read_log, args=(self._process,))
            self._log_reader.start()

    def failed_start(self) -> tuple[int, str]:
        """Start a daemon that must fail. Return its exit code and output."""
        with ExitStack() as stack:
            stack.push(self)
            self.launch()
            code = self.process.wait(TIMEOUT_S)
        return code, self.log.decode()

    def gets_ready(self) -> bool:
        """Wait until the daemon is ready. Return False if it ends instead."""
        return self._next_line(READY) is not None

    def _read_log(self, process: subprocess.Popen[bytes]) -> None:
        """Read the output of the daemon continuously, because a full pipe would block it."""
        assert process.stderr is not None
        for line in process.stderr:
            with self._has_output:
                self._lines.append(line)
                self._has_output.notify_all()
        process.stderr.close()
        with self._has_output:
            self._log_reader = None
            self._has_output.notify_all()

    def _join_reader(self) -> None:
        if (listener := self._log_reader) is not None:
            listener.join()

    @property
    def log(self) -> bytes:
        """The output so far; after `stop` or `kill` all of it."""
        with self._has_output:
            return b"".join(self._lines)

    def wait_for_log(self, text: bytes) -> str:
        """Wait for the next line with `text` after the one that the last call returned."""
        line = self._next_line(text)
        assert line is not None, f"the daemon has ended:\n{self.log.decode()}"
        return line

    def _next_line(self, text: bytes) -> str | None:
        """Do as `wait_for_log`, but return None if the daemon ends without such a line."""
        with self._has_output:
            while True:
                while self._next_index < len(self._lines):
                    line = self._lines[self._next_index]
                    self._next_index += 1
                    if text in line:
                        return line.decode()
                if self._log_reader is None:
                    return None
                assert self._has_output.wait(TIMEOUT_S), f"no such log line: {text!r}"

    def reload(self, config: str | None = None) -> str:
        """Reload the configuration, or this one. Return the line of the log that says what was reloaded."""
        if config is not None:
            self.config.write_text(config)
        self.process.send_signal(signal.SIGHUP)
        return self.wait_for_log(b"event=reload")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._join_reader()

    def stop(self, signal_number: signal.Signals = signal.SIGTERM) -> int:
        """Send SIGTERM and return the exit code."""
        self.process.send_signal(signal_number)
        code = self.process.wait(TIMEOUT_S)
        self._join_reader()
        return code
