"""The checker: small histories with known verdicts, comparison with a brute-force search, and a real daemon.

The long run is `make linearizability`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any, Final

import pytest
from msgspec.structs import replace

from tests.proof.linearizability import __main__ as program
from tests.proof.linearizability.history import CallHistory, Operation, Outage, SeenResponse, Terms, overlapping
from tests.proof.linearizability.model import GRACE, MS, NEVER, RULES, HistoryConditions, ModelState, drifts, step
from tests.proof.linearizability.mutate import KINDS
from tests.proof.linearizability.report import describe
from tests.proof.linearizability.search import judge

ENDLESS: Final = HistoryConditions(Terms(max_attempts=2))
SHORT: Final = HistoryConditions(Terms(max_attempts=2, progress_timeout_ms=10))


def op(
    verb: str, call: int, end: int | None, code: str = "", body: dict[str, Any] | None = None, **seen: Any
) -> Operation:
    """A call from `call` to `end` (ms); without an end its response was lost."""
    said = SeenResponse(code, seen) if code else None
    end_ns = None if end is None else end * MS
    return Operation(1, verb, "a", body or {"worker": "v"}, call * MS, end_ns, said)


def created(call: int = 0, end: int = 1) -> Operation:
    return op("create", call, end, "created")


def granted(call: int, end: int, lock: str, token: int = 1, worker: str = "w") -> Operation:
    return op("start", call, end, "granted", {"worker": worker}, lock=lock, token=token)


def held(verb: str, call: int, end: int | None, lock: str, code: str = "", by: str = "x", **seen: Any) -> Operation:
    bodies: dict[str, dict[str, Any]] = {
        "progress": {"progress": 5},
        "complete": {"metadata": {"by": by}},
        "fail": {"error_message": by, "retry": True},
    }
    return op(verb, call, end, code, {"lock_id": lock, **bodies.get(verb, {})}, **seen)


def got(call: int, end: int, **seen: Any) -> Operation:
    return op("get", call, end, "done", **seen)


BEGUN: Final = [created(), granted(2, 3, "L1")]
COMPLETED: Final = [*BEGUN, held("complete", 4, 5, "L1", "done")]
RELEASED: Final = [*BEGUN, held("release", 4, 5, "L1", "done")]
LOST: Final = [*BEGUN, held("complete", 4, None, "L1")]  # its response was lost
LOST_START: Final = op("start", 2, None, body={"worker": "lost"})
GOOD: Final[dict[str, list[Operation]]] = {
    "one after the other": [*COMPLETED, got(6, 7, mark="x")],
    "the second to answer was first": [created(), granted(2, 9, "L1"), op("start", 3, 4, "already_locked", worker="w")],
    "a claim finds nothing while another has it": [created(), granted(2, 9, "L1"), op("claim", 3, 4, "nothing")],
    "a claim finds nothing before the job is there": [created(0, 9), op("claim", 3, 4, "nothing"), got(5, 6)],
    "a lost completion that happened": [*LOST, got(20, 21, status="completed", mark="x")],
    "a lost completion that did not happen": [*LOST, got(20, 21, status="processing")],
    "a lost completion that was seen late": [
        *LOST,
        got(20, 21, status="processing"),
        got(30, 31, status="completed"),
        held("complete", 40, 41, "L1", "repeated"),
    ],
    "a lost grant holds the job": [created(), LOST_START, op("start", 5, 6, "already_locked")],
    "a lost grant is taken back": [created(), LOST_START, op("claim", 5, 6, "nothing"), granted(7, 8, "L2", 2)],
    "a repeated ending": [
        *BEGUN,
        held("fail", 4, 5, "L1", "done"),
        held("fail", 6, 7, "L1", "repeated", status="queued"),
        held("release", 8, 9, "L1", "repeated"),
        held("fail", 10, 11, "L1", "invalid_transition", by="y"),
    ],
    "an old lock is rejected": [
        *BEGUN,
        op("cancel", 4, 5, "done"),
        held("progress", 6, 7, "L1", "lock_lost", reason="cancelled"),
        op("force-reset", 8, 9, "done", before="cancelled"),
        granted(10, 11, "L2", 2),
        held("progress", 12, 13, "L1", "lock_lost", reason="cancelled", worker="w"),
        held("release", 14, 15, "L2", "done"),
        held("progress", 16, 17, "L1", "lock_lost", reason="not_current"),
    ],
    "deleted and created again": [
        *COMPLETED,
        op("delete", 6, 7, "done"),
        op("get", 8, 9, "job_not_found"),
        created(10, 11),
        granted(12, 13, "L2", 2),
    ],
}
BAD: Final[dict[str, list[Operation]]] = {
    "granted twice": [*BEGUN, granted(4, 5, "L2", 2)],
    "granted before it was created": [granted(0, 1, "L1"), created(2, 3)],
    "the second answer is too early": [created(), op("start", 2, 3, "already_locked"), granted(4, 9, "L1")],
    "an acknowledged completion is lost": [*COMPLETED, got(6, 7, status="processing")],
    "a lost completion comes and goes": [*LOST, got(20, 21, status="completed"), got(30, 31, status="processing")],
    "a result without a call that stored it": [*BEGUN, got(4, 5, status="completed")],
    "an old lock is taken": [*RELEASED, granted(6, 7, "L2", 2), held("complete", 8, 9, "L1", "done")],
    "a token comes again": [
        created(),
        granted(2, 3, "L1", 7),
        held("release", 4, 5, "L1", "done"),
        granted(6, 7, "L2", 7),
    ],
    "ended twice": [*BEGUN, held("complete", 4, 9, "L1", "done"), held("complete", 5, 8, "L1", "done")],
    "a lost grant is completed by a stranger": [created(), LOST_START, held("complete", 5, 6, "L1", "done")],
    "an answer of the wrong order": [created(0, 3), got(1, 2, status="queued"), op("get", 4, 5, "job_not_found")],
    "recovered though its lock is live": [*BEGUN, granted(20, 21, "L2", 2)],
    "a fault inside": [created(), op("start", 2, 3, "internal_error", {"worker": "w"})],
}


@pytest.mark.parametrize("name", GOOD)
def test_a_history_that_some_order_explains_is_accepted(name: str) -> None:
    verdict = judge(GOOD[name], ENDLESS)
    assert verdict.is_explained
    answered = [each for each in GOOD[name] if each.response is not None]
    assert sorted(answered, key=lambda each: each.call_ns) == sorted(
        (each for each in verdict.order if each.response is not None), key=lambda each: each.call_ns
    )


@pytest.mark.parametrize("name", BAD)
def test_a_history_that_no_order_explains_is_rejected(name: str) -> None:
    assert not judge(BAD[name], ENDLESS).is_explained


def test_a_short_lock_ends_by_itself_but_not_before_its_time() -> None:
    before = BEGUN
    assert judge([*before, granted(13, 14, "L2", 2)], SHORT).is_explained
    assert not judge([*before, granted(4, 8, "L2", 2)], SHORT).is_explained
    renewed = [*before, held("progress", 9, 10, "L1", "alive")]
    assert not judge([*renewed, granted(13, 14, "L2", 2)], SHORT).is_explained
    assert judge([*renewed, granted(19, 20, "L2", 2)], SHORT).is_explained
    stalled = [*before, held("fail", 20, 21, "L1", "lock_lost", reason="stalled")]
    assert judge([*stalled, got(22, 23, stalls=1, attempt=0, status="queued")], SHORT).is_explained
    assert not judge([*stalled, got(22, 23, stalls=0)], SHORT).is_explained


def test_an_outage_does_not_age_a_lock() -> None:
    """The lock was live when the daemon died: after the start it has 30 s."""
    away = HistoryConditions(SHORT.terms, (Outage(5 * MS, 50 * MS),))
    before = BEGUN
    assert not judge([*before, granted(60, 61, "L2", 2)], away).is_explained
    after_ms = (50 * MS + GRACE) // MS
    assert judge([*before, granted(60, after_ms, "L2", 2)], away).is_explained
    # It may have ended before the daemon died.
    late = HistoryConditions(SHORT.terms, (Outage(40 * MS, 50 * MS),))
    assert judge([*before, granted(60, 61, "L2", 2)], late).is_explained


def test_a_dead_daemon_has_no_effect() -> None:
    lost = held("complete", 4, None, "L1")
    history = CallHistory({"a": Terms()}, [created(), granted(2, 3, "L1"), lost], [Outage(10 * MS, 12 * MS)])
    history.operations += [got(20, 21, status="processing"), got(30, 31, status="completed")]
    assert not judge(history.of("a"), ENDLESS).is_explained
    history.outages.clear()
    assert judge(history.of("a"), ENDLESS).is_explained


def test_a_stored_response_shows_the_outcome_of_the_first_call() -> None:
    lost = replace(LOST_START, key="k")
    again = replace(granted(5, 6, "L1", worker="lost"), key="k", replayed=True)
    done = held("complete", 7, 8, "L1", "done")
    history = CallHistory({"a": Terms()}, [created(), lost, again, done])
    assert judge(history.of("a"), ENDLESS).is_explained
    # A grant that has ended is not replayed.
    stale = CallHistory(
        {"a": Terms()}, [created(), replace(granted(2, 3, "L1"), key="k"), held("release", 4, 5, "L1", "done")]
    )
    stale.operations.append(replace(granted(6, 7, "L1"), key="k", replayed=True))
    assert not judge(stale.of("a"), ENDLESS).is_explained
    # A stored response that was never sent before, without a lost call that could have caused it.
    invented = CallHistory({"a": Terms()}, [replace(created(), key="k", replayed=True)])
    assert not judge(invented.of("a"), ENDLESS).is_explained
    other = CallHistory(
        {"a": Terms()}, [replace(created(), key="k"), replace(op("create", 2, 3, "job_exists"), key="k")]
    )
    other.operations[1] = replace(other.operations[1], replayed=True)
    assert not judge(other.of("a"), ENDLESS).is_explained


def test_a_call_with_a_used_key_is_not_decided_again() -> None:
    def is_explained(*operations: Operation) -> bool:
        keyed = [replace(each, key="k") if each.verb in ("start", "cancel") else each for each in operations]
        return judge(CallHistory({"a": Terms()}, keyed).of("a"), ENDLESS).is_explained

    own = granted(2, 3, "L1")
    assert not is_explained(created(), own, op("start", 4, 5, "already_locked"))
    assert is_explained(created(), own, held("release", 4, 5, "L1", "done"), granted(6, 7, "L2", 2))
    assert not is_explained(created(), op("cancel", 2, 3, "done"), op("cancel", 4, 5, "invalid_transition"))
    lost, rejected = op("cancel", 2, None), op("cancel", 4, 5, "invalid_transition")
    assert not is_explained(
        created(), lost, rejected
    )  # it had not taken effect by then, or the key would have answered
    assert is_explained(created(0, 9), lost, op("cancel", 4, 5, "job_not_found"), got(20, 21, status="cancelled"))
    assert not is_explained(
        created(), lost, op("cancel", 4, 5, "done"), op("force-reset", 6, 7, "done"), got(8, 9, status="cancelled")
    )


def test_overlapping_operations_are_counted() -> None:
    """The first two overlap, the third does not, and calls on another job do not count."""
    calls = [got(0, 5), got(4, 8), got(9, 10), replace(got(9, 10), job="b"), replace(got(0, 1), job="b")]
    assert overlapping(calls) == 2
    assert overlapping([got(0, 9), got(1, 2), got(3, 4)]) == 3


def test_a_broken_history_is_described() -> None:
    operations = BAD["an old lock is taken"]
    history = "\n".join(describe(operations, ENDLESS, judge(operations, ENDLESS)))
    assert "the longest order that fits has 4 of them" in history
    assert 'c1 complete {"lock_id": "L1"' in history.split("none of these fits after it:")[1]


# -- the search against one without memo or short cuts ----------------------------------------------------------------


def plainly(
    left: frozenset[int], operations: Sequence[Operation], state: ModelState, world: HistoryConditions, drifted: int = 0
) -> bool:
    """Try every order."""
    began = max((each.call_ns for index, each in enumerate(operations) if index not in left), default=0)
    ends = [operations[index].return_ns or NEVER for index in left if operations[index].response]
    if not ends:
        return True
    for index in left:
        may_come = operations[index].call_ns <= min(ends) and (operations[index].latest_ns or NEVER) >= began
        after = step(state, operations[index], world) if may_come else None
        if after is not None and plainly(left - {index}, operations, after, world):
            return True
    return drifted < 2 and any(
        plainly(left, operations, other, world, drifted + 1) for other in drifts(state, min(ends), world)
    )


def drawn(dice: Random) -> tuple[list[Operation], HistoryConditions]:
    """Draw a few concurrent calls with the responses of one order; in every second history two of them are swapped."""
    world = HistoryConditions(Terms(dice.randint(1, 2), dice.choice([0, 8]), dice.choice(["auto", "requeue", "fail"])))
    state, calls, locks = ModelState(), [], 0
    for point in range(dice.randint(4, 8)):
        verb = (
            "create"
            if point == 0
            else dice.choice(
                ["create", "start", "claim", "progress", "complete", "fail", "release", "cancel", "force-reset", "get"]
            )
        )
        body = dict(held(verb, 0, 0, f"L{dice.randint(1, 2)}", by=dice.choice("xy")).body)
        body |= {"worker": f"w{point}", "reason": "r"}
        call_ns = (10 + point * 4 - dice.randint(0, 9)) * MS
        end_ns = (10 + point * 4 + dice.randint(0, 9)) * MS
        operation = Operation(dice.randint(1, 3), verb, "a", body, call_ns, end_ns)
        expected = RULES[verb](state, operation, world)
        seen = dict(expected.seen)
        if expected.code == "granted":
            locks += 1
            seen |= {"lock": f"L{locks}", "token": locks}
        operation = replace(operation, response=SeenResponse(expected.code, seen))
        after = step(state, operation, world)
        assert after is not None
        state = after
        if dice.random() < 0.25:  # its response is lost, with or without the daemon
            latest_ns = dice.choice([None, call_ns + dice.randint(0, 12) * MS])
            operation = replace(operation, response=None, return_ns=None, latest_ns=latest_ns)
        calls.append(operation)
    answered = [index for index, each in enumerate(calls) if each.response]
    if len(answered) > 1 and dice.random() < 0.6:
        first, second = dice.sample(answered, 2)
        calls[first], calls[second] = (
            replace(calls[first], response=calls[second].response),
            replace(calls[second], response=calls[first].response),
        )
    return calls, world


def test_the_search_agrees_with_brute_force() -> None:
    verdicts = {True: 0, False: 0}
    for seed in range(1_500):
        calls, world = drawn(Random(seed))
        verdict = judge(calls, world).is_explained
        assert verdict == plainly(frozenset(range(len(calls))), calls, ModelState(), world), seed
        verdicts[verdict] += 1
    assert min(verdicts.values()) > 75


# -- a real daemon ----------------------------------------------------------------------------------------------------


def test_histories_of_a_real_daemon_are_explained_and_mutants_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    figures = program.run(24, seed=1)
    assert not figures.broken, "\n".join(figures.broken)
    assert figures.shortcomings() == []
    assert set(figures.rejected) == set(KINDS)
    assert {"disconnected", "response not read", "request cut off", "repeated"} <= set(figures.faults)
    assert figures.faults["kill -9 and restart"] + figures.faults["SIGTERM and restart"] == 4
    assert figures.unknown > 50


def test_histories_that_prove_too_little_are_reported() -> None:
    figures = program.CheckResults(histories=20, operations=100, overlapping=20, clients=Counter({3: 20}))
    assert [sentence.split()[0] for sentence in figures.shortcomings()] == ["Only", "A", "No"]


def test_the_program_prints_its_results_and_fails_on_an_unexplained_history(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(["--histories", "2"]) == 0
    assert "mutants rejected: granted_twice" in capsys.readouterr().out
    monkeypatch.setitem(RULES, "cancel", RULES["get"])  # a model without cancel
    assert program.main(["--histories", "20"]) == 1
    assert "No order explains history" in capsys.readouterr().out
