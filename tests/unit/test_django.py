"""Tasks of Django, or of django-tasks, that run as jobs."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import transaction
from django.utils import timezone

from jobd.client import JobClient
from jobd.testing import TestDaemon
from tests.support.django_project import settings

backend: Any = importlib.import_module("jobd.django")  # Django has no types


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the module of the project with its tasks."""
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", settings.__name__)
    assert backend.app.name == "django:default"
    return importlib.import_module("tests.support.django_project.tasks")


@pytest.fixture
def signals() -> Iterator[list[tuple[str, str]]]:
    """Return the signals that were sent: name, and status of the result."""
    sent: list[tuple[str, str]] = []

    def receive(signal: Any, task_result: Any, **_: Any) -> None:
        sent.append((names[signal], str(task_result.status)))

    names = {getattr(backend, f"task_{name}"): name for name in ("enqueued", "started", "finished")}
    for signal in names:
        signal.connect(receive)
    yield sent
    for signal in names:
        signal.disconnect(receive)


def test_a_task_runs_as_a_job_and_returns_its_value(
    tasks: Any, jobd: TestDaemon, signals: list[tuple[str, str]]
) -> None:
    result, async_result = tasks.add.enqueue(2, b=3), tasks.welcome.enqueue("Ada")
    assert (result.status, result.args, result.kwargs, result.worker_ids) == ("READY", [2], {"b": 3}, [])
    assert tasks.add.get_result(result.id).status == "READY"
    with JobClient(jobd.url) as client:
        job, mail = client.get_job(result.id), client.get_job(async_result.id)
    assert (job.kind, job.payload_value) == (
        "tests.support.django_project.tasks.add",
        {"args": [2], "kwargs": {"b": 3}},
    )
    assert (job.queue, job.priority, mail.queue, mail.priority) == ("default", 0, "mail", -10)
    assert [each.id for each in jobd.run_until_empty(backend.app)] == [async_result.id, result.id]
    result.refresh()
    assert (result.status, result.return_value, result.errors, len(result.worker_ids)) == ("SUCCESSFUL", 5, [], 1)
    assert result.enqueued_at <= result.started_at <= result.last_attempted_at <= result.finished_at
    found = tasks.welcome.get_result(async_result.id)
    assert (found.return_value, found.task.priority, found.task.queue_name) == ({"name": "Ada"}, 10, "mail")
    run = [("started", "RUNNING"), ("finished", "SUCCESSFUL")]
    assert signals == [("enqueued", "READY")] * 2 + run * 2


@pytest.mark.parametrize("works_at", [3, 4])
def test_attempts_and_their_errors_are_those_of_the_job(
    tasks: Any, jobd: TestDaemon, signals: list[tuple[str, str]], works_at: int
) -> None:
    result = tasks.reserve.enqueue(works_at)
    jobd.run_until_empty(backend.app, raises=False)
    result.refresh()
    is_done = works_at == 3
    assert (result.status, result.attempts) == ("SUCCESSFUL" if is_done else "FAILED", 3)
    assert [error.exception_class for error in result.errors] == [tasks.NoStock] * (2 if is_done else 3)
    first, heading, *_ = result.errors[1].traceback.splitlines()
    assert (first, heading) == ("NoStock: attempt 2", "Traceback (most recent call last):")
    assert result.started_at < result.last_attempted_at
    assert signals.count(("started", "RUNNING")) == 3
    assert signals[-1] == ("finished", result.status)
    assert len(signals) == 5


def test_discard_ends_a_task_and_snooze_does_not(tasks: Any, jobd: TestDaemon, signals: list[tuple[str, str]]) -> None:
    discarded = tasks.discards.enqueue()
    jobd.run_until_empty(backend.app, raises=False)
    assert tasks.discards.get_result(discarded.id).attempts == 1
    assert signals[-1] == ("finished", "FAILED")
    snoozed = tasks.snoozes.enqueue()
    jobd.run_until_empty(backend.app)
    found = tasks.snoozes.get_result(snoozed.id)
    assert (found.return_value, found.attempts) == (True, 1)
    assert [name for name, _ in signals[3:]] == ["enqueued", "started", "started", "finished"]


