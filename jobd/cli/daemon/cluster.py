"""The commands of jobd for a journal that several nodes share."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from jobd.cli import exit_codes, terminal
from jobd.cli.confirm import confirm, need_terminal
from jobd.cli.daemon.settings import config_option, flag_options, read
from jobd.cli.params import SETTINGS, CommandGroup

if TYPE_CHECKING:
    from jobd.config import Config, JournalSection
    from jobd.journal.postgres.journal import PostgresJournal

T = TypeVar("T")

_NOT_SYNCHRONOUS: Final = (
    "PostgreSQL has no synchronous standby, so that a lost disk loses jobs: set synchronous_standby_names, such as "
    "'ANY 1 (s1, s2)', or accept the risk with [journal] require_sync = false"
)

_ALREADY_ACCEPTED: Final = "a leader has continued without the lost records: nothing else needs to be done"
_WOULD_ACCEPT: Final = "would begin a new epoch, and end all grants by their stall rule"


@click.group(cls=CommandGroup, context_settings=SETTINGS)
def cluster() -> None:
    """Manage the journal in PostgreSQL that the nodes of a cluster share."""


@click.command("init")
@click.option(
    "--from-store",
    metavar="PATH",
    type=click.Path(dir_okay=False),
    help="Make the cluster from the database of a single machine. Its daemon must be stopped.",
)
@config_option
@flag_options
def init_command(from_store: str | None, config: str | None, flags: dict[str, str]) -> None:
    """Create the tables and the journal in the database of journal.url.

    Does nothing if they exist. The role needs the privilege to create tables in its schema, and becomes their owner.
    """
    from uuid import uuid4

    from jobd.cluster.conversion import init_from_store
    from jobd.journal.postgres.journal import create
    from jobd.storage.cluster.joining import FIRST_RECORD
    from jobd.storage.files import keeping_owner

    settings = _cluster_settings(config, flags).journal
    number = 0 if from_store is None else FIRST_RECORD
    made = _run(create(settings.url, settings.name, uuid4().hex, number=number))
    terminal.emit(f"{settings.name}: {'created' if made.is_new else 'exists already'} (id {made.cluster_id})")
    if from_store is not None:
        with contextlib.redirect_stdout(sys.stderr), keeping_owner(from_store):  # its log lines
            _with_journal(settings, lambda journal: init_from_store(journal, from_store))
        terminal.emit(f"{from_store}: belongs to the cluster")
    if settings.require_sync and not _with_journal(settings, _is_synchronous):
        terminal.say(f"jobd: {_NOT_SYNCHRONOUS}.")


@click.command("forget")
@click.argument("name")
@config_option
@flag_options
def forget_command(name: str, config: str | None, flags: dict[str, str]) -> None:
    """Remove the entry of a node that does not come back.

    Fails while the node is running. A node that starts later adds its entry again.
    """
    settings = _cluster_settings(config, flags).journal
    _with_journal(settings, lambda journal: _forget(journal, settings.name, name))
    terminal.emit(f"{name}: removed from journal {settings.name}")


async def _forget(journal: PostgresJournal, journal_name: str, name: str) -> None:
    from jobd.model.responses import UNSEEN_MS

    nodes = {node.name: node for node in await journal.nodes()}
    if name not in nodes:
        text = f'journal {journal_name} has no node "{name}"; its nodes: {", ".join(nodes) or "none"}'
        raise exit_codes.CliError(text, exit_codes.REJECTED)
    if nodes[name].seen_ms < UNSEEN_MS:
        raise exit_codes.CliError(f'node "{name}" is running: stop jobd there first', exit_codes.REJECTED)
    await journal.forget(name)


@click.command("leave")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@config_option
@flag_options
def leave_command(yes: bool, config: str | None, flags: dict[str, str]) -> None:
    """Return to a single machine, with everything that is in the journal.

    Stop the daemons of all nodes first. The database at store.path gets the records that it lacks, and the journal is
    closed: no node can use it again. Afterwards, remove journal.url from the configuration.
    """
    from jobd.cluster.conversion import leave
    from jobd.storage.files import keeping_owner

    settings = _cluster_settings(config, flags)
    path = settings.store.path
    if not yes:
        confirm(f"end cluster {settings.journal.name}, and go on with {path} alone")
    with contextlib.redirect_stdout(sys.stderr), keeping_owner(path):  # its log lines
        epoch = _with_journal(
            settings.journal, lambda journal: leave(journal, path, int(settings.journal.lease) / 1000)
        )
    terminal.emit(f"{path}: the store of a single machine, with epoch {epoch}")


@click.command("accept-loss")
@click.option(
    "--upto",
    metavar="N",
    type=click.IntRange(0, (1 << 63) - 1),
    required=True,
    help="Number of the last record that the journal still has. A node that does not start names it.",
)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", "is_dry_run", is_flag=True, help="Only print what is lost and what would be done.")
@config_option
@flag_options
def accept_loss_command(upto: int, yes: bool, is_dry_run: bool, config: str | None, flags: dict[str, str]) -> None:
    """Continue after PostgreSQL has lost acknowledged records.

    The cluster continues without the records after record N. Stop the daemons of all nodes first. Run it on a node that
    does not start because of the loss: it lists the jobs that the lost records changed, and writes them to a file
    beside store.path, which `jobctl import` reads. All grants end by their stall rule. Repeating it is harmless.
    """
    from jobd.cluster.loss import JournalLoss, accept, find, write_file

    async def look(journal: PostgresJournal) -> JournalLoss:
        return await find(journal, settings.store.path, upto, await journal.records())

    settings = _cluster_settings(config, flags)
    if not yes and not is_dry_run:
        need_terminal()
    loss = _with_journal(settings.journal, look)
    for line in loss.describe():
        terminal.emit(line) if is_dry_run else terminal.say(line)
    if is_dry_run:
        if loss.changed.jobs:
            terminal.emit(f"would write to {loss.file} the jobs that this store still has")
        terminal.emit(_ALREADY_ACCEPTED if loss.is_accepted else _WOULD_ACCEPT)
        return
    if not yes:
        confirm(f"continue journal {settings.journal.name} after record {upto}, without what it has lost")
    if loss.changed.jobs:
        with exit_codes.explaining_full_disk():
            count = write_file(loss)
        terminal.emit(f"{count} jobs written to {loss.file}")
    if loss.is_accepted:
        terminal.emit(_ALREADY_ACCEPTED)
        return
    with contextlib.redirect_stdout(sys.stderr):  # its log lines
        lease_s = int(settings.journal.lease) / 1000
        done = _with_journal(settings.journal, lambda journal: accept(journal, loss, settings.policy(), lease_s))
    terminal.emit(f"{settings.journal.name}: epoch {done.epoch} has begun, and {done.grants} grants have ended")


@click.command("join")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@config_option
@flag_options
def join_command(yes: bool, config: str | None, flags: dict[str, str]) -> None:
    """Replace the database at store.path with a copy of the cluster's. The daemon must be stopped.

    The old database is renamed. The next start makes a new one from the journal.
    """
    from jobd.storage.cluster.joining import discard

    settings = _cluster_settings(config, flags)
    path = settings.store.path
    if not yes:
        confirm(f"replace the database {path} with a copy of the database of cluster {settings.journal.name}")
    terminal.emit(f"{path}: kept as {discard(path)}; the next start rebuilds it from the journal")


cluster.add_all("Journal", init_command, leave_command, forget_command, accept_loss_command)


def check_journal(settings: JournalSection) -> None:
    """Connect to the journal and check it. Raises CliError or JournalUnavailable."""
    if not _with_journal(settings, _is_synchronous) and settings.require_sync:
        raise exit_codes.CliError(_NOT_SYNCHRONOUS, exit_codes.CONFIG)


async def _is_synchronous(journal: PostgresJournal) -> bool:
    """Return whether commits wait for a standby. Raises JournalUnavailable if none acknowledges them."""
    await journal.check_commit()
    return (await journal.health()).is_synchronous


def _with_journal(settings: JournalSection, work: Callable[[PostgresJournal], Awaitable[T]]) -> T:
    """Return the result of `work` with the journal. Raises JournalUnavailable."""
    from jobd.journal.postgres.journal import PostgresJournal

    async def run() -> T:
        journal = await PostgresJournal.open(settings.url, settings.name, int(settings.lease))
        try:
            return await work(journal)
        finally:
            await journal.close()

    return _run(run())


def _cluster_settings(config: str | None, flags: dict[str, str]) -> Config:
    """Return the settings. Raises CliError without the URL of a journal."""
    settings = read(config, flags, need_token=False).config
    if not settings.journal.url:
        text = "journal.url is empty: set it to the URL of a database, such as postgresql://jobd@HOST/jobd"
        raise exit_codes.CliError(text, exit_codes.CONFIG)
    return settings


def _run(work: Coroutine[Any, Any, T]) -> T:
    import asyncio

    with exit_codes.explaining_full_disk():
        return asyncio.run(work)
