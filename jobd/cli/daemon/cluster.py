"""The commands of jobd for a journal that several nodes share."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from jobd.cli import exit_codes, terminal
from jobd.cli.daemon.settings import config_option, flag_options, read
from jobd.cli.params import SETTINGS, CommandGroup

if TYPE_CHECKING:
    from jobd.config import JournalSection
    from jobd.model.journal import SharedJournal

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

    settings = _journal_settings(config, flags)
    made = _run(create(settings.url, settings.name, uuid4().hex))
    terminal.emit(f"{settings.name}: {'created' if made.is_new else 'exists already'} (id {made.cluster_id})")
    if settings.require_sync and not _run(_is_synchronous(settings)):
        terminal.say(f"jobd: {_NOT_SYNCHRONOUS}.")


@click.command("forget")
@click.argument("name")
@config_option
@flag_options
def forget_command(name: str, config: str | None, flags: dict[str, str]) -> None:
    """Remove the entry of a node that does not come back.

    Refuses if the node has been heard in the last seconds. A node that starts later adds its entry again.
    """
    settings = _journal_settings(config, flags)
    _run(_forget(settings, name))
    terminal.emit(f"{name}: removed from journal {settings.name}")


async def _forget(settings: JournalSection, name: str) -> None:
    from jobd.model.responses import SILENT_MS

    async with _opened(settings) as journal:
        nodes = {node.name: node for node in await journal.nodes()}
        if name not in nodes:
            text = f'journal {settings.name} has no node "{name}"; its nodes: {", ".join(nodes) or "none"}'
            raise exit_codes.CliError(text, exit_codes.REJECTED)
        if nodes[name].seen_ms < SILENT_MS:
            raise exit_codes.CliError(f'node "{name}" is running: stop jobd there first', exit_codes.REJECTED)
        await journal.forget(name)


cluster.add_all("Journal", init_command, forget_command)


def check_journal(settings: JournalSection) -> None:
    """Connect to the journal and check it. Raises CliError or JournalUnavailable."""
    if not _run(_is_synchronous(settings)) and settings.require_sync:
        raise exit_codes.CliError(_NOT_SYNCHRONOUS, exit_codes.CONFIG)


async def _is_synchronous(settings: JournalSection) -> bool:
    async with _opened(settings) as journal:
        return (await journal.health()).is_synchronous


@contextlib.asynccontextmanager
async def _opened(settings: JournalSection) -> AsyncIterator[SharedJournal]:
    from jobd.journal.postgres.journal import PostgresJournal

    journal = await PostgresJournal.open(settings.url, settings.name, int(settings.lease))
    try:
        yield journal
    finally:
        await journal.close()


def _journal_settings(config: str | None, flags: dict[str, str]) -> JournalSection:
    """Return the settings of the journal. Raises CliError without a URL."""
    settings = read(config, flags, need_token=False).config.journal
    if not settings.url:
        text = "journal.url is empty: set it to the URL of a database, such as postgresql://jobd@HOST/jobd"
        raise exit_codes.CliError(text, exit_codes.CONFIG)
    return settings


def _run(work: Coroutine[Any, Any, T]) -> T:
    import asyncio

    return asyncio.run(work)
