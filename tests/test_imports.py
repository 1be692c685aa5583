"""Who may import whom, and what the pure rooms may not touch. A new module must be given its room here."""

from __future__ import annotations

import ast
import graphlib
import re
import sys
import tomllib
from pathlib import Path
from typing import Final

import pytest
from packaging.requirements import Requirement

import jobd

PACKAGE: Final = Path(jobd.__file__).parent
ROOT: Final = PACKAGE.parent

# A room: its modules, and the rooms that they may import beside their own.
ROOMS: Final[dict[str, tuple[str, str]]] = {
    "nouns": ("job events commands errors answers batch webhook", ""),
    "fingerprints": ("fingerprints", ""),
    "book": ("book live_jobs orders figures overlaps pace worker_presence", "nouns"),
    "judging": ("views validation planning", "nouns book"),
    "rules": (
        "decide rules operator_rules late_rules time_rules reads steps draft why audit plan_rules",
        "nouns book judging",
    ),
    "letters": ("webhook_letter webhook_rules webhook_line webhook_addresses webhook_url", "nouns"),
    "clock": ("clock", "nouns"),
    "actor": ("actor deciding envelope parked full_disk history keys", "nouns book judging rules clock"),
    "store": (
        "store tables job_writer late_writer rows lookups audit_writer audit_reader webhook_tables opening wal "
        "migrations quarantine files backup doctor rehearsal row_check",
        "nouns fingerprints",
    ),
    "copies": ("copies row_walk", "nouns store"),
    "web": (
        "web bodies weighing doors routes visits heads replies sparing streams connection listener",
        "nouns actor",
    ),
    "stream": ("stream_lines command_stream", "nouns actor web rooms"),
    "feed": ("feed watchers", "nouns web actor"),
    "webhooks": (
        "webhooks webhook_courier webhook_reader webhook_alerts webhook_office webhook_sender",
        "nouns letters",
    ),
    "artifacts": ("artifacts artifact_downloads artifact_files artifact_s3 sweeper", "nouns"),
    "time": ("cleanup passes foresight plans plan_search health presence", "nouns book judging actor clock artifacts"),
    "watch": ("metrics alerts facts failures", "nouns fingerprints book judging actor clock artifacts time"),
    # what requests may ask of the daemon beside the actor
    "rooms": (
        "rooms auditing probes imports import_preview downloads event_stream",
        "nouns actor clock store copies web time watch feed webhooks artifacts",
    ),
    "apis": ("worker_api admin_api openapi schemas glossary", "nouns web feed stream rooms"),
    "settings": ("config tokens webhook_config host_names", "nouns letters"),
    "system": ("log outlet systemd", ""),
    "wiring": (
        "daemon",
        "nouns book rules clock actor store copies web feed webhooks artifacts time watch rooms apis "
        "settings system dashboard",
    ),
    "dashboard": ("dashboard", "nouns web feed rooms"),
    "client": ("client", "nouns"),
    # The daemon's own verbs work on its files; jobctl's get no further than the client (see below).
    "cli": ("cli __main__", "nouns client store settings wiring system bench"),
    "bench": ("bench", ""),
}
ROOM_OF: Final = {module: room for room, (modules, _) in ROOMS.items() for module in modules.split()}

# Finer arrows among the nouns.
NOUNS: Final = {
    "job": set(),
    "events": {"job"},
    "commands": {"job", "events"},
    "errors": set(),
    "answers": {"job", "events", "commands", "errors"},
    "batch": {"job", "events", "errors"},
    "webhook": {"job", "events", "answers"},
}

PURE_ROOMS: Final = ("nouns", "fingerprints", "book", "judging", "rules", "letters")
PURE: Final = frozenset({"keys", *(module for room in PURE_ROOMS for module in ROOMS[room][0].split())})
# All that the pure rooms may use of Python and of others: no IO, no asyncio, no clock, no randomness, no logging.
HARMLESS: Final = frozenset(
    {"__future__", "base64", "binascii", "bisect", "collections", "dataclasses", "datetime", "enum", "functools"}
    | {
        "hashlib",
        "heapq",
        "hmac",
        "ipaddress",
        "itertools",
        "math",
        "msgspec",
        "operator",
        "re",
        "shlex",
        "types",
        "typing",
        "urllib",
        "uuid",
        "zlib",
    }
)

SOURCES: Final = sorted(PACKAGE.rglob("*.py"))


