"""Format the error messages of failed handlers: `Type: message`, then the traceback without jobd's own frames."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Final

MESSAGE_CHARACTERS: Final = 4096  # of an error_message
_OURS: Final = f"{Path(__file__).parents[1]}{os.sep}"
_CUT: Final = "\n[...]\n"


def describe_error(error: BaseException) -> str:
    """Describe `error`. The first line is complete. If the rest is too long, its middle is cut out."""
    name, message = type(error).__name__, safe_text(error)
    first, *more = f"{name}: {message}".split("\n") if message else [name]
    try:
        rest = [*map(safe_text, getattr(error, "__notes__", ())), _trace(error)]
    except Exception as failed:  # for example, __notes__ can be of any type
        rest = [f"<no traceback: {type(failed).__name__}>"]
    return join_message(first, "\n".join([*more, *rest]).strip("\n"))


def join_message(first: str, rest: str) -> str:
    """Join both into an `error_message` of valid length. Escape characters that JSON cannot express."""
    first, rest = (each.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00") for each in (first, rest))
    space = MESSAGE_CHARACTERS - len(first) - 1
    if len(rest) > space:
        length = space - len(_CUT)
        # The end of a traceback is more useful than its beginning.
        rest = f"{rest[: length // 3]}{_CUT}{rest[len(rest) - (length - length // 3) :]}" if length > len(_CUT) else ""
    if len(first) > MESSAGE_CHARACTERS:
        first = f"{first[: MESSAGE_CHARACTERS - 1]}…"
    return f"{first}\n{rest}" if rest else first


def safe_text(value: object) -> str:
    """Return `str(value)`, or a placeholder if it fails, because the error of a handler can have any `__str__`."""
    try:
        return str(value)
    except BaseException:  # SystemExit too: it ends the job, not the worker
        return f"<{'exception' if isinstance(value, BaseException) else type(value).__name__} str() failed>"


def _trace(error: BaseException) -> str:
    """Format the traceback and its chain without jobd's frames and the final lines, which repeat the error."""
    trace = traceback.TracebackException.from_exception(error, compact=True)
    _strip(trace)
    if not (trace.stack or trace.__cause__ or trace.__context__ or trace.exceptions):
        return ""
    return "".join(trace.format()).removesuffix("".join(trace.format_exception_only()))


def _strip(trace: traceback.TracebackException) -> None:
    trace.stack[:] = [frame for frame in trace.stack if not frame.filename.startswith(_OURS)]
    for other in (trace.__cause__, trace.__context__, *(trace.exceptions or ())):
        if other is not None:
            _strip(other)
