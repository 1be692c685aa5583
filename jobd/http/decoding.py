"""Between JSON text and commands: decode, and say in plain words what is wrong with a body or a query.

Knows no connection and judges no job: what a job's state allows is in rules.py.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, get_args, get_origin
from urllib.parse import parse_qsl

import msgspec
from msgspec import NODEFAULT, UNSET, Raw, Struct, UnsetType
from msgspec.structs import FieldInfo, asdict

from jobd.model.commands import (
    MAX_NAMES,
    MAX_PLAN,
    BackupId,
    Bulk,
    Claim,
    Command,
    Complete,
    Create,
    Cursor,
    Fingerprint,
    Import,
    MakePlan,
    PlanCursor,
    RowCursor,
    Transition,
    Updates,
    WorkerCursor,
)
from jobd.model.errors import ApiException, api_error, invalid_request_error, too_large_error
from jobd.model.job import EARLIEST_MS, ID_PATTERN, FailureCode, Kind, Location, Worker, is_job_id, storage_key_error
from jobd.model.webhooks import WebhookName

MAX_QUERY_FIELDS: Final = 50
MAX_FORM_FIELDS: Final = 300  # a page of jobs, each of which is ticked
SHOWN_NAME: Final = 80  # characters of a caller's own field name that an answer repeats
BIG_BODY: Final = 64 << 10  # bytes; smaller ones are read at once
MANY_KEYS: Final = 25_000  # a body with fewer fields, in it or in its payloads, is read in a few milliseconds
MAX_COUNTED_FIELD: Final = 64 << 10  # bytes that a field may take which is no payload
NAME_ALLOWANCE: Final = 60  # bytes for its name and the blanks around it
_FAULTS: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)  # a ValidationError is one too

_WHERE = re.compile(r"\$[^ `]{0,200}`")
_ABOUT_FIELD = re.compile(r"(?s)Object (?P<how>contains unknown|missing required) field `(?P<name>.*)`")
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
_PATTERN_WORDS: Final[dict[str, tuple[Any, ...]]] = {
    "text without NUL characters": (Location,),
    "text without control characters": (Kind, Worker, FailureCode),
    "the `next_cursor` of the page before": (Cursor, WorkerCursor, RowCursor),
    "the `next_cursor` of the plan before": (PlanCursor,),
    "12 hexadecimal digits, as `jobctl failures` shows them": (Fingerprint,),
    "1 to 64 characters of A-Z a-z 0-9 . _ -": (BackupId,),
    "1 to 100 characters of A-Z a-z 0-9 . _ : -": (WebhookName,),
}
_PATTERNS: Final[dict[str, str]] = {
    ID_PATTERN: "1 to 200 characters of A-Z a-z 0-9 . _ : -",
    **{get_args(kind)[1].pattern: words for words, kinds in _PATTERN_WORDS.items() for kind in kinds},
}


class Limits(Struct, frozen=True):
    """What a request may cost. Sizes in bytes, times in seconds."""

    body: int = 1 << 20
    payload: int = 256 << 10
    bulk: int = 1000
    body_deadline_s: float = 10.0  # for a body, and for each line of a stream
    idle_s: float = 75.0


class RequestDecoder:
    """How one command is read, from a body or from a query. Built once for each route.

    `given` is the name of the field that the path gives ("id", "name"), None where the path gives nothing. `part` is
    what the body is read as, where that is neither the command nor the command without `given`.
    """

    def __init__(
        self, command: type[Command], path_field: str | None, limits: Limits, *, body_type: type[Any] | None = None
    ) -> None:
        self.command = command
        self.path_field = path_field
        self.limits = limits
        self.body_type = body_type or (command if path_field is None else make_body_type(command, path_field))
        self._lists = frozenset(
            info.encode_name for info in msgspec.structs.fields(command) if get_origin(info.type) is list
        )
        self._texts = frozenset(info.encode_name for info in msgspec.structs.fields(command) if _takes_text(info.type))
        [self._given] = [info.type for info in msgspec.structs.fields(command) if info.name == path_field] or [str]
        self.path_value_words = _pattern_words(self._given)
        self._check = _CHECKS.get(command)
        self._decode = msgspec.json.Decoder(self.body_type).decode
        self._scanner = BodyScanner(
            self.body_type, {name: most(limits) for name, most in _LISTS.get(command, {}).items()}
        )

    def accepts(self, value: str) -> bool:
        """Whether the field that the path gives takes `value`."""
        try:
            msgspec.convert(value, self._given)
        except msgspec.ValidationError:
            return False
        return True

    def from_body(self, body: bytes, value: str | None = None) -> Command:
        """The command that `body` (empty: every field has its default) and the path's `value` ask for."""
        try:
            if not body.isascii():
                body.decode()  # the decoder does not look into values that it keeps as they came
            if len(body) > BIG_BODY:
                self._scanner.check(body)
            part = self._decode(body or b"{}")
        except ListTooLong as fault:
            raise _too_many(fault.name, fault.limit) from None
        except BodyTooComplex:
            raise invalid_request_error(
                "$", "is mostly blanks or fields that are said again and again. Say each once."
            ) from None
        except msgspec.ValidationError as fault:
            raise validation_error(str(fault), self.body_type) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
            raise malformed_json_error(fault) from None
        command = self._build(part, value)
        if self._check is not None:
            self._check(command, self.limits)
        return command

    def from_query(self, query: str, value: str | None = None) -> Command:
        """The command of a GET: each parameter is a field, none may be unknown or come twice."""
        fields: dict[str, Any] = _parameters(query) if query else {}
        return self._build(self._converted(fields), value)

    def from_form(self, body: bytes, value: str | None = None) -> Command:
        """The command of a form of a page: as a query, but a field that is a list may come again and again."""
        fields = _parameters(body.decode("latin-1"), self._lists, MAX_FORM_FIELDS)
        return self._build(self._converted(fields), value)

    def _converted(self, fields: dict[str, Any]) -> Any:
        for name, value in fields.items():
            if (
                name not in self._texts and isinstance(value, str) and value.lower() == "null"
            ):  # msgspec: as good as none
                raise invalid_request_error(f"$.{name}", "null is no value here. Leave it out.")
        try:
            return msgspec.convert(fields, self.body_type, strict=False)
        except msgspec.ValidationError as fault:
            raise validation_error(str(fault), self.body_type) from None

    def _build(self, part: Any, value: str | None) -> Command:
        """`part` as it is, or with the field that the path gives put in."""
        if self.path_field is None:
            command: Command = part
            return command
        named = asdict(part)
        own = named[self.path_field]
        if own is not UNSET and own != value:
            raise invalid_request_error(
                f"$.{self.path_field}", "differs from the one in the path. Leave it out of the body."
            )
        named[self.path_field] = value
        return self.command(**named)


