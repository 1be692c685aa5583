"""Notifications and sockets of systemd over real sockets, and the units as systemd checks them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import pytest

from jobd import systemd
from jobd.cli import exit_codes
from jobd.cli.ctl.main import jobctl
from jobd.config_loader import load
from tests import ROOT
from tests.conftest import tool_missing
from tests.support.cli_harness import commands_of
from tests.support.daemon_process import DaemonProcess
from tests.support.forked_process import ForkedDaemon

UNITS = ROOT / "systemd"

SAID: list[tuple[Callable[[], bool], str]] = [
    (systemd.ready, "READY=1"),
    (systemd.stopping, "STOPPING=1"),
    (systemd.alive, "WATCHDOG=1"),
    (lambda: systemd.extend_timeout(60.0), "EXTEND_TIMEOUT_USEC=60000000"),
    (lambda: systemd.status("two\nlines é"), "STATUS=two lines é"),
]


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The receiving end of $NOTIFY_SOCKET."""
    path, name = str(tmp_path / "notify"), f"jobd-test-{os.getpid()}-{time.monotonic_ns()}"
    address, shown = (path, path) if request.param == "path" else ("\0" + name, "@" + name)
    monkeypatch.setenv("NOTIFY_SOCKET", shown)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(address)
        receiver.settimeout(60)
        yield receiver


@pytest.mark.parametrize(("send", "expected"), SAID, ids=[text for _, text in SAID])
def test_each_state_is_one_datagram(manager: socket.socket, send: Callable[[], bool], expected: str) -> None:
    assert send() is True
    assert manager.recv(1000).decode() == expected


