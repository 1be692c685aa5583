"""The flat form of a job: the fields of its options, result and error stand beside its own.

Views, imports and rows have this form. It follows from job.py, so a field is declared there only. The functions that
convert jobs are compiled when their module is imported: copying fields by name takes six times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeVar

import msgspec
from msgspec import Struct
from msgspec.structs import FieldInfo

from jobd.model.job import Failure, Job, Options, Result

T = TypeVar("T", bound=Struct)
NO_RESULT: Final = Result()
NO_ERROR: Final = Failure(None)
PARTS: Final = "job, options, result, error"  # parameters of compiled functions: a job, or NO_RESULT and NO_ERROR

_STRUCTS: Final[dict[str, type[Struct]]] = {"options": Options, "result": Result, "error": Failure}


def _flat() -> dict[str, tuple[str, FieldInfo]]:
    fields = {}
    for own in msgspec.structs.fields(Job):
        if own.name in _STRUCTS:
            prefix = "error_" if own.name == "error" else ""
            for info in msgspec.structs.fields(_STRUCTS[own.name]):
                fields[f"{prefix}{info.name}"] = f"{own.name}.{info.name}", info
        else:
            fields[own.name] = f"job.{own.name}", own
    return fields


FIELDS: Final = {name: info for name, (_, info) in _flat().items()}  # name -> declaration
CODE: Final = {name: code for name, (code, _) in _flat().items()}  # name -> code that reads the field from PARTS


def maker(
    target: type[T], parameters: str, code: Mapping[str, str] = CODE, *, by_name: bool = False
) -> Callable[..., T]:
    """Compile a function that makes a `target`. Each field is a parameter of that name, or read by its `code`.

    The last fields of `target` can be neither: they keep their default.
    """
    sources = {**code, **{name: name for name in parameters.split(", ")}}
    values = {name: sources[name] for name in target.__struct_fields__ if name in sources}
    arguments = ", ".join(f"{name}={value}" if by_name else value for name, value in values.items())
    made: Callable[..., T] = eval(f"lambda {parameters}: target({arguments})", {"target": target})
    return made
