"""Valid and invalid requests generated from the OpenAPI documents, for every call of both APIs.

Responses are checked against the documents. Nothing here depends on single calls, except for the ids of existing jobs.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import CheckFunction
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Ok
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import ignored_auth, negative_data_rejection, positive_data_acceptance

from jobd.api import admin_routes, worker_routes
from jobd.api.openapi import document
from jobd.http.routing import Route
from jobd.model.api_call import LINES
from jobd.model.job import STATUSES
from tests.proof.faults.harness import Counts, Trial, check
from tests.support.daemon_process import TOKEN, DaemonProcess, free_port
from tests.support.daemon_process import call as call_daemon

# Rules that no schema expresses: only these messages may reject a request that is valid by its schema.
ALLOWED_REJECTIONS: Final = (
    "got a number.",  # in JSON Schema 5.0 is an integer
    "run_at or delay_ms",
    "Give either cron or every_ms",
    "Give a host, a version or a queue",
    "`$.cron`",
    "`$.timezone`",
    "is not in full seconds",
    "Name the program that maintains",
    "is less than base_ms",
    "This cursor belongs to a list with another status.",
    "is not in the future",
    "in the list twice",
    "separated by commas",  # the filters of events
    "must be the `id` of an event",
    "must be the `next_cursor` of the previous call",
    "is not an event type",
    "cannot be combined with",
    "Set either `filter` or `ids`",
    "requires the `filter` of the previous plan",
    "the daemon chooses the jobs",
    "`$.storage_key`",
    "`$.updates.storage_key`",
)
STATES: Final = {"held": "processing", "waiting": "queued", "finished": "cancelled"}  # and the status of each
_P: Final = "/admin/job-management"
# Calls about objects that this daemon does not have or whose id cannot be guessed: they may always fail.
ALWAYS_FAILING: Final = frozenset(
    {
        f"GET {_P}/jobs/{{id}}/artifact",
        f"POST {_P}/cluster/step-down",
        f"GET {_P}/plans/{{plan_id}}",
        f"POST {_P}/plans/{{plan_id}}/apply",
        f"GET {_P}/webhooks/{{name}}/deliveries",
        f"POST {_P}/webhooks/{{name}}/resend",
        f"POST {_P}/webhooks/{{name}}/resend-dead-lettered",
        f"POST {_P}/webhooks/{{name}}/test",
        f"DELETE {_P}/quiet/{{rule}}",
        f"POST {_P}/workers/{{name}}/take-back",  # no worker is silent
    }
)
EXCLUDED_CHECKS: Final[list[CheckFunction]] = [positive_data_acceptance]  # FAIR is more exact


@schemathesis.serializer(LINES)
def _lines(_: schemathesis.SerializationContext, value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else json.dumps(value).encode()


def strict_document(title: str, table: Iterable[Route]) -> dict[str, Any]:
    """Return the document of a TCP listener: it requires the token, and responses have no undocumented fields."""
    root: dict[str, Any] = json.loads(json.dumps(document(title, table)))
    for schema in root["components"]["schemas"].values():
        schema.setdefault("additionalProperties", False)
    for methods in root["paths"].values():
        for call in methods.values():
            call["security"] = [choice for choice in call["security"] if choice] or call["security"]
    return root


class ExistingJobs:
    """Existing jobs in many states, so that requests do not all fail with job_not_found."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self._daemon = daemon
        self._count = 0
        self.locks: dict[str, str] = {}

    def create(self, state: str) -> str:
        """Make a job that is queued, was just granted, or is cancelled and has a late result."""
        self._count += 1
        job_id = f"known-{self._count}"
        self._daemon.post("/v1/jobs", {"id": job_id, "payload": {"n": self._count}})
        schedule = {"every_ms": 3_600_000, "job": {}, "source": "fuzz", "paused": True}
        with closing(self._daemon.worker()) as connection:
            call_daemon(connection, "PUT", f"/v1/schedules/{job_id}", schedule)
        if state in ("held", "finished"):
            self.locks[job_id] = self._daemon.post(f"/v1/jobs/{job_id}/start", {"worker": "w"}).data["lock_id"]
        if state == "finished":
            self._daemon.post(f"/v1/jobs/{job_id}/cancel")
            self._daemon.post(f"/v1/jobs/{job_id}/complete", {"lock_id": self.locks.pop(job_id), "metadata": 1})
        return job_id

    def insert_into(self, case: Case[Any], job_id: str, status: str) -> None:
        """Put this job and its status into `case`, if it names a job."""
        if isinstance(case.path_parameters, dict) and "id" in case.path_parameters:
            case.path_parameters["id"] = job_id
        if isinstance(case.query, dict) and "jobId" in case.query:
            case.query["jobId"] = job_id
        if isinstance(case.body, dict):
            if "jobId" in case.body:
                case.body["jobId"] = job_id
            if case.path == f"{_P}/quiet" and case.method == "POST":
                case.body |= {"host": "fuzz"}
                case.body.pop("until", None)
            if "job" in case.body and case.method == "PUT":  # a schedule
                case.body.pop("cron", None)
                case.body |= {"every_ms": 3_600_000, "source": "fuzz"}
            if case.body.get("from") in STATUSES:
                case.body["from"] = status
            for name in ("lock_id", "lockId"):
                if name in case.body:
                    case.body[name] = self.locks.get(job_id, "none")


