"""The films of the demo, and its checks."""

from __future__ import annotations

import hashlib
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobd.cli.demo import recovery
from jobd.cli.demo.processes import render
from jobd.model.events import EventView


def _job(results: Path, data: bytes, **changes: Any) -> Any:
    """A completed job with `data` as its result."""
    (results / "picture-01.png").write_bytes(data)
    metadata = {"sha256": hashlib.sha256(data).hexdigest()}
    path = str(results / "picture-01.png")
    values = {"id": "picture-01", "kind": "picture", "status": "completed", "file_path": path}
    return SimpleNamespace(**{**values, "metadata_value": metadata, **changes})


@pytest.mark.slow
def test_a_film_reports_each_frame_and_is_a_whole_animated_png(tmp_path: Path) -> None:
    reported: list[float] = []
    film = render(-0.1, 0.95, recovery.FRAMES, lambda percent, _: reported.append(percent))
    assert len(reported) == recovery.FRAMES
    assert reported == sorted(reported)
    assert reported[-1] == 99
    assert (film.count(b"fcTL"), film.count(b"fdAT")) == (recovery.FRAMES, recovery.FRAMES - 1)
    assert recovery.result_error(_job(tmp_path, film, kind="film"), tmp_path) == ""
    assert "frames" in recovery.result_error(_job(tmp_path, film), tmp_path)


def test_a_damaged_or_missing_result_is_detected(tmp_path: Path) -> None:
    data = render(-0.1, 0.95, 1, lambda *_: None)
    assert recovery.result_error(_job(tmp_path, data), tmp_path) == ""
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    sum_of_good = {"sha256": hashlib.sha256(data).hexdigest()}
    assert "checksum differs" in recovery.result_error(
        _job(tmp_path, bytes(flipped), metadata_value=sum_of_good), tmp_path
    )
    assert "chunk is wrong" in recovery.result_error(_job(tmp_path, bytes(flipped)), tmp_path)
    assert recovery.result_error(_job(tmp_path, data[:100]), tmp_path)
    assert "not a PNG" in recovery.result_error(_job(tmp_path, b"x" * 100), tmp_path)
    assert "failed" in recovery.result_error(_job(tmp_path, data, status="failed"), tmp_path)
    assert recovery.result_error(_job(tmp_path, data, metadata_value=None), tmp_path)
    incomplete_job = _job(tmp_path, data)
    (tmp_path / "picture-01.png").unlink()
    assert "No such file" in recovery.result_error(incomplete_job, tmp_path)


def _event(event_type: str, to: str, by: str, **details: object) -> EventView:
    return EventView(1, 1_772_366_400_000, event_type, None, to, by, None, dict(details))


SEEN = (
    _event("created", "queued", "client"),
    _event("granted", "processing", "worker:w-2", worker="w-2", fencing_token=7),
    _event("stalled", "queued", "recovery"),
    _event("granted", "processing", "worker:w-3", worker="w-3", fencing_token=9),
    _event("completed", "completed", "worker:w-3"),
)


def _observations() -> recovery.Observations:
    return recovery.Observations(
        killed_worker="w-2", killed_job="film-01", killed_token=7, killed_progress=25, killed_code=-signal.SIGKILL
    )


def _confirmed(observed: recovery.Observations, events: list[EventView]) -> list[bool]:
    return [was_seen for _, was_seen in recovery.checks(observed, [], {"film-01": events}, {})][:4]


def test_the_claims_are_confirmed_if_everything_was_observed() -> None:
    assert _confirmed(_observations(), list(SEEN)) == [True, True, True, True]


@pytest.mark.parametrize(
    ("missing", "expected"),
    [(2, [True, False, True, True]), (3, [True, True, False, False]), (4, [True, True, True, False])],
)
def test_a_claim_is_not_confirmed_if_its_event_is_missing(missing: int, expected: list[bool]) -> None:
    assert _confirmed(_observations(), [event for number, event in enumerate(SEEN) if number != missing]) == expected


def test_a_claim_needs_a_higher_token_and_a_killed_worker() -> None:
    same = _event("granted", "processing", "worker:w-3", worker="w-3", fencing_token=7)
    assert _confirmed(_observations(), [*SEEN[:3], same, SEEN[4]]) == [True, True, False, True]
    observed = _observations()
    observed.killed_code = 0
    assert _confirmed(observed, list(SEEN))[0] is False
    assert _confirmed(recovery.Observations(), []) == [False, False, False, False]
