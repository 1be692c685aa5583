"""Parameter types of the command line (durations, times, JSON), connection options and the group of commands."""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import reduce
from typing import TYPE_CHECKING, Any, Final

import click

from jobd.cli import terminal

if TYPE_CHECKING:
    import msgspec

SETTINGS: Final[dict[str, Any]] = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_UNITS_MS: Final = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SAFE_MS: Final = 10**15
_YEAR_MS: Final = 365 * _UNITS_MS["d"]  # the longest duration in a request
_TIME: Final = "2026-03-01T14:00 (UTC) or 2026-03-01T14:00+01:00"


def duration_ms(text: str) -> int:
    """Parse `500ms`, `10s`, `1.5h`, `1h30m`, `7d` or `0` into milliseconds. Raises ValueError."""
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
    """Parse ISO text (UTC unless it has an offset), Unix ms or a duration from now into Unix ms. Raises ValueError."""
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
        raise ValueError(f"a time is {_TIME}, Unix milliseconds, or a duration from now such as 2h") from None


def moment_or_delay(text: str) -> int | timedelta:
    """Parse a time into Unix ms, and a duration from now into a timedelta. Raises ValueError."""
    try:
        delay_ms = duration_ms(text)
    except ValueError:
        return moment_ms(text, 0)
    if delay_ms > _YEAR_MS:
        raise ValueError("a duration is at most 365d: give a date")
    return timedelta(milliseconds=delay_ms)


def past_ms(text: str, now_ms: int) -> int:
    """Parse a time like `moment_ms`, except that a duration counts back from now."""
    try:
        return now_ms - duration_ms(text)
    except ValueError:
        pass
    try:
        return moment_ms(text, now_ms)
    except ValueError:
        raise ValueError(f"a time is {_TIME}, Unix milliseconds, or an age such as 2h") from None


if TYPE_CHECKING:
    _AnyParam = click.ParamType[Any]
    _TextParam = click.ParamType[str]
else:
    _AnyParam = _TextParam = click.ParamType  # older click has no type parameter


