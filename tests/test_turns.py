from __future__ import annotations

import pytest
import trio
from trio.testing import assert_checkpoints, assert_no_checkpoints

from qedfs.turns import MOST_PASSES, Turns, beside, take_turn


class Guest:
    """Asks at `ask`, and is served when its task runs, as FUSE's worker is."""

    def __init__(self) -> None:
        self.asking = False
        self.steps = 0
        """Of the background, since it has asked."""

    def waiting(self) -> bool:
        return self.asking

    async def serve(self, turns: Turns, requests: int) -> list[int]:
        """Answer so many requests; return how many steps each has waited for."""
        waits: list[int] = []
        while len(waits) < requests:
            turns.grant()
            await trio.lowlevel.checkpoint()
            if self.asking:
                waits.append(self.steps)
                self.asking = False
        return waits


async def test_without_guests_there_is_nothing_to_wait_for() -> None:
    with assert_no_checkpoints():
        await take_turn()


async def test_a_step_is_taken_at_once_while_no_request_waits() -> None:
    with beside(Turns(lambda: False)), assert_no_checkpoints():
        for _ in range(3):
            await take_turn()


async def test_a_step_stands_aside_while_a_request_waits_but_not_for_ever() -> None:
    passes = 0

    async def count() -> None:
        nonlocal passes
        while True:
            await trio.lowlevel.checkpoint()
            passes += 1

    with beside(Turns(lambda: True)):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(count)
            await trio.lowlevel.checkpoint()
            passes = 0
            with assert_checkpoints():
                await take_turn()
            assert abs(passes - MOST_PASSES) <= 1
            nursery.cancel_scope.cancel()


async def test_a_grant_is_for_one_step() -> None:
    turns = Turns(lambda: True)
    with beside(turns):
        turns.grant()
        with assert_no_checkpoints():
            await take_turn()
        with assert_checkpoints():
            await take_turn()


async def waits_beside_five(guest: Guest, turns: Turns) -> list[int]:
    """The steps that each of 200 requests has waited for, made at the worst moment: while a step is under way."""

    async def background() -> None:
        while True:
            await take_turn()
            guest.steps = guest.steps + 1 if guest.asking else 1
            guest.asking = True
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(background)
        waits = await guest.serve(turns, 200)
        nursery.cancel_scope.cancel()
    return waits


async def test_a_request_waits_for_one_step_that_began_and_one_that_was_due_however_many_want_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qedfs.turns.MOST_PASSES", 1000)  # nobody is tired of standing aside
    guest = Guest()
    turns = Turns(guest.waiting)
    assert max(await waits_beside_five(guest, turns)) >= 4, "nothing limits them here"
    with beside(turns):
        assert max(await waits_beside_five(guest, turns)) <= 2


async def test_outside_of_the_context_nobody_is_asked() -> None:
    with beside(Turns(lambda: True)):
        pass
    with assert_no_checkpoints():
        await take_turn()
