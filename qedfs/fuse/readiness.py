"""How pyfuse3's main loop waits for the next request: without the event loop, as long as requests keep coming.

A pass through trio's event loop costs about as much as all the rest of a small request, and `trio.Lock` makes one at
every acquire, even when it is free. pyfuse3 finds both `trio.Lock` and `trio.lowlevel.wait_readable` through the name
`trio` in its own module (`pyfuse3.asyncio` replaces that name in the same way). Here it gets a namespace in which these
two are others:

- waiting asks `poll(0)` first, then, while requests follow each other closely, asks again for a few microseconds, and
  only then parks in the event loop;
- the lock is a flag, with a pass through the event loop every half millisecond, so that sockets, timers and threads are
  served under any load.

Where pyfuse3 does not look like this any more, everything works as before, only slower.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import pyfuse3
import trio

from qedfs.turns import Turns, beside

LOOP_INTERVAL = 500e-6
"""Seconds between passes through the event loop while requests keep coming: the longest that sockets, timers and threads
wait for their turn. A pass costs 20 to 25 µs, as much as a small request; without any, other tasks waited for 0.4 s."""

_PARK_COST = 40e-6
"""Seconds from the arrival of a request to the end of a wait that was parked in the event loop."""
_PREEMPTED = 200e-6
"""Seconds between two looks at the clock while polling, above which somebody else had our processor."""
_PAUSE = 0.05
"""Seconds without polling after that."""


def waits_as_known() -> bool:
    """Whether this pyfuse3 finds `trio` in the way that `short_waits` relies on."""
    return vars(pyfuse3).get("trio") is trio


@contextmanager
def short_waits(poll: int, *, first: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Make pyfuse3 wait in this module's way within the context; `poll` is the longest busy-poll in microseconds.

    `first` is called before each wait until it has returned True. Only where `waits_as_known`.
    """
    names = vars(pyfuse3)
    # Polling on the only processor would keep the client from making its next request.
    several = len(os.sched_getaffinity(0)) > 1
    wait = ShortWait(poll * 1e-6 if several else 0.0, first=first)
    turns = Turns(wait.ready)
    names["trio"] = _Namespace(wait, partial(ShortLock, before_pass=turns.grant))
    try:
        with beside(turns):
            yield
    finally:
        names["trio"] = trio


class ShortWait:
    """Waits until a descriptor is readable, with as little of the event loop as pays.

    Polls for up to `limit` seconds if the wait before ended so soon that polling would have caught it; never while
    requests are far apart, and not for a while after the polling was preempted. An idle descriptor costs nothing.
    """

    def __init__(
        self,
        limit: float,
        *,
        first: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.perf_counter,
        park: Callable[[int], Any] = trio.lowlevel.wait_readable,
    ) -> None:
        self._limit = limit
        self._clock = clock
        self._park = park
        self._first: Callable[[], bool] | None = first
        self._polls: dict[int, Callable[[int], object]] = {}
        self._close_by = False
        self._resume = 0.0

    def ready(self) -> bool:
        """Whether a descriptor that is waited for is readable now."""
        return any(ready(0) for ready in self._polls.values())

    async def __call__(self, fd: int) -> None:
        if self._first is not None and self._first():
            self._first = None
        ready = self._polls.get(fd) or self._register(fd)
        if ready(0) or (self._close_by and self._poll(ready)):
            return
        start = self._clock()
        await self._park(fd)
        end = self._clock()
        self._close_by = end - start < self._limit + _PARK_COST and end >= self._resume and self._limit > 0

    def _poll(self, ready: Callable[[int], object]) -> bool:
        """Whether the descriptor became readable within the limit."""
        clock = self._clock
        now = clock()
        end = now + self._limit
        while now < end:
            if ready(0):
                return True
            before, now = now, clock()
            if now - before > _PREEMPTED:
                self._resume = now + _PAUSE
                break
        return False

    def _register(self, fd: int) -> Callable[[int], object]:
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        return self._polls.setdefault(fd, poller.poll)


class ShortLock:
    """Mutual exclusion between tasks, without a pass through the event loop when it is free.

    Unlike `trio.Lock` it is not fair: whoever comes first takes it, also before a waiter that has been woken but has
    not run yet. pyfuse3's workers are equals, so only the work counts, not who does it.
    """

    def __init__(
        self, *, before_pass: Callable[[], object] = lambda: None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """`before_pass` is called before each pass through the event loop."""
        self._before_pass = before_pass
        self._held = False
        self._clock = clock
        self._next_pass = 0.0
        self._waiting = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        if self._clock() >= self._next_pass:
            self._before_pass()
            await trio.lowlevel.checkpoint()
            self._next_pass = self._clock() + LOOP_INTERVAL
        while self._held:
            await self._waiting.park()
        self._held = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._held = False
        # INVARIANT: whenever the lock is free, either nobody waits or one waiter has been woken.
        if self._waiting:
            self._waiting.unpark()


class _Namespace:
    """`trio`, as pyfuse3 sees it."""

    def __init__(self, wait_readable: ShortWait, lock: Callable[[], ShortLock]) -> None:
        self.lowlevel = _Lowlevel(wait_readable)
        self.Lock = lock

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


class _Lowlevel:
    """`trio.lowlevel`, as pyfuse3 sees it."""

    def __init__(self, wait_readable: ShortWait) -> None:
        self.wait_readable = wait_readable

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)
