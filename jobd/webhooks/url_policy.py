"""Decide which addresses webhooks may connect to, and redact their URLs."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final
from urllib.parse import SplitResult, unquote, unquote_plus, urlsplit

_NAT64: Final = IPv6Network("64:ff9b::/96")
_PUBLIC: Final = IPv6Network("2000::/3")  # the only block from which addresses of hosts are allocated
_UNIQUE_LOCAL: Final = IPv6Network("fc00::/7")
# The platform services of Azure: a public address that is reachable only from inside a virtual machine.
_AZURE_PLATFORM: Final = frozenset({IPv4Address("168.63.129.16")})
# Reserved special-purpose blocks (RFC 6890). The `ipaddress` module knows only some of them.
_RESERVED: Final = (
    IPv4Network("192.0.0.0/24"),  # IETF protocols
    IPv4Network("192.31.196.0/24"),  # AS112, as 192.175.48.0/24: anycast
    IPv4Network("192.52.193.0/24"),  # AMT relays
    IPv4Network("192.88.99.0/24"),  # 6to4 relays
    IPv4Network("192.175.48.0/24"),
    IPv6Network("2001::/23"),  # IETF protocols, including Teredo
    IPv6Network("2001:db8::/32"),  # examples
    IPv6Network("2620:4f:8000::/48"),  # AS112
    IPv6Network("3ffe::/16"),  # the former 6bone
    IPv6Network("3fff::/20"),  # examples
)


def blocked_reason(address: str) -> str | None:
    """Return why a numeric address is blocked, in a few words; None if it is allowed."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return "not a valid address"
    return _reason(parsed)


def _reason(address: IPv4Address | IPv6Address) -> str | None:
    if isinstance(address, IPv6Address):
        if (inner := _inner(address)) is not None:
            return _reason(inner)
        if address.is_site_local or address in _UNIQUE_LOCAL:
            return "private"
    is_unallocated = address.version == 6 and address not in _PUBLIC
    for kind, applies in (
        ("loopback", address.is_loopback),
        ("link-local, the range of cloud metadata services", address.is_link_local),
        ("multicast", address.is_multicast),
        ("reserved", is_unallocated or any(address in network for network in _RESERVED)),
        ("private", not address.is_global or address in _AZURE_PLATFORM),
    ):
        if applies:
            return kind
    return None


def _inner(address: IPv6Address) -> IPv4Address | None:
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    return IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else None


ELLIPSIS: Final = "…"  # replaces the hidden parts of a URL
MIN_SECRET: Final = 4  # characters; shorter parts are not treated as secrets
MIN_DISTINCT: Final = 8  # characters; shorter parts are only redacted as whole words ("hook", but not in "webhook")


def public_url(url: str) -> str:
    """Return scheme and host, with an ellipsis if there is more."""
    parts = urlsplit(url)
    origin = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    return f"{origin}/{ELLIPSIS}" if _rest(parts).strip("/") else origin


def redacted(url: str, text: str) -> str:
    """Return `text` without any part of `url` except its scheme and host, in any encoding."""
    parts = urlsplit(url)
    rest, user = _rest(parts), parts.netloc.rpartition("@")[0]
    parts_to_hide = {rest, rest.partition("?")[0], user, *re.split(r"[/?&=;]", rest), *user.split(":")}
    parts_to_hide |= {plain for each in parts_to_hide for plain in (unquote(each), unquote_plus(each))}
    secrets = sorted((each for each in parts_to_hide if len(each) >= MIN_SECRET), key=len, reverse=True)
    return re.sub("|".join(map(_pattern, secrets)), ELLIPSIS, text, flags=re.IGNORECASE) if secrets else text


def _rest(parts: SplitResult) -> str:
    return parts.path + (f"?{parts.query}" if parts.query else "")


def _pattern(secret: str) -> str:
    return re.escape(secret) if len(secret) >= MIN_DISTINCT else rf"(?<!\w){re.escape(secret)}(?!\w)"
