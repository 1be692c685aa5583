"""Pages as bytes: the templates, the words for times and sizes, and the headers of every page.

Asks for nothing: what is shown is given. All text is escaped, and characters that nobody can see are made visible, but
in fields that are sent back.
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
from jobd.model.job import DAY_MS, EARLIEST_MS, HOUR_MS, LATEST_MS, MINUTE_MS, SECOND_MS, headline

TEMPLATES: Final = Path(__file__).parent / "templates"
PRECOMPILED: Final = ("base.html", "error.html")  # a refusal takes no detour
WARM_PAUSE_S = 1.0  # between two templates that are compiled: each takes some milliseconds, up to 25
HTML: Final = "text/html; charset=utf-8"
CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
# `same-origin`, not `no-referrer`: with that a browser sends `Origin: null` with our own forms.
HEADERS: Final = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Referrer-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# The pages on which one sees, or does, what these commands show or do.
_PAGES: Final = {
    "workers": "/workers",
    "locks": "/workers#h-locks",
    "stats": "/",
    "webhooks": "/webhooks",
}
_COMMAND: Final = re.compile(rf"\bjobctl (?:(?P<verb>{'|'.join(_PAGES)})\b|timeline (?P<id>[A-Za-z0-9_.:-]{{1,200}}))")
MAX_JSON: Final = 20_000  # characters of a payload
MAX_SHORT_JSON: Final = 300
_EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)

# Control characters as their pictures, and what turns the direction of text around as its name.
_PICTURES: Final = {
    **{code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"},
    0x7F: "\u2421",
    **{code: f"\\x{code:02x}" for code in range(0x80, 0xA0)},
    **{code: f"\\u{code:04x}" for code in (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))},
}


class Renderer:
    """Makes pages, off the loop but for those of AT_HAND. Templates are compiled when they are wanted, or by `warm`."""

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
            "utc_time": utc_time,
            "audit_detail": audit_detail,
            "iso_time": iso_time,
            "byte_size": byte_size,
            "thousands": thousands,
            "short_json": short_json,
            "headline": headline,
            "short_number": short_number,
            "link_commands": link_commands,
            "shell_quote": shlex.quote,
            "raw": raw,
            "job_url": job_url,
            "url_quote": lambda text: quote(str(text), safe=""),
        }
        self._environment.globals |= {"static_url": assets.url, "version": __version__, "curl_prefix": curl_prefix}

        for name in PRECOMPILED:
            self._environment.get_template(name)

    async def warm(self) -> None:
        """Compile all templates, which a start need not wait for. Who wants one before has it compiled then.

        Off the loop, but they want the interpreter as it does: in one go they would hold up whoever asks meanwhile.
        """
        for name in await asyncio.to_thread(self._environment.list_templates):
            await asyncio.to_thread(self._environment.get_template, name)
            await asyncio.sleep(WARM_PAUSE_S)

    def page(self, template: str, **shown: Any) -> RawBody:
        """A page, or a part of one, with the headers of both."""
        body = self._environment.get_template(template).render(**shown).encode("utf-8", "replace")
        return RawBody(HTML, body, HEADERS)


def redirect(place: str, **more: str) -> RawBody:
    """Nothing but the place where to go on; `place` is an address of ours."""
    return RawBody(HTML, b"", {**HEADERS, "Location": place, **{name.replace("_", "-"): more[name] for name in more}})


# ---------------------------------------------------------------------------------------------------------------------
# Words.


def visible(value: Any) -> Any:
    """`value` for a page: text of others may hold characters that move the cursor or turn the line around."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return value.translate(_PICTURES)


def raw(value: object) -> Markup:
    """`value` for a field that is sent back: there it has to be what it was, also where nobody can see all of it."""
    return escape(value)


def link_commands(text: str) -> Markup:
    """`text`, where a `jobctl` command that has a page of its own here is a link to that."""
    shown, at = Markup(), 0
    for found in _COMMAND.finditer(text):
        verb, job_id = found["verb"] or "", found["id"]
        if job_id == "ID":  # any
            continue
        place = _PAGES[verb] if job_id is None else job_url(job_id)
        link = Markup('<a href="{}">{}</a>').format(place, found[0])
        shown, at = shown + escape(visible(text[at : found.start()])) + link, found.end()
    return shown + escape(visible(text[at:]))


def duration(ms: float) -> str:
    """How long, with the two greatest units: 350 ms, 12 s, 3 min 5 s, 2 h 10 min, 4 d 3 h."""
    ms = abs(int(ms))
    if ms < SECOND_MS:
        return f"{ms} ms"
    for unit, word, smaller, small in (
        (DAY_MS, "d", HOUR_MS, "h"),
        (HOUR_MS, "h", MINUTE_MS, "min"),
        (MINUTE_MS, "min", SECOND_MS, "s"),
    ):
        if ms >= unit:
            rest = ms % unit // smaller
            return f"{ms // unit} {word} {rest} {small}" if rest else f"{ms // unit} {word}"
    return f"{ms // SECOND_MS} s"


def utc_time(at: int) -> str:
    """When, for people: 2026-01-31 12:00:00 UTC."""
    return _utc(at).strftime("%Y-%m-%d %H:%M:%S UTC")


def audit_detail(value: object) -> str:
    """A detail of the audit log in words: of a filter each part by its name, points in time (Unix ms) for people."""
    if not isinstance(value, dict):
        return str(value)
    parts = []
    for name, each in value.items():
        is_time = isinstance(each, int) and name.endswith(("since", "until")) and EARLIEST_MS <= each <= LATEST_MS
        parts.append(f"{name} {utc_time(each) if is_time else each}")
    return ", ".join(parts)


def iso_time(at: int) -> str:
    return _utc(at).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _utc(at: int) -> datetime.datetime:
    return _EPOCH + datetime.timedelta(milliseconds=at)


def byte_size(count: int) -> str:
    """Bytes in the unit that gives a short number."""
    number = float(count)
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def short_number(number: float) -> str:
    """A number of which only the greatest digits matter: 0, 0.25, 3.1, 120."""
    return thousands(round(number)) if number >= 10 else f"{number:.2g}"


def thousands(number: float) -> str:
    """A number with narrow spaces: 12 345."""
    return f"{number:,}".replace(",", "\u202f")


def short_json(raw: Any) -> str:
    """The beginning of JSON text, in one line."""
    text = " ".join(bytes(raw).decode("utf-8", "replace").split())
    return text if len(text) <= MAX_SHORT_JSON else f"{text[:MAX_SHORT_JSON]} …"


def pretty_json(raw: Any) -> tuple[str, int]:
    """JSON text with line breaks, and how many characters of it were left out."""
    text = bytes(raw).decode("utf-8", "replace")
    with contextlib.suppress(msgspec.DecodeError, RecursionError):  # nested too deeply: it is shown as it came
        text = msgspec.json.format(text)
    return text[:MAX_JSON], max(len(text) - MAX_JSON, 0)
