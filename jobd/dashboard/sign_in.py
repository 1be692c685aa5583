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

from jobd.api.auditing import audit_action
from jobd.api.services import Services
from jobd.dashboard.context import Form, Viewer, is_live_update, is_secure, request_target, session_cookie, set_cookie
from jobd.dashboard.rendering import HEADERS, HTML, redirect
from jobd.dashboard.sessions import MAX_AGE_S, LoginThrottle, Session, Sessions, SignInLog
from jobd.http.app import App
from jobd.http.auth import operator_name
from jobd.http.request import RequestContext, client_address
from jobd.http.response import RawBody
from jobd.model.commands import Command, Operator, RecordAction
from jobd.model.responses import Response

# Addresses to which a sign-in leads on: with all that browsers leave in an address as it is, but for the backslash,
# which they take for a slash. `//` would be another host.
LOCAL_URL: Final = re.compile(r"/(?!/)[A-Za-z0-9._~:/?@!$&'()*+,;=%|^`{}\[\]-]*")

MAX_DELAYED: Final = 32  # answers that are held back at the same time; who comes then hears at once that it is too much
ANONYMOUS: Final = "nobody"

log = structlog.get_logger("jobd.dashboard")


class SignInQuery(Command, frozen=True, kw_only=True):
    next: Annotated[str, Meta(max_length=2_000)] = "/"


class SignInForm(SignInQuery, frozen=True, kw_only=True):
    token: Annotated[str, Meta(max_length=1_000)] = ""
    name: Annotated[str, Meta(max_length=1_000)] = ""


class SignInPages:
    """`paint` makes a page, given the name of its template and for whom it is."""

    def __init__(
        self, sessions: Sessions, paint: Callable[..., Awaitable[RawBody]], clock_s: Callable[[], float]
    ) -> None:
        self._sessions = sessions
        self._render = paint
        self._throttle = LoginThrottle(clock_s)
        self._log = SignInLog(clock_s)
        self._delayed = 0  # answers that are held back

    async def page(self, site: App[Services], visit: RequestContext, asked: SignInQuery) -> Response:
        if self._sessions.find(session_cookie(visit)) is not None:
            return Response(redirect(safe_redirect(asked.next)), status=303)
        return Response(await self._form(asked.next, ""))

    async def _form(self, wanted: str, fault: str) -> RawBody:
        shown = {"title": "Sign in", "name": "sign-in", "next_url": safe_redirect(wanted), "error": fault}
        return await self._render("sign_in.html", None, **shown)

    async def sign_in(self, site: App[Services], visit: RequestContext, asked: SignInForm) -> Response:
        """No secret of a session is in this form, as there is none yet. What another site could gain by sending it is
        that somebody is signed in with a token that this site knows; and the gate has looked at Origin."""
        address, name = client_address(visit), operator_name(asked.name)
        opened = self._sessions.sign_in(asked.token.strip(), name, by_tls=is_secure(visit))
        if opened is None:
            return await self._reject(site, asked, Operator(name or ANONYMOUS, address))
        secret, session = opened
        log.info("signed_in", access=session.access, address=address, name=session.name or None)
        await self._record_audit(site, session, address, "sign-in")
        self._sessions.sign_out(session_cookie(visit))
        return Response(
            redirect(safe_redirect(asked.next), Set_Cookie=set_cookie(visit, secret, MAX_AGE_S)), status=303
        )

    async def _reject(self, site: App[Services], asked: SignInForm, who: Operator) -> Response:
        """A wrong token. Its answer may be held back; of those that are at the same time there is a limit, too."""
        wrong = self._throttle.record_failure(who.address)
        site.error_counts["unauthorized"] += 1
        if wrong.is_audited:
            log.info("sign_in_refused", address=who.address, times=wrong.times)
            told = RecordAction(what="sign-in", details={"times": wrong.times}, outcome="unauthorized")
            await site.actor.ask(told, operator=replace(who, part_of=f"sign-in {wrong.window}"))
        if wrong.delay_s and self._delayed >= MAX_DELAYED:
            text = await self._form(asked.next, "That is no valid token, and too many wrong ones come just now.")
            return Response(replace(text, headers={**text.headers, "Retry-After": f"{wrong.delay_s:.0f}"}), status=429)
        if wrong.delay_s:
            self._delayed += 1
            try:
                await asyncio.sleep(wrong.delay_s)
            finally:
                self._delayed -= 1
        return Response(await self._form(asked.next, "That is no valid token."), status=401)

    async def sign_out(self, viewer: Viewer, asked: Form) -> Response:
        self._sessions.sign_out(session_cookie(viewer.visit))
        log.info("signed_out", access=viewer.access)
        if viewer.session is not None:
            await self._record_audit(viewer.app, viewer.session, client_address(viewer.visit), "sign-out")
        return Response(redirect("/sign-in", Set_Cookie=set_cookie(viewer.visit, "", 0)), status=303)

    async def _record_audit(self, site: App[Services], session: Session, address: str, what: str) -> None:
        who = Operator(session.name or ("reader" if session.access == "read" else ""), address)
        coming = self._log.record(what, session.access, address, who.who)
        more = {"times": coming.times, "names": list(coming.names)} if coming.times > 1 else {}
        await audit_action(site, replace(who, part_of=coming.window), what, {"access": session.access, **more})


def safe_redirect(place: str) -> str:
    """`place` where it is one of ours, else the overview."""
    return place if LOCAL_URL.fullmatch(place) else "/"


def redirect_to_sign_in(visit: RequestContext) -> Response:
    """On to the sign-in, and from there back. htmx follows a header of its own."""
    place = f"/sign-in?next={quote(request_target(visit), safe='')}"
    if is_live_update(visit):
        return Response(RawBody(HTML, b"", {**HEADERS, "HX-Redirect": place}), status=401)
    return Response(redirect(place), status=303)
