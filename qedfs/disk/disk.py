"""One virtual disk: what an image and its backing are together.

Reads answer from the leaf, from zeros or from the backing; copies go into the leaf behind the answer. Writes allocate
under a claim. docs/concurrency.md says who may wait for whom, and why nothing is lost.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import trio

from qedfs.backing.base import Identity
from qedfs.backing.resilient import Backing, BackingState, BackingStatistics
from qedfs.config import DiskOptions, Mode, parse_choice
from qedfs.disk import completion, growth
from qedfs.disk.claims import Claims
from qedfs.disk.copies import Copies
from qedfs.disk.fetches import MAX_FETCH, Fetches
from qedfs.disk.hold import DropPages, release
from qedfs.disk.misses import Misses
from qedfs.disk.populate import Populate
from qedfs.disk.reads import Reads
from qedfs.disk.telling import DiskStatistics, Errors, timed_out
from qedfs.disk.upkeep import commit_by_age
from qedfs.disk.writes import Writes
from qedfs.errors import BackingUnavailable, Held, LeafError, QedfsError, ReadOnly, UsageError
from qedfs.image.geometry import SECTOR
from qedfs.image.image import Image
from qedfs.image.tables import Counts, State

log = logging.getLogger(__name__)

_SCRATCH = memoryview(mmap.mmap(-1, MAX_FETCH))
"""Where `read_nowait` puts its bytes: one for the process, since it is used up before the next await. It begins at a page:
a bytearray begins 16 or 32 bytes into one, and then the processor takes each load of the copy from the page cache for
dependent on the store before it (their addresses agree in the low 12 bits): 3.7 µs for 4 KiB instead of 2.1."""


class Disk:
    """A virtual disk. Made by `open_disk`; positions and lengths are in bytes."""

    def __init__(self, image: Image, backing: Backing | None, options: DiskOptions, nursery: trio.Nursery) -> None:
        self.name = image.name
        self.cluster_size = image.geometry.cluster_size
        self.read_only = not image.storage.writable
        stored = image.record.mode
        self.mode = options.mode or (parse_choice(Mode, stored, f"{image.name}: stored mode") if stored else Mode.COR)
        self.held = image.record.hold
        """Held for a migration: reads pass through, nothing is kept, writes are refused."""
        self._releasing = trio.Lock()
        self.host = backing.host if backing else None
        """The machine that has the backing, if it is reached over a network."""
        self._image = image
        self._backing = backing
        self._options = options
        self._nursery = nursery
        self._shift = self.cluster_size.bit_length() - 1
        self._claims = Claims()
        self._copies = Copies(image, self._claims, options.reserve)
        self._fetches = Fetches(backing, self.cluster_size, nursery, self._copies.copy) if backing else None
        self._populate = Populate(image, backing, self._fetches, self._copies) if backing and self._fetches else None
        self.misses = Misses(trio.current_time)
        self._writes = Writes(image, self._claims, self.misses, backing, self._fetches, options.write_timeout)
        self._retired: Backing | None = None
        """The backing of the time before the image stood alone, for what was read from it."""
        self._news = trio.Event()
        self._reads = Reads(image, self._copies, self.misses, options, nursery, backing, self._fetches)
        self._errors = Errors(log)
        self.note = self._errors.note
        """Show an error as the newest one, and say it in the log if it is news."""

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
            return await self._reads.read(pos, length, lambda: self.copying)
        except QedfsError as error:
            self.note(error)
            raise

    async def lacking(self, pos: int, length: int) -> int:
        """Return for how many bytes of the range, inside the disk, the backing would have to be asked now.

        What is on its way already is not among them, though the tables know it only when it has been copied.

        Raises:
            CorruptEntry, LeafError: the image cannot say.
        """
        lacking, end = 0, pos + length
        while pos < end:
            run = await self._image.run(pos, end - pos)
            pos += run.length
            if run.state is State.BACKING and self._fetches is not None:
                lacking += self._fetches.not_under_way(run.pos, pos)
        return lacking

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
            BackingUnavailable: it did not come for `write_timeout`.
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
        try:
            await growth.grow(self._image, self._claims, self._writes, lambda: self._backing, size)
        except QedfsError as error:
            self.note(error)
            raise

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
        if self._populate is not None and pos < self.size and length > 0:
            self._nursery.start_soon(self._prefetch, self._populate, pos, min(length, self.size - pos))

    async def _prefetch(self, populate: Populate, pos: int, length: int) -> None:
        try:
            await populate.prefetch(pos >> self._shift, self._image.geometry.clusters(pos + length))
        except QedfsError as error:
            if self._populate is not None:  # else the image stands alone meanwhile, and the backing is closed
                self.note(error)

    # -- streaming -----------------------------------------------------------------------------------------------------

    @property
    def populate(self) -> Populate | None:
        """How what is missing comes; None once the image stands alone."""
        return self._populate

    @property
    def may_copy(self) -> bool:
        """Whether the leaf may be written without its guest asking for it."""
        return not (self.read_only or self.held) and self._image.committer.failed is None

    @property
    def resting(self) -> bool:
        """Whether copies pause because the leaf did not take the last one."""
        return self._copies.resting

    @property
    def refused(self) -> bool:
        """Whether the backing failed for good."""
        return self._backing is not None and self._backing.refused

    async def backing_identity(self) -> Identity | None:
        """Return what the content of the backing is, once it answers; None if the image stands alone.

        Raises:
            BackingError: it cannot be told.
        """
        return await self._backing.identity() if self._backing is not None else None

    @property
    def flushed_at(self) -> float:
        """When the newest flush of the leaf that has ended well began, by trio's clock."""
        return self._image.committer.flushed_at

    @property
    def asked(self) -> int:
        """Bytes asked of the backing since the mount."""
        backing = self._backing or self._retired
        return backing.statistics().bytes_read if backing is not None else 0

    def _asked_twice(self) -> int:
        backing = self._backing or self._retired
        return backing.statistics().asked_twice if backing is not None else 0

    def copied(self) -> int:
        """Bytes of the disk that have been copied from the backing since the mount, for the guest or otherwise."""
        return self._copies.copied << self._shift

    def remaining(self) -> int | None:
        """Bytes of the disk that are not local; None until all tables were seen."""
        counts = self._image.counts_nowait()
        if counts is None or self._populate is None:
            return None if counts is None else 0
        missing = self._image.geometry.clusters(self.size) - counts.data - counts.zero - self._populate.promised()
        return max(0, missing) << self._shift

    @property
    def news(self) -> trio.Event:
        """Set when the mode has changed, or the image is not held any more, or it stands alone; each is told once."""
        return self._news

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def stream(self, pos: int) -> int:
        """Make the cluster at `pos` local if it is not; return how many bytes from `pos` on need no backing, without a gap.

        0 at or past the end of the disk. The primitive of streaming: a loop that adds the answer to `pos` brings all.

        Raises:
            ReadOnly, Held: nothing may be copied into the leaf.
            LeafError, LeafFull, LeafFailed: the leaf does not take it.
            BackingUnavailable: the backing did not answer for `backing_timeout`.
            BackingRefused, CorruptEntry: it cannot be had.
        """
        self._check_writable()
        if pos >= self.size:
            return 0
        cluster = pos >> self._shift
        try:
            with trio.move_on_after(self._options.backing_timeout or float("inf")) as patience:
                while self._populate is not None and (await self._image.run(pos, 1)).state is State.BACKING:
                    if self._copies.resting:
                        raise self._copies.error or LeafError(self.name, "takes no copies now")
                    try:
                        await self._populate.populate(cluster, cluster + 1)
                    except BackingUnavailable:
                        if self._image.backing_name:
                            raise
                        break  # it stands alone meanwhile, and the backing is closed
                    # A claim may have kept the copy out: then its writer makes the cluster local.
                    async with self._claims.hold(cluster, cluster + 1):
                        pass
            if patience.cancelled_caught:
                raise timed_out(self._backing, self._options.backing_timeout)
            return self.size - pos if self._populate is None else await self._populate.local_bytes(pos)
        except QedfsError as error:
            self.note(error)
            raise

    async def complete(self) -> bool:
        """Let the image stand alone, durably, if nothing is missing; False, and nothing changes, if something is.

        docs/concurrency.md, "Completion".

        Raises:
            ReadOnly, Held, LeafError, LeafFull, LeafFailed: the leaf may not or cannot be written.
            CorruptEntry: some of its entries are invalid, and the backing is all that is left of their clusters.
            BackingRefused: what is missing cannot be told.
        """
        self._check_writable()
        populate, backing, fetches = self._populate, self._backing, self._fetches
        if populate is None or backing is None or fetches is None:
            return True
        if not await completion.complete(self._image, self._claims, populate):
            return False
        # No await since the header was written: nobody is sent to the backing any more.
        self._retired = backing
        self._backing = self._fetches = self._populate = None
        self._reads.stand_alone()
        self._writes.stand_alone()
        log.info("%s: complete, stands alone", self.name)
        self._tell()
        # Ordering: those that still wait for the copy budget are no requests to the backing yet.
        await fetches.ended()
        await backing.retire()
        return True

    # -- telling -------------------------------------------------------------------------------------------------------

    async def set_mode(self, mode: Mode) -> None:
        """Change what happens to clusters that are not in the leaf, and remember it there if there is room."""
        self.mode = mode
        self._tell()
        if not self.read_only:
            # Not `mode`, and not asked before: another change may be on its way there.
            await self._image.change_record(lambda record: replace(record, mode=self.mode.value))

    async def release_hold(self, drop_pages: DropPages) -> None:
        """End the hold: from now on this is a disk like others. Does nothing if it is not held; after an error it still is.

        A read that began before may return what the backing was; no read that begins after the return does.

        Raises:
            ReadOnly: the leaf cannot be written.
            BackingError, ImageError, LeafError: see `hold.release`.
        """
        async with self._releasing:
            if not self.held:
                return
            if self.read_only:
                raise ReadOnly(self.name, "is served read-only")
            self._image.committer.check()
            try:
                await release(self._image, self._backing, drop_pages)
            except QedfsError as error:
                self.note(error)
                raise
            self.held = False
            self._tell()

    async def counts(self) -> Counts:
        """Return the counts of data and zero clusters, once all tables have been seen.

        Zero are those that are promised to be, and all that an image that stands alone does not have.
        """
        counts = await self._image.counts()
        if self._populate is not None:
            return Counts(counts.data, counts.zero + self._populate.promised())
        return Counts(counts.data, self._image.geometry.clusters(self.size) - counts.data)

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
            backing_state=backing.state.value if backing else "",
            backing_bytes_read=self.asked,
            backing_asked_twice=self._asked_twice(),
            last_error=self._last_error(backing),
            copied_bytes=self.copied(),
            misses=self.misses.count,
            missed_seconds=self.misses.waited,
            waiting=self.misses.waiting,
            errors=self._errors.count,
        )

    def _last_error(self, backing: BackingStatistics | None) -> str:
        others = [
            (self._copies.error_time, str(self._copies.error or "")),
            (self._image.survey_time, self._image.survey_problem),
        ]
        if backing is not None:
            others.append((backing.last_error_time or 0.0, backing.last_error))
        return self._errors.newest(others)

    def _state(self, backing: BackingState) -> str:
        if self._image.committer.failed is not None:
            return "failed"
        if self.held:
            return "held"
        if not self._image.backing_name:
            return "complete"
        if backing in (BackingState.UNAVAILABLE, BackingState.REFUSED):
            return "backing-error"
        return "no-space" if self._copies.full else "passive"

    # -- background ----------------------------------------------------------------------------------------------------

    async def _survey(self) -> None:
        try:
            await self._image.survey()
        except LeafError as error:
            self.note(error)

    async def _run(self, task_status: trio.TaskStatus[Disk]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._survey)
            if not self.read_only:
                nursery.start_soon(commit_by_age, self._image, self.note)
                if self._backing is not None:
                    nursery.start_soon(self._copies.watch_room)
            if self._backing is not None:
                nursery.start_soon(self._backing.watch)
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
