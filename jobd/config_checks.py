"""Check a configuration: reject what cannot work, and warn about what is exposed or probably unintended."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from jobd.config import KEYS, Config, ConfigError, parse_listen, show_duration, to_toml, value_of
from jobd.journal import url as journal_url
from jobd.model.job import is_job_id
from jobd.model.storage import IN_MEMORY
from jobd.webhooks.config import WebhookSetting

MIN_OUTPUT_BYTES: Final = 1 << 20
_LABEL: Final = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST_NAME: Final = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?", re.IGNORECASE | re.ASCII)
_LONGEST_HOST: Final = 253  # characters
_HOST_EXPECTED: Final = (
    'expected a host name, an IPv4 address or an IPv6 address in brackets, such as "jobs.example.com", without scheme, '
    "port and path"
)


def check(config: Config) -> None:
    """Reject values and combinations that cannot work."""
    for key in KEYS:
        value = value_of(config, key)
        text = value if isinstance(value, str) else "".join(value) if isinstance(value, list) else ""
        if "\0" in text:
            raise ConfigError(f"{key}: the value contains a NUL character. Remove it")
        if text.encode(errors="replace") != text.encode(errors="surrogateescape"):
            raise ConfigError(f"{key}: expected UTF-8, not {journal_url.redacted(text)!r}")
    for name, section in (("worker", config.worker), ("admin", config.admin)):
        if bool(section.tls_cert) != bool(section.tls_key):
            raise ConfigError(f"{name}.tls_cert and {name}.tls_key belong together: set both or neither")
    if isinstance(parse_listen(config.admin.listen, "admin.listen"), str) and config.admin.tls_cert:
        raise ConfigError("admin.tls_cert: a Unix socket has no TLS. Listen on HOST:PORT, or remove the certificate")
    if config.worker.listen:
        if config.worker.listen.startswith("unix:"):
            raise ConfigError("worker.listen: expected HOST:PORT. The path of the Unix socket is worker.socket")
        parse_listen(config.worker.listen, "worker.listen")
        if not config.worker.token_file:
            raise ConfigError("worker.listen requires worker.token_file: a TCP port is never open without a token")
    elif config.worker.tls_cert:
        raise ConfigError("worker.tls_cert requires worker.listen: a Unix socket has no TLS")
    if config.limits.payload > config.limits.body:
        raise ConfigError("limits.payload must not be larger than limits.body")
    if 0 < config.limits.output_bytes < MIN_OUTPUT_BYTES:
        raise ConfigError(f"limits.output_bytes must be at least {MIN_OUTPUT_BYTES}, or 0 to keep no output")
    if config.limits.inflight_bytes < 2 * config.limits.body:
        raise ConfigError("limits.inflight_bytes must be at least twice limits.body, or large requests are rejected")
    for host in config.admin.hosts:
        if not is_host(host):
            raise ConfigError(f"admin.hosts: {host!r}: {_HOST_EXPECTED}")
    for name in config.late.queues:
        if not is_job_id(name):  # queue names follow the rules of job ids
            raise ConfigError(f"late.queues: {name!r}: a queue has 1 to 200 characters of A-Z a-z 0-9 . _ : -")
    if config.journal.url:
        _check_journal(config)
    if config.artifacts.url:
        _check_artifacts(config.artifacts.url)


def _check_journal(config: Config) -> None:
    """Reject a malformed URL, and one that requires a package that is not installed."""
    try:
        journal_url.parse(config.journal.url)
    except ValueError as error:
        raise ConfigError(f"journal.url: {error}") from None
    if find_spec("asyncpg") is None:
        raise ConfigError(
            "journal.url needs an extra that is not installed: pip install ./.ci/client '.[postgres]' in a clone"
        )
    if not config.node.name.isprintable():
        raise ConfigError("node.name: expected printable characters")
    if config.node.advertise:
        _check_advertised(config.node.advertise)


def _check_advertised(url: str) -> None:
    expected = f'node.advertise: "{url}": expected http://HOST:PORT or https://HOST:PORT, without a path'
    try:
        parts = urlsplit(url)
        is_right = parts.scheme in ("http", "https") and parts.port != 0
    except ValueError:
        raise ConfigError(expected) from None
    host = re.sub(r":[0-9]*$", "", parts.netloc)
    if not is_right or parts.path.strip("/") or parts.query or parts.fragment or not is_host(host):
        raise ConfigError(expected)


def is_host(text: str) -> bool:
    """Return whether `text` can be a host in a Host header: a name, or the address of one machine. No port."""
    is_bracketed = text.startswith("[") and text.endswith("]")
    host = text[1:-1] if is_bracketed else text
    if ":" in host:
        return _is_address(host)
    if is_bracketed or len(host.removesuffix(".")) > _LONGEST_HOST or not _HOST_NAME.fullmatch(host):
        return False
    ends_in_number = host.removesuffix(".").rpartition(".")[2].isdigit()  # browsers parse it as an address
    return _is_address(host) if ends_in_number else True


def _is_address(text: str) -> bool:
    """Return whether `text` is an IP address without a zone, and not the unspecified one."""
    try:
        return "%" not in text and not ipaddress.ip_address(text).is_unspecified
    except ValueError:
        return False


def _check_artifacts(url: str) -> None:
    """Reject a malformed URL, and one that requires a package that is not installed."""
    expected = "expected file:///DIRECTORY or s3://BUCKET/PREFIX"
    if "@" in url.partition("://")[2].partition("/")[0]:
        raise ConfigError(f"artifacts.url: {expected}, without a key: set AWS_ACCESS_KEY_ID and related variables")
    if re.fullmatch(r"file:///[^?#]+", url) and "\0" not in unquote(url):
        return
    bucket = re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^?#]*)?", url)
    prefix = unquote(bucket[1] or "").strip("/") if bucket is not None else ""
    if bucket is None or (prefix and not {"", ".", ".."}.isdisjoint(prefix.split("/"))):
        raise ConfigError(f'artifacts.url: "{url}": {expected}')
    if find_spec("obstore") is None:
        raise ConfigError(
            "artifacts.url: s3:// needs an extra that is not installed: pip install ./.ci/client '.[s3]' in a clone"
        )


def check_artifact_directory(
    url: str, own_directories: tuple[str, ...], resolve: Callable[[str], str] = os.path.realpath
) -> None:
    """Raise ConfigError if a file of the daemon is in the artifact directory, where workers choose what is deleted.

    `resolve` makes a path absolute. The default follows links, which may hang on a network file system.
    """
    if not url.startswith("file:"):
        return
    directory = resolve(unquote(url.removeprefix("file://")))
    for own_directory in own_directories:
        if os.path.commonpath((directory, own_directory)) == directory:
            reason = f"the daemon's own files are in {own_directory}, and workers choose what is deleted in {directory}"
            raise ConfigError(f'artifacts.url: "{url}": {reason}. Use a separate directory for artifacts')


def own_directories(
    config: Config, environ: Mapping[str, str], file: Path | None, webhooks: Iterable[WebhookSetting]
) -> tuple[str, ...]:
    """Return the directories of the daemon's own files, as configured and with links resolved."""
    listens = (parse_listen(address, "listen") for address in (config.worker.listen, config.admin.listen) if address)
    files = [
        "" if config.store.path == ":memory:" else config.store.path,
        config.worker.socket,
        *(address for address in listens if isinstance(address, str)),
        "" if file is None else str(file),
        config.worker.tls_cert,
        config.admin.tls_cert,
        *_secret_files(config, environ, webhooks),
    ]
    paths = [path for name in files if name for path in (os.path.abspath(name), os.path.realpath(name))]
    directories = [*map(os.path.dirname, paths), environ.get("CREDENTIALS_DIRECTORY", "")]
    return tuple(dict.fromkeys(path for name in directories if name for path in (name, os.path.realpath(name))))


