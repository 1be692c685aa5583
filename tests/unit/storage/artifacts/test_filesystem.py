"""Artifacts in a real directory: deletions, reads, and paths that must not lead out of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Final

import pytest

from jobd.storage.artifacts.base import PIECE_BYTES, ArtifactStoreError, Deletion, Verdict
from jobd.storage.artifacts.filesystem import MAX_QUEUED, FileArtifactStore, directory_fault

OLD_S = 1_600_000_000


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path / "artifacts"
    place.mkdir()
    return place


@pytest.fixture
def store(place: Path) -> FileArtifactStore:
    return FileArtifactStore(str(place), "test")


def put(place: Path, key: str, text: str = "result") -> Path:
    path = place / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def delete_any(_: int) -> Verdict:
    return "delete"


def renamed_files(place: Path) -> list[Path]:
    return [path for path in place.rglob("*") if path.name.startswith(".jobd-")]


# -- deleting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["a", "2026/11/job-1.mp4", "ü ß\n*", "a\\b", ".hidden", "x" * 255])
async def test_delete_removes_only_the_object_of_the_key(place: Path, store: FileArtifactStore, key: str) -> None:
    path, other = put(place, key), put(place, "other/one")
    assert await store.delete(key, delete_any) == Deletion("deleted")
    assert not path.exists()
    assert other.read_text() == "result"
    assert path.parent.is_dir()
    assert await store.delete(key, delete_any) == Deletion("missing")
    assert not renamed_files(place)


@pytest.mark.parametrize("key", ["none", "no/such/way", "file/below", "x" * 300, "y" * 300 + "/z"])
async def test_a_missing_object_is_reported_as_missing(place: Path, store: FileArtifactStore, key: str) -> None:
    put(place, "file")
    assert await store.delete(key, delete_any) == Deletion("missing")


@pytest.mark.parametrize(
    "key", ["", ".", "a//b", "a/./b", "folder/", "../outside", "folder/../../outside", "..", "a\0b"]
)
async def test_an_invalid_key_deletes_nothing(place: Path, store: FileArtifactStore, key: str) -> None:
    outside = put(place.parent, "outside")
    put(place, "folder/inside")
    put(place, "a/b")
    assert (await store.delete(key, delete_any)).what == "left"
    assert await store.open(key) is None
    assert (place / "a/b").exists()
    assert (place / "folder/inside").exists()
    assert outside.exists()


async def test_a_directory_is_not_deleted(place: Path, store: FileArtifactStore) -> None:
    put(place, "folder/inside")
    assert await store.delete("folder", delete_any) == Deletion("left", "it is a directory")
    assert (place / "folder/inside").exists()


async def test_young_objects_and_those_of_other_jobs_are_not_deleted(place: Path, store: FileArtifactStore) -> None:
    path = put(place, "k")
    calls: list[int] = []

    def young(modified_at: int) -> Verdict:
        calls.append(modified_at)
        return "wait"

    outcome = await store.delete("k", young)
    assert (outcome.what, [outcome.modified_at]) == ("young", calls)
    assert abs(calls[0] - time.time() * 1000) < 60_000
    assert (await store.delete("k", lambda modified_at: "leave")).what == "left"
    assert path.read_text() == "result"


async def test_a_copy_that_keeps_an_old_mtime_is_young(place: Path, store: FileArtifactStore) -> None:
    path = put(place, "k")
    os.utime(path, (OLD_S, OLD_S))
    outcome = await store.delete("k", lambda modified_at: "wait" if modified_at > OLD_S * 1000 else "delete")
    assert outcome.what == "young"
    assert path.exists()


async def test_files_next_to_the_daemons_own_files_are_not_deleted(tmp_path: Path, place: Path) -> None:
    """The directory may be reachable under another name, such as a bind mount; the test uses a link."""
    own, other = put(place, "state/jobd.db"), put(place, "k")
    (tmp_path / "by-name").symlink_to(place / "state")
    store = FileArtifactStore(str(place), "test", [str(tmp_path / "none"), str(tmp_path / "by-name")])
    outcome = await store.delete("state/jobd.db", delete_any)
    assert outcome == Deletion("left", "the directory has files of the daemon")
    assert own.exists()
    assert await store.open("state/jobd.db") is None
    assert await store.delete("k", delete_any) == Deletion("deleted")
    assert not other.exists()


HANGS: Final = """
import asyncio, sys
from jobd.storage.artifacts.filesystem import FileArtifactStore

