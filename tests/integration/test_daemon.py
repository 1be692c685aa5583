"""The real process on a real disk: signals, reloads, stops with pending requests, exit codes."""

from __future__ import annotations

import asyncio
import http.client
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from msgspec.structs import replace

from jobd.engine.clock import wall_clock_ms
from jobd.model.job import HOUR_MS
from jobd.model.storage import Batch
from jobd.storage.backup import restore
from jobd.storage.store import Store
from tests.conftest import tool_missing
from tests.support.daemon_process import DaemonResponse, call, free_port
from tests.support.factories import ChangeFactory
from tests.support.forked_process import ForkedDaemon


@pytest.mark.slow
def test_no_lock_expires_while_the_daemon_stops(tmp_path: Path) -> None:
    """A slow request delays the stop for longer than a lock lasts."""
    with ForkedDaemon(tmp_path, '[cleanup]\nrecover_every = "1s"\n') as daemon, closing(daemon.worker()) as slow:
        daemon.post("/v1/jobs", {"id": "a"})
        slow.connect()
        slow.sock.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: jobd\r\nContent-Type: application/json\r\n")
        slow.sock.sendall(b"Content-Length: 14\r\n\r\n{")
        grant = daemon.post("/v1/jobs/a/start", {"worker": "w-1", "lock_ttl_ms": 2500, "stall_after_ms": 0}).data
        daemon.process.terminate()
        daemon.wait_for_log(b"event=stopping")
        time.sleep(4)  # the lock would have expired, and recovery have run
        slow.sock.sendall(b'"id": "slow"}')
        assert b" 201 " in slow.sock.recv(1000)
        assert daemon.process.wait() == 0
        daemon.start()
        job = daemon.get("/v1/jobs/a").data
        assert job["status"] == "processing"
        assert daemon.post("/v1/jobs/a/complete", {"lock_id": grant["lock_id"]}).data["status"] == "completed"


@pytest.mark.slow
def test_a_restore_ends_the_grants_of_the_copy_and_issues_higher_tokens(tmp_path: Path) -> None:
    """The backup does not contain what the holders did since, so they get `lock_lost`."""
    copy = tmp_path / "copy.db"
    with ForkedDaemon(tmp_path) as daemon:
        daemon.post("/v1/jobs", {"id": "a"})
        daemon.post("/v1/jobs", {"id": "waits"})
        old = daemon.post("/v1/jobs/a/start", {"worker": "w-1"}).data
        copy.write_bytes(daemon.admin("GET", "/admin/job-management/backup").body)
        later = daemon.post("/v1/jobs/waits/start", {"worker": "w-2"}).data
        daemon.stop()
        restore(str(copy), str(daemon.store))
        daemon.start()
        assert {job["id"]: job["status"] for job in daemon.get("/v1/jobs").data["jobs"]} == {
            "a": "queued",
            "waits": "queued",
        }
        late = daemon.post("/v1/jobs/a/complete", {"lock_id": old["lock_id"]})
        assert (late.status, late.error, late.body["details"]["rule"]) == (409, "lock_lost", "restore")
        repeated = daemon.post("/v1/jobs/a/start", {"worker": "w-3"}).data
        assert repeated["fencing_token"] > later["fencing_token"] > old["fencing_token"]


OWN_DIRECTORY = "a separate directory"
NOT_A_FILE = "store.path must name a file in a directory"