def make_body_type(
    command: type[Command], path_field: str | None, *, extra_fields: Sequence[Any] = (), suffix: str = "Body"
) -> type[Any]:
    """`command` as it is read where the path gives the field `given`, which need not be there then.

    `also`: fields that stand beside those of the command, as defstruct takes them; `kind` ends the part's name.
    """
    fields: list[Any] = list(extra_fields)
    for info in msgspec.structs.fields(command):
        if info.name == path_field:
            fields.append((path_field, str | UnsetType, UNSET))
        elif info.default_factory is not NODEFAULT:
            fields.append((info.name, info.type, msgspec.field(default_factory=info.default_factory)))
        else:
            fields.append((info.name, info.type, msgspec.field(default=info.default)))
    names = {info.name: info.encode_name for info in msgspec.structs.fields(command) if info.name != info.encode_name}
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
    """Whether any text may stand there. Of a word that is chosen out of some (a status) msgspec makes none, too."""
    return kind is str or (get_origin(kind) is not Literal and any(map(_takes_text, get_args(kind))))


def path_value(shape: RequestDecoder, value: str) -> str:
    """The id or name that the path gives (percent-decoded), checked by its field."""
    if not is_job_id(value) and not shape.accepts(value):
        raise invalid_request_error(f"$.{shape.path_field}", f"the path must give {shape.path_value_words} here.")
    return value


def _parameters(query: str, lists: frozenset[str] = frozenset(), most: int = MAX_QUERY_FIELDS) -> dict[str, Any]:
    """Names and values, each name once, but for those of `lists`."""
    try:
        pairs = parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=most)
    except ValueError:
        message = f"The query is not readable: up to {most} name=value pairs in percent-encoded UTF-8."
        raise api_error("invalid_request", message, field="$") from None
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in lists:
            fields.setdefault(name, []).append(value)
        elif name in fields:
            raise invalid_request_error(f"$.{_shown(name)}", "is given more than once. Give it once.")
        else:
            fields[name] = value
    return fields


# ---------------------------------------------------------------------------------------------------------------------
# What types cannot say.


def _check_payload(payload: Raw, field: str, limits: Limits) -> None:
    size = memoryview(payload).nbytes
    if size > limits.payload:
        message = f"`{field}` has {size} bytes, the limit is {limits.payload}. Store the data elsewhere and put a "
        message += f"reference into the {field.rpartition('.')[2]}."
        raise too_large_error(message, field=field, limit=limits.payload)


def _check_result(result: Complete | Import | Updates, above: str, limits: Limits) -> None:
    """What a job keeps of its end, in the fields of `above`. Every look at the job carries the metadata."""
    _check_storage_key(f"{above}.storage_key", result.storage_key)
    if result.metadata is not None:
        _check_payload(result.metadata, f"{above}.metadata", limits)


