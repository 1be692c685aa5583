"""Small disks, mounted in a mount namespace of this process and gone when it ends. Requires root."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.proof.faults.harness import Tool

_CLONE_NEWNS: Final = 0x00020000
_FS_IOC_SHUTDOWN: Final = 2 << 30 | 4 << 16 | ord("X") << 8 | 125  # _IOR('X', 125, __u32)
_NO_LOG_FLUSH: Final = 2


@functools.cache
def _enter_mount_namespace() -> None:
    """Give this process its own mount namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    run("mount", "--make-rprivate", "/")


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


@contextmanager
def tmpfs(directory: Path, size: int) -> Iterator[Path]:
    """Mount a disk in memory with `size` bytes."""
    _enter_mount_namespace()
    directory.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "jobd-fault", str(directory))
    try:
        yield directory
    finally:
        run("umount", "--lazy", str(directory))


class LoopDisk:
    """An ext4 file system in a file, mounted at `place` until `unmount`."""

    def __init__(self, directory: Path, size: int) -> None:
        _enter_mount_namespace()
        self.place = directory
        self._image = directory.with_name(f"{directory.name}.img")
        with open(self._image, "wb") as image:
            image.truncate(size)
        run("mkfs.ext4", "-q", str(self._image))
        directory.mkdir()

    def mount(self) -> None:
        run("mount", "-o", "loop", str(self._image), str(self.place))

    def unmount(self) -> None:
        if os.path.ismount(self.place):
            run("umount", str(self.place))

    def cut_power(self) -> None:
        """Drop all writes from now on, including those that are not synced yet."""
        place = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(place, _FS_IOC_SHUTDOWN, _NO_LOG_FLUSH.to_bytes(4, "little"))
        finally:
            os.close(place)


@contextmanager
def loop_disk(directory: Path, size: int) -> Iterator[LoopDisk]:
    """Mount a LoopDisk at `place` while the block runs."""
    disk = LoopDisk(directory, size)
    disk.mount()
    try:
        yield disk
    finally:
        disk.unmount()


@functools.cache
def _can_mount() -> bool:
    with tempfile.TemporaryDirectory() as directory:
        try:
            with tmpfs(Path(directory) / "tmpfs", 1 << 20):
                return True
        except OSError:
            return False


@functools.cache
def _can_loop() -> bool:
    with tempfile.TemporaryDirectory() as directory:
        try:
            with loop_disk(Path(directory) / "loop", 8 << 20) as disk:
                disk.cut_power()
                return True
        except OSError:
            return False


MOUNTS: Final = Tool("mounts, as root", "mount", _can_mount)
LOOP_MOUNTS: Final = Tool("loop mounts of ext4, as root", "e2fsprogs, mount", _can_loop)
