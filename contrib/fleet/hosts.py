"""The hosts of a fleet: a process of qedfs each, with leaves on which the boot of a guest is read and judged."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from contrib.bench.rig import QEDFS, BenchError, run
from contrib.fleet.trace import Read

THINKING = 0.002
"""Seconds between two reads."""


class Booted(NamedTuple):
    """How a boot went: seconds in all and of the longest read, bytes fetched for it, bytes of the disk that are local now."""

    seconds: float
    longest: float
    fetched: int
    local: int


class Host:
    """A mount of one leaf or several in a new folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mountpoint = folder / "mnt"
        self._leaves: list[Path] = []
        self._mountpoint.mkdir(parents=True)

    def create(self, backing: str, *names: str) -> None:
        """Make leaves over a raw backing, `vm` if there are no names.

        Raises:
            BenchError: qedfs refuses it, with its words.
        """
        self._leaves = [self.folder / f"{name}.qed" for name in names or ("vm",)]
        for leaf in self._leaves:
            run(*QEDFS, "create", "-b", backing, "-F", "raw", leaf)

    @contextlib.contextmanager
    def mounted(self, *options: str) -> Iterator[None]:
        """Have the leaves mounted while inside, with nothing known of earlier boots.

        Raises:
            BenchError: qedfs refuses it, with its words.
        """
        words = ",".join(("mode=cor", "reserve=0", "boot_profile=off", *options))
        run(*QEDFS, "mount", "-o", words, "--log-file", self.folder / "log", *self._leaves, self._mountpoint)
        try:
            yield
        finally:
            run(*QEDFS, "unmount", self._mountpoint)

    def get(self, name: str, disk: str = "vm") -> str:
        """Return an attribute of a disk."""
        return os.getxattr(self._mountpoint / f"{disk}.raw", f"user.qedfs.{name}").decode()

    def boot(self, trace: Sequence[Read], base: Path, disk: str, thinking: float) -> Booted:
        """Read what `trace` says past the page cache, and compare all of it with the file `base`.

        Raises:
            BenchError: something was read that is not in `base`.
            OSError: something could not be read.
        """
        longest, start = 0.0, time.monotonic()
        with base.open("rb") as expected:
            for read in trace:
                began = time.monotonic()
                data = read_once(self._mountpoint / f"{disk}.raw", read)
                longest = max(longest, time.monotonic() - began)
                expected.seek(read.pos)
                if data != expected.read(read.length):
                    raise BenchError(f"{self.folder.name}: wrong bytes at {read.pos}")
                time.sleep(thinking)  # a guest computes, too
        seconds = time.monotonic() - start
        fetched, local = (int(self.get(name, disk)) for name in ("backing_bytes_read", "allocated_bytes"))
        return Booted(seconds, longest, fetched, local)


def read_once(disk: Path, read: Read) -> bytes:
    with mmap.mmap(-1, read.length) as buffer:
        fd = os.open(disk, os.O_RDONLY | os.O_DIRECT)
        try:
            if os.preadv(fd, [buffer], read.pos) != read.length:
                raise BenchError(f"{disk}: a short read at {read.pos}")
            return bytes(buffer)
        finally:
            os.close(fd)


def at_once(boots: Sequence[Callable[[], Booted]]) -> list[Booted]:
    """Do all of them at the same time; return what each returns, or raise what one raises."""
    with ThreadPoolExecutor(len(boots)) as threads:
        return [done.result() for done in [threads.submit(boot) for boot in boots]]
