"""Check that the address which a node advertises leads to the node itself."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

CHECK_S: Final = 5.0

_ADVICE: Final = "correct node.advertise"
_REQUEST: Final = b"GET /healthz HTTP/1.1\r\nHost: jobd\r\n\r\n"


async def advertised_problem(url: str, is_own: Callable[[int], bool] | None) -> str | None:
    """Return what is wrong with the advertised `url`, None if it leads to this node.

    `is_own` returns whether this node has a connection from a port; None if a proxy is between. No token is sent.
    """
    parts = urlsplit(url)
    context = None
    if parts.scheme == "https":
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # clients may know another authority
    try:
        async with asyncio.timeout(CHECK_S):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port, ssl=context)
            try:
                writer.write(_REQUEST)
                if not await reader.read(1):
                    raise ConnectionResetError("the connection was closed")
                is_here = is_own is None or is_own(writer.get_extra_info("sockname")[1])
            finally:
                writer.transport.abort()
    except (OSError, TimeoutError) as error:
        reason = str(error) or f"no response within {CHECK_S:g} s"
        return f"node.advertise: {url} does not respond to this node ({reason}), so clients may not reach it: {_ADVICE}"
    if is_here:
        return None
    return (
        f"node.advertise: another process responds at {url}, so clients do not reach this node: {_ADVICE}, or set "
        "node.direct = false if a proxy is between"
    )
