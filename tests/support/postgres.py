"""PostgreSQL servers of the test run: each in a temporary directory, on a Unix socket and a loopback port.

TEST_POSTGRES names the directory of the programs; without it, the newest version in /usr/lib/postgresql is used.
"""

from __future__ import annotations

import contextlib
import glob
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tests.support.daemon_process import die_with_us, free_port

READY_S: Final = 30.0
PASSWORD: Final = "secret of the tests"  # of the role `postgres`, over TCP


class PostgresMissing(Exception):
    """PostgreSQL is not installed. The message says how to install it."""


def programs() -> str:
    """Return the directory of the programs. Raises PostgresMissing."""
    if chosen := os.environ.get("TEST_POSTGRES"):
        return chosen
    found = glob.glob("/usr/lib/postgresql/*/bin/initdb")
    if not found:
        raise PostgresMissing("PostgreSQL is not installed: apt-get install postgresql")
    return str(Path(max(found, key=lambda each: float(each.split("/")[4]))).parent)


def version() -> str:
    """Return the version of the server, such as "17.12"."""
    text = subprocess.run([f"{programs()}/postgres", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"[0-9]+\.[0-9]+", text)
    assert found is not None, text
    return found[0]


class PostgresServer:
    """A server with its data in `directory`. The role `postgres` needs no password on the socket."""

    def __init__(self, directory: Path, port: int | None = None) -> None:
        self.directory = directory
        self.port = port or free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.environ: dict[str, str] = {}  # in addition to the environment of this process
        self._settings: dict[str, object] = {}

    # -- Addresses --

    def url(self, database: str = "postgres", *, role: str = "postgres", port: int | None = None) -> str:
        """Return the URL over TCP, with the password."""
        return f"postgresql://{role}:{PASSWORD.replace(' ', '%20')}@127.0.0.1:{port or self.port}/{database}"

    # -- Life cycle --

    def create(self) -> None:
        """Make an empty database cluster."""
        self.run("initdb", "-D", self._data, "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")
        (self.directory / "data/pg_hba.conf").write_text(
            "local all all trust\nlocal replication all trust\n"
            "host replication all 127.0.0.1/32 trust\nhost all all samenet scram-sha-256\n"
        )

    def copy_of(self, primary: PostgresServer, name: str) -> None:
        """Make a standby of a running server, which connects to it as `name`."""
        source = f"host={primary.directory} port={primary.port} user=postgres application_name={name}"
        self.run("pg_basebackup", "-D", self._data, "-R", "-X", "stream", "-c", "fast", "--no-sync", "-d", source)

    def start(self, **settings: object) -> None:
        """Start the server, with its earlier `settings` and these, and wait until it accepts connections."""
        self._settings |= settings
        given = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": self.directory,
            "shared_buffers": "32MB",
            "max_wal_size": "256MB",
            "hot_standby": "on",
            "wal_receiver_status_interval": "1s",
            "wal_retrieve_retry_interval": "100ms",
        } | self._settings
        words = [f"{programs()}/postgres", "-D", self._data]
        for name, value in given.items():
            words += ["-c", f"{name}={value}"]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                words,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                env=os.environ | self.environ,
                preexec_fn=die_with_us,
                **_user(),
            )
        self.wait()

    def wait(self) -> None:
        """Wait until the server accepts connections."""
        began = time.monotonic()
        words = [f"{programs()}/pg_isready", "-q", "-h", str(self.directory), "-p", str(self.port), "-t", "1"]
        while subprocess.run(words, check=False).returncode != 0:
            is_over = self.process is None or self.process.poll() is not None
            if is_over or time.monotonic() - began > READY_S:
                raise AssertionError(f"PostgreSQL did not start:\n{(self.directory / 'log').read_text()[-2000:]}")
            time.sleep(0.02)

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """Stop the server: SIGINT closes the connections, SIGQUIT ends it at once, as a crash does."""
        if self.process is not None:
            self.process.send_signal(number)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    def kill(self) -> None:
        """End every process of the server with SIGKILL."""
        assert self.process is not None
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        self.process.kill()
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
        self.process.wait()
        self.process = None

    def promote(self) -> None:
        """Make a standby the primary."""
        self.run("pg_ctl", "promote", "-D", self._data, "-w", "-s")

    # -- Use --

    def sql(self, *statements: str, database: str = "postgres") -> str:
        """Run statements in one session as superuser, and return what they print."""
        words = ["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", str(self.directory), "-p", str(self.port)]
        commands = [word for each in statements for word in ("-c", each)]
        return self.run("psql", *words, "-U", "postgres", "-d", database, *commands).strip()

    def run(self, program: str, *words: str) -> str:
        done = subprocess.run(
            [f"{programs()}/{program}", *words],
            cwd=self.directory,
            capture_output=True,
            text=True,
            check=False,
            **_user(),
        )
        assert done.returncode == 0, f"{program}: {done.stderr}"
        output: str = done.stdout
        return output

    @property
    def _data(self) -> str:
        return str(self.directory / "data")


def _user() -> dict[str, Any]:
    """Return the arguments that start a program as another user than root, which PostgreSQL rejects."""
    if os.geteuid() != 0:
        return {}
    return {"user": _name(), "group": pwd.getpwnam(_name()).pw_gid, "extra_groups": []}


def _name() -> str:
    with contextlib.suppress(KeyError):
        return pwd.getpwnam("postgres").pw_name
    return "nobody"


@contextlib.contextmanager
def directory() -> Iterator[Path]:
    """Yield a directory of PostgreSQL's user. Its path is short enough for a socket."""
    path = Path(tempfile.mkdtemp(prefix="jobd-pg-", dir="/tmp"))
    if os.geteuid() == 0:
        os.chown(path, pwd.getpwnam(_name()).pw_uid, -1)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def postgres(**settings: object) -> Iterator[PostgresServer]:
    """Run one server. Raises PostgresMissing."""
    programs()
    with directory() as place:
        server = PostgresServer(place)
        server.create()
        server.start(**settings)
        try:
            server.sql(f"ALTER ROLE postgres PASSWORD '{PASSWORD}'")
            yield server
        finally:
            server.stop()


@contextlib.contextmanager
def postgres_cluster(standbys: int = 1, **settings: object) -> Iterator[list[PostgresServer]]:
    """Run a primary and its standbys, with quorum commit on the primary and one standby. Raises PostgresMissing."""
    with contextlib.ExitStack() as stack:
        primary = stack.enter_context(postgres(**settings))
        servers = [primary]
        names = []
        for _ in range(standbys):
            standby = PostgresServer(stack.enter_context(directory()))
            names.append(f"s{standby.port}")
            standby.copy_of(primary, names[-1])
            stack.callback(standby.stop)
            standby.start(**settings)
            servers.append(standby)
        primary.sql(f"ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 ({', '.join(names)})'")
        primary.sql("SELECT pg_reload_conf()")
        wait_for(primary, f"SELECT count(*) >= {standbys} FROM pg_stat_replication WHERE sync_state = 'quorum'")
        yield servers


def wait_for(server: PostgresServer, question: str) -> None:
    """Wait until a query returns true."""
    began = time.monotonic()
    while server.sql(question) != "t":
        assert time.monotonic() - began < READY_S, question
        time.sleep(0.05)
