"""Turn HTTP requests into commands for the actor, and its responses into HTTP responses.

Every request is first authorized, before its body has arrived. A request that is one command is then sent to the actor
with `HttpApp.send`, and `HttpApp.respond` encodes the response. `HttpApp.handle` runs the handler of any other request.
"""

from __future__ import annotations

import asyncio
import re
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, Final, Generic, Protocol, TypeVar
from urllib.parse import unquote

import structlog

from jobd.engine.actor import Actor
from jobd.engine.envelope import Envelope, Waiter
from jobd.http.auth import FORM, Authenticator, check_content_type
from jobd.http.decoding import Limits, path_value
from jobd.http.request import BodyError, RequestContext, canceller, operator_of
from jobd.http.response import HttpResponse, RawBody, error_response, ok_response
from jobd.http.routing import ResolvedRoute, Route, Router
from jobd.model.api_call import JSON, LINES
from jobd.model.commands import Cancel
from jobd.model.errors import SHUTTING_DOWN, ApiError, ApiException, api_error, not_leader_error, too_large_error
from jobd.model.journal import JournalOutcomeUnknown, LeadershipLost
from jobd.model.responses import Response

INTERNAL_ERROR: Final = ApiError(
    "internal_error", "This is a bug in jobd. The log shows where it happened. Please report it."
)

OUTCOME_UNKNOWN: Final = ApiError(
    "outcome_unknown",
    "The journal did not respond, so the outcome is unknown. Check whether the action was applied before repeating it.",
    {"outcome": "unknown"},
)
IDEMPOTENCY_KEY: Final = "idempotency-key"
IF_MATCH: Final = "if-match"
_VERSION: Final = re.compile(r'"([0-9a-f]{1,60})"')
SUPPORTED_VERSIONS: Final = frozenset({"1.0", "1.1"})
ACCEPTED_EXPECT: Final = frozenset({"", "100-continue"})  # values of the Expect header
MALFORMED_BODY: Final = ApiError("invalid_request", "The body is malformed: its chunks or its length are wrong.")
TRUNCATED_BODY: Final = ApiError("invalid_request", "The body ended too early. Send the whole request again.")
MAX_LINES_PER_SECOND: Final = 20
IDLE_POLL_S: Final = 0.005
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


class BrowserPages(Protocol):
    """The HTML pages of an app."""

    def is_signed_in(self, ctx: RequestContext) -> bool: ...
    def error_page(self, ctx: RequestContext, error: ApiError) -> RawBody: ...


async def run_command(app: HttpApp[Any], ctx: RequestContext, command: Any) -> Response | ApiError:
    """Handle a request that is one command for the actor, as most are."""
    return await app.actor.ask(
        command,
        by=ctx.by,
        admin=ctx.admin,
        key=ctx.key,
        size=ctx.size,
        operator=ctx.operator,
        expected=ctx.expected,
    )


def _expected_version(ctx: RequestContext, route: Route) -> str:
    version = _VERSION.fullmatch(ctx.header(IF_MATCH))
    if not (ctx.admin and route.takes_version) or version is None:
        message = "Only an action of an operator on a job takes If-Match: the `version` of the job in double quotes."
        raise api_error("invalid_request", message, field="If-Match")
    return version[1]


