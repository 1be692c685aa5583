"""Event streams over a real socket: filters, resumption, errors, aborts, ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from jobd.api.admin_routes import ROUTES as ADMIN_ROUTES
from jobd.api.worker_routes import ROUTES
from jobd.engine import event_feed
from jobd.http.auth import Authenticator
from jobd.http.worker_request import WorkerRequest
from jobd.model.requests import MAX_BACK
from tests.support.factories import ChangeFactory
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
    assert (await harness.request("GET", "/v1/events?follow=false", headers={"Last-Event-ID": "3"})).status == 200
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


def test_the_limits_fit_together() -> None:
    assert MAX_BACK >= event_feed.PAGE
    assert event_feed.PIECE_BYTES < event_feed.BACKLOG_BYTES
