"""The page that is shown before a clock is taken as right: what deletion by age would then take.

Shows; what is done is in chores.py.
"""

from __future__ import annotations

from typing import Final

from jobd.dashboard.context import Guest
from jobd.dashboard.pages import PAUSED, Shown, asked, strip
from jobd.model.errors import ApiError

MOST_NAMED: Final = 50


async def page(guest: Guest) -> Shown:
    """Refused where the actor takes no question now: then nobody could say what would go."""
    [paused] = await asked(guest, PAUSED)
    seen = await guest.site.rooms.preview(0)
    held = [] if isinstance(seen, ApiError) else seen.held_jobs
    return {
        "clock": guest.site.rooms.clock(),
        "count": len(held),
        "is_more": not isinstance(seen, ApiError) and seen.more_held,
        "named": held[:MOST_NAMED],
        "fault": seen.message if isinstance(seen, ApiError) else "",
        **strip(guest, paused),
    }
