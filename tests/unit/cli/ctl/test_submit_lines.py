"""Lines of stdin as bulks of create requests, without a daemon."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Iterable, Mapping
from typing import Any, cast

import msgspec
import pytest

from jobd.cli.ctl.submit_lines import BULK_BYTES, BULK_JOBS, LINE_BYTES, Content, LineSubmitter, cut_bulks, read_lines
from jobd.cli.exit_codes import CliError
from jobd.client import JobClient
from jobd.client.errors import InvalidRequest, StorageFull, TooLarge, Unreachable


def bulks_of(*lines: bytes | None, content: Content = "json", shared_bytes: int = 2) -> list[list[int]]:
    numbered = (None if line is None else (number, line) for number, line in enumerate(lines, 1))
    return [[line.number for line in bulk] for bulk in cut_bulks(numbered, content, shared_bytes)]


def test_a_bulk_has_at_most_as_many_jobs_and_bytes_as_the_daemon_accepts() -> None:
    assert [len(bulk) for bulk in bulks_of(*[b"1"] * (BULK_JOBS + 1))] == [BULK_JOBS, 1]
    third = b'"' + b"x" * (BULK_BYTES // 3) + b'"'
    assert bulks_of(b"1", third, third, third, b"2") == [[1, 2, 3], [4, 5]]
    too_long = b'"' + b"x" * BULK_BYTES + b'"'  # the daemon rejects it
    assert bulks_of(b"1", too_long, b"2") == [[1], [2], [3]]
    text = b"\x01" * (BULK_BYTES // 10)  # six times as long in JSON
    assert bulks_of(text, text, content="text") == [[1], [2]]
    assert bulks_of(b"1", b"2", shared_bytes=BULK_BYTES) == [[1], [2]]


@pytest.mark.parametrize("content", ["json", "text", "full"])
def test_the_body_of_a_bulk_is_within_the_limit(content: Content) -> None:
    line = {"json": b'"a"', "text": "ü\t".encode(), "full": b'{"queue": "q", "payload": 1}'}[content]
    options = {"queue": "video", "backoff": {"kind": "fixed"}}
    lines = ((number, line) for number in range(1, 2000))
    client = FakeClient(max_jobs=BULK_JOBS)
    submitter = LineSubmitter(cast(JobClient, client), options, as_json=False)
    for bulk in cut_bulks(lines, content, len(msgspec.json.encode(options))):
        submitter._create(bulk)
        bodies = msgspec.json.encode({"jobs": [{"id": "x" * 36} | job for job in client.bulks[-1]]})
        assert len(bodies) <= sum(each.size + len(msgspec.json.encode(options)) for each in bulk)


def test_a_bulk_is_not_kept_back_for_lines_that_have_not_arrived() -> None:
    assert bulks_of(b"1", b"2", None, None, b"3") == [[1, 2], [5]]


def test_empty_lines_are_skipped_unless_they_are_texts() -> None:
    assert bulks_of(b"1", b"", b" \r", b"2") == [[1, 4]]
    assert bulks_of(b"a", b"", b"b", content="text") == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("content", "line", "why"),
    [
        ("json", b"{a", "it is not valid JSON"),
        ("json", b'"\xff"', "it is not "),
        ("text", b"\xff", "it is not UTF-8"),
        ("full", b"[1]", "it must be a JSON object"),
    ],
)
def test_the_lines_before_a_bad_line_are_yielded(content: Content, line: bytes, why: str) -> None:
    bulks = cut_bulks(iter([(1, b"{}"), (2, line), (3, b"{}")]), content, 0)
    assert [each.number for each in next(bulks)] == [1]
    with pytest.raises(CliError, match=f"line 2: .*{why}") as raised:
        next(bulks)
    assert raised.value.code == 4


def test_lines_are_read_as_they_arrive_and_a_long_one_needs_bounded_memory() -> None:
    ours, theirs = os.pipe()
    lines = read_lines(ours)
    assert next(lines) is None
    os.write(theirs, b"1\n\n3")
    assert [next(lines) for _ in range(3)] == [(1, b"1"), (2, b""), None]
    os.write(theirs, b"3\n4")
    os.close(theirs)
    assert list(lines) == [(3, b"33"), (4, b"4")]
    os.close(ours)
    zeros = os.open("/dev/zero", os.O_RDONLY)
    tracemalloc.start()
    with pytest.raises(CliError, match=r"line 1: it is longer than 64\.0 MiB"):
        list(read_lines(zeros))
    assert tracemalloc.get_traced_memory()[1] < 3 * LINE_BYTES
    tracemalloc.stop()
    os.close(zeros)


class FakeClient:
    """Creates bulks of at most `max_jobs` jobs, and raises `error` for a bulk with the payload 13."""

    def __init__(self, max_jobs: int = 4, error: BaseException | None = None) -> None:
        self.max_jobs = max_jobs
        self.error = error
        self.bulks: list[list[dict[str, Any]]] = []

    def create_jobs(self, jobs: Iterable[Mapping[str, Any]]) -> list[_Created]:
        bulk = [dict(job) for job in jobs]
        if len(bulk) > self.max_jobs:
            raise TooLarge("The bulk is too large.", details={"field": "$.jobs"})
        if self.error is not None and any(bytes(job["payload"]) == b"13" for job in bulk):
            raise self.error
        self.bulks.append(bulk)
        return [_Created(str(len(self.bulks)))] * len(bulk)


class _Created(msgspec.Struct):
    id: str


def submit(client: FakeClient, lines: bytes, content: Content = "json", **options: Any) -> None:
    ours, theirs = os.pipe()
    os.write(theirs, lines)
    os.close(theirs)
    try:
        LineSubmitter(cast(JobClient, client), options, as_json=False).submit_all(ours, content)
    finally:
        os.close(ours)


NUMBERS = b"\n".join(b"%d" % number for number in range(10, 18))


@pytest.mark.parametrize(
    ("error", "created", "text", "note"),
    [
        (
            InvalidRequest("jobs[0]: No such thing. No job was created.", details={"field": "$.jobs[0].payload"}),
            3,
            "line 4: No such thing [invalid_request]",
            "3 jobs were created. Go on from line 4",
        ),
        (StorageFull("Full."), 0, "Full.", "0 jobs were created. Go on from line 1"),
        (Unreachable("Gone."), 0, "Gone.", "perhaps all jobs of lines 1 to 4. Look with jobctl jobs, then go on from"),
        (KeyboardInterrupt(), 0, "", "perhaps all jobs of lines 1 to 4. Look with jobctl jobs, then go on from line 1"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_says_what_was_created_and_from_which_line_to_go_on(
    error: BaseException, created: int, text: str, note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    client = FakeClient(error=error)
    with pytest.raises(BaseException) as raised:  # noqa: PT011 - also KeyboardInterrupt
        submit(client, NUMBERS)
    shown = raised.value
    assert text in str(shown)
    assert note in "".join(shown.__notes__)
    assert [bytes(job["payload"]) for bulk in client.bulks for job in bulk] == [b"10", b"11", b"12"][:created]
    assert len(capsys.readouterr().out.splitlines()) == created


def test_the_fields_of_a_line_replace_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    client = FakeClient()
    lines = b'{"queue": "own", "run_at": 1}\n{"delay_ms": 2}\n{}'
    submit(client, lines, "full", queue="q", delay_ms=7, kind=None)
    assert [{name: msgspec.json.decode(msgspec.json.encode(job[name])) for name in job} for job in client.bulks[0]] == [
        {"queue": "own", "run_at": 1},
        {"queue": "q", "delay_ms": 2},
        {"queue": "q", "delay_ms": 7},
    ]
