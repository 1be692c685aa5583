"""The configuration of a shared journal and of its nodes."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from jobd import config_checks, config_loader
from jobd.config import ConfigError, LoadedConfig, effective, shown
from jobd.config_loader import load

TOKEN = "canary-admin-0123456789abcdef"
URL = "postgresql://jobd:canary@db.example/jobd"


@pytest.fixture(autouse=True)
def no_system_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignore the configuration file of this machine."""
    monkeypatch.setattr(config_loader, "DEFAULT_PATH", str(tmp_path / "etc.toml"))


def loaded(path: str | None = None, **flags: str) -> LoadedConfig:
    return load({name.replace("__", "."): value for name, value in flags.items()}, {"ADMIN_TOKEN": TOKEN}, path)


def test_the_password_is_shown_nowhere() -> None:
    found = loaded(journal__url=URL)
    assert found.config.journal.url == URL
    assert 'url = "postgresql://jobd:***@db.example/jobd"  # flag' in effective(found)
    assert "canary" not in effective(found)
    assert shown(found.config, "journal.url") == "postgresql://jobd:***@db.example/jobd"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("journal__url", "mysql://jobd:canary@a", "journal.url: expected postgresql://"),
        ("journal__name", "a_b", "journal.name"),
        ("journal__name", "a" * 31, "journal.name"),
        ("journal__name", "", "journal.name"),
        ("journal__lease", "400ms", "journal.lease: 400ms is outside 500ms to 1m"),
        ("journal__lease", "2m", "journal.lease"),
        ("journal__snapshot_every", "0", "journal.snapshot_every"),
        ("node__advertise", "a.example:8771", "node.advertise"),
        ("node__advertise", "http://a.example:8771/path", "node.advertise"),
        ("node__advertise", "http://a.example:port", "node.advertise"),
        ("node__advertise", "http://", "node.advertise"),
        ("node__advertise", "http://user@a.example", "node.advertise"),
        ("node__name", "a\nb", "node.name: expected printable characters"),
    ],
)
def test_an_invalid_value_is_rejected(key: str, value: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(**{"journal__url": URL, key: value})
    assert expected in str(caught.value)
    assert "canary" not in str(caught.value)


def test_the_extra_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_checks, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install ./.ci/client '\.\[postgres\]' in a clone"):
        loaded(journal__url=URL)


def test_a_node_has_the_name_of_its_host_and_the_address_of_its_worker_api(tmp_path: Path) -> None:
    assert loaded().config.node.name == ""
    (tmp_path / "token").write_text("canary-worker-0123456789abcdef")
    listening = {"journal__url": URL, "worker__token_file": str(tmp_path / "token")}
    node = loaded(**listening, worker__listen="a.example:8771").config.node
    assert (node.name, node.advertise) == (socket.gethostname(), "http://a.example:8771")
    assert loaded(**listening, worker__listen="0.0.0.0:8771").config.node.advertise == ""
    node = loaded(**listening, node__name="east", node__advertise="https://[2001:db8::1]:8771").config.node
    assert (node.name, node.advertise) == ("east", "https://[2001:db8::1]:8771")


def test_a_node_without_an_address_causes_a_warning() -> None:
    assert any("node.advertise is empty" in each for each in loaded(journal__url=URL).warnings)
    assert not any("node.advertise" in each for each in loaded().warnings)


def test_an_exposed_password_causes_a_warning(tmp_path: Path) -> None:
    assert any("list of processes" in each for each in loaded(journal__url=URL).warnings)
    file = tmp_path / "config.toml"
    file.write_text(f'[journal]\nurl = "{URL}"\n')
    file.chmod(0o644)
    assert any("password of journal.url" in each for each in loaded(str(file)).warnings)
    file.chmod(0o640)
    assert not any("password" in each for each in loaded(str(file)).warnings)
    file.write_text('[journal]\nurl = "postgresql://jobd@a/db"\n')
    file.chmod(0o644)
    assert not any("password" in each for each in loaded(str(file)).warnings)
