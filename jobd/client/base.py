"""What the blocking and the asyncio clients share: the endpoint, timeouts, TLS and errors."""

from __future__ import annotations

import ssl
from typing import Final

from jobd.client.endpoint import Endpoint, worker_endpoint
from jobd.client.errors import Unreachable
from jobd.client.protocol import RetryPolicy

CONNECT_S: Final = 5.0
IDLE_S: Final = 60.0  # the daemon closes idle connections after 75 s
CHUNK_BYTES: Final = 256 << 10


class BaseClient:
    """The settings of a client."""

    def __init__(
        self,
        endpoint: str | Endpoint | None = None,
        *,
        token: str | None = None,
        timeout_s: float = 30.0,
        retry_for_s: float = 30.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.endpoint: Final = worker_endpoint(endpoint, token)
        self._policy = RetryPolicy(total_s=retry_for_s, timeout_s=timeout_s)
        self._tls = (tls or ssl.create_default_context()) if self.endpoint.tls else None
        self._reset_connections()

    def _reset_connections(self) -> None:
        """Start without connections."""

    def _unreachable(self, error: BaseException) -> Unreachable:
        reason = "no response in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
        return Unreachable(f"The daemon at {self.endpoint} cannot be reached: {reason}.")
