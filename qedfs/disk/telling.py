"""What a disk tells of itself: its statistics, and its newest error."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

import trio

from qedfs.backing.resilient import Backing
from qedfs.config import Mode
from qedfs.errors import BackingUnavailable, QedfsError
from qedfs.image.tables import Counts

LOG_PAUSE = 60.0
"""Seconds between two lines of the log about errors of one kind."""


@dataclass(frozen=True)
class DiskStatistics:
    """One disk at one moment. Sizes are in bytes; counts are of clusters, and None until all tables were seen."""

    virtual_size: int
    cluster_size: int
    clusters_total: int
    counts: Counts | None
    mode: Mode
    state: str
    """As in the interface, `state`."""
    backing: str
    """For showing: credentials masked; empty when the image stands alone."""
    backing_format: str
    backing_state: str
    """`idle` (nothing was asked yet), `healthy`, `unavailable`, `refused` (for good); empty when the image stands alone."""
    backing_bytes_read: int
    backing_asked_twice: int
    """Requests to the backing that were late and made a second time, since the mount."""
    last_error: str
    """The newest error with its time (UTC); empty if there was none."""
    copied_bytes: int
    """Copied from the backing into the leaf since the mount."""
    misses: int
    """Requests, or parts of one, that had to wait for the backing since the mount."""
    missed_seconds: float
    """How long they have waited, all together; those that still wait are not in it."""
    waiting: int
    """Those that wait now."""
    errors: int
    """Errors noted since the mount; what one request met may be several."""


class Errors:
    """The newest error of one disk, and what of the errors is news for the log."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self.count = 0
        """Errors noted so far."""
        self._newest: QedfsError | None = None
        self._time = 0.0
        self._logged: dict[type[QedfsError], tuple[str, float]] = {}

    def note(self, error: QedfsError) -> None:
        """Keep `error` as the newest one, and say it in the log if it is news."""
        self._newest, self._time = error, time.time()
        self.count += 1
        # Once, however many requests meet it: a damaged table may have a different error for each of its clusters.
        logged, at = self._logged.get(type(error), ("", -LOG_PAUSE))
        if str(error) != logged and trio.current_time() - at >= LOG_PAUSE:
            self._logged[type(error)] = (str(error), trio.current_time())
            self._log.warning("%s", error)

    def newest(self, others: Iterable[tuple[float, str]]) -> str:
        """Return the newest of ours and `others`, (seconds since the epoch, text), with its time; empty if there is none."""
        candidates = [(self._time, str(self._newest or "")), *others]
        at, text = max((c for c in candidates if c[1]), default=(0.0, ""))
        return f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(at))} {text}" if text else ""


def timed_out(backing: Backing | None, seconds: float | None, *, request: str = "read") -> BackingUnavailable:
    """Return what a request is told that has waited for `backing` for `seconds`, which is as long as it may."""
    name = backing.name if backing else "backing"
    why = (backing.statistics().last_error if backing else "") or "no answer"
    return BackingUnavailable(name, f"unreachable for {seconds or 0:g} s, given up for this {request} ({why})")
