"""An app behind a real listener with a fake actor and fake services, and a client that sends raw HTTP."""

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
from types import SimpleNamespace
from typing import Any, Final, cast

from msgspec import Struct
from msgspec.structs import replace

from jobd.api.services import Services
from jobd.engine import envelope, event_feed
from jobd.engine.envelope import Waiter
from jobd.engine.unread_responses import UnreadResponses
from jobd.http.admin_listener import AdminListener
from jobd.http.auth import Authenticator
from jobd.http.decoding import Limits
from jobd.http.http_app import BrowserPages, HttpApp
from jobd.http.routing import Route
from jobd.http.server import HttpListener, WorkerListener
from jobd.http.worker_connection import WorkerConnection
from jobd.maintenance.outputs import Outputs
from jobd.model import responses
from jobd.model.calls import AdminQueueCalls, DaemonCalls, ManyJobCalls, StoreCalls
from jobd.model.clocks import LockMs
from jobd.model.commands import Command, IdempotencyKey, MakePlan, Moment, Operator, TakeBack
from jobd.model.errors import ApiError
from jobd.model.storage import DiskSpace
from jobd.monitoring.timeseries import Timeseries
from jobd.storage.artifacts.downloads import Downloads
from jobd.storage.output_file import OutputFile
from jobd.storage.startup import MEMORY
from tests.conftest import tool_missing
from tests.support.calls import ALERT, AT, BACKUP, DELIVERY, PLAN, PROBLEMS, REPORT, WEBHOOK, result_of
from tests.support.memory_storage import MemoryStorage
from tests.support.polling import wait_until

TOKEN = "canary-token-0123456789abcdef"
DISK = responses.DiskView("/var/lib/jobd/jobd.db", 3 << 30, 8 << 30)


class ReceivedCommand(Struct):
    command: Any
    by: str = "client"
    admin: bool = False
    key: IdempotencyKey | None = None
    size: int = 0
    operator: Operator | None = None


ActorResponse = responses.Response | ApiError


class FakeActor:
    """Record the received commands, and respond with `respond`."""

    def __init__(self, response: Callable[[Any], ActorResponse | Awaitable[ActorResponse]] | None = None) -> None:
        self.received: list[ReceivedCommand] = []
        self.undelivered_responses: list[responses.Response] = []
        self.unread = UnreadResponses()
        self.cancelled = asyncio.Event()
        self.arrived = asyncio.Event()
        self.respond = response or (lambda command: responses.Response(responses.EmptyResponse()))
        self.state = SimpleNamespace(queue_names=["mail", "video"], quarantined={"bad-1": "checksum"})
        self.full_disk = SimpleNamespace(reject=lambda command: None)
        self._tasks: dict[envelope.Envelope, asyncio.Task[None]] = {}

    async def ask(self, command: Command, *, expected: str | None = None, **fields: Any) -> ActorResponse:
        self._receive(command, fields)
        return await self._result(self.respond(command))

    def send(self, command: Command, waiter: Waiter, *, ordered: bool = False, **fields: Any) -> envelope.Envelope:
        got = self._receive(command, fields)
        asked = envelope.Envelope(got.command, got.by, b"", got.admin, key=got.key, size=got.size, futures=[waiter])
        self._tasks[asked] = asyncio.ensure_future(self._respond(waiter, self.respond(command)))
        return asked

    def _receive(self, command: Command, fields: dict[str, Any]) -> ReceivedCommand:
        self.received.append(ReceivedCommand(command, **fields))
        self.arrived.set()
        return self.received[-1]

    async def _result(self, response: ActorResponse | Awaitable[ActorResponse]) -> ActorResponse:
        try:
            return response if isinstance(response, ActorResponse) else await response
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def _respond(self, waiter: Waiter, response: ActorResponse | Awaitable[ActorResponse]) -> None:
        result = await self._result(response)
        if not waiter.done():
            waiter.set_result(result)
        elif isinstance(result, responses.Response) and result.grants:
            self.undelivered_responses.append(result)

    @property
    def sent(self) -> list[envelope.Envelope]:
        return list(self._tasks)

    def abandon(self, asked: envelope.Envelope) -> None:
        self._tasks[asked].cancel()

    def undelivered(self, response: responses.Response) -> None:
        self.undelivered_responses.append(response)


class FakeBackup:
    """A backup of `pieces`. A piece that is an exception is raised in its turn."""

    def __init__(self, pieces: list[bytes | Exception], left: list[str | None], closed: asyncio.Event) -> None:
        self.size = sum(len(piece) if isinstance(piece, bytes) else 1 for piece in pieces)
        self._pieces = iter(pieces)
        self._left = left
        self._closed = closed

    async def read(self) -> bytes:
        piece = next(self._pieces, b"")
        if isinstance(piece, Exception):
            raise piece
        return piece

    def close(self, why: str | None = None) -> None:
        self._left.append(why)
        self._closed.set()


