"""Run a daemon under strace: inject errors into its system calls, and read the calls that were made."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.proof.faults.harness import program
from tests.support.daemon_process import DaemonProcess
from tests.support.polling import poll_until

STRACE: Final = program("strace")
WRITES: Final = ("pwrite64",)
SYNCS: Final = ("fdatasync", "fsync")

_LINE: Final = re.compile(r"^(?P<thread>\d+) +(?P<at>[\d.]+) (?P<call>\w+)\(\d+<(?P<file>[^>]*)>")


@dataclass(frozen=True)
class TracedCall:
    """One call: its time, thread, file (without directory), and whether it was injected."""

    at_s: float
    thread: int
    call: str
    file: str
    injected: bool


class Strace:
    """Start `daemon` under strace from now on: `calls` are traced, and `inject` is applied to one of them.

    `when` counts the calls of each thread separately. With `only`, only calls on that file count.
    """

    def __init__(
        self, daemon: DaemonProcess, calls: tuple[str, ...], inject: str = "", only: Path | None = None
    ) -> None:
        self._daemon = daemon
        self._log = daemon.directory / "strace"
        self._log.unlink(missing_ok=True)
        # -D: strace is a separate process, so that the process that we start, signal and wait for is the daemon.
        daemon.prefix = ["strace", "-D", "-f", "-y", "-ttt", "-s", "0", "-o", str(self._log)]
        if "signal=" not in inject:
            daemon.prefix.append("--seccomp-bpf")  # all other calls at full speed, but no signal is injected
        daemon.prefix += ["-e", f"trace={','.join(calls)}"]
        if inject:
            daemon.prefix += ["-e", f"inject={inject}"]
        if only is not None:
            daemon.prefix += ["-P", str(only)]

    def traced_calls(self) -> list[TracedCall]:
        """Return all calls of the daemon, which has ended."""
        end = re.compile(rf"^{self._daemon.process.pid} .*\+\+\+ (exited|killed)", re.MULTILINE)
        poll_until(lambda: end.search(self._log.read_text()))  # strace may write its last lines after the end
        return [seen for line in self._log.read_text().splitlines() if (seen := _parse(line)) is not None]


def _parse(line: str) -> TracedCall | None:
    if (match := _LINE.match(line)) is None:
        return None
    injected = "(INJECTED)" in line or line.endswith(" = ?")  # a call with an injected kill never ends
    file = match["file"].rpartition("/")[2]
    return TracedCall(float(match["at"]), int(match["thread"]), match["call"], file, injected)
