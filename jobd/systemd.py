"""What systemd and the daemon tell each other: readiness, the watchdog, sockets that are already open.

Every function does nothing, and says so by what it gives, where systemd did not start us. It keeps no time of its own.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping
from typing import Final

FIRST_FD: Final = 3  # SD_LISTEN_FDS_START


class Notifier:
    """Sends states to the socket in $NOTIFY_SOCKET. Without one every method gives False."""

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Takes the variable out of `environ`: children must not speak for the daemon.

        Raises ValueError where it names neither a path nor an abstract socket (vsock is for virtual machines).
        """
        address = environ.pop("NOTIFY_SOCKET", "")
        if address and (address[0] not in "/@" or len(address) < 2):
            raise ValueError(f"NOTIFY_SOCKET={address!r}: expected an absolute path or @name")
        self._address = "\0" + address[1:] if address.startswith("@") else address

    def ready(self, status: str = "serving") -> bool:
        """Start-up is over, or a reload is."""
        return self._send("READY=1", _status(status))

    def reloading(self, status: str = "reloading") -> bool:
        """A reload begins; `ready` ends it. systemd asks for the moment, to tell this reload from an earlier one."""
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        return self._send("RELOADING=1", f"MONOTONIC_USEC={now_us}", _status(status))

    def stopping(self, status: str = "stopping") -> bool:
        return self._send("STOPPING=1", _status(status))

    def watchdog(self) -> bool:
        """Sign of life. Send it from what must not hang, at less than half of `watchdog_ms`."""
        return self._send("WATCHDOG=1")

    def status(self, text: str) -> bool:
        """One line for `systemctl status`."""
        return self._send(_status(text))

    def _send(self, *lines: str) -> bool:
        """Whether it was sent. A manager that does not take it (its queue is full, it is restarting) is no error."""
        if not self._address:
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sender:
            try:
                sender.sendto("\n".join(lines).encode(errors="replace"), self._address)
            except OSError:
                return False
        return True


def _status(text: str) -> str:
    return "STATUS=" + " ".join(text.split())


def watchdog_ms(environ: MutableMapping[str, str] = os.environ) -> int | None:
    """How long systemd waits for a sign of life, in milliseconds; None where it does not.

    Takes the variables out of `environ`. Raises ValueError where they are no numbers.
    """
    wait_us, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
    if not wait_us or (pid and int(pid) != os.getpid()):
        return None
    return max(1, int(wait_us) // 1000)


def listen_sockets(environ: MutableMapping[str, str] = os.environ) -> dict[str, list[socket.socket]]:
    """The sockets that systemd opened for this process, by FileDescriptorName=; those without one are `unknown`.

    Takes the variables out of `environ`: a child would take them for its own. Raises ValueError where they are no
    numbers, OSError where a descriptor is no socket.
    """
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
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
