"""The stream of one disk: brings in what is missing while it may, then lets the image stand alone.

The policy is elsewhere: when (`idle.py`), how fast (`pace.py`), what next (`cursor.py`), how much at once (`flow.py`). The job
asks them before each piece, and a piece that is on its way is never called back. docs/streaming.md, docs/concurrency.md.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Protocol

import trio

from qedfs.backing.window import Token
from qedfs.config import Mode, StreamOptions
from qedfs.disk.fetches import MAX_FETCH, Budget
from qedfs.disk.misses import Misses
from qedfs.disk.populate import Populate
from qedfs.errors import CorruptEntry, QedfsError
from qedfs.stream.cursor import Cursor
from qedfs.stream.flow import Flow
from qedfs.stream.machine import Machine
from qedfs.stream.pace import Limits, Pace, Why
from qedfs.turns import take_turn

log = logging.getLogger(__name__)

TICK = 0.5
"""Seconds after which a job that waits looks again: idle moments come and go, and room on the leaf's disk does."""
SHORTEST_WAIT = 0.001
FIRST_RETRY, LONGEST_RETRY = 0.1, 30.0
"""Seconds to wait after pieces that brought nothing, one after the other: each time twice as long."""


class StreamedDisk(Protocol):
    """What a job needs of its disk; `disk.Disk` is one."""

    mode: Mode
    misses: Misses

    @property
    def name(self) -> str: ...

    @property
    def cluster_size(self) -> int: ...

    @property
    def populate(self) -> Populate | None: ...

    @property
    def may_copy(self) -> bool: ...

    @property
    def resting(self) -> bool: ...

    @property
    def refused(self) -> bool: ...

    @property
    def flushed_at(self) -> float: ...

    @property
    def asked(self) -> int: ...

    def copied(self) -> int: ...

    def remaining(self) -> int | None: ...

    def note(self, error: QedfsError) -> None: ...

    @property
    def news(self) -> trio.Event: ...

    async def complete(self) -> bool: ...


