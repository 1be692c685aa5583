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

from jobd.api.downloads import Artifact, give
from jobd.api.events import EVENT_STREAM
from jobd.api.services import Rooms
from jobd.dashboard import maintenance, pages, plans, urls, webhooks
from jobd.dashboard.assets import Assets
from jobd.dashboard.context import (
    AUTHORIZATION,
    Form,
    Guest,
    ReasonForm,
    cookie,
    go_on,
    guest_of,
    is_renewal,
    target_of,
)
from jobd.dashboard.filters import JobsPage, job_wanted, news_of_jobs
from jobd.dashboard.job_actions import DEEDS, Chosen, Verb, lock_id_of
from jobd.dashboard.live_updates import Live, news_at, stream
from jobd.dashboard.rendering import HTML, Painter, go_to
from jobd.dashboard.sessions import Sessions
from jobd.dashboard.sign_in import Entrance, SignIn, SignInPage, to_sign_in
from jobd.dashboard.urls import job_place
from jobd.http.app import Nothing, Web, check_reader
from jobd.http.auth import Gate
from jobd.http.request import Visit
from jobd.http.response import Text
from jobd.http.routing import Route
from jobd.model.commands import Command, Get, JobCommand, PlanCommand
from jobd.model.errors import ApiError, ApiException, api_error
from jobd.model.job import Text as Words
from jobd.model.responses import JobView, Response
from jobd.monitoring.timeseries import Recorder

UNTOLD: Final = ("live.html", "docs.html")  # what was done is told by the page that comes next, which is neither

Shown = dict[str, Any]
Look = Callable[[Guest, Any], Awaitable[Shown]]
Act = Callable[[Guest, Any], Awaitable[Response | ApiError]]


class Asset(Command, frozen=True, kw_only=True):
    name: str
    v: str = ""


class DeedForm(JobCommand, frozen=True, kw_only=True):
    verb: Verb
    seen: Annotated[str, Meta(max_length=60)]
    reason: Words = ""
    result: Annotated[int, Meta(ge=1)] | None = None
    csrf: str = ""


