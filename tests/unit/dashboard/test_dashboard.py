"""The operators' room through the real listener: who gets in, what each page shows, what a form may do."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import html
import itertools
import json
import os
import re
import shlex
import time
import tomllib
from collections.abc import AsyncIterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from jinja2 import FileSystemLoader
from msgspec import Raw
from msgspec.structs import replace

from jobd.api import admin as admin_api
from jobd.api import worker as worker_api
from jobd.api.services import Services
from jobd.core.state import Book
from jobd.dashboard import filters, live_updates, pages, plans, rendering, sessions
from jobd.dashboard import sign_in as entrance
from jobd.dashboard.assets import STATIC as STATIC
from jobd.dashboard.job_actions import JOB_ACTIONS
from jobd.dashboard.routes import Dashboard
from jobd.engine import history
from jobd.engine.actor import Actor
from jobd.engine.clock import Clock, boot_clock_ms, wall_clock_ms
from jobd.engine.idempotency import Keys
from jobd.http.auth import FORM, Authenticator, Permission, own_names
from jobd.maintenance import plan_builder
from jobd.maintenance.cleanup_pass import CleanupSchedule, MaintenanceContext
from jobd.maintenance.maintainer import Maintainer
from jobd.maintenance.plans import Planner
from jobd.model.commands import ForceFail
from jobd.model.errors import ApiError
from jobd.model.events import Change, Event
from jobd.model.job import LATEST_MS, Policy
from jobd.model.responses import AlertView, DeliveryPage, OldestDue, PreviewView, Recovery
from jobd.model.storage import AuditQuery, JobQuery
from jobd.model.webhooks import MAX_BACKLOG
from jobd.monitoring.failure_groups import FailureGroups
from jobd.monitoring.timeseries import MAX_QUEUES, SLOT_MS, SLOTS, STEP_MS, STEPS, QueueRate, Timeseries
from jobd.storage.artifacts.downloads import Downloads
from jobd.storage.artifacts.filesystem import FileArtifactStore
from tests import ROOT
from tests.browser import vendor
from tests.support.http_harness import (
    DELIVERY,
    TOKEN,
    WEBHOOK,
    FakeClock,
    HttpHarness,
    RawConnection,
    ReceivedResponse,
    request_bytes,
    tls_pair,
    wrong_tokens,
)
from tests.support.memory_storage import MemoryStorage

READER = "reader-token-0123456789abcdef"
AUTH = {"Authorization": f"Bearer {TOKEN}"}
NASTY = "<script>alert('x')</script>\x1b[31m\u202e&\""
PAGES = [
    "/",
    "/jobs",
    "/jobs?status=processing&queue=video",
    "/queues",
    "/workers",
    "/cleanup",
    "/alerts",
    "/audit",
    "/failures",
    "/webhooks",
    "/webhooks/q",
]


class Browser:
    """Keeps its cookie and finds the secret of its forms, as a browser does."""

    def __init__(self, house: HttpHarness) -> None:
        self.house = house
        self.cookie = ""

    async def get(self, target: str, **headers: str) -> ReceivedResponse:
        return await self.house.request("GET", target, headers=self._headers(headers))

    async def post(self, target: str, headers: dict[str, str] | None = None, /, **fields: str) -> ReceivedResponse:
        given = {"Content-Type": FORM, **(headers or {})}
        heard = await self.house.request("POST", target, urlencode(fields), self._headers(given))
        if "set-cookie" in heard.headers:
            self.cookie = heard.headers["set-cookie"].partition(";")[0]
        return heard

    def _headers(self, headers: dict[str, str]) -> dict[str, str]:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return {**given, **({"Cookie": f"theme=x; {self.cookie}"} if self.cookie else {})}

    async def sign_in(self, token: str = TOKEN) -> Browser:
        heard = await self.post("/sign-in", token=token)
        assert (heard.status, heard.headers["location"]) == (303, "/")
        return self

    async def csrf(self) -> str:
        found = re.search(r'name="csrf" value="([^"]+)"', text(await self.get("/")))
        assert found
        return found[1]

    async def looked(self, job_id: str, verb: str, more: str = "") -> dict[str, str]:
        """What the page that confirms a deed will send."""
        page = text(await self.get(f"/jobs/{job_id}/confirm?verb={verb}{more}"))
        fields = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', page.partition("<main")[2]))
        assert fields["verb"] == verb
        return fields

    async def confirmed(self, job_id: str, verb: str, reason: str = "", more: str = "") -> ReceivedResponse:
        """What comes of a deed that is confirmed on its page."""
        return await self.post(f"/jobs/{job_id}/do", **await self.looked(job_id, verb, more), reason=reason)


def text(heard: ReceivedResponse) -> str:
    return heard.body.decode()


class Town:
    """An actor behind a worker door and the admin door with its pages. `now_s` is the clock of the sessions.

    `ahead_ms` is by how much the daemon's clocks are ahead.
    """

    def __init__(self, worker: HttpHarness, admin: HttpHarness, room: Dashboard, disk: MemoryStorage) -> None:
        self.worker = worker
        self.admin = admin
        self.room = room
        self.disk = disk
        self.now_s = 1_000.0
        self.ahead_ms = 0

    async def do(self, target: str, **body: Any) -> Any:
        heard = await self.worker.request("POST", f"/v1/{target}", json.dumps(body))
        assert heard.status < 300, heard.json
        return heard.data

    async def status(self, job_id: str) -> str:
        return str((await self.worker.request("GET", f"/v1/jobs/{job_id}")).data["status"])

    async def browser(self, token: str = TOKEN) -> Browser:
        return await Browser(self.admin).sign_in(token)

    async def held(self, job_id: str = "held") -> str:
        """A job in the hands of a worker; its lock's secret."""
        await self.do("jobs", id=job_id, queue="video", kind="k", payload={"a": 1})
        return str((await self.do(f"jobs/{job_id}/start", worker="w-1"))["lock_id"])

    async def again(self, job_id: str) -> str:
        """The job is taken from its worker and given to another; the secret of the new lock."""
        heard = await self.admin.request(
            "POST", "/admin/job-management/force-reset", json.dumps({"jobId": job_id}), headers=AUTH
        )
        assert heard.status == 200
        return str((await self.do(f"jobs/{job_id}/start", worker="w-2"))["lock_id"])


@pytest.fixture
async def town(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Town]:
    disk = MemoryStorage()
    made: list[Town] = []

    def ahead_ms() -> int:
        return made[0].ahead_ms if made else 0

    clock = Clock(wall=lambda: wall_clock_ms() + ahead_ms(), boot=lambda: boot_clock_ms() + ahead_ms())
    actor = Actor(disk, Book.opened(disk.opened()), Keys([], 100), clock, Policy(), random=os.urandom)
    recorder = Timeseries(clock.moment().now)
    actor.on_commit.append(recorder.record)
    planner, known = Planner(actor, clock), FailureGroups(disk, 1)
    actor.on_commit.append(known.committed)
    await known.run()
    running = asyncio.create_task(actor.run())
    gate = Authenticator("admin", tokens=[TOKEN], read_only_tokens=[READER], hosts=own_names("127.0.0.1"))
    room = await asyncio.to_thread(Dashboard, gate, recorder, clock_s=lambda: made[0].now_s)
    async with contextlib.AsyncExitStack() as stack:
        worker = await stack.enter_async_context(HttpHarness(worker_api.ROUTES, tmp_path, actor=actor))
        routes = (*admin_api.ROUTES, *room.routes(), worker_api.DOCUMENT)
        admin = await stack.enter_async_context(
            HttpHarness(routes, tmp_path, gate=gate, admin=True, actor=actor, pages=room)
        )
        actor.on_commit.append(admin.services.feed.publish)
        numbers = itertools.count(1)
        numbered: Any = SimpleNamespace(
            make=lambda asked, _: planner.make(asked, f"plan-{next(numbers)}"), find=planner.find, apply=planner.apply
        )
        admin.services.planner = numbered
        admin.services.failures = known
        fake_clock: Any = FakeClock(admin.fakes, lambda: clock.moment().now)
        admin.services.clock = fake_clock
        actor.book.quarantined["bad-1"] = "checksum"
        hands: Any = SimpleNamespace(_context=MaintenanceContext(actor, clock, CleanupSchedule()))
        monkeypatch.setattr(admin.services.maintainer, "take_back", partial(Maintainer.take_back, hands))
        made.append(Town(worker, admin, room, disk))
        yield made[0]
        actor.stop_parking()
    actor.stop()
    await running


