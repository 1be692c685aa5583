"""Open what a daemon needs from its machine: the store, the artifact store and the listeners.

Failures raise CannotStart with the exit code: 74 for an I/O error, 75 if an address is in use, 78 for a configuration
that cannot work.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import unquote, urlsplit

import msgspec
import structlog

from jobd import systemd
from jobd.api.services import Services
from jobd.config import Config, ConfigError, LoadedConfig, parse_listen
from jobd.config_checks import check_artifact_directory, unencrypted
from jobd.config_loader import state_directory
from jobd.http.admin_listener import AdminListener
from jobd.http.auth import accepted_hosts
from jobd.http.http_app import HttpApp
from jobd.http.server import HttpListener, WorkerListener, is_in_use
from jobd.model.journal import JournalUnavailable, SharedJournal
from jobd.model.storage import DiskFull, OpenedStore
from jobd.storage.artifacts.base import ArtifactStore, ArtifactStoreError
from jobd.storage.artifacts.filesystem import FileArtifactStore
from jobd.storage.cluster.cluster_store import ClusterStore
from jobd.storage.files import NotAStore, StoreError
from jobd.storage.store import Store, Synchronous

EXIT_IO: Final = 74
EXIT_BUSY: Final = 75
EXIT_CONFIG: Final = 78

EXTENSION_S: Final = 600.0  # of the timeout of systemd, each time; a flush of a large log may take minutes
PROGRESS_S: Final = 0.01  # of CPU time in EXTENSION_S / 4; a start that waits for a disk that hangs uses less
ARTIFACT_CHECK_S: Final = 2.0  # for the artifact directory to respond

log = structlog.get_logger("jobd.daemon")

_LISTENER_KEYS: Final = {"worker": "worker.socket", "worker-tcp": "worker.listen", "admin": "admin.listen"}

S = TypeVar("S", bound=Store)
PassedSockets = dict[str, list[socket.socket]]  # from systemd, by listener


class CannotStart(Exception):
    """The daemon cannot start. `code` is its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class RandomPool:
    """Random bytes, read from the system in large pieces because each read yields the GIL to the storage thread."""

    def __init__(self) -> None:
        self._drawn = b""
        self._used = 0

    def draw(self, size: int) -> bytes:
        """Return the next `size` bytes (about 16)."""
        start, self._used = self._used, self._used + size
        if self._used > len(self._drawn):
            self._drawn, start, self._used = os.urandom(8192), 0, size
        return self._drawn[start : self._used]


async def open_store(settings: Config, on_locked: Callable[[], None]) -> tuple[Store, OpenedStore]:
    """Open the store, and log its faults. `on_locked` runs before anything is written."""
    synchronous: Synchronous = "EXTRA" if settings.store.synchronous == "extra" else "FULL"
    commit = settings.store.commit
    return await _opened(
        settings.store.path,
        on_locked,
        lambda path: Store.open(path, synchronous=synchronous, commit=commit, on_locked=on_locked),
    )


async def open_cluster_store(
    settings: Config, journal: SharedJournal, on_locked: Callable[[], None]
) -> tuple[ClusterStore, OpenedStore]:
    """Open the tables of a node behind `journal`, like `open_store`."""
    if settings.store.path == ":memory:":
        raise CannotStart("a node of a cluster needs a file: set store.path", EXIT_CONFIG)
    return await _opened(
        settings.store.path, on_locked, lambda path: ClusterStore.open_for(path, journal, on_locked=on_locked)
    )


async def _opened(
    path: str, check: Callable[[], None], opening: Callable[[str], Awaitable[tuple[S, OpenedStore]]]
) -> tuple[S, OpenedStore]:
    directory = Path(path).parent
    try:
        had_directory = directory.is_dir()
        is_new = path != ":memory:" and not await asyncio.to_thread(os.path.exists, path)
        if is_new:
            await asyncio.to_thread(check)  # an error leaves no directory and no lock file
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        async with _extended_start():
            store, opened = await opening(path)
    except NotAStore as error:
        hint = "set store.path to another file, or if it was one and is damaged, restore a backup with `jobd restore`"
        raise CannotStart(f"{error}: {hint}", error.exit_code) from None
    except (StoreError, JournalUnavailable) as error:
        raise CannotStart(str(error), error.exit_code) from None
    except DiskFull as error:
        raise CannotStart(f"{path}: {error}", EXIT_IO) from None
    except OSError as error:
        raise _cannot_open(path, error) from None
    if is_new and (had_directory or directory == state_directory(os.environ)):
        log.info("store_created", path=path)
    elif is_new:
        hint = "its directory did not exist either. If jobs are missing, check store.path"
        log.warning("store_created", path=path, message=hint)
    for fault in opened.faults:
        log.error("store_fault", message=fault)
    if opened.full and (space := await store.measure_space()) is not None:
        log.error("disk_full", rejected="creates", reserve=opened.has_reserve, **msgspec.structs.asdict(space))
    elif not opened.has_reserve:
        log.warning("reserve_file_missing", message="on a full disk, running jobs may not be able to end")
    if opened.epoch_warning is not None:
        log.warning("fencing_epoch", message=opened.epoch_warning)
    return store, opened


