"""Describe an unexplained history: the longest order that fits, its final state, and the calls that do not fit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Final

from tests.proof.linearizability.history import Operation
from tests.proof.linearizability.model import MS, HistoryConditions
from tests.proof.linearizability.search import SearchResult

SHOWN: Final = 12
SECRET: Final = 8  # characters that distinguish locks


def describe(operations: Sequence[Operation], world: HistoryConditions, verdict: SearchResult) -> Iterator[str]:
    """Yield the history in the order of the calls, then the end of the longest order that fits."""
    start_ns = operations[0].call_ns
    yield f"terms: {world.terms}"
    for outage in world.outages:
        down_ms, up_ms = (outage.down_ns - start_ns) / MS, (outage.up_ns - start_ns) / MS
        yield f"the daemon was down from {down_ms:.3f} to {up_ms:.3f} ms"
    yield "all calls, with the ms of call and response:"
    yield from (f"  {line(each, start_ns)}" for each in operations)
    yield f"the longest order that fits has {len(verdict.order)} of them and ends with:"
    yield from (f"  {line(each, start_ns)}" for each in verdict.order[-SHOWN:])
    state = {name: value for name, value in verdict.state._asdict().items() if name != "safe_until"}
    yield f"it leads to {short(json.dumps(state))}"
    yield "none of these fits after it:"
    left = [each for each in operations if each not in verdict.order]
    yield from (f"  {line(each, start_ns)}" for each in left[:SHOWN])


def line(operation: Operation, start_ns: int) -> str:
    end = "     lost" if operation.return_ns is None else f"{(operation.return_ns - start_ns) / MS:9.3f}"
    body = {name: value for name, value in operation.body.items() if operation.verb != "create" or name == "payload"}
    said = (
        "?" if operation.response is None else f"{operation.response.code} {short(json.dumps(operation.response.seen))}"
    )
    who = f"{(operation.call_ns - start_ns) / MS:9.3f} {end} {f'c{operation.client}':>4}"
    return f"{who} {operation.verb} {short(json.dumps(body))} -> {said}"


def short(text: str) -> str:
    """Shorten locks."""
    return " ".join(
        f'"{word.strip(chr(34))[:SECRET]}…"' + word[word.rindex('"') + 1 :] if len(word) > 30 and '"' in word else word
        for word in text.split(" ")
    )
