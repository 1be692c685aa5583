"""A cluster under load: nodes on PostgreSQL servers with quorum commit, and clients that know every node.

Every response is recorded in a ledger, which is compared with the store of each node at the end.
"""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import shutil
import signal
import statistics
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple
from uuid import uuid4

from jobd.client import JobClient, JobdError
from jobd.client.api_request import ApiRequest, ApiResponse, request_for
from jobd.client.endpoint import Endpoint
from jobd.journal.postgres.journal import create
from jobd.model.calls import JobCalls
from jobd.model.job import Job
from tests.proof.faults.harness import Counts, Tool, Trial
from tests.proof.faults.ledger import JobRecord, Ledger, SentRequest
from tests.proof.faults.load import CLIENTS, ENDINGS, Disconnected, LoadClient
from tests.proof.faults.lost_responses import NOT_IDEMPOTENT
from tests.proof.faults.network import NodeNetwork
from tests.proof.faults.store_check import StoreContents, checked_contents
from tests.support import postgres
from tests.support.daemon_process import TIMEOUT_S, TOKEN, DaemonResponse, call
from tests.support.node_process import NodeProcess
from tests.support.polling import poll_until
from tests.support.postgres import PASSWORD, PostgresMissing, PostgresServer

NODES: Final = ("a", "b", "c")
LEASE_S: Final = 3.0
PATIENCE_S: Final = 90.0  # of a client
ATTEMPT_S: Final = 10.0
ROLE: Final = "jobd"
DATABASE: Final = "jobd"
STEPPED_DOWN: Final = 75
NEAR: Final = 200  # events; under load, a standby is always a little behind
SETTINGS: Final = {
    "JOBD_JOURNAL_REQUIRE_SYNC": "true",
    "JOBD_JOURNAL_LEASE": f"{LEASE_S:.0f}s",
    "JOBD_LOCKS_TTL": "12h",  # no lock ends during a check
    "JOBD_LOCKS_PROGRESS_TIMEOUT": "12h",
}
_UNSETTLED: Final = frozenset({"unreachable", "not_leader", "outcome_unknown", "overloaded", "shutting_down"})


def _is_installed() -> bool:
    try:
        postgres.programs()
    except PostgresMissing:
        return False
    return True


POSTGRES: Final = Tool("PostgreSQL", "postgresql", _is_installed)


class CountingClient(JobClient):
    """A client that counts the attempts of a request that may have been applied without a response."""

    unanswered = 0

    def _exchange(self, endpoint: Endpoint, request: ApiRequest[Any], timeout_s: float) -> ApiResponse:
        self.unanswered += 1
        response = super()._exchange(endpoint, request, timeout_s)
        if response.status < 500 or b'"outcome_unknown"' not in response.body:
            self.unanswered -= 1
        return response


class NodesClient(LoadClient):
    """A client of the load that gives a request to one node after the other until one serves it.

    It leaves few jobs processing, because each new leader extends all locks.
    """

    endings = ENDINGS + 9 * ENDINGS[:-1]

    def _print(self, connection: Any, job_id: str, body: dict[str, Any]) -> None:
        with suppress(JobdError):
            connection.send(request_for(JobCalls.append_output, job_id, **body))

    def _ask(self, connection: Any, record: JobRecord, request: SentRequest) -> Any:
        client: CountingClient = connection
        record.open = request
        client.unanswered = 0
        headers = {"Content-Type": "application/json"}
        headers |= {name.replace("_", "-"): value for name, value in request.headers.items()}
        body = json.dumps(request.body).encode()
        sent = ApiRequest("POST", request.path, lambda text: json.loads(text)["data"], body, headers)
        try:
            data = client.send(sent)
        except JobdError as error:
            if error.code in _UNSETTLED:
                self._note_unanswered(record, request, client.unanswered - 1)
                raise Disconnected from error
            raise AssertionError(f"{request} was rejected") from error
        self._note_unanswered(record, request, client.unanswered)
        self._ledger.succeeded(record, request, data)
        return data

    def _note_unanswered(self, record: JobRecord, request: SentRequest, attempts: int) -> None:
        for _ in range(attempts if request.event in NOT_IDEMPOTENT else 0):
            record.note_optional(request.event)


