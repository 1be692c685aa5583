"""Make the leader of a cluster step down."""

from __future__ import annotations

from jobd.api.auditing import audit_action
from jobd.api.services import Services
from jobd.http.app import App
from jobd.model.commands import Operator
from jobd.model.errors import ApiError
from jobd.model.responses import ClusterView


async def step_down(
    app: App[Services], operator: Operator | None, reason: str | None, *, force: bool
) -> ClusterView | ApiError:
    """Make this node step down, and record that. Return the cluster as it was before.

    Without a standby that is ready, this needs `force`.
    """
    services = app.services
    if services.step_down is None:
        return ApiError("not_found", "This daemon has a journal of its own, so there is no cluster. See `[journal]`.")
    if not force and services.refresh_nodes is not None:
        await services.refresh_nodes()  # a standby may have started since the last time
    view = services.cluster_view()
    if not force and not any(node.is_ready for node in view.nodes):
        return ApiError(
            "no_standby",
            "No standby is ready to take over, so no node would lead. Start jobd on another node, wait until "
            "`jobctl cluster` shows it without a problem, and try again; or send `force`.",
        )
    await audit_action(app, operator, "step-down", reason=reason)
    services.step_down()
    return view
