"""Artifacts in a bucket of S3 or what speaks like it, by the extra `s3` (obstore): endpoint and keys from AWS_*.

Imported only where artifacts.url names a bucket. No key, token or signature is in a message.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
from collections.abc import Awaitable
from datetime import timedelta
from typing import Any, Final, TypeVar

import aiohttp
import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store
from yarl import URL

from jobd.storage.artifacts.base import ArtifactStoreError, Deletion, Judge

T = TypeVar("T")

CALL_S: Final = 8.0  # for one request with all its tries
PIECE_BYTES: Final = 1 << 20  # read by one request
_RETRIES: Final[Any] = {"max_retries": 2, "retry_timeout": timedelta(seconds=CALL_S)}
_SIGNED_FOR: Final = timedelta(minutes=5)
_CHANGED: Final = (409, 412)
SHOWN: Final = 200
MAX_NAME_BYTES: Final = 1024  # of an object, with the prefix
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_CODE: Final = re.compile(r"<Code>(\w+)</Code>")


class S3ArtifactStore:
    """The store of `s3://BUCKET/PREFIX`; a key is what comes after the prefix."""

    def __init__(self, bucket: str, prefix: str, owner: str) -> None:
        self.place = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        try:
            self._store = S3Store(bucket, prefix=prefix or None, retry_config=_RETRIES, client_options=_client())
        except (BaseError, ValueError) as error:  # of what AWS_* says
            raise ArtifactStoreError(f"{self.place}: {_words(error)}") from error
        self._prefix = f"{prefix}/" if prefix else ""
        self._probe_name = f".jobd-probe-{owner}"
        self._http: aiohttp.ClientSession | None = None

    async def open(self, key: str) -> S3Reader | None:
        if not self._can_name(key):
            return None
        try:
            found = await self._call(obstore.head_async(self._store, key))
        except FileNotFoundError:
            await self._check_bucket(key)
            return None
        return S3Reader(self, key, found["size"], found["e_tag"])

    async def read_range(self, key: str, e_tag: str | None, start: int, end: int) -> bytes:
        """Bytes of the object if it is still the one of that tag. Raises StoreFault."""
        options: Any = {"range": (start, end)} | ({} if e_tag is None else {"if_match": e_tag})
        try:
            return await self._call(self._read(key, options))
        except FileNotFoundError as error:
            raise ArtifactStoreError(f"{self.place}: an object went while it was read.") from error

    async def delete(self, key: str, judge: Judge) -> Deletion:
        if not self._can_name(key):
            return Deletion("left", "such a key names no object that can be asked for")
        while True:
            try:
                found = await self._call(obstore.head_async(self._store, key))
            except FileNotFoundError:
                await self._check_bucket(key)
                return Deletion("missing")
            modified_at = round(found["last_modified"].timestamp() * 1000)
            verdict = judge(modified_at)
            if verdict == "leave":
                return Deletion("left", "it was written after the job had been deleted", modified_at)
            if verdict == "wait":
                return Deletion("young", "", modified_at)
            if await self._delete(key, found["e_tag"]):
                return Deletion("deleted")

    def _can_name(self, key: str) -> bool:
        """Whether there can be an object of that name, by S3's rules and those of the library."""
        is_long = len(self._prefix.encode()) + len(key.encode(errors="replace")) > MAX_NAME_BYTES
        return not is_long and not _CONTROL.search(key) and {"", ".", ".."}.isdisjoint(key.split("/"))

    async def probe(self) -> None:
        value = secrets.token_bytes(16)
        try:
            await self._call(obstore.put_async(self._store, self._probe_name, value))
            read = await self._call(self._read(self._probe_name))
            await self._call(obstore.delete_async(self._store, self._probe_name))
        except FileNotFoundError as error:
            raise ArtifactStoreError(f"{self.place}: {_words(error)}") from error
        if read != value:
            raise ArtifactStoreError(f"{self.place}: a probe read back something else than it had written.")

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()

    async def _check_bucket(self, key: str) -> None:
        """Where there is no bucket, that does not mean that its objects are gone. The answer to HEAD does not tell."""
        try:
            await self._call(self._read(key))
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise ArtifactStoreError(
                    f"{self.place}: there is no such bucket. Make it, or change artifacts.url."
                ) from error

    async def _read(self, name: str, options: Any = None) -> bytes:
        found = await obstore.get_async(self._store, name, options=options)
        return bytes(await found.bytes_async())

    async def _delete(self, key: str, e_tag: str | None) -> bool:
        """Delete the object if it is still the one of that tag; whether it was.

        obstore deletes without conditions, so it only signs this request. A store that knows no condition here deletes
        all the same: there, and only there, an object that comes in between the two requests goes with the old one.
        """
        condition = {} if e_tag is None else {"If-Match": e_tag}
        url = await self._call(obstore.sign_async(self._store, "DELETE", key, _SIGNED_FOR))
        status = await self._send_delete(url, condition)
        if status == 501 and condition:
            status = await self._send_delete(url, {})
        if status in _CHANGED:
            return False
        if status >= 300 and status != 404:
            raise ArtifactStoreError(
                f"{self.place} refused to delete an object: HTTP {status}. May its keys delete there?"
            )
        return True

    async def _send_delete(self, url: str, headers: dict[str, str]) -> int:
        if self._http is None:
            self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=CALL_S), trust_env=True)
        try:
            async with self._http.delete(URL(url, encoded=True), headers=headers, allow_redirects=False) as answer:
                return answer.status
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ArtifactStoreError(f"{self.place} cannot be reached: {type(error).__name__}") from error

    async def _call(self, call: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(CALL_S):
                return await call
        except FileNotFoundError:
            raise
        except (BaseError, OSError, TimeoutError) as error:
            raise ArtifactStoreError(f"{self.place}: {_words(error)}") from error


class S3Reader:
    """An object that is read in ranges: a slow reader holds no connection to the bucket, and no request takes long."""

    def __init__(self, store: S3ArtifactStore, key: str, size: int, e_tag: str | None) -> None:
        self.size = size
        self._store = store
        self._key = key
        self._e_tag = e_tag
        self._at = 0

    async def more(self) -> bytes:
        start, end = self._at, min(self._at + PIECE_BYTES, self.size)
        if start == end:
            return b""
        piece = await self._store.read_range(self._key, self._e_tag, start, end)
        if len(piece) != end - start:
            raise ArtifactStoreError(f"{self._store.place}: an object became shorter while it was read.")
        self._at = end
        return piece

    def close(self) -> None:
        pass


def _client() -> Any:
    """How requests are sent. What is given here stands in the place of what obstore itself reads of the environment."""
    allow_http = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")
    times = {"timeout": timedelta(seconds=CALL_S), "connect_timeout": timedelta(seconds=3)}
    return {**times, "allow_http": allow_http}


def _words(error: Exception) -> str:
    """What a person needs of an error: no address with its signature, no whole document."""
    line = str(error).partition("\n")[0] or f"no answer within {CALL_S:g} s"
    said = line.partition(" - ")[2] or line
    code = _CODE.search(said)
    said = said.partition(": <")[0] + (f" ({code[1]})" if code else "")
    return said if len(said) <= SHOWN else f"{said[:SHOWN]} …"
