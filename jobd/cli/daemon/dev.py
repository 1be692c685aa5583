"""`jobd dev`: a daemon in the current directory, for a first hour and for development."""

from __future__ import annotations

import os
import secrets
import shlex
import socket
import sys
from pathlib import Path
from typing import Final

import click

from jobd.cli import terminal

_ADMIN_PORT: Final = 8770
# Settings of another daemon that this shell may have.
_FOREIGN: Final = ("ADMIN_TOKEN_FILE", "ENVIRONMENT")


@click.command()
@click.option("--port", type=int, metavar="N", help="Port of the dashboard. [default: 8770, or a free one]")
def dev(port: int | None) -> int:
    """Run a daemon for development in the current directory.

    Its jobs are in ./jobd.db and stay there when it stops. It reads no configuration file. stdout has the lines that
    other terminals need, and a link that signs a browser in to the dashboard. The token is $ADMIN_TOKEN if it is set,
    else a new one.
    """
    from jobd import daemon
    from jobd.config_loader import load

    admin = f"127.0.0.1:{port or free_port(_ADMIN_PORT)}"
    token = os.environ.get("ADMIN_TOKEN") or secrets.token_urlsafe(32)
    path = str(Path.cwd() / "jobd.sock")
    flags = {"store.path": "jobd.db", "worker.socket": path, "admin.listen": admin, "log.level": "warning"}
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith("JOBD_") and name not in _FOREIGN
    } | {"ADMIN_TOKEN": token}
    loaded = load(flags, environ, "")
    terminal.emit(f"export JOBD_SOCKET={shlex.quote(path)}")
    terminal.emit(f"export JOBD_ADMIN_URL=http://{admin} ADMIN_TOKEN={token}")
    terminal.emit(f"# Dashboard: http://{admin}/sign-in#{token}")
    sys.stdout.flush()
    terminal.say("Run the two export lines in your other terminals. Ctrl-C stops the daemon and keeps its jobs.")
    return daemon.serve(loaded, lambda: load(flags, environ, ""))


def free_port(first: int = 0) -> int:
    """Return the port `first`, or a free one if another program has it."""
    with socket.socket() as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(("127.0.0.1", first))
        except OSError:
            found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
