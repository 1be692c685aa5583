"""Fingerprints: the same short name for errors that differ only in details of the job or in their traceback.

Fingerprints are stable across versions.
"""

from __future__ import annotations

import re
from functools import lru_cache
from hashlib import blake2b
from typing import Final

MAX_NORMALIZED: Final = 1_000  # characters of a normalized message that count
MAX_MESSAGE: Final = 4_096  # characters of a message that are normalized
DIGEST_BYTES: Final = 6  # twelve hexadecimal digits

# The parts that differ from job to job, longest first. No alternative begins within a word.
_DIFFERS: Final = re.compile(
    r"""
      (?P<uuid> (?<![0-9A-Za-z]) [0-9a-fA-F]{8} (?:-[0-9a-fA-F]{4}){3} -[0-9a-fA-F]{12} (?![0-9A-Za-z]) )
    | (?P<text> "[^"\n]*" | (?<!\w)'[^'\n]*'(?!\w) | `[^`\n]*` )
    | (?P<url>  (?<!\w) [A-Za-z][A-Za-z0-9+.-]{1,20}:// [^\s"'`<>]+ )
    | (?P<path> (?<![\w/\\.]) (?: [A-Za-z]:[\\/] | ~?/ | \.\.?/ ) [^\s"'`:;,()<>]+ )
    | (?P<hex>  (?<!\w) (?: 0x[0-9a-fA-F]+ | (?=[a-fA-F]*[0-9]) (?=[0-9]*[a-fA-F]) [0-9a-fA-F]{8,} ) (?!\w) )
    | (?P<n>    [0-9]+ (?: [.,:][0-9]+ )* )
    """,
    re.VERBOSE,
)


_TRACEBACK: Final = re.compile(r"^[ +]*(?:Exception Group )?Traceback \(most recent call last\):$", re.MULTILINE)
_PLACEHOLDER: Final = re.compile("<[a-z]+>")


def normalize(message: str, job_id: str = "") -> str:
    """Replace quoted texts, URLs, paths, UUIDs, hexadecimals, numbers and the id of the job by placeholders."""
    marked = _marked(message)
    marked_id = _marked(job_id)
    # An id that consists of placeholders only (a number, a UUID) is replaced already.
    if marked_id in marked and any(each.isalpha() for each in _PLACEHOLDER.sub("", marked_id)):
        marked = re.sub(rf"(?<![\w<]){re.escape(marked_id)}(?![\w>])", "<id>", marked)
    return marked[:MAX_NORMALIZED].strip()


@lru_cache(maxsize=4_096)
def _marked(message: str) -> str:
    error = _without_traceback(message)[:MAX_MESSAGE]
    marked = _DIFFERS.sub(lambda match: f"<{match.lastgroup}>", error)
    return " ".join(marked.split())


def _without_traceback(message: str) -> str:
    """Return the text before the traceback; if the message begins with it, the lines after its last frame."""
    first = _TRACEBACK.search(message)
    if first is None:
        return message
    if before := message[: first.start()].strip():
        return before
    *_, last = _TRACEBACK.finditer(message)
    lines = message[last.end() :].strip("\n").split("\n")
    error = next((number for number, line in enumerate(lines) if not line.startswith(" ")), 0)
    return "\n".join(lines[error:])


def fingerprint(message: str | None, code: str | None, job_id: str = "") -> str | None:
    """Return the fingerprint of an error: the same for errors that `normalize` makes equal. None without an error."""
    if message is None and code is None:
        return None
    text = f"{code or ''}\n{normalize(message or '', job_id)}"
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).hexdigest()


def fingerprint_of_bytes(message: bytes | None, code: bytes | None, job_id: bytes | None) -> str | None:
    """Return the fingerprint for the columns of a row, which may be damaged."""
    text, code_text, id_text = (
        None if each is None else each.decode("utf-8", "replace") for each in (message, code, job_id)
    )
    return fingerprint(text, code_text, id_text or "")