async def test_all_templates_are_compiled_beforehand_where_there_is_time(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then no page has to wait for one."""
    monkeypatch.setattr("jobd.dashboard.rendering.WARM_PAUSE_S", 0)
    await town.room.warm()
    monkeypatch.setattr(FileSystemLoader, "get_source", None)
    browser = await town.browser()
    for page in ("/", "/jobs", "/queues", "/docs", "/alerts"):
        assert "<main" in text(await browser.get(page))


# -- who gets in -------------------------------------------------------------------------------------------------------


async def test_who_has_not_signed_in_is_led_to_the_sign_in_and_back(town: Town) -> None:
    stranger = Browser(town.admin)
    heard = await stranger.get("/jobs?status=failed&queue=a")
    assert (heard.status, heard.headers["location"]) == (303, "/sign-in?next=%2Fjobs%3Fstatus%3Dfailed%26queue%3Da")
    page = text(await stranger.get(heard.headers["location"]))
    assert 'value="/jobs?status=failed&amp;queue=a"' in page
    heard = await stranger.post("/sign-in", token=TOKEN, next="/jobs?status=failed&queue=a")
    assert (heard.status, heard.headers["location"]) == (303, "/jobs?status=failed&queue=a")
    assert (await stranger.get("/jobs?status=failed&queue=a")).status == 200


@pytest.mark.parametrize(
    "place",
    ["//evil.example", "https://evil.example", "/\\evil.example", "/a\r\nSet-Cookie: x", "/\t/evil.example", "/é", ""],
)
async def test_a_sign_in_leads_nowhere_else(town: Town, place: str) -> None:
    heard = await Browser(town.admin).post("/sign-in", token=TOKEN, next=place)
    assert (heard.status, heard.headers["location"]) == (303, "/")
    page = text(await Browser(town.admin).get(f"/sign-in?next={quote(place)}"))
    assert "evil" not in page


async def test_a_sign_in_leads_back_to_every_address_that_a_browser_writes(town: Town) -> None:
    """Forms leave `*` as it is, and what is typed keeps far more than that."""
    place = "/jobs?q=a*b&kind=!$'(),;@|^`{}[]~:/?%20&status=failed"
    stranger = Browser(town.admin)
    heard = await stranger.get(place)
    page = text(await stranger.get(heard.headers["location"]))
    found = re.search(r'name="next" value="([^"]+)"', page)
    assert found
    assert html.unescape(found[1]) == place
    heard = await stranger.post("/sign-in", token=TOKEN, next=html.unescape(found[1]))
    assert (heard.status, heard.headers["location"]) == (303, place)


async def test_a_session_is_kept_where_no_script_and_no_other_site_gets_at_it(town: Town) -> None:
    heard = await Browser(town.admin).post("/sign-in", token=f" {TOKEN}\n")
    name, value = heard.headers["set-cookie"].split("; ")[0].split("=")
    assert name == f"jobd_{town.admin.port}", "daemons on other ports of a machine have cookies of their own"
    assert len(value) >= 40
    assert set(heard.headers["set-cookie"].split("; ")[1:]) == {
        "Path=/",
        "HttpOnly",
        "SameSite=Strict",
        "Max-Age=43200",
    }
    assert TOKEN not in repr(vars(town.room.sessions))
    assert value not in repr(vars(town.room.sessions))
    behind = {"Origin": "https://localhost", "Host": "localhost"}
    heard = await Browser(town.admin).post("/sign-in", behind, token=TOKEN)
    assert "Secure" in heard.headers["set-cookie"].split("; ")


async def test_behind_a_proxy_that_speaks_tls_calls_are_shown_as_they_have_to_be_sent(town: Town) -> None:
    """A look of a browser tells no Origin, and X-Forwarded-Proto may be anybody's."""
    await town.do("jobs", id="a")
    plain = await town.browser()
    looked = text(await plain.get("/jobs/a", Host="localhost", X_Forwarded_Proto="https"))
    assert "http://localhost/admin/job-management/jobs/a" in looked
    behind = Browser(town.admin)
    await behind.post("/sign-in", {"Origin": "https://localhost", "Host": "localhost"}, token=TOKEN)
    for place in ("/jobs/a", "/jobs/a/confirm?verb=cancel"):
        looked = text(await behind.get(place, Host="localhost"))
        assert "https://localhost/admin/job-management/jobs/a" in looked
        assert "http://localhost" not in looked


async def test_over_tls_the_cookie_goes_nowhere_else(town: Town, tmp_path: Path) -> None:
    server, client = await tls_pair(tmp_path)
    [(_, port)] = await town.admin.listener.open_tcp("127.0.0.1", 0, tls=server)
    line = RawConnection(*await asyncio.open_connection("127.0.0.1", port, ssl=client, server_hostname="localhost"))
    heard = await line.request("POST", "/sign-in", urlencode({"token": TOKEN}), {"Content-Type": FORM})
    assert heard.status == 303
    assert "Secure" in heard.headers["set-cookie"].split("; ")
    await line.close()


async def deeds(town: Town) -> list[tuple[Any, ...]]:
    """Of the audit log, the oldest first: who, what, what came of it, and what it is told of."""
    audit = await town.admin.request("GET", "/admin/job-management/audit", headers=AUTH)
    entries = audit.data["entries"][::-1]
    return [(each["who"], each["what"], each["outcome"], each["job_id"] or each["details"]) for each in entries]


async def test_a_wrong_token_opens_nothing_and_a_right_one_does_whatever_was_sent_before(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "FAILURE_DELAY_S", 0.3)
    browser = Browser(town.admin)
    for number in range(sessions.FREE_FAILURES + 2):
        begun = time.monotonic()
        heard = await browser.post("/sign-in", token="wrong-token-0123456789abcdef", name="eve")
        assert heard.status == 401
        assert "no valid token" in text(heard)
        assert "wrong-token" not in text(heard)
        is_held_back = number >= sessions.FREE_FAILURES
        assert (time.monotonic() - begun > 0.25) == is_held_back, "the answer is what has to wait"
    monkeypatch.setattr(sessions, "FAILURE_DELAY_S", 600.0)
    held = asyncio.create_task(browser.post("/sign-in", token="wrong-token-0123456789abcdef"))
    await asyncio.sleep(0.1)
    await Browser(town.admin).sign_in()
    assert not held.done()
    held.cancel()
    assert (await town.admin.request("GET", "/jobs", headers=AUTH)).status == 200, "programs are not held up"
    assert town.admin.app.error_counts["unauthorized"] == sessions.FREE_FAILURES + 3
    page = text(await (await town.browser()).get("/audit?what=sign-in"))
    assert '<span class="badge bad">unauthorized</span> <span class="dim">10 times</span>' in page
    *wrong, right, _ = await deeds(town)
    assert wrong == [("eve", "sign-in", "unauthorized", {"times": times}) for times in range(1, 11)]  # one row on disk
    assert right == ("admin", "sign-in", "done", {"access": "full"})


async def test_no_wrong_token_signs_in(town: Town) -> None:
    """5,000 of them below the form, and some by it. Time goes on, so that no response is held back."""
    assert [each for each in wrong_tokens(TOKEN) if town.room.sessions.sign_in(each) is not None] == []
    line = await town.admin.connect()
    wrong = wrong_tokens(TOKEN, 500) + wrong_tokens(READER, 0)
    for at in range(0, len(wrong), sessions.FREE_FAILURES):
        given = wrong[at : at + sessions.FREE_FAILURES]
        town.now_s += sessions.FAILURE_WINDOW_S
        forms = [urlencode({"token": each}) for each in given]
        line.send(b"".join(request_bytes("POST", "/sign-in", form, {"Content-Type": FORM}) for form in forms))
        heard = [await line.receive() for _ in given]
        assert [each for each, answer in zip(given, heard, strict=True) if answer.status != 401] == []
        assert not any("set-cookie" in answer.headers for answer in heard)
    assert len(town.room.sessions) == 0
    await Browser(town.admin).sign_in()


async def test_of_wrong_tokens_at_the_same_time_so_many_are_held_back(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "FAILURE_DELAY_S", 600.0)
    monkeypatch.setattr(sessions, "FREE_FAILURES", 0)
    monkeypatch.setattr(entrance, "MAX_DELAYED", 2)
    held = [asyncio.create_task(Browser(town.admin).post("/sign-in", token="wrong")) for _ in range(2)]
    await asyncio.sleep(0.2)
    heard = await Browser(town.admin).post("/sign-in", token="wrong")
    assert (heard.status, heard.headers["retry-after"]) == (429, "600")
    assert "too many wrong ones" in text(heard)
    await Browser(town.admin).sign_in()
    assert not any(each.done() for each in held)
    for each in held:
        each.cancel()


async def test_who_comes_and_goes_and_what_is_taken_along_is_in_the_audit_log(town: Town, tmp_path: Path) -> None:
    """A reader's, too."""
    (tmp_path / "stored").mkdir()
    (tmp_path / "stored" / "result").write_bytes(b"r")
    town.admin.services.downloads = Downloads(FileArtifactStore(str(tmp_path / "stored"), "test"), 2)
    lock_id = await town.held("done")
    await town.do("jobs/done/complete", lock_id=lock_id, storage_key="result")
    for token, name in ((TOKEN, "ann"), (READER, ""), (READER, "rob")):
        browser = Browser(town.admin)
        await browser.post("/sign-in", token=token, name=name)
        csrf = await browser.csrf()
        for _ in range(2):
            assert (await browser.get("/jobs/done/artifact")).status == 200
        await browser.post("/sign-out", csrf=csrf)
    for token, name in ((TOKEN, "prog"), (READER, "")):
        headers = {"Authorization": f"Bearer {token}", "X-Jobd-Operator": name}
        for _ in range(2):
            assert (await town.admin.request("GET", "/admin/job-management/export", headers=headers)).status == 200
        assert (
            await town.admin.request("GET", "/admin/job-management/jobs/done/artifact", headers=headers)
        ).status == 200
        assert (
            await town.admin.request("GET", "/admin/job-management/jobs/none/artifact", headers=headers)
        ).status == 404
    found = await deeds(town)
    kept = {(*each[:3], str(each[3])) for each in found}
    full, read = "{'access': 'full'}", "{'access': 'read'}"
    again = "{'access': 'read', 'times': 2, 'names': ['reader', 'rob']}"
    assert kept == {
        ("ann", "sign-in", "done", full),
        ("ann", "artifact", "done", "done"),
        ("ann", "sign-out", "done", full),
        ("reader", "sign-in", "done", read),
        ("reader", "artifact", "done", "done"),
        ("reader", "sign-out", "done", read),
        ("rob", "sign-in", "done", again),
        ("rob", "artifact", "done", "done"),
        ("rob", "sign-out", "done", again),
        ("prog", "export", "done", "{}"),
        ("prog", "artifact", "done", "done"),
        ("reader", "export", "done", read),
    }


async def test_sessions_end(town: Town) -> None:
    idle, busy = await town.browser(), await town.browser()
    for _ in range(12):
        town.now_s += sessions.MAX_AGE_S / 12 - 1
        assert (await busy.get("/")).status == 200
    assert (await idle.get("/")).status == 303, "an hour without a page"
    town.now_s += 12
    assert (await busy.get("/")).status == 303, "twelve hours"
    assert len(town.room.sessions) == 0


async def test_a_session_ends_with_the_token_that_opened_it(town: Town) -> None:
    browser, reader = await town.browser(), await town.browser(READER)
    town.admin.app.authenticator.replace_tokens([TOKEN, "another-token-0123456789abcdef"], [READER])
    assert (await browser.get("/")).status == 200
    town.admin.app.authenticator.replace_tokens(["another-token-0123456789abcdef"], [READER])
    assert (await browser.get("/")).status == 303
    assert (await reader.get("/")).status == 200
    town.admin.app.authenticator.replace_tokens([READER])
    assert (await reader.get("/")).status == 303, "what a session may do never grows"


async def test_who_signs_out_is_out(town: Town) -> None:
    browser = await town.browser()
    before = browser.cookie
    heard = await browser.post("/sign-out", csrf=await browser.csrf())
    assert (heard.status, heard.headers["location"]) == (303, "/sign-in")
    assert "Max-Age=0" in heard.headers["set-cookie"]
    browser.cookie = before
    assert (await browser.get("/")).status == 303


async def test_a_second_sign_in_ends_the_session_before_it(town: Town) -> None:
    browser = await town.browser()
    await browser.sign_in()
    assert len(town.room.sessions) == 1


def test_wrong_tokens_are_told_ever_more_rarely() -> None:
    now_s = 0.0
    brake = sessions.LoginThrottle(lambda: now_s)
    found = [brake.record_failure("10.0.0.1") for _ in range(40)]
    assert [each.times for each in found if each.is_audited] == [*range(1, 11), 16, 32]
    assert [each.delay_s for each in found] == [0.0] * 10 + [sessions.FAILURE_DELAY_S] * 30
    now_s = sessions.FAILURE_WINDOW_S
    again = brake.record_failure("10.0.0.1")
    assert (again.times, again.delay_s, again.is_audited) == (1, 0.0, True)
    assert again.window != found[0].window == found[39].window
    told = sum(brake.record_failure(f"10.0.1.{number}").is_audited for number in range(200))
    assert told == sessions.MAX_AUDITED_FAILURES - 1
    now_s += sessions.FAILURE_WINDOW_S
    assert brake.record_failure("10.0.1.7").is_audited


async def test_who_is_signed_in_is_led_on_from_the_sign_in(town: Town) -> None:
    """A link from elsewhere brings no cookie along; the page asks again from here, with it."""
    browser = await town.browser()
    heard = await browser.get("/sign-in?next=%2Fqueues")
    assert (heard.status, heard.headers["location"]) == (303, "/queues")


async def test_sessions_and_addresses_are_so_many_at_most() -> None:
    access: Permission = "full"
    held = sessions.Sessions(lambda digest: access, lambda: 0.0)
    secrets = [found[0] for _ in range(sessions.MAX_SESSIONS + 1) if (found := held.sign_in(TOKEN))]
    assert len(held) == sessions.MAX_SESSIONS
    assert held.find(secrets[0]) is None
    assert held.find(secrets[1]) is not None
    brake = sessions.LoginThrottle(lambda: 0.0)
    for number in range(sessions.MAX_ADDRESSES + 1):
        for _ in range(sessions.FREE_FAILURES):
            brake.record_failure(f"10.0.0.{number}")
    assert brake.record_failure("10.0.0.1").times == sessions.FREE_FAILURES + 1
    assert brake.record_failure("10.0.0.0").times == 1
    comings = sessions.SignInLog(lambda: 0.0)
    for number in range(sessions.MAX_ADDRESSES + 1):
        comings.record("sign-in", "read", f"10.0.0.{number}", "eve")
    assert comings.record("sign-in", "read", "10.0.0.1", "eve").times == 2
    assert comings.record("sign-in", "read", "10.0.0.0", "eve").times == 1
    for number in range(sessions.MAX_NAMES + 5):
        coming = comings.record("sign-in", "read", "10.0.0.9", f"name-{number}")
    assert coming.names == ["eve", *(f"name-{number}" for number in range(sessions.MAX_NAMES - 1))]


async def test_who_may_only_look_ends_no_session_of_those_who_may_do_things(town: Town) -> None:
    browser, first = await town.browser(), await town.browser(READER)
    for _ in range(sessions.MAX_SESSIONS):
        assert town.room.sessions.sign_in(READER)
    assert (await browser.get("/")).status == 200
    assert (await first.get("/")).status == 303, "pushed out by its like"
    assert len(town.room.sessions) == sessions.MAX_SESSIONS + 1


async def test_who_comes_and_goes_again_and_again_is_one_entry_of_a_minute(town: Town) -> None:
    async def spells() -> dict[tuple[str, str], set[str | None]]:
        rows = (await town.disk.audit(AuditQuery(limit=100))).found
        found: dict[tuple[str, str], set[str | None]] = {}
        for _, row in rows:
            found.setdefault((row.what, str((row.details or {})["access"])), set()).add(row.part_of)
        return found

    reader = Browser(town.admin)
    for name in ("ann", "bob", "ann"):
        await reader.post("/sign-in", token=READER, name=name)
        await reader.post("/sign-out", csrf=await reader.csrf())
    await town.browser()
    found = await spells()
    assert set(found) == {("sign-in", "read"), ("sign-out", "read"), ("sign-in", "full")}
    assert all(len(each) == 1 and None not in each for each in found.values())
    assert ("ann", "sign-in", "done", {"access": "read", "times": 3, "names": ["ann", "bob"]}) in await deeds(town)
    page = text(await (await town.browser()).get("/audit?what=sign-in"))
    assert '<span class="dim">names</span> ann, bob</span>' in page
    town.now_s += sessions.SIGN_IN_WINDOW_S
    await reader.post("/sign-in", token=READER)
    assert len((await spells())["sign-in", "read"]) == 2


# -- forms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("csrf", [None, "", "wrong", "é"])
async def test_a_form_without_the_secret_of_its_session_does_nothing(town: Town, csrf: str | None) -> None:
    await town.held()
    browser = await town.browser()
    for target, fields in (
        ("/sign-out", {}),
        ("/queues/pause", {"name": "video"}),
        ("/cleanup/run", {}),
        ("/clock/accept", {}),
        ("/jobs/held/do", {"verb": "cancel", "seen": "processing 16777217"}),
    ):
        heard = await browser.post(target, **fields, **({} if csrf is None else {"csrf": csrf}))
        assert (heard.status, "not of your session" in text(heard)) == (403, True), target
    other = await town.browser()
    assert (await browser.post("/queues/pause", name="video", csrf=await other.csrf())).status == 403
    assert await town.status("held") == "processing"
    assert "paused" not in text(await browser.get("/queues"))
    assert town.admin.fakes.forced == []


async def test_the_secret_may_come_in_a_header(town: Town) -> None:
    await town.do("jobs", id="a", queue="video")
    browser = await town.browser()
    heard = await browser.post("/queues/pause", {"X-CSRF-Token": await browser.csrf()}, name="video")
    assert heard.status == 303


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"}, {"Origin": "http://localhost:1"}],
)
async def test_another_site_gets_nothing_done(town: Town, headers: dict[str, str]) -> None:
    browser = await town.browser()
    csrf = await browser.csrf()
    heard = await browser.post("/queues/video/pause", headers, csrf=csrf)
    assert heard.status == 403
    assert (await browser.post("/sign-in", headers, token=TOKEN)).status == 403
    assert (await browser.get("/", **headers)).status == 403


async def test_a_form_of_nobody_is_401_and_leads_to_the_sign_in(town: Town) -> None:
    heard = await Browser(town.admin).post("/queues/video/pause", csrf="x")
    assert heard.status == 401
    assert 'href="/sign-in"' in text(heard)


async def test_a_form_of_another_kind_is_refused_in_words(town: Town) -> None:
    browser = await town.browser()
    heard = await browser.post("/queues/video/pause", {"Content-Type": "application/json"}, csrf=await browser.csrf())
    assert (heard.status, heard.headers["content-type"]) == (415, "text/html; charset=utf-8")
    heard = await browser.post("/queues/pause", name="video", csrf=await browser.csrf(), more="x")
    assert (heard.status, "is not a field" in text(heard)) == (400, True)


# -- programs ----------------------------------------------------------------------------------------------------------


async def test_a_program_with_a_token_gets_the_pages_too(town: Town) -> None:
    await town.held()
    assert (await town.admin.request("GET", "/jobs/held", headers=AUTH)).status == 200
    assert (await town.admin.request("GET", "/", headers={"Authorization": "Bearer wrong"})).status == 401
    heard = await town.admin.request("POST", "/queues/video/pause", "", {**AUTH, "Content-Type": FORM})
    assert (heard.status, heard.headers["location"]) == (303, "/queues")
    heard = await town.admin.request("GET", "/admin/job-management/queues", headers=AUTH)
    assert [queue["paused"] for queue in heard.data["queues"]] == [True]


async def test_a_session_opens_no_api(town: Town) -> None:
    """A cookie comes with every request, whoever made the browser send it; the API wants the token each time."""
    browser = await town.browser()
    assert (await browser.get("/admin/job-management/stats")).status == 401


# -- who may only look -------------------------------------------------------------------------------------------------


async def test_after_a_deed_the_page_is_the_one_from_which_it_was_asked_for(town: Town) -> None:
    await town.do("jobs/bulk", jobs=[{"queue": f"q-{number:03}"} for number in range(101)])
    browser = await town.browser()
    page = text(await browser.get("/queues?cursor=q-099"))
    form = page[page.index('<form id="pause-form"') :].partition("</form>")[0]
    fields = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', form))
    assert 'formaction="/queues/pause" name="name" value="q-100"' in page
    for deed in ("pause", "resume"):
        heard = await browser.post(f"/queues/{deed}", **fields, name="q-100")
        assert (heard.status, heard.headers["location"]) == (303, "/queues?cursor=q-099")
    page = text(await browser.get("/webhooks/q?state=delivered"))
    form = page[page.index('action="/webhooks/q/test"') :].partition("</form>")[0]
    fields = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', form))
    heard = await browser.post("/webhooks/q/test", **fields)
    assert (heard.status, heard.headers["location"]) == (303, "/webhooks/q?state=delivered")


async def test_who_may_only_look_sees_no_button_and_no_secret(town: Town) -> None:
    lock_id = await town.held()
    reader = await town.browser(READER)
    filters = {"/jobs", "/audit", "/webhooks/q"}
    for target in [*PAGES, "/jobs/held"]:
        page = text(await reader.get(target))
        assert "read-only" in page, target
        assert lock_id not in page
        assert set(re.findall(r'action="([^"]+)"', page)) <= {"/sign-out", *filters}, target
        assert "/confirm" not in page
    town.now_s += 1
    assert (await reader.post("/sign-out", csrf=await reader.csrf())).status == 303


@pytest.mark.parametrize(
    ("target", "fields"),
    [
        ("/jobs/held/do", {"verb": "cancel", "seen": "processing 16777217"}),
        ("/queues/pause", {"name": "video"}),
        ("/queues/video/resume", {}),
        ("/cleanup/run", {}),
        ("/cleanup/recover", {}),
        ("/clock/accept", {}),
        ("/workers/take-back", {"name": "w-1"}),
        ("/webhooks/q/test", {}),
        ("/webhooks/q/resend", {"id": "7"}),
        ("/webhooks/q/resend-given-up", {"upto": "7"}),
    ],
)
async def test_who_may_only_look_changes_nothing(town: Town, target: str, fields: dict[str, str]) -> None:
    await town.held()
    reader = await town.browser(READER)
    heard = await reader.post(target, **fields, csrf=await reader.csrf())
    assert (heard.status, "may only look" in text(heard)) == (403, True)
    assert (await reader.get("/jobs/held/confirm?verb=cancel")).status == 403
    assert (await reader.get("/webhooks/q/again")).status == 403
    bearer = {"Authorization": f"Bearer {READER}"}
    heard = await town.admin.request("POST", target, urlencode(fields), {**bearer, "Content-Type": FORM})
    assert heard.status == 403
    heard = await town.admin.request("POST", "/admin/job-management/jobs/held/cancel", "{}", bearer)
    assert (heard.status, heard.error) == (403, "forbidden")
    assert await town.status("held") == "processing"
    assert town.admin.fakes.forced == []
    assert not town.admin.fakes.accepted


@pytest.mark.parametrize(
    ("target", "fields"),
    [
        ("/jobs/held/do", {"verb": "cancel"}),
        ("/queues/pause", {"name": "video"}),
        ("/queues/video/resume", {}),
        ("/cleanup/run", {}),
        ("/cleanup/recover", {}),
        ("/clock/accept", {}),
        ("/webhooks/q/test", {}),
        ("/webhooks/q/resend", {"id": "7"}),
        ("/webhooks/q/resend-given-up", {"upto": "7"}),
        ("/sign-out", {}),
    ],
)
async def test_a_form_needs_the_secret_of_its_session_also_from_htmx(
    town: Town, target: str, fields: dict[str, str]
) -> None:
    """Any page can make a browser send `HX-Request`, so it stands for nothing."""
    await town.held()
    browser = await town.browser()
    if target == "/jobs/held/do":
        fields = await browser.looked("held", "cancel")
    for given in ("", "x", await (await town.browser()).csrf()):
        for headers in ({}, {"HX-Request": "true"}, {"HX-Request": "true", "X-CSRF-Token": given}):
            heard = await browser.post(target, headers, **{**fields, "csrf": given})
            assert (heard.status, "not of your session" in text(heard)) == (403, True), headers
    assert await town.status("held") == "processing"
    assert (town.admin.fakes.forced, town.admin.fakes.accepted, town.admin.fakes.resent) == ([], False, [])
    assert (await browser.get("/")).status == 200, "it is still signed in"
    heard = await browser.post(target, {"HX-Request": "true"}, **{**fields, "csrf": await browser.csrf()})
    assert heard.status == 303


