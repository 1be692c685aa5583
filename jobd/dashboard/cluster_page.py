"""Show the cluster on the leader and on standbys, and confirm that the leader steps down."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from jobd.dashboard.context import ReasonForm, Viewer, is_live_update
from jobd.dashboard.pages import PageData, base_url
from jobd.dashboard.urls import no_link_reason
from jobd.http.auth import host_name
from jobd.model.commands import Command
from jobd.model.errors import api_error
from jobd.model.responses import ClusterView


class ClusterPageQuery(Command, frozen=True, kw_only=True):
    """`role` is that of the node when the page was loaded. If it has changed, an update loads the whole page."""

    role: Literal["", "leader", "standby", "single"] = ""


class StepDownForm(ReasonForm, frozen=True, kw_only=True):
    """`force`: step down even if no standby is ready, as the page says."""

    force: Literal["", "1"] = ""


async def cluster_page(viewer: Viewer, request: ClusterPageQuery) -> PageData:
    view = viewer.app.services.cluster_view()
    return {
        "cluster": view,
        "leader_url": leader_url(viewer, view),
        "page_url": f"/cluster?role={view.role}",
        "reload": is_live_update(viewer.context) and request.role not in ("", view.role),
    }


async def confirm_step_down(viewer: Viewer, _: Command) -> PageData:
    """Name the standbys before the leader steps down."""
    view = viewer.app.services.cluster_view()
    if view.role != "leader":
        raise api_error("not_found", "This daemon leads no cluster. See /cluster for its state.")
    standbys = [node for node in view.nodes if node.is_ready]
    return {"cluster": view, "standbys": standbys}


def leader_url(viewer: Viewer, view: ClusterView) -> str | None:
    """Return the URL of the cluster page of the leader, which should have the same port as this page.

    Return None if that may not be a link, as if both are on one host.
    """
    leader = urlsplit(view.leader or "")
    if view.role != "standby" or leader.hostname is None:
        return None
    page = urlsplit(base_url(viewer))
    host = f"[{leader.hostname}]" if ":" in leader.hostname else leader.hostname
    port = page.netloc.rpartition("]")[2].partition(":")[2]
    url = f"{page.scheme}://{host}{f':{port}' if port else ''}/cluster"
    own = host_name(viewer.context.header("host"))
    return url if no_link_reason(url, {own} - {""}) is None else None
