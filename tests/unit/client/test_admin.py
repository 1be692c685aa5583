"""The streams of AdminClient: imports, exports, backups and artifacts."""

from __future__ import annotations

import asyncio
import io
import itertools
import os
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

import jobd.client
from jobd.client import ERRORS, AdminClient, AsyncAdminClient, Unreachable
from tests.support.scripted_server import ScriptedServer, drop, early, ok, raw, rejected


@pytest.fixture
def admin(endpoint: str) -> Iterator[AdminClient]:
    with AdminClient(endpoint, token="x") as client:
        yield client


def test_an_import_is_a_stream_of_lines(server: ScriptedServer, admin: AdminClient) -> None:
    rejected_lines = [{"line": 2, "id": None, "reason": "bad"}]
    server.script = [ok({"imported": 3, "skipped": 1, "refusedCount": 1, "refused": rejected_lines})]
    lines: list[Any] = [{"id": "a"}, b'{"id":"b"}\r\n', '{"id":"c"}']
    done = admin.import_jobs(iter(lines))
    assert (done.imported, done.skipped, done.refused_count, done.refused[0].reason) == (3, 1, 1, "bad")
    (received,) = server.received
    assert received.body == b'{"id":"a"}\n{"id":"b"}\n{"id":"c"}\n'
    assert received.headers["Content-Type"] == "application/x-ndjson"
    assert received.headers["Transfer-Encoding"] == "chunked"


def test_an_empty_import_is_sent(server: ScriptedServer, admin: AdminClient) -> None:
    server.script = [ok({"imported": 0, "skipped": 0})]
    assert admin.import_jobs([]).imported == 0
    assert server.received[0].body == b""


def test_a_rejected_import_raises_its_error(server: ScriptedServer, admin: AdminClient) -> None:
    server.early = [early(rejected("unauthorized", 401))]
    many = ({"id": f"job-{n}", "payload": "x" * 1000} for n in range(20_000))
    with pytest.raises(ERRORS["unauthorized"]):
        admin.import_jobs(many)


def test_an_import_is_not_retried(server: ScriptedServer, admin: AdminClient) -> None:
    server.script = [drop, ok({"imported": 1, "skipped": 0})]
    with pytest.raises(Unreachable):
        admin.import_jobs([{"id": "a"}])
    assert len(server.received) == 1


def test_an_export_reads_all_pages_and_yields_lines(server: ScriptedServer, endpoint: str) -> None:
    def pages() -> list[Any]:
        bodies = [
            b'{"success":true,"data":{"jobs":[{"id":"a","payload":[1.10,\r\n 2]},{"id":"b"}],"next_cursor":"7"}}',
            b'{"success":true,"data":{"jobs":[],"next_cursor":"9"}}',
            b'{"success":true,"data":{"jobs":[{"id":"c"}],"next_cursor":null}}',
        ]
        return [raw(body, kind="application/json") for body in bodies]

    lines = [b'{"id":"a","payload":[1.10,   2]}', b'{"id":"b"}', b'{"id":"c"}']
    server.script = pages()
    with AdminClient(endpoint, token="x") as client:
        assert list(client.export_jobs(queue="q")) == lines
    assert [received.path for received in server.received] == [
        "/admin/job-management/export?queue=q",
        "/admin/job-management/export?queue=q&cursor=7",
        "/admin/job-management/export?queue=q&cursor=9",
    ]

    async def export() -> list[bytes]:
        async with AsyncAdminClient(endpoint, token="x") as client:
            return [line async for line in client.export_jobs(status="failed", kind="k")]

    server.script = pages()
    assert asyncio.run(export()) == lines
    assert server.received[3].path == "/admin/job-management/export?status=failed&kind=k"


def test_a_backup_is_written_to_the_file(server: ScriptedServer, admin: AdminClient) -> None:
    content = os.urandom(700_000)
    server.script = [raw(content, kind="application/vnd.sqlite3")]
    file = io.BytesIO()
    assert admin.backup(file) == len(content)
    assert file.getvalue() == content


def test_a_rejected_backup_writes_nothing(server: ScriptedServer, admin: AdminClient) -> None:
    server.script = [rejected("unauthorized", 401)]
    file = io.BytesIO()
    with pytest.raises(ERRORS["unauthorized"]):
        admin.backup(file)
    assert file.getvalue() == b""


