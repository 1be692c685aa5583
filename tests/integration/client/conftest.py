"""Fixtures of the client tests: a daemon, its clients and a queue of the test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from jobd.client import AsyncAdminClient, AsyncJobClient, uuid7
from jobd.client.worker import lock_keeper
from tests.support.daemon_process import TOKEN, DaemonProcess


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("d")) as running:
        yield running


@pytest.fixture
async def client(daemon: DaemonProcess) -> AsyncIterator[AsyncJobClient]:
    async with AsyncJobClient(f"unix:{daemon.socket}") as client:
        yield client


@pytest.fixture
async def admin(daemon: DaemonProcess) -> AsyncIterator[AsyncAdminClient]:
    async with AsyncAdminClient(f"unix:{daemon.admin_socket}", token=TOKEN) as client:
        yield client


@pytest.fixture
def queue() -> str:
    """Return the name of a queue that only this test uses."""
    return uuid7()


@pytest.fixture(autouse=True)
def frequent_extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extend a lock of 30 s every 0.3 s, long before it expires: a busy machine may delay an extension for seconds."""
    monkeypatch.setattr(lock_keeper, "EXTENSIONS_PER_TTL", 100)
