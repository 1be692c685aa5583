"""Errors: every code has a status and a description, and the exceptions carry the error."""

from __future__ import annotations

import pytest

from jobd.model import errors


def test_every_code_has_a_status_and_a_description() -> None:
    assert {code: errors.ApiError(code, "").status for code in errors.ERROR_CODES} == errors.ERROR_STATUS
    for code, each in errors.ERROR_CODES.items():
        assert 400 <= each.status < 600, code
        assert each.description[0] in f"`{each.description[0].lower()}", code
        assert not each.description.endswith("."), code


def test_an_exception_carries_its_error() -> None:
    exception = errors.api_error("not_due", "Too early.", run_at=5)
    assert (str(exception), exception.error) == ("not_due", errors.ApiError("not_due", "Too early.", {"run_at": 5}))


def test_checked_returns_a_result_and_raises_an_error() -> None:
    assert errors.checked(5) == 5
    error = errors.ApiError("not_due", "Too early.", {"run_at": 5})
    with pytest.raises(errors.ApiException) as raised:
        errors.checked(error)
    assert raised.value.error is error


def test_an_invalid_request_names_its_field() -> None:
    error = errors.invalid_request_error("$.jobs[2].id", "must not be empty.").error
    assert (error.status, error.message) == (400, "`$.jobs[2].id`: must not be empty.")
    assert error.details == {"field": "$.jobs[2].id"}


def test_too_large_has_its_details() -> None:
    error = errors.too_large_error("Over 5 jobs.", limit=5).error
    assert (error.code, error.status, error.details) == ("too_large", 413, {"limit": 5})


def test_not_leader_names_the_leader_if_there_is_one() -> None:
    known, unknown = errors.not_leader_error("http://a:8771"), errors.not_leader_error(None)
    assert (known.status, known.details) == (503, {"leader": "http://a:8771"})
    assert known.message == "This node does not lead its cluster. The leader is http://a:8771."
    assert (unknown.status, unknown.details) == (503, {"leader": None})