def _secret_files(config: Config, environ: Mapping[str, str], webhooks: Iterable[WebhookSetting]) -> list[str]:
    """Return the configured files with tokens, keys and secrets, without systemd's credentials."""
    files = [
        *(path for section in (config.worker, config.admin) for path in (section.token_file, section.tls_key)),
        config.admin.readonly_token_file,
        *(setting.section.secret_file for setting in webhooks),
        *(environ.get(name, "") for name in ("ADMIN_TOKEN_FILE", "ADMIN_READONLY_TOKEN_FILE")),
    ]
    return list(dict.fromkeys(filter(None, files)))


# ---------------------------------------------------------------------------------------------------------------------
# Warnings.


def warnings(
    config: Config,
    sources: Mapping[str, str],
    environ: Mapping[str, str],
    file: Path | None,
    webhooks: tuple[WebhookSetting, ...],
) -> tuple[str, ...]:
    """Return the warnings about a valid configuration: exposed secrets, and settings that are probably unintended."""
    return (
        *_unencrypted_listeners(config),
        *_exposed_secrets(file, _secret_files(config, environ, webhooks), webhooks),
        *_exposed_password(file, config, sources),
        *_doubtful_settings(config, sources),
    )


def _unencrypted_listeners(config: Config) -> Iterator[str]:
    """Warn about TCP addresses that other machines can reach without TLS."""
    for name, section in (("admin", config.admin), ("worker", config.worker)):
        address = parse_listen(section.listen, f"{name}.listen") if section.listen and not section.tls_cert else ""
        if not isinstance(address, str):
            yield from unencrypted(name, address[0], section.listen)


