"""Errors: every code has a status and a description, and the exceptions carry the error."""

from __future__ import annotations

import pytest

from jobd.model.errors import (
    ERROR_CODES,
    ERROR_STATUS,
    ApiError,
    ApiException,
    api_error,
    checked,
    invalid_request_error,
    not_leader_error,
    too_large_error,
)


def test_every_code_has_a_status_and_a_description() -> None:
    assert {code: ApiError(code, "").status for code in ERROR_CODES} == ERROR_STATUS
    for code, each in ERROR_CODES.items():
        assert 400 <= each.status < 600, code
        assert each.description[0] in f"`{each.description[0].lower()}", code
        assert not each.description.endswith("."), code


def test_an_exception_carries_its_error() -> None:
    exception = api_error("not_due", "Too early.", run_at=5)
    assert (str(exception), exception.error) == ("not_due", ApiError("not_due", "Too early.", {"run_at": 5}))


def test_checked_returns_a_result_and_raises_an_error() -> None:
    assert checked(5) == 5
    error = ApiError("not_due", "Too early.", {"run_at": 5})
    with pytest.raises(ApiException) as raised:
        checked(error)
    assert raised.value.error is error


def test_an_invalid_request_names_its_field() -> None:
    error = invalid_request_error("$.jobs[2].id", "must not be empty.").error
    assert (error.status, error.message) == (400, "`$.jobs[2].id`: must not be empty.")
    assert error.details == {"field": "$.jobs[2].id"}


def test_too_large_has_its_details() -> None:
    error = too_large_error("Over 5 jobs.", limit=5).error
    assert (error.code, error.status, error.details) == ("too_large", 413, {"limit": 5})


def test_not_leader_names_the_leader_if_there_is_one() -> None:
    known, unknown = not_leader_error("http://a:8771"), not_leader_error(None)
    assert (known.status, known.details) == (503, {"leader": "http://a:8771"})
    assert known.message == "This node does not lead its cluster. The leader is http://a:8771."
    assert (unknown.status, unknown.details) == (503, {"leader": None})
