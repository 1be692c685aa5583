"""Subscriptions to events: parsing, resuming and reconnecting."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobd.client import BadResponse, EventsGone, StreamedEvent, Unauthorized, Unreachable
from jobd.client.api_request import ApiResponse
from jobd.client.event_subscription import EventSubscription
from jobd.model.calls import EventRequests
from tests.support.client_harness import listen
from tests.support.scripted_server import ScriptedServer, Step, drop, raw, rejected

KIND = "text/event-stream"


def event(seq: int, job_id: str | None = "a") -> StreamedEvent:
    return StreamedEvent(seq, 1, "created", None, "queued", "client", None, {"ü": "\u2028"}, job_id, "q")


def sent(*seqs: int, start: int = 0) -> bytes:
    blocks = [f"id: {seq}\nevent: created\ndata: {msgspec.json.encode(event(seq)).decode()}\n\n" for seq in seqs]
    return f"retry: 2000\nid: {start}\n\n{''.join(blocks)}".encode()


def stream(*seqs: int, start: int = 0, rest: bytes = b"") -> Step:
    return raw(sent(*seqs, start=start) + rest, kind=KIND)


both = pytest.mark.parametrize("kind", ["sync", "asyncio"])


@given(st.lists(st.integers(0, 400), max_size=8), st.sampled_from([b"\n", b"\r\n"]))
def test_a_stream_may_arrive_in_any_pieces(cuts: list[int], end: bytes) -> None:
    text = (sent(3, 4, start=2) + b": still here\nid: 9\n\n").replace(b"\n", end)
    subscription = EventSubscription(EventRequests.events)
    subscription.request()
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    found = [each for a, b in itertools.pairwise(places) for each in subscription.read(text[a:b])]
    assert found == [event(3), event(4)]
    assert subscription.position == 9


def test_an_incomplete_event_is_requested_again() -> None:
    subscription = EventSubscription(EventRequests.events, after=1)
    whole = sent(2, 3, start=1)
    assert [each.seq for each in subscription.read(whole[:-1])] == [2]
    assert subscription.position == 2
    assert subscription.request().path == "/v1/events?last_event_id=2"
    assert [each.seq for each in subscription.read(sent(3, start=2))] == [3]  # the incomplete event is discarded


def test_the_request_has_the_filters_and_the_position() -> None:
    received = EventSubscription(EventRequests.events, queue="q", job_id=["a", "b"], type=(), last=5, follow=False)
    assert received.request().path == "/v1/events?last=5&follow=false&queue=q&job_id=a%2Cb"
    received.read(sent(start=7))
    assert received.request().path == "/v1/events?last_event_id=7&follow=false&queue=q&job_id=a%2Cb"
    assert EventSubscription(EventRequests.events).request().path == "/v1/events"
    assert EventSubscription(EventRequests.events, after=0, last=5).request().path == "/v1/events?last_event_id=0"


def test_another_response_is_not_a_stream_of_events() -> None:
    subscription = EventSubscription(EventRequests.events)
    subscription.begin(ApiResponse(200, {"content-type": "text/event-stream; charset=utf-8"}, b""))
    for reply in (ApiResponse(200, {"content-type": "text/html"}, b""), ApiResponse(302, {}, b"")):
        with pytest.raises(BadResponse, match="not a stream of events"):
            subscription.begin(reply)
    with pytest.raises(BadResponse, match="cannot be read"):
        subscription.read(b"data: {}\n\n")
    with pytest.raises(BadResponse, match="line without an end"):
        subscription.read(b"x" * (17 << 20))


@both
def test_a_broken_stream_is_resumed(server: ScriptedServer, endpoint: str, kind: str) -> None:
    half = b"id: 4\nevent: created\ndata: {"
    server.script = [
        stream(1, 2, 3, rest=half),
        drop,
        rejected("overloaded", 503, headers={"Retry-After": "0"}),
        stream(4, start=3),
        stream(start=4, rest=b": still here\nid: 8\n\n"),
        rejected("events_gone", 410, "Read the state anew.", last=9),
    ]
    lost: list[str] = []
    found, error = listen(kind, endpoint, queue="q", on_lost=lambda error: lost.append(error.code))
    assert found == [1, 2, 3, 4]
    assert isinstance(error, EventsGone)
    positions = [None, 3, 3, 3, 4, 8]
    assert [received.path for received in server.received] == [
        "/v1/events?" + (f"last_event_id={at}&" if at is not None else "") + "queue=q" for at in positions
    ]
    # aiohttp repeats a dropped request once by itself.
    assert [code for code in lost if code != "unreachable"] == ["overloaded"]
    assert lost[0] == lost[-1] == "unreachable"


@both
def test_the_first_connection_is_retried_like_other_calls(server: ScriptedServer, endpoint: str, kind: str) -> None:
    server.script = [drop, drop]
    found, error = listen(kind, endpoint)
    assert (found, type(error)) == ([], Unreachable)
    server.script = [rejected("unauthorized", 401), rejected("unauthorized", 401)]
    assert isinstance(listen(kind, endpoint)[1], Unauthorized)


@both
def test_a_stream_without_follow_ends_at_its_end(server: ScriptedServer, endpoint: str, kind: str) -> None:
    server.early = [ScriptedServer.cut(b"no head of ours", chunked=True)]
    assert isinstance(listen(kind, endpoint, last=3, follow=False)[1], BadResponse)
    server.script = [stream(2, 3, start=1)]
    assert listen(kind, endpoint, last=3, follow=False) == ([2, 3], None)
    assert server.received[-1].path == "/v1/events?last=3&follow=false"


@both
def test_a_broken_stream_without_follow_is_resumed(server: ScriptedServer, endpoint: str, kind: str) -> None:
    async def cut(request: Any) -> Any:
        from aiohttp import web

        response = web.StreamResponse(headers={"Content-Type": KIND})
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(sent(1, 2))
        request.transport.close()
        return response

    server.early = [cut]
    server.script = [stream(3, start=2)]
    assert listen(kind, endpoint, after=0, follow=False) == ([1, 2, 3], None)
    assert server.received[-1].path == "/v1/events?last_event_id=2&follow=false"
