"""Event streams over a real socket and of a real daemon: filters, resumption, errors, aborts, ends."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

import pytest

from jobd.api.admin_routes import ROUTES as ADMIN_ROUTES
from jobd.api.worker_routes import ROUTES
from jobd.engine import event_feed
from jobd.http.auth import Authenticator
from jobd.http.worker_request import WorkerRequest
from jobd.model.requests import MAX_BACK
from tests.support.daemon_process import TOKEN as ADMIN_TOKEN
from tests.support.daemon_process import DaemonProcess, UnixConnection
from tests.support.factories import ChangeFactory
from tests.support.forked_process import ForkedDaemon
from tests.support.http_harness import TOKEN, HttpHarness, RawConnection, request_bytes
from tests.support.virtual_engine import until

HEAD_END = b"\r\n\r\n"


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[HttpHarness]:
    async with HttpHarness(ROUTES, tmp_path) as opened:
        yield opened


class CommitPublisher:
    """Commits changes and publishes them to the feed of the harness."""

    def __init__(self, harness: HttpHarness) -> None:
        self.maker = ChangeFactory()
        self._harness = harness

    async def __call__(self, count: int = 1, **fields: Any) -> None:
        changes = [self.maker.create(**fields) for _ in range(count)]
        await self._harness.fakes.storage.write(self.maker.batch(changes))
        self._harness.services.feed.publish(changes)


@pytest.fixture
def commit(harness: HttpHarness) -> CommitPublisher:
    return CommitPublisher(harness)


async def opened_stream(harness: HttpHarness, query: str = "") -> RawConnection:
    client = await harness.connect()
    client.send(request_bytes("GET", f"/v1/events{query}"))
    head = await client.reader.readuntil(HEAD_END)
    assert head.startswith(b"HTTP/1.1 200 "), head
    return client


async def next_events(client: RawConnection, count: int) -> list[dict[str, Any]]:
    """Return the next events of a stream, without comments."""
    found: list[dict[str, Any]] = []
    while len(found) < count:
        text = await client.reader.readuntil(b"\n")
        if text.startswith(b"data: "):
            found.append(json.loads(text.removeprefix(b"data: ")))
    return found


async def seqs(client: RawConnection, count: int) -> list[int]:
    return [event["seq"] for event in await next_events(client, count)]


async def test_a_stream_has_its_headers(harness: HttpHarness, commit: CommitPublisher) -> None:
    client = await harness.connect()
    client.send(request_bytes("GET", "/v1/events"))
    head = (await client.reader.readuntil(HEAD_END)).decode().lower()
    for header in ("content-type: text/event-stream", "cache-control: no-store", "x-accel-buffering: no"):
        assert f"\r\n{header}\r\n" in head
    await client.reader.readuntil(b"retry: 2000\nid: 0\n\n")
    await commit()
    assert await seqs(client, 1) == [1]


async def test_a_stream_resumes_after_the_last_received_event(harness: HttpHarness, commit: CommitPublisher) -> None:
    await commit(3)
    by_header = await harness.connect()
    by_header.send(request_bytes("GET", "/v1/events", headers={"Last-Event-ID": "1"}))
    assert await seqs(by_header, 2) == [2, 3]
    by_query = await opened_stream(harness, "?last_event_id=2")
    assert await seqs(by_query, 1) == [3]
    both = await harness.connect()  # a browser that reconnects with its original query
    both.send(request_bytes("GET", "/v1/events?last_event_id=0", headers={"Last-Event-ID": "2"}))
    assert await seqs(both, 1) == [3]
    await commit()
    for line in (by_header, by_query, both):
        assert await seqs(line, 1) == [4]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("?type=nothing", "$.type"),
        ("?type=created,", "$.type"),
        ("?queue=a%20b", "$.queue"),
        ("?job_id=a,,b", "$.job_id"),
        (f"?job_id={','.join(f'j{n}' for n in range(101))}", "$.job_id"),
        ("?queue=", "$.queue"),
        ("?last=0", "$.last"),
        ("?last=10001", "$.last"),
        ("?last=1&last_event_id=1", "$.last"),
        ("?last_event_id=-1", "$.last_event_id"),
        ("?follow=perhaps", "$.follow"),
        ("?unknown=1", "$.unknown"),
        ("?queue=a&queue=b", "$.queue"),
    ],
)
async def test_invalid_parameters_are_named(harness: HttpHarness, query: str, field: str) -> None:
    response = await harness.request("GET", f"/v1/events{query}")
    assert (response.status, response.error, response.json["details"]["field"]) == (400, "invalid_request", field)


@pytest.mark.parametrize(
    "value", ["x", "-1", "1.0", "9" * 19, "9" * 30, "0" * 20 + "9" * 30, "0" * 20 + "9" * 5_000, "²"]
)
async def test_a_last_event_id_is_a_number(harness: HttpHarness, value: str) -> None:
    response = await harness.send_raw(request_bytes("GET", "/v1/events", headers={"Last-Event-ID": value}))
    assert (response.status, response.json["details"]["field"]) == (400, "Last-Event-ID")


async def test_pruned_events_are_an_error(harness: HttpHarness, commit: CommitPublisher) -> None:
    await commit(5)
    harness.fakes.storage.gone_to = 3
    for after in ("2", "6"):
        response = await harness.request("GET", "/v1/events", headers={"Last-Event-ID": after})
        assert (response.status, response.error, response.json["details"]) == (410, "events_gone", {"last": 5})
    response = await harness.request("GET", "/v1/events?follow=false", headers={"Last-Event-ID": "3"})
    assert response.status == 200
    assert harness.services.feed.listeners == 0


async def test_a_stream_that_cannot_continue_is_aborted(harness: HttpHarness, commit: CommitPublisher) -> None:
    """The client must not take that for the end of the stream."""
    await commit(3 * event_feed.PAGE)
    client = await harness.connect()
    client.send(request_bytes("GET", "/v1/events?follow=false", headers={"Last-Event-ID": "0"}))
    await seqs(client, 1)
    harness.fakes.storage.gone_to = 3 * event_feed.PAGE
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await client.reader.readuntil(b"0\r\n\r\n")


async def test_the_admin_api_has_the_stream_too_and_requires_a_token(tmp_path: Path) -> None:
    gate = Authenticator("admin", tokens=[TOKEN])
    async with HttpHarness(ADMIN_ROUTES, tmp_path, authenticator=gate, admin=True) as harness:
        path = "/admin/job-management/events?follow=false"
        assert (await harness.request("GET", path)).status == 401
        response = await harness.request("GET", path, headers={"Authorization": f"Bearer {TOKEN}"})
        assert (response.status, response.headers["content-type"]) == (200, "text/event-stream")
        assert response.body.startswith(b"retry: 2000\nid: 0\n\n")


@pytest.mark.slow
async def test_a_client_that_does_not_read_is_cut_off_and_the_others_receive_everything(
    harness: HttpHarness, commit: CommitPublisher
) -> None:
    slow, quick = await opened_stream(harness), await opened_stream(harness)
    total = 0
    hearing = asyncio.ensure_future(next_events(quick, 60_000))
    while not harness.services.feed.dropped:
        await commit(1_000)
        total += 1_000
        await until(lambda: not harness.services.feed._news)  # as a real disk would yield to the loop
        assert total < 60_000, "the slow one was not cut off"
    await commit(60_000 - total)
    assert [event["seq"] for event in await hearing] == list(range(1, 60_001))
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await next_events(slow, 60_000)
    await until(lambda: harness.services.feed.listeners == 1)
    assert harness.services.feed.dropped == 1


async def test_the_wait_for_a_client_that_does_not_read_the_journal_is_limited(
    harness: HttpHarness, commit: CommitPublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobd.http.read_deadline.WRITE_TIMEOUT_S", 0.05)
    await commit(20_000)
    client = await harness.connect()
    client.send(request_bytes("GET", "/v1/events", headers={"Last-Event-ID": "0"}))
    await until(lambda: harness.services.feed.listeners == 1)
    await until(lambda: harness.services.feed.listeners == 0)
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await next_events(client, 20_000)


async def test_the_wait_for_a_client_that_does_not_read_the_end_is_limited(
    harness: HttpHarness, commit: CommitPublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of a stream that ends may be larger than the socket buffer."""

    async def waits_for_the_client(self: WorkerRequest) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(WorkerRequest, "finish", waits_for_the_client)
    monkeypatch.setattr("jobd.http.read_deadline.WRITE_TIMEOUT_S", 0.05)
    await commit(3)
    client = await opened_stream(harness, "?follow=false&last=2")
    assert await seqs(client, 2) == [2, 3]
    await until(lambda: harness.services.feed.listeners == 0)
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await seqs(client, 1)


