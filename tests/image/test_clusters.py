from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfs.image.clusters import _BLOCK, MAX_CLUSTERS, ClusterMap
from qedfs.image.geometry import Geometry

SIZE = 4096
GEOMETRY = Geometry(SIZE, 1)


def offsets(clusters: list[int]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(clusters, dtype=np.uint64) * np.uint64(SIZE)


def runs_of(free: list[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for cluster in free:
        if runs and sum(runs[-1]) == cluster * SIZE:
            runs[-1] = (runs[-1][0], runs[-1][1] + SIZE)
        else:
            runs.append((cluster * SIZE, SIZE))
    return runs


@given(st.integers(1, 3), st.integers(0, 60), st.data())
def test_it_agrees_with_a_set(header: int, more: int, data: st.DataObject) -> None:
    total = header + more
    clusters = ClusterMap(GEOMETRY, header * SIZE, total * SIZE)
    seen: set[int] = set()
    some = st.lists(st.integers(header, max(header, total - 1)), max_size=9 if more else 0)
    for marked in data.draw(st.lists(some, max_size=9)):
        repeated = len(marked) - len(set(marked) - seen)
        assert clusters.mark(offsets(marked)) == repeated
        seen |= set(marked)
    free = [cluster for cluster in range(header, total) if cluster not in seen]
    assert clusters.unreferenced == len(free)
    assert list(clusters.free()) == runs_of(free)


@pytest.mark.parametrize("cluster", [8 * _BLOCK - 1, 8 * _BLOCK, 16 * _BLOCK + 5])
def test_runs_go_on_over_the_edges_of_blocks(cluster: int) -> None:
    total = 20 * _BLOCK
    clusters = ClusterMap(GEOMETRY, SIZE, total * SIZE)
    assert list(clusters.free()) == [(SIZE, (total - 1) * SIZE)]
    clusters.mark(offsets([cluster, cluster + 1]))
    assert list(clusters.free()) == [
        (SIZE, (cluster - 1) * SIZE),
        ((cluster + 2) * SIZE, (total - cluster - 2) * SIZE),
    ]


def test_full_blocks_hold_nothing_free() -> None:
    total = 8 * _BLOCK + 3
    clusters = ClusterMap(GEOMETRY, SIZE, total * SIZE)
    clusters.mark(np.arange(SIZE, (8 * _BLOCK + 1) * SIZE, SIZE, dtype=np.uint64))
    assert list(clusters.free()) == [((8 * _BLOCK + 1) * SIZE, 2 * SIZE)]


def test_too_many_clusters_are_refused() -> None:
    with pytest.raises(OverflowError):
        ClusterMap(GEOMETRY, SIZE, (MAX_CLUSTERS + 1) * SIZE)
