"""What a slow disk changes: as many as can be share a commit, and who only looks waits for no more than one.

On a quick disk the answers of a commit leave beside the next one, so that processor and disk work side by side; for
that each commit carries only about half of those who ask all the time, as the other half is being answered. Where the
disk takes longer than the answers, that would halve what gets done: there the answers leave first, and whoever they
went to has a moment to ask again. No IO, no clock.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct

SLOW_S: Final = 0.003  # a commit that takes so long is slow,
SLOW_EACH_S: Final = 0.000_25  # unless it is for having so much to write: it took less for each command
IN_A_ROW: Final = 8  # of such commits: a quick disk has its moments, too, as when the log goes into the database
LINGER: Final = 1 / 8  # of what the last commit took: so long the next one waits for those who were answered by it,
LINGER_S: Final = 0.02  # and no longer: who is near asks again within that


class SlowDisk(Struct):
    """The latest commit: seconds that it took, commands that it answered, when it ended (also seconds)."""

    took_s: float = 0.0
    commands: int = 0
    ended_s: float = 0.0
    in_a_row: int = 0  # slow commits
    slow_s: float = SLOW_S
    enough: int = IN_A_ROW

    def note(self, took_s: float, commands: int, ended_s: float) -> None:
        self.took_s, self.commands, self.ended_s = took_s, commands, ended_s
        self.in_a_row = self.in_a_row + 1 if took_s >= max(self.slow_s, SLOW_EACH_S * commands) else 0

    @property
    def is_slow(self) -> bool:
        return self.in_a_row >= self.enough

    def lingers_s(self, waiting: int, now_s: float) -> float:
        """How long the next commit still waits for more than the `waiting` commands; 0 or less where it begins."""
        if waiting >= self.commands or not self.is_slow:
            return 0.0
        return self.ended_s + min(self.took_s * LINGER, LINGER_S) - now_s
