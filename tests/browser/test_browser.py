"""The dashboard in a real browser against a real daemon.

Tests use `expect` on locators only: the pages' policy forbids eval, which Playwright needs otherwise.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Route, expect, sync_playwright

from tests.browser.scenarios import (
    CHROMIUM,
    FLAGS,
    TROUBLE,
    DashboardDaemon,
    cluster_of,
    make_busy,
    make_trouble,
)
from tests.conftest import tool_missing
from tests.support.daemon_process import TOKEN
from tests.support.postgres import PostgresMissing

PATHS = [
    "/",
    "/jobs",
    "/jobs/video-004",
    "/jobs/video-004/confirm?verb=force-reset",
    "/jobs/nasty",
    "/queues",
    "/workers",
]
ELSEWHERE = "--host-resolver-rules=MAP elsewhere.test 127.0.0.1"
PATHS += ["/alerts", "/cleanup", "/cleanup/confirm?what=run", "/audit", "/failures", "/clock"]
PATHS += ["/schedules", "/queues/video", "/jobs/video-004/confirm?verb=copy"]
PATHS += ["/webhooks", "/webhooks/billing", "/webhooks/billing/resend-dead-lettered", "/docs/worker", "/docs"]


# A browser needs two cores. On a busy machine it is slow.
pytestmark = pytest.mark.timeout(300)
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """For this module only: while Playwright runs, it owns the event loop of the thread."""
    if not CHROMIUM:
        tool_missing("chromium", "chromium-headless-shell")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, ELSEWHERE])


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    opened = browser.new_context()
    yield opened
    opened.close()


@pytest.fixture
def page(context: BrowserContext) -> Page:
    return context.new_page()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DashboardDaemon]:
    with DashboardDaemon(tmp_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DashboardDaemon]:
    """A daemon with everything that pages show. Its tests may add jobs."""
    with DashboardDaemon(tmp_path_factory.mktemp("troubled"), TROUBLE) as opened:
        make_trouble(opened)
        yield opened


@pytest.fixture
def console_errors(page: Page) -> list[str]:
    """Collect console messages: policy violations, script errors, missing files."""
    messages: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            messages.append(f"{message.text} ({page.url})")

    page.on("console", note)
    page.on("pageerror", lambda error: messages.append(f"{error} ({page.url})"))
    return messages


def sign_in(page: Page, daemon: DashboardDaemon, token: str = TOKEN, path: str = "/") -> None:
    page.goto(daemon.url + path)
    page.get_by_label("Admin token").fill(token)
    page.get_by_role("button", name="Sign in").click()
    expect(page).to_have_url(daemon.url + path)


def test_a_sign_in_link_signs_in_and_leaves_no_token_in_the_address(page: Page, daemon: DashboardDaemon) -> None:
    page.goto(f"{daemon.url}/sign-in#{TOKEN}")
    expect(page).to_have_url(f"{daemon.url}/")


def start_job(daemon: DashboardDaemon, job_id: str) -> str:
    """Create and start a job. Return its lock id."""
    daemon.do("jobs", id=job_id, queue="video")
    return str(daemon.do(f"jobs/{job_id}/start", worker="w-1")["lock_id"])


def visit(page: Page, daemon: DashboardDaemon, path: str) -> None:
    """Open a page and wait until its scripts have run."""
    page.goto(daemon.url + path)
    drawn = {"/": ".chart canvas", "/docs": ".opblock", "/docs/worker": ".opblock"}.get(path, "main")
    expect(page.locator(drawn).first).to_be_visible()


def test_output_is_followed_at_its_end(page: Page, daemon: DashboardDaemon, console_errors: list[str]) -> None:
    lock = start_job(daemon, "prints")
    sign_in(page, daemon, path="/jobs/prints")
    daemon.do("jobs/prints/output", lock_id=lock, text="".join(f"line {n}\n" for n in range(500)))
    text = page.get_by_label("Attempt 1")
    last = "(each) => Math.round(each.scrollHeight - each.scrollTop - each.clientHeight)"
    expect(text).to_contain_text("line 499")
    assert text.evaluate(last) <= 1
    daemon.do("jobs/prints/output", lock_id=lock, text="<b>the end</b>" + "x" * 3000)
    expect(text).to_contain_text("<b>the end</b>")
    assert text.evaluate(last) <= 1
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    text.evaluate("(each) => each.scrollTo(0, 50)")
    daemon.do("jobs/prints/output", lock_id=lock, text="later")
    expect(text).to_contain_text("later")
    assert text.evaluate("(each) => each.scrollTop") == 50
    assert console_errors == []


def test_a_job_is_watched_from_queued_to_completed(
    page: Page, daemon: DashboardDaemon, console_errors: list[str]
) -> None:
    daemon.do("jobs", id="watched", queue="video", payload={"file": "a.mov"})
    sign_in(page, daemon, path="/jobs/watched")
    heading = page.get_by_role("heading", level=1)
    expect(heading).to_contain_text("queued")
    lock = daemon.do("jobs/watched/start", worker="w-1")["lock_id"]
    expect(heading).to_contain_text("processing")
    expect(page.get_by_text("Worker w-1 has held it")).to_be_visible()
    countdown = page.locator(".countdown")
    first = countdown.inner_text()
    daemon.do("jobs/watched/progress", lock_id=lock, progress=42, message="encoding part 3")
    expect(page.get_by_label("Progress", exact=True).locator("progress")).to_have_attribute("value", "42")
    expect(page.get_by_text("encoding part 3").first).to_be_visible()
    expect(countdown).not_to_have_text(first)
    daemon.do("jobs/watched/complete", lock_id=lock, file_path="/srv/out/a.mp4")
    expect(heading).to_contain_text("completed")
    expect(page.get_by_text("/srv/out/a.mp4")).to_be_visible()
    assert console_errors == []


def test_a_page_updates_on_events_without_polling(
    page: Page, daemon: DashboardDaemon, console_errors: list[str]
) -> None:
    """The page's clock is stopped, so its timers never fire."""
    page.clock.install()
    lock = start_job(daemon, "watched")
    sign_in(page, daemon, path="/jobs/watched")
    expect(page.get_by_role("button", name="Live")).to_be_visible()
    page.clock.pause_at(datetime.now(UTC) + timedelta(minutes=1))
    daemon.do("jobs/watched/progress", lock_id=lock, progress=42)
    expect(page.get_by_label("Progress", exact=True).locator("progress")).to_have_attribute("value", "42")
    daemon.do("jobs/watched/complete", lock_id=lock, file_path="/srv/out/a.mp4")
    expect(page.get_by_role("heading", level=1)).to_contain_text("completed")
    page.goto(daemon.url)
    expect(page.get_by_role("button", name="Live")).to_be_visible()
    page.clock.pause_at(datetime.now(UTC) + timedelta(minutes=2))
    daemon.do("jobs", id="another")
    expect(page.locator("a.count.queued")).to_contain_text("1")
    assert console_errors == []


