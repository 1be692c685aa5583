"""Servers of other projects, each with its own directory and socket, and stopped by its pid."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.support.daemon_process import die_with_us

READY_S: Final = 30.0


class Missing(Exception):
    """A program or package is not installed. The message says how to install it."""


def tool(name: str, package: str, *places: str) -> str:
    """Return the path of a program. Raises Missing."""
    found = shutil.which(name, path=os.pathsep.join([os.environ["PATH"], *places]))
    if found is None:
        raise Missing(f"{name} is not installed: apt-get install {package}")
    return found


def module(name: str) -> Any:
    """Import a Python package. Raises Missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise Missing(f"{name} is not installed: make bench-peers installs it") from None


@contextmanager
def running(words: list[str], directory: Path, is_up: Callable[[], bool], *, user: str | None = None) -> Iterator[None]:
    """Run a server until the end of the block, with its log in `place`."""
    with (directory / "server.log").open("wb") as log:
        server = subprocess.Popen(words, stdout=log, stderr=log, cwd=directory, user=user, preexec_fn=die_with_us)
    try:
        began = time.monotonic()
        while not is_up():
            if server.poll() is not None or time.monotonic() - began > READY_S:
                raise SystemExit(f"{words[0]} did not start:\n{(directory / 'server.log').read_text()[-2000:]}")
            time.sleep(0.02)
        yield
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
