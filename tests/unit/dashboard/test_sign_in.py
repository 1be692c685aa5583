"""Signing in and out through the real listener."""

from __future__ import annotations

import asyncio
import html
import re
import time
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest

from jobd.dashboard import sessions, sign_in
from jobd.http.auth import FORM
from jobd.model.storage import AuditQuery
from jobd.storage.artifacts.downloads import Downloads
from jobd.storage.artifacts.filesystem import FileArtifactStore
from tests.support.dashboard_harness import AUTH, READ_ONLY_TOKEN, Browser, DashboardHarness, audit_entries, text
from tests.support.http_harness import TOKEN, RawConnection, request_bytes, tls_pair, wrong_tokens
from tests.support.polling import wait_until


async def test_an_anonymous_browser_is_redirected_to_the_sign_in_and_back(harness: DashboardHarness) -> None:
    anonymous = Browser(harness.admin)
    response = await anonymous.get("/jobs?status=failed&queue=a")
    sign_in_url = "/sign-in?next=%2Fjobs%3Fstatus%3Dfailed%26queue%3Da"
    assert (response.status, response.headers["location"]) == (303, sign_in_url)
    assert 'value="/jobs?status=failed&amp;queue=a"' in text(await anonymous.get(response.headers["location"]))
    response = await anonymous.post("/sign-in", token=TOKEN, next="/jobs?status=failed&queue=a")
    assert (response.status, response.headers["location"]) == (303, "/jobs?status=failed&queue=a")
    assert (await anonymous.get("/jobs?status=failed&queue=a")).status == 200


@pytest.mark.parametrize(
    "url",
    ["//evil.example", "https://evil.example", "/\\evil.example", "/a\r\nSet-Cookie: x", "/\t/evil.example", "/é", ""],
)
async def test_a_sign_in_redirects_to_no_other_host(harness: DashboardHarness, url: str) -> None:
    assert (await Browser(harness.admin).post("/sign-in", token=TOKEN, next=url)).redirect == "/"
    assert "evil" not in text(await Browser(harness.admin).get(f"/sign-in?next={quote(url)}"))


async def test_a_sign_in_redirects_back_to_any_url_that_a_browser_sends(harness: DashboardHarness) -> None:
    """Forms do not escape `*`, and typed URLs keep more characters."""
    url = "/jobs?text=a*b&kind=!$'(),;@|^`{}[]~:/?%20&status=failed"
    anonymous = Browser(harness.admin)
    response = await anonymous.get(url)
    page = text(await anonymous.get(response.headers["location"]))
    found = re.search(r'name="next" value="([^"]+)"', page)
    assert found
    assert html.unescape(found[1]) == url
    assert (await anonymous.post("/sign-in", token=TOKEN, next=html.unescape(found[1]))).redirect == url


async def test_the_session_cookie_is_out_of_reach_of_scripts_and_other_sites(harness: DashboardHarness) -> None:
    response = await Browser(harness.admin).post("/sign-in", token=f" {TOKEN}\n")
    name, value = response.headers["set-cookie"].split("; ")[0].split("=")
    assert name == f"jobd_{harness.admin.port}", "cookies are shared between ports"
    assert len(value) >= 40
    attributes = {"Path=/", "HttpOnly", "SameSite=Strict", "Max-Age=43200"}
    assert set(response.headers["set-cookie"].split("; ")[1:]) == attributes
    assert TOKEN not in repr(vars(harness.dashboard.sessions))
    assert value not in repr(vars(harness.dashboard.sessions))
    behind = {"Origin": "https://localhost", "Host": "localhost"}
    response = await Browser(harness.admin).post("/sign-in", behind, token=TOKEN)
    assert "Secure" in response.headers["set-cookie"].split("; ")


