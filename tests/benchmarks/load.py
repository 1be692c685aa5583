"""The load, in its own process: `python -m tests.benchmarks.load REQUEST` prints figures as JSON.

`load_cores` is the CPU time that the load itself took.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

import msgspec
import uvloop

from jobd.cli.daemon.bench_load import (
    CREATE,
    PAYLOAD,
    LoadConnection,
    Measurements,
    clock,
    encode,
    percentiles,
    repeat,
    run_one,
    worker,
)
from jobd.cli.daemon.bench_load import claim as claim_and_release
from jobd.cli.daemon.bench_load import lifecycle as run_lifecycles
from tests.benchmarks import beside, soak
from tests.benchmarks.wire import BenchmarkStream
from tests.benchmarks.work import BASE, LoadRequest, connections_of, wait_until

BULK: Final = 1000
LONG_AGO_MS: Final = 1_000_000_000_000


async def batch(request: LoadRequest) -> Measurements:
    """Create and claim a hundred jobs with one request each, and complete them one by one."""
    size = 100
    bulk = encode({"jobs": [{"payload": PAYLOAD}] * size})

    def work(number: int, wire: LoadConnection) -> Callable[[], Awaitable[int]]:
        claim = encode({"worker": f"w-{number}", "limit": size})

        async def once() -> int:
            await wire.post("/v1/jobs/bulk", bulk)
            grants = (await wire.post("/v1/claim", claim))["grants"]
            for grant in grants:
                await wire.post(f"/v1/jobs/{grant['job']['id']}/complete", encode({"lock_id": grant["lock_id"]}))
            return len(grants)

        return once

    wires = await connections_of(request)
    per_s, times = await repeat(request.seconds, [work(number, wire) for number, wire in enumerate(wires)])
    return {"lifecycles_per_s": per_s, "hundred": percentiles(times)}


async def stream(request: LoadRequest) -> Measurements:
    """Run command streams with many lifecycles in flight each."""
    at_once = 64
    flows = [await BenchmarkStream.open(request.socket) for _ in range(max(request.connections // 4, 1))]
    began, done = clock(), 0

    async def go_on(number: int, flow: BenchmarkStream) -> None:
        nonlocal done
        begin = encode({"op": "create", "payload": PAYLOAD}) + b"\n"
        begin += encode({"op": "claim", "worker": f"w-{number}"}) + b"\n"
        flow.send(begin * at_once)
        under_way = at_once
        while under_way:
            lines = []
            for response in await flow.responses():
                data = response["data"]
                if "grants" in data:
                    for grant in data["grants"]:
                        ended = {"op": "complete", "id": grant["job"]["id"], "lock_id": grant["lock_id"], "metadata": 1}
                        lines.append(encode(ended) + b"\n")
                elif data["status"] == "completed":
                    done += 1
                    if clock() - began < request.seconds:
                        lines.append(begin)
                    else:
                        under_way -= 1
            if lines:
                flow.send(b"".join(lines))

    await asyncio.gather(*(go_on(number, flow) for number, flow in enumerate(flows)))
    per_s = done / (clock() - began)
    for flow in flows:
        flow.close()
    return {"lifecycles_per_s": per_s}


async def contention(request: LoadRequest) -> Measurements:
    """Start the same job on all connections, and check that exactly one gets it."""
    wires = await connections_of(request)
    began, starts, jobs, times = clock(), 0, 0, list[float]()
    while clock() - began < request.seconds:
        job_id = (await wires[0].post("/v1/jobs", CREATE))["id"]
        started = clock()
        asking = (wire.post(f"/v1/jobs/{job_id}/start", worker(n), may_fail=True) for n, wire in enumerate(wires))
        got = [grant for grant in await asyncio.gather(*asking) if grant is not None]
        times.append(clock() - started)
        if len(got) != 1:
            raise SystemExit(f"{len(got)} workers were granted job {job_id}")
        await wires[0].post(f"/v1/jobs/{job_id}/complete", encode({"lock_id": got[0]["lock_id"]}))
        starts, jobs = starts + len(wires), jobs + 1
    return {"starts_per_s": starts / (clock() - began), "grants_per_job": 1, "round": percentiles(times)}


async def progress(request: LoadRequest) -> Measurements:
    """Report progress of one job per connection."""

    async def holder(number: int, wire: LoadConnection) -> Callable[[], Awaitable[int]]:
        job_id = (await wire.post("/v1/jobs", CREATE))["id"]
        lock_id = (await wire.post(f"/v1/jobs/{job_id}/start", worker(number)))["lock_id"]
        body = encode({"lock_id": lock_id, "progress": 50})

        async def once() -> int:
            await wire.post(f"/v1/jobs/{job_id}/progress", body)
            return 1

        return once

    holders = [await holder(number, wire) for number, wire in enumerate(await connections_of(request))]
    per_s, times = await repeat(request.seconds, holders)
    return {"reports_per_s": per_s, "report": percentiles(times)}


async def mixed(request: LoadRequest) -> Measurements:
    """Run lifecycles during reads, a polling dashboard and a cleanup run every second."""
    async with beside.running_beside(_poll(request), beside.clean(request), _read(request)):
        return await lifecycle(request)


async def _poll(request: LoadRequest) -> None:
    wire = await LoadConnection.open(request.admin, request.token)
    while True:
        for path in (f"{BASE}/stats", f"{BASE}/queues", f"{BASE}/alerts", "/metrics"):
            await wire.get(path)
        await asyncio.sleep(0.5)


async def _read(request: LoadRequest) -> None:
    wire = await LoadConnection.open(request.socket)
    while True:
        page = await wire.get("/v1/jobs?limit=50")
        for job in page["jobs"][:10]:
            await wire.get(f"/v1/jobs/{job['id']}")
        await asyncio.sleep(0.05)


async def latency(request: LoadRequest) -> Measurements:
    """Run one lifecycle after the other on one connection."""
    wire, times = await LoadConnection.open(request.socket), list[float]()
    began = clock()
    while (started := clock()) - began < request.seconds:
        await run_one(wire, worker(1))
        times.append(clock() - started)
    return {"lifecycle": percentiles(times)}


async def rate(request: LoadRequest) -> Measurements:
    """Start lifecycles at a fixed rate. Times count from when each one was due."""
    free = asyncio.Queue[LoadConnection]()
    for wire in await connections_of(request):
        free.put_nowait(wire)
    began, times, running = clock(), list[float](), set[asyncio.Task[None]]()

    async def one(begins_at: float) -> None:
        wire = await free.get()
        await run_one(wire, worker(1))
        times.append(clock() - begins_at)
        free.put_nowait(wire)

    for number in range(round(request.rate * request.seconds)):
        task = asyncio.ensure_future(one(await wait_until(began + number / request.rate)))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    return {"rate_per_s": request.rate, "lifecycle": percentiles(times)}


async def claim(request: LoadRequest) -> Measurements:
    return await claim_and_release(request.socket, request.seconds)


async def lifecycle(request: LoadRequest) -> Measurements:
    return await run_lifecycles(request.socket, request.seconds, request.connections)


async def fill(request: LoadRequest) -> Measurements:
    """Create `count` queued jobs."""
    wire, began = await LoadConnection.open(request.socket), clock()
    for made in range(0, request.count, BULK):
        await wire.post("/v1/jobs/bulk", encode({"jobs": [{"payload": PAYLOAD}] * min(BULK, request.count - made)}))
    return {"created_per_s": request.count / (clock() - began)}


async def finish(request: LoadRequest) -> Measurements:
    """Import `count` finished jobs. The next cleanup run deletes them if they are `expired`."""
    wire, began = await LoadConnection.open(request.admin, request.token), clock()
    run = secrets.token_hex(4)  # another load uses other ids
    for made in range(0, request.count, BULK):
        job = {"status": "completed", "progress": 100, "metadata": 1, "payload": PAYLOAD}
        if request.expired:
            job["expires_at"] = LONG_AGO_MS
        numbers = range(made, min(made + BULK, request.count))
        lines = b"".join(encode({"id": f"{run}-{number}", **job}) + b"\n" for number in numbers)
        await wire.lines(f"{BASE}/import", lines)
    return {"imported_per_s": request.count / (clock() - began)}


KINDS: Final[dict[str, Callable[[LoadRequest], Coroutine[Any, Any, Measurements]]]] = {
    each.__name__: each
    for each in (
        lifecycle,
        batch,
        stream,
        contention,
        progress,
        mixed,
        latency,
        rate,
        claim,
        fill,
        finish,
        beside.lag,
        soak.soak,
    )
}


def main() -> None:
    request = msgspec.json.decode(sys.argv[1], type=LoadRequest)
    began, cpu = clock(), time.process_time()
    figures = uvloop.run(KINDS[request.kind](request))
    figures["load_cores"] = (time.process_time() - cpu) / (clock() - began)
    print(encode(figures).decode())


if __name__ == "__main__":
    main()
