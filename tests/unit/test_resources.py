"""What a daemon opens on its machine: each listener needs an address of its own."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from jobd.config import AdminSection, Config, WorkerSection
from jobd.resources import (
    EXIT_CONFIG,
    CannotStart,
    _cannot_listen,
    _cannot_open,
    _tls_context,
    check_addresses_free,
    check_passed_sockets,
)
from tests.support.http_harness import tls_pair

SOCKET = "/nowhere/worker.sock"


@pytest.mark.parametrize(
    ("worker", "admin", "named"),
    [
        (WorkerSection(SOCKET), AdminSection(f"unix:{SOCKET}"), "worker.socket"),
        (WorkerSection(SOCKET, listen="127.0.0.1:1"), AdminSection(listen="127.0.0.1:1"), "admin.listen"),
    ],
)
def test_two_listeners_with_one_address_are_exit_78(worker: WorkerSection, admin: AdminSection, named: str) -> None:
    settings = Config(worker=worker, admin=admin)
    with pytest.raises(CannotStart, match=f"{named} has the same address") as rejected:
        check_addresses_free(settings, {})
    assert rejected.value.code == EXIT_CONFIG
    check_addresses_free(settings, {"admin": []})  # systemd passes the socket of this listener


def test_two_listeners_may_each_choose_a_free_port() -> None:
    check_addresses_free(Config(WorkerSection(SOCKET, listen="127.0.0.1:0"), AdminSection(listen="127.0.0.1:0")), {})


@pytest.mark.parametrize(
    ("name", "family", "part"),
    [
        ("worker", socket.AF_INET, "never open without a token"),
        ("worker-tcp", socket.AF_INET, "worker-tcp requires worker.listen"),
        ("jobd-other.socket", socket.AF_UNIX, "expected one of worker, admin"),
    ],
)
def test_a_socket_of_systemd_that_cannot_be_served_is_exit_78(name: str, family: int, part: str) -> None:
    with socket.socket(family) as opened, pytest.raises(CannotStart, match=part) as rejected:
        check_passed_sockets(Config(WorkerSection(SOCKET)), {name: [opened]})
    assert rejected.value.code == EXIT_CONFIG


def test_sockets_of_systemd_are_served() -> None:
    settings = Config(WorkerSection(SOCKET, listen="127.0.0.1:1"))
    with socket.socket(socket.AF_UNIX) as unix, socket.socket(socket.AF_INET) as tcp:
        with capture_logs() as logs:
            check_passed_sockets(settings, {"worker": [unix], "worker-tcp": [tcp], "admin": [unix]})
        assert [entry["message"] for entry in logs] == [
            "[worker] listens on 0.0.0.0:0 WITHOUT TLS: tokens are sent unencrypted. Set tls_cert."
        ]
        tcp.bind(("127.0.0.1", 0))
        with capture_logs() as logs:
            check_passed_sockets(settings, {"admin": [unix, tcp]})
        assert logs == []


async def test_an_encrypted_key_is_exit_78(tmp_path: Path) -> None:
    """OpenSSL would ask for its password on the terminal."""
    await tls_pair(tmp_path)
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    encrypt = ("openssl", "pkey", "-aes128", "-passout", "pass:secret", "-in", key, "-out", tmp_path / "encrypted.pem")
    await asyncio.to_thread(subprocess.run, encrypt, check=True)
    with pytest.raises(CannotStart, match="the key is encrypted") as rejected:
        _tls_context(str(cert), str(tmp_path / "encrypted.pem"))
    assert rejected.value.code == EXIT_CONFIG


def test_the_file_that_may_not_be_written_is_named() -> None:
    error = _cannot_open("/jobd.db", PermissionError(13, "Permission denied", "/jobd.db.lock"))
    assert str(error).startswith("/jobd.db.lock: Permission denied: user ")
    assert error.code == EXIT_CONFIG


def test_an_address_that_cannot_be_used_is_named_with_its_key() -> None:
    error = _cannot_listen("worker", "unix:/run/user/7/w", PermissionError(13, "Permission denied", "/run/user/7"))
    assert str(error).endswith("denied: '/run/user/7'. Correct this, or set worker.socket to another address")
    assert error.code == EXIT_CONFIG
