"""Serve static files from memory, under URLs that change with their content."""

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
    """Hold the files of `static/` by name. Reads the disk: construct it off the event loop."""

    def __init__(self, directory: Path = STATIC) -> None:
        self._files = {path.name: _read(path) for path in sorted(directory.iterdir()) if path.suffix in CONTENT_TYPES}

    def url(self, name: str) -> str:
        """Return the URL of a file. It changes with the content, so browsers may cache the file forever."""
        return f"/static/{name}?v={self._files[name].version}"

    def body(self, name: str, version: str) -> RawBody | None:
        """Return the file as a response body, None if there is no such file."""
        file = self._files.get(name)
        if file is None:
            return None
        caching = IMMUTABLE if version == file.version else REVALIDATE
        headers = {"Cache-Control": caching, "Cross-Origin-Resource-Policy": "same-origin"}
        return RawBody(file.content_type, file.content, headers)


def _read(path: Path) -> StaticFile:
    content = path.read_bytes()
    return StaticFile(CONTENT_TYPES[path.suffix], content, sha256(content).hexdigest()[:16])
