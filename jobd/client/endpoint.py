"""Find the addresses and the token of the daemon: from an argument, the environment, or the daemon's defaults."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

DEFAULT_ADMIN_URL: Final = "http://127.0.0.1:8770"
OPERATOR_HEADER: Final = "X-Jobd-Operator"
CLIENT_HEADER: Final = "X-Jobd-Client"
SYSTEM_DIRECTORY: Final = "/run/jobd"
# The path of a Unix socket may contain a comma, so the text after a separator has to look like an endpoint.
_SEPARATOR: Final = re.compile(r"\s*,\s*(?=unix:|https?:|/)")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One listener of a daemon: a Unix socket (`path`), or a TCP address with or without `tls`.

    `prefix` precedes every path, as a proxy may require. `repr` and `str` never show the token. `operator` is the name
    in the audit log for calls of the admin API, `client` that in the timeline of a job that a call of the worker API
    cancels. Raises ValueError if a header cannot have the token.
    """

    path: str | None = None
    host: str = "localhost"
    port: int = 0
    tls: bool = False
    prefix: str = ""
    token: str | None = field(default=None, repr=False)
    operator: str | None = None
    client: str | None = None

    def __post_init__(self) -> None:
        if self.token is not None and re.fullmatch(r"[!-~]*", self.token) is None:
            raise ValueError("The token has a space, a line break or another character that a header cannot have.")

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path is not None else self.origin

    @property
    def scheme(self) -> str:
        """Return `unix`, `http` or `https`."""
        return "unix" if self.path is not None else "https" if self.tls else "http"

    @property
    def origin(self) -> str:
        """Return the part of a URL before the path. For a Unix socket the host is a placeholder."""
        if self.path is not None:
            return "http://localhost"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.prefix}"

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        for header, name in ((OPERATOR_HEADER, self.operator), (CLIENT_HEADER, self.client)):
            if name:
                headers[header] = "".join(c if " " <= c <= "~" else "?" for c in name)
        return headers


# One address, or those of several nodes.
Address = str | Endpoint | Sequence[str | Endpoint]


def parse_endpoint(text: str, *, token: str | None = None) -> Endpoint:
    """Parse `unix:/path`, `/path`, `http://host:port` or `https://host:port`. Raises ValueError."""
    if text.startswith(("unix:", "/")):
        path = text.removeprefix("unix:")
        path = path.removeprefix("//") if path.startswith("///") else path
        if not path.startswith("/"):
            raise ValueError(f"{text!r}: the path of a Unix socket must be absolute, as in unix:/run/jobd/worker.sock")
        return Endpoint(path=path, token=token)
    if any(char in text for char in "@?#"):  # not shown: it may contain a password
        raise ValueError("A daemon's URL has no user, query or fragment; the token comes from the environment.")
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{text!r}: expected unix:/path, http://host:port or https://host:port")
    if "," in parts.netloc:
        raise ValueError(f"{text!r}: write each URL of a list in full, as in http://a:8771,http://b:8771")
    try:
        port = parts.port
    except ValueError:
        raise ValueError(f"{text!r}: the port must be a number from 0 to 65535") from None
    try:
        parts.hostname.encode("idna")  # as socket.getaddrinfo does
    except UnicodeError:
        raise ValueError(f"{text!r}: the host name is not valid. Use a DNS name or an IP address") from None
    tls = parts.scheme == "https"
    return Endpoint(
        host=parts.hostname, port=port or (443 if tls else 80), tls=tls, prefix=parts.path.rstrip("/"), token=token
    )


def worker_endpoints(
    where: Address | None = None,
    token: str | None = None,
    environ: Mapping[str, str] = os.environ,
    *,
    client: str | None = None,
) -> tuple[Endpoint, ...]:
    """Find the worker API: `where`, else $JOBD_SOCKET, else $JOBD_URL, else the daemon's default socket.

    There are several endpoints if jobd runs on several machines. The token (TCP only) is `token`, else the first line
    of the file $JOBD_WORKER_TOKEN_FILE. `client` is the name of the client in timelines.
    """

    def token_for(endpoint: Endpoint) -> str | None:
        return (
            token
            if token is not None or endpoint.path is not None
            else _token_in(environ.get("JOBD_WORKER_TOKEN_FILE"))
        )

    text = where or environ.get("JOBD_SOCKET") or environ.get("JOBD_URL") or default_socket(environ)
    return tuple(each if client is None else replace(each, client=client) for each in _parse_list(text, token_for))


def admin_endpoints(
    where: Address | None = None,
    token: str | None = None,
    environ: Mapping[str, str] = os.environ,
    *,
    operator: str | None = None,
) -> tuple[Endpoint, ...]:
    """Find the admin API: `where`, else $JOBD_ADMIN_URL, else http://127.0.0.1:8770.

    There are several endpoints if jobd runs on several machines. The token is `token`, else $ADMIN_TOKEN, else the
    first line of the file $ADMIN_TOKEN_FILE. `operator` is the name in the audit log.
    """
    if token is None:
        token = environ.get("ADMIN_TOKEN") or _token_in(environ.get("ADMIN_TOKEN_FILE"))
    found = _parse_list(where or environ.get("JOBD_ADMIN_URL") or DEFAULT_ADMIN_URL, lambda endpoint: token)
    return tuple(each if operator is None else replace(each, operator=operator) for each in found)


def _parse_list(where: Address, token_for: Callable[[Endpoint], str | None]) -> tuple[Endpoint, ...]:
    """Parse one or more addresses. An address that occurs twice counts once. Raises ValueError."""
    addresses = [where] if isinstance(where, Endpoint) else where
    found: dict[str, Endpoint] = {}
    for each in _SEPARATOR.split(addresses.strip()) if isinstance(addresses, str) else addresses:
        if isinstance(each, Endpoint):
            endpoint = each
        else:
            endpoint = parse_endpoint(each)
            endpoint = replace(endpoint, token=token_for(endpoint))
        found.setdefault(str(endpoint), endpoint)
    return tuple(found.values())


def default_socket(environ: Mapping[str, str] = os.environ) -> str:
    """Return the default worker socket of a daemon: the system's for root, else the user's own.

    If only the system's socket exists, it is the system's.
    """
    system = f"{SYSTEM_DIRECTORY}/worker.sock"
    if os.geteuid() == 0:
        return system
    own = f"{environ.get('XDG_RUNTIME_DIR') or f'/run/user/{os.geteuid()}'}/jobd/worker.sock"
    return system if not os.path.exists(own) and os.path.exists(system) else own


def _token_in(file: str | None) -> str | None:
    """Return the first line of `file`, which holds one token per line."""
    if not file:
        return None
    lines = Path(file).read_text(encoding="utf-8").split()
    return lines[0] if lines else None
