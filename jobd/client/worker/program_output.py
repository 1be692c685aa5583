"""Process the output of a program: handle the control lines, pass on the rest, keep the last lines."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import math
import os
import queue
import select
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import msgspec
from msgspec import UNSET, Raw

from jobd.client.worker.aio_utils import call_on, settle
from jobd.model.fields import MAX_NESTING
from jobd.model.job import MAX_PERCENT, storage_key_error

LINE_BYTES: Final = 64 << 10  # a longer line is not a control line; it is passed on in pieces
TEXT_CHARACTERS: Final = 4096
WARNINGS: Final = 10  # of a program, about lines that are not valid control lines
RESULT_FIELDS: Final = ("download_url", "file_path", "storage_key")
_VERBS: Final = (b"::progress", b"::checkpoint", b"::meta", b"::result")


class BadControlLine(ValueError):
    """A line starts like a control line but is not valid. The message is the reason."""


class ControlLines:
    """The result and metadata in a program's control lines so far.

    `on_progress` is called for each `::progress` and `::checkpoint` line, with the latest progress and the new
    checkpoint.
    """

    def __init__(self, on_progress: Callable[[float, str | None, Any], object]) -> None:
        self._on_progress = on_progress
        self._latest: tuple[float, str | None] = (0, None)
        self.result_fields: Final[dict[str, str]] = {}
        self.metadata: Final[dict[str, Any]] = {}

    @property
    def result(self) -> dict[str, Any]:
        """The arguments of `complete`."""
        return {**self.result_fields, "metadata": self.metadata or None}

    def take(self, line: bytes) -> bool:
        """Handle `line` (without its end) if it is a control line. Return whether it is. Raises BadControlLine."""
        verb, _, rest = line.partition(b" ")
        if verb not in _VERBS:
            return False
        if len(line) > LINE_BYTES:
            raise BadControlLine(f"it is over {LINE_BYTES} bytes")
        try:
            text = rest.decode().strip()
        except UnicodeDecodeError:
            raise BadControlLine("it is not UTF-8") from None
        if verb == b"::progress":
            self._progress(text)
        elif verb == b"::checkpoint":
            self._checkpoint(text)
        elif verb == b"::meta":
            key, value = _pair(text)
            self.metadata[key] = _json_or_text(value)
        else:
            self._result(*_pair(text))
        return True

    def _progress(self, text: str) -> None:
        number, _, message = text.partition(" ")
        try:
            progress = float(number)
        except ValueError:
            raise BadControlLine(f"expected a number from 0 to {MAX_PERCENT} after ::progress") from None
        if not math.isfinite(progress) or not 0 <= progress <= MAX_PERCENT:
            raise BadControlLine(f"progress must be from 0 to {MAX_PERCENT}")
        if len(message) > TEXT_CHARACTERS:
            raise BadControlLine(f"its text is over {TEXT_CHARACTERS} characters")
        self._latest = int(progress) if progress.is_integer() else progress, message.strip() or None
        self._on_progress(*self._latest, UNSET)

    def _checkpoint(self, text: str) -> None:
        try:
            msgspec.json.decode(text)
        except (msgspec.DecodeError, RecursionError) as error:
            raise BadControlLine(f"a checkpoint is JSON: {error}") from None
        self._on_progress(*self._latest, Raw(text.encode()))

    def _result(self, name: str, value: str) -> None:
        if name not in RESULT_FIELDS:
            raise BadControlLine(f"expected one of {', '.join(RESULT_FIELDS)}")
        if not 1 <= len(value) <= TEXT_CHARACTERS or "\x00" in value:
            raise BadControlLine(f"{name} needs 1 to {TEXT_CHARACTERS} characters, none of them NUL")
        error = storage_key_error(value) if name == "storage_key" else None
        if error is not None:
            raise BadControlLine(f"storage_key {error}")
        self.result_fields[name] = value


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise BadControlLine("expected key=value")
    return key.strip(), value.strip()


def _json_or_text(text: str) -> Any:
    """Return the JSON value in `text`, or `text` itself if it is not JSON, or nested too deeply for the metadata."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text
    return value if _depth(value) < MAX_NESTING else text  # the metadata itself is one level


