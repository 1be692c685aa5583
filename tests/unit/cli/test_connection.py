"""How jobctl finds the daemon, the tokens and the name of the operator."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from jobd import config, config_loader
from jobd.cli import connection
from jobd.cli.params import ConnectionOptions
from jobd.client.endpoint import default_socket


def test_an_operator_is_the_user_behind_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    host = socket.gethostname()
    monkeypatch.delenv("SUDO_USER", raising=False)
    monkeypatch.setenv("LOGNAME", "eve")
    assert connection.this_operator() == f"eve@{host}"
    monkeypatch.setenv("SUDO_USER", "bob")
    assert connection.this_operator() == f"bob@{host}"
    monkeypatch.delenv("SUDO_USER")

    def nameless() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr("getpass.getuser", nameless)
    assert connection.this_operator() == f"uid-{os.getuid()}@{host}"


def test_the_admin_token_never_goes_to_the_worker_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADMIN_TOKEN", "canary-canary-canary-canary")
    assert connection.worker_token(ConnectionOptions()) is None


def test_the_first_of_several_tokens_is_used(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("first-first-first-first\nsecond-second-second-s\n")
    assert connection.read_token(str(tmp_path / "token")) == "first-first-first-first"


@pytest.fixture
def no_connection_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Remove every setting that names the daemon; return the path of its configuration file, which does not exist."""
    for name in ("JOBD_SOCKET", "JOBD_ADMIN_URL"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("ADMIN_TOKEN", "canary-canary-canary-canary")
    monkeypatch.setattr(connection, "CONFIG_PATH", str(tmp_path / "config.toml"))
    return tmp_path / "config.toml"


def found(**given: str) -> tuple[str, str]:
    """Return the addresses of the worker API and the admin API."""
    shown = ConnectionOptions()
    for name, value in given.items():
        setattr(shown, name, value)
    (worker,), (admin,) = connection.worker_api_endpoints(shown), connection.admin_api_endpoints(shown)
    return str(worker), str(admin)


def test_options_override_variables_and_variables_the_configuration(
    no_connection_settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = (f"unix:{default_socket()}", "http://127.0.0.1:8770")
    assert found() == defaults
    no_connection_settings.write_text('[worker]\nsocket = "/file/w"\n[admin]\nlisten = "unix:/file/a"\n')
    assert found() == ("unix:/file/w", "unix:/file/a")
    other = no_connection_settings.with_name("other.toml")
    other.write_text('[worker]\nsocket = "/other/w"\n')
    monkeypatch.setenv("JOBD_CONFIG", str(other))
    assert found() == ("unix:/other/w", defaults[1])
    monkeypatch.setenv("JOBD_WORKER_SOCKET", "/env/w")
    monkeypatch.setenv("JOBD_ADMIN_LISTEN", "127.0.0.1:9999")
    assert found() == ("unix:/env/w", "http://127.0.0.1:9999")
    monkeypatch.setenv("JOBD_URL", "http://there:1")
    monkeypatch.setenv("JOBD_ADMIN_URL", "http://there:2")
    assert found() == ("http://there:1", "http://there:2")
    monkeypatch.setenv("JOBD_SOCKET", "/env/w")
    assert found()[0] == "unix:/env/w"
    assert found(socket="/flag/w", admin_url="unix:/flag/a") == ("unix:/flag/w", "unix:/flag/a")


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        ('listen = "0.0.0.0:8771"', "http://127.0.0.1:8771"),
        ('listen = "[::]:8771"', "http://[::1]:8771"),
        ('listen = "::1:8771"', "http://[::1]:8771"),
        ('listen = "jobs.example:443"\ntls_cert = "/c"\ntls_key = "/k"', "https://jobs.example:443"),
        ('tls_cert = "/c"', "https://127.0.0.1:8770"),
        ('listen = "8771"', "http://127.0.0.1:8770"),
        ("listen = 8771", "http://127.0.0.1:8770"),
        ("listen = ", "http://127.0.0.1:8770"),
        ('listen = "\\ud800"', "http://127.0.0.1:8770"),
    ],
)
def test_the_admin_api_is_found_by_the_configuration(no_connection_settings: Path, settings: str, url: str) -> None:
    no_connection_settings.write_text(f"[admin]\n{settings}\n")
    assert found()[1] == url


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b"admin = 1\nworker = []\n", b"a = " + b"9" * 5_000, b"a = " + b"[" * 5_000, None],
    ids=["not text", "other types", "digits", "nested", "directory"],
)
def test_an_unreadable_configuration_is_ignored(no_connection_settings: Path, content: bytes | None) -> None:
    no_connection_settings.write_bytes(content) if content is not None else no_connection_settings.mkdir()
    assert found() == (f"unix:{default_socket()}", "http://127.0.0.1:8770")


def test_the_daemon_is_found_at_its_defaults() -> None:
    assert connection.CONFIG_PATH == config_loader.DEFAULT_PATH
    assert config.Config().admin.listen == connection.DEFAULT_LISTEN
