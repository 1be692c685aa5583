"""A nested machine: a real systemd as PID 1 in namespaces, with jobd installed as systemd/README.md describes.

All writes go to memory, and everything in it ends with the process that made it.
`python -m tests.proof.faults.machine DIRECTORY CONSOLE tcp|unix-only` is its first process, which becomes systemd.
"""

from __future__ import annotations

import ctypes
import http.client
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from tests import ROOT
from tests.proof.faults.harness import Tool, program
from tests.support.daemon_process import TOKEN, ApiCalls, UnixConnection, die_with_us

SYSTEMD: Final = Path("/usr/lib/systemd/systemd")
SPACES: Final = ("--mount", "--pid", "--net", "--ipc", "--cgroup")
UP_S: Final = 150  # for any wait
PATIENCE_S: Final = 5
SERVICE: Final = "jobd.service"
UNITS: Final = (SERVICE, "jobd-worker.socket", "jobd-admin.socket")
LOG: Final = "/var/log/jobd.log"
PYTHON: Final = f"python{sys.version_info.major}.{sys.version_info.minor}"

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_RB_HALT_SYSTEM: Final = 0xCDEF0123
_CLONE_NEWNET: Final = 0x40000000

# Paths, and settings that a nested machine does not support.
DROP_IN: Final = f"""
[Service]
PrivateUsers=no
Environment=LD_LIBRARY_PATH=/opt/python/lib
StandardError=append:{LOG}
"""


def _can_nest() -> bool:
    """Return whether this process is root, with namespaces and a writable cgroup tree."""
    if os.geteuid() != 0 or shutil.which("unshare") is None or not os.access(_own_cgroup(), os.W_OK):
        return False
    return subprocess.run(["unshare", *SPACES, "--fork", "true"], capture_output=True, check=False).returncode == 0


NEEDS: Final = (
    Tool("systemd as PID 1", "systemd", SYSTEMD.exists),
    program("unshare", "util-linux"),
    program("nsenter", "util-linux"),
    Tool("namespaces, cgroup2 and overlayfs for root", "none: a kernel and a user", _can_nest),
)


