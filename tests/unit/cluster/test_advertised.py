"""The check of the address that a node advertises."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from jobd.cluster import advertised
from jobd.cluster.advertised import advertised_problem
from tests.support.daemon_process import free_port


@asynccontextmanager
async def listening(response: bytes | None) -> AsyncIterator[tuple[str, set[int]]]:
    """Run a server that responds, closes the connection (empty) or hangs (None). Yield its URL and its peers."""
    peers: set[int] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peers.add(writer.get_extra_info("peername")[1])
        request = await reader.read(1_000)
        assert b"uthorization" not in request
        if response is None:
            await reader.read()
        writer.write(response or b"")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", peers


async def test_an_address_leads_to_the_node_or_to_another_process() -> None:
    async with listening(b"HTTP/1.1 200 OK\r\n\r\n") as (url, peers):
        assert await advertised_problem(url, peers.__contains__) is None
        assert await advertised_problem(url, None) is None
        problem = await advertised_problem(url, lambda port: False)
        assert problem is not None
        assert problem.startswith(f"node.advertise: another process responds at {url}")
        secure = await advertised_problem(url.replace("http", "https"), None)
        assert secure is not None
        assert "does not respond to this node" in secure


@pytest.mark.parametrize(("response", "reason"), [(b"", "the connection was closed"), (None, "no response within")])
async def test_an_address_that_does_not_respond(
    monkeypatch: pytest.MonkeyPatch, response: bytes | None, reason: str
) -> None:
    monkeypatch.setattr(advertised, "CHECK_S", 0.2)
    async with listening(response) as (url, _):
        problem = await advertised_problem(url, None)
    assert problem is not None
    assert re.search(rf"{url} does not respond to this node \({reason}", problem)


async def test_nothing_listens_at_the_address() -> None:
    problem = await advertised_problem(f"http://127.0.0.1:{free_port()}", None)
    assert problem is not None
    assert "Connect call failed" in problem or "refused" in problem
