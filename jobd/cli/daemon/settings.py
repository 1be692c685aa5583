"""Options of the configuration: --config, flags that override it, and the path of the database."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import click

from jobd.cli import exit_codes

if TYPE_CHECKING:
    from jobd.config import LoadedConfig


def config_option(command: Any) -> Any:
    text = "Configuration file.  [env: JOBD_CONFIG; default: /etc/jobd/config.toml]"
    return click.option("--config", metavar="FILE", help=text)(command)


_FLAGS: Final = {
    "store": ("store.path", "PATH", "Path of the database."),
    "socket": ("worker.socket", "PATH", "Unix socket of the worker API."),
    "listen": ("worker.listen", "HOST:PORT", "TCP address of the worker API."),
    "admin-listen": ("admin.listen", "ADDRESS", "HOST:PORT or unix:PATH of the admin API."),
    "log-level": ("log.level", "LEVEL", "debug, info, warning or error."),
}


def flag_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags that override file and environment. The command gets them as `flags`, by key."""

    @functools.wraps(command)
    def with_flags(*args: Any, others: tuple[str, ...], **options: Any) -> Any:
        flags = dict(map(_pair, others))
        for name, (key, _, _) in _FLAGS.items():
            value = options.pop(name.replace("-", "_"))
            if value is not None:
                flags[key] = value
        return command(*args, flags=flags, **options)

    text = "Set any other key, such as locks.ttl=5m; may be repeated."
    found = click.option("--set", "others", metavar="KEY=VALUE", multiple=True, help=text)(with_flags)
    for name, (key, metavar, description) in reversed(_FLAGS.items()):
        found = click.option(f"--{name}", metavar=metavar, help=f"{description}  [{key}]")(found)
    return found


def _pair(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign:
        raise click.UsageError(f"--set {text!r} must be KEY=VALUE, such as locks.ttl=5m")
    return key, value


def store_option(command: Any) -> Any:
    return click.option("--store", metavar="PATH", help="Path of the database, instead of the configured one.")(command)


def read(config: str | None, flags: Mapping[str, str] | None = None, *, need_token: bool = True) -> LoadedConfig:
    """Return the effective configuration. Raises ConfigError (78) if it is invalid."""
    from jobd.config_loader import load

    return load(flags or {}, os.environ, config, need_token=need_token)


def store_path(store: str | None, config: str | None) -> str:
    """Return the path of --store or of the configuration. Raises CliError (78) if the store is in memory."""
    if store is not None:
        return store
    path = read(config, need_token=False).config.store.path
    if path == ":memory:":
        raise exit_codes.CliError("The configured store is in memory: name a database with --store", exit_codes.CONFIG)
    return path
