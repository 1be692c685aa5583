"""Sign operators in and out: the sign-in page, the session cookie, and delays for failed attempts."""

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
from jobd.http.auth import printable_name
from jobd.http.http_app import HttpApp
from jobd.http.request import RequestContext, client_address
from jobd.http.response import RawBody
from jobd.model.commands import Command, Operator, RecordAction, RecordedAction
from jobd.model.responses import Response

# URLs that a sign-in may redirect to: all characters that browsers leave unescaped, except the backslash, which they
# treat as a slash. A leading `//` would name another host.
LOCAL_URL: Final = re.compile(r"/(?!/)[A-Za-z0-9._~:/?@!$&'()*+,;=%|^`{}\[\]-]*")

MAX_DELAYED: Final = 32  # responses delayed at the same time; further failures get 429 at once
ANONYMOUS: Final = "nobody"

log = structlog.get_logger("jobd.dashboard")


class SignInQuery(Command, frozen=True, kw_only=True):
    next: Annotated[str, Meta(max_length=2_000)] = "/"


class SignInForm(SignInQuery, frozen=True, kw_only=True):
    token: Annotated[str, Meta(max_length=1_000)] = ""
    name: Annotated[str, Meta(max_length=1_000)] = ""


class SignInPages:
    """The sign-in page and its forms. `render` renders a template for a viewer."""

    def __init__(
        self, sessions: Sessions, render: Callable[..., Awaitable[RawBody]], clock_s: Callable[[], float]
    ) -> None:
        self._sessions = sessions
        self._render = render
        self._throttle = LoginThrottle(clock_s)
        self._log = SignInLog(clock_s)
        self._delayed = 0

    async def page(self, app: HttpApp[Services], context: RequestContext, query: SignInQuery) -> Response:
        if self._sessions.find(session_cookie(context)) is not None:
            return Response(redirect(safe_redirect(query.next)), status=303)
        return Response(await self._form(query.next, ""))

    async def _form(self, next_url: str, error: str) -> RawBody:
        data = {"title": "Sign in", "name": "sign-in", "next_url": safe_redirect(next_url), "error": error}
        return await self._render("sign_in.html", None, **data)

    async def sign_in(self, app: HttpApp[Services], context: RequestContext, form: SignInForm) -> Response:
        """Open a session. There is no CSRF token before it.

        Another site could only sign an operator in with a token that it knows. The authenticator has checked Origin.
        """
        address, name = client_address(context), printable_name(form.name)
        opened = self._sessions.sign_in(form.token.strip(), name, by_tls=is_secure(context))
        if opened is None:
            return await self._reject(app, form, Operator(name or ANONYMOUS, address))
        secret, session = opened
        log.info("signed_in", access=session.access, address=address, name=session.name or None)
        await self._record_audit(app, session, address, "sign-in")
        self._sessions.sign_out(session_cookie(context))
        cookie = set_cookie(context, secret, MAX_AGE_S)
        return Response(redirect(safe_redirect(form.next), Set_Cookie=cookie), status=303)

    async def _reject(self, app: HttpApp[Services], form: SignInForm, operator: Operator) -> Response:
        """Respond to an invalid token, with a delay if its address has sent many."""
        failure = self._throttle.record_failure(operator.address)
        app.error_counts["unauthorized"] += 1
        if failure.is_audited:
            log.info("sign_in_rejected", address=operator.address, times=failure.count)
            entry = RecordAction(what="sign-in", details={"times": failure.count}, outcome="unauthorized")
            await app.actor.ask(entry, operator=replace(operator, part_of=f"sign-in {failure.window}"))
        if failure.delay_s and self._delayed >= MAX_DELAYED:
            body = await self._form(form.next, "This token is not valid, and too many sign-ins are failing.")
            retry_after = {"Retry-After": f"{failure.delay_s:.0f}"}
            return Response(replace(body, headers={**body.headers, **retry_after}), status=429)
        if failure.delay_s:
            self._delayed += 1
            try:
                await asyncio.sleep(failure.delay_s)
            finally:
                self._delayed -= 1
        return Response(await self._form(form.next, "This token is not valid."), status=401)

    async def sign_out(self, viewer: Viewer, form: Form) -> Response:
        self._sessions.sign_out(session_cookie(viewer.context))
        log.info("signed_out", access=viewer.access)
        if viewer.session is not None:
            await self._record_audit(viewer.app, viewer.session, client_address(viewer.context), "sign-out")
        return Response(redirect("/sign-in", Set_Cookie=set_cookie(viewer.context, "", 0)), status=303)

    async def _record_audit(self, app: HttpApp[Services], session: Session, address: str, what: RecordedAction) -> None:
        operator = Operator(session.name or ("reader" if session.access == "read" else ""), address)
        window = self._log.record(what, session.access, address, operator.who)
        repeated = {"times": window.count, "names": list(window.names)} if window.count > 1 else {}
        operator = replace(operator, part_of=window.window)
        await audit_action(app, operator, what, {"access": session.access, **repeated})


def safe_redirect(url: str) -> str:
    """Return `url` if it is one of this daemon, else the overview."""
    return url if LOCAL_URL.fullmatch(url) else "/"


def redirect_to_sign_in(context: RequestContext) -> Response:
    """Redirect to the sign-in page, and from there back. htmx needs its own header."""
    url = f"/sign-in?next={quote(request_target(context), safe='')}"
    if is_live_update(context):
        return Response(RawBody(HTML, b"", {**HEADERS, "HX-Redirect": url}), status=401)
    return Response(redirect(url), status=303)
