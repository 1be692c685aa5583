"""Build the URLs of jobs, and decide which URLs from workers may be links.

Browsers resolve `.` and `..` in a path, also when they are written as %2E. A job with such an id has a URL with the id
in the query.

Host names are not resolved: browsers keep cookies by name.
"""

from __future__ import annotations

import base64
import re
import socket
from collections.abc import Iterable
from hashlib import sha256
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final
from urllib.parse import quote, urlencode

DOT_SEGMENTS: Final = frozenset({".", ".."})  # ids that a path cannot hold

# Hosts are taken in plain spelling only: what a browser makes of others (user@host, %31, full-width digits) is its own.
_WEB: Final = re.compile(
    r"https?://(?P<host>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?([/?#][^\x00-\x1f\x7f]*)?", re.IGNORECASE
)
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
OWN_HOST: Final = "this dashboard's own host: a browser would send the cookie of your session to any port of it"
LOCAL_HOST: Final = (
    "your own machine: what listens there is not what the worker saw, and it may be sent your session's cookie"
)
ODD_HOST: Final = "its host is spelled in an odd way"

EXTERNAL_LINK_STYLE: Final = (
    "body { font: 16px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 3rem auto; padding: 0 1rem; "
    "overflow-wrap: anywhere; }"
)
# A page of no origin: browsers take it for another site, and send no SameSite=Strict cookie along, neither to where its
# link leads nor to where that leads on. From a page of ours a redirect back to this host, on any port, brought it.
EXTERNAL_LINK_POLICY: Final = (
    "sandbox allow-downloads; default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    f"style-src 'sha256-{base64.b64encode(sha256(EXTERNAL_LINK_STYLE.encode()).digest()).decode()}'"
)


def no_link_reason(url: str, own: Iterable[str]) -> str | None:
    """Why `url` is shown as text alone: a few words, "" where it is no web address at all. None where it may be a link.

    `own` are the names of the host that the browser came to.
    """
    if not url.lower().startswith(("http://", "https://")):
        return ""
    found = _WEB.fullmatch(url)
    host = None if found is None else _host(found["host"])
    if host is None:
        return ODD_HOST
    if _is_local(host):
        return LOCAL_HOST
    return OWN_HOST if host in {_host(name) for name in own} else None


def _host(name: str) -> str | IPv4Address | IPv6Address | None:
    """A host as browsers see it: 2130706433, 0x7f.1 and 127.0.0.1 are the same. None where it is none."""
    name = name.lower().removesuffix(".")
    if name.startswith("[") or ":" in name:
        try:
            address = ip_address(name.strip("[]"))
        except ValueError:
            return None
        return getattr(address, "ipv4_mapped", None) or address
    if _NUMBER.fullmatch(name.rpartition(".")[2]) is None:
        return name or None
    try:
        return IPv4Address(socket.inet_aton(name))
    except OSError:
        return None


def _is_local(host: str | IPv4Address | IPv6Address) -> bool:
    if isinstance(host, str):
        return host == "localhost" or host.endswith(".localhost")
    return host.is_loopback or host.is_unspecified


def job_url(job_id: str, part: str = "", **query: object) -> str:
    """The address of the job's page, or of `part` of it."""
    tail = f"/{part}" if part else ""
    if job_id in DOT_SEGMENTS:
        return f"/job{tail}?{urlencode({'id': job_id, **query})}"
    more = f"?{urlencode(query)}" if query else ""
    return f"/jobs/{quote(job_id, safe='')}{tail}{more}"


def curl_prefix(job_id: str) -> str:
    """curl with what it needs in order to leave the address of a job's call as it is."""
    return "curl -sS --path-as-is" if job_id in DOT_SEGMENTS else "curl -sS"