class Fakes:
    """The results of the fake parts of `make_services`, and the calls that they received."""

    def __init__(self) -> None:
        self.status: responses.HealthStatus = "healthy"
        self.alerts = [ALERT]
        self.problems = PROBLEMS
        self.oldest_due: responses.OldestDue | None = None
        self.metrics_text = b"jobd_stalled_jobs 0\n"
        self.alive = True
        self.accepted = False  # the wall clock
        self.forced: list[bool] = []  # cleanup runs
        self.no_preview: ApiError | None = None
        self.past_jobs = ["old-1", "old-2"]  # what deletion by age would take if the clock were right
        self.planned: list[MakePlan] = []
        self.operators: list[Operator] = []
        self.pieces: list[bytes | Exception] = [b"SQLite format 3\x00", b"x" * 100_000]
        self.backup_type = FakeBackup
        self.backup_ids: list[str] = []
        self.no_backup: ApiError | None = None
        self.held: asyncio.Event | None = None  # what a backup waits for
        self.begun = asyncio.Event()
        self.close_reasons: list[str | None] = []
        self.closed = asyncio.Event()
        self.hooks = [WEBHOOK]
        self.deliveries_page = responses.DeliveryPage([DELIVERY], "7")
        self.asked_deliveries: list[tuple[str, str | None, int | None, int]] = []
        self.resent: list[tuple[str, int | None]] = []
        self.lost = (2, 9)  # dead-lettered messages, and the number of the newest
        self.storage = MemoryStorage()


class FakePart:
    """A part whose results are in `fakes`."""

    def __init__(self, fakes: Fakes) -> None:
        self._fakes = fakes


class FakeMaintainer(FakePart):
    async def run_cleanup(self, *, forced: bool) -> responses.CleanupReport:
        self._fakes.forced.append(forced)
        return REPORT

    def state(self) -> Any:
        return result_of(DaemonCalls.cleanup_state)

    async def reports(self, limit: int) -> list[responses.CleanupReport]:
        return [REPORT][:limit]

    async def preview(self, scan_s: float = 1.0) -> responses.PreviewView | ApiError:
        return self._fakes.no_preview or replace(result_of(ManyJobCalls.preview), kept_jobs=self._fakes.past_jobs)

    async def recover_stuck(self, operator: Operator | None, reason: str | None) -> Any:
        return result_of(DaemonCalls.detect_and_recover_stuck_jobs)

    async def take_back(self, command: TakeBack, operator: Operator | None) -> Any:
        if command.name == "unknown":
            return ApiError("worker_not_found", "No worker unknown is known.")
        return replace(result_of(AdminQueueCalls.take_back), worker=command.name)


class FakePlanner(FakePart):
    async def make(self, asked: MakePlan, plan_id: str) -> responses.PlanView | ApiError:
        self._fakes.planned.append(asked)
        return self.find("p1")

    def find(self, plan_id: str) -> responses.PlanView | ApiError:
        if plan_id != "p1":
            return ApiError("plan_not_found", "There is no such plan.")
        return PLAN

    async def apply(self, plan_id: str, operator: Operator, **pace: Any) -> Any:
        self._fakes.operators.append(operator)
        return result_of(ManyJobCalls.apply_plan)


class FakeClock:
    """A clock that does not advance and is suspect until it is accepted."""

    def __init__(self, fakes: Fakes, now: Callable[[], int] = lambda: 1_700_000_000_000) -> None:
        self._fakes = fakes
        self._now = now

    def moment(self) -> Moment:
        return Moment(now=self._now(), lock_ms=LockMs(0), offset=0)

    def behind_reason(self) -> str | None:
        return None

    def suspect_reason(self) -> str | None:
        return None if self._fakes.accepted else "30 days ahead"

    def accept(self) -> None:
        self._fakes.accepted = True


class FakeBackups(FakePart):
    async def begin(self, id_: str) -> FakeBackup | ApiError:
        fakes = self._fakes
        fakes.backup_ids.append(id_)
        if fakes.held is not None:
            fakes.begun.set()
            try:
                await fakes.held.wait()
            except asyncio.CancelledError:
                fakes.closed.set()
                raise
        if isinstance(fakes.pieces[0], Exception):
            raise fakes.pieces[0]
        return fakes.no_backup or fakes.backup_type(fakes.pieces, fakes.close_reasons, fakes.closed)

    def views(self) -> list[responses.BackupView]:
        return [BACKUP]


