"""A real actor behind both listeners and the dashboard, and a browser that keeps its cookie."""

from __future__ import annotations

import html
import json
import re
from typing import Any
from urllib.parse import urlencode

from jobd.dashboard import rendering
from jobd.dashboard.routes import Dashboard
from jobd.http.auth import FORM
from tests.support.http_harness import TOKEN, HttpHarness, ReceivedResponse
from tests.support.memory_storage import MemoryStorage

READ_ONLY_TOKEN = "reader-token-0123456789abcdef"
AUTH = {"Authorization": f"Bearer {TOKEN}"}
NASTY = "<script>alert('x')</script>\x1b[31m\u202e&\""
PAGES = [
    "/",
    "/jobs",
    "/jobs?status=processing&queue=video",
    "/queues",
    "/workers",
    "/cleanup",
    "/alerts",
    "/audit",
    "/failures",
    "/schedules",
    "/webhooks",
    "/webhooks/q",
    "/cluster",
]


class Browser:
    """Keep the session cookie, and read the CSRF token from pages."""

    def __init__(self, server: HttpHarness) -> None:
        self.server = server
        self.cookie = ""

    async def get(self, target: str, **headers: str) -> ReceivedResponse:
        return await self.server.request("GET", target, headers=self._headers(headers))

    async def post(self, target: str, headers: dict[str, str] | None = None, /, **fields: str) -> ReceivedResponse:
        given = {"Content-Type": FORM, **(headers or {})}
        response = await self.server.request("POST", target, urlencode(fields), self._headers(given))
        if "set-cookie" in response.headers:
            self.cookie = response.headers["set-cookie"].partition(";")[0]
        return response

    def _headers(self, headers: dict[str, str]) -> dict[str, str]:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return {**given, **({"Cookie": f"theme=x; {self.cookie}"} if self.cookie else {})}

    async def sign_in(self, token: str = TOKEN) -> Browser:
        assert (await self.post("/sign-in", token=token)).redirect == "/"
        return self

    async def csrf(self) -> str:
        found = re.search(r'name="csrf" value="([^"]+)"', text(await self.get("/")))
        assert found
        return found[1]

    async def confirm_fields(self, job_id: str, verb: str, more: str = "") -> dict[str, str]:
        """Return the fields of the form that confirms an action."""
        page = text(await self.get(f"/jobs/{job_id}/confirm?verb={verb}{more}"))
        fields = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', page.partition("<main")[2]))
        assert fields["verb"] == verb
        return fields

    async def confirm(self, job_id: str, verb: str, reason: str = "", more: str = "") -> ReceivedResponse:
        """Confirm an action on its page."""
        return await self.post(f"/jobs/{job_id}/do", **await self.confirm_fields(job_id, verb, more), reason=reason)


def text(response: ReceivedResponse) -> str:
    return response.body.decode()


async def following_pages(browser: Browser, target: str, part: str = "") -> list[str]:
    """Return this page and all that follow it. `part` is that of the list in the page, such as #h-locks."""
    pages = []
    while target:
        pages.append(text(await browser.get(target)))
        found = re.search(rf'rel="next" href="([^"#]+){part}"', pages[-1])
        target = html.unescape(found[1]) if found else ""
    return pages


class DashboardHarness:
    """An actor behind a worker listener and an admin listener with the dashboard.

    `now_s` is the clock of the sessions. `ahead_ms` shifts the clocks of the daemon.
    """

    def __init__(self, worker: HttpHarness, admin: HttpHarness, dashboard: Dashboard, disk: MemoryStorage) -> None:
        self.worker = worker
        self.admin = admin
        self.dashboard = dashboard
        self.disk = disk
        self.now_s = 1_000.0
        self.ahead_ms = 0

    async def call(self, target: str, **body: Any) -> Any:
        response = await self.worker.request("POST", f"/v1/{target}", json.dumps(body))
        assert response.status < 300, response.json
        return response.data

    async def status(self, job_id: str) -> str:
        return str((await self.worker.request("GET", f"/v1/jobs/{job_id}")).data["status"])

    async def browser(self, token: str = TOKEN) -> Browser:
        return await Browser(self.admin).sign_in(token)

    async def start_job(self, job_id: str = "held") -> str:
        """Create and start a job. Return its lock id."""
        await self.call("jobs", id=job_id, queue="video", kind="k", payload={"a": 1})
        return str((await self.call(f"jobs/{job_id}/start", worker="w-1"))["lock_id"])

    async def restart_job(self, job_id: str) -> str:
        """Reset the job and start it with another worker. Return the new lock id."""
        response = await self.admin.request(
            "POST", "/admin/job-management/force-reset", json.dumps({"jobId": job_id}), headers=AUTH
        )
        assert response.status == 200
        return str((await self.call(f"jobs/{job_id}/start", worker="w-2"))["lock_id"])


async def audit_entries(harness: DashboardHarness) -> list[tuple[Any, ...]]:
    """Return the operator, action, outcome and target of all audit entries, oldest first."""
    audit = await harness.admin.request("GET", "/admin/job-management/audit", headers=AUTH)
    entries = audit.data["entries"][::-1]
    return [(each["who"], each["action"], each["outcome"], each["job_id"] or each["details"]) for each in entries]


def assert_safe(response: ReceivedResponse) -> None:
    policy = response.headers["content-security-policy"]
    assert policy == rendering.CONTENT_SECURITY_POLICY
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-store"
    page = text(response)
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son[a-z]+=|javascript:", page), "inline code"
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page), "external resources"


async def fail_jobs(harness: DashboardHarness, *job_ids: str) -> None:
    for job_id in job_ids:
        lock = await harness.start_job(job_id)
        await harness.call(f"jobs/{job_id}/fail", lock_id=lock, error_message="disk <full>")


async def submit_plan(browser: Browser, page: str, *ids: str, **fields: str) -> ReceivedResponse:
    """Submit the form for bulk actions with these jobs selected."""
    shown = text(await browser.get(page))
    form = shown[shown.index('<form id="bulk"') :].partition("</form>")[0]
    hidden = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', form))
    selectable = re.findall(r'name="ids" value="([^"]+)" form="bulk"', shown)
    assert set(ids) <= set(selectable)
    given = {name: html.unescape(value) for name, value in hidden.items()}
    pairs = [*given.items(), *(("ids", each) for each in ids), *fields.items()]
    return await browser.server.request("POST", "/plans", urlencode(pairs), browser._headers({"Content-Type": FORM}))