class Job:
    """The stream of `disk`. `flow` is shared by all disks on its backing, `budget` and `machine` by those of the mount.

    `budget` counts the bytes of all pieces under way, of any backing: it bounds memory, and its turns are fair.
    """

    def __init__(
        self, disk: StreamedDisk, options: StreamOptions, *, flow: Flow, budget: Budget, machine: Machine
    ) -> None:
        now = trio.current_time()
        self._disk = disk
        self._flow = flow
        self._budget = budget
        self._machine = machine
        self._pace = Pace(Limits.of(options, now), now)
        self._finish_by = options.finish_by
        self._paused = False
        self._changed = trio.Event()
        self._ended = trio.Event()
        self._cursor: Cursor | None = None
        self._profile: tuple[tuple[int, int], ...] = ()
        """What the cursor has not been told of yet."""
        self._replaying = False
        self._misses = disk.misses.count
        self._copied = disk.copied()
        self._streamed = 0
        self._updated_at = -float("inf")
        self._failures = 0
        self._retry_at = -float("inf")
        self.damaged = False
        """What is still missing cannot be had, because the backing is damaged there."""

    # -- what can be set and seen ----------------------------------------------------------------------------------------

    @property
    def paused(self) -> bool:
        return self._paused

    @paused.setter
    def paused(self, paused: bool) -> None:
        self._paused = paused
        self._tell()

    @property
    def rate_limit(self) -> int:
        """Bytes per second at most; 0: no limit."""
        return self._pace.limits.cap

    @property
    def floor(self) -> int:
        """Bytes per second that are copied on a busy machine, too."""
        return self._pace.limits.floor

    @property
    def finish_by(self) -> float | None:
        """The seconds that were given when this was set, None for no promise."""
        return self._finish_by

    def replay(self, profile: Iterable[tuple[int, int]]) -> None:
        """Bring these ranges of clusters in first and at once, in every mode but `cow`, idle moment or not.

        Everything else that stops a copy stops these, too: `paused`, the cap, the window, the reserve, a hold.
        """
        self._profile = tuple(profile)
        self._replaying = bool(self._profile)
        self._tell()

    def set_limits(self, *, rate: int | None = None, floor: int | None = None) -> None:
        """Change the cap or the floor, in bytes per second."""
        limits = self._pace.limits
        cap = limits.cap if rate is None else rate
        self._set(Limits(cap, limits.floor if floor is None else floor, limits.finish_by))

    def set_finish_by(self, seconds: float | None) -> None:
        """Promise to be done in so many seconds from now, or (None) nothing."""
        self._finish_by = seconds
        limits = self._pace.limits
        self._set(Limits(limits.cap, limits.floor, None if seconds is None else trio.current_time() + seconds))

    @property
    def rate(self) -> float:
        """Bytes per second that became local over the last seconds."""
        return self._pace.rate(trio.current_time()) if self.wanted else 0.0

    @property
    def eta(self) -> float | None:
        """Seconds until everything is local, if all goes on like that; None: not known, or not streaming."""
        remaining = self._disk.remaining()
        if not self.wanted or self._paused or remaining is None:
            return None
        return self._pace.eta(trio.current_time(), remaining)

    @property
    def wanted(self) -> bool:
        """Whether the disk is to be streamed, at whatever time."""
        return self._disk.mode is Mode.STREAM and self._disk.populate is not None

    def state(self, of_disk: str) -> str:
        """Return the state as in the interface, where the disk alone would be in the state `of_disk`."""
        if of_disk != "passive" or not self.wanted:
            return of_disk
        if self._paused:
            return "paused"
        if self.damaged:
            return "backing-error"
        return "idle-wait" if self._pace.allowance.why is Why.FLOOR else "streaming"

    # -- the work --------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Stream whenever it is wanted, until the image stands alone or this is cancelled."""
        async with trio.open_nursery() as pieces:
            while (populate := self._disk.populate) is not None:
                if not self._may_go():
                    await self._news(float("inf"))
                    continue
                with self._machine.watching(self._disk):
                    while self._may_go() and self._disk.populate is not None:
                        await self._go(populate, pieces)

    def _may_go(self) -> bool:
        return (self.wanted or self._replays) and not self._paused and self._disk.may_copy

    @property
    def _replays(self) -> bool:
        return self._replaying and self._disk.mode is not Mode.COW

    async def _go(self, populate: Populate, pieces: trio.Nursery) -> None:
        """Start one piece, or wait for what it needs."""
        await take_turn()
        now = trio.current_time()
        self._decide(now)
        pause = max(
            self._pace.pause(now), self._retry_at - now, TICK if self._disk.resting or self._disk.refused else 0
        )
        if pause > 0:
            # Not for less than the clock of the event loop can tell: that would not be waiting.
            await self._news(min(max(pause, SHORTEST_WAIT), TICK))
            return
        cursor = self._at(populate)
        most = max(1, min(self._flow.piece, MAX_FETCH) // self._disk.cluster_size)
        taken = cursor.take_profile(most)
        if taken is None and self._replaying:
            self._replaying = False  # from now on at the pace of a stream, if it is one
            return
        if taken is None:
            taken = cursor.take(most)
        if taken is not None:
            await self._begin(populate, taken, pieces)
        elif cursor.under_way:
            with trio.move_on_after(TICK):
                await self._ended.wait()
        else:
            await self._finish()

    def _at(self, populate: Populate) -> Cursor:
        """Return the cursor, told of what has changed."""
        if self._cursor is None:
            self._cursor = Cursor(populate.total, self._disk.cluster_size, populate.next_missing)
        self._cursor.total = populate.total
        self._cursor.follow(self._profile)
        self._profile = ()
        for miss in self._disk.misses.since(self._misses)[-1:]:
            self._cursor.missed(miss.pos // self._disk.cluster_size)
        self._misses = self._disk.misses.count
        return self._cursor

    async def _begin(self, populate: Populate, taken: tuple[int, int], pieces: trio.Nursery) -> None:
        """Look what of a range is missing, wait for its turn, and send it on its way."""
        assert self._cursor is not None
        handed_over = False
        try:
            if self._replaying:
                # A guest has read there: it is hardly zeros, and a round trip for each question would cost more.
                missing = await populate.look_here(*taken)
            else:
                missing = await populate.look(*taken, widely=True)
                pieces.start_soon(self._scout, populate, taken[1])
            length = sum(end - first for first, end in missing) * self._disk.cluster_size
            if missing:
                await populate.room(length)
                await self._budget.reserve(length)
                try:
                    token = await self._flow.admit(length)
                except BaseException:
                    self._budget.release(length)
                    raise
                self._pace.started(trio.current_time(), length)
                pieces.start_soon(self._piece, populate, taken, length, token)
                handed_over = True
        except QedfsError as error:
            self._failed(error)
        finally:
            if not handed_over:
                self._cursor.release(taken)

    async def _scout(self, populate: Populate, cluster: int) -> None:
        try:
            await populate.scout(cluster)
        except QedfsError as error:
            log.debug("%s: %s", self._disk.name, error)  # whoever needs the answer will ask again, and tell

    async def _piece(self, populate: Populate, taken: tuple[int, int], length: int, token: Token) -> None:
        assert self._cursor is not None
        answered = False
        try:
            try:
                await take_turn()
                # Looked up again: what has become local while it waited for its turn is left out.
                bringing = populate.bring(list(populate.missing(*taken)))
                await bringing.arrived()
                answered = True
            finally:
                self._flow.ended(token, answered=answered)
            await bringing.linked()
            left = sum(end - first for first, end in populate.missing(*taken)) * self._disk.cluster_size
            self._brought(max(0, length - left))
            if left and not self._disk.resting:
                self._failed(None)  # a guest is writing there; soon it will be local or free
        except QedfsError as error:
            self._failed(error)
        finally:
            self._budget.release(length)
            self._cursor.release(taken)
            self._ended.set()
            self._ended = trio.Event()

    async def _finish(self) -> None:
        try:
            if not await self._disk.complete():
                self._failed(None)
        except QedfsError as error:
            self._failed(error)

    def _brought(self, length: int) -> None:
        if not length:
            return
        self._streamed += length
        self._pace.copied(trio.current_time(), length, demand=False)
        self._failures, self.damaged = 0, False

    def _failed(self, error: QedfsError | None) -> None:
        self._failures += 1
        self._retry_at = trio.current_time() + min(FIRST_RETRY * 2.0 ** min(self._failures - 1, 30), LONGEST_RETRY)
        if error is not None:
            # Nothing else came in the meantime: what is left is what is damaged.
            self.damaged = isinstance(error, CorruptEntry)
            self._disk.note(error)

    def _decide(self, now: float) -> None:
        # A guest that boots waits, but for nothing more than for this.
        idle = self._replays or self._machine.idle(self._disk)
        if now - self._updated_at < TICK and idle is (self._pace.allowance.why is Why.IDLE):
            return
        self._updated_at = now
        copied, self._copied = self._disk.copied() - self._copied, self._disk.copied()
        streamed, self._streamed = self._streamed, 0
        if copied > streamed:
            self._pace.copied(now, copied - streamed, demand=True)
        self._pace.update(now, idle=idle, remaining=self._disk.remaining() or 0)

    def _set(self, limits: Limits) -> None:
        self._pace.set_limits(limits, trio.current_time())
        self._updated_at = -float("inf")
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _news(self, seconds: float) -> None:
        """Return when something has changed that decides, or after so many seconds."""
        # Ordering: both are looked up before the first await, as the next change may come before a task of ours has run.
        events = self._changed, self._disk.news
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:

                async def end_with(event: trio.Event) -> None:
                    await event.wait()
                    nursery.cancel_scope.cancel()

                for event in events:
                    nursery.start_soon(end_with, event)
