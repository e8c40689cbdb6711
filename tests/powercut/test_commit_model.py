"""The model of the commit: every invariant in every state, and each mutation found."""

from __future__ import annotations

import pytest

from tests.powercut.commit_model import Broken, explore


@pytest.mark.parametrize(("failures", "crashes", "depth"), [(1, 0, 1000), (0, 1, 11)])
def test_no_order_of_steps_failures_and_power_cuts_breaks_an_invariant(failures: int, crashes: int, depth: int) -> None:
    states, deepest = explore(failures=failures, crashes=crashes, depth=depth)
    print(f"{states} states, {deepest} steps deep")
    assert states > 1000
    assert deepest < depth or crashes


@pytest.mark.parametrize(
    ("mutation", "problem"),
    [
        ("no flush 2", "without its data"),
        ("entries before data", "without its data"),
        ("L1 before the table", "a table that is not there"),
        ("no flush 5", "may be lost"),
        ("marks not given back", "is forgotten"),
        ("evicted while committed", "is forgotten"),
        ("waiter joins a running commit", "may be lost"),
        ("no zeros, no flush 4", "a table that is not there"),
    ],
)
def test_each_step_taken_out_breaks_one(mutation: str, problem: str) -> None:
    with pytest.raises(Broken, match=problem) as caught:
        explore(mutation)
    print(f"{mutation:32} {caught.value}")


def test_the_flush_of_step_4_is_covered_by_that_of_step_2_as_long_as_new_tables_are_written_as_zeros_first() -> None:
    """So its loss breaks nothing: a table that L1 names too early reads as zeros, which is unallocated."""
    states, _ = explore("no flush 4", failures=0)
    assert states > 1000
