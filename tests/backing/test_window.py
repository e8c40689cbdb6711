"""The window on a simulated link: it fills the link, and a miss waits little more than on an idle one.

The link has one queue, so that a miss stands behind everything that is in flight: the worst case. Only `Window` is real.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfs.backing.window import LEAST_PIECE, MOST_PIECE, Phase, Window
from tests.backing.link import Link, Run

GBIT = 125e6
MIB = 1 << 20

LINKS = {
    "1 Gbit/s 1 ms": (GBIT, 0.001),
    "1 Gbit/s 20 ms": (GBIT, 0.020),
    "1 Gbit/s 80 ms": (GBIT, 0.080),
    "100 Mbit/s 5 ms": (GBIT / 10, 0.005),
    "100 Mbit/s 50 ms": (GBIT / 10, 0.050),
    "10 Mbit/s 50 ms": (GBIT / 100, 0.050),
    "10 Gbit/s 0.1 ms": (10 * GBIT, 0.0001),
}
links = pytest.mark.parametrize(("rate", "round_trip"), LINKS.values(), ids=LINKS.keys())


def most_latency(run: Run) -> float:
    """What a miss may take on average: two round trips; on a short way, one and the time of a piece, and 4 ms."""
    link = run.link
    return max(2 * link.round_trip, link.round_trip + link.jitter + run.window.piece / link.rate + 0.004)


@pytest.mark.parametrize("jitter", [0.0, 0.1], ids=["steady", "jitter"])
@links
def test_fills_the_link_and_a_miss_waits_little(rate: float, round_trip: float, jitter: float) -> None:
    run = Run(Link(rate, round_trip, jitter * round_trip))
    seconds = 6.0 if rate > GBIT else 20.0
    run.run(seconds)
    assert run.rate(3, seconds) >= 0.93 * rate
    assert run.latency(3, seconds) <= most_latency(run)
    assert run.window.bandwidth == pytest.approx(rate, rel=0.1)


@links
def test_is_there_within_three_seconds_and_no_miss_waits_long_meanwhile(rate: float, round_trip: float) -> None:
    run = Run(Link(rate, round_trip))
    run.run(3)
    assert run.rate(1.5, 3) >= 0.8 * rate
    assert run.latency(0, 3) <= most_latency(run) + 0.15


def test_without_growth_at_the_start_a_long_link_would_stay_empty() -> None:
    """The simulation tells a bad window from a good one: eight requests of 64 KiB fill 5 % of it."""
    run = Run(Link(GBIT, 0.080), Window(8 * LEAST_PIECE))
    run.run(10)
    assert run.rate(3, 10) < 0.1 * GBIT


def test_a_window_that_is_always_wide_makes_misses_wait() -> None:
    """And in the other direction: 32 MiB in flight are a quarter of a second."""

    class Wide(Window):
        def admits(self, length: int) -> bool:
            return self.in_flight + length <= 32 * MIB

    run = Run(Link(GBIT, 0.020), Wide(32 * MIB))
    run.run(10)
    assert run.latency(3, 10) > 10 * 0.020


@pytest.mark.parametrize("round_trip", [0.001, 0.02, 0.08])
def test_bandwidth_falls_to_a_tenth_and_comes_back(round_trip: float) -> None:
    link = Link(GBIT, round_trip, 0.05 * round_trip)
    run = Run(link)
    run.run(10)
    link.rate = GBIT / 10
    run.run(30)
    assert run.rate(12, 30) >= 0.93 * link.rate
    assert run.latency(10.5 + 20 * round_trip, 12.5 + 20 * round_trip) <= 3 * most_latency(run)
    assert run.latency(12, 30) <= 2 * most_latency(run)
    assert run.latency(22, 30) <= most_latency(run)
    link.rate = GBIT
    run.run(40)
    assert run.rate(32, 40) >= 0.93 * GBIT
    assert run.latency(32, 40) <= most_latency(run)


@pytest.mark.parametrize("round_trip", [0.001, 0.02, 0.08])
def test_the_way_becomes_twice_as_long_and_short_again(round_trip: float) -> None:
    link = Link(GBIT, round_trip, 0.05 * round_trip)
    run = Run(link)
    run.run(10)
    link.round_trip = 2 * round_trip
    run.run(20)
    assert run.rate(13, 20) >= 0.93 * GBIT
    assert run.latency(13, 20) <= most_latency(run)
    link.round_trip = round_trip
    run.run(45)
    assert run.rate(25, 45) >= 0.93 * GBIT
    assert run.latency(35, 45) <= most_latency(run)


@pytest.mark.parametrize("round_trip", [0.001, 0.02, 0.08])
def test_goes_on_after_a_stall_of_five_seconds(round_trip: float) -> None:
    """To the window a stall and a clock that jumps ahead (a suspended machine) are one thing."""
    link = Link(GBIT, round_trip)
    run = Run(link)
    run.run(10)
    link.down_until = 15
    run.run(25)
    assert run.rate(18, 25) >= 0.93 * GBIT
    assert run.latency(18, 25) <= most_latency(run)


def test_a_server_that_answers_late_by_milliseconds_does_not_make_a_short_way_slow() -> None:
    """On real machines the lowest latency is a lucky one: a window made for it alone reached a quarter of the rate."""
    run = Run(Link(0.4 * GBIT, 0.001, late=0.004))
    run.run(20)
    assert run.rate(3, 20) >= 0.93 * 0.4 * GBIT


@pytest.mark.parametrize("round_trip", [0.001, 0.02, 0.08])
def test_shares_with_others_and_takes_the_link_back(round_trip: float) -> None:
    run = Run(Link(GBIT, round_trip))
    run.run(10)
    run.cross(GBIT / 2, until=20)
    run.run(30)
    assert 0.4 * GBIT <= run.rate(11, 20) <= 0.55 * GBIT
    assert run.latency(11, 20) <= most_latency(run) + 1.5 * round_trip
    assert run.rate(23, 30) >= 0.93 * GBIT


def test_is_ready_at_once_after_a_long_pause() -> None:
    run = Run(Link(GBIT, 0.02))
    run.run(10)
    run.want(False)
    run.run(1000)
    run.want(True)
    run.run(1001)
    assert run.rate(1000.1, 1000.3) >= 0.8 * GBIT
    assert run.window.bandwidth == pytest.approx(GBIT, rel=0.1)


def test_a_reader_that_wants_little_does_not_make_the_link_look_slow() -> None:
    window = Window(32 * MIB)
    run = Run(Link(GBIT, 0.02), window)
    run.run(10)
    run.want(False)
    run.run(11)
    for second in range(60):  # one piece a second: a busy machine at its floor
        run._send(window.piece)
        run.run(12 + second)
    assert window.bandwidth == pytest.approx(GBIT, rel=0.1)


def test_requests_of_many_sizes_do_not_mislead_it() -> None:
    """A disk that is local in places leaves small gaps to fetch."""
    chance = random.Random(1)
    run = Run(Link(GBIT, 0.02), length=lambda piece: chance.choice([LEAST_PIECE, piece // 2, piece]))
    run.run(20)
    assert run.rate(3, 20) >= 0.93 * GBIT
    assert run.latency(3, 20) <= most_latency(run)


def test_pieces_are_small_on_a_slow_link_and_large_on_a_fast_one() -> None:
    pieces = {}
    for name, (rate, round_trip) in LINKS.items():
        run = Run(Link(rate, round_trip))
        run.run(5)
        pieces[name] = run.window.piece
    assert pieces["10 Mbit/s 50 ms"] == LEAST_PIECE
    assert pieces["1 Gbit/s 1 ms"] == 256 << 10
    assert pieces["1 Gbit/s 80 ms"] == pieces["10 Gbit/s 0.1 ms"] == MOST_PIECE


def test_one_request_is_always_admitted_and_the_limit_is_kept() -> None:
    window = Window(LEAST_PIECE)
    assert window.admits(2 * MIB)
    token = window.sent(0.0, 2 * MIB)
    assert not window.admits(1)
    window.done(token, 1.0)
    assert window.admits(2 * MIB)
    run = Run(Link(GBIT, 0.08), Window(1 << 20))
    run.run(5)
    assert run.window.allowed <= 1 << 20


def test_knows_round_trip_and_bandwidth() -> None:
    window = Window(32 * MIB)
    assert (window.round_trip, window.bandwidth, window.phase) == (0.0, 0.0, Phase.START)
    run = Run(Link(GBIT, 0.02), window)
    run.run(5)
    assert window.round_trip == pytest.approx(0.02, rel=0.1)
    assert window.bandwidth == pytest.approx(GBIT, rel=0.05)


def test_a_request_that_failed_leaves_room_and_no_trace() -> None:
    window = Window(32 * MIB)
    tokens = [window.sent(0.0, window.piece) for _ in range(4)]
    assert not window.admits(1)
    for token in tokens:
        window.failed(token, 0.5)
    assert window.in_flight == 0
    assert window.bandwidth == 0.0
    assert window.admits(window.piece)


@given(
    st.lists(
        st.tuples(st.sampled_from(["sent", "done", "failed"]), st.integers(1, 2 * MIB), st.floats(-5.0, 500.0)),
        max_size=200,
    ),
    st.integers(LEAST_PIECE, 64 * MIB),
)
def test_stays_sane_whatever_happens(steps: list[tuple[str, int, float]], most: int) -> None:
    """Any order of answers, also with a clock that stands still or goes back."""
    window, tokens, now = Window(most), [], 0.0
    for what, length, later in steps:
        now += later
        if what == "sent":
            if window.admits(length):
                tokens.append(window.sent(now, length))
        elif tokens:
            token = tokens.pop(length % len(tokens))
            (window.done if what == "done" else window.failed)(token, now)
        assert window.in_flight == sum(token.length for token in tokens)
        assert LEAST_PIECE <= window.piece <= MOST_PIECE
        assert min(window.piece, most) <= window.allowed <= most
