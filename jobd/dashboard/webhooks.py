"""The pages of webhooks: how each is going, what it was sent, and a message again.

Sends nothing itself: it asks the room of the webhooks.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, get_args
from urllib.parse import quote, urlencode

from msgspec import Meta

from jobd.dashboard.context import Guest, ReasonForm, go_on
from jobd.dashboard.pages import PAUSED, PER_PAGE, Shown, query, strip
from jobd.model.commands import Command
from jobd.model.errors import ApiError, ApiException, api_error
from jobd.model.responses import DeliveryPage, DeliveryState, Response, WebhookView
from jobd.model.webhooks import MAX_BACKLOG, WebhookName

STATES: Final[tuple[DeliveryState, ...]] = get_args(DeliveryState)
Wanted = Literal["", "waiting", "delivered", "given_up"]  # a form sends the choice of all of them, too
Number = Annotated[int, Meta(ge=1, le=10**18)]


class WebhookPage(Command, frozen=True, kw_only=True):
    """`state` filters its deliveries ("": all of them), `cursor` is where their page begins."""

    name: WebhookName
    state: Wanted = ""
    cursor: Number | None = None


class TestForm(ReasonForm, frozen=True, kw_only=True):
    """`state`: the filter of the page from which it is asked for."""

    name: WebhookName
    state: Wanted = ""


class AgainPage(Command, frozen=True, kw_only=True):
    name: WebhookName


class AgainForm(ReasonForm, frozen=True, kw_only=True):
    """`upto`: the newest of those that were counted; what was given up since is not meant."""

    name: WebhookName
    upto: Number


class ResendForm(ReasonForm, frozen=True, kw_only=True):
    """`id` of the delivery, and the address of the page from which it is asked for."""

    name: WebhookName
    id: Number
    state: Wanted = ""


async def every(guest: Guest, _: Any) -> Shown:
    [paused] = await query(guest, PAUSED)
    return {"webhooks": guest.site.rooms.webhooks(), **strip(guest, paused)}


async def one(guest: Guest, wanted: WebhookPage) -> Shown:
    """One webhook, and a page of what it was sent, the newest first."""
    webhook = _named(guest, wanted.name)
    page = await guest.site.rooms.deliveries(wanted.name, wanted.state or None, wanted.cursor, PER_PAGE)
    if isinstance(page, ApiError):
        raise ApiException(page)
    found: DeliveryPage = page
    [paused] = await query(guest, PAUSED)
    shown: Shown = {
        "webhook": webhook,
        "states": STATES,
        "state": wanted.state,
        "deliveries": found.deliveries,
        "next": _address(wanted, found.next_cursor) if found.next_cursor else "",
        "first": _address(wanted) if wanted.cursor else "",
    }
    if wanted.cursor:  # what is older stays where it is
        shown["every_s"] = 0
    return {**shown, **strip(guest, paused)}


async def test(guest: Guest, form: TestForm) -> Response | ApiError:
    """A message that says that it is a test."""
    sent = await guest.site.rooms.test_webhook(form.name)
    if isinstance(sent, ApiError):
        return sent
    await guest.note("test-webhook", {"webhook": form.name}, form.why)
    place = _address(WebhookPage(name=form.name, state=form.state))
    return go_on(guest, place, f"A test is on its way: message {sent.id}.")


async def resend(guest: Guest, form: ResendForm) -> Response | ApiError:
    """The same message, now: once more, whatever became of it, or at last where it waits."""
    sent = await guest.site.rooms.deliver_again(form.name, form.id)
    if isinstance(sent, ApiError):
        return sent
    await guest.note("resend-delivery", {"webhook": form.name, "delivery": form.id}, form.why)
    return go_on(guest, _address(WebhookPage(name=form.name, state=form.state)), f"Message {sent.id} is on its way.")


async def again(guest: Guest, wanted: AgainPage) -> Shown:
    """How many were given up, before all of them are sent again."""
    webhook = _named(guest, wanted.name)
    count, newest = await guest.site.rooms.given_up(wanted.name)
    [paused] = await query(guest, PAUSED)
    return {"webhook": webhook, "count": count, "newest": newest, "most": MAX_BACKLOG, **strip(guest, paused)}


async def resend_all(guest: Guest, form: AgainForm) -> Response | ApiError:
    """All that was given up, once more."""
    sent = await guest.site.rooms.deliver_all_again(form.name, form.upto)
    if isinstance(sent, ApiError):
        return sent
    await guest.note("resend-given-up", {"webhook": form.name, "resent": sent.resent}, form.why)
    many = "1 message that was" if sent.resent == 1 else f"{sent.resent} messages that were"
    return go_on(guest, _place(form.name), f"{many} given up: sent again.")


def _named(guest: Guest, name: str) -> WebhookView:
    for webhook in guest.site.rooms.webhooks():
        if webhook.name == name:
            return webhook
    raise api_error("not_found", f"There is no webhook {name} in the configuration. Those that are: /webhooks")


def _place(name: str) -> str:
    return f"/webhooks/{quote(name, safe='')}"


def _address(wanted: WebhookPage, cursor: str | None = None) -> str:
    """The page of the same webhook and filter, from `cursor` on."""
    fields = {"state": wanted.state, "cursor": cursor}
    query = urlencode({name: value for name, value in fields.items() if value})
    return f"{_place(wanted.name)}?{query}" if query else _place(wanted.name)
