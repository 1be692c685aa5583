"""The commands of jobd for a journal that several nodes share."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from jobd.cli import exit_codes, terminal
from jobd.cli.daemon.settings import config_option, flag_options, read
from jobd.cli.params import SETTINGS, CommandGroup

if TYPE_CHECKING:
    from jobd.config import JournalSection

T = TypeVar("T")

_NOT_SYNCHRONOUS: Final = (
    "PostgreSQL has no synchronous standby, so that a lost disk loses jobs: set synchronous_standby_names, such as "
    "'ANY 1 (s1, s2)', or accept the loss with [journal] require_sync = false"
)


@click.group(cls=CommandGroup, context_settings=SETTINGS)
def cluster() -> None:
    """Set up a journal in PostgreSQL, which several nodes share."""


@click.command("init")
@config_option
@flag_options
def init_command(config: str | None, flags: dict[str, str]) -> None:
    """Create the tables and the journal in the database of journal.url.

    Does nothing if they exist. The role needs the privilege to create tables in its schema, and becomes their owner.
    """
    from uuid import uuid4

    from jobd.journal.postgres.journal import create

    settings = read(config, flags, need_token=False).config.journal
    if not settings.url:
        text = "journal.url is empty: set it to the URL of a database, such as postgresql://jobd@HOST/jobd"
        raise exit_codes.CliError(text, exit_codes.CONFIG)
    made = _run(create(settings.url, settings.name, uuid4().hex))
    terminal.emit(f"{settings.name}: {'created' if made.is_new else 'exists already'} (id {made.cluster_id})")
    if settings.require_sync and not _run(_is_synchronous(settings)):
        terminal.say(f"jobd: {_NOT_SYNCHRONOUS}.")


cluster.add_all("Journal", init_command)


def check_journal(settings: JournalSection) -> None:
    """Connect to the journal and check it. Raises CliError or JournalUnavailable."""
    if not _run(_is_synchronous(settings)) and settings.require_sync:
        raise exit_codes.CliError(_NOT_SYNCHRONOUS, exit_codes.CONFIG)


async def _is_synchronous(settings: JournalSection) -> bool:
    from jobd.journal.postgres.journal import PostgresJournal

    journal = await PostgresJournal.open(settings.url, settings.name, int(settings.lease))
    try:
        return (await journal.health()).is_synchronous
    finally:
        await journal.close()


def _run(work: Coroutine[Any, Any, T]) -> T:
    import asyncio

    return asyncio.run(work)
