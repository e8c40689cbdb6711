"""What is allowed, which limit decides, and when it will be done."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfs.config import StreamOptions
from qedfs.stream.pace import MOST_DEBT, Allowance, Limits, Pace, Why
from tests.stream.machine import DAY, HOUR, MIB, Load, Machine, spells

GIB = 1 << 30


def allowed(limits: Limits, *, idle: bool, now: float = 0.0, remaining: int = GIB) -> Allowance:
    return Pace(limits, 0.0).update(now, idle=idle, remaining=remaining)


def copied_in(pace: Pace, seconds: float, piece: int = MIB, begin: float = 0.0) -> int:
    """Bytes that a link without limits copies."""
    now, total = begin, 0
    while (pause := pace.pause(now)) < begin + seconds - now:
        now += pause
        pace.started(now, piece)
        pace.copied(now, piece, demand=False)
        total += piece
        now += 1e-3
        pace.update(now, idle=False, remaining=GIB)
    return total


# -- which limit decides -------------------------------------------------------------------------------------------------


def test_idle_without_a_cap_is_without_limit() -> None:
    assert allowed(Limits(floor=MIB), idle=True) == Allowance(math.inf, Why.IDLE)


def test_busy_gets_the_floor() -> None:
    assert allowed(Limits(floor=MIB), idle=False) == Allowance(MIB, Why.FLOOR)
    assert allowed(Limits(), idle=False) == Allowance(0, Why.FLOOR)


def test_cap_is_above_everything() -> None:
    for limits in (Limits(cap=MIB, floor=9 * MIB), Limits(cap=MIB, finish_by=10.0)):
        for idle in (True, False):
            assert allowed(limits, idle=idle) == Allowance(MIB, Why.CAP)
    assert allowed(Limits(cap=2 * MIB, floor=MIB), idle=False) == Allowance(MIB, Why.FLOOR)


def test_finish_by_raises_the_floor_to_what_is_needed() -> None:
    """A promise of 1000 s aims at 950."""
    limits = Limits(floor=MIB, finish_by=1000.0)
    assert allowed(limits, idle=False, remaining=1900 * MIB) == Allowance(2 * MIB, Why.FINISH_BY)
    assert allowed(limits, idle=False, remaining=95 * MIB) == Allowance(MIB, Why.FLOOR)
    assert allowed(limits, idle=True, remaining=95 * MIB) == Allowance(math.inf, Why.IDLE)


def test_once_the_promised_time_has_passed_only_the_cap_holds() -> None:
    assert allowed(Limits(finish_by=100.0), idle=False, now=101.0) == Allowance(math.inf, Why.FINISH_BY)
    assert allowed(Limits(cap=MIB, finish_by=100.0), idle=False, now=101.0) == Allowance(MIB, Why.CAP)


def test_options_count_from_when_they_are_set() -> None:
    assert Limits.of(StreamOptions(rate=5, floor=6, finish_by=7200.0), 100.0) == Limits(5, 6, 7300.0)
    assert Limits.of(StreamOptions(), 100.0) == Limits(0, MIB, None)


def test_everything_can_be_changed_meanwhile() -> None:
    pace = Pace(Limits(floor=MIB), 0.0)
    for limits, expected in [
        (Limits(floor=3 * MIB), Allowance(3 * MIB, Why.FLOOR)),
        (Limits(floor=3 * MIB, cap=2 * MIB), Allowance(2 * MIB, Why.CAP)),
        (Limits(finish_by=500.0 + 1000.0), Allowance(GIB / 950, Why.FINISH_BY)),
        (Limits(), Allowance(0.0, Why.FLOOR)),
    ]:
        pace.set_limits(limits, 500.0)
        assert pace.limits == limits
        assert pace.update(500.0, idle=False, remaining=GIB) == expected


def test_setting_another_limit_does_not_move_the_promise() -> None:
    pace = Pace(Limits(finish_by=1000.0), 0.0)
    pace.set_limits(Limits(floor=1, finish_by=1000.0), 900.0)
    assert pace.update(900.0, idle=False, remaining=50 * MIB).rate == pytest.approx(MIB)


# -- the next piece ------------------------------------------------------------------------------------------------------


def test_pieces_come_as_fast_as_the_limit_says() -> None:
    pace = Pace(Limits(floor=4 * MIB), 0.0)
    pace.update(0.0, idle=False, remaining=GIB)
    assert copied_in(pace, 60.0) == pytest.approx(240 * MIB, abs=MIB)


def test_without_a_floor_nothing_moves_while_busy() -> None:
    pace = Pace(Limits(), 0.0)
    pace.update(0.0, idle=False, remaining=GIB)
    assert pace.pause(1e9) == math.inf


def test_an_idle_moment_leaves_no_credit_behind() -> None:
    pace = Pace(Limits(floor=MIB), 0.0)
    pace.update(0.0, idle=True, remaining=GIB)
    assert pace.pause(500.0) == 0.0
    pace.update(1000.0, idle=False, remaining=GIB)
    assert copied_in(pace, 10.0, begin=1000.0) <= 11 * MIB


def test_a_clock_that_jumps_gives_no_more_than_a_second() -> None:
    pace = Pace(Limits(floor=4 * MIB), 0.0)
    pace.update(0.0, idle=False, remaining=GIB)
    pace.update(1e6, idle=False, remaining=GIB)
    assert copied_in(pace, 10.0, begin=1e6) == pytest.approx(44 * MIB, abs=MIB)
    pace.update(5.0, idle=False, remaining=GIB)
    assert pace.pause(5.0) < 1.0


def test_copies_for_the_guest_count_towards_the_floor_but_do_not_shut_it_for_long() -> None:
    pace = Pace(Limits(floor=MIB), 0.0)
    pace.update(0.0, idle=False, remaining=GIB)
    pace.copied(0.0, 5 * MIB, demand=True)
    assert pace.pause(0.0) == pytest.approx(5.0)
    pace.copied(0.0, 900 * MIB, demand=True)
    assert pace.pause(0.0) == pytest.approx(MOST_DEBT)


def test_copies_for_the_guest_do_not_count_towards_a_cap() -> None:
    pace = Pace(Limits(cap=MIB), 0.0)
    pace.update(0.0, idle=True, remaining=GIB)
    pace.copied(0.0, 50 * MIB, demand=True)
    assert pace.pause(0.0) == 0.0


# -- what people see -----------------------------------------------------------------------------------------------------


def test_rate_is_that_of_the_last_seconds() -> None:
    pace = Pace(Limits(), 0.0)
    for second in range(1, 21):
        pace.copied(float(second), 10 * MIB if second > 10 else MIB, demand=second % 2 == 0)
    assert pace.rate(20.0) == 10 * MIB
    assert pace.rate(40.0) == 0


def test_eta_is_unknown_without_speed_and_nothing_at_the_end() -> None:
    pace = Pace(Limits(), 0.0)
    pace.update(0.0, idle=False, remaining=GIB)
    assert pace.eta(100.0, GIB) is None
    assert pace.eta(100.0, 0) == 0.0


def test_eta_is_told_from_the_floor_before_anything_was_copied() -> None:
    pace = Pace(Limits(floor=MIB), 0.0)
    pace.update(0.0, idle=True, remaining=GIB)
    assert pace.eta(0.1, GIB) == pytest.approx(1024)
    pace.update(0.1, idle=False, remaining=GIB)
    assert pace.eta(0.2, GIB) == pytest.approx(1024)


def test_eta_follows_what_is_really_copied() -> None:
    pace = Pace(Limits(floor=MIB), 0.0)
    for tenth in range(1, 3001):
        pace.update(tenth / 10, idle=True, remaining=GIB)
        pace.copied(tenth / 10, MIB, demand=False)
    assert pace.eta(300.0, 600 * MIB) == pytest.approx(60, rel=0.02)
    for second in range(301, 1200):
        pace.update(float(second), idle=True, remaining=GIB)
    assert pace.eta(1200.0, GIB) is None


@given(
    st.lists(
        st.tuples(st.floats(-100, 1000), st.booleans(), st.integers(0, GIB), st.booleans()),
        max_size=50,
    ),
    st.integers(0, GIB),
    st.integers(0, GIB),
    st.none() | st.floats(-10, 1e4),
)
def test_stays_sane_whatever_happens(
    steps: list[tuple[float, bool, int, bool]], cap: int, floor: int, finish_by: float | None
) -> None:
    pace, now = Pace(Limits(cap, floor, finish_by), 0.0), 0.0
    for later, idle, length, demand in steps:
        now += later
        allowance = pace.update(now, idle=idle, remaining=length)
        assert allowance.rate >= 0
        assert not cap or allowance.rate <= cap
        assert cap or allowance.rate >= floor
        assert pace.pause(now) >= 0
        pace.started(now, length)
        pace.copied(now, length, demand=demand)
        assert pace.rate(now) >= 0
        eta = pace.eta(now, length)
        assert eta is None or eta >= 0


# -- days ----------------------------------------------------------------------------------------------------------------


def busy_all_day(_: random.Random) -> Callable[[float], Load]:
    return lambda now: Load(disk_read=30.0 * MIB)


def a_busy_afternoon(chance: random.Random) -> Callable[[float], Load]:
    work = spells(chance, 600, 300)
    return lambda now: Load(waits=work(now) or now > 3 * HOUR)


@pytest.mark.parametrize("day", [busy_all_day, a_busy_afternoon])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_finishes_in_time_when_the_link_allows(
    day: Callable[[random.Random], Callable[[float], Load]], share: float
) -> None:
    """Eight hours, in which the link could carry all of it `1 / share` times."""
    link = 16.0 * MIB
    total = int(share * link * 8 * HOUR)
    machine = Machine(day(random.Random(2)), link=link, limits=Limits(floor=MIB, finish_by=8 * HOUR), remaining=total)
    machine.run(DAY)
    assert machine.remaining == 0
    assert machine.now <= 8 * HOUR


def test_a_promise_on_a_busy_machine_takes_no_more_than_it_needs() -> None:
    total = int(4 * MIB * 2 * HOUR)
    machine = Machine(busy_all_day(random.Random(1)), limits=Limits(floor=MIB, finish_by=2 * HOUR), remaining=total)
    machine.run(HOUR)
    assert total - machine.remaining == pytest.approx(total / 2, rel=0.02)


def test_makes_up_for_a_link_that_was_away() -> None:
    machine = Machine(busy_all_day(random.Random(1)), limits=Limits(finish_by=2 * HOUR), remaining=int(8 * MIB * HOUR))
    machine.link = 0.0
    machine.run(HOUR)
    machine.link = 16.0 * MIB
    machine.run(DAY)
    assert machine.now <= 2 * HOUR


def test_ends_even_though_the_machine_is_never_idle() -> None:
    machine = Machine(busy_all_day(random.Random(1)), limits=Limits(floor=MIB), remaining=int(MIB * HOUR))
    machine.run(DAY)
    assert machine.remaining == 0
    assert machine.now == pytest.approx(HOUR, rel=0.02)
