"""The server of a journal in memory."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.memory_journal import MemoryServer


@pytest.fixture
def server() -> MemoryServer:
    return MemoryServer(lambda: round(asyncio.get_running_loop().time() * 1000))
