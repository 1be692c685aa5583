"""jobctl for stored and late results: artifact, late, adopt."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from jobd.client import LockLost
from jobd.model import responses
from tests import ROOT
from tests.support import cli_harness


def test_a_stored_result_is_downloaded(
    jobctl: cli_harness.Jobctl, running: cli_harness.CliDaemon, tmp_path: Path
) -> None:
    jobctl.ok("submit", "--id", "c7", "--queue", "c7")
    target, content = tmp_path / "report.pdf", os.urandom(300_000)
    jobctl.rejects(4, "storage_key is not set", "artifact", "c7", "-o", str(target))
    assert jobctl.rejected("artifact", "none")[0] == 4
    grant = running.client.claim("w", queues=["c7"])[0]
    running.client.complete_job("c7", lock_id=grant.lock_id, storage_key="c7/report.pdf")
    assert "has no object" in jobctl.rejected("artifact", "c7", "-o", str(target))[1]
    assert not list(tmp_path.iterdir())
    (running.directory / "artifacts" / "c7").mkdir()
    (running.directory / "artifacts" / "c7" / "report.pdf").write_bytes(content)
    assert jobctl.ok("artifact", "c7", "-o", str(target)) == f"{target}: 293.0 KiB\n"
    assert target.read_bytes() == content
    target.write_text("mine")
    assert "--yes" in jobctl.rejected("artifact", "c7", "-o", str(target))[1]
    assert target.read_text() == "mine"
    jobctl.ok("artifact", "c7", "-o", str(target), "-y")
    assert target.read_bytes() == content
    done = subprocess.run(
        [sys.executable, "-m", "jobd.cli.ctl.main", "artifact", "c7"],
        env={**running.env, **running.client_environ},
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == (content, b"")
    assert "would delete with its artifact c7/report.pdf" in jobctl.ok("delete", "c7", "--dry-run")
    (running.directory / "artifacts" / "c7" / "report.pdf").unlink()


def test_a_late_result_can_be_downloaded_before_it_is_adopted(
    jobctl: cli_harness.Jobctl, running: cli_harness.CliDaemon, tmp_path: Path
) -> None:
    jobctl.ok("submit", "--id", "c8", "--queue", "c8")
    grant = running.client.claim("w-late", queues=["c8"])[0]
    jobctl.ok("force-reset", "c8", "-y")
    (running.directory / "artifacts" / "c8").mkdir()
    (running.directory / "artifacts" / "c8" / "late.bin").write_bytes(b"late")
    with pytest.raises(LockLost) as lost:
        running.client.complete_job("c8", lock_id=grant.lock_id, storage_key="c8/late.bin")
    target = tmp_path / "late.bin"
    assert jobctl.rejected("artifact", "c8", "-o", str(target))[0] == 4
    assert jobctl.rejected("artifact", "c8", "--late-result", "1", "-o", str(target))[0] == 4
    assert not target.exists()
    jobctl.ok("artifact", "c8", "--late-result", str(lost.value.late_result), "-o", str(target))
    assert target.read_bytes() == b"late"


def test_an_operator_adopts_a_late_result(jobctl: cli_harness.Jobctl, running: cli_harness.CliDaemon) -> None:
    jobctl.ok("submit", "--id", "c6", "--queue", "c6")
    assert jobctl.run("late", "c6") == (0, "", "No late results.\n")
    assert jobctl.rejected("adopt", "c6", "--dry-run")[0] == 4
    grant = running.client.claim("w-late", queues=["c6"])[0]
    jobctl.ok("force-reset", "c6", "-y")
    with pytest.raises(LockLost) as lost:
        running.client.complete_job("c6", lock_id=grant.lock_id, file_path="/srv/6", metadata={"a": 1})
    (late,) = jobctl.json("late", "c6")["late_results"]
    assert set(late) == cli_harness.fields_of(responses.LateResultView)
    assert late["seq"] == lost.value.late_result
    listed = jobctl.ok("late", "c6")
    assert all(part in listed for part in ("w-late", "/srv/6", '{"a":1}'))
    again = running.client.claim("w", queues=["c6"])[0]
    code, err = jobctl.rejected("adopt", "c6", "--dry-run")
    assert (code, "[invalid_transition]" in err) == (4, True)
    assert "c6: adopt would be rejected: Job c6 is processing. Worker w holds it" in err
    assert "force-fail c6" in jobctl.rejected("adopt", "c6", "-y")[1]
    running.client.release_job("c6", lock_id=again.lock_id)
    what = f'late result {late["seq"]} of w-late (file_path /srv/6, metadata {{"a":1}})'
    assert jobctl.ok("adopt", "c6", "--dry-run") == f"c6: would adopt {what}: it is queued\n"
    assert jobctl.rejected("adopt", "c6", "-y", "--result", "1")[0] == 4
    adopted = jobctl.json("adopt", "c6", "-y", "--result", str(late["seq"]), "--reason", "it is whole")
    assert (adopted["status"], adopted["file_path"], adopted["metadata"]) == ("completed", "/srv/6", {"a": 1})
    assert "it is whole" in jobctl.ok("timeline", "c6")


def test_a_dry_run_respects_a_required_download_url(
    jobctl: cli_harness.Jobctl, running: cli_harness.CliDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    _create_late_results(running, jobctl, "du1")
    (late,) = jobctl.json("late", "du1")["late_results"]
    move = ("transition", "du1", "failed", "completed")
    assert "would adopt" in jobctl.ok("adopt", "du1", "--dry-run")
    with running.configured("[validation]\nrequire_download_url = true\n"):
        lacks = f"Late result {late['seq']} cannot be adopted: it has no download_url"
        code, out, err = jobctl.run("adopt", "du1", "--dry-run")
        assert (code, out, err.startswith(f"du1: adopt would be rejected: {lacks}")) == (4, "", True)
        assert err.endswith("[invalid_request]\n")
        assert jobctl.rejected("adopt", "du1", "-y") == (4, err.replace("du1: adopt would be rejected", "jobctl"))
        code, shown = cli_harness.rejected_on_a_terminal(running, "adopt", "du1")
        assert (code, lacks in shown) == (4, True)
        assert "but it cannot be adopted" in jobctl.json("why", "du1")["do"][0]
        assert lacks in jobctl.ok("late", "du1").splitlines()[-1]
        missing = "download_url is missing; [validation] require_download_url requires it [invalid_request]\n"
        code, err = jobctl.rejected(*move, "--dry-run")
        rejected = f"du1: transition failed → completed would be rejected: {missing}".replace(" it [", " it. [")
        assert (code, err) == (4, rejected)
        assert jobctl.rejected(*move, "-y") == (4, f"jobctl: {missing}")
        assert "would transition" in jobctl.ok(*move, "--set", "download_url=https://x.test/1", "--dry-run")
        monkeypatch.setenv("ADMIN_TOKEN", cli_harness.READ_ONLY_TOKEN)
        jobctl.rejects(4, lacks, "adopt", "du1", "--dry-run")  # a read-only token shows it, too
        code, out, err = jobctl.run(*move, "--dry-run")
        assert (code, "would transition" in out) == (0, True)
        assert err == (
            "This token is read-only, so only the status was checked. A dry run on the daemon needs the admin token.\n"
        )
        assert jobctl.rejected("adopt", "du1", "-y")[0] == 5
    assert "would adopt" in jobctl.ok("adopt", "du1", "--dry-run")
    assert "it is failed" in jobctl.ok(*move, "--dry-run")
    assert running.client.get_job("du1").status == "failed"
    monkeypatch.setenv("ADMIN_TOKEN", cli_harness.TOKEN)
    done = [each["action"] for each in jobctl.json("audit", "--job", "du1", "--limit", "9")["entries"]]
    assert done == ["transition", "adopt", "force-fail"], "a dry run is no action"


def _create_late_results(running: cli_harness.CliDaemon, jobctl: cli_harness.Jobctl, *ids: str) -> None:
    """Create failed jobs in a queue of this name, each with a late result."""
    for job_id in ids:
        running.client.create_job(id=job_id, queue=ids[0])
        grant = running.client.claim("w-late", queues=[ids[0]])[0]
        jobctl.ok("force-fail", job_id, "-y")
        with pytest.raises(LockLost):
            running.client.complete_job(job_id, lock_id=grant.lock_id, file_path=f"/srv/{job_id}")


_GOES: Final = "1 late result that was not adopted. It is deleted with the job."
_INSTEAD: Final = "1 late result that was not adopted. Check whether it can be adopted instead."


def test_late_results_are_mentioned_before_they_are_deleted(
    jobctl: cli_harness.Jobctl, running: cli_harness.CliDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    _create_late_results(running, jobctl, "lt1")
    running.client.create_job(id="lt2", queue="lt2")
    running.client.cancel_job("lt2")
    shown = f"It has {_GOES} See: jobctl late lt1\n"
    assert jobctl.ok("delete", "lt1", "--dry-run") == f"lt1: would delete: it is failed\n{shown}"
    assert jobctl.ok("delete", "lt2", "--dry-run") == "lt2: would delete: it is cancelled\n"
    assert f"It has {_INSTEAD}" in jobctl.ok("force-reset", "lt1", "--dry-run")
    assert f"It has {_INSTEAD}" in jobctl.ok("retry", "lt1", "--dry-run")
    assert f"1 of these jobs has {_GOES} See jobctl late ID: lt1\n" in jobctl.ok("delete", "lt1", "lt2", "--dry-run")
    plan = jobctl.json("delete", "--where", "queue=lt1", "--dry-run")
    assert (plan["with_late_results"], [job["late_results"] for job in plan["jobs"]]) == (1, [1])
    shown = jobctl.ok("apply", plan["plan_id"], "--dry-run")
    assert _GOES in shown
    code, _, prompt = cli_harness.on_a_terminal(running, b"n\n", "delete", "lt1")
    assert (code, prompt.index(_GOES) < prompt.index("delete job lt1")) == (1, True)
    monkeypatch.setenv("ADMIN_TOKEN", cli_harness.READ_ONLY_TOKEN)
    assert f"It has {_GOES}" in jobctl.ok("delete", "lt1", "--dry-run"), "a read-only token shows it, too"
