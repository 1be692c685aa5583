"""Configuration: defaults, the shipped config.toml, durations, keys that a reload applies."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobd import config
from jobd.config import KEYS, Config, parse_duration, reloaded, show_duration
from jobd.model.job import DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS, YEAR_MS, Policy
from tests import ROOT

SHIPPED = ROOT / "config.toml"


def test_the_defaults_are_the_documented_ones() -> None:
    found = Config()
    assert found.policy() == Policy(), "the rules' own defaults and those of the configuration are one"
    assert found.admin.listen == "127.0.0.1:8770"
    assert found.worker.socket_mode == "0660"
    assert found.store.synchronous == "full"
    cleanup = found.cleanup
    assert (cleanup.interval, cleanup.min_interval) == (5 * MINUTE_MS, 2 * MINUTE_MS)
    assert cleanup.recover_every == 10 * SECOND_MS
    limits = found.limits
    assert (limits.mailbox, limits.inflight_bytes, limits.parked_claims) == (10_000, 64 << 20, 10_000)
    assert (limits.body, limits.payload, limits.bulk, limits.claim_wait) == (1 << 20, 256 << 10, 1000, MINUTE_MS)
    assert (limits.live_jobs, limits.idempotency_keys) == (5_000_000, 200_000)
    alerts = found.alerts
    assert (alerts.stalled_jobs, alerts.processing_jobs, alerts.cleanup_issues) == (5, 20, 10)
    assert alerts.average_processing == 10 * MINUTE_MS
    assert (alerts.granted_twice, alerts.slower_than_usual) == (0, 2)
    assert found.retention.journal == DAY_MS


def shipped_keys(text: str) -> list[str]:
    """Return the keys in config.toml, which are commented out."""
    keys, section = [], ""
    for line in text.splitlines():
        if head := re.fullmatch(r"\[(\w+)\]", line):
            section = head[1]
        elif key := re.match(r"#(\w+) = ", line):
            keys.append(f"{section}.{key[1]}")
    return keys


def test_config_toml_shows_every_key_once_in_order() -> None:
    assert shipped_keys(SHIPPED.read_text(encoding="utf-8")) == list(KEYS)


def test_config_toml_sets_nothing() -> None:
    tables = tomllib.loads(SHIPPED.read_text(encoding="utf-8"))
    assert {name: dict(table) for name, table in tables.items()} == {name: {} for name in Config.__struct_fields__}


def test_config_toml_explains_every_key_in_one_line() -> None:
    lines = SHIPPED.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        assert len(line) <= 120
        if re.match(r"#\w+ = ", line):
            assert re.match(r"# .+\.$", lines[number - 1]), line
            assert not re.match(r"# ", lines[number - 2]), f"{line}: one line of comment"


@pytest.mark.parametrize(
    ("text", "ms"),
    [("0", 0), ("500ms", 500), ("10s", 10_000), ("15m", 900_000), ("1h", HOUR_MS), ("7d", 7 * DAY_MS), (" 1s ", 1000)],
)
def test_durations_are_parsed(text: str, ms: int) -> None:
    assert parse_duration(text) == ms


@pytest.mark.parametrize("text", ["", "15", "m", "1.5h", "-1s", "1w", "15 m", "1h30m", "9" * 13 + "s", "\u0661s"])
def test_malformed_durations_are_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


@given(st.integers(0, 10 * YEAR_MS))
def test_durations_survive_being_shown(ms: int) -> None:
    assert parse_duration(show_duration(ms)) == ms


def test_a_duration_is_shown_in_its_largest_unit() -> None:
    shown = [show_duration(ms) for ms in (0, 1, 1000, 90_000, HOUR_MS, 2 * DAY_MS)]
    assert shown == ["0", "1ms", "1s", "90s", "1h", "2d"]


@pytest.mark.parametrize("key", sorted(KEYS))
def test_every_changed_key_is_applied_or_needs_a_restart(key: str) -> None:
    section, name = key.split(".")
    other: Any = object()
    table = getattr(Config(), section)
    new = msgspec.structs.replace(Config(), **{section: msgspec.structs.replace(table, **{name: other})})
    _, taken, rejected = reloaded(Config(), new)
    assert taken + rejected == [key]
    fixed = section in {"artifacts"} or key in {"store.path", "admin.listen", "worker.socket", "worker.listen"}
    assert not fixed or rejected == [key]


def test_only_durations_have_bounds() -> None:
    assert set(config.BOUNDS) <= {key for key, hint in KEYS.items() if hint is config.Duration}
