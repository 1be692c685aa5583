"""Addresses that a webhook may connect to, and which parts of its URL are shown."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from jobd.webhooks.url_policy import blocked_reason, public_url, redacted

BLOCKED = {
    "loopback": "127.0.0.1 127.9.9.9 ::1 ::ffff:127.0.0.1 2002:7f00:1:: 64:ff9b::7f00:1",  # also by 6to4 and NAT64
    "link-local": "169.254.169.254 ::ffff:169.254.169.254 64:ff9b::a9fe:a9fe fe80::1 fe80::1%eth0",
    "private": """10.0.0.1 172.16.0.1 192.168.1.1 100.64.0.1 100.100.100.200 168.63.129.16 0.0.0.0 255.255.255.255
        192.0.2.1 198.18.0.1 fd00:ec2::254 fec0::1 240.0.0.1""",
    "multicast": "224.0.0.1 ff02::1",
    "reserved": """:: ::127.0.0.1 ::8.8.8.8 ::2 2001:1ff:ffff::1 2001:20::1 2001:db8::1 2620:4f:8000::1 3ffe::1
        3fff:fff::1 5f00::1 100::1 100:0:0:1::1 4000::1 1fff::1 e000::1 192.0.0.1 192.0.0.9 192.0.0.170 192.0.0.255
        192.31.196.1 192.52.193.1 192.88.99.1 192.175.48.1 ::ffff:192.88.99.1 64:ff9b::c058:6301"""
    # NAT64 with a network-specific prefix of any length, SIIT, and Teredo for 10.0.0.1 and 8.8.8.8
    """ 64:ff9b:1::a00:1 64:ff9b:1:a9fe:a9:fe00:808:808 64:ff9b:1:ffff:ffff:ffff:ffff:ffff 64:ff9b:0:1::808:808
        ::ffff:0:127.0.0.1 ::ffff:0:8.8.8.8 2001:0:4136:e378:8000:63bf:f5ff:fffe
        2001:0:4136:e378:8000:63bf:f7f7:f7f7""",
    "not a valid address": "localhost 127.1 2130706433 0x7f.0.0.1",
}


@pytest.mark.parametrize(
    ("address", "expected"),
    [("", "not a valid address"), *((each, why) for why, addresses in BLOCKED.items() for each in addresses.split())],
)
def test_addresses_of_this_machine_and_network_are_blocked(address: str, expected: str) -> None:
    assert (blocked_reason(address) or "").partition(",")[0] == expected


# www.iana.org/assignments/iana-ipv4-special-registry and -ipv6-, with multicast and unallocated blocks.
SPECIAL = """
0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 192.31.196.0/24
192.52.193.0/24 192.88.99.0/24 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4
240.0.0.0/4 ::/127 ::/96 ::ffff:0:0:0/96 64:ff9b:1::/48 100::/64 100:0:0:1::/64 2001::/23 2001:db8::/32
2620:4f:8000::/48 3ffe::/16 3fff::/20 5f00::/16 fc00::/7 fe80::/10 fec0::/10 ff00::/8 200::/7 400::/6 800::/5 1000::/4
4000::/2 8000::/1
"""


@pytest.mark.parametrize("block", SPECIAL.split())
def test_reserved_blocks_are_blocked(block: str) -> None:
    """Check the edges, the neighbors and the middle of a block, independent of the Python version."""
    network = ip_network(block)
    last = network.num_addresses - 1
    assert [
        network[place] for place in (0, 1, 2, last // 2, last - 1, last) if place <= last and passes(network[place])
    ] == []


def passes(address: object) -> bool:
    return blocked_reason(str(address)) is None


@pytest.mark.parametrize(
    "address",
    [
        "1.1.1.1", "93.184.216.34", "192.0.1.1", "192.88.98.255", "192.88.100.0", "223.255.255.255",
        "2606:4700::1111", "2001:200::1", "2001:db7:ffff::1", "2001:db9::1", "2620:4f:8001::1", "2a00::1",
        "3fff:1000::1", "::ffff:1.1.1.1", "64:ff9b::101:101", "64:ff9b::a83f:8111", "2002:101:101::1",
    ],
)  # fmt: skip
def test_public_addresses_are_allowed(address: str) -> None:
    assert blocked_reason(address) is None


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://x", "https://x"),
        ("https://x/", "https://x"),
        ("https://x:8443/hush", "https://x:8443/…"),
        ("https://x/y/z?token=hush", "https://x/…"),
        ("https://x?token=hush", "https://x/…"),
        ("https://h/x", "https://h/…"),
        ("https://me:hush@h:1/", "https://h:1"),
        ("http://[::1]:80/hush", "http://[::1]:80/…"),
    ],
)
def test_only_the_host_of_a_url_is_shown(url: str, shown: str) -> None:
    assert public_url(url) == shown


URL = "https://me:hushhush@h.test:81/Hush-123/v1/a%2fb%20c/api?token=h+ush&k=l=m4n5&e%20f+g=seven77"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("no POST /Hush-123/v1/a%2fb%20c/api?token=h+ush&k=l=m4n5&e%20f+g=seven77!", "no POST …!"),
        ("no /Hush-123/v1/a%2fb%20c/api here", "no … here"),
        ("xHUSH-123x", "x…x"),
        ("it is 'a/b c' or a%2FB%20C", "it is '…' or …"),
        ('"h+ush", "h ush"', '"…", "…"'),
        ("{m4n5}, m4n56", "{…}, m4n56"),
        ("e f+g, e f g, e%20f+g", "…, …, …"),
        ("xseven77, seven77", "xseven77, …"),
        ("xhush-123", "x…"),
        ("api, v1, k, h.test:81", "api, v1, k, h.test:81"),
        ("me:hushhush, xhushhush", "…, x…"),
        ("a broken token", "a broken …"),
        ("", ""),
    ],
)
def test_parts_of_the_url_are_redacted(message: str, expected: str) -> None:
    assert redacted(URL, message) == expected


def test_the_longer_of_two_secrets_is_redacted_as_a_whole() -> None:
    assert redacted("https://h.test/abcdefgh/ABCDEFGHIJ", "abcdefghij, ABCDEFGH") == "…, …"


def test_a_url_without_a_path_has_nothing_to_redact() -> None:
    assert redacted("https://x.test/", "All / is said, … too.") == "All / is said, … too."
    assert redacted("https://x.test/hook", "hook, webhook, hooks") == "…, webhook, hooks"
