"""Token rotation, and no secret in any output of the daemon."""

from __future__ import annotations

import asyncio
import base64
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from jobd.api import admin_routes as admin_api
from jobd.api import worker_routes as worker_api
from tests.support.daemon_process import DaemonProcess, DaemonResponse, call, free_port
from tests.support.http_harness import tls_pair
from tests.support.polling import poll_until
from tests.support.webhook_receiver import Receiver, echoing, raw_server

ADMIN = ["canary-admin-one-0123456789", "canary-admin-two-0123456789", "canary-admin-new-0123456789"]
WORKER = ["canary-worker-one-012345678", "canary-worker-two-012345678", "canary-worker-new-012345678"]
WRONG = "canary-wrong-0123456789-012"
SHORT = "canary-short"
LOCKS_SHOWN = {"/admin/job-management/locks", "/admin/job-management/jobs", "/admin/job-management/jobs/{id}"}
LOCKS_SHOWN |= {"/admin/job-management/validate-job", "/admin/job-management/backup"}


KEY = b"canary-webhook-0123456789"
SECRET = base64.b64encode(KEY).decode()
HOOK = f"""
[[webhooks]]
name = "hook"
url = "http://127.0.0.1:9/canary-path/hook?token=canary-query"
secret = "whsec_{SECRET}"
allow_private = true
"""


class TokenDaemon:
    """A daemon with token files, both APIs on TCP ports, at log level debug. `said` has all its responses."""

    def __init__(self, directory: Path, more: str = HOOK) -> None:
        self.files = {"admin": directory / "admin-token", "worker": directory / "worker-token"}
        self.ports = {name: free_port() for name in self.files}
        self.write(ADMIN[:2], WORKER[:2])
        places = {f"JOBD_{name.upper()}_LISTEN": f"127.0.0.1:{port}" for name, port in self.ports.items()}
        files = {f"JOBD_{name.upper()}_TOKEN_FILE": str(path) for name, path in self.files.items()}
        config = f"[log]\nlevel = 'debug'\n{more}"
        self.daemon = DaemonProcess(directory, config, variant="prompt_problems", **places, **files)
        del self.daemon.environ["ADMIN_TOKEN"]
        self.said: list[tuple[str, str]] = []

    def write(self, admin: list[str], worker: list[str]) -> None:
        self.files["admin"].write_text("\n".join(admin))
        self.files["worker"].write_text("\n".join(worker))

    def ask(self, api: str, token: str | None, method: str, path: str, body: Any = None) -> DaemonResponse:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        with closing(HTTPConnection("127.0.0.1", self.ports[api], timeout=30)) as connection:
            reply = call(connection, method, path, body, **headers)
        self.said.append((path, f"{reply.headers}{reply.body}"))
        return reply

    def statuses(self, api: str, path: str, *tokens: str) -> list[int]:
        return [self.ask(api, token, "GET", path).status for token in tokens]

    def raw(self, api: str, data: bytes) -> None:
        with socket.create_connection(("127.0.0.1", self.ports[api]), timeout=30) as client:
            client.sendall(data)
            self.said.append((repr(data), client.recv(65_536).decode()))

    def run(self, *arguments: str, module: str = "jobd", **environ: str) -> None:
        """Run a command of jobd or jobctl."""
        command = [sys.executable, "-m", module, *arguments]
        environ = {**self.daemon.environ, "JOBD_ADMIN_URL": f"http://127.0.0.1:{self.ports['admin']}", **environ}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=150, check=False)
        self.said.append((" ".join(arguments), f"{done.stdout}{done.stderr}"))


@pytest.fixture
def running(tmp_path: Path) -> Iterator[TokenDaemon]:
    opened = TokenDaemon(tmp_path)
    with opened.daemon:
        yield opened


STATS, LIST = "/admin/job-management/stats", "/v1/jobs"