async def main():
    store = FileArtifactStore(sys.argv[1], "test")
    try:
        async with asyncio.timeout(0.2):
            await store.run(lambda: open(sys.argv[2]).read())
    except TimeoutError:
        print("timed out")
    await store.close()

asyncio.run(main())
"""


def test_a_hanging_mount_does_not_keep_the_process_alive(tmp_path: Path) -> None:
    """A FIFO without a writer stands for the mount. The interpreter would wait for the threads of a pool at exit."""
    os.mkfifo(tmp_path / "fifo")
    command = [sys.executable, "-c", HANGS, str(tmp_path), str(tmp_path / "fifo")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "timed out\n", "")


async def test_a_hanging_mount_has_a_limited_queue(store: FileArtifactStore) -> None:
    hangs, goes_on = threading.Event(), threading.Event()

    def hang() -> None:
        hangs.set()
        goes_on.wait()

    hung = asyncio.ensure_future(store.run(hang))
    await asyncio.to_thread(hangs.wait)
    waiting = [asyncio.ensure_future(store.probe()) for _ in range(MAX_QUEUED)]
    await asyncio.sleep(0)
    with pytest.raises(ArtifactStoreError, match="does not respond: 100 calls are waiting"):
        await store.probe()
    waiting[0].cancel()
    goes_on.set()
    await hung
    await asyncio.gather(*waiting[1:])
    await store.probe()
    await store.close()


# -- symbolic links ---------------------------------------------------------------------------------------------------


async def test_a_symbolic_link_in_the_path_is_not_followed(
    tmp_path: Path, place: Path, store: FileArtifactStore
) -> None:
    outside = put(tmp_path, "outside/secret")
    (place / "way").symlink_to(outside.parent)
    (place / "deep").mkdir()
    (place / "deep/way").symlink_to("../../outside")
    for key in ("way/secret", "deep/way/secret"):
        for call in (store.delete(key, delete_any), store.open(key)):
            with pytest.raises(ArtifactStoreError, match="way is a symbolic link, which jobd does not follow"):
                await call
    assert outside.read_text() == "result"


async def test_deleting_a_symbolic_link_deletes_only_the_link(
    tmp_path: Path, place: Path, store: FileArtifactStore
) -> None:
    outside = put(tmp_path, "outside/secret")
    (place / "link").symlink_to(outside)
    assert await store.delete("link", delete_any) == Deletion("deleted")
    assert not (place / "link").is_symlink()
    assert outside.read_text() == "result"


async def test_the_directory_itself_can_be_a_link(tmp_path: Path, place: Path) -> None:
    path = put(place, "k")
    (tmp_path / "by-name").symlink_to(place)
    assert await FileArtifactStore(str(tmp_path / "by-name"), "test").delete("k", delete_any) == Deletion("deleted")
    assert not path.exists()


# -- concurrent changes ------------------------------------------------------------------------------------------------


def replace_object(path: Path, text: str) -> None:
    """Store an object as a worker does: write another file, then rename it."""
    beside = path.with_name("beside")
    beside.write_text(text)
    os.replace(beside, path)


def before_call(monkeypatch: pytest.MonkeyPatch, call: str, happens: Callable[[], object], *, times: int = 1) -> None:
    """Call a function right before the first calls of a function of `os`."""
    real = getattr(os, call)
    left = [times]

    def now(*args: object, **named: object) -> object:
        if left[0]:
            left[0] -= 1
            happens()
        return real(*args, **named)

    monkeypatch.setattr(os, call, now)


@pytest.mark.parametrize("how", [replace_object, lambda path, text: path.write_text(text)])
async def test_a_file_that_replaces_the_judged_one_is_put_back(
    place: Path, store: FileArtifactStore, monkeypatch: pytest.MonkeyPatch, how: Callable[[Path, str], None]
) -> None:
    path = put(place, "k")
    calls: list[int] = []

    def first_only(modified_at: int) -> Verdict:
        calls.append(modified_at)
        return "delete" if len(calls) == 1 else "leave"

    before_call(monkeypatch, "rename", lambda: how(path, "the result of another job"))
    assert (await store.delete("k", first_only)).what == "left"
    assert len(calls) == 2
    assert path.read_text() == "the result of another job"
    assert not renamed_files(place)


async def test_a_file_created_during_the_rollback_is_kept(
    place: Path, store: FileArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(place, "k")
    before_call(monkeypatch, "rename", lambda: replace_object(path, "second"))
    before_call(monkeypatch, "link", lambda: replace_object(path, "third"))
    verdicts = iter(["delete", "leave"])
    assert (await store.delete("k", lambda modified_at: next(verdicts))).what == "left"  # type: ignore[arg-type]
    assert path.read_text() == "third"
    assert not renamed_files(place)


KILLED = """
import asyncio, os, signal, sys
from jobd.storage.artifacts.filesystem import FileArtifactStore

