"""Tasks that the tests of the backend enqueue."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

try:
    from django.tasks import task
except ModuleNotFoundError:  # Django 5
    from django_tasks import task

from jobd import Discard, Snooze, current_job


class NoStock(Exception):
    pass


@task
def add(a: int, b: int = 1) -> int:
    return a + b


@task(queue_name="mail", priority=10)
async def welcome(name: str) -> dict[str, Any]:
    return {"name": name}


@task(takes_context=True, max_attempts=3, backoff=timedelta(seconds=1))
def reserve(context: Any, works_at: int) -> int:
    if context.attempt < works_at:
        raise NoStock(f"attempt {context.attempt}")
    return context.attempt  # type: ignore[no-any-return]


@task(max_attempts=3)
def discards() -> None:
    raise Discard("not for us")


@task
def snoozes() -> bool:
    if current_job().checkpoint is None:
        current_job().progress(1, checkpoint="seen")
        raise Snooze(1)
    return True


@task(backend="commit")
def after_commit(n: int) -> int:
    return n


def plain() -> None:
    """Not a task."""
