"""Tests that go deep, in small: command sequences, the beginning of each small world, a few simulated days.

Run by mutation testing alone; their full selves are test_core_properties.py, small_world.py and simulation/.
"""

from __future__ import annotations

from typing import Any, Final

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests import test_core_properties as properties
from tests.simulation.run import simulate
from tests.small_world import WORLDS, Walk, World

DAYS: Final = 12  # seeds
COMMANDS: Final = 300  # of each
STATES: Final = 700  # of each small world

some = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def inner(test: Any) -> Any:
    """The test of one example."""
    return test.hypothesis.inner_test


@some
@given(properties.hand_made, st.lists(st.tuples(properties.commands, properties.waits), min_size=1, max_size=6))
def test_rules_take_any_row(job: Any, sequence: Any) -> None:
    inner(properties.test_rules_take_any_row_that_hands_may_leave)(job, sequence)


@some
@given(properties.hand_made)
def test_a_pass_mends_all_it_can(job: Any) -> None:
    inner(properties.test_a_pass_leaves_no_row_that_it_could_mend)(job)


@some
@given(properties.sequences)
def test_any_sequence(sequence: Any) -> None:
    inner(properties.test_any_sequence_of_commands)(sequence)


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_the_beginning_of_a_small_world(world: World) -> None:
    Walk(world).run(STATES)


@pytest.mark.parametrize("seed", range(DAYS))
def test_a_simulated_day(seed: int) -> None:
    assert simulate(seed, COMMANDS).broken is None