def test_an_artifact_is_written_to_the_file(server: ScriptedServer, admin: AdminClient) -> None:
    content = os.urandom(700_000)
    errors = [
        rejected("late_result_not_found", 404),
        rejected("not_found", 404),
        rejected("artifacts_unavailable", 503),
    ]
    server.script = [raw(content, kind="application/octet-stream"), *errors]
    file = io.BytesIO()
    assert admin.download_artifact("a.b:c", file) == len(content)
    assert file.getvalue() == content
    assert server.received[0].path == "/admin/job-management/jobs/a.b:c/artifact"
    with pytest.raises(ERRORS["late_result_not_found"]):
        admin.download_artifact("a", file, 7)
    assert server.received[1].path == "/admin/job-management/jobs/a/artifact?late_result=7"
    for code in ("not_found", "artifacts_unavailable"):
        with pytest.raises(ERRORS[code]):
            admin.download_artifact("a", file)
    assert file.getvalue() == content
    server.early = [server.cut(b"x" * 100_000, chunked=False)]
    with pytest.raises(Unreachable):
        admin.download_artifact("a", io.BytesIO())


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "with length"])
def test_an_interrupted_backup_is_an_error(server: ScriptedServer, admin: AdminClient, chunked: bool) -> None:
    server.early = [server.cut(b"x" * 100_000, chunked)]
    with pytest.raises(Unreachable):
        admin.backup(io.BytesIO())


class SlowBackup:
    """A daemon that sends a backup after `polls` requests for its progress, which was `since_progress_ms` ago."""

    def __init__(
        self, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, *, polls: int, since_progress_ms: int = 0
    ) -> None:
        self.left = polls
        self.since_progress_ms = since_progress_ms
        self.ready = threading.Event()
        self.progress: list[Any] = []
        server.early = [self._send]
        server.always = self._report_progress
        monkeypatch.setattr(jobd.client.admin, "POLL_S", 0.01)
        clock = itertools.count(0.0, 0.05)  # a poll takes a tenth of a second
        monkeypatch.setattr(jobd.client.admin, "time", SimpleNamespace(monotonic=clock.__next__))

    async def _send(self, request: web.BaseRequest) -> web.StreamResponse:
        self.id = request.query["id"]
        await asyncio.to_thread(self.ready.wait, 20)
        return web.Response(body=b"x" * 300_000)

    def _report_progress(self, received: Any) -> Any:
        assert received.path == "/admin/job-management/backups"
        self.left -= 1
        if not self.left:
            self.ready.set()
        other = {"id": "other", "state": "waiting", "bytes_done": 0, "bytes_total": None, "since_progress_ms": 0}
        mine = {**other, "id": self.id, "state": "copying", "bytes_done": -self.left, "bytes_total": 9}
        ends = {"started_at": 1, "ended_at": None, "message": None}
        return ok({"backups": [other | ends, mine | ends | {"since_progress_ms": self.since_progress_ms}]})

    def take(self, endpoint: str, timeout_s: float) -> int:
        with AdminClient(endpoint, token="x", timeout_s=timeout_s) as client:
            return client.backup(io.BytesIO(), on_progress=self.progress.append)


def test_a_backup_may_take_long_while_it_progresses(
    server: ScriptedServer, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowBackup(server, monkeypatch, polls=80)
    assert slow.take(endpoint, timeout_s=5) == 300_000
    copying = [seen.bytes_done for seen in slow.progress if seen.state == "copying"]
    assert copying == sorted(copying)
    assert len(copying) >= 79
    sending = [(seen.bytes_done, seen.bytes_total) for seen in slow.progress if seen.state == "sending"]
    assert sending[-1] == (300_000, 300_000)


def test_a_stalled_backup_is_an_error(server: ScriptedServer, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowBackup(server, monkeypatch, polls=10**6, since_progress_ms=3_000_000)
    try:
        with pytest.raises(Unreachable, match=r"has made no progress for 5 s\. It was copying at -?[0-9]+ bytes"):
            slow.take(endpoint, timeout_s=5)
    finally:
        slow.ready.set()


def test_a_daemon_without_progress_of_backups_counts_as_stalled(
    server: ScriptedServer, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowBackup(server, monkeypatch, polls=1)
    server.always = None  # 404, as from an older daemon
    try:
        with pytest.raises(Unreachable, match=r"has made no progress for 5 s"):
            slow.take(endpoint, timeout_s=5)
    finally:
        slow.ready.set()


def test_an_error_of_the_file_is_raised_unchanged(server: ScriptedServer, admin: AdminClient) -> None:
    server.script = [raw(b"content")]

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        admin.backup(Full())


def test_metrics_are_text(server: ScriptedServer, endpoint: str) -> None:
    server.script = [raw(b"jobd_jobs 1\n", kind="text/plain")]
    with AdminClient(endpoint, token="x") as client:
        assert client.metrics() == "jobd_jobs 1\n"
