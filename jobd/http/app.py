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
from jobd.http.auth import FORM, JSON, LINES, Gate, check_kind
from jobd.http.decoding import Limits, path_value
from jobd.http.request import Head, Request, Visit, operator_of
from jobd.http.response import HTTP_VERSION, Letter, Reply, Text, accepted, refusing
from jobd.http.routing import Found, Route, Table, Way
from jobd.model.commands import Command, IdempotencyKey, Operator
from jobd.model.errors import ApiError, ApiException, api_error, too_large_error
from jobd.model.responses import Response

BUG: Final = ApiError("internal_error", "This is a bug in jobd. Its log names the place; please report it.")

IDEMPOTENCY_KEY: Final = istr("Idempotency-Key")
MET: Final = frozenset({"", "100-continue"})  # values of the Expect header that are accepted
MOST_A_SECOND: Final = 20  # of each kind: enough to see what happens, whatever a client does
KINDS: Final = {"json": JSON, "lines": LINES, "form": FORM}

log = structlog.get_logger("jobd.web")


S = TypeVar("S")  # the services behind an API


class Sparing:
    """Counts lines by their kind. `now` gives a time in seconds that does not run backwards."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._second = 0
        self._seen: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()

    def left_out(self, kind: str) -> int | None:
        """None where this line is to be left out; else how many were, since the last one of its kind was written."""
        second = int(self._now())
        if second != self._second:
            self._second = second
            self._seen.clear()
        self._seen[kind] += 1
        if self._seen[kind] <= MOST_A_SECOND:
            return self._left_out.pop(kind, 0)
        self._left_out[kind] += 1
        return None


class Ask(Protocol):
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


class Pages(Protocol):
    """The pages beside an API: `knows` says whether the visit comes from a browser that is signed in."""

    def knows(self, visit: Visit) -> bool: ...
    def refusal_page(self, visit: Visit, refusal: ApiError) -> Text: ...


async def ask(site: Web[Any], visit: Visit, command: Any) -> Response | ApiError:
    """The way of almost every route: one command to the actor."""
    return await site.actor.ask(
        command, by=visit.by, admin=visit.admin, key=visit.key, size=visit.size, operator=visit.operator
    )


class Entry(Struct, frozen=True):
    """A request that may come in: its way, and what its path gives."""

    way: Way
    value: str | None


class Web(Generic[S]):
    """One API behind one door. `refusals` counts every refusal sent, by code.

    `closing`: the daemon is going down; answers say `Connection: close`. `ends` are called when that begins: streams
    that would go on end then. `pages` are those beside the API, for browsers.
    """

    def __init__(
        self,
        gate: Gate,
        routes: Iterable[Route],
        actor: Ask,
        rooms: S,
        *,
        limits: Limits | None = None,
        admin: bool = False,
        pages: Pages | None = None,
    ) -> None:
        self.gate = gate
        self.actor = actor
        self.rooms = rooms
        self.limits = limits or Limits()
        self.admin = admin
        self.closing = False
        self.ends: set[Callable[[], None]] = set()
        self.refusals: Counter[str] = Counter()
        self._in_flight = 0
        self._quiet = asyncio.Event()
        self._pages = pages
        self._table = Table(routes, self.limits)
        self._sparing = Sparing()

    # -- the short way: a whole request, answered without a task of its own -------------------------------------------

    def find(self, visit: Visit) -> Found:
        """What the request's path is."""
        return self._table.find(visit.method, visit.path)

    def send(self, visit: Visit, found: Found, body: bytes, waiter: Waiter) -> Envelope | Reply:
        """The request on its way to the actor, whose answer `waiter` gets; or the reply, where it comes no further.

        Between `send` and `landed` the request counts as one that is being handled.
        """
        self._in_flight += 1
        visit.by = "admin" if self.admin else "client"
        try:
            command = self._command(visit, self._enter(visit, found), body)
            asked = self.actor.send(
                command,
                waiter,
                by=visit.by,
                admin=visit.admin,
                key=visit.key,
                size=visit.size,
                operator=visit.operator,
            )
        except ApiException as no:
            asked = no.error
        except Exception as bug:
            asked = self.confess(visit, bug)
        return self.refuse(visit, asked) if isinstance(asked, ApiError) else asked

    def reply(self, visit: Visit, answer: Response | ApiError) -> Reply:
        """The actor's answer as it leaves."""
        if isinstance(answer, Response):
            try:
                return self._accept(visit, answer)
            except Exception as bug:
                if answer.grants:
                    self.actor.undelivered(answer)
                answer = self.confess(visit, bug)
        return self.refuse(visit, answer)

    def prepared(self, visit: Visit, answer: Response) -> Reply | None:
        """What `reply` will make of `answer`, made before its commit. None where that is not known yet."""
        try:
            return None if self.closing else self._accept(visit, answer)
        except Exception:
            return None  # `reply` meets the same bug, and tells of it

    def landed(self) -> None:
        """A request has its answer, or will have none."""
        self._in_flight -= 1
        if self.closing and not self._in_flight:
            self._quiet.set()

    # -- the long way: aiohttp's ---------------------------------------------------------------------------------------

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """The answer to a request; a bug on the way is a 500 and one log line."""
        assert isinstance(request, Request)
        self._in_flight += 1
        try:
            answer = await self._handled(request.visit)
        finally:
            self.landed()
        return Letter(answer, request) if isinstance(answer, Reply) else answer

    def close(self) -> None:
        """The daemon is going down: what goes on by itself ends."""
        self.closing = True
        for end in tuple(self.ends):
            end()

    async def quiet(self) -> None:
        """Waits until no request is being handled. Only for a door that is closing."""
        if self._in_flight:
            await self._quiet.wait()

    async def _handled(self, visit: Visit) -> Reply | web.StreamResponse:
        visit.by = "admin" if self.admin else "client"
        try:
            answer = await self._answer(visit)
        except ApiException as no:
            answer = no.error
        except Exception as bug:
            if isinstance(bug, ConnectionError) and visit.is_cut:
                raise
            answer = self.confess(visit, bug)
        return self.reply(visit, answer) if isinstance(answer, Response | ApiError) else answer

    async def _answer(self, visit: Visit) -> Response | ApiError | web.StreamResponse:
        entry = self._enter(visit, self.find(visit))
        via = entry.way.route.via or ask
        if entry.way.route.reads == "lines":
            return await via(self, visit, None)
        if via is ask and visit.request is not None:
            visit.request.probe = HTTP_VERSION
        body = await self._body(visit) if visit.head.has_body else b""
        return await via(self, visit, self._command(visit, entry, body))

    # -- steps of both -------------------------------------------------------------------------------------------------

    def _accept(self, visit: Visit, answer: Response) -> Reply:
        lost = partial(self.actor.undelivered, answer) if answer.grants else None
        return accepted(visit, answer.data, answer.status, replayed=answer.replayed, close=self.closing, lost=lost)

    def _enter(self, visit: Visit, found: Found) -> Entry:
        """All that is judged before the body: who asks, and for what."""
        way = self._admit(visit, found)
        if visit.head.expects not in MET:
            raise api_error("expectation_failed", "The header `Expect` may only be `100-continue`. Leave it out.")
        shape, value = way.shape, None
        if shape.given is not None:
            value = path_value(shape, found.given or "")
            visit.job_id = value if shape.given == "id" else None
        if visit.method == hdrs.METH_GET:
            if visit.head.has_body:
                raise api_error("invalid_request", "A GET takes no body.", field="$")
        elif visit.query:
            raise api_error("invalid_request", "This call takes no query. Put the fields into the body.", field="$")
        elif not (visit.head.is_json and way.route.reads == "json"):  # as nearly all
            _check_kind(visit.head, way.route.reads)
        return Entry(way, value)

    def _command(self, visit: Visit, entry: Entry, body: bytes) -> Command:
        """What the request asks for, and what that says of itself: who asks, about which job."""
        way = entry.way
        if visit.method == hdrs.METH_GET:
            return way.shape.from_query(visit.query, entry.value)
        visit.size = len(body)
        if visit.size > self.limits.body:
            raise self._body_too_large()
        if way.route.key:
            self._note_key(visit, way.route, body)
        if way.route.reads == "form":
            return way.shape.from_form(body, entry.value)
        command: Any = way.shape.from_body(body, entry.value)
        if way.names_worker:
            visit.by = f"worker:{command.worker}"
        elif way.names_job:
            visit.job_id = command.id
        return command  # type: ignore[no-any-return]

    def _admit(self, visit: Visit, found: Found) -> Way:
        """The way of a request that may come in. The token is judged first, then Host and Origin, then the path."""
        if visit.head.version[0] != 1:
            raise api_error("invalid_request", "Only HTTP/1.1 and HTTP/1.0 are spoken here.", field="$")
        way = found.way
        if way is not None:
            visit.route = way.route
        is_reader = False
        if self._wants_token(visit, way):
            is_reader = self.gate.admit(visit.head.headers) == "read"
            visit.admin = self.admin and not is_reader
        if self.gate.hosts is not None:
            self.gate.check_origin(visit.head.headers, visit.connection.sockname)
        if way is not None:
            if is_reader:
                visit.by = "reader"
                check_reader(way.route)
            elif self.admin and way.route.who == "admin" and (way.route.changes or way.route.secret):
                visit.operator = operator_of(visit)
                visit.by = visit.operator.by
            return way
        if not found.allowed:
            message = (
                "There is no such path here. Workers' calls are under /v1/ on the worker socket, operators' under "
                "/admin/job-management/ on the admin port. GET /openapi.json lists those of this door."
            )
            if visit.path.endswith("/artefact"):
                message = f"This path is spelled artifact: {visit.path.removesuffix('/artefact')}/artifact"
            raise api_error("not_found", message)
        visit.allow = found.allowed
        raise api_error("method_not_allowed", f"This path takes {', '.join(sorted(found.allowed))}.")

    def _wants_token(self, visit: Visit, way: Way | None) -> bool:
        """Whether whoever asks has to show one. A browser that is signed in has none, and may hear of paths."""
        if way is not None:
            return way.route.who != "anyone"
        return self._pages is None or not self._pages.knows(visit)

    def _shown(self, visit: Visit, refusal: ApiError) -> Text | None:
        """The refusal as a page, where a page was asked for, or a browser asks for what is not there."""
        if visit.route is not None:
            return None if visit.route.shows is None else visit.route.shows(visit, refusal)
        is_browser = "text/html" in visit.head.headers.get(hdrs.ACCEPT, "")
        return self._pages.refusal_page(visit, refusal) if is_browser and self._pages is not None else None

    async def _body(self, visit: Visit) -> bytes:
        """The whole body, within its size and its time."""
        assert visit.request is not None
        payload = visit.request.content
        try:
            body = payload.read_nowait() if payload.is_eof() else await self._slow_body(visit, payload)
        except web.RequestPayloadError:
            raise api_error("invalid_request", "The body is broken: its chunks or its length are wrong.") from None
        if visit.request.is_truncated:
            raise api_error("invalid_request", "The body ended too early. Send the whole request again.")
        return body

    async def _slow_body(self, visit: Visit, payload: StreamReader) -> bytes:
        """A body that has not arrived yet, up to one piece over its limit."""
        if int(visit.head.headers.get(hdrs.CONTENT_LENGTH, 0)) > self.limits.body:
            raise self._body_too_large()
        welcome(visit)
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

    def _note_key(self, visit: Visit, route: Route, body: bytes) -> None:
        if IDEMPOTENCY_KEY in visit.head.headers:
            keys = visit.head.headers.getall(IDEMPOTENCY_KEY)
            if len(keys) > 1:  # a repeat that carries one of them would not be known
                message = "Idempotency-Key was sent more than once. Send one."
                raise api_error("invalid_request", message, field="Idempotency-Key")
            visit.key = self.gate.key_use(keys[0], route.method, unquote(visit.path), body)

    def refuse(self, visit: Visit, refusal: ApiError, *, close: bool = False) -> Reply:
        """The reply to a refused request."""
        self.note_refusal(visit.route, visit.method, refusal, by=visit.by, job_id=visit.job_id)
        close = close or self.closing or refusal.code == "too_large"
        return refusing(visit, refusal, allow=visit.allow, close=close, shown=self._shown(visit, refusal))

    def note_refusal(self, route: Route | None, method: str, refusal: ApiError, *, by: str, job_id: str | None) -> None:
        """A refusal is counted, and logged in one line without a secret."""
        self.refusals[refusal.code] += 1
        # Any client can be refused as often as it likes: that must not fill the log.
        if (left_out := self._sparing.left_out(refusal.code)) is None:
            return
        path = None if route is None else route.path
        more = {"left_out": left_out} if left_out else {}
        log.info("refused", method=method, path=path, code=refusal.code, by=by, job_id=job_id, **more)

    def confess(self, visit: Visit, bug: Exception) -> ApiError:
        """A bug costs one visit. Its text may hold a secret, so the log names only its type and place."""
        route = visit.route
        at = traceback.extract_tb(bug.__traceback__)[-1]
        log.error(
            "request_bug",
            command=None if route is None else route.asks.__name__,
            job_id=visit.job_id,
            error=type(bug).__name__,
            where=f"{at.filename}:{at.lineno} {at.name}",
        )
        return BUG


def check_reader(route: Route) -> None:
    """403 where who may only look would change something, or see secrets."""
    if route.changes:
        raise api_error("forbidden", "This token may only look. To change something use the admin token.")
    if route.secret:
        raise api_error("forbidden", "What this gives holds the secrets of locks: it wants the admin token.")


def _check_kind(head: Head, reads: str) -> None:
    if head.has_body or reads == "lines":
        check_kind(head.headers, KINDS[reads])


def welcome(visit: Visit) -> None:
    """Tell a client that waits for leave to send its body (`Expect: 100-continue`) to go on."""
    transport = visit.connection.transport
    if visit.head.expects and transport is not None:
        transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


# ---------------------------------------------------------------------------------------------------------------------
# Liveness and readiness: the same at every door, without a token.


class Nothing(Command, frozen=True, kw_only=True):
    """A call that takes no fields."""
