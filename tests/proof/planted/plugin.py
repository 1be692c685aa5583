"""A pytest plugin that plants one bug in the test process: `pytest -p tests.proof.planted.plugin --bug NAME`."""

from __future__ import annotations

import pytest
from hypothesis import Phase, settings

from tests.proof.planted.bugs import BUGS
from tests.proof.planted.registry import plant


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bug", choices=list(BUGS), required=True, help="the bug to plant")


def pytest_configure(config: pytest.Config) -> None:
    # Without shrinking, which can take longer than the time limit of a test.
    settings.register_profile("planted", settings.default, phases=[Phase.explicit, Phase.generate])
    settings.load_profile("planted")
    patch = pytest.MonkeyPatch()
    plant(BUGS[config.getoption("--bug")], patch)
    config.add_cleanup(patch.undo)
