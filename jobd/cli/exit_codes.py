"""Exit codes, and the translation of errors into a line on stderr and an exit code.

Commands raise CliError, or do not handle the client's errors.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

import click

from jobd.cli import terminal

if TYPE_CHECKING:
    from jobd.client.errors import JobdError

DONE: Final = 0
FAILED: Final = 1
USAGE: Final = 2
UNREACHABLE: Final = 3
REJECTED: Final = 4
UNAUTHORISED: Final = 5
IO_ERROR: Final = 74
TRY_AGAIN: Final = 75
CONFIG: Final = 78
INTERRUPTED: Final = 130

# Error codes with an exit code other than "not found or rejected".
_BY_CODE: Final = {
    "unauthorized": UNAUTHORISED,
    "forbidden": UNAUTHORISED,
    "internal_error": FAILED,
    "request_timeout": TRY_AGAIN,
    "overloaded": TRY_AGAIN,
    "shutting_down": TRY_AGAIN,
    "not_leader": TRY_AGAIN,
    "artifacts_unavailable": TRY_AGAIN,
    "outcome_unknown": TRY_AGAIN,
    "storage_full": TRY_AGAIN,
    "too_many_jobs": TRY_AGAIN,
    "too_many_queues": TRY_AGAIN,
    "unreachable": UNREACHABLE,
    "bad_response": UNREACHABLE,
}

_TIME_FIELDS: Final = frozenset({"delay_ms", "run_at", "expires_in_ms", "expires_at"})


class CliError(Exception):
    """An error with an exit code and a one-line message that says what to do."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


def exit_code_of(code: str) -> int:
    return _BY_CODE.get(code, REJECTED)


@contextlib.contextmanager
def explaining_full_disk() -> Iterator[None]:
    """Inside the context, a full disk becomes a CliError that says what to do."""
    from jobd.model.storage import DiskFull

    try:
        yield
    except DiskFull as error:
        raise CliError(f"The disk is full: {error}. Free some space and try again", IO_ERROR) from None


def run(program: click.Command, name: str, argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (sys.argv by default) and return the exit code. Errors become one line on stderr."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for characters that the terminal cannot show
    from jobd.cli.params import ConnectionOptions

    options = ConnectionOptions()
    args = list(argv) if argv is not None else sys.argv[1:]
    try:
        code = program.main(args=args, prog_name=name, standalone_mode=False, obj=options)
        sys.stdout.flush()
        return code if isinstance(code, int) else DONE
    except BaseException as error:
        return _report(error, name, args, options.token_source)
    finally:
        try:
            sys.stdout.flush()
        except OSError:
            _discard_stdout()


def _open_closed_streams() -> None:
    """Open the null device for each closed standard stream, so that no file or socket gets its number."""
    if sys.stdin is None:
        sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY))
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")  # writes fail, as on a full disk
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def _discard_stdout() -> None:
    """Discard output that cannot be written. Otherwise Python tries again at exit and changes the exit code to 120."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(error: BaseException, name: str, args: Sequence[str], token_source: str | None) -> int:
    """Print `error` on stderr and return its exit code. An unexpected exception is a bug and is raised again."""
    if isinstance(error, SystemExit) and type(sys.stdout).__name__.endswith("PacifyFlushWrapper"):
        error = BrokenPipeError()  # click turned it into exit 1, and replaced the stream
    if isinstance(error, BrokenPipeError):
        _discard_stdout()  # the reader closed the pipe (`| head`)
        return DONE
    text, code = _described(error, name, args, token_source)
    terminal.say(f"{name}: {text}")
    source = error.__cause__ if isinstance(error, click.Abort) else error  # click replaces a KeyboardInterrupt
    for note in getattr(source, "__notes__", ()):
        terminal.say(f"{name}: {note}")
    return code


def _described(error: BaseException, name: str, args: Sequence[str], token_source: str | None) -> tuple[str, int]:
    from jobd.client.errors import InvalidRequest, JobdError, NotLeader, Unauthorized, Unreachable

    match error:
        case click.UsageError():
            path = error.ctx.command_path if error.ctx else name
            text = re.sub(r"\n\s*", " ", _sentence(error.format_message()))
            return f"{text}{'' if text.endswith('?') else '.'} See: {path} --help", USAGE
        case UnicodeEncodeError() | InvalidRequest() if (
            invalid := next((arg for arg in args if not _is_utf8(arg)), None)
        ) is not None:
            return f"the argument {invalid!r} is not UTF-8", USAGE
        case click.FileError():
            return _sentence(error.format_message()), IO_ERROR
        case click.Abort() | KeyboardInterrupt():
            return "interrupted", INTERRUPTED
        case CliError():
            return str(error), error.code
        case Unauthorized():
            advice = "the worker API over TCP needs a token: give --token-file FILE or set JOBD_WORKER_TOKEN_FILE"
            advice += ". For an address of the admin API, use --admin-url"
            text = f"the daemon rejected the token from {token_source}" if token_source else advice
            return f"{text} [{error.code}]", UNAUTHORISED
        case JobdError(code="job_exists", details={"differs_in": [*fields]}) if _TIME_FIELDS & set(fields):
            options = "--delay and --run-at set delay_ms or run_at, --expires sets expires_in_ms or expires_at"
            return f"{_sentence(error.message)}. {options} [{error.code}]", exit_code_of(error.code)
        case JobdError():
            advice = _advice(error) if isinstance(error, Unreachable | NotLeader) else ""
            return f"{_sentence(error.message)}{advice} [{error.code}]", exit_code_of(error.code)
        case OSError():
            text = "stdout is closed" if error.errno == errno.EBADF else error.strerror or str(error)
            return f"{text}{f': {error.filename}' if error.filename else ''}", IO_ERROR
        case Exception() if isinstance(code := getattr(error, "exit_code", None), int):  # of store and settings
            return _sentence(str(error)), code
        case _:
            raise error


def _advice(error: JobdError) -> str:
    if error.details.get("leader"):
        return ". Give the addresses of all nodes, separated by commas"
    if error.code == "not_leader" or "tried" in error.details:
        return ". To see why no node leads: jobctl cluster"
    if getattr(error, "is_slow", False):
        return ". It or its machine may hang: see its log. A requested change may have been made"
    if os.strerror(errno.EACCES) in error.message:
        return ". Your user may not use this socket: under systemd, join its group, jobd-workers or jobd-admins"
    return ". Is jobd running there? Give its address with --socket, --url or --admin-url"


def _is_utf8(argument: str) -> bool:
    """Return whether the argument was valid UTF-8. If not, Python has put surrogates in it."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def _sentence(text: str) -> str:
    return text.rstrip().rstrip(".")