def unencrypted(section: str, host: str, address: str) -> tuple[str, ...]:
    """Return the warning about the address of a listener without TLS, unless `host` is of this machine only."""
    warning = f"[{section}] listens on {address} WITHOUT TLS: tokens are sent unencrypted. Set tls_cert."
    return () if _is_loopback(host) else (warning,)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name may resolve to any address


def _exposed_secrets(path: Path | None, secret_files: list[str], webhooks: tuple[WebhookSetting, ...]) -> Iterator[str]:
    for each in secret_files:
        if _is_world_readable(each):
            yield f"{each} contains a secret and is readable by EVERY user: chmod 640"
    if path is not None and any(each.is_inline for each in webhooks) and _is_world_readable(path):
        yield f"{path} contains secrets of webhooks and is readable by EVERY user: chmod 640, or use secret_file."


def _exposed_password(path: Path | None, config: Config, sources: Mapping[str, str]) -> Iterator[str]:
    """Warn about a password of PostgreSQL that every user can read."""
    source = sources.get("journal.url") if journal_url.has_password(config.journal.url) else None
    if source == "flag":
        yield "the password in journal.url is visible in the list of processes: use PGPASSFILE."
    elif source == f"file {path}" and path is not None and _is_world_readable(path):
        reader = "is readable by EVERY user: chmod 640, or use PGPASSFILE."
        yield f"{path} contains the password of journal.url and {reader}"


def _is_world_readable(path: str | Path) -> bool:
    """Return whether every user can read `path`. False if it is missing, which is reported when it is read."""
    try:
        return bool(os.stat(path).st_mode & 0o004)
    except OSError:
        return False


def _doubtful_settings(config: Config, sources: Mapping[str, str]) -> Iterator[str]:
    def shown(key: str) -> str:
        return f"{key} = {to_toml(value_of(config, key))} ({sources.get(key, 'default')})"

    if config.cleanup.interval < config.cleanup.min_interval:
        yield (
            f"{shown('cleanup.interval')} is below {shown('cleanup.min_interval')}, which takes precedence: cleanup "
            f"runs every {show_duration(config.cleanup.min_interval)}. Lower cleanup.min_interval too."
        )
    if 0 < config.locks.progress_timeout < config.locks.ttl:
        yield (
            f"{shown('locks.ttl')} is above {shown('locks.progress_timeout')}, which takes precedence: locks are "
            "shortened to it, unless their job has a progress_timeout_ms. Raise locks.progress_timeout too."
        )
    if config.journal.url and not config.node.advertise:
        yield (
            "node.advertise is empty: clients of another node are not sent to this one while it leads. Set it to the "
            "URL of the worker API, such as http://a.example:8771."
        )
    if config.store.path == ":memory:":
        yield f"{shown('store.path')}: all jobs are {IN_MEMORY}. Set store.path to a file to keep them."
