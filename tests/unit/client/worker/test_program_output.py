"""The control lines of a program, and the output that is passed on."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import msgspec
import pytest
from msgspec import UNSET, Raw

from jobd.client.worker.program_output import LINE_BYTES, BadControlLine, ControlLines, OutputFilter, OutputWriter, Tail
from jobd.http.body_scanner import excess_depth
from jobd.model.fields import MAX_NESTING


class ParsedOutput:
    """A filter, and everything that it has found."""

    def __init__(self, *, prefix: bytes = b"") -> None:
        self.progress: list[tuple[Any, ...]] = []
        self.warnings: list[str] = []
        self.control_lines = ControlLines(
            lambda *report: self.progress.append(report[:2] if report[2] is UNSET else report)
        )
        self.filter = OutputFilter(self.control_lines, self.warnings.append, prefix=prefix)

    def pieces(self, *pieces: bytes) -> list[bytes]:
        return [self.filter.feed(piece) for piece in pieces] + [self.filter.end()]


@pytest.fixture
def parsed() -> ParsedOutput:
    return ParsedOutput()


def test_a_checkpoint_is_reported_with_the_latest_progress(parsed: ParsedOutput) -> None:
    parsed.pieces(b'::checkpoint {"page": 1}\n::progress 5 x\n::checkpoint 2\n::checkpoint {\n')
    assert parsed.progress == [(0, None, Raw(b'{"page": 1}')), (5, "x"), (5, "x", Raw(b"2"))]
    assert "a checkpoint is JSON" in parsed.warnings[0]


def test_control_lines_are_removed_and_the_rest_is_unchanged(parsed: ParsedOutput) -> None:
    text = b"hello\n::progress 42 half way\nbye\r\n\n  ::progress 1\n::progress\t5\nlast"
    assert b"".join(parsed.pieces(text)) == b"hello\nbye\r\n\n  ::progress 1\n::progress\t5\nlast"
    assert parsed.progress == [(42, "half way")]
    assert parsed.warnings == []


@pytest.mark.parametrize("prefix", [b"", b"a: "])
def test_what_is_passed_on_is_kept_as_text_without_the_prefix(prefix: bytes) -> None:
    kept: list[str] = []
    output = OutputFilter(ControlLines(lambda *_: None), pytest.fail, prefix=prefix, keep=kept.append)
    for piece in (b"one \xe2\x82", b"\xac\n::progress 1\n\xff", b"\nlast \xe2"):
        output.feed(piece)
    output.end()
    assert "".join(kept) == "one €\n\ufffd\nlast \ufffd"


@pytest.mark.parametrize(
    ("line", "progress", "text"),
    [
        (b"::progress 0", 0, None),
        (b"::progress 100", 100, None),
        (b"::progress 12.5 probing", 12.5, "probing"),
        (b"::progress 7   spaced  ", 7, "spaced"),
        ("::progress 7 größer".encode(), 7, "größer"),
    ],
)
def test_progress_has_a_number_and_may_have_a_text(
    line: bytes, progress: float, text: str | None, parsed: ParsedOutput
) -> None:
    assert parsed.control_lines.take(line)
    assert parsed.progress == [(progress, text)]
    assert type(parsed.progress[0][0]) is type(progress)


@pytest.mark.parametrize(
    "line",
    [
        b"::progress",
        b"::progress ",
        b"::progress many",
        b"::progress 42%",
        b"::progress -1",
        b"::progress 100.1",
        b"::progress nan",
        b"::progress inf",
        b"::progress 1 " + b"x" * 4097,
        b"::progress 1 \xff",
        b"::meta",
        b"::meta key",
        b"::meta =value",
        b"::result",
        b"::result download_url",
        b"::result other=x",
        b"::result file_path=",
        b"::result file_path=a\x00b",
        b"::result storage_key=../x",
        b"::result storage_key=/x",
        b"::result file_path=" + b"x" * 4097,
    ],
)
def test_a_bad_control_line_is_passed_on_with_one_warning(line: bytes, parsed: ParsedOutput) -> None:
    with pytest.raises(BadControlLine):
        parsed.control_lines.take(line)
    assert b"".join(parsed.pieces(line + b"\n", b"next\n")) == line + b"\nnext\n"
    assert len(parsed.warnings) == 1
    assert parsed.progress == []
    assert parsed.control_lines.result == {"metadata": None}


@pytest.mark.parametrize(("lines", "last"), [(11, "1 more line"), (10_000, "9990 more lines")])
def test_there_are_at_most_10_warnings_and_the_number_of_the_others(
    lines: int, last: str, parsed: ParsedOutput
) -> None:
    text = b"::progress x\n" * lines
    assert b"".join(parsed.pieces(text[:-1], b"\n", b"::progress 5\n")) == text
    assert len(parsed.warnings) == 11
    assert parsed.warnings[9] == (
        "not a control line, passed on: '::progress x': expected a number from 0 to 100 after ::progress"
    )
    assert parsed.warnings[10] == f"not a control line, passed on: {last}"
    assert parsed.progress == [(5, None)]


def test_meta_is_json_if_it_parses_and_text_otherwise(parsed: ParsedOutput) -> None:
    for line in (b"::meta n=5", b'::meta o={"a":[1]}', b"::meta s=five", b"::meta e=", b"::meta n=6", b"::meta u=a=b"):
        assert parsed.control_lines.take(line)
    assert parsed.control_lines.result["metadata"] == {"n": 6, "o": {"a": [1]}, "s": "five", "e": "", "u": "a=b"}


def test_meta_that_is_nested_too_deeply_for_the_daemon_is_text(parsed: ParsedOutput) -> None:
    kept, text, deepest = (b"[" * depth + b"]" * depth for depth in (MAX_NESTING - 1, MAX_NESTING, 30_000))
    objects = b'{"a":' * MAX_NESTING + b"1" + b"}" * MAX_NESTING
    for name, value in ((b"kept", kept), (b"text", text), (b"deepest", deepest), (b"objects", objects)):
        assert parsed.control_lines.take(b"::meta " + name + b"=" + value)
    metadata = parsed.control_lines.result["metadata"]
    assert msgspec.json.encode(metadata["kept"]) == kept
    assert {name: metadata[name] for name in ("text", "deepest", "objects")} == {
        "text": text.decode(),
        "deepest": deepest.decode(),
        "objects": objects.decode(),
    }
    assert excess_depth(msgspec.json.encode(metadata)) == 0


def test_the_last_result_of_each_name_counts(parsed: ParsedOutput) -> None:
    for line in (b"::result file_path=/a b", b"::result file_path=/c", b"::result download_url=https://x/?a=1"):
        assert parsed.control_lines.take(line)
    assert parsed.control_lines.result == {"file_path": "/c", "download_url": "https://x/?a=1", "metadata": None}


def test_other_lines_with_colons_are_passed_on(parsed: ParsedOutput) -> None:
    assert b"".join(parsed.pieces(b"::group::build\n::progressive\n::\n")) == b"::group::build\n::progressive\n::\n"
    assert parsed.warnings == []


def test_a_prompt_without_a_line_end_is_passed_on_at_once() -> None:
    assert ParsedOutput().pieces(b"password: ", b"ok\n") == [b"password: ", b"ok\n", b""]


def test_the_start_of_a_control_line_is_buffered() -> None:
    assert ParsedOutput().pieces(b":", b":pro", b"gram\n") == [b"", b"", b"::program\n", b""]
    assert ParsedOutput().pieces(b"::pro", b"x") == [b"", b"::prox", b""]
    parsed = ParsedOutput()
    assert parsed.pieces(b"::progress 5", b"0 te", b"xt\nrest\n") == [b"", b"", b"rest\n", b""]
    assert parsed.progress == [(50, "text")]


def test_a_control_line_is_only_at_the_start_of_a_line(parsed: ParsedOutput) -> None:
    assert parsed.pieces(b"abc", b"::progress 5\n") == [b"abc", b"::progress 5\n", b""]
    assert parsed.progress == []


def test_a_control_line_may_be_the_last_line_without_a_line_end(parsed: ParsedOutput) -> None:
    assert parsed.pieces(b"::progress 5") == [b"", b""]
    assert parsed.progress == [(5, None)]


def test_an_endless_line_is_passed_on_in_pieces(parsed: ParsedOutput) -> None:
    piece = b"x" * 1000
    start = b"::progress 5 "
    out = [parsed.filter.feed(start), *(parsed.filter.feed(piece) for _ in range(200))]
    assert max(map(len, out)) <= LINE_BYTES + 2000
    assert b"".join(out) + parsed.filter.feed(b"\n") + parsed.filter.end() == start + piece * 200 + b"\n"
    assert parsed.progress == []
    assert len(parsed.warnings) == 1


def test_a_control_line_that_is_too_long_is_passed_on_with_a_warning(parsed: ParsedOutput) -> None:
    line = b"::meta key=" + b"x" * LINE_BYTES + b"\n"
    assert parsed.pieces(line) == [line, b""]
    assert parsed.warnings == [f"not a control line, passed on: {line[:80].decode()!r}: it is over 65536 bytes"]
    assert parsed.control_lines.metadata == {}


def test_with_a_prefix_a_line_is_buffered_until_its_end() -> None:
    pieces = ParsedOutput(prefix=b"1: ").pieces(b"ab", b"c\n\nd", b"e")
    assert pieces == [b"", b"1: abc\n1: \n", b"", b"1: de\n"], "the last line gets an end"
    long = b"x" * (LINE_BYTES + 1)
    assert ParsedOutput(prefix=b"1: ").pieces(long, b"y\n") == [b"1: " + long + b"\n", b"1: y\n", b""]


def test_a_filter_without_control_lines_passes_everything_on() -> None:
    passing = OutputFilter(None, pytest.fail)
    assert passing.feed(b"::progress 5\n::me") + passing.end() == b"::progress 5\n::me"


def test_the_tail_keeps_the_last_lines_and_is_bounded() -> None:
    tail = Tail(lines=3, characters=20)
    for piece in (b"one\ntw", b"o\nthree\n", b"four\nfi", b"ve"):
        tail.feed(piece)
    assert tail.text == "two\nthree\nfour\nfive"[-20:]
    tail.feed(b"x" * 100_000)
    assert tail.text == "x" * 20
    assert len(tail._open) == 20


def test_the_tail_of_invalid_utf8_is_text() -> None:
    tail = Tail()
    tail.feed(b"\xff\xfe bad\n")
    assert tail.text == "\ufffd\ufffd bad"


async def test_a_writer_writes_everything_in_order() -> None:
    read, write = os.pipe()
    sink = OutputWriter(write)
    big = b"x" * 300_000
    pending = [asyncio.ensure_future(sink.write(piece)) for piece in (b"a", big, b"b")]
    got = await asyncio.to_thread(_read_exactly, read, len(big) + 2)
    await asyncio.gather(*pending)
    assert got == b"a" + big + b"b"
    sink.close()
    os.close(read)
    os.close(write)


async def test_a_writer_drops_output_to_a_closed_pipe() -> None:
    read, write = os.pipe()
    os.close(read)
    sink = OutputWriter(write)
    await sink.write(b"lost")
    await sink.write(b"lost too")
    sink.close()
    os.close(write)


async def test_a_writer_waits_for_the_reader_of_a_non_blocking_pipe() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    sink = OutputWriter(write)
    with os.fdopen(read, "rb") as reader:
        reading = asyncio.ensure_future(asyncio.to_thread(reader.read))
        await sink.write(b"x" * 1_000_000)
        sink.close()
        os.close(write)
        assert len(await reading) == 1_000_000


async def test_a_writer_with_a_slow_reader_does_not_block_the_loop() -> None:
    read, write = os.pipe()
    sink = OutputWriter(write)
    pending = asyncio.ensure_future(sink.write(b"x" * 1_000_000))
    await asyncio.sleep(0)  # the loop runs although the pipe is full
    assert not pending.done()
    assert len(await asyncio.to_thread(_read_exactly, read, 1_000_000)) == 1_000_000
    await pending
    sink.close()
    os.close(read)
    os.close(write)


def _read_exactly(fd: int, count: int) -> bytes:
    got = bytearray()
    while len(got) < count:
        got += os.read(fd, 65536)
    return bytes(got)
