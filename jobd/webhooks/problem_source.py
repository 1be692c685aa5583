"""Turn changes of problems into messages for one webhook.

Messages are kept here until they are in the outbox. While the outbox cannot be written, they are delivered directly,
because a problem with a full disk must not wait for free space.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from msgspec import Struct

from jobd.model.job import MINUTE_MS, SECOND_MS
from jobd.model.problems import Problem, Subject
from jobd.model.webhooks import CHANGED, CLOSED, MANY, OPENED, DeliveryOutcome, OpenProblems, WebhookEndpoint
from jobd.webhooks.context import DispatchContext
from jobd.webhooks.message import Message, many_message, problem_message
from jobd.webhooks.retry import retry_wait_ms

MAX_PENDING: Final = 4  # changes kept per problem: opened and closed, twice
MOST: Final = 20  # messages per condition in WINDOW_MS; then one for all others
WINDOW_MS: Final = 5 * MINUTE_MS
NAMED: Final = 5  # subjects in the message for many
MAX_TRIES: Final = 5  # direct attempts per change, over a little more than a minute


Change = tuple[Problem, str, int]  # the type and the time of its message


class PendingMessage(Struct, eq=False):
    """A message that is not in the outbox yet. `due` is the earliest next attempt, in monotonic ms."""

    message: Message
    tries: int = 0
    due: int = 0
    is_done: bool = False  # delivered directly, or out of attempts; it goes into the outbox in any case


class ProblemSource:
    """Collects changes of problems with `poll`. Then call either `written` or `deliver_directly`.

    `announced` maps the id of each open problem to the time of the latest message about it (Unix ms), according to all
    messages made so far, including pending ones.
    """

    def __init__(self, endpoint: WebhookEndpoint, announced: dict[str, int], context: DispatchContext) -> None:
        self.announced = announced
        self._endpoint = endpoint
        self._context = context
        self._pending: list[PendingMessage] = []
        self._last: dict[str, Problem] = {}  # announced problems as last seen
        self._made: dict[str, list[int]] = {}  # condition -> times of its messages in the last WINDOW_MS
        self._in_flight: dict[str, asyncio.Task[None]] = {}  # by subject

    def poll(self) -> list[Message]:
        """Return all messages that are not in the outbox yet, oldest first. Repeated calls return them again."""
        found = self._context.problems() if self._endpoint.wants_problems else None
        if found is not None:
            by_condition: dict[str, list[Change]] = {}
            for change in self._changes(found):
                by_condition.setdefault(change[0].condition, []).append(change)
            self.announced = dict(self.announced)
            for condition, changes in by_condition.items():
                for problem, type_, at in self._announce(condition, changes):
                    self.announced[problem.id] = at
                    if type_ == CLOSED:
                        del self.announced[problem.id]
            self._last = {each.id: each for each in found.problems}
        return [pending.message for pending in self._pending]

    def _changes(self, found: OpenProblems) -> Iterable[Change]:
        """Yield each problem that opened, became worse or closed, with the type and the time of its message."""
        for problem in found.problems:
            changed_at = found.changed_at.get(problem.id, 0)
            if problem.id not in self.announced:
                yield problem, OPENED, max(problem.since, changed_at)
            elif changed_at > self.announced[problem.id]:
                yield problem, CHANGED, changed_at
        current = {problem.id for problem in found.problems}
        for id_, at in self.announced.items() if found.is_settled else ():
            if id_ not in current:
                yield self._last.get(id_) or _forgotten(id_, at), CLOSED, at

    def _announce(self, condition: str, changes: list[Change]) -> list[Change]:
        """Make the messages of one condition. Return the changes that they contain; the others wait.

        After MOST messages in WINDOW_MS there is one for all others. Types that the webhook does not want are not made.
        """
        now, source = self._context.moment().now, self._context.source
        made = [at for at in self._made.get(condition, ()) if now - WINDOW_MS < at <= now]
        wanted = [each for each in changes if each[1] in self._endpoint.events]
        single, others = wanted[: max(MOST - len(made), 0)], wanted[max(MOST - len(made), 0) :]
        for problem, type_, at in single:
            self._add(problem_message(problem, type_, at, now, source))
        is_full = len(made) > MOST
        if others and not is_full and MANY in self._endpoint.events:
            counts = Counter(type_.partition(".")[2] for _, type_, _ in others)
            self._add(many_message(condition, counts, [each[0].name for each in others[:NAMED]], now, source))
        self._made[condition] = made + [now] * (len(single) + bool(others and not is_full))
        return [each for each in changes if each not in others or not is_full]

    def written(self, count: int) -> None:
        """Forget the first `count` messages of `poll`, which are in the outbox now."""
        del self._pending[:count]

    def deliver_directly(self, post: Callable[[Message], Awaitable[DeliveryOutcome]]) -> None:
        """Start the direct attempts that are due: one at a time per problem, in order."""
        self.poll()
        ms, newest = _now_ms(), {pending.message.subject: pending for pending in self._pending}
        seen: set[str] = set()
        for pending in self._pending:
            subject = pending.message.subject
            # A newer change does not wait for retries of an older one.
            is_outdated = pending.tries > 0 and pending is not newest[subject]
            if subject in self._in_flight or subject in seen or pending.is_done or is_outdated:
                continue
            seen.add(subject)
            if pending.due <= ms:
                attempt, name = self._try(pending, post), f"webhook {self._endpoint.name}"
                self._in_flight[subject] = asyncio.create_task(attempt, name=name)

    def in_flight(self) -> list[asyncio.Task[None]]:
        return list(self._in_flight.values())

    async def _try(self, pending: PendingMessage, post: Callable[[Message], Awaitable[DeliveryOutcome]]) -> None:
        pending.tries += 1
        try:
            outcome = await post(pending.message)
        finally:
            del self._in_flight[pending.message.subject]
        pending.is_done = outcome.error is None or pending.tries >= MAX_TRIES
        chance, policy = self._context.chance(), self._context.retry_policy
        pending.due = _now_ms() + retry_wait_ms(pending.tries, chance, policy, outcome.retry_after_ms)

    def _add(self, message: Message) -> None:
        """Keep a message. If a problem flaps, drop its oldest pair of opened and closed."""
        self._pending.append(PendingMessage(message))
        if Counter(pending.message.subject for pending in self._pending)[message.subject] > MAX_PENDING:
            for old in [pending for pending in self._pending if pending.message.subject == message.subject][:2]:
                self._pending.remove(old)


def _forgotten(id_: str, at: int) -> Problem:
    """Return a problem that an earlier process of the daemon announced."""
    condition = id_.partition("/")[0]
    title = "The daemon was restarted, and the problem is over."
    return Problem(id=id_, condition=condition, severity="notice", subject=Subject(type=""), since=at, title=title)


def _now_ms() -> int:
    return int(asyncio.get_running_loop().time() * SECOND_MS)
