"""Guest reads that need more than a look into the page cache: from the leaf, from zeros, or from the backing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import trio

from qedfs.backing.resilient import Backing
from qedfs.config import DiskOptions
from qedfs.disk.copies import Copies
from qedfs.disk.fetches import MAX_FETCH, Fetch, Fetches
from qedfs.disk.misses import Misses
from qedfs.disk.readahead import Readahead
from qedfs.disk.telling import timed_out
from qedfs.errors import BackingUnavailable, CorruptEntry, first_of
from qedfs.image.image import Image
from qedfs.image.tables import Run, State

Data = bytes | bytearray | memoryview

REPEATED_WITHIN = 0.05
"""Seconds. When a read with its read-ahead has failed, the kernel asks at once for the one page that it needs. Whoever waits
for that has waited as long as he may. Not longer: the backing may be back, and others may read there."""


class GivenUp:
    """Ranges of the disk whose reads have been given up a moment ago. Times are trio's."""

    def __init__(self) -> None:
        self._ranges: deque[tuple[float, int, int]] = deque()
        """When it is to be forgotten, first and last position; in order of time."""

    def note(self, pos: int, length: int) -> None:
        self._ranges.append((trio.current_time() + REPEATED_WITHIN, pos, pos + length))

    def has(self, pos: int, length: int) -> bool:
        """Whether a part of the range is among them."""
        now = trio.current_time()
        while self._ranges and self._ranges[0][0] <= now:
            self._ranges.popleft()
        return any(first < pos + length and pos < end for _, first, end in self._ranges)


class Reads:
    """Reads of one disk. `backing` and `fetches` are None where the image stands alone."""

    def __init__(
        self,
        image: Image,
        copies: Copies,
        misses: Misses,
        options: DiskOptions,
        nursery: trio.Nursery,
        backing: Backing | None,
        fetches: Fetches | None,
    ) -> None:
        self._image = image
        self._copies = copies
        self._misses = misses
        self._options = options
        self._nursery = nursery
        self._backing = backing
        self._fetches = fetches
        self._cluster_size = image.geometry.cluster_size
        self._shift = self._cluster_size.bit_length() - 1
        self._given_up = GivenUp()
        self._readahead = Readahead(options.readahead // self._cluster_size)

    def stand_alone(self) -> None:
        """Need no backing any more: all that is not local reads as zeros."""
        self._backing = self._fetches = None

    async def read(self, pos: int, length: int, copying: Callable[[], bool]) -> Data:
        """Return the `length` bytes at `pos`, inside the disk. `copying` tells whether what is missed is to be copied.

        Raises as `Disk.read`.
        """
        try:
            return await self._read(pos, length, copying)
        except BackingUnavailable:
            if not self._given_up.has(pos, length):  # else it did not wait, and who comes next has to
                self._given_up.note(pos, length)
            raise

    async def _read(self, pos: int, length: int, copying: Callable[[], bool]) -> Data:
        run = await self._image.run(pos, length)
        if run.length == length:
            return await self._read_run(run, copying)
        result = bytearray(length)
        view = memoryview(result)

        async def read_piece(run: Run) -> None:
            view[run.pos - pos : run.pos - pos + run.length] = await self._read_run(run, copying)

        try:
            async with trio.open_nursery() as nursery:
                at = pos
                while True:
                    if run.state is not State.ZERO:
                        nursery.start_soon(read_piece, run)
                    at += run.length
                    if at >= pos + length:
                        break
                    run = await self._image.run(at, pos + length - at)
        except BaseExceptionGroup as group:
            raise first_of(group) from None
        return result

    async def _read_run(self, run: Run, copying: Callable[[], bool]) -> Data:
        if run.state is State.DATA:
            return await self._image.storage.read(run.offset, run.length)
        if run.state is State.ZERO:
            return bytes(run.length)
        if self._backing is None:
            return await self._read_alone(run)
        if self._given_up.has(run.pos, run.length):
            raise timed_out(self._backing, self._options.backing_timeout)
        with trio.move_on_after(self._options.backing_timeout or float("inf")):
            # Asked once: mode and hold may change, and a rest may end, while the bytes are on their way.
            copied = copying()
            if copied and self._cluster_size <= MAX_FETCH:
                return await self._read_fetched(run, self._fetches)
            return await self._read_through(run, self._backing, copied=copied)
        raise timed_out(self._backing, self._options.backing_timeout)

    async def _read_alone(self, run: Run) -> Data:
        """Read what was missing when it was looked up, now that there is no backing: what is missing now is zeros."""
        data = bytearray(run.length)
        at, end = run.pos, run.pos + run.length
        while at < end:
            found = await self._image.run(at, end - at)
            if found.state is State.DATA:
                start = at - run.pos
                data[start : start + found.length] = await self._image.storage.read(found.offset, found.length)
            at += found.length
        return data

    async def _read_through(self, run: Run, backing: Backing, *, copied: bool) -> Data:
        data = bytearray(run.length)
        if not backing.read_nowait(run.pos, memoryview(data)):
            with self._misses.wait(run.pos, run.length):
                await backing.read_into(run.pos, memoryview(data))
        if copied and self._backing is not None:
            for cluster in range(run.pos >> self._shift, (run.pos + run.length - 1 >> self._shift) + 1):
                self._nursery.start_soon(self._copies.copy_large, cluster, self._backing)
        return data

    async def _read_fetched(self, run: Run, fetches: Fetches | None) -> Data:
        assert fetches is not None, "there is a backing"
        first, end = run.pos >> self._shift, (run.pos + run.length + self._cluster_size - 1) >> self._shift
        under_way = fetches.join(first, end, self._image.header.image_size, copy=True)
        self._widen(first, end, fetches)
        with self._misses.wait(run.pos, run.length):
            buffers = await fetches.wait(under_way)
        pieces = [self._inside(fetch, data, run) for fetch, data in zip(under_way, buffers, strict=True)]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _inside(self, fetch: Fetch, data: memoryview, run: Run) -> memoryview:
        base = fetch.first << self._shift
        return data[max(0, run.pos - base) : run.pos + run.length - base]

    def _widen(self, first: int, end: int, fetches: Fetches) -> None:
        # Only what is known to be missing without asking the disk: a table that is not in memory ends it.
        start, stop = self._readahead.observe(first, end)
        size = self._image.header.image_size
        stop = min(stop, self._image.geometry.clusters(size))
        while start < stop:
            try:
                run = self._image.run_nowait(start << self._shift, (stop - start) << self._shift)
            except CorruptEntry:
                return  # nobody asked for that cluster yet
            if run is None:
                return
            run_end = start + (run.length >> self._shift)
            if run.state is State.BACKING and not fetches.widen(start, run_end, size):
                return
            start = run_end
