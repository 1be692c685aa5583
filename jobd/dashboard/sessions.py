"""Who is signed in: sessions in memory, each opened by a token, and a brake on those who guess.

Knows no page. A session holds no token but its digest, and ends when that token is valid no more.
"""

from __future__ import annotations

import hmac
import secrets
from collections import deque
from collections.abc import Callable
from hashlib import sha256
from typing import Final

from msgspec import Struct

from jobd.doors import Access, token_digest

MOST_SESSIONS: Final = 200  # beyond it, the one that was used longest ago ends
IDLE_S: Final = 3_600.0
LONGEST_S: Final = 12 * 3_600.0
MOST_WRONG: Final = 10  # sign-ins of one address that may fail
WRONG_WITHIN_S: Final = 60.0
MOST_ADDRESSES: Final = 1_024


class Told(Struct, frozen=True):
    """What is said once, on the next page."""

    message: str


class Session(Struct):
    """One browser that is signed in. `token` is the digest of what opened it; times are of the clock that was given."""

    access: Access
    token: bytes
    csrf: str
    born_s: float
    seen_s: float
    told: Told | None = None
    name: str = ""  # that the operator gave

    def has_csrf(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self.csrf.encode())

    def take_told(self) -> Told | None:
        told, self.told = self.told, None
        return told


class Sessions:
    """Sessions by the digest of their secret id. `access_of` says what a token allows now."""

    def __init__(self, access_of: Callable[[bytes], Access | None], clock_s: Callable[[], float]) -> None:
        self._access_of = access_of
        self._clock_s = clock_s
        self._open: dict[bytes, Session] = {}  # the latest used comes last

    def sign_in(self, token: str, name: str = "") -> tuple[str, Session] | None:
        """A new session with its secret id, None where the token is not valid. `name` is the operator's."""
        digest = token_digest(token)
        access = self._access_of(digest)
        if access is None:
            return None
        secret, now_s = secrets.token_urlsafe(32), self._clock_s()
        session = Session(access, digest, secrets.token_urlsafe(32), now_s, now_s, name=name)
        self._open[_key(secret)] = session
        while len(self._open) > MOST_SESSIONS:
            del self._open[next(iter(self._open))]
        return secret, session

    def find(self, secret: str) -> Session | None:
        """The session with this id, if it has not ended."""
        key, now_s = _key(secret), self._clock_s()
        session = self._open.pop(key, None)
        if session is None or now_s - session.seen_s >= IDLE_S or now_s - session.born_s >= LONGEST_S:
            return None
        access = self._access_of(session.token)
        if access != session.access:
            return None
        session.seen_s = now_s
        self._open[key] = session
        return session

    def sign_out(self, secret: str) -> None:
        self._open.pop(_key(secret), None)

    def __len__(self) -> int:
        return len(self._open)


class Brake:
    """After MOST_WRONG failures within WRONG_WITHIN_S an address has to wait."""

    def __init__(self, clock_s: Callable[[], float]) -> None:
        self._clock_s = clock_s
        self._wrong: dict[str, deque[float]] = {}  # address -> when, the latest of each

    def wait_s(self, address: str) -> float:
        """How long `address` has to wait before it may try again; 0: not at all."""
        times = self._wrong.get(address)
        if times is None or len(times) < MOST_WRONG:
            return 0.0
        return max(times[0] + WRONG_WITHIN_S - self._clock_s(), 0.0)

    def note_wrong(self, address: str) -> None:
        times = self._wrong.pop(address, None) or deque(maxlen=MOST_WRONG)
        times.append(self._clock_s())
        self._wrong[address] = times
        while len(self._wrong) > MOST_ADDRESSES:
            del self._wrong[next(iter(self._wrong))]


def _key(secret: str) -> bytes:
    return sha256(secret.encode("utf-8", "surrogateescape")).digest()
