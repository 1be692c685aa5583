"""The container files, without a container runtime: their commands run with their environment, in other directories."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import yaml  # type: ignore[import-untyped]

from jobd.client import JobClient
from tests import ROOT
from tests.support.daemon_process import die_with_us, free_port
from tests.support.polling import poll_until

pytestmark = pytest.mark.slow

FILES: Final = ROOT / "docs/containers"
DOCKERFILE: Final = (FILES / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
IMAGE: Final = dict(pair.split("=", 1) for pair in re.findall(r"^ENV (.*)$", DOCKERFILE, re.M)[0].split())
TOKEN: Final = "a-token-of-the-containers-with-enough-characters"


class Machine:
    """Replaces the paths, ports and names of containers by those of a directory and loopback."""

    def __init__(self, directory: Path) -> None:
        self.admin_port, self.worker_port = free_port(), free_port()
        self._directory = directory
        for name in ("admin_token", "worker_token"):
            (directory / name).write_text(TOKEN)
            (directory / name).chmod(0o600)

    def text(self, text: str) -> str:
        """Replace what is different here. The daemon listens on all addresses only in a container."""
        text = re.sub(r"^(/data|/run/jobd|/run/secrets/jobd|/run/secrets)(?=/)", str(self._directory), text)
        text = text.replace("8770", str(self.admin_port)).replace("8771", str(self.worker_port))
        return text.replace("0.0.0.0", "127.0.0.1").replace("//daemon:", "//127.0.0.1:")

    @contextmanager
    def running(self, command: list[str], environ: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
        """Run the command of a container. Stop it with SIGTERM, as a container runtime does."""
        process = subprocess.Popen(self.command(command), env=self.environ(environ), preexec_fn=die_with_us)
        try:
            yield process
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()

    def succeeds(self, command: list[str], environ: dict[str, str]) -> bool:
        done = subprocess.run(self.command(command), env=self.environ(environ), capture_output=True)
        return done.returncode == 0

    def command(self, command: list[str]) -> list[str]:
        program, *rest = (self.text(part) for part in command)
        return [str(Path(sys.executable).parent / program), *rest]

    def environ(self, environ: dict[str, str]) -> dict[str, str]:
        path = {"PATH": os.environ["PATH"]}  # of python, which the image has in its own
        return {name: self.text(value) for name, value in (IMAGE | environ).items()} | path


def _json_form(instruction: str) -> list[str]:
    (found,) = re.findall(rf"^{instruction}\b.*?(\[.*\])$", DOCKERFILE, re.M)
    command: list[str] = yaml.safe_load(found)
    return command


def test_the_files_that_the_image_copies_exist_and_nothing_runs_as_root() -> None:
    copied = [shlex.split(line)[:-1] for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.M)]
    assert all((ROOT / path).exists() for paths in copied for path in paths)
    assert re.findall(r"^(?:USER|VOLUME) (.*)$", DOCKERFILE, re.M) == ["jobd", "/data"]


def test_the_services_of_compose_work(tmp_path: Path) -> None:
    services = yaml.safe_load((FILES / "compose.yaml").read_text("utf-8"))["services"]
    machine = Machine(tmp_path)
    daemon, worker, check = services["daemon"], services["worker"], _json_form("HEALTHCHECK")
    assert not machine.succeeds(check, {})
    with machine.running(_json_form("CMD"), daemon["environment"]):
        poll_until(lambda: machine.succeeds(check, {}))
        with (
            machine.running(worker["command"], worker["environment"]),
            JobClient(f"http://127.0.0.1:{machine.worker_port}", token=TOKEN) as client,
        ):
            client.create_job({"name": "Ada"}, id="a", queue="greetings")
            poll_until(lambda: client.get_job("a").status == "completed")


def _containers(name: str) -> list[dict[str, Any]]:
    (pods,) = (
        each["spec"]["template"]["spec"]
        for each in yaml.safe_load_all((FILES / "kubernetes" / name).read_text("utf-8"))
        if each["kind"] == "StatefulSet"
    )
    assert pods["terminationGracePeriodSeconds"] > 20
    return [*pods.get("initContainers", []), *pods["containers"]]


def _answers(url: str) -> bool:
    return subprocess.run(["curl", "-sf", "-o", "/dev/null", url]).returncode == 0


@pytest.mark.parametrize("name", ["one-node.yaml", "cluster.yaml"])
def test_the_manifests_configure_a_daemon_that_answers_the_probes(name: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    *_, container = _containers(name)
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {"/data", "/run/jobd", "/run/secrets/jobd"}
    values = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    environ = {name: value.replace("$(JOBD_NODE_NAME)", "jobd-0") for name, value in values.items()}
    assert machine.succeeds(["jobd", "check-config"], environ)
    with machine.running(_json_form("CMD"), environ):
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            url = f"http://127.0.0.1:{machine.admin_port}{container[probe]['httpGet']['path']}"
            poll_until(partial(_answers, url))