class FakeWebhooks(FakePart):
    def has(self, name: str) -> bool:
        return name == "q"

    def views(self) -> list[responses.WebhookView]:
        return self._fakes.hooks

    async def page(
        self, name: str, state: responses.DeliveryState | None, before: int | None, limit: int
    ) -> responses.DeliveryPage:
        self._fakes.asked_deliveries.append((name, state, before, limit))
        return self._fakes.deliveries_page

    async def dead_letter_counts(self, name: str) -> tuple[int, int]:
        return self._fakes.lost if self.has(name) else (0, 0)

    async def redeliver(self, name: str, id_: int) -> responses.DeliveryView | None:
        return DELIVERY if id_ == 7 else None

    async def redeliver_all(self, name: str, upto: int | None) -> int:
        self._fakes.resent.append((name, upto))
        return 3

    async def test(self, name: str) -> responses.DeliveryView:
        return DELIVERY


class FakeMonitoring(FakePart):
    """Health and metrics."""

    async def view(self) -> responses.HealthView:
        status = self._fakes.status
        part = responses.PartHealth(status, "measured")
        database = responses.DatabaseHealth(status, "measured", 7, DISK.path, DISK.free_bytes, DISK.total_bytes)
        return responses.HealthView(
            status, database, part, part, responses.CleanupHealth(False, None, "idle"), 1_700_000_000_000
        )

    async def space(self) -> DiskSpace:
        return DiskSpace(DISK.path, DISK.free_bytes, DISK.total_bytes)

    async def render(self) -> bytes:
        return self._fakes.metrics_text

    async def vitals(self) -> responses.ProcessStats:
        return responses.ProcessStats(3, 2, 0.005, 0.001, 1 << 20, 1 << 10, 61_000, self._fakes.oldest_due)


class FakeScrubber:
    async def scan(self, cursor: str | None) -> Any:
        return replace(result_of(StoreCalls.check_rows), next_cursor=None if cursor else "jobs:3")


class FakeSampler:
    async def measure(self) -> Any:
        return result_of(StoreCalls.disk)

    def recent(self) -> Any:
        return result_of(StoreCalls.disk)


def make_services(actor: Any, fakes: Fakes) -> Services:
    """Make services with fake parts, and a real event feed and downloads."""
    monitoring: Any = FakeMonitoring(fakes)
    parts: dict[str, Any] = {
        "maintainer": FakeMaintainer(fakes),
        "clock": FakeClock(fakes),
        "backups": FakeBackups(fakes),
        "failures": SimpleNamespace(view=lambda limit: result_of(ManyJobCalls.failures)),
        "planner": FakePlanner(fakes),
        "problems": SimpleNamespace(alerts=lambda: fakes.alerts, view=lambda *_, **__: fakes.problems),
        "scrubber": FakeScrubber(),
        "disk_sampler": FakeSampler(),
        "timeseries": Timeseries(0),
        "webhooks": FakeWebhooks(fakes),
        "is_alive": lambda: fakes.alive,
    }
    feed = event_feed.EventFeed(fakes.storage, 0, 3)
    return Services(
        actor=actor,
        health=monitoring,
        metrics=monitoring,
        feed=feed,
        outputs=Outputs(OutputFile(MEMORY, 1 << 20), feed, lambda: AT),
        downloads=Downloads(None, 2),
        is_open=True,
        **parts,
    )


class ReceivedResponse(Struct):
    """A response as it was received."""

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

    @property
    def failure(self) -> tuple[int, str]:
        return self.status, self.error

    @property
    def redirect(self) -> str:
        """The URL that it redirects to."""
        assert self.status == 303, self.body
        return self.headers["location"]

    def page(self, status: int) -> str:
        """Return the text of a page with this status."""
        assert self.status == status, self.body
        return self.body.decode()


class RawConnection:
    """A client connection that sends exactly the given bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def receive(self, *, head_only: bool = False) -> ReceivedResponse:
        """Receive the next response. Raises IncompleteReadError if the connection closes before its end."""
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
        """Wait for the end of the connection. Return False if bytes arrive instead."""
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
    """Encode a request with the headers of a usual client."""
    raw = body.encode() if isinstance(body, str) else body
    fields = {"Host": "localhost"}
    if raw is not None:
        fields |= {"Content-Type": "application/json", "Content-Length": str(len(raw))}
    fields |= headers or {}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode() + (raw or b"")


def wrong_tokens(token: str, count: int = 5_000) -> list[str]:
    """Return tokens that must be rejected in place of `token`: random ones of its length, and similar ones.

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


