"""Between HTTP and commands: find the route, let in or refuse, decode, ask, encode.

Decides nothing about jobs. The walk of a request: `Web.send` (bytes to command), the actor, `Web.reply`; or all of
that in `Web.handle`, for a request that has to be waited for.
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

INTERNAL_ERROR: Final = ApiError("internal_error", "This is a bug in jobd. Its log names the place; please report it.")

IDEMPOTENCY_KEY: Final = istr("Idempotency-Key")
ACCEPTED_EXPECT: Final = frozenset({"", "100-continue"})  # values of the Expect header that are accepted
MAX_LINES_PER_SECOND: Final = 20  # of each kind: enough to see what happens, whatever a client does
BODY_TYPES: Final = {"json": JSON, "lines": LINES, "form": FORM}

log = structlog.get_logger("jobd.web")


S = TypeVar("S")  # the services behind an API


class LogRateLimiter:
    """Counts lines by their kind. `now` gives a time in seconds that does not run backwards."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._second = 0
        self._seen: Counter[str] = Counter()
        self._suppressed: Counter[str] = Counter()

    def suppressed(self, kind: str) -> int | None:
        """None where this line is to be left out; else how many were, since the last one of its kind was written."""
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
    """The actor as the doors see it: the only way to job state."""

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
        """`size` is what the command holds in memory while it waits, in bytes; `expected` the version of its job."""

    def send(
        self,
        command: Any,
        waiter: Waiter,
        *,
        by: str = "client",
        admin: bool = False,
        key: IdempotencyKey | None,
        size: int,
        operator: Operator | None = None,
        in_line: bool = False,
    ) -> Envelope | ApiError:
        """As `ask`, for those who do not wait for the answer but are called with it.

        `in_line`: it has to be decided behind what its sender has sent before.
        """

    def abandon(self, asked: Envelope) -> None:
        """Nobody waits any more for what was sent."""

    def undelivered(self, answer: Response) -> None:
        """The reply could not be delivered: its grants are released."""


class BrowserPages(Protocol):
    """The pages beside an API: `knows` says whether the visit comes from a browser that is signed in."""

    def is_signed_in(self, ctx: RequestContext) -> bool: ...
    def error_page(self, ctx: RequestContext, refusal: ApiError) -> RawBody: ...


async def run_command(app: App[Any], ctx: RequestContext, command: Any) -> Response | ApiError:
    """The way of almost every route: one command to the actor."""
    return await app.actor.ask(command, by=ctx.by, admin=ctx.admin, key=ctx.key, size=ctx.size, operator=ctx.operator)


class AdmittedRequest(Struct, frozen=True):
    """A request that may come in: its way, and what its path gives."""

    resolved: ResolvedRoute
    path_value: str | None


