"""Copy browser libraries and their licences from npm packages into jobd/dashboard/static (`make vendor`).

PACKAGES pins the versions. `vendored.json` records the files and their digests.
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
MANIFEST: Final = STATIC / "vendored.json"

# Name of a package: version, licence as in its manifest, and its files with their names here.
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
    manifest = {}
    for name, (version, licence, files) in PACKAGES.items():
        with tempfile.TemporaryDirectory() as directory:
            manifest[name] = {
                "version": version,
                "licence": licence,
                "files": _copy(name, version, files, Path(directory)),
            }
        print(f"{name} {version}")
    MANIFEST.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _copy(name: str, version: str, files: dict[str, str], directory: Path) -> dict[str, Any]:
    """Copy the files of one package, and return their digests."""
    command = ["npm", "pack", "--silent", "--ignore-scripts", f"{name}@{version}"]
    subprocess.run(command, cwd=directory, check=True, stdout=subprocess.DEVNULL)
    [package] = directory.glob("*.tgz")
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
