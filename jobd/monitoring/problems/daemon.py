"""Conditions of the daemon, its disk, webhooks and schedules, and of single jobs."""

from __future__ import annotations

import math
import shlex
from functools import partial
from typing import Final

from msgspec.structs import replace

from jobd.config import AlertsSection
from jobd.core import quiet
from jobd.core.views import average_processing_s
from jobd.model.events import QueuePause, QuietRule
from jobd.model.job import DAY_MS, HOUR_MS, SECOND_MS
from jobd.model.problems import Cure, Subject
from jobd.model.responses import DatabaseHealth, DiskUse, PartHealth
from jobd.model.schedules import Schedule
from jobd.model.sizes import byte_size
from jobd.model.times import clock_time, duration
from jobd.model.webhooks import FailingWebhook
from jobd.monitoring.problems.condition import Finding, Scene, job_cure, plural

MIB: Final = 1 << 20
SKIPS: Final = 3  # in a row
TINY_PERCENT: Final = 2.0  # of the disk
REJECTED: Final = {  # by code
    "overloaded": "too many commands, claims or unread responses wait.",
    "storage_full": "the disk is full.",
    "too_many_queues": "too many queues have jobs (limits.queues).",
}
_DAEMON: Final = Subject(type="daemon")
_STORE: Final = Subject(type="store")
_WORKERS: Final = Cure("See the workers", "jobctl workers", "/workers")
_HEALTH: Final = Cure("See the health", "jobctl health", "/alerts")


def stalled_jobs(scene: Scene) -> Finding | None:
    count, recovered = len(scene.state.processing.stalled), scene.state.counters.recovered_lately(scene.at.now)
    if count + recovered <= scene.limits.stalled_jobs:
        return None
    were = "was" if recovered == 1 else "were"
    title = f"{plural(count, 'job', 'has', 'have')} stalled, and {recovered:,} {were} recovered in the last 10 minutes."
    cause = "Workers crash or hang."
    return Finding(_DAEMON, title, jobs=count, value=count + recovered, cause=cause, cure=(_WORKERS,))


def processing_jobs(scene: Scene) -> Finding | None:
    count = scene.state.totals["processing"]
    if count <= scene.limits.processing_jobs:
        return None
    title = f"{plural(count, 'job', 'is', 'are')} processing, more than alerts.processing_jobs expects."
    return Finding(_DAEMON, title, jobs=count, cure=(_WORKERS,))


def average_processing(scene: Scene) -> Finding | None:
    ms = average_processing_s(scene.state, scene.state.counters, scene.at) * SECOND_MS
    if ms <= scene.limits.average_processing:
        return None
    title = f"Jobs take {duration(ms)} on average (completed in the last hour, or processing)."
    return Finding(_DAEMON, title, value=ms, cure=(Cure("See the oldest", "jobctl stats", "/"),))


def cleanup_issues(scene: Scene) -> Finding | None:
    count, ids = scene.cleanup.invalid
    if count <= scene.limits.cleanup_issues:
        return None
    title = f"The latest cleanup run could not fix {plural(count, 'invalid row')}, for example {', '.join(ids)}."
    cause = "Such rows come from imports and manual edits."
    return Finding(_STORE, title, jobs=count, cause=cause, cure=(job_cure("See what is wrong", "validate", ids[0]),))


def granted_twice(scene: Scene) -> Finding | None:
    double_grants = scene.state.counters.double_grants
    count, last = double_grants.last_hour(scene.at.now), double_grants.last
    if count <= scene.limits.granted_twice or last is None:
        return None
    (token, next_token), (worker, next_worker) = last.tokens, last.workers
    title = (
        f"Two workers may have worked on it at once ({count} in the last hour): it was taken from {worker} (token "
        f"{token}) before its lock expired, and granted to {next_worker} (token {next_token})."
    )
    cause = "Compare these tokens with the tokens stored with its results."
    cure = job_cure("See why the first grant ended", "timeline", last.job_id)
    return Finding(Subject(type="job", job=last.job_id), title, jobs=count, cause=cause, cure=(cure,))


def part_unhealthy(name: str, scene: Scene) -> Finding | None:
    """A part of the latest health. A part that has not been measured yet is not unhealthy."""
    part: DatabaseHealth | PartHealth | None = getattr(scene.health.last, name, None)
    if part is None or part.status == "healthy":
        return None
    return Finding(Subject(type=name), part.message, cure=(_HEALTH,))


