"""The two distributions contain the tree, and each works in an environment that has only its requirements."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path
from typing import Final

import pytest
from packaging.requirements import Requirement

from jobd import __version__
from tests.support.daemon_process import DaemonProcess

pytestmark = pytest.mark.slow

ROOT: Final = Path(__file__).parents[2]
PROJECTS: Final = {"jobd-server": ROOT / "pyproject.toml", "jobd-client": ROOT / ".ci/client/pyproject.toml"}
CREATE_AND_WAIT: Final = """
import sys
from jobd import App
from jobd.client import JobClient

app = App("alone")

@app.task
def double(n: int) -> int:
    return 2 * n

job = double.enqueue(1)
with JobClient() as client:
    (grant,) = client.claim("w-1")
    client.complete_job(grant.job.id, lock_id=grant.lock_id, metadata=2)
print(job.status(), job.result(timeout=30))
assert not {"aiohttp", "click"} & set(sys.modules)
"""


def _run(*command: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JOBD_", "PYTHON"))}
    return subprocess.run(
        [str(part) for part in command], env={**clean, **environ}, cwd="/", capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build both distributions."""
    directory = tmp_path_factory.mktemp("wheels")
    build = _run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"),
        *(directory, ROOT, ROOT / ".ci/client"),
    )
    assert build.returncode == 0, build.stderr
    return {path.name.split("-")[0].replace("_", "-"): path for path in directory.glob("*.whl")}


class Environment:
    """A virtual environment with one of the distributions and what it requires, copied from this environment."""

    def __init__(self, directory: Path, wheels: dict[str, Path]) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
        self.bin = directory / "bin"
        self._site = next(directory.glob("lib/python*/site-packages"))
        self._wheels = wheels
        self._installed: set[str] = set()

    def install(self, name: str, *extras: str) -> None:
        """Install the distribution or package, and what it requires."""
        if name in self._wheels:
            self._pip("install", "--quiet", "--no-deps", "--no-index", self._wheels[name])
            project = tomllib.loads(PROJECTS[name].read_text())["project"]
            optional = project.get("optional-dependencies", {})
            required = [*project["dependencies"], *(each for extra in extras for each in optional[extra])]
        else:
            source = distribution(name)
            for file in source.files or []:
                if ".." not in file.parts and file.suffix != ".pyc":
                    (self._site / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(str(source.locate_file(file)), self._site / file)
            required = source.requires or []
        self._installed.add(name)
        for each in map(Requirement, required):
            if each.name not in self._installed and (each.marker is None or each.marker.evaluate({"extra": ""})):
                self.install(each.name)

    def check(self) -> None:
        """Fail if a requirement of an installed package is missing."""
        self._pip("check")

    def _pip(self, *command: str | Path) -> None:
        done = _run(sys.executable, "-m", "pip", "--python", self.bin / "python", *command)
        assert done.returncode == 0, done.stdout + done.stderr


def test_each_file_of_the_tree_is_in_exactly_one_distribution(wheels: dict[str, Path]) -> None:
    packed = [
        name for wheel in wheels.values() for name in zipfile.ZipFile(wheel).namelist() if name.startswith("jobd/")
    ]
    tracked = subprocess.run(["git", "ls-files", "jobd"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert sorted(packed) == sorted(tracked.split())


def test_the_client_needs_msgspec_only(wheels: dict[str, Path], tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv", wheels)
    environment.install("jobd-client")
    environment.check()
    with DaemonProcess(tmp_path) as daemon:
        done = _run(environment.bin / "python", "-c", CREATE_AND_WAIT, JOBD_SOCKET=daemon.socket)
        assert (done.stdout, done.stderr) == ("completed 2\n", "")
    refused = _run(environment.bin / "jobctl", "jobs")
    assert refused.returncode == 1
    assert refused.stderr == "jobctl needs the package click: pip install 'jobd-client[worker]'\n"


def test_the_client_with_its_extra_runs_workers(wheels: dict[str, Path], tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv", wheels)
    environment.install("jobd-client", "worker")
    environment.check()
    with DaemonProcess(tmp_path) as daemon:
        jobctl = environment.bin / "jobctl"
        submitted = _run(jobctl, "submit", "--id", "a", '{"n": 1}', JOBD_SOCKET=daemon.socket)
        ran = _run(jobctl, "run", "--once", "--", "cat", JOBD_SOCKET=daemon.socket)
        why = _run(jobctl, "why", "a", JOBD_SOCKET=daemon.socket)
    assert (submitted.stdout, ran.stdout) == ("a\n", '{"n": 1}\n'), submitted.stderr + ran.stderr
    assert why.stdout.startswith("completed"), why.stderr


def test_the_server_brings_the_client(wheels: dict[str, Path], tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv", wheels)
    environment.install("jobd-server")
    environment.check()
    ran = _run(environment.bin / "jobd", "bench", "--seconds", "0.1", "--runs", "1")
    assert (ran.returncode, "lifecycle" in ran.stdout) == (0, True), ran.stdout + ran.stderr
    assert _run(environment.bin / "jobctl", "--version").stdout.split()[-1] == __version__


@pytest.mark.parametrize("install", ["wheel", "editable"])
def test_mypy_and_pyright_find_the_same_errors(wheels: dict[str, Path], tmp_path: Path, install: str) -> None:
    python = Path(sys.executable)  # with an editable install of the tree
    if install == "wheel":
        environment = Environment(tmp_path / "venv", wheels)
        environment.install("jobd-client")
        environment.install("fastapi")
        python = environment.bin / "python"
    programs = tmp_path / "programs"
    programs.mkdir()
    for program in (ROOT / "tests/typing/typed_calls.py", *(ROOT / "docs/examples").rglob("*.py")):
        if "from jobd import" in program.read_text():
            shutil.copy(program, programs)
    config = {"typeCheckingMode": "strict", "reportUnnecessaryTypeIgnoreComment": "error"}
    (programs / "pyrightconfig.json").write_text(json.dumps(config))
    files = sorted(programs.glob("*.py"))
    options = ["--strict", "--config-file=", f"--cache-dir={tmp_path / 'cache'}", f"--python-executable={python}"]
    mypy = _run(sys.executable, "-m", "mypy", *options, *files)
    assert mypy.stdout == f"Success: no issues found in {len(files)} source files\n", mypy.stdout
    pyright = _run(sys.executable, "-m", "basedpyright", "--project", programs, "--pythonpath", python)
    assert pyright.stdout == "0 errors, 0 warnings, 0 notes\n", pyright.stdout
