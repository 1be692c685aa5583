"""Check the headers of a request: bearer token, Host and Origin, Content-Type, idempotency key.

The names of `headers` are in lower case, their values are raw. Tokens are stored and compared as digests. They never
appear in a response or a log line.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable, Mapping
from hashlib import blake2s, sha256
from ipaddress import ip_address
from typing import Final, Literal

from jobd.model.api_call import JSON, LINES
from jobd.model.commands import IdempotencyKey
from jobd.model.errors import api_error
from jobd.model.fields import MAX_OPERATOR

FORM: Final = "application/x-www-form-urlencoded"
_RAW: Final = {name: name.encode() for name in (JSON, LINES, FORM)}
LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
ANY_ADDRESS: Final = frozenset({"", "0.0.0.0", "::"})

OPERATOR_HEADER: Final = "X-Jobd-Operator"
CLIENT_HEADER: Final = "X-Jobd-Client"

Permission = Literal["full", "read"]

_KEY = re.compile(r"[ -~]{1,200}")
_HOST = re.compile(r"(\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[^][:@/?#\s]*))(:[0-9]*)?")


class Authenticator:
    """Authenticate the requests of one listener.

    `name` ("worker", "admin", ...) is the scope of its idempotency keys. If `tokens` is None, no token is needed. If
    `hosts` is None, every Host and Origin is accepted, as on a Unix socket.
    """

    def __init__(
        self,
        name: str,
        *,
        tokens: Iterable[str] | None = None,
        read_only_tokens: Iterable[str] = (),
        hosts: Iterable[str] | None = None,
    ) -> None:
        self.name = name
        self.hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        self._digests: tuple[tuple[bytes, Permission], ...] | None = None
        if tokens is not None:
            self.replace_tokens(tokens, read_only_tokens)

    def replace_tokens(self, tokens: Iterable[str], read_only_tokens: Iterable[str] = ()) -> None:
        """Make these tokens the only valid ones."""
        full: list[tuple[bytes, Permission]] = [(token_digest(token), "full") for token in tokens]
        self._digests = (*full, *((token_digest(token), "read") for token in read_only_tokens))

    def authenticate(self, headers: Mapping[str, bytes]) -> Permission:
        """Return the permission of the request's token. Raises a 401 error unless there is exactly one valid token."""
        if self._digests is None:
            return "full"
        scheme, _, token = headers.get("authorization", b"").partition(b" ")
        permission = self.permission_of(blake2s(token.strip()).digest())
        if permission is None or scheme.lower() != b"bearer":
            raise api_error("unauthorized", "The token is missing or not valid: send `Authorization: Bearer TOKEN`.")
        return permission

    def permission_of(self, digest: bytes) -> Permission | None:
        """Return the permission of the token with this digest, None if it is invalid. Takes constant time."""
        found: Permission | None = None
        for valid_digest, permission in self._digests or ():
            if hmac.compare_digest(digest, valid_digest) and found is None:
                found = permission
        return found

    def check_origin(self, headers: Mapping[str, bytes], address: object) -> None:
        """Raise a 403 error if Host is not a name of this daemon or Origin is another site.

        This prevents DNS rebinding and cross-site requests. Host may also be `address`, that of the socket.
        """
        if self.hosts is None:
            return
        host = header_text(headers, "host")
        name = host_name(host)
        if name not in self.hosts and not (isinstance(address, tuple) and name == address[0]):
            raise api_error("forbidden", "The Host header is not a name of this daemon. Add it to `admin.hosts`.")
        if "origin" in headers and not self._is_own_site(header_text(headers, "origin"), host):
            message = "Requests from other sites are rejected (Origin). If the site is yours, add it to `admin.hosts`."
            raise api_error("forbidden", message)

    def _is_own_site(self, origin: str, host: str) -> bool:
        scheme, separator, netloc = origin.lower().partition("://")
        if not separator or scheme not in {"http", "https"}:
            return False
        if netloc == host.lower():
            return True
        site_names = (self.hosts or frozenset()) - LOOPBACK  # another port on this machine is another site
        return host_name(netloc) in site_names

    def idempotency_key(self, key: str, method: str, path: str, body: bytes) -> IdempotencyKey:
        """Return the digest of an Idempotency-Key, in the scope of listener, method and path. Raises a 400 error."""
        if _KEY.fullmatch(key) is None:
            message = "Idempotency-Key must be 1 to 200 printable ASCII characters."
            raise api_error("invalid_request", message, field="Idempotency-Key")
        scope = "\n".join((self.name, method, path, key))
        return IdempotencyKey(digest=sha256(scope.encode()).hexdigest(), body_hash=sha256(body).hexdigest())