async def test_curl_commands_use_https_behind_a_tls_proxy(harness: DashboardHarness) -> None:
    """A GET has no Origin header, and any client can send X-Forwarded-Proto."""
    await harness.call("jobs", id="a")
    direct = await harness.browser()
    page = text(await direct.get("/jobs/a", Host="localhost", X_Forwarded_Proto="https"))
    assert "http://localhost/admin/job-management/jobs/a" in page
    proxied = Browser(harness.admin)
    await proxied.post("/sign-in", {"Origin": "https://localhost", "Host": "localhost"}, token=TOKEN)
    for url in ("/jobs/a", "/jobs/a/confirm?verb=cancel"):
        page = text(await proxied.get(url, Host="localhost"))
        assert "https://localhost/admin/job-management/jobs/a" in page
        assert "http://localhost" not in page


async def test_the_cookie_is_secure_over_tls(harness: DashboardHarness, tmp_path: Path) -> None:
    server, client = await tls_pair(tmp_path)
    [(_, port)] = await harness.admin.listener.open_tcp("127.0.0.1", 0, tls=server)
    connection = RawConnection(
        *await asyncio.open_connection("127.0.0.1", port, ssl=client, server_hostname="localhost")
    )
    response = await connection.request("POST", "/sign-in", urlencode({"token": TOKEN}), {"Content-Type": FORM})
    assert response.status == 303
    assert "Secure" in response.headers["set-cookie"].split("; ")
    await connection.close()


async def delayed_responses(harness: DashboardHarness, count: int) -> None:
    """Wait until so many responses are delayed."""
    await wait_until(lambda: harness.dashboard._sign_in_pages._delayed >= count)


@pytest.mark.slow
async def test_wrong_tokens_are_rejected_and_delayed_and_a_valid_one_is_accepted_at_once(
    harness: DashboardHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "FAILURE_DELAY_S", 600.0)
    browser = Browser(harness.admin)
    for number in range(sessions.FREE_FAILURES + 2):
        start_s = time.monotonic()
        if is_delayed := number >= sessions.FREE_FAILURES:
            monkeypatch.setattr(sessions, "FAILURE_DELAY_S", 0.3)
        response = await browser.post("/sign-in", token="wrong-token-0123456789abcdef", name="eve")
        assert response.status == 401
        assert "This token is not valid" in text(response)
        assert "wrong-token" not in text(response)
        assert not is_delayed or time.monotonic() - start_s > 0.25
    monkeypatch.setattr(sessions, "FAILURE_DELAY_S", 600.0)
    delayed = asyncio.create_task(browser.post("/sign-in", token="wrong-token-0123456789abcdef"))
    await delayed_responses(harness, 1)
    await Browser(harness.admin).sign_in()
    assert not delayed.done()
    delayed.cancel()
    assert (await harness.admin.request("GET", "/jobs", headers=AUTH)).status == 200, "programs are not delayed"
    assert harness.admin.app.error_counts["unauthorized"] == sessions.FREE_FAILURES + 3
    page = text(await (await harness.browser()).get("/audit?action=sign-in"))
    assert '<span class="badge bad">unauthorized</span> <span class="dim">10 times</span>' in page
    *wrong, right, _ = await audit_entries(harness)
    assert wrong == [("eve", "sign-in", "unauthorized", {"times": times}) for times in range(1, 11)]  # one row on disk
    assert right == ("admin", "sign-in", "done", {"access": "full"})


async def test_no_wrong_token_signs_in(harness: DashboardHarness) -> None:
    """Try 5,000 tokens directly and 500 with the form. The clock advances, so that no response is delayed."""
    assert [each for each in wrong_tokens(TOKEN) if harness.dashboard.sessions.sign_in(each) is not None] == []
    client = await harness.admin.connect()
    wrong = wrong_tokens(TOKEN, 500) + wrong_tokens(READ_ONLY_TOKEN, 0)
    for at in range(0, len(wrong), sessions.FREE_FAILURES):
        given = wrong[at : at + sessions.FREE_FAILURES]
        harness.now_s += sessions.FAILURE_WINDOW_S
        forms = [urlencode({"token": each}) for each in given]
        client.send(b"".join(request_bytes("POST", "/sign-in", form, {"Content-Type": FORM}) for form in forms))
        responses = [await client.receive() for _ in given]
        assert [each for each, response in zip(given, responses, strict=True) if response.status != 401] == []
        assert not any("set-cookie" in response.headers for response in responses)
    assert len(harness.dashboard.sessions) == 0
    await Browser(harness.admin).sign_in()