def test_a_reload_carries_its_timestamp(manager: socket.socket) -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert systemd.reloading() is True
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    first, second = manager.recv(1000).decode().split("\n")
    assert first == "RELOADING=1"
    name, _, moment_us = second.partition("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(moment_us) <= after


def test_without_a_manager_nothing_is_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert systemd.ready() is False
    for unusable in ("", "relative", "vsock:1:2", str(tmp_path / "nobody"), "/" + "x" * 200):
        monkeypatch.setenv("NOTIFY_SOCKET", unusable)
        assert systemd.reloading() is False


def test_a_manager_that_reads_nothing_does_not_block_us(manager: socket.socket) -> None:
    sent = 0
    while systemd.alive():
        sent += 1
        assert sent < 100_000
    assert sent > 0
    assert manager.recv(1000) == b"WATCHDOG=1"
    assert systemd.alive() is True


async def test_notifying_does_not_block_the_loop(manager: socket.socket) -> None:
    assert systemd.ready() is True
    assert manager.recv(1000) == b"READY=1"


at_a_path = pytest.mark.parametrize("manager", ["path"], indirect=True)


@at_a_path
def test_a_reload_ends_after_its_result_is_logged(manager: socket.socket, tmp_path: Path) -> None:
    """`systemctl reload` returns with READY=1, and its caller may read the log at once."""
    with (
        (tmp_path / "log").open("wb") as stderr,
        DaemonProcess.not_started(tmp_path, variant="slow_log", NOTIFY_SOCKET=os.environ["NOTIFY_SOCKET"]) as daemon,
    ):
        daemon.launch(stderr.fileno())
        wait_for(manager, b"READY=1")
        daemon.config.write_text("[locks]\nttl = 'soon'\n")
        for number in range(1, 4):
            daemon.process.send_signal(signal.SIGHUP)
            wait_for(manager, b"READY=1")
            assert (tmp_path / "log").read_bytes().count(b"event=reload_failed") == number


@pytest.mark.slow
@at_a_path
def test_a_reload_ends_after_an_internal_error(manager: socket.socket, tmp_path: Path) -> None:
    with ForkedDaemon(tmp_path, variant="failing_reload", NOTIFY_SOCKET=os.environ["NOTIFY_SOCKET"]) as daemon:
        wait_for(manager, b"READY=1")
        daemon.process.send_signal(signal.SIGHUP)
        wait_for(manager, b"READY=1")
        daemon.wait_for_log(b"event=reload_failed")
        assert daemon.post("/v1/jobs", {"id": "job-1"}).status == 201
        assert daemon.stop() == 0


@pytest.mark.slow
@at_a_path
def test_a_long_start_is_not_ended(manager: socket.socket, tmp_path: Path) -> None:
    with ForkedDaemon.not_started(tmp_path, variant="slow_start", NOTIFY_SOCKET=os.environ["NOTIFY_SOCKET"]) as daemon:
        daemon.launch()
        for _ in range(3):
            assert manager.recv(1000).startswith(b"EXTEND_TIMEOUT_USEC=")
        wait_for(manager, b"READY=1")
        assert daemon.stop() == 0


@pytest.mark.slow
@at_a_path
def test_a_start_without_progress_is_ended(manager: socket.socket, tmp_path: Path) -> None:
    with ForkedDaemon.not_started(tmp_path, variant="hung_start", NOTIFY_SOCKET=os.environ["NOTIFY_SOCKET"]) as daemon:
        daemon.launch()
        states = []
        while b"READY=1" not in states:
            states.append(manager.recv(1000))
        assert 1 <= sum(state.startswith(b"EXTEND_TIMEOUT_USEC=") for state in states) < 10
        assert daemon.stop() == 0


def wait_for(manager: socket.socket, state: bytes) -> None:
    while manager.recv(1000) != state:
        pass


@pytest.mark.parametrize(
    ("wait_us", "pid", "expected"),
    [
        ("30000000", None, 30.0),
        ("30000000", "ours", 30.0),
        ("1500", "ours", 0.0015),
        ("30000000", "1", None),
        ("0", "ours", None),
        (None, "ours", None),
        (None, None, None),
    ],
)
def test_the_watchdog_timeout_is_read(
    monkeypatch: pytest.MonkeyPatch, wait_us: str | None, pid: str | None, expected: float | None
) -> None:
    for name, value in (("WATCHDOG_USEC", wait_us), ("WATCHDOG_PID", str(os.getpid()) if pid == "ours" else pid)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert systemd.watchdog_s() == expected
    assert systemd.watchdog_s() is None, "the variables were taken out"
    assert not {"WATCHDOG_USEC", "WATCHDOG_PID"} & set(os.environ)


def test_a_watchdog_timeout_that_is_not_a_number_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "soon")
    with pytest.raises(ValueError, match="soon"):
        systemd.watchdog_s()


# A process as systemd starts it: sockets from descriptor 3 on, its pid in LISTEN_PID.
STARTED = """
import json, os, sys
os.environ["LISTEN_PID"] = sys.argv[1].replace("ours", str(os.getpid()))
from jobd import systemd
found = systemd.sockets()
print(json.dumps({
    "names": {name: [s.getsockname() for s in given] for name, given in found.items()},
    "families": sorted({s.family.name for given in found.values() for s in given}),
    "careful": all(not s.getblocking() and not s.get_inheritable() for given in found.values() for s in given),
    "left": [name for name in os.environ if name.startswith("LISTEN_")],
    "again": len(systemd.sockets()),
}))
"""


def started(opened: Sequence[socket.socket | IO[bytes]], pid: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run STARTED with `opened` as its descriptors from 3 on."""
    high = [os.dup(each.fileno()) for each in opened]
    moves = "".join(f" {3 + index}<&{given}" for index, given in enumerate(high))
    try:
        return subprocess.run(
            ["/bin/bash", "-c", f'exec "$@"{moves}', "-", sys.executable, "-c", STARTED, pid],
            pass_fds=high,
            capture_output=True,
            text=True,
            env={**os.environ, **environ},
            check=False,
        )
    finally:
        for given in high:
            os.close(given)


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[list[socket.socket]]:
    """Two Unix sockets and a TCP one."""
    opened = [socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_INET)]
    for index, each in enumerate(opened):
        each.bind(("127.0.0.1", 0) if each.family == socket.AF_INET else str(tmp_path / str(index)))
        each.listen()
    yield opened
    for each in opened:
        each.close()


def test_sockets_are_returned_by_name(listening: list[socket.socket], tmp_path: Path) -> None:
    done = started(listening, "ours", LISTEN_FDS="3", LISTEN_FDNAMES="worker:worker:admin")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["names"] == {
        "worker": [str(tmp_path / "0"), str(tmp_path / "1")],
        "admin": [list(listening[2].getsockname())],
    }
    assert found["families"] == ["AF_INET", "AF_UNIX"]
    assert found["careful"] is True
    assert found["left"] == []
    assert found["again"] == 0


@pytest.mark.parametrize("names", [{}, {"LISTEN_FDNAMES": ""}])
def test_sockets_without_a_name_are_unknown(listening: list[socket.socket], names: dict[str, str]) -> None:
    found = json.loads(started(listening[:1], "ours", LISTEN_FDS="1", **names).stdout)
    assert list(found["names"]) == ["unknown"]


@pytest.mark.parametrize(("pid", "environ"), [("1", {"LISTEN_FDS": "1"}), ("", {"LISTEN_FDS": "1"}), ("ours", {})])
def test_sockets_for_another_process_are_ignored(
    listening: list[socket.socket], pid: str, environ: dict[str, str]
) -> None:
    found = json.loads(started(listening[:1], pid, **environ).stdout)
    assert found["names"] == {}
    assert found["left"] == []


def test_a_descriptor_that_is_not_a_socket_is_an_error(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        done = started([file], "ours", LISTEN_FDS="1")
    assert done.returncode == 1
    assert "OSError" in done.stderr


# -- the units ---------------------------------------------------------------------------------------------------------


def analyze(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        tool_missing("systemd-analyze", "systemd")
    return subprocess.run(["systemd-analyze", *argv], capture_output=True, text=True, check=False)


@pytest.fixture(params=["tcp", "unix-only", "cluster"])
def installed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Make a directory of units, with and without the drop-ins, for this jobd."""
    for unit in (*UNITS.glob("*.service"), *UNITS.glob("*.socket")):
        here = unit.read_text(encoding="utf-8").replace("/opt/jobd/bin/jobd", "/bin/true")
        (tmp_path / unit.name).write_text(here, encoding="utf-8")
    if request.param != "tcp":
        shutil.copytree(UNITS / request.param, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_systemd_accepts_the_units(installed: Path) -> None:
    done = analyze("verify", "--man=no", *sorted(installed.glob("jobd*.s*[te]")))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("installed", "max_exposure"), [("tcp", 1.3), ("unix-only", 0.6), ("cluster", 1.3)], indirect=["installed"]
)
def test_the_sandbox_is_tight(installed: Path, max_exposure: float) -> None:
    done = analyze("security", "--offline=true", "--no-pager", installed / "jobd.service")
    level = re.search(r"Overall exposure level for jobd\.service: (\d+\.\d+)", done.stdout)
    assert level is not None, done.stdout + done.stderr
    assert float(level[1]) <= max_exposure, done.stdout


def test_systemd_accepts_the_unit_of_a_worker(tmp_path: Path) -> None:
    unit = tmp_path / "shop-worker.service"
    text = (UNITS / "worker" / unit.name).read_text(encoding="utf-8")
    unit.write_text(text.replace("/opt/shop/bin/jobctl", "/bin/true"), encoding="utf-8")
    done = analyze("verify", "--man=no", unit)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    done = analyze("security", "--offline=true", "--no-pager", "--threshold=15", unit)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_unit_of_a_worker_waits_for_its_jobs_and_starts_again() -> None:
    unit = dict(settings_of(UNITS / "worker/shop-worker.service"))
    program, *words = shlex.split(unit["ExecStart"])
    assert Path(program).name == "jobctl"
    parsed = commands_of(jobctl)[words[0]].make_context(words[0], words[1:]).params
    stop_s = int(unit["TimeoutStopSec"].removesuffix("s"))
    assert stop_s > parsed["grace"] / 1000 + 10, "a task that ignores the end of its grace is killed 10 s later"
    assert unit["Restart"] == "on-failure"
    assert unit["RestartPreventExitStatus"] == str(exit_codes.CONFIG)


def settings_of(path: Path) -> list[tuple[str, str]]:
    pairs = [line.partition("=") for line in path.read_text(encoding="utf-8").splitlines()]
    return [(name, value) for name, equals, value in pairs if equals and not name.startswith("#")]


def test_the_unit_restarts_for_ever_except_on_a_bad_configuration() -> None:
    unit = dict(settings_of(UNITS / "jobd.service"))
    assert unit["Type"] == "notify-reload"
    assert unit["Restart"] == "always"
    assert unit["StartLimitIntervalSec"] == "0"
    assert unit["RestartPreventExitStatus"] == "78"
    assert {"WatchdogSec", "RestartSteps"} <= set(unit)
    # systemd never resets its count of restarts: after a few crashes, every restart waits for the longest delay.
    assert unit["RestartMaxDelaySec"] == "2s"


def test_the_sockets_outlive_the_daemon_and_are_named_after_its_listeners() -> None:
    """RuntimeDirectory= would remove the sockets on a stop, PropagatesStopTo= on a crash."""
    service = dict(settings_of(UNITS / "jobd.service"))
    assert not {"RuntimeDirectory", "PropagatesStopTo"} & set(service)
    for name in ("worker", "admin"):
        unit = dict(settings_of(UNITS / f"jobd-{name}.socket"))
        assert unit["FileDescriptorName"] == name
        assert f"jobd-{name}.socket" in service["Requires"]
    assert dict(settings_of(UNITS / "jobd-worker.socket"))["SocketMode"] == "0660"
    groups = (UNITS / "jobd.sysusers").read_text(encoding="utf-8")
    sockets = [*UNITS.glob("*.socket"), UNITS / "unix-only/jobd-admin.socket.d/unix-only.conf"]
    for group in (dict(settings_of(path)).get("SocketGroup") for path in sockets):
        assert group is None or f"g {group} -" in groups


@pytest.mark.parametrize("name", ["worker", "admin"])
def test_crashes_under_load_never_disable_a_socket(name: str) -> None:
    assert dict(settings_of(UNITS / f"jobd-{name}.socket"))["TriggerLimitIntervalSec"] == "0"


@pytest.mark.parametrize("code", [74, 75, 78])
def test_a_start_that_fails_under_load_is_delayed(code: int) -> None:
    command = dict(settings_of(UNITS / "jobd.service"))["ExecStopPost"].removeprefix("-")
    script = shlex.split(command)[2]
    shell_script = "sleep() { echo slept $1; }; " + script
    run = ["/bin/sh", "-c", shell_script]
    for status, said in ((code, "slept 2\n"), (0, ""), (9, "")):
        done = subprocess.run(run, env={"EXIT_STATUS": str(status)}, capture_output=True, text=True, check=True)
        assert done.stdout == said


def test_the_configuration_of_a_cluster_is_valid(tmp_path: Path) -> None:
    directory, credentials = UNITS / "cluster", "/run/credentials/jobd.service"
    config = (directory / "config.toml").read_text(encoding="utf-8")
    lines = shlex.split((directory / "node.env").read_text(encoding="utf-8"), comments=True)
    environ = dict(line.split("=", 1) for line in lines)
    (tmp_path / "worker_token").write_text("x" * 24, encoding="utf-8")
    (tmp_path / "worker_token").chmod(0o600)
    (tmp_path / "config.toml").write_text(config.replace(credentials, str(tmp_path)), encoding="utf-8")
    loaded = load({}, {**environ, "ADMIN_TOKEN": "y" * 24}, str(tmp_path / "config.toml"))
    assert loaded.warnings == ()
    assert loaded.config.node.advertise == "https://a.example:8771"
    for name, value in settings_of(directory / "jobd.service.d/cluster.conf"):
        if name == "LoadCredential":
            assert f"{credentials}/{value.partition(':')[0]}" in config
