"""The calls that a standby serves, and what becomes of its connections when it leads."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from jobd.api import admin_routes, worker_routes
from jobd.api.standby import NoActor, StandbyServices, standby_app
from jobd.http.auth import Authenticator
from jobd.http.decoding import Limits
from jobd.model.errors import ApiError, not_leader_error
from jobd.model.journal import LeadershipLost
from jobd.model.responses import ClusterView
from tests.support.http_harness import TOKEN, HttpHarness

AUTH = {"Authorization": f"Bearer {TOKEN}"}


class Standby(HttpHarness):
    """A listener of a standby whose leader is `leader`."""

    def __init__(self, directory: Path, *, is_admin: bool) -> None:
        authenticator = Authenticator("admin", tokens=[TOKEN]) if is_admin else None
        routes = admin_routes.ROUTES if is_admin else worker_routes.ROUTES
        super().__init__(routes, directory, authenticator=authenticator, admin=is_admin)
        self.leader: str | None = "http://a:8771"
        services = StandbyServices(lambda: ClusterView(role="standby", node="b", leader=self.leader, lag_events=7))
        app = standby_app(self.app.authenticator, routes, services, Limits(), admin=is_admin)
        self.leads, self.listener.app = self.app, app
        self.standby_app = app

    def lead(self) -> None:
        """Serve all routes, as after a takeover."""
        routes = admin_routes.ROUTES if self.leads.admin else worker_routes.ROUTES
        self.standby_app.serve(routes, self.actor, self.services)


@pytest.fixture(params=[False, True], ids=["worker", "admin"])
async def standby(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Standby]:
    harness = Standby(tmp_path, is_admin=request.param)
    async with harness:
        yield harness


async def test_a_standby_is_alive_and_not_ready(standby: Standby) -> None:
    alive, ready = await standby.request("GET", "/healthz"), await standby.request("GET", "/readyz")
    assert (alive.status, alive.data) == (200, {"status": "ok"})
    assert ready.status == 503
    assert ready.json["data"] == {"status": "standby", "leader": "http://a:8771"}
    standby.leader = None
    assert (await standby.request("GET", "/readyz")).json["data"] == {"status": "standby", "leader": None}
    assert (await standby.request("GET", "/openapi.json")).status == 200


async def test_a_standby_shows_the_cluster(standby: Standby) -> None:
    shown = (await standby.request("GET", "/v1/cluster", headers=AUTH)).data
    assert (shown["role"], shown["node"], shown["leader"], shown["lag_events"]) == ("standby", "b", "http://a:8771", 7)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/jobs"),
        ("POST", "/v1/claim"),
        ("POST", "/healthz"),
        ("GET", "/admin/job-management/stats"),
        ("GET", "/x"),
    ],
)
async def test_everything_else_names_the_leader(standby: Standby, method: str, path: str) -> None:
    response = await standby.request(method, path, "{}" if method == "POST" else None, AUTH)
    assert (response.status, response.error) == (503, "not_leader")
    assert response.json["details"] == {"leader": "http://a:8771"}


async def test_a_request_without_a_token_learns_nothing(tmp_path: Path) -> None:
    standby = Standby(tmp_path, is_admin=True)
    async with standby:
        assert (await standby.request("GET", "/v1/cluster")).status == 401
        assert (await standby.request("GET", "/admin/job-management/stats")).status == 401
        body = (await standby.request("GET", "/metrics", headers=AUTH)).body.decode()
    lines = [line for line in body.splitlines() if not line.startswith("#")]
    assert lines[:2] == ["jobd_leader 0.0", "jobd_standby_lag_events 7.0"]
    assert lines[2].startswith("jobd_build_info")


async def test_open_connections_reach_the_new_leader(standby: Standby) -> None:
    client = await standby.connect()
    path = "/admin/job-management/jobs/a" if standby.leads.admin else "/v1/jobs/a"
    assert (await client.request("GET", path, headers=AUTH)).error == "not_leader"
    standby.lead()
    assert (await client.request("GET", path, headers=AUTH)).status == 200
    assert (await client.request("GET", "/readyz")).data == {"status": "ok"}


async def test_a_standby_rejects_commands() -> None:
    error = await NoActor().ask(None)
    assert (error.code, error.details) == ("not_leader", {"leader": None})


async def test_a_read_without_the_actor_waits_for_the_confirmation_of_leadership(standby: Standby) -> None:
    standby.lead()
    confirmed: list[str] = []

    async def confirm() -> None:
        confirmed.append("read")
        raise LeadershipLost("another node leads")

    standby.standby_app.confirm = confirm
    if standby.leads.admin:
        assert (await standby.request("GET", "/admin/job-management/alerts", headers=AUTH)).error == "not_leader"
        assert confirmed == ["read"]
    assert (await standby.request("GET", "/v1/cluster", headers=AUTH)).status == 200


async def test_a_node_that_has_lost_its_leadership_serves_no_read(standby: Standby) -> None:
    """Also not one that needs no command of the actor."""
    is_lost = False
    routes = admin_routes.ROUTES if standby.leads.admin else worker_routes.ROUTES

    def guard() -> ApiError | None:
        return not_leader_error(None) if is_lost else None

    standby.standby_app.serve(routes, standby.actor, standby.services, guard=guard)
    path = "/admin/job-management/alerts" if standby.leads.admin else "/v1/jobs/a"
    assert (await standby.request("GET", path, headers=AUTH)).status == 200
    is_lost = True
    assert (await standby.request("GET", path, headers=AUTH)).error == "not_leader"
    assert (await standby.request("GET", "/v1/cluster", headers=AUTH)).status == 200
    assert (await standby.request("GET", "/v1/unknown", headers=AUTH)).status == 404
