"""What happens in the child of a worker: a mutant is put in place, tests run until one fails.

Knows pytest and the package under test as modules, and no list of mutants.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import os
import resource
import signal
import sys
from collections.abc import Sequence
from types import FunctionType, ModuleType
from typing import Any, Final

import pytest

from tests.mutation.mutate import Mutant

ROOM_FOR_MEMORY: Final = 1 << 30  # bytes that a child may take beyond what it began with
LEAST_CPU_S: Final = 2.0  # that each test may take, beside
TIMES: Final = 8  # its usual time

KILLED: Final = b"K"
STARTED: Final = b"."


class Unfit(Exception):
    """The mutant cannot be put into a module that is loaded: it has to be there when that is imported."""


def limit_memory() -> None:
    with open("/proc/self/statm", encoding="ascii") as sizes:
        now = int(sizes.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM_FOR_MEMORY, now + ROOM_FOR_MEMORY))


class Watch:
    """A pytest plugin: tells the parent which tests begin and which one fails, and bounds their CPU time."""

    def __init__(self, told: int, usual_s: dict[str, float]) -> None:
        self.told = told
        self.usual_s = usual_s
        self.failed = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        os.write(self.told, STARTED)
        # CPU time: whoever else is busy on this machine does not count. The signal's own action ends the process.
        signal.setitimer(signal.ITIMER_PROF, LEAST_CPU_S + TIMES * self.usual_s.get(nodeid, 1.0))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.failed:
            self.failed = True
            os.write(self.told, KILLED + report.nodeid.encode() + b"\n")


# -- into a loaded module ---------------------------------------------------------------------------------------------


def put_in_place(mutant: Mutant) -> None:
    """Give the function of `mutant` its changed code, for all who hold it already."""
    module = sys.modules[f"jobd.{mutant.module}"]
    (definition,) = ast.parse(mutant.source).body
    assert isinstance(definition, (ast.FunctionDef, ast.AsyncFunctionDef))
    definition.decorator_list = []
    tree = ast.Module(body=[definition], type_ignores=[])
    flags = annotations.compiler_flag  # as in the module itself
    code = compile(tree, module.__file__ or "?", "exec", flags=flags, dont_inherit=True)
    made: dict[str, Any] = {}
    exec(code, module.__dict__, made)
    changed = made[definition.name]
    target = function(module, mutant.scope)
    if len(changed.__code__.co_freevars) != len(target.__code__.co_freevars):
        raise Unfit(mutant.full_name)
    target.__code__ = changed.__code__
    target.__defaults__, target.__kwdefaults__ = changed.__defaults__, changed.__kwdefaults__


def function(module: ModuleType, scope: str) -> FunctionType:
    """The function itself, whatever it is wrapped in."""
    found: Any = module
    for name in scope.split("."):
        found = found.__dict__[name]
    if isinstance(found, property):
        found = found.fget
    found = getattr(found, "__func__", found)
    if not isinstance(found, FunctionType):
        raise Unfit(scope)
    return found


# -- into a module that is about to be imported -----------------------------------------------------------------------


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads the module from the text at hand. No byte code is read or written for it."""

    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self.source = source

    def get_code(self, fullname: str) -> Any:
        return compile(self.source, self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, path: str, source: str) -> None:
        self.name, self.path, self.source = name, path, source

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        if fullname != self.name:
            return None
        loader = _Loader(self.name, self.path, self.source)
        return importlib.util.spec_from_file_location(self.name, self.path, loader=loader)


def import_changed(mutant: Mutant) -> None:
    """From now on the module of `mutant` is imported as changed."""
    path = os.path.abspath(f"jobd/{mutant.module}.py")
    name = f"jobd.{mutant.module}"
    assert name not in sys.modules
    with open(path, encoding="utf-8") as original:
        tree = ast.parse(original.read())
    (changed,) = ast.parse(mutant.source).body
    if mutant.scope:
        _replace(tree, mutant.scope.split("."), changed)
    else:
        tree.body[mutant.place] = changed
    source = ast.unparse(ast.fix_missing_locations(tree))
    sys.meta_path.insert(0, _Finder(name, path, source))


def _replace(tree: ast.Module, scope: Sequence[str], definition: ast.stmt) -> None:
    inside: Any = tree
    for name in scope[:-1]:
        inside = next(each for each in inside.body if isinstance(each, ast.ClassDef) and each.name == name)
    (place,) = (number for number, each in enumerate(inside.body) if getattr(each, "name", None) == scope[-1])
    inside.body[place] = definition
