"""The processes of the demo: a daemon and workers in a temporary directory, and the program that the workers run."""

from __future__ import annotations

import ctypes
import hashlib
import os
import secrets
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

import jobd
from jobd.cli import exit_codes, terminal
from jobd.client import Discard, HandlerContext, JobClient, JobdError, Worker

WIDTH: Final = 160
HEIGHT: Final = 120
SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_COLOURS: Final = 64  # also the number of iterations that decide whether a point is in the Mandelbrot set
_PALETTE: Final = b"".join(bytes((n * 4 % 256, n * 9 % 256, n * 17 % 256)) for n in range(_COLOURS - 1)) + bytes(3)
_READY_S: Final = 20.0
_STOP_S: Final = 15.0
_SOCKET_PATH_BYTES: Final = 100  # the path of a Unix socket can have 107
_PR_SET_PDEATHSIG: Final = 1

# A job of the live demo fails with one of these errors if its payload names it.
FAILURES: Final[dict[str, tuple[type[Exception], str]]] = {
    "address": (Discard, "550 5.1.1 No such mailbox: ada@example.com"),
    "smtp": (ConnectionRefusedError, "smtp.example.com:25 refused the connection"),
    "codec": (ValueError, "Unsupported codec in stream 0: prores_raw"),
    "disk": (OSError, "No space left on /srv/render"),
}

_CONFIG: Final = """\
[worker]
socket = "{folder}/worker.sock"
[admin]
listen = "{admin}"
[store]
path = "{store}/jobs.db"
"""


class Sandbox:
    """A daemon and workers in a temporary directory. Leaving the context stops them and removes the directory.

    `config` is appended to the configuration. The admin API listens on `admin`, by default a Unix socket. With
    `store_in`, the database is created in a temporary directory there. `print_line` prints the lines of `say`.
    """

    def __init__(self, config: str = "", admin: str = "", store_in: Path | None = None) -> None:
        self.config = config
        self.print_line = partial(print, flush=True)
        self._start_s = time.monotonic()
        self._admin = admin
        self._store_in = store_in
        self.token: Final = secrets.token_urlsafe(32)
        self.workers: dict[str, subprocess.Popen[bytes]] = {}
        self.daemon: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="jobd-demo-")).resolve()
        if len(os.fsencode(self.folder)) + len("/worker.sock") > _SOCKET_PATH_BYTES:
            self.folder.rmdir()
            self.folder = Path(tempfile.mkdtemp(prefix="jobd-demo-", dir="/tmp"))
        self.results = self.folder / "results"
        self.results.mkdir()
        self._store = Path(tempfile.mkdtemp(prefix="jobd-", dir=self._store_in)) if self._store_in else self.folder
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for worker in self.workers.values():
                worker.kill()
                worker.wait()
            if self.daemon is not None:
                _end(self.daemon)
        finally:
            for folder in {self.folder, self._store}:
                shutil.rmtree(folder, ignore_errors=True)

    def say(self, text: str) -> None:
        """Print a step with its time."""
        self.print_line(f"{time.monotonic() - self._start_s:6.1f} s  {terminal.clean(text)}")

    def jobs(self) -> JobClient:
        return JobClient(f"unix:{self.folder}/worker.sock", retry_for_s=5.0)

    def start_daemon(self) -> int:
        """Start `jobd serve`, wait until it responds and return its pid. Raises CliError (1) if it does not start."""
        config, log = self.folder / "config.toml", self.folder / "jobd.log"
        admin = self._admin or f"unix:{self.folder}/admin.sock"
        text = _CONFIG.format(folder=self.folder, admin=admin, store=self._store.resolve())
        config.write_text(text + self.config, encoding="utf-8")
        config.chmod(0o600)
        self.daemon = _start(["jobd", "serve", "--config", str(config)], log, {"ADMIN_TOKEN": self.token})
        until_s = time.monotonic() + _READY_S
        while True:
            try:
                with JobClient(f"unix:{self.folder}/worker.sock", retry_for_s=0) as client:
                    client.list_jobs(limit=1)
                return self.daemon.pid
            except JobdError as error:
                if self.daemon.poll() is not None or time.monotonic() > until_s:
                    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
                    reason = lines[-1] if lines else error.message
                    raise exit_codes.CliError(f"The daemon did not start: {reason}") from None
            time.sleep(0.05)

    def start_worker(
        self, name: str, *queues: str, lock_ttl_ms: int = 60_000, endpoint: str = "", **environ: str
    ) -> int:
        """Start a worker process of this daemon, or of that at `endpoint`, and return its pid."""
        endpoint = endpoint or f"unix:{self.folder}/worker.sock"
        command = [__name__, endpoint, name, str(lock_ttl_ms), str(self.results), *queues]
        self.workers[name] = _start(command, self.folder / f"{name}.log", environ)
        return self.workers[name].pid

    def kill_worker(self, name: str) -> int:
        """Send SIGKILL and return the exit code (-9)."""
        self.workers[name].kill()
        return self.workers[name].wait(_STOP_S)

    def stop_daemon(self) -> int:
        assert self.daemon is not None
        return _end(self.daemon)


