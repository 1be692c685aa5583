"""Which package may import which, and what the pure packages may use."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Final

import pytest
from packaging.requirements import Requirement

import jobd

PACKAGE: Final = Path(jobd.__file__).parent
ROOT: Final = PACKAGE.parent
SOURCES: Final = sorted(PACKAGE.rglob("*.py"))

# Each package with the packages that it may import. Modules at the top level may import everything.
ARROWS: Final[dict[str, set[str]]] = {
    "model": set(),
    "core": {"model"},
    "journal": {"model"},
    "storage": {"model", "journal"},
    "engine": {"model", "core"},
    "cluster": {"model", "core", "journal", "storage", "engine"},
    "http": {"model", "engine"},
    "webhooks": {"model"},
    "maintenance": {"model", "core", "storage", "engine"},
    "monitoring": {"model", "core", "storage", "engine", "maintenance", "config"},
    "api": {"model", "core", "storage", "engine", "http", "webhooks", "maintenance", "monitoring"},
    "dashboard": {"model", "core", "engine", "http", "webhooks", "maintenance", "monitoring", "api"},
    "client": {"model"},
    "cli": {"model", "client"},
    "cli.files": {"storage"},  # does not overwrite the files of a running daemon
    "cli.daemon": {
        "model",
        "client",
        "cli",
        "cluster",
        "journal",
        "storage",
        "config",
        "config_checks",
        "config_loader",
        "daemon",
        "monitoring",
    },
}
TOP: Final = [
    "__init__", "__main__", "config", "config_checks", "config_loader", "credentials", "daemon", "django", "logging",
    "node", "pytest_plugin", "resources", "serving", "systemd", "testing",
]  # fmt: skip
PURE: Final = ("model", "core")
PURE_IMPORTS: Final = {
    "__future__", "bisect", "collections", "datetime", "functools", "hashlib", "heapq", "itertools", "math",
    "msgspec", "operator", "re", "shlex", "typing",
}  # fmt: skip
IMPURE_CALLS: Final = {"now", "today", "utcnow", "uuid1", "uuid4", "open", "print", "input"}


@functools.cache
def names(source: Path) -> set[str]:
    """Return the dotted names that `source` imports anywhere: `from a import b` gives a.b."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def owner_of(source: Path) -> str:
    """Return the longest key of ARROWS that covers `source`, or "" for a module at the top level."""
    parts = source.relative_to(PACKAGE).with_suffix("").parts
    return next((key for n in range(len(parts), 0, -1) if (key := ".".join(parts[:n])) in ARROWS), "")


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source.relative_to(PACKAGE)))
def test_packages_import_only_what_they_may(source: Path) -> None:
    if owner := owner_of(source):
        imported = {name.split(".")[1] for name in names(source) if name.startswith("jobd.")} - {"__version__"}
        assert imported <= ARROWS[owner] | {owner.partition(".")[0]}, source


def test_no_import_is_circular() -> None:
    modules = {
        ".".join(each.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): each for each in SOURCES
    }
    needs = {
        module: {
            name if name in modules else name.rpartition(".")[0]
            for name in names(source) - {"jobd.__version__"}  # it is there before jobd imports anything
        }
        & modules.keys()
        for module, source in modules.items()
    }
    try:
        graphlib.TopologicalSorter(needs).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_every_module_belongs_to_a_package() -> None:
    top = {str(source.relative_to(PACKAGE)) for source in SOURCES if not owner_of(source)}
    assert top == {f"{name}.py" for name in TOP}


