"""L1 and L2 tables in memory: entry states, runs of equal state, bulk judgement. Sans-IO.

A table is a buffer of little-endian 64-bit entries. Scalar look-ups go through a `memoryview` cast to `Q` (about 50 ns);
counting, searching and judging whole tables go through numpy over the same buffer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qedfs.image.geometry import Geometry

if sys.byteorder != "little":  # pragma: no cover - QED is little-endian and the tables are used in place
    raise ImportError("qedfs runs on little-endian machines only")

UNALLOCATED = 0
ZERO = 1


class State(IntEnum):
    """What an L2 entry says of its cluster."""

    BACKING = 0
    """Not in the leaf: the backing's bytes, or zeros without one."""
    ZERO = 1
    """Reads as zeros and hides the backing; takes no room."""
    DATA = 2
    """At an offset of the image file."""


class Run(NamedTuple):
    """Neighbouring bytes of the disk in one state.

    `pos` and `length` are bytes of the disk; `offset` is where a data run begins in the file (data runs are contiguous
    there too), 0 otherwise.
    """

    state: State
    pos: int
    length: int
    offset: int = 0


class Counts(NamedTuple):
    """Clusters of a table, or of a disk, by state."""

    data: int = 0
    zero: int = 0


def as_entries(buffer: bytearray | memoryview) -> memoryview:
    """Return `buffer` as 64-bit entries."""
    return memoryview(buffer).cast("B").cast("Q")


def as_array(entries: memoryview) -> npt.NDArray[np.uint64]:
    """Return a numpy view of the same entries."""
    return np.frombuffer(entries, dtype=np.uint64)


def all_valid(entries: memoryview, geometry: Geometry, room: int, usable: int) -> bool:
    """Whether every L2 entry is unallocated, zero or a valid cluster offset of a file of `usable` bytes."""
    array = as_array(entries)
    for i in range(0, len(array), _CHUNK):
        chunk = array[i : i + _CHUNK]
        data = chunk[chunk > ZERO]
        if data.size and (
            data.min() < room or data.max() >= usable or np.any(data & np.uint64(geometry.cluster_size - 1))
        ):
            return False
    return True


def count(entries: memoryview) -> Counts:
    """Count the data and the zero entries."""
    if len(entries) <= _SCALAR:
        values = entries.tolist()
        zero = values.count(ZERO)
        return Counts(len(values) - values.count(UNALLOCATED) - zero, zero)
    array = as_array(entries)
    nonzero = int(np.count_nonzero(array))
    zero = int(np.count_nonzero(array == ZERO))
    return Counts(nonzero - zero, zero)


def local_below(entries: memoryview, bounds: npt.NDArray[np.int64], cluster_size: int) -> npt.NDArray[np.int64]:
    """Return for each of `bounds`, bytes from the start of what the table covers, how many bytes before it are local."""
    local = np.flatnonzero(as_array(entries))
    clusters, inside = np.divmod(np.clip(bounds, 0, len(entries) * cluster_size), cluster_size)
    before = np.searchsorted(local, clusters)
    partly = np.searchsorted(local, clusters, side="right") > before
    return np.asarray(before * cluster_size + partly * inside, dtype=np.int64)


def run_length(entries: memoryview, index: int, end: int, cluster_size: int) -> int:
    """Return how many entries from `index`, before `end`, are one run: equal in state, data neighbours in the file."""
    first = entries[index]
    step = cluster_size if first > ZERO else 0
    expected = first
    i = index + 1
    limit = min(end, index + _SCALAR)
    while i < limit:
        expected += step
        if entries[i] != expected:
            return i - index
        i += 1
    if i >= end:
        return end - index
    array = as_array(entries)[i:end]
    if step:
        wanted = np.uint64(expected) + np.uint64(step) * np.arange(1, end - i + 1, dtype=np.uint64)
        different = np.flatnonzero(array != wanted)
    else:
        different = np.flatnonzero(array != np.uint64(first))
    return (int(different[0]) + i if different.size else end) - index


def runs_of(entries: npt.NDArray[np.uint64], pos: int, cluster_size: int) -> Iterator[Run]:
    """Yield the runs of sound L2 entries; the first is of the cluster at `pos` (bytes) of the disk."""
    if not entries.size:
        return
    expected = entries[:-1] + np.where(entries[:-1] > ZERO, np.uint64(cluster_size), np.uint64(0))
    edges = np.flatnonzero(entries[1:] != expected) + 1
    first = 0
    for end in (*edges.tolist(), entries.size):
        entry = int(entries[first])
        start, length = pos + first * cluster_size, (end - first) * cluster_size
        yield Run(State.DATA, start, length, entry) if entry > ZERO else Run(State(entry), start, length)
        first = end


_CHUNK = 1 << 17
"""Entries judged at once, so that judging the largest tables costs little memory beyond them."""
_SCALAR = 64
"""Entries looked at one by one before numpy takes over: a call of numpy costs about as much as this many look-ups."""
