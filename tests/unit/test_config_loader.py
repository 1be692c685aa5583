"""Loading of the configuration: precedence of sources, tokens, paths, hosts, error messages, warnings."""

from __future__ import annotations

import json
import os
import re
import sys
import tomllib
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobd import config, config_checks, config_loader
from jobd.config import KEYS, Config, ConfigError, LoadedConfig, effective, reloaded
from jobd.config_checks import is_host
from jobd.config_loader import load
from jobd.http.auth import accepted_hosts, host_name
from jobd.model.job import MINUTE_MS
from tests import ROOT

TOKEN = "canary-admin-0123456789abcdef"
OTHER = "canary-other-0123456789abcdef"
SHIPPED = ROOT / "config.toml"

Write = Callable[..., str]


@pytest.fixture(autouse=True)
def no_system_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignore the configuration file of this machine."""
    monkeypatch.setattr(config_loader, "DEFAULT_PATH", str(tmp_path / "etc.toml"))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def file(text: str, name: str = "config.toml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o640)
        return str(path)

    return file


def loaded(path: str | None = None, flags: dict[str, str] | None = None, **environ: str) -> LoadedConfig:
    return load(flags or {}, {"ADMIN_TOKEN": TOKEN, **environ}, path)


def config_error(path: str | None = None, flags: dict[str, str] | None = None, **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(path, flags, **environ)
    assert "canary" not in str(caught.value)
    return str(caught.value)


# -- defaults and config.toml ------------------------------------------------------------------------------------------


def test_config_toml_uncommented_is_the_defaults(write: Write) -> None:
    text = re.sub(r"(?m)^#(\w+ = )", r"\1", SHIPPED.read_text(encoding="utf-8"))
    assert len(tomllib.loads(text)) == len(Config.__struct_fields__)
    assert loaded(write(text)).config == loaded().config


def test_without_any_setting_all_values_are_defaults() -> None:
    found = loaded()
    assert set(found.sources) == set(KEYS)
    assert set(found.sources.values()) == {"default"}
    assert found.path is None
    assert found.warnings == ()


# -- sources -----------------------------------------------------------------------------------------------------------


def test_flags_take_precedence_over_environment_over_file(write: Write) -> None:
    path = write('[locks]\nttl = "1m"\nprogress_timeout = "2m"\n[stall]\nafter = "3m"\n')
    found = loaded(path, {"locks.ttl": "5m"}, JOBD_LOCKS_TTL="4m", JOBD_LOCKS_PROGRESS_TIMEOUT="6m")
    assert (found.config.locks.ttl, found.config.locks.progress_timeout) == (5 * MINUTE_MS, 6 * MINUTE_MS)
    assert found.config.stall.after == 3 * MINUTE_MS
    assert found.sources["locks.ttl"] == "flag"
    assert found.sources["locks.progress_timeout"] == "environment JOBD_LOCKS_PROGRESS_TIMEOUT"
    assert found.sources["stall.after"] == f"file {path}"
    assert found.sources["log.level"] == "default"
    assert found.path == path


def test_the_configuration_file_is_found(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    system, named, given_ = (write(f"[stall]\nmax_stalls = {count}\n", f"{count}.toml") for count in (1, 2, 4))
    assert loaded().config.stall.max_stalls == 3
    monkeypatch.setattr(config_loader, "DEFAULT_PATH", system)
    assert loaded().config.stall.max_stalls == 1
    assert loaded(JOBD_CONFIG=named).config.stall.max_stalls == 2
    assert loaded(given_, JOBD_CONFIG=named).config.stall.max_stalls == 4


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    missing = str(tmp_path / "gone.toml")
    assert missing in config_error(missing)
    assert missing in config_error(JOBD_CONFIG=missing)


def test_the_environment_is_converted_by_type() -> None:
    found = loaded(
        JOBD_ADMIN_HOSTS="jobs.example, other.example",
        JOBD_VALIDATION_REQUIRE_DOWNLOAD_URL="true",
        JOBD_LIMITS_LIVE_JOBS="7",
        JOBD_STORE_SYNCHRONOUS="extra",
        JOBD_CLEANUP_RECOVER_EVERY="0",
        JOBD_LATE_RESULTS="drop",
        JOBD_LATE_QUEUES="video=adopt_if_unclaimed, mail = keep",
    ).config
    assert found.admin.hosts == ["jobs.example", "other.example"]
    assert found.validation.require_download_url is True
    assert found.limits.live_jobs == 7
    assert found.store.synchronous == "extra"
    assert found.cleanup.recover_every == 0
    policy = found.policy()
    assert [policy.late_policy(queue) for queue in ("video", "mail", "x")] == ["adopt_if_unclaimed", "keep", "drop"]


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", []),
        ("[]", []),
        ("a,, b ,", ["a", "b"]),
        ('["a", "b"]', ["a", "b"]),
        ("['a',\n 'b']", ["a", "b"]),
        ("[fe80::1], a", ["[fe80::1]", "a"]),
        ("[::1]", ["[::1]"]),
    ],
)
def test_a_list_is_written_with_commas_or_as_in_the_file(text: str, hosts: list[str]) -> None:
    assert loaded(JOBD_ADMIN_HOSTS=text).config.admin.hosts == hosts
    assert loaded(flags={"admin.hosts": text}).config.admin.hosts == hosts


def test_a_table_is_written_in_pairs_or_as_in_the_file() -> None:
    for text in ("video=drop, a.b = keep", '{video = "drop", "a.b" = "keep"}'):
        assert loaded(JOBD_LATE_QUEUES=text).config.late.queues == {"video": "drop", "a.b": "keep"}


def test_variables_of_workers_and_clients_are_ignored() -> None:
    names = ("JOB_ID", "JOB_FENCING_TOKEN", "SOCKET", "URL", "ADMIN_URL", "WORKER_VERSION")
    assert loaded(None, None, **{f"JOBD_{name}": "whatever" for name in names}) == loaded()


@pytest.mark.parametrize(
    ("user", "environ", "socket", "store"),
    [
        (0, {}, "/run/jobd/worker.sock", "/var/lib/jobd/jobd.db"),
        (0, {"RUNTIME_DIRECTORY": "/run/a", "STATE_DIRECTORY": "/b"}, "/run/a/worker.sock", "/b/jobd.db"),
        (7, {"RUNTIME_DIRECTORY": "/run/a:/run/c", "STATE_DIRECTORY": "/b:/x"}, "/run/a/worker.sock", "/b/jobd.db"),
        (7, {"XDG_RUNTIME_DIR": "/r/7", "XDG_STATE_HOME": "/u/s"}, "/r/7/jobd/worker.sock", "/u/s/jobd/jobd.db"),
        (7, {"HOME": "/home/u"}, "/run/user/7/jobd/worker.sock", "/home/u/.local/state/jobd/jobd.db"),
    ],
)
def test_default_paths_are_those_of_systemd_of_root_or_of_the_user(
    monkeypatch: pytest.MonkeyPatch, user: int, environ: dict[str, str], socket: str, store: str
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: user)
    found = loaded(None, None, **environ).config
    assert (found.worker.socket, found.store.path) == (socket, store)


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_the_admin_token_has_several_sources(write: Write, tmp_path: Path) -> None:
    one, two, three = (write(f"canary-{name}-0123456789abcdef\n", name) for name in ("file", "toml", "admin_token"))
    path = write(f'[admin]\ntoken_file = "{two}"\n')
    environ = {"CREDENTIALS_DIRECTORY": str(Path(three).parent), "ADMIN_TOKEN_FILE": one, "ADMIN_TOKEN": TOKEN}
    given_ = []
    for name in ("ADMIN_TOKEN", "ADMIN_TOKEN_FILE", "", "CREDENTIALS_DIRECTORY"):
        given_.append(load({}, environ, path if name != "CREDENTIALS_DIRECTORY" else None).admin_tokens)
        environ.pop(name, None)
    expected = [TOKEN, "canary-file-0123456789abcdef", "canary-toml-0123456789abcdef"]
    assert given_ == [(token,) for token in [*expected, "canary-admin_token-0123456789abcdef"]]


def test_the_read_only_token_has_several_sources(write: Write, tmp_path: Path) -> None:
    one, two, _ = (
        write(f"canary-{name}-0123456789abcdef\n", name) for name in ("file", "toml", "admin_readonly_token")
    )
    path = write(f'[admin]\nreadonly_token_file = "{two}"\n')
    environ = {"ADMIN_TOKEN": TOKEN, "ADMIN_READONLY_TOKEN_FILE": one, "CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert load({}, environ, path).read_only_tokens == ("canary-file-0123456789abcdef",)
    del environ["ADMIN_READONLY_TOKEN_FILE"]
    found = load({}, environ, path)
    assert found.read_only_tokens == ("canary-toml-0123456789abcdef",)
    assert "# read-only tokens: 1" in effective(found)
    assert load({}, environ).read_only_tokens == ("canary-admin_readonly_token-0123456789abcdef",)
    assert loaded().read_only_tokens == ()


def test_the_read_only_token_must_differ_from_the_admin_token(write: Write) -> None:
    path = write(TOKEN, "readers")
    message = config_error(ADMIN_TOKEN=TOKEN, ADMIN_READONLY_TOKEN_FILE=path)
    assert "it contains the admin token" in message
    assert TOKEN not in message


def test_two_tokens_are_valid_during_a_rotation(write: Write) -> None:
    path = write(f"{TOKEN}\n\n  {OTHER}  \n", "tokens")
    assert load({}, {"ADMIN_TOKEN_FILE": path}).admin_tokens == (TOKEN, OTHER)
    with pytest.raises(ConfigError, match="expected one token, or two"):
        load({}, {"ADMIN_TOKEN_FILE": write(f"{TOKEN}\n" * 3, "three")})
    with pytest.raises(ConfigError, match="expected one token"):
        load({}, {"ADMIN_TOKEN_FILE": write("\n", "none")})


@pytest.mark.parametrize(
    "token", ["canary-too-short-012345", "canary-with-é-0123456789abcdef", "canary with spaces in it 0123"]
)
def test_an_invalid_token_is_rejected_and_never_shown(token: str, write: Write) -> None:
    message = config_error(ADMIN_TOKEN=token)
    assert message.startswith("ADMIN_TOKEN: ")
    assert "token_urlsafe" in message or "ASCII" in message
    with pytest.raises(ConfigError) as caught:
        load({}, {"ADMIN_TOKEN_FILE": write(token, "token")})
    assert "canary" not in str(caught.value)


def test_the_shortest_token_has_24_characters() -> None:
    assert loaded(ADMIN_TOKEN="x" * 24).admin_tokens == ("x" * 24,)
    assert "24" in config_error(ADMIN_TOKEN="x" * 23)


def test_the_daemon_does_not_start_without_a_token() -> None:
    with pytest.raises(ConfigError, match=r"ADMIN_TOKEN.*token_urlsafe"):
        load({}, {})
    assert load({}, {}, need_token=False).admin_tokens == ()


def test_development_needs_no_token_and_no_file(write: Write) -> None:
    found = load({}, {"ENVIRONMENT": "development"})
    assert (found.development, found.admin_tokens, found.config.store.path) == (True, (), ":memory:")
    path = write('[store]\npath = "/srv/jobs.db"\n')
    assert load({}, {"ENVIRONMENT": "development"}, path).config.store.path == "/srv/jobs.db"
    assert load({}, {"ENVIRONMENT": "production", "ADMIN_TOKEN": TOKEN}).config.store.path != ":memory:"


@pytest.mark.parametrize("source", ["ADMIN_TOKEN", "ADMIN_TOKEN_FILE", "admin.token_file", "credential"])
def test_development_has_no_effect_if_there_is_a_token(tmp_path: Path, source: str) -> None:
    file = tmp_path / "admin_token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    environ = {
        "ADMIN_TOKEN": {"ADMIN_TOKEN": TOKEN},
        "ADMIN_TOKEN_FILE": {"ADMIN_TOKEN_FILE": str(file)},
        "credential": {"CREDENTIALS_DIRECTORY": str(tmp_path)},
    }.get(source, {})
    flags = {source: str(file)} if source == "admin.token_file" else {}
    found = load(flags, {"ENVIRONMENT": "development", "STATE_DIRECTORY": "/srv/state", **environ})
    assert (found.development, found.admin_tokens) == (False, (TOKEN,))
    assert (found.config.store.path, found.sources["store.path"]) == ("/srv/state/jobd.db", "default")


def test_the_environment_can_name_the_worker_token_file(write: Write) -> None:
    token = write(f"{TOKEN}\n{OTHER}\n", "worker-token")
    assert loaded(JOBD_WORKER_LISTEN="127.0.0.1:8771", JOBD_WORKER_TOKEN_FILE=token).worker_tokens == (TOKEN, OTHER)


def test_a_token_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "gone")
    assert missing in config_error(flags={"worker.listen": "127.0.0.1:1", "worker.token_file": missing})


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[lock]\n", ["unknown section [lock]", "locks"]),
        ("[artefacts]\n", ["unknown section [artefacts]", "was renamed to [artifacts]"]),
        ("locks = 1\n", ["[locks]"]),
        ('[locks]\ntll = "1m"\n', ["locks.tll", "ttl, progress_timeout"]),
        ("[locks]\nttl = 15\n", ["locks.ttl", '"15m"']),
        ('[locks]\nttl = "15"\n', ["locks.ttl", '"15m"']),
        ('[locks]\nttl = "999ms"\n', ["locks.ttl", "1s to 1d"]),
        ('[limits]\nmailbox = "many"\n', ["limits.mailbox", "expected a whole number, not "]),
        ("[limits]\nmailbox = 0\n", ["limits.mailbox", ">= 1"]),
        ("[limits]\nmailbox = true\n", ["limits.mailbox", "expected a whole number, not "]),
        ("[limits]\nbulk = 1001\n", ["limits.bulk", "1000"]),
        ('[stall]\non_stall = "retry"\n', ["stall.on_stall", "auto, requeue, fail"]),
        ('[late]\nresults = "adopt"\n', ["late.results", "keep, adopt_if_unclaimed, drop"]),
        ('[late]\nqueues = {video = "adopt"}\n', ["late.queues", "keep, adopt_if_unclaimed, drop"]),
        ('[late]\nqueues = ["video"]\n', ["late.queues", "expected a table, not "]),
        ('[store]\nsynchronous = "normal"\n', ["store.synchronous", "full, extra"]),
        ('[worker]\nsocket_mode = "0999"\n', ["worker.socket_mode"]),
        ("[admin]\nhosts = [1]\n", ["admin.hosts", "expected a string, not [1]"]),
        ('[admin]\nhosts = ["http://x/y"]\n', ["admin.hosts", "'http://x/y'", "expected a host name"]),
        ('[admin]\nhosts = ["a", ""]\n', ["admin.hosts", "''", "expected a host name"]),
        ('[admin]\nhosts = ["a:8770"]\n', ["admin.hosts", "'a:8770'", "without scheme, port and path"]),
        ('[log]\nlevel = "loud"\n', ['log.level: expected one of debug, info, warning, error, not "loud"']),
        ("[locks\n", ["not valid TOML"]),
        # Values for which a parser raises an error of another type, or whose message would be long or unprintable.
        ("a = " + "[" * 50_000, ["nested too deeply"]),
        (f"[limits]\nbody = {'9' * 5_000}\n", ["limit"]),
        ('[admin]\nlisten = "127.0.0.1:\u00b2"\n', ["admin.listen"]),
        ('[store]\npath = "/a\\u0000b"\n', ["store.path: the value contains a NUL"]),
        (
            '[worker]\nlisten = "127.0.0.1:1"\ntoken_file = "/a\\u0000b"\n',
            ["worker.token_file: the value contains a NUL"],
        ),
        ('[admin]\nhosts = ["a\\u0000b"]\n', ["admin.hosts: the value contains a NUL"]),
        ('[locks]\nttl = "\\u001b[2J\\nnow"\n', ["locks.ttl"]),
        (f'[locks]\nttl = "{"a" * 100_000}"\n', ["such as"]),
        (f"[limits]\nmailbox = 0x{'f' * 5_000}\n", ["limits.mailbox"]),
        ("[alerts]\nfailure_rate = nan\n", ["not nan"]),
    ],
)
def test_an_error_in_the_file_names_file_and_key(text: str, parts: list[str], write: Write) -> None:
    path = write(text)
    message = config_error(path)
    for part in [path, *parts]:
        assert part in message, message
    _is_clear(message, path)


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("JOBD_LOCKS_TLL", "1m", ["JOBD_LOCKS_TLL", "JOBD_<SECTION>_<KEY>"]),
        ("JOBD_ARTEFACTS_URL", "file:///srv", ["JOBD_ARTEFACTS_URL", "was renamed to [artifacts]"]),
        ("JOBD_NONSENSE", "1", ["JOBD_NONSENSE"]),
        ("JOBD_LOCKS_TTL", "soon", ["JOBD_LOCKS_TTL", "locks.ttl", '"15m"']),
        (
            "JOBD_LIMITS_MAILBOX",
            "many",
            ["JOBD_LIMITS_MAILBOX", "limits.mailbox", "expected a whole number, not 'many'"],
        ),
        ("JOBD_LIMITS_MAILBOX", "1" * 400, ["limits.mailbox", "expected a whole number <= 9007199254740992, not '11"]),
        ("JOBD_ALERTS_FAILURE_RATE", "0", ["alerts.failure_rate", "expected a number > 0.0, not '0'"]),
        ("JOBD_ALERTS_STALLED_JOBS", "1" * 400, ["alerts.stalled_jobs", "expected a whole number <= 9007199254740992"]),
        ("JOBD_VALIDATION_REQUIRE_DOWNLOAD_URL", "perhaps", ["validation.require_download_url", "true or false"]),
        ("JOBD_LATE_QUEUES", "video", ["JOBD_LATE_QUEUES", "late.queues", "NAME=VALUE"]),
        ("JOBD_LATE_QUEUES", "video=adopt", ["JOBD_LATE_QUEUES", "late.queues", "adopt_if_unclaimed"]),
        ("JOBD_ADMIN_HOSTS", "a b", ["JOBD_ADMIN_HOSTS", "admin.hosts: 'a b'", "expected a host name"]),
        ("JOBD_ADMIN_HOSTS", "[a, b]", ["JOBD_ADMIN_HOSTS", "admin.hosts: '[a'", "expected a host name"]),
        ("JOBD_ADMIN_HOSTS", "[1]", ["JOBD_ADMIN_HOSTS", "admin.hosts", "expected a string, not [1]"]),
        ("JOBD_ADMIN_HOSTS", '[]\nx = ["a"]', ["JOBD_ADMIN_HOSTS", "admin.hosts", "expected a host name"]),
        ("JOBD_ADMIN_HOSTS", "[" * 50_000, ["JOBD_ADMIN_HOSTS", "admin.hosts", "expected a host name"]),
        ("JOBD_LATE_QUEUES", '["video"]', ["JOBD_LATE_QUEUES", "late.queues", "expected a table, not "]),
        ("JOBD_WORKER_LISTEN", "1.2.3.4", ["environment JOBD_WORKER_LISTEN: worker.listen", "127.0.0.1:8770"]),
        ("JOBD_STORE_SYNCHRONOUS", "off", ["JOBD_STORE_SYNCHRONOUS", "full, extra"]),
    ],
)
def test_an_error_in_a_variable_names_it(name: str, value: str, parts: list[str]) -> None:
    message = config_error(None, None, **{name: value})
    for part in parts:
        assert part in message, message


def test_an_error_in_a_flag_names_the_key() -> None:
    assert "locks.tll" in config_error(flags={"locks.tll": "1m"})
    assert "There is no section [artefacts]. [artefacts] was renamed" in config_error(flags={"artefacts.url": "x"})
    assert "limits.mailbox" in config_error(flags={"limits.mailbox": "0"})


COMBINATIONS: list[tuple[dict[str, str], str]] = [
    ({"worker.listen": "127.0.0.1:8771"}, "worker.token_file"),
    ({"late.queues": "a b=keep"}, "late.queues: 'a b'"),
    ({"worker.listen": "unix:/run/w.sock"}, "worker.socket"),
    ({"worker.tls_cert": "a", "worker.tls_key": "b"}, "worker.listen"),
    ({"admin.tls_cert": "a"}, "admin.tls_key"),
    ({"admin.tls_key": "a"}, "admin.tls_cert"),
    ({"admin.listen": "unix:/a", "admin.tls_cert": "a", "admin.tls_key": "b"}, "admin.tls_cert"),
    ({"admin.listen": "unix:a"}, "admin.listen"),
    ({"admin.listen": "8770"}, "admin.listen"),
    ({"admin.listen": "localhost:65536"}, "admin.listen"),
    ({"limits.payload": "2000000"}, "limits.payload"),
    ({"limits.inflight_bytes": "1048576"}, "limits.inflight_bytes"),
    ({"artifacts.url": "s3://"}, "artifacts.url"),
    ({"artifacts.url": "s3://Bucket_1"}, "artifacts.url"),
    ({"artifacts.url": "s3://bucket/a/../b"}, "artifacts.url"),
    ({"artifacts.url": "s3://bucket/a//b"}, "artifacts.url"),
    ({"artifacts.url": "s3://bucket/%2e%2e/b"}, "artifacts.url"),
    ({"artifacts.url": "s3://bucket/a?region=x"}, "artifacts.url"),
    ({"artifacts.url": "gs://bucket"}, "artifacts.url"),
    ({"artifacts.url": "file:///a#b"}, "artifacts.url"),
    ({"artifacts.url": "file:///a%00b"}, "artifacts.url"),
    ({"artifacts.url": "file:///"}, "artifacts.url"),
    ({"artifacts.url": "file://relative"}, "artifacts.url"),
    ({"artifacts.url": "/srv/results"}, "artifacts.url"),
]


@pytest.mark.parametrize(("flags", "named"), COMBINATIONS, ids=lambda value: str(value))
def test_impossible_combinations_are_rejected(flags: dict[str, str], named: str) -> None:
    assert named in config_error(flags=flags)


@pytest.mark.parametrize("url", ["s3://bucket", "s3://my.bucket-1/", "s3://bucket/a/b c/", "file:///srv/a%20b"])
def test_valid_artifact_urls_are_accepted(url: str) -> None:
    found = loaded(flags={"artifacts.url": url}).config
    assert found.artifacts.url == url
    assert found.policy().artifacts
    assert not loaded().config.policy().artifacts


@pytest.mark.parametrize(
    "where", ["", "state", "state/in", "run", "etc", "tokens", "readers", "certs", "keys", "hooks", "state/none/.."]
)
def test_artifacts_cannot_share_a_directory_with_the_daemons_files(tmp_path: Path, where: str) -> None:
    """Workers choose what is deleted there: the storage_key `jobd.db` would name the database."""
    for name in ("state/in/deep", "run", "etc", "tokens", "readers", "certs", "keys", "hooks", "srv"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "state/jobd.db").symlink_to(tmp_path / "state/in/deep/real.db")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    hook = f'[[webhooks]]\nname = "e"\nurl = "https://example.com/"\nsecret_file = "{tmp_path}/hooks/secret"\n'
    files = {"etc/config.toml": hook, "tokens/admin": OTHER, "readers/reader": OTHER}
    files["hooks/secret"] = f"whsec_{b64encode(bytes(32)).decode()}"
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    places = {
        "store.path": str(tmp_path / "state/jobd.db"),
        "worker.socket": str(tmp_path / "run/worker.sock"),
        "admin.listen": f"unix:{tmp_path / 'run/admin.sock'}",
    }
    file, readers = str(tmp_path / "etc/config.toml"), str(tmp_path / "readers/reader")
    environ = {"ADMIN_TOKEN": TOKEN, "ADMIN_READONLY_TOKEN_FILE": readers}
    places["admin.token_file"] = str(tmp_path / "tokens/admin")
    places |= {"worker.listen": "127.0.0.1:0", "worker.token_file": str(tmp_path / "tokens/admin")}
    places |= {"worker.tls_cert": str(tmp_path / "certs/a.pem"), "worker.tls_key": str(tmp_path / "keys/a.pem")}
    for apart in ("srv", "state/results", "run/results", "none"):
        load({**places, "artifacts.url": f"file://{tmp_path / apart}"}, environ, file)
    linked = f"file://{tmp_path / 'link'}"
    found = load({**places, "artifacts.url": linked}, environ, file)  # it follows no link, which could hang
    with pytest.raises(ConfigError, match="own files are in"):
        config_checks.check_artifact_directory(linked, found.own_directories)
    with pytest.raises(ConfigError, match=r"artifacts\.url: .*own files are in .*a separate directory"):
        load({**places, "artifacts.url": f"file://{tmp_path}/{where}"}, environ, file)


def test_a_key_in_the_artifact_url_is_rejected_and_not_shown() -> None:
    message = config_error(flags={"artifacts.url": "s3://AKIAXYZ:hush@bucket/prefix"})
    assert "AWS_ACCESS_KEY_ID" in message
    assert "hush" not in message


def test_a_bucket_without_its_package_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    assert "pip install ./.ci/client '.[s3]' in a clone" in config_error(flags={"artifacts.url": "s3://bucket"})
    assert loaded(flags={"artifacts.url": "file:///srv"}).config.artifacts.url


def test_valid_combinations_are_accepted(write: Write) -> None:
    token = write(OTHER, "worker-token")
    flags = {"worker.listen": "0.0.0.0:8771", "worker.token_file": token, "worker.tls_cert": "c", "worker.tls_key": "k"}
    found = loaded(flags=flags)
    assert found.worker_tokens == (OTHER,)
    assert found.warnings == ()
    assert loaded(flags={"cleanup.min_interval": "10m"}).config.cleanup.min_interval == 10 * MINUTE_MS


@pytest.mark.parametrize(
    ("flags", "environ", "wanted"),
    [
        ({}, {}, "file {}: worker.listen requires worker.token_file"),
        (
            {"worker.listen": ""},
            {"JOBD_LIMITS_PAYLOAD": "2000"},
            "file {}, environment JOBD_LIMITS_PAYLOAD: limits.payload must not be larger than limits.body",
        ),
        ({"worker.listen": "", "admin.tls_cert": "c"}, {}, "flag: admin.tls_cert and admin.tls_key belong together"),
        ({"worker.listen": "", "limits.body": "1048576", "artifacts.url": "ftp://x"}, {}, "flag: artifacts.url"),
    ],
)
def test_an_impossible_combination_names_the_sources_of_its_keys(
    write: Write, flags: dict[str, str], environ: dict[str, str], wanted: str
) -> None:
    path = write('[worker]\nlisten = "127.0.0.1:9"\n[limits]\nbody = 1000\n')
    with pytest.raises(ConfigError) as error:
        load(flags, {"ADMIN_TOKEN": TOKEN, **environ}, path)
    assert str(error.value).startswith(wanted.format(path))


def test_a_world_readable_token_file_is_a_warning(write: Write) -> None:
    """Token files, TLS keys, and the files that the environment names, each once."""
    files = [write(token * 2, name) for token, name in ((OTHER, "workers"), (TOKEN, "admin"), ("r" * 24, "readers"))]
    key = write("a key", "key")
    flags = {"worker.token_file": files[0], "admin.readonly_token_file": files[2]}
    flags |= {"admin.listen": "127.0.0.1:8770", "admin.tls_cert": "no-such-file", "admin.tls_key": key}

    def warned() -> list[str]:
        return [text.partition(" contains a secret and is readable by EVERY user")[0] for text in found.warnings]

    found = load(flags, {"ADMIN_TOKEN_FILE": files[1]})
    assert warned() == []
    for path in (*files, key):
        os.chmod(path, 0o644)
    found = load(flags | {"admin.token_file": files[1]}, {"ADMIN_TOKEN_FILE": files[1]})
    assert sorted(warned()) == sorted([*files, key])
    assert not any(token in text for text in found.warnings for token in (TOKEN, OTHER))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("127.0.0.1:8770", ("127.0.0.1", 8770)),
        ("[::1]:8770", ("::1", 8770)),
        ("localhost:0", ("localhost", 0)),
        ("unix:/run/jobd/admin.sock", "/run/jobd/admin.sock"),
    ],
)
def test_listen_addresses_are_parsed(text: str, place: object) -> None:
    assert config.parse_listen(text, "admin.listen") == place
    assert loaded(flags={"admin.listen": text}).warnings == ()


@pytest.mark.parametrize("address", ["0.0.0.0:8770", "[::]:8770", "192.0.2.1:8770", "127.0.0.1.example:8770"])
def test_a_public_address_without_tls_is_a_warning(address: str) -> None:
    (warning,) = loaded(flags={"admin.listen": address}).warnings
    assert address in warning
    assert "WITHOUT TLS" in warning
    assert loaded(flags={"admin.listen": address, "admin.tls_cert": "c", "admin.tls_key": "k"}).warnings == ()


@pytest.mark.parametrize(
    ("flags", "lower", "higher", "effect"),
    [
        ({"cleanup.interval": "30s"}, 'interval = "30s" (flag)', 'min_interval = "2m" (default)', "every 2m."),
        ({"cleanup.min_interval": "10m"}, 'interval = "5m" (default)', 'min_interval = "10m" (flag)', "every 10m."),
        ({"locks.ttl": "1h"}, 'ttl = "1h" (flag)', 'progress_timeout = "30m" (default)', "shortened to it"),
        ({"locks.progress_timeout": "10m"}, 'ttl = "15m" (default)', 'timeout = "10m" (flag)', "shortened to it"),
        ({"store.path": ":memory:"}, "", 'store.path = ":memory:" (flag)', "lost when the daemon stops"),
    ],
)
def test_doubtful_settings_are_warnings(flags: dict[str, str], lower: str, higher: str, effect: str) -> None:
    (warning,) = loaded(flags=flags).warnings
    for part in (lower, f"{higher}, which takes precedence" if lower else higher, effect):
        assert part in warning, warning


@pytest.mark.parametrize(
    "flags",
    [
        {"cleanup.interval": "2m"},
        {"cleanup.interval": "30s", "cleanup.min_interval": "30s"},
        {"locks.ttl": "30m"},
        {"locks.ttl": "1d", "locks.progress_timeout": "0"},
    ],
)
def test_usual_settings_give_no_warning(flags: dict[str, str]) -> None:
    assert loaded(flags=flags).warnings == ()


def test_a_store_in_memory_gives_a_warning_in_development() -> None:
    (warning,) = load({}, {"ENVIRONMENT": "development"}).warnings
    assert 'store.path = ":memory:" (environment ENVIRONMENT)' in warning
    assert "in memory: lost when the daemon stops" in warning


# -- host names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "jobs", "Jobs.Example.com", "jobs.example.com.", "my_jobs", "1und1.example", "xn--bcher-kva.example",
        "a" * 63, ".".join(["a" * 49] * 5), "10.0.0.7", "[fe80::1]", "FE80::1", "[2001:db8:0:0::7]",
    ],
)  # fmt: skip
def test_a_valid_host_matches_its_header(text: str) -> None:
    assert is_host(text)
    [name] = accepted_hosts("10.9.9.9", [text]) - {"10.9.9.9"}
    assert host_name(f"[{name}]:8770" if ":" in name else f"{name}:8770") == name


@pytest.mark.parametrize(
    "text",
    [
        "", " ", ".", "a b", " a", "a,b", "a..b", "-a", "a-", "a\n", "*", "*.example.com",
        "http://jobs.example.com", "http://x/y", "jobs.example.com/", "eve@jobs.example.com",
        "jobs.example.com:8770", "10.0.0.7:8770", "[fe80::1]:8770", "[fe80::1", "fe80::1]", "[jobs]", "[10.0.0.7]",
        "fe80::1%eth0", "fe80::1::2", "10.0.0.256", "10.0.0", "7", "0.0.0.0", "[::]",
        "bücher.example", "\u212aelvin.example", '["jobs"]', "a" * 64, ".".join(["a" * 50] * 5),
    ],
)  # fmt: skip
def test_an_invalid_host_is_rejected(text: str) -> None:
    assert not is_host(text)


# -- the effective configuration and its reload ------------------------------------------------------------------------


def test_the_effective_configuration_can_be_loaded_again(write: Write) -> None:
    token = write(OTHER, "worker-token")
    text = f'[worker]\nlisten = "127.0.0.1:1"\ntoken_file = "{token}"\n[admin]\nhosts = ["a", "b"]\n'
    text += '[store]\npath = "/b \\" c"\n'
    path = write(text + '[late.queues]\nvideo = "drop"\n"a.b" = "keep"\n')
    found = loaded(path, {"locks.ttl": "90s"}, JOBD_VALIDATION_REQUIRE_DOWNLOAD_URL="yes")
    text = effective(found)
    assert loaded(write(text, "again.toml")).config == found.config
    assert 'ttl = "90s"  # flag' in text
    assert "require_download_url = true  # environment JOBD_VALIDATION_REQUIRE_DOWNLOAD_URL" in text
    assert f'listen = "127.0.0.1:1"  # file {path}' in text
    assert "max_stalls = 3  # default" in text
    assert "canary" not in text


def test_reloadable_keys_are_applied() -> None:
    old = Config()
    flags = {"locks.ttl": "1m", "stall.after": "9m", "alerts.stalled_jobs": "9", "log.level": "debug"}
    new = loaded(flags=flags | {"store.path": "/b", "limits.body": "9999999"}).config
    new = msgspec.structs.replace(new, worker=old.worker)
    _, taken, rejected = reloaded(old, new)
    assert taken == ["locks.ttl", "stall.after", "alerts.stalled_jobs", "log.level"]
    assert rejected == ["store.path", "limits.body"]
    assert reloaded(old, old) == (old, [], [])


# -- arbitrary input ---------------------------------------------------------------------------------------------------

_ODD = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["unix:", "unix:/a\x00b", ":", "a:", "[::1]:1", "a:\u0662", "a:\u00b2", "127.0.0.1:8771", "a" * 5_000]
    ),
    st.sampled_from(
        ["1m", "0", "9" * 40 + "d", "1\u0661s", "file:///", "file:///a", "/a\x00b", "\x1b[2J", "a\nb", "a" * 5_000]
    ),
    st.integers(),
    st.integers(0, 2_000),
    st.booleans(),
    st.floats(),
    st.lists(st.text(max_size=3) | st.integers(), max_size=3),
    st.dictionaries(st.text("ab", min_size=1, max_size=2), st.integers(), max_size=2),
    st.datetimes().map(lambda at: at.isoformat()),
)
_NAMES = st.sampled_from([*KEYS, "locks.tll", "lock.ttl", "alerts.\u00e9"])


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_toml(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float):
        return {"inf": "inf", "-inf": "-inf", "nan": "nan"}.get(str(value), repr(value))
    return json.dumps(value)


def _text_of(values: dict[str, object]) -> str:
    return "".join(
        f'"{key.partition(".")[0]}"."{key.partition(".")[2]}" = {_toml(value)}\n' for key, value in values.items()
    )


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(_NAMES, _ODD, max_size=3).map(_text_of) | st.text(max_size=60) | st.just("a = " + "[" * 50_000))
def test_any_file_is_a_configuration_or_one_clear_message(write: Write, text: str) -> None:
    path = write(text)
    try:
        found = loaded(path)
    except ConfigError as error:
        _is_clear(str(error), path)
    else:
        reloaded = loaded(write(effective(found), "again.toml"))
        assert reloaded.config == found.config


@settings(max_examples=300)
@given(
    st.dictionaries(
        st.sampled_from(list(KEYS)), st.text(max_size=8) | st.sampled_from(["a:\u00b2", "9" * 5_000]), max_size=3
    )
)
def test_any_environment_is_a_configuration_or_one_clear_message(values: dict[str, str]) -> None:
    environ = {f"JOBD_{key.replace('.', '_').upper()}": value for key, value in values.items()}
    try:
        loaded(None, None, **environ)
    except ConfigError as error:
        _is_clear(str(error), *environ, *values)


def test_a_value_that_is_not_utf_8_is_rejected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Responses name the path of the store."""
    expected = "store.path: expected UTF-8, not '{}\\udcff.db'"
    assert config_error(flags={"foo.bar": "1"}) == "--set: unknown key foo.bar. There is no section [foo]"
    assert config_error(flags={"store.path": "/a\udcff.db"}) == f"flag: {expected.format('/a')}"
    assert "expected UTF-8" in config_error(JOBD_ADMIN_HOSTS="a\udcff")
    assert "postgresql://jobd:***@" in config_error(JOBD_JOURNAL_URL="postgresql://jobd:p\udcff@host/db")
    folder = tmp_path / "\udcff.db"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert "store.path: expected UTF-8" in config_error(flags={"store.path": "jobd.db"})


def _is_clear(message: str, *places: str) -> None:
    """Check that it is one printable line, not too long, that names the file or the key."""
    assert message.isprintable()
    assert len(message) < 600
    named = [*places, *KEYS, *(f"[{key.replace('.', '] ')}" for key in KEYS)]
    assert any(place in message for place in named), message


def test_a_file_that_cannot_be_examined_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one in a directory without access. The daemon does not start without its configuration."""
    path = f"/{'long' * 100}"
    monkeypatch.setattr(config_loader, "DEFAULT_PATH", path)
    for message in (config_error(path), config_error(None)):
        assert message == f"file {path}: cannot be read: File name too long"
