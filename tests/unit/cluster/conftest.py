"""The server of a journal in memory, and the place of a store."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support.memory_journal import MemoryServer


@pytest.fixture
def server() -> MemoryServer:
    return MemoryServer(lambda: round(asyncio.get_running_loop().time() * 1000))


@pytest.fixture
def path(tmp_path: Path) -> str:
    return f"{tmp_path}/jobd.db"
