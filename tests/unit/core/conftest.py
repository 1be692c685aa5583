"""Fixtures of the tests of the rules."""

from __future__ import annotations

import pytest

from tests.support.rule_harness import RuleHarness


@pytest.fixture
def rules() -> RuleHarness:
    return RuleHarness()