class NameParam(_TextParam):
    """An id or a name. Empty text is an error, because a filter by it would match everything."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value == "":
            self.fail("it is empty. Is a shell variable unset? Omit the option or give it a value", param, ctx)
        return str(value)


class _TimeParam(_AnyParam):
    """A duration or a time, which `parse` converts."""

    def __init__(self, name: str, parse: Callable[[str], int | timedelta]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | timedelta:
        try:
            return self._parse(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(f"{value!r}: {error}", param, ctx)


def _now_ms() -> int:
    return round(time.time() * 1000)


NAME: Final = NameParam()
DURATION: Final = _TimeParam("duration", duration_ms)
PAST: Final = _TimeParam("time", lambda text: past_ms(text, _now_ms()))
MOMENT_OR_DELAY: Final = _TimeParam("time", moment_or_delay)
MOMENT: Final = _TimeParam("time", lambda text: moment_ms(text, _now_ms()))
_AT_LEAST_1: Final = click.IntRange(1)
STATUS: Final = click.Choice(["queued", "processing", "completed", "failed", "cancelled"])

# The bounds of Create in jobd.model.commands.
PRIORITY: Final = click.IntRange(-1000, 1000)
MAX_ATTEMPTS: Final = click.IntRange(1, 1000)
MAX_STALLS: Final = click.IntRange(0, 1000)
_PARAMETERS: Final = {
    "id": "job_id",
    "backoff.base_ms": "backoff_base",
    "backoff.max_ms": "backoff_max",
    "expires_in_ms": "expires_at",
}


@contextlib.contextmanager
def naming_flags() -> Iterator[None]:
    """Inside the context, a rejection of a field that an option of the command sets is a UsageError for the option."""
    from jobd.client.errors import InvalidRequest

    try:
        yield
    except InvalidRequest as error:
        if isinstance(error.__context__, UnicodeEncodeError):
            raise  # exit_codes.py names the argument that is not UTF-8
        field = str(error.details.get("field"))
        name = field.removeprefix("$.")
        name = _PARAMETERS.get(name, name.lower().replace("-", "_"))
        for parameter in click.get_current_context().command.params:
            if parameter.name == name and isinstance(parameter, click.Option):
                text = error.message.removeprefix(f"`{field}`: ")
                raise click.BadParameter(text, param=parameter) from None
        raise


def json_text(text: str, what: str, advice: str = "") -> msgspec.Raw:
    """Check that `text` is JSON and return it unchanged. Raises UsageError with a hint on quoting, and `advice`."""
    import msgspec

    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError) as error:
        hint = f"quote it for the shell, as in '{{\"size\": 3}}' or '\"some text\"',{advice} or give - and pipe it in"
        raise click.UsageError(f"{what} is not valid JSON ({error}): {hint}") from None
    return msgspec.Raw(text.encode())


def read_stdin(what: str) -> str:
    """Read stdin to its end. Raises UsageError if it is not UTF-8."""
    if sys.stdin.isatty():
        terminal.say(f"Reading {what} from the terminal; end it with Ctrl-D.")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{what} on stdin is not UTF-8 ({error.reason} at byte {error.start})") from None


class ConnectionOptions:
    """The connection options, None if not given. They are in `ctx.obj`, so they may precede or follow the command."""

    def __init__(self) -> None:
        self.socket: str | None = None
        self.url: str | None = None
        self.admin_url: str | None = None
        self.token_file: str | None = None
        self.operator: str | None = None
        self.token_source: str | None = None  # where the token of the latest client comes from, in words


class CommandGroup(click.Group):
    """A group whose help lists its commands under titles, in the order in which they were added."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.titles: dict[str, str] = {}  # of each command
        self._modules: dict[str, str] = {}

    def add_lazily(self, title: str, module: str, *names: str) -> None:
        """Add the commands `names` of `module`, which is imported when one of them is used or described."""
        self.titles |= dict.fromkeys(names, title)
        self._modules |= dict.fromkeys(names, module)
        self.commands.update((name, click.Command(name)) for name in names)  # click suggests their names

    def add_all(self, title: str, *commands: click.Command) -> None:
        for command in commands:
            self.add_command(command)
            self.titles[str(command.name)] = title

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self._modules:
            values = vars(importlib.import_module(self._modules[cmd_name])).values()
            return next(each for each in values if isinstance(each, click.Command) and each.name == cmd_name)
        return super().get_command(ctx, cmd_name)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Without a command, print the help on stderr and exit with 2 (older click exits with 0)."""
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help(), err=True)
            ctx.exit(2)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] == "artefact" and "artifact" in self.titles:
            ctx.fail("The command is spelled artifact.")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. A usage error without a context, as of an option without its value, gets the command's."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "") if error.ctx is None else None
            if command is not None:
                error.ctx = click.Context(command, parent=ctx, info_name=command.name)
            raise

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.titles)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title in dict.fromkeys(self.titles.values()):
            commands = {name: self.get_command(ctx, name) for name in self.titles if self.titles[name] == title}
            shown = [(name, each) for name, each in commands.items() if each and not each.hidden]
            with formatter.section(title):
                formatter.write_dl([(name, each.get_short_help_str(70)) for name, each in shown])


def command(*options: Callable[[Any], Any], name: str | None = None) -> Callable[[Any], click.Command]:
    """Return the decorator of a command with these options, which its help shows in this order."""
    return lambda function: click.command(name)(reduce(lambda made, add: add(made), reversed(options), function))


def number_option(
    flag: str, text: str, default: float | None = None, *, kind: _AnyParam = _AT_LEAST_1
) -> Callable[[Any], Any]:
    is_shown = default is not None
    return click.option(flag, type=kind, metavar="N", default=default, show_default=is_shown, help=text)


def limit_option(what: str, default: int, most: int | None = None) -> Callable[[Any], Any]:
    """Add --limit, the maximum number of `what`."""
    return number_option("--limit", f"Maximum number of {what}.", default, kind=click.IntRange(1, most))


def json_option(command: Any) -> Any:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)
