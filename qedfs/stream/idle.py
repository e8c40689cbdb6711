"""Is this an idle moment? Sans-IO: told counters and what the guest does, it decides.

Busy is: a guest's request waits for the backing, or one did a moment ago; or somebody else uses the leaf's disk or the
network on the way to the backing. "Somebody else" is what the device's counters show minus our own bytes, which is harder
than it sounds:

- Our counters run ahead of the device's. A write is ours when it enters the page cache, and the device sees it seconds
  later, in a burst; what was asked of the backing arrives later too. So own bytes are a *claim* on bytes that the device
  will show. A claim ends when it has been matched, when a flush of ours says that all is on the disk, or with age.
- A device does more for our bytes than our bytes: metadata, journal, headers. A remainder that is small beside our own
  traffic is not somebody else's; nor is one that is small in itself.
- Counters wrap, vanish with their device, and come back; clocks stop with the machine. Then nothing is known for a while,
  and the guest's own requests decide alone. They also do where the device is not known (overlay, network file systems).

What only the guest does locally, without waiting for the backing, is no reason to be busy: a guest that logs five times a
second would otherwise never be streamed. Nor are pressure figures or iowait looked at: they rise from our own work.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from qedfs.config import Idle

SAMPLE_EVERY = 0.5
"""Seconds between samples: a few per `AVERAGE`, and too few to be noticed on an idle machine."""
AFTER_WAIT = 0.25
"""Seconds after a guest's request waited that still count as busy: the next one of a burst comes sooner."""
LONGEST_HOLD = 30.0
"""Seconds of quiet that are asked for at most, on a machine that has just proved to be restless."""
RELAPSE_MEMORY = 300.0
"""Seconds for which a return to busy is remembered; each one doubles the quiet that is asked for."""
AVERAGE = 5.0
"""Seconds over which foreign traffic is averaged: a page of somebody's log is not a load, 100 MB/s are one in the next sample."""
FOREIGN_RATE = 1 << 20
"""Bytes per second of others that make a device busy."""
FOREIGN_SHARE = 0.15
"""The same as a share of our own bytes on the device: headers of TCP take 3–6 %, metadata and journal vary."""
CALM = 0.5
"""Below this part of both limits a busy device is no longer busy."""
WRITE_CLAIM, READ_CLAIM = 60.0, 10.0
"""Seconds for which a claim lasts that nothing else ends. The kernel writes dirty pages back after 30 s, looking every 5."""
LONGEST_STEP = 30.0
"""Seconds between samples beyond which a difference says nothing about now: the machine slept."""


class Traffic(NamedTuple):
    """Bytes since whenever: read and written by a disk, or received and sent by a network."""

    read: int
    written: int


NOTHING = Traffic(0, 0)


@dataclass(frozen=True)
class Sample:
    """One look at the machine, for one disk or for all that share a process, a device and a way to their backings.

    `at` and `waited_at` are seconds of one monotonic clock; all numbers of bytes are counters that only grow.

    A device of None is one that is not known or not concerned. Own counters are to be read after those of the devices.
    """

    at: float
    waiting: int = 0
    """Requests of the guest that wait for the backing now."""
    waited_at: float = -math.inf
    """When the last one stopped waiting."""
    disk: Traffic | None = None
    own_disk: Traffic = NOTHING
    own_flushed: int = 0
    """How much of `own_disk.written` is on the disk for certain: its value when the last flush that has ended began."""
    network: Traffic | None = None
    own_network: Traffic = NOTHING
    """Bytes asked of the backing, and sent to it, if they go over `network`."""


class Reason(Enum):
    """Why the machine is busy."""

    NONE = ""
    GUEST = "guest"
    DISK = "disk"
    NETWORK = "network"
    QUIET = "quiet"
    """It is quiet now, but has not been so for long enough."""


@dataclass(frozen=True)
class Decision:
    """Whether the moment is idle. Foreign rates are in bytes per second; None: not known."""

    idle: bool
    reason: Reason
    foreign_disk: float | None
    foreign_network: float | None


