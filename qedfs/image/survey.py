"""What one look at every table tells: how many clusters are local, which clusters of the file are free. Sans-IO."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qedfs.image.geometry import Geometry
from qedfs.image.tables import ZERO, Counts, as_array, count

MAX_MAP_CLUSTERS = 64 << 20
"""Of the map of used clusters, a byte each. A file with more of them keeps its leaks."""
_CHUNK = 1 << 17
"""Entries judged at once, so that the largest tables cost no more memory than themselves."""


class Survey:
    """What is known of the tables seen so far, in a file whose whole clusters are `usable` bytes long.

    `room` is the size of the header's clusters. All offsets and lengths are in bytes of the file.
    """

    def __init__(self, geometry: Geometry, room: int, usable: int) -> None:
        self._geometry = geometry
        self._room = room
        self._usable = usable
        self._dangling: list[npt.NDArray[np.uint64]] = []
        self._used: npt.NDArray[np.bool_] | None = None
        if usable // geometry.cluster_size <= MAX_MAP_CLUSTERS:
            self._used = np.zeros(usable // geometry.cluster_size, dtype=np.bool_)
            self._used[: room // geometry.cluster_size] = True
        self.trusted = True
        """No corruption and no read error was met: what no entry names may be given out again."""
        self.invalid = 0
        """Entries that name nothing valid."""
        self.counts = Counts()
        """Of the disk's clusters."""

    def see_l1(self, entries: memoryview) -> None:
        """Note the L1 entries that name no valid table."""
        array = as_array(entries)
        named = array[array != 0]
        bad = (named < self._room) | (named + np.uint64(self._geometry.table_bytes) > self._usable)
        bad |= named >= self._usable  # where the sum above wraps
        for clusters in range(self._geometry.table_clusters):
            self._dangling.append(named[bad] + np.uint64(clusters * self._geometry.cluster_size))

    def see_table(self, offset: int) -> None:
        """Note the clusters of a table (L1 or L2)."""
        size = self._geometry.cluster_size
        self._mark(np.arange(offset, offset + self._geometry.table_bytes, size, dtype=np.uint64))

    def see_entries(self, entries: memoryview, inside: int, *, repairing: bool) -> npt.NDArray[np.intp]:
        """Note what an L2 table names and return the places of its invalid entries.

        The first `inside` entries (any number) are of clusters of the disk; those past its end may exist and do not
        count. With `repairing` the caller sets the invalid entries to unallocated.
        """
        array = as_array(entries)
        invalid = [self._see_chunk(array[i : i + _CHUNK], repairing) + i for i in range(0, len(array), _CHUNK)]
        places = np.concatenate(invalid)
        counts = count(entries[: max(0, min(inside, len(entries)))])
        repaired = int(np.count_nonzero(places < inside)) if repairing else 0
        self.counts = Counts(self.counts.data + counts.data - repaired, self.counts.zero + counts.zero)
        return places

    def free(self) -> list[tuple[int, int]]:
        """Return `(offset, length)` of what no entry names, ascending; nothing where that cannot be trusted."""
        if self._used is None or not self.trusted:
            return []
        edges = np.flatnonzero(np.diff(self._used, prepend=True, append=True))
        size = self._geometry.cluster_size
        return [(int(start) * size, int(end - start) * size) for start, end in edges.reshape(-1, 2)]

    def dangling(self) -> list[tuple[int, int]]:
        """Return `(offset, end)` of the clusters past the end of the file that invalid entries name, ascending."""
        if not self._dangling:
            return []
        size = np.uint64(self._geometry.cluster_size)
        clusters = np.unique(np.concatenate(self._dangling) // size)
        clusters = clusters[clusters >= np.uint64(self._usable) // size]
        if not clusters.size:
            return []
        gaps = np.flatnonzero(np.diff(clusters) != 1)
        starts, ends = clusters[np.append(0, gaps + 1)], clusters[np.append(gaps, clusters.size - 1)]
        return [(int(a) * int(size), (int(b) + 1) * int(size)) for a, b in zip(starts, ends, strict=True)]

    def _see_chunk(self, array: npt.NDArray[np.uint64], repairing: bool) -> npt.NDArray[np.intp]:
        places = np.flatnonzero(array > ZERO)
        data = array[places]
        misplaced = (data & np.uint64(self._geometry.cluster_size - 1)) != 0
        bad = misplaced | (data < self._room) | (data >= self._usable)
        if bad.any():
            self.invalid += int(np.count_nonzero(bad))
            self.trusted = False
            if not repairing:
                self._dangling.append(data[bad])
            places, data = places[bad], data[~bad]
        else:
            places = places[:0]
        self._mark(data)
        return places

    def _mark(self, offsets: npt.NDArray[np.uint64]) -> None:
        if self._used is None or not offsets.size:
            return
        clusters = (offsets // np.uint64(self._geometry.cluster_size)).astype(np.intp)
        ascending = bool(np.all(clusters[1:] > clusters[:-1]))
        if self._used[clusters].any() or not (ascending or np.unique(clusters).size == clusters.size):
            self.trusted = False  # one cluster with two owners: to free or cut on this ground could lose data
        self._used[clusters] = True
