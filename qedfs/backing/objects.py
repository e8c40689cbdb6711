"""The source in an object store (S3, Google Cloud Storage, Azure), by obstore.

**Threads.** obstore's blocking calls in worker threads, not its asyncio interface in a loop of its own: that took 1.3 to
2 times as long for small reads, and half more processor time. A thread never sees the caller's buffer: it returns the
store's bytes, which are copied when they are there, so a caller that has left is not written into.

**Identity.** The ETag; without one the version; without both the time of change. Each part is asked for under the
condition that the ETag is the one found at opening, *and* what comes back is compared, for some stores ignore the
condition. Nothing of another content is ever handed on.

**Retries.** obstore tries once more, for a kept connection that the store has closed meanwhile. All other patience is
`resilient.py`'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from qedfs.backing.base import Extent, Identity, Source
from qedfs.backing.object_name import ObjectLocation
from qedfs.backing.store_errors import translated
from qedfs.backing.stores import Settings, settings_for
from qedfs.errors import BackingChanged, BackingError, BackingRefused, BackingUnavailable

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta
    from obstore.store import ObjectStore

PIECE = 4 << 20
"""Bytes of one request; longer reads are several at once. The disk asks for a quarter of that at most."""
REQUESTS = 64
"""Requests in flight: 64 KiB each fill 1 Gbit/s at 30 ms, a megabyte each at 500 ms."""
_RETRIES: dict[str, Any] = {
    "max_retries": 1,
    "backoff": {"init_backoff": timedelta(milliseconds=50), "max_backoff": timedelta(milliseconds=200), "base": 2},
    "retry_timeout": timedelta(seconds=10),
}
T = TypeVar("T")


async def open_object(location: ObjectLocation, *, signed: bool) -> ObjectSource:
    """Open the object at `location`; with `signed` by the credentials of the environment, else by none.

    Raises:
        BackingUnavailable: the store does not answer now.
        BackingRefused: there is no such object, the store refuses it, or obstore is not installed.
    """
    name = str(location)
    settings = settings_for(location, os.environ, signed=signed)

    def look() -> tuple[ObjectStore, ObjectMeta]:
        store = _store(location, settings)
        import obstore

        try:
            return store, obstore.head(store, location.key)
        except Exception as error:
            raise translated(name, error, reading=False) from error

    # Not trio's common one, which a hundred backings in a store that hangs would keep from everybody else.
    limiter = trio.CapacityLimiter(REQUESTS)
    store, meta = await trio.to_thread.run_sync(look, abandon_on_cancel=True, limiter=limiter)
    return ObjectSource(location, store, meta, limiter)


class ObjectSource(Source):
    """See the module; made by `open_object`."""

    may_straggle = True

    def __init__(
        self, location: ObjectLocation, store: ObjectStore, meta: ObjectMeta, limiter: trio.CapacityLimiter
    ) -> None:
        self.name = str(location)
        self.size = meta["size"]
        self.identity = Identity(self.size, _tag(meta))
        self._key = location.key
        self._store: ObjectStore | None = store
        self._etag = meta["e_tag"]
        self._limiter = limiter
        self._under_way: set[trio.CancelScope] = set()

    async def read_into(self, pos: int, buffer: memoryview) -> None:
        store = self._open_store()
        if len(buffer) <= PIECE:
            await self._read_piece(store, pos, buffer)
            return
        try:
            async with trio.open_nursery() as nursery:
                for start in range(0, len(buffer), PIECE):
                    nursery.start_soon(self._read_piece, store, pos + start, buffer[start : start + PIECE])
        except BaseExceptionGroup as group:
            raise _first(group) from None

    async def extents(self, pos: int, length: int) -> list[Extent]:
        self._open_store()
        await trio.lowlevel.checkpoint()
        return [Extent(length, False)] if length else []

    async def aclose(self) -> None:
        for scope in self._under_way:
            scope.cancel()
        self._store = None  # its connections end with it
        await trio.lowlevel.checkpoint()

    async def _read_piece(self, store: ObjectStore, pos: int, buffer: memoryview) -> None:
        if not buffer:
            await trio.lowlevel.checkpoint()
            return
        data = await self._in_thread(lambda: self._get(store, pos, pos + len(buffer)))
        buffer[:] = data

    async def _in_thread(self, function: Callable[[], T]) -> T:
        with trio.CancelScope() as scope:
            self._under_way.add(scope)
            try:
                # An abandoned thread keeps its place among the requests until the store has answered or it timed out.
                return await trio.to_thread.run_sync(function, abandon_on_cancel=True, limiter=self._limiter)
            finally:
                self._under_way.discard(scope)
        raise BackingUnavailable(self.name, "is closed")

    def _get(self, store: ObjectStore, pos: int, end: int) -> memoryview:
        """Return the bytes `[pos, end)`. Blocks."""
        import obstore

        options: GetOptions = {"range": (pos, end)}
        if self._etag and not self._etag.startswith("W/"):  # a weak one never matches
            options["if_match"] = self._etag
        try:
            answer = obstore.get(store, self._key, options=options)
            self._check_same(answer.meta)
            start, stop = answer.range
            data = memoryview(answer.bytes())
        except BackingError:
            raise
        except Exception as error:
            raise translated(self.name, error, reading=True) from error
        if (start, stop) != (pos, end) or len(data) != end - pos:
            raise BackingUnavailable(self.name, f"the store sent {start}-{stop} where {pos}-{end} was asked for")
        return data

    def _check_same(self, meta: ObjectMeta) -> None:
        if meta["size"] != self.size:
            raise BackingChanged(self.name, f"has now {meta['size']} bytes, had {self.size}")
        if _tag(meta) != self.identity.tag:
            raise BackingChanged(self.name, f"has been replaced: was {self.identity.tag}, is {_tag(meta)}")

    def _open_store(self) -> ObjectStore:
        if self._store is None:
            raise BackingUnavailable(self.name, "is closed")
        return self._store


def _store(location: ObjectLocation, settings: Settings) -> ObjectStore:
    name = str(location)
    try:
        from obstore.store import AzureStore, GCSStore, S3Store
    except ImportError as error:
        raise BackingRefused(name, "object stores need obstore: install qedfs[objects]") from error
    client: Any = dict(settings.client)
    if settings.authority is not None:
        try:
            with open(settings.authority, "rb") as file:
                client["root_certificate"] = file.read()
        except OSError as error:
            raise BackingRefused(name, f"{settings.authority}: {error.strerror}") from error
    kinds: dict[str, Any] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
    try:
        made: ObjectStore = kinds[location.scheme](
            location.bucket, client_options=client, retry_config=_RETRIES, **settings.store
        )
    except Exception as error:
        why = str(error).partition("\n")[0]
        raise BackingRefused(name, f"the environment does not make sense to obstore ({why})") from error
    return made


def _tag(meta: ObjectMeta) -> str:
    if meta["e_tag"]:
        return f"etag:{meta['e_tag']}"
    if meta["version"]:
        return f"version:{meta['version']}"
    return f"mtime:{meta['last_modified'].isoformat()}"


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return one error for several pieces: a failure before a cancellation that it caused."""
    errors = [_first(e) if isinstance(e, BaseExceptionGroup) else e for e in group.exceptions]
    return next((e for e in errors if not isinstance(e, trio.Cancelled)), errors[0])
