"""L2 tables in memory: one object from load to eviction, loaded once, pinned while anything depends on it.

A table that is evicted and loaded again while a commit is still writing it would lose its links; so a table stays while
it has entries the disk does not have, while a commit holds a copy of them, while no L1 entry on the disk names it, and
while a request that is about to link into it holds it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator

import numpy as np
import numpy.typing as npt
import trio

from qedfs.image.geometry import SECTOR
from qedfs.image.tables import UNALLOCATED, as_array

ENTRIES_PER_SECTOR = SECTOR // 8
_SCALAR = 64
"""Entries set one by one before numpy takes over."""


class Table:
    """One L2 table. `index` is its place in L1, `offset` (bytes) its place in the file."""

    __slots__ = ("dirty", "entries", "index", "named", "offset", "pins", "used", "valid")

    def __init__(self, index: int, offset: int, entries: memoryview, *, valid: bool, named: bool) -> None:
        self.index = index
        self.offset = offset
        self.entries = entries
        self.valid = valid
        """Every entry was judged sound, so that a look-up need not judge again."""
        self.named = named
        """The L1 entry on the disk names this table."""
        self.dirty: set[int] = set()
        """Sectors of the table with entries that no commit has taken yet."""
        self.pins = 0
        """Commits and claims that depend on this object."""
        self.used = True
        """Looked at since the last round of eviction."""

    @property
    def evictable(self) -> bool:
        return not self.pins and not self.dirty and self.named

    def set(self, first: int, count: int, offset: int, step: int) -> None:
        """Set `count` entries from index `first` to `offset`, each next one `step` bytes further, and mark them."""
        if count <= _SCALAR:
            for i in range(first, first + count):
                self.entries[i] = offset
                offset += step
        else:
            steps = np.arange(count, dtype=np.uint64) * np.uint64(step)
            as_array(self.entries)[first : first + count] = np.uint64(offset) + steps
        self.dirty.update(range(first // ENTRIES_PER_SECTOR, (first + count - 1) // ENTRIES_PER_SECTOR + 1))

    def clear(self, places: npt.NDArray[np.intp]) -> None:
        """Set the entries at `places` to unallocated, and mark them."""
        as_array(self.entries)[places] = UNALLOCATED
        self.dirty.update(np.unique(places // ENTRIES_PER_SECTOR).tolist())

    def sector(self, number: int) -> memoryview:
        """Return the entries of one sector, as bytes of the live table."""
        return self.entries.cast("B")[number * SECTOR : (number + 1) * SECTOR]


class TableCache:
    """Tables by L1 index, at most `capacity` of them unless more are pinned."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._tables: dict[int, Table] = {}
        self._loading: dict[int, trio.Event] = {}
        self.get = self._tables.get
        """Return the table at an L1 index, or None: the hot path's look-up, a bound `dict.get`."""

    def __iter__(self) -> Iterator[Table]:
        return iter(list(self._tables.values()))

    def __len__(self) -> int:
        return len(self._tables)

    async def load(self, index: int, read: Callable[[int], Awaitable[Table | None]]) -> Table | None:
        """Return the table at `index`, read by `read` unless it is here or on its way. None if there is none.

        The table is not pinned: pin it before the next await. Callers that come during a load wait for it; if it fails,
        each tries by itself, so that an error or a cancellation of one is not the answer of another.
        """
        while True:
            table = self._tables.get(index)
            if table is not None:
                table.used = True
                return table
            loading = self._loading.get(index)
            if loading is None:
                break
            await loading.wait()
        done = self._loading[index] = trio.Event()
        try:
            table = await read(index)
            if table is not None:
                self._insert(table)
            return table
        finally:
            del self._loading[index]
            done.set()

    def drop(self, table: Table) -> None:
        """Forget `table` now if nothing depends on it."""
        if table.evictable:
            del self._tables[table.index]

    def _insert(self, table: Table) -> None:
        while len(self._tables) >= self._capacity and self._evict():
            pass
        self._tables[table.index] = table

    def _evict(self) -> bool:
        # Second chance: a table looked at since the last round goes to the end of the queue once.
        for _ in range(2 * len(self._tables)):
            index, table = next(iter(self._tables.items()))
            if table.evictable and not table.used:
                del self._tables[index]
                return True
            table.used = False
            del self._tables[index]
            self._tables[index] = table
        return False
