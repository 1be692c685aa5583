"""Load the configuration from config.toml, the environment and flags, and check it.

Flags take precedence over the environment, and the environment over the file.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import stat
import tomllib
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin
from urllib.parse import unquote, urlsplit

import msgspec

from jobd import credentials
from jobd.config import (
    BOUNDS,
    DURATION_BOUNDS,
    KEYS,
    WEBHOOKS,
    Config,
    ConfigError,
    Duration,
    LoadedConfig,
    NodeSection,
    parse_duration,
    parse_listen,
    show_duration,
    to_toml,
    value_of,
)
from jobd.credentials import MAKE_TOKEN, InvalidToken
from jobd.journal import url as journal_url
from jobd.model.job import is_job_id
from jobd.webhooks import config as webhook_config
from jobd.webhooks.config import BadWebhook, WebhookSetting

DEFAULT_PATH: Final = "/etc/jobd/config.toml"
_NOT_SETTINGS: Final = frozenset({"JOBD_CONFIG", "JOBD_SOCKET", "JOBD_URL", "JOBD_ADMIN_URL"})

_LABEL: Final = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST_NAME: Final = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?", re.IGNORECASE | re.ASCII)
_LONGEST_HOST: Final = 253  # characters
_HOST_EXPECTED: Final = (
    'expected a host name, an IPv4 address or an IPv6 address in brackets, such as "jobs.example.com", without scheme, '
    "port and path"
)


def load(
    flags: Mapping[str, str], environ: Mapping[str, str], path: str | None = None, *, need_token: bool = True
) -> LoadedConfig:
    """Load the effective configuration. `flags` maps "section.key" to text; `path` is that of --config.

    `need_token` is false for commands that only work on files. Raises ConfigError.
    """
    file = _find_file(environ, path)
    in_file = {} if file is None else _read_file(file)
    webhooks = () if file is None else _webhooks(file, in_file.pop(WEBHOOKS, []))
    values, sources = _merge(in_file, file, environ, flags)
    config = _fill_in_paths(_convert(values, sources), environ, sources)
    try:
        _check(config)
        own_directories = _own_directories(config, environ, file, webhooks)
        # Does not follow links: the file system behind them may hang, even during a reload.
        check_artifact_directory(config.artifacts.url, own_directories, os.path.abspath)
    except ConfigError as error:
        raise ConfigError(_with_sources(str(error), sources)) from None
    development = _is_development(environ)
    admin_tokens, worker_tokens, read_only_tokens = _tokens(config, environ)
    if not admin_tokens and need_token and not development:
        raise ConfigError(
            "no admin token: set ADMIN_TOKEN, ADMIN_TOKEN_FILE or [admin] token_file (a systemd credential named "
            f"admin_token works too). Create one with: {MAKE_TOKEN}"
        )
    warnings = (
        *_unencrypted_listeners(config),
        *_exposed_secrets(file, _secret_files(config, environ, webhooks), webhooks),
        *_exposed_password(file, config, sources),
        *_doubtful_settings(config, sources, development),
    )
    return LoadedConfig(
        config=config,
        sources={key: sources.get(key, "default") for key in KEYS},
        admin_tokens=admin_tokens,
        worker_tokens=worker_tokens,
        path=None if file is None else str(file),
        read_only_tokens=read_only_tokens,
        development=development,
        warnings=warnings,
        own_directories=own_directories,
        webhooks=webhooks,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Sources.


def _find_file(environ: Mapping[str, str], path: str | None) -> Path | None:
    chosen = path or environ.get("JOBD_CONFIG")
    if chosen:
        if not _is_file(chosen):
            raise ConfigError(
                f"file {chosen}: no such file. Give the path of a config.toml with --config or JOBD_CONFIG"
            )
        return Path(chosen)
    return Path(DEFAULT_PATH) if _is_file(DEFAULT_PATH) else None


def _is_file(path: str) -> bool:
    """Return whether there is such a file. Raises ConfigError if that is unknown, as in a directory without access."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL character
        return False
    except OSError as error:
        raise ConfigError(f"file {path}: cannot be read: {error.strerror}") from None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            tables = tomllib.load(file)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"file {path}: not valid TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"file {path}: not valid TOML: it is nested too deeply") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a number of thousands of digits
        raise ConfigError(f"file {path}: cannot be read: {error}") from None
    values = {}
    for section, table in tables.items():
        if section == WEBHOOKS:
            values[section] = table
            continue
        if section not in Config.__struct_fields__:
            known = ", ".join((*Config.__struct_fields__, WEBHOOKS))
            raise ConfigError(f"file {path}: unknown section [{section}]. Known: {known}{_rename_hint(section)}")
        if not isinstance(table, dict):
            raise ConfigError(f"file {path}: {section} must be a section: write [{section}] on a separate line")
        for name, value in table.items():
            values[f"{section}.{name}"] = value
    return values


