"""The demo's checks: each result is read back and compared with its source, by other code than that which made it."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobd.cli.demo.files import ROW_BYTES, SIGNATURE, Broken, read_frames, sha256


def check(kind: str, source: Path, target: Path, figures: dict[str, Any]) -> None:
    """Raise Broken unless `target` is the whole and right result of `source` and has the checksum in `figures`."""
    if not target.is_file():
        raise Broken(f"{target.name} is not there")
    if figures.get("sha256") != sha256(target):
        raise Broken(f"{target.name} does not have the checksum that its worker reported")
    if kind in ("picture", "film"):
        _check_png(source, target)
    elif kind == "sales":
        _check_report(source, target)
    elif gzip.decompress(target.read_bytes()) != source.read_bytes():
        raise Broken(f"{target.name} does not unpack to its source")


def _check_png(source: Path, target: Path) -> None:
    packed: list[bytes] = []
    for kind, body in chunks(target):
        if kind == b"IDAT":
            packed.append(body)
        elif kind == b"fdAT":
            packed.append(body[4:])
    wanted = list(read_frames(source))
    if len(packed) != len(wanted):
        raise Broken(f"{target.name} has {len(packed)} frames, not {len(wanted)}")
    for number, (body, pixels) in enumerate(zip(packed, wanted, strict=True), start=1):
        if _unfilter(zlib.decompress(body)) != pixels:
            raise Broken(f"{target.name}: frame {number} is not that of its source")


def chunks(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Kind and body of each chunk of a PNG; Broken where its checksum is wrong."""
    data = path.read_bytes()
    at = len(SIGNATURE)
    if data[:at] != SIGNATURE:
        raise Broken(f"{path.name} is no PNG")
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        if struct.pack(">I", zlib.crc32(kind + body)) != data[at + 8 + length : at + 12 + length]:
            raise Broken(f"{path.name}: a chunk has a wrong checksum")
        yield kind, body
        at += 12 + length


def _unfilter(rows: bytes) -> bytes:
    out = bytearray()
    above = bytes(ROW_BYTES)
    for at in range(0, len(rows), ROW_BYTES + 1):
        row = bytearray(rows[at + 1 : at + 1 + ROW_BYTES])
        if rows[at] == 1:
            for index in range(3, len(row)):
                row[index] = (row[index] + row[index - 3]) & 255
        elif rows[at] == 2:
            row = bytearray((a + b) & 255 for a, b in zip(row, above, strict=True))
        out += row
        above = bytes(row)
    return bytes(out)


def _check_report(source: Path, target: Path) -> None:
    with source.open(newline="", encoding="utf-8") as file:
        rows = [line.split(",") for line in file.read().splitlines()[1:]]
    text = target.read_text(encoding="utf-8")
    for product in {row[2] for row in rows}:
        pieces = sum(int(row[3]) for row in rows if row[2] == product)
        cents = sum(int(row[3]) * int(row[4]) for row in rows if row[2] == product)
        if f"| {product} | {pieces} | {cents / 100:.2f} |" not in text:
            raise Broken(f"{target.name}: the line of {product} is wrong")
