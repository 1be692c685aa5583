"""Connecting to PostgreSQL: checks, and messages for the operator."""

from __future__ import annotations

import asyncio
import shutil
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from jobd.journal import url as journal_url
from jobd.journal.postgres import session
from jobd.journal.postgres.journal import PostgresJournal, create
from jobd.journal.postgres.postgres_errors import explain, most_useful
from jobd.journal.postgres.session import Target
from jobd.model.journal import JournalMisconfigured, JournalUnavailable
from tests.conftest import tool_missing
from tests.support import postgres
from tests.support.polling import wait_until
from tests.support.postgres import PASSWORD, PostgresServer
from tests.support.tcp_proxy import tcp_proxy
from tests.unit.journal.test_shared_journals import lead, record_of

pytestmark = [pytest.mark.slow, pytest.mark.long]

LEASE_MS = 3000


@pytest.fixture
def database(postgres_server: PostgresServer, journal_name: str) -> Iterator[str]:
    """Return the name of an empty database, and of the role that owns it."""
    name = journal_name.replace("-", "_")
    postgres_server.sql(f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}'", f"CREATE DATABASE {name} OWNER {name}")
    yield name
    postgres_server.sql(f"DROP DATABASE {name} WITH (FORCE)", f"DROP ROLE {name}")


@pytest.fixture
def url(postgres_server: PostgresServer, database: str) -> str:
    return postgres_server.url(database, role=database)


async def sql(server: PostgresServer, *statements: str, database: str = "postgres") -> None:
    await asyncio.to_thread(server.sql, *statements, database=database)


async def failure(url: str, name: str = "main") -> JournalUnavailable:
    """Return the error of an open, which contains no password."""
    with pytest.raises(JournalUnavailable) as caught:
        await PostgresJournal.open(url, name, LEASE_MS)
    text = str(caught.value)
    assert PASSWORD not in text
    assert "secret" not in text
    assert len(text.splitlines()) == 1
    return caught.value


# -- Tables ------------------------------------------------------------------------------------------------------------


async def test_tables_are_created_once(url: str) -> None:
    made = await asyncio.gather(*(create(url, "main", f"id {number}") for number in range(3)))
    assert [each.is_new for each in made].count(True) == 1
    assert len({each.cluster_id for each in made}) == 1
    node = await PostgresJournal.open(url, "main", LEASE_MS)
    assert node.cluster_id == made[0].cluster_id
    await node.close()


async def test_a_journal_can_continue_after_a_record(url: str) -> None:
    await create(url, "main", "id", number=1000, epoch=77)
    node = await PostgresJournal.open(url, "main", LEASE_MS)
    head = await lead(node, epoch=0)
    assert (head.number, head.epoch, head.acked) == (1000, 78, 1000)
    await node.append(record_of(1001, 78), 1000)
    assert await node.read(1000, 10) == [record_of(1001, 78)]
    await node.close()


async def test_two_journals_of_a_database_are_independent(url: str) -> None:
    nodes = []
    for name in ("a", "a-b"):
        await create(url, name, f"id of {name}")
        nodes.append(await PostgresJournal.open(url, name, LEASE_MS))
    for number, node in enumerate(nodes):
        await lead(node, f"holder {number}")
        await node.append(record_of(1, 100, b"%d" % number), 0)
    for number, node in enumerate(nodes):
        assert (await node.read(0, 10))[0].body == b"%d" % number
        head = await node.head()
        assert (head.holder, head.is_connected) == (f"holder {number}", True)
        await node.close()


async def test_missing_tables_are_reported(url: str) -> None:
    error = await failure(url)
    assert isinstance(error, JournalMisconfigured)
    assert error.exit_code == 78
    assert "has no tables of jobd: run `jobd cluster init`" in str(error)


async def test_a_missing_journal_is_reported(url: str) -> None:
    await create(url, "main", "id")
    error = await failure(url, "other")
    assert isinstance(error, JournalMisconfigured)
    assert 'has no journal "other": run `jobd cluster init`' in str(error)


