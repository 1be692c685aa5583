"""The content of the pages."""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec import Raw
from msgspec.structs import replace

from jobd.dashboard import rendering
from jobd.model.commands import AUDITED_ACTIONS
from jobd.model.problems import ProblemList, Subject
from jobd.model.responses import AlertView, OldestDue, OutputGrant
from jobd.monitoring.timeseries import SLOTS, STEPS
from jobd.storage.artifacts.downloads import Downloads
from jobd.storage.artifacts.filesystem import FileArtifactStore
from tests.support.calls import PROBLEM
from tests.support.dashboard_harness import (
    AUTH,
    PAGES,
    READ_ONLY_TOKEN,
    Browser,
    DashboardHarness,
    assert_safe,
    audit_entries,
    following_pages,
    submit_plan,
    text,
)
from tests.support.http_harness import TOKEN


@pytest.mark.slow
async def test_the_overview_shows_what_the_disk_holds(harness: DashboardHarness) -> None:
    browser = await harness.browser()
    page = text(await browser.get("/"))
    assert "3.0 GiB free of 8.0 GiB" in page
    assert "/var/lib/jobd/jobd.db" in page
    assert "reports / monthly" in page
    assert "about 105.0 MiB" in page


async def test_the_audit_log_shows_actions_operators_and_reasons(harness: DashboardHarness) -> None:
    await harness.start_job()
    eve = Browser(harness.admin)
    await eve.post("/sign-in", token=TOKEN, name=" Eve  <i>\x1b ")
    assert "No" not in text(await eve.get("/audit")).partition("<tbody")[2]
    await eve.confirm("held", "force-fail", "wrong <b>input</b>")
    await eve.post("/queues/video/pause", csrf=await eve.csrf())
    unnamed = await harness.browser()
    await unnamed.post("/jobs/held/do", csrf=await unnamed.csrf(), verb="force-fail", seen="failed")
    reader = await harness.browser(READ_ONLY_TOKEN)
    for browser in (eve, reader):
        page = text(await browser.get("/audit"))
        rows = re.findall(r'<tr id="audit-\d+">(.*?)</tr>', page, re.DOTALL)
        assert len(rows) == 6
        by_reader, rejected, by_unnamed, paused, failed, by_eve = rows
        assert "Eve &lt;i&gt;" in by_eve
        assert ">reader<" in by_reader
        assert "</span> read</span>" in by_reader
        assert ">admin<" in by_unnamed
        assert all("sign-in" in row for row in (by_reader, by_unnamed, by_eve))
        assert "invalid_transition" in rejected
        assert ">admin<" in rejected
        assert "Eve &lt;i&gt;" in paused
        assert '<a href="/jobs?queue=video">' in paused
        assert "processing → failed" in failed
        assert "wrong &lt;b&gt;input&lt;/b&gt;" in failed
        assert "127.0.0.1" in failed
    assert "admin:Eve &lt;i&gt;" in text(await eve.get("/jobs/held"))
    assert re.search(r"Eve &lt;i&gt;</span>", text(await eve.get("/queues"))), "the viewer's name is shown"
    for query, count in (("who=admin", 2), ("action=pause", 1), ("job_id=held&who=", 2), ("since=1h", 6), ("who=x", 0)):
        assert text(await eve.get(f"/audit?{query}")).count('id="audit-') == count, query
    assert (await eve.get("/audit?job_id=a%20b")).status == 400
    assert "must be a time" in text(await eve.get("/audit?since=then"))
    assert "spelled artifact" in text(await eve.get("/audit?action=artefact"))


async def test_the_audit_log_suggests_every_action(harness: DashboardHarness) -> None:
    page = text(await (await harness.browser()).get("/audit"))
    suggested = re.findall('<option value="(.*?)">', page.partition('<datalist id="known-actions">')[2])
    assert tuple(suggested[: len(AUDITED_ACTIONS)]) == AUDITED_ACTIONS


async def test_the_audit_log_has_pages(harness: DashboardHarness) -> None:
    browser = await harness.browser()
    csrf = await browser.csrf()
    for number in range(60):
        await browser.post(f"/queues/q-{number}/pause", csrf=csrf)
    pages = await following_pages(browser, "/audit?action=pause")
    assert 'rel="next" href="/audit?action=pause&amp;' in pages[0]
    seen = [re.findall(r'href="/jobs\?queue=q-(\d+)">q-', page.partition("<tbody")[2]) for page in pages]
    assert [*itertools.chain(*seen)] == [str(number) for number in range(59, -1, -1)]