storage = partial(part_unhealthy, "storage")


def database(scene: Scene) -> Finding | None:
    """The database, beside its damage, which is a problem of its own."""
    found = part_unhealthy("database", scene)
    if found is None or _is_disk_sick(scene):
        return found
    title = found.title.removeprefix(scene.health.damage or "").strip()
    return replace(found, title=title, severity="warning") if title else None


def cache(scene: Scene) -> Finding | None:
    """Memory. While the disk does not respond, the mailbox waits for it, and that is the problem."""
    return None if _is_disk_sick(scene) else part_unhealthy("cache", scene)


def _is_disk_sick(scene: Scene) -> bool:
    return scene.health.last is not None and scene.health.last.database.status == "unhealthy"


def webhook(scene: Scene, each: FailingWebhook) -> Finding | None:
    if each.for_ms <= scene.limits.webhook_failing:
        return None
    waiting = plural(each.waiting, "message", "waits", "wait")
    carries = f" It carries these problems: {waiting}." if each.wants_problems else ""
    return Finding(
        Subject(type="webhook", webhook=each.name),
        f"Has accepted nothing for {duration(each.for_ms)}: {each.error}.{carries}",
        wait_ms=each.for_ms,
        severity="critical" if each.wants_problems else None,
        cure=(Cure("See its deliveries", f"jobctl webhooks deliveries {each.name}", f"/webhooks/{each.name}"),),
    )


def disk(scene: Scene) -> Finding | None:
    """Too little space is free, or it will be used soon."""
    space, limits, rejects = scene.space, scene.limits, scene.rejects_creates()
    if space is None or not space.total_bytes:
        return None
    free = 100 * space.free_bytes / space.total_bytes
    full_in_ms = math.inf if scene.full_in_ms is None else scene.full_in_ms
    is_filling = rejects or full_in_ms < limits.disk_full_within
    if not (is_filling or _is_low(space.free_bytes, space.total_bytes, limits)):
        return None
    use = scene.disk_use()
    has_pages = use is not None and not _is_low(space.free_bytes + use.free_page_bytes, space.total_bytes, limits)
    if has_pages and not is_filling and free >= TINY_PERCENT:  # the daemon uses its free pages first
        return None
    full = f", full in {duration(full_in_ms)}" if full_in_ms < DAY_MS else ""
    cures = [Cure("See what is stored", "jobctl disk", "/")]
    if use is not None and (use.not_jobd_bytes or 0) >= MIB:
        mount = f'"$(df --output=target {shlex.quote(space.path)} | tail -1)"'
        cures.append(Cure("See the other files on this disk", f"du -xh --max-depth=2 {mount} | sort -h | tail"))
    return Finding(
        Subject(type="disk"),
        f"{byte_size(space.free_bytes)} of {byte_size(space.total_bytes)} are free on the disk of {space.path}"
        f"{full}.{' New jobs are rejected.' if rejects else ''}",
        value=100 - free,
        severity="critical" if rejects or free < TINY_PERCENT or full_in_ms < HOUR_MS else None,
        cause=f"{_largest(use)}On a full disk the daemon rejects new jobs. Free some space, or shorten [retention].",
        cure=tuple(cures),
    )


