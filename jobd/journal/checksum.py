"""The checksum of a record."""

from __future__ import annotations

import zlib

import msgspec
from msgspec.structs import astuple

from jobd.model.journal import Record

_pack = msgspec.msgpack.Encoder().encode


def checksum(record: Record) -> int:
    """Return the CRC of all fields."""
    return zlib.crc32(record.body, zlib.crc32(_pack(astuple(record)[:-1])))
