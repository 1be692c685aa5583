"""The bugs as records: what each breaks, which text it replaces by which, and how soon it has to be found.

They are in bugs/*.toml, by the room that they spoil. A text that is not there exactly once is told, never guessed at.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Final, Literal

import msgspec
from msgspec import Struct

Level = Literal["rules", "world", "simulation", "actor", "store", "doors", "process"]

RECORDS: Final = Path(__file__).parent / "bugs"


class Rotten(Exception):
    """A bug that does not fit the sources any more; the message says which text is missing."""


class Edit(Struct, frozen=True, forbid_unknown_fields=True):
    """One place: `old` is in `file` (a path in the repository) exactly once, `new` takes its place."""

    file: str
    old: str
    new: str


class Bug(Struct, frozen=True, forbid_unknown_fields=True):
    """One bug. `breaks` is a sentence for people.

    `level` is the last level at which it may be found; `promise` names the invariant that the simulation has to find
    broken, whatever other level may find it before.
    """

    name: str
    breaks: str
    level: Level
    edits: tuple[Edit, ...]
    promise: str | None = None


def bugs() -> dict[str, Bug]:
    """All of them by name, in the order of the files and of their lines."""
    found: dict[str, Bug] = {}
    for path in sorted(RECORDS.glob("*.toml")):
        for record in tomllib.loads(path.read_text("utf-8"))["bug"]:
            bug = _bug(record)
            assert bug.name not in found, f"{path.name}: there are two bugs called {bug.name}"
            found[bug.name] = bug
    return found


def _bug(record: dict[str, object]) -> Bug:
    """A record with one place names it at its top."""
    if "edits" not in record:
        record["edits"] = [{name: record.pop(name) for name in ("file", "old", "new")}]
    return msgspec.convert(record, Bug)


def spoiled(bug: Bug, root: Path) -> dict[str, str]:
    """The files of `bug` under `root` with the bug in them, by path. Raises Rotten."""
    texts: dict[str, str] = {}
    for edit in bug.edits:
        text = texts.get(edit.file) or (root / edit.file).read_text("utf-8")
        if (count := text.count(edit.old)) != 1:
            raise Rotten(f"{bug.name}: this text is {count} times in {edit.file}, not once; plant it anew:\n{edit.old}")
        assert edit.old != edit.new, f"{bug.name} changes nothing"
        texts[edit.file] = text.replace(edit.old, edit.new)
    for file, text in texts.items():
        compile(text, file, "exec")
    return texts


def plant(bug: Bug, root: Path) -> None:
    """Put `bug` into the sources under `root`, which is a copy. Raises Rotten."""
    for file, text in spoiled(bug, root).items():
        (root / file).write_text(text, "utf-8")
