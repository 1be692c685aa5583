"""Who may come in, judged by the request's headers alone: bearer token, Host and Origin, kind of body, key.

Reads no body and knows no job. A token is kept and compared as a digest; none ever appears in an answer or a log line.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable
from hashlib import sha256
from ipaddress import ip_address
from typing import Final, Literal

from aiohttp.hdrs import CONTENT_ENCODING, CONTENT_TYPE, TRANSFER_ENCODING
from multidict import MultiMapping

from jobd.model.commands import MAX_OPERATOR, IdempotencyKey
from jobd.model.errors import api_error

JSON: Final = "application/json"
LINES: Final = "application/x-ndjson"
FORM: Final = "application/x-www-form-urlencoded"
LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
ANY_ADDRESS: Final = frozenset({"", "0.0.0.0", "::"})

OPERATOR_HEADER: Final = "X-Jobd-Operator"

# What a caller may do: everything at this door, or look and change nothing.
Permission = Literal["full", "read"]

_KEY = re.compile(r"[ -~]{1,200}")
_HOST = re.compile(r"(\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[^][:@/?#\s]*))(:[0-9]*)?")
_PLAIN = {JSON: frozenset({"application/json", "application/json; charset=utf-8", "application/json;charset=utf-8"})}


class Authenticator:
    """The rules of one door. `name` is the scope of its idempotency keys ("worker", "admin", ...).

    `tokens` None: no token is needed. `readers` are tokens that may look and change nothing. `hosts` None: any Host
    and Origin is taken (a Unix socket).
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
        """From now on these tokens are valid, and no others. Any of several will do."""
        full: list[tuple[bytes, Permission]] = [(token_digest(token), "full") for token in tokens]
        self._digests = (*full, *((token_digest(token), "read") for token in read_only_tokens))

    def authenticate(self, headers: MultiMapping[str]) -> Permission:
        """What the request's token allows; 401 unless it carries one valid token."""
        if self._digests is None:
            return "full"
        scheme, _, token = ", ".join(headers.getall("Authorization", ())).partition(" ")
        access = self.permission_of(token_digest(token.strip()))
        if access is None or scheme.lower() != "bearer":
            raise api_error("unauthorized", "A valid token is needed: send `Authorization: Bearer <token>`.")
        return access

    def permission_of(self, digest: bytes) -> Permission | None:
        """What the token with this digest allows, None where it is not valid. Takes the same time whichever it is."""
        known = [access for own, access in self._digests or () if hmac.compare_digest(digest, own)]
        return known[0] if known else None

    def check_origin(self, headers: MultiMapping[str], address: object) -> None:
        """403 where Host is not a name of this daemon or Origin is another site (DNS rebinding, cross-site requests).

        `address` is the socket's own: a request to that very address is no rebinding.
        """
        if self.hosts is None:
            return
        host = headers.get("Host", "")
        name = host_name(host)
        if name not in self.hosts and not (isinstance(address, tuple) and name == address[0]):
            raise api_error("forbidden", "The Host header is not a name of this daemon. Add it to `admin.hosts`.")
        origin = headers.get("Origin")
        if origin is not None and not self._is_own(origin, host):
            message = (
                "Requests from other sites are not taken (Origin). Where that site is yours, add it to `admin.hosts`."
            )
            raise api_error("forbidden", message)

    def _is_own(self, origin: str, host: str) -> bool:
        """Whether `origin` is the site that the request went to, or one that the operator named."""
        scheme, separator, netloc = origin.lower().partition("://")
        if not separator or scheme not in {"http", "https"}:
            return False
        if netloc == host.lower():
            return True
        named = (self.hosts or frozenset()) - LOOPBACK  # a page on another port of this machine is another site
        return host_name(netloc) in named

    def idempotency_key(self, key: str, method: str, path: str, body: bytes) -> IdempotencyKey:
        """The use of an Idempotency-Key: its scope is this door, the method and the path. 400 for a bad key."""
        if _KEY.fullmatch(key) is None:
            message = "Idempotency-Key must be 1 to 200 printable ASCII characters."
            raise api_error("invalid_request", message, field="Idempotency-Key")
        scope = "\n".join((self.name, method, path, key))
        return IdempotencyKey(digest=sha256(scope.encode()).hexdigest(), body_hash=sha256(body).hexdigest())


def operator_name(given: str) -> str:
    """The name that an operator gives, as it may stand in a log and on a screen; "" where nothing is left of it.

    What cannot be shown becomes a blank, blanks become one, and it is cut to MAX_OPERATOR characters.
    """
    shown = "".join(char if char.isprintable() else " " for char in given[: 4 * MAX_OPERATOR])
    return " ".join(shown.split())[:MAX_OPERATOR].rstrip()


def token_digest(token: str) -> bytes:
    """A token as it is kept and compared."""
    return sha256(token.encode("utf-8", "surrogateescape")).digest()


def host_name(host: str) -> str:
    """The name in a Host header, without its port: lower case, an IPv6 address in its shortest form without brackets.

    "" where it is unreadable.
    """
    parts = _HOST.fullmatch(host.lower())
    name = "" if parts is None else (parts["v6"] or parts["name"]).removesuffix(".")
    return _normalized_address(name) if ":" in name else name


def own_names(listen: str, hosts: Iterable[str] = ()) -> frozenset[str]:
    """The names under which a daemon that listens on `listen` (with or without its port) may be called.

    `hosts` are the operator's own. A daemon that listens on every address is called localhost as well.
    """
    name = _normalized_host(listen)
    names = {name, *map(_normalized_host, hosts)} - ANY_ADDRESS
    return frozenset(names | LOOPBACK if names & LOOPBACK or name in ANY_ADDRESS else names)


def _normalized_host(host: str) -> str:
    """What `host_name` makes of a Host header with this name, which may be an IPv6 address without brackets."""
    return host_name(host) or _normalized_address(host.lower())


def _normalized_address(address: str) -> str:
    try:
        return str(ip_address(address))
    except ValueError:
        return address


def is_plain_json(headers: MultiMapping[str]) -> bool:
    """Whether a body is JSON at first sight, as nearly all are: check_kind would take it."""
    given = headers.get(CONTENT_TYPE, "")
    return given in _PLAIN[JSON] and CONTENT_ENCODING not in headers and TRANSFER_ENCODING not in headers


def check_content_type(headers: MultiMapping[str], wanted: str) -> None:
    """415 unless the body is of the type `wanted`, in UTF-8 and not compressed."""
    given = headers.get(CONTENT_TYPE, "")
    if given not in _PLAIN.get(wanted, ()) and not _is_type(given, wanted):
        raise api_error("unsupported_media_type", f"The body must be {wanted}: send `Content-Type: {wanted}`.")
    if _is_encoded(headers, CONTENT_ENCODING, "identity") or _is_encoded(headers, TRANSFER_ENCODING, "chunked"):
        raise api_error("unsupported_media_type", "Compressed bodies are not taken: send it as it is.")


def _is_encoded(headers: MultiMapping[str], name: str, plain: str) -> bool:
    return name in headers and headers[name].lower() != plain


def _is_type(given: str, wanted: str) -> bool:
    kind, _, rest = given.partition(";")
    if kind.strip().lower() != wanted:
        return False
    values = [value.partition("=") for value in rest.lower().split(";") if value.strip()]
    charsets = [value.strip(' "') for name, _, value in values if name.strip() == "charset"]
    return all(charset in {"utf-8", "utf8", "us-ascii"} for charset in charsets)
