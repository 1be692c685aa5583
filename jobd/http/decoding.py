"""Decode bodies and queries into commands, and describe their errors in plain words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from operator import attrgetter
from typing import Any, Final, Literal, get_args, get_origin
from urllib.parse import parse_qsl

import msgspec
from msgspec import NODEFAULT, UNSET, Raw, Struct, UnsetType
from msgspec.structs import FieldInfo

from jobd.http.body_scanner import (
    BIG_BODY,
    BodyScanner,
    BodyTooComplex,
    ListTooLong,
    excess_depth,
    fields_of,
    has_many_brackets,
    item_struct,
    without_metadata,
    without_none,
)
from jobd.model.commands import Bulk, Command, Create
from jobd.model.errors import ApiException, api_error, invalid_request_error, too_large_error
from jobd.model.fields import MAX_NESTING
from jobd.model.job import EARLIEST_MS, is_job_id, storage_key_error

FLAT_BYTES: Final = 2 * MAX_NESTING  # shorter JSON cannot be nested deeper
MAX_QUERY_FIELDS: Final = 50
MAX_FORM_FIELDS: Final = 300  # a page of jobs with all of them selected
MAX_FORM_BYTES: Final = 128 << 10  # anyone can send a form, and its escapes take long to decode
MAX_SHOWN_CHARS: Final = 80  # of an unknown field name in an error message

_PATH = re.compile(r"\$[^ `]{0,200}`")
_ABOUT_FIELD = re.compile(r"Object (contains unknown|missing required) field `")
_STEP = re.compile(r"\.([A-Za-z_]+)|\[[^]]*\]")
_QUOTED = re.compile(r"`([a-z |]+)`")
_TYPES: Final = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "a JSON object",
}


class Limits(Struct, frozen=True):
    """Limits of a request. Sizes are in bytes, times in seconds."""

    body: int = 1 << 20
    payload: int = 256 << 10
    bulk: int = 1000
    body_deadline_s: float = 10.0  # for a body, and for each line of a stream
    idle_s: float = 75.0


class RequestDecoder:
    """Decode one type of command from a body, a query or a form. Built once per route.

    `path_field` is the field that the path sets ("id", "name"), if any. `body_type` replaces the type that a body is
    decoded as: by default the command with an optional `path_field`.
    """

    def __init__(
        self, command: type[Command], path_field: str | None, limits: Limits, *, body_type: type[Any] | None = None
    ) -> None:
        self.command = command
        self.path_field = path_field
        self.limits = limits
        self.body_type = body_type or (command if path_field is None else make_body_type(command, path_field))
        self._list_fields = frozenset(info.encode_name for info in fields_of(command) if get_origin(info.type) is list)
        self._text_fields = frozenset(info.encode_name for info in fields_of(command) if _takes_text(info.type))
        [path_type] = [info.type for info in fields_of(command) if info.name == path_field] or [str]
        self.path_value_words = _pattern_words(path_type)
        # msgspec prepares a struct once, and any other type for each conversion.
        self._path_struct = msgspec.defstruct("PathValue", [("value", path_type)])
        self._checks = _field_checks(command, _check_storage_key)
        if command is Bulk:
            self._checks["jobs"] = _check_bulk
        self._value_checks = _field_checks(command, _check_value)
        # No value of a body up to this size is over a limit.
        self._unchecked_bytes = min(limits.payload, FLAT_BYTES) if self._value_checks else limits.body
        self._decode = msgspec.json.Decoder(self.body_type).decode
        self._make_command = None if self.body_type is command else _command_maker(command, path_field)
        self._scanner = BodyScanner(self.body_type, _list_limits(command, limits))

    def accepts(self, value: str) -> bool:
        """Return whether `value` is valid for `path_field`."""
        try:
            msgspec.convert({"value": value}, self._path_struct)
        except msgspec.ValidationError:
            return False
        return True

    def from_body(self, body: bytes, value: str | None = None) -> Command:
        """Decode a body. An empty body is `{}`. `value` is that of `path_field`."""
        size = len(body)
        try:
            if not body.isascii():
                body.decode()  # the decoder does not check that raw values are UTF-8
            if size > BIG_BODY:
                self._scanner.check(body)
            part = self._decode(body or b"{}")
        except ListTooLong as error:
            raise _too_many(error.name, error.limit) from None
        except BodyTooComplex:
            raise invalid_request_error(
                "$", "consists mostly of blanks or repeated fields. Send each field once."
            ) from None
        except msgspec.ValidationError as error:
            raise validation_error(str(error), self.body_type) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise malformed_json_error(error, body) from None
        command = part if self._make_command is None else self._build(part, value)
        if self._checks:
            _check_fields(self._checks, command, (), self.limits)
        if size > self._unchecked_bytes and (size > self.limits.payload or has_many_brackets(body)):
            _check_fields(self._value_checks, command, (), self.limits)
        return command

    def from_query(self, query: str, value: str | None = None) -> Command:
        """Decode a query: each parameter is a field. Unknown and repeated parameters are errors."""
        fields: dict[str, Any] = _parse_parameters(query) if query else {}
        return self._build(self._convert(fields), value)

    def from_form(self, body: bytes, value: str | None = None) -> Command:
        """Decode a form like a query, except that list fields may be repeated."""
        if len(body) > MAX_FORM_BYTES:
            raise too_large_error(f"The form is over {MAX_FORM_BYTES} bytes. Shorten it.", limit=MAX_FORM_BYTES)
        fields = _parse_parameters(body.decode("latin-1"), self._list_fields, MAX_FORM_FIELDS)
        return self._build(self._convert(fields), value)

    def _convert(self, fields: dict[str, Any]) -> Any:
        for name, value in fields.items():
            # msgspec would convert the text "null" to None.
            if name not in self._text_fields and isinstance(value, str) and value.lower() == "null":
                raise invalid_request_error(f"$.{name}", "must not be null. Omit it.")
        try:
            return msgspec.convert(fields, self.body_type, strict=False) if fields else self._decode(b"{}")
        except msgspec.ValidationError as error:
            raise validation_error(str(error), self.body_type) from None

    def _build(self, part: Any, value: str | None) -> Command:
        if self._make_command is None:
            command: Command = part
            return command
        if self.path_field is not None:
            body_value = getattr(part, self.path_field)
            if body_value is not UNSET and body_value != value:
                raise invalid_request_error(
                    f"$.{self.path_field}", "differs from the one in the path. Omit it in the body."
                )
        return self._make_command(part, value)


def _command_maker(command: type[Command], path_field: str | None) -> Callable[[Any, str | None], Command]:
    """Compile the function that makes a command from a decoded body and the value of `path_field`.

    Copying the fields through a dict would take several times as long.
    """
    fields = [f"{name}={'value' if name == path_field else f'part.{name}'}" for name in command.__struct_fields__]
    maker: Callable[[Any, str | None], Command] = eval(
        f"lambda part, value: command({', '.join(fields)})", {"command": command}
    )
    return maker


@cache
def make_decoder(command: type[Command], path_field: str | None, limits: Limits) -> RequestDecoder:
    """Return the decoder of the routes with these arguments. Making one takes a millisecond."""
    return RequestDecoder(command, path_field, limits)


def make_body_type(
    command: type[Command], path_field: str | None, *, extra_fields: Sequence[Any] = (), suffix: str = "Body"
) -> type[Any]:
    """Make a variant of `command` in which `path_field` is optional.

    `extra_fields` come first, in the form that defstruct takes. The name of the type ends in `suffix`.
    """
    fields: list[Any] = list(extra_fields)
    for info in fields_of(command):
        if info.name == path_field:
            fields.append((path_field, str | UnsetType, UNSET))
        elif info.default_factory is not NODEFAULT:
            fields.append((info.name, info.type, msgspec.field(default_factory=info.default_factory)))
        else:
            fields.append((info.name, info.type, msgspec.field(default=info.default)))
    names = {info.name: info.encode_name for info in fields_of(command) if info.name != info.encode_name}
    return msgspec.defstruct(
        f"{command.__name__}{suffix}",
        fields,
        rename=names or None,
        frozen=True,
        kw_only=True,
        forbid_unknown_fields=True,
        module=__name__,
    )


def _takes_text(kind: Any) -> bool:
    """Return whether `kind` accepts any text, and not only certain words such as a status."""
    return kind is str or (get_origin(kind) is not Literal and any(map(_takes_text, get_args(kind))))


def path_value(decoder: RequestDecoder, value: str) -> str:
    """Check the percent-decoded id or name in the path. Raises a 400 error."""
    if not is_job_id(value) and not decoder.accepts(value):
        raise invalid_request_error(
            f"$.{decoder.path_field}", f"the path must contain {decoder.path_value_words} here."
        )
    return value


def _parse_parameters(
    query: str, lists: frozenset[str] = frozenset(), max_fields: int = MAX_QUERY_FIELDS
) -> dict[str, Any]:
    """Parse names and values. Only the names in `lists` may be repeated."""
    try:
        pairs = parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=max_fields)
    except ValueError:
        message = f"The query is malformed: expected up to {max_fields} name=value pairs in percent-encoded UTF-8."
        raise api_error("invalid_request", message, field="$") from None
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in lists:
            fields.setdefault(name, []).append(value)
        elif name in fields:
            raise invalid_request_error(f"$.{_printable(name)}", "is given more than once. Send it once.")
        else:
            fields[name] = value
    return fields


# ---------------------------------------------------------------------------------------------------------------------
# Checks beyond types.


# Checks a value. Arguments: the value, the names and indexes of its path, the limits.
FieldCheck = Callable[[Any, tuple[str | int, ...], Limits], None]


def _field_checks(struct: type[Struct], check: FieldCheck) -> dict[str, FieldCheck]:
    """Return `check` for each field that it concerns: JSON values have limits, storage keys are relative."""
    checks: dict[str, FieldCheck] = {}
    for info in fields_of(struct):
        item = item_struct(info.type)
        inner = item or _first(info.type, lambda part: issubclass(part, Struct))
        if (check is _check_storage_key and info.name == "storage_key") or (
            check is _check_value and Raw in _parts(info.type)
        ):
            checks[info.name] = check
        elif inner is not None and (inner_checks := _field_checks(inner, check)):
            checks[info.name] = partial(_check_fields if item is None else _check_items, inner_checks)
    return checks


def _check_fields(checks: dict[str, FieldCheck], struct: Any, path: tuple[str | int, ...], limits: Limits) -> None:
    for name, check in checks.items():
        if (value := getattr(struct, name)) is not None:
            check(value, (*path, name), limits)


def _check_items(checks: dict[str, FieldCheck], items: list[Any], path: tuple[str | int, ...], limits: Limits) -> None:
    for name, check in checks.items():
        for at, value in enumerate(map(attrgetter(name), items)):
            if value is not None:
                check(value, (*path, at, name), limits)


def _check_value(value: Raw | UnsetType, path: tuple[str | int, ...], limits: Limits) -> None:
    if value is UNSET:
        return
    size = len(value)
    if size > limits.payload:
        field = _path_text(path)
        message = f"`{field}` has {size} bytes, the limit is {limits.payload}. Store the data elsewhere and put a "
        message += f"reference into the {path[-1]}."
        raise too_large_error(message, field=field, limit=limits.payload)
    if size > FLAT_BYTES and (depth := excess_depth(bytes(value))):
        message = f"is nested {depth} levels deep, the limit is {MAX_NESTING}. Flatten it, or send it as text."
        raise invalid_request_error(_path_text(path), message)


def _check_bulk(jobs: list[Create], path: tuple[str | int, ...], limits: Limits) -> None:
    if len(jobs) > limits.bulk:
        raise _too_many("jobs", limits.bulk)


def _check_storage_key(key: str, path: tuple[str | int, ...], limits: Limits) -> None:
    error = storage_key_error(key)
    if error is not None:
        raise invalid_request_error(_path_text(path), f"{error}.")


def _path_text(path: tuple[str | int, ...]) -> str:
    return "$" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)


def _too_many(name: str, limit: int) -> ApiException:
    if name == "jobs":
        return too_large_error(f"The bulk has over {limit} jobs. Split it.", field="$.jobs", limit=limit)
    return invalid_request_error(f"$.{name}", f"expected a list of length <= {limit}.")


def _list_limits(command: type[Command], limits: Limits) -> dict[str, int]:
    if command is Bulk:
        return {"jobs": limits.bulk}
    return {
        info.name: part.max_length
        for info in fields_of(command)
        if get_origin(without_metadata(without_none(info.type))) is list
        for part in get_args(without_none(info.type))
        if isinstance(part, msgspec.Meta) and part.max_length is not None
    }


# ---------------------------------------------------------------------------------------------------------------------
# Error messages.


# A high surrogate without a low one, at the end of a string. The decoder calls such a body truncated.
_LONE_SURROGATE: Final = re.compile(rb"(?<!\\)(?:\\\\)*\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u)")


def malformed_json_error(error: Exception, body: bytes) -> ApiException:
    """Return a 400 error for malformed JSON: the decoder's message and position, but no text of the body."""
    if isinstance(error, RecursionError):
        message = f"The body is nested too deeply: a JSON value may have at most {MAX_NESTING} levels."
        return api_error("invalid_request", message, field="$")
    if isinstance(error, UnicodeDecodeError):
        why = f"it is not UTF-8 (byte {error.start})"
    else:
        why = str(error).removeprefix("JSON is malformed: ").removeprefix("Input data was ") or "not readable"
        if "surrogate" in why or (why == "truncated" and _LONE_SURROGATE.search(body)):
            why = "a string contains a lone surrogate (one of \\ud800 to \\udfff without its pair)"
    return api_error("invalid_request", f"The body is not valid JSON: {why}. Send one JSON object in UTF-8.", field="$")


