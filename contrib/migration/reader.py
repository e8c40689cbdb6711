"""Somebody who reads a disk before it is ready, in each way in which a kernel might keep what was read: until killed.

python -m contrib.migration.reader DISK
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from pathlib import Path

AT_ONCE = 1 << 20


def read_buffered(disk: Path) -> None:
    while True:
        with disk.open("rb", buffering=0) as file:
            while file.read(AT_ONCE):
                pass


def read_mapped(disk: Path) -> None:
    """Touch each page of one mapping that lives all the while, not in their order.

    Of a handle with O_DIRECT: while a disk is held others cannot be mapped.
    """
    fd = os.open(disk, os.O_RDONLY | os.O_DIRECT)
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
        pages = len(mapped) // mmap.PAGESIZE
        page = 0
        while True:
            page = (page + 7) % pages
            assert len(mapped[page * mmap.PAGESIZE : (page + 1) * mmap.PAGESIZE]) == mmap.PAGESIZE


if __name__ == "__main__":
    threading.Thread(target=read_buffered, args=(Path(sys.argv[1]),), daemon=True).start()
    read_mapped(Path(sys.argv[1]))
