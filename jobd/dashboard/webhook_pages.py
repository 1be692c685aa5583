"""Show webhooks and their deliveries, send tests, and resend messages."""

from __future__ import annotations

from typing import Annotated, Final, Literal, get_args
from urllib.parse import quote, urlencode

from msgspec import Meta

from jobd.api import operator_actions
from jobd.dashboard.context import ReasonForm, Viewer, redirect_with_flash
from jobd.dashboard.pages import PER_PAGE, PageData
from jobd.model.commands import Command
from jobd.model.errors import api_error, checked
from jobd.model.responses import DeliveryState, Response, WebhookView
from jobd.model.webhooks import MAX_BACKLOG, WebhookName

STATES: Final[tuple[DeliveryState, ...]] = get_args(DeliveryState)
StateFilter = Literal["", "waiting", "delivered", "dead-lettered"]  # "" selects all states
Number = Annotated[int, Meta(ge=1, le=10**18)]


class WebhookPageQuery(Command, frozen=True, kw_only=True):
    """`state` filters the deliveries, `cursor` is where the page begins."""

    name: WebhookName
    state: StateFilter = ""
    cursor: Number | None = None


class TestWebhookForm(ReasonForm, frozen=True, kw_only=True):
    """`state` is the filter of the page with the form."""

    name: WebhookName
    state: StateFilter = ""


class ResendDeadLetteredQuery(Command, frozen=True, kw_only=True):
    name: WebhookName


class ResendDeadLetteredForm(ReasonForm, frozen=True, kw_only=True):
    """`upto` is the newest of the counted deliveries; later failures are left out."""

    name: WebhookName
    upto: Number


class ResendForm(TestWebhookForm, frozen=True, kw_only=True):
    """`id` is that of the delivery."""

    id: Number


async def webhook_list(viewer: Viewer, _: Command) -> PageData:
    return {"webhooks": viewer.app.services.webhooks.views()}


async def webhook_detail(viewer: Viewer, selection: WebhookPageQuery) -> PageData:
    """Show one webhook and a page of its deliveries, newest first."""
    webhook = _find(viewer, selection.name)
    state = selection.state or None
    page = checked(await viewer.app.services.deliveries(selection.name, state, selection.cursor, PER_PAGE))
    data: PageData = {
        "webhook": webhook,
        "states": STATES,
        "state": selection.state,
        "deliveries": page.deliveries,
        "next": _page_url(selection, page.next_cursor) if page.next_cursor else "",
        "first": _page_url(selection) if selection.cursor else "",
    }
    if selection.cursor:  # older pages do not change
        data["interval_s"] = 0
    return data


async def send_test(viewer: Viewer, form: TestWebhookForm) -> Response:
    operator = viewer.context.operator
    sent = await operator_actions.test_webhook(viewer.app, operator, form.name, form.reason_or_none)
    url = _page_url(WebhookPageQuery(name=form.name, state=form.state))
    return redirect_with_flash(viewer, url, f"Sending test message {sent.id}.")


async def resend(viewer: Viewer, form: ResendForm) -> Response:
    """Send a message again, or now if it is waiting for its retry."""
    operator = viewer.context.operator
    sent = await operator_actions.resend_delivery(viewer.app, operator, form.name, form.id, form.reason_or_none)
    url = _page_url(WebhookPageQuery(name=form.name, state=form.state))
    return redirect_with_flash(viewer, url, f"Sending message {sent.id}.")


async def confirm_resend(viewer: Viewer, confirmation: ResendDeadLetteredQuery) -> PageData:
    """Count the dead-lettered deliveries before they are sent again."""
    webhook = _find(viewer, confirmation.name)
    count, newest = await viewer.app.services.webhooks.dead_letter_counts(confirmation.name)
    return {"webhook": webhook, "count": count, "newest": newest, "max_kept": MAX_BACKLOG}


async def resend_dead_lettered(viewer: Viewer, form: ResendDeadLetteredForm) -> Response:
    operator = viewer.context.operator
    sent = await operator_actions.resend_dead_lettered(viewer.app, operator, form.name, form.upto, form.reason_or_none)
    messages = "1 dead-lettered message" if sent.resent == 1 else f"{sent.resent} dead-lettered messages"
    return redirect_with_flash(viewer, _webhook_url(form.name), f"Sending {messages} again.")


def _find(viewer: Viewer, name: str) -> WebhookView:
    for webhook in viewer.app.services.webhooks.views():
        if webhook.name == name:
            return webhook
    raise api_error("not_found", f"There is no webhook {name} in the configuration. See /webhooks for the list.")


def _webhook_url(name: str) -> str:
    return f"/webhooks/{quote(name, safe='')}"


def _page_url(selection: WebhookPageQuery, cursor: str | None = None) -> str:
    """Return the URL of the page that begins at `cursor`, with the same webhook and filter."""
    fields = {"state": selection.state, "cursor": cursor}
    query = urlencode({name: value for name, value in fields.items() if value})
    return f"{_webhook_url(selection.name)}?{query}" if query else _webhook_url(selection.name)
