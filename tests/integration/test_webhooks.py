"""Webhooks of a real daemon with a real receiver: signed, in order, over reloads, restarts and a full disk."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from msgspec.structs import replace
from standardwebhooks import Webhook, WebhookVerificationError

from jobd.cli import exit_codes
from jobd.storage.store import Store
from tests.integration.test_docs import OPERATIONS, blocks
from tests.support.cli_harness import Jobctl
from tests.support.daemon_process import TOKEN, DaemonProcess, DaemonResponse
from tests.support.forked_process import ForkedDaemon
from tests.support.polling import poll_until
from tests.support.webhook_receiver import ReceivedMessage, Receiver, accept, responding

SECRET: Final = f"whsec_{base64.b64encode(b'sssssssssssssssssssssssssssssss!').decode()}"


def config(receiver: Receiver, more: str = "", name: str = "billing", rest: str = "") -> str:
    return (
        f'{rest}\n[[webhooks]]\nname = "{name}"\nurl = "{receiver.url}?token=hush"\nallow_private = true\n'
        f'secret = "{SECRET}"\n{more}\n'
    )


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as opened:
        yield opened


def run_lifecycle(daemon: DaemonProcess, job_id: str) -> None:
    """Run one job lifecycle, which has three events."""
    daemon.post("/v1/jobs", {"id": job_id})
    grant = daemon.post(f"/v1/jobs/{job_id}/start", {"worker": "w-1"}).data
    daemon.post(f"/v1/jobs/{job_id}/complete", {"lock_id": grant["lock_id"], "metadata": 1})


LIFE: Final = ["job.created", "job.granted", "job.completed"]


def types_about(messages: list[ReceivedMessage], job_id: str) -> list[str]:
    """Return the types of the messages about a job, each once, in order of first arrival."""
    return list(dict.fromkeys(each.event["type"] for each in messages if each.event["subject"] == f"jobs/{job_id}"))


def done(messages: list[ReceivedMessage], *job_ids: str) -> bool:
    return all(len(types_about(messages, job_id)) == 3 for job_id in job_ids)


def has_message_about(job_id: str, messages: list[ReceivedMessage]) -> bool:
    return bool(types_about(messages, job_id))


def view(daemon: DaemonProcess) -> dict[str, Any]:
    (found,) = daemon.admin("GET", "webhooks").data["webhooks"]
    return dict(found)


def test_a_lifecycle_is_delivered_in_order_and_the_documented_receiver_accepts_it(
    tmp_path: Path, receiver: Receiver
) -> None:
    with ForkedDaemon(tmp_path, config(receiver)) as daemon:
        run_lifecycle(daemon, "a")
        messages = receiver.wait_for(lambda messages: done(messages, "a"))
        assert daemon.stop() == 0
    assert types_about(messages, "a") == LIFE
    (example,) = (block for block in blocks(OPERATIONS) if block.mark == "file: check_webhook.py")
    schema: dict[str, Any] = {}
    exec(example.text.replace("whsec_…", SECRET), schema)
    for each in messages:
        headers = {name.lower(): value for name, value in each.headers.items()}
        assert schema["handle"](each.body, headers) == each.event
        with pytest.raises(WebhookVerificationError):
            Webhook(SECRET).verify(each.body + b" ", headers)
    last = messages[-1].event
    assert last["data"]["job_id"] == "a"
    assert last["source"].startswith("/jobd/")
    assert b"lock_id" not in b"".join(each.body for each in messages)


@pytest.fixture
def jobctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Jobctl:
    monkeypatch.setenv("JOBD_ADMIN_URL", f"unix:{tmp_path}/admin.sock")
    monkeypatch.setenv("ADMIN_TOKEN", TOKEN)
    return Jobctl(capsys)


@pytest.mark.slow
def test_operators_list_repeat_and_test_deliveries(tmp_path: Path, receiver: Receiver, jobctl: Jobctl) -> None:
    receiver.respond = responding(500, "not today")
    with ForkedDaemon(tmp_path, config(receiver, 'events = ["job.created"]')) as daemon:
        run_lifecycle(daemon, "a")
        poll_until(lambda: view(daemon)["failed"] > 0)
        shown = view(daemon)
        assert (shown["name"], shown["waiting"], shown["events"]) == ("billing", 1, ["job.created"])
        assert shown["last_error"] == "500: not today"
        assert shown["url"] == f"http://127.0.0.1:{receiver.port}/…"

        def first_waiting() -> Any:
            (delivery,) = daemon.admin("GET", "webhooks/billing/deliveries?state=waiting").data["deliveries"]
            return delivery

        poll_until(lambda: first_waiting()["status"] == 500)  # the outcome is counted before it is stored
        receiver.respond = accept
        waiting = first_waiting()
        assert (waiting["type"], waiting["subject"]) == ("job.created", "jobs/a")
        assert daemon.admin("POST", "webhooks/billing/resend", {"id": waiting["id"]}).status == 200
        poll_until(lambda: view(daemon)["delivered"] == 1)
        before = len(receiver.received)
        assert daemon.admin("POST", "webhooks/billing/resend", {"id": waiting["id"]}).data["state"] == "waiting"
        messages = receiver.wait_for(lambda messages: len(messages) > before)
        assert messages[-1].body == messages[0].body
        assert messages[-1].headers["webhook-id"] == messages[0].headers["webhook-id"]
        assert daemon.admin("POST", "webhooks/billing/resend", {"id": 999}).error == "not_found"
        sent = daemon.admin("POST", "webhooks/billing/test", {}).data
        receiver.wait_for(lambda messages: messages[-1].event["type"] == "webhook.test")
        assert sent["type"] == "webhook.test"
        listed = jobctl.ok("webhooks")
        assert "billing" in listed
        assert "healthy" in listed
        assert "webhook.test" in jobctl.ok("webhooks", "deliveries", "billing")
        assert jobctl.json("webhooks", "deliveries", "billing")["next_cursor"] is None
        number = str(waiting["id"])
        assert "is queued" in jobctl.ok("webhooks", "resend", "billing", number, "--reason", "they ask")
        assert "is queued" in jobctl.ok("webhooks", "test", "billing", "--reason", "mended")
        entries = daemon.admin("GET", "audit?limit=2").data["entries"]
        assert [each["reason"] for each in entries] == ["mended", "they ask"]
        assert "would be sent" in jobctl.ok("webhooks", "test", "billing", "--dry-run")
        assert f"{number} would be resent" in jobctl.ok("webhooks", "resend", "billing", number, "--dry-run")
        for rejected in (("test", "nobody"), ("resend", "nobody", number), ("resend", "billing", "99999")):
            for dry in ((), ("--dry-run",)):
                assert jobctl.rejected("webhooks", *rejected, *dry)[0] == exit_codes.REJECTED, (rejected, dry)
        assert jobctl.rejected("webhooks", "deliveries", "nobody")[0] == exit_codes.REJECTED
        for wrong in (("resend", "billing"), ("resend", "billing", "--state", "waiting"), ("test",)):
            assert jobctl.run("webhooks", *wrong)[0] == 2, wrong
        metrics = daemon.admin("GET", "/metrics").body.decode()
        assert 'jobd_webhook_deliveries_total{outcome="delivered",webhook="billing"}' in metrics
        assert daemon.stop() == 0


@pytest.mark.slow
def test_dead_letters_are_listed_in_pages_and_sent_again(tmp_path: Path, receiver: Receiver, jobctl: Jobctl) -> None:
    """After an outage of days, simulated by the store of a stopped daemon."""
    receiver.respond = responding(500, "not today")
    with ForkedDaemon(tmp_path, config(receiver, 'events = ["job.created"]')) as daemon:
        daemon.post("/v1/jobs/bulk", {"jobs": [{"id": f"job-{number}"} for number in range(450)]})
        poll_until(lambda: view(daemon)["waiting"] == 450)
        assert daemon.stop() == 0
    asyncio.run(dead_letter_all(daemon.store))
    receiver.respond = accept
    with daemon:

        def listed(*words: str) -> Any:
            return jobctl.json("webhooks", "deliveries", "billing", *words)

        everything = listed("--all", "--state", "dead-lettered")
        ids = [each["id"] for each in everything["deliveries"]]
        assert (len(set(ids)), everything["next_cursor"]) == (450, None)
        assert ids == sorted(ids, reverse=True)
        page = listed("--limit", "7")
        assert [each["id"] for each in page["deliveries"]] == ids[:7]
        assert [each["id"] for each in listed("--cursor", page["next_cursor"], "--limit", "2")["deliveries"]] == ids[
            7:9
        ]
        assert "--cursor" in jobctl.run("webhooks", "deliveries", "billing")[2]
        every = ("webhooks", "resend", "billing", "--state", "dead-lettered")
        jobctl.says(2, "add --yes", *every)
        assert jobctl.ok(*every, "--dry-run") == "450 deliveries would be resent\n"
        assert view(daemon)["delivered"] == 0
        assert jobctl.ok(*every, "--yes", "--reason", "it is up again").startswith("450 deliveries queued")
        poll_until(lambda: view(daemon)["delivered"] == 450)
        assert {each.event["subject"] for each in receiver.received if each.headers} >= {"jobs/job-0", "jobs/job-449"}
        assert jobctl.json(*every, "--yes") == {"resent": 0, "would": 0}
        entries = daemon.admin("GET", "audit?action=resend-dead-lettered").data["entries"]
        assert [each["details"] for each in entries] == [{"webhook": "billing", "resent": 450}]
        assert entries[0]["reason"] == "it is up again"
        assert daemon.admin("POST", "webhooks/nobody/resend-dead-lettered", {}).error == "not_found"
        assert daemon.stop() == 0


async def dead_letter_all(path: Path) -> None:
    store, _ = await Store.open(str(path))
    async with store:
        waiting = (await store.open_outbox(["billing"], 1)).waiting["billing"]
        ids = [each.id for each in waiting]
        for first in range(0, len(ids), 100):
            found = await store.deliveries(ids[first : first + 100])
            await store.store_outcomes([replace(each, state="dead-lettered", ended_at=each.at) for each in found], 1)


def test_a_reload_applies_new_webhooks(tmp_path: Path, receiver: Receiver) -> None:
    with ForkedDaemon(tmp_path) as daemon:
        run_lifecycle(daemon, "before")
        assert "reloaded" in (line := daemon.reload(config(receiver)))
        assert "webhooks" in line
        poll_until(lambda: view(daemon)["state"] == "closed")
        run_lifecycle(daemon, "a")
        messages = receiver.wait_for(lambda messages: done(messages, "a"))
        assert types_about(messages, "before") == []
        assert "secret" in daemon.reload(config(receiver).replace(SECRET, "whsec_x"))
        assert "reloaded" in daemon.reload("")
        poll_until(lambda: daemon.admin("GET", "webhooks").data == {"webhooks": []})
        assert daemon.stop() == 0


@pytest.mark.slow
def test_the_problem_of_a_full_disk_is_delivered_while_it_is_full(
    tmp_path: Path, small_disk: Path, receiver: Receiver
) -> None:
    def messages_of_type(type_: str) -> list[bytes]:
        return [each.body for each in receiver.received if each.event["type"] == type_]

    rest = "[alerts]\ndisk_free_percent = 0\ndisk_free_bytes = 0"
    settings = config(receiver, 'events = ["problem.*", "job.created"]', rest=rest)
    with ForkedDaemon(
        tmp_path, settings, variant="prompt_problems", JOBD_STORE_PATH=str(small_disk / "jobd.db")
    ) as daemon:
        filler = small_disk / "filler"

        def rejected() -> DaemonResponse:
            """Fill the disk, the space of a released reserve file included, until a create is rejected."""
            while True:
                with contextlib.suppress(OSError), open(filler, "ab", buffering=0) as file:
                    while True:
                        file.write(b"x" * 4096)
                reply = daemon.post("/v1/jobs", {"payload": "x" * 50_000})
                if reply.status != 201:
                    return reply

        def is_in_outbox() -> bool:
            """Return whether the problem was delivered from the outbox."""
            page = daemon.admin("GET", "webhooks/billing/deliveries?state=delivered").data
            return any(each["type"] == "problem.opened" for each in page["deliveries"])

        rejected()
        daemon.admin("GET", "health")  # measures at once
        receiver.wait_for(lambda _: bool(messages_of_type("problem.opened")))
        assert rejected().error == "storage_full", "it is still full"
        no = daemon.admin("POST", "webhooks/billing/test", {})
        assert (no.status, no.error) == (507, "storage_full")
        assert f"bytes free at {small_disk}/jobd.db" in no.body["message"]
        message = messages_of_type("problem.opened")[0]
        assert json.loads(message)["data"]["condition"] == "disk"
        filler.unlink()
        daemon.wait_for_log(b"event=disk_has_room")
        poll_until(is_in_outbox)
        assert message in messages_of_type("problem.opened")
        assert daemon.post("/v1/jobs", {"id": "after"}).status == 201
        receiver.wait_for(lambda messages: has_message_about("after", messages))
        daemon.admin("GET", "health")
        receiver.wait_for(lambda _: bool(messages_of_type("problem.closed")))
        assert daemon.stop() == 0
