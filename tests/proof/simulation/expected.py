"""All events, commands, errors and faults that must happen in some seed, by the name under which they are counted.

Code that never runs is not tested, however many seeds pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, get_args

from jobd.model.commands import AnyCommand, EndGrants
from jobd.model.errors import ERROR_STATUS
from jobd.model.events import EventType
from tests.proof.simulation.cluster.scenario import CLUSTER_FAULTS, LOST
from tests.proof.simulation.injector import UPKEEP
from tests.proof.simulation.scenario import FAULTS, MISHAPS

# Errors of the HTTP layer, the services behind it and nodes of a cluster, not of the core.
HTTP_ONLY: Final = frozenset(
    {
        "not_leader",
        "no_standby",
        "upgrade_incomplete",
        "unauthorized",
        "forbidden",
        "not_found",
        "method_not_allowed",
        "request_timeout",
        "events_gone",
        "artifacts_unavailable",
        "output_off",
        "output_unavailable",
        "too_frequent",
        "plan_not_found",
        "too_many_quiet_rules",  # of the core, but no run has 100 rules
        "too_large",
        "unsupported_media_type",
        "expectation_failed",
    }
)
# Counted under more than one name.
IN_PARTS: Final = {
    "full disk": ("full disk 1", "full disk 2", "full disk 3"),
    "write error": (),
    "lost fsync result": (),
    "slice error": (),
    "lost slice result": (),
    "read error": ("failing load",),
    "upkeep error": tuple(f"failing {what}" for what in UPKEEP),
    "rot": ("rot row", "rot payload"),
}
ON_DISK: Final = (
    "crash: write entered",
    "crash: write written",
    "crash: write flushed",
    "crash: unflushed write kept",
    "crash: unflushed write lost",
    "write failed, nothing written",
    "write failed, yet written",
    "write on a full disk (1)",
    "write on a full disk (2)",
    "write on a full disk (3)",
    "crash: slice begun",
    "crash: slice written",
    "crash: slice at start",
    "crash: unsynced slices lost",
    "slice failed, nothing written",
    "slice failed, yet written",
    "slice on a full disk",
    "write waits for slices",
    "start rejected",
    "damaged row not moved",
    "full counter of tokens",
    "restored on another machine",
    "load failed",
    "find failed",
    "timeline failed",
    "expired failed",
    "reports failed",
    "prune failed",
    "due_tombstones failed",
    "update_tombstones failed",
    "trim_audit failed",
    "save_figures failed",
)
OTHERS: Final = (
    "response replayed",
    "dry run",
    "read that may go first",
    "busy worker told",
    "cleanup degraded",
    "mishap client disconnects at the response",
    "grant undelivered",
    "late result adopted",
    "release delayed",
    "delayed job kept due",
    "operator cleanup",
    "operator recover-stuck",
    "artifact delete",
    "artifact wait",
    "artifact leave",
    "artifact store failed",
    "daemon ended: killed",
    "daemon ended: stopped",
    "daemon ended: disk broken",
)


def names() -> list[str]:
    faults = [part for fault in FAULTS for part in IN_PARTS.get(fault, (fault,))]
    return [
        *(f"command {kind.__name__}" for kind in get_args(AnyCommand)),
        *(f"event {kind}" for kind in get_args(EventType)),
        *(f"error {code}" for code in ERROR_STATUS if code not in HTTP_ONLY),
        *(f"fault {name}" for name in faults),
        *(f"mishap {name}" for name in MISHAPS),
        *ON_DISK,
        *OTHERS,
    ]


def cluster_names() -> list[str]:
    """Return what several nodes have to meet, beside the commands of one."""
    return [
        *(f"command {kind.__name__}" for kind in get_args(AnyCommand) if kind is not EndGrants),
        *(f"fault {name}" for name in CLUSTER_FAULTS),
        *(f"mishap {name}" for name in MISHAPS),
        *(f"journal {call}: lost {what}" for call in ("append", "renew", "take_over", "resolve") for what in LOST),
        *(f"node stops leading: {how}" for how in ("disk broken", "stopped")),
        "error not_leader",
        "error outcome_unknown",
        "node takes over",
    ]


def never(fired: Mapping[str, int], *, cluster: bool = False) -> list[str]:
    """Return what should have happened and did not."""
    return [name for name in (cluster_names() if cluster else names()) if not fired.get(name)]
