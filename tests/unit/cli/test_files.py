"""Writing files completely or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from jobd.cli import exit_codes, files
from jobd.storage.files import FileLock


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Expect the error for a file that is in use."""
    with pytest.raises(exit_codes.CliError) as caught:
        yield
    assert caught.value.code == 75


def test_a_file_is_written_completely_and_only_for_its_owner(tmp_path: Path) -> None:
    shown: list[int] = []
    with files.atomic_file(tmp_path / "copy.db", shown.append) as file:
        file.write(b"12345")
        file.write(b"678")
        assert not (tmp_path / "copy.db").exists()
    assert (tmp_path / "copy.db").read_bytes() == b"12345678"
    assert (tmp_path / "copy.db").stat().st_mode & 0o777 == 0o600
    assert shown == [5, 8]
    assert [path.name for path in tmp_path.iterdir()] == ["copy.db"]


def test_a_partial_file_that_others_can_read_is_made_private(tmp_path: Path) -> None:
    part = tmp_path / "copy.db.part"
    part.touch()
    part.chmod(0o666)
    with files.atomic_file(tmp_path / "copy.db", lambda _: None):
        assert part.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "copy.db").stat().st_mode & 0o777 == 0o600


def test_a_partial_file_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = tmp_path / "copy.db.part"
    part.write_text("theirs")
    monkeypatch.setattr(os, "geteuid", lambda: part.stat().st_uid + 1)
    with pytest.raises(click.UsageError, match="belongs to another user"):
        _break_off(tmp_path / "copy.db")
    assert part.read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["copy.db.part"]


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-journal", ".lock", ".epoch", ".ballast"])
@pytest.mark.parametrize("folder", ["store", "link"])
def test_no_file_of_a_store_in_use_is_overwritten(tmp_path: Path, suffix: str, folder: str) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "store")
    relation = "belongs to" if suffix else "is"
    with FileLock(str(tmp_path / "store" / "jobs.db")), pytest.raises(exit_codes.CliError) as caught:
        files.check_target(tmp_path / folder / f"jobs.db{suffix}", yes=True)
    assert caught.value.code == 75
    message = f"jobs.db{suffix} {relation} the store of a running daemon (process {os.getpid()}): name another file"
    assert message in str(caught.value)


@pytest.mark.parametrize("place", ["pipe", "socket", "stdout"])
def test_only_a_regular_file_is_replaced(tmp_path: Path, place: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "stdout").symlink_to(tmp_path / "pipe")  # as /dev/stdout may be
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
    with pytest.raises(click.UsageError, match="is not a regular file: name a new one"):
        files.check_target(tmp_path / place, yes=True)


def test_a_symlink_stays_and_its_target_is_written(tmp_path: Path) -> None:
    link, target = tmp_path / "latest.db", tmp_path / "disk" / "today.db"
    target.parent.mkdir()
    link.symlink_to(target)
    for content in (b"first", b"second"):
        with files.atomic_file(link, lambda _: None) as file:
            file.write(content)
        assert (link.is_symlink(), target.read_bytes()) == (True, content)
    assert [path.name for path in target.parent.iterdir()] == ["today.db"]


@pytest.mark.parametrize("suffix", ["-wal", "-journal"])
def test_a_file_is_not_written_beside_the_log_of_another_database(tmp_path: Path, suffix: str) -> None:
    """SQLite would apply that log to the file."""
    (tmp_path / f"killed.db{suffix}").write_bytes(b"log")
    with pytest.raises(click.UsageError, match=f"killed.db{suffix} is left over from another database"):
        files.check_target(tmp_path / "killed.db", yes=True)


def test_an_incomplete_file_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "copy.db").write_bytes(b"old")
    (tmp_path / "copy.db.part").write_bytes(b"left over from a crash, longer than what comes now")
    with pytest.raises(OSError, match="broke"):
        _break_off(tmp_path / "copy.db")
    assert (tmp_path / "copy.db").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["copy.db"]


def _break_off(path: Path) -> None:
    with files.atomic_file(path, lambda _: None) as file:
        file.write(b"new")
        raise OSError("the stream broke")


def test_two_programs_do_not_write_one_file(tmp_path: Path) -> None:
    with files.atomic_file(tmp_path / "copy.db", lambda _: None) as file:
        file.write(b"first")
        with refused(), files.atomic_file(tmp_path / "copy.db", lambda _: None):
            pass
    assert (tmp_path / "copy.db").read_bytes() == b"first"


def test_a_file_that_another_program_completes_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It renames the partial file after this program has opened it, and before it locks it."""
    path, flock = tmp_path / "copy.db", fcntl.flock
    with contextlib.ExitStack() as other:
        other.enter_context(files.atomic_file(path, lambda _: None)).write(b"theirs")

        def lock_late(file: int, how: int) -> None:
            other.close()
            flock(file, how)

        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", lock_late)
            with refused(), files.atomic_file(path, lambda _: None):
                pass
    assert path.read_bytes() == b"theirs"


def test_a_store_that_a_daemon_opened_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "copy.db").write_bytes(b"old")
    path = tmp_path / "copy.db"
    with refused(), contextlib.ExitStack() as stack, files.atomic_file(path, lambda _: None) as file:
        file.write(b"new")
        stack.enter_context(FileLock(str(path)))
    assert (tmp_path / "copy.db").read_bytes() == b"old"
    assert not (tmp_path / "copy.db.part").exists()


def test_the_partial_file_is_not_a_store_or_a_symlink(tmp_path: Path) -> None:
    """The .part name of one file may be another file."""
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / "copy.db.part").symlink_to(tmp_path / "theirs")
    with pytest.raises(OSError, match="symbolic"), files.atomic_file(tmp_path / "copy.db", lambda _: None):
        pass
    with FileLock(str(tmp_path / "store.part")), refused():
        _break_off(tmp_path / "store")
    assert (tmp_path / "theirs").read_bytes() == b"theirs"
