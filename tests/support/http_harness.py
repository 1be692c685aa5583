"""For tests of the doors: a desk in the actor's place, rooms with fixed figures, and a client that speaks raw HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import ssl
import string
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, cast

from msgspec import Struct

from jobd.engine import event_feed, mailbox
from jobd.engine.change_watchers import Watcher
from jobd.engine.mailbox import Waiter
from jobd.http.app import App, BrowserPages
from jobd.http.auth import Authenticator
from jobd.http.decoding import Limits
from jobd.http.routing import Route
from jobd.http.server import HttpListener
from jobd.model.commands import Call, Command, IdempotencyKey, MakePlan, Operator, TakeBack
from jobd.model.errors import ApiError
from jobd.model.events import EventFilter
from jobd.model.responses import (
    AlertView,
    BackupView,
    ChangedJob,
    CheckedRows,
    CleanupHealth,
    CleanupReport,
    CleanupState,
    ClockView,
    DamagedRow,
    DatabaseHealth,
    DeliveryPage,
    DeliveryState,
    DeliveryView,
    DiskView,
    EmptyResponse,
    FailureGroup,
    FailuresView,
    HealthStatus,
    HealthView,
    OldestDue,
    PartHealth,
    PlannedJob,
    PlanResult,
    PlanView,
    PreviewView,
    ProcessStats,
    QuarantinedJob,
    RecoverStuckView,
    Recovery,
    Resent,
    Response,
    SkippedJob,
    TakeBackView,
    WebhookView,
)
from jobd.storage.artifacts.downloads import Download, Downloads
from tests.conftest import tool_missing
from tests.support.memory_storage import MemoryStorage

TOKEN = "canary-token-0123456789abcdef"
DISK = DiskView("/var/lib/jobd/jobd.db", 3 << 30, 8 << 30)
REPORT = CleanupReport(1_700_000_000_000, 1, 2, 3, 4, 5, 6, [], True)


class ReceivedCommand(Struct):
    command: Any
    by: str
    admin: bool
    key: IdempotencyKey | None
    size: int
    operator: Operator | None = None


class FakeActor:
    """Stands where the actor stands: notes what is asked, answers what the test says."""

    def __init__(
        self, answer: Callable[[Any], Response | ApiError | Awaitable[Response | ApiError]] | None = None
    ) -> None:
        self.received: list[ReceivedCommand] = []
        self.undelivered_responses: list[Response] = []
        self.cancelled = asyncio.Event()
        self.arrived = asyncio.Event()
        self.respond = answer or (lambda command: Response(EmptyResponse()))
        self._tasks: dict[mailbox.Envelope, asyncio.Task[None]] = {}

    async def ask(
        self,
        command: Command,
        *,
        by: str = "client",
        admin: bool = False,
        key: IdempotencyKey | None = None,
        size: int = 0,
        operator: Operator | None = None,
        expected: str | None = None,
    ) -> Response | ApiError:
        self.received.append(ReceivedCommand(command, by, admin, key, size, operator))
        self.arrived.set()
        try:
            answer = self.respond(command)
            return answer if isinstance(answer, Response | ApiError) else await answer
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    def send(
        self,
        command: Command,
        waiter: Waiter,
        *,
        by: str = "client",
        admin: bool = False,
        key: IdempotencyKey | None = None,
        size: int = 0,
        operator: Operator | None = None,
        in_line: bool = False,
    ) -> mailbox.Envelope:
        self.received.append(ReceivedCommand(command, by, admin, key, size, operator))
        self.arrived.set()
        asked = mailbox.Envelope(Call(cast("Any", command), by, b"", admin), key, size, waiter)
        self._tasks[asked] = asyncio.ensure_future(self._tell(waiter, self.respond(command)))
        return asked

    async def _tell(self, waiter: Waiter, answer: Response | ApiError | Awaitable[Response | ApiError]) -> None:
        try:
            told = answer if isinstance(answer, Response | ApiError) else await answer
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if not waiter.done():
            waiter.set_result(told)
        elif isinstance(told, Response) and told.grants:
            self.undelivered_responses.append(told)

    @property
    def sent(self) -> list[mailbox.Envelope]:
        return list(self._tasks)

    def abandon(self, asked: mailbox.Envelope) -> None:
        self._tasks[asked].cancel()

    def undelivered(self, answer: Response) -> None:
        self.undelivered_responses.append(answer)


WEBHOOK = WebhookView(
    name="q",
    url="https://e.test/hook",
    events=["job.failed"],
    queues=[],
    state="closed",
    failing_since=None,
    next_try_at=None,
    position=9,
    lag=0,
    waiting=1,
    delivered=2,
    failed=3,
    given_up=0,
    last_success_at=1_700_000_000_000,
    last_error="500",
    last_error_at=1_700_000_000_000,
)
DELIVERY = DeliveryView(
    id=7,
    state="waiting",
    type="job.failed",
    subject="jobs/a",
    event_id="evt_1",
    seq=9,
    at=1_700_000_000_000,
    due_at=1_700_000_000_000,
    tries=1,
    ended_at=None,
    status=500,
    error="500",
)
NO_WEBHOOK = ApiError("not_found", "There is no such webhook.")


BACKUP = BackupView("b1", "copying", 4096, 8192, 3, 1_700_000_000_000, None, None)


class FakeBackup:
    """A backup that is made of `pieces`; one that is an error is raised in its turn."""

    def __init__(self, pieces: list[bytes | Exception], left: list[str | None], closed: asyncio.Event) -> None:
        self.size = sum(len(piece) if isinstance(piece, bytes) else 1 for piece in pieces)
        self._pieces = iter(pieces)
        self._left = left
        self._closed = closed

    async def more(self) -> bytes:
        piece = next(self._pieces, b"")
        if isinstance(piece, Exception):
            raise piece
        return piece

    def leave(self, why: str | None = None) -> None:
        self._left.append(why)
        self._closed.set()


class FakeServices:
    """Rooms with fixed figures."""

    def __init__(self) -> None:
        self.status: HealthStatus = "healthy"
        self.forced: list[bool] = []
        self.planned: list[MakePlan] = []
        self.operators: list[Operator] = []
        self.accepted = False
        self.oldest_due: OldestDue | None = None
        self.no_preview: ApiError | None = None
        self.past_jobs = ["old-1", "old-2"]  # what deletion by age would take if the clock were right
        self.alive = True
        self.ready = True
        self.pieces: list[bytes | Exception] = [b"SQLite format 3\x00", b"x" * 100_000]
        self.held: asyncio.Event | None = None  # what a backup waits for
        self.begun = asyncio.Event()
        self.no_backup: ApiError | None = None
        self.backup_ids: list[str] = []
        self.left: list[str | None] = []
        self.closed = asyncio.Event()
        self.pieces_of = FakeBackup
        self.disk = MemoryStorage()
        self.feed = event_feed.EventFeed(self.disk, 0, 3)
        self.downloads = Downloads(None, 2)
        self.hooks = [WEBHOOK]
        self.deliveries_page = DeliveryPage([DELIVERY], "7")
        self.metrics_text = b"jobd_stuck_jobs 0\n"
        self.resent: list[tuple[str, int | None]] = []
        self.asked_deliveries: list[tuple[str, str | None, int | None, int]] = []
        self.lost = (2, 9)  # messages that were given up, and the number of the newest

    async def run_cleanup(self, *, forced: bool) -> CleanupReport:
        self.forced.append(forced)
        return REPORT

    def cleanup_state(self) -> CleanupState:
        return CleanupState(REPORT, True, 1234)

    def failures(self, limit: int) -> FailuresView:
        group = FailureGroup("0123456789ab", "no", None, 3, 2, ["k"], ["q"], 1, 2, ["a"])
        return FailuresView([group], 4, 7, 1, 5, False)

    async def preview(self, look_s: float = 1.0) -> PreviewView | ApiError:
        if self.no_preview is not None:
            return self.no_preview
        return PreviewView(
            [Recovery("a", "reset", "stalled")], 2, ["b"], [], [], False, 1_700_000_000_000, self.past_jobs
        )

    async def make_plan(self, asked: MakePlan) -> PlanView:
        self.planned.append(asked)
        return self.plan("p1")  # type: ignore[return-value]

    def plan(self, plan_id: str) -> PlanView | ApiError:
        if plan_id != "p1":
            return ApiError("plan_not_found", "There is no such plan.")
        job = PlannedJob("a", "failed", "queued")
        return PlanView("p1", "retry", "r", None, None, 1, [job], [SkippedJob("b", None, "none")], 1, False, None, 1, 2)

    async def apply_plan(self, plan_id: str, operator: Operator) -> PlanResult:
        self.operators.append(operator)
        return PlanResult(plan_id, "retry", 1, [ChangedJob("b", "failed", None, "gone")], [], 3)

    async def recover_stuck(self, operator: Operator | None, reason: str | None) -> RecoverStuckView:
        return RecoverStuckView(1, 1, 0, [Recovery("a", "reset", "stalled")], 1_700_000_000_000)

    async def take_back(self, command: TakeBack, operator: Operator | None) -> TakeBackView | ApiError:
        if command.name == "unknown":
            return ApiError("worker_not_found", "No worker unknown is known.")
        details = [Recovery("a", "reset", "No update. An operator took the job back.")]
        return TakeBackView(command.name, 1, 1, 0, details, False, 1_700_000_000_000)

    async def health(self) -> HealthView:
        part = PartHealth(self.status, "measured")
        database = DatabaseHealth(self.status, "measured", 7, DISK.path, DISK.free_bytes, DISK.total_bytes)
        return HealthView(self.status, database, part, part, CleanupHealth(False, None, "idle"), 1_700_000_000_000)

    def alerts(self) -> list[AlertView]:
        return [AlertView("stuck_jobs", False, None, 0, 5, "look at the workers")]

    async def disk_space(self) -> DiskView | None:
        return DISK

    async def metrics(self) -> bytes:
        return self.metrics_text

    async def vitals(self) -> ProcessStats:
        return ProcessStats(3, 2, 0.005, 0.001, 1 << 20, 1 << 10, 61_000, self.oldest_due)

    async def reports(self, limit: int) -> list[CleanupReport]:
        return [REPORT][:limit]

    def clock(self) -> ClockView:
        return ClockView(1_700_000_000_000, not self.accepted, "30 days ahead")

    async def accept_clock(self) -> ClockView:
        self.accepted = True
        return self.clock()

    def quarantine(self) -> list[QuarantinedJob]:
        return [QuarantinedJob("bad-1", "checksum")]

    def queue_names(self, most: int) -> list[str]:
        return ["mail", "video"][:most]

    def webhooks(self) -> list[WebhookView]:
        return self.hooks

    async def deliveries(
        self, webhook: str, state: DeliveryState | None, before: int | None, limit: int
    ) -> DeliveryPage | ApiError:
        self.asked_deliveries.append((webhook, state, before, limit))
        return self.deliveries_page if webhook == "q" else NO_WEBHOOK

    async def given_up(self, webhook: str) -> tuple[int, int]:
        return self.lost if webhook == "q" else (0, 0)

    async def deliver_again(self, webhook: str, delivery: int) -> DeliveryView | ApiError:
        return DELIVERY if (webhook, delivery) == ("q", 7) else NO_WEBHOOK

    async def deliver_all_again(self, webhook: str, upto: int | None) -> Resent | ApiError:
        self.resent.append((webhook, upto))
        return Resent(3) if webhook == "q" else NO_WEBHOOK

    async def test_webhook(self, webhook: str) -> DeliveryView | ApiError:
        return DELIVERY if webhook == "q" else NO_WEBHOOK

    async def backup(self, id_: str) -> FakeBackup | ApiError:
        self.backup_ids.append(id_)
        if self.held is not None:
            self.begun.set()
            try:
                await self.held.wait()
            except asyncio.CancelledError:
                self.closed.set()
                raise
        if isinstance(self.pieces[0], Exception):
            raise self.pieces[0]
        return self.no_backup or self.pieces_of(self.pieces, self.left, self.closed)

    async def check_rows(self, cursor: str | None) -> CheckedRows | ApiError:
        return CheckedRows("jobs", 3, [DamagedRow("job bad-2", "checksum")], None if cursor else "jobs:3")

    def backups(self) -> list[BackupView]:
        return [BACKUP]

    def listen(self, wanted: EventFilter, *, follow: bool, cut: Callable[[], None]) -> event_feed.Subscriber:
        return self.feed.listen(wanted, follow=follow, cut=cut)

    def watch(self, *, queue: str | None, job_id: str | None, cut: Callable[[], None]) -> Watcher:
        return self.feed.watch(queue=queue, job_id=job_id, cut=cut)

    def has_artifacts(self) -> bool:
        return self.downloads.has_store

    async def download(self, key: str, cut: Callable[[], None]) -> Download:
        return await self.downloads.begin(key, cut)

    def is_ready(self) -> bool:
        return self.ready

    def is_alive(self) -> bool:
        return self.alive


class ReceivedResponse(Struct):
    """An answer as it came over the wire."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def data(self) -> Any:
        assert self.json["success"] is True, self.json
        return self.json["data"]

    @property
    def error(self) -> str:
        assert self.json["success"] is False, self.json
        return str(self.json["error"])


