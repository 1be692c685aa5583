"""Log to stderr: one line per event, without secrets and control characters.

This includes the lines of the standard library's loggers. A thread writes the lines: if the reader of stderr stops
reading, lines are lost, but the daemon is not blocked.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import re
import select
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, Final, TypeAlias

import structlog
from msgspec import Struct, structs

Fields: TypeAlias = MutableMapping[str, Any]

REDACTED: Final = "[redacted]"
MAX_DEPTH: Final = 6  # deeper values are cut, because a value may contain itself
FRAMES: Final = 6  # innermost frames of an error that are logged in one line
MAX_QUEUED_CHARS: Final = 1 << 20  # while stderr is not read; further lines are dropped and counted
PIECE_CHARS: Final = 64 << 10  # of lines per write, because each write needs the GIL
EXIT_FLUSH_S: Final = 2.0  # to write the remaining lines when the process ends
CRITICAL_FLUSH_S: Final = 1.0  # to write a critical line, because the process may end right after it

_SECRET: Final = frozenset({"lock_id", "lockid", "token", "authorization", "admin_token", "worker_token"})
_BEARER: Final = re.compile(r"(bearer\s+)\S+", re.IGNORECASE)
# C0, DEL and C1, Unicode line ends, bidirectional control characters, and surrogates.
_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_PLAIN: Final = re.compile(r"[^\s\"=\\]+")
_NO_KEY: Final = re.compile(r"[^\w.-]")
_COLOURS: Final = {"debug": "2", "info": "32", "warning": "33", "error": "31", "critical": "1;31"}


def configure(level: str, format: str) -> None:
    """Log every event of `level` and above in the format `console`, `json` or `logfmt`.

    `auto` is `console` on a terminal, else `logfmt`. Raises ValueError for other names. May be called again.
    """
    terminal = sys.stderr is not None and sys.stderr.isatty()  # None: the process has no stderr
    chosen = ("console" if terminal else "logfmt") if format == "auto" else format
    render: dict[str, structlog.typing.Processor] = {
        "console": _console(terminal and not os.environ.get("NO_COLOR")),
        "json": _json,
        "logfmt": _logfmt,
    }
    if chosen not in render:
        raise ValueError(f"log format {format!r}: expected auto, console, logfmt or json")
    structlog.configure(
        processors=[
            _add_logger_name,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _add_short_error if chosen == "logfmt" else _add_traceback,
            _redact,
            render[chosen],
        ],
        logger_factory=_StderrLogger,
        cache_logger_on_first_use=False,  # else set_level would not affect loggers that are already in use
    )
    logging.captureWarnings(True)
    logging.getLogger().handlers[:] = [_StdlibHandler()]
    set_level(level)


def set_level(level: str) -> None:
    """Drop events below `level` (debug, info, warning, error, critical). Raises ValueError.

    Other packages log only warnings and above, because their debug lines contain payloads and lock ids.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"log level {level!r}: expected debug, info, warning, error or critical")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(number))
    logging.getLogger("jobd").setLevel(number)
    root = logging.getLogger()
    root.setLevel(max(number, logging.WARNING))
    for handler in root.handlers:
        handler.setLevel(root.level)  # a package may have given its own logger a level


def flush(timeout_s: float = CRITICAL_FLUSH_S) -> bool:
    """Wait until every line is written. Return False if that takes longer than `timeout_s`."""
    return _writer.flush(timeout_s)


def _log_dropped(dropped: int) -> None:
    structlog.get_logger("jobd.log").error("log_lines_dropped", count=dropped, why="stderr was not read")


class _StderrLogger:
    """A structlog logger that never waits for stderr, except after a critical line."""

    def __init__(self, name: str = "") -> None:
        self.name = name

    def msg(self, line: str) -> None:
        _writer.write(line)

    def critical(self, line: str) -> None:
        _writer.write(line)
        _writer.flush(CRITICAL_FLUSH_S)

    debug = info = warning = error = exception = msg


