"""A backend for the tasks of Django 6, or of the package django-tasks: `"BACKEND": "jobd.django.JobdBackend"`.

`jobctl worker jobd.django:app` runs the tasks of the backend `default`, and `jobd.django:ALIAS` those of another one.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, cast

import django
from django.apps import apps
from django.conf import settings
from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from django.db import close_old_connections, transaction
from django.utils import timezone
from django.utils.module_loading import autodiscover_modules, import_string

from jobd.client.app.app import App
from jobd.client.app.daemon_jobs import DaemonJobs
from jobd.client.app.job_context import JobContext, current_job
from jobd.client.app.options import Backoff, TaskOptions, milliseconds, request_fields
from jobd.client.app.typed_task import Call
from jobd.client.app.typed_task import Task as AppTask
from jobd.client.errors import JobNotFound
from jobd.client.outcomes import Discard, Snooze, Stopped
from jobd.model.events import EventView

try:
    from django.tasks import Task, TaskContext, TaskResult, TaskResultStatus, task_backends
    from django.tasks.backends.base import BaseTaskBackend
    from django.tasks.base import TaskError
    from django.tasks.exceptions import InvalidTask, TaskResultDoesNotExist
    from django.tasks.signals import task_enqueued, task_finished, task_started
    from django.utils.json import normalize_json
except ModuleNotFoundError:  # Django 5
    from django_tasks import TaskContext, TaskResult, TaskResultStatus, task_backends
    from django_tasks.backends.base import BaseTaskBackend
    from django_tasks.base import Task, TaskError
    from django_tasks.exceptions import InvalidTaskError as InvalidTask
    from django_tasks.exceptions import TaskResultDoesNotExist
    from django_tasks.signals import task_enqueued, task_finished, task_started
    from django_tasks.utils import normalize_json

OPTIONS: Final = ("url", "token", "on_commit", "include")
_STATUSES: Final = {
    "queued": TaskResultStatus.READY,
    "processing": TaskResultStatus.RUNNING,
    "completed": TaskResultStatus.SUCCESSFUL,
    "failed": TaskResultStatus.FAILED,
    "cancelled": TaskResultStatus.FAILED,
}
_guard: Final = threading.Lock()
_declared: Final[dict[tuple[str, str], Task]] = {}  # by backend and module path


@dataclass(frozen=True, kw_only=True)
class JobdTask(Task):
    """A task with options of jobd: `@task(max_attempts=5)`."""

    max_attempts: int | None = None
    backoff: timedelta | Backoff | None = None
    timeout: timedelta | None = None


@functools.cache
def _app(alias: str, url: str | tuple[str, ...] | None, token: str | None) -> App:
    """Return the app of a backend. All threads share its connection; Django makes a backend for each."""
    app = App(f"django:{alias}", url=url, token=token)
    app.middleware(_fresh_connections)
    return app


def _fresh_connections(context: JobContext) -> Iterator[None]:
    """Close connections to databases that are too old or broken, as Django does around requests."""
    close_old_connections()
    try:
        yield
    finally:
        close_old_connections()


class JobdBackend(BaseTaskBackend):
    """Create a job for each task that is enqueued. A larger priority of Django is a smaller one of jobd."""

    task_class = JobdTask
    supports_defer = True
    supports_async_task = True
    supports_get_result = True
    supports_priority = True

    def __init__(self, alias: str, params: Mapping[str, Any]) -> None:
        super().__init__(alias, params)
        url = self.options.get("url")
        self.app: Final = _app(
            alias, url if url is None or isinstance(url, str) else tuple(url), self.options.get("token")
        )
        self.app.registry.queues |= self.queues

    def check(self, **kwargs: Any) -> list[checks.CheckMessage]:
        """Return what is wrong with OPTIONS, for `manage.py check`."""
        found = [
            f"has no option {name!r}; its options are {', '.join(OPTIONS)}"
            for name in self.options
            if name not in OPTIONS
        ]
        database = self.options.get("on_commit")
        if database is not None and database not in settings.DATABASES:
            found.append(f"on_commit must be one of {sorted(settings.DATABASES)}, not {database!r}")
        if not isinstance(self.options.get("include", ()), list | tuple):
            found.append(f"include must be a list of modules, not {self.options['include']!r}")
        try:
            self._jobs.endpoints  # noqa: B018 - it reads the addresses, and raises if one is wrong
        except (OSError, TypeError, ValueError) as error:
            found.append(f"url: {error}")
        return [checks.Error(f"TASKS[{self.alias!r}] OPTIONS: {text}", id="jobd.E001") for text in found]

    def validate_task(self, task: Task) -> None:
        super().validate_task(task)
        options = _options_of(task)
        try:
            request_fields(options, {})
            milliseconds("timeout", options.get("timeout", timedelta()))
        except TypeError as error:
            raise InvalidTask(f"task {task.module_path}: {error}") from None
        _declared.setdefault((self.alias, task.module_path), task)

    def enqueue(self, task: Task, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TaskResult:
        """Create the job, with OPTIONS `on_commit` after the transaction of that database has committed."""
        self.validate_task(task)
        options: dict[str, Any] = {"queue": task.queue_name, "priority": -task.priority}
        if (run_after := task.run_after) is not None:
            options["run_at"] = timezone.make_aware(run_after) if timezone.is_naive(run_after) else run_after
        payload: dict[str, Any] = {"args": normalize_json(list(args)), "kwargs": normalize_json(dict(kwargs))}
        call: Call[Any] = self._task_of(task).using(**options).call(payload["args"], payload["kwargs"])
        result = TaskResult(
            task=task, id=call.id, status=TaskResultStatus.READY, **payload, backend=self.alias,
            enqueued_at=None, started_at=None, finished_at=None, last_attempted_at=None, errors=[], worker_ids=[],
        )  # fmt: skip
        if (database := self.options.get("on_commit")) is None:
            self._send(call, result)
        else:
            transaction.on_commit(functools.partial(self._send, call, result), using=database)
        return result

    def _send(self, call: Call[Any], result: TaskResult) -> None:
        call.enqueue()
        _set(result, enqueued_at=timezone.now())
        task_enqueued.send(type(self), task_result=result)

    def get_result(self, result_id: str) -> TaskResult:
        try:
            job, events = self._jobs.get(result_id), self._jobs.timeline(result_id)
        except JobNotFound:
            raise TaskResultDoesNotExist(result_id) from None
        try:
            task = import_string(job.kind)
        except ImportError:
            task = None
        if not isinstance(task, Task):
            raise TaskResultDoesNotExist(f"job {result_id} is of kind {job.kind!r}, which is no task of Django")
        starts = [event for event in events if event.type == "granted"]
        is_later = job.status == "queued" and job.run_at > job.created_at
        task = task.using(
            priority=max(-100, min(100, -job.priority)), queue_name=job.queue, backend=self.alias,
            run_after=_time(job.run_at) if is_later else None,
        )  # fmt: skip
        result = TaskResult(
            task=task, id=job.id, status=_STATUSES[job.status], **job.payload_value, backend=self.alias,
            enqueued_at=_time(job.created_at), finished_at=_time(job.finished_at),
            started_at=_time(starts[0].at if starts else job.started_at), last_attempted_at=_time(job.started_at),
            errors=[_error(event, task) for event in events if event.type == "retried" or event.to == "failed"],
            # One of each attempt: that of a grant that was given back does not count.
            worker_ids=list({event.details["attempt"]: event.details["worker"] for event in starts}.values()),
        )  # fmt: skip
        if job.status == "completed":
            _set(result, _return_value=job.metadata_value)
        return result

    def run(self, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Run a task in a worker."""
        with self._running() as result:
            context = [TaskContext(task_result=result)] if result.task.takes_context else []
            value = normalize_json(result.task.call(*context, *args, **kwargs))
            _set(result, _return_value=value)
            return value

    @contextmanager
    def _running(self) -> Iterator[TaskResult]:
        """Send the signals of a run. The last attempt is the end of a task."""
        result = self.get_result(current_job().id)
        task_started.send(type(self), task_result=result)
        try:
            yield result
        except (Snooze, Stopped):
            raise
        except Exception as error:
            if current_job().is_last_attempt or isinstance(error, Discard):
                _set(result, status=TaskResultStatus.FAILED, finished_at=timezone.now())
                task_finished.send(type(self), task_result=result)
            raise
        _set(result, status=TaskResultStatus.SUCCESSFUL, finished_at=timezone.now())
        task_finished.send(type(self), task_result=result)

    def discover(self) -> App:
        """Import the modules `tasks` of all applications and those of `include`, and return the app with all tasks."""
        autodiscover_modules("tasks")
        for module in self.options.get("include", ()):
            importlib.import_module(module)
        for (alias, _), task in list(_declared.items()):
            if alias == self.alias:
                self._task_of(task)
        return self.app

    @property
    def _jobs(self) -> DaemonJobs:
        jobs = self.app.registry.jobs
        assert isinstance(jobs, DaemonJobs)
        return jobs

    def _task_of(self, task: Task) -> AppTask[[list[Any], dict[str, Any]], Any]:
        """Return the task of the app that stands for this one."""
        registry, name = self.app.registry, task.module_path
        with _guard:
            if name not in registry.tasks:
                options = {"name": name, "queue": task.queue_name, **_options_of(task)}
                registry.define(self.run, cast(TaskOptions, options))
        return AppTask(registry.tasks[name], {})


