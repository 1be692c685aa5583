"""The fixture `jobd` of pytest. Nothing else of jobd is imported before a test uses it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from jobd.testing import TestDaemon


@pytest.fixture(scope="session")
def jobd_stores() -> Iterator[Callable[[], AbstractContextManager[TestDaemon]]]:
    """Provide the daemon of the session, which gives each test a new store."""
    from jobd.testing import DaemonThread

    with DaemonThread() as thread:
        yield thread.new_store


@pytest.fixture
def jobd(jobd_stores: Callable[[], AbstractContextManager[TestDaemon]]) -> Iterator[TestDaemon]:
    """Provide a daemon with an empty store. All apps use it during the test."""
    with jobd_stores() as found:
        yield found
