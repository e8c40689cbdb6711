"""When a moment is idle: each trap by itself, then whole days."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfs.config import Idle
from qedfs.stream.idle import AFTER_WAIT, LONGEST_HOLD, NOTHING, Decision, IdleDetector, Reason, Sample, Traffic
from qedfs.stream.pace import Limits
from tests.stream.machine import DAY, HOUR, MIB, PIECE, QUIET, Load, Machine, spells


def disk(at: float, read: float = 0, written: float = 0, own: float = 0, flushed: float = 0) -> Sample:
    """Counters of a disk and of us, in MiB."""
    counters = Traffic(int(read * MIB), int(written * MIB))
    return Sample(at, disk=counters, own_disk=Traffic(0, int(own * MIB)), own_flushed=int(flushed * MIB))


def decided(samples: Iterable[Sample], mode: Idle = Idle.AUTO) -> list[Decision]:
    detector = IdleDetector(mode)
    return [detector.decide(sample) for sample in samples]


def reasons(samples: Iterable[Sample], mode: Idle = Idle.AUTO) -> list[Reason]:
    return [decision.reason for decision in decided(samples, mode)]


# -- the guest -----------------------------------------------------------------------------------------------------------


def test_a_quiet_machine_is_idle_after_a_moment() -> None:
    assert reasons(disk(at) for at in (0.0, 0.1, 0.5)) == [Reason.QUIET, Reason.QUIET, Reason.NONE]


def test_a_request_that_waits_for_the_backing_is_busy_and_so_is_the_moment_after() -> None:
    samples = [
        Sample(0.0),
        Sample(1.0),
        Sample(2.0, waiting=1),
        Sample(2.1, waited_at=2.05),
        Sample(2.29, waited_at=2.05),
        Sample(2.05 + 2 * AFTER_WAIT, waited_at=2.05),
    ]
    expected = [Reason.QUIET, Reason.NONE, Reason.GUEST, Reason.GUEST, Reason.GUEST, Reason.NONE]
    assert reasons(samples) == reasons(samples, Idle.GUEST) == expected


def test_always_never_waits() -> None:
    samples = [Sample(at, waiting=1, disk=Traffic(0, int(at * 100 * MIB))) for at in range(5)]
    assert {decision.idle for decision in decided(samples, Idle.ALWAYS)} == {True}


def test_the_mode_can_be_changed_at_any_time() -> None:
    detector = IdleDetector(Idle.ALWAYS)
    assert detector.decide(disk(0)).idle
    detector.mode = Idle.AUTO
    assert detector.decide(disk(1, written=100)).reason is Reason.DISK
    detector.mode = Idle.GUEST
    assert detector.decide(disk(2, written=200)).idle


def test_quiet_asked_for_doubles_with_each_mistake_up_to_a_limit_and_is_forgiven() -> None:
    detector = IdleDetector(Idle.GUEST)
    now, holds = 0.0, []
    for _ in range(10):
        began = now
        detector.decide(Sample(now, waiting=1))
        while not detector.decide(Sample(now, waited_at=began)).idle:
            now += 0.01
        holds.append(now - began)
    assert holds == pytest.approx([min(AFTER_WAIT * 2**n, LONGEST_HOLD) for n in range(10)], abs=0.03)
    now += 1000
    detector.decide(Sample(now, waiting=1))
    assert detector.decide(Sample(now + 1.0, waited_at=now)).idle


# -- others on the disk --------------------------------------------------------------------------------------------------


def test_others_on_the_disk_are_busy_until_they_have_stopped_for_a_while() -> None:
    samples = [disk(at, read=20 * min(max(0, at - 2), 5)) for at in range(16)]
    found = reasons(samples)
    assert found[1:3] == [Reason.NONE] * 2
    assert set(found[3:12]) == {Reason.DISK}
    assert found[-1] is Reason.NONE
    assert decided(samples)[7].foreign_disk == pytest.approx(20 * MIB)


def test_a_little_traffic_of_others_is_no_load() -> None:
    assert set(reasons(disk(at, read=0.4 * at, written=0.4 * at) for at in range(1, 50))) == {Reason.QUIET, Reason.NONE}


def test_traffic_around_the_limit_does_not_go_back_and_forth() -> None:
    total, samples = 0.0, []
    for at in range(120):
        total += 2.0 if at < 20 else 1.3 if at % 20 < 10 else 0.7
        samples.append(disk(at, written=total))
    assert set(reasons(samples)[20:]) == {Reason.DISK}


def test_own_writes_that_reach_the_disk_much_later_are_ours() -> None:
    """200 MiB written at once, seen by the disk 25 s later in one burst. Minus the own bytes of the same second it would be a load."""
    written = [0 if at < 30 else 200 for at in range(60)]
    own = [0 if at < 5 else 200 for at in range(60)]
    samples = [disk(at, written=w, own=o) for at, (w, o) in enumerate(zip(written, own, strict=True))]
    assert set(reasons(samples)[1:]) == {Reason.NONE}


def test_what_was_flushed_cannot_excuse_what_others_write_afterwards() -> None:
    """We overwrote 200 MiB in memory, so that the disk saw 100; the flush ends our claim to the rest."""
    before = [disk(0), disk(1, own=200), disk(2, written=100, own=200)]
    after = [disk(3 + at, written=100 + 20 * at, own=200, flushed=200) for at in range(5)]
    assert reasons([*before, *after])[-3:] == [Reason.DISK] * 3
    unflushed = [replace(sample, own_flushed=0) for sample in after]
    assert reasons([*before, *unflushed])[-3:] == [Reason.NONE] * 3


def test_a_flush_leaves_what_was_written_after_it_began() -> None:
    samples = [
        disk(0),
        disk(1, own=100),
        disk(2, written=100, own=250, flushed=100),
        disk(3, written=250, own=250, flushed=100),
    ]
    assert set(reasons(samples)[1:]) == {Reason.NONE}


def test_a_claim_that_nothing_ends_is_given_up() -> None:
    samples = [
        disk(0),
        disk(1, own=1000),
        disk(25, own=1000),
        disk(50, own=1000),
        disk(70, own=1000),
        disk(71, written=300, own=1000),
    ]
    assert reasons(samples)[-1] is Reason.DISK


def test_journal_and_metadata_of_our_own_writes_are_not_others() -> None:
    assert set(reasons(disk(at, written=112 * at, own=100 * at) for at in range(1, 60))[1:]) == {Reason.NONE}
    assert reasons(disk(at, written=120 * at, own=100 * at) for at in range(1, 60))[-1] is Reason.DISK


# -- others on the network -----------------------------------------------------------------------------------------------


def network(at: float, received: float, asked: float = 0) -> Sample:
    return Sample(at, network=Traffic(int(received * MIB), 0), own_network=Traffic(int(asked * MIB), 0))


def test_what_we_asked_for_is_ours_when_it_comes() -> None:
    assert set(reasons(network(at, 105 * max(0, at - 1), 100 * at) for at in range(1, 60))[1:]) == {Reason.NONE}


def test_others_on_the_network_are_busy() -> None:
    samples = [network(at, 130 * at, 100 * at) for at in range(1, 60)]
    assert reasons(samples)[-1] is Reason.NETWORK
    assert decided(samples)[-1].foreign_network == pytest.approx(30 * MIB)


# -- counters and clocks that misbehave ----------------------------------------------------------------------------------


def test_an_unknown_device_leaves_the_guest_to_decide() -> None:
    samples = [Sample(float(at), own_disk=Traffic(0, at * 100 * MIB)) for at in range(10)]
    assert set(reasons(samples)[1:]) == {Reason.NONE}
    assert decided(samples)[-1].foreign_disk is None


def test_a_counter_that_wraps_changes_nothing() -> None:
    def seen(per_second: int) -> list[Sample]:
        return [Sample(float(at), disk=Traffic(0, at * per_second * MIB % (64 * MIB))) for at in range(60)]

    assert set(reasons(seen(30))[1:]) == {Reason.DISK}
    assert len(set(reasons(disk(at, written=at / 2 % 3) for at in range(60))[1:])) == 1


def test_a_device_that_vanishes_and_returns_with_other_counters_is_no_load() -> None:
    samples = [disk(0, written=5), disk(1, written=5), Sample(2.0), disk(3, written=5000), disk(4, written=5000)]
    assert set(reasons(samples)[1:]) == {Reason.NONE}


def test_what_happened_while_the_machine_slept_is_not_now() -> None:
    samples = [disk(0), disk(1), disk(3600, written=5000), disk(3601, written=5000)]
    assert reasons(samples)[1:] == [Reason.NONE] * 3


def test_a_clock_that_is_set_back_does_not_stop_the_decision() -> None:
    detector = IdleDetector(Idle.AUTO)
    detector.decide(Sample(10_000.0, waiting=1))
    for at in range(3):
        decision = detector.decide(Sample(float(at), waited_at=10_000.0 if at == 0 else -math.inf))
    assert decision.idle


counters = st.builds(Traffic, st.integers(0, 1 << 40), st.integers(0, 1 << 40))
anything = st.builds(
    Sample,
    at=st.floats(0, 1e6),
    waiting=st.integers(0, 1),
    waited_at=st.floats(-1e3, 1e6),
    disk=st.none() | counters,
    own_disk=counters,
    own_flushed=st.integers(0, 1 << 40),
    network=st.none() | counters,
    own_network=counters,
)


@given(st.lists(anything, max_size=30))
def test_always_decides_and_returns_to_idle(samples: list[Sample]) -> None:
    detector = IdleDetector(Idle.AUTO)
    for sample in samples:
        assert detector.decide(sample).idle == (detector.decide(sample).reason is Reason.NONE)
    last = samples[-1].at if samples else 0.0
    for second in range(1, 60):
        decision = detector.decide(Sample(last + second, disk=NOTHING))
    assert decision.idle


# -- days ----------------------------------------------------------------------------------------------------------------


def office_host(chance: random.Random) -> Callable[[float], Load]:
    """Backups of 20 minutes, jobs of some seconds, people on the network by day; a little writing all the time."""
    backup, job, people = spells(chance, 1200, 3000), spells(chance, 8, 290), spells(chance, 40, 180)

    def load(now: float) -> Load:
        by_day = 8 * HOUR < now < 18 * HOUR
        backed_up, working, asked_for = backup(now), job(now), people(now)
        return Load(
            disk_read=30.0 * MIB if backed_up else 0.0,
            disk_written=(20.0 if working else 0.2 * chance.random()) * MIB,
            received=5.0 * MIB if by_day and asked_for else 0.0,
        )

    return load


def bursty_guest(chance: random.Random) -> Callable[[float], Load]:
    burst = spells(chance, 20, 200)

    def load(now: float) -> Load:
        busy = burst(now)
        return Load(waits=busy and chance.random() < 0.6, guest_written=3.0 * MIB if busy else 0.0)

    return load


def busy_by_day(chance: random.Random) -> Callable[[float], Load]:
    """Nothing but work from 7 to 23; at night some writing every five minutes."""

    def load(now: float) -> Load:
        if 7 * HOUR < now < 23 * HOUR:
            return Load(disk_written=30.0 * MIB, received=10.0 * MIB)
        return Load(disk_written=(10.0 if now % 300 < 1 else 0.05) * MIB)

    return load


def used_well(machine: Machine) -> None:
    """What every day must show: few changes, idle time used, busy time respected."""
    assert machine.switches_an_hour() <= 120
    assert machine.used() >= 0.9
    assert machine.found_idle_while_busy() <= 0.02
    busy = sum(not decision.idle for _, decision in machine.decisions) * machine.step
    pieces = PIECE * (1 + len(machine.switches))
    assert machine.rate_while_not_idle() * busy <= machine.limits.floor * busy + pieces


@pytest.mark.parametrize("day", [office_host, bursty_guest, busy_by_day])
def test_a_day(day: Callable[[random.Random], Callable[[float], Load]]) -> None:
    machine = Machine(day(random.Random(1)))
    machine.run(DAY)
    used_well(machine)


@pytest.mark.parametrize("flush_every", [1.0, math.inf], ids=["commits", "no commits"])
def test_a_guest_that_logs_all_day_is_streamed_all_day(flush_every: float) -> None:
    """Five small local writes a second; and with streaming at full speed our own writeback comes seconds later, all day."""
    machine = Machine(lambda now: Load(guest_written=40e3, disk_written=20e3), flush_every=flush_every)
    machine.run(DAY / 4)
    assert len(machine.switches) <= 1
    assert machine.used() > 0.999
    assert sum(length for _, length in machine.copied) >= 0.99 * machine.link * DAY / 4


def test_a_host_that_is_busy_all_day_gets_the_floor_and_no_more() -> None:
    machine = Machine(lambda now: Load(disk_read=15.0 * MIB, disk_written=25.0 * MIB))
    machine.run(DAY / 2)
    assert machine.switches == []
    assert sum(length for _, length in machine.copied) == pytest.approx(machine.limits.floor * DAY / 2, rel=0.01)


def test_a_day_with_counters_and_clocks_that_misbehave() -> None:
    def damaged(now: float, sample: Sample) -> Sample:
        assert sample.disk is not None
        assert sample.network is not None
        if HOUR < now < 2 * HOUR:
            return replace(sample, disk=None)
        if 3 * HOUR < now < 4 * HOUR:
            return replace(sample, network=None, disk=None)
        wrap = 1 << 32
        return replace(
            sample,
            at=sample.at + (7200 if now > 20 * HOUR else 0) - (600 if now > 22 * HOUR else 0),
            disk=Traffic(sample.disk.read % wrap, sample.disk.written % wrap),
            network=Traffic(sample.network.read % wrap, 0),
        )

    def load(now: float) -> Load:
        return Load(disk_written=40.0 * MIB) if 10 * HOUR < now < 15 * HOUR else QUIET

    machine = Machine(load, damage=damaged)
    machine.run(DAY)
    used_well(machine)
    assert len(machine.switches) <= 10


@pytest.mark.parametrize("period", [2, 10, 31, 60])
def test_something_that_comes_back_just_when_it_hurts_most_does_not_make_it_flap(period: int) -> None:
    machine = Machine(lambda now: Load(waits=now % period < 1), limits=Limits(floor=MIB))
    machine.run(DAY / 6)
    assert machine.switches_an_hour() <= 240