def _options_of(task: Task) -> Any:
    """Return the options of jobd that a task has. One that was declared for another backend has none."""
    options: dict[str, Any] = {name: getattr(task, name, None) for name in ("max_attempts", "backoff", "timeout")}
    return {name: value for name, value in options.items() if value is not None}


def _error(event: EventView, task: Task) -> TaskError:
    """Return the error of an attempt. Its first word is the name of the class, if the task can know it."""
    text = event.reason or ""
    name = text.partition("\n")[0].partition(":")[0]
    found = task.func.__globals__.get(name, getattr(builtins, name, None))
    kind = found if isinstance(found, type) and issubclass(found, BaseException) else Exception
    return TaskError(exception_class_path=f"{kind.__module__}.{kind.__qualname__}", traceback=text)


def _time(ms: int | None) -> datetime | None:
    return None if ms is None else datetime.fromtimestamp(ms / 1000, UTC if settings.USE_TZ else None)


def _set(result: TaskResult, **fields: Any) -> None:
    """Change a result, which is frozen, as the backends of Django do: they have no public way either."""
    for name, value in fields.items():
        object.__setattr__(result, name, value)


def __getattr__(name: str) -> App:
    """Return the app of a backend: `app` is that of `default`."""
    if name.startswith("_"):
        raise AttributeError(name)
    if not apps.ready:
        django.setup()
    alias = "default" if name == "app" else name
    if alias not in task_backends.settings:
        known = ", ".join(f"jobd.django:{each}" for each in task_backends.settings)
        raise AttributeError(f"TASKS has no backend {alias!r}; write {known}")
    backend = task_backends[alias]
    if not isinstance(backend, JobdBackend):
        raise ImproperlyConfigured(
            f"TASKS[{alias!r}] has the BACKEND {type(backend).__name__}, not jobd.django.JobdBackend"
        )
    return backend.discover()
