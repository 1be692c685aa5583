"""The checksums of records."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec.structs import astuple

from jobd.model.journal import BadRecord, Record

_pack = msgspec.msgpack.Encoder().encode


def checksum(record: Record) -> int:
    """Return the CRC of all fields."""
    return zlib.crc32(record.body, zlib.crc32(_pack(astuple(record)[:-1])))


def checked(rows: Iterable[Iterable[Any]], after: int) -> list[Record]:
    """Return the records of `rows`, which have the checksum last and follow record `after`. Raises BadRecord."""
    records = []
    for number, (*columns, crc) in enumerate(rows, after + 1):
        record = Record(*columns)
        if record.number != number:
            raise BadRecord(number, "is missing")
        if checksum(record) != crc:
            raise BadRecord(number, "is damaged: its checksum is wrong")
        records.append(record)
    return records
