"""Run jobd with an artifact directory that never responds. SIGUSR2 makes the writes of the store fail.

`python -m tests.support.hanging_mount …`
"""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

from jobd.cli.daemon.main import main
from jobd.storage.artifacts.filesystem import FileArtifactStore
from jobd.storage.tables.projection import Projection


def hang(*_: Any) -> None:
    threading.Event().wait()


def break_disk(*_: Any) -> None:
    Projection.append = no_disk  # type: ignore[method-assign,assignment]


def no_disk(*_: Any) -> Any:
    raise OSError("simulated disk error")


if __name__ == "__main__":
    FileArtifactStore._probe = FileArtifactStore._delete = hang  # type: ignore[method-assign,assignment]
    signal.signal(signal.SIGUSR2, break_disk)
    sys.exit(main())
