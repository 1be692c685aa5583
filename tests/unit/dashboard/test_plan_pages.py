"""Plans for many jobs, and failure groups."""

from __future__ import annotations

import asyncio
import html
import json
import re
import time

import pytest

from jobd.dashboard import plan_pages
from jobd.maintenance import plan_builder
from jobd.model.job import DAY_MS, LATEST_MS
from tests.support.dashboard_harness import (
    AUTH,
    READ_ONLY_TOKEN,
    DashboardHarness,
    assert_safe,
    fail_jobs,
    submit_plan,
    text,
)


async def test_a_plan_with_the_latest_possible_time_can_be_shown(harness: DashboardHarness) -> None:
    await fail_jobs(harness, "a")
    browser, path = await harness.browser(), "/admin/job-management/plans"
    for until, status in ((LATEST_MS + 1, 400), (10**15, 400), (LATEST_MS, 200)):
        body = json.dumps({"action": "retry", "filter": {"until": until}})
        assert (await harness.admin.request("POST", path, body, headers=AUTH)).status == status
    response = await browser.get("/plans/plan-1")
    assert response.status == 200
    assert "Plan: retry 1 job" in text(response)
    assert "until=9999-12-31T23%3A59%3A59.999Z" in text(response), "the link back has the same filter"
    assert (await browser.get("/jobs?until=9999-12-31T23%3A59%3A59.999Z")).status == 200