def _own_cgroup() -> Path:
    """Return the directory of our cgroup, wherever cgroup2 is mounted."""
    lines = [line.split() for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    root = next((Path(line[1]) for line in lines if line[2] == "cgroup2"), Path("/nowhere"))
    own = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    return root / next((line[4:] for line in own if line.startswith("0::/")), "")


class SystemdMachine(ApiCalls):
    """A running systemd with jobd installed and not started. Use one at a time."""

    def __init__(self, directory: Path, *, unix_only: bool = False) -> None:
        self.directory = directory
        self._variant = "unix-only" if unix_only else "tcp"
        self.pid = 0  # of systemd, as seen from the host
        self._cgroup = _own_cgroup() / f"jobd-machine-{os.getpid()}"
        self._output: list[bytes] = []

    def __enter__(self) -> SystemdMachine:
        self._cgroup.mkdir()
        self._console, console = pty.openpty()
        command = ["unshare", *SPACES, "--fork", "--propagation", "private"]
        command += [sys.executable, "-m", "tests.proof.faults.machine"]
        command += [str(self.directory), os.ttyname(console), self._variant]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=console, preexec_fn=self._join_cgroup)
        os.close(console)
        self._console_reader = threading.Thread(target=self._read_console)
        self._console_reader.start()
        try:
            self._wait_until_booted()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _join_cgroup(self) -> None:
        die_with_us()
        (self._cgroup / "cgroup.procs").write_text("0")

    def _read_console(self) -> None:
        with suppress(OSError):  # the other end is closed
            while output := os.read(self._console, 4096):
                self._output.append(output)

    def _wait_until_booted(self) -> None:
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        self._wait_for("its first process", lambda: children.read_text() != "")
        self.pid = int(children.read_text())
        self._wait_for("systemd", lambda: self.output_of("systemctl", "is-active", "trial.target") == "active")
        self.socket = f"/proc/{self.pid}/root/run/jobd/worker.sock"
        self.admin_socket = f"/proc/{self.pid}/root/run/jobd/admin.sock"

    def __exit__(self, *_: object) -> None:
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)  # ends all processes of its namespace
        else:
            self._process.kill()
        self._process.wait()
        self.pid = 0
        assert self._process.stdin is not None
        self._process.stdin.close()
        os.close(self._console)
        self._console_reader.join()
        self._wait_for("the end", self._remove_cgroups)

    def _remove_cgroups(self) -> bool:
        for place, _, _ in os.walk(self._cgroup, topdown=False):
            with suppress(OSError):  # its last process has not ended yet
                os.rmdir(place)
        return not self._cgroup.exists()

    def _wait_for(self, what: str, is_so: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + UP_S
        while not is_so():
            assert self.pid == 0 or self._process.poll() is None, f"{what} did not come\n{self.console}"
            assert time.monotonic() < deadline_s, f"{what} did not come\n{self.console}"
            time.sleep(0.02)

    @property
    def console(self) -> str:
        """Return the output of systemd."""
        return b"".join(self._output).decode(errors="replace")

    @property
    def output_tail(self) -> str:
        """Return the end of the outputs of systemd and jobd."""
        return f"{self.console[-3000:]}\n{self.log[-3000:]}"

    @property
    def log(self) -> str:
        """Return the output of the daemon, over all its runs."""
        path = self.path(LOG)
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def worker(self) -> UnixConnection:
        return UnixConnection(self.socket, timeout=2 * UP_S)  # the first response may wait for a start

    def path(self, inside: str) -> Path:
        """Return the path of a file of the machine, as seen from the host."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine."""
        into = ["--mount", "--pid", "--net", "--ipc", "--cgroup", "--root", "--wd=/"]
        enter = ["nsenter", f"--target={self.pid}", *into, *command]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        with subprocess.Popen(
            enter, text=True, stdin=null, stdout=pipe, stderr=pipe, preexec_fn=die_with_us
        ) as process:
            for _ in range(UP_S // PATIENCE_S):
                try:
                    out, err = process.communicate(timeout=PATIENCE_S)
                except subprocess.TimeoutExpired:
                    # nsenter stops itself if its child was stopped, and can miss that the child continues.
                    process.send_signal(signal.SIGCONT)
                else:
                    return subprocess.CompletedProcess(command, process.returncode, out, err)
            process.kill()
        raise AssertionError(f"{command} does not end\n{self.output_tail}")

    def output_of(self, *command: str) -> str:
        """Return the output of a command."""
        return self.run(*command).stdout.strip()

    def run_checked(self, *command: str) -> str:
        """Run a command that must succeed."""
        done = self.run(*command)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.output_tail}"
        return done.stdout.strip()

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.output_of("systemctl", "show", "--value", f"--property={name}", unit)

    def wait_until_ready(self, not_pid: str = "0") -> str:
        """Wait until the daemon is ready, with a pid other than `not_pid`; return its pid in the machine."""
        self._wait_for("a daemon", lambda: self.show(SERVICE, "MainPID") not in ("0", not_pid))
        self._wait_for("readiness", lambda: self.show(SERVICE, "ActiveState") == "active")
        return self.show(SERVICE, "MainPID")

    def drop_in(self, text: str) -> None:
        """Change settings of the daemon's unit, from its next start on."""
        self.path(f"/etc/systemd/system/{SERVICE}.d/more.conf").write_text(text, encoding="utf-8")
        self.run_checked("systemctl", "daemon-reload")

    def admin_port(self) -> http.client.HTTPConnection:
        """Connect to the admin port, which only the network of the machine reaches."""
        connection = http.client.HTTPConnection("127.0.0.1", 8770, timeout=60)
        made: list[socket.socket] = []

        def connect() -> None:  # in its own thread, because this moves the thread into the machine's network
            with open(f"/proc/{self.pid}/ns/net", encoding="utf-8") as space:
                if _LIBC.setns(space.fileno(), _CLONE_NEWNET) == 0:
                    with suppress(OSError):
                        made.append(socket.create_connection(("127.0.0.1", 8770), 60))

        thread = threading.Thread(target=connect)
        thread.start()
        thread.join()
        assert made, "there is no listener on the admin port"
        connection.sock = made[0]
        return connection


# -- inside ------------------------------------------------------------------------------------------------------------


def _mount(kind: str, target: Path | str, *, source: str = "none", options: str = "") -> None:
    Path(target).mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", kind, *(["-o", options] if options else []), source, str(target)], check=True)


def _bind(source: Path | str, target: Path) -> None:
    if Path(source).is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    subprocess.run(["mount", "--bind", str(source), str(target)], check=True)


def _build(directory: Path, console: str) -> Path:
    """Build the file system: the host's, with all writes in memory."""
    _mount("tmpfs", directory)
    for name in ("upper", "work", "root"):
        (directory / name).mkdir()
    root = directory / "root"
    layers = f"lowerdir=/,upperdir={directory}/upper,workdir={directory}/work"
    _mount("overlay", root, source="overlay", options=layers)
    _mount("proc", root / "proc")
    _mount("sysfs", root / "sys")
    _mount("cgroup2", root / "sys/fs/cgroup")
    for name, mode in (("run", "755"), ("tmp", "1777"), ("var/tmp", "1777"), ("dev", "755"), ("dev/shm", "1777")):
        _mount("tmpfs", root / name, options=f"mode={mode}")
    for name in ("null", "zero", "full", "random", "urandom", "tty"):
        _bind(f"/dev/{name}", root / "dev" / name)
    _bind(console, root / "dev/console")
    _mount("devpts", root / "dev/pts", options="newinstance,ptmxmode=0666")
    _mount("mqueue", root / "dev/mqueue")
    (root / "dev/ptmx").symlink_to("pts/ptmx")
    (root / "dev/fd").symlink_to("/proc/self/fd")
    return root


def _install(root: Path, variant: str) -> None:
    """Install jobd where its unit expects it, and disable all other units."""
    packages = root / f"opt/jobd/lib/{PYTHON}/site-packages"
    packages.mkdir(parents=True)
    _bind(ROOT / "jobd", packages / "jobd")
    _bind(sysconfig.get_path("purelib"), root / "opt/packages")
    (packages / "packages.pth").write_text("/opt/packages\n")
    home = Path(sys.base_prefix)
    if home != Path("/usr"):  # it may be in a home directory, which the unit hides
        _bind(home, root / "opt/python")
        home = Path("/opt/python")
    (root / "opt/jobd/bin").mkdir()
    (root / "opt/jobd/pyvenv.cfg").write_text(f"home = {home}/bin\ninclude-system-site-packages = false\n")
    (root / "opt/jobd/bin/python3").symlink_to(home / "bin" / PYTHON)
    script = root / "opt/jobd/bin/jobd"
    script.write_text("#!/opt/jobd/bin/python3\nimport sys\nfrom jobd.cli.daemon.main import main\nsys.exit(main())\n")
    script.chmod(0o755)
    for left in root.glob("usr/lib/systemd/system/*.target.wants"):
        shutil.rmtree(left)
    units = root / "etc/systemd/system"
    shutil.rmtree(units, ignore_errors=True)
    units.mkdir(parents=True)
    for unit in (ROOT / "systemd").glob("jobd*.s*[te]"):
        shutil.copy(unit, units)
    if variant == "unix-only":
        shutil.copytree(ROOT / "systemd/unix-only", units, dirs_exist_ok=True)
    (units / "trial.target").write_text("[Unit]\nDefaultDependencies=no\n")
    (units / "jobd.service.d").mkdir(exist_ok=True)
    (units / "jobd.service.d/trial.conf").write_text(DROP_IN)
    (root / "etc/jobd").mkdir()
    token = root / "etc/jobd/admin_token"
    token.touch(mode=0o600)
    token.write_text(TOKEN + "\n")
    (root / "etc/sysusers.d").mkdir(exist_ok=True)
    shutil.copy(ROOT / "systemd/jobd.sysusers", root / "etc/sysusers.d/jobd.conf")
    subprocess.run(["systemd-sysusers", f"--root={root}"], check=True, capture_output=True)


def _halt_with(lifeline: int) -> None:
    """Start a process that halts this machine when its creator is gone."""
    if os.fork() == 0:
        os.setsid()
        while os.read(lifeline, 1):
            pass
        _LIBC.reboot(ctypes.c_int(_RB_HALT_SYSTEM))
        os._exit(0)


def main(directory: Path, console: str, variant: str) -> None:
    os.environ["PATH"] += ":/usr/sbin:/sbin"  # pivot_root may be missing from the path
    root = _build(directory, console)
    _install(root, variant)
    _halt_with(os.dup(0))
    os.chdir(root)
    subprocess.run(["pivot_root", ".", "mnt"], check=True)
    subprocess.run(["umount", "--lazy", "/mnt"], check=True)
    subprocess.run(
        ["mount", "--make-rshared", "/"], check=True
    )  # as on every machine: systemd passes credentials to units by it
    with open("/dev/null", "r+b") as null:
        for number in range(3):
            os.dup2(null.fileno(), number)
    environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "container": "jobd-machine"}
    os.execve(SYSTEMD, ["systemd", "--system", "--unit=trial.target", "--log-target=console"], environ)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
