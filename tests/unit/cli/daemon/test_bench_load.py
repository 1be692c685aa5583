"""The client and the percentiles of `jobd bench`."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from jobd.cli.daemon.bench_load import LoadConnection, percentiles


async def test_a_connection_reads_responses_in_any_pieces_and_notices_its_end(tmp_path: Path) -> None:
    whole = b'HTTP/1.1 200 OK\r\nA: b\r\nContent-Length: 32\r\n\r\n{"success":true,"data":[1,2,3]}\n'

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for response in (whole, whole, whole, whole[:-1]):
            await reader.readuntil(b"\r\n\r\n")
            for at in range(len(response)):
                writer.write(response[at : at + 1])
                await asyncio.sleep(0)
        writer.close()

    async with await asyncio.start_unix_server(serve, tmp_path / "socket"):
        connection = await LoadConnection.open(str(tmp_path / "socket"))
        assert await connection.get("/a") == [1, 2, 3]
        await connection.drop("/b")
        assert await connection.get("/c") == [1, 2, 3]
        for _ in range(2):
            with pytest.raises(ConnectionError):
                await connection.get("/d")


def test_percentiles() -> None:
    one_to_thousand = [number / 1000 for number in range(1000, 0, -1)]
    assert list(percentiles(one_to_thousand).values()) == [500, 900, 990, 999, 1000]
    assert set(percentiles([0.25]).values()) == {250.0}
    assert percentiles([0.001, 0.002, 0.003])["p50_ms"] == 2
