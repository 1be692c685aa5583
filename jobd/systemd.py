"""What systemd and the daemon tell each other: readiness, the watchdog, sockets that are already open.

Where systemd did not start us every function does nothing, and says so by what it gives. It keeps no time of its own.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Final

FIRST_FD: Final = 3  # SD_LISTEN_FDS_START


def ready() -> bool:
    """The start is over, or a reload is."""
    return _send("READY=1")


def reloading() -> bool:
    """A reload begins, which `ready` ends. The moment tells it from earlier ones that are still being announced."""
    return _send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def stopping() -> bool:
    return _send("STOPPING=1")


def alive() -> bool:
    """A sign of life for the watchdog, due at least every half of `watchdog_s`."""
    return _send("WATCHDOG=1")


def status(text: str) -> bool:
    """One line for `systemctl status`."""
    return _send("STATUS=" + " ".join(text.split()))


def watchdog_s() -> float | None:
    """How many seconds systemd waits for a sign of life; None where it does not.

    Takes the variables out of the environment. Raises ValueError where they are no numbers.
    """
    wait_us, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
    if not wait_us or int(wait_us) <= 0 or (pid and int(pid) != os.getpid()):
        return None
    return int(wait_us) / 1e6


def sockets() -> dict[str, list[socket.socket]]:
    """The sockets that systemd opened for this process, by FileDescriptorName=; those without one are `unknown`.

    They are the caller's to close. Takes the variables out of the environment, for a child would think them its own.
    Raises ValueError where they are no numbers, OSError where a descriptor is no socket.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if not count or int(pid or 0) != os.getpid():
        return {}
    found: dict[str, list[socket.socket]] = {}
    for index in range(int(count)):
        os.set_inheritable(FIRST_FD + index, False)
        opened = socket.socket(fileno=FIRST_FD + index)
        opened.setblocking(False)
        name = names[index] if index < len(names) else ""
        found.setdefault(name or "unknown", []).append(opened)
    return found


def _send(*lines: str) -> bool:
    """Whether it was sent to $NOTIFY_SOCKET: a path, or an abstract name after an @.

    A manager that does not take it (it restarts, its queue is full) is no reason to stop: it counts as not sent.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    place = "\0" + address[1:] if address.startswith("@") else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sender:
        try:
            sender.sendto("\n".join(lines).encode(errors="replace"), place)
        except OSError:
            return False
    return True
