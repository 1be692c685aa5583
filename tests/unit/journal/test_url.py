"""The URL of a journal: its hosts, and its redacted form."""

from __future__ import annotations

import pytest

from jobd.journal import url


def test_each_host_has_a_url_of_its_own() -> None:
    parsed = url.parse("postgresql://jobd:s%40crt@a:5432,b,[::1]:5433/db?sslmode=require")
    assert parsed.hosts == ("a:5432", "b", "[::1]:5433")
    assert parsed.urls == (
        "postgresql://jobd:s%40crt@a:5432/db?sslmode=require",
        "postgresql://jobd:s%40crt@b/db?sslmode=require",
        "postgresql://jobd:s%40crt@[::1]:5433/db?sslmode=require",
    )
    assert (parsed.role, parsed.database) == ("jobd", "db")


@pytest.mark.parametrize(
    ("text", "hosts", "role", "database"),
    [
        ("postgres://a", ("a",), "", ""),
        ("postgresql://jobd@a", ("a",), "jobd", "jobd"),
        ("postgresql://jobd@/db?host=/run/postgresql", ("/run/postgresql",), "jobd", "db"),
        ("postgresql:///db?user=jobd", ("the local socket",), "jobd", "db"),
        ("postgresql://?dbname=db", ("the local socket",), "", "db"),
    ],
)
def test_parts_can_be_parameters_or_missing(text: str, hosts: tuple[str, ...], role: str, database: str) -> None:
    parsed = url.parse(text)
    assert (parsed.hosts, parsed.role, parsed.database) == (hosts, role, database)


@pytest.mark.parametrize(
    "text",
    [
        "jobd",
        "mysql://a/db",
        "postgresql://jobd:canary@a b/db",
        "postgresql://jobd:can@ary@a/db",
        "postgresql://jobd:canary@a,/db",
        "postgresql://jobd:canary@a:port/db",
        "postgresql://jobd:canary@a/db?sslmode",
        "postgresql://jobd:canary@a/db#part",
        "postgresql://jobd:canary@[::1/db",
    ],
)
def test_an_invalid_url_is_rejected_without_showing_it(text: str) -> None:
    with pytest.raises(ValueError, match="expected postgresql://ROLE@HOST:PORT/DATABASE") as caught:
        url.parse(text)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://jobd@a/db", "postgresql://jobd@a/db"),
        ("postgresql://jobd:canary@a,b/db?x=1", "postgresql://jobd:***@a,b/db?x=1"),
        ("postgresql://jobd:can@a/r:y@a/db", "postgresql://jobd:***@a/db"),
        ("postgresql://a/db?user=x&password=canary&x=1", "postgresql://a/db?user=x&password=***&x=1"),
        ("postgresql://a/db?sslpassword=canary", "postgresql://a/db?sslpassword=***"),
        ("postgresql://a:5432/db?user=x", "postgresql://a:5432/db?user=x"),
        ("", ""),
    ],
)
def test_a_password_is_not_shown(text: str, shown: str) -> None:
    assert url.redacted(text) == shown
    assert url.has_password(text) == (text != shown)