def test_tokens_can_be_rotated_while_the_daemon_runs(running: TokenDaemon) -> None:
    assert running.statuses("admin", STATS, *ADMIN, *WORKER[:2], WRONG) == [200, 200, 401, 401, 401, 401]
    assert running.statuses("worker", LIST, *WORKER, *ADMIN[:2], WRONG) == [200, 200, 401, 401, 401, 401]
    running.write(ADMIN[1:], WORKER[1:])
    output = running.daemon.reload()
    assert "admin tokens" in output
    assert "worker tokens" in output
    assert running.statuses("admin", STATS, *ADMIN) == [401, 200, 200]
    assert running.statuses("worker", LIST, *WORKER) == [401, 200, 200]
    for bad in ([SHORT], [*ADMIN], [], ["canary-é-0123456789-0123456789"], ["canary with blanks 0123456789"]):
        running.write(bad, WORKER[:1])
        output = running.daemon.reload()
        assert "reload_failed" in output
        assert "canary" not in output
        assert running.statuses("admin", STATS, *ADMIN) == [401, 200, 200]
        assert running.statuses("worker", LIST, *WORKER) == [401, 200, 200]


@pytest.mark.slow
def test_no_output_contains_a_secret(running: TokenDaemon, tmp_path: Path) -> None:
    locks = _work(running)
    _read_everything(running)
    _send_wrong_requests(running, locks)
    _inspect_process(running)
    running.run("doctor", "--running", ADMIN_TOKEN=ADMIN[0])
    running.run("doctor", "--running", ADMIN_TOKEN=WRONG)
    running.run("check-config", "--config", str(running.daemon.config))
    running.run("backup", str(tmp_path / "copy.db"), ADMIN_TOKEN=ADMIN[0])
    assert (tmp_path / "copy.db").exists(), running.said[-1]
    assert running.daemon.stop() == 0
    running.run("doctor", str(running.daemon.store))
    running.run("serve", "--config", str(running.daemon.config), ADMIN_TOKEN=SHORT)
    running.said.append(("log", running.daemon.log.decode()))
    tokens = [*ADMIN, *WORKER, WRONG, SHORT, KEY.decode(), SECRET, "canary-query", "canary-path"]
    assert "event=granted" in running.said[-1][1], "the level is in force"
    assert "event=dump_task" in running.said[-1][1]
    for where, text in running.said:
        path = where.partition("?")[0].replace("held-1", "{id}")
        secrets = tokens if path in LOCKS_SHOWN else tokens + locks
        assert [secret for secret in secrets if secret in text] == [], where
    for file in (running.daemon.store, tmp_path / "copy.db"):
        assert not [token for token in tokens if token.encode() in file.read_bytes()], file


END = b"\r\n\r\n"
RUDE: dict[str, bytes] = {
    "no-http": b"SSH-2.0-",
    "rejection": b"HTTP/1.1 404 No" + END,
    "broken": b"HTTP/1.1 500 No\r\nContent-Length: 9999" + END,
    "redirect": b"HTTP/1.1 302 No\r\nLocation: http://[/" + END,
    "bad-redirect": b"HTTP/1.1 302 No\r\nLocation: http://[",
    "bad-status": b"HTTP/1.1 2\x000 ",
}
PLACE = "/canary-path/canary-more%2f?token=canary-query%20x"
CANARIES = ("canary-path", "canary-more", "canary-query", SECRET, KEY.decode())


@pytest.fixture
def hooks(tmp_path: Path) -> Iterator[tuple[str, Receiver]]:
    """Return a configuration of webhooks that fail in every way, and one for alerts."""
    with ExitStack() as stack:
        tls, _ = asyncio.run(tls_pair(tmp_path))
        ports = {name: stack.enter_context(raw_server(echoing(head))) for name, head in RUDE.items()}
        ports["too-large"] = stack.enter_context(raw_server(echoing(RUDE["rejection"], 200_000)))
        places = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
        places["rejected"] = f"http://127.0.0.1:{free_port()}"
        places["bad-url"], places["no-name"] = "http://300.300.300.300", "http://nobody.invalid"
        places["tls"] = f"https://127.0.0.1:{stack.enter_context(raw_server(echoing(b''), tls))}"
        places["no-tls"] = f"https://127.0.0.1:{ports['no-http']}"
        receiver = stack.enter_context(Receiver())
        blocks = [_block(name, f"{place}{PLACE}", "job.created") for name, place in places.items()]
        blocks.append(_block("receiver", f"http://127.0.0.1:{receiver.port}{PLACE}", "problem.*"))
        yield "[alerts]\nwebhook_failing = '0'\n" + "".join(blocks), receiver


