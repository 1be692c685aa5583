"""A worker: for each mutant that it is told of it forks a child, and says whether some test noticed.

Runs in a copy of the sources. It has imported pytest and what the tests need, but nothing of ours: that does a second
process, which has collected all tests, and forks children into whose loaded modules a mutant is put. Mutants that have
to be there at import go into children of the first.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import IO, Any, Final, NoReturn

import msgspec
import pytest

from tests.mutation import child
from tests.mutation.levels import ALONE, DEEP, MIRRORS, NEAR, files
from tests.mutation.mutate import Mutant

OPTIONS: Final = [
    "-q", "-x", "-s", "--tb=line", "--assert=plain", "-p", "no:cacheprovider", "-o", "timeout=0",
    "-p", "pytest_asyncio.plugin", "-p", "pytest_timeout", "-p", "_hypothesis_pytestplugin", "--hypothesis-seed=0",
]  # fmt: skip
PRELOADED: Final = (
    "aiohttp.web", "blockbuster", "hypothesis.strategies", "prometheus_client", "structlog", "uvloop",
)  # fmt: skip
TICK_S: Final = 0.25
# A test that waits for what never comes takes no CPU time. Counted in our own ticks: if this machine stops us for
# a while, it does so with our children.
LONGEST_WAIT_TICKS: Final = 60
SURVEY: Final = "survey-{}.json"


class Verdict(msgspec.Struct):
    """`by` is the test that noticed, or why there was none to tell; empty where nobody noticed."""

    by: str
    deep: bool
    seconds: float
    unfit: bool = False


class Survey(msgspec.Struct):
    """Which near tests run which lines of a module, and the seconds that each takes."""

    tests: dict[str, dict[int, list[str]]] = {}
    seconds: dict[str, float] = {}


def surveyed(parts: int) -> Survey:
    """What all workers have found, each in its part of the tests."""
    whole = Survey({module: {} for module in MIRRORS})
    for part in range(parts):
        with open(SURVEY.format(part), "rb") as told:
            found = msgspec.json.decode(told.read(), type=Survey)
        whole.seconds |= found.seconds
        for module, by_line in found.tests.items():
            for line, names in by_line.items():
                whole.tests[module].setdefault(line, []).extend(names)
    return whole


def main() -> None:
    link = socket.socket(fileno=int(sys.argv[1]))
    _preload()
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        link.close()
        _die_with_parent()
        warm = Warm(theirs.makefile("rw", encoding="utf-8"))
        os._exit(pytest.main([*OPTIONS, *files(NEAR), *ALONE, *DEEP], plugins=[warm]))
    theirs.close()
    loaded = ours.makefile("rw", encoding="utf-8")
    talk = link.makefile("rw", encoding="utf-8")
    survey = Survey()
    while line := talk.readline():
        request = json.loads(line)
        answer = _asked(loaded, line)
        if request["ask"] == "read":
            survey = surveyed(request["parts"])
        elif request["ask"] == "judge" and json.loads(answer)["unfit"]:
            mutant = msgspec.convert(request["mutant"], Mutant)
            answer = msgspec.json.encode(_cold(mutant, survey, near_only=request["near_only"])).decode()
        talk.write(answer.strip() + "\n")
        talk.flush()
    loaded.close()
    ours.close()
    os.wait()


def _asked(loaded: IO[str], line: str) -> str:
    loaded.write(line)
    loaded.flush()
    answer = loaded.readline()
    if not answer:
        raise SystemExit("the tests cannot be collected: see worker.log")
    return answer


def _preload() -> None:
    """What every test file imports, and the settings of hypothesis: the same examples each time, none kept."""
    for name in PRELOADED:
        importlib.import_module(name)
    import hypothesis

    hypothesis.settings.register_profile(
        "mutation",
        derandomize=True,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.settings.load_profile("mutation")


# -- children ---------------------------------------------------------------------------------------------------------


def _in_child(work: Callable[[int], None], longest_ticks: int = LONGEST_WAIT_TICKS) -> str:
    """Fork; `work` gets the file to tell of tests. Gives the test that failed, how the child ended, or nothing."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _work_and_end(work, write)
    os.close(write)
    told = b""
    quiet = 0
    while quiet < longest_ticks:
        if not select.select([read], [], [], TICK_S)[0]:
            quiet += 1
            continue
        if not (some := os.read(read, 65_536)):
            break
        told += some
        quiet = 0
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(read)
    _, status = os.waitpid(pid, 0)
    if child.KILLED in told:
        return told[told.index(child.KILLED) + 1 :].split(b"\n")[0].decode()
    if os.WIFSIGNALED(status):
        return f"timeout ({signal.Signals(os.WTERMSIG(status)).name})"
    code = os.waitstatus_to_exitcode(status)
    return "" if code == 0 else f"exit {code}"


def _work_and_end(work: Callable[[int], None], write: int) -> NoReturn:
    code = 70
    try:
        _die_with_parent()
        child.limit_memory()
        work(write)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        os._exit(code)


def _die_with_parent() -> None:
    from tests.process import die_with_us

    die_with_us()


