"""Render the templates, format times and sizes, and set the headers of every page.

All text is escaped. Invisible characters are made visible, except in form fields that are submitted again.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import re
import shlex
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import msgspec
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from jobd import __version__
from jobd.dashboard.assets import Assets
from jobd.dashboard.urls import curl_prefix, job_url
from jobd.http.response import RawBody
from jobd.model.job import EARLIEST_MS, LATEST_MS, headline
from jobd.model.sizes import byte_size
from jobd.model.times import duration, time_left, utc

TEMPLATES: Final = Path(__file__).parent / "templates"
PRECOMPILED: Final = ("base.html", "error.html")  # rendering an error does not wait for a thread
WARM_PAUSE_S = 5.0  # before each template; compiling one takes up to 25 ms
HTML: Final = "text/html; charset=utf-8"
CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
# `same-origin` and not `no-referrer`, with which browsers send `Origin: null` for the forms of these pages.
HEADERS: Final = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Referrer-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# The pages that show the same data as these commands.
_PAGES: Final = {
    "workers": "/workers",
    "locks": "/workers#h-locks",
    "stats": "/",
    "webhooks": "/webhooks",
    "queues": "/queues",
    "schedules": "/schedules",
    "failures": "/failures",
    "cluster": "/cluster",
}
# The period at the end of a sentence is not part of an id.
_JOB: Final = r"(?:timeline|why|cancel) (?P<id>[A-Za-z0-9_.:-]{1,200}(?<!\.))"
_COMMAND: Final = re.compile(rf"\bjobctl (?:(?P<verb>{'|'.join(_PAGES)})\b|{_JOB})")
MAX_JSON: Final = 20_000  # characters of a payload
MAX_SHORT_JSON: Final = 300
MAX_PRINTED: Final = 20_000  # characters of the output of a grant
_EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)

# A sequence that sets colours, the title of a window or the position of the cursor, and text that a later one replaces.
_TERMINAL: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[()][0-9A-B]|[=>78cDEHM])")
_OVERWRITTEN: Final = re.compile(r"[^\n]*\r(?=[^\r\n])")

# Replacements for control characters and for characters that change the direction of text.
_VISIBLE: Final = {
    **{code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"},
    0x7F: "\u2421",
    **{code: f"\\x{code:02x}" for code in range(0x80, 0xA0)},
    **{code: f"\\u{code:04x}" for code in (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))},
}


class Renderer:
    """Render pages. Templates are compiled on first use, or by `warm`; those in PRECOMPILED at once.

    Reads templates from disk: use it off the event loop, except for those in PRECOMPILED.
    """

    def __init__(self, assets: Assets) -> None:
        self._environment = Environment(
            loader=FileSystemLoader(TEMPLATES),
            autoescape=True,
            undefined=StrictUndefined,
            auto_reload=False,
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=visible,
        )
        self._environment.filters |= {
            "duration": duration,
            "time_left": time_left,
            "utc": utc,
            "detail": detail,
            "iso_time": iso_time,
            "byte_size": byte_size,
            "thousands": thousands,
            "short_json": short_json,
            "headline": headline,
            "short_number": short_number,
            "printed": printed,
            "link_commands": link_commands,
            "shell_quote": shlex.quote,
            "raw": raw,
            "job_url": job_url,
            "url_quote": lambda text: quote(str(text), safe=""),
        }
        self._environment.globals |= {"static_url": assets.url, "version": __version__, "curl_prefix": curl_prefix}
        self._environment.globals["max_printed"] = MAX_PRINTED

        for name in PRECOMPILED:
            self._environment.get_template(name)

    async def warm(self) -> None:
        """Compile all templates in the background after the start.

        Compiling holds the GIL, so pauses between the templates let requests run.
        """
        for name in await asyncio.to_thread(self._environment.list_templates):
            await asyncio.sleep(WARM_PAUSE_S)
            await asyncio.to_thread(self._environment.get_template, name)

    def page(self, template: str, **data: Any) -> RawBody:
        """Render a page or its live region."""
        body = self._environment.get_template(template).render(**data).encode("utf-8", "replace")
        return RawBody(HTML, body, HEADERS)


def redirect(url: str, **headers: str) -> RawBody:
    """Return the empty body and the headers of a redirect. `url` must be one of this daemon."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return RawBody(HTML, b"", {**HEADERS, "Location": url, **named})


# -- filters ---------------------------------------------------------------------------------------------------------


def visible(value: Any) -> Any:
    """Make control characters visible. Text from outside could otherwise hide or reverse parts of a line."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return value.translate(_VISIBLE)


def raw(value: object) -> Markup:
    """Escape `value` for a form field without making invisible characters visible: it is submitted again."""
    return escape(value)


def link_commands(text: str) -> Markup:
    """Escape `text`, and link the `jobctl` commands in it that have a page."""
    linked, at = Markup(), 0
    for found in _COMMAND.finditer(text):
        verb, job_id = found["verb"] or "", found["id"]
        if job_id == "ID":  # a placeholder
            continue
        url = _PAGES[verb] if job_id is None else job_url(job_id)
        link = Markup('<a href="{}">{}</a>').format(url, found[0])
        linked, at = linked + escape(visible(text[at : found.start()])) + link, found.end()
    return linked + escape(visible(text[at:]))


def detail(value: object, name: str = "") -> str:
    """Format a detail of an event or audit entry, according to its name. A filter becomes a list of its fields."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {detail(each, key)}" for key, each in value.items())
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        if name.endswith(("_at", "since", "until")) and EARLIEST_MS <= value <= LATEST_MS:
            return utc(value)
        if name.endswith("_ms"):
            return duration(value)
    return str(value)


def iso_time(at: int) -> str:
    at_utc = _EPOCH + datetime.timedelta(milliseconds=at)
    return at_utc.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def short_number(number: float) -> str:
    """Format a number with two significant digits, or as an integer from 10 up: 0, 0.25, 3.1, 120."""
    return thousands(round(number)) if number >= 10 else f"{number:.2g}"


def printed(text: str) -> str:
    """Return the end of what a program printed, as a terminal would show it, without colours."""
    text = _TERMINAL.sub("", text[-MAX_PRINTED:])
    return _OVERWRITTEN.sub("", text).replace("\r", "")


def thousands(number: float) -> str:
    """Format a number with narrow spaces between thousands: 12 345."""
    return f"{number:,}".replace(",", "\u202f")


def short_json(raw: Any) -> str:
    """Return the beginning of JSON text in one line."""
    text = " ".join(bytes(raw).decode("utf-8", "replace").split())
    return text if len(text) <= MAX_SHORT_JSON else f"{text[:MAX_SHORT_JSON]} …"


def pretty_json(raw: Any) -> tuple[str, int]:
    """Return indented JSON text, and the number of characters that were cut off."""
    text = bytes(raw).decode("utf-8", "replace")
    with contextlib.suppress(msgspec.DecodeError, RecursionError):  # nested too deeply to be indented
        text = msgspec.json.format(text)
    return text[:MAX_JSON], max(len(text) - MAX_JSON, 0)