def _start(module_and_arguments: list[str], log: Path, secret: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start `python -m MODULE …` with this package and without the caller's jobd settings, in its own session."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("JOBD_", "ADMIN_"))}
    package = str(Path(jobd.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *module_and_arguments],
            env={**own, "PYTHONPATH": path, **secret},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C signals only the demo, which stops its processes
            preexec_fn=_die_with_parent,
        )


def _die_with_parent() -> None:
    """Make Linux kill this process when the demo ends, even by SIGKILL. Other systems have no such option."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes]) -> int:
    """Send SIGTERM, and SIGKILL after 15 s. Return the exit code."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


# ---------------------------------------------------------------------------------------------------------------------
# The workers


def render(x: float, y: float, frames: int, report: Callable[[float, str], None]) -> bytes:
    """Return a PNG, animated if it has several frames, that zooms into the Mandelbrot set at (x, y)."""
    out = [SIGNATURE, _chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 3, 0, 0, 0)), _chunk(b"PLTE", _PALETTE)]
    out.append(_chunk(b"acTL", struct.pack(">II", frames, 0)))
    for frame in range(frames):
        scale = 3.0 / WIDTH * 0.9**frame
        across = [x + (column - WIDTH / 2) * scale for column in range(WIDTH)]
        down = [y + (row - HEIGHT / 2) * scale for row in range(HEIGHT)]
        pixels = b"".join(b"\0" + bytes(_colour(complex(re, im)) for re in across) for im in down)
        number = max(2 * frame - 1, 0)  # in the sequence of fcTL and fdAT chunks
        out.append(_chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, WIDTH, HEIGHT, 0, 0, 1, 12, 0, 0)))
        packed = zlib.compress(pixels)
        out.append(_chunk(b"fdAT", struct.pack(">I", number + 1) + packed) if frame else _chunk(b"IDAT", packed))
        report(99 * (frame + 1) / frames, f"frame {frame + 1} of {frames}")
    return b"".join([*out, _chunk(b"IEND", b"")])


def _colour(point: complex) -> int:
    z = 0j
    for iterations in range(_COLOURS - 1):
        z = z * z + point
        if z.real * z.real + z.imag * z.imag > 4.0:
            return iterations
    return _COLOURS - 1


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def work(endpoint: str, name: str, lock_ttl_ms: str, results: str, *queues: str) -> None:
    """Run a worker for these queues until SIGTERM."""
    worker = Worker(endpoint, name=name, queues=queues, lock_ttl_ms=int(lock_ttl_ms))

    @worker.handler("picture", "film")
    def draw(context: HandlerContext) -> dict[str, Any]:
        picture = render(**context.payload, report=context.progress)
        target = Path(results) / f"{context.job.id}.png"
        part = target.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(picture)
        os.replace(part, target)
        return {"file_path": str(target), "metadata": {"worker": name, "sha256": hashlib.sha256(picture).hexdigest()}}

    def simulate(context: HandlerContext) -> dict[str, Any]:
        """Take `seconds`, and fail after 60 % if the payload names a failure."""
        for step in range(1, 11):
            time.sleep(context.payload["seconds"] / 10)
            if step == 6 and (failure := context.payload.get("fails")):
                error, message = FAILURES[failure]
                raise error(message)
            context.progress(10 * step - 1, f"part {step} of 10")
        return {"metadata": {"worker": name}}

    worker.handler(simulate)
    worker.handler("yearly", timeout=2.0)(simulate)
    worker.run()


if __name__ == "__main__":
    work(*sys.argv[1:])