class Leader(NodeProcess):
    """Calls of a node over TCP. An Idempotency-Key is known to the kind of listener that received it."""

    def __init__(self, node: NodeProcess) -> None:
        self._node = node

    def post(self, path: str, body: Any = None, **headers: str) -> DaemonResponse:
        connection = http.client.HTTPConnection(self._node.host, self._node.port, timeout=30)
        with closing(connection):
            return call(connection, "POST", path, body, Authorization=f"Bearer {TOKEN}", **headers)


class Outage(NamedTuple):
    """Times of time.monotonic(): of the fault, of the takeover by another node, and when the load had gone on."""

    began_s: float
    led_s: float
    ended_s: float


class NodesUnderLoad:
    """The nodes, their servers, the ledger of the load, and what was measured."""

    def __init__(
        self,
        trial: Trial,
        servers: list[PostgresServer],
        stack: ExitStack,
        networks: Sequence[NodeNetwork] = (),
    ) -> None:
        self.servers = servers  # the primary is first
        self.networks = networks
        self.ledger = Ledger()
        self.nodes: list[NodeProcess] = []
        self.counts: Counts = {}  # after everything has been checked
        self._outages: dict[str, list[Outage]] = {}
        self._loads = 0
        self._trial = trial
        self._stack = stack

    def add(
        self,
        name: str,
        directory: Path | None = None,
        *,
        port: int = 0,
        environ: Mapping[str, str] | None = None,
    ) -> NodeProcess:
        """Prepare a node. `port` is that of PostgreSQL, if it is not reached directly."""
        number = len(self.nodes)
        network = self.networks[number] if self.networks else None
        host = network.database_host if network else "127.0.0.1"
        hosts = ",".join(f"{host}:{each}" for each in ([port] if port else [each.port for each in self.servers]))
        node = NodeProcess(
            directory or self._trial.directory / name,
            f"postgresql://{ROLE}:{PASSWORD.replace(' ', '%20')}@{hosts}/{DATABASE}",
            name,
            host=network.host if network else "127.0.0.1",
            **SETTINGS | dict(environ or {}),
        )
        node.prefix = network.prefix if network else []
        self._stack.push(node)
        self.nodes.append(node)
        return node

    def start(self) -> None:
        """Start all nodes, and wait until one leads and the others follow."""
        for node in self.nodes:
            node.launch()
        for node in self.nodes:
            node.wait_for_log(b"event=standby")
        self.leader()

    @property
    def urls(self) -> str:
        return ",".join(node.url for node in self.nodes)

    @property
    def log(self) -> str:
        return "\n".join(f"--- {node.name}\n{node.log[-3000:].decode()}" for node in self.nodes)

    def leader(self, among: Sequence[NodeProcess] = ()) -> NodeProcess:
        """Wait until one of these nodes leads."""
        found: list[NodeProcess] = []

        def is_led() -> bool:
            found[:] = [each for each in among or self.nodes if leads(each)]
            return bool(found)

        try:
            poll_until(is_led)
        except AssertionError as error:
            raise AssertionError(f"no node leads:\n{self.log}") from error
        return found[0]

    def others(self, *nodes: NodeProcess) -> list[NodeProcess]:
        return [each for each in self.nodes if each not in nodes]

    # -- the load

    @contextmanager
    def load(self) -> Iterator[None]:
        """Run clients while the block runs."""
        stop = threading.Event()
        self._loads += 1
        with ThreadPoolExecutor(CLIENTS) as pool:
            each = [NodesClient(self.ledger, f"load-{self._loads}-{number}", stop) for number in range(CLIENTS)]
            done = [pool.submit(client.work, self._connect) for client in each]
            try:
                yield
            finally:
                stop.set()
        for one in done:
            one.result()

    def _connect(self) -> Any:
        return CountingClient(self.urls, token=TOKEN, timeout_s=ATTEMPT_S, retry_for_s=PATIENCE_S)

    def wait_for_changes(self, more: int) -> None:
        """Wait for this many more acknowledgements."""
        assert self.ledger.wait_for(more, PATIENCE_S), f"the load does not go on:\n{self.log}"

    # -- faults

    @contextmanager
    def outage(self, kind: str, among: Sequence[NodeProcess] = ()) -> Iterator[None]:
        """Measure from the start of the block, the fault, until one of these nodes leads and the load has gone on."""
        began_s = time.monotonic()
        yield
        self.leader(among)
        led_s = time.monotonic()
        self.wait_for_changes(CLIENTS)
        self._outages.setdefault(kind, []).append(Outage(began_s, led_s, time.monotonic()))

    def revive(self) -> int:
        """Start the nodes that have ended, as systemd does. Return their number."""
        ended = [node for node in self.nodes if not node.is_running]
        for node in ended:
            code = node.exit_code
            assert code in (None, 0, STEPPED_DOWN, -signal.SIGKILL), f"{node.name} exited with {code}:\n{self.log}"
            node.start()
        return len(ended)

    def wait_until_followed(self) -> None:
        """Wait until every standby has applied the records of this moment, and lacks few of the later ones."""
        record = self.leader().cluster()["record"]
        poll_until(lambda: all(_has_applied(node, record) for node in self.nodes))

    # -- afterwards

    def checked(self) -> Counts:
        """Stop everything, compare each store with the ledger, and return what was counted and measured."""
        self.revive()
        leader = self.leader()
        settled = self.ledger.settle(Leader(leader))
        NodesClient(self.ledger, "afterwards", threading.Event()).work(self._connect, 5)
        self.wait_until_followed()
        for node in [*self.others(leader), leader]:
            assert node.stop() == 0, node.log[-2000:]
        stores = [checked_contents(node.store) for node in self.nodes]
        (checked,) = {self.ledger.check(store) for store in stores}
        _compare(stores)
        _check_locks(stores[0])
        self._check_journal()
        answered_s = sorted(at for record in self.ledger.jobs.values() for at in record.answered_s)
        return {
            f"servers of PostgreSQL {postgres.version()}": len(self.servers),
            "acknowledged changes checked on each node": checked,
            "tokens": len(self.ledger.tokens),
            **({"without a response, settled by a repeat": settled} if settled else {}),
            **self._measured(answered_s),
        }

    def _measured(self, answered_s: Sequence[float]) -> Counts:
        """Return the times of the outages, by kind if there are several."""
        found: Counts = {}
        for kind, outages in self._outages.items():
            which = f" after {kind}" if len(self._outages) > 1 else ""
            found |= _times(f"until another node led{which}", [each.led_s - each.began_s for each in outages])
            found |= _times(f"without an acknowledgement{which}", [_gap_s(answered_s, each) for each in outages])
        return found

    def keep_evidence(self) -> None:
        """Write the ledger, the logs of nodes and servers and the journal beside the stores."""
        directory = self._trial.directory
        for server in self.servers:
            shutil.copyfile(server.directory / "log", directory / f"postgres-{server.port}.log")
        self.ledger.write(directory / "ledger.jsonl")
        for node in self.nodes:
            (directory / f"{node.name}.log").write_bytes(node.log)
        with suppress(AssertionError):  # no server runs
            journal = self.servers[0].sql(
                "COPY (SELECT * FROM jobd_journal ORDER BY number) TO STDOUT", database=DATABASE
            )
            (directory / "journal.tsv").write_text(journal)

    def _check_journal(self) -> None:
        """Check that no record is missing, and that no record of an epoch comes after one of a later epoch."""
        rows = "SELECT number, epoch, lag(number) OVER (ORDER BY number) AS n, lag(epoch) OVER (ORDER BY number) AS e"
        wrong = self.servers[0].sql(
            f"SELECT number, n, epoch, e FROM ({rows} FROM jobd_journal) AS r WHERE number <> n + 1 OR epoch < e",
            database=DATABASE,
        )
        assert not wrong, f"records that do not follow the one before: {wrong}"


