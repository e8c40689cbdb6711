"""Cuts a guest write at clusters: what is whole, what needs its head and tail, what is zeros. Sans-IO."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

_ZEROS = bytes(1 << 20)


class Kind(Enum):
    """What a part of a write does with its clusters."""

    PARTIAL = "partial"
    """One cluster, covered in part: the rest comes from where the cluster's content was."""
    WHOLE = "whole"
    """Clusters covered to their ends (or the disk's)."""
    ZEROS = "zeros"
    """As `WHOLE`, and every byte is zero."""


class Part(NamedTuple):
    """The clusters `[first, end)`, and the bytes `[start, stop)` of the write that go into them."""

    kind: Kind
    first: int
    end: int
    start: int
    stop: int


def is_zero(data: memoryview) -> bool:
    """Whether all bytes of `data` (contiguous) are zero."""
    for i in range(0, len(data), len(_ZEROS)):
        piece = data[i : i + len(_ZEROS)]
        # The first bytes decide almost always, before a large comparison is set up.
        if any(piece[:16]) or piece != _ZEROS[: len(piece)]:
            return False
    return True


def cut(pos: int, data: memoryview, cluster_size: int, disk_size: int) -> Iterator[Part]:
    """Cut a write of `data` at `pos` of a disk of `disk_size` bytes into parts, in order.

    Neighbouring clusters of one kind are one part. A write that reaches the end of the disk covers its last cluster.
    """
    end = pos + len(data)
    present: Part | None = None
    while pos < end:
        cluster = pos // cluster_size
        cluster_end = (cluster + 1) * cluster_size
        start = len(data) - (end - pos)
        stop = min(len(data), start + cluster_end - pos)
        covered = pos == cluster * cluster_size and end >= min(cluster_end, disk_size)
        kind = Kind.PARTIAL
        if covered:
            kind = Kind.ZEROS if is_zero(data[start:stop]) else Kind.WHOLE
        if present is not None and present.kind is kind is not Kind.PARTIAL:
            present = present._replace(end=cluster + 1, stop=stop)
        else:
            if present is not None:
                yield present
            present = Part(kind, cluster, cluster + 1, start, stop)
        pos = cluster_end
    if present is not None:
        yield present


def zero_clusters(first: int, data: memoryview, cluster_size: int) -> Iterator[tuple[int, int, bool]]:
    """Yield `(first, end, zero)`: the runs of clusters of `data` (whole clusters, the first is `first`) by zeroness."""
    count = len(data) // cluster_size
    start = 0
    present = is_zero(data[:cluster_size])
    for i in range(1, count + 1):
        zero = i < count and is_zero(data[i * cluster_size : (i + 1) * cluster_size])
        if i == count or zero != present:
            yield (first + start, first + i, present)
            start, present = i, zero