def _cold(mutant: Mutant, survey: Survey, *, near_only: bool) -> Verdict:
    """A mutant that is there when its module is imported."""
    began_s = time.perf_counter()
    mirrors = files(MIRRORS[mutant.module])
    others = [*ALONE, *(each for each in files(NEAR) if each not in mirrors)]
    by = ""
    deep = False
    for deep, group in (*((False, [file]) for file in mirrors), (False, others), (True, list(DEEP))):
        if deep and near_only:
            break

        def work(told: int, group: list[str] = group) -> None:
            child.import_changed(mutant)
            watch = child.Watch(told, survey.seconds)
            sys.exit(pytest.main([*OPTIONS, *group], plugins=[watch]))

        by = _in_child(work)
        if by:
            break
    return Verdict(by, deep, time.perf_counter() - began_s)


class Warm:
    """A pytest plugin: once all tests are collected it serves requests, each in a child of this process."""

    def __init__(self, talk: IO[str]) -> None:
        self.talk = talk
        self.survey = Survey()
        self.items: dict[str, pytest.Item] = {}
        self.ran: set[tuple[str, str]] = set()

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        package = os.path.abspath("jobd") + os.sep

        def note(frame: Any, event: str, _argument: Any) -> None:
            code = frame.f_code
            if event == "call" and code.co_filename.startswith(package):
                self.ran.add((code.co_filename[len(package) : -len(".py")], code.co_qualname))

        sys.setprofile(note)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        sys.setprofile(None)
        if session.testsfailed:
            raise session.Interrupted("some tests cannot be collected")
        self.items = {item.nodeid: item for item in session.items}
        while line := self.talk.readline():
            request = json.loads(line)
            if request["ask"] == "survey":
                answer = json.dumps({"failed": self._surveyed(request["part"], request["parts"])})
            elif request["ask"] == "read":
                self.survey = surveyed(request["parts"])
                answer = "{}"
            else:
                mutant = msgspec.convert(request["mutant"], Mutant)
                answer = msgspec.json.encode(self._judged(mutant, near_only=request["near_only"])).decode()
            self.talk.write(answer + "\n")
            self.talk.flush()
        os._exit(0)

    def _surveyed(self, part: int, parts: int) -> str:
        """Run this part of the near tests, and note which lines each runs. Gives the test that failed, if any."""
        import coverage

        items = [item for nodeid, item in self.items.items() if not _is_deep(nodeid)][part::parts]

        def work(told: int) -> None:
            measured = coverage.Coverage(data_file=None, branch=False, source=["jobd"], config_file=False)
            watch = child.Watch(told, dict.fromkeys(self.items, 60.0))
            survey = Survey()
            measured.start()
            for item in items:
                measured.switch_context(item.nodeid)
                began_s = time.process_time()
                _run(item, watch)
                survey.seconds[item.nodeid] = time.process_time() - began_s
                if watch.failed:
                    sys.exit(1)
            measured.stop()
            found = measured.get_data()
            for module in MIRRORS:
                by_line = found.contexts_by_lineno(os.path.abspath(f"jobd/{module}.py"))
                survey.tests[module] = {line: [name for name in names if name] for line, names in by_line.items()}
            with open(SURVEY.format(part), "wb") as kept:
                kept.write(msgspec.json.encode(survey))

        return _in_child(work, 40 * LONGEST_WAIT_TICKS)

    def _judged(self, mutant: Mutant, *, near_only: bool) -> Verdict:
        began_s = time.perf_counter()
        if not mutant.scope or (mutant.module, mutant.scope) in self.ran:
            return Verdict("", False, 0, unfit=True)
        deep = [] if near_only else [name for name in self.items if _is_deep(name)]
        for is_deep, names in ((False, self._near(mutant)), (True, deep)):

            def work(told: int, names: list[str] = names) -> None:
                watch = child.Watch(told, self.survey.seconds)
                try:
                    child.put_in_place(mutant)
                except child.Unfit:
                    os.write(told, child.KILLED + b"unfit\n")
                    return
                for name in names:
                    _run(self.items[name], watch)
                    if watch.failed:
                        return

            by = _in_child(work)
            if by:
                return Verdict(by, is_deep, time.perf_counter() - began_s, unfit=by == "unfit")
        return Verdict("", True, time.perf_counter() - began_s)

    def _near(self, mutant: Mutant) -> list[str]:
        """The near tests that run what was changed: first those that mirror the module, quick ones before slow ones."""
        lines = self.survey.tests[mutant.module]
        names = {name for line in range(mutant.first, mutant.last + 1) for name in lines.get(line, ())}
        first = tuple(files(MIRRORS[mutant.module]))
        return sorted(names, key=lambda name: (not name.startswith(first), self.survey.seconds[name], name))


def _run(item: pytest.Item, watch: child.Watch) -> None:
    """As pytest would, all by itself: whatever it shares with others is set up and torn down for it."""
    if not item.config.pluginmanager.has_plugin("watch"):
        item.config.pluginmanager.register(watch, "watch")
    item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)


def _is_deep(nodeid: str) -> bool:
    return nodeid.startswith(DEEP)


if __name__ == "__main__":
    main()
