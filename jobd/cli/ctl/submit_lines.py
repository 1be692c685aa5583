"""`jobctl submit --lines`: create a job for each line of stdin, in bulks."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import msgspec

from jobd.cli import exit_codes, terminal
from jobd.cli.params import naming_flags
from jobd.client.errors import BadResponse, InvalidRequest, JobdError, OutcomeUnknown, Unreachable
from jobd.model.sizes import byte_size

if TYPE_CHECKING:
    from jobd.client import JobClient
    from jobd.model.responses import JobView

BULK_JOBS: Final = 1000  # limits.bulk
BULK_BYTES: Final = 1 << 20  # limits.body
LINE_BYTES: Final = 64 << 20
_READ_BYTES: Final = 256 << 10
_JOB_BYTES: Final = 80  # of a job in a bulk: its id, the name `payload`, braces and commas
_ALTERNATIVES: Final = {
    "delay_ms": "run_at",
    "run_at": "delay_ms",
    "expires_in_ms": "expires_at",
    "expires_at": "expires_in_ms",
}

Content = Literal["json", "text", "full"]
_decode_object: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Line(NamedTuple):
    """A line of the input, and the fields of a create request that it has. `size` is that of the job in a bulk."""

    number: int
    fields: Mapping[str, Any]
    size: int


def read_lines(fd: int) -> Iterator[tuple[int, bytes] | None]:
    """Yield the lines of `fd` with their numbers, and None before a read that would wait.

    Raises CliError for a line longer than LINE_BYTES.
    """
    number, rest = 1, bytearray()  # of the unfinished line
    while True:
        if not select.select([fd], [], [], 0)[0]:
            yield None
        chunk = os.read(fd, _READ_BYTES)
        rest += chunk
        if b"\n" in chunk:
            *lines, rest = rest.split(b"\n")
            for line in lines:
                yield number, bytes(line)
                number += 1
        if not chunk:
            break
        if len(rest) > LINE_BYTES:
            raise _bad_line(number, f"it is longer than {byte_size(LINE_BYTES)}")
    if rest:
        yield number, bytes(rest)


def parse_line(number: int, text: bytes, content: Content) -> Line:
    """Return the request of a line. Raises CliError if it is not JSON, not an object (`full`), or not UTF-8."""
    try:
        if content == "full":
            return Line(number, _decode_object(text), len(text) + _JOB_BYTES)
        if content == "text":
            payload = msgspec.json.encode(text.decode().removesuffix("\r"))
        else:
            msgspec.json.decode(text)
            payload = text
    except UnicodeDecodeError as error:
        raise _bad_line(number, f"it is not UTF-8 ({error.reason} at byte {error.start})") from None
    except msgspec.ValidationError:
        raise _bad_line(number, "with --full, it must be a JSON object with the fields of a create request") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise _bad_line(number, f"it is not valid JSON ({error}). For lines of text, add --text") from None
    return Line(number, {"payload": msgspec.Raw(payload)}, len(payload) + _JOB_BYTES)


def _bad_line(number: int, why: str) -> exit_codes.CliError:
    return exit_codes.CliError(f"line {number}: {why}", exit_codes.REJECTED)


def cut_bulks(lines: Iterator[tuple[int, bytes] | None], content: Content, shared_bytes: int) -> Iterator[list[Line]]:
    """Yield the lines in bulks within the limits. A bulk is not kept back for lines that have not arrived.

    Empty lines are skipped unless they are texts. `shared_bytes` is the size of the options that all jobs have. Before
    the error of a line, the lines before it are yielded.
    """
    bulk: list[Line] = []
    size = 0
    try:
        for read in lines:
            if read is not None and content != "text" and not read[1].strip():
                continue
            line = None if read is None else parse_line(*read, content)
            added = 0 if line is None else line.size + shared_bytes
            if bulk and (line is None or len(bulk) == BULK_JOBS or size + added > BULK_BYTES):
                yield bulk
                bulk, size = [], 0
            if line is not None:
                bulk.append(line)
                size += added
    except exit_codes.CliError:
        if bulk:
            yield bulk
        raise
    if bulk:
        yield bulk


class LineSubmitter:
    """Creates jobs with `options`, which a line can replace, and prints them."""

    def __init__(self, client: JobClient, options: Mapping[str, Any], *, as_json: bool) -> None:
        self._client = client
        self._options = {name: value for name, value in options.items() if value is not None}
        self._as_json = as_json
        self._created = 0
        self._next = 1  # the first line whose job is not known to be created
        self._sent: Sequence[Line] = ()  # the bulk without a response

    def submit_all(self, fd: int, content: Content) -> None:
        """Create the jobs of all lines. An error has a note that says from which line to go on."""
        if sys.stdin.isatty():
            terminal.say("Reading lines from the terminal; end them with Ctrl-D.")
        try:
            for bulk in cut_bulks(read_lines(fd), content, len(msgspec.json.encode(self._options))):
                self._create(bulk)
        except BaseException as error:
            error.add_note(self._advice(error))
            raise

    def _create(self, bulk: Sequence[Line]) -> None:
        """Create the jobs of a bulk. If it is rejected, those before the rejected line. Raises its error."""
        self._sent = bulk
        try:
            jobs = self._client.create_jobs(self._job(line) for line in bulk)
        except JobdError as error:
            if exit_codes.exit_code_of(error.code) != exit_codes.REJECTED:
                raise
            if len(bulk) == 1:
                raise self._rejection(bulk[0], error) from None
            middle = len(bulk) // 2
            self._create(bulk[:middle])
            self._create(bulk[middle:])
            return
        self._sent = ()
        self._created += len(jobs)
        self._next = bulk[-1].number + 1
        self._print(jobs)

    def _job(self, line: Line) -> dict[str, Any]:
        replaced = {_ALTERNATIVES.get(name) for name in line.fields}
        return {name: value for name, value in self._options.items() if name not in replaced} | dict(line.fields)

    def _rejection(self, line: Line, error: JobdError) -> Exception:
        """Return the error of a line, or of an option if the line does not have the field that was rejected."""
        field = str(error.details.get("field", "")).replace("$.jobs[0]", "$")
        message = error.message.removeprefix("jobs[0]: ").removesuffix(" No job was created.").replace("$.jobs[0]", "$")
        if field.removeprefix("$.").partition(".")[0] in self._options.keys() - line.fields.keys():
            with naming_flags():
                raise InvalidRequest(message, details={"field": field})
        return _bad_line(line.number, f"{message.rstrip('.')} [{error.code}]")

    def _print(self, jobs: Sequence[JobView]) -> None:
        try:
            for job in jobs:
                terminal.emit_json(job, may_indent=False) if self._as_json else terminal.emit(job.id)
            sys.stdout.flush()
        except OSError as error:  # the other commands have nothing left to do then
            raise exit_codes.CliError(f"Cannot print the ids: {error.strerror}", exit_codes.IO_ERROR) from None

    def _advice(self, error: BaseException) -> str:
        text = f"{self._created} {'job was' if self._created == 1 else 'jobs were'} created"
        if not self._sent or not _may_be_applied(error):
            return f"{text}. Go on from line {self._next}"
        first, last = self._sent[0].number, self._sent[-1].number
        named = f"the job of line {first}" if first == last else f"all jobs of lines {first} to {last}"
        return f"{text}, and perhaps {named}. Look with jobctl jobs, then go on from line {first} or {last + 1}"


def _may_be_applied(error: BaseException) -> bool:
    return isinstance(error, KeyboardInterrupt | Unreachable | BadResponse | OutcomeUnknown)
