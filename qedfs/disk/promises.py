"""What the backing promises to read as zeros and no entry of the leaf says yet.

A promise holds for one connection to the backing. It is linked as zero entries where the disk has a table; a span of a whole
table that is zeros throughout stays without one and counts as local, so that a huge sparse disk costs no tables
(docs/concurrency.md, "A promise of zeros").
"""

from __future__ import annotations

import trio

from qedfs.backing.resilient import Backing
from qedfs.disk.copies import Copies
from qedfs.disk.ranges import Ranges
from qedfs.image.image import Image

FIRST_ASK, LEAST_ASK, MOST_ASK = 64 << 20, 16 << 20, 4 << 30
"""Bytes of the disk that one question is about: at first, at least, at most. A disk of large holes is asked in few questions."""
FEW, MANY = 4096, 65536
"""Ranges in an answer below which the next question is twice as long, and above which half: an answer costs memory."""
WIDE_SPAN = 4 << 30
"""Bytes; above it a table is small beside what it covers, and promised zeros are linked at once."""


class Promises:
    """The promises to one image. All positions are clusters."""

    def __init__(self, image: Image, backing: Backing, copies: Copies) -> None:
        self._image = image
        self._backing = backing
        self._copies = copies
        self._cluster_size = image.geometry.cluster_size
        self._span = image.geometry.table_entries
        self._ask = FIRST_ASK
        self._asking = trio.Lock()
        # INVARIANT: both are of one epoch of the backing, `_epoch`; when that is over they say nothing.
        self._known = Ranges()
        self._zeros = Ranges()
        self._epoch: object = None

    @property
    def current(self) -> bool:
        """Whether what was promised still holds."""
        return self._epoch == self._backing.epoch

    def zeros_until(self, cluster: int) -> int:
        """Return where the promised zeros that hold `cluster` end; `cluster` itself if it is not promised."""
        return self._zeros.end_of(cluster) if self.current else cluster

    def next_zeros(self, cluster: int, otherwise: int) -> int:
        """Return where promised zeros begin at or after `cluster`; `otherwise` if not before that."""
        return self._zeros.next_start(cluster, otherwise) if self.current else otherwise

    def count(self) -> int:
        """Return how many clusters count as local by promise alone: those of whole spans without a table."""
        if not self.current:
            return 0
        found = 0
        total = self._total()
        for first, end in self._zeros:
            start, stop = -(-first // self._span), total // self._span if end >= total else end // self._span
            whole = max(0, stop - start)
            found += (whole - self._image.tables_between(start, stop)) * self._span if whole else 0
            if end >= total and total % self._span and first <= total // self._span * self._span:
                last = total // self._span
                found += 0 if self._image.has_table(last) else total - last * self._span
        return found

    async def learn(self, first: int, end: int) -> None:
        """Ask the backing about what is not known of `[first, end)`, and some more behind it.

        Raises:
            BackingRefused: no retry helps.
            BackingUnavailable: the backing was closed.
        """
        while first < end:
            if not self.current or self._known.end_of(first) == first:
                async with self._asking:
                    if not self.current or self._known.end_of(first) == first:
                        await self._learn_from(first)
            first = self._known.end_of(first)

    async def scout(self, cluster: int) -> None:
        """Ask about what lies behind the known part that holds `cluster`, if that ends soon and nobody asks already.

        Raises as `learn`.
        """
        end = self._known.end_of(cluster) if self.current else cluster
        soon = (end - cluster) * self._cluster_size < FIRST_ASK
        if soon and end < self._total() and not self._asking.locked():
            async with self._asking:
                if self._known.end_of(end) == end:
                    await self._learn_from(end)

    async def settle(self, first: int, end: int) -> None:
        """Link promised zeros in every span of a table that `[first, end)` touches, but for whole spans without a table.

        Clusters that a guest is writing are left to it. Raises as `Copies.link_promised`.
        """
        total = self._total()
        for index in range(first // self._span, -(-min(end, total) // self._span)):
            start, stop = index * self._span, min((index + 1) * self._span, total)
            if self.current and self._is_due(index, start, stop):
                await self.link(start, stop)

    async def link(self, first: int, end: int) -> None:
        """Link the promised zeros of `[first, end)`. Raises as `Copies.link_promised`."""
        for start, stop in self._zeros.within(first, end):
            if not self.current:
                return
            await self._copies.link_promised(start, stop)
            self._zeros.remove(start, stop)
            if self._image.urgent:
                await self._image.commit(durable=False)

    def _is_due(self, index: int, start: int, stop: int) -> bool:
        if self._image.has_table(index) or self._span * self._cluster_size > WIDE_SPAN:
            return True
        return self._known.covers(start, stop) and not self._zeros.covers(start, stop)

    async def _learn_from(self, first: int) -> None:
        size = self._cluster_size
        while True:
            await self._backing.identity()  # connects, so that the epoch is that of the answer
            epoch = self._backing.epoch
            if epoch != self._epoch:
                self._known.clear()
                self._zeros.clear()
                self._epoch = epoch
            disk_size = self._image.header.image_size
            end = self._known.next_start(first, min(self._total(), first + max(1, self._ask // size)))
            pos, stop = first * size, min(end * size, disk_size)
            extents = await self._backing.extents(pos, stop - pos)
            if epoch == self._backing.epoch:
                break
        if len(extents) < FEW:
            self._ask = min(MOST_ASK, 2 * self._ask)
        elif len(extents) > MANY:
            self._ask = max(LEAST_ASK, self._ask // 2)
        for extent in extents:
            if extent.zero:
                # The promise counts for whole clusters only; the disk's end makes its last one whole.
                zero_end = end if pos + extent.length >= disk_size else (pos + extent.length) // size
                self._zeros.add(-(-pos // size), zero_end)
            pos += extent.length
        self._known.add(first, end)

    def _total(self) -> int:
        return self._image.geometry.clusters(self._image.header.image_size)