@contextlib.asynccontextmanager
async def _extended_start() -> AsyncIterator[None]:
    """Keep systemd from ending the start inside the context, because a migration may take longer than its timeout.

    A start that makes no progress is ended.
    """

    async def extend() -> None:
        used_s = -PROGRESS_S
        while True:
            before_s, used_s = used_s, time.process_time()
            if used_s - before_s >= PROGRESS_S:
                systemd.extend_timeout(EXTENSION_S)
            await asyncio.sleep(EXTENSION_S / 4)

    task = asyncio.create_task(extend())
    try:
        yield
    finally:
        task.cancel()


def _cannot_open(path: str, error: OSError) -> CannotStart:
    if error.errno in (errno.EACCES, errno.EPERM):
        hint = "Change the owner of the file or of its directory, or choose another store.path"
        where = error.filename if isinstance(error.filename, str) else path
        message = f"{where}: {error.strerror}: user {os.geteuid()} may not write there. {hint}"
        return CannotStart(message, EXIT_CONFIG)
    if error.errno in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG):
        return CannotStart(f"{path}: {error.strerror}: store.path must name a file in a directory", EXIT_CONFIG)
    return CannotStart(f"{path}: {error}", EXIT_IO)


async def open_artifacts(loaded: LoadedConfig) -> ArtifactStore | None:
    """Open the artifact store at artifacts.url. Return None if that is empty."""
    settings = loaded.config
    if not settings.artifacts.url:
        return None
    url = urlsplit(settings.artifacts.url)
    owner = blake2b(f"{socket.gethostname()} {settings.store.path}".encode(), digest_size=6).hexdigest()
    if url.scheme == "file":
        store = FileArtifactStore(unquote(url.path), owner, loaded.own_directories)
        check = partial(check_artifact_directory, settings.artifacts.url, loaded.own_directories)
        try:
            async with asyncio.timeout(ARTIFACT_CHECK_S):
                await store.run(check)
        except ConfigError as error:
            raise CannotStart(str(error), EXIT_CONFIG) from None
        except TimeoutError:  # health reports it, and the store is checked again before use
            log.warning("artifacts_wait", place=store.place, reason=f"no response within {ARTIFACT_CHECK_S:g} s")
        return store
    from jobd.storage.artifacts.s3 import S3ArtifactStore

    try:
        return S3ArtifactStore(url.netloc, unquote(url.path).strip("/"), owner)
    except ArtifactStoreError as error:
        raise CannotStart(f"artifacts.url: {error}", EXIT_CONFIG) from None


def addresses(settings: Config) -> dict[str, str]:
    listeners = {"worker": f"unix:{settings.worker.socket}", "admin": settings.admin.listen}
    return listeners | ({"worker-tcp": settings.worker.listen} if settings.worker.listen else {})


def check_passed_sockets(settings: Config, passed: PassedSockets) -> None:
    """Raise CannotStart if a socket that systemd passed would not be served, or would need no token over TCP.

    Warn about TCP sockets without TLS, as for the addresses in the configuration.
    """
    known = addresses(settings)
    for name, opened in passed.items():
        if name not in known:
            names = f"expected one of {', '.join(known)}"
            hint = " (worker-tcp requires worker.listen)" if "worker-tcp" not in known else ""
            raise CannotStart(f"systemd passed a socket with FileDescriptorName={name}: {names}{hint}", EXIT_CONFIG)
        tcp = [each.getsockname()[:2] for each in opened if each.family != socket.AF_UNIX]
        if name == "worker" and tcp:
            reason = "a TCP port is never open without a token"
            hint = "Set FileDescriptorName=worker-tcp, worker.listen and worker.token_file"
            message = f"systemd passed a TCP socket with FileDescriptorName=worker: {reason}. {hint}"
            raise CannotStart(message, EXIT_CONFIG)
        if not _certificate(name, settings)[0]:
            for host, port in tcp:
                for warning in unencrypted(name.removesuffix("-tcp"), host, f"{host}:{port}"):
                    log.warning("config_warning", message=warning)


