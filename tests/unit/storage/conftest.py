"""Fixtures of the storage tests: the path of a store, and an open store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from jobd.storage.store import Store


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "jobd.db")


@pytest.fixture
async def store(path: str) -> AsyncIterator[Store]:
    store, _ = await Store.open(path)
    async with store:
        yield store
