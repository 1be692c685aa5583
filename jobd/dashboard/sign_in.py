"""In and out: the sign-in, the brake on those who guess tokens, the cookie that a session lives by.

Shows no other page. Whether a token is valid is the gate's to say.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Annotated, Final
from urllib.parse import quote

import structlog
from msgspec import Meta
from msgspec.structs import replace

from jobd.api.auditing import note
from jobd.api.services import Rooms
from jobd.dashboard.context import Form, Guest, cookie, is_renewal, is_secure, set_cookie, target_of
from jobd.dashboard.rendering import HEADERS, HTML, go_to
from jobd.dashboard.sessions import LONGEST_S, Brake, Comings, Session, Sessions
from jobd.http.app import Web
from jobd.http.auth import operator_name
from jobd.http.request import Visit, address_of
from jobd.http.response import Text
from jobd.model.commands import Command, Operator, RecordAction
from jobd.model.responses import Response

# Addresses to which a sign-in leads on: with all that browsers leave in an address as it is, but for the backslash,
# which they take for a slash. `//` would be another host.
OURS: Final = re.compile(r"/(?!/)[A-Za-z0-9._~:/?@!$&'()*+,;=%|^`{}\[\]-]*")

MOST_HELD: Final = 32  # answers that are held back at the same time; who comes then hears at once that it is too much
NOBODY: Final = "nobody"

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
        self._comings = Comings(clock_s)
        self._held = 0  # answers that are held back

    async def page(self, site: Web[Rooms], visit: Visit, asked: SignInPage) -> Response:
        if self._sessions.find(cookie(visit)) is not None:
            return Response(go_to(onward(asked.next)), status=303)
        return Response(await self._form(asked.next, ""))

    async def _form(self, wanted: str, fault: str) -> Text:
        shown = {"title": "Sign in", "name": "sign-in", "onward": onward(wanted), "fault": fault}
        return await self._paint("sign_in.html", None, **shown)

    async def sign_in(self, site: Web[Rooms], visit: Visit, asked: SignIn) -> Response:
        """No secret of a session is in this form, as there is none yet. What another site could gain by sending it is
        that somebody is signed in with a token that this site knows; and the gate has looked at Origin."""
        address, name = address_of(visit), operator_name(asked.name)
        opened = self._sessions.sign_in(asked.token.strip(), name, by_tls=is_secure(visit))
        if opened is None:
            return await self._refuse(site, asked, Operator(name or NOBODY, address))
        secret, session = opened
        log.info("signed_in", access=session.access, address=address, name=session.name or None)
        await self._note(site, session, address, "sign-in")
        self._sessions.sign_out(cookie(visit))
        return Response(go_to(onward(asked.next), Set_Cookie=set_cookie(visit, secret, LONGEST_S)), status=303)

    async def _refuse(self, site: Web[Rooms], asked: SignIn, who: Operator) -> Response:
        """A wrong token. Its answer may be held back; of those that are at the same time there is a limit, too."""
        wrong = self._brake.wrong(who.address)
        site.refusals["unauthorized"] += 1
        if wrong.is_told:
            log.info("sign_in_refused", address=who.address, times=wrong.times)
            told = RecordAction(what="sign-in", details={"times": wrong.times}, outcome="unauthorized")
            await site.actor.ask(told, operator=replace(who, part_of=f"sign-in {wrong.spell}"))
        if wrong.wait_s and self._held >= MOST_HELD:
            text = await self._form(asked.next, "That is no valid token, and too many wrong ones come just now.")
            return Response(replace(text, more={**text.more, "Retry-After": f"{wrong.wait_s:.0f}"}), status=429)
        if wrong.wait_s:
            self._held += 1
            try:
                await asyncio.sleep(wrong.wait_s)
            finally:
                self._held -= 1
        return Response(await self._form(asked.next, "That is no valid token."), status=401)

    async def sign_out(self, guest: Guest, asked: Form) -> Response:
        self._sessions.sign_out(cookie(guest.visit))
        log.info("signed_out", access=guest.access)
        if guest.session is not None:
            await self._note(guest.site, guest.session, address_of(guest.visit), "sign-out")
        return Response(go_to("/sign-in", Set_Cookie=set_cookie(guest.visit, "", 0)), status=303)

    async def _note(self, site: Web[Rooms], session: Session, address: str, what: str) -> None:
        who = Operator(session.name or ("reader" if session.access == "read" else ""), address)
        coming = self._comings.note(what, session.access, address, who.who)
        more = {"times": coming.times, "names": list(coming.names)} if coming.times > 1 else {}
        await note(site, replace(who, part_of=coming.spell), what, {"access": session.access, **more})


def onward(place: str) -> str:
    """`place` where it is one of ours, else the overview."""
    return place if OURS.fullmatch(place) else "/"


def to_sign_in(visit: Visit) -> Response:
    """On to the sign-in, and from there back. htmx follows a header of its own."""
    place = f"/sign-in?next={quote(target_of(visit), safe='')}"
    if is_renewal(visit):
        return Response(Text(HTML, b"", {**HEADERS, "HX-Redirect": place}), status=401)
    return Response(go_to(place), status=303)
