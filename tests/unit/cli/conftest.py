"""Fixtures of the unit tests of the command line."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobd.cli import connection


@pytest.fixture(autouse=True)
def _without_daemon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ignore the settings and the daemon of this machine, and do not retry."""
    for name in list(os.environ):
        if name.startswith(("JOBD_", "ADMIN_TOKEN")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("JOBD_SOCKET", str(tmp_path / "missing.sock"))
    monkeypatch.setenv("JOBD_ADMIN_URL", f"unix:{tmp_path}/missing.sock")
    monkeypatch.setattr(connection, "RETRY_FOR_S", 0.0)


@pytest.fixture(params=["UTC", "America/New_York", "Asia/Tokyo"])
def zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Set the time zone of the host."""
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield request.param
    monkeypatch.undo()
    time.tzset()
