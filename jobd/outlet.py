"""Lines on their way to stderr, written by a thread of their own: a reader that stops reading costs lines, no more.

Knows nothing of what is in a line, and never makes the one who logs wait, unless asked to.
"""

from __future__ import annotations

import atexit
import contextlib
import select
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final

MOST_CHARS: Final = 1 << 20  # what may wait while nobody reads; what comes on top of it is dropped and counted
PIECE_CHARS: Final = 64 << 10  # lines go out by the piece: for each write the thread must get its turn from the loop
LAST_S: Final = 2.0  # how long the end of the process waits for a reader


class Outlet:
    """Where lines end, in the order in which they came.

    `confess` is called with the number of lines that were dropped, once there is room again; it puts a line.
    """

    def __init__(self, confess: Callable[[int], object]) -> None:
        self._confess = confess
        self._change = threading.Condition()
        self._lines: deque[str] = deque()
        self._chars = 0
        self._dropped = 0
        self._is_writing = False
        self._thread: threading.Thread | None = None

    def put(self, line: str) -> None:
        """Have `line` written soon, or drop it where nobody has read for long."""
        with self._change:
            if self._lines and self._chars + len(line) > MOST_CHARS:
                self._dropped += 1
                return
            self._lines.append(line)
            self._chars += len(line)
            if self._thread is None:
                # A daemon thread: a write that nobody ever reads must not keep the process from ending.
                self._thread = threading.Thread(target=self._run, name="log", daemon=True)
                self._thread.start()
                atexit.register(self.flush, LAST_S)
            self._change.notify_all()

    def flush(self, patience_s: float) -> bool:
        """Wait until all that was put is written; false where that took more than `patience_s`."""
        with self._change:
            return self._change.wait_for(lambda: not (self._lines or self._dropped or self._is_writing), patience_s)

    def _run(self) -> None:
        while True:
            with self._change:
                self._is_writing = False
                self._change.notify_all()
                self._change.wait_for(lambda: self._lines)
                lines, self._lines, self._chars = self._lines, deque(), 0
                self._is_writing = True
                dropped, self._dropped = self._dropped, 0
                if dropped:
                    self._confess(dropped)  # the first of the lines to come: what was dropped came before them
            for piece in _pieces(lines):
                _write(piece)


def _pieces(lines: deque[str]) -> Iterator[str]:
    """Whole lines in pieces of about PIECE_CHARS."""
    piece: list[str] = []
    chars = 0
    for line in lines:
        piece.append(f"{line}\n")
        chars += len(line)
        if chars >= PIECE_CHARS:
            yield "".join(piece)
            piece, chars = [], 0
    yield "".join(piece)


def _write(text: str) -> None:
    """Text to stderr, past Python's buffers: at the end of the process nobody may wait for their locks.

    Whatever has become of stderr, the daemon goes on.
    """
    if sys.stderr is None:  # closed when the process was started
        return
    with contextlib.suppress(OSError, ValueError):
        stream: Any = getattr(sys.stderr.buffer, "raw", sys.stderr.buffer)
        rest = memoryview(text.encode(errors="backslashreplace"))
        while rest:
            written = stream.write(rest)
            if written is None:  # somebody who has the same terminal has made it non-blocking
                select.select((), (stream,), ())
            rest = rest[written or 0 :]
