"""Who is signed in: sessions in memory, each opened by a token, and a brake on those who guess.

Knows no page. A session holds no token but its digest, and ends when that token is valid no more.
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

MAX_SESSIONS: Final = 200  # of each access; beyond it, the one of them that was used longest ago ends
IDLE_S: Final = 3_600.0
MAX_AGE_S: Final = 12 * 3_600.0
FREE_FAILURES: Final = 10  # sign-ins of one address that may fail before the answers are held back
FAILURE_WINDOW_S: Final = 60.0
FAILURE_DELAY_S: Final = 1.0  # for so long then
MAX_AUDITED_FAILURES: Final = 60  # entries of the audit log about wrong tokens, of all addresses within WRONG_WITHIN_S
MAX_ADDRESSES: Final = 1_024
SIGN_IN_WINDOW_S: Final = 60.0  # comings of one address with one access within it are one entry of the audit log
MAX_NAMES: Final = 10  # names in such an entry


class Session(Struct):
    """One browser that is signed in. `token` is the digest of what opened it; times are of the clock that was given.

    `by_tls`: it signed in by TLS, to us or to a proxy before us.
    """

    access: Permission
    token: bytes
    csrf: str
    created_s: float
    last_used_s: float
    flash: str = ""  # shown once, on the next page
    name: str = ""  # that the operator gave
    by_tls: bool = False

    def has_csrf(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self.csrf.encode())

    def take_flash(self) -> str:
        message, self.flash = self.flash, ""
        return message


class Sessions:
    """Sessions by the digest of their secret id. `access_of` says what a token allows now."""

    def __init__(self, access_of: Callable[[bytes], Permission | None], clock_s: Callable[[], float]) -> None:
        self._access_of = access_of
        self._clock_s = clock_s
        # A pool for each access: whoever has a token to look ends no session of those who may do things.
        self._pools: dict[Permission, dict[bytes, Session]] = {
            each: {} for each in get_args(Permission)
        }  # latest used last

    def sign_in(self, token: str, name: str = "", *, by_tls: bool = False) -> tuple[str, Session] | None:
        """A new session with its secret id, None where the token is not valid. `name` is the operator's."""
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
        """The session with this id, if it has not ended."""
        key, now_s = _key(secret), self._clock_s()
        session = self._take(key)
        if session is None or now_s - session.last_used_s >= IDLE_S or now_s - session.created_s >= MAX_AGE_S:
            return None
        access = self._access_of(session.token)
        if access != session.access:
            return None
        session.last_used_s = now_s
        self._pools[access][key] = session
        return session

    def sign_out(self, secret: str) -> None:
        self._take(_key(secret))

    def _take(self, key: bytes) -> Session | None:
        return next((pool.pop(key) for pool in self._pools.values() if key in pool), None)

    def __len__(self) -> int:
        return sum(len(pool) for pool in self._pools.values())


class FailedSignIn(Struct, frozen=True):
    """A wrong token: the how many-th of its address within its minute, how long the answer is held back, and whether
    it is worth an entry in the audit log. `spell` names that minute."""

    times: int
    delay_s: float
    is_audited: bool
    window: str


class _FailureWindow(Struct):
    """The wrong tokens of an address within a minute. `born_s` is when the first came."""

    start_s: float
    times: int = 0


class LoginThrottle:
    """Who has sent MOST_WRONG wrong tokens within WRONG_WITHIN_S hears so the later. That is all that it does: it is
    asked when a token was found to be wrong, so nobody with a right one is kept out, whatever others send from there.
    """

    def __init__(self, clock_s: Callable[[], float]) -> None:
        self._clock_s = clock_s
        self._windows: dict[str, _FailureWindow] = {}  # address -> the latest, the one that began last comes last
        self._audited: deque[float] = deque(maxlen=MAX_AUDITED_FAILURES)

    def record_failure(self, address: str) -> FailedSignIn:
        """One more. Told are the first, then ever fewer of them, and MOST_TOLD of all addresses within the time."""
        now_s = self._clock_s()
        spell = self._windows.get(address)
        if spell is None or now_s - spell.start_s >= FAILURE_WINDOW_S:
            self._windows.pop(address, None)
            self._windows[address] = spell = _FailureWindow(now_s)
            while len(self._windows) > MAX_ADDRESSES:
                del self._windows[next(iter(self._windows))]
        spell.times += 1
        is_told = spell.times <= FREE_FAILURES or spell.times.bit_count() == 1
        if is_told and len(self._audited) == MAX_AUDITED_FAILURES and now_s - self._audited[0] < FAILURE_WINDOW_S:
            is_told = False
        if is_told:
            self._audited.append(now_s)
        wait_s = FAILURE_DELAY_S if spell.times > FREE_FAILURES else 0.0
        return FailedSignIn(spell.times, wait_s, is_told, f"{address} {spell.start_s:.3f}")


class SignInWindow(Struct):
    """Sign-ins, or sign-outs, of one address with one access within TOGETHER_S. `spell` names them."""

    start_s: float
    window: str
    times: int = 0
    names: list[str] = msgspec.field(default_factory=list)  # that were given, the first MOST_NAMED of them


class SignInLog:
    """Who comes and goes, as the audit log has it: one entry for all that do the same at the same time, so that a
    script that signs in again and again does not fill it."""

    def __init__(self, clock_s: Callable[[], float]) -> None:
        self._clock_s = clock_s
        self._windows: dict[str, SignInWindow] = {}  # the one that began last comes last

    def record(self, what: str, access: Permission, address: str, name: str) -> SignInWindow:
        """One more of them, with those before it."""
        now_s, key = self._clock_s(), f"{what} {access} {address}"
        coming = self._windows.get(key)
        if coming is None or now_s - coming.start_s >= SIGN_IN_WINDOW_S:
            self._windows.pop(key, None)
            self._windows[key] = coming = SignInWindow(now_s, f"{key} {now_s:.3f}")
            while len(self._windows) > MAX_ADDRESSES:
                del self._windows[next(iter(self._windows))]
        coming.times += 1
        if name not in coming.names and len(coming.names) < MAX_NAMES:
            coming.names.append(name)
        return coming


def _key(secret: str) -> bytes:
    return sha256(secret.encode("utf-8", "surrogateescape")).digest()
