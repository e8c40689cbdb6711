"""What one look at every table tells: how many clusters are local, which clusters of the file are free. Sans-IO."""

from __future__ import annotations

from itertools import islice

import numpy as np
import numpy.typing as npt

from qedfs.image.clusters import MAX_CLUSTERS, ClusterMap
from qedfs.image.geometry import Geometry
from qedfs.image.tables import ZERO, Counts, count

MAX_FREE = 1 << 16
"""Ranges of free clusters that are told; more of them stay leaked until a check or the next mount."""
MAX_DANGLING = 1 << 16
"""Ranges of clusters that invalid entries name, remembered one by one; where there are more, the gaps count as named."""


class Survey:
    """What is known of the tables seen so far, in a file whose whole clusters are `usable` bytes long.

    `room` is the size of the header's clusters. All offsets and lengths are in bytes of the file.
    """

    def __init__(self, geometry: Geometry, room: int, usable: int) -> None:
        self._geometry = geometry
        self._room = room
        self._usable = usable
        self._dangling = np.zeros((0, 2), dtype=np.uint64)
        """Ranges of cluster numbers, first and last, ascending."""
        self._used: ClusterMap | None = None
        if usable // geometry.cluster_size <= MAX_CLUSTERS:
            self._used = ClusterMap(geometry, room, usable)
        self.trusted = True
        """No corruption and no read error was met: what no entry names may be given out again."""
        self.invalid = 0
        """Entries that name nothing valid."""
        self.counts = Counts()
        """Of the disk's clusters."""

    def see_l1(self, offset: int, entries: npt.NDArray[np.uint64]) -> None:
        """Note the L1 table at `offset` and what it names."""
        geometry = self._geometry
        self._mark(np.arange(offset, offset + geometry.table_bytes, geometry.cluster_size, dtype=np.uint64))
        named = entries[entries != 0]
        bad = (named < self._room) | (named & np.uint64(geometry.cluster_size - 1) != 0)
        bad |= named > max(0, self._usable - geometry.table_bytes)
        for inside in range(0, geometry.table_bytes, geometry.cluster_size):
            self._note_dangling(named[bad] + np.uint64(inside))
        tables = np.unique(named[~bad])
        # One table with two names, or an entry that is none: to free or cut on this ground could lose data.
        self.trusted &= tables.size == named.size
        for inside in range(0, geometry.table_bytes, geometry.cluster_size):
            self._mark(tables + np.uint64(inside))

    def see_entries(self, entries: npt.NDArray[np.uint64], inside: int, *, repairing: bool) -> npt.NDArray[np.intp]:
        """Note what a piece of an L2 table names and return the places of its invalid entries.

        The first `inside` entries (any number) are of clusters of the disk; those past its end may exist and do not
        count. With `repairing` the caller sets the invalid entries to unallocated.
        """
        places: npt.NDArray[np.intp] = np.flatnonzero(entries > ZERO)
        data = entries[places]
        bad = (data & np.uint64(self._geometry.cluster_size - 1)) != 0
        bad |= (data < self._room) | (data >= self._usable)
        places = places[bad]
        if places.size:
            self.invalid += places.size
            self.trusted = False
            if not repairing:
                self._note_dangling(data[bad])
        self._mark(data[~bad])
        counts = count(entries[: max(0, inside)].data)
        repaired = int(np.count_nonzero(places < inside)) if repairing else 0
        self.counts = Counts(self.counts.data + counts.data - repaired, self.counts.zero + counts.zero)
        return places

    def free(self) -> list[tuple[int, int]]:
        """Return `(offset, length)` of what no entry names, ascending; nothing where that cannot be trusted."""
        if self._used is None or not self.trusted:
            return []
        return list(islice(self._used.free(), MAX_FREE))

    def dangling(self) -> list[tuple[int, int]]:
        """Return `(offset, end)` of the clusters past the end of the file that invalid entries name, ascending."""
        size = self._geometry.cluster_size
        return [(first * size, (last + 1) * size) for first, last in self._dangling.tolist()]

    def _note_dangling(self, offsets: npt.NDArray[np.uint64]) -> None:
        size = np.uint64(self._geometry.cluster_size)
        clusters = np.unique(offsets[offsets >= self._usable] // size)
        if clusters.size:
            more = np.column_stack((clusters, clusters))
            self._dangling = _joined(np.concatenate((self._dangling, more)), MAX_DANGLING)

    def _mark(self, offsets: npt.NDArray[np.uint64]) -> None:
        if self._used is not None and self._used.mark(offsets):
            self.trusted = False  # one cluster with two owners: to free or cut on this ground could lose data


def _joined(ranges: npt.NDArray[np.uint64], most: int) -> npt.NDArray[np.uint64]:
    """Return ranges of numbers, first and last, that cover `ranges` (any order): ascending, apart, at most `most`."""
    ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
    lasts = np.maximum.accumulate(ranges[:, 1])
    gaps = np.maximum(ranges[1:, 0], lasts[:-1]) - lasts[:-1]  # 0 or 1: they touch
    cuts = np.flatnonzero(gaps > 1)
    if cuts.size >= most:
        cuts = np.sort(cuts[np.argsort(gaps[cuts])[-(most - 1) :]])
    starts, ends = np.append(0, cuts + 1), np.append(cuts, len(ranges) - 1)
    return np.column_stack((ranges[starts, 0], lasts[ends]))