@pytest.mark.slow
async def test_the_number_of_delayed_responses_is_limited(
    harness: DashboardHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "FAILURE_DELAY_S", 600.0)
    monkeypatch.setattr(sessions, "FREE_FAILURES", 0)
    monkeypatch.setattr(sign_in, "MAX_DELAYED", 2)
    delayed = [asyncio.create_task(Browser(harness.admin).post("/sign-in", token="wrong")) for _ in range(2)]
    await delayed_responses(harness, 2)
    response = await Browser(harness.admin).post("/sign-in", token="wrong")
    assert (response.status, response.headers["retry-after"]) == (429, "600")
    assert "too many sign-ins are failing" in text(response)
    await Browser(harness.admin).sign_in()
    assert not any(each.done() for each in delayed)
    for each in delayed:
        each.cancel()


async def test_sign_ins_sign_outs_and_downloads_are_audited(harness: DashboardHarness, tmp_path: Path) -> None:
    (tmp_path / "stored").mkdir()
    (tmp_path / "stored" / "result").write_bytes(b"r")
    harness.admin.services.downloads = Downloads(FileArtifactStore(str(tmp_path / "stored"), "test"), 2)
    lock_id = await harness.start_job("done")
    await harness.call("jobs/done/complete", lock_id=lock_id, storage_key="result")
    for token, name in ((TOKEN, "ann"), (READ_ONLY_TOKEN, ""), (READ_ONLY_TOKEN, "rob")):
        browser = Browser(harness.admin)
        await browser.post("/sign-in", token=token, name=name)
        csrf = await browser.csrf()
        for _ in range(2):
            assert (await browser.get("/jobs/done/artifact")).status == 200
        await browser.post("/sign-out", csrf=csrf)
    for token, name in ((TOKEN, "prog"), (READ_ONLY_TOKEN, "")):
        headers = {"Authorization": f"Bearer {token}", "X-Jobd-Operator": name}
        for _ in range(2):
            assert (await harness.admin.request("GET", "/admin/job-management/export", headers=headers)).status == 200
        assert (
            await harness.admin.request("GET", "/admin/job-management/jobs/done/artifact", headers=headers)
        ).status == 200
        assert (
            await harness.admin.request("GET", "/admin/job-management/jobs/none/artifact", headers=headers)
        ).status == 404
    found = await audit_entries(harness)
    entries = {(*each[:3], str(each[3])) for each in found}
    full, read = "{'access': 'full'}", "{'access': 'read'}"
    again = "{'access': 'read', 'times': 2, 'names': ['reader', 'rob']}"
    assert entries == {
        ("ann", "sign-in", "done", full),
        ("ann", "artifact", "done", "done"),
        ("ann", "sign-out", "done", full),
        ("reader", "sign-in", "done", read),
        ("reader", "artifact", "done", "done"),
        ("reader", "sign-out", "done", read),
        ("rob", "sign-in", "done", again),
        ("rob", "artifact", "done", "done"),
        ("rob", "sign-out", "done", again),
        ("prog", "export", "done", "{}"),
        ("prog", "artifact", "done", "done"),
        ("reader", "export", "done", read),
    }


async def test_sessions_end_by_age_and_idleness(harness: DashboardHarness) -> None:
    idle, busy = await harness.browser(), await harness.browser()
    for _ in range(12):
        harness.now_s += sessions.MAX_AGE_S / 12 - 1
        assert (await busy.get("/")).status == 200
    assert (await idle.get("/")).status == 303, "one hour without a request"
    harness.now_s += 12
    assert (await busy.get("/")).status == 303, "twelve hours"
    assert len(harness.dashboard.sessions) == 0


