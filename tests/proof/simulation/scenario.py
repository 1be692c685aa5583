"""The scenario of a seed: its faults, clients and limits, drawn before the start.

Each seed has its own selection, so that rare faults also happen without the common ones.
"""

from __future__ import annotations

from random import Random
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from jobd.engine.actor import SLOW_COMMIT_S, Bounds
from jobd.maintenance.cleanup_run import CleanupSchedule
from jobd.model.job import DAY_MS, MINUTE_MS, SECOND_MS, Policy
from jobd.storage.artifacts.base import Margins
from jobd.storage.commit_mode import CommitSetting
from tests.proof.simulation.disk import SliceOptions

SLICE_FAULTS: Final = ("crash at a slice", "slice error", "lost slice result", "torn record")
FAULTS: Final = (
    "kill",
    "power cut",
    "stop",
    "restore",
    "reboot",
    "slow disk",
    "full disk",
    "write error",
    "lost fsync result",
    "read error",
    "upkeep error",
    "rot",
    "wall step",
    "long wall step",
    "leap",
    "suspend",
    "boot step back",
    "freeze",
    "reload",
    "backup",
    "artifacts unreachable",
    "artifacts flaky",
    "artifacts slow",
    *SLICE_FAULTS,
)
MISHAPS: Final = (
    "response not read",
    "client disconnects",
    "concurrent repeat",
    "reused key",
    "worker dies",
    "worker sleeps",
    "worker ignores lock_lost",
    "repeated ending",
    "worker releases",
)
RARE: Final = frozenset(
    {
        "rot",
        "restore",
        "long wall step",
        "leap",
        "read error",
        "lost fsync result",
        "write error",
        "slice error",
        "lost slice result",
        "torn record",
    }
)


class Scenario(Struct, frozen=True):
    """The conditions of a seed. `faults` are injected every `pace_s` on average, `mishaps` are errors of clients."""

    faults: tuple[str, ...]
    mishaps: tuple[str, ...]
    workers: int
    creators: int
    operators: int
    ids: int  # job ids in use
    queues: tuple[str, ...]
    kinds: tuple[str, ...]
    pace_s: float
    think_s: float
    policy: Policy
    schedule: CleanupSchedule
    bounds: Bounds
    keys: int
    margins: Margins  # of the artifact store, if the policy has one
    slow_commit_s: float  # after a commit of this duration reads go first
    commit: CommitSetting  # "auto": the mode changes at random
    slices: SliceOptions


def draw(seed: int, without: frozenset[str] = frozenset()) -> Scenario:
    """Draw the scenario of `seed`, without the faults and mishaps in `without` (to find those that matter)."""
    dice, slice_dice = Random(f"{seed}: plan"), Random(f"{seed}: plan of slices")
    faults = [
        name
        for name in FAULTS
        if (slice_dice if name in SLICE_FAULTS else dice).random() < (0.15 if name in RARE else 0.45)
    ]
    mishaps = [name for name in MISHAPS if dice.random() < 0.6]
    return Scenario(
        faults=tuple(name for name in faults if name not in without),
        mishaps=tuple(name for name in mishaps if name not in without),
        workers=dice.randint(1, 5),
        creators=dice.randint(1, 2),
        operators=dice.randint(0, 2),
        ids=dice.choice((2, 6, 20)),
        queues=("default", "q2", "q3")[: dice.randint(1, 3)],
        kinds=("", "k1", "k2")[: dice.randint(1, 3)],
        pace_s=dice.choice((1.0, 5.0, 20.0)),
        think_s=dice.choice((0.02, 0.3, 1.0)),
        policy=replace(policy(dice), artifacts=dice.random() < 0.8),
        schedule=_schedule(dice),
        bounds=_bounds(dice),
        keys=dice.choice((3, 30, 1000)),
        margins=Margins(
            young_ms=dice.choice((5 * SECOND_MS, 30 * SECOND_MS, 60 * MINUTE_MS)),
            skew_ms=dice.choice((SECOND_MS, 15 * MINUTE_MS)),
        ),
        slow_commit_s=dice.choice((0.0, SLOW_COMMIT_S)),
        commit=dice.choice(("auto", "inline", "thread")),
        slices=SliceOptions(
            events=slice_dice.choice((1, 5, 300)),
            max_behind=slice_dice.choice((10, 60, 30_000)),
            delay_s=slice_dice.choice((0.0, 0.2, 5.0)),
        ),
    )


def policy(dice: Random) -> Policy:
    """Draw a configuration, for a start or a reload."""
    if dice.random() < 0.2:
        return Policy(live_jobs=dice.choice((8, 5000)))
    return Policy(
        lock_ttl_ms=dice.choice((1_000, 3_000, 10_000, 60_000)),
        progress_timeout_ms=dice.choice((0, 2_000, 20_000, 50_000, 30 * MINUTE_MS)),
        stall_after_ms=dice.choice((0, 500, 5_000, 40_000)),
        max_stalls=dice.choice((0, 1, 3)),
        on_stall=dice.choice(("auto", "auto", "requeue", "fail")),
        keep_completed_ms=dice.choice((1, 20_000, 7 * DAY_MS)),
        keep_failed_ms=dice.choice((1_000, 60_000, 30 * DAY_MS)),
        keep_cancelled_ms=dice.choice((0, 30_000, 7 * DAY_MS)),
        require_download_url=dice.random() < 0.1,
        late_results=dice.choice(("keep", "keep", "adopt_if_unclaimed", "adopt_if_unclaimed", "drop")),
        late_queues={"q2": "adopt_if_unclaimed"} if dice.random() < 0.3 else {},
        live_jobs=dice.choice((4, 12, 5_000_000, 5_000_000)),
        queues=dice.choice((1, 2, 10_000)),
        schedules=dice.choice((1, 10_000, 10_000)),
    )


def _schedule(dice: Random) -> CleanupSchedule:
    interval_ms = dice.choice((10 * SECOND_MS, 30 * SECOND_MS, 5 * MINUTE_MS))
    return CleanupSchedule(
        interval_ms=interval_ms,
        min_interval_ms=dice.choice((0, 5 * SECOND_MS, interval_ms)),
        recover_every_ms=dice.choice((0, 500, 2_000, 10_000, 10_000)),
        batch=dice.choice((1, 3, 200)),
        journal_ms=dice.choice((0, MINUTE_MS, DAY_MS)),
    )


def _bounds(dice: Random) -> Bounds:
    return Bounds(
        mailbox=dice.choice((4, 10_000, 10_000)),
        inflight_bytes=dice.choice((500, 1 << 20, 1 << 20)),
        parked_claims=dice.choice((1, 10_000, 10_000)),
        claim_wait_ms=dice.choice((10_000, 60_000)),
    )
