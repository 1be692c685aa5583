"""Which jobs a page is about: the filters as a form sends them, as the address keeps them, as the actor is asked.

A form sends fields that are empty, too: they filter nothing. Asks nobody.
"""

from __future__ import annotations

import datetime
import re
from typing import Any, Final
from urllib.parse import urlencode

import msgspec

from jobd.dashboard.live_updates import Subscription
from jobd.dashboard.urls import job_url
from jobd.http.decoding import validation_error
from jobd.model.commands import Command, SearchJobs
from jobd.model.errors import invalid_request_error
from jobd.model.job import DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS, is_job_id

TIME_FILTERS: Final = ("since", "until", "finished_since", "finished_until")
FILTERS: Final = ("status", "queue", "kind", "worker", *TIME_FILTERS, "q", "error")
_RELATIVE: Final = re.compile(r"([0-9]{1,6})\s*(s|min|m|h|d)")
_UNITS: Final = {"s": SECOND_MS, "m": MINUTE_MS, "min": MINUTE_MS, "h": HOUR_MS, "d": DAY_MS}


class JobFilter(Command, frozen=True, kw_only=True):
    """`since` and `until` are of the creation, `finished_*` of the end: 2026-11-26 10:00 in UTC, or how long ago it
    was, as in 2h.

    `error` is the fingerprint of a group of failures; None where the form has no such field.
    """

    status: str = ""
    queue: str = ""
    kind: str = ""
    worker: str = ""
    since: str = ""
    until: str = ""
    finished_since: str = ""
    finished_until: str = ""
    q: str = ""
    error: str | None = None


class JobsPageQuery(JobFilter, frozen=True, kw_only=True):
    """`id`: to go on to one job instead."""

    id: str = ""
    cursor: str = ""


def active_filters(wanted: JobFilter) -> dict[str, str]:
    """The filters that say something."""
    return {name: value for name in FILTERS if (value := (getattr(wanted, name) or "").strip())}


def filtered_url(place: str, wanted: JobFilter, **more: str) -> str:
    """`place` with the filters, and with what else is not empty."""
    query = urlencode({**active_filters(wanted), **{name: value for name, value in more.items() if value}})
    return f"{place}?{query}" if query else place


def search_fields(wanted: JobFilter, now: int) -> dict[str, Any]:
    """The filters as the fields of a search. Raises Refused where a time is none."""
    fields: dict[str, Any] = active_filters(wanted)
    for name in TIME_FILTERS:
        if name in fields:
            fields[name] = parse_time_field(name, fields[name], now)
    return fields


def search_command(wanted: JobsPageQuery, now: int, limit: int) -> SearchJobs:
    """What the actor is asked. Raises Refused where a filter is out of its bounds."""
    fields = {**search_fields(wanted, now), "limit": limit, **({"cursor": wanted.cursor} if wanted.cursor else {})}
    try:
        return msgspec.convert(fields, SearchJobs)
    except msgspec.ValidationError as fault:
        raise validation_error(str(fault), SearchJobs) from None


def parse_time_field(name: str, text: str, now: int) -> int:
    """The time that the field `name` says, Unix ms. Raises Refused where it is none."""
    at = parse_time(text, now)
    if at is None:
        raise invalid_request_error(
            f"$.{name}", "must be a time as in 2026-11-26 10:00 (UTC), or how long ago it was, as in 2h."
        )
    return at


def parse_time(text: str, now: int) -> int | None:
    """A time as people write it, Unix ms; None where it is none."""
    if ago := _RELATIVE.fullmatch(text):
        return max(now - int(ago[1]) * _UNITS[ago[2]], 0)
    try:
        at = datetime.datetime.fromisoformat(text.removesuffix(" UTC"))  # as pages and jobctl write it
    except ValueError:
        return None
    if at.tzinfo is None:
        at = at.replace(tzinfo=datetime.UTC)
    return max(round(at.timestamp() * SECOND_MS), 0)


def job_redirect(wanted: JobsPageQuery) -> str | None:
    """Where to go on, if a job is asked for by its id."""
    return job_url(wanted.id) if is_job_id(wanted.id) else None


def jobs_subscription(wanted: JobFilter) -> Subscription:
    return Subscription(queue=wanted.queue) if is_job_id(wanted.queue) else Subscription()