class RawConnection:
    """One connection of a client that writes exactly the bytes that it is given."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def receive(self, *, head_only: bool = False) -> ReceivedResponse:
        """The next answer. Raises IncompleteReadError where the connection closes before its end."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.rstrip("\r\n").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = b""
        if head_only:
            pass
        elif headers.get("transfer-encoding") == "chunked":
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                body += await self.reader.readexactly(size)
                await self.reader.readexactly(2)
            await self.reader.readexactly(2)
        else:
            body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return ReceivedResponse(int(first.split(" ")[1]), headers, body)

    async def request(
        self, method: str, target: str, body: bytes | str | None = None, headers: Mapping[str, str] | None = None
    ) -> ReceivedResponse:
        self.send(request_bytes(method, target, body, headers))
        return await self.receive(head_only=method == "HEAD")

    async def is_closed(self) -> bool:
        """Waits for the end of the connection; false where bytes come instead."""
        try:
            return await self.reader.read(1) == b""
        except ConnectionError:
            return True

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


def request_bytes(
    method: str, target: str, body: bytes | str | None = None, headers: Mapping[str, str] | None = None
) -> bytes:
    """A request as bytes, with the headers that a usual client sends."""
    raw = body.encode() if isinstance(body, str) else body
    fields = {"Host": "localhost"}
    if raw is not None:
        fields |= {"Content-Type": "application/json", "Content-Length": str(len(raw))}
    fields |= headers or {}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode() + (raw or b"")