async def test_a_reader_of_the_api_sees_no_lock_id(town: Town) -> None:
    lock_id = await town.held()
    for path in ("jobs", "jobs/held", "locks", "validate-job?jobId=held"):
        for token, shown in ((TOKEN, True), (READER, False)):
            bearer = {"Authorization": f"Bearer {token}"}
            heard = await town.admin.request("GET", f"/admin/job-management/{path}", headers=bearer)
            assert (heard.status, lock_id in text(heard)) == (200, shown), path


# -- pages -------------------------------------------------------------------------------------------------------------


def assert_safe(heard: ReceivedResponse) -> None:
    policy = heard.headers["content-security-policy"]
    assert policy == rendering.CONTENT_SECURITY_POLICY
    assert "unsafe" not in policy
    assert heard.headers["x-content-type-options"] == "nosniff"
    assert heard.headers["cache-control"] == "no-store"
    page = text(heard)
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son[a-z]+=|javascript:", page), "nothing inline"
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page), "nothing from elsewhere"


@pytest.mark.parametrize("target", PAGES)
async def test_every_page_without_and_with_jobs(town: Town, target: str) -> None:
    browser = await town.browser()
    heard = await browser.get(target)
    assert heard.status == 200
    assert_safe(heard)
    await town.held()
    await town.do("jobs", id="late", queue="mail", delay_ms=60_000)
    await town.do("jobs/late/cancel", reason="r")
    for headers in ({}, {"HX_Request": "true"}):
        heard = await browser.get(target, **headers)
        assert heard.status == 200
        assert_safe(heard)
        assert ("<html" in text(heard)) == (not headers)


async def test_the_overview_shows_the_space_of_the_disk(town: Town) -> None:
    browser = await town.browser()
    page = text(await browser.get("/"))
    assert "3.0 GiB free of 8.0 GiB" in page
    assert "/var/lib/jobd/jobd.db" in page


async def test_pages_without_a_session_and_refusals_are_as_safe(town: Town) -> None:
    browser = await town.browser()
    targets = ("/sign-in", "/docs/worker", "/jobs", "/static/none.js")
    heard = [await Browser(town.admin).get(target) for target in targets]
    heard += [await browser.get("/jobs/nobody"), await browser.get("/jobs?status=x"), await browser.get("/jobs?x=1")]
    heard += [await browser.get("/jobs/held/confirm?verb=x"), await browser.post("/sign-in", token="x")]
    assert [each.status for each in heard] == [200, 200, 303, 404, 404, 400, 400, 400, 401]
    for each in heard:
        assert_safe(each)
    assert "No job has" in text(heard[4]) or "job_not_found" in text(heard[4])


