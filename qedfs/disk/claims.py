"""Who is allocating which clusters. Sans-threads: plain state of the event loop.

A claim is taken all at once or not at all. Guest writes wait in order of arrival; copies never wait (docs/concurrency.md).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio


class Claims:
    """Claims of one disk, as ranges `[first, end)` of clusters."""

    def __init__(self) -> None:
        # INVARIANT: the ranges held are disjoint. There are as many as guest writes and copies under way: few.
        self._held: set[tuple[int, int]] = set()
        self._waiting: dict[tuple[int, int, int], trio.Event] = {}
        self._arrivals = 0

    @asynccontextmanager
    async def hold(self, first: int, end: int) -> AsyncIterator[None]:
        """Hold the claim of `[first, end)`, waiting for everybody who holds or awaits a part of it."""
        if self._overlaps(first, end) or any(a < end and first < b for a, b, _ in self._waiting):
            self._arrivals += 1
            ticket = (first, end, self._arrivals)
            granted = self._waiting[ticket] = trio.Event()
            try:
                await granted.wait()
            except BaseException:
                if granted.is_set():
                    self._release(first, end)
                else:
                    del self._waiting[ticket]
                    self._grant()
                raise
        else:
            self._held.add((first, end))
        try:
            yield
        finally:
            self._release(first, end)

    @contextmanager
    def hold_unclaimed(self, first: int, end: int) -> Iterator[list[tuple[int, int]]]:
        """Hold the claims of all parts of `[first, end)` that nobody holds, and yield these parts, ascending."""
        parts = self._unclaimed(first, end)
        self._held.update(parts)
        try:
            yield parts
        finally:
            for part in parts:
                self._release(*part)

    def _unclaimed(self, first: int, end: int) -> list[tuple[int, int]]:
        parts: list[tuple[int, int]] = []
        for held_first, held_end in sorted(r for r in self._held if r[0] < end and first < r[1]):
            if first < held_first:
                parts.append((first, held_first))
            first = held_end
        if first < end:
            parts.append((first, end))
        return parts

    def _overlaps(self, first: int, end: int) -> bool:
        return any(a < end and first < b for a, b in self._held)

    def _release(self, first: int, end: int) -> None:
        self._held.remove((first, end))
        self._grant()

    def _grant(self) -> None:
        # In order of arrival; whoever still waits keeps later ones that overlap it waiting, so that nobody starves.
        before: list[tuple[int, int]] = []
        for ticket in list(self._waiting):
            first, end, _ = ticket
            if self._overlaps(first, end) or any(a < end and first < b for a, b in before):
                before.append((first, end))
            else:
                self._held.add((first, end))
                self._waiting.pop(ticket).set()
