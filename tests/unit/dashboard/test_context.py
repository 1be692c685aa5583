"""Viewers: CSRF tokens, programs with a token, and read-only sessions."""

from __future__ import annotations

import re
from urllib.parse import urlencode

import pytest

from jobd.http.auth import FORM
from tests.support.dashboard_harness import AUTH, PAGES, READ_ONLY_TOKEN, Browser, DashboardHarness, text
from tests.support.http_harness import TOKEN


async def test_the_csrf_token_may_be_in_a_header(harness: DashboardHarness) -> None:
    await harness.call("jobs", id="a", queue="video")
    browser = await harness.browser()
    assert (await browser.post("/queues/pause", {"X-CSRF-Token": await browser.csrf()}, name="video")).status == 303


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"}, {"Origin": "http://localhost:1"}],
)
async def test_requests_from_another_site_are_rejected(harness: DashboardHarness, headers: dict[str, str]) -> None:
    browser = await harness.browser()
    csrf = await browser.csrf()
    assert (await browser.post("/queues/video/pause", headers, csrf=csrf)).status == 403
    assert (await browser.post("/sign-in", headers, token=TOKEN)).status == 403
    assert (await browser.get("/", **headers)).status == 403


async def test_a_form_without_a_session_is_401_and_links_to_the_sign_in(harness: DashboardHarness) -> None:
    response = await Browser(harness.admin).post("/queues/video/pause", csrf="x")
    assert response.status == 401
    assert 'href="/sign-in"' in text(response)


async def test_a_body_that_is_not_a_form_is_rejected_with_a_page(harness: DashboardHarness) -> None:
    browser = await harness.browser()
    response = await browser.post(
        "/queues/video/pause", {"Content-Type": "application/json"}, csrf=await browser.csrf()
    )
    assert (response.status, response.headers["content-type"]) == (415, "text/html; charset=utf-8")
    response = await browser.post("/queues/pause", name="video", csrf=await browser.csrf(), more="x")
    assert (response.status, "is not a field" in text(response)) == (400, True)


async def test_a_program_with_a_token_can_use_the_pages(harness: DashboardHarness) -> None:
    await harness.start_job()
    assert (await harness.admin.request("GET", "/jobs/held", headers=AUTH)).status == 200
    assert (await harness.admin.request("GET", "/", headers={"Authorization": "Bearer wrong"})).status == 401
    response = await harness.admin.request("POST", "/queues/video/pause", "", {**AUTH, "Content-Type": FORM})
    assert (response.status, response.headers["location"]) == (303, "/queues")
    response = await harness.admin.request("GET", "/admin/job-management/queues", headers=AUTH)
    assert [queue["paused"] for queue in response.data["queues"]] == [True]


async def test_a_session_gives_no_access_to_the_api(harness: DashboardHarness) -> None:
    """Browsers attach cookies to any request, so the API accepts tokens only."""
    browser = await harness.browser()
    assert (await browser.get("/admin/job-management/stats")).status == 401


async def test_a_form_redirects_back_to_its_page(harness: DashboardHarness) -> None:
    await harness.call("jobs/bulk", jobs=[{"queue": f"q-{number:03}"} for number in range(101)])
    browser = await harness.browser()
    page = text(await browser.get("/queues?cursor=q-099"))
    form = page[page.index('<form id="pause-form"') :].partition("</form>")[0]
    fields = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', form))
    assert 'formaction="/queues/pause" name="name" value="q-100"' in page
    for action in ("pause", "resume"):
        assert (await browser.post(f"/queues/{action}", **fields, name="q-100")).redirect == "/queues?cursor=q-099"
    page = text(await browser.get("/webhooks/q?state=delivered"))
    form = page[page.index('action="/webhooks/q/test"') :].partition("</form>")[0]
    fields = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', form))
    assert (await browser.post("/webhooks/q/test", **fields)).redirect == "/webhooks/q?state=delivered"


