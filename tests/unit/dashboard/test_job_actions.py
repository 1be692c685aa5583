"""Actions on one job, and late results."""

from __future__ import annotations

import html
import json
import re
import shlex
from typing import Any

import pytest

from jobd.dashboard.job_actions import JOB_ACTIONS
from jobd.model.job import Policy
from jobd.storage.artifacts.downloads import Downloads
from jobd.storage.artifacts.filesystem import FileArtifactStore
from tests.support.dashboard_harness import AUTH, NASTY, READ_ONLY_TOKEN, Browser, DashboardHarness, assert_safe, text


@pytest.mark.parametrize(
    ("verb", "before", "after"),
    [
        ("force-fail", "processing", "failed"),
        ("force-reset", "processing", "queued"),
        ("cancel", "processing", "cancelled"),
        ("extend", "processing", "processing"),
        ("release", "processing", "queued"),
    ],
)
async def test_an_action_shows_its_transition_and_is_applied_when_confirmed(
    harness: DashboardHarness, verb: str, before: str, after: str
) -> None:
    await harness.start_job()
    browser = await harness.browser()
    page = text(await browser.get(f"/jobs/held/confirm?verb={verb}"))
    assert re.findall(r'class="status (\w+)"', page) == [before, after]
    assert await harness.status("held") == before
    assert (await browser.confirm("held", verb, "because of <tests>")).redirect == "/jobs/held"
    assert await harness.status("held") == after
    page = text(await browser.get("/jobs/held"))
    assert f"{JOB_ACTIONS[verb].label}: done. {before} → {after}" in page
    assert "because of &lt;tests&gt;" in page
    assert "done." not in text(await browser.get("/jobs/held")), "the flash message is shown once"


async def test_a_copy_has_a_page_with_headers_payload_and_checkpoint(harness: DashboardHarness) -> None:
    await harness.call("jobs", id="old", headers={"trace": "<t1>"}, payload={"n": 7})
    lock = (await harness.call("jobs/old/start", worker="w"))["lock_id"]
    await harness.call("jobs/old/progress", lock_id=lock, progress=1, checkpoint={"at": 12})
    browser = await harness.browser()
    page = text(await browser.get("/jobs/old"))
    for words in ("<dt>trace</dt>", "&lt;t1&gt;", 'aria-label="Checkpoint"', "&#34;at&#34;: 12"):
        assert words in page, words
    assert 'class="status' not in text(await browser.get("/jobs/old/confirm?verb=copy")), "the job does not change"
    response = await browser.confirm("old", "copy", "try it")
    assert response.status == 303
    page = text(await browser.get(response.headers["location"]))
    for words in ("created as a copy of old", 'href="/jobs/old">old</a>', "&lt;t1&gt;", "&#34;n&#34;: 7"):
        assert words in page, words
    assert "Checkpoint" not in page
    assert await harness.status("old") == "processing"
    assert "try it" in text(await browser.get("/audit"))
    shown = text(await browser.get("/jobs/old/confirm?verb=copy")).partition("<textarea")[2].partition("</textarea>")[0]
    assert html.unescape(shown.partition(">")[2]) == '{\n  "n": 7\n}'
    fields = await browser.confirm_fields("old", "copy")
    response = await browser.post("/jobs/old/do", **fields, payload='{"n":\r\n 8}')
    assert "&#34;n&#34;: 8" in text(await browser.get(response.headers["location"]))
    response = await browser.post("/jobs/old/do", **fields, payload="eight")
    assert (response.status, "not valid JSON: JSON is malformed" in text(response)) == (400, True)
    await harness.call("jobs", id="large", payload="x" * 30_000)
    shown = text(await browser.get("/jobs/large/confirm?verb=copy")).partition("Payload, as JSON")[2]
    assert "Leave this empty" in shown.partition("</textarea>")[0]
    assert "></textarea>" in shown


