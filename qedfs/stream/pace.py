"""How much the background may copy. Sans-IO: told the time, it says how long to wait before the next piece.

What decides, the strongest first: the cap; the promise to finish; the floor; the idle moment. On an idle machine everything
up to the cap is allowed; on a busy one the floor, or what the promise needs. Once the time of the promise has passed, only
the cap holds.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from enum import Enum

from qedfs.config import StreamOptions

MARGIN, MARGIN_SHARE = 60.0, 0.05
"""Aim this many seconds before the promised time, at most this share of the time given: the last pieces and the commit."""
MOST_DEBT = 10.0
"""Seconds of the floor that copies for the guest may use up in advance; a guest that boots has a right to more."""
MOST_CREDIT = 1.0
"""Seconds of allowance that may be saved up."""
RATE_SPAN = 5.0
"""Seconds over which the rate that people see is counted."""
ETA_SPAN = 60.0
"""Seconds over which the rate behind the time left is averaged, idle and busy moments together."""

LONGEST_ETA = 365 * 86400.0
"""Seconds; more is as good as unknown."""


@dataclass(frozen=True)
class Limits:
    """What the user asks for. Bytes per second; `finish_by` in seconds of the clock that `Pace` is told."""

    cap: int = 0
    """0: none."""
    floor: int = 0
    finish_by: float | None = None

    @classmethod
    def of(cls, options: StreamOptions, now: float) -> Limits:
        """Return the limits that options mean when they are set `now`."""
        finish_by = None if options.finish_by is None else now + options.finish_by
        return cls(options.rate, options.floor, finish_by)


class Why(Enum):
    """Which of the limits decides."""

    IDLE = "idle"
    FLOOR = "floor"
    FINISH_BY = "finish_by"
    CAP = "cap"


@dataclass(frozen=True)
class Allowance:
    """Bytes per second that may be copied now (infinity: all that goes), and why so."""

    rate: float
    why: Why


class Pace:
    """The pace of one disk. `now` is a monotonic clock in seconds."""

    def __init__(self, limits: Limits, now: float) -> None:
        self.allowance = Allowance(0.0, Why.FLOOR)
        self._limits = limits
        self._aim = _aim(limits, now)
        self._began = now
        self._at = now
        self._credit = 0.0
        """Bytes that may be started; below 0: started ahead of time."""
        self._copied: deque[tuple[float, int]] = deque()
        self._fresh = 0
        """Bytes copied since `_at`."""
        self._average = 0.0

    @property
    def limits(self) -> Limits:
        return self._limits

    def set_limits(self, limits: Limits, now: float) -> None:
        """Change what the user asks for; it holds from the next `update` on."""
        if limits.finish_by != self._limits.finish_by:
            self._aim = _aim(limits, now)
        self._limits = limits

    def update(self, now: float, *, idle: bool, remaining: int) -> Allowance:
        """Decide anew, at least once a second and whenever the moment becomes idle or busy.

        `remaining` is what is still to be copied, in bytes.
        """
        self._advance(now)
        rate, why = (math.inf, Why.IDLE) if idle else (float(self._limits.floor), Why.FLOOR)
        if self._aim is not None and not idle:
            needed = remaining / (self._aim - now) if now < self._aim else math.inf
            if needed > rate:
                rate, why = needed, Why.FINISH_BY
        if 0 < self._limits.cap < rate:
            rate, why = float(self._limits.cap), Why.CAP
        if math.isinf(rate):
            self._credit = 0.0
        self.allowance = Allowance(rate, why)
        return self.allowance

    def pause(self, now: float) -> float:
        """Seconds to wait before the next piece; 0: start it; infinity: not before something changes."""
        self._advance(now)
        rate = self.allowance.rate
        if math.isinf(rate):
            return 0.0
        if not rate:
            return math.inf
        return max(0.0, -self._credit / rate)

    def started(self, now: float, length: int) -> None:
        """Note that the background starts a piece of `length` bytes."""
        self._advance(now)
        if not math.isinf(self.allowance.rate):
            self._credit -= length

    def copied(self, now: float, length: int, *, demand: bool) -> None:
        """Note that bytes are local now: copied by the background, or (`demand`) because the guest needed them."""
        self._advance(now)
        if demand and self.allowance.why is Why.FLOOR:
            self._credit = max(self._credit - length, min(self._credit, -MOST_DEBT * self.allowance.rate))
        self._copied.append((now, length))
        self._fresh += length

    def rate(self, now: float) -> float:
        """Bytes per second over the last `RATE_SPAN` seconds."""
        while self._copied and not now - RATE_SPAN < self._copied[0][0] <= now:
            self._copied.popleft()
        span = min(max(now - self._began, 1.0), RATE_SPAN)
        return sum(length for _, length in self._copied) / span

    def eta(self, now: float, remaining: int) -> float | None:
        """Seconds until `remaining` bytes are copied, if all goes on as in the last minute; None: unknown."""
        if not remaining:
            return 0.0
        self._advance(now)
        age = now - self._began
        # An average that began at 0 is too low by the weight of that 0.
        speed = self._average / -math.expm1(-age / ETA_SPAN) if age > 0 else 0.0
        if age < ETA_SPAN:
            # Too early to judge by what was seen: then at least what is allowed at any time.
            speed = max(speed, self._promised())
        return remaining / speed if speed * LONGEST_ETA > remaining else None

    def _promised(self) -> float:
        if not math.isinf(self.allowance.rate):
            return self.allowance.rate
        return float(min(self._limits.floor, self._limits.cap or self._limits.floor))

    def _advance(self, now: float) -> None:
        step, self._at = now - self._at, now
        if step < 0:
            self._began += step  # the clock was set back: keep our age
        if step <= 0:
            return
        rate = self.allowance.rate
        if not math.isinf(rate):
            self._credit = min(self._credit + rate * step, rate * MOST_CREDIT)
        weight = -math.expm1(-step / ETA_SPAN)
        self._average += weight * (self._fresh / step - self._average)
        self._fresh = 0


def _aim(limits: Limits, now: float) -> float | None:
    if limits.finish_by is None:
        return None
    return limits.finish_by - min(MARGIN, MARGIN_SHARE * max(0.0, limits.finish_by - now))