def test_a_rolled_back_transaction_sends_nothing(tasks: Any, jobd: TestDaemon) -> None:
    with transaction.atomic():
        tasks.after_commit.enqueue(1)
        transaction.set_rollback(True)
    assert jobd.jobs() == []
    with transaction.atomic():
        result = tasks.after_commit.enqueue(2)
        assert (jobd.jobs(), result.enqueued_at) == ([], None)
    assert [job.id for job in jobd.jobs()] == [result.id]
    assert result.enqueued_at is not None
    jobd.run_until_empty(backend.__getattr__("commit"))
    result.refresh()
    assert result.return_value == 2
    assert tasks.after_commit.enqueue(3).enqueued_at is not None  # without a transaction


async def test_async_calls_and_a_task_for_later(tasks: Any, jobd: TestDaemon) -> None:
    at = timezone.now().replace(microsecond=0) + timedelta(hours=1)
    result = await tasks.add.using(run_after=at).aenqueue(1)
    assert (await tasks.add.aget_result(result.id)).task.run_after == at
    (job,) = jobd.run_until_empty(backend.app)
    await result.arefresh()
    assert (job.id, result.return_value, result.task.run_after) == (result.id, 2, at)


def test_a_module_of_include_has_tasks(tasks: Any, jobd: TestDaemon) -> None:
    app = backend.__getattr__("included")
    result = importlib.import_module("tests.support.django_project.included_tasks").included.enqueue()
    assert [job.id for job in jobd.run_until_empty(app)] == [result.id]
    assert list(app.registry.tasks) == ["tests.support.django_project.included_tasks.included"]


def test_a_job_that_is_no_task_of_django_has_no_result(tasks: Any, jobd: TestDaemon) -> None:
    with JobClient(jobd.url) as client:
        kinds = ["thumbnail", "tests.support.django_project.tasks.plain", "tests.support.nothing.task"]
        jobs = [client.create_job(kind=kind) for kind in kinds]
    for id in ("unknown", *(job.id for job in jobs)):
        with pytest.raises(backend.TaskResultDoesNotExist):
            tasks.add.get_result(id)


@pytest.mark.usefixtures("jobd")
def test_a_task_that_does_not_fit_is_an_error_before_it_is_sent(tasks: Any) -> None:
    with pytest.raises(backend.InvalidTask, match=r"tasks\.plain: timeout must be a timedelta .* not 5"):
        tasks.task(timeout=5)(tasks.plain)
    with pytest.raises(backend.InvalidTask, match=r"backoff|first must be a timedelta"):
        tasks.task(backoff=5)(tasks.plain)
    with pytest.raises(TypeError, match="retries"):
        tasks.task(retries=5)(tasks.plain)
    with pytest.raises(TypeError):
        tasks.add.enqueue(object())


def test_wrong_options_are_named_by_the_checks(tasks: Any) -> None:
    found = backend.task_backends["wrong"].check()
    assert [error.id for error in found] == ["jobd.E001"] * 4
    assert [error.msg.removeprefix("TASKS['wrong'] OPTIONS: ") for error in found[:3]] == [
        "has no option 'urls'; its options are url, token, on_commit, include",
        "on_commit must be one of ['default'], not 'archive'",
        "include must be a list of modules, not 'shop'",
    ]
    assert found[3].msg.startswith("TASKS['wrong'] OPTIONS: url: ")
    assert backend.task_backends["default"].check() == []


def test_an_app_exists_for_each_backend_of_jobd(tasks: Any) -> None:
    assert backend.app is backend.app
    with pytest.raises(AttributeError, match="TASKS has no backend 'nothing'"):
        backend.__getattr__("nothing")
    with pytest.raises(ImproperlyConfigured, match=r"TASKS\['other'\] has the BACKEND .*, not jobd.django.JobdBackend"):
        backend.__getattr__("other")
