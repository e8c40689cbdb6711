"""One virtual disk: what an image and its backing are together.

Reads answer from the leaf, from zeros or from the backing; copies go into the leaf behind the answer. Writes allocate
under a claim. docs/concurrency.md says who may wait for whom, and why nothing is lost.
"""

from __future__ import annotations

import logging
import mmap
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

import trio

from qedfs.backing.resilient import Backing, BackingState, BackingStatistics
from qedfs.config import DiskOptions, Mode, parse_choice
from qedfs.disk import growth
from qedfs.disk.claims import Claims
from qedfs.disk.copies import Copies
from qedfs.disk.fetches import MAX_FETCH, Fetch, Fetches
from qedfs.disk.readahead import Readahead
from qedfs.disk.writes import Writes
from qedfs.errors import BackingUnavailable, CorruptEntry, Held, LeafError, QedfsError, ReadOnly, UsageError
from qedfs.image.geometry import SECTOR
from qedfs.image.image import Image
from qedfs.image.tables import Counts, Run, State

log = logging.getLogger(__name__)

COMMIT_AGE = 1.0
"""Seconds that metadata may be older than the disk before it is committed unasked: what a crash without any fsync may
cost in copies, against one flush of the leaf."""
PREFETCHES = 8
"""Pieces of `MAX_FETCH` that one prefetch has under way at once."""
LOG_PAUSE = 60.0
"""Seconds between two lines of the log about errors of one kind."""
RETRY_COMMIT = 5.0
"""Seconds between attempts to commit when the leaf does not take it."""
_SCRATCH = memoryview(mmap.mmap(-1, MAX_FETCH))
"""Where `read_nowait` puts its bytes: one for the process, since it is used up before the next await. It begins at a page:
a bytearray begins 16 or 32 bytes into one, and then the processor takes each load of the copy from the page cache for
dependent on the store before it (their addresses agree in the low 12 bits): 3.7 µs for 4 KiB instead of 2.1."""


@dataclass(frozen=True)
class DiskStatistics:
    """One disk at one moment. Sizes are in bytes; counts are of clusters, and None until all tables were seen."""

    virtual_size: int
    cluster_size: int
    clusters_total: int
    counts: Counts | None
    mode: Mode
    state: str
    """As in the interface, `state`."""
    backing: str
    """For showing: credentials masked; empty when the image stands alone."""
    backing_format: str
    backing_bytes_read: int
    last_error: str
    """The newest error with its time (UTC); empty if there was none."""