async def test_a_late_result_is_not_deleted_unseen(harness: DashboardHarness) -> None:
    lock = await harness.start_job()
    response = await harness.admin.request(
        "POST", "/admin/job-management/force-fail", json.dumps({"jobId": "held"}), headers=AUTH
    )
    assert response.status == 200
    browser = await harness.browser()
    seen = await browser.confirm_fields("held", "delete")
    assert "late result" not in text(await browser.get("/jobs/held/confirm?verb=delete"))
    body = json.dumps({"lock_id": lock, "file_path": "/late"})
    assert (await harness.worker.request("POST", "/v1/jobs/held/complete", body)).error == "lock_lost"
    response = await browser.post("/jobs/held/do", **seen, reason="")
    assert response.status == 409
    assert "has changed since you read it" in text(response)
    goes = "It has 1 late result that was not adopted. It is deleted with the job."
    assert goes in text(await browser.get("/jobs/held/confirm?verb=delete"))
    instead = "It has 1 late result that was not adopted. Check whether it can be adopted instead."
    assert instead in text(await browser.get("/jobs/held/confirm?verb=retry"))
    assert "late result" not in text(await browser.get("/jobs/held/confirm?verb=run-now"))
    assert (await browser.confirm("held", "delete")).status == 303
    assert (await harness.worker.request("GET", "/v1/jobs/held")).error == "job_not_found"


async def test_deleting_a_completed_job_mentions_its_late_results(harness: DashboardHarness) -> None:
    lock = await harness.start_job()
    again = await harness.restart_job("held")
    for each in (lock, again):
        await harness.worker.request("POST", "/v1/jobs/held/complete", json.dumps({"lock_id": each, "file_path": "/x"}))
    assert await harness.status("held") == "completed"
    page = text(await (await harness.browser()).get("/jobs/held/confirm?verb=delete"))
    assert "Late results are deleted with it: 1." in page
    assert "adopted" not in page


async def test_a_late_result_is_shown_and_adopted(harness: DashboardHarness) -> None:
    locks = [await harness.start_job()]
    for _ in range(2):
        locks.append(await harness.restart_job("held"))
    late = []
    for number, lock in enumerate(locks[:2]):
        result = {"file_path": f"/late/{number}", **({"storage_key": "late/1"} if number else {})}
        body = json.dumps({"lock_id": lock, "metadata": {"n": NASTY}, **result})
        response = await harness.worker.request("POST", "/v1/jobs/held/complete", body)
        assert response.error == "lock_lost"
        late.append(response.json["details"]["late_result"])
    body = json.dumps({"lock_id": locks[1], "error_message": "disk on fire"})
    assert (await harness.worker.request("POST", "/v1/jobs/held/fail", body)).error == "lock_lost"
    browser, reader = await harness.browser(), await harness.browser(READ_ONLY_TOKEN)
    page = text(await browser.get("/jobs/held"))
    assert "late_call" in page
    assert "disk on fire" in page
    assert re.findall(r'id="late-(\d+)"', page) == [str(late[1]), str(late[0])], "newest grant first"
    assert "A worker holds the job" in page
    assert "verb=adopt" not in page
    assert "not possible for a job that is" in text(await browser.get("/jobs/held/confirm?verb=adopt"))
    await harness.call("jobs/held/cancel")
    page = text(await browser.get("/jobs/held"))
    assert re.findall(r"verb=adopt&amp;result=(\d+)", page) == [str(late[1]), str(late[0])]
    assert "/late/1" in page
    assert "<script>alert" not in page
    assert "late-" in text(await reader.get("/jobs/held"))
    assert "verb=adopt" not in text(await reader.get("/jobs/held"))
    assert "/artifact" not in text(await browser.get("/jobs/held")), "there is no artifact store"
    harness.admin.services.downloads = Downloads(FileArtifactStore("/nonexistent", "test"), 2)
    for each in (browser, reader):  # the other late result has no storage key
        page = text(await each.get("/jobs/held"))
        assert re.findall(r'href="(/jobs/held/artifact[^"]*)"', page) == [f"/jobs/held/artifact?late_result={late[1]}"]
    page = text(await browser.get(f"/jobs/held/confirm?verb=adopt&result={late[0]}"))
    assert re.findall(r'class="status (\w+)"', page) == ["cancelled", "completed"]
    assert "/late/0" in page
    assert "/late/1" not in page
    assert f"jobctl adopt held --result {late[0]}" in page
    assert (await browser.get("/jobs/held/confirm?verb=adopt&result=1")).status == 404
    assert (await browser.confirm("held", "adopt", "it is whole", f"&result={late[0]}")).redirect == "/jobs/held"
    page = text(await browser.get("/jobs/held"))
    assert "Adopt: done. cancelled → completed" in page
    assert "it is whole" in page
    assert "late results cannot be adopted" in page
    job = (await harness.worker.request("GET", "/v1/jobs/held")).data
    assert (job["status"], job["file_path"]) == ("completed", "/late/0")


