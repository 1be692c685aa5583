"""Pausing, cleanup, recovery, take-backs and the clock."""

from __future__ import annotations

import re

import pytest

from jobd.model.errors import ApiError
from jobd.model.job import Policy
from jobd.model.responses import PreviewView, Recovery
from tests.support.dashboard_harness import READ_ONLY_TOKEN, DashboardHarness, assert_safe, text


async def test_queues_are_paused_and_resumed(harness: DashboardHarness) -> None:
    await harness.start_job()
    browser = await harness.browser()
    assert (await browser.post("/queues/pause", name="video", csrf=await browser.csrf())).redirect == "/queues"
    await browser.post("/queues/video/resume", csrf=await browser.csrf())
    assert "Queue video is resumed." in text(await browser.get("/queues"))
    assert "Queue paused" not in text(await browser.get("/queues"))
    assert (await browser.post("/queues/a%20b/pause", csrf=await browser.csrf())).status == 400


async def test_accepting_the_clock_previews_the_deletions(harness: DashboardHarness) -> None:
    browser = await harness.browser()
    assert 'href="/clock"' in text(await browser.get("/alerts"))
    page = text(await browser.get("/clock"))
    assert "2 finished jobs" in page
    assert "old-2" in page
    assert "Accept the clock</button>" in page
    harness.admin.fakes.past_jobs = [f"old-{number}" for number in range(70)]
    assert "Only the first are shown." in text(await browser.get("/clock"))
    harness.admin.fakes.past_jobs = []
    assert "No finished job is old enough" in text(await browser.get("/clock"))
    harness.admin.fakes.no_preview = ApiError("overloaded", "Too much is waiting.")
    page = text(await browser.get("/clock"))
    assert "Accept the clock</button>" not in page
    assert "Too much is waiting" in page
    harness.admin.fakes.accepted = True
    assert "Back to alerts" in text(await browser.get("/clock"))
    harness.admin.fakes.accepted, harness.admin.fakes.no_preview = False, None
    page = text(await (await harness.browser(READ_ONLY_TOKEN)).get("/clock"))
    assert "Accept the clock?" in page
    assert '<form method="post" action="/clock/accept"' not in page


async def test_cleanup_recovery_and_the_clock_have_forms(harness: DashboardHarness) -> None:
    browser = await harness.browser()
    assert "/clock" in text(await browser.get("/alerts"))
    csrf = await browser.csrf()
    for target, onward, expected in (
        ("/cleanup/run", "/cleanup", "Cleanup took 6 ms: 1 recovered"),
        ("/cleanup/recover", "/cleanup", "Stalled jobs recovered: 1 (1 requeued, 0 failed)."),
        ("/clock/accept", "/alerts", "The clock is accepted"),
    ):
        assert (await browser.post(target, csrf=csrf)).redirect == onward
        assert expected in text(await browser.get(onward))
    assert harness.admin.fakes.forced == [True]
    assert harness.admin.fakes.accepted
    page = text(await browser.get("/alerts"))
    assert "bad-1" in page
    assert 'href="/clock"' not in page


async def test_the_jobs_of_a_silent_worker_are_taken_back(harness: DashboardHarness) -> None:
    browser, reader = await harness.browser(), await harness.browser(READ_ONLY_TOKEN)
    await harness.call("jobs", id="held")
    await harness.call("claim", worker="w <7>")
    assert "silent" not in text(await browser.get("/jobs/held"))
    harness.ahead_ms = Policy().lock_ttl_ms
    url = "/workers/take-back?name=w%20%3C7%3E"
    for page in ("/jobs/held", "/workers", "/workers?state=silent"):
        response = await browser.get(page)
        assert_safe(response)
        assert 'class="badge bad">silent' in text(response), page
        assert f'href="{url}"' in text(response), page
        assert url not in text(await reader.get(page)), page
    assert 'class="badge bad">silent' in text(await browser.get("/jobs"))
    overview = text(await browser.get("/"))
    assert "1 silent</a> w &lt;7&gt;" in overview
    assert (await reader.get(url)).status == 403
    response = await browser.get(url)
    assert_safe(response)
    page = text(response)
    assert 'action="/workers/take-back"' in page
    assert "No update from worker w &lt;7&gt;" in page
    assert "jobctl take-back &#39;w &lt;7&gt;&#39;" in page
    assert await harness.status("held") == "processing", "nothing has changed yet"
    assert (await browser.post("/workers/take-back", name="w <7>")).status == 403, "no CSRF token"
    csrf = await browser.csrf()
    assert (await browser.post("/workers/take-back", name="w <7>", reason="dead", csrf=csrf)).redirect == "/workers"
    assert "Jobs taken back: 1 (1 requeued, 0 failed)." in text(await browser.get("/workers"))
    assert await harness.status("held") == "queued"
    assert "is not silent, but died: it holds no job" in (await browser.get(url)).page(409)
    assert "not silent" in (await browser.post("/workers/take-back", name="w <7>", csrf=csrf)).page(409)
    assert (await browser.get("/workers/take-back?name=nobody")).status == 404


