"""How many bytes of background reads may be in flight to a backing. Sans-IO: told what was sent and answered, and when.

A long link is full only with bandwidth × round trip bytes on their way; every byte beyond that waits in a queue, and a
guest's miss behind it. So the window is computed from the two, as BBR does it, and not searched by losing packets:

- *bandwidth*: the highest rate of delivery seen lately. What is delivered while a piece is on its way, divided by the time
  that took, is the rate of the link if it was full, and less if not: hence the highest.
- *lowest latency*: of a piece that found no queue. It includes the piece's own time on the link, and bandwidth × that is
  just what keeps the link full: bandwidth × round trip, and one piece more.

Phases: START doubles until the rate no longer follows, HOLD keeps what was found, PROBE tries a little more now and then,
DRAIN goes below for a moment, because the lowest latency can be seen only without our own queue. A *round* is the time
from a send to its answer; decisions are made once a round.
"""

from __future__ import annotations

import math
from collections import deque
from enum import Enum
from typing import NamedTuple

LEAST_PIECE, MOST_PIECE = 64 << 10, 1 << 20
"""Bytes of one request: a default cluster, and the largest fetch."""
PIECE_TIME = 0.004
"""Seconds that a piece may take on the link, however short the round trip: what a miss waits behind it at most, and still
a few hundred KiB at 1 Gbit/s, so that requests stay few."""
PIECE_SHARE = 0.25
"""The same as a share of the round trip: finer steps of the window gain nothing."""
FIRST_PIECES = 4
START_GAIN = 2.5
"""Above 2, because an answer tells the rate of a window of one round ago."""
HOLD_GAIN = 1.15
"""Covers jitter of the link; costs a miss 15 % of a round trip."""
HOLD_SLACK = 0.003
"""The same in seconds, where that is more: servers and event loops are late by milliseconds, however short the way."""
PROBE_GAIN = 1.25
GROWING = 1.2
"""A rate that rises by less in a round of START has stopped to grow."""
FLAT_ROUNDS = 3
"""Rounds without growth that end START; one or two may be bad luck."""
PROBE_EVERY, PROBE_ROUNDS = 1.0, 8
"""Seconds, and rounds, from one PROBE to the next, whichever is longer."""
LATENCY_AGE, LATENCY_ROUNDS = 10.0, 30
"""Seconds, and latencies, for which a lowest latency is believed: DRAIN costs a round at half the rate."""
RATE_AGE, RATE_ROUNDS = 1.0, 10
"""The same for the highest rate."""
QUEUED, QUEUED_SLACK = 1.5, 0.010
"""A round in which every answer took this many times the lowest latency, and this many seconds more, stood in a queue."""
DRAIN_AGAIN = 2.0
"""Seconds between a DRAIN and the next one that is made because of queues."""


class Phase(Enum):
    """What the window does now."""

    START = "start"
    HOLD = "hold"
    PROBE = "probe"
    DRAIN = "drain"


class Token(NamedTuple):
    """A request on its way: returned by `sent`, given back to `done` or `failed`."""

    number: int
    length: int
    at: float
    delivered: int
    """Bytes delivered before it was sent, the last of them at `delivered_at`."""
    delivered_at: float


