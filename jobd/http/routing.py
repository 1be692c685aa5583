"""Routes as data, and how a path finds its route.

Handles no request: that is web.py. The tables themselves are worker_api.py and admin_api.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Literal
from urllib.parse import unquote

from aiohttp.web import StreamResponse
from msgspec import Struct

from jobd.http.auth import JSON
from jobd.http.decoding import Limits, RequestDecoder
from jobd.model.commands import Claim, Command, Create, NamedJobCommand, Start
from jobd.model.errors import ApiError
from jobd.model.responses import Response

Auth = Literal["anyone", "worker", "admin"]
# How a call is answered that is not one command to the actor: given the Web, the Visit and what was decoded.
Handler = Callable[[Any, Any, Any], Awaitable[Response | ApiError | StreamResponse]]
# How a refusal is told where people read it: given the Visit and the Refusal, the data of an answer.
ErrorRenderer = Callable[[Any, ApiError], Any]


class Route(Struct, frozen=True, kw_only=True):
    """One call of an API, as data: the OpenAPI document is made from it.

    `path` may have one part in braces, named like the field of `asks` that it gives. `asks` is what a body (or a
    query, for GET) decodes to; where `reads` is "lines" it is one line of the stream. `gives` is the type of `data`
    in the answer, `bytes` where the answer is not JSON but of the type `sends`. `status` is that of the usual success,
    `key` says whether an Idempotency-Key counts. `secret`: the answer holds secrets, so who may only look does not get
    it; `noted`: the audit log has who took it. Without `via` the command goes to the actor, without `shows` a refusal
    is the error object.

    For the OpenAPI document: `summary` (default: the docstring of the request), `errors` besides those of the request,
    and `other_statuses` of a success with their meaning.
    """

    method: str
    path: str
    request: type[Command]
    response: Any
    auth: Auth
    handler: Handler | None = None
    key: bool = False
    status: int = 200
    body: Literal["json", "lines", "form"] = "json"
    content_type: str = JSON
    secret: bool = False
    audited: bool = False
    render_error: ErrorRenderer | None = None
    summary: str = ""
    errors: tuple[str, ...] = ()
    other_statuses: dict[int, str] = {}

    @property
    def changes(self) -> bool:
        """Whether the call may change something."""
        return self.method != "GET"

    @property
    def path_field(self) -> str | None:
        """The name of the part of the path in braces."""
        return self.path[self.path.index("{") + 1 : self.path.index("}")] if "{" in self.path else None


class ResolvedRoute(Struct, frozen=True):
    """A route with the reader of its command, and with what that command says of itself."""

    route: Route
    decoder: RequestDecoder
    names_worker: bool  # it comes from a worker, and says from which
    names_job: bool


class RouteMatch(Struct, frozen=True):
    """What a path is: its way for a method, what it gives for its part in braces (decoded), the methods it takes."""

    resolved: ResolvedRoute | None
    path_value: str | None = None
    allowed: frozenset[str] = frozenset()


class Router:
    """Looks routes up: exact paths first, then those with a part in braces."""

    def __init__(self, routes: Iterable[Route], limits: Limits) -> None:
        exact: dict[str, dict[str, ResolvedRoute]] = {}
        self._patterns: dict[
            str, dict[str, dict[str, ResolvedRoute]]
        ] = {}  # what is before the braces, what is after them
        for route in routes:
            prefix, brace, rest = route.path.partition("{")
            methods = (
                self._patterns.setdefault(prefix, {}).setdefault(rest.partition("}")[2], {})
                if brace
                else exact.setdefault(prefix, {})
            )
            assert route.method not in methods, f"two routes for {route.method} {route.path}"
            methods[route.method] = _resolved(route, limits)
            if route.method == "GET" and route.auth == "anyone":
                methods["HEAD"] = methods["GET"]  # balancers probe with it
        self._exact = {
            path: {method: RouteMatch(way) for method, way in methods.items()} for path, methods in exact.items()
        }

    def match(self, method: str, path: str) -> RouteMatch:
        """What `path` is. The methods that it takes are told only where `method` is none of them."""
        exact = self._exact.get(path, {})
        if (found := exact.get(method)) is not None:
            return found
        allowed = frozenset(exact)
        for prefix, tails in self._patterns.items():
            if path.startswith(prefix):
                given, slash, rest = path[len(prefix) :].partition("/")
                methods = tails.get(slash + rest, {}) if given else {}
                if method in methods:
                    return RouteMatch(methods[method], unquote(given))
                allowed |= methods.keys()
        return RouteMatch(None, None, allowed)


def _resolved(route: Route, limits: Limits) -> ResolvedRoute:
    shape = RequestDecoder(route.request, route.path_field, limits)
    return ResolvedRoute(
        route, shape, issubclass(route.request, Start | Claim), issubclass(route.request, Create | NamedJobCommand)
    )
