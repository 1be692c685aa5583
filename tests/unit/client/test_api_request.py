"""How responses are read, and how lines are sent."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from jobd.client import ERRORS, BadResponse, InvalidRequest, JobdError, Overloaded, Unreachable
from jobd.client.api_request import ApiRequest, ApiResponse, build, json_lines, read_result, reader_of
from jobd.model.calls import JobRequests
from jobd.model.errors import ERROR_STATUS


def _reply(body: Any, status: int, **headers: str) -> ApiResponse:
    text = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return ApiResponse(status, {name.replace("_", "-"): value for name, value in headers.items()}, text)


READ: ApiRequest[dict[str, int]] = ApiRequest("GET", "/x", reader_of(dict[str, int]))


@pytest.mark.parametrize("code", sorted(ERROR_STATUS))
def test_each_error_code_is_raised_as_its_exception(code: str) -> None:
    reply = _reply({"success": False, "error": code, "message": "No.", "details": {"d": 1}}, ERROR_STATUS[code])
    with pytest.raises(ERRORS[code]) as caught:
        read_result(READ, reply)
    error = caught.value
    assert isinstance(error, JobdError)
    assert (error.code, error.message, error.details, error.status) == (code, "No.", {"d": 1}, ERROR_STATUS[code])


def test_an_unknown_code_is_raised_as_jobd_error() -> None:
    with pytest.raises(JobdError) as caught:
        read_result(READ, _reply({"success": False, "error": "new_code", "message": "?"}, 409))
    assert (type(caught.value), caught.value.code, caught.value.details) == (JobdError, "new_code", {})


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_an_error_of_a_proxy_means_unreachable(status: int) -> None:
    with pytest.raises(Unreachable) as caught:
        read_result(READ, _reply(b"<html>bad gateway", status, retry_after="2"))
    assert caught.value.retry_after_ms == 2000


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"<html>", 200),
        (b"", 200),
        ({"success": True}, 200),
        ({"success": True, "data": {"n": "text"}}, 200),
        (b"\xff", 200),
        (b"not json", 404),
        ({"error": 5}, 400),
        ({"success": False}, 400),
        (b'{"success":true,"data":' + b"[" * 3000 + b"]" * 3000 + b"}", 200),
    ],
)
def test_a_response_of_another_program_is_a_bad_response(body: Any, status: int) -> None:
    with pytest.raises(BadResponse):
        read_result(READ, _reply(body, status))


def test_a_success_with_status_503_is_a_result() -> None:
    assert read_result(READ, _reply({"success": True, "data": {"n": 1}}, 503)) == {"n": 1}


@pytest.mark.parametrize(
    ("headers", "details", "wait_ms"),
    [
        ({"retry_after": "2"}, {}, 2000),
        ({}, {"retry_after_ms": 150}, 150),
        ({"retry_after": "2"}, {"retry_after_ms": 150}, 150),
        ({"retry_after": "Wed, 21 Oct 2015 07:28:00 GMT"}, {}, None),
        ({"retry_after": "-1"}, {"retry_after_ms": -5}, None),
        ({}, {}, None),
    ],
)
def test_retry_after_comes_from_details_or_header(
    headers: dict[str, str], details: dict[str, Any], wait_ms: int | None
) -> None:
    body = {"success": False, "error": "overloaded", "message": "Full.", "details": details}
    with pytest.raises(Overloaded) as caught:
        read_result(READ, _reply(body, 503, **headers))
    assert caught.value.retry_after_ms == wait_ms


def test_lines_are_sent_in_chunks_of_bounded_size() -> None:
    pieces = list(json_lines(iter([b"x" * 30_000] * 10)))
    assert b"".join(pieces) == (b"x" * 30_000 + b"\n") * 10
    assert all(len(piece) < 64 * 1024 + 30_001 for piece in pieces)
    assert len(pieces) > 3


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"payload": ["/srv/\udcff"]}, "payload"), ({"queue": "q", "kind": "\ud800"}, "kind"), ({"\udcff": 1}, "body")],
)
def test_text_that_is_not_unicode_is_an_invalid_request(fields: dict[str, Any], name: str) -> None:
    for made in (lambda: build(JobRequests.create, fields), lambda: list(json_lines(iter([fields])))):
        with pytest.raises(
            InvalidRequest, match=rf"^{name}.* has the lone surrogate '\\ud.* Escape it: text\.encode\("
        ):
            made()
    assert list(json_lines(iter(["\udcff"]))) == [b"\xed\xb3\xbf\n"]
