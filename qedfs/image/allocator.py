"""Which clusters of the image file are taken: the end of the file, and what is free before it. Sans-IO.

QED knows no free list; the file's length is the allocation state. Clusters that a scan found unreferenced, or that were
taken and then not needed, are given out again before the file grows.
"""

from __future__ import annotations

import bisect
from typing import NamedTuple

MAX_FORBIDDEN = 1 << 16
"""Ranges remembered one by one."""


class Extent(NamedTuple):
    """Neighbouring clusters of the file.

    `offset` and `length` are in bytes. A `pristine` extent has never been written since the file ends before it: it
    reads as zeros once the file is long enough.
    """

    offset: int
    length: int
    pristine: bool


class Allocator:
    """Gives out extents in bytes, all multiples of the cluster size; `end` is where the file's clusters end."""

    def __init__(self, end: int, written: int) -> None:
        self.end = end
        self._written = max(end, written)
        """Bytes at and past this offset were never written: they read as zeros once the file is long enough."""
        self._forbidden: list[tuple[int, int]] = []
        # INVARIANT: sorted, disjoint, not touching each other, all below `end`, none ending at `end`.
        self._free: list[tuple[int, int]] = []

    @property
    def free_bytes(self) -> int:
        return sum(length for _, length in self._free)

    @property
    def free_extents(self) -> list[tuple[int, int]]:
        """`(offset, length)` of what is free before the end, ascending."""
        return list(self._free)

    def allocate(self, length: int) -> Extent:
        """Take `length` contiguous bytes: the first free extent that is large enough, else the end of the file."""
        for i, (offset, room) in enumerate(self._free):
            if room >= length:
                if room == length:
                    del self._free[i]
                else:
                    self._free[i] = (offset + length, room - length)
                return Extent(offset, length, pristine=False)
        offset = self.end
        while (blocked := self._forbidden_in(offset, offset + length)) is not None:
            offset = blocked
        self.end = offset + length
        pristine = offset >= self._written
        self._written = max(self._written, self.end)
        return Extent(offset, length, pristine)

    def forbid(self, ranges: list[tuple[int, int]]) -> None:
        """Never give out any of `ranges`, `(offset, end)`, sorted and disjoint, none below the present end.

        Where a damaged table names too many places to remember, everything between the first and the last is left alone.
        """
        self._forbidden = ranges if len(ranges) <= MAX_FORBIDDEN else [(ranges[0][0], ranges[-1][1])]

    @property
    def forbids(self) -> bool:
        return bool(self._forbidden)

    def is_forbidden(self, offset: int, length: int = 1) -> bool:
        """Whether any of the `length` bytes at `offset` may not be given out, and so cannot be anything of ours."""
        return self._forbidden_in(offset, offset + length) is not None

    def _forbidden_in(self, offset: int, end: int) -> int | None:
        """Return where the first forbidden range that touches `[offset, end)` ends."""
        i = bisect.bisect_right(self._forbidden, offset, key=lambda r: r[1])
        if i < len(self._forbidden) and self._forbidden[i][0] < end:
            return self._forbidden[i][1]
        return None

    def release(self, offset: int, length: int) -> None:
        """Give back an extent that nothing names, on the disk or in memory, and that nobody is still writing.

        An extent that was ever part of a commit, or whose write ended in doubt, must not come back.
        """
        i = bisect.bisect(self._free, (offset, 0))
        if i < len(self._free) and self._free[i][0] == offset + length:
            length += self._free.pop(i)[1]
        if i and sum(self._free[i - 1]) == offset:
            offset, before = self._free.pop(i - 1)
            length += before
            i -= 1
        if offset + length == self.end:
            self.end = offset
        else:
            self._free.insert(i, (offset, length))