call, place, new = sys.argv[1:]
real = getattr(os, call)

def die(*args, **named):
    if call == "rename" and new:
        os.replace(new, place + "/folder/k")
    if call == "rename":
        real(*args, **named)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(os, call, die)
asyncio.run(FileArtifactStore(place, "test").delete("folder/k", lambda modified_at: "delete"))
"""


def kill_deletion(call: str, place: Path, new: str = "") -> None:
    run = subprocess.run([sys.executable, "-c", KILLED, call, str(place), new], check=False)
    assert run.returncode == -signal.SIGKILL


@pytest.mark.parametrize("call", ["rename", "unlink", "fsync"])
async def test_a_kill_during_a_deletion_leaks_nothing(place: Path, store: FileArtifactStore, call: str) -> None:
    path = put(place, "folder/k")
    os.utime(path, (OLD_S, OLD_S))
    kill_deletion(call, place)
    await store.delete("folder/k", delete_any)
    assert not path.exists()
    assert not renamed_files(place)


async def test_a_kill_during_a_deletion_loses_no_other_object(
    tmp_path: Path, place: Path, store: FileArtifactStore
) -> None:
    path, new = put(place, "folder/k"), put(tmp_path, "new", "the result of another job")
    kill_deletion("rename", place, str(new))
    assert not path.exists()
    assert (await store.delete("folder/k", lambda modified_at: "leave")).what == "left"
    assert path.read_text() == "the result of another job"
    assert not renamed_files(place)


async def test_after_a_kill_a_new_object_is_kept_and_the_renamed_one_is_deleted(
    place: Path, store: FileArtifactStore
) -> None:
    path = put(place, "folder/k")
    kill_deletion("rename", place)
    path.write_text("stored again")
    assert (await store.delete("folder/k", lambda modified_at: "leave")).what == "left"
    assert path.read_text() == "stored again"
    assert not renamed_files(place)


async def test_a_deletion_is_durable(place: Path, store: FileArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory is synced after its last change."""
    put(place, "folder/k")
    done: list[str] = []
    for call in ("unlink", "fsync"):
        real = getattr(os, call)

        def note(*args: object, _call: str = call, _real: Callable[..., object] = real, **named: object) -> object:
            done.append(_call)
            return _real(*args, **named)

        monkeypatch.setattr(os, call, note)
    await store.delete("folder/k", delete_any)
    assert done == ["unlink", "fsync"]


# -- faults -----------------------------------------------------------------------------------------------------------


async def test_a_missing_directory_is_an_error_and_not_a_deletion(place: Path, store: FileArtifactStore) -> None:
    place.rmdir()
    with pytest.raises(ArtifactStoreError, match="is not a directory"):
        await store.delete("k", delete_any)
    place.write_text("a file")
    with pytest.raises(ArtifactStoreError, match="Not a directory"):
        await store.delete("k", delete_any)


