"""The ordered write-back of metadata: how entries linked in memory reach the disk.

An entry is linked in memory once its whole cluster has been written with `pwrite`. On the disk it follows in groups:

1. copy the dirty sectors of the L2 tables (a snapshot; the marks are cleared);
2. flush: all data that the snapshot names is durable;
3. write the copied sectors;
4. only if there are tables that the disk does not name yet: flush, then write their L1 entries;
5. only if somebody asked for durability: flush.

So at every instant the file is a valid image in which every entry names complete data. A crash loses copies, which are
read again from the backing, and guest writes that no flush covered; it leaks at most the clusters not linked yet.
The live tables are never written in step 3: an entry linked after the snapshot may name data that is not durable.

Scenarios, and why each step is needed, are in docs/concurrency.md and docs/durability.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import trio

from qedfs.errors import LeafError, LeafFailed, QedfsError
from qedfs.image.cache import Table, TableCache
from qedfs.image.geometry import SECTOR
from qedfs.image.storage import Storage


class _Taken(NamedTuple):
    """What a snapshot took of one table: runs of neighbouring sectors as `(file offset, bytes)`, and their numbers."""

    table: Table
    sectors: frozenset[int]
    pieces: list[tuple[int, bytes]]
    name_it: bool


@dataclass
class _Batch:
    """Callers that share one commit."""

    durable: bool
    ended: trio.Event = field(default_factory=trio.Event)
    error: QedfsError | None = None


class Committer:
    """Commits the dirty tables of one image. One commit runs at a time; callers that come during it share the next.

    `l1` holds the L1 entries as they are on the disk: an entry enters it when it is about to be written.
    """

    def __init__(self, storage: Storage, tables: TableCache, l1: memoryview, l1_offset: int) -> None:
        self._storage = storage
        self._tables = tables
        self._l1 = l1
        self._l1_offset = l1_offset
        self._queued: _Batch | None = None
        self._running: _Batch | None = None
        self.failed: LeafFailed | None = None
        """Set once a flush has failed, for good: the kernel may have dropped the pages, so a second flush that succeeds
        would prove nothing."""
        self.flushed_at = -float("inf")
        """When the newest flush that has ended well began, by trio's clock: what was written before is on the disk."""

    @property
    def clean(self) -> bool:
        """Whether the disk has every entry that memory has."""
        return self._running is None and not any(t.dirty or not t.named for t in self._tables)

    async def commit(self, *, durable: bool) -> None:
        """Return when every entry linked before this call is written, and with `durable` is there after a power cut.

        A commit that already runs took its snapshot too early for this caller: it waits for one that starts after it
        came. Asking for durability raises a commit that is queued without it.

        Raises:
            LeafFull, LeafError: a write failed. Nothing is lost; the next commit tries again.
            LeafFailed: a flush failed, now or earlier.
        """
        batch = self._queued
        if batch is not None:
            batch.durable |= durable
            await batch.ended.wait()
        else:
            batch = self._queued = _Batch(durable)
            # Others wait for this batch: a caller that is cancelled carries it to its end all the same.
            with trio.CancelScope(shield=True):
                while self._running is not None:
                    await self._running.ended.wait()
                await self._lead(batch)
        if batch.error is not None:
            raise type(batch.error)(batch.error.what, batch.error.why) from batch.error

    async def flush(self) -> None:
        """Flush the file, or latch the failure.

        Raises:
            LeafFailed: this flush or an earlier one failed.
        """
        self.check()
        began = trio.current_time()
        try:
            await self._storage.flush()
        except LeafError as error:
            self.failed = LeafFailed(
                error.what, f"{error.why}; what was not flushed before may be lost, so no more is written"
            )
            raise self.failed from error
        # Another one may have failed meanwhile: the kernel tells an error once, and it may have been about our pages.
        self.check()
        self.flushed_at = began

    def check(self) -> None:
        """Raise `LeafFailed` if a flush has ever failed."""
        if self.failed is not None:
            raise LeafFailed(self.failed.what, self.failed.why)

    async def _lead(self, batch: _Batch) -> None:
        # INVARIANT: no await between the end of one batch and the start of the next, so only one leader gets here.
        self._queued, self._running = None, batch
        try:
            await self._run(batch)
        except QedfsError as error:
            batch.error = error
        except BaseException as error:
            # A defect, raised here; those who share the batch must not take it for written.
            batch.error = LeafError(self._storage.name, f"the commit was cut short by a defect ({error!r})")
            raise
        finally:
            self._running = None
            batch.ended.set()

    async def _run(self, batch: _Batch) -> None:
        self.check()
        snapshot = [self._take(table) for table in self._tables if table.dirty or not table.named]
        try:
            if snapshot:
                # Ordering: data before the entries that name it.
                await self.flush()
                await self._write_tables(snapshot)
            # Ordering: entries, then durability for whoever asked before they were written. `batch.durable` cannot
            # change any more: a batch that runs takes no callers.
            if batch.durable:
                await self.flush()
        except BaseException:
            for taken in snapshot:
                taken.table.dirty |= taken.sectors
            raise
        finally:
            for taken in snapshot:
                taken.table.pins -= 1
        for taken in snapshot:
            if taken.name_it:
                taken.table.named = True

    def _take(self, table: Table) -> _Taken:
        sectors = sorted(table.dirty)
        pieces: list[tuple[int, bytes]] = []
        first = 0
        for i, sector in enumerate(sectors):
            if i + 1 == len(sectors) or sectors[i + 1] != sector + 1:
                start, end = sectors[first], sector + 1
                live = table.entries.cast("B")[start * SECTOR : end * SECTOR]
                pieces.append((table.offset + start * SECTOR, bytes(live)))
                first = i + 1
        table.dirty = set()
        table.pins += 1
        return _Taken(table, frozenset(sectors), pieces, not table.named)

    async def _write_tables(self, snapshot: list[_Taken]) -> None:
        for taken in snapshot:
            for offset, data in taken.pieces:
                await self._storage.write(offset, data)
        new = [taken.table for taken in snapshot if taken.name_it]
        if not new:
            return
        # Ordering: a table is whole on the disk before L1 names it.
        await self.flush()
        for table in new:
            self._l1[table.index] = table.offset
        live = self._l1.cast("B")
        for sector in sorted({table.index * 8 // SECTOR for table in new}):
            start = sector * SECTOR
            await self._storage.write(self._l1_offset + start, bytes(live[start : start + SECTOR]))
