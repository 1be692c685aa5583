"""The rules for directives to workers, and for quiet rules."""

from __future__ import annotations

from msgspec.structs import asdict

from jobd.core import guards, quiet
from jobd.core.transaction import Transaction
from jobd.core.worker_presence import Directive
from jobd.model.commands import MAX_QUIET_RULES, AddQuietRule, DirectWorker, EndQuietRule, QuietRules
from jobd.model.errors import api_error
from jobd.model.events import QuietRule
from jobd.model.responses import DirectedView, DirectiveView, QuietRuleList, QuietRuleView, Response
from jobd.model.times import duration


def direct(tx: Transaction, command: DirectWorker) -> Response:
    """Keep the directive for the next claims of the worker, unless its waiting claim shows that it obeys.

    The actor answers the waiting ones.
    """
    presence, name = tx.state.presence, command.name
    if (seen := presence.workers.get(name)) is None:
        processes = [each for each in presence.workers if each.startswith(f"{name}-")][:3]  # of `jobctl worker`
        hint = f"Did you mean {', '.join(processes)}? " if processes else ""
        message = (
            f"Worker {name} has not been seen since the start of the daemon. {hint}List the workers: jobctl workers"
        )
        raise api_error("worker_not_found", message, worker=name)
    if (state := presence.state(seen)) in ("died", "gone"):
        advice = (
            "A new process of this name is not quiet, unless a rule covers it: jobctl quiet lists the rules"
            if command.action == "resume"
            else "For workers that appear later, make a rule: jobctl quiet --host HOST --version VERSION --reason TEXT"
        )
        message = (
            f"Worker {name} {'died' if state == 'died' else 'is gone'}: it was last seen "
            f"{duration(tx.now - presence.heard_at(seen))} ago, so no process would get this. {advice}"
        )
        raise api_error("worker_gone", message, worker=name, state=state)
    about = seen.about
    says_quiet = about is not None and about.quiet
    is_obeyed = seen.is_quiet == says_quiet == (command.action == "quiet") and command.action != "stop"
    if not (is_obeyed and seen.waiting and seen.directive is None):
        instance = None if about is None else about.instance
        presence.direct(seen, Directive(DirectiveView(command.action, tx.call.by, command.reason), instance))
    return Response(DirectedView(name, command.action, state, sent=seen.waiting > 0))


def add_rule(tx: Transaction, command: AddQuietRule) -> Response:
    """Add a rule. One with the same workers gets the new reason and end, and keeps its id and start."""
    selects = command.host, command.version, command.queue
    if selects == (None, None, None):
        message = "Give a host, a version or a queue. One worker is quieted by its name: jobctl quiet NAME"
        raise guards.invalid("host", message)
    guards.check_until(tx, command.until, "Leave it out to keep the rule until an operator ends it.")
    known = next((rule for rule in tx.state.quiet.values() if rule.selects == selects), None)
    if known is None and len(tx.state.quiet) >= MAX_QUIET_RULES:
        message = f"There are {MAX_QUIET_RULES} quiet rules. List them with jobctl quiet, and end one first."
        raise api_error("too_many_quiet_rules", message, limit=MAX_QUIET_RULES)
    number, since = (f"q{tx.state.next_event}", tx.now) if known is None else (known.id, known.at)
    rule = QuietRule(number, *selects, command.reason, tx.call.by, since, command.until)
    if known is None or (known.reason, known.until) != (rule.reason, rule.until):
        guards.check_format(tx, "quiet rules")
        tx.quiet_workers(rule)
    return Response(_view(tx, tx.state.quiet[number]))


def end_rule(tx: Transaction, command: EndQuietRule) -> Response:
    if (rule := tx.state.quiet.get(command.rule)) is None:
        message = f"There is no quiet rule {command.rule}: it has ended, or never existed. List the rules: jobctl quiet"
        raise api_error("quiet_rule_not_found", message, rule=command.rule)
    guards.check_format(tx, "quiet rules")
    response = Response(_view(tx, rule))
    tx.resume_workers(rule, command.reason)
    return response


def list_rules(tx: Transaction, command: QuietRules) -> Response:
    return Response(QuietRuleList([_view(tx, rule) for rule in tx.state.quiet.values()]))


def _view(tx: Transaction, rule: QuietRule) -> QuietRuleView:
    return QuietRuleView(**asdict(rule), workers=quiet.workers_of(tx.state, rule))
