"""Types of commands and responses as JSON Schema.

msgspec makes the schemas from variants of the types (twins), which add what the types do not declare: that a response
always has certain fields, and default payloads.
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
    """The schemas of one document. `components` are its components by section and name."""

    def __init__(self) -> None:
        self.components: dict[str, dict[str, Any]] = {"schemas": {}}
        self._twins: dict[tuple[type[Struct], str | None], type[Struct]] = {}

    def of_request(self, command: type[Struct], path_field: str | None = None) -> dict[str, Any]:
        """Return the schema of a body or query, without the field in the path."""
        return self._add(self._twin(command, path_field))

    def of_response(self, response: type[Struct]) -> dict[str, Any]:
        """Return the schema of a response. Fields that cannot be unset are required, even those with a default."""
        return self._add(self._twin(response, None))

    def resolve(self, reference: dict[str, Any]) -> dict[str, Any]:
        """Return the schema behind a reference."""
        schema: dict[str, Any] = self.components["schemas"][reference["$ref"].rpartition("/")[2]]
        return schema

    def share(self, section: str, name: str, value: dict[str, Any]) -> dict[str, Any]:
        """Add `value` as a component, once, and return a reference to it."""
        known = self.components.setdefault(section, {}).setdefault(name, value)
        assert known == value, f"two {section} are called {name}"
        return {"$ref": f"{REFS}/{section}/{name}"}

    def _add(self, twin: type[Struct]) -> dict[str, Any]:
        [reference], components = msgspec.json.schema_components([twin], ref_template=f"{REFS}/schemas/{{name}}")
        for name, schema in components.items():
            self.share("schemas", name, schema)
        return reference

    def _twin(self, struct: type[Struct], path_field: str | None) -> type[Struct]:
        if (struct, path_field) not in self._twins:
            fields = [
                (info.name, self._field_type(info), self._field_default(struct, info))
                for info in msgspec.structs.fields(struct)
                if info.name != path_field
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
            self._twins[struct, path_field] = twin
        return self._twins[struct, path_field]

    def _field_type(self, info: FieldInfo) -> Any:
        """Return the type of a field with its description, and with every struct in it replaced by its twin."""
        more: dict[str, Any] = {"description": description_of(info.type)}
        if type(info.default) is Raw:  # msgspec cannot encode this default
            more["default"] = msgspec.json.decode(info.default)
        return Annotated[self._translate(info.type), Meta(extra_json_schema=more)]

    def _field_default(self, struct: type[Struct], info: FieldInfo) -> Any:
        if not struct.__struct_config__.forbid_unknown_fields:  # a response
            return msgspec.field(default=UNSET if info.default is UNSET else NODEFAULT)
        if type(info.default) is Raw:
            default = info.default
            return msgspec.field(default_factory=lambda: default)
        if info.default_factory is not NODEFAULT:
            return msgspec.field(default_factory=info.default_factory)
        return msgspec.field(default=info.default)

    def _translate(self, annotation: Any) -> Any:
        """Return `annotation` with every struct in it replaced by its twin."""
        if isinstance(annotation, type) and issubclass(annotation, Struct):
            return self._twin(annotation, None)
        origin, parts = get_origin(annotation), get_args(annotation)
        if origin is Annotated:
            return Annotated[(self._translate(parts[0]), *map(_without_description, parts[1:]))]
        if origin in (Union, types.UnionType):
            return reduce(or_, (self._translate(part) for part in parts))
        return list[self._translate(parts[0])] if origin is list else annotation  # type: ignore[misc]


def description_of(annotation: Any) -> str:
    """Return the outermost description of a type, empty if it has none."""
    parts = get_args(annotation)
    descriptions = [part.description for part in parts if isinstance(part, Meta) and part.description is not None]
    if descriptions:
        return str(descriptions[-1])
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        return next(filter(None, map(description_of, parts)), "")
    return ""


def _without_description(part: Any) -> Any:
    """Return a Meta without its description, which is added to the field."""
    if not isinstance(part, Meta) or part.description is None:
        return part
    bounds = ("gt", "ge", "lt", "le", "multiple_of", "pattern", "min_length", "max_length")
    return Meta(**{name: value for name in bounds if (value := getattr(part, name)) is not None})


def not_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a query parameter, which cannot be null."""
    choices = [choice for choice in schema.get("anyOf", [schema]) if choice != {"type": "null"}]
    rest = {name: value for name, value in schema.items() if name != "anyOf" and (name, value) != ("default", None)}
    return {**choices[0], **rest} if len(choices) == 1 else rest
