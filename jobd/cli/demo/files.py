"""The demo's real work: source files are made and converted, with the standard library alone.

Knows nothing of jobd, and does not check itself: demo_checks.py does. Pictures (PPM) become PNG, films (PPM frames)
become animated PNG, sales (CSV) become a report, logs become .gz with a checksum.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import math
import os
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

Report = Callable[[float, str], None]  # percent, message

WIDTH: Final = 320
HEIGHT: Final = 240
FILM_FRAMES: Final = 48
SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_DISTANCE: Final = bytes(min(byte, 256 - byte) for byte in range(256))
_HEADER: Final = f"P6\n{WIDTH} {HEIGHT}\n255\n".encode()
ROW_BYTES: Final = WIDTH * 3
_FRAME_BYTES: Final = ROW_BYTES * HEIGHT


class Broken(Exception):
    """A source or a result is not what it should be."""


# ---------------------------------------------------------------------------------------------------------------------
# Making the sources. Everything follows from `seed`.


def make_sources(folder: Path, seed: int, *, pictures: int, films: int, sales: int, logs: int) -> list[tuple[str, str]]:
    """Write the source files into `folder`; gives (kind, file name) in the order in which to submit them."""
    dice = random.Random(seed)
    made: list[tuple[str, str]] = []
    for number in range(1, films + 1):
        _write_frames(folder / f"film-{number}.ppm", dice, FILM_FRAMES)
    for number in range(1, pictures + 1):
        _write_frames(folder / f"picture-{number:02}.ppm", dice, 1)
        made.append(("picture", f"picture-{number:02}.ppm"))
    for number in range(1, sales + 1):
        _write_sales(folder / f"sales-{number:02}.csv", dice)
        made.append(("sales", f"sales-{number:02}.csv"))
    for number in range(1, logs + 1):
        _write_log(folder / f"access-{number:02}.log", dice)
        made.append(("log", f"access-{number:02}.log"))
    dice.shuffle(made)
    reels = [("film", f"film-{number}.ppm") for number in range(1, films + 1)]
    return reels[:1] + made + reels[1:]


def _write_frames(path: Path, dice: random.Random, frames: int) -> None:
    """Moving colours: one byte a pixel, shifted from row to row, coloured by three tables."""
    phases = [dice.random() * math.tau for _ in range(3)]
    palette = [bytes(int(127.5 + 127.5 * math.sin(i * math.tau / 256 + phase)) for i in range(256)) for phase in phases]
    speed, waves = dice.randint(2, 6), dice.randint(1, 4)
    row = bytes(int(60 + 60 * math.sin(x * math.tau * waves / WIDTH)) for x in range(WIDTH))
    turns = [bytes((i + turn) % 256 for i in range(256)) for turn in range(256)]
    with path.open("wb") as file:
        for frame in range(frames):
            file.write(_HEADER)
            for y in range(HEIGHT):
                turn = int(60 * math.sin(y * math.tau / HEIGHT + frame / 7)) + y // 2 + frame * speed
                shifted = row.translate(turns[turn % 256])
                line = bytearray(ROW_BYTES)
                for channel in range(3):
                    line[channel::3] = shifted.translate(palette[channel])
                file.write(line)


def _write_sales(path: Path, dice: random.Random) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["day", "region", "product", "pieces", "cents"])
        for _ in range(3_000):
            product, region = dice.choice(["lamp", "chair", "desk", "shelf"]), dice.choice(["north", "south", "west"])
            writer.writerow([dice.randint(1, 31), region, product, dice.randint(1, 9), dice.randint(100, 90_000)])


def _write_log(path: Path, dice: random.Random) -> None:
    with path.open("w", encoding="utf-8") as file:
        for second in range(4_000):
            page, status = dice.choice(["/", "/jobs", "/help", "/about"]), dice.choice([200, 200, 200, 304, 404])
            file.write(f"10.0.0.{dice.randint(1, 254)} +{second} GET {page} {status} {dice.randint(100, 9_999)}\n")


# ---------------------------------------------------------------------------------------------------------------------
# The conversions: what the workers run.


def target_name(kind: str, source: str) -> str:
    """The file name of the result of `source`."""
    return source + ".gz" if kind == "log" else Path(source).stem + {"sales": ".md"}.get(kind, ".png")


def convert(kind: str, source: Path, target: Path, report: Report) -> dict[str, Any]:
    """Make `target` from `source`; gives figures about it. Written beside it and renamed, so it is whole or absent."""
    part = target.with_name(f"{target.name}.part.{os.getpid()}")
    try:
        figures = _CONVERT[kind](source, part, report)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return {**figures, "bytes": target.stat().st_size, "sha256": sha256(target)}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_frames(path: Path) -> Iterator[bytes]:
    """The raw RGB of each frame of a PPM file of the demo's size."""
    with path.open("rb") as file:
        while header := file.read(len(_HEADER)):
            pixels = file.read(_FRAME_BYTES)
            if header != _HEADER or len(pixels) != _FRAME_BYTES:
                raise Broken(f"{path.name} is no PPM of {WIDTH}x{HEIGHT}")
            yield pixels


