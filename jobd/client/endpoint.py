"""Find the daemon's address and token: from an argument, the environment, or the daemon's defaults."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

DEFAULT_ADMIN_URL: Final = "http://127.0.0.1:8770"
OPERATOR_HEADER: Final = "X-Jobd-Operator"
SYSTEM_DIRECTORY: Final = "/run/jobd"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One listener of a daemon: a Unix socket (`path`), or a TCP address with or without `tls`.

    `prefix` precedes every path, as a proxy may require. `repr` and `str` never show the token. `operator` is the name
    in the audit log for calls of the admin API.
    """

    path: str | None = None
    host: str = "localhost"
    port: int = 0
    tls: bool = False
    prefix: str = ""
    token: str | None = field(default=None, repr=False)
    operator: str | None = None

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path is not None else self.origin

    @property
    def origin(self) -> str:
        """Return the part of a URL before the path. For a Unix socket the host is a placeholder."""
        if self.path is not None:
            return "http://localhost"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.prefix}"

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        if self.operator:
            headers[OPERATOR_HEADER] = "".join(c if " " <= c <= "~" else "?" for c in self.operator)
        return headers


def parse_endpoint(text: str, *, token: str | None = None) -> Endpoint:
    """Parse `unix:/path`, `/path`, `http://host:port` or `https://host:port`. Raises ValueError."""
    if text.startswith(("unix:", "/")):
        path = text.removeprefix("unix:")
        path = path.removeprefix("//") if path.startswith("///") else path
        if not path.startswith("/"):
            raise ValueError(f"{text!r}: the path of a Unix socket must be absolute, as in unix:/run/jobd/worker.sock")
        return Endpoint(path=path, token=token)
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{text!r}: expected unix:/path, http://host:port or https://host:port")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("A daemon's URL has no user, query or fragment; the token comes from the environment.")
    tls = parts.scheme == "https"
    port = parts.port or (443 if tls else 80)
    return Endpoint(host=parts.hostname, port=port, tls=tls, prefix=parts.path.rstrip("/"), token=token)


def worker_endpoint(
    where: str | Endpoint | None = None, token: str | None = None, environ: Mapping[str, str] = os.environ
) -> Endpoint:
    """Find the worker API: `where`, else $JOBD_SOCKET, else $JOBD_URL, else the daemon's default socket.

    The token (TCP only) is `token`, else the first line of the file $JOBD_WORKER_TOKEN_FILE.
    """
    if isinstance(where, Endpoint):
        return where
    text = where or environ.get("JOBD_SOCKET") or environ.get("JOBD_URL") or default_socket(environ)
    found = parse_endpoint(text)
    if token is None and found.path is None:
        token = _token_in(environ.get("JOBD_WORKER_TOKEN_FILE"))
    return parse_endpoint(text, token=token)


def admin_endpoint(
    where: str | Endpoint | None = None,
    token: str | None = None,
    environ: Mapping[str, str] = os.environ,
    *,
    operator: str | None = None,
) -> Endpoint:
    """Find the admin API: `where`, else $JOBD_ADMIN_URL, else http://127.0.0.1:8770.

    The token is `token`, else $ADMIN_TOKEN, else the first line of the file $ADMIN_TOKEN_FILE. `operator` is the name
    in the audit log.
    """
    if isinstance(where, Endpoint):
        return where if operator is None else replace(where, operator=operator)
    if token is None:
        token = environ.get("ADMIN_TOKEN") or _token_in(environ.get("ADMIN_TOKEN_FILE"))
    found = parse_endpoint(where or environ.get("JOBD_ADMIN_URL") or DEFAULT_ADMIN_URL, token=token)
    return replace(found, operator=operator)


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