class Window:
    """The window of one backing, shared by the streams of all disks on it. `now` is a monotonic clock in seconds.

    `most` is the largest window in bytes. Misses of guests go past it: what they ask is neither told nor limited here.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.phase = Phase.START
        self.piece = min(LEAST_PIECE, most)
        """Bytes to ask for in one request; more is cut, less is welcome."""
        self.allowed = min(FIRST_PIECES * self.piece, most)
        """Bytes that may be in flight; one request always may."""
        self._under_way: dict[int, int] = {}
        self.in_flight = 0
        self._number = 0
        self._delivered = 0
        self._delivered_at = -math.inf
        self._rates: deque[tuple[float, float]] = deque()
        """(time, rate): falling rates, the first is the highest of those not too old."""
        self._latency = math.inf
        """Lowest seconds of a piece of the present size."""
        self._latency_at = -math.inf
        # The round under way: what began with the request `_round_end`, and what its answers said.
        self._round_end = 0
        self._round_latency = math.inf
        self._round_rate = 0.0
        self._round_full = False
        """The window, not the caller, was the limit; otherwise rates say nothing about the link."""
        self._phase_rounds = 0
        self._flat = 0
        self._reference = 0.0
        """The rate to compare with, in START and PROBE."""
        self._queued = 0
        """Times that HOLD has believed in a queue, one after the other."""
        self._probed_at = -math.inf
        self._drained_at = -math.inf

    @property
    def bandwidth(self) -> float:
        """Bytes per second that the backing has delivered at best lately; 0 before the first answer."""
        return self._rates[0][1] if self._rates else 0.0

    @property
    def round_trip(self) -> float:
        """Seconds that a request of no length would take at least; 0 while unknown."""
        if not self._rates or math.isinf(self._latency):
            return 0.0
        return max(0.0, self._latency - self.piece / self.bandwidth)

    def admits(self, length: int) -> bool:
        """Whether a request of `length` bytes may be sent now."""
        if not self._under_way or self.in_flight + length <= self.allowed:
            return True
        self._round_full = True
        return False

    def sent(self, now: float, length: int) -> Token:
        """Note that a request of `length` bytes goes out; give the token back when it has ended."""
        if not self._under_way:
            # What was not asked for could not be delivered.
            self._delivered_at = now
        self._number += 1
        self._under_way[self._number] = length
        self.in_flight += length
        return Token(self._number, length, now, self._delivered, self._delivered_at)

    def failed(self, token: Token, now: float) -> None:
        """Note that a request ended without an answer: an error, or nobody wants it any more."""
        self._end(token)
        if token.number >= self._round_end:
            self._end_round(now)

    def done(self, token: Token, now: float) -> None:
        """Note the answer to a request."""
        self._end(token)
        self._delivered += token.length
        self._delivered_at = now
        latency, interval = now - token.at, now - token.delivered_at
        if latency > 0 and interval > 0:
            self._observe(token, latency, (self._delivered - token.delivered) / interval, now)
        if token.number >= self._round_end:
            self._end_round(now)

    def _end(self, token: Token) -> None:
        self.in_flight -= self._under_way.pop(token.number)

    def _observe(self, token: Token, latency: float, rate: float, now: float) -> None:
        self._round_rate = max(self._round_rate, rate)
        if rate > self.bandwidth:
            self._note_rate(rate, now)
        # As if it had been a piece of the present size; smaller ones would pretend a shorter way. Of larger ones nothing is
        # taken off: while the bandwidth is not known well, it could be all.
        latency += max(0, self.piece - token.length) / self.bandwidth
        self._round_latency = min(self._round_latency, latency)
        if latency <= self._latency:
            self._latency, self._latency_at = latency, now

    def _note_rate(self, rate: float, now: float) -> None:
        while self._rates and self._rates[-1][1] <= rate:
            self._rates.pop()
        self._rates.append((now, rate))

    def _end_round(self, now: float) -> None:
        latency, rate, full = self._round_latency, self._round_rate, self._round_full
        self._round_end = self._number + 1
        self._round_latency, self._round_rate, self._round_full = math.inf, 0.0, False
        if not rate:
            return
        if full and self.phase is not Phase.DRAIN:
            self._note_rate(rate, now)
            oldest = now - max(RATE_AGE, RATE_ROUNDS * self._latency)
            while len(self._rates) > 1 and self._rates[0][0] < oldest:
                self._rates.popleft()
        self._phase_rounds += 1
        if self.phase is Phase.START:
            self._after_start_round(rate, full, now)
        elif self.phase is Phase.HOLD:
            self._after_hold_round(latency, rate, full, now)
        elif self._phase_rounds >= 2:  # the first round of PROBE and DRAIN only brings the change about
            if self.phase is Phase.PROBE:
                self._after_probe(now)
            else:
                self._after_drain(latency, rate, now)
        self._resize()

    def _enter(self, phase: Phase, now: float) -> None:
        self.phase = phase
        self._phase_rounds = self._flat = self._queued = 0
        self._reference = self.bandwidth
        if phase is Phase.PROBE:
            self._probed_at = now
        elif phase is Phase.DRAIN:
            self._drained_at = now

    def _after_start_round(self, rate: float, full: bool, now: float) -> None:
        if rate >= GROWING * self._reference:
            self._reference, self._flat = rate, 0
        elif full:
            self._flat += 1
            if self._flat >= FLAT_ROUNDS:
                self._enter(Phase.HOLD, now)
                self._probed_at = now

    def _after_hold_round(self, latency: float, rate: float, full: bool, now: float) -> None:
        if latency > QUEUED * self._latency + QUEUED_SLACK:
            # Everything stood in a queue: the link is not what it was, or others use it. Believe only this round.
            self._rates.clear()
            self._note_rate(rate, now)
            self._queued += 1
            if self._queued >= 2 and now - self._drained_at >= DRAIN_AGAIN:
                # Or the way has become longer.
                self._enter(Phase.DRAIN, now)
            return
        self._queued = 0
        if now - self._latency_at > max(LATENCY_AGE, LATENCY_ROUNDS * self._latency):
            self._enter(Phase.DRAIN, now)
        elif full and now - self._probed_at > max(PROBE_EVERY, PROBE_ROUNDS * self._latency):
            self._enter(Phase.PROBE, now)

    def _after_probe(self, now: float) -> None:
        grown = self.bandwidth >= (1 + (PROBE_GAIN - 1) / 2) * self._reference
        self._enter(Phase.START if grown else Phase.HOLD, now)

    def _after_drain(self, latency: float, rate: float, now: float) -> None:
        longer = latency > QUEUED * self._latency
        self._latency, self._latency_at = latency, now
        if longer:
            # Another way, or another rate: nothing of what was known holds.
            self._rates.clear()
            self._note_rate(rate, now)
        self._enter(Phase.START if longer else Phase.HOLD, now)

    def _resize(self) -> None:
        bandwidth = self.bandwidth
        self._resize_piece(bandwidth)
        pieces = bandwidth * self._latency / self.piece
        if self.phase is Phase.START:
            count = math.ceil(START_GAIN * pieces)
        elif self.phase is Phase.DRAIN:
            count = int(pieces / 2)
        else:
            # Whole pieces: enough to keep the link full, to the nearest one of what is meant to be on top.
            wanted = bandwidth * max(HOLD_GAIN * self._latency, self._latency + HOLD_SLACK)
            count = max(math.ceil(pieces - 0.05), round(wanted / self.piece))
            if self.phase is Phase.PROBE:
                count = max(count + 1, round(PROBE_GAIN * count))
        self.allowed = max(min(count * self.piece, self._most), min(self.piece, self._most))

    def _resize_piece(self, bandwidth: float) -> None:
        wanted = bandwidth * max(PIECE_TIME, PIECE_SHARE * self.round_trip)
        piece = self.piece
        if 2 * piece <= min(0.9 * wanted, MOST_PIECE, self._most / 2):
            piece *= 2
        elif piece > 1.3 * wanted and piece > LEAST_PIECE:
            piece //= 2
        self._latency += max(0, piece - self.piece) / bandwidth
        self.piece = piece
