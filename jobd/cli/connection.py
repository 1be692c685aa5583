"""Where the daemon is and which token opens it: options, environment, defaults; and the clients made from them.

Opens no connection itself. What the daemon's own settings say is in own_daemon.py.
"""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from jobd.cli import exit_codes, own_daemon

if TYPE_CHECKING:
    from jobd.client import AdminClient, JobClient
    from jobd.client.endpoint import Endpoint

# Long enough for a daemon that is being restarted, short enough for somebody who waits at a prompt.
PATIENCE_S: Final = 3.0


class Places:
    """The options as given, None where not. Kept in `ctx.obj`, so that they may stand before or after the verb."""

    def __init__(self) -> None:
        self.socket: str | None = None
        self.url: str | None = None
        self.admin_url: str | None = None
        self.token_file: str | None = None
        self.operator: str | None = None


def _keep(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None and param.name is not None:
        setattr(ctx.ensure_object(Places), param.name, value)


def _option(flag: str, metavar: str, text: str) -> Callable[[Any], Any]:
    return click.option(flag, metavar=metavar, help=text, callback=_keep, expose_value=False)


_SOCKET = _option("--socket", "PATH", "Worker socket of the daemon.  [env: JOBD_SOCKET]")
_URL = _option("--url", "URL", "Worker API over TCP, instead of the socket.  [env: JOBD_URL]")
_ADMIN = _option("--admin-url", "URL", "Admin API: http://HOST:PORT or unix:PATH.  [env: JOBD_ADMIN_URL]")
_WORKER_TOKEN_FILE: Final = "JOBD_WORKER_TOKEN_FILE"
_ADMIN_TOKEN_FILE: Final = "ADMIN_TOKEN_FILE"
_OPERATOR = _option("--operator", "NAME", "Who you are, for timelines and the audit log; USER@HOST by default.")


def _token_option(variables: str) -> Callable[[Any], Any]:
    text = f"File with the token, one a line; the first is used.  [env: {variables}]"
    return _option("--token-file", "FILE", text)


def worker_options(verb: Any) -> Any:
    """The options of a verb that talks to the worker API."""
    return _SOCKET(_URL(_token_option(_WORKER_TOKEN_FILE)(verb)))


def admin_options(verb: Any) -> Any:
    """The options of a verb that talks to the admin API."""
    return _ADMIN(_token_option(_ADMIN_TOKEN_FILE)(_OPERATOR(verb)))


def all_options(verb: Any) -> Any:
    token = _token_option(f"{_ADMIN_TOKEN_FILE}, over the worker API {_WORKER_TOKEN_FILE}")
    return _SOCKET(_URL(_ADMIN(token(_OPERATOR(verb)))))


def read_token(path: str) -> str:
    """The first token in the file `path`. Problem (78) where there is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise exit_codes.Problem(f"Cannot read the token file {path}: {why}", exit_codes.CONFIG) from None
    if not lines:
        raise exit_codes.Problem(f"The token file {path} is empty: write a token into it", exit_codes.CONFIG)
    return lines[0]


def worker_endpoint(places: Places) -> Endpoint:
    """Where the worker API is: by option, else by the environment, else by the daemon's settings, else its default."""
    from jobd.client.endpoint import worker_endpoint as find

    if places.url and places.socket:
        raise click.UsageError("--socket and --url name two places: give one")
    where = places.url or (os.path.abspath(places.socket.removeprefix("unix:")) if places.socket else None)
    if where is None and not (os.environ.get("JOBD_SOCKET") or os.environ.get("JOBD_URL")):
        where = own_daemon.worker_socket()
    return _found(lambda: find(where, worker_token(places)))


def admin_endpoint(places: Places) -> Endpoint:
    """Where the admin API is, with its token: found like the worker API."""
    from jobd.client.endpoint import admin_endpoint as find

    token = admin_token(places)
    where = places.admin_url or os.environ.get("JOBD_ADMIN_URL") or own_daemon.admin_url()
    return _found(lambda: find(where, token, operator=places.operator or this_operator()))


def this_operator() -> str:
    """The user behind this command, also where they became root by sudo, and the machine: `eve@build-3`."""
    try:
        user = os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):  # a user id without a name
        user = f"uid-{os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def _found(find: Callable[[], Endpoint]) -> Endpoint:
    try:
        return find()
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def admin_token(places: Places) -> str:
    """--token-file, else ADMIN_TOKEN, else ADMIN_TOKEN_FILE. Problem (5) where none of them is given."""
    if places.token_file:
        return read_token(places.token_file)
    token = os.environ.get("ADMIN_TOKEN", "").strip()
    if token:
        return token
    if path := os.environ.get(_ADMIN_TOKEN_FILE):
        return read_token(path)
    text = "No admin token: set ADMIN_TOKEN or ADMIN_TOKEN_FILE to the daemon's, or give --token-file FILE"
    raise exit_codes.Problem(text, exit_codes.UNAUTHORISED)


def has_admin_token() -> bool:
    """Whether a verb that is at both doors has the key of the admin's: a token for it, and no other door was named.

    What --token-file names beside a URL of the worker API is for that one, and goes nowhere else.
    """
    places = current()
    if places.admin_url is None and (places.socket or places.url):
        return False
    if places.token_file:
        is_named = places.admin_url or os.environ.get("JOBD_ADMIN_URL")
        return bool(is_named or not os.environ.get("JOBD_URL"))
    return bool(os.environ.get("ADMIN_TOKEN", "").strip() or os.environ.get(_ADMIN_TOKEN_FILE))


def worker_token(places: Places) -> str | None:
    """The token for the worker API over TCP: --token-file, else the file of JOBD_WORKER_TOKEN_FILE, else none.

    Never ADMIN_TOKEN: that would hand it to a listener that is not the admin's.
    """
    path = places.token_file or os.environ.get(_WORKER_TOKEN_FILE)
    return read_token(path) if path else None


def job_client(*, patience_s: float | None = None) -> JobClient:
    """A client of the worker API for the verb that is running; it is closed at the verb's end."""
    from jobd.client import JobClient

    patience_s = PATIENCE_S if patience_s is None else patience_s
    return click.get_current_context().with_resource(JobClient(worker_endpoint(current()), retry_for_s=patience_s))


def admin_client(*, timeout_s: float = 30.0) -> AdminClient:
    """A client of the admin API for the verb that is running; it is closed at the verb's end."""
    from jobd.client import AdminClient

    client = AdminClient(admin_endpoint(current()), retry_for_s=PATIENCE_S, timeout_s=timeout_s)
    return click.get_current_context().with_resource(client)


def current() -> Places:
    """The places of the running verb."""
    return click.get_current_context().ensure_object(Places)
