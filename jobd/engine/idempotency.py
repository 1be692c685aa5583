"""Idempotency keys in memory: which responses are stored, which grants keep a key alive, and which keys can be dropped.

The responses are on disk. The actor stores each one in the transaction of its change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Final

from msgspec.structs import replace

from jobd.model.job import DAY_MS, MINUTE_MS
from jobd.model.storage import StoredResponse

KEPT_MS: Final = DAY_MS
SAFE_MS: Final = 10 * MINUTE_MS  # a client may still be repeating a call that is younger than this


class IdempotencyStore:
    """Rows by digest, oldest first; `rollback` undoes the changes since the last `commit`.

    `rows` are those on disk. `holds` tells whether a job has a current grant with a lock id. The next commit deletes
    the key of a start or claim without one.
    """

    def __init__(
        self,
        rows: Iterable[StoredResponse],
        limit: int,
        holds: Callable[[str, str], bool] = lambda job_id, lock_id: True,
    ) -> None:
        self.limit = limit
        self._responses: dict[str, StoredResponse] = {}
        self._grants: dict[str, StoredResponse] = {}
        self._current: dict[str, dict[str, None]] = {}  # digest -> lock ids of its grants that are still current
        self._by_lock: dict[str, str] = {}  # lock_id -> digest
        self._added: dict[str, StoredResponse] = {}
        self._removed: dict[str, StoredResponse] = {}
        self._ended: list[tuple[str, str]] = []
        for row in sorted(rows, key=lambda row: row.at):
            self._insert(row)
        for row in list(self._grants.values()):
            for job_id, lock_id in row.grants or []:
                if not holds(job_id, lock_id):
                    self.ended(lock_id)

    def __len__(self) -> int:
        return len(self._responses) + len(self._grants)

    def lock_ids(self) -> list[str]:
        """Return the lock ids of the current grants that a repeated call can return."""
        return [lock_id for current in self._current.values() for lock_id in current]

    def find(self, digest: str, now: int) -> StoredResponse | None:
        """Return the row of a key that is still kept at wall time `now`. Its response may be on disk only."""
        row = self._responses.get(digest)
        if row is None:
            return self._grants.get(digest)
        if now >= row.at + KEPT_MS:
            self._forget(row)
            return None
        return row

    def is_stored(self, digest: str) -> bool:
        """Return whether the response of this key has to be read from the disk. `find` says if it is still kept."""
        return digest in self._responses

    def has_room(self, now: int) -> bool:
        """Drop old keys. Return whether one more can be kept."""
        # Two for each new key, so that old ones do not accumulate.
        for row in list(islice(self._responses.values(), 2)):
            if now >= row.at + KEPT_MS:
                self._forget(row)
        if len(self) < self.limit:
            return True
        oldest = next(iter(self._responses.values()), None)
        # A time in the future is from before the clock stepped back.
        if oldest is None or oldest.at <= now < oldest.at + SAFE_MS:
            return False
        self._forget(oldest)
        return True

    def add(self, row: StoredResponse) -> None:
        """Keep the response of a call that changed something."""
        self._added[row.digest] = row
        self._insert(row)

    def ended(self, lock_id: str) -> None:
        """Record that a grant ended. The key of a start or claim is kept while one of its grants is current."""
        digest = self._by_lock.get(lock_id)
        if digest is None:
            return
        self._current[digest].pop(lock_id, None)
        self._ended.append((digest, lock_id))
        if not self._current[digest]:
            self._forget(self._grants[digest])

    def changed(self) -> tuple[list[StoredResponse], list[str]]:
        """Return the rows that the next commit has to store, and the digests that it has to delete."""
        return list(self._added.values()), [digest for digest in self._removed if digest not in self._added]

    def commit(self) -> None:
        """Drop the responses from memory, because the changes are on disk."""
        for digest, row in self._added.items():
            if digest in self._responses:
                self._responses[digest] = replace(row, body=None)
        self._added, self._removed, self._ended = {}, {}, []

    def rollback(self) -> None:
        """Undo the changes since the last commit."""
        added, removed, ended = self._added, self._removed, self._ended
        self._added, self._removed, self._ended = {}, {}, []
        for row in added.values():
            self._drop(row)
        for row in removed.values():
            self._insert(row)
            if row.grants is not None:
                self._current[row.digest] = {}  # those that ended since the last commit come back, no earlier ones
        for digest, lock_id in ended:
            if self._by_lock.get(lock_id) == digest:
                self._current[digest][lock_id] = None
        if removed:
            oldest = {digest: row for digest, row in removed.items() if row.grants is None}
            self._responses = oldest | self._responses

    def _insert(self, row: StoredResponse) -> None:
        if row.grants is None:
            self._responses[row.digest] = row
            return
        self._grants[row.digest] = row
        self._current[row.digest] = {lock_id: None for _, lock_id in row.grants}
        for _, lock_id in row.grants:
            self._by_lock[lock_id] = row.digest

    def _forget(self, row: StoredResponse) -> None:
        self._drop(row)
        if self._added.pop(row.digest, None) is None:
            self._removed[row.digest] = row

    def _drop(self, row: StoredResponse) -> None:
        if row.grants is None:
            self._responses.pop(row.digest, None)
            return
        self._grants.pop(row.digest, None)
        self._current.pop(row.digest, None)
        for _, lock_id in row.grants:
            self._by_lock.pop(lock_id, None)
