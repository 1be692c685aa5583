"""Define the routes of the dashboard, and what pages, forms and error pages have in common."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Any, Final

from msgspec import Meta, Struct
from msgspec.structs import replace

from jobd.api.downloads import send_artifact
from jobd.api.operator_actions import step_down
from jobd.api.services import Services
from jobd.dashboard import (
    cluster_page,
    maintenance,
    pages,
    plan_pages,
    schedule_pages,
    urls,
    webhook_pages,
    worker_pages,
)
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
from jobd.dashboard.pages import PageData
from jobd.dashboard.rendering import HEADERS, HTML, TEMPLATES, Renderer, redirect
from jobd.dashboard.sessions import Sessions
from jobd.dashboard.sign_in import SignInForm, SignInPages, SignInQuery, redirect_to_sign_in
from jobd.dashboard.urls import job_url
from jobd.http.auth import Authenticator
from jobd.http.http_app import HttpApp, check_read_only
from jobd.http.request import RequestContext
from jobd.http.response import RawBody
from jobd.http.routing import Route
from jobd.model.api_call import EVENT_STREAM
from jobd.model.commands import Command, Get, GetSchedule, JobCommand, PlanCommand, WhyQueue
from jobd.model.errors import ApiError, api_error, checked
from jobd.model.fields import Text
from jobd.model.requests import ArtifactRequest, NoFields
from jobd.model.responses import ClusterView, JobView, Response

CLUSTER: Final = "/cluster"
WITHOUT_FLASH: Final = ("live.html", "docs.html")  # the flash message is for the next full page

LoadPage = Callable[[Viewer, Any], Awaitable[PageData]]
HandleForm = Callable[[Viewer, Any], Awaitable[Response]]


class StaticFileQuery(Command, frozen=True, kw_only=True):
    name: str
    v: str = ""


class JobActionForm(JobCommand, frozen=True, kw_only=True):
    verb: Verb
    seen: Annotated[str, Meta(max_length=60)]
    reason: Text = ""
    result: Annotated[int, Meta(ge=1)] | None = None
    payload: str = ""
    csrf: str = ""


class PageSpec(Struct, frozen=True):
    """A page for signed-in viewers. `name` is that of its template (else base.html is used), `load` returns its data.

    The data may have a `status`, and with `reload` the browser loads the whole page instead of its live region.

    Its live region, if it has one, updates on the events of `subscription` (by default all events), or every
    `interval_s` seconds without them (0: never). `changes`: the page leads to a change, so read-only viewers get 403.
    `redirect_to` may return another URL. `on_standby`: a standby of a cluster serves it too. Without `has_stream`, the
    page is always polled.
    """

    path: str
    query: type[Command]
    name: str
    title: str
    load: LoadPage
    interval_s: int = 2
    changes: bool = False
    redirect_to: Callable[[Any], str | None] | None = None
    subscription: Callable[[Any], Subscription] | None = None
    on_standby: bool = False
    has_stream: bool = True


PAGES: Final = (
    PageSpec("/", NoFields, "overview", "Overview", pages.overview, on_standby=True),
    PageSpec("/queues", pages.QueuesPageQuery, "queues", "Queues", pages.queues),
    PageSpec("/queues/{name}", WhyQueue, "queue", "Queues", pages.queue, interval_s=5),
    PageSpec(
        "/jobs", JobsPageQuery, "jobs", "Jobs", pages.jobs,
        interval_s=5, redirect_to=job_redirect, subscription=jobs_subscription,
    ),
    PageSpec("/plans/{plan_id}", PlanCommand, "plan", "Plan", plan_pages.plan_page),
    PageSpec("/failures", NoFields, "failures", "Failures", pages.failures),
    PageSpec("/workers", pages.WorkersPageQuery, "workers", "Workers", pages.workers),
    PageSpec(
        "/workers/take-back", maintenance.TakeBackQuery, "take_back", "Workers", maintenance.confirm_take_back,
        changes=True,
    ),
    PageSpec("/workers/quiet", worker_pages.QuietQuery, "quiet", "Workers", worker_pages.confirm_quiet, changes=True),
    PageSpec("/cleanup", NoFields, "cleanup", "Cleanup", pages.cleanup),
    PageSpec(
        "/cleanup/confirm", maintenance.CleanupConfirmQuery, "cleanup_confirm", "Cleanup", maintenance.confirm_cleanup,
        changes=True,
    ),
    PageSpec("/alerts", NoFields, "alerts", "Alerts", pages.alerts, interval_s=5),
    PageSpec(
        "/schedules", schedule_pages.SchedulesPageQuery, "schedules", "Schedules", schedule_pages.schedule_list,
        interval_s=5,
    ),
    PageSpec("/schedules/{id}", GetSchedule, "schedule", "Schedule", schedule_pages.schedule_detail, interval_s=5),
    PageSpec(
        "/schedules/{id}/change", schedule_pages.ChangeScheduleQuery, "schedule_change", "Schedule",
        schedule_pages.confirm_change, changes=True,
    ),
    PageSpec("/webhooks", NoFields, "webhooks", "Webhooks", webhook_pages.webhook_list, interval_s=5),
    PageSpec(
        "/webhooks/{name}", webhook_pages.WebhookPageQuery, "webhook", "Webhook", webhook_pages.webhook_detail,
        interval_s=5,
    ),
    PageSpec(
        "/webhooks/{name}/resend-dead-lettered", webhook_pages.ResendDeadLetteredQuery, "webhook_resend",
        "Resend dead-lettered messages", webhook_pages.confirm_resend, changes=True,
    ),
    PageSpec(
        CLUSTER, cluster_page.ClusterPageQuery, "cluster", "Cluster", cluster_page.cluster_page,
        on_standby=True, has_stream=False,
    ),
    PageSpec("/cluster/step-down", NoFields, "step_down", "Cluster", cluster_page.confirm_step_down, changes=True),
    PageSpec("/audit", pages.AuditPageQuery, "audit", "Audit", pages.audit, interval_s=5),
    PageSpec("/clock", NoFields, "clock", "Clock", maintenance.confirm_clock),
)  # fmt: skip

JOB_PAGE: Final = PageSpec(
    "/jobs/{id}", JobCommand, "job", "Job", pages.open_job, subscription=lambda query: Subscription(job_id=query.id)
)

FORMS: Final[tuple[tuple[str, type[Command], HandleForm], ...]] = (
    ("/plans", plan_pages.PlanForm, plan_pages.create_plan),
    ("/plans/{plan_id}/apply", plan_pages.ApplyForm, plan_pages.apply_plan),
    ("/plans/{plan_id}/next", plan_pages.PlanIdForm, plan_pages.create_next_plan),
    ("/queues/pause", maintenance.QueueForm, maintenance.pause_queue),
    ("/queues/resume", maintenance.QueueForm, maintenance.resume_queue),
    ("/queues/{name}/pause", maintenance.QueueForm, maintenance.pause_queue),  # for programs, like the next one
    ("/queues/{name}/resume", maintenance.QueueForm, maintenance.resume_queue),
    ("/workers/take-back", maintenance.TakeBackForm, maintenance.take_back),
    ("/workers/quiet", worker_pages.QuietForm, worker_pages.change_quiet),
    ("/schedules/{id}/change", schedule_pages.ChangeScheduleForm, schedule_pages.change_schedule),
    ("/cleanup/run", ReasonForm, maintenance.run_cleanup),
    ("/cleanup/recover", ReasonForm, maintenance.recover_stuck),
    ("/clock/accept", ReasonForm, maintenance.accept_clock),
    ("/webhooks/{name}/test", webhook_pages.TestWebhookForm, webhook_pages.send_test),
    ("/webhooks/{name}/resend", webhook_pages.ResendForm, webhook_pages.resend),
    ("/webhooks/{name}/resend-dead-lettered", webhook_pages.ResendDeadLetteredForm, webhook_pages.resend_dead_lettered),
)


class Dashboard:
    """The pages of the admin listener. Reads static files: construct it off the event loop, and `warm` it later."""

    def __init__(
        self,
        authenticator: Authenticator,
        *,
        cluster_view: Callable[[], ClusterView] | None = None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.sessions = Sessions(authenticator.permission_of, clock_s)
        self._assets = Assets()
        self._renderer = Renderer(self._assets)
        self._cluster_view = cluster_view or (lambda: ClusterView(role="single"))
        self._sign_in_pages = SignInPages(self.sessions, self._render, clock_s)

    async def warm(self) -> None:
        """Compile the templates before they are needed."""
        await self._renderer.warm()

    def routes(self) -> tuple[Route, ...]:
        form, public, sign_in = self._form_route, self._public_route, self._sign_in_pages
        return (
            *map(self._page_route, PAGES),
            *(form(path, fields, submit) for path, fields, submit in FORMS),
            *self._job_routes("/jobs/{id}"),
            *self._job_routes("/job"),  # for ids that a path cannot hold
            public("GET", "/sign-in", SignInQuery, sign_in.page, on_standby=True),
            public("POST", "/sign-in", SignInForm, sign_in.sign_in, on_standby=True),
            form("/sign-out", Form, sign_in.sign_out, for_read_only=True, on_standby=True),
            form("/cluster/step-down", cluster_page.StepDownForm, self._step_down),
            public("GET", "/static/{name}", StaticFileQuery, self._static, on_standby=True),
            public("GET", "/docs", NoFields, partial(self._docs, "/openapi.json")),
            public("GET", "/docs/worker", NoFields, partial(self._docs, "/docs/worker.json")),
            _data_route("/live", Subscription, self._live, content_type=EVENT_STREAM),
            _data_route("/chart.json", NoFields, self._chart),
        )

    def _job_routes(self, path: str) -> tuple[Route, ...]:
        page, form, public = self._page_route, self._form_route, self._public_route
        confirm = PageSpec(f"{path}/confirm", pages.ConfirmPageQuery, "confirm", "Confirm", pages.confirm, changes=True)
        return (
            page(replace(JOB_PAGE, path=path)),
            page(confirm),
            form(f"{path}/do", JobActionForm, self._run_action),
            public("GET", f"{path}/artifact", ArtifactRequest, self._artifact),
            public("GET", f"{path}/external-link", ArtifactRequest, self._external_link),
        )

    # -- kinds of routes ----------------------------------------------------------------------------------------------

    def _public_route(
        self, method: str, path: str, request: type[Command], handler: Any, *, on_standby: bool = False
    ) -> Route:
        body: Any = "json" if method == "GET" else "form"
        return Route(
            method=method,
            path=path,
            request=request,
            response=bytes,
            auth="anyone",
            handler=handler,
            body=body,
            content_type=HTML,
            on_standby=on_standby,
            render_error=self.error_page,
        )

    def _page_route(self, spec: PageSpec) -> Route:
        has_live_region = (TEMPLATES / f"{spec.name}.live.html").is_file()
        full_page = f"{spec.name}.html" if (TEMPLATES / f"{spec.name}.html").is_file() else "base.html"

        async def handle(app: HttpApp[Services], context: RequestContext, query: Any) -> Response:
            viewer = find_viewer(app, context, self.sessions)
            if viewer is None:
                return redirect_to_sign_in(context)
            if spec.changes and not viewer.may_change:
                raise api_error(
                    "forbidden", "This session is read-only. To make changes, sign in with the admin token."
                )
            if spec.path != CLUSTER and self._cluster_view().role == "standby":
                return Response(redirect(CLUSTER), status=303)
            if spec.redirect_to is not None and (url := spec.redirect_to(query)) is not None:
                return Response(redirect(url), status=303)
            subscription = Subscription() if spec.subscription is None else spec.subscription(query)
            data = await spec.load(viewer, query)
            status = data.pop("status", 200)
            if data.pop("reload", False):
                return Response(RawBody(HTML, b"", {**HEADERS, "HX-Refresh": "true"}))
            data |= pages.header(viewer)
            page = _page_data(spec, subscription)
            template = "live.html" if has_live_region and is_live_update(context) else full_page
            return Response(await self._render(template, viewer, **{**page, **data}), status=status)

        return self._public_route("GET", spec.path, spec.query, handle, on_standby=spec.on_standby)

    def _form_route(
        self,
        path: str,
        form: type[Command],
        submit: HandleForm,
        *,
        for_read_only: bool = False,
        on_standby: bool = False,
    ) -> Route:
        """Return the route of a form. It needs a session with its CSRF token, or a token, with full access."""

        async def handle(app: HttpApp[Services], context: RequestContext, query: Any) -> Response:
            viewer = find_viewer(app, context, self.sessions)
            if viewer is None:
                raise api_error(
                    "unauthorized", "You are not signed in, or your session has ended. Sign in and try again."
                )
            viewer.check_form(query.csrf)
            if not for_read_only and not viewer.may_change:
                check_read_only(route)
            return await submit(viewer, query)

        route = self._public_route("POST", path, form, handle, on_standby=on_standby)
        return route

    async def _render(self, template: str, viewer: Viewer | None, **data: Any) -> RawBody:
        """Render a page in a thread: a long list takes some milliseconds."""
        session = None if viewer is None else viewer.session
        return await asyncio.to_thread(
            self._renderer.page,
            template,
            viewer=viewer,
            flash="" if session is None or template in WITHOUT_FLASH else session.take_flash(),
            **{
                "page_url": "" if viewer is None else request_target(viewer.context),
                "now": viewer.now if viewer else 0,
                "cluster_role": self._cluster_view().role,
                **data,
            },
        )

    def is_signed_in(self, context: RequestContext) -> bool:
        """Return whether the request has a valid session. A token in the request takes precedence over it."""
        return AUTHORIZATION not in context.headers and self.sessions.find(session_cookie(context)) is not None

    def error_page(self, context: RequestContext, error: ApiError) -> RawBody:
        title = "Not found" if error.status == 404 else "Error"
        return self._renderer.page(
            "error.html",
            viewer=None,
            flash="",
            api_error=error,
            page_url="",
            now=0,
            title=title,
            name="error",
            cluster_role=self._cluster_view().role,
        )

    # -- files --------------------------------------------------------------------------------------------------------

    async def _static(
        self, app: HttpApp[Services], context: RequestContext, query: StaticFileQuery
    ) -> Response | ApiError:
        body = self._assets.body(query.name, query.v)
        return ApiError("not_found", "There is no such file.") if body is None else Response(body)

    async def _docs(self, document: str, app: HttpApp[Services], context: RequestContext, query: NoFields) -> Response:
        """Show the API reference. GET `document` is public, so this page needs no session either."""
        viewer = None if AUTHORIZATION in context.headers else find_viewer(app, context, self.sessions)
        return Response(await self._render("docs.html", viewer, title="API", name="docs", document=document))

    async def _live(self, app: HttpApp[Services], context: RequestContext, query: Subscription) -> Response | None:
        return await live_stream(app, context, query, lambda: find_viewer(app, context, self.sessions))

    async def _chart(self, app: HttpApp[Services], context: RequestContext, query: NoFields) -> Response:
        viewer = find_viewer(app, context, self.sessions)
        if viewer is None:
            raise api_error("unauthorized", "Sign in first.")
        return Response(app.services.timeseries.chart(viewer.now))

    async def _artifact(
        self, app: HttpApp[Services], context: RequestContext, query: ArtifactRequest
    ) -> Response | ApiError | None:
        viewer = find_viewer(app, context, self.sessions)
        if viewer is None:
            return redirect_to_sign_in(context)
        return await send_artifact(app, context, query, viewer.name)

    async def _external_link(self, app: HttpApp[Services], context: RequestContext, query: ArtifactRequest) -> Response:
        """Show a page with a link to the download URL that a worker reported."""
        viewer = find_viewer(app, context, self.sessions)
        if viewer is None:
            return redirect_to_sign_in(context)
        url = await pages.external_url(viewer, query)
        body = await self._render(
            "external_link.html", viewer, job_id=query.id, url=url, style=urls.EXTERNAL_LINK_STYLE
        )
        headers = {
            "Content-Security-Policy": urls.EXTERNAL_LINK_POLICY,
            "Referrer-Policy": "no-referrer",
            "X-Frame-Options": "DENY",
        }
        return Response(replace(body, headers=headers))

    # -- actions -------------------------------------------------------------------------------------------------------

    async def _run_action(self, viewer: Viewer, form: JobActionForm) -> Response:
        action, job_id = JOB_ACTIONS[form.verb], form.id
        job: JobView = checked(await viewer.ask(Get(id=job_id))).data
        target = ActionTarget(job_id, form.reason.strip() or None, visible_lock_id(job), form.result, form.payload)
        # The actor checks the version when it applies the command: the job may change before that.
        result = await viewer.ask(action.make_command(target), expected=form.seen)
        if isinstance(result, ApiError):
            return await self._job_page_with_error(viewer, job_id, result)
        if action.verb == "delete":
            return redirect_with_flash(viewer, "/jobs", f"Job {job_id} was deleted.")
        if action.verb == "copy":
            return redirect_with_flash(viewer, job_url(result.data.id), f"This job was created as a copy of {job_id}.")
        return redirect_with_flash(
            viewer,
            job_url(job_id),
            f"{action.label}: done. {job.status} \u2192 {action.command.leads_to or job.status}",
        )

    async def _step_down(self, viewer: Viewer, form: cluster_page.StepDownForm) -> Response:
        """Make this node step down. Its process ends too, so the page does not redirect to it."""
        view = await step_down(viewer.app, viewer.context.operator, form.reason_or_none, force=bool(form.force))
        return Response(await self._render("stepped_down.html", viewer, title="Cluster", name="cluster", cluster=view))

    async def _job_page_with_error(self, viewer: Viewer, job_id: str, error: ApiError) -> Response:
        """Show the job's page with the error of an action, unless the job was deleted."""
        viewer.app.error_counts[error.code] += 1
        data = {**await pages.job(viewer, job_id), **pages.header(viewer)}
        page = {**_page_data(JOB_PAGE, Subscription(job_id=job_id)), "page_url": job_url(job_id), "api_error": error}
        return Response(await self._render("base.html", viewer, **data, **page), status=error.status)


def _data_route(path: str, query: type[Command], handler: Any, **options: Any) -> Route:
    """Return a route for the scripts of the pages. Its handler checks the session."""
    return Route(method="GET", path=path, request=query, response=bytes, auth="anyone", handler=handler, **options)


def _page_data(spec: PageSpec, subscription: Subscription) -> PageData:
    """Return what the templates of a page need in addition to its own data."""
    return {
        "name": spec.name,
        "title": spec.title,
        "interval_s": spec.interval_s,
        "events_url": live_url(subscription) if spec.has_stream else "",
        "part": f"{spec.name}.live.html",
    }