def test_no_name_of_a_class_means_two_things() -> None:
    trees = [ast.parse(source.read_text(encoding="utf-8")) for source in SOURCES]
    names = Counter(each.name for tree in trees for each in tree.body if isinstance(each, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("pure", PURE)
def test_pure_packages_use_no_io_no_clock_no_randomness_and_no_log(pure: str) -> None:
    for source in (PACKAGE / pure).rglob("*.py"):
        used = {name for name in names(source) if not name.startswith("jobd.")}
        assert all(name.split(".")[0] in PURE_IMPORTS or name.startswith("urllib.parse.") for name in used), source
        tree = ast.parse(source.read_text(encoding="utf-8"))
        called = {getattr(node.func, "attr", None) or getattr(node.func, "id", "") for node in calls(tree)}
        assert not called & IMPURE_CALLS, source


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_storage_knows_no_commands() -> None:
    for source in (PACKAGE / "storage").rglob("*.py"):
        assert not any(name.startswith("jobd.model.commands") for name in names(source)), source


def test_jobctl_uses_the_client_alone() -> None:
    for source in (PACKAGE / "cli/ctl").rglob("*.py"):
        assert not any(name.startswith("jobd.cli.daemon") for name in names(source)), source


def test_every_imported_distribution_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = (*project["dependencies"], *extras["s3"], *extras["postgres"])
    declared = {line.split(">")[0].replace("-", "_") for line in lines}
    loaded_by = {"pytest_plugin": {"pytest"}, "django": {"django", "django_tasks"}}
    reexported = {"multidict", "yarl", "markupsafe"}  # parts of the interfaces of aiohttp and jinja2
    for source in SOURCES:
        used = {name.partition(".")[0] for name in names(source)} - {"jobd"} - sys.stdlib_module_names
        assert used <= declared | reexported | loaded_by.get(source.stem, set()), source


def test_an_optional_dependency_is_imported_by_few_modules() -> None:
    def users(package: str) -> set[str]:
        found = [source for source in SOURCES if any(name.partition(".")[0] == package for name in names(source))]
        return {str(source.relative_to(PACKAGE)) for source in found}

    assert users("obstore") == {"storage/artifacts/s3.py"}
    assert users("asyncpg") == {"journal/postgres/postgres_errors.py", "journal/postgres/session.py"}


def test_pinned_versions_are_within_the_declared_bounds() -> None:
    """Upper bounds protect from changed interfaces, and uses of undocumented behavior."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    pins = dict(re.findall(r"^([a-z0-9-]+)==([^ ]+)", (ROOT / ".ci/constraints.txt").read_text("utf-8"), re.M))
    production = dict(
        re.findall(r"^([a-z0-9-]+)==([^ ]+)", (ROOT / "systemd/requirements.txt").read_text("utf-8"), re.M)
    )
    assert production.items() <= pins.items(), "make pins"
    lines = (*project["dependencies"], *project["optional-dependencies"]["postgres"])
    wanted = {each.name: each.specifier for each in map(Requirement, lines)}
    assert {name: str(bounds) for name, bounds in wanted.items() if "<" in str(bounds)} == {
        "aiohttp": "<4,>=3.14.4",
        "aiosqlite": "<0.23,>=0.21",
        "asyncpg": "<0.33,>=0.30",
        "cronsim": "<3,>=2.7",
        "httptools": "<0.10,>=0.6.4",
    }
    assert wanted.pop("jobd-client").contains(jobd.__version__)
    assert all(bounds.contains(pins[name]) for name, bounds in wanted.items())


# -- private names -----------------------------------------------------------------------------------------------------

DOCUMENTED: Final = {"os._exit", "sys._current_frames"}
OWN: Final = {"self", "cls", "super()"}
# Private names of other objects of jobd. An object that is not listed may be a library's, with the same private name.
OTHER_OBJECTS: Final = {
    "client._retry", "client._tls", "journal._leader", "program._watch", "state._counts_of", "state._enter_all",
    "state._lock_ms", "state._now", "twin._reset_connections",
}  # fmt: skip


def defined(tree: ast.AST) -> set[str]:
    """Return the names that the code defines: functions, classes, variables, fields, attributes of self, slots."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                found.add(node.name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.Constant(value=str(name)):
                found.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                found.add(name)
    return found


def is_private(name: str) -> bool:
    """Return whether a part of a dotted name is private."""
    return any(re.match("_[^_]", part) for part in name.split("."))


def foreign_private_names(tree: ast.AST, known: set[str]) -> set[str]:
    """Return the uses of private names, unless they are in `known` and belong to an object of jobd."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=value, attr=name) if is_private(name):
                owner, text = ast.unparse(value), ast.unparse(node)
                if name not in known or (owner not in OWN and text not in OTHER_OBJECTS):
                    found.add(text)
            case ast.Call(args=[target, ast.Constant(value=str(name)), *_]) if is_private(name):  # getattr and the like
                if ast.unparse(target) not in OWN:
                    found.add(ast.unparse(node))
            case ast.Import(names=aliases):
                found |= {each.name for each in aliases if is_private(each.name)}
            case ast.ImportFrom(module=str(module), names=aliases):
                found |= {each.name for each in aliases if is_private(each.name) and each.name not in known}
                found |= {module} if is_private(module) else set()
    return found - DOCUMENTED


def library_classes(tree: ast.Module) -> list[ast.ClassDef]:
    """Return the classes with a base class of a library, such as `web.Server`."""
    libraries = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for each in node.names:
                origin = (node.module or "") if isinstance(node, ast.ImportFrom) else each.name
                if origin.partition(".")[0] not in {"jobd", "typing"}:
                    libraries.add((each.asname or each.name).partition(".")[0])
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return [node for node in classes if libraries & {re.split(r"[.\[]", ast.unparse(base))[0] for base in node.bases}]


def private_names_of_self(tree: ast.ClassDef) -> set[str]:
    """Return the private attributes of self that a class uses."""
    used = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self")
    return {node.attr for node in used if re.match("_[^_]", node.attr)}


def defined_by_class(tree: ast.ClassDef) -> set[str]:
    """Return the methods and fields of a class, but not what its other methods assign: that may be the library's."""
    functions = {each for each in tree.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)}
    rest = [each for each in tree.body if each not in functions or getattr(each, "name", "") == "__init__"]
    return defined(ast.Module(rest, [])) | {each.name for each in functions}


@functools.cache
def defined_by_file(file: Path) -> set[str]:
    return defined(ast.parse(file.read_text(encoding="utf-8"))) if file.exists() else set()


def test_no_private_attribute_of_a_library_is_used() -> None:
    """A private name is defined by the module itself or by a module of jobd that it imports.

    In a class with a base class of a library, it is defined by that class, because the library may use the same name.
    """
    for source in SOURCES:
        tree, known = ast.parse(source.read_text(encoding="utf-8")), defined_by_file(source)
        for name in names(source):
            if name.startswith("jobd."):
                path = ROOT / name.replace(".", "/")
                known = (
                    known | defined_by_file(path.with_suffix(".py")) | defined_by_file(path.parent.with_suffix(".py"))
                )
        assert not foreign_private_names(tree, known), source
        for node in library_classes(tree):
            assert private_names_of_self(node) <= defined_by_class(node), source


@pytest.mark.parametrize(
    "code",
    [
        "import aiohttp\ndef f(session): return session._connector",
        "from aiohttp.web import _run_app",
        "import asyncio\nasyncio.get_event_loop()._ready",
        "class A:\n    def f(self, transport): self._loop = transport._loop",
        "class A:\n    def f(self): self._loop = self.transport._loop",
        "def f(transport): return getattr(transport, '_loop')",
        "import aiohttp._websocket",
        "from aiohttp._http_parser import HttpRequestParser",
    ],
)
def test_a_private_name_of_a_library_is_found(code: str) -> None:
    tree = ast.parse(code)
    assert foreign_private_names(tree, defined(tree))


@pytest.mark.parametrize(
    "line",
    [
        "from aiohttp import web\nclass A(web.Server):",
        "from asyncio.sslproto import SSLProtocol\nclass A(SSLProtocol):",
    ],
)
def test_a_private_attribute_of_a_base_class_is_found(line: str) -> None:
    code = f"{line}\n    def f(self): self._loop = None\n_loop = 1"
    [found] = library_classes(ast.parse(code))
    assert not private_names_of_self(found) <= defined_by_class(found)
