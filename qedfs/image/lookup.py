"""Where the bytes of an image are: the reading side of an open image."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import numpy as np

from qedfs.errors import CorruptEntry
from qedfs.image.allocator import Allocator
from qedfs.image.cache import Table, TableCache
from qedfs.image.header import Header
from qedfs.image.sparse import read_sparse
from qedfs.image.storage import Storage
from qedfs.image.stored import StoredTables
from qedfs.image.tables import (
    UNALLOCATED,
    ZERO,
    Run,
    State,
    all_valid,
    as_array,
    as_entries,
    local_below,
    run_length,
)

CACHE_BYTES = 64 << 20
"""Of L2 tables kept in memory; with the default geometry that covers half a terabyte of disk."""
MIN_CACHED_TABLES = 2


class Lookup:
    """The tables of an open image, on demand. `l1` holds the entries of L1 as they are on the disk."""

    def __init__(self, storage: Storage, header: Header, l1: memoryview) -> None:
        self.storage = storage
        self.name = storage.name
        self.header = header
        self.geometry = header.geometry
        self.tables = TableCache(max(MIN_CACHED_TABLES, CACHE_BYTES // self.geometry.table_bytes))
        self.allocator = Allocator(self.geometry.usable_length(storage.length()), storage.length())
        self._l1 = as_entries(l1)
        self._shift = self.geometry.cluster_size.bit_length() - 1
        self._mask = self.geometry.cluster_size - 1
        self._table_shift = self.geometry.table_entries.bit_length() - 1
        self._table_mask = self.geometry.table_entries - 1

    def data_offset(self, pos: int, length: int) -> int:
        """Return where in the file the bytes `[pos, pos + length)` lie if they are data in one piece, else -1.

        The hot path: no await, no object made. -1 also means that a table is not in memory, or not sound.
        """
        cluster = pos >> self._shift
        table = self.tables.get(cluster >> self._table_shift)
        if table is None or not table.valid:
            return -1
        table.used = True
        entries = table.entries
        index = cluster & self._table_mask
        first = entries[index]
        if first <= ZERO:
            return -1
        inside = pos & self._mask
        more = (inside + length - 1) >> self._shift
        if more:
            if index + more > self._table_mask:
                return -1
            expected = first
            step = self._mask + 1
            for i in range(index + 1, index + more + 1):
                expected += step
                if entries[i] != expected:
                    return -1
        return first + inside

    def run_nowait(self, pos: int, length: int) -> Run | None:
        """Return the run that begins at `pos`, at most `length` bytes (more than 0); None if its table must be loaded.

        Raises:
            CorruptEntry: the entry at `pos`, or the L1 entry above it, is invalid. A run ends before an invalid entry.
        """
        cluster = pos >> self._shift
        table_index = cluster >> self._table_shift
        span_left = ((table_index + 1) << (self._table_shift + self._shift)) - pos
        table = self.tables.get(table_index)
        if table is None:
            if self._l1[table_index] == UNALLOCATED:
                return Run(State.BACKING, pos, min(length, span_left))
            return None
        table.used = True
        length = min(length, span_left)
        index = cluster & self._table_mask
        entry = table.entries[index]
        if entry > ZERO and not (table.valid or self._is_cluster(entry)):
            raise CorruptEntry(self.name, f"the table entry of cluster {cluster} is invalid ({entry:#x})")
        inside = pos & self._mask
        clusters = (inside + length + self._mask) >> self._shift
        n = run_length(table.entries, index, index + clusters, self._mask + 1)
        if not table.valid and entry > ZERO:
            # Neighbours of a sound entry may run past the end of the file.
            n = next((i for i in range(1, n) if not self._is_cluster(entry + (i << self._shift))), n)
        length = min(length, (n << self._shift) - inside)
        if entry > ZERO:
            return Run(State.DATA, pos, length, entry + inside)
        return Run(State(entry), pos, length)

    async def run(self, pos: int, length: int) -> Run:
        """Return the run that begins at `pos`, loading its table if need be. Raises as `run_nowait`, and `LeafError`."""
        while True:
            run = self.run_nowait(pos, length)
            if run is not None:
                return run
            await self._load(pos >> (self._shift + self._table_shift))

    def next_missing(self, first: int, end: int) -> tuple[int, int] | None:
        """Return the first clusters of `[first, end)` that are not local, up to the end of what one table covers, or None.

        Does not wait: everything below a table that is not in memory is called missing. Nothing is judged.
        """
        while first < end:
            index = first >> self._table_shift
            stop = min(end, (index + 1) << self._table_shift)
            table = self.tables.get(index)
            if table is None:
                return first, stop
            base = index << self._table_shift
            missing = as_array(table.entries)[first - base : stop - base] == UNALLOCATED
            start = int(missing.argmax())
            if missing[start]:
                local = ~missing[start:]
                length = int(local.argmax())
                return first + start, (first + start + length if local[length] else stop)
            first = stop
        return None

    def has_table(self, index: int) -> bool:
        """Whether L1 names a table at `index`, or one is in memory that it will name."""
        return self._l1[index] != UNALLOCATED or self.tables.get(index) is not None

    def tables_between(self, first: int, end: int) -> int:
        """Return for how many indices of `[first, end)` `has_table` holds."""
        named = np.count_nonzero(as_array(self._l1)[first:end])
        return int(named) + sum(first <= t.index < end and self._l1[t.index] == UNALLOCATED for t in self.tables)

    async def runs(self, pos: int, length: int) -> AsyncGenerator[Run, None]:
        """Yield the runs of `[pos, pos + length)` in order, as they are when each is reached. Close it (`aclosing`)."""
        end = pos + length
        while pos < end:
            run = await self.run(pos, end - pos)
            yield run
            pos += run.length

    async def local_below(self, bounds: list[int]) -> list[int]:
        """Return for each of `bounds` (positions on the disk) how many bytes before it need no backing.

        Of a damaged L1 table, invalid entries and further names of one table do not count. Raises `LeafError`.
        """
        wanted = np.array(bounds, dtype=np.int64)
        total = np.zeros_like(wanted)
        stored = self.stored()
        # A table in memory may hold more than the file does.
        for index in {*await stored.once(), *(table.index for table in self.tables)}:
            below = wanted - index * self.geometry.span
            table = self.tables.get(index)
            if table is not None:
                total += local_below(table.entries, below, self.geometry.cluster_size)
            else:
                total += await stored.local_below(index, below)
        return [int(n) for n in total]

    def stored(self) -> StoredTables:
        """Return the tables as the file has them, for a walk over all of them."""
        return StoredTables(self.storage, self.header, as_array(self._l1), self.allocator.end)

    async def _load(self, index: int) -> Table | None:
        return await self.tables.load(index, self._read_table)

    async def _read_table(self, index: int) -> Table | None:
        offset = self._l1[index]
        if offset == UNALLOCATED:
            return None
        if not self.geometry.is_table_offset(
            offset, self.header.room, self.allocator.end
        ) or self.allocator.is_forbidden(offset, self.geometry.table_bytes):
            raise CorruptEntry(self.name, f"L1 table entry {index} is invalid ({offset:#x})")
        entries = as_entries(await read_sparse(self.storage, offset, self.geometry.table_bytes))
        return Table(index, offset, entries, valid=self._sound(entries), named=True)

    def _sound(self, entries: memoryview) -> bool:
        # With dangling entries about, every look-up judges by itself: they are too rare to be fast.
        return not self.allocator.forbids and all_valid(entries, self.geometry, self.header.room, self.allocator.end)

    def _is_cluster(self, offset: int) -> bool:
        return self.geometry.is_cluster_offset(
            offset, self.header.room, self.allocator.end
        ) and not self.allocator.is_forbidden(offset)
