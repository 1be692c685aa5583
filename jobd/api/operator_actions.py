"""Actions of operators that are not job commands, with their audit entries, for the admin API and the dashboard.

They raise ApiException if they are rejected.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from jobd.api.auditing import audit_action
from jobd.api.services import Services, log, unknown_webhook
from jobd.http.http_app import HttpApp
from jobd.model.commands import Operator
from jobd.model.errors import ApiException, api_error, checked
from jobd.model.responses import CleanupReport, ClockView, ClusterView, DeliveryView, Resent
from jobd.model.storage import CannotWrite, FormatNotRead

T = TypeVar("T")


async def run_cleanup(app: HttpApp[Services], operator: Operator | None, reason: str | None) -> CleanupReport:
    await audit_action(app, operator, "cleanup", reason=reason)
    return await app.services.maintainer.run_cleanup(forced=True)


async def accept_clock(app: HttpApp[Services], operator: Operator | None, reason: str | None) -> ClockView:
    view = checked(await app.services.accept_clock())
    await audit_action(app, operator, "accept-clock", reason=reason)
    return view


async def step_down(
    app: HttpApp[Services], operator: Operator | None, reason: str | None, *, force: bool
) -> ClusterView:
    """Make this node step down, with an entry in the audit log. Return the state of the cluster before that.

    Rejected without `force` if no standby is ready.
    """
    services = app.services
    if services.step_down is None:
        raise api_error("not_found", "This daemon has a journal of its own, so there is no cluster. See `[journal]`.")
    if not force and services.refresh_nodes is not None:
        await services.refresh_nodes()  # a standby may have started since the last time
    view = services.cluster_view()
    if not force and not any(node.is_ready for node in view.nodes):
        raise api_error(
            "no_standby",
            "No standby is ready to take over, so no node would lead. Start jobd on another node, wait until "
            "`jobctl cluster` shows it without a problem, and try again; or send `force`.",
        )
    await audit_action(app, operator, "step-down", reason=reason)
    services.step_down()
    return view


async def resend_delivery(
    app: HttpApp[Services], operator: Operator | None, webhook: str, delivery: int, reason: str | None
) -> DeliveryView:
    """Send a delivery again now, in any state."""
    webhooks = app.services.webhooks
    sent = await _change_outbox(app, webhook, lambda: webhooks.redeliver(webhook, delivery))
    if sent is None:
        raise api_error("not_found", f"Webhook {webhook} has no delivery {delivery}. It may have been deleted.")
    log.info("webhook_sent_again", webhook=webhook, delivery=delivery)
    await audit_action(app, operator, "resend-delivery", {"webhook": webhook, "delivery": delivery}, reason)
    return sent


async def resend_dead_lettered(
    app: HttpApp[Services], operator: Operator | None, webhook: str, upto: int | None, reason: str | None
) -> Resent:
    """Send all dead-lettered deliveries again, or those up to the delivery `upto`."""
    webhooks = app.services.webhooks
    count = await _change_outbox(app, webhook, lambda: webhooks.redeliver_all(webhook, upto))
    log.info("webhook_all_sent_again", webhook=webhook, count=count)
    await audit_action(app, operator, "resend-dead-lettered", {"webhook": webhook, "resent": count}, reason)
    return Resent(count)


async def test_webhook(
    app: HttpApp[Services], operator: Operator | None, webhook: str, reason: str | None
) -> DeliveryView:
    sent = await _change_outbox(app, webhook, lambda: app.services.webhooks.test(webhook))
    log.info("webhook_tested", webhook=webhook)
    await audit_action(app, operator, "test-webhook", {"webhook": webhook}, reason)
    return sent


async def _change_outbox(app: HttpApp[Services], webhook: str, change: Callable[[], Awaitable[T]]) -> T:
    services = app.services
    if not services.webhooks.has(webhook):
        raise ApiException(unknown_webhook(webhook))
    try:
        return await change()
    except FormatNotRead as error:
        raise api_error("overloaded", f"The outbox of the webhook cannot be written: {error}.") from None
    except CannotWrite:
        await services.health.space()
        message = "the outbox of the webhook cannot be written. Free some space; jobd tries again every second."
        raise ApiException(services.actor.full_disk.rejection(message)) from None
