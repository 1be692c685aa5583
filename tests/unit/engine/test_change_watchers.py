"""Notifications of changes for dashboard pages. Their stream is tested in tests/unit/dashboard/test_live_updates.py."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from jobd.engine.change_watchers import Watcher
from jobd.engine.event_feed import EventFeed
from jobd.model.errors import ApiException
from jobd.model.events import Event, EventFilter
from tests.support.memory_storage import MemoryStorage

MOST = 4
ALL = EventFilter()
HOW: Any = {"follow": True, "cut": lambda: None}


def change(job_id: str, queue: str = "q", kind: Any = "created") -> Event:
    return Event(1, 1, kind, 1, job_id, queue, None, None, "client")


@pytest.fixture
def feed() -> EventFeed:
    return EventFeed(MemoryStorage(), 0, MOST)


def nothing() -> None:
    pass


def woken(*watchers: Watcher) -> list[bool]:
    is_woken = [watcher.changed.is_set() for watcher in watchers]
    for watcher in watchers:
        watcher.changed.clear()
    return is_woken


async def test_each_watcher_is_notified_of_its_changes(feed: EventFeed) -> None:
    everything = feed.watch(queue=None, job_id=None, cut=nothing)
    queue = feed.watch(queue="video", job_id=None, cut=nothing)
    job = feed.watch(queue=None, job_id="a", cut=nothing)
    assert woken(everything, queue, job) == [False, False, False]
    feed.publish([change("b"), change("c")])
    assert woken(everything, queue, job) == [True, False, False]
    feed.publish([change("b"), change("a")])
    assert woken(everything, queue, job) == [True, False, True]
    feed.publish([change("b", "video"), change("c")])
    assert woken(everything, queue, job) == [True, True, False]
    feed.publish([change("a", "video")])
    assert woken(everything, queue, job) == [True, True, True]
    feed.publish([change("", "other", "queue_paused")])
    assert woken(everything, queue, job) == [True, True, True], "every page shows paused queues"
    feed.touch("a")
    assert woken(everything, queue, job) == [False, False, True]


async def test_a_watcher_that_leaves_is_not_notified_and_does_not_count_towards_the_limit(feed: EventFeed) -> None:
    places = [feed.watch(queue=None, job_id=None, cut=nothing), feed.watch(queue="q", job_id=None, cut=nothing)]
    places += [feed.watch(queue=None, job_id="a", cut=nothing) for _ in range(2)]
    assert feed.listeners == MOST
    for take in (lambda: feed.watch(queue=None, job_id=None, cut=nothing), lambda: feed.listen(ALL, **HOW)):
        with pytest.raises(ApiException) as no:
            take()
        assert (no.value.error.code, "limits.event_streams" in no.value.error.message) == ("overloaded", True)
    for watcher in places[:3]:
        watcher.leave()
        watcher.leave()
    assert feed.listeners == 1
    feed.publish([change("a")])
    assert woken(*places) == [False, False, False, True]
    places[3].leave()
    assert feed.listeners == 0
    watchers = feed._watchers
    assert [watchers._all, watchers._of_all, watchers._of_queue, watchers._of_job] == [set(), set(), {}, {}]


async def test_watchers_end_when_the_daemon_stops(feed: EventFeed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobd.engine.event_feed.CLOSING_S", 0.01)
    cut = asyncio.Event()
    watcher = feed.watch(queue=None, job_id="a", cut=cut.set)
    assert not watcher.ended.is_set()
    feed.close()
    assert (watcher.ended.is_set(), watcher.changed.is_set()) == (True, True)
    await cut.wait()
    with pytest.raises(ApiException) as no:
        feed.watch(queue=None, job_id=None, cut=nothing)
    assert no.value.error.code == "shutting_down"


async def test_watchers_keep_no_events_in_memory(feed: EventFeed) -> None:
    feed.watch(queue=None, job_id=None, cut=nothing)
    for _ in range(100):
        feed.publish([change("a")])
    assert not feed.rounds
    assert not feed._news
