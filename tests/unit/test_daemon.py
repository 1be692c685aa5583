"""The daemon as a whole, with fakes of its parts."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from itertools import pairwise
from typing import Any

import pytest

from jobd import logging, systemd
from jobd.config import Config, LoadedConfig, WorkerSection
from jobd.daemon import Daemon
from jobd.model.errors import ApiError, ApiException
from jobd.model.responses import Response
from tests.support.virtual_engine import in_virtual_time, seconds


class FullMailbox:
    """Reject nine of ten commands."""

    def __init__(self) -> None:
        self.asked = 0

    async def ask(self, command: object, *, by: str) -> Response | ApiError:
        self.asked += 1
        return ApiError("overloaded", "full") if self.asked % 10 else Response(None)


class FakeServing:
    def __init__(self) -> None:
        self.actor = FullMailbox()


def test_a_full_mailbox_does_not_let_the_watchdog_end_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    signs: list[float] = []

    @in_virtual_time
    async def run() -> None:
        clock_s = asyncio.get_running_loop().time
        monkeypatch.setattr(systemd, "alive", lambda: signs.append(clock_s()))
        monkeypatch.setattr(systemd, "watchdog_s", lambda: 30.0)
        async with AsyncExitStack() as stack:
            loaded = LoadedConfig(Config(), {}, (), ())
            daemon: Any = Daemon(loaded, lambda: loaded, stack)
            daemon._serving = FakeServing()
            feeding = asyncio.create_task(daemon._feed_watchdog())
            await seconds(300)
            feeding.cancel()

    run()
    assert len(signs) >= 15
    assert max(after - before for before, after in pairwise(signs)) < 30


async def test_workers_keep_their_token_until_the_restart_that_closes_their_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging, "set_level", lambda level: None)
    listening = Config(worker=WorkerSection(listen="127.0.0.1:0", token_file="worker_token"))
    loaded = LoadedConfig(listening, {}, ("a" * 24,), ("w" * 24,))
    async with AsyncExitStack() as stack:
        daemon: Any = Daemon(loaded, lambda: loaded, stack)
        daemon._passed_sockets = {}
        daemon._make_authenticators()
        daemon._apply(LoadedConfig(Config(), {}, ("a" * 24,), ()))
        headers = {"authorization": b"Bearer " + b"w" * 24}
        assert daemon._authenticators["worker-tcp"].authenticate(headers) == "full"
        daemon._apply(LoadedConfig(listening, {}, ("a" * 24,), ("n" * 24,)))
        with pytest.raises(ApiException):
            daemon._authenticators["worker-tcp"].authenticate(headers)
