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
    | (?P<time> (?: [0-9]+\ (?: d|h|min )\ )? [0-9]+ (?: [.,:][0-9]+ )* \ (?: d|h|min|s|ms ) (?!\w) )
    | (?P<n>    [0-9]+ (?: [.,:][0-9]+ )* )
    """,
    re.VERBOSE,
)


_HEADER: Final = "Traceback (most recent call last):"
# A header and its frames, which are indented. "[...]" is where the middle of a long message was cut out.
_FRAMES: Final = rf"(?:Exception Group )?{re.escape(_HEADER)}$(?:\n .*|\n\[\.\.\.\]\n.*)*+"
_NEXT: Final = (
    rf"(?:\n(?!.*{re.escape(_HEADER)}$).*)*?\n(?:During handling of the above exception, another exception occurred"
    r"|The above exception was the direct cause of the following exception):\n\n"
)
_TRACEBACK: Final = re.compile(f"(?:{_FRAMES}{_NEXT})*{_FRAMES}", re.MULTILINE)
_GROUP_MARGIN: Final = re.compile(r"^ +(?:\| ?|\+ |\+[-+ 0-9]*$)", re.MULTILINE)
_PLACEHOLDER: Final = re.compile("<[a-z]+>")


def normalize(message: str, job_id: str = "") -> str:
    """Replace quoted texts, URLs, paths, UUIDs, hexadecimals, durations, numbers and the job's id by placeholders."""
    marked = _marked(message)
    marked_id = _marked(job_id)
    # An id that consists of placeholders only (a number, a UUID) is replaced already.
    if marked_id in marked and any(each.isalpha() for each in _PLACEHOLDER.sub("", marked_id)):
        marked = re.sub(rf"(?<![\w<]){re.escape(marked_id)}(?![\w>])", "<id>", marked)
    return marked[:MAX_NORMALIZED].strip()


@lru_cache(maxsize=4_096)
def _marked(message: str) -> str:
    error = _without_tracebacks(message)[:MAX_MESSAGE]
    marked = _DIFFERS.sub(lambda match: "<n> s" if match["time"] else f"<{match.lastgroup}>", error)
    return " ".join(marked.split())


def _without_tracebacks(message: str) -> str:
    """Return the text around the tracebacks, up to an error that it has already."""
    if _HEADER not in message:
        return message
    if f"Exception Group {_HEADER}" in message:
        message = _GROUP_MARGIN.sub("", message)
    text = ""
    for part in map(str.strip, _TRACEBACK.split(message)):
        if part and (part in text or part.endswith(f": {text}")):
            break
        text = f"{text}\n{part}".strip()
    return text or message


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
