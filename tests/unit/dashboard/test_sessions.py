"""Limits of sessions, throttling of failed sign-ins, and grouping for the audit log."""

from __future__ import annotations

from jobd.dashboard import sessions
from jobd.http.auth import Permission
from tests.support.http_harness import TOKEN


def test_failed_sign_ins_are_audited_ever_more_rarely() -> None:
    now_s = 0.0
    throttle = sessions.LoginThrottle(lambda: now_s)
    found = [throttle.record_failure("10.0.0.1") for _ in range(40)]
    assert [each.count for each in found if each.is_audited] == [*range(1, 11), 16, 32]
    assert [each.delay_s for each in found] == [0.0] * 10 + [sessions.FAILURE_DELAY_S] * 30
    now_s = sessions.FAILURE_WINDOW_S
    repeated = throttle.record_failure("10.0.0.1")
    assert (repeated.count, repeated.delay_s, repeated.is_audited) == (1, 0.0, True)
    assert repeated.window != found[0].window == found[39].window
    audited = sum(throttle.record_failure(f"10.0.1.{number}").is_audited for number in range(200))
    assert audited == sessions.MAX_AUDITED_FAILURES - 1
    now_s += sessions.FAILURE_WINDOW_S
    assert throttle.record_failure("10.0.1.7").is_audited


async def test_the_numbers_of_sessions_and_addresses_are_limited() -> None:
    access: Permission = "full"
    store = sessions.Sessions(lambda digest: access, lambda: 0.0)
    secrets = [found[0] for _ in range(sessions.MAX_SESSIONS + 1) if (found := store.sign_in(TOKEN))]
    assert len(store) == sessions.MAX_SESSIONS
    assert store.find(secrets[0]) is None
    assert store.find(secrets[1]) is not None
    throttle = sessions.LoginThrottle(lambda: 0.0)
    for number in range(sessions.MAX_ADDRESSES + 1):
        for _ in range(sessions.FREE_FAILURES):
            throttle.record_failure(f"10.0.0.{number}")
    assert throttle.record_failure("10.0.0.1").count == sessions.FREE_FAILURES + 1
    assert throttle.record_failure("10.0.0.0").count == 1
    log = sessions.SignInLog(lambda: 0.0)
    for number in range(sessions.MAX_ADDRESSES + 1):
        log.record("sign-in", "read", f"10.0.0.{number}", "eve")
    assert log.record("sign-in", "read", "10.0.0.1", "eve").count == 2
    assert log.record("sign-in", "read", "10.0.0.0", "eve").count == 1
    for number in range(sessions.MAX_NAMES + 5):
        window = log.record("sign-in", "read", "10.0.0.9", f"name-{number}")
    assert window.names == ["eve", *(f"name-{number}" for number in range(sessions.MAX_NAMES - 1))]