async def tls_pair(directory: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return the server and client contexts for TLS on "localhost", with a self-signed certificate."""
    if shutil.which("openssl") is None:
        tool_missing("openssl", "openssl")
    key, cert = directory / "key.pem", directory / "cert.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "1", "-nodes"]
    files = ["-keyout", str(key), "-out", str(cert), "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    done = await asyncio.create_subprocess_exec("openssl", "req", "-x509", *files, *subject, stderr=-3)
    assert await done.wait() == 0
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert, key)
    return server, ssl.create_default_context(cafile=str(cert))


_shared_tls_pairs: list[tuple[ssl.SSLContext, ssl.SSLContext]] = []


async def _shared_tls_pair(directory: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return the same pair each time, because a certificate takes longer to make than most tests."""
    if not _shared_tls_pairs:
        _shared_tls_pairs.append(await tls_pair(directory))
    return _shared_tls_pairs[0]


TRANSPORTS: Final = ("unix", "tcp", "tls")
LISTENERS: Final = (*TRANSPORTS, "admin unix", "admin tls")


class HttpHarness:
    """An app behind a real listener, with a fake actor and fake services. Closes its client connections at the end.

    It listens on TCP if the authenticator has a list of host names, on a Unix socket otherwise. `tls` are the contexts
    of the server and the clients.
    """

    def __init__(
        self,
        routes: tuple[Route, ...],
        directory: Path,
        *,
        authenticator: Authenticator | None = None,
        limits: Limits | None = None,
        admin: bool = False,
        actor: Any = None,
        pages: BrowserPages | None = None,
        tls: tuple[ssl.SSLContext, ssl.SSLContext] | None = None,
    ) -> None:
        self.actor: Any = actor or cast("Any", FakeActor())
        self.fakes = Fakes()
        self.services = make_services(self.actor, self.fakes)
        self.app = HttpApp(
            authenticator or Authenticator("worker"),
            routes,
            self.actor,
            self.services,
            limits=limits,
            admin=admin,
            pages=pages,
        )
        self.listener: HttpListener = AdminListener(self.app) if admin else WorkerListener(self.app)
        self.path = str(directory / "api.sock")
        self.port = 0
        self.tls = tls
        self._connections: list[RawConnection] = []
        self._is_stopped = False

    @classmethod
    async def on(
        cls, transport: str, routes: tuple[Route, ...], directory: Path, *, limits: Limits | None = None
    ) -> HttpHarness:
        """Return one of LISTENERS, for clients that call it localhost, x or ::1. Its requests need no token."""
        hosts = None if transport.endswith("unix") else ["localhost", "x", "::1"]
        tls = await _shared_tls_pair(directory) if transport.endswith("tls") else None
        authenticator, admin = Authenticator("worker", hosts=hosts), transport.startswith("admin")
        return cls(routes, directory, authenticator=authenticator, limits=limits, admin=admin, tls=tls)

    async def __aenter__(self) -> HttpHarness:
        if self.app.authenticator.hosts is None:
            await self.listener.open_unix(self.path, 0o660)
        else:
            server = None if self.tls is None else self.tls[0]
            [(_, self.port)] = await self.listener.open_tcp("127.0.0.1", 0, tls=server)
        return self

    async def __aexit__(self, *_: object) -> None:
        for line in self._connections:
            await line.close()
        if not self._is_stopped:
            await self.stop(1.0)
        await self.services.outputs.file.close()

    @property
    def connections(self) -> list[WorkerConnection]:
        """The open connections of a worker listener."""
        assert isinstance(self.listener, WorkerListener)
        return list(self.listener._connections)

    async def stop(self, deadline_s: float) -> None:
        self._is_stopped = True
        await self.listener.stop(deadline_s)

    async def connect(self) -> RawConnection:
        if self.tls is not None:
            pair = await asyncio.open_connection("localhost", self.port, ssl=self.tls[1])
        elif self.port:
            pair = await asyncio.open_connection("127.0.0.1", self.port)
        else:
            pair = await asyncio.open_unix_connection(self.path)
        self._connections.append(RawConnection(*pair))
        return self._connections[-1]

    async def wait_until_closed(self, left: int = 0) -> None:
        """Wait until at most `left` connections are open."""
        await wait_until(lambda: self.listener.connections <= left)

    async def request(
        self, method: str, target: str, body: bytes | str | None = None, headers: Mapping[str, str] | None = None
    ) -> ReceivedResponse:
        """Send one request on a new connection."""
        return await (await self.connect()).request(method, target, body, headers)

    async def send_raw(self, data: bytes) -> ReceivedResponse:
        """Send exactly these bytes on a new connection, and receive a response."""
        client = await self.connect()
        client.send(data)
        return await client.receive()


class HeldResponse:
    """Hold back the responses of the fake actor until the test sets `go`."""

    def __init__(self, harness: HttpHarness, response: ActorResponse | None = None) -> None:
        self.go = asyncio.Event()
        self._answer = response or responses.Response(responses.EmptyResponse())
        harness.actor.respond = self._respond

    async def _respond(self, _: Any) -> ActorResponse:
        await self.go.wait()
        return self._answer
