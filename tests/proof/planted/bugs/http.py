"""Bugs at the HTTP interface."""

from __future__ import annotations

from typing import Any

from jobd.api.command_stream import _StreamSession
from jobd.http.app import App
from jobd.http.parser import RequestParser
from jobd.http.response import HttpResponse
from jobd.model.responses import Response
from tests.proof.planted.registry import bug

HTTP = "tests/unit/http"


@bug(
    "lost-grants-not-reported",
    App[Any]._ok_response,
    breaks="a grant whose response is lost stays until its lock expires",
    found_by=HTTP,
)
def _(ok_response: Any, self: App[Any], response: Response) -> HttpResponse:
    grants, response.grants = response.grants, []
    try:
        made: HttpResponse = ok_response(self, response)
        return made
    finally:
        response.grants = grants


@bug(
    "stream-error-overtakes",
    _StreamSession._reject,
    breaks="an immediate error of a stream takes the place of the response before it",
    found_by="tests/integration/test_command_stream.py",
)
def _(reject: Any, self: _StreamSession, slot: Any, error: Any) -> None:
    reject(self, slot, error)
    self._slots.rotate(1)


@bug(
    "closed-stream-keeps-its-grants",
    _StreamSession._release_unwritten,
    breaks="grants in a stream whose client has left stay until their locks expire",
    found_by="tests/integration/test_command_stream.py",
)
def _(give_up: Any, self: _StreamSession) -> None:
    self._slots.clear()


@bug(
    "upgrade-body-is-run",
    RequestParser._decline_upgrade,
    breaks="the body of a request with an Upgrade is run as a request",
    found_by=HTTP,
)
def _(decline: Any, self: RequestParser, rest: bytes) -> bytes:
    return rest
