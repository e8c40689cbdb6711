"""The hosts of a fleet: a process of qedfs each, with a leaf on which the boot of a guest is read and judged."""

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
    """How a boot went: seconds in all and of the longest read, bytes fetched from the backing by its end."""

    seconds: float
    longest: float
    fetched: int


class Host:
    """A fresh leaf over a raw backing, and its mount, in a new folder.

    Raises:
        BenchError: qedfs refuses the backing, with its words.
    """

    def __init__(self, folder: Path, backing: str) -> None:
        self.folder = folder
        self._mountpoint = folder / "mnt"
        self._leaf = folder / "vm.qed"
        self._disk = self._mountpoint / "vm.raw"
        self._mountpoint.mkdir(parents=True)
        run(*QEDFS, "create", "-b", backing, "-F", "raw", self._leaf)

    @contextlib.contextmanager
    def mounted(self, *options: str) -> Iterator[None]:
        """Have the leaf mounted while inside, with nothing known of earlier boots.

        Raises:
            BenchError: qedfs refuses it, with its words.
        """
        words = ",".join(("mode=cor", "reserve=0", "boot_profile=off", *options))
        run(*QEDFS, "mount", "-o", words, "--log-file", self.folder / "log", self._leaf, self._mountpoint)
        try:
            yield
        finally:
            run(*QEDFS, "unmount", self._mountpoint)

    def get(self, name: str) -> str:
        """Return an attribute of the disk."""
        return os.getxattr(self._disk, f"user.qedfs.{name}").decode()

    def boot(self, trace: Sequence[Read], base: Path, thinking: float) -> Booted:
        """Read what `trace` says past the page cache, and compare all of it with the file `base`.

        Raises:
            BenchError: something was read that is not in `base`.
            OSError: something could not be read.
        """
        longest, start = 0.0, time.monotonic()
        with base.open("rb") as expected:
            for read in trace:
                began = time.monotonic()
                data = read_once(self._disk, read)
                longest = max(longest, time.monotonic() - began)
                expected.seek(read.pos)
                if data != expected.read(read.length):
                    raise BenchError(f"{self.folder.name}: wrong bytes at {read.pos}")
                time.sleep(thinking)  # a guest computes, too
        seconds = time.monotonic() - start
        return Booted(seconds, longest, int(self.get("backing_bytes_read")))


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
