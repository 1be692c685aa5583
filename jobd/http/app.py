"""Turn HTTP requests into commands for the actor, and its responses into HTTP responses.

On the fast path, `App.send` decodes the command and sends it to the actor, and `App.respond` encodes the response. On
the slow path, `App.handle` does all of that in a task of its own, for a request whose body has not arrived or whose
response is streamed.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final, Generic, Protocol, TypeVar
from urllib.parse import unquote

import structlog
from aiohttp import hdrs, web
from aiohttp.streams import StreamReader
from msgspec import Struct
from multidict import istr

from jobd.engine.mailbox import Envelope, Waiter
from jobd.http.auth import FORM, JSON, LINES, Authenticator, check_content_type
from jobd.http.decoding import Limits, path_value
from jobd.http.request import HttpRequest, RequestContext, RequestHead, operator_of
from jobd.http.response import HTTP_VERSION, HttpResponse, PreparedResponse, RawBody, error_response, ok_response
from jobd.http.routing import ResolvedRoute, Route, RouteMatch, Router
from jobd.model.commands import Command, IdempotencyKey, Operator
from jobd.model.errors import ApiError, ApiException, api_error, too_large_error
from jobd.model.responses import Response

INTERNAL_ERROR: Final = ApiError(
    "internal_error", "This is a bug in jobd. The log shows where it happened. Please report it."
)

IDEMPOTENCY_KEY: Final = istr("Idempotency-Key")
ACCEPTED_EXPECT: Final = frozenset({"", "100-continue"})  # values of the Expect header
MAX_LINES_PER_SECOND: Final = 20
BODY_TYPES: Final = {"json": JSON, "lines": LINES, "form": FORM}

log = structlog.get_logger("jobd.web")


S = TypeVar("S")  # the services behind an API


class LogRateLimiter:
    """Limit the log lines of each kind to MAX_LINES_PER_SECOND. `now` returns a monotonic time in seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._second = 0
        self._seen: Counter[str] = Counter()
        self._suppressed: Counter[str] = Counter()

    def suppressed(self, kind: str) -> int | None:
        """Return how many lines of this kind were suppressed since the last one. None: suppress this one too."""
        second = int(self._now())
        if second != self._second:
            self._second = second
            self._seen.clear()
        self._seen[kind] += 1
        if self._seen[kind] <= MAX_LINES_PER_SECOND:
            return self._suppressed.pop(kind, 0)
        self._suppressed[kind] += 1
        return None


class ActorClient(Protocol):
    """The part of the actor that handlers use."""

    async def ask(
        self,
        command: Any,
        *,
        by: str = "client",
        admin: bool = False,
        key: IdempotencyKey | None = None,
        size: int = 0,
        operator: Operator | None = None,
        expected: str | None = None,
    ) -> Response | ApiError:
        """Send a command and wait for the response.

        `size` is the memory that the command holds while it waits, in bytes. `expected` is the version of the job that
        the caller has seen.
        """

    def send(
        self,
        command: Any,
        responder: Waiter,
        *,
        by: str = "client",
        admin: bool = False,
        key: IdempotencyKey | None,
        size: int,
        operator: Operator | None = None,
        in_line: bool = False,
    ) -> Envelope | ApiError:
        """Send a command whose response `responder` receives.

        `in_line`: the command is decided after the earlier ones of its sender.
        """

    def abandon(self, envelope: Envelope) -> None:
        """Drop a command whose client has disconnected, if it has not been decided."""

    def undelivered(self, response: Response) -> None:
        """Release the grants of a response that could not be delivered."""


class BrowserPages(Protocol):
    """The HTML pages of an app."""

    def is_signed_in(self, ctx: RequestContext) -> bool: ...
    def error_page(self, ctx: RequestContext, error: ApiError) -> RawBody: ...


async def run_command(app: App[Any], ctx: RequestContext, command: Any) -> Response | ApiError:
    """Handle a request that is one command for the actor, as most are."""
    return await app.actor.ask(command, by=ctx.by, admin=ctx.admin, key=ctx.key, size=ctx.size, operator=ctx.operator)


class AuthorizedRequest(Struct, frozen=True):
    """An authorized request: its route, and the value in its path."""

    resolved: ResolvedRoute
    path_value: str | None


