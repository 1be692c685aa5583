"""Conditions of the daemon, its disk and its webhooks, and of single jobs."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from functools import partial
from typing import Final

from msgspec.structs import replace

from jobd.core import quiet
from jobd.core.views import average_processing_s
from jobd.model.job import DAY_MS, HOUR_MS, SECOND_MS
from jobd.model.problems import Cure, Problem, Subject
from jobd.model.responses import DatabaseHealth, DiskUse, PartHealth
from jobd.model.storage import DiskSpace
from jobd.model.times import duration
from jobd.monitoring.problems.condition import GIB, Finding, Scene, Thresholds, plural, problem_id

MIB: Final = 1 << 20
TINY_PERCENT: Final = 2.0  # of the disk
REJECTED: Final = {  # by code
    "overloaded": "too many commands, claims or unread responses wait.",
    "storage_full": "the disk is full.",
    "too_many_queues": "too many queues have jobs (limits.queues).",
}
NAMED: Final = 3
_WORKERS: Final = Cure("See the workers", "jobctl workers", "/workers")
_HEALTH: Final = Cure("See the health", "jobctl health", "/alerts")


def stalled_jobs(scene: Scene) -> Iterator[Finding]:
    count, recovered = len(scene.state.processing.stalled), scene.state.counters.recovered_lately(scene.at.now)
    if count + recovered > scene.limits.stalled_jobs:
        title = (
            f"{plural(count, 'job')} {'has' if count == 1 else 'have'} stalled, and {recovered:,} "
            f"{'was' if recovered == 1 else 'were'} recovered in the last 10 minutes."
        )
        cause = "Workers crash or hang."
        yield Finding(subject=DAEMON, title=title, value=count + recovered, jobs=count, cause=cause, cure=(_WORKERS,))


def processing_jobs(scene: Scene) -> Iterator[Finding]:
    count = scene.state.totals["processing"]
    if count > scene.limits.processing_jobs:
        are = "is" if count == 1 else "are"
        title = f"{plural(count, 'job')} {are} processing, more than alerts.processing_jobs expects."
        yield Finding(subject=DAEMON, title=title, value=count, jobs=count, cure=(_WORKERS,))


def average_processing(scene: Scene) -> Iterator[Finding]:
    ms = average_processing_s(scene.state, scene.state.counters, scene.at) * SECOND_MS
    if ms > scene.limits.average_processing_ms:
        title = f"Jobs take {duration(ms)} on average (completed in the last hour, or processing)."
        yield Finding(subject=DAEMON, title=title, value=ms, cure=(Cure("See the oldest", "jobctl stats", "/"),))


def cleanup_issues(scene: Scene) -> Iterator[Finding]:
    count, ids = scene.invalid
    if count > scene.limits.cleanup_issues:
        title = f"The latest cleanup run could not fix {plural(count, 'invalid row')}, for example {', '.join(ids)}."
        cause = "Such rows come from imports and manual edits."
        cure = Cure("See what is wrong", f"jobctl validate {ids[0]}", f"/jobs/{ids[0]}")
        yield Finding(subject=STORE, title=title, value=count, jobs=count, cause=cause, cure=(cure,))


def granted_twice(scene: Scene) -> Iterator[Finding]:
    double_grants = scene.state.counters.double_grants
    count, last = double_grants.last_hour(scene.at.now), double_grants.last
    if count <= scene.limits.granted_twice or last is None:
        return
    (token, next_token), (worker, next_worker) = last.tokens, last.workers
    title = (
        f"Two workers may have worked on it at once ({count} in the last hour): it was taken from {worker} (token "
        f"{token}) before its lock expired, and granted to {next_worker} (token {next_token})."
    )
    cause = "Compare these tokens with the tokens stored with its results."
    cure = Cure("See why the first grant ended", f"jobctl timeline {last.job_id}", f"/jobs/{last.job_id}")
    yield Finding(subject=_job(last.job_id), title=title, value=count, jobs=count, cause=cause, cure=(cure,))


def part_unhealthy(name: str, scene: Scene) -> Iterator[Finding]:
    """A part of the latest health. A part that has not been measured yet is not unhealthy."""
    part: DatabaseHealth | PartHealth | None = getattr(scene.health, name, None)
    if part is not None and part.status != "healthy":
        yield Finding(subject=Subject(type=name), title=part.message, cure=(_HEALTH,))


def database(scene: Scene) -> Iterator[Finding]:
    """The database, beside its damage, which is a problem of its own."""
    for found in part_unhealthy("database", scene):
        if _is_disk_sick(scene):
            yield found
        elif title := found.title.removeprefix(scene.damage or "").strip():
            yield replace(found, title=title, severity="warning")


def cache(scene: Scene) -> Iterator[Finding]:
    """Memory. While the disk does not respond, the mailbox waits for it, and that is the problem."""
    return part_unhealthy("cache", scene) if not _is_disk_sick(scene) else iter(())


def _is_disk_sick(scene: Scene) -> bool:
    return scene.health is not None and scene.health.database.status == "unhealthy"


storage = partial(part_unhealthy, "storage")


def webhooks(scene: Scene) -> Iterator[Finding]:
    for each in scene.failing_webhooks:
        if each.for_ms <= scene.limits.webhook_failing_ms:
            continue
        waiting = f"{plural(each.waiting, 'message')} wait{'s' if each.waiting == 1 else ''}"
        carries = f" It carries these problems: {waiting}." if each.wants_problems else ""
        title = f"Has accepted nothing for {duration(each.for_ms)}: {each.error}.{carries}"
        cure = Cure("See its deliveries", f"jobctl webhooks deliveries {each.name}", f"/webhooks/{each.name}")
        yield Finding(
            subject=Subject(type="webhook", webhook=each.name),
            title=title,
            value=each.for_ms,
            wait_ms=each.for_ms,
            severity="critical" if each.wants_problems else None,
            cure=(cure,),
        )


def disk(scene: Scene) -> Iterator[Finding]:
    """Too little space is free, or it will be used soon."""
    space, limits = scene.space, scene.limits
    if space is None or not space.total_bytes:
        return
    free = 100 * space.free_bytes / space.total_bytes
    full_in_ms = math.inf if scene.full_in_ms is None else scene.full_in_ms
    is_low = _is_low(space.free_bytes, space.total_bytes, limits)
    if (
        is_low and free >= TINY_PERCENT and (use := scene.disk_use()) is not None
    ):  # the daemon uses its free pages first
        is_low = _is_low(space.free_bytes + use.free_page_bytes, space.total_bytes, limits)
    if not (scene.rejects_creates or is_low or full_in_ms < limits.disk_full_within_ms):
        return
    title = f"{_bytes(space.free_bytes)} of {_bytes(space.total_bytes)} are free on the disk of {space.path}"
    if full_in_ms < DAY_MS:
        title += f", full in {duration(full_in_ms)}"
    is_urgent = scene.rejects_creates or free < TINY_PERCENT or full_in_ms < HOUR_MS
    yield Finding(
        subject=Subject(type="disk"),
        title=f"{title}. New jobs are rejected." if scene.rejects_creates else f"{title}.",
        value=100 - free,
        severity="critical" if is_urgent else None,
        cause=f"{_largest(scene.disk_use())}On a full disk the daemon rejects new jobs. Free some space, or shorten "
        "[retention].",
        cure=(Cure("See what is stored", "jobctl disk", "/"), *_foreign(scene.disk_use(), space)),
    )


def _is_low(free_bytes: int, total_bytes: int, limits: Thresholds) -> bool:
    percent, least_bytes = 100 * free_bytes / total_bytes, min(limits.disk_free_bytes, total_bytes // 4)
    return percent < limits.disk_free_percent or free_bytes < least_bytes


def _largest(use: DiskUse | None) -> str:
    """Name what takes the most, the queue and kind and the other files; empty while that is not known."""
    if use is None:
        return ""
    foreign = use.not_jobd_bytes or 0
    texts = [(foreign, f"{_bytes(foreign)} are in files that are not jobd's. ")] if foreign >= MIB else []
    for largest in use.kinds[:1]:
        part, size = largest.main_part
        text = f"{largest.name} holds about {_bytes(largest.bytes)}, of which {_bytes(size)} are {part}. "
        texts.append((largest.bytes, text))
    return "".join(text for _, text in sorted(texts, reverse=True))


def _foreign(use: DiskUse | None, space: DiskSpace) -> Iterator[Cure]:
    if use is not None and (use.not_jobd_bytes or 0) >= MIB:
        mount = f'"$(df --output=target {shlex.quote(space.path)} | tail -1)"'
        yield Cure("See the other files on this disk", f"du -xh --max-depth=2 {mount} | sort -h | tail")


def paused_without_reason(scene: Scene) -> Iterator[Finding]:
    for _, found in _paused(scene, has_reason=False):
        if found.wait_ms > scene.limits.paused_without_reason_ms:
            yield found


def known(scene: Scene) -> Iterator[Problem]:
    """Pauses with a reason and quiet rules, which need no action."""
    for since, found in _paused(scene, has_reason=True):
        yield _known("paused", since or scene.at.now, found)
    for rule in list(scene.state.quiet.values()):
        count = quiet.workers_of(scene.state, rule)
        found = Finding(
            subject=Subject(type="workers", host=rule.host, version=rule.version, queue=rule.queue),
            title=f"Quiet {rule.describe()}. It covers {plural(count, 'worker')}.",
            value=count,
            cure=(Cure("End the rule", f"jobctl resume-worker --rule {rule.id}", "/workers", changes=True),),
        )
        yield _known("quiet", rule.at or scene.at.now, found)


def _known(condition: str, since: int, found: Finding) -> Problem:
    return Problem(
        id=problem_id(condition, found.subject),
        condition=condition,
        severity="notice",
        subject=found.subject,
        since=since,
        jobs=found.jobs,
        value=found.value,
        title=found.title,
        cure=list(found.cure),
    )


def _paused(scene: Scene, *, has_reason: bool) -> Iterator[tuple[int | None, Finding]]:
    waiting: dict[str, tuple[int, int]] = {}  # queue -> due jobs, the longest wait
    for pair in scene.due:
        if pair.queue in scene.state.paused:
            due, wait_ms = waiting.get(pair.queue, (0, 0))
            waiting[pair.queue] = due + pair.due, max(wait_ms, pair.wait_ms)
    for queue, pause in list(scene.state.paused.items()):
        due, wait_ms = waiting.get(queue, (0, 0))
        if bool(pause.reason) == has_reason:
            found = Finding(
                subject=Subject(type="queue", queue=queue),
                title=f"Paused {pause.describe()}. {plural(due, 'job')} wait{'s' if due == 1 else ''}.",
                value=due,
                jobs=due,
                wait_ms=wait_ms,
                cure=(Cure("Resume it", f"jobctl resume {shlex.quote(queue)}", "/queues", changes=True),),
            )
            yield pause.at, found


def rejecting(scene: Scene) -> Iterator[Finding]:
    """Many requests were rejected because something is full. The full disk is a problem of its own."""
    for code, count in scene.rejected.items():
        if count >= scene.limits.rejecting and not (code == "storage_full" and scene.rejects_creates):
            yield Finding(
                subject=Subject(type="code", code=code),
                title=f"{plural(count, 'request')} {'was' if count == 1 else 'were'} rejected in 5 minutes ({code}): "
                f"{REJECTED[code]}",
                value=count,
                jobs=count,
                cure=(Cure("See the load", "jobctl top", "/"),),
            )


def damaged(scene: Scene) -> Iterator[Finding]:
    if scene.damage is not None:
        count = len(scene.state.quarantined)
        cure = (
            Cure("See the repair while the daemon is stopped", "jobd doctor"),
            Cure("See the damage while it runs", "jobd doctor --running"),  # which names the first cure
        )
        yield Finding(subject=STORE, title=scene.damage, value=max(count, 1), jobs=count, cure=cure)


def clock(scene: Scene) -> Iterator[Finding]:
    if scene.at.suspect:
        ahead_ms = abs(scene.at.now - scene.at.believed)
        title = f"The clock is suspect: {duration(ahead_ms)} ahead. Nothing is deleted or failed by age."
        cure = Cure("If the clock is right", "jobctl clock accept", "/clock", changes=True)
        yield Finding(subject=STORE, title=title, value=min(ahead_ms, DAY_MS * 36_500), cure=(cure,))


def _job(job_id: str) -> Subject:
    return Subject(type="job", job=job_id)


DAEMON: Final = Subject(type="daemon")
STORE: Final = Subject(type="store")


def _bytes(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"
