"""Bringing what was fetched into the leaf, behind the answers. Copies never wait for a claim and never fail a reader."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import trio

from qedfs.config import Reserve
from qedfs.disk.claims import Claims
from qedfs.disk.fetches import MAX_FETCH, Bytes, Fetch
from qedfs.disk.plan import is_zero, zero_clusters
from qedfs.disk.reserve import Room
from qedfs.errors import LeafError, LeafFull, QedfsError
from qedfs.image.image import Image
from qedfs.image.tables import Run, State
from qedfs.turns import take_turn

log = logging.getLogger(__name__)

REST = 5.0
"""Seconds without copies after the leaf did not take one: a full disk is looked at again this often."""


class Copies:
    """Copies into one image. `error` is the newest failure and `error_time` when it was (seconds since the epoch)."""

    def __init__(self, image: Image, claims: Claims, reserve: Reserve | None) -> None:
        self._image = image
        self._claims = claims
        self._cluster_size = image.geometry.cluster_size
        self._resting_until = -float("inf")
        self._room = Room(reserve)
        self._stopped = trio.Event()
        self._ended = trio.Event()
        self.error: QedfsError | None = None
        self.error_time = 0.0
        self.copied = 0
        """Clusters that came from the backing."""

    @property
    def full(self) -> bool:
        """Whether copying has stopped for want of room (`Room`)."""
        return self._room.stopped

    @property
    def resting(self) -> bool:
        """Whether copying pauses because the leaf did not take the last one."""
        return self.full or trio.current_time() < self._resting_until

    async def watch_room(self) -> None:
        """Find out what is free now, and let copies resume when there is room again. Does not return."""
        while True:
            await self._look(0)
            if not self.full:
                await self._stopped.wait()
            await trio.sleep(REST)

    async def copy(self, fetch: Fetch) -> None:
        """Put into the leaf what is still missing of a fetch that has ended well. Raises nothing that is expected."""
        try:
            async with self._room_for((fetch.end - fetch.first) * self._cluster_size) as room:
                if not room:
                    return
                await take_turn()
                with self._claims.hold_unclaimed(fetch.first, self._still_inside(fetch)) as parts:
                    for first, stop in parts:
                        await self._copy_claimed(fetch, first, stop)
        except QedfsError as error:
            self._rest(error)

    async def link_promised(self, first: int, end: int) -> None:
        """Let what is missing of `[first, end)`, which the backing promises to read as zeros, be zero clusters."""
        with self._claims.hold_unclaimed(first, end) as parts:
            for start, stop in parts:
                async with self._image.pinned(start, stop):
                    for run_first, run_end in self._missing(start, stop):
                        self._image.link_zero(run_first, run_end - run_first)

    async def copy_large(self, cluster: int, backing: Bytes) -> None:
        """Fetch a cluster larger than `MAX_FETCH` and put it into the leaf, piece by piece under one claim.

        Does nothing when somebody has the claim or another call is at it. Raises nothing that is expected.
        """
        try:
            # Whoever copies it already holds its claim too.
            with self._claims.hold_unclaimed(cluster, cluster + 1) as parts:
                if not parts:
                    return
                async with self._room_for(self._cluster_size) as room:
                    if room and (await self._image.run(cluster * self._cluster_size, 1)).state is State.BACKING:
                        await self._copy_large_claimed(cluster, backing)
        except QedfsError as error:
            # Between two pieces nothing is asked of the backing: it may have closed, as the image stands alone.
            if self._image.backing_name or isinstance(error, LeafError):
                self._rest(error)

    def _still_inside(self, fetch: Fetch) -> int:
        # The bytes past the end of a smaller disk are zeros and not the backing's.
        if fetch.size == self._image.header.image_size:
            return fetch.end
        return min(fetch.end, fetch.size // self._cluster_size)

    async def _copy_claimed(self, fetch: Fetch, first: int, end: int) -> None:
        async with self._image.pinned(first, end):
            missing = list(self._missing(first, end))
            for run_first, run_end in missing:
                data = memoryview(fetch.buffer)[self._at(fetch, run_first) : self._at(fetch, run_end)]
                for part_first, part_end, zero in zero_clusters(run_first, data, self._cluster_size):
                    if zero:
                        self._image.link_zero(part_first, part_end - part_first)
                        self.copied += part_end - part_first
                    else:
                        await self._write(part_first, part_end, data[self._part(run_first, part_first, part_end)])

    async def _write(self, first: int, end: int, data: memoryview) -> None:
        extent = self._image.allocate(end - first)
        # A write that fails leaves the extent leaked: what of it reached the disk is in doubt.
        await self._image.storage.write_behind(extent.offset, data)
        self._image.link_data(first, end - first, extent.offset)
        self.copied += end - first

    async def _copy_large_claimed(self, cluster: int, backing: Bytes) -> None:
        await self._image.begin_allocating()
        extent = self._image.allocate(1)
        start = cluster * self._cluster_size
        all_zero = True
        for inside in range(0, self._cluster_size, MAX_FETCH):
            piece = bytearray(MAX_FETCH)
            length = max(0, min(MAX_FETCH, self._image.header.image_size - start - inside))
            if length:
                await backing.read_into(start + inside, memoryview(piece)[:length], urgent=lambda: False)
            all_zero = all_zero and is_zero(memoryview(piece))
            await self._image.storage.write_behind(extent.offset + inside, piece)
        async with self._image.pinned(cluster, cluster + 1):
            if all_zero:
                self._image.link_zero(cluster, 1)
            else:
                self._image.link_data(cluster, 1, extent.offset)
        self.copied += 1
        if all_zero:
            self._image.allocator.release(extent.offset, extent.length)

    def _missing(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield what of `[first, end)`, claimed and pinned, is not local."""
        size = self._cluster_size
        while first < end:
            run = self._image.run_nowait(first * size, (end - first) * size)
            assert isinstance(run, Run), "the table is pinned"
            stop = first + run.length // size
            if run.state is State.BACKING:
                yield (first, stop)
            first = stop

    def _at(self, fetch: Fetch, cluster: int) -> int:
        return (cluster - fetch.first) * self._cluster_size

    def _part(self, base: int, first: int, end: int) -> slice:
        return slice((first - base) * self._cluster_size, (end - base) * self._cluster_size)

    @asynccontextmanager
    async def _room_for(self, length: int) -> AsyncIterator[bool]:
        """Have room for a copy of `length` bytes within the context, or say that there is none."""
        room = await self._has_room(length)
        try:
            yield room
        finally:
            if room:
                self._room.ended(length)
                self._ended.set()
                self._ended = trio.Event()

    async def _has_room(self, length: int) -> bool:
        while not self.full:
            if self._room.take(length, trio.current_time()):
                return True
            await self._look(length)
            if self._room.take(length, trio.current_time()):
                return True
            if self._room.stopped or not self._room.under_way:
                self._out_of_room()
                return False
            await self._ended.wait()
        return False

    def _out_of_room(self) -> None:
        self._stop()
        why = f"copying stopped: {self._room.reserve} bytes of its file system are kept for the guest (reserve)"
        if self._room.used_up:
            why = "copying stopped: all the room that it was given is taken"
        self._note(LeafFull(self._image.name, why))

    async def _look(self, length: int) -> None:
        space = await self._image.storage.space()
        self._room.observe(space, length, trio.current_time())

    def _rest(self, error: QedfsError) -> None:
        self._note(error)
        if isinstance(error, LeafFull):
            self._room.stop()
            self._stop()
        elif isinstance(error, LeafError):
            self._resting_until = trio.current_time() + REST

    def _stop(self) -> None:
        self._stopped.set()
        self._stopped = trio.Event()

    def _note(self, error: QedfsError) -> None:
        if self.error is None or str(error) != str(self.error):
            log.warning("%s", error)  # once, however many copies meet it
        self.error, self.error_time = error, time.time()
