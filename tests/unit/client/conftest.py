"""Fixtures of the client tests: a scripted server and its endpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.scripted_server import ScriptedServer, serving


@pytest.fixture
def server() -> ScriptedServer:
    return ScriptedServer()


@pytest.fixture
def endpoint(server: ScriptedServer, tmp_path: Path) -> Iterator[str]:
    with serving(server, tmp_path / "s") as found:
        yield found
