"""A set of clusters, as sorted disjoint ranges. Sans-IO."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class Ranges:
    """Ranges `[first, end)` of clusters; neighbours are joined."""

    def __init__(self) -> None:
        # INVARIANT: sorted, disjoint and not touching: `_firsts[i] < _ends[i] < _firsts[i + 1]`.
        self._firsts: list[int] = []
        self._ends: list[int] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(zip(self._firsts, self._ends, strict=True)))

    def __len__(self) -> int:
        """How many ranges there are."""
        return len(self._firsts)

    def clear(self) -> None:
        self._firsts.clear()
        self._ends.clear()

    def add(self, first: int, end: int) -> None:
        """Add `[first, end)`."""
        if first >= end:
            return
        low = bisect_left(self._ends, first)
        high = bisect_right(self._firsts, end)
        if low < high:
            first, end = min(first, self._firsts[low]), max(end, self._ends[high - 1])
        self._firsts[low:high] = [first]
        self._ends[low:high] = [end]

    def remove(self, first: int, end: int) -> None:
        """Take out what of `[first, end)` is in."""
        if first >= end:
            return
        low = bisect_right(self._ends, first)
        high = bisect_left(self._firsts, end)
        kept: list[tuple[int, int]] = []
        if low < high:
            kept = [(self._firsts[low], first), (end, self._ends[high - 1])]
            kept = [(start, stop) for start, stop in kept if start < stop]
        self._firsts[low:high] = [start for start, _ in kept]
        self._ends[low:high] = [stop for _, stop in kept]

    def covers(self, first: int, end: int) -> bool:
        """Whether all of `[first, end)` is in."""
        return first >= end or self.end_of(first) >= end

    def end_of(self, cluster: int) -> int:
        """Return where the range that holds `cluster` ends; `cluster` itself if it is not in."""
        place = bisect_right(self._firsts, cluster) - 1
        return max(cluster, self._ends[place]) if place >= 0 else cluster

    def next_start(self, cluster: int, otherwise: int) -> int:
        """Return where the first range at or after `cluster` begins; `otherwise` if there is none before that."""
        place = bisect_left(self._firsts, cluster)
        return min(otherwise, self._firsts[place]) if place < len(self._firsts) else otherwise

    def within(self, first: int, end: int) -> list[tuple[int, int]]:
        """Return the parts of the ranges that lie in `[first, end)`, ascending."""
        low, high = bisect_right(self._ends, first), bisect_left(self._firsts, end)
        pairs = zip(self._firsts[low:high], self._ends[low:high], strict=True)
        return [(max(first, start), min(end, stop)) for start, stop in pairs]