async def test_the_page_of_a_job_shows_its_state_and_actions(harness: DashboardHarness) -> None:
    lock = await harness.start_job()
    await harness.call("jobs/held/progress", lock_id=lock, progress=40, message="half of it")
    browser = await harness.browser()
    page = text(await browser.get("/jobs/held"))
    for words in (
        "Worker w-1 has held it",
        "half of it",
        'value="40"',
        "data-until=",
        "worker:w-1",
        "queued → processing",
        "&#34;a&#34;: 1",
        "http://localhost/admin/job-management/jobs/held",
        "Copy as curl",
    ):
        assert words in page, words
    assert lock not in page, "the lock id is secret"
    assert re.findall(r"verb=([a-z-]+)", page) == ["extend", "release", "force-reset", "force-fail", "cancel", "copy"]
    await harness.call("jobs/held/complete", lock_id=lock, download_url="https://files.example/a", metadata={"n": [1]})
    page = text(await browser.get("/jobs/held"))
    assert re.findall(r"verb=([a-z-]+)", page) == ["delete", "copy"]
    assert '<a href="/jobs/held/external-link" rel="noreferrer noopener">https://files.example/a</a>' in page


async def test_the_page_of_a_job_shows_what_it_printed(harness: DashboardHarness) -> None:
    await harness.start_job()
    await harness.restart_job("held")
    browser = await harness.browser()
    assert "h-output" not in text(await browser.get("/jobs/held"))
    outputs = harness.admin.services.outputs
    job = (await harness.admin.request("GET", "/admin/job-management/jobs/held", headers=AUTH)).data
    for token, printed in ((1, "line 1\n" * 3_000), (2, "\x1b[31m<b>bold</b>\x1b[0m\u202e\n10 %\r20 %\n")):
        await outputs.append("held", OutputGrant(job["created_at"], token, f"w-{token}", token), printed.encode())
    section = text(await browser.get("/jobs/held")).partition('<h2 id="h-output')[2].partition("</section>")[0]
    assert section.index("Attempt 2") < section.index("Attempt 1"), "newest first"
    assert ">&lt;b&gt;bold&lt;/b&gt;\\u202e\n20 %\n</pre>" in section
    assert section.count("Truncated") == section.count("20.5 KiB were printed; <code>jobctl output held</code>") == 1
    assert len(section) < rendering.MAX_PRINTED + 3_000
    await outputs.file.close()
    outputs.file.failure = "the disk is <full>"
    assert "cannot be used: the disk is &lt;full&gt;. The job continues" in text(await browser.get("/jobs/held"))
    outputs.file.failure, outputs.file.limit_bytes = None, 0
    assert "h-output" not in text(await browser.get("/jobs/held"))


async def test_a_long_timeline_shows_the_latest_events(harness: DashboardHarness) -> None:
    await harness.call("jobs", id="long", queue="q", max_attempts=100)
    browser = await harness.browser()
    for number in range(99):
        lock = (await harness.call("jobs/long/start", worker="w"))["lock_id"]
        await harness.call("jobs/long/fail", lock_id=lock, error_message=f"error {number}", retry_after_ms=0)
    page = text(await browser.get("/jobs/long"))
    assert "Earlier events are not shown" not in page, "199 of them"
    assert "created" in page.partition('<h2 id="h-timeline')[2]
    await harness.call("jobs/long/start", worker="w")
    lock = (await harness.admin.request("GET", "/admin/job-management/jobs/long", headers=AUTH)).data["lock"]["lock_id"]
    await harness.call("jobs/long/fail", lock_id=lock, error_message="the last", retry=False)
    page = text(await browser.get("/jobs/long"))
    assert "Earlier events are not shown" in page
    assert "the last" in page


async def test_a_large_payload_is_cut_and_a_deep_one_is_not_indented(harness: DashboardHarness) -> None:
    await harness.call("jobs", id="large", payload="x" * 100_000)
    page = text(await (await harness.browser()).get("/jobs/large"))
    assert "x" * 1_000 in page
    assert len(page) < rendering.MAX_JSON + 20_000
    assert "more characters" in page
    assert rendering.pretty_json(Raw(b'{"a":1}')) == ('{\n  "a": 1\n}', 0)
    deep = b"[" * 5_000 + b"]" * 5_000
    assert rendering.pretty_json(Raw(deep))[0].startswith("[")


