"""What a standby of a cluster serves: the routes that need no leadership. Everything else is 503 not_leader."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import cast

from jobd.api.probes import Probe
from jobd.engine.actor import Actor
from jobd.engine.clock import Clock
from jobd.engine.unread_responses import UnreadResponses
from jobd.http.auth import Authenticator
from jobd.http.decoding import Limits
from jobd.http.http_app import BrowserPages, HttpApp
from jobd.http.routing import Route
from jobd.model.errors import ApiError, not_leader_error
from jobd.model.responses import ClusterView
from jobd.monitoring.metrics import standby_text


class StandbyServices:
    """The services of a standby. `view` returns the cluster as this node sees it."""

    def __init__(self, view: Callable[[], ClusterView]) -> None:
        self.cluster_view = view
        self.clock = Clock()

    def is_alive(self) -> bool:
        return True

    def readiness(self) -> Probe:
        return Probe("standby", self.cluster_view().leader)

    async def metrics_text(self) -> bytes:
        return await asyncio.to_thread(standby_text, self.cluster_view())


class NoActor:
    """Rejects commands, such as those for the audit log. The routes of a standby send no others."""

    def __init__(self) -> None:
        self.unread = UnreadResponses()

    async def ask(self, command: object, **options: object) -> ApiError:
        return not_leader_error(None)


def standby_app(
    authenticator: Authenticator,
    routes: Iterable[Route],
    services: StandbyServices,
    limits: Limits,
    *,
    admin: bool,
    pages: BrowserPages | None = None,
) -> HttpApp[object]:
    """Return the app of a listener until this node leads. `HttpApp.serve` then gives it the other routes."""
    return HttpApp(
        authenticator,
        [route for route in routes if route.on_standby],
        cast(Actor, NoActor()),
        services,
        limits=limits,
        admin=admin,
        pages=pages,
        unrouted=lambda: not_leader_error(services.cluster_view().leader),
    )