class ApiFuzzer:
    """One API of a daemon, with its document."""

    def __init__(self, title: str, table: Iterable[Route], port: int, known: ExistingJobs) -> None:
        self._schema = schemathesis.openapi.from_dict(strict_document(title, table))
        self._url = f"http://127.0.0.1:{port}"
        self._known = known
        self._session = requests.Session()
        self._session.headers["Authorization"] = f"Bearer {TOKEN}"
        self.statuses: Counter[str] = Counter()
        self.succeeded: set[str] = set()
        self.calls: set[str] = set()
        self.without_input: set[str] = set()
        self._sent_without_token: set[tuple[str, GenerationMode]] = set()

    def run(self, valid: int, invalid: int) -> None:
        """Send that many valid and invalid requests for each call, and more valid ones if none of them succeeded."""
        for result in self._schema.get_all_operations():
            operation = result.ok() if isinstance(result, Ok) else None
            assert operation is not None, result
            self.calls.add(operation.label)
            for attempt in range(3):
                self._call(operation, GenerationMode.POSITIVE, valid, attempt)
                if operation.label in self.succeeded | ALWAYS_FAILING:
                    break
            self._call(operation, GenerationMode.NEGATIVE, invalid)
        self._session.close()

    def _call(
        self, operation: APIOperation[Any, Any, Any, Any], mode: GenerationMode, examples: int, attempt: int = 0
    ) -> None:
        states = itertools.cycle([*STATES, "unknown"])  # all equally often, also in a short run

        @seed(20_240_601 + attempt)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Case[Any]) -> None:
            state = next(states)
            if mode == GenerationMode.POSITIVE and state in STATES:
                self._known.insert_into(case, self._known.create(state), STATES[state])
            self._ask(case, mode)

        try:
            ask()
        except Unsatisfiable:
            assert mode == GenerationMode.NEGATIVE
            self.without_input.add(operation.label)
        except FailureGroup as found:
            raise AssertionError(f"{operation.label}: {found}") from None

    def _ask(self, case: Case[Any], mode: GenerationMode) -> None:
        if isinstance(case.body, dict) and case.body.get("wait_ms") in range(20, 60_000):
            case.body["wait_ms"] = 20
        if mode == GenerationMode.POSITIVE and case.operation.path.endswith("/events"):
            case.query = {**(case.query or {}), "follow": "false"}  # otherwise the response does not end
        response = case.call(base_url=self._url, session=self._session)
        self.statuses[str(response.status_code)] += 1
        if response.status_code < 300:
            self.succeeded.add(case.operation.label)
        # A stream is always accepted. Its response has the errors of its lines.
        # A parameter that is an empty list is not sent, so the request may be valid.
        sent = parse_qs(urlsplit(str(response.request.url)).query, keep_blank_values=True)
        is_lost = isinstance(case.query, dict) and bool(case.query.keys() - sent.keys())
        unasked = (
            [*EXCLUDED_CHECKS, negative_data_rejection] if is_lost or case.media_type == LINES else EXCLUDED_CHECKS
        )
        # The check of the token sends each request again without it: the first valid and invalid one of each call.
        if (first := (case.operation.label, mode)) in self._sent_without_token:
            unasked = [*unasked, ignored_auth]
        self._sent_without_token.add(first)
        case.validate_response(response, excluded_checks=unasked)
        if mode == GenerationMode.POSITIVE and response.status_code == 400:
            message = response.json()["message"]
            assert any(words in message for words in ALLOWED_REJECTIONS), f"{case.as_curl_command()}\n{message}"


@check(rounds=200, few=3)
def openapi(trial: Trial) -> Counts:
    """Requests that follow or violate the OpenAPI documents: never a 5xx, each response is as documented."""
    token = trial.directory / "worker-token"
    token.write_text(TOKEN)
    ports = {"WORKER": free_port(), "ADMIN": free_port()}
    environ = {f"JOBD_{name}_LISTEN": f"127.0.0.1:{port}" for name, port in ports.items()}
    with DaemonProcess(trial.directory, "", JOBD_WORKER_TOKEN_FILE=str(token), **environ) as daemon:
        known = ExistingJobs(daemon)
        apis = [
            ApiFuzzer("worker", worker_routes.ROUTES, ports["WORKER"], known),
            ApiFuzzer("admin", admin_routes.ROUTES, ports["ADMIN"], known),
        ]
        for api in apis:
            api.run(trial.rounds, trial.rounds if trial.timed else trial.rounds // 3)
            unmet = api.calls - api.succeeded - ALWAYS_FAILING
            assert not unmet, f"never a success: {sorted(unmet)}"
        assert b" level=error " not in daemon.log, daemon.log[-4000:]
        assert daemon.stop() == 0
    statuses = apis[0].statuses + apis[1].statuses
    assert all(int(status) < 500 for status in statuses), statuses
    spared = sum(len(api.without_input) for api in apis)
    counts = {f"responses {status}": statuses[status] for status in sorted(statuses)}
    return {
        "calls": sum(len(api.calls) for api in apis),
        "calls without input": spared,
        "requests": statuses.total(),
        **counts,
    }
