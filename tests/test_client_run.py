"""`jobctl run` without its command line: what programs say, how they are stopped, and what becomes of their jobs."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from jobd.client.output import LINE_BYTES, BadDirective, Filter, Said, Sink, Tail
from jobd.client.program import Program, has_members
from jobd.client.run import describe

# ---------------------------------------------------------------------------------------------------------------------
# What a program says.


class Heard:
    """A filter with everything that came out of it."""

    def __init__(self, *, whole_lines: bool = False) -> None:
        self.progress: list[tuple[float, str | None]] = []
        self.warnings: list[str] = []
        self.said = Said(lambda progress, text: self.progress.append((progress, text)))
        self.filter = Filter(self.said, self.warnings.append, whole_lines=whole_lines)

    def pieces(self, *pieces: bytes) -> list[bytes]:
        return [self.filter.feed(piece) for piece in pieces] + [self.filter.end()]


def test_directives_are_taken_out_and_the_rest_is_unchanged() -> None:
    heard = Heard()
    text = b"hello\n::progress 42 half way\nbye\r\n\n  ::progress 1\n::progress\t5\nlast"
    assert b"".join(heard.pieces(text)) == b"hello\nbye\r\n\n  ::progress 1\n::progress\t5\nlast"
    assert heard.progress == [(42, "half way")]
    assert heard.warnings == []


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
def test_progress_has_a_number_and_may_have_a_text(line: bytes, progress: float, text: str | None) -> None:
    heard = Heard()
    assert heard.said.take(line)
    assert heard.progress == [(progress, text)]
    assert type(heard.progress[0][0]) is type(progress)


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
def test_a_bad_directive_is_passed_on_with_one_warning(line: bytes) -> None:
    heard = Heard()
    with pytest.raises(BadDirective):
        heard.said.take(line)
    assert b"".join(heard.pieces(line + b"\n", b"next\n")) == line + b"\nnext\n"
    assert len(heard.warnings) == 1
    assert heard.progress == []
    assert heard.said.result == {"metadata": None}


def test_meta_is_json_where_it_parses_and_text_elsewhere() -> None:
    heard = Heard()
    for line in (b"::meta n=5", b'::meta o={"a":[1]}', b"::meta s=five", b"::meta e=", b"::meta n=6", b"::meta u=a=b"):
        assert heard.said.take(line)
    assert heard.said.result["metadata"] == {"n": 6, "o": {"a": [1]}, "s": "five", "e": "", "u": "a=b"}


def test_results_are_kept_and_the_last_one_counts() -> None:
    heard = Heard()
    for line in (b"::result file_path=/a b", b"::result file_path=/c", b"::result download_url=https://x/?a=1"):
        assert heard.said.take(line)
    assert heard.said.result == {"file_path": "/c", "download_url": "https://x/?a=1", "metadata": None}


def test_other_double_colons_are_not_ours() -> None:
    heard = Heard()
    assert b"".join(heard.pieces(b"::group::build\n::progressive\n::\n")) == b"::group::build\n::progressive\n::\n"
    assert heard.warnings == []


def test_a_prompt_without_an_end_of_line_leaves_at_once() -> None:
    assert Heard().pieces(b"password: ", b"ok\n") == [b"password: ", b"ok\n", b""]


def test_what_may_become_a_directive_is_held_until_it_is_clear() -> None:
    assert Heard().pieces(b":", b":pro", b"gram\n") == [b"", b"", b"::program\n", b""]
    assert Heard().pieces(b"::pro", b"x") == [b"", b"::prox", b""]
    heard = Heard()
    assert heard.pieces(b"::progress 5", b"0 te", b"xt\nrest\n") == [b"", b"", b"rest\n", b""]
    assert heard.progress == [(50, "text")]


def test_a_directive_counts_only_at_the_start_of_a_line() -> None:
    heard = Heard()
    assert heard.pieces(b"abc", b"::progress 5\n") == [b"abc", b"::progress 5\n", b""]
    assert heard.progress == []


def test_a_directive_without_an_end_of_line_counts_at_the_end() -> None:
    heard = Heard()
    assert heard.pieces(b"::progress 5") == [b"", b""]
    assert heard.progress == [(5, None)]


def test_a_line_that_never_ends_is_passed_on_in_pieces_and_memory_is_bounded() -> None:
    heard = Heard()
    piece = b"x" * 1000
    start = b"::progress 5 "
    out = [heard.filter.feed(start), *(heard.filter.feed(piece) for _ in range(200))]
    assert max(map(len, out)) <= LINE_BYTES + 2000
    assert b"".join(out) + heard.filter.feed(b"\n") + heard.filter.end() == start + piece * 200 + b"\n"
    assert heard.progress == []


def test_whole_lines_hold_a_line_until_its_end() -> None:
    assert Heard(whole_lines=True).pieces(b"ab", b"c\nd", b"e") == [b"", b"abc\n", b"", b"de"]


def test_a_filter_without_directives_passes_everything() -> None:
    passing = Filter(None, pytest.fail)
    assert passing.feed(b"::progress 5\n::me") + passing.end() == b"::progress 5\n::me"


def test_the_tail_keeps_the_last_lines_and_is_bounded() -> None:
    tail = Tail(lines=3, characters=20)
    for piece in (b"one\ntw", b"o\nthree\n", b"four\nfi", b"ve"):
        tail.feed(piece)
    assert tail.text == "two\nthree\nfour\nfive"[-20:]
    tail.feed(b"x" * 100_000)
    assert tail.text == "x" * 20
    assert len(tail._open) == 20


def test_the_tail_is_text_whatever_the_bytes_are() -> None:
    tail = Tail()
    tail.feed(b"\xff\xfe bad\n")
    assert tail.text == "\ufffd\ufffd bad"


async def test_a_sink_writes_in_order_and_whole() -> None:
    read, write = os.pipe()
    sink = Sink(write)
    big = b"x" * 300_000
    pending = [asyncio.ensure_future(sink.write(piece)) for piece in (b"a", big, b"b")]
    got = await asyncio.to_thread(_read_exactly, read, len(big) + 2)
    await asyncio.gather(*pending)
    assert got == b"a" + big + b"b"
    sink.close()
    os.close(read)
    os.close(write)


async def test_a_sink_that_nobody_reads_drops_instead_of_failing() -> None:
    read, write = os.pipe()
    os.close(read)
    sink = Sink(write)
    await sink.write(b"lost")
    await sink.write(b"lost too")
    sink.close()
    os.close(write)


async def test_a_sink_whose_reader_stands_still_does_not_hold_the_loop() -> None:
    read, write = os.pipe()
    sink = Sink(write)
    pending = asyncio.ensure_future(sink.write(b"x" * 1_000_000))
    await asyncio.sleep(0)  # the loop turns though the pipe is full
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


@pytest.mark.parametrize(
    ("code", "error_code", "message"),
    [
        (3, "exit:3", "The program ended with exit status 3."),
        (-9, "signal:SIGKILL", "The program was ended by SIGKILL."),
        (-15, "signal:SIGTERM", "The program was ended by SIGTERM."),
        (-40, "signal:40", "The program was ended by 40."),
    ],
)
def test_an_exit_status_is_described(code: int, error_code: str, message: str) -> None:
    assert describe(code) == (error_code, message)


# ---------------------------------------------------------------------------------------------------------------------
# Programs and their process groups.


class Ran:
    """A program with what it said."""

    def __init__(self) -> None:
        self.out = bytearray()
        self.err = bytearray()
        self.heard = asyncio.Event()

    async def start(self, *command: str, stdin: bytes = b"", kill_after_s: float = 10, **environ: str) -> Program:
        async def on_out(piece: bytes) -> None:
            self.out += piece
            self.heard.set()

        async def on_err(piece: bytes) -> None:
            self.err += piece

        return await Program.start(command, {**os.environ, **environ}, stdin, on_out, on_err, kill_after_s=kill_after_s)


async def test_a_program_is_fed_and_read_to_its_end() -> None:
    ran = Ran()
    program = await ran.start("sh", "-c", 'cat; echo "$WORD" >&2; exit 3', stdin=b"in" * 100_000, WORD="err")
    await program.done
    assert (bytes(ran.out), bytes(ran.err), program.returncode) == (b"in" * 100_000, b"err\n", 3)


async def test_a_program_that_does_not_read_its_input_ends_all_the_same() -> None:
    program = await Ran().start("true", stdin=b"x" * 1_000_000)
    await program.done
    assert program.returncode == 0


async def test_a_program_killed_by_a_signal_says_which() -> None:
    program = await Ran().start("sh", "-c", "kill -KILL $$")
    await program.done
    assert program.returncode == -signal.SIGKILL


async def test_a_missing_program_is_an_os_error() -> None:
    with pytest.raises(FileNotFoundError):
        await Ran().start("/nonexistent/program")


async def test_a_stopped_program_may_end_in_its_own_way() -> None:
    ran = Ran()
    program = await ran.start("sh", "-c", "trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 0.01; done")
    await ran.heard.wait()
    await program.stop(asyncio.Event())
    assert program.done.done()
    assert (bytes(ran.out), program.returncode) == (b"up\nbye\n", 7)


async def test_a_program_that_ignores_sigterm_is_killed_with_its_whole_group() -> None:
    ran = Ran()
    script = "trap '' TERM; sleep 1000 & echo $$; wait; sleep 1000"
    program = await ran.start("sh", "-c", script, kill_after_s=0.2)
    await ran.heard.wait()
    group = int(ran.out)
    assert has_members(group)
    await program.stop(asyncio.Event())
    assert program.done.done()
    assert program.returncode == -signal.SIGKILL
    assert not has_members(group)


async def test_no_time_left_means_sigkill_at_once() -> None:
    ran = Ran()
    program = await ran.start("sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.01; done", kill_after_s=1000)
    await ran.heard.wait()
    at_once = asyncio.Event()
    at_once.set()
    await program.stop(at_once)
    assert program.returncode == -signal.SIGKILL


async def test_a_program_that_was_halted_is_stopped_too() -> None:
    ran = Ran()
    program = await ran.start("sh", "-c", "echo $$; kill -STOP $$", kill_after_s=1000)
    await ran.heard.wait()
    await program.stop(asyncio.Event())
    assert program.returncode == -signal.SIGTERM


async def test_children_that_outlive_their_program_are_stopped() -> None:
    ran = Ran()
    program = await ran.start(
        "sh", "-c", "echo $$; (trap 'echo child gone; exit' TERM; while :; do sleep 0.01; done) & exit 0"
    )
    await program.done
    assert program.returncode == 0
    assert not has_members(int(ran.out.split()[0]))


async def test_stubborn_children_that_outlive_their_program_are_killed() -> None:
    ran = Ran()
    program = await ran.start("sh", "-c", "trap '' TERM; echo $$; sleep 1000 & exit 4", kill_after_s=0.2)
    await program.done
    assert program.returncode == 4
    assert not has_members(int(ran.out.split()[0]))


async def test_a_child_in_a_group_of_its_own_that_keeps_the_output_open_is_not_waited_for(tmp_path: Path) -> None:
    ran = Ran()
    program = await ran.start("sh", "-c", "setsid sleep 1000 & echo $!; exit 0")
    await program.done
    assert program.returncode == 0
    os.kill(int(ran.out), signal.SIGKILL)


async def test_a_child_elsewhere_that_writes_for_ever_is_not_waited_for() -> None:
    ran = Ran()
    program = await ran.start("sh", "-c", "setsid sh -c 'echo $$; exec yes' & sleep 0.1; exit 0")
    await program.done
    assert program.returncode == 0
    child = int(ran.out.split(b"\n", 1)[0])
    await asyncio.to_thread(_until_gone, child)  # `yes` ends when nobody reads it any more


def _until_gone(pid: int) -> None:
    while Path(f"/proc/{pid}").exists():
        os.sched_yield()


async def test_output_after_a_slow_reader_is_not_lost() -> None:
    got = bytearray()
    gate = asyncio.Event()

    async def slow(piece: bytes) -> None:
        await gate.wait()
        got.extend(piece)

    async def nothing(piece: bytes) -> None:
        pass

    program = await Program.start(["sh", "-c", "seq 20000"], os.environ, b"", slow, nothing, kill_after_s=10)
    asyncio.get_running_loop().call_later(1.2, gate.set)  # longer than a silent pipe is waited for
    await program.done
    assert got == b"".join(b"%d\n" % number for number in range(1, 20001))
