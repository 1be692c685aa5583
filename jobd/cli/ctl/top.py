"""The display of `jobctl top`: sample the daemon and draw frames."""

from __future__ import annotations

import os
import re
import select
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from jobd.cli import tables_admin, terminal
from jobd.cli.terminal import GAP, Columns, ago
from jobd.client import AdminClient, JobdError
from jobd.client.retries import RETRIED
from jobd.model.fields import MAX_PAGE
from jobd.model.problems import Problem
from jobd.model.responses import LockedJob, QueueView, StatsView
from jobd.model.times import duration, utc

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

WINDOW_S: Final = 10.0  # rates cover this time
RATES: Final = ("created", "granted", "completed", "failed", "retried", "stalled")
MAX_WORKERS: Final = 200  # workers and locks of one sample
NARROW: Final = 72  # columns below which LAST SEEN is omitted
WIDE: Final = 140  # columns from which CLAIMS and ABOUT are shown
MIDDLE: Final = 32  # columns of a worker's claims, and of its description
NAME: Final = 20  # columns of a name before a table omits columns
HEAD: Final = 3  # lines above the tables that rows_of counts on
_COUNT: Final = re.compile(r'^jobd_events_total\{type="(\w+)"\} (\S+)$', re.MULTILINE)


class HeldJob(Struct, frozen=True):
    """A job that a worker holds."""

    id: str
    progress: float


class WorkerRow(Struct, frozen=True):
    """A worker and the jobs that it holds, by progress."""

    worker: str
    state: str
    last_seen_at: int
    claims: str | None
    about: str | None
    held: int
    jobs: list[HeldJob]  # among the sampled locks


class TopFrame(Struct, frozen=True):
    """One sample. `per_second` is by event type, over `over_s` seconds. Times are in Unix ms."""

    stats: StatsView
    per_second: dict[str, float]
    over_s: float
    queues: list[QueueView]
    workers: list[WorkerRow]
    problems: list[Problem]
    more_queues: bool = False  # not all queues were sampled
    gone: int = 0  # workers that are not listed


