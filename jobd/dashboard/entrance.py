"""In and out: the sign-in, the brake on those who guess tokens, the cookie that a session lives by.

Shows no other page. Whether a token is valid is the gate's to say.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Annotated, Final
from urllib.parse import quote

import structlog
from msgspec import Meta
from msgspec.structs import replace

from jobd.answers import Answer
from jobd.commands import Command
from jobd.dashboard.guests import Form, Guest, cookie, is_renewal, set_cookie, target_of
from jobd.dashboard.paint import HEADERS, HTML, go_to
from jobd.dashboard.sessions import LONGEST_S, Brake, Sessions
from jobd.doors import operator_name
from jobd.replies import Text
from jobd.visits import Visit, address_of
from jobd.web import Web

OURS: Final = re.compile(r"/(?!/)[A-Za-z0-9._:%/?&=+~-]*")  # addresses to which a sign-in leads on

log = structlog.get_logger("jobd.dashboard")


class SignInPage(Command, frozen=True, kw_only=True):
    next: Annotated[str, Meta(max_length=2_000)] = "/"


class SignIn(SignInPage, frozen=True, kw_only=True):
    token: Annotated[str, Meta(max_length=1_000)] = ""
    name: Annotated[str, Meta(max_length=1_000)] = ""


class Entrance:
    """`paint` makes a page, given the name of its template and for whom it is."""

    def __init__(self, sessions: Sessions, paint: Callable[..., Awaitable[Text]], clock_s: Callable[[], float]) -> None:
        self._sessions = sessions
        self._paint = paint
        self._brake = Brake(clock_s)

    async def page(self, site: Web, visit: Visit, asked: SignInPage) -> Answer:
        if self._sessions.find(cookie(visit)) is not None:
            return Answer(go_to(onward(asked.next)), status=303)
        return Answer(await self._form(asked.next, ""))

    async def _form(self, wanted: str, fault: str) -> Text:
        shown = {"title": "Sign in", "name": "sign-in", "onward": onward(wanted), "fault": fault}
        return await self._paint("sign_in.html", None, **shown)

    async def sign_in(self, site: Web, visit: Visit, asked: SignIn) -> Answer:
        """No secret of a session is in this form, as there is none yet. What another site could gain by sending it is
        that somebody is signed in with a token that this site knows; and the gate has looked at Origin."""
        address = address_of(visit)
        if wait_s := self._brake.wait_s(address):
            fault = f"Too many wrong tokens came from your address. Try again in {wait_s:.0f} s."
            text = await self._form(asked.next, fault)
            return Answer(replace(text, more={**text.more, "Retry-After": f"{wait_s:.0f}"}), status=429)
        opened = self._sessions.sign_in(asked.token.strip(), operator_name(asked.name))
        if opened is None:
            self._brake.note_wrong(address)
            site.refusals["unauthorized"] += 1
            log.info("sign_in_refused", address=address)
            return Answer(await self._form(asked.next, "That is no valid token."), status=401)
        secret, session = opened
        log.info("signed_in", access=session.access, address=address, name=session.name or None)
        self._sessions.sign_out(cookie(visit))
        return Answer(go_to(onward(asked.next), Set_Cookie=set_cookie(visit, secret, LONGEST_S)), status=303)

    async def sign_out(self, guest: Guest, asked: Form) -> Answer:
        self._sessions.sign_out(cookie(guest.visit))
        log.info("signed_out", access=guest.access)
        return Answer(go_to("/sign-in", Set_Cookie=set_cookie(guest.visit, "", 0)), status=303)


def onward(place: str) -> str:
    """`place` where it is one of ours, else the overview."""
    return place if OURS.fullmatch(place) else "/"


def to_sign_in(visit: Visit) -> Answer:
    """On to the sign-in, and from there back. htmx follows a header of its own."""
    place = f"/sign-in?next={quote(target_of(visit), safe='')}"
    if is_renewal(visit):
        return Answer(Text(HTML, b"", {**HEADERS, "HX-Redirect": place}), status=401)
    return Answer(go_to(place), status=303)
