"""Bytes on their way from the backing: every cluster is fetched once, however many readers want it.

A fetch belongs to the disk, not to a caller. Waiters join and leave, each with its own deadline; an error or a
cancellation of one is never the answer of another (docs/concurrency.md).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from qedfs.errors import BackingUnavailable, QedfsError

MAX_FETCH = 1 << 20
"""Bytes of one fetch, and the largest cluster that is fetched whole. Larger runs are several fetches."""
COPY_BUDGET = 64 << 20
"""Bytes fetched for copying that are not yet in the leaf; more, and readers wait for the leaf."""


class Bytes(Protocol):
    """The part of a backing that is needed here: zeros past its end, patient with what may pass."""

    async def read_into(self, pos: int, buffer: memoryview, *, urgent: Callable[[], bool]) -> None: ...


class Fetch:
    """The clusters `[first, end)` on their way, for a disk of `size` bytes. `buffer` is whole once `done` is set."""

    __slots__ = ("buffer", "copy", "done", "end", "ended", "error", "first", "scope", "size", "waiters", "wanted")

    def __init__(self, first: int, end: int, size: int, *, copy: bool, wanted: bool) -> None:
        self.first = first
        self.end = end
        self.size = size
        self.copy = copy
        """Its clusters go into the leaf behind the answer."""
        self.wanted = wanted
        """It is fetched for its own sake, so it goes on when nobody waits."""
        self.buffer = bytearray()
        self.done = trio.Event()
        """The bytes are here, or never will be."""
        self.ended = trio.Event()
        """It is also copied, as far as it could be."""
        self.error: QedfsError | None = None
        self.waiters = 0
        self.scope = trio.CancelScope()


class Budget:
    """An amount of bytes that is reserved in order of arrival. One reservation is always admitted, however large."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._reserved = 0
        self._queue: deque[tuple[int, trio.Event]] = deque()

    def available(self, amount: int) -> bool:
        """Whether `reserve(amount)` would not wait."""
        return not self._queue and (not self._reserved or self._reserved + amount <= self._capacity)

    async def reserve(self, amount: int) -> None:
        if self.available(amount):
            self._reserved += amount
            return
        entry = (amount, trio.Event())
        self._queue.append(entry)
        try:
            await entry[1].wait()
        except BaseException:
            if entry[1].is_set():
                Budget.release(self, amount)
            else:
                self._queue.remove(entry)
                self._admit()
            raise

    def release(self, amount: int) -> None:
        self._reserved -= amount
        self._admit()

    def _admit(self) -> None:
        while self._queue:
            amount, event = self._queue[0]
            if self._reserved and self._reserved + amount > self._capacity:
                return
            self._queue.popleft()
            self._reserved += amount
            event.set()


class Share(Budget):
    """A part of the budget `whole`: what is reserved here is reserved there, too, and at most `capacity` of it."""

    def __init__(self, capacity: int, whole: Budget) -> None:
        super().__init__(capacity)
        self._whole = whole

    async def reserve(self, amount: int) -> None:
        await super().reserve(amount)
        try:
            await self._whole.reserve(amount)
        except BaseException:
            super().release(amount)
            raise

    def release(self, amount: int) -> None:
        super().release(amount)
        self._whole.release(amount)


