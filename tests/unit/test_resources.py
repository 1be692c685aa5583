"""What a daemon opens on its machine: each listener needs an address of its own."""

from __future__ import annotations

import pytest

from jobd.config import AdminSection, Config, WorkerSection
from jobd.resources import EXIT_CONFIG, CannotStart, _cannot_open, check_addresses_free

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
    with pytest.raises(CannotStart, match=f"{named} has the same address") as refused:
        check_addresses_free(settings, {})
    assert refused.value.code == EXIT_CONFIG
    check_addresses_free(settings, {"admin": []})  # systemd passes the socket of this listener


def test_two_listeners_may_each_choose_a_free_port() -> None:
    check_addresses_free(Config(WorkerSection(SOCKET, listen="127.0.0.1:0"), AdminSection(listen="127.0.0.1:0")), {})


def test_the_file_that_may_not_be_written_is_named() -> None:
    error = _cannot_open("/jobd.db", PermissionError(13, "Permission denied", "/jobd.db.lock"))
    assert str(error).startswith("/jobd.db.lock: Permission denied: user ")
    assert error.code == EXIT_CONFIG