@pytest.mark.parametrize(
    ("config", "environ", "expected"),
    [
        ("[locks]\nttl = 15\n", {}, "locks.ttl"),
        ("[worker]\nlisten = '127.0.0.1:0'\n", {}, "worker.token_file"),
        ("", {"ADMIN_TOKEN": "hunter2"}, "24 characters"),
        ("", {"JOBD_ARTIFACTS_URL": "file://{}/."}, OWN_DIRECTORY),
        ("", {"JOBD_ARTIFACTS_URL": "file://{}/link"}, OWN_DIRECTORY),
        ("", {"JOBD_STORE_PATH": "{}/directory"}, NOT_A_FILE),
        ("", {"JOBD_STORE_PATH": "{}/file/jobd.db"}, NOT_A_FILE),
        ("", {"JOBD_STORE_PATH": "{}/file"}, "/file is not a jobd database: set store.path to another file"),
    ],
)
def test_a_wrong_configuration_is_exit_78(tmp_path: Path, config: str, environ: dict[str, str], expected: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("text")
    code, log = ForkedDaemon(
        tmp_path, config, **{name: value.format(tmp_path) for name, value in environ.items()}
    ).failed_start()
    assert code == 78, log
    assert expected in log
    assert "hunter2" not in log
    assert (tmp_path / "file").read_text() == "text"


def test_workers_may_use_any_host_name_over_tcp(tmp_path: Path) -> None:
    """On the worker listener only the token counts, because no browser uses it."""
    token, port = tmp_path / "worker-token", free_port()
    token.write_text("w" * 32)
    places = {"JOBD_WORKER_LISTEN": f"127.0.0.1:{port}", "JOBD_WORKER_TOKEN_FILE": str(token)}
    with (
        ForkedDaemon(tmp_path, **places),
        closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as client,
    ):

        def status(path: str, bearer: str) -> int:
            client.request("GET", path, headers={"Host": f"jobs.example:{port}", "Authorization": f"Bearer {bearer}"})
            response = client.getresponse()
            response.read()
            return response.status

        assert [status("/v1/queues", "w" * 32), status("/v1/queues", "x" * 32), status("/healthz", "")] == [
            200,
            401,
            200,
        ]


@pytest.mark.slow
def test_a_hanging_artifact_directory_does_not_block_the_stop(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    url = f"file://{tmp_path / 'results'}"
    with ForkedDaemon(tmp_path, variant="hanging_mount", JOBD_ARTIFACTS_URL=url) as daemon:
        assert daemon.admin("GET", "health").data["storage"]["status"] == "unhealthy"
        assert daemon.stop() == 0
        daemon.start()
        daemon.process.send_signal(signal.SIGUSR2)  # makes the disk of the store fail
        with suppress(OSError, http.client.HTTPException):
            daemon.post("/v1/jobs", {"id": "a"})
        assert daemon.process.wait(150) == 74


@pytest.mark.slow
def test_a_hanging_actor_does_not_feed_the_watchdog(tmp_path: Path) -> None:
    """The event loop still runs, and could feed a watchdog that checks only the loop."""
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(150)
        own = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "100000"}
        with ForkedDaemon(tmp_path, variant="hung_actor", **own) as daemon:
            while systemd.recv(4096) != b"WATCHDOG=1":
                pass
            daemon.process.send_signal(signal.SIGUSR2)
            systemd.settimeout(2)
            signs = 0
            with suppress(TimeoutError):
                while signs < 50:  # the last few were in flight
                    signs += systemd.recv(4096) == b"WATCHDOG=1"
            assert signs < 50


@pytest.mark.slow
def test_a_new_store_is_logged(tmp_path: Path) -> None:
    """A wrong path creates an empty store, so the log says so."""
    with ForkedDaemon(tmp_path) as daemon:
        line = next(line for line in daemon.log.decode().splitlines() if "event=store_created" in line)
        assert "level=info" in line
        assert line.endswith(f"path={tmp_path}/jobd.db")
        assert daemon.stop() == 0
    with ForkedDaemon(tmp_path) as daemon:
        assert b"event=store_created" not in daemon.log
    store = tmp_path / "no/such/jobd.db"
    with ForkedDaemon(tmp_path, JOBD_STORE_PATH=str(store)) as daemon:
        line = next(line for line in daemon.log.decode().splitlines() if "event=store_created" in line)
        assert "level=warning" in line
        assert f"path={store} " in line
    for path in tmp_path.glob("jobd.db*"):
        path.unlink()
    own = {"JOBD_STORE_PATH": str(tmp_path / "state/jobd.db"), "STATE_DIRECTORY": str(tmp_path / "state")}
    with ForkedDaemon(tmp_path, **own) as daemon:
        assert b"level=info event=store_created" in daemon.log


def test_a_start_whose_address_is_taken_leaves_no_files(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        own = {"JOBD_ADMIN_LISTEN": f"127.0.0.1:{other.getsockname()[1]}", "JOBD_STORE_PATH": f"{tmp_path}/new/jobd.db"}
        assert ForkedDaemon(tmp_path, **own).failed_start()[0] == 75
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


def test_sighup_applies_reloadable_keys_and_keeps_the_old_on_error(tmp_path: Path) -> None:
    with ForkedDaemon(tmp_path) as daemon:
        output = daemon.reload("[locks]\nttl = '5m'\n[limits]\nbody = 2000000\n")
        assert "locks.ttl" in output
        assert "limits.body" in output
        daemon.post("/v1/jobs", {"id": "a"})
        assert daemon.post("/v1/jobs/a/start", {"worker": "w"}).data["ttl_ms"] == 300_000
        assert "reload_failed" in daemon.reload("[locks]\nttl = 'soon'\n")
        daemon.post("/v1/jobs", {"id": "b"})
        assert daemon.post("/v1/jobs/b/start", {"worker": "w"}).data["ttl_ms"] == 300_000


@pytest.mark.slow
def test_a_start_and_a_reload_warn_about_doubtful_settings(tmp_path: Path) -> None:
    with ForkedDaemon(tmp_path, "[cleanup]\ninterval = '30s'\n", JOBD_LOCKS_TTL="1h") as daemon:
        assert daemon.log.count(b"event=config_warning") == 2
        assert b"cleanup.min_interval" in daemon.log
        assert b"locks.progress_timeout" in daemon.log
        daemon.reload("[cleanup]\ninterval = '1m'\n")
        warnings = [line for line in daemon.log.splitlines() if b"level=warning event=config_warning" in line]
        assert len(warnings) == 3  # a warning is not repeated
        assert b"1m" in warnings[2]


async def _left_suspect(store: Path, expected_ms: int) -> None:
    """Make a store whose daemon ended while its clock was suspect."""
    disk, found = await Store.open(str(store))
    await disk.write(Batch([], replace(found.numbers, wall_ms=expected_ms, clock_suspect=True)))
    await disk.close()


async def _left_with_a_job_from_the_future(store: Path) -> None:
    """Make a store whose job was created an hour ahead, and whose last commit was made now."""
    disk, found = await Store.open(str(store))
    maker = ChangeFactory(numbers=found.numbers)
    maker.now = wall_clock_ms() + HOUR_MS
    batch = maker.batch([maker.create("a")])
    await disk.write(replace(batch, numbers=replace(batch.numbers, lock_ms=0, wall_ms=wall_clock_ms())))
    await disk.close()


def test_a_job_that_a_step_of_the_clock_has_missed_is_due_after_a_start(tmp_path: Path) -> None:
    asyncio.run(_left_with_a_job_from_the_future(tmp_path / "jobd.db"))
    with ForkedDaemon(tmp_path) as daemon:
        assert daemon.post("/v1/jobs/a/start", {"worker": "w"}).status == 200
        assert daemon.get("/v1/jobs/a").data["run_at"] <= wall_clock_ms()


def test_a_reloaded_retention_limits_how_far_ahead_the_clock_may_be(tmp_path: Path) -> None:
    asyncio.run(_left_suspect(tmp_path / "jobd.db", wall_clock_ms() - 20 * HOUR_MS))
    with ForkedDaemon(tmp_path) as daemon:
        assert not daemon.admin("GET", "clock").data["suspect"]
        daemon.reload("[retention]\ncancelled = '1d'\n")
        assert daemon.admin("GET", "clock").data["suspect"]


@pytest.mark.slow
def test_a_stop_waits_until_all_due_jobs_are_kept_due(tmp_path: Path) -> None:
    with ForkedDaemon(tmp_path, variant="hour_ahead") as daemon:
        for first in range(0, 20_000, 1_000):
            jobs = [{"id": f"job-{first + number}"} for number in range(1_000)]
            assert daemon.post("/v1/jobs/bulk", {"jobs": jobs}).status == 201
        daemon.kill()
        daemon.variant = ""
        daemon.start()
        daemon.stop()
        daemon.start()
        assert daemon.post("/v1/jobs/job-19999/start", {"worker": "w"}).status == 200


def test_sigusr1_dumps_tasks_at_every_log_level(tmp_path: Path) -> None:
    with ForkedDaemon(tmp_path) as daemon:
        daemon.config.write_text('[log]\nlevel = "error"\n')
        daemon.process.send_signal(signal.SIGHUP)
        for _ in range(10):
            assert daemon.get("/healthz").status == 200  # the daemon handles signals between requests
        daemon.process.send_signal(signal.SIGUSR1)
        assert daemon.stop() == 0
        assert b"event=stopping" not in daemon.log, "the level is in force"
        assert b"event=dump_task" in daemon.log
        assert "mailbox=" in daemon.wait_for_log(b"event=dump ")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_while_the_store_is_opened(tmp_path: Path, number: signal.Signals) -> None:
    with ForkedDaemon.not_started(tmp_path, variant="endless_start") as daemon:
        daemon.launch()
        daemon.wait_for_log(b"opens: store")
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_for_log(b"event=reload_ignored")
        daemon.process.send_signal(signal.SIGUSR1)
        daemon.wait_for_log(b"event=dump_thread")
        assert daemon.stop(number) == 0
        assert b"event=stopped" in daemon.log


@pytest.mark.slow
def test_sigterm_while_the_listeners_are_opened_stops_the_daemon(tmp_path: Path) -> None:
    with ForkedDaemon.not_started(tmp_path, variant="stopped_start") as daemon:
        daemon.launch()
        daemon.wait_for_log(b"event=stopped")
        assert daemon.process.wait(150) == 0


@pytest.mark.slow
def test_development_without_a_token_says_everywhere_that_jobs_are_in_memory(tmp_path: Path) -> None:
    text, port = "in memory: lost when the daemon stops", free_port()
    with ForkedDaemon.not_started(tmp_path, ENVIRONMENT="development", JOBD_ADMIN_LISTEN=f"127.0.0.1:{port}") as daemon:
        del daemon.environ["ADMIN_TOKEN"], daemon.environ["JOBD_STORE_PATH"]
        daemon.launch()
        assert "environment ENVIRONMENT" in daemon.wait_for_log(text.encode())
        link = daemon.wait_for_log(b"Sign in: ").split()[-1]
        start, _, token = link.partition("#")
        assert start == f"http://127.0.0.1:{port}/sign-in"
        daemon.wait_for_log(b"event=ready")
        for path in ("/admin/job-management/stats", "/admin/job-management/health", "/"):
            with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
                shown = call(connection, "GET", path, Authorization=f"Bearer {token}")
            assert text in str(shown.body), path


@contextmanager
def creating_a_job(daemon: ForkedDaemon, fault: str) -> Iterator[Future[DaemonResponse]]:
    """Create the job `a` with `fault` in its fdatasync. Yield the pending response once the commit is there."""
    if shutil.which("strace") is None:
        tool_missing("strace", "strace")
    inject = ["-e", "trace=fdatasync", "-e", f"inject=fdatasync:{fault}"]
    command = ["strace", "-f", "-p", str(daemon.process.pid), *inject]
    with subprocess.Popen(command, stderr=subprocess.PIPE, bufsize=0) as strace, ThreadPoolExecutor(1) as pool:
        assert strace.stderr is not None
        strace.stderr.readline()  # attached
        pending = pool.submit(daemon.post, "/v1/jobs", {"id": "a"})
        output = b""
        while b"fdatasync(" not in output:
            output += strace.stderr.read(100)
        try:
            yield pending
        finally:
            strace.terminate()
            strace.stderr.read()


@pytest.mark.slow
def test_a_commit_that_fails_while_the_daemon_stops_is_exit_74(tmp_path: Path) -> None:
    with ForkedDaemon(tmp_path) as daemon, creating_a_job(daemon, "error=EIO:delay_enter=1s") as pending:
        assert daemon.stop() == 74, daemon.log.decode()
        assert pending.result().error == "outcome_unknown"


@pytest.mark.slow
def test_a_last_slice_that_fails_is_exit_74_and_loses_nothing(tmp_path: Path) -> None:
    with ForkedDaemon(tmp_path, variant="failing_last_slice") as daemon:
        assert daemon.post("/v1/jobs", {"id": "a"}).status == 201
        assert daemon.stop() == 74, daemon.log.decode()
        assert b"event=stopped_by_disk" in daemon.log
        daemon.variant = ""
        daemon.start()
        assert daemon.get("/v1/jobs/a").data["status"] == "queued"
