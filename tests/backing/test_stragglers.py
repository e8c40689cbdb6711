"""When a request is late, and how many may be asked twice: the decisions alone."""

from __future__ import annotations

import pytest

from qedfs.backing.stragglers import BURST, FACTOR, FEWEST, LEAST, SAMPLES, SHARE, Allowance, Latencies

KIB = 1 << 10


def test_nothing_is_late_before_enough_is_known() -> None:
    latencies = Latencies()
    for _ in range(FEWEST - 1):
        latencies.observe(64 * KIB, 1.0)
    assert latencies.patience(64 * KIB) is None
    latencies.observe(64 * KIB, 1.0)
    assert latencies.patience(64 * KIB) == FACTOR


def test_one_in_twenty_is_not_the_measure() -> None:
    latencies = Latencies()
    for number in range(SAMPLES):
        latencies.observe(64 * KIB, 9.0 if number % 32 == 0 else 0.1)
    assert latencies.patience(64 * KIB) == pytest.approx(FACTOR * 0.1)


def test_each_size_has_its_own_measure() -> None:
    latencies = Latencies()
    for _ in range(FEWEST):
        latencies.observe(64 * KIB, 0.1)
        latencies.observe(1024 * KIB, 1.0)
    assert latencies.patience(64 * KIB) == pytest.approx(FACTOR * 0.1)
    assert latencies.patience(1024 * KIB) == FACTOR
    assert latencies.patience(4 * KIB) is None


def test_when_all_have_become_slow_so_has_the_measure() -> None:
    latencies = Latencies()
    for seconds in (0.1, 1.0):
        for _ in range(SAMPLES):
            latencies.observe(KIB, seconds)
    assert latencies.patience(KIB) == FACTOR


def test_a_fast_server_still_has_a_least_time() -> None:
    latencies = Latencies()
    for _ in range(FEWEST):
        latencies.observe(KIB, 0.0001)
    assert latencies.patience(KIB) == LEAST


def test_of_a_hundred_requests_at_most_five_are_asked_twice() -> None:
    allowance = Allowance()
    granted = 0
    for _ in range(1000):
        allowance.earn()
        granted += allowance.take()
    assert granted <= 1000 * SHARE + 1


def test_what_was_not_used_is_saved_up_to_a_limit() -> None:
    allowance = Allowance()
    for _ in range(10_000):
        allowance.earn()
    assert sum(allowance.take() for _ in range(100)) == BURST
