"""Error messages of failed handlers: `Type: message`, then the traceback without jobd's own frames."""

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
    first, *more = headed(type(error).__name__, _text(error)).split("\n")
    notes = [str(note) for note in getattr(error, "__notes__", ())]
    return fitted(first, "\n".join([*more, *notes, _trace(error)]).strip("\n"))


def headed(name: str, message: str) -> str:
    """Return `Type: message`, or the type alone if there is no message."""
    return f"{name}: {message}" if message else name


def fitted(first: str, rest: str) -> str:
    """Join both into an `error_message` of legal length, escaping what JSON cannot carry."""
    first, rest = (each.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00") for each in (first, rest))
    room = MESSAGE_CHARACTERS - len(first) - 1
    if len(rest) > room:
        kept = room - len(_CUT)
        # The end of a traceback says more than its beginning.
        rest = f"{rest[: kept // 3]}{_CUT}{rest[len(rest) - (kept - kept // 3) :]}" if kept > len(_CUT) else ""
    if len(first) > MESSAGE_CHARACTERS:
        first = f"{first[: MESSAGE_CHARACTERS - 1]}…"
    return f"{first}\n{rest}" if rest else first


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # __str__ of the handler's exception class may raise
        return "<exception str() failed>"


def _trace(error: BaseException) -> str:
    """Format the traceback and its chain without jobd's frames and the final lines, which repeat the error."""
    told = traceback.TracebackException.from_exception(error, compact=True)
    _strip(told)
    if not (told.stack or told.__cause__ or told.__context__ or told.exceptions):
        return ""
    return "".join(told.format()).removesuffix("".join(told.format_exception_only()))


def _strip(told: traceback.TracebackException) -> None:
    told.stack[:] = [frame for frame in told.stack if not frame.filename.startswith(_OURS)]
    for other in (told.__cause__, told.__context__, *(told.exceptions or ())):
        if other is not None:
            _strip(other)