async def test_a_read_only_session_sees_no_buttons_and_no_secrets(harness: DashboardHarness) -> None:
    lock_id = await harness.start_job()
    reader = await harness.browser(READ_ONLY_TOKEN)
    filters = {"/jobs", "/audit", "/webhooks/q"}
    for target in [*PAGES, "/jobs/held"]:
        page = text(await reader.get(target))
        assert "read-only" in page, target
        assert lock_id not in page
        assert set(re.findall(r'action="([^"]+)"', page)) <= {"/sign-out", *filters}, target
        assert "/confirm" not in page
    harness.now_s += 1
    assert (await reader.post("/sign-out", csrf=await reader.csrf())).status == 303


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "fields"),
    [
        ("/jobs/held/do", {"verb": "cancel", "seen": "processing 16777217"}),
        ("/queues/pause", {"name": "video"}),
        ("/queues/video/resume", {}),
        ("/cleanup/run", {}),
        ("/cleanup/recover", {}),
        ("/clock/accept", {}),
        ("/workers/take-back", {"name": "w-1"}),
        ("/workers/quiet", {"name": "w-1", "action": "stop"}),
        ("/webhooks/q/test", {}),
        ("/webhooks/q/resend", {"id": "7"}),
        ("/webhooks/q/resend-dead-lettered", {"upto": "7"}),
    ],
)
async def test_a_read_only_session_can_change_nothing(
    harness: DashboardHarness, target: str, fields: dict[str, str]
) -> None:
    await harness.start_job()
    reader = await harness.browser(READ_ONLY_TOKEN)
    assert "admin token" in (await reader.post(target, **fields, csrf=await reader.csrf())).page(403)
    assert (await reader.get("/jobs/held/confirm?verb=cancel")).status == 403
    assert (await reader.get("/webhooks/q/resend-dead-lettered")).status == 403
    bearer = {"Authorization": f"Bearer {READ_ONLY_TOKEN}"}
    response = await harness.admin.request("POST", target, urlencode(fields), {**bearer, "Content-Type": FORM})
    assert response.status == 403
    response = await harness.admin.request("POST", "/admin/job-management/jobs/held/cancel", "{}", bearer)
    assert (response.status, response.error) == (403, "forbidden")
    assert await harness.status("held") == "processing"
    assert harness.admin.fakes.forced == []
    assert not harness.admin.fakes.accepted


@pytest.mark.parametrize(
    ("target", "fields"),
    [
        ("/jobs/held/do", {"verb": "cancel"}),
        ("/queues/pause", {"name": "video"}),
        ("/queues/video/resume", {}),
        ("/cleanup/run", {}),
        ("/cleanup/recover", {}),
        ("/clock/accept", {}),
        ("/webhooks/q/test", {}),
        ("/webhooks/q/resend", {"id": "7"}),
        ("/webhooks/q/resend-dead-lettered", {"upto": "7"}),
        ("/sign-out", {}),
    ],
)
async def test_a_form_without_its_csrf_token_does_nothing(
    harness: DashboardHarness, target: str, fields: dict[str, str]
) -> None:
    """Any site can make a browser send `HX-Request`, so the header proves nothing."""
    await harness.start_job()
    browser = await harness.browser()
    if target == "/jobs/held/do":
        fields = await browser.confirm_fields("held", "cancel")
    for given in ("", "é", await (await harness.browser()).csrf()):
        for headers in ({}, {"HX-Request": "true"}, {"HX-Request": "true", "X-CSRF-Token": given}):
            response = await browser.post(target, headers, **{**fields, "csrf": given})
            assert (response.status, "does not belong to your session" in text(response)) == (403, True), headers
    assert await harness.status("held") == "processing"
    assert (harness.admin.fakes.forced, harness.admin.fakes.accepted, harness.admin.fakes.resent) == ([], False, [])
    assert (await browser.get("/")).status == 200, "the session goes on"
    response = await browser.post(target, {"HX-Request": "true"}, **{**fields, "csrf": await browser.csrf()})
    assert response.status == 303


async def test_the_api_hides_lock_ids_from_read_only_tokens(harness: DashboardHarness) -> None:
    lock_id = await harness.start_job()
    for path in ("jobs", "jobs/held", "locks", "validate-job?jobId=held"):
        for token, shown in ((TOKEN, True), (READ_ONLY_TOKEN, False)):
            bearer = {"Authorization": f"Bearer {token}"}
            response = await harness.admin.request("GET", f"/admin/job-management/{path}", headers=bearer)
            assert (response.status, lock_id in text(response)) == (200, shown), path
