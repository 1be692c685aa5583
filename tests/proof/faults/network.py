"""A network in namespaces: each node has a link to PostgreSQL and a link to clients and other nodes. Requires root.

This process, PostgreSQL and the clients are in one namespace, which routes between the nodes. Everything ends with this
process.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from tests.proof.faults.harness import Tool
from tests.proof.faults.mounts import run
from tests.support.daemon_process import die_with_us
from tests.support.polling import poll_until

Link = Literal["database", "clients"]

_CLONE_NEWNET: Final = 0x40000000
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_NETWORKS: Final[dict[Link, int]] = {"database": 77, "clients": 78}
_NOWHERE: Final = "02:00:00:00:00:01"  # a MAC address of no interface


class NodeNetwork:
    """The namespace of node `number`. `prefix` starts a program in it."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"], preexec_fn=die_with_us)
        own, pid = os.readlink("/proc/self/ns/net"), self._holder.pid
        poll_until(lambda: os.readlink(f"/proc/{pid}/ns/net") != own)
        self.prefix = ["nsenter", f"--net=/proc/{pid}/ns/net"]
        for link, network in _NETWORKS.items():
            hub, inside = f"{link[:2]}{number}", f"{link[:2]}-node"
            run("ip", "link", "add", hub, "type", "veth", "peer", "name", inside, "netns", str(pid))
            run("ip", "address", "add", f"10.{network}.{number}.1/24", "dev", hub)
            run("ip", "link", "set", hub, "up")
            run(*self.prefix, "ip", "address", "add", f"10.{network}.{number}.2/24", "dev", inside)
            run(*self.prefix, "ip", "link", "set", inside, "up")
        run(*self.prefix, "ip", "link", "set", "lo", "up")
        run(*self.prefix, "ip", "route", "add", "default", "via", f"10.{_NETWORKS['clients']}.{number}.1")

    @property
    def host(self) -> str:
        """The address of the node for clients and other nodes."""
        return f"10.{_NETWORKS['clients']}.{self._number}.2"

    @property
    def database_host(self) -> str:
        """The address of PostgreSQL for the node."""
        return f"10.{_NETWORKS['database']}.{self._number}.1"

    def cut(self, link: Link) -> None:
        """Lose every packet in both directions, without an error for either end."""
        self._address("replace", link, "lladdr", _NOWHERE, "nud", "permanent")

    def heal(self, link: Link) -> None:
        self._address("del", link)

    def _address(self, verb: str, link: Link, *words: str) -> None:
        """Change the entries of the two ends in the tables of neighbors."""
        network, number, name = _NETWORKS[link], self._number, link[:2]
        neighbor = ["ip", "neighbor", verb]
        run(*neighbor, f"10.{network}.{number}.2", *words, "dev", f"{name}{number}")
        run(*self.prefix, *neighbor, f"10.{network}.{number}.1", *words, "dev", f"{name}-node")

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()


@contextlib.contextmanager
def networks(nodes: int) -> Iterator[list[NodeNetwork]]:
    """Enter a namespace with this many nodes. Raises OSError if the machine does not permit it."""
    outside = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        _call("unshare", _CLONE_NEWNET)
        with contextlib.ExitStack() as stack:
            stack.callback(_call, "setns", outside, _CLONE_NEWNET)
            run("ip", "link", "set", "lo", "up")
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
            made = []
            for number in range(1, nodes + 1):
                made.append(NodeNetwork(number))
                stack.callback(made[-1].close)
            yield made
    finally:
        os.close(outside)


def _call(function: str, *arguments: int) -> None:
    if getattr(_LIBC, function)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), function)


@functools.cache
def _can_make() -> bool:
    try:
        with networks(1):
            return True
    except OSError:
        return False


NETWORKS: Final = Tool("network namespaces, as root", "iproute2, util-linux", _can_make)
