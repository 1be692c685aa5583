"""Quiet, resume and stop workers from their page."""

from __future__ import annotations

from tests.support.dashboard_harness import READ_ONLY_TOKEN, DashboardHarness, assert_safe, text


async def test_a_worker_is_quieted_resumed_and_stopped(harness: DashboardHarness) -> None:
    browser, reader = await harness.browser(), await harness.browser(READ_ONLY_TOKEN)
    await harness.call("claim", worker="w <7>")
    url = "/workers/quiet?action={}&amp;name=w%20%3C7%3E"
    page = text(await browser.get("/workers"))
    assert url.format("quiet") in page
    assert url.format("stop") in page
    assert "/workers/quiet" not in text(await reader.get("/workers"))
    response = await browser.get(url.format("quiet").replace("&amp;", "&"))
    assert_safe(response)
    assert "jobctl quiet &#39;w &lt;7&gt;&#39;" in text(response)
    assert 'name="reason" maxlength="4096" autocomplete="off" required' in text(response)
    csrf = await browser.csrf()
    for action, shown in (("quiet", "takes no new jobs"), ("resume", "takes jobs again"), ("stop", "stops")):
        response = await browser.post("/workers/quiet", name="w <7>", action=action, reason="bad", csrf=csrf)
        assert (response.status, response.headers["location"]) == (303, "/workers")
        page = text(await browser.get("/workers"))
        assert f"Worker w &lt;7&gt; {shown} from its next claim on." in page
        assert f"{action} pending" in page
    assert (await browser.post("/workers/quiet", name="nobody", action="stop", csrf=csrf)).status == 404
    assert text(await browser.get("/audit")).count('<td data-label="Target">worker w &lt;7&gt;</td>') == 3


async def test_a_quiet_rule_begins_and_ends(harness: DashboardHarness) -> None:
    browser = await harness.browser()
    await harness.call("claim", worker="w", about={"host": "k8s-b", "version": "2.4.1"})
    url = "/workers/quiet?host=k8s-b&version=2.4.1"
    assert url.replace("&", "&amp;") in text(await browser.get("/workers"))
    page = text(await browser.get(url))
    assert "1 idle." in page
    assert "jobctl quiet --host k8s-b --version 2.4.1 --reason TEXT" in page
    csrf = await browser.csrf()
    fields = {"host": "k8s-b", "version": "2.4.1", "queue": "", "for_ms": "3600000", "csrf": csrf}
    assert (await browser.post("/workers/quiet", reason="", **fields)).status == 400
    assert (await browser.post("/workers/quiet", reason="dies", **fields)).status == 303
    await harness.call("claim", worker="w", about={"host": "k8s-b", "version": "2.4.1"})
    page = text(await browser.get("/workers"))
    assert '<span class="badge">quiet</span>' in page
    [rule] = harness.admin.actor.state.quiet.values()
    assert f'href="/workers/quiet?rule={rule.id}"' in page
    assert ": dies</td>" in page
    assert "1 worker gets jobs again" in text(await browser.get(f"/workers/quiet?rule={rule.id}"))
    assert (await browser.post("/workers/quiet", rule=rule.id, csrf=csrf)).status == 303
    assert not harness.admin.actor.state.quiet
    page = text(await browser.get("/audit"))
    for target in ("host k8s-b, version 2.4.1", f"rule {rule.id}"):
        assert f'<td data-label="Target">{target}</td>' in page
    assert (await browser.get(f"/workers/quiet?rule={rule.id}")).status == 404
