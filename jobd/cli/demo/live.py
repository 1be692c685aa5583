"""`jobd demo --ui`: run a daemon with content for every page of the dashboard, until Ctrl-C."""

from __future__ import annotations

import hmac
import http.client
import itertools
import random
import secrets
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any, Final
from urllib.parse import urlencode

from jobd.cli import exit_codes, terminal
from jobd.cli.daemon.dev import free_port
from jobd.cli.demo.processes import Sandbox
from jobd.client import AdminClient, JobClient

LINK_TTL_S: Final = 600.0
_ICON: Final = files("jobd") / "dashboard/static/icon.svg"  # the dashboard serves it to its own origin only
_BODY_BYTES: Final = 1 << 20
_TICK_S: Final = 1.5  # between two new e-mails
_STALL_EVERY: Final = 10  # ticks between two attempts to stall the archive job
_WORKERS: Final = {"email-1": "email", "video-1": "video", "video-2": "video", "report-1": "reports"}
_ARCHIVE: Final = "archive"  # a queue whose worker never reports
_MONTH_MS: Final = 30 * 86_400_000

# A stalled job remains until an operator or the next cleanup run recovers it. Completed jobs, which are most of the
# jobs, are kept for a short time to save disk space.
_CONFIG: Final = """\
[cleanup]
interval = "10m"
recover_every = "0"
[retention]
completed = "30m"
journal = "10m"
[alerts]
stalled_jobs = 0
[[webhooks]]
name = "billing"
url = "{receiver}"
allow_private = true
secret = "whsec_{secret}"
events = ["job.completed", "job.failed", "problem.*"]
"""
_FIRST: Final[list[dict[str, Any]]] = [
    {
        "id": "archive-2019",
        "queue": _ARCHIVE,
        "payload": {"file": "2019.mov"},
        "on_stall": "requeue",
        "max_stalls": 1_000,
    },
    {"id": "bounced-letter", "queue": "email", "kind": "newsletter", "payload": {"seconds": 1, "fails": "address"}},
    {"id": "mail-server-down", "queue": "email", "kind": "newsletter", "payload": {"seconds": 2, "fails": "smtp"}},
    {"id": "odd-camera", "queue": "video", "kind": "transcode", "payload": {"seconds": 3, "fails": "codec"}},
    {"id": "full-disk", "queue": "video", "kind": "render", "payload": {"seconds": 5, "fails": "disk"}},
    {"id": "year-2025", "queue": "reports", "kind": "yearly", "payload": {"seconds": 30}},  # runs into a timeout
    {"id": "month-end", "queue": "reports", "kind": "monthly", "payload": {"seconds": 5}, "delay_ms": _MONTH_MS},
    {"id": "sent-by-hand", "queue": "email", "kind": "newsletter", "payload": {"seconds": 1}, "delay_ms": 600_000},
    *(
        {"id": f"customers-{n:02}", "queue": "imports", "kind": "csv", "payload": {"file": f"customers-{n:02}.csv"}}
        for n in range(1, 13)
    ),
]


class Link:
    """A sign-in link. It works once, within ten minutes. `sign_in` returns the session's cookie."""

    def __init__(self, sign_in: Callable[[], str], clock_s: Callable[[], float] = time.monotonic) -> None:
        self.secret: Final = secrets.token_urlsafe(32)
        self._sign_in = sign_in
        self._clock_s = clock_s
        self._until_s = clock_s() + LINK_TTL_S
        self._is_open = True
        self._lock = threading.Lock()

    def matches(self, secret: str) -> bool:
        return hmac.compare_digest(secret.encode("utf-8", "surrogateescape"), self.secret.encode())

    def redeem(self) -> str | None:
        """Return a cookie, or None if the link was used or has expired."""
        with self._lock:
            valid, self._is_open = self._is_open and self._clock_s() < self._until_s, False
        return self._sign_in() if valid else None