class Disk:
    """A virtual disk. Made by `open_disk`; positions and lengths are in bytes."""

    def __init__(self, image: Image, backing: Backing | None, options: DiskOptions, nursery: trio.Nursery) -> None:
        self.name = image.name
        self.cluster_size = image.geometry.cluster_size
        self.read_only = not image.storage.writable
        stored = image.record.mode
        self.mode = options.mode or (parse_choice(Mode, stored, f"{image.name}: stored mode") if stored else Mode.COR)
        self.held = image.record.hold
        self._image = image
        self._backing = backing
        self._options = options
        self._nursery = nursery
        self._shift = self.cluster_size.bit_length() - 1
        self._claims = Claims()
        self._copies = Copies(image, self._claims, options.reserve)
        self._fetches = Fetches(backing, self.cluster_size, nursery, self._copies.copy) if backing else None
        self._writes = Writes(image, self._claims, backing, self._fetches)
        self._readahead = Readahead(options.readahead // self.cluster_size)
        self._error: QedfsError | None = None
        self._error_time = 0.0
        self._logged: dict[type[QedfsError], tuple[str, float]] = {}

    @property
    def size(self) -> int:
        """Bytes of the disk. Grows, never shrinks."""
        return self._image.header.image_size

    # -- reading -------------------------------------------------------------------------------------------------------

    def read_nowait(self, pos: int, length: int) -> memoryview | None:
        """Return local data that lies in one piece and in the page cache; None where `read` is needed.

        The hot path. The view is valid until the next call of this method on any disk, so until the next await.
        """
        image = self._image
        if length > MAX_FETCH or pos + length > image.header.image_size:
            return None
        offset = image.data_offset(pos, length)
        if offset < 0:
            return None
        view = _SCRATCH[:length]
        return view if image.storage.read_nowait(offset, view) else None

    async def read(self, pos: int, length: int) -> bytes | bytearray | memoryview:
        """Return the bytes at `pos`, fewer or none where the disk ends.

        Raises:
            CorruptEntry, LeafError: the image cannot say, or its disk cannot.
            BackingUnavailable: the backing did not answer for `backing_timeout`.
            BackingRefused: the backing failed for good.
        """
        length = min(length, self.size - pos)
        if length <= 0:
            return b""
        try:
            return await self._read(pos, length)
        except QedfsError as error:
            self.note(error)
            raise

    async def _read(self, pos: int, length: int) -> bytes | bytearray | memoryview:
        run = await self._image.run(pos, length)
        if run.length == length:
            return await self._read_run(run)
        result = bytearray(length)
        view = memoryview(result)
        try:
            async with trio.open_nursery() as nursery:
                at = pos
                while True:
                    if run.state is not State.ZERO:
                        nursery.start_soon(self._read_piece, run, view[at - pos : at - pos + run.length])
                    at += run.length
                    if at >= pos + length:
                        break
                    run = await self._image.run(at, pos + length - at)
        except BaseExceptionGroup as group:
            raise _first(group) from None
        return result

    async def _read_piece(self, run: Run, into: memoryview) -> None:
        into[:] = await self._read_run(run)

    async def _read_run(self, run: Run) -> bytes | bytearray | memoryview:
        if run.state is State.DATA:
            return await self._image.storage.read(run.offset, run.length)
        if run.state is State.ZERO or self._backing is None:
            return bytes(run.length)
        with trio.move_on_after(self._options.backing_timeout or float("inf")):
            # Asked once: mode and hold may change, and a rest may end, while the bytes are on their way.
            copying = self.copying
            if copying and self.cluster_size <= MAX_FETCH:
                return await self._read_fetched(run)
            data = bytearray(run.length)
            if not self._backing.read_nowait(run.pos, memoryview(data)):
                await self._backing.read_into(run.pos, memoryview(data))
            if copying:
                for cluster in range(run.pos >> self._shift, (run.pos + run.length - 1 >> self._shift) + 1):
                    self._nursery.start_soon(self._copies.copy_large, cluster, self._backing)
            return data
        raise self._timed_out()

    async def _read_fetched(self, run: Run) -> bytes | bytearray | memoryview:
        assert self._fetches is not None
        first, end = run.pos >> self._shift, (run.pos + run.length + self.cluster_size - 1) >> self._shift
        fetches = self._fetches.join(first, end, self.size, copy=True)
        self._widen(first, end)
        buffers = await self._fetches.wait(fetches)
        pieces = [self._inside(fetch, data, run) for fetch, data in zip(fetches, buffers, strict=True)]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _inside(self, fetch: Fetch, data: memoryview, run: Run) -> memoryview:
        base = fetch.first << self._shift
        return data[max(0, run.pos - base) : run.pos + run.length - base]

    def _widen(self, first: int, end: int) -> None:
        # Only what is known to be missing without asking the disk: a table that is not in memory ends it.
        assert self._fetches is not None
        start, stop = self._readahead.observe(first, end)
        stop = min(stop, self._image.geometry.clusters(self.size))
        while start < stop:
            try:
                run = self._image.run_nowait(start << self._shift, (stop - start) << self._shift)
            except CorruptEntry:
                return  # nobody asked for that cluster yet
            if run is None:
                return
            run_end = start + (run.length >> self._shift)
            if run.state is State.BACKING and not self._fetches.widen(start, run_end, self.size):
                return
            start = run_end

    def _timed_out(self) -> BackingUnavailable:
        assert self._backing is not None
        why = self._backing.statistics().last_error or "no answer"
        return BackingUnavailable(
            self._backing.name, f"unreachable for {self._options.backing_timeout:g} s, given up for this read ({why})"
        )

    # -- writing -------------------------------------------------------------------------------------------------------

    def write_nowait(self, pos: int, data: bytes | memoryview) -> bool:
        """Write over local data that lies in one piece, if the page cache takes it at once; False where `write` is needed.

        The hot path of writes.
        """
        if self.read_only or self.held or pos + len(data) > self.size or self._image.committer.failed is not None:
            return False
        offset = self._image.data_offset(pos, len(data))
        return offset >= 0 and self._image.storage.write_nowait(offset, data)

    async def write(self, pos: int, data: bytes | bytearray | memoryview) -> None:
        """Write `data` at `pos`; past the end the disk grows to the next multiple of 512.

        Raises:
            ReadOnly, Held: it may not be written.
            LeafFull, LeafError, LeafFailed: the leaf does not take it.
            BackingRefused: what is needed around the data cannot be had for good.
        """
        self._check_writable()
        end = pos + len(data)
        if end > self.size:
            await self.grow(-(-end // SECTOR) * SECTOR, at_least=True)
        try:
            await self._writes.write(pos, memoryview(data))
            if self._image.urgent:
                await self._image.commit(durable=False)
        except QedfsError as error:
            self.note(error)
            raise

    async def flush(self) -> None:
        """Return when everything acknowledged before this call is durable.

        Raises:
            LeafFull, LeafError, LeafFailed: it is not.
        """
        if self.read_only:
            return
        try:
            await self._image.commit(durable=True)
        except LeafError as error:
            self.note(error)
            raise

    async def grow(self, size: int, *, at_least: bool = False) -> None:
        """Grow the disk to `size` bytes (with `at_least`: unless it is that large already); new space reads as zeros.

        Raises:
            UsageError: not a multiple of 512, smaller than now, or more than the tables can address.
            ReadOnly, Held, LeafFull, LeafError, LeafFailed: as `write`.
        """
        if size == self.size or (at_least and size < self.size):
            return
        if size < self.size:
            raise UsageError(self.name, f"a disk of {self.size} bytes cannot shrink to {size}")
        if size % SECTOR or size > self._image.geometry.max_image_size:
            most = self._image.geometry.max_image_size
            raise UsageError(self.name, f"{size} bytes is not a multiple of {SECTOR} up to {most}")
        self._check_writable()
        await growth.grow(self._image, self._claims, self._writes, self._backing, size)

    def _check_writable(self) -> None:
        if self.read_only:
            raise ReadOnly(self.name, "is served read-only")
        if self.held:
            raise Held(self.name, "is held for a migration")
        self._image.committer.check()

    # -- copying -------------------------------------------------------------------------------------------------------

    @property
    def copying(self) -> bool:
        """Whether what is read from the backing goes into the leaf."""
        return (
            self.mode is not Mode.COW
            and not (self.read_only or self.held or self._copies.resting)
            and self._image.committer.failed is None
        )

    def prefetch(self, pos: int, length: int) -> None:
        """Fetch the range into the leaf, in the background. Queues and returns.

        Raises:
            ReadOnly, Held: nothing may be copied into it.
        """
        self._check_writable()
        if self._backing is not None and pos < self.size and length > 0:
            self._nursery.start_soon(self._prefetch, pos, min(length, self.size - pos))

    async def _prefetch(self, pos: int, length: int) -> None:
        end = pos + length
        slots = trio.Semaphore(PREFETCHES)
        async with trio.open_nursery() as nursery:
            while pos < end:
                await slots.acquire()
                stop = min(end, (pos // MAX_FETCH + 1) * MAX_FETCH)
                nursery.start_soon(self._prefetch_piece, pos, stop, slots)
                pos = stop

    async def _prefetch_piece(self, pos: int, end: int, slots: trio.Semaphore) -> None:
        try:
            async with aclosing(self._image.runs(pos, end - pos)) as runs:
                async for run in runs:
                    if run.state is State.BACKING:
                        await self._populate(run)
        except QedfsError as error:
            self.note(error)
        finally:
            slots.release()

    async def _populate(self, run: Run) -> None:
        """Bring the clusters of a run that is not local into the leaf: promised zeros without fetching them."""
        assert self._backing is not None
        assert self._fetches is not None
        first, end = self._clusters_of(run)
        pos, stop = first << self._shift, min(end << self._shift, self.size)
        for extent in await self._backing.extents(pos, stop - pos):
            if extent.zero:
                # The promise counts for whole clusters only; the disk's end makes its last one whole.
                zero_first = (pos + self.cluster_size - 1) >> self._shift
                zero_end = end if pos + extent.length >= self.size else (pos + extent.length) >> self._shift
                if zero_first < zero_end:
                    await self._copies.link_promised(zero_first, zero_end)
            pos += extent.length
        async with aclosing(self._image.runs(first << self._shift, stop - (first << self._shift))) as runs:
            async for missing in runs:
                if missing.state is not State.BACKING:
                    continue
                if self.cluster_size > MAX_FETCH:
                    await self._copies.copy_large(missing.pos >> self._shift, self._backing)
                    continue
                fetches = self._fetches.join(*self._clusters_of(missing), self.size, copy=True, wanted=True)
                await self._fetches.wait(fetches)

    def _clusters_of(self, run: Run) -> tuple[int, int]:
        return run.pos >> self._shift, (run.pos + run.length + self.cluster_size - 1) >> self._shift

    # -- telling -------------------------------------------------------------------------------------------------------

    async def set_mode(self, mode: Mode) -> None:
        """Change what happens to clusters that are not in the leaf, and remember it there if there is room."""
        self.mode = mode
        if not self.read_only and self._image.record.mode != mode.value:
            await self._image.set_record(replace(self._image.record, mode=mode.value))

    async def counts(self) -> Counts:
        """Return the counts of data and zero clusters, once all tables have been seen."""
        return await self._image.counts()

    def allocated_bytes_nowait(self) -> int:
        """Return how many bytes of data clusters the leaf holds, 0 while its tables have not all been seen."""
        counts = self._image.counts_nowait()
        return counts.data << self._shift if counts else 0

    async def density(self, parts: int = 256) -> list[float]:
        """Return for each of `parts` equal parts of the disk how many percent of it need no backing."""
        if self._backing is None:
            return [100.0] * parts
        bounds = [part * self.size // parts for part in range(parts + 1)]
        below = await self._image.local_below(bounds)
        return [
            100.0 * (below[i + 1] - below[i]) / (bounds[i + 1] - bounds[i]) if bounds[i + 1] > bounds[i] else 100.0
            for i in range(parts)
        ]

    def note(self, error: QedfsError) -> None:
        """Show `error` as the newest one, and say it in the log if it is news."""
        self._error, self._error_time = error, time.time()
        # Once, however many requests meet it: a damaged table may have a different error for each of its clusters.
        logged, at = self._logged.get(type(error), ("", -LOG_PAUSE))
        if str(error) != logged and trio.current_time() - at >= LOG_PAUSE:
            self._logged[type(error)] = (str(error), trio.current_time())
            log.warning("%s", error)

    def statistics(self) -> DiskStatistics:
        """Return how the disk is now."""
        backing = self._backing.statistics() if self._backing else None
        return DiskStatistics(
            virtual_size=self.size,
            cluster_size=self.cluster_size,
            clusters_total=self._image.geometry.clusters(self.size),
            counts=self._image.counts_nowait(),
            mode=self.mode,
            state=self._state(backing.state if backing else BackingState.IDLE),
            backing=self._backing.name if self._backing else "",
            backing_format=self._backing.format if self._backing else "",
            backing_bytes_read=backing.bytes_read if backing else 0,
            last_error=self._last_error(backing),
        )

    def _last_error(self, backing: BackingStatistics | None) -> str:
        candidates = [
            (self._error_time, str(self._error or "")),
            (self._copies.error_time, str(self._copies.error or "")),
            (self._image.survey_time, self._image.survey_problem),
        ]
        if backing is not None:
            candidates.append((backing.last_error_time or 0.0, backing.last_error))
        at, text = max((c for c in candidates if c[1]), default=(0.0, ""))
        return f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(at))} {text}" if text else ""

    def _state(self, backing: BackingState) -> str:
        if self._image.committer.failed is not None:
            return "failed"
        if self.held:
            return "held"
        if backing in (BackingState.UNAVAILABLE, BackingState.REFUSED):
            return "backing-error"
        return "no-space" if self._copies.full else "passive"

    # -- background ----------------------------------------------------------------------------------------------------

    async def _commit_by_age(self) -> None:
        while True:
            await self._image.wait_changed()
            with trio.move_on_after(COMMIT_AGE):
                await self._image.wait_urgent()
            try:
                await self._image.commit(durable=False)
            except LeafError as error:
                self.note(error)
                if self._image.committer.failed is not None:
                    return
                await trio.sleep(RETRY_COMMIT)

    async def _survey(self) -> None:
        try:
            await self._image.survey()
        except LeafError as error:
            self.note(error)

    async def _run(self, task_status: trio.TaskStatus[Disk]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._survey)
            if not self.read_only:
                nursery.start_soon(self._commit_by_age)
                if self._backing is not None:
                    nursery.start_soon(self._copies.watch_room)
            task_status.started(self)


@asynccontextmanager
async def open_disk(image: Image, backing: Backing | None, options: DiskOptions) -> AsyncIterator[Disk]:
    """Serve `image` over `backing` (None: the image stands alone) while inside.

    At the end fetches are dropped and copies under way end. The caller then closes the image, which makes everything
    durable, and after it the backing.
    """
    async with trio.open_nursery() as nursery:
        disk = Disk(image, backing, options, nursery)
        await nursery.start(disk._run)
        try:
            yield disk
        finally:
            nursery.cancel_scope.cancel()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return one error for a request of several pieces: a failure before a cancellation that it caused."""
    errors = [_first(e) if isinstance(e, BaseExceptionGroup) else e for e in group.exceptions]
    return next((e for e in errors if not isinstance(e, trio.Cancelled)), errors[0])
