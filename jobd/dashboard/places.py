"""Where the pages of jobs are. Asks nobody.

Browsers take `.` and `..` in a path for directions, also where they are written as %2E. Jobs may be called so: theirs
is an address with the id in its query.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import quote, urlencode

DIRECTIONS: Final = frozenset({".", ".."})


def job_place(job_id: str, part: str = "", **query: object) -> str:
    """The address of the job's page, or of `part` of it."""
    tail = f"/{part}" if part else ""
    if job_id in DIRECTIONS:
        return f"/job{tail}?{urlencode({'id': job_id, **query})}"
    more = f"?{urlencode(query)}" if query else ""
    return f"/jobs/{quote(job_id, safe='')}{tail}{more}"


def curl_for(job_id: str) -> str:
    """curl with what it needs in order to leave the address of a job's call as it is."""
    return "curl -sS --path-as-is" if job_id in DIRECTIONS else "curl -sS"
