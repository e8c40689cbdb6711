"""Extents against a set of numbers: never given out twice, never where a damaged entry points."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfs.image.allocator import MAX_FORBIDDEN, Allocator
from tests.model.effort import examples

C = 4096


@examples(200)
@given(data=st.data())
def test_extents_are_disjoint_avoid_what_is_forbidden_and_fill_gaps_before_the_file_grows(data: st.DataObject) -> None:
    end = data.draw(st.integers(1, 20), "end")
    allocator = Allocator(end * C, end * C + data.draw(st.sampled_from([0, 1, 1000])))
    taken = set(range(end))  # clusters that are not free
    written = set(range(allocator._written // C + (allocator._written % C > 0)))
    forbidden: set[int] = set()
    if data.draw(st.booleans(), "damaged"):
        forbidden = data.draw(st.sets(st.integers(end, end + 40), max_size=8))
        allocator.forbid([(n * C, (n + 1) * C) for n in sorted(forbidden)])
    given_out = [(n, 1) for n in range(end)]
    for _ in range(data.draw(st.integers(0, 40))):
        releasing = data.draw(st.booleans())
        if given_out and releasing:
            first, count = given_out.pop(data.draw(st.integers(0, len(given_out) - 1)))
            allocator.release(first * C, count * C)
            taken -= set(range(first, first + count))
        else:
            count = data.draw(st.integers(1, 6))
            before = allocator.end
            extent = allocator.allocate(count * C)
            clusters = set(range(extent.offset // C, extent.offset // C + count))
            assert extent.length == count * C
            assert not clusters & taken
            assert not clusters & forbidden
            if extent.pristine:
                assert not clusters & written
            gaps = free_runs(taken | forbidden, before // C)
            if extent.offset >= before and not forbidden:  # what lies before a forbidden place is passed over
                assert all(length < count for length in gaps), "a gap would have done"
            taken |= clusters
            written |= clusters
            given_out.append((extent.offset // C, count))
        check(allocator, taken, forbidden)


def free_runs(taken: set[int], end: int) -> list[int]:
    lengths, run = [], 0
    for cluster in range(end):
        run = 0 if cluster in taken else run + 1
        lengths.append(run)
    return lengths


def check(allocator: Allocator, taken: set[int], forbidden: set[int]) -> None:
    assert all(cluster * C < allocator.end for cluster in taken)
    free = {c for offset, length in allocator.free_extents for c in range(offset // C, (offset + length) // C)}
    assert not free & (taken | forbidden)
    assert allocator.free_bytes == len(free) * C
    edges = [edge for offset, length in allocator.free_extents for edge in (offset, offset + length)]
    assert edges == sorted(set(edges)), "sorted, disjoint, not touching"
    assert not edges or edges[-1] < allocator.end


def test_neighbours_merge_and_the_end_moves_down_over_what_is_free() -> None:
    allocator = Allocator(10 * C, 10 * C)
    for first in (3, 5, 4):
        allocator.release(first * C, C)
    assert allocator.free_extents == [(3 * C, 3 * C)]
    allocator.release(6 * C, 4 * C)
    assert (allocator.free_extents, allocator.end) == ([], 3 * C)
    extent = allocator.allocate(C)
    assert extent == (3 * C, C, False)


def test_a_damaged_table_that_names_too_many_places_forbids_everything_between_them() -> None:
    allocator = Allocator(C, C)
    allocator.forbid([(n * C, (n + 1) * C) for n in range(2, 2 * MAX_FORBIDDEN + 6, 2)])
    assert allocator.allocate(C).offset == C
    assert allocator.allocate(C).offset == (2 * MAX_FORBIDDEN + 5) * C
    assert allocator.is_forbidden(3 * C)


@pytest.mark.parametrize(
    ("offset", "length", "expected"), [(2, 1, False), (2, 2, True), (3, 1, True), (5, 1, False), (0, 9, True)]
)
def test_touching_any_byte_of_a_forbidden_range_counts(offset: int, length: int, expected: Any) -> None:
    allocator = Allocator(C, C)
    allocator.forbid([(3 * C, 5 * C)])
    assert allocator.is_forbidden(offset * C, length * C) is expected
