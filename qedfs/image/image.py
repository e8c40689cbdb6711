"""One open QED image: look up, allocate, link, commit.

An entry is linked in memory when its cluster is whole in the file; `commit.py` brings it to the disk. Whoever allocates
holds the clusters' claim (disk/claims.py) and pins their tables first, so that looking up again and linking stand
without an await between them.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import trio

from qedfs.errors import CorruptEntry, LeafError, QedfsError
from qedfs.image import header as headers
from qedfs.image import record as records
from qedfs.image.allocator import Extent
from qedfs.image.cache import Table
from qedfs.image.commit import Committer
from qedfs.image.geometry import MAX_IMAGE_SIZE, SECTOR
from qedfs.image.header import Feature, Header
from qedfs.image.lookup import Lookup
from qedfs.image.record import Damage, Record
from qedfs.image.storage import Storage
from qedfs.image.stored import StoredTables, read_l1
from qedfs.image.survey import Survey
from qedfs.image.tables import (
    ZERO,
    Counts,
    as_array,
    as_entries,
    count,
)

MAX_DIRTY_BYTES = 16 << 20
"""Of tables with entries that the disk does not have: more, and a commit is due, however young they are."""
MAX_UNCOMMITTED_BYTES = 64 << 20
"""Of new clusters that no entry on the disk names: the same."""


class Image(Lookup):
    """An open image. Made by `open_image`."""

    def __init__(
        self, storage: Storage, header: Header, record: Record | Damage, backing_name: str, l1: memoryview
    ) -> None:
        super().__init__(storage, header, l1)
        self.record = record if isinstance(record, Record) else Record()
        self.record_damaged = record is Damage.BROKEN
        self.backing_name = backing_name
        """As stored in the header; empty when the image stands alone."""
        self.committer = Committer(storage, self.tables, self._l1, header.l1_table_offset)
        self._header_lock = trio.Lock()
        self._begun = False
        self._begin_lock = trio.Lock()
        self._uncommitted = 0
        self._dirtied = 0
        self._changed = trio.Event()
        self._urgent = trio.Event()
        self._survey_lock = trio.Lock()
        self._surveyed = trio.Event()
        self._counts = Counts()
        self._trusted = False
        """The survey met nothing wrong: what no entry names belongs to nobody."""
        self._overlapping: frozenset[int] = frozenset()
        """Places in L1 of tables that share clusters: as objects of their own they would overwrite each other's links."""
        self.survey_problem = ""
        """What the survey met that speaks against the image, for `last_error`; empty if nothing."""
        self.survey_time = 0.0
        """When it met that, in seconds since the epoch."""

    # -- allocating and linking ----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def pinned(self, first: int, end: int) -> AsyncIterator[None]:
        """Hold the tables of the clusters `[first, end)` in memory, making those that are missing.

        The caller holds the claim of these clusters. Inside, look-ups of them need no await, and they may be linked.

        Raises:
            CorruptEntry, LeafError, LeafFull, LeafFailed: a table cannot be had; nothing is pinned then.
        """
        await self.begin_allocating()
        held: list[Table] = []
        try:
            for index in range(first >> self._table_shift, ((end - 1) >> self._table_shift) + 1):
                if index in self._overlapping:
                    raise CorruptEntry(self.name, f"the table of L1 table entry {index} lies over another one")
                table = await self._load(index) or await self.tables.load(index, self._make_table)
                assert table is not None
                table.pins += 1
                held.append(table)
            yield
        finally:
            for table in held:
                table.pins -= 1

    def allocate(self, clusters: int) -> Extent:
        """Take `clusters` neighbouring clusters of the file. Only between `pinned` and the end of the claim.

        Raises:
            CorruptEntry: dangling entries leave no room in any file.
        """
        extent = self.allocator.allocate(clusters << self._shift)
        if extent.offset + extent.length > MAX_IMAGE_SIZE:
            raise CorruptEntry(
                self.name, "damaged table entries name places up to the end of any file; nothing is allocated"
            )
        return extent

    def link_data(self, first: int, clusters: int, offset: int) -> None:
        """Let the clusters from `first` on be those at `offset` (bytes). They are whole in the file and pinned here."""
        self._uncommitted += clusters << self._shift
        self._link(first, clusters, offset, self._mask + 1)

    def link_zero(self, first: int, clusters: int) -> None:
        """Let the clusters from `first` on read as zeros. Pinned as for `link_data`."""
        self._link(first, clusters, ZERO, 0)

    @property
    def pending(self) -> bool:
        """Whether memory has entries that the disk does not have."""
        return not self.committer.clean

    async def wait_changed(self) -> None:
        """Return when an entry has been linked since the last commit began."""
        await self._changed.wait()

    async def wait_urgent(self) -> None:
        """Return when so much waits for a commit that one should start at once."""
        await self._urgent.wait()

    @property
    def urgent(self) -> bool:
        """Whether so much waits for a commit that whoever links more should wait for one."""
        return self._urgent.is_set()

    async def commit(self, *, durable: bool) -> None:
        """Bring what is linked to the disk (`Committer.commit`)."""
        self._uncommitted = self._dirtied = 0
        # An event that is not set stays: somebody may be waiting for it.
        if self._changed.is_set():
            self._changed = trio.Event()
        if self._urgent.is_set():
            self._urgent = trio.Event()
        try:
            await self.committer.commit(durable=durable)
        except LeafError:
            self._changed.set()  # what was not written is still to be written
            raise

    async def begin_allocating(self) -> None:
        """Make the image ready for the first allocation of this mount: surveyed, and marked as being written.

        Raises:
            LeafError, LeafFull, LeafFailed: it cannot be marked; the next call tries again.
        """
        if not self._begun:
            await self._begin()

    async def _begin(self) -> None:
        async with self._begin_lock:
            if self._begun:
                return
            await self.survey()
            # Ordering: NEED_CHECK is durable before anything that could leak or dangle.
            await self._change_header(lambda header: header.with_features(add=Feature.NEED_CHECK))
            self._begun = True

    # -- the survey ----------------------------------------------------------------------------------------------------

    async def survey(self) -> None:
        """Look at every table once: count, find what is free, and find what an allocation must keep away from.

        Runs beside reads and writes in place; the first allocation of a mount waits for it. Where the last writer left
        NEED_CHECK set, entries that name nothing valid are set to unallocated, as QEMU does: its crashes leave such
        entries behind. Otherwise they stay, and the offsets they name are never given out, or an old entry would name a
        new cluster. Returns at once when it has been done; a table that cannot be read is left out and noted in
        `survey_problem`.
        """
        async with self._survey_lock:
            if not self._surveyed.is_set():
                await self._survey()
                self._surveyed.set()

    async def _survey(self) -> None:
        repairing = self.header.needs_check and self.storage.writable
        survey = Survey(self.geometry, self.header.room, self.allocator.end)
        survey.see_l1(self.header.l1_table_offset, as_array(self._l1))
        stored = self.stored()
        if stored.invalid.size:
            self._speaks_against(f"{self.name}: {stored.invalid_text(int(stored.invalid[0]))}")
        for index in await stored.once():
            await self._survey_table(index, stored, survey, repairing)
        self._counts = survey.counts
        if survey.invalid:
            self._speaks_against(f"{self.name}: {survey.invalid} table entries are invalid; 'qedfs check' says more")
        if not self.storage.writable:
            return
        self._trusted, self._overlapping = survey.trusted, stored.overlapping()
        if repairing and self.pending:
            # Ordering: repairs are durable before anything is allocated, cut or given out again.
            await self.commit(durable=True)
        for offset, length in survey.free():
            self.allocator.release(offset, length)
        self.allocator.forbid(survey.dangling())

    async def _survey_table(self, index: int, stored: StoredTables, survey: Survey, repairing: bool) -> None:
        inside = self.geometry.clusters(self.header.image_size) - (index << self._table_shift)
        try:
            async with aclosing(stored.pieces(index)) as found:
                async for first, entries in found:
                    invalid = survey.see_entries(entries, inside - first, repairing=repairing)
                    if repairing and invalid.size:
                        await self._drop(index, invalid + first)
        except QedfsError as error:
            survey.trusted = False
            self._speaks_against(str(error))

    async def _drop(self, index: int, places: npt.NDArray[np.intp]) -> None:
        """Set the entries at `places` of a table to unallocated."""
        table = await self._load(index)
        assert table is not None
        table.clear(places)
        table.valid = self._sound(table.entries)
        self._dirtied += 1
        if self._dirtied * self.geometry.table_bytes > MAX_DIRTY_BYTES:
            await self.commit(durable=True)

    def _speaks_against(self, problem: str) -> None:
        self.survey_problem, self.survey_time = problem, time.time()

    async def counts(self) -> Counts:
        """Return how many clusters are data and how many are zero, once all tables have been seen."""
        await self.survey()
        return self._counts

    def counts_nowait(self) -> Counts | None:
        """Return the same, or None while it is not known."""
        return self._counts if self._surveyed.is_set() else None

    # -- the header ----------------------------------------------------------------------------------------------------

    async def change_record(self, change: Callable[[Record], Record]) -> bool:
        """Store durably what `change` makes of the record; False, and nothing changed, where there is no room for it."""
        async with self._header_lock:
            # As for the header: no other change is undone, and a caller that is cancelled carries it to its end.
            with trio.CancelScope(shield=True):
                record = change(self.record)
                if record == self.record:
                    return True
                sector = records.encode(record)
                if sector is None or not records.fits(self.header):
                    return False
                await self.storage.write(records.offset(self.header), sector)
                await self.committer.flush()
                self.record = record
        return True

    async def set_image_size(self, size: int, exposed: Counts) -> None:
        """Store a larger size (bytes) durably. What it exposes, `exposed` by count, is zeros already, and durably so."""
        await self._change_header(lambda header: replace(header, image_size=size))
        self._add(exposed)

    async def drop_backing(self) -> None:
        """Let the image stand alone, durably. Every cluster is local, and committed durably."""
        await self._change_header(Header.without_backing)
        self.backing_name = ""

    async def clear_autoclear(self) -> None:
        """Clear the autoclear bits we do not know, as every writer must before it uses the image."""
        if self.header.autoclear_features:
            await self._change_header(lambda header: replace(header, autoclear_features=0))

    async def _change_header(self, change: Callable[[Header], Header]) -> None:
        async with self._header_lock:
            # The lock is held from reading the header to writing it, so that no other change is undone. A caller that is
            # cancelled carries it to its end, or memory would not know what the disk has.
            with trio.CancelScope(shield=True):
                header = change(self.header)
                await self.storage.write(0, header.encode())
                await self.committer.flush()
                self.header = header

    async def aclose(self) -> None:
        """Commit durably, cut what is free at the end, clear NEED_CHECK, and close the file.

        The file is closed and its locks are gone even when this raises; NEED_CHECK then stays set.

        Raises:
            LeafError, LeafFull, LeafFailed: what was acknowledged since the last flush may not be durable.
        """
        with trio.CancelScope(shield=True):
            try:
                if self.storage.writable:
                    await self._finish()
            finally:
                await self.storage.aclose()

    async def _finish(self) -> None:
        await self.commit(durable=True)
        # Left dirty by an earlier writer and looked through since, without a need to allocate: that is mended, too.
        if not (self._begun or (self.header.needs_check and self._trusted)):
            return
        # No entry on the disk names what is cut or punched: it was found free, or taken and never linked. What is left of a
        # cluster that the end of a damaged file cuts through stays.
        if self._trusted and self.storage.length() > self.allocator.end:
            await self.storage.truncate(self.allocator.end)
        for offset, length in self.allocator.free_extents:
            await self.storage.punch(offset, length)
        await self._change_header(lambda header: header.with_features(remove=Feature.NEED_CHECK))

    # -- in memory --------------------------------------------------------------------------------------------------------

    async def _make_table(self, index: int) -> Table:
        extent = self.allocate(self.geometry.table_clusters)
        zeros = bytearray(self.geometry.table_bytes)
        # The room is taken now, so that a full disk fails the guest's write and not its fsync. A write that fails
        # leaves the extent leaked: what of it reached the disk is in doubt.
        await self.storage.write(extent.offset, zeros)
        self._dirtied += 1
        return Table(index, extent.offset, as_entries(zeros), valid=True, named=False)

    def _link(self, first: int, clusters: int, offset: int, step: int) -> None:
        inside = self.geometry.clusters(self.header.image_size)
        for table, index, n in self._pieces(first, clusters):
            self._dirtied += not table.dirty
            counted = max(0, min(n, inside - (table.index << self._table_shift) - index))
            before = count(table.entries[index : index + counted])
            table.set(index, n, offset, step)
            after = count(table.entries[index : index + counted])
            self._add(Counts(after.data - before.data, after.zero - before.zero))
            offset += n * step
        self._changed.set()
        if self._uncommitted > MAX_UNCOMMITTED_BYTES or self._dirtied * self.geometry.table_bytes > MAX_DIRTY_BYTES:
            self._urgent.set()

    def _pieces(self, first: int, clusters: int) -> Iterator[tuple[Table, int, int]]:
        while clusters:
            table = self.tables.get(first >> self._table_shift)
            assert table is not None, "a cluster is linked without its table being pinned"
            index = first & self._table_mask
            n = min(clusters, self._table_mask + 1 - index)
            yield table, index, n
            first += n
            clusters -= n

    def _add(self, counts: Counts) -> None:
        self._counts = Counts(self._counts.data + counts.data, self._counts.zero + counts.zero)


async def open_image(storage: Storage) -> Image:
    """Read and judge the header, the backing name, the record and L1 of `storage`, which the image then owns.

    Raises:
        InvalidImage: it is not a QED image, or one that cannot be.
        LeafError: it cannot be read, or (writable) its autoclear bits cannot be cleared.
    """
    name = storage.name
    length = storage.length()
    header = headers.decode(bytes(await storage.read(0, min(length, headers.SIZE))), length, name)
    backing_name = ""
    if header.has_backing:
        raw = await storage.read(header.backing_name_offset, header.backing_name_size)
        backing_name = headers.decode_backing_name(bytes(raw))
    record: Record | Damage = Damage.ABSENT
    if records.fits(header):
        record = records.decode(bytes(await storage.read(records.offset(header), SECTOR)))
    l1 = await read_l1(storage, header)
    image = Image(storage, header, record, backing_name, l1)
    if storage.writable:
        await image.clear_autoclear()
    return image