def check_addresses_free(settings: Config, passed: PassedSockets) -> None:
    """Raise CannotStart if an address that systemd did not pass is that of another process or another listener."""
    own: dict[str, str] = {}
    for name, address in addresses(settings).items():
        if name in passed:
            continue
        if is_in_use(parse_listen(address, name)):
            raise _cannot_listen(name, address, OSError(errno.EADDRINUSE, ""))
        if (other := own.setdefault(address, name)) != name and not address.endswith(":0"):
            why = f"{_LISTENER_KEYS[other]} has the same address. Change one of them"
            raise CannotStart(f"[{name}] cannot listen on {address}: {why}", EXIT_CONFIG)


async def open_listener(name: str, app: HttpApp[Services], settings: Config, passed: PassedSockets) -> HttpListener:
    """Open the listener `name` for `app` on the sockets that systemd passed, else on its configured address."""
    listener = AdminListener(app) if name == "admin" else WorkerListener(app)
    address = addresses(settings)[name]
    tls = listener.tls = None if name == "worker" else _tls_context(*_certificate(name, settings))
    try:
        if passed.get(name):
            for opened in passed[name]:
                await listener.open_socket(opened, tls=tls)
            return listener
        target = parse_listen(address, name)
        if isinstance(target, str):
            await asyncio.to_thread(os.makedirs, os.path.dirname(target) or ".", 0o755, exist_ok=True)
            await listener.open_unix(target, int(settings.worker.socket_mode, 8))
        else:
            await listener.open_tcp(*target, tls=tls)
    except OSError as error:
        raise _cannot_listen(name, address, error) from None
    log.info("listening", listener=name, at=address)
    return listener


def reload_certificates(listeners: Mapping[str, HttpListener], settings: Config) -> None:
    """Read the certificates again, for new connections. If one cannot be used, log that and keep the old one."""
    for name, listener in listeners.items():
        if listener.tls is None:
            continue
        cert, key = _certificate(name, settings)
        try:
            _tls_context(cert, key)
            listener.tls.load_cert_chain(cert, key, _reject_encrypted_key)
        except (CannotStart, OSError) as error:  # ssl.SSLError is an OSError
            log.error("reload_failed", listener=name, reason=str(error), kept="the old certificate")


def _certificate(name: str, settings: Config) -> tuple[str, str]:
    section = settings.admin if name == "admin" else settings.worker
    return section.tls_cert, section.tls_key


def _cannot_listen(name: str, address: str, error: OSError) -> CannotStart:
    in_use = error.errno == errno.EADDRINUSE
    why = "another process listens there. Stop it, or set" if in_use else f"{error}. Correct this, or set"
    reason = f"[{name}] cannot listen on {address}: {why} {_LISTENER_KEYS[name]} to another address"
    return CannotStart(reason, EXIT_BUSY if in_use else EXIT_CONFIG)


def _tls_context(cert: str, key: str) -> ssl.SSLContext | None:
    if not cert:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(cert, key, _reject_encrypted_key)
    except (OSError, ssl.SSLError) as error:
        raise CannotStart(f"tls_cert {cert}, tls_key {key}: {error}", EXIT_CONFIG) from None
    return context


def _reject_encrypted_key() -> str:
    """Raise OSError. Without a password callback, OpenSSL would ask on the terminal, even during a reload."""
    raise OSError("the key is encrypted. Decrypt it: openssl pkey -in FILE -out NEW_FILE")


def admin_hosts(settings: Config, passed: list[socket.socket] | None) -> frozenset[str] | None:
    """Return the host names that the admin listener accepts. None on a Unix socket, which browsers cannot reach."""
    if passed:
        names = [opened.getsockname() for opened in passed if opened.family != socket.AF_UNIX]
        return frozenset().union(*(accepted_hosts(name[0], settings.admin.hosts) for name in names)) if names else None
    if settings.admin.listen.startswith("unix:"):
        return None
    return accepted_hosts(settings.admin.listen, settings.admin.hosts)
