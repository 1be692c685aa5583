"""What an import would do, line by line: what would be created, what exists already, what would be refused, and why.

Reads the stream as the import does (streams.py) and asks the actor the same for each line; nothing is written.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, Final, Literal

from msgspec import Struct, structs

from jobd.api.imports import STOPPING, Ahead, Importing
from jobd.api.services import Rooms
from jobd.http.app import Web, welcome
from jobd.http.request import Visit
from jobd.model.commands import Import, ImportCheck
from jobd.model.errors import ApiError
from jobd.model.job import LIVE
from jobd.model.responses import ImportForeseen, Response

SHOWN_LINES: Final = 10_000
MOST_LINES: Final = 1_000_000  # whose ids are kept to find those that come twice


class ForeseenLine(Struct, frozen=True):
    """`line` counts from 1; `id` is null where the line does not tell it. `status`: that of the job afterwards."""

    line: int
    id: str | None
    what: Literal["create", "skip", "refuse"]
    status: str | None
    reason: str | None


class ImportPreview(Struct, rename="camel"):
    """What an import would do. `lines` shows the first SHOWN_LINES of them, `more`: there are more.

    `stops_at` is the line at which it would end early, for `stop_reason`, or null.
    """

    would_import: int = 0
    would_skip: int = 0
    would_refuse: int = 0
    lines: list[ForeseenLine] = []
    more: bool = False
    stops_at: int | None = None
    stop_reason: str | None = None


async def look_over(site: Web[Rooms], visit: Visit, _: Any) -> Response | ApiError:
    """The preview of an import."""
    welcome(visit)
    return await _Previewing(site, visit).run()


class _Previewing(Importing):
    """An import that only asks."""

    def __init__(self, site: Web[Rooms], visit: Visit) -> None:
        super().__init__(site, visit)
        self._seen = ImportPreview()
        self._first: dict[int, int] = {}  # the hash of an id that would be created: its line
        self._live = 0

    async def run(self) -> Response | ApiError:
        try:
            await self._read()
            await self._settle(0, 0)
        finally:
            for ahead in self._ahead:
                ahead.task.cancel()
        if self._stop is not None and self._seen.stops_at is None:
            return self._stop
        self._seen.lines.sort(key=lambda each: each.line)
        return Response(self._seen)

    def _asked(self, command: Import, size: int) -> Coroutine[Any, Any, Response | ApiError]:
        return self._site.actor.ask(ImportCheck(**structs.asdict(command)), by=self._by, admin=True, size=size)

    def _refuse(self, line: int, job_id: str | None, reason: str) -> None:
        self._seen.would_refuse += 1
        self._show(ForeseenLine(line, job_id, "refuse", None, reason))

    def _count(self, line: Ahead, answer: Response | ApiError) -> None:
        if self._stop is not None:
            return  # the import would not have come here
        if isinstance(answer, Response):
            self._take(line, answer.data)
        elif answer.code == "too_many_jobs":
            self._end(line.line, answer)
        elif answer.code in STOPPING:
            self._stop = self._stopped(answer, line.line)
        else:
            self._refuse(line.line, line.job_id, answer.message)

    def _take(self, line: Ahead, found: ImportForeseen) -> None:
        if found.what == "create" and (first := self._first.get(hash(found.job_id))) is not None:
            reason = f"Line {first} has the same id."
            found = ImportForeseen(found.job_id, "skip", None, reason, found.room)
        if found.what == "skip":
            self._seen.would_skip += 1
        elif found.status in LIVE and self._live >= found.room:
            self._end(line.line, ApiError("too_many_jobs", "As many unfinished jobs as are allowed would be there."))
            return
        else:
            self._seen.would_import += 1
            self._live += found.status in LIVE
            self._first[hash(found.job_id)] = line.line
        self._show(ForeseenLine(line.line, found.job_id, found.what, found.status, found.reason))
        if len(self._first) > MOST_LINES:
            message = f"A preview looks at {MOST_LINES} lines at most. Split the file."
            self._stop = ApiError("too_large", message, {"limit": MOST_LINES})

    def _end(self, line: int, why: ApiError) -> None:
        self._stop = why
        self._seen.stops_at, self._seen.stop_reason = line, why.message

    def _show(self, line: ForeseenLine) -> None:
        if len(self._seen.lines) < SHOWN_LINES:
            self._seen.lines.append(line)
        else:
            self._seen.more = True