def wrong_tokens(token: str, count: int = 5_000) -> list[str]:
    """Tokens that must not be taken for `token`: random ones of its length, and those that have much in common with it.

    A comparison of one byte of a digest takes one of 256 random tokens.
    """
    dice, letters = random.Random(token), string.ascii_letters + string.digits + "-"
    wrong = ["".join(dice.choices(letters, k=len(token))) for _ in range(count)]
    others = ["".join(dice.choices(letters.replace(char, ""), k=1)) for char in token]
    for at, other in enumerate(others):
        wrong += [token[:at] + other + token[at + 1 :], token[:at], token[at + 1 :]]
        wrong += [token[:at] + "".join(others[at:]), "".join(others[: at + 1]) + token[at + 1 :]]
    wrong += [token + more for more in ("x", " x", ".", "=", "0", token, "," + token, "x" * 900)]
    wrong += ["x" + token, token.upper(), token[::-1], "*", "null", "undefined"]
    assert token not in wrong
    return wrong


async def tls_pair(place: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Both ends of TLS for "localhost", with a certificate of its own."""
    if shutil.which("openssl") is None:
        tool_missing("openssl", "openssl")
    key, cert = place / "key.pem", place / "cert.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "1", "-nodes"]
    files = ["-keyout", str(key), "-out", str(cert), "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    done = await asyncio.create_subprocess_exec("openssl", "req", "-x509", *files, *subject, stderr=-3)
    assert await done.wait() == 0
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert, key)
    return server, ssl.create_default_context(cafile=str(cert))


class HttpHarness:
    """A Web behind a real listener, with a desk and figures, and clients that are closed at the end."""

    def __init__(
        self,
        routes: tuple[Route, ...],
        place: Path,
        *,
        gate: Authenticator | None = None,
        limits: Limits | None = None,
        admin: bool = False,
        actor: Any = None,
        pages: BrowserPages | None = None,
    ) -> None:
        self.actor = actor or FakeActor()
        self.services = FakeServices()
        self.app = App(
            gate or Authenticator("worker"), routes, self.actor, self.services, limits=limits, admin=admin, pages=pages
        )
        self.listener = HttpListener(self.app)
        self.path = str(place / "door.sock")
        self.port = 0
        self._connections: list[RawConnection] = []
        self._is_stopped = False

    async def __aenter__(self) -> HttpHarness:
        if self.app.authenticator.hosts is None:
            await self.listener.open_unix(self.path, 0o660)
        else:
            [(_, self.port)] = await self.listener.open_tcp("127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        for line in self._connections:
            await line.close()
        if not self._is_stopped:
            await self.stop(1.0)

    async def stop(self, deadline_s: float) -> None:
        self._is_stopped = True
        await self.listener.stop(deadline_s)

    async def connect(self) -> RawConnection:
        if self.port:
            pair = await asyncio.open_connection("127.0.0.1", self.port)
        else:
            pair = await asyncio.open_unix_connection(self.path)
        self._connections.append(RawConnection(*pair))
        return self._connections[-1]

    async def request(
        self, method: str, target: str, body: bytes | str | None = None, headers: Mapping[str, str] | None = None
    ) -> ReceivedResponse:
        """One request on a connection of its own."""
        line = await self.connect()
        return await line.request(method, target, body, headers)

    async def send_raw(self, data: bytes) -> ReceivedResponse:
        """The answer to exactly these bytes, on a connection of their own."""
        line = await self.connect()
        line.send(data)
        return await line.receive()
