"""What the guest had to wait for: how many requests wait for the backing, and which clusters were missed. Sans-IO."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

REMEMBERED = 4096
"""Newest misses kept for whoever asks; one who looks every second misses none of a guest that waits for each."""


class Miss(NamedTuple):
    """A request, or a part of one, that had to go to the backing: `length` bytes at `pos` of the disk."""

    pos: int
    length: int


class Misses:
    """The misses of one disk. `clock` is any monotonic clock in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.waiting = 0
        """Requests that wait for the backing now."""
        self.waited_at = -math.inf
        """When the last one stopped waiting."""
        self.waited = 0.0
        """Seconds that those which do not wait any more have waited, all together."""
        self.count = 0
        """All misses so far."""
        self._newest: deque[Miss] = deque(maxlen=REMEMBERED)

    @contextmanager
    def wait(self, pos: int, length: int) -> Iterator[None]:
        """Note a miss that lasts as long as the block."""
        self._newest.append(Miss(pos, length))
        self.count += 1
        self.waiting += 1
        began = self._clock()
        try:
            yield
        finally:
            self.waiting -= 1
            self.waited_at = self._clock()
            self.waited += self.waited_at - began

    def since(self, count: int) -> list[Miss]:
        """Return the misses after the first `count`, oldest first, as far as they are remembered."""
        new = min(self.count - count, len(self._newest))
        return [self._newest[i - new] for i in range(new)] if new > 0 else []
