"""What may stand on the command line: durations, points in time, JSON. Talks to no daemon."""

from __future__ import annotations

import re
import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import click

from jobd.cli import terminal

if TYPE_CHECKING:
    import msgspec

_UNITS_MS: Final = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SAFE_MS: Final = 10**15
_TIME: Final = "2026-03-01T14:00 (UTC) or 2026-03-01T14:00+01:00"


def duration_ms(text: str) -> int:
    """`500ms`, `10s`, `1.5h`, `1h30m`, `7d`, or `0`, as milliseconds. ValueError otherwise."""
    if text == "0":
        return 0
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError("a duration is a number with ms, s, m, h or d, as in 10s or 1h30m")
    total = round(sum(float(number) * _UNITS_MS[unit] for number, unit in parts))
    if total > _SAFE_MS:
        raise ValueError("this duration is too long")
    return total


def moment_ms(text: str, now_ms: int) -> int:
    """A point in time as Unix ms: ISO text (UTC unless it says an offset), Unix ms, or a duration from now."""
    if re.fullmatch(r"\d{11,15}", text):
        return int(text)
    try:
        return now_ms + duration_ms(text)
    except ValueError:
        pass
    try:
        at = datetime.fromisoformat(text.removesuffix(" UTC"))
        return round((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1000)
    except (ValueError, OverflowError, OSError):
        raise ValueError(f"a time is {_TIME}, Unix milliseconds, or a duration from now as in 2h") from None


def past_ms(text: str, now_ms: int) -> int:
    """A point in the past as Unix ms: as `moment_ms`, but a duration is one before now."""
    try:
        return now_ms - duration_ms(text)
    except ValueError:
        pass
    try:
        return moment_ms(text, now_ms)
    except ValueError:
        raise ValueError(f"a time is {_TIME}, Unix milliseconds, or how long ago it was as in 2h") from None


if TYPE_CHECKING:
    _Number = click.ParamType[int]
    _Text = click.ParamType[str]
else:
    _Number = _Text = click.ParamType  # which has no parameter in older click


class _Name(_Text):
    """An id, or the name of a queue, a worker or the like: never empty, for that is as if it had not been given."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value == "":
            self.fail("it is empty: is a variable not set? Leave the option out, or give it a value", param, ctx)
        return str(value)


class _Duration(_Number):
    """A duration option; its value is milliseconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else duration_ms(value)
        except ValueError as error:
            self.fail(f"{value!r}: {error}", param, ctx)


class _Moment(_Number):
    """A point in time; its value is Unix ms."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else moment_ms(value, round(time.time() * 1000))
        except ValueError as error:
            self.fail(f"{value!r}: {error}", param, ctx)


class _Past(_Number):
    """A point in the past; its value is Unix ms."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else past_ms(value, round(time.time() * 1000))
        except ValueError as error:
            self.fail(f"{value!r}: {error}", param, ctx)


NAME: Final = _Name()
DURATION: Final = _Duration()
PAST: Final = _Past()
MOMENT: Final = _Moment()


def json_text(text: str, what: str) -> msgspec.Raw:
    """`text` as a JSON value that is sent as it stands. A usage error says how to quote where it is none."""
    import msgspec

    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError) as error:
        hint = "quote it for the shell, as in '{\"size\": 3}' or '\"some text\"', or give - and pipe it in"
        raise click.UsageError(f"{what} is no valid JSON ({error}): {hint}") from None
    return msgspec.Raw(text.encode())


def read_stdin(what: str) -> str:
    """All of stdin as text."""
    if sys.stdin.isatty():
        terminal.say(f"Reading {what} from the terminal; end it with Ctrl-D.")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{what} on stdin is not UTF-8 ({error.reason} at byte {error.start})") from None