class _LinkHandler(BaseHTTPRequestHandler):
    """Sign the browser in on a GET of the link. Accept webhooks on any POST."""

    server: _LocalServer

    def do_GET(self) -> None:
        if not self.server.link.matches(self.path.removeprefix("/")):
            self._respond(404, "This is not the link that `jobd demo --ui` printed.")
        elif (cookie := self.server.link.redeem()) is None:
            self._respond(410, "This link was used or has expired. Restart `jobd demo --ui` for a new one.")
        else:
            # Not a redirect: after a link on another site, browsers send no SameSite=Strict cookie with redirects.
            self._respond(
                200, f'<meta http-equiv="refresh" content="0; url={self.server.dashboard}">', {"Set-Cookie": cookie}
            )

    def do_POST(self) -> None:
        self.rfile.read(min(int(self.headers.get("Content-Length") or 0), _BODY_BYTES))
        self._respond(200, "")

    def _respond(self, status: int, text: str, more: dict[str, str] | None = None) -> None:
        body = f'<!doctype html><link rel="icon" href="{self.server.icon}">{text}'.encode()
        self.send_response(status)
        headers = {"Content-Type": "text/html; charset=utf-8", "Content-Length": str(len(body)), **(more or {})}
        for name, value in (headers | {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Write no access log."""


class _LocalServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, admin_port: int, token: str) -> None:
        super().__init__(("127.0.0.1", 0), _LinkHandler)
        self.dashboard = f"http://127.0.0.1:{admin_port}/"
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.icon = f"data:image/svg+xml;base64,{b64encode(_ICON.read_bytes()).decode()}"
        self.link = Link(lambda: _sign_in(admin_port, token))

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield
        finally:
            self.shutdown()
            thread.join()


def _sign_in(admin_port: int, token: str) -> str:
    """Sign in at the dashboard and return the cookie, which browsers send to every port of the host."""
    form = urlencode({"token": token, "name": "demo"})
    with closing(http.client.HTTPConnection("127.0.0.1", admin_port, timeout=30)) as connection:
        connection.request("POST", "/sign-in", form, {"Content-Type": "application/x-www-form-urlencoded"})
        response = connection.getresponse()
        cookie = response.getheader("Set-Cookie")
    if response.status != 303 or cookie is None:
        raise exit_codes.CliError(f"The dashboard did not sign the demo in: it responded with {response.status}.")
    return cookie


def show(stop: threading.Event) -> int:
    """Run the demo until `stop` is set."""
    port = free_port()
    secret = b64encode(secrets.token_bytes(32)).decode()
    with Sandbox("", f"127.0.0.1:{port}") as sandbox, _LocalServer(port, sandbox.token) as server, server.running():
        sandbox.config = _CONFIG.format(receiver=f"{server.url}webhook", secret=secret)
        sandbox.start_daemon()
        with sandbox.jobs() as client, AdminClient(f"http://127.0.0.1:{port}", token=sandbox.token) as admin:
            _prepare(client, admin)
            for name, queue in _WORKERS.items():
                sandbox.start_worker(name, queue)
            terminal.emit(f"{server.url}{server.link.secret}")
            sys.stdout.flush()  # a pipe is buffered
            terminal.say(
                "Open this link in a browser on this machine. It works once, for 10 minutes. Ctrl-C ends the demo."
            )
            _submit(client, stop)
        terminal.say("Stopping.")
    return exit_codes.DONE


def _prepare(client: JobClient, admin: AdminClient) -> None:
    """Create jobs in every status."""
    admin.pause_queue("imports", "the customers are still being checked")
    client.create_jobs(_FIRST)
    client.cancel_job("sent-by-hand", reason="The letter was sent by hand.")
    _stall(client)


def _stall(client: JobClient) -> None:
    """Claim the archive job if it is queued, and never report, so that it stalls again after each recovery."""
    if client.list_jobs(queue=_ARCHIVE, status="queued").jobs:
        client.claim(worker="archive-1", queues=[_ARCHIVE], lock_ttl_ms=1_000, stall_after_ms=0)


def _submit(client: JobClient, stop: threading.Event) -> None:
    """Submit new jobs, about as many as the workers can process. Some of them fail."""
    rng = random.Random(1)
    for tick in itertools.count():
        if stop.wait(_TICK_S):
            return
        if tick % _STALL_EVERY == 0:
            _stall(client)
        fails = rng.choices([None, "smtp", "address"], [18, 1, 1])[0]
        newsletter = {"seconds": 1, "fails": fails}
        retry = {"kind": "fixed", "base_ms": 1_000}
        client.create_job(
            newsletter, id=f"letter-{tick}", queue="email", kind="newsletter", max_attempts=2, backoff=retry
        )
        if tick % 4 == 0:
            report = {"seconds": rng.uniform(1, 5)}
            client.create_job(report, id=f"report-{tick}", queue="reports", kind="weekly")
        if tick % 6 == 0:
            clip = {"seconds": rng.uniform(6, 24), "fails": rng.choice([None] * 9 + ["codec"])}
            client.create_job(clip, id=f"clip-{tick}", queue="video", kind=rng.choice(["transcode", "thumbnails"]))
