from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from qedfs.disk.plan import Kind, cut, is_zero, zero_clusters
from qedfs.disk.readahead import Readahead
from tests.model.effort import examples

C = 16
"""A cluster, so small that every byte can be asked by itself."""


@examples(300)
@given(
    pos=st.integers(0, 4 * C),
    data=st.lists(st.sampled_from([b"\0" * C, b"\0", b"x", b"\0" * 5, b"y" * C]), max_size=8).map(b"".join),
    beyond=st.integers(0, 2 * C),
)
def test_each_byte_of_a_write_is_in_one_part_of_the_right_kind(pos: int, data: bytes, beyond: int) -> None:
    disk_size = pos + len(data) + beyond
    parts = list(cut(pos, memoryview(data), C, disk_size))
    assert [b for part in parts for b in range(part.start, part.stop)] == list(range(len(data)))
    for part in parts:
        for byte in range(part.start, part.stop):
            cluster = (pos + byte) // C
            assert part.first <= cluster < part.end
            inside = range(cluster * C, min((cluster + 1) * C, disk_size))
            covered = all(pos <= at < pos + len(data) for at in inside)
            zeros = not any(data[at - pos] for at in inside if pos <= at < pos + len(data))
            expected = Kind.PARTIAL if not covered else Kind.ZEROS if zeros else Kind.WHOLE
            assert part.kind is expected
        if part.kind is Kind.PARTIAL:
            assert part.end == part.first + 1
    for before, after in pairwise(parts):
        assert before.end == after.first
        assert before.kind is Kind.PARTIAL or before.kind is not after.kind, "neighbours of one kind are one part"


@given(clusters=st.lists(st.sampled_from([b"\0" * C, b"\0" * (C - 1) + b"x", b"z" * C]), min_size=1, max_size=12))
def test_runs_of_clusters_by_zeroness(clusters: list[bytes]) -> None:
    runs = list(zero_clusters(100, memoryview(b"".join(clusters)), C))
    flags = [zero for first, end, zero in runs for _ in range(first, end)]
    assert flags == [not any(cluster) for cluster in clusters]
    assert [first for first, _, _ in runs] == [100, *(end for _, end, _ in runs[:-1])]
    assert all(a[2] != b[2] for a, b in pairwise(runs))


def test_one_byte_anywhere_is_not_zero() -> None:
    data = bytearray((1 << 20) + 100)
    assert is_zero(memoryview(data))
    assert is_zero(memoryview(b""))
    for at in (0, 15, 16, (1 << 20) - 1, 1 << 20, len(data) - 1):
        data[at] = 1
        assert not is_zero(memoryview(data))
        data[at] = 0


def test_a_sequential_reader_is_widened_by_doubling_up_to_the_most() -> None:
    readahead = Readahead(8)
    beyond = [readahead.observe(first, first + 1) for first in range(6)]
    assert beyond[0] == (1, 1), "one miss is no sequence"
    assert [stop - first - 1 for first, (_, stop) in enumerate(beyond)][1:5] == [1, 2, 4, 8]
    for (_, stop), (start, _) in pairwise(beyond[1:]):
        assert start == stop, "nothing is asked for twice"


def test_random_misses_and_a_most_of_zero_are_never_widened() -> None:
    readahead = Readahead(8)
    for first in (100, 5, 77, 3000, 41):
        start, stop = readahead.observe(first, first + 1)
        assert start == stop
    none = Readahead(0)
    for first in range(5):
        start, stop = none.observe(first, first + 1)
        assert start == stop


def test_several_sequential_readers_keep_their_own_windows() -> None:
    readahead = Readahead(8)
    for step in range(4):
        for reader in range(4):
            start, stop = readahead.observe(1000 * reader + step, 1000 * reader + step + 1)
            assert (start < stop) == (step > 0)
