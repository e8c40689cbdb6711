"""A machine in simulated time: what its disk, network and guest do all day, and a background that copies when it may.

It knows the truth (when something was going on), so that decisions can be judged by it.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from qedfs.config import Idle
from qedfs.stream.idle import Decision, IdleDetector, Sample, Traffic
from qedfs.stream.pace import Limits, Pace

MIB = 1 << 20
HOUR, DAY = 3600.0, 86400.0
PIECE = 16 * MIB
"""Larger than in life, so that a day takes a second or two."""
WRITEBACK = 5.0
"""Seconds until the kernel writes a dirty page back that nobody flushes."""


@dataclass(frozen=True)
class Load:
    """What others and the guest do in one step: bytes per second, and whether the guest had to wait for the backing."""

    disk_read: float = 0.0
    disk_written: float = 0.0
    received: float = 0.0
    waits: bool = False
    guest_written: float = 0.0
    """By the guest through us, to what is local: our own bytes for the counters, and no reason to be busy."""

    @property
    def busy(self) -> bool:
        return self.waits or max(self.disk_read, self.disk_written, self.received) > 2 * MIB


QUIET = Load()


@dataclass
class Machine:
    """A machine with one leaf that is streamed over a network."""

    load: Callable[[float], Load]
    """What goes on at a time of day."""
    link: float = 16 * MIB
    """Bytes per second that the backing delivers at most."""
    step: float = 1.0
    limits: Limits = field(default_factory=lambda: Limits(floor=MIB))
    remaining: int = 1 << 50
    mode: Idle = Idle.AUTO
    flush_every: float = 1.0
    """Seconds between commits of ours; infinity for none."""
    overhead: float = 0.05
    """Bytes that disk and network move besides ours, as a share of them."""
    damage: Callable[[float, Sample], Sample] = lambda now, sample: sample
    """What happens to the counters before they are seen."""
    now: float = 0.0
    switches: list[float] = field(default_factory=list)
    """When an idle moment began or ended."""
    copied: list[tuple[float, int]] = field(default_factory=list)
    decisions: list[tuple[float, Decision]] = field(default_factory=list)
    was_busy: list[tuple[float, bool]] = field(default_factory=list)
    """The truth."""

    def __post_init__(self) -> None:
        self.detector = IdleDetector(self.mode)
        self.pace = Pace(self.limits, self.now)
        self._disk = [0.0, 0.0]
        self._own_written = 0.0
        self._flushed = 0.0
        self._flushed_at = 0.0
        self._received = self._asked = 0.0
        self._waited_at = -math.inf
        self._dirty: deque[tuple[float, float]] = deque()
        self._idle: bool | None = None

    def run(self, until: float) -> None:
        while self.now < until and self.remaining > 0:
            self._step()

    def _step(self) -> None:
        load = self.load(self.now)
        self.now += self.step
        self._disk[0] += load.disk_read * self.step
        self._disk[1] += load.disk_written * self.step
        self._received += load.received * self.step
        if load.waits:
            self._waited_at = self.now
        self._dirtied(load.guest_written * self.step)
        decision = self.detector.decide(self.damage(self.now, self._sample()))
        if self._idle is not None and decision.idle != self._idle:
            self.switches.append(self.now)
        self._idle = decision.idle
        self.decisions.append((self.now, decision))
        self.was_busy.append((self.now, load.busy))
        self.pace.update(self.now, idle=decision.idle, remaining=self.remaining)
        self._copy()
        self._write_back()

    def _sample(self) -> Sample:
        return Sample(
            at=self.now,
            waited_at=self._waited_at,
            disk=Traffic(int(self._disk[0]), int(self._disk[1])),
            own_disk=Traffic(0, int(self._own_written)),
            own_flushed=int(self._flushed),
            network=Traffic(int(self._received), 0),
            own_network=Traffic(int(self._asked), 0),
        )

    def _copy(self) -> None:
        room = self.link * self.step
        while room > 0 and self.remaining > 0 and self.pace.pause(self.now) <= 0:
            length = min(PIECE, self.remaining)
            self.pace.started(self.now, length)
            self.pace.copied(self.now, length, demand=False)
            self.copied.append((self.now, length))
            self.remaining -= length
            self._asked += length
            self._received += length * (1 + self.overhead)
            self._dirtied(length)
            room -= length

    def _dirtied(self, length: float) -> None:
        if length:
            self._own_written += length
            self._dirty.append((self.now, length))

    def _write_back(self) -> None:
        """The kernel writes what is old; a commit of ours, what there is."""
        flushing = self.now - self._flushed_at >= self.flush_every
        while self._dirty and (flushing or self._dirty[0][0] <= self.now - WRITEBACK):
            self._disk[1] += self._dirty.popleft()[1] * (1 + self.overhead)
        if flushing:
            self._flushed, self._flushed_at = self._own_written, self.now

    # -- the verdict ---------------------------------------------------------------------------------------------------

    def switches_an_hour(self) -> float:
        """The most in any hour."""
        hours: dict[int, int] = {}
        for at in self.switches:
            hours[int(at // HOUR)] = hours.get(int(at // HOUR), 0) + 1
        return max(hours.values(), default=0)

    def used(self, least_gap: float = 60.0) -> float:
        """The share of the time in which nothing was going on, for `least_gap` seconds at least, that was found idle."""
        gaps = self._gaps(least_gap)
        found = sum(decision.idle for at, decision in self.decisions if at in gaps)
        return found / len(gaps)

    def found_idle_while_busy(self) -> float:
        """The share of the time in which something was going on that was taken for idle."""
        busy = {at for at, busy in self.was_busy if busy}
        return sum(decision.idle for at, decision in self.decisions if at in busy) / max(1, len(busy))

    def rate_while_not_idle(self) -> float:
        """Bytes per second that were copied in moments not found idle."""
        idle = {at for at, decision in self.decisions if decision.idle}
        return sum(n for at, n in self.copied if at not in idle) / max(
            1.0, (len(self.decisions) - len(idle)) * self.step
        )

    def _gaps(self, least: float) -> set[float]:
        gaps: set[float] = set()
        gap: list[float] = []
        for at, busy in [*self.was_busy, (math.inf, True)]:
            if not busy:
                gap.append(at)
                continue
            if len(gap) * self.step >= least:
                gaps |= set(gap)
            gap = []
        return gaps


def spells(chance: random.Random, busy: float, quiet: float, until: float = DAY) -> Callable[[float], bool]:
    """Something that comes and goes: spells of `busy` seconds on average, `quiet` seconds apart."""
    ends: list[tuple[float, float]] = []
    at = 0.0
    while at < until:
        at += chance.expovariate(1 / quiet)
        ends.append((at, at + chance.expovariate(1 / busy)))
        at = ends[-1][1]
    ends.append((math.inf, math.inf))
    place = 0

    def going_on(now: float) -> bool:
        nonlocal place
        while ends[place][1] <= now:
            place += 1
        return ends[place][0] <= now

    return going_on
