"""Keep browser sessions in memory, throttle failed sign-ins, and group sign-ins for the audit log.

A session stores the digest of its token and ends when the token is revoked.
"""

from __future__ import annotations

import hmac
import secrets
from collections import deque
from collections.abc import Callable
from hashlib import sha256
from typing import Final, get_args

import msgspec
from msgspec import Struct

from jobd.http.auth import Permission, token_digest

MAX_SESSIONS: Final = 200  # for each permission; above it, the least recently used session ends
IDLE_S: Final = 3_600.0
MAX_AGE_S: Final = 12 * 3_600.0
FREE_FAILURES: Final = 10  # failed sign-ins of one address before its responses are delayed
FAILURE_WINDOW_S: Final = 60.0
FAILURE_DELAY_S: Final = 1.0
MAX_AUDITED_FAILURES: Final = 60  # audit entries about failed sign-ins, of all addresses in FAILURE_WINDOW_S
MAX_ADDRESSES: Final = 1_024
SIGN_IN_WINDOW_S: Final = 60.0  # sign-ins of one address and permission within it share one audit entry
MAX_NAMES: Final = 10  # operator names in such an entry


class Session(Struct):
    """A signed-in browser. `token` is the digest of the token that opened the session.

    `by_tls`: the browser signed in over TLS, to this daemon or to a proxy in front of it.
    """

    access: Permission
    token: bytes
    csrf: str
    created_s: float
    last_used_s: float
    flash: str = ""  # shown once, on the next page
    name: str = ""  # given by the operator
    by_tls: bool = False

    def has_csrf(self, submitted: str) -> bool:
        return hmac.compare_digest(submitted.encode("utf-8", "surrogateescape"), self.csrf.encode())

    def take_flash(self) -> str:
        message, self.flash = self.flash, ""
        return message


class Sessions:
    """Hold sessions by the digest of their secret id. `access_of` returns the current permission of a token."""

    def __init__(self, access_of: Callable[[bytes], Permission | None], clock_s: Callable[[], float]) -> None:
        self._access_of = access_of
        self._clock_s = clock_s
        # One pool for each permission, so that sign-ins with a read-only token do not end the sessions of operators.
        self._pools: dict[Permission, dict[bytes, Session]] = {each: {} for each in get_args(Permission)}  # LRU order

    def sign_in(self, token: str, name: str = "", *, by_tls: bool = False) -> tuple[str, Session] | None:
        """Open a session and return it with its secret id. Return None if the token is invalid."""
        digest = token_digest(token)
        access = self._access_of(digest)
        if access is None:
            return None
        secret, now_s = secrets.token_urlsafe(32), self._clock_s()
        session = Session(access, digest, secrets.token_urlsafe(32), now_s, now_s, name=name, by_tls=by_tls)
        pool = self._pools[access]
        pool[_key(secret)] = session
        while len(pool) > MAX_SESSIONS:
            del pool[next(iter(pool))]
        return secret, session

    def find(self, secret: str) -> Session | None:
        """Return the session with this secret id, None if there is none or it has ended."""
        key, now_s = _key(secret), self._clock_s()
        session = self._remove(key)
        if session is None or now_s - session.last_used_s >= IDLE_S or now_s - session.created_s >= MAX_AGE_S:
            return None
        access = self._access_of(session.token)
        if access != session.access:
            return None
        session.last_used_s = now_s
        self._pools[access][key] = session
        return session

    def sign_out(self, secret: str) -> None:
        self._remove(_key(secret))

    def _remove(self, key: bytes) -> Session | None:
        return next((pool.pop(key) for pool in self._pools.values() if key in pool), None)

    def __len__(self) -> int:
        return sum(len(pool) for pool in self._pools.values())


class FailedSignIn(Struct, frozen=True):
    """A failed sign-in: its number within the window of its address, and whether the audit log records it.

    `window` identifies the window.
    """

    count: int
    delay_s: float
    is_audited: bool
    window: str


class SignInWindow(Struct):
    """Failed sign-ins, sign-ins or sign-outs of one address in a limited time. `window` identifies them."""

    start_s: float
    window: str
    count: int = 0
    names: list[str] = msgspec.field(default_factory=list)  # the first MAX_NAMES that were given


class _Windows(dict[str, SignInWindow]):
    """The latest MAX_ADDRESSES windows by key, in the order of their start."""

    def count(self, key: str, now_s: float, duration_s: float) -> SignInWindow:
        """Return the current window of `key`, with this event counted."""
        window = self.get(key)
        if window is None or now_s - window.start_s >= duration_s:
            self.pop(key, None)
            self[key] = window = SignInWindow(now_s, f"{key} {now_s:.3f}")
            while len(self) > MAX_ADDRESSES:
                del self[next(iter(self))]
        window.count += 1
        return window


class LoginThrottle:
    """Delay the responses to failed sign-ins of an address after FREE_FAILURES within FAILURE_WINDOW_S.

    A valid token is never delayed, whatever else its address has sent.
    """

    def __init__(self, clock_s: Callable[[], float]) -> None:
        self._clock_s = clock_s
        self._windows = _Windows()  # by address
        self._audited: deque[float] = deque(maxlen=MAX_AUDITED_FAILURES)

    def record_failure(self, address: str) -> FailedSignIn:
        """Count a failure. The first FREE_FAILURES of a window are audited, then numbers 16, 32, 64 and so on."""
        now_s = self._clock_s()
        window = self._windows.count(address, now_s, FAILURE_WINDOW_S)
        is_audited = window.count <= FREE_FAILURES or window.count.bit_count() == 1
        if is_audited and len(self._audited) == MAX_AUDITED_FAILURES and now_s - self._audited[0] < FAILURE_WINDOW_S:
            is_audited = False
        if is_audited:
            self._audited.append(now_s)
        delay_s = FAILURE_DELAY_S if window.count > FREE_FAILURES else 0.0
        return FailedSignIn(window.count, delay_s, is_audited, window.window)


class SignInLog:
    """Group sign-ins and sign-outs for the audit log, so that a script that repeats them does not flood it."""

    def __init__(self, clock_s: Callable[[], float]) -> None:
        self._clock_s = clock_s
        self._windows = _Windows()

    def record(self, what: str, access: Permission, address: str, name: str) -> SignInWindow:
        """Count a sign-in or sign-out, and return its window."""
        window = self._windows.count(f"{what} {access} {address}", self._clock_s(), SIGN_IN_WINDOW_S)
        if name not in window.names and len(window.names) < MAX_NAMES:
            window.names.append(name)
        return window


def _key(secret: str) -> bytes:
    return sha256(secret.encode("utf-8", "surrogateescape")).digest()
