"""Select the files of jobd-client."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FILES = [
    "jobd/__init__.py",
    "jobd/django.py",
    "jobd/py.typed",
    "jobd/model/**/*.py",
    "jobd/client/**/*.py",
    "jobd/cli/*.py",
    "jobd/cli/ctl/*.py",
    # jobctl does not write over the files of a running daemon.
    "jobd/storage/__init__.py",
    "jobd/storage/files.py",
]


class ClientFiles(BuildHookInterface[Any]):
    """Add the files to a wheel. An editable install finds them in the tree."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        tree = Path(self.root).parents[1]
        if version == "standard":
            build_data["force_include"] = {
                str(path): str(path.relative_to(tree)) for pattern in FILES for path in tree.glob(pattern)
            }