def leads(node: NodeProcess) -> bool:
    with suppress(OSError, http.client.HTTPException):
        return node.is_running and node.get("/readyz").status == 200
    return False


def _has_applied(node: NodeProcess, record: int) -> bool:
    """Return whether a node has applied the journal as far as `record`, and lacks few events of the rest.

    A standby applies the newest record when the next append or renewal acknowledges it, so its lag need not be zero.
    """
    with suppress(OSError, http.client.HTTPException):
        view = node.cluster()
        number, lag = view["record"], view["lag_events"]
        return number is not None and bool(number - lag >= record and lag <= NEAR)
    return False


def _compare(stores: Sequence[StoreContents]) -> None:
    first: dict[str, Job] = stores[0].jobs
    for other in stores[1:]:
        assert other.jobs.keys() == first.keys(), sorted(other.jobs.keys() ^ first.keys())[:5]
        for job_id, job in first.items():
            assert other.jobs[job_id] == job, f"one node has {job}, another one {other.jobs[job_id]}"


def _check_locks(store: StoreContents) -> None:
    """Check that no lock has ended by itself: time without a leader does not count, and no wall clock does."""
    ended = [
        (job_id, event.type)
        for job_id, events in store.events.items()
        for event in events
        if event.type in ("stalled", "lock_expired")
    ]
    assert not ended, f"locks that ended early: {ended[:5]}"


