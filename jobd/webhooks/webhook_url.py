"""What may be said of the URL of a webhook: where it goes, and nothing of what makes it a secret.

Receivers take a secret in the path as well as in the query, and like to say what they were asked.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import SplitResult, unquote, unquote_plus, urlsplit

UNSAID: Final = "…"  # stands where a part of a URL would
LEAST_SECRET: Final = 4  # characters: what is shorter is none
WORD: Final = 8  # characters: what is shorter may be in other words, as "hook" is in "webhook", and is no secret there


def shown(url: str) -> str:
    """Scheme and host, and a sign where there is more."""
    parts = urlsplit(url)
    place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    return f"{place}/{UNSAID}" if _rest(parts).strip("/") else place


def hushed(url: str, text: str) -> str:
    """`text` without anything of `url` but its scheme and host, however it is written there."""
    parts = urlsplit(url)
    rest, user = _rest(parts), parts.netloc.rpartition("@")[0]
    said = {rest, rest.partition("?")[0], user, *re.split(r"[/?&=;]", rest), *user.split(":")}
    said |= {plain for each in said for plain in (unquote(each), unquote_plus(each))}
    secrets = sorted((each for each in said if len(each) >= LEAST_SECRET), key=len, reverse=True)
    return re.sub("|".join(map(_wherever, secrets)), UNSAID, text, flags=re.IGNORECASE) if secrets else text


def _rest(parts: SplitResult) -> str:
    """All of a URL behind its host."""
    return parts.path + (f"?{parts.query}" if parts.query else "")


def _wherever(secret: str) -> str:
    """A pattern for where it is told."""
    return re.escape(secret) if len(secret) >= WORD else rf"(?<!\w){re.escape(secret)}(?!\w)"
