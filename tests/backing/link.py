"""A link in virtual time: what a backing behind it does to requests. A thousand simulated seconds take a few real ones."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from qedfs.backing.window import Window

DEMAND = 4096
"""Bytes that a guest's miss asks for in these simulations."""


@dataclass
class Link:
    """One queue in front of a wire. Bytes per second, seconds; both may be changed by events while it runs."""

    rate: float
    round_trip: float
    jitter: float = 0.0
    """Seconds that each request may take longer, at random."""
    late: float = 0.0
    """Seconds that an answer waits for an event loop or a processor somewhere, on average, outside the queue."""
    free_at: float = 0.0
    down_until: float = 0.0

    def answered_at(self, now: float, length: int, chance: random.Random) -> float:
        """The time at which the last byte of a request sent `now` arrives."""
        arrival = now + self.round_trip / 2 + self.jitter * chance.random()
        self.free_at = max(self.free_at, arrival, self.down_until) + length / self.rate
        return self.free_at + self.round_trip / 2 + (chance.expovariate(1 / self.late) if self.late else 0.0)


@dataclass
class Run:
    """A background reader that always wants more, and a guest that misses now and then, on one link."""

    link: Link
    window: Window = field(default_factory=lambda: Window(32 << 20))
    seed: int = 1
    demand_every: float = 0.05
    """Seconds between misses, on average; 0 for none."""
    length: Callable[[int], int] = lambda piece: piece
    """Bytes of the next request, at most the piece."""
    now: float = 0.0
    answers: list[tuple[float, int]] = field(default_factory=list)
    """When how many background bytes arrived."""
    demands: list[tuple[float, float]] = field(default_factory=list)
    """(when asked, how long it took)."""

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._wants = True
        if self.demand_every:
            self.at(self._pause(), self._demand)

    def at(self, when: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, action))

    def run(self, until: float) -> None:
        self._fill()
        while self._events and self._events[0][0] <= until:
            self.now, _, action = heapq.heappop(self._events)
            action()
        self.now = until

    def want(self, wants: bool) -> None:
        """The reader is paused, or goes on."""
        self._wants = wants
        self._fill()

    def cross(self, rate: float, until: float, size: int = 64 << 10) -> None:
        """Others send at `rate` bytes per second through the same queue."""
        if self.now < until:
            self.link.answered_at(self.now, size, self._chance)
            self.at(self.now + size / rate, lambda: self.cross(rate, until, size))

    def rate(self, since: float, until: float) -> float:
        """Bytes per second that arrived in a span of time, those of misses included (a few per cent of a slow link)."""
        background = sum(length for when, length in self.answers if since <= when < until)
        demand = sum(DEMAND for when, _ in self.demands if since <= when < until)
        return (background + demand) / (until - since)

    def latency(self, since: float, until: float) -> float:
        """Mean seconds of the misses asked in a span of time."""
        times = [took for when, took in self.demands if since <= when < until]
        return sum(times) / len(times)

    def _fill(self) -> None:
        while self._wants and self.window.admits(length := self.length(self.window.piece)):
            self._send(length)

    def _send(self, length: int) -> None:
        token = self.window.sent(self.now, length)

        def arrive() -> None:
            self.answers.append((self.now, length))
            self.window.done(token, self.now)
            self._fill()

        self.at(self.link.answered_at(self.now, length, self._chance), arrive)

    def _pause(self) -> float:
        return self.now + self._chance.expovariate(1 / self.demand_every)

    def _demand(self) -> None:
        asked = self.now
        arrival = self.link.answered_at(asked, DEMAND, self._chance)
        self.demands.append((asked, arrival - asked))
        self.at(self._pause(), self._demand)