class App(Generic[S]):
    """The application behind one listener.

    `routes` has the route of each type of request. `error_counts` counts the errors sent, by code. While `closing`,
    responses say `Connection: close`; `on_close` are the callbacks that end open streams then. `pages` are the HTML
    pages of the app, if it has any.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        routes: Iterable[Route],
        actor: ActorClient,
        services: S,
        *,
        limits: Limits | None = None,
        admin: bool = False,
        pages: BrowserPages | None = None,
    ) -> None:
        self.authenticator = authenticator
        self.actor = actor
        self.services = services
        self.limits = limits or Limits()
        self.admin = admin
        self.closing = False
        self.on_close: set[Callable[[], None]] = set()
        self.error_counts: Counter[str] = Counter()
        self._pending = 0
        self._idle = asyncio.Event()
        self._pages = pages
        table = tuple(routes)
        self.routes = {route.request: route for route in table}
        self._router = Router(table, self.limits)
        self._log_limiter = LogRateLimiter()

    # -- fast path: a complete request, handled without a separate task -----------------------------------------------

    def match(self, ctx: RequestContext) -> RouteMatch:
        """Find the route of a request."""
        return self._router.match(ctx.method, ctx.path)

    def send(self, ctx: RequestContext, match: RouteMatch, body: bytes, responder: Waiter) -> Envelope | HttpResponse:
        """Send the request's command to the actor. `responder` receives the actor's response.

        Returns an HTTP response if the request is rejected. The request counts as pending until `request_finished`.
        """
        self._pending += 1
        ctx.by = "admin" if self.admin else "client"
        try:
            command = self._decode(ctx, self._authorize(ctx, match), body)
            sent = self.actor.send(
                command,
                responder,
                by=ctx.by,
                admin=ctx.admin,
                key=ctx.key,
                size=ctx.size,
                operator=ctx.operator,
            )
        except ApiException as rejected:
            sent = rejected.error
        except Exception as bug:
            sent = self.log_internal_error(ctx, bug)
        return self.error_response(ctx, sent) if isinstance(sent, ApiError) else sent

    def respond(self, ctx: RequestContext, response: Response | ApiError) -> HttpResponse:
        """Encode the actor's response."""
        if isinstance(response, Response):
            try:
                return self._ok_response(ctx, response)
            except Exception as bug:
                if response.grants:
                    self.actor.undelivered(response)
                response = self.log_internal_error(ctx, bug)
        return self.error_response(ctx, response)

    def prepare(self, ctx: RequestContext, response: Response) -> HttpResponse | None:
        """Encode `response` before its commit. Return None if that is not possible yet."""
        try:
            return None if self.closing else self._ok_response(ctx, response)
        except Exception:
            return None  # `respond` fails in the same way and logs the bug

    def request_finished(self) -> None:
        """Count a request as no longer pending."""
        self._pending -= 1
        if self.closing and not self._pending:
            self._idle.set()

    # -- slow path: called by aiohttp ----------------------------------------------------------------------------------

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Handle a request. A bug causes a 500 and one log line."""
        assert isinstance(request, HttpRequest)
        self._pending += 1
        try:
            response = await self._handle(request.ctx)
        finally:
            self.request_finished()
        return PreparedResponse(response, request) if isinstance(response, HttpResponse) else response

    def close(self) -> None:
        """End the open streams because the daemon is stopping."""
        self.closing = True
        for end in tuple(self.on_close):
            end()

    async def wait_idle(self) -> None:
        """Wait until no request is pending. Call it after `close`."""
        if self._pending:
            await self._idle.wait()

    async def _handle(self, ctx: RequestContext) -> HttpResponse | web.StreamResponse:
        ctx.by = "admin" if self.admin else "client"
        try:
            response = await self._execute(ctx)
        except ApiException as rejected:
            response = rejected.error
        except Exception as bug:
            if isinstance(bug, ConnectionError) and ctx.is_disconnected:
                raise
            response = self.log_internal_error(ctx, bug)
        return self.respond(ctx, response) if isinstance(response, Response | ApiError) else response

    async def _execute(self, ctx: RequestContext) -> Response | ApiError | web.StreamResponse:
        authorized = self._authorize(ctx, self.match(ctx))
        handler = authorized.resolved.route.handler or run_command
        if authorized.resolved.route.body == "lines":
            return await handler(self, ctx, None)
        if handler is run_command and ctx.request is not None:
            ctx.request.probe = HTTP_VERSION
        body = await self._read_body(ctx) if ctx.head.has_body else b""
        return await handler(self, ctx, self._decode(ctx, authorized, body))

    # -- both paths ----------------------------------------------------------------------------------------------------

    def _ok_response(self, ctx: RequestContext, response: Response) -> HttpResponse:
        lost = partial(self.actor.undelivered, response) if response.grants else None
        return ok_response(
            ctx, response.data, response.status, replayed=response.replayed, close=self.closing, on_lost=lost
        )

    def _authorize(self, ctx: RequestContext, match: RouteMatch) -> AuthorizedRequest:
        """Check the request except for its body. Raises ApiException."""
        resolved = self._resolve(ctx, match)
        if ctx.head.expects not in ACCEPTED_EXPECT:
            raise api_error(
                "expectation_failed",
                "The only supported value of the `Expect` header is `100-continue`. Omit the header.",
            )
        decoder, value = resolved.decoder, None
        if decoder.path_field is not None:
            value = path_value(decoder, match.path_value or "")
            ctx.job_id = value if decoder.path_field == "id" else None
        if ctx.method == hdrs.METH_GET:
            if ctx.head.has_body:
                raise api_error("invalid_request", "A GET request must not have a body.", field="$")
        elif ctx.query:
            raise api_error(
                "invalid_request", "This call takes no query parameters. Send the fields in the body.", field="$"
            )
        elif not (ctx.head.is_json and resolved.route.body == "json"):
            _check_body_type(ctx.head, resolved.route.body)
        return AuthorizedRequest(resolved, value)

    def _decode(self, ctx: RequestContext, authorized: AuthorizedRequest, body: bytes) -> Command:
        """Decode the command, and set the caller and the job in the context."""
        resolved = authorized.resolved
        if ctx.method == hdrs.METH_GET:
            return resolved.decoder.from_query(ctx.query, authorized.path_value)
        ctx.size = len(body)
        if ctx.size > self.limits.body:
            raise self._body_too_large()
        if resolved.route.key:
            self._read_idempotency_key(ctx, resolved.route, body)
        if resolved.route.body == "form":
            return resolved.decoder.from_form(body, authorized.path_value)
        command: Any = resolved.decoder.from_body(body, authorized.path_value)
        if resolved.names_worker:
            ctx.by = f"worker:{command.worker}"
        elif resolved.names_job:
            ctx.job_id = command.id
        return command  # type: ignore[no-any-return]

    def _resolve(self, ctx: RequestContext, match: RouteMatch) -> ResolvedRoute:
        """Authenticate a request, then check Host and Origin, then the path. Raises ApiException."""
        if ctx.head.version[0] != 1:
            raise api_error("invalid_request", "Only HTTP/1.1 and HTTP/1.0 are supported.", field="$")
        resolved = match.resolved
        if resolved is not None:
            ctx.route = resolved.route
        is_reader = False
        if self._requires_token(ctx, resolved):
            is_reader = self.authenticator.authenticate(ctx.head.headers) == "read"
            ctx.admin = self.admin and not is_reader
        if self.authenticator.hosts is not None:
            self.authenticator.check_origin(ctx.head.headers, ctx.connection.sockname)
        if resolved is not None:
            if is_reader:
                ctx.by = "reader"
                check_read_only(resolved.route)
            elif self.admin and resolved.route.auth == "admin" and (resolved.route.changes or resolved.route.secret):
                ctx.operator = operator_of(ctx)
                ctx.by = ctx.operator.by
            return resolved
        if not match.allowed:
            message = (
                "There is no such path. The worker API is under /v1/ on the worker socket, the admin API under "
                "/admin/job-management/ on the admin port. GET /openapi.json lists the paths of this listener."
            )
            if ctx.path.endswith("/artefact"):
                message = f"This path is spelled artifact: {ctx.path.removesuffix('/artefact')}/artifact"
            raise api_error("not_found", message)
        ctx.allow = match.allowed
        raise api_error("method_not_allowed", f"This path supports {', '.join(sorted(match.allowed))}.")

    def _requires_token(self, ctx: RequestContext, resolved: ResolvedRoute | None) -> bool:
        """Return whether the request needs a token. A browser with a session needs none to get a 404."""
        if resolved is not None:
            return resolved.route.auth != "anyone"
        return self._pages is None or not self._pages.is_signed_in(ctx)

    def _error_page(self, ctx: RequestContext, error: ApiError) -> RawBody | None:
        """Render the error as a page if the route is that of a page, or if a browser requests an unknown path."""
        if ctx.route is not None:
            return None if ctx.route.render_error is None else ctx.route.render_error(ctx, error)
        is_browser = "text/html" in ctx.head.headers.get(hdrs.ACCEPT, "")
        return self._pages.error_page(ctx, error) if is_browser and self._pages is not None else None

    async def _read_body(self, ctx: RequestContext) -> bytes:
        """Read the whole body, within its size and time limits."""
        assert ctx.request is not None
        payload = ctx.request.content
        try:
            body = payload.read_nowait() if payload.is_eof() else await self._read_slow_body(ctx, payload)
        except web.RequestPayloadError:
            raise api_error("invalid_request", "The body is malformed: its chunks or its length are wrong.") from None
        if ctx.request.is_truncated:
            raise api_error("invalid_request", "The body ended too early. Send the whole request again.")
        return body

    async def _read_slow_body(self, ctx: RequestContext, payload: StreamReader) -> bytes:
        """Wait for a body that has not arrived completely. Reads at most one chunk more than the limit."""
        if int(ctx.head.headers.get(hdrs.CONTENT_LENGTH, 0)) > self.limits.body:
            raise self._body_too_large()
        send_continue(ctx)
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_deadline_s):
                while len(body) <= self.limits.body and (piece := await payload.readany()):
                    body += piece
        except TimeoutError:
            message = f"The body did not arrive within {self.limits.body_deadline_s:g} s. Send it again."
            raise api_error("request_timeout", message) from None
        return bytes(body)

    def _body_too_large(self) -> ApiException:
        return too_large_error(f"The body is over {self.limits.body} bytes. Split it.", limit=self.limits.body)

    def _read_idempotency_key(self, ctx: RequestContext, route: Route, body: bytes) -> None:
        if IDEMPOTENCY_KEY in ctx.head.headers:
            keys = ctx.head.headers.getall(IDEMPOTENCY_KEY)
            if len(keys) > 1:  # a repetition with one of them would not be recognized
                message = "The Idempotency-Key header was sent more than once. Send one."
                raise api_error("invalid_request", message, field="Idempotency-Key")
            ctx.key = self.authenticator.idempotency_key(keys[0], route.method, unquote(ctx.path), body)

    def error_response(self, ctx: RequestContext, error: ApiError, *, close: bool = False) -> HttpResponse:
        """Record an error, and return its response."""
        self.record_error(ctx.route, ctx.method, error, by=ctx.by, job_id=ctx.job_id)
        close = close or self.closing or error.code == "too_large"
        return error_response(ctx, error, allow=ctx.allow, close=close, page=self._error_page(ctx, error))

    def record_error(self, route: Route | None, method: str, error: ApiError, *, by: str, job_id: str | None) -> None:
        """Count an error, and log it in one line without secrets, rate-limited by code."""
        self.error_counts[error.code] += 1
        if (suppressed := self._log_limiter.suppressed(error.code)) is None:
            return
        path = None if route is None else route.path
        more = {"left_out": suppressed} if suppressed else {}
        log.info("refused", method=method, path=path, code=error.code, by=by, job_id=job_id, **more)

    def log_internal_error(self, ctx: RequestContext, bug: Exception) -> ApiError:
        """Log the type and location of a bug. Its message may contain a secret."""
        route = ctx.route
        at = traceback.extract_tb(bug.__traceback__)[-1]
        log.error(
            "request_bug",
            command=None if route is None else route.request.__name__,
            job_id=ctx.job_id,
            error=type(bug).__name__,
            where=f"{at.filename}:{at.lineno} {at.name}",
        )
        return INTERNAL_ERROR


def check_read_only(route: Route) -> None:
    """Raise a 403 error if a read-only token may not use `route`."""
    if route.changes:
        raise api_error("forbidden", "This token is read-only. Use the admin token to make changes.")
    if route.secret:
        raise api_error("forbidden", "The response contains lock ids. Use the admin token to read it.")


def _check_body_type(head: RequestHead, body: str) -> None:
    if head.has_body or body == "lines":
        check_content_type(head.headers, BODY_TYPES[body])


def send_continue(ctx: RequestContext) -> None:
    """Send `100 Continue` to a client that waits for it before it sends its body."""
    transport = ctx.connection.transport
    if ctx.head.expects and transport is not None:
        transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


class NoFields(Command, frozen=True, kw_only=True):
    """A request without fields."""
