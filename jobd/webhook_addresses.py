"""Which addresses a webhook may connect to: none of this machine, of its network, or of who runs it.

Looks nothing up.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Final

_NAT64: Final = (IPv6Network("64:ff9b::/96"), IPv6Network("64:ff9b:1::/48"))
_COMPATIBLE: Final = IPv6Network("::/96")
_OF_THE_HOST: Final = frozenset({IPv4Address("168.63.129.16")})  # Azure's: public by its number, and no further than it


def why_not(address: str) -> str | None:
    """Why nothing is sent to that numeric address, in a few words; None where something may be."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return "no plain address"
    return _judge(parsed)


def _judge(address: IPv4Address | IPv6Address) -> str | None:
    if isinstance(address, IPv6Address):
        if (inner := _inner(address)) is not None:
            return _judge(inner)
        if address.is_site_local:
            return "private"
    for said, is_so in (
        ("loopback", address.is_loopback),
        ("link-local, where clouds keep their secrets", address.is_link_local),
        ("multicast", address.is_multicast),
        ("private", not address.is_global or address in _OF_THE_HOST),
    ):
        if is_so:
            return said
    return None


def _inner(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that a gateway would make of it."""
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    if any(address in network for network in _NAT64) or (address in _COMPATIBLE and int(address) > 1):
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return None
