"""Decide when a delivery is retried or dead-lettered, and when the circuit breaker of an endpoint opens.

Pure: time (monotonic ms) and chance (0 to 1) are arguments.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from jobd.model.job import HOUR_MS, MINUTE_MS, SECOND_MS
from jobd.model.webhooks import Delivery, DeliveryOutcome, WebhookEndpoint

BreakerState = Literal["closed", "open", "half_open"]


class RetryPolicy(Struct, frozen=True):
    """Delays and limits of retries and of the circuit breaker."""

    retry_ms: int = 5 * SECOND_MS  # after the first failure; doubles each time
    max_retry_ms: int = HOUR_MS
    # Attempts before a delivery is dead-lettered. Its age alone may be due to a clock step or a suspended machine.
    min_tries: int = 8
    opens_after: int = 5  # consecutive failures
    pause_ms: int = 10 * SECOND_MS  # of the first open period; doubles each time
    max_pause_ms: int = 5 * MINUTE_MS


def retry_wait_ms(tries: int, chance: float, policy: RetryPolicy, asked_ms: int | None = None) -> int:
    """Return the delay after `tries` failures: half fixed, half random, at least `asked_ms`, and limited."""
    delay_ms = min(policy.retry_ms << min(tries - 1, 20), policy.max_retry_ms)
    return max(_with_jitter(delay_ms, chance), min(asked_ms or 0, policy.max_retry_ms))


def is_exhausted(delivery: Delivery, endpoint: WebhookEndpoint, now: int, policy: RetryPolicy) -> bool:
    """Return whether a delivery is dead-lettered at wall time `now`. `delivery.tries` includes the latest failure."""
    return delivery.tries >= policy.min_tries and now - delivery.at >= endpoint.dead_letter_after_ms


def _with_jitter(delay_ms: int, chance: float) -> int:
    return delay_ms // 2 + int(delay_ms / 2 * chance)


class CircuitBreaker:
    """A circuit breaker, which opens after several consecutive failures.

    While it is open, no delivery runs. Then it is half-open: one probe closes it, or opens it for longer.
    """

    def __init__(self, policy: RetryPolicy) -> None:
        self.failures = 0  # consecutive; attempts that end while it is open do not count
        self.until: int | None = None  # open until then
        self._breaks = 0
        self._policy = policy

    def state(self, now: int) -> BreakerState:
        if self.until is None:
            return "closed"
        return "open" if now < self.until else "half_open"

    def succeeded(self) -> bool:
        """Record a success. Return whether it closed the breaker."""
        was_open = self.until is not None
        self.failures, self.until, self._breaks = 0, None, 0
        return was_open

    def failed(self, outcome: DeliveryOutcome, now: int, chance: float) -> bool:
        """Record a failure. Return whether it opened the breaker."""
        state = self.state(now)
        if state == "open":
            return False  # started before the breaker opened
        self.failures += 1
        if state == "closed" and self.failures < self._policy.opens_after and not outcome.gone:
            return False
        self._breaks = 20 if outcome.gone else min(self._breaks + 1, 20)
        pause_ms = min(self._policy.pause_ms << (self._breaks - 1), self._policy.max_pause_ms)
        pause_ms = max(_with_jitter(pause_ms, chance), min(outcome.retry_after_ms or 0, self._policy.max_pause_ms))
        self.until = now + pause_ms
        return True