def imports(source: Path) -> set[str]:
    """Dotted names that `source` imports, wherever in the file: `from a import b` gives a.b."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(source: Path) -> set[str]:
    """The modules and packages directly under jobd that `source` imports."""
    under = {name.split(".")[1] for name in imports(source) if name.startswith("jobd.")}
    return under - {"__version__", "__file__"}


def module_of(source: Path) -> str:
    return source.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source.relative_to(PACKAGE)))
def test_imports_only_downwards(source: Path) -> None:
    module = module_of(source)
    if module == "__init__":
        assert not ours(source)
        return
    assert module in ROOM_OF, f"{module}: give it a room in {Path(__file__).name}"
    room = ROOM_OF[module]
    allowed = {room, *ROOMS[room][1].split()}
    strangers = {name for name in ours(source) if ROOM_OF.get(name) not in allowed}
    assert not strangers, f"{module} ({room}) may import {sorted(allowed)}, not {sorted(strangers)}"
    if module in NOUNS:
        assert ours(source) <= NOUNS[module]


def test_no_module_needs_itself() -> None:
    """No circle of imports, not even within a room or by way of imports inside functions."""
    names = {source: ".".join(source.relative_to(PACKAGE.parent).with_suffix("").parts) for source in SOURCES}
    modules = {name.removesuffix(".__init__") for name in names.values()}

    def module(imported: str) -> str | None:
        return next((name for name in (imported, imported.rpartition(".")[0]) if name in modules), None)

    needs = {name.removesuffix(".__init__"): {module(each) for each in imports(at)} for at, name in names.items()}
    try:
        graphlib.TopologicalSorter({name: those - {None} for name, those in needs.items()}).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("module", sorted(PURE))
def test_pure_rooms_touch_nothing_outside(module: str) -> None:
    used = {name.partition(".")[0] for name in imports(PACKAGE / f"{module}.py")} - {"jobd"}
    assert used <= HARMLESS, f"{module}.py is pure and may not import {sorted(used - HARMLESS)}"


def test_every_branch_of_the_pure_rooms_and_the_actor_is_covered() -> None:
    """The list by which `make coverage` judges: a new module of these rooms belongs on it."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    judged = project["tool"]["coverage"]["report"]["include"]
    rooms = (*PURE_ROOMS, "clock", "actor")
    assert sorted(judged) == sorted(f"jobd/{module}.py" for room in rooms for module in ROOMS[room][0].split())


def test_pure_rooms_draw_no_random_ids() -> None:
    """uuid is harmless only as a way to write one."""
    for module in PURE:
        names = {name for name in imports(PACKAGE / f"{module}.py") if name.startswith("uuid")}
        assert names <= {"uuid.UUID"}, module


def test_pure_rooms_read_addresses_and_go_to_none() -> None:
    """urllib is harmless only as a way to read one."""
    for module in PURE:
        names = {name for name in imports(PACKAGE / f"{module}.py") if name.startswith("urllib")}
        assert all(name.startswith("urllib.parse.") for name in names), module


def test_the_store_decides_nothing() -> None:
    """The store knows jobs, events and batches: it reads no command and gives no answer."""
    for module in ROOMS["store"][0].split():
        assert "commands" not in ours(PACKAGE / f"{module}.py"), module


@pytest.mark.parametrize("source", sorted((PACKAGE / "client").rglob("*.py")), ids=lambda source: source.name)
def test_the_client_knows_nothing_of_the_server(source: Path) -> None:
    assert ours(source) <= {"job", "events", "commands", "errors", "answers", "client"}


@pytest.mark.parametrize("source", sorted((PACKAGE / "cli").glob("ctl*.py")), ids=lambda source: source.name)
def test_jobctl_is_a_client(source: Path) -> None:
    assert ours(source) <= {"job", "commands", "errors", "answers", "client", "cli"}


def test_only_the_daemon_is_wired_by_hand() -> None:
    """No room but the command line knows the wiring, and it only starts it."""
    for source in SOURCES:
        if "daemon" in ours(source):
            assert module_of(source) in {"cli", "__main__", "daemon"}, source


def test_every_import_of_others_is_declared() -> None:
    """What is imported and neither ours nor Python's is a dependency of the package."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = project["optional-dependencies"]["s3"]
    declared = {line.split(">")[0].replace("-", "_") for line in (*project["dependencies"], *extra)}
    brought = {"multidict", "yarl", "markupsafe"}  # by aiohttp and jinja2, whose interfaces they are part of
    for source in SOURCES:
        used = {name.partition(".")[0] for name in imports(source)} - {"jobd"} - sys.stdlib_module_names
        assert used <= declared | brought, source


def test_what_an_extra_brings_is_imported_in_one_place_alone() -> None:
    """Everything else works without it."""
    users = {module_of(source) for source in SOURCES if any(name.startswith("obstore") for name in imports(source))}
    assert users == {"artifact_s3"}


def test_the_pinned_versions_are_within_the_bounds() -> None:
    """Upper bounds hold what relies on undocumented behaviour of these two."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    pins = dict(re.findall(r"^([a-z0-9-]+)==([^ ]+)", (ROOT / ".ci/constraints.txt").read_text("utf-8"), re.M))
    wanted = {each.name: each.specifier for each in map(Requirement, project["dependencies"])}
    assert {name: str(bounds) for name, bounds in wanted.items() if "<" in str(bounds)} == {
        "aiohttp": "<3.15,>=3.14.4",
        "aiosqlite": "<0.23,>=0.21",
    }
    assert all(bounds.contains(pins[name]) for name, bounds in wanted.items())
