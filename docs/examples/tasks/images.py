"""Async tasks: a worker is `jobctl worker images:app`; `python3 images.py` is a caller."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import timedelta

from jobd import App, Discard, current_job

app = App("shop")


@dataclass
class Thumbnail:
    path: str
    size: int


@app.task(queue="images", max_attempts=5, backoff=timedelta(seconds=10), timeout=timedelta(minutes=20))
async def resize(path: str, width: int = 320) -> Thumbnail:
    if width < 1:
        raise Discard("width must be at least 1")
    for percent in range(0, 100, 10):
        await asyncio.sleep(0.01)
        current_job().progress(percent)
    return Thumbnail(f"{path}.webp", 812)


async def main() -> None:
    job = await resize.aenqueue("a.png", width=640)
    thumbnail = await job.aresult(timeout=60)
    print(thumbnail.path, await job.astatus())
    direct = await resize("b.png", width=1)  # runs here
    print(direct.size, await job.acancel("no longer needed"))


if __name__ == "__main__":
    asyncio.run(main())
