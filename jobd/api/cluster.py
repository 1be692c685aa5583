"""Make the leader of a cluster step down."""

from __future__ import annotations

from jobd.api.auditing import audit_action
from jobd.api.services import Services
from jobd.http.app import App
from jobd.model.commands import Operator
from jobd.model.errors import ApiError
from jobd.model.responses import ClusterView


async def step_down(app: App[Services], operator: Operator | None, reason: str | None) -> ClusterView | ApiError:
    """End the lead of this node, and record that. Return the cluster as it was before."""
    services = app.services
    if services.step_down is None:
        return ApiError("not_found", "This daemon has a journal of its own, so there is no cluster. See `[journal]`.")
    await audit_action(app, operator, "step-down", reason=reason)
    view = services.cluster_view()
    services.step_down()
    return view
