"""Generate the tables of docs/python.md from the signatures and docstrings of jobd/client.

`python -m tests.support.python_reference` rewrites the page. A test fails if it is out of date.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, get_args, get_type_hints

from jobd.client import (
    ERRORS,
    AdminClient,
    Discard,
    HandlerContext,
    JobClient,
    Retry,
    Snooze,
    Stopped,
    Worker,
    requests,
)
from jobd.client.apis import AdminApi, WorkerApi
from jobd.client.methods import signature_of
from jobd.model.api_call import ApiCall
from jobd.model.calls import ADMIN_API, WORKER_API
from jobd.model.commands import JobCommand
from tests import ROOT

PAGE: Final = ROOT / "docs/python.md"
COMMAND: Final = "python -m tests.support.python_reference"
BEGIN: Final = f"<!-- generated from the signatures and docstrings of jobd/client by `{COMMAND}` -->\n"
END: Final = "<!-- end of the generated part -->\n"

# The parameters of the classes. The defaults come from the signatures.
_CLIENT: Final = {
    "token": "the token of a TCP address; None: the first line of the file `$JOBD_WORKER_TOKEN_FILE`",
    "timeout_s": "the longest wait for one response, in seconds",
    "retry_for_s": "how long a call is repeated while the daemon is unreachable or overloaded, in seconds; 0: never",
    "tls": "an `ssl.SSLContext` for an `https` address; None: the certificates of the system",
}
PARAMETERS: Final[dict[type, dict[str, str]]] = {
    JobClient: {
        "endpoint": "an [address](#addresses)",
        "name": "the name of your program in the timelines of jobs that it cancels",
        **_CLIENT,
    },
    AdminClient: {
        "endpoint": "an [address](#addresses)",
        **_CLIENT,
        "token": "the admin token; None: `$ADMIN_TOKEN`, else the first line of the file `$ADMIN_TOKEN_FILE`",
        "operator": "your name in the audit log and in timelines",
    },
    Worker: {
        "client": "an [address](#addresses), or an `AsyncJobClient`, whose settings are used",
        "queues": "the queues to claim from",
        "concurrency": "how many jobs run at a time",
        "name": "the name that operators see; None: made of host and process id",
        "lock_ttl_ms": "how long a lock lasts without renewal, in ms: 1,000 to 86,400,000",
        "progress_timeout_ms": "progress timeout, in ms; 0: none",
        "timeout": "the longest run of a handler, a `timedelta` or seconds; None: no limit",
        "grace_s": "how long running handlers may continue after SIGTERM or `stop`, in seconds",
    },
}
# Results that the annotation does not name.
RESULTS: Final = {
    "handler": "a decorator",
    "iterate_jobs": "iterator of `JobView`",
    "iterate_queues": "iterator of `QueueView`",
    "iterate_schedules": "iterator of `ScheduleView`",
    "export_jobs": "iterator of `bytes`",
    "events": "iterator of `StreamedEvent`",
}


def parameters(owner: type) -> list[str]:
    """Return the table of the parameters of a class. Raises KeyError if one has no text."""
    table = ["| parameter | default | meaning |", "| --- | --- | --- |"]
    for parameter in inspect.signature(owner).parameters.values():
        table.append(f"| `{parameter.name}` | `{parameter.default!r}` | {PARAMETERS[owner][parameter.name]} |")
    return table


def methods(owner: type, names: Iterable[str]) -> list[str]:
    """Return the table of the methods of a class."""
    table = ["| method | result | description |", "| --- | --- | --- |"]
    for name in names:
        function = getattr(owner, name)
        if isinstance(function, ApiCall):
            table.append(f"| `{name}{signature_of(function)}` | `{result_of(function)}` | {text_of(function)} |")
            continue
        _, *given = inspect.signature(function).parameters.values()
        call = inspect.Signature([each.replace(annotation=each.empty) for each in given])
        source = getattr(requests, name, function)
        table.append(f"| `{name}{call}` | {result(name, source)} | {text(function)} |")
    return table


def result(name: str, function: Callable[..., Any]) -> str:
    if name in RESULTS:
        return RESULTS[name]
    annotation = str(inspect.signature(function).return_annotation)
    if annotation.startswith("ApiRequest["):
        annotation = annotation.removeprefix("ApiRequest[").removesuffix("]")
    return f"`{annotation.replace('responses.', '')}`"


class _FieldName:
    """Returns the name of an attribute instead of its value."""

    def __getattr__(self, name: str) -> str:
        return name


def result_of(call: ApiCall[Any, Any]) -> str:
    """Return the type of the result of a call."""
    if call.select is None:
        return str(call.response.__name__)
    hint = get_type_hints(call.response)[call.select(_FieldName())]
    return re.sub(r"(?:\w+\.)+", "", str(hint) if get_args(hint) else hint.__name__)


def text_of(call: ApiCall[Any, Any]) -> str:
    """Return the description of a call: what it does, whether it is repeated, and its exceptions."""
    parts = [" ".join(call.options.get("summary", "").split()) or text(call.command)]
    if not call.repeatable:
        parts.append("The client does not repeat the request after a lost response.")
    is_of_job = issubclass(call.command, JobCommand)
    codes = (*(("job_not_found",) if is_of_job else ()), *call.command.errors, *call.options.get("errors", ()))
    if codes:
        parts.append(f"Raises {', '.join(ERRORS[code].__name__ for code in codes)}.")
    return " ".join(parts).replace("|", "\\|")


def text(documented: Any) -> str:
    """Return a docstring as one line of a table."""
    doc = documented.__doc__
    assert doc, f"{documented} has no docstring"
    return " ".join(doc.split()).replace("|", "\\|")


def public(*owners: type) -> list[str]:
    """Return the names of the public methods in the order of their definition."""
    names = [name for owner in owners for name in vars(owner) if not name.startswith("_")]
    return list(dict.fromkeys(names))


def bases(client: type) -> list[type]:
    """Return the groups of calls that a client has."""
    return [group for group in (*WORKER_API, *ADMIN_API) if issubclass(client, group)]


def errors() -> list[str]:
    table = ["| exception | code | status | meaning |", "| --- | --- | --- | --- |"]
    for code, error in ERRORS.items():
        table.append(f"| `{error.__name__}` | `{code}` | {error.status or 'none'} | {text(error)} |")
    return table


def tables() -> str:
    """Return the generated part of the page."""
    parts = [
        ["## JobClient"],
        ["`AsyncJobClient` has the same parameters and methods, and [`stream`](api.md#command-streams)."],
        parameters(JobClient),
        methods(JobClient, public(*bases(JobClient), WorkerApi, JobClient)),
        ["## Worker"],
        parameters(Worker),
        methods(Worker, ["handler", "run", "stop", "serve"]),
        ["## Handler context"],
        ["`AsyncHandlerContext` has `progress` as a coroutine, and its `cancelled` is an `asyncio.Event`."],
        methods(HandlerContext, ["progress", "set_result", "raise_if_lost"]),
        ["| exception | meaning |", "| --- | --- |"]
        + [f"| `{each.__name__}` | {text(each)} |" for each in (Retry, Snooze, Discard, Stopped)],
        ["## AdminClient"],
        ["`AsyncAdminClient` has no method that sends or receives a file; call those with `asyncio.to_thread`."],
        parameters(AdminClient),
        methods(AdminClient, public(*bases(AdminClient), AdminApi, AdminClient)),
        ["## Exceptions"],
        errors(),
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def generated() -> dict[Path, str]:
    """Return the page with the text that it must have."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return {PAGE: f"{before}{BEGIN}\n{tables()}\n\n{END}{after}"}


def main() -> None:
    """Write the page."""
    for file, content in generated().items():
        file.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
