"""Filters of the list of jobs."""

from __future__ import annotations

import html
import json
import re
from functools import partial
from urllib.parse import quote

import pytest

from jobd.core.state import State
from jobd.dashboard import filters, pages
from jobd.engine import history
from jobd.model.storage import JobQuery
from tests.support.dashboard_harness import AUTH, DashboardHarness, assert_safe, following_pages, submit_plan, text


async def test_filters_are_in_the_url_of_every_page(harness: DashboardHarness) -> None:
    jobs = [{"id": f"job-{number:03}", "queue": ("a", "b")[number % 2]} for number in range(120)]
    await harness.call("jobs/bulk", jobs=jobs)
    browser = await harness.browser()
    shown = await following_pages(browser, "/jobs?status=queued&queue=a&kind=&worker=")
    seen = [job_id for page in shown for job_id in re.findall(r'href="/jobs/(job-\d+)"', page)]
    assert seen == [f"job-{number:03}" for number in range(118, -1, -2)]
    assert (await browser.get("/jobs?id=job-007")).redirect == "/jobs/job-007"
    response = await browser.get("/jobs?queue=a%20b")
    assert response.status == 400
    assert 'value="a b"' in text(response)


async def test_a_filter_with_invisible_characters_is_submitted_unchanged(harness: DashboardHarness) -> None:
    """Direction marks are ordinary in Hebrew and Arabic names."""
    kind = "\u05d0\u200f<\u061c\u202e\u2066"
    await harness.call("jobs", id="right-to-left", kind=kind)
    browser = await harness.browser()
    page = text(await browser.get(f"/jobs?kind={quote(kind)}"))
    fields = [html.unescape(value) for value in re.findall(r'name="kind" value="([^"]*)"', page)]
    assert fields == [kind, kind]  # in the filter and in the form for bulk actions
    assert kind not in page.replace(f'value="{html.escape(kind)}"', "")
    response = await submit_plan(browser, f"/jobs?kind={quote(kind)}", action="cancel", scope="all")
    assert "Plan: cancel 1 job" in text(await browser.get(response.headers["location"]))
    page = text(await browser.get(f"/audit?who={quote(kind)}"))
    assert [html.unescape(value) for value in re.findall(r'name="who" value="([^"]*)"', page)] == [kind]


async def test_jobs_are_found_by_worker_time_and_text(harness: DashboardHarness) -> None:
    await harness.start_job()
    await harness.call("jobs", id="invoice-7", queue="mail", payload={"to": "Eve"})
    browser = await harness.browser()

    async def found(query: str) -> list[str]:
        response = await browser.get(f"/jobs?{query}")
        assert response.status == 200, text(response)
        return re.findall(r'id="job-([^"]+)"', text(response))

    assert await found("worker=w-1") == ["held"]
    assert await found("text=eve") == ["invoice-7"]
    assert await found("text=INVOICE&queue=mail") == ["invoice-7"]
    assert await found("text=nothing") == []
    assert await found("since=2h") == ["invoice-7", "held"]
    assert await found("until=2h&since=") == []
    assert await found("since=2020-01-01&until=2020-01-01+10:00") == []
    assert await found("until=2100-01-01T00:00Z") == ["invoice-7", "held"]
    body = json.dumps({"jobId": "held", "reason": "no"})
    assert (await harness.admin.request("POST", "/admin/job-management/force-fail", body, headers=AUTH)).status == 200
    assert await found("finished_since=2h") == ["held"]
    assert await found("finished_since=2h&finished_until=1h") == []
    assert await found("worker=w-1&status=failed") == ["held"]
    page = text(await browser.get("/jobs?since=2h&text=%22x%22"))
    assert 'name="since" value="2h"' in page
    assert 'name="text" value="&#34;x&#34;"' in page
    assert "data-interval-s" not in page, "text searches do not update"
    for query, field in (("since=yesterday", "$.since"), ("until=9999", "$.until"), ("text=" + "x" * 201, "$.text")):
        response = await browser.get(f"/jobs?{query}")
        assert (response.status, field in text(response)) == (400, True)
        assert_safe(response)


