"""Links to download URLs that workers report."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re

import pytest

from jobd.dashboard.urls import LOCAL_HOST, ODD_HOST, OWN_HOST, no_link_reason
from tests.support.dashboard_harness import Browser, DashboardHarness, text

LINKS = [
    "https://files.test/out.mp4?a=1&b=%20#c", "HTTP://files.test:8080", "http://files.test/out file.mp4",
    "https://files.test?x", "http://192.168.1.6/a", "http://[2001:db8::1]:80/a", "http://127.test/",
    "http://localhost.test/",
]  # fmt: skip
NO_URLS = [
    "", "javascript:alert(1)", "s3://bucket/key", "//files.test/", " http://files.test/", "http:/127.0.0.1/",
    "http:127.0.0.1/",
]  # fmt: skip
LOCAL = """localhost LOCALHOST.:18899 any.localhost 127.0.0.1:18899 127.255.1.2 127.1 127.0.0.1. 2130706433 0x7f000001
    0X7F.1 017700000001 0177.0.0.1 0 0.0.0.0 [::1] [0:0:0:0:0:0:0:1]:18899 [::] [::ffff:127.0.0.1] [::ffff:7f00:1]"""
OWN = """jobs.test JOBS.test.:18899 192.168.1.5:1 3232235781 [::ffff:192.168.1.5] [2001:db8::5]:1
    [2001:0db8:0::5]:1"""
ODD = [
    "/127.0.0.1", "\\\\127.0.0.1", "files.test\\@127.0.0.1", "files.test@127.0.0.1", "127.0.0.1\\.files.test",
    "127.0.0%2e1", "%6cocalhost", "\uff11\uff12\uff17.0.0.1", "\u24dbocalhost", "local\u00adhost", "local\thost",
    "1.2.3.4.5", "127.0.0.09", "[::1", "[1:2]", "", ".", "files.test:123456",
]  # fmt: skip


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        *((url, None) for url in LINKS),
        *((url, "") for url in NO_URLS),
        *((f"http://{host}/", LOCAL_HOST) for host in LOCAL.split()),
        *((f"http://{host}/a", OWN_HOST) for host in OWN.split()),
        *((f"http://{host}/", ODD_HOST) for host in ODD),
        ("http://files.test/\n", ODD_HOST),
    ],
)
def test_a_url_is_a_link_if_it_is_external(url: str, reason: str | None) -> None:
    assert no_link_reason(url, ["jobs.test", "192.168.1.5", "2001:db8::5"]) == reason


DOWNLOAD_URLS = [
    ("https://e.test/a?b=1&c=2", True),
    ("http://e.test/", True),
    ("javascript:alert(1)", False),
    ("http://127.0.0.1:18899/out.mp4", False),
    ("http://127.1/", False),
]


@pytest.mark.parametrize(("url", "linked"), DOWNLOAD_URLS)
async def test_a_download_url_is_linked_if_it_is_external(harness: DashboardHarness, url: str, linked: bool) -> None:
    """The link leads to a sandboxed page, whose only other link is the URL."""
    lock = await harness.start_job()
    await harness.call("jobs/held/complete", lock_id=lock, download_url=url)
    browser = await harness.browser()
    page = text(await browser.get("/jobs/held"))
    assert ('<a href="/jobs/held/external-link" rel="noreferrer noopener">' in page) == linked
    assert html.escape(url) in page
    assert ("Not a link: " in page) == url.startswith("http://127")
    response = await browser.get("/jobs/held/external-link")
    assert response.status == (200 if linked else 404)
    if linked:
        assert f'<a href="{html.escape(url)}" rel="noreferrer noopener">' in text(response)
        policy = response.headers["content-security-policy"]
        assert policy.startswith("sandbox allow-downloads; default-src 'none';")
        assert "cross-origin-opener-policy" not in response.headers  # browsers reject it in a sandbox
        style = re.search("<style>(.*)</style>", text(response))
        assert style
        digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
        assert f"style-src 'sha256-{digest}'" in policy
    assert (await Browser(harness.admin).get("/jobs/held/external-link")).headers["location"].startswith("/sign-in")
    assert (await browser.get("/jobs/nobody/external-link")).status == 404


@pytest.mark.parametrize(("url", "linked"), DOWNLOAD_URLS)
async def test_the_download_url_of_a_late_result_is_linked_if_it_is_external(
    harness: DashboardHarness, url: str, linked: bool
) -> None:
    lock = await harness.start_job()
    await harness.restart_job("held")
    response = await harness.worker.request(
        "POST", "/v1/jobs/held/complete", json.dumps({"lock_id": lock, "download_url": url})
    )
    assert response.status == 409
    browser = await harness.browser()
    page = text(await browser.get("/jobs/held"))
    assert html.escape(url) in page
    link = re.search(r'<a href="(/jobs/held/external-link\?late_result=\d+)"', page)
    assert (link is not None) == linked
    if link is not None:
        assert html.escape(url) in text(await browser.get(link[1]))
    assert (await browser.get("/jobs/held/external-link?late_result=99")).status == 404
    assert (await browser.get("/jobs/held/external-link")).status == 404  # the job itself has no result


async def test_a_download_url_on_any_host_name_of_the_daemon_is_not_linked(harness: DashboardHarness) -> None:
    lock = await harness.start_job()
    await harness.call("jobs/held/complete", lock_id=lock, download_url="https://Jobs.test.:9999/a")
    browser = await harness.browser()
    harness.admin.app.authenticator.hosts = frozenset({"jobs.test", "other.test"})
    for host in ("jobs.test:8770", "other.test"):
        assert "the host of this dashboard" in text(await browser.get("/jobs/held", Host=host))
