"""A ledger of every acknowledgement and every unanswered request of the load, to compare with a store.

load.py generates the load.
"""

from __future__ import annotations

import bisect
import json
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from jobd.model.events import Event
from tests.proof.faults.store_check import StoreContents
from tests.support.daemon_process import ApiCalls

# Authors of events that the daemon causes itself. They may occur between those of clients.
DAEMON_ACTORS: Final = frozenset({"daemon", "recovery", "cleanup"})
_SETTLED: Final = frozenset({200, 201})


@dataclass(frozen=True)
class SentRequest:
    """A request that can be repeated. `event` is its journal entry if it is accepted."""

    event: str
    path: str
    body: dict[str, Any]
    key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.key is None else {"Idempotency_Key": self.key}


@dataclass
class JobRecord:
    """A job as its client knows it. `open` is the unanswered request, `events` are patterns for its journal."""

    job_id: str
    payload: Any
    events: list[str] = field(default_factory=list)
    answered_s: list[float] = field(default_factory=list)  # time.monotonic() of each response
    open: SentRequest | None = None

    def note(self, event: str) -> None:
        self.open = None
        self.events.append(event)
        self.answered_s.append(time.monotonic())

    def note_optional(self, event: str) -> None:
        """Note an event that may also have happened before the open request."""
        self.events.append(f"({event};)?")
        self.answered_s.append(time.monotonic())

    def pattern(self, until_s: float) -> str:
        """Return the pattern of a journal that has everything answered before `until_s`."""
        sure = bisect.bisect_left(self.answered_s, until_s)
        maybe = [*self.events[sure:], *([] if self.open is None else [self.open.event])]
        return events_pattern(self.events[:sure]) + _prefix_pattern(maybe)


class Ledger:
    """The jobs of all clients. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.jobs: dict[str, JobRecord] = {}
        self.tokens: dict[int, str] = {}
        self.granted_s: dict[int, float] = {}  # when each was received
        self.codes: Counter[str] = Counter()
        self.acknowledged = 0
        self._enough = 0
        self._got_enough = threading.Event()

    def wait_for(self, more: int, timeout_s: float = 60.0) -> bool:
        """Wait for this many more acknowledgements; return whether they came."""
        with self._lock:
            self._enough = self.acknowledged + more
            self._got_enough.clear()
        return self._got_enough.wait(timeout_s)

    def begin(self, job_id: str, payload: Any) -> JobRecord:
        with self._lock:
            return self.jobs.setdefault(job_id, JobRecord(job_id, payload))

    def succeeded(self, record: JobRecord, request: SentRequest, data: Any) -> None:
        """Record a successful response."""
        with self._lock:
            record.note(request.event)
            self._count(1)
            if request.event == "granted":
                self._note_token(record, data["fencing_token"])

    def rejected(self, record: JobRecord, request: SentRequest, code: str) -> None:
        """Record a definite error: nothing was changed."""
        with self._lock:
            record.open = None
            self.codes[code] += 1

    def _count(self, more: int) -> None:
        self.acknowledged += more
        if self.acknowledged >= self._enough:
            self._got_enough.set()

    def _note_token(self, record: JobRecord, token: int) -> None:
        holder = self.tokens.setdefault(token, record.job_id)
        self.granted_s.setdefault(token, record.answered_s[-1])
        assert holder == record.job_id, f"token {token} was granted for {holder} and again for {record.job_id}"

    def write(self, file: Path) -> None:
        """Write all jobs, one a line, as JSON."""
        file.write_text("".join(f"{json.dumps(asdict(record))}\n" for record in self.jobs.values()))

    # -- afterwards ---------------------------------------------------------------------------------------------------

    def settle(self, daemon: ApiCalls) -> int:
        """Repeat unanswered requests with their keys, so that each has taken effect. Return their number."""
        settled = 0
        for record in [record for record in self.jobs.values() if record.open is not None]:
            request = record.open
            assert request is not None
            reply = daemon.post(request.path, request.body, **request.headers)
            assert reply.status in _SETTLED, f"{record.job_id}: {request} was repeated and rejected: {reply.body}"
            if request.event in ("progress", "extended"):  # these happen again if repeated
                record.note(f"({request.event};)?{request.event}")
            else:
                self.succeeded(record, request, reply.data)
            settled += 1
        return settled

    def check(self, store: StoreContents, *, until_s: float = math.inf) -> int:
        """Check that the store has every acknowledged change once and no rejected one. Return how many were checked.

        Changes answered at `until_s` (time.monotonic()) or later may be missing.
        """
        checked = 0
        for record in self.jobs.values():
            events = _without_undelivered(store.events.get(record.job_id, []))
            seen = "".join(f"{event};" for event in caused_by_clients(events))
            pattern = record.pattern(until_s)
            assert re.fullmatch(pattern, seen), f"{record.job_id}: expected {pattern}, the store has {seen}"
            if seen:
                assert store.payloads[record.job_id] == record.payload, f"{record.job_id} has another payload"
            checked += bisect.bisect_left(record.answered_s, until_s)
        for token, job_id in self.tokens.items():
            granted_s = self.granted_s[token]
            assert store.tokens.get(token) == job_id or granted_s >= until_s, f"token {token} of {job_id} is not there"
        return checked

    def forget_lost(self, store: StoreContents, since_s: float) -> int:
        """Remove responses since `since_s` whose changes the store does not have. Return their number."""
        forgotten = 0
        for record in self.jobs.values():
            late = len(record.events) - bisect.bisect_left(record.answered_s, since_s)
            seen = caused_by_clients(store.events.get(record.job_id, []))
            if late and len(seen) < len(record.events):
                forgotten += len(record.events) - len(seen)
                del record.events[len(seen) :], record.answered_s[len(seen) :]
                record.open = None
        for token, job_id in list(self.tokens.items()):
            if self.granted_s[token] >= since_s and store.tokens.get(token) != job_id:
                del self.tokens[token], self.granted_s[token]
        return forgotten


def events_pattern(events: Iterable[str]) -> str:
    """Return a regular expression for these events. An item that ends with ? is an expression already."""
    return "".join(event if event.endswith("?") else f"{event};" for event in events)


def _prefix_pattern(events: list[str]) -> str:
    """Return a regular expression for any prefix of these events."""
    pattern = ""
    for event in reversed(events):
        pattern = f"({events_pattern([event])}{pattern})?"
    return pattern


def _without_undelivered(events: Iterable[Event]) -> list[Event]:
    """Leave out grants that the daemon took back because their client had gone. A repeat is granted again."""
    kept: list[Event] = []
    for event in events:
        if event.type == "undelivered":
            del kept[max(index for index, each in enumerate(kept) if each.type == "granted")]
        else:
            kept.append(event)
    return kept


def caused_by_clients(events: Iterable[Event]) -> list[str]:
    """Return the types of the events that clients caused, without records of rejected calls."""
    return [event.type for event in events if event.by not in DAEMON_ACTORS and event.type != "late_call"]
