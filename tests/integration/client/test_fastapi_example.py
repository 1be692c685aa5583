"""The FastAPI example, called as by an ASGI server, with a worker of its tasks."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

from jobd.testing import TestDaemon
from tests import ROOT


async def call(api: Any, method: str, path: str, query: str = "") -> tuple[int, Any]:
    """Return the status and the decoded body of a response."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "query_string": query.encode(), "headers": []}
    await api(scope, receive, send)
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent))


async def test_an_endpoint_creates_a_job_and_another_returns_its_result(jobd: TestDaemon) -> None:
    spec = importlib.util.spec_from_file_location("fastapi_reports", ROOT / "docs/examples/fastapi_reports.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    api, app = module.api, module.app
    async with api.router.lifespan_context(api):
        status, started = await call(api, "POST", "/reports/4", "year=2026")
        _, failing = await call(api, "POST", "/reports/4", "year=1999")
        assert status == 202
        assert await call(api, "GET", f"/reports/{started['id']}") == (202, {"status": "queued"})
        assert await call(api, "GET", "/reports/none") == (404, {"detail": "no report none"})
        async with app.running():
            result = await call(api, "GET", f"/reports/{started['id']}", "wait_s=20")
            assert result == (200, {"customer": 4, "total": 6.0})
            status, body = await call(api, "GET", f"/reports/{failing['id']}", "wait_s=20")
        assert (status, body["detail"]) == (500, f"job {failing['id']} failed: ValueError: no sales in 1999")
