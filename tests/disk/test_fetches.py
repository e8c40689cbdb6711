from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing

from qedfs.disk.fetches import COPY_BUDGET, MAX_FETCH, Budget, Fetch, Fetches
from qedfs.errors import BackingRefused, BackingUnavailable
from tests.model.fake_source import FakeSource
from tests.model.memory_disk import pattern, settled

C = 64 << 10
SIZE = 64 * C
BASE = pattern(SIZE)


class Copier:
    """Takes note of what is to be copied, and waits if told so."""

    def __init__(self) -> None:
        self.copied: list[tuple[int, int]] = []
        self.may_end = trio.Event()
        self.may_end.set()

    async def copy(self, fetch: Fetch) -> None:
        self.copied.append((fetch.first, fetch.end))
        await self.may_end.wait()


class AsBacking:
    """Asks a source at once. `urgent` is what was said of the newest request."""

    def __init__(self, source: FakeSource) -> None:
        self._source = source
        self.urgent: Callable[[], bool] | None = None

    async def read_into(self, pos: int, buffer: memoryview, *, urgent: Callable[[], bool]) -> None:
        self.urgent = urgent
        await self._source.read_into(pos, buffer)


@pytest.fixture
def source() -> FakeSource:
    return FakeSource(BASE)


@pytest.fixture
def copier() -> Copier:
    return Copier()


@pytest.fixture
async def fetches(nursery: trio.Nursery, source: FakeSource, copier: Copier) -> Fetches:
    return Fetches(AsBacking(source), C, nursery, copier.copy)


async def test_neighbours_are_fetched_at_once_in_pieces_of_limited_size(fetches: Fetches, source: FakeSource) -> None:
    joined = fetches.join(1, 40, SIZE, copy=False)
    assert [(f.first, f.end) for f in joined] == [(1, 17), (17, 33), (33, 40)]
    assert b"".join(await fetches.wait(joined)) == BASE[C : 40 * C]
    assert max(length for _, length in source.requests) == MAX_FETCH


async def test_a_fetch_is_urgent_while_somebody_waits_for_it(nursery: trio.Nursery, source: FakeSource) -> None:
    backing = AsBacking(source)
    gate = source.hold()
    fetches = Fetches(backing, C, nursery, Copier().copy)
    joined = fetches.join(0, 1, SIZE, copy=False, wanted=True)
    await gate.arrived()
    assert backing.urgent is not None
    assert not backing.urgent()
    nursery.start_soon(fetches.wait, joined)
    await trio.testing.wait_all_tasks_blocked()
    assert backing.urgent()
    gate.release()


async def test_a_late_joiner_gets_the_fetches_under_way_and_new_ones_for_the_gaps(fetches: Fetches) -> None:
    (middle,) = fetches.join(5, 8, SIZE, copy=False)
    joined = fetches.join(3, 10, SIZE, copy=False)
    assert [(f.first, f.end) for f in joined] == [(3, 5), (5, 8), (8, 10)]
    assert joined[1] is middle
    assert fetches.join(6, 7, SIZE, copy=True) == [middle]
    assert b"".join(await fetches.wait(joined)) == BASE[3 * C : 10 * C]


async def test_bytes_past_the_end_of_the_disk_are_zeros_whatever_the_backing_has(fetches: Fetches) -> None:
    joined = fetches.join(0, 1, 1000, copy=False)
    assert bytes((await fetches.wait(joined))[0]) == BASE[:1000] + bytes(C - 1000)


async def test_a_fetch_is_copied_once_and_can_be_joined_until_its_copy_has_ended(
    fetches: Fetches, source: FakeSource, copier: Copier
) -> None:
    copier.may_end = trio.Event()
    joined = fetches.join(0, 1, SIZE, copy=True)
    await fetches.wait(joined)
    assert fetches.join(0, 1, SIZE, copy=True) == joined
    copier.may_end.set()
    await settled()
    assert copier.copied == [(0, 1)]
    assert fetches.join(0, 1, SIZE, copy=False) != joined


async def test_a_fetch_for_a_write_is_not_copied(fetches: Fetches, copier: Copier) -> None:
    await fetches.wait(fetches.join(0, 1, SIZE, copy=False))
    await settled()
    assert copier.copied == []


