"""`current_job()` in threads that copy the context."""

from __future__ import annotations

import asyncio
import contextvars
from concurrent.futures import ThreadPoolExecutor

from jobd import App, Stopped, current_job

app = App("video")


def encode(part: int) -> int:
    job = current_job()
    job.log(f"part {part} of attempt {job.attempt}, token {job.fencing_token}")
    if job.cancelled:
        raise Stopped
    return part * 2


@app.task(queue="video")
def transcode(path: str, parts: int) -> list[int]:
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(contextvars.copy_context().run, encode, part) for part in range(parts)]
        done: list[int] = []
        for number, future in enumerate(futures):
            done.append(future.result())
            current_job().progress(100 * number / parts, "encoding")
    return done


@app.task
async def probe(path: str) -> int:
    return await asyncio.to_thread(encode, len(path))  # copies the context by itself


def main() -> None:
    print(transcode.enqueue("a.mp4", 4).result(timeout=60), probe.enqueue("a.mp4").result(timeout=60))


if __name__ == "__main__":
    main()
