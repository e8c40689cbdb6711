"""Watches the machine for all streams that share a leaf's disk and a way to their backings: samples, and decides.

One for several disks, since own counters are those of the process: each alone would take the others for foreign traffic.
Nothing is sampled while nobody streams.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import trio

from qedfs.config import Idle
from qedfs.disk.misses import Misses
from qedfs.stream.idle import AFTER_WAIT, SAMPLE_EVERY, IdleDetector
from qedfs.stream.sampler import Sampler

_REMEMBERED = 240
"""Samples whose own writes are remembered: two minutes, twice what a claim on a write lasts."""


class Watched(Protocol):
    """What is looked at of a disk that is being streamed."""

    @property
    def misses(self) -> Misses: ...

    @property
    def asked(self) -> int:
        """Bytes asked of its backing so far."""

    @property
    def flushed_at(self) -> float:
        """When the newest flush of its leaf that has ended well began, by trio's clock."""


class Machine:
    """`idle` is what was decided last; `run` must be running for it to change."""

    def __init__(self, mode: Idle, sampler: Sampler) -> None:
        self._mode = mode
        self._sampler = sampler
        self._detector = IdleDetector(mode)
        self._watched: list[Watched] = []
        self._anybody = trio.Event()
        self._written: deque[tuple[float, int]] = deque(maxlen=_REMEMBERED)
        self._idle = mode is Idle.ALWAYS

    @contextmanager
    def watching(self, disk: Watched) -> Iterator[None]:
        """Count `disk` in while inside."""
        self._watched.append(disk)
        self._anybody.set()
        try:
            yield
        finally:
            self._watched.remove(disk)
            if not self._watched:
                self._anybody = trio.Event()
                self._idle = self._mode is Idle.ALWAYS

    def idle(self, disk: Watched) -> bool:
        """Whether this is an idle moment for `disk`: by the last sample, and its own guest waits for nothing now."""
        if self._mode is Idle.ALWAYS:
            return True
        misses = disk.misses
        return self._idle and not misses.waiting and trio.current_time() - misses.waited_at >= AFTER_WAIT

    async def run(self) -> None:
        """Sample and decide until cancelled."""
        while True:
            await self._anybody.wait()
            if self._mode is not Idle.ALWAYS:
                self._look()
            await trio.sleep(SAMPLE_EVERY)

    def _look(self) -> None:
        now = trio.current_time()
        self._settle()
        sample = self._sampler.sample(
            now,
            waiting=sum(disk.misses.waiting for disk in self._watched),
            waited_at=max((disk.misses.waited_at for disk in self._watched), default=-float("inf")),
            asked=sum(disk.asked for disk in self._watched),
        )
        self._written.append((now, sample.own_disk.written))
        self._idle = self._detector.decide(sample).idle

    def _settle(self) -> None:
        # Own counters are those of the process, so the leaf that was flushed longest ago decides.
        flushed_at = min((disk.flushed_at for disk in self._watched), default=-float("inf"))
        known = [written for at, written in self._written if at <= flushed_at]
        if known:
            self._sampler.flushed(known[-1])
