"""Stop the programs of a worker that was killed, from a process that reads a pipe from the worker and outlives it.

A parent-death signal reaches only the direct child, and is sent when the parent thread ends. The end of a pipe has
neither limit. This file is also the main program of that process, so it imports nothing of jobd.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Final

POLL_S: Final = 0.05  # there is no notification of the end of a process group
MARK: Final = "JOBD_JOB_FENCING_TOKEN"  # the environment variable of each program that holds its token


class Watchdog:
    """The worker's side of the watchdog process. It sends one line for each change: `<token> <group>`.

    The group is 0 before the program starts and -1 after its end. If the worker dies while the group is 0, the process
    finds the program by the token in its environment. All methods may be called from any thread.
    """

    def __init__(self, kill_after_s: float) -> None:
        self._command = [sys.executable, "-I", "-S", __file__, str(kill_after_s)]
        self._guard = threading.RLock()
        self._groups: dict[int, int] = {}
        self._process: subprocess.Popen[bytes] | None = None

    def starting(self, token: int) -> None:
        """Announce that a program for the grant with this token is about to start."""
        self._send(token, 0)

    def started(self, token: int, group: int) -> None:
        """Announce the process group of the program."""
        self._send(token, group)

    def ended(self, token: int) -> None:
        """Announce that the program and its group have ended, or did not start. Call this before the pid is reused."""
        self._send(token, -1)

    def close(self) -> None:
        """End the process. It first stops the groups that are left."""
        with self._guard:
            process, self._process = self._process, None
            if process is not None:
                process.communicate()

    def _send(self, token: int, group: int) -> None:
        with self._guard:
            if group < 0:
                self._groups.pop(token, None)
            else:
                self._groups[token] = group
            try:
                self._write({token: group})
            except OSError:  # the process was killed: start another and send it all groups
                self.close()
                self._write(self._groups)

    def _write(self, groups: dict[int, int]) -> None:
        if self._process is None:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                cwd="/",
                start_new_session=True,
            )
            threading.Thread(target=self._replace, args=(self._process,), daemon=True).start()
        assert self._process.stdin is not None
        self._process.stdin.write(b"".join(b"%d %d\n" % each for each in groups.items()))

    def _replace(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for the end of the process, and start another if it was killed while programs run."""
        is_killed = process.wait() < 0
        with self._guard, contextlib.suppress(OSError):
            if is_killed and self._process is process and self._groups:
                self.close()
                self._write(self._groups)


def watch(fd: int, kill_after_s: float) -> None:
    """Read lines until the worker has ended, then stop the programs that are left."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a signal that stops the worker must not stop this process
    groups: dict[int, int] = {}
    with os.fdopen(fd, "rb") as lines:
        for line in lines:
            token, group = map(int, line.split())
            groups[token] = group
            if group < 0:
                del groups[token]
    end({group or _find(token) for token, group in groups.items()} - {0}, kill_after_s)


def end(groups: set[int], kill_after_s: float) -> None:
    """Send SIGTERM to all groups, and SIGKILL to those that are left after `kill_after_s`."""
    for group in groups:
        _signal(group, signal.SIGTERM)
        _signal(group, signal.SIGCONT)  # a stopped program cannot handle SIGTERM
    kill_at_s = time.monotonic() + kill_after_s
    while (groups := {group for group in groups if _signal(group, 0)}) and time.monotonic() < kill_at_s:
        time.sleep(POLL_S)
    for group in groups:
        _signal(group, signal.SIGKILL)


def _signal(group: int, number: int) -> bool:
    """Send a signal. Return whether the group exists and accepts it."""
    try:
        os.killpg(group, number)
    except OSError:
        return False
    return True


def _find(token: int) -> int:
    """Return the group of the program that was started for this token, 0 if there is none."""
    mark = f"{MARK}={token}".encode()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(entry.name)
            if os.getsid(pid) == pid and mark in (entry / "environ").read_bytes().split(b"\0"):
                return pid
    return 0


if __name__ == "__main__":
    watch(0, float(sys.argv[1]))
