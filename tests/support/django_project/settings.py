"""Settings with a backend for each way to configure one."""

from __future__ import annotations

from typing import Any

import django

PACKAGE = "django.tasks" if django.VERSION >= (6, 0) else "django_tasks"
BACKEND = "jobd.django.JobdBackend"

SECRET_KEY = "secret"
USE_TZ = True
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
INSTALLED_APPS = ["tests.support.django_project"]
TASKS: dict[str, dict[str, Any]] = {
    "default": {"BACKEND": BACKEND, "QUEUES": ["default", "mail"]},
    "commit": {"BACKEND": BACKEND, "OPTIONS": {"on_commit": "default"}},
    "wrong": {
        "BACKEND": BACKEND,
        "OPTIONS": {"urls": "x", "on_commit": "archive", "include": "shop", "url": "ftp://x"},
    },
    "included": {"BACKEND": BACKEND, "OPTIONS": {"include": ["tests.support.django_project.included_tasks"]}},
    "other": {"BACKEND": f"{PACKAGE}.backends.dummy.DummyBackend"},
}
