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

    @property
    def tail(self) -> int:
        """Offset behind the last cluster that is referenced: from there on the file is not needed."""
        clusters = self._clusters
        while clusters > self._header:
            first = max(0, clusters - 8 * _BLOCK) // 8 * 8
            used = np.flatnonzero(np.unpackbits(self._bits[first // 8 : -(-clusters // 8)], bitorder="little"))
            if used.size:
                return max(first + int(used[-1]) + 1, self._header) << int(self._shift)
            clusters = first
        return self._header << int(self._shift)

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

    def free(self, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield `(offset, length)` of what nothing names, ascending; neighbours are joined.

        With `begin` and `end` (bytes of the file) only of the clusters that these touch.
        """
        start, inside = None, False
        for at, used in self._blocks(begin, end):
            if start is None:
                start, inside = at, True
            if inside and not used.any():
                continue
            for edge in (np.flatnonzero(np.diff(used, prepend=np.uint8(not inside))) + at).tolist():
                if inside and edge > start:
                    yield self._extent(start, edge)
                start = edge
                inside = not inside
        last = self._last(end)
        if inside and start is not None and start < last:
            yield self._extent(start, last)

    def count_free(self, begin: int, end: int) -> int:
        """Return how many of the clusters that `[begin, end)` touches nothing names."""
        return sum(int(np.count_nonzero(used == 0)) for _, used in self._blocks(begin, end))

    def _blocks(self, begin: int, end: int | None) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
        """Yield in pieces whether clusters are referenced (1) or not, with the number of the first."""
        at, last = max(self._header, begin >> int(self._shift)), self._last(end)
        while at < last:
            stop = min(last, (at // 8 + _BLOCK) * 8)
            bits = np.unpackbits(self._bits[at // 8 : -(-stop // 8)], bitorder="little")
            yield at, bits[at % 8 : at % 8 + stop - at]
            at = stop

    def _last(self, end: int | None) -> int:
        return self._clusters if end is None else min(self._clusters, -(-end >> int(self._shift)))

    def _extent(self, start: int, end: int) -> tuple[int, int]:
        return start << int(self._shift), (end - start) << int(self._shift)
