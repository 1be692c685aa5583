"""Attempt a delivery over HTTP: signed, with a timeout, and to allowed addresses only.

A receiver cannot cause an exception. Errors show only the host of the URL, because the rest may be a secret.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any, Final

import aiohttp
import structlog
from aiohttp.abc import AbstractResolver, ResolveResult

from jobd import __version__
from jobd.model.job import HOUR_MS, SECOND_MS
from jobd.model.webhooks import Delivery, DeliveryOutcome, WebhookEndpoint
from jobd.webhooks.message import headers
from jobd.webhooks.url_policy import blocked_reason, redacted

MAX_RESPONSE_BYTES: Final = 64 << 10  # read of a response
MAX_ERROR_LENGTH: Final = 200  # characters kept of a response or an error
MAX_LOOKUPS: Final = 16  # concurrent name lookups, hanging ones included
DRAIN_S: Final = 1.0  # timeout for the body of a response
IDLE_S: Final = 30.0  # after which an idle connection is closed

BLOCKED: Final = "webhooks may not connect to it"

log = structlog.get_logger("jobd.webhooks")


class AddressBlocked(OSError):
    """The address of the host is not allowed."""


class Resolver(AbstractResolver):
    """Resolves names in daemon threads, so that a hanging name server does not delay the end of the process."""

    def __init__(self) -> None:
        self._running = 0

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the addresses of `host`. Raises OSError."""
        loop = asyncio.get_running_loop()
        found: asyncio.Future[list[Any]] = loop.create_future()
        if self._running >= MAX_LOOKUPS:
            raise OSError("too many name lookups are already running")

        def set_outcome(result: list[Any] | OSError) -> None:
            self._running -= 1
            if found.done():
                return
            if isinstance(result, OSError):
                found.set_exception(result)
            else:
                found.set_result(result)

        def look_up() -> None:
            try:
                result: list[Any] | OSError = socket.getaddrinfo(
                    host, port, type=socket.SOCK_STREAM, family=family, flags=socket.AI_ADDRCONFIG
                )
            except OSError as error:
                result = error
            except UnicodeError:
                result = OSError("it is not a valid host name")
            try:
                loop.call_soon_threadsafe(set_outcome, result)
            except RuntimeError:
                return  # the loop is closed

        try:
            threading.Thread(target=look_up, name="webhook-lookup", daemon=True).start()
        except RuntimeError:
            raise OSError("no thread can be started") from None
        self._running += 1
        return [_resolved(host, *each) for each in await found]

    async def close(self) -> None:
        """Do nothing: the threads end by themselves."""


def _resolved(host: str, family: int, _: int, proto: int, __: str, address: Any) -> ResolveResult:
    return ResolveResult(
        hostname=host,
        host=address[0],
        port=address[1],
        family=family,
        proto=proto,
        flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
    )


def _checked_socket(info: Any) -> socket.socket:
    """Return the socket for a connection to an allowed address.

    The check is on the address of the connection, so a name that changes between two lookups cannot bypass it.
    """
    family, kind, proto, _, address = info
    if (why := blocked_reason(address[0])) is not None:
        raise AddressBlocked(f"{address[0]} is {why}: {BLOCKED}")
    return socket.socket(family, kind, proto)


