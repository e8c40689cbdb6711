"""Which clusters of an image file are referenced, one bit each. Sans-IO.

What no table names is a leak, or free. The map costs memory for what is marked, not for the length of the file, as the
operating system gives room to a page of it only when something in that page is marked.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from qedfs.image.geometry import Geometry

MAX_CLUSTERS = 1 << 30
"""Of a file: 128 MiB of map. With the default geometry that is 64 TiB of data, with the smallest clusters 4 TiB."""
_BLOCK = 1 << 20
"""Bytes of the map that are unpacked at once (to eight times as many)."""


class ClusterMap:
    """The referenced clusters of a file of `usable` bytes whose header takes `room` bytes. Offsets are in bytes."""

    def __init__(self, geometry: Geometry, room: int, usable: int) -> None:
        clusters = usable // geometry.cluster_size
        if clusters > MAX_CLUSTERS:
            raise OverflowError(f"{clusters} clusters do not fit into a map of {MAX_CLUSTERS}")
        self._shift = np.uint64(geometry.cluster_size.bit_length() - 1)
        self._clusters = clusters
        self._bits = np.zeros(-(-clusters // 8), dtype=np.uint8)
        self._header = min(room // geometry.cluster_size, clusters)
        self._marked = 0

    @property
    def unreferenced(self) -> int:
        """Clusters behind the header that nothing was seen to name."""
        return self._clusters - self._header - self._marked

    def mark(self, offsets: npt.NDArray[np.uint64]) -> int:
        """Note valid cluster offsets as referenced; return how many of them were referenced before, or are repeated."""
        clusters = offsets >> self._shift
        if np.any(clusters[1:] <= clusters[:-1]):
            clusters = np.unique(clusters)
        places = (clusters >> np.uint64(3)).astype(np.intp)
        bits = np.left_shift(np.uint8(1), (clusters & np.uint64(7)).astype(np.uint8))
        taken = int(np.count_nonzero(self._bits[places] & bits))
        if places.size:
            # The bits of one byte are neighbours: joined first, as `bitwise_or.at` takes microseconds for each.
            starts = np.flatnonzero(np.diff(places, prepend=-1))
            self._bits[places[starts]] |= np.bitwise_or.reduceat(bits, starts)
        self._marked += clusters.size - taken
        return int(offsets.size - clusters.size + taken)

    def free(self) -> Iterator[tuple[int, int]]:
        """Yield `(offset, length)` of what nothing names, ascending; neighbours are joined."""
        start = self._header
        inside = True  # the cluster before the one looked at is free, or we are at the first
        for first in range(0, self._bits.size, _BLOCK):
            block = self._bits[first : first + _BLOCK]
            if inside and not block.any():
                continue
            used = np.unpackbits(block, bitorder="little")[: self._clusters - first * 8]
            if not first:
                used[: self._header] = 0  # not marked, and not free: runs begin behind it
            edges = np.flatnonzero(np.diff(used, prepend=np.uint8(not inside))) + first * 8
            for edge in map(int, edges):
                if inside and edge > start:
                    yield self._extent(start, edge)
                start = edge
                inside = not inside
        if inside and start < self._clusters:
            yield self._extent(start, self._clusters)

    def _extent(self, start: int, end: int) -> tuple[int, int]:
        return start << int(self._shift), (end - start) << int(self._shift)
