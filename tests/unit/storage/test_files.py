"""Files next to the database: the lock, the epoch file and the reserve file."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from jobd.model.job import LAST_EPOCH
from jobd.model.storage import SPARE_BYTES, DiskFull, DiskSpace
from jobd.storage import files
from jobd.storage.files import FileLock, StoreBusy, StoreUnreadable


def test_a_lock_is_exclusive_names_its_process_and_ends_with_it(path: str) -> None:
    code = (
        "import sys\nfrom jobd.storage.files import FileLock\n"
        "held = FileLock(sys.argv[1])\nprint(1, flush=True)\ninput()"
    )
    with subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(StoreBusy, match=f"process {other.pid}:") as caught:
            FileLock(path)
        assert caught.value.pid == other.pid
        other.kill()
    with FileLock(path) as lock:
        assert Path(f"{path}.lock").read_text().split() == [str(os.getpid())]
        assert not os.path.exists(path)
    lock.release()
    FileLock(path).release()


def test_a_lock_without_a_process_id_is_held_by_an_unknown_process(path: str) -> None:
    with FileLock(path):
        Path(f"{path}.lock").write_bytes(b"")
        with pytest.raises(StoreBusy, match="another process") as caught:
            FileLock(path)
    assert caught.value.pid is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_lock_that_root_takes_belongs_to_the_owner_of_the_store(path: str) -> None:
    os.chown(os.path.dirname(path), 12345, 12346)
    FileLock(path).release()
    assert os.stat(f"{path}.lock").st_uid == 12345, "without a store, the owner of its directory counts"
    Path(path).touch()
    os.chown(path, 12347, 12348)
    FileLock(path).release()
    found = os.stat(f"{path}.lock")
    assert (found.st_uid, found.st_gid) == (12347, 12348)


@pytest.mark.parametrize(("link", "write"), [(".lock", FileLock), (".epoch.new", partial(files.write_epoch, epoch=1))])
def test_a_symbolic_link_is_not_followed(path: str, link: str, write: Callable[[str], object]) -> None:
    """The user of the daemon could let root write to any file."""
    other = Path(f"{path}.other")
    other.write_text("content")
    os.symlink(other, path + link)
    with pytest.raises(OSError, match="symbolic"):
        write(path)
    assert other.read_text() == "content"


def test_the_epoch_is_stored_and_read(path: str) -> None:
    assert files.read_epoch(path) is None
    for epoch in (1, 2, 1 << 22):
        files.write_epoch(path, epoch)
        assert files.read_epoch(path) == epoch
    assert not os.path.exists(f"{path}.epoch.new")


def test_every_flipped_bit_of_the_epoch_file_is_detected(path: str) -> None:
    files.write_epoch(path, 12)
    whole = Path(f"{path}.epoch").read_bytes()
    for place in range(len(whole) - 1):
        for bit in range(8):
            content = bytearray(whole)
            content[place] ^= 1 << bit
            Path(f"{path}.epoch").write_bytes(content)
            with contextlib.suppress(StoreUnreadable):
                assert files.read_epoch(path) == 12  # the space between them was damaged


def test_a_number_written_by_an_operator_is_accepted(path: str) -> None:
    Path(f"{path}.epoch").write_text("17\n")
    assert files.read_epoch(path) == 17
    Path(f"{path}.epoch").write_text("")
    with pytest.raises(StoreUnreadable):
        files.read_epoch(path)


@pytest.mark.parametrize("content", ["7 24 1", "7 23 1 2", "x", "7 1", f"{LAST_EPOCH + 1}"])
def test_an_epoch_is_never_guessed(path: str, content: str) -> None:
    Path(f"{path}.epoch").write_text(content)
    with pytest.raises(StoreUnreadable, match=rf"epoch is damaged: write a number .* > {path}\.epoch"):
        files.read_epoch(path)


def test_an_unreadable_epoch_file_is_reported(path: str) -> None:
    os.mkdir(f"{path}.epoch")
    with pytest.raises(StoreUnreadable, match=r"epoch cannot be read \(Is a directory\): make it a file of the owner"):
        files.read_epoch(path)


def test_the_epoch_file_has_the_mode_of_the_database(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_epoch(path, 1)
    assert stat.S_IMODE(os.stat(f"{path}.epoch").st_mode) == 0o600
    files.create_private(path)
    os.chmod(path, 0o640)
    owners = []
    monkeypatch.setattr(os, "fchown", lambda fd, uid, gid: owners.append((uid, gid)))
    for user in (1000, 0):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        files.write_epoch(path, 2)
        assert stat.S_IMODE(os.stat(f"{path}.epoch").st_mode) == 0o640
    assert owners == [(os.stat(path).st_uid, os.stat(path).st_gid)]  # files written by root belong to the owner


def test_the_reserve_file_occupies_and_frees_its_space(path: str) -> None:
    assert files.drop_reserve(path) is False
    files.build_reserve(path)
    files.build_reserve(path)
    assert os.stat(f"{path}.ballast").st_blocks * 512 >= files.RESERVE_FILE_BYTES
    assert files.drop_reserve(path) is True
    assert not os.path.exists(f"{path}.ballast")


def test_the_reserve_file_is_not_built_without_spare_space(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    short = files.RESERVE_FILE_BYTES + SPARE_BYTES - 1
    monkeypatch.setattr(files, "space", lambda _: DiskSpace(path, short, 1 << 40))
    with pytest.raises(DiskFull):
        files.build_reserve(path)
    assert not files.has_reserve(path)
    monkeypatch.setattr(files, "space", lambda _: DiskSpace(path, short + 1, 1 << 40))
    files.build_reserve(path)
    monkeypatch.setattr(files, "space", lambda _: DiskSpace(path, 0, 1 << 40))
    files.build_reserve(path)  # it is complete
    assert files.has_reserve(path)


def test_spare_space_is_occupied_and_freed(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(os, "posix_fallocate", lambda fd, start, size: calls.append(size))
    with files.occupied(path, SPARE_BYTES):
        pass
    monkeypatch.setattr(files, "space", lambda _: DiskSpace(path, 0, 4 << 20))
    with files.occupied(path, SPARE_BYTES):  # a part of it on a small disk
        pass
    assert calls == [SPARE_BYTES, (4 << 20) // 16]
    monkeypatch.undo()
    with pytest.raises(DiskFull), files.occupied(path, 1 << 60):
        raise AssertionError("the disk has no such space")
    with pytest.raises(PermissionError), files.occupied(path, SPARE_BYTES):
        raise PermissionError("of the caller")
    assert not [name for name in os.listdir(os.path.dirname(path)) if name.startswith("tmp")]


def test_the_space_of_the_disk_is_that_of_the_file_system(path: str) -> None:
    assert files.space(path) is None  # the file does not exist
    Path(path).touch()
    found, disk = files.space(path), shutil.disk_usage(path)
    assert found is not None
    assert (found.path, found.total_bytes) == (path, disk.total)
    assert found.free_bytes == pytest.approx(disk.free, abs=1 << 28)


def test_a_new_file_is_private_and_an_existing_one_is_not_changed(path: str) -> None:
    assert files.create_private(path) is True
    assert os.stat(path).st_mode & 0o777 == 0o600
    os.chmod(path, 0o640)
    assert files.create_private(path) is False
    assert os.stat(path).st_mode & 0o777 == 0o640


def test_only_errors_about_space_mean_a_full_disk() -> None:
    for number in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(DiskFull), files.raising_disk_full():
            raise OSError(number, os.strerror(number))
    with pytest.raises(PermissionError), files.raising_disk_full():
        raise PermissionError(errno.EACCES, "no")


def test_free_space_is_detected(tmp_path: Path) -> None:
    assert files.has_space(str(tmp_path))
    assert files.has_space(str(tmp_path / "nowhere"))  # the error is not about space


@pytest.mark.parametrize(("unused", "pattern"), [("Z", r"\.\d{8}T\d{6}Z"), ("-3", r"\.\d{8}T\d{6}Z-3")])
def test_a_dated_name_is_of_no_file(monkeypatch: pytest.MonkeyPatch, unused: str, pattern: str) -> None:
    monkeypatch.setattr("jobd.storage.files.os.path.exists", lambda name: not name.endswith(unused))
    assert re.fullmatch(f"db{pattern}", files.dated_name("db"))