async def test_incomplete_tables_are_completed(url: str, postgres_server: PostgresServer, database: str) -> None:
    await create(url, "main", "id")
    await sql(postgres_server, "DELETE FROM jobd_schema", "DROP TABLE jobd_nodes", database=database)
    assert "has incomplete tables of jobd: run `jobd cluster init`" in str(await failure(url))
    assert not (await create(url, "main", "other")).is_new
    node = await PostgresJournal.open(url, "main", LEASE_MS)
    assert await node.nodes() == []
    await node.close()


async def test_tables_of_a_newer_version_are_reported(url: str, postgres_server: PostgresServer, database: str) -> None:
    await create(url, "main", "id")
    await sql(postgres_server, "UPDATE jobd_schema SET version = 2", database=database)
    expected = "has tables of version 2, and this jobd supports version 1. Upgrade jobd on this node"
    assert expected in str(await failure(url))
    with pytest.raises(JournalMisconfigured, match="version 2"):
        await create(url, "other", "id")


async def test_changed_tables_are_reported(url: str, postgres_server: PostgresServer, database: str) -> None:
    await create(url, "main", "id")
    await sql(postgres_server, "ALTER TABLE jobd_journals RENAME cluster_id TO x", database=database)
    error = await failure(url)
    assert isinstance(error, JournalMisconfigured)
    assert "Upgrade jobd, or restore them" in str(error)


