"""Host names that `admin.hosts` accepts, and how they match a Host header."""

from __future__ import annotations

import pytest
from multidict import CIMultiDict

from jobd.config_loader import is_host
from jobd.http.auth import Authenticator, accepted_hosts, host_name


@pytest.mark.parametrize(
    "text",
    [
        "jobs",
        "Jobs.Example.com",
        "jobs.example.com.",
        "my_jobs",
        "1und1.example",
        "xn--bcher-kva.example",
        "a" * 63,
        ".".join(["a" * 49] * 5),
        "10.0.0.7",
        "[fe80::1]",
        "FE80::1",
        "[2001:db8:0:0::7]",
    ],
)
def test_a_valid_host_matches_its_header(text: str) -> None:
    assert is_host(text)
    [name] = accepted_hosts("10.9.9.9", [text]) - {"10.9.9.9"}
    assert host_name(f"[{name}]:8770" if ":" in name else f"{name}:8770") == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ".",
        "a b",
        " a",
        "a,b",
        "a..b",
        "-a",
        "a-",
        "a\n",
        "*",
        "*.example.com",
        "http://jobs.example.com",
        "http://x/y",
        "jobs.example.com/",
        "eve@jobs.example.com",
        "jobs.example.com:8770",
        "10.0.0.7:8770",
        "[fe80::1]:8770",
        "[fe80::1",
        "fe80::1]",
        "[jobs]",
        "[10.0.0.7]",
        "fe80::1%eth0",
        "fe80::1::2",
        "10.0.0.256",
        "10.0.0",
        "7",
        "0.0.0.0",
        "[::]",
        "bücher.example",
        "\u212aelvin.example",
        '["jobs"]',
        "a" * 64,
        ".".join(["a" * 50] * 5),
    ],
)
def test_an_invalid_host_is_rejected(text: str) -> None:
    assert not is_host(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [("Jobs.Example.", "jobs.example"), ("[2001:DB8:0:0::7]", "2001:db8::7"), ("2001:db8::7", "2001:db8::7")],
)
def test_a_name_is_compared_in_its_normalized_form(text: str, name: str) -> None:
    assert accepted_hosts("10.9.9.9", [text]) == {"10.9.9.9", name}


@pytest.mark.parametrize("sent", ["[2001:DB8:0:0::7]:8770", "[2001:db8::7]", "[2001:db8:0:0:0:0:0:7]:1"])
def test_an_address_matches_in_every_notation(sent: str) -> None:
    """Both the configured address and the header are normalized."""
    for names in (accepted_hosts("[2001:db8:0:0::7]:8770"), accepted_hosts("10.9.9.9", ["2001:DB8::7"])):
        Authenticator("admin", hosts=names).check_origin(CIMultiDict({"Host": sent}), None)
