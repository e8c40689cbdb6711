"""Reading tables as far as the file holds anything of them.

What lies in a hole of the file is all unallocated. A header or an L1 table can claim petabytes of that; passed over, it
costs nothing, so that a look at every table takes time for what the file really holds and memory for one piece.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

import numpy as np
import numpy.typing as npt

from qedfs.image.geometry import SECTOR
from qedfs.image.storage import Storage

MIN_PIECE, MAX_PIECE = 64 << 10, 1 << 20
"""Bytes that are read and judged at once: as many as come before the next hole, within these."""

Entries = npt.NDArray[np.uint64]


async def with_data(storage: Storage, offsets: Entries, length: int) -> npt.NDArray[np.bool_]:
    """Say of each of `offsets` (ascending) whether the `length` bytes there may hold anything but zeros.

    Raises:
        LeafError: the file cannot be read.
    """
    found = np.zeros(offsets.size, dtype=np.bool_)
    i = 0
    while i < offsets.size:
        start, end = await storage.next_data(int(offsets[i]))
        if start == end:
            break
        i = max(i, int(np.searchsorted(offsets, np.uint64(max(0, start - length + 1)))))
        after = max(i, int(np.searchsorted(offsets, np.uint64(end))))
        found[i:after] = True
        i = after
    return found


async def pieces(storage: Storage, offset: int, end: int) -> AsyncGenerator[tuple[int, Entries], None]:
    """Yield the pieces of `[offset, end)`, whole sectors, that may hold anything but zeros, with their offsets.

    Raises:
        LeafError: the file cannot be read.
    """
    while True:
        data, hole = await storage.next_data(offset)
        offset = max(offset, data // SECTOR * SECTOR)
        if offset >= min(end, storage.length()):
            return
        length = max(MIN_PIECE, min(MAX_PIECE, -(-(hole - offset) // SECTOR) * SECTOR))
        piece = await storage.read(offset, min(length, end - offset))
        yield offset, np.frombuffer(piece, dtype=np.uint64)
        offset += len(piece)


async def read_sparse(storage: Storage, offset: int, length: int) -> memoryview:
    """Return `length` writable bytes, whole sectors; of the memory for them only what holds data is ever touched.

    Raises:
        LeafError: the file cannot be read.
    """
    # Unlike a bytearray's, this memory is zeros that the system gives no room to before they are written.
    buffer = np.zeros(length, dtype=np.uint8).data
    end = offset + length
    pos = offset
    while pos < end:
        start, stop = await storage.next_data(pos)
        start, stop = max(pos, start // SECTOR * SECTOR), min(end, stop)
        if start >= stop:
            break
        await storage.read_into(start, buffer[start - offset : stop - offset])
        pos = stop
    return buffer
