"""Talk to systemd: readiness, watchdog, socket activation.

If systemd did not start the process, the functions do nothing and return False, None or {}.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Final

FIRST_FD: Final = 3  # SD_LISTEN_FDS_START


def ready() -> bool:
    """Report that the start or a reload is complete."""
    return _send("READY=1")


def reloading() -> bool:
    """Report that a reload begins, until `ready`. The timestamp distinguishes it from earlier reloads."""
    return _send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def stopping() -> bool:
    return _send("STOPPING=1")


def extend_timeout(seconds: float) -> bool:
    """Keep systemd from ending a start or stop for so long, counted from now, even after its timeout."""
    return _send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")


def alive() -> bool:
    """Report to the watchdog. Call this at least every `watchdog_s() / 2` seconds."""
    return _send("WATCHDOG=1")


def status(text: str) -> bool:
    """Set the line that `systemctl status` shows."""
    return _send("STATUS=" + " ".join(text.split()))


def watchdog_s() -> float | None:
    """Return the watchdog timeout in seconds, None without a watchdog.

    Removes the variables from the environment. Raises ValueError if they are not numbers.
    """
    wait_us, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
    if not wait_us or int(wait_us) <= 0 or (pid and int(pid) != os.getpid()):
        return None
    return int(wait_us) / 1e6


def sockets() -> dict[str, list[socket.socket]]:
    """Return the sockets that systemd passed, by FileDescriptorName=. Those without a name are `unknown`.

    The caller closes them. Removes the variables from the environment, so that child processes do not use them.
    Raises ValueError if they are not numbers, OSError if a descriptor is not a socket.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if not count or int(pid or 0) != os.getpid():
        return {}
    by_name: dict[str, list[socket.socket]] = {}
    for index in range(int(count)):
        os.set_inheritable(FIRST_FD + index, False)
        opened = socket.socket(fileno=FIRST_FD + index)
        opened.setblocking(False)
        name = names[index] if index < len(names) else ""
        by_name.setdefault(name or "unknown", []).append(opened)
    return by_name


def _send(*lines: str) -> bool:
    """Send `lines` to $NOTIFY_SOCKET: a path, or an abstract name after an @. Return whether that succeeded.

    Errors are ignored, because systemd may be restarting or its queue may be full.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    target = "\0" + address[1:] if address.startswith("@") else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sender:
        try:
            sender.sendto("\n".join(lines).encode(errors="replace"), target)
        except OSError:
            return False
    return True
