"""Tasks that are no part of an application."""

from __future__ import annotations

from tests.support.django_project import tasks


@tasks.task(backend="included")
def included() -> str:
    return "included"
