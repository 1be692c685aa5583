"""One try of one delivery over HTTP: signed, within its time, to the address that it is meant for, and no further.

Decides nothing about what comes next. Never raises for what a receiver does. Of a URL only the host is ever told: what
errors say of themselves may hold all of it, and so may an answer.
"""

from __future__ import annotations

import asyncio
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

MAX_RESPONSE_BYTES: Final = 64 << 10  # of an answer; nobody needs more, and what is not read cannot be too much
MAX_ERROR_LENGTH: Final = 200  # characters of an answer, or of an error, that are kept
MAX_LOOKUPS: Final = 16  # of names at once, with those that hang
DRAIN_S: Final = 1.0  # for the rest of an answer that says yes
IDLE_S: Final = 30.0  # a connection is kept so long for the next delivery

BLOCKED: Final = "webhooks do not go there"

log = structlog.get_logger("jobd.webhooks")


class AddressBlocked(OSError):
    """The address that the name stands for is none that webhooks go to."""


class Resolver(AbstractResolver):
    """Names are looked up in threads that nobody waits for when the daemon ends: a name server may hang for minutes."""

    def __init__(self) -> None:
        self._looking = 0

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The addresses of `host`. Raises OSError."""
        loop = asyncio.get_running_loop()
        found: asyncio.Future[list[Any]] = loop.create_future()
        if self._looking >= MAX_LOOKUPS:
            raise OSError("too many names are being looked up, and none is found")

        def tell(answer: list[Any] | OSError) -> None:
            self._looking -= 1
            if found.done():
                return
            if isinstance(answer, OSError):
                found.set_exception(answer)
            else:
                found.set_result(answer)

        def look() -> None:
            try:
                answer: list[Any] | OSError = socket.getaddrinfo(
                    host, port, type=socket.SOCK_STREAM, family=family, flags=socket.AI_ADDRCONFIG
                )
            except OSError as error:
                answer = error
            except UnicodeError:
                answer = OSError("it is no name")
            try:
                loop.call_soon_threadsafe(tell, answer)
            except RuntimeError:
                return  # the loop is gone, and so is who asked

        self._looking += 1
        threading.Thread(target=look, name="webhook-lookup", daemon=True).start()
        return [_resolved(host, *each) for each in await found]

    async def close(self) -> None:
        """Nothing to close: threads end by themselves."""


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
    """The socket for a connection, if it goes where it may. This is the last word before `connect`: whatever the name
    stood for before, or stands for later, this is the address that is used."""
    family, kind, proto, _, address = info
    if (why := blocked_reason(address[0])) is not None:
        raise AddressBlocked(f"{address[0]} is {why}: {BLOCKED}")
    return socket.socket(family, kind, proto)


class HttpTransport:
    """Sends to one endpoint. `close` in the end."""

    def __init__(self, *, allow_private: bool, most: int, wall: Callable[[], int], tls: ssl.SSLContext | None = None):
        connector = aiohttp.TCPConnector(
            ssl=tls or True,
            resolver=Resolver(),
            use_dns_cache=False,
            limit=most,
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
        """What came of sending it once."""
        signed = headers(endpoint.secrets, delivery.event_id, self._wall() // SECOND_MS, delivery.body)
        nobody = aiohttp.ClientTimeout(total=None)
        try:
            async with (
                asyncio.timeout(endpoint.timeout_ms / SECOND_MS) as limit,
                self._session.post(
                    endpoint.url, data=delivery.body, headers=signed, allow_redirects=False, timeout=nobody
                ) as answer,
            ):
                if 200 <= answer.status < 300:
                    limit.reschedule(None)  # it was taken: whatever else is said, and how slowly, changes nothing
                    await _drain(answer)
                    return DeliveryOutcome(answer.status)
                wait_ms = _retry_after_ms(answer.headers.get("Retry-After", ""))
                said = _http_error(answer.status, await _read_start(answer), endpoint)
                return DeliveryOutcome(answer.status, said, wait_ms, gone=answer.status == 410)
        except TimeoutError:
            return DeliveryOutcome(None, f"There was no answer within {endpoint.timeout_ms / SECOND_MS:g} s.")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return DeliveryOutcome(None, _one_line(_connection_error(error, endpoint)))


async def _read_start(answer: aiohttp.ClientResponse) -> bytes:
    """Up to ANSWER_BYTES of an answer. The connection of one that is longer is closed."""
    read = bytearray()
    while len(read) <= MAX_RESPONSE_BYTES and (piece := await answer.content.readany()):
        read += piece
    if len(read) > MAX_RESPONSE_BYTES:
        answer.close()
    return bytes(read[:MAX_RESPONSE_BYTES])


async def _drain(answer: aiohttp.ClientResponse) -> None:
    """A connection whose answer was read to its end can be used again; one that does not end soon is closed."""
    try:
        async with asyncio.timeout(DRAIN_S):
            await _read_start(answer)
    except (aiohttp.ClientError, OSError):  # TimeoutError is one
        answer.close()


def _http_error(status: int, answer: bytes, endpoint: WebhookEndpoint) -> str:
    if 300 <= status < 400:
        return f"{status}: redirects are not followed. Set url to where it leads."
    said = _one_line(
        redacted(endpoint.url, answer.decode("utf-8", "replace"))
    )  # before it is cut: half a secret is one, too
    return f"{status}: {said}" if said else f"{status}"


def _retry_after_ms(text: str) -> int | None:
    """Seconds, as they are asked for; of a date nobody here makes use."""
    return min(int(text) * SECOND_MS, HOUR_MS) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _connection_error(error: Exception, endpoint: WebhookEndpoint) -> str:
    match error:
        case aiohttp.ClientConnectorDNSError():
            return f"The name {error.host} cannot be looked up: {error.os_error.strerror or error.os_error}."
        case aiohttp.ClientConnectorCertificateError():
            return f"The certificate of {error.host} is not to be trusted: {error.certificate_error}."
        case aiohttp.ClientConnectorError():
            why = f"{error.host}:{error.port} cannot be reached: {error.os_error.strerror or error.os_error}."
            return f"{why} If that is meant, set allow_private." if BLOCKED in why else why
        case aiohttp.ServerDisconnectedError():
            return "The connection was closed before an answer came."
        case aiohttp.InvalidURL():
            return f"url leads nowhere: {redacted(endpoint.url, error.description or 'it is none')}."
        case aiohttp.ClientResponseError():
            return "What answers there speaks no HTTP that can be understood."
        case aiohttp.ClientPayloadError():
            return "The answer broke off."
        case OSError() if error.strerror:
            return f"The connection failed: {error.strerror}."
        case _:
            return f"The connection failed: {type(error).__name__}."


def _one_line(text: str) -> str:
    """In one line, and short: it is kept, logged and shown."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text[: 4 * MAX_ERROR_LENGTH]).split())
    return line if len(line) <= MAX_ERROR_LENGTH else f"{line[: MAX_ERROR_LENGTH - 2]} …"
