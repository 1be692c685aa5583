"""Exit codes of errors."""

from __future__ import annotations

from jobd.cli import exit_codes
from jobd.model.errors import ERROR_STATUS


def test_every_error_code_has_an_exit_code() -> None:
    again = {"overloaded", "shutting_down", "outcome_unknown", "storage_full", "too_many_jobs", "request_timeout"}
    again |= {"not_leader", "storage_unavailable", "too_many_queues"}
    special = {"unauthorized": 5, "forbidden": 5, "internal_error": 1, **dict.fromkeys(again, 75)}
    assert {code: exit_codes.exit_code_of(code) for code in ERROR_STATUS} == {
        code: special.get(code, 4) for code in ERROR_STATUS
    }
    assert exit_codes.exit_code_of("unreachable") == 3