class HttpTransport:
    """Sends to one endpoint. Always `close` it."""

    def __init__(
        self, *, allow_private: bool, connections: int, wall: Callable[[], int], tls: ssl.SSLContext | None = None
    ):
        connector = aiohttp.TCPConnector(
            ssl=tls or True,
            resolver=Resolver(),
            use_dns_cache=False,
            limit=connections,
            keepalive_timeout=IDLE_S,
            socket_factory=None if allow_private else _checked_socket,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            headers={"User-Agent": f"jobd/{__version__}", "Accept-Encoding": "identity"},
        )
        self._wall = wall

    async def close(self) -> None:
        await self._session.close()

    async def post(self, endpoint: WebhookEndpoint, delivery: Delivery) -> DeliveryOutcome:
        """Attempt a delivery once and return the result."""
        signed = headers(endpoint.secrets, delivery.message_id, self._wall() // SECOND_MS, delivery.body)
        no_timeout = aiohttp.ClientTimeout(total=None)  # the block below has one
        try:
            async with (
                asyncio.timeout(endpoint.timeout_ms / SECOND_MS) as limit,
                self._session.post(
                    endpoint.url, data=delivery.body, headers=signed, allow_redirects=False, timeout=no_timeout
                ) as response,
            ):
                limit.reschedule(None)  # the status decides, regardless of the rest of the response
                body = await _read_start(response)
                if 200 <= response.status < 300:
                    return DeliveryOutcome(response.status)
                wait_ms = _retry_after_ms(response.headers.get("Retry-After", ""))
                description = _http_error(response.status, body, endpoint)
                return DeliveryOutcome(response.status, description, wait_ms, gone=response.status == 410)
        except TimeoutError:
            return DeliveryOutcome(None, f"There was no response within {endpoint.timeout_ms / SECOND_MS:g} s.")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return DeliveryOutcome(None, _one_line(_connection_error(error, endpoint)))


async def _read_start(response: aiohttp.ClientResponse) -> bytes:
    """Return the first MAX_RESPONSE_BYTES of a body, or nothing if it does not arrive within DRAIN_S.

    Close the connection unless the body has ended. A part of a body could end with a part of a secret.
    """
    read = bytearray()
    try:
        async with asyncio.timeout(DRAIN_S):
            while len(read) <= MAX_RESPONSE_BYTES and (piece := await response.content.readany()):
                read += piece
    except (aiohttp.ClientError, OSError):  # including TimeoutError
        response.close()
        return b""
    if len(read) > MAX_RESPONSE_BYTES:
        response.close()
    return bytes(read[:MAX_RESPONSE_BYTES])


def _http_error(status: int, body: bytes, endpoint: WebhookEndpoint) -> str:
    if 300 <= status < 400:
        return f"{status}: redirects are not followed. Set url to the target."
    # Redact before shortening, because a part of a secret would not be found.
    description = _one_line(redacted(endpoint.url, body.decode("utf-8", "replace")))
    return f"{status}: {description}" if description else f"{status}"


def _retry_after_ms(text: str) -> int | None:
    """Return a Retry-After in seconds as ms, at most an hour. Dates are ignored."""
    return min(int(text) * SECOND_MS, HOUR_MS) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _connection_error(error: Exception, endpoint: WebhookEndpoint) -> str:
    match error:
        case aiohttp.ClientConnectorDNSError():
            return f"The host name {error.host} cannot be resolved: {error.os_error.strerror or error.os_error}."
        case aiohttp.ClientConnectorCertificateError():
            return f"The certificate of {error.host} is not trusted: {error.certificate_error}."
        case aiohttp.ClientConnectorError(os_error=ConnectionError(errno=int(number))):  # the library has its own texts
            return f"{error.host}:{error.port} cannot be reached: {os.strerror(number)}."
        case aiohttp.ClientConnectorError():
            why = f"{error.host}:{error.port} cannot be reached: {error.os_error.strerror or error.os_error}."
            return f"{why} If this is intended, set allow_private." if BLOCKED in why else why
        case aiohttp.ServerDisconnectedError():
            return "The connection was closed before a response arrived."
        case aiohttp.InvalidURL():
            return f"The url is invalid: {redacted(endpoint.url, error.description or 'it cannot be parsed')}."
        case aiohttp.ClientResponseError():
            return "The receiver does not speak valid HTTP."
        case OSError() if error.strerror:
            return f"The connection failed: {error.strerror}."
        case _:
            return f"The connection failed: {type(error).__name__}."


def _one_line(text: str) -> str:
    line = " ".join("".join(char if char.isprintable() else " " for char in text[: 4 * MAX_ERROR_LENGTH]).split())
    return line if len(line) <= MAX_ERROR_LENGTH else f"{line[: MAX_ERROR_LENGTH - 2]} …"
