"""How the address and token of the daemon are found."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from jobd.client import Endpoint, admin_endpoints, default_socket, parse_endpoint, worker_endpoints
from jobd.client.endpoint import Address


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


@pytest.mark.parametrize("host", ["é..x", "a..b", ".", "a" * 64, "\udcff.x"])
def test_a_host_that_no_resolver_accepts_is_rejected(host: str) -> None:
    with pytest.raises(ValueError, match="the host name is not valid"):
        parse_endpoint(f"http://{host}:80")


def test_an_ipv6_origin_has_brackets_and_no_token() -> None:
    endpoint = parse_endpoint("http://[::1]:5/p", token="very-secret")
    assert endpoint.origin == "http://[::1]:5/p"
    assert "very-secret" not in repr(endpoint) + str(endpoint)


def worker_endpoint(where: Address | None = None, token: str | None = None, **environ: str) -> Endpoint:
    """Return the endpoint of the worker API; there is only one."""
    (found,) = worker_endpoints(where, token, environ)
    return found


def admin_endpoint(token: str | None = None, **environ: str) -> Endpoint:
    """Return the endpoint of the admin API; there is only one."""
    (found,) = admin_endpoints(None, token, environ)
    return found


def test_the_worker_endpoint_comes_from_argument_environment_or_default() -> None:
    environ = {"JOBD_SOCKET": "/s", "JOBD_URL": "http://h:1"}
    assert worker_endpoint("unix:/mine", **environ).path == "/mine"
    assert worker_endpoint(**environ).path == "/s"
    assert worker_endpoint(JOBD_URL="http://h:1").port == 1
    assert worker_endpoint().path == default_socket({})
    ready = Endpoint(path="/x")
    assert worker_endpoint(ready, **environ) is ready


def test_the_worker_token_is_the_first_line_of_its_file_and_only_for_tcp(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("first-token\nsecond-token\n")
    environ = {"JOBD_WORKER_TOKEN_FILE": str(file)}
    assert worker_endpoint("http://h:1", **environ).token == "first-token"
    assert worker_endpoint("http://h:1", "given", **environ).token == "given"
    assert worker_endpoint("unix:/s", **environ).token is None
    assert worker_endpoint(Endpoint(host="h", port=1), **environ).token is None


def test_the_admin_endpoint_and_its_token(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("from-file\n")
    assert admin_endpoint() == Endpoint(host="127.0.0.1", port=8770)
    found = admin_endpoint(JOBD_ADMIN_URL="unix:/a", ADMIN_TOKEN="t")
    assert (found.path, found.token) == ("/a", "t")
    assert admin_endpoint(ADMIN_TOKEN_FILE=str(file)).token == "from-file"
    assert admin_endpoint("x", ADMIN_TOKEN="t").token == "x"


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("http://a:1,http://b:2", ["http://a:1", "http://b:2"]),
        (" http://a:1 , https://b ", ["http://a:1", "https://b:443"]),
        ("unix:/a,/b,http://c:1", ["unix:/a", "unix:/b", "http://c:1"]),
        ("unix:/run/a,b.sock", ["unix:/run/a,b.sock"]),
        ("http://a:1,http://b:2,http://a:1/", ["http://a:1", "http://b:2"]),
        (["http://a:1", Endpoint(path="/b")], ["http://a:1", "unix:/b"]),
    ],
)
def test_a_list_of_urls(where: Address, found: list[str]) -> None:
    assert [str(each) for each in worker_endpoints(where)] == found
    assert [str(each) for each in admin_endpoints(where)] == found


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("http://a:1,b:2", "'http://a:1,b:2': write each URL of a list in full, as in http://a:8771,http://b:8771"),
        ("http://a,b", "'http://a,b': write each URL of a list in full, as in http://a:8771,http://b:8771"),
        ("http://a:1,", "'http://a:1,': write each URL of a list in full, as in http://a:8771,http://b:8771"),
        ("http://a:1,http://b:x", "'http://b:x': the port must be a number from 0 to 65535"),
        ("http://a:1 http://b:2", "'http://a:1 http://b:2': the port must be a number from 0 to 65535"),
        (["http://a:1", "ftp://b"], "'ftp://b': expected unix:/path, http://host:port or https://host:port"),
    ],
)
def test_an_invalid_list_names_the_url(where: Address, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        worker_endpoints(where)


def test_each_url_of_a_list_gets_its_token(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("from-file\n")
    urls = "http://a:1,unix:/b,http://c:1"
    environ = {"JOBD_URL": urls, "JOBD_WORKER_TOKEN_FILE": str(file)}
    assert [each.token for each in worker_endpoints(environ=environ)] == ["from-file", None, "from-file"]
    found = admin_endpoints(environ={"JOBD_ADMIN_URL": urls, "ADMIN_TOKEN": "t"}, operator="eve")
    assert [(each.token, each.operator) for each in found] == [("t", "eve")] * 3


def test_the_default_socket_is_that_of_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_socket({}) == "/run/jobd/worker.sock"
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    assert default_socket({"XDG_RUNTIME_DIR": "/run/user/1"}) == "/run/user/1/jobd/worker.sock"
    assert default_socket({}) == "/run/user/4711/jobd/worker.sock"
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/run/jobd/worker.sock")
    assert default_socket({}) == "/run/jobd/worker.sock"


@pytest.mark.parametrize("token", ["old\nnew", "two words", "t\x00", "zoë"])
def test_a_token_that_a_header_cannot_have_is_rejected_and_not_shown(token: str) -> None:
    with pytest.raises(ValueError, match="The token has a space") as caught:
        admin_endpoints("http://h:1", token)
    assert token not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://eve:secret@host", "ftp://eve:/secret@host", "eve:secret@host", "http:/eve:secret@℀.x"]
)
def test_a_url_with_a_password_is_rejected_and_not_shown(url: str) -> None:
    with pytest.raises(ValueError, match="has no user") as caught:
        parse_endpoint(url)
    assert "secret" not in str(caught.value)
