"""Record histories of a real daemon: clients contend for a few jobs over real connections while it is killed.

All random choices come from the seed. Timing does not.
"""

from __future__ import annotations

import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Final

from msgspec import Struct

from tests.proof.linearizability.client import ContendingClient, SharedContext
from tests.proof.linearizability.history import CallHistory, Outage, Terms
from tests.proof.linearizability.transport import boot_ns
from tests.support.daemon_process import DaemonProcess

# Recovery runs often. Responses are sent after the commit, as always.
CONFIG: Final = """
[cleanup]
recover_every = "5ms"
"""
CALLS: Final = 32  # of each client
KILLS_EVERY: Final = 6  # one of this many histories loses its daemon


class Recording(Struct):
    """A recorded history and its faults."""

    number: int
    history: CallHistory
    faults: Counter[str]


@contextmanager
def shared_daemon() -> Iterator[DaemonProcess]:
    """Run one daemon for many histories, in a temporary directory."""
    with tempfile.TemporaryDirectory(prefix="jobd-histories-") as place, DaemonProcess(Path(place), CONFIG) as daemon:
        yield daemon


def record_history(daemon: DaemonProcess, seed: int, number: int) -> Recording:
    """Record history `number` of `seed`: new jobs on a daemon that is ready before and after."""
    dice = Random(f"{seed}-{number}")
    kills = number % KILLS_EVERY == KILLS_EVERY - 1
    alone = dice.random() < (0.6 if kills else 0.3)
    terms = {f"h{number}-{letter}": _terms(dice, alone, kills) for letter in "abc"[: dice.randint(2, 3)]}
    context = SharedContext(daemon, CallHistory(terms), lossy=dice.random() < 0.6, alone=alone)
    clients = [
        ContendingClient(context, index, Random(f"{seed}-{number}-{index}")) for index in range(dice.randint(4, 6))
    ]
    kill_at = dice.randint(10, CALLS * len(clients) * 3 // 4) if kills else None
    with ThreadPoolExecutor(len(clients)) as pool:
        done = [pool.submit(client.run, CALLS) for client in clients]
        if kill_at is not None:
            context.wait_for_calls(kill_at)
            _restart(context, dice.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        for each in done:
            each.result()
    for job in terms:
        clients[0].read(job)
    return Recording(number, context.history, context.faults)


def _terms(dice: Random, alone: bool, kills: bool) -> Terms:
    """Draw the terms of the jobs. Most locks outlive the history; some expire within it.

    If the daemon is killed, locks are longer, so that some are live then: downtime must not age them.
    """
    patience_ms = dice.randint(4, 15) + 40 * kills if alone or dice.random() < 0.2 else 0
    return Terms(dice.randint(1, 3), patience_ms, dice.choice(["auto", "requeue", "fail"]))


def _restart(context: SharedContext, how: signal.Signals) -> None:
    """Kill or stop the daemon while clients are active, and start it again."""
    context.up.clear()
    if how == signal.SIGKILL:
        context.daemon.kill()
    else:
        assert context.daemon.stop(how) == 0
    down_ns = boot_ns()
    context.history.outages.append(Outage(down_ns, boot_ns()))
    context.faults["kill -9 and restart" if how == signal.SIGKILL else "SIGTERM and restart"] += 1
    context.daemon.start()
    context.up.set()
