"""The deadline for a client that reads its response slowly or not at all."""

from __future__ import annotations

import asyncio
import socket
from typing import Any, cast

import pytest

from jobd.engine.unread_responses import UnreadResponses
from jobd.http.read_deadline import CHECKS, ReadDeadline, unread_bytes


class SlowTransport:
    """A transport that loses a byte to the client at each check, until none is left."""

    def __init__(self, unsent: int, opened: socket.socket) -> None:
        self.unsent = unsent
        self._socket = opened

    def get_write_buffer_size(self) -> int:
        self.unsent = max(self.unsent - 1, 1)
        return self.unsent

    def get_extra_info(self, name: str) -> Any:
        return self._socket


async def test_the_deadline_starts_anew_whenever_bytes_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobd.http.read_deadline.WRITE_TIMEOUT_S", 0.03)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        transport, stalled = SlowTransport(10 * CHECKS, ours), asyncio.Event()
        responses = UnreadResponses()
        deadline = ReadDeadline(cast("asyncio.Transport", transport), stalled.set, responses, 150)
        assert responses.bytes == 150
        await stalled.wait()
    deadline.cancel()
    assert (transport.unsent, responses.bytes) == (1, 0)


async def test_bytes_in_the_socket_are_unread_and_a_closed_socket_has_none() -> None:
    ours, theirs = socket.socketpair()
    transport = cast("asyncio.Transport", SlowTransport(1, ours))
    with theirs:
        ours.send(b"x" * 1000)
        assert unread_bytes(transport) > 1000
        ours.close()
        assert unread_bytes(transport) == 1