@pytest.mark.slow
async def test_a_late_result_that_cannot_be_adopted_is_not_offered(harness: DashboardHarness) -> None:
    locks = [await harness.start_job(), await harness.restart_job("held")]
    late = []
    for lock, result in zip(locks, ({"download_url": "https://x.test/1"}, {"file_path": "/late"}), strict=True):
        if lock == locks[-1]:
            await harness.restart_job("held")
        response = await harness.worker.request(
            "POST", "/v1/jobs/held/complete", json.dumps({"lock_id": lock, **result})
        )
        late.append(response.json["details"]["late_result"])
    actor: Any = harness.admin.app.actor
    actor.policy = Policy(require_download_url=True)
    browser = await harness.browser()
    lacks = f"Late result {late[1]} cannot be adopted: it has no download_url"
    page = text(await browser.get("/jobs/held"))
    assert page.count("cannot be adopted") == page.count(lacks) == 1
    assert "or fail the job first, then adopt." in page
    await harness.call("jobs/held/cancel")
    page = text(await browser.get("/jobs/held"))
    assert re.findall(r"verb=adopt&amp;result=(\d+)", page) == [str(late[0])]
    assert lacks in page
    confirm = text(await browser.get(f"/jobs/held/confirm?verb=adopt&result={late[1]}"))
    assert (lacks in confirm, 'action="/job/do"' in confirm) == (True, False)
    actor.policy = Policy()
    assert lacks not in text(await browser.get("/jobs/held"))
    seen = await browser.confirm_fields("held", "adopt", f"&result={late[1]}")
    actor.policy = Policy(require_download_url=True)
    assert lacks in (await browser.post("/jobs/held/do", **seen)).page(400)
    assert (await browser.confirm("held", "adopt", more=f"&result={late[0]}")).status == 303
    assert lacks not in text(await browser.get("/jobs/held")), "the job is completed"


@pytest.mark.slow
@pytest.mark.parametrize("verb", sorted(JOB_ACTIONS))
async def test_the_curl_command_of_an_action_does_the_same(harness: DashboardHarness, verb: str) -> None:
    """Run the shown command as it is, with LOCK_ID replaced."""
    lock = await harness.start_job()
    if verb in ("run-now", "adopt", "delete", "retry"):
        await harness.restart_job("held")
        body = json.dumps({"lock_id": lock, "metadata": 1})
        await harness.worker.request("POST", "/v1/jobs/held/complete", body)
        await harness.call("jobs/held/cancel")
    if verb == "run-now":
        await harness.admin.request("POST", "/admin/job-management/force-reset", '{"jobId": "held"}', AUTH)
        later = json.dumps({"run_at": 4_000_000_000_000})
        await harness.admin.request("POST", "/admin/job-management/jobs/held/update", later, AUTH)
    browser = await harness.browser()
    page = text(await browser.get(f"/jobs/held/confirm?verb={verb}"))
    words = shlex.split(html.unescape(re.findall(r'<code id="curl">(.*?)</code>', page)[0]))
    assert words[:3] == ["curl", "-sS", "-X"]
    assert lock not in page
    sent = words[words.index("-d") + 1].replace("LOCK_ID", lock) if "-d" in words else None
    target = words[-1].removeprefix("http://localhost")
    response = await harness.admin.request(words[3], target, sent, AUTH)
    assert response.status == (201 if verb == "copy" else 200), response.json
    timeline = await harness.admin.request("GET", "/admin/job-management/jobs/held/timeline", headers=AUTH)
    if verb == "delete":
        assert timeline.status == 404
    elif verb != "copy":
        assert timeline.data["events"][-1]["by"] == "admin"


