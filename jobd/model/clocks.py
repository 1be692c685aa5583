"""Types of times, so that mypy rejects a time of one clock where another is wanted, in comparisons and sums too.

At run time they are plain numbers: they cost nothing, and msgspec reads and writes them as such. A duration is an int
in ms or a float in seconds. A time plus a duration is a time of the same clock. The difference of two is a duration.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, Self, TypeVar, overload

if TYPE_CHECKING:
    Duration = TypeVar("Duration", int, float)

    class _Time(Generic[Duration]):
        def __init__(self, value: Duration) -> None: ...
        def __add__(self, duration: Duration) -> Self: ...
        @overload  # type: ignore[no-overload-impl]  # it has none at run time either
        def __sub__(self, earlier: Self) -> Duration: ...
        @overload
        def __sub__(self, duration: Duration) -> Self: ...
        def __lt__(self, other: Self) -> bool: ...
        def __le__(self, other: Self) -> bool: ...
        def __gt__(self, other: Self) -> bool: ...
        def __ge__(self, other: Self) -> bool: ...
        def __eq__(self, other: object) -> bool: ...
        def __int__(self) -> int: ...
        def __float__(self) -> float: ...
        def __hash__(self) -> int: ...

    class LockMs(_Time[int]):
        """A time of the lock clock (engine/clock.py)."""

    class BootMs(_Time[int]):
        """Time since boot, with suspends. It never stands still, unlike lock time."""

    class BootS(_Time[float]):
        """The same, precise to less than a millisecond."""

    class MonotonicS(_Time[float]):
        """A time of the event loop. It stands still in a suspend."""

else:
    LockMs = BootMs = int
    BootS = MonotonicS = float