def validation_error(error: str, body_type: type[Any]) -> ApiException:
    """Return a 400 error for JSON of the wrong type: the path of the field, what is expected, and what to do."""
    text, path = _split_path(error)
    about = _about_field(text)
    if about is None and (about := _about_field(error)) is not None:
        path = "$"  # the text that looked like a path is a part of the name
    if about is not None:
        how, name = about[0], _printable(about[1])
        return invalid_request_error(f"{path}.{name}", _field_error(how, name, _struct_at(body_type, path)))
    return invalid_request_error(path, _value_error(text, _field_at(body_type, path)))


def _split_path(error: str) -> tuple[str, str]:
    """Split a message of msgspec into the error and the path. The path may contain names that the caller chose."""
    text, mark, path = error.rpartition(" - at `")
    return (text, path[:-1]) if mark and _PATH.fullmatch(path) else (error, "$")


def _about_field(text: str) -> tuple[str, str] | None:
    """Return the error and the name of the field, if the message is about one. The name may be very long."""
    match = _ABOUT_FIELD.match(text)
    if match is None or not text.endswith("`", match.end()):
        return None
    return match[1], text[match.end() : -1]


def _field_error(how: str, name: str, struct: type[Any] | None) -> str:
    fields = () if struct is None else fields_of(struct)
    if how == "missing required":
        return "is missing. Add it."
    names = sorted(info.encode_name for info in fields)
    similar = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean `{similar[0]}`?" if similar else ""
    known = f" Known fields: {', '.join(names)}." if names else " The object has no fields."
    return f"is not a field of this request.{hint}{known}"