async def test_a_maintenance_plan_is_shown_and_applied(
    harness: DashboardHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, browser = "/admin/job-management/plans", await harness.browser()
    for job_id in ("late-1", "late-2"):
        job = json.dumps({"id": job_id, "expires_at": 0})
        while (await harness.worker.request("POST", "/v1/jobs", job)).status != 201:  # it has passed already
            soon = round(time.time() * 1000) + 60
            job = json.dumps({"id": job_id, "expires_at": soon})
    await asyncio.sleep(0.1)
    monkeypatch.setattr(plan_builder, "MAX_PLAN", 1)
    for action in ("cleanup", "recover-stuck"):
        assert (await harness.admin.request("POST", path, json.dumps({"action": action}), headers=AUTH)).status == 200
    wrong = await harness.admin.request("POST", path, '{"action":"cleanup","ids":["late-1"]}', headers=AUTH)
    assert (wrong.status, wrong.json["details"]["field"]) == (400, "$.ids")
    response = await browser.get("/plans/plan-1")
    assert_safe(response)
    page = text(response)
    assert "Plan: clean up 1 job" in page
    assert "validation fixes are not part of a plan" in page
    assert "All jobs." not in page
    assert "There are more" in page or "There may be more" in page
    assert "jobctl cleanup --dry-run" in page
    assert "/plans/plan-1/next" not in page
    assert "Plan: recover 0 jobs" in text(await browser.get("/plans/plan-2"))
    await browser.post("/plans/plan-1/apply", csrf=await browser.csrf())
    assert "Applied to 1 of 1 jobs" in text(await browser.get("/plans/plan-1"))
    assert sorted([await harness.status("late-1"), await harness.status("late-2")]) == ["failed", "queued"]
    assert "plan-cleanup" in text(await browser.get("/audit"))


async def test_a_plan_of_selected_jobs_is_shown_and_applied_once(harness: DashboardHarness) -> None:
    await fail_jobs(harness, "a", "b", "c")
    await harness.call("jobs", id="waits")
    browser = await harness.browser()
    response = await submit_plan(
        browser, "/jobs", "a", "b", "waits", action="retry", scope="selected", reason="<again>"
    )
    assert (response.status, response.headers["location"]) == (303, "/plans/plan-1")
    response = await browser.get("/plans/plan-1")
    assert_safe(response)
    page = text(response)
    assert "Plan: retry 2 jobs" in page
    assert re.search(r'<li>2 <span class="status failed">failed</span> .*<span class="status queued">', page)
    assert "Skipped: 1. Only failed and cancelled jobs can be retried." in page
    assert "&lt;again&gt;" in page
    assert re.findall(r'href="/jobs/([a-z]+)"', page) == ["a", "b", "waits"]
    assert await harness.status("a") == "failed", "nothing has changed yet"
    assert (await browser.post("/plans/plan-1/apply", csrf=await browser.csrf())).redirect == "/plans/plan-1"
    page = text(await browser.get("/plans/plan-1"))
    assert "Applied to 2 jobs." in page
    assert "Applied to 2 of 2 jobs" in page
    assert "/apply" not in page
    assert [await harness.status(each) for each in ("a", "b", "c")] == ["queued", "queued", "failed"]
    await browser.post("/plans/plan-1/apply", csrf=await browser.csrf())
    assert "Nothing has changed." in text(await browser.get("/plans/plan-1"))
    assert "plan-retry" in text(await browser.get("/audit"))


async def test_a_plan_of_all_matches_skips_and_lists_changed_jobs(harness: DashboardHarness) -> None:
    await fail_jobs(harness, *(f"job-{number:02}" for number in range(60)))
    await harness.call("jobs", id="other", queue="mail")
    browser = await harness.browser()
    response = await submit_plan(browser, "/jobs?queue=video&status=failed&text=DISK", action="delete", scope="all")
    assert "Plan: delete 60 jobs" in text(await browser.get(response.headers["location"]))
    await browser.confirm("job-07", "retry")
    await browser.confirm("job-08", "delete")
    response = await browser.post("/plans/plan-1/apply", csrf=await browser.csrf())
    page = text(await browser.get(response.headers["location"]))
    assert "Applied to 58 of 60 jobs" in page
    assert "2 that had changed since the plan was made" in page
    skipped = page[page.index('id="h-not-applied"') :]
    assert re.findall(r'href="/jobs/([a-z0-9-]+)"', skipped) == ["job-08", "job-07"]
    assert re.findall(r'class="status (\w+)">(\w+)<', skipped) == [
        ("failed", "failed"), ("failed", "deleted"), ("failed", "failed"), ("queued", "queued"),
    ]  # fmt: skip
    assert await harness.status("job-07") == "queued"
    assert await harness.status("other") == "queued"
    page = text(await browser.get("/audit?action=plan-delete"))
    not_changed = page[page.index("not_changed") :]
    assert re.findall(r'<a class="id" href="/jobs/([a-z0-9-]+)">', not_changed)[:2] == ["job-08", "job-07"]


async def test_a_full_plan_links_to_the_next_one(harness: DashboardHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (plan_builder, plan_pages):
        monkeypatch.setattr(module, "MAX_PLAN", 2)
    await fail_jobs(harness, "a", "b", "c")
    browser = await harness.browser()
    response = await submit_plan(browser, "/jobs?queue=video&since=2h", action="delete", scope="all", reason="<old>")
    response = await browser.get(response.headers["location"])
    assert_safe(response)
    page = text(response)
    assert "Plan: delete 2 jobs" in page
    assert "There are more: a plan holds up to 2 jobs." in page
    assert "Filter: queue <strong>video</strong>, since <strong>20" in page
    assert "Only finished jobs can be deleted." in page
    back = html.unescape(re.findall(r'href="([^"]+)">Cancel', page)[0])
    assert re.findall(r'id="job-(\w)"', text(await browser.get(back))) == ["c", "b", "a"]
    csrf = await browser.csrf()
    assert (await browser.post("/plans/plan-1/next", csrf="x")).status == 403
    await browser.post("/plans/plan-1/apply", csrf=csrf)
    assert ">Plan the next jobs<" in text(await browser.get("/plans/plan-1"))
    assert (await browser.post("/plans/plan-1/next", csrf=csrf)).redirect == "/plans/plan-2"
    page = text(await browser.get("/plans/plan-2"))
    assert "Plan: delete 1 job<" in page
    assert "&lt;old&gt;" in page
    assert "There are more" not in page
    assert "No jobs follow this plan" in (await browser.post("/plans/plan-2/next", csrf=csrf)).page(400)
    assert (await browser.post("/plans/none/next", csrf=csrf)).status == 404


async def test_a_plan_whose_search_timed_out_says_so_and_continues(
    harness: DashboardHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"MAX_PLANNING_S": 0, "SCAN": 1}.items():
        monkeypatch.setattr(plan_builder, name, value)
    await fail_jobs(harness, "old", "young")
    browser = await harness.browser()
    csrf = await browser.csrf()
    await browser.post("/plans", csrf=csrf, action="retry", scope="all", kind="none")
    page = text(await browser.get("/plans/plan-1"))
    assert "No suitable jobs found so far." in page
    assert "There may be more" in page
    assert "Apply this one" not in page
    for number in range(2, 9):
        if "/next" not in page:
            break
        response = await browser.post(f"/plans/plan-{number - 1}/next", csrf=csrf)
        page = text(await browser.get(response.headers["location"]))
    assert "No suitable jobs found." in page


async def test_the_latest_failures_of_a_group_are_retried_alone(harness: DashboardHarness) -> None:
    browser = await harness.browser()
    await fail_jobs(harness, "a", "b")
    harness.ahead_ms = 3 * DAY_MS
    await fail_jobs(harness, "c")
    page = text(await browser.get("/failures"))
    (fingerprint,) = re.findall(r'name="recent_error" value="([0-9a-f]+)"[^>]*>Retry 1 of the last day<', page)
    fields = {"csrf": await browser.csrf(), "action": "retry", "scope": "all"}
    made = await browser.post("/plans", **fields, recent_error=fingerprint)
    plan = text(await browser.get(made.headers["location"]))
    assert "Plan: retry 1 job<" in plan
    assert "Plan only the latest" not in plan
    plan = text(await browser.get((await browser.post("/plans", **fields, error=fingerprint)).headers["location"]))
    assert "Plan: retry 3 jobs" in plan
    form = re.findall(r'<form method="post" action="/plans">(.*?)Plan only the latest 1<', plan, re.DOTALL)[0]
    latest = dict(re.findall(r'name="(\w+)" value="([^"]*)"', form))
    assert "Plan: retry 1 job<" in text(await browser.get((await browser.post("/plans", **latest)).headers["location"]))


async def test_a_failure_group_is_retried(harness: DashboardHarness) -> None:
    browser, reader = await harness.browser(), await harness.browser(READ_ONLY_TOKEN)
    assert "No failed jobs" in text(await browser.get("/failures"))
    for number in range(3):
        lock = await harness.start_job(f"job-{number}")
        await harness.call(f"jobs/job-{number}/fail", lock_id=lock, error_message=f"timeout <b> after {number} s")
    await fail_jobs(harness, "a")
    page = text(await browser.get("/failures"))
    groups = re.findall(r'<tr id="group-([0-9a-f]+)">(.*?)</tr>', page, re.DOTALL)
    assert len(groups) == 2
    assert "4 failed jobs" in page
    fingerprint, shown = groups[0]
    assert "timeout &lt;b&gt; after 2 s" in shown
    assert f'<a href="/jobs?error={fingerprint}">3</a>' in shown
    latest = re.findall(r'href="/jobs/(job-\d)"', shown)
    assert sorted(latest) == ["job-0", "job-1", "job-2"]  # two may have failed in the same millisecond
    assert "Retry all" in shown
    assert "Retry all" not in text(await reader.get("/failures"))
    listed = text(await browser.get(f"/jobs?error={fingerprint}"))
    assert re.findall(r'id="job-(job-\d)"', listed) == ["job-2", "job-1", "job-0"]
    assert f'name="error" value="{fingerprint}"' in listed
    assert f'form="retry-form" name="error" value="{fingerprint}"' in shown
    form = page[page.index('<form id="retry-form"') :].partition("</form>")[0]
    fields = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', form))
    response = await browser.post("/plans", **fields, error=fingerprint, reason="<fixed>")
    plan = text(await browser.get(response.headers["location"]))
    assert "Plan: retry 3 jobs" in plan
    assert "&lt;fixed&gt;" in plan
    await browser.post(f"{response.headers['location']}/apply", csrf=await browser.csrf())
    page = text(await browser.get("/failures"))
    assert "1 failed job," in page
    assert fingerprint not in page
    assert await harness.status("job-1") == "queued"
    assert (await browser.get("/jobs?error=x")).status == 400


async def test_failure_groups_include_jobs_that_wait_for_a_retry(harness: DashboardHarness) -> None:
    browser, reader = await harness.browser(), await harness.browser(READ_ONLY_TOKEN)
    await harness.call("jobs", id="again", queue="mail", max_attempts=3)
    lock = (await harness.call("jobs/again/start", worker="w-1"))["lock_id"]
    await harness.call("jobs/again/fail", lock_id=lock, error_message="no route to 10.0.0.7", retry_after_ms=600_000)
    page = text(await browser.get("/failures"))
    assert "0 failed jobs and 1 waiting for its next attempt, grouped by error" in page
    assert "No failed jobs" not in page
    [(fingerprint, shown)] = re.findall(r'<tr id="group-([0-9a-f]+)">(.*?)</tr>', page, re.DOTALL)
    waits = f"/jobs?error={fingerprint}&amp;status=queued"
    assert f'<a href="{waits}">1</a>' in shown
    assert f'<a class="error" href="{waits}">no route to 10.0.0.7</a>' in shown
    assert "Retry all" not in shown, "only failed jobs can be retried"
    assert "jobctl run-now ID" in page
    assert "run-now" not in text(await reader.get("/failures"))
    assert 'id="job-again"' in text(await browser.get(html.unescape(waits)))
    lock = (await harness.call("jobs", id="gone", queue="video"), await harness.call("jobs/gone/start", worker="w-1"))[
        1
    ]
    await harness.call("jobs/gone/fail", lock_id=lock["lock_id"], error_message="no route to 10.0.0.8")
    shown = text(await browser.get("/failures"))
    assert "1 failed job and 1 waiting" in shown
    assert f'<a href="/jobs?error={fingerprint}">1</a>' in shown
    assert f'<a href="{waits}">1</a>' in shown
    assert "Retry all" in shown


async def test_failed_jobs_without_an_error_are_in_no_group(harness: DashboardHarness) -> None:
    line = json.dumps({"id": "bare", "status": "failed"})
    body, kind = line + "\n", {"Content-Type": "application/x-ndjson"}
    response = await harness.admin.request("POST", "/admin/job-management/import", body, headers={**AUTH, **kind})
    assert response.status == 200, response.body
    browser = await harness.browser()
    page = text(await browser.get("/failures"))
    assert "1 failed job," in page
    assert "1 failed job is in no group" in page
    assert "No failed jobs" not in page
    assert 'name="error"' not in page
    assert "/jobs?error=" not in page
    await fail_jobs(harness, "a")
    for error in ("", " "):
        response = await browser.post("/plans", csrf=await browser.csrf(), action="retry", scope="all", error=error)
        assert (response.status, "no fingerprint, so its jobs cannot be found" in text(response)) == (400, True)
    assert (await browser.get("/jobs?error=&status=failed")).status == 200, "forms send empty fields"


async def test_a_plan_needs_jobs_a_valid_filter_and_full_access(harness: DashboardHarness) -> None:
    await fail_jobs(harness, "a")
    browser, reader = await harness.browser(), await harness.browser(READ_ONLY_TOKEN)
    assert "No job is selected" in (await submit_plan(browser, "/jobs", action="retry", scope="selected")).page(400)
    for fields in ({"scope": "all", "queue": "a b"}, {"scope": "all", "since": "then"}, {"scope": "some"}):
        response = await browser.post("/plans", csrf=await browser.csrf(), action="retry", **fields)
        assert response.status == 400, fields
        assert_safe(response)
    assert (await browser.post("/plans", csrf="x", action="retry", scope="all")).status == 403
    assert "plan_not_found" in (await browser.get("/plans/none")).page(404)
    await submit_plan(browser, "/jobs", "a", action="retry", scope="selected")
    assert (await browser.post("/plans/plan-1/apply", csrf="x")).status == 403
    page = text(await reader.get("/jobs"))
    assert 'id="bulk"' not in page
    assert 'name="ids"' not in page
    assert "/apply" not in text(await reader.get("/plans/plan-1"))
    for target in ("/plans", "/plans/plan-1/apply"):
        fields = {"action": "retry", "scope": "all"} if target == "/plans" else {}
        assert (await reader.post(target, csrf=await reader.csrf(), **fields)).status == 403
    assert await harness.status("a") == "failed"
    await submit_plan(browser, "/jobs?queue=none", action="cancel", scope="all")
    assert "No suitable jobs found." in text(await browser.get("/plans/plan-2"))


async def test_a_plan_names_the_jobs_with_late_results(harness: DashboardHarness) -> None:
    await fail_jobs(harness, "a")
    lock = await harness.start_job()
    await harness.admin.request("POST", "/admin/job-management/force-fail", json.dumps({"jobId": "held"}), headers=AUTH)
    await harness.worker.request("POST", "/v1/jobs/held/complete", json.dumps({"lock_id": lock, "file_path": "/late"}))
    browser = await harness.browser()
    await submit_plan(browser, "/jobs?status=failed", action="delete", scope="all")
    page = text(await browser.get("/plans/plan-1"))
    assert "1 of these jobs has 1 late result that was not adopted. It is deleted with the job." in page
    section = page[page.index('aria-labelledby="h-late"') :].partition("</section>")[0]
    assert re.findall(r'href="/jobs/(\w+)"', section) == ["held"]
    await submit_plan(browser, "/jobs?status=failed", "a", action="delete", scope="selected")
    assert "late result" not in text(await browser.get("/plans/plan-2"))
    await submit_plan(browser, "/jobs?status=failed", "held", action="retry", scope="selected")
    assert "Check whether it can be adopted instead." in text(await browser.get("/plans/plan-3"))
