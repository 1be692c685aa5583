"""The demo of a cluster, as `make cluster-demo` runs it."""

from __future__ import annotations

import pytest

from tests.proof import cluster_demo


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_claim_of_the_cluster_demo_is_observed(capfd: pytest.CaptureFixture[str]) -> None:
    code = cluster_demo.main([])
    out = capfd.readouterr().out
    assert code == 0, out
    assert out.count("\nok  ") == 9
    assert "KILL -9: the leader" in out