async def test_a_session_ends_with_its_token(harness: DashboardHarness) -> None:
    browser, reader = await harness.browser(), await harness.browser(READ_ONLY_TOKEN)
    harness.admin.app.authenticator.replace_tokens([TOKEN, "another-token-0123456789abcdef"], [READ_ONLY_TOKEN])
    assert (await browser.get("/")).status == 200
    harness.admin.app.authenticator.replace_tokens(["another-token-0123456789abcdef"], [READ_ONLY_TOKEN])
    assert (await browser.get("/")).status == 303
    assert (await reader.get("/")).status == 200
    harness.admin.app.authenticator.replace_tokens([READ_ONLY_TOKEN])
    assert (await reader.get("/")).status == 303, "a session never gains access"


async def test_signing_out_ends_the_session(harness: DashboardHarness) -> None:
    browser = await harness.browser()
    before = browser.cookie
    response = await browser.post("/sign-out", csrf=await browser.csrf())
    assert (response.status, response.headers["location"]) == (303, "/sign-in")
    assert "Max-Age=0" in response.headers["set-cookie"]
    browser.cookie = before
    assert (await browser.get("/")).status == 303


async def test_a_second_sign_in_ends_the_first_session(harness: DashboardHarness) -> None:
    browser = await harness.browser()
    await browser.sign_in()
    assert len(harness.dashboard.sessions) == 1


async def test_the_sign_in_page_redirects_if_there_is_a_session(harness: DashboardHarness) -> None:
    """A link on another site brings no cookie, so the page requests itself again with the cookie."""
    browser = await harness.browser()
    assert (await browser.get("/sign-in?next=%2Fqueues")).redirect == "/queues"


async def test_read_only_sign_ins_end_no_full_session(harness: DashboardHarness) -> None:
    browser, first = await harness.browser(), await harness.browser(READ_ONLY_TOKEN)
    for _ in range(sessions.MAX_SESSIONS):
        assert harness.dashboard.sessions.sign_in(READ_ONLY_TOKEN)
    assert (await browser.get("/")).status == 200
    assert (await first.get("/")).status == 303, "pushed out by read-only sessions"
    assert len(harness.dashboard.sessions) == sessions.MAX_SESSIONS + 1


async def test_repeated_sign_ins_share_one_audit_entry(harness: DashboardHarness) -> None:
    async def windows_by_action() -> dict[tuple[str, str], set[str | None]]:
        rows = (await harness.disk.read_audit(AuditQuery(limit=100))).found
        found: dict[tuple[str, str], set[str | None]] = {}
        for _, row in rows:
            found.setdefault((row.what, str((row.details or {})["access"])), set()).add(row.part_of)
        return found

    reader = Browser(harness.admin)
    for name in ("ann", "bob", "ann"):
        await reader.post("/sign-in", token=READ_ONLY_TOKEN, name=name)
        await reader.post("/sign-out", csrf=await reader.csrf())
    await harness.browser()
    found = await windows_by_action()
    assert set(found) == {("sign-in", "read"), ("sign-out", "read"), ("sign-in", "full")}
    assert all(len(each) == 1 and None not in each for each in found.values())
    assert ("ann", "sign-in", "done", {"access": "read", "times": 3, "names": ["ann", "bob"]}) in await audit_entries(
        harness
    )
    page = text(await (await harness.browser()).get("/audit?action=sign-in"))
    assert '<span class="dim">names</span> ann, bob</span>' in page
    harness.now_s += sessions.SIGN_IN_WINDOW_S
    await reader.post("/sign-in", token=READ_ONLY_TOKEN)
    assert len((await windows_by_action())["sign-in", "read"]) == 2