def _block(name: str, url: str, events: str) -> str:
    where = f'name = "{name}"\nurl = "{url}"\nevents = ["{events}"]'
    return f'[[webhooks]]\n{where}\nsecret = "whsec_{SECRET}"\nallow_private = true\n'


@pytest.mark.slow
def test_of_a_webhook_url_only_the_host_is_shown(hooks: tuple[str, Receiver], tmp_path: Path) -> None:
    """However an attempt ends: not in the log, a list, a page, an alert, a message or the store."""
    config, receiver = hooks
    running = TokenDaemon(tmp_path, config)
    with running.daemon:
        running.ask("worker", WORKER[0], "POST", "/v1/jobs", {"id": "a"})
        names = [line.split('"')[1] for line in config.splitlines() if line.startswith("name = ")]
        poll_until(lambda: _tried(running) == len(names) - 1)
        receiver.wait_for(lambda response: bool(response))
        listed = running.ask("admin", ADMIN[0], "GET", "/admin/job-management/webhooks").data["webhooks"]
        assert {each["url"].rpartition("/")[2] for each in listed} == {"…"}
        for path in ("/webhooks", "/", "/alerts", "/metrics", "/admin/job-management/alerts"):
            assert running.ask("admin", ADMIN[0], "GET", path).status == 200, path
        for name in names:
            assert running.ask("admin", ADMIN[0], "GET", f"/webhooks/{name}").status == 200
            path = f"/admin/job-management/webhooks/{name}/deliveries"
            found = running.ask("admin", ADMIN[0], "GET", path).data["deliveries"]
            assert all(each["error"] for each in found) == (name != "receiver"), found
        running.daemon.reload()
        running.run("check-config", "--config", str(running.daemon.config))
        running.run("check-config", "--json", "--config", str(running.daemon.config))
        running.run("doctor", "--running", ADMIN_TOKEN=ADMIN[0])
        running.run("webhooks", ADMIN_TOKEN=ADMIN[0], module="jobd.cli.ctl.main")
        running.daemon.process.send_signal(signal.SIGUSR1)
        running.daemon.wait_for_log(b"event=dump_thread")
        assert running.daemon.stop() == 0
    running.said.append(("log", running.daemon.log.decode()))
    running.said += [("alert", each.body.decode()) for each in receiver.received]
    assert b"event=webhook_not_delivered" in running.daemon.log
    assert {where for where, text in running.said if any(secret in text for secret in CANARIES)} == set()
    assert [secret for secret in CANARIES if secret.encode() in running.daemon.store.read_bytes()] == []


def _tried(running: TokenDaemon) -> int:
    """Return how many webhooks have failed."""
    listed = running.ask("admin", ADMIN[0], "GET", "/admin/job-management/webhooks").data["webhooks"]
    return sum(each["last_error"] is not None for each in listed)


