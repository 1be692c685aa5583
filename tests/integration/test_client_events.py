"""Listening with the clients: a stream cut anywhere is read the same, and one that breaks off goes on where it was."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobd.client import (
    AdminClient,
    AsyncAdminClient,
    AsyncJobClient,
    BadAnswer,
    EventsGone,
    JobClient,
    JobdError,
    StreamedEvent,
    Unauthorized,
    Unreachable,
)
from jobd.client.event_subscription import EVENTS, subscribe
from jobd.client.protocol import ApiResponse
from tests.support.daemon_process import TOKEN, Daemon
from tests.support.scripted_server import ScriptedServer, Step, drop, no, raw, serving

KIND = "text/event-stream"
# How a client listens: what it heard before it ended, and with which error.
Ear = Callable[..., tuple[list[int], JobdError | None]]


def event(seq: int, job_id: str | None = "a") -> StreamedEvent:
    return StreamedEvent(seq, 1, "created", None, "queued", "client", None, {"ü": "\u2028"}, job_id, "q")


def sent(*seqs: int, start: int = 0) -> bytes:
    blocks = [f"id: {seq}\nevent: created\ndata: {msgspec.json.encode(event(seq)).decode()}\n\n" for seq in seqs]
    return f"retry: 2000\nid: {start}\n\n{''.join(blocks)}".encode()


def stream(*seqs: int, start: int = 0, rest: bytes = b"") -> Step:
    return raw(sent(*seqs, start=start) + rest, kind=KIND)


@pytest.fixture
def peer() -> ScriptedServer:
    return ScriptedServer()


@pytest.fixture
def endpoint(peer: ScriptedServer) -> Iterator[str]:
    with serving(peer) as where:
        yield where


def blocking(endpoint: str, **asked: Any) -> tuple[list[int], JobdError | None]:
    found: list[int] = []
    try:
        with JobClient(endpoint, retry_for_s=0) as client:
            for heard in client.events(**asked):
                found.append(heard.seq)
    except JobdError as error:
        return found, error
    return found, None


def coroutines(endpoint: str, **asked: Any) -> tuple[list[int], JobdError | None]:
    async def run() -> tuple[list[int], JobdError | None]:
        found: list[int] = []
        try:
            async with AsyncJobClient(endpoint, retry_for_s=0) as client:
                async for heard in client.events(**asked):
                    found.append(heard.seq)
        except JobdError as error:
            return found, error
        return found, None

    return asyncio.run(run())


both = pytest.mark.parametrize("ear", [blocking, coroutines])


# -- without IO --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 400), max_size=8), st.sampled_from([b"\n", b"\r\n"]))
def test_a_stream_may_come_in_any_pieces(cuts: list[int], end: bytes) -> None:
    text = (sent(3, 4, start=2) + b": still here\nid: 9\n\n").replace(b"\n", end)
    listening = subscribe(EVENTS)
    listening.request()
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    found = [each for a, b in itertools.pairwise(places) for each in listening.read(text[a:b])]
    assert found == [event(3), event(4)]
    assert listening.position == 9


def test_an_event_that_was_cut_off_is_asked_for_again() -> None:
    listening = subscribe(EVENTS, after=1)
    whole = sent(2, 3, start=1)
    assert [each.seq for each in listening.read(whole[:-1])] == [2]
    assert listening.position == 2
    assert listening.request().path == "/v1/events?last_event_id=2"
    assert [each.seq for each in listening.read(sent(3, start=2))] == [3]  # and nothing of the half one is left


def test_what_is_asked_for() -> None:
    asked = subscribe(EVENTS, queue="q", job_id=["a", "b"], type=(), last=5, follow=False)
    assert asked.request().path == "/v1/events?last=5&follow=false&queue=q&job_id=a%2Cb"
    asked.read(sent(start=7))
    assert asked.request().path == "/v1/events?last_event_id=7&follow=false&queue=q&job_id=a%2Cb"
    assert subscribe(EVENTS).request().path == "/v1/events"
    assert subscribe(EVENTS, after=0, last=5).request().path == "/v1/events?last_event_id=0"


def test_what_is_no_stream_of_events_is_named() -> None:
    listening = subscribe(EVENTS)
    listening.begin(ApiResponse(200, {"content-type": "text/event-stream; charset=utf-8"}, b""))
    for reply in (ApiResponse(200, {"content-type": "text/html"}, b""), ApiResponse(302, {}, b"")):
        with pytest.raises(BadAnswer, match="not a stream of events"):
            listening.begin(reply)
    with pytest.raises(BadAnswer, match="cannot be read"):
        listening.read(b"data: {}\n\n")
    with pytest.raises(BadAnswer, match="line without an end"):
        listening.read(b"x" * (17 << 20))


# -- over HTTP ---------------------------------------------------------------------------------------------------------


@both
def test_a_stream_that_breaks_off_goes_on_where_it_was(peer: ScriptedServer, endpoint: str, ear: Ear) -> None:
    half = b"id: 4\nevent: created\ndata: {"
    peer.script = [
        stream(1, 2, 3, rest=half),
        drop,
        no("overloaded", 503, headers={"Retry-After": "0"}),
        stream(4, start=3),
        stream(start=4, rest=b": still here\nid: 8\n\n"),
        no("events_gone", 410, "Read the state anew.", last=9),
    ]
    lost: list[str] = []
    found, error = ear(endpoint, queue="q", on_lost=lambda error: lost.append(error.code))
    assert found == [1, 2, 3, 4]
    assert isinstance(error, EventsGone)
    positions = [None, 3, 3, 3, 4, 8]
    assert [asked.path for asked in peer.asked] == [
        "/v1/events?" + (f"last_event_id={at}&" if at is not None else "") + "queue=q" for at in positions
    ]
    # What is dropped without a word aiohttp asks for once more by itself.
    assert [code for code in lost if code != "unreachable"] == ["overloaded"]
    assert lost[0] == lost[-1] == "unreachable"


@both
def test_the_first_connection_is_tried_as_other_calls_are(peer: ScriptedServer, endpoint: str, ear: Ear) -> None:
    peer.script = [drop, drop]
    found, error = ear(endpoint)
    assert (found, type(error)) == ([], Unreachable)
    peer.script = [no("unauthorized", 401), no("unauthorized", 401)]
    assert isinstance(ear(endpoint)[1], Unauthorized)


@both
def test_without_following_it_ends_and_a_break_is_no_end(peer: ScriptedServer, endpoint: str, ear: Ear) -> None:
    peer.early = [ScriptedServer.cut(b"no head of ours", chunked=True)]
    assert isinstance(ear(endpoint, last=3, follow=False)[1], BadAnswer)
    peer.script = [stream(2, 3, start=1)]
    assert ear(endpoint, last=3, follow=False) == ([2, 3], None)
    assert peer.asked[-1].path == "/v1/events?last=3&follow=false"


@both
def test_a_stream_without_follow_that_breaks_off_is_asked_for_the_rest(
    peer: ScriptedServer, endpoint: str, ear: Ear
) -> None:
    async def cut(request: Any) -> Any:
        from aiohttp import web

        response = web.StreamResponse(headers={"Content-Type": KIND})
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(sent(1, 2))
        request.transport.close()
        return response

    peer.early = [cut]
    peer.script = [stream(3, start=2)]
    assert ear(endpoint, after=0, follow=False) == ([1, 2, 3], None)
    assert peer.asked[-1].path == "/v1/events?last_event_id=2&follow=false"


# -- with a daemon -----------------------------------------------------------------------------------------------------


def create(daemon: Daemon, *ids: str) -> None:
    for job_id in ids:
        assert daemon.post("/v1/jobs", {"id": job_id}).status == 201


def test_over_a_restart_every_client_hears_everything_once(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon:
        worker, admin = f"unix:{daemon.socket}", f"unix:{daemon.admin_socket}"
        heard: dict[str, list[str | None]] = {name: [] for name in ("job", "admin", "aio", "aio admin")}
        ready = threading.Barrier(5)

        def listen(name: str, client: JobClient | AdminClient) -> None:
            with client:
                for each in client.events(last=1):
                    heard[name].append(each.job_id)
                    if each.job_id == "begin":
                        ready.wait(30)
                    if each.job_id == "end":
                        return

        async def hear(name: str, client: AsyncJobClient | AsyncAdminClient) -> None:
            async with client:
                async for each in client.events(last=1):
                    heard[name].append(each.job_id)
                    if each.job_id == "begin":
                        await asyncio.to_thread(ready.wait, 30)
                    if each.job_id == "end":
                        return

        create(daemon, "begin")
        threads = [
            threading.Thread(target=listen, args=("job", JobClient(worker))),
            threading.Thread(target=listen, args=("admin", AdminClient(admin, token=TOKEN))),
            threading.Thread(target=lambda: asyncio.run(hear("aio", AsyncJobClient(worker)))),
            threading.Thread(target=lambda: asyncio.run(hear("aio admin", AsyncAdminClient(admin, token=TOKEN)))),
        ]
        for thread in threads:
            thread.start()
        ready.wait(30)
        create(daemon, *(f"a{n}" for n in range(10)))
        daemon.kill()
        daemon.start()
        create(daemon, *(f"b{n}" for n in range(10)))
        assert daemon.stop() == 0
        daemon.start()
        create(daemon, *(f"c{n}" for n in range(10)), "end")
        for thread in threads:
            thread.join(50)
            assert not thread.is_alive()
    expected = ["begin", *(f"{letter}{n}" for letter in "abc" for n in range(10)), "end"]
    assert heard == dict.fromkeys(heard, expected)