class HttpApp(Generic[S]):
    """The application behind one listener.

    `routes` has the route of each type of request. `error_counts` counts the errors sent, by code. While `closing`,
    responses say `Connection: close`; `on_close` are the callbacks that end open streams then. `pending` has the
    requests in progress. `pages` are the HTML pages of the app, if it has any. Handlers of requests that only a leader
    may serve wait for what `confirm` returns. The actor does so for commands.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        routes: Iterable[Route] | Router,
        actor: Actor,
        services: S,
        *,
        limits: Limits | None = None,
        admin: bool = False,
        pages: BrowserPages | None = None,
        unrouted: Callable[[], ApiError] | None = None,
    ) -> None:
        self.authenticator = authenticator
        self.limits = limits or Limits()
        self.admin = admin
        self.closing = False
        self.confirm: Callable[[], Awaitable[None] | None] = lambda: None
        self.on_close: set[Callable[[], None]] = set()
        self.error_counts: Counter[str] = Counter()
        self.pending: set[RequestContext] = set()
        self._bodies: set[asyncio.Timeout] = set()  # the time limits of bodies that handlers wait for
        self._changes: set[asyncio.Future[Response | ApiError | None]] = set()  # handlers that run to their end
        self._rejects_incomplete = False
        self._log_limiter = LogRateLimiter()
        self.serve(routes, actor, services, pages=pages, unrouted=unrouted)

    def serve(
        self,
        routes: Iterable[Route] | Router,
        actor: Actor,
        services: S,
        *,
        pages: BrowserPages | None = None,
        unrouted: Callable[[], ApiError] | None = None,
        guard: Callable[[], ApiError | None] | None = None,
    ) -> None:
        """Serve these routes from now on. `unrouted` returns the error of all other requests, instead of a 404 or 405.

        `guard` returns the error of requests that only a leader may serve, if this node does not lead. Open connections
        stay open, and requests in progress continue.
        """
        self.actor = actor
        self.services = services
        self._pages = pages
        self._unrouted = unrouted
        self._guard = guard
        self._router = routes if isinstance(routes, Router) else Router(routes, self.limits)
        self.routes = {route.request: route for route in self._router.routes}

    # -- requests ------------------------------------------------------------------------------------------------------

    def authorize(self, ctx: RequestContext) -> HttpResponse | None:
        """Find the route of a request, and check all but its body. Return an HTTP response if it is rejected."""
        try:
            found, value = self._router.match(ctx.method, ctx.path)
            resolved = self._resolve(ctx, found)
            if "expect" in ctx.headers and ctx.header("expect").lower() not in ACCEPTED_EXPECT:
                raise api_error(
                    "expectation_failed",
                    "The only supported value of the `Expect` header is `100-continue`. Omit the header.",
                )
            if value is not None:
                ctx.path_value = path_value(resolved.decoder, value)
                if resolved.decoder.path_field == "id":
                    ctx.job_id = value
            if ctx.method == "GET":
                if ctx.has_body:
                    raise api_error("invalid_request", "A GET request must not have a body.", field="$")
            elif ctx.query:
                raise api_error(
                    "invalid_request", "This call takes no query parameters. Send the fields in the body.", field="$"
                )
            elif ctx.has_body or resolved.route.body == "lines":
                check_content_type(ctx.headers, BODY_TYPES[resolved.route.body])
            return None
        except ApiException as rejected:
            return self.error_response(ctx, rejected.error)
        except Exception as bug:
            return self.error_response(ctx, self.log_internal_error(ctx, bug))

    def send(self, ctx: RequestContext, body: bytes | bytearray, responder: Waiter) -> HttpResponse | None:
        """Send the request's command to the actor. `responder` receives the actor's response.

        Return an HTTP response if the request is rejected.
        """
        if ctx.is_truncated:
            return self.error_response(ctx, TRUNCATED_BODY, close=True)
        if type(body) is not bytes:
            body = bytes(body)
        try:
            command = self._decode(ctx, body)
            sent = self.actor.send(
                command, responder, by=ctx.by, admin=ctx.admin, key=ctx.key, size=len(body), operator=ctx.operator
            )
            if isinstance(sent, Envelope):
                ctx.envelope = sent
                return None
        except ApiException as rejected:
            sent = rejected.error
        except Exception as bug:
            sent = self.log_internal_error(ctx, bug)
        return self.error_response(ctx, sent)

    def respond(self, ctx: RequestContext, response: Response | ApiError) -> HttpResponse:
        """Make the HTTP response from the actor's response."""
        if isinstance(response, Response):
            try:
                return self._ok_response(response)
            except Exception as bug:
                if response.grants:
                    self.actor.undelivered(response)
                response = self.log_internal_error(ctx, bug)
        return self.error_response(ctx, response)

    def prepare(self, ctx: RequestContext, response: Response) -> HttpResponse | None:
        """Make the HTTP response before the commit of `response`. Return None if that is not possible yet."""
        try:
            return None if self.closing else self._ok_response(response)
        except Exception:
            return None  # `respond` fails in the same way and logs the bug

    async def handle(self, ctx: RequestContext) -> HttpResponse | None:
        """Run the handler of a request. Return None if it has streamed the response.

        A bug causes a 500 and one log line. Raises ConnectionError if the client has disconnected.
        """
        try:
            response = await self._execute(ctx)
        except ApiException as rejected:
            response = rejected.error
        except LeadershipLost:
            response = not_leader_error(None)  # of a write without the actor, such as that of a webhook's outbox
        except JournalOutcomeUnknown:
            response = OUTCOME_UNKNOWN
        except Exception as bug:
            if isinstance(bug, ConnectionError) and ctx.is_disconnected:
                raise
            response = self.log_internal_error(ctx, bug)
        return None if response is None else self.respond(ctx, response)

    def close(self) -> None:
        """End the open streams because the daemon is stopping."""
        self.closing = True
        for end in tuple(self.on_close):
            end()

    def cut_off_revoked(self) -> None:
        """Cut off the streams and waiting claims whose token is no longer valid."""
        for ctx in tuple(self.pending):
            if ctx.route is not None and ctx.route.auth != "anyone" and ctx.route.is_long_lived:
                try:
                    self.authenticator.authenticate(ctx.headers)
                except ApiException:
                    ctx.abort()

    def reject_incomplete(self) -> None:
        """Reject requests whose body has not arrived, as after its deadline, because the daemon is stopping."""
        self._rejects_incomplete = True
        for limit in self._bodies:
            if not limit.expired():
                limit.reschedule(0)

    async def wait_idle(self) -> None:
        """Wait until no request is pending and no change is running. Call it after `close`."""
        while self.pending or self._changes:  # noqa: ASYNC110 - an event would cost every request
            await asyncio.sleep(IDLE_POLL_S)

    async def _execute(self, ctx: RequestContext) -> Response | ApiError | None:
        assert ctx.route is not None
        handler = ctx.route.handler or run_command
        if not ctx.route.on_standby and (confirming := self.confirm()) is not None:
            await confirming
        if ctx.route.body == "lines":
            return await handler(self, ctx, None)
        body = await self._read_body(ctx) if ctx.has_body else b""
        ctx.size = len(body)
        work = handler(self, ctx, self._decode(ctx, body))
        if handler is run_command or not ctx.route.changes:
            return await work
        # Runs to its end even if the client disconnects, because the audit entry is written last.
        change = asyncio.ensure_future(work)
        self._changes.add(change)
        change.add_done_callback(self._changes.discard)
        return await asyncio.shield(change)

    def _ok_response(self, response: Response) -> HttpResponse:
        lost = partial(self.actor.undelivered, response) if response.grants else None
        return ok_response(response, self.closing, lost)

    def _decode(self, ctx: RequestContext, body: bytes) -> Any:
        resolved = ctx.resolved
        assert resolved is not None
        if ctx.method == "GET":
            return resolved.decoder.from_query(ctx.query, ctx.path_value)
        if len(body) > self.limits.body:
            raise ApiException(self.body_too_large())
        if IDEMPOTENCY_KEY in ctx.headers and resolved.route.key:
            self._read_idempotency_key(ctx, resolved.route, body)
        if IF_MATCH in ctx.headers:
            ctx.expected = _expected_version(ctx, resolved.route)
        command = resolved.decode(body, ctx.path_value)
        ctx.by = canceller(ctx) if type(command) is Cancel and not self.admin else command.sender() or ctx.by
        if len(job_ids := command.job_ids()) == 1:
            ctx.job_id = job_ids[0]
        return command

    def _resolve(self, ctx: RequestContext, resolved: ResolvedRoute | None) -> ResolvedRoute:
        """Authenticate a request, then check Host and Origin, then the path. Raises ApiException."""
        check_framing(ctx)
        ctx.resolved = resolved
        is_reader = False
        if self.admin:
            ctx.by = "admin"
        if (not self._is_signed_in(ctx)) if resolved is None else resolved.route.auth != "anyone":
            is_reader = self.authenticator.authenticate(ctx.headers) == "read"
            if self.admin:
                ctx.admin = not is_reader
        if self.authenticator.hosts is not None:
            self.authenticator.check_origin(ctx.headers, ctx.local_address)
        if resolved is not None:
            if self._guard is not None and not resolved.route.on_standby and (error := self._guard()) is not None:
                raise ApiException(error)
            if is_reader:
                ctx.by = "reader"
                check_read_only(resolved.route)
            elif self.admin and resolved.route.auth == "admin" and (resolved.route.changes or resolved.route.secret):
                ctx.operator = operator_of(ctx)
                ctx.by = ctx.operator.by
            return resolved
        if self._unrouted is not None:
            raise ApiException(self._unrouted())
        allowed = self._router.allowed(ctx.path)
        if not allowed:
            message = (
                "There is no such path. The worker API is under /v1/ on the worker socket, the admin API under "
                "/admin/job-management/ on the admin port. GET /openapi.json lists the paths of this listener."
            )
            if ctx.path.endswith("/artefact"):
                message = f"This path is spelled artifact: {ctx.path.removesuffix('/artefact')}/artifact"
            raise api_error("not_found", message)
        ctx.allow = allowed
        raise api_error("method_not_allowed", f"This path supports {', '.join(sorted(allowed))}.")

    def _is_signed_in(self, ctx: RequestContext) -> bool:
        """Return whether a browser has a session. It needs no token to get a 404."""
        return self._pages is not None and self._pages.is_signed_in(ctx)

    def _error_page(self, ctx: RequestContext, error: ApiError) -> RawBody | None:
        """Render the error as a page if the route is that of a page, or if a browser requests an unknown path."""
        if ctx.route is not None:
            return None if ctx.route.render_error is None else ctx.route.render_error(ctx, error)
        is_browser = "text/html" in ctx.header("accept")
        return self._pages.error_page(ctx, error) if is_browser and self._pages is not None else None

    async def _read_body(self, ctx: RequestContext) -> bytes:
        if self.announces_too_much(ctx):
            raise ApiException(self.body_too_large())
        ctx.send_continue()
        body = bytearray()
        limit = asyncio.timeout(self.limits.body_deadline_s)
        try:
            async with limit:
                self._bodies.add(limit)
                while len(body) <= self.limits.body and (piece := await ctx.read()):
                    body += piece
        except TimeoutError:
            raise ApiException(self.body_too_late()) from None
        except BodyError:
            raise ApiException(MALFORMED_BODY) from None
        finally:
            self._bodies.discard(limit)
        if ctx.is_truncated:
            raise ApiException(TRUNCATED_BODY)
        return bytes(body)

    def announces_too_much(self, ctx: RequestContext) -> bool:
        """Return whether the Content-Length is over the limit of a body."""
        digits = ctx.headers.get("content-length", b"").strip().lstrip(b"0")  # int() takes at most 4,300 digits
        return int(digits or 0) > self.limits.body

    def body_too_large(self) -> ApiError:
        """Return the error of a body over its limit."""
        return too_large_error(f"The body is over {self.limits.body} bytes. Split it.", limit=self.limits.body).error

    def body_too_late(self) -> ApiError:
        """Return the error of a body that did not arrive in time."""
        if self._rejects_incomplete:
            return SHUTTING_DOWN
        message = f"The body did not arrive within {self.limits.body_deadline_s:g} s. Send it again."
        return ApiError("request_timeout", message)

    def _read_idempotency_key(self, ctx: RequestContext, route: Route, body: bytes) -> None:
        if IDEMPOTENCY_KEY in ctx.repeated:  # a repetition with one of them would not be recognized
            message = "The Idempotency-Key header was sent more than once. Send one."
            raise api_error("invalid_request", message, field="Idempotency-Key")
        key = ctx.header(IDEMPOTENCY_KEY)
        ctx.key = self.authenticator.idempotency_key(key, route.method, unquote(ctx.path), body)

    def error_response(self, ctx: RequestContext, error: ApiError, *, close: bool = False) -> HttpResponse:
        """Record an error, and return its response."""
        self.record_error(ctx.route, ctx.method, error, by=ctx.by, job_id=ctx.job_id)
        close = close or self.closing or error.code == "too_large"
        return error_response(error, allow=ctx.allow, close=close, page=self._error_page(ctx, error))

    def bug_response(self, ctx: RequestContext, bug: Exception) -> HttpResponse:
        """Return the response to a bug of a connection. It omits the text of the exception, which may have a token."""
        log.error("connection_bug", error=type(bug).__name__)
        return self.error_response(ctx, INTERNAL_ERROR, close=True)

    def record_error(self, route: Route | None, method: str, error: ApiError, *, by: str, job_id: str | None) -> None:
        """Count an error, and log it in one line without secrets, rate-limited by code."""
        self.error_counts[error.code] += 1
        if (suppressed := self._log_limiter.suppressed(error.code)) is None:
            return
        path = None if route is None else route.path
        more = {"left_out": suppressed} if suppressed else {}
        log.info("rejected", method=method, path=path, code=error.code, by=by, job_id=job_id, **more)

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


def check_framing(ctx: RequestContext) -> None:
    """Raise a 400 error if a proxy might see another end of the request. The connection closes after the response."""
    coding = ctx.headers.get("transfer-encoding")
    if ctx.version not in SUPPORTED_VERSIONS:
        message = "Only HTTP/1.1 and HTTP/1.0 are supported."
    elif coding is not None and (ctx.version != "1.1" or b"identity" in coding.lower()):  # RFC 9112, 6.1
        message = "The Transfer-Encoding is `identity`, or the version is not HTTP/1.1. Use `chunked` with HTTP/1.1."
    else:
        return
    ctx.keep_alive = False
    raise api_error("invalid_request", message, field="$")


def check_read_only(route: Route) -> None:
    """Raise a 403 error if a read-only token may not use `route`."""
    if route.changes:
        raise api_error("forbidden", "This token is read-only. Use the admin token to make changes.")
    if route.secret:
        raise api_error("forbidden", "The response contains lock ids. Use the admin token to read it.")
