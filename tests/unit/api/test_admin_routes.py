"""The routes of the admin API whose handlers do more than send one command. test_calls.py has an example of each."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import msgspec.inspect
import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from jobd.api.admin_routes import ROUTES
from jobd.core.views import job_view
from jobd.http.auth import Authenticator
from jobd.model import responses
from jobd.model.commands import MakePlan, Operator, PlanFilter, RecordAction, Stats, Tick
from jobd.model.errors import ApiError
from jobd.model.job import Policy
from jobd.model.journal import JournalOutcomeUnknown, LeadershipLost
from jobd.model.storage import FormatNotRead
from tests.support.calls import DELIVERY, STATS
from tests.support.http_harness import TOKEN, FakeWebhooks, HttpHarness, request_bytes
from tests.support.polling import wait_until
from tests.unit.core.test_views import AT, JOB

P = "/admin/job-management"
STANDBY = responses.NodeView("b", "http://b", "standby", 0, 1, 0, 2, False)
AUTH = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[HttpHarness]:
    async with HttpHarness(
        ROUTES, tmp_path, authenticator=Authenticator("admin", tokens=[TOKEN]), admin=True
    ) as opened:
        yield opened


DELIVERY_7: dict[str, Any] = {"webhook": "q", "delivery": 7}
RESENT_3: dict[str, Any] = {"webhook": "q", "resent": 3}
# Actions that are not commands: method, path, body, audit entry.
AUDITED = [
    ("POST", "cleanup", None, RecordAction(what="cleanup")),
    ("POST", "cleanup", '{"reason":"why"}', RecordAction(what="cleanup", reason="why")),
    ("POST", "clock/accept", '{"reason":"why"}', RecordAction(what="accept-clock", reason="why")),
    ("GET", "backup", None, RecordAction(what="backup")),
    ("POST", "webhooks/q/resend", '{"id":7}', RecordAction(what="resend-delivery", details=DELIVERY_7)),
    ("POST", "webhooks/q/resend", '{"id":7,"reason":"why"}',
     RecordAction(what="resend-delivery", details=DELIVERY_7, reason="why")),
    ("POST", "webhooks/q/resend-dead-lettered", None, RecordAction(what="resend-dead-lettered", details=RESENT_3)),
    ("POST", "webhooks/q/resend-dead-lettered", '{"upto":9,"reason":"why"}',
     RecordAction(what="resend-dead-lettered", details=RESENT_3, reason="why")),
    ("POST", "webhooks/q/test", '{"reason":"why"}',
     RecordAction(what="test-webhook", details={"webhook": "q"}, reason="why")),
]  # fmt: skip
# Method, path with query, body, the field that is named (400), or the error.
REJECTED = [
    ("GET", "validate-job", None, "$.jobId"),
    ("GET", "validate-job?jobId=", None, "$.jobId"),
    ("GET", "validate-job?id=j", None, "$.id"),
    ("GET", "validate-job?jobId=a&jobId=b", None, "$.jobId"),
    ("GET", "stats?x=1", None, "$.x"),
    ("GET", "reports?limit=0", None, "$.limit"),
    ("GET", "reports?limit=501", None, "$.limit"),
    ("POST", "queues/a%20b/pause", None, "$.name"),
    ("POST", "queues/a%2Fb/pause", None, "$.name"),
    ("POST", "queues/%0a/pause", None, "$.name"),
    ("POST", "plans", '{"action":"explode","ids":["a"]}', "$.action"),
    ("POST", "plans", '{"action":"retry","ids":[]}', "$.ids"),
    ("POST", "plans", '{"action":"retry","filter":{"x":1}}', "$.filter.x"),
    ("GET", "plans/none", None, "plan_not_found"),
    ("POST", "webhooks/q/resend", '{"id":0}', "$.id"),
    ("POST", "webhooks/q/resend", None, "$.id"),
    ("POST", "webhooks/q/resend", '{"id":8}', "not_found"),
    ("POST", "webhooks/q/resend-dead-lettered", '{"upto":0}', "$.upto"),
    ("POST", "webhooks/none/resend-dead-lettered", None, "not_found"),
    ("POST", "webhooks/none/test", None, "not_found"),
    ("GET", "webhooks/none/deliveries", None, "not_found"),
    ("GET", "webhooks/q/deliveries?state=lost", None, "$.state"),
    ("GET", "webhooks/q/deliveries?limit=201", None, "$.limit"),
    ("GET", "webhooks/q/deliveries?cursor=x", None, "$.cursor"),
    ("GET", "jobs/a/artefact", None, "not_found"),
]


async def test_actions_that_are_not_commands_are_audited(harness: HttpHarness) -> None:
    for method, path, body, entry in AUDITED:
        harness.actor.received.clear()
        headers = {**AUTH, "X-Jobd-Operator": "eve"}
        assert (await harness.request(method, f"{P}/{path}", body, headers)).status == 200
        [noted] = (each for each in harness.actor.received if not isinstance(each.command, Tick))
        assert noted.command == entry
        assert noted.operator is not None
        assert noted.operator.name == "eve"
    assert harness.fakes.forced == [True, True]
    assert harness.fakes.resent == [("q", None), ("q", 9)]


async def test_a_wrong_request_is_rejected(harness: HttpHarness) -> None:
    for method, path, body, wrong in REJECTED:
        response = await harness.request(method, f"{P}/{path}", body, AUTH)
        if wrong.startswith("$"):
            assert (response.status, response.json["details"]) == (400, {"field": wrong}), path
        else:
            assert (response.status, response.error) == (404, wrong), path
    assert harness.actor.received == []


async def test_an_action_is_audited_even_if_its_client_has_disconnected(harness: HttpHarness) -> None:
    started, go = asyncio.Event(), asyncio.Event()

    async def slow(*_: object) -> responses.DeliveryView:
        started.set()
        await go.wait()
        return DELIVERY

    webhooks: Any = harness.services.webhooks
    webhooks.test = slow
    client = await harness.connect()
    client.send(request_bytes("POST", f"{P}/webhooks/q/test", headers=AUTH))
    await started.wait()
    await client.close()
    await wait_until(lambda: not harness.app.pending)
    stopping = asyncio.ensure_future(harness.stop(30))
    await asyncio.sleep(0.05)
    assert not stopping.done()
    go.set()
    await stopping
    assert [envelope.command for envelope in harness.actor.received] == [
        RecordAction(what="test-webhook", details={"webhook": "q"})
    ]


async def test_a_leader_steps_down_after_its_audit_entry(harness: HttpHarness) -> None:
    path, stepped = f"{P}/cluster/step-down", []
    assert (await harness.request("POST", path, headers=AUTH)).failure == (404, "not_found")
    assert (await harness.request("GET", "/v1/cluster", headers=AUTH)).data["role"] == "single"
    nodes = [responses.NodeView("a", "http://a", "leader", 0, 1, 0, 2, False), STANDBY]
    view = responses.ClusterView(role="leader", node="a", nodes=nodes)
    harness.services.cluster_view = lambda: view
    harness.services.step_down = lambda: stepped.append(True)
    done = await harness.request("POST", path, '{"reason":"why"}', AUTH)
    assert done.data == (await harness.request("GET", "/v1/cluster", headers=AUTH)).data == msgspec.to_builtins(view)
    assert stepped == [True]
    [audited] = harness.actor.received
    assert audited.command == RecordAction(what="step-down", reason="why")


@pytest.mark.parametrize(
    "changes", [{"seen_ms": responses.UNSEEN_MS}, {"lag_ms": responses.READY_MS}, {"role": "leader"}]
)
async def test_a_step_down_without_a_ready_standby_needs_force(harness: HttpHarness, changes: dict[str, Any]) -> None:
    path, stepped = f"{P}/cluster/step-down", []
    harness.services.cluster_view = lambda: responses.ClusterView(role="leader", nodes=[replace(STANDBY, **changes)])
    harness.services.step_down = lambda: stepped.append(True)
    refreshes: list[bool] = []

    async def refresh() -> None:
        refreshes.append(True)

    harness.services.refresh_nodes = refresh
    rejected = await harness.request("POST", path, headers=AUTH)
    assert (rejected.status, rejected.error, stepped, refreshes) == (409, "no_standby", [], [True])
    assert "Start jobd on another node" in rejected.body.decode()
    assert harness.actor.received == []
    assert (await harness.request("POST", path, '{"force":true}', AUTH)).status == 200
    assert stepped == [True]


@pytest.mark.parametrize("verb", ["test", "resend", "resend-dead-lettered"])
async def test_a_webhook_action_after_the_leadership_was_released_is_not_done(harness: HttpHarness, verb: str) -> None:
    async def fail(*_: object) -> None:
        raise LeadershipLost("this node has released leadership")

    webhooks: Any = harness.services.webhooks
    webhooks.test = webhooks.redeliver = webhooks.redeliver_all = fail
    body = '{"id":7}' if verb == "resend" else ""
    with capture_logs() as logs:
        rejected = await harness.request("POST", f"{P}/webhooks/q/{verb}", body, AUTH)
    assert (rejected.status, rejected.error, rejected.json["details"]) == (503, "not_leader", {"leader": None})
    assert [each["event"] for each in logs] == ["rejected"]
    assert harness.actor.received == []


async def test_a_webhook_action_without_a_response_of_the_journal_has_an_unknown_outcome(harness: HttpHarness) -> None:
    async def fail(_: object) -> None:
        raise JournalOutcomeUnknown

    webhooks: Any = harness.services.webhooks
    webhooks.test = fail
    rejected = await harness.request("POST", f"{P}/webhooks/q/test", headers=AUTH)
    assert (rejected.status, rejected.error) == (503, "outcome_unknown")
    assert rejected.json["details"] == {"outcome": "unknown"}
    assert harness.actor.received == []


async def test_the_pages_of_an_export_are_one_audit_entry(harness: HttpHarness) -> None:
    """So are those of a read-only token. A rejected export is not recorded."""
    harness.app.authenticator.replace_tokens([TOKEN], ["reader-token-0123456789abcdef"])
    reader = {"Authorization": "Bearer reader-token-0123456789abcdef"}
    for query, headers in (("", AUTH), ("?cursor=7", AUTH), ("", {**reader, "X-Jobd-Operator": "rob"}), ("", reader)):
        assert (await harness.request("GET", f"{P}/export{query}", headers=headers)).status == 200
    noted = [envelope for envelope in harness.actor.received if isinstance(envelope.command, RecordAction)]
    operators = [envelope.operator for envelope in noted]
    assert [each.who for each in operators if each] == ["admin", "admin", "rob", "reader"]
    assert [envelope.command.details for envelope in noted] == [None, None, {"access": "read"}, {"access": "read"}]
    parts = [each.part_of for each in operators if each]
    assert parts[0] == parts[1]
    assert len(set(parts)) == 3
    harness.actor.respond = lambda command: ApiError("overloaded", "Too many wait.")
    before = len(harness.actor.received)
    assert (await harness.request("GET", f"{P}/export", headers=AUTH)).status == 503
    assert len(harness.actor.received) == before + 1


async def test_an_action_proceeds_if_it_cannot_be_audited(harness: HttpHarness) -> None:
    harness.actor.respond = lambda command: ApiError("storage_full", "The disk is full.")
    with capture_logs() as logged:
        assert (await harness.request("POST", f"{P}/cleanup", headers=AUTH)).status == 200
    assert harness.fakes.forced == [True]
    missed = {"event": "audit_missed", "log_level": "warning", "action": "cleanup", "by": "admin"}
    assert missed | {"reason": "storage_full"} in logged


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (None, ""),
        ("", ""),
        ("  eve@build-3 ", "eve@build-3"),
        ("zoë", "zoë"),
        ("a\tb \u202e\x9bc", "a b c"),
        ("\x80\x81", ""),
        ("x" * 300, "x" * 64),
    ],
)
async def test_an_operator_is_known_by_the_name_given(harness: HttpHarness, given: str | None, name: str) -> None:
    headers = AUTH if given is None else {**AUTH, "X-Jobd-Operator": given}
    assert (await harness.request("POST", f"{P}/force-reset", '{"jobId":"j"}', headers)).status == 200
    [envelope] = harness.actor.received
    assert envelope.operator == Operator(name, f"unix uid={os.getuid()}")
    assert envelope.by == (f"admin:{name}" if name else "admin")


async def test_a_read_has_no_operator(harness: HttpHarness) -> None:
    await harness.request("GET", f"{P}/jobs/j", headers={**AUTH, "X-Jobd-Operator": "eve"})
    [envelope] = harness.actor.received
    assert (envelope.operator, envelope.by) == (None, "admin")


async def test_over_tcp_an_operator_comes_from_an_address(tmp_path: Path) -> None:
    authenticator = Authenticator("admin", tokens=[TOKEN], hosts=["x"])
    async with HttpHarness(ROUTES, tmp_path, authenticator=authenticator, admin=True) as harness:
        await harness.request("POST", f"{P}/queues/q/pause", None, {**AUTH, "Host": "x"})
        [envelope] = harness.actor.received
        assert envelope.operator == Operator("", "127.0.0.1")


async def test_a_plan_is_made_and_applied_as_asked(harness: HttpHarness) -> None:
    body = '{"action":"retry","filter":{"status":"failed","queue":"q","since":1},"reason":"r"}'
    await harness.request("POST", f"{P}/plans", body, AUTH)
    assert harness.fakes.planned == [
        MakePlan(action="retry", filter=PlanFilter(status="failed", queue="q", since=1), reason="r")
    ]
    await harness.request("POST", f"{P}/plans/p1/apply", headers={**AUTH, "X-Jobd-Operator": "eve"})
    assert [operator.name for operator in harness.fakes.operators] == ["eve"]


READER = {"Authorization": "Bearer reader-token-0123456789abcdef"}


async def test_a_read_only_token_sees_a_validated_job_without_its_lock_id(harness: HttpHarness) -> None:
    harness.app.authenticator.replace_tokens([TOKEN], [READER["Authorization"].split()[1]])
    for headers, shown in ((AUTH, True), (READER, False)):
        held = job_view(JOB, AT, Policy(), admin=True)
        view = responses.ValidateJobView("a", held, responses.Validation(True, [], True), 1)
        harness.actor.respond = lambda _, view=view: responses.Response(view)
        response = await harness.request("GET", f"{P}/validate-job?jobId=a", headers=headers)
        assert ("lock_id" in response.data["job"]["lock"]) == shown
        assert response.data["job"]["lock"]["worker"] == "w-1"


async def test_stats_say_whether_a_cleanup_is_running(harness: HttpHarness) -> None:
    harness.actor.respond = lambda _: responses.Response(STATS)
    data = (await harness.request("GET", f"{P}/stats", headers=AUTH)).data
    assert (data["totalJobs"], data["cleanupRunning"], data["timeSinceLastCleanup"]) == (3, True, 1234)
    assert data["disk"] == {"path": "/var/lib/jobd/jobd.db", "freeBytes": 3 << 30, "totalBytes": 8 << 30}
    assert harness.actor.received[0].command == Stats()
    harness.actor.respond = lambda _: ApiError("overloaded", "Too much.")
    assert (await harness.request("GET", f"{P}/stats", headers=AUTH)).status == 503


@pytest.mark.parametrize(
    ("status", "code", "success"), [("healthy", 200, True), ("degraded", 200, True), ("unhealthy", 503, True)]
)
async def test_health_has_the_same_body_whatever_its_status(
    harness: HttpHarness, status: Any, code: int, success: bool
) -> None:
    harness.fakes.status = status
    response = await harness.request("GET", f"{P}/health", headers=AUTH)
    assert (response.status, response.json["success"]) == (code, success)
    data = response.json["data"]
    disk = {"path": "/var/lib/jobd/jobd.db", "freeBytes": 3 << 30, "totalBytes": 8 << 30}
    assert data["database"] == {"status": status, "message": "measured", "totalJobs": 7, **disk}
    assert data["cleanupStatus"] == {"running": False, "timeSinceLastCleanup": None, "message": "idle"}


async def test_no_delivery_is_sent_again_while_an_older_node_runs(
    harness: HttpHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(self: FakeWebhooks, name: str, id_: int) -> None:
        raise FormatNotRead("node b is older")

    monkeypatch.setattr(FakeWebhooks, "redeliver", fail)
    rejected = await harness.request("POST", f"{P}/webhooks/q/resend", '{"id":7}', AUTH)
    assert (rejected.status, rejected.json["error"]) == (503, "overloaded")
    assert rejected.json["message"] == "The outbox of the webhook cannot be written: node b is older."


async def test_deliveries_are_filtered_by_state_and_paged(harness: HttpHarness) -> None:
    target = f"{P}/webhooks/q/deliveries?state=dead-lettered&limit=5&cursor=9"
    assert (await harness.request("GET", target, headers=AUTH)).status == 200
    assert harness.fakes.asked_deliveries == [("q", "dead-lettered", 9, 5)]


async def test_metrics_are_text(harness: HttpHarness) -> None:
    response = await harness.request("GET", "/metrics", headers=AUTH)
    assert (response.status, response.body) == (200, b"jobd_stalled_jobs 0\n")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


async def test_the_old_spelling_of_artifact_gets_a_hint(harness: HttpHarness) -> None:
    response = await harness.request("GET", f"{P}/jobs/a/artefact", headers=AUTH)
    assert (response.status, response.error) == (404, "not_found")
    assert f"{P}/jobs/a/artifact" in response.json["message"]


async def test_the_old_spelling_of_artifact_in_a_filter_of_the_audit_log_is_rejected(harness: HttpHarness) -> None:
    response = await harness.request("GET", f"{P}/audit?action=artefact", headers=AUTH)
    assert (response.status, response.error) == (400, "invalid_request")
    assert response.json["message"] == "`$.action`: the action is spelled artifact."
