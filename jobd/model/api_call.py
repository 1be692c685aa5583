"""The declaration of a call of an API.

The routes, the methods of the clients, the OpenAPI document and the docs follow from it.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final, Generic, Literal, ParamSpec, Protocol, TypedDict, TypeVar, Unpack, overload

from jobd.model.commands import Command

JSON: Final = "application/json"
LINES: Final = "application/x-ndjson"
EVENT_STREAM: Final = "text/event-stream"

Auth = Literal["anyone", "worker", "admin"]
Tag = Literal["Jobs", "Many jobs", "Queues and workers", "Schedules", "Events", "The daemon", "The store"]

P = ParamSpec("P")
T = TypeVar("T")
U = TypeVar("U")


class _BlockingClient(Protocol):
    def method(self, call: ApiCall[P, T], /) -> Callable[P, T]: ...


class _AsyncClient(Protocol):
    def method(self, call: ApiCall[P, T], /) -> Callable[P, Coroutine[Any, Any, T]]: ...


class CallOptions(TypedDict, total=False):
    """The options of a call.

    `key`: an Idempotency-Key is accepted. `status` is that of a success. `body`: `lines` for a stream of JSON lines.
    `content_type` is that of the response. `secret`: read-only tokens are rejected, because the response contains
    secrets. `audited`: reads are recorded in the audit log. `on_standby`: a standby of a cluster serves it too.

    `summary` (default: the docstring of the command), `errors` besides those of the command, and `other_statuses` of a
    success with their meaning are for the OpenAPI document.
    """

    key: bool
    status: int
    body: Literal["json", "lines"]
    content_type: str
    secret: bool
    audited: bool
    on_standby: bool
    summary: str
    errors: tuple[str, ...]
    other_statuses: dict[int, str]


class ApiCall(Generic[P, T]):
    """One call: `command` is sent to `path`, which may have one field of it in braces, and `response` is returned.

    As an attribute of a client it is a method with the arguments of `command`. `repeatable`: the request has the same
    effect if it is sent twice; a dry run always has. The daemon may take `run_ms` to respond.
    """

    def __init__(
        self,
        command: Callable[P, Command],
        response: type[T],
        method: str,
        path: str,
        *,
        repeatable: bool = True,
        run_ms: int = 0,
        **options: Unpack[CallOptions],
    ) -> None:
        self.command: Any = command
        self.response: Any = response
        self.method = method
        self.path = path
        self.select: Callable[[Any], Any] | None = None
        self.repeatable = repeatable
        self.run_ms = run_ms
        self.options = options
        self.name = ""
        self.tag: Tag = "The daemon"
        self.auth: Auth = "anyone"

    def then(self, select: Callable[[T], U]) -> ApiCall[P, U]:
        """Return the same call with `select` of its result as the result."""
        selecting: ApiCall[P, Any] = ApiCall(
            self.command,
            self.response,
            self.method,
            self.path,
            repeatable=self.repeatable,
            run_ms=self.run_ms,
            **self.options,
        )
        selecting.select = select
        return selecting

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, client: None, owner: type) -> ApiCall[P, T]: ...
    @overload
    def __get__(self, client: _AsyncClient, owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    @overload
    def __get__(self, client: _BlockingClient, owner: type) -> Callable[P, T]: ...
    def __get__(self, client: Any, owner: type) -> Any:
        return self if client is None else client.method(self)


class CallGroup:
    """Calls that share a tag, the start of their paths, and the token that they need."""

    def __init_subclass__(cls, *, tag: Tag | None = None, base: str = "", auth: Auth = "worker", **more: Any) -> None:
        super().__init_subclass__(**more)
        if tag is not None:
            for call in calls_of(cls):
                call.tag, call.auth, call.path = tag, auth, base + call.path


def calls_of(*groups: type) -> Iterator[ApiCall[Any, Any]]:
    """Return the calls of groups in the order of their declaration."""
    return (call for group in groups for call in vars(group).values() if isinstance(call, ApiCall))