@pytest.mark.parametrize("verb", ["extend", "release"])
async def test_the_curl_command_of_a_lock_action_says_where_to_get_the_lock_id(
    harness: DashboardHarness, verb: str
) -> None:
    lock = await harness.start_job()
    page = text(await (await harness.browser()).get(f"/jobs/held/confirm?verb={verb}"))
    command = re.findall(r"Replace <code>LOCK_ID</code> with .*<code>(curl .*?)</code>", page)[0]
    response = await harness.admin.request(
        "GET", html.unescape(command).rpartition("http://localhost")[2], headers=AUTH
    )
    assert response.data["lock"]["lock_id"] == lock


async def test_a_job_is_run_now_and_a_finished_one_is_deleted(harness: DashboardHarness) -> None:
    await harness.call("jobs", id="late", delay_ms=3_600_000)
    browser = await harness.browser()
    assert (await browser.confirm("late", "run-now")).status == 303
    assert "verb=run-now" not in text(await browser.get("/jobs/late"))
    assert (await browser.confirm("late", "cancel")).status == 303
    assert (await browser.confirm("late", "delete")).redirect == "/jobs"
    assert "Job late was deleted" in text(await browser.get("/jobs"))
    assert (await browser.get("/jobs/late")).status == 404


async def assert_job_changed(browser: Browser, job_id: str, fields: dict[str, str]) -> None:
    response = await browser.post(f"/jobs/{job_id}/do", **fields)
    assert (response.status, "The job has changed since you read it" in text(response)) == (409, True)
    assert_safe(response)


@pytest.mark.parametrize("verb", ["force-fail", "cancel", "force-reset", "extend", "release"])
async def test_an_action_fails_if_another_worker_holds_the_job(harness: DashboardHarness, verb: str) -> None:
    await harness.start_job()
    browser = await harness.browser()
    fields = await browser.confirm_fields("held", verb)
    lock = await harness.restart_job("held")
    await assert_job_changed(browser, "held", fields)
    assert await harness.status("held") == "processing"
    done = await harness.worker.request("POST", "/v1/jobs/held/complete", json.dumps({"lock_id": lock, "metadata": 1}))
    assert done.status == 200, "the worker still holds the job"


async def test_an_action_that_the_status_does_not_allow_is_rejected(harness: DashboardHarness) -> None:
    await harness.start_job()
    browser = await harness.browser()
    csrf = await browser.csrf()
    await harness.call("jobs/held/cancel")
    seen = (await browser.confirm_fields("held", "delete"))["seen"]
    for verb in ("extend", "release", "force-fail"):
        response = await browser.post("/jobs/held/do", csrf=csrf, verb=verb, seen=seen)
        assert response.status in (400, 409), "the job has no lock"
        assert "Failed.</strong>" in text(response)
        assert "has changed since" not in text(response)
    assert (await browser.post("/jobs/nobody/do", csrf=csrf, verb="force-fail", seen=seen)).status == 404
    assert "not possible for a job that is" in text(await browser.get("/jobs/held/confirm?verb=force-fail"))