def test_a_page_without_a_stream_polls(page: Page, tmp_path: Path) -> None:
    with DashboardDaemon(tmp_path, "[limits]\nevent_streams = 1\n") as daemon:
        lock = start_job(daemon, "watched")
        sign_in(page, daemon, path="/jobs/watched")
        expect(page.get_by_role("button", name="Live")).to_be_visible()
        second = page.context.new_page()
        second.goto(f"{daemon.url}/jobs/watched")
        expect(second.get_by_role("button", name="Polling")).to_be_visible()
        daemon.do("jobs/watched/complete", lock_id=lock, file_path="/srv/out/a.mp4")
        expect(second.get_by_role("heading", level=1)).to_contain_text("completed")


def test_a_plan_retries_many_jobs(page: Page, daemon: DashboardDaemon, console_errors: list[str]) -> None:
    make_busy(daemon)
    sign_in(page, daemon, path="/jobs?status=failed")
    page.get_by_role("checkbox", name="Select video-003").check()
    page.get_by_role("checkbox", name="Select video-013").check()
    expect(page.locator("#selection")).to_contain_text("2 selected")
    page.get_by_label("Reason").fill("storage is back")
    page.get_by_role("button", name="Make a plan").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Plan: retry 2 jobs")
    expect(page.locator(".transitions")).to_contain_text("2 failed → queued")
    daemon.operator("DELETE", "jobs/video-013")
    page.get_by_role("checkbox", name="One job first").uncheck()
    page.get_by_role("button", name="Retry 2 jobs").click()
    expect(page.get_by_role("status").first).to_contain_text("Applied to 1 job.")
    changed = page.get_by_role("region", name="Not changed, because they had changed before").locator("tbody tr")
    expect(changed).to_have_count(1)
    expect(changed).to_contain_text("video-013")
    page.goto(f"{daemon.url}/jobs/video-003")
    expect(page.get_by_role("heading", level=1)).to_contain_text("queued")
    page.goto(f"{daemon.url}/jobs?queue=mail&status=queued")
    page.get_by_role("combobox", name="Action", exact=True).select_option("cancel")
    page.get_by_role("combobox", name="Jobs", exact=True).select_option("all")
    page.get_by_role("button", name="Make a plan").click()
    expect(page.locator(".transitions")).to_contain_text("queued → cancelled")
    assert console_errors == []


