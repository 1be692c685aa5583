"""Error pages and the API reference."""

from __future__ import annotations

import re

from tests.support.dashboard_harness import AUTH, Browser, DashboardHarness, assert_safe, text


async def test_the_api_reference_shows_the_signed_in_viewer(harness: DashboardHarness) -> None:
    browser = await harness.browser()
    assert 'action="/sign-out"' in text(await browser.get("/docs"))
    assert 'action="/sign-out"' not in text(await Browser(harness.admin).get("/docs"))
    response = await harness.admin.request("GET", "/docs", headers={"Authorization": "Bearer wrong"})
    assert response.status == 200, "the page is public"
    await browser.post("/queues/pause", csrf=await browser.csrf(), name="q")
    assert 'role="status"' not in text(await browser.get("/docs")).partition("<main")[2]
    assert 'class="banner good" role="status"' in text(await browser.get("/queues")), "the flash message is shown here"


async def test_a_browser_gets_errors_as_pages(harness: DashboardHarness) -> None:
    accept = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    browser = await harness.browser()
    response = await browser.get("/jobz", **accept)
    assert response.status == 404
    assert_safe(response)
    assert "<h1>Not found</h1>" in text(response)
    assert "There is no such path" in text(response)
    response = await browser.get("/sign-out", **accept)
    assert (response.status, response.headers["allow"]) == (405, "POST")
    assert "<h1>Error</h1>" in text(response)
    assert (await browser.get("/jobz")).error == "not_found", "programs get JSON"
    response = await Browser(harness.admin).get("/jobz", **accept)
    assert (response.status, 'href="/sign-in"' in text(response)) == (401, True)
    assert_safe(response)
    response = await browser.get("/jobz", **accept, Authorization="Bearer wrong")
    assert (response.status, "allow" in response.headers) == (401, False), "the token takes precedence"
    response = await harness.admin.request("GET", "/jobz", headers={**accept, **AUTH, "Host": "elsewhere.example"})
    assert (response.status, "<h1>Error</h1>" in text(response)) == (403, True)


async def test_a_page_without_a_live_region_is_sent_whole(harness: DashboardHarness) -> None:
    browser = await harness.browser()
    await harness.call("jobs", id="a")
    for url in ("/jobs/a/confirm?verb=cancel", "/cleanup/confirm?what=run", "/clock"):
        response = await browser.get(url, HX_Request="true")
        assert (response.status, text(response).startswith("<!doctype html>")) == (200, True), url


async def test_an_unknown_path_is_401_without_a_token(harness: DashboardHarness) -> None:
    assert (await harness.admin.request("GET", "/jobz")).failure == (401, "unauthorized")
    assert (await harness.admin.request("GET", "/jobz", headers=AUTH)).failure == (404, "not_found")
    assert (await harness.worker.request("GET", "/jobz", headers={"Accept": "text/html"})).failure == (404, "not_found")


async def test_the_api_reference_needs_no_session(harness: DashboardHarness) -> None:
    for url, document, own in (
        ("/docs", "/openapi.json", harness.admin),
        ("/docs/worker", "/docs/worker.json", harness.worker),
    ):
        response = await Browser(harness.admin).get(url)
        assert response.status == 200
        assert_safe(response)
        assert "/static/swagger-ui.js?v=" in text(response)
        assert f'data-document="{document}"' in text(response)
        assert re.findall(r'<a href="(/docs[^"]*)" aria-current="page">For', text(response)) == [url]
        response = await harness.admin.request("GET", document)
        assert response.body == (await own.request("GET", "/openapi.json")).body
        assert response.headers["content-type"] == "application/json"
