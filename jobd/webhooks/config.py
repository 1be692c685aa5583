"""Read `[[webhooks]]` of the configuration into endpoints. Settings for display contain no secret."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct, field

from jobd.model.job import DAY_MS, MINUTE_MS, SECOND_MS, is_job_id
from jobd.model.webhooks import TYPES, WebhookEndpoint, WebhookName, types_matching
from jobd.webhooks.message import BadSecret, decode_secret
from jobd.webhooks.url_policy import blocked_reason, public_url

MAX_WEBHOOKS: Final = 20
MAX_SECRETS: Final = 3
MAKE_SECRET: Final = (
    """python3 -c 'import base64, secrets; print("whsec_" + base64.b64encode(secrets.token_bytes(32)).decode())'"""
)
_HOST: Final = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+(%[a-z0-9._-]+)?")  # a name, or an address with its zone
BOUNDS: Final = {"timeout": (100, MINUTE_MS), "dead_letter_after": (MINUTE_MS, 30 * DAY_MS)}


class BadWebhook(Exception):
    """A webhook is invalid. The message is one line without a secret."""


class WebhookSection(Struct, frozen=True, forbid_unknown_fields=True):
    """A `[[webhooks]]` table as written. Durations are text, such as "10s"."""

    name: WebhookName
    """Name of the webhook. Its position is stored under this name, and survives a restart and a change of `url`."""
    url: str
    """Receiver: `https://HOST/PATH`, or `http://` if `allow_private` is set."""
    events: list[str] = field(default_factory=lambda: ["*"])
    """Event types or patterns: `job.completed`, `job.*`, `queue.*`, `workers.*`, `problem.*`, `*`.

    `job.progress` and `job.extended` must be named; no pattern includes them.
    """
    queues: list[str] = []
    """Send events of jobs in these queues only. Empty: all queues.

    Problems are always sent.
    """
    secret: str | list[str] = ""
    """Signing secret, `whsec_…`. During a rotation, a list of up to three, newest first.

    The part after `whsec_` is 24 to 64 bytes in base64. Set `secret` or `secret_file`, not both.
    """
    secret_file: str = ""
    """File with the secrets, one per line, instead of `secret`."""
    allow_private: bool = False
    """Also allow addresses of this machine and of private networks, and `http://`."""
    timeout: str = "10s"
    """Time limit of one delivery attempt, 100 ms to 1 min."""
    dead_letter_after: str = "3d"
    """Age at which an undelivered message is dead-lettered if 8 attempts have failed; 1 min to 30 d.

    If the receiver has accepted nothing for this long, failed attempts to deliver other messages count too.
    """


class WebhookSetting(Struct, frozen=True):
    """A webhook in effect. `section` contains neither the secret nor the secret part of the URL."""

    section: WebhookSection
    endpoint: WebhookEndpoint
    is_inline: bool  # the secret is in the configuration file itself


def read(tables: Any, duration: Callable[[str], int]) -> tuple[WebhookSetting, ...]:
    """Read `[[webhooks]]`; `duration` parses a duration into ms. Raises BadWebhook."""
    if not isinstance(tables, list):
        raise BadWebhook("webhooks must be a list of tables: write [[webhooks]], in two brackets, before each table")
    if len(tables) > MAX_WEBHOOKS:
        raise BadWebhook(f"there are {len(tables)} [[webhooks]]; the maximum is {MAX_WEBHOOKS}")
    settings: list[WebhookSetting] = []
    for number, table in enumerate(tables, 1):
        try:
            setting = _setting(table, duration)
            if any(setting.section.name == each.section.name for each in settings):
                raise BadWebhook("name: already used by another webhook. The position in the event log is kept by name")
        except BadWebhook as bad:
            name = table.get("name") if isinstance(table, dict) else None
            named = f" ({name})" if isinstance(name, str) and is_job_id(name) else ""
            raise BadWebhook(f"webhooks {number}{named}: {bad}") from None
        settings.append(setting)
    return tuple(settings)


def _setting(table: Any, duration: Callable[[str], int]) -> WebhookSetting:
    try:
        section = msgspec.convert(table, WebhookSection)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$.")
        where = where.rstrip("`").partition("[")[0]
        raise BadWebhook(f"{where}: {message}" if where else message) from None
    if section.name in (".", ".."):
        raise BadWebhook(f"name: {section.name!r} is not allowed: names are parts of URL paths")
    times = {key: _bounded(key, getattr(section, key), duration) for key in BOUNDS}
    _check_url(section)
    events: frozenset[str] = frozenset()
    for pattern in section.events:
        if not (found := types_matching(pattern)):
            known = ", ".join(("*", "job.*", "queue.*", "workers.*", "problem.*", *TYPES))
            raise BadWebhook(f"events: {pattern!r} is not an event type. Known: {known}")
        events |= found
    if not events:
        raise BadWebhook('events: name at least one type, such as "job.completed", or omit the key for all')
    if wrong := [name for name in section.queues if not is_job_id(name)]:
        raise BadWebhook(f"queues: {wrong[0]!r}: a queue has 1 to 200 characters of A-Z a-z 0-9 . _ : -")
    endpoint = WebhookEndpoint(
        name=section.name,
        url=section.url,
        secrets=_keys(section),
        events=events,
        queues=frozenset(section.queues),
        allow_private=section.allow_private,
        timeout_ms=times["timeout"],
        dead_letter_after_ms=times["dead_letter_after"],
    )
    shown = msgspec.structs.replace(section, secret="", url=public_url(section.url))
    return WebhookSetting(shown, endpoint, bool(section.secret))


def _bounded(key: str, text: str, duration: Callable[[str], int]) -> int:
    min_ms, max_ms = BOUNDS[key]
    try:
        ms = duration(text)
    except ValueError as error:
        raise BadWebhook(f"{key}: {error}") from None
    if not min_ms <= ms <= max_ms:
        raise BadWebhook(f"{key}: {text} is outside {min_ms / SECOND_MS:g} s to {max_ms / SECOND_MS:g} s")
    return ms


def _check_url(section: WebhookSection) -> None:
    """Check that the URL is valid and allowed. Addresses of host names are checked at each attempt."""
    expected = "url: expected https://HOST/PATH"
    if not section.url.isascii() or not section.url.isprintable() or " " in section.url:
        raise BadWebhook(f"{expected} in ASCII, without spaces")
    try:
        parts = urlsplit(section.url)
        port = parts.port
    except ValueError:
        raise BadWebhook(f"{expected}, with a valid port") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or parts.fragment:
        raise BadWebhook(expected)
    if not _HOST.fullmatch(parts.hostname):
        raise BadWebhook(f"{expected}: a host name has letters, digits and . _ - only")
    if "@" in parts.netloc:
        raise BadWebhook(f"{expected}, without user and password: receivers verify the signature instead")
    if section.allow_private:
        return
    if parts.scheme == "http":
        raise BadWebhook(
            "url: http:// is not encrypted. Use https://, or set allow_private for a receiver inside your network"
        )
    is_numeric = ":" in parts.hostname or parts.hostname.replace(".", "").isdigit()
    if is_numeric and (why := blocked_reason(parts.hostname)) is not None:
        raise BadWebhook(f"url: {parts.hostname} is {why}; set allow_private if this is intended")


def _keys(section: WebhookSection) -> tuple[bytes, ...]:
    if bool(section.secret) == bool(section.secret_file):
        raise BadWebhook(f"set either secret or secret_file. Create a secret with: {MAKE_SECRET}")
    where, secrets = "secret", [section.secret] if isinstance(section.secret, str) else section.secret
    if section.secret_file:
        where, secrets = f"secret_file: {section.secret_file}", _lines(section.secret_file)
    if not 1 <= len(secrets) <= MAX_SECRETS:
        raise BadWebhook(f"{where}: expected one secret, or up to {MAX_SECRETS} during a rotation, newest first")
    try:
        return tuple(decode_secret(secret) for secret in secrets)
    except BadSecret as bad:
        raise BadWebhook(f"{where}: {bad}. Create one with: {MAKE_SECRET}") from None


def _lines(path: str) -> list[str]:
    try:
        return [line.strip() for line in Path(path).read_text("ascii").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise BadWebhook(f"secret_file: {path}: secrets must be ASCII, one per line") from None
    except ValueError:
        raise BadWebhook("secret_file: the value contains a NUL character. Remove it") from None
    except OSError as error:
        raise BadWebhook(f"secret_file: {path}: cannot be read: {error.strerror}") from None