def _merge(
    in_file: Mapping[str, Any], file: Path | None, environ: Mapping[str, str], flags: Mapping[str, str]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return the value of each key that is set, by section, and the source of each key."""
    values: dict[str, dict[str, Any]] = {}
    sources: dict[str, str] = {}
    for key, value in in_file.items():
        _set(values, sources, key, value, f"file {file}")
    for name, key in _environment(environ).items():
        _set(values, sources, key, environ[name], f"environment {name}")
    for key, text in flags.items():
        _set(values, sources, key, text, "flag")
    return values, sources


def _rename_hint(section: str) -> str:
    """Return a hint if `section` is the former name of a section, else an empty string."""
    return ". [artefacts] was renamed to [artifacts]" if section == "artefacts" else ""


def _webhooks(path: Path, tables: Any) -> tuple[WebhookSetting, ...]:
    try:
        return webhook_config.read(tables, parse_duration)
    except BadWebhook as bad:
        raise ConfigError(f"file {path}: {bad}") from None


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables JOBD_<SECTION>_<KEY> that are set, with the key that each one sets."""
    keys = {}
    for name in environ:
        if not name.startswith("JOBD_") or name in _NOT_SETTINGS or name.startswith("JOBD_JOB_"):
            continue
        section, _, key = name.removeprefix("JOBD_").lower().partition("_")
        if f"{section}.{key}" not in KEYS:
            hint = _rename_hint(section)
            raise ConfigError(
                f"environment {name}: no such key. Names are JOBD_<SECTION>_<KEY>, as in config.toml{hint}"
            )
        keys[name] = f"{section}.{key}"
    return keys


def _tokens(config: Config, environ: Mapping[str, str]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return the admin tokens, the worker tokens and the read-only tokens."""
    try:
        admin = credentials.admin_tokens(config.admin.token_file, environ)
        file = config.worker.token_file
        workers = credentials.read_tokens(file, "[worker] token_file") if file else ()
        return admin, workers, credentials.read_only_tokens(config.admin.readonly_token_file, environ, admin)
    except InvalidToken as error:
        raise ConfigError(str(error)) from None


# ---------------------------------------------------------------------------------------------------------------------
# Values.


def _set(values: dict[str, dict[str, Any]], sources: dict[str, str], key: str, value: Any, source: str) -> None:
    if key not in KEYS:
        section = key.partition(".")[0]
        known = ", ".join(name.partition(".")[2] for name in KEYS if name.startswith(f"{section}."))
        text = f"Known in [{section}]: {known}" if known else f"There is no section [{section}]{_rename_hint(section)}"
        raise ConfigError(f"{source}: unknown key {key}. {text}")
    hint = KEYS[key]
    try:
        if hint is Duration:
            value = _duration(key, value)
        elif not source.startswith("file"):
            value = _from_text(hint, value)
    except ValueError as error:
        raise ConfigError(f"{source}: {key}: {error}") from None
    section, _, name = key.partition(".")
    values.setdefault(section, {})[name] = value
    sources[key] = source


def _duration(key: str, value: Any) -> int:
    if not isinstance(value, str):
        raise ValueError(f'expected a duration in quotes, such as "15m", not {value!r}')
    ms = parse_duration(value)
    minimum, maximum = BOUNDS.get(key, DURATION_BOUNDS)
    if not minimum <= ms <= maximum:
        raise ValueError(f"{value} is outside {show_duration(minimum)} to {show_duration(maximum)}")
    return ms


def _from_text(hint: Any, text: str) -> Any:
    """Convert `text` to the type of a key. Lists and tables can be in TOML, as in the file."""
    if (hint == list[str] or get_origin(hint) is dict) and (parsed := _parse_toml(text)) is not None:
        return parsed
    if hint == list[str]:
        return [part.strip() for part in text.split(",") if part.strip()]
    if get_origin(hint) is dict:
        return dict(_pair(part) for part in text.split(",") if part.strip())
    if hint is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError(f"expected true or false, not {text!r}")
        return text.lower() in ("true", "1", "yes")
    try:
        return msgspec.convert(text, hint, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"{_expected(error, hint)}, not {text!r}") from None


def _parse_toml(text: str) -> list[Any] | dict[str, Any] | None:
    """Parse a list or table in TOML. Return None if `text` is neither, such as an IPv6 address in brackets."""
    try:
        values = tomllib.loads(f"it = {text}")
    except (ValueError, RecursionError):
        return None
    value = values.pop("it")
    return value if isinstance(value, list | dict) and not values else None


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign:
        raise ValueError(f"expected NAME=VALUE, several separated by commas, not {text.strip()!r}")
    return name.strip(), value.strip()


_TYPES: Final = {
    "int": "a whole number",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "a table",
}


def _expected(error: msgspec.ValidationError, hint: object) -> str:
    """Return which value a key of the type `hint` takes: one of a list of words, or what msgspec expected."""
    if get_origin(hint) is dict and "Expected `object`" not in str(error):
        hint = get_args(hint)[1]
    if get_origin(hint) is Literal:
        return f"expected one of {', '.join(map(str, get_args(hint)))}"
    text = str(error).partition(" - at `")[0].partition(", got `")[0]
    return re.sub(r"`(\w+)`", lambda found: _TYPES.get(found[1], found[1]), text.replace("Expected ", "expected ", 1))


def _convert(values: dict[str, dict[str, Any]], sources: Mapping[str, str]) -> Config:
    try:
        return msgspec.convert(values, Config, dec_hook=lambda hint, value: hint(value))
    except msgspec.ValidationError as error:
        key = str(error).partition(" - at `$.")[2].rstrip("`").partition("[")[0]
        section, _, name = key.partition(".")
        found = "" if key == "journal.url" else f", not {to_toml(values.get(section, {}).get(name))}"  # has a password
        raise ConfigError(
            f"{sources.get(key, 'configuration')}: {key}: {_expected(error, KEYS.get(key))}{found}"
        ) from None


def _fill_in_paths(config: Config, environ: Mapping[str, str], sources: dict[str, str]) -> Config:
    """Fill in the default paths: in the directories of systemd, of root, or of the user."""
    worker, store = config.worker, config.store
    if not worker.socket:
        worker = msgspec.structs.replace(worker, socket=str(runtime_directory(environ) / "worker.sock"))
    if not store.path:
        in_memory = _is_development(environ) and "store.path" not in sources
        path = ":memory:" if in_memory else str(state_directory(environ) / "jobd.db")
        store = msgspec.structs.replace(store, path=path)
    worker = msgspec.structs.replace(worker, socket=os.path.abspath(worker.socket))
    if store.path != ":memory:":
        store = msgspec.structs.replace(store, path=os.path.abspath(store.path))
    node = config.node if not config.journal.url else _fill_in_node(config)
    return msgspec.structs.replace(config, worker=worker, store=store, node=node)


def _fill_in_node(config: Config) -> NodeSection:
    """Fill in the name of the host, and the address of the worker API unless it is one of all interfaces."""
    node, listen = config.node, config.worker.listen
    if not node.name:
        node = msgspec.structs.replace(node, name=socket.gethostname())
    host = listen.rpartition(":")[0]
    if not node.advertise and is_host(host):
        node = msgspec.structs.replace(node, advertise=f"http{'s' if config.worker.tls_cert else ''}://{listen}")
    return node


def _is_development(environ: Mapping[str, str]) -> bool:
    return environ.get("ENVIRONMENT") == "development"


def runtime_directory(environ: Mapping[str, str]) -> Path:
    if environ.get("RUNTIME_DIRECTORY"):
        return Path(environ["RUNTIME_DIRECTORY"].partition(":")[0])
    if os.geteuid() == 0:
        return Path("/run/jobd")
    return Path(environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}") / "jobd"


def state_directory(environ: Mapping[str, str]) -> Path:
    if environ.get("STATE_DIRECTORY"):
        return Path(environ["STATE_DIRECTORY"].partition(":")[0])
    if os.geteuid() == 0:
        return Path("/var/lib/jobd")
    return Path(environ.get("XDG_STATE_HOME") or Path(environ.get("HOME", "/")) / ".local/state") / "jobd"


# ---------------------------------------------------------------------------------------------------------------------
# Checks.


def _with_sources(message: str, sources: Mapping[str, str]) -> str:
    """Prefix `message` with the sources of the keys that it names. Defaults have no source."""
    named_sources = dict.fromkeys(
        source for key, source in sources.items() if re.search(rf"\b{re.escape(key)}\b", message)
    )
    return f"{', '.join(named_sources)}: {message}" if named_sources else message


def _check(config: Config) -> None:
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
        raise ConfigError("journal.url needs an extra that is not installed: pip install '.[postgres]' in a clone")
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
        raise ConfigError("artifacts.url: s3:// needs an extra that is not installed: pip install '.[s3]' in a clone")


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


def _own_directories(
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


def _unencrypted_listeners(config: Config) -> tuple[str, ...]:
    """Warn about TCP addresses that other machines can reach without TLS."""
    warnings = []
    for name, section in (("admin", config.admin), ("worker", config.worker)):
        if not section.listen or section.tls_cert:
            continue
        address = parse_listen(section.listen, f"{name}.listen")
        if not isinstance(address, str) and not _is_loopback(address[0]):
            warnings.append(
                f"[{name}] listens on {section.listen} WITHOUT TLS: tokens are sent unencrypted. Set tls_cert."
            )
    return tuple(warnings)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name may resolve to any address


def _exposed_secrets(
    path: Path | None, secret_files: list[str], webhooks: tuple[WebhookSetting, ...]
) -> tuple[str, ...]:
    """Warn about files with secrets that every user can read."""
    warnings = [
        f"{each} contains a secret and is readable by EVERY user: chmod 640"
        for each in secret_files
        if _is_world_readable(each)
    ]
    if path is not None and any(each.is_inline for each in webhooks) and _is_world_readable(path):
        warnings.append(
            f"{path} contains secrets of webhooks and is readable by EVERY user: chmod 640, or use secret_file."
        )
    return tuple(warnings)


def _exposed_password(path: Path | None, config: Config, sources: Mapping[str, str]) -> tuple[str, ...]:
    """Warn about a password of PostgreSQL that every user can read."""
    if not journal_url.has_password(config.journal.url):
        return ()
    source = sources.get("journal.url")
    if source == "flag":
        return ("the password in journal.url is visible in the list of processes: use PGPASSFILE.",)
    if source == f"file {path}" and path is not None and _is_world_readable(path):
        return (
            f"{path} contains the password of journal.url and is readable by EVERY user: chmod 640, or use PGPASSFILE.",
        )
    return ()


def _is_world_readable(path: str | Path) -> bool:
    """Return whether every user can read `path`. False if it is missing, which is reported when it is read."""
    try:
        return bool(os.stat(path).st_mode & 0o004)
    except OSError:
        return False


def _doubtful_settings(config: Config, sources: Mapping[str, str], development: bool) -> tuple[str, ...]:
    """Warn about settings that are valid but probably unintended."""
    warnings = []

    def shown(key: str) -> str:
        return f"{key} = {to_toml(value_of(config, key))} ({sources.get(key, 'default')})"

    if config.cleanup.interval < config.cleanup.min_interval:
        warnings.append(
            f"{shown('cleanup.interval')} is below {shown('cleanup.min_interval')}, which takes precedence: cleanup "
            f"runs every {show_duration(config.cleanup.min_interval)}. Lower cleanup.min_interval too."
        )
    if 0 < config.locks.max_processing < config.locks.ttl:
        warnings.append(
            f"{shown('locks.ttl')} is above {shown('locks.max_processing')}, which takes precedence: locks are "
            "shortened to it, unless their job has a max_processing_ms. Raise locks.max_processing too."
        )
    if config.journal.url and not config.node.advertise:
        warnings.append(
            "node.advertise is empty: clients of another node are not sent to this one while it leads. Set it to the "
            "URL of the worker API, such as http://a.example:8771."
        )
    if config.store.path == ":memory:" and not development:
        warnings.append(
            f"{shown('store.path')}: all jobs are lost when the daemon exits. Name a file, or set "
            "ENVIRONMENT=development if that is intended."
        )
    return tuple(warnings)
