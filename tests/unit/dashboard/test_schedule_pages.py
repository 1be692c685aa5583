"""Schedules are listed, shown, run, paused, resumed and deleted."""

from __future__ import annotations

import json

import pytest

from tests.support.dashboard_harness import AUTH, READ_ONLY_TOKEN, DashboardHarness, assert_safe, text


@pytest.fixture
async def schedule(harness: DashboardHarness) -> DashboardHarness:
    body = {"cron": "0 3 * * mon-fri", "job": {"queue": "q", "payload": {"a": "<1>"}}, "source": "app:shop"}
    response = await harness.worker.request("PUT", "/v1/schedules/night:1", json.dumps(body))
    assert response.status == 201, response.json
    return harness


async def test_a_schedule_is_paused_resumed_run_and_deleted(schedule: DashboardHarness) -> None:
    browser, url = await schedule.browser(), "/schedules/night%3A1"
    csrf = await browser.csrf()
    assert f'href="{url}"' in text(await browser.get("/schedules"))
    page = await browser.get(url)
    assert_safe(page)
    assert text(page).count(" 03:00:00 UTC <span") == 5
    assert "verb=resume" not in text(page)
    asked = await browser.get(f"{url}/change?verb=pause")
    assert_safe(asked)
    assert 'name="reason" maxlength="4096" autocomplete="off" required' in text(asked)
    fields = {"verb": "pause", "reason": "month end", "for_ms": "3600000", "csrf": csrf}
    assert (await browser.post(f"{url}/change", **fields)).redirect == url
    for path in ("/schedules", url):
        assert ": month end" in text(await browser.get(path))
    assert "It was paused by " in text(await browser.get(f"{url}/change?verb=resume"))
    assert (await browser.post(f"{url}/change", verb="resume", csrf=csrf)).status == 303
    assert schedule.admin.actor.state.schedules["night:1"].pause is None
    assert "Its jobs stay." in text(await browser.get(f"{url}/change?verb=delete"))
    assert (await browser.post(f"{url}/change", verb="delete", reason="old", csrf=csrf)).redirect == "/schedules"
    assert "Schedule night:1 was deleted." in text(await browser.get("/schedules"))
    assert (await browser.get(url)).status == 404


async def test_a_schedule_whose_last_job_is_unfinished_runs_on_request(schedule: DashboardHarness) -> None:
    browser, url = await schedule.browser(), "/schedules/night%3A1"
    csrf = await browser.csrf()
    assert "The last job is unfinished" not in text(await browser.get(f"{url}/change?verb=run"))
    assert (await browser.post(f"{url}/change", verb="run", csrf=csrf)).status == 303
    page = text(await browser.get(url))
    job_id = schedule.admin.actor.state.schedules["night:1"].last_job_id
    assert f"Job {job_id} was created." in page
    assert f'<dt>Schedule</dt><dd><a href="{url}">night:1</a>' in text(await browser.get(f"/jobs/{job_id}"))
    assert " It was created by schedule night:1, next 20" in text(await browser.get(f"/jobs/{job_id}"))
    assert "The last job is unfinished" in text(await browser.get(f"{url}/change?verb=run"))
    assert (await browser.post(f"{url}/change", verb="run", csrf=csrf)).status == 409
    assert (await browser.post(f"{url}/change", verb="run", force="1", csrf=csrf)).status == 303


async def test_why_names_the_schedule_and_its_next_time(schedule: DashboardHarness) -> None:
    body = json.dumps({"reason": "now"})
    operator = "/admin/job-management"

    async def origins(job_id: str) -> set[str]:
        """Return what `why` of both APIs says after how long the job has waited."""
        found = set()
        for server, path in ((schedule.worker, "/v1"), (schedule.admin, operator)):
            response = await server.request("GET", f"{path}/jobs/{job_id}/why", headers=AUTH)
            found.add(response.data["because"].partition(" It was created by ")[2])
        return found

    async def act(method: str, path: str) -> None:
        response = await schedule.admin.request(method, f"{operator}/schedules/night:1{path}", body, headers=AUTH)
        assert response.status < 300, response.json

    await schedule.call("jobs", id="plain", queue="q")
    assert await origins("plain") == {""}
    await act("POST", "/run")
    job_id = schedule.admin.actor.state.schedules["night:1"].last_job_id or ""
    [origin] = await origins(job_id)
    assert origin.startswith("schedule night:1, next 20")
    assert origin.endswith(" 03:00:00 UTC.")
    await act("POST", "/pause")
    assert await origins(job_id) == {"schedule night:1, paused now."}
    await act("DELETE", "")
    assert await origins(job_id) == {"schedule night:1, deleted since."}


async def test_a_reader_sees_schedules_and_changes_none(schedule: DashboardHarness) -> None:
    reader, url = await schedule.browser(READ_ONLY_TOKEN), "/schedules/night%3A1"
    assert "/change" not in text(await reader.get(url))
    assert (await reader.get(f"{url}/change?verb=pause")).status == 403
    assert (await reader.post(f"{url}/change", verb="delete", csrf=await reader.csrf())).status == 403


async def test_schedules_have_pages(schedule: DashboardHarness) -> None:
    for number in range(50):
        body = json.dumps({"every_ms": 60_000, "job": {}, "source": "app:shop"})
        await schedule.worker.request("PUT", f"/v1/schedules/a-{number:02}", body)
    browser = await schedule.browser()
    page = text(await browser.get("/schedules"))
    assert 'href="/schedules?cursor=a-49"' in page
    assert "night:1" not in page
    assert "night:1" in text(await browser.get("/schedules?cursor=a-49"))
    assert "No more schedules." in text(await browser.get("/schedules?cursor=night%3A1"))