def test_the_list_does_not_update_during_a_selection(
    page: Page, daemon: DashboardDaemon, console_errors: list[str]
) -> None:
    """The page's clock runs fast, so that all of its timers fire."""
    page.clock.install()
    daemon.do("jobs/bulk", jobs=[{"id": f"old-{number:02}", "queue": "video"} for number in range(50)])
    sign_in(page, daemon, path="/jobs")
    toggle, oldest = page.locator("#live-toggle"), page.get_by_role("checkbox", name="Select old-00")
    expect(toggle).to_have_text("Live")
    oldest.check()
    expect(toggle).to_have_text("Paused")
    expect(page.locator("#selection")).to_contain_text("1 selected. The list does not update meanwhile.")
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    other = page.context.new_page()  # with the same subscription
    other.goto(f"{daemon.url}/jobs")
    expect(other.locator("#live-toggle")).to_have_text("Live")
    daemon.do("jobs/bulk", jobs=[{"id": f"new-{number:02}", "queue": "video"} for number in range(60)])
    expect(other.locator("#job-new-59")).to_be_visible()
    page.clock.run_for(60_000)
    expect(page.locator("tbody tr").first).to_contain_text("old-49")
    toggle.click()
    toggle.click()  # stopping and resuming keeps the selection too
    expect(toggle).to_have_text("Paused")
    page.clock.run_for(60_000)
    expect(oldest).to_be_checked()
    assert [url for url in requests if "/live" not in url] == []
    oldest.click()  # not uncheck, which checks again: the row may be gone by then
    expect(page.locator("tbody tr").first).to_contain_text("new-59")
    expect(toggle).to_have_text(re.compile("Live|Polling"))
    assert console_errors == []


def test_a_late_update_does_not_change_the_selection(page: Page, daemon: DashboardDaemon) -> None:
    """The update was requested before the first selection."""
    daemon.do("jobs/bulk", jobs=[{"id": f"old-{number:02}", "queue": "video"} for number in range(50)])
    sign_in(page, daemon, path="/jobs")
    expect(page.locator("#live-toggle")).to_have_text("Live")
    waiting: list[Route] = []
    page.route("**/jobs", lambda route: waiting.append(route))
    with page.expect_request("**/jobs"):
        daemon.do("jobs", id="new", queue="video")
    page.get_by_role("checkbox", name="Select old-00").check()
    expect(page.locator("#live")).to_have_class(re.compile("htmx-request"))
    waiting.pop().continue_()
    page.unroute("**/jobs")
    expect(page.locator("#live")).not_to_have_class(re.compile("htmx-request"))  # the response was handled
    expect(page.get_by_role("checkbox", name="Select old-00")).to_be_checked()
    expect(page.locator("#job-new")).to_have_count(0)
    page.get_by_role("checkbox", name="Select old-00").click()
    expect(page.locator("#job-new")).to_be_visible()


def test_going_back_to_the_list_selects_no_other_job(page: Page, daemon: DashboardDaemon) -> None:
    """On going back, browsers restore checkboxes by position, where other jobs may be."""
    for name in ("a", "b", "c"):
        daemon.do("jobs", id=name, queue="video")
    sign_in(page, daemon, path="/jobs")
    page.get_by_role("checkbox", name="Select b").check()
    page.get_by_role("button", name="Make a plan").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Plan")
    daemon.do("jobs", id="d", queue="video")
    page.go_back()
    expect(page.locator("#job-d")).to_be_visible()
    expect(page.locator("#selection")).to_have_text(re.compile("^Nothing"))
    expect(page.locator("input:checked")).to_have_count(0)


