"""Routes as data, and the router that matches a path to its route."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Literal
from urllib.parse import unquote

from msgspec import Struct

from jobd.http.decoding import Limits, RequestDecoder, make_decoder
from jobd.model.api_call import EVENT_STREAM, JSON, ApiCall, Auth
from jobd.model.commands import Command
from jobd.model.errors import ApiError
from jobd.model.responses import Response

# Handles a request that is not one command for the actor. Arguments: HttpApp, RequestContext, decoded request. The
# result is None if it has streamed the response.
RouteHandler = Callable[[Any, Any, Any], Awaitable[Response | ApiError | None]]
# Renders an error as a page. Arguments: RequestContext, ApiError.
ErrorRenderer = Callable[[Any, ApiError], Any]


class Route(Struct, frozen=True, kw_only=True):
    """One call of an API. The OpenAPI document is generated from it.

    `path` may have one part in braces, named like the field of `request` that it sets. `request` is the type of the
    body, of the query of a GET, or of one line if `body` is "lines". `response` is the type of `data` in the response,
    or `bytes` or `str` if the response is not JSON but of `content_type`. `status` is that of a success. `key`: an
    Idempotency-Key is accepted. `secret`: read-only tokens are rejected, because the response contains secrets.
    `audited`: reads are recorded in the audit log. `on_standby`: a standby of a cluster serves it too. Without
    `handler` the command goes to the actor; without `render_error` errors are sent as JSON.

    For the OpenAPI document: `tag`, `summary` (default: the docstring of the request), `errors` besides those of the
    request, and `other_statuses` of a success with their meaning.
    """

    method: str
    path: str
    request: type[Command]
    response: Any
    auth: Auth
    handler: RouteHandler | None = None
    key: bool = False
    status: int = 200
    body: Literal["json", "lines", "form"] = "json"
    content_type: str = JSON
    secret: bool = False
    audited: bool = False
    on_standby: bool = False
    render_error: ErrorRenderer | None = None
    tag: str = ""
    summary: str = ""
    errors: tuple[str, ...] = ()
    other_statuses: dict[int, str] = {}

    @property
    def changes(self) -> bool:
        """Whether the call may change state."""
        return self.method != "GET"

    @property
    def takes_version(self) -> bool:
        """Whether the call can require a version of its job, with If-Match."""
        return self.auth == "admin" and self.changes and self.request.is_of_job and self.handler is None

    @property
    def is_long_lived(self) -> bool:
        """Whether a request can stay open for long: a stream, or a claim that waits for a job."""
        return self.body == "lines" or self.content_type == EVENT_STREAM or self.request.can_wait

    @property
    def path_field(self) -> str | None:
        """The name of the path part in braces, None without one."""
        return self.path[self.path.index("{") + 1 : self.path.index("}")] if "{" in self.path else None


def route_of(call: ApiCall[Any, Any], handler: RouteHandler | None = None) -> Route:
    """Return the route of a declared call."""
    return Route(
        method=call.method,
        path=call.path,
        request=call.command,
        response=call.response,
        auth=call.auth,
        handler=handler,
        tag=call.tag,
        **call.options,
    )


class ResolvedRoute(Struct, frozen=True):
    """A route with the decoder of its requests."""

    route: Route
    decoder: RequestDecoder
    decode: Callable[[bytes, str | None], Command]  # of a body


class Router:
    """Match paths to routes: exact paths first, then paths with a part in braces. Building it takes about 0.1 s."""

    def __init__(self, routes: Iterable[Route], limits: Limits) -> None:
        self.routes = tuple(routes)
        exact: dict[str, dict[str, ResolvedRoute]] = {}
        # By the text before the braces, then by the text after them.
        patterns: dict[str, dict[str, dict[str, ResolvedRoute]]] = {}
        for route in self.routes:
            prefix, brace, rest = route.path.partition("{")
            methods = (
                patterns.setdefault(prefix, {}).setdefault(rest.partition("}")[2], {})
                if brace
                else exact.setdefault(prefix, {})
            )
            assert route.method not in methods, f"two routes for {route.method} {route.path}"
            methods[route.method] = _resolved(route, limits)
            if route.method == "GET" and route.auth == "anyone":
                methods["HEAD"] = methods["GET"]  # load balancers probe with HEAD
        self._exact = exact
        self._patterns = tuple((prefix, len(prefix), tails) for prefix, tails in patterns.items())

    def match(self, method: str, path: str) -> tuple[ResolvedRoute | None, str | None]:
        """Return the route of a request, and the value of the path part in braces."""
        exact = self._exact.get(path)
        if exact is not None and method in exact:
            return exact[method], None
        for prefix, size, tails in self._patterns:
            if path.startswith(prefix):
                value, slash, rest = path[size:].partition("/")
                methods = tails.get(slash + rest)
                if methods is not None and value and method in methods:
                    return methods[method], unquote(value) if "%" in value else value
        return None, None

    def allowed(self, path: str) -> frozenset[str]:
        """Return the methods that `path` supports."""
        allowed = set(self._exact.get(path, ()))
        for prefix, size, tails in self._patterns:
            value, slash, rest = path[size:].partition("/")
            if path.startswith(prefix) and value:
                allowed |= tails.get(slash + rest, {}).keys()
        return frozenset(allowed)


def _resolved(route: Route, limits: Limits) -> ResolvedRoute:
    decoder = make_decoder(route.request, route.path_field, limits)
    decode = decoder.from_form if route.body == "form" else decoder.from_body
    return ResolvedRoute(route, decoder, decode)
