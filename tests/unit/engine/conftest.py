"""Fixtures of the engine tests."""

from __future__ import annotations

import pytest

from tests.support.memory_storage import MemoryStorage


@pytest.fixture(params=[True, False], ids=["inline", "thread"])
def both_commit_modes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test once with inline commits and once with commits in the storage thread."""
    monkeypatch.setattr(MemoryStorage, "commits_inline", request.param)
