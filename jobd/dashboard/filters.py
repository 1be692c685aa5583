"""Convert the job filters between form fields, URLs and search commands. Empty fields do not filter."""

from __future__ import annotations

import datetime
import re
from typing import Any, Final, TypeVar
from urllib.parse import urlencode

import msgspec

from jobd.dashboard.live_updates import Subscription
from jobd.dashboard.urls import job_url
from jobd.http.decoding import validation_error
from jobd.model.commands import Command, SearchJobs
from jobd.model.errors import invalid_request_error
from jobd.model.job import DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS, is_job_id

T = TypeVar("T", bound=msgspec.Struct)

TIME_FILTERS: Final = ("since", "until", "finished_since", "finished_until")
FILTERS: Final = ("status", "queue", "kind", "worker", *TIME_FILTERS, "text", "error")
_RELATIVE: Final = re.compile(r"([0-9]{1,6})\s*(s|min|m|h|d)")
_UNITS: Final = {"s": SECOND_MS, "m": MINUTE_MS, "min": MINUTE_MS, "h": HOUR_MS, "d": DAY_MS}


class JobFilter(Command, frozen=True, kw_only=True):
    """Filters of a job list. Times are UTC (2026-11-26 10:00) or relative to now (2h).

    `since` and `until` filter by creation, `finished_*` by the end of the job. `error` is the fingerprint of a failure
    group, None if the form has no such field.
    """

    status: str = ""
    queue: str = ""
    kind: str = ""
    worker: str = ""
    since: str = ""
    until: str = ""
    finished_since: str = ""
    finished_until: str = ""
    text: str = ""
    error: str | None = None


class JobsPageQuery(JobFilter, frozen=True, kw_only=True):
    """The query of the list of jobs. `id` redirects to that job."""

    id: str = ""
    cursor: str = ""


def active_filters(filters: JobFilter) -> dict[str, str]:
    return {name: value for name in FILTERS if (value := (getattr(filters, name) or "").strip())}


def filtered_url(path: str, filters: JobFilter, **fields: str) -> str:
    """Return `path` with the active filters and the other non-empty fields as its query."""
    query = urlencode({**active_filters(filters), **{name: value for name, value in fields.items() if value}})
    return f"{path}?{query}" if query else path


def search_fields(filters: JobFilter, now: int) -> dict[str, Any]:
    """Return the filters as the fields of a search. Raise ApiException if a time is invalid."""
    fields: dict[str, Any] = active_filters(filters)
    for name in TIME_FILTERS:
        if name in fields:
            fields[name] = parse_time_field(name, fields[name], now)
    return fields


def search_command(query: JobsPageQuery, now: int, limit: int) -> SearchJobs:
    """Return the search for a page of jobs. Raise ApiException if a filter is out of its bounds."""
    fields = {**search_fields(query, now), "limit": limit, **({"cursor": query.cursor} if query.cursor else {})}
    return convert_fields(fields, SearchJobs)


def convert_fields(fields: dict[str, Any], kind: type[T]) -> T:
    """Make a struct of fields. Raise ApiException if one is out of its bounds."""
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise validation_error(str(error), kind) from None


def parse_time_field(name: str, text: str, now: int) -> int:
    """Parse the time in the field `name` to Unix ms. Raise ApiException if it is invalid."""
    at = parse_time(text, now)
    if at is None:
        raise invalid_request_error(
            f"$.{name}", "must be a time such as 2026-11-26 10:00 (UTC), or a time ago such as 2h."
        )
    return at


def parse_time(text: str, now: int) -> int | None:
    """Parse an absolute or relative time to Unix ms. Return None if it is invalid."""
    if relative := _RELATIVE.fullmatch(text):
        return max(now - int(relative[1]) * _UNITS[relative[2]], 0)
    try:
        at = datetime.datetime.fromisoformat(text.removesuffix(" UTC"))  # as pages and jobctl print it
    except ValueError:
        return None
    if at.tzinfo is None:
        at = at.replace(tzinfo=datetime.UTC)
    return max(round(at.timestamp() * SECOND_MS), 0)


def job_redirect(query: JobsPageQuery) -> str | None:
    """Return the URL of the job whose id was entered, None if there is none."""
    return job_url(query.id) if is_job_id(query.id) else None


def jobs_subscription(filters: JobFilter) -> Subscription:
    return Subscription(queue=filters.queue) if is_job_id(filters.queue) else Subscription()