async def test_a_stored_result_can_be_downloaded(harness: DashboardHarness, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    harness.admin.services.downloads = Downloads(FileArtifactStore(str(tmp_path / "results"), "test"), 2)
    lock = await harness.start_job()
    browser, reader = await harness.browser(), await harness.browser(READ_ONLY_TOKEN)
    assert "/jobs/held/artifact" not in text(await browser.get("/jobs/held"))
    response = await browser.get("/jobs/held/artifact")
    assert (response.status, "storage_key is not set" in text(response)) == (404, True)
    assert_safe(response)
    await harness.call("jobs/held/complete", lock_id=lock, storage_key="a/page.html")
    assert 'href="/jobs/held/artifact"' in text(await browser.get("/jobs/held"))
    with_store = text(await browser.get("/jobs/held/confirm?verb=delete"))
    assert "Its artifacts are deleted too" in with_store
    assert "jobctl delete held" in with_store
    await submit_plan(browser, "/jobs?status=completed", "held", action="delete", scope="selected")
    assert "Their artifacts are deleted too" in text(await browser.get("/plans/plan-1"))
    store, harness.admin.services.downloads = harness.admin.services.downloads, Downloads(None, 2)
    for page in ("/jobs/held/confirm?verb=delete", "/plans/plan-1"):
        assert "artifacts" not in text(await browser.get(page))
    assert "/artifact" not in text(await browser.get("/jobs/held"))
    harness.admin.services.downloads = store
    assert "The artifact store has no object" in text(await browser.get("/jobs/held/artifact"))
    (tmp_path / "results" / "a").mkdir()
    (tmp_path / "results" / "a" / "page.html").write_text("<script>alert(1)</script>")
    for who in (browser, reader):
        response = await who.get("/jobs/held/artifact")
        assert (response.status, response.body) == (200, b"<script>alert(1)</script>")
        assert response.headers["content-type"] == "application/octet-stream"
        assert response.headers["content-disposition"].startswith('attachment; filename="page.html"')
        assert response.headers["x-content-type-options"] == "nosniff"
    client = await harness.admin.connect()
    for _ in range(2):
        headers = {"Cookie": browser.cookie}
        response = await client.request("HEAD", "/jobs/held/artifact", headers=headers)
        assert (response.status, response.headers["content-length"]) == (200, "25")
    taken = [each for each in await audit_entries(harness) if each[1] == "artifact"]
    assert [each[0] for each in taken] == ["admin", "reader"], "HEAD is not a download"
    anonymous = await Browser(harness.admin).get("/jobs/held/artifact")
    assert (anonymous.status, anonymous.headers["location"]) == (303, "/sign-in?next=%2Fjobs%2Fheld%2Fartifact")
    assert (await browser.get("/jobs/nobody/artifact")).status == 404


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"stall_after_ms": 0},
            ["as soon as its lock expires", "requeued at progress 0 or with attempts left"],
        ),
        ({"on_stall": "requeue", "stall_after_ms": 90_000}, ["after 1 min 30 s without a report", "requeued <span"]),
        ({"on_stall": "fail", "max_stalls": 7}, ["fails above 7", "fails <span"]),
    ],
)
async def test_the_rules_for_stalls_are_described(
    harness: DashboardHarness, fields: dict[str, Any], expected: list[str]
) -> None:
    await harness.call("jobs", id="a", **fields)
    page = text(await (await harness.browser()).get("/jobs/a"))
    assert [words for words in expected if words not in page] == []


async def test_the_traceback_of_an_error_is_shown_once(harness: DashboardHarness) -> None:
    await harness.call("jobs", id="a")
    lock_id = (await harness.call("jobs/a/start", worker="w"))["lock_id"]
    await harness.call(
        "jobs/a/fail", lock_id=lock_id, error_message="KeyError: 1\nTraceback (most recent call last):\nx"
    )
    page = text(await (await harness.browser()).get("/jobs/a"))
    assert (page.count("KeyError: 1"), page.count("Traceback")) == (3, 1)


async def test_the_page_of_a_deleted_job_offers_no_actions(harness: DashboardHarness) -> None:
    browser = await harness.browser()
    await harness.call("jobs", id="a")
    await harness.call("jobs/a/cancel")
    assert "/jobs/a/confirm?verb=" in text(await browser.get("/jobs/a", HX_Request="true"))
    await browser.confirm("a", "delete")
    response = await browser.get("/jobs/a", HX_Request="true")
    assert response.status == 200
    assert_safe(response)
    page = text(response)
    assert "This job was deleted while the page was open" in page
    assert ("confirm" in page, "<form" in page, "/audit?action=delete&amp;job_id=a" in page) == (False, False, True)
    assert (await browser.get("/jobs/a")).status == 404, "a new visit is 404"
    assert (await browser.get("/jobs/%20", HX_Request="true")).status == 400


