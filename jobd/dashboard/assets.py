"""Static files: read once at the start, given out from memory under names that change with their content.

Looks at no request: a name that is not one of the files that were there at the start is nothing.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Final

from msgspec import Struct

from jobd.http.response import RawBody

STATIC: Final = Path(__file__).parent / "static"
CONTENT_TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".json": "application/json",
}
IMMUTABLE: Final = "public, max-age=31536000, immutable"
REVALIDATE: Final = "no-cache"


class StaticFile(Struct, frozen=True):
    content_type: str
    content: bytes
    version: str


class Assets:
    """The files of `static/`, by name. Reads the disk: make it off the loop."""

    def __init__(self, place: Path = STATIC) -> None:
        self._files = {path.name: _read(path) for path in sorted(place.iterdir()) if path.suffix in CONTENT_TYPES}

    def url(self, name: str) -> str:
        """Where a page finds the file `name`: another address for other content, so it may be kept for ever."""
        return f"/static/{name}?v={self._files[name].version}"

    def text(self, name: str, version: str) -> RawBody | None:
        """The file as it leaves, None where there is none of that name."""
        found = self._files.get(name)
        if found is None:
            return None
        keep = IMMUTABLE if version == found.version else REVALIDATE
        more = {"Cache-Control": keep, "Cross-Origin-Resource-Policy": "same-origin"}
        return RawBody(found.content_type, found.content, more)


def _read(path: Path) -> StaticFile:
    body = path.read_bytes()
    return StaticFile(CONTENT_TYPES[path.suffix], body, sha256(body).hexdigest()[:16])
