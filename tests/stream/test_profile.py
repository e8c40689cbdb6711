"""What a boot profile records, and what is believed of one that somebody else wrote."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfs.errors import UsageError
from qedfs.stream import profile
from qedfs.stream.profile import MOST_BYTES, MOST_PARTS, TITLE, Part, Recorder, clusters, parse, serialise

C = 65536
MIB = 1 << 20


def recorded(*misses: tuple[int, int], cluster_size: int = C) -> list[Part]:
    recorder = Recorder(cluster_size)
    for miss in misses:
        recorder.missed(*miss)
    return recorder.parts()


def test_misses_are_kept_in_their_order_as_whole_clusters() -> None:
    assert recorded((9 * C + 5, 10), (3 * C - 1, 2), (0, C)) == [Part(9 * C, C), Part(2 * C, 2 * C), Part(0, C)]


def test_what_was_missed_before_is_not_listed_again() -> None:
    assert recorded((0, C), (5 * C, C), (0, 2 * C), (10, 20)) == [Part(0, 2 * C), Part(5 * C, C)]


def test_readers_at_a_time_get_a_part_each() -> None:
    misses = [(base + i * C, C) for i in range(4) for base in (0, 100 * C)]
    assert recorded(*misses) == [Part(0, 4 * C), Part(100 * C, 4 * C)]


def test_what_readahead_has_brought_is_not_missed_but_belongs_to_it() -> None:
    # As readahead widens: twice as much each time, and the reader waits only at its end.
    assert recorded((0, C), (C, C), (3 * C, C), (7 * C, C)) == [Part(0, 8 * C)]
    assert recorded((0, C), (3 * C, C)) == [Part(0, C), Part(3 * C, C)], "more than it has read is somebody else"


def test_long_readers_take_turns_of_a_fetch() -> None:
    misses = [(base + i * MIB, MIB) for i in range(3) for base in (0, 1 << 30)]
    assert recorded(*misses) == [Part(pos, length) for pos, length in misses]


def test_record_ends_when_it_is_full() -> None:
    recorder = Recorder(1 << 26)
    for i in range(100):
        recorder.missed(i << 30, 1)
    assert recorder.full
    assert recorder.length == MOST_BYTES
    recorder = Recorder(4096)
    for i in range(MOST_PARTS + 5):
        recorder.missed(i * MIB, 1)
    assert recorder.full
    assert len(recorder.parts()) == MOST_PARTS
    assert len(serialise(recorder.parts(), "")) < profile.MOST_TEXT


misses = st.lists(st.tuples(st.integers(0, 200 * 4096), st.integers(1, 20 * 4096)), max_size=60)


@given(misses, st.sampled_from([4096, 65536]))
def test_every_miss_is_covered_once_and_in_order_of_its_first_cluster(
    misses: list[tuple[int, int]], cluster_size: int
) -> None:
    parts = recorded(*misses, cluster_size=cluster_size)
    covered = [c for pos, length in parts for c in range(pos // cluster_size, (pos + length) // cluster_size)]
    assert len(covered) == len(set(covered))
    wanted = {c for pos, length in misses for c in range(pos // cluster_size, (pos + length - 1) // cluster_size + 1)}
    assert wanted <= set(covered)
    # What comes besides lies between two things that were wanted.
    assert all(min(wanted) < c < max(wanted) for c in set(covered) - wanted)
    if misses:
        assert parts[0].pos == misses[0][0] // cluster_size * cluster_size, "the first miss comes first"


parts = st.lists(st.builds(Part, st.integers(0, (1 << 63) - 1), st.integers(0, (1 << 63) - 1)), max_size=50)


@given(parts, st.text(st.characters(exclude_categories=("C", "Z")), max_size=20))
def test_what_is_written_reads_the_same(parts: list[Part], comment: str) -> None:
    assert parse(serialise(parts, comment), "profile") == parts


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "the first line must be"),
        (b"\x7fELF\n0 1\n", "the first line must be"),
        (TITLE + b"\n0 65536\n-1 5\n", "line 3 is not"),
        (TITLE + b"\n0 65536 1\n", "line 2 is not"),
        (TITLE + b"\n0x10 5\n", "line 2 is not"),
        (TITLE + b"\n" + b"9" * 20 + b" 5\n", "line 2 is not"),
        (TITLE + b"\n" + "٣ ٣\n".encode(), "line 2 is not"),
        (TITLE + b"\n" + b"0 1\n" * (MOST_PARTS + 1), "more than"),
        (TITLE + b"\n" + b"#" * profile.MOST_TEXT, "longer than"),
    ],
)
def test_what_is_no_profile_is_refused_in_a_line(text: bytes, why: str) -> None:
    with pytest.raises(UsageError, match=why) as refused:
        parse(text, "profile")
    assert str(refused.value).isprintable()


def test_people_may_edit_it_and_remark() -> None:
    text = TITLE + b"\r\n# of my base\r\n\r\n 0 65536 \r\n#1 2\r\n1048576 4096"
    assert parse(text, "profile") == [Part(0, 65536), Part(1 << 20, 4096)]


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for text in (data, TITLE + b"\n" + data):
        with contextlib.suppress(UsageError):
            assert all(part.pos >= 0 <= part.length for part in parse(text, "profile"))


def test_parts_become_the_clusters_inside_the_disk() -> None:
    size = 10 * C + 512
    parts = [Part(C + 5, 1), Part(9 * C, 1 << 62), Part(size, 1), Part(1 << 62, 5), Part(3 * C, 0), Part(0, C)]
    assert clusters(parts, C, size) == [(1, 2), (9, 11), (0, 1)]


@given(parts, st.sampled_from([4096, 65536, 1 << 26]), st.integers(0, 1 << 40))
def test_whatever_a_profile_lists_what_it_brings_is_bounded(parts: list[Part], cluster_size: int, size: int) -> None:
    total = 0
    for first, end in clusters(parts, cluster_size, size):
        assert 0 <= first < end <= -(-size // cluster_size)
        total += (end - first) * cluster_size
    assert total < MOST_BYTES + cluster_size
