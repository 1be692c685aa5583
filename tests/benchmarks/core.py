"""Measure each step of a command without sockets: `python -m tests.benchmarks.core` prints JSON.

Batches of creates, then claims, then completes go through the steps of a request: decode the bodies, decide the batch,
write it with fsync, and encode the responses. Times are microseconds per command, the median over the rounds. Their sum
is less than the cost of a request, because HTTP and the thread switches are not included.
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from jobd.core.state import State
from jobd.engine.batch import DecidedBatch, Decider, Preloaded
from jobd.engine.clock import monotonic_s
from jobd.engine.envelope import Envelope
from jobd.engine.idempotency import IdempotencyStore
from jobd.engine.waiting_claims import WaitingClaims
from jobd.http.decoding import Limits, RequestDecoder
from jobd.http.response import response_line
from jobd.model.clocks import LockMs
from jobd.model.commands import Claim, Command, Complete, Create, Moment
from jobd.model.job import Policy
from jobd.model.responses import Response
from jobd.storage import startup
from jobd.storage.tables.projection import Projection

T = TypeVar("T")

SIZES: Final = (1, 16, 128)
PAYLOAD: Final = json.dumps("x" * 198)
SHAPES: Final[dict[type[Command], RequestDecoder]] = {
    kind: RequestDecoder(kind, given, Limits()) for kind, given in ((Create, None), (Claim, None), (Complete, "id"))
}


class DroppingResponder:
    """A responder that drops its response: only the steps before it are measured."""

    def done(self) -> bool:
        return False

    def cancelled(self) -> bool:
        return False

    def set_result(self, response: object, /) -> None: ...


class MeasuredCore:
    """The core of a daemon. `times` has the microseconds per command of each step."""

    def __init__(self, tables: Projection) -> None:
        self.times: defaultdict[str, list[float]] = defaultdict(list)
        self._tables = tables
        self._book = State()
        self._decider = Decider(
            self._book,
            IdempotencyStore([], 1_000),
            WaitingClaims(self._book.presence),
            reject=lambda command: None,
            loop_time=monotonic_s,
        )
        self._policy = Policy()
        self._began = time.monotonic_ns()

    def lifecycle(self, size: int) -> None:
        """Create, claim and complete `size` jobs in three batches."""
        self._batch(Create, [(f'{{"payload":{PAYLOAD}}}'.encode(), None)] * size)
        claims = [(f'{{"worker":"w-{number}"}}'.encode(), None) for number in range(size)]
        granted = [response.grants[0] for response in self._batch(Claim, claims)]
        self._batch(Complete, [(f'{{"lock_id":"{lock_id}"}}'.encode(), job_id) for job_id, lock_id in granted])

    def _batch(self, kind: type[Command], bodies: Sequence[tuple[bytes, str | None]]) -> list[Response]:
        shape, count = SHAPES[kind], len(bodies)
        commands: list[Any] = self._timed("decode", count, lambda: [shape.from_body(*body) for body in bodies])
        envelopes = [
            Envelope(each, "client", secrets.token_bytes(16), futures=[DroppingResponder()]) for each in commands
        ]
        now, lock_ms = time.time_ns() // 1_000_000, (time.monotonic_ns() - self._began) // 1_000_000
        at = Moment(now, LockMs(lock_ms), now - lock_ms)
        plan = self._timed("decide", count, lambda: self._decider.decide(envelopes, at, Preloaded(), self._policy))
        batch = self._timed("gather", count, lambda: self._decider.batch(plan, self._policy))
        plan.fill(self._timed("write and fsync", count, lambda: self._tables.append(batch, 0)))
        if self._tables.behind >= self._tables.slice_events:
            slice_events = self._tables.behind
            self._timed("slice", slice_events, self._tables.project)
        if self._tables.needs_upkeep:
            self._tables.upkeep()
        self._timed("note", count, lambda: self._note(plan))
        responses = [response for _, response in plan.replies if isinstance(response, Response)]
        assert len(responses) == count, "an error was measured"
        self._timed("encode", count, lambda: list(map(response_line, responses)))
        return responses

    def _note(self, plan: DecidedBatch) -> None:
        self._decider.committed(plan)
        self._book.counters.note(plan.changes)
        self._book.trim_finished()

    def _timed(self, name: str, count: int, work: Callable[[], T]) -> T:
        began = time.perf_counter()
        done = work()
        self.times[name].append((time.perf_counter() - began) / count * 1e6)
        return done


def measure(directory: Path, size: int, rounds: int) -> dict[str, float]:
    path = str(directory / f"core-{size}.db")
    conn = startup.connect(path, "FULL")
    try:
        steps = MeasuredCore(startup.start(conn, path)[0])
        for _ in range(rounds):
            steps.lifecycle(size)
    finally:
        conn.close()
    found = {name: round(statistics.median(times), 1) for name, times in steps.times.items()}
    return {**found, "sum": round(sum(found.values()), 1)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=200)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        sizes = {str(size): measure(Path(directory), size, chosen.rounds) for size in SIZES}
    print(json.dumps({"us_per_command_by_batch": sizes}, indent=2))


if __name__ == "__main__":
    main()
