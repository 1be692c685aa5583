"""PostgreSQL as a queue: SELECT ... FOR UPDATE SKIP LOCKED, prepared statements, its default durability."""

from __future__ import annotations

import asyncio
import glob
import os
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import uvloop

from tests.benchmarks.peers.clock import PAYLOAD, lifecycles
from tests.benchmarks.peers.server import module, running, tool

USER: Final = "postgres"
_TABLE: Final = """
    CREATE TABLE jobs (
        id bigserial PRIMARY KEY, status text NOT NULL, payload jsonb NOT NULL, worker text, lock_id uuid,
        created_at timestamptz NOT NULL DEFAULT now(), started_at timestamptz, finished_at timestamptz, result jsonb
    );
    CREATE INDEX queued ON jobs (id) WHERE status = 'queued';
"""
_CREATE: Final = "INSERT INTO jobs (status, payload) VALUES ('queued', $1) RETURNING id"
_CLAIM: Final = """
    UPDATE jobs SET status = 'processing', worker = $1, lock_id = gen_random_uuid(), started_at = now()
    WHERE id = (SELECT id FROM jobs WHERE status = 'queued' ORDER BY id FOR UPDATE SKIP LOCKED LIMIT 1)
    RETURNING id, lock_id
"""
_COMPLETE: Final = """
    UPDATE jobs SET status = 'completed', lock_id = NULL, finished_at = now(), result = '1'
    WHERE id = $1 AND lock_id = $2 RETURNING id
"""


def measure(directory: Path, connections: int, seconds: float) -> float:
    asyncpg = module("asyncpg")
    bins = sorted(glob.glob("/usr/lib/postgresql/*/bin"))
    data = directory / "data"
    shutil.chown(directory, USER, USER)
    os.chmod(directory, 0o755)
    words = [tool("initdb", "postgresql", *bins), "-D", str(data), "-A", "trust", "-U", USER]
    subprocess.run(words, user=USER, cwd=directory, check=True, capture_output=True)
    server = [tool("postgres", "postgresql", *bins), "-D", str(data), "-k", str(directory), "-c", "listen_addresses="]
    with running(server, directory, lambda: (directory / ".s.PGSQL.5432").exists(), user=USER):
        return uvloop.run(_load(asyncpg, str(directory), connections, seconds))


async def _connected(asyncpg: Any, place: str) -> Any:
    for _ in range(100):  # the socket exists a moment before it accepts connections
        try:
            return await asyncpg.connect(host=place, user=USER, database=USER)
        except asyncpg.CannotConnectNowError:
            await asyncio.sleep(0.1)
    raise SystemExit("PostgreSQL takes no connections")


async def _load(asyncpg: Any, place: str, connections: int, seconds: float) -> float:
    setup = await _connected(asyncpg, place)
    await setup.execute(_TABLE)

    async def worker(number: int) -> Callable[[], Awaitable[None]]:
        line = await _connected(asyncpg, place)
        create, claim, complete = [await line.prepare(sql) for sql in (_CREATE, _CLAIM, _COMPLETE)]

        async def once() -> None:
            await create.fetchval(f'"{PAYLOAD}"')
            job = None
            while job is None:  # the only queued job may be locked for a moment
                job = await claim.fetchrow(f"w-{number}")
            if await complete.fetchval(job["id"], job["lock_id"]) is None:
                raise SystemExit("PostgreSQL: a job that was claimed could not be completed")

        return once

    return await lifecycles([await worker(number) for number in range(connections)], seconds)
