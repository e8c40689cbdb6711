"""Making what is missing local: for streaming, for a step of it, and for a prefetch.

Who asks first looks (`look`), which also makes zero clusters of what the backing promises to be zeros, and then has the rest
fetched (`bring`). What a claim keeps out of a copy is its writer's to make local.
"""

from __future__ import annotations

from collections.abc import Iterator

import trio

from qedfs.backing.resilient import Backing
from qedfs.disk.copies import Copies
from qedfs.disk.fetches import MAX_FETCH, Fetch, Fetches
from qedfs.disk.promises import Promises
from qedfs.errors import first_of
from qedfs.image.image import Image
from qedfs.image.tables import State

PREFETCHES = 8
"""Pieces of `MAX_FETCH` that one prefetch has under way at once."""

Missing = tuple[int, int]
"""Clusters `[first, end)` that are not local."""


class Populate:
    """What of one image is missing, and how it comes. All positions are clusters, but where it says bytes."""

    def __init__(self, image: Image, backing: Backing, fetches: Fetches, copies: Copies) -> None:
        self._image = image
        self._backing = backing
        self._fetches = fetches
        self._copies = copies
        self._promises = Promises(image, backing, copies)
        self._cluster_size = image.geometry.cluster_size
        self._span = image.geometry.table_entries

    @property
    def total(self) -> int:
        """Clusters of the disk."""
        return self._image.geometry.clusters(self._image.header.image_size)

    def promised(self) -> int:
        """Clusters that count as local although no entry says so."""
        return self._promises.count()

    def next_missing(self, first: int, end: int) -> Missing | None:
        """Return the first missing clusters of `[first, end)`, or some of them; None if there are none.

        Does not wait: what lies below a table that is not in memory is called missing.
        """
        while first < end:
            found = self._image.next_missing(first, end)
            if found is None:
                return None
            start, stop = found
            # What is promised is as good as local: it is linked when its span is looked at, at the latest before completion.
            first = min(self._promises.zeros_until(start), stop)
            if first == start:
                return start, self._promises.next_zeros(start, stop)
        return None

    async def look(self, first: int, end: int, *, widely: bool) -> list[Missing]:
        """Return what of `[first, end)` is missing and has to be fetched, once promised zeros are linked.

        `widely` links them in all that the tables concerned cover, otherwise nothing beyond the range is touched.

        Raises:
            BackingRefused, LeafError, LeafFull, LeafFailed, CorruptEntry: it cannot be told, or zeros cannot be linked.
        """
        await self._promises.learn(first, end)
        if widely:
            await self._promises.settle(first, end)
        else:
            await self._promises.link(first, end)
        return await self.look_here(first, end)

    async def look_here(self, first: int, end: int) -> list[Missing]:
        """Return what of `[first, end)` is missing, by the leaf alone: the backing is not asked what of it is zeros.

        Raises:
            LeafError, CorruptEntry: it cannot be told.
        """
        for cluster in (first, *range(-(-(first + 1) // self._span) * self._span, end, self._span)):
            await self._image.run(cluster * self._cluster_size, 1)  # its table is in memory now
        return list(self.missing(first, end))

    async def scout(self, cluster: int) -> None:
        """Learn beforehand what `look` will ask about soon after `cluster`. Raises as `look`."""
        await self._promises.scout(cluster)

    def missing(self, first: int, end: int) -> Iterator[Missing]:
        """Yield what of `[first, end)` is missing, as `next_missing` finds it."""
        while found := self.next_missing(first, end):
            yield found
            first = found[1]

    async def room(self, length: int) -> None:
        """Return when `length` bytes could be fetched without waiting for earlier copies."""
        await self._fetches.room(length)

    def bring(self, missing: list[Missing]) -> Bringing:
        """Have `missing`, as just looked up, fetched and copied. Wait for what is returned before the next await."""
        if self._cluster_size > MAX_FETCH:
            return LargeBringing(self._copies, self._backing, missing)
        fetches: list[Fetch] = []
        for first, end in missing:
            fetches += self._fetches.join(first, end, self._image.header.image_size, copy=True, wanted=True)
        return Bringing(self._fetches, fetches)

    async def local_bytes(self, pos: int) -> int:
        """Return how many bytes from `pos` (bytes) to the first that is missing, or to the end of the disk, are local.

        Promises do not count. Raises `CorruptEntry`, `LeafError`.
        """
        at = pos
        while (left := self._image.header.image_size - at) > 0:
            run = await self._image.run(at, left)
            if run.state is State.BACKING:
                break
            at += run.length
        return at - pos

    async def populate(self, first: int, end: int) -> None:
        """Make `[first, end)` local, as far as claims and the leaf allow. Raises as `look` and `Bringing.arrived`."""
        bringing = self.bring(await self.look(first, end, widely=False))
        await bringing.arrived()
        await bringing.linked()

    async def prefetch(self, first: int, end: int) -> None:
        """The same for a range of any length, several pieces at once; the first that fails ends it."""
        piece = max(1, MAX_FETCH // self._cluster_size)
        slots = trio.Semaphore(PREFETCHES)

        async def bring(start: int) -> None:
            try:
                await self.populate(start, min(end, start + piece))
            finally:
                slots.release()

        try:
            async with trio.open_nursery() as nursery:
                for start in range(first, end, piece):
                    await slots.acquire()
                    nursery.start_soon(bring, start)
        except BaseExceptionGroup as group:
            raise first_of(group) from None

    def _next_unlinked(self, first: int, end: int) -> Missing | None:
        """As `next_missing`, but a promise counts only where there is no table."""
        while first < end and (found := self._image.next_missing(first, end)):
            start, stop = found
            if self._image.has_table(start // self._span):
                return found
            first = min(self._promises.zeros_until(start), stop)
            if first == start:
                return found
        return None

    async def settle(self) -> None:
        """Link all that is promised but for whole spans without a table. Raises as `look`."""
        await self._promises.settle(0, self.total)

    async def is_all_local(self) -> bool:
        """Whether nothing is missing and nothing that was promised has been forgotten since.

        Growth must not happen meanwhile. Promises must be linked before (`settle`), as far as there are tables. Raises as
        `look`.
        """
        held = self._promises.current
        first = 0
        while found := self._next_unlinked(first, self.total):
            first = found[0]
            if not self._image.has_table(first // self._span):
                return False
            await self._image.run(first * self._cluster_size, 1)
            if self._next_unlinked(first, first + 1):
                return False
        return held == self._promises.current or not self._promises.count()


class Bringing:
    """Bytes on their way into the leaf."""

    def __init__(self, fetches: Fetches, under_way: list[Fetch]) -> None:
        self._fetches = fetches
        self._under_way = under_way

    async def arrived(self) -> None:
        """Return when the bytes are here; raises as `Fetches.wait`."""
        await self._fetches.wait(self._under_way)

    async def linked(self) -> None:
        """Return when they are copied, as far as they could be."""
        for fetch in self._under_way:
            await fetch.ended.wait()


class LargeBringing(Bringing):
    """Clusters larger than `MAX_FETCH`: each arrives and is copied piece by piece."""

    def __init__(self, copies: Copies, backing: Backing, missing: list[Missing]) -> None:
        self._copies = copies
        self._backing = backing
        self._missing = missing

    async def arrived(self) -> None:
        async with trio.open_nursery() as nursery:
            for first, end in self._missing:
                for cluster in range(first, end):
                    nursery.start_soon(self._copies.copy_large, cluster, self._backing)

    async def linked(self) -> None:
        return
