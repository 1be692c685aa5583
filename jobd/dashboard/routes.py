"""The table of pages: what each kind of them has in common, forms that belong to a session, refusals for people.

No page's content, and no rule about jobs. To the actor it is one more sender of commands.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Any, Final

from aiohttp.web import StreamResponse
from msgspec import Meta
from msgspec.structs import replace

from jobd.api.downloads import ArtifactRequest, send_artifact
from jobd.api.events import EVENT_STREAM
from jobd.api.services import Services
from jobd.dashboard import maintenance, pages, plans, urls, webhooks
from jobd.dashboard.assets import Assets
from jobd.dashboard.context import (
    AUTHORIZATION,
    Form,
    ReasonForm,
    Viewer,
    find_viewer,
    is_live_update,
    redirect_with_flash,
    request_target,
    session_cookie,
)
from jobd.dashboard.filters import JobsPageQuery, job_redirect, jobs_subscription
from jobd.dashboard.job_actions import JOB_ACTIONS, ActionTarget, Verb, visible_lock_id
from jobd.dashboard.live_updates import Subscription, live_stream, live_url
from jobd.dashboard.rendering import HTML, Renderer, redirect
from jobd.dashboard.sessions import Sessions
from jobd.dashboard.sign_in import SignInForm, SignInPages, SignInQuery, redirect_to_sign_in
from jobd.dashboard.urls import job_url
from jobd.http.app import App, NoFields, check_read_only
from jobd.http.auth import Authenticator
from jobd.http.request import RequestContext
from jobd.http.response import RawBody
from jobd.http.routing import Route
from jobd.model.commands import Command, Get, JobCommand, PlanCommand
from jobd.model.errors import ApiError, ApiException, api_error
from jobd.model.job import Text as Words
from jobd.model.responses import JobView, Response
from jobd.monitoring.timeseries import Timeseries

WITHOUT_FLASH: Final = ("live.html", "docs.html")  # what was done is told by the page that comes next, which is neither

Shown = dict[str, Any]
LoadPage = Callable[[Viewer, Any], Awaitable[Shown]]
HandleForm = Callable[[Viewer, Any], Awaitable[Response | ApiError]]


class StaticFileQuery(Command, frozen=True, kw_only=True):
    name: str
    v: str = ""


class JobActionForm(JobCommand, frozen=True, kw_only=True):
    verb: Verb
    seen: Annotated[str, Meta(max_length=60)]
    reason: Words = ""
    result: Annotated[int, Meta(ge=1)] | None = None
    csrf: str = ""


class Dashboard:
    """The room behind one gate. Reads static files: make it off the loop, and `warm` it later."""

    def __init__(
        self, gate: Authenticator, recorder: Timeseries, *, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self.sessions = Sessions(gate.permission_of, clock_s)
        self._assets = Assets()
        self._renderer = Renderer(self._assets)
        self._recorder = recorder
        self._sign_in_pages = SignInPages(self.sessions, self._render, clock_s)

    async def warm(self) -> None:
        """Compile the templates, before somebody waits for them."""
        await self._renderer.warm()

    def routes(self) -> tuple[Route, ...]:
        """Every page, as data."""
        recorder = self._recorder
        return (
            self._public_route("GET", "/sign-in", SignInQuery, self._sign_in_pages.page),
            self._public_route("POST", "/sign-in", SignInForm, self._sign_in_pages.sign_in),
            self._public_route("GET", "/static/{name}", StaticFileQuery, self._static),
            self._public_route("GET", "/docs", NoFields, partial(self._docs, "/openapi.json")),
            self._public_route("GET", "/docs/worker", NoFields, partial(self._docs, "/docs/worker.json")),
            self._form_route("/sign-out", Form, self._sign_in_pages.sign_out, for_readers=True),
            self._page_route("/", NoFields, "overview", "Overview", lambda viewer, _: pages.overview(viewer, recorder)),
            Route(
                method="GET",
                path="/live",
                request=Subscription,
                response=bytes,
                auth="anyone",
                handler=self._live,
                content_type=EVENT_STREAM,
            ),
            Route(
                method="GET", path="/chart.json", request=NoFields, response=bytes, auth="anyone", handler=self._chart
            ),
            self._page_route(
                "/jobs",
                JobsPageQuery,
                "jobs",
                "Jobs",
                pages.jobs,
                interval_s=5,
                leads=job_redirect,
                subscription=jobs_subscription,
            ),
            *self._job_routes("/jobs/{id}"),
            *self._job_routes("/job"),  # with the id in the query, for those that a path cannot name (places.py)
            self._form_route("/plans", plans.PlanForm, plans.create_plan),
            self._page_route("/plans/{plan_id}", PlanCommand, "plan", "Plan", plans.plan, interval_s=0),
            self._form_route("/plans/{plan_id}/apply", plans.ApplyPlanForm, plans.apply_plan),
            self._form_route("/plans/{plan_id}/next", plans.NextPlanForm, plans.create_next_plan),
            self._page_route("/failures", NoFields, "failures", "Failures", lambda viewer, _: pages.failures(viewer)),
            self._page_route(
                "/queues",
                pages.QueuesPageQuery,
                "queues",
                "Queues",
                lambda viewer, asked: pages.queues(viewer, recorder, asked),
            ),
            self._form_route("/queues/pause", maintenance.QueueForm, maintenance.pause_queue),
            self._form_route("/queues/resume", maintenance.QueueForm, maintenance.resume_queue),
            self._form_route(
                "/queues/{name}/pause", maintenance.QueueForm, maintenance.pause_queue
            ),  # as programs ask for it
            self._form_route("/queues/{name}/resume", maintenance.QueueForm, maintenance.resume_queue),
            self._page_route("/workers", pages.WorkersPageQuery, "workers", "Workers", pages.workers),
            self._page_route(
                "/workers/take-back",
                maintenance.TakeBackQuery,
                "take_back",
                "Workers",
                maintenance.confirm_take_back,
                interval_s=0,
                changes=True,
            ),
            self._form_route("/workers/take-back", maintenance.TakeBackForm, maintenance.take_back),
            self._page_route("/cleanup", NoFields, "cleanup", "Cleanup", lambda viewer, _: pages.cleanup(viewer)),
            self._page_route(
                "/cleanup/confirm",
                maintenance.CleanupConfirmQuery,
                "cleanup_confirm",
                "Cleanup",
                maintenance.confirm_cleanup,
                interval_s=0,
                changes=True,
            ),
            self._form_route("/cleanup/run", ReasonForm, maintenance.run_cleanup),
            self._form_route("/cleanup/recover", ReasonForm, maintenance.recover_stuck),
            self._page_route(
                "/alerts", NoFields, "alerts", "Alerts", lambda viewer, _: pages.alerts(viewer), interval_s=5
            ),
            self._page_route("/webhooks", NoFields, "webhooks", "Webhooks", webhooks.webhook_list, interval_s=5),
            self._page_route(
                "/webhooks/{name}",
                webhooks.WebhookPageQuery,
                "webhook",
                "Webhook",
                webhooks.webhook_detail,
                interval_s=5,
            ),
            self._form_route("/webhooks/{name}/test", webhooks.TestWebhookForm, webhooks.send_test),
            self._page_route(
                "/webhooks/{name}/again",
                webhooks.RetryFailedQuery,
                "webhook_retry",
                "Send again",
                webhooks.confirm_retry_failed,
                interval_s=0,
                changes=True,
            ),
            self._form_route("/webhooks/{name}/resend-given-up", webhooks.RetryFailedForm, webhooks.retry_failed),
            self._form_route("/webhooks/{name}/resend", webhooks.ResendForm, webhooks.resend),
            self._page_route("/audit", pages.AuditPageQuery, "audit", "Audit", pages.audit, interval_s=5),
            self._page_route(
                "/clock", NoFields, "clock", "Clock", lambda viewer, _: maintenance.confirm_clock(viewer), interval_s=0
            ),
            self._form_route("/clock/accept", ReasonForm, maintenance.accept_clock),
        )

    def _job_routes(self, place: str) -> tuple[Route, ...]:
        """The pages of one job."""
        return (
            self._page_route(
                place,
                pages.JobPageQuery,
                "job",
                "Job",
                pages.open_job,
                subscription=lambda asked: Subscription(job_id=asked.id),
            ),
            self._page_route(
                f"{place}/confirm", pages.ConfirmPageQuery, "confirm", "Confirm", pages.confirm, changes=True
            ),
            self._form_route(f"{place}/do", JobActionForm, self._run_action),
            self._public_route("GET", f"{place}/artifact", ArtifactRequest, self._artifact),
            self._public_route("GET", f"{place}/elsewhere", ArtifactRequest, self._external_link),
        )

    # -- kinds of routes ----------------------------------------------------------------------------------------------

    def _public_route(self, method: str, path: str, asks: type[Command], via: Any) -> Route:
        """Something that wants no session."""
        reads: Any = "json" if method == "GET" else "form"
        return Route(
            method=method,
            path=path,
            request=asks,
            response=bytes,
            auth="anyone",
            handler=via,
            body=reads,
            content_type=HTML,
            render_error=self.error_page,
        )

    def _page_route(
        self,
        path: str,
        asks: type[Command],
        name: str,
        title: str,
        look: LoadPage,
        *,
        interval_s: int = 2,
        changes: bool = False,
        leads: Callable[[Any], str | None] = lambda asked: None,
        subscription: Callable[[Any], Subscription] = lambda asked: Subscription(),
    ) -> Route:
        """A page for who has signed in. It renews its living part where there is `news`, or every `interval_s` seconds
        where it hears none. `leads` sends on elsewhere.

        `changes`: it leads to a change, so it is not for who may only look.
        """

        async def via(site: App[Services], visit: RequestContext, asked: Any) -> Response:
            viewer = find_viewer(site, visit, self.sessions)
            if viewer is None:
                return redirect_to_sign_in(visit)
            if changes and not viewer.may_change:
                raise api_error(
                    "forbidden", "This session may only look. To change something sign in with the admin token."
                )
            if (place := leads(asked)) is not None:
                return Response(redirect(place), status=303)
            shown = await look(viewer, asked)
            status = shown.pop("status", 200)
            about = {
                "name": name,
                "title": title,
                "interval_s": interval_s,
                "events_url": live_url(subscription(asked)),
            }
            about["part"] = f"{name}.live.html"
            template = "live.html" if is_live_update(visit) else f"{name}.html"
            return Response(await self._render(template, viewer, **{**about, **shown}), status=status)

        return self._public_route("GET", path, asks, via)

    def _form_route(self, path: str, asks: type[Command], act: HandleForm, *, for_readers: bool = False) -> Route:
        """A form of a page: whoever sends it has a session and its secret, and may change things."""

        async def via(site: App[Services], visit: RequestContext, asked: Any) -> Response | ApiError:
            viewer = find_viewer(site, visit, self.sessions)
            if viewer is None:
                raise api_error("unauthorized", "Nobody is signed in here, or no more. Sign in, then do it again.")
            viewer.check_form(asked.csrf)
            if not for_readers and not viewer.may_change:
                check_read_only(route)
            return await act(viewer, asked)

        route = self._public_route("POST", path, asks, via)
        return route

    async def _render(self, template: str, viewer: Viewer | None, **shown: Any) -> RawBody:
        """A page, made in a thread: a long list takes some ms, in which the loop has others to serve."""
        session = None if viewer is None else viewer.session
        return await asyncio.to_thread(
            self._renderer.page,
            template,
            viewer=viewer,
            flash="" if session is None or template in WITHOUT_FLASH else session.take_flash(),
            **{
                "page_url": "" if viewer is None else request_target(viewer.visit),
                "now": viewer.now if viewer else 0,
                **shown,
            },
        )

    def is_signed_in(self, visit: RequestContext) -> bool:
        """Whether somebody has signed in there. Where a token is sent, it is the token that is judged."""
        return AUTHORIZATION not in visit.head.headers and self.sessions.find(session_cookie(visit)) is not None

    def error_page(self, visit: RequestContext, refusal: ApiError) -> RawBody:
        """A refusal as a page: what is wrong, and a way on."""
        title = "Not found" if refusal.status == 404 else "Not done"
        return self._renderer.page(
            "error.html", viewer=None, flash="", refusal=refusal, page_url="", now=0, title=title, name="error"
        )

    # -- files --------------------------------------------------------------------------------------------------------

    async def _static(self, site: App[Services], visit: RequestContext, asked: StaticFileQuery) -> Response | ApiError:
        text = self._assets.text(asked.name, asked.v)
        return ApiError("not_found", "There is no such file.") if text is None else Response(text)

    async def _docs(self, document: str, site: App[Services], visit: RequestContext, asked: NoFields) -> Response:
        """It shows what GET `document` gives to everybody, so it wants no session either, and no token."""
        viewer = None if AUTHORIZATION in visit.head.headers else find_viewer(site, visit, self.sessions)
        return Response(await self._render("docs.html", viewer, title="API", name="docs", document=document))

    async def _live(self, site: App[Services], visit: RequestContext, asked: Subscription) -> Response | StreamResponse:
        return await live_stream(site, visit, asked, lambda: find_viewer(site, visit, self.sessions))

    async def _chart(self, site: App[Services], visit: RequestContext, asked: NoFields) -> Response:
        viewer = find_viewer(site, visit, self.sessions)
        if viewer is None:
            raise api_error("unauthorized", "Nobody is signed in here.")
        return Response(self._recorder.chart(viewer.now))

    async def _artifact(
        self, site: App[Services], visit: RequestContext, asked: ArtifactRequest
    ) -> Response | ApiError | StreamResponse:
        """The job's stored result: the API's call, for who has signed in."""
        viewer = find_viewer(site, visit, self.sessions)
        if viewer is None:
            return redirect_to_sign_in(visit)
        return await send_artifact(site, visit, asked, viewer.name)

    async def _external_link(self, site: App[Services], visit: RequestContext, asked: ArtifactRequest) -> Response:
        """The way out to where a worker says that its result is."""
        viewer = find_viewer(site, visit, self.sessions)
        if viewer is None:
            return redirect_to_sign_in(visit)
        url = await pages.external_url(viewer, asked)
        text = await self._render(
            "external_link.html", viewer, job_id=asked.id, url=url, style=urls.EXTERNAL_LINK_STYLE
        )
        more = {
            "Content-Security-Policy": urls.EXTERNAL_LINK_POLICY,
            "Referrer-Policy": "no-referrer",
            "X-Frame-Options": "DENY",
        }
        return Response(replace(text, headers=more))

    # -- actions -------------------------------------------------------------------------------------------------------

    async def _run_action(self, viewer: Viewer, asked: JobActionForm) -> Response | ApiError:
        """What was confirmed, if the job is still what the operator has seen."""
        action, job_id = JOB_ACTIONS[asked.verb], asked.id
        looked = await viewer.ask(Get(id=job_id))
        if isinstance(looked, ApiError):
            return looked
        job: JobView = looked.data
        chosen = ActionTarget(job_id, asked.reason.strip() or None, visible_lock_id(job), asked.result)
        # Judged in the command itself: between this look and the action others get their turn, too.
        done = await viewer.ask(action.make_command(chosen), expected=asked.seen)
        if isinstance(done, ApiError):
            return await self._job_page_with_error(viewer, job_id, done)
        if action.verb == "delete":
            return redirect_with_flash(viewer, "/jobs", f"Job {job_id} was deleted.")
        return redirect_with_flash(
            viewer, job_url(job_id), f"{action.label}: done. {job.status} \u2192 {action.to or job.status}"
        )

    async def _job_page_with_error(self, viewer: Viewer, job_id: str, refusal: ApiError) -> Response | ApiError:
        """The job's page with what the actor said no to."""
        viewer.app.error_counts[refusal.code] += 1
        try:
            shown = await pages.job(viewer, job_id)
        except ApiException as no:  # it is gone
            return no.error
        about = {"name": "job", "title": "Job", "interval_s": 2, "part": "job.live.html"}
        about["page_url"] = job_url(job_id)
        about["events_url"] = live_url(Subscription(job_id=job_id))
        return Response(
            await self._render("job.html", viewer, **shown, **about, refusal=refusal), status=refusal.status
        )
