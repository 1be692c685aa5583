"""Measure the instructions and the time of a lifecycle, by stage: `make bench-cpu` prints JSON.

Batches of creates, then claims, then completes go through the stages of a request in one process, without sockets and
syncs. Callgrind counts the instructions, which repeat to a fraction of a percent on any machine with the same Python.
Times are the tenth percentile of the batches, which repeat to a few percent on an idle machine. HTTP, timers and the
switches between threads are only in `--http`: the instructions of a whole daemon with 16 connections.

`--check` fails if the instructions exceed the recorded ones by more than 3 %. A change that needs more says why in its
commit, and records them with `--record`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from jobd.core.state import State
from jobd.engine.batch import DecidedBatch, Decider
from jobd.engine.clock import monotonic_s
from jobd.engine.envelope import Envelope
from jobd.engine.idempotency import IdempotencyStore
from jobd.engine.preloading import Preloaded
from jobd.engine.waiting_claims import WaitingClaims
from jobd.http.decoding import Limits, RequestDecoder
from jobd.http.response import response_line
from jobd.model.clocks import LockMs
from jobd.model.commands import Claim, Command, Complete, Create, Moment
from jobd.model.job import Policy
from jobd.model.responses import Response
from jobd.storage import startup
from jobd.storage.tables.projection import Projection
from tests import ROOT
from tests.benchmarks.stage import BenchDaemon

T = TypeVar("T")

STAGES: Final = ("decode", "decide", "gather", "record", "commit", "note", "encode", "slice")
SIZE: Final = 15  # commands in a batch: what 16 connections send at once
WARM_UP: Final = 40  # rounds, after which the interpreter has specialised the code
COUNTED: Final = 20  # rounds, with a whole number of slices
TIMED: Final = 250  # rounds
BOUND: Final = 1.03
BASELINE: Final = Path(__file__).with_name("instructions.json")
PYTHON: Final = f"{sys.version_info.major}.{sys.version_info.minor}"
PAYLOAD: Final = json.dumps("x" * 198)
SHAPES: Final[dict[type[Command], RequestDecoder]] = {
    kind: RequestDecoder(kind, given, Limits()) for kind, given in ((Create, None), (Claim, None), (Complete, "id"))
}
CALLGRIND: Final = ("valgrind", "--quiet", "--tool=callgrind", "--instr-atstart=no", "--combine-dumps=no")
HTTP_S: Final = 20.0  # of load on a daemon that runs in callgrind, fifty times slower


class DroppingResponder:
    """A responder that drops its response: only the stages before it are measured."""

    def done(self) -> bool:
        return False

    def cancelled(self) -> bool:
        return False

    def set_result(self, response: object, /) -> None: ...


class MeasuredCore:
    """The core of a daemon. `measure` is called with the name of a stage, the kind of its commands, and its work."""

    def __init__(self, tables: Projection, measure: Callable[[str, str, Callable[[], Any]], Any]) -> None:
        self._tables = tables
        self._measure = measure
        self._state = State()
        self._decider = Decider(
            self._state,
            IdempotencyStore([], 1_000),
            WaitingClaims(self._state.presence),
            reject=lambda command: None,
            loop_time=monotonic_s,
        )
        self._policy = Policy()
        self._random = random.Random(1)
        self._now = 1_790_000_000_000

    def lifecycles(self) -> None:
        """Create, claim and complete SIZE jobs in three batches."""
        self._batch(Create, [(f'{{"payload":{PAYLOAD}}}'.encode(), None)] * SIZE)
        claims = [(f'{{"worker":"w-{number}"}}'.encode(), None) for number in range(SIZE)]
        granted = [response.grants[0] for response in self._batch(Claim, claims)]
        self._batch(Complete, [(f'{{"lock_id":"{lock_id}"}}'.encode(), job_id) for job_id, lock_id in granted])

    def _batch(self, command: type[Command], bodies: Sequence[tuple[bytes, str | None]]) -> list[Response]:
        tables, shape, kind = self._tables, SHAPES[command], command.__name__

        def measured(stage: str, work: Callable[[], T]) -> T:
            result: T = self._measure(stage, kind, work)
            return result

        commands: list[Any] = measured("decode", lambda: [shape.from_body(*body) for body in bodies])
        self._now += 3
        at = Moment(self._now, LockMs(self._now - 1_780_000_000_000), 1_780_000_000_000)
        decided = measured(
            "decide", lambda: self._decider.decide(self._envelopes(commands), at, Preloaded(), self._policy)
        )
        batch = measured("gather", lambda: self._decider.batch(decided, self._policy))
        prepared = measured("record", lambda: tables.prepare(batch))
        measured("commit", lambda: tables.journal.append(prepared.record))
        tables.accept(prepared)
        decided.fill(prepared.payloads)
        if tables.behind >= tables.slice_events:
            measured("slice", tables.project_slice)
        if tables.needs_upkeep:
            tables.upkeep()
        measured("note", lambda: self._note(decided))
        responses = [response for _, response in decided.replies if isinstance(response, Response)]
        assert len(responses) == len(bodies), "an error was measured"
        measured("encode", lambda: list(map(response_line, responses)))
        return responses

    def _envelopes(self, commands: list[Any]) -> list[Envelope]:
        seed = self._random.randbytes
        return [Envelope(each, "client", seed(16), futures=[DroppingResponder()]) for each in commands]

    def _note(self, decided: DecidedBatch) -> None:
        self._decider.committed(decided)
        self._state.counters.note(decided.changes)
        self._state.finished.trim()


def run(rounds: int, measure: Callable[[str, str, Callable[[], Any]], Any], begin: Callable[[], object]) -> None:
    """Run lifecycles without measuring, call `begin`, and measure `rounds` more."""
    measures = False
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "cpu.db")
        conn = startup.connect(path, "OFF")
        core = MeasuredCore(startup.start(conn, path)[0], lambda *asked: measure(*asked) if measures else asked[-1]())
        for _ in range(WARM_UP):
            core.lifecycles()
        begin()
        measures = True
        for _ in range(rounds):
            core.lifecycles()
        conn.close()


def times() -> dict[str, float]:
    """Return the microseconds of a lifecycle by stage."""
    taken: defaultdict[tuple[str, str], list[float]] = defaultdict(list)

    def measure(stage: str, kind: str, work: Callable[[], T]) -> T:
        began = time.perf_counter()
        done = work()
        taken[stage, "" if stage == "slice" else kind].append(time.perf_counter() - began)
        return done

    run(TIMED, measure, lambda: None)
    found = dict.fromkeys(STAGES, 0.0)
    for (stage, _), each in taken.items():
        batches = TIMED * SIZE * (1 if stage != "slice" else TIMED / len(each)) / TIMED
        found[stage] += sorted(each)[len(each) // 10] / batches * 1e6
    return _with_sum({stage: round(us, 2) for stage, us in found.items()})


def count(marks: str) -> None:
    """Run in callgrind, which writes a file for each stage of each batch."""
    library = ctypes.CDLL(marks)

    def measure(stage: str, kind: str, work: Callable[[], T]) -> T:
        name = stage.encode()
        library.zero()
        done = work()
        library.dump(name)
        return done

    def begin() -> None:
        library.begin()
        measure("nothing", "", int)

    run(COUNTED, measure, begin)


def instructions() -> dict[str, float]:
    """Return the thousands of instructions of a lifecycle by stage."""
    with tempfile.TemporaryDirectory() as directory:
        marks = os.path.join(directory, "marks.so")
        source = Path(__file__).with_name("callgrind_marks.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", marks, source], check=True)
        output = f"--callgrind-out-file={directory}/out"
        words = [*CALLGRIND, output, sys.executable, "-m", "tests.benchmarks.cpu", "--count", marks]
        subprocess.run(words, check=True, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "0"})
        found = defaultdict[str, list[int]](list)
        for dumped in Path(directory).glob("out.*"):
            stage, counted = _dumped(dumped)
            found[stage].append(counted)
    (nothing,) = found["nothing"]
    lifecycles = COUNTED * SIZE
    return _with_sum(
        {each: round((sum(found[each]) - len(found[each]) * nothing) / lifecycles / 1e3, 1) for each in STAGES}
    )


def _dumped(path: Path) -> tuple[str, int]:
    """Return the name of a dump, and its number of instructions."""
    lines = path.read_text().splitlines()
    (trigger,) = (line for line in lines if line.startswith("desc: Trigger:"))
    (total,) = (line for line in lines if line.startswith("totals:"))
    return trigger.rpartition(" ")[2], int(total.split()[1])


def http_instructions() -> float:
    """Return the thousands of instructions of a lifecycle over HTTP, with 16 connections, of a whole daemon."""
    with tempfile.TemporaryDirectory() as directory:
        output = f"--callgrind-out-file={directory}/out"
        with BenchDaemon(None, command=(*CALLGRIND, output)) as daemon:
            daemon.load("lifecycle", seconds=HTTP_S)
            control = ["callgrind_control", str(daemon.pid)]
            subprocess.run([*control, "--instr=on"], check=True, stdout=subprocess.DEVNULL)
            daemon.load("lifecycle", seconds=HTTP_S / 4)
            subprocess.run([*control, "--zero"], check=True, stdout=subprocess.DEVNULL)
            figures = daemon.load("lifecycle", seconds=HTTP_S)
            subprocess.run([*control, "--dump=loaded"], check=True, stdout=subprocess.DEVNULL)
            counted = [_dumped(each)[1] for each in Path(directory).glob("out.*")]
    per_s: float = figures["lifecycles_per_s"]
    return round(max(counted) / (per_s * HTTP_S) / 1e3, 1)


def _with_sum(found: dict[str, float]) -> dict[str, float]:
    return {**found, "sum": round(sum(found.values()), 1)}


def exceeded(found: dict[str, float], recorded: dict[str, float]) -> list[str]:
    """Return a sentence for each figure above BOUND. A stage may grow by one percent of the sum."""
    room = recorded["sum"] / 100
    return [
        f"{name}: {found[name]} thousand instructions, {recorded[name]} are recorded"
        for name in recorded
        if found[name] > max(recorded[name] * BOUND, recorded[name] + (room if name != "sum" else 0))
    ]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = options.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="compare the instructions with the recorded ones")
    what.add_argument("--record", action="store_true", help="record the instructions of this Python")
    what.add_argument("--count", metavar="LIBRARY", help=argparse.SUPPRESS)
    options.add_argument("--http", action="store_true", help="also count those of a daemon over HTTP, in a minute")
    chosen = options.parse_args()
    if chosen.count:
        count(chosen.count)
        return 0
    recorded: dict[str, dict[str, float]] = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    found: dict[str, Any] = {"python": sys.version.split()[0], "k_instructions": instructions()}
    if not (chosen.check or chosen.record):
        found["us"] = times()
    if chosen.http:
        found["http_k_instructions"] = http_instructions()
    print(json.dumps(found, indent=2))
    if chosen.record:
        recorded[PYTHON] = found["k_instructions"]
        BASELINE.write_text(json.dumps(recorded, indent=2) + "\n")
    elif chosen.check and PYTHON not in recorded:
        print(f"Nothing was compared: no instructions are recorded for Python {PYTHON}.", file=sys.stderr)
    elif chosen.check and (worse := exceeded(found["k_instructions"], recorded[PYTHON])):
        print(f"Above the bound of 3 %: {'; '.join(worse)}. {__doc__.splitlines()[-2]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