async def test_a_page_says_how_far_it_has_searched(harness: DashboardHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    await harness.call("jobs", id="rare", queue="b")
    await harness.call("jobs/bulk", jobs=[{"id": f"often-{number}", "queue": "a"} for number in range(20)])
    browser = await harness.browser()
    monkeypatch.setattr(history, "JobQuery", partial(JobQuery, scan=3))
    page = text(await browser.get("/jobs?queue=b"))
    assert 'id="job-rare"' in page, "the search continued"
    assert "continues" not in page
    assert "data-interval-s" in page
    monkeypatch.setattr(pages, "MAX_SCANNED", 10)
    assert "data-interval-s" not in text(await browser.get("/jobs?queue=b")), "expensive searches do not update"
    monkeypatch.setattr(history, "MAX_SCANNED", 6)
    page = text(await browser.get("/jobs?queue=b&worker=w%261"))
    assert "No matches in jobs created in the last <time" in page
    assert '<a href="/jobs?status=failed&amp;queue=b&amp;worker=w%261">failed</a>' in page
    page = text(await browser.get("/jobs?queue=b&status=completed"))
    assert "continues" in page
    assert "To search faster" not in page
    monkeypatch.setattr(pages, "MAX_SCANNED", 50_000)
    assert "data-interval-s" not in text(await browser.get("/jobs?queue=b")), "a continued search does not update"
    renewed = text(await browser.get("/jobs?queue=b", HX_Request="true"))
    assert "data-final" in renewed, "nor if it had rows before"
    for query in ("error=0123456789ab", "text=nothing"):
        page = text(await browser.get(f"/jobs?{query}"))
        assert "data-interval-s" not in page
        assert "To search faster" not in page, "text and errors have no index"
    shown = await following_pages(browser, "/jobs?queue=b")
    assert [job_id for page in shown for job_id in re.findall(r'id="job-([^"]+)"', page)] == ["rare"]
    assert "No older jobs match" in text(await browser.get("/jobs?queue=b&cursor=1"))
    monkeypatch.setattr(history, "MAX_SCANNED", 100)
    assert "No jobs match" in text(await browser.get("/jobs?kind=none&status=failed"))


@pytest.mark.parametrize(
    ("text_", "at"),
    [
        ("90s", 910_000),
        ("10 min", 400_000),
        ("1h", 0),
        ("1970-01-01 00:10", 600_000),
        ("1970-01-01T02:10+02:00", 600_000),
        ("1970-01-02", 86_400_000),
        ("1969-01-01", 0),
        ("", None),
        ("1 fortnight", None),
        ("-5m", None),
        ("12:00", None),
    ],
)
def test_absolute_and_relative_times_are_parsed(text_: str, at: int | None) -> None:
    assert filters.parse_time(text_, 1_000_000) == at


async def test_the_list_of_jobs_suggests_queues_without_scanning_them(
    harness: DashboardHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    await harness.call("jobs/bulk", jobs=[{"id": f"job-{number}", "queue": f"q-{number}"} for number in range(5)])
    scanned: list[str] = []
    monkeypatch.setattr(State, "oldest_due_at", lambda state, queue: scanned.append(queue))
    monkeypatch.setattr(pages, "MAX_QUEUE_NAMES", 3)
    browser = await harness.browser()
    names = "".join(f'<option value="q-{number}"></option>' for number in range(3))
    for target in ("/jobs", "/jobs?since=nonsense"):
        assert f'<datalist id="queue-names">{names}</datalist>' in text(await browser.get(target))
    monkeypatch.delattr(pages, "MAX_QUEUE_NAMES")
    assert "job-4" in text(await browser.get("/jobs", HX_Request="true")), "updates have no suggestions"
    assert scanned == []
