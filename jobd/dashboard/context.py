"""Identify the viewer of a page, which is a browser with a session or a program with a token, and its permissions."""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct

from jobd.api.services import Services
from jobd.dashboard.rendering import redirect
from jobd.dashboard.sessions import Session, Sessions
from jobd.http.auth import Permission
from jobd.http.http_app import HttpApp
from jobd.http.request import RequestContext, operator_of
from jobd.model.commands import Command
from jobd.model.errors import ApiError, api_error
from jobd.model.fields import Text
from jobd.model.responses import Response

AUTHORIZATION: Final = "authorization"
CSRF_HEADER: Final = "x-csrf-token"


class Form(Command, frozen=True, kw_only=True):
    """A form of a page, with the CSRF token of its session."""

    csrf: str = ""


class ReasonForm(Form, frozen=True, kw_only=True):
    """A form with an optional reason."""

    reason: Text = ""

    @property
    def reason_or_none(self) -> str | None:
        return self.reason.strip() or None


class Viewer(Struct):
    """The sender of a request for a page. `session` is None for a program, which sends its token each time."""

    app: HttpApp[Services]
    context: RequestContext
    access: Permission
    session: Session | None = None

    @property
    def may_change(self) -> bool:
        return self.access == "full"

    @property
    def name(self) -> str:
        """The name that the operator gave when signing in, or ""."""
        return "" if self.session is None else self.session.name

    @property
    def csrf(self) -> str:
        return "" if self.session is None else self.session.csrf

    @property
    def now(self) -> int:
        """Wall time of the daemon, Unix ms."""
        return self.app.services.clock.moment().now

    async def ask(self, command: Any, *, expected: str | None = None) -> Response | ApiError:
        """Send one command to the actor. `expected` is the version of the job that the operator saw."""
        context = self.context
        return await self.app.actor.ask(
            command,
            by=context.by,
            admin=self.may_change,
            size=context.size,
            operator=context.operator,
            expected=expected,
        )

    def check_form(self, csrf: str) -> None:
        """Raise 403 if a form lacks the CSRF token of the session: another site may have sent it.

        Programs need none: browsers attach cookies on their own, but never an Authorization header.
        """
        submitted = self.context.header(CSRF_HEADER) or csrf
        if self.session is not None and not self.session.has_csrf(submitted):
            raise api_error(
                "forbidden", "This form does not belong to your session. Open its page again, then submit it."
            )


def find_viewer(app: HttpApp[Services], context: RequestContext, sessions: Sessions) -> Viewer | None:
    """Return the viewer, or None without a session or token. Raise 401 if the request carries an invalid token."""
    viewer = None
    if AUTHORIZATION in context.headers:
        viewer = Viewer(app, context, app.authenticator.authenticate(context.headers))
    elif (session := sessions.find(session_cookie(context))) is not None:
        viewer = Viewer(app, context, session.access, session)
    if viewer is not None:
        context.admin = viewer.may_change
        context.by = "reader"
        if viewer.may_change:
            context.operator = operator_of(context, viewer.name)
            context.by = context.operator.by
    return viewer


def redirect_with_flash(viewer: Viewer, url: str, message: str = "") -> Response:
    """Redirect after a form is processed, so that reloading the page does not submit it again."""
    if viewer.session is not None and message:
        viewer.session.flash = message
    return Response(redirect(url), status=303)


def is_live_update(context: RequestContext) -> bool:
    """Return whether htmx requests the live region of a page."""
    return context.header("hx-request") == "true"


def request_target(context: RequestContext) -> str:
    return f"{context.path}?{context.query}" if context.query else context.path


def session_cookie(context: RequestContext) -> str:
    """Return the session's secret id from the cookie, or ""."""
    wanted = session_cookie_name(context)
    for part in context.header("cookie").split(";"):
        name, _, value = part.strip().partition("=")
        if name == wanted:
            return value
    return ""


def session_cookie_name(context: RequestContext) -> str:
    """Name the cookie after the port: browsers share cookies between all ports of a host."""
    address = context.local_address
    return f"jobd_{address[1]}" if isinstance(address, tuple) else "jobd"


def set_cookie(context: RequestContext, value: str, max_age_s: float) -> str:
    """Return the Set-Cookie value that stores the session's secret id, or deletes it if `max_age_s` is 0."""
    secure = "; Secure" if is_secure(context) else ""
    return f"{session_cookie_name(context)}={value}; Path=/; HttpOnly; SameSite=Strict; Max-Age={max_age_s:.0f}{secure}"


def is_secure(context: RequestContext) -> bool:
    """Return whether the browser used TLS, to this daemon or to a proxy in front of it.

    TLS at a proxy shows only in the Origin of a form, which the authenticator has checked. X-Forwarded-Proto is not
    trusted: any client can send it.
    """
    return context.is_tls or context.header("origin").startswith("https://")
