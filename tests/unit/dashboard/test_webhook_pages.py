"""The pages of webhooks."""

from __future__ import annotations

import re
import time

from msgspec.structs import replace

from jobd.model.responses import DeliveryPage
from jobd.model.webhooks import MAX_BACKLOG
from tests.support.calls import DELIVERY, WEBHOOK
from tests.support.dashboard_harness import AUTH, READ_ONLY_TOKEN, DashboardHarness, audit_entries, text


async def test_webhooks_are_shown_with_their_state(harness: DashboardHarness) -> None:
    browser, fakes = await harness.browser(), harness.admin.fakes
    page = text(await browser.get("/webhooks"))
    assert WEBHOOK.url in page
    assert 'href="/webhooks/q?state=waiting">1</a>' in page
    shown = {
        "starting": ">starting<",
        "closed": ">healthy<",
        "open": ">paused after errors<",
        "half_open": ">retrying one message<",
    }
    for state, words in shown.items():
        fakes.hooks = [replace(WEBHOOK, state=state, failing_since=None, events=["job.<b>"])]
        page = text(await browser.get("/webhooks"))
        assert words in page
        assert "job.&lt;b&gt;" in page
        assert "next attempt" not in page
    later = round(time.time() * 1000) + 130_000
    for state, since in (("open", 1), ("closed", 1)):
        fakes.hooks = [replace(WEBHOOK, state=state, failing_since=since, next_attempt_at=later)]
        for url in ("/webhooks", "/webhooks/q"):
            assert re.search(
                rf'next attempt in <time [^>]*data-until="{later}"[^>]*>2 min', text(await browser.get(url))
            )
    fakes.hooks = [replace(WEBHOOK, state="closed", failing_since=1)]
    assert ">failing<" in text(await browser.get("/webhooks/q"))
    fakes.hooks = []
    assert "No webhooks are configured" in text(await browser.get("/webhooks"))
    assert "There is no webhook q" in (await browser.get("/webhooks/q")).page(404)


async def test_deliveries_are_filtered_paged_and_resent(harness: DashboardHarness) -> None:
    browser, fakes = await harness.browser(), harness.admin.fakes
    page = text(await browser.get("/webhooks/q?state=dead-lettered&cursor=9"))
    assert fakes.asked_deliveries == [("q", "dead-lettered", 9, 50)]
    assert '<option value="dead-lettered" selected>' in page
    assert 'href="/webhooks/q?state=dead-lettered&amp;cursor=7"' in page
    assert 'href="/webhooks/q?state=dead-lettered">Newest' in page
    assert 'href="/jobs/a">a</a>' in page
    assert "data-interval-s" not in page, "older pages do not update"
    assert "data-interval-s" in text(await browser.get("/webhooks/q"))
    assert "state" in (await browser.get("/webhooks/q?state=lost")).page(400)
    csrf = await browser.csrf()
    response = await browser.post("/webhooks/q/resend", csrf=csrf, id="7", state="dead-lettered", reason="they ask")
    assert (response.status, response.headers["location"]) == (303, "/webhooks/q?state=dead-lettered")
    page = text(await browser.get("/webhooks/q"))
    assert "Sending message 7." in page
    assert 'aria-label="Send message 7 now">Send now</button>' in page, "it is waiting"
    assert '<button form="send-form" formaction="/webhooks/q/resend" name="id" value="7"' in page
    assert '<form id="send-form"' in page.partition("data-interval-s")[0], "the form is outside the live region"
    response = await browser.post("/webhooks/q/test", csrf=csrf, reason=" does it hear us? ")
    assert response.headers["location"] == "/webhooks/q"
    assert "Sending test message 7." in text(await browser.get("/webhooks/q"))
    audit = await harness.admin.request("GET", "/admin/job-management/audit", headers=AUTH)
    assert [(each["action"], each["details"], each["reason"]) for each in audit.data["entries"]] == [
        ("test-webhook", {"webhook": "q"}, "does it hear us?"),
        ("resend-delivery", {"webhook": "q", "delivery": 7}, "they ask"),
        ("sign-in", {"access": "full"}, None),
    ]
    assert (await browser.post("/webhooks/q/resend", csrf=csrf, id="8")).status == 404
    assert (await browser.post("/webhooks/q/resend", csrf=csrf, id="7", state="lost")).status == 400
    assert (await browser.post("/webhooks/none/test", csrf=csrf)).status == 404
    assert len((await harness.admin.request("GET", "/admin/job-management/audit", headers=AUTH)).data["entries"]) == 3


