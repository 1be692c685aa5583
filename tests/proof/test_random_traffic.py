"""Some seeds of the random traffic. All of them: `python -m tests.proof.random_traffic`."""

from __future__ import annotations

import pytest

from tests.proof.random_traffic import opened


@pytest.mark.parametrize("seed", range(1, 5))
def test_traffic_that_needs_no_operator_opens_no_problem(seed: int) -> None:
    assert opened(seed) == []