class _StdlibHandler(logging.Handler):
    """Log the lines of the standard library's loggers (aiohttp, asyncio, warnings)."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            event = record.getMessage()
        except (TypeError, ValueError):  # the arguments do not match the message
            event = str(record.msg)
        level = min(max(record.levelno // 10 * 10, logging.DEBUG), logging.CRITICAL)
        structlog.get_logger(record.name).log(level, event, exc_info=record.exc_info)


def _add_logger_name(logger: Any, _: str, event: Fields) -> Fields:
    if logger.name:
        event["logger"] = logger.name
    return event


def _error(event: Fields) -> BaseException | None:
    exc_info = event.pop("exc_info", None)
    if exc_info is True:
        exc_info = sys.exc_info()
    error = exc_info[1] if isinstance(exc_info, tuple) else exc_info
    return error if isinstance(error, BaseException) else None


def _add_traceback(_: Any, __: str, event: Fields) -> Fields:
    if (error := _error(event)) is not None:
        event["traceback"] = "".join(traceback.format_exception(error)).rstrip()
    return event


def _add_short_error(_: Any, __: str, event: Fields) -> Fields:
    """Log an error as `exception` and `at`, innermost frame first, because a traceback is too long for logfmt."""
    if (error := _error(event)) is not None:
        event["exception"] = "".join(traceback.format_exception_only(error)).rstrip()
        frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
        event["at"] = " < ".join(f"{os.path.basename(at.filename)}:{at.lineno} {at.name}" for at in reversed(frames))
    return event


def _redact(_: Any, __: str, event: Fields) -> Fields:
    return {str(key): REDACTED if _secret(key) else _plain(value) for key, value in event.items()}


def _secret(key: object) -> bool:
    return str(key).lower().replace("-", "_") in _SECRET


def _plain(value: Any, depth: int = 0) -> Any:
    """Convert `value` to JSON types, with secrets redacted at every depth."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if depth > MAX_DEPTH:
        return "..."
    if isinstance(value, Struct):
        value = structs.asdict(value)
    if isinstance(value, dict):
        return {str(key): REDACTED if _secret(key) else _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, depth + 1) for item in value]
    return _BEARER.sub(rf"\1{REDACTED}", str(value))


def _value(value: Any) -> str:
    """Format a value: a plain word unchanged, None as nothing, anything else as JSON."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text if _PLAIN.fullmatch(text) and not _CONTROL.search(text) else _json_text(text)


def _json_text(value: Any) -> str:
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))


def _pairs(fields: Fields) -> list[str]:
    return [f"{_NO_KEY.sub('_', key)}={_value(value)}" for key, value in fields.items()]


def _ordered(event: Fields) -> Fields:
    first = {key: event[key] for key in ("timestamp", "level", "event", "logger") if key in event}
    return first | dict(event)


def _logfmt(_: Any, __: str, event: Fields) -> str:
    return " ".join(_pairs(_ordered(event)))


def _json(_: Any, __: str, event: Fields) -> str:
    return _json_text(_ordered(event))


def _console(colours: bool) -> structlog.typing.Processor:
    """Return the renderer for a terminal: time, level, event, then the fields as in logfmt."""

    def render(_: Any, __: str, event: Fields) -> str:
        rest = dict(_ordered(event))
        at, level, name = (str(rest.pop(key, "")) for key in ("timestamp", "level", "event"))
        level_text = f"\x1b[{_COLOURS.get(level, '0')}m{level:<8}\x1b[0m" if colours else f"{level:<8}"
        return " ".join([at, level_text, _json_text(name)[1:-1], *_pairs(rest)])

    return render


class LogWriter:
    """Write lines to stderr in a thread, in their order.

    `on_dropped` logs the number of dropped lines once lines are accepted again.
    """

    def __init__(self, on_dropped: Callable[[int], object]) -> None:
        self._on_dropped = on_dropped
        self._change = threading.Condition()
        self._lines: deque[str] = deque()
        self._chars = 0
        self._dropped = 0
        self._is_writing = False
        self._thread: threading.Thread | None = None

    def write(self, line: str) -> None:
        """Queue `line`, or drop it if the queue is full."""
        with self._change:
            if self._lines and self._chars + len(line) > MAX_QUEUED_CHARS:
                self._dropped += 1
                return
            self._lines.append(line)
            self._chars += len(line)
            if self._thread is None:
                # A daemon thread, so that a blocked write does not keep the process from ending.
                self._thread = threading.Thread(target=self._run, name="log", daemon=True)
                self._thread.start()
                atexit.register(self.flush, EXIT_FLUSH_S)
            self._change.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until every line is written. Return False if that takes longer than `timeout_s`."""
        with self._change:
            return self._change.wait_for(lambda: not (self._lines or self._dropped or self._is_writing), timeout_s)

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
                    self._on_dropped(dropped)  # before the lines that follow the dropped ones
            for piece in _pieces(lines):
                _write(piece)


def _pieces(lines: deque[str]) -> Iterator[str]:
    """Join lines into pieces of about PIECE_CHARS."""
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
    """Write to stderr without Python's buffers, whose locks could block the exit of the process. Ignores errors."""
    if sys.stderr is None:  # the process has no stderr
        return
    with contextlib.suppress(OSError, ValueError):
        stream: Any = getattr(sys.stderr.buffer, "raw", sys.stderr.buffer)
        rest = memoryview(text.encode(errors="backslashreplace"))
        while rest:
            written = stream.write(rest)
            if written is None:  # another process made the terminal non-blocking
                select.select((), (stream,), ())
            rest = rest[written or 0 :]


_writer: Final = LogWriter(_log_dropped)
