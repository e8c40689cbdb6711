"""What a serving process holds over time, and the rules by which that is no leak."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import psutil

from contrib.kill.stamps import Violation

MORE_RSS = 0.10
MORE_RSS_BYTES = 8 << 20
"""By how much the median of the last third may be above that of the second: a share, and bytes. The first third is warm-up."""
MORE_FDS = 4
"""The same for file descriptors: connections of one backing, which come and go."""
MOST_THREADS = 64
"""Trio runs 40 blocking calls at once, and keeps some idle threads a while."""


class Sample(NamedTuple):
    """A serving process at rest. `rss` is in bytes."""

    rss: int
    fds: int
    threads: int


def sample(pid: int) -> Sample:
    """Return what the process `pid` holds now."""
    process = psutil.Process(pid)
    with process.oneshot():
        return Sample(process.memory_info().rss, process.num_fds(), process.num_threads())


def judge(samples: Sequence[Sample]) -> None:
    """Judge samples taken at equal intervals; fewer than three say nothing about growth.

    Raises:
        Violation: memory or file descriptors grow after warm-up, or there are too many threads.
    """
    threads = max((s.threads for s in samples), default=0)
    if threads > MOST_THREADS:
        raise Violation(f"{threads} threads, more than {MOST_THREADS}")
    if len(samples) < 3:
        return
    third = len(samples) // 3
    second, last = samples[-2 * third : -third], samples[-third:]
    rss, more = median(s.rss for s in second), median(s.rss for s in last)
    if more > rss * (1 + MORE_RSS) + MORE_RSS_BYTES:
        raise Violation(f"memory grows: {rss / 2**20:.1f} MiB, then {more / 2**20:.1f} MiB")
    fds, more = median(s.fds for s in second), median(s.fds for s in last)
    if more > fds + MORE_FDS:
        raise Violation(f"file descriptors leak: {fds}, then {more}")
