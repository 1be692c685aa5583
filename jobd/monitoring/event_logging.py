"""Log one line per committed event, without secrets: recoveries and operator actions at info, others at debug."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

import structlog

from jobd.model.events import Event

_level: Final = logging.getLogger("jobd")
log = structlog.get_logger("jobd.facts")

AT_INFO: Final = frozenset(
    {
        "stalled",
        "expired",
        "late_result",
        "adopted",
        "force_failed",
        "force_reset",
        "retried_by_operator",
        "transitioned",
        "updated",
        "fixed",
        "queue_paused",
        "queue_resumed",
        "workers_quieted",
        "workers_resumed",
        "undelivered",
    }
)


def write_lines(changes: Sequence[Event]) -> None:
    """Log committed changes in their order."""
    is_debug = _level.isEnabledFor(logging.DEBUG)
    for event in changes:
        if event.type in AT_INFO or (event.by[:5] == "admin" and event.type != "imported"):
            _line(event, log.info)
        elif is_debug:
            _line(event, log.debug)


def _line(event: Event, write: structlog.typing.WrappedLogger) -> None:
    fields = {
        "job_id": event.job_id or None,
        "queue": event.queue,
        "from_status": event.from_status,
        "to_status": event.to_status,
        "by": event.by,
        "reason": event.reason,
    }
    write(event.type, **{name: value for name, value in fields.items() if value is not None})
