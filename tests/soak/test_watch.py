"""The rules for a process that lives long: what they let pass and what they refuse."""

from __future__ import annotations

import pytest

from contrib.kill.stamps import Violation
from contrib.soak.watch import MOST_THREADS, Sample, judge

MIB = 1 << 20


def test_growth_in_the_first_third_is_warm_up() -> None:
    judge([Sample(rss * MIB, 20, 16) for rss in (20, 60, 80, 80, 81, 80, 81, 80, 80)])


def test_a_peak_is_no_growth() -> None:
    judge([Sample(rss * MIB, 20, 16) for rss in (80, 80, 80, 80, 80, 80, 80, 300, 80)])


def test_memory_that_goes_on_growing_is_refused() -> None:
    with pytest.raises(Violation, match="memory grows"):
        judge([Sample((60 + 6 * i) * MIB, 20, 16) for i in range(12)])


def test_file_descriptors_that_go_on_growing_are_refused() -> None:
    with pytest.raises(Violation, match="file descriptors leak"):
        judge([Sample(60 * MIB, 20 + i, 16) for i in range(15)])


def test_too_many_threads_are_refused_even_once() -> None:
    with pytest.raises(Violation, match="threads"):
        judge([Sample(60 * MIB, 20, MOST_THREADS + 1)])
