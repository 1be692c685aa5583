"""`jobctl clock accept` and `jobctl reports`, against prepared responses."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from jobd.api import admin_routes as admin_api
from jobd.cli.ctl import main as ctl
from tests.support.http_harness import HttpHarness
from tests.support.scripted_server import ScriptedServer, ok, serving


async def _clock(directory: Path, held: list[str], *argv: str) -> tuple[int, bool]:
    """The exit code of `jobctl clock …` against a daemon whose clock is suspect, and whether it is accepted."""
    async with HttpHarness(admin_api.ROUTES, directory, admin=True) as harness:
        harness.fakes.past_jobs = held
        where = ["--admin-url", f"unix:{harness.path}"]
        code = await asyncio.to_thread(ctl.main, ["clock", *argv, *where])
        return code, harness.fakes.accepted


async def test_clock_accept_lists_the_jobs_to_delete_and_asks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADMIN_TOKEN", "canary-token-0123456789")
    held = ["old-1", "old-2"]
    assert await _clock(tmp_path, held, "accept") == (2, False)
    assert "add --yes to skip it, or --dry-run to preview the effect" in capsys.readouterr().err
    assert await _clock(tmp_path, held, "accept", "--dry-run") == (0, False)
    assert "2: old-1 old-2 finished jobs would be deleted by age" in capsys.readouterr().out
    assert await _clock(tmp_path, held, "accept", "--dry-run", "--json") == (0, False)
    assert json.loads(capsys.readouterr().out) == {"keptJobs": held, "moreKept": False}
    assert await _clock(tmp_path, held, "--yes") == (2, False)
    assert await _clock(tmp_path, held, "accept", "--yes") == (0, True)
    requests: list[str] = []
    monkeypatch.setattr("jobd.cli.ctl.admin_commands.need_terminal", lambda: None)
    monkeypatch.setattr("jobd.cli.ctl.admin_commands.confirm", requests.append)
    assert await _clock(tmp_path, held, "accept") == (0, True)
    assert requests == ["accept the clock"]
    assert "2: old-1 old-2 finished jobs would be deleted by age" in capsys.readouterr().err


def test_reports_asks_for_the_whole_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADMIN_TOKEN", "canary-token-0123456789")
    server = ScriptedServer(ok({"reports": []}))
    with serving(server, tmp_path / "s") as endpoint:
        assert ctl.main(["reports", "--limit", "60", "--json", "--admin-url", endpoint]) == 0
    assert json.loads(capsys.readouterr().out) == {"reports": []}
    assert server.received[0].path.endswith("/reports?limit=60")
