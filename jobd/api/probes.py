"""The calls that every node serves on every listener: the probes, which need no token, and the state of the cluster."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Protocol

from msgspec import UNSET, Struct, UnsetType

from jobd.http.http_app import HttpApp
from jobd.http.request import RequestContext
from jobd.http.routing import Route, RouteHandler
from jobd.model.fields import doc
from jobd.model.requests import NoFields
from jobd.model.responses import ClusterView, Response


class Probe(Struct, frozen=True):
    """The result of a probe. A standby also names the leader."""

    status: Annotated[Literal["ok", "unavailable", "standby"], doc("Whether the probe succeeded.")]
    leader: Annotated[
        str | None | UnsetType, doc("URL of the leader, if the node is a standby; null if it knows of none.")
    ] = UNSET


class NodeServices(Protocol):
    """What these calls need."""

    def is_alive(self) -> bool: ...
    def readiness(self) -> Probe: ...
    def cluster_view(self) -> ClusterView: ...


def _probed(probe: Probe) -> Response:
    return Response(probe, status=200 if probe.status == "ok" else 503)


async def _alive(app: HttpApp[NodeServices], ctx: RequestContext, command: NoFields) -> Response:
    return _probed(Probe("ok" if app.services.is_alive() else "unavailable"))


async def _ready(app: HttpApp[NodeServices], ctx: RequestContext, command: NoFields) -> Response:
    return _probed(app.services.readiness())


async def send_cluster(app: HttpApp[NodeServices], ctx: RequestContext, command: NoFields) -> Response:
    return Response(app.services.cluster_view())


def _route(path: str, response: type, handler: RouteHandler, summary: str, unavailable: str) -> Route:
    """Return the route of a probe. `unavailable` is the meaning of a 503 with the same body."""
    return Route(
        method="GET", path=path, request=NoFields, response=response, auth="anyone", on_standby=True, tag="The daemon",
        handler=handler, summary=summary, other_statuses={503: unavailable},
    )  # fmt: skip


PROBES: Final = (
    _route("/healthz", Probe, _alive, "Return whether the daemon is alive.", "The daemon is not alive."),
    _route(
        "/readyz",
        Probe,
        _ready,
        "Return whether the daemon accepts requests. It does even if a full disk makes it reject new jobs.",
        "The daemon does not accept requests yet, is stopping, or is a standby of a cluster.",
    ),
)
