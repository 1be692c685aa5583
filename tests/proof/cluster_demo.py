"""Run jobd on three nodes, end its leader twice while workers draw pictures, and check every result.

    python -m tests.proof.cluster_demo [--seed N]

PostgreSQL runs on three servers with quorum commit. First the leader is killed, then the next one hands over its
leadership. The exit code is 0 if every check passed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

from jobd.cli.demo import recovery
from jobd.cli.demo.processes import Sandbox
from jobd.client import JobClient, JobView
from jobd.model.job import FINISHED
from tests.support.daemon_process import TOKEN
from tests.support.node_process import Cluster, NodeProcess
from tests.support.postgres import PostgresMissing, PostgresServer, postgres_cluster, version

NODES: Final = ("a", "b", "c")
WORKERS: Final = ("w-1", "w-2")
PICTURES: Final = 40
FILMS: Final = 3
LOCK_TTL_MS: Final = 60_000  # longer than a takeover, so that no job needs to be repeated
DEADLINE_S: Final = 90.0
NEAR: Final = 50  # events; while work goes on, a standby is always a little behind
_POLL_S: Final = 0.02

Check = tuple[str, bool]


class Demo:
    """Three nodes on `server`, and workers that know all of them."""

    def __init__(self, sandbox: Sandbox, server: PostgresServer, stack: contextlib.ExitStack, seed: int) -> None:
        self.sandbox = sandbox
        self.say = sandbox.say
        self._seed = seed
        self.cluster = Cluster(sandbox.folder, server.url(), stack, JOBD_JOURNAL_REQUIRE_SYNC="true")
        self.checks: list[Check] = []

    def run(self) -> list[Check]:
        """Run the demo. Returns each check with whether it was observed."""
        self._start_nodes()
        with JobClient(self.urls, token=TOKEN, retry_for_s=30.0) as client:
            jobs = client.create_jobs(recovery.jobs_of(self._seed, PICTURES, FILMS))
            self.say(f"{len(jobs)} jobs submitted")
            token = str(self.cluster.nodes[0].directory / "token")
            for name in WORKERS:
                options = {"endpoint": self.urls, "JOBD_WORKER_TOKEN_FILE": token}
                pid = self.sandbox.start_worker(name, "default", lock_ttl_ms=LOCK_TTL_MS, **options)
                self.say(f"worker {name} started (pid {pid})")
            self._wait_for(client, finished=len(jobs) // 5)
            self._kill_leader(client)
            self._wait_for(client, finished=len(jobs) // 2)
            self._hand_over(client)
            jobs = self._wait_for(client, finished=len(jobs))
            self._check_jobs(client, jobs)
        codes = [node.stop() for node in self._alive()]
        self.checks.append(("the nodes stopped cleanly on SIGTERM", bool(codes) and not any(codes)))
        return self.checks

    @property
    def urls(self) -> str:
        return ",".join(node.url for node in self.cluster.nodes)

    @property
    def admin_urls(self) -> str:
        return ",".join(f"unix:{node.admin_socket}" for node in self._alive())

    # -- steps --------------------------------------------------------------------------------------------------------

    def _start_nodes(self) -> None:
        environ = {"JOBD_JOURNAL_URL": self.cluster.url}
        self._jobd("jobd", "cluster", "init", **environ)
        for name in NODES:
            node = self.cluster.add(name)
            if name == NODES[0]:
                node.wait_leads()
            self.say(f"node {name} runs at {node.url} (pid {node.process.pid})")
        self._wait_until(lambda: len(self.cluster.nodes[0].cluster()["nodes"]) == len(NODES))
        self._show_cluster()

    def _kill_leader(self, client: JobClient) -> None:
        leader = self._leader()
        held = [job.id for job in client.list_jobs(status="processing").jobs]
        began_s = time.monotonic()
        leader.kill()
        self.say(f"KILL -9: the leader {leader.name} dies while {', '.join(held) or 'no job'} are processing")
        again = self._see_takeover(client, began_s)
        self.checks.append(("another node led after the leader was killed", again is not leader))
        self.checks.append(("jobs were processing when the leader was killed", bool(held)))
        leader.start()
        self._wait_until(lambda: leader.cluster()["lag_events"] < NEAR)
        self.say(f"node {leader.name} is back, and follows {again.name}")

    def _hand_over(self, client: JobClient) -> None:
        leader = self._leader()
        self.say(f"jobctl cluster step-down: {leader.name} hands over")
        began_s = time.monotonic()
        self._jobd("jobd.cli.ctl.main", "cluster", "step-down", "--yes", JOBD_ADMIN_URL=self.admin_urls)
        again = self._see_takeover(client, began_s)
        self.checks.append(("another node led after a step-down", again is not leader))
        self.checks.append(("the node that stepped down exited with 75", leader.process.wait(DEADLINE_S) == 75))
        leader.start()  # as systemd does
        self._show_cluster()

    def _see_takeover(self, client: JobClient, began_s: float) -> NodeProcess:
        client.list_jobs(limit=1)  # waits until a node responds
        took_ms = (time.monotonic() - began_s) * 1000
        leader = self._leader()
        self.say(f"{leader.name} leads and serves, {took_ms:.0f} ms later")
        return leader

    # -- what can be seen ---------------------------------------------------------------------------------------------

    def _leader(self) -> NodeProcess:
        def leading() -> list[NodeProcess]:
            return [node for node in self._alive() if node.get("/readyz").status == 200]

        self._wait_until(lambda: len(leading()) == 1)
        return leading()[0]

    def _alive(self) -> list[NodeProcess]:
        return [node for node in self.cluster.nodes if node.is_running]

    def _show_cluster(self) -> None:
        text = self._jobd("jobd.cli.ctl.main", "cluster", JOBD_ADMIN_URL=self.admin_urls)
        print("\n" + text, flush=True)

    def _wait_for(self, client: JobClient, finished: int) -> list[JobView]:
        jobs: list[JobView] = []

        def are_finished() -> bool:
            jobs[:] = client.iterate_jobs(limit=200)
            return sum(job.status in FINISHED for job in jobs) >= finished

        self._wait_until(are_finished)
        self.say(f"{finished} of {len(jobs)} jobs are finished")
        return jobs

    def _wait_until(self, condition: Any) -> None:
        until_s = time.monotonic() + DEADLINE_S
        while not condition():
            if time.monotonic() > until_s:
                raise TimeoutError(f"The demo did not go on within {DEADLINE_S:.0f} s.")
            time.sleep(_POLL_S)

    def _check_jobs(self, client: JobClient, jobs: Sequence[JobView]) -> None:
        errors = [f"{job.id}: {error}" for job in jobs if (error := recovery.result_error(job, self.sandbox.results))]
        for error in errors:
            self.say(error)
        timelines = {job.id: client.timeline(job.id) for job in jobs}
        grants = {id_: sum(event.type == "granted" for event in events) for id_, events in timelines.items()}
        tokens = [
            int(event.details["fencing_token"]) for events in timelines.values() for event in events
            if event.type == "granted"
        ]  # fmt: skip
        total = PICTURES + FILMS
        self.checks += [
            (f"all {total} jobs are completed", len(jobs) == total and all(job.status == "completed" for job in jobs)),
            ("every result was read back from the disk and is complete", not errors),
            ("each job had one holder, and no lock was lost", set(grants.values()) == {1}),
            ("no two grants had the same fencing token", len(set(tokens)) == len(tokens)),
        ]

    def _jobd(self, module: str, *words: str, **environ: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", module, *words],
            env=os.environ | {"ADMIN_TOKEN": TOKEN} | environ,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(
                f"{module} {' '.join(words)} exited with {done.returncode}: {done.stderr or done.stdout}"
            )
        return done.stdout


@contextlib.contextmanager
def demo(seed: int) -> Iterator[Demo]:
    """Start PostgreSQL, and end every process at the end. Raises PostgresMissing."""
    with contextlib.ExitStack() as stack:
        servers = stack.enter_context(postgres_cluster(standbys=2))
        yield Demo(stack.enter_context(Sandbox()), servers[0], stack, seed)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proof.cluster_demo", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the pictures")
    given = parser.parse_args(arguments)
    try:
        print(f"PostgreSQL {version()} on three servers, and jobd on three nodes. Starting them takes a few seconds.")
        with demo(given.seed) as running:
            try:
                checks = running.run()
            except BaseException:
                for node in running.cluster.nodes:
                    print(f"--- log of node {node.name}\n{node.log.decode()}", file=sys.stderr)
                raise
    except PostgresMissing as error:
        print(error, file=sys.stderr)
        return 1
    return recovery.verdict("make cluster-demo", checks)


if __name__ == "__main__":
    sys.exit(main())
