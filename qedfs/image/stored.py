"""The tables of an image as the file has them: for walks over all of the disk, which nobody's reads should wait for.

What lies in holes of the file is passed over and nothing is kept, so that a walk costs no more than the file holds.
Entries that are linked in memory only are not seen.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import numpy as np
import numpy.typing as npt

from qedfs.errors import CorruptEntry, InvalidImage
from qedfs.image.geometry import MAX_TABLES
from qedfs.image.header import Header
from qedfs.image.sparse import Entries, pieces, read_sparse, with_data
from qedfs.image.storage import Storage
from qedfs.image.tables import ZERO, Run, State, local_below, runs_of


class StoredTables:
    """The L2 tables that `l1` names in a file whose whole clusters are `usable` bytes long."""

    def __init__(self, storage: Storage, header: Header, l1: Entries, usable: int) -> None:
        self._storage = storage
        self._header = header
        self._geometry = header.geometry
        self._l1 = l1
        self._usable = usable
        named = np.flatnonzero(l1)
        sound = self._are_tables(l1[named])
        self.invalid: npt.NDArray[np.intp] = named[~sound]
        """Places in L1, ascending, of entries that name no table."""
        named = named[sound]
        self._named = named[np.argsort(l1[named], kind="stable")]
        """Places in L1 of entries that name a table, in the order of the tables in the file."""

    def overlapping(self) -> frozenset[int]:
        """Return the places in L1 of tables that share clusters with another one."""
        close = np.flatnonzero(np.diff(self._l1[self._named]) < self._geometry.table_bytes)
        return frozenset(self._named[np.union1d(close, close + 1)].tolist())

    async def once(self) -> list[int]:
        """Return a place in L1 of each table that may hold anything, once each, in the order of the file.

        Raises:
            LeafError: the file cannot be read.
        """
        offsets, first_uses = np.unique(self._l1[self._named], return_index=True)
        held = await with_data(self._storage, offsets, self._geometry.table_bytes)
        places: list[int] = self._named[first_uses[held]].tolist()
        return places

    async def in_order(self) -> list[int]:
        """Return the places in L1, ascending, below which anything may be other than unallocated, or is invalid.

        Raises:
            CorruptEntry: two entries name the same clusters. To walk over such tables could take for ever.
            LeafError: the file cannot be read.
        """
        offsets = self._l1[self._named]
        if np.any(np.diff(offsets) < self._geometry.table_bytes):
            raise CorruptEntry(
                self._storage.name, "two L1 table entries name the same clusters; 'qedfs check' says more"
            )
        held = await with_data(self._storage, offsets, self._geometry.table_bytes)
        return sorted(self._named[held].tolist() + self.invalid.tolist())

    async def pieces(self, place: int) -> AsyncGenerator[tuple[int, Entries], None]:
        """Yield `(first, entries)` of the table at a place in L1; what is left out is unallocated.

        Raises:
            CorruptEntry: the L1 entry is invalid.
            LeafError: the file cannot be read.
        """
        start = int(self._l1[place])
        if place in self.invalid:
            raise CorruptEntry(self._storage.name, self.invalid_text(place))
        async with aclosing(pieces(self._storage, start, start + self._geometry.table_bytes)) as found:
            async for offset, entries in found:
                yield (offset - start) // 8, entries

    async def local_below(self, place: int, bounds: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return for each of `bounds`, bytes from the start of what the table covers, how many before it are local."""
        total = np.zeros_like(bounds)
        cluster_size = self._geometry.cluster_size
        async with aclosing(self.pieces(place)) as found:
            async for first, entries in found:
                total += local_below(entries.data, bounds - first * cluster_size, cluster_size)
        return total

    def invalid_text(self, place: int) -> str:
        """Say that the L1 entry at `place` is invalid."""
        return f"L1 table entry {place} is invalid ({int(self._l1[place]):#x})"

    async def runs(self) -> AsyncGenerator[Run, None]:
        """Yield the runs of the whole disk, in order; two neighbours may belong together.

        Use it inside `contextlib.aclosing` unless it is read to its end.

        Raises:
            CorruptEntry, LeafError: a table cannot be read or an entry is invalid; what came before is right.
        """
        size, cluster_size = self._header.image_size, self._geometry.cluster_size
        pos = 0
        for place in await self.in_order():
            start = place * self._geometry.span
            if start >= size:
                break
            if pos < start:
                yield Run(State.BACKING, pos, start - pos)
                pos = start
            async with aclosing(self.pieces(place)) as found:
                async for first, entries in found:
                    start = place * self._geometry.span + first * cluster_size
                    if start >= size:
                        break
                    if pos < start:
                        yield Run(State.BACKING, pos, start - pos)
                    entries = entries[: self._geometry.clusters(size - start)]
                    sound = self._sound_until(entries)
                    for run in runs_of(entries[:sound], start, cluster_size):
                        yield run._replace(length=min(run.length, size - run.pos))
                    if sound < entries.size:
                        cluster = start // cluster_size + sound
                        why = f"the table entry of cluster {cluster} is invalid ({int(entries[sound]):#x})"
                        raise CorruptEntry(self._storage.name, why)
                    pos = min(size, start + entries.size * cluster_size)
        if pos < size:
            yield Run(State.BACKING, pos, size - pos)

    def _are_tables(self, offsets: Entries) -> npt.NDArray[np.bool_]:
        # Not negative where anything is named: L1 itself fits into the file.
        last = max(0, self._usable - self._geometry.table_bytes)
        sound: npt.NDArray[np.bool_] = self._are_places(offsets) & (offsets <= last)
        return sound

    def _are_places(self, offsets: Entries) -> npt.NDArray[np.bool_]:
        inside = np.uint64(self._geometry.cluster_size - 1)
        sound: npt.NDArray[np.bool_] = (offsets >= self._header.room) & ((offsets & inside) == 0)
        return sound

    def _sound_until(self, entries: Entries) -> int:
        """Return how many of `entries` come before the first that is invalid."""
        invalid = (entries > ZERO) & ~(self._are_places(entries) & (entries < self._usable))
        return int(np.argmax(invalid)) if invalid.any() else entries.size


async def read_l1(storage: Storage, header: Header) -> memoryview:
    """Return the L1 table.

    Raises:
        InvalidImage: it names more tables than a mount could look at.
        LeafError: it cannot be read.
    """
    l1 = await read_sparse(storage, header.l1_table_offset, header.geometry.table_bytes)
    named = int(np.count_nonzero(np.frombuffer(l1, dtype=np.uint64)))
    if named > MAX_TABLES:
        raise InvalidImage(storage.name, f"its L1 table names {named} tables; more than {MAX_TABLES} is refused")
    return l1