def _is_low(free_bytes: int, total_bytes: int, limits: AlertsSection) -> bool:
    percent, least_bytes = 100 * free_bytes / total_bytes, min(limits.disk_free_bytes, total_bytes // 4)
    return percent < limits.disk_free_percent or free_bytes < least_bytes


def _largest(use: DiskUse | None) -> str:
    """Name what takes the most, the queue and kind and the other files; empty while that is not known."""
    if use is None:
        return ""
    foreign = use.not_jobd_bytes or 0
    texts = [(foreign, f"{byte_size(foreign)} are in files that are not jobd's. ")] if foreign >= MIB else []
    for largest in use.kinds[:1]:
        part, size = largest.main_part
        text = f"{largest.name} holds about {byte_size(largest.bytes)}, of which {byte_size(size)} are {part}. "
        texts.append((largest.bytes, text))
    return "".join(text for _, text in sorted(texts, reverse=True))


def pauses(scene: Scene) -> list[tuple[str, QueuePause]]:
    return list(scene.state.paused.items())


def paused_without_reason(scene: Scene, item: tuple[str, QueuePause]) -> Finding | None:
    found = None if item[1].reason else _paused(scene, *item)
    return found if found is not None and found.wait_ms > scene.limits.paused_without_reason else None


def paused_with_reason(scene: Scene, item: tuple[str, QueuePause]) -> Finding | None:
    return _paused(scene, *item) if item[1].reason else None


def _paused(scene: Scene, queue: str, pause: QueuePause) -> Finding:
    pairs = scene.due_of(queue)
    due, wait_ms = sum(pair.due for pair in pairs), max((pair.wait_ms for pair in pairs), default=0)
    title = f"Paused {pause.describe()}. {plural(due, 'job', 'waits', 'wait')}."
    cure = (Cure("Resume it", f"jobctl resume {shlex.quote(queue)}", "/queues", changes=True),)
    subject = Subject(type="queue", queue=queue)
    return Finding(subject, title, jobs=due, wait_ms=wait_ms, value=due, cure=cure, since=pause.at or scene.at.now)


def quieted(scene: Scene, rule: QuietRule) -> Finding:
    count = quiet.workers_of(scene.state, rule)
    subject = Subject(type="workers", host=rule.host, version=rule.version, queue=rule.queue)
    title = f"Quiet {rule.describe()}. It covers {plural(count, 'worker')}."
    cure = (Cure("End the rule", f"jobctl resume-worker --rule {rule.id}", "/workers", changes=True),)
    return Finding(subject, title, value=count, cure=cure, since=rule.at)


def firing(scene: Scene) -> list[Schedule]:
    """Return the schedules that are not paused."""
    return [each for each in scene.state.schedules.values() if each.pause is None]


def schedule_skipping(scene: Scene, schedule: Schedule) -> Finding | None:
    count, skip = schedule.skips_in_a_row, schedule.last_skip
    if skip is None or count < SKIPS:
        return None
    title = f"{count:,} times in a row were skipped. Last {clock_time(skip.scheduled_at)}: {skip.reason}"
    return _of_schedule(schedule, title, count)


def schedule_missed(scene: Scene, schedule: Schedule) -> Finding | None:
    if (at := schedule.last_missed_at) is None or scene.at.now - at >= HOUR_MS:
        return None
    title = (
        f"Nothing could fire until {clock_time(at)}. "
        f"Since its creation, {plural(schedule.missed, 'time')} created no job."
    )
    cause = "The daemon was down, no node led, the clock was suspect, or new jobs were rejected."
    cure = Cure("Make up a time", f"jobctl schedule run {schedule.id} --at TIME", changes=True)
    return _of_schedule(schedule, title, schedule.missed, cause, cure)


def _of_schedule(schedule: Schedule, title: str, value: int, cause: str = "", *cures: Cure) -> Finding:
    see = Cure("See its times", f"jobctl schedule {schedule.id}", f"/schedules/{schedule.id}")
    subject = Subject(type="schedule", schedule=schedule.id)
    return Finding(subject, title, value=value, cause=cause, cure=(see, *cures))


def rejecting(scene: Scene, code: str) -> Finding | None:
    """Many requests were rejected because something is full. The full disk is a problem of its own."""
    count = scene.rejected.get(code, 0)
    if count < scene.limits.rejecting or (code == "storage_full" and scene.rejects_creates()):
        return None
    title = f"{plural(count, 'request', 'was', 'were')} rejected in 5 minutes ({code}): {REJECTED[code]}"
    return Finding(Subject(type="code", code=code), title, jobs=count, cure=(Cure("See the load", "jobctl top", "/"),))


def damaged(scene: Scene) -> Finding | None:
    if scene.health.damage is None:
        return None
    cure = (
        Cure("See the repair while the daemon is stopped", "jobd doctor"),
        Cure("See the damage while it runs", "jobd doctor --running"),  # which names the first cure
    )
    return Finding(_STORE, scene.health.damage, jobs=len(scene.state.quarantined), cure=cure)


def clock(scene: Scene) -> Finding | None:
    if not scene.at.suspect:
        return None
    ahead_ms = abs(scene.at.now - scene.at.believed)
    title = f"The clock is suspect: {duration(ahead_ms)} ahead. Nothing is deleted or failed by age."
    cure = Cure("If the clock is right", "jobctl clock accept", "/clock", changes=True)
    return Finding(_STORE, title, value=min(ahead_ms, DAY_MS * 36_500), cure=(cure,))
