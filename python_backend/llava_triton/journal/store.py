"""Where the journal lies: objects by path, in a folder or a bucket. Thin over obstore."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, NotFoundError, PreconditionError
from obstore.store import LocalStore, ObjectStore, from_url

Result = TypeVar("Result")

CALL_SECONDS = 10.0
"""A call that takes longer has failed."""
AT_ONCE = 32
"""Calls at the same time."""


_TOLD = (AlreadyExistsError, PreconditionError, NotFoundError, FileNotFoundError)
"""What a call may say without having failed."""


class StoreError(Exception):
    """A store that is down, slow or refuses. What could not be done may have been done."""


@dataclass(frozen=True)
class Entry:
    """An object, as a listing tells of it."""

    path: str
    written_at: float
    """By the store's clock, in seconds since 1970."""


class Store:
    """Objects by path. For coroutines of one event loop.

    Args:
        url: `file:///a/folder`, which is made where it is missing, or `s3://bucket/prefix`. What
            S3 needs besides (region, credentials, a KMS key) comes from AWS's environment
            variables or from the instance's role.

    Raises:
        StoreError: it cannot be used at all.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        parts = urlsplit(url)
        self.is_folder = parts.scheme == "file"
        """Whether nobody else deletes what is forgotten here."""
        try:
            self._store: ObjectStore
            if self.is_folder:
                folder = Path(unquote(parts.path))
                self._store = LocalStore(folder, mkdir=True, automatic_cleanup=True)
            else:
                self._store = from_url(
                    url,
                    # The writer tries again by itself.
                    retry_config={"max_retries": 1, "retry_timeout": timedelta(seconds=5)},
                    # An endpoint without TLS is one that the operator has named.
                    client_options={
                        "timeout": timedelta(seconds=CALL_SECONDS),
                        "allow_http": True,
                    },
                )
        except Exception as error:
            raise StoreError(f"the journal {url} cannot be used: {_first_line(error)}") from error
        self._calls = asyncio.Semaphore(AT_ONCE)

    async def create(self, path: str, data: bytes) -> bool:
        """Write an object; False where there is one already."""
        try:
            await self._put(path, data, "create")
        except (AlreadyExistsError, PreconditionError):
            return False
        return True

    async def replace(self, path: str, data: bytes) -> None:
        """Write an object, whether there is one or not."""
        await self._put(path, data, "overwrite")

    async def read(self, path: str) -> bytes | None:
        """An object; None where there is none."""

        async def get() -> bytes:
            result = await obstore.get_async(self._store, path)
            return bytes(await result.bytes_async())

        try:
            return await self._call(get())
        except (NotFoundError, FileNotFoundError):
            return None

    async def exists(self, path: str) -> bool:
        """Whether there is an object."""
        try:
            await self._call(obstore.head_async(self._store, path))
        except (NotFoundError, FileNotFoundError):
            return False
        return True

    async def copy(self, source: str, target: str) -> bool:
        """Copy an object; False where there is none."""
        try:
            await self._call(obstore.copy_async(self._store, source, target))
        except (NotFoundError, FileNotFoundError):
            return False
        return True

    async def entries(self, prefix: str) -> list[Entry]:
        """The objects below a folder, in the order of their paths."""

        async def collect() -> list[Entry]:
            found = await obstore.list(self._store, prefix).collect_async()
            return [Entry(each["path"], each["last_modified"].timestamp()) for each in found]

        try:
            return sorted(await self._call(collect()), key=lambda entry: entry.path)
        except (NotFoundError, FileNotFoundError):
            return []

    async def folders(self) -> list[str]:
        """The folders at the top."""
        try:
            found = await self._call(obstore.list_with_delimiter_async(self._store))
        except (NotFoundError, FileNotFoundError) as error:  # the bucket, or the folder
            raise StoreError(_first_line(error)) from error
        return list(found["common_prefixes"])

    async def delete(self, paths: Sequence[str]) -> None:
        """Delete objects, in order; those that are not there are fine."""
        for path in paths:
            try:
                await self._call(obstore.delete_async(self._store, path))
            except (NotFoundError, FileNotFoundError):
                continue

    async def _put(self, path: str, data: bytes, mode: Literal["create", "overwrite"]) -> None:
        try:
            await self._call(obstore.put_async(self._store, path, data, mode=mode))
        except (NotFoundError, FileNotFoundError) as error:  # the bucket, or the folder
            raise StoreError(_first_line(error)) from error

    async def read_all(self, paths: Iterable[str]) -> list[bytes | None]:
        """Several objects at once, in the order of their paths."""
        return await asyncio.gather(*(self.read(path) for path in paths))

    async def _call(self, call: Awaitable[Result]) -> Result:
        try:
            async with self._calls:
                return await asyncio.wait_for(call, CALL_SECONDS)
        except _TOLD:
            raise
        except TimeoutError:
            raise StoreError(f"the store does not answer within {CALL_SECONDS:g} s") from None
        except Exception as error:
            raise StoreError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]
