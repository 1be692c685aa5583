"""What the demo shows while it runs: lines as things happen, and on a terminal moving bars below them.

Knows jobs only as answers of the daemon; decides nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jobd.cli import terminal

if TYPE_CHECKING:
    from rich.progress import TaskID

    from jobd.model.responses import JobView

_FINISHED = frozenset({"completed", "failed", "cancelled"})


class Screen:
    """Lines on stdout, each with the seconds since the start. A log of a CI run reads as well as a terminal."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def say(self, text: str) -> None:
        self._line(f"{time.monotonic() - self._start_s:6.1f} s  {terminal.clean(text)}")

    def _line(self, text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def update(self, jobs: Sequence[JobView]) -> None:
        """The state of all jobs, as often as it is known."""


class LiveScreen(Screen):
    """The same lines, above bars: one for the whole, one for each job in work."""

    def __init__(self) -> None:
        super().__init__()
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        columns: list[Any] = [TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn()]
        self._progress = Progress(*columns, console=terminal.console(), transient=True)
        self._all = self._progress.add_task("all jobs", total=None)
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _line(self, text: str) -> None:
        self._progress.console.print(text)

    def update(self, jobs: Sequence[JobView]) -> None:
        done = sum(job.status in _FINISHED for job in jobs)
        self._progress.update(self._all, completed=done, total=len(jobs))
        at_work = {job.id: job for job in jobs if job.status == "processing"}
        for job_id in self._bars.keys() - at_work.keys():
            self._progress.remove_task(self._bars.pop(job_id))
        for job_id, job in at_work.items():
            holder = job.lock.worker if job.lock else f"{job.worker} (silent: the lock has expired)"
            text = terminal.clip(f"  {job_id} on {holder}", 60)
            if job_id not in self._bars:
                self._bars[job_id] = self._progress.add_task(text, total=100)
            self._progress.update(self._bars[job_id], completed=job.progress, description=text)


def screen() -> Screen:
    """The moving one where stdout is a terminal that can move, else the plain one."""
    return LiveScreen() if terminal.may_draw(sys.stdout) and not terminal.console().is_dumb_terminal else Screen()
