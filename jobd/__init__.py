"""jobd: one daemon that owns all job state. Start with docs/architecture.md.

`from jobd import App` imports msgspec only. Asynchronous calls and workers import aiohttp when they begin.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jobd.client.app.app import App
    from jobd.client.app.job_context import JobContext, current_job
    from jobd.client.app.job_handle import JobCancelled, JobFailed, JobHandle
    from jobd.client.app.job_port import NewJob
    from jobd.client.app.options import Backoff
    from jobd.client.app.typed_task import AsyncTask, Call, Task
    from jobd.client.outcomes import Discard, Retry, Snooze, Stopped

_LAZY_IMPORTS = {
    "jobd.client.app.app": ["App"],
    "jobd.client.app.job_context": ["JobContext", "current_job"],
    "jobd.client.app.job_handle": ["JobCancelled", "JobFailed", "JobHandle"],
    "jobd.client.app.job_port": ["NewJob"],
    "jobd.client.app.options": ["Backoff"],
    "jobd.client.app.typed_task": ["AsyncTask", "Call", "Task"],
    "jobd.client.outcomes": ["Discard", "Retry", "Snooze", "Stopped"],
}


def __getattr__(name: str) -> Any:
    for module, names in _LAZY_IMPORTS.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "App",
    "AsyncTask",
    "Backoff",
    "Call",
    "Discard",
    "JobCancelled",
    "JobContext",
    "JobFailed",
    "JobHandle",
    "NewJob",
    "Retry",
    "Snooze",
    "Stopped",
    "Task",
    "current_job",
]