def _gap_s(answered_s: Sequence[float], outage: Outage) -> float:
    """Return the longest time without one of the sorted acknowledgements, from the last one before the fault."""
    last = max(bisect_left(answered_s, outage.began_s) - 1, 0)
    times = answered_s[last : bisect_right(answered_s, outage.ended_s)]
    return max((after - before for before, after in itertools.pairwise(times)), default=0.0)


def _times(what: str, times_s: Sequence[float]) -> Counts:
    return {
        f"ms {what}, median": round(statistics.median(times_s) * 1000),
        f"ms {what}, at most": round(max(times_s) * 1000),
    }


@contextmanager
def nodes_under_load(trial: Trial, *, networks: Sequence[NodeNetwork] = ()) -> Iterator[NodesUnderLoad]:
    """Start PostgreSQL with quorum commit and make a journal. The nodes are not started yet."""
    with ExitStack() as stack:
        servers = stack.enter_context(postgres.postgres_cluster(2, listen_addresses="*" if networks else "127.0.0.1"))
        servers[0].sql(f"CREATE ROLE {ROLE} LOGIN PASSWORD '{PASSWORD}'", f"GRANT pg_read_all_stats TO {ROLE}")
        servers[0].sql(f"CREATE DATABASE {DATABASE} OWNER {ROLE}")
        asyncio.run(create(servers[0].url(DATABASE, role=ROLE), "main", uuid4().hex))
        cluster = NodesUnderLoad(trial, servers, stack, networks)
        try:
            yield cluster
        except BaseException:
            cluster.keep_evidence()
            raise
        for server in servers:
            if server.process is not None:
                server.kill()  # a shutdown takes seconds


@contextmanager
def started(cluster: NodesUnderLoad, *, port: int = 0) -> Iterator[None]:
    """Add three nodes, and run them under load. See `add` for `port`."""
    for name in NODES:
        cluster.add(name, port=port)
    with under_load(cluster):
        yield


@contextmanager
def under_load(cluster: NodesUnderLoad) -> Iterator[None]:
    """Start the nodes, and run a load while the block runs. Check everything afterwards."""
    cluster.start()
    with cluster.load():
        cluster.wait_for_changes(CLIENTS)
        yield
    cluster.counts = cluster.checked()


@contextmanager
def running(trial: Trial, *, networks: Sequence[NodeNetwork] = ()) -> Iterator[NodesUnderLoad]:
    """Run three nodes, and a load while the block runs. Check everything afterwards."""
    with nodes_under_load(trial, networks=networks) as cluster, started(cluster):
        yield cluster


def remove_store(node: NodeProcess) -> None:
    """Remove the files of a stopped node, which then begins with a snapshot."""
    for file in node.directory.glob(f"{node.store.name}*"):
        shutil.rmtree(file) if file.is_dir() else file.unlink()


def freeze(node: NodeProcess) -> None:
    node.process.send_signal(signal.SIGSTOP)


def thaw(node: NodeProcess) -> None:
    node.process.send_signal(signal.SIGCONT)


def exit_code(node: NodeProcess) -> int:
    """Wait until the process has ended."""
    return node.process.wait(TIMEOUT_S)
