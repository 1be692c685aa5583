"""Daemons in several states for browser tests, screenshots and benchmarks of the dashboard."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from shutil import which
from typing import Any, Final

from tests.support.daemon_process import TOKEN, free_port
from tests.support.forked_process import ForkedDaemon
from tests.support.postgres import postgres

CHROMIUM: Final = which("chromium-headless-shell") or which("chromium") or ""  # the shell needs half the processor time
# CI runs as root, where the sandbox does not work. The other flags stop traffic at the start.
FLAGS: Final = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
READ_ONLY_TOKEN: Final = "reader-token-0123456789abcdef"
_SECRET: Final = "whsec_" + b64encode(bytes(32)).decode()
# A webhook without a receiver.
WEBHOOK: Final = f"""\
[[webhooks]]
name = "billing"
url = "http://127.0.0.1:9/nobody-listens"
allow_private = true
secret = "{_SECRET}"
"""
TROUBLE: Final = f"""\
[alerts]
processing_jobs = 2
average_processing = '0'
stalled_jobs = 0
webhook_failing = '0'

[artifacts]
url = "file:///nonexistent/artifacts"

{WEBHOOK}"""


class DashboardDaemon(ForkedDaemon):
    """A daemon with an admin listener on TCP and a read-only token."""

    def __init__(self, directory: Path, config: str = "") -> None:
        readers = directory / "readers"
        readers.write_text(READ_ONLY_TOKEN)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        places = {"JOBD_ADMIN_LISTEN": f"127.0.0.1:{self.port}", "ADMIN_READONLY_TOKEN_FILE": str(readers)}
        super().__init__(directory, config, **places)
        self.variant = "prompt_problems"  # alerts fire at once

    def do(self, path: str, **body: Any) -> Any:
        """Send a POST to the worker API and return its data."""
        return self.post(f"/v1/{path}", body).data

    def operator(self, method: str, path: str, body: Any = None) -> int:
        """Send a request to the admin API and return its status."""
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            text = None if body is None else json.dumps(body)
            connection.request(method, f"/admin/job-management/{path}", text, headers)
            return connection.getresponse().status


class DashboardNode(DashboardDaemon):
    """A node of the cluster whose journal is at `url`. Its context waits until it is a standby, at least."""

    def __init__(self, directory: Path, url: str, name: str, config: str = "") -> None:
        directory.mkdir()
        (directory / "token").write_text(TOKEN)
        (directory / "token").chmod(0o600)
        super().__init__(
            directory,
            f"""\
[journal]
url = "{url}"
require_sync = false

[node]
name = "{name}"

[worker]
listen = "127.0.0.1:{free_port()}"
token_file = "{directory}/token"

{config}""",
        )

    def start(self) -> None:
        self.launch()
        self.wait_for_log(b"event=standby")


@contextmanager
def cluster_of(directory: Path, *names: str) -> Iterator[list[DashboardNode]]:
    """Run nodes, of which the first leads. The configuration of the last one differs. Raises PostgresMissing."""
    with ExitStack() as stack:
        url = stack.enter_context(postgres()).url()
        command = [sys.executable, "-m", "jobd", "cluster", "init", "--set", f"journal.url={url}"]
        subprocess.run(command, check=True, capture_output=True)
        nodes = []
        for name in names:
            config = "[retention]\njournal = '2d'\n" * (name == names[-1])
            nodes.append(stack.enter_context(DashboardNode(directory / name, url, name, config)))
            if len(nodes) == 1:
                nodes[0].wait_for_log(b"event=ready")
        while len(nodes[0].get("/v1/cluster").data["nodes"]) < len(names):
            time.sleep(0.1)
        yield nodes


def make_busy(daemon: DashboardDaemon) -> None:
    """Fill several queues: running jobs, results, failures, and one paused queue."""
    kinds = {"video": "transcode", "mail": "newsletter", "reports": "monthly", "imports": "csv"}
    for queue, kind in kinds.items():
        payload = {"file": f"/srv/in/{queue}/2026-01.dat", "options": {"quality": "high", "parts": [1, 2, 3]}}
        ids = [f"{queue}-{number:03}" for number in range(60)]
        daemon.do(
            "jobs/bulk",
            jobs=[{"id": each, "queue": queue, "kind": kind, "payload": payload, "max_attempts": 3} for each in ids],
        )
    for queue in kinds:
        grants = daemon.do("claim", worker=f"{queue}-worker-1", queues=[queue], limit=30)["grants"]
        for number, grant in enumerate(grants):
            path, lock = f"jobs/{grant['job']['id']}", grant["lock_id"]
            if number % 5 == 3:
                message = "Connection to storage.example refused after 3 attempts; the file was not read."
                daemon.do(
                    f"{path}/fail", lock_id=lock, error_message=message, error_code="storage", retry=number % 2 == 0
                )
            elif number % 5 == 4:
                daemon.do(f"{path}/progress", lock_id=lock, progress=13 + 2 * number, message=f"part {number} of 30")
            else:
                daemon.do(f"{path}/progress", lock_id=lock, progress=50, message="half of it")
                daemon.do(f"{path}/complete", lock_id=lock, metadata={"pages": number, "checksum": "9f2c"})
    daemon.do("jobs/mail-040/cancel", reason="sent by hand")
    daemon.operator("POST", "queues/imports/pause", {"reason": "the supplier sends a new file"})
    daemon.operator("POST", "cleanup")


def make_trouble(daemon: DashboardDaemon) -> None:
    """Fill queues, exceed alert thresholds, and add text that looks like markup."""
    make_busy(daemon)
    nasty = "<script>alert(1)</script>\u202e\u0007 & a very long word " + "x" * 120
    daemon.do("jobs", id="nasty", queue="video", kind="<b>bold</b>", payload={"html": nasty})
    lock = daemon.do("jobs/nasty/start", worker="<img src=x onerror=alert(1)>" + "w" * 120)["lock_id"]
    daemon.do("jobs/nasty/progress", lock_id=lock, progress=33, message=nasty)
    daemon.do("jobs", id="twice", queue="video", kind="transcode")
    for worker in ("video-worker-1", "video-worker-2"):  # the second while the first still has time
        daemon.operator("POST", "force-reset", {"jobId": "twice", "reason": "it looked dead"})
        daemon.do("jobs/twice/start", worker=worker)
    daemon.do("jobs", id="short", queue="brief", kind="transcode")
    about = {"host": "render-2", "pid": 4711, "version": "0.1.0", "concurrency": 4, "instance": "8f2c"}
    daemon.do("claim", worker="video-worker-3", queues=["brief"], lock_ttl_ms=1_000, about=about)
    daemon.do("claim", worker="image-worker-1", queues=["images", "thumbs"], kinds=["resize", "crop"], about=about)
    daemon.operator("GET", "health")
