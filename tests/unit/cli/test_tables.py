"""Tables about jobs."""

from __future__ import annotations

from jobd.cli import tables
from jobd.model.events import StreamedEvent


def test_an_event_is_a_line() -> None:
    event = StreamedEvent(7, 1_000, "granted", "queued", "processing", "worker:w", None, {"ttl_ms": 60_000}, "a", "q")
    time, *rest = tables.event_line(event).split("  ")
    assert time.startswith("1970-01-01 ")
    assert rest == ["7", "granted", "a (q)", "queued → processing", "worker:w", "ttl_ms=1 m"]
    paused = StreamedEvent(8, 1_000, "queue_paused", None, None, "admin", "why", {}, None, "q")
    assert tables.event_line(paused).split("  ")[1:] == ["8", "queue_paused", "queue q", "admin", "why"]
