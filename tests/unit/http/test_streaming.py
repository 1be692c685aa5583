"""Imports line by line and backups piece by piece, over a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from jobd.api import downloads, imports
from jobd.api.admin_routes import ROUTES
from jobd.http.admin_listener import AdminListener
from jobd.http.auth import Authenticator
from jobd.http.decoding import Limits
from jobd.model.commands import Import, RecordAction
from jobd.model.errors import ERROR_STATUS, ApiError
from jobd.model.responses import EmptyResponse, Imported, Response
from jobd.model.storage import DiskFull
from jobd.storage.backup import BackupStopped, BadCopy
from tests.support.http_harness import TOKEN, FakeBackup, HttpHarness, RawConnection, ReceivedResponse, request_bytes
from tests.support.polling import wait_until

IMPORT = "/admin/job-management/import"
BACKUP = "/admin/job-management/backup"
AUTH = {"Authorization": f"Bearer {TOKEN}"}
KIND = {**AUTH, "Content-Type": "application/x-ndjson"}


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[HttpHarness]:
    authenticator, limits = Authenticator("admin", tokens=[TOKEN]), Limits(body=200, payload=50)
    async with HttpHarness(ROUTES, tmp_path, authenticator=authenticator, admin=True, limits=limits) as opened:
        answering(opened, lambda command: Response(Imported(command.id, skipped=command.id.startswith("old"))))
        yield opened


def answering(harness: HttpHarness, lines: Callable[[Any], Any]) -> None:
    """Respond to lines of an import with `lines`. Audit entries are accepted."""
    harness.actor.respond = lambda command: (
        Response(EmptyResponse()) if isinstance(command, RecordAction) else lines(command)
    )


def rejecting(harness: HttpHarness, job_id: str, error: ApiError) -> None:
    """Reject the line of this job, and accept the others."""
    answering(harness, lambda line: error if line.id == job_id else Response(Imported(line.id, skipped=False)))


def holding(harness: HttpHarness) -> asyncio.Event:
    """Let lines wait for the returned event."""
    go = asyncio.Event()

    async def hold(command: Any) -> Response:
        await go.wait()
        return Response(Imported(command.id, skipped=False))

    answering(harness, hold)
    return go


def lines_of(harness: HttpHarness) -> list[Any]:
    """Return the received commands without the audit entry."""
    return [envelope for envelope in harness.actor.received if not isinstance(envelope.command, RecordAction)]


def head() -> bytes:
    return request_bytes("POST", IMPORT, headers={**KIND, "Transfer-Encoding": "chunked"})


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def put(harness: HttpHarness, *lines: Any) -> ReceivedResponse:
    body = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    return await harness.request("POST", IMPORT, body, KIND)


async def test_each_line_is_one_command_in_the_order_of_the_lines(harness: HttpHarness) -> None:
    response = await put(harness, *({"id": f"job-{n}"} for n in range(300)), {"id": "old-1"})
    assert response.data == {"imported": 300, "skipped": 1, "refusedCount": 0, "refused": []}
    assert [envelope.command.id for envelope in lines_of(harness)] == [*(f"job-{n}" for n in range(300)), "old-1"]
    assert harness.actor.received[0].command == Import(id="job-0")
    assert (harness.actor.received[0].by, harness.actor.received[0].admin) == ("admin", True)
    assert harness.actor.received[0].size == len('{"id": "job-0"}')
    last = harness.actor.received[-1]
    assert last.command == RecordAction(what="import", details={"imported": 300, "skipped": 1, "refused": 0})
    assert last.operator is not None
    assert last.operator.part_of
    assert {envelope.operator for envelope in harness.actor.received} == {last.operator}  # all of it is one audit entry


async def test_an_import_that_is_cut_short_ends_after_its_lines(harness: HttpHarness) -> None:
    client = await harness.connect()
    client.send(head() + chunk(b'{"id":"a"}\n{"id":"b"}\n{"id":'))
    await wait_until(lambda: len(lines_of(harness)) == 2)
    client.writer.write_eof()
    assert await client.is_closed()
    assert [envelope.command.id for envelope in lines_of(harness)] == ["a", "b"]


async def test_an_empty_import_is_done_at_once(harness: HttpHarness) -> None:
    empty = {"imported": 0, "skipped": 0, "refusedCount": 0, "refused": []}
    assert (await put(harness)).data == empty
    assert (await put(harness, "", "  ", "\r")).data == empty


async def test_malformed_lines_are_named_and_the_rest_is_imported(harness: HttpHarness) -> None:
    rejecting(harness, "twice", ApiError("invalid_transition", "It cannot be so."))
    response = await put(
        harness,
        {"id": "a"},
        "nonsense",
        {"id": "b", "progress": 101},
        {"id": "c d"},
        "",
        {"id": "twice"},
        {"id": "big", "payload": "x" * 60},
        {"id": "long", "progress_message": "x" * 300},
        {"id": "key", "storage_key": "/etc/passwd"},
        {"id": "utf", "kind": "ä"},
        {"id": "z"},
    )
    assert response.data["imported"] == 3
    rejected = {2: None, 3: "b", 4: None, 6: "twice", 7: "big", 8: None, 9: "key"}
    assert {no["line"]: no["id"] for no in response.data["refused"]} == rejected
    reasons = {no["line"]: no["reason"] for no in response.data["refused"]}
    assert "`$.progress`" in reasons[3]
    assert reasons[6] == "It cannot be so."
    assert "limit is 50" in reasons[7]
    assert "over 200 bytes" in reasons[8]
    assert harness.app.error_counts == {}


async def test_a_line_at_its_limit_is_accepted_and_one_byte_more_is_not(harness: HttpHarness) -> None:
    line = '{"id":"a"}'
    response = await put(harness, line.ljust(200), line.ljust(201), line.ljust(1000), line.ljust(200), line.ljust(201))
    assert response.data["imported"] == 2
    assert [no["line"] for no in response.data["refused"]] == [2, 3, 5]  # the last line has no line feed


async def test_the_number_of_shown_rejections_is_limited(harness: HttpHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "SHOWN_REJECTIONS", 3)
    response = await put(harness, *(["x"] * 10))
    assert response.data["refusedCount"] == 10
    assert [no["line"] for no in response.data["refused"]] == [1, 2, 3]


async def test_lines_may_be_split_anywhere(harness: HttpHarness) -> None:
    client = await harness.connect()
    client.send(head())
    body = b'{"id":"a"}\r\n{"id":"b","kind":"\xc3\xa4"}\n\n{"id":"c"}'
    for at in range(len(body)):
        client.send(chunk(body[at : at + 1]))
        await asyncio.sleep(0)
    client.send(b"0\r\n\r\n")
    assert (await client.receive()).data["imported"] == 3


async def test_an_import_reads_no_further_than_a_few_lines_ahead(harness: HttpHarness) -> None:
    go = holding(harness)
    client = await harness.connect()
    client.send(head() + chunk(b"".join(b'{"id":"job-%d"}\n' % n for n in range(500))) + b"0\r\n\r\n")
    await wait_until(lambda: len(harness.actor.received) > imports.AHEAD_LINES)
    # Other requests are served; the import has not moved.
    assert (await harness.request("GET", "/healthz")).status == 200
    assert len(harness.actor.received) == imports.AHEAD_LINES + 1
    go.set()
    assert (await client.receive()).data["imported"] == 500


async def test_an_import_in_many_chunks_reads_no_further_than_a_few_lines_ahead(harness: HttpHarness) -> None:
    go, lines = holding(harness), 2 * imports.AHEAD_LINES
    client = await harness.connect()
    client.send(head() + b"".join(chunk(b'{"id":"%d"}\n' % n) for n in range(lines)))
    client.send(chunk(b"\n") * 200_000 + b"0\r\n\r\n")
    unsent = client.writer.transport.get_write_buffer_size
    await wait_until(lambda: len(lines_of(harness)) >= imports.AHEAD_LINES and unsent() > 0)
    left = unsent()
    for _ in range(50):
        assert (await harness.request("GET", "/healthz")).status == 200
    assert unsent() == left  # the rest stays with the client
    go.set()
    assert (await client.receive()).data["imported"] == lines


async def test_an_error_that_affects_all_lines_stops_the_import(harness: HttpHarness) -> None:
    rejecting(harness, "job-5", ApiError("storage_full", "The disk is full.", {"free": 0}))
    response = await put(harness, *({"id": f"job-{n}"} for n in range(2000)))
    assert (response.status, response.error) == (507, "storage_full")
    assert response.json["details"] == {"free": 0, "line": 6}
    assert "line 6" in response.json["message"]
    assert len(harness.actor.received) < 200
    assert harness.app.error_counts == {"storage_full": 1}


async def test_a_line_that_does_not_arrive_is_a_408(harness: HttpHarness) -> None:
    harness.app.limits = Limits(body_deadline_s=0.05)
    client = await harness.connect()
    client.send(head() + chunk(b'{"id":"a"}\n{"id"'))
    response = await client.receive()
    assert (response.status, response.error, response.json["details"]) == (408, "request_timeout", {"line": 2})
    assert await client.is_closed()
    assert [envelope.command.id for envelope in lines_of(harness)] == ["a"]


async def test_a_malformed_stream_is_a_400(harness: HttpHarness) -> None:
    client = await harness.connect()
    client.send(head() + chunk(b'{"id":"a"}\n') + b"zz\r\n")
    assert (await client.receive()).failure == (400, "invalid_request")
    assert await client.is_closed()


async def test_a_stream_that_is_malformed_later_is_a_408(harness: HttpHarness) -> None:
    """aiohttp does not tell the handler. No more of the stream is read."""
    harness.app.limits = Limits(body_deadline_s=0.05)
    client = await harness.connect()
    client.send(head() + chunk(b'{"id":"a"}\n'))
    await harness.actor.arrived.wait()
    with capture_logs() as logs:
        client.send(b"zz\r\n" + chunk(b'{"id":"b"}\n') + request_bytes("POST", IMPORT, '{"id":"c"}', KIND))
        assert (await client.receive()).failure == (408, "request_timeout")
        assert await client.is_closed()
    assert [entry["event"] for entry in logs] == ["rejected"]
    assert [envelope.command.id for envelope in lines_of(harness)] == ["a"]


async def test_an_import_ends_when_its_client_disconnects(harness: HttpHarness) -> None:
    holding(harness)
    client = await harness.connect()
    client.send(head() + chunk(b'{"id":"a"}\n'))
    await harness.actor.arrived.wait()
    await client.close()
    await harness.actor.cancelled.wait()


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"Content-Type": "application/json"}, 415), ({"Content-Encoding": "gzip"}, 415), ({"Authorization": "x"}, 401)],
)
async def test_an_import_has_its_own_content_type(harness: HttpHarness, headers: dict[str, str], status: int) -> None:
    assert (await harness.request("POST", IMPORT, '{"id":"a"}', {**KIND, **headers})).status == status
    assert lines_of(harness) == []


# -- backup ------------------------------------------------------------------------------------------------------------


async def test_a_backup_is_streamed_to_its_end(harness: HttpHarness) -> None:
    response = await harness.request("GET", BACKUP, headers=AUTH)
    assert response.status == 200
    assert response.headers["content-type"] == "application/vnd.sqlite3"
    assert response.headers["content-length"] == str(len(response.body))
    assert response.headers["cache-control"] == "no-store"
    assert response.body == b"".join(piece for piece in harness.fakes.pieces if isinstance(piece, bytes))
    assert harness.fakes.close_reasons == [None]
    assert (await harness.request("GET", f"{BACKUP}?id=mine", headers=AUTH)).status == 200
    assert harness.fakes.backup_ids[1] == "mine"
    assert harness.fakes.backup_ids[0]


async def test_a_long_backup_is_streamed_over_tls(tmp_path: Path) -> None:
    async with await HttpHarness.on("admin tls", ROUTES, tmp_path) as harness:
        harness.fakes.pieces = [b"x" * 300_000] * 10
        assert len((await harness.request("GET", BACKUP)).body) == 3_000_000


async def test_a_client_may_disconnect_as_soon_as_it_has_the_whole_backup(harness: HttpHarness) -> None:
    slow = asyncio.Event()

    class Ending(FakeBackup):
        async def read(self) -> bytes:
            piece = await super().read()
            if not piece:  # the client may have disconnected by then
                await slow.wait()
            return piece

    harness.fakes.backup_type = Ending
    client = await harness.connect()
    client.send(request_bytes("GET", BACKUP, headers=AUTH))
    await client.reader.readuntil(b"\r\n\r\n")
    with capture_logs() as logs:
        await client.reader.readexactly(16 + 100_000)
        client.writer.transport.abort()
        await harness.fakes.closed.wait()
    assert harness.fakes.close_reasons == [None]
    assert logs == []


async def test_a_backup_is_rejected_if_too_many_are_in_progress(harness: HttpHarness) -> None:
    harness.fakes.no_backup = ApiError("overloaded", "8 backups are under way.")
    assert (await harness.request("GET", BACKUP, headers=AUTH)).failure == (503, "overloaded")


async def test_a_client_that_disconnects_stops_the_copy(harness: HttpHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "CONNECTION_CHECK_S", 0.01)
    harness.fakes.held = asyncio.Event()
    client = await harness.connect()
    client.send(request_bytes("GET", BACKUP, headers=AUTH))
    await harness.fakes.begun.wait()
    client.writer.transport.abort()
    await harness.fakes.closed.wait()


async def test_a_stopping_daemon_does_not_wait_for_a_copy(
    harness: HttpHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "CONNECTION_CHECK_S", 0.01)
    harness.fakes.held = asyncio.Event()
    asking = asyncio.create_task(harness.request("GET", BACKUP, headers=AUTH))
    await harness.fakes.begun.wait()
    harness.app.close()
    assert (await asking).failure == (503, "shutting_down")
    assert harness.fakes.closed.is_set()


async def test_the_connection_stays_open_after_a_backup(harness: HttpHarness) -> None:
    client = await harness.connect()
    for _ in range(2):
        assert (await client.request("GET", BACKUP, headers=AUTH)).status == 200
    assert (await client.request("GET", "/healthz")).status == 200


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (OSError("canary"), "internal_error", "This is a bug in jobd."),
        (DiskFull("it needs 48 MiB, there are 3 MiB"), "storage_full", "it needs 48 MiB, there are 3 MiB. Free some"),
        (BadCopy("row 5 missing from index"), "internal_error", "No backup: row 5 missing from index."),
    ],
)
async def test_a_backup_that_fails_says_why(harness: HttpHarness, failure: Exception, error: str, message: str) -> None:
    harness.fakes.pieces = [failure]
    response = await harness.request("GET", BACKUP, headers=AUTH)
    assert (response.status, response.error) == (ERROR_STATUS[error], error)
    assert message in response.json["message"]
    assert "canary" not in response.body.decode()
    assert harness.app.error_counts == {error: 1}


async def test_a_backup_that_the_stop_of_the_daemon_cuts_short_is_a_503(harness: HttpHarness) -> None:
    harness.fakes.pieces = [BackupStopped("the backup was cut short")]
    harness.app.closing = True
    assert (await harness.request("GET", BACKUP, headers=AUTH)).failure == (503, "shutting_down")


async def test_a_backup_that_fails_half_way_never_looks_complete(harness: HttpHarness) -> None:
    harness.fakes.pieces = [b"x" * 1000, OSError("canary")]
    with capture_logs() as logs, pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await harness.request("GET", BACKUP, headers=AUTH)
    assert [(entry["event"], entry["error"]) for entry in logs[1:]] == [("backup cut off", "OSError")]
    assert harness.fakes.close_reasons == ["the client did not read all of it"]


async def test_a_backup_whose_client_disconnects_is_aborted(harness: HttpHarness) -> None:
    harness.fakes.pieces = [b"x" * 1_000_000] * 200
    client: RawConnection = await harness.connect()
    client.send(request_bytes("GET", BACKUP, headers=AUTH))
    await client.reader.readuntil(b"\r\n\r\n")
    client.writer.transport.abort()
    await harness.fakes.closed.wait()


async def test_a_backup_whose_client_does_not_read_is_aborted(
    harness: HttpHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobd.http.read_deadline.WRITE_TIMEOUT_S", 0.05)
    harness.fakes.pieces = [b"x" * 1_000_000] * 200
    client = await harness.connect()
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    with capture_logs() as logs:
        client.send(request_bytes("GET", BACKUP, headers=AUTH))
        await harness.fakes.closed.wait()
    assert [(entry["event"], entry["error"]) for entry in logs[1:]] == [("backup cut off", "TimeoutError")]


async def test_a_backup_whose_end_is_not_read_is_aborted(harness: HttpHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobd.http.read_deadline.WRITE_TIMEOUT_S", 0.05)
    harness.fakes.pieces = [b"x"]
    client = await harness.connect()
    assert (await client.request("GET", "/healthz")).status == 200
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    assert isinstance(harness.listener, AdminListener)
    [connection] = harness.listener._server.connections
    assert connection.transport is not None
    while not connection.transport.get_write_buffer_size():
        connection.transport.write(b"x" * 1000)
    with capture_logs() as logs:
        client.send(request_bytes("GET", BACKUP, headers=AUTH))
        await harness.wait_until_closed()
    assert [(entry["event"], entry["error"]) for entry in logs[1:]] == [("backup cut off", "TimeoutError")]
