"""The `[[webhooks]]` of the configuration: defaults, errors, and that no secret is shown."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import asdict

from jobd.config import ConfigError, LoadedConfig, effective
from jobd.config_loader import load
from jobd.model.job import DAY_MS, HOUR_MS
from jobd.model.webhooks import PROBLEMS, TYPES, WebhookEndpoint, types_matching
from jobd.webhooks.config import MAX_WEBHOOKS
from tests import ROOT
from tests.integration.test_docs import CONFIGURATION, OPERATIONS, rows, ticked

OLD, NEW = b"o" * 24, b"n" * 32
SECRET, NEWER = (f"whsec_{base64.b64encode(key).decode()}" for key in (OLD, NEW))
ENVIRON = {"ADMIN_TOKEN": "a" * 32}

Read = Callable[[str], LoadedConfig]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def load_(text: str) -> LoadedConfig:
        file = tmp_path / "config.toml"
        file.write_text(text)
        file.chmod(0o640)
        return load({}, ENVIRON, str(file))

    return load_


def block(
    name: str = "billing", secret: str = f'secret = "{SECRET}"', url: str = "https://e.test/hook", more: str = ""
) -> str:
    return f'[[webhooks]]\nname = "{name}"\nurl = "{url}"\n{secret}\n{more}\n'


def test_omitted_keys_have_defaults(read: Read) -> None:
    (found,) = read(block()).webhooks
    assert asdict(found.endpoint) == asdict(
        WebhookEndpoint("billing", "https://e.test/hook", (OLD,), types_matching("*"))
    )
    assert found.endpoint.dead_letter_after_ms == 3 * DAY_MS
    assert found.endpoint.timeout_ms == 10_000
    assert read("").webhooks == ()


def test_every_key_can_be_set(read: Read) -> None:
    more = (
        'events = ["job.completed", "problem.*"]\nqueues = ["mail"]\nallow_private = true\n'
        'timeout = "500ms"\ndead_letter_after = "1h"'
    )
    secrets = f'secret = ["{NEWER}", "{SECRET}"]'
    first, second = read(block("a", secrets, "http://127.0.0.1:8080/x", more) + block("b")).webhooks
    assert first.endpoint == WebhookEndpoint(
        "a",
        "http://127.0.0.1:8080/x",
        (NEW, OLD),
        frozenset({"job.completed", *PROBLEMS}),
        frozenset({"mail"}),
        True,
        500,
        HOUR_MS,
    )
    assert second.endpoint.name == "b"


def test_secrets_can_be_in_a_separate_file(read: Read, tmp_path: Path) -> None:
    (tmp_path / "secrets").write_text(f"{NEWER}\n\n{SECRET}\n")
    (found,) = read(block(secret=f'secret_file = "{tmp_path}/secrets"')).webhooks
    assert found.endpoint.secrets == (NEW, OLD)


def test_no_secret_is_shown(read: Read) -> None:
    loaded = read(block(secret=f'secret = ["{NEWER}", "{SECRET}"]', url="https://e.test/hush/hook?token=hush"))
    shown = effective(loaded) + repr(loaded) + str(asdict(loaded.webhooks[0].section))
    for secret in (SECRET, NEWER, SECRET[6:], "hush", OLD.decode(), NEW.decode()):
        assert secret not in shown
    text = effective(loaded)
    assert "[[webhooks]]\n" not in text.split("\n")
    assert 'name = "billing"' in text
    assert 'url = "https://e.test/…"' in text
    assert "# secrets: 2" in text


def test_a_world_readable_secret_file_causes_a_warning(read: Read, tmp_path: Path) -> None:
    assert read(block()).warnings == ()
    os.chmod(tmp_path / "config.toml", 0o644)
    (warning,) = load({}, ENVIRON, str(tmp_path / "config.toml")).warnings
    assert "is readable by EVERY user" in warning


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("webhooks = 7\n", "[[webhooks]], in two brackets"),
        (block(name=".."), "name: '..' is not allowed: names are parts of URL paths"),
        ('[webhooks]\nname = "a"\n', "[[webhooks]], in two brackets"),
        (block() * 2, "webhooks 2 (billing): name: already used by another webhook"),
        ("".join(block(f"w{number}") for number in range(MAX_WEBHOOKS + 1)), f"the maximum is {MAX_WEBHOOKS}"),
        (block("a b"), "webhooks 1: name:"),
        (block(""), "webhooks 1: name:"),
        ("[[webhooks]]\n", "webhooks 1: Object missing required field `name`"),
        (block(more="secrets = 7"), "unknown field `secrets`"),
        (block(more="queues = 7"), "queues: Expected `array`"),
        (block(more='queues = ["a b"]'), "queues: 'a b'"),
        (block(more="events = []"), "events: name at least one type"),
        (block(more='events = ["job.done"]'), "events: 'job.done' is not an event type. Known: *, job.*"),
        (block(more='timeout = "5"'), "timeout:"),
        (block(more='timeout = "2m"'), "timeout: 2m is outside 0.1 s to 60 s"),
        (block(more='dead_letter_after = "1s"'), "dead_letter_after: 1s is outside"),
        (block(secret=""), "set either secret or secret_file"),
        (block(secret=f'secret = "{SECRET}"\nsecret_file = "/x"'), "set either secret or secret_file"),
        (block(secret='secret = "hush-hush"'), "secret: a secret starts with whsec_. Create one with: python3"),
        (block(secret='secret = "whsec_aHVzaA=="'), "24 to 64 bytes"),
        (block(secret="secret = []"), "set either secret or secret_file"),
        (block(secret=f'secret = ["{SECRET}", "{SECRET}", "{SECRET}", "{SECRET}"]'), "up to 3"),
        (block(secret='secret_file = "/nonexistent/x"'), "secret_file: /nonexistent/x: cannot be read"),
        (block(secret=r'secret_file = "/x\u0000"'), "secret_file: the value contains a NUL character"),
        (block(url="e.test/hook"), "url: expected https://HOST/PATH"),
        (block(url="ftp://e.test/"), "url: expected https://HOST/PATH"),
        (block(url="https:///x"), "url: expected https://HOST/PATH"),
        (block(url="https://e.test:99999/"), "with a valid port"),
        (block(url="https://e.test:0/"), "url: expected"),
        (block(url="https://e.test/#x"), "url: expected"),
        (block(url="https://e.test/a b"), "without spaces"),
        (block(url="https://é.test/"), "in ASCII"),
        (block(url="https://me:hush@e.test/"), "without user and password"),
        (block(url="https://e<.test/hush"), "a host name has letters, digits"),
        (block(url="https://e\\\\e/hush"), "a host name has letters, digits"),
        (block(url="http://e.test/"), "http:// is not encrypted"),
        (block(url="https://127.0.0.1/"), "127.0.0.1 is loopback"),
        (block(url="https://[::1]/"), "::1 is loopback"),
        (block(url="https://127.1/"), "127.1 is not a valid address"),
        (block(url="https://2130706433/"), "2130706433 is not a valid address"),
        (block(url="https://169.254.169.254/"), "link-local"),
        (block(url="https://10.1.2.3/"), "10.1.2.3 is private"),
    ],
)
def test_errors_are_one_line_with_the_file_and_the_number_of_the_webhook(
    read: Read, tmp_path: Path, text: str, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(text)
    message = str(caught.value)
    assert message.startswith(f"file {tmp_path}/config.toml: ")
    assert expected in message
    assert message.isprintable()
    assert "hush" not in message
    assert SECRET not in message


@pytest.mark.parametrize(
    "host",
    ["e.test", "E_1.test:80", "localhost", "127.1", "10.0.0.1:8", "[::1]:8", "[fe80::1%eth0]", "[::ffff:1.1.1.1]"],
)
def test_every_form_of_host_is_accepted(read: Read, host: str) -> None:
    (found,) = read(block(url=f"https://{host}/x", more="allow_private = true")).webhooks
    assert found.section.url == f"https://{host}/…"


def test_allow_private_allows_private_addresses(read: Read) -> None:
    (found,) = read(block(url="http://127.0.0.1/", more="allow_private = true")).webhooks
    assert found.endpoint.allow_private


def test_a_secret_that_is_not_ascii_is_rejected(read: Read, tmp_path: Path) -> None:
    (tmp_path / "secrets").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="secrets must be ASCII"):
        read(block(secret=f'secret_file = "{tmp_path}/secrets"'))


def test_the_documents_name_every_key_of_a_webhook_and_every_type() -> None:
    from jobd.webhooks.config import WebhookSection

    named = [ticked(row[0])[0] for row in rows(CONFIGURATION, "key of a webhook", "default")]
    assert named == list(WebhookSection.__struct_fields__)
    text = OPERATIONS.read_text(encoding="utf-8")
    for kind in ("problem.opened", "problem.closed", "events.gone", "webhook.test", "queue.paused", "job.completed"):
        assert f"`{kind}`" in text
        assert kind in (*TYPES, "events.gone", "webhook.test")


def test_the_shipped_configuration_shows_every_key_of_a_webhook() -> None:
    from jobd.webhooks.config import WebhookSection

    shown = (ROOT / "config.toml").read_text(encoding="utf-8").partition("[[webhooks]]")[2]
    assert [name for name in WebhookSection.__struct_fields__ if f"#   {name} = " not in shown] == []
