"""Handlers of the calls about the output of jobs. The actor checks the grant; the text goes to a file of its own."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from jobd.api.services import Services
from jobd.http.http_app import HttpApp, run_command
from jobd.http.request import RequestContext
from jobd.model.commands import AppendOutput, Get
from jobd.model.errors import ApiError, api_error
from jobd.model.job import LIVE
from jobd.model.requests import Output
from jobd.model.responses import JobView, OutputEnd, OutputView, Response

APPEND_BYTES: Final = 16 << 10


async def append_output(app: HttpApp[Services], ctx: RequestContext, command: AppendOutput) -> Response | ApiError:
    """Keep the text if the command names the current grant."""
    outputs = app.services.outputs
    outputs.check_on()
    text = command.text.encode(errors="replace")
    if len(text) > APPEND_BYTES:
        message = f"The text has {len(text)} bytes of UTF-8, at most {APPEND_BYTES} are allowed. Send the last part."
        raise api_error("too_large", message, limit=APPEND_BYTES)
    checked = await run_command(app, ctx, command)
    if isinstance(checked, ApiError):
        return checked
    return Response(OutputEnd(await outputs.append(command.id, checked.data, text)))


async def send_output(app: HttpApp[Services], ctx: RequestContext, command: Output) -> Response | ApiError:
    """Send the output. With `wait_ms`, wait until there is some or the job is finished."""
    outputs, loop = app.services.outputs, asyncio.get_running_loop()
    outputs.check_on()
    end_s = loop.time() + command.wait_ms / 1000
    watcher = outputs.feed.watch(queue=None, job_id=command.id, cut=ctx.abort)
    try:
        while True:
            watcher.changed.clear()
            found = await app.actor.ask(Get(id=command.id), by=ctx.by)
            if isinstance(found, ApiError):
                return found
            job: JobView = found.data
            grants, position = await outputs.read(job, command.after)
            view = OutputView(job.id, job.status, job.status not in LIVE, position, grants)
            left_s = end_s - loop.time()
            if grants or view.finished or left_s <= 0 or watcher.ended.is_set():
                return Response(view)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await watcher.changed.wait()
    finally:
        watcher.leave()
