"""A worker of the demo, as a process of its own: the ordinary Worker with one handler that converts files.

python -m jobd.cli.demo.worker ENDPOINT NAME LOCK_TTL_MS SOURCES RESULTS
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from jobd.cli.demo.files import convert, target_name
from jobd.client.worker.worker import SyncTask, Worker


def main(endpoint: str, name: str, lock_ttl_ms: str, sources: str, results: str) -> None:
    """Work until SIGTERM. Locks are short, so that a death is noticed within seconds."""
    worker = Worker(endpoint, name=name, lock_ttl_ms=int(lock_ttl_ms))

    @worker.handler()
    def work(task: SyncTask) -> dict[str, Any]:
        kind, file = task.job.kind, task.payload["file"]
        target = Path(results) / target_name(kind, file)
        figures = convert(kind, Path(sources) / file, target, task.progress)
        return {"file_path": str(target), "metadata": {"worker": name, **figures}}

    worker.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
