"""Large bodies are looked over before they are read: a third of a million empty jobs fit into one, and take long.

The decoder reads a list to its end before it looks at its length, and a field each time that it is said. Here a list
is left at its last place and values are passed over unread. What is wrong besides is for bodies.py to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, get_args, get_origin

import msgspec
from msgspec import Raw, Struct

BIG_BODY: Final = 64 << 10  # bytes; smaller ones are read at once
MANY_KEYS: Final = 25_000  # a body with fewer fields, in it or in its payloads, is read in a few milliseconds
FAIR_FIELD: Final = 64 << 10  # bytes that a field may take which is no payload
FAIR_NAME: Final = 60  # bytes for its name and the blanks around it

_FAULTS: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)  # a ValidationError is one too


class TooLong(Exception):
    """The list `name` has more than `most` places."""

    def __init__(self, name: str, most: int) -> None:
        super().__init__(name)
        self.name = name
        self.most = most


class TooMuch(Exception):
    """The body is mostly blanks or fields that are said again and again."""


class Scale:
    """Looks over bodies of the type `part`. `lists` says how long each of its lists may be."""

    def __init__(self, part: type[Any], lists: Mapping[str, int]) -> None:
        self._ends = [(name, most, _decoder({name: _ended(most)})) for name, most in lists.items()]
        self._unread = msgspec.json.Decoder(_unread(part))

    def check(self, body: bytes) -> None:
        """Raises TooLong or TooMuch."""
        if len(body) <= BIG_BODY:
            return
        for name, most, decoder in self._ends:
            try:
                decoder.decode(body)
            except msgspec.ValidationError as fault:
                if str(fault).endswith(f"`$.{name}[{most}]`"):
                    raise TooLong(name, most) from None
            except _FAULTS:
                continue
        if body.count(b'":') > MANY_KEYS:
            try:
                seen = self._unread.decode(body)
            except _FAULTS:
                return
            if len(body) - _fair(seen) > BIG_BODY:
                raise TooMuch


def _decoder(fields: Mapping[str, Any]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(
        msgspec.defstruct("Looked", [(name, of, msgspec.field(default=None)) for name, of in fields.items()])
    )


def _ended(most: int) -> Any:
    """A list of up to `most` unread places: one more is of a type that nothing is."""
    return tuple[(*[Raw] * most, Annotated[int, msgspec.Meta(gt=0, lt=0)])]  # type: ignore[misc]


def _unread(part: type[Any]) -> type[Struct]:
    """`part` with its values passed over; of a list of structs the values in those."""
    fields: list[Any] = []
    for info in msgspec.structs.fields(part):
        inner = _listed(info.type)
        of: Any = Raw if inner is None else list[_unread(inner)]  # type: ignore[misc]
        fields.append((info.name, of, msgspec.field(default=None, name=info.encode_name)))
    payloads = frozenset(info.name for info in msgspec.structs.fields(part) if info.type is Raw)
    return msgspec.defstruct("Unread", fields, namespace={"payloads": payloads})


def _listed(annotation: Any) -> type[Struct] | None:
    """The struct of which this is a list."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    inner = get_args(annotation)[0] if get_origin(annotation) is list else None
    return inner if isinstance(inner, type) and issubclass(inner, Struct) else None


def _fair(seen: Any) -> int:
    """How many bytes a body may take that says these fields once each."""
    total = 0
    for name in seen.__struct_fields__:
        value = getattr(seen, name)
        if isinstance(value, Raw):
            size = memoryview(value).nbytes
            total += FAIR_NAME + (size if name in seen.payloads else min(size, FAIR_FIELD))
        elif value is not None:
            total += FAIR_NAME + sum(FAIR_NAME + _fair(each) for each in value)
    return total
