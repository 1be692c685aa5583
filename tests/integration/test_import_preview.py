"""The preview of an import over a real socket, and compared with the import of a real daemon."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from jobd.api import imports
from jobd.api.admin_routes import ROUTES
from jobd.client import AdminClient
from jobd.http.auth import Authenticator
from jobd.http.decoding import Limits
from jobd.model.commands import ImportCheck
from jobd.model.errors import ApiError
from jobd.model.responses import Imported, Response
from tests.support.forked_process import ForkedDaemon
from tests.support.http_harness import TOKEN, HttpHarness, ReceivedResponse

PREVIEW = "/admin/job-management/import/preview"
KIND = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/x-ndjson"}


def judged(command: ImportCheck) -> Response:
    if command.id.startswith("old"):
        return Response(Imported(command.id, True, "failed", "A job with this id exists: it is failed.", 3))
    return Response(Imported(command.id, False, command.status, None, 3))


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[HttpHarness]:
    limits = Limits(body=200, payload=50, body_deadline_s=0.3)
    async with HttpHarness(
        ROUTES, tmp_path, authenticator=Authenticator("admin", tokens=[TOKEN]), admin=True, limits=limits
    ) as opened:
        opened.actor.respond = judged
        yield opened


async def preview(harness: HttpHarness, *lines: Any) -> ReceivedResponse:
    body = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    return await harness.request("POST", PREVIEW, body, KIND)


async def test_each_line_is_reported_in_order(harness: HttpHarness) -> None:
    response = await preview(
        harness, {"id": "a"}, "{", {"id": "old-1"}, {"id": "b", "status": "failed"}, "", {"id": "b"}
    )
    data = response.data
    assert (data["wouldImport"], data["wouldSkip"], data["wouldReject"]) == (2, 2, 1)
    assert (data["more"], data["stopsAt"], data["stopReason"]) == (False, None, None)
    assert [(line["line"], line["id"], line["what"], line["status"]) for line in data["lines"]] == [
        (1, "a", "create", "queued"),
        (2, None, "reject", None),
        (3, "old-1", "skip", "failed"),
        (4, "b", "create", "failed"),
        (6, "b", "skip", None),
    ]
    assert data["lines"][4]["reason"] == "Line 4 has the same id."
    assert {type(envelope.command) for envelope in harness.actor.received} == {ImportCheck}  # not even an audit entry


async def test_a_preview_says_where_the_import_would_stop(harness: HttpHarness) -> None:
    lines = [{"id": f"job-{n}"} for n in range(3)] + [{"id": "done", "status": "cancelled"}, {"id": "old-2"}]
    data = (await preview(harness, *lines, {"id": "too-much"}, {"id": "more"})).data
    assert (data["wouldImport"], data["wouldSkip"], data["stopsAt"]) == (4, 1, 6)
    assert "unfinished jobs" in data["stopReason"]
    assert data["lines"][-1]["id"] == "old-2"
    harness.actor.respond = lambda command: ApiError("too_many_jobs", "5 jobs are allowed.")
    data = (await preview(harness, {"id": "a"})).data
    assert (data["stopsAt"], data["stopReason"], data["lines"]) == (1, "5 jobs are allowed.", [])


@pytest.mark.parametrize("code", ["overloaded", "storage_full", "shutting_down", "not_leader"])
async def test_an_error_that_would_stop_the_import_now_is_the_response(harness: HttpHarness, code: str) -> None:
    harness.actor.respond = lambda command: ApiError(code, "Not now.")
    response = await preview(harness, {"id": "a"}, {"id": "b"})
    assert (response.error, response.json["details"]["line"]) == (code, 1)


async def test_other_errors_are_reported_by_line(harness: HttpHarness) -> None:
    harness.actor.respond = lambda command: ApiError("internal_error", "A bug.")
    assert (await preview(harness, {"id": "a"})).data["lines"][0]["reason"] == "A bug."


async def test_a_preview_has_limits(harness: HttpHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "SHOWN_LINES", 2)
    data = (await preview(harness, *({"id": f"old-{n}"} for n in range(5)))).data
    assert (data["wouldSkip"], len(data["lines"]), data["more"]) == (5, 2, True)
    monkeypatch.setattr(imports, "MAX_PREVIEW_LINES", 2)
    many = await preview(harness, *({"id": f"a-{n}", "status": "cancelled"} for n in range(5)))
    assert (many.status, many.error) == (413, "too_large")


def nested(depth: int) -> list[Any]:
    """Return a list with `depth` levels."""
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


def test_the_preview_matches_the_import(tmp_path: Path) -> None:
    lines: list[Any] = [
        {"id": "old"},
        {"id": "q"},
        {"id": "p", "status": "processing", "progress": 40, "worker": "w"},
        {"id": "f", "status": "failed", "error_message": "no"},
        {"id": "q", "status": "failed"},
        {"id": "x", "priority": 5_000},
        {"queue": "q"},
        {"id": "nested", "payload": nested(128), "status": "completed", "metadata": nested(128)},
        {"id": "too-deep", "payload": nested(129)},
    ]
    with ForkedDaemon(tmp_path) as daemon:
        endpoint, token = f"unix:{daemon.admin_socket}", daemon.environ["ADMIN_TOKEN"]
        assert daemon.post("/v1/jobs", {"id": "old"}).status == 201
        with AdminClient(endpoint, token=token) as client:
            seen = client.preview_import(lines)
            assert client.stats().total_jobs == 1
            assert client.audit().entries == []
            done = client.import_jobs(lines)
            made = {job.id: job.status for job in client.iterate_jobs()}
            shown = client.get_job("nested")
            assert shown.payload_value == shown.metadata_value == nested(128)

            after = client.preview_import(lines)
    assert (seen.would_import, seen.would_skip, seen.would_reject) == (done.imported, done.skipped, done.refused_count)
    made.pop("old")
    assert {line.id: line.status for line in seen.lines if line.what == "create"} == made
    reported = {line.line: line.reason for line in seen.lines if line.what == "reject"}
    assert reported == {line.line: line.reason for line in done.refused}
    assert "`$.payload`: is nested 129 levels deep, the limit is 128." in (reported[9] or "")
    assert (after.would_import, after.would_skip) == (0, done.imported + done.skipped)
