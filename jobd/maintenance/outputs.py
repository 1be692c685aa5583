"""Keep the output of jobs: limit how often a grant sends some, and wake those who follow it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Final

from msgspec import Struct

from jobd.engine.event_feed import EventFeed
from jobd.model.errors import api_error
from jobd.model.events import Event
from jobd.model.responses import GrantOutput, JobView, OutputGrant
from jobd.storage.output_file import OutputFile, OutputFileFailed

EVERY_S: Final = 1.0  # between two requests of a grant, on average
BURST: Final = 3
_FORGET_ABOVE: Final = 10_000  # grants


class Outputs(Struct):
    """The output of jobs: its file, and when each grant may send more."""

    file: OutputFile
    feed: EventFeed
    now: Callable[[], int]  # Unix ms
    next_s: dict[int, float] = {}  # by fencing token, on the clock of the event loop
    deletions: set[asyncio.Task[None]] = set()

    def check_on(self) -> None:
        if not self.file.limit_bytes:
            raise api_error("output_off", "This daemon keeps no output (limits.output_bytes is 0). Send none.")

    async def append(self, job_id: str, grant: OutputGrant, text: bytes) -> int:
        """Keep text of a grant. Return how many bytes the grant has sent."""
        self._count(grant.fencing_token)
        try:
            end = await self.file.append(job_id, grant, text, self.now())
        except OutputFileFailed as error:
            message = f"The output was not stored: {error}. The job is not affected: go on without it."
            raise api_error("output_unavailable", message) from None
        self.feed.touch(job_id)
        return end

    async def read(self, job: JobView, after: str | None) -> tuple[list[GrantOutput], str]:
        """Return the text after a position, and the position at its end."""
        token, begin = (int(each) for each in (after or "0.0").split("."))
        try:
            grants = await self.file.read(job.id, job.created_at, token, begin)
        except OutputFileFailed as error:
            raise api_error(
                "output_unavailable", f"The output cannot be read: {error}. Jobs go on without it."
            ) from None
        return grants, f"{grants[-1].fencing_token}.{grants[-1].end}" if grants else f"{token}.{begin}"

    def committed(self, changes: Sequence[Event]) -> None:
        """Delete the output of jobs that were deleted. The actor calls this."""
        deleted = [change.job_id for change in changes if change.after is None and change.before is not None]
        if deleted and self.file.limit_bytes:
            deletion = asyncio.get_running_loop().create_task(self._delete(deleted))
            self.deletions.add(deletion)
            deletion.add_done_callback(self.deletions.discard)

    async def _delete(self, job_ids: list[str]) -> None:
        with contextlib.suppress(OutputFileFailed):  # it was logged, and a deleted job's output is not shown
            await self.file.delete(job_ids)

    def _count(self, token: int) -> None:
        now_s = asyncio.get_running_loop().time()
        next_s = max(self.next_s.get(token, 0.0), now_s)
        early_s = next_s - now_s - (BURST - 1) * EVERY_S
        if early_s > 0:
            message = f"This grant sends output too often. Collect it, and send it in {early_s:.1f} s."
            raise api_error("too_frequent", message, retry_after_ms=round(early_s * 1000))
        self.next_s[token] = next_s + EVERY_S
        if len(self.next_s) > _FORGET_ABOVE:
            self.next_s = {each: at_s for each, at_s in self.next_s.items() if at_s > now_s}