class Sampler:
    """Sample the daemon and keep the latest counts for rates."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counts: deque[tuple[float, dict[str, float]]] = deque()

    def take(self, client: AdminClient, max_queues: int | None = None) -> TopFrame:
        """Return a sample with the busiest queues, at most `max_queues` (None: all)."""
        stats, queues, seen, locks = (
            client.stats(),
            client.queues(limit=MAX_PAGE if max_queues is None else min(max_queues + 1, MAX_PAGE), busiest=True),
            client.worker_page(limit=MAX_WORKERS),
            client.locks(limit=MAX_WORKERS),
        )
        problems = client.problems().problems
        per_second, over_s = self.rates(client.metrics())
        by_worker: dict[str, list[LockedJob]] = {}
        for lock in locks:
            by_worker.setdefault(lock.worker, []).append(lock)
        workers = [
            WorkerRow(
                each.worker,
                tables_admin.worker_state(each),
                each.last_seen_at,
                tables_admin.claims(each),
                tables_admin.about(each.about),
                each.held,
                _held(by_worker.get(each.worker, ())),
            )
            for each in sorted(seen.workers, key=lambda each: (-each.held, each.worker))
        ]
        more = max_queues is not None and len(queues) > max_queues
        return TopFrame(
            stats,
            per_second,
            over_s,
            queues[:max_queues],
            workers,
            problems,
            more,
            seen.by_state["gone"] + seen.by_state["died"],
        )

    def rates(self, metrics: str) -> tuple[dict[str, float], float]:
        """Return events per second since the oldest sample of the window, and the time since then."""
        now = self._clock()
        counts = {name: float(number) for name, number in _COUNT.findall(metrics)}
        while len(self._counts) > 1 and now - self._counts[1][0] >= WINDOW_S:
            self._counts.popleft()
        self._counts.append((now, counts))
        since, before = self._counts[0]
        over_s = now - since
        if over_s <= 0:
            return dict.fromkeys(RATES, 0.0), 0.0
        # After a crash the daemon can resume from slightly older counts.
        gained = {name: max(counts.get(name, 0) - before.get(name, 0), 0) for name in RATES}
        return {name: round(count / over_s, 1) for name, count in gained.items()}, round(over_s, 1)


def _held(locks: Sequence[LockedJob]) -> list[HeldJob]:
    return [HeldJob(lock.id, lock.progress) for lock in sorted(locks, key=lambda lock: (-lock.progress, lock.id))]


# ---------------------------------------------------------------------------------------------------------------------
# On a terminal


def watch(client: AdminClient, samples: Sampler, interval_s: float) -> None:
    """Draw samples until q is pressed. While the daemon is unreachable, show the last sample and retry."""
    out = terminal.console()
    frame, note = samples.take(client, min(rows_of(out.height), MAX_WORKERS - 1)), ""
    with _screen(out) as draw, _keys() as wait:
        while True:
            draw(frame, note)
            if not wait(interval_s):
                return
            try:
                frame, note = samples.take(client, min(rows_of(out.height), MAX_WORKERS - 1)), ""
            except JobdError as error:
                if error.code not in RETRIED:
                    raise
                note = f"This state is out of date; retrying. {error.message}"


@contextmanager
def _screen(out: Console) -> Iterator[Callable[[TopFrame, str], None]]:
    """Yield a function that replaces the frame on the screen, or appends it if escape sequences are not allowed."""
    if not terminal.may_draw(sys.stdout):
        yield lambda frame, note: out.print(render(frame, note, out.height, out.width), "")
        return
    from rich.live import Live

    with Live(console=out, screen=True, auto_refresh=False) as live:
        yield lambda frame, note: live.update(render(frame, note, out.height, out.width), refresh=True)


@contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """Yield a function that waits and returns whether to continue: False if q was pressed."""
    if not sys.stdin.isatty():
        yield pause
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield _until_pressed
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _until_pressed(wait_s: float) -> bool:
    end_s = time.monotonic() + wait_s
    while (left_s := end_s - time.monotonic()) > 0:
        ready, _, _ = select.select([sys.stdin], [], [], left_s)
        if ready:
            pressed = os.read(sys.stdin.fileno(), 64)
            if not pressed or b"q" in pressed.lower():  # end of input: the terminal was closed
                return False
    return True


def pause(wait_s: float) -> bool:
    """Wait and return True: without a terminal, no key can be pressed."""
    time.sleep(wait_s)
    return True


def draw_once(frame: TopFrame) -> None:
    """Print one frame with all queues and workers."""
    out = terminal.console()
    everything = 20 + len(frame.queues) + len(frame.workers) + len(frame.problems)
    terminal.print_plain(out, render(frame, "", 2 * everything, out.width))


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def rows_of(height: int) -> int:
    """Return the number of queues, and of workers, that fit into `height` lines."""
    return max((height - 12) // 2, 2)


def render(frame: TopFrame, note: str, height: int, width: int) -> RenderableType:
    """Return a frame for `height` lines and `width` columns."""
    from rich.console import Group

    head = _head(frame, note, width)
    rows = rows_of(height - len(frame.problems) - len(head) + HEAD)
    problems = _table(_PROBLEMS, frame.problems, len(frame.problems), width, "red") if frame.problems else []
    return Group(*head, *problems, _line(""), *_queues(frame, rows, width), _line(""), *_workers(frame, rows, width))


def _head(frame: TopFrame, note: str, width: int) -> list[Text]:
    stats = frame.stats
    rates = [f"{name} {rate:g}" for name, rate in frame.per_second.items()]
    groups = [
        [f"{status} {count}" for status, count in stats.by_status.items()],
        [
            utc(stats.timestamp),
            f"stalled {stats.stuck_jobs}",
            f"locked {stats.locked_jobs}",
            f"average {duration(stats.average_processing_time * 1000)}",
            *([] if stats.disk is None else [f"disk {terminal.disk_space(stats.disk)}"]),
        ],
        [f"per second (over {frame.over_s:g} s): {rates[0]}", *rates[1:]],
    ]
    lines = [line for group in groups for line in _packed(group, width)]
    return [*map(_line, lines), *([_line(note, "yellow")] if note else [])]


def _packed(parts: Sequence[str], width: int) -> list[str]:
    """Join the parts into lines of at most `width`, without cutting a part."""
    lines = [parts[0]]
    for part in parts[1:]:
        longer = f"{lines[-1]}{GAP}{part}"
        if len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(part)
    return lines


_PROBLEMS: Final[Columns] = {
    "": lambda problem: f"{problem.severity.upper()} {problem.name}",
    " ": terminal.ago("since"),
    "  ": "title",
}
# The last four are omitted on a narrow terminal, and the pauses before them.
_QUEUES: Final = ("QUEUE", "STATE", ">QUEUED", ">PROCESSING", "OLDEST DUE", ">FAILED", ">COMPLETED", ">CANCELLED")


def _queues(frame: TopFrame, rows: int, width: int) -> list[RenderableType]:
    known = tables_admin.queue_columns(frame.queues)
    names = [*_QUEUES, *(["PAUSED"] if width >= NARROW and "PAUSED" in known else [])]
    columns = {name: known[name] for name in names}
    return _table(columns, frame.queues, rows, width, spare=4, is_part=frame.more_queues)


def _workers(frame: TopFrame, rows: int, width: int) -> list[RenderableType]:
    columns: Columns = {
        "WORKER": "worker",
        "STATE": "state",
        ">HOLDS": "held",
        **({"LAST SEEN": ago("last_seen_at")} if width >= NARROW else {}),
        **({"CLAIMS": _clipped("claims"), "ABOUT": _clipped("about")} if width >= WIDE else {}),
        "JOBS": lambda worker: "  ".join(f"{job.id} {terminal.cell(job.progress)} %" for job in worker.jobs),
    }
    lines = _table(columns, frame.workers, rows, width)
    return [*lines, _line(f"{frame.gone} died or gone")] if frame.gone else lines


def _clipped(name: str) -> Callable[[Any], str | None]:
    return lambda worker: getattr(worker, name) and terminal.clip(getattr(worker, name), MIDDLE)


def _table(
    columns: Columns,
    rows: Sequence[object],
    max_rows: int,
    width: int,
    style: str = "",
    *,
    spare: int = 0,
    is_part: bool = False,
) -> list[RenderableType]:
    """Draw at most `max_rows` rows, one line each. On a narrow terminal, up to `spare` of the last columns are omitted.

    Numbers are never cut. Names are cut in the middle, and without spare columns the last column is cut at its end.
    `is_part`: there are more rows than given.
    """
    from rich.table import Table
    from rich.text import Text

    lines, has_words = terminal.cells(columns, rows[:max_rows]), not spare
    is_right = [title.startswith(">") for title in columns]
    lines = lines if lines[0][0] else lines[1:]  # problems have no titles
    drawn: list[RenderableType] = []
    if width >= terminal.UNBOUNDED:
        drawn += map(_line, terminal.aligned(lines, is_right))
    else:
        while True:
            name, *others = terminal.widths(lines, terminal.UNBOUNDED)
            words = others.pop() if has_words else 0
            left = width - sum(others) - len(GAP) * (len(lines[0]) - 1)
            if not spare or left >= min(name, NAME):
                break
            lines, spare = [line[:-1] for line in lines], spare - 1
        name = max(left - words, left // 2, min(NAME, left - 1), 1) if has_words else left
        grid = Table.grid(padding=(0, len(GAP), 0, 0))
        for number, line in enumerate(lines):
            styles = (style or ("bold" if number == 0 else terminal.style_of(text)) for text in line)
            grid.add_row(
                *map(partial(Text, no_wrap=True, overflow="ellipsis"), [_ends(line[0], name), *line[1:]], styles)
            )
        for column, right in zip(grid.columns, is_right, strict=False):
            column.justify, column.no_wrap = "right" if right else "left", True
        grid.columns[-1].no_wrap = not has_words
        drawn.append(grid)
    if is_part:
        drawn.append(_line("and more"))
    elif len(rows) > max_rows:
        drawn.append(_line(f"and {len(rows) - max_rows} more"))
    return drawn


def _ends(text: str, width: int) -> str:
    """Cut the middle of a name that is too long, because many names differ only at one end."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) <= width:
        return text
    tail = (width - 1) // 2
    return set_cell_size(text, width - 1 - tail) + "…" + set_cell_size(text[::-1], tail)[::-1]


def _line(text: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(terminal.clean(text), style=style, no_wrap=True, overflow="ellipsis")
