"""The schedules of an app: what creates jobs of its tasks by the clock."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypedDict, TypeVar

import msgspec

from jobd.client.app.options import milliseconds
from jobd.client.app.typed_task import Call, TaskBase
from jobd.client.errors import InvalidRequest

if TYPE_CHECKING:
    from jobd.client.aio import AsyncJobClient

Target = TypeVar("Target", bound=TaskBase[..., Any] | Call[Any])
# Options of jobs that a schedule decides.
_OWN_FIELDS: Final = {"run_at": "a time", "delay_ms": "a delay", "expires_at": "an end at a fixed time"}


class ScheduleOptions(TypedDict, total=False):
    """The options of `App.schedule`. `timezone` is for a cron expression, `offset` for an interval."""

    id: str | None
    timezone: str
    offset: timedelta
    overlap: Literal["skip", "allow"]
    catch_up: Literal["latest", "none"]
    jitter: timedelta


class ScheduleDecorator(Protocol):
    """What `app.schedule(...)` returns: it takes a task or a call, and returns it."""

    def __call__(self, target: Target, /) -> Target: ...


class AppSchedules:
    """The schedules of the app `name`, by id. They are put into the daemon by its workers."""

    def __init__(self, name: str) -> None:
        self.source: Final = f"app:{name}"
        self._declared: dict[str, tuple[str | timedelta, TaskBase[..., Any] | Call[Any], ScheduleOptions]] = {}

    def add(self, when: str | timedelta, target: TaskBase[..., Any] | Call[Any], options: ScheduleOptions) -> None:
        """Add a schedule. Raises TypeError for a task with a parameter without a default, and for an id used twice."""
        if not isinstance(target, TaskBase | Call):
            raise TypeError(f"app.schedule takes a task or a call, not {target!r}: put it above @app.task")
        name = options.get("id") or target.definition.name
        if isinstance(target, TaskBase):
            parameters = inspect.signature(target.definition.function).parameters.values()
            if missing := [each.name for each in parameters if each.default is inspect.Parameter.empty]:
                raise TypeError(
                    f"schedule {name!r}: {missing[0]!r} of task {target.name!r} has no default. Schedule a call: "
                    f'app.schedule(..., id="...")({target.name}.call({missing[0]}=...))'
                )
        if name in self._declared:
            raise TypeError(
                f'two schedules have the id {name!r}. Give one of them another: app.schedule(..., id="...")'
            )
        if not isinstance(when, str | timedelta):
            raise TypeError(f"schedule {name!r}: {when!r} is no cron expression and no timedelta")
        self._declared[name] = (when, target, options)

    def requests(self) -> dict[str, dict[str, Any]]:
        """Return the fields of each request that puts a schedule, by id. Raises TypeError if one cannot be made."""
        return {name: _fields(name, *declared) for name, declared in self._declared.items()}

    async def put(self, client: AsyncJobClient) -> None:
        """Put all schedules. Raises JobdError for one that the daemon rejects."""
        for name, fields in self.requests().items():
            try:
                await client.put_schedule(id=name, source=self.source, **fields)
            except InvalidRequest as error:
                error.message = f"schedule {name!r}: {error.message}"
                raise


def _fields(
    name: str, when: str | timedelta, target: TaskBase[..., Any] | Call[Any], options: ScheduleOptions
) -> dict[str, Any]:
    call = target if isinstance(target, Call) else target.call()
    new = call.new_job()
    for field, what in _OWN_FIELDS.items():
        if field in new.options:
            raise TypeError(f"schedule {name!r}: its jobs cannot have {what}. Remove it from using(...)")
    job: dict[str, Any] = {"queue": new.queue, "kind": new.name, "payload": msgspec.json.decode(new.payload)}
    job |= new.options | ({"headers": new.headers} if new.headers else {})
    timing: Mapping[str, Any]
    if isinstance(when, str):
        timing = {"cron": when, "timezone": options.get("timezone", "UTC")}
    else:
        offset = options.get("offset", timedelta())
        timing = {"every_ms": milliseconds("every", when), "offset_ms": milliseconds("offset", offset)}
    more: dict[str, Any] = {name: value for name, value in options.items() if name in ("overlap", "catch_up")}
    return {**timing, **more, "jitter_ms": milliseconds("jitter", options.get("jitter", timedelta())), "job": job}