@pytest.mark.parametrize(
    ("hint", "shown"),
    [
        ("Look: jobctl workers, jobctl timeline ID", 'Look: <a href="/workers">jobctl workers</a>, jobctl timeline ID'),
        ("at the oldest: jobctl stats", 'at the oldest: <a href="/">jobctl stats</a>'),
        ("jobctl webhooks. The", '<a href="/webhooks">jobctl webhooks</a>. The'),
        ("who: jobctl timeline a:b-1", 'who: <a href="/jobs/a%3Ab-1">jobctl timeline a:b-1</a>'),
        ("jobctl why j.1. So", '<a href="/jobs/j.1">jobctl why j.1</a>. So'),
        ("<b> jobctl locks \x1b", '&lt;b&gt; <a href="/workers#h-locks">jobctl locks</a> \u241b'),
        ("jobctl validate ID, jobctl statsx", "jobctl validate ID, jobctl statsx"),
    ],
)
async def test_a_command_in_a_hint_links_to_its_page(harness: DashboardHarness, hint: str, shown: str) -> None:
    alert = AlertView("stalled_jobs", True, 1_700_000_000_000, 7, 5, hint)
    harness.admin.fakes.alerts = [alert]
    browser = await harness.browser()
    assert shown in text(await browser.get("/alerts"))


async def test_actions_on_the_dashboard_are_audited(harness: DashboardHarness) -> None:
    browser = await harness.browser()
    await harness.call("jobs", id="a")
    assert (await browser.confirm("a", "force-fail", "broken")).status == 303
    csrf = await browser.csrf()
    await browser.post("/queues/q/pause", csrf=csrf, reason="we move")
    await browser.post("/cleanup/run", csrf=csrf, reason="now")
    await browser.post("/clock/accept", csrf=csrf, reason=" NTP is right ")
    await browser.confirm("a", "delete", "not wanted")
    [session] = harness.dashboard.sessions._pools["full"].values()
    session.name = "eve"
    await browser.post("/queues/q/resume", {"X-Jobd-Operator": "mallory"}, csrf=csrf)
    program = {"Authorization": f"Bearer {TOKEN}", "X-Jobd-Operator": "script"}
    await Browser(harness.admin).post("/queues/q/pause", program)
    response = await harness.admin.request("GET", "/admin/job-management/audit", headers=AUTH)
    found = [
        (each["who"], each["action"], each["job_id"] or each["queue"], each["reason"])
        for each in response.data["entries"]
    ]
    assert found == [
        ("script", "pause", "q", None),
        ("eve", "resume", "q", None),
        ("admin", "delete", "a", "not wanted"),
        ("admin", "accept-clock", None, "NTP is right"),
        ("admin", "cleanup", None, "now"),
        ("admin", "pause", "q", "we move"),
        ("admin", "force-fail", "a", "broken"),
        ("admin", "sign-in", None, None),
    ]
    assert {each["address"] for each in response.data["entries"]} == {"127.0.0.1"}


async def test_problems_are_the_first_of_the_overview_and_counted_in_the_header(harness: DashboardHarness) -> None:
    browser = await harness.browser()
    many = [
        replace(PROBLEM, title="look at <the> workers", subject=Subject(type="pair", queue=f"q-{n}")) for n in range(9)
    ]
    harness.admin.fakes.problems = ProblemList(many, [replace(PROBLEM, title="Paused: deploy")], 0, 1)
    page = text(await browser.get("/"))
    assert page.index("9 problems</h2>") < page.index("Jobs by status")
    assert "look at &lt;the&gt; workers" in page
    assert "jobctl run --queue mail -- CMD" in page
    assert "4 more of no_workers: q-5, q-6, q-7, q-8<" in page
    assert "Paused: deploy" in page
    for target in PAGES:
        for headers in ({}, {"HX_Request": "true"}):
            page = text(await browser.get(target, **headers))
            assert re.findall(r'<a id="problem-count"[^>]*>([^<]*)<', page) == ["9 problems"], "once, in the header"
            assert ("hx-swap-oob" in page) == bool(headers)
    harness.admin.fakes.problems = ProblemList([replace(PROBLEM, severity="notice")])
    assert 'id="problem-count" class="badge bad" href="/" role="status" hidden>' in text(await browser.get("/jobs"))


