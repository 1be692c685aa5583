"""Rendering: safe pages, escaped text, compiled templates, and formatted values."""

from __future__ import annotations

import re
from urllib.parse import quote

import pytest
from jinja2 import FileSystemLoader

from jobd.dashboard import rendering
from tests.support.dashboard_harness import NASTY, PAGES, Browser, DashboardHarness, assert_safe, text


async def test_warming_compiles_all_templates(harness: DashboardHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobd.dashboard.rendering.WARM_PAUSE_S", 0)
    await harness.dashboard.warm()
    monkeypatch.setattr(FileSystemLoader, "get_source", None)
    browser = await harness.browser()
    for page in ("/", "/jobs", "/queues", "/docs", "/alerts"):
        assert "<main" in text(await browser.get(page))


@pytest.mark.parametrize("target", PAGES)
async def test_every_page_renders_without_and_with_jobs(harness: DashboardHarness, target: str) -> None:
    browser = await harness.browser()
    response = await browser.get(target)
    assert response.status == 200
    assert_safe(response)
    await harness.start_job()
    await harness.call("jobs", id="late", queue="mail", delay_ms=60_000)
    await harness.call("jobs/late/cancel", reason="r")
    for headers in ({}, {"HX_Request": "true"}):
        response = await browser.get(target, **headers)
        assert response.status == 200
        assert_safe(response)
        assert ("<html" in text(response)) == (not headers)


async def test_pages_without_a_session_and_error_pages_have_the_same_headers(harness: DashboardHarness) -> None:
    browser = await harness.browser()
    targets = ("/sign-in", "/docs/worker", "/jobs", "/static/none.js")
    responses = [await Browser(harness.admin).get(target) for target in targets]
    responses += [
        await browser.get("/jobs/nobody"),
        await browser.get("/jobs?status=x"),
        await browser.get("/jobs?x=1"),
    ]
    responses += [await browser.get("/jobs/held/confirm?verb=x"), await browser.post("/sign-in", token="x")]
    assert [each.status for each in responses] == [200, 200, 303, 404, 404, 400, 400, 400, 401]
    for each in responses:
        assert_safe(each)
    assert "No job has" in text(responses[4]) or "job_not_found" in text(responses[4])


async def test_text_from_outside_is_never_rendered_as_markup(harness: DashboardHarness) -> None:
    await harness.call("jobs", id="nasty", queue="q", kind="<b>k</b>", payload={NASTY: [NASTY]}, max_attempts=2)
    lock = (await harness.call("jobs/nasty/start", worker="<i>w</i>\u202e'"))["lock_id"]
    await harness.call("jobs/nasty/progress", lock_id=lock, progress=3, message=NASTY)
    browser = await harness.browser()
    responses = [await browser.get(each) for each in (*PAGES, "/jobs/nasty", "/jobs/nasty/confirm?verb=cancel")]
    await harness.call("jobs/nasty/fail", lock_id=lock, error_message=NASTY, error_code="<u>", retry=False)
    responses += [await browser.get(each) for each in ("/jobs", "/jobs/nasty")]
    responses.append(await browser.get(f"/jobs?kind={quote('<b>k</b>')}&worker={quote(NASTY.replace(chr(27), ''))}"))
    responses.append(await browser.get(f"/jobs?id={quote(NASTY)}"))
    responses.append(await browser.get(f"/jobs?status={quote(NASTY)}"))
    responses.append(await browser.get(f"/sign-in?next={quote(NASTY)}"))
    responses.append(await browser.confirm("nasty", "retry", NASTY))
    responses.append(await browser.get("/jobs/nasty"))
    for response in responses:
        page = text(response)
        for markup in ("<script>alert", "<b>", "<i>w", "<u>"):
            assert markup not in page, page[page.find(markup) - 200 :][:400]
        shown = re.sub(r'(<input [^>]*)value="[^"]*"', r"\1", page)  # fields keep raw values
        assert not {"\x1b", "\u202e"} & set(shown)
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;\u241b[31m\\u202e&amp;&#34;" in text(responses[-1])


def test_details_are_formatted() -> None:
    found = {"queue": "mail", "since": 1_700_000_000_000, "until": 10**15, "limit": 3}
    assert rendering.detail(found) == f"queue mail, since 2023-11-14 22:13:20 UTC, until {10**15}, limit 3"
    details = {"run_at": 1_700_000_000_000, "ttl_ms": 900_000, "progress": 100 / 3, "attempt": 1}
    assert rendering.detail(details) == "run_at 2023-11-14 22:13:20 UTC, ttl_ms 15 min, progress 33.3333, attempt 1"
    assert (rendering.detail(7), rendering.detail("a"), rendering.detail(True)) == ("7", "a", "True")


def test_numbers_and_times_are_formatted() -> None:
    assert rendering.thousands(1234567) == "1\u202f234\u202f567"
    assert rendering.iso_time(1_700_000_000_123) == "2023-11-14T22:13:20.123Z"
