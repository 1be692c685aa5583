"""Retry delays, dead letters and the circuit breaker, at given times."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from jobd.model.job import DAY_MS
from jobd.model.webhooks import Delivery, DeliveryOutcome, WebhookEndpoint
from jobd.webhooks.retry import CircuitBreaker, RetryPolicy, is_exhausted, retry_wait_ms
from tests.support.factories import NOW

POLICY = RetryPolicy()
ENDPOINT = WebhookEndpoint("e", "https://x", (b"k" * 24,))
DELIVERY = Delivery(1, "e", "waiting", "jobs/a", "job.completed", "evt", 1, 0, 0, 0, None, None, None, b"{}")
NO = DeliveryOutcome(500, "500")


@pytest.mark.parametrize(
    ("tries", "chance", "asked_ms", "wait_ms"),
    [
        (1, 0.0, None, POLICY.retry_ms // 2),
        (1, 1.0, None, POLICY.retry_ms),
        (2, 1.0, None, 2 * POLICY.retry_ms),
        (3, 0.5, None, 3 * POLICY.retry_ms),
        (30, 1.0, None, POLICY.max_retry_ms),
        (1_000, 0.0, None, POLICY.max_retry_ms // 2),
        (1, 0.0, 60_000, 60_000),
        (1, 0.0, 1, POLICY.retry_ms // 2),
        (1, 0.0, 10 * DAY_MS, POLICY.max_retry_ms),
    ],
)
def test_delays_double_are_jittered_and_have_a_maximum(
    tries: int, chance: float, asked_ms: int | None, wait_ms: int
) -> None:
    assert retry_wait_ms(tries, chance, POLICY, asked_ms) == wait_ms


@pytest.mark.parametrize(
    ("tries", "age_ms", "dead_lettered"),
    [
        (POLICY.min_tries, ENDPOINT.dead_letter_after_ms, True),
        (POLICY.min_tries - 1, ENDPOINT.dead_letter_after_ms * 9, False),
        (POLICY.min_tries * 9, ENDPOINT.dead_letter_after_ms - 1, False),
    ],
)
def test_a_dead_letter_needs_both_age_and_attempts(tries: int, age_ms: int, dead_lettered: bool) -> None:
    for at in (0, NOW):
        assert is_exhausted(replace(DELIVERY, tries=tries, at=at), ENDPOINT, at + age_ms, POLICY) is dead_lettered


def opened(at: int = 1_000, breaker: CircuitBreaker | None = None) -> CircuitBreaker:
    breaker = breaker or CircuitBreaker(POLICY)
    for number in range(POLICY.opens_after):
        assert breaker.state(at) == "closed"
        assert breaker.failed(NO, at, 1.0) is (number == POLICY.opens_after - 1)
    return breaker


def test_consecutive_failures_open_the_breaker() -> None:
    breaker = CircuitBreaker(POLICY)
    for _ in range(POLICY.opens_after - 1):
        assert not breaker.failed(NO, 5, 1.0)
    assert not breaker.succeeded()
    assert breaker.failures == 0
    assert opened().until == 1_000 + POLICY.pause_ms


def test_a_successful_probe_closes_the_breaker() -> None:
    breaker = opened()
    assert breaker.state(1_000 + POLICY.pause_ms - 1) == "open"
    assert breaker.state(1_000 + POLICY.pause_ms) == "half_open"
    assert breaker.succeeded()
    assert breaker.state(1_000 + POLICY.pause_ms) == "closed"
    assert not breaker.succeeded()


def test_a_failed_probe_lengthens_the_pause_up_to_its_maximum() -> None:
    breaker, now = opened(), 1_000
    assert breaker.until is not None
    pauses = []
    for _ in range(30):
        now = breaker.until
        assert breaker.failed(NO, now, 1.0)
        pauses.append(breaker.until - now)
    assert pauses[:3] == [2 * POLICY.pause_ms, 4 * POLICY.pause_ms, 8 * POLICY.pause_ms]
    assert pauses[-1] == POLICY.max_pause_ms
    assert breaker.succeeded()
    assert opened(now, breaker).until == now + POLICY.pause_ms, "it begins with the shortest pause again"


def test_deliveries_that_were_running_do_not_lengthen_the_pause() -> None:
    breaker = opened()
    assert not breaker.failed(NO, 1_500, 1.0)
    assert breaker.until == 1_000 + POLICY.pause_ms
    assert breaker.failures == POLICY.opens_after


def test_pauses_are_jittered() -> None:
    breaker = CircuitBreaker(RetryPolicy(opens_after=1))
    assert breaker.failed(NO, 0, 0.0)
    assert breaker.until == POLICY.pause_ms // 2


def test_retry_after_lengthens_the_pause_within_bounds() -> None:
    breaker = CircuitBreaker(RetryPolicy(opens_after=1))
    assert breaker.failed(replace(NO, retry_after_ms=60_000), 0, 0.0)
    assert breaker.until == 60_000
    breaker = CircuitBreaker(RetryPolicy(opens_after=1))
    assert breaker.failed(replace(NO, retry_after_ms=DAY_MS), 0, 0.0)
    assert breaker.until == POLICY.max_pause_ms


def test_410_gone_opens_the_breaker_after_one_failure() -> None:
    breaker = CircuitBreaker(POLICY)
    assert breaker.failed(DeliveryOutcome(410, "410", gone=True), 0, 1.0)
    assert breaker.until == POLICY.max_pause_ms
    assert breaker.failed(NO, POLICY.max_pause_ms, 1.0), "a failed probe, whatever its error"
    assert breaker.until == 2 * POLICY.max_pause_ms