class _WorkerServer(BaseHTTPRequestHandler):
    """A server of a worker that records cookies. `/there` redirects to `target`."""

    requests: ClassVar[list[tuple[str, str | None]]] = []
    target = ""

    def do_GET(self) -> None:
        self.requests.append((self.path, self.headers.get("Cookie")))
        self.send_response(302 if self.path == "/there" else 200)
        self.send_header("Location", self.target)
        self.send_header("Content-Type", "text/plain")
        self.end_headers()
        self.wfile.write(b"here I am")

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_external_links_do_not_leak_the_session_cookie(
    page: Page, daemon: DashboardDaemon, console_errors: list[str]
) -> None:
    """Browsers send cookies to all ports of a host. A link to another port of this host would leak the cookie, and so
    would a link to another host that redirects there."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _WorkerServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_port
        _WorkerServer.requests.clear()
        _WorkerServer.target = f"http://127.0.0.1:{port}/out.mp4"
        for name, url in (("trap", _WorkerServer.target), ("bent", f"http://elsewhere.test:{port}/there")):
            daemon.do(f"jobs/{name}/complete", lock_id=start_job(daemon, name), download_url=url)
        sign_in(page, daemon, path="/jobs/trap")
        expect(page.get_by_text(_WorkerServer.target)).to_be_visible()
        expect(page.locator(f'a[href*=":{port}"], a[href*="elsewhere"]')).to_have_count(0)
        page.goto(f"{daemon.url}/jobs/bent")
        page.get_by_role("link", name="elsewhere.test").click()
        page.get_by_role("link", name="elsewhere.test").click()
        expect(page.get_by_text("here I am")).to_be_visible()
        server.shutdown()
    requests = [each for each in _WorkerServer.requests if "favicon" not in each[0]]
    assert requests == [("/there", None), ("/out.mp4", None)]
    page.goto(f"{daemon.url}/jobs/bent/external-link")
    page.get_by_role(
        "link", name="Back to the job"
    ).click()  # the sandboxed page sends no cookie, so this passes the sign-in page
    expect(page.get_by_role("heading", level=1)).to_contain_text("bent")
    assert console_errors == []


def test_a_queue_is_paused_with_a_reason(page: Page, daemon: DashboardDaemon, console_errors: list[str]) -> None:
    make_busy(daemon)
    daemon.operator("POST", "queues/imports/resume")
    sign_in(page, daemon, path="/queues")
    page.get_by_label("Reason").fill("the disk is swapped")
    page.get_by_label("Reason").press("Enter")  # submits nothing
    daemon.do("jobs", id="one-more", queue="a")
    expect(page.get_by_role("row", name="Pause queue a")).to_be_visible()  # the page has updated
    expect(page.get_by_label("Reason")).to_have_value("the disk is swapped\n")
    page.get_by_role("button", name="Pause queue video").click()
    expect(page.get_by_role("status").first).to_contain_text("Queue video is paused")
    page.goto(f"{daemon.url}/audit?action=pause")
    expect(page.locator("table tbody tr")).to_have_count(2)  # one is from the scenario
    expect(page.locator("table tbody tr").first).to_contain_text("the disk is swapped")
    page.goto(f"{daemon.url}/queues")
    page.get_by_role("button", name="Resume queue video").click()
    expect(page.get_by_role("button", name="Pause queue video")).to_be_visible()
    assert console_errors == []


@pytest.fixture
def old_daemon(tmp_path: Path) -> Iterator[DashboardDaemon]:
    """Run a daemon that can have names that are rejected now."""
    daemon = DashboardDaemon(tmp_path)
    daemon.variant = "dot_names"
    with daemon:
        yield daemon


@pytest.mark.parametrize(("given", "name"), [("dot", "."), ("dotdot", "..")])
def test_an_old_job_and_queue_named_like_a_dot_segment_work(
    page: Page, old_daemon: DashboardDaemon, console_errors: list[str], given: str, name: str
) -> None:
    daemon = old_daemon
    assert daemon.do("jobs", id=given, queue=given)["id"] == name
    sign_in(page, daemon, path="/queues")
    page.get_by_label("Reason").fill("a trial")
    page.get_by_role("button", name=f"Pause queue {name}", exact=True).click()
    expect(page.get_by_role("status").first).to_contain_text(f"Queue {name} is paused.")
    page.get_by_role("button", name=f"Resume queue {name}", exact=True).click()
    expect(page.get_by_role("status").first).to_contain_text(f"Queue {name} is resumed.")
    page.goto(f"{daemon.url}/jobs")
    page.locator("td.first").get_by_role("link", name=name, exact=True).click()
    expect(page).to_have_url(f"{daemon.url}/job?id={name}")
    expect(page.locator("#live-toggle")).to_have_text("Live")
    expect(page.locator("#curl")).to_contain_text("--path-as-is")
    page.get_by_role("link", name="Cancel").click()
    call = page.locator("#curl").inner_text().replace("$ADMIN_TOKEN", TOKEN)
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("status").first).to_contain_text("Cancel: done. queued → cancelled")
    expect(page).to_have_url(f"{daemon.url}/job?id={name}")
    response = json.loads(subprocess.run(shlex.split(call), capture_output=True, check=True, timeout=150).stdout)
    assert "invalid_transition" in json.dumps(response), (
        response
    )  # the command reached the job, which is cancelled already
    page.goto(f"{daemon.url}/jobs")
    page.get_by_role("textbox", name="Id").fill(name)
    page.get_by_role("button", name="Open").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("cancelled")
    assert console_errors == []


def test_names_are_not_broken_in_a_wide_window(troubled: DashboardDaemon, page: Page) -> None:
    for kind in ("newsletter", "thumbnails"):
        troubled.do("jobs", id=kind, queue="mediaprocessing", kind=kind)
    troubled.do("claim", worker="mediaprocessing-1", queues=["mediaprocessing"], limit=2)
    page.set_viewport_size({"width": 1280, "height": 800})
    sign_in(page, troubled)
    visit(page, troubled, "/jobs")
    for kind in ("newsletter", "thumbnails"):
        cell = page.locator(f"#job-{kind} td[data-label=Kind]")
        lines = """cell => {
          const word = document.createRange();
          word.selectNodeContents(cell);
          return word.getClientRects().length;
        }"""
        assert cell.evaluate(lines) == 1, kind


def test_every_page_fits_a_phone_and_violates_no_policy(
    troubled: DashboardDaemon, context: BrowserContext, page: Page, console_errors: list[str]
) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    sign_in(page, troubled)
    inspector = context.new_cdp_session(page)
    for path in PATHS:
        visit(page, troubled, path)
        width = inspector.send("Page.getLayoutMetrics")["cssContentSize"]["width"]
        assert width <= 390, path
    page.get_by_text("/admin/job-management/force-reset").click()
    expect(page.get_by_role("button", name="Try it out")).to_be_visible()
    page.get_by_role("button", name="Authorize").first.click()
    expect(page.get_by_role("heading", name="Available authorizations")).to_be_visible()
    page.goto(troubled.url)
    expect(page.locator(".chart canvas")).to_have_count(2)
    page.goto(f"{troubled.url}/jobs?status=failed")
    page.get_by_role("checkbox", name="Select video-003").check()
    page.get_by_role("button", name="Make a plan").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Plan: retry 1 job")
    expect(page.locator("#live-toggle")).to_be_hidden()  # a plan does not update
    assert inspector.send("Page.getLayoutMetrics")["cssContentSize"]["width"] <= 390
    assert console_errors == []


def test_the_keyboard_focus_survives_updates(page: Page, daemon: DashboardDaemon) -> None:
    make_busy(daemon)
    sign_in(page, daemon, path="/queues")
    page.goto(f"{daemon.url}/queues")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.keyboard.press("Enter")
    page.get_by_label("Reason").fill("the receiver is down")
    button = page.get_by_role("button", name="Pause queue mail")
    button.focus()
    daemon.do("jobs", id="one-more", queue="mail")
    daemon.do("jobs", id="first-of-all", queue="a")
    expect(page.get_by_role("row", name="Pause queue a")).to_be_visible()
    expect(page.get_by_role("row", name="mail")).to_contain_text("33")
    expect(button).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("status").first).to_contain_text("Queue mail is paused")


def test_the_result_of_a_continued_search_does_not_update(
    page: Page, tmp_path: Path, console_errors: list[str]
) -> None:
    """An update would begin with the newest jobs again, where nothing matches."""
    daemon = DashboardDaemon(tmp_path)
    daemon.variant = "short_pages"
    with daemon:
        daemon.do("jobs", id="rare", queue="rare")
        lock = daemon.do("jobs/rare/start", worker="w-1")["lock_id"]
        daemon.do("jobs/rare/fail", lock_id=lock, error_message="rare")
        sign_in(page, daemon, path="/failures")
        page.goto(f"{daemon.url}/jobs?queue=rare")
        toggle, row = page.locator("#live-toggle"), page.locator("#job-rare")
        expect(toggle).to_have_text("Live")
        daemon.do("jobs/bulk", jobs=[{"id": f"often-{number}", "queue": "rare-no-more"} for number in range(100)])
        daemon.do("jobs", id="hold", queue="rare")
        expect(page.locator("#job-hold")).to_be_visible()
        daemon.do("jobs/bulk", jobs=[{"id": f"more-{number}", "queue": "rare-no-more"} for number in range(100)])
        daemon.do("jobs/hold/start", worker="w-1")
        expect(toggle).to_have_text("Stopped")
        expect(page.locator("#job-hold")).to_be_visible()
        toggle.click()
        expect(toggle).to_have_text("Stopped")
        expect(page.locator("#job-hold")).to_be_visible()
        for number in range(30):  # more than one page scans
            daemon.do("jobs", id=f"f-{number}", queue="other")
            daemon.operator("POST", "force-fail", {"jobId": f"f-{number}", "reason": "of others"})
        page.goto(f"{daemon.url}/failures")
        page.get_by_role("link", name="rare", exact=True).first.click()
        expect(row).to_be_visible()
        expect(toggle).to_be_hidden()
        assert console_errors == []


def test_updates_can_be_stopped(page: Page, daemon: DashboardDaemon) -> None:
    daemon.do("jobs", id="a")
    sign_in(page, daemon, path="/jobs/a")
    page.get_by_role("button", name="Live").click()
    stopped = page.get_by_role("button", name="Stopped")
    expect(stopped).to_have_attribute("aria-pressed", "false")
    daemon.do("jobs/a/cancel")
    stopped.click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("cancelled")


def test_an_open_page_of_a_deleted_job_offers_no_actions(
    page: Page, daemon: DashboardDaemon, console_errors: list[str]
) -> None:
    daemon.do("jobs", id="old")
    daemon.do("jobs/old/cancel", reason="r")
    sign_in(page, daemon, path="/jobs/old")
    expect(page.get_by_role("link", name="Delete")).to_be_visible()
    other = page.context.new_page()
    other.goto(f"{daemon.url}/jobs/old/confirm?verb=delete")
    other.get_by_role("button", name="Delete").click()
    expect(other).to_have_url(f"{daemon.url}/jobs")
    page.bring_to_front()
    expect(page.get_by_text("This job was deleted while the page was open")).to_be_visible()
    expect(page.locator(".actions")).to_have_count(0)
    expect(page.locator("#offline")).to_be_hidden()
    page.get_by_role("link", name="Audit log").click()
    expect(page.locator("tbody tr")).to_have_count(1)
    assert console_errors == []


def test_the_api_reference_follows_the_colour_scheme_and_has_enough_contrast(
    browser: Browser, daemon: DashboardDaemon
) -> None:
    """Measure the colours of swagger-ui as rendered, with the policy bypassed."""
    context = browser.new_context(bypass_csp=True)
    page = context.new_page()
    visit(page, daemon, "/docs")
    page.add_style_tag(content="* { transition: none !important }")  # colours change at once
    for method in ("get", "post", "delete"):
        block = page.locator(f".opblock-{method}").last
        block.locator(".opblock-summary-control").click()
        block.get_by_role("button", name="Try it out").click()
        expect(block.get_by_role("button", name="Cancel")).to_be_visible()
    page.get_by_role("button", name="Schemas").click()
    expect(page.locator("h1")).to_have_count(1)
    expect(page.locator("h3[aria-level='2']").first).to_be_visible()
    expect(page.locator("h4", has_text="Schemas")).to_have_attribute("aria-level", "3")
    measure = (Path(__file__).parent / "contrast.js").read_text()
    frame = page.locator("#swagger-ui")
    page.emulate_media(color_scheme="dark")
    expect(frame).to_have_css("background-color", "rgb(28, 32, 34)")
    assert page.evaluate(measure) == []
    page.get_by_role("button", name="Authorize").first.click()
    expect(page.get_by_role("heading", name="Available authorizations")).to_be_visible()
    assert page.evaluate(measure) == []
    page.emulate_media(color_scheme="light")
    expect(frame).to_have_css("background-color", "rgb(255, 255, 255)")
    assert page.evaluate(measure) == []
    context.close()


DRAWN = """\
window.drawn = [];
const write = CanvasRenderingContext2D.prototype.fillText;
CanvasRenderingContext2D.prototype.fillText = function (text, x, ...rest) {
  const right = this.getTransform().e + x; // where the axis labels end
  if (this.textAlign === "right") window.drawn.push([text, right - this.measureText(text).width]);
  return write.call(this, text, x, ...rest);
};
"""
# Count the pixels of the second chart that have the colour of a line.
COLOURED = """() => {
  const canvas = document.querySelectorAll(".chart canvas")[1];
  const dots = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const isOf = (at, colour) => colour.every((part, index) => dots[at + index] === part);
  let count = 0;
  for (let at = 0; at < dots.length; at += 4) count += isOf(at, [107, 78, 168, 255]);
  return count;
}"""


def test_the_charts_have_whole_numbers_and_show_isolated_values(browser: Browser, daemon: DashboardDaemon) -> None:
    context = browser.new_context(bypass_csp=True, color_scheme="light")
    context.add_init_script(DRAWN)
    page = context.new_page()
    jobs = 1

    def answer(route: Route) -> None:
        lines = {"at": [0, 600, 1_200], "created": [0, 0, jobs], "completed": [0, 0, 0], "failed": [0, 0, 0]}
        route.fulfill(json={"data": {"hour": lines, "day": lines, "since": 1_200_000}})  # only the last has values

    page.route("**/chart.json", answer)
    sign_in(page, daemon)
    for jobs in (1, 3_000, 30_000, 6_000_000):
        page.reload()
        expect(page.locator(".chart canvas")).to_have_count(2)
        expect(page.locator(".u-legend").first).to_be_visible()
        drawn = page.evaluate("window.drawn")
        assert [text for text, left in drawn if left < 0] == [], jobs
        numbers = {text for text, _ in drawn}
        assert "0" in numbers
        assert len(numbers) > 2, jobs
        assert all(re.fullmatch("[0-9]{1,3}(\u202f[0-9]{3})*", text) for text in numbers), numbers
        assert max(int(text.replace("\u202f", "")) for text in numbers) >= jobs / 2
        assert page.evaluate(COLOURED) > 5, jobs
    context.close()


def test_a_daemon_that_does_not_respond_is_shown(page: Page, daemon: DashboardDaemon) -> None:
    sign_in(page, daemon)
    expect(page.locator("#offline")).to_be_hidden()
    assert daemon.stop() == 0
    expect(page.locator("#offline")).to_contain_text("The daemon does not respond")
    daemon.start()
    expect(page).to_have_url(re.compile("/sign-in"))  # sessions are in memory


def test_a_step_down_on_the_page_of_the_cluster(
    context: BrowserContext, page: Page, console_errors: list[str], tmp_path: Path
) -> None:
    try:
        with cluster_of(tmp_path, "a", "b") as (old, new):
            page.set_viewport_size({"width": 390, "height": 800})
            sign_in(page, new, path="/cluster")
            layout = context.new_cdp_session(page).send("Page.getLayoutMetrics")
            assert layout["cssContentSize"]["width"] <= 390
            expect(page.get_by_role("main")).to_contain_text("This node is a standby.")
            expect(page.get_by_role("navigation", name="Pages").get_by_role("link")).to_have_text(["Cluster"])
            leader = context.new_page()
            sign_in(leader, old)
            leader.get_by_role("link", name="Cluster").click()
            leader.get_by_role("link", name="Step down …").click()
            leader.get_by_label("Reason").fill("new kernel")
            leader.get_by_role("button", name="Step down").click()
            expect(leader.get_by_role("heading", level=1)).to_have_text("a steps down")
            assert old.process.wait(30) == 75
            expect(page.get_by_role("link", name="Step down …")).to_be_visible()  # the session stays
            expect(page.get_by_role("navigation", name="Pages").get_by_role("link", name="Jobs")).to_be_visible()
            page.goto(f"{new.url}/audit")
            expect(page.get_by_role("main")).to_contain_text("new kernel")
            assert console_errors == []
    except PostgresMissing:
        tool_missing("postgres", "postgresql")