def header_text(headers: Mapping[str, bytes], name: str) -> str:
    """Return the value of a header, "" if it is missing. Bytes that are not UTF-8 become surrogates."""
    return headers.get(name, b"").rstrip(b" \t").decode("utf-8", "surrogateescape")


def printable_name(name: str) -> str:
    """Return the name of an operator or client in printable form, at most MAX_OPERATOR characters. It may be empty."""
    printable = "".join(char if char.isprintable() else " " for char in name[: 4 * MAX_OPERATOR])
    return " ".join(printable.split())[:MAX_OPERATOR].rstrip()


def token_digest(token: str) -> bytes:
    """Return the digest by which a token is kept in memory and compared. SHA-256 would take twice as long."""
    return blake2s(token.encode("utf-8", "surrogateescape")).digest()


def host_name(host: str) -> str:
    """Return the name in a Host header in lower case, without its port. Empty if the header is malformed.

    An IPv6 address is in its shortest form, without brackets.
    """
    parts = _HOST.fullmatch(host.lower())
    name = "" if parts is None else (parts["v6"] or parts["name"]).removesuffix(".")
    return _normalized_address(name) if ":" in name else name


def accepted_hosts(listen: str, hosts: Iterable[str] = ()) -> frozenset[str]:
    """Return the host names of a daemon that listens on `listen` (with or without a port).

    These include `hosts`, and the loopback names if the daemon listens on loopback or on all addresses.
    """
    name = _normalized_host(listen)
    names = {name, *map(_normalized_host, hosts)} - ANY_ADDRESS
    return frozenset(names | LOOPBACK if names & LOOPBACK or name in ANY_ADDRESS else names)


def _normalized_host(host: str) -> str:
    """Return `host_name(host)`. `host` may also be an IPv6 address without brackets."""
    return host_name(host) or _normalized_address(host.lower())


def _normalized_address(address: str) -> str:
    try:
        return str(ip_address(address))
    except ValueError:
        return address


def check_content_type(headers: Mapping[str, bytes], expected: str) -> None:
    """Raise a 415 error unless the body is of the type `expected`, in UTF-8 and not compressed."""
    if headers.get("content-type") != _RAW[expected] and not _is_type(header_text(headers, "content-type"), expected):
        raise api_error("unsupported_media_type", f"The body must be {expected}: send `Content-Type: {expected}`.")
    if ("content-encoding" in headers and header_text(headers, "content-encoding").lower() != "identity") or (
        "transfer-encoding" in headers and header_text(headers, "transfer-encoding").lower() != "chunked"
    ):
        message = "Compressed bodies are not supported. Send the body uncompressed."
        raise api_error("unsupported_media_type", message)


def _is_type(content_type: str, expected: str) -> bool:
    kind, _, rest = content_type.partition(";")
    if kind.strip().lower() != expected:
        return False
    values = [value.partition("=") for value in rest.lower().split(";") if value.strip()]
    charsets = [value.strip(' "') for name, _, value in values if name.strip() == "charset"]
    return all(charset in {"utf-8", "utf8", "us-ascii"} for charset in charsets)
