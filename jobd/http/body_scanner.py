"""Scan bodies before they are decoded, and values for their depth.

msgspec checks the length of a list only after decoding all of it, and decodes every repetition of a field. A body of
1 MB with 300,000 empty jobs would block the event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from itertools import accumulate
from operator import add
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Union, get_args, get_origin

import msgspec
from msgspec import Raw, Struct
from msgspec.structs import FieldInfo

from jobd.model.fields import MAX_NESTING

BIG_BODY: Final = 64 << 10  # bytes; smaller bodies are not scanned
MANY_KEYS: Final = 25_000  # a body with fewer fields, including those of payloads, is decoded in a few milliseconds
MAX_COUNTED_FIELD: Final = 64 << 10  # bytes that are counted of a field other than a payload
NAME_ALLOWANCE: Final = 60  # bytes for the name of a field and the blanks around it
_FAULTS: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)  # a ValidationError is one too
_MANY: Final = MAX_NESTING + 1
_BITS: Final = bytes.maketrans(b"[{]}", b"1100")
_NO_BRACKETS: Final = bytes(set(range(256)) - set(b'[]{}"'))

# The fields of a struct. msgspec evaluates all annotations of the struct at each call.
fields_of: Callable[[type[Any]], tuple[FieldInfo, ...]] = cache(msgspec.structs.fields)  # type: ignore[assignment]


class ListTooLong(Exception):
    """The list `name` has more than `limit` items."""

    def __init__(self, name: str, limit: int) -> None:
        super().__init__(name)
        self.name = name
        self.limit = limit


class BodyTooComplex(Exception):
    """The body consists mostly of blanks or repeated fields."""


class BodyScanner:
    """Scan bodies of a type without decoding their values. `lists` has the maximum length of each list."""

    def __init__(self, part: type[Any], lists: Mapping[str, int]) -> None:
        self._list_decoders = [(name, limit, _decoder({name: _bounded_list(limit)})) for name, limit in lists.items()]
        self._skipping_decoder = msgspec.json.Decoder(_skipping_type(part))

    def check(self, body: bytes) -> None:
        """Raises ListTooLong or BodyTooComplex."""
        for name, limit, decoder in self._list_decoders:
            try:
                decoder.decode(body)
            except msgspec.ValidationError as error:
                if str(error).endswith(f"`$.{name}[{limit}]`"):
                    raise ListTooLong(name, limit) from None
            except _FAULTS:
                continue
        if body.count(b'":') > MANY_KEYS:
            try:
                decoded = self._skipping_decoder.decode(body)
            except _FAULTS:
                return
            if len(body) - _expected_size(decoded) > BIG_BODY:
                raise BodyTooComplex


def _decoder(fields: Mapping[str, Any]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(
        msgspec.defstruct("Scanned", [(name, of, msgspec.field(default=None)) for name, of in fields.items()])
    )


def _bounded_list(limit: int) -> Any:
    """Make a type for a list of at most `limit` raw items. The type of the next item accepts no value."""
    return tuple[(*[Raw] * limit, Annotated[int, msgspec.Meta(gt=0, lt=0)])]  # type: ignore[misc]


def _skipping_type(part: type[Any]) -> type[Struct]:
    """Make a variant of `part` whose values stay raw, including those in lists of structs."""
    fields: list[Any] = []
    for info in fields_of(part):
        inner = item_struct(info.type)
        of: Any = Raw if inner is None else list[_skipping_type(inner)]  # type: ignore[misc]
        fields.append((info.name, of, msgspec.field(default=None, name=info.encode_name)))
    payloads = frozenset(info.name for info in fields_of(part) if without_metadata(info.type) is Raw)
    return msgspec.defstruct("Unread", fields, namespace={"payloads": payloads})


def _expected_size(part: Any) -> int:
    total = 0
    for name in part.__struct_fields__:
        value = getattr(part, name)
        if isinstance(value, Raw):
            size = len(value)
            total += NAME_ALLOWANCE + (size if name in part.payloads else min(size, MAX_COUNTED_FIELD))
        elif value is not None:
            total += NAME_ALLOWANCE + sum(NAME_ALLOWANCE + _expected_size(each) for each in value)
    return total


# Of eight brackets, which are the bits of an octet, 1 for an opening one: how the depth changes, and its maximum.
_CHANGES: Final = bytes((2 * bits.bit_count() - 8) % 256 for bits in range(256))
_MAXIMA: Final = bytes(max(0, *accumulate(bits >> at & 1 or -1 for at in range(7, -1, -1))) for bits in range(256))


def has_many_brackets(text: bytes) -> bool:
    """Return whether `text` has more than MAX_NESTING opening brackets. Does so faster than `count`."""
    return len(text) - len(text.replace(b"[", b"", _MANY).replace(b"{", b"", _MANY)) > MAX_NESTING


def excess_depth(value: bytes) -> int:
    """Return how deep arrays and objects are nested in `value`, which is valid JSON; 0 if at most MAX_NESTING.

    1 MB of brackets takes a few milliseconds.
    """
    if not has_many_brackets(value):
        return 0
    if b"\\" in value:
        value = value.replace(b"\\\\", b"").replace(b'\\"', b"")
    # Between quotes are strings. Two quotes in a row are an empty one, or the end of one and the beginning of the next.
    bits = b"".join(value.translate(_BITS, _NO_BRACKETS).replace(b'""', b"").split(b'"')[::2])
    size = len(bits) // 8 + 1
    octets = int(bits.ljust(8 * size, b"0"), 2).to_bytes(size)
    depths = accumulate(memoryview(octets.translate(_CHANGES)).cast("b"), initial=0)
    depth: int = max(map(add, depths, octets.translate(_MAXIMA)))
    return depth if depth > MAX_NESTING else 0


def without_metadata(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def without_none(annotation: Any) -> Any:
    """Return the type of an optional value."""
    parts = [part for part in get_args(annotation) if part is not NoneType]
    return parts[0] if get_origin(annotation) in (Union, UnionType) and len(parts) == 1 else annotation


def item_struct(annotation: Any) -> type[Struct] | None:
    """Return the type of the items of a list of structs, None for other types."""
    annotation = without_metadata(annotation)
    inner = get_args(annotation)[0] if get_origin(annotation) is list else None
    return inner if isinstance(inner, type) and issubclass(inner, Struct) else None
