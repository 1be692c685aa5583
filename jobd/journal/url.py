"""Parse the URL of a journal in PostgreSQL, and redact it for messages."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import parse_qs, unquote

from msgspec import Struct

EXPECTED: Final = "expected postgresql://ROLE@HOST:PORT/DATABASE, with several hosts separated by commas"
LOCAL: Final = "the local socket"  # host of a URL without one
# urlsplit of Python 3.13 rejects lists of hosts that contain an IPv6 address.
_URL: Final = re.compile(r"(postgres(?:ql)?)://([^/?#]*)(/[^?#]*)?(\?[^#]*)?")
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
    parts = _URL.fullmatch(text)
    if parts is None:
        raise ValueError(EXPECTED)
    scheme, netloc, path, parameters = parts.groups(default="")
    try:
        query = parse_qs(parameters[1:], strict_parsing=len(parameters) > 1)
    except ValueError:
        raise ValueError(EXPECTED) from None
    login, at, given = netloc.rpartition("@")
    role = unquote(login.partition(":")[0]) or query.get("user", [""])[-1]
    database = unquote(path.removeprefix("/")) or query.get("dbname", query.get("database", [""]))[-1] or role
    if not given:
        directory = query.get("host", [""])[-1]
        return JournalUrl((directory or LOCAL,), (text,), role, database)
    hosts = given.split(",")
    if "@" in login or not all(_HOST.fullmatch(host) for host in hosts):
        raise ValueError(f"{EXPECTED}; in a password, write @ as %40, : as %3A, / as %2F and % as %25")
    urls = tuple(f"{scheme}://{login}{at}{host}{path}{parameters}" for host in hosts)
    return JournalUrl(tuple(hosts), urls, role, database)


def redacted(text: str) -> str:
    """Return the URL with *** in place of its passwords. It need not be valid."""
    return _PARAMETER.sub(r"\1***", _PASSWORD.sub(r"\1:***@", text))


def has_password(text: str) -> bool:
    return redacted(text) != text
