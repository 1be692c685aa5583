"""Where the daemon of this machine listens, as its own environment and configuration file say.

Reads a few keys and judges none: what cannot be read is as if it were not there, for the daemon would not run with it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

CONFIG_PATH: Final = "/etc/jobd/config.toml"
DEFAULT_LISTEN: Final = "127.0.0.1:8770"
_EVERYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # where one who listens everywhere is reached


def worker_socket(environ: Mapping[str, str] = os.environ) -> str | None:
    """The absolute path of worker.socket, None where it is not set."""
    path = _said("worker.socket", environ, _tables(environ))
    return os.path.abspath(path) if path else None


def admin_url(environ: Mapping[str, str] = os.environ) -> str | None:
    """admin.listen as a URL or unix:PATH, with https where admin.tls_cert is set; None where it is no address."""
    tables = _tables(environ)
    listen = _said("admin.listen", environ, tables) or DEFAULT_LISTEN
    if listen.startswith("unix:"):
        return listen
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit():
        return None
    host = _EVERYWHERE.get(host.strip("[]"), host.strip("[]"))
    scheme = "https" if _said("admin.tls_cert", environ, tables) else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _said(key: str, environ: Mapping[str, str], tables: Mapping[str, Any]) -> str:
    section, _, name = key.partition(".")
    found = environ.get(f"JOBD_{section}_{name}".upper())
    if found is None:
        table = tables.get(section)
        found = table.get(name) if isinstance(table, dict) else None
    return found if isinstance(found, str) else ""


def _tables(environ: Mapping[str, str]) -> dict[str, Any]:
    try:
        text = Path(environ.get("JOBD_CONFIG") or CONFIG_PATH).read_text(encoding="utf-8")
    except (OSError, ValueError):  # not there, not for us, no text
        return {}
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return {}