@pytest.mark.parametrize(("wanted", "goes_on"), [(False, False), (True, True)])
async def test_when_its_last_waiter_leaves_only_a_wanted_fetch_goes_on(
    fetches: Fetches, source: FakeSource, copier: Copier, wanted: bool, goes_on: bool
) -> None:
    gate = source.hold()
    with trio.move_on_after(0):
        await fetches.wait(fetches.join(0, 1, SIZE, copy=True, wanted=wanted))
    await settled()
    assert gate.waiting == goes_on
    gate.release()
    await settled()
    assert copier.copied == ([(0, 1)] if goes_on else [])
    assert fetches._budget.available(COPY_BUDGET), "the budget is given back"
    await fetches.wait(fetches.join(0, 1, SIZE, copy=False))


async def test_a_failure_reaches_each_waiter_and_nobody_who_comes_later(fetches: Fetches, source: FakeSource) -> None:
    source.error = BackingRefused("fake", "gone")
    joined = fetches.join(0, 1, SIZE, copy=True)
    for _ in range(2):
        with pytest.raises(BackingRefused, match="gone"):
            await fetches.wait(joined)
    source.error = None
    await fetches.wait(fetches.join(0, 1, SIZE, copy=True))


async def test_who_waits_when_the_disk_is_closed_is_told_so(source: FakeSource, copier: Copier) -> None:
    source.hold()
    async with trio.open_nursery() as waiters, trio.open_nursery() as nursery:
        fetches = Fetches(AsBacking(source), C, nursery, copier.copy)

        async def wait() -> None:
            with pytest.raises(BackingUnavailable, match="closed"):
                await fetches.wait(fetches.join(0, 1, SIZE, copy=True))

        waiters.start_soon(wait)
        await settled()
        nursery.cancel_scope.cancel()


async def test_widening_gives_up_where_a_demand_would_wait_for_the_budget(fetches: Fetches, copier: Copier) -> None:
    copier.may_end = trio.Event()
    fetches._budget = Budget(4 * C)
    assert fetches.widen(0, 3, SIZE)
    await settled()
    assert not fetches.widen(3, 5, SIZE)
    done: list[int] = []

    async def demand() -> None:
        await fetches.wait(fetches.join(10, 12, SIZE, copy=True))
        done.append(10)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(demand)
        await settled()
        assert done == [], "it waits until the leaf has taken some"
        await fetches.wait(fetches.join(20, 21, SIZE, copy=False))  # a write does not
        copier.may_end.set()
    assert done == [10]


class Reserving:
    """Reservations by name."""

    def __init__(self, nursery: trio.Nursery, capacity: int) -> None:
        self.budget = Budget(capacity)
        self.admitted: list[str] = []
        self.nursery = nursery

    async def ask(self, name: str, amount: int) -> trio.CancelScope:
        scope = trio.CancelScope()

        async def reserve() -> None:
            with scope:
                await self.budget.reserve(amount)
                self.admitted.append(name)

        self.nursery.start_soon(reserve)
        await settled()
        return scope


async def test_reservations_are_admitted_in_order_of_arrival(nursery: trio.Nursery) -> None:
    reserving = Reserving(nursery, 10)
    await reserving.ask("a", 8)
    await reserving.ask("b", 5)
    await reserving.ask("small", 1)  # there would be room, but b came first
    assert reserving.admitted == ["a"]
    reserving.budget.release(8)
    await settled()
    assert sorted(reserving.admitted) == ["a", "b", "small"]


async def test_one_reservation_is_admitted_however_large(nursery: trio.Nursery) -> None:
    reserving = Reserving(nursery, 10)
    await reserving.ask("huge", 1000)
    await reserving.ask("next", 1)
    assert reserving.admitted == ["huge"]
    reserving.budget.release(1000)
    await settled()
    assert reserving.admitted == ["huge", "next"]


async def test_whoever_leaves_lets_those_behind_pass_and_gives_back_what_he_got(nursery: trio.Nursery) -> None:
    reserving = Reserving(nursery, 10)
    await reserving.ask("a", 8)
    leaving = await reserving.ask("b", 5)
    await reserving.ask("c", 2)
    leaving.cancel()
    await settled()
    assert reserving.admitted == ["a", "c"]
    await reserving.ask("d", 9)
    reserving.budget.release(8)
    reserving.budget.release(2)
    await settled()
    assert reserving.admitted == ["a", "c", "d"]
    reserving.budget.release(9)
    assert reserving.budget.available(10)


@pytest.fixture(autouse=True)
def _virtual_time(autojump_clock: trio.testing.MockClock) -> None:
    """A test that waits in vain ends at once."""
