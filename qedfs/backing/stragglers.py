"""When a request has taken so long that a second one is worth its load, and how many of these there may be. Sans-IO.

A request of which a guest waits is asked a second time when the first has taken `FACTOR` times as long as 19 of 20
lately. Slow servers must not be made slower by that, so of a hundred requests at most five are asked twice, however
slow they are; and where all have become slow, so has the measure.
"""

from __future__ import annotations

from collections import deque

FACTOR = 2.0
"""Times the 95th percentile. Lower, and ordinary jitter of a network spends what is allowed for stragglers."""
LEAST = 0.02
"""Seconds that a request always has: below, a busy event loop looks like a slow server."""
SAMPLES, FEWEST = 64, 20
"""Times that are remembered for each size of requests; fewer say nothing about one in twenty."""
SHARE = 0.05
"""Second requests for each first one that somebody waits for."""
BURST = 4.0
"""Second requests that may have been saved up: a pause of one disk of the server catches some requests together."""
_RENEW = 8
"""Times to come in before the percentile is computed anew."""


class Latencies:
    """How long requests take, by size: a megabyte takes longer than a cluster, and a window of each is remembered."""

    def __init__(self) -> None:
        self._seen: dict[int, deque[float]] = {}
        self._patience: dict[int, float] = {}
        self._new: dict[int, int] = {}

    def observe(self, length: int, seconds: float) -> None:
        """Note that a request of `length` bytes was answered, or given up, after `seconds`."""
        kind = length.bit_length()
        seen = self._seen.setdefault(kind, deque(maxlen=SAMPLES))
        seen.append(seconds)
        self._new[kind] = self._new.get(kind, _RENEW) + 1
        if len(seen) >= FEWEST and self._new[kind] >= _RENEW:
            self._new[kind] = 0
            self._patience[kind] = max(LEAST, FACTOR * sorted(seen)[int(0.95 * len(seen))])

    def patience(self, length: int) -> float | None:
        """Return the seconds after which a request of `length` bytes is a straggler; None while that is not known."""
        return self._patience.get(length.bit_length())


class Allowance:
    """How many second requests there may be."""

    def __init__(self) -> None:
        self._saved = 1.0

    def earn(self) -> None:
        """Note a first request that somebody waits for."""
        self._saved = min(BURST, self._saved + SHARE)

    def take(self) -> bool:
        """Whether there may be a second request now; it is counted."""
        if self._saved < 1.0:
            return False
        self._saved -= 1.0
        return True
