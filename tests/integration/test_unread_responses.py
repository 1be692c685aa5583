"""Clients that claim large jobs and do not read their responses cannot take more memory than the limit."""

from __future__ import annotations

import socket
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Final

import pytest

from jobd.model.api_call import LINES
from tests.support.daemon_process import TOKEN, DaemonProcess, DaemonResponse, UnixConnection, call
from tests.support.http_harness import request_bytes
from tests.support.polling import poll_until

JOBS: Final = 2_400
LIMIT: Final = 256 << 20
CLAIMS: Final = [
    request_bytes("POST", "/v1/claim", '{"worker":"w","limit":100}'),
    request_bytes("POST", "/v1/commands", '{"op":"claim","worker":"w","limit":100}\n', {"Content-Type": LINES}),
]


def peak_mib(daemon: DaemonProcess) -> int:
    """Return the highest resident memory of the daemon so far."""
    status = Path(f"/proc/{daemon.process.pid}/status").read_text("ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10


def unread_bytes(daemon: DaemonProcess) -> float:
    text = daemon.admin("GET", "/metrics").body.decode()
    return float(text.partition("\njobd_response_bytes ")[2].split()[0])


def claim_one(worker: UnixConnection) -> DaemonResponse:
    return call(worker, "POST", "/v1/claim", {"worker": "w", "queues": ["small"]})


@pytest.mark.slow
def test_claims_that_are_not_read_take_bounded_memory(tmp_path: Path) -> None:
    """24 clients claim 100 jobs of 250 KB each, by request and by stream, and do not read. 16 more reach the limit."""
    with DaemonProcess(tmp_path) as daemon, closing(daemon.worker()) as worker, ExitStack() as clients:

        def claim_unread(count: int) -> None:
            for n in range(count):
                client = clients.enter_context(socket.socket(socket.AF_UNIX))
                client.connect(daemon.socket)
                client.sendall(CLAIMS[n % 2])

        for _ in range(JOBS // 4):
            jobs = [{"payload": "x" * 250_000}] * 4
            assert call(worker, "POST", "/v1/jobs/bulk", {"jobs": jobs}).status == 201
        for _ in range(2):
            assert call(worker, "POST", "/v1/jobs", {"queue": "small"}).status == 201
        claim_unread(24)
        poll_until(lambda: unread_bytes(daemon) > 24 * 33 * 250_000)
        [held] = claim_one(worker).data["grants"]
        assert peak_mib(daemon) < 400
        claim_unread(16)
        poll_until(lambda: unread_bytes(daemon) >= LIMIT)
        assert claim_one(worker).error == "overloaded"
        assert unread_bytes(daemon) < LIMIT + (16 << 20)
        path, lock = f"/v1/jobs/{held['job']['id']}", {"lock_id": held["lock_id"]}
        assert call(worker, "POST", f"{path}/complete", {**lock, "file_path": "/f"}).status == 200
        clients.close()
        poll_until(lambda: unread_bytes(daemon) == 0)
        assert len(claim_one(worker).data["grants"]) == 1


@pytest.mark.slow
def test_lists_of_operators_that_are_not_read_take_bounded_memory(tmp_path: Path) -> None:
    """100 clients of the admin API list jobs of 250 KB and do not read. The limit rejects some of them."""
    lists = request_bytes("GET", "/admin/job-management/jobs?limit=200", headers={"Authorization": f"Bearer {TOKEN}"})
    with DaemonProcess(tmp_path) as daemon, closing(daemon.worker()) as worker, ExitStack() as clients:
        for _ in range(10):
            jobs = [{"payload": "x" * 250_000}] * 4
            assert call(worker, "POST", "/v1/jobs/bulk", {"jobs": jobs}).status == 201
        for _ in range(100):
            client = clients.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(daemon.admin_socket)
            client.sendall(lists)
        poll_until(lambda: unread_bytes(daemon) >= LIMIT)
        assert peak_mib(daemon) < 450