async def test_an_error_of_the_system_names_the_path(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(place, "k")

    def reject(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", reject)
    with pytest.raises(ArtifactStoreError, match=f"^{place}/k: Permission denied$"):
        await FileArtifactStore(str(place), "test").delete("k", delete_any)


async def test_no_file_descriptor_leaks(tmp_path: Path, place: Path, store: FileArtifactStore) -> None:
    (place / "way").symlink_to(tmp_path)
    put(place, "a/b/c")
    before = _open_below(tmp_path)
    for key in ("a/b/c", "a/b/none", "a/x/y", "a"):
        await store.delete(key, delete_any)
    with pytest.raises(ArtifactStoreError):
        await store.delete("way/x", delete_any)
    await store.probe()
    assert _open_below(tmp_path) == before


async def test_a_hanging_call_does_not_block_the_event_loop(
    place: Path, store: FileArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(place, "k")
    begun, go_on = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        go_on.wait()

    before_call(monkeypatch, "rename", hang)
    task = asyncio.create_task(store.delete("k", delete_any))
    await asyncio.to_thread(begun.wait)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    assert await store.delete("k", delete_any) == Deletion("missing")  # it took effect in the end
    await store.close()


async def test_a_file_system_that_is_no_longer_mounted_is_reported_and_its_objects_are_not_missing(
    place: Path, store: FileArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted = {"/", str(place.parent)}
    monkeypatch.setattr("jobd.storage.artifacts.filesystem.os.path.ismount", lambda path: path in mounted)
    await store.probe()
    mounted.add(str(place))  # a file system that is mounted later is no fault
    await store.probe()
    assert await store.delete("no-object", delete_any) == Deletion("missing")
    mounted.remove(str(place))
    for call in (store.probe(), store.delete("object", delete_any), store.open("object")):
        with pytest.raises(ArtifactStoreError, match=f"^{place} is no longer mounted"):
            await call
    mounted.add(str(place))
    await store.probe()
    assert await store.open("object") is None


# -- the probe --------------------------------------------------------------------------------------------------------


async def test_a_probe_leaves_nothing(place: Path, store: FileArtifactStore) -> None:
    put(place, ".jobd-probe-test", "of a probe that was killed")
    await store.probe()
    assert list(place.iterdir()) == []


async def test_a_probe_that_reads_another_value_fails(
    place: Path, store: FileArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pread", lambda *_: b"something else")
    with pytest.raises(ArtifactStoreError, match="differs from the one"):
        await store.probe()
    assert list(place.iterdir()) == []


async def test_a_probe_does_not_follow_a_link(tmp_path: Path, place: Path, store: FileArtifactStore) -> None:
    outside = put(tmp_path, "outside")
    (place / ".jobd-probe-test").symlink_to(outside)
    with pytest.raises(ArtifactStoreError, match="Too many levels of symbolic links"):
        await store.probe()
    assert outside.read_text() == "result"


def test_a_directory_can_store_artifacts_or_the_reason_is_reported(tmp_path: Path) -> None:
    assert directory_fault(str(tmp_path)) is None
    missing = tmp_path / "none"
    assert directory_fault(str(missing)) == f"{missing} is not a directory. Create it, or change artifacts.url."
    missing.write_text("a file")
    assert "is not a directory" in (directory_fault(str(missing)) or "")


def test_a_directory_of_another_user_cannot_store_artifacts(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    tmp_path.chmod(0o700)
    nobody = 65534
    if os.geteuid() == 0:
        os.seteuid(nobody)
    try:
        assert "is not writable" in (directory_fault("/") or "")
        if os.geteuid() == nobody:
            assert "is not accessible (Permission denied)" in (directory_fault(str(inside)) or "")
    finally:
        if os.getuid() == 0:
            os.seteuid(0)


@pytest.mark.parametrize(("blocks", "files", "free", "full"), [(0, 9, 9, True), (9, 9, 0, True), (9, 0, 0, False)])
def test_a_full_file_system_cannot_store_artifacts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int, files: int, free: int, full: bool
) -> None:
    usage = SimpleNamespace(f_bavail=blocks, f_files=files, f_favail=free)
    monkeypatch.setattr(os, "statvfs", lambda path: usage)
    assert (directory_fault(str(tmp_path)) is not None) == full


# -- reading ----------------------------------------------------------------------------------------------------------


async def read(store: FileArtifactStore, key: str) -> bytes | None:
    reading = await store.open(key)
    if reading is None:
        return None
    text = b""
    while piece := await reading.more():
        text += piece
    assert await reading.more() == b""
    assert len(text) == reading.size
    reading.close()
    return text


@pytest.mark.parametrize("key", ["a", "2026/11/job-1.mp4", "ü ß\n*", "a\\b", ".hidden", "x" * 255])
async def test_open_reads_the_object_of_the_key(place: Path, store: FileArtifactStore, key: str) -> None:
    path = put(place, key, "")
    assert await read(store, key) == b""
    path.write_bytes(content := os.urandom(2 * PIECE_BYTES + 1))
    assert await read(store, key) == content


@pytest.mark.parametrize(
    "key",
    ["none", "no/such/way", "file/below", "folder", "folder/", "", ".", "a//b", "x" * 300, "link", "pipe", "sock"],
)
async def test_only_regular_files_are_read(place: Path, store: FileArtifactStore, key: str, tmp_path: Path) -> None:
    put(place, "folder/inside")
    put(place, "file")
    (tmp_path / "secret").write_text("canary")
    (place / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(place / "pipe")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(place / "sock"))
        assert await read(store, key) is None


async def test_an_open_file_is_read_completely_even_if_it_is_replaced(place: Path, store: FileArtifactStore) -> None:
    path = put(place, "k", "the first")
    reading = await store.open("k")
    assert reading is not None
    assert await store.delete("k", delete_any) == Deletion("deleted")
    put(place, "k", "another one")
    assert await reading.more() == b"the first"
    reading.close()
    path.write_text("grows")
    reading = await store.open("k")
    assert reading is not None
    path.write_text("grows and grows")
    assert await reading.more() == b"grows"
    assert await reading.more() == b""
    reading.close()
    reading = await store.open("k")
    assert reading is not None
    path.write_text("")
    with pytest.raises(ArtifactStoreError, match="shorter"):
        await reading.more()
    reading.close()


def _open_below(place: Path) -> int:
    """Count the open files in the directory."""
    count = 0
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed by the listing itself
            name = Path(os.readlink(f"/proc/self/fd/{number}"))
            count += place in name.parents
    return count


async def test_the_thread_survives_a_file_that_fails_when_it_is_closed(store: FileArtifactStore) -> None:
    started, held = threading.Event(), threading.Event()

    def open_slowly() -> None:
        started.set()
        assert held.wait(150)

    def fail(_: None) -> None:
        raise OSError(5, "Input/output error")

    opening = asyncio.ensure_future(store.run(open_slowly, undo=fail))
    assert await asyncio.to_thread(started.wait, 30)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    held.set()
    async with asyncio.timeout(30):
        await store.probe()
    await store.close()


async def test_files_are_closed_even_if_the_caller_was_cancelled(place: Path, store: FileArtifactStore) -> None:
    put(place, "k")
    reading = await store.open("k")
    assert reading is not None
    reading.close()
    work, started, held = store._open, threading.Event(), threading.Event()

    def slowly(key: str) -> tuple[int, int] | None:
        opened = work(key)
        started.set()
        assert held.wait(150)
        return opened

    store._open = slowly  # type: ignore[method-assign]
    opening = asyncio.ensure_future(store.open("k"))
    assert await asyncio.to_thread(started.wait, 30)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert _open_below(place) == 1
    held.set()
    for _ in range(2):  # the file is closed after the calls that wait
        await store.probe()
    assert _open_below(place) == 0
