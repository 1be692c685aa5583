"""Event streams of open pages."""

from __future__ import annotations

import asyncio
import re

import pytest

from jobd.dashboard import live_updates, sessions
from tests.support.dashboard_harness import AUTH, READ_ONLY_TOKEN, Browser, DashboardHarness, text
from tests.support.http_harness import RawConnection, request_bytes


async def test_an_update_without_a_session_redirects_to_the_sign_in(harness: DashboardHarness) -> None:
    response = await Browser(harness.admin).get("/jobs?queue=a", HX_Request="true")
    assert (response.status, response.headers["hx-redirect"]) == (401, "/sign-in?next=%2Fjobs%3Fqueue%3Da")
    assert (await Browser(harness.admin).get("/chart.json")).status == 401


class EventStream:
    """The event stream of an open page."""

    def __init__(self, client: RawConnection) -> None:
        self.line = client
        self.headers = ""

    async def events(self) -> str:
        """Return the next chunk, "" at the end."""
        size = int(await self.line.reader.readuntil(b"\r\n"), 16)
        piece = await self.line.reader.readexactly(size + 2)
        return piece[:-2].decode()


async def open_stream(harness: DashboardHarness, browser: Browser, target: str = "/live") -> EventStream:
    client = await harness.admin.connect()
    client.send(request_bytes("GET", target, headers={"Cookie": browser.cookie}))
    found = EventStream(client)
    found.headers = (await client.reader.readuntil(b"\r\n\r\n")).decode()
    assert found.headers.startswith("HTTP/1.1 200 ")
    assert await found.events() == "retry: 2000\nevent: live\ndata:\n\n"
    return found


CHANGE = "event: change\ndata:\n\n"


async def test_a_page_gets_events_of_its_own_subscription_only(
    harness: DashboardHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_updates, "MIN_INTERVAL_S", 0.0)
    monkeypatch.setattr(live_updates, "MIN_LIST_INTERVAL_S", 0.0)
    lock = await harness.start_job()
    browser, reader = await harness.browser(), await harness.browser(READ_ONLY_TOKEN)
    job = await open_stream(harness, browser, "/live?job_id=held")
    other = await open_stream(harness, reader, "/live?queue=mail")
    everything = await open_stream(harness, browser)
    assert "content-type: text/event-stream" in job.headers.lower()
    await harness.call("jobs/held/progress", lock_id=lock, progress=1)
    assert (await job.events(), await everything.events()) == (CHANGE, CHANGE)
    await harness.call("jobs", id="b", queue="mail")
    assert (await other.events(), await everything.events()) == (CHANGE, CHANGE)
    assert harness.admin.services.feed.listeners == 3
    for each in (job, other, everything):
        await each.line.close()
    while harness.admin.services.feed.listeners:
        await harness.admin.request("GET", "/healthz")


@pytest.mark.slow
async def test_a_page_gets_at_most_one_event_a_second(
    harness: DashboardHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser = await harness.browser()
    response = await open_stream(harness, browser)
    await harness.call("jobs/bulk", jobs=[{"id": f"job-{number}"} for number in range(500)])
    assert await response.events() == CHANGE
    began = asyncio.get_running_loop().time()
    await harness.call("jobs/bulk", jobs=[{"id": f"more-{number}"} for number in range(500)])
    assert await response.events() == CHANGE
    assert asyncio.get_running_loop().time() - began >= live_updates.MIN_INTERVAL_S / 2
    assert live_updates.MIN_INTERVAL_S >= 1
    assert live_updates.MIN_LIST_INTERVAL_S >= 1


@pytest.mark.parametrize("way", ["sign-out", "token", "age"])
async def test_an_event_stream_ends_with_its_session(
    harness: DashboardHarness, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(live_updates, "SESSION_CHECK_S", 0.01)
    browser = await harness.browser()
    response = await open_stream(harness, browser)
    if way == "sign-out":
        await browser.post("/sign-out", csrf=await browser.csrf())
    elif way == "token":
        harness.admin.app.authenticator.replace_tokens(["another-token-0123456789abcdef"], [])
    else:
        harness.now_s += sessions.MAX_AGE_S
    assert await response.events() == "event: end\ndata:\n\n"
    assert await response.events() == ""
    assert (await browser.get("/live")).status == 401


async def test_an_open_page_keeps_its_session_alive(harness: DashboardHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_updates, "SESSION_CHECK_S", 0.01)
    monkeypatch.setattr(live_updates, "HEARTBEAT_S", 0.05)
    browser = await harness.browser()
    response = await open_stream(harness, browser)
    for _ in range(3):
        harness.now_s += sessions.IDLE_S - 1
        assert await response.events() == ": keep-alive\n\n"
    assert (await browser.get("/")).status == 200


async def test_an_event_stream_needs_capacity_and_a_session(harness: DashboardHarness) -> None:
    browser = await harness.browser()
    assert (await Browser(harness.admin).get("/live")).status == 401
    assert (await browser.get("/live?job_id=a%20b")).status == 400
    assert (await browser.get("/live?job=a")).status == 400
    taken = [await open_stream(harness, browser) for _ in range(3)]
    assert (await browser.get("/live")).failure == (503, "overloaded")
    harness.admin.services.feed.close()
    for each in taken:
        assert await each.events() == ""
    assert (await browser.get("/live")).error == "shutting_down"
    response = await harness.admin.request("GET", "/live", headers=AUTH)
    assert response.error == "shutting_down", "programs can subscribe too"
    client = await harness.admin.connect()
    response = await client.request("HEAD", "/live", headers={"Cookie": browser.cookie})
    assert (response.status, response.headers["content-type"]) == (200, "text/event-stream")


@pytest.mark.parametrize(
    ("target", "news"),
    [
        ("/", "/live"),
        ("/jobs", "/live"),
        ("/jobs?queue=video", "/live?queue=video"),
        ("/jobs/held", "/live?job_id=held"),
        ("/queues", "/live"),
    ],
)
async def test_a_page_names_its_event_stream(harness: DashboardHarness, target: str, news: str) -> None:
    await harness.start_job()
    page = text(await (await harness.browser()).get(target))
    assert f'data-events-url="{news}"' in page
    assert re.search(r'data-interval-s="\d"', page)
