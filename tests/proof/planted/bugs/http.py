"""Bugs at the HTTP interface."""

from __future__ import annotations

from typing import Any

from jobd.api.command_stream import _StreamSession
from jobd.http.http_app import HttpApp
from jobd.http.parser import RequestParser
from jobd.http.response import HttpResponse
from jobd.model.responses import Response
from tests.proof.planted.registry import bug

HTTP = "tests/unit/http"


@bug(HttpApp[Any]._ok_response, found_by=HTTP)
def lost_grants_not_reported(ok_response: Any, self: HttpApp[Any], response: Response) -> HttpResponse:
    """A grant whose response is lost stays until its lock expires."""
    grants, response.grants = response.grants, []
    try:
        made: HttpResponse = ok_response(self, response)
        return made
    finally:
        response.grants = grants


@bug(_StreamSession._reject, found_by="tests/integration/test_command_stream.py")
def stream_error_overtakes(reject: Any, self: _StreamSession, slot: Any, error: Any) -> None:
    """An immediate error of a stream takes the place of the response before it."""
    reject(self, slot, error)
    self._slots.rotate(1)


@bug(_StreamSession._release_unwritten, found_by="tests/integration/test_command_stream.py")
def closed_stream_keeps_its_grants(give_up: Any, self: _StreamSession) -> None:
    """Grants in a stream whose client has left stay until their locks expire."""
    self._slots.clear()


@bug(RequestParser._decline_upgrade, found_by=HTTP)
def upgrade_body_is_run(decline: Any, self: RequestParser, rest: bytes) -> bytes:
    """The body of a request with an Upgrade is run as a request."""
    return rest
