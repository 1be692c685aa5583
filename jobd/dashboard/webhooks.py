"""The pages of webhooks: how each is going, what it was sent, and a message again.

Sends nothing itself: it asks the room of the webhooks.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, get_args
from urllib.parse import quote, urlencode

from msgspec import Meta

from jobd.dashboard.context import ReasonForm, Viewer, redirect_with_flash
from jobd.dashboard.pages import PAUSED_QUEUES, PER_PAGE, PageData, banners, query
from jobd.model.commands import Command
from jobd.model.errors import ApiError, ApiException, api_error
from jobd.model.responses import DeliveryPage, DeliveryState, Response, WebhookView
from jobd.model.webhooks import MAX_BACKLOG, WebhookName

STATES: Final[tuple[DeliveryState, ...]] = get_args(DeliveryState)
StateFilter = Literal["", "waiting", "delivered", "given_up"]  # a form sends the choice of all of them, too
Number = Annotated[int, Meta(ge=1, le=10**18)]


class WebhookPageQuery(Command, frozen=True, kw_only=True):
    """`state` filters its deliveries ("": all of them), `cursor` is where their page begins."""

    name: WebhookName
    state: StateFilter = ""
    cursor: Number | None = None


class TestWebhookForm(ReasonForm, frozen=True, kw_only=True):
    """`state`: the filter of the page from which it is asked for."""

    name: WebhookName
    state: StateFilter = ""


class RetryFailedQuery(Command, frozen=True, kw_only=True):
    name: WebhookName


class RetryFailedForm(ReasonForm, frozen=True, kw_only=True):
    """`upto`: the newest of those that were counted; what was given up since is not meant."""

    name: WebhookName
    upto: Number


class ResendForm(ReasonForm, frozen=True, kw_only=True):
    """`id` of the delivery, and the address of the page from which it is asked for."""

    name: WebhookName
    id: Number
    state: StateFilter = ""


async def webhook_list(viewer: Viewer, _: Any) -> PageData:
    [paused] = await query(viewer, PAUSED_QUEUES)
    return {"webhooks": viewer.app.services.webhooks.views(), **banners(viewer, paused)}


async def webhook_detail(viewer: Viewer, wanted: WebhookPageQuery) -> PageData:
    """One webhook, and a page of what it was sent, the newest first."""
    webhook = _find(viewer, wanted.name)
    page = await viewer.app.services.deliveries(wanted.name, wanted.state or None, wanted.cursor, PER_PAGE)
    if isinstance(page, ApiError):
        raise ApiException(page)
    found: DeliveryPage = page
    [paused] = await query(viewer, PAUSED_QUEUES)
    shown: PageData = {
        "webhook": webhook,
        "states": STATES,
        "state": wanted.state,
        "deliveries": found.deliveries,
        "next": _page_url(wanted, found.next_cursor) if found.next_cursor else "",
        "first": _page_url(wanted) if wanted.cursor else "",
    }
    if wanted.cursor:  # what is older stays where it is
        shown["interval_s"] = 0
    return {**shown, **banners(viewer, paused)}


async def send_test(viewer: Viewer, form: TestWebhookForm) -> Response | ApiError:
    """A message that says that it is a test."""
    sent = await viewer.app.services.test_webhook(form.name)
    if isinstance(sent, ApiError):
        return sent
    await viewer.record_audit("test-webhook", {"webhook": form.name}, form.reason_or_none)
    place = _page_url(WebhookPageQuery(name=form.name, state=form.state))
    return redirect_with_flash(viewer, place, f"A test is on its way: message {sent.id}.")


async def resend(viewer: Viewer, form: ResendForm) -> Response | ApiError:
    """The same message, now: once more, whatever became of it, or at last where it waits."""
    sent = await viewer.app.services.deliver_again(form.name, form.id)
    if isinstance(sent, ApiError):
        return sent
    await viewer.record_audit("resend-delivery", {"webhook": form.name, "delivery": form.id}, form.reason_or_none)
    return redirect_with_flash(
        viewer, _page_url(WebhookPageQuery(name=form.name, state=form.state)), f"Message {sent.id} is on its way."
    )


async def confirm_retry_failed(viewer: Viewer, wanted: RetryFailedQuery) -> PageData:
    """How many were given up, before all of them are sent again."""
    webhook = _find(viewer, wanted.name)
    count, newest = await viewer.app.services.webhooks.given_up(wanted.name)
    [paused] = await query(viewer, PAUSED_QUEUES)
    return {"webhook": webhook, "count": count, "newest": newest, "most": MAX_BACKLOG, **banners(viewer, paused)}


async def retry_failed(viewer: Viewer, form: RetryFailedForm) -> Response | ApiError:
    """All that was given up, once more."""
    sent = await viewer.app.services.deliver_all_again(form.name, form.upto)
    if isinstance(sent, ApiError):
        return sent
    await viewer.record_audit("resend-given-up", {"webhook": form.name, "resent": sent.resent}, form.reason_or_none)
    many = "1 message that was" if sent.resent == 1 else f"{sent.resent} messages that were"
    return redirect_with_flash(viewer, _webhook_url(form.name), f"{many} given up: sent again.")


def _find(viewer: Viewer, name: str) -> WebhookView:
    for webhook in viewer.app.services.webhooks.views():
        if webhook.name == name:
            return webhook
    raise api_error("not_found", f"There is no webhook {name} in the configuration. Those that are: /webhooks")


def _webhook_url(name: str) -> str:
    return f"/webhooks/{quote(name, safe='')}"


def _page_url(wanted: WebhookPageQuery, cursor: str | None = None) -> str:
    """The page of the same webhook and filter, from `cursor` on."""
    fields = {"state": wanted.state, "cursor": cursor}
    query = urlencode({name: value for name, value in fields.items() if value})
    return f"{_webhook_url(wanted.name)}?{query}" if query else _webhook_url(wanted.name)
