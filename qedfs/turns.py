"""Long steps of the background in the event loop, one at a time, and after the requests of the guests that wait.

A task of trio runs until it waits, and all that are ready run before anybody looks at a socket again. Bytes of a stream come
in steps of some 100 µs; with four connections, copies and the job behind them half a millisecond passes before a guest's
request is seen that came meanwhile, and as much again for the next one. So who is about to take such a step asks here first:
while a request waits, all but one of them stand aside for a pass through the loop.

It is a courtesy, not a lock: after a few passes the step is taken in any case, so nothing can wait for it forever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

MOST_PASSES = 4
"""Passes through the event loop for which a step stands aside: 2 ms beside guests that never pause."""


class Turns:
    """The turns beside one source of guests' requests; `waiting` tells at once whether a request has not been read yet."""

    def __init__(self, waiting: Callable[[], bool]) -> None:
        self._waiting = waiting
        self._due = False

    def grant(self) -> None:
        """Let one step be taken in the next pass, whoever waits: guests have been served for long enough."""
        self._due = True

    async def take(self) -> None:
        """Return when the step may be taken."""
        for _ in range(MOST_PASSES):
            if self._due or not self._waiting():
                break
            await trio.lowlevel.checkpoint()
        self._due = False


_turns: trio.lowlevel.RunVar[Turns | None] = trio.lowlevel.RunVar("qedfs.turns", default=None)


@contextmanager
def beside(turns: Turns) -> Iterator[None]:
    """Have every long step of this event loop ask `turns` within the context."""
    token = _turns.set(turns)
    try:
        yield
    finally:
        _turns.reset(token)


async def take_turn() -> None:
    """Stand aside while a guest's request waits, if there are guests: before a step of more than some 30 µs.

    It may return without a checkpoint.
    """
    turns = _turns.get()
    if turns is not None:
        await turns.take()