async def test_cleanup_and_recovery_are_previewed(harness: DashboardHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    browser, reader, fakes = await harness.browser(), await harness.browser(READ_ONLY_TOKEN), harness.admin.fakes
    page = text(await browser.get("/cleanup"))
    assert 'method="post" action="/cleanup' not in page, "every action is confirmed"
    assert re.findall(r'href="(/cleanup/confirm[^"]*)"', page) == [
        "/cleanup/confirm?what=run",
        "/cleanup/confirm?what=recover",
    ]
    assert "/cleanup/confirm" not in text(await reader.get("/cleanup"))
    assert (await reader.get("/cleanup/confirm?what=run")).status == 403
    response = await browser.get("/cleanup/confirm?what=run")
    assert_safe(response)
    page = text(response)
    moves = re.findall(r"<li>(\d+)", page[page.index('class="transitions"') :].partition("</ul>")[0])
    assert moves == ["1", "1", "2"]
    assert re.findall(r'href="/jobs/(\w)"', page) == ["a", "b"]
    assert "stalled" in page
    assert 'action="/cleanup/run"' in page
    assert fakes.forced == [], "nothing has changed yet"
    page = text(await browser.get("/cleanup/confirm?what=recover"))
    assert re.findall(r'href="/jobs/(\w)"', page) == ["a"]
    assert 'action="/cleanup/recover"' in page
    many = PreviewView([Recovery("f", "failed", "<x>")] * 1000, 0, [], [f"d{n}" for n in range(1000)], [], True, 1)

    async def preview(scan_s: float) -> PreviewView | ApiError:
        return many

    monkeypatch.setattr(harness.admin.services.maintainer, "preview", preview)
    page = text(await browser.get("/cleanup/confirm?what=run"))
    assert "1\u202f000 or more" in page
    assert "950 more." in page
    assert "&lt;x&gt;" in page
    assert "no job is expired or deleted by age" in page, "the clock is suspect"
    many = PreviewView([], 0, [], [], ["w1", "w2"], True, 1, more_invalid=True)
    page = text(await browser.get("/cleanup/confirm?what=run"))
    assert "2 or more invalid" in page
    assert "too many jobs to scan all of them" in page
    many = PreviewView([], 0, [], [], [], True, 1, more_invalid=True)
    page = text(await browser.get("/cleanup/confirm?what=run"))
    assert "No stalled or expired jobs found so far." in page
    assert "too many jobs to scan all of them" in page
    assert "too many jobs to scan all of them" not in text(await browser.get("/cleanup/confirm?what=recover"))
    many = PreviewView([], 0, ["a"], [], [], False, 1)
    assert "too many jobs to scan all of them" not in text(await browser.get("/cleanup/confirm?what=run"))
    assert "No stalled jobs." in text(await browser.get("/cleanup/confirm?what=recover"))

    async def rejects(scan_s: float) -> PreviewView | ApiError:
        return ApiError("overloaded", "later")

    monkeypatch.setattr(harness.admin.services.maintainer, "preview", rejects)
    assert (await browser.get("/cleanup/confirm?what=run")).status == 503
    assert (await browser.get("/cleanup/confirm?what=all")).status == 400
