"""Quiet, resume and stop workers: the page that asks for a reason, and its form."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from msgspec import Meta

from jobd.dashboard.context import Viewer, redirect_with_flash
from jobd.dashboard.filters import convert_fields
from jobd.dashboard.pages import PAUSE_CHOICES, PageData, query
from jobd.model.commands import (
    AddQuietRule,
    Command,
    DirectiveAction,
    DirectWorker,
    EndQuietRule,
    QuietRules,
    QuietWorker,
    ResumeWorker,
    StopWorker,
    Workers,
)
from jobd.model.errors import api_error, checked
from jobd.model.fields import Text
from jobd.model.responses import QuietRuleList, Response, WorkerList

_Word = Annotated[str, Meta(max_length=253)]
_COMMANDS: Final[dict[DirectiveAction, type[DirectWorker]]] = {
    "quiet": QuietWorker,
    "resume": ResumeWorker,
    "stop": StopWorker,
}
_DONE: Final = {"quiet": "takes no new jobs", "resume": "takes jobs again", "stop": "stops"}


class QuietQuery(Command, frozen=True, kw_only=True):
    """A directive to the worker `name`, the end of a quiet `rule`, or a new one for `host`, `version` and `queue`."""

    action: DirectiveAction = "quiet"
    name: _Word = ""
    host: _Word = ""
    version: _Word = ""
    queue: _Word = ""
    rule: _Word = ""


class QuietForm(QuietQuery, frozen=True, kw_only=True):
    csrf: str = ""
    reason: Text = ""
    for_ms: Literal["", "900000", "3600000", "14400000", "86400000"] = ""


async def confirm_quiet(viewer: Viewer, asked: QuietQuery) -> PageData:
    """Ask for the reason. The form on the page sends the directive, or begins or ends the rule."""
    workers: WorkerList
    rules: QuietRuleList
    workers, rules = await query(viewer, Workers(limit=1), QuietRules())
    rule = next((each for each in rules.rules if each.id == asked.rule), None)
    if asked.rule and rule is None:
        raise api_error("quiet_rule_not_found", f"There is no quiet rule {asked.rule}: it has ended.")
    selects = {name: value for name in ("host", "version", "queue") if (value := getattr(asked, name))}
    here = [group for group in workers.groups if group.host == asked.host and group.version == asked.version]
    return {
        "asked": asked,
        "rule": rule,
        "selects": selects,
        "by_state": here[0].by_state if here and not asked.queue else {},
        "pause_choices": PAUSE_CHOICES,
        "label": {"quiet": "Quiet", "resume": "Resume", "stop": "Stop"}[asked.action],
    }


async def change_quiet(viewer: Viewer, form: QuietForm) -> Response:
    """Send the directive, or begin or end the rule, and return to the workers."""
    until = viewer.now + int(form.for_ms) if form.for_ms else None
    reason = form.reason.strip() or None
    command: Any
    if form.rule:
        command, done = EndQuietRule(rule=form.rule, reason=reason), "The quiet rule has ended."
    elif form.name:
        fields = {"name": form.name, "reason": reason}
        command = convert_fields(fields, _COMMANDS[form.action])
        done = f"Worker {form.name} {_DONE[form.action]} from its next claim on."
    else:
        selects = {"host": form.host or None, "version": form.version or None, "queue": form.queue or None}
        given = {**selects, "reason": reason, "until": until}
        command = convert_fields({name: value for name, value in given.items() if value is not None}, AddQuietRule)
        done = "The quiet rule holds: its workers get no jobs."
    checked(await viewer.ask(command))
    return redirect_with_flash(viewer, "/workers", done)