async def test_the_charts_show_an_hour_and_a_day(harness: DashboardHarness) -> None:
    browser = await harness.browser()
    await harness.start_job()
    page = text(await browser.get("/"))
    assert re.search(r'<span class="number">1</span> created in the last minute', page)
    assert re.search(r"of the last <time[^>]*>\d+ m?s</time>", page)
    chart = (await browser.get("/chart.json")).json["data"]
    for name, steps, step_s in (("hour", STEPS, 10), ("day", SLOTS, 600)):
        lines = chart[name]
        assert {len(line) for line in lines.values()} == {steps}
        assert lines["at"] == list(range(lines["at"][0], lines["at"][0] + steps * step_s, step_s))
    assert 0 < time.time() * 1000 - chart["since"] < 600_000


async def test_a_queue_shows_its_throughput_and_failures(harness: DashboardHarness) -> None:
    browser = await harness.browser()
    for number in range(4):
        lock = await harness.start_job(f"job-{number}")
        verb, body = ("fail", {"error_message": "e"}) if number == 0 else ("complete", {"metadata": 1})
        await harness.call(f"jobs/job-{number}/{verb}", lock_id=lock, **body)
    page = text(await browser.get("/queues"))
    assert re.search(r'data-label="Completed/min" class="figure">3<', page)
    assert re.search(r'data-label="Failed attempts" class="figure">1 <span class="error">25.0&nbsp;%<', page)
    assert "time since the start" in page
    assert re.search(r"25.0 %</span> of attempts", text(await browser.get("/")))


async def rows_by_page(browser: Browser, target: str, row: str) -> list[list[str]]:
    """Return the ids of the rows, page by page."""
    return [re.findall(rf'id="{row}-([^"]+)"', page) for page in await following_pages(browser, target)]


async def test_queues_and_workers_have_pages(harness: DashboardHarness) -> None:
    names = [f"q-{number:03}" for number in range(230)]
    await harness.call("jobs/bulk", jobs=[{"id": f"job-{name}", "queue": name} for name in names])
    for number in range(120):
        await harness.call(f"jobs/job-q-{number:03}/start", worker=f"w-{number:03}")
    await harness.call("claim", worker="all", queues=names[120:220], limit=100)
    browser = await harness.browser()
    pages = await rows_by_page(browser, "/queues", "queue")
    assert pages == [names[:100], names[100:200], names[200:]]
    assert 'href="/queues">First' in text(await browser.get("/queues?cursor=q-100"))
    assert "No more queues" in text(await browser.get("/queues?cursor=z"))
    csrf = await browser.csrf()
    for name in names[205:]:
        assert (await browser.post(f"/queues/{name}/pause", csrf=csrf)).status == 303
    pages = await rows_by_page(browser, "/workers", "worker")
    assert [len(page) for page in pages] == [50, 50, 21]
    assert sorted(itertools.chain(*pages)) == ["all", *(f"w-{number:03}" for number in range(120))]
    page = text(await browser.get("/workers"))
    assert re.search(r'id="worker-all">.*?class="figure">100<.*?and 97 more', page, re.DOTALL)
    assert "No more workers" in text(await browser.get("/workers?seen=1%20w"))
    assert (await browser.get("/workers?seen=w")).status == 400


async def test_the_overview_links_to_the_oldest_due_job(harness: DashboardHarness) -> None:
    browser = await harness.browser()
    assert "<dd>none</dd>" in text(await browser.get("/"))
    harness.admin.fakes.oldest_due = OldestDue("first", "a", 1_700_000_000_000)
    page = text(await browser.get("/"))
    assert '<a href="/jobs/first">first</a>, due' in page
    assert 'href="/queues">paused</a>' not in page
    harness.admin.fakes.oldest_due = OldestDue("first", "a", 1_700_000_000_000, "by operator ana: deploy")
    assert 'href="/queues">paused</a> <span class="dim">by operator ana: deploy' in text(await browser.get("/"))


async def test_locks_have_pages(harness: DashboardHarness) -> None:
    await harness.call("jobs/bulk", jobs=[{"id": f"job-{number:03}"} for number in range(250)])
    for _ in range(3):
        await harness.call("claim", worker="w", limit=100)
    browser = await harness.browser()
    shown = await following_pages(browser, "/workers", "#h-locks")
    assert all("of 250</span>" in page for page in shown)
    assert [job_id for page in shown for job_id in re.findall(r'id="lock-(job-\d+)"', page)] == [
        f"job-{number:03}" for number in range(250)
    ]
    assert (await browser.get("/workers?cursor=x")).status == 400