async def test_what_others_have_written_never_comes_out_as_markup(town: Town) -> None:
    await town.do("jobs", id="nasty", queue="q", kind="<b>k</b>", payload={NASTY: [NASTY]}, max_attempts=2)
    lock = (await town.do("jobs/nasty/start", worker="<i>w</i>\u202e'"))["lock_id"]
    await town.do("jobs/nasty/progress", lock_id=lock, progress=3, message=NASTY)
    browser = await town.browser()
    seen = [await browser.get(each) for each in (*PAGES, "/jobs/nasty", "/jobs/nasty/confirm?verb=cancel")]
    await town.do("jobs/nasty/fail", lock_id=lock, error_message=NASTY, error_code="<u>", retry=False)
    seen += [await browser.get(each) for each in ("/jobs", "/jobs/nasty")]
    seen.append(await browser.get(f"/jobs?kind={quote('<b>k</b>')}&worker={quote(NASTY.replace(chr(27), ''))}"))
    seen.append(await browser.get(f"/jobs?id={quote(NASTY)}"))
    seen.append(await browser.get(f"/jobs?status={quote(NASTY)}"))
    seen.append(await browser.get(f"/sign-in?next={quote(NASTY)}"))
    seen.append(await browser.confirmed("nasty", "force-reset", NASTY))
    seen.append(await browser.get("/jobs/nasty"))
    for heard in seen:
        page = text(heard)
        for markup in ("<script>alert", "<b>", "<i>w", "<u>"):
            assert markup not in page, page[page.find(markup) - 200 :][:400]
        shown = re.sub(r'(<input [^>]*)value="[^"]*"', r"\1", page)  # a field holds what it sends back
        assert not {"\x1b", "\u202e"} & set(shown)
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;\u241b[31m\\u202e&amp;&#34;" in text(seen[-1])


async def test_filters_are_in_the_address_and_pages_go_on_from_there(town: Town) -> None:
    jobs = [{"id": f"job-{number:03}", "queue": ("a", "b")[number % 2]} for number in range(120)]
    await town.do("jobs/bulk", jobs=jobs)
    browser = await town.browser()
    seen: list[str] = []
    target = "/jobs?status=queued&queue=a&kind=&worker="
    while target:
        page = text(await browser.get(target))
        seen += re.findall(r'href="/jobs/(job-\d+)"', page)
        older = re.search(r'rel="next" href="([^"]+)"', page)
        target = html.unescape(older[1]) if older else ""
        assert not older or "queue=a" in target
    assert seen == [f"job-{number:03}" for number in range(118, -1, -2)]
    heard = await browser.get("/jobs?id=job-007")
    assert (heard.status, heard.headers["location"]) == (303, "/jobs/job-007")
    heard = await browser.get("/jobs?queue=a%20b")
    assert heard.status == 400
    assert 'value="a b"' in text(heard)


async def test_a_filter_is_sent_back_as_it_came_also_where_nobody_can_see_all_of_it(town: Town) -> None:
    """Marks of direction are ordinary in Hebrew and Arabic names."""
    kind = "\u05d0\u200f<\u061c\u202e\u2066"
    await town.do("jobs", id="right-to-left", kind=kind)
    browser = await town.browser()
    page = text(await browser.get(f"/jobs?kind={quote(kind)}"))
    fields = [html.unescape(value) for value in re.findall(r'name="kind" value="([^"]*)"', page)]
    assert fields == [kind, kind]  # of the filter, and of the form that does something to all that match
    assert kind not in page.replace(f'value="{html.escape(kind)}"', "")
    heard = await planned(browser, f"/jobs?kind={quote(kind)}", action="cancel", scope="all")
    assert "Plan: cancel 1 job" in text(await browser.get(heard.headers["location"]))
    page = text(await browser.get(f"/audit?who={quote(kind)}"))
    assert [html.unescape(value) for value in re.findall(r'name="who" value="([^"]*)"', page)] == [kind]


async def test_jobs_are_found_by_worker_time_and_text(town: Town) -> None:
    await town.held()
    await town.do("jobs", id="invoice-7", queue="mail", payload={"to": "Eve"})
    browser = await town.browser()

    async def found(query: str) -> list[str]:
        heard = await browser.get(f"/jobs?{query}")
        assert heard.status == 200, text(heard)
        return re.findall(r'id="job-([^"]+)"', text(heard))

    assert await found("worker=w-1") == ["held"]
    assert await found("q=eve") == ["invoice-7"]
    assert await found("q=INVOICE&queue=mail") == ["invoice-7"]
    assert await found("q=nothing") == []
    assert await found("since=2h") == ["invoice-7", "held"]
    assert await found("until=2h&since=") == []
    assert await found("since=2020-01-01&until=2020-01-01+10:00") == []
    assert await found("until=2100-01-01T00:00Z") == ["invoice-7", "held"]
    body = json.dumps({"jobId": "held", "reason": "no"})
    assert (await town.admin.request("POST", "/admin/job-management/force-fail", body, headers=AUTH)).status == 200
    assert await found("finished_since=2h") == ["held"]
    assert await found("finished_since=2h&finished_until=1h") == []
    assert await found("worker=w-1&status=failed") == ["held"]
    page = text(await browser.get("/jobs?since=2h&q=%22x%22"))
    assert 'name="since" value="2h"' in page
    assert 'name="q" value="&#34;x&#34;"' in page
    assert "data-interval-s" not in page, "a text is looked for once"
    for query, field in (("since=yesterday", "$.since"), ("until=9999", "$.until"), ("q=" + "x" * 201, "$.q")):
        heard = await browser.get(f"/jobs?{query}")
        assert (heard.status, field in text(heard)) == (400, True)
        assert_safe(heard)


async def test_a_page_says_how_far_it_has_looked_and_what_is_found_at_once(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    await town.do("jobs", id="rare", queue="b")
    await town.do("jobs/bulk", jobs=[{"id": f"often-{number}", "queue": "a"} for number in range(20)])
    browser = await town.browser()
    monkeypatch.setattr(history, "JobQuery", partial(JobQuery, scan=3))
    page = text(await browser.get("/jobs?queue=b"))
    assert 'id="job-rare"' in page, "it has looked on"
    assert "further back" not in page
    assert "data-interval-s" in page
    monkeypatch.setattr(pages, "MAX_SCANNED", 10)
    assert "data-interval-s" not in text(await browser.get("/jobs?queue=b")), "it does not look so far again and again"
    monkeypatch.setattr(history, "MOST_LOOKED", 6)
    page = text(await browser.get("/jobs?queue=b&worker=w%261"))
    assert "None found back to jobs created <time" in page
    assert '<a href="/jobs?status=failed&amp;queue=b&amp;worker=w%261">failed</a>' in page
    page = text(await browser.get("/jobs?queue=b&status=completed"))
    assert "further back" in page
    assert "at once" not in page
    monkeypatch.setattr(pages, "MAX_SCANNED", 50_000)
    assert "data-interval-s" not in text(await browser.get("/jobs?queue=b")), (
        "what looks on is not begun anew meanwhile"
    )
    renewed = text(await browser.get("/jobs?queue=b", HX_Request="true"))
    assert "data-final" in renewed, "nor where it had rows when the page was opened"
    for query in ("error=0123456789ab", "q=nothing"):
        page = text(await browser.get(f"/jobs?{query}"))
        assert "data-interval-s" not in page
        assert "at once" not in page, "a text or an error is compared row by row in any status"
    target, found = "/jobs?queue=b", []
    while target:
        page = text(await browser.get(target))
        found += re.findall(r'id="job-([^"]+)"', page)
        older = re.search(r'rel="next" href="([^"]+)"', page)
        target = html.unescape(older[1]) if older else ""
    assert found == ["rare"]
    assert "No older job matches" in text(await browser.get("/jobs?queue=b&cursor=1"))
    monkeypatch.setattr(history, "MOST_LOOKED", 100)
    assert "No job matches" in text(await browser.get("/jobs?kind=none&status=failed"))


@pytest.mark.parametrize(
    ("text_", "at"),
    [
        ("90s", 910_000),
        ("10 min", 400_000),
        ("1h", 0),
        ("1970-01-01 00:10", 600_000),
        ("1970-01-01T02:10+02:00", 600_000),
        ("1970-01-02", 86_400_000),
        ("1969-01-01", 0),
        ("", None),
        ("1 fortnight", None),
        ("-5m", None),
        ("12:00", None),
    ],
)
def test_times_as_people_write_them(text_: str, at: int | None) -> None:
    assert filters.parse_time(text_, 1_000_000) == at


# -- the audit log -----------------------------------------------------------------------------------------------------


async def test_what_operators_did_is_told_with_who_and_why(town: Town) -> None:
    await town.held()
    eve = Browser(town.admin)
    await eve.post("/sign-in", token=TOKEN, name=" Eve  <i>\x1b ")
    assert "No" not in text(await eve.get("/audit")).partition("<tbody")[2]
    await eve.confirmed("held", "force-fail", "wrong <b>input</b>")
    await eve.post("/queues/video/pause", csrf=await eve.csrf())
    nobody = await town.browser()
    await nobody.post("/jobs/held/do", csrf=await nobody.csrf(), verb="force-fail", seen="failed")
    reader = await town.browser(READER)
    for browser in (eve, reader):
        page = text(await browser.get("/audit"))
        rows = re.findall(r'<tr id="audit-\d+">(.*?)</tr>', page, re.DOTALL)
        assert len(rows) == 6
        by_reader, refused, by_nobody, paused, failed, by_eve = rows
        assert "Eve &lt;i&gt;" in by_eve
        assert (">reader<" in by_reader, "</span> read</span>" in by_reader, ">admin<" in by_nobody) == (
            True,
            True,
            True,
        )
        assert all("sign-in" in row for row in (by_reader, by_nobody, by_eve))
        assert "invalid_transition" in refused
        assert ">admin<" in refused
        assert "Eve &lt;i&gt;" in paused
        assert '<a href="/jobs?queue=video">' in paused
        assert "processing → failed" in failed
        assert "wrong &lt;b&gt;input&lt;/b&gt;" in failed
        assert "127.0.0.1" in failed
    assert "admin:Eve &lt;i&gt;" in text(await eve.get("/jobs/held"))
    assert re.search(r"Eve &lt;i&gt;</span>", text(await eve.get("/queues"))), "it is said who is signed in"
    for query, count in (("who=admin", 2), ("what=pause", 1), ("job_id=held&who=", 2), ("since=1h", 6), ("who=x", 0)):
        page = text(await eve.get(f"/audit?{query}"))
        assert page.count('id="audit-') == count, query
    assert (await eve.get("/audit?job_id=a%20b")).status == 400
    assert "must be a time" in text(await eve.get("/audit?since=then"))


async def test_the_audit_log_is_walked_page_by_page(town: Town) -> None:
    browser = await town.browser()
    csrf = await browser.csrf()
    for number in range(60):
        await browser.post(f"/queues/q-{number}/pause", csrf=csrf)
    target, seen = "/audit?what=pause", []
    while target:
        page = text(await browser.get(target))
        seen += re.findall(r'href="/jobs\?queue=q-(\d+)">q-', page.partition("<tbody")[2])
        older = re.search(r'rel="next" href="([^"]+)"', page)
        target = html.unescape(older[1]) if older else ""
        assert not older or "what=pause" in target
    assert seen == [str(number) for number in range(59, -1, -1)]


async def test_a_job_says_all_that_is_known_of_it(town: Town) -> None:
    lock = await town.held()
    await town.do("jobs/held/progress", lock_id=lock, progress=40, message="half of it")
    browser = await town.browser()
    page = text(await browser.get("/jobs/held"))
    for words in (
        "Worker w-1 has held it",
        "half of it",
        'value="40"',
        "data-until=",
        "worker:w-1",
        "queued → processing",
        "&#34;a&#34;: 1",
        "http://localhost/admin/job-management/jobs/held",
        "Copy as curl",
    ):
        assert words in page, words
    assert lock not in page, "the room itself needs it, nobody else"
    assert re.findall(r"verb=([a-z-]+)", page) == ["extend", "release", "force-reset", "force-fail", "cancel"]
    await town.do("jobs/held/complete", lock_id=lock, download_url="https://files.example/a", metadata={"n": [1]})
    page = text(await browser.get("/jobs/held"))
    assert re.findall(r"verb=([a-z-]+)", page) == ["delete"]
    assert '<a href="/jobs/held/elsewhere" rel="noreferrer noopener">https://files.example/a</a>' in page


async def test_of_a_long_story_the_page_shows_the_latest(town: Town) -> None:
    await town.do("jobs", id="long", queue="q", max_attempts=100)
    browser = await town.browser()
    for number in range(99):
        lock = (await town.do("jobs/long/start", worker="w"))["lock_id"]
        await town.do("jobs/long/fail", lock_id=lock, error_message=f"error {number}", retry_after_ms=0)
    page = text(await browser.get("/jobs/long"))
    assert "Earlier events are left out" not in page, "199 of them"
    assert "created" in page.partition('<h2 id="h-timeline')[2]
    await town.do("jobs/long/start", worker="w")
    lock = (await town.admin.request("GET", "/admin/job-management/jobs/long", headers=AUTH)).data["lock"]["lock_id"]
    await town.do("jobs/long/fail", lock_id=lock, error_message="the last", retry=False)
    page = text(await browser.get("/jobs/long"))
    assert "Earlier events are left out" in page
    assert "the last" in page


async def test_a_large_payload_is_cut_and_a_deep_one_shown_as_it_came(town: Town) -> None:
    await town.do("jobs", id="large", payload="x" * 100_000)
    page = text(await (await town.browser()).get("/jobs/large"))
    assert "x" * 1_000 in page
    assert len(page) < rendering.MAX_JSON + 20_000
    assert "more characters" in page
    assert rendering.pretty_json(Raw(b'{"a":1}')) == ('{\n  "a": 1\n}', 0)
    deep = b"[" * 5_000 + b"]" * 5_000
    assert rendering.pretty_json(Raw(deep))[0].startswith("[")


async def test_a_stored_result_is_a_file_behind_a_link(town: Town, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    town.admin.services.downloads = Downloads(FileArtifactStore(str(tmp_path / "results"), "test"), 2)
    lock = await town.held()
    browser, reader = await town.browser(), await town.browser(READER)
    assert "/jobs/held/artifact" not in text(await browser.get("/jobs/held"))
    heard = await browser.get("/jobs/held/artifact")
    assert (heard.status, "no storage_key" in text(heard)) == (404, True)
    assert_safe(heard)
    await town.do("jobs/held/complete", lock_id=lock, storage_key="a/page.html")
    assert 'href="/jobs/held/artifact"' in text(await browser.get("/jobs/held"))
    with_store = text(await browser.get("/jobs/held/confirm?verb=delete"))
    assert "So is what is stored of it" in with_store
    assert "jobctl delete held" in with_store
    await planned(browser, "/jobs?status=completed", "held", action="delete", scope="selected")
    assert "So is what is stored of them" in text(await browser.get("/plans/plan-1"))
    store, town.admin.services.downloads = town.admin.services.downloads, Downloads(None, 2)
    for page in ("/jobs/held/confirm?verb=delete", "/plans/plan-1"):
        assert "what is stored" not in text(await browser.get(page))
    assert "/artifact" not in text(await browser.get("/jobs/held"))
    town.admin.services.downloads = store
    assert "any more" in text(await browser.get("/jobs/held/artifact"))
    (tmp_path / "results" / "a").mkdir()
    (tmp_path / "results" / "a" / "page.html").write_text("<script>alert(1)</script>")
    for who in (browser, reader):
        heard = await who.get("/jobs/held/artifact")
        assert (heard.status, heard.body) == (200, b"<script>alert(1)</script>")
        assert heard.headers["content-type"] == "application/octet-stream"
        assert heard.headers["content-disposition"].startswith('attachment; filename="page.html"')
        assert heard.headers["x-content-type-options"] == "nosniff"
    line = await town.admin.connect()
    for _ in range(2):
        headers = {"Cookie": browser.cookie}
        heard = await line.request("HEAD", "/jobs/held/artifact", headers=headers)
        assert (heard.status, heard.headers["content-length"]) == (200, "25")
    taken = [each for each in await deeds(town) if each[1] == "artifact"]
    assert [each[0] for each in taken] == ["admin", "reader"], "who asks for the head takes nothing along"
    stranger = await Browser(town.admin).get("/jobs/held/artifact")
    assert (stranger.status, stranger.headers["location"]) == (303, "/sign-in?next=%2Fjobs%2Fheld%2Fartifact")
    assert (await browser.get("/jobs/nobody/artifact")).status == 404


# -- deeds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "before", "after"),
    [
        ("force-fail", "processing", "failed"),
        ("force-reset", "processing", "queued"),
        ("cancel", "processing", "cancelled"),
        ("extend", "processing", "processing"),
        ("release", "processing", "queued"),
    ],
)
async def test_a_deed_shows_from_and_to_and_is_done_once_confirmed(
    town: Town, verb: str, before: str, after: str
) -> None:
    await town.held()
    browser = await town.browser()
    page = text(await browser.get(f"/jobs/held/confirm?verb={verb}"))
    assert re.findall(r'class="status (\w+)"', page) == [before, after]
    assert await town.status("held") == before
    heard = await browser.confirmed("held", verb, "because of <tests>")
    assert (heard.status, heard.headers["location"]) == (303, "/jobs/held")
    assert await town.status("held") == after
    page = text(await browser.get("/jobs/held"))
    assert f"{JOB_ACTIONS[verb].label}: done. {before} → {after}" in page
    assert "because of &lt;tests&gt;" in page
    assert "done." not in text(await browser.get("/jobs/held")), "it is said once"


# -- many jobs ---------------------------------------------------------------------------------------------------------


async def failing(town: Town, *job_ids: str) -> None:
    for job_id in job_ids:
        lock = await town.held(job_id)
        await town.do(f"jobs/{job_id}/fail", lock_id=lock, error_message="disk <full>")


async def planned(browser: Browser, page: str, *ids: str, **fields: str) -> ReceivedResponse:
    """What comes of the form of many jobs on a page of jobs, with these jobs ticked."""
    shown = text(await browser.get(page))
    form = shown[shown.index('<form id="bulk"') :].partition("</form>")[0]
    hidden = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', form))
    ticked = re.findall(r'name="ids" value="([^"]+)" form="bulk"', shown)
    assert set(ids) <= set(ticked)
    given = {name: html.unescape(value) for name, value in hidden.items()}
    pairs = [*given.items(), *(("ids", each) for each in ids), *fields.items()]
    return await browser.house.request("POST", "/plans", urlencode(pairs), browser._headers({"Content-Type": FORM}))


async def test_a_plan_up_to_the_last_time_there_is_can_be_looked_at(town: Town) -> None:
    await failing(town, "a")
    browser, path = await town.browser(), "/admin/job-management/plans"
    for until, status in ((LATEST_MS + 1, 400), (10**15, 400), (LATEST_MS, 200)):
        body = json.dumps({"action": "retry", "filter": {"until": until}})
        assert (await town.admin.request("POST", path, body, headers=AUTH)).status == status
    heard = await browser.get("/plans/plan-1")
    assert heard.status == 200
    assert "Plan: retry 1 job" in text(heard)
    assert "until=9999-12-31T23%3A59%3A59.999Z" in text(heard), "the way back finds the same jobs"
    assert (await browser.get("/jobs?until=9999-12-31T23%3A59%3A59.999Z")).status == 200


async def test_a_plan_of_what_time_would_do_is_shown_and_applied(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    path, browser = "/admin/job-management/plans", await town.browser()
    soon = round(time.time() * 1000) + 60
    for job_id in ("late-1", "late-2"):
        await town.do("jobs", id=job_id, expires_at=soon)
    await asyncio.sleep(0.1)
    monkeypatch.setattr(plan_builder, "MAX_PLAN", 1)
    for action in ("cleanup", "recover-stuck"):
        assert (await town.admin.request("POST", path, json.dumps({"action": action}), headers=AUTH)).status == 200
    wrong = await town.admin.request("POST", path, '{"action":"cleanup","ids":["late-1"]}', headers=AUTH)
    assert (wrong.status, wrong.json["details"]["field"]) == (400, "$.ids")
    heard = await browser.get("/plans/plan-1")
    assert_safe(heard)
    page = text(heard)
    assert "Plan: clean up 1 job" in page
    assert "validation fixes are not part of a plan" in page
    assert "Found among" not in page
    assert "There are more" in page or "There may be more" in page
    assert "jobctl cleanup --dry-run" in page
    assert "/plans/plan-1/next" not in page
    assert "Plan: recover 0 jobs" in text(await browser.get("/plans/plan-2"))
    await browser.post("/plans/plan-1/apply", csrf=await browser.csrf())
    assert "Done to 1 of 1 jobs" in text(await browser.get("/plans/plan-1"))
    assert sorted([await town.status("late-1"), await town.status("late-2")]) == ["failed", "queued"]
    assert "plan-cleanup" in text(await browser.get("/audit"))


async def test_selected_jobs_are_planned_shown_and_done_once(town: Town) -> None:
    await failing(town, "a", "b", "c")
    await town.do("jobs", id="waits")
    browser = await town.browser()
    heard = await planned(browser, "/jobs", "a", "b", "waits", action="retry", scope="selected", reason="<again>")
    assert (heard.status, heard.headers["location"]) == (303, "/plans/plan-1")
    heard = await browser.get("/plans/plan-1")
    assert_safe(heard)
    page = text(heard)
    assert "Plan: retry 2 jobs" in page
    assert re.search(r'<li>2 <span class="status failed">failed</span> .*<span class="status queued">', page)
    assert "1 is left alone: Only failed and cancelled jobs can be retried." in page
    assert "&lt;again&gt;" in page
    assert re.findall(r'href="/jobs/([a-z]+)"', page) == ["a", "b", "waits"]
    assert await town.status("a") == "failed", "nothing is done yet"
    heard = await browser.post("/plans/plan-1/apply", csrf=await browser.csrf())
    assert (heard.status, heard.headers["location"]) == (303, "/plans/plan-1")
    page = text(await browser.get("/plans/plan-1"))
    assert "It was done to 2 jobs." in page
    assert "Done to 2 of 2 jobs" in page
    assert "/apply" not in page
    assert [await town.status(each) for each in ("a", "b", "c")] == ["queued", "queued", "failed"]
    await browser.post("/plans/plan-1/apply", csrf=await browser.csrf())
    assert "nothing was done this time" in text(await browser.get("/plans/plan-1"))
    assert "plan-retry" in text(await browser.get("/audit"))


def test_details_of_the_audit_log_are_for_people() -> None:
    found = {"queue": "mail", "since": 1_700_000_000_000, "until": 10**15, "limit": 3}
    assert rendering.audit_detail(found) == f"queue mail, since 2023-11-14 22:13:20 UTC, until {10**15}, limit 3"
    assert (rendering.audit_detail(7), rendering.audit_detail("a"), rendering.audit_detail(True)) == ("7", "a", "True")


async def test_all_that_match_are_planned_and_what_changed_meanwhile_is_told(town: Town) -> None:
    await failing(town, *(f"job-{number:02}" for number in range(60)))
    await town.do("jobs", id="other", queue="mail")
    browser = await town.browser()
    heard = await planned(browser, "/jobs?queue=video&status=failed&q=DISK", action="delete", scope="all")
    assert "Plan: delete 60 jobs" in text(await browser.get(heard.headers["location"]))
    await browser.confirmed("job-07", "force-reset")
    await browser.confirmed("job-08", "delete")
    heard = await browser.post("/plans/plan-1/apply", csrf=await browser.csrf())
    page = text(await browser.get(heard.headers["location"]))
    assert "Done to 58 of 60 jobs" in page
    assert "2 had changed since the plan was made" in page
    undone = page[page.index('id="h-undone"') :]
    assert re.findall(r'href="/jobs/([a-z0-9-]+)"', undone) == ["job-08", "job-07"]
    assert re.findall(r'class="status (\w+)">(\w+)<', undone) == [
        ("failed", "failed"), ("failed", "gone"), ("failed", "failed"), ("queued", "queued"),
    ]  # fmt: skip
    assert await town.status("job-07") == "queued"
    assert await town.status("other") == "queued"
    page = text(await browser.get("/audit?what=plan-delete"))
    told = page[page.index("left_undone") :]
    assert re.findall(r'<a class="id" href="/jobs/([a-z0-9-]+)">', told)[:2] == ["job-08", "job-07"]


async def test_a_plan_that_is_full_leads_to_the_next_one(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (plan_builder, plans):
        monkeypatch.setattr(module, "MAX_PLAN", 2)
    await failing(town, "a", "b", "c")
    browser = await town.browser()
    heard = await planned(browser, "/jobs?queue=video&since=2h", action="delete", scope="all", reason="<old>")
    heard = await browser.get(heard.headers["location"])
    assert_safe(heard)
    page = text(heard)
    assert "Plan: delete 2 jobs" in page
    assert "There are more: a plan has 2 jobs at most." in page
    assert "Found by queue <strong>video</strong>, since <strong>20" in page
    assert "Only finished jobs can be deleted." in page
    back = html.unescape(re.findall(r'href="([^"]+)">Leave them', page)[0])
    assert re.findall(r'id="job-(\w)"', text(await browser.get(back))) == ["c", "b", "a"]
    csrf = await browser.csrf()
    assert (await browser.post("/plans/plan-1/next", csrf="x")).status == 403
    await browser.post("/plans/plan-1/apply", csrf=csrf)
    page = text(await browser.get("/plans/plan-1"))
    assert ">Plan the next ones<" in page
    heard = await browser.post("/plans/plan-1/next", csrf=csrf)
    assert (heard.status, heard.headers["location"]) == (303, "/plans/plan-2")
    page = text(await browser.get("/plans/plan-2"))
    assert "Plan: delete 1 job<" in page
    assert "&lt;old&gt;" in page
    assert "There are more" not in page
    heard = await browser.post("/plans/plan-2/next", csrf=csrf)
    assert (heard.status, "Nothing comes after this plan" in text(heard)) == (400, True)
    assert (await browser.post("/plans/none/next", csrf=csrf)).status == 404


async def test_a_plan_whose_time_was_over_says_so_and_goes_on(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MAX_PLANNING_S": 0, "SCAN": 1}.items():
        monkeypatch.setattr(plan_builder, name, value)
    await failing(town, "old", "young")
    browser = await town.browser()
    csrf = await browser.csrf()
    await browser.post("/plans", csrf=csrf, action="retry", scope="all", kind="none")
    page = text(await browser.get("/plans/plan-1"))
    assert "Nothing so far" in page
    assert "There may be more" in page
    assert "Apply this one" not in page
    for number in range(2, 9):
        if "/next" not in page:
            break
        heard = await browser.post(f"/plans/plan-{number - 1}/next", csrf=csrf)
        page = text(await browser.get(heard.headers["location"]))
    assert "Nothing: no job that this can be done to was found" in page


async def test_failures_are_grouped_by_their_error_and_a_group_is_tried_again(town: Town) -> None:
    browser, reader = await town.browser(), await town.browser(READER)
    assert "No job has failed" in text(await browser.get("/failures"))
    for number in range(3):
        lock = await town.held(f"job-{number}")
        await town.do(f"jobs/job-{number}/fail", lock_id=lock, error_message=f"timeout <b> after {number} s")
    await failing(town, "a")
    page = text(await browser.get("/failures"))
    groups = re.findall(r'<tr id="group-([0-9a-f]+)">(.*?)</tr>', page, re.DOTALL)
    assert len(groups) == 2
    assert "4 failed jobs" in page
    fingerprint, shown = groups[0]
    assert "timeout &lt;b&gt; after 2 s" in shown
    assert f'<a href="/jobs?error={fingerprint}">3</a>' in shown
    latest = re.findall(r'href="/jobs/(job-\d)"', shown)
    assert sorted(latest) == ["job-0", "job-1", "job-2"]  # two may have failed in the same millisecond
    assert "Retry all" in shown
    assert "Retry all" not in text(await reader.get("/failures"))
    listed = text(await browser.get(f"/jobs?error={fingerprint}"))
    assert re.findall(r'id="job-(job-\d)"', listed) == ["job-2", "job-1", "job-0"]
    assert f'name="error" value="{fingerprint}"' in listed
    assert f'form="retry-form" name="error" value="{fingerprint}"' in shown
    form = page[page.index('<form id="retry-form"') :].partition("</form>")[0]
    fields = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', form))
    heard = await browser.post("/plans", **fields, error=fingerprint, reason="<mended>")
    plan = text(await browser.get(heard.headers["location"]))
    assert "Plan: retry 3 jobs" in plan
    assert "&lt;mended&gt;" in plan
    await browser.post(f"{heard.headers['location']}/apply", csrf=await browser.csrf())
    page = text(await browser.get("/failures"))
    assert "1 failed job," in page
    assert fingerprint not in page
    assert await town.status("job-1") == "queued"
    assert (await browser.get("/jobs?error=x")).status == 400


async def test_jobs_that_wait_to_be_tried_again_are_in_the_groups_too(town: Town) -> None:
    browser, reader = await town.browser(), await town.browser(READER)
    await town.do("jobs", id="again", queue="mail", max_attempts=3)
    lock = (await town.do("jobs/again/start", worker="w-1"))["lock_id"]
    await town.do("jobs/again/fail", lock_id=lock, error_message="no route to 10.0.0.7", retry_after_ms=600_000)
    page = text(await browser.get("/failures"))
    assert "0 failed jobs and 1 that waits to be tried again, by" in page
    assert "No job has failed" not in page
    [(fingerprint, shown)] = re.findall(r'<tr id="group-([0-9a-f]+)">(.*?)</tr>', page, re.DOTALL)
    waits = f"/jobs?error={fingerprint}&amp;status=queued"
    assert f'<a href="{waits}">1</a>' in shown
    assert f'<a class="error" href="{waits}">no route to 10.0.0.7</a>' in shown
    assert "Retry all" not in shown, "that is for those that failed"
    assert "jobctl run-now ID" in page
    assert "run-now" not in text(await reader.get("/failures"))
    assert 'id="job-again"' in text(await browser.get(html.unescape(waits)))
    lock = (await town.do("jobs", id="gone", queue="video"), await town.do("jobs/gone/start", worker="w-1"))[1]
    await town.do("jobs/gone/fail", lock_id=lock["lock_id"], error_message="no route to 10.0.0.8")
    shown = text(await browser.get("/failures"))
    assert "1 failed job and 1 that waits" in shown
    assert f'<a href="/jobs?error={fingerprint}">1</a>' in shown
    assert f'<a href="{waits}">1</a>' in shown
    assert "Retry all" in shown


async def test_failed_jobs_without_an_error_are_no_group_that_could_be_tried_again(town: Town) -> None:
    line = json.dumps({"id": "bare", "status": "failed"})
    body, kind = line + "\n", {"Content-Type": "application/x-ndjson"}
    heard = await town.admin.request("POST", "/admin/job-management/import", body, headers={**AUTH, **kind})
    assert heard.status == 200, heard.body
    browser = await town.browser()
    page = text(await browser.get("/failures"))
    assert "1 failed job," in page
    assert "1 failed job is of no group here" in page
    assert "No job has failed" not in page
    assert 'name="error"' not in page
    assert "/jobs?error=" not in page
    await failing(town, "a")
    for error in ("", " "):
        heard = await browser.post("/plans", csrf=await browser.csrf(), action="retry", scope="all", error=error)
        assert (heard.status, "no name to find its jobs by" in text(heard)) == (400, True)
    assert (await browser.get("/jobs?error=&status=failed")).status == 200, "a form sends fields that are empty"


async def test_a_plan_needs_jobs_a_filter_that_is_one_and_who_may_change(town: Town) -> None:
    await failing(town, "a")
    browser, reader = await town.browser(), await town.browser(READER)
    heard = await planned(browser, "/jobs", action="retry", scope="selected")
    assert (heard.status, "No job is selected" in text(heard)) == (400, True)
    for fields in ({"scope": "all", "queue": "a b"}, {"scope": "all", "since": "then"}, {"scope": "some"}):
        heard = await browser.post("/plans", csrf=await browser.csrf(), action="retry", **fields)
        assert heard.status == 400, fields
        assert_safe(heard)
    assert (await browser.post("/plans", csrf="x", action="retry", scope="all")).status == 403
    heard = await browser.get("/plans/none")
    assert (heard.status, "Make it anew" in text(heard)) == (404, True)
    await planned(browser, "/jobs", "a", action="retry", scope="selected")
    assert (await browser.post("/plans/plan-1/apply", csrf="x")).status == 403
    page = text(await reader.get("/jobs"))
    assert 'id="bulk"' not in page
    assert 'name="ids"' not in page
    assert "/apply" not in text(await reader.get("/plans/plan-1"))
    for target in ("/plans", "/plans/plan-1/apply"):
        fields = {"action": "retry", "scope": "all"} if target == "/plans" else {}
        assert (await reader.post(target, csrf=await reader.csrf(), **fields)).status == 403
    assert await town.status("a") == "failed"
    await planned(browser, "/jobs?queue=none", action="cancel", scope="all")
    assert "Nothing: no job that this can be done to was found" in text(await browser.get("/plans/plan-2"))


async def test_what_comes_late_is_not_deleted_unseen(town: Town) -> None:
    lock = await town.held()
    heard = await town.admin.request(
        "POST", "/admin/job-management/force-fail", json.dumps({"jobId": "held"}), headers=AUTH
    )
    assert heard.status == 200
    browser = await town.browser()
    seen = await browser.looked("held", "delete")
    assert "late result" not in text(await browser.get("/jobs/held/confirm?verb=delete"))
    body = json.dumps({"lock_id": lock, "file_path": "/late"})
    assert (await town.worker.request("POST", "/v1/jobs/held/complete", body)).error == "lock_lost"
    heard = await browser.post("/jobs/held/do", **seen, reason="")
    assert heard.status == 409
    assert "has moved since you looked" in text(heard)
    goes = "It has 1 late result that was not adopted. It is deleted with the job."
    assert goes in text(await browser.get("/jobs/held/confirm?verb=delete"))
    instead = "It has 1 late result that was not adopted. Check whether it can be adopted instead."
    assert instead in text(await browser.get("/jobs/held/confirm?verb=force-reset"))
    assert "late result" not in text(await browser.get("/jobs/held/confirm?verb=run-now"))
    assert (await browser.confirmed("held", "delete")).status == 303
    assert (await town.worker.request("GET", "/v1/jobs/held")).error == "job_not_found"


async def test_of_a_completed_job_what_came_late_is_told_and_no_more(town: Town) -> None:
    lock = await town.held()
    again = await town.again("held")
    for each in (lock, again):
        await town.worker.request("POST", "/v1/jobs/held/complete", json.dumps({"lock_id": each, "file_path": "/x"}))
    assert await town.status("held") == "completed"
    page = text(await (await town.browser()).get("/jobs/held/confirm?verb=delete"))
    assert "Work that came late goes with it: 1 of it." in page
    assert "adopted" not in page


async def test_a_plan_names_the_jobs_to_which_work_came_late(town: Town) -> None:
    await failing(town, "a")
    lock = await town.held()
    await town.admin.request("POST", "/admin/job-management/force-fail", json.dumps({"jobId": "held"}), headers=AUTH)
    await town.worker.request("POST", "/v1/jobs/held/complete", json.dumps({"lock_id": lock, "file_path": "/late"}))
    browser = await town.browser()
    await planned(browser, "/jobs?status=failed", action="delete", scope="all")
    page = text(await browser.get("/plans/plan-1"))
    assert "1 of these jobs has 1 late result that was not adopted. It is deleted with the job." in page
    section = page[page.index('aria-labelledby="h-late"') :].partition("</section>")[0]
    assert re.findall(r'href="/jobs/(\w+)"', section) == ["held"]
    await planned(browser, "/jobs?status=failed", "a", action="delete", scope="selected")
    assert "late result" not in text(await browser.get("/plans/plan-2"))
    await planned(browser, "/jobs?status=failed", "held", action="retry", scope="selected")
    assert "Check whether it can be adopted instead." in text(await browser.get("/plans/plan-3"))


async def test_what_came_late_is_shown_and_adopted(town: Town) -> None:
    locks = [await town.held()]
    for _ in range(2):
        locks.append(await town.again("held"))
    late = []
    for number, lock in enumerate(locks[:2]):
        result = {"file_path": f"/late/{number}", **({"storage_key": "late/1"} if number else {})}
        body = json.dumps({"lock_id": lock, "metadata": {"n": NASTY}, **result})
        heard = await town.worker.request("POST", "/v1/jobs/held/complete", body)
        assert heard.error == "lock_lost"
        late.append(heard.json["details"]["late_result"])
    body = json.dumps({"lock_id": locks[1], "error_message": "disk on fire"})
    assert (await town.worker.request("POST", "/v1/jobs/held/fail", body)).error == "lock_lost"
    browser, reader = await town.browser(), await town.browser(READER)
    page = text(await browser.get("/jobs/held"))
    assert "late_call" in page
    assert "disk on fire" in page
    assert re.findall(r'id="late-(\d+)"', page) == [str(late[1]), str(late[0])], "newest grant first"
    assert "Somebody holds the job" in page
    assert "verb=adopt" not in page
    assert "cannot be done" in text(await browser.get("/jobs/held/confirm?verb=adopt"))
    await town.do("jobs/held/cancel")
    page = text(await browser.get("/jobs/held"))
    assert re.findall(r"verb=adopt&amp;result=(\d+)", page) == [str(late[1]), str(late[0])]
    assert "/late/1" in page
    assert "<script>alert" not in page
    assert "late-" in text(await reader.get("/jobs/held"))
    assert "verb=adopt" not in text(await reader.get("/jobs/held"))
    assert "/artifact" not in text(await browser.get("/jobs/held")), "there is no store to take it from"
    town.admin.services.downloads = Downloads(FileArtifactStore("/nonexistent", "test"), 2)
    for each in (browser, reader):  # to be looked at before it is adopted; the other names none
        page = text(await each.get("/jobs/held"))
        assert re.findall(r'href="(/jobs/held/artifact[^"]*)"', page) == [f"/jobs/held/artifact?late_result={late[1]}"]
    page = text(await browser.get(f"/jobs/held/confirm?verb=adopt&result={late[0]}"))
    assert re.findall(r'class="status (\w+)"', page) == ["cancelled", "completed"]
    assert "/late/0" in page
    assert "/late/1" not in page
    assert f"jobctl adopt held --result {late[0]}" in page
    assert (await browser.get("/jobs/held/confirm?verb=adopt&result=1")).status == 404
    heard = await browser.confirmed("held", "adopt", "it is whole", f"&result={late[0]}")
    assert (heard.status, heard.headers["location"]) == (303, "/jobs/held")
    page = text(await browser.get("/jobs/held"))
    assert "Adopt: done. cancelled → completed" in page
    assert "it is whole" in page
    assert "which is final" in page
    job = (await town.worker.request("GET", "/v1/jobs/held")).data
    assert (job["status"], job["file_path"]) == ("completed", "/late/0")


async def test_what_may_not_complete_a_job_is_not_offered(town: Town) -> None:
    locks = [await town.held(), await town.again("held")]
    late = []
    for lock, result in zip(locks, ({"download_url": "https://x.test/1"}, {"file_path": "/late"}), strict=True):
        if lock == locks[-1]:
            await town.again("held")
        heard = await town.worker.request("POST", "/v1/jobs/held/complete", json.dumps({"lock_id": lock, **result}))
        late.append(heard.json["details"]["late_result"])
    actor: Any = town.admin.app.actor
    actor.policy = Policy(require_download_url=True)
    browser = await town.browser()
    lacks = f"Late result {late[1]} cannot be adopted: it has no download_url"
    page = text(await browser.get("/jobs/held"))
    assert page.count("cannot be adopted") == page.count(lacks) == 1
    assert "or fail it first, then adopt." in page
    await town.do("jobs/held/cancel")
    page = text(await browser.get("/jobs/held"))
    assert re.findall(r"verb=adopt&amp;result=(\d+)", page) == [str(late[0])]
    assert lacks in page
    confirm = text(await browser.get(f"/jobs/held/confirm?verb=adopt&result={late[1]}"))
    assert (lacks in confirm, 'action="/job/do"' in confirm) == (True, False)
    actor.policy = Policy()
    assert lacks not in text(await browser.get("/jobs/held"))
    seen = await browser.looked("held", "adopt", f"&result={late[1]}")
    actor.policy = Policy(require_download_url=True)
    heard = await browser.post("/jobs/held/do", **seen)
    assert (heard.status, lacks in text(heard)) == (400, True)
    assert (await browser.confirmed("held", "adopt", more=f"&result={late[0]}")).status == 303
    assert lacks not in text(await browser.get("/jobs/held")), "of a completed job none is"


async def test_a_late_result_of_a_job_that_has_moved_is_not_adopted(town: Town) -> None:
    lock = await town.held()
    await town.again("held")
    await town.worker.request("POST", "/v1/jobs/held/complete", json.dumps({"lock_id": lock, "file_path": "/late"}))
    await town.do("jobs/held/cancel")
    browser = await town.browser()
    before = await browser.looked("held", "adopt")
    await browser.confirmed("held", "force-reset")
    heard = await browser.post("/jobs/held/do", **before)
    assert (heard.status, "has moved since you looked" in text(heard)) == (409, True)
    now = await browser.looked("held", "adopt")
    heard = await browser.post("/jobs/held/do", **{**now, "result": "77"})
    assert (heard.status, "late_result_not_found" in text(heard)) == (404, True)
    assert await town.status("held") == "queued"


def test_each_deed_is_a_call_of_the_admin_api() -> None:
    calls = {(route.method, route.path) for route in admin_api.ROUTES}
    for deed in JOB_ACTIONS.values():
        method, _, path = deed.api_call.partition(" ")
        assert (method, f"/admin/job-management/{path}") in calls


@pytest.mark.parametrize("verb", sorted(JOB_ACTIONS))
async def test_the_call_of_a_deed_does_what_its_button_does(town: Town, verb: str) -> None:
    """What the page shows for copying is a call as it is, but for what its reader has to put in."""
    lock = await town.held()
    if verb in ("run-now", "adopt", "delete"):
        await town.again("held")
        body = json.dumps({"lock_id": lock, "metadata": 1})
        await town.worker.request("POST", "/v1/jobs/held/complete", body)
        await town.do("jobs/held/cancel")
    if verb == "run-now":
        await town.admin.request("POST", "/admin/job-management/force-reset", '{"jobId": "held"}', AUTH)
        later = json.dumps({"run_at": 4_000_000_000_000})
        await town.admin.request("POST", "/admin/job-management/jobs/held/update", later, AUTH)
    browser = await town.browser()
    page = text(await browser.get(f"/jobs/held/confirm?verb={verb}"))
    words = shlex.split(html.unescape(re.findall(r'<code id="curl">(.*?)</code>', page)[0]))
    assert words[:3] == ["curl", "-sS", "-X"]
    assert lock not in page
    sent = words[words.index("-d") + 1].replace("LOCK_ID", lock) if "-d" in words else None
    target = words[-1].removeprefix("http://localhost")
    heard = await town.admin.request(words[3], target, sent, AUTH)
    assert heard.status == 200, heard.json
    timeline = await town.admin.request("GET", "/admin/job-management/jobs/held/timeline", headers=AUTH)
    if verb == "delete":
        assert timeline.status == 404
    else:
        assert timeline.data["events"][-1]["by"] == "admin"


@pytest.mark.parametrize("verb", ["extend", "release"])
async def test_who_copies_a_call_about_a_lock_is_told_where_its_secret_is(town: Town, verb: str) -> None:
    lock = await town.held()
    page = text(await (await town.browser()).get(f"/jobs/held/confirm?verb={verb}"))
    told = re.findall(r"For <code>LOCK_ID</code> put .*<code>(curl .*?)</code>", page)[0]
    heard = await town.admin.request("GET", html.unescape(told).rpartition("http://localhost")[2], headers=AUTH)
    assert heard.data["lock"]["lock_id"] == lock


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"stuck_after_ms": 0},
            ["as soon as its lock expires", "back to its queue at progress 0 or with attempts left"],
        ),
        ({"on_stall": "requeue", "stuck_after_ms": 90_000}, ["after 1 min 30 s of silence", "back to its queue <span"]),
        ({"on_stall": "fail", "max_stalls": 7}, ["above 7 it fails", "it fails <span"]),
    ],
)
async def test_what_silence_leads_to_is_said_in_words(town: Town, fields: dict[str, Any], said: list[str]) -> None:
    await town.do("jobs", id="a", **fields)
    page = text(await (await town.browser()).get("/jobs/a"))
    assert [words for words in said if words not in page] == []


async def test_a_job_is_run_now_and_a_finished_one_deleted(town: Town) -> None:
    await town.do("jobs", id="late", delay_ms=3_600_000)
    browser = await town.browser()
    assert (await browser.confirmed("late", "run-now")).status == 303
    assert "verb=run-now" not in text(await browser.get("/jobs/late"))
    assert (await browser.confirmed("late", "cancel")).status == 303
    heard = await browser.confirmed("late", "delete")
    assert (heard.status, heard.headers["location"]) == (303, "/jobs")
    assert "Job late was deleted" in text(await browser.get("/jobs"))
    assert (await browser.get("/jobs/late")).status == 404


async def refused_as_moved(browser: Browser, job_id: str, fields: dict[str, str]) -> None:
    heard = await browser.post(f"/jobs/{job_id}/do", **fields)
    assert (heard.status, "The job has changed since you read it" in text(heard)) == (409, True)
    assert_safe(heard)


@pytest.mark.parametrize("verb", ["force-fail", "cancel", "force-reset", "extend", "release"])
async def test_nothing_is_done_to_a_job_that_has_another_holder_than_was_seen(town: Town, verb: str) -> None:
    await town.held()
    browser = await town.browser()
    fields = await browser.looked("held", verb)
    lock = await town.again("held")
    await refused_as_moved(browser, "held", fields)
    assert await town.status("held") == "processing"
    done = await town.worker.request("POST", "/v1/jobs/held/complete", json.dumps({"lock_id": lock, "metadata": 1}))
    assert done.status == 200, "it was neither ended nor taken away"


@pytest.mark.parametrize("verb", ["delete", "force-reset"])
async def test_nothing_is_done_to_a_job_that_has_come_back_to_its_status_by_a_detour(town: Town, verb: str) -> None:
    await failing(town, "a")
    browser = await town.browser()
    fields = await browser.looked("a", verb)
    lock = await town.again("a")
    await town.do("jobs/a/fail", lock_id=lock, error_message="SECOND, another story")
    await refused_as_moved(browser, "a", fields)
    page = text(await browser.get("/jobs/a"))
    assert "SECOND, another story" in page
    assert (await browser.confirmed("a", verb)).status == 303, "it can be done once it was looked at"


async def test_a_job_that_was_changed_and_changed_back_has_moved_too(town: Town) -> None:
    await town.do("jobs", id="a", delay_ms=3_600_000)
    browser = await town.browser()
    fields = await browser.looked("a", "cancel")
    for priority in (5, 0):
        await asyncio.sleep(0.002)
        body = json.dumps({"priority": priority})
        await town.admin.request("POST", "/admin/job-management/jobs/a/update", body, AUTH)
    await refused_as_moved(browser, "a", fields)


async def test_no_grant_slips_in_between_the_look_and_the_deed(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody takes the job when all that the form asks first has been answered."""
    await town.do("jobs", id="a")
    browser = await town.browser()
    fields = await browser.looked("a", "force-fail")
    actor, ask = town.admin.actor, town.admin.actor.ask

    async def slow(command: Any, **asked: Any) -> Any:
        if isinstance(command, ForceFail):
            monkeypatch.setattr(actor, "ask", ask)
            await town.do("jobs/a/start", worker="w-1")
        return await ask(command, **asked)

    monkeypatch.setattr(actor, "ask", slow)
    await refused_as_moved(browser, "a", fields)
    assert await town.status("a") == "processing"
    heard = await town.admin.request("GET", "/admin/job-management/audit", headers=AUTH)
    latest = heard.data["entries"][0]
    assert (latest["what"], latest["outcome"]) == ("force-fail", "invalid_transition")


async def test_signs_of_life_do_not_make_a_job_another_one(town: Town) -> None:
    lock = await town.held()
    browser = await town.browser()
    fields = await browser.looked("held", "force-fail")
    await town.do("jobs/held/progress", lock_id=lock, progress=50)
    assert (await browser.post("/jobs/held/do", **fields)).status == 303
    assert await town.status("held") == "failed"


async def test_what_cannot_be_done_is_refused_though_the_job_is_what_was_seen(town: Town) -> None:
    await town.held()
    browser = await town.browser()
    csrf = await browser.csrf()
    await town.do("jobs/held/cancel")
    seen = (await browser.looked("held", "delete"))["seen"]
    for verb in ("extend", "release", "force-fail"):
        heard = await browser.post("/jobs/held/do", csrf=csrf, verb=verb, seen=seen)
        assert heard.status in (400, 409), "no lock to name"
        assert "Not done" in text(heard)
        assert "has moved" not in text(heard)
    heard = await browser.post("/jobs/nobody/do", csrf=csrf, verb="force-fail", seen=seen)
    assert heard.status == 404
    page = text(await browser.get("/jobs/held/confirm?verb=force-fail"))
    assert "cannot be done to the job as it is" in page


async def test_a_paused_queue_is_told_on_every_page(town: Town) -> None:
    await town.held()
    browser = await town.browser()
    heard = await browser.post("/queues/pause", name="video", csrf=await browser.csrf())
    assert (heard.status, heard.headers["location"]) == (303, "/queues")
    for target in [*PAGES, "/jobs/held", "/jobs/held/confirm?verb=cancel"]:
        assert '<strong>Queue paused:</strong>\n<a href="/jobs?queue=video">video</a>' in text(
            await browser.get(target)
        )
    await browser.post("/queues/video/resume", csrf=await browser.csrf())
    assert "hands out its jobs again" in text(await browser.get("/queues"))
    assert "Queue paused" not in text(await browser.get("/queues"))
    heard = await browser.post("/queues/a%20b/pause", csrf=await browser.csrf())
    assert heard.status == 400


async def test_a_page_whose_job_is_deleted_says_so_and_offers_nothing(town: Town) -> None:
    browser = await town.browser()
    await town.do("jobs", id="a")
    await town.do("jobs/a/cancel")
    assert "/jobs/a/confirm?verb=" in text(await browser.get("/jobs/a", HX_Request="true"))
    await browser.confirmed("a", "delete")
    heard = await browser.get("/jobs/a", HX_Request="true")
    assert heard.status == 200
    assert_safe(heard)
    page = text(heard)
    assert "The job was deleted while this page was open" in page
    assert ("confirm" in page, "<form" in page, "/audit?what=delete&amp;job_id=a" in page) == (False, False, True)
    assert (await browser.get("/jobs/a")).status == 404, "who comes anew finds none"
    assert (await browser.get("/jobs/%20", HX_Request="true")).status == 400


@pytest.mark.parametrize(
    ("hint", "shown"),
    [
        ("Look: jobctl workers, jobctl timeline ID", 'Look: <a href="/workers">jobctl workers</a>, jobctl timeline ID'),
        ("at the oldest: jobctl stats", 'at the oldest: <a href="/">jobctl stats</a>'),
        ("jobctl webhooks. The", '<a href="/webhooks">jobctl webhooks</a>. The'),
        ("who: jobctl timeline a:b-1", 'who: <a href="/jobs/a%3Ab-1">jobctl timeline a:b-1</a>'),
        ("<b> jobctl locks \x1b", '&lt;b&gt; <a href="/workers#h-locks">jobctl locks</a> \u241b'),
        ("jobctl validate ID, jobctl statsx", "jobctl validate ID, jobctl statsx"),
    ],
)
async def test_a_command_in_a_hint_leads_to_the_page_that_does_the_same(town: Town, hint: str, shown: str) -> None:
    alert = AlertView("stuck_jobs", True, 1_700_000_000_000, 7, 5, hint)
    town.admin.fakes.alerts = [alert]
    browser = await town.browser()
    for page in ("/", "/alerts"):
        assert shown in text(await browser.get(page))


async def test_what_is_done_here_is_in_the_audit_log(town: Town) -> None:
    browser = await town.browser()
    await town.do("jobs", id="a")
    assert (await browser.confirmed("a", "force-fail", "broken")).status == 303
    csrf = await browser.csrf()
    await browser.post("/queues/q/pause", csrf=csrf, reason="we move")
    await browser.post("/cleanup/run", csrf=csrf, reason="now")
    await browser.post("/clock/accept", csrf=csrf, reason=" NTP is right ")
    await browser.confirmed("a", "delete", "not wanted")
    [session] = town.room.sessions._pools["full"].values()
    session.name = "eve"
    await browser.post("/queues/q/resume", {"X-Jobd-Operator": "mallory"}, csrf=csrf)
    program = {"Authorization": f"Bearer {TOKEN}", "X-Jobd-Operator": "script"}
    await Browser(town.admin).post("/queues/q/pause", program)
    heard = await town.admin.request("GET", "/admin/job-management/audit", headers=AUTH)
    found = [
        (each["who"], each["what"], each["job_id"] or each["queue"], each["reason"]) for each in heard.data["entries"]
    ]
    assert found == [
        ("script", "pause", "q", None),
        ("eve", "resume", "q", None),
        ("admin", "delete", "a", "not wanted"),
        ("admin", "accept-clock", None, "NTP is right"),
        ("admin", "cleanup", None, "now"),
        ("admin", "pause", "q", "we move"),
        ("admin", "force-fail", "a", "broken"),
        ("admin", "sign-in", None, None),
    ]
    assert {each["address"] for each in heard.data["entries"]} == {"127.0.0.1"}


async def test_before_the_clock_is_accepted_it_says_what_would_be_deleted(town: Town) -> None:
    browser = await town.browser()
    assert 'href="/clock"' in text(await browser.get("/alerts"))
    page = text(await browser.get("/clock"))
    assert "2 finished jobs" in page
    assert "old-2" in page
    assert "The clock is right" in page
    town.admin.fakes.past_jobs = [f"old-{number}" for number in range(70)]
    assert "These are the first of them" in text(await browser.get("/clock"))
    town.admin.fakes.past_jobs = []
    assert "No finished job would be deleted" in text(await browser.get("/clock"))
    town.admin.fakes.no_preview = ApiError("overloaded", "Too much is waiting.")
    page = text(await browser.get("/clock"))
    assert "The clock is right" not in page
    assert "Too much is waiting" in page
    town.admin.fakes.accepted = True
    page = text(await browser.get("/clock"))
    assert "Back to the alerts" in page
    town.admin.fakes.accepted, town.admin.fakes.no_preview = False, None
    page = text(await (await town.browser(READER)).get("/clock"))
    assert "Is the clock right?" in page
    assert "<button>The clock is right" not in page


async def test_housekeeping(town: Town) -> None:
    browser = await town.browser()
    assert "/clock" in text(await browser.get("/alerts"))
    csrf = await browser.csrf()
    for target, onward, said in (
        ("/cleanup/run", "/cleanup", "The pass took 6 ms: 1 recovered"),
        ("/cleanup/recover", "/cleanup", "1 stuck jobs recovered: 1 queued again, 0 failed."),
        ("/clock/accept", "/alerts", "The clock is accepted"),
    ):
        heard = await browser.post(target, csrf=csrf)
        assert (heard.status, heard.headers["location"]) == (303, onward)
        assert said in text(await browser.get(onward))
    assert town.admin.fakes.forced == [True]
    assert town.admin.fakes.accepted
    page = text(await browser.get("/alerts"))
    assert "bad-1" in page
    assert 'href="/clock"' not in page


async def test_the_jobs_of_a_silent_worker_are_taken_back(town: Town) -> None:
    browser, reader = await town.browser(), await town.browser(READER)
    await town.do("jobs", id="held")
    await town.do("claim", worker="w <7>")
    assert "silent" not in text(await browser.get("/jobs/held"))
    town.ahead_ms = Policy().lock_ttl_ms
    place = "/workers/take-back?name=w%20%3C7%3E"
    for page in ("/jobs/held", "/workers", "/workers?state=silent"):
        heard = await browser.get(page)
        assert_safe(heard)
        assert 'class="badge bad">silent' in text(heard), page
        assert f'href="{place}"' in text(heard), page
        assert place not in text(await reader.get(page)), page
    assert 'class="badge bad">silent' in text(await browser.get("/jobs"))
    overview = text(await browser.get("/"))
    assert "1 silent</a> w &lt;7&gt;" in overview
    assert (await reader.get(place)).status == 403
    heard = await browser.get(place)
    assert_safe(heard)
    page = text(heard)
    assert 'action="/workers/take-back"' in page
    assert "No update from worker w &lt;7&gt;" in page
    assert "jobctl take-back &#39;w &lt;7&gt;&#39;" in page
    assert await town.status("held") == "processing", "nothing is done yet"
    assert (await browser.post("/workers/take-back", name="w <7>")).status == 403, "without the token of the form"
    csrf = await browser.csrf()
    heard = await browser.post("/workers/take-back", name="w <7>", reason="dead", csrf=csrf)
    assert (heard.status, heard.headers["location"]) == (303, "/workers")
    assert "Jobs taken back: 1 (1 queued again, 0 failed)." in text(await browser.get("/workers"))
    assert await town.status("held") == "queued"
    heard = await browser.get(place)
    assert (heard.status, "is gone, not silent: it holds no job" in text(heard)) == (409, True)
    heard = await browser.post("/workers/take-back", name="w <7>", csrf=csrf)
    assert (heard.status, "not silent" in text(heard)) == (409, True)
    assert (await browser.get("/workers/take-back?name=nobody")).status == 404


async def test_housekeeping_is_shown_before_it_is_done(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    browser, reader, fakes = await town.browser(), await town.browser(READER), town.admin.fakes
    page = text(await browser.get("/cleanup"))
    assert 'method="post" action="/cleanup' not in page, "no click does it unseen"
    assert re.findall(r'href="(/cleanup/confirm[^"]*)"', page) == [
        "/cleanup/confirm?what=run",
        "/cleanup/confirm?what=recover",
    ]
    assert "/cleanup/confirm" not in text(await reader.get("/cleanup"))
    assert (await reader.get("/cleanup/confirm?what=run")).status == 403
    heard = await browser.get("/cleanup/confirm?what=run")
    assert_safe(heard)
    page = text(heard)
    moves = re.findall(r"<li>(\d+)", page[page.index('class="transitions"') :].partition("</ul>")[0])
    assert moves == ["1", "1", "2"]
    assert re.findall(r'href="/jobs/(\w)"', page) == ["a", "b"]
    assert "stalled" in page
    assert 'action="/cleanup/run"' in page
    assert fakes.forced == [], "nothing is done yet"
    page = text(await browser.get("/cleanup/confirm?what=recover"))
    assert re.findall(r'href="/jobs/(\w)"', page) == ["a"]
    assert 'action="/cleanup/recover"' in page
    many = PreviewView([Recovery("f", "failed", "<x>")] * 1000, 0, [], [f"d{n}" for n in range(1000)], [], True, 1)

    async def preview(look_s: float) -> PreviewView | ApiError:
        return many

    monkeypatch.setattr(town.admin.services.maintainer, "preview", preview)
    page = text(await browser.get("/cleanup/confirm?what=run"))
    assert "1\u202f000 or more" in page
    assert "950 more." in page
    assert "&lt;x&gt;" in page
    assert "nothing is deleted or failed by age" in page, "the clock is suspect"
    many = PreviewView([], 0, [], [], ["w1", "w2"], True, 1, more_mended=True)
    page = text(await browser.get("/cleanup/confirm?what=run"))
    assert "2 or more with issues" in page
    assert "Not all jobs were looked at" in page
    many = PreviewView([], 0, [], [], [], True, 1, more_mended=True)
    page = text(await browser.get("/cleanup/confirm?what=run"))
    assert "Nothing as far as was looked" in page
    assert "Not all jobs were looked at" in page
    assert "Not all jobs were looked at" not in text(await browser.get("/cleanup/confirm?what=recover"))
    many = PreviewView([], 0, ["a"], [], [], False, 1)
    assert "Not all jobs were looked at" not in text(await browser.get("/cleanup/confirm?what=run"))
    assert "Nothing as it is now." in text(await browser.get("/cleanup/confirm?what=recover"))

    async def refuses(look_s: float) -> PreviewView | ApiError:
        return ApiError("overloaded", "later")

    monkeypatch.setattr(town.admin.services.maintainer, "preview", refuses)
    assert (await browser.get("/cleanup/confirm?what=run")).status == 503
    assert (await browser.get("/cleanup/confirm?what=all")).status == 400


async def test_webhooks_are_shown_with_how_they_are_going(town: Town) -> None:
    browser, fakes = await town.browser(), town.admin.fakes
    page = text(await browser.get("/webhooks"))
    assert WEBHOOK.url in page
    assert 'href="/webhooks/q?state=waiting">1</a>' in page
    shown = {
        "starting": ">starting<",
        "closed": ">in order<",
        "open": ">on a break<",
        "half_open": ">one message is tried<",
    }
    for state, words in shown.items():
        fakes.hooks = [replace(WEBHOOK, state=state, failing_since=None, events=["job.<b>"])]
        page = text(await browser.get("/webhooks"))
        assert words in page
        assert "job.&lt;b&gt;" in page
        assert "next try" not in page
    later = round(time.time() * 1000) + 130_000
    for state, since in (("open", 1), ("closed", 1)):
        fakes.hooks = [replace(WEBHOOK, state=state, failing_since=since, next_try_at=later)]
        for place in ("/webhooks", "/webhooks/q"):
            assert re.search(rf'next try in <time [^>]*data-until="{later}"[^>]*>2 min', text(await browser.get(place)))
    fakes.hooks = [replace(WEBHOOK, state="closed", failing_since=1)]
    assert ">failing<" in text(await browser.get("/webhooks/q"))
    fakes.hooks = []
    assert "No webhook is configured" in text(await browser.get("/webhooks"))
    heard = await browser.get("/webhooks/q")
    assert (heard.status, "There is no webhook q" in text(heard)) == (404, True)


async def test_messages_to_a_webhook_are_filtered_walked_and_sent_again(town: Town) -> None:
    browser, fakes = await town.browser(), town.admin.fakes
    page = text(await browser.get("/webhooks/q?state=given_up&cursor=9"))
    assert fakes.asked_deliveries == [("q", "given_up", 9, 50)]
    assert '<option value="given_up" selected>' in page
    assert 'href="/webhooks/q?state=given_up&amp;cursor=7"' in page
    assert 'href="/webhooks/q?state=given_up">Newest' in page
    assert 'href="/jobs/a">a</a>' in page
    assert "data-interval-s" not in page, "what is older stays where it is"
    assert "data-interval-s" in text(await browser.get("/webhooks/q"))
    heard = await browser.get("/webhooks/q?state=lost")
    assert (heard.status, "state" in text(heard)) == (400, True)
    csrf = await browser.csrf()
    heard = await browser.post("/webhooks/q/resend", csrf=csrf, id="7", state="given_up", reason="they ask")
    assert (heard.status, heard.headers["location"]) == (303, "/webhooks/q?state=given_up")
    page = text(await browser.get("/webhooks/q"))
    assert "Message 7 is on its way." in page
    assert 'aria-label="Send message 7 now">Send now</button>' in page, "it waits"
    assert '<button form="send-form" formaction="/webhooks/q/resend" name="id" value="7"' in page
    assert '<form id="send-form"' in page.partition("data-interval-s")[0], "what renews itself takes no words away"
    heard = await browser.post("/webhooks/q/test", csrf=csrf, reason=" does it hear us? ")
    assert heard.headers["location"] == "/webhooks/q"
    assert "A test is on its way: message 7." in text(await browser.get("/webhooks/q"))
    audit = await town.admin.request("GET", "/admin/job-management/audit", headers=AUTH)
    assert [(each["what"], each["details"], each["reason"]) for each in audit.data["entries"]] == [
        ("test-webhook", {"webhook": "q"}, "does it hear us?"),
        ("resend-delivery", {"webhook": "q", "delivery": 7}, "they ask"),
        ("sign-in", {"access": "full"}, None),
    ]
    assert (await browser.post("/webhooks/q/resend", csrf=csrf, id="8")).status == 404
    assert (await browser.post("/webhooks/q/resend", csrf=csrf, id="7", state="lost")).status == 400
    assert (await browser.post("/webhooks/none/test", csrf=csrf)).status == 404
    assert len((await town.admin.request("GET", "/admin/job-management/audit", headers=AUTH)).data["entries"]) == 3


async def test_all_that_was_given_up_is_counted_and_sent_again(town: Town) -> None:
    browser, fakes = await town.browser(), town.admin.fakes
    assert 'href="/webhooks/q/again"' in text(await browser.get("/webhooks/q"))
    assert "again" not in text(await (await town.browser(READER)).get("/webhooks/q")).partition("<main")[2].lower()
    fakes.lost = (MAX_BACKLOG, 99_999)
    page = text(await browser.get("/webhooks/q/again"))
    assert re.search(r"<strong>10\s?000</strong> messages were given up and are kept\.", page)
    assert "No more are kept than that" in page
    fakes.lost = (2, 9)
    page = text(await browser.get("/webhooks/q/again"))
    assert "<strong>2</strong> messages were given up and are kept." in page
    assert "No more are kept than that" not in page
    assert "<button>Send 2 again</button>" in page
    assert 'name="upto" value="9"' in page
    csrf = await browser.csrf()
    heard = await browser.post("/webhooks/q/resend-given-up", csrf=csrf, upto="9", reason="mended")
    assert (heard.status, heard.headers["location"]) == (303, "/webhooks/q")
    [last, *_] = (await town.admin.request("GET", "/admin/job-management/audit", headers=AUTH)).data["entries"]
    assert (last["what"], last["reason"]) == ("resend-given-up", "mended")
    assert fakes.resent == [("q", 9)]
    assert "3 messages that were given up: sent again." in text(await browser.get("/webhooks/q"))
    assert ("admin", "resend-given-up", "done", {"webhook": "q", "resent": 3}) in await deeds(town)
    fakes.hooks = [replace(WEBHOOK, failing_since=1)]
    assert "Mend its receiver first" in text(await browser.get("/webhooks/q/again"))
    fakes.lost = (0, 0)
    assert "No message is given up." in text(await browser.get("/webhooks/q/again"))
    assert (await browser.post("/webhooks/q/resend-given-up", csrf=csrf)).status == 400
    assert (await browser.post("/webhooks/q/resend-given-up", upto="9")).status == 403
    assert (await browser.get("/webhooks/none/again")).status == 404


async def test_a_message_says_what_became_of_it(town: Town) -> None:
    browser, fakes = await town.browser(), town.admin.fakes
    ended = replace(DELIVERY, due_at=None, ended_at=1_700_000_000_000)
    found = [
        replace(DELIVERY, id=1, due_at=4_000_000_000_000, subject="queues/a b"),
        replace(DELIVERY, id=2, subject="alerts/stuck_jobs"),
        replace(ended, id=3, state="delivered", status=204, error=None),
        replace(ended, id=4, state="given_up", error="<no>"),
    ]

    fakes.deliveries_page = DeliveryPage(found, None)
    page = text(await browser.get("/webhooks/q"))
    rows = {int(number): row for number, row in re.findall(r'<tr id="delivery-(\d+)">(.*?)</tr>', page, re.DOTALL)}
    said = {
        1: (">waiting<", "next try", 'queue <a href="/jobs?queue=a%20b">a b</a>', ">Send now<"),
        2: (">waiting<", ">due", "alerts stuck_jobs", ">Send now<"),
        3: (">delivered<", "HTTP 204", ">Send again<"),
        4: (">given up<", "&lt;no&gt;", ">Send again<"),
    }
    assert rows.keys() == said.keys()
    for number, words in said.items():
        for each in words:
            assert each in rows[number], (number, each)
    fakes.hooks = [replace(WEBHOOK, state="open", failing_since=1, next_try_at=3_000_000_000_000)]
    page = text(await browser.get("/webhooks/q"))
    assert page.count(">after the break") == 1, "one is due before its end, the other later"
    assert page.count(">next try <time") == 1
    found.clear()
    assert "Nothing was sent yet" in text(await browser.get("/webhooks/q"))
    assert "No message is given up." in text(await browser.get("/webhooks/q?state=given_up"))


async def test_firing_alerts_are_told_with_their_hints(town: Town) -> None:
    browser = await town.browser()
    firing = AlertView("stuck_jobs", True, 1_700_000_000_000, 7, 5, "look at <the> workers")
    town.admin.fakes.alerts = [firing]
    page = text(await browser.get("/"))
    assert "1 alert fires:" in page
    assert "look at &lt;the&gt; workers" in page
    for target in PAGES:
        for headers in ({}, {"HX_Request": "true"}):
            assert ("1 alert fires:" in text(await browser.get(target, **headers))) == (target != "/alerts")


async def test_a_page_that_renews_itself_after_its_session_has_ended_goes_to_the_sign_in(town: Town) -> None:
    heard = await Browser(town.admin).get("/jobs?queue=a", HX_Request="true")
    assert (heard.status, heard.headers["hx-redirect"]) == (401, "/sign-in?next=%2Fjobs%3Fqueue%3Da")
    assert (await Browser(town.admin).get("/chart.json")).status == 401


# -- live --------------------------------------------------------------------------------------------------------------


class Listens:
    """An open page's stream of news."""

    def __init__(self, line: RawConnection) -> None:
        self.line = line
        self.headers = ""

    async def events(self) -> str:
        """The next piece of the stream, nothing at its end."""
        size = int(await self.line.reader.readuntil(b"\r\n"), 16)
        piece = await self.line.reader.readexactly(size + 2)
        return piece[:-2].decode()


async def listens(town: Town, browser: Browser, target: str = "/live") -> Listens:
    line = await town.admin.connect()
    line.send(request_bytes("GET", target, headers={"Cookie": browser.cookie}))
    found = Listens(line)
    found.headers = (await line.reader.readuntil(b"\r\n\r\n")).decode()
    assert found.headers.startswith("HTTP/1.1 200 ")
    assert await found.events() == "retry: 2000\nevent: live\ndata:\n\n"
    return found


NEWS = "event: change\ndata:\n\n"


async def test_an_open_page_hears_of_news_that_concern_it_and_of_nothing_else(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_updates, "MIN_INTERVAL_S", 0.0)
    monkeypatch.setattr(live_updates, "MIN_LIST_INTERVAL_S", 0.0)
    lock = await town.held()
    browser, reader = await town.browser(), await town.browser(READER)
    job = await listens(town, browser, "/live?job_id=held")
    other = await listens(town, reader, "/live?queue=mail")
    everything = await listens(town, browser)
    assert "content-type: text/event-stream" in job.headers.lower()
    await town.do("jobs/held/progress", lock_id=lock, progress=1)
    assert (await job.events(), await everything.events()) == (NEWS, NEWS)
    await town.do("jobs", id="b", queue="mail")
    assert (await other.events(), await everything.events()) == (NEWS, NEWS)
    assert town.admin.services.feed.listeners == 3
    for each in (job, other, everything):
        await each.line.close()
    while town.admin.services.feed.listeners:
        await town.admin.request("GET", "/healthz")


async def test_a_page_hears_of_a_thousand_events_once_a_second(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    browser = await town.browser()
    heard = await listens(town, browser)
    await town.do("jobs/bulk", jobs=[{"id": f"job-{number}"} for number in range(500)])
    assert await heard.events() == NEWS
    began = asyncio.get_running_loop().time()
    await town.do("jobs/bulk", jobs=[{"id": f"more-{number}"} for number in range(500)])
    assert await heard.events() == NEWS
    assert asyncio.get_running_loop().time() - began >= live_updates.MIN_INTERVAL_S / 2
    assert live_updates.MIN_INTERVAL_S >= 1
    assert live_updates.MIN_LIST_INTERVAL_S >= 1


@pytest.mark.parametrize("way", ["sign-out", "token", "age"])
async def test_a_stream_of_news_ends_with_its_session(town: Town, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(live_updates, "SESSION_CHECK_S", 0.01)
    browser = await town.browser()
    heard = await listens(town, browser)
    if way == "sign-out":
        await browser.post("/sign-out", csrf=await browser.csrf())
    elif way == "token":
        town.admin.app.authenticator.replace_tokens(["another-token-0123456789abcdef"], [])
    else:
        town.now_s += sessions.MAX_AGE_S
    assert await heard.events() == "event: end\ndata:\n\n"
    assert await heard.events() == ""
    assert (await browser.get("/live")).status == 401


async def test_a_page_that_is_open_keeps_its_session_and_its_stream(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_updates, "SESSION_CHECK_S", 0.01)
    monkeypatch.setattr(live_updates, "HEARTBEAT_S", 0.05)
    browser = await town.browser()
    heard = await listens(town, browser)
    for _ in range(3):
        town.now_s += sessions.IDLE_S - 1
        assert await heard.events() == ": still here\n\n"
    assert (await browser.get("/")).status == 200


async def test_without_a_place_or_a_session_there_is_no_stream_of_news(town: Town) -> None:
    browser = await town.browser()
    assert (await Browser(town.admin).get("/live")).status == 401
    assert (await browser.get("/live?job_id=a%20b")).status == 400
    assert (await browser.get("/live?job=a")).status == 400
    taken = [await listens(town, browser) for _ in range(3)]
    heard = await browser.get("/live")
    assert (heard.status, heard.error) == (503, "overloaded")
    town.admin.services.feed.close()
    for each in taken:
        assert await each.events() == ""
    assert (await browser.get("/live")).error == "shutting_down"
    heard = await town.admin.request("GET", "/live", headers=AUTH)
    assert heard.error == "shutting_down", "a program may listen, too"
    line = await town.admin.connect()
    heard = await line.request("HEAD", "/live", headers={"Cookie": browser.cookie})
    assert (heard.status, heard.headers["content-type"]) == (200, "text/event-stream")


@pytest.mark.parametrize(
    ("target", "news"),
    [
        ("/", "/live"),
        ("/jobs", "/live"),
        ("/jobs?queue=video", "/live?queue=video"),
        ("/jobs/held", "/live?job_id=held"),
        ("/queues", "/live"),
    ],
)
async def test_a_page_says_where_it_hears_of_news(town: Town, target: str, news: str) -> None:
    await town.held()
    page = text(await (await town.browser()).get(target))
    assert f'data-events-url="{news}"' in page
    assert re.search(r'data-interval-s="\d"', page)


# -- the chart ---------------------------------------------------------------------------------------------------------


async def test_the_charts_have_an_hour_and_a_day_of_what_happened(town: Town) -> None:
    browser = await town.browser()
    await town.held()
    page = text(await browser.get("/"))
    assert re.search(r'<span class="number">1</span> created in the last minute', page)
    assert re.search(r"counted since <time[^>]*>\d+ m?s ago</time>", page)
    chart = (await browser.get("/chart.json")).json["data"]
    for name, steps, step_s in (("hour", STEPS, 10), ("day", SLOTS, 600)):
        lines = chart[name]
        assert {len(line) for line in lines.values()} == {steps}
        assert lines["at"] == list(range(lines["at"][0], lines["at"][0] + steps * step_s, step_s))
    assert 0 < time.time() * 1000 - chart["since"] < 600_000


def change(kind: Any, at: int, queue: str = "q", before: str | None = "processing") -> Change:
    return Change(None, None, Event(1, at, kind, 1, "a", queue, before, None, "client"))


NOW = 1_700_000_000_000 // SLOT_MS * SLOT_MS


def test_the_recorder_counts_by_steps_and_forgets_after_an_hour_and_a_day() -> None:
    recorder = Timeseries(NOW - 86_400_000)
    recorder.record([change("completed", NOW - 30 * 60_000)])
    kinds = ("created", "imported", "completed", "failed", "retried", "stalled", "expired", "force_failed", "progress")
    recorder.record([change(kind, NOW - STEP_MS) for kind in kinds])
    recorder.record([change("force_failed", NOW - STEP_MS, before="queued")])  # no attempt
    recorder.record([change("adopted", NOW)])
    chart = recorder.chart(NOW)
    assert chart.since == NOW - 86_400_000
    assert (chart.hour.created[-1], chart.hour.completed[-1], chart.hour.failed[-1]) == (2, 1, 4)
    assert (chart.day.created[-1], chart.day.completed[-4:], chart.day.failed[-1]) == (2, [0, 1, 0, 1], 4)
    assert sum(chart.hour.completed) == 2, "the running step is left out"
    rates = recorder.rates(NOW)
    assert (rates.created, rates.completed, rates.failed) == ((2, 2, 2), (2, 3, 3), (4, 4, 4))
    recorder.record([change("created", NOW + step * STEP_MS) for step in range(1, 2 * STEPS)])
    assert len(recorder._hour) == STEPS + 1
    later = NOW + 2 * STEPS * STEP_MS
    assert recorder.rates(later).completed == (0, 0, 3)
    recorder.record([change("created", NOW + slot * SLOT_MS) for slot in range(1, 2 * SLOTS)])
    assert len(recorder._day) == SLOTS + 1


def test_after_a_clock_was_set_back_the_recorder_counts_the_present() -> None:
    """An hour of work two hours ahead fills every step; what lies there is not the past of anybody."""
    ahead = NOW + 2 * 3_600_000
    recorder = Timeseries(NOW - 60_000)
    recorder.record([change("completed", ahead + step * STEP_MS) for step in range(STEPS + 1)])
    for later in (recorder, Timeseries.opened(recorder.saved(), NOW)):
        later.record([change("completed", NOW) for _ in range(100)])
        assert later.rates(NOW).completed == (100, 100, 100)
        assert later.chart(NOW + STEP_MS).hour.completed[-1] == 100
        found = later.queue("q", NOW)
        assert found is not None
        assert found.completed == 100
        assert sum(later.chart(ahead + SLOT_MS).hour.completed) == 0, "nor does it come up once that time is there"


def test_the_charts_go_on_after_a_restart_as_they_were_saved() -> None:
    recorder = Timeseries(NOW - 3_600_000)
    recorder.record([change("completed", NOW - STEP_MS)])
    again = Timeseries.opened(recorder.saved(), NOW)
    assert again.chart(NOW) == recorder.chart(NOW)
    assert (again.since, again.started) == (NOW - 3_600_000, NOW)
    again.record([change("completed", NOW - STEP_MS)])
    assert again.rates(NOW).completed == (2, 2, 2)
    assert again.queue("q", NOW) == QueueRate(0, 1, 0, 1.0), "of queues nothing is kept: counted since the start"
    ahead = Timeseries(NOW + 1).saved()
    odd = b'{"since":1,"hour":{"1":[1,2]},"day":{}}'
    for useless in (b"null", b"{", ahead, odd):
        fresh = Timeseries.opened(useless, NOW)
        assert (fresh.since, fresh.chart(NOW)) == (NOW, Timeseries(NOW).chart(NOW))


def test_the_recorder_knows_the_last_hour_of_each_queue() -> None:
    recorder = Timeseries(NOW - 30 * 60_000)
    assert recorder.queue("q", NOW) is None
    recorder.record([change("completed", NOW - minute * 60_000) for minute in reversed(range(30))])
    recorder.record([change("failed", NOW) for _ in range(10)])
    recorder.record([change("created", NOW, "other")])
    found, other = recorder.queue("q", NOW), recorder.queue("other", NOW)
    assert found is not None
    assert other is not None
    assert (found.created, found.completed, found.failed, found.per_minute) == (0, 30, 10, 1.0)
    assert (found.failed_share, other.failed_share) == (25.0, None)
    later = recorder.queue("q", NOW + 61 * 60_000)
    assert later is not None
    assert (later.completed, later.failed, later.per_minute) == (0, 0, 0.0)
    recorder.record([change("created", NOW, f"queue-{number}") for number in range(MAX_QUEUES)])
    assert recorder.queue("q", NOW) is None, "so many queues are known, and those of late"


async def test_a_queue_says_what_it_gets_done_and_what_fails(town: Town) -> None:
    browser = await town.browser()
    for number in range(4):
        lock = await town.held(f"job-{number}")
        verb, body = ("fail", {"error_message": "e"}) if number == 0 else ("complete", {"metadata": 1})
        await town.do(f"jobs/job-{number}/{verb}", lock_id=lock, **body)
    page = text(await browser.get("/queues"))
    assert re.search(r'data-label="Done a minute" class="figure">3<', page)
    assert re.search(r'data-label="Failed attempts" class="figure">1 <span class="error">25.0&nbsp;%<', page)
    assert "time since the start" in page
    assert re.search(r"25.0 %</span> of the attempts", text(await browser.get("/")))


async def test_the_page_of_jobs_names_queues_without_looking_at_them(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    await town.do("jobs/bulk", jobs=[{"id": f"job-{number}", "queue": f"q-{number}"} for number in range(5)])
    looked: list[str] = []
    monkeypatch.setattr(Book, "oldest_due_at", lambda book, queue: looked.append(queue))
    monkeypatch.setattr(pages, "MAX_QUEUE_NAMES", 3)
    browser = await town.browser()
    names = "".join(f'<option value="q-{number}"></option>' for number in range(3))
    for target in ("/jobs", "/jobs?since=nonsense"):
        assert f'<datalist id="queue-names">{names}</datalist>' in text(await browser.get(target))
    monkeypatch.delattr(Services, "queue_names")
    assert "job-4" in text(await browser.get("/jobs", HX_Request="true")), "what is renewed names no queues"
    assert looked == []


async def walked(browser: Browser, target: str, row: str) -> list[list[str]]:
    """What the rows of all pages are about."""
    seen = []
    while target:
        page = text(await browser.get(target))
        seen.append(re.findall(rf'id="{row}-([^"]+)"', page))
        found = re.search(r'rel="next" href="([^"#]+)"', page)
        target = html.unescape(found[1]) if found else ""
    return seen


async def test_queues_and_workers_are_shown_page_by_page(town: Town) -> None:
    names = [f"q-{number:03}" for number in range(230)]
    await town.do("jobs/bulk", jobs=[{"id": f"job-{name}", "queue": name} for name in names])
    for number in range(120):
        await town.do(f"jobs/job-q-{number:03}/start", worker=f"w-{number:03}")
    await town.do("claim", worker="all", queues=names[120:220], limit=100)
    browser = await town.browser()
    pages = await walked(browser, "/queues", "queue")
    assert pages == [names[:100], names[100:200], names[200:]]
    assert 'href="/queues">First' in text(await browser.get("/queues?cursor=q-100"))
    assert "No queue is behind that one" in text(await browser.get("/queues?cursor=z"))
    csrf = await browser.csrf()
    for name in names[205:]:
        assert (await browser.post(f"/queues/{name}/pause", csrf=csrf)).status == 303
    page = text(await browser.get("/"))
    assert "20+ queues paused:" in page
    assert "and 12 or more." in page
    pages = await walked(browser, "/workers", "worker")
    assert [len(page) for page in pages] == [50, 50, 21]
    assert sorted(itertools.chain(*pages)) == ["all", *(f"w-{number:03}" for number in range(120))]
    page = text(await browser.get("/workers"))
    assert re.search(r'id="worker-all">.*?class="figure">100<.*?and 97 more', page, re.DOTALL)
    assert "No more workers" in text(await browser.get("/workers?seen=1%20w"))
    assert (await browser.get("/workers?seen=w")).status == 400


async def test_the_job_that_waits_longest_is_one_step_away(town: Town) -> None:
    browser = await town.browser()
    assert "none waits" in text(await browser.get("/"))
    town.admin.fakes.oldest_due = OldestDue("first", "a", 1_700_000_000_000)
    assert '<a href="/jobs/first">first</a>, due' in text(await browser.get("/"))


LEFT = [
    ("https://e.test/a?b=1&c=2", True),
    ("http://e.test/", True),
    ("javascript:alert(1)", False),
    ("http://127.0.0.1:18899/out.mp4", False),
    ("http://127.1/", False),
]


@pytest.mark.parametrize(("url", "linked"), LEFT)
async def test_what_a_worker_left_elsewhere_is_a_link_where_it_is_one(town: Town, url: str, linked: bool) -> None:
    """It leads over a page of no origin, which itself leads to nothing but that."""
    lock = await town.held()
    await town.do("jobs/held/complete", lock_id=lock, download_url=url)
    browser = await town.browser()
    page = text(await browser.get("/jobs/held"))
    assert ('<a href="/jobs/held/elsewhere" rel="noreferrer noopener">' in page) == linked
    assert html.escape(url) in page
    assert ("No link: " in page) == url.startswith("http://127")
    heard = await browser.get("/jobs/held/elsewhere")
    assert heard.status == (200 if linked else 404)
    if linked:
        assert f'<a href="{html.escape(url)}" rel="noreferrer noopener">' in text(heard)
        policy = heard.headers["content-security-policy"]
        assert policy.startswith("sandbox allow-downloads; default-src 'none';")
        assert "cross-origin-opener-policy" not in heard.headers  # with it browsers show no page of a sandbox
        style = re.search("<style>(.*)</style>", text(heard))
        assert style
        digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
        assert f"style-src 'sha256-{digest}'" in policy
    assert (await Browser(town.admin).get("/jobs/held/elsewhere")).headers["location"].startswith("/sign-in")
    assert (await browser.get("/jobs/nobody/elsewhere")).status == 404


@pytest.mark.parametrize(("url", "linked"), LEFT)
async def test_what_came_late_is_a_link_where_it_is_one(town: Town, url: str, linked: bool) -> None:
    lock = await town.held()
    await town.again("held")
    heard = await town.worker.request(
        "POST", "/v1/jobs/held/complete", json.dumps({"lock_id": lock, "download_url": url})
    )
    assert heard.status == 409
    browser = await town.browser()
    page = text(await browser.get("/jobs/held"))
    assert html.escape(url) in page
    place = re.search(r'<a href="(/jobs/held/elsewhere\?late_result=\d+)"', page)
    assert (place is not None) == linked
    if place is not None:
        assert html.escape(url) in text(await browser.get(place[1]))
    assert (await browser.get("/jobs/held/elsewhere?late_result=99")).status == 404
    assert (await browser.get("/jobs/held/elsewhere")).status == 404  # it has no result of its own


async def test_under_whatever_name_the_dashboard_is_called_it_links_to_none_of_its_own(town: Town) -> None:
    lock = await town.held()
    await town.do("jobs/held/complete", lock_id=lock, download_url="https://Jobs.test.:9999/a")
    browser = await town.browser()
    town.admin.app.authenticator.hosts = frozenset({"jobs.test", "other.test"})
    for host in ("jobs.test:8770", "other.test"):
        assert "dashboard&#39;s own host" in text(await browser.get("/jobs/held", Host=host))


async def test_locks_are_shown_page_by_page(town: Town) -> None:
    await town.do("jobs/bulk", jobs=[{"id": f"job-{number:03}"} for number in range(250)])
    for _ in range(3):
        await town.do("claim", worker="w", limit=100)
    browser = await town.browser()
    target, seen = "/workers", []
    while target:
        page = text(await browser.get(target))
        assert "of 250</span>" in page
        seen += re.findall(r'id="lock-(job-\d+)"', page)
        found = re.search(r'rel="next" href="([^"]+)"', page)
        target = html.unescape(found[1]).partition("#")[0] if found else ""
    assert seen == [f"job-{number:03}" for number in range(250)]
    assert (await browser.get("/workers?cursor=x")).status == 400


# -- files -------------------------------------------------------------------------------------------------------------


async def test_static_files_are_of_their_type_and_kept_while_they_are_the_same(town: Town) -> None:
    page = text(await (await town.browser()).get("/"))
    links = re.findall(r'(?:src|href)="(/static/[^"]+)"', page)
    assert len(links) >= 6
    kinds = {"js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8", "svg": "image/svg+xml"}
    for link in links:
        heard = await town.admin.request("GET", link)
        assert (heard.status, heard.headers["cache-control"]) == (200, "public, max-age=31536000, immutable")
        assert heard.headers["content-type"] == kinds[link.partition("?")[0].rpartition(".")[2]]
        assert heard.headers["x-content-type-options"] == "nosniff"
        assert heard.body == (STATIC / link.removeprefix("/static/").partition("?")[0]).read_bytes()
        older = await town.admin.request("GET", f"{link.partition('?')[0]}?v=older")
        assert older.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    "name",
    ["none.js", "..", "../routes.py", "%2e%2e%2froutes.py", "..%2froutes.py", "%2Fetc%2Fpasswd", "base.js%00", ".", ""],
)
async def test_what_is_no_static_file_is_not_given_out(town: Town, name: str) -> None:
    heard = await town.admin.request("GET", f"/static/{name}")
    assert heard.status in (400, 401, 404)
    assert b"jobd.dashboard" not in heard.body


async def test_who_has_signed_in_is_named_on_the_docs_too(town: Town) -> None:
    browser = await town.browser()
    page = text(await browser.get("/docs"))
    assert 'action="/sign-out"' in page
    assert 'action="/sign-out"' not in text(await Browser(town.admin).get("/docs"))
    heard = await town.admin.request("GET", "/docs", headers={"Authorization": "Bearer wrong"})
    assert heard.status == 200, "no token is wanted"
    await browser.post("/queues/pause", csrf=await browser.csrf(), name="q")
    assert 'role="status"' not in text(await browser.get("/docs")).partition("<main")[2]
    assert 'class="banner good" role="status"' in text(await browser.get("/queues")), "what was done is told here"


async def test_a_browser_sees_that_there_is_no_such_page(town: Town) -> None:
    accept = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    browser = await town.browser()
    heard = await browser.get("/jobz", **accept)
    assert heard.status == 404
    assert_safe(heard)
    assert "<h1>Not found</h1>" in text(heard)
    assert "There is no such path" in text(heard)
    heard = await browser.get("/sign-out", **accept)
    assert (heard.status, heard.headers["allow"]) == (405, "POST")
    assert "<h1>Not done</h1>" in text(heard)
    assert (await browser.get("/jobz")).error == "not_found", "a program"
    heard = await Browser(town.admin).get("/jobz", **accept)
    assert (heard.status, 'href="/sign-in"' in text(heard)) == (401, True)
    assert_safe(heard)
    heard = await browser.get("/jobz", **accept, Authorization="Bearer wrong")
    assert (heard.status, "allow" in heard.headers) == (401, False), "the token is what is judged"
    heard = await town.admin.request("GET", "/jobz", headers={**accept, **AUTH, "Host": "elsewhere.example"})
    assert (heard.status, "<h1>Not done</h1>" in text(heard)) == (403, True)


async def test_a_program_is_asked_for_its_token_before_it_hears_of_paths(town: Town) -> None:
    heard = await town.admin.request("GET", "/jobz")
    assert (heard.status, heard.error) == (401, "unauthorized")
    heard = await town.admin.request("GET", "/jobz", headers=AUTH)
    assert (heard.status, heard.error) == (404, "not_found")
    heard = await town.worker.request("GET", "/jobz", headers={"Accept": "text/html"})
    assert (heard.status, heard.error) == (404, "not_found")


async def test_the_docs_are_for_everybody_as_their_document_is(town: Town) -> None:
    for place, document, own in (
        ("/docs", "/openapi.json", town.admin),
        ("/docs/worker", "/docs/worker.json", town.worker),
    ):
        heard = await Browser(town.admin).get(place)
        assert heard.status == 200
        assert_safe(heard)
        assert "/static/swagger-ui.js?v=" in text(heard)
        assert f'data-document="{document}"' in text(heard)
        assert re.findall(r'<a href="(/docs[^"]*)" aria-current="page">For', text(heard)) == [place]
        heard = await town.admin.request("GET", document)
        assert heard.body == (await own.request("GET", "/openapi.json")).body
        assert heard.headers["content-type"] == "application/json"


def test_libraries_are_what_was_brought_with_their_licences() -> None:
    note = json.loads(vendor.NOTE.read_text())
    assert set(note) == set(vendor.PACKAGES)
    for name, (version, licence, files) in vendor.PACKAGES.items():
        assert (note[name]["version"], note[name]["licence"]) == (version, licence)
        assert set(note[name]["files"]) == set(files.values())
        assert any("LICENSE" in file for file in files.values())
        for file, digest in note[name]["files"].items():
            assert hashlib.sha256((STATIC / file).read_bytes()).hexdigest() == digest, file


def test_every_file_of_the_room_is_shipped() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    shipped = project["tool"]["setuptools"]["package-data"]["jobd.dashboard"]
    for path in [*STATIC.rglob("*"), *rendering.TEMPLATES.rglob("*")]:
        name = str(path.relative_to(STATIC.parent))
        assert any(fnmatch(name, pattern) for pattern in shipped), name


# -- colours -----------------------------------------------------------------------------------------------------------

PAIRS = [("ink", "paper"), ("ink", "card"), ("dim", "paper"), ("dim", "card"), ("link", "paper"), ("link", "card")]
PAIRS += [("accent-ink", "accent"), ("failed", "card"), ("card", "failed"), ("pause", "pause-on")]
PAIRS += [(front, "pause-row") for front in ("ink", "dim", "link", "failed")]
PAIRS += [(status, f"{status}-on") for status in ("queued", "processing", "completed", "failed", "cancelled")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(scheme: str) -> None:
    """WCAG AA: 4.5 to 1 for text."""
    light, _, dark = (STATIC / "base.css").read_text().partition("@media (prefers-color-scheme: dark)")
    colours = dict(re.findall(r"--([a-z-]+): #([0-9a-f]{6});", light))
    if scheme == "dark":
        colours |= dict(re.findall(r"--([a-z-]+): #([0-9a-f]{6});", dark))
    for front, back in PAIRS:
        lighter, darker = sorted((_luminance(colours[front]), _luminance(colours[back])), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (front, back)


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


# -- words -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ms", "words"),
    [
        (0, "0 ms"),
        (999, "999 ms"),
        (-1_000, "1 s"),
        (59_999, "59 s"),
        (60_000, "1 min"),
        (185_000, "3 min 5 s"),
        (7_800_000, "2 h 10 min"),
        (86_400_000, "1 d"),
        (4 * 86_400_000 + 3 * 3_600_000, "4 d 3 h"),
    ],
)
def test_how_long_something_took(ms: int, words: str) -> None:
    assert rendering.duration(ms) == words


def test_sizes_and_numbers() -> None:
    assert [rendering.byte_size(n) for n in (0, 1023, 1024, 5 << 20, 3 << 30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 MiB",
        "3.0 GiB",
    ]
    assert rendering.thousands(1234567) == "1\u202f234\u202f567"
    assert rendering.iso_time(1_700_000_000_123) == "2023-11-14T22:13:20.123Z"
    assert rendering.utc_time(1_700_000_000_123) == "2023-11-14 22:13:20 UTC"
