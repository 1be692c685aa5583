"""Streams of events from a real daemon that restarts."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from jobd.client import AdminClient, AsyncAdminClient, AsyncJobClient, JobClient, aio, sync
from jobd.client.retries import RetryOptions
from tests.support.daemon_process import TOKEN, DaemonProcess


def create(daemon: DaemonProcess, *ids: str) -> None:
    for job_id in ids:
        assert daemon.post("/v1/jobs", {"id": job_id}).status == 201


@pytest.mark.slow
def test_every_client_gets_every_event_once_across_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (aio, sync):
        monkeypatch.setattr(module, "RECONNECT", RetryOptions(total_s=None, max_s=0.1))
    with DaemonProcess(tmp_path) as daemon:
        worker, admin = f"unix:{daemon.socket}", f"unix:{daemon.admin_socket}"
        received: dict[str, list[str | None]] = {name: [] for name in ("job", "admin", "aio", "aio admin")}
        ready = threading.Barrier(5)

        def listen(name: str, client: JobClient | AdminClient) -> None:
            with client:
                for each in client.events(last=1):
                    received[name].append(each.job_id)
                    if each.job_id == "begin":
                        ready.wait(30)
                    if each.job_id == "end":
                        return

        async def collect(name: str, client: AsyncJobClient | AsyncAdminClient) -> None:
            async with client:
                async for each in client.events(last=1):
                    received[name].append(each.job_id)
                    if each.job_id == "begin":
                        await asyncio.to_thread(ready.wait, 30)
                    if each.job_id == "end":
                        return

        create(daemon, "begin")
        threads = [
            threading.Thread(target=listen, args=("job", JobClient(worker))),
            threading.Thread(target=listen, args=("admin", AdminClient(admin, token=TOKEN))),
            threading.Thread(target=lambda: asyncio.run(collect("aio", AsyncJobClient(worker)))),
            threading.Thread(target=lambda: asyncio.run(collect("aio admin", AsyncAdminClient(admin, token=TOKEN)))),
        ]
        for thread in threads:
            thread.start()
        ready.wait(30)
        create(daemon, *(f"a{n}" for n in range(10)))
        daemon.kill()
        daemon.start()
        create(daemon, *(f"b{n}" for n in range(10)))
        assert daemon.stop() == 0
        daemon.start()
        create(daemon, *(f"c{n}" for n in range(10)), "end")
        for thread in threads:
            thread.join(50)
            assert not thread.is_alive()
    expected = ["begin", *(f"{letter}{n}" for letter in "abc" for n in range(10)), "end"]
    assert received == dict.fromkeys(received, expected)