def _too_many(name: str, most: int) -> ApiException:
    if name == "jobs":
        return too_large_error(f"Over {most} jobs in one bulk. Send several bulks.", field="$.jobs", limit=most)
    return invalid_request_error(f"$.{name}", f"expected a list of length <= {most}.")


_LISTS: Final[dict[type[Command], dict[str, Callable[[Limits], int]]]] = {
    Bulk: {"jobs": lambda limits: limits.bulk},
    MakePlan: {"ids": lambda _: MAX_PLAN},
    Claim: {"queues": lambda _: MAX_NAMES, "kinds": lambda _: MAX_NAMES},
}


def _check_bulk(command: Bulk, limits: Limits) -> None:
    if len(command.jobs) > limits.bulk:
        raise _too_many("jobs", limits.bulk)
    for at, job in enumerate(command.jobs):
        _check_payload(job.payload, f"$.jobs[{at}].payload", limits)


def _check_import(command: Import, limits: Limits) -> None:
    _check_payload(command.payload, "$.payload", limits)
    _check_result(command, "$", limits)


def _check_storage_key(field: str, key: str | None) -> None:
    fault = None if key is None else storage_key_error(key)
    if fault is not None:
        raise invalid_request_error(field, f"{fault}.")


_CHECKS: Final[dict[type[Command], Callable[[Any, Limits], None]]] = {
    Create: lambda command, limits: _check_payload(command.payload, "$.payload", limits),
    Bulk: _check_bulk,
    Import: _check_import,
    Complete: lambda command, limits: _check_result(command, "$", limits),
    Transition: lambda command, limits: _check_result(command.updates, "$.updates", limits),
}


# ---------------------------------------------------------------------------------------------------------------------
# Words for faults.


def malformed_json_error(fault: Exception) -> ApiException:
    """400 for a body that is no JSON: the decoder's word and the byte, never the body's own text."""
    if isinstance(fault, RecursionError):
        why = "it is nested too deeply"
    elif isinstance(fault, UnicodeDecodeError):
        why = f"it is not UTF-8 (byte {fault.start})"
    else:
        why = str(fault).removeprefix("JSON is malformed: ").removeprefix("Input data was ") or "not readable"
    return api_error("invalid_request", f"The body is not valid JSON: {why}. Send one JSON object in UTF-8.", field="$")


def validation_error(fault: str, shape: type[Any]) -> ApiException:
    """400 for well-formed JSON of the wrong shape: the field's path, what is expected, what to do."""
    what, where = _place(fault)
    about = _ABOUT_FIELD.fullmatch(what)
    if about is None and (about := _ABOUT_FIELD.fullmatch(fault)) is not None:
        where = "$"  # what looked like a place was a part of the name
    if about is not None:
        name = _shown(about["name"])
        return invalid_request_error(f"{where}.{name}", _field_fault(about["how"], name, _struct_at(shape, where)))
    return invalid_request_error(where, _value_fault(what, _field_at(shape, where)))


def _place(fault: str) -> tuple[str, str]:
    """What is wrong, and the path of where: a name in it is the caller's, as long and as odd as he likes."""
    what, mark, where = fault.rpartition(" - at `")
    return (what, where[:-1]) if mark and _WHERE.fullmatch(where) else (fault, "$")


def _field_fault(how: str, name: str, struct: type[Any] | None) -> str:
    fields = () if struct is None else msgspec.structs.fields(struct)
    if how == "missing required":
        return "is missing and has no default. Add it."
    names = sorted(info.encode_name for info in fields)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    known = f" Known here: {', '.join(names)}." if names else " Nothing is taken here."
    return f"is not a field of this request.{hint}{known}"


def _value_fault(what: str, field: FieldInfo | None) -> str:
    if what == f"Expected `int` >= {EARLIEST_MS}":
        return "must be Unix time in milliseconds. The value looks like seconds: multiply it by 1000."
    if what.startswith("Invalid enum value") and field is not None:
        return f"must be one of {', '.join(_choices(field.type))}."
    if "matching regex" in what and field is not None:
        words = _pattern_words(field.type)
        return f"must be {words}."
    what = _QUOTED.sub(
        lambda quoted: " or ".join(_TYPES.get(name, name) for name in quoted[1].split(" | ")), what[:300]
    )
    return f"{what[:1].lower()}{what[1:].removesuffix('.0')}."


def _shown(name: str) -> str:
    """A caller's own field name, short and printable."""
    return "".join(char if char.isprintable() else "?" for char in name[:SHOWN_NAME])


def _struct_at(shape: type[Any], where: str) -> type[Any] | None:
    """The struct at a path like `$.jobs[3].backoff`, None where there is none."""
    struct: type[Any] | None = shape
    for step in _STEP.finditer(where):
        if step[1] is None or struct is None:
            continue
        info = next((info for info in msgspec.structs.fields(struct) if info.encode_name == step[1]), None)
        struct = None if info is None else _first(info.type, lambda part: issubclass(part, Struct))
    return struct


