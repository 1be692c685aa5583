"""The OpenAPI 3.1 document of an API, built from its routes, and the call that returns it."""

from __future__ import annotations

import asyncio
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, reduce
from inspect import cleandoc
from operator import or_
from typing import Annotated, Any, Final, Union, get_args, get_origin

import msgspec
from msgspec import NODEFAULT, UNSET, Meta, Raw, Struct
from msgspec.structs import FieldInfo

from jobd import __version__
from jobd.api.command_stream import LINE_TYPES, StreamedCommand
from jobd.http.auth import CLIENT_HEADER, OPERATOR_HEADER
from jobd.http.http_app import HttpApp
from jobd.http.request import RequestContext
from jobd.http.response import ErrorBody, RawBody
from jobd.http.routing import Route, RouteHandler, route_of
from jobd.model.api_call import EVENT_STREAM, JSON, LINES, ApiCall, Tag, calls_of
from jobd.model.calls import ADMIN
from jobd.model.commands import Cancel, JobCommand
from jobd.model.errors import ERROR_CODES
from jobd.model.job import ID_PATTERN
from jobd.model.requests import NoFields
from jobd.model.responses import Response

JsonObject = dict[str, Any]
PATH: Final = "/openapi.json"
REFS: Final = "#/components"

ABOUT: Final = (
    "Times are Unix milliseconds, named `*_at`; durations are milliseconds, named `*_ms`. The admin API keeps the "
    "names and units that existing dashboards use. A field that is unknown, has the wrong type or is out of bounds "
    "causes a 400; values are never clamped, except that a lock never outlasts its progress timeout. A success is sent "
    "only after the change is on disk. Over a Unix socket, workers need no token."
)
# The tags of the document, in its order, with their descriptions.
TAGS: Final[dict[Tag, str]] = {
    "Jobs": "Create, run, inspect and change single jobs.",
    "Many jobs": "Inspect, change and move many jobs in one call.",
    "Queues and workers": "Inspect, pause and resume queues, and inspect workers.",
    "Schedules": "Create jobs by the clock.",
    "Events": "Follow events, and manage the webhooks that deliver them.",
    "The daemon": "Inspect the daemon, and control its maintenance.",
    "The store": "Check the database, and back it up.",
}
HEADERS: Final = {
    "Idempotency-Key": "For 24 h, the same key with the same body returns the stored response. A request with two such "
    "headers is rejected.",
    "If-Match": "The `version` of the job in double quotes. If the job has changed since, the call is rejected.",
    "Idempotent-Replayed": "Present, and `true`, if a stored response was returned.",
    "Last-Event-ID": "The `id` of the last event received. The stream continues after it.",
    "X-Jobd-Operator": "Name of the operator for timelines and the audit log: up to 64 characters. Unprintable "
    "characters are replaced by spaces.",
    "X-Jobd-Client": "Name of the client for the timeline of a job that it cancels, as `X-Jobd-Operator`.",
    "Retry-After": "Seconds to wait if the code is `overloaded`.",
    "WWW-Authenticate": "How to send the token.",
}


def routes_of(groups: Iterable[type], handlers: Mapping[ApiCall[Any, Any], RouteHandler]) -> Iterator[Route]:
    """Return the routes of the calls of `groups`. A call without a handler is one command for the actor."""
    seen: set[tuple[str, str]] = set()
    for call in calls_of(*groups):
        if (call.method, call.path) not in seen:
            seen.add((call.method, call.path))
            yield route_of(call, handlers.get(call))


def with_document(title: str, routes: Iterable[Route]) -> tuple[Route, ...]:
    """Return `routes` and GET /openapi.json, which describes all of them."""
    document_route = document_at(PATH, title, lambda: table)
    table = (*routes, document_route)
    return table


def document_at(path: str, title: str, routes: Callable[[], Iterable[Route]]) -> Route:
    """Return the route GET `path` of the document of `routes`. The document has no secrets and needs no token."""

    async def send_document(app: HttpApp[Any], ctx: RequestContext, query: NoFields) -> Response:
        return Response(RawBody(JSON, await asyncio.to_thread(text)))

    @cache
    def text() -> bytes:
        return msgspec.json.encode(document(title, routes()))

    return Route(
        method="GET",
        path=path,
        request=NoFields,
        response=bytes,
        auth="anyone",
        handler=send_document,
        on_standby=True,
        tag="The daemon",
        summary="Return this document.",
    )


