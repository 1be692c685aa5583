"""Format the error messages of failed handlers: `Type: message`, then the traceback without jobd's own frames."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Any, Final

from msgspec import UNSET

from jobd.client.outcomes import Discard, PayloadMismatch, Retry

MESSAGE_CHARACTERS: Final = 4096  # of an error_message
_OURS: Final = f"{Path(__file__).parents[1]}{os.sep}"
_CUT: Final = "\n[...]\n"


def failure_message(error: BaseException) -> str:
    """Return the `error_message`: the text of a Retry or Discard, or any other error with its traceback."""
    if isinstance(error, Retry | Discard | PayloadMismatch):
        first, _, rest = (safe_text(error) or type(error).__name__).partition("\n")
        return join_message(first, rest)
    return describe_error(error)


def failure_options(error: BaseException, *, is_final: bool = False) -> dict[str, Any]:
    """Return the other arguments of `fail`: the class of the error, and whether and when to retry."""
    is_mismatch = isinstance(error, PayloadMismatch)
    options: dict[str, Any] = {"error_code": "payload_mismatch" if is_mismatch else type(error).__name__[:200]}
    if isinstance(error, Retry):
        options["retry_after_ms"] = error.after_ms
        if error.checkpoint is not UNSET:
            options["checkpoint"] = error.checkpoint
    if is_final:
        options["retry"] = False
    return options


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
