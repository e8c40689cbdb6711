from __future__ import annotations

import random

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from qedfs.disk.claims import Claims
from tests.model.effort import examples
from tests.model.memory_disk import settled


class Queue:
    """Tasks that hold claims until they are told to let go."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.claims = Claims()
        self.holding: list[str] = []
        self._nursery = nursery
        self._letting_go: dict[str, trio.Event] = {}
        self.scopes: dict[str, trio.CancelScope] = {}

    async def ask(self, name: str, first: int, end: int) -> None:
        self._letting_go[name] = trio.Event()
        self.scopes[name] = trio.CancelScope()
        self._nursery.start_soon(self._hold, name, first, end)
        await settled()

    async def let_go(self, name: str) -> None:
        self._letting_go[name].set()
        await settled()

    async def cancel(self, name: str) -> None:
        self.scopes[name].cancel()
        await settled()

    async def _hold(self, name: str, first: int, end: int) -> None:
        with self.scopes[name]:
            async with self.claims.hold(first, end):
                self.holding.append(name)
                try:
                    await self._letting_go[name].wait()
                finally:
                    self.holding.remove(name)


async def test_claims_that_overlap_are_held_in_order_of_arrival_and_others_at_once(nursery: trio.Nursery) -> None:
    queue = Queue(nursery)
    await queue.ask("a", 0, 4)
    await queue.ask("b", 2, 6)
    await queue.ask("c", 4, 8)  # overlaps b, which came first
    await queue.ask("d", 8, 9)
    assert queue.holding == ["a", "d"]
    await queue.let_go("a")
    assert queue.holding == ["d", "b"]
    await queue.let_go("b")
    assert queue.holding == ["d", "c"]


async def test_a_wide_claim_is_not_starved_by_narrow_ones_that_keep_coming(nursery: trio.Nursery) -> None:
    queue = Queue(nursery)
    await queue.ask("narrow", 0, 1)
    await queue.ask("wide", 0, 9)
    for i in range(1, 9):
        await queue.ask(f"late {i}", i, i + 1)
    assert queue.holding == ["narrow"]
    await queue.let_go("narrow")
    assert queue.holding == ["wide"]
    await queue.let_go("wide")
    assert len(queue.holding) == 8


async def test_whoever_leaves_the_queue_lets_those_behind_pass(nursery: trio.Nursery) -> None:
    queue = Queue(nursery)
    await queue.ask("a", 0, 2)
    await queue.ask("b", 0, 9)
    await queue.ask("c", 5, 6)
    assert queue.holding == ["a"]
    await queue.cancel("b")
    assert queue.holding == ["a", "c"]
    await queue.cancel("a")
    assert queue.holding == ["c"]
    await queue.ask("d", 0, 5)
    assert queue.holding == ["c", "d"]


async def test_a_claim_granted_to_a_task_that_is_cancelled_at_that_moment_is_given_back(nursery: trio.Nursery) -> None:
    queue = Queue(nursery)
    await queue.ask("a", 0, 2)
    await queue.ask("b", 0, 2)
    await queue.ask("c", 0, 2)
    queue._letting_go["a"].set()
    queue.scopes["b"].cancel()
    await settled()
    assert queue.holding == ["c"]


async def test_copies_take_what_nobody_holds_all_at_once_and_writers_wait_for_them(nursery: trio.Nursery) -> None:
    queue = Queue(nursery)
    await queue.ask("a", 2, 4)
    await queue.ask("b", 5, 6)
    with queue.claims.hold_unclaimed(0, 8) as parts:
        assert parts == [(0, 2), (4, 5), (6, 8)]
        await queue.ask("c", 7, 9)
        assert queue.holding == ["a", "b"]
        with queue.claims.hold_unclaimed(0, 8) as others:
            assert others == []
    await settled()
    assert queue.holding == ["a", "b", "c"]


@examples(50)
@given(seed=st.integers(0, 1 << 32))
async def test_no_cluster_has_two_holders_and_all_get_their_turn(seed: int) -> None:
    dice = random.Random(seed)
    claims = Claims()
    held: set[int] = set()

    async def use() -> None:
        first = dice.randrange(20)
        end = first + dice.randrange(1, 8)
        with trio.CancelScope() as scope:
            if dice.random() < 0.3:
                scope.cancel()
            if dice.random() < 0.3:
                with claims.hold_unclaimed(first, end) as parts:
                    await hold({c for a, b in parts for c in range(a, b)})
            else:
                async with claims.hold(first, end):
                    await hold(set(range(first, end)))

    async def hold(clusters: set[int]) -> None:
        assert not held & clusters
        held.update(clusters)
        try:
            for _ in range(dice.randrange(4)):
                await trio.lowlevel.checkpoint()
        finally:
            held.difference_update(clusters)

    async with trio.open_nursery() as nursery:
        for _ in range(40):
            nursery.start_soon(use)
            if dice.random() < 0.5:
                await trio.lowlevel.checkpoint()
    with claims.hold_unclaimed(0, 30) as parts:
        assert parts == [(0, 30)]


@pytest.fixture(autouse=True)
def _virtual_time(autojump_clock: trio.testing.MockClock) -> None:
    """A test that waits in vain ends at once."""