def document(title: str, routes: Iterable[Route]) -> JsonObject:
    schemas = Schemas()
    table = tuple(routes)
    used = {route.tag for route in table}
    paths: dict[str, JsonObject] = {}
    for route in table:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": __version__, "description": ABOUT, "license": {"name": "MIT"}},
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items() if name in used],
        "paths": paths,
        "components": schemas.components | {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Calls.


def _texts(route: Route) -> JsonObject:
    summary, *more = (
        route.summary.split("\n\n") if route.summary else cleandoc(route.request.__doc__ or "").split("\n\n")
    )
    texts = {"summary": " ".join(summary.split())}
    return {**texts, "description": "\n\n".join(" ".join(each.split()) for each in more)} if more else texts


def _operation(route: Route, schemas: Schemas) -> JsonObject:
    parts = re.findall(r"\w+", route.path.removeprefix(ADMIN))
    operation: JsonObject = {
        "tags": [route.tag],
        "operationId": "_".join([route.method.lower(), *parts]),
        **_texts(route),
        "parameters": _parameters(route),
        "responses": _responses(route, schemas),
    }
    operation["security"] = {"anyone": [{}], "worker": [{}, {"token": []}], "admin": [{"token": []}]}[route.auth]
    if route.body == "lines":
        operation["requestBody"] = _lines(route, schemas)
    elif route.method != "GET":
        body = schemas.of_request(route.request, route.path_field)
        needed = bool(schemas.resolve(body).get("required"))
        operation["requestBody"] = {"required": needed, "content": {JSON: {"schema": body}}}
    return operation


def _parameters(route: Route) -> list[JsonObject]:
    parameters: list[JsonObject] = []
    if (name := route.path_field) is not None:
        known = {"name": name, "in": "path", "required": True, "description": f"Percent-encoded {name}."}
        parameters.append({**known, "schema": {"type": "string", "pattern": ID_PATTERN}})
    is_recorded = route.auth == "admin" and (route.changes or route.secret or route.audited)
    for applies, header, pattern in (
        (route.key, "Idempotency-Key", {"pattern": "^[ -~]{1,200}$"}),
        (route.takes_version, "If-Match", {"pattern": '^"[0-9a-f]{1,60}"$'}),
        (is_recorded, OPERATOR_HEADER, {}),
        (route.auth == "worker" and route.request in (Cancel, StreamedCommand), CLIENT_HEADER, {}),
        (route.content_type == EVENT_STREAM, "Last-Event-ID", {"pattern": "^[0-9]{0,19}$"}),  # empty: none
    ):
        if applies:
            known = {"name": header, "in": "header", "description": HEADERS[header]}
            parameters.append({**known, "schema": {"type": "string", **pattern}})
    if route.method == "GET":
        query_schemas = Schemas()
        query = query_schemas.resolve(query_schemas.of_request(route.request, route.path_field))
        for name, schema in query["properties"].items():
            needed = name in query.get("required", ())
            parameters.append({"name": name, "in": "query", "required": needed, "schema": _not_null(schema)})
    return parameters


def _lines(route: Route, schemas: Schemas) -> JsonObject:
    text = f"JSON lines, each with one `{route.request.__name__}`."
    kinds = [schemas.of_request(part) for part in LINE_TYPES.values()] if route.request is StreamedCommand else []
    line = {"oneOf": kinds} if kinds else schemas.of_request(route.request)
    schema = {"type": "string", "contentMediaType": LINES, "description": text, "x-line": line}
    return {"required": True, "content": {LINES: {"schema": schema}}}


# ---------------------------------------------------------------------------------------------------------------------
# Responses.


def _responses(route: Route, schemas: Schemas) -> JsonObject:
    responses: dict[int, JsonObject] = {}
    for status, text in {route.status: "Done.", **route.other_statuses}.items():
        responses[status] = {"description": text, "content": {route.content_type: {"schema": _success(route, schemas)}}}
        if route.key:
            responses[status]["headers"] = {"Idempotent-Replayed": _header("Idempotent-Replayed", {"const": "true"})}
    by_status: dict[int, list[str]] = {}
    for code in error_codes(route):
        by_status.setdefault(ERROR_CODES[code].status, []).append(code)
    for status, codes in by_status.items():
        error_response = _error(codes, schemas)
        responses[status] = (
            _either(responses[status], error_response)
            if status in responses
            else schemas.share("responses", ".".join(codes), error_response)
        )
    return {str(status): responses[status] for status in sorted(responses)}


def _success(route: Route, schemas: Schemas) -> JsonObject:
    if route.response in (bytes, str):
        return {"type": "object" if route.content_type == JSON else "string"}
    if route.content_type == EVENT_STREAM:
        name = route.response.__name__
        description = f"Server-Sent Events: `id` is `seq`, `event` is `type`, `data` is one `{name}` in one line."
        text = {"type": "string"}
        data = {**text, "contentMediaType": JSON, "contentSchema": schemas.of_response(route.response)}
        fields = {"id": text, "event": text, "data": data, "retry": {"type": "integer"}}
        return {"type": "object", "description": description, "properties": fields}  # of one event, as clients parse it
    if route.content_type == LINES:
        description = f"JSON lines, each with one `{route.response.__name__}`, in the order of the request lines."
        line = schemas.of_response(route.response)
        return {"type": "string", "contentMediaType": LINES, "description": description, "x-line": line}
    return {
        "type": "object",
        "properties": {"success": {"const": True}, "data": schemas.of_response(route.response)},
        "required": ["success", "data"],
        "additionalProperties": False,
    }


def _error(codes: list[str], schemas: Schemas) -> JsonObject:
    texts = [f"`{code}`: {ERROR_CODES[code].description}." for code in codes]
    text = texts[0] if len(texts) == 1 else "\n".join(f"- {each}" for each in texts)
    narrow = {"properties": {"success": {"const": False}, "error": {"enum": codes}}}
    response: JsonObject = {
        "description": text,
        "content": {JSON: {"schema": {"allOf": [schemas.of_response(ErrorBody), narrow]}}},
    }
    if "overloaded" in codes:
        response["headers"] = {"Retry-After": _header("Retry-After", {"type": "integer", "minimum": 1})}
    if "unauthorized" in codes:
        response["headers"] = {"WWW-Authenticate": _header("WWW-Authenticate", {"const": "Bearer"})}
    return response


def _either(success: JsonObject, error: JsonObject) -> JsonObject:
    schemas = [each["content"][JSON]["schema"] for each in (success, error)]
    text = f"{success['description']} Or:\n\n{error['description']}"
    return {**success, **error, "description": text, "content": {JSON: {"schema": {"oneOf": schemas}}}}


def _header(name: str, schema: JsonObject) -> JsonObject:
    return {"description": HEADERS[name], "schema": schema}


def error_codes(route: Route) -> list[str]:
    """Return every error code of a call, in the order of ERROR_CODES."""
    codes = {"invalid_request", "forbidden", "expectation_failed", "internal_error"}
    codes |= {*route.request.errors, *route.errors}
    if not route.on_standby:
        codes.add("not_leader")
    if route.auth != "anyone":
        codes.add("unauthorized")
    if route.method != "GET":
        codes |= {"request_timeout", "too_large", "unsupported_media_type"}
    if route.request is not NoFields:
        codes |= {"overloaded", "shutting_down", "outcome_unknown"}
        codes |= {"storage_full"} if route.method != "GET" else set()
    if issubclass(route.request, JobCommand):
        codes |= {"job_not_found", "job_quarantined"}
    if route.key:
        codes |= {"idempotency_key_reused", "overloaded"}
    return [code for code in ERROR_CODES if code in codes]


# ---------------------------------------------------------------------------------------------------------------------
# Schemas of commands and responses. msgspec makes them from variants of the types, which add what the types do not
# declare: that a response always has certain fields, and default payloads.


class Schemas:
    """The schemas of one document. `components` are its components by section and name."""

    def __init__(self) -> None:
        self.components: dict[str, dict[str, Any]] = {"schemas": {}}
        self._variants: dict[tuple[type[Struct], str | None], type[Struct]] = {}

    def of_request(self, command: type[Struct], path_field: str | None = None) -> dict[str, Any]:
        """Return the schema of a body or query, without the field in the path."""
        return self._add(self._variant(command, path_field))

    def of_response(self, response: type[Struct]) -> dict[str, Any]:
        """Return the schema of a response. Fields that cannot be unset are required, even those with a default."""
        return self._add(self._variant(response, None))

    def resolve(self, reference: dict[str, Any]) -> dict[str, Any]:
        """Return the schema behind a reference."""
        schema: dict[str, Any] = self.components["schemas"][reference["$ref"].rpartition("/")[2]]
        return schema

    def share(self, section: str, name: str, value: dict[str, Any]) -> dict[str, Any]:
        """Add `value` as a component, once, and return a reference to it."""
        known = self.components.setdefault(section, {}).setdefault(name, value)
        assert known == value, f"two {section} are called {name}"
        return {"$ref": f"{REFS}/{section}/{name}"}

    def _add(self, variant: type[Struct]) -> dict[str, Any]:
        [reference], components = msgspec.json.schema_components([variant], ref_template=f"{REFS}/schemas/{{name}}")
        for name, schema in components.items():
            self.share("schemas", name, schema)
        return reference

    def _variant(self, struct: type[Struct], path_field: str | None) -> type[Struct]:
        if (struct, path_field) not in self._variants:
            fields = [
                (info.name, self._field_type(info), self._field_default(struct, info))
                for info in msgspec.structs.fields(struct)
                if info.name != path_field
            ]
            config = struct.__struct_config__
            variant = msgspec.defstruct(
                struct.__name__,
                fields,
                rename={info.name: info.encode_name for info in msgspec.structs.fields(struct)},
                kw_only=True,
                forbid_unknown_fields=config.forbid_unknown_fields,
                module=struct.__module__,
                namespace={"__doc__": struct.__dict__.get("__doc__")},
            )
            self._variants[struct, path_field] = variant
        return self._variants[struct, path_field]

    def _field_type(self, info: FieldInfo) -> Any:
        """Return the type of a field with its description, and with every struct in it replaced by its variant."""
        more: dict[str, Any] = {"description": _description_of(info.type)}
        if type(info.default) is Raw:  # msgspec cannot encode this default
            more["default"] = msgspec.json.decode(info.default)
        return Annotated[self._translate(info.type), Meta(extra_json_schema=more)]

    def _field_default(self, struct: type[Struct], info: FieldInfo) -> Any:
        config = struct.__struct_config__
        if not config.forbid_unknown_fields:  # a response
            is_omitted = config.omit_defaults and info.default is not NODEFAULT
            return msgspec.field(default=UNSET if is_omitted or info.default is UNSET else NODEFAULT)
        if type(info.default) is Raw:
            default = info.default
            return msgspec.field(default_factory=lambda: default)
        if info.default_factory is not NODEFAULT:
            return msgspec.field(default_factory=info.default_factory)
        return msgspec.field(default=info.default)

    def _translate(self, annotation: Any) -> Any:
        if isinstance(annotation, type) and issubclass(annotation, Struct):
            return self._variant(annotation, None)
        origin, parts = get_origin(annotation), get_args(annotation)
        if origin is Annotated:
            return Annotated[(self._translate(parts[0]), *map(_without_description, parts[1:]))]
        if origin in (Union, types.UnionType):
            return reduce(or_, (self._translate(part) for part in parts))
        return list[self._translate(parts[0])] if origin is list else annotation  # type: ignore[misc]


def _description_of(annotation: Any) -> str:
    """Return the outermost description of a type, empty if it has none."""
    parts = get_args(annotation)
    descriptions = [part.description for part in parts if isinstance(part, Meta) and part.description is not None]
    if descriptions:
        return str(descriptions[-1])
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        return next(filter(None, map(_description_of, parts)), "")
    return ""


def _without_description(part: Any) -> Any:
    """Return a Meta without its description, which is added to the field."""
    if not isinstance(part, Meta) or part.description is None:
        return part
    bounds = ("gt", "ge", "lt", "le", "multiple_of", "pattern", "min_length", "max_length")
    return Meta(**{name: value for name in bounds if (value := getattr(part, name)) is not None})


def _not_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a query parameter, which cannot be null."""
    choices = [choice for choice in schema.get("anyOf", [schema]) if choice != {"type": "null"}]
    rest = {name: value for name, value in schema.items() if name != "anyOf" and (name, value) != ("default", None)}
    return {**choices[0], **rest} if len(choices) == 1 else rest