async def test_a_database_that_takes_the_place_of_another_is_refused(
    url: str, postgres_server: PostgresServer, database: str
) -> None:
    await create(url, "main", "id")
    node = await PostgresJournal.open(url, "main", LEASE_MS)
    await node.head()
    await sql(postgres_server, "UPDATE jobd_journals SET cluster_id = 'other'", database=database)
    await sql(postgres_server, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{database}'")
    await wait_until(lambda: rejected(node))
    await node.close()


async def rejected(node: PostgresJournal) -> bool:
    try:
        await node.head()
    except JournalMisconfigured as error:
        return "The id of journal" in str(error)
    except JournalUnavailable:
        pass
    return False


# -- Privileges and logins ---------------------------------------------------------------------------------------------


async def test_a_missing_privilege_is_reported(url: str, postgres_server: PostgresServer, database: str) -> None:
    await create(url, "main", "id")
    other = f"{database}_other"
    await sql(postgres_server, f"CREATE ROLE {other} LOGIN PASSWORD '{PASSWORD}'")
    role_url = postgres_server.url(database, role=other)
    expected = {
        "SELECT": "lacks a privilege: permission denied for table jobd_schema: make the role the owner of the tables",
        "SELECT, INSERT, UPDATE": f'Role "{other}" lacks DELETE on table jobd_schema: make it the owner',
        "ALL": f'Role "{other}" cannot add partitions to table jobd_journal: make it the owner',
    }
    for granted, text in expected.items():
        assert text in str(await failure(role_url))
        statement = f"GRANT {'SELECT, INSERT, UPDATE' if granted == 'SELECT' else 'ALL'} ON ALL TABLES IN SCHEMA public"
        await sql(postgres_server, f"{statement} TO {other}", database=database)
    await sql(postgres_server, f"ALTER TABLE jobd_journal OWNER TO {other}", database=database)
    expected_owner = f'Role "{other}" cannot add partitions to table "jobd_journal_main": make it the owner'
    assert expected_owner in str(await failure(role_url))
    await sql(postgres_server, f"ALTER TABLE jobd_journal OWNER TO {database}", database=database)
    await sql(postgres_server, f"GRANT {database} TO {other}", "REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    await sql(postgres_server, f"ALTER DATABASE {database} OWNER TO postgres")
    await sql(postgres_server, "REVOKE CREATE ON SCHEMA public FROM PUBLIC", database=database)
    assert f'GRANT CREATE ON SCHEMA "public" TO "{other}"' in str(await failure(role_url))
    with pytest.raises(JournalMisconfigured, match="lacks a privilege: permission denied"):
        await create(role_url, "second", "id")
    await sql(postgres_server, f"REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {other}", database=database)
    await sql(postgres_server, f"DROP ROLE {other}")


async def test_a_wrong_password_is_reported(url: str) -> None:
    error = await failure(url.replace("secret%20of", "secret%20from"))
    assert isinstance(error, JournalMisconfigured)
    assert "rejects the password of role" in str(error)
    assert "correct [journal] url, or the file that PGPASSFILE names" in str(error)


async def test_a_wrong_password_of_one_host_does_not_end_a_node_while_another_is_away(url: str) -> None:
    """The other one may be the primary, and come back. A node that exits with 78 is not started again."""
    wrong = url.replace("secret%20of", "secret%20from")
    error = await failure(wrong.replace("127.0.0.1:", "127.0.0.1:1,127.0.0.1:"))
    assert error.exit_code == 75
    assert "rejects the password of role" in str(error)
    assert "127.0.0.1:1 cannot be reached" in str(error)
    standby = explain(asyncpg.ReadOnlySQLTransactionError(), journal_url.parse(url))
    assert most_useful([standby, await failure(wrong)]).exit_code == 78


async def test_a_wrong_database_is_reported(url: str, database: str) -> None:
    error = await failure(url.removesuffix(database) + "nowhere")
    assert isinstance(error, JournalMisconfigured)
    assert 'has no database "nowhere": create it with `createdb`, or correct [journal] url' in str(error)


async def test_a_role_that_may_not_log_in_is_reported(postgres_server: PostgresServer, database: str) -> None:
    await sql(postgres_server, f"ALTER ROLE {database} NOLOGIN")
    error = await failure(postgres_server.url(database, role=database))
    assert isinstance(error, JournalMisconfigured)
    assert "rejects the login" in str(error)


async def test_an_unknown_parameter_is_reported(url: str) -> None:
    error = await failure(f"{url}?sslmode=sometimes")
    assert isinstance(error, JournalMisconfigured)
    assert "correct [journal] url" in str(error)


async def test_missing_tls_is_reported(url: str) -> None:
    error = await failure(f"{url}?sslmode=require")
    assert "has no TLS, or ended the connection: set ssl = on there, or correct sslmode" in str(error)


async def test_an_unreachable_server_is_reported(url: str) -> None:
    error = await failure("postgresql://jobd@127.0.0.1:1/jobd")
    assert error.exit_code == 75
    assert "cannot be reached" in str(error)
    assert str(error).endswith("start it, or correct [journal] url")


async def test_all_unreachable_servers_are_named() -> None:
    error = await failure("postgresql://jobd@127.0.0.1:1,127.0.0.1:2,host.invalid/jobd")
    for host in ("127.0.0.1:1", "127.0.0.1:2", "host.invalid"):
        assert f"PostgreSQL at {host} cannot be reached" in str(error)


async def test_a_server_that_is_named_twice_is_reported_once() -> None:
    target = Target(journal_url.parse("postgresql://127.0.0.1:1,127.0.0.1:1/a"), "main")
    with pytest.raises(JournalUnavailable) as caught:
        await target.connect()
    assert str(caught.value).count("127.0.0.1:1 cannot be reached") == 1


async def test_a_silent_server_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "CONNECT_S", 0.2)

    async def ignore(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(ignore, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    assert "does not respond: start it" in str(await failure(f"postgresql://jobd@127.0.0.1:{port}/jobd"))
    server.close()


async def test_no_free_connection_is_reported(url: str, postgres_server: PostgresServer, database: str) -> None:
    await sql(postgres_server, f"ALTER ROLE {database} CONNECTION LIMIT 0")
    error = await failure(url)
    assert error.exit_code == 75
    assert "has no free connection: raise max_connections" in str(error)


@pytest.fixture
def certificates(postgres_server: PostgresServer, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Give the server a certificate for localhost. Return it, and another one that the server does not have."""
    if shutil.which("openssl") is None:
        tool_missing("openssl", "openssl")
    made = []
    for name in ("server", "other"):
        files = [f"-keyout={tmp_path}/{name}.key", f"-out={tmp_path}/{name}.crt"]
        words = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=localhost"]
        words += ["-addext", "subjectAltName=DNS:localhost", *(word for each in files for word in each.split("="))]
        subprocess.run(["openssl", "req", "-x509", *words], check=True, capture_output=True)
        made.append(tmp_path / f"{name}.crt")
    directory = postgres_server.directory
    for file in ("server.key", "server.crt"):
        shutil.copy(tmp_path / file, directory / file)
        (directory / file).chmod(0o600)
        shutil.chown(directory / file, directory.owner(), directory.group())
    postgres_server.sql(
        f"ALTER SYSTEM SET ssl_cert_file = '{directory}/server.crt'",
        f"ALTER SYSTEM SET ssl_key_file = '{directory}/server.key'",
        "ALTER SYSTEM SET ssl = on",
        "SELECT pg_reload_conf()",
    )
    postgres.wait_for(postgres_server, "SELECT current_setting('ssl')::bool")
    yield made[0], made[1]
    postgres_server.sql("ALTER SYSTEM SET ssl = off", "SELECT pg_reload_conf()")
    postgres.wait_for(postgres_server, "SELECT NOT current_setting('ssl')::bool")


async def test_the_url_configures_tls(url: str, certificates: tuple[Path, Path]) -> None:
    right, other = certificates
    named = url.replace("127.0.0.1", "localhost")
    await create(f"{named}?sslmode=verify-full&sslrootcert={right}", "main", "id")
    async with connection(f"{named}?sslmode=verify-full&sslrootcert={right}") as conn:
        assert await conn.fetchval("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
    for wrong in (f"{named}?sslmode=verify-full&sslrootcert={other}", f"{url}?sslmode=verify-full&sslrootcert={right}"):
        error = await failure(wrong)
        assert isinstance(error, JournalMisconfigured)
        assert "correct sslmode, sslrootcert and related parameters of [journal] url" in str(error)
    error = await failure(f"{url}?sslmode=verify-full&sslrootcert=/nowhere.crt")
    assert isinstance(error, JournalMisconfigured)


# -- Sessions ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def connection(url: str) -> AsyncIterator[asyncpg.Connection]:
    """Open a session as the journal does."""
    conn = await Target(journal_url.parse(url), "main").connect()
    try:
        yield conn
    finally:
        conn.terminate()


async def test_defaults_of_the_role_do_not_matter(url: str, postgres_server: PostgresServer, database: str) -> None:
    await create(url, "main", "id")
    defaults = {
        "synchronous_commit": "off",
        "statement_timeout": "10ms",
        "lock_timeout": "10ms",
        "idle_in_transaction_session_timeout": "10ms",
        "idle_session_timeout": "2s",
        "client_connection_check_interval": "10ms",
        "default_transaction_isolation": "serializable",
        "client_min_messages": "error",
    }
    await sql(postgres_server, *(f"ALTER ROLE {database} SET {name} = '{value}'" for name, value in defaults.items()))
    async with connection(url) as conn:
        for name, value in defaults.items():
            expected = session._SETTINGS.get(name, session.CHECK_INTERVAL)
            assert await conn.fetchval(f"SHOW {name}") == expected != value
        await conn.fetchval("SELECT pg_sleep(0.1)")
        await asyncio.sleep(2.5)
        assert await conn.fetchval("SELECT 1") == 1


async def test_a_server_that_cannot_check_connections_is_accepted(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await create(url, "main", "id")
    monkeypatch.setattr(session, "CHECK_INTERVAL", "-1")  # rejected in the same way
    async with connection(url) as conn:
        assert await conn.fetchval("SHOW client_connection_check_interval") == "0"


@pytest.mark.parametrize("setting", ["fsync", "full_page_writes"])
async def test_a_server_that_can_lose_records_is_refused(
    setting: str, url: str, postgres_server: PostgresServer
) -> None:
    await create(url, "main", "id")
    await sql(postgres_server, f"ALTER SYSTEM SET {setting} = off", "SELECT pg_reload_conf()")
    try:
        await asyncio.to_thread(postgres.wait_for, postgres_server, f"SELECT NOT current_setting('{setting}')::bool")
        error = await failure(url)
        assert isinstance(error, JournalMisconfigured)
        assert f"{setting} = off, which can lose acknowledged records: set it to on" in str(error)
    finally:
        await sql(postgres_server, f"ALTER SYSTEM RESET {setting}", "SELECT pg_reload_conf()")
        await asyncio.to_thread(postgres.wait_for, postgres_server, f"SELECT current_setting('{setting}')::bool")


async def test_a_read_only_database_is_reported(url: str, postgres_server: PostgresServer, database: str) -> None:
    await create(url, "main", "id")
    await sql(postgres_server, f"ALTER DATABASE {database} SET default_transaction_read_only = on")
    error = await failure(url)
    assert error.exit_code == 75
    assert "accepts no writes: it is a standby, or default_transaction_read_only is on" in str(error)


async def test_an_old_server_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "OLDEST", 990000)
    with pytest.raises(JournalMisconfigured, match="is too old: jobd needs version 14 or newer"):
        await create(url, "main", "id")


async def test_a_connection_pooler_is_refused(url: str, postgres_server: PostgresServer) -> None:
    """A pooler gives its clients process ids of its own."""

    def rewrite(response: bytes) -> bytes:
        at = response.find(b"K\0\0\0\x0c")
        return response if at < 0 else response[: at + 5] + struct.pack("!I", 1) + response[at + 9 :]

    await create(url, "main", "id")
    async with tcp_proxy(postgres_server.port) as proxy:
        proxied = url.replace(f":{postgres_server.port}/", f":{proxy.port}/")
        async with connection(proxied):
            pass
        proxy.rewrite = rewrite
        error = await failure(proxied)
        assert isinstance(error, JournalMisconfigured)
        assert "is a connection pooler, but jobd needs a session of its own" in str(error)


async def test_of_several_hosts_the_one_that_accepts_writes_is_used(url: str, postgres_server: PostgresServer) -> None:
    await create(url, "main", "id")
    own = f"127.0.0.1:{postgres_server.port}"
    target = Target(journal_url.parse(url.replace(own, f"127.0.0.1:1,{own},127.0.0.1:2")), "main")
    for _ in range(2):
        conn = await target.connect()
        assert await conn.fetchval("SELECT 1") == 1
        conn.terminate()


async def test_the_system_closes_a_connection_to_a_silent_machine(url: str, postgres_server: PostgresServer) -> None:
    await create(url, "main", "id")
    conn = await Target(journal_url.parse(url), "main", lease_ms=1_500).connect()
    opened = conn._transport.get_extra_info("socket")
    assert opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1_500
    assert opened.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == session.KEEPALIVE_S
    conn.terminate()


async def test_a_silent_host_is_not_awaited_for_long_after_another_has_failed(
    url: str, postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "SILENT_S", 0.2)
    await create(url, "main", "id")
    async with tcp_proxy(postgres_server.port) as proxy:
        proxy.loses_requests = True
        own = f"127.0.0.1:{postgres_server.port}"
        error = await failure(url.replace(own, f"127.0.0.1:1,127.0.0.1:{proxy.port}"))
        assert f"127.0.0.1:{proxy.port} does not respond" in str(error)
        assert "127.0.0.1:1 cannot be reached: connection refused" in str(error)
        conn = await Target(journal_url.parse(url.replace(own, f"127.0.0.1:{proxy.port},{own}")), "main").connect()
        assert await conn.fetchval("SELECT 1") == 1
        conn.terminate()


async def test_a_takeover_is_seen_with_the_lock_of_the_leader(url: str) -> None:
    """A node that saw the new leader without its lock could take over from it before its listeners are open."""
    await create(url, "main", "id")
    a = await PostgresJournal.open(url, "main", LEASE_MS)
    b = await PostgresJournal.open(url, "main", LEASE_MS)
    is_over = False

    async def poll() -> list[tuple[str | None, bool]]:
        seen = []
        while not is_over:
            head = await b.head()
            seen.append((head.holder, head.is_connected))
        return seen

    polling = asyncio.create_task(poll())
    for number in range(20):
        await lead(a, f"a{number}")
    is_over = True
    assert {is_connected for holder, is_connected in await polling if holder not in (None, "a0")} <= {True}
    await a.close()
    await b.close()
