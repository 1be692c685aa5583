"""A real worker in its own process: `python -m tests.proof.faults.worker SOCKET QUEUE LOCK_TTL_MS`.

Prints a line of JSON when a job starts, and when it has ended or was lost. A line on stdin ends the job.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from typing import Any

from jobd.client import AsyncHandlerContext, Worker


def report(what: str, **more: Any) -> None:
    print(json.dumps({"said": what, **more}), flush=True)


async def main(path: str, queue: str, lock_ttl_ms: int) -> None:
    logging.basicConfig(format="%(message)s")  # to stderr: why a job was lost
    stdin = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    worker = Worker(f"unix:{path}", queues=[queue], lock_ttl_ms=lock_ttl_ms)

    @worker.handler()
    async def work(context: AsyncHandlerContext) -> None:
        await context.progress(10)
        report("begun", job=context.job.id, token=context.fencing_token)
        try:
            await stdin.readline()
        except asyncio.CancelledError:
            report("lost", job=context.job.id)
            raise
        report("done", job=context.job.id)

    await worker.serve()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
