"""The consistency check, and the repair.

What counts as what is QEMU's (qemu-img check of a QED image): an entry that names nothing valid is a corruption, as is
every further reference to a cluster that is referenced already; a cluster that nothing names is a leak. The repair goes
further than QEMU's, which frees no leak, and is more careful:

- an invalid entry becomes unallocated, so that the backing shows through, but only where no cluster is referenced twice:
  with two owners it is unknown which bytes are a table, and a repair could write into somebody's data;
- leaks are reclaimed only from an image without any corruption, repaired or not: as long as an old entry may come back
  after a power cut, the cluster that it names must stay as it is.

Nothing costs memory or time in proportion to what a header claims: tables are read in pieces, and holes of the file are
passed over.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from qedfs.errors import InvalidImage, LeafError
from qedfs.image import header as headers
from qedfs.image.clusters import MAX_CLUSTERS, ClusterMap
from qedfs.image.geometry import MAX_TABLES, SECTOR
from qedfs.image.header import Feature, Header
from qedfs.image.sparse import Entries, pieces, with_data
from qedfs.image.storage import Storage
from qedfs.image.tables import ZERO


@dataclass(frozen=True)
class CheckResult:
    """What a check found, in clusters or entries; the names are those of `qemu-img check --output=json`.

    `corruptions` and `leaks` are what is left after a repair, `…_fixed` what it mended. `free_clusters` are named by
    nothing but are holes, which take no room, and the next mount uses them again; QEMU counts them as leaks.
    """

    total_clusters: int
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    corruptions: int = 0
    corruptions_fixed: int = 0
    leaks: int = 0
    leaks_fixed: int = 0
    free_clusters: int = 0
    check_errors: int = 0
    """Tables that could not be read."""

    @property
    def consistent(self) -> bool:
        return not (self.corruptions or self.check_errors)


async def check_image(storage: Storage, *, repair: bool) -> CheckResult:
    """Check the image in `storage`, which nobody else writes, and with `repair` (which needs it writable) mend it.

    Raises:
        InvalidImage: it is no QED image, or too large to be checked.
        LeafError: the header or L1 cannot be read, or a repair cannot be written.
    """
    length = storage.length()
    header = headers.decode(bytes(await storage.read(0, min(length, headers.SIZE))), length, storage.name)
    scan = await _scan(storage, header)
    found = await _result(scan)
    # With two owners of one cluster, or an unread table, nothing can be said of what is safe to write.
    if not repair or scan.unreadable or scan.shared:
        return found
    if scan.invalid:
        await _drop_invalid(scan)
    # Ordering: what we read may be in the page cache only. It is durable, and the repairs with it, before anything is
    # cut off and before NEED_CHECK goes.
    await storage.flush()
    if not scan.invalid:
        await _reclaim(scan)
    if header.needs_check:
        await storage.write(0, header.with_features(remove=Feature.NEED_CHECK).encode())
        await storage.flush()
    left = await _result(await _scan(storage, header))
    return replace(
        left,
        corruptions_fixed=found.corruptions - left.corruptions,
        leaks_fixed=max(0, found.leaks - left.leaks),
    )


@dataclass
class _Scan:
    """The walk over all tables of one image, and what it has counted so far."""

    storage: Storage
    header: Header
    usable: int
    clusters: ClusterMap
    tables: Entries
    """Offsets of the L2 tables that can be read as such, ascending."""
    allocated: int = 0
    fragmented: int = 0
    invalid: int = 0
    shared: int = 0
    """References to clusters that are referenced already."""
    unreadable: int = 0

    def l1(self) -> AsyncGenerator[tuple[int, Entries], None]:
        """Yield the pieces of L1 that may hold anything, with their offsets in the file."""
        start = self.header.l1_table_offset
        return pieces(self.storage, start, start + self.header.geometry.table_bytes)

    async def pieces(self) -> AsyncGenerator[_Piece, None]:
        """Yield the pieces of all L2 tables that may hold anything. A table that cannot be read is counted and left."""
        for table in map(int, self.tables):
            before = 0
            try:
                async with aclosing(pieces(self.storage, table, table + self.header.geometry.table_bytes)) as found:
                    async for offset, entries in found:
                        yield _Piece(offset, entries, before)
                        data = entries[entries > ZERO]
                        before = int(data[-1]) if data.size else before
            except LeafError:
                self.unreadable += 1

    def table_offsets_invalid(self, entries: Entries) -> npt.NDArray[np.bool_]:
        """Say of each L1 entry whether it names no valid table."""
        last = self.usable - self.header.geometry.table_bytes  # not negative: L1 fits
        invalid: npt.NDArray[np.bool_] = (entries != 0) & (self._misplaced(entries) | (entries > last))
        return invalid

    def cluster_offsets_invalid(self, entries: Entries) -> npt.NDArray[np.bool_]:
        """Say of each L2 entry whether it names no valid cluster."""
        invalid: npt.NDArray[np.bool_] = (entries > ZERO) & (self._misplaced(entries) | (entries >= self.usable))
        return invalid

    def _misplaced(self, entries: Entries) -> npt.NDArray[np.bool_]:
        inside = np.uint64(self.header.geometry.cluster_size - 1)
        misplaced: npt.NDArray[np.bool_] = (entries < self.header.room) | ((entries & inside) != 0)
        return misplaced

    def mark_tables(self, tables: Entries) -> Entries:
        """Mark all clusters of the tables at these offsets (ascending); return the tables that share none with another.

        One that shares is not looked into: its bytes may be somebody's data.
        """
        geometry = self.header.geometry
        repeated = 0
        for inside in range(0, geometry.table_bytes, geometry.cluster_size):
            repeated += self.clusters.mark(tables + np.uint64(inside))
        if not repeated:
            return tables
        self.shared += repeated
        apart = np.diff(tables) >= geometry.table_bytes
        alone = np.concatenate(([True], apart)) & np.concatenate((apart, [True]))
        l1 = self.header.l1_table_offset
        near = slice(*np.searchsorted(tables, (max(0, l1 - geometry.table_bytes + 1), l1 + geometry.table_bytes)))
        alone[near] = False
        return tables[alone]


@dataclass(frozen=True)
class _Piece:
    """Entries of one L2 table. `offset` is their place in the file, `before` the data entry ahead of them, 0 if none."""

    offset: int
    entries: Entries = field(repr=False)
    before: int


async def _scan(storage: Storage, header: Header) -> _Scan:
    geometry = header.geometry
    usable = geometry.usable_length(storage.length())
    if usable // geometry.cluster_size > MAX_CLUSTERS:
        raise InvalidImage(storage.name, f"more than {MAX_CLUSTERS} clusters long; too long to be checked")
    clusters = ClusterMap(geometry, header.room, usable)
    scan = _Scan(storage, header, usable, clusters, np.zeros(0, dtype=np.uint64))
    scan.mark_tables(np.array([header.l1_table_offset], dtype=np.uint64))
    tables, uses = scan.tables, np.zeros(0, dtype=np.int64)
    async with aclosing(scan.l1()) as l1:
        async for _, entries in l1:
            invalid = scan.table_offsets_invalid(entries)
            scan.invalid += int(np.count_nonzero(invalid))
            tables, uses = _tally(tables, uses, entries[(entries != 0) & ~invalid])
            if tables.size > MAX_TABLES:
                raise InvalidImage(storage.name, f"its L1 table names more than {MAX_TABLES} tables; too many to check")
    scan.shared += int(np.sum(uses - 1)) * geometry.table_clusters
    # All tables come before all data: a data entry that names a table is then the one that is in the wrong.
    alone = scan.mark_tables(tables)
    # One that is named twice is not looked into either.
    alone = np.setdiff1d(alone, tables[uses > 1], assume_unique=True)
    scan.tables = alone[await with_data(storage, alone, geometry.table_bytes)]
    async for piece in scan.pieces():
        data = piece.entries[piece.entries > ZERO]
        if not data.size:
            continue
        before = np.concatenate((np.array([piece.before], dtype=np.uint64), data[:-1]))
        scan.allocated += int(data.size)
        scan.fragmented += int(np.count_nonzero((before != 0) & (data != before + np.uint64(geometry.cluster_size))))
        invalid = scan.cluster_offsets_invalid(data)
        scan.invalid += int(np.count_nonzero(invalid))
        scan.shared += clusters.mark(data[~invalid])
    return scan


def _tally(offsets: Entries, uses: npt.NDArray[np.int64], more: Entries) -> tuple[Entries, npt.NDArray[np.int64]]:
    """Return the offsets seen so far (ascending, each once) and how often, with `more` of them (any order) added."""
    distinct, counts = np.unique(more, return_counts=True)
    both, places = np.unique(np.concatenate((offsets, distinct)), return_inverse=True)
    sums = np.zeros(both.size, dtype=np.int64)
    np.add.at(sums, places, np.concatenate((uses, counts)))
    return both, sums


async def _result(scan: _Scan) -> CheckResult:
    leaks = 0 if scan.unreadable else await _leaks(scan)
    return CheckResult(
        scan.header.geometry.clusters(scan.header.image_size),
        scan.allocated,
        scan.fragmented,
        corruptions=scan.invalid + scan.shared,
        leaks=leaks,
        free_clusters=0 if scan.unreadable else scan.clusters.unreferenced - leaks,
        check_errors=scan.unreadable,
    )


async def _leaks(scan: _Scan) -> int:
    """Count the clusters that nothing names and that take room, or could be cut off the end of the file."""
    size = scan.header.geometry.cluster_size
    tail = scan.clusters.tail
    async with aclosing(_data_clusters(scan, tail)) as found:
        leaks = [scan.clusters.count_free(offset, end) async for offset, end in found]
    return sum(leaks) + (scan.usable - tail) // size


async def _data_clusters(scan: _Scan, end: int) -> AsyncGenerator[tuple[int, int], None]:
    """Yield `[offset, end)` of the clusters below `end` that are no holes of the file, ascending and apart."""
    size = scan.header.geometry.cluster_size
    offset = 0
    while offset < end:
        data, hole = await scan.storage.next_data(offset)
        first = max(offset, data // size * size)
        offset = min(end, max(first, -(-hole // size) * size))
        if first < offset:
            yield first, offset


async def _drop_invalid(scan: _Scan) -> None:
    """Set all invalid entries to unallocated."""
    async with aclosing(scan.pieces()) as pieces:
        async for piece in pieces:
            await _zero(scan.storage, piece.offset, piece.entries, scan.cluster_offsets_invalid(piece.entries))
    async with aclosing(scan.l1()) as pieces_of_l1:
        async for offset, entries in pieces_of_l1:
            await _zero(scan.storage, offset, entries, scan.table_offsets_invalid(entries))


async def _zero(storage: Storage, offset: int, entries: Entries, invalid: npt.NDArray[np.bool_]) -> None:
    places = np.flatnonzero(invalid)
    if not places.size:
        return
    # Whole sectors, and no more of them than needed: what is rewritten in between has the same bytes as before.
    per_sector = SECTOR // 8
    first = int(places[0]) // per_sector * per_sector
    end = min((int(places[-1]) // per_sector + 1) * per_sector, entries.size)
    await storage.write(offset + first * 8, np.where(invalid, np.uint64(0), entries)[first:end].tobytes())


async def _reclaim(scan: _Scan) -> None:
    """Cut off what nothing names at the end of the file, and give the room of the rest back."""
    tail = scan.clusters.tail
    if tail < scan.usable:
        await scan.storage.truncate(tail)
    async with aclosing(_data_clusters(scan, tail)) as found:
        async for first, end in found:
            for offset, length in scan.clusters.free(first, end):
                await scan.storage.punch(offset, length)
    await scan.storage.flush()