def _work(running: TokenDaemon) -> list[str]:
    """Make jobs in many states. Return the lock ids of all grants."""
    locks = []
    for number in range(6):
        job_id = f"held-{number}"
        made = {"id": job_id, "max_attempts": 2, "progress_timeout_ms": 1 if number == 5 else 0}
        assert running.ask("worker", WORKER[0], "POST", "/v1/jobs", made).status == 201
        lock = running.daemon.post(f"/v1/jobs/{job_id}/start", {"worker": "w"}, Idempotency_Key=job_id).data["lock_id"]
        running.daemon.post(f"/v1/jobs/{job_id}/start", {"worker": "w"}, Idempotency_Key=job_id)
        locks.append(lock)
    more: dict[str, dict[str, Any]] = {"progress": {"progress": 5}, "fail": {"error_message": "it broke"}}
    for number, verb in enumerate(("progress", "extend", "release", "complete", "fail")):
        body = {"lock_id": locks[number], **more.get(verb, {})}
        for _ in range(2):
            assert running.ask("worker", WORKER[0], "POST", f"/v1/jobs/held-{number}/{verb}", body).status == 200
    schedule = {"every_ms": 3_600_000, "job": {}}
    put = running.ask("admin", ADMIN[0], "PUT", "/admin/job-management/schedules/held-1", schedule)
    assert put.status == 201
    running.daemon.post("/v1/jobs", {"id": "claimed", "queue": "claims"})
    locks.append(running.daemon.post("/v1/claim", {"worker": "w", "queues": ["claims"]}).data["grants"][0]["lock_id"])
    return locks


def _read_everything(running: TokenDaemon) -> None:
    for api, token, table in (("worker", WORKER[0], worker_api.ROUTES), ("admin", ADMIN[0], admin_api.ROUTES)):
        for route in table:
            if route.method == "GET":
                query = "?jobId=held-1" if route.path.endswith("validate-job") else ""
                query = "?follow=false&last=1000" if route.path.endswith("/events") else query
                path = (
                    route.path.replace("{id}", "held-1").replace("{name}", "hook").replace("{plan_id}", "none") + query
                )
                status = 404 if path.endswith(("/artifact", "/plans/none")) else 200  # it has none
                assert running.ask(api, token, "GET", path).status == status, path


def _send_wrong_requests(running: TokenDaemon, locks: list[str]) -> None:
    """Cause errors that could repeat a secret."""
    for lock in locks:
        for path, body in (
            ("/v1/jobs/held-0/progress", {"lock_id": lock, "progress": 101}),
            ("/v1/jobs/held-0/progress", {"lock_id": [lock], "progress": 1}),
            ("/v1/jobs/held-2/complete", {"lock_id": lock, "expires_at": 1}),
            ("/v1/jobs/held-3/fail", {"lock_id": lock, "error_message": "late"}),
            ("/v1/jobs/held-5/extend", {"lock_id": lock}),
            ("/v1/jobs/held-4/release", {"lock_id": lock, "delay_ms": lock}),
            ("/v1/jobs", {"id": f"{lock} "}),
            ("/v1/jobs", {"on_stall": lock}),
        ):
            assert running.ask("worker", WORKER[0], "POST", path, body).status in (200, 400, 409)
    for number, token in enumerate((*ADMIN, *WORKER, WRONG)):
        api = ("admin", "worker")[number % 2]
        running.raw(api, f"GET /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\x00\r\n\r\n".encode())
        running.raw(api, f"GET /v1/jobs HTTP/1.1\r\nAuthorization : Bearer {token}\r\n\r\n".encode())
        running.raw(api, f"GET /nothing?token={token} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        assert running.ask(api, WRONG, "POST", f"/v1/{token}", {"token": token}).status == 401


def _inspect_process(running: TokenDaemon) -> None:
    """Read metrics, dumps and /proc while jobs are processing."""
    process = running.daemon.process
    with closing(running.daemon.worker()) as parked:
        parked.request(
            "POST",
            "/v1/claim",
            '{"worker": "w", "queues": ["none"], "wait_ms": 60000}',
            {"Content-Type": "application/json"},
        )
        while b"jobd_parked_claims 1.0" not in running.ask("admin", ADMIN[0], "GET", "/metrics").body:
            pass
        process.send_signal(signal.SIGUSR1)
        running.daemon.wait_for_log(b"event=dump_thread")
    running.write([SHORT], WORKER)
    running.daemon.reload()
    running.write(ADMIN[:2], WORKER[:2])
    running.daemon.reload()
    proc = Path(f"/proc/{process.pid}")
    for name in ("cmdline", "comm", "status", "maps"):
        running.said.append((name, (proc / name).read_bytes().decode()))
