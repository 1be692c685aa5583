"""What is shown of a webhook's URL, and what is redacted in other texts."""

from __future__ import annotations

import pytest

from jobd.webhooks import url_policy
from jobd.webhooks.url_policy import redacted


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://x", "https://x"),
        ("https://x/", "https://x"),
        ("https://x:8443/hush", "https://x:8443/…"),
        ("https://x/y/z?token=hush", "https://x/…"),
        ("https://x?token=hush", "https://x/…"),
        ("https://h/x", "https://h/…"),
        ("https://me:hush@h:1/", "https://h:1"),
        ("http://[::1]:80/hush", "http://[::1]:80/…"),
    ],
)
def test_only_the_host_of_a_url_is_shown(url: str, shown: str) -> None:
    assert url_policy.public_url(url) == shown


URL = "https://me:hushhush@h.test:81/Hush-123/v1/a%2fb%20c/api?token=h+ush&k=l=m4n5&e%20f+g=seven77"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("no POST /Hush-123/v1/a%2fb%20c/api?token=h+ush&k=l=m4n5&e%20f+g=seven77!", "no POST …!"),
        ("no /Hush-123/v1/a%2fb%20c/api here", "no … here"),
        ("xHUSH-123x", "x…x"),
        ("it is 'a/b c' or a%2FB%20C", "it is '…' or …"),
        ('"h+ush", "h ush"', '"…", "…"'),
        ("{m4n5}, m4n56", "{…}, m4n56"),
        ("e f+g, e f g, e%20f+g", "…, …, …"),
        ("xseven77, seven77", "xseven77, …"),
        ("xhush-123", "x…"),
        ("api, v1, k, h.test:81", "api, v1, k, h.test:81"),
        ("me:hushhush, xhushhush", "…, x…"),
        ("a broken token", "a broken …"),
        ("", ""),
    ],
)
def test_parts_of_the_url_are_redacted(message: str, expected: str) -> None:
    assert redacted(URL, message) == expected


def test_the_longer_of_two_secrets_is_redacted_as_a_whole() -> None:
    assert redacted("https://h.test/abcdefgh/ABCDEFGHIJ", "abcdefghij, ABCDEFGH") == "…, …"


def test_a_url_without_a_path_has_nothing_to_redact() -> None:
    assert redacted("https://x.test/", "All / is said, … too.") == "All / is said, … too."
    assert redacted("https://x.test/hook", "hook, webhook, hooks") == "…, webhook, hooks"
