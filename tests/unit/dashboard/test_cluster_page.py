"""The page of the cluster: on the leader, on a standby, and on a daemon without a cluster."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from jobd.api import admin_routes
from jobd.api.standby import StandbyServices, standby_app
from jobd.dashboard.routes import Dashboard
from jobd.http.auth import Authenticator, accepted_hosts
from jobd.http.decoding import Limits
from jobd.model.responses import ClusterView, NodeView
from tests.support.dashboard_harness import READ_ONLY_TOKEN, Browser, DashboardHarness, audit_entries, text
from tests.support.http_harness import TOKEN, HttpHarness

HTML = {"Accept": "text/html,*/*;q=0.8"}
NODES = [
    NodeView("a", "http://a.example:8771", "leader", 300, 1_000, 0, 1, False),
    NodeView("b", "http://b.example:8771", "standby", 900, 990, 10, 2, False, schema_version=12),
    NodeView("c", "", "standby", 3_600_000, 2, 998, 1, True, clock_ahead_ms=-7_200_000),
]
LEADER = ClusterView(
    role="leader",
    node="a",
    journal="main",
    leader="http://a.example:8771",
    epoch=7,
    record=1_000,
    lease_ms=3_000,
    synchronous=True,
    nodes=NODES,
)
STANDBY = replace(LEADER, role="standby", node="b", lag_events=12)


class StandbyDashboard(HttpHarness):
    """The admin listener of a standby that sees `view`."""

    def __init__(self, directory: Path, dashboard: Dashboard, authenticator: Authenticator) -> None:
        routes = (*admin_routes.ROUTES, *dashboard.routes())
        super().__init__(routes, directory, authenticator=authenticator, admin=True, pages=dashboard)
        self.view = STANDBY
        services = StandbyServices(lambda: self.view)
        self.listener.app = standby_app(authenticator, routes, services, Limits(), admin=True, pages=dashboard)


@pytest.fixture
async def standby(tmp_path: Path) -> AsyncIterator[StandbyDashboard]:
    hosts = accepted_hosts("127.0.0.1", ["b.example", "a.example"])
    authenticator = Authenticator("admin", tokens=[TOKEN], read_only_tokens=[READ_ONLY_TOKEN], hosts=hosts)
    made: list[StandbyDashboard] = []
    dashboard = await asyncio.to_thread(
        Dashboard, authenticator, cluster_view=lambda: made[0].view if made else STANDBY
    )
    made.append(StandbyDashboard(tmp_path, dashboard, authenticator))
    async with made[0]:
        yield made[0]


def lead(harness: DashboardHarness, view: ClusterView) -> list[str]:
    """Make the daemon a leader. Return the list of its step-downs."""
    steps: list[str] = []
    harness.admin.services.cluster_view = harness.dashboard._cluster_view = lambda: view
    harness.admin.services.step_down = lambda: steps.append("down")
    return steps


async def test_without_a_cluster_the_navigation_has_no_such_page(harness: DashboardHarness) -> None:
    browser = await harness.browser()
    assert 'href="/cluster"' not in text(await browser.get("/"))
    page = text(await browser.get("/cluster"))
    assert "not part of a cluster" in page
    assert "Step down" not in page
    assert "leads no cluster" in (await browser.get("/cluster/step-down")).page(404)
    assert "there is no cluster" in (await browser.post("/cluster/step-down", csrf=await browser.csrf())).page(404)


async def test_the_leader_shows_its_nodes(harness: DashboardHarness) -> None:
    lead(harness, replace(LEADER, warnings=["A <write> waits."], synchronous=False))
    browser = await harness.browser()
    assert 'href="/cluster"' in text(await browser.get("/"))
    page = text(await browser.get("/cluster"))
    for shown in (
        '<a href="/cluster" aria-current="page">Cluster</a>',
        "A &lt;write&gt; waits.",
        "a change is on one server",
        "900 ms ago",
        ">not seen for 1 h<",
        '<strong class="badge bad">differs</strong>',
        '<span class="badge bad">2 h behind</span>',
        '<td data-label="Reads format" class="figure">2</td>',
        '<td data-label="Schema" class="figure">12</td>',
        '<span class="dim">this node</span>',
        'href="/cluster/step-down"',
        'data-events-url=""',
    ):
        assert shown in page, shown
    assert "standby.</strong>" not in page
    assert "step-down" not in text(await (await harness.browser(READ_ONLY_TOKEN)).get("/cluster"))
    lead(harness, replace(LEADER, synchronous=None, leader=None, epoch=None, record=None, lease_ms=None, nodes=[]))
    page = text(await browser.get("/cluster"))
    assert "PostgreSQL does not respond" in page
    assert "No nodes are known." in page


async def test_an_operator_confirms_that_the_leader_steps_down(harness: DashboardHarness) -> None:
    steps = lead(harness, LEADER)
    browser = await harness.browser()
    page = text(await browser.get("/cluster/step-down"))
    assert "<strong>b</strong>" in page
    assert "<strong>c</strong>" not in page, "it is not seen"
    assert (await browser.post("/cluster/step-down")).status == 403, "a form of another site"
    reader = await harness.browser(READ_ONLY_TOKEN)
    assert (await reader.get("/cluster/step-down")).status == 403
    assert (await reader.post("/cluster/step-down", csrf=await reader.csrf())).status == 403
    assert steps == []
    response = await browser.post("/cluster/step-down", csrf=await browser.csrf(), reason=" new kernel ")
    assert (response.status, steps) == (200, ["down"])
    assert "steps down" in text(response)
    assert ("admin", "step-down", "done") in [entry[:3] for entry in await audit_entries(harness)]


async def test_a_step_down_without_a_ready_standby_is_forced_by_its_page(harness: DashboardHarness) -> None:
    steps = lead(harness, replace(LEADER, nodes=[NODES[0], NODES[2]]))
    browser = await harness.browser()
    page = text(await browser.get("/cluster/step-down"))
    assert "No standby is ready to take over." in page
    assert '<input type="hidden" name="force" value="1">' in page
    response = await browser.post("/cluster/step-down", csrf=await browser.csrf())
    assert (response.status, "No standby is ready" in text(response), steps) == (409, True, [])
    response = await browser.post("/cluster/step-down", csrf=await browser.csrf(), force="1")
    assert (response.status, steps) == (200, ["down"])


async def test_a_standby_serves_the_page_of_the_cluster_only(standby: StandbyDashboard) -> None:
    browser = await Browser(standby).sign_in()
    for path in ("/", "/cluster"):
        response = await browser.get(path, **HTML)
        assert (response.status, response.headers.get("location")) in [(303, "/cluster"), (200, None)]
    page = text(await browser.get("/cluster"))
    assert "<strong>This node is a standby.</strong>" in page
    assert "12 events behind" in page
    assert 'href="/jobs"' not in page
    assert "Step down" not in page
    response = await browser.get("/jobs", **HTML)
    assert response.status == 503
    for shown in ("The leader is http://a.example:8771", 'href="/cluster">Cluster<'):
        assert shown in text(response)
    assert (await browser.get("/jobs")).error == "not_leader", "programs get JSON"
    assert (await browser.post("/cluster/step-down")).error == "not_leader"
    assert (await browser.get(re.findall(r'href="(/static/pages\.css\?v=[^"]+)"', page)[0])).status == 200
    update = await browser.get("/cluster?role=standby", hx_request="true")
    assert (update.status, "hx-refresh" in update.headers) == (200, False)
    assert "This node is a standby" in text(update)
    update = await browser.get("/cluster?role=leader", hx_request="true")
    assert (update.headers["hx-refresh"], update.body) == ("true", b""), "the other pages are in the navigation now"
    standby.view = replace(STANDBY, leader=None)
    assert "No leader is known at the moment." in text(await browser.get("/cluster"))
    csrf = text(await browser.get("/cluster")).partition('name="csrf" value="')[2].partition('"')[0]
    assert (await browser.post("/sign-out", csrf=csrf)).headers["location"] == "/sign-in"
    assert (await browser.get("/cluster")).headers["location"].startswith("/sign-in")
    assert (await browser.post("/sign-in", token="wrong")).status == 401


@pytest.mark.parametrize(
    ("leader", "host", "expected"),
    [
        ("http://a.example:8771", "b.example:8770", "http://a.example:8770/cluster"),
        ("https://a.example:8771", "b.example", "http://a.example/cluster"),
        ("http://[fd00::1]:8771", "b.example:8770", "http://[fd00::1]:8770/cluster"),
        ("http://b.example:9771", "b.example:8770", None),
        ("http://127.0.0.1:8771", "b.example:8770", None),
        ("unix:/run/jobd.sock", "b.example:8770", None),
    ],
)
async def test_the_page_links_to_the_leader(
    standby: StandbyDashboard, leader: str, host: str, expected: str | None
) -> None:
    standby.view = replace(STANDBY, leader=leader)
    page = text(await (await Browser(standby).sign_in()).get("/cluster", Host=host))
    if expected is None:
        assert "Dashboard of the leader" not in page
        assert "at its own admin address" in page
    else:
        assert f'href="{expected}" rel="noreferrer noopener">Dashboard of the leader</a>' in page
