"""Build the URLs of jobs, and decide which URLs reported by workers may be links."""

from __future__ import annotations

import base64
import re
import socket
from collections.abc import Iterable
from hashlib import sha256
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final
from urllib.parse import quote, urlencode

# Job ids that a path cannot hold: browsers resolve `.` and `..`, even if they are escaped as %2E.
DOT_SEGMENTS: Final = frozenset({".", ".."})

# Only hosts in plain spelling are accepted, because browsers also interpret others (user@host, %31, full-width digits).
_URL: Final = re.compile(
    r"https?://(?P<host>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?([/?#][^\x00-\x1f\x7f]*)?", re.IGNORECASE
)
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
OWN_HOST: Final = "it points to the host of this dashboard, and browsers send your session cookie to every port of it"
LOCAL_HOST: Final = (
    "it points to your own machine, not to the worker's, and a service there could receive your session cookie"
)
ODD_HOST: Final = "its host has an unusual spelling"

EXTERNAL_LINK_STYLE: Final = (
    "body { font: 16px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 3rem auto; padding: 0 1rem; "
    "overflow-wrap: anywhere; }"
)
# The sandbox gives the page an opaque origin, so browsers treat its link as coming from another site. They send no
# SameSite=Strict cookie to the target, nor to wherever the target redirects. From an ordinary page, a redirect back to
# any port of this host would receive the cookie.
EXTERNAL_LINK_POLICY: Final = (
    "sandbox allow-downloads; default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    f"style-src 'sha256-{base64.b64encode(sha256(EXTERNAL_LINK_STYLE.encode()).digest()).decode()}'"
)


def job_url(job_id: str, part: str = "", **query: object) -> str:
    """Return the URL of the job's page, or of one `part` of it."""
    tail = f"/{part}" if part else ""
    if job_id in DOT_SEGMENTS:
        return f"/job{tail}?{urlencode({'id': job_id, **query})}"
    suffix = f"?{urlencode(query)}" if query else ""
    return f"/jobs/{quote(job_id, safe='')}{tail}{suffix}"


def curl_prefix(job_id: str) -> str:
    """Return the curl command with the options that keep the URL of the job's API call as it is."""
    return "curl -sS --path-as-is" if job_id in DOT_SEGMENTS else "curl -sS"


def no_link_reason(url: str, own: Iterable[str]) -> str | None:
    """Return why `url` must be shown as plain text: "" if it is not a web URL, None if it may be a link.

    `own` holds the host names of this daemon. Names are not resolved: browsers keep cookies by name.
    """
    if not url.lower().startswith(("http://", "https://")):
        return ""
    found = _URL.fullmatch(url)
    host = None if found is None else _host(found["host"])
    if host is None:
        return ODD_HOST
    if _is_local(host):
        return LOCAL_HOST
    return OWN_HOST if host in {_host(name) for name in own} else None


def _host(name: str) -> str | IPv4Address | IPv6Address | None:
    """Parse a host as browsers do: 2130706433, 0x7f.1 and 127.0.0.1 are equal. Return None if it is invalid."""
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
