"""`jobctl worker jobd.django:app` runs the tasks of a Django project."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from jobd.client import JobClient
from tests import ROOT
from tests.support.daemon_process import DaemonProcess, die_with_us

COMMAND = [sys.executable, "-m", "jobd.cli.ctl.main", "worker"]
WORKER = [*COMMAND, "jobd.django:app"]
PROJECT = {"DJANGO_SETTINGS_MODULE": "tests.support.django_project.settings", "PYTHONPATH": str(ROOT)}
VIEW = """
import django
django.setup()
from tests.support.django_project import tasks
print(tasks.add.enqueue(2, b=3).id, tasks.reserve.enqueue(2).id)
"""
READ = """
import django, sys
django.setup()
from tests.support.django_project import tasks
added, reserved = tasks.add.get_result(sys.argv[1]), tasks.reserve.get_result(sys.argv[2])
print(added.return_value, reserved.return_value, reserved.attempts, reserved.errors[0].exception_class.__name__)
"""


@pytest.fixture
def environ(daemon: DaemonProcess) -> dict[str, str]:
    return {**os.environ, **PROJECT, "JOBD_SOCKET": daemon.socket}


@pytest.mark.slow
def test_a_worker_runs_what_another_process_has_enqueued(environ: dict[str, str], daemon: DaemonProcess) -> None:
    ids = subprocess.check_output([sys.executable, "-c", VIEW], env=environ, text=True).split()
    worker = subprocess.Popen(WORKER, env=environ, stderr=subprocess.PIPE, text=True, preexec_fn=die_with_us)
    with worker, JobClient(f"unix:{daemon.socket}") as client:
        for id in ids:
            client.wait_for_job(id, timeout_s=60)
        worker.terminate()
        assert worker.stderr is not None
        shown = worker.stderr.read()
    assert worker.returncode == 0
    assert "app django:default" in shown
    assert f"job {ids[0]} (tests.support.django_project.tasks.add) completed after " in shown
    assert subprocess.check_output([sys.executable, "-c", READ, *ids], env=environ, text=True) == "5 2 2 NoStock\n"


@pytest.mark.parametrize(
    ("target", "changed", "message"),
    [
        ("jobd.django:nothing", {}, "TASKS has no backend 'nothing'; write jobd.django:default, jobd.django:commit, "),
        ("jobd.django:other", {}, "TASKS['other'] has the BACKEND DummyBackend, not jobd.django.JobdBackend"),
        ("jobd.django:app", {"DJANGO_SETTINGS_MODULE": "no_shop.settings"}, "there is no module 'no_shop'. Modules"),
        ("jobd.django:app", {"DJANGO_SETTINGS_MODULE": ""}, "set DJANGO_SETTINGS_MODULE to the settings of the proj"),
    ],
)
def test_an_app_that_cannot_be_made_is_an_error(target: str, changed: dict[str, str], message: str) -> None:
    ended = subprocess.run(
        [*COMMAND, target], env={**os.environ, **PROJECT, **changed}, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr.count("\n")) == (78, 1)
    assert ended.stderr.startswith(f"jobctl: {target}: {message}")
