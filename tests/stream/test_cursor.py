"""The order in which a disk is copied."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qedfs.stream.cursor import Cursor

CLUSTER = 4 << 20
"""So that 16 clusters ahead of a miss and 2 behind it are near."""


class Table:
    """Which clusters are not local."""

    def __init__(self, total: int, *local: int) -> None:
        self.total = total
        self.missing = set(range(total)) - set(local)

    def next_missing(self, first: int, end: int) -> tuple[int, int] | None:
        assert 0 <= first < end <= self.total
        start = next((c for c in range(first, end) if c in self.missing), None)
        if start is None:
            return None
        return start, next((c for c in range(start, end) if c not in self.missing), end)

    def cursor(self, *profile: tuple[int, int]) -> Cursor:
        return Cursor(self.total, CLUSTER, self.next_missing, profile)

    def copied(self, taken: tuple[int, int] | None) -> tuple[int, int]:
        assert taken is not None
        self.missing -= set(range(*taken))
        return taken


def order(table: Table, cursor: Cursor, most: int) -> list[tuple[int, int]]:
    """Copy everything, one range at a time."""
    result = []
    while taken := cursor.take(most):
        result.append(table.copied(taken))
        cursor.release(taken)
    return result


def test_ascends_in_pieces_and_leaves_out_what_is_local() -> None:
    table = Table(10, 0, 4, 5)
    assert order(table, table.cursor(), 2) == [(1, 3), (3, 4), (6, 8), (8, 10)]


def test_ends_when_nothing_is_missing() -> None:
    table = Table(3, 0, 1, 2)
    assert table.cursor().take(8) is None
    assert Table(0).cursor().take(8) is None


def test_profile_may_come_later_and_be_taken_alone() -> None:
    table = Table(10)
    cursor = table.cursor()
    assert cursor.take(2) == (0, 2)
    cursor.follow([(7, 9), (0, 1), (4, 5)])
    assert [cursor.take_profile(8) for _ in range(3)] == [(7, 9), (4, 5), None], "what is under way is left out"
    assert cursor.under_way == 3
    assert cursor.take(8) == (2, 4)


def test_profile_comes_first_in_its_own_order() -> None:
    table = Table(10, 7)
    assert order(table, table.cursor((6, 9), (2, 4), (90, 99)), 8) == [(6, 7), (8, 9), (2, 4), (0, 2), (4, 6), (9, 10)]


def test_neighbours_of_the_newest_miss_come_before_the_rest() -> None:
    table = Table(100)
    cursor = table.cursor()
    first = table.copied(cursor.take(4))
    cursor.missed(70)
    cursor.missed(40)
    table.missing.remove(40)
    after = [table.copied(cursor.take(8)) for _ in range(4)]
    assert [first, *after] == [(0, 4), (41, 49), (49, 56), (38, 40), (4, 12)]


def test_a_miss_takes_over_from_an_earlier_one_and_the_ascent_goes_on_where_it_was() -> None:
    table = Table(100)
    cursor = table.cursor()
    taken = []
    for miss in (20, 80):
        cursor.missed(miss)
        taken.append(table.copied(cursor.take(4)))
    assert taken == [(20, 24), (80, 84)]
    table.missing -= set(range(70, 100))
    assert cursor.take(4) == (0, 4)


def test_what_is_under_way_is_not_taken_again() -> None:
    table = Table(10)
    cursor = table.cursor((4, 6))
    assert [cursor.take(3) for _ in range(5)] == [(4, 6), (0, 3), (3, 4), (6, 9), (9, 10)]
    assert cursor.take(3) is None
    assert cursor.under_way == 5


def test_a_failed_copy_is_taken_again_after_the_others() -> None:
    table = Table(6)
    cursor = table.cursor()
    failed = cursor.take(2)
    assert failed == (0, 2)
    second = table.copied(cursor.take(2))
    cursor.release(failed)
    assert cursor.take(2) == (4, 6)
    assert cursor.take(2) == (0, 2)
    assert second == (2, 4)


def test_one_range_that_always_fails_does_not_hold_up_the_rest() -> None:
    table = Table(30)
    cursor = table.cursor((3, 5))
    cursor.missed(3)
    for _ in range(40):
        taken = cursor.take(1)
        assert taken is not None
        if taken != (3, 4):
            table.copied(taken)
        cursor.release(taken)
        if table.missing == {3}:
            return
    raise AssertionError(f"still missing: {table.missing}")


def test_goes_around_to_what_became_missing_behind_it() -> None:
    table = Table(8)
    cursor = table.cursor()
    first, second = cursor.take(4), cursor.take(2)
    assert (first, second) == ((0, 4), (4, 6))
    cursor.release((0, 4))
    assert [cursor.take(4) for _ in range(3)] == [(6, 8), (0, 4), None]


def test_a_disk_that_grows_has_more_to_copy() -> None:
    table = Table(4)
    cursor = table.cursor()
    order(table, cursor, 4)
    table.total, table.missing = 6, {4, 5}
    cursor.total = 6
    assert cursor.take(4) == (4, 6)


def test_after_a_restart_only_what_is_missing_is_copied() -> None:
    table = Table(20)
    cursor = table.cursor()
    for _ in range(3):
        table.copied(cursor.take(4))
    assert order(table, table.cursor(), 100) == [(12, 20)]


steps = st.lists(
    st.tuples(st.sampled_from(["take", "end", "fail", "miss", "write"]), st.integers(0, 40), st.integers(1, 9)),
    max_size=80,
)
ranges = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=5)


@given(st.integers(0, 40), steps, ranges)
def test_never_hands_out_a_cluster_twice_and_copies_all(
    total: int, steps: list[tuple[str, int, int]], profile: list[tuple[int, int]]
) -> None:
    table = Table(total)
    cursor = table.cursor(*profile)
    under_way: list[tuple[int, int]] = []
    for what, place, length in steps:
        if what == "take":
            taken = cursor.take(length)
            held = {c for r in under_way for c in range(*r)}
            if taken is None:
                assert table.missing <= held
            else:
                clusters = set(range(*taken))
                assert 0 < len(clusters) <= length
                assert clusters <= table.missing - held
                under_way.append(taken)
        elif what in ("end", "fail") and under_way:
            ended = under_way.pop(place % len(under_way))
            if what == "end":
                table.copied(ended)
            cursor.release(ended)
        elif what == "miss":
            cursor.missed(place)
        elif what == "write":
            table.missing -= set(range(place, place + length))
    for taken in under_way:
        cursor.release(taken)
    order(table, cursor, 8)
    assert not table.missing
