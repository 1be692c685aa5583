"""The sign-in link and the stalled job of the live demo."""

from __future__ import annotations

import http.client
from base64 import b64encode
from contextlib import closing
from types import SimpleNamespace
from typing import cast

from jobd.cli.demo import live
from jobd.client import JobClient
from tests import ROOT


def test_a_link_signs_in_once() -> None:
    link = live.Link(lambda: "cookie")
    assert link.matches(link.secret)
    assert not link.matches(link.secret[:-1])
    assert not link.matches("")
    assert [link.redeem(), link.redeem()] == ["cookie", None]


def test_a_link_expires() -> None:
    now_s = 0.0
    link = live.Link(lambda: "cookie", lambda: now_s)
    now_s = live.LINK_TTL_S
    assert link.redeem() is None


def test_every_page_of_the_link_has_the_icon_of_the_dashboard() -> None:
    icon = b64encode((ROOT / "jobd/dashboard/static/icon.svg").read_bytes()).decode()
    with live._LocalServer(0, "token") as server:
        server.link = live.Link(lambda: "session=1")
        with server.running():
            for secret, status in (("wrong", 404), (server.link.secret, 200), (server.link.secret, 410)):
                with closing(http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)) as connection:
                    connection.request("GET", f"/{secret}")
                    response = connection.getresponse()
                    page = response.read().decode()
                assert response.status == status
                assert f'<link rel="icon" href="data:image/svg+xml;base64,{icon}">' in page


def test_the_archive_job_stalls_again_after_each_recovery() -> None:
    client = FakeJobClient()
    for queued, claims in ((1, 1), (0, 1), (1, 2)):
        client.queued = queued
        live._stall(cast(JobClient, client))
        assert client.claims == claims


class FakeJobClient:
    """A client whose list of queued jobs has `queued` items. Counts the claims."""

    def __init__(self) -> None:
        self.queued = 0
        self.claims = 0

    def list_jobs(self, **_: str) -> SimpleNamespace:
        return SimpleNamespace(jobs=[None] * self.queued)

    def claim(self, **_: object) -> None:
        self.claims += 1
