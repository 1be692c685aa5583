"""Format times, durations, sizes, tables, JSON and messages for a terminal or a pipe.

All text from outside is escaped, so that a job cannot send control characters to a terminal.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple

from jobd.model.sizes import byte_size
from jobd.model.times import duration, time_left, utc

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from jobd.model.responses import DiskView

# C0 and C1 controls (ESC, CSI …), line separators, marks that reorder text on the screen, and lone surrogates.
_UNSAFE: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_SHORT: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
UNBOUNDED: Final = 1_000_000  # columns of a pipe
GAP: Final = "  "  # between the columns of a table
_ALIGNED: Final = 40  # a longer cell of a table in a pipe overflows its column
_SHORT_WORDS: Final = 12  # columns of a status or an age
_READABLE: Final = 14  # columns that a folded name needs
_STRIP: Final = 6  # columns below which a folded name is unreadable
_STYLES: Final = {
    "queued": "cyan",
    "processing": "yellow",
    "completed": "green",
    "failed": "red",
    "cancelled": "magenta",
    "healthy": "green",
    "degraded": "yellow",
    "unhealthy": "red",
    "firing": "red",
    "paused": "yellow",
    "critical": "red",
    "error": "red",
    "warning": "yellow",
}


def clean(text: str) -> str:
    """Escape control characters (`\\x1b`, `\\n`, `\\u202e`), so that `text` is one line and safe on a terminal."""
    return _UNSAFE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    char = match.group()
    code = ord(char)
    return _SHORT.get(char) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def one_line(text: str) -> str:
    """Return the first line of `text`, escaped, with ` …` if there are more lines."""
    first, _, rest = text.strip("\n").partition("\n")
    return f"{clean(first)} …" if rest else clean(first)


def clip(text: str, width: int = 100) -> str:
    """Escape the first line of `text`, and cut it with an ellipsis if it is longer than `width` characters."""
    text = one_line(text)
    return text if len(text) <= width else text[: width - 1] + "…"


def age(at_ms: int, now_ms: int | None = None) -> str:
    """Format the distance of `at_ms` (Unix ms) from now: `12 min 4 s ago`, `in 3 s`."""
    gap = (now_ms if now_ms is not None else _now_ms()) - at_ms
    return f"{duration(gap)} ago" if gap >= 0 else f"in {time_left(-gap)}"


def when(at_ms: int | None, now_ms: int | None = None) -> str:
    """Format a Unix time in ms with its age: `2026-03-01 14:05:09 UTC (12 min ago)`; `-` for None."""
    if at_ms is None:
        return "-"
    now_ms = now_ms if now_ms is not None else _now_ms()
    return f"{utc(at_ms, now_ms)} ({age(at_ms, now_ms)})"


def _now_ms() -> int:
    return round(time.time() * 1000)


def disk_space(disk: DiskView) -> str:
    """Describe the disk of the store: `1.5 GiB free of 8.0 GiB (/var/lib/jobd/jobd.db)`."""
    return f"{byte_size(disk.free_bytes)} free of {byte_size(disk.total_bytes)} ({disk.path})"


def cell(value: object) -> str:
    """Format a value for a table: `-` for None, yes or no, numbers without a trailing `.0`, one line of text."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1f}".removesuffix(".0")
    return one_line(str(value))


def as_json(value: Any, *, may_indent: bool = True) -> str:
    """Return `value` as JSON text: indented on a terminal if it may be, one line in a pipe."""
    import msgspec

    raw = msgspec.json.encode(value)
    if may_indent and sys.stdout.isatty():
        raw = msgspec.json.format(raw, indent=2)
    # Outside strings, JSON has only spaces and line ends, so this escapes characters in strings only.
    return _UNSAFE.sub(lambda m: m.group() if m.group() == "\n" else f"\\u{ord(m.group()):04x}", raw.decode())


def emit_json(value: Any, *, may_indent: bool = True) -> None:
    sys.stdout.write(as_json(value, may_indent=may_indent) + "\n")


def emit(line: str) -> None:
    """Print one line of data on stdout."""
    sys.stdout.write(clean(line) + "\n")


def say(line: str) -> None:
    """Print a one-line message on stderr."""
    sys.stderr.write(clean(line) + "\n")


