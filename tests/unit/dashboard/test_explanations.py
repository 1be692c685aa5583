"""`why` of both APIs and the dashboard: the open problem of the job, and failures alike."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from jobd.model.problems import Cure, ProblemList, Subject
from jobd.model.times import utc
from tests.support.calls import PROBLEM
from tests.support.dashboard_harness import AUTH, DashboardHarness, fail_jobs, text

ADMIN = "/admin/job-management"


async def explain(harness: DashboardHarness, job_id: str) -> Any:
    """Return `why` of the admin API. The worker API has the same problem and advice."""
    asked = [(harness.admin, f"{ADMIN}/jobs/{job_id}/why"), (harness.worker, f"/v1/jobs/{job_id}/why")]
    one, other = [(await server.request("GET", path, headers=AUTH)).data for server, path in asked]
    assert all(one.get(name) == other.get(name) for name in ("state", "problem", "do"))
    return one


def open_problems(harness: DashboardHarness, *subjects: Subject) -> None:
    problem = replace(PROBLEM, cure=[*PROBLEM.cure, Cure("See why it waits", "jobctl why a")])
    found = ProblemList([replace(problem, id=f"p{number}", subject=each) for number, each in enumerate(subjects)])
    harness.admin.fakes.problems = harness.worker.fakes.problems = found


async def test_the_first_open_problem_of_the_job_is_shown(harness: DashboardHarness) -> None:
    await harness.call("jobs", id="a", queue="mail", kind="receipt")
    await harness.start_job("held")
    await harness.call("jobs", id="gone", queue="mail")
    await harness.call("jobs/gone/cancel")
    worker, pair = Subject(type="worker", worker="w-1"), Subject(type="pair", queue="mail", kind="receipt")
    open_problems(harness, Subject(type="disk"), worker, pair, Subject(type="queue", queue="mail"))
    shown_problem = (await explain(harness, "a"))["problem"]
    assert shown_problem["id"] == "p2"
    assert [each["command"] for each in shown_problem["cure"]] == ["jobctl run --queue mail -- CMD"], "no why again"
    assert (await explain(harness, "held"))["problem"]["id"] == "p1"
    assert "problem" not in await explain(harness, "gone")
    browser = await harness.browser()
    for page in ("/jobs/a", "/queues/mail"):
        shown = text(await browser.get(page))
        assert "<strong>962 jobs are due, and no worker takes them.</strong>" in shown
        assert "<li>Start a worker: jobctl run --queue mail -- CMD</li>" in shown
        assert "It has waited for " in shown
    view = (await harness.admin.request("GET", f"{ADMIN}/queues/mail/why", headers=AUTH)).data
    [kind] = view["kinds"]
    assert (kind["job_id"], kind["why"]["problem"]["id"]) == ("a", "p2")
    assert "p2" not in (others := [each["id"] for each in view["problems"]])
    assert "p3" in others


async def test_failures_alike_are_counted_with_the_command_for_all(harness: DashboardHarness) -> None:
    harness.worker.services.failures = harness.admin.services.failures
    await fail_jobs(harness, "f1")
    alone = await explain(harness, "f1")
    assert "same error" not in alone["because"]
    await fail_jobs(harness, "f2")
    [group] = harness.admin.services.failures.view(9).groups
    view = await explain(harness, "f1")
    assert view["because"] == f"1 other job failed with the same error since {utc(group.first_at)}. {alone['because']}"
    retry = f"Fix the cause, then run all 2 again: jobctl retry --where error={group.fingerprint}"
    assert view["do"] == [retry, *alone["do"]]
    await fail_jobs(harness, "f3")
    assert "2 other jobs failed with the same error since " in (await explain(harness, "f1"))["because"]
