from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfs.image.geometry import Geometry
from qedfs.image.tables import ZERO, Counts, all_valid, as_entries, count, run_length

GEOMETRY = Geometry(4096, 1)
ROOM, USABLE = 4096, 4096 * 4096


def table(entries: list[int]) -> memoryview:
    return as_entries(bytearray(struct.pack(f"<{len(entries)}Q", *entries)))


entry = st.one_of(st.just(0), st.just(1), st.integers(1, 50).map(lambda n: n * 4096))
stretch = st.tuples(entry, st.integers(1, 150), st.booleans())


def stretched(stretches: list[tuple[int, int, bool]]) -> list[int]:
    """Long runs, so that both ways of looking at entries are used: contiguous data, repeated entries."""
    entries: list[int] = []
    for first, length, contiguous in stretches:
        step = 4096 if contiguous and first > ZERO else 0
        entries += [first + i * step for i in range(length)]
    return entries


def slow_run_length(entries: list[int], index: int, end: int) -> int:
    length = 1
    while index + length < end:
        before, this = entries[index + length - 1], entries[index + length]
        if this != (before + 4096 if before > ZERO else before):
            break
        length += 1
    return length


@given(st.lists(stretch, min_size=1, max_size=8), st.data())
def test_a_run_is_as_long_as_a_slow_look_says(stretches: list[tuple[int, int, bool]], data: st.DataObject) -> None:
    entries = stretched(stretches)
    index = data.draw(st.integers(0, len(entries) - 1))
    end = data.draw(st.integers(index + 1, len(entries)))
    assert run_length(table(entries), index, end, 4096) == slow_run_length(entries, index, end)


@given(st.lists(stretch, max_size=8))
def test_counts_are_those_of_a_slow_look(stretches: list[tuple[int, int, bool]]) -> None:
    entries = stretched(stretches)
    assert count(table(entries)) == Counts(sum(e > 1 for e in entries), sum(e == 1 for e in entries))


@pytest.mark.parametrize(
    ("value", "valid"),
    [
        *((0, True), (1, True), (2, False), (4095, False), (4096, True), (5000, False), (4096 + 512, False)),
        *((USABLE - 4096, True), (USABLE, False), (1 << 63, False), ((1 << 64) - 4096, False), (1 << 52, False)),
    ],
)
def test_an_entry_is_nothing_zero_or_a_cluster_of_the_file(value: int, valid: bool) -> None:
    assert all_valid(table([0, value, 1, 8192]), GEOMETRY, ROOM, USABLE) is valid


def test_a_cluster_of_the_header_is_no_data() -> None:
    assert not all_valid(table([4096]), GEOMETRY, 8192, USABLE)
    assert all_valid(table([8192]), GEOMETRY, 8192, USABLE)


@pytest.mark.parametrize("place", [0, (1 << 17) - 1, 1 << 17, (1 << 18) - 1])
def test_one_bad_entry_of_a_large_table_is_found_wherever_it_is(place: int) -> None:
    entries = as_entries(bytearray(8 << 18))
    assert all_valid(entries, GEOMETRY, ROOM, USABLE)
    entries[place] = 3
    assert not all_valid(entries, GEOMETRY, ROOM, USABLE)


def test_entries_are_little_endian_and_the_buffer_itself() -> None:
    buffer = bytearray(16)
    as_entries(buffer)[1] = 0x0102030405060708
    assert buffer == bytes(8) + bytes(range(8, 0, -1))
