"""The Python clients of a running daemon: JobClient and AdminClient, their asyncio versions, and Worker."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jobd.client import errors
from jobd.client.api_request import uuid7
from jobd.client.endpoint import Endpoint, admin_endpoints, default_socket, parse_endpoint, worker_endpoints
from jobd.client.errors import *  # noqa: F403 - its `__all__` says which
from jobd.client.outcomes import Discard, Retry, Snooze, Stopped
from jobd.client.retries import RetryOptions
from jobd.client.sync import JobClient
from jobd.model.events import StreamedEvent
from jobd.model.responses import (
    GrantView,
    ImportPreview,
    ImportResult,
    JobPage,
    JobView,
    PreviewedLine,
    RejectedLine,
    ValidateJobView,
)

if TYPE_CHECKING:
    from jobd.client.admin import AdminClient
    from jobd.client.aio import AsyncAdminClient, AsyncJobClient
    from jobd.client.worker.command_worker import CommandWorker
    from jobd.client.worker.handler_context import AsyncHandlerContext, HandlerContext
    from jobd.client.worker.worker import Worker

# Imported on first use: most programs do not need all clients, and aiohttp takes 0.2 s to import.
_LAZY_IMPORTS = {
    "jobd.client.admin": ["AdminClient"],
    "jobd.client.aio": ["AsyncAdminClient", "AsyncJobClient"],
    "jobd.client.worker.command_worker": ["CommandWorker"],
    "jobd.client.worker.handler_context": ["AsyncHandlerContext", "HandlerContext"],
    "jobd.client.worker.worker": ["Worker"],
}


def __getattr__(name: str) -> Any:
    for module, names in _LAZY_IMPORTS.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AdminClient",
    "AsyncAdminClient",
    "AsyncHandlerContext",
    "AsyncJobClient",
    "CommandWorker",
    "Discard",
    "Endpoint",
    "GrantView",
    "HandlerContext",
    "ImportPreview",
    "ImportResult",
    "JobClient",
    "JobPage",
    "JobView",
    "PreviewedLine",
    "RejectedLine",
    "Retry",
    "RetryOptions",
    "Snooze",
    "Stopped",
    "StreamedEvent",
    "ValidateJobView",
    "Worker",
    "admin_endpoints",
    "default_socket",
    "parse_endpoint",
    "uuid7",
    "worker_endpoints",
]
__all__ += errors.__all__
