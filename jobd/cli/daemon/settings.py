"""The configuration as jobd's verbs get it: --config, flags over it, and the file of the database."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import click

from jobd.cli import exit_codes

if TYPE_CHECKING:
    from jobd.config import LoadedConfig


def config_option(verb: Any) -> Any:
    text = "Configuration file.  [env: JOBD_CONFIG; default: /etc/jobd/config.toml]"
    return click.option("--config", metavar="FILE", help=text)(verb)


_FLAGS: Final = {
    "store": ("store.path", "PATH", "The database."),
    "socket": ("worker.socket", "PATH", "Socket for workers."),
    "listen": ("worker.listen", "HOST:PORT", "TCP address for workers, too."),
    "admin-listen": ("admin.listen", "ADDRESS", "HOST:PORT or unix:PATH for operators."),
    "log-level": ("log.level", "LEVEL", "debug, info, warning or error."),
}


def flag_options(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The flags that go over file and environment. `verb` gets them as `flags`, by key."""

    @functools.wraps(verb)
    def with_flags(*args: Any, others: tuple[str, ...], **given: Any) -> Any:
        flags = dict(map(_pair, others))
        for name, (key, _, _) in _FLAGS.items():
            value = given.pop(name.replace("-", "_"))
            if value is not None:
                flags[key] = value
        return verb(*args, flags=flags, **given)

    text = "Any other key, as in locks.ttl=5m."
    found = click.option("--set", "others", metavar="KEY=VALUE", multiple=True, help=text)(with_flags)
    for name, (key, metavar, says) in reversed(_FLAGS.items()):
        found = click.option(f"--{name}", metavar=metavar, help=f"{says}  [{key}]")(found)
    return found


def _pair(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign:
        raise click.UsageError(f"--set {text!r}: it has to be KEY=VALUE, as in locks.ttl=5m")
    return key, value


def store_option(verb: Any) -> Any:
    return click.option("--store", metavar="PATH", help="The database, instead of that of the configuration.")(verb)


def read(config: str | None, flags: Mapping[str, str] | None = None, *, need_token: bool = True) -> LoadedConfig:
    """The effective configuration. Problem (78) with file, key and what is expected where it is wrong."""
    from jobd.config import ConfigError
    from jobd.config_loader import load

    try:
        return load(flags or {}, os.environ, config, need_token=need_token)
    except ConfigError as error:
        raise exit_codes.CliError(str(error), exit_codes.CONFIG) from None


def store_path(store: str | None, config: str | None) -> str:
    """The path of the database: --store, else that of the configuration. Problem (78) where there is none."""
    if store is not None:
        return store
    path = read(config, need_token=False).config.store.path
    if path == ":memory:":
        raise exit_codes.CliError(
            "The store of this configuration is in memory: name a database with --store", exit_codes.CONFIG
        )
    return path
