"""Store artifacts in a bucket of S3 or a compatible store, with obstore (extra `s3`). Configured by AWS_* variables.

Imported only if artifacts.url names a bucket. Messages contain no key, token or signature.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
from collections.abc import Awaitable
from datetime import timedelta
from functools import partial
from typing import Any, Final, TypeVar

import aiohttp
import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store
from yarl import URL

from jobd.storage.artifacts.base import ArtifactReader, ArtifactStoreError, Deletion, Judge, kept

T = TypeVar("T")

CALL_S: Final = 8.0  # per request, with its retries
PIECE_BYTES: Final = 1 << 20  # per request
_RETRIES: Final[Any] = {"max_retries": 2, "retry_timeout": timedelta(seconds=CALL_S)}
_SIGNED_FOR: Final = timedelta(minutes=5)
_CHANGED: Final = (409, 412)
MAX_TRIES: Final = 3  # to delete an object that changes in between
MAX_MESSAGE_CHARS: Final = 200
MAX_NAME_BYTES: Final = 1024  # of an object key, with the prefix
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_CODE: Final = re.compile(r"<Code>(\w+)</Code>")


class S3ArtifactStore:
    """The artifact store of `s3://BUCKET/PREFIX`. Keys are relative to the prefix."""

    def __init__(self, bucket: str, prefix: str, owner: str) -> None:
        self.place = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        try:
            self._store = S3Store(bucket, prefix=prefix or None, retry_config=_RETRIES, client_options=_client())
        except (BaseError, ValueError) as error:  # invalid AWS_* variables
            raise ArtifactStoreError(f"{self.place}: {_short_message(error)}") from error
        self._prefix = f"{prefix}/" if prefix else ""
        self._probe_name = f".jobd-probe-{owner}"
        self._http: aiohttp.ClientSession | None = None

    async def open(self, key: str) -> ArtifactReader | None:
        """Open an object, which is read in ranges, so that a slow client holds no connection to the bucket."""
        if not self._can_name(key) or (metadata := await self._head(key)) is None:
            return None
        read = partial(self._read_range, key, metadata["e_tag"])
        return ArtifactReader(f"{self.place}: an object", metadata["size"], read, piece_bytes=PIECE_BYTES)

    async def _read_range(self, key: str, e_tag: str | None, start: int, end: int) -> bytes:
        """Read bytes of the object if it still has this tag. Raises ArtifactStoreError."""
        options: Any = {"range": (start, end)} | ({} if e_tag is None else {"if_match": e_tag})
        try:
            return await self._call(self._read(key, options))
        except FileNotFoundError as error:
            raise ArtifactStoreError(f"{self.place}: an object was deleted while it was read.") from error

    async def delete(self, key: str, judge: Judge) -> Deletion:
        if not self._can_name(key):
            return Deletion("left", "the key is not a valid object name")
        for _ in range(MAX_TRIES):
            if (metadata := await self._head(key)) is None:
                return Deletion("missing")
            modified_at = round(metadata["last_modified"].timestamp() * 1000)
            if (left := kept(judge(modified_at), modified_at)) is not None:
                return left
            if await self._delete(key, metadata["e_tag"]):
                return Deletion("deleted")
        raise ArtifactStoreError(f"{self.place} did not delete an object: it changed each time, or its tag is wrong.")

    def _can_name(self, key: str) -> bool:
        """Return whether S3 and obstore allow an object of this name."""
        is_long = len(self._prefix.encode()) + len(key.encode(errors="replace")) > MAX_NAME_BYTES
        return not is_long and not _CONTROL.search(key) and {"", ".", ".."}.isdisjoint(key.split("/"))

    async def probe(self) -> None:
        value = secrets.token_bytes(16)
        try:
            await self._call(obstore.put_async(self._store, self._probe_name, value))
            read = await self._call(self._read(self._probe_name))
            await self._call(obstore.delete_async(self._store, self._probe_name))
        except FileNotFoundError as error:
            raise ArtifactStoreError(f"{self.place}: {_short_message(error)}") from error
        if read != value:
            raise ArtifactStoreError(f"{self.place}: a probe read back a value that differs from the one it wrote.")

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()

    async def _head(self, key: str) -> Any:
        """Return the metadata of an object; None if there is none. Raises ArtifactStoreError."""
        with contextlib.suppress(FileNotFoundError):
            return await self._call(obstore.head_async(self._store, key))
        try:
            await self._call(self._read(key))  # the response to HEAD does not say that the bucket does not exist
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise ArtifactStoreError(
                    f"{self.place}: the bucket does not exist. Create it, or change artifacts.url."
                ) from error
        return None

    async def _read(self, name: str, options: Any = None) -> bytes:
        response = await obstore.get_async(self._store, name, options=options)
        return bytes(await response.bytes_async())

    async def _delete(self, key: str, e_tag: str | None) -> bool:
        """Delete the object if it still has this tag. Return whether it had.

        obstore cannot delete with a condition, so it only signs the request. A store that ignores the condition also
        deletes an object that was written between the two requests.
        """
        condition = {} if e_tag is None else {"If-Match": e_tag}
        url = await self._call(obstore.sign_async(self._store, "DELETE", key, _SIGNED_FOR))
        status = await self._send_delete(url, condition)
        if status == 501 and condition:
            status = await self._send_delete(url, {})
        if status in _CHANGED:
            return False
        if status >= 300 and status != 404:
            hint = " Check the credentials." if status in (401, 403) else ""
            raise ArtifactStoreError(f"{self.place} did not delete an object: HTTP {status}.{hint}")
        return True

    async def _send_delete(self, url: str, headers: dict[str, str]) -> int:
        if self._http is None:
            self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=CALL_S), trust_env=True)
        try:
            async with self._http.delete(URL(url, encoded=True), headers=headers, allow_redirects=False) as response:
                return response.status
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ArtifactStoreError(f"{self.place} cannot be reached: {type(error).__name__}") from error

    async def _call(self, call: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(CALL_S):
                return await call
        except FileNotFoundError:
            raise
        except (BaseError, OSError, TimeoutError) as error:
            raise ArtifactStoreError(f"{self.place}: {_short_message(error)}") from error


def _client() -> Any:
    """Return options for the HTTP client, which replace those that obstore reads from the environment."""
    allow_http = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")
    times = {"timeout": timedelta(seconds=CALL_S), "connect_timeout": timedelta(seconds=3)}
    return {**times, "allow_http": allow_http}


def _short_message(error: Exception) -> str:
    """Shorten an error for a message: no signed URL, no whole document."""
    line = str(error).partition("\n")[0] or f"no response within {CALL_S:g} s"
    text = line.partition(" - ")[2] or line
    code = _CODE.search(text)
    text = text.partition(": <")[0] + (f" ({code[1]})" if code else "")
    return text if len(text) <= MAX_MESSAGE_CHARS else f"{text[:MAX_MESSAGE_CHARS]} …"
