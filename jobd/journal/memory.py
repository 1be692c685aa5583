"""A journal in memory, for tests. It fails on demand."""

from __future__ import annotations

from collections.abc import Callable

from jobd.model.journal import BadRecord, Record


class MemoryJournal:
    """Keeps its records in a list. `before_append` is called before each append, and may raise its error."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.before_append: Callable[[Record], object] = lambda record: None

    def append(self, record: Record) -> None:
        self.before_append(record)
        self.records.append(record)

    def read(self, after: int, limit: int) -> list[Record]:
        found = [record for record in self.records if record.number > after][:limit]
        for number, record in enumerate(found, after + 1):
            if record.number != number:
                raise BadRecord(number, "is missing")
        return found

    def trim(self, upto: int) -> None:
        self.records = [record for record in self.records if record.number > upto]
