"""Which range to copy next. Sans-IO: asks a table of what is missing, remembers what is under way.

The order: the ranges of a boot profile; what lies around the newest miss of the guest; then everything, ascending, from where
it last was and around to the start. Nothing is remembered over a restart: the tables of the leaf say what is missing.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable

AHEAD, BEHIND = 64 << 20, 8 << 20
"""Bytes after and before a miss that are likely to be wanted next. Files lie together; most are read forwards."""


class Cursor:
    """The order of one disk. Ranges are `[first, end)` in clusters.

    `next_missing(first, end)` returns the first range inside `[first, end)` that is not local, as long as it likes, or
    None. It does not wait: what it cannot tell at once it may call missing, since whoever copies looks again. `total` is the number of clusters; it may be raised when the disk grows.
    """

    def __init__(
        self,
        total: int,
        cluster_size: int,
        next_missing: Callable[[int, int], tuple[int, int] | None],
        profile: Iterable[tuple[int, int]] = (),
    ) -> None:
        self.total = total
        self._ahead, self._behind = max(1, AHEAD // cluster_size), max(1, BEHIND // cluster_size)
        self._next_missing = next_missing
        # What is left of them: each range is swept once, so that one which cannot be copied does not hold up the rest.
        self._profile = deque(profile)
        self._near: deque[tuple[int, int]] = deque()
        self._pos = 0
        """Where ascending goes on."""
        # INVARIANT: sorted and disjoint.
        self._under_way: list[tuple[int, int]] = []

    @property
    def under_way(self) -> int:
        """Ranges that were taken and have not ended."""
        return len(self._under_way)

    def missed(self, cluster: int) -> None:
        """Note that the guest had to wait for `cluster`: its neighbours come next."""
        self._near = deque([(cluster, cluster + self._ahead), (cluster - self._behind, cluster)])

    def follow(self, profile: Iterable[tuple[int, int]]) -> None:
        """Add the ranges of a boot profile."""
        self._profile.extend(profile)

    def take_profile(self, most: int) -> tuple[int, int] | None:
        """As `take`, but of the boot profile only; None: nothing is left of it."""
        taken = self._sweep(self._profile, most)
        if taken:
            insort(self._under_way, taken)
        return taken

    def take(self, most: int) -> tuple[int, int] | None:
        """Return the next range, of at most `most` clusters, and hold it as under way until `release`.

        None: nothing is missing but what is under way. With nothing under way either, the disk is complete, unless it
        grows or a copy has failed: what failed is missing again.
        """
        if taken := self.take_profile(most):
            return taken
        taken = self._sweep(self._near, most) or self._ascend(most)
        if taken:
            insort(self._under_way, taken)
        return taken

    def release(self, taken: tuple[int, int]) -> None:
        """Note that the copy of a range has ended, well or not."""
        self._under_way.remove(taken)

    def _sweep(self, ranges: deque[tuple[int, int]], most: int) -> tuple[int, int] | None:
        while ranges:
            first, end = ranges[0]
            found = self._free(first, end, most)
            if found:
                ranges[0] = (found[1], end)
                return found
            ranges.popleft()
        return None

    def _ascend(self, most: int) -> tuple[int, int] | None:
        found = self._free(self._pos, self.total, most) or self._free(0, self._pos, most)
        if found:
            self._pos = found[1]
        return found

    def _free(self, first: int, end: int, most: int) -> tuple[int, int] | None:
        """The first range inside `[first, end)` that is missing and not under way, of at most `most` clusters."""
        first, end = max(0, first), min(end, self.total)
        while first < end:
            missing = self._next_missing(first, end)
            if missing is None:
                return None
            first, stop = missing
            after = bisect_right(self._under_way, first, key=lambda taken: taken[0])
            if after and self._under_way[after - 1][1] > first:
                first = self._under_way[after - 1][1]
                continue
            if after < len(self._under_way):
                stop = min(stop, self._under_way[after][0])
            return first, min(stop, first + most)
        return None
