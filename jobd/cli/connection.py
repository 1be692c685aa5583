"""Find the daemon and its token from options, environment and the daemon's own settings, and open clients."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from jobd.cli import exit_codes
from jobd.cli.params import ConnectionOptions

if TYPE_CHECKING:
    from jobd.client import AdminClient, JobClient
    from jobd.client.endpoint import Endpoint

CONFIG_PATH: Final = "/etc/jobd/config.toml"
DEFAULT_LISTEN: Final = "127.0.0.1:8770"
RETRY_FOR_S: Final = 3.0  # enough for a daemon that restarts, and short for an operator at a prompt
TAKEOVER_S: Final = 10.0  # the same for a standby that takes over
_PAGE: Final = 200  # the most items of a page
_LOOPBACK: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # reaches a listener on all addresses


def _store_option(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None and param.name is not None:
        setattr(ctx.ensure_object(ConnectionOptions), param.name, value)


def _option(flag: str, metavar: str, text: str) -> Callable[[Any], Any]:
    return click.option(flag, metavar=metavar, help=text, callback=_store_option, expose_value=False)


_SOCKET = _option("--socket", "PATH", "Worker socket of the daemon.  [env: JOBD_SOCKET, which precedes JOBD_URL]")
_SEVERAL: Final = "Several for a cluster: URL,URL."
_URL = _option(
    "--url",
    "URL",
    f"Worker API over TCP, instead of the socket. {_SEVERAL}  [env: JOBD_URL, unless JOBD_SOCKET is set]",
)
_ADMIN = _option("--admin-url", "URL", f"Admin API: http://HOST:PORT or unix:PATH. {_SEVERAL}  [env: JOBD_ADMIN_URL]")
_WORKER_TOKEN_FILE: Final = "JOBD_WORKER_TOKEN_FILE"
_ADMIN_TOKEN_FILE: Final = "ADMIN_TOKEN_FILE"
_OPERATOR = _option("--operator", "NAME", "Your name in timelines and the audit log.  [default: USER@HOST]")


def _token_option(variables: str) -> Callable[[Any], Any]:
    text = f"File with tokens, one per line; the first one is used.  [env: {variables}]"
    return _option("--token-file", "FILE", text)


def worker_options(command: Any) -> Any:
    """Add the options of a command that uses the worker API."""
    return _SOCKET(_URL(_token_option(_WORKER_TOKEN_FILE)(command)))


def admin_options(command: Any) -> Any:
    """Add the options of a command that uses the admin API."""
    return _ADMIN(_token_option(_ADMIN_TOKEN_FILE)(_OPERATOR(command)))


def all_options(command: Any) -> Any:
    token = _token_option(f"{_ADMIN_TOKEN_FILE}, or {_WORKER_TOKEN_FILE} for the worker API")
    return _SOCKET(_URL(_ADMIN(token(_OPERATOR(command)))))


def read_token(path: str) -> str:
    """Return the first token in the file `path`. Raises CliError (78) if there is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise exit_codes.CliError(f"Cannot read the token file {path}: {why}", exit_codes.CONFIG) from None
    if not lines:
        raise exit_codes.CliError(f"The token file {path} is empty: write a token into it", exit_codes.CONFIG)
    return lines[0]


def worker_api_endpoints(options: ConnectionOptions) -> tuple[Endpoint, ...]:
    """Return the addresses of the worker API from options, environment, the daemon's settings or its default."""
    from jobd.client.endpoint import worker_endpoints

    if options.url and options.socket:
        raise click.UsageError("--socket and --url are mutually exclusive: give one of them")
    address = options.url or (os.path.abspath(options.socket.removeprefix("unix:")) if options.socket else None)
    if address is None and not (os.environ.get("JOBD_SOCKET") or os.environ.get("JOBD_URL")):
        address = worker_socket()
    client = options.operator or this_operator()
    return _usage_error_if_invalid(lambda: worker_endpoints(address, worker_token(options), client=client))


def admin_api_endpoints(options: ConnectionOptions) -> tuple[Endpoint, ...]:
    """Return the addresses of the admin API and its token, found like those of the worker API."""
    from jobd.client.endpoint import admin_endpoints

    token = admin_token(options)
    address = options.admin_url or os.environ.get("JOBD_ADMIN_URL") or admin_url()
    operator = options.operator or this_operator()
    return _usage_error_if_invalid(lambda: admin_endpoints(address, token, operator=operator))


