"""`python -m tests.mutation [--modules rules,book] [--jobs 2] [--sample N --seed K] [--json]`: change the pure rooms.

One small change at a time, in a copy of the sources; some test has to notice. A change that none notices is listed in
survivors.md with the argument for it, or this fails. One on the list has been argued for, so that the tests beside its
module are all that is asked again; `--deep-listed` asks those that go deep as well. Exit code 0 where every survivor is
on the list (and, where all mutants of a module were made, nobody else is), 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final

import msgspec

from tests.mutation.levels import MODULES
from tests.mutation.listed import SURVIVORS, argued, as_line
from tests.mutation.mutate import Mutant, mutants, unchanged
from tests.process import die_with_us

ROOT: Final = Path(__file__).parent.parent.parent
COPIED: Final = ("jobd", "tests", "docs")
ENOUGH: Final = 0.95  # of the mutants have to be noticed
TOLD_EVERY_S: Final = 10.0


class Judged(msgspec.Struct):
    """A mutant, and what came of it: the test that noticed (or that it never ended), empty where none did."""

    name: str
    module: str
    operator: str
    by: str
    deep: bool
    seconds: float

    @property
    def survived(self) -> bool:
        return not self.by


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--modules", default=",".join(MODULES), help="pure modules, separated by commas")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--sample", type=int, help="only so many mutants, chosen by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="only mutants whose name contains this (or that)")
    parser.add_argument("--near", action="store_true", help="stop after the tests beside the module: more survive")
    parser.add_argument("--deep-listed", action="store_true", help="the deep tests for those in survivors.md, too")
    parser.add_argument("--json", action="store_true", help="one line for each mutant as it is judged, on stdout")
    given = parser.parse_args(arguments)
    modules = given.modules.split(",")
    if unknown := set(modules) - set(MODULES):
        parser.error(f"no pure modules: {', '.join(sorted(unknown))}")
    began_s = time.perf_counter()
    listed = argued(SURVIVORS.read_text("utf-8"))
    with tempfile.TemporaryDirectory(prefix="jobd-mutation-") as place:
        root = copied(Path(place))
        chosen = _chosen(root, modules, given, listed)
        shallow = not_deep((each.full_name for each in chosen), listed, near=given.near, deep_listed=given.deep_listed)
        judged = judge(root, chosen, given.jobs, shallow, as_json=given.json)
    whole = given.sample is None and given.only is None and not given.near
    return _tell(judged, modules, listed, whole=whole, seconds=time.perf_counter() - began_s)


def copied(place: Path) -> Path:
    """The sources as they are now, so that whoever edits them meanwhile changes no verdict."""
    for name in COPIED:
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, place)
    return place


def _chosen(root: Path, modules: Sequence[str], given: argparse.Namespace, listed: Collection[str]) -> list[Mutant]:
    found = [each for name in modules for each in mutants(name, (root / f"jobd/{name}.py").read_text("utf-8"))]
    if given.only is not None:
        found = [each for each in found if any(part in each.full_name for part in given.only)]
    if given.sample is not None:
        # By name: an edit elsewhere does not choose others. Of those on the list nothing is to be learned.
        found = [each for each in found if each.full_name not in listed]
        found = sorted(found, key=lambda each: blake2b(f"{given.seed}: {each.full_name}".encode()).digest())
        found = found[: given.sample]
    return found


def not_deep(names: Iterable[str], listed: Collection[str], *, near: bool, deep_listed: bool) -> set[str]:
    """Those about which the deep tests are not asked: the ones argued for already, or all."""
    return {name for name in names if near or (name in listed and not deep_listed)}


# -- workers ----------------------------------------------------------------------------------------------------------


class Worker:
    """One worker process and the line to it."""

    def __init__(self, root: Path, number: int) -> None:
        ours, theirs = socket.socketpair()
        self.log = root / f"worker-{number}.log"
        with theirs, self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.mutation.worker", str(theirs.fileno())],
                cwd=root,
                env=_environment(root),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_us,
            )
        self._socket = ours
        self._talk = ours.makefile("rw", encoding="utf-8")

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._talk.write(json.dumps(request) + "\n")
        self._talk.flush()
        line = self._talk.readline()
        if not line:
            raise RuntimeError(f"a worker ended: {self.log.read_text('utf-8', 'replace')[-4000:]}")
        return dict(json.loads(line))

    def close(self) -> None:
        self._talk.close()
        self._socket.close()
        self.process.wait()


def _environment(root: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JOBD_", "PYTEST_", "CI"))}
    return kept | {"PYTHONPATH": str(root), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONHASHSEED": "0"}


@contextmanager
def _workers(root: Path, count: int) -> Iterator[list[Worker]]:
    with ExitStack() as stack:
        workers = []
        for number in range(count):
            worker = Worker(root, number)
            stack.callback(worker.close)
            workers.append(worker)
        yield workers


def judge(
    root: Path, chosen: Sequence[Mutant], jobs: int, shallow: Collection[str] = (), *, as_json: bool = False
) -> list[Judged]:
    """What came of each mutant, in the order given; the deep tests are not asked about those in `shallow`.

    Raises RuntimeError where tests fail without any.
    """
    waiting: SimpleQueue[Mutant] = SimpleQueue()
    for each in chosen:
        waiting.put(each)
    judged: dict[str, Judged] = {}
    failures: list[Exception] = []
    with _workers(root, jobs) as workers:
        _survey(workers)
        _check(root, chosen, workers[0])

        def serve(worker: Worker) -> None:
            try:
                while not failures:
                    mutant = waiting.get_nowait()
                    near_only = mutant.full_name in shallow
                    request = {"ask": "judge", "mutant": msgspec.to_builtins(mutant), "near_only": near_only}
                    verdict = worker.ask(request)
                    judged[mutant.full_name] = each = Judged(
                        mutant.full_name,
                        mutant.module,
                        mutant.operator,
                        verdict["by"],
                        verdict["deep"],
                        verdict["seconds"],
                    )
                    if as_json:
                        line = msgspec.json.encode(each).decode()
                        print(f"{line}\n", end="", flush=True)  # in one write: there are other threads
            except Empty:
                pass
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=serve, args=(worker,)) for worker in workers]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(TOLD_EVERY_S / len(threads))
            survived = sum(each.survived for each in list(judged.values()))
            print(f"{len(judged)} of {len(chosen)} mutants, {survived} survive", file=sys.stderr)
    if failures:
        raise failures[0]
    return [judged[each.full_name] for each in chosen]


def _survey(workers: Sequence[Worker]) -> None:
    """Which test runs which line: each worker looks at a part of the tests."""
    parts = len(workers)
    with ThreadPoolExecutor(parts) as pool:
        asked = [
            pool.submit(worker.ask, {"ask": "survey", "part": part, "parts": parts})
            for part, worker in enumerate(workers)
        ]
        failed = [answer["failed"] for each in asked if (answer := each.result())["failed"]]
    if failed:
        raise RuntimeError(f"a test fails without any change: {failed[0]}")
    for worker in workers:
        worker.ask({"ask": "read", "parts": parts})


def _check(root: Path, chosen: Sequence[Mutant], worker: Worker) -> None:
    """What changes nothing survives, on the way of each kind of mutant: else everything would count as noticed."""
    for is_inside in (True, False):
        some = next((each for each in chosen if bool(each.scope) == is_inside), None)
        if some is None:
            continue
        same = unchanged(some, (root / f"jobd/{some.module}.py").read_text("utf-8"))
        verdict = worker.ask({"ask": "judge", "mutant": msgspec.to_builtins(same), "near_only": True})
        if verdict["by"]:
            raise RuntimeError(f"a test fails without any change: {verdict['by']}")


# -- what came of it --------------------------------------------------------------------------------------------------


def _tell(
    judged: Sequence[Judged], modules: Sequence[str], listed: Collection[str], *, whole: bool, seconds: float
) -> int:
    survivors = {each.name for each in judged if each.survived}
    print(
        f"{'module':16}{'mutants':>8}{'killed':>8}{'by depth':>10}{'no end':>8}{'argued':>8}{'open':>6}{'s':>8}", end=""
    )
    print("   killed by")
    for module in [*modules, "all"]:
        some = [each for each in judged if module in (each.module, "all")]
        if some:
            print(_row(module, some, listed))
    open_ones = [each.name for each in judged if each.survived and each.name not in listed]
    for module in modules:
        if mine := [name for name in open_ones if _module(name) == module]:
            print(f"\nNo test notices, and nothing is said about it:\n\n## `{module}`\n")
            print("\n".join(as_line(name) for name in mine))
    stale = sorted({name for name in listed if _module(name) in modules} - survivors) if whole else []
    if stale:
        print("\nListed, but a test notices it or it cannot be made any more:\n")
        print("\n".join(f"- {name}" for name in stale))
    killed = len(judged) - len(survivors)
    share = killed / len(judged) if judged else 1.0
    print(
        f"\n{len(judged)} mutants in {seconds:.0f} s: {killed} killed ({share:.1%}), {len(survivors)} survive, ", end=""
    )
    print(f"{len(survivors) - len(open_ones)} of them argued for.")
    if share < ENOUGH and whole:
        print(f"At least {ENOUGH:.0%} have to be killed.")
    return 1 if open_ones or stale or (whole and share < ENOUGH) else 0


def _row(module: str, judged: Sequence[Judged], listed: Collection[str]) -> str:
    killed = [each for each in judged if not each.survived]
    survivors = [each for each in judged if each.survived]
    named = sum(each.name in listed for each in survivors)
    endless = sum(each.by.startswith("timeout") for each in killed)
    by = Counter(each.by.split("::")[0].removeprefix("tests/") for each in killed).most_common(3)
    return (
        f"{module:16}{len(judged):8}{len(killed):8}{sum(each.deep for each in killed):10}{endless:8}{named:8}"
        f"{len(survivors) - named:6}{sum(each.seconds for each in judged):8.0f}   "
        + ", ".join(f"{name} {count}" for name, count in by)
    )


def _module(name: str) -> str:
    return name.partition(".")[0]


if __name__ == "__main__":
    sys.exit(main())
