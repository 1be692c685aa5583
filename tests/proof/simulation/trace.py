"""The trace of a run: a running checksum and the lines themselves, each only if requested.

The same seed gives the same lines, byte for byte. They never depend on real time, hash order or other randomness.
"""

from __future__ import annotations

import re
from hashlib import blake2b
from typing import Any, Final

import msgspec

SHOWN: Final = 40  # lines of a story


class Trace:
    def __init__(self, *, keep_lines: bool = False, with_digest: bool = False) -> None:
        self.lines: list[str] = []
        self._keep_lines = keep_lines
        self._with_digest = with_digest
        self._sum = blake2b(digest_size=16)
        self._encode = msgspec.json.Encoder().encode

    def note(self, at_s: float, what: str, *facts: Any) -> None:
        """Add a line: loop time in seconds, its kind, and values that JSON can encode."""
        if not (self._keep_lines or self._with_digest):
            return
        line = self._encode((round(at_s, 6), what, facts))
        self._sum.update(line + b"\n")
        if self._keep_lines:
            self.lines.append(line.decode())

    @property
    def digest(self) -> str:
        """Return the checksum of all lines; an empty string if there is none."""
        return self._sum.hexdigest() if self._with_digest else ""

    def story(self, job_id: str | None) -> list[str]:
        """Return the last lines about a job (or about all) with the faults between them."""
        lines = self.lines
        if job_id:
            concerned = re.compile(rf'"{re.escape(job_id)}"|,"(fault|machine|broken)"')
            lines = [line for line in lines if concerned.search(line)]
        return [line if len(line) <= 400 else f"{line[:400]}…" for line in lines[-SHOWN:]]
