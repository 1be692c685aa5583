"""Progress displays on stderr for a job, a long call or a stream. Nothing is shown unless stderr is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from jobd.cli import terminal


class Advance(Protocol):
    """Show `done` of `total` (None: unknown), and replace the description by `what`."""

    def __call__(self, done: int, total: int | None, what: str | None = None) -> None: ...


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Show a spinner during the block."""
    if not terminal.may_draw(sys.stderr):
        yield
        return
    with terminal.console(stderr=True).status(terminal.clean(what)):
        yield


@contextmanager
def bar(what: str, *, unit: str = "bytes") -> Iterator[Advance]:
    """Show a progress bar and yield the function that advances it. Bytes are shown with their rate."""
    if not terminal.may_draw(sys.stderr):
        yield lambda done, total, what=None: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, TextColumn, TransferSpeedColumn

    columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False), BarColumn()]
    if unit == "bytes":
        columns += [DownloadColumn(binary_units=True), TransferSpeedColumn()]
    else:
        columns += [TextColumn("{task.completed} " + unit)]
    with Progress(*columns, console=terminal.console(stderr=True), transient=True) as progress:
        task = progress.add_task(terminal.clip(what, 60), total=None)

        def advance(done: int, total: int | None, what: str | None = None) -> None:
            if total is None:
                progress.tasks[0].total = None  # update() ignores None
            name = None if what is None else terminal.clip(what, 60)
            progress.update(task, completed=done, total=total, description=name)

        yield advance