class App(Generic[S]):
    """One API behind one door. `refusals` counts every refusal sent, by code.

    `closing`: the daemon is going down; answers say `Connection: close`. `ends` are called when that begins: streams
    that would go on end then. `pages` are those beside the API, for browsers.
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
        self._router = Router(routes, self.limits)
        self._log_limiter = LogRateLimiter()

    # -- the short way: a whole request, answered without a task of its own -------------------------------------------

    def match(self, ctx: RequestContext) -> RouteMatch:
        """What the request's path is."""
        return self._router.match(ctx.method, ctx.path)

    def send(self, ctx: RequestContext, found: RouteMatch, body: bytes, waiter: Waiter) -> Envelope | HttpResponse:
        """The request on its way to the actor, whose answer `waiter` gets; or the reply, where it comes no further.

        Between `send` and `landed` the request counts as one that is being handled.
        """
        self._pending += 1
        ctx.by = "admin" if self.admin else "client"
        try:
            command = self._decode(ctx, self._admit(ctx, found), body)
            asked = self.actor.send(
                command,
                waiter,
                by=ctx.by,
                admin=ctx.admin,
                key=ctx.key,
                size=ctx.size,
                operator=ctx.operator,
            )
        except ApiException as no:
            asked = no.error
        except Exception as bug:
            asked = self.log_internal_error(ctx, bug)
        return self.error_response(ctx, asked) if isinstance(asked, ApiError) else asked

    def respond(self, ctx: RequestContext, answer: Response | ApiError) -> HttpResponse:
        """The actor's answer as it leaves."""
        if isinstance(answer, Response):
            try:
                return self._ok_response(ctx, answer)
            except Exception as bug:
                if answer.grants:
                    self.actor.undelivered(answer)
                answer = self.log_internal_error(ctx, bug)
        return self.error_response(ctx, answer)

    def prepare(self, ctx: RequestContext, answer: Response) -> HttpResponse | None:
        """What `reply` will make of `answer`, made before its commit. None where that is not known yet."""
        try:
            return None if self.closing else self._ok_response(ctx, answer)
        except Exception:
            return None  # `reply` meets the same bug, and tells of it

    def request_finished(self) -> None:
        """A request has its answer, or will have none."""
        self._pending -= 1
        if self.closing and not self._pending:
            self._idle.set()

    # -- the long way: aiohttp's ---------------------------------------------------------------------------------------

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """The answer to a request; a bug on the way is a 500 and one log line."""
        assert isinstance(request, HttpRequest)
        self._pending += 1
        try:
            answer = await self._handle(request.ctx)
        finally:
            self.request_finished()
        return PreparedResponse(answer, request) if isinstance(answer, HttpResponse) else answer

    def close(self) -> None:
        """The daemon is going down: what goes on by itself ends."""
        self.closing = True
        for end in tuple(self.on_close):
            end()

    async def wait_idle(self) -> None:
        """Waits until no request is being handled. Only for a door that is closing."""
        if self._pending:
            await self._idle.wait()

    async def _handle(self, ctx: RequestContext) -> HttpResponse | web.StreamResponse:
        ctx.by = "admin" if self.admin else "client"
        try:
            answer = await self._execute(ctx)
        except ApiException as no:
            answer = no.error
        except Exception as bug:
            if isinstance(bug, ConnectionError) and ctx.is_disconnected:
                raise
            answer = self.log_internal_error(ctx, bug)
        return self.respond(ctx, answer) if isinstance(answer, Response | ApiError) else answer

    async def _execute(self, ctx: RequestContext) -> Response | ApiError | web.StreamResponse:
        entry = self._admit(ctx, self.match(ctx))
        via = entry.resolved.route.handler or run_command
        if entry.resolved.route.body == "lines":
            return await via(self, ctx, None)
        if via is run_command and ctx.request is not None:
            ctx.request.probe = HTTP_VERSION
        body = await self._read_body(ctx) if ctx.head.has_body else b""
        return await via(self, ctx, self._decode(ctx, entry, body))

    # -- steps of both -------------------------------------------------------------------------------------------------

    def _ok_response(self, ctx: RequestContext, answer: Response) -> HttpResponse:
        lost = partial(self.actor.undelivered, answer) if answer.grants else None
        return ok_response(ctx, answer.data, answer.status, replayed=answer.replayed, close=self.closing, on_lost=lost)

    def _admit(self, ctx: RequestContext, found: RouteMatch) -> AdmittedRequest:
        """All that is judged before the body: who asks, and for what."""
        way = self._resolve(ctx, found)
        if ctx.head.expects not in ACCEPTED_EXPECT:
            raise api_error("expectation_failed", "The header `Expect` may only be `100-continue`. Leave it out.")
        shape, value = way.decoder, None
        if shape.path_field is not None:
            value = path_value(shape, found.path_value or "")
            ctx.job_id = value if shape.path_field == "id" else None
        if ctx.method == hdrs.METH_GET:
            if ctx.head.has_body:
                raise api_error("invalid_request", "A GET takes no body.", field="$")
        elif ctx.query:
            raise api_error("invalid_request", "This call takes no query. Put the fields into the body.", field="$")
        elif not (ctx.head.is_json and way.route.body == "json"):  # as nearly all
            _check_body_type(ctx.head, way.route.body)
        return AdmittedRequest(way, value)

    def _decode(self, ctx: RequestContext, entry: AdmittedRequest, body: bytes) -> Command:
        """What the request asks for, and what that says of itself: who asks, about which job."""
        way = entry.resolved
        if ctx.method == hdrs.METH_GET:
            return way.decoder.from_query(ctx.query, entry.path_value)
        ctx.size = len(body)
        if ctx.size > self.limits.body:
            raise self._body_too_large()
        if way.route.key:
            self._read_idempotency_key(ctx, way.route, body)
        if way.route.body == "form":
            return way.decoder.from_form(body, entry.path_value)
        command: Any = way.decoder.from_body(body, entry.path_value)
        if way.names_worker:
            ctx.by = f"worker:{command.worker}"
        elif way.names_job:
            ctx.job_id = command.id
        return command  # type: ignore[no-any-return]

    def _resolve(self, ctx: RequestContext, found: RouteMatch) -> ResolvedRoute:
        """The way of a request that may come in. The token is judged first, then Host and Origin, then the path."""
        if ctx.head.version[0] != 1:
            raise api_error("invalid_request", "Only HTTP/1.1 and HTTP/1.0 are spoken here.", field="$")
        way = found.resolved
        if way is not None:
            ctx.route = way.route
        is_reader = False
        if self._requires_token(ctx, way):
            is_reader = self.authenticator.authenticate(ctx.head.headers) == "read"
            ctx.admin = self.admin and not is_reader
        if self.authenticator.hosts is not None:
            self.authenticator.check_origin(ctx.head.headers, ctx.connection.sockname)
        if way is not None:
            if is_reader:
                ctx.by = "reader"
                check_read_only(way.route)
            elif self.admin and way.route.auth == "admin" and (way.route.changes or way.route.secret):
                ctx.operator = operator_of(ctx)
                ctx.by = ctx.operator.by
            return way
        if not found.allowed:
            message = (
                "There is no such path here. Workers' calls are under /v1/ on the worker socket, operators' under "
                "/admin/job-management/ on the admin port. GET /openapi.json lists those of this door."
            )
            if ctx.path.endswith("/artefact"):
                message = f"This path is spelled artifact: {ctx.path.removesuffix('/artefact')}/artifact"
            raise api_error("not_found", message)
        ctx.allow = found.allowed
        raise api_error("method_not_allowed", f"This path takes {', '.join(sorted(found.allowed))}.")

    def _requires_token(self, ctx: RequestContext, way: ResolvedRoute | None) -> bool:
        """Whether whoever asks has to show one. A browser that is signed in has none, and may hear of paths."""
        if way is not None:
            return way.route.auth != "anyone"
        return self._pages is None or not self._pages.is_signed_in(ctx)

    def _error_page(self, ctx: RequestContext, refusal: ApiError) -> RawBody | None:
        """The refusal as a page, where a page was asked for, or a browser asks for what is not there."""
        if ctx.route is not None:
            return None if ctx.route.render_error is None else ctx.route.render_error(ctx, refusal)
        is_browser = "text/html" in ctx.head.headers.get(hdrs.ACCEPT, "")
        return self._pages.error_page(ctx, refusal) if is_browser and self._pages is not None else None

    async def _read_body(self, ctx: RequestContext) -> bytes:
        """The whole body, within its size and its time."""
        assert ctx.request is not None
        payload = ctx.request.content
        try:
            body = payload.read_nowait() if payload.is_eof() else await self._read_slow_body(ctx, payload)
        except web.RequestPayloadError:
            raise api_error("invalid_request", "The body is broken: its chunks or its length are wrong.") from None
        if ctx.request.is_truncated:
            raise api_error("invalid_request", "The body ended too early. Send the whole request again.")
        return body

    async def _read_slow_body(self, ctx: RequestContext, payload: StreamReader) -> bytes:
        """A body that has not arrived yet, up to one piece over its limit."""
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
            if len(keys) > 1:  # a repeat that carries one of them would not be known
                message = "Idempotency-Key was sent more than once. Send one."
                raise api_error("invalid_request", message, field="Idempotency-Key")
            ctx.key = self.authenticator.idempotency_key(keys[0], route.method, unquote(ctx.path), body)

    def error_response(self, ctx: RequestContext, refusal: ApiError, *, close: bool = False) -> HttpResponse:
        """The reply to a refused request."""
        self.record_error(ctx.route, ctx.method, refusal, by=ctx.by, job_id=ctx.job_id)
        close = close or self.closing or refusal.code == "too_large"
        return error_response(ctx, refusal, allow=ctx.allow, close=close, page=self._error_page(ctx, refusal))

    def record_error(self, route: Route | None, method: str, refusal: ApiError, *, by: str, job_id: str | None) -> None:
        """A refusal is counted, and logged in one line without a secret."""
        self.error_counts[refusal.code] += 1
        # Any client can be refused as often as it likes: that must not fill the log.
        if (left_out := self._log_limiter.suppressed(refusal.code)) is None:
            return
        path = None if route is None else route.path
        more = {"left_out": left_out} if left_out else {}
        log.info("refused", method=method, path=path, code=refusal.code, by=by, job_id=job_id, **more)

    def log_internal_error(self, ctx: RequestContext, bug: Exception) -> ApiError:
        """A bug costs one visit. Its text may hold a secret, so the log names only its type and place."""
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
    """403 where who may only look would change something, or see secrets."""
    if route.changes:
        raise api_error("forbidden", "This token may only look. To change something use the admin token.")
    if route.secret:
        raise api_error("forbidden", "What this gives holds the secrets of locks: it wants the admin token.")


def _check_body_type(head: RequestHead, reads: str) -> None:
    if head.has_body or reads == "lines":
        check_content_type(head.headers, BODY_TYPES[reads])


def send_continue(ctx: RequestContext) -> None:
    """Tell a client that waits for leave to send its body (`Expect: 100-continue`) to go on."""
    transport = ctx.connection.transport
    if ctx.head.expects and transport is not None:
        transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


# ---------------------------------------------------------------------------------------------------------------------
# Liveness and readiness: the same at every door, without a token.


class NoFields(Command, frozen=True, kw_only=True):
    """A call that takes no fields."""
