"""Types of commands and responses as JSON Schema.

msgspec makes the schemas, from twins of the types that show what it cannot see: which fields a response always has,
and default payloads.
"""

from __future__ import annotations

import types
from functools import reduce
from operator import or_
from typing import Annotated, Any, Final, Union, get_args, get_origin

import msgspec
from msgspec import NODEFAULT, UNSET, Meta, Raw, Struct
from msgspec.structs import FieldInfo

REFS: Final = "#/components"


class Schemas:
    """Gathers what the calls of one document share. `components` are its components by section and name."""

    def __init__(self) -> None:
        self.components: dict[str, dict[str, Any]] = {"schemas": {}}
        self._twins: dict[tuple[type[Struct], str | None], type[Struct]] = {}

    def asked(self, command: type[Struct], given: str | None = None) -> dict[str, Any]:
        """What a body or a query may have. `given` is the field that the path gives instead."""
        return self._made(self._twin(command, given))

    def answered(self, shape: type[Struct]) -> dict[str, Any]:
        """What an answer has: whatever is not left unset is always there, defaults too."""
        return self._made(self._twin(shape, None))

    def shown(self, reference: dict[str, Any]) -> dict[str, Any]:
        """The schema behind a reference."""
        shown: dict[str, Any] = self.components["schemas"][reference["$ref"].rpartition("/")[2]]
        return shown

    def shared(self, section: str, name: str, value: dict[str, Any]) -> dict[str, Any]:
        """A reference to `value`, which is kept once under this name."""
        known = self.components.setdefault(section, {}).setdefault(name, value)
        assert known == value, f"two {section} are called {name}"
        return {"$ref": f"{REFS}/{section}/{name}"}

    def _made(self, twin: type[Struct]) -> dict[str, Any]:
        [reference], components = msgspec.json.schema_components([twin], ref_template=f"{REFS}/schemas/{{name}}")
        for name, schema in components.items():
            self.shared("schemas", name, schema)
        return reference

    def _twin(self, struct: type[Struct], given: str | None) -> type[Struct]:
        if (struct, given) not in self._twins:
            fields = [
                (info.name, self._described(info), self._default(struct, info))
                for info in msgspec.structs.fields(struct)
                if info.name != given
            ]
            config = struct.__struct_config__
            twin = msgspec.defstruct(
                struct.__name__,
                fields,
                rename={info.name: info.encode_name for info in msgspec.structs.fields(struct)},
                kw_only=True,
                forbid_unknown_fields=config.forbid_unknown_fields,
                module=struct.__module__,
                namespace={"__doc__": struct.__dict__.get("__doc__")},
            )
            self._twins[struct, given] = twin
        return self._twins[struct, given]

    def _described(self, info: FieldInfo) -> Any:
        """The type of a field, with its words, and with twins in the place of what it is made of."""
        more: dict[str, Any] = {"description": description_of(info.type)}
        if type(info.default) is Raw:  # msgspec cannot write this default down by itself
            more["default"] = msgspec.json.decode(info.default)
        return Annotated[self._translated(info.type), Meta(extra_json_schema=more)]

    def _default(self, struct: type[Struct], info: FieldInfo) -> Any:
        if not struct.__struct_config__.forbid_unknown_fields:  # an answer
            return msgspec.field(default=UNSET if info.default is UNSET else NODEFAULT)
        if type(info.default) is Raw:
            default = info.default
            return msgspec.field(default_factory=lambda: default)
        if info.default_factory is not NODEFAULT:
            return msgspec.field(default_factory=info.default_factory)
        return msgspec.field(default=info.default)

    def _translated(self, annotation: Any) -> Any:
        """`annotation` with every struct in it replaced by its twin."""
        if isinstance(annotation, type) and issubclass(annotation, Struct):
            return self._twin(annotation, None)
        origin, parts = get_origin(annotation), get_args(annotation)
        if origin is Annotated:
            return Annotated[(self._translated(parts[0]), *map(_without_description, parts[1:]))]
        if origin in (Union, types.UnionType):
            return reduce(or_, (self._translated(part) for part in parts))
        return list[self._translated(parts[0])] if origin is list else annotation  # type: ignore[misc]


def description_of(annotation: Any) -> str:
    """Return the description of a type, the outermost one; an empty text if it has none."""
    parts = get_args(annotation)
    own = [part.description for part in parts if isinstance(part, Meta) and part.description is not None]
    if own:
        return str(own[-1])
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        return next(filter(None, map(description_of, parts)), "")
    return ""


def _without_description(part: Any) -> Any:
    """Return a Meta without its description, which stands beside the field."""
    if not isinstance(part, Meta) or part.description is None:
        return part
    bounds = ("gt", "ge", "lt", "le", "multiple_of", "pattern", "min_length", "max_length")
    return Meta(**{name: value for name in bounds if (value := getattr(part, name)) is not None})


def not_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a parameter: what may be null in JSON is left out of a query."""
    choices = [choice for choice in schema.get("anyOf", [schema]) if choice != {"type": "null"}]
    rest = {name: value for name, value in schema.items() if name != "anyOf" and (name, value) != ("default", None)}
    return {**choices[0], **rest} if len(choices) == 1 else rest
