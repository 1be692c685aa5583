"""Daemons that are forked from a process that has imported jobd, which is faster for tests that start many.

Such a daemon has its own environment and standard error, as if it were started by a command. Tests of the start, of
memory, of namespaces and of preloaded libraries start the command.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Final, cast

from jobd import logging
from jobd.cli.daemon.main import main
from tests.support import daemon_variants
from tests.support.daemon_process import DaemonProcess, die_with_us
from tests.support.node_process import NodeProcess

# One process per test process, in which all modules are imported that were named before the first use.
PROCESSES: Final = multiprocessing.get_context("forkserver")
_PRELOADED: Final = ["tests.support.daemon_variants"]
PROCESSES.set_forkserver_preload(_PRELOADED)


def preload(modules: Sequence[str]) -> None:
    """Import these modules, too, before the processes are forked."""
    _PRELOADED.extend(modules)
    PROCESSES.set_forkserver_preload(_PRELOADED)


class ForkedProcess:
    """A process of jobd or of a variant. It has what tests use of Popen."""

    def __init__(self, variant: str, arguments: Sequence[str], environ: Mapping[str, str]) -> None:
        receiving, sending = PROCESSES.Pipe(duplex=False)
        self._process = PROCESSES.Process(target=_run, args=(variant, arguments, dict(environ), sending), daemon=True)
        self._process.start()
        sending.close()
        self.stderr = os.fdopen(os.dup(receiving.fileno()), "rb")
        receiving.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class ForkedDaemon(DaemonProcess):
    """A daemon whose process is forked."""

    def spawn(self, stderr: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
        assert (self.prefix, stderr) == ([], subprocess.PIPE)
        words = ["serve", "--config", str(self.config)]
        return cast("subprocess.Popen[bytes]", ForkedProcess(self.variant, words, self.environ))


class ForkedNode(ForkedDaemon, NodeProcess):
    """A node of a cluster whose process is forked."""


def _run(variant: str, arguments: Sequence[str], environ: Mapping[str, str], stderr: Connection) -> None:
    die_with_us()
    os.dup2(stderr.fileno(), 2)
    stderr.close()
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)  # a pipe, unlike that of the process before the fork
    os.environ.clear()
    os.environ.update(environ)
    if variant:
        getattr(daemon_variants, variant)()
    sys.argv = ["jobd", *arguments]
    try:
        sys.exit(main())
    finally:
        logging.flush(10)  # multiprocessing does not call the functions of atexit
