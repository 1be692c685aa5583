"""The output of a running job: when it is sent, and what is left out."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from jobd.client import AsyncHandlerContext, JobdError
from jobd.client.worker.job_output import EVERY_S, FIRST_S, FLUSH_S, SEND_BYTES, JobOutput
from tests.support.client_harness import working
from tests.support.scripted_server import rejected
from tests.support.virtual_engine import in_virtual_time, seconds


class Sent:
    """The requests of an output, and the error of the next ones."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.times_s: list[float] = []
        self.logged: list[str] = []
        self.error = ""
        self.takes_s = 0.0
        self.output = JobOutput("a", self._send, self.logged.append)

    async def _send(self, text: str) -> None:
        await asyncio.sleep(self.takes_s)
        if self.error:
            raise JobdError("No.", code=self.error)
        self.texts.append(text)
        self.times_s.append(asyncio.get_running_loop().time())


@in_virtual_time
async def test_text_of_any_thread_is_sent_once_a_second_and_at_the_end() -> None:
    sent, begun_s = Sent(), asyncio.get_running_loop().time()
    thread = threading.Thread(target=sent.output.add, args=("one\n",))
    thread.start()
    thread.join()
    sent.output.add("two\n")
    await seconds(FIRST_S + 0.1)
    sent.output.add("three\n")
    sent.output.add("four \udcff\n")
    await seconds(EVERY_S)
    sent.output.add("five")
    await sent.output.end(flush=True)
    sent.output.add("late")
    await sent.output.end(flush=True)
    assert sent.texts == ["one\ntwo\n", "three\nfour ?\n", "five"]
    assert [round(each - begun_s, 1) for each in sent.times_s] == [0.2, 1.2, 1.3]


@in_virtual_time
async def test_a_job_that_has_just_printed_or_has_lost_its_lock_sends_the_rest_or_nothing() -> None:
    for flush in (True, False):
        sent = Sent()
        sent.output.add("text")
        await sent.output.end(flush=flush)
        await seconds(3)
        assert sent.texts == ["text"] * flush
    await Sent().output.end(flush=True)


@in_virtual_time
async def test_of_much_text_the_end_is_sent_in_whole_characters() -> None:
    sent = Sent()
    for _ in range(20_000):
        sent.output.add("añ€")
    await seconds(FIRST_S + 0.1)
    [text] = sent.texts
    notice, _, rest = text.partition("\n")
    assert SEND_BYTES - 100 < len(text.encode()) <= SEND_BYTES
    assert (rest.strip("añ€"), rest[-3:]) == ("", "añ€")
    assert notice == f"… {6 * 20_000 - len(rest.encode())} bytes left out"


@in_virtual_time
async def test_text_is_kept_while_the_daemon_is_unreachable() -> None:
    sent = Sent()
    sent.error = "unreachable"
    sent.output.add("one ")
    await seconds(FIRST_S + 0.1)
    sent.output.add("x" * 3 * SEND_BYTES)
    await seconds(EVERY_S)
    sent.error = "too_frequent"
    await seconds(EVERY_S)
    sent.error = ""
    await seconds(EVERY_S)
    [text] = sent.texts
    assert (text[:2], text[-1]) == ("… ", "x")
    assert sent.logged == ["job a: its output cannot be sent: No. The work continues."]


@in_virtual_time
async def test_text_that_is_sent_while_more_is_left_out_counts_as_left_out() -> None:
    sent = Sent()
    sent.error, sent.takes_s = "unreachable", 0.5
    sent.output.add("one")
    await seconds(FIRST_S + 0.1)
    sent.output.add("x" * 3 * SEND_BYTES)
    await seconds(0.5)
    sent.error = ""
    await seconds(2)
    [text] = sent.texts
    notice, _, rest = text.partition("\n")
    assert notice == f"… {3 + 3 * SEND_BYTES - len(rest)} bytes left out"


@pytest.mark.parametrize("code", ["output_off", "not_found", "lock_lost", "output_unavailable"])
@in_virtual_time
async def test_an_error_drops_text_and_may_end_the_output(code: str) -> None:
    sent = Sent()
    sent.error = code
    sent.output.add("one")
    await seconds(2)
    sent.error = ""
    sent.output.add("two")
    await seconds(2)
    is_off = code != "output_unavailable"
    assert (sent.texts, len(sent.logged)) == ([] if is_off else ["two"], 0 if is_off else 1)


@in_virtual_time
async def test_a_slow_daemon_delays_the_end_by_a_second_at_most() -> None:
    sent = Sent()
    sent.takes_s = 60
    sent.output.add("one")
    begun_s = asyncio.get_running_loop().time()
    await sent.output.end(flush=True)
    assert asyncio.get_running_loop().time() - begun_s <= FLUSH_S + 0.1


@pytest.mark.parametrize("response", [rejected("lock_lost", 409), rejected("not_found", 404)])
async def test_output_is_sent_before_the_ending_and_its_errors_do_not_matter(tmp_path: Path, response: object) -> None:
    async def work(context: AsyncHandlerContext) -> None:
        context.log("a line")

    async with working(tmp_path, work, responses={"output": [response]}) as daemon:  # type: ignore[list-item]
        await daemon.receive("complete")
    assert daemon.bodies("output") == [{"lock_id": "secret", "text": "a line\n"}]
    verbs = [each.path.rpartition("/")[2] for each in daemon.server.received]
    assert verbs.index("output") < verbs.index("complete")
