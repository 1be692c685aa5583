"""Who looks at a page: a browser with a session, or a program with a token; and what they may do.

Knows no page. Whether a token is valid is the gate's to say.
"""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct

from jobd.api.auditing import audit_action
from jobd.api.services import Services
from jobd.dashboard.rendering import redirect
from jobd.dashboard.sessions import Session, Sessions
from jobd.http.app import App
from jobd.http.auth import Permission
from jobd.http.request import RequestContext, operator_of
from jobd.model.commands import Command
from jobd.model.errors import ApiError, api_error
from jobd.model.job import Text
from jobd.model.responses import Response

AUTHORIZATION: Final = "Authorization"
CSRF_HEADER: Final = "X-CSRF-Token"


class Form(Command, frozen=True, kw_only=True):
    """A form of a page, with the secret of its session."""

    csrf: str = ""


class ReasonForm(Form, frozen=True, kw_only=True):
    """The same for what is done with a reason, or with none."""

    reason: Text = ""

    @property
    def reason_or_none(self) -> str | None:
        return self.reason.strip() or None


class Viewer(Struct):
    """Who asks for a page. `session` is None for a program, which sends its token with every request."""

    app: App[Services]
    visit: RequestContext
    access: Permission
    session: Session | None = None

    @property
    def may_change(self) -> bool:
        return self.access == "full"

    @property
    def name(self) -> str:
        """That the operator gave at the sign-in, "" where there is none."""
        return "" if self.session is None else self.session.name

    @property
    def csrf(self) -> str:
        return "" if self.session is None else self.session.csrf

    @property
    def now(self) -> int:
        """Wall time of the daemon, Unix ms."""
        return self.app.services.clock.moment().now

    async def ask(self, command: Any, *, expected: str | None = None) -> Response | ApiError:
        """One command to the actor, as an operator asks it; `expected`: the version of its job that they saw."""
        visit = self.visit
        return await self.app.actor.ask(
            command,
            by=visit.by,
            admin=self.may_change,
            size=visit.size,
            operator=visit.operator,
            expected=expected,
        )

    async def record_audit(self, what: str, details: dict[str, Any] | None = None, reason: str | None = None) -> None:
        """Keep in the audit log what is no command on jobs."""
        await audit_action(self.app, self.visit.operator, what, details, reason)

    def flash(self, message: str) -> None:
        """Say something on the page that comes next."""
        if self.session is not None:
            self.session.flash = message

    def check_form(self, csrf: str) -> None:
        """403 where a form of a session does not carry its secret: some other page has sent it.

        A program's token does not come by itself, as a cookie does, so it needs none.
        """
        given = self.visit.head.headers.get(CSRF_HEADER) or csrf
        if self.session is not None and not self.session.has_csrf(given):
            raise api_error("forbidden", "This form is not of your session. Open its page again, then send it.")


def find_viewer(site: App[Services], visit: RequestContext, sessions: Sessions) -> Viewer | None:
    """Who asks; None where nobody has signed in. 401 where a token is sent that is not valid."""
    viewer = None
    if AUTHORIZATION in visit.head.headers:
        viewer = Viewer(site, visit, site.authenticator.authenticate(visit.head.headers))
    elif (session := sessions.find(session_cookie(visit))) is not None:
        viewer = Viewer(site, visit, session.access, session)
    if viewer is not None:
        visit.admin = viewer.may_change
        visit.by = "reader"
        if viewer.may_change:
            visit.operator = operator_of(visit, viewer.name)
            visit.by = visit.operator.by
    return viewer


def redirect_with_flash(viewer: Viewer, place: str, message: str = "") -> Response:
    """Done: on to a page, which says so. A reload of it does nothing again."""
    if message:
        viewer.flash(message)
    return Response(redirect(place), status=303)


def is_live_update(visit: RequestContext) -> bool:
    """Whether htmx asks for the living part of a page."""
    return visit.head.headers.get("HX-Request") == "true"


def request_target(visit: RequestContext) -> str:
    """The address that was asked for."""
    return f"{visit.path}?{visit.query}" if visit.query else visit.path


def session_cookie(visit: RequestContext) -> str:
    """The secret of the session, "" where there is none."""
    wanted = session_cookie_name(visit)
    for part in ";".join(visit.head.headers.getall("Cookie", ())).split(";"):
        name, _, value = part.strip().partition("=")
        if name == wanted:
            return value
    return ""


def session_cookie_name(visit: RequestContext) -> str:
    """Browsers share cookies between the ports of a machine: two daemons there must not end each other's sessions."""
    address = visit.connection.sockname
    return f"jobd_{address[1]}" if isinstance(address, tuple) else "jobd"


def set_cookie(visit: RequestContext, value: str, max_age_s: float) -> str:
    """The header's value that keeps the session's secret in the browser, or with an age of 0 takes it away."""
    secure = "; Secure" if is_secure(visit) else ""
    return f"{session_cookie_name(visit)}={value}; Path=/; HttpOnly; SameSite=Strict; Max-Age={max_age_s:.0f}{secure}"


def is_secure(visit: RequestContext) -> bool:
    """Whether the browser came by TLS, to us or to a proxy before us. Of a proxy only a form tells: by its Origin, at
    which the gate has looked. What else a proxy may say (X-Forwarded-Proto) anybody may.
    """
    transport = visit.connection.transport
    by_tls = transport is not None and transport.get_extra_info("sslcontext") is not None
    return by_tls or visit.head.headers.get("Origin", "").startswith("https://")
