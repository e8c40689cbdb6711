"""The writers and readers of a kill round, each a process of its own.

Run as `python -m contrib.kill.load FILE LEDGER SECTORS SALT`: for each line `SEED SECONDS` on standard input it forks all of
them, waits until every one has ended because the disk has gone, or because a SECONDS other than 0 have passed, and prints one
line of JSON: who ended otherwise, and with which status. Forking spares each round the start of four interpreters.

Pages take turns: of four neighbours one belongs to the buffered writer, one to the synchronous writer, one to the writer by
mmap, and one is only read; so all of them meet in every cluster.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from contrib.kill.stamps import PAGE_SECTORS, SECTOR, Ledger, Violation

PAGE = PAGE_SECTORS * SECTOR
TURNS = 4
BUFFERED, SYNCHRONOUS, MAPPED = range(3)
LONGEST_READ = 64
"""Pages."""


class Place:
    """The disk under load."""

    def __init__(self, path: Path, ledger: Ledger, sectors: int, seed: int) -> None:
        self.path = path
        self.ledger = ledger
        self.sectors = sectors
        self.random = random.Random(seed)

    def piece(self, turn: int) -> tuple[int, int]:
        """Return `(first, count)` of some sectors in one page of those that belong to `turn`."""
        page = self.random.randrange(self.sectors // PAGE_SECTORS // TURNS) * TURNS + turn
        start = self.random.randrange(PAGE_SECTORS)
        return page * PAGE_SECTORS + start, self.random.randint(1, PAGE_SECTORS - start)


def write_buffered(place: Place) -> None:
    """Some writes, then fdatasync or fsync, which acknowledges them all."""
    fd = os.open(place.path, os.O_RDWR)
    while True:
        pieces = [place.piece(BUFFERED) for _ in range(place.random.randint(1, 8))]
        for first, count in pieces:
            _write_all(fd, place.ledger.issue(first, count), first * SECTOR)
        place.random.choice([os.fdatasync, os.fsync])(fd)
        for first, count in pieces:
            place.ledger.acknowledge(first, count)


def write_synchronously(place: Place) -> None:
    """Writes of the six kinds that are acknowledged by their own answer."""
    kinds = [(os.O_SYNC, 0), (os.O_DSYNC, 0), (0, os.RWF_DSYNC)]
    opened = [
        (os.open(place.path, os.O_RDWR | flags | direct), per_write)
        for flags, per_write in kinds
        for direct in (0, os.O_DIRECT)
    ]
    buffer = mmap.mmap(-1, PAGE)  # O_DIRECT wants aligned memory
    while True:
        fd, flags = place.random.choice(opened)
        first, count = place.piece(SYNCHRONOUS)
        buffer[: count * SECTOR] = place.ledger.issue(first, count)
        with memoryview(buffer) as view:
            written = os.pwritev(fd, [view[: count * SECTOR]], first * SECTOR, flags)
        if written != count * SECTOR:
            raise Violation(f"a synchronous write of {count} sectors took {written} bytes")
        place.ledger.acknowledge(first, count)


def write_mapped(place: Place) -> None:
    """Stores to shared memory, acknowledged by msync. Ends by SIGBUS or an error of msync."""
    with open(place.path, "r+b") as file, mmap.mmap(file.fileno(), place.sectors * SECTOR) as mapped:
        while True:
            pieces = [place.piece(MAPPED) for _ in range(place.random.randint(1, 4))]
            for first, count in pieces:
                mapped[first * SECTOR : (first + count) * SECTOR] = place.ledger.issue(first, count)
            for first, count in pieces:
                page = first // PAGE_SECTORS * PAGE
                mapped.flush(page, PAGE)
                place.ledger.acknowledge(first, count)


def read(place: Place) -> None:
    """Reads past the page cache, which copy, of everything; each is judged at once."""
    fd = os.open(place.path, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, LONGEST_READ * PAGE)
    pages = place.sectors // PAGE_SECTORS
    while True:
        page = place.random.randrange(pages)
        length = min(place.random.randint(1, LONGEST_READ), pages - page) * PAGE
        first, count = page * PAGE_SECTORS, length // SECTOR
        lowest = place.ledger.acknowledged[first : first + count].copy()
        with memoryview(buffer) as view:
            got = os.preadv(fd, [view[:length]], page * PAGE)
        if got != length:
            raise Violation(f"{got} bytes read of {length}")
        place.ledger.judge(first, buffer[:length], lowest, mixed=None)


LOADS: dict[str, Callable[[Place], None]] = {
    "buffered": write_buffered,
    "synchronous": write_synchronously,
    "mapped": write_mapped,
    "read": read,
}


def _write_all(fd: int, data: bytes, pos: int) -> None:
    if os.pwrite(fd, data, pos) != len(data):
        raise Violation("a buffered write was short")


def _run(load: Callable[[Place], None], place: Place) -> int:
    """Return 0 when the disk has gone, as it should, and 3 when something was seen that cannot be."""
    try:
        load(place)
    except OSError:
        return 0
    except Violation as violation:
        print(f"{load.__name__}: {violation}", file=sys.stderr, flush=True)
        return 3
    return 4


def _fork(load: Callable[[Place], None], place: Place, seconds: float) -> int:
    pid = os.fork()
    if pid:
        return pid
    signal.setitimer(signal.ITIMER_REAL, seconds)
    status = 5
    try:
        status = _run(load, place)
    finally:
        os._exit(status)


def main(path: Path, ledger_path: Path, sectors: int, salt: int) -> None:
    """Serve loads until standard input ends."""
    for line in sys.stdin:
        seed, seconds = line.split()
        ledger = Ledger(ledger_path, sectors, salt)
        pids = {
            _fork(load, Place(path, ledger, sectors, int(seed) * len(LOADS) + i), float(seconds)): name
            for i, (name, load) in enumerate(LOADS.items())
        }
        complaints = {}
        for pid, name in pids.items():
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            expected = [-signal.SIGALRM] if float(seconds) else [0, -signal.SIGBUS] if name == "mapped" else [0]
            if status not in expected:
                complaints[name] = status
        print(json.dumps(complaints), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
