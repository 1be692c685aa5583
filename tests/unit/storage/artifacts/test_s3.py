"""Artifacts in a bucket, on real servers: deletions, reads and errors."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import obstore
import pytest
from obstore.store import S3Store
from yarl import URL

from jobd.engine.clock import Clock
from jobd.maintenance.artifact_sweeper import ArtifactSweeper, SweepStats
from jobd.model.storage import Tombstone
from jobd.storage.artifacts import s3
from jobd.storage.artifacts.base import ArtifactStoreError, Deletion, Margins, Verdict
from jobd.storage.artifacts.s3 import S3ArtifactStore
from jobd.storage.store import Store
from tests.support.factories import ChangeFactory
from tests.support.s3_servers import KEY, SECRET, moto, radosgw
from tests.support.virtual_engine import until

SERVERS = {"radosgw": radosgw, "moto": moto}

pytestmark = pytest.mark.timeout(180)  # for the start of a server on a busy machine


class ServerBucket(NamedTuple):
    name: str
    all: S3Store  # without a prefix

    def keys(self) -> list[str]:
        return sorted(str(each["path"]) for page in obstore.list(self.all) for each in page)

    def put(self, *keys: str) -> None:
        for key in keys:
            obstore.put(self.all, key, b"result")


@pytest.fixture(scope="module", params=sorted(SERVERS))
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Return the name of a server and its endpoint."""
    with SERVERS[request.param](tmp_path_factory.mktemp(request.param)) as endpoint:
        yield request.param, endpoint


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch, server: tuple[str, str]) -> str:
    """Set the environment variables of the daemon, and return the endpoint."""
    settings = {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": server[1],
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return server[0]


@pytest.fixture
async def bucket(at: str, request: pytest.FixtureRequest) -> ServerBucket:
    """Create a bucket for each test."""
    name = f"test-{abs(hash(request.node.nodeid)):x}"
    store = S3Store(name)
    url = await obstore.sign_async(store, "PUT", "", timedelta(seconds=60))
    async with aiohttp.ClientSession() as http, http.put(URL(url, encoded=True)) as response:
        assert response.status == 200, await response.text()
    return ServerBucket(name, store)


@pytest.fixture
async def store(bucket: ServerBucket) -> AsyncIterator[S3ArtifactStore]:
    store = S3ArtifactStore(bucket.name, "pre/fix", "test")
    yield store
    await store.close()


def delete_any(_: int) -> Verdict:
    return "delete"


@pytest.mark.parametrize("key", ["k", "2026/11/job-1.mp4", "a b+c&d=é/ü%20?#", ".hidden"])
async def test_delete_removes_only_the_object_of_the_key(
    bucket: ServerBucket, store: S3ArtifactStore, key: str
) -> None:
    others = [key, f"pre/fix/{key}2", f"pre/{key}"]
    bucket.put(f"pre/fix/{key}", *others)
    assert await store.delete(key, delete_any) == Deletion("deleted")
    assert bucket.keys() == sorted(others)
    assert await store.delete(key, delete_any) == Deletion("missing")


@pytest.mark.parametrize("server", ["moto"], indirect=True)
@pytest.mark.parametrize(
    "key",
    ["a~b", "a*b", "a{b}", "a|b", 'a"b', "a\\b", "a[b]^`<>", "%2F", " x ", "\ufeffx", "\x85", "x" * 1016],
)
async def test_unusual_keys_are_encoded_correctly(bucket: ServerBucket, store: S3ArtifactStore, key: str) -> None:
    assert await store.delete(key, delete_any) == Deletion("missing")


async def test_a_bucket_needs_no_prefix(bucket: ServerBucket) -> None:
    bucket.put("a/k", "k")
    store = S3ArtifactStore(bucket.name, "", "test")
    assert store.place == f"s3://{bucket.name}"
    assert await store.delete("k", delete_any) == Deletion("deleted")
    assert bucket.keys() == ["a/k"]
    await store.close()


async def test_young_objects_and_those_of_other_jobs_are_not_deleted(
    bucket: ServerBucket, store: S3ArtifactStore
) -> None:
    bucket.put("pre/fix/k")
    modified_at = round(obstore.head(bucket.all, "pre/fix/k")["last_modified"].timestamp() * 1000)
    assert await store.delete("k", lambda _: "wait") == Deletion("young", "", modified_at)
    assert (await store.delete("k", lambda _: "leave")).what == "left"
    assert bucket.keys() == ["pre/fix/k"]


@pytest.mark.parametrize(
    "key", ["", ".", "a//b", "a/./b", "a/", "..", "a/../b", "a\tb", "a\x01b", "a\nb", "a\x7f", "x" * 1017, "é" * 509]
)
async def test_an_invalid_key_deletes_nothing(store: S3ArtifactStore, key: str) -> None:
    assert (await store.delete(key, delete_any)).what == "left"
    assert await store.open(key) is None


@pytest.mark.parametrize("key", ["k", "a b+c&d=é/ü%20?#"])
@pytest.mark.parametrize("pieces", [0, 0.5, 1, 2, 2.5])
async def test_an_object_is_read_in_ranges(
    at: str, bucket: ServerBucket, store: S3ArtifactStore, key: str, pieces: float
) -> None:
    if at == "radosgw":
        pieces = min(pieces, 1)  # on dbstore it returns every range from the beginning of the object
    size = round(pieces * s3.PIECE_BYTES)
    content = os.urandom(size)
    obstore.put(bucket.all, f"pre/fix/{key}", content)
    reading = await store.open(key)
    assert reading is not None
    assert reading.size == size
    text = b""
    while piece := await reading.more():
        text += piece
    assert text == content
    assert await reading.more() == b""
    reading.close()
    assert await store.open(f"{key}2") is None


async def test_an_object_that_changes_during_a_read_is_an_error(bucket: ServerBucket, store: S3ArtifactStore) -> None:
    obstore.put(bucket.all, "pre/fix/k", b"x" * (s3.PIECE_BYTES + 1))
    reading = await store.open("k")
    assert reading is not None
    assert len(await reading.more()) == s3.PIECE_BYTES
    obstore.put(bucket.all, "pre/fix/k", b"y" * (s3.PIECE_BYTES + 1))
    with pytest.raises(ArtifactStoreError):
        await reading.more()
    obstore.delete(bucket.all, "pre/fix/k")
    with pytest.raises(ArtifactStoreError):
        await reading.more()


@pytest.mark.parametrize("server", ["moto"], indirect=True)
async def test_an_object_that_replaces_the_judged_one_is_kept(bucket: ServerBucket, store: S3ArtifactStore) -> None:
    bucket.put("pre/fix/k")
    verdicts: list[Verdict] = ["delete", "leave"]

    def judge(_: int) -> Verdict:
        if len(verdicts) == 2:
            obstore.put(bucket.all, "pre/fix/k", b"the result of another job")
        return verdicts.pop(0)

    assert (await store.delete("k", judge)).what == "left"
    assert bytes(obstore.get(bucket.all, "pre/fix/k").bytes()) == b"the result of another job"


async def test_a_probe_leaves_nothing(bucket: ServerBucket, store: S3ArtifactStore) -> None:
    await store.probe()
    assert bucket.keys() == []


async def test_a_missing_bucket_is_an_error_and_not_a_deletion(at: str) -> None:
    store = S3ArtifactStore("test-nowhere", "", "test")
    for call in (store.delete("k", delete_any), store.open("k")):
        with pytest.raises(ArtifactStoreError, match="the bucket does not exist"):
            await call
    with pytest.raises(ArtifactStoreError, match="404 Not Found"):
        await store.probe()
    await store.close()


@pytest.mark.parametrize("server", ["radosgw"], indirect=True)  # moto accepts any key
async def test_rejected_credentials_are_reported_without_their_values(
    bucket: ServerBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush-hush")
    store = S3ArtifactStore(bucket.name, "", "test")
    for call in (store.delete("k", delete_any), store.probe()):
        with pytest.raises(ArtifactStoreError) as caught:
            await call
        assert "403" in str(caught.value)
        assert "hush" not in str(caught.value)
        assert "Signature=" not in str(caught.value)
        assert len(str(caught.value)) < 300
    await store.close()
    assert bucket.keys() == ["k"]


async def test_the_sweeper_deletes_objects_of_deleted_jobs(
    bucket: ServerBucket, store: S3ArtifactStore, tmp_path: Path
) -> None:
    maker = ChangeFactory()
    storage, _ = await Store.open(str(tmp_path / "jobd.db"))
    async with storage:
        clock = Clock()
        now = clock.moment().now
        keys = [f"k/{number}" for number in range(25)]
        bucket.put(*(f"pre/fix/{key}" for key in keys), "pre/fix/other")
        waiting = [Tombstone(900 + n, f"job-{n}", key, now, now) for n, key in enumerate(keys)]
        await storage.write(maker.batch([], tombstones=waiting))
        sweeper = ArtifactSweeper(storage, store, clock, SweepStats(waiting=len(keys)), Margins(young_ms=0))
        running = asyncio.create_task(sweeper.run())
        await until(lambda: not sweeper.stats.waiting)
        sweeper.stop()
        await running
        assert sweeper.stats == SweepStats(waiting=0, deleted=len(keys))
        assert bucket.keys() == ["pre/fix/other"]
        assert (await storage.due_tombstones(now + 10**9, 99)).found == []


# -- without a server -------------------------------------------------------------------------------------------------


def store_at(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> S3ArtifactStore:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    return S3ArtifactStore("bucket", "", "test")


async def test_an_unreachable_server_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    store = store_at(monkeypatch, f"http://127.0.0.1:{port}")
    with pytest.raises(ArtifactStoreError, match=r"^s3://bucket: "):
        await store.delete("k", delete_any)
    await store.close()


async def test_a_server_that_does_not_respond_is_an_error_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        monkeypatch.setattr(s3, "CALL_S", 0.1)
        store = store_at(monkeypatch, f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(ArtifactStoreError, match=r"no response within 0.1 s"):
            await store.probe()
        await store.close()


@pytest.mark.parametrize(
    ("statuses", "outcome"),
    [
        ([204], "deleted"),
        ([404], "deleted"),  # another request deleted it
        ([501, 204], "deleted"),  # the server rejects conditions
        ([412, 409, 200], "deleted"),  # it changed twice in between
        ([412] * 3, "it changed each time"),  # a store with unusual tags would be asked without end
        ([500], r"HTTP 500\.$"),
        ([403], r"HTTP 403\. Check the credentials\.$"),
    ],
)
async def test_every_response_to_a_deletion_is_handled(
    monkeypatch: pytest.MonkeyPatch, statuses: list[int], outcome: str
) -> None:
    store = store_at(monkeypatch, "http://127.0.0.1:1")
    sent: list[dict[str, str]] = []

    async def head(*_: Any) -> Any:
        from datetime import UTC, datetime

        return {"last_modified": datetime.now(UTC), "e_tag": '"tag"'}

    async def send(_: str, headers: dict[str, str]) -> int:
        sent.append(headers)
        return statuses[len(sent) - 1]

    monkeypatch.setattr(obstore, "head_async", head)
    monkeypatch.setattr(store, "_send_delete", send)
    if outcome == "deleted":
        assert await store.delete("k", delete_any) == Deletion("deleted")
    else:
        with pytest.raises(ArtifactStoreError, match=outcome):
            await store.delete("k", delete_any)
    assert len(sent) == len(statuses)
    assert sent[0] == {"If-Match": '"tag"'}
    if 501 in statuses:
        assert sent[-1] == {}
    await store.close()


def test_wrong_environment_variables_are_reported_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "perhaps")
    with pytest.raises(ArtifactStoreError, match=r"s3://bucket: .*perhaps"):
        store_at(monkeypatch, "http://127.0.0.1:1")
