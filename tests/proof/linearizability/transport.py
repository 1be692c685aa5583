"""A client's connections to the daemon. Each call has its times, and is answered or lost in one of several ways.

Responses are reduced to what the model compares.
"""

from __future__ import annotations

import http.client
import json
import select
import time
from collections.abc import Callable
from typing import Any, Final, Literal

from msgspec import Struct

from tests.proof.linearizability.history import SeenResponse
from tests.proof.linearizability.model import STALLED
from tests.support.daemon_process import TOKEN, DaemonResponse, UnixConnection

Fate = Literal["answered", "hung up", "unread", "cut"]
NOTHING_DONE: Final = frozenset({"shutting_down", "overloaded"})


def boot_ns() -> int:
    """Return the time since boot, by which the daemon's locks run."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Unavailable(Exception):
    """The daemon is not reachable, or its error says that nothing was done."""


class Request(Struct, frozen=True):
    method: str
    path: str
    body: dict[str, Any] | None
    admin: bool = False
    key: str | None = None


class Exchange(Struct, frozen=True):
    """The outcome of one request: `reply` is None if its response was lost."""

    call_ns: int
    return_ns: int
    reply: DaemonResponse | None


class Connections:
    """A connection to each listener, opened when needed. `socket_path` returns the path of the worker or admin one."""

    def __init__(self, socket_path: Callable[[bool], str]) -> None:
        self._socket_path = socket_path
        self._open: dict[bool, UnixConnection] = {}

    def close(self) -> None:
        for connection in self._open.values():
            connection.close()
        self._open.clear()

    def ask(self, request: Request, fate: Fate) -> Exchange:
        """Send a request. Raise Unavailable if it certainly had no effect."""
        connection = self._connected(request.admin)
        call_ns = boot_ns()
        try:
            reply = self._exchange(connection, request, fate)
        except (OSError, http.client.HTTPException):
            reply = None
        if reply is None:
            self.close()
        if fate == "cut" or (reply is not None and reply.body.get("error") in NOTHING_DONE):
            raise Unavailable
        return Exchange(call_ns, boot_ns(), reply)

    def _connected(self, admin: bool) -> UnixConnection:
        connection = self._open.get(admin)
        if connection is None:
            connection = UnixConnection(self._socket_path(admin))
            try:
                connection.connect()
            except OSError as error:
                connection.close()
                raise Unavailable from error
            self._open[admin] = connection
        return connection

    def _exchange(self, connection: UnixConnection, request: Request, fate: Fate) -> DaemonResponse | None:
        headers = {"Authorization": f"Bearer {TOKEN}"} if request.admin else {}
        if request.key is not None:
            headers["Idempotency-Key"] = request.key
        body = None if request.body is None else json.dumps(request.body).encode()
        if body is not None:
            headers["Content-Type"] = "application/json"
        if fate == "cut":
            # The daemon never sees the end of this request, so it must have no effect.
            headers["Content-Length"] = str(len(body or b"") + 1)
        connection.request(request.method, request.path, body, headers)
        if fate == "unread":
            select.select([connection.sock], [], [], 30)
        return DaemonResponse(connection.getresponse()) if fate == "answered" else None


# -- responses as the model has them ----------------------------------------------------------------------------------

_CODES: Final = {"get": "done", "progress": "alive", "extend": "alive", "start": "granted"}


def reduced_response(verb: str, reply: DaemonResponse) -> SeenResponse:
    """Return the response to a call on one job (for claims see `claimed`)."""
    if not reply.body["success"]:
        return _error(reply)
    data = reply.data
    if verb == "create":
        return SeenResponse("created" if reply.status == 201 else "existing", shown(data))
    if verb == "start":
        return granted(data)
    if "previousStatus" in data:
        return SeenResponse("done", {"before": data["previousStatus"], "status": data["status"]})
    code = "repeated" if data.get("repeated") else _CODES.get(verb, "done")
    return SeenResponse(code, shown(data) if "status" in data else {})


def granted(grant: dict[str, Any]) -> SeenResponse:
    return SeenResponse("granted", {**shown(grant["job"]), "lock": grant["lock_id"], "token": grant["fencing_token"]})


def claimed(job: str, reply: DaemonResponse) -> SeenResponse:
    """Return the part of a response to a claim that concerns `job`."""
    if not reply.body["success"]:
        return _error(reply)
    mine = [grant for grant in reply.data["grants"] if grant["job"]["id"] == job]
    return granted(mine[0]) if mine else SeenResponse("nothing")


def shown(view: dict[str, Any]) -> dict[str, Any]:
    """Return what a job view shows."""
    lock = view["lock"] or {}
    return {
        "status": view["status"],
        "attempt": view["attempt"],
        "progress": view["progress"],
        "stalls": view["stalls"],
        "error": STALLED if view["error_code"] == "stalled" else view["error_message"],
        "mark": (view["metadata"] or {}).get("by"),
        "worker": lock.get("worker"),
        "token": lock.get("fencing_token"),
    }


def _error(reply: DaemonResponse) -> SeenResponse:
    """Return an error with what its details show of the job."""
    details = reply.body["details"]
    seen = {name: details[name] for name in ("status", "reason") if name in details}
    if "locked_by" in details:
        seen["worker"] = details["locked_by"]
    return SeenResponse(reply.error, seen)