async def test_streams_end_cleanly_when_the_listeners_close(harness: HttpHarness, commit: CommitPublisher) -> None:
    client = await opened_stream(harness)
    await commit(2)
    harness.services.feed.close()
    await harness.stop(5.0)
    assert await seqs(client, 2) == [1, 2]
    assert (await client.reader.read()).endswith(b"0\r\n\r\n")


async def test_a_bug_in_a_stream_ends_that_stream_only(
    harness: HttpHarness, commit: CommitPublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(self: Any) -> bytes:
        raise RuntimeError("a bug")

    client = await opened_stream(harness)
    monkeypatch.setattr(event_feed.Subscriber, "_from_storage", fail)
    broken = await harness.connect()
    broken.send(request_bytes("GET", "/v1/events", headers={"Last-Event-ID": "0"}))
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await broken.reader.readuntil(b"0\r\n\r\n")
    await commit()
    assert await seqs(client, 1) == [1]


# ---------------------------------------------------------------------------------------------------------------------
# A real daemon.


class EventStreamClient:
    """A client in a thread that receives every event, and the last `id`."""

    def __init__(self, response: HTTPResponse) -> None:
        self.events: list[dict[str, Any]] = []
        self.position = self._next = ""
        self._data = b""
        self.is_complete = False
        self._response = response
        self._has_events = threading.Condition()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        later_events = b""
        try:
            while piece := self._response.read1(65_536):  # readline would take an abort for the end
                *lines, later_events = (later_events + piece).split(b"\n")
                with self._has_events:
                    self._note(lines)
                    self._has_events.notify_all()
            self.is_complete = True
        except (OSError, HTTPException):
            pass  # cut off: `is_complete` stays false

    def _note(self, lines: list[bytes]) -> None:
        for line in lines:
            if line.startswith(b"id: "):
                self._next = line[4:].decode()
            elif line.startswith(b"data: "):
                self._data = line[6:]
            elif not line:  # an incomplete event is ignored
                self.position = self._next
                if self._data:
                    self.events.append(json.loads(self._data))
                self._data = b""

    def until(self, count: int) -> None:
        with self._has_events:
            assert self._has_events.wait_for(lambda: len(self.events) >= count, 50), len(self.events)

    def ended(self) -> None:
        self._thread.join(50)
        assert not self._thread.is_alive()


@contextmanager
def stream(daemon: DaemonProcess, query: str = "", after: str = "") -> Iterator[EventStreamClient]:
    with closing(UnixConnection(daemon.socket)) as connection:
        connection.request("GET", f"/v1/events{query}", headers={"Last-Event-ID": after} if after else {})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        received = EventStreamClient(response)
        try:
            yield received
        finally:
            if connection.sock is not None:
                connection.sock.shutdown(2)
            received.ended()


def lifecycle(daemon: DaemonProcess, job_id: str) -> None:
    daemon.post("/v1/jobs", {"id": job_id})
    lock = daemon.post(f"/v1/jobs/{job_id}/start", {"worker": "w"}).data["lock_id"]
    daemon.post(f"/v1/jobs/{job_id}/complete", {"lock_id": lock, "metadata": 1})


@pytest.mark.slow
def test_a_client_that_reconnects_receives_everything_once_across_kills(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    position = "0"
    with ForkedDaemon(tmp_path) as daemon:
        for generation in range(3):
            with stream(daemon, after=position) as received:
                for number in range(20):
                    lifecycle(daemon, f"job-{generation}-{number}")
                if generation % 2:
                    received.until(20)  # killed while some events may be in flight
                daemon.kill()
                received.ended()
                assert not received.is_complete
            events += received.events
            position = received.position or position
            daemon.start()
        with stream(daemon, "?follow=false", after=position) as later_events:
            later_events.ended()
            assert later_events.is_complete
        events += later_events.events
        assert [event["seq"] for event in events] == sorted({event["seq"] for event in events})
        with stream(daemon, "?follow=false&last_event_id=0") as complete:
            complete.ended()
        assert events == complete.events
        assert len([event for event in events if event["type"] == "completed"]) == 60
        for job_id in ("job-0-0", "job-2-19"):
            shown = [{k: v for k, v in each.items() if k not in ("job_id", "queue")} for each in events
                     if each["job_id"] == job_id]  # fmt: skip
            assert shown == daemon.get(f"/v1/jobs/{job_id}/timeline").data["events"]


@pytest.mark.slow
def test_both_listeners_share_the_limit_of_streams_and_metrics_show_it(tmp_path: Path) -> None:
    with ForkedDaemon(tmp_path, "[limits]\nevent_streams = 1\n") as daemon, stream(daemon) as received:
        lifecycle(daemon, "a")
        received.until(3)
        no = daemon.admin("GET", "events", Authorization=f"Bearer {ADMIN_TOKEN}")
        assert (no.status, no.error) == (503, "overloaded")
        figures = daemon.admin("GET", "/metrics").body.decode()
        assert "\njobd_event_streams 1.0\n" in figures
        assert "\njobd_event_streams_dropped_total 0.0\n" in figures


def test_the_limits_fit_together() -> None:
    assert MAX_BACK >= event_feed.PAGE
    assert event_feed.PIECE_BYTES < event_feed.BACKLOG_BYTES
