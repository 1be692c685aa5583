"""Declare and plant bugs. A bug is a function that takes the place of one function of jobd."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import pytest
from msgspec import Struct

P = ParamSpec("P")
R = TypeVar("R")

# The level of a test file, by the start of its path.
LEVELS: Final = {
    "tests/unit/core": "rules",
    "tests/proof/test_simulation.py": "simulation",
    "tests/proof/test_cluster_simulation.py": "simulation",
    "tests/unit/cluster": "cluster",
    "tests/unit/engine": "actor",
    "tests/unit/maintenance": "maintenance",
    "tests/unit/storage": "store",
    "tests/integration/test_outages.py": "store",
    "tests/unit/http": "http",
    "tests/unit/api": "http",
    "tests/integration/test_command_stream.py": "http",
}

RULES: Final = "tests/unit/core"
ACTOR: Final = "tests/unit/engine"
SIMULATION: Final = "tests/proof/test_simulation.py"
CLUSTER_SIMULATION: Final = "tests/proof/test_cluster_simulation.py"


class Bug(Struct, frozen=True):
    """One bug: `replacement` is called in place of `target`, with `target` as its first argument.

    A test must fail in `found_by`, a directory, a file or a single test.
    """

    name: str
    found_by: str
    target: Callable[..., Any]
    replacement: Callable[..., Any]

    @property
    def level(self) -> str:
        return next(level for path, level in LEVELS.items() if self.found_by.startswith(path))


BUGS: Final[dict[str, Bug]] = {}


def bug(target: Callable[P, R], *, found_by: str) -> Callable[[Callable[Concatenate[Callable[P, R], P], R]], None]:
    """Register the decorated function as a bug in `target`. mypy checks that its signature fits.

    The bug has the name of the function, with hyphens. The docstring of the function says what the bug breaks.
    """

    def register(replacement: Callable[Concatenate[Callable[P, R], P], R]) -> None:
        name = replacement.__name__.replace("_", "-")
        assert name not in BUGS, f"two bugs are named {name}"
        BUGS[name] = Bug(name, found_by, target, replacement)

    return register


def plant(planted: Bug, patch: pytest.MonkeyPatch) -> None:
    """Replace the target of `planted` in its class or module, in tables, and under every name in a module of jobd."""
    target = planted.target

    @functools.wraps(target)
    def call(*args: Any, **kwargs: Any) -> Any:
        return planted.replacement(target, *args, **kwargs)

    module = sys.modules[target.__module__]
    *outer, name = target.__qualname__.split(".")
    owner: Any = functools.reduce(getattr, outer, module)
    if outer:
        is_classmethod = isinstance(inspect.getattr_static(owner, name), classmethod)
        patch.setattr(owner, name, staticmethod(call) if is_classmethod else call)
        return
    for other in [other for key, other in sys.modules.items() if key.startswith("jobd.")]:
        for alias in [alias for alias, value in vars(other).items() if value is target]:
            patch.setattr(other, alias, call)
        for table in [value for value in vars(other).values() if isinstance(value, dict)]:
            for key in [key for key, value in table.items() if value is target]:
                patch.setitem(table, key, call)
