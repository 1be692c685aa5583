"""The configuration as jobd's verbs get it: --config, flags over it, and the file of the database."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from jobd.cli import exits

if TYPE_CHECKING:
    from jobd.config import Loaded


def config_option(verb: Any) -> Any:
    text = "Configuration file.  [env: JOBD_CONFIG; default: /etc/jobd/config.toml]"
    return click.option("--config", metavar="FILE", help=text)(verb)


def store_option(verb: Any) -> Any:
    return click.option("--store", metavar="PATH", help="The database, instead of that of the configuration.")(verb)


def read(config: str | None, flags: Mapping[str, str] | None = None, *, need_token: bool = True) -> Loaded:
    """The effective configuration. Problem (78) with file, key and what is expected where it is wrong."""
    from jobd.config import ConfigError, load

    try:
        return load(flags or {}, os.environ, config, need_token=need_token)
    except ConfigError as error:
        raise exits.Problem(str(error), exits.CONFIG) from None


def store_path(store: str | None, config: str | None) -> str:
    """The path of the database: --store, else that of the configuration. Problem (78) where there is none."""
    if store is not None:
        return store
    path = read(config, need_token=False).config.store.path
    if path == ":memory:":
        raise exits.Problem("The store of this configuration is in memory: name a database with --store", exits.CONFIG)
    return path
