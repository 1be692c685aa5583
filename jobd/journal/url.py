"""The URL of a journal in PostgreSQL, and what of it can be shown."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit, urlunsplit

from msgspec import Struct

EXPECTED: Final = "expected postgresql://ROLE@HOST:PORT/DATABASE, with several hosts separated by commas"
LOCAL: Final = "the local socket"  # host of a URL without one
_PASSWORD: Final = re.compile(r"(://[^:@/?]*):.*@", re.DOTALL)
_PARAMETER: Final = re.compile(r"([?&](?:ssl)?password=)[^&]*", re.IGNORECASE)
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:,@/\s]+)(:[0-9]{1,5})?")


class JournalUrl(Struct, frozen=True):
    """A parsed URL. `hosts` are the servers as shown in messages. Each of `urls` has one of them."""

    hosts: tuple[str, ...]
    urls: tuple[str, ...]
    role: str
    database: str


def parse(text: str) -> JournalUrl:
    """Parse a URL. Raises ValueError with a message that contains no password."""
    try:
        parts = urlsplit(text)
        query = parse_qs(parts.query, strict_parsing=bool(parts.query))
    except ValueError:
        raise ValueError(EXPECTED) from None
    if parts.scheme not in ("postgresql", "postgres") or parts.fragment:
        raise ValueError(EXPECTED)
    login, at, given = parts.netloc.rpartition("@")
    role = unquote(login.partition(":")[0]) or query.get("user", [""])[-1]
    database = unquote(parts.path.removeprefix("/")) or query.get("dbname", query.get("database", [""]))[-1] or role
    if not given:
        directory = query.get("host", [""])[-1]
        return JournalUrl((directory or LOCAL,), (text,), role, database)
    hosts = given.split(",")
    if "@" in login or not all(_HOST.fullmatch(host) for host in hosts):
        raise ValueError(f"{EXPECTED}; in a password, write @ as %40, : as %3A, / as %2F and % as %25")
    urls = tuple(urlunsplit((parts.scheme, f"{login}{at}{host}", parts.path, parts.query, "")) for host in hosts)
    return JournalUrl(tuple(hosts), urls, role, database)


def redacted(text: str) -> str:
    """Return the URL with *** in place of its passwords. It need not be valid."""
    return _PARAMETER.sub(r"\1***", _PASSWORD.sub(r"\1:***@", text))


def has_password(text: str) -> bool:
    return redacted(text) != text
