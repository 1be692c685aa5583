"""The worker listener does the same however the bytes of its requests arrive."""

from __future__ import annotations

from typing import Any

from tests.proof.http_differential import WAYS, run


def kinds(responses: list[Any]) -> list[str]:
    """Return 2xx or 4xx of each response. A head that has arrived gets its error before the rest is malformed."""
    return [each[0][:10] if isinstance(each, list) else each for each in responses]


def test_responses_do_not_depend_on_how_the_bytes_arrive() -> None:
    results: dict[int, dict[str, Any]] = {}
    for number, way, responses, executed in run(0, 60):
        results.setdefault(number, {})[way] = (kinds(responses), executed)
    assert all(len(ways) == len(WAYS) for ways in results.values())
    assert {
        number: ways for number, ways in results.items() if any(each != ways["whole"] for each in ways.values())
    } == {}
    assert sum(ways["whole"][1] for ways in results.values()) > 60
