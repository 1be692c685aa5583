"""BullMQ on Redis that syncs its log before each response (appendfsync always)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests.benchmarks.peers.server import Missing, running, tool

SCRIPT = Path(__file__).with_name("bullmq.mjs")


def measure(directory: Path, connections: int, seconds: float) -> float:
    modules = Path(os.environ.get("JOBD_PEERS_NODE", "build/peers/node_modules")).absolute()
    if not (modules / "bullmq").exists():
        raise Missing(f"bullmq is not in {modules}: make bench-peers installs it")
    socket = directory / "redis.sock"
    words = [tool("redis-server", "redis-server"), "--port", "0", "--unixsocket", str(socket), "--dir", str(directory)]
    words += ["--appendonly", "yes", "--appendfsync", "always", "--save", "", "--maxmemory-policy", "noeviction"]
    with running(words, directory, socket.exists):
        command = [tool("node", "nodejs"), str(SCRIPT), str(modules), str(socket), str(connections), str(seconds)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise SystemExit(f"bullmq: {run.stderr[-2000:]}")
        return float(json.loads(run.stdout)["lifecycles_per_s"])
