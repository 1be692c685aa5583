"""Translate the errors of PostgreSQL into sentences that say what to do."""

from __future__ import annotations

import errno
import ssl
from typing import Final

import asyncpg

from jobd.journal.url import LOCAL, JournalUrl
from jobd.model.journal import JournalMisconfigured, JournalUnavailable

INIT: Final = "run `jobd cluster init`"
_PASSWORD_FILE: Final = "correct [journal] url, or the file that PGPASSFILE names"


def was_rejected(error: BaseException) -> bool:
    """Return whether the server rejected a statement, so that it has no effect.

    After any other error, such as the end of the session, the statement may have been committed.
    """
    return isinstance(error, asyncpg.PostgresError) and getattr(error, "severity_en", None) == "ERROR"


def is_disk_full(error: BaseException) -> bool:
    return isinstance(error, asyncpg.DiskFullError)


def is_unsupported(error: BaseException) -> bool:
    """Return whether the server lacks a function, or does not let the role call it."""
    missing = (asyncpg.FeatureNotSupportedError, asyncpg.InsufficientPrivilegeError, asyncpg.UndefinedFunctionError)
    return isinstance(error, missing)


def lacks_partition(error: BaseException) -> bool:
    """Return whether there is no partition for the number of a record."""
    return isinstance(error, asyncpg.CheckViolationError) and getattr(error, "constraint_name", None) is None


def exists_already(error: BaseException) -> bool:
    """Return whether another session has created the same partition, or one that overlaps with it."""
    duplicate = (asyncpg.DuplicateTableError, asyncpg.UniqueViolationError, asyncpg.InvalidObjectDefinitionError)
    return isinstance(error, duplicate)


def explain(error: BaseException, url: JournalUrl, host: str = "") -> JournalUnavailable:
    """Return the error for the operator, without the password. Re-raises an `error` of any other kind."""
    server = f"PostgreSQL at {host or ', '.join(url.hosts)}"
    match error:
        case JournalUnavailable():
            return error
        case asyncpg.InvalidPasswordError():
            return JournalMisconfigured(f'{server} rejects the password of role "{url.role}": {_PASSWORD_FILE}')
        case asyncpg.InvalidAuthorizationSpecificationError():
            text = f"{error}: correct [journal] url, create the role, or allow it in pg_hba.conf"
            return JournalMisconfigured(f"{server} rejects the login: {text}")
        case asyncpg.InvalidCatalogNameError():
            text = "create it with `createdb`, or correct [journal] url"
            return JournalMisconfigured(f'{server} has no database "{url.database}": {text}')
        case asyncpg.UndefinedTableError() | asyncpg.InvalidSchemaNameError():
            return JournalMisconfigured(f'Database "{url.database}" has no tables of jobd: {INIT}')
        case asyncpg.UndefinedColumnError():
            text = "they are of another version or were changed. Upgrade jobd, or restore them"
            return JournalMisconfigured(
                f'The tables of jobd in database "{url.database}" do not match: {error}: {text}'
            )
        case asyncpg.InsufficientPrivilegeError():
            text = "make the role the owner of the tables of jobd, and GRANT CREATE on their schema to it"
            return JournalMisconfigured(f'Role "{url.role}" lacks a privilege: {error}: {text}')
        case asyncpg.ReadOnlySQLTransactionError() | asyncpg.TargetServerAttributeNotMatched():
            return _read_only(server)
        case asyncpg.DiskFullError():
            return JournalUnavailable(f"The disk of {server} is full: free some space on it")
        case asyncpg.TooManyConnectionsError():
            text = "raise max_connections, or the limit of the role or database"
            return JournalUnavailable(f"{server} has no free connection: {text}")
        case asyncpg.AdminShutdownError() | asyncpg.CrashShutdownError():
            return JournalUnavailable(f"{server} has ended the session: try again")
        case asyncpg.CannotConnectNowError():
            return JournalUnavailable(f"{server} is starting or stopping: try again in a moment")
        case asyncpg.ClientConfigurationError():
            return JournalMisconfigured(f"The URL of {server} is invalid: {error}: correct [journal] url")
        case OSError():
            return _network_error(error, server, is_local=host[:1] == "/" or host == LOCAL)
        case asyncpg.ProtocolViolationError() if "startup parameter" in str(error):  # PgBouncer
            return pooler(host)
        case asyncpg.PostgresConnectionError() | asyncpg.InterfaceError() | asyncpg.InternalClientError():
            return JournalUnavailable(f"{server} did not respond in time, or ended the connection: try again")
        case asyncpg.PostgresError():
            return JournalUnavailable(f"{server} reports an error: {error} (SQLSTATE {error.sqlstate})")
        case _:
            raise error


def _network_error(error: OSError, server: str, *, is_local: bool) -> JournalUnavailable:
    match error:
        case ssl.SSLError():
            text = "correct sslmode, sslrootcert and related parameters of [journal] url"
            return JournalMisconfigured(f"TLS with {server} fails: {error.reason or error}: {text}")
        case TimeoutError():
            return JournalUnavailable(f"{server} does not respond: start it, or correct [journal] url")
        case OSError(errno=errno.ENOENT | errno.EACCES) if not is_local:
            text = "correct sslrootcert, sslcert and related parameters of [journal] url"
            return JournalMisconfigured(f"A file for TLS with {server} cannot be read: {error.strerror}: {text}")
        case ConnectionError() if "SSL" in str(error):
            text = "set ssl = on there, or correct sslmode in [journal] url"
            return JournalUnavailable(f"{server} has no TLS, or ended the connection: {text}")
        case ConnectionRefusedError():
            text = "connection refused"
        case ConnectionError():
            text = "connection lost"
        case _:
            text = error.strerror or str(error) or type(error).__name__
    return JournalUnavailable(f"{server} cannot be reached: {text}: start it, or correct [journal] url")


def pooler(host: str) -> JournalMisconfigured:
    """Return the error for a server that uses several connections of PostgreSQL for one session."""
    advice = "name the servers themselves in [journal] url"
    return JournalMisconfigured(f"{host} is a connection pooler, but jobd needs a session of its own: {advice}")


class _ReadOnly(JournalUnavailable):
    """A server accepts no writes."""


def _read_only(server: str) -> JournalUnavailable:
    text = "it is a standby, or default_transaction_read_only is on. Name the primary in [journal] url"
    return _ReadOnly(f"{server} accepts no writes: {text}")


def most_useful(errors: list[JournalUnavailable]) -> JournalUnavailable:
    """Return the error to show for several hosts.

    It is a misconfiguration unless another host, which may be the primary, cannot be reached now.
    """
    wrong = [each for each in errors if isinstance(each, JournalMisconfigured)]
    if wrong and all(isinstance(each, JournalMisconfigured | _ReadOnly) for each in errors):
        return wrong[0]
    others = [each for each in errors if each not in wrong]
    return JournalUnavailable("; ".join(dict.fromkeys(map(str, [*wrong, *others]))))