class Dashboard:
    """The room behind one gate. Reads static files: make it off the loop, and `warm` it later."""

    def __init__(self, gate: Gate, recorder: Recorder, *, clock_s: Callable[[], float] = time.monotonic) -> None:
        self.sessions = Sessions(gate.access_of, clock_s)
        self._assets = Assets()
        self._painter = Painter(self._assets)
        self._recorder = recorder
        self._entrance = Entrance(self.sessions, self._paint, clock_s)

    async def warm(self) -> None:
        """Compile the templates, before somebody waits for them."""
        await self._painter.warm()

    def routes(self) -> tuple[Route, ...]:
        """Every page, as data."""
        recorder = self._recorder
        return (
            self._open("GET", "/sign-in", SignInPage, self._entrance.page),
            self._open("POST", "/sign-in", SignIn, self._entrance.sign_in),
            self._open("GET", "/static/{name}", Asset, self._static),
            self._open("GET", "/docs", Nothing, partial(self._docs, "/openapi.json")),
            self._open("GET", "/docs/worker", Nothing, partial(self._docs, "/docs/worker.json")),
            self._form("/sign-out", Form, self._entrance.sign_out, for_readers=True),
            self._page("/", Nothing, "overview", "Overview", lambda guest, _: pages.overview(guest, recorder)),
            Route(method="GET", path="/live", asks=Live, gives=bytes, who="anyone", via=self._live, sends=EVENT_STREAM),
            Route(method="GET", path="/chart.json", asks=Nothing, gives=bytes, who="anyone", via=self._chart),
            self._page(
                "/jobs",
                JobsPage,
                "jobs",
                "Jobs",
                pages.jobs,
                every_s=5,
                leads=job_wanted,
                news=news_of_jobs,
            ),
            *self._of_job("/jobs/{id}"),
            *self._of_job("/job"),  # with the id in the query, for those that a path cannot name (places.py)
            self._form("/plans", plans.PlanForm, plans.make),
            self._page("/plans/{plan_id}", PlanCommand, "plan", "Plan", plans.show, every_s=0),
            self._form("/plans/{plan_id}/apply", plans.ApplyForm, plans.apply),
            self._form("/plans/{plan_id}/next", plans.NextForm, plans.make_next),
            self._page("/failures", Nothing, "failures", "Failures", lambda guest, _: pages.failures(guest)),
            self._page(
                "/queues",
                pages.QueuesPage,
                "queues",
                "Queues",
                lambda guest, asked: pages.queues(guest, recorder, asked),
            ),
            self._form("/queues/pause", maintenance.QueueForm, maintenance.pause),
            self._form("/queues/resume", maintenance.QueueForm, maintenance.resume),
            self._form("/queues/{name}/pause", maintenance.QueueForm, maintenance.pause),  # as programs ask for it
            self._form("/queues/{name}/resume", maintenance.QueueForm, maintenance.resume),
            self._page("/workers", pages.WorkersPage, "workers", "Workers", pages.workers),
            self._page(
                "/workers/take-back",
                maintenance.TakeBackPage,
                "take_back",
                "Workers",
                maintenance.confirm_take_back,
                every_s=0,
                changes=True,
            ),
            self._form("/workers/take-back", maintenance.TakeBackForm, maintenance.take_back),
            self._page("/cleanup", Nothing, "cleanup", "Cleanup", lambda guest, _: pages.cleanup(guest)),
            self._page(
                "/cleanup/confirm",
                maintenance.ChorePage,
                "cleanup_confirm",
                "Cleanup",
                maintenance.confirm,
                every_s=0,
                changes=True,
            ),
            self._form("/cleanup/run", ReasonForm, maintenance.run_cleanup),
            self._form("/cleanup/recover", ReasonForm, maintenance.recover),
            self._page("/alerts", Nothing, "alerts", "Alerts", lambda guest, _: pages.alerts(guest), every_s=5),
            self._page("/webhooks", Nothing, "webhooks", "Webhooks", webhooks.every, every_s=5),
            self._page("/webhooks/{name}", webhooks.WebhookPage, "webhook", "Webhook", webhooks.one, every_s=5),
            self._form("/webhooks/{name}/test", webhooks.TestForm, webhooks.test),
            self._page(
                "/webhooks/{name}/again",
                webhooks.AgainPage,
                "webhook_again",
                "Send again",
                webhooks.again,
                every_s=0,
                changes=True,
            ),
            self._form("/webhooks/{name}/resend-given-up", webhooks.AgainForm, webhooks.resend_all),
            self._form("/webhooks/{name}/resend", webhooks.ResendForm, webhooks.resend),
            self._page("/audit", pages.AuditPage, "audit", "Audit", pages.audit, every_s=5),
            self._page(
                "/clock", Nothing, "clock", "Clock", lambda guest, _: maintenance.confirm_clock(guest), every_s=0
            ),
            self._form("/clock/accept", ReasonForm, maintenance.accept_clock),
        )

    def _of_job(self, place: str) -> tuple[Route, ...]:
        """The pages of one job."""
        return (
            self._page(
                place,
                pages.OneJob,
                "job",
                "Job",
                pages.open_job,
                news=lambda asked: Live(job_id=asked.id),
            ),
            self._page(f"{place}/confirm", pages.ConfirmPage, "confirm", "Confirm", pages.confirm, changes=True),
            self._form(f"{place}/do", DeedForm, self._do),
            self._open("GET", f"{place}/artifact", Artifact, self._artifact),
            self._open("GET", f"{place}/elsewhere", Artifact, self._elsewhere),
        )

    # -- kinds of routes ----------------------------------------------------------------------------------------------

    def _open(self, method: str, path: str, asks: type[Command], via: Any) -> Route:
        """Something that wants no session."""
        reads: Any = "json" if method == "GET" else "form"
        return Route(
            method=method,
            path=path,
            asks=asks,
            gives=bytes,
            who="anyone",
            via=via,
            reads=reads,
            sends=HTML,
            shows=self.refusal_page,
        )

    def _page(
        self,
        path: str,
        asks: type[Command],
        name: str,
        title: str,
        look: Look,
        *,
        every_s: int = 2,
        changes: bool = False,
        leads: Callable[[Any], str | None] = lambda asked: None,
        news: Callable[[Any], Live] = lambda asked: Live(),
    ) -> Route:
        """A page for who has signed in. It renews its living part where there is `news`, or every `every_s` seconds
        where it hears none. `leads` sends on elsewhere.

        `changes`: it leads to a change, so it is not for who may only look.
        """

        async def via(site: Web[Rooms], visit: Visit, asked: Any) -> Response:
            guest = guest_of(site, visit, self.sessions)
            if guest is None:
                return to_sign_in(visit)
            if changes and not guest.may_change:
                raise api_error(
                    "forbidden", "This session may only look. To change something sign in with the admin token."
                )
            if (place := leads(asked)) is not None:
                return Response(go_to(place), status=303)
            shown = await look(guest, asked)
            status = shown.pop("status", 200)
            about = {"name": name, "title": title, "every_s": every_s, "news": news_at(news(asked))}
            about["part"] = f"{name}.live.html"
            template = "live.html" if is_renewal(visit) else f"{name}.html"
            return Response(await self._paint(template, guest, **{**about, **shown}), status=status)

        return self._open("GET", path, asks, via)

    def _form(self, path: str, asks: type[Command], act: Act, *, for_readers: bool = False) -> Route:
        """A form of a page: whoever sends it has a session and its secret, and may change things."""

        async def via(site: Web[Rooms], visit: Visit, asked: Any) -> Response | ApiError:
            guest = guest_of(site, visit, self.sessions)
            if guest is None:
                raise api_error("unauthorized", "Nobody is signed in here, or no more. Sign in, then do it again.")
            guest.check_form(asked.csrf)
            if not for_readers and not guest.may_change:
                check_reader(route)
            return await act(guest, asked)

        route = self._open("POST", path, asks, via)
        return route

    async def _paint(self, template: str, guest: Guest | None, **shown: Any) -> Text:
        """A page, made in a thread: a long list takes some ms, in which the loop has others to serve."""
        session = None if guest is None else guest.session
        return await asyncio.to_thread(
            self._painter.page,
            template,
            guest=guest,
            told=None if session is None or template in UNTOLD else session.take_told(),
            **{"here": "" if guest is None else target_of(guest.visit), "now": guest.now if guest else 0, **shown},
        )

    def knows(self, visit: Visit) -> bool:
        """Whether somebody has signed in there. Where a token is sent, it is the token that is judged."""
        return AUTHORIZATION not in visit.head.headers and self.sessions.find(cookie(visit)) is not None

    def refusal_page(self, visit: Visit, refusal: ApiError) -> Text:
        """A refusal as a page: what is wrong, and a way on."""
        title = "Not found" if refusal.status == 404 else "Not done"
        return self._painter.page(
            "refused.html", guest=None, told=None, refusal=refusal, here="", now=0, title=title, name="refused"
        )

    # -- files --------------------------------------------------------------------------------------------------------

    async def _static(self, site: Web[Rooms], visit: Visit, asked: Asset) -> Response | ApiError:
        text = self._assets.text(asked.name, asked.v)
        return ApiError("not_found", "There is no such file.") if text is None else Response(text)

    async def _docs(self, document: str, site: Web[Rooms], visit: Visit, asked: Nothing) -> Response:
        """It shows what GET `document` gives to everybody, so it wants no session either, and no token."""
        guest = None if AUTHORIZATION in visit.head.headers else guest_of(site, visit, self.sessions)
        return Response(await self._paint("docs.html", guest, title="API", name="docs", document=document))

    async def _live(self, site: Web[Rooms], visit: Visit, asked: Live) -> Response | StreamResponse:
        return await stream(site, visit, asked, lambda: guest_of(site, visit, self.sessions))

    async def _chart(self, site: Web[Rooms], visit: Visit, asked: Nothing) -> Response:
        guest = guest_of(site, visit, self.sessions)
        if guest is None:
            raise api_error("unauthorized", "Nobody is signed in here.")
        return Response(self._recorder.chart(guest.now))

    async def _artifact(self, site: Web[Rooms], visit: Visit, asked: Artifact) -> Response | ApiError | StreamResponse:
        """The job's stored result: the API's call, for who has signed in."""
        guest = guest_of(site, visit, self.sessions)
        if guest is None:
            return to_sign_in(visit)
        return await give(site, visit, asked, guest.name)

    async def _elsewhere(self, site: Web[Rooms], visit: Visit, asked: Artifact) -> Response:
        """The way out to where a worker says that its result is."""
        guest = guest_of(site, visit, self.sessions)
        if guest is None:
            return to_sign_in(visit)
        url = await pages.elsewhere(guest, asked)
        text = await self._paint("elsewhere.html", guest, job_id=asked.id, url=url, style=urls.STYLE)
        more = {"Content-Security-Policy": urls.LEAVING, "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}
        return Response(replace(text, more=more))

    # -- deeds --------------------------------------------------------------------------------------------------------

    async def _do(self, guest: Guest, asked: DeedForm) -> Response | ApiError:
        """What was confirmed, if the job is still what the operator has seen."""
        deed, job_id = DEEDS[asked.verb], asked.id
        looked = await guest.ask(Get(id=job_id))
        if isinstance(looked, ApiError):
            return looked
        job: JobView = looked.data
        chosen = Chosen(job_id, asked.reason.strip() or None, lock_id_of(job), asked.result)
        # Judged in the command itself: between this look and the deed others get their turn, too.
        done = await guest.ask(deed.make(chosen), expected=asked.seen)
        if isinstance(done, ApiError):
            return await self._job_refused(guest, job_id, done)
        if deed.verb == "delete":
            return go_on(guest, "/jobs", f"Job {job_id} was deleted.")
        return go_on(guest, job_place(job_id), f"{deed.label}: done. {job.status} \u2192 {deed.to or job.status}")

    async def _job_refused(self, guest: Guest, job_id: str, refusal: ApiError) -> Response | ApiError:
        """The job's page with what the actor said no to."""
        guest.site.refusals[refusal.code] += 1
        try:
            shown = await pages.job(guest, job_id)
        except ApiException as no:  # it is gone
            return no.error
        about = {"name": "job", "title": "Job", "every_s": 2, "part": "job.live.html"}
        about["here"] = job_place(job_id)
        about["news"] = news_at(Live(job_id=job_id))
        return Response(await self._paint("job.html", guest, **shown, **about, refusal=refusal), status=refusal.status)