class Fetches:
    """The fetches of one disk under way, by cluster.

    `copy` brings a fetch that has ended into the leaf; it never raises and never waits for a claim.
    """

    def __init__(
        self, backing: Bytes, cluster_size: int, nursery: trio.Nursery, copy: Callable[[Fetch], Awaitable[None]]
    ) -> None:
        self._backing = backing
        self._cluster_size = cluster_size
        self._most = max(1, MAX_FETCH // cluster_size)
        self._nursery = nursery
        self._copy = copy
        self._budget = Budget(COPY_BUDGET)
        # INVARIANT: a fetch is here from its start until its copy has ended, or it has failed, or nobody wants it.
        self._by_cluster: dict[int, Fetch] = {}

    def join(self, first: int, end: int, size: int, *, copy: bool, wanted: bool = False) -> list[Fetch]:
        """Return fetches that cover `[first, end)`, in order: those under way, and new ones for what is missing.

        No await: the caller has just looked these clusters up, and waits for the fetches with `wait`.
        """
        result: list[Fetch] = []
        while first < end:
            fetch = self._by_cluster.get(first)
            if fetch is None:
                limit = min(end, first + self._most)
                stop = next((c for c in range(first + 1, limit) if c in self._by_cluster), limit)
                fetch = self._start(first, stop, size, copy=copy, wanted=wanted)
            result.append(fetch)
            first = fetch.end
        return result

    def not_under_way(self, pos: int, end: int) -> int:
        """Return how many of the bytes `[pos, end)` are in clusters of which there is no fetch."""
        size = self._cluster_size
        missing = (c for c in range(pos // size, -(-end // size)) if c not in self._by_cluster)
        return sum(min(end, (cluster + 1) * size) - max(pos, cluster * size) for cluster in missing)

    async def ended(self) -> None:
        """Return when none is under way. The caller makes no new ones."""
        while self._by_cluster:
            await next(iter(self._by_cluster.values())).ended.wait()

    async def room(self, length: int) -> None:
        """Return when `length` bytes could be fetched for copying without waiting for earlier copies. Takes nothing."""
        await self._budget.reserve(length)
        self._budget.release(length)

    def widen(self, first: int, end: int, size: int) -> bool:
        """Start fetching for copying what of `[first, end)` is not under way, if the budget allows it at once."""
        if not self._budget.available((end - first) * self._cluster_size):
            return False
        self.join(first, end, size, copy=True, wanted=True)
        return True

    async def wait(self, fetches: list[Fetch]) -> list[memoryview]:
        """Return the bytes of `fetches`, which `join` has just returned, when they have come.

        Raises:
            BackingRefused, CorruptEntry: the backing failed for good.
            BackingUnavailable: the disk is being closed.
        """
        # All are waited for from now on: whoever leaves the second while this caller waits for the first is not its last.
        for fetch in fetches:
            fetch.waiters += 1
        try:
            for fetch in fetches:
                if not fetch.done.is_set():
                    await fetch.done.wait()
                if fetch.error is not None:
                    raise type(fetch.error)(fetch.error.what, fetch.error.why) from fetch.error
        finally:
            for fetch in fetches:
                self._leave(fetch)
        return [memoryview(fetch.buffer) for fetch in fetches]

    def _leave(self, fetch: Fetch) -> None:
        fetch.waiters -= 1
        if not fetch.waiters and not fetch.wanted and not fetch.done.is_set():
            self._forget(fetch)
            fetch.scope.cancel()

    def _start(self, first: int, end: int, size: int, *, copy: bool, wanted: bool) -> Fetch:
        fetch = Fetch(first, end, size, copy=copy, wanted=wanted)
        for cluster in range(first, end):
            self._by_cluster[cluster] = fetch
        self._nursery.start_soon(self._run, fetch)
        return fetch

    def _forget(self, fetch: Fetch) -> None:
        for cluster in range(fetch.first, fetch.end):
            if self._by_cluster.get(cluster) is fetch:
                del self._by_cluster[cluster]

    async def _run(self, fetch: Fetch) -> None:
        length = (fetch.end - fetch.first) * self._cluster_size
        reserved = 0
        try:
            with fetch.scope:
                if fetch.copy:
                    await self._budget.reserve(length)
                    reserved = length
                await self._read(fetch, length)
                # What follows is not cancelled any more: the bytes are here.
                fetch.done.set()
            if fetch.done.is_set() and fetch.copy and fetch.error is None:
                with trio.CancelScope(shield=True):
                    await self._copy(fetch)
        except QedfsError as error:
            fetch.error = error
        finally:
            # Ordering: first out of the table, then awake the waiters: who comes after a failure starts afresh.
            self._forget(fetch)
            self._budget.release(reserved)
            if not fetch.done.is_set() and fetch.error is None:
                fetch.error = BackingUnavailable("backing", "the disk is being closed")
            fetch.done.set()
            fetch.ended.set()

    async def _read(self, fetch: Fetch, length: int) -> None:
        buffer = bytearray(length)
        pos = fetch.first * self._cluster_size
        # Past the end of the disk there is nothing of the backing's: those bytes stay zeros, or a growth of the disk
        # would show them.
        inside = min(length, fetch.size - pos)
        await self._backing.read_into(pos, memoryview(buffer)[:inside], urgent=lambda: fetch.waiters > 0)
        fetch.buffer = buffer
