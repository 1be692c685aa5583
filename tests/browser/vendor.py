"""Brings the browser's libraries into jobd/dashboard/static from npm packages (`make vendor`), with their licences.

Which ones, and in which versions, is said here; `vendored.json` beside the files says what lies there and its digests.
npm knows where its packages come from; no address is kept.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any, Final

from tests import ROOT

STATIC: Final = ROOT / "jobd" / "dashboard" / "static"
NOTE: Final = STATIC / "vendored.json"

# Of each package: its version, its licence as its own manifest names it, and which files become which of ours.
PACKAGES: Final[dict[str, tuple[str, str, dict[str, str]]]] = {
    "htmx.org": ("2.0.11", "0BSD", {"dist/htmx.min.js": "htmx.js", "LICENSE": "htmx.LICENSE.txt"}),
    "idiomorph": (
        "0.8.0",
        "0BSD",
        {"dist/idiomorph-ext.min.js": "idiomorph.js", "LICENSE": "idiomorph.LICENSE.txt"},
    ),
    "uplot": (
        "1.6.32",
        "MIT",
        {
            "dist/uPlot.iife.min.js": "uplot.js",
            "dist/uPlot.min.css": "uplot.css",
            "LICENSE": "uplot.LICENSE.txt",
        },
    ),
    "swagger-ui-dist": (
        "5.35.0",
        "Apache-2.0",
        {
            "swagger-ui-bundle.js": "swagger-ui.js",
            "swagger-ui.css": "swagger-ui.css",
            "LICENSE": "swagger-ui.LICENSE.txt",
            "NOTICE": "swagger-ui.NOTICE.txt",
            "swagger-ui-bundle.js.LICENSE.txt": "swagger-ui.js.LICENSE.txt",
        },
    ),
}


def main() -> None:
    note = {}
    for name, (version, licence, files) in PACKAGES.items():
        with tempfile.TemporaryDirectory() as place:
            note[name] = {"version": version, "licence": licence, "files": _bring(name, version, files, Path(place))}
        print(f"{name} {version}")
    NOTE.write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def _bring(name: str, version: str, files: dict[str, str], place: Path) -> dict[str, Any]:
    """The files of one package, written beside the others; their digests."""
    command = ["npm", "pack", "--silent", "--ignore-scripts", f"{name}@{version}"]
    subprocess.run(command, cwd=place, check=True, stdout=subprocess.DEVNULL)
    [package] = place.glob("*.tgz")
    digests = {}
    with tarfile.open(package) as opened:
        for theirs, ours in files.items():
            file = opened.extractfile(f"package/{theirs}")
            assert file is not None, f"{name} has no file {theirs}"
            text = file.read()
            (STATIC / ours).write_bytes(text)
            digests[ours] = hashlib.sha256(text).hexdigest()
    return digests


if __name__ == "__main__":
    main()
