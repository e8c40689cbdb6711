"""Second requests for stragglers: whichever of two answers comes first is taken, and the other one is dropped.

The fast way costs an entry in a table and no task. One task for each backing, `watch`, sleeps until the oldest request
has become a straggler (`stragglers.py` says when) and asks again in its own time. Without that task nothing is asked
twice. docs/concurrency.md, "A straggler"
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

import trio

from qedfs.backing.stragglers import Allowance, Latencies
from qedfs.errors import BackingUnavailable, QedfsError

Ask = Callable[[memoryview], Awaitable[None]]
"""Fills a buffer from the source, or raises. May be called twice, the second time into another buffer."""
Urgent = Callable[[], bool]


class _Request:
    """One under way. `due`: when it becomes a straggler."""

    __slots__ = ("answer", "ask", "due", "length", "patience", "scope", "second", "second_ended", "urgent")

    def __init__(self, ask: Ask, length: int, urgent: Urgent, patience: float, now: float) -> None:
        self.ask = ask
        self.length = length
        self.urgent = urgent
        self.patience = patience
        self.due = now + patience
        self.scope = trio.CancelScope()
        self.second: trio.CancelScope | None = None
        self.second_ended = trio.Event()
        self.answer: bytearray | None = None
        """The bytes of the second one, if that was faster."""


class Hedge:
    """The requests to one source under way. `asked_twice` counts second ones."""

    def __init__(self) -> None:
        self.asked_twice = 0
        self._latencies = Latencies()
        self._allowance = Allowance()
        self._requests: set[_Request] = set()
        self._watched = False
        self._sleeps_until = -math.inf
        self._news = trio.Event()

    async def read(self, ask: Ask, buffer: memoryview, urgent: Urgent) -> None:
        """Fill `buffer` by `ask`, which may be called a second time meanwhile. `urgent`: whether somebody waits, by then.

        Raises what the first call of `ask` raises.
        """
        now, length = trio.current_time(), len(buffer)
        if urgent():
            self._allowance.earn()
        patience = self._latencies.patience(length)
        if patience is None or not self._watched:
            await ask(buffer)
            self._latencies.observe(length, trio.current_time() - now)
            return
        request = _Request(ask, length, urgent, patience, now)
        self._requests.add(request)
        if request.due < self._sleeps_until:
            self._news.set()
        try:
            with request.scope:
                await self._first(request, buffer)
        finally:
            self._requests.discard(request)
            if request.second is not None:
                request.second.cancel()
        # Of a straggler that was dropped, too: it would have taken no less.
        self._latencies.observe(length, trio.current_time() - now)
        if request.scope.cancelled_caught:
            assert request.answer is not None, "only the second one's answer cancels the first"
            buffer[:] = request.answer

    async def _first(self, request: _Request, buffer: memoryview) -> None:
        try:
            await request.ask(buffer)
        except BackingUnavailable:
            if request.second is not None:
                await request.second_ended.wait()  # which cancels this if it has an answer
                await trio.lowlevel.checkpoint_if_cancelled()
            raise

    async def watch(self) -> None:
        """Ask again for stragglers, for ever."""
        async with trio.open_nursery() as nursery:
            self._watched = True
            try:
                while True:
                    self._news = trio.Event()
                    now = trio.current_time()
                    for request in self._requests:
                        if request.due <= now:
                            self._straggles(request, now, nursery)
                    self._sleeps_until = min((request.due for request in self._requests), default=math.inf)
                    with trio.move_on_at(self._sleeps_until):
                        await self._news.wait()
            finally:
                self._watched = False

    def _straggles(self, request: _Request, now: float, nursery: trio.Nursery) -> None:
        if request.urgent() and self._allowance.take():
            request.due = math.inf
            request.second = trio.CancelScope()
            self.asked_twice += 1
            nursery.start_soon(self._ask_again, request, request.second)
        else:
            request.due = now + request.patience  # somebody may wait for it by then, or another one be allowed

    async def _ask_again(self, request: _Request, scope: trio.CancelScope) -> None:
        data = bytearray(request.length)
        try:
            with scope:
                await request.ask(memoryview(data))
                request.answer = data
                request.scope.cancel()
        except QedfsError:
            pass  # the first one's answer, or error, is what counts
        finally:
            request.second_ended.set()
