"""Pushing copies out to the disk as they are written, so that a guest's flush does not have to wait for all of them.

The kernel would keep what was streamed in its page cache for half a minute, and the next fdatasync of the leaf writes all of
it before it returns: hundreds of MiB for which a guest waits that has written one sector. So each copy starts on its way to
the disk at once, and no more than `BACKLOG` bytes of them are ever on it.

Waiting for bytes to be written also collects the error if they cannot be, and an error is told once for each open file
description. What waits here has one of its own: the image's is left to `fdatasync`, which alone decides about a commit.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections import deque
from collections.abc import Callable

BACKLOG = 32 << 20
"""Bytes of copies that are not yet on the disk: 0.2 s of a hard disk, and enough to keep any disk busy."""

_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4
_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

_log = logging.getLogger(__name__)


class Writeback:
    """Writes back what is told to it, of one file. Its methods wait for the disk, and may be called from any thread."""

    def __init__(
        self, *, start: Callable[[int, int], object], wait: Callable[[int, int], object], backlog: int = BACKLOG
    ) -> None:
        """`start(offset, length)` begins to write a range and `wait` returns when it is written, or never will be."""
        self._start = start
        self._wait = wait
        self._backlog = backlog
        self._lock = threading.Lock()
        self._under_way: deque[tuple[int, int]] = deque()
        self._bytes = 0

    def written(self, offset: int, length: int) -> None:
        """Begin to write back a range that is in the page cache; return when the backlog is no longer than it may be."""
        self._start(offset, length)
        with self._lock:
            self._under_way.append((offset, length))
            self._bytes += length
        while (oldest := self._oldest()) is not None:
            self._wait(*oldest)

    def _oldest(self) -> tuple[int, int] | None:
        with self._lock:
            if self._bytes <= self._backlog or len(self._under_way) == 1:
                return None
            oldest = self._under_way.popleft()
            self._bytes -= oldest[1]
            return oldest


class FileWriteback(Writeback):
    """That of an open file or block device, by Linux's `sync_file_range`. Close it before the file."""

    def __init__(self, fd: int) -> None:
        try:
            self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            # Whoever opened the file has given up the right to. Then the kernel writes back when it likes.
            _log.debug("copies are not pushed out: %s", error)
            self._fd = -1
        super().__init__(
            start=lambda offset, length: self._sync(offset, length, _WRITE),
            wait=lambda offset, length: self._sync(offset, length, _WAIT_BEFORE | _WRITE | _WAIT_AFTER),
        )

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _sync(self, offset: int, length: int, flags: int) -> None:
        # An error is no news here: it is `fdatasync` of the image that finds it, too, and fails the commit.
        if self._fd >= 0:
            _libc.sync_file_range(self._fd, offset, length, flags)
