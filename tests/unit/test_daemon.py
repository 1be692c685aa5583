"""The daemon as a whole, with fakes of its parts."""

from __future__ import annotations

import asyncio
import gc
import os
import stat
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobd import config_loader, daemon, logging, systemd
from jobd.cli.daemon.main import main
from jobd.config import Config, ConfigError, LoadedConfig, WorkerSection
from jobd.daemon import Daemon
from jobd.model.errors import ApiError, ApiException
from jobd.model.responses import Response
from jobd.serving import Serving
from tests.support.virtual_engine import in_virtual_time, seconds


class FullMailbox:
    """Reject nine of ten commands."""

    def __init__(self) -> None:
        self.asked = 0

    async def ask(self, command: object, *, by: str) -> Response | ApiError:
        self.asked += 1
        return ApiError("overloaded", "full") if self.asked % 10 else Response(None)


class Stuck:
    """Respond to nothing."""

    async def ask(self, command: object, *, by: str) -> Response | ApiError:
        return await asyncio.Future()


class Waiting:
    is_waiting = True


class FakeServing:
    responds = Serving.responds

    def __init__(self, actor: object, leadership: object = None) -> None:
        self.actor = actor
        self._leadership = leadership


@pytest.fixture
def signs(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the times of the signs of life to a watchdog that waits for 30 s."""
    times: list[float] = []
    monkeypatch.setattr(systemd, "alive", lambda: times.append(asyncio.get_running_loop().time()))
    monkeypatch.setattr(systemd, "watchdog_s", lambda: 30.0)
    return times


@asynccontextmanager
async def fed(serving: FakeServing) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        loaded = LoadedConfig(Config(), {}, (), ())
        running: Any = Daemon(loaded, lambda: loaded, stack)
        running._serving = serving
        feeding = asyncio.create_task(running._feed_watchdog())
        yield
        feeding.cancel()


def test_the_watchdog_does_not_end_a_leader_that_waits_for_the_journal_within_its_lease(signs: list[float]) -> None:
    @in_virtual_time
    async def run() -> None:
        leadership = Waiting()
        async with fed(FakeServing(Stuck(), leadership)):
            await seconds(50)
            leadership.is_waiting = False
            await seconds(300)

    run()
    assert max(after - before for before, after in pairwise(signs)) < 30
    assert 30 < signs[-1] - signs[0] < 50


def test_a_full_mailbox_does_not_let_the_watchdog_end_the_daemon(signs: list[float]) -> None:
    @in_virtual_time
    async def run() -> None:
        async with fed(FakeServing(FullMailbox())):
            await seconds(300)

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
        running: Any = Daemon(loaded, lambda: loaded, stack)
        running._passed_sockets = {}
        running._make_authenticators()
        applied: list[None] = []
        running._apps = [SimpleNamespace(cut_off_revoked=lambda: applied.append(None))]
        running._apply(LoadedConfig(Config(), {}, ("a" * 24,), ()))
        headers = {"authorization": b"Bearer " + b"w" * 24}
        assert running._authenticators["worker-tcp"].authenticate(headers) == "full"
        running._apply(LoadedConfig(listening, {}, ("a" * 24,), ("n" * 24,)))
        with pytest.raises(ApiException):
            running._authenticators["worker-tcp"].authenticate(headers)
        assert len(applied) == 2


def test_other_users_may_not_write_to_new_directories(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def make_directory(*_: object) -> int:
        made = Path(tempfile.mkdtemp(dir=tmp_path)) / "new"
        made.mkdir()
        return stat.S_IMODE(made.stat().st_mode)

    monkeypatch.setattr(logging, "configure", lambda *_: None)
    monkeypatch.setattr(daemon, "_serve", make_directory)
    loaded = LoadedConfig(Config(), {}, (), ())
    before = os.umask(0)
    try:
        assert daemon.serve(loaded, lambda: loaded) == 0o755
        os.umask(0o077)
        assert daemon.serve(loaded, lambda: loaded) == 0o700
    finally:
        os.umask(before)


def test_a_reload_fails_without_the_file_of_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without it, the defaults would apply, such as shorter retention times."""
    file, reloads = tmp_path / "config.toml", []
    file.write_text("")
    monkeypatch.setattr(config_loader, "DEFAULT_PATH", str(file))
    monkeypatch.setattr(daemon, "serve", lambda loaded, reload: reloads.append(reload))
    monkeypatch.setenv("ADMIN_TOKEN", "a" * 24)
    try:
        assert main(["serve"]) == 0
    finally:
        gc.enable()
    assert reloads[0]().path == str(file)
    file.unlink()
    with pytest.raises(ConfigError, match="no such file"):
        reloads[0]()
