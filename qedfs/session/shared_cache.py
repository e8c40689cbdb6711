"""Caches between the leaves of a mount and their remote backings: what one leaf has read, no other one fetches again.

A cache is a QED image in mode `cor` over the backing, shared by all leaves that name it, and each leaf reads it as its own
backing would be read. Waiting, retrying and reconnecting is the business of the one `Backing` below the cache; the one
of each leaf above it only waits. A cache lives in a task of its own, from its first leaf to its last. docs/shared-cache.md
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import trio

from qedfs.backing.base import Extent, Identity, Source, merged
from qedfs.backing.locate import Reference, Route
from qedfs.backing.location import FileLocation, host_of, key_of, parse_location
from qedfs.backing.mirror_name import MirrorsLocation
from qedfs.backing.policy import Owner, Policy
from qedfs.backing.resilient import Backing, BackingState, BackingStatistics
from qedfs.config import DiskOptions, Mode, MountOptions
from qedfs.disk.disk import Disk, open_disk
from qedfs.errors import BackingRefused, CorruptEntry, LeafError, QedfsError
from qedfs.image.create import create_image
from qedfs.image.geometry import SECTOR, Geometry
from qedfs.image.image import Image, open_image
from qedfs.image.record import Pin, Record, hash_name, short_tag
from qedfs.image.storage import FileStorage
from qedfs.image.tables import State
from qedfs.session.cache_folder import PASSING_SUFFIX, SUFFIX, CacheFolder, open_cache_folder

log = logging.getLogger(__name__)

RUNS_PER_TURN = 256
"""Look-ups in tables, some microseconds each, before other tasks get a turn."""


@dataclass(frozen=True)
class Key:
    """What leaves must have in common to share a cache: the `key_of` of the backing and its format, "" if unknown.

    Of mirrors the pin, too: which of them may be read at all is decided by it, below the cache.
    """

    location: str
    format: str
    mirrors: str


class SharedCaches:
    """The caches of one mount. Made by `open_shared_caches`."""

    def __init__(self, folder: CacheFolder, options: DiskOptions, nursery: trio.Nursery) -> None:
        self._folder = folder
        # What the leaves read ahead is enough, and how long somebody waits is for each of them to say.
        self._options = replace(options, mode=Mode.COR, readahead=0, backing_timeout=None)
        self._nursery = nursery
        # INVARIANT: of the caches with one key only the one that is here takes new leaves.
        self._caches: dict[Key, _Cache] = {}

    def backing(self, reference: Reference, policy: Policy, expected: Identity | None) -> Backing | None:
        """Return the backing of the leaf that `reference` comes from, read through a cache; None if it gets none.

        It gets one if the leaf is trusted and names something that is not a file of this machine. `expected` is what
        the backing must be for this leaf.
        """
        if reference.status is None or not policy.trusts(Owner.of(reference.status)):
            return None
        try:
            location = parse_location(reference.name, FileLocation(reference.image))
        except BackingRefused:
            return None  # opening it will say what is wrong
        if isinstance(location, FileLocation):
            return None
        mirrors = expected.tag if expected is not None and isinstance(location, MirrorsLocation) else ""
        key = Key(key_of(location), reference.format or location.format or "", mirrors)

        def remote() -> _Cache:
            return _Cache(key, reference, Route(reference, policy, expected, changing=False), host_of(location))

        return _CachedBacking(lambda: self._enter(key, remote), reference, expected, host_of(location))

    async def _enter(self, key: Key, make: Callable[[], _Cache]) -> _Cache:
        """Return the cache of `key`, which has one more user from now on."""
        while (cache := self._caches.get(key)) is not None and not cache.in_doubt:
            if not cache.unused.is_set():
                break
            await cache.ended.wait()  # its file is still locked
        else:
            cache = self._caches[key] = make()
            self._nursery.start_soon(self._keep, cache)
        cache.users += 1
        return cache

    async def _keep(self, cache: _Cache) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._serve, cache)
                await cache.unused.wait()
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await cache.remote.aclose()
            if self._caches.get(cache.key) is cache:
                del self._caches[cache.key]
            cache.ended.set()

    async def _serve(self, cache: _Cache) -> None:
        """Have the cache open as long as this is not cancelled. Whatever goes wrong with it, its leaves read on without."""
        try:
            cache.identity = await cache.remote.identity()
            async with self._opened(cache, cache.identity) as image:
                try:
                    async with open_disk(image, cache.remote, self._options) as disk:
                        cache.image, cache.disk, cache.epoch = image, disk, cache.remote.epoch
                        cache.ready.set()
                        await trio.sleep_forever()
                finally:
                    # Ordering: before the image closes, and with no await since the disk has ended.
                    cache.image = cache.disk = None
        except BackingRefused as error:
            cache.refusal = error
        except QedfsError as error:
            log.warning("%s; without this cache, %s is asked for everything", error, cache.remote.name)
        except Exception:
            log.exception("cache of %s: lost by an internal error", cache.remote.name)
        finally:
            cache.ready.set()
        if cache.refusal is None:
            await cache.remote.watch()  # as the disk over it would do

    @asynccontextmanager
    async def _opened(self, cache: _Cache, identity: Identity) -> AsyncIterator[Image]:
        name = _file_name(cache.key.location, cache.remote.format, identity, lasting=cache.tells_content)
        storage = await self._folder.open(name, identity.size)
        try:
            image = await self._image(storage, cache, identity)
        except BaseException:
            with trio.CancelScope(shield=True):
                await storage.aclose()
            raise
        try:
            yield image
        finally:
            with trio.CancelScope(shield=True):
                if cache.tells_content:
                    await image.aclose()
                else:
                    # Nobody will be able to say whether it still holds what the backing has by then.
                    try:
                        await self._folder.remove(name)
                    finally:
                        await storage.aclose()

    async def _image(self, storage: FileStorage, cache: _Cache, identity: Identity) -> Image:
        """Return the image in `storage`: the one that is there if it is of this very content, else an empty one."""
        name, format = cache.key.location, cache.remote.format
        pin = Pin(hash_name(name), format, identity.size, short_tag(identity.tag))
        size = -(-identity.size // SECTOR) * SECTOR
        if cache.tells_content and storage.length():
            try:
                image = await open_image(storage)
                if image.record.pins == (pin,) and image.header.image_size == size:
                    log.info("%s: cache of %s, as it was left", storage.name, cache.remote.name)
                    return image
            except QedfsError as error:
                log.warning("%s; the cache is begun anew", error)
        await create_image(
            storage, size=size, geometry=Geometry(), backing=(name, format == "raw"), record=Record().pinned(pin)
        )
        log.info("%s: cache of %s, empty", storage.name, cache.remote.name)
        return await open_image(storage)


class _Cache:
    """One backing, and the image that keeps what was read of it, while that can be had."""

    def __init__(self, key: Key, reference: Reference, route: Route, host: str | None) -> None:
        self.key = key
        self.identity: Identity | None = None
        """What the backing was found to be, whether or not it answers now."""
        self.tells_content = False
        """Whether the backing at another time can be known to be the same."""
        self.image: Image | None = None
        self.disk: Disk | None = None
        self.refusal: BackingRefused | None = None
        self.epoch: object = None
        """Of `remote`, when the image was opened."""
        self.users = 0
        self.ready = trio.Event()
        """It is open, or could not be opened, or the backing was refused."""
        self.unused = trio.Event()
        self.ended = trio.Event()

        async def opener() -> Source:
            source = await route.open()
            self.tells_content = source.tells_content
            return source

        self.remote = Backing(opener, name=reference.shown, format=key.format, host=host, tend=route.tend)

    @property
    def in_doubt(self) -> bool:
        """Whether the backing may be another one by now, so that a leaf that comes has to ask for itself."""
        unnoticed = self.disk is not None and not self.tells_content and self.epoch != self.remote.epoch
        return self.remote.refused or unnoticed

    def leave(self) -> None:
        self.users -= 1
        if not self.users:
            self.unused.set()


class _CachedBacking(Backing):
    """What a leaf sees: never taken for dead, as what is below it does that, and as healthy as what is below it."""

    def __init__(
        self,
        enter: Callable[[], Awaitable[_Cache]],
        reference: Reference,
        expected: Identity | None,
        host: str | None,
    ) -> None:
        self._enter = enter
        self._cache: _Cache | None = None
        """The one that was entered last."""
        self._fetched = 0
        super().__init__(
            self._open,
            name=reference.shown,
            format=reference.format or "",
            expected=expected,
            host=host,
            stall=float("inf"),
        )

    def statistics(self) -> BackingStatistics:
        """As of any backing; `bytes_read` counts what the cache neither had nor was fetching."""
        mine = replace(super().statistics(), bytes_read=self._fetched)
        if self._cache is None:
            return mine
        below = self._cache.remote.statistics()
        if below.state is BackingState.UNAVAILABLE and mine.state is not BackingState.REFUSED:
            mine = replace(mine, state=below.state)
        # Of the cache, for all of its leaves: it is the one that asks.
        mine = replace(mine, asked_twice=below.asked_twice)
        if (below.last_error_time or 0.0) > (mine.last_error_time or 0.0):
            mine = replace(mine, last_error=below.last_error, last_error_time=below.last_error_time)
        return mine

    async def _open(self) -> Source:
        cache = self._cache = await self._enter()
        try:
            await cache.ready.wait()
            if cache.refusal is not None:
                raise type(cache.refusal)(cache.refusal.what, cache.refusal.why) from cache.refusal
            # Not known only if an internal error came first.
            return _CachedSource(cache, cache.identity or await cache.remote.identity(), self._count)
        except BaseException:
            cache.leave()
            raise

    def _count(self, length: int) -> None:
        self._fetched += length


class _CachedSource(Source):
    """A backing through its cache, for one leaf. `fetched` is told of bytes for which the backing has to be asked."""

    def __init__(self, cache: _Cache, identity: Identity, fetched: Callable[[int], None]) -> None:
        self.name = cache.remote.name
        self.size = identity.size
        self.identity = identity
        self.format = cache.remote.format
        self._cache = cache
        self._fetched = fetched
        self._open = True

    @property
    def tells_content(self) -> bool:
        return self._cache.tells_content

    @property
    def epoch(self) -> object:
        return self._cache.remote.epoch

    async def read_into(self, pos: int, buffer: memoryview) -> None:
        disk = self._cache.disk
        if disk is not None:
            try:
                self._fetched(await disk.lacking(pos, len(buffer)))
                buffer[:] = await disk.read(pos, len(buffer))
            except (LeafError, CorruptEntry) as error:
                disk.note(error)  # the fault of the cache, unless the backing says the same
            else:
                return
        self._fetched(len(buffer))
        await self._cache.remote.read_into(pos, buffer)

    def read_nowait(self, pos: int, buffer: memoryview) -> bool:
        disk = self._cache.disk
        if disk is None:
            return False
        found = disk.read_nowait(pos, len(buffer))
        if found is None:
            return False
        buffer[:] = found
        return True

    async def extents(self, pos: int, length: int) -> list[Extent]:
        image = self._cache.image
        if image is None:
            return await self._cache.remote.extents(pos, length)
        try:
            cached, unknown = await _zeros(image, pos, length)
        except (LeafError, CorruptEntry):
            return await self._cache.remote.extents(pos, length)
        if unknown is None:
            return cached
        first, end = unknown
        promised = await self._cache.remote.extents(first, end - first)
        return either([Extent(first - pos, False), *promised, Extent(pos + length - end, False)], cached)

    async def aclose(self) -> None:
        if self._open:
            self._open = False
            self._cache.leave()


async def _zeros(image: Image, pos: int, length: int) -> tuple[list[Extent], tuple[int, int] | None]:
    """Return what of the range the image knows to be zeros, and the part (first, end) outside which it knows everything.

    Raises:
        CorruptEntry, LeafError: it cannot say.
    """
    found: list[Extent] = []
    unknown: tuple[int, int] | None = None
    end = pos + length
    turn = 0
    while pos < end:
        run = await image.run(pos, end - pos)
        if run.state is State.BACKING:
            unknown = (pos if unknown is None else unknown[0], pos + run.length)
        found.append(Extent(run.length, run.state is State.ZERO))
        pos += run.length
        turn += 1
        if not turn % RUNS_PER_TURN:
            await trio.lowlevel.checkpoint()
    return merged(found), unknown


def either(one: list[Extent], other: list[Extent]) -> list[Extent]:
    """Return the extents of a range in which zeros is what `one` or `other`, two lists about it, calls zeros."""
    joined: list[Extent] = []
    left, right = [*reversed(one)], [*reversed(other)]
    while left and right:
        a, b = left.pop(), right.pop()
        length = min(a.length, b.length)
        joined.append(Extent(length, a.zero or b.zero))
        if a.length > length:
            left.append(Extent(a.length - length, a.zero))
        if b.length > length:
            right.append(Extent(b.length - length, b.zero))
    return merged(joined)


def _file_name(location: str, format: str, identity: Identity, *, lasting: bool) -> str:
    text = json.dumps([location, format, identity.size, identity.tag])
    name = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return name + SUFFIX if lasting else f"{name}-{secrets.token_hex(4)}{PASSING_SUFFIX}"


@asynccontextmanager
async def open_shared_caches(
    options: MountOptions, mountpoint: str, sources: tuple[str, ...]
) -> AsyncIterator[SharedCaches | None]:
    """Have the caches that `options` ask for, or None, while inside; they must outlive the leaves.

    Raises:
        UsageError: the folder cannot be used (`open_cache_folder`).
    """
    if not options.shared_cache:
        yield None
        return
    place = open_cache_folder(options.shared_cache, options.shared_cache_size, mountpoint=mountpoint, sources=sources)
    with place as folder:
        async with trio.open_nursery() as nursery:
            yield SharedCaches(folder, options.disk, nursery)
