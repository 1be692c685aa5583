"""jobctl for operators: actions on jobs, plans, queues, maintenance and the audit log."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import pytest
from msgspec.structs import replace

from jobd.cli.ctl import plan_commands as ctl_plan
from jobd.client import InvalidRequest, JobdError, JobView
from jobd.model import responses
from jobd.model.commands import About
from jobd.model.problems import ProblemList
from tests.support.cli_harness import (
    JOB_FIELDS,
    READ_ONLY_TOKEN,
    TOKEN,
    CliDaemon,
    Jobctl,
    fields_of,
    on_a_terminal,
    plan_in,
)
from tests.support.polling import poll_until


@pytest.mark.parametrize("has_token", [True, False])
def test_a_dry_run_changes_nothing_and_yes_does_it(
    has_token: bool, jobctl: Jobctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = f"c1-{has_token}"
    if not has_token:
        monkeypatch.delenv("ADMIN_TOKEN")
    jobctl.ok("submit", "--id", job_id)
    assert "would cancel" in jobctl.ok("cancel", job_id, "--dry-run")
    assert jobctl.json("job", job_id)["status"] == "queued"
    assert jobctl.ok("cancel", job_id, "--yes") == f"{job_id}: cancelled\n"
    assert jobctl.rejected("cancel", job_id, "--yes")[0] == 4
    assert jobctl.rejected("cancel", job_id, "--dry-run")[0] == 4


def test_a_copy_takes_another_payload(jobctl: Jobctl) -> None:
    jobctl.ok("submit", "--id", "cp", '{"n": 1}')
    assert jobctl.json("job", jobctl.ok("copy", "cp", '{"n": 2}').strip())["payload"] == {"n": 2}
    jobctl.says(2, "PAYLOAD is not valid JSON", "copy", "cp", "eight")


def test_errors_of_some_jobs_are_named_and_the_others_are_done(jobctl: Jobctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADMIN_TOKEN")  # the worker API knows no plans
    jobctl.ok("submit", "--id", "c2")
    jobctl.ok("submit", "--id", "c3")
    out = jobctl.says(4, "no-such-job: ", "cancel", "c2", "no-such-job", "c3", "--yes")
    assert out == "c2: cancelled\nc3: cancelled\n"


def test_cancel_with_an_admin_token_is_audited_and_without_one_uses_the_worker_api(
    jobctl: Jobctl, running: CliDaemon, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    socket_ = running.client_environ["JOBD_SOCKET"]
    (tmp_path / "token").write_text(TOKEN)
    running.client.create_jobs([{"id": f"cw{n}", "queue": "cw"} for n in range(4)])
    jobctl.ok("cancel", "cw0", "-y", "--reason", "not wanted", "--operator", "eve@desk")
    jobctl.ok("cancel", "cw1", "-y", "--reason", "not wanted", "--operator", "eve@desk", "--socket", socket_)
    monkeypatch.delenv("ADMIN_TOKEN")
    jobctl.ok("cancel", "cw2", "-y", "--operator", "eve@desk")
    jobctl.ok("cancel", "cw3", "-y", "--operator", "eve@desk", "--token-file", str(tmp_path / "token"))
    by = [running.client.timeline(f"cw{n}")[-1].by for n in range(4)]
    assert (by[0], by[3]) == ("admin:eve@desk", "admin:eve@desk")
    assert all(each.startswith(f"client:eve@desk (uid {os.getuid()}, pid ") for each in by[1:3])
    monkeypatch.setenv("ADMIN_TOKEN", TOKEN)
    audit_entries = [jobctl.json("audit", "--job", f"cw{n}")["entries"] for n in range(4)]
    assert [len(entries) for entries in audit_entries] == [1, 0, 0, 1]
    assert [audit_entries[0][0][name] for name in ("who", "action", "reason")] == ["eve@desk", "cancel", "not wanted"]


def test_cancelling_several_jobs_makes_a_plan(jobctl: Jobctl, running: CliDaemon) -> None:
    running.client.create_jobs([{"id": f"cp{n}", "queue": "cp"} for n in range(3)])
    code, out, err = jobctl.run("cancel", "cp0", "cp1", "--dry-run", "--reason", "too many")
    plan_id = plan_in(err)
    assert (code, out.count("queued → cancelled")) == (0, 2)
    running.client.start_processing("cp0", "w-cp")  # the job has changed since it was read
    assert (
        jobctl.says(4, "cp0: changed since the plan: queued → processing", "apply", plan_id, "-y")
        == "cancel: 1 job done\n"
    )
    assert jobctl.ok("force-reset", "--where", "worker=w-cp", "--dry-run").count("processing → queued") == 1
    assert (
        jobctl.says(4, "There is no such job.", "cancel", "cp0", "cp2", "no-such-job", "-y") == "cancel: 2 jobs done\n"
    )
    audit_entries = jobctl.json("audit", "--since", "1h", "--limit", "2")["entries"]
    assert [(each["action"], each["reason"], each["changed"]) for each in audit_entries] == [
        ("plan-cancel", None, 2),
        ("plan-cancel", "too many", 1),
    ]


def test_an_operator_changes_a_job_from_status_to_status(jobctl: Jobctl, running: CliDaemon) -> None:
    jobctl.ok("submit", "--id", "c4", "--queue", "c4", "--delay", "1h")
    assert set(jobctl.json("run-now", "c4")) == JOB_FIELDS
    grant = running.client.claim("w", queues=["c4"])[0]
    assert "held by w" in jobctl.ok("force-fail", "c4", "--dry-run")
    forced = jobctl.json("force-fail", "c4", "--yes", "--reason", "hung")
    assert set(forced) == fields_of(responses.TransitionView)
    assert (forced["previousStatus"], forced["reason"]) == ("processing", "hung")
    with pytest.raises(JobdError, match="lock_lost"):
        running.client.complete_job("c4", lock_id=grant.lock_id)
    assert jobctl.ok("force-reset", "c4", "-y") == "c4: failed → queued\n"
    assert jobctl.json("update", "c4", "--priority", "7", "--max-attempts", "2", "--reason", "late")["priority"] == 7
    assert jobctl.json("audit", "--action", "update")["entries"][0]["reason"] == "late"
    set_ = ["--set", "file_path=/srv/out", "--set", 'metadata={"a": [1]}']
    assert jobctl.rejected("transition", "c4", "failed", "completed", "-y")[0] == 4
    expected = (
        'c4: would transition queued → completed and set file_path "/srv/out", metadata {"a":[1]}: it is queued\n'
    )
    assert jobctl.ok("transition", "c4", "queued", "completed", "--dry-run", *set_) == expected
    rejected = "c4: transition queued → processing would be rejected: Job c4 is queued. Only start"
    assert rejected in jobctl.rejected("transition", "c4", "queued", "processing", "--dry-run")[1]
    for wrong, why in (("foo=1", "foo"), ("priority=99999", "priority"), ("storage_key=/etc", "must be relative")):
        for how in ("--dry-run", "-y"):
            jobctl.rejects(2, why, "transition", "c4", "queued", "completed", how, "--set", wrong)
    jobctl.ok("transition", "c4", "queued", "completed", "-y", *set_)
    job = jobctl.json("job", "c4")
    assert (job["status"], job["file_path"], job["metadata"]) == ("completed", "/srv/out", {"a": [1]})
    assert jobctl.ok("delete", "c4", "--dry-run").startswith("c4: would delete")
    assert jobctl.ok("delete", "c4", "-y") == "c4: deleted\n"
    assert jobctl.rejected("job", "c4")[0] == 4


def test_jobs_are_found_by_text_and_by_time(jobctl: Jobctl) -> None:
    jobctl.ok("submit", "--id", "se1", "--queue", "se", '{"file": "Holiday.mov"}')
    jobctl.ok("submit", "--id", "se2", "--queue", "se", '{"file": "other.mov"}')
    assert jobctl.ok("jobs", "-q", "--text", "holiday", "--queue", "se") == "se1\n"
    assert jobctl.ok("jobs", "-q", "--since", "1h", "--queue", "se") == "se2\nse1\n"
    assert jobctl.ok("jobs", "-q", "--until", "1h", "--queue", "se") == ""
    assert jobctl.ok("jobs", "-q", "--text", "se2", "--since", "1h", "--all") == "se2\n"
    jobctl.ok("cancel", "se1", "--yes")
    assert jobctl.ok("jobs", "-q", "--finished-since", "1h", "--queue", "se") == "se1\n"
    assert jobctl.ok("jobs", "-q", "--finished-until", "1h", "--queue", "se") == ""
    where = ["--where", "queue=se", "--where", "finished_since=1h"]
    assert jobctl.json("retry", *where, "--dry-run")["jobs"] == [
        {"id": "se1", "from": "cancelled", "to": "queued", "late_results": 0}
    ]
    assert jobctl.json("retry", *where, "--where", "finished_until=1h", "--dry-run")["jobs"] == []


def test_the_latest_failures_can_be_retried_alone(jobctl: Jobctl, tmp_path: Path) -> None:
    old = {"id": "la-old", "queue": "la", "status": "failed", "error_message": "la", "finished_at": 1_750_000_000_000}
    (tmp_path / "old").write_text(json.dumps(old))
    jobctl.ok("import", str(tmp_path / "old"))
    jobctl.ok("submit", "--id", "la-new", "--queue", "la")
    jobctl.ok("force-fail", "la-new", "-y", "--reason", "la")
    _, _, hint = jobctl.run("failures")
    plan = jobctl.ok("retry", "--where", "queue=la", "--dry-run")
    (latest,) = re.findall("Only the latest: add --where (finished_since=)'(.*)'", plan)
    (job,) = jobctl.json("retry", "--where", "queue=la", "--where", "".join(latest), "--dry-run")["jobs"]
    assert job["id"] == "la-new"
    assert "Retry, one job first: jobctl retry --where error=" in hint
    code, err = jobctl.rejected("retry", "--where", "queue=la", "-y")
    pattern = (
        r"jobctl: The jobs ended hours apart: 1 since (.*), 1 until 2025-06-15 15:06:40 UTC\. --yes needs the time: "
    )
    assert code == 4
    assert re.match(pattern, err)
    assert (
        f"finished_since='{latest[1]}' for the latest, --where finished_since='2025-06-15 15:06:40 UTC' for all" in err
    )
    where = ["--where", "queue=la", "--where", "finished_since=2025-06-15 15:06:40 UTC"]
    assert jobctl.ok("retry", *where, "-y") == "retry: 2 jobs done\n"


def test_a_plan_of_many_jobs_is_shown_and_applied(jobctl: Jobctl) -> None:
    for n in range(3):
        jobctl.ok("submit", "--id", f"pl{n}", "--queue", "pl")
    jobctl.ok("submit", "--id", "pl-other", "--queue", "pl-other")
    where = ["--where", "queue=pl", "--where", "since=1h"]
    out = jobctl.ok("force-fail", *where, "--dry-run")
    assert re.fullmatch(r"force-fail: 3 jobs \(plan [0-9a-f]{16}\)", out.splitlines()[0])
    assert "pl2  queued → failed" in out
    assert jobctl.json("job", "pl0")["status"] == "queued"
    assert jobctl.ok("force-fail", *where, "--yes", "--reason", "wrong input") == "force-fail: 3 jobs done\n"
    assert jobctl.json("job", "pl0")["error_message"] == "wrong input"
    assert jobctl.json("job", "pl-other")["status"] == "queued"
    plan = jobctl.json("retry", "--where", "text=PL1", "--where", "status=failed", "--dry-run")
    assert set(plan) == fields_of(responses.PlanView)
    assert plan["jobs"] == [{"id": "pl1", "from": "failed", "to": "queued", "late_results": 0}]
    result = jobctl.json("retry", "pl1", "pl2", "--yes")
    assert set(result) == fields_of(responses.PlanResult)
    assert (result["applied"], result["changed_meanwhile"]) == (2, [])
    skipped = "2 jobs skipped: Only failed and cancelled jobs can be retried. There is no such job.\n"
    assert jobctl.run("retry", "pl0", "pl1", "none", "-y") == (4, "retry: 1 job done\n", skipped)
    assert jobctl.run("retry", "none", "-y") == (4, "", "No job can be changed: 1 job skipped: There is no such job.\n")
    assert jobctl.run("retry", "--where", "queue=nothing", "-y") == (0, "", "No jobs match.\n")
    assert jobctl.ok("cancel", *where, "-y") == "cancel: 3 jobs done\n"
    assert jobctl.ok("delete", *where, "-y") == "delete: 3 jobs done\n"
    actions = [each["action"] for each in jobctl.json("audit", "--since", "1h", "--limit", "5")["entries"]]
    assert actions == ["plan-delete", "plan-cancel", "plan-retry", "plan-retry", "plan-force-fail"]
    by_job = [each["action"] for each in jobctl.json("audit", "--job", "pl1")["entries"]]
    assert by_job == ["plan-delete", "plan-cancel", "plan-retry", "plan-force-fail"]


def test_apply_does_what_the_plan_showed(jobctl: Jobctl, running: CliDaemon) -> None:
    for n in range(3):
        jobctl.ok("submit", "--id", f"ap{n}", "--queue", "ap")
    code, out, err = jobctl.run("cancel", "--where", "queue=ap", "--dry-run")
    plan_id = plan_in(err)
    assert (code, out.count("queued → cancelled")) == (0, 3)
    assert plan_id in out.splitlines()[0]
    jobctl.ok("submit", "--id", "ap3", "--queue", "ap")
    jobctl.ok("update", "ap1", "--priority", "3")
    assert jobctl.ok("apply", plan_id, "--dry-run").count("queued → cancelled") == 3
    changed = "ap1: changed since the plan: queued → queued. It has changed since the plan was made.\n"
    assert jobctl.run("apply", plan_id, "--yes") == (4, "cancel: 2 jobs done\n", changed)
    assert [running.client.get_job(f"ap{n}").status for n in range(4)] == ["cancelled", "queued", "cancelled", "queued"]
    again = json.loads(jobctl.says(4, "was applied", "apply", plan_id, "-y", "--json"))
    assert (again["applied"], again["repeated"]) == (2, True)
    assert jobctl.json("apply", plan_id, "--dry-run")["result"]["applied"] == 2
    assert jobctl.run("apply", plan_id, "--dry-run")[:2] == (0, "")
    assert jobctl.run("apply", plan_id, "--yes")[:2] == (4, "cancel: 2 jobs done before, none now\n")
    for how in ((), ("-y",)):
        jobctl.rejects(4, "There is no plan none", "apply", "none", *how)
    assert jobctl.rejected("apply", plan_id)[0] == 2


@pytest.mark.slow
def test_more_jobs_than_one_plan_holds_are_done_at_once(
    jobctl: Jobctl, running: CliDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(0, 10_002, 834):
        running.client.create_jobs([{"id": f"big{m}", "queue": "big"} for m in range(n, min(n + 834, 10_002))])
    out = jobctl.ok("cancel", "--where", "queue=big", "--dry-run")
    assert out.splitlines()[0] == "cancel: 10002 jobs (2 plans)"
    assert jobctl.ok("cancel", "--where", "queue=big", "-y") == "cancel: 10002 jobs done\n"
    monkeypatch.setattr(ctl_plan, "_MAX_PLANS", 1)
    _, out, err = jobctl.run("delete", "--where", "queue=big", "--dry-run")
    assert "10000 jobs" in out.splitlines()[0]
    assert "and more after these" in out.splitlines()[0]
    assert "There are more" in err
    assert jobctl.ok("delete", "--where", "queue=big", "-y") == "delete: 10000 jobs done\ndelete: 2 jobs done\n"


def test_a_retry_begins_with_a_trial_and_goes_on_at_a_rate(running: CliDaemon, jobctl: Jobctl) -> None:
    ids = [f"trial-{number}" for number in range(3)]
    running.client.create_jobs([{"id": job_id, "queue": "trial"} for job_id in ids])
    jobctl.ok("force-fail", *ids, "-y")
    code, out, err = jobctl.run("retry", *ids, "--trial", "--rate", "60/m", "--dry-run")
    assert (code, "3 since " in out, "--trial --rate 60/m" in err) == (0, True, True)

    def work() -> None:
        for _ in ids[:2]:
            [grant] = running.client.claim("w", queues=["trial"], wait_ms=30_000)
            running.client.complete_job(grant.job.id, lock_id=grant.lock_id)

    with ThreadPoolExecutor() as pool:
        working = pool.submit(work)
        code, out, err = jobctl.run("retry", *ids, "--trial", "--rate", "60/m", "-y")
        working.result()
    assert (code, "retry: 3 jobs done" in out, "the last is due at " in out) == (0, True, True), out + err
    [entry] = jobctl.json("audit", "--action", "plan-retry", "--limit", "1")["entries"]
    plan_id = entry["details"]["plan_id"]
    assert entry["details"]["trial"] == {"job_id": "trial-0", "state": "completed"}
    assert "Since then: 2 completed, 0 failed again, 1 wait." in jobctl.run("apply", plan_id, "--dry-run")[2]
    jobctl.ok("force-fail", "trial-2", "-y")

    def fail() -> None:
        [grant] = running.client.claim("w", queues=["trial"], wait_ms=30_000)
        running.client.fail_job(grant.job.id, lock_id=grant.lock_id, error_message="again")

    running.client.create_job(id="trial-3", queue="trial")
    jobctl.ok("force-fail", "trial-3", "-y")
    with ThreadPoolExecutor() as pool:
        failing = pool.submit(fail)
        code, _, err = jobctl.run("retry", "trial-2", "trial-3", "--trial", "-y")
        failing.result()
    assert (code, "The trial trial-2 did not complete, so the rest (1 job) stays as it was." in err) == (4, True)
    assert running.client.get_job("trial-3").status == "failed"


def test_every_action_takes_a_reason(jobctl: Jobctl) -> None:
    jobctl.ok("submit", "--id", "re1", "--delay", "1h")
    jobctl.ok("run-now", "re1", "--reason", "why 1")
    assert jobctl.json("timeline", "re1")["events"][-1]["reason"] == "why 1"
    commands = ("cancel re1 -y", "delete re1 -y", "pause re", "resume re", "cleanup", "clock accept")
    for number, command in enumerate(commands, 2):
        jobctl.ok(*command.split(), "--reason", f"why {number}")
    found = jobctl.json("audit", "--since", "1h", "--limit", "7")["entries"]
    assert [(each["action"], each["reason"]) for each in found[::-1]] == [
        ("run-now", "why 1"), ("cancel", "why 2"), ("delete", "why 3"), ("pause", "why 4"), ("resume", "why 5"),
        ("cleanup", "why 6"), ("accept-clock", "why 7"),
    ]  # fmt: skip
    events = [json.loads(line) for line in jobctl.ok("events", "--last", "100", "--json").splitlines()]
    assert [each["reason"] for each in events if each["type"] in ("deleted", "queue_paused", "queue_resumed")][-3:] == [
        "why 3", "why 4", "why 5",
    ]  # fmt: skip


def test_workers_are_quieted_by_name_and_by_rule(running: CliDaemon, jobctl: Jobctl) -> None:
    about = About(instance="i", host="k8s-b", version="2.4.1")
    running.client.claim("quiet-1", queues=["quiet"], about=about)
    later = "(with its next claim; not told yet, see jobctl workers)\n"
    assert jobctl.ok("quiet", "quiet-1", "--reason", "bad") == f"quiet-1 takes no new jobs {later}"
    assert "idle, quiet pending " in jobctl.ok("workers")
    running.client.claim("quiet-1", queues=["quiet"], limit=0, about=about)
    assert "idle, quiet " in jobctl.ok("workers")
    assert jobctl.ok("resume-worker", "quiet-1") == f"quiet-1 takes jobs again {later}"
    assert "idle, quiet, resume pending" in jobctl.ok("workers")
    assert jobctl.json("stop", "quiet-1", "--reason", "bad")["action"] == "stop"
    running.client.goodbye("quiet-1", instance="i")
    code, err = jobctl.rejected("stop", "quiet-1")
    assert (code, "Worker quiet-1 is gone" in err, "[worker_gone]" in err) == (4, True, True)
    running.client.claim("quiet-1", queues=["quiet"], about=about)
    rule = ("--version", "2.4.1", "--host", "k8s-b")
    assert "host k8s-b, version 2.4.1 (1 worker now)" in jobctl.ok("quiet", *rule, "--reason", "bad", "--until", "2h")
    [view] = jobctl.json("quiet")["rules"]
    assert (view["reason"], view["until"] - view["at"]) == ("bad", pytest.approx(7_200_000, abs=5_000))
    assert view["id"] in jobctl.ok("quiet")
    assert jobctl.json("resume-worker", "--rule", view["id"])["id"] == view["id"]
    assert "No quiet rules." in jobctl.run("quiet")[2]
    rows = [re.split("  +", line)[3:5] for line in jobctl.ok("audit", "--limit", "6").splitlines()[1:]]
    assert rows == [
        ["resume", f"rule {view['id']}"],
        ["quiet", "host k8s-b, version 2.4.1"],
        ["stop", "worker quiet-1"],
        ["stop", "worker quiet-1"],
        ["resume", "worker quiet-1"],
        ["quiet", "worker quiet-1"],
    ]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["quiet", "w", "--host", "h"], "either the name of a worker, or --host"),
        (["quiet", "--until", "2h"], "give the name of a worker, or --host"),
        (["quiet", "--host", "h"], "a rule needs a --reason"),
        (["resume-worker"], "either the name of a worker or --rule"),
        (["retry", "-y"], "either job IDs or --where"),
        (["retry", "a", "--rate", "fast"], "must be a number from 1 to 1000000"),
        (["apply", "p", "q", "--trial"], "--trial is for one plan"),
        (["apply", "-y"], "PLAN_ID"),
        (["force-reset", "a", "b"], "--dry-run"),
        (["cancel", "a", "--where", "queue=q", "-y"], "either job IDs or --where"),
        (["retry", "--where", "colour=red", "-y"], "NAME one of status"),
        (["retry", "--where", "queue=a", "--where", "queue=b", "-y"], "given twice"),
        (["retry", "--where", "since=once", "-y"], "an age such as 2h"),
        (["delete", "--where", "queue=q"], "--dry-run"),
    ],
)
def test_an_invalid_selection_is_a_usage_error(argv: list[str], expected: str, jobctl: Jobctl) -> None:
    jobctl.rejects(2, expected, *argv)


def test_jobs_that_wait_for_a_retry_are_grouped_and_can_be_run_now(running: CliDaemon, jobctl: Jobctl) -> None:
    for n in range(2):
        jobctl.ok("submit", "--id", f"ag{n}", "--queue", "ag", "--max-attempts", "3")
        grant = running.client.start_processing(f"ag{n}", "w")
        running.client.fail_job(
            f"ag{n}", lock_id=grant.lock_id, error_message=f"no road to {n}", retry_after_ms=600_000
        )
    found = [each for each in jobctl.json("failures")["groups"] if each["message"] == "no road to 1"]
    assert (found[0]["count"], found[0]["retrying"]) == (0, 2)
    name = found[0]["fingerprint"]
    assert any(line.split()[:4] == ["0", "0", "2", name] for line in jobctl.ok("failures").splitlines())
    waiting = jobctl.ok("jobs", "-q", "--status", "queued", "--error", name, "--all").split()
    assert waiting == ["ag1", "ag0"]
    for job_id in waiting:
        jobctl.ok("run-now", job_id)
    assert {grant.job.id for grant in running.client.claim("w", queues=["ag"], limit=2)} == {"ag0", "ag1"}
    assert name not in jobctl.ok("failures", "--json")


def test_jobs_with_the_same_error_form_one_group(jobctl: Jobctl) -> None:
    for n in range(3):
        jobctl.ok("submit", "--id", f"fa{n}", "--queue", "fa")
        jobctl.ok("force-fail", f"fa{n}", "-y", "--reason", f"no picture after {n} s")
    found = [each for each in jobctl.json("failures")["groups"] if each["message"] == "no picture after 2 s"]
    assert set(found[0]) == fields_of(responses.FailureGroup)
    assert (found[0]["count"], found[0]["queues"], found[0]["error_code"]) == (3, ["fa"], "force_failed")
    name = found[0]["fingerprint"]
    assert found[0]["retrying"] == 0
    assert "RETRYING" in jobctl.ok("failures")
    assert name in jobctl.ok("failures")
    assert jobctl.ok("jobs", "-q", "--error", name) == "fa2\nfa1\nfa0\n"
    assert jobctl.ok("retry", "--where", f"error={name}", "-y") == "retry: 3 jobs done\n"
    assert name not in jobctl.ok("failures", "--json")
    assert jobctl.rejected("jobs", "--error", "nonsense")[0] == 4


def test_a_dry_run_of_maintenance_shows_its_effect(jobctl: Jobctl) -> None:
    assert set(jobctl.json("cleanup", "--dry-run")) == fields_of(responses.PreviewView) | {"plan_id"}
    assert "finished jobs to delete" in jobctl.ok("cleanup", "--dry-run")
    assert jobctl.json("recover-stuck", "--dry-run") == {"recover": [], "more": False, "plan_id": None}
    assert jobctl.run("recover-stuck", "--dry-run") == (0, "0 would be recovered\n", "")


def _stalled(running: CliDaemon, *ids: str, worker: str = "w-silent") -> list[str]:
    """Create stalled jobs that are not recovered, and return their lock ids."""
    locks = []
    for job_id in ids:
        running.client.create_job(id=job_id, queue="time", stall_after_ms=0)
        locks.append(running.client.start_processing(job_id, worker, lock_ttl_ms=1_000).lock_id)
    time.sleep(1.1)
    return locks


def _expiring(write: Callable[..., JobView]) -> JobView:
    """Call `write` with an `expires_at` that passes soon, again if it has passed before the daemon received it."""
    while True:
        with suppress(InvalidRequest):
            return write(expires_at=round(time.time() * 1000) + 500)


_NEVER: Final = '[cleanup]\nrecover_every = "0s"\n'


def test_the_plan_of_a_recovery_can_be_applied(running: CliDaemon, jobctl: Jobctl) -> None:
    with running.configured(_NEVER):
        _, lock_id = _stalled(running, "time-1", "time-2")
        code, out, err = jobctl.run("recover-stuck", "--dry-run", "--reason", "they are dead")
        assert (code, out.splitlines()[0]) == (0, "2 would be recovered")
        assert re.match(r"To apply exactly this, until [^:]+:\d\d:\d\d UTC.*: jobctl apply ", err), err
        plan_id = plan_in(err)
        running.client.update_progress("time-2", lock_id=lock_id, progress=40)
        shown = jobctl.ok("apply", plan_id, "--dry-run")
        assert "recover-stuck: 2 jobs" in shown
        assert shown.count("processing → queued") == 2
        assert (
            jobctl.says(4, "time-2: changed since the plan: processing → processing.", "apply", plan_id, "-y")
            == "recover-stuck: 1 job done\n"
        )
        assert [running.client.get_job(each).status for each in ("time-1", "time-2")] == ["queued", "processing"]
        [entry] = jobctl.json("audit", "--action", "plan-recover-stuck", "--limit", "1")["entries"]
        assert (entry["reason"], entry["changed"]) == ("they are dead", 1)
        assert jobctl.run("apply", plan_id, "-y")[0] == 4, "the same answer again"
        jobctl.ok("cancel", "time-1", "time-2", "-y")


@pytest.mark.slow
def test_take_back_ends_the_grants_of_a_silent_worker(running: CliDaemon, jobctl: Jobctl) -> None:
    with running.configured(_NEVER):
        _stalled(running, "back-3", worker="w ä/silent")
        assert "took back 1 job of w ä/silent" in jobctl.ok("take-back", "w ä/silent", "--yes")
        _stalled(running, "back-1", "back-2")
        assert jobctl.json("workers", "--state", "silent")["workers"][0]["worker"] == "w-silent"
        assert "w-silent (silent)" in jobctl.ok("locks")
        assert "Take back its jobs with expired locks: jobctl take-back w-silent" in jobctl.ok("why", "back-1")
        jobctl.says(2, "--dry-run to preview the effect", "take-back", "w-silent")
        seen = jobctl.ok("take-back", "w-silent", "--dry-run")
        assert "back-1: would be requeued: No update from worker w-silent" in seen
        assert "would take back 2 jobs of w-silent: 2 requeued, 0 failed" in seen
        assert running.client.get_job("back-1").status == "processing"
        done = jobctl.ok("take-back", "w-silent", "--yes", "--reason", "lost its power")
        assert "took back 2 jobs of w-silent: 2 requeued, 0 failed" in done
        assert [running.client.get_job(each).status for each in ("back-1", "back-2")] == ["queued", "queued"]
        jobctl.says(4, "[worker_not_silent]", "take-back", "w-silent", "-y")
        jobctl.says(4, "[worker_not_found]", "take-back", "w-unknown", "-y")
        [entry] = jobctl.json("audit", "--action", "take-back", "--limit", "3")["entries"][2:]
        assert (entry["reason"], entry["changed"], entry["details"]) == ("lost its power", 2, {"worker": "w-silent"})
        jobctl.rejects(4, "[worker_not_found]", "take-back", "w-unknown")
    jobctl.ok("cancel", "back-1", "back-2", "back-3", "-y")


@pytest.mark.slow
def test_the_plan_of_a_cleanup_run_can_be_applied_except_for_its_fixes(running: CliDaemon, jobctl: Jobctl) -> None:
    with running.configured(_NEVER):
        _expiring(partial(running.client.create_job, id="time-late", queue="time-late"))
        grant = running.client.start_processing(running.client.create_job(queue="time-old").id, "w")
        old = _expiring(partial(running.client.complete_job, grant.job.id, lock_id=grant.lock_id, file_path="/f")).id
        _stalled(running, "time-3")
        jobctl.says(0, "To apply exactly this, except for the fixes, until ", "cleanup", "--dry-run")
        plan_id = jobctl.json("cleanup", "--dry-run")["plan_id"]
        _, shown, prompt = on_a_terminal(running, b"n\n", "apply", plan_id)
        for line in ("time-3 +processing → queued", "time-late +queued → failed", f"{old} +completed → deleted"):
            assert re.search(line, shown), shown
        assert "Their history and artifacts are deleted" in shown
        assert "clean up 3 jobs?" in prompt
        assert jobctl.ok("apply", plan_id, "-y") == "cleanup: 3 jobs done\n"
        assert jobctl.rejected("job", old)[0] == 4
        assert jobctl.json("cleanup", "--dry-run")["plan_id"] is None
    jobctl.ok("cancel", "time-3", "-y")


def test_a_read_only_token_gets_no_plan_of_maintenance(
    running: CliDaemon, jobctl: Jobctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running.configured(_NEVER):
        _stalled(running, "time-4")
        monkeypatch.setenv("ADMIN_TOKEN", READ_ONLY_TOKEN)
        for verb in ("recover-stuck", "cleanup"):
            code, out, err = jobctl.run(verb, "--dry-run")
            assert (code, err, out.splitlines()[0]) == (0, "", "1 would be recovered")
            assert jobctl.json(verb, "--dry-run")["plan_id"] is None
    monkeypatch.setenv("ADMIN_TOKEN", TOKEN)
    jobctl.ok("cancel", "time-4", "-y")


def test_a_maintenance_plan_that_is_not_complete_says_so(jobctl: Jobctl, capsys: pytest.CaptureFixture[str]) -> None:
    view = msgspec.convert(jobctl.json("retry", "--where", "queue=none", "--dry-run"), responses.PlanView)
    ctl_plan.show_apply_command(replace(view, action="recover-stuck", more=True))
    assert "repeat --dry-run for the next one" in capsys.readouterr().err


def test_actions_are_in_the_audit_log(jobctl: Jobctl, monkeypatch: pytest.MonkeyPatch) -> None:
    jobctl.ok("submit", "--id", "au1")
    jobctl.ok("force-fail", "au1", "-y", "--reason", "wrong input", "--operator", "eve@desk")
    monkeypatch.setenv("SUDO_USER", "bob")
    assert jobctl.rejected("force-fail", "au1", "-y")[0] == 4
    jobctl.ok("pause", "au-q")
    jobctl.ok("resume", "au-q")
    found = jobctl.json("audit", "--job", "au1")["entries"]
    assert set(found[0]) == fields_of(responses.AuditView)
    host = socket.gethostname()
    assert [(each["who"], each["action"], each["outcome"], each["changed"]) for each in found] == [
        (f"bob@{host}", "force-fail", "invalid_transition", 0),
        ("eve@desk", "force-fail", "done", 1),
    ]
    assert found[1]["reason"] == "wrong input"
    assert found[1]["address"] == f"unix uid={os.getuid()}"
    assert (found[1]["details"]["from"], found[1]["details"]["to"]) == ("queued", "failed")
    event = jobctl.json("timeline", "au1")["events"][-1]
    assert (event["by"], event["seq"]) == ("admin:eve@desk", found[1]["details"]["event"])
    lines = jobctl.ok("audit", "--who", "eve@desk", "--since", "1h", "--limit", "1").splitlines()
    assert lines[0].split() == ["TIME", "OPERATOR", "FROM", "ACTION", "TARGET", "OUTCOME", "REASON"]
    assert "queued → failed" in lines[1]
    queued = jobctl.json("audit", "--who", f"bob@{host}", "--action", "pause")["entries"]
    assert [(each["queue"], each["job_id"]) for each in queued] == [("au-q", None)]
    none = jobctl.json("audit", "--since", "2020-01-01T00:00", "--action", "nothing")
    assert none == {"entries": [], "next_cursor": None}
    assert len(jobctl.json("audit", "--limit", "2")["entries"]) == 2


def test_a_queue_is_paused_and_resumed(jobctl: Jobctl) -> None:
    jobctl.ok("submit", "--queue", "c5")
    assert "jobctl resume c-5" in jobctl.run("pause", "c-5")[2], "a slip of the finger"
    jobctl.ok("resume", "c-5")
    paused = jobctl.json("pause", "c5", "--reason", "deploy", "--until", "2h")
    listed = {queue["name"]: queue for queue in jobctl.json("queues")["queues"]}
    assert {name: listed["c5"][name] for name in paused if name != "queue"} == {
        "paused": True,
        "paused_at": paused["paused_at"],
        "paused_by": paused["paused_by"],
        "pause_reason": "deploy",
        "paused_until": paused["paused_until"],
    }
    assert paused["paused_by"].startswith("admin")
    assert 7_190_000 < paused["paused_until"] - paused["paused_at"] <= 7_200_000
    assert "by operator" in jobctl.ok("queues")
    assert "UTC: deploy" in jobctl.ok("queues")
    assert set(listed["c5"]) == fields_of(responses.QueueView)
    assert jobctl.ok("resume", "c5") == "c5 is open\n"


def test_resume_of_an_unknown_queue_says_so(jobctl: Jobctl) -> None:
    """Its name may be mistyped."""
    assert jobctl.says(0, "Queue c-typo has no jobs and was not paused", "resume", "c-typo") == "c-typo is open\n"
    for prepare in (["pause", "c-typo"], ["submit", "--queue", "c-typo"]):
        jobctl.ok(*prepare)
        assert jobctl.run("resume", "c-typo") == (0, "c-typo is open\n", "")


def test_disk_shows_the_files_and_what_each_kind_takes(jobctl: Jobctl, running: CliDaemon) -> None:
    large = {"queue": "stored", "kind": "large", "payload": "x" * 9_000}
    running.client.create_jobs([large] * 100)  # so many that a sample has some of them, whatever was deleted before
    stored = re.compile(r"^not jobd +\S+ .iB$.*^stored +large +\d+ ", re.MULTILINE | re.DOTALL)
    poll_until(lambda: stored.search(jobctl.run("disk")[1]))  # once the tables have the job
    assert "jobctl delete --where queue=stored --where status=completed --where" in jobctl.run("disk")[2]


_OPTIONAL: Final = {"journal", "problems", "criticalProblems"}  # of health
_SHAPES: Final = {
    "stats": fields_of(responses.StatsView),
    "health": fields_of(responses.HealthView) - _OPTIONAL,
    "disk": fields_of(responses.DiskUse),
    "cleanup": fields_of(responses.CleanupReport),
    "recover-stuck": fields_of(responses.RecoverStuckView),
    "clock": fields_of(responses.ClockView),
    "reports": {"reports"},
    "status": fields_of(ProblemList),
    "alerts": fields_of(ProblemList),
    "workers": {"workers", "by_state", "groups", "since"},
    "locks": {"locks"},
    "queues": {"queues"},
    "audit": {"entries", "next_cursor"},
}


@pytest.mark.parametrize(("verb", "shape"), _SHAPES.items())
def test_figures_and_lists_have_the_shapes_of_the_api_and_a_table(verb: str, shape: set[str], jobctl: Jobctl) -> None:
    found = jobctl.json(verb)
    assert set(found) - (_OPTIONAL if verb == "health" else set()) == shape
    if verb == "reports":
        assert set(found[verb][0]) == fields_of(responses.CleanupReport)
    code, out, err = jobctl.run(verb)
    assert (code, bool(out or err)) == (0, True), err


def test_the_state_of_cleanup_is_shown(jobctl: Jobctl) -> None:
    assert set(jobctl.json("cleanup", "--last")) == fields_of(responses.CleanupState)


def test_a_wrong_token_exits_with_5_and_is_not_printed(
    jobctl: Jobctl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ADMIN_TOKEN", "wrong-wrong-wrong-wrong-wrong")
    rejected = "jobctl: the daemon rejected the token from"
    assert jobctl.rejected("stats") == (5, f"{rejected} ADMIN_TOKEN [unauthorized]\n")
    file = tmp_path / "token"
    file.write_text("wrong-wrong-wrong-wrong-wrong\n")
    assert jobctl.rejected("stats", "--token-file", str(file)) == (5, f"{rejected} the file {file} [unauthorized]\n")
    monkeypatch.delenv("ADMIN_TOKEN")
    monkeypatch.setenv("ADMIN_TOKEN_FILE", str(file))
    assert jobctl.rejected("stats") == (5, f"{rejected} the file {file} (ADMIN_TOKEN_FILE) [unauthorized]\n")


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["retry", "--where", "queue=nothing-here"], 0),
        (["delete", "--where", "queue=nothing-here"], 0),
        (["cancel", "no-such-job", "nor-this-one"], 4),
    ],
)
def test_json_prints_a_result_even_if_there_was_nothing_to_do(jobctl: Jobctl, argv: list[str], code: int) -> None:
    ended, out, err = jobctl.run(*argv, "--yes", "--json")
    assert ended == code
    assert err.startswith("No job")
    found = msgspec.json.decode(out, type=responses.PlanResult)
    assert (found.action, found.applied, found.changed_meanwhile, found.rejected) == (argv[0], 0, [], [])
    assert set(json.loads(out)) == fields_of(responses.PlanResult)
    applied, out, _ = jobctl.run("apply", found.plan_id, "--yes", "--json")
    assert applied == 0
    assert msgspec.json.decode(out, type=responses.PlanResult) == replace(found, repeated=True)
