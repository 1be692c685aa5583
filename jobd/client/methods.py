"""Descriptors that turn a function that builds a request into a method of both kinds of client.

`WorkerApi` and `AdminApi` list the calls as class attributes, and the blocking and the asyncio clients inherit them. A
method has the arguments and the docstring of its function (in `requests`). It returns the
result in a blocking client, and a coroutine or an async iterator in an asyncio client.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, cast, overload

from jobd.client.api_request import ApiRequest, T, request_for
from jobd.client.event_subscription import EventSubscription
from jobd.model.api_call import ApiCall
from jobd.model.commands import Command
from jobd.model.events import StreamedEvent

P = ParamSpec("P")
R = TypeVar("R")
Blocking = TypeVar("Blocking")  # the result in a blocking client
Async = TypeVar("Async")  # the same in an asyncio client


class _BlockingSender(Protocol):
    def send(self, request: ApiRequest[T]) -> T: ...


class _AsyncSender(Protocol):
    async def send(self, request: ApiRequest[T]) -> T: ...


@functools.cache
def signature_of(call: ApiCall[Any, Any]) -> inspect.Signature:
    """Return the signature of a call, without types."""
    parameters = inspect.signature(call.command).parameters.values()
    return inspect.Signature([parameter.replace(annotation=parameter.empty) for parameter in parameters])


def described(function: Callable[P, R], call: ApiCall[Any, Any]) -> Callable[P, R]:
    """Give `function` the name, signature and docstring of `call`, for help() and editors."""
    shown: Any = function
    shown.__name__, shown.__doc__, shown.__signature__ = call.name, call.command.__doc__, signature_of(call)
    return function


def command_of(call: ApiCall[Any, Any], args: Iterable[Any], kwargs: Mapping[str, Any]) -> Command:
    """Make the command of a call. Raises TypeError, with the correct call, for arguments that it does not have."""
    try:
        return cast(Command, call.command(*args, **kwargs))
    except TypeError as error:
        parameters = signature_of(call).parameters.values()
        needed = [each for each in parameters if each.default is each.empty]
        shown = ", ".join(
            each.name if each.kind is each.POSITIONAL_OR_KEYWORD else f"{each.name}=..." for each in needed
        )
        raise TypeError(f"{error}: write {call.name}({shown}).") from None


class _HasNextCursor(Protocol):
    @property
    def next_cursor(self) -> str | None: ...


Page = TypeVar("Page", bound=_HasNextCursor)


class _ClientMethod(Generic[P, Blocking, Async]):
    """Base of the descriptors. The method of a client calls the client's `run` with the result of `build`."""

    def __init__(self, build: Callable[..., Any], run: str, doc: str | None = None) -> None:
        self._build = build
        self._run = run
        self._doc = doc or build.__doc__
        self._name = ""
        self._functions: dict[type, FunctionType] = {}  # by class of the client

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, client: None, owner: type) -> Callable[..., Any]: ...
    @overload
    def __get__(self, client: _AsyncSender, owner: type) -> Callable[P, Async]: ...
    @overload
    def __get__(self, client: _BlockingSender, owner: type) -> Callable[P, Blocking]: ...
    def __get__(self, client: _AsyncSender | _BlockingSender | None, owner: type) -> Any:
        function = self._functions.get(owner)
        if function is None:
            function = self._functions[owner] = self._function(owner)
        return function if client is None else MethodType(function, client)

    def _function(self, owner: type) -> FunctionType:
        build, run = self._build, self._run

        def method(self: Any, /, *args: Any, **kwargs: Any) -> Any:
            return getattr(self, run)(build(*args, **kwargs))

        async def coroutine(self: Any, /, *args: Any, **kwargs: Any) -> Any:
            return await getattr(self, run)(build(*args, **kwargs))

        function: Any = coroutine if inspect.iscoroutinefunction(getattr(owner, run)) else method
        function.__name__, function.__qualname__, function.__doc__ = self._name, self._name, self._doc
        signature = inspect.signature(build)  # for help() and editors
        client = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        function.__signature__ = signature.replace(
            parameters=[client, *signature.parameters.values()], return_annotation=inspect.Signature.empty
        )
        return cast(FunctionType, function)


class Method(_ClientMethod[P, T, Coroutine[Any, Any, T]]):
    """A call with one response."""

    def __init__(self, build: Callable[P, ApiRequest[T]]) -> None:
        super().__init__(build, "send")


def requesting(call: ApiCall[P, T]) -> Callable[P, ApiRequest[T]]:
    """Return the function that builds the request of a call."""

    def build_request(*args: P.args, **kwargs: P.kwargs) -> ApiRequest[T]:
        return request_for(call, *args, **kwargs)

    return described(build_request, call)


@dataclass(frozen=True, slots=True)
class PageWalk(Generic[T]):
    """All pages of a list. `request` returns the request for the page at a cursor (None: the first page)."""

    request: Callable[[str | None], ApiRequest[Any]]
    items: Callable[[Any], Iterable[T]]


class PagedMethod(_ClientMethod[P, Iterator[T], AsyncIterator[T]]):
    """A list that is read page by page."""

    def __init__(self, build: Callable[P, ApiRequest[Page]], items: Callable[[Page], Iterable[T]], doc: str) -> None:
        @functools.wraps(build)
        def walk(*args: P.args, **kwargs: P.kwargs) -> PageWalk[T]:
            def request(cursor: str | None) -> ApiRequest[Any]:
                if cursor is not None:
                    kwargs["cursor"] = cursor
                return build(*args, **kwargs)

            return PageWalk(request, items)

        super().__init__(walk, "iterate", doc)


class EventMethod(_ClientMethod[P, Generator[StreamedEvent, None, None], AsyncIterator[StreamedEvent]]):
    """The stream of events of `call`."""

    def __init__(
        self,
        subscribe: Callable[Concatenate[ApiCall[Any, Any], P], EventSubscription],
        call: ApiCall[Any, Any],
        doc: str,
    ) -> None:
        super().__init__(functools.partial(subscribe, call), "listen", doc)