class IdleDetector:
    """Decides for one disk. `mode` may be changed at any time."""

    def __init__(self, mode: Idle) -> None:
        self.mode = mode
        self._disk = _Device(WRITE_CLAIM)
        self._network = _Device(READ_CLAIM)
        self._at: float | None = None
        self._idle = False
        self._busy_at = 0.0
        """When something was last going on."""
        self._relapses: deque[float] = deque()

    def decide(self, sample: Sample) -> Decision:
        """Take in a sample, about every `SAMPLE_EVERY` seconds, and decide."""
        now = sample.at
        step = math.inf if self._at is None else now - self._at
        if self._at is None:
            self._busy_at = now
        self._at = now
        if not 0 < step <= LONGEST_STEP:
            self._disk.forget()
            self._network.forget()
        if step < 0:
            # Times of a clock that was ahead would hold us back until it gets there again.
            self._busy_at = min(self._busy_at, now)
            self._relapses.clear()
        self._disk.observe(now, sample.disk, sample.own_disk, sample.own_flushed)
        self._network.observe(now, sample.network, sample.own_network, 0)
        reason = self._judge(sample)
        return Decision(
            reason is Reason.NONE,
            reason,
            self._disk.rate if sample.disk else None,
            self._network.rate if sample.network else None,
        )

    def _judge(self, sample: Sample) -> Reason:
        if self.mode is Idle.ALWAYS:
            return Reason.NONE
        now = sample.at
        active = now if sample.waiting else min(sample.waited_at, now)
        reason = Reason.GUEST if now - active < AFTER_WAIT else Reason.NONE
        if reason is Reason.NONE and self.mode is Idle.AUTO:
            if self._disk.busy:
                reason, active = Reason.DISK, now
            elif self._network.busy:
                reason, active = Reason.NETWORK, now
        self._busy_at = max(self._busy_at, active)
        if reason is not Reason.NONE:
            if self._idle:
                self._idle = False
                self._relapses.append(now)
            return reason
        if not self._idle and now - self._busy_at >= self._hold(now):
            self._idle = True
        return Reason.NONE if self._idle else Reason.QUIET

    def _hold(self, now: float) -> float:
        """Seconds of quiet to ask for: little on a calm machine; on a restless one more with every mistake."""
        while self._relapses and self._relapses[0] <= now - RELAPSE_MEMORY:
            self._relapses.popleft()
        return min(AFTER_WAIT * 2.0 ** min(len(self._relapses), 16), LONGEST_HOLD)


class _Device:
    """What others do on one device."""

    def __init__(self, write_claim: float) -> None:
        self._reads = _Claims(READ_CLAIM)
        self._writes = _Claims(write_claim)
        self._seen: tuple[Traffic, Traffic] | None = None
        self._foreign: deque[tuple[float, int, int]] = deque()
        """(when, bytes of others, bytes of ours on the device)."""
        self.rate = 0.0
        """Bytes per second of others."""
        self.busy = False

    def forget(self) -> None:
        """Start afresh: what was seen last says nothing about what comes."""
        self._seen = None
        self._foreign.clear()
        self._reads.clear()
        self._writes.clear()
        self.rate, self.busy = 0.0, False

    def observe(self, now: float, device: Traffic | None, own: Traffic, flushed: int) -> None:
        """Take in the counters; `flushed` of what we wrote is on the device."""
        if device is None:
            self.forget()
            return
        seen, self._seen = self._seen, (device, own)
        if seen is None or any(new < old for new, old in zip(device + own, seen[0] + seen[1], strict=True)):
            return  # the first look, or a counter has wrapped: no difference to judge by, so what was known still holds
        before, own_before = seen
        read, written = device.read - before.read, device.written - before.written
        foreign = self._reads.unclaimed(now, read, own.read - own_before.read, own.read)
        foreign += self._writes.unclaimed(now, written, own.written - own_before.written, own.written)
        self._writes.settle(flushed)
        self._foreign.append((now, foreign, read + written - foreign))
        self._average(now)

    def _average(self, now: float) -> None:
        while self._foreign[0][0] <= now - AVERAGE:
            self._foreign.popleft()
        # Over the full time from the beginning, or the first little burst would count as a rate.
        self.rate = sum(foreign for _, foreign, _ in self._foreign) / AVERAGE
        limit = max(FOREIGN_RATE, FOREIGN_SHARE * sum(own for _, _, own in self._foreign) / AVERAGE)
        self.busy = self.rate > (limit * CALM if self.busy else limit)


class _Claims:
    """Own bytes that the device has not shown yet, oldest first."""

    def __init__(self, age: float) -> None:
        self._age = age
        self._claims: deque[tuple[float, int, int]] = deque()
        """(when, our counter then, bytes not matched yet)."""

    def clear(self) -> None:
        self._claims.clear()

    def unclaimed(self, now: float, shown: int, own: int, counter: int) -> int:
        """Return how many of the bytes that the device has shown are not ours, after `own` more that are to come."""
        if own:
            self._claims.append((now, counter, own))
        while self._claims and self._claims[0][0] <= now - self._age:
            self._claims.popleft()
        while shown and self._claims:
            at, upto, amount = self._claims[0]
            if amount > shown:
                self._claims[0] = (at, upto, amount - shown)
                return 0
            self._claims.popleft()
            shown -= amount
        return shown

    def settle(self, flushed: int) -> None:
        """Give up claims on what is on the device already: others took their place, or it was overwritten in memory."""
        while self._claims and self._claims[0][1] <= flushed:
            self._claims.popleft()
