"""Mutation testing itself: which changes it makes, how it names and lists them, and that it tells a survivor.

A sample of the mutants is tried by `make check`, all of them by `make mutation`.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutation.__main__ import not_deep
from tests.mutation.levels import ALONE, DEEP, MIRRORS, MODULES, NEAR, files
from tests.mutation.listed import SURVIVORS, argued, as_line
from tests.mutation.mutate import Mutant, mutants, unchanged
from tests.test_imports import PACKAGE, PURE

ROOT = Path(__file__).parent.parent


def told(source: str) -> list[str]:
    return [mutant.name for mutant in mutants("some", source)]


def within(body: str, arguments: str = "a, b") -> list[str]:
    """The changes inside a function with this body."""
    return [name.removeprefix("f: ") for name in told(f"def f({arguments}):\n    {body}\n")]


@pytest.mark.parametrize(
    ("body", "changes"),
    [
        ("a < b", ["a < b -> a <= b", "a < b -> a >= b"]),
        ("a >= b", ["a >= b -> a > b", "a >= b -> a < b"]),
        ("a is not None", ["a is not None -> a is None"]),
        ("a in b", ["a in b -> a not in b"]),
        ("a and b", ["a and b -> a or b", "a and b -> b", "a and b -> a"]),
        ("not a", ["not a -> a"]),
        ("-a", ["-a -> a"]),
        ("a + b", ["a + b -> a - b"]),
        ("a << b", ["a << b -> a >> b"]),
        ("a if b else a.c", ["a if b else a.c -> a", "a if b else a.c -> a.c"]),
        ("a - 1", ["a - 1 -> a + 1", "a - 1 -> a - 2", "a - 1 -> a - 0"]),
        ("a == 'failed'", ["a == 'failed' -> a != 'failed'", "a == 'failed' -> a == 'cancelled'"]),
        ("a == 'word'", ["a == 'word' -> a != 'word'", "a == 'word' -> a == 'wordx'"]),
        ("a == True", ["a == True -> a != True", "a == True -> a == False"]),
        ("{'k': a}", ["{'k': a} left out", "{'k': a} -> {'kx': a}"]),
        ("[a]", ["a left out of [a]"]),
        ("a in {b}", ["a in {b} -> a not in {b}", "b left out of {b}"]),
        ("a(b)", ["a(b) left out"]),
        ("a(b, a)", ["a(b, a) left out", "a(.. b, a swapped)"]),
        ("a(b, b)", ["a(b, b) left out"]),
        ("a(b=b)", ["a(b=b) left out", "a(.. b=b left out)"]),
        ("min(a)", ["min(a) left out", "min(a) -> max(a)"]),
        ("a.get(b, a)", ["a.get(b, a) left out", "a.get(.. b, a swapped)", "a.get(b, a) -> a.get(b)"]),
        ("return a", ["return a -> return None"]),
        ("return None", []),
        ("a.b = b", ["a.b = b left out"]),
        ("a = b", ["a = b -> a as before"]),
        ("c = b", []),
        ("a += b", ["a += b -> a -= b", "a += b -> a = b", "a += b left out"]),
        ("del a[b]", ["del a[b] left out"]),
        ("if a: b", ["a -> not a"]),
        ("[c for c in a if c]", ["if c -> all"]),
        ("for c in a: c", ["for c in a -> never"]),
        ("while a:\n        continue", ["a -> not a", "continue left out"]),
        ("raise a", ["raise a left out"]),
        (
            "match a:\n        case 'x' if b: pass\n        case _: pass",
            ["case 'x' left out", "case 'x' if b -> always", "'x' -> 'xx'"],
        ),
    ],
)
def test_every_small_change(body: str, changes: list[str]) -> None:
    assert within(body) == changes


@pytest.mark.parametrize(
    "source",
    [
        '"""A text."""',
        "import a",
        "x = 'Words for people.'",
        "def f(a):\n    assert a == 1",
        "def f(a):\n    log.info('word', a=1)",
        "def f(a: int) -> None:\n    f'{a + 1} word'",
        "class A(B, frozen=True):\n    __slots__ = ('a', 'b')\n    a: int",
        "if TYPE_CHECKING:\n    a = 1",
        "Either = A | B",
        "@wrapped(1)\ndef f(): pass",
        "class A:\n    def __repr__(self): return 'a' + 'b'",
    ],
)
def test_what_is_left_alone(source: str) -> None:
    assert told(source) == []


def test_bounds_and_defaults_are_changed_where_they_are_written() -> None:
    assert told("class A:\n    n: Annotated[int, Meta(ge=1)] = 0") == [
        "A: Meta(.. ge=1 left out)",
        "A: ge=1 -> ge=2",
        "A: ge=1 -> ge=0",
        "A: n: Annotated[int, Meta(ge=1)] = 0 -> n: Annotated[int, Meta(ge=1)] = 1",
        "A: n: Annotated[int, Meta(ge=1)] = 0 -> n: Annotated[int, Meta(ge=1)] = -1",
    ]
    assert told("def f(a=1): pass") == ["f: 1 -> 2", "f: 1 -> 0"]


def test_a_change_is_one_change_and_the_rest_stays() -> None:
    source = (
        "class A:\n\n    def f(self, a):\n        if a < 1:\n            return a\n\n    def g(self):\n        pass"
    )
    for mutant in mutants("some", source):
        assert mutant.scope == "A.f"
        changed = source.replace(ast.unparse(ast.parse(source).body[0].body[0]), "")  # type: ignore[attr-defined]
        assert mutant.source not in changed
        assert mutant.source.startswith("def f(self, a):\n")
    assert mutants("some", source)[0] == Mutant(
        "some", "A.f: a < 1 -> a <= 1", "compare", 4, 4, "A.f", -1, "def f(self, a):\n    if a <= 1:\n        return a"
    )


def test_what_changes_nothing_is_the_source_itself() -> None:
    source = "a = 1\n\nclass A:\n\n    def f(self):\n        return 1"
    (assigned, *_), (inside, *_) = mutants("some", "a = 1"), mutants("some", source)[2:]
    assert unchanged(assigned, source).source == "a = 1"
    assert unchanged(inside, source).source == "def f(self):\n    return 1"


def test_names_are_told_apart_and_know_no_lines() -> None:
    names = told("def f(a):\n    a < 1\n    a < 1\n")
    assert names[0] == "f: a < 1 -> a <= 1"
    assert names[4] == "f: a < 1 -> a <= 1 (2)"
    assert told("\n\n\ndef f(a):\n\n    a < 1\n\n    a < 1\n") == names


@pytest.mark.parametrize("module", MODULES)
def test_every_mutant_of_the_pure_rooms_has_its_own_name_and_can_be_compiled(module: str) -> None:
    made = mutants(module, (PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    assert made
    assert len({mutant.name for mutant in made}) == len(made)
    for mutant in made[::9]:
        compile(mutant.source, module, "exec", dont_inherit=True)


def test_every_pure_module_is_changed_and_its_tests_are_there() -> None:
    assert set(MODULES) == PURE
    for file in [*files(NEAR), *(name.partition("::")[0] for name in ALONE), *DEEP]:
        assert (ROOT / file).exists(), file
    assert {name for names in MIRRORS.values() for name in names} <= set(NEAR)


def test_the_list_holds_names_below_their_arguments() -> None:
    text = (
        "# Title\n\nNot an argument.\n\n## `rules`\n\nBoth are\nthe same.\n\n- `f: a -> b`\n- `` f: `a` left out ``\n\n"
    )
    text += "Another reason.\n\n- `g: 1 -> 2`\n\n## `book`\n\n- `h: 1 -> 2`\n"
    assert argued(text) == {
        "rules.f: a -> b": "Both are the same.",
        "rules.f: `a` left out": "Both are the same.",
        "rules.g: 1 -> 2": "Another reason.",
    }
    assert [as_line("rules.f: a -> b"), as_line("rules.f: `a`")] == ["- `f: a -> b`", "- `` f: `a` ``"]
    with pytest.raises(ValueError, match="twice"):
        argued("## `a`\n\nWhy.\n\n- `b`\n- `b`\n")
    with pytest.raises(ValueError, match="not the name"):
        argued("## `a`\n\nWhy.\n\n- b\n")


@pytest.mark.parametrize(
    ("near", "deep_listed", "spared"),
    [(False, False, {"a.f: 1 -> 2"}), (False, True, set()), (True, False, {"a.f: 1 -> 2", "a.g: 1 -> 2"})],
)
def test_who_is_argued_for_does_not_meet_the_deep_tests_again_unless_asked(
    near: bool, deep_listed: bool, spared: set[str]
) -> None:
    names = ["a.f: 1 -> 2", "a.g: 1 -> 2"]
    assert not_deep(names, {"a.f: 1 -> 2": "A figure."}, near=near, deep_listed=deep_listed) == spared


def test_the_list_of_survivors_can_be_read() -> None:
    for name, why in argued(SURVIVORS.read_text(encoding="utf-8")).items():
        assert name.partition(".")[0] in MODULES, name
        assert len(why) > 20, name
