"""Mutants of a module: every small change that a test ought to notice, each with a name that survives other edits.

Only reads source text; nothing is imported, run or written. What is left alone, and why, is said at the top of
survivors.md.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from typing import Final, NamedTuple, TypeVar

from msgspec import Struct
from msgspec.structs import replace

STATUSES: Final = ("queued", "processing", "completed", "failed", "cancelled")

Node = TypeVar("Node", bound=ast.AST)
Functions = ast.FunctionDef | ast.AsyncFunctionDef


class Mutant(Struct, frozen=True):
    """One change. `name` says where and what, without line numbers; `first` to `last` are the lines that it touches.

    `source` is what to put in the place of a definition: of the function or method `scope`, or, where that is empty, of
    statement number `place` of the module.
    """

    module: str
    name: str
    operator: str
    first: int
    last: int
    scope: str
    place: int
    source: str

    @property
    def full_name(self) -> str:
        return f"{self.module}.{self.name}"


class Change(NamedTuple):
    """What may stand in the place of a node."""

    operator: str
    told: str
    made: ast.AST


class Slot(NamedTuple):
    """Where a node hangs in its parent: the field, and its place where the field is a list."""

    parent: ast.AST
    field: str
    place: int | None

    def put(self, node: ast.AST) -> None:
        if self.place is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.place] = node


def mutants(module: str, source: str) -> list[Mutant]:
    """All mutants of a module, in the order of its text."""
    tree = ast.parse(source)
    seen: Counter[str] = Counter()
    found = []
    for scope, root, slot, node in _places(tree):
        for change in _changes(node, scope[-1] if scope else None, slot):
            where = ".".join(each.name for each in scope) or "module"
            told = f"{where}: {change.told}"
            seen[told] += 1
            name = told if seen[told] == 1 else f"{told} ({seen[told]})"
            slot.put(change.made)
            text = ast.unparse(ast.fix_missing_locations(change.made if node is root else root))
            slot.put(node)
            in_function = _in_function(scope)
            place = -1 if in_function else tree.body.index(root)  # type: ignore[arg-type]
            qualified = ".".join(each.name for each in scope) if in_function else ""
            first, last = _lines(node)
            if in_function and first < root.body[0].lineno:  # type: ignore[attr-defined]
                first, last = root.lineno, root.end_lineno or first  # type: ignore[attr-defined]  # a default value
            found.append(Mutant(module, name, change.operator, first, last, qualified, place, text))
    return found


def unchanged(mutant: Mutant, source: str) -> Mutant:
    """The same place as it was."""
    inside: ast.AST = ast.parse(source)
    if not mutant.scope:
        inside = ast.parse(source).body[mutant.place]
    for name in mutant.scope.split(".") if mutant.scope else ():
        inside = next(each for each in ast.walk(inside) if getattr(each, "name", None) == name)
    return replace(mutant, name=f"{mutant.scope or 'module'}: nothing", operator="none", source=ast.unparse(inside))


# -- where ------------------------------------------------------------------------------------------------------------

Scope = tuple[ast.ClassDef | Functions, ...]


def _places(tree: ast.Module) -> Iterator[tuple[Scope, ast.AST, Slot, ast.AST]]:
    """Every node that may be changed: the definitions around it, what to write anew, its slot, itself."""
    for slot, statement in _children(tree):
        if _is_left_alone(statement, slot):
            continue
        if isinstance(statement, (ast.ClassDef, *_FUNCTIONS)):
            yield from _inside(statement, (statement,), statement)
        else:
            yield (), statement, slot, statement
            yield from _inside(statement, (), statement)


def _inside(node: ast.AST, scope: Scope, root: ast.AST) -> Iterator[tuple[Scope, ast.AST, Slot, ast.AST]]:
    for slot, child in _children(node):
        if _is_left_alone(child, slot):
            continue
        inner, inner_root = scope, root
        if isinstance(child, (ast.ClassDef, *_FUNCTIONS)) and not _in_function(scope):
            inner = (*scope, child)
            inner_root = child if isinstance(child, _FUNCTIONS) else root
        else:
            yield scope, root, slot, child
        yield from _inside(child, inner, inner_root)


def _in_function(scope: Scope) -> bool:
    return bool(scope) and isinstance(scope[-1], _FUNCTIONS)


def _children(node: ast.AST) -> Iterator[tuple[Slot, ast.AST]]:
    for name, value in ast.iter_fields(node):
        if isinstance(value, ast.AST):
            yield Slot(node, name, None), value
        elif isinstance(value, list):
            for place, each in enumerate(value):
                if isinstance(each, ast.AST):
                    yield Slot(node, name, place), each


def _is_left_alone(node: ast.AST, slot: Slot) -> bool:
    """Texts for people, what only the type checker reads, assertions of the impossible, how classes are stored."""
    parent, name = slot.parent, slot.field
    match node:
        case ast.Import() | ast.ImportFrom() | ast.Assert() | ast.JoinedStr() | ast.expr_context():
            return True
        case ast.operator() | ast.cmpop() | ast.boolop() | ast.unaryop() | ast.alias():
            return True
        case ast.Expr(value=ast.Constant(value=str())):
            return True  # a docstring
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
        case ast.Assign(targets=[ast.Name(id="__slots__")]):
            return True
        case ast.Call(func=ast.Name(id="TypeVar" | "assert_never" | "cast")):
            return True
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="log")) | ast.Name(id="assert_never"))):
            return True
        case ast.FunctionDef(name="__repr__"):
            return True
    if name in ("decorator_list", "returns", "bases", "keywords", "type_params") and isinstance(
        parent, (ast.ClassDef, *_FUNCTIONS)
    ):
        return True
    if name == "annotation":
        return not _has_bounds(node)
    return False


_FUNCTIONS: Final = (ast.FunctionDef, ast.AsyncFunctionDef)


def _has_bounds(annotation: ast.AST) -> bool:
    """An annotation that checks: `Annotated[int, Meta(ge=0)]`."""
    return any(isinstance(each, ast.Name) and each.id == "Meta" for each in ast.walk(annotation))


def _lines(node: ast.AST) -> tuple[int, int]:
    """The lines of a change. A statement with a body counts by its head."""
    first = getattr(node, "lineno", 0)
    last = getattr(node, "end_lineno", None) or first
    if isinstance(node, (ast.If, ast.For, ast.While, ast.Match)):
        last = first
    if isinstance(node, ast.comprehension):
        first, last = node.target.lineno, getattr(node.iter, "end_lineno", None) or node.target.lineno
    if isinstance(node, ast.keyword):
        first, last = node.value.lineno, node.value.end_lineno or node.value.lineno
    if isinstance(node, ast.match_case):
        first = last = node.pattern.lineno
    return first, last


# -- what -------------------------------------------------------------------------------------------------------------


def _changes(node: ast.AST, inside: ast.AST | None, slot: Slot) -> Iterator[Change]:
    match node:
        case ast.Compare():
            yield from _of_compare(node)
        case ast.BoolOp():
            yield from _of_bool(node)
        case ast.UnaryOp():
            yield _swap("not" if isinstance(node.op, ast.Not) else "sign", node, node.operand)
        case ast.BinOp() | ast.AugAssign():
            yield from _of_arithmetic(node, inside)
        case ast.Constant():
            yield from _of_constant(node, slot)
        case ast.Call():
            yield from _of_call(node)
        case ast.IfExp():
            yield _swap("choice", node, node.body)
            yield _swap("choice", node, node.orelse)
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant) or value.value:
            yield _swap("return", node, ast.Return(value=ast.Constant(value=None)))
            if _returns_bool(inside) and not isinstance(value, (*_TRUTHS, ast.Constant)):
                yield _swap("return", node, ast.Return(value=_not(value)))
        case ast.comprehension():
            for place in range(len(node.ifs)):
                fewer = _copy(node)
                del fewer.ifs[place]
                yield Change("filter", f"if {_text(node.ifs[place])} -> all", fewer)
        case ast.Dict():
            yield from _of_dict(node)
        case ast.Tuple() | ast.List() | ast.Set() if isinstance(node.ctx if hasattr(node, "ctx") else None, _LOADS):
            yield from _of_elements(node, slot)
        case ast.match_case():
            pass
        case ast.Match():
            yield from _of_match(node)
        case _:
            pass
    if isinstance(node, ast.stmt):
        yield from _of_statement(node, inside)
    is_condition = isinstance(slot.parent, (ast.If, ast.While)) and not isinstance(node, (*_TRUTHS, ast.Constant))
    if isinstance(node, ast.expr) and is_condition:
        yield _swap("condition", node, _not(node))


_LOADS: Final = (ast.Load, type(None))
_TRUTHS: Final = (ast.Compare, ast.BoolOp, ast.UnaryOp)

_COMPARISONS: Final[dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_ARITHMETIC: Final[dict[type[ast.operator], type[ast.operator]]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
}
_OTHER_NAMES: Final = {"max": "min", "min": "max", "any": "all", "all": "any"}


def _of_compare(node: ast.Compare) -> Iterator[Change]:
    for place, operator in enumerate(node.ops):
        for other in _COMPARISONS[type(operator)]:
            made = _copy(node)
            made.ops[place] = other()
            yield _swap("compare", node, made)


def _of_bool(node: ast.BoolOp) -> Iterator[Change]:
    made = _copy(node)
    made.op = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
    yield _swap("and/or", node, made)
    for place in range(len(node.values)):
        fewer = _copy(node)
        del fewer.values[place]
        yield _swap("operand", node, fewer if len(fewer.values) > 1 else fewer.values[0])


def _of_arithmetic(node: ast.BinOp | ast.AugAssign, inside: ast.AST | None) -> Iterator[Change]:
    if inside is None and isinstance(node.op, ast.BitOr):
        return  # a union of types
    made = _copy(node)
    made.op = _ARITHMETIC[type(node.op)]()
    yield _swap("arithmetic", node, made)
    if isinstance(node, ast.AugAssign):
        yield _swap("assignment", node, ast.Assign(targets=[node.target], value=node.value, lineno=0))


def _of_constant(node: ast.Constant, slot: Slot) -> Iterator[Change]:
    value = node.value
    others: list[bool | int | float | bytes | str] = []
    if isinstance(value, bool):
        others = [not value]
    elif isinstance(value, int):
        others = [value + 1, value - 1]
    elif isinstance(value, float):
        others = [value + 1]
    elif isinstance(value, bytes):
        others = [value + b"x"]
    elif isinstance(value, str) and " " not in value:
        others = [STATUSES[(STATUSES.index(value) + 1) % len(STATUSES)] if value in STATUSES else f"{value}x"]
    for other in others:
        made = ast.Constant(value=other)
        yield Change("constant", _with_parent(node, made, slot), made)


def _with_parent(node: ast.expr, made: ast.expr, slot: Slot) -> str:
    """A change of a small thing, told with what it is a part of."""
    parent = slot.parent
    if isinstance(
        parent, (ast.Compare, ast.BinOp, ast.AugAssign, ast.Assign, ast.AnnAssign, ast.keyword, ast.Subscript)
    ):
        before = _text(parent)
        slot.put(made)
        after = _text(parent)
        slot.put(node)
        return f"{before} -> {after}"
    if isinstance(parent, ast.Call):
        return f"{_text(parent.func)}(.. {_text(node)} -> {_text(made)})"
    if isinstance(parent, ast.Dict) and slot.field == "keys" and slot.place is not None:
        value = _text(parent.values[slot.place])
        return f"{{{_text(node)}: {value}}} -> {{{_text(made)}: {value}}}"
    return f"{_text(node)} -> {_text(made)}"


def _of_call(node: ast.Call) -> Iterator[Change]:
    called = _text(node.func)
    if isinstance(node.func, ast.Name) and node.func.id in _OTHER_NAMES:
        made = _copy(node)
        made.func = ast.Name(id=_OTHER_NAMES[node.func.id], ctx=ast.Load())
        yield _swap("call", node, made)
    elif called != "isinstance" and not any(isinstance(each, ast.Starred) for each in node.args):
        for place in range(len(node.args) - 1):
            if _text(node.args[place]) == _text(node.args[place + 1]):
                continue
            made = _copy(node)
            made.args[place], made.args[place + 1] = made.args[place + 1], made.args[place]
            yield Change(
                "swapped", f"{called}(.. {_text(node.args[place])}, {_text(node.args[place + 1])} swapped)", made
            )
    for place, keyword in enumerate(node.keywords):
        fewer = _copy(node)
        del fewer.keywords[place]
        name = f"{keyword.arg}=" if keyword.arg else "**"
        yield Change("argument", f"{called}(.. {name}{_text(keyword.value)} left out)", fewer)
    if isinstance(node.func, ast.Attribute) and node.func.attr == "get" and len(node.args) == 2:
        fewer = _copy(node)
        del fewer.args[1]
        yield _swap("argument", node, fewer)


def _of_dict(node: ast.Dict) -> Iterator[Change]:
    for place, key in enumerate(node.keys):
        fewer = _copy(node)
        del fewer.keys[place], fewer.values[place]
        yield Change("entry", f"{{{_text(key) if key else '**'}: {_text(node.values[place])}}} left out", fewer)


def _of_elements(node: ast.Tuple | ast.List | ast.Set, slot: Slot) -> Iterator[Change]:
    """Elements of what is written down as a collection; of tuples only what is looked through or looked up in."""
    parent = slot.parent
    if isinstance(node, ast.Tuple) and not (
        isinstance(parent, (ast.Compare, ast.For, ast.comprehension))
        or (isinstance(parent, ast.Call) and _text(parent.func) == "isinstance")
        or (isinstance(parent, ast.Subscript) and _text(parent.value) == "Literal")
        or (isinstance(parent, ast.AnnAssign) and len(node.elts) > 2)
    ):
        return
    for place, element in enumerate(node.elts):
        fewer = _copy(node)
        del fewer.elts[place]
        made: ast.AST = fewer
        if not fewer.elts and isinstance(node, ast.Set):
            made = ast.Call(func=ast.Name(id="set", ctx=ast.Load()), args=[], keywords=[])
        yield Change("element", f"{_text(element)} left out of {_text(node)}", made)


def _of_match(node: ast.Match) -> Iterator[Change]:
    for place, case in enumerate(node.cases):
        if isinstance(case.pattern, ast.MatchAs) and case.pattern.pattern is None:
            continue  # the last resort
        fewer = _copy(node)
        del fewer.cases[place]
        yield Change("case", f"case {_text(case.pattern)} left out", fewer)
        if case.guard is not None:
            free = _copy(node)
            free.cases[place].guard = None
            yield Change("case", f"case {_text(case.pattern)} if {_text(case.guard)} -> always", free)


def _of_statement(node: ast.stmt, inside: ast.AST | None) -> Iterator[Change]:
    match node:
        case ast.Expr(value=ast.Call() | ast.Yield() | ast.YieldFrom() | ast.Await()):
            yield _gone(node)
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]) | ast.AugAssign() | ast.Delete():
            yield _gone(node)
        case ast.AnnAssign(target=ast.Attribute(), value=ast.expr()):
            yield _gone(node)
        case ast.Assign(targets=[ast.Name(id=name)]) if inside is not None and _is_known(name, node, inside):
            kept: ast.stmt = ast.Expr(value=node.value) if isinstance(node.value, ast.Call) else ast.Pass()
            yield Change("statement", f"{_text(node)} -> {name} as before", kept)
        case ast.Continue() | ast.Break() | ast.Raise():
            yield _gone(node)
        case ast.Return(value=None):
            yield _gone(node)
        case ast.For():
            made = _copy(node)
            made.iter = ast.Tuple(elts=[], ctx=ast.Load())
            yield Change("loop", f"for {_text(node.target)} in {_text(node.iter)} -> never", made)
        case _:
            pass


def _is_known(name: str, node: ast.stmt, inside: ast.AST) -> bool:
    """Whether `name` had a value before this assignment: then the function runs without it, too."""
    if not isinstance(inside, _FUNCTIONS):
        return False
    arguments = inside.args
    given = {each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    before = {
        each.id
        for each in ast.walk(inside)
        if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store) and each.lineno < node.lineno
    }
    return name in given | before


# -- small words ------------------------------------------------------------------------------------------------------


def _swap(operator: str, node: ast.AST, made: ast.AST) -> Change:
    return Change(operator, f"{_text(node)} -> {_text(made)}", made)


def _gone(node: ast.stmt) -> Change:
    return Change("statement", f"{_text(node)} left out", ast.Pass())


def _text(node: ast.AST) -> str:
    """The node in one line."""
    return " ".join(ast.unparse(ast.fix_missing_locations(_copy(node))).split())


def _copy(node: Node) -> Node:
    return copy.deepcopy(node)


def _not(node: ast.expr) -> ast.expr:
    return ast.UnaryOp(op=ast.Not(), operand=node)


def _returns_bool(inside: ast.AST | None) -> bool:
    return isinstance(inside, _FUNCTIONS) and isinstance(inside.returns, ast.Name) and inside.returns.id == "bool"
