"""`jobctl completion`, and the values that it completes: queues, kinds and recent jobs of a running daemon."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

import click

from jobd.cli.connection import worker_api_endpoints
from jobd.cli.exit_codes import CliError
from jobd.cli.params import ConnectionOptions, NameParam

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from jobd.client import JobClient

    Find = Callable[[JobClient, click.Context], Iterable[str]]

_TIMEOUT_S: Final = 1.0
_RECENT: Final = 50
_RECENT_FOR_KINDS: Final = 200
_HARMLESS: Final = re.compile(r"\w[\w.:@%+/=-]*", re.ASCII)  # without characters that a shell interprets


class _KnownName(NameParam):
    """A name or an id, with those that the daemon knows as completions."""

    def __init__(self, find: Find, name: str = "name", *, may_be_empty: bool = False) -> None:
        self.name = name
        self._find = find
        self._may_be_empty = may_be_empty

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value) if self._may_be_empty else super().convert(value, param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Ask the worker API. Without a quick response there are no completions."""
        from click.shell_completion import CompletionItem

        from jobd.client import JobClient, JobdError

        options, given = ConnectionOptions(), ctx.ensure_object(ConnectionOptions)
        options.socket, options.url = given.socket, given.url  # a token file may be for the admin API
        try:
            with JobClient(worker_api_endpoints(options), timeout_s=_TIMEOUT_S, retry_for_s=0) as client:
                names = dict.fromkeys(self._find(client, ctx))
        except (JobdError, CliError, click.ClickException):
            return []
        return [CompletionItem(name) for name in names if name.startswith(incomplete) and _HARMLESS.fullmatch(name)]


def _queues(client: JobClient, _: click.Context) -> Iterable[str]:
    return [queue.name for queue in client.queues()]


def _kinds(client: JobClient, ctx: click.Context) -> Iterable[str]:
    queue = ctx.params.get("queue")
    jobs = client.list_jobs(queue=queue if isinstance(queue, str) else None, limit=_RECENT_FOR_KINDS).jobs
    return sorted({job.kind for job in jobs})


def _job_ids(client: JobClient, _: click.Context) -> Iterable[str]:
    return [job.id for job in client.list_jobs(limit=_RECENT).jobs]


QUEUE: Final = _KnownName(_queues)
KIND: Final = _KnownName(_kinds, "kind", may_be_empty=True)
JOB_ID: Final = _KnownName(_job_ids, "id")
JOB: Final = click.argument("job_id", metavar="ID", type=JOB_ID)
IDS: Final = click.argument("ids", metavar="[ID...]", nargs=-1, type=JOB_ID)


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion of jobctl for a shell. It completes queues, kinds and recent jobs too.

    \b
    Write it to a file that the shell loads:
      bash: ~/.local/share/bash-completion/completions/jobctl
      zsh:  _jobctl in a directory of $fpath
      fish: ~/.config/fish/completions/jobctl.fish
    """
    from click.shell_completion import get_completion_class

    script = get_completion_class(shell)
    assert script is not None
    sys.stdout.write(script(ctx.find_root().command, {}, "jobctl", "_JOBCTL_COMPLETE").source())
