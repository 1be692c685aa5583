"""The errors and the exported names of the clients."""

from __future__ import annotations

import pickle

import pytest

import jobd.client
from jobd.client import ERRORS, AlreadyLocked, LockLost
from jobd.model.errors import ERROR_STATUS


def test_every_error_code_has_an_exception_with_its_status() -> None:
    ours = {code: kind.status for code, kind in ERRORS.items() if code not in ("unreachable", "bad_response")}
    assert ours == ERROR_STATUS
    assert {kind.__name__ for kind in ERRORS.values()} <= set(jobd.client.__all__)


def test_all_names_of_the_package_can_be_imported() -> None:
    assert all(getattr(jobd.client, name) is not None for name in jobd.client.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = jobd.client.Nothing


def test_errors_survive_pickling_and_show_their_code() -> None:
    error = LockLost("Gone.", details={"reason": "cancelled", "cancel_requested": True}, status=409)
    restored = pickle.loads(pickle.dumps(error))
    assert (type(restored), restored.reason, restored.cancel_requested, str(restored)) == (
        LockLost,
        "cancelled",
        True,
        "Gone. [lock_lost]",
    )


def test_details_of_an_unexpected_type_are_none() -> None:
    error = AlreadyLocked("Taken.", details={"locked_by": 5, "lock_expires_at": True})
    assert (error.locked_by, error.lock_expires_at) == (None, None)
    assert not LockLost("Gone.").cancel_requested
