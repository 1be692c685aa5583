"""`jobctl run` without its command line: what programs say, how they are stopped, and what becomes of their jobs."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jobd.client import AsyncJobClient, CommandWorker, JobInfo, Unreachable, uuid7
from jobd.client.worker import drain, runner, watchdog
from jobd.client.worker.claimer import ClaimOptions
from jobd.client.worker.command_worker import describe
from jobd.client.worker.drain import remaining_jobs
from jobd.client.worker.output import LINE_BYTES, BadDirective, Directives, OutputFilter, OutputWriter, Tail
from jobd.client.worker.process import Program, has_members
from jobd.client.worker.watchdog import Watchdog
from tests import ROOT
from tests.support.daemon_process import Daemon, die_with_us
from tests.support.scripted_server import ScriptedServer, ok, serving, until

# ---------------------------------------------------------------------------------------------------------------------
# What a program says.


class Heard:
    """A filter with everything that came out of it."""

    def __init__(self, *, whole_lines: bool = False) -> None:
        self.progress: list[tuple[float, str | None]] = []
        self.warnings: list[str] = []
        self.said = Directives(lambda progress, text: self.progress.append((progress, text)))
        self.filter = OutputFilter(self.said, self.warnings.append, whole_lines=whole_lines)

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


def test_the_tail_is_text_whatever_the_bytes_are() -> None:
    tail = Tail()
    tail.feed(b"\xff\xfe bad\n")
    assert tail.text == "\ufffd\ufffd bad"


async def test_a_sink_writes_in_order_and_whole() -> None:
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


async def test_a_sink_that_nobody_reads_drops_instead_of_failing() -> None:
    read, write = os.pipe()
    os.close(read)
    sink = OutputWriter(write)
    await sink.write(b"lost")
    await sink.write(b"lost too")
    sink.close()
    os.close(write)


async def test_a_sink_whose_reader_stands_still_does_not_hold_the_loop() -> None:
    read, write = os.pipe()
    sink = OutputWriter(write)
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
def test_an_exit_status_is_message(code: int, error_code: str, message: str) -> None:
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


# ---------------------------------------------------------------------------------------------------------------------
# Jobs and their programs, against a real daemon.


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("d")) as running:
        yield running


@pytest.fixture
async def client(daemon: Daemon) -> AsyncIterator[AsyncJobClient]:
    async with AsyncJobClient(f"unix:{daemon.socket}") as client:
        yield client


@pytest.fixture
def queue() -> str:
    """A queue that no other test uses."""
    return uuid7()


class Bench:
    """A CommandWorker whose output goes into files and whose messages are kept."""

    def __init__(self, client: Any, directory: Path, queue: str, script: str, **options: Any) -> None:
        self.said: list[str] = []
        self._out, self._err = directory / "out", directory / "err"
        self._fds = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in (self._out, self._err)]
        self.worker = CommandWorker(
            client,
            ["sh", "-c", script],
            queues=[queue],
            log=self.said.append,
            stdout_fd=self._fds[0],
            stderr_fd=self._fds[1],
            **{"name": "bench", **options},
        )

    async def run(self) -> int:
        try:
            return await self.worker.run(signals=False)
        finally:
            for fd in self._fds:
                os.close(fd)

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()


async def when(client: AsyncJobClient, job_id: str, is_so: Callable[[JobInfo], bool]) -> JobInfo:
    """The job, once it is so."""
    seen: list[JobInfo] = []

    async def look() -> bool:
        seen.append(await client.get_job(job_id))
        return is_so(seen[-1])

    await until(look)
    return seen[-1]


async def test_exit_0_completes_the_job_with_what_the_program_said(
    client: AsyncJobClient, queue: str, tmp_path: Path
) -> None:
    script = """
    payload=$(cat)
    echo "payload $payload"
    echo "::progress 40 reading"
    echo "::meta pages=12"
    echo "::meta title=A text"
    echo "::result file_path=/tmp/x.pdf"
    echo "::progress many"
    echo to-stderr >&2
    """
    job = await client.create_job(msgspec.Raw(b'{"a" : 1.0}'), queue=queue)
    bench = Bench(client, tmp_path, queue, script, once=True)
    assert await bench.run() == 0
    done = await client.get_job(job.id)
    assert (done.status, done.file_path) == ("completed", "/tmp/x.pdf")
    assert done.metadata_value == {"pages": 12, "title": "A text"}
    assert bench.out == 'payload {"a" : 1.0}\n::progress many\n'
    assert bench.err == "to-stderr\n"
    assert len(bench.said) == 1
    assert "not a directive" in bench.said[0]


async def test_progress_reaches_the_daemon(client: AsyncJobClient, queue: str, tmp_path: Path) -> None:
    go = tmp_path / "go"
    script = f"echo '::progress 40 reading'; while [ ! -e {go} ]; do sleep 0.01; done"
    job = await client.create_job(queue=queue)
    running = asyncio.create_task(Bench(client, tmp_path, queue, script, once=True).run())
    seen = await when(client, job.id, lambda job: job.progress == 40)
    assert seen.progress_message == "reading"
    go.touch()
    assert await running == 0


async def test_the_program_finds_its_job_in_the_environment(
    client: AsyncJobClient, queue: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOBD_JOB_LEFTOVER", "of an outer run")
    job = await client.create_job(queue=queue, kind="k", priority=-3, max_attempts=2)
    bench = Bench(client, tmp_path, queue, "env | grep ^JOBD_JOB_ | sort", once=True)
    assert await bench.run() == 0
    found = dict(line.split("=", 1) for line in bench.out.splitlines())
    done = await client.get_job(job.id)
    granted = (await client.timeline(job.id))[1]
    assert found == {
        "JOBD_JOB_ID": job.id,
        "JOBD_JOB_QUEUE": queue,
        "JOBD_JOB_KIND": "k",
        "JOBD_JOB_PRIORITY": "-3",
        "JOBD_JOB_ATTEMPT": "1",
        "JOBD_JOB_MAX_ATTEMPTS": "2",
        "JOBD_JOB_STALLS": "0",
        "JOBD_JOB_MAX_STALLS": "3",
        "JOBD_JOB_CREATED_AT": str(job.created_at),
        "JOBD_JOB_RUN_AT": str(job.run_at),
        "JOBD_JOB_STARTED_AT": str(done.started_at),
        "JOBD_JOB_FENCING_TOKEN": str(granted.details["fencing_token"]),
        "JOBD_JOB_WORKER": "bench",
    }


@pytest.mark.parametrize(
    ("script", "error_code", "message"),
    [
        ("echo one >&2; echo two >&2; exit 3", "exit:3", "exit status 3. Last lines of stderr:\none\ntwo"),
        ("kill -KILL $$", "signal:SIGKILL", "The program was ended by SIGKILL."),
        ("exit 127", "exit:127", "The program ended with exit status 127."),
    ],
)
async def test_any_other_end_fails_the_job(
    client: AsyncJobClient, queue: str, tmp_path: Path, script: str, error_code: str, message: str
) -> None:
    job = await client.create_job(queue=queue)
    assert await Bench(client, tmp_path, queue, script, once=True).run() == 1
    failed = await client.get_job(job.id)
    assert (failed.status, failed.error_code) == ("failed", error_code)
    assert (failed.error_message or "").endswith(message)


async def test_the_last_progress_is_sent_before_the_failure(client: AsyncJobClient, queue: str, tmp_path: Path) -> None:
    script = "for n in 1 2 3 4 5; do echo ::progress $n; done; exit 1"
    job = await client.create_job(queue=queue)
    await Bench(client, tmp_path, queue, script, once=True).run()
    events = await client.timeline(job.id)
    assert events[-2].type == "progress"
    assert events[-2].details["progress"] == 5


async def test_drain_works_on_all_due_jobs_and_ends(client: AsyncJobClient, queue: str, tmp_path: Path) -> None:
    jobs = await client.create_jobs({"queue": queue, "payload": n} for n in range(5))
    later = await client.create_job(queue=queue, delay_ms=3_600_000)
    bench = Bench(client, tmp_path, queue, "cat", drain=True, concurrency=2)
    assert await bench.run() == 0
    assert {(await client.get_job(job.id)).status for job in jobs} == {"completed"}
    assert sorted(bench.out.split()) == ["0", "1", "2", "3", "4"]
    assert (await client.get_job(later.id)).status == "queued"
    assert bench.said == ["drained; 1 job is left: 1 is not due yet."]


async def test_drain_says_what_is_left_and_why(
    client: AsyncJobClient, daemon: Daemon, queue: str, tmp_path: Path
) -> None:
    """Of its own queues and kinds alone."""
    paused = f"{queue}-paused"
    await client.create_jobs({"queue": queue, "kind": kind, "delay_ms": 3_600_000} for kind in ("a", "a", "b"))
    await client.create_job(queue=paused, kind="c")
    daemon.admin("POST", f"queues/{paused}/pause", {})
    (said,) = await _said_by_drain(client, tmp_path, queue, paused)
    assert said.startswith(f"drained; 4 jobs are left: 3 are not due yet, 1 is in queue {paused}, which is paused by ")
    told = "drained; 2 jobs are left: 2 are not due yet."
    assert await _said_by_drain(client, tmp_path, queue, paused, kinds=["a", "z"]) == [told]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drain, "_PAGE", 1)
        assert await _said_by_drain(client, tmp_path, queue, paused, kinds=["a", "z"]) == [told]
    assert await _said_by_drain(client, tmp_path, queue, paused, kinds=["z"]) == []


async def _said_by_drain(client: AsyncJobClient, tmp_path: Path, *queues: str, **options: Any) -> list[str]:
    said: list[str] = []
    worker = CommandWorker(client, ["true"], queues=queues, drain=True, log=said.append, **options)
    assert await worker.run(signals=False) == 0
    return said


async def test_drain_takes_retries_that_are_due_and_says_that_not_all_was_well(
    client: AsyncJobClient, queue: str, tmp_path: Path
) -> None:
    backoff = {"kind": "fixed", "base_ms": 0, "jitter": False}
    job = await client.create_job(queue=queue, max_attempts=2, backoff=backoff)
    bench = Bench(client, tmp_path, queue, '[ "$JOBD_JOB_ATTEMPT" = 2 ]', drain=True)
    assert await bench.run() == 1
    assert (await client.get_job(job.id)).status == "completed"


async def test_drain_of_an_empty_queue_is_done(client: AsyncJobClient, queue: str, tmp_path: Path) -> None:
    bench = Bench(client, tmp_path, queue, "false", drain=True)
    assert await bench.run() == 0
    assert bench.said == []


async def test_where_nobody_answers_nothing_is_said_of_what_is_left(tmp_path: Path) -> None:
    async with AsyncJobClient(f"unix:{tmp_path}/none", retry_for_s=0) as client:
        assert await remaining_jobs(client, ClaimOptions(worker="w")) is None


async def test_once_takes_one_job(client: AsyncJobClient, queue: str, tmp_path: Path) -> None:
    first, second = await client.create_jobs([{"queue": queue}, {"queue": queue}])
    assert await Bench(client, tmp_path, queue, "true", once=True).run() == 0
    assert (await client.get_job(first.id)).status == "completed"
    assert (await client.get_job(second.id)).status == "queued"


async def test_only_the_kinds_asked_for(client: AsyncJobClient, queue: str, tmp_path: Path) -> None:
    other = await client.create_job(queue=queue, kind="other")
    mine = await client.create_job(queue=queue, kind="mine")
    assert await Bench(client, tmp_path, queue, "true", drain=True, kinds=["mine"]).run() == 0
    assert (await client.get_job(mine.id)).status == "completed"
    assert (await client.get_job(other.id)).status == "queued"


async def test_a_cancelled_job_ends_its_whole_process_group(client: AsyncJobClient, queue: str, tmp_path: Path) -> None:
    script = (
        "trap 'echo asked to stop; exit 0' TERM; sleep 1000 & echo ::progress 1; echo $$; while :; do sleep 0.01; done"
    )
    job = await client.create_job(queue=queue)
    bench = Bench(client, tmp_path, queue, script, once=True, lock_ttl_ms=1000)
    running = asyncio.create_task(bench.run())
    await when(client, job.id, lambda job: job.progress == 1)
    await client.cancel_job(job.id)
    assert await running == 1
    group, said = bench.out.splitlines()
    assert said == "asked to stop"
    assert not has_members(int(group))
    assert (await client.get_job(job.id)).status == "cancelled"
    assert any("stopping its work" in text for text in bench.said)


async def test_the_lock_is_kept_while_the_program_runs(client: AsyncJobClient, queue: str, tmp_path: Path) -> None:
    go = tmp_path / "go"
    job = await client.create_job(queue=queue)
    script = f"while [ ! -e {go} ]; do sleep 0.01; done"
    running = asyncio.create_task(Bench(client, tmp_path, queue, script, once=True, lock_ttl_ms=1000).run())

    async def is_older_than_one_ttl() -> bool:
        return [event.type for event in await client.timeline(job.id)].count("extended") >= 4

    await until(is_older_than_one_ttl)
    go.touch()
    assert await running == 0
    assert (await client.get_job(job.id)).attempt == 1


async def test_stop_lets_the_running_program_end(client: AsyncJobClient, queue: str, tmp_path: Path) -> None:
    go = tmp_path / "go"
    first, second = await client.create_jobs([{"queue": queue}, {"queue": queue}])
    bench = Bench(client, tmp_path, queue, f"echo ::progress 1; while [ ! -e {go} ]; do sleep 0.01; done")
    running = asyncio.create_task(bench.run())
    await when(client, first.id, lambda job: job.progress == 1)
    bench.worker.stop()
    go.touch()
    assert await running == 0
    assert (await client.get_job(first.id)).status == "completed"
    assert (await client.get_job(second.id)).attempt == 0


@pytest.mark.parametrize("stops", [1, 2], ids=["grace over", "second signal"])
async def test_after_the_grace_the_group_is_stopped_and_then_the_job_released(
    client: AsyncJobClient, queue: str, tmp_path: Path, stops: int
) -> None:
    script = "trap '' TERM; echo ::progress 1; echo $$; while :; do sleep 0.01; done"
    job = await client.create_job(queue=queue)
    bench = Bench(client, tmp_path, queue, script, grace_s=0.05 if stops == 1 else 10_000, kill_after_s=0.2)
    running = asyncio.create_task(bench.run())
    await when(client, job.id, lambda job: job.progress == 1)
    for _ in range(stops):
        bench.worker.stop()
    assert await running == 0
    assert not has_members(int(bench.out))
    back = await client.get_job(job.id)
    assert (back.status, back.attempt) == ("queued", 0)
    assert [event.type for event in await client.timeline(job.id)][-1] == "released"


async def test_a_third_signal_kills_at_once(client: AsyncJobClient, queue: str, tmp_path: Path) -> None:
    script = "trap '' TERM; echo ::progress 1; echo $$; while :; do sleep 0.01; done"
    job = await client.create_job(queue=queue)
    bench = Bench(client, tmp_path, queue, script, grace_s=10_000, kill_after_s=10_000)
    running = asyncio.create_task(bench.run())
    await when(client, job.id, lambda job: job.progress == 1)
    for _ in range(3):
        bench.worker.stop()
    assert await running == 0
    assert not has_members(int(bench.out))
    assert (await client.get_job(job.id)).status == "queued"


async def test_a_program_that_does_not_exist_is_refused_before_any_claim(
    client: AsyncJobClient, queue: str, tmp_path: Path
) -> None:
    job = await client.create_job(queue=queue)
    said: list[str] = []
    worker = CommandWorker(client, ["/nonexistent/program"], queues=[queue], log=said.append, drain=True)
    assert await worker.run(signals=False) == 1
    assert "no such program" in said[0]
    assert (await client.timeline(job.id))[-1].type == "created"


async def test_a_program_that_is_not_executable_is_not_said_to_be_missing(tmp_path: Path) -> None:
    program = tmp_path / "my script.sh"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o644)
    said: list[str] = []
    for command in (str(program), str(tmp_path)):
        worker = CommandWorker(f"unix:{tmp_path}/none", [command], log=said.append, drain=True)
        assert await worker.run(signals=False) == 1
    assert f"it is not executable: chmod +x '{program}'. No job was claimed." in said[0]
    assert "it is a directory" in said[1]


async def test_a_program_that_cannot_be_started_costs_no_job(
    client: AsyncJobClient, queue: str, tmp_path: Path
) -> None:
    program = tmp_path / "program"
    program.write_text("#!/nonexistent/interpreter\n")
    program.chmod(0o755)
    job = await client.create_job(queue=queue)
    said: list[str] = []
    worker = CommandWorker(client, [str(program)], queues=[queue], log=said.append)
    assert await worker.run(signals=False) == 1
    assert "Its job was released" in said[0]
    back = await client.get_job(job.id)
    assert (back.status, back.attempt) == ("queued", 0)


async def test_no_daemon_is_unreachable_once_patience_is_over(
    queue: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "RETRY_FOR_S", 0.1)
    bench = Bench(f"unix:{tmp_path}/none", tmp_path, queue, "true", drain=True)
    with pytest.raises(Unreachable):
        await bench.run()


def test_a_command_and_room_are_needed() -> None:
    with pytest.raises(ValueError, match="a command is needed"):
        CommandWorker("unix:/x", [])
    with pytest.raises(ValueError, match="concurrency"):
        CommandWorker("unix:/x", ["true"], concurrency=0)


async def test_the_program_works_on_while_the_daemon_is_away(queue: str, tmp_path: Path) -> None:
    go = tmp_path / "go"
    with Daemon(tmp_path) as daemon:
        async with AsyncJobClient(f"unix:{daemon.socket}") as client:
            job = await client.create_job(queue=queue)
            script = f"echo ::progress 1; while [ ! -e {go} ]; do sleep 0.01; done; echo ::meta done=true"
            bench = Bench(f"unix:{daemon.socket}", tmp_path, queue, script, once=True, lock_ttl_ms=1000)
            running = asyncio.create_task(bench.run())
            await when(client, job.id, lambda job: job.progress == 1)
            await asyncio.to_thread(daemon.kill)
            await until(lambda: any("The work continues" in text for text in bench.said))
            go.touch()
            await until(lambda: any("cannot complete it yet" in text for text in bench.said))
            await asyncio.to_thread(daemon.start)
            assert await running == 0
            done = await client.get_job(job.id)
            assert (done.status, done.metadata_value, done.stalls) == ("completed", {"done": True}, 0)


@pytest.mark.parametrize("what", ["claim", "progress", "complete"])
async def test_lost_answers_make_no_second_run(
    daemon: Daemon, client: AsyncJobClient, queue: str, tmp_path: Path, what: str
) -> None:
    peer = ScriptedServer(behind=daemon.socket)
    peer.loses = lambda asked: asked.path.endswith(f"/{what}") and asked.body not in [lost.body for lost in peer.lost]
    job = await client.create_job(queue=queue)
    with serving(peer, tmp_path / "p") as endpoint:
        bench = Bench(endpoint, tmp_path, queue, "echo ::progress 5; echo ran", once=True)
        assert await bench.run() == 0
    assert bench.out == "ran\n"
    assert peer.lost
    assert [event.type for event in await client.timeline(job.id)].count("completed") == 1


async def test_a_result_that_the_daemon_refuses_fails_the_job(
    client: AsyncJobClient, queue: str, tmp_path: Path
) -> None:
    job = await client.create_job(queue=queue)
    script = 'big=$(head -c 60000 /dev/zero | tr "\\0" x); for n in $(seq 20); do echo "::meta k$n=$big"; done'
    assert await Bench(client, tmp_path, queue, script, once=True).run() == 1
    failed = await client.get_job(job.id)
    assert (failed.status, failed.error_code) == ("failed", "complete:too_large")


async def test_jobctl_run_is_this_worker_and_sigterm_gives_the_job_back(
    client: AsyncJobClient, daemon: Daemon, queue: str
) -> None:
    job = await client.create_job(queue=queue)
    script = "echo ::progress 1; echo $$; sleep 1000"
    command = [sys.executable, "-m", "jobd.cli.ctl.main", "--socket", daemon.socket, "run", "--queue", queue]
    command += ["--grace", "50ms", "--", "sh", "-c", script]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = functools.partial(
        subprocess.Popen, command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=die_with_us
    )
    process = await asyncio.to_thread(start)
    try:
        await when(client, job.id, lambda job: job.progress == 1)
        process.send_signal(signal.SIGTERM)
        out, err = await asyncio.to_thread(process.communicate)
    finally:
        process.kill()
        await asyncio.to_thread(process.wait)
    assert process.returncode == 0, err
    assert not has_members(int(out))
    back = await client.get_job(job.id)
    assert (back.status, back.attempt) == ("queued", 0)


async def test_a_program_that_takes_longer_than_its_timeout_is_stopped_and_its_attempt_fails(
    client: AsyncJobClient, queue: str, tmp_path: Path
) -> None:
    script = "trap 'echo told >&2; exit 0' TERM; sleep 1000 & echo $$; while :; do sleep 0.01; done"
    job = await client.create_job(queue=queue)
    bench = Bench(client, tmp_path, queue, script, once=True, timeout=0.5)
    assert await bench.run() == 1
    failed = await client.get_job(job.id)
    assert (failed.status, failed.error_code) == ("failed", "timeout")
    assert failed.error_message is not None
    first, *_, last = failed.error_message.splitlines()
    assert (first, last) == ("The run took longer than its timeout of 0.5 s. Last lines of stderr:", "told")
    assert not has_members(int(bench.out))


async def test_a_program_that_ignores_the_end_of_its_time_is_killed(
    client: AsyncJobClient, queue: str, tmp_path: Path
) -> None:
    script = "trap '' TERM; sleep 1000 & echo $$; while :; do sleep 0.01; done"
    job = await client.create_job(queue=queue, max_attempts=2)
    bench = Bench(client, tmp_path, queue, script, once=True, timeout=0.3, kill_after_s=0.2)
    assert await bench.run() == 1
    back = await client.get_job(job.id)
    assert (back.status, back.error_code) == ("queued", "timeout")
    assert not has_members(int(bench.out))


@pytest.mark.parametrize(("limit", "sent"), [({}, 0), ({"max_processing_ms": 5000}, 5000)])
async def test_the_locks_have_no_ceiling_unless_one_is_given(tmp_path: Path, limit: dict[str, Any], sent: int) -> None:
    peer = ScriptedServer()
    peer.always = lambda asked: ok({"grants": []})
    with serving(peer, tmp_path / "p") as endpoint:
        await CommandWorker(endpoint, ["true"], drain=True, **limit).run(signals=False)
    assert peer.asked[0].json["max_processing_ms"] == sent
    assert peer.asked[0].json["about"].keys() == {"instance", "host", "pid", "version", "concurrency"}


# ---------------------------------------------------------------------------------------------------------------------
# The programs of a worker that is killed.


@pytest.mark.parametrize("is_stubborn", [False, True], ids=["SIGTERM ends it", "it ignores SIGTERM"])
async def test_a_killed_run_ends_its_program_and_the_children(
    client: AsyncJobClient, daemon: Daemon, queue: str, tmp_path: Path, is_stubborn: bool
) -> None:
    trap = "trap '' TERM;" if is_stubborn else ""
    script = f"{trap} sleep 1000 & echo ::meta child=$!; echo $$ $! > {tmp_path}/pids.new; "
    script += f"mv {tmp_path}/pids.new {tmp_path}/pids; wait; while :; do sleep 0.01; done"
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = ["run", "--socket", daemon.socket, "--queue", queue, "--lock-ttl", "1s", "--", "sh", "-c", script]
    command = [sys.executable, "-c", "from jobd.cli.ctl.main import main; main()", *run]
    await client.create_job(queue=queue)
    start = functools.partial(subprocess.Popen, command, env=environ, preexec_fn=die_with_us)
    process = await asyncio.to_thread(start)
    try:
        await until((tmp_path / "pids").exists)
        program, child = map(int, (tmp_path / "pids").read_text().split())
        watchdogs = await asyncio.to_thread(_watchdogs_of, process.pid)
        assert len(watchdogs) == 1
    finally:
        process.kill()
        await asyncio.to_thread(process.wait)
    await until(lambda: not has_members(program) and not is_alive(child))
    await until(lambda: not is_alive(watchdogs[0]))


def _watchdogs_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task").glob("*/children")
    pids = [int(each) for path in children for each in path.read_text().split()]
    return [each for each in pids if b"watchdog.py" in Path(f"/proc/{each}/cmdline").read_bytes()]


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie waits for its parent only."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


async def test_a_watchdog_that_was_killed_is_replaced_and_knows_all_programs() -> None:
    dog = Watchdog(10)
    first, second = await Ran().start("sleep", "1000"), await Ran().start("sleep", "1000")
    dog.started(1, first._process.pid)
    before = dog._process
    assert before is not None
    before.kill()
    await asyncio.to_thread(before.wait)
    dog.started(2, second._process.pid)
    assert dog._process is not before
    await asyncio.to_thread(dog.close)
    await asyncio.gather(first.done, second.done)
    assert (first.returncode, second.returncode) == (-signal.SIGTERM, -signal.SIGTERM)


async def test_a_watchdog_that_was_killed_is_replaced_while_no_program_starts_or_ends() -> None:
    dog = Watchdog(10)
    program = await Ran().start("sleep", "1000")
    dog.started(1, program._process.pid)
    before = dog._process
    assert before is not None
    before.kill()
    await until(lambda: dog._process not in (None, before))
    await asyncio.to_thread(dog.close)
    await program.done
    assert program.returncode == -signal.SIGTERM


async def test_a_watchdog_finds_a_program_that_was_only_about_to_start_and_leaves_those_that_have_ended() -> None:
    dog = Watchdog(10)
    started = await Ran().start("sleep", "1000", JOBD_JOB_FENCING_TOKEN="4711")
    other = await Ran().start("sleep", "1000", JOBD_JOB_FENCING_TOKEN="4712")
    dog.starts(4710)
    dog.starts(4711)
    dog.started(4712, other._process.pid)
    dog.ended(4712)
    await asyncio.to_thread(dog.close)
    await started.done
    assert started.returncode == -signal.SIGTERM
    assert not other.done.done()
    other.abort()
    await other.done


def test_a_watchdog_kills_a_program_that_ignores_sigterm() -> None:
    with subprocess.Popen(
        ["sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.01; done"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as program:
        assert program.stdout is not None
        program.stdout.readline()
        watchdog.end({program.pid, program.pid}, 0.1)
        assert program.wait() == -signal.SIGKILL


async def test_a_run_leaves_no_watchdog(client: AsyncJobClient, queue: str, tmp_path: Path) -> None:
    await client.create_job(queue=queue)
    assert await Bench(client, tmp_path, queue, "true", once=True).run() == 0
    assert _watchdogs_of(os.getpid()) == []
