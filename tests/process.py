"""A real `jobd serve` in a directory of its own, for tests that need the process: started, asked, killed, started."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

TOKEN = "token-for-tests-0123456789abcdef"
READY = b"event=ready"


class OverUnix(http.client.HTTPConnection):
    """An HTTP connection over a Unix socket."""

    def __init__(self, path: str, timeout: float = 30) -> None:
        super().__init__("jobd", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Reply:
    """An answer: its status, headers and the whole body, decoded."""

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


def call(connection: http.client.HTTPConnection, method: str, path: str, body: Any = None, **headers: str) -> Reply:
    text = None if body is None else json.dumps(body)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None:
        given.setdefault("Content-Type", "application/json")
    connection.request(method, path, text, given)
    return Reply(connection.getresponse())


class Daemon:
    """`with Daemon(tmp_path) as daemon`: ready on entry, stopped by its own pid on exit."""

    def __init__(self, directory: Path, config: str = "", **environ: str) -> None:
        self.directory = directory
        self.socket = str(directory / "worker.sock")
        self.admin_socket = str(directory / "admin.sock")
        self.store = directory / "jobd.db"
        self.config = directory / "config.toml"
        self.config.write_text(config)
        self._environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("JOBD_")},
            "ADMIN_TOKEN": TOKEN,
            "JOBD_WORKER_SOCKET": self.socket,
            "JOBD_ADMIN_LISTEN": f"unix:{self.admin_socket}",
            "JOBD_STORE_PATH": str(self.store),
            "JOBD_LOG_FORMAT": "logfmt",
            **environ,
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.log = b""

    def __enter__(self) -> Daemon:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process is not None and self.process.stderr is not None:
            self.process.stderr.close()

    def spawn(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "jobd", "serve", "--config", str(self.config)]
        return subprocess.Popen(command, env=self._environ, stderr=subprocess.PIPE)

    def start(self) -> None:
        """Returns when the log says that the daemon is ready; whoever waits sees its log if it ends instead."""
        self.process = self.spawn()
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line
            if READY in line:
                return
        raise AssertionError(f"the daemon ended with {self.process.wait()}:\n{self.log.decode()}")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self._drain()

    def stop(self, signal_number: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to stop; gives the exit code."""
        assert self.process is not None
        self.process.send_signal(signal_number)
        self._drain()
        return self.process.wait(30)

    def _drain(self) -> None:
        assert self.process is not None
        assert self.process.stderr is not None
        self.log += self.process.stderr.read()
        self.process.stderr.close()

    def worker(self) -> OverUnix:
        return OverUnix(self.socket)

    @contextmanager
    def admin_connection(self) -> Iterator[OverUnix]:
        with closing(OverUnix(self.admin_socket)) as connection:
            yield connection

    def post(self, path: str, body: Any = None, **headers: str) -> Reply:
        with closing(self.worker()) as connection:
            return call(connection, "POST", path, {} if body is None else body, **headers)

    def get(self, path: str) -> Reply:
        with closing(self.worker()) as connection:
            return call(connection, "GET", path)

    def admin(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """A path of /admin/job-management, or one that starts with a slash as it is."""
        headers.setdefault("Authorization", f"Bearer {TOKEN}")
        path = path if path.startswith("/") else f"/admin/job-management/{path}"
        with closing(OverUnix(self.admin_socket)) as connection:
            return call(connection, method, path, body, **headers)
