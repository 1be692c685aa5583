"""A PostgreSQL server for the tests of the journal, and journals in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.conftest import tool_missing
from tests.support import postgres
from tests.support.postgres import PostgresMissing, PostgresServer

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def server() -> Iterator[PostgresServer]:
    try:
        postgres.programs()
    except PostgresMissing:
        tool_missing("postgres", "postgresql")
    with postgres.postgres() as started:
        yield started


@pytest.fixture
def name() -> str:
    """Return a name for a journal that no other test uses."""
    return f"test-{next(_numbers)}"
