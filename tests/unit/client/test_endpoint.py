"""How the address and token of the daemon are found."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobd.client import (
    Endpoint,
    admin_endpoint,
    default_socket,
    parse_endpoint,
    worker_endpoint,
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("unix:/run/w.sock", Endpoint(path="/run/w.sock")),
        ("unix:///run/w.sock", Endpoint(path="/run/w.sock")),
        ("/run/w.sock", Endpoint(path="/run/w.sock")),
        ("http://127.0.0.1:8770", Endpoint(host="127.0.0.1", port=8770)),
        ("http://host", Endpoint(host="host", port=80)),
        ("https://host/base/", Endpoint(host="host", port=443, tls=True, prefix="/base")),
        ("http://[::1]:5", Endpoint(host="::1", port=5)),
    ],
)
def test_endpoints_are_parsed(text: str, found: Endpoint) -> None:
    assert parse_endpoint(text) == found


@pytest.mark.parametrize(
    "text", ["", "host:80", "ftp://host", "unix:relative", "http://", "http://u:p@host", "http://h/?q=1", "http://h:x"]
)
def test_an_invalid_endpoint_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_endpoint(text)


def test_an_ipv6_origin_has_brackets_and_no_token() -> None:
    endpoint = parse_endpoint("http://[::1]:5/p", token="very-secret")
    assert endpoint.origin == "http://[::1]:5/p"
    assert "very-secret" not in repr(endpoint) + str(endpoint)


def test_the_worker_endpoint_comes_from_argument_environment_or_default(tmp_path: Path) -> None:
    environ = {"JOBD_SOCKET": "/s", "JOBD_URL": "http://h:1"}
    assert worker_endpoint("unix:/mine", environ=environ).path == "/mine"
    assert worker_endpoint(environ=environ).path == "/s"
    assert worker_endpoint(environ={"JOBD_URL": "http://h:1"}).port == 1
    assert worker_endpoint(environ={}).path == default_socket({})
    ready = Endpoint(path="/x")
    assert worker_endpoint(ready, environ=environ) is ready


def test_the_worker_token_is_the_first_line_of_its_file_and_only_for_tcp(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("first-token\nsecond-token\n")
    environ = {"JOBD_WORKER_TOKEN_FILE": str(file)}
    assert worker_endpoint("http://h:1", environ=environ).token == "first-token"
    assert worker_endpoint("http://h:1", "given", environ=environ).token == "given"
    assert worker_endpoint("unix:/s", environ=environ).token is None


def test_the_admin_endpoint_and_its_token(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("from-file\n")
    assert admin_endpoint(environ={}) == Endpoint(host="127.0.0.1", port=8770)
    found = admin_endpoint(environ={"JOBD_ADMIN_URL": "unix:/a", "ADMIN_TOKEN": "t"})
    assert (found.path, found.token) == ("/a", "t")
    assert admin_endpoint(environ={"ADMIN_TOKEN_FILE": str(file)}).token == "from-file"
    assert admin_endpoint(token="x", environ={"ADMIN_TOKEN": "t"}).token == "x"


def test_the_default_socket_is_that_of_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_socket({}) == "/run/jobd/worker.sock"
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    assert default_socket({"XDG_RUNTIME_DIR": "/run/user/1"}) == "/run/user/1/jobd/worker.sock"
    assert default_socket({}) == "/run/user/4711/jobd/worker.sock"
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/run/jobd/worker.sock")
    assert default_socket({}) == "/run/jobd/worker.sock"
