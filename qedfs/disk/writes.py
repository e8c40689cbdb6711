"""Guest writes: in place over data, under a claim everywhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import inf

import trio

from qedfs.backing.resilient import Backing
from qedfs.disk.claims import Claims
from qedfs.disk.fetches import MAX_FETCH, Fetches
from qedfs.disk.misses import Misses
from qedfs.disk.plan import Kind, Part, cut
from qedfs.disk.telling import timed_out
from qedfs.image.geometry import SECTOR
from qedfs.image.image import Image
from qedfs.image.tables import State


class Writes:
    """Writes to one image. `backing` and `fetches` are None where the image stands alone.

    `timeout` is for how many seconds one of them waits for the backing, None for ever.
    """

    def __init__(
        self,
        image: Image,
        claims: Claims,
        misses: Misses,
        backing: Backing | None,
        fetches: Fetches | None,
        timeout: float | None = None,
    ) -> None:
        self._image = image
        self._claims = claims
        self._misses = misses
        self._backing = backing
        self._fetches = fetches
        self._timeout = timeout
        self._cluster_size = image.geometry.cluster_size

    async def write(self, pos: int, data: memoryview) -> None:
        """Write `data` at `pos`, inside the disk.

        Raises:
            BackingUnavailable: what is needed around the data did not come in time. Parts before it are written.
            Others as `Disk.write`.
        """
        deadline = trio.current_time() + (inf if self._timeout is None else self._timeout)
        while data:
            run = await self._image.run(pos, len(data))
            if run.state is State.DATA:
                await self._in_place(run.offset, data[: run.length])
            else:
                await self._allocating(run.pos, data[: run.length], deadline)
            pos += run.length
            data = data[run.length :]

    def stand_alone(self) -> None:
        """Need no backing any more: all that is not local reads as zeros."""
        self._backing = self._fetches = None

    async def localise(self, cluster: int) -> None:
        """Bring a cluster that is in the backing into the leaf, zeros past the end of the disk. The caller has its claim."""
        if self._cluster_size > MAX_FETCH:
            await self._write_large(State.BACKING, cluster, cluster * self._cluster_size, memoryview(b""))
        else:
            content = await self._content(State.BACKING, cluster)
            await self._link_new(cluster, cluster + 1, memoryview(content))

    async def _in_place(self, offset: int, data: memoryview) -> None:
        if not self._image.storage.write_nowait(offset, data):
            await self._image.storage.write(offset, data)

    async def _allocating(self, pos: int, data: memoryview, deadline: float) -> None:
        size = self._cluster_size
        first, end = pos // size, -(-(pos + len(data)) // size)
        async with self._claims.hold(first, end):
            # From here on nobody else links these clusters, so what a look-up says stays true over every await.
            while data:
                run = await self._image.run(pos, len(data))
                if run.state is State.DATA:  # somebody was faster
                    await self._in_place(run.offset, data[: run.length])
                else:
                    for part in cut(pos, data[: run.length], size, self._image.header.image_size):
                        await self._write_part(run.state, part, pos, data[part.start : part.stop], deadline)
                pos += run.length
                data = data[run.length :]

    async def _write_part(self, state: State, part: Part, run_pos: int, data: memoryview, deadline: float) -> None:
        if part.kind is Kind.ZEROS:
            await self._write_zeros(state, part.first, part.end)
        elif part.kind is Kind.WHOLE:
            await self._link_new(part.first, part.end, data)
        elif self._cluster_size > MAX_FETCH:
            await self._write_large(state, part.first, run_pos + part.start, data, deadline)
        else:
            cluster = await self._content(state, part.first, deadline)
            start = run_pos + part.start - part.first * self._cluster_size
            cluster[start : start + len(data)] = data
            await self._link_new(part.first, part.end, memoryview(cluster))

    async def _content(self, state: State, cluster: int, deadline: float = inf) -> bytearray:
        """Return what a cluster in `state`, no larger than `MAX_FETCH`, reads as, zeros past the end of the disk."""
        if state is State.ZERO or self._fetches is None:
            return bytearray(self._cluster_size)
        assert self._backing is not None
        size = self._image.header.image_size
        content = bytearray(self._cluster_size)
        pos = cluster * self._cluster_size
        if self._backing.read_nowait(pos, memoryview(content)[: size - pos]):
            return content
        fetches = self._fetches.join(cluster, cluster + 1, size, copy=False)
        with self._waiting(pos, self._cluster_size, deadline):
            (fetched,) = await self._fetches.wait(fetches)
        start = (cluster - fetches[0].first) * self._cluster_size
        return bytearray(fetched[start : start + self._cluster_size])

    @contextmanager
    def _waiting(self, pos: int, length: int, deadline: float) -> Iterator[None]:
        """Wait for the backing, until `deadline`. Raises BackingUnavailable when that has come."""
        with trio.move_on_at(deadline) as patience, self._misses.wait(pos, length):
            yield
        if patience.cancelled_caught:
            raise timed_out(self._backing, self._timeout, request="write")

    async def _link_new(self, first: int, end: int, data: memoryview) -> None:
        """Write `data`, the clusters `[first, end)` (the last may be cut short), to a new extent and link it."""
        async with self._image.pinned(first, end):
            extent = self._image.allocate(end - first)
            if len(data) < extent.length:
                data = memoryview(bytes(data).ljust(extent.length, b"\0"))
            # A write that fails leaves the extent leaked: what of it reached the disk is in doubt.
            if not self._image.storage.write_nowait(extent.offset, data):
                await self._image.storage.write(extent.offset, data)
            self._image.link_data(first, end - first, extent.offset)

    async def _write_zeros(self, state: State, first: int, end: int) -> None:
        if state is State.ZERO:
            return
        if not self._backing_ends_before(first * self._cluster_size):
            # Not a zero entry: over backing data QEMU fills such a cluster from the backing again when a part of it is
            # written. A hole in the file takes no room either.
            await self._link_hole(first, end)
            return
        async with self._image.pinned(first, end):
            self._image.link_zero(first, end - first)

    def _backing_ends_before(self, pos: int) -> bool:
        """Whether the backing certainly has nothing at and past `pos`. Not worth waiting for: unknown is no."""
        if self._backing is None:
            return True
        size = self._backing.statistics().size
        return size is not None and size <= pos

    async def _link_hole(self, first: int, end: int) -> None:
        async with self._image.pinned(first, end):
            extent = self._image.allocate(end - first)
            storage = self._image.storage
            if extent.pristine or await storage.punch(extent.offset, extent.length):
                # The file must reach to the end of the cluster before an entry names it; reused clusters may have lain at
                # its end. It is grown by a write: a truncation could cut off what another task has just written behind.
                await storage.write(extent.offset + extent.length - SECTOR, bytes(SECTOR))
            else:
                await storage.write(extent.offset, bytes(extent.length))
            self._image.link_data(first, end - first, extent.offset)

    async def _write_large(self, state: State, cluster: int, pos: int, data: memoryview, deadline: float = inf) -> None:
        """Write part of a cluster larger than `MAX_FETCH`: its content moves in pieces."""
        await self._image.begin_allocating()
        extent = self._image.allocate(1)
        start = cluster * self._cluster_size
        for inside in range(0, self._cluster_size, MAX_FETCH):
            piece = bytearray(MAX_FETCH)
            at = start + inside
            length = max(0, min(MAX_FETCH, self._image.header.image_size - at))
            covered = pos <= at and at + length <= pos + len(data)
            if state is State.BACKING and self._backing is not None and length and not covered:
                with self._waiting(at, length, deadline):
                    await self._backing.read_into(at, memoryview(piece)[:length])
            low, high = max(pos, at), min(pos + len(data), at + MAX_FETCH)
            if low < high:
                piece[low - at : high - at] = data[low - pos : high - pos]
            await self._image.storage.write(extent.offset + inside, piece)
        async with self._image.pinned(cluster, cluster + 1):
            self._image.link_data(cluster, 1, extent.offset)