def _field_at(shape: type[Any], where: str) -> FieldInfo | None:
    """What is declared for the field at a path like `$.jobs[3].priority`."""
    above, _, name = where.rpartition(".")
    struct = _struct_at(shape, above or "$")
    name = name.partition("[")[0]
    fields = () if struct is None else msgspec.structs.fields(struct)
    return next((info for info in fields if info.encode_name == name), None)


def _parts(annotation: Any) -> list[Any]:
    """`annotation` and everything that it is made of."""
    return [annotation, *(deep for part in get_args(annotation) for deep in _parts(part))]


def _first(annotation: Any, wanted: Any) -> Any:
    return next((part for part in _parts(annotation) if isinstance(part, type) and wanted(part)), None)


def _choices(annotation: Any) -> list[str]:
    """The words that may be chosen. That a form may send none, too, is nothing to say."""
    literals = [part for part in _parts(annotation) if get_origin(part) is Literal]
    return [str(choice) for literal in literals for choice in get_args(literal) if choice != ""]


def _pattern_words(annotation: Any) -> str:
    metas = [part for part in _parts(annotation) if isinstance(part, msgspec.Meta) and part.pattern is not None]
    return _PATTERNS.get(str(metas[0].pattern), "other text") if metas else "other text"


# ---------------------------------------------------------------------------------------------------------------------
# Large bodies.


class ListTooLong(Exception):
    """The list `name` has more than `most` places."""

    def __init__(self, name: str, most: int) -> None:
        super().__init__(name)
        self.name = name
        self.limit = most


class BodyTooComplex(Exception):
    """The body is mostly blanks or fields that are said again and again."""


class BodyScanner:
    """Looks over bodies of the type `part`. `lists` says how long each of its lists may be."""

    def __init__(self, part: type[Any], lists: Mapping[str, int]) -> None:
        self._ends = [(name, most, _decoder({name: _bounded_list(most)})) for name, most in lists.items()]
        self._unread = msgspec.json.Decoder(_skipping_type(part))

    def check(self, body: bytes) -> None:
        """Raises TooLong or TooMuch."""
        if len(body) <= BIG_BODY:
            return
        for name, most, decoder in self._ends:
            try:
                decoder.decode(body)
            except msgspec.ValidationError as fault:
                if str(fault).endswith(f"`$.{name}[{most}]`"):
                    raise ListTooLong(name, most) from None
            except _FAULTS:
                continue
        if body.count(b'":') > MANY_KEYS:
            try:
                seen = self._unread.decode(body)
            except _FAULTS:
                return
            if len(body) - _expected_size(seen) > BIG_BODY:
                raise BodyTooComplex


def _decoder(fields: Mapping[str, Any]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(
        msgspec.defstruct("Looked", [(name, of, msgspec.field(default=None)) for name, of in fields.items()])
    )


def _bounded_list(most: int) -> Any:
    """A list of up to `most` unread places: one more is of a type that nothing is."""
    return tuple[(*[Raw] * most, Annotated[int, msgspec.Meta(gt=0, lt=0)])]  # type: ignore[misc]


def _skipping_type(part: type[Any]) -> type[Struct]:
    """`part` with its values passed over; of a list of structs the values in those."""
    fields: list[Any] = []
    for info in msgspec.structs.fields(part):
        inner = _item_struct(info.type)
        of: Any = Raw if inner is None else list[_skipping_type(inner)]  # type: ignore[misc]
        fields.append((info.name, of, msgspec.field(default=None, name=info.encode_name)))
    payloads = frozenset(info.name for info in msgspec.structs.fields(part) if _bare(info.type) is Raw)
    return msgspec.defstruct("Unread", fields, namespace={"payloads": payloads})


def _bare(annotation: Any) -> Any:
    """Return `annotation` without Annotated."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _item_struct(annotation: Any) -> type[Struct] | None:
    """The struct of which this is a list."""
    annotation = _bare(annotation)
    inner = get_args(annotation)[0] if get_origin(annotation) is list else None
    return inner if isinstance(inner, type) and issubclass(inner, Struct) else None


def _expected_size(seen: Any) -> int:
    """How many bytes a body may take that says these fields once each."""
    total = 0
    for name in seen.__struct_fields__:
        value = getattr(seen, name)
        if isinstance(value, Raw):
            size = memoryview(value).nbytes
            total += NAME_ALLOWANCE + (size if name in seen.payloads else min(size, MAX_COUNTED_FIELD))
        elif value is not None:
            total += NAME_ALLOWANCE + sum(NAME_ALLOWANCE + _expected_size(each) for each in value)
    return total