def may_draw(stream: IO[str]) -> bool:
    """Return whether `stream` accepts escape sequences: it is a terminal, and NO_COLOR is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def console(*, stderr: bool = False) -> Console:
    """Return a rich console that does not change text, and does not wrap lines in a pipe."""
    from rich.console import Console

    file = sys.stderr if stderr else sys.stdout
    width = None if file.isatty() else UNBOUNDED
    # With NO_COLOR, rich omits only colours and would still send bold text.
    force = False if os.environ.get("NO_COLOR") else None
    return Console(file=file, width=width, force_terminal=force, highlight=False, markup=False, emoji=False)


# The columns of a table by title, each with the attribute or the function of a row that it shows. A title `>X` is that
# of numbers, which are aligned to the right, and neither cut nor folded.
Columns = Mapping[str, str | Callable[[Any], object]]


class Listing(NamedTuple):
    """How a list is printed: its name in JSON, what is said if it is empty, and the columns of its table."""

    name: str
    empty: str
    columns: Columns


def show_list(listing: Listing, rows: Sequence[object], as_json: bool) -> None:
    emit_json({listing.name: rows}) if as_json else table(listing.columns, rows, empty=listing.empty)


def cells(columns: Columns, rows: Iterable[object]) -> list[list[str]]:
    """Return the cells of a table, line by line. The titles are the first line."""
    readers = [attrgetter(each) if isinstance(each, str) else each for each in columns.values()]
    titles = [title.removeprefix(">") for title in columns]
    return [titles, *([cell(read(row)) for read in readers] for row in rows)]


def ago(name: str, missing: str = "-") -> Callable[[Any], str]:
    """Return the function that shows the time `name` of a row by its distance from now."""
    return lambda row: missing if getattr(row, name) is None else age(getattr(row, name))


def table(columns: Columns, rows: Iterable[object], *, empty: str = "none") -> None:
    """Print aligned columns on stdout. Without rows, print `empty` on stderr.

    On a narrow terminal, text is folded. A pipe gets one line per row.
    """
    lines = cells(columns, rows)
    if len(lines) == 1:
        say(empty)
        return
    is_right = [title.startswith(">") for title in columns]
    if not sys.stdout.isatty():
        sys.stdout.writelines(f"{line}\n" for line in aligned(lines, is_right))
        return
    out = console()
    unfolded = _unfolded(is_right, lines, out.width)
    if unfolded is None:
        for number, row in enumerate(lines[1:]):
            sys.stdout.write("\n" if number else "")
            pairs(zip(lines[0], row, strict=True))
        return
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title, right, is_unfolded in zip(lines[0], is_right, unfolded, strict=True):
        grid.add_column(title, justify="right" if right else "left", overflow="fold", no_wrap=is_unfolded)
    for row in lines[1:]:
        grid.add_row(*(Text(text, style=style_of(text)) for text in row))
    print_plain(out, grid)


def widths(lines: Sequence[Sequence[str]], limit: int) -> list[int]:
    """Return the width of each column. Cells longer than `limit` are ignored, so one long name moves only its row."""
    from rich.cells import cell_len

    return [max((n for n in map(cell_len, column) if n <= limit), default=0) for column in zip(*lines, strict=True)]


def aligned(lines: Sequence[Sequence[str]], is_right: Sequence[bool]) -> Iterator[str]:
    """Yield the lines of a table for a pipe. A long cell moves only the cells that follow it."""
    from rich.cells import cell_len

    to = widths(lines, _ALIGNED)
    for line in lines:
        blanks = [" " * (width - cell_len(text)) for text, width in zip(line, to, strict=True)]
        padded = zip(line, blanks, is_right, strict=True)
        yield GAP.join(blank + text if right else text + blank for text, blank, right in padded).rstrip()


def _unfolded(is_figure: Sequence[bool], lines: Sequence[Sequence[str]], available: int) -> list[bool] | None:
    """Return for each column whether it stays unfolded: numbers do, and short words if the other columns have space.

    Return None if the other columns would be unreadable even then. Each row then becomes a block of lines.
    """
    natural = widths(lines, UNBOUNDED)
    available -= len(GAP) * (len(is_figure) - 1)
    is_short = [figure or width <= _SHORT_WORDS for figure, width in zip(is_figure, natural, strict=True)]
    for unfolded, least in ((is_short, _READABLE), (list(is_figure), _STRIP)):
        left = available - sum(width for width, stays in zip(natural, unfolded, strict=True) if stays)
        folded = [width for width, stays in zip(natural, unfolded, strict=True) if not stays]
        if left >= min(sum(folded), least * len(folded)):
            return unfolded
    return None


def pairs(fields: Iterable[tuple[str, object]]) -> None:
    """Print `name  value` lines on stdout, with the values aligned. A value can have several lines."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in fields:
        is_text = isinstance(value, str) and value != ""
        text = "\n".join(map(clean, str(value).rstrip("\n").split("\n"))) if is_text else cell(value)
        grid.add_row(name, Text(text, style=style_of(text)))
    print_plain(console(), grid)


def style_of(text: str) -> str:
    return _STYLES.get(text, "")


def print_plain(out: Console, renderable: RenderableType) -> None:
    """Print on stdout. In a pipe, without blanks at the ends of lines."""
    if out.is_terminal:
        out.print(renderable)
        return
    with out.capture() as captured:
        out.print(renderable)
    sys.stdout.write("".join(line.rstrip() + "\n" for line in captured.get().splitlines()))