def _value_error(text: str, field: FieldInfo | None) -> str:
    if text == f"Expected `int` >= {EARLIEST_MS}":
        return "must be Unix time in milliseconds. The value looks like seconds: multiply it by 1000."
    if text.startswith("Invalid enum value") and field is not None:
        return f"must be one of {', '.join(_choices(field.type))}."
    if "matching regex" in text and field is not None:
        words = _pattern_words(field.type)
        return f"must be {words}."
    text = _QUOTED.sub(
        lambda quoted: " or ".join(_TYPES.get(name, name) for name in quoted[1].split(" | ")), text[:300]
    )
    return f"{text[:1].lower()}{text[1:].removesuffix('.0')}."


def _printable(name: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in name[:MAX_SHOWN_CHARS])


def _struct_at(body_type: type[Any], path: str) -> type[Any] | None:
    """Return the struct type at a path such as `$.jobs[3].backoff`, None if there is none."""
    struct: type[Any] | None = body_type
    for step in _STEP.finditer(path):
        if step[1] is None or struct is None:
            continue
        info = next((info for info in fields_of(struct) if info.encode_name == step[1]), None)
        struct = None if info is None else _first(info.type, lambda part: issubclass(part, Struct))
    return struct


def _field_at(body_type: type[Any], path: str) -> FieldInfo | None:
    """Return the declaration of the field at a path such as `$.jobs[3].priority`."""
    parent, _, name = path.rpartition(".")
    struct = _struct_at(body_type, parent or "$")
    name = name.partition("[")[0]
    fields = () if struct is None else fields_of(struct)
    return next((info for info in fields if info.encode_name == name), None)


def _parts(annotation: Any) -> list[Any]:
    return [annotation, *(deep for part in get_args(annotation) for deep in _parts(part))]


def _first(annotation: Any, predicate: Any) -> Any:
    return next((part for part in _parts(annotation) if isinstance(part, type) and predicate(part)), None)


def _choices(annotation: Any) -> list[str]:
    """Return the allowed words except the empty one, which forms may send."""
    literals = [part for part in _parts(annotation) if get_origin(part) is Literal]
    return [str(choice) for literal in literals for choice in get_args(literal) if choice != ""]


def _pattern_words(annotation: Any) -> str:
    """Return the words that the type declares for its pattern (see model/fields.py)."""
    extras = [part.extra for part in _parts(annotation) if isinstance(part, msgspec.Meta) and part.extra]
    return str(extras[0]["expected"]) if extras else "other text"
