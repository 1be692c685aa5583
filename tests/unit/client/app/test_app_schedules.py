"""The schedules of an app: what is sent, and what is rejected where it is declared."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from jobd import App


def test_what_is_sent() -> None:
    app = App("ops")

    @app.schedule("0 3 * * *", timezone="Europe/Berlin", overlap="allow")
    @app.task(queue="slow", max_attempts=3)
    def tidy(days: int = 30) -> int:
        return days

    @app.schedule(timedelta(minutes=5), offset=timedelta(seconds=7), catch_up="none", jitter=timedelta(seconds=2))
    @app.task
    async def sync(account: str = "all") -> None: ...

    app.schedule("@weekly", id="report")(tidy.using(queue="other", headers={"trace": "t"}).call(days=7))
    assert tidy(1) == 1, "a scheduled task is still the function"
    assert app.schedules.requests() == {
        "tidy": {
            "cron": "0 3 * * *",
            "timezone": "Europe/Berlin",
            "overlap": "allow",
            "jitter_ms": 0,
            "job": {"queue": "slow", "kind": "tidy", "payload": {}, "max_attempts": 3},
        },
        "sync": {
            "every_ms": 300_000,
            "offset_ms": 7_000,
            "catch_up": "none",
            "jitter_ms": 2_000,
            "job": {"queue": "default", "kind": "sync", "payload": {}},
        },
        "report": {
            "cron": "@weekly",
            "timezone": "UTC",
            "jitter_ms": 0,
            "job": {
                "queue": "other",
                "kind": "tidy",
                "payload": {"days": 7},
                "max_attempts": 3,
                "headers": {"trace": "t"},
            },
        },
    }


def test_a_wrong_declaration_is_a_type_error() -> None:
    app = App("ops")

    @app.task
    def charge(order: int, tries: int = 1) -> None: ...

    @app.task
    def tidy(days: int = 30) -> None: ...

    for when, options, target, message in (
        ("@daily", {}, charge, "'order' of task 'charge' has no default. Schedule a call"),
        ("@daily", {"timezon": "UTC"}, tidy, "did you mean 'timezone'"),
        (5, {}, tidy, "5 is no cron expression and no timedelta"),
        ("@daily", {}, tidy.call, "takes a task or a call"),
    ):
        schedule: Any = app.schedule
        with pytest.raises(TypeError, match=message):
            schedule(when, **options)(target)
    app.schedule("@daily")(tidy)
    with pytest.raises(TypeError, match="two schedules have the id 'tidy'"):
        app.schedule("@hourly")(tidy)
    app.schedule("@daily", id="late")(tidy.using(run_at=datetime.now(UTC)).call())
    with pytest.raises(TypeError, match="schedule 'late': its jobs cannot have a time"):
        app.schedules.requests()