def this_operator() -> str:
    """Return user and host: `eve@build-3`. Under sudo, the user is the one who called it."""
    try:
        user = os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):  # a user id without a name
        user = f"uid-{os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def _usage_error_if_invalid(find: Callable[[], tuple[Endpoint, ...]]) -> tuple[Endpoint, ...]:
    try:
        return find()
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def admin_token(options: ConnectionOptions) -> str:
    """Return the token of --token-file, ADMIN_TOKEN or ADMIN_TOKEN_FILE. Raises CliError (5) without any."""
    if options.token_file:
        options.token_source = f"the file {options.token_file}"
        return read_token(options.token_file)
    token = os.environ.get("ADMIN_TOKEN", "").strip()
    if token:
        options.token_source = "ADMIN_TOKEN"
        return token
    if path := os.environ.get(_ADMIN_TOKEN_FILE):
        options.token_source = f"the file {path} ({_ADMIN_TOKEN_FILE})"
        return read_token(path)
    text = "No admin token: set ADMIN_TOKEN or ADMIN_TOKEN_FILE as for the daemon, or give --token-file FILE"
    raise exit_codes.CliError(text, exit_codes.UNAUTHORISED)


def has_admin_token() -> bool:
    """Return whether a command that can use either API uses the admin API.

    It does if there is a token for the admin API and no option names the worker API. Together with a URL of the worker
    API, --token-file holds a token of the worker API and is not sent to the admin API.
    """
    options = current()
    if options.admin_url is None and (options.socket or options.url):
        return False
    if options.token_file:
        is_named = options.admin_url or os.environ.get("JOBD_ADMIN_URL")
        return bool(is_named or not os.environ.get("JOBD_URL"))
    return bool(os.environ.get("ADMIN_TOKEN", "").strip() or os.environ.get(_ADMIN_TOKEN_FILE))


def worker_token(options: ConnectionOptions) -> str | None:
    """Return the token for the worker API over TCP from --token-file or JOBD_WORKER_TOKEN_FILE, or None.

    ADMIN_TOKEN is never sent to the worker API.
    """
    path, variable = options.token_file, ""
    if not path:
        path, variable = os.environ.get(_WORKER_TOKEN_FILE), f" ({_WORKER_TOKEN_FILE})"
    options.token_source = f"the file {path}{variable}" if path else None
    return read_token(path) if path else None


def job_client(*, retry_for_s: float | None = None) -> JobClient:
    """Return a client of the worker API. It is closed at the end of the command."""
    from jobd.client import JobClient

    endpoints = worker_api_endpoints(current())
    retry_for_s = _retry_for_s(endpoints) if retry_for_s is None else retry_for_s
    return click.get_current_context().with_resource(JobClient(endpoints, retry_for_s=retry_for_s))


def admin_client(*, timeout_s: float = 30.0) -> AdminClient:
    """Return a client of the admin API. It is closed at the end of the command."""
    from jobd.client import AdminClient

    endpoints = admin_api_endpoints(current())
    client = AdminClient(endpoints, retry_for_s=_retry_for_s(endpoints), timeout_s=timeout_s)
    return click.get_current_context().with_resource(client)


def read_pages(
    get: Callable[..., Any], name: str, limit: int | None, cursor: str | None = None
) -> tuple[list[Any], str | None]:
    """Return up to `limit` items (None: all) of the lists `name` in the pages of `get`, and the cursor after them."""
    found: list[Any] = []
    while True:
        page = get(limit=_PAGE if limit is None else min(_PAGE, limit - len(found)), cursor=cursor)
        found += getattr(page, name)
        cursor = page.next_cursor
        if cursor is None or len(found) == limit:
            return found, cursor


def _retry_for_s(endpoints: tuple[Endpoint, ...]) -> float:
    return RETRY_FOR_S if len(endpoints) == 1 else TAKEOVER_S


def current() -> ConnectionOptions:
    """Return the options of the running command."""
    return click.get_current_context().ensure_object(ConnectionOptions)


# The settings of the daemon on this machine, from its environment and configuration file. An unreadable or invalid file
# counts as empty, because the daemon would not start with it.


def worker_socket() -> str | None:
    """Return the absolute path of `worker.socket`, or None if it is not set."""
    path = _setting("worker.socket", _tables())
    return os.path.abspath(path) if path else None


def admin_url() -> str | None:
    """Return `admin.listen` as a URL (https if `admin.tls_cert` is set) or unix:PATH. None if it is not an address."""
    tables = _tables()
    listen = _setting("admin.listen", tables) or DEFAULT_LISTEN
    if listen.startswith("unix:"):
        return listen
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit():
        return None
    host = _LOOPBACK.get(host.strip("[]"), host.strip("[]"))
    scheme = "https" if _setting("admin.tls_cert", tables) else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _setting(key: str, tables: Mapping[str, Any]) -> str:
    section, _, name = key.partition(".")
    found = os.environ.get(f"JOBD_{section}_{name}".upper())
    if found is None:
        table = tables.get(section)
        found = table.get(name) if isinstance(table, dict) else None
    return found if isinstance(found, str) else ""


def _tables() -> dict[str, Any]:
    try:
        text = Path(os.environ.get("JOBD_CONFIG") or CONFIG_PATH).read_text(encoding="utf-8")
    except (OSError, ValueError):  # it is missing, unreadable or not text
        return {}
    import tomllib

    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError):  # not TOML, or a number of thousands of digits
        return {}