async def test_dead_lettered_deliveries_are_counted_and_resent(harness: DashboardHarness) -> None:
    browser, fakes = await harness.browser(), harness.admin.fakes
    assert 'href="/webhooks/q/resend-dead-lettered"' in text(await browser.get("/webhooks/q"))
    assert "Retry" not in text(await (await harness.browser(READ_ONLY_TOKEN)).get("/webhooks/q"))
    fakes.lost = (MAX_BACKLOG, 99_999)
    page = text(await browser.get("/webhooks/q/resend-dead-lettered"))
    assert re.search(r"<strong>10\s?000</strong> dead-lettered messages are kept\.", page)
    assert "Older ones have been dropped" in page
    fakes.lost = (2, 9)
    page = text(await browser.get("/webhooks/q/resend-dead-lettered"))
    assert "<strong>2</strong> dead-lettered messages are kept." in page
    assert "Older ones have been dropped" not in page
    assert "<button>Send 2 messages again</button>" in page
    assert 'name="upto" value="9"' in page
    csrf = await browser.csrf()
    response = await browser.post("/webhooks/q/resend-dead-lettered", csrf=csrf, upto="9", reason="fixed")
    assert (response.status, response.headers["location"]) == (303, "/webhooks/q")
    [last, *_] = (await harness.admin.request("GET", "/admin/job-management/audit", headers=AUTH)).data["entries"]
    assert (last["action"], last["reason"]) == ("resend-dead-lettered", "fixed")
    assert fakes.resent == [("q", 9)]
    assert "Sending 3 dead-lettered messages again." in text(await browser.get("/webhooks/q"))
    assert ("admin", "resend-dead-lettered", "done", {"webhook": "q", "resent": 3}) in await audit_entries(harness)
    fakes.hooks = [replace(WEBHOOK, failing_since=1)]
    assert "Fix its receiver first" in text(await browser.get("/webhooks/q/resend-dead-lettered"))
    fakes.lost = (0, 0)
    assert "No dead-lettered messages." in text(await browser.get("/webhooks/q/resend-dead-lettered"))
    assert (await browser.post("/webhooks/q/resend-dead-lettered", csrf=csrf)).status == 400
    assert (await browser.post("/webhooks/q/resend-dead-lettered", upto="9")).status == 403
    assert (await browser.get("/webhooks/none/resend-dead-lettered")).status == 404


async def test_a_delivery_shows_its_outcome(harness: DashboardHarness) -> None:
    browser, fakes = await harness.browser(), harness.admin.fakes
    ended = replace(DELIVERY, due_at=None, ended_at=1_700_000_000_000)
    found = [
        replace(DELIVERY, id=1, due_at=4_000_000_000_000, subject="queues/a b"),
        replace(DELIVERY, id=2, subject="problems/disk/disk"),
        replace(ended, id=3, state="delivered", status=204, error=None),
        replace(ended, id=4, state="dead-lettered", error="<no>"),
    ]

    fakes.deliveries_page = DeliveryPage(found, None)
    page = text(await browser.get("/webhooks/q"))
    rows = {int(number): row for number, row in re.findall(r'<tr id="delivery-(\d+)">(.*?)</tr>', page, re.DOTALL)}
    states = {
        1: (">waiting<", "next attempt", 'queue <a href="/jobs?queue=a%20b">a b</a>', ">Send now<"),
        2: (">waiting<", ">due", "problems disk/disk", ">Send now<"),
        3: (">delivered<", "HTTP 204", ">Send again<"),
        4: (">dead-lettered<", "&lt;no&gt;", ">Send again<"),
    }
    assert rows.keys() == states.keys()
    for number, words in states.items():
        for each in words:
            assert each in rows[number], (number, each)
    fakes.hooks = [replace(WEBHOOK, state="open", failing_since=1, next_attempt_at=3_000_000_000_000)]
    page = text(await browser.get("/webhooks/q"))
    assert page.count(">after the pause") == 1, "one is due before the pause ends, the other after"
    assert page.count(">next attempt <time") == 1
    found.clear()
    assert "No messages yet" in text(await browser.get("/webhooks/q"))
    assert "No dead-lettered messages." in text(await browser.get("/webhooks/q?state=dead-lettered"))
