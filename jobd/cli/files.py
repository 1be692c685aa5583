"""Which files a verb may write: never what a daemon or another program works with, nor what is no regular file.

Only looks, and writes nothing itself: see safe_file.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from jobd.cli import exit_codes
from jobd.storage import files
from jobd.storage.files import StoreBusy

# Of a store whose daemon runs. Who replaces the lock file lets a second daemon in.
_BESIDE: Final = ("-wal", "-shm", "-journal", ".lock", ".epoch", ".ballast")


def check(file: Path, *, yes: bool) -> None:
    """UsageError where `file` is no regular file, or exists without `yes`; Problem (75) where a store has it."""
    resolved(file)
    if file.exists() and not yes:
        raise click.UsageError(f"{file} exists: add --yes to overwrite it")


def resolved(file: Path) -> Path:
    """What `file` leads to, once it is known that it may be written. A symlink stays, and what it names is replaced."""
    if file.exists() and not file.is_file():
        raise click.UsageError(f"{file} is no regular file: name a new one, or one to overwrite")
    target = Path(os.path.realpath(file))
    for name in dict.fromkeys((target, Path(os.path.abspath(file)))):  # the store may be named by a symlink, too
        refuse_used(name)
    return target


def refuse_used(path: Path) -> None:
    """Problem (75) where a running daemon, or another program, works with `path` or with what it lies beside.

    A writer that puts another file in its place would go on in one that has no name any more, and all that it
    acknowledges from then on would be lost.
    """
    for store, words in _stores(path):
        try:
            files.check_not_held(store)
        except StoreBusy as error:
            if error.pid is not None:  # else it is no daemon that has locked it, but perhaps who calls us
                text = f"{path} {words} of a running daemon (process {error.pid}): name another file"
                raise exit_codes.Problem(text, exit_codes.TRY_AGAIN) from None
        if os.path.isfile(store) and files.has_sqlite_lock(store):
            text = f"{path} {words} that a program is working with: name another file"
            raise exit_codes.Problem(text, exit_codes.TRY_AGAIN)
    for suffix in ("-wal", "-journal"):
        left = f"{path}{suffix}"
        if os.path.isfile(left) and os.path.getsize(left) > 0:
            text = f"{left} is left of another database, and SQLite would read it into {path}"
            raise click.UsageError(f"{text}: remove it if nothing needs it, or name another file")


def _stores(path: Path) -> Iterator[tuple[str, str]]:
    """The stores that `path` may be of, and as what."""
    yield str(path), "is the store"
    for suffix in _BESIDE:
        if path.name.endswith(suffix) and path.name != suffix:
            yield str(path).removesuffix(suffix), "belongs to the store"
