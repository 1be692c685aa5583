"""What `admin.hosts` may name: a host as it can stand in a Host header, without the port, which is not compared.

Opens no door itself, and asks no name server.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Final

EXPECTED: Final = (
    'expected a host name, an IPv4 address or an IPv6 address in brackets, such as "jobs.example.com", without scheme, '
    "port and path"
)

_LABEL: Final = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME: Final = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?", re.IGNORECASE | re.ASCII)
_LONGEST: Final = 253  # characters


def is_host(text: str) -> bool:
    """Whether somebody can call this daemon so: by a name, or by an address that is one place."""
    is_bracketed = text.startswith("[") and text.endswith("]")
    plain = text[1:-1] if is_bracketed else text
    if ":" in plain:
        return _is_address(plain)
    if is_bracketed or len(plain.removesuffix(".")) > _LONGEST or not _NAME.fullmatch(plain):
        return False
    ends_in_number = plain.removesuffix(".").rpartition(".")[2].isdigit()  # for a browser that is an address
    return _is_address(plain) if ends_in_number else True


def _is_address(text: str) -> bool:
    """Not so an address with its zone, which no Host header has, or the one that stands for all."""
    try:
        return "%" not in text and not ip_address(text).is_unspecified
    except ValueError:
        return False
