"""Load the configuration from config.toml, the environment and flags.

Flags take precedence over the environment, and the environment over the file.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin

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
    show_duration,
    to_toml,
)
from jobd.config_checks import check, check_artifact_directory, is_host, own_directories, warnings
from jobd.credentials import MAKE_TOKEN, InvalidToken
from jobd.webhooks import config as webhook_config
from jobd.webhooks.config import BadWebhook, WebhookSetting

DEFAULT_PATH: Final = "/etc/jobd/config.toml"
_NOT_SETTINGS: Final = frozenset({"JOBD_CONFIG", "JOBD_SOCKET", "JOBD_URL", "JOBD_ADMIN_URL", "JOBD_WORKER_VERSION"})


def load(
    flags: Mapping[str, str], environ: Mapping[str, str], path: str | None = None, *, need_token: bool = True
) -> LoadedConfig:
    """Load the effective configuration. `flags` maps "section.key" to text; `path` is that of --config, "" for no file.

    `need_token` is false for commands that only work on files. Raises ConfigError.
    """
    file = _find_file(environ, path)
    in_file = {} if file is None else _read_file(file)
    webhooks = () if file is None else _webhooks(file, in_file.pop(WEBHOOKS, []))
    values, sources = _merge(in_file, file, environ, flags)
    config = _fill_in_paths(_convert(values, sources), environ)
    try:
        check(config)
        admin_tokens, worker_tokens, read_only_tokens = _tokens(config, environ)
        development = environ.get("ENVIRONMENT") == "development" and not admin_tokens
        if development and "store.path" not in sources:
            config = msgspec.structs.replace(config, store=msgspec.structs.replace(config.store, path=":memory:"))
            sources["store.path"] = "environment ENVIRONMENT"
        directories = own_directories(config, environ, file, webhooks)
        # Does not follow links: the file system behind them may hang, even during a reload.
        check_artifact_directory(config.artifacts.url, directories, os.path.abspath)
    except ConfigError as error:
        raise ConfigError(_with_sources(str(error), sources)) from None
    if not admin_tokens and need_token and not development:
        raise ConfigError(
            "no admin token: set ADMIN_TOKEN, ADMIN_TOKEN_FILE or [admin] token_file (a systemd credential named "
            f"admin_token works too). Create one with: {MAKE_TOKEN}"
        )
    return LoadedConfig(
        config=config,
        sources={key: sources.get(key, "default") for key in KEYS},
        admin_tokens=admin_tokens,
        worker_tokens=worker_tokens,
        path=None if file is None else str(file),
        read_only_tokens=read_only_tokens,
        development=development,
        warnings=warnings(config, sources, environ, file, webhooks),
        own_directories=directories,
        webhooks=webhooks,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Sources.


def _find_file(environ: Mapping[str, str], path: str | None) -> Path | None:
    if path == "":
        return None
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
        raise ConfigError(f"{'--set' if source == 'flag' else source}: unknown key {key}. {text}")
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
        found = ""
        if key != "journal.url":  # it has a password
            with contextlib.suppress(ValueError):  # a number of thousands of digits
                found = f", not {to_toml(values.get(section, {}).get(name))}"
        raise ConfigError(
            f"{sources.get(key, 'configuration')}: {key}: {_expected(error, KEYS.get(key))}{found}"
        ) from None


def _fill_in_paths(config: Config, environ: Mapping[str, str]) -> Config:
    """Fill in the default paths: in the directories of systemd, of root, or of the user."""
    worker, store = config.worker, config.store
    if not worker.socket:
        worker = msgspec.structs.replace(worker, socket=str(runtime_directory(environ) / "worker.sock"))
    if not store.path:
        store = msgspec.structs.replace(store, path=str(state_directory(environ) / "jobd.db"))
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


def _with_sources(message: str, sources: Mapping[str, str]) -> str:
    """Prefix `message` with the sources of the keys that it names. Defaults have no source."""
    named_sources = dict.fromkeys(
        source for key, source in sources.items() if re.search(rf"\b{re.escape(key)}\b", message)
    )
    return f"{', '.join(named_sources)}: {message}" if named_sources else message
