"""Servers of other projects, each in a directory of its own, on a socket of its own, ended by its own pid."""

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
    """What is not installed; the text says what to install."""


def tool(name: str, package: str, *places: str) -> str:
    """The path of a program. Raises Missing."""
    found = shutil.which(name, path=os.pathsep.join([os.environ["PATH"], *places]))
    if found is None:
        raise Missing(f"{name} is not there: apt-get install {package}")
    return found


def module(name: str) -> Any:
    """A package of Python. Raises Missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise Missing(f"{name} is not there: make bench-peers installs it") from None


@contextmanager
def running(words: list[str], place: Path, is_up: Callable[[], bool], *, user: str | None = None) -> Iterator[None]:
    """A server that runs until the end of the block, and whose log lies in `place`."""
    with (place / "server.log").open("wb") as log:
        server = subprocess.Popen(words, stdout=log, stderr=log, cwd=place, user=user, preexec_fn=die_with_us)
    try:
        began = time.monotonic()
        while not is_up():
            if server.poll() is not None or time.monotonic() - began > READY_S:
                raise SystemExit(f"{words[0]} did not come up:\n{(place / 'server.log').read_text()[-2000:]}")
            time.sleep(0.02)
        yield
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
