"""What jobs print is kept in a file of its own, which may be lost at any time."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from jobd.model.responses import OutputGrant
from jobd.storage import output_file
from jobd.storage.output_file import KEPT_BYTES, KEPT_GRANTS, OutputFile, OutputFileFailed

AT = 1_700_000_000_000
GRANT = OutputGrant(created_at=AT, attempt=1, worker="w-1", fencing_token=7)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobd.db.output"


@pytest.fixture
async def file(path: Path) -> AsyncIterator[OutputFile]:
    opened = OutputFile(str(path), 1 << 20)
    yield opened
    await opened.close()


async def append(file: OutputFile, text: str, job_id: str = "a", token: int = 7, created_at: int = AT) -> int:
    grant = OutputGrant(created_at, 1, "w-1", token)
    return await file.append(job_id, grant, text.encode(), AT + token)


async def shown(file: OutputFile, job_id: str = "a", after: tuple[int, int] = (0, 0)) -> list[tuple[int, int, str]]:
    """Return the token, the offset and the text of each grant."""
    return [(each.fencing_token, each.offset, each.text) for each in await file.read(job_id, AT, *after)]


async def test_text_is_read_from_a_position_on(file: OutputFile, path: Path) -> None:
    assert [await append(file, "one\n"), await append(file, "zwö\n")] == [4, 9]
    await append(file, "again\n", token=8)
    assert await shown(file) == [(7, 0, "one\nzwö\n"), (8, 0, "again\n")]
    assert await shown(file, after=(7, 4)) == [(7, 4, "zwö\n"), (8, 0, "again\n")]
    assert await shown(file, after=(7, 9)) == [(8, 0, "again\n")]
    assert await shown(file, after=(8, 6)) == []
    assert await shown(file, after=(8, 99)) == [(8, 0, "again\n")]  # of a file that was made anew
    [first, _] = await file.read("a", AT, 0, 0)
    assert (first.attempt, first.worker, first.begins_at, first.end) == (1, "w-1", AT + 7, 9)
    assert path.stat().st_mode & 0o777 == 0o600


async def test_the_last_part_of_the_latest_grants_is_kept(file: OutputFile) -> None:
    for token in range(1, KEPT_GRANTS + 3):
        await append(file, f"{token}", token=token)
    assert [token for token, _, _ in await shown(file)] == [3, 4, 5, 6, 7]
    for each in "abcdef":
        await append(file, each * 16_384, "b")
    assert await shown(file, "b") == [(7, 2 * 16_384, "".join(each * 16_384 for each in "cdef"))]


async def test_a_new_job_has_no_output_of_an_earlier_one_with_its_id(file: OutputFile) -> None:
    await append(file, "old", created_at=AT - 1)
    assert await shown(file) == []
    await append(file, "new", token=8)
    await append(file, "kept", "b")
    await file.delete(["a"])
    assert (await shown(file), await shown(file, "b")) == ([], [(7, 0, "kept")])


async def test_the_oldest_output_makes_room(file: OutputFile, path: Path) -> None:
    for n in range(200):
        for _ in range(KEPT_BYTES // 16_384):
            await append(file, "x" * 16_384, f"job-{n}", token=n)
        assert path.stat().st_size <= file.limit_bytes
    assert await shown(file, "job-0") == []
    assert len((await shown(file, "job-199"))[0][2]) == KEPT_BYTES
    await file.close()
    lowered = OutputFile(str(path), 1 << 19)
    await append(lowered, "new")
    assert await shown(lowered, "job-199") == []
    assert path.stat().st_size <= lowered.limit_bytes
    await lowered.close()


@pytest.mark.parametrize("damage", ["deleted", "overwritten", "replaced"])
async def test_a_lost_file_is_made_anew(file: OutputFile, path: Path, damage: str) -> None:
    if damage == "overwritten":
        path.write_bytes(b"no database" * 1000)
    else:
        await append(file, "before")
        path.unlink()
    if damage == "replaced":
        sqlite3.connect(path).close()
    with capture_logs() as logs:
        assert await shown(file) == []
        await append(file, "after")
    assert await shown(file) == [(7, 0, "after")]
    assert [entry["event"] for entry in logs] == (["output_lost"] if damage == "overwritten" else [])


@pytest.mark.parametrize("change", ["UPDATE pieces SET text = 5", "DROP TABLE pieces", "DELETE FROM grants"])
async def test_a_file_with_other_contents_is_made_anew(file: OutputFile, path: Path, change: str) -> None:
    await append(file, "before")
    with closing(sqlite3.connect(path)) as conn:
        conn.execute(change)
        conn.commit()
    assert await shown(file) == []
    await append(file, "after")
    assert await shown(file) == [(7, 0, "after")]


async def test_the_file_does_not_grow_on_a_disk_with_little_space(
    file: OutputFile, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(30):
        await append(file, "x" * 16_384, f"job-{n}", token=n)
    size = path.stat().st_size
    monkeypatch.setattr(output_file, "_FREE_BYTES", 1 << 60)
    for n in range(30, 60):
        await append(file, "x" * 16_384, f"job-{n}", token=n)
    assert path.stat().st_size == size
    assert await shown(file, "job-0") == []
    path.unlink()
    with pytest.raises(OutputFileFailed, match="free on its disk"):
        await append(file, "lost")


async def test_calls_that_wait_for_a_slow_disk_are_bounded_and_end_with_the_file(
    file: OutputFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = threading.Event()
    file._thread.submit(may_go_on.wait)  # the disk
    monkeypatch.setattr(output_file, "_MAX_WAITING", 2)
    waiting = [asyncio.create_task(append(file, "text")) for _ in range(3)]
    with pytest.raises(OutputFileFailed, match="2 requests already wait"):
        await waiting.pop()
    ending = asyncio.create_task(file.close())
    await asyncio.sleep(0)
    may_go_on.set()
    for each in waiting:
        with pytest.raises(OutputFileFailed, match="stopping"):
            await each
    await ending


async def test_a_file_that_cannot_be_used_is_reported_once(file: OutputFile, path: Path) -> None:
    path.mkdir()
    with capture_logs() as logs:
        for _ in range(2):
            with pytest.raises(OutputFileFailed):
                await append(file, "lost")
            assert file.failure == "[Errno 21] Is a directory: " + repr(str(path))
    assert [entry["event"] for entry in logs] == ["output_unavailable"]
    path.rmdir()
    assert await shown(file) == []
    assert file.failure, "only reading is known to work"
    await append(file, "kept")
    assert file.failure is None
    assert await shown(file) == [(7, 0, "kept")]


async def test_a_closed_file_is_not_opened_again(file: OutputFile, path: Path) -> None:
    await file.close()
    with pytest.raises(OutputFileFailed, match="stopping"):
        await file.delete(["a"])
    await file.close()
    assert not path.exists()