def _to_png(source: Path, part: Path, report: Report) -> dict[str, Any]:
    """One frame: PNG. More: animated PNG, which every browser shows."""
    frames = source.stat().st_size // (len(_HEADER) + _FRAME_BYTES)
    number = 0
    with part.open("wb") as file:
        file.write(SIGNATURE + _chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 0)))
        if frames > 1:
            file.write(_chunk(b"acTL", struct.pack(">II", frames, 0)))
        for index, pixels in enumerate(read_frames(source)):
            if frames > 1:
                file.write(_chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, WIDTH, HEIGHT, 0, 0, 1, 20, 0, 0)))
                number += 1
            packed = zlib.compress(_filtered(pixels), 9)
            if index == 0:
                file.write(_chunk(b"IDAT", packed))
            else:
                file.write(_chunk(b"fdAT", struct.pack(">I", number) + packed))
                number += 1
            report(99 * (index + 1) // frames, f"frame {index + 1} of {frames}")
        file.write(_chunk(b"IEND", b""))
    return {"frames": frames}


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _filtered(pixels: bytes) -> bytes:
    """Each row by the PNG filter (none, left, up) whose bytes are nearest to zero: smooth pictures pack better so."""
    out = bytearray()
    above = bytes(ROW_BYTES)
    for at in range(0, len(pixels), ROW_BYTES):
        row = pixels[at : at + ROW_BYTES]
        left = bytes(3) + row[:-3]
        tries = [row, bytes((a - b) & 255 for a, b in zip(row, left, strict=True))]
        tries.append(bytes((a - b) & 255 for a, b in zip(row, above, strict=True)))
        best = min(range(3), key=lambda number: sum(tries[number].translate(_DISTANCE)))
        out.append(best)
        out += tries[best]
        above = row
    return bytes(out)


def _to_report(source: Path, part: Path, report: Report) -> dict[str, Any]:
    totals: dict[str, list[int]] = {}
    with source.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            entry = totals.setdefault(row["product"], [0, 0])
            entry[0] += int(row["pieces"])
            entry[1] += int(row["pieces"]) * int(row["cents"])
    report(60, f"{len(totals)} products added up")
    lines = [f"# Sales of {source.stem}", "", "| product | pieces | revenue |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {totals[name][0]} | {totals[name][1] / 100:.2f} |" for name in sorted(totals)]
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"pieces": sum(entry[0] for entry in totals.values()), "cents": sum(entry[1] for entry in totals.values())}


def _to_gzip(source: Path, part: Path, report: Report) -> dict[str, Any]:
    with source.open("rb") as plain, gzip.open(part, "wb", compresslevel=9) as packed:
        while block := plain.read(1 << 16):
            packed.write(block)
            report(95 * plain.tell() // source.stat().st_size, "packing")
    return {"source_sha256": sha256(source)}


_CONVERT: Final[dict[str, Callable[[Path, Path, Report], dict[str, Any]]]] = {
    "picture": _to_png,
    "film": _to_png,
    "sales": _to_report,
    "log": _to_gzip,
}