def _depth(value: Any) -> int:
    """Return how deep arrays and objects are nested in `value`."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, list | dict)]:
        depth += 1
        level = [item for each in level for item in (each.values() if isinstance(each, dict) else each)]
    return depth


class OutputFilter:
    """Remove the control lines from a stream (none if `control_lines` is None). Pass on the rest unchanged, at once.

    Only the start of a line that may be a control line is buffered. With a `prefix`, every line is buffered up to its
    end and begins with the prefix, so that the lines of several programs do not mix. `warn` is called for the first
    lines that are not valid control lines, and at the end with the number of the others. `keep` gets all that is passed
    on, as text without the prefix.
    """

    def __init__(
        self,
        control_lines: ControlLines | None,
        warn: Callable[[str], None],
        *,
        prefix: bytes = b"",
        keep: Callable[[str], object] | None = None,
    ) -> None:
        self._control_lines = control_lines
        self._keep = keep
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._warn = warn
        self._prefix = prefix
        self._buffer = b""
        self._is_inside = False  # the start of the current line was passed on
        self._invalid = 0  # lines that are not valid control lines

    def feed(self, data: bytes) -> bytes:
        """Return the output to pass on, from the buffer and `data`."""
        text = self._buffer + data
        end = text.rfind(b"\n") + 1
        passed, self._buffer = self._without_control_lines(text[:end]), text[end:]
        self._is_inside = self._is_inside and not end
        if len(self._buffer) > LINE_BYTES or not (self._prefix or self._may_be_control_line()):
            if len(self._buffer) > LINE_BYTES and not self._is_inside:
                self._is_control_line(self._buffer)  # too long for a control line: this only warns
            passed += self._buffer
            self._is_inside = self._is_inside or bool(self._buffer)
            self._buffer = b""
        return self._prefixed(passed)

    def _prefixed(self, output: bytes, *, is_end: bool = False) -> bytes:
        """Add the prefix to each line, and a line end to an open line or piece, because another program may follow."""
        if self._keep is not None:
            self._keep(self._decode(output, final=is_end))
        if not self._prefix or not output:
            return output
        return b"".join(self._prefix + line + b"\n" for line in output.removesuffix(b"\n").split(b"\n"))

    def _without_control_lines(self, lines: bytes) -> bytes:
        """Return complete lines without the control lines. The first is not one if its start was passed on before."""
        if b"::" not in lines:
            return lines
        passed = [
            line
            for number, line in enumerate(lines[:-1].split(b"\n"))
            if (number == 0 and self._is_inside) or not self._is_control_line(line)
        ]
        return b"".join(line + b"\n" for line in passed)

    def end(self) -> bytes:
        """Return the rest of the output at the end of the stream, whose last line may have no line end."""
        rest, self._buffer = self._buffer, b""
        passed = b"" if not self._is_inside and self._is_control_line(rest) else rest
        if self._invalid > WARNINGS:
            more = self._invalid - WARNINGS
            self._warn(f"not a control line, passed on: {more} more {'line' if more == 1 else 'lines'}")
        return self._prefixed(passed, is_end=True)

    def _may_be_control_line(self) -> bool:
        if self._control_lines is None:
            return False
        start = self._buffer[:12]
        return not self._is_inside and any(start.startswith(verb) or verb.startswith(start) for verb in _VERBS)

    def _is_control_line(self, line: bytes) -> bool:
        if self._control_lines is None or not line.startswith(b"::"):
            return False
        try:
            return self._control_lines.take(line.rstrip(b"\r\n"))
        except BadControlLine as bad:
            self._invalid += 1
            if self._invalid <= WARNINGS:
                self._warn(f"not a control line, passed on: {line[:80].decode(errors='replace').rstrip()!r}: {bad}")
            return False


class Tail:
    """The last lines of a stream, for a failed job's message."""

    def __init__(self, lines: int = 20, characters: int = 3000) -> None:
        self._lines: deque[bytes] = deque(maxlen=lines)
        self._open = b""
        self._characters = characters

    def feed(self, data: bytes) -> None:
        first, *rest = data.split(b"\n")
        self._open = (self._open + first)[-self._characters :]
        for line in rest:
            self._lines.append(self._open)
            self._open = line[-self._characters :]

    @property
    def text(self) -> str:
        lines = [*self._lines, self._open] if self._open else list(self._lines)
        return b"\n".join(lines).decode(errors="replace").strip()[-self._characters :]


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`, also if another process has made the descriptor non-blocking. Raises OSError."""
    poll, rest = select.poll(), memoryview(data)
    poll.register(fd, select.POLLOUT)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:
            poll.poll()


def print_message(text: str) -> None:
    """Write a message to stderr, without its buffer: a blocked write would keep the lock of the buffer at the exit."""
    with contextlib.suppress(OSError):
        write_all(2, f"{text}\n".encode(errors="backslashreplace"))


class OutputWriter:
    """Write to a file descriptor from a thread, so that a slow reader delays the program but not the event loop.

    If a write fails (a closed pipe, a full disk), all further output is dropped and the work continues.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[tuple[bytes, asyncio.Future[None]] | None] = queue.SimpleQueue()
        self._is_broken = False
        threading.Thread(target=self._run, name=f"writer of fd {fd}", daemon=True).start()

    async def write(self, data: bytes) -> None:
        """Write `data`, and return when it is written."""
        if data and not self._is_broken:
            written: asyncio.Future[None] = self._loop.create_future()
            self._queue.put((data, written))
            await written

    def close(self) -> None:
        """End the thread. The descriptor stays open."""
        self._queue.put(None)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            data, written = item
            try:
                if not self._is_broken:
                    write_all(self._fd, data)
            except OSError:
                self._is_broken = True
            call_on(self._loop, settle, written)
