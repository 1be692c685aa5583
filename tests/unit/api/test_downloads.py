"""Downloads of artifacts through a real listener: content, errors, aborts."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from jobd.api.admin_routes import ROUTES
from jobd.api.downloads import disposition
from jobd.core.views import job_view, late_view
from jobd.http.auth import Authenticator
from jobd.model.commands import Get, LateResults, RecordAction
from jobd.model.errors import ApiError, ApiException
from jobd.model.job import Job, LateResult, Policy, Result
from jobd.model.responses import LateResultList, Response
from jobd.storage.artifacts import downloads
from jobd.storage.artifacts.base import PIECE_BYTES, ArtifactReader, ArtifactStoreError
from jobd.storage.artifacts.downloads import Downloads
from jobd.storage.artifacts.filesystem import FileArtifactStore
from tests.support.http_harness import TOKEN, HttpHarness, ReceivedResponse, request_bytes
from tests.support.rule_harness import RuleHarness

AUTH = {"Authorization": f"Bearer {TOKEN}"}
PATH = "/admin/job-management/jobs/a/artifact"
MOST = 2


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path / "artifacts"
    place.mkdir()
    return place


@pytest.fixture
async def harness(tmp_path: Path, place: Path) -> AsyncIterator[HttpHarness]:
    async with HttpHarness(
        ROUTES, tmp_path, authenticator=Authenticator("admin", tokens=[TOKEN]), admin=True
    ) as opened:
        opened.services.downloads = Downloads(FileArtifactStore(str(place), "test"), MOST)
        yield opened


def names(harness: HttpHarness, key: str | None) -> None:
    """Give the job of every request this storage key."""
    rules = RuleHarness()
    job: Job = rules.create("a")
    job = replace(job, result=None if key is None else Result(storage_key=key))
    view = job_view(job, rules.moment, Policy(), admin=False)
    harness.actor.respond = lambda command: Response(view)


def put(harness: HttpHarness, place: Path, key: str, content: bytes) -> None:
    names(harness, key)
    (place / key).parent.mkdir(parents=True, exist_ok=True)
    (place / key).write_bytes(content)


def assert_missing(response: ReceivedResponse, words: str, error: str = "not_found") -> None:
    assert (response.status, response.error) == (404, error)
    assert words in response.json["message"]


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, 3 * PIECE_BYTES + 1])
async def test_a_stored_result_is_sent_as_a_file(harness: HttpHarness, place: Path, size: int) -> None:
    content = os.urandom(size)
    put(harness, place, "2026/report.html", content)
    client = await harness.connect()
    for _ in range(MOST + 1):
        response = await client.request("GET", PATH, headers=AUTH)
        assert (response.status, response.body == content) == (200, True)
    assert response.headers["content-length"] == str(size)
    assert response.headers["content-type"] == "application/octet-stream"
    assert (
        response.headers["content-disposition"] == "attachment; filename=\"report.html\"; filename*=UTF-8''report.html"
    )
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["content-security-policy"] == "default-src 'none'; sandbox"
    assert response.headers["cache-control"] == "no-store"
    assert [(type(envelope.command), envelope.admin) for envelope in harness.actor.received] == [
        (Get, False),
        (RecordAction, False),
    ] * (MOST + 1)


async def test_a_missing_result_is_an_error_that_says_why(harness: HttpHarness, place: Path) -> None:
    harness.actor.respond = lambda command: ApiError("job_not_found", "No job has this id.")
    assert (await harness.request("GET", PATH, headers=AUTH)).error == "job_not_found"
    names(harness, None)
    response = await harness.request("GET", PATH, headers=AUTH)
    assert_missing(response, "storage_key is not set")
    names(harness, "gone/report.pdf")
    response = await harness.request("GET", PATH, headers=AUTH)
    assert_missing(response, "has no object")
    place.rmdir()
    with capture_logs() as logs:
        response = await harness.request("GET", PATH, headers=AUTH)
    assert (response.status, response.error) == (503, "artifacts_unavailable")
    assert "is not a directory" in str(logs[0])
    harness.services.downloads = Downloads(None, MOST)
    response = await harness.request("GET", PATH, headers=AUTH)
    assert_missing(response, "artifacts.url")


def brings(harness: HttpHarness, *lates: LateResult) -> None:
    """Give the job of every request these late results, and its own result."""
    rules = RuleHarness()
    job: Job = replace(rules.create("a"), result=Result(storage_key="own"))
    listed = LateResultList([late_view(late) for late in lates])
    view = job_view(job, rules.moment, Policy(), admin=False)
    harness.actor.respond = lambda command: Response(listed if isinstance(command, LateResults) else view)


async def test_the_artifact_of_a_late_result_can_be_downloaded_before_it_is_adopted(
    harness: HttpHarness, place: Path
) -> None:
    lates = [
        LateResult(7, 1, "w-1", 1, "h", result=Result(storage_key="late/1.pdf")),
        LateResult(9, 2, "w-2", 2, "h", result=Result(storage_key="late/2.pdf")),
        LateResult(11, 3, "w-3", 3, "h", result=Result(file_path="/srv/3")),
    ]
    brings(harness, *lates)
    (place / "late").mkdir()
    for number, content in (("late/1.pdf", b"one"), ("late/2.pdf", b"two"), ("own", b"own")):
        (place / number).write_bytes(content)
    for seq, content, name in ((7, b"one", "1.pdf"), (9, b"two", "2.pdf")):
        response = await harness.request("GET", f"{PATH}?late_result={seq}", headers=AUTH)
        assert (response.status, response.body) == (200, content)
        assert f'filename="{name}"' in response.headers["content-disposition"]
    assert [(type(envelope.command), envelope.admin) for envelope in harness.actor.received] == [
        (LateResults, False),
        (RecordAction, False),
    ] * 2
    assert (await harness.request("GET", PATH, headers=AUTH)).body == b"own"
    response = await harness.request("GET", f"{PATH}?late_result=11", headers=AUTH)
    assert_missing(response, "storage_key is not set")
    response = await harness.request("GET", f"{PATH}?late_result=8", headers=AUTH)
    assert_missing(response, "jobctl late a", "late_result_not_found")
    for wrong in ("0", "-1", "x", "", "1.5"):
        response = await harness.request("GET", f"{PATH}?late_result={wrong}", headers=AUTH)
        assert (response.status, response.error) == (400, "invalid_request"), wrong
    harness.actor.respond = lambda command: ApiError("job_not_found", "No job has this id.")
    assert (await harness.request("GET", f"{PATH}?late_result=7", headers=AUTH)).error == "job_not_found"


async def test_the_number_of_downloads_is_limited_and_ended_ones_do_not_count(
    harness: HttpHarness, place: Path
) -> None:
    put(harness, place, "k", bytes(64 << 20))
    lines = [await harness.connect() for _ in range(MOST)]
    for line in lines:
        line.send(request_bytes("GET", PATH, headers=AUTH))
        await line.reader.readuntil(b"\r\n\r\n")
    response = await harness.request("GET", PATH, headers=AUTH)
    assert (response.status, response.error, response.headers["retry-after"]) == (503, "overloaded", "1")
    assert "limits.downloads" in response.json["message"]
    with capture_logs() as logs:
        await lines[0].close()
        while len(harness.services.downloads._open) == MOST:
            assert (await harness.request("GET", "/healthz")).status == 200
        put(harness, place, "other", b"small")
        assert (await harness.request("GET", PATH, headers=AUTH)).body == b"small"
    assert [entry for entry in logs if entry["event"] == "download_cut_off"] == [], "who hangs up is no news"


async def test_a_client_that_does_not_read_is_cut_off_and_delays_no_other(
    harness: HttpHarness, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobd.http.read_deadline.WRITE_TIMEOUT_S", 0.2)
    put(harness, place, "k", bytes(64 << 20))
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as stalled:
        stalled.setblocking(False)
        await loop.sock_connect(stalled, harness.path)
        await loop.sock_sendall(stalled, request_bytes("GET", PATH, headers=AUTH))
        while not harness.services.downloads._open:
            assert (await harness.request("GET", "/healthz")).status == 200
        while harness.services.downloads._open:
            assert (await harness.request("GET", "/healthz")).status == 200


async def test_a_result_that_cannot_be_read_completely_is_shorter_than_its_length(
    harness: HttpHarness, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(harness, place, "k", b"x" * (2 * PIECE_BYTES))

    async def broken(reader: ArtifactReader) -> bytes:
        raise ArtifactStoreError("the disk is gone")

    monkeypatch.setattr(ArtifactReader, "more", broken)
    with capture_logs() as logs, pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await harness.request("GET", PATH, headers=AUTH)
    assert [(each["event"], each["error"]) for each in logs] == [("download_cut_off", "the disk is gone")]


async def test_the_wait_for_an_unresponsive_store_is_limited(
    harness: HttpHarness, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "CALL_S", 0.05)
    names(harness, "k")
    store: Any = harness.services.downloads._store

    async def hangs(key: str) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(store, "open", hangs)
    assert (await harness.request("GET", PATH, headers=AUTH)).failure == (503, "artifacts_unavailable")
    assert not harness.services.downloads._open


async def test_downloads_end_when_the_daemon_stops(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "CLOSING_S", 0.01)
    (place / "k").write_text("result")
    opened = Downloads(FileArtifactStore(str(place), "test"), MOST)
    cut = asyncio.Event()
    download = await opened.start("k", cut.set)
    opened.close()
    await cut.wait()
    with pytest.raises(ApiException) as no:
        await opened.start("k", cut.set)
    assert no.value.error.code == "shutting_down"
    download.close()


@pytest.mark.parametrize(
    ("key", "header"),
    [
        ("a/b.pdf", "filename=\"b.pdf\"; filename*=UTF-8''b.pdf"),
        ('ü "x"\r\n;.html', "filename=\"_ _x____.html\"; filename*=UTF-8''%C3%BC%20%22x%22%0D%0A%3B.html"),
        ("..", "filename=\"artifact\"; filename*=UTF-8''artifact"),
        (".bashrc", "filename=\"bashrc\"; filename*=UTF-8''bashrc"),
        ("x" * 4_000, f"filename=\"{'x' * 150}\"; filename*=UTF-8''{'x' * 150}"),
    ],
)
def test_the_file_name_is_a_plain_name(key: str, header: str) -> None:
    assert disposition(key) == f"attachment; {header}"
